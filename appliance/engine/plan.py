"""The plan: a bundle's graph wrapped once, so that pre- and post-processing are part of it.

In front, uint8 NHWC pixels are cast, normalised and transposed; behind, scores become probabilities and the best 200
are picked. So the host moves a quarter of the bytes in and a few hundred out, and what a model means by its input and
output is defined in one place. `plan: raw` leaves the graph alone: the task then does the same on the host.

Weights stay where they are. The graph refers to the bytes of the bundle's files, which are read once: what is
hashed, what the plan is made of and what onnxruntime loads are the same, whatever becomes of the files meanwhile. (Left
to itself, onnxruntime maps files with weights for as long as it serves: writing into one would kill the process.)
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from appliance.catalog import graph as graphs
from appliance.catalog.bundle import BundleConfig, OnnxSection, VersionFolder, check_inside
from appliance.catalog.graph import axes, every_body, every_node, graph_inputs, locations, parse_graph, read_file
from appliance.catalog.sections import EmbeddingOutput, ImageInput
from appliance.core.errors import BundleInvalid
from appliance.engine import half, session
from appliance.engine.cache import FileCache
from appliance.engine.session import TensorSpec

TOP_LIMIT = 200
"""Concepts that one answer may have (the API's maximum), so the graph never returns more than that."""

IMAGE = "appliance_image"
SCORES = "appliance_scores"
TOP_VALUES = "appliance_top_values"
TOP_INDICES = "appliance_top_indices"
EMBEDDING = "appliance_embedding"

_OLDEST_TOP_K = 10
"""The first operator set whose TopK takes K as an input (onnx/onnx docs/Changelog.md)."""

_CACHE_SIZE = 64 * 2**20
"""Bytes of all wrapped graphs that are kept; without weights one has some ten or hundred thousand."""

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})

_MIXES_ROWS = {
    "DynamicQuantizeLinear": "takes one scale over all rows of a batch",
    "DynamicQuantizeMatMul": "takes one scale over all rows of a batch",
    "DynamicQuantizeLSTM": "takes one scale over all rows of a batch",
    "NonMaxSuppression": "returns rows that do not line up with its inputs",
    "NonZero": "returns rows that do not line up with its inputs",
    "Unique": "returns rows that do not line up with its inputs",
    "RandomNormal": "is random",
    "RandomNormalLike": "is random",
    "RandomUniform": "is random",
    "RandomUniformLike": "is random",
    "Multinomial": "is random",
    "Bernoulli": "is random",
}

_OWN_ROWS = frozenset({"NonMaxSuppression", "NonZero", "Unique", "Compress"})
"""Operators whose results have as many rows as they find, not one for each row of a batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A graph ready to be loaded.

    Attributes:
        model: the graph without its large tensors, serialised; None when only the description came here.
        file: the bundle's ONNX file.
        wrapped_input, wrapped_output: which halves the graph does; the task does the other on the host.
        mixes_rows: why rows of a batch may influence each other, "" when no operator says so.
        notes: sentences for `appliance models inspect`.
        inputs, outputs: of the wrapped graph.
        finds_rows: an operator may give as many rows as it finds, so a free first axis of an output is no batch axis.
        key: SHA-256 of all that the answers depend on: the files' content, the config, the libraries' versions.
        weights: content of the files that the graph refers to, by the name it uses.
        half: products are computed in half precision.
        tf32, cuda_graphs: what the bundle says of runs on a GPU; None follows the engine.
    """

    model: bytes | None
    file: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    wrapped_input: bool
    wrapped_output: bool
    mixes_rows: str
    notes: tuple[str, ...]
    finds_rows: bool = False
    key: str = ""
    weights: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    half: bool = False
    tf32: bool = False
    cuda_graphs: bool | None = None

    def described(self) -> dict[str, Any]:
        """All but graph and weights, as plain data that JSON can hold: what a task needs to know of it."""
        return {
            "file": str(self.file),
            "inputs": [spec.described() for spec in self.inputs],
            "outputs": [spec.described() for spec in self.outputs],
            "wrapped_input": self.wrapped_input,
            "wrapped_output": self.wrapped_output,
            "mixes_rows": self.mixes_rows,
            "notes": list(self.notes),
            "finds_rows": self.finds_rows,
            "key": self.key,
            "half": self.half,
            "tf32": self.tf32,
            "cuda_graphs": self.cuda_graphs,
        }

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Self:
        """The plan that `described` tells of, without its graph.

        Raises: KeyError, TypeError, ValueError: that is no such description.
        """
        return cls(
            model=None,
            file=Path(described["file"]),
            inputs=tuple(TensorSpec.of(entry) for entry in described["inputs"]),
            outputs=tuple(TensorSpec.of(entry) for entry in described["outputs"]),
            wrapped_input=bool(described["wrapped_input"]),
            wrapped_output=bool(described["wrapped_output"]),
            mixes_rows=str(described["mixes_rows"]),
            notes=tuple(map(str, described["notes"])),
            finds_rows=bool(described["finds_rows"]),
            key=str(described["key"]),
            half=bool(described["half"]),
            tf32=bool(described["tf32"]),
            cuda_graphs=described["cuda_graphs"],
        )


