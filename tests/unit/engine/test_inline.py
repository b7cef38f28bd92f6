"""The inline lane: a short cut past the batcher that changes no answer, and nobody's end."""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from support.fake_model import FakeModel, rows
from support.waiting import eventually

from appliance.core.errors import DeadlineExceeded, Draining, InferenceFailed
from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine import inline
from appliance.engine.batcher import Batcher, Outcome, RunRecord
from appliance.engine.gate import RunGate
from appliance.engine.inline import InlineLane, Watchdog


class Busy(FakeModel):
    """Burns CPU for `seconds` a run, unless it is told to end; fails on the loop's thread when it is `torn`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.torn = False

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        if self.torn and threading.current_thread() is threading.main_thread():
            raise InferenceFailed("The model failed on this input.", detail="torn")
        told = self.terminated
        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            if self.terminated > told:
                raise InferenceFailed("The model failed on this input.", detail="terminated")
        return super().run(outputs, feeds)


@pytest.fixture
def model() -> Any:
    """In place of the gated one: a lane's run must not wait for the loop that it keeps."""
    return Busy()


class Lane(InlineLane):
    """A lane whose submissions are short to write."""

    def ask(
        self, *values: float, deadline: float | None = None, width: int = 1, **more: Any
    ) -> "asyncio.Future[Outcome]":
        assert self.takes(len(values))
        return self.submit(rows(*values, width=width), ("double",), len(values), deadline, "ada", **more)


@pytest.fixture
def make_lane(model: FakeModel, make: Any) -> Any:
    """Makes a lane of the fake model, with its batcher as `batcher`."""

    def build(turn_rows: int = 100, **settings: Any) -> Any:
        lane_settings = {name: settings.pop(name) for name in ("on_run", "on_close") if name in settings}
        batcher = make(model=model, **settings)
        lane = Lane(model, batcher, Watchdog(), turn_rows, **lane_settings)
        lane.batcher = batcher  # type: ignore[attr-defined]
        return lane

    return build


async def doubled(future: "asyncio.Future[Outcome]") -> list[float]:
    """The answer."""
    outcome = await asyncio.wait_for(future, 10)
    assert not outcome.errors
    return outcome.arrays["double"][:, 0].tolist()


async def test_rows_of_one_turn_share_a_run(model: FakeModel, make_lane: Any) -> None:
    """And each caller gets its own rows."""
    lane = make_lane()
    futures = [lane.ask(1), lane.ask(2, 3), lane.ask(4)]
    assert lane.waiting_rows == 4
    assert not model.runs
    assert [await doubled(future) for future in futures] == [[2], [4, 6], [8]]
    assert model.runs == [[1, 2, 3, 4]]
    assert lane.waiting_rows == 0
    assert await doubled(lane.ask(5)) == [10]
    assert model.runs[1:] == [[5]]


async def test_a_run_has_no_more_rows_than_the_batchers(model: FakeModel, make_lane: Any) -> None:
    """In their order; where rows run one by one, so they do here."""
    lane = make_lane(max_rows=3)
    futures = [lane.ask(1, 2), lane.ask(3), lane.ask(4), lane.ask(5, 6, 7)]
    assert [await doubled(future) for future in futures] == [[2, 4], [6], [8], [10, 12, 14]]
    assert model.runs == [[1, 2, 3], [4], [5, 6, 7]]
    assert not lane.takes(4)
    separate = make_lane(separate=True)
    assert [await doubled(future) for future in [separate.ask(1), separate.ask(2)]] == [[2], [4]]
    assert model.runs[3:] == [[1], [2]]


async def test_only_rows_of_one_shape_share_a_run(model: FakeModel, make_lane: Any) -> None:
    """Others run in the same turn, by themselves."""
    lane = make_lane()
    futures = [lane.ask(1), lane.ask(2, width=2), lane.ask(3)]
    assert [await doubled(future) for future in futures] == [[2], [4], [6]]
    assert [shape["x"] for shape in model.shapes] == [(2, 1), (1, 2)]


