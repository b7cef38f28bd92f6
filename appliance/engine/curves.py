"""The curves: how many rows a second a model gives, by the rows of a run and by the runs at a time; and what memory.

They are measured once for a model on a machine, and kept over restarts: on a CPU after the model is ready, while its
engine has nothing to do, with defaults until then; on a GPU at load, where every size must be run once before it is
served anyway. Their law:

- Whoever asks for something meanwhile ends the runs that are measured; what they would have shown is measured again
  when nothing was asked for a second.
- Of idle time, half is left idle.
- What is chosen from a curve is the least that is nearly the best: more rows a run only make everybody wait longer.
"""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from appliance.core.errors import InferenceFailed
from appliance.core.machine import accelerators, cpu_model, usable_cpus
from appliance.core.types import Array
from appliance.engine import session
from appliance.engine.batcher import powers_of_two
from appliance.engine.cache import FileCache
from appliance.engine.gate import Runs
from appliance.engine.probes import join
from appliance.engine.session import Device
from appliance.engine.threads import on_own_thread

LONGEST_RUN_S = 0.25
"""Seconds of a run of several rows: so long a row that comes when it has begun may wait for it."""

DEFAULT_RUN_S = 0.05
"""Seconds of a run, as far as one can tell from one row, until there is a curve. Heavy models gain little from batches
on a CPU (a ResNet-50 nothing, a small text encoder 1.6 times), and tiny ones gain most from their first fifty."""

_ROWS_ENOUGH, _RUNS_ENOUGH = 0.99, 0.97
"""Shares of the best rate from which fewer rows, and fewer runs at a time, are taken."""

_WINS = 1.1
"""How much better several runs at a time must be than one: each of them takes longer."""

_VISIT_S, _LONG_VISIT_S = 0.02, 0.1
"""Seconds of runs that are measured at once: of three runs, and of fewer."""

_VISITS = 3
"""How often a point is measured: what disturbs a run only makes it slower, so the fastest counts."""

_LONGEST_TRIAL_S = 1.0
"""Seconds of runs at a time, one after the other, up to which they are tried together."""

_QUIET_S = 1.0
"""Seconds without a run from which an engine counts as idle."""

_LOOK_S = 0.25

_LEAVE_S = 2.0
"""Seconds in which a run that is measured ends when the process does."""


@dataclass(frozen=True, slots=True)
class Point:
    """What a run of `rows` rows takes at its best: seconds, and bytes of memory beside the weights."""

    rows: int
    seconds: float
    memory: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a model on a machine.

    Attributes:
        dependence: why its rows must not share a run; "" when the probes show them independent.
        row_seconds: a run of one row of the longest bucket, at its best.
        shared_seconds: what one row adds to a run of many.
        curves: the points of each shape bucket, shortest first, fewest rows first; empty: not measured yet.
        at_a_time: runs at a time → rows a second with the longest bucket; empty: not measured (yet).
        measured_at: Unix time of the curves; 0: not measured yet.
    """

    dependence: str
    row_seconds: float
    shared_seconds: float
    curves: tuple[tuple[Point, ...], ...] = ()
    at_a_time: tuple[tuple[int, float], ...] = ()
    measured_at: float = 0.0


# ---- choosing --------------------------------------------------------------------------------------------------------


def default_rows(row_seconds: float, most: int) -> int:
    """Rows a run while there is no curve: a power of two, of which a run takes `DEFAULT_RUN_S` at most."""
    rows = 1
    while 2 * rows <= most and 2 * rows * row_seconds <= DEFAULT_RUN_S:
        rows *= 2
    return rows


def best_rows(curve: Sequence[Point], most_bytes: int) -> int:
    """The least number of rows a run that comes within 1 % of the best rate, of those that take neither too long nor
    too much memory; one row may."""
    fair = [p for p in curve if p.rows == 1 or (p.seconds <= LONGEST_RUN_S and p.memory <= most_bytes)] or curve[:1]
    best = max(point.rows / point.seconds for point in fair)
    return min(point.rows for point in fair if point.rows / point.seconds >= _ROWS_ENOUGH * best)


def best_runs(at_a_time: Sequence[tuple[int, float]]) -> int:
    """How many runs at a time: one, unless more give over a tenth more rows; then the least that is nearly the best."""
    rates = dict(at_a_time)
    best = max(rates.values(), default=0.0)
    if best <= _WINS * rates.get(1, best):
        return 1
    return min(runs for runs, rate in rates.items() if rate >= _RUNS_ENOUGH * best)


# ---- keeping ---------------------------------------------------------------------------------------------------------


def key_of(plan_key: str, device: Device, threads: int, asked: object) -> str:
    """The name of what is known: of this graph, on this device of this machine, with so many threads.

    Args:    asked: what else decides about the measurements, as JSON can write it.
    """
    machine = [cpu_model(), usable_cpus(), accelerators() if device.kind == "gpu" else (), session.version()]
    return hashlib.sha256(json.dumps([plan_key, str(device), threads, asked, machine]).encode()).hexdigest()


def read(cache: FileCache, key: str) -> Measured | None:
    """What was kept under that key, or None."""
    stored = cache.get(key)
    if stored is None:
        return None
    try:
        found: dict[str, Any] = json.loads(stored)
        return Measured(
            dependence=str(found["dependence"]),
            row_seconds=float(found["row_seconds"]),
            shared_seconds=float(found["shared_seconds"]),
            curves=tuple(tuple(Point(**point) for point in curve) for curve in found["curves"]),
            at_a_time=tuple((int(runs), float(rate)) for runs, rate in found["at_a_time"]),
            measured_at=float(found["measured_at"]),
        )
    except (KeyError, TypeError, ValueError):  # a version of ours that wrote it otherwise
        return None


def write(cache: FileCache, key: str, measured: Measured) -> None:
    """Keep it."""
    cache.put(key, json.dumps(asdict(measured)).encode())


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    Attributes:
        examples: a row of each shape bucket, shortest first.
        most_rows: up to which rows share a run; 1: they do not.
        most_bytes: of memory that a run may take.
        runs: the runs at a time that are tried.
        memory: bytes that this process takes on the device now.
    """

    model: Runs
    outputs: Sequence[str]
    examples: Sequence[Mapping[str, Array]]
    most_rows: int
    most_bytes: int
    runs: Sequence[int]
    memory: Callable[[], int]


