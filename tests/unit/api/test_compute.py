"""Get and List of places to run: this appliance, with every field that clients read, in pages, and no other one."""

from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from support import graphs
from support.api_world import Client, World

from appliance.api import compute
from appliance.api.compute import Compute
from appliance.api.placement import Places
from appliance.core import machine
from appliance.core.config import Config, Deployment, Placement, Principal

pytestmark = pytest.mark.asyncio(loop_scope="module")

HERE = Placement(user_id="acme", compute_cluster_id="plant", nodepool_id="line-7")
DEPLOYMENTS = (
    Deployment(id="prod-colours", model="colours"),
    Deployment(id="old-colours", model="colours", version="1"),
    Deployment(id="nowhere", model="nothing"),
    Deployment(id="faulty", model="broken"),
)
ACME = resources_pb2.UserAppIDSet(user_id="acme")
STATES = resources_pb2.Nodepool.NodepoolStatus
LISTS = ("ComputeClusters", "Nodepools", "Deployments", "Runners")


def client(world: World, *principals: Principal) -> Client:
    """An API of that place."""
    return world.api(*principals, placement=HERE, deployment=DEPLOYMENTS)


async def ask(client: Client, rpc: str, user: str = "acme", **fields: Any) -> Any:
    """The reply of an RPC about places of a user."""
    kind = getattr(service_pb2, f"{rpc}Request")
    return await client.ask(rpc, kind(user_app_id=resources_pb2.UserAppIDSet(user_id=user), **fields))


async def test_there_is_one_cluster_and_one_nodepool(world: World) -> None:
    """The same by Get and by List."""
    api = client(world)
    cluster = (await ask(api, "GetComputeCluster", compute_cluster_id="plant")).compute_cluster
    assert (cluster.id, cluster.user_id, cluster.cloud_provider.id) == ("plant", "acme", "local")
    assert (cluster.cluster_type, cluster.managed_by, cluster.region) == ("local-dev", "user", "na")
    assert list((await ask(api, "ListComputeClusters")).compute_clusters) == [cluster]
    nodepool = (await ask(api, "GetNodepool", compute_cluster_id="plant", nodepool_id="line-7")).nodepool
    assert nodepool.id == "line-7"
    assert nodepool.compute_cluster == cluster
    assert nodepool.status == STATES.NODEPOOL_STATUS_READY
    assert nodepool.status_description == "8 of 9 models answer."
    assert (nodepool.min_instances, nodepool.max_instances, nodepool.node_count) == (1, 1, 1)
    assert list(nodepool.node_capacity_type.capacity_types) == [1]
    for filters in ({}, {"compute_cluster_id": "plant"}, {"active_usage": True}):
        assert list((await ask(api, "ListNodepools", **filters)).nodepools) == [nodepool]
    assert not cluster.HasField("key")  # in requests it is a PAT


async def test_the_instance_is_this_machine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of it as we may use, with its accelerators."""
    for cached in (compute._instance_type, compute._machine_info, compute._gpus):
        cached.cache_clear()
    monkeypatch.setattr(compute, "accelerators", lambda: ("NVIDIA H200", "NVIDIA H200", ""))
    nodepool = (await ask(client(world), "GetNodepool", nodepool_id="line-7")).nodepool
    for cached in (compute._instance_type, compute._machine_info, compute._gpus):
        cached.cache_clear()
    (instance,) = nodepool.instance_types
    assert instance.compute_info.cpu_limit == str(machine.usable_cpus())
    assert instance.compute_info.cpu_memory == f"{machine.usable_memory() // 2**20}Mi"
    assert instance.compute_info.num_accelerators == 3
    assert list(instance.compute_info.accelerator_type) == ["NVIDIA", "NVIDIA-H200"]
    assert instance.architecture.startswith("linux/")
    assert instance.available_compute_info == instance.compute_info


async def test_a_nodepool_says_whether_anything_answers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to serve is no fault; nothing but faults is one."""
    served = Compute(Config(), world.repository)
    assert served._state()[0] == STATES.NODEPOOL_STATUS_READY
    broken = world.repository._bundles["broken"]
    for bundles, settling, wanted in (
        ({}, False, STATES.NODEPOOL_STATUS_READY),
        ({"broken": broken}, False, STATES.NODEPOOL_STATUS_ERROR),
        ({"broken": broken}, True, STATES.NODEPOOL_STATUS_PENDING),
    ):
        monkeypatch.setattr(world.repository, "_bundles", bundles)
        monkeypatch.setattr(broken, "settling", settling)
        assert served._state()[0] == wanted
        monkeypatch.undo()


