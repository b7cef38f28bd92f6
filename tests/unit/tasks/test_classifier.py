"""Classifiers: select → min_value → sort by value, descending → cut; a row of nonsense is an error of its own."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.catalog.sections import ImageInput, ScoresOutput
from appliance.core.errors import InferenceFailed
from appliance.core.types import ConceptScores, PredictOptions
from appliance.engine import plan
from appliance.tasks.base import ImageSide
from appliance.tasks.classifier import Classifier, softmax


def classifier(wrapped: bool = True, activation: Any = "none") -> Classifier:
    """On pictures of one pixel."""
    side = ImageSide(ImageInput(input="image", size=(1, 1)), wrapped)
    return Classifier(side, ScoresOutput(output="scores", activation=activation), wrapped, 20)


def top(*rows: Any) -> dict[str, Any]:
    """What the wrapped graph's TopK gives for these scores."""
    scores = np.array(rows, np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :200]
    return {plan.TOP_VALUES: np.take_along_axis(scores, order, axis=1), plan.TOP_INDICES: order}


def full(*rows: Any) -> dict[str, Any]:
    """What the wrapped graph gives when concepts are selected."""
    return {plan.SCORES: np.array(rows, np.float32)}


def encoded(arrays: Any, **options: Any) -> list[tuple[int, float]]:
    """The first row's answer."""
    chosen = PredictOptions(**options)
    answer = classifier().encode(arrays, len(next(iter(arrays.values()))), chosen)[0]
    assert isinstance(answer, ConceptScores)
    return list(zip(answer.indices.tolist(), answer.values.tolist(), strict=True))


SCORES = (0.125, 0.5, 0.25, 0.0625, 0.0625)


def test_concepts_come_best_first() -> None:
    """With their places in the model's list."""
    assert encoded(top(SCORES)) == [(1, 0.5), (2, 0.25), (0, 0.125), (3, 0.0625), (4, 0.0625)]


@pytest.mark.parametrize("count", [1, 2, 5, 20, 200])
def test_no_more_than_max_concepts_are_returned(count: int) -> None:
    """The best ones."""
    assert encoded(top(SCORES), max_concepts=count) == encoded(top(SCORES))[:count]


@pytest.mark.parametrize(("least", "count"), [(0.0, 5), (0.0625, 5), (0.07, 3), (0.25, 2), (0.5, 1), (0.51, 0)])
def test_min_value_keeps_what_is_equal(least: float, count: int) -> None:
    """≥, not >; nothing may be left."""
    assert len(encoded(top(SCORES), min_value=np.float32(least))) == count


def test_without_min_value_negative_scores_pass() -> None:
    """0 means no filter, and a model without an activation may say anything."""
    assert encoded(top([-1.0, 0.5, -2.0])) == [(1, 0.5), (0, -1.0), (2, -2.0)]


def test_min_value_is_compared_in_single_precision() -> None:
    """0.6 arrives as 0.60000002384, and so is the score of a model that says 0.6."""
    exact = np.float32(0.6)
    assert float(exact) > 0.6
    below = np.nextafter(exact, np.float32(0))
    for arrays in (top([exact, below]), full([exact, below])):
        selected = (0, 1) if plan.SCORES in arrays else None
        assert [i for i, _ in encoded(arrays, min_value=exact, selected=selected)] == [0]


def test_selected_concepts_are_cut_after_selecting() -> None:
    """The best of the selected ones, not the selected ones of the best."""
    assert encoded(full(SCORES), selected=(0, 3), max_concepts=1) == [(0, 0.125)]
    assert encoded(full(SCORES), selected=(3, 0)) == [(0, 0.125), (3, 0.0625)]


def test_min_value_holds_for_selected_concepts_too() -> None:
    """Select first, then min_value."""
    assert encoded(full(SCORES), selected=(0, 3), min_value=np.float32(0.1)) == [(0, 0.125)]


