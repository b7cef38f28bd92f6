"""The batcher: rows of many requests become one run of the model, and every request ends exactly once.

The law. Admission is a permit, refused at once when the queue is full. A batch is whatever queued while the last one
ran: no timer. Only rows of one shape share a run; principals take turns, within a run and among the shapes, and within
a principal the nearest deadline goes first. Who left or expired is skipped while the batch is formed. A failed batch is
halved until the rows at fault stand alone; the others are answered. When the device runs out of memory the batch is
halved and the smaller size is kept. A run that nobody waits for any more is ended. A worker thread that dies, or a run
that cannot be ended, makes the model not ready, loudly; everybody is answered.

Rows, not requests: a big submission is cut into several runs, small ones share one.
"""

import asyncio
import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np

from appliance.core.errors import ApplianceError, DeadlineExceeded, Draining, InferenceFailed, Overloaded
from appliance.core.types import Array
from appliance.engine.session import OutOfMemory

_log = logging.getLogger(__name__)

ShapeKey: TypeAlias = tuple[tuple[str, tuple[int, ...], str], ...]

_NEVER = float("inf")

_LOOK_S = 1.0
"""Seconds between two looks at a run: one that nobody waits for any more is ended."""

_DEAF_S = 30.0
"""Seconds after which a run that was told to end and did not makes the model not ready."""


class Runs(Protocol):
    """What the batcher runs; `Session` is one."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Compute the named outputs for all rows of `feeds`."""

    def terminate(self) -> None:
        """End the runs in progress soon; they raise InferenceFailed."""


@dataclass(slots=True)
class Outcome:
    """What became of the rows of one submission.

    Attributes:
        arrays: output name → array with one entry a row along the first axis; rows in `errors` hold nothing useful.
            Empty when every row failed.
        errors: row → why it failed.
    """

    arrays: dict[str, Array]
    errors: dict[int, ApplianceError]


@dataclass(slots=True)
class RunRecord:
    """One run, for the metrics: rows, seconds of compute, and how long each piece of a submission had waited."""

    rows: int
    seconds: float
    waits: list[float]


