"""Connections: who comes in, who waits, who is refused, and that every place is given back exactly once.

Real loopback sockets and real TLS; every test runs on asyncio's loop and on uvloop, and fails when the loop had an
error that nobody handled.
"""

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from support.appliance import Pki
from support.contexts import client_tls, server_tls
from support.waiting import eventually_async

from appliance.core.metrics import Metrics
from appliance.wire import listener as module
from appliance.wire.listener import Gate, Listener, Place
from appliance.wire.peer import Peer
from appliance.wire.proxy import SIGNATURE
from appliance.wire.settings import WireSettings

PATIENCE_S = 60.0
Scenario = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario on one kind of loop; what reaches the loop's exception handler is a failure."""

    def go(scenario: Scenario) -> None:
        unhandled: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
            async with asyncio.timeout(PATIENCE_S):
                await scenario()

        try:
            with asyncio.Runner(loop_factory=request.param) as runner:
                runner.run(main())
        finally:
            assert unhandled == []

    return go


class Echo(asyncio.Protocol):
    """Sends back what comes; gives its place back as the contract says."""

    def __init__(self, world: "World", peer: Peer, released: Callable[[], None]) -> None:
        self.world, self.peer, self._released = world, peer, released
        self.ends = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.world.made.append(self)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ends += 1
        self.world.lost.append(self)
        self._released()


class World:
    """A listener on a loopback port, and what became of its connections."""

    def __init__(
        self,
        tls: Callable[[], ssl.SSLContext] | None = None,
        sock: socket.socket | None = None,
        make: Callable[[Peer, Callable[[], None]], asyncio.Protocol] | None = None,
        **settings: Any,
    ) -> None:
        self.sock = sock or socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = self.sock.getsockname()
        self.metrics = Metrics()
        self.settings = WireSettings(**settings)
        self.gate = Gate(self.settings, self.metrics)
        self.made: list[Echo] = []
        self.lost: list[Echo] = []
        self.listener = Listener(
            "server.listen", self.sock, tls, make or (lambda p, r: Echo(self, p, r)), self.gate, self.settings
        )

    async def __aenter__(self) -> "World":
        self.listener.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.listener.close()
        await self.listener.wait_closed(cut=True)
        for echo in self.made:
            echo.transport.abort()
        await self.empty()

    async def empty(self) -> None:
        """Return when no connection has a place any more; the counts never go below that."""
        await eventually_async(lambda: self.gate.open <= 0, what=f"{self.gate.open} places were not given back")
        assert (self.gate.open, self.gate.handshakes, self.gate._by_address) == (0, 0, {})

    def refused(self, reason: str) -> float:
        """How many were refused for that reason."""
        return self.value("connections_refused_total", reason=reason)

    def value(self, name: str, **labels: str) -> float:
        """A metric's value, 0 when it has none yet."""
        return self.metrics.registry.get_sample_value(f"inference_appliance_{name}", labels) or 0.0

    async def connect(self) -> socket.socket:
        """A raw client."""
        sock = socket.socket(self.sock.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self.address)
        except BaseException:
            sock.close()
            raise
        return sock

    @contextlib.asynccontextmanager
    async def client(self, tls: ssl.SSLContext | None = None, first: bytes = b"") -> AsyncIterator["Client"]:
        """A client that sends `first` before TLS begins."""
        sock = await self.connect()
        if first:
            await asyncio.get_running_loop().sock_sendall(sock, first)
        reader, writer = await asyncio.open_connection(sock=sock, ssl=tls, server_hostname="localhost" if tls else None)
        try:
            yield Client(reader, writer)
        finally:
            writer.transport.abort()

    async def answers(self, tls: ssl.SSLContext | None = None, first: bytes = b"") -> Peer:
        """Connect, hear the echo, leave; who the listener thought it was."""
        async with self.client(tls, first) as client:
            await client.hears_echo()
            return self.made[-1].peer


