"""Compute clusters, nodepools, deployments and runners: this appliance as Clarifai's clients look at places to run.

There is one cluster and one nodepool, a deployment for each model and those that the configuration adds, and a runner
for each servable. A caller sees those of the models that it may use. What these are called: `placement.Places`.
"""

import platform
from collections.abc import Iterable
from functools import lru_cache

from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import messages, status
from appliance.api.catalogue import page
from appliance.api.context import Context
from appliance.api.placement import Deployed, Places
from appliance.catalog.view import State, Version, View
from appliance.core.config import Config
from appliance.core.errors import CapacityError, DeploymentDisabled, PlacementUnknown, UnknownUser
from appliance.core.machine import accelerators, usable_cpus, usable_memory
from appliance.tasks.servable import Servable

_PROVIDER = resources_pb2.CloudProvider(id="local", name="On premises")
_REGION = "na"
_INSTANCE = "local"
"""The names that Clarifai's own tools register a machine of the customer's with (PROTOCOL 5.1)."""

_ON_DEMAND = resources_pb2.NodeCapacityType(capacity_types=[resources_pb2.NodeCapacityType.CapacityType.ON_DEMAND_TYPE])
_ARCHITECTURES = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}


class Compute:
    """The reading RPCs about places; each sees only what its caller may use."""

    def __init__(self, config: Config, repository: View[Servable]) -> None:
        self.config = config
        self._repository = repository

    # ---- compute clusters and nodepools ----

    async def get_compute_cluster(
        self, context: Context, request: service_pb2.GetComputeClusterRequest
    ) -> service_pb2.SingleComputeClusterResponse:
        """The one cluster."""
        places = self._places()
        if not request.compute_cluster_id:
            raise PlacementUnknown("compute_cluster", "")
        places.check_nodepool(request.user_app_id.user_id, request.compute_cluster_id, "", context.grant)
        return service_pb2.SingleComputeClusterResponse(
            status=status.success(context.req_id), compute_cluster=self._cluster(places)
        )

    async def list_compute_clusters(
        self, context: Context, request: service_pb2.ListComputeClustersRequest
    ) -> service_pb2.MultiComputeClusterResponse:
        """The one cluster."""
        places = self._of(request.user_app_id.user_id, context)
        return service_pb2.MultiComputeClusterResponse(
            status=status.success(context.req_id),
            compute_clusters=page([self._cluster(places)], request.page, request.per_page),
        )

    async def get_nodepool(
        self, context: Context, request: service_pb2.GetNodepoolRequest
    ) -> service_pb2.SingleNodepoolResponse:
        """The one nodepool; it is in use as long as we run."""
        places = self._places()
        if not request.nodepool_id:
            raise PlacementUnknown("nodepool", "")
        places.check_nodepool(
            request.user_app_id.user_id, request.compute_cluster_id, request.nodepool_id, context.grant
        )
        return service_pb2.SingleNodepoolResponse(
            status=status.success(context.req_id), nodepool=self._nodepool(places)
        )

    async def list_nodepools(
        self, context: Context, request: service_pb2.ListNodepoolsRequest
    ) -> service_pb2.MultiNodepoolResponse:
        """The one nodepool; it is in use as long as we run."""
        places = self._of(request.user_app_id.user_id, context, request.compute_cluster_id)
        return service_pb2.MultiNodepoolResponse(
            status=status.success(context.req_id),
            nodepools=page([self._nodepool(places)], request.page, request.per_page),
        )

    # ---- deployments ----

    async def get_deployment(
        self, context: Context, request: service_pb2.GetDeploymentRequest
    ) -> service_pb2.SingleDeploymentResponse:
        """One deployment; its `description` says why it serves nothing, if that is so."""
        places = self._places()
        found = places.deployment(request.user_app_id.user_id, request.deployment_id, context.grant)
        return service_pb2.SingleDeploymentResponse(
            status=status.success(context.req_id), deployment=self._deployment(places, found)
        )

    async def list_deployments(
        self, context: Context, request: service_pb2.ListDeploymentsRequest
    ) -> service_pb2.MultiDeploymentResponse:
        """The deployments whose models the caller may use."""
        places = self._of(request.user_app_id.user_id, context, request.compute_cluster_id, request.nodepool_id)
        allowed = [d for d in places.deployments() if context.grant.allows(places.key_of(d))]
        found = [
            message
            for message in (self._deployment(places, deployed) for deployed in allowed)
            if _among(message.worker.model.model_version.id, request.model_version_ids)
            # Models are deployed here, no workflows; and nobody goes before another.
            and not request.workflow_version_ids
            and _among(0, request.scheduling_priorities)
        ]
        return service_pb2.MultiDeploymentResponse(
            status=status.success(context.req_id), deployments=page(found, request.page, request.per_page)
        )

    # ---- runners ----

    async def get_runner(
        self, context: Context, request: service_pb2.GetRunnerRequest
    ) -> service_pb2.SingleRunnerResponse:
        """One servable as a runner."""
        places = self._places()
        user_id = request.user_app_id.user_id
        places.check_nodepool("", request.compute_cluster_id, request.nodepool_id, context.grant)
        if not places.is_ours(user_id, context.grant):
            raise PlacementUnknown("runner", request.runner_id, user_id)
        version = places.runner(request.runner_id, context.grant)
        return service_pb2.SingleRunnerResponse(
            status=status.success(context.req_id), runner=self._runner(places, request.runner_id, version)
        )

    async def list_runners(
        self, context: Context, request: service_pb2.ListRunnersRequest
    ) -> service_pb2.MultiRunnerResponse:
        """The servables that answer, of the models that the caller may use; each is one replica."""
        places = self._of(request.user_app_id.user_id, context, request.compute_cluster_id, request.nodepool_id)
        found = [
            self._runner(places, runner_id, version)
            for runner_id, version in places.runners()
            if context.grant.allows(version.config.key)
            and _among(version.id, request.model_version_ids)
            and request.min_replicas <= 1
        ]
        return service_pb2.MultiRunnerResponse(
            status=status.success(context.req_id), runners=page(found, request.page, request.per_page)
        )

    # ---- messages ----

    def here(self) -> resources_pb2.Nodepool:
        """This appliance as a nodepool, in its cluster, as of now."""
        return self._nodepool(self._places())

    def _cluster(self, places: Places) -> resources_pb2.ComputeCluster:
        return resources_pb2.ComputeCluster(
            id=places.compute_cluster_id,
            description="Appliances on the customer's own machines.",
            cloud_provider=_PROVIDER,
            region=_REGION,
            user_id=places.user_id,
            visibility=messages.PRIVATE,
            cluster_type="local-dev",
            managed_by="user",
        )

    def _nodepool(self, places: Places) -> resources_pb2.Nodepool:
        state, why = self._state()
        return resources_pb2.Nodepool(
            id=places.nodepool_id,
            description="One inference appliance.",
            compute_cluster=self._cluster(places),
            node_capacity_type=_ON_DEMAND,
            instance_types=[_instance_type()],
            min_instances=1,
            max_instances=1,
            node_count=1,
            visibility=messages.PRIVATE,
            status=state,
            status_description=why,
        )

    def _state(self) -> "tuple[resources_pb2.Nodepool.NodepoolStatus.ValueType, str]":
        """Whether anything answers here, and how much of it. No model's name: not everybody may know each."""
        states = resources_pb2.Nodepool.NodepoolStatus
        bundles = self._repository.bundles
        ready = sum(any(version.ready for version in bundle.versions.values()) for bundle in bundles)
        loading = sum(
            bundle.settling or any(v.state in (State.LOADING, State.SETTLING) for v in bundle.versions.values())
            for bundle in bundles
        )
        text = f"{ready} of {len(bundles)} models answer" + (f", {loading} load" if loading else "") + "."
        if ready or not bundles:
            return states.NODEPOOL_STATUS_READY, text
        return states.NODEPOOL_STATUS_PENDING if loading else states.NODEPOOL_STATUS_ERROR, text

    def _deployment(self, places: Places, deployed: Deployed) -> resources_pb2.Deployment:
        version, why = self._standing(places, deployed)
        live = version is not None and version.ready
        if version is not None:
            model = messages.model_brief(version)
        else:
            key = places.key_of(deployed)
            model = resources_pb2.Model(id=key.model_id, user_id=key.user_id, app_id=key.app_id)
            model.model_version.id = deployed.ids.version_id
        worker = resources_pb2.Worker(model=model)
        nodepool = self._nodepool(places)
        summary = resources_pb2.DeploymentMetricsSummary(desired_replicas=1, live_replicas=int(live))
        states = resources_pb2.Deployment.Status
        message = resources_pb2.Deployment(
            id=deployed.id,
            user_id=places.user_id,
            autoscale_config=resources_pb2.AutoscaleConfig(min_replicas=1, max_replicas=1),
            nodepools=[nodepool],
            scheduling_choice=resources_pb2.Deployment.SchedulingChoice.PRICE,
            visibility=messages.PRIVATE,
            description=why or f"Model {places.key_of(deployed)} on this appliance.",
            worker=worker,
            desired_worker=worker,
            deploy_latest_version=not deployed.ids.version_id,
            deployment_nodepools=[
                resources_pb2.DeploymentNodepool(
                    id=nodepool.id, compute_cluster=nodepool.compute_cluster, nodepool=nodepool
                )
            ],
            deployment_metrics=resources_pb2.DeploymentMetrics(
                aggregate=summary,
                nodepool_metrics=[
                    resources_pb2.NodepoolDeploymentMetrics(
                        compute_cluster_id=places.compute_cluster_id, nodepool_id=places.nodepool_id, metrics=summary
                    )
                ],
            ),
            status=states.DISABLED if version is None else states.ENABLED,
        )
        if version is not None:
            message.created_at.CopyFrom(messages.timestamp(version.first_seen))
            message.modified_at.CopyFrom(messages.timestamp(version.loaded_at or version.first_seen))
        return message

    def _standing(self, places: Places, deployed: Deployed) -> tuple[Version[Servable] | None, str]:
        """The version behind a deployment, if there is one, and why it does not answer, if so."""
        try:
            version = places.version_of(deployed)
        except (DeploymentDisabled, CapacityError) as error:
            return None, str(error)
        if not version.ready:
            key = version.config.key
            try:
                self._repository.answering(key.user_id, key.app_id, key.model_id, version.id)
            except CapacityError as error:
                return version, str(error)
        return version, ""

    def _runner(self, places: Places, runner_id: str, version: Version[Servable]) -> resources_pb2.Runner:
        return resources_pb2.Runner(
            id=runner_id,
            description=f"Model {version.config.key} version {version.id}.",
            created_at=messages.timestamp(version.first_seen),
            modified_at=messages.timestamp(version.loaded_at or version.first_seen),
            worker=resources_pb2.Worker(model=messages.model_brief(version)),
            nodepool=self._nodepool(places),
            compute_info=compute_info(version),
            num_replicas=1,
            min_replicas=1,
            runner_metrics=resources_pb2.RunnerMetrics(pods_total=1, pods_running=1),
        )

    # ---- helpers ----

    def _places(self) -> Places:
        return Places(self.config, self._repository)

    def _of(self, user_id: str, context: Context, cluster_id: str = "", nodepool_id: str = "") -> Places:
        """Raises: UnknownUser: whose lists are not here. PlacementUnknown: the list is of another place."""
        places = self._places()
        if not places.is_ours(user_id, context.grant):
            raise UnknownUser(
                f"This appliance lists the places of user {places.user_id!r} only, and {user_id!r} was asked for."
            )
        places.check_nodepool("", cluster_id, nodepool_id, context.grant)
        return places


