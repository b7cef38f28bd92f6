"""The REST twin: every RPC over HTTP and JSON, with the answer that gRPC gives to the same request.

Routes come from the descriptors (`bindings`), JSON from `protojson`, the steps around a call from `web`. What a request
says comes from its body, its query and its path; of two that name the same field the path wins over the body, and the
body over the query. The query is read where the body is not the whole request; a parameter names a field with dots
(`user_app_id.user_id`), in either case, and one that names none is passed over, as a field of a body is.

A streaming RPC answers with one line of JSON a message, `{"result": <message>}`, as soon as there is one; the wrapping
is grpc-gateway's, whose annotations these are (Clarifai documents none). When the first message is an error, it is the
whole answer, plain, with its HTTP status. An error that is no message ends a stream with `{"error": …, "status": …}`.
Of a request stream (StreamModelOutputs) each line is a message; a body that is one object over several lines is one.
"""

import asyncio
import contextlib
import json
import logging
import re
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from clarifai_grpc.grpc.api import service_pb2
from google.protobuf import message_factory
from google.protobuf.message import Message
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route

from appliance.api import jsonbody, openapi, protojson, status, web
from appliance.api.bindings import SERVICE, Binding, Found, Paths, bindings_of, method_of
from appliance.core.errors import InputTooLarge, InvalidRequest
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.wire import sentences
from appliance.wire.asgi import ClientGone

_log = logging.getLogger(__name__)

_LARGE_REPLY = 32 * 1024
"""Bytes of a reply from which it is written as JSON on a thread, so that other calls have their turns."""

_JSON_COST = 8
"""Bytes that a byte of a message costs, about, while it is written as JSON: it is unpacked, made objects, then text."""

_SHORT_LINE = 64 * 1024
"""Bytes of a line in which texts are told from brackets; in a longer one brackets are only counted."""

