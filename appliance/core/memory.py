"""The memory budget: what requests hold at once, over all connections, is bounded before it is allocated."""

from types import TracebackType
from typing import Self

from appliance.core.errors import Overloaded


class MemoryBudget:
    """Bytes that requests may hold at once; beyond it a request is refused, and the process never runs out of memory.

    Used from the event loop's thread only.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def hold(self, count: int) -> "Reservation":
        """Reserve `count` bytes until the reservation is released.

        Raises: Overloaded: they are not free now; the sentence says when they never will be.
        """
        reservation = Reservation(self)
        reservation.grow(count)
        return reservation


class Reservation:
    """Bytes held by one request; grows as the request turns out to need more, and is given back once."""

    __slots__ = ("_budget", "count")

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.count = 0

    def grow(self, count: int) -> None:
        """Reserve `count` more bytes. Raises: Overloaded: they are not free."""
        budget = self._budget
        # Nothing can always be had, even while replies that wait have taken more than there is.
        if count and budget.used + count > budget.limit:
            raise Overloaded(
                f"This request needs {_mib(self.count + count)} of memory; {_mib(budget.limit - budget.used)} of "
                f"limits.memory_in_flight ({_mib(budget.limit)}) are free. "
                + ("Send fewer or smaller inputs." if self.count + count > budget.limit else "Try again.")
            )
        budget.used += count
        self.count += count

    def shrink_to(self, count: int) -> None:
        """Give back what is held beyond `count` bytes."""
        if self.count > count:
            self._budget.used -= self.count - count
            self.count = count

    def release(self) -> None:
        """Give everything back; a second call does nothing."""
        self._budget.used -= self.count
        self.count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
