"""The server on the native wire: one port that speaks gRPC, gRPC-Web and REST over HTTP/2 and HTTP/1.1.

Which HTTP a connection speaks is agreed in the TLS handshake (ALPN), or shown by its first bytes.
"""

import asyncio
import contextlib
import logging
import math
import random
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.types import Endpoint
from appliance.wire.asgi import ASGIApp
from appliance.wire.context import Context
from appliance.wire.grpcweb import GrpcWeb
from appliance.wire.h2 import Http2
from appliance.wire.http1 import Http1
from appliance.wire.listener import Gate, Listener
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

_log = logging.getLogger(__name__)

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What every HTTP/2 client says first. Source: RFC 9113, 3.4."""

_RETIRE_LOOK_S = 0.01
"""Seconds between two looks whether all clients have heard that the server stops."""

_LAST_WORDS_S = 1.0
"""Seconds in which connections that were ended must be gone."""

_TICK_S = 1.0
"""Seconds between two looks at what takes too long."""


_DER = 2
"""`_ssl.ENCODING_DER`."""


class WireServer:
    """All listeners and their connections."""

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint],
        app: ASGIApp,
        settings: WireSettings,
        budget: MemoryBudget,
        metrics: Metrics | None = None,
    ) -> None:
        """Make a server without a port.

        Args:    app: answers what is neither gRPC nor gRPC-Web.
        """
        self._settings = settings
        too_large = metrics.rejected.labels("too_large").inc if metrics is not None else lambda: None
        web = GrpcWeb(app, endpoints, settings, budget, too_large)
        self._context = Context(endpoints, web, settings, budget, too_large)
        self._gate = Gate(settings, metrics)
        self._listeners: list[Listener] = []
        self._connections: set[_Connection] = set()
        self._all_gone = asyncio.Event()
        self._all_gone.set()
        self._shutting = False
        self._ticker: asyncio.Task[None] | None = None
        self.ports: dict[str, int] = {}

    def listen(self, name: str, sock: socket.socket, tls: Callable[[], ssl.SSLContext] | None) -> None:
        """Serve a listening socket, which is the server's from now on.

        Args:    tls: gives the context of the next handshake; None for a socket without TLS.
        """
        self._listeners.append(Listener(name, sock, tls, self._connection, self._gate, self._settings))
        if sock.family != socket.AF_UNIX:
            self.ports.setdefault(name, sock.getsockname()[1])

    async def start(self) -> None:
        """Accept connections."""
        for listener in self._listeners:
            listener.start()
        self._ticker = asyncio.create_task(self._tick())

    def report(self, load: bytes) -> None:
        """Have gRPC calls say this of us in their trailers, within a second. Args: load: a report in base64."""
        self._context.load = load

    def last(self) -> None:
        """Let every HTTP/1.1 connection end with its next answer: such clients cannot be told in any other way."""
        self._context.leaving = True
        for connection in tuple(self._connections):
            connection.last()

    def shut(self) -> None:
        """Accept no more, and let every connection end with its last call; clients are told which calls were taken."""
        self._shutting = True
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self._connections):
            connection.shut()

    async def retire(self, timeout_s: float, bodies_s: float) -> None:
        """Shut, and return when no new call can come and all that did are in their handlers' hands.

        Args:
            timeout_s: for clients that do not answer that they have heard of it, or are slow in their handshake.
            bodies_s: for bodies that are on their way.
        """
        self.shut()
        begun = time.monotonic()
        # One look sees all of them: an event for each would wake us thousands of times.
        while time.monotonic() < begun + timeout_s and not self._retired:  # noqa: ASYNC110
            await asyncio.sleep(_RETIRE_LOOK_S)
        while time.monotonic() < begun + bodies_s and any(c.receiving for c in self._connections):  # noqa: ASYNC110
            await asyncio.sleep(_RETIRE_LOOK_S)

    @property
    def _retired(self) -> bool:
        return all(c.retired for c in self._connections) and not any(li.handshaking for li in self._listeners)

    async def stop(self, grace_s: float) -> None:
        """Shut, wait until all connections are gone, and after `grace_s` seconds end those that are not."""
        self.shut()
        try:
            await asyncio.wait_for(self._all_gone.wait(), grace_s)
        except TimeoutError:
            for connection in tuple(self._connections):
                connection.end()
            await self._last_words()
        for listener in self._listeners:
            await listener.wait_closed(cut=True)  # handshakes that were going on
        await self._cut()
        if self._ticker is not None:
            self._ticker.cancel()

    async def _last_words(self) -> None:
        """Let the transports write what was said last; who does not read it is cut."""
        try:
            await asyncio.wait_for(self._all_gone.wait(), _LAST_WORDS_S)
        except TimeoutError:
            await self._cut()

    async def _cut(self) -> None:
        """End whatever is left; connections hear of their own end some turns of the loop later."""
        for connection in tuple(self._connections):
            connection.abort()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_gone.wait(), _LAST_WORDS_S)

    def _connection(self, peer: Peer, released: Callable[[], None]) -> asyncio.Protocol:
        return _Connection(self._context, peer, self._come, partial(self._gone, released))

    def _come(self, connection: "_Connection") -> None:
        self._connections.add(connection)
        self._all_gone.clear()
        if self._shutting:  # its handshake was going on when all others were told
            asyncio.get_running_loop().call_soon(connection.shut)

    def _gone(self, released: Callable[[], None], connection: "_Connection") -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._all_gone.set()
        released()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for connection in tuple(self._connections):
                try:
                    connection.tick(now)
                except Exception:
                    # Last resort: one connection's trouble must not be the end of all others' time limits.
                    _log.exception("a connection could not be looked after, and was cut")
                    connection.abort()


class _Connection(asyncio.Protocol):
    """A connection that has not shown yet which HTTP it speaks; then it hands over to that protocol."""

    def __init__(
        self,
        context: Context,
        peer: Peer,
        come: "Callable[[_Connection], None]",
        gone: "Callable[[_Connection], None]",
    ) -> None:
        self._context = context
        self._peer = peer
        self._come = come
        self._gone: Callable[[_Connection], None] | None = gone
        self._transport: Any = None
        self._protocol: Http1 | Http2 | None = None
        self._first = b""
        self._made_at = self._dies_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See who it is, and which protocol was agreed."""
        self._transport = transport
        self._made_at = time.monotonic()
        age = self._context.settings.age_s
        # Not all at once: the connections of one moment are spread over a fifth of the age.
        self._dies_at = self._made_at + age * random.uniform(0.9, 1.1) if age else math.inf  # noqa: S311  # no secret
        self._come(self)
        tls: Any = transport.get_extra_info("ssl_object")
        if tls is None:
            return
        self._peer.certificate, self._peer.chain = _certificates(tls)
        agreed = tls.selected_alpn_protocol()
        if agreed is not None:
            self._go_on_as(agreed == "h2")

    def data_received(self, data: bytes) -> None:
        """The first bytes of a client that agreed on nothing."""
        self._first += data
        if self._first.startswith(_PREFACE):
            self._go_on_as(True)
        elif not _PREFACE.startswith(self._first):
            self._go_on_as(False)

    def connection_lost(self, error: Exception | None) -> None:
        """Gone before it spoke."""
        self._forget()

    def _go_on_as(self, http2: bool) -> None:
        context = self._context
        if http2:
            protocol: Http1 | Http2 = Http2(context, self._peer, self._forget)
        else:
            protocol = Http1(context.app, self._peer, context.settings, context.budget, self._forget, context.too_large)
            if context.leaving:
                protocol.last()
        self._protocol = protocol
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        first, self._first = self._first, b""
        if first:
            protocol.data_received(first)

    def _forget(self) -> None:
        # Protocol and transport hold us: together we would keep TLS's buffers, a quarter of a MiB, until the garbage
        # collector comes by.
        self._transport = self._protocol = None
        gone, self._gone = self._gone, None
        if gone is not None:
            gone(self)

    # ---- the server's side ----

    def shut(self) -> None:
        """End with the last call."""
        if self._protocol is not None:
            self._protocol.shut()
        elif self._transport is not None:
            self._transport.close()

    def last(self) -> None:
        """See `WireServer.last`."""
        if isinstance(self._protocol, Http1):
            self._protocol.last()

    @property
    def receiving(self) -> bool:
        """Whether a call was let in that is not all here yet."""
        if isinstance(self._protocol, Http2):
            return self._protocol.receiving
        return self._protocol is not None and self._protocol.busy

    @property
    def retired(self) -> bool:
        """Whether no new call can come any more."""
        return self._protocol is None or self._protocol.retired

    def end(self) -> None:
        """End what is going on, and close; calls over HTTP/2 are told to try elsewhere."""
        if isinstance(self._protocol, Http2):
            self._protocol.end()
        elif self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()

    def tick(self, now: float) -> None:
        """Whatever takes too long ends."""
        if now > self._dies_at:
            self.shut()
        if isinstance(self._protocol, Http2):
            self._protocol.tick(now)
        elif self._protocol is None and now - self._made_at > self._context.settings.handshake_timeout_s:
            self.abort()


def _certificates(tls: ssl.SSLObject) -> tuple[bytes | None, bytes]:
    """The client's verified leaf and what is above it, PEM."""
    leaf = tls.getpeercert(binary_form=True)
    if not leaf:
        return None, b""
    # Public from Python 3.13 on; the object below has had both since 3.10. A resumed TLS 1.2 session has no verified
    # chain; then what the client sent must do, whose signatures are checked again with every request.
    inner = tls._sslobj  # type: ignore[attr-defined]
    chain = inner.get_verified_chain() or inner.get_unverified_chain() or []
    above = [ssl.DER_cert_to_PEM_cert(link.public_bytes(_DER)) for link in chain[1:]]
    return ssl.DER_cert_to_PEM_cert(leaf).encode(), "".join(above).encode()