class Client:
    """One client's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def hears_echo(self) -> None:
        self.writer.write(b"hello")
        assert await self.reader.readexactly(5) == b"hello"


async def hung_up(sock: socket.socket) -> None:
    """Return when the other side has ended the connection, whatever it sent before."""
    with contextlib.suppress(ConnectionError):
        while await asyncio.get_running_loop().sock_recv(sock, 65536):
            pass
    sock.close()


def proxied(address: str = "192.0.2.7", port: int = 40000) -> bytes:
    """A PROXY header that names an IPv4 client."""
    packed = socket.inet_aton(address) + socket.inet_aton("10.0.0.1") + struct.pack("!HH", port, 443)
    return SIGNATURE + b"\x21\x11\x00\x0c" + packed


# ---- the good ways in ----


def test_a_connection_without_tls_reaches_its_protocol(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World() as world, world.client() as client:
            await client.hears_echo()
            peer = world.made[0].peer
            port = client.writer.get_extra_info("sockname")[1]
            assert (peer.address, peer.text, peer.secure) == ("127.0.0.1", f"ipv4:127.0.0.1:{port}", False)
            assert (world.gate.open, world.gate.handshakes) == (1, 0)
            assert world.value("connections") == 1
            assert world.value("connections_accepted_total") == 1
            assert world.value("handshake_seconds_count") == 0

    run(scenario)


def test_a_tls_connection_reaches_its_protocol_after_the_handshake(run: Callable[[Scenario], None], pki: Pki) -> None:
    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context) as world, world.client(client_tls(pki)) as client:
            await client.hears_echo()
            assert world.made[0].peer.secure
            assert world.made[0].transport.get_extra_info("ssl_object").version() == "TLSv1.3"
            assert world.value("handshake_seconds_count") == 1
            assert world.value("connections_accepted_total") == 1

    run(scenario)


def test_the_context_is_asked_for_at_every_handshake(run: Callable[[Scenario], None], pki: Pki) -> None:
    """So a renewed certificate is shown to the next client, and the connections that stand are left alone."""

    async def scenario() -> None:
        asked: list[ssl.SSLContext] = []

        def tls() -> ssl.SSLContext:
            asked.append(server_tls(pki))
            return asked[-1]

        async with World(tls) as world, world.client(client_tls(pki)) as first:
            await world.answers(client_tls(pki))
            await first.hears_echo()
            assert [echo.transport.get_extra_info("sslcontext") for echo in world.made] == asked
            assert len(asked) == 2

    run(scenario)


def test_sockets_are_set_for_small_replies_and_dead_peers(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World() as world, world.client() as client:
            await client.hears_echo()
            sock = world.made[0].transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    run(scenario)


def test_an_ipv4_client_of_a_dual_stack_socket_has_its_ipv4_address(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        async with World(sock=sock) as world:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.address[1])
            await Client(reader, writer).hears_echo()
            port = writer.get_extra_info("sockname")[1]
            assert (world.made[0].peer.address, world.made[0].peer.text) == ("127.0.0.1", f"ipv4:127.0.0.1:{port}")
            writer.transport.abort()
            reader, writer = await asyncio.open_connection("::1", world.address[1])
            await Client(reader, writer).hears_echo()
            port = writer.get_extra_info("sockname")[1]
            assert (world.made[1].peer.address, world.made[1].peer.text) == ("::1", f"ipv6:[::1]:{port}")
            writer.transport.abort()

    run(scenario)


def test_clients_of_a_unix_socket_have_no_address_and_no_limit_each(
    run: Callable[[Scenario], None], tmp_path: Path
) -> None:
    async def scenario() -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(tmp_path / "wire.sock"))
        sock.listen(16)
        async with World(sock=sock, per_address=1) as world, world.client() as one, world.client() as two:
            await one.hears_echo()
            await two.hears_echo()
            peer = world.made[0].peer
            assert (peer.address, peer.text, peer.secure) == ("unix", "unix:", False)

    run(scenario)


# ---- limits ----


@pytest.mark.parametrize("limit", ["max_connections", "handshakes"])
def test_clients_wait_while_there_is_no_room_and_come_in_when_there_is(
    run: Callable[[Scenario], None], pki: Pki, limit: str
) -> None:
    """Nobody is refused for it: who waits stays in the system's queue."""

    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context, **{limit: 3}) as world:
            holders = [await world.connect() for _ in range(3)]
            await eventually_async(lambda: world.gate.open == 3)
            waiting = asyncio.create_task(world.answers(client_tls(pki)))
            await eventually_async(lambda: world.gate._waiting)
            assert (world.gate.open, waiting.done()) == (3, False)
            holders[0].close()
            await waiting
            for holder in holders:
                holder.close()
            await world.empty()
            assert world.refused("reset") == 3
            assert world.value("connections_accepted_total") == 1

    run(scenario)


