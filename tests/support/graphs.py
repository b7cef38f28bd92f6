"""Tiny real ONNX graphs, and whole bundles of them, whose answers a test can compute by hand.

`…_model` functions return a ModelProto, `write_…` functions write a bundle folder (`config.yaml`, `1/model.onnx`, what
lies beside it) and return that folder. Axes named "batch" and "tokens" are dynamic.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

USER, APP = "tester", "tests"
CONCEPTS = ("dark", "red", "bright")
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "good", "bad", "model", "red", "blue")
DIMENSIONS = 4
"""Width of the token vectors of the text graphs."""

Axis = int | str


# ---- building --------------------------------------------------------------------------------------------------------


def make(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[Axis]]],
    outputs: Mapping[str, tuple[int, Sequence[Axis]]],
    weights: Mapping[str, NDArray[Any]] | None = None,
    *,
    opset: int = 17,
    domains: Sequence[str] = (),
) -> ModelProto:
    """A model of these nodes; inputs and outputs are name → (TensorProto type, shape)."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=min(10, 8 if opset <= 17 else 10))


def write_bundle(
    folder: Path,
    model: ModelProto | bytes,
    config: Mapping[str, Any] | str | None,
    *,
    version: str = "1",
    file: str = "model.onnx",
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a bundle folder and return it.

    Args:
        config: of `config.yaml`, as a mapping or as text; None writes none (Triton's layout).
        files: beside the model, by path relative to the version's folder.
    """
    place = folder / version
    place.mkdir(parents=True, exist_ok=True)
    if config is not None:
        text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    for name, content in (files or {}).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    data = model if isinstance(model, bytes) else model.SerializeToString()
    (place / file).parent.mkdir(parents=True, exist_ok=True)
    (place / file).write_bytes(data)
    return folder


def bundle_config(
    folder: Path,
    model_type_id: str,
    onnx_section: Mapping[str, Any] | None,
    concepts: Sequence[str] = (),
    *,
    model_id: str | None = None,
    user_id: str | None = USER,
    app_id: str | None = APP,
) -> dict[str, Any]:
    """Content of a `config.yaml`; the model id is the folder's name unless given. Concept ids are `c-<name>`."""
    model: dict[str, Any] = {"id": model_id or folder.name, "model_type_id": model_type_id}
    model |= {key: value for key, value in (("user_id", user_id), ("app_id", app_id)) if value}
    content: dict[str, Any] = {"model": model}
    if concepts:
        content["concepts"] = [{"id": f"c-{name}", "name": name} for name in concepts]
    if onnx_section is not None:
        content["onnx"] = dict(onnx_section)
    return content


# ---- pictures --------------------------------------------------------------------------------------------------------


def classifier_weights(channels: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (channels, count) and bias (count,) of the image classifiers: logits = pixels' mean @ weight + bias."""
    weight = np.linspace(-3, 3, channels * count, dtype=np.float32).reshape(channels, count)
    return weight, np.linspace(0.5, -0.5, count, dtype=np.float32)


def image_classifier_model(
    count: int = len(CONCEPTS),
    *,
    channels: int = 3,
    size: tuple[Axis, Axis] = (8, 8),
    layout: str = "nchw",
    dtype: int = TensorProto.FLOAT,
    batch: Axis = "batch",
    ends_in: str = "",
    output: str = "logits",
    opset: int = 17,
) -> ModelProto:
    """`image` (batch, channels, h, w), or (batch, h, w, channels) → `logits` (batch, count).

    The logits are the mean of each channel times `classifier_weights`. `ends_in` "Softmax" or "Sigmoid" puts that
    operator last. A uint8 or float16 graph casts to float32 first; float16 gives its output as float16.
    """
    weight, bias = classifier_weights(channels, count)
    pixel_axes = [2, 3] if layout == "nchw" else [1, 2]
    shape = [batch, channels, *size] if layout == "nchw" else [batch, *size, channels]
    last = "scores_before" if ends_in else output
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["means"], axes=pixel_axes, keepdims=0),
        helper.make_node("Gemm", ["means", "weight", "bias"], [last]),
    ]
    result = TensorProto.FLOAT
    if ends_in:
        nodes.append(helper.make_node(ends_in, [last], [output]))
    if dtype == TensorProto.FLOAT16:
        nodes[-1].output[0] = "wide"
        nodes.append(helper.make_node("Cast", ["wide"], [output], to=TensorProto.FLOAT16))
        result = TensorProto.FLOAT16
    return make(
        nodes,
        {"image": (dtype, shape)},
        {output: (result, [batch, count])},
        {"weight": weight, "bias": bias},
        opset=opset,
    )


def write_image_classifier(
    folder: Path,
    *,
    concepts: Sequence[str] = CONCEPTS,
    size: tuple[int, int] = (8, 8),
    color: str = "rgb",
    layout: str = "nchw",
    dtype: int = TensorProto.FLOAT,
    batch: Axis = "batch",
    activation: str = "softmax",
    version: str = "1",
    model_id: str | None = None,
    plan: str = "wrapped",
    image: Mapping[str, Any] | None = None,
    onnx_section: Mapping[str, Any] | None = None,
    opset: int = 17,
    model: ModelProto | None = None,
) -> Path:
    """A visual-classifier: `image` (batch, c, h, w) float32 of pixel/255 → `logits` (batch, concepts).

    Args:
        dtype: of the graph's input; uint8 takes pixels as they are (0–255), so set activation with that in mind.
        image, onnx_section: more keys for `onnx.image` and `onnx`.
        model: another graph with the same input and output.
    """
    channels = 1 if color == "grey" else 3
    graph = model or image_classifier_model(
        len(concepts), channels=channels, size=size, layout=layout, dtype=dtype, batch=batch, opset=opset
    )
    section = {
        "plan": plan,
        "image": {"input": "image", "layout": layout, "color": color, "size": list(size), **(image or {})},
        "scores": {"output": graph.graph.output[0].name, "activation": activation},
        **(onnx_section or {}),
    }
    config = bundle_config(folder, "visual-classifier", section, concepts, model_id=model_id)
    return write_bundle(folder, graph, config, version=version)


def write_uint8_classifier(folder: Path, *, concepts: Sequence[str] = CONCEPTS, size: tuple[int, int] = (8, 8)) -> Path:
    """A visual-classifier whose graph takes uint8 pixels (batch, h, w, 3) → `logits` (batch, concepts)."""
    return write_image_classifier(
        folder, concepts=concepts, size=size, layout="nhwc", dtype=TensorProto.UINT8, activation="sigmoid"
    )


def write_image_embedder(folder: Path, *, size: tuple[int, int] = (8, 8), normalize: bool = False) -> Path:
    """A visual-embedder: `image` (batch, 3, h, w) of pixel/255 → `embedding` (batch, 3): each channel's mean."""
    model = make(
        [helper.make_node("ReduceMean", ["image"], ["embedding"], axes=[2, 3], keepdims=0)],
        {"image": (TensorProto.FLOAT, ["batch", 3, *size])},
        {"embedding": (TensorProto.FLOAT, ["batch", 3])},
    )
    section = {
        "image": {"input": "image", "size": list(size)},
        "embedding": {"output": "embedding", "normalize": normalize},
    }
    return write_bundle(folder, model, bundle_config(folder, "visual-embedder", section))


def nan_classifier_model(count: int = len(CONCEPTS), size: tuple[int, int] = (8, 8)) -> ModelProto:
    """An image classifier (batch, 3, h, w) → `logits` (batch, count) that are NaN for an all-black picture, else 1."""
    return make(
        [
            helper.make_node("ReduceSum", ["image", "axes"], ["sum"], keepdims=0),
            helper.make_node("Reshape", ["sum", "column"], ["tall"]),
            helper.make_node("Div", ["tall", "tall"], ["one"]),
            helper.make_node("Mul", ["one", "ones"], ["logits"]),
        ],
        {"image": (TensorProto.FLOAT, ["batch", 3, *size])},
        {"logits": (TensorProto.FLOAT, ["batch", count])},
        {
            "axes": np.array([1, 2, 3], np.int64),
            "column": np.array([-1, 1], np.int64),
            "ones": np.ones((1, count), np.float32),
        },
    )


# ---- texts -----------------------------------------------------------------------------------------------------------


def make_tokenizer(*, special: bool = True, padding: int | None = None) -> Tokenizer:
    """A word-level tokenizer: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then `WORDS`.

    Args:    special: whether texts become [CLS] … [SEP]. padding: id that padding is set to, if it is.
    """
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = Whitespace()
    if special:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    if padding is not None:
        tokenizer.enable_padding(pad_id=padding, pad_token="[PAD]")
    return tokenizer


def token_table() -> NDArray[np.float32]:
    """The vector of each token id, (vocabulary, DIMENSIONS); never zero."""
    rows = len(WORDS) + 4
    return (np.sin(np.arange(rows * DIMENSIONS)) + 0.1).astype(np.float32).reshape(rows, DIMENSIONS)


def text_weights(count: int) -> NDArray[np.float32]:
    """Weight (DIMENSIONS, count) of the text classifier: logits = mean of the unmasked tokens' vectors @ weight."""
    return np.cos(np.arange(DIMENSIONS * count)).astype(np.float32).reshape(DIMENSIONS, count) * 4


def text_classifier_model(count: int) -> ModelProto:
    """`input_ids`, `attention_mask` int64 (batch, tokens) → `logits` (batch, count), see `text_weights`."""
    return make(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
            helper.make_node("Mul", ["vectors", "column"], ["masked"]),
            helper.make_node("ReduceSum", ["masked", "tokens"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["column", "tokens"], ["count"], keepdims=0),
            helper.make_node("Div", ["sum", "count"], ["mean"]),
            helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
        ],
        {
            "input_ids": (TensorProto.INT64, ["batch", "tokens"]),
            "attention_mask": (TensorProto.INT64, ["batch", "tokens"]),
        },
        {"logits": (TensorProto.FLOAT, ["batch", count])},
        {
            "table": token_table(),
            "weight": text_weights(count),
            "last": np.array([2], np.int64),
            "tokens": np.array([1], np.int64),
        },
    )


def text_hidden_model() -> ModelProto:
    """`input_ids`, `attention_mask` int64 (batch, tokens) → `last_hidden_state` (batch, tokens, DIMENSIONS)."""
    return make(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["mask", "zero"], ["nothing"]),
            helper.make_node("Unsqueeze", ["nothing", "last"], ["column"]),
            helper.make_node("Add", ["vectors", "column"], ["last_hidden_state"]),
        ],
        {
            "input_ids": (TensorProto.INT64, ["batch", "tokens"]),
            "attention_mask": (TensorProto.INT64, ["batch", "tokens"]),
        },
        {"last_hidden_state": (TensorProto.FLOAT, ["batch", "tokens", DIMENSIONS])},
        {"table": token_table(), "zero": np.zeros((), np.float32), "last": np.array([2], np.int64)},
    )


