"""A front and an engine over stream and slab: every submission ends once, whatever becomes of the engine."""

import asyncio
import gc
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import graphs
from support.engine_graphs import engine, planned
from support.fake_model import WAIT_S, FakeModel

from appliance.core.channel import pair
from appliance.core.errors import DeadlineExceeded, Draining, InferenceFailed, Overloaded
from appliance.core.shared import Segment
from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine import link
from appliance.engine.batcher import Batcher, Outcome
from appliance.engine.remote import EngineLink, RemoteModel, describe
from appliance.engine.server import FrontLink
from appliance.engine.session import Device, TensorSpec
from appliance.engine.slab import FrontSlab, Slab
from appliance.engine.transport import Batching, LoadRequest
from appliance.engine.worker import LocalModel
from appliance.tasks.tensors import RawTensors


class Hosted:
    """A fake model behind a batcher, as an engine's process has it; `LoadedModel`."""

    providers = ("CPUExecutionProvider",)
    device = Device("cpu")
    death = None

    def __init__(self, model: FakeModel, mode: str = "rows", max_rows: int = 8, queue_rows: int = 1000) -> None:
        self.model = model
        self.batcher = Batcher(
            model, max_rows=max_rows, queue_rows=queue_rows, separate=mode == "separate", whole=mode == "whole"
        )
        spec = TensorSpec("x", np.dtype(np.float32), (None, None))
        self.inputs, self.outputs = (spec,), (spec,)
        self.batching = Batching(mode, max_rows)

    @property
    def waiting_rows(self) -> int:
        return self.batcher.waiting_rows

    def prompt(self, rows: int) -> bool:
        return False

    def submit(self, *arguments: Any, **more: Any) -> "asyncio.Future[Outcome]":
        return self.batcher.submit(*arguments, **more)


class World:
    """One front and its engine; the engine can be killed and replaced.

    Attributes:
        fake: the model that the engine runs; a replacement has a new one.
        model: the front's side of it.
    """

    def __init__(self, order: int = 20, queue_rows: int = 1000, hosted: Callable[[FakeModel], Any] = Hosted) -> None:
        self._hosted = hosted
        self.segment = Segment.create("slab", Slab.size_for(order))
        self.slab = FrontSlab(self.segment)
        self.link = EngineLink(self.slab, queue_rows)
        self._old: list[FakeModel] = []
        self.start()
        self.model = RemoteModel(self.link, 1, describe(self.models[1]))
        self.model.available()

    def start(self) -> None:
        """An engine is there, with the model as handle 1."""
        self.fake = FakeModel()
        self.models: dict[int, Any] = {1: self._hosted(self.fake)}
        ours, theirs = pair()
        self.front = FrontLink(theirs, Slab(Segment.attach(os.dup(self.segment.descriptor))), self.models)
        self.link.connect(ours)

    async def kill(self, *running: tuple["asyncio.Future[Outcome]", int, int]) -> None:
        """The engine dies. Args: running: submissions with the rows of them that were in its run."""
        marks = {}
        for future, first, count in running:
            number = next(n for n, p in self.link._pending.items() if p.waiter is future)
            marks[self.link._pending[number].slot] = (first + 1) << 32 | count
        self._old.append(self.fake)
        # As the kernel does when a process ends: nothing is answered, the stream is closed, the marks stay.
        self.front._stream._out.clear()
        self.front._stream.close()
        self.front._slab.marks = np.zeros_like(self.slab.marks)  # its threads go on here, and would write into ours
        for slot, mark in marks.items():
            self.slab.marks[slot] = mark
        await until(lambda: not self.link.up)

    def replace(self) -> None:
        """Another engine takes its place, and has loaded the model."""
        self.start()
        self.model.available()

    def submit(
        self, *values: float, outputs: Sequence[str] = ("double",), deadline: float | None = None, width: int = 1
    ) -> "asyncio.Future[Outcome]":
        feeds = self.model.join([rows(value, width=width) for value in values])
        return self.model.submit(feeds, outputs, deadline, "ada")

    def close(self) -> None:
        for fake in (*self._old, self.fake):
            fake.open_gate()
        for model in self.models.values():
            if isinstance(model, Hosted):
                model.batcher.close()
        self.front.close()
        self.link.close(Draining())


def rows(*values: float, width: int = 1) -> dict[str, Array]:
    """One row a value."""
    return {"x": np.repeat(np.array(values, np.float32)[:, None], width, axis=1)}


