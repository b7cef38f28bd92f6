"""What a task answers is what the bundle's own graph gives: Pillow or tokenizers, NumPy and a plain session around it.

For every task, activation, pooling, layout and precision, through decoding, wrapping, batching and encoding. How far
an answer may be off: 1e-5 where the graph's input is float32, float64 or uint8, 2e-3 where it is float16.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from PIL import Image
from support import graphs, pictures
from support.engine_graphs import SIZE, pixel_model, plain, write_pixels

from appliance.core.config import Limits
from appliance.core.types import ConceptScores, Embedding, Payload, PredictOptions

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ALL = PredictOptions(max_concepts=200)
TOLERANCES = {
    TensorProto.FLOAT: 1e-5,
    TensorProto.DOUBLE: 1e-5,
    TensorProto.UINT8: 1e-5,
    TensorProto.FLOAT16: 2e-3,
}
DTYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.UINT8: np.uint8,
    TensorProto.FLOAT16: np.float16,
}


def files(count: int = 5) -> list[bytes]:
    """PNGs of noise and of a ramp, in sizes of their own."""
    random = np.random.default_rng(11)
    found = [pictures.png(random.integers(0, 256, (20 + 3 * i, 31 - i, 3), dtype=np.uint8)) for i in range(count - 1)]
    ramp = np.broadcast_to(np.linspace(0, 255, 40)[None, :, None], (25, 40, 3)).astype(np.uint8)
    return [*found, pictures.png(ramp)]


def activated(raw: NDArray[Any], activation: str) -> NDArray[np.float64]:
    logits = raw.reshape(len(raw), -1).astype(np.float64)
    if activation == "softmax":
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    return 1 / (1 + np.exp(-logits)) if activation == "sigmoid" else logits


def unit(vectors: NDArray[Any], normalize: bool) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True) if normalize else wide


def seen(file: bytes, color: str, layout: str, kind: int) -> NDArray[Any]:
    """What the graph should be fed for a picture."""
    height, width = SIZE
    picture = Image.open(io.BytesIO(file)).convert("L" if color == "grey" else "RGB")
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
    pixels = pixels[:, :, None] if color == "grey" else pixels
    values: NDArray[Any] = pixels[:, :, ::-1] if color == "bgr" else pixels
    if kind != TensorProto.UINT8:
        mean, std = (MEAN, STD) if color != "grey" else (MEAN[:1], STD[:1])
        values = (values / 255 - np.array(mean)) / np.array(std)
    return np.ascontiguousarray(values.transpose(2, 0, 1) if layout == "nchw" else values).astype(DTYPES[kind])


def write_picture_model(folder: Path, color: str, layout: str, kind: int, plan: str, head: dict[str, Any]) -> Path:
    """A classifier or an embedder, as `head` says, of a graph that weighs every pixel."""
    channels = 1 if color == "grey" else 3
    image: dict[str, Any] = {"color": color, "layout": layout}
    if kind != TensorProto.UINT8:
        image |= {"mean": MEAN[:channels], "std": STD[:channels]}
    model = pixel_model(7, channels=channels, layout=layout, dtype=kind)
    if "scores" in head:
        return write_pixels(folder, model, concepts=7, plan=plan, image=image, **head)
    section = {"plan": plan, "image": {"input": "image", "size": list(SIZE), **image}, **head}
    return graphs.write_bundle(folder, model, graphs.bundle_config(folder, "visual-embedder", section))


async def answers(servable: Any, payloads: list[Payload], ticket: Any) -> list[Any]:
    """All of them, as one request, and the first of them by itself: a neighbour changes nothing."""
    together = await servable.predict(payloads, ALL, ticket, Limits())
    alone = await servable.predict(payloads[:1], ALL, ticket, Limits())
    return [*together, *alone]


def check_scores(found: list[Any], wanted: NDArray[np.float64], tolerance: float) -> None:
    for answer, row in zip(found, [*wanted, wanted[0]], strict=True):
        assert isinstance(answer, ConceptScores), answer
        scores = np.zeros(len(row))
        scores[list(answer.indices)] = list(answer.values)
        np.testing.assert_allclose(scores, row, atol=tolerance, rtol=0)
        assert list(answer.values) == sorted(answer.values, reverse=True)


def check_vectors(found: list[Any], wanted: NDArray[np.float64], tolerance: float) -> None:
    for answer, row in zip(found, [*wanted, wanted[0]], strict=True):
        assert isinstance(answer, Embedding), answer
        np.testing.assert_allclose(answer.vector, row, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("plan", ["wrapped", "raw"])
@pytest.mark.parametrize("kind", list(TOLERANCES))
@pytest.mark.parametrize(("color", "layout"), [("rgb", "nchw"), ("bgr", "nhwc"), ("grey", "nchw"), ("grey", "nhwc")])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
async def test_concepts_of_pictures(
    tmp_path: Path, load: Any, ticket: Any, activation: str, color: str, layout: str, kind: int, plan: str
) -> None:
    head = {"scores": {"output": "scores", "activation": activation}}
    folder = write_picture_model(tmp_path / "b", color, layout, kind, plan, head)
    fed = np.stack([seen(file, color, layout, kind) for file in files()])
    wanted = activated(plain(folder).run(["scores"], {"image": fed})[0], activation)
    found = await answers(await load(folder), [Payload(image=file) for file in files()], ticket)
    check_scores(found, wanted, TOLERANCES[kind])


@pytest.mark.parametrize("plan", ["wrapped", "raw"])
@pytest.mark.parametrize("kind", list(TOLERANCES))
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("normalize", [True, False])
async def test_embeddings_of_pictures(
    tmp_path: Path, load: Any, ticket: Any, normalize: bool, layout: str, kind: int, plan: str
) -> None:
    head = {"embedding": {"output": "scores", "normalize": normalize}}
    folder = write_picture_model(tmp_path / "b", "rgb", layout, kind, plan, head)
    fed = np.stack([seen(file, "rgb", layout, kind) for file in files()])
    wanted = unit(plain(folder).run(["scores"], {"image": fed})[0], normalize)
    found = await answers(await load(folder), [Payload(image=file) for file in files()], ticket)
    check_vectors(found, wanted, TOLERANCES[kind])


TEXTS = ["good", "bad good unheard", "good " * 20, "the of and to in a is it you that he was for on"]


def tokens(text: str) -> dict[str, NDArray[np.int64]]:
    """A text as the graph should see it: without padding."""
    ids = np.array([graphs.make_tokenizer().encode(text).ids])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def with_inputs(model: ModelProto, kind: int) -> ModelProto:
    """The model with inputs of another integer type: TensorFlow's exports have int32."""
    for value in model.graph.input:
        value.type.tensor_type.elem_type = kind
    return model


