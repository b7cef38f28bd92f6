"""What one connection may hold, and for how long. The transport is a list, time is what `tick` is told."""

import asyncio
import struct
import time
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import Mock

import pytest
from hpack import Decoder
from support import h2_peer as peer
from support.h2_peer import GRPC, PREFACE, frame, frames, message
from support.waiting import eventually_async

from appliance.core.memory import MemoryBudget
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.wire import server
from appliance.wire.asgi import admitted
from appliance.wire.context import Context
from appliance.wire.grpc import deflate
from appliance.wire.h2 import Http2
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

SETTINGS = WireSettings(
    max_message=2**20,
    max_reply=2**20,
    streams=64,
    request_timeout_s=5,
    cors_origins=("https://lab.example.com",),
)


class Connection:
    """A connection whose transport takes everything."""

    def __init__(self, limit: int = 2**22) -> None:
        self.budget = MemoryBudget(limit)
        self.context = Context(self._endpoints(), self._app, SETTINGS, self.budget)
        self.protocol = Http2(self.context, Peer("10.0.0.1", "ipv4:10.0.0.1:5", False), lambda: None)
        self.go_on = asyncio.Event()
        self._written = b""
        self._decoder = Decoder()
        self._now = time.monotonic()
        self.protocol.connection_made(self)
        windows = frame(peer.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30))
        self.feed(PREFACE + peer.settings() + frame(peer.SETTINGS, peer.ACK, 0) + windows)
        self.heard()

    def _endpoints(self) -> dict[str, Endpoint]:
        def admit(call: Call, size: int) -> bytes | None:
            call.memory = self.budget.hold(size)
            return None

        async def large(call: Call, body: bytes) -> bytes:
            return bytes(int(body))

        async def slow(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            async for body in requests:
                await self.go_on.wait()
                yield body[:1]

        async def fails(call: Call, body: bytes) -> bytes:
            raise RpcAbort(RpcStatus.INTERNAL, "é" * 5000, bytes(5000))

        async def held(call: Call, body: bytes) -> bytes:
            await self.go_on.wait()
            return body[:1]

        def turn_away(call: Call, size: int) -> bytes | None:
            call.memory = self.budget.hold(size)
            return b"refused"

        def fail_to_admit(call: Call, size: int) -> bytes | None:
            call.memory = self.budget.hold(100)
            raise RpcAbort(RpcStatus.UNAUTHENTICATED, "No.")

        return {
            "/test/Fails": Endpoint(unary=fails, admit=admit),
            "/test/Large": Endpoint(unary=large, admit=admit),
            "/test/Held": Endpoint(unary=held, admit=admit),
            "/test/Slow": Endpoint(stream=slow, admit=admit),
            "/test/Refused": Endpoint(stream=slow, admit=turn_away),
            "/test/NotAdmitted": Endpoint(unary=held, admit=fail_to_admit),
            "/test/Open": Endpoint(stream=slow),
            "/test/OpenUnary": Endpoint(unary=held),
        }

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/mine":
            admitted(scope, self.budget.expect(0, "ann"))
        if scope["path"] in ("/stuck", "/mine"):
            await self.go_on.wait()
        if scope["path"].startswith("/large"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(300_000), "more_body": scope["path"] != "/large"})
        while (await receive())["type"] != "http.disconnect":
            pass

    # ---- the transport ----

    def write(self, data: bytes) -> None:
        """Take bytes."""
        self._written += data

    def close(self) -> None:
        """Nothing to close."""

    abort = pause_reading = resume_reading = close

    def get_write_buffer_size(self) -> int:
        """All is taken at once."""
        return 0

    # ---- the client ----

    def feed(self, data: bytes) -> None:
        """Say something."""
        self.protocol.data_received(data)

    def open(self, stream: int, path: str, *more: tuple[str, str]) -> None:
        """Begin a call."""
        self.feed(frame(peer.HEADERS, peer.END_HEADERS, stream, block(path, *more)))

    async def turn(self) -> None:
        """Let everybody go on who can."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def wait(self, seconds: int) -> None:
        """Let time pass, as the server tells it."""
        for _ in range(seconds):
            self._now += 1
            self.protocol.tick(self._now)
            await self.turn()

    def heard(self) -> list[tuple[int, dict[str, str]]]:
        """Headers and trailers of replies since the last time, by stream."""
        found = []
        for kind, _, stream, payload in frames(self._written):
            if kind == peer.HEADERS:
                found.append((stream, {str(n): str(v) for n, v in self._decoder.decode(payload)}))
            elif kind == peer.RST_STREAM:
                found.append((stream, {"reset": str(int.from_bytes(payload))}))
        self._written = b""
        return found

    def statuses(self) -> dict[int, str]:
        """With which status calls ended since the last time, by stream."""
        return {stream: headers["grpc-status"] for stream, headers in self.heard() if "grpc-status" in headers}

    def gone(self) -> None:
        """The client leaves."""
        self.go_on.set()
        self.protocol.connection_lost(None)


def block(path: str, *more: tuple[str, str]) -> bytes:
    """Headers, with nothing from the table."""
    pairs = [*GRPC[:2], (":path", path), GRPC[3], *(more or GRPC[4:5])]
    out = b""
    for name, value in pairs:
        out += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return out


async def test_an_endpoint_that_is_open_to_all_queues_few_messages() -> None:
    """Whoever has no key cannot fill the memory with messages that nobody takes, however small they are."""
    connection = Connection()
    connection.open(1, "/test/Open")
    connection.feed(frame(peer.DATA, 0, 1, message(b"") * 3000))
    await connection.turn()
    assert connection.heard()[0][1]["grpc-status"] == "8"
    assert connection.budget.used == 0
    connection.gone()


async def test_messages_that_wait_are_in_the_budget() -> None:
    """A slow endpoint's queue counts, small messages more than their bytes; taking and leaving gives all back."""
    connection = Connection()
    connection.open(1, "/test/Slow")
    connection.feed(frame(peer.DATA, 0, 1, message(b"x" * 10) * 500))
    await connection.turn()
    assert connection.budget.used > 500 * 100
    connection.go_on.set()
    for _ in range(50):
        await connection.turn()
    assert connection.budget.used < 1000
    connection.gone()
    await connection.turn()
    assert connection.budget.used == 0


