"""Connections come, age, fall silent and end; no call is lost over it, and nobody can hold the server up."""

import contextlib
import json
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import h2.events
import pytest
from support.appliance import Pki, make_pki
from support.raw_http2 import TIMEOUT_S, RawClient, connected, framed
from support.waiting import eventually
from support.wire_server import Channel, Server

PATIENCE_S = 30.0
HOLD = "/wire.Test/Hold"
ECHO = "/wire.Test/Echo"
NEVER_THERE = re.compile("failed to connect|refused|connections to all backends failing", re.IGNORECASE)
"""What grpcio says of a call that it could not hand to any server."""

STOCK = (("grpc.enable_retries", 1),)
LOOPS = ("uvloop", "asyncio")


class Load:
    """Closed-loop callers, each on a connection of its own, until they are stopped or refused.

    No call is retried that a server may have seen: only what grpcio by itself had not sent yet when it heard of the
    connection's end goes over the next one, as it does in every stock client.
    """

    def __init__(self, server: Server, callers: int = 4, stop_at_refusal: bool = False) -> None:
        self.ends: Counter[str] = Counter()
        self.odd: list[str] = []
        self.peers: list[set[str]] = [set() for _ in range(callers)]
        self._server, self._stop_at_refusal = server, stop_at_refusal
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(callers)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        """Wait for the callers to end."""
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _run(self, number: int) -> None:
        with self._server.channel(options=STOCK) as channel:
            identity = channel.unary("Identity")
            while not self._stop.is_set():
                try:
                    self.peers[number].add(json.loads(identity(b"", timeout=PATIENCE_S))["peer"])
                    self.ends["OK"] += 1
                except grpc.RpcError as error:
                    self.ends[error.code().name] += 1
                    if error.code() is not grpc.StatusCode.UNAVAILABLE or not NEVER_THERE.search(error.details() or ""):
                        self.odd.append(f"{error.code().name}: {error.details()}")
                    if self._stop_at_refusal:
                        return


def hold(server: Server, channel: Channel, *names: str) -> list[Callable[[], tuple[str, str]]]:
    """Start calls that stay in their handlers: unary ones, and streams where the name begins with "stream".

    Returns: for each what waits for its end: status and sentence.
    """
    ends: list[Callable[[], tuple[str, str]]] = []
    for name in names:
        if name.startswith("stream"):
            stream = channel.chat("HoldStream")(iter([name.encode()]), timeout=PATIENCE_S)
            ends.append(partial(_end, stream, partial(list, stream)))
        else:
            call = channel.unary("Hold").future(name.encode(), timeout=PATIENCE_S)
            ends.append(partial(_end, call, call.result))
    for name in names:
        server.wait("holding", id=name)
    return ends


def _end(call: Any, answer: Callable[[], object]) -> tuple[str, str]:
    with contextlib.suppress(grpc.RpcError):
        answer()
    return call.code().name, call.details() or ""


# ---- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stop_under_load_loses_no_call(pki: Pki, loop: str) -> None:
    """Every call ends well, or was never handed to the server."""
    with Server(pki, loop=loop) as server:
        with Load(server, callers=6, stop_at_refusal=True) as load:
            eventually(lambda: load.ends["OK"] > 300)
            server.do("stop", grace_s=20)
            load.join()
        assert not load.odd
        assert server.wait("stopped")["used"] == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stop_waits_for_calls_that_were_taken(pki: Pki, loop: str) -> None:
    """They end well within the grace; new ones find nobody."""
    with Server(pki, loop=loop) as server, server.channel() as channel:
        ends = hold(server, channel, "one", "two", "stream")
        server.do("stop", grace_s=20)
        with server.channel() as other:
            eventually(lambda: _refused(other))
        assert not server.told("stopped")
        server.do("gate", open_=True)
        assert [end()[0] for end in ends] == ["OK"] * 3
        assert server.wait("stopped")["used"] == 0


def _refused(channel: Channel) -> bool:
    try:
        channel.unary("Echo")(b"", timeout=PATIENCE_S)
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
    return False


