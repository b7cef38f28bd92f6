"""grpc.health.v1 and reflection: no credentials, the whole appliance and each model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.api.health import Health
from appliance.core.types import Call, RpcAbort, RpcStatus

SERVICE = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
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


# ---- reflection ------------------------------------------------------------------------------------------------------


async def reflect(*bodies: bytes) -> list[Any]:
    """The answers to these questions."""

    async def requests() -> AsyncIterator[bytes]:
        for body in bodies:
            yield body

    endpoint = Health().endpoints()[REFLECTION].stream
    assert endpoint is not None
    return [reflection_pb2.ServerReflectionResponse.FromString(body) async for body in endpoint(CALL, requests())]


async def test_reflection_lists_the_services() -> None:
    """For grpcurl; under the old name and the new one."""
    (reply,) = await reflect(reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString())
    names = {service.name for service in reply.list_services_response.service}
    assert {"clarifai.api.V2", "grpc.health.v1.Health"} <= names
    assert "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo" in Health().endpoints()


@pytest.mark.parametrize("symbol", ["clarifai.api.V2", "clarifai.api.MultiOutputResponse", "grpc.health.v1.Health"])
async def test_reflection_describes_the_services(symbol: str) -> None:
    """With the file they are in."""
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    (reply,) = await reflect(request.SerializeToString())
    assert reply.file_descriptor_response.file_descriptor_proto


async def test_each_question_is_answered_by_itself() -> None:
    """An unknown one in between ends nothing."""
    questions = ["clarifai.api.V2", "no.such.Thing", "grpc.health.v1.Health"]
    replies = await reflect(
        *(reflection_pb2.ServerReflectionRequest(file_containing_symbol=q).SerializeToString() for q in questions)
    )
    assert [reply.HasField("error_response") for reply in replies] == [False, True, False]


@given(st.binary(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_answered_or_refused(body: bytes) -> None:
    """Never anything else."""
    with contextlib.suppress(RpcAbort):
        asyncio.run(reflect(body))
