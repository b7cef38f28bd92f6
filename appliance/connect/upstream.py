"""Connections to the appliance: attempts that are shared, become rarer while they fail, and say once what is wrong."""

import asyncio
import contextlib
import logging
import random
import socket
import time
from collections.abc import Callable
from typing import Any

from appliance.connect import trouble as troubles
from appliance.connect.credentials import Alpn, Credentials
from appliance.connect.settings import Settings
from appliance.connect.trouble import Refused, Trouble

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.1
"""Seconds without attempts after the first that failed; each further one doubles them."""

_SPREAD = 0.2
"""Pauses are that part shorter or longer: the forwarders of a site shall not come back in one moment."""

_SETTLE_S = 0.5
"""Seconds after a handshake in which TLS 1.3 may still bring the word that our certificate was refused."""

_SAY_AGAIN_S = 60.0
"""Seconds after which a trouble that goes on is said again."""

_HANDSHAKES = 64
"""Handshakes at once; the appliance takes 256 of all its clients together (connections.handshakes)."""

_GOODBYE_S = 5.0
"""Seconds for the appliance's half of the TLS goodbye."""

_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""A machine that lost its power is noticed within two minutes, and firewalls see a live connection. Source: tcp(7)."""


class Upstream:
    """The appliance, as seen from here. For the event loop's thread alone."""

    def __init__(self, settings: Settings, credentials: Credentials) -> None:
        self._settings = settings
        self._credentials = credentials
        self._trouble: Trouble | None = None
        self._since = 0.0  # of the trouble
        self._said_at = 0.0
        self._failed_at = 0.0
        self._pause_s = 0.0
        self._retry_at = 0.0
        self._refused = 0  # clients that heard of the trouble
        self._probe: asyncio.Future[None] | None = None
        self._handshakes = asyncio.Semaphore(_HANDSHAKES)

    @property
    def trouble(self) -> Trouble | None:
        """Why connections fail at present; None: the last one did not."""
        return self._trouble

    @property
    def retry_at(self) -> float:
        """Monotonic time before which nothing is tried again."""
        return self._retry_at

    async def connect(self, alpn: Alpn, make: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        """A new connection after its handshake. While attempts fail there is one at a time, and pauses between them.

        The caller reports what becomes of it: `proven`, or `failed` before that.

        Raises: Refused: it was not to be.
        """
        if self._credentials.refresh():
            self.try_now()
        await self._turn()
        probe = self._begin_probe() if self._trouble else None
        began = time.monotonic()
        try:
            async with self._handshakes:
                if self._trouble is not None and began < self._failed_at:  # while we waited for our turn
                    raise Refused(self._trouble)
                transport = await self._attempt(alpn, make)
        except Exception as error:  # whatever it is, the client hears a sentence, and not a reset
            found = error.trouble if isinstance(error, Refused) else self._explain(error)
            self.failed(found, began)
            raise Refused(found) from error
        except BaseException:  # its client left: the next one tries
            self._release_probe(probe)
            raise
        if probe is not None:
            asyncio.get_running_loop().call_later(_SETTLE_S, self._end_probe, probe, began)
        return transport

    def proven(self) -> None:
        """The appliance has said something: it takes us."""
        if self._trouble is not None:
            _log.info(
                "%s answers again after %.0f s; %d connections were refused meanwhile",
                self._settings.upstream,
                time.monotonic() - self._since,
                self._refused,
            )
        self._trouble = None
        self._pause_s = self._retry_at = self._failed_at = 0.0
        self._release_probe(self._probe)

    def failed(self, found: Trouble, began: float) -> None:
        """A connection that began at that monotonic time was not to be."""
        now = time.monotonic()
        if self._trouble is None:
            self._since, self._refused = now, 0
        if began >= self._failed_at:  # not one of many that failed together
            spread = random.uniform(1 - _SPREAD, 1 + _SPREAD)  # noqa: S311  # no secret
            self._pause_s = min(max(self._pause_s * 2, _FIRST_PAUSE_S), self._settings.retry_max_s)
            self._failed_at = now
            self._retry_at = now + self._pause_s * spread
        if self._trouble is None or self._trouble.kind != found.kind or now - self._said_at > _SAY_AGAIN_S:
            self._said_at = now
            _log.warning("%s %s", found.what, found.remedy, extra={"kind": found.kind})
        self._trouble = found
        self._release_probe(self._probe)

    def refused(self) -> None:
        """A client was told of the trouble."""
        self._refused += 1

    def try_now(self) -> None:
        """Pause no longer: what we show the appliance has changed."""
        self._pause_s = self._retry_at = 0.0

    # ---- taking turns ----

    async def _turn(self) -> None:
        """Return when an attempt may be made. Raises: Refused: not now."""
        while self._trouble is not None:
            if time.monotonic() < self._retry_at:
                raise Refused(self._trouble)
            if self._probe is None:
                return
            await asyncio.shield(self._probe)

    def _begin_probe(self) -> "asyncio.Future[None]":
        self._probe = asyncio.get_running_loop().create_future()
        return self._probe

    def _end_probe(self, probe: "asyncio.Future[None]", began: float) -> None:
        """Nothing bad was heard of the connection for a while."""
        if self._probe is probe and self._failed_at < began:
            self.proven()
        self._release_probe(probe)

    def _release_probe(self, probe: "asyncio.Future[None] | None") -> None:
        """Whoever waits for that attempt looks again."""
        if self._probe is probe:
            self._probe = None
        if probe is not None and not probe.done():
            probe.set_result(None)

    # ---- one attempt ----

    async def _attempt(self, alpn: Alpn, make: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        settings, loop = self._settings, asyncio.get_running_loop()
        async with asyncio.timeout(settings.connect_timeout_s):
            sock = await self._reach()
            transport, _ = await loop.create_connection(
                make,
                sock=sock,
                ssl=self._credentials.loaded.contexts[alpn],
                server_hostname=settings.host,
                ssl_handshake_timeout=settings.connect_timeout_s,
                ssl_shutdown_timeout=_GOODBYE_S,
            )
        if alpn == "h2" and _tls(transport).selected_alpn_protocol() != "h2":
            transport.abort()
            raise Refused(troubles.no_http2(settings))
        return transport

    async def _reach(self) -> socket.socket:
        """A connected socket: the addresses of the host are tried in turn, each with its share of the time."""
        settings, loop = self._settings, asyncio.get_running_loop()
        until = loop.time() + settings.connect_timeout_s
        first: Exception | None = None
        found = await loop.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        for place, (family, kind, protocol, _, address) in enumerate(found):
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:  # a family that this machine does not have
                first = first or error
                continue
            try:
                sock.setblocking(False)
                _tune(sock)
                async with asyncio.timeout((until - loop.time()) / (len(found) - place)):
                    await loop.sock_connect(sock, address)
            except (OSError, TimeoutError) as error:
                sock.close()
                first = first or error
            except BaseException:
                sock.close()
                raise
            else:
                return sock
        raise first or socket.gaierror(socket.EAI_NONAME, "no address")

    def _explain(self, error: Exception) -> Trouble:
        found = troubles.of_connecting(error, self._settings, self._credentials.loaded)
        if found.kind == "unforeseen":
            _log.error("unforeseen error", exc_info=error)
        return found

    def explain_silence(self, transport: Any, error: Exception | None) -> Trouble:
        """Why a connection ended after its handshake before it brought a byte."""
        version = _tls(transport).version() or ""
        return troubles.of_silence(error, version, self._settings, self._credentials.loaded)


def _tls(transport: Any) -> Any:
    return transport.get_extra_info("ssl_object")


def _tune(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
