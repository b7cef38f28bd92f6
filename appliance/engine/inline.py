"""The inline lane: rows whose run is shorter than the way to a thread and back are run on the loop's own thread.

Rows that arrive in one turn of the loop are gathered, and run together when the turn ends. Its law:

- Rows take it only while the batcher has nothing to do, and no run is to have the engine for itself. One turn runs as
  many rows as `turn_rows` says; a few turns' worth may wait, first come, first served. All others go to the batcher,
  where principals take turns.
- Every accepted submission ends exactly once. Who left or expired meanwhile is not run. Only rows of one shape share a
  run, and none do where the batcher would run them one by one.
- What fails here is handed to the batcher, which finds the rows at fault and answers the others.
- The loop stands still while a run lasts. A run that takes far too long is ended by a watchdog's thread, and closes the
  lane for good; so do a few slow ones. A graph that was quick at load and is not any more costs such pauses only.

Everything here is called on the loop's thread, except what the watchdog does.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from appliance.core.errors import ApplianceError, DeadlineExceeded, InferenceFailed
from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine import gate as gates
from appliance.engine.batcher import Batcher, Outcome, RunRecord
from appliance.engine.gate import Marks, Runs

LONGEST_RUN_S = 200e-6
"""Seconds of a one-row run up to which a model gets a lane: the way through the batcher's thread costs a call 100 to
150 µs of CPU beside the run (`python -m bench.inprocess`, "unary" with and without a lane), and more in waiting on a
busy machine."""

TURN_S = 2e-3
"""Seconds of runs in one turn of the loop: other callers wait that long at most."""

_BACKLOG_TURNS = 25
"""Turns' worth of rows that may wait, which is 50 ms: so long one principal may wait behind another. With fewer, a
burst would change over to the batcher, which costs several times as much, just when there is most to do."""

_SLOW_S = 5e-3
"""Seconds from which a run is slow: more than twice what a whole turn was meant to take."""

_STRIKES = 3
"""Slow runs, within some hundreds, after which the lane is closed. One may be the garbage collector's doing."""

_HANGS_S = 0.1
"""Seconds after which the watchdog ends a run, and the lane is closed; the watchdog looks every half of that."""


class Waiter(Protocol):
    """Who is told what became of rows, as a future is; but it may act at once, where a future waits for its turn."""

    def done(self) -> bool:
        """Whether it was told, or left: then it is told nothing any more."""

    def set_result(self, outcome: Outcome, /) -> None:
        """The rows were run. Never raises."""

    def set_exception(self, error: BaseException, /) -> None:
        """They were not. Never raises."""

    def cancel(self) -> object:
        """The batcher that they were handed over to has cancelled them; nothing happens to one that is done."""

    def add_done_callback(self, callback: Callable[[object], object], /) -> None:
        """Have `callback` called once it is done."""


@dataclass(slots=True, eq=False)
class _Entry:
    """A submission that waits for the end of the turn."""

    feeds: Mapping[str, Array]
    outputs: tuple[str, ...]
    count: int
    deadline: float | None
    principal: str
    waiter: Waiter
    queued_at: float
    priority: int
    marks: Marks | None
    told: Callable[[Run], None] | None