_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A text in JSON, also one that does not end: what is in it opens and closes nothing."""

_MOST_PARAMETERS = 1000
_FOUND = "appliance.rest"

_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def rest_routes(endpoints: Mapping[str, Endpoint], request_size: int) -> list[BaseRoute]:
    """The routes of all RPCs that are served, of what describes them, and of two pages that the SDK asks for besides.

    Args:
        endpoints: by full gRPC name, as `Api.endpoints` gives them.
        request_size: `limits.request_size`: what a message may have, however its JSON is written.
    """
    served = [rpc for rpc in SERVICE.methods if method_of(rpc) in endpoints]
    bindings = [binding for rpc in served for binding in bindings_of(rpc)]

    @cache
    def described() -> bytes:
        return json.dumps(openapi.document(served), separators=(",", ":")).encode()

    async def description(request: Request) -> Response:
        # Made when somebody asks, which most installations never hear, and never while others wait.
        return Response(await asyncio.to_thread(described), media_type="application/json")

    routes: list[BaseRoute] = [Route("/v2/openapi.json", description), Route("/v2/auth/methods", _auth_methods)]
    get_user = endpoints.get(method_of(SERVICE.methods_by_name["GetUser"]))
    if get_user is not None:
        routes.append(Route("/v2/users/{user_id}/organizations", partial(_organizations, get_user)))
    return [*routes, RestRoute(bindings, endpoints, request_size)]


class RestRoute(BaseRoute):
    """All bindings as one route of Starlette's: it finds paths by itself, as they are percent-encoded."""

    def __init__(self, bindings: Sequence[Binding], endpoints: Mapping[str, Endpoint], request_size: int) -> None:
        self._paths = Paths(bindings)
        self._endpoints = endpoints
        self._request_size = request_size

    def matches(self, scope: Any) -> tuple[Match, Any]:
        """Whether the path is one of ours, with whatever verb."""
        found = self._paths.find(scope["method"], scope["raw_path"]) if scope["type"] == "http" else None
        return (Match.NONE, {}) if found is None else (Match.FULL, {_FOUND: found})

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, whatever happens; who is gone gets nothing."""
        request = Request(scope, receive, send)
        found: Found = scope[_FOUND]
        with contextlib.suppress(ClientDisconnect, ClientGone):
            if found.binding is None:
                headers = {"allow": ", ".join(found.verbs)}
                details = f"This path is served with {headers['allow']}."
                await web.refusal(status.METHOD_NOT_ALLOWED, details, headers)(scope, receive, send)
                return
            answer = _Answer(request, send)
            try:
                async with web.calling(request, found.binding.method) as call:
                    answer.call = call
                    await self._call(call, found.binding, found.values, answer)
            except Exception as error:
                await answer.error(error)

    async def _call(self, call: Call, binding: Binding, values: Sequence[bytes], answer: "_Answer") -> None:
        endpoint = self._endpoints[binding.method]
        kind = message_factory.GetMessageClass(binding.rpc.output_type)
        request = answer.request
        refusal = web.admit(request, call, endpoint)
        if refusal is not None:
            await answer.reply(call, kind, refusal)
            return
        query = request.scope["query_string"]
        call.reader = partial(_read, binding, values, query, self._request_size)
        if endpoint.unary is not None:
            body = await self._body(request, call) if binding.body else b""
            await answer.reply(call, kind, await endpoint.unary(call, body))
            return
        assert endpoint.stream is not None
        bodies = self._lines(request, call) if binding.rpc.client_streaming else self._single(request, call)
        replies = endpoint.stream(call, bodies)
        # Whoever leaves early ends the endpoint now, not when the garbage collector finds it.
        async with contextlib.aclosing(replies):  # type: ignore[type-var]  # endpoints are async generators
            await answer.stream(call, kind, replies)

    async def _body(self, request: Request, call: Call) -> bytes:
        body = await web.body_of(request, call, self._request_size)
        await _pay(call, body)
        return body

    async def _single(self, request: Request, call: Call) -> AsyncIterator[bytes]:
        yield await self._body(request, call)

    async def _lines(self, request: Request, call: Call) -> AsyncIterator[bytes]:
        """The messages of a stream: a line each; from one on that is not whole by itself, all that follows is one."""
        assert call.memory is not None
        rest = bytearray()
        whole = False  # the rest is one message
        async for piece in request.stream():
            call.memory.grow(max(0, len(rest) + len(piece) - call.memory.count))
            searched = len(rest)  # bytes of it in which no line ends
            rest += piece
            if len(rest) > web.body_limit(self._request_size):
                raise InputTooLarge(sentences.body_too_large(self._request_size))
            while not whole and (end := rest.find(b"\n", searched)) >= 0:
                line = bytes(rest[:end])
                if not _complete(line):
                    whole = True
                    break
                del rest[: end + 1]
                searched = 0
                if line.strip():
                    await _pay(call, line)
                    yield line
        if rest.strip():
            last = bytes(rest)
            await _pay(call, last)
            yield last


async def _pay(call: Call, body: bytes) -> None:
    assert call.memory is not None
    await jsonbody.pay(body, call.memory)


def _complete(line: bytes) -> bool:
    """Whether that can be a message by itself: it ends what it begins. Whether it is one, the reader says."""
    return _balanced(line) or (len(line) < _SHORT_LINE and _balanced(_TEXT.sub(b"", line)))


def _balanced(line: bytes) -> bool:
    return line.count(b"{") <= line.count(b"}") and line.count(b"[") <= line.count(b"]")


class _Answer:
    """The way back of one call."""

    def __init__(self, request: Request, send: Any) -> None:
        self.request = request
        self._send = send
        self._started = False
        self.call: Call | None = None

    async def reply(self, call: Call, kind: type[Message], reply: bytes) -> None:
        """One message, which is all."""
        await self._respond(await _written(call, kind, reply), web.status_in(reply))

    async def error(self, error: Exception) -> None:
        """An error that is no message. Raises: the error, when nobody is there to read."""
        found = web.status_of(error, self.request)
        if not self._started:
            await self._respond(json.dumps({"status": protojson.plain(found)}).encode(), found)
            return
        code = int(error.status) if isinstance(error, RpcAbort) else int(RpcStatus.INTERNAL)
        last = {"error": {"code": code, "message": found.details}, "status": protojson.plain(found)}
        await self._line(json.dumps(last).encode(), last=True)

    async def stream(self, call: Call, kind: type[Message], replies: AsyncIterator[bytes]) -> None:
        """A line for each message, each on its way before the next one is asked for."""
        async for reply in replies:
            written = await _written(call, kind, reply)
            if not self._started:
                found = web.status_in(reply)
                if status.http_of(found) >= 400:
                    await self._respond(written, found)
                    return
                await self._start(status.http_of(found), {"content-type": "application/x-ndjson"})
            await self._line(b'{"result":%b}' % written)
        if not self._started:
            await self._start(200, {"content-type": "application/x-ndjson"})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _respond(self, body: bytes, found: Any) -> None:
        headers = {"content-type": "application/json", "content-length": str(len(body)), **web.headers_of(found)}
        if self.call is not None:
            headers |= web.timing_of(self.call)
        await self._start(status.http_of(found), headers)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, http: int, headers: Mapping[str, str]) -> None:
        self._started = True
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": http, "headers": pairs})

    async def _line(self, content: bytes, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": content + b"\n", "more_body": not last})


# ---- a request -------------------------------------------------------------------------------------------------------


def _read(binding: Binding, values: Sequence[bytes], query: bytes, limit: int, body: bytes) -> Message:
    """The request message of a binding's variables, query and body. Raises: RequestError."""
    message = message_factory.GetMessageClass(binding.rpc.input_type)()
    if binding.body != "*" and query:
        protojson.fill(message, _of_query(binding.rpc.input_type, query), limit)
    if binding.body and body.strip():
        content = jsonbody.parse(body)
        protojson.fill(message, content if binding.body == "*" else {binding.body: content}, limit)
    _set_variables(message, binding, values)
    return message


