"""HTTP/1.1 as clients speak it, and as those do who want us to see other requests than the proxy before us."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from appliance.core.logs import RateLimitedLog
from appliance.core.memory import MemoryBudget
from appliance.wire import asgi, http1
from appliance.wire.http1 import Http1
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

MIB = 2**20
SETTINGS = WireSettings(max_message=MIB)
SOON_S = 20
"""What is waited for at most; nothing here takes long."""


class Wire(asyncio.Transport):
    """A transport without a socket: keeps what is written, and says what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self.reading = True
        self.closed = asyncio.Event()
        self.ended = False
        self.aborted = False
        self.protocol: Http1 | None = None

    def write(self, data: Any) -> None:
        self.sent += data

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 8443) if name == "sockname" else default

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def close(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            assert self.protocol is not None
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.aborted = True
        self.close()


class Meeting:
    """A connection over a `Wire`."""

    def __init__(self, app: Any, settings: WireSettings = SETTINGS, budget: MemoryBudget | None = None) -> None:
        self.budget = budget or MemoryBudget(64 * MIB)
        self.released = 0
        self.wire = Wire()
        peer = Peer("10.0.0.7", "ipv4:10.0.0.7:51234", False)
        self.http = self.wire.protocol = Http1(app, peer, settings, self.budget, self._release)
        self.http.connection_made(self.wire)

    def _release(self) -> None:
        self.released += 1

    async def say(self, data: bytes, until: Callable[[], bool] | None = None) -> bytes:
        """Feed bytes; what was answered once `until` holds, or nothing moves any more."""
        self.http.data_received(data)
        await settle(until)
        return bytes(self.wire.sent)

    async def leave(self) -> None:
        self.wire.close()
        await settle()
        assert self.released == 1
        assert self.budget.used == 0


async def settle(until: Callable[[], bool] | None = None) -> None:
    """Let the loop turn until `until` holds; without it, often enough for all that needs no time."""
    if until is None:
        for _ in range(30):
            await asyncio.sleep(0)
        return
    async with asyncio.timeout(SOON_S):
        while not until():  # noqa: ASYNC110  # what is waited for are plain values
            await asyncio.sleep(0)


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it understood, as JSON lines: method, path, body."""
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    text = json.dumps([scope["method"], scope["path"], body.decode("latin-1")]).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def request(line: str = "GET / HTTP/1.1", *headers: str, body: bytes = b"", host: str | None = "box") -> bytes:
    lines = [line, *([f"Host: {host}"] if host is not None else []), *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def answers(sent: bytes) -> list[tuple[int, bytes]]:
    """Statuses and bodies of a run of answers with content-length."""
    found = []
    while sent:
        head, _, rest = sent.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        length = int(fields.get(b"content-length", 0))
        found.append((int(head.split()[1]), rest[:length]))
        sent = rest[length:]
    return found


def details(sent: bytes) -> tuple[int, int, str]:
    """HTTP status, code and sentence of one refusal."""
    ((status, body),) = answers(sent)
    content = json.loads(body)["status"]
    assert set(content) == {"code", "description", "details"}
    return status, content["code"], content["details"]


def said(sent: bytes) -> list[list[str]]:
    """What `echo` understood."""
    assert all(status == 200 for status, _ in answers(sent))
    return [json.loads(body) for _, body in answers(sent)]


# ---- requests and answers ----


async def test_a_request_is_answered_and_the_connection_stays() -> None:
    meeting = Meeting(echo)
    sent = await meeting.say(request("GET /a%20b?q=1 HTTP/1.1"))
    assert said(sent) == [["GET", "/a b", ""]]
    assert sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\ndate: " in sent
    assert not meeting.http.busy
    sent = await meeting.say(request("POST /again HTTP/1.1", "Content-Length: 3", body=b"abc"))
    assert said(sent)[1] == ["POST", "/again", "abc"]
    await meeting.leave()


async def test_requests_sent_ahead_are_answered_in_their_order() -> None:
    meeting = Meeting(echo)
    chunked = request("POST /2 HTTP/1.1", "Transfer-Encoding: chunked", body=b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
    sent = await meeting.say(
        request("GET /1 HTTP/1.1")
        + chunked
        + request("PUT /3 HTTP/1.1", "Content-Length: 2", body=b"xy")
        + b"\r\n"  # some clients end a body with a line end that it does not have
        + request("GET /4 HTTP/1.1", "Connection: close")
        + request("GET /5 HTTP/1.1")
    )
    assert said(sent) == [["GET", "/1", ""], ["POST", "/2", "abcde"], ["PUT", "/3", "xy"], ["GET", "/4", ""]]
    assert meeting.wire.ended or meeting.wire.closed.is_set()
    await meeting.leave()


async def test_http_1_0_is_served_and_closed() -> None:
    meeting = Meeting(echo)
    sent = await meeting.say(request("POST / HTTP/1.0", "Content-Length: 1", body=b"x", host=None))
    assert said(sent) == [["POST", "/", "x"]]
    assert b"connection: close" in sent.lower()
    assert meeting.wire.closed.is_set()
    await meeting.leave()


async def test_an_answer_without_a_length_is_chunked_or_ends_with_the_connection() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"transfer-encoding", b"identity")]})
        for piece in (b"one", b"", b"two"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    meeting = Meeting(app)
    sent = await meeting.say(request())
    assert sent.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
    assert sent.lower().count(b"transfer-encoding") == 1
    assert not meeting.wire.closed.is_set()
    await meeting.leave()

    meeting = Meeting(app)
    sent = await meeting.say(request("GET / HTTP/1.0"))
    assert sent.endswith(b"\r\n\r\nonetwo")
    assert meeting.wire.closed.is_set()
    await meeting.leave()


async def test_an_answer_to_head_has_no_body() -> None:
    meeting = Meeting(echo)
    sent = await meeting.say(request("HEAD / HTTP/1.1") + request("HEAD / HTTP/1.1"))
    assert sent.count(b"HTTP/1.1 200") == 2
    assert sent.count(b"content-length: ") == 2
    assert sent.endswith(b"\r\n\r\n")
    assert b"HEAD" not in sent
    await meeting.leave()


async def test_a_client_that_asks_first_hears_yes_when_its_body_is_wanted() -> None:
    meeting = Meeting(echo)
    head = request("POST / HTTP/1.1", "Content-Length: 5", "Expect: 100-continue")
    assert await meeting.say(head) == b"HTTP/1.1 100 Continue\r\n\r\n"
    sent = await meeting.say(b"hello")
    assert said(sent.partition(b"\r\n\r\n")[2]) == [["POST", "/", "hello"]]
    await meeting.leave()


async def refuse_all(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


async def test_a_client_that_asks_first_is_refused_before_it_sends() -> None:
    meeting = Meeting(refuse_all)
    sent = await meeting.say(request("POST / HTTP/1.1", "Content-Length: 5", "Expect: 100-continue"))
    assert answers(sent) == [(401, b"no")]
    assert b"100 Continue" not in sent
    assert b"connection: close" in sent.lower()  # whether its body comes now, nobody knows
    await meeting.leave()


async def test_a_short_body_that_nobody_read_does_not_end_the_connection() -> None:
    meeting = Meeting(refuse_all)
    await meeting.say(request("POST / HTTP/1.1", "Content-Length: 100000", body=bytes(40_000)))
    sent = await meeting.say(bytes(60_000) + request())
    assert answers(sent) == [(401, b"no")] * 2
    await meeting.leave()


async def test_a_long_body_that_nobody_read_does() -> None:
    meeting = Meeting(refuse_all)
    await meeting.say(request("POST / HTTP/1.1", "Content-Length: 1000000"))
    sent = await meeting.say(bytes(900_000))
    assert answers(sent) == [(401, b"no")]
    assert meeting.wire.ended
    await meeting.leave()


@pytest.mark.parametrize("header", ["Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk", "Upgrade: websocket"])
async def test_an_upgrade_is_ignored(header: str) -> None:
    meeting = Meeting(echo)
    plain = request("POST / HTTP/1.1", "Content-Length: 1", "Connection: Upgrade", *header.split("\r\n"), body=b"x")
    assert said(await meeting.say(plain + request())) == [["POST", "/", "x"], ["GET", "/", ""]]
    await meeting.leave()


# ---- what is refused ----

CHUNKED = "Transfer-Encoding: chunked"
HOSTILE = {
    "length and coding": request("POST / HTTP/1.1", "Content-Length: 4", CHUNKED, body=b"0\r\n\r\n"),
    "coding and length": request("POST / HTTP/1.1", CHUNKED, "Content-Length: 4", body=b"0\r\n\r\n"),
    "two lengths": request("POST / HTTP/1.1", "Content-Length: 4", "Content-Length: 5", body=b"abcde"),
    "the same length twice": request("POST / HTTP/1.1", "Content-Length: 4", "content-length: 4", body=b"abcd"),
    "a list of lengths": request("POST / HTTP/1.1", "Content-Length: 4, 4", body=b"abcd"),
    "a signed length": request("POST / HTTP/1.1", "Content-Length: +4", body=b"abcd"),
    "a negative length": request("POST / HTTP/1.1", "Content-Length: -4", body=b"abcd"),
    "a hexadecimal length": request("POST / HTTP/1.1", "Content-Length: 0x4", body=b"abcd"),
    "an empty length": request("POST / HTTP/1.1", "Content-Length: ", body=b"abcd"),
    "a length in other digits": request("POST / HTTP/1.1", "Content-Length: \xb2", body=b"ab"),
    "an endless length": request("POST / HTTP/1.1", f"Content-Length: {'9' * 20}"),
    "a folded header": request("GET / HTTP/1.1", "X: a", " b"),
    "a folded coding": request("POST / HTTP/1.1", "Transfer-Encoding:", "\tchunked", body=b"0\r\n\r\n"),
    "a folded first header": b"GET / HTTP/1.1\r\n Host: box\r\n\r\n",
    "bare line feeds": b"GET / HTTP/1.1\nHost: box\n\n",
    "one bare line feed": b"GET / HTTP/1.1\r\nHost: box\nX: y\r\n\r\n",
    "a bare line feed that hides a header": request("GET / HTTP/1.1", "X: y\nContent-Length: 5"),
    "a bare carriage return": request("GET / HTTP/1.1", "X: y\rContent-Length: 5"),
    "a carriage return in the target": request("GET /\r HTTP/1.1"),
    "a NUL": request("GET / HTTP/1.1", "X: a\0b"),
    "another control character": request("GET / HTTP/1.1", "X: a\x01b"),
    "a form feed before the coding": request("POST / HTTP/1.1", "Transfer-Encoding: \x0cchunked"),
    "a space before the colon": request("POST / HTTP/1.1", "Content-Length : 4", body=b"abcd"),
    "a tab before the colon": request("POST / HTTP/1.1", "Transfer-Encoding\t: chunked", body=b"0\r\n\r\n"),
    "a header without a colon": request("GET / HTTP/1.1", "X"),
    "a header without a name": request("GET / HTTP/1.1", ": x"),
    "a name that is no token": request("GET / HTTP/1.1", "X(y): x"),
    "a name beyond ASCII": request("GET / HTTP/1.1", "Content-Length\xa0: 4"),
    "no host": request(host=None),
    "two hosts": request("GET / HTTP/1.1", "Host: other"),
    "a host with a path": request(host="box/evil"),
    "a host with a user": request(host="a@box"),
    "no version": request("GET /"),
    "two spaces": request("GET  / HTTP/1.1"),
    "a target with a space": request("GET /a b HTTP/1.1"),
    "a target beyond ASCII": request("GET /\xff HTTP/1.1"),
    "a version in lower case": request("GET / http/1.1"),
    "a target with a scheme": request("GET http://box/ HTTP/1.1"),
    "a target that is an asterisk": request("OPTIONS * HTTP/1.1"),
    "a target that is no path": request("GET admin HTTP/1.1"),
    "chunks in HTTP/1.0": request("POST / HTTP/1.0", CHUNKED, body=b"0\r\n\r\n"),
    "a chunk size with a prefix": request("POST / HTTP/1.1", CHUNKED, body=b"0x1\r\na\r\n0\r\n\r\n"),
    "a signed chunk size": request("POST / HTTP/1.1", CHUNKED, body=b"+1\r\na\r\n0\r\n\r\n"),
    "a negative chunk size": request("POST / HTTP/1.1", CHUNKED, body=b"-1\r\na\r\n0\r\n\r\n"),
    "a space before a chunk size": request("POST / HTTP/1.1", CHUNKED, body=b" 1\r\na\r\n0\r\n\r\n"),
    "an empty chunk size": request("POST / HTTP/1.1", CHUNKED, body=b"\r\na\r\n0\r\n\r\n"),
    "a chunk size that is no number": request("POST / HTTP/1.1", CHUNKED, body=b"g\r\na\r\n0\r\n\r\n"),
    "a chunk size without end": request("POST / HTTP/1.1", CHUNKED, body=b"0" * 21 + b"1\r\na\r\n0\r\n\r\n"),
    "a chunk that ends elsewhere": request("POST / HTTP/1.1", CHUNKED, body=b"1\r\nabc\r\n0\r\n\r\n"),
    "a chunk size before a line feed": request("POST / HTTP/1.1", CHUNKED, body=b"1\na\r\n0\r\n\r\n"),
    "a chunk with a bare line feed in its extension": request("POST / HTTP/1.1", CHUNKED, body=b"1;\na\r\n0\r\n\r\n"),
    "a chunk with a bare carriage return in its extension": request(
        "POST / HTTP/1.1", CHUNKED, body=b"1;\rx\r\na\r\n0\r\n\r\n"
    ),
    "a later chunk like that": request("POST / HTTP/1.1", CHUNKED, body=b"1\r\na\r\n1;\rx\r\na\r\n0\r\n\r\n"),
    "a last chunk like that": request("POST / HTTP/1.1", CHUNKED, body=b"1\r\na\r\n0;\rx\r\n\r\n"),
    "a trailer with a bare line feed": request("POST / HTTP/1.1", CHUNKED, body=b"0\r\nX: y\nZ: z\r\n\r\n"),
    "chunks that end in a bare line feed": request("POST / HTTP/1.1", CHUNKED, body=b"1\r\na\r\n0\r\n\n"),
    "trailers that end in bare line feeds": request("POST / HTTP/1.1", CHUNKED, body=b"0\r\nX: y\n\n"),
    "trailers that are no headers": request("POST / HTTP/1.1", CHUNKED, body=b"0\r\nGET / HTTP/1.1\r\n\r\n"),
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "an empty request": b"\r\n\r\n\r\n\r\n",
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
async def test_what_may_be_read_in_two_ways_is_refused(hostile: bytes) -> None:
    """And nothing behind it is read as a request."""
    meeting = Meeting(echo)
    status, code, sentence = details(await meeting.say(hostile + request("GET /smuggled HTTP/1.1")))
    assert (status, code) == (400, 11100)
    assert sentence.endswith(".")
    assert meeting.wire.ended
    assert b"smuggled" not in await meeting.say(request("GET /smuggled HTTP/1.1"))
    await meeting.leave()


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE.keys())
async def test_it_is_refused_byte_by_byte_too(hostile: bytes) -> None:
    meeting = Meeting(echo)
    for byte in hostile + request("GET /smuggled HTTP/1.1"):
        meeting.http.data_received(bytes([byte]))
    await settle()
    assert details(bytes(meeting.wire.sent))[:2] == (400, 11100)
    await meeting.leave()


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (request("POST / HTTP/1.1", "Transfer-Encoding: gzip, chunked"), 501, 11100),
        (request("POST / HTTP/1.1", "Transfer-Encoding: chunked, chunked"), 501, 11100),
        (request("POST / HTTP/1.1", "Transfer-Encoding: identity"), 501, 11100),
        (request("POST / HTTP/1.1", "Transfer-Encoding: xchunked"), 501, 11100),
        (request("POST / HTTP/1.1", 'Transfer-Encoding: "chunked"'), 501, 11100),
        (request("CONNECT box:443 HTTP/1.1"), 405, 11103),
        (request("TRACE / HTTP/1.1"), 405, 11103),
        (request("GET / HTTP/2.0"), 505, 11100),
        (request("GET / HTTP/1.2"), 505, 11100),
    ],
)
async def test_what_is_not_spoken_here_is_refused(sent: bytes, status: int, code: int) -> None:
    meeting = Meeting(echo)
    assert details(await meeting.say(sent))[:2] == (status, code)
    await meeting.leave()


async def test_two_codings_are_refused() -> None:
    meeting = Meeting(echo)
    assert details(await meeting.say(request("POST / HTTP/1.1", CHUNKED, CHUNKED, body=b"0\r\n\r\n")))[0] == 400
    await meeting.leave()


async def test_a_refusal_quotes_nothing_of_what_was_sent(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header line that cannot be read may hold a key."""
    monkeypatch.setattr(http1, "_log", RateLimitedLog(logging.getLogger("appliance.test")))
    meeting = Meeting(echo)
    sent = await meeting.say(request("GET / HTTP/1.1", "Authorization : Key 0123456789abcdef"))
    assert answers(sent)[0][0] == 400
    assert b"0123456789abcdef" not in sent
    assert "HTTP request refused" in caplog.text
    assert "ipv4:10.0.0.7:51234" in str([record.__dict__ for record in caplog.records])
    assert "0123456789abcdef" not in caplog.text
    await meeting.leave()


# ---- limits ----


@pytest.mark.parametrize("owner", ["", "ann"])
async def test_an_admitted_callers_body_does_not_use_up_the_strangers_share(owner: str) -> None:
    """Nor does the next request on its connection have an owner before it is admitted itself."""
    go_on = asyncio.Event()
    budget = MemoryBudget(16 * 1000)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if owner and scope["path"] == "/mine":
            asgi.admitted(scope, budget.expect(0, owner))
        await go_on.wait()
        await echo(scope, receive, send)

    meeting = Meeting(app, budget=budget)
    await meeting.say(request("POST /mine HTTP/1.1", "Content-Length: 5000"))
    sent = await meeting.say(b"x" * 5000)
    if not owner:
        assert details(sent)[:2] == (503, 21354)
    else:
        assert (sent, budget.used, budget._shares) == (b"", 5000, {"ann": 5000})
        go_on.set()
        assert len(said(await meeting.say(b""))) == 1
        go_on.clear()
        await meeting.say(request("POST /other HTTP/1.1", "Content-Length: 500"))
        await meeting.say(b"x" * 400)
        assert budget._shares == {"": 400}
    await meeting.leave()


async def test_a_body_over_the_limit_is_refused_by_its_length_before_it_comes() -> None:
    meeting = Meeting(echo)
    over = asgi.body_limit(SETTINGS) + 1
    status, code, sentence = details(await meeting.say(request("POST / HTTP/1.1", f"Content-Length: {over}")))
    assert (status, code) == (413, 30105)
    assert f"limits.request_size, {MIB} bytes" in sentence
    await meeting.leave()


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [("https://lab.example.com", b"access-control-allow-origin: https://lab.example.com\r\n"), ("https://evil", b"")],
)
async def test_a_page_of_an_allowed_origin_can_read_what_the_wire_refuses(origin: str, allowed: bytes) -> None:
    """Else a browser tells it of a network error, and nothing of the limit."""
    meeting = Meeting(echo, replace(SETTINGS, cors_origins=("https://lab.example.com",)))
    length = f"Content-Length: {asgi.body_limit(SETTINGS) + 1}"
    sent = await meeting.say(request("POST / HTTP/1.1", length, f"Origin: {origin}"))
    assert sent.startswith(b"HTTP/1.1 413")
    assert (allowed in sent) if allowed else (b"access-control" not in sent)
    await meeting.leave()


