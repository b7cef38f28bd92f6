"""The batcher's law: every accepted submission ends exactly once, whatever happens to its neighbours."""

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_model import FakeModel, rows, submitter
from support.waiting import eventually, eventually_async

from appliance.core.errors import DeadlineExceeded, Draining, InferenceFailed, Overloaded
from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine.batcher import AGE, Batcher, RunRecord, powers_of_two
from appliance.engine.gate import RunGate
from appliance.engine.session import OutOfMemory


def doubled(outcome: Any) -> list[float]:
    """The first column of the answer."""
    assert not outcome.errors
    return outcome.arrays["double"][:, 0].tolist()


async def plugged(model: FakeModel, batcher: Batcher) -> "asyncio.Future[Any]":
    """Keep the worker busy with one row, so that what comes next queues."""
    model.gated = True
    future = batcher.submit(rows(-1.0), ("double",), None, "plug")
    await model.entered()
    return future


# ---- the four laws ---------------------------------------------------------------------------------------------------


async def test_admission_is_refused_at_once_when_the_queue_is_full(model: FakeModel, make: Any) -> None:
    """A refusal does not wait for the run in progress, and names the limit."""
    batcher = make(queue_rows=3)
    plug = await plugged(model, batcher)
    submit = submitter(batcher)
    waiting = submit(1, 2, 3)
    with pytest.raises(Overloaded, match=r"3 inputs wait .* limit is 3 \(engine\.queue_rows\)"):
        submit(4)
    assert not plug.done()
    assert not waiting.done()


async def test_a_refused_submission_leaves_no_trace(model: FakeModel, make: Any) -> None:
    """Its rows never run, are not counted, and nobody waits for them."""
    batcher = make(queue_rows=3)
    await plugged(model, batcher)
    submit = submitter(batcher)
    waiting = submit(1, 2, 3)
    with pytest.raises(Overloaded):
        submit(66)
    assert batcher.waiting_rows == 3
    model.open_gate()
    assert doubled(await waiting) == [2, 4, 6]
    await asyncio.wait_for(batcher.wait_idle(), 5)
    assert [66.0] not in model.runs
    assert doubled(await submit(4, 5, 6)) == [8, 10, 12]


async def test_an_empty_queue_takes_a_submission_larger_than_itself(model: FakeModel, make: Any) -> None:
    """The limit is on who waits; otherwise a request of 128 could never be served by a small queue."""
    submit = submitter(make(queue_rows=2))
    assert doubled(await submit(*range(20))) == [2.0 * i for i in range(20)]


async def test_who_cancelled_is_skipped_while_the_batch_is_formed(model: FakeModel, make: Any) -> None:
    """The rows of a caller that went away never reach the device."""
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    first, gone, last = submit(1), submit(2), submit(3)
    gone.cancel()
    model.open_gate()
    assert doubled(await first) == [2]
    assert doubled(await last) == [6]
    assert model.runs == [[-1.0], [1.0, 3.0]]


async def test_a_cancellation_in_the_same_instant_is_honoured(model: FakeModel, make: Any) -> None:
    """Cancelled and the worker let go without the loop having turned: the row still does not run."""
    batcher = make()
    await plugged(model, batcher)
    gone = submitter(batcher)(2)
    gone.cancel()
    model.open_gate()
    until = time.monotonic() + 5
    while batcher._levels and time.monotonic() < until:  # the loop must not turn meanwhile
        time.sleep(0.001)  # noqa: ASYNC251
    assert not batcher._levels
    assert model.runs == [[-1.0]]


async def test_who_expired_is_told_so_and_never_runs(model: FakeModel, make: Any) -> None:
    """A deadline that passed in the queue ends in DeadlineExceeded, without a run."""
    now = [100.0]
    batcher = make(clock=lambda: now[0])
    await plugged(model, batcher)
    submit = submitter(batcher)
    expired, alive = submit(1, deadline=101.0), submit(2, deadline=103.0)
    now[0] = 102.0
    model.open_gate()
    with pytest.raises(DeadlineExceeded):
        await expired
    assert doubled(await alive) == [4]
    assert model.runs == [[-1.0], [2.0]]


async def test_a_cancelled_submission_makes_room_in_the_queue_at_once(model: FakeModel, make: Any) -> None:
    """The next caller need not wait for the run in progress, and the rows' memory is let go."""
    batcher = make(queue_rows=2)
    await plugged(model, batcher)
    submit = submitter(batcher)
    gone = submit(1, 2)
    gone.cancel()
    await asyncio.sleep(0)
    assert batcher.waiting_rows == 0
    kept = submit(3, 4)
    model.open_gate()
    assert doubled(await kept) == [6, 8]


async def test_a_failed_batch_answers_all_its_members(model: FakeModel, make: Any) -> None:
    """Nobody hangs because a neighbour's row was bad."""
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(value) for value in range(8)]
    model.poison = {float(value) for value in range(8)}
    model.open_gate()
    outcomes = await asyncio.wait_for(asyncio.gather(*futures), 5)
    for outcome in outcomes:
        assert outcome.arrays == {}
        assert isinstance(outcome.errors[0], InferenceFailed)


@pytest.mark.parametrize("poisoned", range(7))
async def test_only_the_poisoned_row_gets_the_error(model: FakeModel, make: Any, poisoned: int) -> None:
    """The batch is halved until the bad row stands alone; its neighbours get the right values."""
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    model.poison = {float(poisoned)}
    together, alone = submit(0, 1, 2, 3), [submit(value) for value in (4, 5, 6)]
    model.open_gate()
    outcome = await together
    assert set(outcome.errors) == {poisoned} - {4, 5, 6}
    for row in range(4):
        if row not in outcome.errors:
            assert outcome.arrays["double"][row, 0] == 2 * row
    for value, future in zip((4, 5, 6), alone, strict=True):
        single = await future
        if value == poisoned:
            assert set(single.errors) == {0}
        else:
            assert doubled(single) == [2 * value]


