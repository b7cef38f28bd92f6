"""grpc.health.v1: no credentials, the whole appliance and each model."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from grpc_health.v1 import health_pb2

from appliance.api.health import Health
from appliance.core.types import Call, RpcAbort, RpcStatus

SERVICE = "/grpc.health.v1.Health/"
SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3
CALL = Call("/m", {}, "peer")


async def check(health: Health, service: str) -> int:
    """The status of one service."""
    endpoint = health.endpoints()[SERVICE + "Check"].unary
    assert endpoint is not None
    body = await endpoint(CALL, health_pb2.HealthCheckRequest(service=service).SerializeToString())
    return int(health_pb2.HealthCheckResponse.FromString(body).status)


async def once(body: bytes) -> AsyncIterator[bytes]:
    yield body


@pytest.mark.parametrize("service", ["", "clarifai.api.V2"])
async def test_the_whole_serves_when_it_is_ready(service: str) -> None:
    """Not before, and not while it drains."""
    health = Health()
    assert await check(health, service) == NOT_SERVING
    health.publish(True, {})
    assert await check(health, service) == SERVING
    assert health.ready
    health.publish(False, {"u/a/m": True})
    assert await check(health, service) == NOT_SERVING


async def test_each_model_has_a_status() -> None:
    """By user/app/model; none serves while the whole does not."""
    health = Health()
    health.publish(True, {"u/a/good": True, "u/a/bad": False})
    assert await check(health, "u/a/good") == SERVING
    assert await check(health, "u/a/bad") == NOT_SERVING
    health.publish(False, {"u/a/good": True})
    assert await check(health, "u/a/good") == NOT_SERVING


async def test_an_unknown_service_is_not_found() -> None:
    """As the health checking protocol demands of Check."""
    with pytest.raises(RpcAbort) as abort:
        await check(Health(), "u/a/nothing")
    assert abort.value.status is RpcStatus.NOT_FOUND


async def test_list_names_all() -> None:
    """With their statuses."""
    health = Health()
    health.publish(True, {"u/a/good": True, "u/a/bad": False})
    endpoint = health.endpoints()[SERVICE + "List"].unary
    assert endpoint is not None
    reply = health_pb2.HealthListResponse.FromString(await endpoint(CALL, b""))
    assert {name: status.status for name, status in reply.statuses.items()} == {
        "": SERVING,
        "clarifai.api.V2": SERVING,
        "u/a/good": SERVING,
        "u/a/bad": NOT_SERVING,
    }


async def test_watch_sends_each_change_once() -> None:
    """At once, then on change only; an unknown service is watched until it is there."""
    health = Health()
    endpoint = health.endpoints()[SERVICE + "Watch"].stream
    assert endpoint is not None
    stream = endpoint(CALL, once(health_pb2.HealthCheckRequest(service="u/a/m").SerializeToString()))
    seen: list[int] = []

    async def read() -> None:
        async for body in stream:
            seen.append(health_pb2.HealthCheckResponse.FromString(body).status)  # noqa: PERF401

    task = asyncio.create_task(read())
    for ready, models in (
        (False, {}),
        (True, {}),
        (True, {"u/a/m": False}),
        (True, {"u/a/m": False, "u/a/other": True}),
        (True, {"u/a/m": True}),
        (False, {"u/a/m": True}),
    ):
        health.publish(ready, models)
        for _ in range(5):
            await asyncio.sleep(0)
    assert seen == [UNKNOWN, NOT_SERVING, SERVING, NOT_SERVING]
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_many_may_watch() -> None:
    """One change wakes all of them."""
    health = Health()
    endpoint = health.endpoints()[SERVICE + "Watch"].stream
    assert endpoint is not None
    streams = [endpoint(CALL, once(b"")) for _ in range(10)]
    for stream in streams:
        await anext(stream)
    changes = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await asyncio.sleep(0)
    health.publish(True, {})
    for body in await asyncio.wait_for(asyncio.gather(*changes), 5):
        assert health_pb2.HealthCheckResponse.FromString(body).status == SERVING


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_a_request_that_cannot_be_read_ends_with_a_grpc_status(method: str) -> None:
    """Not with a traceback."""
    endpoint = Health().endpoints()[SERVICE + method]
    reply = endpoint.unary(CALL, b"\xff") if endpoint.unary else anext(endpoint.stream(CALL, once(b"\xff")))  # type: ignore[misc]
    with pytest.raises(RpcAbort):
        await reply