async def test_a_deployment_is_shown_with_what_it_serves(world: World) -> None:
    """A model's version, on our nodepool, by the fields of today and the deprecated one."""
    api = client(world)
    found = (await ask(api, "GetDeployment", deployment_id="prod-colours")).deployment
    assert (found.id, found.user_id) == ("prod-colours", "acme")
    assert found.description == "Model tester/tests/colours on this appliance."
    model = found.worker.model
    assert (model.id, model.user_id, model.app_id) == ("colours", graphs.USER, graphs.APP)
    assert model.model_version.id == "2"
    assert found.desired_worker == found.worker
    assert found.deploy_latest_version
    assert found.status == resources_pb2.Deployment.Status.ENABLED
    assert found.nodepools[0].id == found.deployment_nodepools[0].nodepool.id == "line-7"
    assert found.deployment_nodepools[0].compute_cluster.id == "plant"
    assert found.deployment_metrics.aggregate.live_replicas == 1
    assert found.deployment_metrics.nodepool_metrics[0].nodepool_id == "line-7"
    assert found.created_at.seconds <= found.modified_at.seconds
    pinned = (await ask(api, "GetDeployment", deployment_id="old-colours")).deployment
    assert pinned.worker.model.model_version.id == "1"
    assert not pinned.deploy_latest_version


@pytest.mark.parametrize(
    ("deployment", "status", "words"),
    [("nowhere", 1, "There is no model */*/nothing"), ("faulty", 0, "could not be loaded")],
)
async def test_a_deployment_that_serves_nothing_says_why(
    world: World, deployment: str, status: int, words: str
) -> None:
    """It is there all the same, and shown as what it is."""
    found = (await ask(client(world), "GetDeployment", deployment_id=deployment)).deployment
    assert found.status == status
    assert words in found.description
    assert found.worker.model.id
    assert not found.deployment_metrics.aggregate.live_replicas
    assert found.deployment_metrics.aggregate.desired_replicas == 1


async def test_deployments_are_the_configured_ones_and_one_a_model(world: World) -> None:
    """Each can be had by its id."""
    api = client(world)
    found = (await ask(api, "ListDeployments")).deployments
    ids = [deployment.id for deployment in found]
    assert ids[:4] == [table.id for table in DEPLOYMENTS]
    own = [d.worker.model.id for d in found[4:]]
    assert own == ["broken", "colours", "fragile", "gather", "pair", "tensor", "topic", "vector", "wide"]
    for deployment in found:
        assert (await ask(api, "GetDeployment", deployment_id=deployment.id)).deployment == deployment


async def test_filters_of_deployments_are_kept(world: World) -> None:
    """Workflows are not deployed, and nobody goes before another."""
    api = client(world)

    async def count(**filters: Any) -> int:
        return len((await ask(api, "ListDeployments", per_page=1000, **filters)).deployments)

    assert await count(nodepool_id="line-7", compute_cluster_id="plant") == await count() == 13
    assert await count(model_version_ids=["2"]) == 2
    assert await count(model_version_ids=["none"]) == 0
    assert await count(workflow_version_ids=["1"]) == 0
    assert await count(scheduling_priorities=[0]) == 13
    assert await count(scheduling_priorities=[3]) == 0


async def test_runners_are_what_answers(world: World) -> None:
    """One a servable, each one replica, with what its bundle says it takes."""
    api = client(world)
    found = (await ask(api, "ListRunners")).runners
    assert [(r.worker.model.id, r.worker.model.model_version.id) for r in found][:2] == [
        ("colours", "2"),
        ("colours", "1"),
    ]
    assert len(found) == 9
    for runner in found:
        assert runner.num_replicas == runner.min_replicas == runner.runner_metrics.pods_running == 1
        assert runner.nodepool.id == "line-7"
        assert runner.compute_info.cpu_limit
        assert runner.created_at.seconds
        got = await ask(api, "GetRunner", compute_cluster_id="plant", nodepool_id="line-7", runner_id=runner.id)
        assert got.runner == runner
    known = dict(Places(Config(placement=HERE), world.repository).runners())
    assert {runner.id for runner in found} == set(known)


async def test_filters_of_runners_are_kept(world: World) -> None:
    """By version and by replicas."""
    api = client(world)
    assert len((await ask(api, "ListRunners", model_version_ids=["2"])).runners) == 1
    assert len((await ask(api, "ListRunners", min_replicas=1)).runners) == 9
    assert not (await ask(api, "ListRunners", min_replicas=2)).runners


