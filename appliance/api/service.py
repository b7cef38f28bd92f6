"""The API: every RPC we serve as an endpoint of bytes in, bytes out; the same steps around each.

authenticate → rate and concurrency → reserve memory → parse → handle, under a deadline → reply. An error becomes the
reply's status, or a gRPC status where a transport must act on it. Every accepted call ends exactly once.

The quick way takes the same steps without a task and its timer, for predictions that are over within a few turns of the
loop. It looks before it counts anything, and leaves whatever is unusual, errors included, to the ordinary way.
"""

import asyncio
import contextlib
import logging
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from clarifai_grpc.grpc.api import service_pb2
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message

from appliance.api import direct, messages, methods, status
from appliance.api.auth import Authentication, Grant
from appliance.api.catalogue import RPCS, Catalogue
from appliance.api.compute import Compute
from appliance.api.context import Context
from appliance.api.health import Health
from appliance.api.keys import DEFAULT_PRINCIPAL
from appliance.api.kserve import Kserve, kserve_endpoints
from appliance.api.parsing import parsed
from appliance.api.predict import Predictions
from appliance.api.quick import Begin, Begun
from appliance.api.reflection import reflection_endpoints
from appliance.api.replies import Reply
from appliance.api.tracing import Tracing
from appliance.api.trail import Trail, Use
from appliance.api.workflow_results import WorkflowResults
from appliance.api.workflows import WorkflowCatalogue
from appliance.catalog.view import View
from appliance.catalog.workflows import Workflows
from appliance.core.config import Config
from appliance.core.errors import AccessError, ApplianceError, DeadlineExceeded, Draining, NotRecorded, Overloaded
from appliance.core.ledger import OTHER
from appliance.core.logs import RateLimitedLog, without_keys
from appliance.core.memory import MemoryBudget, Reservation
from appliance.core.metrics import Metrics, Spread, Tally
from appliance.core.timing import HEADER, Timing
from appliance.core.types import Call, Done, Endpoint, QuickHandler, RpcAbort, RpcStatus
from appliance.core.usage import BYTES_IN, BYTES_OUT, CALLS, CALLS_FAILED, INPUTS, INPUTS_FAILED, SECONDS
from appliance.engine.batcher import Outcome
from appliance.tasks.servable import Servable

_log = logging.getLogger(__name__)

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["V2"]
_PREFIX_HEADER = "x-clarifai-request-id-prefix"
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LARGE_TEXT = 64 * 1024
"""Bytes from which a body with a reader of its own is read on a thread: JSON takes fifty times as long as messages."""

_QUICK_BODY = 64 * 1024
"""Bytes of a request up to which it may go the quick way: parsing and copying it takes some ten microseconds."""

Handler = Callable[[Context, Any], Awaitable[Message | Reply | Sequence[Message | Reply]]]
"""Answers a message; a stream's may answer it with several."""


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


@dataclass(frozen=True, slots=True)
class _Door:
    """A call of another protocol: its handler reads the body itself, and an error ends it as a `Refusal`.

    Attributes:
        name: for metrics and the log.
        told: makes the message of a stream that tells an error which does not end it; None: every error ends the call.
    """

    name: str
    told: Callable[[ApplianceError], bytes] | None = None


_Form: TypeAlias = _Rpc | _Door