def cache_in(state_dir: Path) -> FileCache:
    """Where wrapped graphs are kept, below the folder of the appliance's state."""
    return FileCache(state_dir / "cache" / "plans", _CACHE_SIZE)


def make_plan(
    bundle: Path, config: BundleConfig, version: VersionFolder, concepts: int, cache: FileCache | None = None
) -> Plan:
    """Read the graph of a version and wrap it as its config says.

    Args:
        concepts: how many it has, 0 if not known.
        cache: keeps graphs that were wrapped before, so that they are not wrapped again.
    Raises: BundleInvalid: the file is not ONNX, needs what we refuse, or its tensors do not fit the config.
    """
    file = check_inside(bundle, version.model_file)
    content = read_file(file)
    key = _key(config.onnx, concepts, file.name, content)
    stored = cache.get(key) if cache else None
    restored = _restored(stored) if stored else None
    if restored:
        plan, outside = restored
    else:
        plan, outside = _made(bundle, file, content, config.onnx, concepts)
        if cache:
            cache.put(key, _stored(plan, outside))
    weights = {
        name: content if name == file.name else read_file(check_inside(bundle, file.parent / name)) for name in outside
    }
    others = [hashlib.sha256(data).hexdigest() for name, data in weights.items() if data is not content]
    key = hashlib.sha256("".join([key, *others]).encode()).hexdigest()
    return replace(plan, file=file, key=key, weights=weights)


