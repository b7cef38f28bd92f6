"""A child's board: what its supervisor sees of it at any time, also when it is stopped, stuck or dead.

Shared memory made by the supervisor, written by the child alone: when its loop last turned; of an engine also how long
its longest run took, and which models are being loaded or run right now. After a crash that says whose doing it was.
"""

import threading
import time
from dataclasses import dataclass

import numpy as np

from appliance.core.shared import Segment

_PLACES = 512
"""Runs and loads that can be told at a time; more are not told."""

DEVICE_GONE = 75
"""Exit code of an engine that cannot go on: a run that cannot be ended, or a device that is lost to it."""

_TURNED, _LONGEST, _FIRST = 0, 1, 8
_LOADS = 1 << 32

SIZE = (_FIRST + 2 * _PLACES) * 8
"""Bytes of the board's segment."""


@dataclass(frozen=True, slots=True)
class Activity:
    """What an engine is doing: running or loading a version."""

    number: int
    loads: bool


class Board:
    """The board, as either side has it."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._cells = np.frombuffer(segment.view[:SIZE], np.uint64)
        self._lock = threading.Lock()
        self._free = list(range(_PLACES))

    # ---- the child ----

    def turned(self) -> None:
        """The child's loop turns."""
        self._cells[_TURNED] = time.monotonic_ns()

    def begin(self, number: int, *, loads: bool = False) -> int:
        """A run or a load of a model begins. Returns: what `end` wants. Called from any thread."""
        with self._lock:
            if not self._free:
                return -1
            place = self._free.pop()
        at = _FIRST + 2 * place
        self._cells[at + 1] = time.monotonic_ns()
        self._cells[at] = number + 1 + (_LOADS if loads else 0)
        return place

    def end(self, place: int) -> None:
        """It is over."""
        if place < 0:
            return
        at = _FIRST + 2 * place
        told = int(self._cells[at])
        self._cells[at] = 0
        if not told & _LOADS:
            took = time.monotonic_ns() - int(self._cells[at + 1])
            if took > int(self._cells[_LONGEST]):
                self._cells[_LONGEST] = took
        with self._lock:
            self._free.append(place)

    # ---- the supervisor ----

    @property
    def turned_ago_s(self) -> float:
        """Seconds since the child's loop last turned."""
        return (time.monotonic_ns() - int(self._cells[_TURNED])) / 1e9

    @property
    def longest_run_s(self) -> float:
        """Seconds of the longest run so far."""
        return int(self._cells[_LONGEST]) / 1e9

    def activities(self) -> list[Activity]:
        """What it does now, or did when it died."""
        found = []
        for place in range(_PLACES):
            at = _FIRST + 2 * place
            told = int(self._cells[at])
            if told:
                number = (told & 0xFFFFFFFF) - 1
                found.append(Activity(number, bool(told & _LOADS)))
        return found

    def close(self) -> None:
        """Unmap it here; nothing is asked of it any more."""
        del self._cells
        self.segment.close()


class VersionBoard:
    """The board as the runs of one version are told to it; a `RunBoard`."""

    def __init__(self, board: Board, number: int) -> None:
        self._board = board
        self._number = number

    def begin(self) -> int:
        """See `RunBoard.begin`."""
        return self._board.begin(self._number)

    def end(self, token: int) -> None:
        """See `RunBoard.end`."""
        self._board.end(token)
