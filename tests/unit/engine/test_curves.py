"""The curves: what is chosen from them, how they are kept, and that measuring them is in nobody's way."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_model import FakeModel

from appliance.core.errors import InferenceFailed
from appliance.engine import curves
from appliance.engine.batcher import powers_of_two
from appliance.engine.cache import FileCache
from appliance.engine.curves import Idle, Measured, Point, Step, Steps, Subject
from appliance.engine.session import Device, OutOfMemory

MEGABYTE = 2**20
KNOWN = Measured(dependence="", row_seconds=0.01, shared_seconds=0.01)


def curve(seconds: Callable[[int], float], most: int = 128, memory: int = 0) -> list[Point]:
    return [Point(rows, seconds(rows), memory * rows) for rows in powers_of_two(most)]


# ---- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (lambda n: 0.001 * max(1, n / 16), 16),  # as long for 16 rows as for one, and then it grows
        (lambda n: 0.001 * n, 1),  # twice the rows, twice the time
        (lambda n: 0.001, 128),
        (lambda n: 0.001 * n * (0.992 if n >= 8 else 1), 1),  # less than a percent is nobody's waiting worth
        (lambda n: 0.001 * n * (0.9 if n >= 8 else 1), 8),
        (lambda n: 0.1 * n**0.5, 4),  # 16 would give most, but takes too long
        (lambda n: 3.0 * n**0.5, 1),  # one row may take as long as it takes
    ],
)
def test_the_least_rows_that_are_nearly_the_best_are_taken(seconds: Callable[[int], float], wanted: int) -> None:
    """Of those whose run takes a quarter of a second at most."""
    assert curves.best_rows(curve(seconds), 10**12) == wanted


def test_rows_that_take_too_much_memory_are_not_taken() -> None:
    """One row is, whatever it takes: there is no smaller run."""
    points = curve(lambda n: 0.001, memory=MEGABYTE)
    assert curves.best_rows(points, 40 * MEGABYTE) == 32
    assert curves.best_rows(points, 1) == 1


@pytest.mark.parametrize(("row_seconds", "wanted"), [(4e-6, 128), (0.004, 8), (0.017, 2), (0.08, 1), (5.0, 1)])
def test_without_a_curve_a_run_is_expected_to_take_a_twentieth_of_a_second(row_seconds: float, wanted: int) -> None:
    assert curves.default_rows(row_seconds, 128) == wanted


@pytest.mark.parametrize(
    ("rates", "wanted"),
    [
        ((), 1),
        (((1, 100.0), (2, 109.0)), 1),
        (((1, 100.0), (2, 111.0)), 2),
        (((1, 100.0), (2, 180.0), (4, 182.0), (8, 150.0)), 2),
        (((1, 100.0), (2, 105.0), (4, 200.0)), 4),
    ],
)
def test_several_runs_at_a_time_must_win_clearly(rates: Any, wanted: int) -> None:
    """By a tenth, as each of them takes longer; and no more of them than it takes."""
    assert curves.best_runs(rates) == wanted


# ---- keeping ---------------------------------------------------------------------------------------------------------


def test_what_is_known_comes_back(tmp_path: Path) -> None:
    """Every figure; and nothing for another key."""
    cache = FileCache(tmp_path, 10**6)
    known = Measured("why", 0.1, 0.05, ((Point(1, 0.1, 7), Point(2, 0.15, 9)), ()), ((1, 10.0), (2, 12.5)), 1.5e9)
    curves.write(cache, "one", known)
    assert curves.read(cache, "one") == known
    assert curves.read(cache, "two") is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"dependence": "", "row_seconds": "x"}', b"\xff"])
def test_what_says_something_else_is_nothing(tmp_path: Path, content: bytes) -> None:
    """Of another version of ours, say."""
    cache = FileCache(tmp_path, 10**6)
    cache.put("one", content)
    assert curves.read(cache, "one") is None


def test_another_graph_device_or_number_of_threads_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so has another machine: fewer CPUs, others, another GPU."""
    cpu, gpu = Device("cpu"), Device("gpu", 0)
    keys = {curves.key_of("a", cpu, 2, ["x"]), curves.key_of("b", cpu, 2, ["x"]), curves.key_of("a", gpu, 2, ["x"])}
    keys |= {curves.key_of("a", cpu, 1, ["x"]), curves.key_of("a", cpu, 2, ["y"])}
    assert curves.key_of("a", Device("cpu", reason="for another reason"), 2, ["x"]) in keys
    for name, value in (("cpu_model", "Z80"), ("usable_cpus", 77), ("accelerators", ("Voodoo",))):
        monkeypatch.setattr(curves, name, lambda value=value: value)
        keys.add(curves.key_of("a", cpu, 2, ["x"]))
        keys.add(curves.key_of("a", gpu, 2, ["x"]))
    assert len(keys) == 5 + 5  # the GPU is nothing to the CPU


