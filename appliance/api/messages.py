"""Between Clarifai's messages and our own types: inputs to payloads, answers to data, servables to models."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from appliance.api import methods, status
from appliance.catalog.repository import Version
from appliance.core.errors import ApplianceError, InvalidInput, NotDeployed, NotReady
from appliance.core.types import Array, Concept, ConceptScores, Embedding, Payload, Result, Tensors
from appliance.media.text import decode_text
from appliance.tasks.servable import Servable

_NDARRAY_LIMIT = 32
"""Axes an array may have: NumPy's own bound in its older releases, far beyond any graph."""

_DTYPE_LIMIT = 16
"""Characters a dtype's name may have; NumPy reads a long list of field types for minutes."""


# ---- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UrlInput:
    """An input that lies behind a URL, to be fetched first; `finish` makes the payload of its bytes."""

    url: str
    finish: Callable[[bytes], Payload]


def payload_of(kind: str, data: resources_pb2.Data) -> Payload | UrlInput:
    """What a task of that kind ("image", "text", "ndarray") takes from `data`, in the old form.

    Raises: InvalidInput: it carries neither bytes nor a URL, or an array that contradicts itself.
    """
    if kind == "image":
        return _image(data)
    if kind == "text":
        return _text(data)
    return Payload(arrays=_arrays(data))


def payload_of_arguments(
    kind: str, data: resources_pb2.Data, given: "dict[str, resources_pb2.Data]"
) -> Payload | UrlInput:
    """The same for a pythonic call: `data` is the task's own argument, `given` all of them (for raw tensors)."""
    if kind != "ndarray":
        return payload_of(kind, data)
    return Payload(arrays={name: _array(part.ndarray, name) for name, part in given.items()})


def _image(data: resources_pb2.Data) -> Payload | UrlInput:
    if not data.HasField("image"):
        return Payload(text=_raw_text(data))
    if data.image.base64:
        return Payload(image=data.image.base64)
    if data.image.url:
        return UrlInput(data.image.url, lambda body: Payload(image=body))
    return Payload(image=b"")


def _text(data: resources_pb2.Data) -> Payload | UrlInput:
    if data.HasField("text") and data.text.url and not data.text.raw:
        return UrlInput(data.text.url, lambda body: Payload(text=decode_text(body)))
    text = _raw_text(data)
    if text is None and data.HasField("image"):
        return Payload(image=data.image.base64)
    return Payload(text=text)


def _raw_text(data: resources_pb2.Data) -> str | None:
    if data.HasField("text"):
        return data.text.raw
    return data.string_value or None


def _arrays(data: resources_pb2.Data) -> dict[str, Array]:
    if data.HasField("ndarray"):
        return {"": _array(data.ndarray, "")}
    return {part.id: _array(part.data.ndarray, part.id) for part in data.parts if part.data.HasField("ndarray")}


def _array(message: resources_pb2.NDArray, name: str) -> Array:
    """Bytes, shape and dtype as an array (C order, the machine's byte order).

    Raises: InvalidInput: they contradict each other, or the dtype is not numeric.
    """
    label = f"The array {name[:80]!r}" if name else "The array"
    try:
        if not 0 < len(message.dtype) <= _DTYPE_LIMIT:
            raise ValueError("no name of a number's type is that long")
        dtype = np.dtype(message.dtype)
    except Exception as error:  # its parser raises TypeError, ValueError, SyntaxError, warnings and more
        raise InvalidInput(f"{label} has dtype {message.dtype[:40]!r}; use a NumPy name such as float32.") from error
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise InvalidInput(f"{label} has dtype {message.dtype[:40]!r}; numbers are needed, of 64 bits at most.")
    shape = tuple(message.shape)
    if len(shape) > _NDARRAY_LIMIT:
        raise InvalidInput(f"{label} has {len(shape)} axes; the limit is {_NDARRAY_LIMIT}.")
    # Python's integers: a product that overflowed could agree with the buffer by accident.
    count = 1
    for axis in shape:
        count *= axis
    if count * dtype.itemsize != len(message.buffer):
        raise InvalidInput(
            f"{label} of shape {list(shape)} and dtype {dtype} needs {count * dtype.itemsize} bytes; its buffer has "
            f"{len(message.buffer)}."
        )
    try:
        return np.frombuffer(message.buffer, dtype).reshape(shape)
    except ValueError as error:  # nothing in it, and axes whose product is too large all the same
        raise InvalidInput(f"{label} of shape {list(shape)} is larger than any array can be.") from error


# ---- answers ---------------------------------------------------------------------------------------------------------


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