def write_text_model(folder: Path, model: ModelProto, kind: int, task: str, section: dict[str, Any]) -> Path:
    config = graphs.bundle_config(
        folder, task, {"text": {"max_tokens": 64}, **section}, ("a", "b", "c") if "scores" in section else ()
    )
    tokenizer = {"tokenizer.json": graphs.make_tokenizer().to_str()}
    return graphs.write_bundle(folder, with_inputs(model, kind), config, files=tokenizer)


def alone(folder: Path, output: str, kind: int) -> list[NDArray[Any]]:
    """What the plain graph gives for each text by itself."""
    session, dtype = plain(folder), np.int32 if kind == TensorProto.INT32 else np.int64
    return [
        session.run([output], {name: array.astype(dtype) for name, array in tokens(text).items()})[0] for text in TEXTS
    ]


@pytest.mark.parametrize("plan", ["wrapped", "raw"])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
async def test_concepts_of_texts(tmp_path: Path, load: Any, ticket: Any, activation: str, kind: int, plan: str) -> None:
    section = {"plan": plan, "scores": {"output": "logits", "activation": activation}}
    folder = write_text_model(tmp_path / "b", graphs.text_classifier_model(3), kind, "text-classifier", section)
    wanted = activated(np.concatenate(alone(folder, "logits", kind)), activation)
    found = await answers(await load(folder), [Payload(text=text) for text in TEXTS], ticket)
    check_scores(found, wanted, 1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
async def test_embeddings_of_texts(
    tmp_path: Path, load: Any, ticket: Any, pooling: str, kind: int, normalize: bool
) -> None:
    """Padding is nobody's token, whatever bucket a text falls into."""
    pooled = pooling == "none"  # by the graph itself
    model = graphs.text_classifier_model(4) if pooled else graphs.text_hidden_model()
    output = model.graph.output[0].name
    section = {"embedding": {"output": output, "pooling": pooling, "normalize": normalize}}
    folder = write_text_model(tmp_path / "b", model, kind, "text-embedder", section)
    raw = alone(folder, output, kind)
    vectors = raw if pooled else [each[:, 0] if pooling == "cls" else each.mean(axis=1) for each in raw]
    found = await answers(await load(folder), [Payload(text=text) for text in TEXTS], ticket)
    check_vectors(found, unit(np.concatenate(vectors), normalize), 1e-5)
