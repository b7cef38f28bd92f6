"""Bringing the orchestrator's state to what is desired: get, then post or patch what differs; nothing twice.

The order is the stock runner's (PROTOCOL 5.1): cluster, nodepool, app, model, version, runner, deployment. `plan` is
the same walk without a change.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from clarifai_grpc.grpc.api import resources_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2 as codes

from appliance.orchestrator.central import Central, CentralError
from appliance.orchestrator.created import CREATOR, ORDER, Created
from appliance.orchestrator.desired import DIGEST, LOCAL_VERSION, Desired, WantedModel, WantedVersion


@dataclass(frozen=True)
class Step:
    """One thing that differs: what is done about it.

    Attributes:
        verb: "create", "change" or "delete".
        kind: "compute cluster", "nodepool", "app", "model", "version", "runner" or "deployment".
        why: what differs, "" where it is simply not there.
    """

    verb: str
    kind: str
    id: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.verb:<7}{self.kind:<16}{self.id}" + (f"  ({self.why})" if self.why else "")


@dataclass
class Registered:
    """What the orchestrator knows now.

    Attributes:
        runners, versions: ids by (app, model, local version); those of what would only be created are missing.
        kept: what we created, is not served here any more, and is in use by others.
    """

    steps: list[Step] = field(default_factory=list)
    runners: dict[tuple[str, str, str], str] = field(default_factory=dict)
    versions: dict[tuple[str, str, str], str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


async def reconcile(central: Central, wanted: Desired, created: Created, *, dry: bool = False) -> Registered:
    """See that all that is desired is there, and that what we created and is desired no more is not.

    Args:    dry: change nothing; the steps say what would be done.
    Raises:  CentralError: a step failed; those before it were done, and are not done again. ConfigError.
    """
    walk = _Walk(central, wanted, created, dry)
    await walk.run()
    return walk.done


async def leave(central: Central, created: Created, user_id: str) -> Registered:
    """Delete what we created, and nothing else; what somebody deleted meanwhile counts as deleted.

    What others use by now stays (a model that another appliance serves).

    Raises: CentralError: something could not be deleted; what was before it is, and is not tried again.
    """
    done = Registered()
    for kind in ORDER:
        for path in reversed(created.paths(kind)):
            try:
                done.steps.append(await _delete(central, kind, path, user_id))
            except CentralError as error:
                if error.code not in _IN_USE:
                    raise
                done.kept.append(f"{_shown(kind)} {path[-1]}: {error}")
            created.remove(kind, *path)
    return done


class _Walk:
    """One reconciliation."""

    def __init__(self, central: Central, wanted: Desired, created: Created, dry: bool) -> None:
        self._central, self._wanted, self._created, self._dry = central, wanted, created, dry
        self._user = resources_pb2.UserAppIDSet(user_id=wanted.user_id)
        self._at = {"compute_cluster_id": wanted.cluster.id, "nodepool_id": wanted.nodepool.id}
        self._versions: set[str] = set()
        self._no_cluster = self._no_nodepool = False
        self._no_apps: set[str] = set()
        self.done = Registered()

    async def run(self) -> None:
        await self._cluster()
        await self._nodepool()
        for app in self._wanted.apps:
            await self._app(app)
        for model in self._wanted.models:
            await self._model(model)
        await self._prune()
        if not self._dry:
            await self._central.call(
                "PostNodepoolStatus",
                user_app_id=self._user,
                status=self._wanted.status,
                status_description=self._wanted.status_description,
                **self._at,
            )

    def _step(self, verb: str, kind: str, id: str, why: str = "") -> bool:
        """Note a step. Returns whether it is to be taken."""
        self.done.steps.append(Step(verb, kind, id, why))
        return not self._dry

    async def _create(self, rpc: str, path: tuple[str, ...], **fields: Any) -> None:
        """Post what was not there. It is noted as ours before, so that a lost reply does not leave it behind."""
        self._created.add(*path)
        try:
            await self._central.call(rpc, **fields)
        except CentralError as error:
            if error.code:  # it was refused, so it is not there
                self._created.remove(*path)
            raise

    # ---- the place ----

    async def _cluster(self) -> None:
        cluster = resources_pb2.ComputeCluster()
        cluster.CopyFrom(self._wanted.cluster)
        asked = {"user_app_id": self._user, "compute_cluster_id": cluster.id}
        reply = await self._central.find("GetComputeCluster", codes.COMPUTE_CLUSTER_DOES_NOT_EXIST, **asked)
        if reply is not None:
            there = reply.compute_cluster.cluster_type
            if there != cluster.cluster_type:
                raise CentralError(
                    f"The compute cluster {cluster.id!r} is of the type {there!r}, and appliances need one of the type "
                    f"{cluster.cluster_type!r}: set placement.compute_cluster_id to another id."
                )
            return
        if self._step("create", "compute cluster", cluster.id):
            # The orchestrator wants the PAT here, as the stock runner sends it (PROTOCOL 5.1).
            cluster.key.id = self._central.pat
            posted = {"user_app_id": self._user, "compute_clusters": [cluster]}
            await self._create("PostComputeClusters", ("compute_cluster", cluster.id), **posted)
        else:
            self._no_cluster = True

    async def _nodepool(self) -> None:
        nodepool = self._wanted.nodepool
        where = {"user_app_id": self._user, "compute_cluster_id": self._at["compute_cluster_id"]}
        reply = None
        if not self._no_cluster:
            missing = codes.NODEPOOL_DOES_NOT_EXIST
            reply = await self._central.find("GetNodepool", missing, nodepool_id=nodepool.id, **where)
        if reply is None:
            if self._step("create", "nodepool", nodepool.id):
                path = ("nodepool", self._at["compute_cluster_id"], nodepool.id)
                await self._create("PostNodepools", path, nodepools=[nodepool], **where)
            else:
                self._no_nodepool = True
            return
        changes = resources_pb2.Nodepool(id=nodepool.id)
        why = []
        if not _among(nodepool.instance_types, reply.nodepool.instance_types):
            # Another appliance of this nodepool has other hardware: the nodepool has both.
            changes.instance_types.extend(reply.nodepool.instance_types)
            changes.instance_types.extend(nodepool.instance_types)
            why.append("instance types")
        ours = tuple(self._at.values()) in self._created.paths("nodepool")
        if ours and reply.nodepool.metadata != nodepool.metadata:  # that of a shared one is its creator's
            changes.metadata.CopyFrom(nodepool.metadata)
            why.append("metadata")
        if why and self._step("change", "nodepool", nodepool.id, ", ".join(why)):
            await self._central.call("PatchNodepools", nodepools=[changes], action="overwrite", **where)

    # ---- models ----

    async def _app(self, app: resources_pb2.App) -> None:
        ids = resources_pb2.UserAppIDSet(user_id=self._wanted.user_id, app_id=app.id)
        if await self._central.find("GetApp", codes.CONN_DOES_NOT_EXIST, user_app_id=ids) is not None:
            return
        if self._step("create", "app", app.id):
            await self._create("PostApps", ("app", app.id), user_app_id=self._user, apps=[app])
        else:
            self._no_apps.add(app.id)

    async def _model(self, wanted: WantedModel) -> None:
        model = wanted.message
        ids = resources_pb2.UserAppIDSet(user_id=model.user_id, app_id=model.app_id)
        reply = None
        if model.app_id not in self._no_apps:
            missing = codes.MODEL_DOES_NOT_EXIST
            reply = await self._central.find("GetModel", missing, user_app_id=ids, model_id=model.id)
        known: dict[str, str] = {}
        if reply is None:
            if self._step("create", "model", model.id):
                await self._create("PostModels", ("model", model.app_id, model.id), user_app_id=ids, models=[model])
        elif reply.model.model_type_id != model.model_type_id:
            raise CentralError(
                f"The model {model.app_id}/{model.id} is there with the type {reply.model.model_type_id!r}, and here "
                f"it has the type {model.model_type_id!r}: give it another id, or orchestrator.app_id another app."
            )
        else:
            known = await self._known_versions(ids, model.id)
        runs = ""
        for version in wanted.versions:
            there = known.get(version.digest) or await self._post_version(ids, model, version)
            self._versions.add(there)
            if there:
                self.done.versions[model.app_id, model.id, version.local] = there
            if version.local == wanted.pinned:
                runs = there
            await self._runner(model, version, there)
        await self._deployment(wanted, runs)

    async def _known_versions(self, ids: resources_pb2.UserAppIDSet, model_id: str) -> dict[str, str]:
        """Digest → the id there."""
        known: dict[str, str] = {}
        asked = {"user_app_id": ids, "model_id": model_id}
        async for version in self._central.pages("ListModelVersions", "model_versions", **asked):
            if DIGEST not in version.metadata.fields:
                continue
            known[version.metadata[DIGEST]] = version.id
            if not self._dry and self._created.is_mine(version.metadata):
                local = str(version.metadata[LOCAL_VERSION])
                self._created.add("model_version", ids.app_id, model_id, local, version.id)
        return known

    async def _post_version(
        self, ids: resources_pb2.UserAppIDSet, model: resources_pb2.Model, version: WantedVersion
    ) -> str:
        """The new version's id there; "" when none is made."""
        if not self._step("create", "version", f"{model.id} {version.local}"):
            return ""
        message = resources_pb2.ModelVersion()
        message.CopyFrom(version.message)
        message.metadata[CREATOR] = self._created.creator
        posted = {"user_app_id": ids, "model_id": model.id, "model_versions": [message]}
        made = str((await self._central.call("PostModelVersions", **posted)).model.model_version.id)
        self._created.add("model_version", model.app_id, model.id, version.local, made)
        return made

    async def _runner(self, model: resources_pb2.Model, version: WantedVersion, there: str) -> None:
        """One runner for a version, shared by all appliances of the nodepool."""
        shown = f"{model.id} {version.local}"
        if there and not self._no_nodepool:
            asked = {"user_app_id": self._user, "model_version_ids": [there], **self._at}
            async for runner in self._central.pages("ListRunners", "runners", **asked):
                self.done.runners[model.app_id, model.id, version.local] = runner.id
                if not self._dry and self._created.is_mine(runner.metadata):
                    self._note_runner(model, version, runner.id)
                return
        if self._step("create", "runner", shown):
            runner = resources_pb2.Runner()
            runner.CopyFrom(version.runner)
            runner.worker.model.model_version.id = there
            runner.metadata[CREATOR] = self._created.creator
            reply = await self._central.call("PostRunners", user_app_id=self._user, runners=[runner], **self._at)
            self.done.runners[model.app_id, model.id, version.local] = reply.runners[0].id
            self._note_runner(model, version, reply.runners[0].id)

    def _note_runner(self, model: resources_pb2.Model, version: WantedVersion, id: str) -> None:
        self._created.add("runner", *self._at.values(), model.app_id, model.id, version.local, id)

    async def _deployment(self, wanted: WantedModel, runs: str) -> None:
        deployment = resources_pb2.Deployment()
        deployment.CopyFrom(wanted.deployment)
        deployment.worker.model.model_version.id = runs
        asked = {"user_app_id": self._user, "deployment_id": deployment.id}
        reply = await self._central.find("GetDeployment", codes.DEPLOYMENT_DOES_NOT_EXIST, **asked)
        if reply is None:
            if self._step("create", "deployment", deployment.id):
                path = ("deployment", *self._at.values(), wanted.message.app_id, wanted.message.id, deployment.id)
                deployment.metadata[CREATOR] = self._created.creator
                await self._create("PostDeployments", path, user_app_id=self._user, deployments=[deployment])
            return
        there = reply.deployment
        worker = there.worker.model
        if (worker.app_id, worker.id) != (wanted.message.app_id, wanted.message.id):
            raise CentralError(
                f"The deployment {deployment.id!r} is there for the model {worker.app_id}/{worker.id}: give ours "
                "another id with a [[deployment]] table."
            )
        changes, why = resources_pb2.Deployment(id=deployment.id), []
        if not runs or worker.model_version.id != runs:
            changes.desired_worker.CopyFrom(deployment.worker)
            why.append(f"version {wanted.pinned}")
        (place,) = deployment.nodepools
        places = {(nodepool.compute_cluster.id, nodepool.id) for nodepool in there.nodepools}
        if (place.compute_cluster.id, place.id) not in places:
            changes.nodepools.extend([*there.nodepools, place])
            why.append(f"nodepool {place.id}")
        if why and self._step("change", "deployment", deployment.id, ", ".join(why)):
            # "overwrite" is the only action that it takes, `desired_worker` the only writable worker (PROTOCOL 5.1).
            if changes.nodepools:
                app_model = (wanted.message.app_id, wanted.message.id)
                self._created.add("place", *self._at.values(), *app_model, deployment.id)
            patched = {"user_app_id": self._user, "deployments": [changes], "action": "overwrite"}
            await self._central.call("PatchDeployments", **patched)

    # ---- what is desired no more ----

    async def _prune(self) -> None:
        """Delete what we created for models, or versions of them, that are gone from the catalog."""
        if not self._wanted.complete:
            return
        deployments = {model.deployment.id for model in self._wanted.models}
        runners = set(self.done.runners.values())
        models = {(model.message.app_id, model.message.id) for model in self._wanted.models}
        waiting = {(app, model) for app, model, _ in self._wanted.pending}
        for kind in ("place", "deployment"):
            for *at, app, model, id in self._created.paths(kind):
                if id not in deployments and (app, model) not in waiting:
                    await self._drop(kind, *at, app, model, id)
        for *at, app, model, local, id in self._created.paths("runner"):
            if id not in runners and (app, model, local) not in self._wanted.pending:
                await self._drop("runner", *at, app, model, local, id)
        for app, model, local, id in self._created.paths("model_version"):
            if id not in self._versions and (app, model, local) not in self._wanted.pending:
                await self._drop("model_version", app, model, local, id)
        for app, model in self._created.paths("model"):
            if (app, model) not in models | waiting:
                await self._drop("model", app, model)

    async def _drop(self, kind: str, *path: str) -> None:
        if self._dry:
            self._step("delete", _shown(kind), path[-1], _GONE_HERE)
            return
        try:
            step = await _delete(self._central, kind, path, self._wanted.user_id)
        except CentralError as error:
            if error.code not in _IN_USE:
                raise
            self.done.kept.append(f"{_shown(kind)} {path[-1]}: {error}")
        else:
            self.done.steps.append(replace(step, why=step.why or _GONE_HERE))
            self._created.remove(kind, *path)