class InlineLane:
    """The short cut of one model; see the module's law."""

    def __init__(
        self,
        model: Runs,
        batcher: Batcher,
        watchdog: "Watchdog",
        turn_rows: int,
        on_run: Callable[[RunRecord], None] = lambda record: None,
        on_close: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: turn_rows: rows that one turn may run, over all its runs. on_close: told why the lane was closed."""
        self._limit = min(_BACKLOG_TURNS * turn_rows, batcher.queue_rows)
        self._model = model
        self._batcher = batcher
        self._watchdog = watchdog
        self._turn_rows = turn_rows
        self._on_run = on_run
        self._on_close = on_close
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._entries: deque[_Entry] = deque()
        self._strikes = 0.0
        self.waiting_rows = 0
        self.closed = False

    def takes(self, count: int) -> bool:
        """Whether `count` more rows would be run soon, on this thread."""
        return (
            not self.closed
            and count <= self._turn_rows
            and count <= self._batcher.max_rows
            and self.waiting_rows + count <= self._limit
            and self._batcher.at_rest
            and not self._batcher.gate.shut
        )

    def submit(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        count: int,
        deadline: float | None,
        principal: str,
        *,
        priority: int = 0,
        marks: Marks | None = None,
        told: Callable[[Run], None] | None = None,
    ) -> "asyncio.Future[Outcome]":
        """Run rows at the end of this turn, or of a next one; `takes` has said yes. See `Batcher.submit`.

        Args:    priority: counts where the batcher runs them instead.
        """
        future: asyncio.Future[Outcome] = self._loop.create_future()
        self.submit_for(future, feeds, outputs, count, deadline, principal, priority=priority, marks=marks, told=told)
        return future

    def submit_for(
        self,
        waiter: Waiter,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        count: int,
        deadline: float | None,
        principal: str,
        *,
        priority: int = 0,
        marks: Marks | None = None,
        told: Callable[[Run], None] | None = None,
    ) -> None:
        """The same for a waiter that is no future: it is told once, later than now, unless it is done before."""
        if not self._entries:
            self._loop.call_soon(self._end_turn)
        queued_at = self._clock()
        self._entries.append(
            _Entry(feeds, tuple(outputs), count, deadline, principal, waiter, queued_at, priority, marks, told)
        )
        self.waiting_rows += count

    async def wait_idle(self) -> None:
        """Return when nothing waits here; what was handed over is the batcher's."""
        while self._entries:  # noqa: ASYNC110  # every turn of the loop runs some of them
            await asyncio.sleep(0)

    def _end_turn(self) -> None:
        now = self._clock()
        waiting: list[_Entry] = []
        room = self._turn_rows
        while self._entries and room >= self._entries[0].count:
            entry = self._entries.popleft()
            self.waiting_rows -= entry.count
            if entry.waiter.done():  # its caller left
                continue
            if entry.deadline is not None and entry.deadline <= now:
                entry.waiter.set_exception(DeadlineExceeded())
                continue
            waiting.append(entry)
            room -= entry.count
        if self._entries:
            self._loop.call_soon(self._end_turn)
        for batch in _batches(waiting, self._batcher.max_rows):
            if self.closed or not self._batcher.gate.try_enter():
                self._hand_over(batch)
                continue
            try:
                self._run(batch)
            except Exception:
                # Whatever it is, a bug of ours too: the batcher's thread meets it again and says what is wrong.
                self._hand_over(batch)
            finally:
                self._batcher.gate.leave()

    def _run(self, batch: list[_Entry]) -> None:
        """Run a batch and answer it. Raises: what the model, or putting rows together, raises; nobody is answered."""
        first = batch[0]
        rows = sum(entry.count for entry in batch)
        marked = [(entry.marks, 0, entry.count) for entry in batch if entry.marks is not None]
        taken_at = started = self._clock()
        cpu_before = time.thread_time()
        self._watchdog.begin(self._model)
        try:
            feeds = first.feeds
            if len(batch) > 1:
                feeds = _joined(batch)
                started = self._clock()
            results = gates.run(self._model, first.outputs, feeds, marked, self._batcher.board)
        finally:
            hung = self._watchdog.end()
            seconds = self._clock() - started
            if hung or seconds > _SLOW_S:
                self._judge(hung, seconds, time.thread_time() - cpu_before)
            elif self._strikes:
                self._strikes = max(0.0, self._strikes - 0.01)
        named = list(zip(first.outputs, results, strict=True))
        for name, result in named:
            if not isinstance(result, np.ndarray) or result.ndim == 0 or len(result) < rows:
                raise InferenceFailed(f"The output {name!r} does not have one entry for each row.")
        waits = [taken_at - entry.queued_at for entry in batch]
        record = RunRecord(rows, seconds, waits, started - taken_at, taken_at)
        self._on_run(record)
        start = 0
        for entry in batch:
            end = start + entry.count
            if entry.told is not None:
                entry.told(record.since(entry.queued_at))
            if not entry.waiter.done():  # what a neighbour did with its answer may have made it leave
                entry.waiter.set_result(Outcome({name: result[start:end] for name, result in named}, {}))
            start = end

    def _judge(self, hung: bool, seconds: float, cpu_seconds: float) -> None:
        """A run was slow; or it was not, and neighbours had the core meanwhile."""
        if cpu_seconds > _SLOW_S / 2:
            self._strikes += _STRIKES if hung else 1
        if not self.closed and self._strikes >= _STRIKES:
            self.closed = True
            self._on_close(f"a run took {seconds * 1000:.0f} ms")

    def _hand_over(self, batch: list[_Entry]) -> None:
        for entry in batch:
            if entry.waiter.done():
                continue
            try:
                theirs = self._batcher.submit(
                    entry.feeds,
                    entry.outputs,
                    entry.deadline,
                    entry.principal,
                    priority=entry.priority,
                    marks=entry.marks,
                    told=entry.told,
                )
            except ApplianceError as error:
                entry.waiter.set_exception(error)
            else:
                self._follow(entry, theirs)

    def _follow(self, entry: _Entry, theirs: "asyncio.Future[Outcome]") -> None:
        """Let the entry end as the batcher's future does, at its deadline, or when its caller leaves."""
        ours = entry.waiter

        def expire() -> None:
            if not ours.done():
                ours.set_exception(DeadlineExceeded())

        def ended(theirs: "asyncio.Future[Outcome]") -> None:
            if theirs.cancelled():
                ours.cancel()
            elif ours.done():
                theirs.exception()  # nobody wants it; asked for, so that nobody misses it
            elif (error := theirs.exception()) is not None:
                ours.set_exception(error)
            else:
                ours.set_result(theirs.result())

        timer = None
        if entry.deadline is not None:
            timer = self._loop.call_later(max(0.0, entry.deadline - self._clock()), expire)

        def done(_: object) -> None:
            if timer is not None:
                timer.cancel()
            theirs.cancel()  # does nothing to one that has ended

        theirs.add_done_callback(ended)
        ours.add_done_callback(done)


class Watchdog:
    """Ends a run on the loop's thread that takes far too long: nobody on the loop could.

    Its thread lives while runs come, and a second longer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = 0
        self._current: tuple[Runs, float, int] | None = None
        self._told = False
        self._awake = False

    def begin(self, model: Runs) -> None:
        """A run of `model` begins on this thread. Raises: RuntimeError: there is no thread to watch it."""
        with self._lock:
            if not self._awake:
                threading.Thread(target=self._look, name="inline watchdog", daemon=True).start()
                self._awake = True
            self._runs += 1
            self._current, self._told = (model, time.monotonic(), threading.get_ident()), False

    def end(self) -> bool:
        """It is over. The lock sees to it that another run of the model is never ended in its place.

        Returns: whether it was told to end.
        """
        with self._lock:
            self._current = None
            return self._told

    def _look(self) -> None:
        seen, idle_since = 0, time.monotonic()
        while True:
            time.sleep(_HANGS_S / 2)
            now = time.monotonic()
            with self._lock:
                if self._current is not None and now - self._current[1] > _HANGS_S:
                    model, _, thread = self._current
                    model.terminate(thread)
                    self._told = True
                if self._current is not None or self._runs != seen:
                    seen, idle_since = self._runs, now
                elif now - idle_since > 1.0:
                    self._awake = False
                    return


def _batches(entries: list[_Entry], max_rows: int) -> list[list[_Entry]]:
    """Entries of one shape and the same outputs together, in their order, up to `max_rows` rows."""
    if len(entries) <= 1:
        return [entries] if entries else []
    batches: list[list[_Entry]] = []
    open_: dict[object, tuple[list[_Entry], int]] = {}
    for entry in entries:
        key = (entry.outputs, *[(name, array.shape[1:], array.dtype.char) for name, array in entry.feeds.items()])
        batch, rows = open_.get(key, ([], max_rows))
        if rows + entry.count > max_rows:
            batch, rows = [], 0
            batches.append(batch)
        batch.append(entry)
        open_[key] = (batch, rows + entry.count)
    return batches


def _joined(batch: list[_Entry]) -> dict[str, Array]:
    return {name: np.concatenate([entry.feeds[name] for entry in batch]) for name in batch[0].feeds}
