"""gRPC-Web, binary and text: the same endpoints, their status in the last frame."""

import asyncio
import base64
import gzip
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.errors import Overloaded
from appliance.core.memory import MemoryBudget
from appliance.core.timing import Timing
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.wire import grpc
from appliance.wire.asgi import scope
from appliance.wire.grpcweb import GrpcWeb
from appliance.wire.http1 import Http1
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

SOON_S = 20
MIB = 2**20
SETTINGS = WireSettings(max_message=MIB, max_reply=MIB)
PEER = Peer("10.0.0.7", "ipv4:10.0.0.7:51234", True, b"leaf", b"chain")
BINARY, TEXT = "application/grpc-web+proto", "application/grpc-web-text"


class Endpoints:
    """What is served in these tests, and what it saw."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.bodies: list[bytes] = []
        self.admitted: list[int] = []
        self.refusal: bytes | None = None
        self.budget = MemoryBudget(4 * MIB)
        self.cancelled = asyncio.Event()
        self.begun = asyncio.Event()

    def table(self) -> Mapping[str, Endpoint]:
        return {
            "/t/Echo": Endpoint(unary=self.echo, admit=self.admit),
            "/t/Open": Endpoint(unary=self.echo),
            "/t/Abort": Endpoint(unary=self.abort),
            "/t/Timed": Endpoint(unary=self.timed),
            "/t/Fail": Endpoint(unary=self.fail),
            "/t/Hang": Endpoint(unary=self.hang, admit=self.admit),
            "/t/Stream": Endpoint(stream=self.stream, admit=self.admit),
        }

    def admit(self, call: Call, size: int) -> bytes | None:
        self.admitted.append(size)
        if self.refusal is None:
            call.memory = self.budget.hold(size)
        return self.refusal

    async def echo(self, call: Call, body: bytes) -> bytes:
        self.calls.append(call)
        self.bodies.append(body)
        assert self.budget.used >= len(body)
        return b"echo " + body

    async def abort(self, call: Call, body: bytes) -> bytes:
        raise RpcAbort(RpcStatus.UNAVAILABLE, "Später, 100 %", b"\0details")

    async def timed(self, call: Call, body: bytes) -> bytes:
        call.timing = Timing(1.0, None, asked=True)
        call.timing.end(2.0, 0.0, 0.0, 10000)
        return await self.abort(call, body) if body else body

    async def fail(self, call: Call, body: bytes) -> bytes:
        raise ValueError("secret text")

    async def hang(self, call: Call, body: bytes) -> bytes:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return b""

    async def stream(self, call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for body in requests:
                self.bodies.append(body)
                if body == b"stop":
                    raise RpcAbort(RpcStatus.NOT_FOUND, "no more")
                for n in range(2):
                    yield b"%d " % n + body
        finally:
            self.cancelled.set()


async def not_found(scope: Any, receive: Any, send: Any) -> None:
    """The application beneath."""
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b"beneath"})


class Answer:
    """What came back: messages, and the trailers as a dict."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.http = status
        self.headers = headers
        if headers["content-type"].startswith("application/grpc-web-text"):
            texts = [text for text in body.replace(b"=", b"= ").replace(b"= =", b"==").split(b" ") if text]
            body = b"".join(base64.b64decode(text, validate=True) for text in texts)
        self.messages: list[bytes] = []
        trailers: bytes | None = None
        while body:
            assert trailers is None
            flag, length = grpc.FRAME_HEAD.unpack_from(body)
            part, body = body[5 : 5 + length], body[5 + length :]
            if flag == 0x80:
                trailers = part
            else:
                assert flag == 0
                self.messages.append(part)
        assert trailers is not None
        assert trailers.endswith(b"\r\n")
        lines = trailers.decode("ascii").split("\r\n")[:-1]
        self.trailers = dict(line.split(": ", 1) for line in lines)

    @property
    def status(self) -> int:
        return int(self.trailers["grpc-status"])

    @property
    def message(self) -> str:
        return self.trailers.get("grpc-message", "")