def _among(wanted: Iterable[Any], there: Iterable[Any]) -> bool:
    """Whether each instance type is there, by what it is rather than by its name."""
    known = [(instance.compute_info, instance.architecture) for instance in there]
    return all((instance.compute_info, instance.architecture) in known for instance in wanted)


def _shown(kind: str) -> str:
    names = {"model_version": "version", "place": "deployment"}
    return names.get(kind, kind.replace("_", " "))


async def _delete(central: Central, kind: str, path: tuple[str, ...], user_id: str) -> Step:
    """Delete one thing, or find that it is gone. Returns what was done. Raises: CentralError."""
    user = resources_pb2.UserAppIDSet(user_id=user_id)
    ids = [path[-1]]
    try:
        match kind:
            case "deployment" | "place":
                return await _leave_deployment(central, kind, path, user)
            case "runner":
                at = {"compute_cluster_id": path[0], "nodepool_id": path[1]}
                await central.call("DeleteRunners", user_app_id=user, ids=ids, **at)
            case "model_version":
                user.app_id = path[0]
                await central.call("DeleteModelVersion", user_app_id=user, model_id=path[1], version_id=path[-1])
            case "model":
                user.app_id = path[0]
                await central.call("DeleteModel", user_app_id=user, model_id=path[1])
            case "app":
                user.app_id = path[0]
                await central.call("DeleteApp", user_app_id=user)
            case "nodepool":
                await central.call("DeleteNodepools", user_app_id=user, compute_cluster_id=path[0], ids=ids)
            case "compute_cluster":
                await central.call("DeleteComputeClusters", user_app_id=user, ids=ids)
            case _:
                raise AssertionError(kind)
    except CentralError as error:
        if error.code not in _GONE:
            raise
    return Step("delete", _shown(kind), path[-1])


