"""Reading a graph: what an ONNX file says of itself, without its weights, and what is refused."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from appliance.catalog.bundle import check_inside
from appliance.core.errors import BundleInvalid

_KNOWN_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "ai.onnx.training"})


def read_graph(bundle: Path, file: Path) -> ModelProto:
    """The graph without its external tensors, checked for what we refuse.

    Raises: BundleInvalid: not ONNX; operators that need a custom library; tensors stored outside the bundle.
    """
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, onnx's own and OSError alike mean: cannot be read
        raise BundleInvalid(f"{file} is not an ONNX model: {error}") from error
    if not model.graph.output:
        raise BundleInvalid(f"{file} is not an ONNX model with outputs; export it again.")
    local = {function.domain for function in model.functions}
    nodes = list(every_node((*model.graph.node, *(node for function in model.functions for node in function.node))))
    for node in nodes:
        if node.domain not in _KNOWN_DOMAINS and node.domain not in local:
            raise BundleInvalid(
                f"{file}: the operator {node.domain}::{node.op_type} needs a custom library, which the appliance does "
                "not load; export the model with standard operators."
            )
    for tensor in (*_weights(model.graph), *(tensor for node in nodes for tensor in _tensors(node))):
        if tensor.data_location == TensorProto.EXTERNAL:
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            if not location or Path(location).is_absolute() or ".." in Path(location).parts:
                raise BundleInvalid(
                    f"{file}: the tensor {tensor.name!r} is stored at {location!r}, outside the bundle."
                )
            check_inside(bundle, file.parent / location)
    return model


def every_node(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those in the bodies of If, Loop and Scan."""
    for node in nodes:
        yield node
        for graph in _bodies(node):
            yield from every_node(graph.node)


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