Step: TypeAlias = Callable[[Callable[[], bool]], float]
"""Some runs; is told how to ask, between two of them, whether to leave off. Raises: InferenceFailed."""

Steps: TypeAlias = Generator[Step, float, Measured]


def steps(subject: Subject, known: Measured, visits: int = _VISITS) -> Steps:
    """The measurement, step by step: whoever drives it runs what it yields, and sends back what that gives.

    Args:    visits: how often each point is measured.
    Returns: what is known with the curves.
    Raises:  InferenceFailed: the model fails on a single row.
    """
    curves = []
    for example in subject.examples:
        curve: list[Point] = []
        for rows in powers_of_two(subject.most_rows):
            if curve and 2 * curve[-1].seconds > LONGEST_RUN_S:
                break
            feeds = join([example] * rows)
            try:
                grown = yield partial(_growth, subject, feeds)  # also warms this shape up
                seconds = yield partial(_shortest, subject, feeds)
                for _ in range(visits - 1):
                    seconds = min(seconds, (yield partial(_shortest, subject, feeds)))
            except InferenceFailed:  # memory ends here
                if not curve:
                    raise
                break
            curve.append(Point(rows, seconds, int(grown)))
        curves.append(tuple(curve))
    at_a_time = []
    rows = best_rows(curves[-1], subject.most_bytes)
    seconds = next(point.seconds for point in curves[-1] if point.rows == rows)
    feeds = join([subject.examples[-1]] * rows)
    for runs in subject.runs if len(subject.runs) > 1 else ():
        if runs > 1 and runs * seconds > _LONGEST_TRIAL_S:
            break
        rate = 0.0
        for _ in range(visits):
            rate = max(rate, rows * (yield partial(_runs_a_second, subject, feeds, runs, seconds)))
        at_a_time.append((runs, rate))
    return replace(
        known,
        shared_seconds=min(point.seconds / point.rows for point in curves[-1]),
        curves=tuple(curves),
        at_a_time=tuple(at_a_time),
        measured_at=time.time(),
    )


def at_once(measurement: Steps) -> Measured:
    """Measure now, on this thread. Raises: InferenceFailed."""
    return _drive(measurement, lambda step: step(lambda: False))


def _drive(measurement: Steps, take: Callable[[Step], float]) -> Measured:
    try:
        step = next(measurement)
        while True:
            try:
                found = take(step)
            except InferenceFailed as error:
                step = measurement.throw(error)
            else:
                step = measurement.send(found)
    except StopIteration as end:
        result: Measured = end.value
        return result


