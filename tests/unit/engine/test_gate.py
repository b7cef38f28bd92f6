"""What surrounds a run: who is kept out meanwhile, and who is told."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from support.fake_model import WAIT_S, FakeModel, rows
from support.waiting import eventually

from appliance.core.errors import InferenceFailed
from appliance.engine import gate as gates
from appliance.engine.gate import RunGate

Start = Callable[..., threading.Thread]


@pytest.fixture
def start() -> Iterator[Start]:
    """Begins a thread that ends with the test."""
    threads: list[threading.Thread] = []

    def begin(target: Any, *arguments: Any) -> threading.Thread:
        threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield begin
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_any_number_of_runs_is_let_in_beside_each_other() -> None:
    gate = RunGate()
    gate.enter()
    gate.enter()
    assert gate.try_enter()
    assert not gate.shut


def passing(gate: RunGate, order: list[str], name: str, alone: bool) -> None:
    """Go through the gate, and say so."""
    gate.enter(alone)
    order.append(name)
    gate.leave(alone)


def test_a_run_that_is_to_be_alone_waits_for_those_in_progress_and_goes_before_later_ones(start: Start) -> None:
    """Whoever may not wait is turned away meanwhile."""
    gate = RunGate()
    order: list[str] = []
    enter = partial(passing, gate, order)
    gate.enter()
    start(enter, "alone", True)
    eventually(lambda: gate.shut)
    late = start(enter, "late", False)
    assert not gate.try_enter()
    late.join(0.01)
    assert order == []
    gate.leave()
    eventually(lambda: len(order) == 2)
    assert order == ["alone", "late"]
    eventually(lambda: not gate.shut)
    assert gate.try_enter()


def test_however_many_runs_are_to_be_alone_others_wait_for_one_of_them(start: Start) -> None:
    """Rows of a crashed batch of 128 do not keep the other models out until the last of them is through."""
    gate = RunGate()
    order: list[str] = []
    enter = partial(passing, gate, order)
    gate.enter(True)
    start(enter, "alone", True)
    start(enter, "alone", True)
    eventually(lambda: gate.shut == 3)
    start(enter, "other", False)
    eventually(lambda: gate._waiting)
    gate.leave(True)
    eventually(lambda: len(order) == 3)
    assert order == ["other", "alone", "alone"]


def test_nothing_runs_beside_a_run_that_is_alone(start: Start) -> None:
    """Whatever many threads want at once; and none of them waits for ever."""
    gate = RunGate()
    inside: list[bool] = []
    seen: list[tuple[bool, ...]] = []

    def work(seed: int) -> None:
        for step in range(200):
            alone = (step * 7 + seed) % 5 == 0
            if alone or step % 2 or not gate.try_enter():
                gate.enter(alone)
            inside.append(alone)
            seen.append(tuple(inside))
            inside.remove(alone)
            gate.leave(alone)

    for thread in [start(work, seed) for seed in range(6)]:
        thread.join(WAIT_S)
    assert len(seen) == 6 * 200
    assert all(present == (True,) for present in seen if any(present))
    assert not gate.shut
    assert not inside


class Told:
    """Marks and a board that write down what they are told, in order."""

    def __init__(self, log: list[Any]) -> None:
        self._log = log

    def running(self, start: int, count: int) -> None:
        self._log.append(("running", start, count))

    def idle(self, start: int, count: int) -> None:
        self._log.append(("idle", start, count))

    def begin(self) -> int:
        self._log.append(("begin",))
        return 77

    def end(self, token: int) -> None:
        self._log.append(("end", token))


@pytest.mark.parametrize("fails", [False, True])
def test_marks_and_board_are_told_before_and_after_the_run(fails: bool) -> None:
    """Strictly, and also when it fails: what a crash leaves behind says what was in the run."""
    log: list[Any] = []
    model = FakeModel()
    compute = model.compute
    model.compute = lambda name, x: (log.append("run"), compute(name, x))[1]  # type: ignore[method-assign]
    told = Told(log)

    def run() -> None:
        gates.run(model, ["double"], rows(1, 2, 3), [(told, 4, 2), (told, 0, 1)], told)

    if fails:
        model.compute = lambda name, x: (log.append("run"), 1 / 0)  # type: ignore[method-assign,return-value]
        with pytest.raises(ZeroDivisionError):
            run()
    else:
        run()
    marked = [("running", 4, 2), ("running", 0, 1)]
    cleared = [("idle", 4, 2), ("idle", 0, 1)]
    assert log == [("begin",), *marked, "run", *cleared, ("end", 77)]


def test_marks_are_told_by_one_thread_at_a_time(start: Start) -> None:
    """What it keeps of several runs needs no lock of its own."""
    inside: list[int] = []
    most: list[int] = []

    class Slow:
        def running(self, start: int, count: int) -> None:
            inside.append(start)
            most.append(len(inside))
            time.sleep(0)
            inside.pop()

        idle = running

    def run(seed: int) -> None:
        for _ in range(50):
            gates.run(FakeModel(), ["double"], rows(seed), [(Slow(), seed, 1)], None)

    for thread in [start(run, seed) for seed in range(4)]:
        thread.join(WAIT_S)
    assert most == [1] * 400


def test_a_run_with_nobody_to_tell_is_just_a_run() -> None:
    model = FakeModel()
    (result,) = gates.run(model, ["double"], rows(1, 2), [], None)
    assert result.tolist() == [[2], [4]]
    model.poison = {1.0}
    with pytest.raises(InferenceFailed):
        gates.run(model, ["double"], rows(1, 2), [], None)
