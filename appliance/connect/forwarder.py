"""The forwarder: its listening sockets, its tunnels, and its life from start to stop."""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import time
from pathlib import Path

from appliance.connect import answers
from appliance.connect import trouble as troubles
from appliance.connect.credentials import Credentials, open_key
from appliance.connect.settings import Settings
from appliance.connect.trouble import Trouble
from appliance.connect.tunnel import Tunnel
from appliance.connect.upstream import Upstream
from appliance.core.config import parse_address
from appliance.core.errors import AddressError, ConfigError
from appliance.core.logs import RateLimitedLog
from appliance.core.systemd import Notifier

_log = logging.getLogger(__name__)
_say = RateLimitedLog(_log, per_second=1)

_BACKLOG = 512
_BEYOND = 256
"""Connections beyond max_connections that are still told why they are refused; others are closed at once."""

_TICK_S = 1.0
_FILES_S = 60.0
"""Seconds between two looks at the certificate's files and its end while nobody connects."""

_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What a machine without IPv6 says of [::1]."""


class Forwarder:
    """Listens, and carries each connection to the appliance."""

    def __init__(self, settings: Settings, credentials: Credentials, notifier: Notifier) -> None:
        self._settings = settings
        self._credentials = credentials
        self._notifier = notifier
        self.upstream = Upstream(settings, credentials)
        self._tunnels: set[Tunnel] = set()
        self._forwarded: set[Tunnel] = set()
        self._servers: list[asyncio.Server] = []
        self._none_left = asyncio.Event()
        self._status = ""
        self.addresses: list[str] = []
        """Where it listens, as clients write it."""

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second one ends it at once. SIGHUP reads the certificate files anew.

        Raises: ConfigError: an address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        stop, now = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: (now if stop.is_set() else stop).set())
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        await self.start()
        ticker = asyncio.create_task(self._tick())
        try:
            self._notifier.ready(self._told_status())
            await stop.wait()
            self._notifier.stopping()
            stopping = asyncio.create_task(self.stop(self._settings.stop_s))
            hurry = asyncio.create_task(now.wait())
            await asyncio.wait((stopping, hurry), return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if not stopping.done():
                stopping.cancel()
                await self.stop(0)
        finally:
            ticker.cancel()

    async def start(self) -> None:
        """Listen. Raises: ConfigError: it cannot."""
        loop = asyncio.get_running_loop()
        for sock in _listen(self._settings.listen):
            server = await loop.create_server(lambda: self._come(Tunnel(self)), sock=sock, backlog=_BACKLOG)
            self._servers.append(server)
            self.addresses.append(_as_url(sock))
        loaded = self._credentials.loaded
        _log.info(
            "connections to %s are forwarded to %s, with the client certificate %s",
            " and ".join(self.addresses),
            self._settings.upstream,
            loaded.title(),
        )
        if not answers.HTTP2:
            _log.warning(
                "the native HTTP/2 extension was not built here: while the appliance cannot be reached, connections of "
                "gRPC clients are closed without a sentence; this log has it"
            )
        readable = open_key(self._settings)
        if readable:
            _log.warning("%s", readable)
        self._credentials.warn()

    def reload(self) -> None:
        """Read the certificate files anew; keep the last good ones if they are bad. Connections stay."""
        self._notifier.reloading()
        self._credentials.refresh(force=True)
        self.upstream.try_now()
        self._notifier.ready(self._told_status())

    async def stop(self, grace_s: float) -> None:
        """Accept no more; give open connections `grace_s` seconds to end, then close them."""
        for server in self._servers:
            server.close()
        if self._settings.listen.startswith("unix:"):
            with contextlib.suppress(OSError):
                os.unlink(self._settings.listen.removeprefix("unix:"))
        for tunnel in tuple(self._tunnels - self._forwarded):
            tunnel.close()
        if self._forwarded and grace_s:
            _log.info("stopping; %d connections have %g s to end", len(self._forwarded), grace_s)
        await self._wait_until_none(grace_s)
        for tunnel in tuple(self._tunnels):
            tunnel.close()
        await self._wait_until_none(1.0)
        for tunnel in tuple(self._tunnels):
            tunnel.abort()
        await self._wait_until_none(1.0)

    async def _wait_until_none(self, seconds: float) -> None:
        if self._tunnels:
            self._none_left.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._none_left.wait(), seconds)

    # ---- what tunnels ask ----

    def _come(self, tunnel: Tunnel) -> asyncio.Protocol:
        if len(self._tunnels) >= self._settings.max_connections + _BEYOND:
            _say.write("beyond", logging.WARNING, f"{len(self._tunnels)} connections are open; another one was closed")
            return _Closed()
        self._tunnels.add(tunnel)
        return tunnel

    def admit(self, tunnel: Tunnel) -> Trouble | None:
        """Take a place among the forwarded connections, or say why there is none."""
        limit = self._settings.max_connections
        if len(self._forwarded) >= limit:
            _say.write("max", logging.WARNING, f"{limit} connections are open (max_connections); others are refused")
            return troubles.full(limit)
        self._forwarded.add(tunnel)
        return None

    def left(self, tunnel: Tunnel) -> None:
        """A client's connection is gone."""
        self._tunnels.discard(tunnel)
        self._forwarded.discard(tunnel)
        if not self._tunnels:
            self._none_left.set()

    def told(self, tunnel: Tunnel, trouble: Trouble) -> None:
        """A client is told that, and holds no place any more."""
        self._forwarded.discard(tunnel)
        if trouble.http == 400:
            _say.write(trouble.kind, logging.WARNING, f"{trouble.what} {trouble.remedy}")
        elif trouble == self.upstream.trouble:
            self.upstream.refused()

    # ---- every now and then ----

    async def _tick(self) -> None:
        looked = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for tunnel in tuple(self._tunnels):
                try:
                    tunnel.tick(now, self._settings.idle_s)
                except Exception:
                    # Last resort: one connection's trouble must not be the end of all others' time limits.
                    _log.exception("a connection could not be looked after, and was cut")
                    tunnel.abort()
            if now - looked >= _FILES_S:
                looked = now
                if self._credentials.refresh():
                    self.upstream.try_now()
                self._credentials.warn()
            self._notifier.alive()
            status = self._told_status()
            if status != self._status:
                self._status = status
                self._notifier.status(status)

    def _told_status(self) -> str:
        where = f"{' and '.join(self.addresses)} → {self._settings.upstream}"
        trouble = self.upstream.trouble
        if trouble is not None:
            return f"{where}: {trouble.what}"
        return f"{where}, {len(self._forwarded)} connections"


