"""KServe V2 over REST, below `/kserve`: `/v2/models/…` is Clarifai's. JSON tensors, and Triton's binary tensor data.

A model's name is one path segment or three (`user/app/model`), percent-encoded or not. JSON has no bytes: a text is a
string as it is, a file is a string of base64. Errors are `{"error": "…"}` with the HTTP status of the error table.
Sources: kserve/open-inference-protocol, inference_rest; triton-inference-server/server, extension_binary_data.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from appliance.api import jsonbody, oip, status, web
from appliance.api.context import Context
from appliance.api.direct import Handler, Maker, ModelName
from appliance.api.jsonbody import dumped, objects, typed
from appliance.api.kserve import METRIC, Kserve
from appliance.api.replies import Reply
from appliance.core.config import Limits
from appliance.core.errors import InputTooLarge, InvalidArgument, InvalidInput, InvalidRequest, UnknownModel
from appliance.core.memory import Reservation
from appliance.core.types import Array
from appliance.wire import sentences

_HEADER_LENGTH = "inference-header-content-length"
_BINARY_SIZE = "binary_data_size"
_BINARY = "binary_data"
_ALL_BINARY = "binary_data_output"

_LARGE = 256 * 1024
"""Bytes of JSON from which it is read and written on a thread."""

_NUMBER = 64
"""Bytes of a number as an object and as digits."""

_PATH = re.compile(r"([^/]+(?:/[^/]+/[^/]+)??)(?:/versions/([^/]+))?(/ready|/infer)?")
"""What follows `/models/`: name, version, verb. A name is as short as the rest allows."""

_KINDS: Mapping[str, frozenset[type]] = {
    "b": frozenset({bool}),
    "i": frozenset({int}),
    "u": frozenset({int}),
    "f": frozenset({int, float}),
}
"""A dtype's kind → what its numbers are in JSON."""


@dataclass(slots=True)
class _Wanted:
    """One output that a request asks for."""

    name: str
    binary: bool


@dataclass(slots=True)
class _Asked:
    """An inference request, read.

    Attributes:
        all_binary: whether outputs come in binary form that do not say otherwise.
    """

    tensors: list[oip.Tensor]
    request_id: str = ""
    parameters: oip.Parameters = field(default_factory=dict)
    outputs: list[_Wanted] = field(default_factory=list)
    all_binary: bool = False


def kserve_routes(kserve: Kserve, doors: Maker) -> list[BaseRoute]:
    """The routes, all below `/kserve/v2`."""

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True}, headers=_FRESH)

    async def ready(request: Request) -> Response:
        return _ready({}, kserve.health.ready)

    async def server(request: Request) -> Response:
        async def handle(context: Context, body: bytes) -> Reply:
            return Reply(dumped(_plain(kserve.server())), _GOOD)

        return await _served(request, kserve, doors, "ServerMetadata", handle)

    async def index(request: Request) -> Response:
        async def handle(context: Context, body: bytes) -> Reply:
            asked = await jsonbody.load(body, context.memory) if body else {}
            found = kserve.index(context, typed(asked, "ready", bool, False, "a boolean"))
            return Reply(dumped(_plain(found)["models"]), _GOOD)

        return await _served(request, kserve, doors, "RepositoryIndex", handle)

    async def model(request: Request) -> Response:
        named = _PATH.fullmatch(request.path_params["path"])
        if named is None or named[3] == "/infer":
            return _nowhere(named is not None)
        name, version = named[1], named[2] or ""

        async def metadata(context: Context, body: bytes) -> Reply:
            return Reply(dumped(_plain(kserve.model(context, name, version))), _GOOD)

        async def readiness(context: Context, body: bytes) -> Reply:
            return Reply(dumped({"name": name, "ready": kserve.ready(context, name, version)}), _GOOD)

        if named[3] is None:
            return await _served(request, kserve, doors, "ModelMetadata", metadata)
        answer = await _served(request, kserve, doors, "ModelReady", readiness)
        if answer.status_code == 200:
            return _ready({"name": name}, json.loads(bytes(answer.body))["ready"])
        return answer

    async def infer(request: Request) -> Response:
        named = _PATH.fullmatch(request.path_params["path"])
        if named is None or named[3] != "/infer":
            return _nowhere(named is not None)
        name, version = named[1], named[2] or ""
        headers: dict[str, str] = {}

        async def handle(context: Context, body: bytes) -> Reply:
            limits = kserve.direct.config.limits
            asked = await _read(request.headers.get(_HEADER_LENGTH), body, context.memory, limits)
            wanted = [output.name for output in asked.outputs]
            model_name = ModelName.parse(name, version)
            answer = await oip.infer(kserve.direct, context, model_name, asked.tensors, wanted, asked.parameters)
            content, json_size = await _written(name, answer, asked, context.memory)
            if json_size is not None:
                headers.update({_HEADER_LENGTH: str(json_size), "content-type": "application/octet-stream"})
            return Reply(content, _GOOD)

        return await _served(request, kserve, doors, "ModelInfer", handle, headers)

    return [
        Route("/kserve/v2/health/live", live),
        Route("/kserve/v2/health/ready", ready),
        Route("/kserve/v2", server),
        Route("/kserve/v2/", server),
        Route("/kserve/v2/repository/index", index, methods=["POST"]),
        Route("/kserve/v2/models/{path:path}", model),
        Route("/kserve/v2/models/{path:path}", infer, methods=["POST"]),
    ]


