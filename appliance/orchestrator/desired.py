"""What the orchestrator shall know of this appliance: pure functions of its configuration, inventory and catalog.

Models are registered as the stock local runner registers its own (PROTOCOL 5.1): a cluster of the type `local-dev`,
versions with `local_dev`, a runner for each version, a deployment for each model. Ids of versions and runners are the
orchestrator's; a version of ours is known again by a digest of what it is, which its metadata carries. So appliances
that have the same version share it, and its runner: they are replicas of one runner.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from clarifai_grpc.grpc.api import resources_pb2
from google.protobuf.message import Message

from appliance import __version__
from appliance.api import messages
from appliance.api.compute import Compute, compute_info
from appliance.api.placement import Places
from appliance.catalog.view import Version, View
from appliance.core.config import Config
from appliance.core.errors import ConfigError
from appliance.core.types import ModelKey
from appliance.tasks.servable import Servable

DIGEST = "appliance_digest"
"""The field of a version's metadata that tells what it is."""

LOCAL_VERSION = "appliance_model_version"
"""The field that tells its id here."""

_EMPTY_WORKFLOW = resources_pb2.Workflow(id="Empty", app_id="main", user_id="clarifai")
"""What the stock runner gives a new app as its default workflow (PROTOCOL 5.1)."""


@dataclass(frozen=True)
class WantedVersion:
    """One version that answers here.

    Attributes:
        local: its id here; the orchestrator gives it another one.
        message: to be posted; without an id.
        runner: to be posted once the version has an id there; its worker names the model alone.
    """

    local: str
    digest: str
    message: resources_pb2.ModelVersion
    runner: resources_pb2.Runner


@dataclass(frozen=True)
class WantedModel:
    """One model, the versions of it that answer, newest first, and its deployment, which runs the newest.

    Attributes:
        key: its ids here.
        pinned: the local id of the version that the deployment runs.
    """

    key: ModelKey
    message: resources_pb2.Model
    versions: tuple[WantedVersion, ...]
    deployment: resources_pb2.Deployment
    pinned: str


@dataclass(frozen=True)
class Desired:
    """All that we want to be there.

    Attributes:
        cluster: without its key, which is the PAT.
        status, status_description: for PostNodepoolStatus.
        left_out: models that are not registered, and why.
        pending: (app, model, local version) of what is in the catalog and does not answer now: it is not registered,
            and what is registered of it stays.
        complete: whether the whole catalog is known; else what seems to be gone may only not have been read yet.
    """

    cluster: resources_pb2.ComputeCluster
    nodepool: resources_pb2.Nodepool
    apps: tuple[resources_pb2.App, ...]
    models: tuple[WantedModel, ...]
    status: int
    status_description: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    pending: frozenset[tuple[str, str, str]] = frozenset()
    complete: bool = True

    @property
    def user_id(self) -> str:
        """Whose all of it is."""
        return str(self.cluster.user_id)


def desired(config: Config, view: View[Servable]) -> Desired:
    """What shall be registered, as of now.

    Raises: ConfigError: this appliance is enrolled nowhere.
    """
    user = config.orchestrator.user_id
    if config.orchestrator.api_base is None or user is None:
        raise ConfigError(
            "This appliance is enrolled nowhere: [orchestrator] names no api_base. Run `appliance orchestrator enroll`."
        )
    here = Compute(config, view).here()
    cluster = here.compute_cluster
    cluster.user_id = user
    models, left_out = _models(config, view, user, here)
    apps = {model.message.app_id: _app(model.message.app_id) for model in models}
    return Desired(
        cluster=cluster,
        nodepool=_nodepool(config, here),
        apps=tuple(apps.values()),
        models=tuple(models),
        status=here.status,
        status_description=here.status_description,
        left_out=left_out,
        pending=frozenset(_pending(config, view)),
        complete=view.complete and all(bundle.key is not None for bundle in view.bundles),
    )


def _pending(config: Config, view: View[Servable]) -> Iterator[tuple[str, str, str]]:
    for bundle in view.bundles:
        if bundle.key is not None:
            there = (config.orchestrator.app_id or bundle.key.app_id, bundle.key.model_id)
            if bundle.settling and not bundle.versions:
                yield (*there, "")
            yield from ((*there, version.id) for version in view.offered(bundle) if not version.ready)


def _nodepool(config: Config, here: resources_pb2.Nodepool) -> resources_pb2.Nodepool:
    """The nodepool as it is posted: what only the orchestrator can know of it (its status, its nodes) left out."""
    nodepool = resources_pb2.Nodepool()
    nodepool.CopyFrom(here)
    for name in ("status", "status_description", "node_count", "compute_cluster"):
        nodepool.ClearField(name)
    nodepool.compute_cluster.id = here.compute_cluster.id
    nodepool.compute_cluster.user_id = here.compute_cluster.user_id
    nodepool.metadata.update({"appliance_version": __version__, "base_url": config.server.base_url})
    if config.orchestrator.site:
        nodepool.metadata["site"] = config.orchestrator.site
    return nodepool


def _app(id: str) -> resources_pb2.App:
    return resources_pb2.App(id=id, visibility=messages.PRIVATE, default_workflow=_EMPTY_WORKFLOW)


