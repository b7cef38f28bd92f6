"""Embedders: one float32 vector a row, of length 1 if the bundle says so."""

from typing import Any

import numpy as np
import pytest

from appliance.catalog.sections import EmbeddingOutput, ImageInput
from appliance.core.errors import InferenceFailed
from appliance.core.types import Embedding, PredictOptions
from appliance.engine import plan
from appliance.tasks.base import ImageSide
from appliance.tasks.embedder import Embedder


def vectors(array: Any, normalize: bool, wrapped: bool = False) -> list[Any]:
    """The answers of an embedder to these arrays."""
    side = ImageSide(ImageInput(input="image", size=(1, 1)), True)
    task = Embedder(side, EmbeddingOutput(output="embedding", normalize=normalize), wrapped)
    (name,) = task.outputs(PredictOptions())
    assert name == (plan.EMBEDDING if wrapped else "embedding")
    return list(task.encode({name: array}, len(array), PredictOptions()))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("tail", [(), (1, 1)])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_vector_is_given_as_it_is(dtype: Any, tail: Any, wrapped: bool) -> None:
    """As float32, flat."""
    array = np.array([[3, 4], [0, -2]], dtype).reshape(2, 2, *tail)
    answers = vectors(array, False, wrapped)
    assert all(isinstance(answer, Embedding) and answer.vector.dtype == np.float32 for answer in answers)
    assert [answer.vector.tolist() for answer in answers] == [[3, 4], [0, -2]]


def test_normalised_vectors_have_length_one() -> None:
    """Each by its own length; a zero vector stays zero."""
    answers = vectors(np.array([[3, 4], [0, 0], [0, -2]], np.float32), True)
    np.testing.assert_allclose([a.vector for a in answers], [[0.6, 0.8], [0, 0], [0, -1]], atol=1e-7)
    assert answers[0].vector.dtype == np.float32


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e25, 3e37])
def test_very_small_and_large_vectors_are_normalised_too(scale: float) -> None:
    """Their squares are out of single precision's range."""
    (answer,) = vectors(np.array([[3 * scale, 4 * scale]], np.float32), True)
    np.testing.assert_allclose(answer.vector, [0.6, 0.8], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_that_is_not_finite_fails_alone(bad: float, normalize: bool) -> None:
    """Its neighbours are answered."""
    first, second, third = vectors(np.array([[0, 1], [bad, 1], [1, 0]], np.float32), normalize)
    assert first.vector.tolist() == [0, 1]
    assert isinstance(second, InferenceFailed)
    assert third.vector.tolist() == [1, 0]