@pytest.mark.parametrize("loop", LOOPS)
def test_calls_that_do_not_end_in_time_are_told_to_try_again(pki: Pki, loop: str) -> None:
    """UNAVAILABLE with a sentence; handlers are cancelled and all memory is given back."""
    with Server(pki, loop=loop) as server, server.channel() as channel:
        ends = hold(server, channel, "one", "two", "stream one", "stream two")
        server.do("stop", grace_s=0.2)
        for end in ends:
            code, sentence = end()
            assert code == "UNAVAILABLE"
            assert "stopping" in sentence
        for name in ("one", "two", "stream one", "stream two"):
            server.wait("cancelled", id=name)
        assert server.wait("stopped")["used"] == 0


def test_a_stop_is_not_held_up_by_a_large_body(pki: Pki) -> None:
    """A message that is half here when the grace is over gives back what was reserved for it."""
    with Server(pki) as server, connected(server) as client:
        client.greet()
        client.begin(1, "/wire.Test/Guarded", framed(b"x" * 100, length=20_000_000))
        server.wait("asked", size=20_000_000)
        assert server.ask("used") >= 20_000_000
        server.do("stop", grace_s=0.1)
        assert server.wait("stopped")["used"] == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_hundreds_of_connections_end_with_the_server(pki: Pki, loop: str) -> None:
    """Those that listen, those that never said a word, and those that ignore all they hear."""
    with Server(pki, loop=loop) as server, contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(connected(server, "plain")) for _ in range(100)]
        for client in deaf[:50]:
            client.greet()
        channels = [stack.enter_context(server.channel()) for _ in range(50)]
        calls = [channel.unary("Echo").future(b"x", timeout=PATIENCE_S) for channel in channels]
        assert all(call.result() == b"x" for call in calls)
        server.do("stop", grace_s=10)
        assert server.wait("stopped")["used"] == 0
        for client in deaf:
            client.until_end(answer=False)


def test_a_handshake_that_ends_after_the_stop_began_is_told_at_once(pki: Pki) -> None:
    """It was neither there to be told with the others, nor may it keep the server."""
    with Server(pki) as server, server.channel() as channel:
        ends = hold(server, channel, "one")
        context = ssl.create_default_context(cafile=str(pki.ca))
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("localhost", server.ports["tls"]), TIMEOUT_S) as plain:
            with server.channel() as other:  # what connected before us is accepted before us
                other.unary("Echo")(b"", timeout=PATIENCE_S)
                server.do("stop", grace_s=20)
                eventually(lambda: _refused(other))
            with context.wrap_socket(plain, server_hostname="localhost") as sock:
                late = RawClient(sock)
                late.greet()
                assert late.until(h2.events.ConnectionTerminated).error_code == 0
                late.until_end()
        server.do("gate", open_=True)
        assert ends[0]()[0] == "OK"
        assert server.wait("stopped")["used"] == 0


def test_a_server_that_retires_waits_for_handshakes(pki: Pki) -> None:
    """Whoever was accepted may still send a call: it is told like all others, before the server says it is through."""
    with Server(pki) as server:
        context = ssl.create_default_context(cafile=str(pki.ca))
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("localhost", server.ports["tls"]), TIMEOUT_S) as plain:
            with server.channel() as other:  # what connected before us is accepted before us
                other.unary("Echo")(b"", timeout=PATIENCE_S)
            server.do("retire", timeout_s=PATIENCE_S)
            with server.channel() as other:
                eventually(lambda: _refused(other))
            assert not server.told("retired")
            with context.wrap_socket(plain, server_hostname="localhost") as sock:
                late = RawClient(sock)
                late.greet()
                late.until(h2.events.ConnectionTerminated)
                assert not server.told("retired")
                late.ask(1, "/wire.Test/Echo", framed(b"late"))
                late.until(h2.events.StreamEnded)
                server.wait("retired")


