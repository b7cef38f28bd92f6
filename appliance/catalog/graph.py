"""Reading a graph: what an ONNX file says of itself, without its weights, and what is refused."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from appliance.catalog.bundle import check_inside
from appliance.core.errors import BundleInvalid

_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "ai.onnx.training"})


_SMALL_TENSOR = 1024
"""Bytes of a tensor up to which it stays in the graph: shapes and scales, which onnxruntime wants to see early."""

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers in ModelProto, GraphProto and TensorProto (onnx/onnx onnx/onnx.proto)."""

_BYTES = 2
"""The wire type of strings, bytes and messages (protobuf.dev, Encoding)."""

Content: TypeAlias = bytes | memoryview


def read_graph(bundle: Path, file: Path) -> ModelProto:
    """The graph without its large tensors, checked for what we refuse.

    Raises: BundleInvalid: not ONNX; operators that need a custom library; tensors stored outside the bundle.
    """
    return parse_graph(bundle, file, read_file(file))


def read_file(file: Path) -> bytes:
    """All of an ONNX file, or of one with weights. Raises: BundleInvalid: it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise BundleInvalid(f"{file} cannot be read: {error.strerror}.") from error


def parse_graph(bundle: Path, file: Path, content: Content) -> ModelProto:
    """The graph in `content`, which was read from `file`; its large tensors refer to that file by its name.

    Raises: BundleInvalid: as `read_graph`.
    """
    model = ModelProto()
    try:
        try:
            model.ParseFromString(without_weights(content, file.name))
        except (ValueError, IndexError):  # no protobuf, or something in it that we do not read: its own words say what
            model.ParseFromString(bytes(content))
    except Exception as error:  # protobuf's DecodeError
        raise BundleInvalid(f"{file} is not an ONNX model: {error}") from error
    if not model.graph.output:
        raise BundleInvalid(f"{file} is not an ONNX model with outputs; export it again.")
    local = {function.domain for function in model.functions}
    for node in _nodes(model):
        if node.domain not in _KNOWN_DOMAINS and node.domain not in local:
            raise BundleInvalid(
                f"{file}: the operator {node.domain}::{node.op_type} needs a custom library, which the appliance does "
                "not load; export the model with standard operators."
            )
    for location in locations(model):
        if not location or Path(location).is_absolute() or ".." in Path(location).parts:
            raise BundleInvalid(f"{file}: a tensor is stored at {location!r}, outside the bundle.")
        check_inside(bundle, file.parent / location)
    return model


def locations(model: ModelProto) -> list[str]:
    """The files that tensors are stored in, as the graph names them: relative to the folder it lies in."""
    tensors = (*_weights(model.graph), *(tensor for node in _nodes(model) for tensor in _tensors(node)))
    found = (
        next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        for tensor in tensors
        if tensor.data_location == TensorProto.EXTERNAL
    )
    return list(dict.fromkeys(found))


def without_weights(content: Content, location: str) -> bytes:
    """A serialised model whose large tensors are not in it but referred to: they lie in `content`, named `location`.

    Looks at the fields around the tensors only, so a file of gigabytes costs what its graph costs.

    Raises: ValueError, IndexError: it is not what protobuf writes.
    """
    view = memoryview(content)
    return b"".join(_copied(view, 0, len(view), (_GRAPH, _INITIALIZER), location))


def _copied(view: memoryview, start: int, end: int, path: tuple[int, ...], location: str) -> Iterator[Content]:
    """The message in these bytes, in pieces; what `path` leads to is copied without its large raw data."""
    kept = start
    for number, wire, field, body, after in _fields(view, start, end):
        if number != path[0] or wire != _BYTES or after - body <= _SMALL_TENSOR:
            continue
        if len(path) > 1:
            inner = b"".join(_copied(view, body, after, path[1:], location))
        else:
            inner = _referring(view, body, after, location)
        yield view[kept:field]
        yield _varint(number << 3 | _BYTES) + _varint(len(inner))
        yield inner
        kept = after
    yield view[kept:end]


def _referring(view: memoryview, start: int, end: int, location: str) -> bytes:
    """A tensor without its raw data, and where that is; as it was when it has none, or little."""
    raw, others = (start, start), []
    for number, wire, field, body, after in _fields(view, start, end):
        if number == _RAW_DATA and wire == _BYTES:
            raw = (body, after)
        else:
            others.append(view[field:after])
    if raw[1] - raw[0] <= _SMALL_TENSOR:
        return bytes(view[start:end])
    tensor = TensorProto()
    tensor.ParseFromString(b"".join(others))
    if tensor.data_location == TensorProto.EXTERNAL:  # it says two things; onnxruntime judges
        return bytes(view[start:end])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(raw[0])), ("length", str(raw[1] - raw[0]))):
        tensor.external_data.add(key=key, value=value)
    return tensor.SerializeToString()


def _fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each field of a message: number, wire type, where it begins, where its content begins, and where it ends."""
    place = start
    while place < end:
        tag, body = _read_varint(view, place)
        wire = tag & 7
        if wire == 0:
            after = _read_varint(view, body)[1]
        elif wire == _BYTES:
            length, body = _read_varint(view, body)
            after = body + length
        elif wire in (1, 5):
            after = body + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if after > end:
            raise ValueError("a field is longer than its message")
        yield tag >> 3, wire, place, body, after
        place = after


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    """The number there, and where it ends (protobuf.dev, Encoding: base 128 varints)."""
    value = 0
    for shift in range(0, 70, 7):
        byte = view[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")


def _varint(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _nodes(model: ModelProto) -> list[NodeProto]:
    return list(every_node((*model.graph.node, *(node for function in model.functions for node in function.node))))


def every_node(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those in the bodies of If, Loop and Scan."""
    for node in nodes:
        yield node
        for graph in _bodies(node):
            yield from every_node(graph.node)


def every_body(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an If, Loop or Scan, and those of the nodes in there."""
    for inner in every_node((node,)):
        yield from _bodies(inner)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs


def _weights(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _tensors(node: NodeProto) -> Iterator[TensorProto]:
    """Tensors that a node carries in its attributes, and the weights of its bodies; those of nodes in there not."""
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
    for graph in _bodies(node):
        yield from _weights(graph)


def graph_inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller feeds: old exporters list initializers among them."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def axes(value: onnx.ValueInfoProto) -> list[int | None]:
    """Shape of a graph input or output: a number for a fixed axis, None for a dynamic one."""
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
