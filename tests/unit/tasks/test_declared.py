"""Declared methods over real graphs: every type of argument ↔ graph input, every return type ↔ graph output."""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from onnx import ModelProto, TensorProto, helper
from PIL import Image
from support import graphs, pictures

from appliance.catalog.methods import MethodSection
from appliance.core.config import Limits
from appliance.core.errors import ApplianceError, BundleInvalid, InferenceFailed, InputTooLarge, InvalidInput
from appliance.core.memory import MemoryBudget
from appliance.core.types import (
    Concept,
    ConceptScores,
    Frame,
    Media,
    MethodKind,
    Payload,
    PredictOptions,
    Region,
    Returned,
    ScoredConcept,
)
from appliance.engine.session import TensorSpec
from appliance.media import sound
from appliance.tasks.declared import Declared
from appliance.tasks.servable import Servable, Ticket

LIMITS = Limits()
OPTIONS = PredictOptions()
F, I64, U8, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL
CONCEPTS = tuple(Concept(f"c-{name}", name) for name in ("cat", "dog", "bird"))
FREE: tuple[Any, ...] = ("batch",)


def echo(shape: tuple[Any, ...], kind: int = F) -> ModelProto:
    """`x` → `y`, the same."""
    return graphs.identity_model(shape, kind)


def detector(batch: Any = "batch") -> ModelProto:
    """`image` (batch, 3, 8, 8) → three boxes: scores the mean pixel times 1, 0.5 and 0.1, labels 0, 1 and 7."""
    boxes = np.array([[[0, 0, 4, 8], [2, 2, 6, 6], [1, 1, 2, 2]]], np.float32)
    axes = np.array([1, 2, 3], np.int64)
    return graphs.make(
        [
            helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=1),
            helper.make_node("Squeeze", ["mean", "two"], ["tall"]),
            helper.make_node("Mul", ["tall", "weights"], ["scores"]),
            helper.make_node("Mul", ["tall", "zero"], ["nothing"]),
            helper.make_node("Unsqueeze", ["nothing", "last"], ["column"]),
            helper.make_node("Add", ["column", "all"], ["boxes"]),
            helper.make_node("Add", ["nothing", "names"], ["wide"]),
            helper.make_node("Cast", ["wide"], ["labels"], to=I64),
        ],
        {"image": (F, [batch, 3, 8, 8])},
        {"boxes": (F, [batch, 3, 4]), "scores": (F, [batch, 3]), "labels": (I64, [batch, 3])},
        {
            "two": axes[1:],
            "last": np.array([2], np.int64),
            "weights": np.array([[1, 0.5, 0.1]], np.float32),
            "zero": np.zeros((1, 3), np.float32),
            "all": boxes,
            "names": np.array([[0, 1, 7]], np.float32),
        },
    )


def method(arguments: list[dict[str, Any]], returns: dict[str, Any], name: str = "ask", **more: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments, "returns": returns, **more}


def write(folder: Path, model: ModelProto, *methods: Mapping[str, Any], files: Any = None, **section: Any) -> Path:
    names = [concept.name for concept in CONCEPTS]
    section = {"methods": list(methods), "batching": {"max_rows": 4}, **section}
    config = graphs.bundle_config(folder, "any-to-any", section, names)
    return graphs.write_bundle(folder, model, config, files=files)


Ask = Callable[..., Any]


@pytest.fixture
def ask(tmp_path: Path, load: Any, ticket: Ticket) -> Ask:
    """Loads a graph with one method, calls it once for each set of arguments, and returns what came back."""

    async def run(model: ModelProto, section: Mapping[str, Any], *calls: Mapping[str, Any], **more: Any) -> list[Any]:
        options = more.pop("options", OPTIONS)
        servable: Servable = await load(write(tmp_path / "b", model, section, **more))
        payloads = [Payload(arguments=call) for call in calls]
        answers = await servable.predict(payloads, options, ticket, LIMITS, section["name"])
        return [answer.value if isinstance(answer, Returned) else answer for answer in answers]

    return run


# ---- arguments -------------------------------------------------------------------------------------------------------

PICTURE = pictures.png(np.full((4, 6, 3), 255, np.uint8))
WAV = sound.encode_wav(np.array([0.0, 0.5, -0.5, 1.0], np.float32), 8000)
PLAIN = {"size": [4, 6], "layout": "nhwc"}
BOX = Region(box=(0.125, 0.25, 0.5, 0.75))