# ---- measuring -------------------------------------------------------------------------------------------------------


def row(width: int) -> dict[str, np.ndarray]:
    return {"x": np.ones((1, width), np.float32)}


def subject(**changes: Any) -> Subject:
    """Two buckets, up to 8 rows, one run at a time."""
    whole = Subject(FakeModel(), ["double"], [row(2), row(4)], 8, 10**12, (), lambda: 0)
    return replace(whole, **changes)


def drive(steps: Steps, answer: Callable[[Step], float]) -> Measured:
    """Answer every step in place of the model."""
    return curves._drive(steps, answer)


def asked_of(step: Any) -> tuple[str, int]:
    """What a step would measure, and with how many rows."""
    return step.func.__name__, len(step.args[1]["x"])


def test_each_bucket_is_measured_up_to_the_most_rows() -> None:
    """Memory once, seconds several times, of which the least counts."""
    asked: list[tuple[str, int]] = []

    def answer(step: Step) -> float:
        name, rows = asked_of(step)
        asked.append((name, rows))
        return 1000.0 * rows if name == "_growth" else 0.001 * rows + 0.1 * (asked.count((name, rows)) != 2)

    found = drive(curves.steps(subject(), KNOWN), answer)
    points = tuple(Point(n, 0.001 * n, 1000 * n) for n in (1, 2, 4, 8))
    assert found.curves[0] == points
    assert [point.memory for point in found.curves[1]] == [1000, 2000, 4000, 8000]
    assert found.measured_at > 0
    assert asked[:4] == [("_growth", 1), ("_shortest", 1), ("_shortest", 1), ("_shortest", 1)]


def test_no_run_is_begun_that_would_take_too_long() -> None:
    """Twice the rows take twice the time, or so: a quarter of a second is the limit, but for a single row."""
    for seconds, sizes in ((0.2, [1]), (0.1, [1, 2]), (0.03, [1, 2, 4, 8]), (9.0, [1])):
        found = drive(curves.steps(subject(), KNOWN), lambda step, s=seconds: s * asked_of(step)[1])  # type: ignore[misc]
        assert [point.rows for point in found.curves[0]] == sizes


def test_measuring_stops_where_memory_ends() -> None:
    """What fitted is what is known. A single row that fails is a failure of the model."""

    def answer(step: Step) -> float:
        if asked_of(step)[1] > 2:
            raise OutOfMemory("4 rows")
        return 0.001

    found = drive(curves.steps(subject(), KNOWN), answer)
    assert [[point.rows for point in each] for each in found.curves] == [[1, 2], [1, 2]]

    def fail(step: Step) -> float:
        raise InferenceFailed("no")

    with pytest.raises(InferenceFailed):
        drive(curves.steps(subject(), KNOWN), fail)


