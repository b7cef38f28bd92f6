"""Taking connections: the accept loop, what connections may cost, the PROXY header, the TLS handshake.

A connection is `accepted` by the system, comes through the `Gate`, says who it is (behind a trusted proxy), and does
its handshake; then it belongs to the protocol that `make` gave, until that calls `released`. Whatever happens on the
way, its place at the gate is given back exactly once.
"""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable

from appliance.core.logs import RateLimitedLog
from appliance.core.metrics import Metrics
from appliance.wire import proxy
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

_log = logging.getLogger(__name__)

_BURST = 16
"""Connections taken in one turn of the loop, so that a flood of them does not stop the service to others."""

_PRESSED_S = 2.0
"""Seconds a handshake is given for certain while all places for handshakes are taken: two round trips to anywhere."""

_RETRY_S = 0.5
"""Seconds without accepting after the system refused us a descriptor or memory."""

_SHUTDOWN_S = 1.0
"""Seconds a client has for its half of the TLS goodbye."""

_NOT_TLS = {
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "WRONG_VERSION_NUMBER",
    "UNKNOWN_PROTOCOL",
    "WRONG_SSL_VERSION",
    "BAD_RECORD_TYPE",
    "UNEXPECTED_MESSAGE",
    "UNEXPECTED_RECORD",
    "RECORD_TOO_SMALL",
    "RECORD_LENGTH_MISMATCH",
    "PACKET_LENGTH_TOO_LONG",
    "ENCRYPTED_LENGTH_TOO_LONG",
    "BAD_PACKET",
    "LENGTH_MISMATCH",
    "LENGTH_TOO_SHORT",
}
_NOTHING_IN_COMMON = {
    "NO_SHARED_CIPHER",
    "NO_SUITABLE_KEY_SHARE",
    "NO_SUITABLE_GROUPS",
    "NO_SUITABLE_SIGNATURE_ALGORITHM",
    "NO_SHARED_SIGNATURE_ALGORITHMS",
    "UNSUPPORTED_PROTOCOL",
    "NO_PROTOCOLS_AVAILABLE",
    "VERSION_TOO_LOW",
    "NO_APPLICATION_PROTOCOL",
    "INAPPROPRIATE_FALLBACK",
    "NO_COMMON_SIGNATURE_ALGORITHMS",
}
_SENTENCES = {
    "timeout": "a handshake was not finished in time (connections.handshake_timeout_s)",
    "reset": "a client left before its handshake was finished",
    "not_tls": "a client does not speak TLS: plain HTTP, or a PROXY header of one whom server.trusted_proxies does "
    "not name",
    "no_common_protocol": "a client and we have no TLS version, cipher or signature in common",
    "certificate": "a client certificate was refused",
    "distrusted": "a client broke the handshake off; most often it does not trust our certificate's authority",
    "handshake": "a handshake failed",
    "proxy_header": "a trusted proxy's connection was refused",
    "per_address": "an address has all the connections it may have (connections.per_address)",
    "setup": "a connection could not be set up",
}
"""Reason, as the metric has it → what the log says."""