async def test_a_chunked_body_over_the_limit_is_refused_when_it_is_over() -> None:
    meeting = Meeting(echo)
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    last = b"400\r\n" + bytes(0x400) + b"\r\n"
    assert await meeting.say(request("POST / HTTP/1.1", CHUNKED) + 24 * chunk + last) == b""
    assert details(await meeting.say(b"1\r\nx\r\n"))[:2] == (413, 30105)
    await meeting.leave()


async def test_a_body_at_the_limit_is_served() -> None:
    meeting = Meeting(echo)
    size = asgi.body_limit(SETTINGS)
    sent = await meeting.say(request("POST / HTTP/1.1", f"Content-Length: {size}", body=b"x" * size))
    assert len(said(sent)[0][2]) == size
    await meeting.leave()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 20_000,
        b"GET / HTTP/1.1\r\nHost: box\r\nX: " + b"a" * 20_000,
        request("GET / HTTP/1.1", "X: " + "a" * 20_000),
        request("GET / HTTP/1.1", *["X: y"] * 500),  # few bytes, but not by HTTP/2's count
    ],
)
async def test_a_head_over_the_limit_is_refused(head: bytes) -> None:
    meeting = Meeting(echo)
    status, code, sentence = details(await meeting.say(head))
    assert (status, code) == (431, 11100)
    assert "limits.metadata_size" in sentence
    await meeting.leave()


