"""What there is: models, versions, concepts, model types, apps, users, scopes and status codes."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2, status_pb2

from appliance.api import messages, status
from appliance.api.context import Context
from appliance.catalog.bundle import RAW_TYPE
from appliance.catalog.view import Bundle, Version, View
from appliance.core.config import Config
from appliance.core.errors import (
    InvalidRequest,
    NotDeployed,
    NotReady,
    UnknownApp,
    UnknownStatusCode,
    UnknownType,
    UnknownUser,
)
from appliance.tasks.servable import Servable

_log = logging.getLogger(__name__)

_PAGE = 20
_LARGEST_PAGE = 1000
"""Items a page unless asked, and at most; Clarifai's documented numbers."""

_TYPES = {
    "visual-classifier": ("Visual Classifier", "Which concepts a picture shows.", "image", "concepts"),
    "visual-embedder": ("Visual Embedder", "A picture as a vector.", "image", "embeddings"),
    "text-classifier": ("Text Classifier", "Which concepts a text is about.", "text", "concepts"),
    "text-embedder": ("Text Embedder", "A text as a vector.", "text", "embeddings"),
    RAW_TYPE: ("Tensor to Tensor", "A graph's own inputs and outputs.", "ndarray", "ndarray"),
}

_SCOPES = (
    "Predict",
    "Models:Get",
    "Concepts:Get",
    "Workflows:Get",
    "ComputeClusters:Get",
    "Nodepools:Get",
    "Deployments:Get",
    "Runners:Get",
    "Users:Get",
)

T = TypeVar("T")


def page(items: Sequence[T], number: int, size: int) -> Sequence[T]:
    """One page; past the end it is empty, and then the reply carries only `status`, which ends clients' loops.

    Raises: InvalidRequest: the page is larger than allowed.
    """
    if size > _LARGEST_PAGE:
        raise InvalidRequest(f"per_page is {size}; the limit is {_LARGEST_PAGE}.")
    size = size or _PAGE
    start = (max(number, 1) - 1) * size
    return items[start : start + size]