async def test_the_queue_of_a_stream_cannot_exceed_the_budget() -> None:
    """Beyond it the call ends with a status; other calls are not touched."""
    connection = Connection(limit=100_000)
    connection.open(1, "/test/Slow")
    connection.feed(frame(peer.DATA, 0, 1, message(b"") * 1000))
    await connection.turn()
    assert connection.heard()[0][1]["grpc-status"] == "8"
    assert connection.budget.used == 0
    connection.gone()


async def test_a_message_of_a_stream_must_arrive_in_time() -> None:
    """A stream may be silent for hours; a message that has begun holds memory, and has as long as a unary body."""
    connection = Connection()
    connection.open(1, "/test/Slow")
    connection.open(3, "/test/Slow")
    connection.feed(frame(peer.DATA, 0, 3, struct.pack(">BI", 0, 500_000)))
    assert connection.budget.used == 500_000
    await connection.wait(8)
    ((stream, headers), *_) = connection.heard()
    assert (stream, headers["grpc-status"]) == (3, "4")
    assert connection.budget.used == 0
    connection.gone()


async def test_a_second_message_of_a_unary_call_does_not_free_the_first() -> None:
    """It ends the call as soon as it begins; until then the first message's bytes are held."""
    connection = Connection()
    connection.open(1, "/test/Held")
    for piece in (message(bytes(30_000))[:15_000], bytes(15_005)):
        connection.feed(frame(peer.DATA, 0, 1, piece))
    await connection.turn()
    assert connection.budget.used == 30_000
    connection.feed(frame(peer.DATA, 0, 1, struct.pack(">BI", 0, 10) + b"x"))
    await connection.turn()
    assert connection.statuses() == {1: "13"}
    assert connection.budget.used == 0
    connection.gone()


async def test_a_refusal_that_cannot_be_kept_is_a_status() -> None:
    """A stream's refusal is a message; where there is no memory for it, the connection's other calls go on."""
    connection = Connection(limit=8_000_000)
    connection.feed(peer.settings((4, 0)))
    connection.open(1, "/test/Large")
    connection.feed(frame(peer.DATA, 1, 1, message(b"300000")))
    await connection.turn()
    budget = connection.budget
    with budget.hold(budget.limit - budget.used):
        connection.open(3, "/test/Refused")
        await connection.turn()
        assert connection.statuses() == {3: "8"}
    connection.gone()
    assert budget.used == 0