ARGUMENTS: list[tuple[str, ModelProto, dict[str, Any], Any, Any]] = [
    ("int", echo(("batch",), I64), {"type": "int"}, 7, [7]),
    ("int for floats", echo(("batch",)), {"type": "int"}, 7, [7.0]),
    ("int in a column", echo(("batch", 1), I64), {"type": "int"}, 7, [[7]]),
    ("float", echo(("batch",)), {"type": "float"}, 0.5, [0.5]),
    ("float in a column", echo(("batch", 1)), {"type": "float"}, 0.5, [[0.5]]),
    ("float for float16", echo(("batch",), TensorProto.FLOAT16), {"type": "float"}, 0.5, [0.5]),
    ("float without a batch axis", echo(()), {"type": "float"}, 0.5, 0.5),
    ("bool", echo(("batch",), BOOL), {"type": "bool"}, True, [True]),
    ("bool for floats", echo(("batch",)), {"type": "bool"}, True, [1.0]),
    ("str of choices", echo(("batch",), I64), {"type": "str", "choices": ["a", "b"]}, "b", [1]),
    ("text of choices", echo(("batch",), I64), {"type": "text", "choices": ["a", "b"]}, Media(b"b"), [1]),
    ("bytes", echo(("batch", "n"), U8), {"type": "bytes"}, b"\1\2\3", [[1, 2, 3]]),
    ("video", echo(("batch", "n"), U8), {"type": "video"}, Media(b"\1\2"), [[1, 2]]),
    ("ndarray row", echo(("batch", 2)), {"type": "ndarray"}, np.array([1, 2], np.float64), [[1.0, 2.0]]),
    ("ndarray with a batch axis", echo(("batch", 2)), {"type": "ndarray"}, np.ones((1, 2), np.int8), [[1.0, 1.0]]),
    ("json", echo(("batch", "n")), {"type": "json"}, [1.0, 2.5], [[1.0, 2.5]]),
    ("concept", echo(("batch", 3)), {"type": "concept"}, ScoredConcept("", "dog", 0.5), [[0.0, 0.5, 0.0]]),
    (
        "list of concepts",
        echo(("batch", 3)),
        {"type": "list[concept]"},
        [ScoredConcept("c-bird", "", 1.0), ScoredConcept("c-cat", "", 0.25)],
        [[0.25, 0.0, 1.0]],
    ),
    ("region", echo(("batch", 4)), {"type": "region"}, BOX, [[0.125, 0.25, 0.5, 0.75]]),
    ("region yxyx", echo(("batch", 4)), {"type": "region", "box": "yxyx"}, BOX, [[0.25, 0.125, 0.75, 0.5]]),
    (
        "list of regions",
        echo(("batch", "n", 4)),
        {"type": "list[region]"},
        [BOX, BOX],
        [[[0.125, 0.25, 0.5, 0.75]] * 2],
    ),
    ("audio", echo(("batch", "n")), {"type": "audio", "sample_rate": 8000}, Media(WAV), None),
    (
        "image",
        echo(("batch", 4, 6, 3)),
        {"type": "image", "image": PLAIN},
        Media(PICTURE),
        np.ones((1, 4, 6, 3)).tolist(),
    ),
    (
        "image, channels first, bytes",
        echo(("batch", 3, 4, 6), U8),
        {"type": "image", "image": {"size": [4, 6]}},
        Media(PICTURE),
        np.full((1, 3, 4, 6), 255).tolist(),
    ),
    (
        "frame",
        echo(("batch", 4, 6, 3)),
        {"type": "frame", "image": PLAIN},
        Frame(Media(PICTURE)),
        np.ones((1, 4, 6, 3)).tolist(),
    ),
    (
        "list of images",
        echo(("batch", "n", 4, 6, 3)),
        {"type": "list[image]", "image": PLAIN},
        [Media(PICTURE)] * 2,
        np.ones((1, 2, 4, 6, 3)).tolist(),
    ),
    ("list of floats", echo(("batch", 2)), {"type": "list[float]"}, [0.5, 1.5], [[0.5, 1.5]]),
    ("list of lists", echo(("batch", 2, 2), I64), {"type": "list[list[int]]"}, [[1, 2], [3, 4]], [[[1, 2], [3, 4]]]),
    ("list of choices", echo(("batch", 2), I64), {"type": "list[str]", "choices": ["a", "b"]}, ["b", "a"], [[1, 0]]),
]


@pytest.mark.parametrize(
    ("model", "argument", "value", "expected"), [case[1:] for case in ARGUMENTS], ids=[case[0] for case in ARGUMENTS]
)
async def test_an_argument_becomes_the_graphs_input(
    ask: Ask, model: ModelProto, argument: Any, value: Any, expected: Any
) -> None:
    """The graph gives its input back; twice in one request gives the same twice."""
    section = method([{"name": "x", **argument}], {"type": "ndarray"})
    one, two = await ask(model, section, {"x": value}, {"x": value})
    for array in (one, two):
        found = array if array.ndim == len(model.graph.output[0].type.tensor_type.shape.dim) else array[None]
        if expected is None:
            np.testing.assert_allclose(found, sound.decode_wav(WAV)[None], atol=1e-6)
        else:
            assert found.tolist() == expected


async def test_a_text_becomes_token_ids_and_texts_of_one_length_are_one_batch(
    tmp_path: Path, load: Any, ticket: Ticket
) -> None:
    """With the tokenizer that lies in the version's folder; probed with rows of each length."""
    section = method(
        [{"name": "text", "type": "str", "text": {"max_tokens": 32}}], {"type": "list[float]", "output": "logits"}
    )
    folder = write(
        tmp_path / "b",
        graphs.text_classifier_model(3),
        section,
        files={"tokenizer.json": graphs.make_tokenizer().to_str()},
    )
    servable: Servable = await load(folder)
    assert servable.offers["ask"].model.batching.mode == "rows"
    texts = ["the quick fox", "good dog", "the lazy brown dog jumps over the red model " * 3]
    together = await servable.predict([Payload(arguments={"text": t}) for t in texts], OPTIONS, ticket, LIMITS, "ask")
    for text, answer in zip(texts, together, strict=True):
        (alone,) = await servable.predict([Payload(arguments={"text": text})], OPTIONS, ticket, LIMITS, "ask")
        assert isinstance(alone, Returned)
        assert isinstance(answer, Returned)
        np.testing.assert_allclose(answer.value, alone.value, atol=1e-5)


