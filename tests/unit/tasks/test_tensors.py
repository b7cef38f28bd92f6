"""Raw tensors: a graph's own inputs and outputs, one row or many, in its own dtypes."""

from typing import Any

import numpy as np
import pytest

from appliance.core.config import Limits
from appliance.core.errors import BundleInvalid, InvalidInput
from appliance.core.types import FieldType, Payload, PredictOptions, Tensors
from appliance.engine.session import TensorSpec
from appliance.tasks.tensors import RawTensors

LIMITS = Limits()


def spec(name: str, dtype: Any, *shape: int | None) -> TensorSpec:
    """A graph's input or output."""
    return TensorSpec(name, None if dtype is None else np.dtype(dtype), shape)


def task(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (spec("y", np.float32, None, 3),)) -> RawTensors:
    """One input `x` float32 (?, 3) unless told otherwise."""
    return RawTensors(inputs or (spec("x", np.float32, None, 3),), outputs)


def payload(**arrays: Any) -> Payload:
    """`_` is the array without a name."""
    return Payload(arrays={name.strip("_"): np.asarray(array) for name, array in arrays.items()})


def refusal(wanted: RawTensors, given: Payload) -> str:
    """The sentence with which the payload is refused."""
    try:
        wanted.cost(given, LIMITS)
        wanted.decode(given)
    except InvalidInput as error:
        return str(error)
    pytest.fail("it was taken")


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_", "x"])
def test_one_axis_fewer_is_a_single_row(name: str) -> None:
    """And is answered as such."""
    decoded = task().decode(payload(**{name: np.float32([1, 2, 3])}))
    assert decoded.feeds["x"].tolist() == [[1, 2, 3]]
    assert (decoded.rows, decoded.squeeze) == (1, True)


@pytest.mark.parametrize("rows", [1, 4])
def test_all_axes_are_a_batch(rows: int) -> None:
    """Also of one."""
    decoded = task().decode(payload(_=np.ones((rows, 3), np.float32)))
    assert (decoded.rows, decoded.squeeze) == (rows, False)


@pytest.mark.parametrize("shape", [(), (2,), (4, 2), (4, 3, 1), (4, 4)])
def test_another_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    """What came and what is needed."""
    text = refusal(task(), payload(_=np.ones(shape, np.float32)))
    assert text.startswith(f"The array 'x' has shape {[1, *shape] if len(shape) == 1 else list(shape)}; ")
    assert "float32 (?, 3) is needed" in text


def test_no_rows_are_refused() -> None:
    """There is nothing to answer."""
    assert "at least one" in refusal(task(), payload(_=np.ones((0, 3), np.float32)))


def test_inputs_must_have_equally_many_rows() -> None:
    """One row beside a batch is a contradiction."""
    two = task(spec("a", np.float32, None, 2), spec("b", np.float32, None, 2))
    assert "[1, 3] rows" in refusal(two, payload(a=np.ones((3, 2), np.float32), b=np.ones(2, np.float32)))
    decoded = two.decode(payload(a=np.ones((3, 2), np.float32), b=np.ones((3, 2), np.float32)))
    assert decoded.rows == 3


def test_a_graph_without_a_batch_axis_takes_what_it_says() -> None:
    """Nothing is added to it, nothing taken away."""
    fixed = task(spec("x", np.float32, 3), outputs=(spec("y", np.float32),))
    assert not fixed.batched
    decoded = fixed.decode(payload(_=np.float32([1, 2, 3])))
    assert (decoded.feeds["x"].shape, decoded.rows, decoded.squeeze) == ((3,), 1, False)
    assert "shape [1, 3]" in refusal(fixed, payload(_=np.ones((1, 3), np.float32)))


def test_a_scalar_input_is_a_scalar() -> None:
    """For graphs with parameters."""
    mixed = task(spec("x", np.float32, None, 3), spec("threshold", np.float32))
    assert not mixed.batched
    decoded = mixed.decode(payload(x=np.ones((4, 3), np.float32), threshold=np.float32(0.5)))
    assert (decoded.feeds["threshold"].shape, decoded.rows) == ((), 1)


def test_dynamic_axes_take_any_length() -> None:
    """Beside the batch too."""
    wide = task(spec("x", np.float32, None, None, 3))
    assert wide.decode(payload(_=np.ones((7, 3), np.float32))).feeds["x"].shape == (1, 7, 3)
    assert wide.examples() == []


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_missing_array_is_named() -> None:
    """With what to do."""
    two = task(spec("a", np.float32, None, 2), spec("b", np.float32, None, 2))
    text = refusal(two, payload(a=np.ones(2, np.float32)))
    assert "'b' is missing; set data.ndarray, or one part for each input" in text


def test_an_array_without_a_name_is_not_enough_for_two_inputs() -> None:
    """Which one would it be."""
    two = task(spec("a", np.float32, None, 2), spec("b", np.float32, None, 2))
    assert "'a', 'b' is missing" in refusal(two, payload(_=np.ones(2, np.float32)))


