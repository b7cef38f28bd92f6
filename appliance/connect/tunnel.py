"""One client's connection: what it speaks is seen from its first bytes, then bytes are carried both ways.

Neither side is read faster than the other one takes it, so that a connection holds a bounded number of bytes.
"""

import asyncio
import time
from typing import Any, Protocol

from appliance.connect import answers
from appliance.connect.credentials import Alpn
from appliance.connect.trouble import Refused, Trouble
from appliance.connect.upstream import Upstream

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What every HTTP/2 client says first. Source: RFC 9113, section 3.4."""

_TLS_HANDSHAKE = 0x16
"""First byte of a TLS client. Source: RFC 8446, section 5.1."""

_HIGH_WATER = 256 * 1024
"""Bytes that may wait for one side before the other one is not read any more."""

_KEPT = 256 * 1024
"""Bytes of an HTTP/2 client that are kept until the appliance has said something: should it refuse us, the calls in
them are answered. Before it has heard from its server, such a client may send 64 KiB of bodies, and headers."""

_SILENT_S = 60.0
"""Seconds that a client has for its first byte."""

_REPLY_DUE_S, _REPLY_BEGUN_S = 30.0, 5.0
"""Seconds without a byte after which a client that will say no more is taken to be gone: before its reply has begun,
and after."""

_REFUSING_S = 0.5
"""Seconds at least for which an HTTP/2 connection is answered here: its first call must have come."""

_LAST_WORDS_S = 30.0
"""Seconds in which a client must take what is left for it when the appliance has closed."""


class Owner(Protocol):
    """What a tunnel asks of the forwarder."""

    upstream: Upstream

    def admit(self, tunnel: "Tunnel") -> Trouble | None:
        """Take a place among the forwarded connections, or say why there is none."""

    def left(self, tunnel: "Tunnel") -> None:
        """The client's connection is gone."""

    def told(self, tunnel: "Tunnel", trouble: Trouble) -> None:
        """A client is told that."""