def write_text_classifier(
    folder: Path, *, concepts: Sequence[str] = ("good", "bad"), max_tokens: int = 32, version: str = "1"
) -> Path:
    """A text-classifier with softmax over `concepts`; tokenizer `make_tokenizer()`; graph `text_classifier_model`."""
    section = {
        "text": {"max_tokens": max_tokens},
        "scores": {"output": "logits", "activation": "softmax"},
    }
    config = bundle_config(folder, "text-classifier", section, concepts)
    files = {"tokenizer.json": make_tokenizer().to_str()}
    return write_bundle(folder, text_classifier_model(len(concepts)), config, version=version, files=files)


def write_text_embedder(
    folder: Path, *, pooling: str = "mean", normalize: bool = False, max_tokens: int = 32, special: bool = True
) -> Path:
    """A text-embedder: the mean (or the first) of the tokens' `token_table` vectors, (DIMENSIONS,)."""
    section = {
        "text": {"max_tokens": max_tokens},
        "embedding": {"output": "last_hidden_state", "pooling": pooling, "normalize": normalize},
    }
    config = bundle_config(folder, "text-embedder", section)
    files = {"tokenizer.json": make_tokenizer(special=special).to_str()}
    return write_bundle(folder, text_hidden_model(), config, files=files)


# ---- raw tensors -----------------------------------------------------------------------------------------------------