@pytest.mark.parametrize("death", [SystemExit(3), MemoryError(), KeyboardInterrupt(), RuntimeError("a bug")])
async def test_a_dead_worker_answers_everybody(model: FakeModel, make: Any, death: BaseException) -> None:
    """Who runs and who waits alike; afterwards the model says why, and takes nobody in."""
    reasons: list[str] = []
    batcher = make(on_death=reasons.append)
    model.crash = death
    running = await plugged(model, batcher)
    submit = submitter(batcher)
    waiting = [submit(1), submit(2, width=3), submit(3, principal="bob")]
    model.let_go()
    for future in (running, *waiting):
        with pytest.raises(InferenceFailed) as failure:
            await asyncio.wait_for(future, 5)
        assert failure.value.detail == repr(death)
    assert batcher.death == repr(death)
    assert reasons == [repr(death)]
    with pytest.raises(InferenceFailed, match="worker has died"):
        submit(4)
    await asyncio.wait_for(batcher.wait_idle(), 5)


# ---- rows, not requests ----------------------------------------------------------------------------------------------


async def test_rows_of_different_submissions_share_a_run(model: FakeModel, make: Any) -> None:
    """What queued while the last batch ran is the next batch."""
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(1), submit(2, 3), submit(4, 5, 6)]
    model.open_gate()
    assert [doubled(outcome) for outcome in await asyncio.gather(*futures)] == [[2], [4, 6], [8, 10, 12]]
    assert model.runs[1:] == [[1, 2, 3, 4, 5, 6]]


async def test_a_big_submission_is_cut_into_several_runs(model: FakeModel, make: Any) -> None:
    """Its rows land in their own places."""
    submit = submitter(make(max_rows=8))
    assert doubled(await submit(*range(30))) == [2.0 * i for i in range(30)]
    assert [len(run) for run in model.runs] == [8, 8, 8, 6]


async def test_no_run_has_more_than_max_rows(model: FakeModel, make: Any) -> None:
    """Whatever queued."""
    batcher = make(max_rows=5)
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(*range(n), principal=f"p{n}") for n in (1, 7, 3, 12)]
    model.open_gate()
    for n, outcome in zip((1, 7, 3, 12), await asyncio.gather(*futures), strict=True):
        assert doubled(outcome) == [2.0 * i for i in range(n)]
    assert max(len(run) for run in model.runs) == 5
    assert sum(len(run) for run in model.runs) == 24


async def test_a_lone_submission_does_not_wait_for_company(model: FakeModel, make: Any) -> None:
    """Work-conserving: no timer stands between a row and an idle device."""
    batcher = make()
    model.gated = True
    future = submitter(batcher)(1)
    await model.entered()
    model.open_gate()
    assert doubled(await future) == [2]


async def test_shapes_never_mix(model: FakeModel, make: Any) -> None:
    """Only rows of one shape and dtype share a run."""
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(value, width=width) for value, width in [(1, 1), (2, 2), (3, 1), (4, 2), (5, 3)]]
    futures.append(batcher.submit({"x": np.array([[6.0]], np.float64)}, ("double",), None, "ada"))
    model.open_gate()
    for value, outcome in zip(range(1, 7), await asyncio.gather(*futures), strict=True):
        assert doubled(outcome) == [2 * value]
    assert sorted(model.runs[1:]) == [[1, 3], [2, 4], [5], [6]]


async def test_inputs_named_in_another_order_share_a_run(model: FakeModel, make: Any) -> None:
    """The order in which a caller names the inputs is no shape."""
    batcher = make()
    await plugged(model, batcher)
    one, mask = np.ones((1, 1), np.float32), np.zeros((1, 2), np.int64)
    futures = [
        batcher.submit({"x": one, "mask": mask}, ("double",), None, "ada"),
        batcher.submit({"mask": mask, "x": one * 2}, ("double",), None, "ada"),
    ]
    model.open_gate()
    assert [doubled(outcome) for outcome in await asyncio.gather(*futures)] == [[2], [4]]
    assert len(model.runs) == 2


async def test_each_submission_gets_the_outputs_it_asked_for(model: FakeModel, make: Any) -> None:
    """A shared run computes all of them, once; nobody is given a neighbour's."""
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    both = submit(1, outputs=("double", "next"))
    one = submit(2, outputs=("next",))
    model.open_gate()
    first, second = await asyncio.gather(both, one)
    assert set(first.arrays) == {"double", "next"}
    assert set(second.arrays) == {"next"}
    assert second.arrays["next"].tolist() == [[3]]
    assert model.asked[1:] == [("double", "next")]


async def test_the_arrays_are_not_changed(model: FakeModel, make: Any) -> None:
    """The caller keeps its rows until it is answered; they may be shared memory."""
    feeds = rows(1, 2, 3)
    feeds["x"].flags.writeable = False
    outcome = await make(sizes=(4, 8)).submit(feeds, ("double",), None, "ada")
    assert doubled(outcome) == [2, 4, 6]


# ---- order -----------------------------------------------------------------------------------------------------------


async def test_one_principals_thousand_rows_do_not_starve_anothers_single_row(model: FakeModel, make: Any) -> None:
    """It is in the next batch."""
    batcher = make(max_rows=8, queue_rows=2000)
    await plugged(model, batcher)
    submit = submitter(batcher)
    many = submit(*range(1000), principal="greedy")
    single = submit(5000, principal="modest")
    model.let_go(2)
    assert doubled(await asyncio.wait_for(single, 5)) == [10000]
    assert 5000 in model.runs[1]
    model.open_gate()
    assert doubled(await many) == [2.0 * i for i in range(1000)]


@pytest.mark.parametrize("max_rows", [1, 2, 4])
async def test_principals_take_turns(model: FakeModel, make: Any, max_rows: int) -> None:
    """However few rows a run has, none of them waits for more runs than there are principals."""
    batcher = make(max_rows=max_rows)
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(*([value] * 8), principal=str(value)) for value in (1, 2, 3)]
    model.open_gate()
    await asyncio.gather(*futures)
    order = [value for run in model.runs[1:] for value in run]
    assert set(order[: 3 * max_rows]) == {1, 2, 3}
    assert {order[:18].count(value) for value in (1.0, 2.0, 3.0)} <= {5, 6, 7}


