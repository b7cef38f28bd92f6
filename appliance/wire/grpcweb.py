"""gRPC-Web, binary and text, for browsers: the same endpoints as gRPC, as an ASGI application over any HTTP version.

Whatever is not gRPC-Web goes to the application beneath. Sources: grpc/grpc doc/PROTOCOL-WEB.md; Fetch standard, CORS.
"""

import asyncio
import base64
import binascii
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from appliance.core.errors import Overloaded
from appliance.core.memory import STRANGER, MemoryBudget, Reservation
from appliance.core.timing import HEADER
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.wire import grpc, sentences
from appliance.wire.asgi import PEER, ASGIApp, ClientGone, Receive, Send, admitted
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

_KINDS = re.compile(r"application/grpc-web(-text)?(\+proto)?")
_COMPRESSED = 1
_TRAILERS = 0x80
_PADDED = re.compile(rb"[^=]+={0,2}")
_TEXTS = 10_000
"""Padded pieces of one base64 body: each costs us far more than its sender."""

_REPLY_HEADERS = (
    "allow",
    "grpc-message",
    "grpc-status",
    "grpc-status-details-bin",
    "retry-after",
    "www-authenticate",
    HEADER,
)
_PREFLIGHT_S = 600


class GrpcWeb:
    """The application of the main port."""

    def __init__(
        self,
        app: ASGIApp,
        endpoints: Mapping[str, Endpoint],
        settings: WireSettings,
        budget: MemoryBudget,
        too_large: Callable[[], None] = lambda: None,
    ) -> None:
        """Make it.

        Args:
            app: answers what is not gRPC-Web.
            settings: its `cors_origins` may call, here and `app`; "*": all.
            too_large: told of every message that is refused for its size.
        """
        self._too_large = too_large
        self._app = app
        self._endpoints = endpoints
        self._settings = settings
        self._budget = budget
        origins = settings.cors_origins
        self._serve: ASGIApp = _with_cors(self._route, origins) if origins else self._route

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI 3."""
        await self._serve(scope, receive, send)

    async def _route(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = grpc.metadata(scope["headers"])
            kind = _KINDS.fullmatch(headers.get("content-type", "").partition(";")[0].strip().lower())
            if kind is not None:
                await self._call(scope, headers, kind[1] is not None, receive, send)
                return
        await self._app(scope, receive, send)

    async def _call(
        self, scope: MutableMapping[str, Any], headers: dict[str, str], text: bool, receive: Receive, send: Send
    ) -> None:
        """One call, whatever happens: its status is in the last frame, and HTTP's is 200."""
        reply = _Reply(send, text, self._settings.max_reply)
        peer: Peer = scope["extensions"][PEER]
        call = Call(scope["path"], headers, peer.text, None, peer.certificate, peer.chain)
        end = _FINE
        try:
            endpoint = self._endpoints.get(call.method)
            if endpoint is None:
                raise grpc.not_served(call.method)
            seconds = _seconds(headers)
            if seconds is not None:
                call.deadline = time.monotonic() + seconds
            limit = grpc.message_limit(endpoint, self._settings.max_message)
            seconds_a_message = self._settings.request_timeout_s
            body = _Body(receive, text, _is_gzip(headers), limit, seconds_a_message, self._too_large)
            async with asyncio.timeout(seconds) as timer:
                if endpoint.unary is not None:
                    await self._unary(call, endpoint, body, reply, scope)
                else:
                    await self._stream(call, endpoint, body, reply, scope)
        except RpcAbort as abort:
            end = abort
        except Overloaded as error:
            end = RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, str(error))
        except ClientGone:
            raise
        except Exception as error:
            if isinstance(error, TimeoutError) and timer.expired():
                end = RpcAbort(RpcStatus.DEADLINE_EXCEEDED, "The call's time is over.")
            else:
                end = grpc.unforeseen(call.method)
        finally:
            if call.memory is not None:
                call.memory.release()
        await reply.end(end, call.timing.said if call.timing is not None else "")

    async def _unary(
        self, call: Call, endpoint: Endpoint, body: "_Body", reply: "_Reply", scope: Mapping[str, Any]
    ) -> None:
        assert endpoint.unary is not None
        size = await body.next_size()
        if size is None:
            raise RpcAbort(RpcStatus.INTERNAL, grpc.NO_MESSAGE)
        refusal = self._admit(call, endpoint, size)
        if refusal is None:
            assert call.memory is not None
            admitted(scope, call.memory)
            message = await body.message(call.memory)
            if await body.next_size() is not None:
                raise grpc.more_than_one()
            await reply.message(await endpoint.unary(call, message))
        else:
            await reply.message(refusal)

    async def _stream(
        self, call: Call, endpoint: Endpoint, body: "_Body", reply: "_Reply", scope: Mapping[str, Any]
    ) -> None:
        assert endpoint.stream is not None
        refusal = self._admit(call, endpoint, 0)
        if refusal is not None:
            await reply.message(refusal)
            return
        assert call.memory is not None
        admitted(scope, call.memory)
        replies = endpoint.stream(call, self._messages(body, grpc.owner(endpoint)))
        # Whoever leaves early ends the endpoint now, not when the garbage collector finds it.
        async with contextlib.aclosing(replies):  # type: ignore[type-var]  # endpoints are async generators
            async for message in replies:
                await reply.message(message)

    def _admit(self, call: Call, endpoint: Endpoint, size: int) -> bytes | None:
        """Ask whether the caller may send `size` bytes; the reply that says no, or None.

        Raises: RpcAbort, Overloaded.
        """
        if endpoint.admit is None:
            call.memory = self._budget.expect(size, STRANGER)
            return None
        refusal = endpoint.admit(call, size)
        if refusal is None and call.memory is None:
            call.memory = self._budget.expect(size)
        return refusal

    async def _messages(self, body: "_Body", owner: str | None) -> AsyncIterator[bytes]:
        """The messages of a stream. Each is paid for while it comes; the endpoint pays once it has it."""
        while (size := await body.next_size()) is not None:
            with self._budget.expect(size, owner) as memory:
                message = await body.message(memory)
            yield message


