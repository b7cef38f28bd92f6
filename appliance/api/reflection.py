"""gRPC server reflection, for tools such as grpcurl; for callers with credentials."""

import functools
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError

from appliance.api import inference_pb2
from appliance.api.auth import Authentication
from appliance.core.errors import AccessError, NotPermitted
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus

_SERVICES = (
    "clarifai.api.V2",
    inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
)


@functools.cache
def _servicer() -> Any:
    from grpc_reflection.v1alpha import reflection  # with grpc itself, which nothing else here needs: a slower start

    return reflection.ReflectionServicer(service_names=_SERVICES)


def reflection_endpoints(authenticator: Authentication) -> dict[str, Endpoint]:
    """Both versions of the service by full method name; their messages are the same."""

    async def reflect(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Answer each question by itself: the library's servicer keeps nothing between them."""
        try:
            authenticator.grant(call)
        except NotPermitted as error:
            raise RpcAbort(RpcStatus.PERMISSION_DENIED, str(error)) from error
        except AccessError as error:
            raise RpcAbort(RpcStatus.UNAUTHENTICATED, str(error)) from error
        from grpc_reflection.v1alpha import reflection_pb2

        async for body in requests:
            try:
                question = reflection_pb2.ServerReflectionRequest.FromString(body)
            except DecodeError as error:
                raise RpcAbort(RpcStatus.INTERNAL, "The reflection request cannot be read.") from error
            for answer in _servicer().ServerReflectionInfo(iter([question]), None):
                yield answer.SerializeToString()

    return {
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo": Endpoint(stream=reflect)
        for version in ("v1alpha", "v1")
    }