def test_an_established_connection_makes_room_for_the_next_handshake(run: Callable[[Scenario], None], pki: Pki) -> None:
    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context, handshakes=1) as world, contextlib.AsyncExitStack() as stack:
            clients = [world.client(client_tls(pki)) for _ in range(20)]
            opened = await asyncio.gather(*(stack.enter_async_context(client) for client in clients))
            await asyncio.gather(*(client.hears_echo() for client in opened))
            assert world.gate.open == 20

    run(scenario)


def test_silent_connections_do_not_keep_others_out(
    run: Callable[[Scenario], None], pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all places for handshakes taken, those that had their time make room long before handshake_timeout_s."""
    monkeypatch.setattr(module, "_PRESSED_S", 0.05)

    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context, handshakes=8, handshake_timeout_s=PATIENCE_S * 10) as world:
            silent = [await world.connect() for _ in range(20)]
            await world.answers(client_tls(pki))
            assert world.refused("timeout") >= 13
            for sock in silent:
                sock.close()

    run(scenario)


async def test_who_waits_for_a_connection_may_find_handshakes_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both limits are reached, and a connection ends: then it is the handshakes that must make room."""
    monkeypatch.setattr(module, "_PRESSED_S", 0.01)
    gate = Gate(WireSettings(max_connections=3, handshakes=2))
    established = gate.enter(lambda: None)
    established.established(secure=False)
    silent = [gate.enter(lambda: silent[0].release()), gate.enter(lambda: None)]
    resumed = asyncio.Event()
    gate.wait(resumed.set)
    established.release()
    await asyncio.wait_for(resumed.wait(), PATIENCE_S)
    assert gate.open == 1


def test_an_address_has_only_so_many_connections(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World(per_address=2) as world, world.client() as one, world.client() as two:
            await one.hears_echo()
            await two.hears_echo()
            await hung_up(await world.connect())
            assert world.refused("per_address") == 1
            assert world.gate.open == 2
            one.writer.transport.abort()
            await eventually_async(lambda: world.gate.open == 1)
            await world.answers()

    run(scenario)


def test_a_flood_of_connections_lets_the_loop_turn(run: Callable[[Scenario], None]) -> None:
    """Accepting goes in bursts: whatever else the loop has to do gets its turn in between."""

    async def scenario() -> None:
        world = World()
        flood = [await world.connect() for _ in range(100)]
        seen: list[int] = []
        async with world:
            while len(world.made) < 100:
                seen.append(world.gate.open)
                await asyncio.sleep(0)
        assert max(after - before for before, after in itertools.pairwise(seen)) <= 2 * module._BURST
        for sock in flood:
            sock.close()

    run(scenario)


def test_without_descriptors_it_waits_and_goes_on(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.01)

    class NoDescriptors(socket.socket):
        """A listening socket that cannot accept for a while."""

        failures = 3

        def accept(self) -> tuple[socket.socket, Any]:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return super().accept()

    async def scenario() -> None:
        sock = NoDescriptors(socket.AF_INET, socket.SOCK_STREAM)
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)
        async with World(sock=sock) as world:
            await world.answers()
            assert sock.failures == 0

    run(scenario)
    assert "server.listen cannot accept for the moment: Too many open files; raise LimitNOFILE" in caplog.text


# ---- handshakes that fail ----


async def _plain_http(world: World, pki: Pki) -> None:
    sock = await world.connect()
    await asyncio.get_running_loop().sock_sendall(sock, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await hung_up(sock)


async def _proxy_header_of_a_stranger(world: World, pki: Pki) -> None:
    sock = await world.connect()
    await asyncio.get_running_loop().sock_sendall(sock, proxied())
    await hung_up(sock)


async def _leaves_at_once(world: World, pki: Pki) -> None:
    (await world.connect()).close()


async def _resets(world: World, pki: Pki) -> None:
    sock = await world.connect()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def _leaves_in_the_middle(world: World, pki: Pki) -> None:
    sock = await world.connect()
    await asyncio.get_running_loop().sock_sendall(sock, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    sock.close()


async def _old_version(world: World, pki: Pki) -> None:
    context = client_tls(pki)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    await _fails(world, context)


async def _does_not_trust_us(world: World, pki: Pki) -> None:
    """On a thread, with a blocking socket: asyncio's clients leave without the alert that others send."""

    def call() -> None:
        with (
            contextlib.suppress(ssl.SSLError),
            socket.create_connection(world.address, PATIENCE_S) as sock,
            ssl.create_default_context().wrap_socket(sock, server_hostname="localhost"),
        ):
            raise AssertionError("a stranger's certificate was trusted")

    await asyncio.to_thread(call)


async def _no_client_certificate(world: World, pki: Pki) -> None:
    await _fails(world, client_tls(pki))


async def _fails(world: World, context: ssl.SSLContext) -> None:
    with contextlib.suppress(OSError, EOFError):
        async with world.client(context) as client:
            await client.reader.readexactly(1)


FAILURES: list[tuple[Callable[[World, Pki], Awaitable[None]], dict[str, Any], str]] = [
    (_plain_http, {}, "not_tls"),
    (_proxy_header_of_a_stranger, {}, "not_tls"),
    (_leaves_at_once, {}, "reset"),
    (_resets, {}, "reset"),
    (_leaves_in_the_middle, {}, "reset"),
    (_old_version, {"minimum_version": ssl.TLSVersion.TLSv1_3}, "no_common_protocol"),
    (_does_not_trust_us, {}, "distrusted"),
    (_no_client_certificate, {"verify_mode": ssl.CERT_REQUIRED}, "certificate"),
]


@pytest.mark.parametrize(("client", "server", "reason"), FAILURES, ids=[f[0].__name__.strip("_") for f in FAILURES])
def test_a_failed_handshake_is_counted_by_its_reason_and_costs_no_place(
    run: Callable[[Scenario], None],
    pki: Pki,
    caplog: pytest.LogCaptureFixture,
    client: Callable[[World, Pki], Awaitable[None]],
    server: dict[str, Any],
    reason: str,
) -> None:
    caplog.set_level(logging.DEBUG, "appliance")

    async def scenario() -> None:
        context = server_tls(pki, **server)
        async with World(lambda: context) as world:
            await client(world, pki)
            await eventually_async(lambda: world.refused(reason) == 1, what=f"refused: {reason}; {caplog.text}")
            await world.empty()
            assert world.made == []

    run(scenario)
    (record,) = [record for record in caplog.records if record.name == module.__name__]
    assert record.exc_info is None
    assert record.levelno == (logging.DEBUG if reason == "reset" else logging.INFO)
    assert vars(record)["peer"].startswith("ipv4:127.0.0.1:")


def test_a_client_certificate_of_a_stranger_is_refused(run: Callable[[Scenario], None], pki: Pki) -> None:
    async def scenario() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki.folder / "server.crt", pki.folder / "server.key")
        context.load_default_certs()
        context.verify_mode = ssl.CERT_OPTIONAL
        async with World(lambda: context) as world:
            await _fails(world, client_tls(pki, "laptop"))
            await eventually_async(lambda: world.refused("certificate") == 1)

    run(scenario)


def test_a_handshake_that_takes_too_long_is_ended(run: Callable[[Scenario], None], pki: Pki) -> None:
    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context, handshake_timeout_s=0.05) as world:
            await hung_up(await world.connect())
            await eventually_async(lambda: world.refused("timeout") == 1)
            await world.empty()

    run(scenario)


def test_without_a_tls_context_the_connection_is_closed_and_the_listener_lives(
    run: Callable[[Scenario], None], pki: Pki
) -> None:
    async def scenario() -> None:
        contexts: list[ssl.SSLContext] = []

        def tls() -> ssl.SSLContext:
            if not contexts:
                raise FileNotFoundError("the certificate is gone")
            return contexts[0]

        async with World(tls) as world:
            await hung_up(await world.connect())
            assert world.refused("setup") == 1
            contexts.append(server_tls(pki))
            await world.answers(client_tls(pki))

    run(scenario)


def test_a_protocol_that_cannot_be_made_costs_its_connection_only(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        def broken(peer: Peer, released: Callable[[], None]) -> asyncio.Protocol:
            raise ValueError("a bug")

        async with World(make=broken) as world:
            await hung_up(await world.connect())
            await world.empty()
            assert world.refused("setup") == 1

    run(scenario)


def test_failed_handshakes_leave_no_descriptor_open(run: Callable[[Scenario], None], pki: Pki) -> None:
    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context, handshake_timeout_s=PATIENCE_S) as world:
            await world.answers(client_tls(pki))
            await world.empty()
            before = len(os.listdir("/proc/self/fd"))
            for client in (_plain_http, _does_not_trust_us, _leaves_in_the_middle, _resets):
                await asyncio.gather(*(client(world, pki) for _ in range(10)))
            await world.empty()
            await eventually_async(lambda: len(os.listdir("/proc/self/fd")) <= before)

    run(scenario)


# ---- behind a proxy ----


def test_behind_a_trusted_proxy_the_real_client_is_seen(run: Callable[[Scenario], None], pki: Pki) -> None:
    """And not one byte of the TLS that follows at once is lost."""

    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context, trusted_proxies=("127.0.0.0/8",)) as world:
            peer = await world.answers(client_tls(pki), first=proxied("192.0.2.7", 40000))
            assert (peer.address, peer.text, peer.secure) == ("192.0.2.7", "ipv4:192.0.2.7:40000", True)

    run(scenario)