class _Body:
    """The messages in a request's body."""

    def __init__(
        self, receive: Receive, text: bool, gzip: bool, limit: int, timeout_s: float, too_large: Callable[[], None]
    ) -> None:
        """Args: limit: bytes of a message, packed and unpacked. timeout_s: seconds in which one must arrive."""
        self._too_large = too_large
        self._receive = receive
        self._decode = _Base64().feed if text else bytes
        self._gzip = gzip
        self._limit = limit
        self._timeout_s = timeout_s
        self._data = bytearray()
        self._ended = False
        self._size = 0
        self._flag = 0

    async def next_size(self) -> int | None:
        """Bytes of the next message as it is sent, or None when there is none. Raises: RpcAbort."""
        if not await self._fill(grpc.FRAME_HEAD.size):
            if self._data:
                raise RpcAbort(RpcStatus.INTERNAL, "The request ends inside a message.")
            return None
        self._flag, self._size = grpc.FRAME_HEAD.unpack_from(self._data)
        del self._data[: grpc.FRAME_HEAD.size]
        if self._flag not in (0, _COMPRESSED):
            raise RpcAbort(RpcStatus.INTERNAL, "A frame of the request is neither a message nor a compressed one.")
        if self._flag == _COMPRESSED and not self._gzip:
            raise RpcAbort(RpcStatus.INTERNAL, "A message is marked as compressed; the call names no grpc-encoding.")
        if self._size > self._limit:
            self._too_large()
            raise RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, grpc.too_large(self._limit))
        return self._size

    async def message(self, memory: Reservation) -> bytes:
        """The message whose size was asked for; `memory` grows with what is unpacked. Raises: RpcAbort."""
        if not await self._fill(self._size):
            raise RpcAbort(RpcStatus.INTERNAL, "The request ends inside a message.")
        message = bytes(memoryview(self._data)[: self._size])
        del self._data[: self._size]
        return grpc.unpack(message, self._limit, memory.grow) if self._flag == _COMPRESSED else message

    async def _fill(self, count: int) -> bool:
        """Read until `count` bytes are here; False when there are not as many. Raises: RpcAbort."""
        try:
            async with asyncio.timeout(self._timeout_s):
                while len(self._data) < count and not self._ended:
                    await self._read()
        except TimeoutError as error:
            late = sentences.request_too_late(self._timeout_s)
            raise RpcAbort(RpcStatus.DEADLINE_EXCEEDED, late) from error
        return len(self._data) >= count

    async def _read(self) -> None:
        piece = await self._receive()
        if piece["type"] == "http.disconnect":
            raise RpcAbort(RpcStatus.CANCELLED, "The caller is gone.")
        self._data += self._decode(piece.get("body", b""))
        self._ended = not piece.get("more_body", False)


