"""One HTTP/1.1 (or 1.0) connection on h11, for the ASGI application.

h11 reads heads, chunks and writes replies. In front of it stands a screen for what it tolerates and a proxy before us
may read differently: bare line feeds, folded lines, two lengths. One request is worked on at a time; what a client
sends ahead waits here up to a bound, then on the socket. Sources: RFC 9112; RFC 9110.
"""

import asyncio
import logging
import re
import sys
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import cast

import h11

from appliance.core.errors import Overloaded
from appliance.core.logs import RateLimitedLog
from appliance.core.memory import STRANGER, MemoryBudget, Reservation
from appliance.wire import asgi, sentences
from appliance.wire.asgi import ASGIApp, Exchange, Headers, Problem
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

_log = RateLimitedLog(logging.getLogger(__name__))

_AHEAD = 64 * 1024
"""Bytes that wait here for an application that does not take them; the rest waits on the socket."""
_SLICE = 64 * 1024
"""Bytes handled at once, both ways."""
_FREE = 64 * 1024
"""Bytes of a reply that need no reservation: about what the socket's own buffer holds."""
_DISCARDED = 256 * 1024
"""Bytes of a body that nobody wanted, which are read so that the connection can go on."""
_LINGER_S = 2.0
"""After a refusal a client may still be sending; closed at once, it would lose our answer to a TCP reset."""
_LAST_REQUEST_S = 1.0
"""Seconds that an idle client has for a request that was on its way when we decided to close."""
_CHUNKS = 1000
_MEAN_CHUNK = 16
"""After that many chunks they must have that many bytes on average: each costs us far more than its sender."""
_DROPPED = 4 * 2**20
"""Bytes read and thrown away while a client is told why."""

_BARE_LINE_END = re.compile(rb"\r(?!\n)|(?<!\r)\n")
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LENGTH = re.compile(rb"[0-9]{1,19}")
_HOST = re.compile(rb"[A-Za-z0-9._~%:\[\]-]*")
_REASON = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}


class Refusal(Exception):
    """A request that we do not serve."""

    def __init__(self, problem: Problem, details: str) -> None:
        super().__init__(details)
        self.problem = problem
        self.details = details