class Served:
    """The application with its endpoints."""

    def __init__(self, limits: WireSettings = SETTINGS, origins: tuple[str, ...] = ()) -> None:
        self.endpoints = Endpoints()
        self.limits = limits
        limits = replace(limits, cors_origins=origins)
        self.app = GrpcWeb(not_found, self.endpoints.table(), limits, self.endpoints.budget)

    async def ask(
        self, method: str, pieces: list[bytes], kind: str = BINARY, ended: bool = True, **headers: str
    ) -> Answer:
        """One call whose body comes in pieces."""
        fields = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
        head = scope(
            PEER,
            http_version="2",
            method="POST",
            path=method.encode(),
            headers=[(name.encode(), value.encode("latin-1")) for name, value in fields.items()],
        )
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for index, piece in enumerate(pieces or [b""]):
            more = not ended or index < len(pieces) - 1
            queue.put_nowait({"type": "http.request", "body": piece, "more_body": more})
        got: list[Any] = []

        async def send(message: Any) -> None:
            got.append(message)

        async with asyncio.timeout(SOON_S):
            await self.app(head, queue.get, send)
        assert self.endpoints.budget.used == 0
        assert [message["type"] for message in got] == ["http.response.start"] + ["http.response.body"] * (len(got) - 1)
        assert [message["more_body"] for message in got[1:]] == [True] * (len(got) - 2) + [False]
        names = {name.decode(): value.decode() for name, value in got[0]["headers"]}
        return Answer(got[0]["status"], names, b"".join(message["body"] for message in got[1:]))


def texts(*pieces: bytes) -> bytes:
    """Base64 texts one behind the other, each with its padding."""
    return b"".join(base64.b64encode(piece) for piece in pieces)


# ---- calls ----


@pytest.mark.parametrize("kind", ["application/grpc-web", BINARY, "Application/gRPC-Web+proto; charset=x"])
async def test_a_unary_call_is_a_message_and_a_status(kind: str) -> None:
    answer = await Served().ask("/t/Echo", [grpc.frame(b"hi")], kind)
    assert answer.http == 200
    assert answer.headers["content-type"] == BINARY
    assert answer.messages == [b"echo hi"]
    assert answer.trailers == {"grpc-status": "0"}


@pytest.mark.parametrize(
    "body",
    [
        texts(grpc.frame(b"hello")),
        texts(grpc.frame(b"hello")[:1], grpc.frame(b"hello")[1:3], grpc.frame(b"hello")[3:]),  # padded in the middle
    ],
)
async def test_a_text_call_is_base64_both_ways(body: bytes) -> None:
    for pieces in ([body], [body[i : i + 1] for i in range(len(body))]):
        answer = await Served().ask("/t/Echo", pieces, TEXT)
        assert answer.headers["content-type"] == "application/grpc-web-text+proto"
        assert answer.messages == [b"echo hello"]
        assert answer.status == 0


@pytest.mark.parametrize("kind", [BINARY, TEXT])
async def test_a_stream_is_answered_message_by_message(kind: str) -> None:
    served = Served()
    body = grpc.frame(b"a") + grpc.frame(b"bc")
    answer = await served.ask("/t/Stream", [texts(body) if kind == TEXT else body], kind)
    assert answer.messages == [b"0 a", b"1 a", b"0 bc", b"1 bc"]
    assert answer.status == 0
    assert served.endpoints.admitted == [0]
    assert served.endpoints.cancelled.is_set()


async def test_an_endpoint_sees_who_calls_and_how() -> None:
    served = Served()
    before = time.monotonic()
    await served.ask("/t/Echo", [grpc.frame(b"")], authorization="Key k", grpc_timeout="10S", x_bin="AAAA")
    (call,) = served.endpoints.calls
    assert call.method == "/t/Echo"
    assert call.peer == "ipv4:10.0.0.7:51234"
    assert (call.certificate, call.chain) == (b"leaf", b"chain")
    assert call.metadata["authorization"] == "Key k"
    assert "x-bin" not in call.metadata
    assert call.deadline is not None
    assert before + 10 <= call.deadline <= time.monotonic() + 10


async def test_the_first_of_two_headers_counts() -> None:
    served = Served()
    head = scope(PEER, http_version="2", method="POST", path=b"/t/Echo", headers=[(b"a", b"1"), (b"a", b"2")])
    head["headers"].append((b"content-type", BINARY.encode()))
    head["headers"].append((b"b-bin", b"AAA"))

    async def receive() -> Any:
        return {"type": "http.request", "body": grpc.frame(b""), "more_body": False}

    async def send(message: Any) -> None:
        pass

    await served.app(head, receive, send)
    assert served.endpoints.calls[0].metadata == {"a": "1", "content-type": BINARY}


