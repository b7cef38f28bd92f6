"""The API: every RPC we serve as an endpoint of bytes in, bytes out; the same steps around each.

authenticate → rate and concurrency → reserve memory → parse → handle, under a deadline → reply. An error becomes the
reply's status, or a gRPC status where a transport must act on it. Every accepted call ends exactly once.
"""

import asyncio
import contextlib
import logging
import random
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from clarifai_grpc.grpc.api import service_pb2
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message

from appliance.api import methods, status
from appliance.api.auth import Authenticator
from appliance.api.catalogue import RPCS, Catalogue
from appliance.api.context import Context
from appliance.api.health import Health
from appliance.api.predict import Predictions
from appliance.api.reflection import reflection_endpoints
from appliance.catalog.repository import Repository
from appliance.core.config import Config
from appliance.core.errors import AccessError, ApplianceError, DeadlineExceeded, Draining, InvalidRequest
from appliance.core.logs import RateLimitedLog
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.tasks.servable import Servable

_log = logging.getLogger(__name__)

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["V2"]
_PREFIX_HEADER = "x-clarifai-request-id-prefix"
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LARGE_BODY = 1 << 20
"""Bytes from which a request is parsed on a thread: the parser releases nothing, but the loop gets its turns."""

Handler = Callable[[Context, Any], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class _Rpc:
    """One RPC: its name and its message classes, from the service's own descriptor."""

    name: str
    request: type[Message]
    response: type[Message]

    @classmethod
    def named(cls, name: str) -> "_Rpc":
        descriptor = _SERVICE.methods_by_name[name]
        return cls(
            name,
            message_factory.GetMessageClass(descriptor.input_type),
            message_factory.GetMessageClass(descriptor.output_type),
        )


class Api:
    """All endpoints. Handlers run on the event loop."""

    def __init__(
        self,
        config: Config,
        repository: Repository[Servable],
        authenticator: Authenticator,
        budget: MemoryBudget,
        metrics: Metrics,
    ) -> None:
        self.health = Health()
        self._authenticator = authenticator
        self._budget = budget
        self._metrics = metrics
        self._predictions = Predictions(config, repository)
        self._catalogue = Catalogue(config, repository)
        self._errors = RateLimitedLog(_log)
        self._running: set[asyncio.Task[Any]] = set()
        self._streams: set[asyncio.Task[Any]] = set()  # open streams, also between two messages
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False  # new calls are refused
        self._refused_at = 0.0
        self._ended = False  # running calls are cut short
        self.configure(config)
        metrics.watch(metrics.in_flight, lambda: len(self._running))
        metrics.watch(metrics.memory_in_flight, lambda: budget.used)
        metrics.watch(metrics.memory_limit, lambda: budget.limit)

    def configure(self, config: Config) -> None:
        """Take over a new configuration; calls in flight finish under the old one."""
        self._config = config
        self._predictions.config = config
        self._catalogue.config = config
        self._authenticator.configure(config)

    def endpoints(self) -> dict[str, Endpoint]:
        """Endpoint by full gRPC method name; every other method is unimplemented."""
        catalogue, predictions = self._catalogue, self._predictions
        unary: dict[str, Handler] = {
            "PostModelOutputs": predictions.post,
            "GetModel": catalogue.get_model,
            "ListModels": catalogue.list_models,
            "GetModelVersion": catalogue.get_model_version,
            "ListModelVersions": catalogue.list_model_versions,
            "GetModelOutputInfo": catalogue.get_model_output_info,
            "ListModelConcepts": catalogue.list_model_concepts,
            "ListConcepts": catalogue.list_concepts,
            "GetModelType": catalogue.get_model_type,
            "ListModelTypes": catalogue.list_model_types,
            "GetUser": catalogue.get_user,
            "MyScopes": catalogue.my_scopes,
            "ListStatusCodes": catalogue.list_status_codes,
            "GetStatusCode": catalogue.get_status_code,
        }
        found = {}
        for name, handler in unary.items():
            rpc = _Rpc.named(name)
            found[name] = Endpoint(unary=self._unary(rpc, handler), admit=self._admission(rpc))
        for name in ("GenerateModelOutputs", "StreamModelOutputs"):
            # Both answer message by message here: a generate request is a stream of one.
            rpc = _Rpc.named(name)
            found[name] = Endpoint(stream=self._stream(rpc, predictions.post), admit=self._admission(rpc))
        assert set(found) == set(RPCS)
        served = {f"/{_SERVICE.full_name}/{name}": endpoint for name, endpoint in found.items()}
        return served | self.health.endpoints() | reflection_endpoints(self._authenticator)

    # ---- stopping ----

    @property
    def in_flight(self) -> int:
        """Calls being worked on."""
        return len(self._running)

    async def wait_idle(self) -> None:
        """Return when no call is being worked on."""
        await self._idle.wait()

    def refuse_new(self) -> None:
        """Answer new calls that they should be tried elsewhere; running ones go on."""
        self._closed = True
        self._refused_at = time.monotonic()

    def refused_ago(self) -> float:
        """Seconds since the last call was refused, or since refusing began."""
        return time.monotonic() - self._refused_at

    def end(self) -> None:
        """Answer running calls too that they should be tried elsewhere."""
        self._closed = self._ended = True
        for task in self._running | self._streams:
            task.cancel()

    # ---- the steps around each handler ----

    def _admission(self, rpc: _Rpc) -> Callable[[Call], bytes | None]:
        """Whoever has no credentials is refused before the appliance takes in a byte of a body."""

        def admit(call: Call) -> bytes | None:
            try:
                self._authenticator.grant(call)
            except AccessError as error:
                response = self._refuse(rpc, call, _request_id(call), error, None, b"")
                self._record(rpc, None, int(response.status.code), 0.0)  # type: ignore[attr-defined]
                return bytes(response.SerializeToString())
            return None

        return admit

    def _unary(self, rpc: _Rpc, handler: Handler) -> Callable[[Call, bytes], Awaitable[bytes]]:
        async def endpoint(call: Call, body: bytes) -> bytes:
            with self._counted():
                return await self._answer(rpc, handler, call, body)

        return endpoint

    def _stream(self, rpc: _Rpc, handler: Handler) -> Callable[[Call, AsyncIterator[bytes]], AsyncIterator[bytes]]:
        async def endpoint(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            task = asyncio.current_task()
            assert task is not None
            self._streams.add(task)
            try:
                async for body in requests:
                    with self._counted():
                        reply = await self._answer(rpc, handler, call, body)
                    yield reply
            except asyncio.CancelledError:
                if self._ended:
                    raise _abort(Draining()) from None
                raise
            finally:
                self._streams.discard(task)

        return endpoint

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a call as in flight. Cancelled by `end`, it is told to try elsewhere; by its caller, it just ends."""
        if self._closed:
            self._refused_at = time.monotonic()
            raise _abort(Draining())
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if self._ended:
                raise _abort(Draining()) from None
            raise
        except RpcAbort:
            raise
        except BaseException:
            # `_answer` makes a status of everything; what comes through all the same is a call without an end.
            self._metrics.lost.inc()
            raise
        finally:
            self._running.discard(task)
            if not self._running:
                self._idle.set()

    async def _answer(self, rpc: _Rpc, handler: Handler, call: Call, body: bytes) -> bytes:
        """One message in, one message out, whatever happens."""
        begun = time.monotonic()
        req_id = _request_id(call)
        context: Context | None = None
        try:
            grant = self._authenticator.grant(call)
            with grant.admitted(), self._budget.hold(len(body)) as memory:
                context = Context(call, grant, req_id, self._deadline(call), memory)
                response = await self._handle(rpc, handler, context, body)
                reply = response.SerializeToString()
        except ApplianceError as error:
            response = self._refuse(rpc, call, req_id, error, context, body)
            reply = response.SerializeToString()
        except RpcAbort:
            raise
        except Exception as error:
            # Last resort of every handler: the caller gets a stock sentence, the log the traceback.
            _log.exception("unforeseen error", extra={"method": rpc.name, "req_id": req_id})
            response = self._error_response(rpc, error, req_id, body)
            reply = response.SerializeToString()
        finally:
            self._metrics.request_seconds.labels(rpc.name).observe(time.monotonic() - begun)
        self._record(rpc, context, int(response.status.code), time.monotonic() - begun)  # type: ignore[attr-defined]
        return reply

    async def _handle(self, rpc: _Rpc, handler: Handler, context: Context, body: bytes) -> Message:
        seconds = context.deadline - time.monotonic()
        if seconds <= 0:
            raise DeadlineExceeded
        try:
            async with asyncio.timeout(seconds) as timer:
                request = await _parse(rpc, body)
                return await handler(context, request)
        except TimeoutError as error:
            if timer.expired():
                raise DeadlineExceeded(round(seconds, 3)) from error
            raise

    def _deadline(self, call: Call) -> float:
        """The caller's deadline, or ours if that is sooner: the stock clients set none and would wait for ever."""
        ours = time.monotonic() + self._config.limits.request_timeout_s
        return ours if call.deadline is None else min(ours, call.deadline)

    def _refuse(
        self, rpc: _Rpc, call: Call, req_id: str, error: ApplianceError, context: Context | None, body: bytes
    ) -> Message:
        """The reply to a call that ends in an error; logged, counted, or ended with a gRPC status of its own."""
        row = status.row_of(error)
        if row.reason:
            self._metrics.rejected.labels(row.reason).inc()
        self._errors.write(
            row.reason or status.name_of(row.code),
            logging.WARNING,
            str(error),
            method=rpc.name,
            code=status.name_of(row.code),
            principal=context.grant.name if context else "",
            peer=call.peer,
            req_id=req_id,
            **({"detail": error.detail} if error.detail else {}),
        )
        if row.rpc is not RpcStatus.OK:
            model = context.model if context else ("", "")
            self._metrics.requests.labels(*model, rpc.name, str(row.code)).inc()
            raise _abort(error)
        return self._error_response(rpc, error, req_id, body)

    @staticmethod
    def _error_response(rpc: _Rpc, error: Exception, req_id: str, body: bytes) -> Message:
        response = rpc.response(status=status.of_error(error, req_id))
        if isinstance(response, service_pb2.MultiOutputResponse) and _asks_for_signatures(body):
            # The SDK reads outputs[0] of a failed _GET_SIGNATURES and breaks without one (PROTOCOL 2.2).
            response.outputs.add(status=response.status)
        return response

    def _record(self, rpc: _Rpc, context: Context | None, code: int, seconds: float) -> None:
        model = context.model if context else ("", "")
        self._metrics.requests.labels(*model, rpc.name, str(code)).inc()
        if context is None:
            return
        for input_code, count in context.inputs.items():
            self._metrics.inputs.labels(*model, str(input_code)).inc(count)
        failed = {c: n for c, n in context.inputs.items() if c != status.SUCCESS.code}
        fields = {
            "method": rpc.name,
            "model": ":".join(model),
            "principal": context.grant.name,
            "ms": round(seconds * 1000, 2),
            "req_id": context.req_id,
        }
        if failed:
            codes = ", ".join(f"{status.name_of(c)} × {n}" for c, n in failed.items())
            self._errors.write("input", logging.WARNING, f"inputs failed: {codes}", **fields)
        elif code == status.SUCCESS.code and random.random() < self._config.log.sample:  # noqa: S311  # not a secret
            _log.info("answered", extra=fields)


def _abort(error: ApplianceError) -> RpcAbort:
    return RpcAbort(status.row_of(error).rpc, str(error))


def _request_id(call: Call) -> str:
    """What users quote: the client's own prefix, if it sent a plain one, and random hex."""
    prefix = call.metadata.get(_PREFIX_HEADER, "")
    random_part = uuid.uuid4().hex
    return f"{prefix}-{random_part}" if _PREFIX.fullmatch(prefix) else random_part


def _asks_for_signatures(body: bytes) -> bool:
    """Whether that is a request for a model's signatures; looked at closely only when the word is in it."""
    if methods.GET_SIGNATURES.encode() not in body[:4096]:
        return False
    try:
        inputs = service_pb2.PostModelOutputsRequest.FromString(body).inputs
    except DecodeError:
        return False
    return bool(inputs) and methods.method_name(inputs[0].data) == methods.GET_SIGNATURES


async def _parse(rpc: _Rpc, body: bytes) -> Message:
    """Raises: InvalidRequest: the bytes are not that message."""
    try:
        if len(body) < _LARGE_BODY:
            return rpc.request.FromString(body)
        return await asyncio.to_thread(rpc.request.FromString, body)
    except DecodeError as error:
        raise InvalidRequest(f"The request is not a {rpc.request.DESCRIPTOR.name} message.") from error
