"""What fronts know of each other, so that a limit holds for all of them together: one segment, made by the supervisor.

Each front writes its own cells only, and sums up everybody's: no front ever waits for another, and one that died blocks
nobody. A cell is 8 bytes, written and read as a whole. What a front decides while others do, it has not seen: a limit
may be passed by one request for each front.

    header      fronts, slots, slots taken      int64 each
    memory      bytes held                      int64, a cell for each front
    calls       calls that ended                int64, a cell for each front
    names       a hash of 16 bytes for each slot that is taken
    slots       in flight, admitted             int64, a cell for each front
                idle                            float64, a cell for each front
"""

import fcntl
import hashlib
import logging
import struct
from typing import Self

from appliance.core.shared import Segment

_log = logging.getLogger(__name__)

_CELL = 8
_HEADER = 3 * _CELL
_NAME = 16
_KINDS = 3
"""Cells of a front in one slot."""


class SharedUse:
    """A number of each front's, seen from one of them: bytes that it holds of the memory budget, calls that ended."""

    def __init__(self, cells: memoryview, index: int) -> None:
        self._all = struct.Struct(f"{len(cells)}q")
        self._cells = cells
        self._index = index

    def write(self, used: int) -> None:
        """This front's number."""
        self._cells[self._index] = used

    def others(self) -> int:
        """Those of the other fronts together."""
        cells = self._all.unpack_from(self._cells)
        return int(sum(cells) - cells[self._index])


class SharedMeter:
    """Requests of one principal at all fronts, seen from one of them; `api.auth.Meter` says what the numbers mean.

    There may be several of one name in a front: they count in the same cells.
    """

    def __init__(self, cells: memoryview, fronts: int, index: int) -> None:
        """Args: cells: the slot's, as bytes."""
        self._counts, self._moments = struct.Struct(f"{fronts}q"), struct.Struct(f"{fronts}d")
        self._in_flight, self._admitted, idle = (cells[i * fronts * _CELL :][: fronts * _CELL] for i in range(_KINDS))
        self._own_in_flight, self._own_admitted = self._in_flight.cast("q"), self._admitted.cast("q")
        self._own_idle = idle.cast("d")
        self._idle = idle
        self._index = index

    def in_flight(self) -> int:
        """Requests in flight at all fronts."""
        return sum(self._counts.unpack_from(self._in_flight))

    def look(self) -> tuple[int, float]:
        """Requests admitted by all fronts since the supervisor began, and the largest `idle` of them."""
        return sum(self._counts.unpack_from(self._admitted)), max(self._moments.unpack_from(self._idle))

    def take(self, idle: float) -> None:
        """One more is admitted, and in flight."""
        index = self._index
        self._own_in_flight[index] += 1
        self._own_idle[index] = idle  # before the count: whoever sees half of it admits too little, not too much
        self._own_admitted[index] += 1

    def leave(self) -> None:
        """One is in flight no more."""
        self._own_in_flight[self._index] -= 1


class SharedLimits:
    """What all fronts hold and have admitted, in one segment; the supervisor makes it, each front attaches to it."""

    def __init__(self, segment: Segment, index: int | None) -> None:
        """Use `create` or `attach`."""
        self.segment = segment
        self._index = index  # None: the supervisor's, which holds and admits nothing itself
        self._header = segment.view[:_HEADER].cast("q")
        self.fronts, self._slots = self._header[0], self._header[1]
        calls = _HEADER + self.fronts * _CELL
        self._names = calls + self.fronts * _CELL
        self._cells = self._names + self._slots * _NAME
        self._memory = segment.view[_HEADER:calls].cast("q")
        self._calls = segment.view[calls : self._names].cast("q")
        self._full = False

    @classmethod
    def create(cls, fronts: int, slots: int = 4096) -> Self:
        """Make it; the descriptor of its segment goes to the fronts.

        Args:   slots: how many principals with limits there may be; one whose limits change takes another.
        Raises: OSError.
        """
        cells = 2 * fronts + slots * fronts * _KINDS
        segment = Segment.create("fronts", _HEADER + cells * _CELL + slots * _NAME)
        header = segment.view[:_HEADER].cast("q")
        header[0], header[1] = fronts, slots
        return cls(segment, None)

    @classmethod
    def attach(cls, descriptor: int, index: int) -> Self:
        """Take part as the front of that index; the descriptor is ours then. Raises: ValueError."""
        limits = cls(Segment.attach(descriptor), index)
        if not 0 <= index < limits.fronts:
            raise ValueError(f"there are {limits.fronts} fronts, and no front {index}")
        return limits

    def clear(self, index: int) -> None:
        """What that front held and had in flight is no more: it is dead, and another in its place does not run yet.

        What it admitted stays: nobody gains a request by it.
        """
        self._memory[index] = self._calls[index] = 0
        for slot in range(self._header[2]):
            self._slot(slot)[index * _CELL :][:_CELL].cast("q")[0] = 0

    def memory(self) -> SharedUse:
        """What this front holds of the memory budget, and the others."""
        assert self._index is not None
        return SharedUse(self._memory, self._index)

    def calls(self) -> SharedUse:
        """How many calls ended at this front since it began, and at the others."""
        assert self._index is not None
        return SharedUse(self._calls, self._index)

    def meter(self, name: str) -> SharedMeter | None:
        """What counts the requests of that name; None when there is no slot left, which the log says once."""
        assert self._index is not None
        slot = self._claimed(hashlib.blake2b(name.encode(), digest_size=_NAME).digest())
        if slot is not None:
            return SharedMeter(self._slot(slot), self.fronts, self._index)
        if not self._full:
            _log.warning("too many limits of principals since the start; the new ones hold for each front by itself")
        self._full = True
        return None

    def _claimed(self, name: bytes) -> int | None:
        """The slot of that name, taken now if it has none. A front that dies here lets the lock go."""
        fcntl.lockf(self.segment.descriptor, fcntl.LOCK_EX)
        try:
            taken = self._header[2]
            end = self._names + taken * _NAME
            place = bytes(self.segment.view[self._names : end]).find(name)
            if place >= 0:
                return place // _NAME
            if taken == self._slots:
                return None
            self.segment.view[end : end + _NAME] = name
            self._header[2] = taken + 1
            return taken
        finally:
            fcntl.lockf(self.segment.descriptor, fcntl.LOCK_UN)

    def _slot(self, slot: int) -> memoryview:
        size = self.fronts * _KINDS * _CELL
        return self.segment.view[self._cells + slot * size :][:size]