async def test_short_deadlines_in_one_shape_do_not_starve_another_principal(model: FakeModel, make: Any) -> None:
    """Whose turn it is comes before whose deadline is nearest, among shapes too."""
    batcher = make(max_rows=2)
    await plugged(model, batcher)
    submit = submitter(batcher)
    greedy = [submit(value, value, principal="greedy", deadline=time.monotonic() + 60) for value in range(10)]
    modest = submit(77, principal="modest", width=3)
    model.let_go(3)
    assert doubled(await asyncio.wait_for(modest, 5)) == [154]
    assert [77.0] in model.runs[1:3]
    model.open_gate()
    await asyncio.gather(*greedy)


async def test_the_nearest_deadline_goes_first(model: FakeModel, make: Any) -> None:
    """Within a principal; no deadline at all comes last."""
    batcher = make(max_rows=1)
    await plugged(model, batcher)
    submit = submitter(batcher)
    now = time.monotonic()
    futures = [submit(1), submit(2, deadline=now + 300), submit(3, deadline=now + 100), submit(4, deadline=now + 200)]
    model.open_gate()
    await asyncio.gather(*futures)
    assert model.runs[1:] == [[3], [4], [2], [1]]


async def test_the_shape_with_the_nearest_deadline_goes_first(model: FakeModel, make: Any) -> None:
    """Among the shapes of one principal."""
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    now = time.monotonic()
    futures = [
        submit(1, width=1, deadline=now + 300),
        submit(2, width=2, deadline=now + 100),
        submit(3, width=3, deadline=now + 200),
    ]
    model.open_gate()
    await asyncio.gather(*futures)
    assert model.runs[1:] == [[2], [3], [1]]


async def test_equal_deadlines_go_in_the_order_of_arrival(model: FakeModel, make: Any) -> None:
    """First come, first served."""
    batcher = make(max_rows=1)
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(value) for value in (3, 1, 2)]
    model.open_gate()
    await asyncio.gather(*futures)
    assert model.runs[1:] == [[3], [1], [2]]


# ---- memory, padding, modes ------------------------------------------------------------------------------------------


async def test_out_of_memory_halves_the_batch_and_remembers(model: FakeModel, make: Any) -> None:
    """All rows are answered, and later runs begin at the size that fits."""
    model.room = 4
    batcher = make(max_rows=16)
    submit = submitter(batcher)
    assert doubled(await submit(*range(16))) == [2.0 * i for i in range(16)]
    assert batcher.max_rows == 4
    model.runs.clear()
    assert doubled(await submit(*range(12))) == [2.0 * i for i in range(12)]
    assert [len(run) for run in model.runs] == [4, 4, 4]


@pytest.mark.parametrize("room", [1, 2, 3, 5])
async def test_the_remembered_size_never_grows(model: FakeModel, make: Any, room: int) -> None:
    """The second half of a failed batch does not undo what the first half taught."""
    model.room = room
    batcher = make(max_rows=16)
    sizes: list[int] = []
    original = model.compute
    model.compute = lambda name, x: (sizes.append(batcher.max_rows), original(name, x))[1]  # type: ignore[method-assign]
    assert doubled(await submitter(batcher)(*range(15))) == [2.0 * i for i in range(15)]
    assert sizes == sorted(sizes, reverse=True)
    assert 1 <= batcher.max_rows <= room


async def test_a_row_that_does_not_fit_alone_is_an_error_of_its_own(model: FakeModel, make: Any) -> None:
    """Nothing is left to halve."""
    model.room = 0
    outcome = await submitter(make())(1, 2)
    assert {row: type(error) for row, error in outcome.errors.items()} == {0: OutOfMemory, 1: OutOfMemory}


@pytest.mark.parametrize(("most", "sizes"), [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8))])
def test_sizes_are_powers_of_two_and_the_last(most: int, sizes: tuple[int, ...]) -> None:
    assert powers_of_two(most) == sizes


@pytest.mark.parametrize(("count", "padded"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 12), (12, 12)])
async def test_runs_are_padded_to_a_power_of_two(model: FakeModel, make: Any, count: int, padded: int) -> None:
    """So that a GPU sees few shapes; never beyond max_rows, and nobody sees the padding."""
    outcome = await submitter(make(max_rows=12, sizes=powers_of_two(12)))(*range(count))
    assert doubled(outcome) == [2.0 * i for i in range(count)]
    assert model.shapes[0]["x"] == (padded, 1)


async def test_without_padding_a_run_has_the_rows_it_has(model: FakeModel, make: Any) -> None:
    """CPUs do not care for shapes."""
    await submitter(make())(1, 2, 3)
    assert model.shapes[0]["x"] == (3, 1)


async def test_separate_rows_run_one_at_a_time(model: FakeModel, make: Any) -> None:
    """For models whose rows influence each other."""
    batcher = make(separate=True)
    await plugged(model, batcher)
    submit = submitter(batcher)
    one, many = submit(1), submit(2, 3, 4)
    model.open_gate()
    assert doubled(await one) == [2]
    assert doubled(await many) == [4, 6, 8]
    assert all(len(run) == 1 for run in model.runs)


async def test_a_whole_submission_is_one_run_as_it_is(model: FakeModel, make: Any) -> None:
    """For graphs without a batch axis: the first axis counts no rows, so nothing is merged or cut."""
    batcher = make(whole=True, max_rows=2)
    await plugged(model, batcher)
    futures = [batcher.submit(rows(*values), ("double",), None, "ada") for values in ((1, 2, 3), (4, 5))]
    model.open_gate()
    first, second = await asyncio.gather(*futures)
    assert first.arrays["double"].tolist() == [[2], [4], [6]]
    assert second.arrays["double"].tolist() == [[8], [10]]
    assert model.runs[1:] == [[1, 2, 3], [4, 5]]


async def test_a_whole_submission_may_be_a_scalar(model: FakeModel, make: Any) -> None:
    """A graph may have inputs without any axis."""
    outcome = await make(whole=True).submit({"x": np.float32(4).reshape(())}, ("double",), None, "ada")
    assert outcome.arrays["double"] == 8


