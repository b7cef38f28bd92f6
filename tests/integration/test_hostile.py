"""Peers that mean harm. Whatever they send, or do not: the server lives, its memory is bounded and comes back, and an
honest client is served all the while.

No time is asserted. With `HOSTILE_REPORT=file`, and not spread over workers (`-n 0`), it writes what each attack cost
as a table; see docs/wire-attacks.md.
"""

import contextlib
import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from support import h2_peer as peer
from support.h2_peer import GRPC, PREFACE, frame, message
from support.hostile_server import BUDGET
from support.waiting import eventually

_TESTS = Path(__file__).parents[1]
MIB = 2**20
GROWTH = 48 * MIB
"""Memory that the server's process may have more, while or after it is attacked, beyond its budget."""

KEY = ("authorization", "key")
HTTP_POST = (*GRPC[:2], (":path", "/echo"), GRPC[3])


# ---- the server and its honest client --------------------------------------------------------------------------------


class Server:
    """The process under attack."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
        words = [sys.executable, "-P", "-m", "support.hostile_server"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environment)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def stats(self) -> dict[str, int]:
        """What it holds; the asking connection is one of them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/stats")
            return dict(json.loads(connection.getresponse().read()))

    def resident(self) -> int:
        """Bytes of memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def cpu(self) -> float:
        """Seconds of processor time."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) * 1e-9

    def stop(self) -> int:
        """Let it end; returns its exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(30)


class Honest:
    """A grpcio client that calls all the time, on one connection, and counts."""

    def __init__(self, port: int) -> None:
        self.served = 0
        self.failures: list[str] = []
        self._port = port
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self.served > 0 or self.failures)
        return self

    def __exit__(self, *unused: object) -> None:
        self._done.set()
        self._thread.join()

    def more(self, count: int = 5) -> None:
        """Return when it was served so many times more."""
        until = self.served + count
        eventually(lambda: self.served >= until or self.failures, what="the honest client is served")

    def _run(self) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            echo = channel.unary_unary("/test/Echo")
            while not self._done.wait(0.01):
                # Small ones are one event, large ones must be let in first.
                body = random.randbytes(200_000 if self.served % 10 == 0 else 100)
                try:
                    assert echo(body, metadata=(KEY,), timeout=30) == body
                    self.served += 1
                except grpc.RpcError as error:
                    self.failures.append(str(error))
                    return


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for all attacks: what one leaves behind, the next would find."""
    started = Server()
    with Honest(started.port) as honest:
        honest.more(30)
    yield started
    assert started.stop() == 0