class Gate:
    """What all listeners share: how many connections there may be, in all, from one address, and in their handshake.

    While there is no room, listeners stop accepting and clients wait in the system's queue. When it is handshakes that
    take the room, those that have had two seconds make place, the eldest first: silent connections cannot keep others
    out for the whole of `handshake_timeout_s`. Only to be used from the event loop's thread.
    """

    def __init__(self, settings: WireSettings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._by_address: dict[str, int] = {}
        self._handshakes: dict[Place, None] = {}  # in the order in which they began
        self._waiting: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._say = RateLimitedLog(_log, per_second=5)
        self.open = 0
        """Connections now, those in their handshake included."""
        if metrics is not None:
            metrics.watch(metrics.connections, lambda: self.open)

    @property
    def handshakes(self) -> int:
        """Connections now that have not finished their handshake."""
        return len(self._handshakes)

    def full(self) -> str:
        """The setting that keeps the next one out, "" when there is room."""
        if self.open >= self._settings.max_connections:
            return "connections.max"
        if len(self._handshakes) >= self._settings.handshakes:
            return "connections.handshakes"
        return ""

    def enter(self, cut: Callable[[], None]) -> "Place":
        """Take a place for a new connection; `cut` ends its handshake when others need the room."""
        place = Place(self, cut)
        self.open += 1
        self._handshakes[place] = None
        return place

    def wait(self, resume: Callable[[], None]) -> None:
        """Have `resume` called once, when there is room."""
        self._waiting.append(resume)
        limit = self.full()
        if limit == "connections.max":
            count = self._settings.max_connections
            self.say(logging.WARNING, f"{count} connections are open (connections.max); new ones wait")
        self._watch_eldest()

    def leave(self, resume: Callable[[], None]) -> None:
        """Forget a `resume` that waits."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(resume)

    def say(self, level: int, message: str, kind: str = "", **fields: object) -> None:
        """Log at a bounded rate for each kind, by default for each message."""
        self._say.write(kind or message, level, message, **fields)

    def _made_room(self) -> None:
        if self._waiting and not self.full():
            waiting, self._waiting = self._waiting, []
            for resume in waiting:
                resume()
        self._watch_eldest()  # perhaps only handshakes are in the way now

    def _watch_eldest(self) -> None:
        """While somebody waits for handshakes to end, look again when the eldest has had its time."""
        if self._timer is None and self._waiting and self.full() == "connections.handshakes":
            ends = next(iter(self._handshakes)).began + _PRESSED_S
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(ends - time.monotonic(), 0), self._press)

    def _press(self) -> None:
        self._timer = None
        if self._waiting and self.full() == "connections.handshakes":
            eldest = next(iter(self._handshakes))
            if eldest.began + _PRESSED_S <= time.monotonic():
                del self._handshakes[eldest]
                eldest.cut()
        self._made_room()


class Place:
    """One connection's place at the gate."""

    __slots__ = ("_address", "_gate", "_released", "began", "cut")

    def __init__(self, gate: Gate, cut: Callable[[], None]) -> None:
        self._gate = gate
        self._address = ""
        self._released = False
        self.began = time.monotonic()
        self.cut = cut

    def claim(self, address: str) -> bool:
        """Count the connection for its real address; False when that has as many as it may."""
        gate = self._gate
        count = gate._by_address.get(address, 0)
        if count >= gate._settings.per_address:
            return False
        gate._by_address[address] = count + 1
        self._address = address
        return True

    def established(self, *, secure: bool) -> None:
        """The handshake is over, and the protocol has the connection."""
        gate = self._gate
        gate._handshakes.pop(self, None)
        if gate._metrics is not None:
            gate._metrics.connections_accepted.inc()
            if secure:
                gate._metrics.handshake_seconds.observe(time.monotonic() - self.began)
        gate._made_room()

    def refused(self, reason: str, peer: str, detail: str = "") -> None:
        """The connection was not to be; count it, say why, and give the place back."""
        gate = self._gate
        if gate._metrics is not None:
            gate._metrics.connections_refused.labels(reason).inc()
        # Balancers try whether the port answers by connecting and leaving: no news.
        level = logging.DEBUG if reason == "reset" else logging.INFO
        fields = {"detail": detail} if detail else {}
        gate.say(level, _SENTENCES[reason], kind=reason, reason=reason, peer=peer, **fields)
        self.release()

    def release(self) -> None:
        """Give the place back; only the first call counts."""
        if self._released:
            return
        self._released = True
        gate = self._gate
        gate.open -= 1
        gate._handshakes.pop(self, None)
        if self._address:
            left = gate._by_address[self._address] - 1
            if left:
                gate._by_address[self._address] = left
            else:
                del gate._by_address[self._address]
        gate._made_room()


class Listener:
    """Accepts connections on one listening socket and hands them to protocols."""

    def __init__(
        self,
        name: str,
        sock: socket.socket,
        tls: Callable[[], ssl.SSLContext] | None,
        make: Callable[[Peer, Callable[[], None]], asyncio.Protocol],
        gate: Gate,
        settings: WireSettings,
    ) -> None:
        """Make a listener that does not accept yet.

        Args:
            name: the configuration's, for the log, e.g. "server.listen".
            sock: listening; it is the listener's from now on, and closed by `close`.
            tls: gives the context for the next handshake; None: no TLS.
            make: gives the protocol of a connection, once it is known whose it is; `connection_made` comes after the
                handshake, if ever, and must not raise: on uvloop nobody would end the connection then. In
                `connection_lost` the protocol calls the function that it was given.
        """
        self._name = name
        self._sock = sock
        self._tls = tls
        self._make = make
        self._gate = gate
        self._settings = settings
        self._proxies = [ipaddress.ip_network(network) for network in settings.trusted_proxies]
        self._setting_up: set[asyncio.Task[None]] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to accept, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accept no more and close our descriptor; idempotent. Connections stay, handshakes go on.

        Who still waits in the system's queue is refused by it, unless somebody else holds the same socket (systemd's
        store, a parent, another front): then they wait for that one.
        """
        if self._closed:
            return
        self._closed = True
        self._gate.leave(self._resume)
        if self._retry is not None:
            self._retry.cancel()
        self._ignore()
        self._sock.close()

    @property
    def handshaking(self) -> bool:
        """Whether a connection was accepted that is not its protocol's yet."""
        return bool(self._setting_up)

    async def wait_closed(self, *, cut: bool = False) -> None:
        """Return when no handshake is under way any more. Args: cut: end those that are, now."""
        tasks = list(self._setting_up)
        if cut:
            await asyncio.sleep(0)  # a task cancelled before its first step would not even close its socket
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- accepting ----

    def _on_readable(self) -> None:
        for _ in range(_BURST):
            if self._gate.full():
                self._ignore()
                self._gate.wait(self._resume)
                return
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:  # gone again before we took it
                    continue
                self._pause(error)
                return
            self._take(sock, address)

    def _resume(self) -> None:
        if self._loop is not None and not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def _ignore(self) -> None:
        if self._loop is not None and self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())

    def _pause(self, error: OSError) -> None:
        """No descriptor or memory for another connection: a loop that tries at once would only burn the processor."""
        self._ignore()
        self._retry = asyncio.get_running_loop().call_later(_RETRY_S, self._resume)
        advice = "raise LimitNOFILE or lower connections.max" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        self._gate.say(
            logging.WARNING,
            f"{self._name} cannot accept for the moment: {error.strerror}" + (f"; {advice}" if advice else ""),
            open=self._gate.open,
        )

    def _take(self, sock: socket.socket, address: object) -> None:
        host, port = _host_and_port(address)
        sock.setblocking(False)
        if host:
            with contextlib.suppress(OSError):  # it is gone already; the handshake will notice
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

        def cut() -> None:
            task.cancel()

        place = self._gate.enter(cut)
        peer = _peer(host, port, self._tls is not None)
        behind_proxy = bool(host and self._proxies) and self._is_proxy(host)
        # Whoever may open a unix socket is on this machine, and all of them share one name.
        if host and not behind_proxy and not place.claim(host):
            sock.close()
            place.refused("per_address", peer.text)
            return
        task = asyncio.create_task(self._set_up(sock, peer, place, behind_proxy))
        self._setting_up.add(task)
        task.add_done_callback(self._setting_up.discard)

    def _is_proxy(self, host: str) -> bool:
        address = ipaddress.ip_address(host.partition("%")[0])
        return any(address in network for network in self._proxies)

    # ---- one connection, until it is a protocol's ----

    async def _set_up(self, sock: socket.socket, peer: Peer, place: Place, behind_proxy: bool) -> None:
        """PROXY header, then handshake; every way out but the good one gives the place back."""
        handed_over = False

        def make() -> asyncio.Protocol:
            nonlocal handed_over
            protocol = self._make(peer, place.release)
            handed_over = True  # from now on the transport closes the socket
            return protocol

        try:
            async with asyncio.timeout(self._settings.handshake_timeout_s):
                if behind_proxy:
                    peer = await self._behind_proxy(sock, peer)
                    if not place.claim(peer.address):
                        place.refused("per_address", peer.text)
                        return
                transport = await self._handshake(sock, make)
            place.established(secure=peer.secure)
            if transport.is_closing():
                # Lost in the moment between: a protocol that never heard of its connection cannot release it.
                place.release()
        except proxy.ProxyHeaderInvalid as error:
            place.refused("proxy_header", peer.text, str(error))
        except asyncio.CancelledError:
            place.refused("timeout", peer.text)
            raise
        except OSError as error:
            place.refused(refusal(error), peer.text, _detail(error))
        except Exception:
            # No context to be had, or a protocol that failed: nothing a client can do, and nothing to die of.
            _log.exception("a connection could not be set up", extra={"peer": peer.text, "listener": self._name})
            place.refused("setup", peer.text)
        finally:
            if not handed_over:
                sock.close()

    async def _handshake(self, sock: socket.socket, make: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        """Make a transport of the socket; returns when the protocol has been told of its connection."""
        loop = asyncio.get_running_loop()
        if self._tls is None:
            return (await loop.connect_accepted_socket(make, sock))[0]
        try:
            context = self._tls()
        except OSError as error:  # ssl's errors are of this kind too, and would look like the client's
            raise RuntimeError("there is no TLS context") from error
        transport, _ = await loop.connect_accepted_socket(
            make,
            sock,
            ssl=context,
            ssl_handshake_timeout=2 * self._settings.handshake_timeout_s,  # ours ends it first
            ssl_shutdown_timeout=_SHUTDOWN_S,
        )
        return transport

    async def _behind_proxy(self, sock: socket.socket, peer: Peer) -> Peer:
        """Who is behind the proxy `peer`. Not one byte is read beyond the header: what follows is for TLS."""
        head = await self._exactly(sock, proxy.HEAD_BYTES)
        source = proxy.parse(head, await self._exactly(sock, proxy.body_length(head)))
        return _peer(source.address, source.port, peer.secure) if source else peer

    async def _exactly(self, sock: socket.socket, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
            if not piece:
                raise ConnectionResetError(f"closed after {len(data)} of {count} bytes of the PROXY header")
            data += piece
        return data


def refusal(error: BaseException) -> str:
    """Why a handshake failed: one of a few words, for the metric's label.

    The reasons are OpenSSL's, by name.
    """
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        reason = error.reason or ""
        if reason in _NOT_TLS:
            return "not_tls"
        if reason in _NOTHING_IN_COMMON:
            return "no_common_protocol"
        if "ALERT" in reason:
            return "distrusted"
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE" in reason:
            return "certificate"
        return "handshake"
    return "reset"


def _detail(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or "").lower().replace("_", " ")
    return str(error)


def _host_and_port(address: object) -> tuple[str, int]:
    """What accept said as (IP address, port); ("", 0) on a unix socket."""
    if not isinstance(address, tuple):
        return "", 0
    host: str = address[0]
    if host.startswith("::ffff:") and "." in host:  # an IPv4 client on a dual-stack socket
        host = host.removeprefix("::ffff:")
    return host, address[1]


def _peer(host: str, port: int, secure: bool) -> Peer:
    if not host:
        return Peer("unix", "unix:", secure)
    return Peer(host, f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}", secure)
