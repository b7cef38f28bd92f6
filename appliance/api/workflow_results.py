"""Workflows: each input goes through a graph of models, and every model's output for it comes back.

A node is run as soon as the nodes before it are done, with all inputs that reached it, by the code that answers
PostModelOutputs; nodes that need nothing of each other run at the same time. What fails at a node is the status of that
node's output; nodes behind it say which one failed, the others go on. What the caller should try later (a model that
loads, a full queue) ends the whole request, as its clients wait and ask again then.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_pb2

from appliance.api import messages, methods, status
from appliance.api.context import Context
from appliance.api.joining import joined
from appliance.api.limits import Asked, check_input_count, options_for
from appliance.api.parsing import parsed
from appliance.api.predict import Predictions
from appliance.api.replies import Reply
from appliance.api.workflows import WorkflowCatalogue, config_message, ids_of
from appliance.catalog.view import View
from appliance.catalog.workflow_format import Node, Workflow
from appliance.core.config import Config
from appliance.core.errors import (
    ApplianceError,
    InputError,
    InvalidArgument,
    InvalidInput,
    NodeNotRun,
    NotDeployed,
    NotReady,
    Overloaded,
    UnknownModel,
    WorkflowArgument,
)
from appliance.core.logs import RateLimitedLog
from appliance.core.metrics import Metrics
from appliance.core.types import RpcStatus
from appliance.core.usage import INPUTS, INPUTS_FAILED
from appliance.tasks.servable import Servable

_log = logging.getLogger(__name__)

_LARGE = 1 << 20
"""Bytes of a message from which it is serialised on a thread."""


@dataclass(slots=True)
class _Done:
    """A node that was run.

    Attributes:
        outputs: one for each input of the request.
        origins: for an input that failed, the node at which that began and what was said there.
        note: what is to be said of all outputs, though they are good.
    """

    outputs: list[resources_pb2.Output]
    origins: dict[int, tuple[str, str]]
    note: str = ""

    def failed(self, index: int) -> bool:
        """Whether there is no answer for that input."""
        return self.outputs[index].status.code != status.SUCCESS.code


class WorkflowResults:
    """PostWorkflowResults."""

    def __init__(
        self,
        config: Config,
        repository: View[Servable],
        catalogue: WorkflowCatalogue,
        predictions: Predictions,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self._repository = repository
        self._catalogue = catalogue
        self._predictions = predictions
        self._metrics = metrics
        self._errors = RateLimitedLog(_log)

    async def post(self, context: Context, request: service_pb2.PostWorkflowResultsRequest) -> Reply:
        """Send all inputs of a request through a workflow.

        Raises: ApplianceError: when the request as a whole cannot be answered.
        """
        check_input_count(len(request.inputs), self.config.limits)
        workflow = self._catalogue.version(context, request.user_app_id, request.workflow_id, request.version_id)
        context.asked = f"workflow:{workflow}"
        self._check(request, workflow)
        for given in request.inputs:
            given.id = given.id or messages.new_id()  # the same in all outputs of an input
        done = await self._run(context, request, workflow)
        response = service_pb2.PostWorkflowResultsResponse(workflow=self._catalogue.message(workflow))
        for index, given in enumerate(request.inputs):
            response.results.append(_result(context, workflow, given, index, done))
        response.status.CopyFrom(_conclusion(context, response.results, done))
        if response.status.code != status.SUCCESS.code:
            self._errors.write(
                "workflow",
                logging.WARNING,
                response.status.details,
                workflow=str(workflow),
                principal=context.grant.name,
                req_id=context.req_id,
            )
        return await _serialised(context, response)

    def _check(self, request: service_pb2.PostWorkflowResultsRequest, workflow: Workflow) -> None:
        """Raises: WorkflowArgument, InvalidArgument: the request asks for what no node could give."""
        if request.workflow_state.id:
            raise WorkflowArgument(
                "workflow_state is not kept here, as every request runs all of its nodes; leave it out."
            )
        unknown = sorted(set(request.node_runner_selectors) - {node.id for node in workflow.nodes})
        if unknown:
            raise WorkflowArgument(
                f"node_runner_selectors names node {unknown[0]!r}; workflow {workflow} has "
                f"{', '.join(repr(node.id) for node in workflow.nodes)}."
            )
        config = request.output_config
        options_for(Asked(config.max_concepts, config.min_value), (), self.config.limits)

    async def _run(
        self, context: Context, request: service_pb2.PostWorkflowResultsRequest, workflow: Workflow
    ) -> dict[str, _Done]:
        """Every node's outputs, by its id. Raises: ApplianceError: for the request as a whole."""
        tasks: dict[str, asyncio.Task[_Done]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                for node in workflow.nodes:
                    before = {name: tasks[name] for name in node.inputs}
                    tasks[node.id] = group.create_task(self._node(context, request, node, before))
        except ExceptionGroup as failed:
            # One of them speaks for the request; what was not foreseen comes first.
            raise min(failed.exceptions, key=lambda error: isinstance(error, ApplianceError)) from None
        return {name: task.result() for name, task in tasks.items()}

    async def _node(
        self,
        context: Context,
        request: service_pb2.PostWorkflowResultsRequest,
        node: Node,
        before: Mapping[str, "asyncio.Task[_Done]"],
    ) -> _Done:
        """Run one node once those before it are done. Raises: ApplianceError: for the request as a whole."""
        inputs = {name: await task for name, task in before.items()}
        own = replace(context, key=node.model, model=(node.model.model_id, node.version), inputs={})
        count = len(request.inputs)
        done = _Done([resources_pb2.Output()] * count, {})
        sound: list[int] = []
        asked = service_pb2.PostModelOutputsRequest()
        try:
            servable = self._servable(node)
            self._ask(asked, request, node, servable)
            for index, given in enumerate(request.inputs):
                try:
                    self._add_input(context, asked, given, index, node, servable, inputs)
                except InputError as error:
                    if isinstance(error, NodeNotRun):
                        done.origins[index] = (error.failed, error.why)
                    done.outputs[index] = self._failure(context, node, given, error)
                else:
                    sound.append(index)
                if given.ByteSize() > _LARGE:
                    await asyncio.sleep(0)  # copying it took a millisecond; others have their turns
            if sound:
                reply = await self._predictions.post(own, asked)
                answered = await _parsed(context, reply)
                for index, output in zip(sound, answered.outputs, strict=True):
                    done.outputs[index] = self._named(_in_old_form(output), node)
                failed = any(output.status.code != status.SUCCESS.code for output in answered.outputs)
                done.note = "" if failed else answered.status.details
        except ApplianceError as error:
            if _ends_all(error):
                raise
            for index, given in enumerate(request.inputs):
                if not done.outputs[index].status.code:  # what never came to the model has a reason of its own
                    done.outputs[index] = self._failure(context, node, given, error)
        for index, output in enumerate(done.outputs):
            if done.failed(index):
                done.origins.setdefault(index, (node.id, output.status.details))
            self._metrics.inputs.labels(*own.model, output.status.code).inc()
        cells = own.used(self._metrics.usage, "PostWorkflowResults")  # the call itself is counted without a model
        cells[INPUTS] += count
        cells[INPUTS_FAILED] += sum(map(done.failed, range(count)))
        return done

    def _servable(self, node: Node) -> Servable:
        """What answers for a node at this moment. Raises: UnknownModel, NotReady, NotDeployed; InvalidArgument."""
        version = self._repository.answering(*ids_of(node), node.version)
        assert version.servable is not None, "a ready version has one"
        if node.model_type_id not in ("", version.config.model_type_id):
            raise UnknownModel(
                f"Model {node.model} is a {version.config.model_type_id}, and the workflow wants a "
                f"{node.model_type_id}; its operator must mend it."
            )
        known = {argument.name for argument in version.servable.task.method.arguments}
        unknown = sorted(set(node.params) - known)
        if unknown:
            raise InvalidArgument(
                f"The workflow's params {', '.join(map(repr, unknown[:20]))} are none that model {node.model} takes; "
                "its operator must mend it."
            )
        return version.servable

    def _ask(
        self,
        asked: service_pb2.PostModelOutputsRequest,
        request: service_pb2.PostWorkflowResultsRequest,
        node: Node,
        servable: Servable,
    ) -> None:
        """Write what a node asks of its model, without the inputs; what the request asks goes before it."""
        asked.user_app_id.user_id, asked.user_app_id.app_id, asked.model_id = ids_of(node)
        asked.version_id = node.version
        if node.id in request.node_runner_selectors:
            asked.runner_selector.CopyFrom(request.node_runner_selectors[node.id])
        config = config_message(node.output_config)
        wanted = request.output_config
        config.max_concepts = wanted.max_concepts or config.max_concepts
        config.min_value = wanted.min_value or config.min_value
        if wanted.select_concepts and servable.concepts:  # a node that has none is not asked for them
            del config.select_concepts[:]
            config.select_concepts.extend(wanted.select_concepts)
        if config.ByteSize() or node.params:
            info = asked.model.model_version.output_info
            info.output_config.CopyFrom(config)
            if node.params:
                info.params.update(dict(node.params))

    def _add_input(
        self,
        context: Context,
        asked: service_pb2.PostModelOutputsRequest,
        given: resources_pb2.Input,
        index: int,
        node: Node,
        servable: Servable,
        before: Mapping[str, _Done],
    ) -> None:
        """Add what a node takes for one input of the request: that input, or the outputs of the nodes before it.

        Raises: NodeNotRun: one of them failed. NodeMismatch: they are not what the model takes. InvalidInput: the input
            names a method. Overloaded: there is no memory for it.
        """
        for done in before.values():
            if done.failed(index):
                raise NodeNotRun(node.id, *done.origins[index])
        if methods.method_name(given.data):
            raise InvalidInput("A workflow has no methods to call; send the input without _method_name.")
        if not before:
            context.memory.grow(given.ByteSize())
            asked.inputs.add().CopyFrom(given)
            return
        data = joined(node, servable, {name: done.outputs[index].data for name, done in before.items()})
        context.memory.grow(data.ByteSize())
        asked.inputs.add(id=given.id, data=data)

    def _failure(
        self, context: Context, node: Node, given: resources_pb2.Input, error: ApplianceError
    ) -> resources_pb2.Output:
        """The output of a node for an input that failed there."""
        output = resources_pb2.Output()
        messages.fill_error(output, given, error, context.req_id)
        return self._named(output, node)

    def _named(self, output: resources_pb2.Output, node: Node) -> resources_pb2.Output:
        """The output, with its node's model where it says none: in a workflow that tells them apart."""
        if not output.HasField("model"):
            output.model.CopyFrom(self._catalogue.model(node))
        return output


# ---- what comes of it ------------------------------------------------------------------------------------------------


def _result(
    context: Context, workflow: Workflow, given: resources_pb2.Input, index: int, done: Mapping[str, _Done]
) -> resources_pb2.WorkflowResult:
    """What became of one input: the outputs of all nodes that are not suppressed, in the workflow's order."""
    failed = [node for node in workflow.nodes if done[node.id].failed(index)]
    result = resources_pb2.WorkflowResult(
        id=messages.new_id(),
        created_at=messages.now(),
        outputs=[done[node.id].outputs[index] for node in workflow.nodes if not node.suppressed],
        suppress_output=all(node.suppressed for node in workflow.nodes),
    )
    echo = resources_pb2.Output()
    messages.fill_input(echo, given)
    result.input.CopyFrom(echo.input)
    row, details = status.SUCCESS, ""
    if failed:
        row = status.MIXED if len(failed) < len(workflow.nodes) else status.FAILURE
        why = done[failed[0].id].outputs[index].status
        details = (
            f"{len(failed)} of {len(workflow.nodes)} nodes failed; the first one, {failed[0].id!r}, with "
            f"{status.name_of(why.code)}: {why.details}"
        )
    result.status.CopyFrom(status.of_row(row, details, context.req_id))
    return result


def _conclusion(
    context: Context, results: Sequence[resources_pb2.WorkflowResult], done: Mapping[str, _Done]
) -> status_pb2.Status:
    """The top status: all good → SUCCESS, nothing good → FAILURE, else MIXED_STATUS."""
    bad = [result.status for result in results if result.status.code != status.SUCCESS.code]
    notes = [f"Node {name!r}: {node.note}" for name, node in done.items() if node.note]
    row = status.SUCCESS if not bad and not notes else status.MIXED
    if len(bad) == len(results) and all(found.code == status.FAILURE.code for found in bad):
        row = status.FAILURE
    details = " ".join(notes)
    if bad:
        details = f"{len(bad)} of {len(results)} inputs failed; the first one: {bad[0].details}"
    return status.of_row(row, details, context.req_id)


def _ends_all(error: ApplianceError) -> bool:
    """Whether an error at a node is the whole request's: try again later, or the call is over."""
    if isinstance(error, NotDeployed):
        return False
    return isinstance(error, NotReady | Overloaded) or status.row_of(error).rpc is not RpcStatus.OK


def _in_old_form(output: resources_pb2.Output) -> resources_pb2.Output:
    """The output with its data where the next node, and callers of workflows, look for them.

    Arguments that came as parts make a method's answer a part, too (PROTOCOL 4.3).
    """
    parts = output.data.parts
    if len(parts) == 1 and parts[0].id == "return":
        returned = resources_pb2.Data()
        returned.CopyFrom(parts[0].data)
        output.data.CopyFrom(returned)
    return output


async def _parsed(context: Context, reply: Reply | service_pb2.MultiOutputResponse) -> service_pb2.MultiOutputResponse:
    """A node's reply as a message, which takes as much memory again. Raises: Overloaded: that is not free."""
    if not isinstance(reply, Reply):
        return reply
    context.memory.grow(len(reply.body))
    return await parsed(service_pb2.MultiOutputResponse, reply.body, context.memory)


async def _serialised(context: Context, response: service_pb2.PostWorkflowResultsResponse) -> Reply:
    """The reply, which is held until it is sent. Raises: Overloaded: the memory for it is not free."""
    size = response.ByteSize()
    context.memory.grow(size)
    if size < _LARGE:
        return Reply(response.SerializeToString(), int(response.status.code))
    return Reply(await asyncio.to_thread(response.SerializeToString), int(response.status.code))
