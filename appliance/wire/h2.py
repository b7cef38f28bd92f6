"""One HTTP/2 connection: gRPC calls go to their endpoints, all other requests to the ASGI app.

The native session does the protocol; this is what Python does once per call. An endpoint's `quick` is asked first,
and a call that needs waiting gets a task. Whatever happens, a call ends once: with its reply, with a status, or because
the client is gone.
"""

import asyncio
import logging
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from appliance.core.errors import Overloaded
from appliance.core.logs import RateLimitedLog
from appliance.core.memory import STRANGER
from appliance.core.types import Call, RpcAbort, RpcStatus
from appliance.wire import _h2, grpc, sentences
from appliance.wire.asgi import HEADERS_TOO_LARGE, Headers, Problem, json_headers
from appliance.wire.calls import MARK, Stream, Unary, release
from appliance.wire.context import Context, Head
from appliance.wire.h2http import INTERNAL_ERROR, NO_ERROR, HttpRequest
from appliance.wire.peer import Peer

_log = RateLimitedLog(logging.getLogger(__name__))

WINDOW = 65_535
"""Bytes of a body that may come before its caller was asked for: HTTP/2's own initial window."""

_PULL = 256 * 1024
"""Bytes handed to the transport at once."""

_SENTENCE, _DETAILS = 1000, 4096
"""Characters of a status's message, and bytes of its details, that are sent. grpcio takes 8 kB of trailers."""

_GREETING = 24 + 9
"""Bytes that every client begins with: the preface and an empty SETTINGS frame. Source: RFC 9113, 3.4."""

_CALM = 0xB
"""ENHANCE_YOUR_CALM. Source: RFC 9113, 7."""

_HOARD = 16
"""A connection whose unread replies take that part of the memory budget gets no new calls."""

_SHARE = 4
"""A connection's unread replies may take that part of it; a call whose reply would be beyond ends with a status."""

_CRAWL = 1 << 20
"""Bytes that a client with unread replies must take within `request_timeout_s`, or all there are."""

_LAST_PING_S = 2.0
"""Seconds that a client without calls has to answer that it heard of the connection's end."""

_WHOLE = _h2.HEAD | _h2.MESSAGE | _h2.END