def _set_variables(message: Message, binding: Binding, values: Sequence[bytes]) -> None:
    for names, value in zip(binding.variables, values, strict=True):
        content: Any = _decoded(value)
        for name in reversed(names):
            content = {name: content}
        protojson.fill(message, content, len(value) * 2 + 100)


def _of_query(descriptor: Any, query: bytes) -> dict[str, Any]:
    """A query as the JSON object that says the same; parameters that name no field are left out."""
    try:
        pairs = urllib.parse.parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MOST_PARAMETERS
        )
    except UnicodeError:
        raise InvalidRequest("The query is not percent-encoded UTF-8.") from None
    except ValueError:
        raise InvalidRequest(f"The query has more than {_MOST_PARAMETERS} parameters.") from None
    content: dict[str, Any] = {}
    for name, value in pairs:
        _put(content, descriptor, name, value)
    return content


def _put(content: dict[str, Any], descriptor: Any, name: str, value: str) -> None:
    """Put a parameter where its field is. Raises: InvalidRequest: a parameter that a field cannot be of."""
    names = name.split(".")
    for place, part in enumerate(names):
        known = protojson.field_named(descriptor, part)
        if known is None:
            return
        last = place == len(names) - 1
        inner = known.message_type
        if not last:
            if inner is None or known.is_repeated:
                raise InvalidRequest(f"The query names {'.'.join(names[: place + 1])!r} as if it had fields to set.")
            content, descriptor = content.setdefault(known.name, {}), inner
            continue
        if inner is not None and not inner.full_name.startswith("google.protobuf."):
            raise InvalidRequest(f"The query names {name[:80]!r}, which is no single value; name one of its fields.")
        converted = _value(known, value, name)
        if known.is_repeated:
            content.setdefault(known.name, []).append(converted)
        else:
            content[known.name] = converted


def _value(field: Any, value: str, name: str) -> Any:
    """A parameter as JSON has it: only truth is not text there."""
    if field.cpp_type != field.CPPTYPE_BOOL:
        return value
    if value.lower() not in _TRUTHS:
        raise InvalidRequest(f"The query's {name[:80]!r} must be true or false.")
    return _TRUTHS[value.lower()]


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("The path is not percent-encoded UTF-8.") from None


# ---- a reply ---------------------------------------------------------------------------------------------------------


async def _written(call: Call, kind: type[Message], reply: bytes) -> bytes:
    """A reply message as JSON. Raises: Overloaded: the memory for it is not free."""
    if len(reply) < _LARGE_REPLY:
        return protojson.text(kind.FromString(reply))
    assert call.memory is not None
    call.memory.grow(_JSON_COST * len(reply))
    return await asyncio.to_thread(lambda: protojson.text(kind.FromString(reply)))


# ---- pages that have no RPC ------------------------------------------------------------------------------------------


async def _auth_methods(request: Request) -> Response:
    """The SDK asks for it to see whether a bare host speaks HTTPS (PROTOCOL 1.1); it needs no credentials."""
    return JSONResponse({"status": protojson.plain(status.success())}, headers={"cache-control": "no-store"})


async def _organizations(get_user: Endpoint, request: Request) -> Response:
    """A user's organizations, for the SDK's login: there are none here. It is answered to whom GetUser answers."""
    wanted = service_pb2.GetUserRequest()
    wanted.user_app_id.user_id = request.path_params["user_id"]
    try:
        async with web.calling(request, method_of(SERVICE.methods_by_name["GetUser"])) as call:
            reply = web.admit(request, call, get_user)
            if reply is None:
                assert get_user.unary is not None
                reply = await get_user.unary(call, wanted.SerializeToString())
    except Exception as error:
        return web.problem(web.status_of(error, request))
    found = web.status_in(reply)
    if status.http_of(found) != status.SUCCESS.http:
        return web.problem(found)
    return JSONResponse({"status": protojson.plain(found), "organizations": []})
