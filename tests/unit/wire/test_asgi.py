"""One request between a connection and the application: what each side may count on."""

import asyncio
import json
from typing import Any

import pytest

from appliance.core.errors import Overloaded
from appliance.core.memory import Reservation
from appliance.wire import asgi, sentences
from appliance.wire.asgi import Exchange, scope
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

SOON_S = 20
PEER = Peer("10.0.0.7", "ipv4:10.0.0.7:51234", True)


class Kept:
    """An outlet that keeps what it is told."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[tuple[bytes, bool]] = []
        self.credits: list[int] = []
        self.was_cut = False
        self.room = asyncio.Event()
        self.room.set()
        self.full = False
        self.on_credit: Any = None

    def start(self, status: int, headers: Any) -> None:
        self.status, self.headers = status, dict(headers)

    def body(self, data: bytes, last: bool) -> None:
        if self.full:
            self.full = False
            raise Overloaded("limits.memory_in_flight is full.")
        self.pieces.append((data, last))

    async def drained(self) -> None:
        await self.room.wait()

    def admitted(self, memory: Reservation) -> None:
        """Nothing is held here."""

    def credit(self, count: int) -> None:
        self.credits.append(count)
        if self.on_credit is not None:
            self.on_credit(count)

    def cut(self) -> None:
        self.was_cut = True


def made(app: Any, method: str = "POST") -> tuple[Exchange, Kept]:
    outlet = Kept()
    head = scope(PEER, http_version="1.1", method=method, path=b"/", headers=[])
    return Exchange(app, head, outlet), outlet


async def run(exchange: Exchange) -> None:
    await asyncio.wait_for(exchange.begin(), SOON_S)


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


# ---- scope ----


def test_a_scope_says_all_that_asgi_asks_for() -> None:
    head = scope(
        PEER,
        http_version="2",
        method="GET",
        path=b"/a%2Fb%20%C3%BC%FF?x=%20&y",
        headers=[(b"host", b"box")],
        server=("10.0.0.1", 8443),
    )
    assert head["type"] == "http"
    assert head["asgi"] == {"version": "3.0", "spec_version": "2.4"}
    assert (head["http_version"], head["method"], head["scheme"]) == ("2", "GET", "https")
    assert head["path"] == "/a/b ü\ufffd"
    assert head["raw_path"] == b"/a%2Fb%20%C3%BC%FF"
    assert head["query_string"] == b"x=%20&y"
    assert head["root_path"] == ""
    assert head["headers"] == [(b"host", b"box")]
    assert head["client"] == ("10.0.0.7", 51234)
    assert head["server"] == ("10.0.0.1", 8443)
    assert head["extensions"][asgi.PEER] is PEER


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        (Peer("::1", "ipv6:[::1]:5", False), ("::1", 5)),
        (Peer("unix", "unix:", False), None),
    ],
)
def test_a_scope_knows_its_client_if_it_has_an_address(peer: Peer, client: object) -> None:
    head = scope(peer, http_version="1.1", method="GET", path=b"/", headers=[])
    assert head["client"] == client
    assert head["scheme"] == "http"


def test_a_body_may_be_longer_than_its_messages_by_what_their_text_form_adds() -> None:
    settings = WireSettings(max_message=900)
    assert asgi.body_limit(settings) >= (900 + 5) * 4 / 3
    assert "limits.request_size, 900" in sentences.body_too_large(settings.max_message)


def test_answers_of_the_wire_itself_are_for_pages_of_allowed_origins() -> None:
    asked = [(b"origin", b"https://lab.example.com")]
    some, every = (WireSettings(cors_origins=o) for o in (("https://lab.example.com",), ("*",)))
    assert dict(asgi.cors_headers(asked, some)) == {
        b"access-control-allow-origin": b"https://lab.example.com",
        b"vary": b"Origin",
    }
    assert asgi.cors_headers(asked, every) == [(b"access-control-allow-origin", b"*")]
    assert asgi.cors_headers([(b"origin", b"https://evil.example.com")], some) == []
    assert asgi.cors_headers([], every) == asgi.cors_headers([], some) == asgi.cors_headers(asked, WireSettings()) == []


# ---- the body ----


async def test_a_body_arrives_whole_and_in_order_and_is_credited_as_it_is_taken() -> None:
    got: list[tuple[bytes, bool]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while not got or got[-1][1]:
            message = await receive()
            assert message["type"] == "http.request"
            got.append((message["body"], message["more_body"]))
        await send(start())
        await send(body())

    exchange, outlet = made(app)
    exchange.feed(b"ab")
    exchange.feed(b"c")
    assert exchange.queued == 3
    task = exchange.begin()
    await asyncio.sleep(0)
    assert exchange.queued == 0
    exchange.feed(b"de")
    exchange.end()
    await asyncio.wait_for(task, SOON_S)
    assert got == [(b"abc", True), (b"de", False)]
    assert outlet.credits == [3, 0, 2]  # 0: it waits for more


async def test_a_connection_may_feed_and_end_while_it_is_credited() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        data = b""
        while (message := await receive())["more_body"]:
            data += message["body"]
        await send(start())
        await send(body(data + message["body"]))

    exchange, outlet = made(app)

    def more(count: int) -> None:
        if count == 0:
            exchange.feed(b"x")
        else:
            exchange.end()

    outlet.on_credit = more
    await run(exchange)
    assert outlet.pieces == [(b"x", True)]


async def test_after_the_answer_an_application_hears_that_the_request_is_over() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        await send(start())
        await send(body())
        assert await receive() == {"type": "http.disconnect"}
        scope["extensions"]["heard"] = True

    exchange, _ = made(app)
    exchange.end()
    await run(exchange)
    assert exchange._scope["extensions"]["heard"]


async def test_what_nobody_takes_any_more_is_dropped() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body())

    exchange, _ = made(app)
    exchange.feed(b"abc")
    await run(exchange)
    exchange.feed(b"def")
    assert exchange.queued == 0


# ---- the answer ----


async def test_the_head_waits_for_the_body() -> None:
    """Until then a failure can still be told properly (ASGI: response start)."""
    outlet: Kept

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(201, (b"X-Name", b"value")))
        assert outlet.status == 0
        await send(body(b"data"))

    exchange, outlet = made(app)
    await run(exchange)
    assert outlet.status == 201
    assert outlet.headers[b"x-name"] == b"value"
    assert b"date" in outlet.headers
    assert outlet.pieces == [(b"data", True)]


async def test_what_belongs_to_the_connection_is_not_the_applications_to_say() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(200, (b"Connection", b"x"), (b"transfer-encoding", b"gzip"), (b"upgrade", b"h2c")))
        await send(body())

    exchange, outlet = made(app)
    await run(exchange)
    assert set(outlet.headers) == {b"date"}


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_an_answer_without_a_body_has_none(method: str, status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(status, (b"content-length", b"4")))
        await send(body(b"data"))

    exchange, outlet = made(app, method)
    await run(exchange)
    assert outlet.status == status
    assert outlet.pieces == [(b"", True)]


async def test_an_application_waits_until_its_client_has_taken_enough() -> None:
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        for n in range(3):
            await send(body(b"x", n < 2))
            sent.append(n)

    exchange, outlet = made(app)
    outlet.room.clear()
    task = exchange.begin()
    await asyncio.sleep(0)
    assert sent == []
    assert len(outlet.pieces) == 1
    outlet.room.set()
    await asyncio.wait_for(task, SOON_S)
    assert sent == [0, 1, 2]


# ---- failures ----


async def fails_at_once(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("secret text")


async def fails_after_the_head(scope: Any, receive: Any, send: Any) -> None:
    await send(start())
    raise ValueError("secret text")


async def says_nothing(scope: Any, receive: Any, send: Any) -> None:
    pass


async def splits_headers(scope: Any, receive: Any, send: Any) -> None:
    await send(start(200, (b"x", b"a\r\nset-cookie: b")))
    await send(body())


async def names_no_header(scope: Any, receive: Any, send: Any) -> None:
    await send(start(200, (b"x y", b"a")))
    await send(body())


async def is_too_long(scope: Any, receive: Any, send: Any) -> None:
    await send(start(200, (b"content-length", b"1")))
    await send(body(b"secret text"))


async def is_too_short(scope: Any, receive: Any, send: Any) -> None:
    await send(start(200, (b"content-length", b"100")))
    await send(body(b"secret text"))


async def has_no_head(scope: Any, receive: Any, send: Any) -> None:
    await send(body(b"secret text"))


@pytest.mark.parametrize(
    "app",
    [
        fails_at_once,
        fails_after_the_head,
        says_nothing,
        splits_headers,
        names_no_header,
        is_too_long,
        is_too_short,
        has_no_head,
    ],
)
async def test_an_application_that_fails_is_a_stock_answer_and_one_traceback(
    app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    exchange, outlet = made(app)
    await run(exchange)
    assert outlet.status == 500
    ((answer, last),) = outlet.pieces
    assert last
    assert json.loads(answer)["status"]["code"] == 98004
    assert int(outlet.headers[b"content-length"]) == len(answer)
    assert b"secret" not in answer
    assert [record.message for record in caplog.records] == ["unforeseen error"]
    assert caplog.records[0].exc_info
    assert not outlet.was_cut


async def test_an_application_that_fails_half_way_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body(b"half", True))
        raise ValueError("secret text")

    exchange, outlet = made(app)
    await run(exchange)
    assert outlet.was_cut
    assert outlet.pieces == [(b"half", False)]
    assert len(caplog.records) == 1


async def test_an_application_that_fails_after_its_answer_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body(b"all"))
        raise ValueError("secret text")

    exchange, outlet = made(app)
    await run(exchange)
    assert not outlet.was_cut
    assert outlet.pieces == [(b"all", True)]
    assert len(caplog.records) == 1


async def test_an_answer_that_cannot_be_kept_is_overload(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body(b"large"))

    exchange, outlet = made(app)
    outlet.full = True
    await run(exchange)
    assert outlet.status == 503
    assert json.loads(outlet.pieces[0][0])["status"] == {
        "code": 21354,
        "description": "Model is busy, please retry",
        "details": "limits.memory_in_flight is full.",
    }
    assert not caplog.records


async def test_a_server_that_stops_leaves_no_half_answer_for_a_whole_one() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    exchange, outlet = made(app)
    task = exchange.begin()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait_for(task, SOON_S)
    assert outlet.was_cut


# ---- a client that leaves ----


async def test_an_application_that_waits_for_its_client_hears_that_it_is_gone() -> None:
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append((await receive())["type"])

    exchange, outlet = made(app)
    task = exchange.begin()
    await asyncio.sleep(0)
    exchange.lost()
    exchange.lost()
    await asyncio.wait_for(task, SOON_S)
    assert heard == ["http.disconnect"]
    assert not outlet.was_cut
    assert not outlet.pieces


async def test_one_that_goes_on_all_the_same_is_cancelled_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_MOMENT_S", 0.01)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.Event().wait()

    exchange, _ = made(app)
    task = exchange.begin()
    await asyncio.sleep(0)
    exchange.lost()
    await asyncio.wait_for(task, SOON_S)


async def test_one_that_is_at_other_work_is_cancelled_at_once(caplog: pytest.LogCaptureFixture) -> None:
    cancelled = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    exchange, outlet = made(app)
    task = exchange.begin()
    await asyncio.sleep(0)
    exchange.lost()
    await asyncio.wait_for(task, SOON_S)
    assert cancelled
    assert not outlet.was_cut
    assert not caplog.records


async def test_one_that_still_answers_learns_so_and_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        with pytest.raises(OSError, match="gone"):
            await send(start())
        raise ValueError

    exchange, outlet = made(app)
    task = exchange.begin()
    await asyncio.sleep(0)
    exchange.lost()
    await asyncio.wait_for(task, SOON_S)
    assert not outlet.pieces
    assert not caplog.records


async def test_work_after_a_complete_answer_is_not_cancelled_when_the_client_leaves() -> None:
    go = asyncio.Event()
    done = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body())
        await go.wait()
        done.append(True)

    exchange, _ = made(app)
    task = exchange.begin()
    await asyncio.sleep(0)
    exchange.lost()
    go.set()
    await asyncio.wait_for(task, SOON_S)
    assert done