# ---- replies ---------------------------------------------------------------------------------------------------------

_FRESH = {"cache-control": "no-store"}
_GOOD = int(status.SUCCESS.code)


async def _served(
    request: Request,
    kserve: Kserve,
    doors: Maker,
    name: str,
    handler: Handler,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The handler's reply, or the error. Args: headers: of a good reply, filled by the handler."""
    endpoint = doors.door(METRIC + name, handler)
    try:
        async with web.calling(request, METRIC + name) as call:
            content = await web.unary(request, call, endpoint, kserve.direct.config.limits.request_size)
    except Exception as error:
        found = web.status_of(error, request)
        return JSONResponse({"error": found.details}, status.http_of(found), web.headers_of(found))
    return Response(content, 200, {"content-type": "application/json", **(headers or {}), **web.timing_of(call)})


def _ready(said: Mapping[str, str], ready: bool) -> Response:
    return JSONResponse({**said, "ready": ready}, 200 if ready else 503, headers=_FRESH)


def _nowhere(known: bool) -> Response:
    if known:
        row, sentence = status.METHOD_NOT_ALLOWED, "…/infer is asked with POST; metadata and …/ready with GET."
    else:
        row, sentence = (
            status.TABLE[UnknownModel],
            "The path names no model: write models/model or models/user/app/model.",
        )
    return JSONResponse({"error": sentence}, row.http)


def _plain(message: Message) -> dict[str, Any]:
    """A message of the gRPC twin in this protocol's JSON: the same fields; 64-bit numbers are numbers."""
    content: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for tensor in (*content.get("inputs", ()), *content.get("outputs", ())):
        tensor["shape"] = [int(axis) for axis in tensor["shape"]]
    return content


async def _written(name: str, answer: oip.Answer, asked: _Asked, memory: Reservation) -> tuple[bytes, int | None]:
    """The reply's body, and how much of it is JSON where binary data follows.

    Raises: InvalidArgument: JSON cannot say a value. Overloaded.
    """
    binary = {output.name: output.binary for output in asked.outputs}
    as_json = {tensor.name for tensor in answer.tensors if not binary.get(tensor.name, asked.all_binary)}
    digits = (
        sum(
            len(tensor.values) if isinstance(tensor.values, list) else tensor.values.size
            for tensor in answer.tensors
            if tensor.name in as_json
        )
        * _NUMBER
    )
    memory.grow(digits)
    if digits < _LARGE:
        return _written_now(name, answer, asked.request_id, as_json)
    return await asyncio.to_thread(_written_now, name, answer, asked.request_id, as_json)


def _written_now(name: str, answer: oip.Answer, request_id: str, as_json: Set[str]) -> tuple[bytes, int | None]:
    outputs: list[dict[str, Any]] = []
    pieces: list[bytes | memoryview] = []
    for tensor in answer.tensors:
        output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if tensor.name in as_json:
            output["data"] = _listed(tensor)
        else:
            data = oip.to_bytes(tensor)
            pieces.append(data)
            output["parameters"] = {_BINARY_SIZE: len(data)}
        outputs.append(output)
    content = {"model_name": name, "model_version": answer.version, "outputs": outputs}
    head = dumped({"id": request_id, **content} if request_id else content)
    return b"".join((head, *pieces)), len(head) if pieces else None


def _listed(tensor: oip.Tensor) -> list[Any]:
    values = tensor.values
    if isinstance(values, list):
        return [element.decode() for element in values]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidArgument(
            f"The output {tensor.name!r} has values that are not finite, and JSON has no such numbers; ask for it with "
            f'"parameters": {{"{_BINARY}": true}}.'
        )
    listed: list[Any] = values.reshape(-1).tolist()
    return listed


# ---- requests --------------------------------------------------------------------------------------------------------


async def _read(header_length: str | None, body: bytes, memory: Reservation, limits: Limits) -> _Asked:
    """The request in a body. Raises: RequestError: it is none. Overloaded."""
    size = len(body)
    if header_length is not None:
        if not re.fullmatch(r"[0-9]{1,18}", header_length) or int(header_length) > size:
            raise InvalidRequest(
                f"Inference-Header-Content-Length is {header_length[:20]!r}; it is the length of the JSON before the "
                f"binary data, and the body has {size} bytes."
            )
        size = int(header_length)
    if len(body) - size > limits.request_size:  # only JSON may have half as many more
        raise InputTooLarge(sentences.request_too_large(limits.request_size))
    before = memory.count
    content = await jsonbody.load(body[:size], memory)
    if size < _LARGE:
        asked = _Asked(_tensors(content, memoryview(body)[size:], limits))
    else:
        asked = _Asked(await asyncio.to_thread(_tensors, content, memoryview(body)[size:], limits))
    asked.request_id = typed(content, "id", str, "", "a string")
    parameters = _parameters(content, "The request")
    asked.all_binary = parameters.pop(_ALL_BINARY, False) is True
    asked.parameters = parameters
    for output in objects(content, "outputs"):
        name = typed(output, "name", str, "", "a string")
        place = f"The output {name[:80]!r}"
        said = _parameters(output, place)
        oip.check_parameters(place, said, (_BINARY,))
        asked.outputs.append(_Wanted(name, said.get(_BINARY, asked.all_binary) is True))
    # Texts stay, and files are decoded; the objects of JSON are gone.
    kept = sum(tensor.values.nbytes for tensor in asked.tensors if not isinstance(tensor.values, list))
    memory.shrink_to(before + kept + 3 * size)
    return asked


def _parameters(content: Mapping[str, Any], place: str) -> dict[str, bool | int | float | str]:
    found = typed(content, "parameters", dict, {}, "a JSON object")
    for name, value in found.items():
        if not isinstance(value, bool | int | float | str):
            raise InvalidRequest(f"{place} has the parameter {name[:80]!r}, no text, number or boolean.")
    return dict(found)


def _tensors(content: Mapping[str, Any], binary: memoryview, limits: Limits) -> list[oip.Tensor]:
    tensors = []
    place = 0
    for given in objects(content, "inputs"):
        name = typed(given, "name", str, "", "a string")
        datatype = typed(given, "datatype", str, "", "a string")
        shape = _shape(given, name)
        said = _parameters(given, f"The input {name[:80]!r}")
        oip.check_parameters(f"The input {name[:80]!r}", said, (_BINARY_SIZE,))
        if _BINARY_SIZE not in said:
            tensors.append(_from_json(name, datatype, shape, given, limits))
            continue
        size = said[_BINARY_SIZE]
        if "data" in given:
            raise InvalidInput(f"The input {name[:80]!r} has data and {_BINARY_SIZE}; send one.")
        if type(size) is not int or not 0 <= size <= len(binary) - place:
            raise InvalidInput(
                f"The input {name[:80]!r} says {_BINARY_SIZE} {str(size)[:20]}; {len(binary) - place} bytes are left."
            )
        tensors.append(oip.from_bytes(name, datatype, shape, binary[place : place + size], limits))
        place += size
    if place != len(binary):
        raise InvalidInput(f"The body has {len(binary) - place} bytes of binary data that belong to no input.")
    return tensors


def _shape(given: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = given.get("shape")
    if not isinstance(shape, list) or not all(type(axis) is int for axis in shape):
        raise InvalidInput(f"The input {name[:80]!r} has no shape that is a list of whole numbers.")
    return tuple(shape)


def _from_json(
    name: str, datatype: str, shape: tuple[int, ...], given: Mapping[str, Any], limits: Limits
) -> oip.Tensor:
    dtype = oip.dtype_of(name, datatype)
    oip.count_of(name, shape)
    if "data" not in given:
        raise InvalidInput(f"The input {name[:80]!r} has no data.")
    values = _flat(name, shape, given["data"])
    if dtype is None:
        if not all(isinstance(value, str) for value in values):
            raise InvalidInput(f"The input {name[:80]!r} is BYTES; its data must be strings.")
        return oip.from_texts(name, shape, values, limits)
    if not {type(value) for value in values} <= _KINDS[dtype.kind]:
        raise InvalidInput(f"The input {name[:80]!r} is {datatype}, and its data has something else in it.")
    return oip.from_array(name, datatype, shape, _numbers(name, datatype, dtype, values))


def _numbers(name: str, datatype: str, dtype: "np.dtype[Any]", values: Sequence[Any]) -> Array:
    try:
        if dtype.kind != "f":
            return np.array(values, dtype)
        wide = np.array(values, np.float64)
    except OverflowError:
        raise InvalidInput(f"The input {name[:80]!r} has values that {datatype} cannot hold.") from None
    if not np.isfinite(wide).all():  # 1e999, say
        raise InvalidInput(f"The input {name[:80]!r} has values that {datatype} cannot hold.")
    with np.errstate(over="ignore"):  # a float too large for a narrower one is infinite, as everywhere
        return wide.astype(dtype)


def _flat(name: str, shape: tuple[int, ...], data: Any) -> list[Any]:
    """The elements in C order, of a list that is flat or nested as the shape says. Raises: InvalidInput."""
    if not isinstance(data, list):
        raise InvalidInput(f"The input {name[:80]!r} has data that is no list.")
    values, depth = data, 0
    while values and isinstance(values[0], list):
        depth += 1
        if depth >= len(shape) or not all(isinstance(v, list) and len(v) == shape[depth] for v in values):
            raise InvalidInput(f"The input {name[:80]!r} has data that is nested otherwise than shape {list(shape)}.")
        values = [element for value in values for element in value]
    if depth and (depth != len(shape) - 1 or len(data) != shape[0]):
        raise InvalidInput(f"The input {name[:80]!r} has data that is nested otherwise than shape {list(shape)}.")
    return values