def write_raw(folder: Path, model: ModelProto | bytes | None = None, *, version: str = "1", **more: Any) -> Path:
    """A bundle served as raw tensors; the graph is `identity_model()` unless given. `more` keys go under `onnx:`."""
    config = bundle_config(folder, "tensor-to-tensor", {"file": "model.onnx", **more})
    return write_bundle(folder, model or identity_model(), config, version=version)


def identity_model(shape: Sequence[Axis] = ("batch", 3), dtype: int = TensorProto.FLOAT) -> ModelProto:
    """`x` → `y`, the same array; (batch, 3) float32 unless said otherwise (float16 too)."""
    return make([helper.make_node("Identity", ["x"], ["y"])], {"x": (dtype, shape)}, {"y": (dtype, shape)})


def two_in_two_out_model() -> ModelProto:
    """`a`, `b` float32 (batch, 2) → `sum`, `product` float32 (batch, 2)."""
    shape = (TensorProto.FLOAT, ["batch", 2])
    return make(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["a", "b"], ["product"])],
        {"a": shape, "b": shape},
        {"sum": shape, "product": shape},
    )


def fixed_batch_model() -> ModelProto:
    """`x` float32 (1, 3) → `y` (1, 3) = 2 x: a graph exported with a batch of one."""
    shape = (TensorProto.FLOAT, [1, 3])
    return make([helper.make_node("Add", ["x", "x"], ["y"])], {"x": shape}, {"y": shape})