@pytest.mark.parametrize("kind", ["tuple", "named_fields"])
async def test_items_of_a_group_feed_an_input_each(ask: Ask, kind: str) -> None:
    items = [{"name": "left", "type": "list[float]", "input": "a"}, {"name": "b", "type": "list[float]"}]
    returned = [
        {"name": "total", "type": "list[float]", "output": "sum"},
        {"name": "p", "type": "ndarray", "output": "product"},
    ]
    section = method([{"name": "pair", "type": kind, "items": items}], {"type": kind, "items": returned})
    value: Any = ([1.0, 2.0], [3.0, 4.0]) if kind == "tuple" else {"left": [1.0, 2.0], "b": [3.0, 4.0]}
    (answer,) = await ask(graphs.two_in_two_out_model(), section, {"pair": value})
    total, product = answer if kind == "tuple" else (answer["total"], answer["p"])
    assert total == [4.0, 6.0]
    assert product.tolist() == [3.0, 8.0]


@pytest.mark.parametrize(
    ("model", "argument", "value", "error", "words"),
    [
        (echo(("batch",), I64), {"type": "str", "choices": ["a", "b"]}, "c", InvalidInput, "must be one of a, b"),
        (echo(("batch", 2)), {"type": "list[float]"}, [], InvalidInput, "is empty; give at least one"),
        (
            echo(("batch", 2)),
            {"type": "list[float]"},
            [1.0],
            InvalidInput,
            r"shape \[1, 1\]; float32 \(\?, 2\) is needed",
        ),
        (echo(("batch", 2, 2)), {"type": "list[list[float]]"}, [[1.0], [1.0, 2.0]], InvalidInput, "different shapes"),
        (echo(("batch", 2)), {"type": "ndarray"}, np.ones((3, 2), np.float32), InvalidInput, "one input is one row"),
        (echo(("batch", 2), I64), {"type": "ndarray"}, np.ones(2, np.float32), InvalidInput, "is float32; int64"),
        (echo(("batch",), TensorProto.INT8), {"type": "int"}, 300, InvalidInput, "has values that int8 cannot hold"),
        (echo(("batch", "n")), {"type": "json"}, {"a": 1.0}, InvalidInput, "must be a list of numbers"),
        (echo(("batch", "n")), {"type": "json"}, [[1.0], [2.0, 3.0]], InvalidInput, "equally long lists"),
        (echo(("batch", "n")), {"type": "json"}, ["1"], InvalidInput, "must be a list of numbers"),
        (echo(("batch", 3)), {"type": "concept"}, ScoredConcept("x", ""), InvalidInput, "no concept 'x'"),
        (echo(("batch", 4)), {"type": "region"}, Region(), InvalidInput, "has no bounding box"),
        (echo(("batch", "n")), {"type": "audio", "sample_rate": 16000}, Media(WAV), InvalidInput, "Resample it"),
        (echo(("batch", "n")), {"type": "audio", "sample_rate": 8000}, Media(b"x"), ApplianceError, "not a WAV"),
        (echo(("batch", 4, 6, 3)), {"type": "image", "image": PLAIN}, Media(b"x"), ApplianceError, "JPEG"),
        (echo(("batch", 4, 6, 3)), {"type": "image", "image": PLAIN}, Media(b""), InvalidInput, "empty"),
        (echo(("batch",), I64), {"type": "text", "choices": ["a"]}, Media(b"\xff"), InvalidInput, "not UTF-8"),
    ],
)
async def test_a_value_that_does_not_fit_is_that_inputs_error(
    ask: Ask, model: ModelProto, argument: Any, value: Any, error: type[Exception], words: str
) -> None:
    (answer,) = await ask(model, method([{"name": "x", **argument}], {"type": "ndarray"}), {"x": value})
    assert isinstance(answer, error)
    assert re.search(words, str(answer)), answer


def test_a_video_has_a_limit() -> None:
    task = made(echo(("batch", "n"), U8), method([{"name": "x", "type": "video"}], {"type": "ndarray"}))
    with pytest.raises(InputTooLarge, match=r"limits\.video_size"):
        task.cost(Payload(arguments={"x": Media(b"12345")}), Limits(video_size=4))


# ---- what is returned ------------------------------------------------------------------------------------------------


def made(model: ModelProto, section: Mapping[str, Any], finds_rows: bool = False) -> Declared:
    """The task alone, fitted to a graph."""

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                tuple(
                    axis.dim_value if axis.HasField("dim_value") else None for axis in value.type.tensor_type.shape.dim
                ),
            )
            for value in values
        )

    inputs, outputs = specs(model.graph.input), specs(model.graph.output)
    return Declared(MethodSection.model_validate(section), inputs, outputs, CONCEPTS, Path(), 20, finds_rows)


def returned(returns: dict[str, Any], array: Any, shape: tuple[Any, ...] | None = None) -> Any:
    """What a method makes of one output `y`, whose first axis is the batch."""
    array = np.asarray(array)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    model = echo(shape or ("batch", *array.shape), kind)
    task = made(model, method([{"name": "x", "type": "ndarray"}], returns))
    (answer,) = task.encode({"y": array[None]}, 1, OPTIONS)
    return answer.value if isinstance(answer, Returned) else answer