async def until(condition: Callable[[], object]) -> None:
    """Return when it is true."""
    end = time.monotonic() + WAIT_S
    while not condition():  # what is waited for has no event
        assert time.monotonic() < end, "it never came to be"
        await asyncio.sleep(0.001)


def firsts(outcome: Outcome, name: str = "double") -> list[float]:
    """The first number of every row."""
    return outcome.arrays[name][:, 0].tolist()


@pytest.fixture
async def world() -> Any:
    made = World()
    yield made
    made.close()
    assert not made.slab.blocks.used, "a block was not given back"
    assert len(made.slab.slots) == len(set(made.slab.slots)) == len(made.slab.marks) - 1
    assert not made.slab.marks.any()


async def test_rows_of_several_inputs_are_one_submission(world: World) -> None:
    """They are put together in the slab, and answered in their order."""
    assert firsts(await world.submit(1, 2, 3)) == [2, 4, 6]


async def test_answers_go_to_those_who_asked(world: World) -> None:
    """Many at once, of several shapes and outputs."""
    futures = [world.submit(n, n + 1, outputs=("next", "double"), width=1 + n % 3) for n in range(60)]
    for n, outcome in enumerate(await asyncio.gather(*futures)):
        assert firsts(outcome) == [2 * n, 2 * n + 2]
        assert firsts(outcome, "next") == [n + 1, n + 2]
        assert outcome.arrays["next"].shape == (2, 1 + n % 3)