def _key(section: OnnxSection, concepts: int, name: str, content: bytes) -> str:
    """SHA-256 of what the wrapped graph is made from and with."""
    parts = [
        section.model_dump_json(exclude={"methods", "batching", "device"}),
        str(concepts),
        name,
        hashlib.sha256(content).hexdigest(),
        session.version(),
        onnx.__version__,
        *_code(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@cache
def _code() -> tuple[str, ...]:
    """SHA-256 of each source that a plan is made by; an upgrade that changes one makes every plan anew."""
    sources = (__file__, graphs.__file__, half.__file__)
    return tuple(hashlib.sha256(Path(source).read_bytes()).hexdigest() for source in sources)


def _stored(plan: Plan, outside: list[str]) -> bytes:
    """A line of JSON, then the graph."""
    assert plan.model is not None
    return json.dumps({"plan": plan.described(), "outside": outside}).encode() + b"\n" + plan.model


def _restored(stored: bytes) -> tuple[Plan, list[str]] | None:
    """What `_stored` wrote, or None."""
    try:
        head, _, model = stored.partition(b"\n")
        found = json.loads(head)
        return replace(Plan.of(found["plan"]), model=model), [str(name) for name in found["outside"]]
    except (KeyError, TypeError, ValueError):
        return None


def _made(bundle: Path, file: Path, content: bytes, section: OnnxSection, concepts: int) -> tuple[Plan, list[str]]:
    """The plan without its weights, and the names of the files that those lie in."""
    model = parse_graph(bundle, file, content)
    notes: list[str] = []
    opset = _opset(model)
    wrap_input = section.image is not None and section.plan == "wrapped"
    wrap_output = section.plan == "wrapped" and (section.scores is not None or _pools(section))
    if wrap_output and section.scores and opset < _OLDEST_TOP_K:
        notes.append(f"operator set {opset} has no TopK with a variable K: the best concepts are picked on the host")
        wrap_output = False
    if section.plan == "raw" and (section.image or section.text):
        notes.append("plan: raw, so pre- and post-processing run on the host")
    if section.image:
        _check_image(model, section.image, file)
    if wrap_input and section.image:
        _wrap_image(model, section.image)
    if wrap_output and section.scores:
        _wrap_scores(model, section, concepts, file)
    elif wrap_output:
        _wrap_pooling(model, section, file)
    elif section.embedding:
        _check_embedding(model, section.embedding, file)
    halved = half.halve(model) if section.precision == "fp16" else 0
    if section.precision == "fp16":
        notes.append(f"precision fp16: {halved} operators compute in half precision")
    _prune(model)
    plan = Plan(
        model=model.SerializeToString(),
        file=file,
        inputs=tuple(_spec(value) for value in graph_inputs(model)),
        outputs=tuple(_spec(value) for value in model.graph.output),
        wrapped_input=wrap_input,
        wrapped_output=wrap_output,
        mixes_rows=_mixes_rows(model),
        notes=tuple(notes),
        finds_rows=any(node.op_type in _OWN_ROWS for node in _nodes(model)),
        half=bool(halved),
        tf32=section.tf32,
        cuda_graphs=section.cuda_graphs,
    )
    return plan, locations(model)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        return TensorSpec(value.name, None, ())
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    if dtype.kind not in "biuf":  # strings, complex numbers, and those that NumPy has no type of its own for
        return TensorSpec(value.name, None, ())
    return TensorSpec(value.name, dtype, tuple(axes(value)))


def _opset(model: ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _pools(section: OnnxSection) -> bool:
    return section.embedding is not None and section.embedding.pooling != "none"


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    return every_node((*model.graph.node, *(node for function in model.functions for node in function.node)))


def only(model: bytes, outputs: Collection[str]) -> bytes:
    """A serialised graph without the outputs that are not named, and without what only they need.

    onnxruntime computes every node at every run, whichever outputs are asked for.
    """
    read = ModelProto.FromString(model)
    kept = [value for value in read.graph.output if value.name in outputs]
    if len(kept) == len(read.graph.output):
        return model
    del read.graph.output[:]
    read.graph.output.extend(kept)
    _prune(read)
    return read.SerializeToString()


def _prune(model: ModelProto) -> None:
    """Take nodes and weights out that no output needs."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    needed: set[str] = set()
    waiting = [value.name for value in graph.output]
    while waiting:
        name = waiting.pop()
        if name and name not in needed:
            needed.add(name)
            if name in makers:
                waiting += _read_by(makers[name])
    dead = {tensor.name for tensor in graph.initializer} - needed
    _keep(graph.node, lambda node: needed.intersection(node.output))
    _keep(graph.initializer, lambda tensor: tensor.name not in dead)
    _keep(graph.input, lambda value: value.name not in dead)  # where old exporters list weights too


def _keep(field: Any, wanted: Callable[[Any], object]) -> None:
    """Take the messages out of a repeated field that are not wanted."""
    kept = [message for message in field if wanted(message)]
    if len(kept) < len(field):
        del field[:]
        field.extend(kept)


def _read_by(node: NodeProto) -> list[str]:
    """The values that a node reads, those of its bodies included."""
    names = [name for inner in every_node((node,)) for name in inner.input]
    return [*names, *(value.name for body in every_body(node) for value in body.output)]


def _mixes_rows(model: ModelProto) -> str:
    # Branches count too: the probes may take another one than a caller.
    for node in _nodes(model):
        if node.op_type in _MIXES_ROWS:
            return f"the operator {node.op_type} {_MIXES_ROWS[node.op_type]}"
    return ""


# ---- in front --------------------------------------------------------------------------------------------------------


def _image_value(model: ModelProto, image: ImageInput, file: Path) -> onnx.ValueInfoProto:
    for value in graph_inputs(model):
        if value.name == image.input:
            return value
    names = ", ".join(repr(value.name) for value in graph_inputs(model))
    raise BundleInvalid(f"{file} has no input {image.input!r} (onnx.image.input); it has {names}.")


def _check_image(model: ModelProto, image: ImageInput, file: Path) -> None:
    value = _image_value(model, image, file)
    others = [other.name for other in graph_inputs(model) if other.name != image.input]
    if others:
        raise BundleInvalid(f"{file} has more inputs than the image: {', '.join(others)}; serve it as raw tensors.")
    height, width = image.size
    sizes = [image.channels, height, width] if image.layout == "nchw" else [height, width, image.channels]
    shape = axes(value)
    fits = len(shape) == 4 and all(axis is None or axis == size for axis, size in zip(shape[1:], sizes, strict=False))
    if not fits:
        shown = ["?" if axis is None else axis for axis in shape]
        raise BundleInvalid(
            f"{file}: the input {image.input!r} has shape {shown}; onnx.image (layout {image.layout}, color "
            f"{image.color}, size {list(image.size)}) makes ['?', {', '.join(map(str, sizes))}]."
        )
    kind = value.type.tensor_type.elem_type
    if kind not in _FLOATS and kind != TensorProto.UINT8:
        raise BundleInvalid(f"{file}: the input {image.input!r} is {TensorProto.DataType.Name(kind)}, not a picture.")


def normalisation(image: ImageInput) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The factor and the offset per channel, float32 (channels,): value = pixel · factor + offset.

    Source: (pixel · scale - mean) / std, multiplied out.
    """
    mean = np.broadcast_to(np.asarray(image.mean, np.float64), (image.channels,))
    std = np.broadcast_to(np.asarray(image.std, np.float64), (image.channels,))
    return (image.scale / std).astype(np.float32), (-mean / std).astype(np.float32)


def _wrap_image(model: ModelProto, image: ImageInput) -> None:
    """Replace the picture input by uint8 (batch, height, width, channels)."""
    value = next(value for value in graph_inputs(model) if value.name == image.input)
    kind = value.type.tensor_type.elem_type
    batch = value.type.tensor_type.shape.dim[0]
    nodes: list[NodeProto] = []
    current = IMAGE
    if image.layout == "nchw":
        nodes.append(helper.make_node("Transpose", [current], ["appliance_transposed"], perm=[0, 3, 1, 2]))
        current = "appliance_transposed"
    if kind != TensorProto.UINT8:
        factor, offset = normalisation(image)
        shape = (-1, 1, 1) if image.layout == "nchw" else (-1,)
        model.graph.initializer.append(numpy_helper.from_array(factor.reshape(shape), "appliance_factor"))
        model.graph.initializer.append(numpy_helper.from_array(offset.reshape(shape), "appliance_offset"))
        nodes += [
            helper.make_node("Cast", [current], ["appliance_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["appliance_float", "appliance_factor"], ["appliance_scaled"]),
            helper.make_node("Add", ["appliance_scaled", "appliance_offset"], ["appliance_normal"]),
        ]
        current = "appliance_normal"
        if kind != TensorProto.FLOAT:
            nodes.append(helper.make_node("Cast", [current], ["appliance_cast"], to=kind))
            current = "appliance_cast"
    nodes.append(helper.make_node("Identity", [current], [image.input]))
    height, width = image.size
    first = batch.dim_value if batch.HasField("dim_value") else (batch.dim_param or "batch")
    picture = helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [first, height, width, image.channels])
    model.graph.input.remove(value)
    model.graph.input.append(picture)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


# ---- behind ----------------------------------------------------------------------------------------------------------


def _output_value(model: ModelProto, name: str, key: str, file: Path) -> onnx.ValueInfoProto:
    for value in model.graph.output:
        if value.name == name:
            return value
    names = ", ".join(repr(value.name) for value in model.graph.output)
    raise BundleInvalid(f"{file} has no output {name!r} ({key}); it has {names}.")


def _as_float(model: ModelProto, value: onnx.ValueInfoProto) -> str:
    """Name of the value as float32."""
    if value.type.tensor_type.elem_type == TensorProto.FLOAT:
        return value.name
    model.graph.node.append(helper.make_node("Cast", [value.name], ["appliance_output"], to=TensorProto.FLOAT))
    return "appliance_output"


def _reshape(model: ModelProto, source: str, shape: list[int], target: str) -> str:
    constant = f"{target}_shape"
    model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), constant))
    model.graph.node.append(helper.make_node("Reshape", [source, constant], [target]))
    return target


def _wrap_scores(model: ModelProto, section: OnnxSection, concepts: int, file: Path) -> None:
    """Replace the outputs by probabilities (batch, concepts) and the best 200 of them with their indices."""
    assert section.scores is not None
    value = _output_value(model, section.scores.output, "onnx.scores.output", file)
    if value.type.tensor_type.elem_type not in _FLOATS:
        raise BundleInvalid(f"{file}: the output {value.name!r} does not hold floating point scores.")
    shape = axes(value)
    fixed = [axis for axis in shape[1:] if axis is not None]
    if len(shape) < 2 or (len(fixed) == len(shape) - 1 and concepts and int(np.prod(fixed)) != concepts):
        raise BundleInvalid(
            f"{file}: the output {value.name!r} has shape {['?' if axis is None else axis for axis in shape]}, but the "
            f"bundle lists {concepts} concepts; list one concept for each score, in output order."
        )
    flat = _reshape(model, _as_float(model, value), [0, -1], "appliance_flat")
    operator = {"softmax": "Softmax", "sigmoid": "Sigmoid", "none": "Identity"}[section.scores.activation]
    node = helper.make_node(operator, [flat], [SCORES])
    if operator == "Softmax":
        node.attribute.append(helper.make_attribute("axis", 1))
    model.graph.node.append(node)
    width = concepts or (int(np.prod(fixed)) if len(fixed) == len(shape) - 1 else 0)
    if not width:
        raise BundleInvalid(f"{file}: how many scores there are is not fixed; list the concepts in config.yaml.")
    top = min(TOP_LIMIT, width)
    model.graph.initializer.append(numpy_helper.from_array(np.array([top], np.int64), "appliance_top"))
    model.graph.node.append(helper.make_node("TopK", [SCORES, "appliance_top"], [TOP_VALUES, TOP_INDICES], axis=1))
    del model.graph.output[:]
    model.graph.output.extend(
        [
            helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, ["batch", width]),
            helper.make_tensor_value_info(TOP_VALUES, TensorProto.FLOAT, ["batch", top]),
            helper.make_tensor_value_info(TOP_INDICES, TensorProto.INT64, ["batch", top]),
        ]
    )


