"""A servable answers every input in its place; a bad one hurts nobody, and nothing is left behind."""

import asyncio
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import graphs, pictures
from support.engine_graphs import loaded, pixel_model, write_pixels

from appliance.core.config import Limits
from appliance.core.errors import (
    BundleInvalid,
    DeadlineExceeded,
    Draining,
    InferenceFailed,
    InputTooLarge,
    InvalidInput,
    Overloaded,
    UnsupportedFormat,
)
from appliance.core.memory import MemoryBudget
from appliance.core.types import ConceptScores, Embedding, Payload, PredictOptions, Tensors
from appliance.engine import probes
from appliance.engine.batcher import Outcome
from appliance.tasks.servable import PREDICT, DecodePool, Offer, Servable, Ticket

LIMITS = Limits()
OPTIONS = PredictOptions()


def picture(seed: int) -> Payload:
    """A PNG of noise, 8 × 8."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Payload(image=pictures.png(pixels))


class HeldModel:
    """A loaded model whose answers come when the test says so."""

    death: str | None = None

    def __init__(self, model: Any, refuse_after: int | None = None) -> None:
        self.batching, self.inputs, self.outputs = model.batching, model.inputs, model.outputs
        self.futures: list[asyncio.Future[Outcome]] = []
        self.asked: list[tuple[Any, ...]] = []
        self._refuse_after = refuse_after

    def join(self, rows: Any) -> Any:
        return probes.join(rows)

    def submit(
        self, feeds: Any, outputs: Any, deadline: Any, principal: Any, *, priority: int, told: Any
    ) -> "asyncio.Future[Outcome]":
        if self._refuse_after is not None and len(self.futures) >= self._refuse_after:
            raise Overloaded("full")
        self.futures.append(asyncio.get_running_loop().create_future())
        self.asked.append((feeds, tuple(outputs), deadline, principal, priority))
        return self.futures[-1]

    def close(self) -> None:
        pass


def hold(servable: Servable, refuse_after: int | None = None) -> HeldModel:
    """Put a held model in place of the servable's own."""
    held = HeldModel(servable.model, refuse_after)
    servable.model.close()
    servable.model = held  # type: ignore[assignment]
    servable.offers[PREDICT] = Offer(servable.task, servable.model)
    servable.models = (servable.model,)
    return held


# ---- answers ---------------------------------------------------------------------------------------------------------