@pytest.mark.parametrize(
    ("returns", "array", "expected"),
    [
        ({"type": "int"}, np.int64(7), 7),
        ({"type": "int"}, np.array([7], np.int32), 7),
        ({"type": "float"}, np.float32(0.5), 0.5),
        ({"type": "float"}, np.array([[0.5]], np.float32), 0.5),
        ({"type": "bool"}, np.bool_(True), True),
        ({"type": "bytes"}, np.array([1, 2], np.uint8), b"\1\2"),
        ({"type": "str"}, np.frombuffer(b"hi\0\0", np.uint8), "hi"),
        ({"type": "str", "choices": ["a", "b"]}, np.int64(1), "b"),
        ({"type": "str", "choices": ["a", "b"]}, np.array([0.2, 0.8], np.float32), "b"),
        ({"type": "list[str]", "choices": ["a", "b"]}, np.array([[0.2, 0.8], [3, 1]], np.float32), ["b", "a"]),
        ({"type": "text", "choices": ["a", "b"]}, np.int64(0), Media(b"a")),
        ({"type": "video"}, np.array([1, 2], np.uint8), Media(b"\1\2")),
        ({"type": "json", "output": "y"}, np.array([[1.5], [2.5]], np.float32), [[1.5], [2.5]]),
        ({"type": "json", "output": "y"}, np.float32(1.5), [1.5]),
        ({"type": "list[json]"}, np.array([1.5, 2.5], np.float32), [[1.5], [2.5]]),
        ({"type": "list[float]"}, np.array([0.5, 1.5], np.float32), [0.5, 1.5]),
        ({"type": "list[float]"}, np.zeros(0, np.float32), []),
        ({"type": "list[list[int]]"}, np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (
            {"type": "concept", "activation": "none"},
            np.array([0.25, 0.5, 0.125], np.float32),
            ScoredConcept("c-dog", "dog", 0.5),
        ),
    ],
)
def test_an_output_becomes_a_value(returns: Any, array: Any, expected: Any) -> None:
    value = returned(returns, array)
    assert value == expected
    assert type(value) is type(expected)


def test_arrays_are_returned_as_they_are() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(returned({"type": "ndarray"}, array), array)
    rows = returned({"type": "list[ndarray]"}, array)
    assert [row.tolist() for row in rows] == array.tolist()


def test_concepts_are_cut_as_a_classifiers() -> None:
    """And the limits are arguments of the method."""
    task = made(
        echo(("batch", 3)),
        method([{"name": "x", "type": "ndarray"}], {"type": "list[concept]", "activation": "softmax"}),
    )
    scores = np.log(np.array([[0.2, 0.5, 0.3]], np.float32))
    (answer,) = task.encode({"y": scores}, 1, PredictOptions(max_concepts=2))
    assert isinstance(answer, ConceptScores)
    assert list(answer.indices) == [1, 2]
    (answer,) = task.encode({"y": scores}, 1, PredictOptions(selected=(0,)))
    assert isinstance(answer, ConceptScores)
    assert list(answer.indices) == [0]
    assert [a.name for a in task.method.arguments] == ["x", "max_concepts", "min_value", "select_concepts"]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_picture_is_a_png(layout: str, channels: int, dtype: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, channels), np.uint8)
    array = pixels if dtype == np.uint8 else (pixels / 255).astype(np.float32)
    array = array if layout == "nhwc" else array.transpose(2, 0, 1)
    value = returned({"type": "image", "layout": layout}, array)
    with Image.open(io.BytesIO(value.content)) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture).reshape(4, 6, channels), pixels)


def test_a_frame_holds_a_picture_and_sound_is_a_wav() -> None:
    frame = returned({"type": "frame"}, np.zeros((3, 2, 2), np.uint8))
    assert isinstance(frame, Frame)
    assert frame.image.content.startswith(b"\x89PNG")
    wav = returned({"type": "audio", "sample_rate": 8000}, np.array([0.5, -0.5], np.float32))
    np.testing.assert_allclose(sound.decode_wav(wav.content), [0.5, -0.5], atol=1e-4)


def test_json_without_an_output_is_all_of_them_by_name() -> None:
    items = [{"name": n, "type": "ndarray"} for n in "ab"]
    task = made(graphs.two_in_two_out_model(), method(items, {"type": "json"}))
    (answer,) = task.encode({"sum": np.ones((1, 2)), "product": np.zeros((1, 2))}, 1, OPTIONS)
    assert answer == Returned({"sum": [1.0, 1.0], "product": [0.0, 0.0]})


@pytest.mark.parametrize(
    ("returns", "array", "words"),
    [
        ({"type": "json"}, np.array([np.nan], np.float32), "not finite"),
        ({"type": "list[concept]"}, np.array([0.5, np.nan, 0.1], np.float32), "not finite"),
        ({"type": "concept"}, np.array([np.inf, 0, 0], np.float32), "not finite"),
        ({"type": "str", "choices": ["a", "b"]}, np.int64(2), "choice 2; there are 2"),
        ({"type": "str", "choices": ["a", "b"]}, np.array([np.nan, 0], np.float32), "not finite"),
        ({"type": "int"}, np.uint64(2**63), "more than 64 bits"),
        ({"type": "image"}, np.zeros((2, 4, 4), np.uint8), "1, 3 or 4 channels"),
        ({"type": "image"}, np.full((3, 2, 2), np.nan, np.float32), "not finite"),
        ({"type": "image"}, np.zeros((3, 0, 2), np.uint8), "as a picture"),
        ({"type": "audio", "sample_rate": 8000}, np.array([np.nan], np.float32), "not finite"),
    ],
)
def test_an_output_that_cannot_be_said_is_an_error_of_its_row(returns: Any, array: Any, words: str) -> None:
    answer = returned(returns, array)
    assert isinstance(answer, InferenceFailed)
    assert words in str(answer)


def test_an_output_of_another_rank_than_declared_is_said() -> None:
    answer = returned({"type": "list[float]"}, np.ones((2, 3), np.float32), ("batch", "a", "b"))
    assert "has shape [2, 3]; 1 axes were declared" in str(answer)


KINDS = {
    "int": [np.int8, np.uint64, np.int64],
    "float": [np.float32, np.uint64],
    "bool": [np.bool_, np.int8],
    "str": [np.uint8],
    "image": [np.uint8, np.float32],
    "audio": [np.float32],
    "json": [np.float32, np.bool_, np.int64],
    "concept": [np.float32],
    "list[concept]": [np.float32],
    "list[list[float]]": [np.float32],
    "list[ndarray]": [np.float32],
    "ndarray": [np.float16],
}