def _check_embedding(model: ModelProto, embedding: EmbeddingOutput, file: Path) -> None:
    value = _output_value(model, embedding.output, "onnx.embedding.output", file)
    shape = axes(value)
    if len(shape) > 2 and None in shape[1:]:
        shown = ["?" if axis is None else axis for axis in shape]
        raise BundleInvalid(
            f"{file}: the output {value.name!r} has shape {shown}, which is not one vector a row; set "
            "onnx.embedding.pooling to mean or cls."
        )


def _wrap_pooling(model: ModelProto, section: OnnxSection, file: Path) -> None:
    """Replace the outputs by one vector a row, pooled over the tokens: (batch, dimensions).

    The mean is taken over unmasked tokens with two matrix products, which every operator set has in the same form.
    Source: mean pooling as in Reimers and Gurevych 2019 (Sentence-BERT), section 3.
    """
    assert section.embedding is not None
    assert section.text is not None
    value = _output_value(model, section.embedding.output, "onnx.embedding.output", file)
    if len(axes(value)) != 3:
        raise BundleInvalid(f"{file}: the output {value.name!r} is not (batch, tokens, dimensions): nothing to pool.")
    hidden = _as_float(model, value)
    if section.embedding.pooling == "cls":
        model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "appliance_first"))
        model.graph.node.append(helper.make_node("Gather", [hidden, "appliance_first"], [EMBEDDING], axis=1))
    else:
        if section.text.inputs.mask is None:
            raise BundleInvalid("onnx.embedding.pooling: mean needs onnx.text.inputs.mask.")
        model.graph.node.append(
            helper.make_node("Cast", [section.text.inputs.mask], ["appliance_mask"], to=TensorProto.FLOAT)
        )
        row = _reshape(model, "appliance_mask", [0, 1, -1], "appliance_mask_row")
        column = _reshape(model, "appliance_mask", [0, -1, 1], "appliance_mask_column")
        model.graph.node.extend(
            [
                helper.make_node("MatMul", [row, hidden], ["appliance_sum"]),
                helper.make_node("MatMul", [row, column], ["appliance_count"]),
                helper.make_node("Div", ["appliance_sum", "appliance_count"], ["appliance_mean"]),
            ]
        )
        _reshape(model, "appliance_mean", [0, -1], EMBEDDING)
    width = axes(value)[2]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(EMBEDDING, TensorProto.FLOAT, ["batch", width or "d"]))
