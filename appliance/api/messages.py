"""Between Clarifai's messages and our own types: inputs to payloads, answers to data, servables to models."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clarifai_grpc.grpc.api import resources_pb2
from clarifai_grpc.grpc.api.status import status_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from appliance.api import arrays, methods, status
from appliance.api.contents import HERE, NOTHING, Contents, Fields
from appliance.catalog.view import Version
from appliance.core.errors import ApplianceError, NotDeployed, NotReady
from appliance.core.types import Array, FieldType, Payload
from appliance.media.text import decode_text
from appliance.tasks.servable import Servable

# ---- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UrlInput:
    """An input that lies behind a URL, to be fetched first; `finish` makes the payload of its bytes.

    Attributes:
        finish: one function a kind: inputs with the same URL and the same `finish` are fetched once.
        kind: IMAGE, TEXT, AUDIO or VIDEO, whose size limit holds.
    """

    url: str
    finish: Callable[[bytes], Payload]
    kind: FieldType = FieldType.IMAGE


def payload_of(kind: str, data: resources_pb2.Data, contents: Contents = NOTHING) -> Payload | UrlInput:
    """What a task of that kind ("image", "text", "ndarray") takes from `data`, in the old form.

    Args:    contents: what was left out of `data`.
    Raises: InvalidInput: it carries neither bytes nor a URL, or an array that contradicts itself.
    """
    if kind == "image":
        return _image(data, contents.get(HERE, NOTHING))
    if kind == "text":
        return _text(data)
    return Payload(arrays=_arrays(data, contents))


def payload_of_arguments(
    kind: str, name: str, given: "Mapping[str, resources_pb2.Data]", contents: Mapping[str, Fields] = NOTHING
) -> Payload | UrlInput:
    """The same for a pythonic call.

    Args:
        name: the task's own argument; raw tensors take all.
        contents: what was left out of the arguments, by their names.
    """
    if kind != "ndarray":
        return payload_of(kind, given.get(name, resources_pb2.Data()), {HERE: contents.get(name, NOTHING)})
    return Payload(
        arrays={
            name: arrays.array(part.ndarray, name, contents.get(name, NOTHING).get("ndarray"))
            for name, part in given.items()
        }
    )


def _image(data: resources_pb2.Data, contents: Fields) -> Payload | UrlInput:
    if "image" in contents:
        return Payload(image=contents["image"])
    if not data.HasField("image"):
        return Payload(text=_raw_text(data))
    image = data.image
    content = image.base64
    if not content and image.url:
        return UrlInput(image.url, _image_behind)
    return Payload(image=content)


def _text(data: resources_pb2.Data) -> Payload | UrlInput:
    if data.HasField("text") and data.text.url and not data.text.raw:
        return UrlInput(data.text.url, _text_behind, FieldType.TEXT)
    text = _raw_text(data)
    if text is None and data.HasField("image"):
        return Payload(image=data.image.base64)
    return Payload(text=text)


def _image_behind(body: bytes) -> Payload:
    return Payload(image=body)


def _text_behind(body: bytes) -> Payload:
    return Payload(text=decode_text(body))


def _raw_text(data: resources_pb2.Data) -> str | None:
    if data.HasField("text"):
        return data.text.raw
    return data.string_value or None


def _arrays(data: resources_pb2.Data, contents: Contents) -> dict[str, Array]:
    if data.HasField("ndarray"):
        return {"": arrays.array(data.ndarray, "", contents.get(HERE, NOTHING).get("ndarray"))}
    return {
        part.id: arrays.array(part.data.ndarray, part.id, contents.get(number, NOTHING).get("ndarray"))
        for number, part in enumerate(data.parts)
        if part.data.HasField("ndarray")
    }


# ---- answers ---------------------------------------------------------------------------------------------------------


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
    """32 random hex digits, as Clarifai's own ids. They tell things apart and keep no secret."""
    if not _ids:  # asking the system is dear, so many are made at once
        digits = os.urandom(16 * _IDS_AT_ONCE).hex()
        _ids.extend(digits[start : start + 32] for start in range(0, len(digits), 32))
    return _ids.pop()


_IDS_AT_ONCE = 256
_ids: list[str] = []
os.register_at_fork(after_in_child=_ids.clear)  # two processes must not give the same ids


def timestamp(seconds: float) -> Timestamp:
    """Unix time as a message."""
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def now() -> Timestamp:
    """The current time as a message."""
    nanoseconds = time.time_ns()
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


PRIVATE = resources_pb2.Visibility(gettable=resources_pb2.Visibility.Gettable.PRIVATE)
"""Who sees what is here: the caller's own."""


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
        message.method_signatures.extend(methods.signature(offer.task.method) for offer in servable.offers.values())
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


def conclusion(count: int, failures: Sequence[ApplianceError], note: str, req_id: str) -> status_pb2.Status:
    """The top status of `count` outputs: all good → SUCCESS, some → MIXED_STATUS, none → FAILURE."""
    row = status.SUCCESS if not failures and not note else status.MIXED
    if failures and len(failures) == count:
        row = status.failure_of(failures)
    details = note
    if failures:
        first = failures[0]
        failed = f"{len(failures)} of {count} inputs failed"
        details = f"{failed}; the first one with {status.name_of(status.row_of(first).code)}: {first}"
    return status.of_row(row, details, req_id)