class Api:
    """All endpoints. Handlers run on the event loop."""

    def __init__(
        self,
        config: Config,
        repository: View[Servable],
        authenticator: Authentication,
        budget: MemoryBudget,
        metrics: Metrics,
        workflows: Workflows | None = None,
    ) -> None:
        """Args: workflows: those that are served; None for none."""
        self.health = Health()
        self._authenticator = authenticator
        self._budget = budget
        self._metrics = metrics
        self._predictions = Predictions(config, repository, metrics)
        self._catalogue = Catalogue(config, repository)
        self._compute = Compute(config, repository)
        self._workflows = WorkflowCatalogue(repository, workflows or Workflows(config.catalog))
        self._results = WorkflowResults(config, repository, self._workflows, self._predictions, metrics)
        self.direct = direct.Direct(config, repository)
        self.kserve = Kserve(self.direct, self.health)
        self.tracing = Tracing(config.traces, metrics)
        self._errors = RateLimitedLog(_log)
        self.trail = Trail()
        self.unrecorded = False
        """Calls are refused, as they could not be recorded."""
        self._running: set[asyncio.Task[Any]] = set()
        self._quick_calls: set[_QuickCall] = set()
        self._streams: set[asyncio.Task[Any]] = set()  # open streams, also between two messages
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False  # new calls are refused
        self._refused_at = 0.0
        self._ended = False  # running calls are cut short
        self.configure(config)
        for reason in status.REASONS:  # an alert on growth needs to see it at nought before
            metrics.rejected.labels(reason)
        # As many as calls of one moment may be of.
        self._counts = lru_cache(maxsize=1024)(self._make_counts)
        self._principals = counted_principals(config)  # needs a restart, so that one name keeps its series
        metrics.in_flight.set(0)  # set with every call, not watched: after a front's death it is what was lost
        metrics.watch(metrics.memory_in_flight, lambda: budget.used)
        metrics.watch(metrics.memory_limit, lambda: budget.limit)

    def configure(self, config: Config) -> None:
        """Take over a new configuration; calls in flight finish under the old one."""
        self._config = config
        self._predictions.configure(config)
        self._catalogue.config = config
        self._compute.config = config
        self._results.config = config
        self.direct.config = config
        self._authenticator.configure(config)
        self.tracing.configure(config.traces)

    def catalog_changed(self) -> None:
        """Let go of what belongs to servables that are not served any more."""
        self._predictions.forget_gone()

    def endpoints(self) -> dict[str, Endpoint]:
        """Endpoint by full gRPC method name; every other method is unimplemented."""
        catalogue, compute, predictions = self._catalogue, self._compute, self._predictions
        workflows = self._workflows
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
            "PostWorkflowResults": self._results.post,
            "GetWorkflow": workflows.get_workflow,
            "ListWorkflows": workflows.list_workflows,
            "GetWorkflowVersion": workflows.get_workflow_version,
            "ListWorkflowVersions": workflows.list_workflow_versions,
            "GetComputeCluster": compute.get_compute_cluster,
            "ListComputeClusters": compute.list_compute_clusters,
            "GetNodepool": compute.get_nodepool,
            "ListNodepools": compute.list_nodepools,
            "GetDeployment": compute.get_deployment,
            "ListDeployments": compute.list_deployments,
            "GetRunner": compute.get_runner,
            "ListRunners": compute.list_runners,
            "GetApp": catalogue.get_app,
            "ListApps": catalogue.list_apps,
            "GetUser": catalogue.get_user,
            "MyScopes": catalogue.my_scopes,
            "ListStatusCodes": catalogue.list_status_codes,
            "GetStatusCode": catalogue.get_status_code,
        }
        found = {}
        for name, handler in unary.items():
            rpc = _Rpc.named(name)
            quick = self._quick(rpc, predictions.begin) if name == "PostModelOutputs" else None
            found[name] = Endpoint(unary=self._unary(rpc, handler), admit=self._admission(rpc), quick=quick)
        # Both answer message by message here: a generate request is a stream of one.
        streams: dict[str, Callable[[Callable[[str], Reservation]], Handler]] = {
            "GenerateModelOutputs": lambda keep: predictions.generate,
            "StreamModelOutputs": predictions.converse,
        }
        for name, begin in streams.items():
            rpc = _Rpc.named(name)
            found[name] = Endpoint(stream=self._stream(rpc, begin), admit=self._admission(rpc))
        assert set(found) == set(RPCS)
        served = {f"/{_SERVICE.full_name}/{name}": endpoint for name, endpoint in found.items()}
        served |= kserve_endpoints(self.kserve, self)
        return served | self.health.endpoints() | reflection_endpoints(self._authenticator)

    def door(self, name: str, handler: direct.Handler, begin: Begin | None = None) -> Endpoint:
        """A unary call of another protocol: the same steps around `handler` as around an RPC.

        Whoever calls the endpoint meets every error as a `status.Refusal`.

        Args: begin: takes the usual call the quick way.
        """
        form = _Door(name)
        quick = None if begin is None else self._quick(form, begin)
        return Endpoint(unary=self._unary(form, handler), admit=self._admission(form), quick=quick)

    def door_stream(self, name: str, handler: direct.Handler, told: Callable[[ApplianceError], bytes]) -> Endpoint:
        """The same, message by message; `told` makes a message of an error that need not end the stream."""
        form = _Door(name, told)
        return Endpoint(stream=self._stream(form, lambda _: handler), admit=self._admission(form))

    # ---- stopping ----

    @property
    def in_flight(self) -> int:
        """Calls being worked on."""
        return len(self._running) + len(self._quick_calls)

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
        self.health.end()
        for task in self._running | self._streams:
            task.cancel()
        for quick in tuple(self._quick_calls):
            quick.cancel()

    # ---- the steps around each handler ----

    def _admission(self, rpc: _Form) -> Callable[[Call, int], bytes | None]:
        """Who has no credentials, or wants more memory than is free, is refused before a byte of the body is read."""

        def admit(call: Call, size: int) -> bytes | None:
            begun = time.monotonic()
            grant: Grant | None = None
            try:
                if self.unrecorded:
                    raise NotRecorded
                grant = self._authenticator.grant(call)
                call.memory = self._budget.expect(size, grant.name)
            except (AccessError, Overloaded, NotRecorded) as error:
                req_id = _request_id(call)
                self._timing(call, begun)
                context: Context | None = None
                if grant is not None:
                    context = Context(grant.name, begun, self._budget.hold(0), call, grant, req_id, begun)
                code = 0
                try:
                    reply = self._refuse(rpc, call, req_id, error, context, b"")
                    code = reply.code
                finally:
                    self._timed(rpc, call, req_id, context, 0.0, code)
                self._record(rpc, call, context, self._counts_of(rpc, context), reply.code, req_id)
                return reply.body
            return None

        return admit

    def _unary(self, rpc: _Form, handler: Handler) -> Callable[[Call, bytes], Awaitable[bytes]]:
        async def endpoint(call: Call, body: bytes) -> bytes:
            with self._counted():
                (reply,) = [reply async for reply in self._answers(rpc, handler, call, body)]
            return reply

        return endpoint

    def _stream(
        self, rpc: _Form, begin: Callable[[Callable[[str], Reservation]], Handler]
    ) -> Callable[[Call, AsyncIterator[bytes]], AsyncIterator[bytes]]:
        async def endpoint(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            task = asyncio.current_task()
            assert task is not None
            self._streams.add(task)
            try:
                with contextlib.ExitStack() as kept:
                    handler = begin(lambda owner: kept.enter_context(self._budget.expect(0, owner)))
                    async for body in requests:
                        with self._counted():
                            async with contextlib.aclosing(self._answers(rpc, handler, call, body)) as replies:
                                async for reply in replies:
                                    yield reply
            except asyncio.CancelledError:
                if self._ended:
                    raise status.Refusal(Draining()) from None
                raise
            finally:
                self._streams.discard(task)

        return endpoint

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a call as in flight. Cancelled by `end`, it is told to try elsewhere; by its caller, it just ends."""
        if self._closed:
            self._refused_at = time.monotonic()
            raise status.Refusal(Draining())
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self._metrics.in_flight.set(self.in_flight)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if self._ended:
                raise status.Refusal(Draining()) from None
            raise
        except (RpcAbort, GeneratorExit):  # a stream whose caller left between two replies
            raise
        except BaseException:
            # `_answers` makes a status of everything; what comes through all the same is a call without an end.
            self._metrics.lost.inc()
            raise
        finally:
            self._running.discard(task)
            self._metrics.in_flight.set(self.in_flight)
            self._note_end()

    def _note_end(self) -> None:
        if not self._running and not self._quick_calls:
            self._idle.set()

    async def _answers(self, rpc: _Form, handler: Handler, call: Call, body: bytes) -> AsyncGenerator[bytes]:
        """One message in; one out, or as many as a stream's handler gives, whatever happens."""
        begun = time.monotonic()
        req_id = _request_id(call)
        context: Context | None = None
        code = status.SUCCESS.code
        encoded_at = 0.0
        sent = 0
        good = admitted = False
        timing = self._timing(call, begun)
        try:
            if self.unrecorded:
                raise NotRecorded
            grant = self._authenticator.grant(call)
            if timing is not None:
                timing.known()
            memory = call.memory or self._budget.hold(0)
            context = Context(grant.name, self._deadline(call, begun), memory, call, grant, req_id, begun)
            with grant.admitted(), memory:
                admitted = True
                memory.grow(max(0, len(body) - memory.count))
                replies = await self._handle(rpc, handler, context, body)
                encoded_at = time.monotonic()
                for reply in replies:
                    code = reply.code
                    sent += len(reply.body)
                    yield reply.body
            good = code == status.SUCCESS.code
        except RpcAbort:
            raise
        except Exception as error:
            reply = self._error_reply(rpc, call, req_id, error, context, body)
            code = reply.code
            sent += len(reply.body)
            yield reply.body
        except BaseException:  # the caller left, or the server goes
            code = 0
            raise
        finally:
            now = time.monotonic()
            counts = self._counts_of(rpc, context)
            if context is not None and admitted:
                self._use(rpc.name, context, good, len(body), sent, now - begun)
            counts.seconds.observe_for(now - begun, now, _noted(call, req_id))
            if context is not None and context.computed_at and encoded_at and counts.encode is not None:
                counts.encode.observe(encoded_at - context.computed_at)
            self._timed(rpc, call, req_id, context, encoded_at, code)
        self._record(rpc, call, context, counts, code, req_id)

    def _timing(self, call: Call, begun: float) -> Timing | None:
        """Begin to note where a call's time goes, if anybody wants to know that of this very call."""
        return self.tracing.timing(call, begun) if self.tracing.on or HEADER in call.metadata else None

    def _timed(
        self, rpc: _Form, call: Call, req_id: str, context: Context | None, encoded_at: float, code: int
    ) -> None:
        """A call has ended whose time is noted, if it is."""
        timing = call.timing
        if timing is not None:
            timing.end(time.monotonic(), context.computed_at if context is not None else 0.0, encoded_at, code)
            self.tracing.ended(timing, rpc.name, call, req_id, context)

    async def _handle(self, rpc: _Form, handler: Handler, context: Context, body: bytes) -> list[Reply]:
        seconds = context.deadline - time.monotonic()
        if seconds <= 0:
            raise DeadlineExceeded
        try:
            async with asyncio.timeout(seconds) as timer:
                request = body if isinstance(rpc, _Door) else await _parse(rpc, context, body)
                answered = await handler(context, request)
        except TimeoutError as error:
            if timer.expired():
                raise DeadlineExceeded(round(seconds, 3)) from error
            raise
        return [_serialised(each) for each in answered] if isinstance(answered, Sequence) else [_serialised(answered)]

    def _deadline(self, call: Call, begun: float) -> float:
        """The caller's deadline, or ours if that is sooner: the stock clients set none and would wait for ever."""
        ours = begun + self._config.limits.request_timeout_s
        return ours if call.deadline is None else min(ours, call.deadline)

    def _error_reply(
        self, rpc: _Form, call: Call, req_id: str, error: Exception, context: Context | None, body: bytes
    ) -> Reply:
        """What becomes of a call that raised. Raises: RpcAbort: where a transport must act."""
        if isinstance(error, ApplianceError):
            return self._refuse(rpc, call, req_id, error, context, body)
        # Last resort of every handler: the caller gets a stock sentence, the log the traceback.
        fields = _fields(rpc, call, req_id, status.INTERNAL.code, context)
        self._errors.write("unforeseen", logging.ERROR, "unforeseen error", exc_info=error, **fields)
        if isinstance(rpc, _Door):
            raise self._ended_in(rpc, call, error, req_id, context)
        return _error_response(rpc, error, req_id, call, body)

    def _refuse(
        self, rpc: _Form, call: Call, req_id: str, error: ApplianceError, context: Context | None, body: bytes
    ) -> Reply:
        """The reply to a call that ends in an error; logged, counted, or ended with a gRPC status of its own."""
        row = status.row_of(error)
        if row.reason:
            self._metrics.rejected.labels(row.reason).inc()
        self._errors.write(
            row.reason or status.name_of(row.code),
            logging.WARNING,
            str(error),
            **_fields(rpc, call, req_id, row.code, context),
            **({"detail": without_keys(error.detail)} if error.detail else {}),
        )
        if isinstance(error, AccessError):
            self.trail.refused(_recorded(context, row.code), rpc.name, call.peer, req_id, str(error))
        if row.rpc is not RpcStatus.OK:
            raise self._ended_in(rpc, call, error, req_id, context)
        if isinstance(rpc, _Door):
            if rpc.told is None or isinstance(error, AccessError):
                raise self._ended_in(rpc, call, error, req_id, context)
            return Reply(rpc.told(error), int(row.code))
        return _error_response(rpc, error, req_id, call, body)

    def _ended_in(
        self, rpc: _Form, call: Call, error: Exception, req_id: str, context: Context | None
    ) -> status.Refusal:
        """The status that ends a call; counted."""
        code = status.row_of(error).code
        if call.timing is not None:
            call.timing.code = int(code)
        self._count(rpc, call, context, self._counts_of(rpc, context), code, req_id)
        return status.Refusal(error, req_id)

    def _count(
        self, rpc: _Form, call: Call, context: Context | None, counts: "_Counts", code: int, req_id: str
    ) -> None:
        """Count a call that has ended; of those that failed, the last one's id is shown with the number."""
        if code == status.SUCCESS.code:
            counts.answered.inc()
        else:
            self._metrics.requests.labels(*counts.model, rpc.name, code).inc_for(_noted(call, req_id))
        self.trail.count(_recorded(context, code), rpc.name, call.peer, req_id)
        if self._principals and context is not None:
            name = self._principals.get(context.grant.meters[0].principal.name, OTHER)
            self._metrics.principal_requests.labels(name, code).inc()
            if context.inputs:
                self._metrics.principal_inputs.labels(name).inc(sum(context.inputs.values()))

    def _use(self, method: str, context: Context, good: bool, received: int, sent: int, seconds: float) -> None:
        """Count for usage what a call took, however it ended. Args: good: with success. received, sent: bytes."""
        cells = context.used(self._metrics.usage, method)
        cells[CALLS] += 1.0
        if not good:
            cells[CALLS_FAILED] += 1.0
        for code, count in context.inputs.items():
            cells[INPUTS] += count
            if code != status.SUCCESS.code:
                cells[INPUTS_FAILED] += count
        cells[BYTES_IN] += received
        cells[BYTES_OUT] += sent
        cells[SECONDS] += seconds

    def _counts_of(self, rpc: _Form, context: Context | None) -> "_Counts":
        return self._counts(context.model if context else _NO_MODEL, rpc.name)

    def _make_counts(self, model: tuple[str, str], method: str) -> "_Counts":
        metrics, success = self._metrics, status.SUCCESS.code
        return _Counts(
            model,
            metrics.requests.labels(*model, method, success),
            metrics.request_seconds.labels(*model, method),
            metrics.encode_seconds.labels(*model) if model != _NO_MODEL else None,
            metrics.inputs.labels(*model, success) if model != _NO_MODEL else None,
        )

    def _record(
        self, rpc: _Form, call: Call, context: Context | None, counts: "_Counts", code: int, req_id: str
    ) -> None:
        """Count and log a call that has a reply."""
        self._count(rpc, call, context, counts, code, req_id)
        if context is None:
            return
        model = context.model
        failed = {}
        for input_code, count in context.inputs.items():
            if input_code == status.SUCCESS.code and counts.inputs is not None:
                counts.inputs.inc(count)
                continue
            self._metrics.inputs.labels(*model, input_code).inc(count)
            if input_code != status.SUCCESS.code:
                failed[input_code] = count
                reason = status.INPUT_REASONS.get(input_code)
                if reason is not None:
                    self._metrics.rejected.labels(reason).inc(count)
        if failed:
            codes = ", ".join(f"{status.name_of(c)} × {n}" for c, n in failed.items())
            fields = _fields(rpc, call, req_id, code, context)
            self._errors.write("input", logging.WARNING, f"inputs failed: {codes}", **fields)
        elif code == status.SUCCESS.code:
            sampled = random.random() < self._config.log.sample  # noqa: S311  # not a secret
            if sampled or _log.isEnabledFor(logging.DEBUG):
                fields = _fields(rpc, call, req_id, code, context)
                self._errors.write("answered", logging.INFO if sampled else logging.DEBUG, "answered", **fields)

    # ---- the quick way ----

    def _quick(self, rpc: _Form, begin: Begin) -> QuickHandler:
        def quick(call: Call, body: bytes, done: Done) -> bool:
            size = len(body)
            if self._closed or self.unrecorded or size > _QUICK_BODY:
                return False
            started = time.monotonic()
            memory = call.memory or self._budget.hold(0)
            held = memory.count
            begun = None
            timing = self._timing(call, started)
            try:
                grant = self._authenticator.grant(call)
                grant.check()
                if timing is not None:
                    timing.known()
                if size > held:
                    memory.grow(size - held)
                deadline = self._deadline(call, started)
                context = Context(grant.name, deadline, memory, call, grant, _request_id(call), started)
                accepted = _QuickCall(self._finish, rpc, started, size, done)
                if context.deadline > started:
                    begun = begin(context, body, accepted)
            except Exception:
                # Whatever is wrong with the call: the ordinary way meets it again, and says so.
                begun = None
            if begun is None:
                memory.shrink_to(held)
                return False
            grant.take()
            accepted.begun = begun
            if not self._quick_calls:
                self._idle.clear()
            self._quick_calls.add(accepted)
            self._metrics.in_flight.set(self.in_flight)
            return True

        return quick

    def _finish(self, quick: "_QuickCall", outcome: Outcome | BaseException | None) -> None:
        """The model is done with a quick call: reply, whatever happens."""
        try:
            quick.reply(self._quick_reply(quick, outcome))
        except Exception as error:
            # As in `_counted`: what comes through all the same is a call without an end. Its neighbours go on.
            self._metrics.lost.inc()
            context = {"message": "a call's transport took no reply", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
        finally:
            self._quick_calls.discard(quick)
            self._metrics.in_flight.set(self.in_flight)
            if not self._quick_calls:
                self._note_end()

    def _quick_reply(self, quick: "_QuickCall", outcome: Outcome | BaseException | None) -> bytes | RpcAbort:
        """The reply to a quick call; `outcome` is None when it was cancelled by `end`."""
        rpc, begun = quick.rpc, quick.begun
        context = begun.context
        encoded = good = False
        sent = code = 0
        try:
            if outcome is None:
                return status.Refusal(Draining(), context.req_id)
            if not isinstance(outcome, Outcome):
                raise outcome
            reply = begun.reply(outcome)
            encoded, code, sent = True, reply.code, len(reply.body)
            good = code == status.SUCCESS.code
        except Exception as error:
            try:
                reply = self._error_reply(rpc, context.call, context.req_id, error, context, b"")
                code, sent = reply.code, len(reply.body)
            except RpcAbort as abort:
                return abort
        finally:
            begun.let_go()
            context.grant.leave()
            context.memory.release()
            now = time.monotonic()
            counts = self._counts(context.model, rpc.name)
            counts.seconds.observe_for(now - quick.started, now, _noted(context.call, context.req_id))
            if encoded and counts.encode is not None:
                counts.encode.observe(now - context.computed_at)
            self._use(rpc.name, context, good, quick.received, sent, now - quick.started)
            self._timed(rpc, context.call, context.req_id, context, now if encoded else 0.0, code)
        self._record(rpc, context.call, context, counts, reply.code, context.req_id)
        return reply.body


@dataclass(frozen=True, slots=True)
class _Counts:
    """What calls of one method on one version are counted in, found once: looking up costs more than counting.

    Attributes:
        encode, inputs: None where a call reached no model.
    """

    model: tuple[str, str]
    answered: Tally
    seconds: Spread
    encode: Spread | None
    inputs: Tally | None


class _QuickCall:
    """A call on the quick way: accepted, and its transport has no reply yet. Waits for its rows; see `Waiter`."""

    __slots__ = ("_finish", "_over", "_then", "begun", "received", "reply", "rpc", "started")

    begun: Begun
    """Set before anybody is told anything."""

    def __init__(
        self,
        finish: "Callable[[_QuickCall, Outcome | BaseException | None], None]",
        rpc: _Form,
        started: float,
        received: int,
        reply: Done,
    ) -> None:
        """Make it.

        Args:
            finish: called once, with the outcome, or None when the call is cancelled.
            received: bytes of its body.
            reply: the transport's.
        """
        self._finish = finish
        self._over = False
        self._then: Callable[[object], object] | None = None
        self.rpc = rpc
        self.started = started
        self.received = received
        self.reply = reply

    def done(self) -> bool:
        """Whether it has ended."""
        return self._over

    def set_result(self, outcome: Outcome | BaseException | None, /) -> None:
        """End it."""
        self._over = True
        self._finish(self, outcome)
        if self._then is not None:
            self._then(self)

    def set_exception(self, error: BaseException, /) -> None:
        """End it with an error."""
        self.set_result(error)

    def cancel(self) -> None:
        """End it because the server does, unless it has ended."""
        if not self._over:
            self.set_result(None)

    def add_done_callback(self, callback: Callable[[object], object], /) -> None:
        """Have `callback` called at the end; there is one at most."""
        self._then = callback


_NO_MODEL = ("", "")


def counted_principals(config: Config) -> dict[str, str]:
    """The principals that have counts of their own, by name; empty when none have."""
    names = dict.fromkeys([*(principal.name for principal in config.principal), DEFAULT_PRINCIPAL])
    return {name: name for name in list(names)[: config.metrics.principals]}


def _noted(call: Call, req_id: str) -> str:
    """What metrics note of a call."""
    return req_id if call.timing is None else call.timing.noted(req_id)


def _fields(rpc: _Form, call: Call, req_id: str, code: int, context: Context | None) -> dict[str, Any]:
    """What the log says of a call beside the sentence; what is not known is left out."""
    fields: dict[str, Any] = {"method": rpc.name, "code": status.name_of(code), "peer": call.peer, "req_id": req_id}
    if call.timing is not None:
        fields |= call.timing.logged()
    if context is not None:
        fields |= {
            "principal": context.grant.name,
            "credential": context.grant.credential,
            "model": context.asked,
            "version": context.model[1],
            "duration_us": round((time.monotonic() - context.begun) * 1e6),
        }
    return {key: value for key, value in fields.items() if value != ""}


def _recorded(context: Context | None, code: int) -> Use:
    """What the audit log says of a call."""
    if context is None:
        return Use("", "", "", "", code)
    return Use(context.grant.name, context.grant.credential, context.asked, context.model[1], int(code))


def _serialised(response: Message | Reply) -> Reply:
    if isinstance(response, Reply):
        return response
    return Reply(response.SerializeToString(), int(response.status.code))  # type: ignore[attr-defined]


def _error_response(rpc: _Rpc, error: Exception, req_id: str, call: Call, body: bytes) -> Reply:
    response = rpc.response(status=status.of_error(error, req_id))
    if isinstance(response, service_pb2.MultiOutputResponse) and _asks_for_signatures(call, body):
        # The SDK reads outputs[0] of a failed _GET_SIGNATURES and breaks without one (PROTOCOL 2.2).
        response.outputs.add(status=response.status)
    return _serialised(response)


def _request_id(call: Call) -> str:
    """What users quote: the client's own prefix, if it sent a plain one, and random hex."""
    prefix = call.metadata.get(_PREFIX_HEADER, "")
    random_part = messages.new_id()
    return f"{prefix}-{random_part}" if prefix and _PREFIX.fullmatch(prefix) else random_part


def _asks_for_signatures(call: Call, body: bytes) -> bool:
    """Whether that is a request for a model's signatures; looked at closely only when the word is in it."""
    if methods.GET_SIGNATURES.encode() not in body[:4096] or len(body) > _QUICK_BODY:
        return False
    try:
        inputs = (call.reader or service_pb2.PostModelOutputsRequest.FromString)(body).inputs
    except (DecodeError, ApplianceError):
        return False
    return bool(inputs) and methods.method_name(inputs[0].data) == methods.GET_SIGNATURES


async def _parse(rpc: _Rpc, context: Context, body: bytes) -> Message:
    """Raises: InvalidRequest: the bytes are not that message. What a call's own reader raises."""
    read = context.call.reader
    if read is None:
        # A stream keeps arguments for longer than the message that brought them.
        return await parsed(
            rpc.request, body, context.memory, context.contents if rpc.name == "PostModelOutputs" else None
        )
    message: Message = read(body) if len(body) < _LARGE_TEXT else await asyncio.to_thread(read, body)
    return message
