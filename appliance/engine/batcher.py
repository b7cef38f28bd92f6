"""The batcher: rows of many requests become one run of the model, and every request ends exactly once.

The law. Admission is a permit, refused at once when the queue is full. A batch is whatever queued while the last one
ran: no timer. Only rows of one shape share a run. The highest priority goes first, but a lower one that waits is passed
over for `AGE` runs at most. Inside a priority principals take turns, within a run and among the shapes, and within a
principal the nearest deadline goes first. Who left or expired is skipped while the batch is formed. A failed batch is
halved until the rows at fault stand alone; the others are answered. When the device runs out of memory the batch is
halved and the smaller size is kept; after a while a larger one is tried again. A run that nobody waits for any more is
ended. A worker that dies, or a run that cannot be ended, makes the model not ready, loudly; everybody is answered.

Rows, not requests: a big submission is cut into several runs, small ones share one. Several workers may run batches of
one model at once. Rows in quarantine, which were in a run that crashed a process, run one by one, and nothing else in
the engine runs meanwhile.
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
from typing import TypeAlias

import numpy as np

from appliance.core.errors import ApplianceError, DeadlineExceeded, Draining, InferenceFailed, Overloaded
from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine import gate as gates
from appliance.engine.gate import Marks, RunBoard, RunGate, Runs
from appliance.engine.session import OutOfMemory

_log = logging.getLogger(__name__)

ShapeKey: TypeAlias = tuple[bool, tuple[tuple[str, tuple[int, ...], str], ...]]
"""Whether each row runs alone, and the shapes of its inputs."""

AGE = 8
"""Runs that a priority is passed over for at most, while it waits; one more if a third one is due as well."""

_GROW_S = 60.0
"""Seconds after running out of memory until a larger size is tried: a neighbour on the device may have gone."""

_GROW_MOST_S = 3600.0
"""The same when larger sizes failed again and again: the wait doubles each time."""

_NEVER = float("inf")

_LOOK_S = 1.0
"""Seconds between two looks at a run: one that nobody waits for any more is ended."""

_DEAF_S = 30.0
"""Seconds after which a run that was told to end and did not makes the model not ready."""


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
    """One run, for the metrics.

    Attributes:
        taken_at: when the run's rows were taken, on the batcher's clock.
        seconds: of compute, over all attempts.
        waits: seconds that each piece of a submission had waited when the run's rows were taken.
        batch_wait: the rest of the seconds from then to the results: waiting for the device's turn, putting rows
            together and results apart.
    """

    rows: int
    seconds: float
    waits: list[float]
    batch_wait: float = 0.0
    taken_at: float = 0.0

    def since(self, queued_at: float) -> Run:
        """The run as a submission has it that was queued then."""
        return Run(self.rows, queued_at, self.taken_at, self.batch_wait, self.seconds)


@dataclass(slots=True, eq=False)
class _Submission:
    """Rows of one request on their way; `taken` of `count` are in a run or done, `open` are not answered yet.

    `left` says that the rest is not waiting any more. `told` hears of the runs; `heard` is the last one it heard of.
    """

    feeds: Mapping[str, Array]
    count: int
    outputs: tuple[str, ...]
    deadline: float
    principal: str
    priority: int
    key: ShapeKey
    row_bytes: int
    marks: Marks | None
    future: "asyncio.Future[Outcome]"
    queued_at: float
    taken: int = 0
    open: int = 0
    pieces: list[tuple[int, dict[str, Array]]] = field(default_factory=list)
    errors: dict[int, ApplianceError] = field(default_factory=dict)
    left: bool = False
    told: Callable[[Run], None] | None = None
    heard: RunRecord | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows `start` … `start + count` of a submission, in one run."""

    submission: _Submission
    start: int
    count: int


@dataclass(slots=True)
class _Level:
    """What waits at one priority: by shape and principal, the nearest deadline first.

    Attributes:
        passed: runs that were begun with another priority since this one waits or last began one.
    """

    shapes: dict[ShapeKey, dict[str, list[tuple[float, int, _Submission]]]] = field(default_factory=dict)
    passed: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    """A thread that runs batches.

    Attributes:
        pieces: what it runs at this moment; None between runs, and while it waits to be let in.
        told_at: when that run was told to end, as nobody waits for it.
        computed_s: seconds that the model has computed for the batch.
    """

    thread: threading.Thread = field(init=False)
    pieces: list[_Piece] | None = None
    told_at: float | None = None
    computed_s: float = 0.0