async def test_a_head_that_comes_byte_by_byte_costs_little() -> None:
    """Its bytes are looked at once each, not once for every byte that follows."""
    meeting = Meeting(echo, WireSettings(metadata=256 * 1024))
    begun = time.process_time()
    for byte in request("GET / HTTP/1.1", "X: " + "a" * 60_000):
        meeting.http.data_received(bytes([byte]))
    await settle()
    assert said(bytes(meeting.wire.sent)) == [["GET", "/", ""]]
    assert time.process_time() - begun < 5  # looked at anew each time it takes half a minute
    await meeting.leave()


async def test_tiny_chunks_without_end_are_refused() -> None:
    """Each costs us a hundred times what it costs its sender."""
    meeting = Meeting(echo)
    status, _, sentence = details(await meeting.say(request("POST / HTTP/1.1", CHUNKED) + b"1\r\nx\r\n" * 10_000))
    assert status == 400
    assert "small chunks" in sentence
    await meeting.leave()


async def test_a_body_beyond_the_memory_budget_is_refused() -> None:
    meeting = Meeting(echo, budget=MemoryBudget(10_000))
    sent = await meeting.say(request("POST / HTTP/1.1", "Content-Length: 20000", body=bytes(20_000)))
    status, code, sentence = details(sent)
    assert (status, code) == (503, 21354)
    assert "limits.memory_in_flight" in sentence
    assert meeting.budget.used == 0
    await meeting.leave()


