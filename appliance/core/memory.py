"""The memory budget: what requests hold at once, over all connections, is bounded before it is allocated."""

from types import TracebackType
from typing import Self

from appliance.core.errors import Overloaded
from appliance.core.sharing import SharedUse

STRANGER = ""
"""Owner of what comes from clients whose credentials nobody has seen."""

_KEPT = 8
"""One part in so many of the limit is kept from what is still coming: small requests that are here find room in it."""

_STRANGERS = 16
"""All strangers together have one part in so many of the limit."""


class MemoryBudget:
    """Bytes that requests may hold at once; beyond it a request is refused, and the process never runs out of memory.

    Whoever announces much and sends it slowly must not shut the others out. What is still coming, or waits for a client
    to take it, may not use the last eighth; of that, one principal may have three quarters of the limit, and all
    strangers together a sixteenth. Used from the event loop's thread only.

    Fronts that share a limit each have a budget of that limit, and see what the others hold of it. While they decide at
    once, each may give one request too many. Shares are counted at each front by itself: a principal that calls at
    several has its share at each, and all together still have no more than the limit.
    """

    def __init__(self, limit: int, shared: SharedUse | None = None) -> None:
        """Args: shared: what other fronts hold of the same limit; None: there are none."""
        self.limit = limit
        self.used = 0
        """Bytes that are held here."""
        self._shared = shared
        self._shares: dict[str, int] = {}  # owner → bytes

    def hold(self, count: int) -> "Reservation":
        """Reserve `count` bytes for a request that is here, until the reservation is released.

        Raises: Overloaded: they are not free now; the sentence says when they never will be.
        """
        reservation = Reservation(self)
        reservation.grow(count)
        return reservation

    def expect(self, count: int, owner: str | None = None) -> "Reservation":
        """Reserve `count` bytes for what is still coming, or waits to be taken.

        Args:    owner: the principal it is for, or STRANGER; None: nobody's share is asked.
        Raises:  Overloaded: as `hold`.
        """
        reservation = Reservation(self, coming=True, owner=owner)
        reservation.grow(count)
        return reservation

    @property
    def free(self) -> int:
        """Bytes for what is still coming, or waits to be taken."""
        return self._for_coming - self.taken

    @property
    def taken(self) -> int:
        """Bytes that are held, at all fronts."""
        return self.used if self._shared is None else self.used + self._shared.others()

    def add(self, count: int) -> None:
        """Hold `count` bytes more here, or fewer, whatever the limit is."""
        self.used += count
        if self._shared is not None:
            self._shared.write(self.used)

    @property
    def _for_coming(self) -> int:
        return self.limit - self.limit // _KEPT

    def _share(self, owner: str) -> int:
        return self.limit // _STRANGERS if owner == STRANGER else self.limit // 4 * 3


class Reservation:
    """Bytes held by one request; grows as the request turns out to need more, and is given back once."""

    __slots__ = ("_budget", "_coming", "_owner", "count")

    def __init__(self, budget: MemoryBudget, *, coming: bool = False, owner: str | None = None) -> None:
        self._budget = budget
        self._coming = coming
        self._owner = owner
        self.count = 0

    def grow(self, count: int) -> None:
        """Reserve `count` more bytes. Raises: Overloaded: they are not free."""
        if not count:  # nothing can always be had, even while replies that wait have taken more than there is
            return
        budget, owner = self._budget, self._owner
        taken = budget.used if budget._shared is None else budget.taken
        free = (budget._for_coming if self._coming else budget.limit) - taken
        if owner is not None:
            free = min(free, budget._share(owner) - budget._shares.get(owner, 0))
        if count > free:
            raise Overloaded(
                f"This request needs {_size(self.count + count)} of memory; {_size(max(0, free))} of "
                f"limits.memory_in_flight ({_size(budget.limit)}) are free for it. "
                + ("Send fewer or smaller inputs." if self.count + count > self._most() else "Try again.")
            )
        self._add(count)

    def _most(self) -> int:
        """Bytes that it could have if nobody else held any."""
        most = self._budget._for_coming if self._coming else self._budget.limit
        return most if self._owner is None else min(most, self._budget._share(self._owner))

    def follow(self, other: "Reservation") -> None:
        """From now on take the share of the budget that `other` takes: what was a stranger's has an owner."""
        count = self.count
        self._add(-count)
        self._owner = other._owner
        self._add(count)

    def shrink_to(self, count: int) -> None:
        """Give back what is held beyond `count` bytes."""
        if self.count > count:
            self._add(count - self.count)

    def release(self) -> None:
        """Give everything back; a second call does nothing."""
        self._add(-self.count)

    def _add(self, count: int) -> None:
        self.count += count
        budget = self._budget
        budget.used += count
        if budget._shared is not None:
            budget._shared.write(budget.used)
        if self._owner is not None:
            shares = budget._shares
            shares[self._owner] = shares.get(self._owner, 0) + count
            if not shares[self._owner]:
                del shares[self._owner]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