@settings(max_examples=200)
@given(st.data())
def test_whatever_shape_a_graph_answers_with_is_a_value_or_that_rows_error(data: st.DataObject) -> None:
    """Nothing else may come of it: a graph's free axes are its own business."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    dtype = data.draw(st.sampled_from(KINDS[kind]))
    array = data.draw(st_numpy.arrays(dtype, st_numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)))
    returns: dict[str, Any] = {"type": kind, **({"sample_rate": 8000} if kind == "audio" else {})}
    iterator = data.draw(st.booleans())
    free = ("batch", "a", "b", "c", "d")
    model = echo(free, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    task = made(model, method([{"name": "x", "type": "ndarray"}], {**returns, "iterator": iterator}))
    (answer,) = (
        task.encode({"y": array}, 1, OPTIONS) if not task.merges else task.encode({"y": array[None]}, 1, OPTIONS)
    )
    assert isinstance(answer, Returned | ConceptScores | InferenceFailed)


# ---- regions ---------------------------------------------------------------------------------------------------------


def regions(
    boxes: Any, scores: Any, labels: Any = None, options: PredictOptions = OPTIONS, **keys: Any
) -> list[Region] | ApplianceError:
    """What is made of one row's boxes."""
    arrays = {"boxes": np.asarray(boxes, np.float32), "scores": np.asarray(scores, np.float32)}
    if labels is not None:
        arrays["labels"] = np.asarray(labels, np.int64)
        keys["labels"] = "labels"
    outputs = {
        name: (helper.np_dtype_to_tensor_dtype(a.dtype), ["batch", *["n", 4, "m"][: a.ndim]][: a.ndim + 1])
        for name, a in arrays.items()
    }
    if arrays["scores"].ndim == 2:
        outputs["scores"] = (F, ["batch", "n", "classes"])
    model = graphs.make([], {"x": (F, ["batch", 1])}, outputs)
    returns = {"type": "list[region]", "output": "boxes", "scores": "scores", **keys}
    arguments: list[dict[str, Any]] = [{"name": "x", "type": "float"}]
    if keys.get("min_score") == "t":
        arguments.append({"name": "t", "type": "float", "default": 0.5})
    task = made(model, method(arguments, returns))
    assert task.merges
    (answer,) = task.encode({name: a[None] for name, a in arrays.items()}, 1, options)
    return answer.value if isinstance(answer, Returned) else answer  # type: ignore[return-value]


T: dict[str, Any] = {"min_score": "t"}
TWO = [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 1.5, -0.5]]


def test_regions_come_best_first_with_their_concept() -> None:
    found = regions(TWO, [0.25, 0.75], [0, 7], **T)
    assert isinstance(found, list)
    assert [region.value for region in found] == [0.75, 0.25]
    assert found[0].concepts == (ScoredConcept("7", "7", 0.75),)  # a class that the bundle does not name
    assert found[1].concepts == (ScoredConcept("c-cat", "cat", 0.25),)
    assert found[0].box == (0.5, 0.5, 1.0, 0.0)  # within the picture
    assert found[1].box == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_scores_by_class_name_the_best() -> None:
    found = regions(TWO, [[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]], **T)
    assert isinstance(found, list)
    assert [region.concepts[0].name for region in found] == ["bird", "cat"]


def test_as_many_boxes_as_classes_are_no_riddle() -> None:
    """What an axis means is settled when the graph is loaded, not by how long it happens to be."""
    found = regions([TWO[0]] * 3, np.eye(3), **T)
    assert isinstance(found, list)
    assert [region.concepts[0].name for region in found] == ["cat", "dog", "bird"]


@pytest.mark.parametrize(
    ("box", "keys", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], {}, (0.1, 0.2, 0.3, 0.4)),
        ([0.2, 0.1, 0.4, 0.3], {"box": "yxyx"}, (0.1, 0.2, 0.3, 0.4)),
        ([0.5, 0.5, 0.2, 0.4], {"box": "cxcywh"}, (0.4, 0.3, 0.6, 0.7)),
        ([64, 24, 128, 48], {"box_size": [480, 640]}, (0.1, 0.05, 0.2, 0.1)),
    ],
)
def test_boxes_are_parts_of_the_picture(box: Any, keys: Any, expected: Any) -> None:
    found = regions([box], [1.0], **T, **keys)
    assert isinstance(found, list)
    assert found[0].box == pytest.approx(expected)


def test_the_least_score_may_be_a_number() -> None:
    """A caller's min_value can only raise it."""
    boxes, scores = [TWO[0]] * 3, [0.2, 0.5, 0.9]
    kept = [
        len(regions(boxes, scores, options=PredictOptions(min_value=np.float32(least)), min_score=0.5))  # type: ignore[arg-type]
        for least in (0.0, 0.3, 0.7)
    ]
    assert kept == [2, 2, 1]


def test_selected_concepts_are_the_only_ones() -> None:
    found = regions(TWO, [0.25, 0.75], [0, 1], options=PredictOptions(selected=(0,)), **T)
    assert isinstance(found, list)
    assert [region.concepts[0].name for region in found] == ["cat"]