@pytest.mark.parametrize("selected", [None, (0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (3, 1, 4, 0, 2)])
def test_equal_scores_keep_the_order_of_the_concepts(selected: tuple[int, ...] | None) -> None:
    """However the caller selected them."""
    arrays = top([0.5] * 5) if selected is None else full([0.5] * 5)
    assert [index for index, _ in encoded(arrays, selected=selected)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("selected", [None, (0, 1, 2)])
def test_a_row_that_is_not_finite_fails_alone(bad: float, place: int, selected: Any) -> None:
    """Wherever the bad score stands, also beyond the cut; its neighbours are answered."""
    row = [0.1, 0.2, 0.3]
    row[place] = bad
    arrays = (top if selected is None else full)([0.5, 0.25, 0.125], row, [0.125, 0.25, 0.5])
    first, second, third = classifier().encode(arrays, 3, PredictOptions(max_concepts=1, selected=selected))
    assert isinstance(first, ConceptScores)
    assert first.indices.tolist() == [0]
    assert isinstance(second, InferenceFailed)
    assert isinstance(third, ConceptScores)
    assert third.indices.tolist() == [2]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("tail", [(), (1, 1)])
def test_a_raw_plan_is_activated_on_the_host(activation: str, dtype: Any, tail: Any) -> None:
    """As the wrapped graph would have done."""
    logits = np.array([[0.5, -1.5, 2.0], [3.0, 3.0, -3.0]], dtype).reshape(2, 3, *tail)
    answers = classifier(False, activation).encode({"scores": logits}, 2, PredictOptions())
    values = logits.reshape(2, 3).astype(np.float64)
    wanted = {
        "softmax": np.exp(values) / np.exp(values).sum(axis=1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-values)),
        "none": values,
    }[activation]
    for answer, row in zip(answers, wanted, strict=True):
        assert isinstance(answer, ConceptScores)
        np.testing.assert_allclose(answer.values, np.sort(row)[::-1], atol=1e-6)
        np.testing.assert_allclose(row[list(answer.indices)], answer.values, atol=1e-6)


def test_a_double_that_single_precision_cannot_hold_fails_alone() -> None:
    """Without a warning that nobody reads."""
    arrays = {"scores": np.array([[1e300, 0.0], [1.0, 0.0]], np.float64)}
    first, second = classifier(False, "none").encode(arrays, 2, PredictOptions())
    assert isinstance(first, InferenceFailed)
    assert isinstance(second, ConceptScores)


def test_the_full_vector_is_asked_for_only_when_concepts_are_selected() -> None:
    """It is the larger one."""
    task = classifier()
    assert task.outputs(PredictOptions()) == (plan.TOP_VALUES, plan.TOP_INDICES)
    assert task.outputs(PredictOptions(selected=(1,))) == (plan.SCORES,)
    assert classifier(False).outputs(PredictOptions()) == ("scores",)
    assert task.compared() == (plan.SCORES,)
    assert classifier(False).compared() == ("scores",)


@given(st.lists(st.lists(st.floats(-200, 200, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_softmax_sums_to_one(logits: list[list[float]]) -> None:
    """For any finite logits."""
    result = softmax(np.array(logits, np.float32))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.sum(axis=1), 1, atol=1e-5)
    assert (result >= 0).all()


@given(
    scores=st.lists(st.integers(0, 6).map(lambda n: n / 8), min_size=1, max_size=30),
    count=st.integers(1, 30),
    least=st.integers(0, 7).map(lambda n: n / 8),
    seed=st.randoms(use_true_random=False),
)
def test_the_cut_equals_its_definition(scores: list[float], count: int, least: float, seed: Any) -> None:
    """Both ways through the graph give the same, and what a plain sort gives."""
    selected = tuple(seed.sample(range(len(scores)), seed.randint(1, len(scores))))
    options = {"max_concepts": count, "min_value": np.float32(least)}

    def wanted(chosen: Any) -> list[tuple[int, float]]:
        kept = [(i, scores[i]) for i in sorted(chosen) if scores[i] >= least]
        return sorted(kept, key=lambda pair: -pair[1])[:count]

    assert encoded(top(scores), **options) == wanted(range(len(scores)))
    assert encoded(full(scores), selected=selected, **options) == wanted(selected)