class Http2(asyncio.Protocol):
    """One connection, after its handshake."""

    def __init__(self, context: Context, peer: Peer, released: Callable[[], None]) -> None:
        """Args: released: called once when the connection is gone."""
        settings = context.settings
        self._context = context
        self._settings = settings
        self._peer = peer
        self._released = released
        self._session = _h2.Session(settings.max_message, settings.metadata, settings.streams, WINDOW)
        self._calls: dict[int, Unary | Stream | HttpRequest] = {}
        self._transport: Any = None
        self._paused = False  # the client does not take what we write
        self._closed = False
        self._feeding = False
        self._flush_planned = False
        self._heard = 0  # bytes
        self._charged = 0  # bytes of waiting replies, in the budget
        self._loop = asyncio.get_running_loop()
        now = time.monotonic()
        self._opened_at = self._heard_at = self._busy_at = now
        self._written = 0  # bytes
        self._crawl: tuple[float, int] | None = None  # since when replies wait, and what was written then
        self._pinged_at = 0.0
        self._shut_at = 0.0

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: Any) -> None:
        """Greet the client."""
        self._transport = transport
        if self._context.load:
            self._session.load(self._context.load)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Take in what came, and answer what can be answered at once."""
        self._heard_at = time.monotonic()
        self._heard += len(data)
        self._pinged_at = 0.0
        self._feeding = True
        try:
            self._handle(self._session.feed(data))
        finally:
            self._feeding = False
        self._flush()

    def eof_received(self) -> bool:
        """The client will send no more: nothing of HTTP/2 can go on."""
        return False

    def pause_writing(self) -> None:
        """The client does not take what we write: no more is made, and nothing new is read."""
        self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It does again."""
        self._paused = False
        self._transport.resume_reading()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        """Whatever was going on is cancelled: nobody waits for it."""
        self._transport = None
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.lost()
        self._charge(0)
        self._released()

    # ---- the server's side ----

    @property
    def busy(self) -> bool:
        """Whether a call is not over."""
        return self._session.streams > 0

    @property
    def receiving(self) -> bool:
        """Whether a call was let in that is not all here yet, or that the app is working on."""
        return any(call.receiving for call in self._calls.values())

    @property
    def retired(self) -> bool:
        """Whether `shut` is through: no new call can come any more."""
        return self._closed or self._transport is None or self._session.retired

    def shut(self) -> None:
        """Take no new calls; the connection ends with its last one. No call is lost: the client is told which were
        taken."""
        if not self._shut_at:
            self._shut_at = time.monotonic()
            self._session.shut()
            self.plan_flush()

    def end(self) -> None:
        """Answer what is still going on that it should be tried elsewhere, and close."""
        for call in list(self._calls.values()):
            call.expel()
        self._flush()  # a session that is ended says nothing more for its streams
        self._session.abandon(NO_ERROR)
        self._flush()
        self._close()

    def tick(self, now: float) -> None:
        """Called every second or so: whatever takes too long ends."""
        transport, settings = self._transport, self._settings
        if transport is None:
            return
        for call in tuple(self._calls.values()):
            call.tick(now)
        self._session.tick(now, settings.request_timeout_s)
        if self._context.load:
            self._session.load(self._context.load)
        if self._crawls(now):
            self._say_closed("the client does not take its replies")
            transport.abort()
            return
        if self._session.streams:
            self._busy_at = now
            self.plan_flush()
        if self._heard < _GREETING and now - self._opened_at > settings.handshake_timeout_s:
            transport.abort()  # connected, and did not say what it must
        elif self._shut_at and now - self._shut_at > (settings.age_grace_s if self.busy else _LAST_PING_S):
            self.end()
        elif settings.idle_s and now - self._busy_at > settings.idle_s:
            self.shut()
        elif settings.keepalive_s and now - self._heard_at > settings.keepalive_s:
            self._ask_for_life(now)

    def _crawls(self, now: float) -> bool:
        """Whether replies have waited for so long, and so little of them was taken, that the client only holds them."""
        if not self._session.pending and not self._transport.get_write_buffer_size():
            self._crawl = None
            return False
        if self._crawl is None or self._written - self._crawl[1] >= _CRAWL:
            self._crawl = (now, self._written)
        return now - self._crawl[0] > self._settings.request_timeout_s

    def _ask_for_life(self, now: float) -> None:
        if not self._pinged_at:
            self._pinged_at = now
            self._session.ping()
            self.plan_flush()
        elif now - self._pinged_at > self._settings.keepalive_timeout_s:
            self._say_closed("the client gives no sign of life")
            self._transport.abort()

    def _say_closed(self, why: str) -> None:
        _log.write("closed", logging.INFO, f"closed: {why}", peer=self._peer.text)

    # ---- events ----

    def _handle(self, events: "list[_h2.Event]") -> None:
        for stream, flags, head, body, timeout_us, size in events:
            if flags == _WHOLE:
                assert head is not None
                assert body is not None
                self._whole(stream, self._context.head(head), body, timeout_us)
            elif flags & _h2.HTTP:
                self._http(stream, flags, head, body)
            else:
                self._part(stream, flags, head, body, timeout_us, size)

    def _whole(self, stream: int, head: Head, body: bytes, timeout_us: int) -> None:
        """A call that came in one piece: most do."""
        refusal = self._refusal(head, timeout_us)
        if refusal is not None:
            self.finish(stream, refusal)
            return
        endpoint = head.endpoint
        call = self._call(head, timeout_us)
        if endpoint.quick is not None:
            done = partial(self._reply_timed, stream, call) if head.timed else partial(self.reply, stream)
            if endpoint.quick(call, body, done):
                return
        if endpoint.admit is None and len(body) > grpc.OPEN_TO_ALL:
            self.finish(stream, _too_large_for_all())
            return
        opened = self._calls[stream] = self._open(stream, head, call)
        opened.whole(body)

    def _part(
        self, stream: int, flags: int, head: bytes | None, body: bytes | None, timeout_us: int, size: int
    ) -> None:
        """A call in several pieces: large, streaming, compressed, cancelled, or wrong."""
        if flags & _h2.HEAD and not flags & _h2.HEAVY:
            assert head is not None
            self._begin(stream, self._context.head(head), timeout_us, size if flags & _h2.WANT else 0)
        elif flags & _h2.HEAVY:
            sentence = sentences.headers_too_large(self._settings.metadata)
            self._finish(stream, RpcStatus.RESOURCE_EXHAUSTED, sentence)
        opened = self._calls.get(stream)
        if not isinstance(opened, Unary | Stream):
            return  # answered already; what still comes is dropped
        if flags & _h2.RESET:
            del self._calls[stream]
            opened.lost()
        elif flags & _h2.TOO_BIG:
            self._context.too_large()
            sentence = sentences.request_too_large(self._settings.max_message)
            opened.abort(RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, sentence))
        elif flags & _h2.BROKEN:
            opened.abort(RpcAbort(RpcStatus.INTERNAL, "The call ended inside a message, or is no gRPC."))
        elif flags & _h2.DRAINED:
            opened.drained()
        elif flags & _h2.WANT and not flags & _h2.HEAD and not self._admit(stream, opened, size):
            return
        if flags & _h2.MESSAGE:
            assert body is not None
            if opened.head.endpoint.admit is None and len(body) > grpc.OPEN_TO_ALL:
                opened.abort(_too_large_for_all())
                return
            opened.message(body, bool(flags & _h2.COMPRESSED))
        if flags & _h2.END:
            opened.ended()

    def _begin(self, stream: int, head: Head, timeout_us: int, size: int) -> None:
        """The head of a call is here and its body is not: it is let in, or turned away."""
        refusal = self._refusal(head, timeout_us)
        if refusal is not None:
            self.finish(stream, refusal)
            return
        opened = self._open(stream, head, self._call(head, timeout_us))
        if self._admit(stream, opened, size):
            self._calls[stream] = opened

    def _refusal(self, head: Head, timeout_us: int) -> RpcAbort | None:
        """Why a call goes no further than its headers, or None."""
        if head.refusal is not None:
            return head.refusal
        if timeout_us < -1:
            return _BAD_TIMEOUT
        if self._charged > self._context.budget.limit // _HOARD:
            return RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, _HOARDING)
        return None

    def _admit(self, stream: int, opened: "Unary | Stream", size: int) -> bool:
        """Ask who the caller is and reserve `size` bytes for its message; if both succeed, let it come."""
        if isinstance(opened, Unary) and not opened.receiving:  # the bytes of its first message are still held
            opened.abort(grpc.more_than_one())
            return False
        admit = opened.head.endpoint.admit
        asked = replace(opened.call, memory=None)  # a stream's own is that of the message its endpoint works on
        refusal: bytes | RpcAbort | None = None
        try:
            if admit is not None:
                refusal = admit(asked, size)
            elif size <= grpc.OPEN_TO_ALL:
                asked.memory = self._context.budget.expect(size, STRANGER)
            else:
                refusal = _too_large_for_all()
        except Overloaded as error:
            refusal = RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, str(error))
        except RpcAbort as abort:
            refusal = abort
        except Exception:  # one call's trouble, and not that of all others on the connection
            refusal = grpc.unforeseen(opened.head.method)
        if refusal is None:
            opened.admitted(asked.memory, size)
            if size:
                self._session.admit(stream)
            return True
        release(asked)
        if isinstance(refusal, RpcAbort):
            opened.abort(refusal)
        else:
            opened.answer(refusal)
        return False

    def _call(self, head: Head, timeout_us: int) -> Call:
        deadline = None if timeout_us < 0 else time.monotonic() + timeout_us * 1e-6
        peer = self._peer
        return Call(head.method, head.metadata, peer.text, deadline, peer.certificate, peer.chain)

    def _open(self, stream: int, head: Head, call: Call) -> "Unary | Stream":
        kind = Unary if head.endpoint.unary is not None else Stream
        return kind(self, stream, head, call)

    def _http(self, stream: int, flags: int, head: bytes | None, body: bytes | None) -> None:
        """A piece of a request that is not gRPC."""
        if flags & _h2.HEAVY:
            self.refuse_http(stream, HEADERS_TOO_LARGE, sentences.headers_too_large(self._settings.metadata))
            return
        if flags & _h2.HEAD:
            assert head is not None
            self._calls[stream] = HttpRequest(self, stream, head)
        exchange = self._calls.get(stream)
        if not isinstance(exchange, HttpRequest):
            return
        if flags & _h2.RESET:
            del self._calls[stream]
            exchange.lost()
            return
        if flags & _h2.DRAINED:
            exchange.drained_now()
        if body is not None:
            exchange.feed(body)
        if flags & _h2.END:
            exchange.ended()

    # ---- replies ----

    @property
    def context(self) -> Context:
        """What this connection shares with the others."""
        return self._context

    @property
    def peer(self) -> Peer:
        """Who is on the other end."""
        return self._peer

    @property
    def session(self) -> _h2.Session:
        """The native session, for the calls of this connection."""
        return self._session

    def reply(self, stream: int, message: bytes | RpcAbort, compressed: bool = False) -> None:
        """End a unary call with its reply, or with a status. Harmless when the client is gone."""
        if isinstance(message, RpcAbort):
            self.finish(stream, message)
            return
        if len(message) > self._settings.max_reply:
            sentence = sentences.reply_too_large(len(message), self._settings.max_reply)
            self._finish(stream, RpcStatus.RESOURCE_EXHAUSTED, sentence)
            return
        no_room = self.no_room(len(message))
        if no_room is not None:
            self._finish(stream, RpcStatus.RESOURCE_EXHAUSTED, no_room)
        elif self._transport is not None and self._session.reply(stream, message, compressed):
            self.queued(len(message))

    def tell_timing(self, stream: int, call: Call) -> None:
        """Say with the reply, which comes next, where the time went; if that is known."""
        if call.timing is not None and call.timing.said and self._transport is not None:
            self._session.time(stream, call.timing.said.encode("ascii"))

    def _reply_timed(self, stream: int, call: Call, message: bytes | RpcAbort) -> None:
        self.tell_timing(stream, call)
        self.reply(stream, message)

    def push(self, stream: int, message: bytes, compressed: bool) -> bool:
        """Send one message of a stream.

        Returns: False: wait for `drained` before the next one; True also when the client is gone.
        Raises:  RpcAbort: it is over the limit, or cannot be kept.
        """
        if len(message) > self._settings.max_reply:
            sentence = sentences.reply_too_large(len(message), self._settings.max_reply)
            raise RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, sentence)
        no_room = self.no_room(len(message))
        if no_room is not None:
            raise RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, no_room)
        if self._transport is None or not self._session.push(stream, message, compressed):
            return True
        self.queued(len(message))
        return self._session.queued(stream, MARK) <= MARK

    def no_room(self, size: int) -> str | None:
        """Why a reply of `size` bytes cannot be kept until its client takes it, or None."""
        pending, budget = self._session.pending, self._context.budget
        if pending + size <= _PULL:
            return None
        if pending and pending + size > budget.limit // _SHARE:
            return _HOARDING
        if pending - self._charged + size > budget.free:
            return _NO_MEMORY
        return None

    def queued(self, size: int) -> None:
        """`size` bytes of a reply were given to the session: count them, and write soon."""
        if size > MARK:
            self._charge(self._session.pending)  # many may be made in this turn of the loop
        self.plan_flush()

    def finish(self, stream: int, abort: RpcAbort) -> None:
        """End a call with a status."""
        self._finish(stream, abort.status, abort.message, abort.details)

    def refuse_http(self, stream: int, problem: Problem, details: str, more: Headers = ()) -> None:
        """Answer an HTTP request that the app is not asked about; `more` are headers of the answer."""
        body = problem.body(details)
        if self._session.respond(stream, problem.status, [*json_headers(body), *more], False):
            self._session.data(stream, body, True)
        else:  # the app has begun to answer, and that cannot be unsaid
            self._session.reset(stream, INTERNAL_ERROR)
        self.plan_flush()

    def done(self, stream: int) -> None:
        """A call is over; it is not cancelled any more."""
        self._calls.pop(stream, None)

    def _finish(self, stream: int, status: RpcStatus, message: str, details: bytes = b"") -> None:
        if self._transport is None:
            return
        # Clients refuse trailers that are too large, and with them the status.
        encoded = b64encode(details).rstrip(b"=") if len(details) <= _DETAILS else b""
        self._session.finish(stream, int(status), grpc.percent_encode(message[:_SENTENCE]), encoded)
        self.plan_flush()

    def plan_flush(self) -> None:
        """Write what is ready at the end of this turn of the loop, together with what else becomes ready."""
        if not self._feeding and not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        session, transport = self._session, self._transport
        if transport is None or self._closed:
            return
        while not self._paused:
            data = session.pull(_PULL)
            if data:
                transport.write(data)
                self._written += len(data)
            if session.has_events:
                self._feeding = True
                try:
                    self._handle(session.events())
                finally:
                    self._feeding = False
            elif len(data) < _PULL:
                break
        pending = session.pending
        if pending != self._charged:
            self._charge(pending)
        if not session.alive:
            if session.fault:
                self._say_closed(session.fault)
            self._close()

    def _close(self) -> None:
        """Write what is written, then close."""
        if self._transport is not None and not self._closed:
            self._closed = True
            self._transport.close()

    def _charge(self, pending: int) -> None:
        """Replies that wait for their clients count against the memory budget; one client cannot take all of it."""
        budget = self._context.budget
        budget.add(pending - self._charged)
        self._charged = pending
        if pending > max(budget.limit // _SHARE, _PULL) and pending > self._settings.max_reply:
            told = f"closed: {pending} bytes of replies wait for the client"
            _log.write("hoarding", logging.WARNING, told, peer=self._peer.text)
            self._session.abandon(_CALM)
            self._transport.abort()


# ---- helpers ---------------------------------------------------------------------------------------------------------

_HOARDING = "Too many replies wait on this connection; read them, then call again."
_NO_MEMORY = "There is no memory for the reply: limits.memory_in_flight is used up; try again."
_BAD_TIMEOUT = RpcAbort(RpcStatus.INTERNAL, "The call's grpc-timeout cannot be read.")


def _too_large_for_all() -> RpcAbort:
    return RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, grpc.too_large(grpc.OPEN_TO_ALL))