class Catalogue:
    """The reading RPCs; each sees only what its caller may use."""

    def __init__(self, config: Config, repository: View[Servable]) -> None:
        self.config = config
        self._repository = repository

    # ---- models ----

    async def get_model(
        self, context: Context, request: service_pb2.GetModelRequest
    ) -> service_pb2.SingleModelResponse:
        """A model with one version, the newest ready one unless named."""
        version = self._version(context, request.user_app_id, request.model_id, request.version_id)
        model = messages.model_full(version)
        model.version_count = len(self._repository.offered(self._bundle_of(version)))
        return service_pb2.SingleModelResponse(status=status.success(context.req_id), model=model)

    async def get_model_output_info(
        self, context: Context, request: service_pb2.GetModelRequest
    ) -> service_pb2.SingleModelResponse:
        """A model with its concepts, in the place of today and in the deprecated one."""
        version = self._version(context, request.user_app_id, request.model_id, request.version_id)
        model = messages.model_full(version)
        info = messages.output_info(_loaded(version), self.config.limits.concepts_default)
        model.model_version.output_info.CopyFrom(info)
        model.output_info.CopyFrom(info)
        return service_pb2.SingleModelResponse(status=status.success(context.req_id), model=model)

    async def list_models(
        self, context: Context, request: service_pb2.ListModelsRequest
    ) -> service_pb2.MultiModelResponse:
        """The models of a user and app (of all, when not named) that the caller may use."""
        ids = request.user_app_id
        versions = [version for version in self._newest(context, ids.user_id, ids.app_id) if _listed(version, request)]
        models = list(_rendered(messages.model_full, versions))
        return service_pb2.MultiModelResponse(
            status=status.success(context.req_id), models=page(models, request.page, request.per_page)
        )

    async def get_model_version(
        self, context: Context, request: service_pb2.GetModelVersionRequest
    ) -> service_pb2.SingleModelVersionResponse:
        """A version with its method signatures; the newest ready one unless named."""
        version = self._version(context, request.user_app_id, request.model_id, request.version_id)
        message = messages.version_full(version)
        if version.servable is not None:
            info = messages.output_info(version.servable, self.config.limits.concepts_default)
            message.output_info.CopyFrom(info)
        return service_pb2.SingleModelVersionResponse(status=status.success(context.req_id), model_version=message)

    async def list_model_versions(
        self, context: Context, request: service_pb2.ListModelVersionsRequest
    ) -> service_pb2.MultiModelVersionResponse:
        """All versions that are not held back, newest first."""
        bundle = self._bundle(context, request.user_app_id, request.model_id)
        found = page(self._repository.offered(bundle), request.page, request.per_page)
        return service_pb2.MultiModelVersionResponse(
            status=status.success(context.req_id), model_versions=[messages.version_full(v) for v in found]
        )

    # ---- concepts ----

    async def list_model_concepts(
        self, context: Context, request: service_pb2.ListModelConceptsRequest
    ) -> service_pb2.MultiConceptResponse:
        """One model's concepts in output order."""
        version = self._version(context, request.user_app_id, request.model_id, request.version_id)
        concepts = [
            concept
            for concept in messages.concept_messages(_loaded(version))
            if request.search.lower() in f"{concept.id} {concept.name}".lower()
        ]
        return service_pb2.MultiConceptResponse(
            status=status.success(context.req_id), concepts=page(concepts, request.page, request.per_page)
        )

    async def list_concepts(
        self, context: Context, request: service_pb2.ListConceptsRequest
    ) -> service_pb2.MultiConceptResponse:
        """The concepts of all models of an app, each id once."""
        ids = request.user_app_id
        concepts: dict[tuple[str, str, str], resources_pb2.Concept] = {}
        versions = [version for version in self._newest(context, ids.user_id, ids.app_id) if version.servable]
        for found in _rendered(lambda version: messages.concept_messages(_loaded(version)), versions):
            for concept in found:
                concepts.setdefault((concept.user_id, concept.app_id, concept.id), concept)
        wanted = [c for c in concepts.values() if request.id in ("", c.id)]
        return service_pb2.MultiConceptResponse(
            status=status.success(context.req_id), concepts=page(wanted, request.page, request.per_page)
        )

    # ---- model types ----

    async def get_model_type(
        self, context: Context, request: service_pb2.GetModelTypeRequest
    ) -> service_pb2.SingleModelTypeResponse:
        """One of the model types that this appliance serves."""
        if request.model_type_id not in _TYPES:
            raise UnknownType(f"There is no model type {request.model_type_id!r}; there are {', '.join(_TYPES)}.")
        return service_pb2.SingleModelTypeResponse(
            status=status.success(context.req_id), model_type=_type_message(request.model_type_id)
        )

    async def list_model_types(
        self, context: Context, request: service_pb2.ListModelTypesRequest
    ) -> service_pb2.MultiModelTypeResponse:
        """The model types that this appliance serves."""
        found = page(list(_TYPES), request.page, request.per_page)
        return service_pb2.MultiModelTypeResponse(
            status=status.success(context.req_id), model_types=[_type_message(name) for name in found]
        )

    # ---- apps ----

    async def get_app(self, context: Context, request: service_pb2.GetAppRequest) -> service_pb2.SingleAppResponse:
        """An app that holds models the caller may use, the only one unless named; the SDK asks for it by its id."""
        wanted = request.user_app_id
        apps = [
            app for app in self._apps(context) if wanted.app_id in ("", app.id) and wanted.user_id in ("", app.user_id)
        ]
        if len(apps) > 1:
            raise UnknownApp(f"There are {len(apps)} such apps; name the app and its user, ListApps tells which.")
        if not apps:
            raise UnknownApp(f"There is no app {wanted.app_id!r} of user {wanted.user_id!r}; ListApps names them.")
        return service_pb2.SingleAppResponse(status=status.success(context.req_id), app=apps[0])

    async def list_apps(self, context: Context, request: service_pb2.ListAppsRequest) -> service_pb2.MultiAppResponse:
        """The apps of a user (of all, when not named) that hold models the caller may use."""
        owner = request.user_app_id.user_id
        apps = [
            app
            for app in self._apps(context)
            if owner in ("", app.user_id) and all(part in app.id for part in (request.id, request.name))
        ]
        return service_pb2.MultiAppResponse(
            status=status.success(context.req_id), apps=page(apps, request.page, request.per_page)
        )

    # ---- who and what ----

    async def get_user(self, context: Context, request: service_pb2.GetUserRequest) -> service_pb2.SingleUserResponse:
        """The caller; other users are not known here."""
        user_id = context.grant.user_id(self.config.catalog.user_id)
        if request.user_app_id.user_id not in ("", "me", user_id):
            raise UnknownUser(f'This appliance knows only the caller: ask for "me" or {user_id!r}.')
        return service_pb2.SingleUserResponse(
            status=status.success(context.req_id), user=resources_pb2.User(id=user_id)
        )

    async def my_scopes(self, context: Context, request: service_pb2.MyScopesRequest) -> service_pb2.MultiScopeResponse:
        """What a key may do here: predict and read."""
        return service_pb2.MultiScopeResponse(
            status=status.success(context.req_id),
            scopes=_SCOPES,
            endpoints=[f"/clarifai.api.V2/{name}" for name in RPCS],
        )

    async def list_status_codes(
        self, context: Context, request: service_pb2.ListStatusCodesRequest
    ) -> service_pb2.MultiStatusCodeResponse:
        """All of Clarifai's status codes."""
        return service_pb2.MultiStatusCodeResponse(
            status=status.success(context.req_id),
            statuses=[_code_status(number) for number in status_code_pb2.StatusCode.values() if number],
        )

    async def get_status_code(
        self, context: Context, request: service_pb2.GetStatusCodeRequest
    ) -> service_pb2.SingleStatusCodeResponse:
        """One status code, by number or name; the reply's own status is that code, as in Clarifai's API."""
        wanted = request.status_code_id
        numbers = dict(status_code_pb2.StatusCode.items())
        number = numbers.get(wanted.upper()) or next((n for n in numbers.values() if n and str(n) == wanted), 0)
        if not number:
            raise UnknownStatusCode(f"There is no status code {wanted[:80]!r}; ListStatusCodes names them.")
        # It was found, whatever the code that it is means elsewhere.
        found = _code_status(number)
        found.http_status_code = status.SUCCESS.http
        return service_pb2.SingleStatusCodeResponse(status=found)

    # ---- helpers ----

    def _bundle(self, context: Context, ids: resources_pb2.UserAppIDSet, model_id: str) -> Bundle[Servable]:
        bundle = self._repository.find(ids.user_id, ids.app_id, model_id)
        assert bundle.key is not None
        context.asked = str(bundle.key)
        context.grant.check_model(bundle.key)
        return bundle

    def _bundle_of(self, version: Version[Servable]) -> Bundle[Servable]:
        key = version.config.key
        return self._repository.find(key.user_id, key.app_id, key.model_id)

    def _version(
        self, context: Context, ids: resources_pb2.UserAppIDSet, model_id: str, version_id: str
    ) -> Version[Servable]:
        version = self._repository.version(self._bundle(context, ids, model_id), version_id)
        context.reach(version.config.key, version.id)
        return version

    def _newest(self, context: Context, user_id: str, app_id: str) -> list[Version[Servable]]:
        """The newest version of every model that the caller may use."""
        found = []
        for bundle in self._repository.bundles:
            key = bundle.key
            if key is None or user_id not in ("", key.user_id) or app_id not in ("", key.app_id):
                continue
            if context.grant.allows(key) and self._repository.offered(bundle):
                found.append(self._repository.version(bundle, ""))
        return found

    def _apps(self, context: Context) -> list[resources_pb2.App]:
        keys = [version.config.key for version in self._newest(context, "", "")]
        places = sorted({(key.user_id, key.app_id) for key in keys})
        return [resources_pb2.App(id=app_id, name=app_id, user_id=user_id) for user_id, app_id in places]