async def test_a_failed_whole_submission_gets_its_error(model: FakeModel, make: Any) -> None:
    """There is nothing to halve."""
    model.poison = {1.0}
    outcome = await make(whole=True).submit(rows(1, 2), ("double",), None, "ada")
    assert isinstance(outcome.errors[0], InferenceFailed)
    assert outcome.arrays == {}


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x[:0],
        lambda x: np.float32(1).reshape(()),
        lambda x: ["a list"],
        lambda x: x[: len(x) - 1],
    ],
    ids=["empty", "scalar", "no array", "one short"],
)
async def test_an_output_without_an_entry_for_each_row_is_a_failure(model: FakeModel, make: Any, answer: Any) -> None:
    """An answer is never given to the wrong row."""
    model.compute = lambda name, x: answer(x)  # type: ignore[method-assign]
    outcome = await asyncio.wait_for(submitter(make())(1, 2, 3), 5)
    assert set(outcome.errors) == {0, 1, 2}
    assert "'double' does not have one entry for each row" in str(outcome.errors[0])


@pytest.mark.parametrize("widths", [(1, 3), (3, 1), (2, 3)])
async def test_pieces_of_different_shapes_are_refused(model: FakeModel, make: Any, widths: tuple[int, int]) -> None:
    """Runs of one submission that answer in different shapes cannot be put together, not even by broadcasting."""
    sizes = iter(widths)
    model.compute = lambda name, x: np.repeat(x, next(sizes), axis=1)  # type: ignore[method-assign]
    with pytest.raises(InferenceFailed, match="different shapes"):
        await asyncio.wait_for(submitter(make(max_rows=2))(1, 2, 3, 4), 5)


async def test_an_answer_that_cannot_be_put_together_does_not_hurt_its_neighbours(
    model: FakeModel, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for the whole, say: the others of that run are answered all the same."""
    batcher = make(max_rows=4)
    await plugged(model, batcher)
    submit = submitter(batcher)
    torn, neighbour = submit(1, 2, 3, 4, 5, 6), submit(7)

    def no_memory(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(np, "zeros", no_memory)
    model.open_gate()
    with pytest.raises(InferenceFailed, match="could not be put together"):
        await asyncio.wait_for(torn, 5)
    assert doubled(await asyncio.wait_for(neighbour, 5)) == [14]


# ---- the end ---------------------------------------------------------------------------------------------------------


async def test_close_answers_what_waits_and_finishes_what_runs(model: FakeModel, make: Any) -> None:
    """Draining for the queue, a result for the run in progress, and nobody else is let in."""
    batcher = make()
    running = await plugged(model, batcher)
    waiting = submitter(batcher)(1)
    batcher.close()
    with pytest.raises(Draining):
        await waiting
    with pytest.raises(Draining):
        submitter(batcher)(2)
    model.open_gate()
    assert doubled(await running) == [-2]
    await asyncio.wait_for(batcher.wait_idle(), 5)
    assert model.runs == [[-1.0]]


async def test_close_may_say_why(model: FakeModel, make: Any) -> None:
    """The caller's error instead of Draining."""
    batcher = make()
    await plugged(model, batcher)
    waiting = submitter(batcher)(1)
    batcher.close(Overloaded("no more of this"))
    with pytest.raises(Overloaded, match="no more of this"):
        await waiting


async def test_close_finishes_a_submission_of_which_a_part_has_run(model: FakeModel, make: Any) -> None:
    """Half an answer is worth nothing, so it is not thrown away."""
    batcher = make(max_rows=2)
    model.gated = True
    future = submitter(batcher)(1, 2, 3, 4, 5)
    await model.entered()
    batcher.close()
    model.open_gate()
    assert doubled(await asyncio.wait_for(future, 5)) == [2, 4, 6, 8, 10]


async def test_close_twice_is_as_good_as_once(model: FakeModel, make: Any) -> None:
    """And it returns at once."""
    batcher = make()
    batcher.close()
    batcher.close()
    await asyncio.wait_for(batcher.wait_idle(), 5)


async def test_wait_idle_returns_when_every_submission_has_ended(model: FakeModel, make: Any) -> None:
    """Not before, whether they run, wait or were cancelled."""
    batcher = make()
    await asyncio.wait_for(batcher.wait_idle(), 5)
    running = await plugged(model, batcher)
    gone = submitter(batcher)(1)
    idle = asyncio.create_task(batcher.wait_idle())
    gone.cancel()
    await asyncio.sleep(0.01)
    assert not idle.done()
    model.open_gate()
    await asyncio.wait_for(idle, 5)
    assert running.done()


async def test_a_cancelled_run_in_progress_is_idle_at_once(model: FakeModel, make: Any) -> None:
    """Nobody waits for its answer any more; the worker goes on to the next one."""
    batcher = make()
    running = await plugged(model, batcher)
    running.cancel()
    await asyncio.wait_for(batcher.wait_idle(), 5)
    model.open_gate()
    assert doubled(await submitter(batcher)(1)) == [2]


async def test_each_run_is_recorded(model: FakeModel, make: Any) -> None:
    """Rows, seconds, and how long each piece had waited."""
    now = [0.0]
    records: list[RunRecord] = []
    batcher = make(clock=lambda: now[0], on_run=records.append)
    plug = await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(1), submit(2, 3)]
    now[0] = 2.0
    model.open_gate()
    await asyncio.gather(plug, *futures)
    assert [record.rows for record in records] == [1, 3]
    assert records[1].waits == [2.0, 2.0]


async def test_who_asks_is_told_of_each_run_before_the_outcome(model: FakeModel, make: Any) -> None:
    """Of the runs that their rows were in, with everybody's rows; of one that was halved once."""
    now = [0.0]
    batcher = make(clock=lambda: now[0], max_rows=3)
    plug = await plugged(model, batcher)
    heard: list[tuple[Run, bool]] = []

    def told(run: Run) -> None:
        heard.append((run, future.done()))

    submit = submitter(batcher)
    now[0] = 1.0
    future = submit(1, 2, 3, 4, told=told)
    other = submit(5)
    now[0] = 3.0
    model.poison = {2.0}
    model.open_gate()
    await asyncio.gather(plug, future, other)
    assert heard == [(Run(3, 1.0, 3.0, 0.0, 0.0), False), (Run(2, 1.0, 3.0, 0.0, 0.0), False)]