def test_no_boxes_are_no_regions() -> None:
    assert regions(np.zeros((0, 4)), np.zeros(0), np.zeros(0), **T) == []
    assert regions(np.zeros((0, 4)), np.zeros((0, 3)), **T) == []


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "words"),
    [
        (TWO, [0.5, np.nan], None, "'scores' is not finite"),
        ([[0, 0, np.inf, 1]], [0.5], None, "'boxes' is not finite"),
        (TWO, [0.5], None, "equally many, are needed"),
        (TWO, [0.5, 0.5], [1], "equally many, are needed"),
        (TWO, np.zeros((2, 0)), None, "no classes"),
    ],
)
def test_boxes_that_make_no_sense_are_that_rows_error(boxes: Any, scores: Any, labels: Any, words: str) -> None:
    answer = regions(boxes, scores, labels, **T)
    assert isinstance(answer, InferenceFailed)
    assert words in str(answer)


# ---- what does not fit is said at load -------------------------------------------------------------------------------

X = [{"name": "x", "type": "ndarray"}]
Y = {"type": "ndarray"}


@pytest.mark.parametrize(
    ("model", "section", "words"),
    [
        (echo(FREE), method([{"name": "z", "type": "float"}], Y), "the graph has no input 'z'; it has 'x'"),
        (echo(FREE), method([], Y), "'x' is fed by no argument; declare one for it"),
        (echo(FREE), method([*X, {"name": "z", "type": "int", "input": "x"}], Y), "'x' is fed by two arguments"),
        (echo(FREE, I64), method([{"name": "x", "type": "float"}], Y), "float cannot feed 'x', which is int64 (?)"),
        (echo(FREE), method([{"name": "x", "type": "list[float]", "input": "x"}], Y), None),
        (echo(()), method([{"name": "x", "type": "list[float]"}], Y), "float32 (); what its argument makes has 1 axes"),
        (echo(("batch", 5)), method([{"name": "x", "type": "concept"}], Y), "3 concepts are listed, and 'x' is"),
        (echo(("batch", 5)), method([{"name": "x", "type": "region"}], Y), "4 numbers make a box, and 'x' is"),
        (echo(FREE), method(X, {"type": "float", "output": "z"}), "the graph has no output 'z'; it has 'y'"),
        (echo(FREE), method(X, {"type": "int"}), "int cannot be made of 'y', which is float32"),
        (echo(FREE), method(X, {"type": "list[list[float]]"}), "list[list[float]] needs 2 axes; 'y' is float32 (?)"),
        (echo(("batch", 5)), method(X, {"type": "list[concept]"}), "3 concepts are listed, and 'y' is float32 (?, 5)"),
        (echo(FREE, TensorProto.UINT16), method(X, {"type": "bytes"}), "is made of uint8; 'y' is uint16"),
        (
            graphs.two_in_two_out_model(),
            method([{"name": n, "type": "ndarray"} for n in "ab"], {"type": "float"}),
            "several outputs; name one of sum, product",
        ),
        (
            detector(),
            method(
                [{"name": "image", "type": "ndarray"}], {"type": "list[region]", "output": "scores", "scores": "scores"}
            ),
            "4 numbers make a box, and 'scores' is float32 (?, 3)",
        ),
    ],
)
def test_what_does_not_fit_the_graph_is_said_with_the_methods_name(
    model: ModelProto, section: Any, words: str | None
) -> None:
    if words is None:
        made(model, section)
        return
    with pytest.raises(BundleInvalid) as caught:
        made(model, section)
    assert words in str(caught.value)
    assert "onnx.methods, ask" in str(caught.value)


# ---- batching --------------------------------------------------------------------------------------------------------


async def test_rows_of_several_inputs_share_a_run_when_proven(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    section = method([{"name": "x", "type": "list[float]"}], {"type": "list[float]"})
    servable: Servable = await load(write(tmp_path / "b", echo(("batch", 3)), section))
    offer = servable.offers["ask"]
    assert (offer.task.merges, offer.model.batching.mode) == (True, "rows")
    payloads = [Payload(arguments={"x": [float(i)] * 3}) for i in range(7)]
    answers = await servable.predict(payloads, OPTIONS, ticket, LIMITS, "ask")
    assert [answer.value[0] for answer in answers if isinstance(answer, Returned)] == list(map(float, range(7)))


@pytest.mark.parametrize("model", [graphs.batch_mean_model(), graphs.dynamic_quantize_model()])
async def test_rows_that_mix_run_alone(ask: Ask, model: ModelProto) -> None:
    """A neighbour changes nothing."""
    section = method([{"name": "x", "type": "list[float]"}], {"type": "list[float]"})
    one, alone = await ask(model, section, {"x": [1.0, 2.0, 3.0]}, {"x": [100.0, 200.0, 300.0]})
    (again,) = await ask(model, section, {"x": [1.0, 2.0, 3.0]})
    assert one == again
    assert len(alone) == 3


def mixed_model() -> ModelProto:
    """`x` (batch, 3) → `same`, x itself, and `mixed`, x minus the mean over the batch."""
    shape = (F, ["batch", 3])
    return graphs.make(
        [
            helper.make_node("Identity", ["x"], ["same"]),
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "mean"], ["mixed"]),
        ],
        {"x": shape},
        {"same": shape, "mixed": shape},
    )


@pytest.mark.parametrize("plan", ["main", "other"])
async def test_methods_that_share_a_session_are_proven_by_each_ones_outputs(
    tmp_path: Path, load: Any, ticket: Ticket, plan: str
) -> None:
    """One output that mixes rows is enough for all to run alone, whichever method is first."""
    argument = [{"name": "x", "type": "list[float]"}]
    first = method(argument, {"type": "list[float]", "output": "same"}, "first")
    second = method(argument, {"type": "list[float]", "output": "mixed"}, "second")
    files = None
    if plan == "other":
        first["file"] = second["file"] = "other.onnx"
        files = {"other.onnx": mixed_model().SerializeToString()}
    servable: Servable = await load(write(tmp_path / "b", mixed_model(), first, second, files=files))
    assert servable.offers["first"].model is servable.offers["second"].model
    payloads = [Payload(arguments={"x": [1.0 * i, 2.0, 3.0]}) for i in range(4)]
    answers = await servable.predict(payloads, OPTIONS, ticket, LIMITS, "second")
    assert [answer.value for answer in answers if isinstance(answer, Returned)] == [[0.0, 0.0, 0.0]] * 4


