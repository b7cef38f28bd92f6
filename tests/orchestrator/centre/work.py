"""Where a predict request goes, and how it gets there: items, the streams that runners wait on, and their answers.

A request becomes an item. A runner's worker stream takes one item, brings its outputs, and is half-closed by the
runner. What a runner leaves behind goes to another stream, as long as nobody saw an output of it; the caller hears
exactly one answer, whatever is delivered twice.
"""

import asyncio
import contextlib
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2, status_pb2
from orchestrator.centre.faults import Faults
from orchestrator.centre.resources import DEPLOYMENT, MODEL, NODEPOOL, RUNNER, VERSION, Refused, Resources
from orchestrator.centre.store import Found

Code = status_code_pb2.StatusCode
CONTROL = "control-"
"""What the runner id of a control stream begins with (PROTOCOL 5.3)."""

_TOLD_S = 0.2
"""Seconds in which gRPC tells that a stream whose last message seemed to be read was cancelled: the reader hears of the
end first."""

_BREAKS_S = 0.05
"""Seconds in which all streams of a connection that breaks end: what one of them had is not given to the next."""

ATTEMPTS = 4
"""How often an item is handed out before its caller is told that it failed."""


@dataclass(frozen=True)
class Target:
    """Who may run an item: one version of a model, at some places.

    Attributes:
        nodepools: (compute cluster, nodepool) ids; empty: any of the owner's.
        runner: a runner's id; "": any.
    """

    owner: str
    app: str
    model: str
    version: str
    nodepools: frozenset[tuple[str, str]] = frozenset()
    runner: str = ""

    def fits(self, runner: Found) -> bool:
        """True when this runner may run it."""
        worker = runner.message.worker.model
        cluster, _, nodepool = runner.place.scope.partition("/")
        return (
            runner.place.owner == self.owner
            and (worker.app_id, worker.id, worker.model_version.id) == (self.app, self.model, self.version)
            and (not self.nodepools or (cluster, nodepool) in self.nodepools)
            and self.runner in ("", runner.id)
        )