async def test_the_arrays_of_answered_rows_are_let_go(model: FakeModel, make: Any) -> None:
    """An idle batcher holds no caller's memory."""
    model.runs.clear()
    batcher = make()
    await submitter(batcher)(*range(20))
    await asyncio.to_thread(lambda: None)
    gc.collect()
    assert batcher.waiting_rows == 0
    assert not batcher._levels
    assert not batcher._unfinished


# ---- bytes, sizes, room ----------------------------------------------------------------------------------------------


async def test_admission_is_refused_when_what_waits_has_too_many_bytes(model: FakeModel, make: Any) -> None:
    """Rows of 40 bytes; the sentence names the key. Who leaves makes room, and an empty queue takes anything."""
    batcher = make(queue_bytes=100, max_rows=1)
    await plugged(model, batcher)
    submit = submitter(batcher)
    first = submit(1, 2, width=10)
    with pytest.raises(Overloaded, match=r"80 bytes wait .* limit is 100 \(engine\.queue_size\)"):
        submit(3, width=10)
    small = submit(4, width=5)
    first.cancel()
    await asyncio.sleep(0)
    second = submit(5, 6, width=10)
    model.open_gate()
    assert doubled(await small) == [8]
    assert doubled(await second) == [10, 12]
    assert doubled(await submit(*range(9), width=10)) == [2.0 * i for i in range(9)]


@pytest.mark.parametrize(("width", "sizes"), [(10, [2, 2, 1]), (25, [1] * 5), (1000, [1] * 5), (1, [5])])
async def test_a_run_has_no_more_bytes_than_it_may(model: FakeModel, make: Any, width: int, sizes: list[int]) -> None:
    """A row that is larger runs by itself: somebody waits for it."""
    outcome = await submitter(make(max_bytes=100))(*range(5), width=width)
    assert doubled(outcome) == [2.0 * i for i in range(5)]
    assert [len(run) for run in model.runs] == sizes


@pytest.mark.parametrize("limit", [{"max_rows": 13}, {"max_rows": 64, "max_bytes": 13 * 4}])
async def test_only_given_sizes_are_seen_by_the_model(model: FakeModel, make: Any, limit: dict[str, int]) -> None:
    """Whatever waits, and whichever bound holds: graphs and profiles are recorded for these sizes only."""
    batcher = make(sizes=(2, 4, 8, 16), **limit)
    submit = submitter(batcher)
    for count in (1, 3, 7, 12, 30):
        assert doubled(await submit(*range(count))) == [2.0 * i for i in range(count)]
    assert {shape["x"][0] for shape in model.shapes} == {2, 4, 8}


async def test_after_a_while_a_larger_size_is_tried_again(model: FakeModel, make: Any) -> None:
    """Whoever took the device's memory may have gone. Never beyond what the model was given at first."""
    now = [0.0]
    model.room = 4
    batcher = make(max_rows=16, clock=lambda: now[0])
    submit = submitter(batcher)
    await submit(*range(16))
    assert batcher.max_rows == 4
    model.room = None
    for step, size in enumerate([4, 8, 16, 16]):
        await submit(*range(40))
        assert max(len(run) for run in model.runs[-2:]) == size, step
        now[0] += 61
    assert batcher.max_rows == 16


async def test_sizes_that_do_not_fit_are_tried_ever_more_rarely(model: FakeModel, make: Any) -> None:
    """A trial costs a failed run; at last there is one an hour, and every row is answered all the same."""
    now = [0.0]
    model.room = 4
    batcher = make(max_rows=8, clock=lambda: now[0])
    submit = submitter(batcher)
    trials: list[float] = []
    while now[0] < 30_000:
        model.runs.clear()
        assert doubled(await submit(*range(8))) == [2.0 * i for i in range(8)]
        if any(len(run) == 8 for run in model.runs):
            trials.append(now[0])
        now[0] += 20
    waits = [after - before for before, after in itertools.pairwise(trials)]
    assert waits == sorted(waits)
    assert waits[0] == 60
    assert waits[-1] == 3600
    assert len(trials) < 16
    for room, size in ((None, 8), (4, 4)):  # it fits once, and no more: that is no old story
        model.room = room
        now[0] += 3600
        await submit(*range(8))
        assert batcher.max_rows == size
    now[0] += 61
    await submit(*range(8))
    assert len(model.runs[-3]) == 8


# ---- priorities ------------------------------------------------------------------------------------------------------


async def test_a_higher_priority_goes_first(model: FakeModel, make: Any) -> None:
    """Whoever came first, whose turn it is and whose deadline is nearest; what room is left is for the others."""
    batcher = make(max_rows=3)
    await plugged(model, batcher)
    submit = submitter(batcher)
    soon = time.monotonic() + 60
    futures = [
        submit(1, 2, principal="low", priority=-1, deadline=soon),
        submit(3, 4, principal="normal"),
        submit(5, 6, principal="high", priority=1),
    ]
    model.open_gate()
    await asyncio.gather(*futures)
    assert model.runs[1:] == [[5, 6, 3], [4, 1, 2]]


async def test_a_higher_priority_chooses_the_shape(model: FakeModel, make: Any) -> None:
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(1, width=1), submit(2, width=2, priority=1), submit(3, width=3, priority=-1)]
    model.open_gate()
    await asyncio.gather(*futures)
    assert model.runs[1:] == [[2], [1], [3]]


@pytest.mark.parametrize("width", [1, 2])
async def test_a_lower_priority_is_passed_over_for_eight_runs_at_most(model: FakeModel, make: Any, width: int) -> None:
    """Of its own shape or another one, however much of the higher one waits; then again after as many runs."""
    batcher = make(max_rows=2, queue_rows=1000)
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(*range(100, 300), principal="high", priority=1)]
    futures += [submit(1, 2, 3, 4, principal="low", width=width)]
    model.open_gate()
    await asyncio.gather(*futures)
    assert [number for number, run in enumerate(model.runs) if run[0] < 100] == [0, AGE + 1, 2 * AGE + 2]