class Gated:
    """An application that reads and answers when it is let."""

    def __init__(self) -> None:
        self.read = asyncio.Event()
        self.answer = asyncio.Event()
        self.got = 0
        self.disconnected = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.read.wait()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected = True
                return
            self.got += len(message["body"])
            if not message["more_body"]:
                break
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def test_a_body_that_the_application_does_not_take_waits_on_the_socket() -> None:
    app = Gated()
    app.answer.set()
    meeting = Meeting(app)
    await meeting.say(request("POST / HTTP/1.1", "Content-Length: 1000000"))
    sent = 0
    while meeting.wire.reading:
        meeting.http.data_received(bytes(10_000))
        sent += 10_000
    assert sent < 300_000
    assert 0 < meeting.budget.used <= sent
    app.read.set()
    await settle(lambda: meeting.wire.reading)
    assert app.got > 0
    answered = await meeting.say(bytes(1_000_000 - sent), lambda: bool(meeting.wire.sent))
    assert app.got == 1_000_000
    assert answers(answered) == [(200, b"ok")]
    assert meeting.budget.used == 0
    await meeting.leave()


async def test_what_is_sent_ahead_of_an_answer_waits_on_the_socket() -> None:
    app = Gated()
    app.read.set()
    meeting = Meeting(app)
    await meeting.say(request())
    while meeting.wire.reading:
        meeting.http.data_received(request() * 100)
    app.answer.set()
    await settle(lambda: meeting.wire.reading)
    await meeting.leave()


