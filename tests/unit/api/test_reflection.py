"""Server reflection: what tools ask, for callers with credentials only."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.api.auth import Authenticator
from appliance.api.keys import KeyStore
from appliance.api.reflection import reflection_endpoints
from appliance.core.config import Auth, Config, Server
from appliance.core.types import Call, RpcAbort, RpcStatus

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
CALL = Call("/m", {}, "peer")
OPEN = Config(auth=Auth(require="none"), server=Server(listen="127.0.0.1:8443"))
AUTHENTICATOR = Authenticator(OPEN, KeyStore(Path("/nonexistent/keys.json")))


async def reflect(*bodies: bytes, call: Call = CALL) -> list[Any]:
    """The answers to these questions."""

    async def requests() -> AsyncIterator[bytes]:
        for body in bodies:
            yield body

    endpoint = reflection_endpoints(AUTHENTICATOR)[REFLECTION].stream
    assert endpoint is not None
    return [reflection_pb2.ServerReflectionResponse.FromString(body) async for body in endpoint(call, requests())]


async def test_reflection_lists_the_services() -> None:
    """For grpcurl; under the old name and the new one."""
    (reply,) = await reflect(reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString())
    names = {service.name for service in reply.list_services_response.service}
    assert {"clarifai.api.V2", "grpc.health.v1.Health"} <= names
    assert "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo" in reflection_endpoints(AUTHENTICATOR)


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
@settings(max_examples=150)
def test_any_bytes_are_answered_or_refused(body: bytes) -> None:
    """Never anything else."""
    with contextlib.suppress(RpcAbort):
        asyncio.run(reflect(body))


async def test_a_caller_without_credentials_is_refused() -> None:
    """Only health and the SDK's probe are for everybody."""
    endpoint = reflection_endpoints(Authenticator(Config(), KeyStore(Path("/nonexistent/keys.json"))))[REFLECTION]
    assert endpoint.stream is not None

    async def nothing() -> AsyncIterator[bytes]:
        yield b""

    with pytest.raises(RpcAbort) as abort:
        await anext(aiter(endpoint.stream(CALL, nothing())))
    assert abort.value.status is RpcStatus.UNAUTHENTICATED