@pytest.mark.parametrize("given", [Payload(), Payload(text="hello"), Payload(image=b"\xff\xd8")])
def test_an_input_of_another_kind_is_refused(given: Payload) -> None:
    """Pictures and texts are no tensors."""
    assert "This model takes arrays" in refusal(task(), given)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ">f4", ">i2"])
def test_numbers_are_cast_to_what_the_graph_takes(kind: str) -> None:
    """Small numbers fit everywhere."""
    decoded = task().decode(payload(_=np.array([1, 0, 1], kind)))
    assert decoded.feeds["x"].dtype == np.dtype(np.float32)
    assert decoded.feeds["x"].tolist() == [[1, 0, 1]]


@pytest.mark.parametrize(
    ("wanted", "given", "words"),
    [
        (np.int64, np.float32([1, 2, 3]), "is float32; int64 (?, 3) is needed"),
        (np.uint8, np.float64([1, 2, 3]), "is float64; uint8 (?, 3) is needed"),
        (np.bool_, np.float32([1, 0, 1]), "is float32; bool (?, 3) is needed"),
        (np.float32, np.array([1, 2, 3], np.complex64), "is complex64; float32 (?, 3) is needed"),
        (np.float32, np.array(["1", "2", "3"]), "float32 (?, 3) is needed"),
    ],
)
def test_a_dtype_that_would_lose_the_meaning_is_refused(wanted: Any, given: Any, words: str) -> None:
    """Fractions would be cut off."""
    assert words in refusal(task(spec("x", wanted, None, 3)), payload(_=given))


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        (np.uint8, np.array([1, 256, 3], np.int64)),
        (np.uint8, np.array([1, -1, 3], np.int64)),
        (np.int32, np.array([2**31, 0, 0], np.int64)),
        (np.int64, np.array([2**63, 0, 0], np.uint64)),
        (np.uint64, np.array([-1, 0, 0], np.int64)),
        (np.bool_, np.array([2, 0, 1], np.int64)),
    ],
)
def test_an_integer_that_does_not_fit_is_refused(wanted: Any, given: Any) -> None:
    """256 must not silently become 0."""
    text = refusal(task(spec("x", wanted, None, 3)), payload(_=given))
    assert text == f"The array 'x' has values that {np.dtype(wanted)} cannot hold."


def test_a_float_that_does_not_fit_is_infinite() -> None:
    """As in NumPy, without its warning."""
    decoded = task(spec("x", np.float16, None, 3)).decode(payload(_=np.array([1e10, 1, 2], np.float64)))
    assert np.isinf(decoded.feeds["x"][0, 0])


def test_what_is_no_numeric_tensor_is_refused_at_load() -> None:
    """Strings, sequences, maps: the sentence says which and what to do."""
    with pytest.raises(BundleInvalid, match="The inputs x are not numeric tensors"):
        task(spec("x", None))
    with pytest.raises(BundleInvalid, match="zipmap=False"):
        task(outputs=(spec("labels", None),))


def test_outputs_that_are_no_tensors_are_left_out() -> None:
    """scikit-learn's label beside its probabilities."""
    mixed = task(outputs=(spec("label", None), spec("probabilities", np.float32, None, 2)))
    assert mixed.outputs(PredictOptions()) == mixed.compared() == ("probabilities",)
    assert mixed.method.returns.type is FieldType.NDARRAY


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_the_cost_is_the_bytes_the_graph_takes() -> None:
    """Known before anything is converted."""
    assert task().cost(payload(_=np.ones((5, 3), np.int8)), LIMITS) == 60


def test_the_signature_names_shapes_and_dtypes() -> None:
    """One argument an input; several outputs are named fields."""
    method = task(
        spec("a", np.float32, None, 2),
        spec("b", np.int64, None),
        outputs=(spec("sum", np.float32, None, 2), spec("ids", np.int64, None)),
    ).method
    assert [(a.name, a.type, a.description, a.default) for a in method.arguments] == [
        ("a", FieldType.NDARRAY, "float32 (?, 2)", None),
        ("b", FieldType.NDARRAY, "int64 (?)", None),
    ]
    assert method.returns.type is FieldType.NAMED_FIELDS
    assert [item.name for item in method.returns.items] == ["sum", "ids"]


def test_the_answer_is_the_arrays() -> None:
    """All of them, as they are."""
    arrays = {"y": np.ones((2, 3), np.float32)}
    (answer,) = task().encode(arrays, 1, PredictOptions())
    assert isinstance(answer, Tensors)
    assert answer.arrays is arrays


def test_examples_fit_the_inputs() -> None:
    """Three ordinary rows and an outlier, of the graph's own dtypes."""
    two = task(spec("a", np.uint8, None, 2), spec("b", np.float32, None, 1, 2))
    ((first, *_, outlier),) = two.examples()
    assert {name: (array.dtype, array.shape) for name, array in first.items()} == {
        "a": (np.dtype(np.uint8), (1, 2)),
        "b": (np.dtype(np.float32), (1, 1, 2)),
    }
    assert outlier["b"].max() > 5