class Http1(asyncio.Protocol):
    """One connection; also the `Outlet` of the request that is being worked on."""

    def __init__(
        self,
        app: ASGIApp,
        peer: Peer,
        settings: WireSettings,
        budget: MemoryBudget,
        released: Callable[[], None] = lambda: None,
        too_large: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a protocol without a transport.

        Args:    released: called once when the connection is gone. too_large: told of bodies refused for their size.
        """
        self._too_large = too_large
        self._app = app
        self._peer = peer
        self._settings = settings
        self._released = released
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()  # received and not parsed
        self._searched = 0  # bytes of it in which no head ends
        self._forgiven = False  # it began with a line end too many
        self._budget = budget
        self._taken = budget.expect(0, STRANGER)  # for what is queued for the application
        self._given = budget.expect(0)  # for what the client has not taken
        self._output: deque[memoryview] = deque()
        self._drained = asyncio.Event()
        self._drained.set()
        self._reading = True
        self._writable = True
        self._closing = False  # nothing more is read or answered
        self._shut = False  # the next answer is the last one
        self._parting = False
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._request: _Request | None = None
        self._dropped = 0

    @property
    def busy(self) -> bool:
        """Whether a request is being received or worked on, or its answer on its way."""
        return self._exchange is not None or bool(self._input or self._output)

    @property
    def retired(self) -> bool:
        """Whether no new request can come: it is closing, or works on its last one."""
        return self._closing or self._transport is None or (self._shut and self._exchange is not None)

    def last(self) -> None:
        """Let the next answer be the last one: it says so, and the connection closes after it."""
        self._shut = True

    def shut(self) -> None:
        """Finish the request in progress, then close. A client that is idle gets a moment: its next request may be on
        its way, and a connection that closes in its face would lose it."""
        if self._parting:
            return  # asked every second, it would never end
        self._shut = self._parting = True
        if not self.busy and not self._closing:
            self._wait_for_head(_LAST_REQUEST_S)

    # ---- the transport's side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first head."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        self._wait_for_head(self._settings.handshake_timeout_s)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if self._closing:
            self._dropped += len(data)
            if self._dropped > _DROPPED:
                self._close()
            return
        if not self._input and self._exchange is None:
            self._wait_for_head(self._settings.handshake_timeout_s)
        self._input += data
        self._advance()

    def eof_received(self) -> bool:
        """A client that closes its side is gone: that is how most leave, and work for them must end."""
        return False

    def pause_writing(self) -> None:
        """The client does not take our answer."""
        self._writable = False
        self._write_timer = self._loop.call_later(self._settings.request_timeout_s, self._cut_slow_reader)

    def resume_writing(self) -> None:
        """The client took some of it."""
        self._writable = True
        if self._transport is None or self._transport.is_closing():
            return  # the rest has its own time limit, see `_close`
        self._disarm_write()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone, or we closed."""
        self._closing = True
        self._disarm_read()
        self._disarm_write()
        self._input.clear()
        self._output.clear()
        if self._exchange is not None:
            self._exchange.lost()
        self._taken.release()
        self._given.release()
        self._transport = None
        self._released()

    # ---- requests ----

    def _wait_for_head(self, seconds: float) -> None:
        """The next head must be complete in time; 0: whenever it likes."""
        self._disarm_read()
        if seconds > 0:
            self._read_timer = self._loop.call_later(seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._read_timer = None
        if not self._input:
            self._close()
            return
        seconds = self._settings.handshake_timeout_s
        self._refuse(Refusal(asgi.TIMED_OUT, f"The request's head did not arrive within {seconds:g} s."))

    def _body_is_late(self) -> None:
        self._read_timer = None
        seconds = self._settings.request_timeout_s
        if self._input:  # the application is slow, not the client
            self._read_timer = self._loop.call_later(seconds, self._body_is_late)
            return
        self._refuse(Refusal(asgi.TIMED_OUT, f"The request's body did not arrive within {seconds:g} s."))

    def _advance(self) -> None:
        """Go as far as what was received allows."""
        try:
            if not self._closing and self._exchange is None and self._input:
                self._read_head()
            if not self._closing and self._exchange is not None and self._request is not None:
                self._read_body(self._exchange, self._request)
        except Refusal as refusal:
            self._refuse(refusal)
        self._throttle()
        self._go_on()

    def _throttle(self) -> None:
        """Read while there is room for it, and to the end of what we do not want any more."""
        want = self._closing or len(self._input) <= _AHEAD
        if self._transport is None or self._transport.is_closing() or want == self._reading:
            return
        self._reading = want
        if want:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _read_head(self) -> None:
        """Begin the next request, if its head is here. Raises: Refusal."""
        # One line end too many before a request is forgiven (RFC 9112, section 2.2).
        if not self._forgiven and self._input.startswith(b"\r\n") and len(self._input) > 2:
            del self._input[:2]
            self._forgiven = True
            self._searched = 0
        limit = self._settings.metadata
        end = self._input.find(b"\r\n\r\n", max(0, self._searched - 3), limit) + 4
        if end < 4:
            if len(self._input) >= limit:
                raise Refusal(asgi.HEADERS_TOO_LARGE, sentences.headers_too_large(limit))
            # Only what is new: a client that sends byte by byte must not make us look at all of it each time.
            screened, self._searched = max(0, self._searched - 1), len(self._input)
            _screen(self._input, screened, len(self._input) - self._input.endswith(b"\r"))
            return
        head = bytes(self._input[:end])
        del self._input[:end]
        self._searched = 0
        self._forgiven = False
        self._disarm_read()
        request = self._request = _Request(head, self._settings)
        request.check_length()
        self._taken = self._budget.expect(0, STRANGER)  # the one before may have had an owner
        exchange = self._exchange = Exchange(self._app, self._scope(request), self)
        if request.ended:
            exchange.end()
        else:
            self._read_timer = self._loop.call_later(self._settings.request_timeout_s, self._body_is_late)
        self._task = exchange.begin()
        self._task.add_done_callback(lambda _: self._advance())

    def _scope(self, request: "_Request") -> dict[str, object]:
        assert self._transport is not None
        address = self._transport.get_extra_info("sockname")
        return asgi.scope(
            self._peer,
            http_version=request.version,
            method=request.method,
            path=request.target,
            headers=request.headers,
            server=(address[0], address[1]) if isinstance(address, tuple) else None,
        )

    def _read_body(self, exchange: Exchange, request: "_Request") -> None:
        """Hand the body on while the application takes it. Raises: Refusal."""
        while self._input and not request.ended and not self._closing and exchange.queued <= _AHEAD:
            self._read_piece(exchange, request)

    def _read_piece(self, exchange: Exchange, request: "_Request") -> None:
        piece = bytes(self._input[:_SLICE])
        del self._input[:_SLICE]
        data, rest = request.read(piece)
        self._input[:0] = rest
        if exchange.complete:
            request.discarded += len(piece)
            if request.discarded > _DISCARDED:
                self._finish()
        elif data:
            try:
                self._taken.grow(len(data))
            except Overloaded as error:
                raise Refusal(asgi.OVERLOADED, str(error)) from None
            exchange.feed(data)
        if request.ended:
            self._disarm_read()
            exchange.end()

    def _go_on(self) -> None:
        """Turn to the next request when this one is over: application done, answer written, body read."""
        task, request = self._task, self._request
        if task is None or request is None or not task.done() or self._output or self._closing:
            return
        self._taken.release()
        if self._shut or request.last:
            self._finish()
        elif request.ended:
            self._exchange = self._task = self._request = None
            self._wait_for_head(self._settings.handshake_timeout_s if self._input else self._settings.idle_s)
            if self._input:
                self._loop.call_soon(self._advance)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what we do not serve, and close: where the next request would begin, nobody knows."""
        if self._closing:
            return
        if refusal.problem is asgi.TOO_LARGE:
            self._too_large()
        _log.write(
            "refused",
            logging.WARNING,
            f"HTTP request refused: {refusal.details}",
            peer=self._peer.text,
            status=refusal.problem.status,
        )
        exchange = self._exchange
        if exchange is not None:
            exchange.lost()
            self._taken.release()
            if exchange.complete:
                self._finish()
                return
            if exchange.started:
                self.cut()
                return
        status = refusal.problem.status
        body = refusal.problem.body(refusal.details)
        lines = [b"HTTP/1.1 %d %s" % (status, _REASON[status])]
        headers = asgi.json_headers(body)
        if self._request is not None:
            headers += asgi.cors_headers(self._request.headers, self._settings)
        lines += [name + b": " + value for name, value in headers]
        head_only = self._request is not None and self._request.method == "HEAD"
        answer = b"\r\n".join([*lines, b"connection: close", b"", b"" if head_only else body])
        self._output.append(memoryview(answer))
        self._closing = True  # before anything is written: no other answer goes between
        self._flush()

    # ---- the way back: Outlet ----

    def start(self, status: int, headers: Headers) -> None:
        """Keep the head for the first piece of the body."""
        if self._request is not None and not self._closing:
            self._request.answer(status, headers, close=self._shut)

    def body(self, data: bytes, last: bool) -> None:
        """Write a piece, and the head with the first one. Raises: Overloaded."""
        if self._request is None or self._closing:
            return
        if len(data) > _FREE:
            self._given.grow(len(data))
        self._output.extend(memoryview(piece) for piece in self._request.written(data, last))
        self._flush()

    async def drained(self) -> None:
        """Return when all that was written is with the transport, and it has room."""
        await self._drained.wait()

    def admitted(self, memory: Reservation) -> None:
        """What waits here for the application is its caller's from now on."""
        self._taken.follow(memory)

    def credit(self, count: int) -> None:
        """Go on reading; a client that asked whether to send its body hears yes when the application wants it."""
        if self._request is None or self._exchange is None or self._closing:
            return
        if count == 0:
            self._output.extend(memoryview(piece) for piece in self._request.invitation())
            self._flush()
            return
        if self._exchange.queued == 0:
            self._taken.release()
        if self._input:
            self._advance()

    def cut(self) -> None:
        """End the connection in a way that no client takes for the end of the answer."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        """Give the transport what it takes, piece by piece: so its pace is the client's, and seen."""
        while self._output and self._writable and self._transport is not None:
            self._transport.write(self._next_slice())
        if self._output or not self._writable:
            self._drained.clear()
            return
        self._given.release()
        self._drained.set()
        if self._closing:
            self._finish()
        else:
            self._go_on()

    def _next_slice(self) -> bytes:
        """Small pieces together, large ones in parts."""
        parts = []
        room = _SLICE
        while self._output and room:
            piece = self._output.popleft()
            if len(piece) > room:
                self._output.appendleft(piece[room:])
                piece = piece[:room]
            parts.append(piece)
            room -= len(piece)
        return b"".join(parts)

    def _cut_slow_reader(self) -> None:
        self._write_timer = None
        seconds = self._settings.request_timeout_s
        _log.write("slow", logging.WARNING, f"A client took nothing for {seconds:g} s.", peer=self._peer.text)
        self.cut()

    # ---- the end ----

    def _finish(self) -> None:
        """Close once all is written; a client that is still sending gets a moment to read the answer first."""
        self._closing = True
        self._disarm_read()
        if self._output or self._transport is None or self._transport.is_closing():
            return
        if self._request is not None and self._request.ended and not self._input:
            self._close()
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._input.clear()
        self._throttle()
        self._read_timer = self._loop.call_later(_LINGER_S, self._close)

    def _close(self) -> None:
        """Close; who does not take in time what was written before is cut."""
        self._closing = True
        self._disarm_read()
        if self._transport is None or self._transport.is_closing():
            return
        self._disarm_write()
        self._write_timer = self._loop.call_later(self._settings.request_timeout_s, self._transport.abort)
        self._transport.close()

    def _disarm_read(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _disarm_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class _Request:
    """One request as h11 reads it and writes its answer; a new h11 connection each, so that nothing is left in one.

    Attributes:
        ended: whether its body was read to the end.
        discarded: bytes of it that were read after the answer.
    """

    def __init__(self, head: bytes, settings: WireSettings) -> None:
        """Read a head, up to and with its empty line. Raises: Refusal."""
        names = _screen_head(head)
        self._settings = settings
        self._connection = h11.Connection(h11.SERVER, max_incomplete_event_size=settings.metadata)
        self._connection.receive_data(head)
        request = self._next_event()
        assert isinstance(request, h11.Request)
        self.method = request.method.decode("ascii")
        self.target = request.target
        self.version = request.http_version.decode("ascii")
        self.headers = list(request.headers)
        self.ended = False
        self.discarded = 0
        self._chunked = b"transfer-encoding" in names
        self._check()
        self._limit = asgi.body_limit(settings)
        self._answer: h11.Response | None = None
        self._size = 0
        self._chunks = 0
        self._unparsed = b""  # bytes that belong to no event yet: chunk heads and line ends
        self._in_chunk = False
        self._footer = 0  # bytes of the line end that the last chunk still has to come
        self.ended = isinstance(self._next_event(), h11.EndOfMessage)

    def _check(self) -> None:
        """What h11 lets through and we do not serve. Raises: Refusal."""
        if self.version not in ("1.0", "1.1"):
            raise Refusal(asgi.VERSION_NOT_SPOKEN, "HTTP/1.0, HTTP/1.1 and HTTP/2 are spoken here.")
        if self.method in ("CONNECT", "TRACE"):
            raise Refusal(asgi.METHOD_REFUSED, "CONNECT and TRACE are not served.")
        if not self.target.startswith(b"/"):
            raise Refusal(asgi.MALFORMED, "The request's target must be a path that begins with /.")
        if self._chunked and self.version == "1.0":
            raise Refusal(asgi.MALFORMED, "HTTP/1.0 has no Transfer-Encoding.")
        if not _HOST.fullmatch(dict(self.headers).get(b"host", b"")):
            raise Refusal(asgi.MALFORMED, "The Host header must be a host name or address, with or without a port.")
        # As HTTP/2 counts them (RFC 9113, section 6.5.2).
        size = sum(len(name) + len(value) + 32 for name, value in self.headers) + len(self.target)
        if size > self._settings.metadata:
            raise Refusal(asgi.HEADERS_TOO_LARGE, sentences.headers_too_large(self._settings.metadata))

    def check_length(self) -> None:
        """Raises: Refusal: the body is announced to be too long."""
        if int(dict(self.headers).get(b"content-length", b"0")) > self._limit:
            raise Refusal(asgi.TOO_LARGE, sentences.body_too_large(self._settings.max_message))

    def _next_event(self) -> object:
        try:
            return self._connection.next_event()
        except h11.RemoteProtocolError as error:
            # Its text quotes what the client sent, which may be a key.
            if error.error_status_hint == HTTPStatus.NOT_IMPLEMENTED:
                raise Refusal(asgi.NOT_SPOKEN, "The only transfer coding spoken here is chunked.") from None
            raise Refusal(asgi.MALFORMED, "The request is not well-formed HTTP/1.1.") from None

    @property
    def last(self) -> bool:
        """Whether the connection ends with the answer that was written."""
        return self._connection.our_state is not h11.DONE

    def read(self, piece: bytes) -> tuple[bytes, bytes]:
        """Parse a piece, not empty: the part of the body in it, and what comes after the request. Raises: Refusal."""
        self._connection.receive_data(piece)
        unparsed = self._unparsed + piece
        place = 0  # in it, behind the last byte of the body
        frames, parts = [], []  # what stands between the parts of the body, and these
        while isinstance(event := self._next_event(), h11.Data):
            # Not `event.chunk_start`: h11 forgets it when a chunk's head came alone.
            if self._chunked and not self._in_chunk:
                self._chunks += 1
                start = unparsed.index(b"\r\n", place + self._footer) + 2
                frames.append(unparsed[place:start])
                place = start
            place += len(event.data)
            parts.append(event.data)
            self._in_chunk = not event.chunk_end
            self._footer = 2 if event.chunk_end else 0
            self._count(len(event.data))
        ended = isinstance(event, h11.EndOfMessage)
        rest = self._connection.trailing_data[0] if ended else b""
        if ended:
            frames.append(unparsed[place : len(unparsed) - len(rest)])
        self._unparsed = unparsed[place:]
        # h11 takes some bare line ends between chunks for whole ones; a proxy before us may see chunks end elsewhere.
        _screen(b"".join(frames))
        self.ended = ended
        return b"".join(parts), rest

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > self._limit:
            raise Refusal(asgi.TOO_LARGE, sentences.body_too_large(self._settings.max_message))
        if self._chunks > _CHUNKS + self._size // _MEAN_CHUNK:
            raise Refusal(asgi.MALFORMED, "The request's body comes in too many small chunks.")

    def invitation(self) -> list[bytes]:
        """The answer 100 (Continue), if the client waits for it."""
        if not self._connection.they_are_waiting_for_100_continue:
            return []
        return [self._connection.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))]

    def answer(self, status: int, headers: Headers, close: bool) -> None:
        """Keep the answer's head. A client that was not asked for its body may send it or not: we must close."""
        close = close or self._connection.they_are_waiting_for_100_continue
        kept = [*headers, (b"connection", b"close")] if close else list(headers)
        self._answer = h11.Response(status_code=status, headers=kept, reason=_REASON.get(status, b""))

    def written(self, data: bytes, last: bool) -> list[bytes]:
        """The next piece of the answer as bytes for the wire.

        An answer that comes before more of the body than we would discard says that we close: else the client's next
        request would be on its way already, and lost.
        """
        events: list[h11.Event] = []
        if self._answer is not None:
            if self._leaves_too_much(last):
                headers = [*self._answer.headers, (b"connection", b"close")]
                self._answer = h11.Response(
                    status_code=self._answer.status_code, headers=headers, reason=self._answer.reason
                )
            events.append(self._answer)
            self._answer = None
        if data:
            events.append(h11.Data(data=data))
        if last:
            events.append(h11.EndOfMessage())
        return [piece for event in events for piece in self._connection.send_with_data_passthrough(event) or ()]

    def _leaves_too_much(self, last: bool) -> bool:
        """Whether more of the body may still come than is discarded behind an answer, whose last piece is written."""
        if self.ended:
            return False
        if self._chunked:  # nobody knows; while the answer goes on, the application reads
            return last
        return int(dict(self.headers).get(b"content-length", b"0")) - self._size > _DISCARDED


def _screen(head: bytes | bytearray, start: int = 0, end: int = sys.maxsize) -> None:
    """Refuse bytes that no head, chunk head or trailer contains. Raises: Refusal."""
    if _BARE_LINE_END.search(head, start, end):
        raise Refusal(asgi.MALFORMED, "A line of the request ends in a bare carriage return or line feed.")
    if _CONTROL.search(head, start, end):
        raise Refusal(asgi.MALFORMED, "The request contains control characters where it may not.")


def _screen_head(head: bytes) -> list[bytes]:
    """Refuse what could make a proxy before us see other requests than we do; return the headers' names.

    Raises: Refusal.
    """
    _screen(head)
    lines = head.split(b"\r\n")[1:-2]
    if any(line.startswith((b" ", b"\t")) for line in lines):
        raise Refusal(asgi.MALFORMED, "A header is folded over several lines.")
    pairs = [(name.lower(), value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in lines)]
    names = [name for name, _ in pairs]
    if names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
        raise Refusal(asgi.MALFORMED, "The request's length is given more than once.")
    if not all(_LENGTH.fullmatch(value) for name, value in pairs if name == b"content-length"):
        raise Refusal(asgi.MALFORMED, "Content-Length must be a number.")
    return names