async def test_a_turn_runs_only_so_many_rows(model: FakeModel, make_lane: Any) -> None:
    """The others are run in the next ones, in their order; in between the loop serves everybody."""
    lane = make_lane(turn_rows=2)
    turns: list[int] = []
    futures = [lane.ask(value) for value in range(5)]

    def turn() -> None:
        turns.append(len(model.runs))
        if len(model.runs) < 3:
            asyncio.get_running_loop().call_soon(turn)

    turn()
    assert [await doubled(future) for future in futures] == [[0], [2], [4], [6], [8]]
    assert model.runs == [[0, 1], [2, 3], [4]]
    assert {0, 1, 2} <= set(turns)
    assert lane.waiting_rows == 0


async def test_a_submission_larger_than_a_turn_goes_to_the_batcher(make_lane: Any) -> None:
    """It would keep the loop for too long."""
    lane = make_lane(turn_rows=2)
    assert not lane.takes(3)
    assert lane.takes(2)


async def test_only_so_many_rows_wait(make_lane: Any) -> None:
    """Some turns' worth, and never more than the batcher would let wait; what is more goes there."""
    lane = make_lane(turn_rows=1)
    futures = [lane.ask(value) for value in range(inline._BACKLOG_TURNS)]
    assert not lane.takes(1)
    await lane.wait_idle()
    assert all(future.done() for future in futures)
    assert lane.takes(1)
    short = make_lane(queue_rows=2)
    short.ask(1, 2)
    assert not short.takes(1)
    await short.wait_idle()


async def test_a_batcher_with_work_has_it_all(model: FakeModel, make_lane: Any) -> None:
    """Its turns and its limit hold for everybody, so nobody passes by."""
    lane = make_lane()
    waiting = lane.batcher.submit(rows(1), ("double",), None, "bob")
    assert not lane.takes(1)
    assert await doubled(waiting) == [2]
    await asyncio.sleep(0)
    await asyncio.to_thread(eventually, lambda: lane.takes(1))
    lane.batcher.close()
    assert not lane.takes(1)


async def test_who_left_or_expired_is_not_run(model: FakeModel, make_lane: Any) -> None:
    """The others are."""
    lane = make_lane()
    left, late, stays = lane.ask(1), lane.ask(2, deadline=time.monotonic() - 1), lane.ask(3)
    left.cancel()
    with pytest.raises(DeadlineExceeded):
        await late
    assert await doubled(stays) == [6]
    assert model.runs == [[3]]


async def test_a_failing_run_is_narrowed_down_by_the_batcher(model: FakeModel, make_lane: Any) -> None:
    """The row at fault has its error, its neighbours their answers."""
    lane = make_lane()
    model.poison = {2.0}
    futures = [lane.ask(value) for value in (1, 2, 3)]
    assert await doubled(futures[0]) == [2]
    assert await doubled(futures[2]) == [6]
    bad = await futures[1]
    assert isinstance(bad.errors[0], InferenceFailed)
    assert not bad.arrays
    await asyncio.wait_for(lane.batcher.wait_idle(), 10)