def test_a_stop_is_announced_before_it_happens(pki: Pki) -> None:
    """GOAWAY for all streams there may be, a ping that goes round twice, and only then GOAWAY for those that were
    taken: what a client sent in between is served."""
    with Server(pki) as server, connected(server) as client:
        client.greet()
        client.ask(1, HOLD, framed(b"one"))
        server.wait("holding", id="one")
        server.do("stop", grace_s=20)
        first = client.until(h2.events.ConnectionTerminated, answer=False)
        assert (first.error_code, first.last_stream_id) == (0, 2**31 - 1)
        client.until(h2.events.PingReceived, answer=False)
        pong = client.session.data_to_send()
        client.ask(3, HOLD, framed(b"late"))
        server.wait("holding", id="late")
        client.sock.sendall(pong)
        client.until(h2.events.PingReceived)
        assert not server.told("stopped")
        second = client.until(h2.events.ConnectionTerminated)
        assert (second.error_code, second.last_stream_id) == (0, 3)
        server.do("gate", open_=True)
        client.until_end()
        ended = {event.stream_id for event in client.heard if isinstance(event, h2.events.StreamEnded)}
        assert ended == {1, 3}
        server.wait("stopped")


# ---- age, idleness, silence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_connections_are_renewed_under_load_without_losing_a_call(pki: Pki, loop: str) -> None:
    """Four callers, each through three connections: every call ends well."""
    with Server(pki, loop=loop, age_s=0.5) as server, Load(server) as load:
        eventually(lambda: load.odd or all(len(peers) >= 3 for peers in load.peers), PATIENCE_S)
        assert not load.odd
        assert set(load.ends) == {"OK"}


def test_a_long_call_on_an_old_connection_is_expelled(pki: Pki) -> None:
    """After its grace, with a status that asks to try again."""
    with Server(pki, age_s=0.5, age_grace_s=0.5) as server, server.channel() as channel:
        ends = hold(server, channel, "one", "stream")
        assert [end()[0] for end in ends] == ["UNAVAILABLE"] * 2
        server.wait("cancelled", id="one")
        server.wait("cancelled", id="stream")
        with server.channel() as other:
            assert other.unary("Echo")(b"on", timeout=PATIENCE_S) == b"on"


def test_an_idle_connection_ends_politely(pki: Pki) -> None:
    """GOAWAY without an error, then the end; one with a call in it is not idle."""
    with Server(pki, idle_s=0.5) as server, connected(server) as idle, connected(server) as busy:
        for client in (idle, busy):
            client.greet()
        busy.ask(1, HOLD, framed(b"busy"))
        server.wait("holding", id="busy")
        assert idle.until(h2.events.ConnectionTerminated).error_code == 0
        idle.until_end()
        server.do("gate", open_=True)
        assert busy.reply(1)[":end"] == "ended"
        busy.until_end()


def test_a_client_that_gives_no_sign_of_life_is_cut(pki: Pki) -> None:
    """Its calls are cancelled. One that answers pings stays."""
    settings = {"keepalive_s": 0.3, "keepalive_timeout_s": 0.3}
    with Server(pki, **settings) as server, connected(server) as frozen, connected(server) as alive:
        for client in (frozen, alive):
            client.greet()
        frozen.ask(1, HOLD, framed(b"frozen"))
        server.wait("holding", id="frozen")
        for _ in range(3):
            alive.until(h2.events.PingReceived)
        server.wait("cancelled", id="frozen")
        frozen.until_end(answer=False)
        alive.ask(1, ECHO, framed(b"here"))
        assert alive.reply(1)[":body"] == framed(b"here")


def test_whoever_takes_no_reply_is_cut(pki: Pki) -> None:
    """A client with a window that it never opens again does not keep what was made for it."""
    with Server(pki, request_timeout_s=1.0) as server, connected(server) as client:
        client.greet()
        client.ask(1, "/wire.Test/Make", framed(b"5000000"))
        client.until(h2.events.DataReceived, answer=False)
        eventually(lambda: server.ask("used") == 0)
        with connected(server) as other:
            other.greet()
            other.ask(1, ECHO, framed(b"here"))
            assert other.reply(1)[":body"] == framed(b"here")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize("loop", LOOPS)