async def test_every_input_is_answered_in_its_place(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """Good ones with a result, bad ones with their own error, errors that came in as they were."""
    servable = await load(graphs.write_image_classifier(tmp_path / "b"))
    passed = UnsupportedFormat("found out before")
    payloads = [
        picture(0),
        Payload(image=b"not a picture"),
        Payload(text="hello"),
        picture(1),
        passed,
        Payload(image=pictures.bomb()),
        Payload(image=pictures.truncated(pictures.png(), 0.7)),
        Payload(image=b""),
        picture(2),
    ]
    answers = await servable.predict(payloads, OPTIONS, ticket, LIMITS)
    kinds = [type(answer) for answer in answers]
    assert kinds[0] is kinds[3] is kinds[8] is ConceptScores
    assert answers[4] is passed
    assert kinds[1] is kinds[6] is UnsupportedFormat
    assert kinds[2] is kinds[7] is InvalidInput
    assert kinds[5] is InputTooLarge
    alone = [(await servable.predict([payloads[i]], OPTIONS, ticket, LIMITS))[0] for i in (0, 3, 8)]
    for index, single in zip((0, 3, 8), alone, strict=True):
        np.testing.assert_array_equal(answers[index].indices, single.indices)
        np.testing.assert_allclose(answers[index].values, single.values, atol=1e-6)


@pytest.mark.parametrize("kind", ["image", "text", "embedder", "pooled"])
async def test_an_answer_is_the_same_alone_and_in_any_batch(
    tmp_path: Path, load: Any, ticket: Ticket, kind: str
) -> None:
    """Texts of all lengths, so of several shapes, and many requests at once."""
    words = " ".join(graphs.WORDS)
    write = {
        "image": lambda: write_pixels(tmp_path / "b", pixel_model(30), concepts=30),
        "text": lambda: graphs.write_text_classifier(tmp_path / "b", max_tokens=40),
        "embedder": lambda: graphs.write_image_embedder(tmp_path / "b", normalize=True),
        "pooled": lambda: graphs.write_text_embedder(tmp_path / "b", max_tokens=40),
    }
    servable = await load(write[kind]())
    payloads = (
        [picture(seed) for seed in range(24)]
        if kind in ("image", "embedder")
        else [Payload(text=" ".join((words * 3).split()[seed : seed + 1 + 3 * seed])) for seed in range(24)]
    )

    def numbers(answer: Any) -> list[float]:
        if isinstance(answer, Embedding):
            return answer.vector.tolist()
        return [value for _, value in sorted(zip(answer.indices, answer.values, strict=True))]

    alone = [numbers((await servable.predict([p], OPTIONS, ticket, LIMITS))[0]) for p in payloads]
    together = await servable.predict(payloads, OPTIONS, ticket, LIMITS)
    mixed = await asyncio.gather(
        *(servable.predict(payloads[start : start + 5], OPTIONS, ticket, LIMITS) for start in range(0, 20, 5))
    )
    for index, wanted in enumerate(alone):
        np.testing.assert_allclose(numbers(together[index]), wanted, atol=1e-5)
        if index < 20:
            np.testing.assert_allclose(numbers(mixed[index // 5][index % 5]), wanted, atol=1e-5)


async def test_only_the_row_that_fails_is_an_error(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """Black pictures make this graph say NaN."""
    servable = await load(graphs.write_image_classifier(tmp_path / "b", model=graphs.nan_classifier_model()))
    black = Payload(image=pictures.png(np.zeros((8, 8, 3), np.uint8)))
    answers = await servable.predict([picture(0), black, picture(1)], OPTIONS, ticket, LIMITS)
    assert [type(answer) for answer in answers] == [ConceptScores, InferenceFailed, ConceptScores]


@pytest.mark.parametrize("plan", ["wrapped", "raw"])
async def test_a_raw_plan_serves_the_same_answers(tmp_path: Path, load: Any, ticket: Ticket, plan: str) -> None:
    """Through the whole of it, selected concepts too, against NumPy."""
    servable = await load(graphs.write_image_classifier(tmp_path / "b", plan=plan))
    pixels = pictures.rgb_pixels(8, 8)
    weight, bias = graphs.classifier_weights(3, 3)
    logits = (pixels / 255).mean(axis=(0, 1)) @ weight + bias
    wanted = np.exp(logits) / np.exp(logits).sum()
    payload = Payload(image=pictures.png(pixels))
    (answer,) = await servable.predict([payload], OPTIONS, ticket, LIMITS)
    np.testing.assert_allclose(wanted[list(answer.indices)], answer.values, atol=1e-5)
    assert list(answer.values) == sorted(answer.values, reverse=True)
    (two,) = await servable.predict([payload], PredictOptions(selected=(2, 0)), ticket, LIMITS)
    assert set(two.indices) == {0, 2}
    np.testing.assert_allclose(wanted[list(two.indices)], two.values, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "arrays", "answer"),
    [
        (graphs.identity_model(), {"": np.float32([1, 2, 3])}, {"y": [1, 2, 3]}),
        (graphs.identity_model(), {"x": np.float32([[1, 2, 3]])}, {"y": [[1, 2, 3]]}),
        (graphs.identity_model(), {"": np.float32([[1, 2, 3], [4, 5, 6]])}, {"y": [[1, 2, 3], [4, 5, 6]]}),
        (
            graphs.two_in_two_out_model(),
            {"a": np.float32([1, 2]), "b": np.float32([3, 4])},
            {"sum": [4, 6], "product": [3, 8]},
        ),
        (graphs.no_batch_axis_model(), {"": np.float32([1, 2, 3])}, {"y": 6}),
        (graphs.fixed_batch_model(), {"": np.float32([[1, 2, 3]])}, {"y": [[2, 4, 6]]}),
        (graphs.batch_mean_model(), {"": np.float32([[1, 2, 3], [4, 5, 6]])}, {"y": [[0, 0, 0], [0, 0, 0]]}),
    ],
    ids=["row", "batch of one", "batch", "two", "scalar out", "fixed batch", "separate"],
)
async def test_tensors_of_all_shapes(
    tmp_path: Path, load: Any, ticket: Ticket, model: Any, arrays: Any, answer: Any
) -> None:
    """A row is answered by a row, a batch by a batch."""
    servable = await load(graphs.write_raw(tmp_path / "b", model))
    (result,) = await servable.predict([Payload(arrays=arrays)], OPTIONS, ticket, LIMITS)
    assert isinstance(result, Tensors)
    assert {name: array.tolist() for name, array in result.arrays.items()} == answer


async def test_tensors_of_several_inputs_are_answered_each_by_its_own(
    tmp_path: Path, load: Any, ticket: Ticket
) -> None:
    """Rows, batches and bad ones beside each other."""
    servable = await load(graphs.write_raw(tmp_path / "b"))
    payloads = [
        Payload(arrays={"": np.float32([1, 2, 3])}),
        Payload(arrays={"": np.ones((5, 3), np.float32)}),
        Payload(arrays={"": np.ones((5, 4), np.float32)}),
        Payload(arrays={"": np.float32([4, 5, 6])}),
    ]
    answers = await servable.predict(payloads, OPTIONS, ticket, LIMITS)
    assert answers[0].arrays["y"].tolist() == [1, 2, 3]
    assert answers[1].arrays["y"].shape == (5, 3)
    assert isinstance(answers[2], InvalidInput)
    assert answers[3].arrays["y"].tolist() == [4, 5, 6]


async def test_a_batch_of_tensors_with_a_bad_row_is_one_error(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """One input is answered as a whole, its neighbour as well."""
    servable = await load(graphs.write_raw(tmp_path / "b", graphs.gather_model()))
    payloads = [Payload(arrays={"": np.array(rows)}) for rows in ([[1], [5000]], [[3], [4]])]
    bad, good = await servable.predict(payloads, OPTIONS, ticket, LIMITS)
    assert isinstance(bad, InferenceFailed)
    assert good.arrays["y"].tolist() == [[3], [4]]


# ---- memory ----------------------------------------------------------------------------------------------------------


async def test_what_decoding_needs_is_reserved(tmp_path: Path, load: Any, ticket: Ticket, budget: MemoryBudget) -> None:
    """Pixels of the largest pictures that are decoded at once, the rows, the answers; released with the request."""
    servable = await load(graphs.write_image_classifier(tmp_path / "b"))
    large = pictures.png(np.zeros((600, 500, 3), np.uint8))
    payloads = [Payload(image=large), picture(0), Payload(image=large), Payload(image=large)]
    await servable.predict(payloads, OPTIONS, ticket, LIMITS)
    values_and_indices = 4 * 3 * (4 + 8)
    assert budget.used == 2 * 600 * 500 * 4 + 4 * 8 * 8 * 3 + values_and_indices
    ticket.memory.release()
    assert budget.used == 0


async def test_a_request_over_the_budget_is_refused_before_it_is_decoded(tmp_path: Path, load: Any) -> None:
    """As a whole: it may be tried later."""
    servable = await load(graphs.write_image_classifier(tmp_path / "b"))
    held = hold(servable)
    budget = MemoryBudget(1000)
    large = Payload(image=pictures.png(np.zeros((600, 500, 3), np.uint8)))
    with budget.hold(0) as memory, pytest.raises(Overloaded, match=r"limits\.memory_in_flight"):
        await servable.predict([large], OPTIONS, Ticket("ada", None, memory), LIMITS)
    assert budget.used == 0
    assert held.asked == []


# ---- the way out -----------------------------------------------------------------------------------------------------


def many_texts() -> Sequence[Payload]:
    """Of two shapes, so that there are two submissions."""
    return [Payload(text="good"), Payload(text="good " * 20)]


async def test_cancelling_takes_the_rows_out_of_the_queue(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """All of the request's submissions."""
    servable = await load(graphs.write_text_classifier(tmp_path / "b"))
    held = hold(servable)
    task = asyncio.create_task(servable.predict(many_texts(), OPTIONS, ticket, LIMITS))
    while len(held.futures) < 2 and not task.done():  # noqa: ASYNC110
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(future.cancelled() for future in held.futures)


async def test_when_one_part_is_refused_the_others_are_cancelled(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """Nobody would read their answers."""
    servable = await load(graphs.write_text_classifier(tmp_path / "b"))
    held = hold(servable, refuse_after=1)
    with pytest.raises(Overloaded):
        await servable.predict(many_texts(), OPTIONS, ticket, LIMITS)
    assert [future.cancelled() for future in held.futures] == [True]


async def test_when_all_parts_fail_none_is_left_unread(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """asyncio complains of errors that nobody looked at; here they are all the same one."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    servable = await load(graphs.write_text_classifier(tmp_path / "b"))
    held = hold(servable)
    task = asyncio.create_task(servable.predict(many_texts(), OPTIONS, ticket, LIMITS))
    while len(held.futures) < 2 and not task.done():  # noqa: ASYNC110
        await asyncio.sleep(0)
    for future in held.futures:
        future.set_exception(Draining())
    with pytest.raises(Draining):
        await task
    held.futures.clear()
    del task, future
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_deadline_principal_and_priority_reach_the_queue(tmp_path: Path, load: Any, budget: MemoryBudget) -> None:
    """The batcher needs them; an expired request is refused there."""
    servable = await load(graphs.write_text_classifier(tmp_path / "b"))
    with pytest.raises(DeadlineExceeded):
        await servable.predict(many_texts(), OPTIONS, Ticket("ada", time.monotonic() - 1, budget.hold(0)), LIMITS)
    held = hold(servable)
    ticket = Ticket("bob", 12.5, budget.hold(0), priority=1)
    task = asyncio.create_task(servable.predict(many_texts(), OPTIONS, ticket, LIMITS))
    while len(held.futures) < 2 and not task.done():  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert {asked[2:] for asked in held.asked} == {(12.5, "bob", 1)}
    task.cancel()


async def test_a_model_that_died_is_a_problem(tmp_path: Path, load: Any) -> None:
    """Which is how the catalog learns of it."""
    servable = await load(graphs.write_raw(tmp_path / "b"))
    assert servable.problem is None
    hold(servable).death = "SystemExit(3)"
    assert servable.problem == "SystemExit(3)"


async def test_drain_waits_for_what_was_accepted(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """Then close lets it go, and later requests are told to try elsewhere."""
    servable = await load(graphs.write_raw(tmp_path / "b", graphs.slow_model(4, 64)))
    payload = Payload(arrays={"": np.ones((20, 64), np.float32)})
    task = asyncio.create_task(servable.predict([payload], OPTIONS, ticket, LIMITS))
    await asyncio.sleep(0)
    await asyncio.wait_for(servable.drain(), 10)
    servable.close()
    (answer,) = await task
    assert isinstance(answer, Tensors)
    with pytest.raises(Draining):
        await servable.predict([payload], OPTIONS, ticket, LIMITS)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["wrapped", "raw"])
async def test_concepts_that_do_not_fit_the_scores_are_refused(tmp_path: Path, plan: str) -> None:
    """With both numbers."""
    folder = write_pixels(tmp_path / "b", pixel_model(5), concepts=4, plan=plan)
    with pytest.raises(BundleInvalid, match=r"5.*4 concepts; list one( concept)? for each score"):
        await loaded(folder)


@pytest.mark.parametrize("plan", ["wrapped", "raw"])
async def test_concepts_without_names_are_numbered(tmp_path: Path, load: Any, plan: str) -> None:
    """The graph says how many."""
    servable = await load(write_pixels(tmp_path / "b", pixel_model(5), concepts=0, plan=plan))
    assert [concept.id for concept in servable.concepts] == ["0", "1", "2", "3", "4"]


async def test_a_graph_input_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The tokenizer's names are not the graph's."""
    folder = graphs.write_text_classifier(tmp_path / "b")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("max_tokens: 32", "max_tokens: 32\n    inputs: {ids: tokens}"))
    with pytest.raises(BundleInvalid, match=r"input_ids|tokens"):
        await loaded(folder)


async def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    """With the path where it should be."""
    folder = graphs.write_text_classifier(tmp_path / "b")
    (folder / "1" / "tokenizer.json").unlink()
    with pytest.raises(BundleInvalid, match=r"tokenizer\.json is missing"):
        await loaded(folder)


# ---- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 128])
@pytest.mark.parametrize("small", [True, False])
async def test_the_pool_keeps_the_order(count: int, small: bool) -> None:
    """However the work is shared out."""
    pool = DecodePool(3)
    payloads = [Payload(text=str(number)) for number in range(count)]
    assert await pool.map(lambda payload: payload.text, payloads, small) == [str(number) for number in range(count)]
    pool.close()