def _rendered(render: Callable[[Version[Servable]], T], versions: Sequence[Version[Servable]]) -> Iterator[T]:
    """The versions as messages; one that cannot be a message is logged and left out, so that the others are listed."""
    for version in versions:
        try:
            yield render(version)
        except Exception as error:
            # Protobuf refuses what a bundle may have said, in more ways than one (text, numbers, sizes).
            fields = {"model": str(version.config.key), "version": version.id}
            _log.error("cannot be listed: %s: %s", type(error).__name__, error, extra=fields)


def _loaded(version: Version[Servable]) -> Servable:
    if version.servable is None and version.problem:
        raise NotDeployed(
            f"Model {version.config.key} version {version.id} could not be loaded; the operator sees why with "
            "`appliance models list`.",
            detail=version.problem,
        )
    if version.servable is None:
        raise NotReady(f"Model {version.config.key} version {version.id} is not loaded; try again.")
    return version.servable


def _listed(version: Version[Servable], request: service_pb2.ListModelsRequest) -> bool:
    """Whether a model passes the filters of ListModels that mean something here."""
    config = version.config
    text = f"{config.key.model_id} {config.name} {config.description}".lower()
    return (
        request.model_type_id in ("", config.model_type_id)
        and all(wanted.lower().strip("*") in text for wanted in (request.name, request.query, request.search))
        and (not request.model_version_ids or version.id in request.model_version_ids)
    )


def _type_message(name: str) -> resources_pb2.ModelType:
    title, description, takes, gives = _TYPES[name]
    return resources_pb2.ModelType(
        id=name, title=title, description=description, input_fields=[takes], output_fields=[gives]
    )


def _code_status(number: int) -> status_pb2.Status:
    name = status.name_of(number)
    return status_pb2.Status(code=number, description=name.replace("_", " ").capitalize(), details=name)


RPCS = (
    "PostModelOutputs",
    "GenerateModelOutputs",
    "StreamModelOutputs",
    "GetModel",
    "ListModels",
    "GetModelVersion",
    "ListModelVersions",
    "GetModelOutputInfo",
    "ListModelConcepts",
    "ListConcepts",
    "GetModelType",
    "ListModelTypes",
    "PostWorkflowResults",
    "GetWorkflow",
    "ListWorkflows",
    "GetWorkflowVersion",
    "ListWorkflowVersions",
    "GetComputeCluster",
    "ListComputeClusters",
    "GetNodepool",
    "ListNodepools",
    "GetDeployment",
    "ListDeployments",
    "GetRunner",
    "ListRunners",
    "GetApp",
    "ListApps",
    "GetUser",
    "MyScopes",
    "ListStatusCodes",
    "GetStatusCode",
)
"""The RPCs of `clarifai.api.V2` that are served; every other one is UNIMPLEMENTED."""