class Attacker:
    """One connection of somebody who means harm."""

    def __init__(self, port: int, greeting: bytes | None = None, receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(10)
        self.sock.connect(("127.0.0.1", port))
        self.sent = 0
        self.outcome = ""
        self._received = b""
        self.send(PREFACE + peer.settings() + frame(peer.SETTINGS, peer.ACK, 0) if greeting is None else greeting)

    def send(self, data: bytes, patience_s: float = 1.0) -> bool:
        """Send, as far as the server takes it. Returns: whether it took all."""
        self.sock.settimeout(patience_s)
        view = memoryview(data)
        while view and not self.outcome:
            try:
                count = self.sock.send(view[: 64 * 1024])
            except TimeoutError:
                self.outcome = "no longer read"
            except OSError:
                self.outcome = self.outcome or "closed"
            else:
                self.sent += count
                view = view[count:]
        return not view

    def read(self, wait_s: float = 0.0) -> None:
        """Read what there is, and look whether it is the end."""
        self.sock.settimeout(wait_s)
        while True:
            try:
                data = self.sock.recv(1 << 20)
            except (TimeoutError, BlockingIOError):
                return
            except OSError:
                self.outcome = self.outcome or "closed"
                return
            if not data:
                self.outcome = self.outcome or "closed"
                return
            self._received += data
            self._look()
            self.sock.settimeout(0)

    def _look(self) -> None:
        at = 0
        while len(self._received) - at >= 9:
            size = int.from_bytes(self._received[at : at + 3])
            if len(self._received) - at < 9 + size:
                break
            if self._received[at + 3] == peer.GOAWAY:
                self.outcome = f"GOAWAY {int.from_bytes(self._received[at + 13 : at + 17])}"
            at += 9 + size
        self._received = self._received[at:]

    def end(self) -> None:
        """Read the server's last words, if it has any, and go."""
        self.read(0.2)
        self.sock.close()


class Report:
    """What attacks cost, for docs/wire-attacks.md."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def add(self, name: str, sent: int, outcome: str, cpu: float, growth: int, served: int) -> None:
        """One row."""
        per_mb = f"{1000 * cpu / (sent / 1e6):.1f}" if sent >= 100_000 else "–"
        row = (name, f"{sent / 1e6:.2f}", outcome or "open", f"{cpu:.2f}", per_mb, f"{growth / MIB:+.1f}", str(served))
        self.rows.append("| " + " | ".join(row) + " |")


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    """Written at the end, if wanted."""
    made = Report()
    yield made
    if wanted := os.environ.get("HOSTILE_REPORT"):
        Path(wanted).write_text("\n".join(made.rows) + "\n")


@contextlib.contextmanager
def under_attack(server: Server, report: Report, name: str) -> Iterator[list[Attacker]]:
    """While the block attacks an honest client is served; afterwards everything is as it was before.

    The block may append its connections to the list, and leave them open: they are closed here.
    """
    before, cpu = server.resident(), server.cpu()
    attackers: list[Attacker] = []
    with Honest(server.port) as honest:
        yield attackers
        honest.more()
        peak = server.resident()
        cpu = server.cpu() - cpu
        for attacker in attackers:
            attacker.sock.close()
        honest.more()
        assert not honest.failures
        served = honest.served
    eventually(lambda: server.stats()["connections"] == 1, what="all connections are gone")
    eventually(lambda: server.stats()["used"] == 0, what="the budget is as it was")
    eventually(lambda: server.stats()["tasks"] < 10, what="all calls are over")
    assert server.process.poll() is None
    outcomes = sorted({attacker.outcome for attacker in attackers})
    report.add(
        name, sum(a.sent for a in attackers), ", ".join(o or "open" for o in outcomes), cpu, peak - before, served
    )
    assert peak - before < GROWTH + BUDGET
    assert server.resident() - before < GROWTH


# ---- floods: one connection sends as fast as it can ------------------------------------------------------------------


def packed(*more: tuple[str, str], path: str = "/test/Echo") -> bytes:
    """A header block that needs no table."""
    headers = [*GRPC[:2], (":path", path), *GRPC[3:], *more]
    return b"".join(literal(*pair) for pair in headers)


def literal(name: str, value: str, indexed: bool = False) -> bytes:
    """A header that is not indexed, or is."""
    return bytes([0x40 if indexed else 0]) + _text(name) + _text(value)


def _text(text: str) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size]) + text.encode("latin-1")
    size -= 127
    out = b"\x7f"
    while size >= 128:
        out += bytes([size % 128 | 128])
        size //= 128
    return out + bytes([size]) + text.encode("latin-1")


BLOCK = packed()
ODD = range(1, 2_000_000, 2)


def opening(stream: int, flags: int = peer.END_HEADERS, block: bytes = BLOCK) -> bytes:
    """A request's headers."""
    return frame(peer.HEADERS, flags, stream, block)


def four(number: int) -> bytes:
    """32 bits."""
    return struct.pack(">I", number)


def each(make: Callable[[int], bytes], first: bytes = b"") -> Iterator[bytes]:
    """Streams that are started and thrown away, a hundred at a time."""
    yield first
    for start in range(0, 20_000, 100):
        yield b"".join(make(stream) for stream in ODD[start : start + 100])


def again(one: bytes, first: bytes = b"", mib: int = 4) -> Iterator[bytes]:
    """The same frame until so much was sent."""
    yield first
    piece = one * (64 * 1024 // len(one) + 1)
    for _ in range(mib * MIB // len(piece) + 1):
        yield piece


def bombs() -> Iterator[bytes]:
    """Each byte of a block is a header of 4 kB."""
    yield opening(1, 5, BLOCK + literal("x-bomb", "v" * 3900, True))
    for stream in ODD[1:400]:
        yield opening(stream, 5, BLOCK + b"\xbe" * 15_000)


def trailer_bombs() -> Iterator[bytes]:
    """The same, where a request ends."""
    yield opening(1, 5, BLOCK + literal("x-bomb", "v" * 3900, True))
    for stream in ODD[1:400]:
        yield opening(stream) + frame(peer.HEADERS, 5, stream, b"\xbe" * 15_000)


def noise() -> Iterator[bytes]:
    """Bytes without sense, after a good beginning."""
    chance = random.Random(5)
    for _ in range(2000):
        yield chance.randbytes(200)


def tiny_data() -> Iterator[bytes]:
    """A body of one byte a frame, on streams of their own, so that windows last."""
    for stream in ODD[:90]:
        yield (
            opening(stream)
            + frame(peer.DATA, 0, stream, struct.pack(">BI", 0, 60_000))
            + frame(peer.DATA, 0, stream, b"x") * 20_000
        )


def empty_messages(path: str, *more: tuple[str, str]) -> Iterator[bytes]:
    """Messages without a byte, for an endpoint that does not take them."""
    for stream in ODD[:90]:
        yield opening(stream, 4, packed(*more, path=path))
        for _ in range(6):
            yield frame(peer.DATA, 0, stream, message(b"") * 2000)


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "rapid reset": lambda: each(lambda s: opening(s) + frame(peer.RST_STREAM, 0, s, four(8))),
    "rapid reset of whole calls": lambda: each(
        lambda s: peer.call(s, b"x" * 20, (*GRPC, KEY)) + frame(peer.RST_STREAM, 0, s, four(8))
    ),
    "MadeYouReset: WINDOW_UPDATE 0": lambda: each(lambda s: opening(s) + frame(peer.WINDOW_UPDATE, 0, s, four(0))),
    "MadeYouReset: window overflow": lambda: each(
        lambda s: opening(s) + frame(peer.WINDOW_UPDATE, 0, s, four(2**31 - 1))
    ),
    "MadeYouReset: DATA after the end": lambda: each(lambda s: opening(s, 5) + frame(peer.DATA, 0, s, b"x")),
    "MadeYouReset: HEADERS after the end": lambda: each(lambda s: opening(s, 5) + opening(s, 5)),
    "MadeYouReset: headers twice": lambda: each(lambda s: opening(s) + opening(s)),
    "MadeYouReset: short PRIORITY": lambda: each(lambda s: opening(s) + frame(peer.PRIORITY, 0, s, bytes(4))),
    "MadeYouReset: wrong content-length": lambda: each(
        lambda s: opening(s, 4, packed(("content-length", "1"))) + frame(peer.DATA, 1, s, message(b"xx"))
    ),
    "streams without a path": lambda: each(lambda s: opening(s, 5, b"".join(literal(*h) for h in GRPC[:2]))),
    "upper-case headers": lambda: each(lambda s: opening(s, 5, BLOCK + literal("X-Upper", "x"))),
    "CONNECT": lambda: each(lambda s: opening(s, 4, literal(":method", "CONNECT") + literal(":authority", "x:1"))),
    "NUL in a header": lambda: each(lambda s: opening(s, 5, BLOCK + literal("x-nul", "a\0b"))),
    "NUL in the path": lambda: each(lambda s: opening(s, 5, packed(path="/test\0/Echo"))),
    "a path that goes up": lambda: each(lambda s: opening(s, 5, packed(path="/../../etc/passwd"))),
    "too many streams": lambda: each(lambda s: opening(s)),
    "calls without a key": lambda: each(lambda s: opening(s) + frame(peer.DATA, 0, s, struct.pack(">BI", 0, 10**7))),
    "CONTINUATION": lambda: again(frame(peer.CONTINUATION, 0, 1, literal("x-a", "v" * 64) * 20), opening(1, 0)),
    "empty CONTINUATION": lambda: again(frame(peer.CONTINUATION, 0, 1), opening(1, 0)),
    "300 headers": lambda: each(lambda s: opening(s, 5, BLOCK + b"".join(literal("a", "b") for _ in range(300)))),
    "header bombs": bombs,
    "header bombs in trailers": trailer_bombs,
    "table size updates": lambda: each(lambda s: opening(s, 5, b"\x3f\xe1\x1f\x20" * 3000 + BLOCK)),
    "an integer that overflows": lambda: each(lambda s: opening(s, 5, b"\xff" * 12 + b"\x7f")),
    "PING": lambda: again(frame(peer.PING, 0, 0, bytes(8))),
    "SETTINGS": lambda: again(peer.settings((4, 70_000)), b"".join(opening(s) for s in ODD[:90])),
    "SETTINGS of 30 window sizes": lambda: again(
        peer.settings(*[(4, size) for size in range(30)]), b"".join(opening(s) for s in ODD[:90])
    ),
    "SETTINGS of 2000 entries": lambda: again(peer.settings(*[(4, 65_535)] * 2000)),
    "SETTINGS that nobody asked to acknowledge": lambda: again(frame(peer.SETTINGS, peer.ACK, 0)),
    "WINDOW_UPDATE": lambda: again(frame(peer.WINDOW_UPDATE, 0, 1, four(1)), opening(1)),
    "WINDOW_UPDATE of nothing that is": lambda: again(frame(peer.WINDOW_UPDATE, 0, 1, four(1)), opening(1, 5)),
    "PRIORITY": lambda: again(frame(peer.PRIORITY, 0, 1, bytes(5)), opening(1)),
    "PRIORITY of streams to come": lambda: each(lambda s: frame(peer.PRIORITY, 0, s, bytes(5))),
    "unknown frames": lambda: again(frame(0x99, 0, 0, b"x")),
    "empty DATA": lambda: again(frame(peer.DATA, 0, 1), opening(1)),
    "padding": lambda: again(frame(peer.DATA, peer.PADDED, 1, b"\0"), opening(1)),
    "more padding": lambda: again(frame(peer.DATA, peer.PADDED, 1, b"\xff" + bytes(255)), opening(1)),
    "one byte of DATA a frame": tiny_data,
    "DATA of streams that are over": lambda: again(frame(peer.DATA, 0, 1, b"x" * 1000), opening(1, 5)),
    "empty messages to a stream that is open to all": lambda: empty_messages("/test/Watch"),
    "empty messages to a stream with a key": lambda: empty_messages("/test/Chat", KEY),
    "random bytes": noise,
    "frames over the maximum": lambda: again(frame(peer.DATA, 0, 1, bytes(16_400)), opening(1)),
}


@pytest.mark.parametrize("reads", [True, False], ids=["reading", "never reading"])
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_harms_nobody(server: Server, report: Report, name: str, reads: bool) -> None:
    """The server answers it, ends it, or stops reading it; others are served, and nothing is left of it."""
    with under_attack(server, report, name if reads else f"{name}, never reading") as attackers:
        attacker = Attacker(server.port)
        attackers.append(attacker)
        for piece in FLOODS[name]():
            if not attacker.send(piece):
                break
            if reads:
                attacker.read()
            if attacker.outcome:
                break
        attacker.read(0.1)


def test_mutated_calls_harm_nobody(server: Server, report: Report) -> None:
    """Honest calls with a few bytes changed, each on its own connection."""
    chance = random.Random(7)
    with under_attack(server, report, "300 mutated calls") as attackers:
        for _ in range(300):
            wire = bytearray(peer.call(1, b"x" * 100, (*GRPC, KEY)) + peer.call(3, b"y", HTTP_POST))
            for _ in range(chance.randint(1, 6)):
                wire[chance.randrange(len(wire))] = chance.randrange(256)
            attacker = Attacker(server.port)
            attacker.send(bytes(wire))
            attacker.read(0.002)
            attacker.sock.close()
            attackers.append(attacker)


# ---- holders: many connections, or many streams, that want nothing but our memory ------------------------------------


def hold(server: Server, attackers: list[Attacker], count: int, greeting: bytes | None, then: bytes = b"") -> None:
    """Open so many connections and say the same on each."""
    for _ in range(count):
        attacker = Attacker(server.port, greeting)
        if then:
            attacker.send(then)
        attackers.append(attacker)


def gone(attackers: list[Attacker]) -> bool:
    """Whether the server has ended all of them."""
    for attacker in attackers:
        attacker.read()
    return all(attacker.outcome for attacker in attackers)


@pytest.mark.parametrize(
    ("name", "greeting"),
    [
        ("silent connections", b""),
        ("half a preface", PREFACE[:10]),
        ("HTTP/1.1 without an end", b"POST / HTTP/1.1\r\nhost: x\r\nx-"),
        ("headers without an end", PREFACE + peer.settings() + opening(1, 0)),
        ("a frame without an end", PREFACE + peer.settings() + b"\0\x3f\xff\1\4\0\0\0\1" + BLOCK),
    ],
)
def test_who_does_not_get_to_the_point_is_cut(server: Server, report: Report, name: str, greeting: bytes) -> None:
    """A connection, or a request's head, that never completes ends after its time."""
    with under_attack(server, report, f"100 connections: {name}") as attackers:
        hold(server, attackers, 100, greeting)
        if "frame" not in name:
            eventually(lambda: gone(attackers), what="all are cut")


def test_a_body_that_never_comes_is_not_waited_for(server: Server, report: Report) -> None:
    """gRPC with a key, and HTTP: each stream's body has its time, and then memory and task are free again."""
    wire = b"".join(
        opening(s, 4, packed(KEY, path="/test/Chat" if s % 4 == 1 else "/test/Echo"))
        + frame(peer.DATA, 0, s, struct.pack(">BI", 0, 100_000) + b"x")
        for s in ODD[:20]
    )
    wire += b"".join(
        opening(s, 4, b"".join(literal(*h) for h in HTTP_POST)) + frame(peer.DATA, 0, s, b"x" * 1000)
        for s in ODD[20:90]
    )
    with under_attack(server, report, "10 connections × 90 bodies that never come") as attackers:
        hold(server, attackers, 10, None, wire)
        eventually(lambda: server.stats()["used"] > 0, what="they hold something")
        eventually(lambda: server.stats()["tasks"] < 20, what="they hold nothing any more")


@pytest.mark.parametrize("path", ["/test/Echo", "/test/Open", "/test/Watch", "/test/Nothing"])
def test_who_has_no_key_reserves_nothing(server: Server, report: Report, path: str) -> None:
    """Streams that declare 16 MB each, on many connections: no budget, and no memory but their own bytes."""
    wire = b"".join(
        opening(s, 4, packed(path=path)) + frame(peer.DATA, 0, s, struct.pack(">BI", 0, 16 * MIB) + bytes(500))
        for s in ODD[:90]
    )
    with under_attack(server, report, f"50 connections × 90 streams declare 16 MB to {path[1:]}") as attackers:
        hold(server, attackers, 50, None, wire)
        assert server.stats()["used"] < MIB


def test_strangers_reserve_little_together(server: Server, report: Report) -> None:
    """However many connections they have: what they may announce is small, and so is the share of all of them."""
    wire = b"".join(
        opening(s, 4, packed(path="/test/Open")) + frame(peer.DATA, 0, s, struct.pack(">BI", 0, 4096)) for s in ODD[:90]
    )
    with under_attack(server, report, "50 connections × 90 streams without a key announce 4 kB") as attackers:
        hold(server, attackers, 50, None, wire)
        eventually(lambda: server.stats()["used"] > MIB, what="they hold something")
        assert server.stats()["used"] <= BUDGET // 16 + MIB  # the honest client's own


def test_who_has_a_key_reserves_no_more_than_there_is(server: Server, report: Report) -> None:
    """Beyond a principal's share of the budget calls are refused; small ones of others need no reservation."""
    wire = b"".join(
        opening(s, 4, packed(KEY)) + frame(peer.DATA, 0, s, struct.pack(">BI", 0, 8 * MIB) + bytes(500))
        for s in ODD[:9]
    )
    attackers: list[Attacker] = []
    with under_attack_by_key(server, report, "9 streams with a key declare 8 MB each", attackers):
        hold(server, attackers, 1, None, wire)
        eventually(lambda: server.stats()["used"] >= 48 * MIB, what="six of them were let in")
        assert server.stats()["used"] <= BUDGET * 3 // 4


@contextlib.contextmanager
def under_attack_by_key(server: Server, report: Report, name: str, attackers: list[Attacker]) -> Iterator[None]:
    """As `under_attack`, for callers whose key lets them use the whole budget: small calls go on meanwhile."""
    before, cpu = server.resident(), server.cpu()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        echo: Any = channel.unary_unary("/test/Echo")
        yield
        for _ in range(20):
            assert echo(b"small", metadata=(KEY,), timeout=30) == b"small"
    peak, cpu = server.resident() - before, server.cpu() - cpu
    eventually(lambda: server.stats()["used"] == 0, what="time is over for those who hold it")
    for attacker in attackers:
        attacker.sock.close()
    eventually(lambda: server.stats()["connections"] == 1)
    report.add(name, sum(a.sent for a in attackers), "streams end in time", cpu, peak, 20)
    assert peak < GROWTH + BUDGET
    assert server.resident() - before < GROWTH


@pytest.mark.parametrize("pings", [False, True], ids=["silent", "with pings"])
def test_a_window_of_zero_holds_replies_for_a_while_only(server: Server, report: Report, pings: bool) -> None:
    """Replies that nobody takes are in the budget; who asks for more than its part is refused; all end in time."""
    block = packed(KEY, path="/test/Large")
    wire = peer.settings((4, 0)) + b"".join(
        opening(s, 4, block) + frame(peer.DATA, 1, s, message(b"1000000")) for s in ODD[:90]
    )
    attackers: list[Attacker] = []
    name = "5 connections × 90 replies of 1 MB, window 0" + (", with pings" if pings else "")
    with under_attack_by_key(server, report, name, attackers):
        hold(server, attackers, 5, None, wire)
        eventually(lambda: server.stats()["used"] > 4 * MIB, what="replies wait")
        assert server.stats()["used"] <= BUDGET
        began = time.monotonic()
        while pings and server.stats()["used"] and time.monotonic() - began < 30:
            for attacker in attackers:
                attacker.send(frame(peer.PING, 0, 0, bytes(8)) * 20)
                attacker.read()
            time.sleep(0.1)


def test_a_client_that_does_not_read_is_cut(server: Server, report: Report) -> None:
    """Windows wide open, and nothing is taken from the socket."""
    block = packed(KEY, path="/test/Large")
    wire = peer.settings((4, 2**31 - 1)) + frame(peer.WINDOW_UPDATE, 0, 0, four(2**30))
    wire += b"".join(opening(s, 4, block) + frame(peer.DATA, 1, s, message(b"2000000")) for s in ODD[:9])
    attackers: list[Attacker] = []
    with under_attack_by_key(server, report, "4 connections × 18 MB of replies, never read", attackers):
        for _ in range(4):
            attacker = Attacker(server.port, receive_buffer=4096)
            attacker.send(wire)
            attackers.append(attacker)
        eventually(lambda: server.stats()["used"] > MIB, what="replies wait")


def test_idle_connections_are_small(server: Server, report: Report) -> None:
    """500 connections that had a large reply keep none of its buffers."""
    block = packed(KEY, path="/test/Large")
    wire = peer.settings((4, 2**31 - 1), (5, 2**24 - 1)) + frame(peer.WINDOW_UPDATE, 0, 0, four(2**30))
    wire += opening(1, 4, block) + frame(peer.DATA, 1, 1, message(b"500000"))
    before = server.resident()
    with under_attack(server, report, "500 idle connections after a reply of 500 kB") as attackers:
        for _ in range(500):
            attacker = Attacker(server.port)
            attacker.send(wire)
            received = 0
            while received < 500_000:
                received += len(attacker.sock.recv(1 << 20))
            attackers.append(attacker)
        assert server.resident() - before < 500 * 64 * 1024
