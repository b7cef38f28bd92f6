"""What shall be registered: as the stock runner registers its own, from the real inventory and catalog."""

import json
from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2
from support.api_world import World

from appliance.core import machine
from appliance.core.config import Catalog, Config, Deployment, Orchestrator, Placement
from appliance.core.errors import ConfigError
from appliance.orchestrator.desired import DIGEST, Desired, as_data, desired, of_data

pytestmark = pytest.mark.asyncio(loop_scope="module")

THERE = Orchestrator(api_base="https://api.example.com", user_id="acme", site="hall 3")


def wanted(world: World, orchestrator: Orchestrator = THERE, **sections: Any) -> Desired:
    """What an appliance with these sections wants."""
    key = world.repository.find("", "", "colours").key
    assert key is not None
    usual = Catalog(user_id=key.user_id, app_id=key.app_id)
    placement = Placement(compute_cluster_id="plant", nodepool_id="line-7")
    config = Config(orchestrator=orchestrator, **{"placement": placement, "catalog": usual, **sections})
    return desired(config, world.repository)


def model(found: Desired, id: str) -> Any:
    """One model of it."""
    return next(each for each in found.models if each.message.id == id)


async def test_an_appliance_that_is_enrolled_nowhere_says_how(world: World) -> None:
    with pytest.raises(ConfigError, match="appliance orchestrator enroll"):
        wanted(world, Orchestrator())


async def test_the_nodepool_is_this_machine(world: World) -> None:
    found = wanted(world)
    assert (found.cluster.id, found.cluster.user_id, found.cluster.cluster_type) == ("plant", "acme", "local-dev")
    assert not found.cluster.HasField("key")
    assert (found.nodepool.id, found.nodepool.compute_cluster.user_id) == ("line-7", "acme")
    assert list(found.nodepool.node_capacity_type.capacity_types) == [1]
    (instance,) = found.nodepool.instance_types
    assert instance.compute_info.cpu_limit == str(machine.usable_cpus())
    assert instance.architecture
    assert found.nodepool.metadata["site"] == "hall 3"
    assert found.nodepool.metadata["base_url"] == Config().server.base_url
    assert found.status == resources_pb2.Nodepool.NodepoolStatus.NODEPOOL_STATUS_READY
    assert not found.nodepool.HasField("created_at")
    assert found.nodepool.status == 0, "it is told by PostNodepoolStatus"


async def test_a_model_is_registered_with_what_may_be_called_on_it(world: World) -> None:
    colours = model(wanted(world), "colours")
    assert (colours.message.user_id, colours.message.app_id) == ("acme", "tests")
    newest = colours.versions[0]
    assert newest.message.pretrained_model_config.local_dev
    assert not newest.message.id, "the orchestrator gives it one"
    assert "predict" in [signature.name for signature in newest.message.method_signatures]
    assert newest.message.output_info.data.concepts[0].user_id == "acme"
    assert newest.message.metadata[DIGEST] == newest.digest
    assert (newest.runner.num_replicas, newest.runner.worker.model.id) == (1, "colours")
    assert newest.runner.compute_info.cpu_limit


async def test_the_deployment_runs_the_newest_version(world: World) -> None:
    colours = model(wanted(world), "colours")
    assert (colours.deployment.id, colours.deployment.user_id) == ("colours", "acme")
    assert colours.pinned == colours.versions[0].local
    (place,) = colours.deployment.nodepools
    assert (place.id, place.compute_cluster.id, place.compute_cluster.user_id) == ("line-7", "plant", "acme")
    assert not colours.deployment.deploy_latest_version


async def test_a_configured_deployment_goes_before_the_models_own(world: World) -> None:
    """A nodepool has one deployment of a model (PROTOCOL 5.5)."""
    colours = model(wanted(world, deployment=(Deployment(id="prod", model="colours", version="1"),)), "colours")
    assert (colours.deployment.id, colours.pinned) == ("prod", "1")
    other = model(wanted(world, deployment=(Deployment(id="prod", model="colours", version="99"),)), "colours")
    assert (other.deployment.id, other.pinned) == ("colours", other.versions[0].local), "it has no such version"


async def test_a_digest_tells_versions_apart_and_appliances_not(world: World) -> None:
    first, again = wanted(world), wanted(world, placement=Placement(nodepool_id="another"))
    digests = [[version.digest for each in found.models for version in each.versions] for found in (first, again)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(digests[0])


async def test_models_that_cannot_be_registered_are_named_with_the_reason(world: World) -> None:
    found = wanted(world)
    assert found.left_out, "the world has a bundle that does not load"
    assert set(found.left_out.values()) == {"no version of it answers"}
    assert len({app.id for app in found.apps}) == len(found.apps)


async def test_one_app_for_all(world: World) -> None:
    found = wanted(world, Orchestrator(api_base="https://api.example.com", user_id="acme", app_id="hall-3"))
    assert [app.id for app in found.apps] == ["hall-3"]
    assert {each.message.app_id for each in found.models} == {"hall-3"}


async def test_it_survives_as_json(world: World) -> None:
    found = wanted(world)
    assert of_data(json.loads(json.dumps(as_data(found)))) == found