async def test_what_is_not_grpc_web_goes_to_the_application_beneath() -> None:
    served = Served()
    transport = httpx.ASGITransport(served.app)
    async with httpx.AsyncClient(transport=transport, base_url="https://box") as client:
        for kind in ("application/json", "application/grpc", "application/grpc-web+json", "application/grpc-webx"):
            answer = await client.post("/t/Echo", content=b"", headers={"content-type": kind})
            assert (answer.status_code, answer.text) == (404, "beneath")
        assert (await client.get("/t/Echo", headers={"content-type": BINARY})).text == "beneath"
    assert served.endpoints.calls == []


# ---- errors ----


async def test_an_unknown_method_is_unimplemented() -> None:
    answer = await Served().ask("/t/Nothing", [grpc.frame(b"")])
    assert (answer.http, answer.status, answer.messages) == (200, 12, [])
    assert "/t/Nothing" in answer.message


async def test_an_abort_has_its_status_message_and_details() -> None:
    answer = await Served().ask("/t/Abort", [grpc.frame(b"")])
    assert answer.trailers == {
        "grpc-status": "14",
        "grpc-message": "Sp%C3%A4ter, 100 %25",
        "grpc-status-details-bin": base64.b64encode(b"\0details").decode().rstrip("="),
    }


async def test_what_was_not_foreseen_is_a_stock_sentence(caplog: pytest.LogCaptureFixture) -> None:
    answer = await Served().ask("/t/Fail", [grpc.frame(b"")])
    assert answer.status == 13
    assert "secret" not in answer.message
    assert [record.message for record in caplog.records] == ["unforeseen error"]


async def test_where_the_time_went_stands_beside_the_status() -> None:
    """When the call has it, however it ends."""
    for body, status in ((b"", 0), (b"fail", 14)):
        answer = await Served().ask("/t/Timed", [grpc.frame(body)])
        assert (answer.status, answer.trailers["x-appliance-timing"]) == (status, "total;dur=1000.000")


async def test_a_stream_may_end_with_an_error_after_messages() -> None:
    answer = await Served().ask("/t/Stream", [grpc.frame(b"a") + grpc.frame(b"stop")])
    assert (answer.messages, answer.status, answer.message) == ([b"0 a", b"1 a"], 5, "no more")


async def test_who_is_not_admitted_is_answered_before_the_body_is_read() -> None:
    served = Served()
    served.endpoints.refusal = b"no key"
    answer = await served.ask("/t/Echo", [grpc.FRAME_HEAD.pack(0, 1000)], ended=False)
    assert (answer.messages, answer.status) == ([b"no key"], 0)
    assert served.endpoints.admitted == [1000]
    answer = await served.ask("/t/Stream", [b""], ended=False)
    assert (answer.messages, answer.status) == ([b"no key"], 0)


async def test_a_call_beyond_the_memory_budget_is_refused() -> None:
    served = Served()

    def full(call: Call, size: int) -> bytes | None:
        raise Overloaded("limits.memory_in_flight is full.")

    served.endpoints.admit = full  # type: ignore[method-assign]
    served.app = GrpcWeb(not_found, served.endpoints.table(), SETTINGS, served.endpoints.budget)
    answer = await served.ask("/t/Echo", [grpc.frame(b"")])
    assert (answer.status, answer.message) == (8, "limits.memory_in_flight is full.")


@pytest.mark.parametrize(
    ("pieces", "kind", "headers", "status", "says"),
    [
        ([], BINARY, {}, 13, "without a message"),
        ([b"\0\0"], BINARY, {}, 13, "inside a message"),
        ([grpc.frame(b"abc")[:-1]], BINARY, {}, 13, "inside a message"),
        ([grpc.frame(b"abc", 2)], BINARY, {}, 13, "neither a message"),
        ([grpc.frame(b"abc", 0x80)], BINARY, {}, 13, "neither a message"),
        ([grpc.frame(b"abc", 1)], BINARY, {}, 13, "no grpc-encoding"),
        ([grpc.frame(b"abc", 1)], BINARY, {"grpc_encoding": "gzip"}, 13, "cannot be unpacked"),
        ([grpc.frame(gzip.compress(b"abc")[:-1], 1)], BINARY, {"grpc_encoding": "gzip"}, 13, "cut short"),
        ([grpc.frame(b"abc", 1)], BINARY, {"grpc_encoding": "zstd"}, 12, "'zstd'"),
        ([grpc.frame(b"")], BINARY, {"grpc_timeout": "1s"}, 13, "grpc-timeout must be"),
        ([b"\xff\xff\xff\xff"], TEXT, {}, 13, "not base64"),
        ([b"AAAAA==="], TEXT, {}, 13, "not base64"),
        ([b"=AAA"], TEXT, {}, 13, "not base64"),
        ([b"AA AA\r\n"], TEXT, {}, 13, "not base64"),
        ([b"AA==" * 20_000], TEXT, {}, 13, "not base64"),
        ([texts(grpc.frame(b"abc"))[:-4]], TEXT, {}, 13, "inside a message"),
    ],
)
async def test_what_cannot_be_read_is_refused(
    pieces: list[bytes], kind: str, headers: dict[str, str], status: int, says: str
) -> None:
    served = Served()
    answer = await served.ask("/t/Echo", pieces, kind, **headers)
    assert answer.status == status
    assert says in answer.message
    assert served.endpoints.calls == []


