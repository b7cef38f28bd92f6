"""grpc.health.v1 as handlers like all others: any transport can serve them. No credentials are needed.

Service names: "" and `clarifai.api.V2` for the appliance as a whole, `user/app/model` for one model.
Source: grpc/grpc doc/health-checking.md; Watch ends never, and sends each change once.
"""

import asyncio
from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from appliance.core.types import Call, Done, Endpoint, RpcAbort, RpcStatus

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_OVERALL = ("", "clarifai.api.V2")


class Health:
    """What is healthy now; `publish` is called after every change."""

    def __init__(self) -> None:
        self._models: dict[str, bool] = {}
        self._ready = False
        self._changed = asyncio.Event()
        self._ended = False

    @property
    def ready(self) -> bool:
        """Whether the appliance as a whole serves."""
        return self._ready

    def publish(self, ready: bool, models: dict[str, bool]) -> None:
        """Take over the state: the whole appliance, and each model by `user/app/model`."""
        self._ready, self._models = ready, models
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def end(self) -> None:
        """Let those who watch go: they would hold the last connections open."""
        self._ended = True
        self._changed.set()

    def endpoints(self) -> dict[str, Endpoint]:
        """Health by full method name."""
        return {
            "/grpc.health.v1.Health/Check": Endpoint(unary=self._check, quick=self._quick_check),
            "/grpc.health.v1.Health/List": Endpoint(unary=self._list),
            "/grpc.health.v1.Health/Watch": Endpoint(stream=self._watch),
        }

    def _status(self, service: str) -> int:
        if service in _OVERALL:
            return _SERVING if self._ready else _NOT_SERVING
        if service not in self._models:
            return _UNKNOWN
        return _SERVING if self._ready and self._models[service] else _NOT_SERVING

    def _quick_check(self, call: Call, body: bytes, done: Done) -> bool:
        """`_check` without a task; an error is left to it."""
        try:
            found = self._status(health_pb2.HealthCheckRequest.FromString(body).service)
        except DecodeError:
            return False
        if found == _UNKNOWN:
            return False
        done(bytes(health_pb2.HealthCheckResponse(status=found).SerializeToString()))
        return True

    async def _check(self, call: Call, body: bytes) -> bytes:
        service = _request(body).service
        found = self._status(service)
        if found == _UNKNOWN:
            raise RpcAbort(RpcStatus.NOT_FOUND, f"There is no service or model {service!r}.")
        return bytes(health_pb2.HealthCheckResponse(status=found).SerializeToString())

    async def _list(self, call: Call, body: bytes) -> bytes:
        reply = health_pb2.HealthListResponse()
        for service in (*_OVERALL, *self._models):
            reply.statuses[service].status = self._status(service)
        return bytes(reply.SerializeToString())

    async def _watch(self, call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for body in requests:
            service = _request(body).service
            sent = None
            while True:
                changed = self._changed
                found = self._status(service)
                if found != sent:
                    yield bytes(health_pb2.HealthCheckResponse(status=found).SerializeToString())
                    sent = found
                await changed.wait()
                if self._ended:
                    raise RpcAbort(RpcStatus.UNAVAILABLE, "The appliance is stopping.")


def _request(body: bytes) -> health_pb2.HealthCheckRequest:
    try:
        return health_pb2.HealthCheckRequest.FromString(body)
    except DecodeError as error:
        raise RpcAbort(RpcStatus.INTERNAL, "The health request cannot be read.") from error