class _Room:
    """How many rows one run may have: half of them when the device runs out of memory, and in time more again.

    Called with the batcher's lock held.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self.rows = self._most = most
        self._clock = clock
        self._wait_s = _GROW_S
        self._grow_at = _NEVER
        self._trial = False

    def look(self) -> int:
        """Rows in a run from now on."""
        if self.rows < self._most and self._clock() >= self._grow_at:
            self.rows = min(self._most, 2 * self.rows)
            self._grow_at = self._clock() + self._wait_s
            self._trial = True
        return self.rows

    def ran_out(self, rows: int) -> None:
        """A run of so many rows was too large."""
        self.rows = min(self.rows, max(1, rows // 2))
        if self._trial:
            self._wait_s = min(_GROW_MOST_S, 2 * self._wait_s)
        self._trial = False
        self._grow_at = self._clock() + self._wait_s

    def fitted(self, rows: int) -> None:
        """A run of so many rows was not."""
        if self._trial and rows > self.rows // 2:
            self._trial = False
            self._wait_s = _GROW_S


class Batcher:
    """Queue and worker threads of one model.

    `submit`, `cancel` and `close` are called on the event loop's thread; runs happen on the workers' threads; outcomes
    come back to the loop, one wake-up a batch.
    """

    def __init__(
        self,
        model: Runs,
        *,
        max_rows: int,
        queue_rows: int,
        queue_bytes: int | None = None,
        max_bytes: int | None = None,
        parallel: int = 1,
        spread: bool = True,
        separate: bool = False,
        whole: bool = False,
        sizes: tuple[int, ...] = (),
        gate: RunGate | None = None,
        board: RunBoard | None = None,
        shapes: Mapping[ShapeKey, int] | None = None,
        on_run: Callable[[RunRecord], None] = lambda record: None,
        on_death: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the workers.

        Args:
            max_rows: rows in one run.
            queue_rows, queue_bytes: rows, and bytes of their inputs, that may wait.
            max_bytes: bytes of one run's inputs; a row that is larger runs by itself.
            parallel: worker threads, and so runs at once.
            spread: idle workers share what waits: each has a core of its own. Else, as they share one device, a worker
                begins beside another one's run only when a full run waits: then copying overlaps with computing.
            separate: one row a run (rows are not proven independent).
            whole: a submission is one run as it is (the graph has no batch axis).
            sizes: ascending; rows are filled up to one of these, so that a GPU sees few shapes. Empty: they are not.
            shapes: rows in one run of those shapes, where they may be fewer.
            gate: the engine's; None: no other model shares the process.
            board: told of every run of this model.
            on_run, on_death: called on the loop's thread.
        """
        self._model = model
        self._room = _Room(1 if separate or whole else max_rows, clock)
        self._shapes = shapes or {}
        self.queue_rows = queue_rows
        self._queue_bytes = queue_bytes
        self._max_bytes = max_bytes
        self._spread = spread
        self._whole = whole
        self._sizes = sizes
        self.gate = gate or RunGate()
        self.board = board
        self._on_run = on_run
        self._on_death = on_death
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._levels: dict[int, _Level] = {}
        self._order = itertools.count()
        self._batches = itertools.count(1)
        self._last_turn: dict[str, int] = {}
        self._waiting = 0
        self._waiting_bytes = 0
        self._unfinished: set[_Submission] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False
        self._busy = 0
        self._free = 0
        self._look: asyncio.TimerHandle | None = None
        self.death: str | None = None
        self._lock = threading.Lock()
        self._rows_wait = threading.Condition(self._lock)
        self._workers: list[_Worker] = []
        for _ in range(parallel):
            worker = _Worker()
            worker.thread = threading.Thread(target=self._work, args=(worker,), name="batcher", daemon=True)
            self._workers.append(worker)
            worker.thread.start()

    # ---- on the loop's thread ----

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue now."""
        return self._waiting

    @property
    def max_rows(self) -> int:
        """Rows in one run; fewer than at first while the device has too little memory."""
        return self._room.rows

    @property
    def at_rest(self) -> bool:
        """Whether it accepts rows, and has none."""
        return not self._unfinished and not self._busy and not self._closing and self.death is None

    def submit(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        deadline: float | None,
        principal: str,
        *,
        priority: int = 0,
        alone: bool = False,
        marks: Marks | None = None,
        told: Callable[[Run], None] | None = None,
    ) -> "asyncio.Future[Outcome]":
        """Queue rows; the future ends with their outcome. Cancelling it takes them out of the queue.

        Args:
            feeds: input name → array with the rows along the first axis; all equally long.
            outputs: what to compute.
            deadline: `time.monotonic()` seconds.
            principal: whose turn this uses up.
            priority: higher goes first.
            alone: quarantine: the rows run one by one, and nothing else in the engine meanwhile. They were accepted
                before the crash, so a full queue does not refuse them.
            marks: told which of the rows are in a run.
            told: hears of each run that the rows were in, before the outcome is known.
        Raises:
            Overloaded: the queue is full. Draining: the model is being closed. InferenceFailed: the worker died.
        """
        count = 1 if self._whole else len(next(iter(feeds.values())))
        assert count, "no rows, so nothing would ever end this submission"
        if self.death is not None:
            raise InferenceFailed("The model's worker has died.", detail=self.death)
        if self._closing:
            raise Draining
        size = 0
        for array in feeds.values():
            size += array.nbytes
        if self._waiting and not alone:
            self._check_room(count, size)
        submission = _Submission(
            feeds=feeds,
            count=count,
            outputs=tuple(outputs),
            deadline=_NEVER if deadline is None else deadline,
            principal=principal,
            priority=priority,
            key=shape_key(feeds, self._whole, alone),
            row_bytes=size // count,
            marks=marks,
            future=self._loop.create_future(),
            queued_at=self._clock(),
            open=count,
            told=told,
        )
        submission.future.add_done_callback(lambda _: self._forget(submission))
        self._unfinished.add(submission)
        self._idle.clear()
        if self._look is None:
            self._look = self._loop.call_later(_LOOK_S, self._look_at_runs)
        with self._lock:
            level = self._levels.get(priority)
            if level is None:
                level = self._levels[priority] = _Level()
            queue = level.shapes.setdefault(submission.key, {}).setdefault(principal, [])
            heapq.heappush(queue, (submission.deadline, next(self._order), submission))
            self._waiting += count
            self._waiting_bytes += count * submission.row_bytes
            if self._free and self._may_begin():
                self._rows_wait.notify()
        return submission.future

    def _check_room(self, rows: int, size: int) -> None:
        """Raises: Overloaded: beside what waits there is no room for so many rows and bytes."""
        check_queue(self._waiting, rows, self.queue_rows)
        if self._queue_bytes is not None and self._waiting_bytes + size > self._queue_bytes:
            raise Overloaded(
                f"Inputs of {self._waiting_bytes} bytes wait for this model already; the limit is {self._queue_bytes} "
                "(engine.queue_size). Try again."
            )

    async def wait_idle(self) -> None:
        """Return when every accepted submission has ended."""
        await self._idle.wait()

    def close(self, error: ApplianceError | None = None) -> None:
        """Accept no more and answer what waits with `error` (Draining by default); a run in progress finishes."""
        with self._lock:
            self._closing = True
            for submission in list(self._unfinished):
                if submission.taken == 0:
                    self._fail(submission, error or Draining())
            self._rows_wait.notify_all()

        self._end_runs_for_nobody()

    def _look_at_runs(self) -> None:
        """While there is work: end a run that nobody waits for, and give the model up when it does not obey."""
        self._look = None
        self._end_runs_for_nobody()
        if self.death is not None:
            return
        now = self._clock()
        if any(worker.told_at is not None and now - worker.told_at > _DEAF_S for worker in self._workers):
            self._die("a run cannot be ended")
        elif self._unfinished or self._busy:
            self._look = self._loop.call_later(_LOOK_S, self._look_at_runs)

    def _end_runs_for_nobody(self) -> None:
        with self._lock:  # no worker goes on to its next run meanwhile: none is ended in place of another
            for worker in self._workers:
                if worker.pieces is not None and all(piece.submission.left for piece in worker.pieces):
                    self._model.terminate(worker.thread.ident)
                    if worker.told_at is None:
                        worker.told_at = self._clock()

    def _forget(self, submission: _Submission) -> None:
        """The future is done: answered here, or its caller went away; what still waited makes room at once."""
        with self._lock:
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
            self._wait_no_more(submission, submission.count - submission.taken)

    def _wait_no_more(self, submission: _Submission, rows: int) -> None:
        self._waiting -= rows
        self._waiting_bytes -= rows * submission.row_bytes

    @staticmethod
    def _fail(submission: _Submission, error: ApplianceError) -> None:
        if not submission.future.done():
            submission.future.set_exception(error)

    def _deliver(self, done: list[tuple[_Piece, dict[str, Array] | ApplianceError]], record: RunRecord | None) -> None:
        for piece, result in done:
            submission = piece.submission
            if submission.told is not None and record is not None and submission.heard is not record:
                submission.heard = record  # a batch that was halved has several pieces of it
                submission.told(record.since(submission.queued_at))
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
            submission.future.set_result(put_together(submission.count, submission.pieces, submission.errors))
        except InferenceFailed as error:
            submission.future.set_exception(error)

    def _die(self, reason: str) -> None:
        if self.death is not None:
            return
        with self._lock:
            self.death = reason
            self._rows_wait.notify_all()
        for submission in list(self._unfinished):
            self._fail(submission, InferenceFailed("The model's worker has died.", detail=reason))
        self._on_death(reason)

    # ---- on a worker's thread ----

    def _work(self, worker: _Worker) -> None:
        try:
            while (pieces := self._next_batch()) is not None:
                if pieces:
                    self._run(worker, pieces)
                del pieces  # while it waits for the next ones, their rows may be in memory that a front wants back
        except BaseException as error:  # whatever it is, callers must not wait for ever
            _log.critical("the batcher's worker died: %r", error, exc_info=error)
            self._to_loop(self._die, repr(error))

    def _next_batch(self) -> list[_Piece] | None:
        """Wait for rows and take a batch of them; None when closed and nothing waits, or when the model died."""
        with self._lock:
            while not (self._levels and self._may_begin()) and self.death is None:
                if self._closing and not self._levels:
                    return None
                self._free += 1
                self._rows_wait.wait()
                self._free -= 1
            if self.death is not None:
                return None
            pieces = self._take()
            self._busy += bool(pieces)
            if self._levels and self._free and self._may_begin():
                self._rows_wait.notify()
            return pieces

    def _may_begin(self) -> bool:
        """Whether one more run may begin beside those in progress; the lock is held."""
        return (
            self._spread
            or not self._busy
            or self._closing
            or self._waiting >= self._room.rows
            or (self._max_bytes is not None and self._waiting_bytes >= self._max_bytes)
        )

    def _take(self) -> list[_Piece]:
        """The rows of the next run: of one shape, led by the priority and the principals whose turn it is."""
        order = self._order_of_levels()
        shapes = self._levels[order[0]].shapes
        key = next(iter(shapes)) if len(shapes) == 1 else min(shapes, key=lambda key: self._urgency(shapes[key]))
        room = self._rows_of(key, next(iter(shapes[key].values()))[0][2].row_bytes)
        turn = next(self._batches)
        pieces: list[_Piece] = []
        for priority in order:
            level = self._levels[priority]
            queues = level.shapes.get(key)
            if queues is not None and room:
                room -= self._take_turns(queues, room, turn, pieces)
                if not queues:
                    del level.shapes[key]
                    if not level.shapes:
                        del self._levels[priority]
            if pieces:
                level.passed = 0 if priority == order[0] else level.passed + 1
        return pieces

    def _order_of_levels(self) -> list[int]:
        """The priorities that wait, the highest first; before it one that was passed over for too long."""
        if len(self._levels) == 1:
            return list(self._levels)
        order = sorted(self._levels, reverse=True)
        longest = max(order, key=lambda priority: self._levels[priority].passed)
        if self._levels[longest].passed >= AGE:
            order.remove(longest)
            order.insert(0, longest)
        return order

    def _urgency(self, queues: Mapping[str, list[tuple[float, int, _Submission]]]) -> tuple[int, tuple[float, int]]:
        """Shapes are ordered by who waits longest for a turn, then by the nearest deadline."""
        return (
            min(self._last_turn.get(principal, 0) for principal in queues),
            min(queue[0][:2] for queue in queues.values()),
        )

    def _rows_of(self, key: ShapeKey, row_bytes: int) -> int:
        """How many rows of that shape the next run may have."""
        rows = self._room.look()
        rows = min(rows, self._shapes.get(key, rows))
        if key[0]:
            return 1
        if self._max_bytes is not None and row_bytes:
            rows = max(1, min(rows, self._max_bytes // row_bytes))
        if self._sizes:
            rows = max((size for size in self._sizes if size <= rows), default=rows)
        if self._spread:
            rows = max(1, min(rows, -(-self._waiting // (self._free + 1))))
        return rows

    def _take_turns(
        self,
        queues: dict[str, list[tuple[float, int, _Submission]]],
        room: int,
        turn: int,
        pieces: list[_Piece],
    ) -> int:
        """Move up to `room` rows into `pieces`, in turns of the principals. Returns: how many."""
        left = room
        while left and queues:
            share = max(1, left // len(queues))
            for principal in list(queues):
                taken = self._take_from(queues[principal], min(share, left), pieces)
                left -= taken
                if taken:
                    self._last_turn[principal] = turn
                if not queues[principal]:
                    del queues[principal]
                elif taken:
                    queues[principal] = queues.pop(principal)  # to the end: the next batch begins with another one
                if not left:
                    break
        return room - left

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
            self._wait_no_more(submission, count)
            moved += count
            if submission.taken == submission.count:
                heapq.heappop(queue)
        return moved

    def _run(self, worker: _Worker, pieces: list[_Piece]) -> None:
        """Run one batch and hand its results over; a failure is narrowed down to the rows at fault."""
        started = self._clock()
        waits = [started - piece.submission.queued_at for piece in pieces]
        rows = sum(piece.count for piece in pieces)
        worker.computed_s = 0.0
        try:
            done = self._attempt(worker, pieces)
        finally:
            with self._lock:
                self._busy -= 1
        computed_s = worker.computed_s
        record = RunRecord(rows, computed_s, waits, self._clock() - started - computed_s, started)
        self._to_loop(self._deliver, done, record)

    def _attempt(self, worker: _Worker, pieces: list[_Piece]) -> list[tuple[_Piece, dict[str, Array] | ApplianceError]]:
        failure: InferenceFailed | None = None
        alone = pieces[0].submission.key[0]
        self.gate.enter(alone)
        try:
            with self._lock:
                pieces = [piece for piece in pieces if not piece.submission.left]
                worker.pieces = pieces
            if not pieces:
                return []
            return self._compute(worker, pieces)
        except InferenceFailed as error:
            failure = error
        finally:
            rows = sum(piece.count for piece in pieces)
            with self._lock:
                worker.pieces = worker.told_at = None
                if failure is None:
                    self._room.fitted(rows)
                elif isinstance(failure, OutOfMemory) and rows > 1:
                    self._room.ran_out(rows)
            self.gate.leave(alone)
        if isinstance(failure, OutOfMemory) and rows > 1:
            _log.warning("the device ran out of memory with %d rows; %d from now on", rows, self.max_rows)
        if rows == 1:
            return [(pieces[0], failure)]
        first, second = _halves(pieces, rows // 2)
        return self._attempt(worker, first) + self._attempt(worker, second)

    def _compute(self, worker: _Worker, pieces: list[_Piece]) -> list[tuple[_Piece, dict[str, Array] | ApplianceError]]:
        names = pieces[0].submission.outputs
        if len(pieces) > 1:
            names = tuple(dict.fromkeys(name for piece in pieces for name in piece.submission.outputs))
        marked = [(p.submission.marks, p.start, p.count) for p in pieces if p.submission.marks is not None]
        if self._whole:
            results = self._timed_run(worker, names, pieces[0].submission.feeds, marked)
            return [(pieces[0], dict(zip(names, results, strict=True)))]
        rows = sum(piece.count for piece in pieces)
        try:
            feeds = _gather(pieces, rows, next((size for size in self._sizes if size >= rows), rows))
        except MemoryError as error:
            raise OutOfMemory(f"no memory to put {rows} rows together") from error
        results = self._timed_run(worker, names, feeds, marked)
        named = list(zip(names, results, strict=True))
        for name, result in named:
            if not isinstance(result, np.ndarray) or result.ndim == 0 or len(result) < rows:
                raise InferenceFailed(f"The output {name!r} does not have one entry for each row.")
        done: list[tuple[_Piece, dict[str, Array] | ApplianceError]] = []
        offset = 0
        for piece in pieces:
            end = offset + piece.count
            wanted = piece.submission.outputs
            done.append((piece, {name: result[offset:end] for name, result in named if name in wanted}))
            offset = end
        return done

    def _timed_run(
        self, worker: _Worker, names: tuple[str, ...], feeds: Mapping[str, Array], marked: Sequence[gates.Marked]
    ) -> list[Array]:
        begun = self._clock()
        try:
            return gates.run(self._model, names, feeds, marked, self.board)
        finally:
            worker.computed_s += self._clock() - begun

    def _to_loop(self, function: Callable[..., None], *arguments: object) -> None:
        # A loop that is closed has nobody left to answer: the process is ending.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def put_together(
    count: int, pieces: Sequence[tuple[int, dict[str, Array]]], errors: dict[int, ApplianceError]
) -> Outcome:
    """The outcome of `count` rows; failed ones are filled with zeros.

    Args:    pieces: number of the first row, and the arrays of those that follow. errors: row → why it failed.
    Raises:  InferenceFailed: the pieces do not fit together.
    """
    if not pieces:
        return Outcome({}, errors)
    if len(pieces) == 1 and not errors:
        return Outcome(pieces[0][1], {})
    arrays = {}
    try:
        for name, sample in pieces[0][1].items():
            whole = np.zeros((count, *sample.shape[1:]), sample.dtype)
            for start, piece in pieces:
                if piece[name].shape[1:] != sample.shape[1:]:  # assigning could broadcast one to the other
                    raise ValueError(f"{name}: {piece[name].shape[1:]} and {sample.shape[1:]}")
                whole[start : start + len(piece[name])] = piece[name]
            arrays[name] = whole
    except ValueError as error:  # runs of one submission gave answers of different shapes
        message = "The answers to the rows of this request have different shapes; send one row a request."
        raise InferenceFailed(message, detail=str(error)) from error
    except Exception as error:  # no memory for the whole, say: the neighbours must still get their answers
        message = "The answers to the rows of this request could not be put together."
        raise InferenceFailed(message, detail=repr(error)) from error
    return Outcome(arrays, errors)


def check_queue(waiting: int, rows: int, limit: int) -> None:
    """Raises: Overloaded: beside rows that wait there is no room for so many more; where none wait, there is."""
    if waiting and waiting + rows > limit:
        raise Overloaded(
            f"{waiting} inputs wait for this model already; the limit is {limit} (engine.queue_rows). Try again."
        )


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, … and `most` itself."""
    return (*(1 << power for power in range((most - 1).bit_length())), most)


def shape_key(feeds: Mapping[str, Array], whole: bool = False, alone: bool = False) -> ShapeKey:
    """Rows of equal keys can be put into one run."""
    skipped = 0 if whole else 1
    return alone, tuple((name, array.shape[skipped:], array.dtype.str) for name, array in sorted(feeds.items()))


def _gather(pieces: list[_Piece], rows: int, size: int) -> dict[str, Array]:
    """The `rows` rows of all pieces as one array an input, filled up to `size` with copies of the first row."""
    feeds = {}
    for name in pieces[0].submission.feeds:
        parts = [p.submission.feeds[name][p.start : p.start + p.count] for p in pieces]
        if size > rows:
            parts.append(np.repeat(parts[0][:1], size - rows, axis=0))
        feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return feeds


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