class _Closed(asyncio.Protocol):
    """A connection that nobody has room for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Goodbye."""
        transport.close()


# ---- listening -------------------------------------------------------------------------------------------------------


def _listen(address: str) -> list[socket.socket]:
    """Bound sockets; for localhost one of each family that the machine has, on the same port."""
    if address.startswith("unix:"):
        return [_listen_unix(Path(address.removeprefix("unix:")))]
    host, port = parse_address(address)
    if host != "localhost":
        return [_listen_tcp(host, port, address)]
    first = _listen_tcp("127.0.0.1", port, address)
    try:
        second = _listen_tcp("::1", first.getsockname()[1], address)
    except ConfigError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_SUCH_FAMILY:
            return [first]
        first.close()
        raise
    return [first, second]


def _listen_tcp(host: str, port: int, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot_listen(address, error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise _cannot_listen(address, error) from error
    sock.setblocking(False)
    return sock


def _listen_unix(path: Path) -> socket.socket:
    """A socket that only this user may open. One that was left behind is replaced; one that somebody serves is not."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not _answers(path):
                os.unlink(path)
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        sock.close()
        raise _cannot_listen(f"unix:{path}", error) from error
    sock.setblocking(False)
    return sock


def _answers(path: Path) -> bool:
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as knock:
        try:
            knock.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def _cannot_listen(address: str, error: OSError) -> AddressError:
    remedy = "Set listen to another one"
    if error.errno == errno.EADDRINUSE:
        remedy += "; perhaps appliance connect runs already"
    return AddressError(f"listen = {address!r} cannot be listened on: {error.strerror}. {remedy}.")


def _as_url(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