async def _leave_deployment(
    central: Central, kind: str, path: tuple[str, ...], user: resources_pb2.UserAppIDSet
) -> Step:
    """Take our nodepool out of a deployment; delete it when an appliance made it and no other nodepool is left."""
    cluster, nodepool, *_, id = path
    there = (await central.call("GetDeployment", user_app_id=user, deployment_id=id)).deployment
    others = [place for place in there.nodepools if (place.compute_cluster.id, place.id) != (cluster, nodepool)]
    if others:
        changes = resources_pb2.Deployment(id=id, nodepools=others)
        await central.call("PatchDeployments", user_app_id=user, deployments=[changes], action="overwrite")
        return Step("change", "deployment", id, f"without nodepool {nodepool}")
    if kind == "deployment" or CREATOR in there.metadata.fields:
        await central.call("DeleteDeployments", user_app_id=user, ids=[id])
    return Step("delete", "deployment", id)


_GONE_HERE = "no longer served here"

_IN_USE = frozenset(
    {
        codes.DEPLOYMENT_INVALID_REQUEST,
        codes.RUNNER_INVALID_REQUEST,
        codes.MODEL_INVALID_REQUEST,
        codes.NODEPOOL_INVALID_REQUEST,
        codes.COMPUTE_CLUSTER_INVALID_REQUEST,
        codes.CONN_INVALID_REQUEST,
    }
)
"""What a delete is answered with where something of somebody else's stands on it."""

_GONE = frozenset(
    {
        codes.DEPLOYMENT_DOES_NOT_EXIST,
        codes.RUNNER_DOES_NOT_EXIST,
        codes.MODEL_DOES_NOT_EXIST,
        codes.CONN_DOES_NOT_EXIST,
        codes.NODEPOOL_DOES_NOT_EXIST,
        codes.COMPUTE_CLUSTER_DOES_NOT_EXIST,
    }
)
"""What a delete is answered with where there is nothing to delete."""