async def test_a_graph_with_a_scalar_input_runs_whole(ask: Ask) -> None:
    """One input, one run; the answers are right all the same."""
    model = graphs.make(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        {"x": (F, ["batch", 2]), "factor": (F, [])},
        {"y": (F, ["batch", 2])},
    )
    section = method(
        [{"name": "x", "type": "list[float]"}, {"name": "factor", "type": "float", "default": 2.0}],
        {"type": "list[float]"},
    )
    answers = await ask(model, section, {"x": [1.0, 2.0], "factor": 2.0}, {"x": [1.0, 2.0], "factor": 3.0})
    assert answers == [[2.0, 4.0], [3.0, 6.0]]


async def test_an_output_that_finds_its_rows_is_no_batch(ask: Ask) -> None:
    """Even when it finds as many as there are inputs, or none."""
    model = graphs.make(
        [
            helper.make_node("NonZero", ["x"], ["places"]),
            helper.make_node("Transpose", ["places"], ["y"], perm=[1, 0]),
        ],
        {"x": (F, ["batch", 3])},
        {"y": (I64, ["found", 2])},
    )
    section = method([{"name": "x", "type": "list[float]"}], Y)
    answers = await ask(model, section, {"x": [0.0, 1.0, 1.0]}, {"x": [1.0, 0.0, 0.0]}, {"x": [0.0, 0.0, 0.0]})
    assert [answer.tolist() for answer in answers] == [[[0, 1], [0, 2]], [[0, 0]], []]