class Idle:
    """Tells when an engine has nothing to do, and measures then. Used on the loop's thread."""

    def __init__(self, busy: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        """Args: busy: whether anything is queued, runs or is loaded right now."""
        self._busy = busy
        self._clock = clock
        self._quiet_since = clock()
        self.asked = False
        """Whether something was asked for, since somebody looked."""
        self._interrupt: Callable[[], None] | None = None

    def ask(self) -> None:
        """Something is asked for: what is measured is ended. Only by the first who asks: then others run, too."""
        if not self.asked:
            self.asked = True
            if self._interrupt is not None:
                self._interrupt()

    async def wait(self, ended: Callable[[], bool]) -> None:
        """Return when nothing was asked for a while, or when `ended` says so."""
        while not ended():
            if self.asked or self._busy():
                self.asked = False
                self._quiet_since = self._clock()
            elif self._clock() - self._quiet_since >= _QUIET_S:
                return
            await asyncio.sleep(_LOOK_S)

    async def measure(
        self, measurement: Steps, interrupt: Callable[[], None], ended: Callable[[], bool]
    ) -> Measured | None:
        """Measure, in moments when nothing is asked for; a step that was disturbed is taken again.

        Args:
            interrupt: ends the runs in progress; called only when all of them are measured.
            ended: whether the model is wanted no more.
        Returns: None when it is not.
        Raises:  InferenceFailed.
        """
        try:
            step = next(measurement)
            while True:
                await self.wait(ended)
                if ended():
                    return None
                begun = self._clock()
                failure, found = await self._take(step, interrupt)
                spent = self._clock() - begun
                if not self.asked and not self._busy():
                    step = measurement.send(found) if failure is None else measurement.throw(failure)
                await asyncio.sleep(spent)
        except StopIteration as end:
            result: Measured = end.value
            return result

    async def _take(self, step: Step, interrupt: Callable[[], None]) -> tuple[InferenceFailed | None, float]:
        """What a step gives. Cancelled, it is ended first: no thread may be in a run when the process ends."""
        taking = on_own_thread(partial(_taken, step, lambda: self.asked), "measure")
        self._interrupt = interrupt
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            self.ask()
            await asyncio.wait({taking}, timeout=_LEAVE_S)
            raise
        finally:
            self._interrupt = None


def _taken(step: Step, left_off: Callable[[], bool]) -> tuple[InferenceFailed | None, float]:
    try:
        return None, step(left_off)
    except InferenceFailed as error:
        return error, 0.0


def shortest_run(
    model: Runs,
    outputs: Sequence[str],
    feeds: Mapping[str, Array],
    left_off: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of the fastest of a few runs: three at least, unless they are long. Raises: InferenceFailed."""
    shortest = float("inf")
    started = before = clock()
    for repeat in range(50):
        model.run(outputs, feeds)
        after = clock()
        shortest, before = min(shortest, after - before), after
        spent = after - started
        if spent > _LONG_VISIT_S or (repeat >= 2 and spent > _VISIT_S) or left_off():
            break
    return max(shortest, 1e-9)


def _shortest(subject: Subject, feeds: Mapping[str, Array], left_off: Callable[[], bool]) -> float:
    return shortest_run(subject.model, subject.outputs, feeds, left_off)


def _growth(subject: Subject, feeds: Mapping[str, Array], left_off: Callable[[], bool]) -> float:
    """Bytes that a first run of these takes."""
    session.give_memory_back()  # what runs of other shapes left behind
    before = subject.memory()
    results = subject.model.run(subject.outputs, feeds)
    grown = subject.memory() - before
    del results  # held until now
    return max(0, grown)


def _runs_a_second(
    subject: Subject, feeds: Mapping[str, Array], runs: int, seconds: float, left_off: Callable[[], bool]
) -> float:
    """How many runs a second there are with so many at a time, each of which takes `seconds` by itself."""
    each = max(1, min(20, int(_VISIT_S / seconds)))
    failures: list[InferenceFailed] = []
    together = threading.Barrier(runs + 1)

    def work() -> None:
        together.wait()
        try:
            for _ in range(each):
                subject.model.run(subject.outputs, feeds)
                if left_off():
                    return
        except InferenceFailed as error:
            failures.append(error)

    threads = [threading.Thread(target=work, name="measure", daemon=True) for _ in range(runs)]
    for thread in threads:
        thread.start()
    together.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - begun
    if failures:
        raise failures[0]
    return each * runs / max(spent, 1e-9)


# ---- telling ---------------------------------------------------------------------------------------------------------


def told(measured: Measured, kept: bool) -> str:
    """The curves, in a line for operators. Args: kept: they come from the cache."""
    if not measured.measured_at:
        return "not measured yet: defaults, until the engine has had nothing to do for a while"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(measured.measured_at))
    parts = [f"measured {when}" + (", kept" if kept else "")]
    for number, curve in enumerate(measured.curves, 1):
        name = f"bucket {number}: " if len(measured.curves) > 1 else ""
        rates = ", ".join(f"{point.rows}: {_short(point.rows / point.seconds)}/s" for point in curve)
        parts.append(f"{name}rows a run {rates} ({curve[-1].memory / 2**20:.1f} MiB)")
    if measured.at_a_time:
        rates = ", ".join(f"{runs}: {_short(rate)}/s" for runs, rate in measured.at_a_time)
        parts.append(f"runs at a time {rates}")
    return "; ".join(parts)


def _short(rate: float) -> str:
    """A rate in three digits or so."""
    return f"{rate / 1000:.3g}k" if rate >= 1000 else f"{rate:.3g}"
