"""The RPCs that get, list, post, patch and delete resources, all by one table of kinds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2, status_pb2
from orchestrator.centre.store import Found, Place, Store

Code = status_code_pb2.StatusCode


class Refused(Exception):
    """The call is answered with this status."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(description)
        self.status = status_pb2.Status(code=code, description=description)


def success() -> Any:
    """The status of what went well."""
    return status_pb2.Status(code=status_code_pb2.SUCCESS, description="Ok")


@dataclass(frozen=True)
class Kind:
    """One kind of resource.

    Attributes:
        name: as the fields of its RPCs call it.
        within: which request fields name what it lies in, outermost first.
        missing, invalid: the codes of a resource that is not there, and of a request that cannot be carried out.
        patches: which actions its patch takes.
    """

    name: str
    message: type
    within: tuple[str, ...]
    missing: int
    invalid: int
    patches: tuple[str, ...] = ("merge", "overwrite", "remove")

    @property
    def plural(self) -> str:
        return f"{self.name}s"

    @property
    def title(self) -> str:
        """Its name in a sentence."""
        return self.name.replace("_", " ")


CLUSTER = Kind(
    "compute_cluster",
    resources_pb2.ComputeCluster,
    (),
    Code.Value("COMPUTE_CLUSTER_DOES_NOT_EXIST"),
    Code.Value("COMPUTE_CLUSTER_INVALID_REQUEST"),
)
NODEPOOL = Kind(
    "nodepool",
    resources_pb2.Nodepool,
    ("compute_cluster_id",),
    Code.Value("NODEPOOL_DOES_NOT_EXIST"),
    Code.Value("NODEPOOL_INVALID_REQUEST"),
)
RUNNER = Kind(
    "runner",
    resources_pb2.Runner,
    ("compute_cluster_id", "nodepool_id"),
    Code.Value("RUNNER_DOES_NOT_EXIST"),
    Code.Value("RUNNER_INVALID_REQUEST"),
)
DEPLOYMENT = Kind(
    "deployment",
    resources_pb2.Deployment,
    (),
    Code.Value("DEPLOYMENT_DOES_NOT_EXIST"),
    Code.Value("DEPLOYMENT_INVALID_REQUEST"),
    patches=("overwrite",),  # the SDK's authors met "Invalid action: Unrecognized action 'merge'" (PROTOCOL 5.1)
)
APP = Kind("app", resources_pb2.App, (), Code.Value("CONN_DOES_NOT_EXIST"), Code.Value("CONN_INVALID_REQUEST"))
MODEL = Kind(
    "model",
    resources_pb2.Model,
    ("app_id",),
    Code.Value("MODEL_DOES_NOT_EXIST"),
    Code.Value("MODEL_INVALID_REQUEST"),
)
VERSION = Kind(
    "model_version",
    resources_pb2.ModelVersion,
    ("app_id", "model_id"),
    Code.Value("MODEL_DOES_NOT_EXIST"),
    Code.Value("MODEL_INVALID_REQUEST"),
)

LOCAL_DEV = "local-dev"
"""The type of clusters that local runners may use; no other may be (PROTOCOL 5.1)."""

Handler = Callable[[str, Any], Any]
"""From (who calls, request) to the reply. Raises: Refused."""


