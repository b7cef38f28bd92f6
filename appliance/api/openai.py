"""OpenAI's surface, where Clarifai has it: `/v2/ext/openai/v1`. Models and embeddings; all else says it is not here.

A model's id is `user/app/models/model[/versions/version]`, or Clarifai's URL of it; `Bearer` stands before the key.
Errors are OpenAI's shape with the HTTP status of the error table, so that its clients raise and retry as they do there.
Sources: PROTOCOL 2.7; OpenAI API reference, "Embeddings", "Models", "Error codes".
"""

import asyncio
import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from appliance.api import jsonbody, oip, status, web
from appliance.api.context import Context
from appliance.api.direct import Direct, Handler, Maker, ModelName
from appliance.api.jsonbody import dumped
from appliance.api.limits import check_input_count
from appliance.api.replies import Reply
from appliance.catalog.view import Version
from appliance.core.errors import InvalidArgument, InvalidInput, NotServed, UnknownModel
from appliance.core.types import Array, Embedding, ModelKey, Payload, PredictOptions
from appliance.tasks.embedder import Embedder
from appliance.tasks.servable import Servable

_BASE = "/v2/ext/openai/v1"
_METRIC = "openai."
_GOOD = int(status.SUCCESS.code)

_ID = re.compile(r"(?:https?://[^/]+/)?([^/]+)/([^/]+)/models/([^/]+)(?:/versions/([^/]+))?")
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_DATA_URI_HEAD = 64
"""Characters in which the head of a data URI must end."""

_NUMBER = 64
"""Bytes of a number as an object and as digits."""

_LARGE = 256 * 1024
"""Bytes of a request from which its pictures are decoded on a thread."""

_MANY = 16_384
"""Numbers from which a reply is written on a thread."""

_TAKEN = ("dimensions", "encoding_format", "input", "model", "user")

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
"""HTTP status → OpenAI's `type` and `code`; what is not here is a fault of the request, or below of the server."""


class ParameterInvalid(InvalidArgument):
    """A member of the request that is not as it must be.

    Attributes: param: its name.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def openai_routes(direct: Direct, doors: Maker) -> list[BaseRoute]:
    """The routes, all below `/v2/ext/openai/v1`."""

    async def list_models(request: Request) -> Response:
        async def handle(context: Context, body: bytes) -> Reply:
            newest: dict[ModelKey, Version[Servable]] = {}
            for version in direct.versions(context):
                if version.ready:
                    newest.setdefault(version.config.key, version)
            return Reply(dumped({"object": "list", "data": [_model(version) for version in newest.values()]}), _GOOD)

        return await _served(request, direct, doors, "models", handle)

    async def retrieve_model(request: Request) -> Response:
        async def handle(context: Context, body: bytes) -> Reply:
            text = request.path_params["model"]
            found = direct.versions_of(context, model_name(text))
            if not found:
                raise UnknownModel(f"The model {text[:200]!r} has no version.")
            return Reply(dumped(_model(found[0])), _GOOD)

        return await _served(request, direct, doors, "models", handle)

    async def embeddings(request: Request) -> Response:
        async def handle(context: Context, body: bytes) -> Reply:
            return await _embeddings(direct, context, body)

        return await _served(request, direct, doors, "embeddings", handle)

    async def others(request: Request) -> Response:
        async def handle(context: Context, body: bytes) -> Reply:
            path = request.path_params["path"]
            raise NotServed(
                f"This appliance does not serve {_BASE}/{path[:80]}: it has no language models. What it serves is "
                "/models and /embeddings."
            )

        return await _served(request, direct, doors, "others", handle)

    return [
        Route(f"{_BASE}/models", list_models),
        Route(f"{_BASE}/models/{{model:path}}", retrieve_model),
        Route(f"{_BASE}/embeddings", embeddings, methods=["POST"]),
        Route(f"{_BASE}/{{path:path}}", others, methods=["GET", "POST", "DELETE"]),
    ]


def model_name(text: str) -> ModelName:
    """The model that an id, or a URL of Clarifai's, names. Raises: UnknownModel."""
    found = _ID.fullmatch(text)
    if found is not None:
        return ModelName(found[1], found[2], found[3], found[4] or "")
    if "/" in text:
        raise UnknownModel(f"{text[:200]!r} names no model; a model's id is user/app/models/model here.")
    return ModelName.parse(text)


# ---- replies ---------------------------------------------------------------------------------------------------------


async def _served(request: Request, direct: Direct, doors: Maker, name: str, handler: Handler) -> Response:
    """The handler's reply, or the error in OpenAI's shape."""
    req_ids: list[str] = []

    async def noted(context: Context, body: bytes) -> Reply:
        req_ids.append(context.req_id)
        return await handler(context, body)

    try:
        async with web.calling(request, _METRIC + name) as call:
            content = await web.unary(
                request, call, doors.door(_METRIC + name, noted), direct.config.limits.request_size
            )
    except Exception as error:
        return _problem(error, request)
    headers = {"content-type": "application/json", "x-request-id": "".join(req_ids), **web.timing_of(call)}
    return Response(content, 200, headers)