# ---- time ----

HASTY = WireSettings(handshake_timeout_s=0.05, request_timeout_s=0.05, idle_s=0.05)


async def test_a_client_that_says_nothing_is_closed_without_a_word() -> None:
    meeting = Meeting(echo, HASTY)
    await asyncio.wait_for(meeting.wire.closed.wait(), SOON_S)
    assert meeting.wire.sent == b""
    await meeting.leave()


async def test_a_head_that_does_not_come_in_time_is_refused() -> None:
    meeting = Meeting(echo, HASTY)
    sent = await meeting.say(b"GET / HTTP/1.1\r\n", lambda: meeting.wire.ended)
    assert details(sent)[:2] == (408, 98009)
    await meeting.leave()


async def test_line_ends_before_a_request_do_not_win_time() -> None:
    meeting = Meeting(echo, HASTY)

    async def drip() -> None:
        while not meeting.wire.ended:
            meeting.http.data_received(b"\r\n")
            await asyncio.sleep(0.01)

    await asyncio.wait_for(drip(), SOON_S)
    await meeting.leave()


async def test_a_body_that_does_not_come_in_time_is_refused() -> None:
    meeting = Meeting(echo, HASTY)
    head = request("POST / HTTP/1.1", "Content-Length: 9", body=b"12345678")
    sent = await meeting.say(head, lambda: meeting.wire.ended)
    assert details(sent)[:2] == (408, 98009)
    assert not meeting.wire.reading or meeting.wire.ended
    await meeting.leave()