@pytest.mark.parametrize("answer", [np.float32(1), np.zeros(0, np.float32), "text"])
async def test_a_result_without_an_entry_a_row_is_an_error_for_each(
    model: FakeModel, make_lane: Any, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    """Whatever a graph returns, everybody is answered, and nobody with another one's row."""
    lane = make_lane()
    monkeypatch.setattr(model, "compute", lambda name, x: answer)
    for future in [lane.ask(1, 2), lane.ask(3)]:
        outcome = await asyncio.wait_for(future, 10)
        assert not outcome.arrays
        assert outcome.errors


async def test_what_is_handed_over_ends_at_its_deadline(model: Any, make_lane: Any) -> None:
    """Its caller may have no timer of its own; the run that nobody waits for any more is ended."""
    lane = make_lane()
    model.torn = model.gated = True
    future = lane.ask(1, deadline=time.monotonic() + 0.1)
    await model.entered()
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(future, 10)
    await asyncio.wait_for(lane.batcher.wait_idle(), 10)
    model.open_gate()


async def test_who_leaves_after_the_hand_over_leaves_the_batcher_too(model: Any, make_lane: Any) -> None:
    """Nothing is kept for nobody."""
    lane = make_lane()
    model.torn = model.gated = True
    futures = [lane.ask(1), lane.ask(2, width=2)]
    await model.entered()
    for future in futures:
        future.cancel()
    await asyncio.wait_for(lane.batcher.wait_idle(), 10)
    assert lane.batcher.waiting_rows == 0
    model.open_gate()


async def test_what_is_handed_over_is_answered_once(model: Any, make_lane: Any) -> None:
    """By the batcher, whatever the lane made of it."""
    lane = make_lane()
    model.torn = True
    futures = [lane.ask(value) for value in (1, 2, 3)]
    assert [await doubled(future) for future in futures] == [[2], [4], [6]]
    await asyncio.wait_for(lane.batcher.wait_idle(), 10)
    assert lane.takes(1)


async def test_a_batcher_that_dies_answers_what_was_handed_over(model: Any, make_lane: Any) -> None:
    """And the lane takes no more."""
    lane = make_lane()
    model.torn = True
    model.crash = SystemError("gone")
    with pytest.raises(InferenceFailed, match="worker has died"):
        await asyncio.wait_for(lane.ask(1), 10)
    assert not lane.takes(1)


async def test_a_batcher_that_is_closed_meanwhile_refuses_what_is_handed_over(model: FakeModel, make_lane: Any) -> None:
    """Answered all the same."""
    lane = make_lane()
    model.poison = {1.0}
    future = lane.ask(1)
    lane.batcher.close()
    with pytest.raises(Draining):
        await asyncio.wait_for(future, 10)


async def test_waiting_for_the_lane_is_waiting_for_the_turn(make_lane: Any) -> None:
    """What a drain does."""
    lane = make_lane()
    future = lane.ask(1)
    await lane.wait_idle()
    assert future.done()


async def test_slow_runs_close_the_lane(model: Any, make_lane: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was quick at load, and is not any more, keeps the loop a few times only."""
    # On a busy machine ten milliseconds of work may last a tenth of a second.
    monkeypatch.setattr(inline, "_HANGS_S", 5.0)
    closed: list[str] = []
    lane = make_lane(on_close=closed.append)
    model.seconds = 2 * inline._SLOW_S
    for _ in range(3):
        assert lane.takes(1)
        assert await doubled(lane.ask(1)) == [2]
    assert not lane.takes(1)
    assert len(closed) == 1


async def test_a_rare_slow_run_does_not_close_the_lane(
    model: Any, make_lane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector is not the model's fault."""
    # On a busy machine ten milliseconds of work may last a tenth of a second.
    monkeypatch.setattr(inline, "_HANGS_S", 5.0)
    lane = make_lane()
    for _ in range(5):
        model.seconds = 2 * inline._SLOW_S
        await doubled(lane.ask(1))
        model.seconds = 0
        for _ in range(120):
            await doubled(lane.ask(1))
    assert lane.takes(1)


async def test_a_run_that_does_not_end_is_ended(model: Any, make_lane: Any) -> None:
    """By another thread, as the loop stands still; its caller is answered by the batcher, the lane is closed."""
    lane = make_lane()
    model.seconds = 60
    future = lane.ask(1)
    asyncio.get_running_loop().call_soon(lambda: setattr(model, "seconds", 0))
    assert await doubled(future) == [2]
    assert model.terminated == 1
    assert not lane.takes(1)


async def test_the_watchdog_sleeps_when_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes back."""
    monkeypatch.setattr(inline, "_HANGS_S", 0.02)
    watchdog = Watchdog()
    model = FakeModel()
    for _ in range(2):
        watchdog.begin(model)
        assert watchdog._awake
        assert not watchdog.end()
        await asyncio.to_thread(eventually, lambda: not watchdog._awake)
    watchdog.begin(model)
    await asyncio.to_thread(eventually, lambda: model.terminated)
    assert watchdog.end()


async def test_no_run_goes_unwatched_when_there_is_no_thread_for_the_watchdog(
    model: FakeModel, make_lane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batcher runs it instead; and the next run has its watchdog again."""
    lane = make_lane()

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert await doubled(lane.ask(1)) == [2]
    before = set(threading.enumerate())
    assert await doubled(lane.ask(2)) == [4]
    assert "inline watchdog" in {thread.name for thread in threading.enumerate() if thread not in before}


class Told:
    """Marks and a board that write down what they are told."""

    def __init__(self, log: list[Any], name: str) -> None:
        self._log, self._name = log, name

    def running(self, start: int, count: int) -> None:
        self._log.append((self._name, "running", start, count))

    def idle(self, start: int, count: int) -> None:
        self._log.append((self._name, "idle", start, count))

    def begin(self) -> int:
        self._log.append((self._name, "begin"))
        return 5

    def end(self, token: int) -> None:
        self._log.append((self._name, "end", token))


async def test_marks_and_board_are_told_of_runs_on_the_loop(model: FakeModel, make_lane: Any) -> None:
    """As the batcher tells them; and of the batcher's runs when a batch is handed over."""
    log: list[Any] = []
    lane = make_lane(board=Told(log, "board"))
    compute = model.compute
    model.compute = lambda name, x: (log.append("run"), compute(name, x))[1]  # type: ignore[method-assign]
    futures = [lane.ask(1, marks=Told(log, "one")), lane.ask(2, 3, marks=Told(log, "two")), lane.ask(4)]
    for future in futures:
        await doubled(future)
    marks = [[("one", what, 0, 1), ("two", what, 0, 2)] for what in ("running", "idle")]
    assert log == [("board", "begin"), *marks[0], "run", *marks[1], ("board", "end", 5)]
    log.clear()
    model.torn = True  # type: ignore[attr-defined]
    await doubled(lane.ask(5, marks=Told(log, "one")))
    run = [("board", "begin"), ("one", "running", 0, 1), ("one", "idle", 0, 1), ("board", "end", 5)]
    assert [told for told in log if told != "run"] == 2 * run


async def test_while_a_run_is_to_be_alone_the_loop_runs_nothing_and_does_not_wait(
    model: FakeModel, make_lane: Any
) -> None:
    """What waits goes to the batcher, with its priority, and what comes is not taken."""
    shared = RunGate()
    lane = make_lane(gate=shared)
    asked: list[Any] = []
    submit = lane.batcher.submit
    lane.batcher.submit = lambda *feeds, **more: (asked.append(more), submit(*feeds, **more))[1]
    shared.enter(True)
    assert not lane.takes(1)
    shared.leave(True)
    future = lane.ask(1, priority=1)
    shared.enter(True)
    await lane.wait_idle()
    assert not future.done()
    assert asked == [{"priority": 1, "marks": None, "told": None}]
    assert not model.runs
    shared.leave(True)
    assert await doubled(future) == [2]
    await asyncio.to_thread(eventually, lambda: lane.takes(1))


async def test_a_run_that_is_alone_waits_for_the_one_on_the_loop(model: FakeModel, make_lane: Any) -> None:
    """The lane stands in the gate while it runs, and leaves it."""
    shared = RunGate()
    lane = make_lane(gate=shared)
    inside: list[int] = []
    compute = model.compute
    model.compute = lambda name, x: (inside.append(shared._inside), compute(name, x))[1]  # type: ignore[method-assign]
    assert await doubled(lane.ask(1)) == [2]
    model.torn = True  # type: ignore[attr-defined]
    assert await doubled(lane.ask(2)) == [4]
    assert inside == [1, 1]
    await asyncio.to_thread(shared.enter, True)
    shared.leave(True)


class Waiting:
    """A waiter that acts at once."""

    def __init__(self, then: Any = None) -> None:
        self.told: list[Any] = []
        self.left = False
        self._then = then
        self._callbacks: list[Any] = []

    def done(self) -> bool:
        return self.left or bool(self.told)

    def set_result(self, outcome: Any) -> None:
        self.told.append(outcome)
        for callback in self._callbacks:
            callback(self)
        if self._then:
            self._then()

    set_exception = set_result

    def cancel(self) -> None:
        if not self.done():
            self.set_result(None)

    def add_done_callback(self, callback: Any) -> None:
        self._callbacks.append(callback)


def wait_for(lane: Any, value: float, waiter: Waiting, deadline: float | None = None) -> None:
    """Submit a row for a waiter."""
    lane.submit_for(waiter, rows(value), ("double",), 1, deadline, "ada")


async def test_a_waiter_is_told_when_the_turn_ends(model: FakeModel, make_lane: Any) -> None:
    """Once, and by the lane itself: no further turn of the loop passes."""
    lane = make_lane()
    told, late, left = Waiting(), Waiting(), Waiting()
    wait_for(lane, 1, told)
    wait_for(lane, 2, late, time.monotonic() - 1)
    wait_for(lane, 3, left)
    left.left = True
    assert not told.told
    await asyncio.sleep(0)
    (outcome,) = told.told
    assert outcome.arrays["double"].tolist() == [[2]]
    assert [type(answer) for answer in late.told] == [DeadlineExceeded]
    assert not left.told
    assert model.runs == [[1]]


async def test_a_waiter_that_leaves_because_of_its_neighbour_is_told_nothing(make_lane: Any) -> None:
    """What is done with one answer may end another call; and it may bring a new one."""
    lane = make_lane()
    second, third = Waiting(), Waiting()

    def then() -> None:
        second.left = True
        wait_for(lane, 3, third)

    first = Waiting(then)
    wait_for(lane, 1, first)
    wait_for(lane, 2, second)
    await lane.wait_idle()
    assert len(first.told) == 1
    assert not second.told
    assert third.told[0].arrays["double"].tolist() == [[6]]


async def test_a_waiter_that_is_handed_over_is_told_by_the_batcher(model: Any, make_lane: Any) -> None:
    """Its answer, or at its deadline that there is none; once."""
    lane = make_lane()
    model.torn = model.gated = True
    answered, late = Waiting(), Waiting()
    wait_for(lane, 1, answered)
    wait_for(lane, 2, late, time.monotonic() + 0.05)
    await asyncio.to_thread(eventually, lambda: late.told)
    model.open_gate()
    await asyncio.wait_for(lane.batcher.wait_idle(), 10)
    await asyncio.sleep(0)
    assert [type(answer) for answer in late.told] == [DeadlineExceeded]
    (outcome,) = answered.told
    assert outcome.arrays["double"].tolist() == [[2]]


async def test_runs_are_recorded(make_lane: Any) -> None:
    """Rows, seconds and waits, as the batcher's."""
    records: list[RunRecord] = []
    lane = make_lane(on_run=records.append)
    await asyncio.gather(lane.ask(1), lane.ask(2, 3))
    (record,) = records
    assert (record.rows, len(record.waits)) == (3, 2)
    assert 0 <= record.seconds < 10
    assert all(0 <= wait < 10 for wait in record.waits)


async def test_who_asks_is_told_of_the_run_before_the_answer(make_lane: Any) -> None:
    """Those who shared it hear of one run, by when its rows were taken."""
    lane = make_lane()
    heard: list[tuple[Run, bool]] = []
    futures: list[asyncio.Future[Outcome]] = []
    for number, values in enumerate([(1,), (2, 3)]):

        def told(run: Run, number: int = number) -> None:
            heard.append((run, futures[number].done()))

        futures.append(lane.submit(rows(*values), ("double",), len(values), None, "ada", told=told))
    await asyncio.gather(*futures)
    assert [(run.rows, done) for run, done in heard] == [(3, False), (3, False)]
    assert heard[0][0].taken_at == heard[1][0].taken_at >= heard[1][0].queued_at >= heard[0][0].queued_at
    assert all(run.compute > 0 for run, _ in heard)


async def test_what_the_batcher_takes_over_is_told_as_well(model: FakeModel, make_lane: Any) -> None:
    """The run that failed here is not told; those that answer are, once each."""
    lane = make_lane()
    heard: list[Run] = []
    model.poison = {2.0}
    futures = [lane.submit(rows(v), ("double",), 1, None, "ada", told=heard.append) for v in (1, 2)]
    await asyncio.gather(*futures, return_exceptions=True)
    assert len(heard) == 2


async def test_lane_and_batcher_give_the_same_answers(model: FakeModel, make_lane: Any) -> None:
    """Bit for bit, whichever way a row takes."""
    lane = make_lane()
    values = np.random.default_rng(0).random(8).tolist()
    inline_answers = [(await future).arrays["double"].tobytes() for future in [lane.ask(v) for v in values]]
    batcher: Batcher = lane.batcher
    futures = [batcher.submit(rows(v), ("double",), None, "ada") for v in values]
    assert [(await future).arrays["double"].tobytes() for future in futures] == inline_answers