# ---- limits ----


@pytest.mark.parametrize("method", ["/t/Echo", "/t/Stream"])
async def test_a_message_over_the_limit_is_refused_by_its_head(method: str) -> None:
    answer = await Served().ask(method, [grpc.FRAME_HEAD.pack(0, MIB + 1)], ended=False)
    assert answer.status == 8
    assert f"limits.request_size, {MIB} bytes" in answer.message


async def test_a_message_at_the_limit_is_served() -> None:
    served = Served(WireSettings(max_message=MIB))
    body = grpc.frame(bytes(MIB))
    answer = await served.ask("/t/Echo", [body[i : i + 65536] for i in range(0, len(body), 65536)])
    assert answer.status == 0
    assert served.endpoints.bodies == [bytes(MIB)]
    assert served.endpoints.admitted == [MIB]


async def test_a_compressed_message_is_unpacked_and_paid_for() -> None:
    served = Served()
    answer = await served.ask("/t/Echo", [grpc.frame(gzip.compress(bytes(MIB)), 1)], grpc_encoding="gzip")
    assert answer.status == 8  # the answer is five bytes longer than limits.reply_size
    assert "limits.reply_size" in answer.message
    assert served.endpoints.bodies == [bytes(MIB)]


async def test_a_bomb_is_refused() -> None:
    answer = await Served().ask("/t/Echo", [grpc.frame(gzip.compress(bytes(30 * MIB)), 1)], grpc_encoding="gzip")
    assert answer.status == 8
    assert "limits.request_size" in answer.message


async def test_a_method_open_to_all_takes_little() -> None:
    served = Served()
    assert (await served.ask("/t/Open", [grpc.frame(bytes(4096))])).status == 0
    answer = await served.ask("/t/Open", [grpc.FRAME_HEAD.pack(0, 4097)], ended=False)
    assert (answer.status, answer.message) == (8, "This method takes 4096 bytes at most.")
    answer = await served.ask("/t/Open", [grpc.frame(gzip.compress(bytes(4097)), 1)], grpc_encoding="gzip")
    assert (answer.status, answer.message) == (8, "This method takes 4096 bytes at most.")


async def test_a_body_that_does_not_come_is_over_in_time() -> None:
    for method in ("/t/Echo", "/t/Stream"):
        served = Served(WireSettings(request_timeout_s=0.05))
        answer = await served.ask(method, [grpc.frame(b"abc")[:-1]], ended=False)
        assert answer.status == 4
        assert "did not arrive within 0.05 s" in answer.message


@pytest.mark.parametrize("given_time", ["50m", "0S"])
async def test_a_deadline_ends_the_call(given_time: str) -> None:
    served = Served()
    answer = await served.ask("/t/Hang", [grpc.frame(b"")], grpc_timeout=given_time)
    assert answer.status == 4
    assert served.endpoints.cancelled.is_set() or given_time == "0S"


# ---- from browsers ----


async def client_of(served: Served) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(served.app), base_url="https://box")


ASKED = "authorization,content-type,x-grpc-web,x-user-agent,grpc-timeout,x-clarifai-request-id-prefix"


