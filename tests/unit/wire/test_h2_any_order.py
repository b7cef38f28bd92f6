"""Anything may happen to a connection, in any order: nothing fails, and nothing is left in the budget.

The transport is a list; the clock is the loop's own, and `tick` is told of later times.
"""

import asyncio
import logging
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support import h2_peer as peer
from support.h2_peer import GRPC, PREFACE, frame, message

from appliance.core.memory import MemoryBudget
from appliance.core.types import Call, Done, Endpoint, RpcAbort, RpcStatus
from appliance.wire.context import Context
from appliance.wire.h2 import Http2
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

BUDGET = 4 * 2**20
SETTINGS = WireSettings(max_message=2**20, max_reply=2**20, streams=16, request_timeout_s=5)
PATHS = ("/test/Echo", "/test/Quick", "/test/Open", "/test/Chat", "/test/Watch", "/test/Fails", "/test/None", "/app")


class Transport:
    """Takes what is written; says that it is full when told so."""

    def __init__(self, protocol: Http2) -> None:
        self.protocol = protocol
        self.written = bytearray()
        self.open = True

    def write(self, data: bytes) -> None:
        """Take bytes; what is written after the end is dropped, as real transports do."""
        if self.open:
            self.written += data

    def close(self) -> None:
        """End soon."""
        if self.open:
            self.open = False
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close

    def pause_reading(self) -> None:
        """Nothing is read anyway but what the test feeds."""

    resume_reading = pause_reading

    def get_write_buffer_size(self) -> int:
        """All is written at once."""
        return 0


def context(budget: MemoryBudget) -> Context:
    """Endpoints of every kind."""

    def admit(call: Call, size: int) -> bytes | None:
        if size % 7 == 3:
            return b"refused"
        if size % 7 == 4:
            raise RpcAbort(RpcStatus.UNAUTHENTICATED, "No.")
        call.memory = budget.hold(size)
        return None

    async def echo(call: Call, body: bytes) -> bytes:
        await asyncio.sleep(0)
        return body

    async def fails(call: Call, body: bytes) -> bytes:
        raise RpcAbort(RpcStatus.INTERNAL, "as it should", b"details")

    def quick(call: Call, body: bytes, done: Done) -> bool:
        if len(body) % 2:
            return False
        asyncio.get_running_loop().call_soon(done, body)
        return True

    async def chat(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for body in requests:
            await asyncio.sleep(0)
            yield body * 3

    async def watch(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for body in requests:
            yield body
            await asyncio.Event().wait()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        while more:
            received = await receive()
            if received["type"] == "http.disconnect":
                return
            size, more = size + len(received["body"]), received["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for last in (False, True):
            await send({"type": "http.response.body", "body": bytes(size), "more_body": not last})

    endpoints = {
        "/test/Echo": Endpoint(unary=echo, admit=admit),
        "/test/Quick": Endpoint(unary=echo, admit=admit, quick=quick),
        "/test/Open": Endpoint(unary=echo),
        "/test/Chat": Endpoint(stream=chat, admit=admit),
        "/test/Watch": Endpoint(stream=watch),
        "/test/Fails": Endpoint(unary=fails, admit=admit),
    }
    return Context(endpoints, app, SETTINGS, budget)


def headers(stream: int, path: str, end: bool, compressed: bool) -> bytes:
    """A request's, with nothing from the table."""
    pairs = [*GRPC[:2], (":path", path), GRPC[3]]
    pairs += [] if path == "/app" else [GRPC[4], *([("grpc-encoding", "gzip")] if compressed else [])]
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in pairs
    )
    return frame(peer.HEADERS, peer.END_HEADERS | end, stream, block)


STREAM = st.integers(0, 7).map(lambda number: 2 * number + 1)
NUMBER = st.sampled_from([0, 1, 3, 100, 4_099, 65_536, 1_000_000, 2**31 - 1])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), STREAM, st.sampled_from(PATHS), st.booleans(), st.booleans()),
        st.tuples(st.just("message"), STREAM, st.integers(0, 9_000), st.booleans(), st.integers(0, 1)),
        st.tuples(st.just("declare"), STREAM, NUMBER),
        st.tuples(st.just("data"), STREAM, st.integers(0, 16_000), st.booleans()),
        st.tuples(st.just("reset"), STREAM),
        st.tuples(st.just("window"), st.one_of(st.just(0), STREAM), NUMBER.filter(bool)),
        st.tuples(st.just("setting"), st.integers(1, 8), NUMBER),
        st.tuples(st.just("turn"), st.integers(1, 5)),
        st.tuples(st.just("tick"), st.sampled_from([0.5, 3, 6, 100])),
        st.tuples(st.just("full"), st.booleans()),
        st.tuples(st.just("raw"), st.binary(max_size=40)),
        st.tuples(st.just("shut")),
        st.tuples(st.just("end")),
    ),
    max_size=40,
)