async def test_an_admission_that_fails_gives_back_what_it_held() -> None:
    """Whatever it reserved before."""
    connection = Connection()
    connection.open(1, "/test/NotAdmitted")
    await connection.turn()
    assert connection.heard()[0][1]["grpc-status"] == "16"
    assert connection.budget.used == 0
    connection.gone()


@pytest.mark.parametrize("path", ["/test/Open", "/test/OpenUnary"])
@pytest.mark.parametrize("pieces", ["one", "head first", "end last", "body cut"])
async def test_an_endpoint_that_is_open_to_all_takes_little(path: str, pieces: str) -> None:
    """However its message comes: where the network cuts it is nobody's choice."""
    for size, ends in ((4096, "0"), (4097, "8")):
        connection = Connection()
        connection.go_on.set()
        head, body = frame(peer.HEADERS, peer.END_HEADERS, 1, block(path)), message(bytes(size))
        said = {
            "one": [head + frame(peer.DATA, 1, 1, body)],
            "head first": [head, frame(peer.DATA, 1, 1, body)],
            "end last": [head + frame(peer.DATA, 0, 1, body), frame(peer.DATA, 1, 1, b"")],
            "body cut": [head, frame(peer.DATA, 0, 1, body[:100]), frame(peer.DATA, 1, 1, body[100:])],
        }
        for piece in said[pieces]:
            connection.feed(piece)
            await connection.turn()
        assert connection.statuses() == {1: ends}
        connection.gone()
        await connection.turn()
        assert connection.budget.used == 0


async def test_a_packed_message_to_an_endpoint_that_is_open_to_all_unpacks_to_little() -> None:
    """Whoever has no key cannot have us unpack a thousand times of what he sends."""
    connection = Connection()
    connection.open(1, "/test/OpenUnary", *GRPC[4:5], ("grpc-encoding", "gzip"))
    connection.feed(frame(peer.DATA, 1, 1, message(deflate(bytes(500_000)), 1)))
    assert connection.budget.used < 10_000
    await connection.turn()
    assert connection.statuses() == {1: "8"}
    connection.gone()


async def test_http_replies_that_nobody_takes_are_few() -> None:
    """They stay within the connection's part of the budget like those of gRPC; beyond it requests end with 503."""
    connection = Connection(limit=8_000_000)
    connection.feed(peer.settings((4, 0)))
    for stream in range(1, 41, 2):
        connection.open(stream, "/large", ("content-type", "text/plain"))
    await connection.turn()
    assert 300_000 <= connection.budget.used <= 2_000_000
    refused = [stream for stream, headers in connection.heard() if headers.get(":status") == "503"]
    assert len(refused) >= 13
    assert connection.protocol.busy
    connection.gone()
    await connection.turn()
    assert connection.budget.used == 0


async def test_a_reply_that_was_begun_is_not_taken_for_whole() -> None:
    """A request that ends while its answer is on its way is reset with an error; NO_ERROR would say that all came."""
    connection = Connection()
    connection.feed(peer.settings((4, 2**24)))
    connection.open(1, "/large/half", ("content-type", "text/plain"))
    await connection.turn()
    await connection.wait(8)
    assert {"reset": "2"} in [headers for _, headers in connection.heard()]
    connection.gone()
    await connection.turn()


async def test_an_http_body_must_arrive_in_time() -> None:
    """408, as over HTTP/1.1."""
    connection = Connection()
    connection.open(1, "/rest", ("content-type", "text/plain"), ("origin", "https://lab.example.com"))
    connection.feed(frame(peer.DATA, 0, 1, b"half a "))
    await connection.wait(8)
    ((stream, headers), *_) = connection.heard()
    assert (stream, headers[":status"]) == (1, "408")
    assert headers["access-control-allow-origin"] == "https://lab.example.com"
    assert connection.budget.used == 0
    connection.gone()


