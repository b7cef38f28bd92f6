"""Taking work from the orchestrator: the streams of one runner, an item a stream (PROTOCOL 5.3).

A stream says which runner it is, waits, is given one item, brings its outputs, and is half-closed; a fresh one takes
its place at once. One more stream, the control stream, tells which items their callers have left. An item that cannot
be answered now is given back; one that never can be is refused: none is dropped in silence.
"""

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2 as codes
from clarifai_grpc.grpc.api.status import status_pb2
from google.protobuf.message import DecodeError

from appliance.core.errors import Draining
from appliance.core.files import printable
from appliance.core.logs import RateLimitedLog
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.types import Call, Endpoint, ModelKey, RpcAbort
from appliance.orchestrator.backoff import Backoff
from appliance.orchestrator.central import Central

_log = logging.getLogger(__name__)

_UNARY, _GENERATE, _STREAM = (
    f"/clarifai.api.V2/{name}" for name in ("PostModelOutputs", "GenerateModelOutputs", "StreamModelOutputs")
)

_CLOSING_S = 30.0
"""Seconds in which the orchestrator must have closed the stream of an answer."""

_READING_S = 60.0
"""Seconds in which it must have read a message: until then the answer holds a part of the memory budget."""

_AT_ONCE_S = 1.0
"""Seconds within which a stream that is closed without a word has failed: such ones are not opened in a loop."""

_KEPT_S = 5.0
"""Seconds for which an item is tried again that cannot be answered now."""

_LOOK_S = 0.2
"""Seconds between two looks at whether there is room for more work; the least between two tries of an item."""

_LATER = frozenset(
    {
        codes.MODEL_BUSY_PLEASE_RETRY,
        codes.MODEL_DEPLOYING,
        codes.MODEL_DOES_NOT_EXIST,
        codes.MODEL_DEPLOYMENT_FAILED,
        codes.CONN_THROTTLED,
        codes.TRY_AGAIN,
    }
)
"""Codes of a reply after which the same item may succeed, here or at another appliance: one that has more to do than it
can, or whose version is coming or going."""

_FINE = (codes.ZERO, codes.SUCCESS, codes.RUNNER_STREAM_START)
"""Codes of a message without items that say nothing against the stream: none at all, or that it is open."""

OUTCOMES = ("answered", "given_back", "refused", "cancelled", "broken")
"""What becomes of items. `given_back`: not now. `refused`: never. `broken`: the stream broke before it was answered;
the orchestrator hands such an item out again."""


@dataclass(frozen=True)
class Place:
    """Where we are, as every message says.

    Attributes:
        replica: what tells the streams of this process from those of other appliances with the same runner.
    """

    user_id: str
    compute_cluster_id: str
    nodepool_id: str
    replica: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Runner:
    """A runner there, and the version that it is here.

    Attributes:
        app_id, version_id: what app and version are called there.
        local_version: the version's id here.
    """

    id: str
    app_id: str
    version_id: str
    key: ModelKey
    local_version: str


class StreamRefused(Exception):
    """The orchestrator answered a stream with a status.

    Attributes:
        code: of that status.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(": ".join(part for part in (status.description, status.details) if part))
        self.code = status.code


class StreamClosed(Exception):
    """The orchestrator closed a stream as soon as it was open, without a word."""


class _Left(Exception):
    """The item's caller has left, as the control stream told."""


class _Broken(Exception):
    """The stream ended before its item was answered."""


_ENDED = (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError)
"""What reading, writing and closing raise on a stream that has ended; the second is the half-close on one that breaks
just then, the third where the end was known before."""


