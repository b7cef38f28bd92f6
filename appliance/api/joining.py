"""What a workflow's node takes of the nodes before it: their outputs as an input of its model."""

from collections.abc import Iterator, Mapping

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2

from appliance.catalog.workflow_format import Node
from appliance.core.errors import NodeMismatch
from appliance.tasks.servable import Servable

_ONE_OF = {"image": "images", "text": "texts"}
"""Kinds of input that an output is passed on as by itself: what the node then takes."""


def joined(node: Node, servable: Servable, before: Mapping[str, resources_pb2.Data]) -> resources_pb2.Data:
    """The outputs of the nodes before a node as an input of its model. Raises: NodeMismatch: they do not fit."""
    kind = servable.task.kind
    if kind == "ndarray":
        return _arrays(node, servable, before)
    if len(before) > 1:
        raise NodeMismatch(
            f"Node {node.id!r} takes one input, and has {len(before)} nodes before it: {', '.join(map(repr, before))}."
        )
    name, data = next(iter(before.items()))
    if kind == "image" and data.HasField("image"):
        return resources_pb2.Data(image=data.image)
    if kind == "text" and (data.text.raw or data.string_value):
        return resources_pb2.Data(text=resources_pb2.Text(raw=data.text.raw or data.string_value))
    if kind not in _ONE_OF and data.ByteSize():
        return data  # a model whose own signature says what it takes
    raise _mismatch(node, _ONE_OF.get(kind, "something"), name, data)


def _arrays(node: Node, servable: Servable, before: Mapping[str, resources_pb2.Data]) -> resources_pb2.Data:
    """Arrays for a graph's inputs: a single one as it is, several by name; one without a name has its node's."""
    found: dict[str, resources_pb2.NDArray] = {}
    for name, data in before.items():
        arrays = dict(_arrays_of(name, data))
        if not arrays:
            raise _mismatch(node, "arrays", name, data)
        twice = sorted(set(arrays) & set(found))
        if twice:
            raise NodeMismatch(f"Node {node.id!r} would get the array {twice[0]!r} of several nodes before it.")
        found |= arrays
    inputs = [argument.name for argument in servable.task.method.arguments]
    if len(found) == len(inputs) == 1:
        return resources_pb2.Data(ndarray=next(iter(found.values())))
    missing = [name for name in inputs if name not in found]
    if missing:
        raise NodeMismatch(
            f"Node {node.id!r} takes the arrays {', '.join(map(repr, inputs))}, and the nodes before it give "
            f"{', '.join(map(repr, found))}; an array without a name has the id of its node."
        )
    parts = [resources_pb2.Part(id=name, data=resources_pb2.Data(ndarray=found[name])) for name in inputs]
    return resources_pb2.Data(parts=parts)


def _arrays_of(name: str, data: resources_pb2.Data) -> Iterator[tuple[str, resources_pb2.NDArray]]:
    """The arrays in an output; an embedding is one of float32."""
    if data.HasField("ndarray"):
        yield name, data.ndarray
    elif data.embeddings:
        vector = np.array(data.embeddings[0].vector, np.float32)
        yield name, resources_pb2.NDArray(buffer=vector.tobytes(), shape=vector.shape, dtype="float32")
    for part in data.parts:
        if part.data.HasField("ndarray"):
            yield part.id, part.data.ndarray


def _mismatch(node: Node, takes: str, name: str, data: resources_pb2.Data) -> NodeMismatch:
    given = ", ".join(field.name for field, _ in data.ListFields()) or "nothing"
    return NodeMismatch(f"Node {node.id!r} takes {takes}, and node {name!r} before it gives {given}.")