def fill_input(output: resources_pb2.Output, given: resources_pb2.Input) -> None:
    """Echo an input: its id (or a new one) and its URL; bytes are not sent back."""
    output.input.id = given.id or new_id()
    data = given.data
    for field in ("image", "text"):
        if data.HasField(field):
            url = getattr(data, field).url
            if url:
                getattr(output.input.data, field).url = url


def new_id() -> str:
    """32 hex digits, as Clarifai's own ids."""
    return os.urandom(16).hex()


def timestamp(seconds: float) -> Timestamp:
    """Unix time as a message."""
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def now() -> Timestamp:
    """The current time as a message."""
    nanoseconds = time.time_ns()
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


# ---- models ----------------------------------------------------------------------------------------------------------


def model_brief(version: Version[Servable]) -> resources_pb2.Model:
    """The model as each output names it."""
    config = version.config
    model = resources_pb2.Model(
        id=config.key.model_id,
        name=config.name,
        app_id=config.key.app_id,
        user_id=config.key.user_id,
        model_type_id=config.model_type_id,
        created_at=timestamp(version.first_seen),
    )
    model.model_version.CopyFrom(
        resources_pb2.ModelVersion(
            id=version.id,
            created_at=timestamp(version.first_seen),
            app_id=config.key.app_id,
            user_id=config.key.user_id,
            status=version_status(version),
        )
    )
    return model


def model_full(version: Version[Servable]) -> resources_pb2.Model:
    """The model as GetModel and ListModels show it: with its newest version's signatures and parameters."""
    model = model_brief(version)
    model.description = version.config.description
    model.modified_at.CopyFrom(timestamp(version.loaded_at or version.first_seen))
    model.model_version.CopyFrom(version_full(version))
    model.output_info.message = "Show output_info with: GetModelOutputInfo"
    return model


def version_full(version: Version[Servable]) -> resources_pb2.ModelVersion:
    """A version with its method signatures."""
    message = model_brief(version).model_version
    message.description = version.config.description
    if version.loaded_at:
        message.completed_at.CopyFrom(timestamp(version.loaded_at))
    servable = version.servable
    if servable is not None:
        message.active_concept_count = len(servable.concepts)
        message.method_signatures.append(methods.signature(servable.task.method))
    for name, value in version.config.compute.items():
        field = resources_pb2.ComputeInfo.DESCRIPTOR.fields_by_name.get(name)
        if field is not None and isinstance(value, str | int) and not isinstance(value, bool):
            _set_if_fits(message.inference_compute_info, name, value)
    return message


def output_info(servable: Servable, default_concepts: int) -> resources_pb2.OutputInfo:
    """What a model can say, and how its answers are cut unless the caller says otherwise."""
    info = resources_pb2.OutputInfo(message="Show output_info with: GetModelOutputInfo")
    info.data.concepts.extend(concept_messages(servable))
    if servable.concepts:
        info.output_config.max_concepts = default_concepts
    return info


def concept_messages(servable: Servable) -> list[resources_pb2.Concept]:
    """The model's concepts in output order."""
    key = servable.key
    return [
        resources_pb2.Concept(id=concept.id, name=concept.name, app_id=key.app_id, user_id=key.user_id)
        for concept in servable.concepts
    ]


def version_status(version: Version[Servable]) -> status_pb2.Status:
    """21100 for a version that answers; otherwise what a prediction would be told."""
    if version.ready:
        return status.of_row(status.READY_VERSION, "")
    died = version.servable is not None and version.servable.problem
    row = status.TABLE[NotDeployed if version.problem or died else NotReady]
    return status.of_row(row, "")


def _set_if_fits(message: resources_pb2.ComputeInfo, name: str, value: str | int) -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError):
        # The operator's note about the machine is not worth refusing a model for.
        return


def fill_error(output: resources_pb2.Output, given: resources_pb2.Input, error: ApplianceError, req_id: str) -> None:
    """Make the output of an input that failed: its id, its own status, no data."""
    output.id = new_id()
    output.status.CopyFrom(status.of_error(error, req_id))
    output.created_at.CopyFrom(now())
    fill_input(output, given)


def conclude(response: service_pb2.MultiOutputResponse, good: int, note: str, req_id: str) -> None:
    """Set the top status: all good → SUCCESS, some → MIXED_STATUS, none → FAILURE."""
    outputs = response.outputs
    row = status.SUCCESS if good == len(outputs) and not note else status.MIXED if good else status.FAILURE
    details = note
    if good < len(outputs):
        first = next(output.status for output in outputs if output.status.code != status.SUCCESS.code)
        failed = f"{len(outputs) - good} of {len(outputs)} inputs failed"
        details = f"{failed}; the first one with {status.name_of(first.code)}: {first.details}"
    response.status.CopyFrom(status.of_row(row, details, req_id))