class Work:
    """The streams of one runner. Used from one event loop."""

    def __init__(
        self,
        runner: Runner,
        place: Place,
        central: Central,
        endpoints: Mapping[str, Endpoint],
        budget: MemoryBudget,
        metrics: Metrics,
        backoff: Backoff,
        on_trouble: Callable[[str], None],
        most_bytes: int,
    ) -> None:
        """Args:

        central: a channel for these streams alone, which is closed with them.
        endpoints: those of the API, which answer; their callers are let in already.
        on_trouble: told what went wrong with a stream that failed; of those that fail together one.
        most_bytes: of a request.
        """
        self.runner = runner
        self._place, self._central, self._endpoints = place, central, endpoints
        self._budget, self._metrics = budget, metrics
        self._backoff, self._pressure = backoff, Backoff()
        self._on_trouble = on_trouble
        self._most_bytes = most_bytes
        self._errors = RateLimitedLog(_log)
        self._draining = False
        self._waiting: set[asyncio.Task[None]] = set()  # streams that have no item
        self._places: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._items: dict[str, set[asyncio.Task[None]]] = {}
        self._control: asyncio.Task[None] | None = None

    def start(self, streams: int) -> None:
        """Open the control stream and so many others, and keep them open."""
        self._control = asyncio.create_task(self._hear())
        for _ in range(streams):
            task = asyncio.create_task(self._keep_taking())
            self._places.add(task)
            task.add_done_callback(self._places.discard)

    @property
    def busy(self) -> int:
        """Streams that have an item."""
        return len(self._places) - len(self._waiting)

    @property
    def waiting(self) -> int:
        """Streams that wait for one."""
        return len(self._waiting)

    async def drain(self) -> None:
        """Take no more, answer what was taken, close. Ends within what an item may take."""
        self._draining = True
        for task in tuple(self._waiting):
            task.cancel()
        if self._places:
            await asyncio.wait(self._places)
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CLOSING_S)
        await self.close()

    async def close(self) -> None:
        """End at once; what is being worked on is broken off."""
        self._draining = True
        tasks = [*self._places, *self._closing, *([self._control] if self._control else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._central.close()

    # ---- a worker stream ----

    async def _keep_taking(self) -> None:
        """One stream after the other."""
        task = asyncio.current_task()
        assert task is not None
        while not self._draining:
            self._waiting.add(task)
            begun = self._backoff.begin()
            try:
                await self._may_take()
                begun = self._backoff.begin()
                await self._take(task)
            except (*_ENDED, StreamRefused, StreamClosed) as error:
                self._failed(begun, error)
            except Exception as error:
                # A stream that is not opened again would be missed by nobody, and work would stop one day.
                _log.exception("a stream of the orchestrator failed", extra=self._named())
                self._failed(begun, error)
            finally:
                self._waiting.discard(task)

    async def _may_take(self) -> None:
        """Return when the link is thought to be good, and those who call here leave room for more."""
        await self._backoff.wait()
        await self._pressure.wait()
        while self._budget.taken > self._budget.limit // 2:  # noqa: ASYNC110  # nobody tells when memory is free again
            await asyncio.sleep(_LOOK_S)

    async def _take(self, task: "asyncio.Task[None]") -> None:
        """Open a stream, take the item that comes on it, if any, and answer it.

        Raises: StreamRefused, StreamClosed, or one of _ENDED.
        """
        call = self._central.stream("ProcessRunnerItems", f"runner-{uuid.uuid4().hex}")
        try:
            await call.write(self._hello(self.runner.id, "Success"))
            opened = time.monotonic()
            message = await _first(call)
            if message is None and time.monotonic() - opened < _AT_ONCE_S:
                raise StreamClosed
            if message is None:
                return
            self._waiting.discard(task)
            for item in message.runner_items:
                await self._serve(item, call)
            await call.done_writing()
        except (_Left, _Broken):
            return
        except BaseException:
            call.cancel()
            raise
        # The next stream need not wait until this one has ended.
        closing = asyncio.create_task(self._ended(call))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _ended(self, call: Any) -> None:
        """See a stream to its end; without one it is broken off."""
        try:
            async with asyncio.timeout(_CLOSING_S):
                if await call.code() is not grpc.StatusCode.OK:
                    why = self._central.shown(f"{(await call.code()).name}: {await call.details()}")
                    _log.info("an answer may not have arrived: %s", why, extra=self._named())
        except TimeoutError:
            _log.info("the orchestrator does not close the stream of an answer", extra=self._named())
        finally:
            call.cancel()

    # ---- an item ----

    async def _serve(self, item: service_pb2.RunnerItem, call: Any) -> None:
        """Answer an item. Raises: _Left, _Broken: nobody waits for that any more; the call is cancelled."""
        work = asyncio.create_task(self._answer(item, call))
        over = asyncio.ensure_future(call.code())
        self._items.setdefault(item.id, set()).add(work)
        try:
            await asyncio.wait({work, over}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
            if work.cancelled():
                call.cancel()
                if over.done():
                    self._count("broken")
                    raise _Broken
                self._count("cancelled")
                raise _Left
            try:
                work.result()
            except _ENDED:
                self._count("broken")
                raise _Broken from None
        finally:
            work.cancel()
            over.cancel()
            mine = self._items[item.id]
            mine.discard(work)
            if not mine:
                del self._items[item.id]

    async def _answer(self, item: service_pb2.RunnerItem, call: Any) -> None:
        """Bring an item's outputs, or say why there are none. Raises: one of _ENDED."""
        begun = self._pressure.begin()
        try:
            code, sentence = await self._outputs(item, call)
        except RpcAbort as abort:
            draining = isinstance(getattr(abort, "error", None), Draining)
            code = codes.RUNNER_NEEDS_RETRY if draining else codes.RUNNER_PROCESSING_FAILED
            sentence = abort.message
        except DecodeError as error:
            code, sentence = codes.RUNNER_PROCESSING_FAILED, f"The item cannot be read: {error}."
        except _ENDED:
            raise
        except Exception:
            # Whoever waits for the item must hear of it.
            _log.exception("an item of the orchestrator failed", extra={"item": item.id, **self._named()})
            code, sentence = codes.RUNNER_PROCESSING_FAILED, "The appliance failed unexpectedly; its log tells more."
        if code == codes.RUNNER_NEEDS_RETRY:
            self._pressure.failed(begun)  # less is taken for a while
        if code != codes.SUCCESS:
            await self._refuse(item, call, code, sentence)
            return
        self._count("answered")

    async def _outputs(self, item: service_pb2.RunnerItem, call: Any) -> tuple[int, str]:
        """Bring an item's outputs. What cannot be answered now is kept for some seconds before it is given back: given
        back at once, it would come back at once on the next stream.

        Returns: SUCCESS, or the code of a refusal, and why. Raises: RpcAbort, DecodeError, or one of _ENDED.
        """
        until = time.monotonic() + _KEPT_S
        while True:
            code, sentence = await self._try(item, call)
            again = code == codes.RUNNER_NEEDS_RETRY and not self._draining
            if not again or item.processing_info.runner_method_type == resources_pb2.STREAMING_STREAMING:
                return code, sentence
            if time.monotonic() >= until:
                return code, sentence
            await asyncio.sleep(random.uniform(_LOOK_S, 2 * _LOOK_S))  # noqa: S311  # not a secret

    async def _try(self, item: service_pb2.RunnerItem, call: Any) -> tuple[int, str]:
        """See `_outputs`."""
        if not item.HasField("post_model_outputs_request"):
            return codes.RUNNER_PROCESSING_FAILED, "This appliance answers predictions only."
        size = item.post_model_outputs_request.ByteSize()
        if size > self._most_bytes:
            most = f"limits.request_size allows {self._most_bytes}"
            return codes.RUNNER_PROCESSING_FAILED, f"The request has {size} bytes; {most}."
        match item.processing_info.runner_method_type:
            case resources_pb2.UNARY_UNARY:
                replies = self._unary(item)
            case resources_pb2.UNARY_STREAMING:
                replies = self._stream(item, call, _GENERATE)
            case resources_pb2.STREAMING_STREAMING:
                replies = self._stream(item, call, _STREAM)
            case kind:
                return codes.RUNNER_PROCESSING_FAILED, f"This appliance has no methods of the kind {kind}."
        first = True
        async with contextlib.aclosing(replies):
            async for body in replies:
                reply = service_pb2.MultiOutputResponse.FromString(body)
                if first and reply.status.code in _LATER:
                    return codes.RUNNER_NEEDS_RETRY, reply.status.details
                first = False
                await self._bring(item, call, reply, len(body))
        return codes.SUCCESS, ""

    async def _unary(self, item: service_pb2.RunnerItem) -> AsyncGenerator[bytes]:
        endpoint = self._endpoints[_UNARY]
        assert endpoint.unary is not None, "a unary RPC"
        body = self._ours(item.post_model_outputs_request)
        with self._admitted(endpoint, _UNARY, item, len(body)) as (call, refused):
            yield await endpoint.unary(call, body) if refused is None else refused

    async def _stream(self, item: service_pb2.RunnerItem, call: Any, rpc: str) -> AsyncGenerator[bytes]:
        endpoint = self._endpoints[rpc]
        assert endpoint.stream is not None, "a streaming RPC"
        with self._admitted(endpoint, rpc, item, item.ByteSize()) as (ours, refused):
            if refused is not None:
                yield refused
                return
            requests = self._requests(item, call, more=rpc == _STREAM)
            replies = cast(AsyncGenerator[bytes], endpoint.stream(ours, requests))
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    yield reply

    async def _requests(self, item: service_pb2.RunnerItem, call: Any, *, more: bool) -> AsyncGenerator[bytes]:
        """The item's requests: the first, and those that follow it on the same stream until it says that it is all."""
        yield self._ours(item.post_model_outputs_request)
        while more and (message := await call.read()) is not grpc.aio.EOF:
            if message.status.code == codes.RUNNER_STREAM_END:
                return
            for following in message.runner_items:
                if following.HasField("post_model_outputs_request"):
                    yield self._ours(following.post_model_outputs_request)

    @contextlib.contextmanager
    def _admitted(
        self, endpoint: Endpoint, rpc: str, item: service_pb2.RunnerItem, size: int
    ) -> Iterator[tuple[Call, bytes | None]]:
        """The item as a call that has its bytes of the memory budget, and None; or the reply that refuses it."""
        assert endpoint.admit is not None, "every RPC has it"
        metadata = {"x-clarifai-request-id-prefix": item.id}
        call = Call(method=rpc, metadata=metadata, peer=f"orchestrator:{printable(item.metadata.user_id)[:64]}")
        try:
            yield call, endpoint.admit(call, size)
        finally:
            if call.memory is not None:
                call.memory.release()

    def _ours(self, request: service_pb2.PostModelOutputsRequest) -> bytes:
        """The request as it is asked here: what the ids there mean is known."""
        key = self.runner.key
        request.user_app_id.Clear()
        request.user_app_id.user_id, request.user_app_id.app_id = key.user_id, key.app_id
        request.model_id, request.version_id = key.model_id, self.runner.local_version
        request.ClearField("runner_selector")
        return bytes(request.SerializeToString())

    async def _bring(
        self, item: service_pb2.RunnerItem, call: Any, reply: service_pb2.MultiOutputResponse, size: int
    ) -> None:
        """Send outputs, with the ids that are known there; they count in the budget until the stream has taken them."""
        for output in reply.outputs:
            if output.HasField("model"):
                output.model.user_id, output.model.app_id = self._place.user_id, self.runner.app_id
                if output.model.HasField("model_version"):
                    output.model.model_version.id = self.runner.version_id
        message = self._message(self.runner.id, codes.SUCCESS, "Success", item.id)
        message.runner_item_outputs.add(multi_output_response=reply)
        self._budget.add(size)
        try:
            await _write(call, message)
        finally:
            self._budget.add(-size)

    async def _refuse(self, item: service_pb2.RunnerItem, call: Any, code: int, sentence: str) -> None:
        """Say that there are no outputs."""
        back = code == codes.RUNNER_NEEDS_RETRY
        self._count("given_back" if back else "refused")
        self._errors.write(
            "given_back" if back else "refused",
            logging.INFO if back else logging.WARNING,
            f"an item of the orchestrator is {'given back' if back else 'refused'}: {sentence}",
            item=item.id,
            **self._named(),
        )
        message = self._message(self.runner.id, code, codes.StatusCode.Name(code), item.id)
        message.status.details = sentence
        await _write(call, message)

    # ---- the control stream ----

    async def _hear(self) -> None:
        """Cancel the items whose callers have left, for as long as there are streams."""
        while not self._draining:
            await self._backoff.wait()
            begun = self._backoff.begin()
            call = self._central.stream("ProcessRunnerItems", f"runner-control-{uuid.uuid4().hex}")
            try:
                await call.write(self._hello(f"control-{self.runner.id}", "Control connection"))
                opened = time.monotonic()
                while (message := await call.read()) is not grpc.aio.EOF:
                    self._heard(message)
                if time.monotonic() - opened < _AT_ONCE_S:
                    raise StreamClosed
            except (*_ENDED, StreamRefused, StreamClosed) as error:
                self._failed(begun, error)
            except Exception as error:
                # As with the other streams: without this one no item would ever be cancelled again.
                _log.exception("a control stream of the orchestrator failed", extra=self._named())
                self._failed(begun, error)
            finally:
                call.cancel()

    def _heard(self, message: service_pb2.MultiRunnerItemResponse) -> None:
        cancelled = codes.RUNNER_ITEM_CANCELLED
        for item in message.runner_items:
            if cancelled in (message.status.code, item.processing_info.status.code):
                for work in self._items.get(item.id, ()):
                    work.cancel()
        if not message.runner_items and message.status.code not in (*_FINE, cancelled):
            raise StreamRefused(message.status)

    # ---- helpers ----

    def _hello(self, runner_id: str, description: str) -> service_pb2.PostRunnerItemOutputsRequest:
        """What a stream says first."""
        message = self._message(runner_id, codes.RUNNER_STREAM_START, description)
        message.runner_replica_id = self._place.replica
        return message

    def _message(
        self, runner_id: str, code: int, description: str, item_id: str = ""
    ) -> service_pb2.PostRunnerItemOutputsRequest:
        return service_pb2.PostRunnerItemOutputsRequest(
            user_app_id=resources_pb2.UserAppIDSet(user_id=self._place.user_id),
            compute_cluster_id=self._place.compute_cluster_id,
            nodepool_id=self._place.nodepool_id,
            runner_id=runner_id,
            runner_item_id=item_id,
            status=status_pb2.Status(code=code, description=description),
        )

    def _failed(self, begun: float, error: Exception) -> None:
        """A stream ended in an error; of those that fail together one is told."""
        if self._draining:
            return
        if self._backoff.failed(begun):
            self._on_trouble(self._central.shown(_problem_of(error)))

    def _count(self, outcome: str) -> None:
        self._metrics.orchestrator_items.labels(self.runner.key.model_id, self.runner.local_version, outcome).inc()

    def _named(self) -> dict[str, str]:
        return {"model": str(self.runner.key), "version": self.runner.local_version}


async def _write(call: Any, message: service_pb2.PostRunnerItemOutputsRequest) -> None:
    """Send a message. Raises: one of _ENDED: also when nobody reads it."""
    try:
        async with asyncio.timeout(_READING_S):
            await call.write(message)
    except TimeoutError:
        raise asyncio.InvalidStateError("nobody reads") from None


async def _first(call: Any) -> service_pb2.MultiRunnerItemResponse | None:
    """The first message with items; None when the stream is closed without one.

    Raises: AioRpcError. StreamRefused: the orchestrator refuses it.
    """
    while (message := await call.read()) is not grpc.aio.EOF:
        if message.runner_items:
            found: service_pb2.MultiRunnerItemResponse = message
            return found
        if message.status.code not in _FINE:
            raise StreamRefused(message.status)
    return None


def _problem_of(error: Exception) -> str:
    """What to say of a stream's error."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, StreamRefused):
        return f"it is refused with {error.code}: {error}"
    return type(error).__name__ if not isinstance(error, (StreamClosed, asyncio.InvalidStateError)) else "it was closed"
