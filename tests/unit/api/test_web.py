"""What HTTP routes over an endpoint share: admission before the body, memory that always comes back, error pages."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from clarifai_grpc.grpc.api import service_pb2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from appliance.api import status, web
from appliance.core import errors
from appliance.core.memory import STRANGER, MemoryBudget, Reservation
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.wire.asgi import PEER
from appliance.wire.peer import Peer

METHOD = "/clarifai.api.V2/PostModelOutputs"
GOOD = service_pb2.MultiOutputResponse(status=status.success("r")).SerializeToString()
NO = service_pb2.MultiOutputResponse(status=status.of_error(errors.KeyInvalid("No."), "r")).SerializeToString()


class Site:
    """One route over one endpoint, and what both were told."""

    def __init__(self, answer: Callable[[Call, bytes], bytes] | Exception = lambda call, body: GOOD) -> None:
        self.budget = MemoryBudget(16_000)
        self.calls: list[Call] = []
        self.bodies: list[Any] = []
        self.asked: list[int] = []
        self.answer = answer
        self.in_transit = self.budget.expect(0, STRANGER)

    def _admit(self, call: Call, size: int) -> bytes | None:
        self.asked.append(size)
        if call.metadata.get("authorization") != "Key good":
            return NO
        call.memory = self.budget.expect(size, "ann")
        return None

    async def _unary(self, call: Call, body: bytes) -> bytes:
        self.calls.append(call)
        self.bodies.append(call.reader(body) if call.reader else body)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer(call, body)

    async def _route(self, request: Request) -> Response:
        endpoint = Endpoint(unary=self._unary, admit=self._admit)
        try:
            async with web.calling(request, METHOD) as call:
                call.reader = json.loads
                reply = await web.unary(request, call, endpoint, 4000)
        except Exception as error:
            return web.problem(web.status_of(error, request))
        found = web.status_in(reply)
        return JSONResponse({"code": found.code}, status.http_of(found), web.headers_of(found))

    async def post(self, content: Any = b"[]", key: str = "good", **headers: str) -> httpx.Response:
        """Ask it."""
        app = Starlette(routes=[Route("/door", self._route, methods=["POST"])])

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            peer = Peer("127.0.0.1", "ipv4:127.0.0.1:1", True, b"leaf", b"above")
            scope["extensions"] = {PEER: peer, "appliance.admitted": self.in_transit.follow}
            await app(scope, receive, send)

        transport = httpx.ASGITransport(serve, raise_app_exceptions=False)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="https://box") as client:
            sent = {"authorization": f"Key {key}", **{name.replace("_", "-"): text for name, text in headers.items()}}
            answer = await client.post("/door", content=content, headers=sent)
        self.in_transit.release()
        assert self.budget.used == 0
        return answer


async def test_a_call_knows_who_calls() -> None:
    site = Site()
    assert (await site.post(b"[1]", X_Thing="a")).status_code == 200
    (call,) = site.calls
    assert (call.method, call.peer, call.certificate, call.chain) == (METHOD, "ipv4:127.0.0.1:1", b"leaf", b"above")
    assert (call.metadata["authorization"], call.metadata["x-thing"]) == ("Key good", "a")
    assert call.deadline is None
    assert (site.asked, site.bodies) == ([3], [[1]])


async def test_who_is_refused_is_not_read() -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was asked for")
        yield b""

    site = Site()
    answer = await site.post(body(), key="bad")
    assert (answer.status_code, answer.json()) == (401, {"code": 11008})
    assert answer.headers["www-authenticate"].startswith("Key ")
    assert site.calls == []


async def test_a_body_in_pieces_is_paid_for_as_it_comes() -> None:
    """Announced or not: the memory is there before the bytes are kept."""
    held: list[int] = []
    site = Site()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            held.append(site.budget.used)
            yield b" " * 1000
        yield b"[]"

    assert (await site.post(body())).status_code == 200
    assert site.asked == [0]
    assert held == [0, 1000, 2000]


async def test_a_body_over_the_memory_is_refused_and_leaves_nothing() -> None:
    site = Site()
    site.budget.limit = 2000

    async def body() -> AsyncIterator[bytes]:
        yield b" " * 1200
        yield b" " * 1200

    answer = await site.post(body())
    assert answer.status_code == 503
    assert answer.json()["status"]["code"] == 21354
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_over_the_limit_is_413(announced: bool) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b" " * 6001

    answer = await Site().post(b" " * 6001 if announced else body())
    assert answer.status_code == 413
    assert "one and a half times limits.request_size, 4000 bytes" in answer.json()["status"]["details"]


@pytest.mark.parametrize(
    ("error", "http", "code"),
    [
        (errors.InvalidArgument("Why."), 400, 21202),
        (RpcAbort(RpcStatus.UNAVAILABLE, "Why."), 503, 10030),
        (RpcAbort(RpcStatus.DEADLINE_EXCEEDED, "Why."), 504, 98009),
        (ValueError("a secret"), 500, 98004),
    ],
)
async def test_an_error_is_a_page_with_its_status(error: Exception, http: int, code: int) -> None:
    answer = await Site(error).post()
    assert (answer.status_code, answer.json()["status"]["code"]) == (http, code)
    assert "secret" not in answer.text
    assert answer.json()["status"]["http_status_code"] == http


async def test_the_callers_time_is_a_deadline() -> None:
    site = Site()
    await site.post(grpc_timeout="5S")
    assert site.calls[0].deadline is not None
    answer = await site.post(grpc_timeout="five")
    assert answer.status_code == 400
    assert "grpc-timeout" in answer.json()["status"]["details"]


async def test_what_is_on_its_way_is_the_callers_once_it_is_known() -> None:
    shares: list[Any] = []
    site = Site(lambda call, body: shares.append(dict(site.budget._shares)) or GOOD)  # type: ignore[func-returns-value]
    site.in_transit.grow(500)
    await site.post(b"[]")
    assert shares == [{"ann": 502}]


def test_a_reservation_that_follows_itself_stays_as_it_is() -> None:
    budget = MemoryBudget(100)
    held: Reservation = budget.expect(10, "ann")
    held.follow(held)
    assert (budget.used, budget._shares) == (10, {"ann": 10})