async def test_of_three_priorities_none_starves(model: FakeModel, make: Any) -> None:
    """Both lower ones are due in the end; the second one waits for one run more."""
    batcher = make(max_rows=1, queue_rows=1000)
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(*[2] * 60, priority=2), submit(*[1] * 9, priority=1), submit(*[-1] * 9, priority=-1)]
    model.open_gate()
    await asyncio.gather(*futures)
    order = [run[0] for run in model.runs[1:]]
    for priority in (1.0, -1.0):
        places = [-1, *(place for place, value in enumerate(order) if value == priority)]
        assert max(after - before for before, after in itertools.pairwise(places)) <= AGE + 2


# ---- quarantine ------------------------------------------------------------------------------------------------------


class Log:
    """Marks: which rows are in a run now, and whether they ever were."""

    def __init__(self) -> None:
        self.now: list[int] = []
        self.ever: set[int] = set()
        self.spans: list[tuple[int, int]] = []

    def running(self, start: int, count: int) -> None:
        assert not set(self.now) & set(range(start, start + count))
        self.spans.append((start, count))
        self.now += range(start, start + count)
        self.ever |= set(self.now)

    def idle(self, start: int, count: int) -> None:
        for row in range(start, start + count):
            self.now.remove(row)


async def test_rows_in_quarantine_share_a_run_with_nobody(model: FakeModel, make: Any) -> None:
    """One row a run, though rows of the same shape wait."""
    batcher = make()
    await plugged(model, batcher)
    submit = submitter(batcher)
    futures = [submit(1), submit(2, 3, alone=True), submit(4), submit(5, alone=True, principal="bob")]
    model.open_gate()
    assert [doubled(outcome) for outcome in await asyncio.gather(*futures)] == [[2], [4, 6], [8], [10]]
    assert sorted(model.runs[1:]) == [[1, 4], [2], [3], [5]]


async def test_rows_in_quarantine_are_let_in_though_the_queue_is_full(model: FakeModel, make: Any) -> None:
    """They were accepted before the crash: nothing accepted is lost."""
    batcher = make(queue_rows=1)
    await plugged(model, batcher)
    submit = submitter(batcher)
    first, crashed = submit(1), submit(2, 3, alone=True)
    model.open_gate()
    assert doubled(await first) == [2]
    assert doubled(await crashed) == [4, 6]


async def test_while_a_row_in_quarantine_runs_nothing_else_in_the_engine_does(model: FakeModel, make: Any) -> None:
    """No other model's run either: a second crash is that row's doing."""
    other = FakeModel()
    shared = RunGate()
    batcher, neighbour = make(gate=shared), make(model=other, gate=shared)
    model.gated = other.gated = True
    running = submitter(neighbour)(1)
    await other.entered()
    crashed = submitter(batcher)(2, alone=True)
    await eventually_async(lambda: shared.shut)
    assert model.runs == []
    waiting = submitter(neighbour)(3)
    other.open_gate()
    assert doubled(await running) == [2]
    await model.entered()
    assert other.runs == [[1]]
    model.open_gate()
    assert doubled(await crashed) == [4]
    assert doubled(await waiting) == [6]