class Router:
    """deployment → nodepool → the owner's deployment of the model → refusal (PROTOCOL 5.5)."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    def target(self, caller: str, request: Any) -> Target:
        """Who may run a predict request. Raises: Refused."""
        owner = request.user_app_id.user_id or caller
        app, model = request.user_app_id.app_id, request.model_id
        selector = request.runner_selector
        if selector.HasField("deployment"):
            return self._deployed(selector.deployment.user_id or caller, selector.deployment.id, owner, app, request)
        self._resources.one(MODEL, owner, app, model)
        if selector.HasField("nodepool"):
            cluster = selector.nodepool.compute_cluster
            of = cluster.user_id or caller
            self._resources.one(NODEPOOL, of, cluster.id, selector.nodepool.id)
            place = frozenset({(cluster.id, selector.nodepool.id)})
            return Target(of, app, model, self._version(owner, app, request), place)
        if selector.HasField("runner"):
            return Target(caller, app, model, self._version(owner, app, request), runner=selector.runner.id)
        wanted = request.version_id
        for found in reversed(list(self._resources.all(DEPLOYMENT, owner))):
            worker = found.message.worker.model
            if (worker.app_id, worker.id) == (app, model) and wanted in ("", worker.model_version.id):
                return self._deployed(owner, found.id, owner, app, request)
        raise Refused(
            Code.Value("MODEL_NOT_DEPLOYED"), f"The model '{model}' has no deployment, and no place was named."
        )

    def _deployed(self, deployer: str, id: str, owner: str, app: str, request: Any) -> Target:
        deployment = self._resources.one(DEPLOYMENT, deployer, "", id).message
        if deployment.status == resources_pb2.Deployment.Status.Value("DISABLED"):
            raise Refused(Code.Value("DEPLOYMENT_DISABLED"), f"The deployment '{id}' is disabled.")
        worker = deployment.worker.model
        if (worker.user_id, worker.app_id, worker.id) != (owner, app, request.model_id):
            raise Refused(DEPLOYMENT.invalid, f"The deployment '{id}' is not one of the model '{request.model_id}'.")
        version = worker.model_version.id
        if deployment.deploy_latest_version:
            version = self._resources.versions(owner, app, request.model_id)[0].id
        if request.version_id not in ("", version):
            raise Refused(DEPLOYMENT.invalid, f"The deployment '{id}' runs the version '{version}'.")
        places = frozenset((nodepool.compute_cluster.id, nodepool.id) for nodepool in deployment.nodepools)
        return Target(deployer, app, request.model_id, version, places)

    def _version(self, owner: str, app: str, request: Any) -> str:
        if request.version_id:
            return self._resources.one(VERSION, owner, f"{app}/{request.model_id}", request.version_id).id
        versions = self._resources.versions(owner, app, request.model_id)
        if not versions:
            raise Refused(VERSION.missing, f"The model '{request.model_id}' has no version.")
        return str(versions[0].id)


@dataclass(eq=False)
class Item:
    """One predict request on its way.

    Attributes:
        requests: what the caller sends after the first message; None ends it. Only streaming items have any.
        outcomes: replies for the caller; None ends them.
        carriers: the streams that have it.
        answering: whose outputs the caller gets.
        rests: it came back just now, and is not handed out yet.
    """

    target: Target
    method_type: int
    request: Any
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    requests: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    outcomes: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    carriers: list["WorkerStream"] = field(default_factory=list)
    answering: "WorkerStream | None" = None
    attempts: int = 0
    rests: bool = False
    over: bool = False

    def finish(self, reply: Any = None) -> None:
        """End it, with a last reply or none."""
        if not self.over:
            self.over = True
            if reply is not None:
                self.outcomes.put_nowait(reply)
            self.outcomes.put_nowait(None)


@dataclass(eq=False)
class WorkerStream:
    """A stream that a runner waits on, or works on."""

    runner: Found
    replica: str
    given: asyncio.Future[Item]


@dataclass(eq=False)
class ControlStream:
    """A stream over which a runner hears that items are cancelled."""

    runner_id: str
    replica: str
    messages: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)


class Work:
    """Items that wait, streams that wait, and those that have found each other."""

    def __init__(self, resources: Resources, faults: Faults, patience_s: float, queue_s: float) -> None:
        """Args:

        patience_s: how long an item waits where no stream is open at all, before its caller hears MODEL_DEPLOYING.
        queue_s: how long it waits for a stream to become free, before its caller hears MODEL_BUSY_PLEASE_RETRY.
        """
        self._resources = resources
        self._router = Router(resources)
        self._faults = faults
        self._patience_s, self._queue_s = patience_s, queue_s
        self.waiting: deque[Item] = deque()
        self.idle: list[WorkerStream] = []
        self.busy: list[WorkerStream] = []
        self.controls: list[ControlStream] = []
        self.counts: Counter[str] = Counter()

    # ---- the caller's side ----

    async def ask(self, caller: str, method_type: int, request: Any, more: AsyncIterator[Any] | None = None) -> Any:
        """The replies to a predict request, as they come. Raises: Refused: nobody may run it."""
        item = Item(self._router.target(caller, request), method_type, request)
        self.counts["asked"] += 1
        forwarding = asyncio.ensure_future(_forward(more, item.requests)) if more is not None else None
        patience = asyncio.ensure_future(self._give_up(item))
        self.waiting.append(item)
        self._match()
        try:
            while (reply := await item.outcomes.get()) is not None:
                yield reply
            self.counts["answered"] += 1
        finally:
            for task in (forwarding, patience):
                if task is not None:
                    task.cancel()
            self._abandon(item)

    async def _give_up(self, item: Item) -> None:
        """Answer for runners that do not come."""
        await asyncio.sleep(self._patience_s)
        while item in self.waiting and self._alive(item.target):
            await asyncio.sleep(max(self._queue_s - self._patience_s, 0.01))
            if item in self.waiting:
                self._refuse(item, "MODEL_BUSY_PLEASE_RETRY", "Every stream of the model's runners is busy.")
        if item in self.waiting:
            self._refuse(item, "MODEL_DEPLOYING", "Model is still deploying, please wait.")

    def _refuse(self, item: Item, code: str, sentence: str) -> None:
        self.waiting.remove(item)
        self.counts["refused"] += 1
        item.finish(_failure(code, sentence))

    def _alive(self, target: Target) -> bool:
        return any(target.fits(stream.runner) for stream in self.idle + self.busy)

    def _abandon(self, item: Item) -> None:
        """The caller listens no more: whoever works on it may stop."""
        if item in self.waiting:
            self.waiting.remove(item)
        if not item.over:
            self.counts["cancelled"] += 1
            item.over = True
            for stream in item.carriers:
                self._cancel(item, stream)

    def _cancel(self, item: Item, stream: WorkerStream) -> None:
        status = status_pb2.Status(code=status_code_pb2.RUNNER_ITEM_CANCELLED, description="Runner item cancelled")
        told = service_pb2.RunnerItem(id=item.id, processing_info=resources_pb2.ProcessingInfo(status=status))
        for control in self.controls:
            if (control.runner_id, control.replica) == (stream.runner.id, stream.replica):
                control.messages.put_nowait(service_pb2.MultiRunnerItemResponse(status=status, runner_items=[told]))

    # ---- the runner's side ----

    async def serve(self, caller: str, call: Any) -> None:
        """One ProcessRunnerItems call. `call` has `read()` (None at the end) and `write(message)`."""
        hello = await call.read()
        if hello is None:
            return
        if hello.status.code != status_code_pb2.RUNNER_STREAM_START:
            raise Refused(RUNNER.invalid, "The first message of a runner's stream has the status RUNNER_STREAM_START.")
        owner = self._resources.owner(caller, hello)
        scope = f"{hello.compute_cluster_id}/{hello.nodepool_id}"
        runner = self._resources.one(RUNNER, owner, scope, hello.runner_id.removeprefix(CONTROL))
        if hello.runner_id.startswith(CONTROL):
            await self._control(ControlStream(runner.id, hello.runner_replica_id), call)
        else:
            given: asyncio.Future[Item] = asyncio.get_running_loop().create_future()
            await self._carry(WorkerStream(runner, hello.runner_replica_id, given), call)

    async def _control(self, stream: ControlStream, call: Any) -> None:
        self.controls.append(stream)
        closed = asyncio.ensure_future(call.read())
        try:
            while True:
                message = asyncio.ensure_future(stream.messages.get())
                await asyncio.wait({message, closed}, return_when=asyncio.FIRST_COMPLETED)
                if closed.done():
                    message.cancel()
                    closed.result()
                    return
                await call.write(message.result())
        finally:
            closed.cancel()
            self.controls.remove(stream)

    async def _carry(self, stream: WorkerStream, call: Any) -> None:
        self.idle.append(stream)
        closed = asyncio.ensure_future(call.read())
        item: Item | None = None
        feeding: asyncio.Task[None] | None = None
        try:
            self._match()
            await asyncio.wait({stream.given, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not stream.given.done():
                closed.result()  # the runner said more than it should, or left: either way it gets nothing
                return
            item = stream.given.result()
            await call.write(_handed_out(item, item.request))
            if item.method_type == resources_pb2.STREAMING_STREAMING:
                feeding = asyncio.ensure_future(_feed(item, call))
            while (message := await closed) is not None:
                self._brought(item, stream, message)
                closed = asyncio.ensure_future(call.read())
            if item.method_type != resources_pb2.UNARY_UNARY:
                await asyncio.sleep(_TOLD_S)
            self._brought_all(item, stream)
        finally:
            closed.cancel()
            if feeding is not None:
                feeding.cancel()
            item = stream.given.result() if stream.given.done() else None
            if stream in self.idle:
                self.idle.remove(stream)
            if item is not None:
                self.busy.remove(stream)
                self._left(item, stream)

    def _match(self) -> None:
        """Hand out what somebody waits for."""
        for item in list(self.waiting):
            fitting = [stream for stream in self.idle if item.target.fits(stream.runner)]
            if item.rests or not fitting:
                continue
            self.waiting.remove(item)
            item.attempts += 1
            self._give(item, fitting[0])
            if len(fitting) > 1 and self._faults.take_duplicate():
                self.counts["duplicated"] += 1
                self._give(item, fitting[1])

    def _give(self, item: Item, stream: WorkerStream) -> None:
        self.idle.remove(stream)
        self.busy.append(stream)
        item.carriers.append(stream)
        stream.given.set_result(item)
        self.counts["handed out"] += 1

    def _brought(self, item: Item, stream: WorkerStream, message: Any) -> None:
        if message.runner_item_id != item.id:
            self.counts["outputs of no item"] += 1
            return
        code = message.status.code
        if code == status_code_pb2.RUNNER_NEEDS_RETRY:
            self._hand_back(item, stream)
        elif code not in (status_code_pb2.SUCCESS, status_code_pb2.RUNNER_STREAM_END) and item.answering is None:
            item.answering = stream
            item.finish(service_pb2.MultiOutputResponse(status=message.status))
        for output in message.runner_item_outputs:
            self._output(item, stream, output.multi_output_response)

    def _output(self, item: Item, stream: WorkerStream, reply: Any) -> None:
        if item.answering is None:
            item.answering = stream
        if item.answering is not stream or item.over:
            self.counts["outputs dropped"] += 1
            return
        if item.method_type == resources_pb2.UNARY_UNARY:
            item.finish(reply)
        else:
            item.outcomes.put_nowait(reply)

    def _brought_all(self, item: Item, stream: WorkerStream) -> None:
        """The runner half-closed the stream."""
        if item.answering is stream:
            item.finish()

    def _left(self, item: Item, stream: WorkerStream) -> None:
        """The stream is over, however."""
        if stream in item.carriers:
            self._hand_back(item, stream)

    def _hand_back(self, item: Item, stream: WorkerStream) -> None:
        """A carrier has the item no more: another one gets it, unless its caller saw outputs, or has enough."""
        item.carriers.remove(stream)
        if item.over or (item.answering is not stream and item.carriers):
            return
        if item.answering is None and item.attempts < ATTEMPTS:
            self.counts["handed out again"] += 1
            self.waiting.appendleft(item)
            item.rests = True
            asyncio.get_running_loop().call_later(_BREAKS_S, self._rested, item)
        else:
            self.counts["failed"] += 1
            item.finish(_failure("MODEL_PREDICTION_FAILED", "The runner left before the answer was complete."))

    def _rested(self, item: Item) -> None:
        item.rests = False
        self._match()

    def state(self) -> dict[str, Any]:
        """What there is, for tests."""
        by_runner = {
            name: Counter(stream.runner.id for stream in streams)
            for name, streams in (("idle", self.idle), ("busy", self.busy))
        }
        replicas = Counter(stream.replica for stream in self.idle + self.busy)
        controls = Counter(stream.runner_id for stream in self.controls)
        return by_runner | {
            "controls": controls,
            "replicas": replicas,
            "waiting": len(self.waiting),
            "counts": self.counts,
        }


async def _forward(more: AsyncIterator[Any], requests: asyncio.Queue[Any]) -> None:
    """What the caller goes on to send; the end is told as None, however it comes."""
    with contextlib.suppress(Exception):  # a caller that breaks off is noticed where its call is answered
        async for message in more:
            requests.put_nowait(message)
    requests.put_nowait(None)


async def _feed(item: Item, call: Any) -> None:
    """Send the runner the rest of a streaming item as it comes, and its end."""
    while (request := await item.requests.get()) is not None:
        await call.write(_handed_out(item, request))
    # The stock runner takes the message's own status for the end, and any item under another status for a request.
    ended = status_pb2.Status(code=status_code_pb2.RUNNER_STREAM_END, description="Success")
    info = resources_pb2.ProcessingInfo(runner_method_type=item.method_type, status=ended)
    last = service_pb2.RunnerItem(id=item.id, processing_info=info)
    await call.write(service_pb2.MultiRunnerItemResponse(status=ended, runner_items=[last]))


def _handed_out(item: Item, request: Any) -> Any:
    """The message that hands an item to a runner (PROTOCOL 5.3)."""
    return service_pb2.MultiRunnerItemResponse(
        status=status_pb2.Status(code=status_code_pb2.SUCCESS, description="Ok"),
        runner_items=[
            service_pb2.RunnerItem(
                id=item.id,
                processing_info=resources_pb2.ProcessingInfo(
                    runner_method_type=item.method_type,
                    status=status_pb2.Status(code=status_code_pb2.RUNNER_STREAM_START, description="Success"),
                ),
                post_model_outputs_request=request,
            )
        ],
    )


def _failure(code: str, sentence: str) -> Any:
    return service_pb2.MultiOutputResponse(status=status_pb2.Status(code=Code.Value(code), description=sentence))