@pytest.mark.parametrize("path", ["/t/Echo", "/v2/models"])
async def test_a_page_of_a_known_origin_may_call(path: str) -> None:
    async with await client_of(Served(origins=("https://lab.example.com",))) as client:
        answer = await client.options(
            path,
            headers={
                "origin": "https://lab.example.com",
                "access-control-request-method": "POST",
                "access-control-request-headers": ASKED,
            },
        )
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://lab.example.com"
        allowed = answer.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
        assert set(ASKED.split(",")) <= set(allowed)
        answer = await client.post(path, headers={"origin": "https://lab.example.com"})
        assert answer.headers["access-control-allow-origin"] == "https://lab.example.com"
        assert answer.headers["vary"] == "Origin"


async def test_a_page_reads_the_status_of_a_call() -> None:
    served = Served(origins=("*",))
    head = scope(
        PEER,
        http_version="2",
        method="POST",
        path=b"/t/Nothing",
        headers=[(b"origin", b"https://any.example.com"), (b"content-type", BINARY.encode())],
    )
    got: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        got.append(message)

    await served.app(head, receive, send)
    headers = dict(got[0]["headers"])
    assert headers[b"access-control-allow-origin"] == b"*"
    exposed = headers[b"access-control-expose-headers"].decode()
    assert set(exposed.split(", ")) >= {"retry-after", "grpc-status", "grpc-message", "grpc-status-details-bin"}


@pytest.mark.parametrize("origins", [(), ("https://lab.example.com",)])
async def test_a_page_of_another_origin_may_not(origins: tuple[str, ...]) -> None:
    async with await client_of(Served(origins=origins)) as client:
        headers = {"origin": "https://evil.example.com", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in (await client.options("/t/Echo", headers=headers)).headers
        assert "access-control-allow-origin" not in (await client.post("/v2", headers=headers)).headers


# ---- over a connection ----


async def over_http1(served: Served, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> Any:
    gone = asyncio.Event()
    peer = Peer("127.0.0.1", "ipv4:127.0.0.1:1", False)
    server = await asyncio.get_running_loop().create_server(
        lambda: Http1(served.app, peer, served.limits, served.endpoints.budget, gone.set), "127.0.0.1", 0
    )
    try:
        async with asyncio.timeout(SOON_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
            answer = await talk(reader, writer)
            writer.close()
            await gone.wait()
    finally:
        server.close()
    assert served.endpoints.budget.used == 0
    return answer


async def test_a_call_is_served_over_http_1_1() -> None:
    served = Served()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        body = grpc.frame(b"x" * 500_000)
        head = f"POST /t/Echo HTTP/1.1\r\nHost: box\r\nContent-Type: {BINARY}\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        return await reader.read()

    sent = await over_http1(served, talk)
    assert sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"grpc-status: 0\r\n" in sent
    assert served.endpoints.bodies == [b"x" * 500_000]


async def test_a_client_that_leaves_cancels_its_call_at_once() -> None:
    served = Served()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"POST /t/Hang HTTP/1.1\r\nHost: box\r\nContent-Type: {BINARY}\r\nContent-Length: 5\r\n\r\n"
        writer.write(head.encode() + grpc.frame(b""))
        await served.endpoints.begun.wait()

    await over_http1(served, talk)
    await asyncio.wait_for(served.endpoints.cancelled.wait(), SOON_S)


# ---- any bytes ----


@settings(max_examples=150)
@given(st.lists(st.binary(max_size=40), max_size=6), st.sampled_from([BINARY, TEXT]), st.booleans())
def test_whatever_comes_ends_in_a_status(pieces: list[bytes], kind: str, stream: bool) -> None:
    async def ask() -> None:
        answer = await Served().ask("/t/Stream" if stream else "/t/Echo", pieces, kind, grpc_encoding="gzip")
        assert answer.status in (0, 5, 8, 13)

    asyncio.run(ask())


@settings(max_examples=100)
@given(
    st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.lists(st.integers(1, 9), max_size=20), st.booleans()
)
def test_the_pieces_in_which_a_call_comes_change_nothing(bodies: list[bytes], cuts: list[int], text: bool) -> None:
    async def ask() -> None:
        data = b"".join(texts(grpc.frame(body)) if text else grpc.frame(body) for body in bodies)
        pieces = []
        for cut in cuts:
            pieces.append(data[:cut])
            data = data[cut:]
        served = Served()
        answer = await served.ask("/t/Stream", [*pieces, data], TEXT if text else BINARY)
        stop = bodies.index(b"stop") + 1 if b"stop" in bodies else len(bodies)
        assert served.endpoints.bodies == bodies[:stop]
        assert answer.status == (5 if b"stop" in bodies else 0)

    asyncio.run(ask())