def no_batch_axis_model() -> ModelProto:
    """`x` float32 (3,) → `y` float32 (), its sum: no axis counts rows."""
    return make(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        {"x": (TensorProto.FLOAT, [3])},
        {"y": (TensorProto.FLOAT, [])},
    )


def dynamic_quantize_model() -> ModelProto:
    """`x` float32 (batch, 3) → `y` = x after 8-bit quantisation with one scale over the whole batch: rows depend."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    return make(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        {"x": shape},
        {"y": shape},
    )


def batch_mean_model() -> ModelProto:
    """`x` float32 (batch, 3) → `y` = x minus the mean over the batch: rows mix, and no operator name says so."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    return make(
        [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "mean"], ["y"]),
        ],
        {"x": shape},
        {"y": shape},
    )


def gather_model(rows: int = 1000) -> ModelProto:
    """`index` int64 (batch, 1) → `y` float32 (batch, 1), the index itself; fails when one is not below `rows`.

    The load-time probes stay below 100, so that a row with index ≥ `rows` is the only one that fails.
    """
    return make(
        [
            helper.make_node("Gather", ["table", "index"], ["found"]),
            helper.make_node("Squeeze", ["found", "axes"], ["y"]),
        ],
        {"index": (TensorProto.INT64, ["batch", 1])},
        {"y": (TensorProto.FLOAT, ["batch", 1])},
        {"table": np.arange(rows, dtype=np.float32)[:, None], "axes": np.array([2], np.int64)},
    )


def constant_of_shape_model() -> ModelProto:
    """`n` int64 (1) → `y` float32 (n): as large as the caller says."""
    node = helper.make_node("ConstantOfShape", ["n"], ["y"])
    return make([node], {"n": (TensorProto.INT64, [1])}, {"y": (TensorProto.FLOAT, ["n"])})