async def test_who_waits_to_be_let_in_is_no_run_that_cannot_be_ended(
    model: FakeModel, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its callers may leave; the row never runs, and the model goes on."""
    monkeypatch.setattr("appliance.engine.batcher._LOOK_S", 0.001)
    monkeypatch.setattr("appliance.engine.batcher._DEAF_S", 0.002)
    shared = RunGate()
    batcher = make(gate=shared)
    looks = []
    look = batcher._end_runs_for_nobody
    monkeypatch.setattr(batcher, "_end_runs_for_nobody", lambda: looks.append(look()))
    assert doubled(await submitter(batcher)(9)) == [18]
    await asyncio.to_thread(shared.enter, True)
    gone = submitter(batcher)(1)
    await eventually_async(lambda: batcher.waiting_rows == 0)
    gone.cancel()
    seen = len(looks)
    await eventually_async(lambda: len(looks) > seen + 20)
    assert batcher.death is None
    shared.leave(True)
    assert doubled(await submitter(batcher)(2)) == [4]
    assert model.runs == [[9], [2]]
    assert not model.terminated


async def test_marks_are_told_of_each_run_and_each_part_of_a_failed_one(model: FakeModel, make: Any) -> None:
    """Rows of its own submission, by their place in it, and none of them is left in the end."""
    batcher = make(max_rows=6)
    await plugged(model, batcher)
    submit = submitter(batcher)
    first, second, gone = Log(), Log(), Log()
    model.poison = {4.0}
    futures = [submit(1, 2, marks=first), submit(3, 4, 5, 6, 7, marks=second)]
    cancelled = submit(8, marks=gone)
    cancelled.cancel()
    during: list[tuple[list[int], list[int]]] = []
    compute = model.compute
    model.compute = lambda name, x: (during.append((first.now[:], second.now[:])), compute(name, x))[1]  # type: ignore[method-assign]
    model.open_gate()
    await asyncio.gather(*futures)
    assert first.now == second.now == gone.now == []
    assert gone.ever == set()
    assert first.spans == [(0, 2), (0, 2)]
    assert second.spans == [(0, 4), (0, 1), (1, 3), (1, 1), (2, 2), (4, 1)]
    assert during == [([], []), ([0, 1], [0]), ([], [2, 3]), ([], [4])]


# ---- several workers -------------------------------------------------------------------------------------------------


class Parallel(FakeModel):
    """Runs wait, each on its own thread, until they are let go by their value, or told to end."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.inside: dict[int, list[float]] = {}
        self.most = 0
        self.free: set[float] = set()
        self.deaf: set[float] = set()
        self.ended: set[int] = set()
        self.killers: dict[float, BaseException] = {}

    def terminate(self, thread: int | None = None) -> None:
        assert thread is not None
        self.ended.add(thread)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        thread = threading.get_ident()
        values = feeds["x"][:, 0].tolist()
        with self.lock:
            self.ended.discard(thread)
            self.inside[thread] = values
            self.most = max(self.most, len(self.inside))
        try:
            eventually(lambda: set(values) <= self.free or (thread in self.ended and not self.deaf & set(values)))
        finally:
            with self.lock:
                del self.inside[thread]
        for value in values:
            if value in self.killers:
                raise self.killers[value]
        if not set(values) <= self.free:
            raise InferenceFailed("The model failed on this input.", detail="terminated")
        return super().run(outputs, feeds)

    def running(self) -> list[list[float]]:
        """The values of the runs in progress."""
        with self.lock:
            return sorted(self.inside.values())


async def test_idle_workers_share_what_waits(make: Any) -> None:
    """Each has a core of its own: eight rows are four runs of two at once, not one of eight."""
    model = Parallel()
    batcher = make(model=model, parallel=4)
    future = submitter(batcher)(*range(8))
    await eventually_async(lambda: len(model.running()) == 4)
    assert model.running() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    model.free = set(range(8))
    assert doubled(await future) == [2.0 * i for i in range(8)]


async def test_busy_workers_get_full_runs(make: Any) -> None:
    """What queued while they ran."""
    model = Parallel()
    batcher = make(model=model, parallel=2, max_rows=4)
    submit = submitter(batcher)
    first = [submit(1), submit(2)]
    await eventually_async(lambda: model.running() == [[1], [2]])
    second = submit(*range(10, 18))
    model.free |= {1}
    await eventually_async(lambda: model.running() == [[2], [10, 11, 12, 13]])
    model.free |= {2, *range(10, 18)}
    await asyncio.gather(*first, second)
    assert [14, 15, 16, 17] in model.runs


async def test_on_a_shared_device_a_second_run_begins_only_when_it_is_full(make: Any) -> None:
    """A small one would make the first one slower and gain nothing; what waits goes when the first one is over."""
    model = Parallel()
    batcher = make(model=model, parallel=2, spread=False, max_rows=4)
    submit = submitter(batcher)
    first = submit(1)
    await eventually_async(lambda: model.running() == [[1]])
    second = submit(2, 3)
    third = submit(4, 5)
    await eventually_async(lambda: len(model.running()) == 2)
    assert model.running() == [[1], [2, 3, 4, 5]]
    fourth = submit(6)
    model.free |= {1}
    assert doubled(await first) == [2]
    assert model.running() == [[2, 3, 4, 5]]
    assert batcher.waiting_rows == 1
    model.free |= set(range(10))
    await asyncio.gather(second, third, fourth)
    assert model.most == 2
    assert model.runs == [[1], [2, 3, 4, 5], [6]]


async def test_a_run_that_its_bytes_make_full_begins_beside_another(make: Any) -> None:
    model = Parallel()
    batcher = make(model=model, parallel=2, spread=False, max_rows=64, max_bytes=8)
    submit = submitter(batcher)
    futures = [submit(1)]
    await eventually_async(lambda: model.running() == [[1]])
    futures.append(submit(2, 3, 4))
    await eventually_async(lambda: model.running() == [[1], [2, 3]])
    model.free = {1, 2, 3, 4}
    await asyncio.gather(*futures)


async def test_only_the_run_that_nobody_waits_for_is_ended(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbour of the same model, on another thread, is answered."""
    monkeypatch.setattr("appliance.engine.batcher._LOOK_S", 0.01)
    model = Parallel()
    batcher = make(model=model, parallel=2)
    submit = submitter(batcher)
    gone, stays = submit(1), submit(2)
    await eventually_async(lambda: model.running() == [[1], [2]])
    gone.cancel()
    await eventually_async(lambda: model.running() == [[2]])
    model.free = {2}
    assert doubled(await stays) == [4]
    assert batcher.death is None


async def test_the_death_of_one_worker_answers_everybody(make: Any) -> None:
    """Who runs beside it, too; and the others end, also one that had nothing to do. It is told once."""
    model = Parallel()
    reasons: list[str] = []
    batcher = make(model=model, parallel=3, on_death=reasons.append)
    submit = submitter(batcher)
    futures = [submit(1), submit(2)]
    await eventually_async(lambda: model.running() == [[1], [2]])
    model.killers = {1: SystemExit(3), 2: SystemExit(4)}
    model.free = {1}
    for future in futures:
        with pytest.raises(InferenceFailed):
            await asyncio.wait_for(future, 5)
    assert reasons == ["SystemExit(3)"]
    model.free = {2}
    await eventually_async(lambda: not any(worker.thread.is_alive() for worker in batcher._workers))
    await asyncio.sleep(0)
    assert reasons == ["SystemExit(3)"]


async def test_one_deaf_run_makes_the_model_not_ready(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.engine.batcher._LOOK_S", 0.01)
    monkeypatch.setattr("appliance.engine.batcher._DEAF_S", 0.02)
    model = Parallel()
    model.deaf = {1.0}
    batcher = make(model=model, parallel=2)
    submit = submitter(batcher)
    gone, waits = submit(1), submit(2)
    await eventually_async(lambda: len(model.running()) == 2)
    gone.cancel()
    with pytest.raises(InferenceFailed):
        await asyncio.wait_for(waits, 5)
    assert batcher.death == "a run cannot be ended"
    model.free = {1, 2}


async def test_close_lets_all_workers_finish_and_end(make: Any) -> None:
    """What runs is answered, what waits is told to try elsewhere."""
    model = Parallel()
    batcher = make(model=model, parallel=3, max_rows=1)
    submit = submitter(batcher)
    futures = [submit(value) for value in range(3)]
    await eventually_async(lambda: len(model.running()) == 3)
    waiting = submit(9)
    batcher.close()
    with pytest.raises(Draining):
        await waiting
    assert not batcher.at_rest
    model.free = {0, 1, 2}
    assert [doubled(outcome) for outcome in await asyncio.gather(*futures)] == [[0], [2], [4]]
    await asyncio.wait_for(batcher.wait_idle(), 5)
    await eventually_async(lambda: not any(worker.thread.is_alive() for worker in batcher._workers))


# ---- any order of events ---------------------------------------------------------------------------------------------

_event = st.one_of(
    st.tuples(
        st.just("submit"),
        st.integers(1, 12),  # rows
        st.sampled_from(["ada", "bob", "eve"]),
        st.sampled_from([1, 2]),  # width
        st.booleans(),  # deadline already over
        st.integers(0, 20),  # which row is poisoned, if it has that many
        st.integers(-1, 1),  # priority
        st.booleans(),  # alone
    ),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("turn")),
    st.tuples(st.just("room"), st.sampled_from([1, 2, 3, None])),
)


@given(
    events=st.lists(_event, max_size=40),
    max_rows=st.integers(1, 9),
    mode=st.sampled_from(["rows", "separate", "pad"]),
    parallel=st.sampled_from([1, 2, 4]),
    spread=st.booleans(),
    end=st.sampled_from(["wait", "close", "crash"]),
)
@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
def test_every_accepted_submission_ends_exactly_once(
    events: Any, max_rows: int, mode: str, parallel: int, spread: bool, end: str
) -> None:
    """With its own rows' values or an error that belongs to it, whatever the interleaving."""
    sizes = powers_of_two(max_rows) if mode == "pad" else ()
    settings = {"max_rows": max_rows, "separate": mode == "separate", "sizes": sizes}
    asyncio.run(_play(events, {**settings, "parallel": parallel, "spread": spread}, end))


class Watched(FakeModel):
    """Sees to it that a row that is to be alone is alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alone: set[float] = set()
        self.broken: list[str] = []
        self._inside: list[list[float]] = []

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        values = feeds["x"][:, 0].tolist()
        self._inside.append(values)
        if len(set(values)) > 1 and self.alone & set(values):
            self.broken.append(f"{values} share a run")
        try:
            results = super().run(outputs, feeds)
            present = self._inside[:]
            if len(present) > 1 and any(self.alone & set(others) for others in present):
                self.broken.append(f"at once: {present}")
            return results
        finally:
            self._inside.remove(values)


async def _play(events: Any, configuration: dict[str, Any], end: str) -> None:
    model = Watched()
    batcher = Batcher(model, queue_rows=40, **configuration)
    accepted: list[tuple[asyncio.Future[Any], list[float], set[int], bool, Log]] = []
    endings: list[int] = []
    value = 0.0
    for event in events:
        if event[0] == "submit":
            _, count, principal, width, late, bad, priority, alone = event
            values = [value + i for i in range(count)]
            value += count
            deadline = time.monotonic() + (-1 if late else 60)
            poisoned = {bad} if bad < count else set()
            model.poison |= {values[i] for i in poisoned}
            model.alone |= set(values) if alone else set()
            marks = Log()
            more = {"priority": priority, "alone": alone, "marks": marks}
            try:
                future = batcher.submit(rows(*values, width=width), ("double",), deadline, principal, **more)
            except Overloaded:
                assert not alone
                continue
            number = len(accepted)
            future.add_done_callback(lambda _, number=number: endings.append(number))
            accepted.append((future, values, poisoned, late, marks))
        elif event[0] == "cancel" and accepted:
            accepted[event[1] % len(accepted)][0].cancel()
        elif event[0] == "room":
            model.room = event[1]
        else:
            await asyncio.sleep(0)
    if end == "close":
        batcher.close()
    elif end == "crash":
        model.crash = SystemExit("worker killed")
    await asyncio.wait_for(batcher.wait_idle(), 10)
    await asyncio.sleep(0)
    assert sorted(endings) == list(range(len(accepted)))
    for future, values, poisoned, late, marks in accepted:
        if future.cancelled():
            continue
        error = future.exception()
        if error is not None:
            assert isinstance(error, (DeadlineExceeded if late else ()) or (Draining, InferenceFailed)) or (
                late and isinstance(error, Draining | InferenceFailed)
            )
            assert late or end != "wait"
            continue
        assert not late
        assert marks.ever == set(range(len(values)))
        outcome = future.result()
        if end != "crash":
            assert set(outcome.errors) == poisoned
        for row, own in enumerate(values):
            if row not in outcome.errors:
                assert outcome.arrays["double"][row].tolist() == [2 * own] * outcome.arrays["double"].shape[1]
    batcher.close()
    for worker in batcher._workers:
        await asyncio.to_thread(worker.thread.join, 5)
        assert not worker.thread.is_alive()
    assert all(marks.now == [] for *_, marks in accepted)
    assert not model.broken
    assert (batcher.waiting_rows, batcher._waiting_bytes, batcher._busy) == (0, 0, 0) or batcher.death is not None


# ---- runs that do not end --------------------------------------------------------------------------------------------


async def test_a_run_that_nobody_waits_for_is_ended_and_the_next_one_answered(
    model: FakeModel, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its callers' deadlines are over, or they went away; their neighbours in the queue must not wait for ever."""
    monkeypatch.setattr("appliance.engine.batcher._LOOK_S", 0.01)
    batcher = make()
    plug = await plugged(model, batcher)
    model.gated = False
    waiting = submitter(batcher)(1)
    model.gated = True
    plug.cancel()
    with pytest.raises(asyncio.CancelledError):
        await plug
    await eventually_async(lambda: model.terminated > 0)
    model.crash, model.gated = None, False
    assert batcher.death is None
    model.open_gate()
    assert doubled(await asyncio.wait_for(waiting, 5)) == [2]


async def test_a_run_that_does_not_obey_makes_the_model_not_ready(
    model: FakeModel, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody who waits is answered, and the model says why it cannot go on."""
    monkeypatch.setattr("appliance.engine.batcher._LOOK_S", 0.01)
    monkeypatch.setattr("appliance.engine.batcher._DEAF_S", 0.02)
    model.obeys = False
    batcher = make()
    plug = await plugged(model, batcher)
    waiting = submitter(batcher)(1)
    plug.cancel()
    with pytest.raises(InferenceFailed):
        await asyncio.wait_for(waiting, 5)
    assert batcher.death == "a run cannot be ended"
    model.open_gate()


async def test_a_run_that_somebody_waits_for_is_let_be(
    model: FakeModel, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.batcher._LOOK_S", 0.001)
    batcher = make()
    looks = []
    look = batcher._end_runs_for_nobody
    monkeypatch.setattr(batcher, "_end_runs_for_nobody", lambda: looks.append(look()))
    plug = await plugged(model, batcher)
    await eventually_async(lambda: len(looks) > 3)
    assert not model.terminated
    model.open_gate()
    assert doubled(await plug) == [-2]