def _problem(error: Exception, request: Request) -> Response:
    found = web.status_of(error, request)
    http = status.http_of(found)
    cause = error.error if isinstance(error, status.Refusal) else error
    content = {
        "message": found.details,
        "type": _TYPES.get(http, "invalid_request_error" if http < 500 else "server_error"),
        "param": cause.param if isinstance(cause, ParameterInvalid) else None,
        "code": _code(cause, http, found.code),
    }
    headers = {**web.headers_of(found), "x-request-id": found.req_id}
    return JSONResponse({"error": content}, http, headers)


def _code(cause: Exception, http: int, code: int) -> str:
    if isinstance(cause, UnknownModel):
        return "model_not_found"
    return _CODES.get(http) or status.name_of(code).lower()


def _model(version: Version[Servable]) -> dict[str, Any]:
    key = version.config.key
    return {
        "id": f"{key.user_id}/{key.app_id}/models/{key.model_id}",
        "object": "model",
        "created": int(version.first_seen),
        "owned_by": key.user_id,
    }


# ---- embeddings ------------------------------------------------------------------------------------------------------


async def _embeddings(direct: Direct, context: Context, body: bytes) -> Reply:
    """Raises: RequestError: the request is at fault. CapacityError, ModelError."""
    asked = await jsonbody.load(body, context.memory)
    for name in asked:
        if name not in _TAKEN:
            raise ParameterInvalid(name[:80], f"Unknown parameter {name[:80]!r}; known are {', '.join(_TAKEN)}.")
    model = asked.get("model")
    if not isinstance(model, str) or not model:
        raise ParameterInvalid("model", "'model' must be a text: user/app/models/model.")
    as_base64 = _encoding(asked)
    inputs = _inputs(asked.get("input"))
    check_input_count(len(inputs), direct.config.limits)
    with direct.serving(context, model_name(model)) as servable:
        if not isinstance(servable.task, Embedder):
            raise ParameterInvalid(
                "model", f"Model {servable.key} is a {servable.config.model_type_id}; embeddings need an embedder."
            )
        _check_dimensions(asked, oip.dimensions(servable))
        given = servable.task.kind, inputs
        payloads = _payloads(*given) if len(body) < _LARGE else await asyncio.to_thread(_payloads, *given)
        results = await direct.results(context, servable, payloads, PredictOptions())
    vectors = [result.vector for result in results if isinstance(result, Embedding)]
    _check_dimensions(asked, len(vectors[0]))
    tokens = sum(payload.tokens for payload in payloads)
    count = sum(vector.size for vector in vectors)
    context.memory.grow(count * (8 if as_base64 else _NUMBER))
    if count < _MANY:
        return Reply(_reply(model, vectors, as_base64, tokens), _GOOD)
    return Reply(await asyncio.to_thread(_reply, model, vectors, as_base64, tokens), _GOOD)


def _reply(model: str, vectors: Sequence[Array], as_base64: bool, tokens: int) -> bytes:
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, as_base64)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return dumped({"object": "list", "data": data, "model": model, "usage": usage})


def _encoding(asked: Mapping[str, Any]) -> bool:
    """Whether vectors are wanted as base64."""
    encoding = asked.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise ParameterInvalid("encoding_format", '\'encoding_format\' must be "float" or "base64".')
    return bool(encoding == "base64")


def _inputs(given: Any) -> Sequence[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list):
        raise ParameterInvalid("input", "'input' must be a text or a list of texts.")
    if any(isinstance(text, int | list) for text in texts):
        raise ParameterInvalid(
            "input", "'input' has token ids; they are those of OpenAI's tokenizers, not of this model's. Send texts."
        )
    if not all(isinstance(text, str) for text in texts):
        raise ParameterInvalid("input", "'input' must be a text or a list of texts.")
    return texts


def _payloads(kind: str, texts: Sequence[str]) -> list[Payload]:
    return [_payload(kind, text) for text in texts]


def _payload(kind: str, text: str) -> Payload:
    if kind == "text":
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ParameterInvalid("input", "'input' has half a character (a lone surrogate).") from None
        return Payload(text=text)
    head = _DATA_URI.match(text[:_DATA_URI_HEAD])
    if head is None:
        raise ParameterInvalid("input", "This model embeds pictures; send them as data:image/png;base64,….")
    try:
        return Payload(image=jsonbody.from_base64(text[head.end() :]))
    except ValueError:
        raise InvalidInput("The picture's data URI is not base64.") from None


def _check_dimensions(asked: Mapping[str, Any], known: int) -> None:
    """Vectors are not cut short: few models are trained for that. Args: known: 0 for not yet."""
    wanted = asked.get("dimensions")
    if wanted is None or not known:
        return
    if type(wanted) is not int or wanted != known:
        raise ParameterInvalid(
            "dimensions", f"'dimensions' is {str(wanted)[:20]}; this model has {known}. Leave it out."
        )


def _written(vector: Array, as_base64: bool) -> str | list[float]:
    if as_base64:
        return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers
