"""One HTTP request between a connection, whichever version it speaks, and the ASGI application.

The connection makes an `Exchange` of a request's head, feeds it the body, and writes what the application answers; how
that looks on the wire is its own affair, the `Outlet`. Source: ASGI 3, HTTP connection scope, spec version 2.4.
"""

import asyncio
import json
import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Protocol, TypeAlias
from urllib.parse import unquote_to_bytes

from appliance.core.errors import Overloaded
from appliance.core.memory import Reservation
from appliance.wire import sentences
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

_log = logging.getLogger(__name__)

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

PEER = "appliance.peer"
"""The extension of a scope under which its `Peer` is found."""

_ADMITTED = "appliance.admitted"
"""The extension of a scope by which `admitted` reaches the connection."""

_MOMENT_S = 1.0
"""What an application that waits for its client gets to tidy up when it hears that the client is gone."""

_HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile(rb"[\t -~\x80-\xff]*")


@dataclass(frozen=True, slots=True)
class Problem:
    """What the wire itself refuses: HTTP status, Clarifai's code and short text.

    The numbers are those of `api/status.py`, which the wire must not see; a test compares them.
    """

    status: int
    code: int
    description: str

    def body(self, details: str) -> bytes:
        """JSON in ASCII that looks like the API's replies; `details` says what to do."""
        content = {"status": {"code": self.code, "description": self.description, "details": details}}
        return json.dumps(content, separators=(",", ":")).encode("ascii")


MALFORMED = Problem(400, 11100, "Malformed request")
METHOD_REFUSED = Problem(405, 11103, "Method not allowed")
TIMED_OUT = Problem(408, 98009, "Deadline exceeded")
TOO_LARGE = Problem(413, 30105, "Input is too large")
HEADERS_TOO_LARGE = Problem(431, 11100, "Malformed request")
INTERNAL = Problem(500, 98004, "Internal error")
NOT_SPOKEN = Problem(501, 11100, "Malformed request")
OVERLOADED = Problem(503, 21354, "Model is busy, please retry")
VERSION_NOT_SPOKEN = Problem(505, 11100, "Malformed request")


class Outlet(Protocol):
    """One request's way back to its client; the connection's side. All are called on the event loop."""

    def start(self, status: int, headers: Headers) -> None:
        """Take the head of the reply; nothing need be written before the first piece of the body."""

    def body(self, data: bytes, last: bool) -> None:
        """Write a piece of the reply's body. Raises: Overloaded: it cannot be kept; nothing of it was written."""

    async def drained(self) -> None:
        """Return when the client has taken enough for more to be written; not at all once it is gone."""

    def admitted(self, memory: Reservation) -> None:
        """Whose the request is: what of its body is on its way takes that share of the memory budget."""

    def credit(self, count: int) -> None:
        """The application took `count` bytes of the request's body: let more in. 0: it waits for the first, or more."""

    def cut(self) -> None:
        """The application failed after it began to answer: the client must see a broken reply."""


class ClientGone(OSError):
    """Raised by `send` when nobody is there to read; ASGI asks for an OSError."""