async def test_choices_are_probed_within_what_they_are(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """A table of three rows is looked up in with 0, 1 and 2 only: the method loads, and its rows are merged."""
    model = graphs.gather_model(3)
    section = method([{"name": "index", "type": "str", "choices": ["a", "b", "c"]}], {"type": "float"}, "predict")
    servable: Servable = await load(write(tmp_path / "b", model, section))
    assert servable.model.batching.mode == "rows"
    answers = await servable.predict([Payload(arguments={"index": c}) for c in "cab"], OPTIONS, ticket, LIMITS)
    assert [answer.value for answer in answers if isinstance(answer, Returned)] == [2.0, 0.0, 1.0]


async def test_one_bad_input_hurts_nobody(ask: Ask) -> None:
    section = method([{"name": "x", "type": "list[float]"}], {"type": "json", "output": "y"})
    good, bad, nan, last = await ask(
        graphs.nan_model(), section, {"x": [1.0, 2.0, 3.0]}, {"x": []}, {"x": [0.0, 1.0, 1.0]}, {"x": [5.0, 5.0, 5.0]}
    )
    assert good == last == [1.0, 1.0, 1.0]
    assert isinstance(bad, InvalidInput)
    assert isinstance(nan, InferenceFailed)


# ---- streams ---------------------------------------------------------------------------------------------------------


async def test_an_iterator_is_cut_along_the_first_axis(ask: Ask) -> None:
    section = method([{"name": "x", "type": "list[list[float]]"}], {"type": "list[float]", "iterator": True})
    (answer,) = await ask(echo(("batch", "n", 2)), section, {"x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]})
    assert answer == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert made(echo(("batch", "n", 2)), section).method.kind is MethodKind.GENERATE


def test_an_argument_that_is_an_iterator_makes_a_stream() -> None:
    section = method([{"name": "x", "type": "float", "iterator": True}], {"type": "float", "iterator": True})
    task = made(echo(FREE), section)
    assert task.method.kind is MethodKind.STREAM
    assert task.method.streamed is not None
    assert task.method.streamed.name == "x"
    (answer,) = task.encode({"y": np.array([0.5], np.float32)}, 1, OPTIONS)
    assert answer == Returned(0.5)


# ---- sessions --------------------------------------------------------------------------------------------------------


async def test_methods_over_one_file_share_its_session(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    argument = [{"name": "x", "type": "list[float]"}]
    sections = [method(argument, {"type": "list[float]"}, name) for name in ("one", "two")]
    other = method([{"name": "x", "type": "list[float]"}], {"type": "float"}, "three", file="second.onnx")
    files = {"second.onnx": graphs.no_batch_axis_model().SerializeToString()}
    servable: Servable = await load(write(tmp_path / "b", echo(("batch", 3)), *sections, other, files=files))
    assert set(servable.offers) == {"predict", "one", "two", "three"}
    assert servable.offers["one"].model is servable.offers["two"].model is servable.model
    assert len(servable.models) == 2
    (answer,) = await servable.predict([Payload(arguments={"x": [1.0, 2.0, 3.0]})], OPTIONS, ticket, LIMITS, "three")
    assert answer == Returned(6.0)


async def test_a_method_whose_inputs_are_no_rows_has_a_session_that_does_not_cut_them(
    tmp_path: Path, load: Any, ticket: Ticket
) -> None:
    """Five rows given as one input are one run: cut, each row's mean would be the row itself."""
    row = method([{"name": "x", "type": "list[float]"}], {"type": "list[float]"}, "row")
    table = method([{"name": "x", "type": "list[list[float]]"}], {"type": "list[list[float]]"}, "table")
    servable: Servable = await load(write(tmp_path / "b", graphs.batch_mean_model(), row, table))
    assert servable.offers["table"].model is not servable.offers["row"].model
    payload = Payload(arguments={"x": [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]})
    (answer,) = await servable.predict([payload], OPTIONS, ticket, LIMITS, "table")
    assert answer == Returned([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


async def test_a_method_named_predict_takes_the_place_of_the_built_in_one(tmp_path: Path, load: Any) -> None:
    """Nothing else is loaded, so nothing is left behind."""
    section = method([{"name": "x", "type": "list[float]"}], {"type": "list[float]"}, "predict")
    servable: Servable = await load(write(tmp_path / "b", echo(("batch", 3)), section))
    assert list(servable.offers) == ["predict"]
    assert servable.task.kind == "values"
    assert servable.models == (servable.model,)


async def test_a_load_that_fails_closes_what_was_loaded(tmp_path: Path, load: Any, monkeypatch: Any) -> None:
    from appliance.engine.worker import LocalModel

    closed: list[Any] = []
    close = LocalModel.close
    monkeypatch.setattr(LocalModel, "close", lambda self: (closed.append(self), close(self))[1])
    good = method([{"name": "x", "type": "list[float]"}], {"type": "float"}, "good", file="second.onnx")
    bad = method([{"name": "x", "type": "list[float]"}], {"type": "list[float]"}, "bad", file="third.onnx")
    shape = (F, ["batch", 3])
    failing = graphs.make([helper.make_node("Nonsense", ["x"], ["y"])], {"x": shape}, {"y": shape})
    files = {
        "second.onnx": graphs.no_batch_axis_model().SerializeToString(),
        "third.onnx": failing.SerializeToString(),
    }
    with pytest.raises(BundleInvalid):
        await load(write(tmp_path / "b", echo(("batch", 3)), good, bad, files=files))
    assert len(closed) == 2
    closed.clear()
    missing = method([{"name": "x", "type": "list[float]"}], {"type": "float"}, "gone", file="gone.onnx")
    with pytest.raises(BundleInvalid, match=r"gone\.onnx is missing; put it there or mend the config"):
        await load(
            write(tmp_path / "c", echo(("batch", 3)), good, missing, files={"second.onnx": files["second.onnx"]})
        )
    assert not closed  # files are looked at before anything is loaded


async def test_what_decoding_takes_is_reserved_first(tmp_path: Path, load: Any) -> None:
    """A picture of many pixels is refused before it is decoded, by its header."""
    section = method([{"name": "x", "type": "image", "image": PLAIN}], Y)
    servable: Servable = await load(write(tmp_path / "b", echo(("batch", 4, 6, 3)), section))
    task = servable.offers["ask"].task
    picture = pictures.png(np.zeros((400, 400, 3), np.uint8))
    assert task.cost(Payload(arguments={"x": Media(picture)}), LIMITS) > 400 * 400 * 3
    budget = MemoryBudget(100_000)
    ticket = Ticket("ada", None, budget.hold(0))
    with pytest.raises(ApplianceError, match=r"limits\.memory_in_flight"):
        await servable.predict([Payload(arguments={"x": Media(picture)})], OPTIONS, ticket, LIMITS, "ask")


# ---- the example -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["batch", 1])
async def test_analyze_is_configuration_not_code(ask: Ask, batch: Any) -> None:
    """`analyze(image, threshold)` over a detector; also one that was exported with a batch of one."""
    section = method(
        [
            {"name": "image", "type": "image", "image": {"size": [8, 8]}},
            {"name": "threshold", "type": "float", "default": 0.25, "range": [0, 1]},
        ],
        {
            "type": "list[region]",
            "output": "boxes",
            "scores": "scores",
            "labels": "labels",
            "box_size": [8, 8],
            "min_score": "threshold",
        },
        "analyze",
    )
    white, grey = (Media(pictures.png(np.full((8, 8, 3), level, np.uint8))) for level in (255, 102))
    options = PredictOptions(min_value=np.float32(0.25))
    first, second = await ask(
        detector(batch),
        section,
        {"image": white, "threshold": 0.25},
        {"image": grey, "threshold": 0.25},
        options=options,
    )
    assert [(region.concepts[0].name, region.value) for region in first] == [("cat", 1.0), ("dog", 0.5)]
    assert first[0].box == (0.0, 0.0, 0.5, 1.0)
    assert [region.concepts[0].name for region in second] == ["cat"]


async def test_the_readmes_example_loads_and_answers(tmp_path: Path, load: Any, ticket: Ticket) -> None:
    """models/README.md, "Methods of your own", as it is written there."""
    readme = (Path(__file__).parents[3] / "models" / "README.md").read_text(encoding="utf-8")
    example = readme.partition("## Methods of your own")[2].partition("```yaml\n")[2].partition("```")[0]
    model = detector()
    model.graph.input[0].name = "images"
    model.graph.node[0].input[0] = "images"
    for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_value = 64
    servable: Servable = await load(graphs.write_bundle(tmp_path / "detector", model, example))
    method = servable.offers["analyze"].task.method
    assert [(argument.name, argument.default) for argument in method.arguments] == [
        ("image", None),
        ("threshold", "0.25"),
    ]
    picture = Media(pictures.png(np.full((64, 64, 3), 255, np.uint8)))
    options = PredictOptions(min_value=np.float32(0.25))
    payload = Payload(arguments={"image": picture, "threshold": 0.25})
    (answer,) = await servable.predict([payload], options, ticket, LIMITS, "analyze")
    assert isinstance(answer, Returned)
    assert [(region.concepts[0].name, region.value) for region in answer.value] == [("cat", 1.0), ("dog", 0.5)]
    assert answer.value[0].box == (0.0, 0.0, 4 / 64, 8 / 64)