@pytest.mark.parametrize("what", LISTS)
async def test_past_the_end_a_reply_has_only_its_status(world: World, what: str) -> None:
    """Else the Python lister loops for ever (PROTOCOL 0.7)."""
    api = client(world)
    for number in range(1, 30):
        reply = await ask(api, f"List{what}", page=number, per_page=2)
        assert reply.status.code == 10000
        if [field.name for field, _ in reply.ListFields()] == ["status"]:
            break
    else:
        pytest.fail("the pages do not end")
    too_large = await ask(api, f"List{what}", per_page=1001)
    assert too_large.status.code == 11100


@pytest.mark.parametrize("user", ["", "me", "acme", "appliance", graphs.USER])
@pytest.mark.parametrize("what", LISTS)
async def test_the_caller_and_owners_of_models_may_be_named(world: World, what: str, user: str) -> None:
    """SDKs name one of them."""
    assert (await ask(client(world), f"List{what}", user=user)).status.code == 10000


@pytest.mark.parametrize(
    ("rpc", "fields", "code"),
    [
        ("GetComputeCluster", {"compute_cluster_id": "other"}, 25800),
        ("GetComputeCluster", {}, 25800),
        ("GetNodepool", {"compute_cluster_id": "plant", "nodepool_id": "other"}, 25700),
        ("GetNodepool", {"compute_cluster_id": "other", "nodepool_id": "line-7"}, 25800),
        ("GetNodepool", {"compute_cluster_id": "plant"}, 25700),
        ("ListNodepools", {"compute_cluster_id": "other"}, 25800),
        ("GetDeployment", {"deployment_id": "other"}, 25900),
        ("GetDeployment", {}, 25900),
        ("ListDeployments", {"nodepool_id": "other"}, 25700),
        ("ListDeployments", {"compute_cluster_id": "other"}, 25800),
        ("GetRunner", {"runner_id": "other"}, 25600),
        ("GetRunner", {"runner_id": "other", "nodepool_id": "other"}, 25700),
        ("ListRunners", {"nodepool_id": "other"}, 25700),
    ],
)
async def test_other_places_are_refused_by_their_kind(
    world: World, rpc: str, fields: dict[str, str], code: int
) -> None:
    """With a sentence."""
    reply = await ask(client(world), rpc, **fields)
    assert reply.status.code == code
    assert "on this appliance" in reply.status.details


@pytest.mark.parametrize(
    ("rpc", "fields", "code"),
    [
        ("GetComputeCluster", {"compute_cluster_id": "plant"}, 25800),
        ("GetNodepool", {"compute_cluster_id": "plant", "nodepool_id": "line-7"}, 25700),
        ("GetDeployment", {"deployment_id": "prod-colours"}, 25900),
        ("GetRunner", {"runner_id": "x"}, 25600),
        *((f"List{what}", {}, 11101) for what in LISTS),
    ],
)
async def test_places_of_others_are_not_here(world: World, rpc: str, fields: dict[str, str], code: int) -> None:
    """Whatever their ids."""
    reply = await ask(client(world), rpc, user="bob", **fields)
    assert reply.status.code == code
    assert "'bob'" in reply.status.details


async def test_a_principal_sees_what_it_may_use(world: World) -> None:
    """And does not learn what else there is."""
    api = client(world, Principal(name="ada", models=("wide",)))
    assert [r.worker.model.id for r in (await ask(api, "ListRunners")).runners] == ["wide"]
    assert [d.worker.model.id for d in (await ask(api, "ListDeployments")).deployments] == ["wide"]
    for deployment in ("prod-colours", "nowhere"):
        assert (await ask(api, "GetDeployment", deployment_id=deployment)).status.code == 11007
    hidden = next(iter(dict(Places(Config(placement=HERE), world.repository).runners())))
    assert (await ask(api, "GetRunner", runner_id=hidden)).status.code == 11007
    assert (await ask(api, "ListDeployments", user=graphs.USER)).status.code == 10000
    nobody = client(world, Principal(name="bob", models=("none",)))
    assert (await ask(nobody, "ListDeployments", user=graphs.USER)).status.code == 11101


async def test_a_new_configuration_names_places_anew(world: World) -> None:
    """As a reload brings it."""
    api = client(world)
    assert (await ask(api, "GetNodepool", nodepool_id="line-8")).status.code == 25700
    api.api.configure(Config(placement=Placement(nodepool_id="line-8"), auth=api.api._config.auth))
    assert (await ask(api, "GetNodepool", user="", nodepool_id="line-8")).status.code == 10000