@settings(max_examples=150)
@given(steps=STEPS, cuts=st.integers(1, 5_000))
def test_nothing_fails_and_nothing_is_left(steps: list[Any], cuts: int) -> None:
    """Whatever comes from the peer, the clock or the server: no error escapes, every task ends, the budget balances."""
    problems: list[Any] = []
    watcher = Watcher(problems)
    logging.getLogger("appliance").addHandler(watcher)
    try:
        asyncio.run(live(steps, cuts, problems))
    finally:
        logging.getLogger("appliance").removeHandler(watcher)
    assert not problems


class Watcher(logging.Handler):
    """Hears of errors that were caught at the last resort."""

    def __init__(self, problems: list[Any]) -> None:
        super().__init__(logging.ERROR)
        self._problems = problems

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self._problems.append(record.getMessage())


async def live(steps: list[Any], cuts: int, problems: list[Any]) -> None:
    """One connection's life."""
    asyncio.get_running_loop().set_exception_handler(lambda _, found: problems.append(found))
    budget = MemoryBudget(BUDGET)
    released: list[bool] = []
    protocol = Http2(context(budget), Peer("10.0.0.1", "ipv4:10.0.0.1:5", False), lambda: released.append(True))
    transport = Transport(protocol)
    protocol.connection_made(transport)
    feed(protocol, transport, PREFACE + peer.settings() + frame(peer.SETTINGS, peer.ACK, 0), cuts)
    now = time.monotonic()
    for kind, *rest in steps:
        if kind == "turn":
            for _ in range(rest[0]):
                await asyncio.sleep(0)
        elif kind == "tick":
            now += rest[0]
            protocol.tick(now)
        elif kind == "full" and transport.open:
            protocol.pause_writing() if rest[0] else protocol.resume_writing()
        elif kind == "shut":
            protocol.shut()
        elif kind == "end":
            protocol.end()
        elif kind not in ("turn", "tick", "full"):
            feed(protocol, transport, wire(kind, rest), cuts)
        assert budget.used >= 0
    transport.close()
    for _ in range(20):
        await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:  # an app that waits for its body has a moment left
        await asyncio.wait_for(asyncio.shield(task), 10)
    assert budget.used == 0
    assert released == [True]


def feed(protocol: Http2, transport: Transport, data: bytes, cuts: int) -> None:
    """In pieces, while anybody listens."""
    for start in range(0, len(data), cuts):
        if transport.open:
            protocol.data_received(data[start : start + cuts])


def wire(kind: str, rest: list[Any]) -> bytes:
    """What a step puts on it."""
    if kind == "open":
        return headers(*rest)
    if kind == "message":
        stream, size, end, flag = rest
        return frame(peer.DATA, end, stream, message(b"m" * size, flag))
    if kind == "declare":
        return frame(peer.DATA, 0, rest[0], struct.pack(">BI", 0, rest[1]) + b"x")
    if kind == "data":
        stream, size, end = rest
        return frame(peer.DATA, end, stream, b"d" * size)
    if kind == "reset":
        return frame(peer.RST_STREAM, 0, rest[0], struct.pack(">I", 8))
    if kind == "window":
        return frame(peer.WINDOW_UPDATE, 0, rest[0], struct.pack(">I", rest[1]))
    if kind == "setting":
        return peer.settings((rest[0], rest[1]))
    return bytes(rest[0])
