"""What surrounds a run of a model: who may run beside it, and who is told which rows are in it.

A run that crashes takes the engine's process with it. Whoever owns the rows learns from their marks which of them were
in a run then, and from a run that had the engine for itself that it was the one at fault.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from appliance.core.types import Array


class Runs(Protocol):
    """What is run; `Session` is one."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Compute the named outputs for all rows of `feeds`."""

    def terminate(self, thread: int | None = None) -> None:
        """End the run in progress on that thread (its identity), or all runs, soon: they raise InferenceFailed."""


class Marks(Protocol):
    """Told which rows of one submission are in a run; on the thread that runs, and while it waits: be quick.

    Rows of one submission may be in several runs at once, on several threads; each row is in one at most. No two
    threads tell at a time. A run that had begun is told of until it is over, though its submission was cancelled
    meanwhile.
    """

    def running(self, start: int, count: int) -> None:
        """Rows `start` … `start + count` are about to run."""

    def idle(self, start: int, count: int) -> None:
        """Their run is over, however it ended; a failed one may be tried again in parts."""


class RunBoard(Protocol):
    """Told of every run of one model, on the thread that runs, and while it waits: be quick."""

    def begin(self) -> int:
        """A run begins. Returns: what `end` is told."""

    def end(self, token: int) -> None:
        """It is over, however it ended."""


_telling = threading.Lock()
"""Held while marks are told."""

Marked: TypeAlias = tuple[Marks, int, int]
"""The marks of a submission, and which of its rows are in one run: `start` … `start + count`."""


class RunGate:
    """Lets runs of one engine in: any number at once, or one alone.

    One that is to be alone goes before those that come after it; these wait for one such run at most, however many
    come. Any thread may call.

    Attributes:
        shut: how many runs that are to be alone are in progress or wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self.shut = 0
        self._taken = False
        self._waiting = self._due = self._turn = 0

    def try_enter(self) -> bool:
        """Let in a run beside others, unless that needs waiting. Returns: whether it is in; then call `leave`."""
        with self._lock:
            if self.shut:
                return False
            self._inside += 1
            return True

    def enter(self, alone: bool = False) -> None:
        """Let in a run, beside others or alone, as soon as that is possible; then call `leave`."""
        with self._lock:
            if alone:
                self.shut += 1
                while self._inside or self._taken or self._due:
                    self._changed.wait()
                self._taken = True
                return
            if self.shut:
                turn = self._turn
                self._waiting += 1
                while turn == self._turn:
                    self._changed.wait()
                self._waiting -= 1
                self._due -= 1
            self._inside += 1

    def leave(self, alone: bool = False) -> None:
        """The run is over."""
        with self._lock:
            if alone:
                self._taken = False
                self.shut -= 1
                self._turn += 1
                self._due = self._waiting
            else:
                self._inside -= 1
            if alone or (self.shut and not self._inside):
                self._changed.notify_all()


def run(
    model: Runs,
    outputs: Sequence[str],
    feeds: Mapping[str, Array],
    marked: Sequence[Marked],
    board: RunBoard | None,
) -> list[Array]:
    """Run the model; marks and board are told strictly before, and strictly after. Raises: what the model raises."""
    if not marked and board is None:
        return model.run(outputs, feeds)
    token = board.begin() if board is not None else 0
    try:
        if marked:
            with _telling:
                for marks, start, count in marked:
                    marks.running(start, count)
        return model.run(outputs, feeds)
    finally:
        if marked:
            with _telling:
                for marks, start, count in marked:
                    marks.idle(start, count)
        if board is not None:
            board.end(token)