class Exchange:
    """One request and its reply.

    Attributes:
        queued: bytes of the request's body that were fed and not yet taken.
        started: whether the reply's first bytes were given to the outlet.
        complete: whether all of it was.
    """

    def __init__(self, app: ASGIApp, scope: MutableMapping[str, Any], outlet: Outlet) -> None:
        self.queued = 0
        self.started = False
        self.complete = False
        self._app = app
        self._scope = scope
        self._outlet = outlet
        self._pieces: deque[bytes] = deque()
        self._ended = False  # the request's body is all here
        self._told = False  # and the application knows
        self._gone = False
        self._waiting = False  # the application is in `receive`
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._head: tuple[int, list[tuple[bytes, bytes]]] | None = None
        self._left: int | None = None  # bytes that the reply's content-length still promises
        self._bodiless = scope["method"] == "HEAD"
        scope.setdefault("extensions", {})[_ADMITTED] = outlet.admitted

    # ---- the connection's side ----

    def begin(self) -> "asyncio.Task[None]":
        """Run the application. The task never fails; when it is done, the reply is complete or was cut."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self._task

    def feed(self, data: bytes) -> None:
        """Add a piece of the request's body."""
        if self._gone or self.complete or not data:
            return
        self._pieces.append(data)
        self.queued += len(data)
        self._changed.set()

    def end(self) -> None:
        """The request's body is complete."""
        self._ended = True
        self._changed.set()

    def lost(self) -> None:
        """The client is gone, or was refused. Whoever waits for it hears so; other work for it is cancelled at once."""
        if self._gone:
            return
        self._gone = True
        self._drop()
        self._changed.set()
        task = self._task
        if task is None or task.done() or self.complete:
            return
        if self._waiting:
            timer = asyncio.get_running_loop().call_later(_MOMENT_S, task.cancel)
            task.add_done_callback(lambda _: timer.cancel())
        else:
            task.cancel()

    # ---- the application's side ----

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
            if not self.complete and not self._gone:
                raise RuntimeError("the application returned before its reply was complete")
        except asyncio.CancelledError:
            # By `lost`, and then that is all; or by a server that stops, whose client must not take half for all.
            if not self._gone and not self.complete:
                self._outlet.cut()
        except Overloaded as error:
            self._fail(OVERLOADED, str(error))
        except Exception:
            # Last resort: the client gets a stock sentence, the log the traceback. Who is gone gets nothing.
            if not self._gone:
                _log.exception("unforeseen error", extra={"path": self._scope["path"]})
                self._fail(INTERNAL, sentences.UNFORESEEN)
        finally:
            self._drop()

    def _fail(self, problem: Problem, details: str) -> None:
        if self._gone or self.complete:
            return
        if self.started:
            self._outlet.cut()
            return
        body = problem.body(details)
        self.started = self.complete = True
        self._outlet.start(problem.status, json_headers(body))
        self._outlet.body(b"" if self._bodiless else body, True)

    def _drop(self) -> None:
        """Nobody will take what is queued."""
        self.queued = 0
        self._pieces.clear()

    async def _receive(self) -> Message:
        while not (self._gone or self.complete or self._pieces or (self._ended and not self._told)):
            self._changed.clear()
            if not self._ended:
                self._outlet.credit(0)
            await self._change()
        if self._gone or self.complete:
            return {"type": "http.disconnect"}
        data = self._take()
        self._told = self._ended and not self._pieces
        return {"type": "http.request", "body": data, "more_body": not self._told}

    def _take(self) -> bytes:
        """All that is queued; the connection may feed more at once."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        self.queued = 0
        if data:
            self._outlet.credit(len(data))
        return data

    async def _change(self) -> None:
        self._waiting = True
        try:
            await self._changed.wait()
        finally:
            self._waiting = False

    async def _send(self, message: Message) -> None:
        if self._gone:
            raise ClientGone("the client is gone")
        kind = message["type"]
        if kind == "http.response.start" and self._head is None:
            self._head = self._checked_head(message)
        elif kind == "http.response.body" and self._head is not None and not self.complete:
            self._body(bytes(message.get("body", b"")), not message.get("more_body", False))
            if not self.complete:
                await self._outlet.drained()
        else:
            raise RuntimeError(f"the application sent {kind!r} at the wrong time")

    def _checked_head(self, message: Message) -> tuple[int, list[tuple[bytes, bytes]]]:
        """The reply's head as a connection may write it; how long a message lives is the connection's own business."""
        status = int(message["status"])
        headers = []
        for raw_name, raw_value in message.get("headers", ()):
            name, value = bytes(raw_name).lower(), bytes(raw_value)
            if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
                raise RuntimeError(f"the application sent a header that cannot be written: {name!r}")
            if name not in _HOP_BY_HOP:
                headers.append((name, value))
        self._bodiless = self._bodiless or status in (204, 304)
        length = dict(headers).get(b"content-length")
        if length is not None and not self._bodiless:
            self._left = int(length)
        if all(name != b"date" for name, _ in headers):
            headers.append(date_header())
        return status, headers

    def _body(self, data: bytes, last: bool) -> None:
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0 or (last and self._left):
                raise RuntimeError("the application's body is not as long as its content-length says")
        if self._bodiless:
            data = b""
        # The head goes with the first piece of the body: until then an error can still be told properly.
        if not self.started:
            assert self._head is not None
            self._outlet.start(*self._head)
        self._outlet.body(data, last)
        self.started = True
        if last:
            self.complete = True
            self._changed.set()


def date_header() -> tuple[bytes, bytes]:
    """The `date` that every reply has (RFC 9110, section 6.6.1)."""
    return b"date", formatdate(usegmt=True).encode("ascii")


def cors_headers(request: Headers, settings: WireSettings) -> list[tuple[bytes, bytes]]:
    """What lets a page of an allowed origin read an answer that the application was not asked for.

    The application's own answers have it from its middleware. Source: Fetch standard, CORS.
    """
    origin = dict(request).get(b"origin", b"").decode("latin-1")
    if "*" in settings.cors_origins and origin:
        return [(b"access-control-allow-origin", b"*")]
    if origin in settings.cors_origins:
        return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
    return []


def json_headers(body: bytes) -> list[tuple[bytes, bytes]]:
    """The headers of a reply that is `body`, JSON."""
    return [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), date_header()]


def scope(
    peer: Peer,
    *,
    http_version: str,
    method: str,
    path: bytes,
    headers: Headers,
    server: tuple[str, int | None] | None = None,
) -> dict[str, Any]:
    """An ASGI 3 scope.

    Args:
        http_version: "1.0", "1.1" or "2".
        path: as the client sent it: percent-encoded, with its query.
        headers: names in lower case; `host` among them, also for HTTP/2's `:authority`.
        server: our own address and port.
    """
    raw_path, _, query = path.partition(b"?")
    _, _, port = peer.text.rpartition(":")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": http_version,
        "method": method,
        "scheme": "https" if peer.secure else "http",
        "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": list(headers),
        "client": (peer.address, int(port)) if port.isdecimal() else None,
        "server": server,
        "extensions": {PEER: peer},
    }


def admitted(scope: Mapping[str, Any], memory: Reservation) -> None:
    """Tell the connection whose the request is, as its application has found out.

    What of the body has come and was not taken yet has the owner's share of the memory budget from now on, and no
    longer that of strangers. Where there is no connection, in tests, nothing is held.
    """
    tell = scope["extensions"].get(_ADMITTED)
    if tell is not None:
        tell(memory)


def body_limit(settings: WireSettings) -> int:
    """Bytes that a request's body may have: more than its messages, as base64, JSON and frames make it longer.

    What is in it is measured by who reads it.
    """
    return settings.max_message * 3 // 2 + 1024
