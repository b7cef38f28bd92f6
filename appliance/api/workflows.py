"""Workflows as clients look at them: which there are, what their nodes are, which version."""

from collections.abc import Callable

from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import messages, status
from appliance.api.catalogue import page
from appliance.api.context import Context
from appliance.catalog.view import View
from appliance.catalog.workflow_format import Node, OutputConfig, Workflow
from appliance.catalog.workflows import Workflows
from appliance.core.errors import NotPermitted, NotReady, UnknownModel, UnknownWorkflow
from appliance.tasks.servable import Servable


class WorkflowCatalogue:
    """The reading RPCs; each sees the workflows all of whose models its caller may use."""

    def __init__(self, repository: View[Servable], workflows: Workflows) -> None:
        self._repository = repository
        self._workflows = workflows

    async def get_workflow(
        self, context: Context, request: service_pb2.GetWorkflowRequest
    ) -> service_pb2.SingleWorkflowResponse:
        """One workflow, as its file says it now."""
        workflow = self._find(context, request.user_app_id, request.workflow_id)
        return service_pb2.SingleWorkflowResponse(
            status=status.success(context.req_id), workflow=self.message(workflow)
        )

    async def list_workflows(
        self, context: Context, request: service_pb2.ListWorkflowsRequest
    ) -> service_pb2.MultiWorkflowResponse:
        """The workflows of a user and app (of all, when not named) that the caller may use; last changed first."""
        ids = request.user_app_id
        found = [
            workflow
            for workflow in self._workflows.all
            if ids.user_id in ("", workflow.user_id)
            and ids.app_id in ("", workflow.app_id)
            and _forbidden(context, workflow) is None
            and _listed(workflow, request)
        ]
        found.sort(key=_order(request), reverse=not request.sort_ascending)
        return service_pb2.MultiWorkflowResponse(
            status=status.success(context.req_id),
            workflows=[self.message(workflow) for workflow in page(found, request.page, request.per_page)],
        )

    async def get_workflow_version(
        self, context: Context, request: service_pb2.GetWorkflowVersionRequest
    ) -> service_pb2.SingleWorkflowVersionResponse:
        """The version of now; older ones are not kept."""
        workflow = self.version(context, request.user_app_id, request.workflow_id, request.workflow_version_id)
        return service_pb2.SingleWorkflowVersionResponse(
            status=status.success(context.req_id), workflow_version=self._version_message(workflow)
        )

    async def list_workflow_versions(
        self, context: Context, request: service_pb2.ListWorkflowVersionsRequest
    ) -> service_pb2.MultiWorkflowVersionResponse:
        """The version of now; older ones are not kept."""
        workflow = self._find(context, request.user_app_id, request.workflow_id)
        return service_pb2.MultiWorkflowVersionResponse(
            status=status.success(context.req_id),
            workflow_versions=page([self._version_message(workflow)], request.page, request.per_page),
        )

    def _find(self, context: Context, ids: resources_pb2.UserAppIDSet, workflow_id: str) -> Workflow:
        """Raises: UnknownWorkflow. NotPermitted: one of its models is not the caller's to use."""
        if not workflow_id:
            raise UnknownWorkflow("An app has no default workflow here; name one, ListWorkflows tells which there are.")
        workflow = self._workflows.find(ids.user_id, ids.app_id, workflow_id)
        forbidden = _forbidden(context, workflow)
        if forbidden is not None:
            raise NotPermitted(
                f"Principal {context.grant.name!r} may not use workflow {workflow}: it may not use model "
                f"{forbidden.model}, which is its node {forbidden.id!r}."
            )
        return workflow

    def version(self, context: Context, ids: resources_pb2.UserAppIDSet, workflow_id: str, version_id: str) -> Workflow:
        """The same, where a version may be named. Raises: UnknownWorkflow: it is not the one of now."""
        workflow = self._find(context, ids, workflow_id)
        if version_id not in ("", workflow.version):
            raise UnknownWorkflow(
                f"Workflow {workflow} has no version {version_id!r}; {workflow.version} is what its file says now."
            )
        return workflow

    # ---- messages ----

    def message(self, workflow: Workflow) -> resources_pb2.Workflow:
        """A workflow as it is now."""
        version = self._version_message(workflow)
        return resources_pb2.Workflow(
            id=workflow.id,
            user_id=workflow.user_id,
            app_id=workflow.app_id,
            created_at=version.created_at,
            modified_at=version.modified_at,
            visibility=messages.PRIVATE,
            description=workflow.description,
            nodes=version.nodes,
            version=version,
        )

    def _version_message(self, workflow: Workflow) -> resources_pb2.WorkflowVersion:
        changed_at = messages.timestamp(workflow.changed_at)
        return resources_pb2.WorkflowVersion(
            id=workflow.version,
            workflow_id=workflow.id,
            user_id=workflow.user_id,
            app_id=workflow.app_id,
            created_at=changed_at,
            modified_at=changed_at,
            visibility=messages.PRIVATE,
            description=workflow.description,
            nodes=[self._node_message(node) for node in workflow.nodes],
        )

    def _node_message(self, node: Node) -> resources_pb2.WorkflowNode:
        message = resources_pb2.WorkflowNode(
            id=node.id,
            model=self.model(node),
            node_inputs=[resources_pb2.NodeInput(node_id=name) for name in node.inputs],
            suppress_output=node.suppressed,
        )
        config = config_message(node.output_config)
        if config.ByteSize():
            message.output_info_override.output_config.CopyFrom(config)
        if node.params:
            message.output_info_override.params.update(dict(node.params))
        return message

    def model(self, node: Node) -> resources_pb2.Model:
        """A node's model with the version that would answer now; what the file says of it where there is none."""
        try:
            bundle = self._repository.find(*ids_of(node))
            return messages.model_brief(self._repository.version(bundle, node.version))
        except (UnknownModel, NotReady):
            user_id, app_id, model_id = ids_of(node)
            model = resources_pb2.Model(id=model_id, user_id=user_id, app_id=app_id)
            model.model_version.id = node.version
            return model


def config_message(config: OutputConfig) -> resources_pb2.OutputConfig:
    """How a node's answer is cut, as a message."""
    return resources_pb2.OutputConfig(
        max_concepts=config.max_concepts or 0,
        min_value=config.min_value or 0.0,
        select_concepts=[resources_pb2.Concept(id=c.id, name=c.name) for c in config.select_concepts],
    )


def ids_of(node: Node) -> tuple[str, str, str]:
    """User, app and model id of a node's model."""
    return node.model.user_id, node.model.app_id, node.model.model_id


def _forbidden(context: Context, workflow: Workflow) -> Node | None:
    """The first node whose model the caller may not use."""
    return next((node for node in workflow.nodes if not context.grant.allows(node.model)), None)


def _listed(workflow: Workflow, request: service_pb2.ListWorkflowsRequest) -> bool:
    """Whether a workflow passes the filters of ListWorkflows. None is featured, starred or bookmarked here."""
    text = f"{workflow.id} {workflow.description}".lower()
    wanted = (request.search, request.query, request.search_term, request.id)
    visible = request.visibility.gettable
    return (
        not (request.featured_only or request.starred_only or request.bookmark)
        and visible in (0, messages.PRIVATE.gettable)
        and all(word.lower().strip("*") in text for word in wanted)
    )


def _order(request: service_pb2.ListWorkflowsRequest) -> Callable[[Workflow], tuple[float, str] | tuple[str]]:
    if request.sort_by_id:
        return lambda workflow: (str(workflow),)
    return lambda workflow: (workflow.changed_at, str(workflow))