def test_whoever_does_not_begin_is_cut(pki: Pki, loop: str) -> None:
    """Silence before the handshake, after it, and in the middle of HTTP/2's first words."""
    with Server(pki, loop=loop, handshake_timeout_s=0.5) as server, contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("localhost", server.ports["tls"]), TIMEOUT_S)),
            stack.enter_context(connected(server, "tls")).sock,
            stack.enter_context(connected(server, "tls", ())).sock,
            stack.enter_context(connected(server, "plain")).sock,
        ]
        for how, alpn in (("tls", ("h2",)), ("tls", ()), ("plain", ())):
            client = stack.enter_context(connected(server, how, alpn))
            client.sock.sendall(PREFACE[:10])
            silent.append(client.sock)
        client = stack.enter_context(connected(server, "tls"))
        client.sock.sendall(PREFACE)
        silent.append(client.sock)
        for sock in silent:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while sock.recv(65536):
                    pass


def test_a_body_that_does_not_come_ends_the_call(pki: Pki) -> None:
    """Also when its connection is lively otherwise."""
    with Server(pki, request_timeout_s=1.0) as server, connected(server) as client:
        client.greet()
        client.begin(1, "/wire.Test/Guarded", framed(b"x" * 100, length=1_000_000))
        assert client.reply(1)["grpc-status"] == "4"
        eventually(lambda: server.ask("used") == 0)


# ---- TLS -------------------------------------------------------------------------------------------------------------


def test_a_new_certificate_serves_new_handshakes_and_leaves_connections_alone(pki: Pki, tmp_path: Path) -> None:
    """The old channel goes on; new clients must trust the new root."""
    renewed = make_pki(tmp_path / "tls")
    with Server(pki) as server, server.channel() as old:
        assert old.unary("Echo")(b"before", timeout=PATIENCE_S) == b"before"
        server.do("certificate", folder=str(renewed.folder))
        server.ask("used")  # what was said before is done
        assert old.unary("Echo")(b"after", timeout=PATIENCE_S) == b"after"
        with server.channel() as distrusting:
            assert _refused(distrusting)
        server.pki = renewed
        with server.channel() as new:
            assert new.unary("Echo")(b"new", timeout=PATIENCE_S) == b"new"
        assert old.unary("Echo")(b"still", timeout=PATIENCE_S) == b"still"


@pytest.mark.parametrize("loop", LOOPS)
def test_bytes_may_come_one_by_one(pki: Pki, loop: str) -> None:
    """TLS records, frames and messages in as many pieces as they have bytes."""
    with Server(pki, loop=loop) as server:
        context = ssl.create_default_context(cafile=str(pki.ca))
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("localhost", server.ports["tls"]), TIMEOUT_S) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            dripping = RawClient(Dripping(plain, context))  # type: ignore[arg-type]  # as much of a socket as it needs
            dripping.greet()
            dripping.ask(1, "/wire.Test/Chat", framed(b"drop") * 3)
            assert dripping.reply(1)[":body"] == framed(b"drop") * 3
            dripping.ask(3, ECHO, framed(b"by drop"))
            assert dripping.reply(3)["grpc-status"] == "0"


class Dripping:
    """TLS whose every byte is sent alone."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._sock, self._in, self._out = sock, ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        self._with_more(self._tls.do_handshake)

    def sendall(self, data: bytes) -> None:
        """As a socket's."""
        if data:
            self._tls.write(data)
            self._drip()

    def recv(self, count: int) -> bytes:
        """As a socket's."""
        read: bytes = self._with_more(lambda: self._tls.read(count))
        return read

    def _with_more(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                self._drip()
                self._in.write(self._sock.recv(65536))
            else:
                self._drip()
                return result

    def _drip(self) -> None:
        for byte in self._out.read():
            self._sock.sendall(bytes([byte]))