class _Base64:
    """Decodes a text that comes in pieces, and may itself be several padded texts one behind the other."""

    def __init__(self) -> None:
        self._left = b""
        self._texts = 0

    def feed(self, data: bytes) -> bytes:
        """Decode what is complete. Raises: RpcAbort: it is not base64."""
        data = self._left + data
        whole = len(data) - len(data) % 4
        self._left = data[whole:]
        texts = _PADDED.findall(data[:whole])
        self._texts += len(texts)
        try:
            if sum(map(len, texts)) != whole or self._texts > _TEXTS:
                raise binascii.Error
            return b"".join(base64.b64decode(text, validate=True) for text in texts)
        except binascii.Error:
            raise RpcAbort(RpcStatus.INTERNAL, "The request's body is not base64.") from None


class _Reply:
    """Frames on their way back."""

    def __init__(self, send: Send, text: bool, limit: int) -> None:
        self._send = send
        self._text = text
        self._limit = limit
        self._started = False

    async def message(self, data: bytes) -> None:
        """Send a message. Raises: RpcAbort: it is over the limit."""
        if len(data) > self._limit:
            raise RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, sentences.reply_too_large(len(data), self._limit))
        await self._write(grpc.frame(data), True)

    async def end(self, abort: RpcAbort, timing: str) -> None:
        """Send the status, and no more. Args: timing: where the time went, if the caller is to be told."""
        lines = [b"grpc-status: %d" % abort.status]
        if abort.message:
            lines.append(b"grpc-message: " + grpc.percent_encode(abort.message))
        if abort.details:
            lines.append(b"grpc-status-details-bin: " + base64.b64encode(abort.details).rstrip(b"="))
        if timing:
            lines.append(f"{HEADER}: {timing}".encode("ascii"))
        await self._write(grpc.frame(b"".join(line + b"\r\n" for line in lines), _TRAILERS), False)

    async def _write(self, frame: bytes, more: bool) -> None:
        if not self._started:
            self._started = True
            kind = b"application/grpc-web-text+proto" if self._text else b"application/grpc-web+proto"
            headers = [(b"content-type", kind), (b"grpc-accept-encoding", b"identity, gzip")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        body = base64.b64encode(frame) if self._text else frame
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


# ---- helpers ---------------------------------------------------------------------------------------------------------

_FINE = RpcAbort(RpcStatus.OK, "")


def _seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds that the caller gives us, or None. Raises: RpcAbort."""
    if "grpc-timeout" not in headers:
        return None
    try:
        return grpc.timeout_seconds(headers["grpc-timeout"])
    except ValueError as error:
        raise RpcAbort(RpcStatus.INTERNAL, str(error)) from error


def _is_gzip(headers: Mapping[str, str]) -> bool:
    """Whether compressed messages are gzip. Raises: RpcAbort: they are something else."""
    encoding = headers.get("grpc-encoding", "identity")
    if encoding not in ("identity", "gzip"):
        raise grpc.encoding_not_served(encoding)
    return encoding == "gzip"


def _with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let pages of these origins call `app` from browsers; the key is theirs to send, cookies are not used.

    They may send whatever headers they like: browser clients have many of their own (`x-clarifai-*`, `x-stainless-*`,
    `x-grpc-web`), and none does anything here that its page could not do otherwise.
    """
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
        allow_headers=("*",),
        expose_headers=_REPLY_HEADERS,
        max_age=_PREFLIGHT_S,
    )