def test_runs_at_a_time_are_compared_with_the_rows_that_are_taken() -> None:
    """Of the longest bucket; rows a second, the best of some tries."""
    tried: list[tuple[int, int]] = []

    def answer(step: Any) -> float:
        name, rows = asked_of(step)
        if name != "_runs_a_second":
            return 0.001 * max(1.0, rows / 4)
        tried.append((rows, step.args[2]))
        return 100.0 * step.args[2] + len(tried)

    found = drive(curves.steps(subject(runs=(1, 2)), KNOWN), answer)
    assert tried == [(4, 1)] * 3 + [(4, 2)] * 3
    assert found.at_a_time == ((1, 4 * 103.0), (2, 4 * 206.0))
    assert found.shared_seconds == 0.001 / 4


def test_heavy_runs_are_not_tried_together() -> None:
    """Sixteen of half a second would have the machine for eight."""
    tried: list[int] = []

    def answer(step: Any) -> float:
        if step.func.__name__ == "_runs_a_second":
            tried.append(step.args[2])
        return 0.2

    found = drive(curves.steps(subject(most_rows=1, runs=(1, 2, 4, 8)), KNOWN, visits=1), answer)
    assert tried == [1, 2, 4]
    assert [runs for runs, _ in found.at_a_time] == tried


def test_the_steps_measure_a_real_model() -> None:
    """At once, as on a GPU: every size has been run when it is done, and figures are figures."""
    model = FakeModel()
    found = curves.at_once(curves.steps(subject(model=model, runs=(1, 2)), KNOWN, visits=1))
    assert {len(run) for run in model.runs} == {1, 2, 4, 8}
    assert all(0 < point.seconds < 1 for each in found.curves for point in each)
    assert [runs for runs, rate in found.at_a_time if rate > 0] == [1, 2]


def test_a_long_run_is_not_repeated() -> None:
    """A trifle is run fifty times, a usual one three times, one of a tenth of a second once."""
    for seconds, wanted in ((1e-5, 50), (0.003, 7), (0.015, 3), (0.2, 1)):
        now = 0.0

        class Timed(FakeModel):
            def compute(self, name: str, x: Any, seconds: float = seconds) -> Any:
                nonlocal now
                now += seconds
                return x

        model = Timed()
        assert curves.shortest_run(model, ["double"], row(2), clock=lambda: now) == pytest.approx(seconds)  # noqa: B023
        assert len(model.runs) == wanted


def test_memory_is_what_a_run_and_its_results_take() -> None:
    """Asked before and after, while the results are there."""
    figures = iter([100, 350] * 100)
    found = curves.at_once(curves.steps(subject(memory=lambda: next(figures)), KNOWN, visits=1))
    assert {point.memory for each in found.curves for point in each} == {250}


# ---- while nothing is asked for --------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "_QUIET_S", 0.01)
    monkeypatch.setattr(curves, "_LOOK_S", 0.001)


def never() -> None:
    """What ends runs, where there are none to end."""


def one_step(step: Step, results: list[float]) -> Steps:
    """A measurement of one step."""
    results.append((yield step))
    return KNOWN


@pytest.mark.usefixtures("hasty")
async def test_a_step_that_was_disturbed_is_taken_again() -> None:
    """What it showed is forgotten; and it is told to leave off at once."""
    idle = Idle(lambda: False)
    results: list[float] = []
    left_off: list[bool] = []

    def step(leave_off: Callable[[], bool]) -> float:
        if len(left_off) < 2:
            idle.asked = True  # somebody asks for something, meanwhile
        left_off.append(leave_off())
        return float(len(left_off))

    assert await asyncio.wait_for(idle.measure(one_step(step, results), never, lambda: False), 10) == KNOWN
    assert left_off == [True, True, False]
    assert results == [3.0]