def _models(
    config: Config, view: View[Servable], user: str, here: resources_pb2.Nodepool
) -> tuple[list[WantedModel], dict[str, str]]:
    places = Places(config, view)
    deployed = places.deployments()
    models: list[WantedModel] = []
    left_out: dict[str, str] = {}
    taken: dict[tuple[str, str], str] = {}
    for bundle in view.bundles:
        key = bundle.key
        ready = [version for version in view.offered(bundle) if version.ready]
        if key is None or not ready:
            left_out[str(key or bundle.name)] = "no version of it answers"
            continue
        there = (config.orchestrator.app_id or key.app_id, key.model_id)
        if there in taken:
            left_out[str(key)] = (
                f"its name there, {'/'.join(there)}, is that of {taken[there]}; see orchestrator.app_id"
            )
            continue
        taken[there] = str(key)
        model = messages.model_brief(ready[0])
        for name in ("created_at", "model_version"):
            model.ClearField(name)
        model.user_id, model.app_id = user, there[0]
        model.visibility.CopyFrom(messages.PRIVATE)
        # A nodepool has one deployment of a model (PROTOCOL 5.5): the first that means it, the configuration's before
        # the model's own.
        its_own = [each for each in deployed if places.key_of(each) == key]
        chosen = next((each for each in its_own if each.ids.version_id in ("", *(v.id for v in ready))), its_own[-1])
        models.append(
            WantedModel(
                key=key,
                message=model,
                versions=tuple(_version(version, model) for version in ready),
                deployment=_deployment(chosen.id, model, here),
                pinned=next((v.id for v in ready if v.id == chosen.ids.version_id), ready[0].id),
            )
        )
    return models, left_out


def _version(version: Version[Servable], model: resources_pb2.Model) -> WantedVersion:
    full = messages.version_full(version)
    message = resources_pb2.ModelVersion(
        description=full.description,
        visibility=messages.PRIVATE,
        method_signatures=full.method_signatures,
        pretrained_model_config=resources_pb2.PretrainedModelConfig(local_dev=True),
    )
    servable = version.servable
    assert servable is not None, "it is ready"
    for concept in messages.concept_messages(servable):
        concept.user_id, concept.app_id = model.user_id, model.app_id
        message.output_info.data.concepts.append(concept)
    digest = _digest(message, version)
    message.metadata.update({DIGEST: digest, LOCAL_VERSION: version.id})
    runner = resources_pb2.Runner(
        description=f"inference-appliance: {model.id} version {version.id}",
        worker=_worker(model),
        compute_info=compute_info(version),
        num_replicas=1,
    )
    return WantedVersion(version.id, digest, message, runner)


def _digest(message: resources_pb2.ModelVersion, version: Version[Servable]) -> str:
    """What makes two versions the same: what they are called, what may be called on them, and their files."""
    hashed = hashlib.sha256(version.id.encode())
    hashed.update(message.SerializeToString(deterministic=True))
    for name, checksum in sorted(version.checksums.items()):
        hashed.update(f"{name}\0{checksum}\n".encode())
    return hashed.hexdigest()[:32]


def _worker(model: resources_pb2.Model) -> resources_pb2.Worker:
    return resources_pb2.Worker(model=resources_pb2.Model(id=model.id, user_id=model.user_id, app_id=model.app_id))


def _deployment(id: str, model: resources_pb2.Model, here: resources_pb2.Nodepool) -> resources_pb2.Deployment:
    place = resources_pb2.Nodepool(
        id=here.id,
        compute_cluster=resources_pb2.ComputeCluster(id=here.compute_cluster.id, user_id=here.compute_cluster.user_id),
    )
    return resources_pb2.Deployment(
        id=id,
        user_id=model.user_id,
        worker=_worker(model),
        nodepools=[place],
        scheduling_choice=resources_pb2.Deployment.SchedulingChoice.PRICE,
        deploy_latest_version=False,
        visibility=messages.PRIVATE,
    )


# ---- between processes: the daemon knows it, the command needs it ----------------------------------------------------


def as_data(wanted: Desired) -> dict[str, Any]:
    """The same as plain data, for JSON."""
    return {
        "cluster": _packed(wanted.cluster),
        "nodepool": _packed(wanted.nodepool),
        "apps": [_packed(app) for app in wanted.apps],
        "models": [
            {
                "key": [model.key.user_id, model.key.app_id, model.key.model_id],
                "message": _packed(model.message),
                "versions": [
                    [version.local, version.digest, _packed(version.message), _packed(version.runner)]
                    for version in model.versions
                ],
                "deployment": _packed(model.deployment),
                "pinned": model.pinned,
            }
            for model in wanted.models
        ],
        "status": wanted.status,
        "status_description": wanted.status_description,
        "left_out": dict(wanted.left_out),
        "pending": sorted(wanted.pending),
        "complete": wanted.complete,
    }


def of_data(data: Mapping[str, Any]) -> Desired:
    """The other way."""
    unpack = base64.b64decode
    return Desired(
        cluster=resources_pb2.ComputeCluster.FromString(unpack(data["cluster"])),
        nodepool=resources_pb2.Nodepool.FromString(unpack(data["nodepool"])),
        apps=tuple(resources_pb2.App.FromString(unpack(app)) for app in data["apps"]),
        models=tuple(
            WantedModel(
                key=ModelKey(*model["key"]),
                message=resources_pb2.Model.FromString(unpack(model["message"])),
                versions=tuple(
                    WantedVersion(
                        local,
                        digest,
                        resources_pb2.ModelVersion.FromString(unpack(message)),
                        resources_pb2.Runner.FromString(unpack(runner)),
                    )
                    for local, digest, message, runner in model["versions"]
                ),
                deployment=resources_pb2.Deployment.FromString(unpack(model["deployment"])),
                pinned=model["pinned"],
            )
            for model in data["models"]
        ),
        status=data["status"],
        status_description=data["status_description"],
        left_out=data["left_out"],
        pending=frozenset((app, model, version) for app, model, version in data["pending"]),
        complete=data["complete"],
    )


def _packed(message: Message) -> str:
    return base64.b64encode(message.SerializeToString()).decode("ascii")