@dataclass(slots=True, eq=False)
class _Submission:
    """Rows of one request on their way; `taken` of `count` are in a run or done, `open` are not answered yet.

    `left` says that the rest is not waiting any more.
    """

    feeds: Mapping[str, Array]
    count: int
    outputs: tuple[str, ...]
    deadline: float
    principal: str
    key: ShapeKey
    future: "asyncio.Future[Outcome]"
    queued_at: float
    taken: int = 0
    open: int = 0
    pieces: list[tuple[int, dict[str, Array]]] = field(default_factory=list)
    errors: dict[int, ApplianceError] = field(default_factory=dict)
    left: bool = False

    def outcome(self) -> Outcome:
        """Put the pieces together in row order; failed rows are filled with zeros.

        Raises: ValueError: the pieces have different shapes.
        """
        if not self.pieces:
            return Outcome({}, self.errors)
        if len(self.pieces) == 1 and not self.errors:
            return Outcome(self.pieces[0][1], {})
        arrays = {}
        for name, sample in self.pieces[0][1].items():
            whole = np.zeros((self.count, *sample.shape[1:]), sample.dtype)
            for start, piece in self.pieces:
                if piece[name].shape[1:] != sample.shape[1:]:  # assigning could broadcast one to the other
                    raise ValueError(f"{name}: {piece[name].shape[1:]} and {sample.shape[1:]}")
                whole[start : start + len(piece[name])] = piece[name]
            arrays[name] = whole
        return Outcome(arrays, self.errors)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows `start` … `start + count` of a submission, in one run."""

    submission: _Submission
    start: int
    count: int


class Batcher:
    """Queue and worker thread of one model.

    `submit`, `cancel` and `close` are called on the event loop's thread; runs happen on the worker's thread; outcomes
    come back to the loop, one wake-up a batch.
    """

    def __init__(
        self,
        model: Runs,
        *,
        max_rows: int,
        queue_rows: int,
        separate: bool = False,
        whole: bool = False,
        pad: bool = False,
        parallel: int = 1,
        shapes: Mapping[ShapeKey, int] | None = None,
        on_run: Callable[[RunRecord], None] = lambda record: None,
        on_death: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the worker.

        Args:
            max_rows: rows in one run.
            queue_rows: rows that may wait.
            separate: one row a run (rows are not proven independent).
            whole: a submission is one run as it is (the graph has no batch axis).
            pad: rows are filled up to a power of two, so that a GPU sees few shapes.
            parallel: runs at a time. (Not yet.)
            shapes: rows in one run of those shapes, where they may be fewer.
            on_run, on_death: called on the loop's thread.
        """
        self._model = model
        self.max_rows = 1 if separate or whole else max_rows
        self._shapes = shapes or {}
        self.queue_rows = queue_rows
        self._whole = whole
        self._pad = pad
        self._on_run = on_run
        self._on_death = on_death
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._queues: dict[ShapeKey, dict[str, list[tuple[float, int, _Submission]]]] = {}
        self._order = itertools.count()
        self._batches = itertools.count(1)
        self._last_turn: dict[str, int] = {}
        self._waiting = 0
        self._unfinished: set[_Submission] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._running: list[_Piece] | None = None
        self._told_to_end_at: float | None = None
        self._look: asyncio.TimerHandle | None = None
        self.death: str | None = None
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    # ---- on the loop's thread ----

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue now."""
        return self._waiting

    @property
    def at_rest(self) -> bool:
        """Whether it accepts rows, and has none."""
        return not self._unfinished and self._running is None and not self._closing and self.death is None

    def submit(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], deadline: float | None, principal: str
    ) -> "asyncio.Future[Outcome]":
        """Queue rows; the future ends with their outcome. Cancelling it takes them out of the queue.

        Args:
            feeds: input name → array with the rows along the first axis; all equally long.
            outputs: what to compute.
            deadline: `time.monotonic()` seconds.
            principal: whose turn this uses up.
        Raises:
            Overloaded: the queue is full. Draining: the model is being closed. InferenceFailed: the worker died.
        """
        count = 1 if self._whole else len(next(iter(feeds.values())))
        assert count, "no rows, so nothing would ever end this submission"
        if self.death is not None:
            raise InferenceFailed("The model's worker has died; the appliance must be restarted.", detail=self.death)
        if self._closing:
            raise Draining
        if self._waiting and self._waiting + count > self.queue_rows:
            raise Overloaded(
                f"{self._waiting} inputs wait for this model already; the limit is {self.queue_rows} "
                "(engine.queue_rows). Try again."
            )
        submission = _Submission(
            feeds=feeds,
            count=count,
            outputs=tuple(outputs),
            deadline=_NEVER if deadline is None else deadline,
            principal=principal,
            key=shape_key(feeds, self._whole),
            future=self._loop.create_future(),
            queued_at=self._clock(),
            open=count,
        )
        submission.future.add_done_callback(lambda _: self._forget(submission))
        self._unfinished.add(submission)
        self._idle.clear()
        if self._look is None:
            self._look = self._loop.call_later(_LOOK_S, self._look_at_run)
        with self._condition:
            queue = self._queues.setdefault(submission.key, {}).setdefault(principal, [])
            heapq.heappush(queue, (submission.deadline, next(self._order), submission))
            self._waiting += count
            self._condition.notify()
        return submission.future

    async def wait_idle(self) -> None:
        """Return when every accepted submission has ended."""
        await self._idle.wait()

    def close(self, error: ApplianceError | None = None) -> None:
        """Accept no more and answer what waits with `error` (Draining by default); a run in progress finishes."""
        with self._condition:
            self._closing = True
            for submission in list(self._unfinished):
                if submission.taken == 0:
                    self._fail(submission, error or Draining())
            self._condition.notify()

        self._end_run_for_nobody()

    def _look_at_run(self) -> None:
        """While there is work: end a run that nobody waits for, and give the model up when it does not obey."""
        self._look = None
        self._end_run_for_nobody()
        told_at = self._told_to_end_at
        if told_at is not None and self.death is None and self._clock() - told_at > _DEAF_S:
            self._die("a run cannot be ended")
        elif self.death is None and (self._unfinished or self._running is not None):
            self._look = self._loop.call_later(_LOOK_S, self._look_at_run)

    def _end_run_for_nobody(self) -> None:
        running = self._running
        if running is not None and all(piece.submission.left for piece in running):
            self._model.terminate()
            if self._told_to_end_at is None:
                self._told_to_end_at = self._clock()

    def _forget(self, submission: _Submission) -> None:
        """The future is done: answered here, or its caller went away; what still waited makes room at once."""
        with self._condition:
            self._leave(submission)
            if not submission.taken:
                submission.feeds = {}  # the queue lets go of the rest when it comes across it
        self._unfinished.discard(submission)
        if not self._unfinished:
            self._idle.set()

    def _leave(self, submission: _Submission) -> None:
        """Count its waiting rows no longer; the lock is held."""
        if not submission.left:
            submission.left = True
            self._waiting -= submission.count - submission.taken

    @staticmethod
    def _fail(submission: _Submission, error: ApplianceError) -> None:
        if not submission.future.done():
            submission.future.set_exception(error)

    def _deliver(self, done: list[tuple[_Piece, dict[str, Array] | ApplianceError]], record: RunRecord | None) -> None:
        for piece, result in done:
            submission = piece.submission
            if isinstance(result, ApplianceError):
                submission.errors.update(dict.fromkeys(range(piece.start, piece.start + piece.count), result))
            else:
                submission.pieces.append((piece.start, result))
            submission.open -= piece.count
            if submission.open == 0 and not submission.future.done():
                self._finish(submission)
        if record is not None:
            self._on_run(record)

    @staticmethod
    def _finish(submission: _Submission) -> None:
        try:
            submission.future.set_result(submission.outcome())
        except ValueError as error:  # runs of one submission gave answers of different shapes
            message = "The answers to the rows of this request have different shapes; send one row a request."
            submission.future.set_exception(InferenceFailed(message, detail=str(error)))
        except Exception as error:  # no memory for the whole, say: the neighbours must still get their answers
            message = "The answers to the rows of this request could not be put together."
            submission.future.set_exception(InferenceFailed(message, detail=repr(error)))

    def _die(self, reason: str) -> None:
        self.death = reason
        for submission in list(self._unfinished):
            self._fail(submission, InferenceFailed("The model's worker has died.", detail=reason))
        self._on_death(reason)

    # ---- on the worker's thread ----

    def _work(self) -> None:
        try:
            while (pieces := self._next_batch()) is not None:
                if pieces:
                    self._run(pieces)
        except BaseException as error:  # whatever it is, callers must not wait for ever
            _log.critical("the batcher's worker died: %r", error, exc_info=error)
            self._to_loop(self._die, repr(error))

    def _next_batch(self) -> list[_Piece] | None:
        """Wait for rows and take a batch of them; None when closed and nothing waits."""
        with self._condition:
            while not self._queues:
                if self._closing:
                    return None
                self._condition.wait()
            return self._take(min(self._queues, key=self._urgency))

    def _urgency(self, key: ShapeKey) -> tuple[int, tuple[float, int]]:
        """Shapes are ordered by who waits longest for a turn, then by the nearest deadline."""
        queues = self._queues[key]
        return (
            min(self._last_turn.get(principal, 0) for principal in queues),
            min(queue[0][:2] for queue in queues.values()),
        )

    def _take(self, key: ShapeKey) -> list[_Piece]:
        """Up to `max_rows` rows of one shape, in turns of the principals."""
        queues = self._queues[key]
        room = min(self.max_rows, self._shapes.get(key, self.max_rows))
        turn = next(self._batches)
        pieces: list[_Piece] = []
        while room and queues:
            share = max(1, room // len(queues))
            for principal in list(queues):
                taken = self._take_from(queues[principal], min(share, room), pieces)
                room -= taken
                if taken:
                    self._last_turn[principal] = turn
                if not queues[principal]:
                    del queues[principal]
                elif taken:
                    queues[principal] = queues.pop(principal)  # to the end: the next batch begins with another one
                if not room:
                    break
        if not queues:
            del self._queues[key]
        return pieces

    def _take_from(self, queue: list[tuple[float, int, _Submission]], limit: int, pieces: list[_Piece]) -> int:
        """Move up to `limit` rows of the first live submissions into `pieces`; drop those that left or expired."""
        moved = 0
        now = self._clock()
        while queue and moved < limit:
            submission = queue[0][2]
            # A future that is done a moment ago has not told `_forget` yet.
            if submission.left or submission.future.done() or submission.deadline <= now:
                heapq.heappop(queue)
                if not submission.left:
                    self._leave(submission)
                    self._to_loop(self._fail, submission, DeadlineExceeded())
                continue
            count = min(submission.count - submission.taken, limit - moved)
            pieces.append(_Piece(submission, submission.taken, count))
            submission.taken += count
            self._waiting -= count
            moved += count
            if submission.taken == submission.count:
                heapq.heappop(queue)
        return moved

    def _run(self, pieces: list[_Piece]) -> None:
        """Run one batch and hand its results over; a failure is narrowed down to the rows at fault."""
        started = self._clock()
        waits = [started - piece.submission.queued_at for piece in pieces]
        rows = sum(piece.count for piece in pieces)
        self._running = pieces
        try:
            done = self._attempt(pieces)
        finally:
            self._running = self._told_to_end_at = None
        self._to_loop(self._deliver, done, RunRecord(rows, self._clock() - started, waits))

    def _attempt(self, pieces: list[_Piece]) -> list[tuple[_Piece, dict[str, Array] | ApplianceError]]:
        pieces = [piece for piece in pieces if not piece.submission.left]
        if not pieces:
            return []
        try:
            return self._compute(pieces)
        except InferenceFailed as error:
            rows = sum(piece.count for piece in pieces)
            if isinstance(error, OutOfMemory) and rows > 1:
                self.max_rows = min(self.max_rows, max(1, rows // 2))
                _log.warning("the device ran out of memory with %d rows; %d from now on", rows, self.max_rows)
            if rows == 1:
                return [(pieces[0], error)]
            first, second = _halves(pieces, rows // 2)
            return self._attempt(first) + self._attempt(second)

    def _compute(self, pieces: list[_Piece]) -> list[tuple[_Piece, dict[str, Array] | ApplianceError]]:
        names = tuple(dict.fromkeys(name for piece in pieces for name in piece.submission.outputs))
        if self._whole:
            results = self._model.run(names, pieces[0].submission.feeds)
            return [(pieces[0], dict(zip(names, results, strict=True)))]
        rows = sum(piece.count for piece in pieces)
        try:
            feeds = _gather(pieces, _padded(rows, self.max_rows) if self._pad else rows)
        except MemoryError as error:
            raise OutOfMemory(f"no memory to put {rows} rows together") from error
        results = self._model.run(names, feeds)
        for name, result in zip(names, results, strict=True):
            if not isinstance(result, np.ndarray) or result.ndim == 0 or len(result) < rows:
                raise InferenceFailed(f"The output {name!r} does not have one entry for each row.")
        done: list[tuple[_Piece, dict[str, Array] | ApplianceError]] = []
        offset = 0
        for piece in pieces:
            span = slice(offset, offset + piece.count)
            wanted = set(piece.submission.outputs)
            done.append((piece, {n: r[span] for n, r in zip(names, results, strict=True) if n in wanted}))
            offset += piece.count
        return done

    def _to_loop(self, function: Callable[..., None], *arguments: object) -> None:
        # A loop that is closed has nobody left to answer: the process is ending.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def shape_key(feeds: Mapping[str, Array], whole: bool = False) -> ShapeKey:
    """Rows of equal keys can be put into one run."""
    skipped = 0 if whole else 1
    return tuple((name, array.shape[skipped:], array.dtype.str) for name, array in sorted(feeds.items()))


def _gather(pieces: list[_Piece], rows: int) -> dict[str, Array]:
    """The rows of all pieces as one array an input, filled up to `rows` with copies of the first row."""
    feeds = {}
    for name in pieces[0].submission.feeds:
        parts = [p.submission.feeds[name][p.start : p.start + p.count] for p in pieces]
        missing = rows - sum(len(part) for part in parts)
        if missing:
            parts.append(np.repeat(parts[0][:1], missing, axis=0))
        feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return feeds


def _padded(rows: int, limit: int) -> int:
    return max(rows, min(limit, 1 << (rows - 1).bit_length()))


def _halves(pieces: list[_Piece], rows: int) -> tuple[list[_Piece], list[_Piece]]:
    """Cut a batch behind its first `rows` rows, through a piece if need be."""
    first: list[_Piece] = []
    second: list[_Piece] = []
    for piece in pieces:
        take = min(piece.count, rows)
        rows -= take
        if take:
            first.append(_Piece(piece.submission, piece.start, take))
        if piece.count > take:
            second.append(_Piece(piece.submission, piece.start + take, piece.count - take))
    return first, second