@pytest.mark.usefixtures("hasty")
async def test_a_run_that_is_measured_is_ended_by_whoever_asks() -> None:
    """It fails then, which says nothing of the model; and is taken again."""
    idle = Idle(lambda: False)
    results: list[float] = []
    begun, interrupted = threading.Event(), threading.Semaphore(0)
    steps = 0

    def step(_: Callable[[], bool]) -> float:
        nonlocal steps
        steps += 1
        if steps == 1:
            begun.set()
            assert interrupted.acquire(timeout=10)
            raise InferenceFailed("terminated")
        return 7.0

    task = asyncio.create_task(idle.measure(one_step(step, results), interrupted.release, lambda: False))
    await asyncio.to_thread(begun.wait, 10)
    idle.ask()
    idle.ask()
    assert await asyncio.wait_for(task, 10) == KNOWN
    assert results == [7.0]
    idle.ask()
    assert not interrupted.acquire(blocking=False), "the second one ended what somebody had asked for"


@pytest.mark.usefixtures("hasty")
async def test_nothing_is_measured_while_there_is_work() -> None:
    """Queued or running; nor a moment after."""
    busy = True
    idle = Idle(lambda: busy)
    results: list[float] = []
    task = asyncio.create_task(idle.measure(one_step(lambda _: 1.0, results), never, lambda: False))
    for _ in range(30):
        await asyncio.sleep(0.001)
    assert results == []
    busy = False
    assert await asyncio.wait_for(task, 10) == KNOWN


@pytest.mark.usefixtures("hasty")
async def test_half_of_the_idle_time_is_left_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step it rests for as long as that took."""
    now, rests = 0.0, []
    sleep = asyncio.sleep

    async def rest(seconds: float) -> None:
        nonlocal now
        rests.append(seconds)
        now += seconds
        await sleep(0)

    monkeypatch.setattr(curves.asyncio, "sleep", rest)
    idle = Idle(lambda: False, clock=lambda: now)

    def step(_: Callable[[], bool]) -> float:
        nonlocal now
        now += 0.125
        return 1.0

    def two_steps() -> Steps:
        yield step
        yield step
        return KNOWN

    await idle.measure(two_steps(), never, lambda: False)
    assert rests.count(0.125) == 1


@pytest.mark.usefixtures("hasty")
async def test_a_model_that_is_not_wanted_any_more_ends_it() -> None:
    """Even where there is always work."""
    idle = Idle(lambda: True)
    ended = False
    task = asyncio.create_task(idle.measure(one_step(lambda _: 1.0, []), never, lambda: ended))
    await asyncio.sleep(0.01)
    ended = True
    assert await asyncio.wait_for(task, 10) is None


@pytest.mark.usefixtures("hasty")
def test_a_step_is_over_before_the_loop_is() -> None:
    """A thread that is in a run when the process ends would abort it."""
    begun, over = threading.Event(), threading.Event()

    def step(leave_off: Callable[[], bool]) -> float:
        begun.set()
        while not leave_off():
            pass
        over.set()
        return 1.0

    async def run() -> "asyncio.Task[Any]":
        idle = Idle(lambda: False)
        task = asyncio.create_task(idle.measure(one_step(step, []), never, lambda: False))
        await asyncio.to_thread(begun.wait, 10)
        return task  # whoever ends the loop cancels it

    task = asyncio.run(run())
    assert over.is_set()
    assert task.cancelled()


# ---- telling ---------------------------------------------------------------------------------------------------------


def test_operators_see_the_curve_and_where_it_comes_from() -> None:
    """In one line."""
    assert curves.told(KNOWN, kept=False) == (
        "not measured yet: defaults, until the engine has had nothing to do for a while"
    )
    found = replace(
        KNOWN,
        curves=((Point(1, 0.02, 3 * MEGABYTE), Point(2, 0.03, 5 * MEGABYTE)),),
        at_a_time=((1, 67.0), (2, 1200.0)),
        measured_at=0.5,
    )
    text = "measured 1970-01-01 00:00 UTC; rows a run 1: 50/s, 2: 66.7/s (5.0 MiB); runs at a time 1: 67/s, 2: 1.2k/s"
    assert curves.told(found, kept=False) == text
    assert curves.told(found, kept=True) == text.replace("UTC;", "UTC, kept;")
    two = replace(found, curves=found.curves * 2, at_a_time=())
    assert "; bucket 2: rows a run 1: 50/s" in curves.told(two, kept=True)