async def test_http_bodies_that_nobody_takes_cannot_exceed_the_budget() -> None:
    """503: windows bound one request, the share of all strangers in the budget bounds all of them."""
    connection = Connection(limit=16 * 100_000)
    for stream in (1, 3):
        connection.open(stream, "/stuck", ("content-type", "text/plain"))
        await connection.turn()
        connection.feed(b"".join(frame(peer.DATA, 0, stream, bytes(15_000)) for _ in range(4)))
    assert connection.budget.used == 60_000
    ((stream, headers), *_) = connection.heard()
    assert (stream, headers[":status"]) == (3, "503")
    connection.gone()
    await connection.turn()
    assert connection.budget.used == 0


async def test_replies_that_nobody_takes_are_few() -> None:
    """A connection with window zero gets its part of the budget, then refusals; after their time all are reset."""
    connection = Connection(limit=4_000_000)
    connection.feed(peer.settings((4, 0)))
    for stream in range(1, 41, 2):
        connection.open(stream, "/test/Large")
        connection.feed(frame(peer.DATA, 1, stream, message(b"300000")))
    await connection.turn()
    assert 300_000 <= connection.budget.used <= 1_000_000
    refused = [stream for stream, headers in connection.heard() if headers.get("grpc-status") == "8"]
    assert len(refused) >= 17
    await connection.wait(9)
    assert {headers.get("reset") for _, headers in connection.heard()} == {"8"}
    assert connection.budget.used == 0
    connection.gone()


async def test_only_small_heads_are_remembered() -> None:
    """The memory of headers saves time for those who repeat them; nobody fills it with headers of their own."""
    connection = Connection()
    connection.open(1, "/test/Slow", *GRPC[4:5], *((f"x-{number}", "v" * 100) for number in range(30)))
    assert not connection.context.heads
    connection.open(3, "/test/Slow")
    assert len(connection.context.heads) == 1
    connection.gone()
    await connection.turn()


async def test_compressed_messages_give_their_memory_back() -> None:
    """What a message unpacks to is held while the endpoint works on it, not for as long as the stream lives."""
    connection = Connection()
    connection.go_on.set()
    connection.open(1, "/test/Slow", *GRPC[4:5], ("grpc-encoding", "gzip"))
    for _ in range(100):
        connection.feed(frame(peer.DATA, 0, 1, message(deflate(bytes(50_000)), 1)))
        await connection.turn()
    assert connection.budget.used < 200_000
    connection.gone()
    await connection.turn()
    assert connection.budget.used == 0


async def test_a_sentence_that_is_too_long_is_cut() -> None:
    """Clients refuse large trailers, and would not learn the status."""
    connection = Connection()
    connection.open(1, "/test/Fails")
    connection.feed(frame(peer.DATA, 1, 1, message(b"")))
    await connection.turn()
    ((_, headers),) = connection.heard()
    assert headers["grpc-status"] == "13"
    assert headers["grpc-message"] == "%C3%A9" * 1000
    assert "grpc-status-details-bin" not in headers
    connection.gone()


async def test_trouble_with_one_connection_is_not_the_end_of_all_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at what takes too long goes on, whatever one connection does."""
    monkeypatch.setattr(server, "_TICK_S", 0.001)
    made = server.WireServer({}, Connection()._app, SETTINGS, MemoryBudget(1))
    looked = asyncio.Event()
    broken, sound = (
        Mock(tick=Mock(side_effect=RuntimeError("broken"))),
        Mock(tick=Mock(side_effect=lambda _: looked.set())),
    )
    made._connections.update((broken, sound))
    await made.start()
    await asyncio.wait_for(looked.wait(), 20)
    await asyncio.wait_for(eventually_async(lambda: broken.abort.called), 20)
    made._connections.clear()
    await made.stop(1)


async def test_http_bodies_of_admitted_callers_are_no_strangers() -> None:
    """The share of all strangers is free for those whom nobody knows yet."""
    connection = Connection(limit=16 * 100_000)
    for stream in (1, 3, 5):
        connection.open(stream, "/mine", ("content-type", "text/plain"))
        await connection.turn()
        connection.feed(b"".join(frame(peer.DATA, 0, stream, bytes(15_000)) for _ in range(4)))
    assert connection.heard() == []
    assert connection.budget._shares == {"ann": 180_000}
    connection.gone()
    await connection.turn()
    assert connection.budget.used == 0