class Tunnel(asyncio.Protocol):
    """The client's side; it owns the other one."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._full = False  # the client does not take what we write
        self._held: set[str] = set()  # why the client is not read
        self._first = bytearray()  # what it said before there was anybody to say it to
        self._kept: bytearray | None = None  # what it said, until the appliance has said something
        self._alpn: Alpn | None = None
        self._head = False
        self._connecting: asyncio.Task[None] | None = None
        self._far: _Far | None = None
        self._said_last = False  # the client will say no more
        self._reply_begun = False
        self._refusing: Any = None  # answers.Http2, once the client is answered here
        self._closing_at = 0.0
        self._left_to_write = 0
        self._left = False
        self.moved_at = time.monotonic()
        """When a byte was last seen."""

    # ---- the client ----

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        self._transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        """It says something."""
        self.moved_at = time.monotonic()
        if self._far is not None:
            if self._kept is not None:
                self._kept += data
                if len(self._kept) > _KEPT:
                    self.hold("kept")
            self._reply_begun = False
            if not self._far.transport.is_closing():
                self._far.transport.write(data)
            return
        self._first += data
        if self._connecting is not None:
            if len(self._first) > _KEPT:
                self.hold("connecting")
        elif self._alpn is None:
            self._recognise()

    def eof_received(self) -> bool:
        """It will say no more. Over HTTP/1.1 it may still wait for its reply; over HTTP/2 it is gone.

        TLS, as Python has it, cannot pass that on.
        """
        self._said_last = True
        return self._alpn == "http/1.1"

    def pause_writing(self) -> None:
        """It does not take what the appliance says."""
        self._full = True
        if self._far is not None:
            self._far.transport.pause_reading()

    def resume_writing(self) -> None:
        """It does again."""
        self._full = False
        if self._far is not None:
            self._far.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone; the appliance hears of that."""
        if self._connecting is not None:
            self._connecting.cancel()
        far, self._far = self._far, None
        if far is not None:
            far.transport.close()
        self._leave()

    def hold(self, why: str) -> None:
        """Do not read the client for the moment."""
        if not self._held:
            self._transport.pause_reading()
        self._held.add(why)

    def go_on(self, why: str) -> None:
        """That reason is gone."""
        if why in self._held:
            self._held.discard(why)
            if not self._held and not self._transport.is_closing():
                self._transport.resume_reading()

    # ---- what it speaks ----

    def _recognise(self) -> None:
        first = bytes(self._first[: len(PREFACE)])
        if first == PREFACE:
            self._alpn, self._kept = "h2", bytearray()
        elif PREFACE.startswith(first):
            return
        else:
            self._alpn = "http/1.1"
            self._head = first.startswith(b"HEAD ")
            if not first[:1].isalpha():
                self._refuse(_not_http(first))
                return
        no_room = self._owner.admit(self)
        if no_room is not None:
            self._refuse(no_room)
            return
        self._connecting = asyncio.create_task(self._connect(self._alpn))

    async def _connect(self, alpn: Alpn) -> None:
        upstream = self._owner.upstream
        began = time.monotonic()
        far: _Far | None = None

        def make() -> "_Far":
            nonlocal far
            far = _Far(self, began)
            return far

        try:
            await upstream.connect(alpn, make)
        except Refused as refused:
            self._connecting = None
            self._refuse(refused.trouble)
            return
        except asyncio.CancelledError:
            if far is not None and far.transport is not None:
                far.transport.abort()
            raise
        self._connecting = None
        assert far is not None
        self._far = far
        if far.lost:
            self.far_lost(far, far.error)
            return
        if self._full:
            far.transport.pause_reading()
        first, self._first = bytes(self._first), bytearray()
        if self._kept is not None and not far.heard:
            self._kept += first
        far.transport.write(first)
        self.go_on("connecting")

    # ---- the appliance ----

    def heard(self) -> None:
        """The appliance has said something: it takes us, and will answer everything itself."""
        self._owner.upstream.proven()
        self._kept = None
        self.go_on("kept")

    def deliver(self, data: bytes) -> None:
        """What it says."""
        self.moved_at = time.monotonic()
        self._reply_begun = True
        if self._transport is not None:
            self._transport.write(data)

    def far_lost(self, far: "_Far", error: Exception | None) -> None:
        """The appliance's side is gone."""
        if self._far is not far:  # the attempt is not over, or the client left first
            return
        self._far = None
        if far.heard:
            self.close()
            return
        upstream = self._owner.upstream
        trouble = upstream.explain_silence(far.transport, error)
        upstream.failed(trouble, far.began)
        self._refuse(trouble)

    # ---- refusing ----

    def _refuse(self, trouble: Trouble) -> None:
        """Answer the client here."""
        transport = self._transport
        if self._left or transport.is_closing():
            return
        self._owner.told(self, trouble)
        retry_at = self._owner.upstream.retry_at
        if self._alpn == "h2":
            if not answers.HTTP2:
                self.close()
                return
            said = bytes((self._kept or b"") + self._first)
            protocol: Any = answers.over_http2(trouble, self._leave)
            self._refusing = protocol
            # Then the client's next call makes a new connection, which is tried.
            self._loop.call_later(max(retry_at - time.monotonic(), _REFUSING_S), protocol.shut)
        else:
            said = b""
            answer = answers.over_http1(trouble, head=self._head, retry_at=retry_at)
            protocol = answers.Farewell(answer, self._leave)
            self._closing_at = time.monotonic()
        self._first.clear()
        self._kept = None
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._held:
            self._held.clear()
            transport.resume_reading()
        if said:
            protocol.data_received(said)

    # ---- the end ----

    @property
    def forwarding(self) -> bool:
        """Whether it is connected to the appliance, or about to be."""
        return self._connecting is not None or self._far is not None

    def close(self) -> None:
        """Write what is written, and close both sides."""
        if self._refusing is not None:
            self._refusing.end()
        elif self._transport is not None and not self._transport.is_closing():
            self._closing_at = self._closing_at or time.monotonic()
            self._transport.close()

    def abort(self) -> None:
        """Close both sides now."""
        if self._far is not None:
            self._far.transport.abort()
        if self._transport is not None:
            self._transport.abort()

    def tick(self, now: float, idle_s: float) -> None:
        """Called every second: whatever takes too long ends."""
        if self._refusing is not None:
            self._refusing.tick(now)
            return
        quiet = now - self.moved_at
        if self._closing_at:
            left = self._transport.get_write_buffer_size()
            if left != self._left_to_write:
                self._left_to_write, self._closing_at = left, now
            elif now - self._closing_at > _LAST_WORDS_S:
                self.abort()
        elif self._alpn is None:
            if quiet > _SILENT_S:
                self.close()
        elif self._far is not None and (
            (idle_s and quiet > idle_s)
            or (self._said_last and quiet > (_REPLY_BEGUN_S if self._reply_begun else _REPLY_DUE_S))
        ):
            self.close()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._owner.left(self)


class _Far(asyncio.Protocol):
    """The appliance's side of a tunnel."""

    def __init__(self, tunnel: Tunnel, began: float) -> None:
        self._tunnel = tunnel
        self.began = began
        self.transport: Any = None
        self.heard = False
        self.lost = False
        self.error: Exception | None = None

    def connection_made(self, transport: Any) -> None:
        """The handshake is over."""
        self.transport = transport
        transport.set_write_buffer_limits(high=_HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        """The appliance says something."""
        if not self.heard:
            self.heard = True
            self._tunnel.heard()
        self._tunnel.deliver(data)

    def pause_writing(self) -> None:
        """It does not take what the client says."""
        self._tunnel.hold("far")

    def resume_writing(self) -> None:
        """It does again."""
        self._tunnel.go_on("far")

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        self.lost, self.error = True, error
        self._tunnel.far_lost(self, error)


def _not_http(first: bytes) -> Trouble:
    if first[0] == _TLS_HANDSHAKE:
        return Trouble(
            "tls_client", "a client speaks TLS here.", "Its base URL must begin with http://, not https://.", 400
        )
    return Trouble("garbage", "what a client sent is no HTTP.", "Speak HTTP/1.1, or HTTP/2 with prior knowledge.", 400)