def _among(value: object, wanted: Iterable[object]) -> bool:
    """Whether a filter lets a value pass; one that names nothing lets all pass."""
    names = list(wanted)
    return not names or value in names


@lru_cache(maxsize=1)
def _instance_type() -> resources_pb2.InstanceType:
    """This machine, as much of it as we may use; that does not change while we run."""
    machine = platform.machine()
    info = _machine_info()
    return resources_pb2.InstanceType(
        id=_INSTANCE,
        description=f"{platform.system()} on {machine}",
        compute_info=info,
        available_compute_info=info,
        cloud_provider=_PROVIDER,
        region=_REGION,
        allowed_capacity_types=_ON_DEMAND,
        architecture=_ARCHITECTURES.get(machine, f"linux/{machine}"),
    )


@lru_cache(maxsize=1)
def _machine_info() -> resources_pb2.ComputeInfo:
    return resources_pb2.ComputeInfo(
        cpu_limit=str(usable_cpus()),
        cpu_memory=f"{usable_memory() // 2**20}Mi",
        num_accelerators=len(_gpus()),
        accelerator_type=sorted(set(_gpus())),
    )


@lru_cache(maxsize=1)
def _gpus() -> tuple[str, ...]:
    """The accelerators as Clarifai writes them: NVIDIA-L40S."""
    return tuple(_written(name) or "NVIDIA" for name in accelerators())


def _written(name: str) -> str:
    return "-".join(name.split())


def compute_info(version: Version[Servable]) -> resources_pb2.ComputeInfo:
    """What a runner takes: what its bundle says, else the machine; and the GPU that it really is on."""
    info = resources_pb2.ComputeInfo()
    info.CopyFrom(messages.version_full(version).inference_compute_info)
    if not info.ByteSize():
        info.cpu_limit, info.cpu_memory = _machine_info().cpu_limit, _machine_info().cpu_memory
    servable = version.servable
    if servable is not None and servable.model.device.kind == "gpu":
        info.num_accelerators = max(1, info.num_accelerators)
        if not info.accelerator_type:
            name = servable.model.device.name
            info.accelerator_type.extend([_written(name)] if name else _gpus()[servable.model.device.index :][:1])
    return info