def nan_model() -> ModelProto:
    """`x` float32 (batch, 3) → `y` = x / x: ones, and NaN where x is 0."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    return make([helper.make_node("Div", ["x", "x"], ["y"])], {"x": shape}, {"y": shape})


def slow_model(rounds: int = 20, width: int = 512) -> ModelProto:
    """`x` float32 (batch, width) → `y` (batch, width), after `rounds` matrix products; y = x exactly."""
    names = ["x", *(f"h{index}" for index in range(rounds - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], "eye"], [names[i + 1]]) for i in range(rounds)]
    shape = (TensorProto.FLOAT, ["batch", width])
    return make(nodes, {"x": shape}, {"y": shape}, {"eye": np.eye(width, dtype=np.float32)})


def string_model() -> ModelProto:
    """`x` string (batch, 1) → `y` the same: not a numeric tensor."""
    return identity_model(("batch", 1), TensorProto.STRING)


def custom_op_model() -> ModelProto:
    """A graph with an operator of domain `example.custom`, which would need a custom library."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    node = helper.make_node("Magic", ["x"], ["y"], domain="example.custom")
    return make([node], {"x": shape}, {"y": shape}, domains=["example.custom"])


def external_data_model(location: str = "weights.bin", values: Sequence[float] = (1.0, 2.0, 3.0)) -> ModelProto:
    """`x` float32 (batch, 3) → `y` = x + values, the values stored outside the graph at `location`."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    model = make(
        [helper.make_node("Add", ["x", "offset"], ["y"])],
        {"x": shape},
        {"y": shape},
        {"offset": np.array(values, np.float32)},
    )
    store_outside(model.graph.initializer[0], location)
    return model


def store_outside(tensor: TensorProto, location: str) -> bytes:
    """Make a tensor external, stored at `location`; returns the bytes to write there."""
    data = numpy_helper.to_array(tensor).tobytes()
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)
    return data


def write_external(folder: Path, *, location: str = "weights.bin") -> Path:
    """A raw bundle whose three weights (1, 2, 3) lie in a file of their own; `location` is relative to the version.

    The file is written where the location leads, also when that is outside the bundle.
    """
    model = external_data_model(location)
    write_raw(folder, model)
    target = folder / "1" / location
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(np.array([1.0, 2.0, 3.0], np.float32).tobytes())
    return folder


def if_model(then_weight: TensorProto | None = None, domain: str = "") -> ModelProto:
    """`x` float32 (batch, 3), through an If whose branches hold nodes and weights of their own → `y` = x + 1.

    Args:    then_weight: instead of the first branch's weight `one`. domain: of the first branch's Add.
    """
    weight = then_weight or numpy_helper.from_array(np.ones(3, np.float32), "one")
    value = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 3])

    def branch(name: str, tensor: TensorProto, node_domain: str) -> onnx.GraphProto:
        node = helper.make_node("Add", ["x", tensor.name], ["out"], domain=node_domain)
        return helper.make_graph([node], name, [], [value], [tensor])

    shape = (TensorProto.FLOAT, ["batch", 3])
    other = numpy_helper.from_array(np.ones(3, np.float32), "one_else")
    node = helper.make_node(
        "If", ["yes"], ["y"], then_branch=branch("then", weight, domain), else_branch=branch("else", other, "")
    )
    return make([node], {"x": shape}, {"y": shape}, {"yes": np.array(True)}, domains=[domain] if domain else [])


def endless_model(*, only_above: float | None = None) -> ModelProto:
    """`x` → `y` float32 (batch, 2), through a loop that never ends unless x is at most `only_above` everywhere."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Identity", ["v"], ["v_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, ["batch", 2]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v_out", TensorProto.FLOAT, ["batch", 2]),
        ],
    )
    limit = np.array(-np.inf if only_above is None else only_above, np.float32)
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "limit"], ["for_ever"]),
        helper.make_node("Loop", ["", "for_ever", "x"], ["y"], body=body),
    ]
    shape = (TensorProto.FLOAT, ["batch", 2])
    return make(nodes, {"x": shape}, {"y": shape}, {"limit": limit})