@pytest.mark.parametrize("width", [1, link.INLINE // 4 // 2, link.INLINE // 4, 20_000])
async def test_long_results_come_through_the_slab(world: World, width: int) -> None:
    """Short ones in the stream; who asks sees no difference, and memory is free again afterwards."""
    outcome = await world.submit(1, 2, width=width)
    np.testing.assert_array_equal(outcome.arrays["double"], np.repeat([[2.0], [4.0]], width, axis=1))
    outcome.arrays["double"][...] = 0  # it is ours


async def test_a_result_without_room_is_refused(world: World) -> None:
    """Its neighbours are answered."""

    class Wide(FakeModel):
        def compute(self, name: str, x: Array) -> Array:
            return np.repeat(x, 1 << 19, axis=1)

    world.models[1].batcher._model = Wide()
    with pytest.raises(Overloaded, match="No block"):
        await world.submit(1)
    world.models[1].batcher._model = world.fake
    assert firsts(await world.submit(1)) == [2]


async def test_rows_that_find_no_room_are_refused() -> None:
    """Before anything of them is sent; what was taken is free again."""
    world = World(order=12)
    with pytest.raises(Overloaded, match=r"No block of 8000 bytes|No block of 8"):
        world.submit(1, width=2000)
    world.close()


async def test_more_rows_than_may_wait_are_refused() -> None:
    """Here already, so that a dead engine does not gather them."""
    world = World(queue_rows=3)
    world.fake.gated = True
    waiting = [world.submit(1, 2), world.submit(3)]
    with pytest.raises(Overloaded, match=r"engine\.queue_rows"):
        world.submit(4)
    world.fake.open_gate()
    await asyncio.gather(*waiting)
    world.close()


async def test_the_engine_s_refusal_is_the_caller_s(world: World) -> None:
    """Whatever the batcher says."""
    world.models[1].batcher.close()
    with pytest.raises(Draining):
        await world.submit(1)


async def test_failed_rows_are_told_by_their_places(world: World) -> None:
    """And their neighbours' answers come with them."""
    world.fake.poison = {2.0}
    outcome = await world.submit(1, 2, 3)
    assert list(outcome.errors) == [1]
    assert isinstance(outcome.errors[1], InferenceFailed)
    assert outcome.errors[1].detail == "poison"
    assert (firsts(outcome)[0], firsts(outcome)[2]) == (2, 6)


async def test_all_rows_failing_is_an_outcome_without_arrays(world: World) -> None:
    """Each has its error."""
    world.fake.poison = {1.0, 2.0}
    outcome = await world.submit(1, 2)
    assert (list(outcome.arrays), sorted(outcome.errors)) == ([], [0, 1])


async def test_a_cancelled_submission_leaves_the_queue(world: World) -> None:
    """And its memory is free when no run reads it any more."""
    world.fake.gated = True
    first = world.submit(1)
    await world.fake.entered()
    second = world.submit(2)
    await until(lambda: world.models[1].waiting_rows)
    first.cancel()
    second.cancel()
    await until(lambda: len(world.link._leaving) == 1)  # the one in the run
    assert world.slab.blocks.used
    world.fake.open_gate()
    await until(lambda: not world.slab.blocks.used)
    assert world.fake.runs == [[1]]


async def test_rows_cancelled_in_a_run_are_free_when_it_is_over(world: World) -> None:
    """Not only when the model's next batch comes."""
    world.fake.gated = True
    future = world.submit(1)
    await world.fake.entered()
    future.cancel()
    await until(lambda: world.link._leaving)
    world.fake.open_gate()
    await until(lambda: not world.slab.blocks.used)


async def test_a_deadline_passes_also_when_the_engine_is_silent(world: World) -> None:
    """It may be stopped, or gone."""
    world.fake.gated = True
    late = world.submit(1, deadline=time.monotonic() + 0.05)
    with pytest.raises(DeadlineExceeded):
        await late
    world.fake.open_gate()


async def test_a_front_that_is_gone_takes_its_submissions_with_it(world: World) -> None:
    """The engine does not run what nobody waits for."""
    world.fake.gated = True
    futures = [world.submit(n) for n in range(3)]
    await world.fake.entered()
    world.link._stream.close()  # type: ignore[union-attr]
    await until(lambda: not world.models[1].waiting_rows)
    world.fake.open_gate()
    for future in futures:
        future.cancel()
    world.link._lost()


async def test_a_front_that_is_gone_leaves_nothing_mapped(world: World) -> None:
    """Its slab's memory is the system's at once: an engine at rest does not look for cycles for a long time."""
    assert firsts(await world.submit(1)) == [2]
    cancelled = world.submit(2)
    cancelled.cancel()
    await until(lambda: not world.slab.blocks.used)
    slab = weakref.ref(world.front._slab)
    gc.disable()
    try:
        world.link._stream.close()  # type: ignore[union-attr]
        await until(lambda: world.front._stream.closed)
        del world.front
        await until(lambda: slab() is None)
    finally:
        gc.enable()
        world.start()
        world.model.available()


async def test_rows_given_up_before_they_are_submitted_are_free_again(world: World) -> None:
    """Whoever joined them was cancelled in between."""
    joined = world.model.join([rows(1), rows(2)])
    assert world.slab.blocks.used
    del joined
    world.slab.blocks.give_back(world.slab.take(1))
    assert not world.slab.blocks.used


async def test_who_asks_is_told_of_the_runs_of_its_rows(world: World) -> None:
    """As the engine saw them, by the clock that both have, and before the outcome; nobody else is."""
    begun = time.monotonic()
    heard: list[tuple[Run, bool]] = []
    kinds: list[int] = []
    received = world.link._receive

    def receive(kind: int, body: memoryview) -> None:
        kinds.append(kind)
        received(kind, body)

    assert world.link._stream is not None
    world.link._stream._receive = receive
    await world.submit(0)
    assert link.RAN not in kinds

    def told(run: Run) -> None:
        heard.append((run, future.done()))

    feeds = world.model.join([rows(float(n)) for n in range(10)])  # a run has eight at most
    future = world.model.submit(feeds, ("double",), None, "ada", told=told)
    await future
    assert sorted(run.rows for run, _ in heard) == [2, 8]
    assert not any(done for _, done in heard)
    for run, _ in heard:
        assert begun <= run.queued_at <= run.taken_at <= time.monotonic()
        assert 0 <= run.batch_wait + run.compute <= time.monotonic() - begun


# ---- engines that die ----


async def test_queued_rows_are_replayed(world: World) -> None:
    """The engine that takes the dead one's place answers them; nobody notices."""
    world.fake.gated = True
    futures = [world.submit(n, n + 1) for n in range(5)]
    await until(lambda: world.models[1].waiting_rows)
    await world.kill()
    world.replace()
    assert [firsts(outcome) for outcome in await asyncio.gather(*futures)] == [[2 * n, 2 * n + 2] for n in range(5)]


async def test_rows_that_come_while_there_is_no_engine_wait_for_one(world: World) -> None:
    """Also for a model that is not loaded again yet."""
    await world.kill()
    future = world.submit(1)
    assert not world.model.prompt(1)
    world.start()
    await asyncio.sleep(0.01)
    assert not world.fake.runs
    world.model.available()
    assert firsts(await future) == [2]


async def test_runs_of_the_next_engine_are_told(world: World) -> None:
    """What the dead one ran, nobody knows; each row of it has a run of its own now."""
    heard: list[Run] = []
    world.fake.gated = True
    feeds = world.model.join([rows(1.0), rows(2.0)])
    future = world.model.submit(feeds, ("double",), None, "ada", told=heard.append)
    await world.fake.entered()
    await world.kill((future, 0, 2))
    world.replace()
    assert firsts(await future) == [2, 4]
    assert [run.rows for run in heard] == [1, 1]


async def test_rows_of_the_run_that_crashed_are_replayed_one_by_one(world: World) -> None:
    """Each in a run of its own; the others of the submission go as they went before."""
    world.fake.gated = True
    future = world.submit(0, 1, 2, 3, 4, 5)
    await world.fake.entered()
    await world.kill((future, 2, 3))
    world.replace()
    assert firsts(await future) == [0, 2, 4, 6, 8, 10]
    assert all([value] in world.fake.runs for value in (2.0, 3.0, 4.0))
    assert all(value not in run or len(run) == 1 for run in world.fake.runs for value in (2.0, 3.0, 4.0))


async def test_a_row_that_crashes_a_second_engine_is_answered_with_an_error(world: World) -> None:
    """And its neighbours with their results."""
    world.fake.gated = True
    future = world.submit(0, 1, 2)
    other = world.submit(9)
    await world.fake.entered()
    await world.kill((future, 0, 3))
    world.start()
    world.fake.gated = True
    world.model.available()
    await world.fake.entered()
    alone = [run for run in world.fake.runs if run != [9]]
    if not alone:  # the other one was quicker
        world.fake.let_go()
        await world.fake.entered()
        alone = [run for run in world.fake.runs if run != [9]]
    await world.kill()
    world.replace()
    outcome = await future
    ((crashed,),) = alone
    assert list(outcome.errors) == [int(crashed)]
    assert "crashed on this input, twice" in str(outcome.errors[int(crashed)])
    assert all(firsts(outcome)[row] == 2 * row for row in range(3) if row != crashed)
    assert firsts(await other) == [18]


async def test_a_single_row_that_crashes_twice_fails(world: World) -> None:
    """Alone: that is an outcome too, so that other submissions of its request are answered."""
    world.fake.gated = True
    future = world.submit(1)
    for _ in range(2):
        await world.fake.entered()
        await world.kill((future, 0, 1))
        world.start()
        world.fake.gated = True
        world.model.available()
    outcome = await future
    assert not outcome.arrays
    assert "twice" in str(outcome.errors[0])


async def test_a_caller_who_leaves_takes_the_parts_of_a_crashed_submission_along(world: World) -> None:
    """They would be run for nobody, each of them with the whole engine for itself."""
    world.fake.gated = True
    future = world.submit(0, 1, 2)
    await world.fake.entered()
    await world.kill((future, 0, 3))
    future.cancel()
    await until(lambda: not world.slab.blocks.used)
    world.replace()
    assert firsts(await world.submit(7)) == [14]
    assert world.fake.runs == [[7]]


async def test_a_mark_that_cannot_be_is_not_believed(world: World) -> None:
    """Whatever the dead wrote, every row is run once, and none that is not there."""
    world.fake.gated = True
    future = world.submit(0, 1, 2)
    await world.fake.entered()
    await world.kill((future, 1000, 5))
    assert world.model.waiting_rows == 3
    world.replace()
    assert firsts(await future) == [0, 2, 4]


async def test_word_of_a_model_in_a_dead_engine_is_not_of_the_next_one(world: World) -> None:
    """The engine before this one had loaded it, and we hear of that late: it is not asked for what it lacks."""
    await world.kill()
    world.model.available()
    world.start()
    await asyncio.sleep(0.01)
    models, world.models = dict(world.models), world.models
    world.models.clear()  # this one is still loading it
    future = world.submit(1)
    await asyncio.sleep(0.01)
    assert not future.done()
    world.models.update(models)
    world.model.available()
    assert firsts(await future) == [2]


async def test_a_run_that_outlives_its_submission_leaves_the_marks_alone(world: World) -> None:
    """Its place there is another submission's then."""
    world.fake.gated = True
    first, second = world.submit(1), world.submit(2)
    await world.fake.entered()
    (number, *_) = world.front._submissions
    marks = world.front._submissions[number].marks
    slot = world.link._pending[number].slot
    world.front._submissions[number].set_exception(Draining())
    with pytest.raises(Draining):
        await first
    marks.idle(0, 1)
    assert world.slab.marks[slot] == 0
    world.slab.marks[slot] = 1 << 32 | 1
    marks.running(0, 1)
    marks.idle(0, 1)
    assert world.slab.marks[slot] == 1 << 32 | 1
    world.slab.marks[slot] = 0
    world.fake.open_gate()
    assert firsts(await second) == [4]


async def test_a_model_that_is_given_up_answers_who_waits(world: World) -> None:
    """And refuses who comes."""
    world.fake.gated = True
    future = world.submit(1)
    await world.kill()
    world.model.give_up("it crashed too often")
    with pytest.raises(InferenceFailed, match="cannot run any more"):
        await future
    with pytest.raises(InferenceFailed) as caught:
        world.submit(2)
    assert caught.value.detail == "it crashed too often"


async def test_cancelled_while_there_is_no_engine(world: World) -> None:
    """Nobody looks at its rows, so that they are free at once."""
    await world.kill()
    future = world.submit(1)
    future.cancel()
    await until(lambda: not world.slab.blocks.used)


async def test_the_dead_engine_s_last_words_count(world: World) -> None:
    """What it answered before it died is not computed again."""
    future = world.submit(1)
    await until(lambda: world.fake.runs)
    await until(future.done)
    await world.kill()
    world.replace()
    assert firsts(await future) == [2]
    assert not world.fake.runs


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_everybody_is_answered_once(seed: int) -> None:
    """Submissions of all sizes, cancellations, and engines that die at any moment with any rows in their run."""
    dice = np.random.default_rng(seed)
    world = World(order=27)
    asked: list[tuple[list[float], asyncio.Future[Outcome]]] = []
    for step in range(120):
        values = [float(v) for v in dice.integers(0, 1000, dice.integers(1, 12))]
        width = int(dice.choice([1, 3, 9000]))
        if world.link.up or world.model.waiting_rows < 500:
            asked.append((values, world.submit(*values, width=width)))
        if dice.random() < 0.1:
            dice.choice(np.array([future for _, future in asked], object)).cancel()
        if dice.random() < 0.3:
            await asyncio.sleep(0)
        if dice.random() < 0.05 and world.link.up:
            pending = [p for p in world.link._pending.values() if isinstance(p.waiter, asyncio.Future) and not p.alone]
            crashed = [(p.waiter, 0, int(dice.integers(1, p.count + 1))) for p in pending[:2]]
            await world.kill(*crashed)  # type: ignore[arg-type]
        if not world.link.up and dice.random() < 0.5:
            world.replace()
        assert step < 120
    if not world.link.up:
        world.replace()
    for values, future in asked:
        if future.cancelled():
            continue
        outcome = await asyncio.wait_for(future, WAIT_S)
        assert all("twice" in str(error) for error in outcome.errors.values())
        wanted = [(row, 2 * value) for row, value in enumerate(values) if row not in outcome.errors]
        assert [(row, firsts(outcome)[row]) for row, _ in wanted] == wanted
    await until(lambda: not world.slab.blocks.used)
    assert not world.link._pending
    assert not world.link._leaving
    assert not world.model.waiting_rows
    world.close()


# ---- real graphs ----


async def test_a_real_graph_answers_as_it_does_here(tmp_path: Path) -> None:
    """Specs, mode and answers are those of the process that loaded it."""
    folder = graphs.write_raw(tmp_path / "b", graphs.identity_model())
    plan = planned(folder)[3]
    task = RawTensors(plan.inputs, plan.outputs)
    names = task.compared()
    local: LocalModel = await engine().load(LoadRequest(("raw", "1"), plan, None, names, names, 8, task.examples()))
    world = World(hosted=lambda fake: local)
    remote = world.model
    assert (remote.inputs, remote.outputs, remote.device) == (local.inputs, local.outputs, local.device)
    assert (remote.providers, remote.batching) == (local.providers, local.batching)
    values = np.random.default_rng(0).random((30, 3), np.float32)
    outcome = await remote.submit({"x": values}, ("y",), None, "ada")
    np.testing.assert_array_equal(outcome.arrays["y"], values)

    class Told:
        """Waits as a quick call does."""

        def __init__(self) -> None:
            self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def done(self) -> bool:
            return self.outcome.done()

        def set_result(self, outcome: Outcome, /) -> None:
            self.outcome.set_result(outcome)

        def set_exception(self, error: BaseException, /) -> None:
            self.outcome.set_exception(error)

        def cancel(self) -> None: ...

        def add_done_callback(self, callback: Callable[[object], object], /) -> None: ...

    if remote.prompt(1):
        waiter = Told()
        feeds: Mapping[str, Array] = {"x": values[:1]}
        remote.submit_prompt(waiter, feeds, ("y",), 1, None, "ada")
        np.testing.assert_array_equal((await waiter.outcome).arrays["y"], values[:1])
    world.close()
    local.close()