class Resources:
    """Answers the unary RPCs over resources."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def handlers(self) -> dict[str, Handler]:
        """RPC names and what answers them."""
        found: dict[str, Handler] = {
            "GetUser": self._get_user,
            "GetApp": self._get_app,
            "PostApps": self._post_apps,
            "PatchApp": self._patch_app,
            "DeleteApp": self._delete_app,
            "ListApps": self._lister(APP, service_pb2.MultiAppResponse),
            "GetModel": self._get_model,
            "PostModels": self._post_models,
            "PatchModels": self._patcher(MODEL, service_pb2.MultiModelResponse),
            "DeleteModel": self._delete_model,
            "DeleteModels": self._deleter(MODEL),
            "ListModels": self._list_models,
            "GetModelVersion": self._get_version,
            "PostModelVersions": self._post_versions,
            "PatchModelVersions": self._patcher(VERSION, service_pb2.MultiModelVersionResponse),
            "DeleteModelVersion": self._delete_version,
            "ListModelVersions": self._lister(VERSION, service_pb2.MultiModelVersionResponse, newest_first=True),
            "PostNodepoolStatus": self._post_nodepool_status,
            "PostComputePlaneMetrics": self._post_metrics,
        }
        for kind, title in ((CLUSTER, "ComputeCluster"), (NODEPOOL, "Nodepool"), (RUNNER, "Runner"),
                            (DEPLOYMENT, "Deployment")):  # fmt: skip
            single = getattr(service_pb2, f"Single{title}Response")
            multi = getattr(service_pb2, f"Multi{title}Response")
            found[f"Get{title}"] = self._getter(kind, single)
            found[f"List{title}s"] = self._lister(kind, multi)
            found[f"Post{title}s"] = self._poster(kind, multi)
            found[f"Patch{title}s"] = self._patcher(kind, multi)
            found[f"Delete{title}s"] = self._deleter(kind)
        return found

    # ---- what every kind does ----

    def owner(self, caller: str, request: Any) -> str:
        """Whose resources the request is about. Raises: Refused: they are not the caller's."""
        asked = request.user_app_id.user_id
        if asked in ("", "me", caller):
            return caller
        raise Refused(Code.Value("CONN_INSUFFICIENT_SCOPES"), f"This token does not act for the user '{asked}'.")

    def _scope(self, kind: Kind, request: Any) -> str:
        fields = request.DESCRIPTOR.fields_by_name
        named = [
            request.user_app_id.app_id if name == "app_id" else getattr(request, name) if name in fields else ""
            for name in kind.within
        ]
        return "/".join(named) if all(named) else named[0] if named else ""

    def one(self, kind: Kind, owner: str, scope: str, id: str) -> Found:
        """A resource. Raises: Refused: there is none."""
        found = next(self._store.find(kind.name, kind.message, owner, scope, id), None) if id else None
        if found is None:
            raise Refused(kind.missing, f"The {kind.title} '{id}' does not exist.")
        return found

    def all(self, kind: Kind, owner: str, scope: str = "") -> Iterator[Found]:
        """All resources of a kind, oldest first."""
        return self._store.find(kind.name, kind.message, owner, scope)

    def _getter(self, kind: Kind, reply_type: Any) -> Handler:
        def get(caller: str, request: Any) -> Any:
            owner = self.owner(caller, request)
            found = self.one(kind, owner, self._scope(kind, request), getattr(request, f"{kind.name}_id"))
            return reply_type(status=success(), **{kind.name: found.message})

        return get

    def _lister(self, kind: Kind, reply_type: Any, newest_first: bool = False) -> Handler:
        def list_(caller: str, request: Any) -> Any:
            found = self.all(kind, self.owner(caller, request), self._scope(kind, request))
            chosen = [one.message for one in found if _wanted(one.message, request)]
            if newest_first:
                chosen.reverse()
            return reply_type(status=success(), **{kind.plural: _page(chosen, request)})

        return list_

    def _poster(self, kind: Kind, reply_type: Any) -> Handler:
        def post(caller: str, request: Any) -> Any:
            owner = self.owner(caller, request)
            place = Place(owner, self._scope(kind, request))
            made = []
            for message in getattr(request, kind.plural):
                kept = kind.message()
                kept.CopyFrom(message)
                self._check_new(kind, place, kept)
                if not self._store.put(kind.name, place, kept):
                    raise Refused(kind.invalid, f"A {kind.title} '{kept.id}' exists already.")
                made.append(kept)
            if not made:
                raise Refused(kind.invalid, f"No {kind.plural.replace('_', ' ')} were sent.")
            return reply_type(status=success(), **{kind.plural: made})

        return post

    def _patcher(self, kind: Kind, reply_type: Any) -> Handler:
        def patch(caller: str, request: Any) -> Any:
            owner = self.owner(caller, request)
            if request.action not in kind.patches:
                raise Refused(kind.invalid, f"Invalid action: Unrecognized action '{request.action}'")
            done = []
            for message in getattr(request, kind.plural):
                found = self.one(kind, owner, self._scope(kind, request), message.id)
                self._patch(kind, found, message)
                done.append(found.message)
            return reply_type(status=success(), **{kind.plural: done})

        return patch

    def _patch(self, kind: Kind, found: Found, message: Any) -> None:
        """Fields that were sent replace what is there."""
        changes = kind.message()
        changes.CopyFrom(message)
        if kind is DEPLOYMENT:
            # `worker` is what is observed: a write to it is ignored, `desired_worker` is what becomes it.
            changes.ClearField("worker")
            if changes.HasField("desired_worker"):
                self._check_worker(kind, found.place.owner, changes.desired_worker)
                changes.worker.CopyFrom(changes.desired_worker)
        for field, _ in changes.ListFields():
            found.message.ClearField(field.name)
        found.message.MergeFrom(changes)
        self._store.change(kind.name, found)

    def _deleter(self, kind: Kind) -> Handler:
        def delete(caller: str, request: Any) -> Any:
            owner = self.owner(caller, request)
            chosen = [self.one(kind, owner, self._scope(kind, request), id) for id in request.ids]
            for found in chosen:
                self._delete(kind, found)
            return status_pb2.BaseResponse(status=success())

        return delete

    def _delete(self, kind: Kind, found: Found) -> None:
        """Raises: Refused: something still lies in it, or runs it."""
        self._check_unused(kind, found)
        inside: list[Found] = []
        if kind is MODEL:
            inside = list(self.all(VERSION, found.place.owner, f"{found.place.scope}/{found.id}"))
        for version in inside:
            self._check_unused(VERSION, version)
        for version in inside:
            self._store.delete(VERSION.name, version)
        self._store.delete(kind.name, found)

    # ---- what kinds do differently ----

    def _check_new(self, kind: Kind, place: Place, message: Any) -> None:
        owner = place.owner
        if kind is not RUNNER and not message.id:
            raise Refused(kind.invalid, f"A {kind.title} needs an id.")
        if kind is CLUSTER:
            message.ClearField("key")  # a token: it is for the centre's own use, and is never shown again
            message.user_id = owner
        elif kind is NODEPOOL:
            cluster = self.one(CLUSTER, owner, "", place.scope).message
            message.compute_cluster.CopyFrom(cluster)
            if not message.instance_types:
                raise Refused(kind.invalid, "A nodepool needs an instance type.")
            if message.max_instances < max(1, message.min_instances):
                raise Refused(kind.invalid, "max_instances is smaller than min_instances, or 0.")
        elif kind is RUNNER:
            cluster_id, _, nodepool_id = place.scope.partition("/")
            nodepool = self.one(NODEPOOL, owner, cluster_id, nodepool_id).message
            message.nodepool.CopyFrom(nodepool)
            version = self._check_worker(kind, owner, message.worker)
            local = nodepool.compute_cluster.cluster_type == LOCAL_DEV
            if version.pretrained_model_config.local_dev and not local:
                raise Refused(
                    kind.invalid, f"A version with local_dev runs in clusters of the type '{LOCAL_DEV}' only."
                )
        elif kind is DEPLOYMENT:
            message.user_id = message.user_id or owner
            self._check_worker(kind, owner, message.worker)
            if not message.nodepools:
                raise Refused(kind.invalid, "A deployment needs a nodepool.")
            for nodepool in message.nodepools:
                self.one(NODEPOOL, owner, nodepool.compute_cluster.id, nodepool.id)
                self._check_alone(owner, message, nodepool)

    def _check_alone(self, owner: str, deployment: Any, nodepool: Any) -> None:
        """A nodepool has one deployment of a model (PROTOCOL 5.5)."""
        for other in self.all(DEPLOYMENT, owner):
            same = (other.message.worker.model.app_id, other.message.worker.model.id) == (
                deployment.worker.model.app_id,
                deployment.worker.model.id,
            )
            if same and other.id != deployment.id and nodepool.id in {found.id for found in other.message.nodepools}:
                raise Refused(
                    DEPLOYMENT.invalid, f"The nodepool '{nodepool.id}' has a deployment of this model: '{other.id}'."
                )

    def _check_worker(self, kind: Kind, owner: str, worker: Any) -> Any:
        """The version that a worker runs. Raises: Refused: there is none."""
        if not worker.HasField("model"):
            raise Refused(kind.invalid, "A worker needs a model.")
        model = worker.model
        if model.user_id != owner:
            raise Refused(kind.invalid, "The cluster's user must be the model's user.")
        self.one(MODEL, owner, model.app_id, model.id)
        return self.one(VERSION, owner, f"{model.app_id}/{model.id}", model.model_version.id).message

    def _check_unused(self, kind: Kind, found: Found) -> None:
        owner, deeper = found.place.owner, f"{found.place.scope}/{found.id}".strip("/")
        users: list[str] = []
        if kind is CLUSTER:
            users = [f"nodepool '{one.id}'" for one in self.all(NODEPOOL, owner, deeper)]
        elif kind is NODEPOOL:
            users = [f"runner '{one.id}'" for one in self.all(RUNNER, owner, deeper)]
            users += [
                f"deployment '{one.id}'"
                for one in self.all(DEPLOYMENT, owner)
                if found.id in {nodepool.id for nodepool in one.message.nodepools}
            ]
        elif kind is VERSION:
            for user_kind in (RUNNER, DEPLOYMENT):
                users += [
                    f"{user_kind.name} '{one.id}'"
                    for one in self.all(user_kind, owner)
                    if one.message.worker.model.model_version.id == found.id
                ]
        if users:
            raise Refused(kind.invalid, f"The {kind.title} '{found.id}' is used by {', '.join(users)}.")

    # ---- users, apps, models, versions ----

    def _get_user(self, caller: str, request: Any) -> Any:
        asked = request.user_app_id.user_id
        user = caller if asked in ("", "me") else asked
        if not self._store.has_user(user):
            raise Refused(Code.Value("CONN_DOES_NOT_EXIST"), f"The user '{user}' does not exist.")
        return service_pb2.SingleUserResponse(status=success(), user=resources_pb2.User(id=user))

    def _get_app(self, caller: str, request: Any) -> Any:
        found = self.one(APP, self.owner(caller, request), "", request.user_app_id.app_id)
        return service_pb2.SingleAppResponse(status=success(), app=found.message)

    def _post_apps(self, caller: str, request: Any) -> Any:
        reply = self._poster(APP, service_pb2.MultiAppResponse)(caller, request)
        for app in reply.apps:
            app.user_id = self.owner(caller, request)
            self._store.change(APP.name, Found(Place(app.user_id), app.id, app))
        return reply

    def _patch_app(self, caller: str, request: Any) -> Any:
        found = self.one(APP, self.owner(caller, request), "", request.app.id or request.user_app_id.app_id)
        self._patch(APP, found, request.app)
        return service_pb2.SingleAppResponse(status=success(), app=found.message)

    def _delete_app(self, caller: str, request: Any) -> Any:
        owner, app = self.owner(caller, request), request.user_app_id.app_id
        found = self.one(APP, owner, "", app)
        models = [one.id for one in self.all(MODEL, owner, app)]
        if models:
            raise Refused(APP.invalid, f"The app '{app}' has the models {', '.join(models)}.")
        self._store.delete(APP.name, found)
        return status_pb2.BaseResponse(status=success())

    def versions(self, owner: str, app: str, model: str) -> list[Any]:
        """A model's versions, newest first."""
        return [found.message for found in self.all(VERSION, owner, f"{app}/{model}")][::-1]

    def _with_version(self, model: Any, version: Any | None) -> Any:
        if version is not None:
            model.model_version.CopyFrom(version)
        return model

    def _get_model(self, caller: str, request: Any) -> Any:
        owner, app = self.owner(caller, request), request.user_app_id.app_id
        model = self.one(MODEL, owner, app, request.model_id).message
        if request.version_id:
            version = self.one(VERSION, owner, f"{app}/{request.model_id}", request.version_id).message
        else:
            version = next(iter(self.versions(owner, app, request.model_id)), None)
        return service_pb2.SingleModelResponse(status=success(), model=self._with_version(model, version))

    def _post_models(self, caller: str, request: Any) -> Any:
        owner, app = self.owner(caller, request), request.user_app_id.app_id
        self.one(APP, owner, "", app)
        made = None
        for message in request.models:
            model = resources_pb2.Model()
            model.CopyFrom(message)
            model.user_id, model.app_id = owner, app
            if not model.id:
                raise Refused(MODEL.invalid, "A model needs an id.")
            if not self._store.put(MODEL.name, Place(owner, app), model):
                raise Refused(MODEL.invalid, f"A model '{model.id}' exists already.")
            made = made or model
        if made is None:
            raise Refused(MODEL.invalid, "No models were sent.")
        return service_pb2.SingleModelResponse(status=success(), model=made)

    def _list_models(self, caller: str, request: Any) -> Any:
        owner = self.owner(caller, request)
        models = [
            self._with_version(found.message, next(iter(self.versions(owner, found.place.scope, found.id)), None))
            for found in self.all(MODEL, owner, request.user_app_id.app_id)
        ]
        return service_pb2.MultiModelResponse(status=success(), models=_page(models, request))

    def _delete_model(self, caller: str, request: Any) -> Any:
        self._delete(MODEL, self.one(MODEL, self.owner(caller, request), request.user_app_id.app_id, request.model_id))
        return status_pb2.BaseResponse(status=success())

    def _get_version(self, caller: str, request: Any) -> Any:
        model = self._get_model(caller, request).model
        if not model.HasField("model_version"):
            raise Refused(VERSION.missing, f"The model '{model.id}' has no version.")
        return service_pb2.SingleModelVersionResponse(status=success(), model_version=model.model_version)

    def _post_versions(self, caller: str, request: Any) -> Any:
        owner, app = self.owner(caller, request), request.user_app_id.app_id
        model = self.one(MODEL, owner, app, request.model_id).message
        if not request.model_versions:
            raise Refused(VERSION.invalid, "No versions were sent.")
        version = resources_pb2.ModelVersion()
        for message in request.model_versions:
            version.CopyFrom(message)
            version.user_id, version.app_id = owner, app
            version.status.CopyFrom(
                status_pb2.Status(code=status_code_pb2.MODEL_TRAINED, description="Model is trained and ready")
            )
            if not self._store.put(VERSION.name, Place(owner, f"{app}/{model.id}"), version):
                raise Refused(VERSION.invalid, f"A version '{version.id}' exists already.")
        return service_pb2.SingleModelResponse(status=success(), model=self._with_version(model, version))

    def _delete_version(self, caller: str, request: Any) -> Any:
        scope = f"{request.user_app_id.app_id}/{request.model_id}"
        self._delete(VERSION, self.one(VERSION, self.owner(caller, request), scope, request.version_id))
        return status_pb2.BaseResponse(status=success())

    # ---- reports ----

    def _post_nodepool_status(self, caller: str, request: Any) -> Any:
        owner = self.owner(caller, request)
        found = self.one(NODEPOOL, owner, request.compute_cluster_id, request.nodepool_id)
        found.message.status = request.status
        found.message.status_description = request.status_description
        self._store.change(NODEPOOL.name, found)
        return status_pb2.BaseResponse(status=success())

    def _post_metrics(self, caller: str, request: Any) -> Any:
        for metrics in request.compute_plane_metrics:
            self._store.report(caller, metrics)
        return status_pb2.BaseResponse(status=success())


def _wanted(message: Any, request: Any) -> bool:
    """What a list's filters leave."""
    fields = request.DESCRIPTOR.fields_by_name
    if "model_version_ids" in fields and request.model_version_ids:
        return message.worker.model.model_version.id in request.model_version_ids
    if isinstance(message, resources_pb2.Deployment) and request.nodepool_id:
        return request.nodepool_id in {nodepool.id for nodepool in message.nodepools}
    return True


def _page(found: list[Any], request: Any) -> list[Any]:
    size = request.per_page or 20
    first = (max(request.page, 1) - 1) * size
    return found[first : first + size]
