"""What a client is told that could not be forwarded, in the protocol it speaks: a gRPC status, or JSON over HTTP."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from appliance.connect.trouble import Trouble
from appliance.core.memory import MemoryBudget
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.wire.asgi import ASGIApp, Message, Problem, Receive, Send, json_headers
from appliance.wire.context import Context
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

try:
    from appliance.wire.h2 import Http2
except ImportError:  # a client's host on which the native extension was not built
    Http2 = None  # type: ignore[assignment, misc]

HTTP2 = Http2 is not None
"""Whether a client that speaks HTTP/2 can be answered; else its connection is closed."""

_REASONS = {400: "Bad Request", 502: "Bad Gateway", 503: "Service Unavailable"}
_PROBLEMS = {
    400: (11100, "Malformed request"),
    502: (40034, "External connection error"),
    503: (10030, "Try again"),
}
"""HTTP status → Clarifai's code and short text, as `api/status.py` has them; a test compares them."""

_SETTINGS = WireSettings(metadata=64 * 1024, max_message=2**31 - 1, idle_s=60.0)
_MEMORY = 16 * 2**20
"""Bytes that clients which are being refused may make us hold; bodies are not let in at all."""

_budget = MemoryBudget(_MEMORY)


def over_http1(trouble: Trouble, *, head: bool, retry_at: float) -> bytes:
    """The whole answer to a client that speaks HTTP/1.1, whatever it asked.

    Args:
        head: it asked with HEAD, so that there is no body.
        retry_at: monotonic time of the next attempt, or one that is past.
    """
    body = _body(trouble)
    headers = [*json_headers(body), (b"connection", b"close")]
    if trouble.http == 503:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(retry_at - time.monotonic()))))
    lines = [f"HTTP/1.1 {trouble.http} {_REASONS[trouble.http]}".encode()]
    lines += [name + b": " + value for name, value in headers]
    return b"\r\n".join([*lines, b"", b"" if head else body])


def over_http2(trouble: Trouble, released: Callable[[], None]) -> "Http2":
    """A protocol that ends every call of its connection with UNAVAILABLE, before any body is let in.

    Args:    released: called once when the connection is gone.
    """
    end = RpcAbort(RpcStatus.UNAVAILABLE, trouble.sentence)
    context = Context(_Everything(_refusing(end)), _app(trouble), _SETTINGS, _budget)
    return Http2(context, Peer("unix", "local client", secure=False), released)


def _body(trouble: Trouble) -> bytes:
    return Problem(trouble.http, *_PROBLEMS[trouble.http]).body(trouble.sentence)


def _refusing(end: RpcAbort) -> Endpoint:
    async def unary(call: Call, body: bytes) -> bytes:
        raise end

    def admit(call: Call, size: int) -> bytes | None:
        raise end

    def quick(call: Call, body: bytes, done: Callable[[bytes | RpcAbort], None]) -> bool:
        done(end)
        return True

    return Endpoint(unary=unary, admit=admit, quick=quick)


class _Everything(Mapping[str, Endpoint]):
    """The same endpoint under every method's name."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def __getitem__(self, method: str) -> Endpoint:
        return self._endpoint

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _app(trouble: Trouble) -> ASGIApp:
    """What answers requests over HTTP/2 that are not gRPC."""

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        body = _body(trouble)
        start: Message = {"type": "http.response.start", "status": trouble.http, "headers": json_headers(body)}
        await send(start)
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    return app


class Farewell(asyncio.Protocol):
    """Writes an answer over HTTP/1.1, and takes what the client still sends until it has read that.

    To close while bytes come in would make the system reset the connection, and the answer be lost with it.
    """

    def __init__(self, answer: bytes, released: Callable[[], None]) -> None:
        """Args: released: called once when the connection is gone."""
        self._answer = answer
        self._released = released
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Say it, and that no more comes."""
        self.transport = transport
        transport.write(self._answer)
        if transport.can_write_eof():
            transport.write_eof()

    def data_received(self, data: bytes) -> None:
        """Nobody reads that."""

    def eof_received(self) -> bool:
        """The client has heard it."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        self._released()