def test_a_header_and_the_first_request_may_come_in_one_piece(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World(trusted_proxies=("127.0.0.1",)) as world, world.client(first=proxied() + b"early") as client:
            assert await client.reader.readexactly(5) == b"early"

    run(scenario)


def test_a_header_may_come_byte_by_byte(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World(trusted_proxies=("127.0.0.1",)) as world:
            sock = await world.connect()
            loop = asyncio.get_running_loop()
            for byte in proxied() + b"x":
                await loop.sock_sendall(sock, bytes([byte]))
                await asyncio.sleep(0)
            assert await loop.sock_recv(sock, 1) == b"x"
            assert world.made[0].peer.address == "192.0.2.7"
            sock.close()

    run(scenario)


def test_limits_are_the_real_clients_not_the_proxys(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World(trusted_proxies=("127.0.0.1",), per_address=1) as world, contextlib.AsyncExitStack() as stack:
            for number in range(5):
                client = await stack.enter_async_context(world.client(first=proxied(f"192.0.2.{number}")))
                await client.hears_echo()
            again = await world.connect()
            await asyncio.get_running_loop().sock_sendall(again, proxied("192.0.2.3"))
            await hung_up(again)
            assert world.refused("per_address") == 1

    run(scenario)


def test_a_proxys_health_check_is_served_under_its_own_address(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World(trusted_proxies=("127.0.0.1",)) as world:
            peer = await world.answers(first=SIGNATURE + b"\x20\x00\x00\x00")
            assert peer.address == "127.0.0.1"

    run(scenario)


@pytest.mark.parametrize(
    "first", [b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n", b"GET / HTTP/1.1\r\n\r\n", SIGNATURE + b"\x31\x11\x00\x0c"]
)
def test_a_trusted_proxy_without_a_valid_header_is_refused(
    run: Callable[[Scenario], None], caplog: pytest.LogCaptureFixture, first: bytes
) -> None:
    caplog.set_level(logging.INFO, "appliance")

    async def scenario() -> None:
        async with World(trusted_proxies=("127.0.0.1",)) as world:
            sock = await world.connect()
            await asyncio.get_running_loop().sock_sendall(sock, first)
            await hung_up(sock)
            assert world.refused("proxy_header") == 1
            await world.empty()

    run(scenario)
    assert [vars(record)["detail"] for record in caplog.records if record.name == module.__name__] != [""]


def test_a_trusted_proxy_that_sends_no_header_in_time_is_refused(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World(trusted_proxies=("127.0.0.1",), handshake_timeout_s=0.05) as world:
            await hung_up(await world.connect())
            assert world.refused("timeout") == 1
            await world.empty()

    run(scenario)


# ---- the end ----


def test_closing_leaves_connections_and_handshakes_alone(run: Callable[[Scenario], None], pki: Pki) -> None:
    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context) as world, world.client(client_tls(pki)) as client:
            late = await world.connect()
            await eventually_async(lambda: world.gate.open == 2)
            world.listener.close()
            world.listener.close()
            with pytest.raises(ConnectionRefusedError):
                await world.connect()
            await client.hears_echo()
            reader, writer = await asyncio.open_connection(sock=late, ssl=client_tls(pki), server_hostname="localhost")
            await Client(reader, writer).hears_echo()
            writer.transport.abort()
            await world.listener.wait_closed()

    run(scenario)


def test_cutting_ends_handshakes_that_are_under_way(run: Callable[[Scenario], None], pki: Pki) -> None:
    """Also those that had not taken their first step."""

    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context, handshake_timeout_s=PATIENCE_S * 10) as world:
            socks = [await world.connect() for _ in range(5)]
            await eventually_async(lambda: world.gate.open == 5)
            last = await world.connect()
            world.listener._on_readable()
            assert world.gate.open == 6
            world.listener.close()
            await world.listener.wait_closed(cut=True)
            await world.empty()
            await asyncio.gather(*(hung_up(sock) for sock in (*socks, last)))

    run(scenario)


def test_a_listener_that_waits_for_room_can_be_closed(run: Callable[[Scenario], None]) -> None:
    async def scenario() -> None:
        async with World(max_connections=1) as world, world.client() as client:
            await client.hears_echo()
            second = await world.connect()
            await eventually_async(lambda: world.gate._waiting)
            world.listener.close()
            client.writer.transport.abort()
            await world.empty()
            await hung_up(second)

    run(scenario)


def test_a_place_is_given_back_once_however_often_it_is_released() -> None:
    gate = Gate(WireSettings())
    places = [gate.enter(lambda: None) for _ in range(2)]
    assert all(place.claim("192.0.2.7") for place in places)
    for _ in range(3):
        places[0].release()
    assert (gate.open, gate._by_address) == (1, {"192.0.2.7": 1})


def test_clients_that_come_and_go_in_every_way_leave_nothing_behind(run: Callable[[Scenario], None], pki: Pki) -> None:
    """Honest and odd clients at once, more than there is room for: the honest are all served, all counts end at 0."""

    async def scenario() -> None:
        context = server_tls(pki)
        async with World(lambda: context, max_connections=16, handshakes=4) as world:
            odd = [_plain_http, _leaves_at_once, _resets, _leaves_in_the_middle, _does_not_trust_us]
            work: list[Awaitable[object]] = []
            for _ in range(12):
                work += [client(world, pki) for client in odd]
                work += [world.answers(client_tls(pki)) for _ in range(2)]
            await asyncio.gather(*work)
            await world.empty()
            assert world.value("connections_accepted_total") == 24
            assert all(echo.ends == 1 for echo in world.made)

    run(scenario)


def test_every_reason_has_its_sentence() -> None:
    """The label of the metric and the line in the log come from one table."""
    errors: list[BaseException] = [TimeoutError(), ConnectionAbortedError(), ConnectionResetError(), BrokenPipeError()]
    for name in (*module._NOT_TLS, *module._NOTHING_IN_COMMON, "TLSV1_ALERT_UNKNOWN_CA", "LIBRARY_BUG", None):
        error = ssl.SSLError(1, "")
        error.reason = name
        errors.append(error)
    assert {module.refusal(error) for error in errors} <= set(module._SENTENCES)
    assert isinstance(Place(Gate(WireSettings()), lambda: None).began, float)
