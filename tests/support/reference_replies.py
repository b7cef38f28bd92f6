"""Predict replies built as messages, field by field: what the joined ones must parse to."""

from collections.abc import Sequence

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import messages, status
from appliance.core.errors import ApplianceError
from appliance.core.types import Array, Concept, ConceptScores, Embedding, Result, Tensors


def reply(
    inputs: Sequence[resources_pb2.Input],
    answers: Sequence[Result | ApplianceError],
    *,
    model: resources_pb2.Model | None,
    concepts: Sequence[Concept],
    app_id: str,
    pythonic: bool,
    note: str,
    req_id: str,
) -> service_pb2.MultiOutputResponse:
    """The whole reply; ids and times are whatever they are now."""
    response = service_pb2.MultiOutputResponse()
    failures = []
    for given, answer in zip(inputs, answers, strict=True):
        output = response.outputs.add()
        if isinstance(answer, ApplianceError):
            messages.fill_error(output, given, answer, req_id)
            failures.append(answer)
            continue
        if model is not None:
            output.model.CopyFrom(model)
        output.created_at.CopyFrom(messages.now())
        output.status.CopyFrom(status.success(req_id))
        output.id = messages.new_id()
        messages.fill_input(output, given)
        fill = fill_return if pythonic else fill_data
        fill(output.data, answer, concepts, app_id)
    response.status.CopyFrom(messages.conclusion(len(response.outputs), failures, note, req_id))
    return response


def fill_data(data: resources_pb2.Data, result: Result, concepts: Sequence[Concept], app_id: str) -> None:
    """Write an answer where callers of the old form look for it: concepts, embeddings, ndarray."""
    if isinstance(result, ConceptScores):
        _fill_concepts(data, result, concepts, app_id)
    elif isinstance(result, Embedding):
        data.embeddings.add(vector=result.vector.tolist(), num_dimensions=len(result.vector))
    elif len(result.arrays) == 1:
        _fill_array(data.ndarray, next(iter(result.arrays.values())))
    else:
        _fill_named(data, result)


def fill_return(data: resources_pb2.Data, result: Result, concepts: Sequence[Concept], app_id: str) -> None:
    """Write an answer where pythonic callers look for it: `parts[0]` with id `return`, of the signature's type."""
    part = data.parts.add(id="return").data
    if isinstance(result, ConceptScores):
        _fill_concepts(part, result, concepts, app_id)
    elif isinstance(result, Embedding):
        _fill_array(part.ndarray, result.vector)
    elif len(result.arrays) == 1:
        _fill_array(part.ndarray, next(iter(result.arrays.values())))
    else:
        _fill_named(part, result)


def _fill_concepts(data: resources_pb2.Data, scores: ConceptScores, concepts: Sequence[Concept], app_id: str) -> None:
    add = data.concepts.add
    for index, value in zip(scores.indices, scores.values, strict=True):
        concept = concepts[index]
        add(id=concept.id, name=concept.name, value=value, app_id=app_id)


def _fill_named(data: resources_pb2.Data, tensors: Tensors) -> None:
    for name, array in tensors.arrays.items():
        _fill_array(data.parts.add(id=name).data.ndarray, array)


def _fill_array(message: resources_pb2.NDArray, array: Array) -> None:
    message.buffer = np.ascontiguousarray(array).tobytes()
    message.shape.extend(array.shape)
    message.dtype = array.dtype.name