async def test_an_idle_connection_is_closed_without_a_word() -> None:
    meeting = Meeting(echo, WireSettings(idle_s=0.05))
    sent = await meeting.say(request(), meeting.wire.closed.is_set)
    assert said(sent) == [["GET", "/", ""]]
    await meeting.leave()


async def test_a_client_is_not_blamed_for_an_application_that_does_not_read() -> None:
    app = Gated()
    app.answer.set()
    meeting = Meeting(app, WireSettings(request_timeout_s=0.01))
    await meeting.say(request("POST / HTTP/1.1", "Content-Length: 400000"))
    meeting.http.data_received(bytes(300_000))
    late = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, late.set)
    await late.wait()
    assert meeting.wire.sent == b""
    app.read.set()
    await meeting.say(bytes(100_000), lambda: bool(meeting.wire.sent))
    assert app.got == 400_000
    await meeting.leave()


async def long_answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % (5 * MIB))]})
    for n in range(5):
        await send({"type": "http.response.body", "body": bytes(MIB), "more_body": n < 4})


async def test_an_answer_goes_out_at_the_pace_of_the_client() -> None:
    meeting = Meeting(long_answer)
    write = meeting.wire.write

    def full(data: Any) -> None:
        write(data)
        meeting.http.pause_writing()

    meeting.wire.write = full  # type: ignore[method-assign]
    sent = len(await meeting.say(request()))
    assert sent < 200_000
    assert meeting.budget.used <= MIB
    assert meeting.http.busy
    for _ in range(30):
        meeting.http.resume_writing()
    await settle()
    assert sent < len(meeting.wire.sent) < 3 * MIB
    meeting.wire.write = write  # type: ignore[method-assign]
    meeting.http.resume_writing()
    await settle(lambda: not meeting.http.busy)
    assert len(meeting.wire.sent.partition(b"\r\n\r\n")[2]) == 5 * MIB
    assert meeting.budget.used == 0
    await meeting.leave()


async def test_a_client_that_takes_nothing_is_cut() -> None:
    meeting = Meeting(long_answer, WireSettings(request_timeout_s=0.05))
    meeting.http.pause_writing()
    await meeting.say(request(), lambda: meeting.wire.aborted)
    await meeting.leave()


async def test_a_client_that_does_not_take_the_end_is_cut() -> None:
    """Closed, a transport waits for its last bytes to be taken; for ever, if nobody limits it."""
    meeting = Meeting(echo, WireSettings(request_timeout_s=0.05))
    closed = asyncio.Event()
    close = meeting.wire.close
    meeting.wire.close = closed.set  # type: ignore[method-assign]
    meeting.wire.is_closing = closed.is_set  # type: ignore[method-assign]
    await meeting.say(request("GET / HTTP/1.1", "Connection: close"), closed.is_set)
    meeting.http.pause_writing()
    meeting.http.resume_writing()
    await settle(lambda: meeting.wire.aborted)
    meeting.wire.close = close  # type: ignore[method-assign]
    await meeting.leave()


async def test_an_answer_beyond_the_memory_budget_is_a_refusal() -> None:
    meeting = Meeting(long_answer, budget=MemoryBudget(MIB // 2))
    assert details(await meeting.say(request()))[:2] == (503, 21354)
    await meeting.leave()


# ---- the end ----


async def test_a_connection_without_a_request_is_shut_in_a_moment() -> None:
    """One may be on its way: it is answered, and told that it was the last."""
    meeting = Meeting(echo)
    await meeting.say(request())
    meeting.http.shut()
    assert not meeting.wire.is_closing()
    assert not meeting.http.retired
    sent = await meeting.say(request())
    assert b"connection: close" in bytes(sent).lower()
    assert meeting.wire.is_closing()
    await meeting.leave()


async def test_an_idle_client_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "_LAST_REQUEST_S", 0.01)
    meeting = Meeting(echo)
    meeting.http.last()
    meeting.http.shut()
    meeting.http.shut()
    await meeting.wire.closed.wait()
    assert meeting.http.retired
    await meeting.leave()


async def test_a_connection_is_shut_after_the_request_that_is_coming_in() -> None:
    meeting = Meeting(echo)
    await meeting.say(request()[:10])
    meeting.http.shut()
    assert not meeting.wire.is_closing()
    sent = await meeting.say(request()[10:])
    assert said(sent) == [["GET", "/", ""]]
    assert meeting.wire.is_closing()
    await meeting.leave()


async def test_a_connection_is_shut_after_the_request_in_progress() -> None:
    app = Gated()
    app.read.set()
    meeting = Meeting(app)
    await meeting.say(request())
    meeting.http.shut()
    assert meeting.http.busy
    assert not meeting.wire.is_closing()
    app.answer.set()
    sent = await meeting.say(request(), lambda: meeting.wire.is_closing() or meeting.wire.ended)
    assert answers(sent) == [(200, b"ok")]
    assert b"connection: close" in sent.lower()
    await meeting.leave()


async def test_a_client_that_leaves_while_its_body_is_read_ends_its_request() -> None:
    app = Gated()
    app.read.set()
    meeting = Meeting(app)
    await meeting.say(request("POST / HTTP/1.1", "Content-Length: 5", body=b"abc"))
    await meeting.leave()
    await settle(lambda: app.disconnected)


async def test_a_client_that_leaves_while_its_answer_is_made_ends_its_request() -> None:
    cancelled = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    meeting = Meeting(app)
    await meeting.say(request())
    await meeting.leave()
    await asyncio.wait_for(cancelled.wait(), SOON_S)


async def test_a_client_that_closes_its_side_is_gone() -> None:
    """The transport closes, and the request ends: nearly nobody closes one side only and waits."""
    meeting = Meeting(Gated())
    await meeting.say(request())
    assert not meeting.http.eof_received()
    await meeting.leave()


async def test_an_application_that_fails_half_way_breaks_its_answer_off(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("secret")

    meeting = Meeting(app)
    sent = await meeting.say(request(), lambda: meeting.wire.aborted)
    assert sent.endswith(b"4\r\nhalf\r\n")
    assert caplog.text.count("unforeseen error") == 1
    await meeting.leave()


# ---- any bytes, in any pieces ----

VALID = [
    request("GET /a HTTP/1.1"),
    request("POST /b HTTP/1.1", "Content-Length: 11", body=b"hello\r\n\r\nxx"),
    request("POST /c HTTP/1.1", CHUNKED, body=b"4\r\n\r\n\r\n\r\n2;a=b\r\nhi\r\n0\r\nX: y\r\n\r\n"),
    request("HEAD /d HTTP/1.1", "X: y"),
]
ANSWERS = {0: ["GET", "/a", ""], 1: ["POST", "/b", "hello\r\n\r\nxx"], 2: ["POST", "/c", "\r\n\r\nhi"]}
FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.lists(st.integers(0, 400), max_size=12))
def test_the_pieces_in_which_a_request_comes_change_nothing(which: list[int], cuts: list[int]) -> None:
    async def meet() -> None:
        data = b"".join(VALID[index] for index in which)
        meeting = Meeting(echo)
        places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
        for start, end in pairwise(places):
            await meeting.say(data[start:end])
        assert said(bytes(meeting.wire.sent)) == [ANSWERS[index] for index in which]
        await meeting.leave()

    asyncio.run(meet())


_TOKENS = st.sampled_from(
    [
        *(b"\r\n", b"\n", b"\r", b" ", b":", b"\0", b"HEAD", b"\r\n\r\n", b"0\r\n", b"3\r\nabc\r\n"),
        *(b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"Host: a\r\n", b"Content-Length: 3\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Upgrade: x\r\n"),
        *VALID,
    ]
)


@FUZZ
@given(st.lists(st.one_of(_TOKENS, st.binary(max_size=30)), max_size=20))
@example([VALID[3], b"\xff"])
def test_whatever_comes_is_answered_or_refused(pieces: list[bytes]) -> None:
    async def meet() -> None:
        meeting = Meeting(echo)
        for piece in pieces:
            await meeting.say(piece)
        sent = bytes(meeting.wire.sent)
        assert not sent or sent.startswith(b"HTTP/1.1 ")
        assert b" 500 " not in sent
        await meeting.leave()

    asyncio.run(meet())


# ---- real sockets ----


@asynccontextmanager
async def served(app: Any, limits: WireSettings = SETTINGS) -> AsyncIterator[int]:
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    budget = MemoryBudget(64 * MIB)
    server = await loop.create_server(
        lambda: Http1(app, Peer("127.0.0.1", "ipv4:127.0.0.1:1", False), limits, budget, gone.set), "127.0.0.1", 0
    )
    try:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait_for(gone.wait(), SOON_S)
        assert budget.used == 0
    finally:
        server.close()


async def test_a_refused_client_that_goes_on_sending_still_reads_why() -> None:
    """Closed with unread data behind, a socket is reset, and the answer lost."""
    async with served(echo) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("POST / HTTP/1.1", f"Content-Length: {3 * MIB}"))
        for _ in range(30):
            writer.write(bytes(100_000))
            await asyncio.sleep(0)
        sent = await asyncio.wait_for(reader.read(), SOON_S)
        assert details(sent)[:2] == (413, 30105)
        writer.close()


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """Answers without a look at the body."""
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("header", "closes"),
    [("Content-Length: 300000", True), ("Content-Length: 200000", False), ("Transfer-Encoding: chunked", True)],
)
async def test_an_answer_says_that_we_close_when_too_much_of_the_body_is_left(header: str, closes: bool) -> None:
    """Else the client's next request comes on a connection that ends without an answer to it."""
    meeting = Meeting(refuse)
    sent = await meeting.say(request("POST / HTTP/1.1", header))
    assert sent.startswith(b"HTTP/1.1 404")
    assert (b"connection: close" in sent.lower()) is closes
    if not closes:
        sent = await meeting.say(bytes(200_000) + request())
        assert sent.count(b"HTTP/1.1 404") == 2
    await meeting.leave()


async def test_large_bodies_pass_both_ways() -> None:
    async with served(echo) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("POST / HTTP/1.1", f"Content-Length: {MIB}", "Connection: close", body=b"x" * MIB))
        sent = await asyncio.wait_for(reader.read(), SOON_S)
        assert said(sent) == [["POST", "/", "x" * MIB]]
        writer.close()


async def test_a_client_that_never_reads_is_cut_and_holds_little() -> None:
    written = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal written
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": bytes(MIB), "more_body": True})
            written += 1

    with socket.socket() as client:
        async with served(app, WireSettings(request_timeout_s=0.2)) as port:
            client.connect(("127.0.0.1", port))
            client.sendall(request())
        assert written < 64  # the rest is what the system's own buffers take
