"""Which ids this appliance has as a place to run, and what a request that names a place means."""

from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from support import graphs
from support.api_world import IDS, PICTURE, Client, World, predict_request

from appliance.api.auth import Grant, Meter
from appliance.api.placement import Ids, Places, chosen, host_id
from appliance.catalog.state import write_held
from appliance.core.config import Catalog, Config, Deployment, Placement, Principal
from appliance.core.types import ModelKey

pytestmark = pytest.mark.asyncio(loop_scope="module")

HERE = Placement(user_id="acme", compute_cluster_id="plant", nodepool_id="line-7")
DEPLOYMENTS = (
    Deployment(id="prod-colours", model="colours"),
    Deployment(id="old-colours", model="colours", user_id=graphs.USER, app_id=graphs.APP, version="1"),
    Deployment(id="nowhere", model="nothing"),
    Deployment(id="lost-version", model="colours", version="9"),
    Deployment(id="faulty", model="broken"),
    Deployment(id="kept", model="gather"),
)
ANYBODY = Grant((Meter(Principal(name="ada", user_id="ada"), lambda: 0.0),))


def places(world: World, **config: Any) -> Places:
    """The ids of an appliance so configured."""
    return Places(Config(**{"placement": HERE, "deployment": DEPLOYMENTS, **config}), world.repository)


def client(world: World, *principals: Principal) -> Client:
    """An API of that place."""
    return world.api(*principals, placement=HERE, deployment=DEPLOYMENTS)


# ---- ids -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("edge-7.plant.example.com", "edge-7"),
        ("edge 7", "edge-7"),
        ("", "appliance"),
        ("...", "appliance"),
        ("-a_b-", "a_b"),
        ("ß" * 3, "appliance"),
        ("x" * 300, "x" * 64),
    ],
)
async def test_without_configuration_the_nodepool_is_called_like_the_machine(name: str, wanted: str) -> None:
    """As an id; whatever the machine is called."""
    assert host_id(name) == wanted


async def test_without_configuration_everything_has_an_id(world: World) -> None:
    """The owner is the catalog's."""
    made = Places(Config(), world.repository)
    assert (made.user_id, made.compute_cluster_id) == ("appliance", "on-prem")
    assert made.nodepool_id
    assert len(made.deployments()) == 9


async def test_a_models_own_deployment_is_called_like_the_model(world: World) -> None:
    """Made distinct where its user or app is not the usual one, as several may have a model of that name."""
    usual = places(world, catalog=Catalog(user_id=graphs.USER, app_id=graphs.APP))
    assert usual.deployment_id(ModelKey(graphs.USER, graphs.APP, "colours")) == "colours"
    names = {usual.deployment_id(ModelKey(*owner, "colours")) for owner in (("a", "b"), ("a", "c"), ("ab", "c"))}
    assert len(names) == 3
    assert all(name.startswith("colours-") for name in names)
    assert len(usual.deployment_id(ModelKey("a", "b", "x" * 64))) == 64


async def test_the_configuration_has_the_first_word_about_an_id(world: World) -> None:
    """A deployment called like a model may mean another one."""
    taken = places(
        world,
        catalog=Catalog(user_id=graphs.USER, app_id=graphs.APP),
        deployment=(Deployment(id="colours", model="wide"),),
    )
    found = {deployed.id: deployed.ids.model_id for deployed in taken.deployments()}
    assert found["colours"] == "wide"
    assert found["wide"] == "wide"


async def test_runner_ids_stay_and_differ(world: World) -> None:
    """By place, model and version."""
    first, again = (dict(places(world).runners()) for _ in range(2))
    assert set(first) == set(again)
    assert len(first) == 9  # two versions of colours, one of the others but for the broken one
    elsewhere = places(world, placement=HERE.model_copy(update={"nodepool_id": "line-8"}))
    assert not set(first) & set(dict(elsewhere.runners()))


# ---- what a request means --------------------------------------------------------------------------------------------


def meant(world: World, selector: resources_pb2.RunnerSelector, *asked: str) -> Ids:
    """What `chosen` says, with the test's ids before the model unless all four are given."""
    ids = Ids(*asked) if len(asked) == 4 else Ids(graphs.USER, graphs.APP, *asked)
    return chosen(selector, ids, ANYBODY, Config(placement=HERE, deployment=DEPLOYMENTS), world.repository)


def by(**selector: Any) -> resources_pb2.RunnerSelector:
    """A selector."""
    return resources_pb2.RunnerSelector(**selector)


async def test_without_a_place_a_request_means_what_it_says(world: World) -> None:
    """Also one that has an empty selector, as generated clients send."""
    for selector in (by(), by(nodepool={}), by(deployment={}, runner={})):
        assert meant(world, selector, "no", "such") == (graphs.USER, graphs.APP, "no", "such")


async def test_a_deployment_says_which_model_where_the_request_does_not(world: World) -> None:
    """The request's user and app are then the deployment's, as on the REST path of deployments."""
    selector = by(deployment={"id": "prod-colours", "user_id": "acme"})
    assert meant(world, selector, "acme", "", "", "") == (graphs.USER, graphs.APP, "colours", "")
    assert meant(world, selector, "colours", "2") == (graphs.USER, graphs.APP, "colours", "2")
    pinned = by(deployment={"id": "old-colours"})
    assert meant(world, pinned, "", "", "colours", "") == (graphs.USER, graphs.APP, "colours", "1")


async def test_a_runner_is_one_version(world: World) -> None:
    """Also without a model."""
    for runner_id, version in places(world).runners():
        ids = meant(world, by(runner={"id": runner_id}), "", "")
        assert ids == (graphs.USER, graphs.APP, version.config.key.model_id, version.id)


@pytest.mark.parametrize("user", ["", "me", "acme", "appliance", "ada", graphs.USER])
@pytest.mark.parametrize("kind", ["deployment", "nodepool"])
async def test_a_place_of_anybody_who_may_be_meant_is_ours(world: World, user: str, kind: str) -> None:
    """Old SDKs name the model's owner, new ones the caller (PROTOCOL 2.2, 2.3)."""
    cluster = {"id": "plant", "user_id": user}
    selector = {
        "deployment": by(deployment={"id": "prod-colours", "user_id": user}),
        "nodepool": by(nodepool={"id": "line-7", "compute_cluster": cluster}),
    }[kind]
    assert meant(world, selector, "colours", "").model_id == "colours"


OURS = {"id": "plant", "user_id": "acme"}


@pytest.mark.parametrize(
    ("selector", "code", "words"),
    [
        (by(deployment={"id": "prod"}), 25900, "no deployment 'prod' on"),
        (by(deployment={"id": "prod-colours", "user_id": "bob"}), 25900, "'prod-colours' of user 'bob'"),
        (by(nodepool={"id": "line-8", "compute_cluster": OURS}), 25700, "no nodepool 'line-8'"),
        (by(nodepool={"id": "line-7", "compute_cluster": {"id": "p"}}), 25800, "no compute cluster 'p'"),
        (by(nodepool={"compute_cluster": {"id": "p"}}), 25800, "no compute cluster 'p'"),
        (
            by(nodepool={"id": "line-7", "compute_cluster": {"id": "plant", "user_id": "bob"}}),
            25700,
            "'line-7' of user 'bob'",
        ),
        (by(runner={"id": "f" * 32}), 25600, "no runner 'ffff"),
        (by(runner={"nodepool": {"id": "line-8"}}), 25700, "line-8"),
        (by(deployment={"id": "prod-colours"}, nodepool={"id": "line-8"}), 25700, "line-8"),
    ],
    ids=str,
)
async def test_any_other_place_is_refused(
    world: World, selector: resources_pb2.RunnerSelector, code: int, words: str
) -> None:
    """By the number of its kind; every call that predicts."""
    request = predict_request("colours", PICTURE)
    request.runner_selector.CopyFrom(selector)
    for rpc in ("PostModelOutputs", "GenerateModelOutputs", "StreamModelOutputs"):
        reply = await client(world).ask(rpc, request)
        assert reply.status.code == code
        assert words in reply.status.details
        assert "leave the selector out" in reply.status.details


@pytest.mark.parametrize(
    ("deployment", "model", "version", "words"),
    [
        ("prod-colours", "wide", "", "serves model tester/tests/colours, and not tester/tests/wide;"),
        ("prod-colours", "nothing", "", "and not tester/tests/nothing"),
        ("old-colours", "colours", "2", "colours version 1, and not tester/tests/colours version 2"),
    ],
)
async def test_a_deployment_of_another_model_is_refused(
    world: World, deployment: str, model: str, version: str, words: str
) -> None:
    """With what it serves."""
    request = predict_request(model, PICTURE, version=version)
    request.runner_selector.deployment.id = deployment
    reply = await client(world).ask("PostModelOutputs", request)
    assert reply.status.code == 25901
    assert words in reply.status.details


async def test_a_runner_of_another_version_is_refused(world: World) -> None:
    """Likewise."""
    runner = next(runner_id for runner_id, version in places(world).runners() if version.id == "2")
    request = predict_request("colours", PICTURE, version="1")
    request.runner_selector.runner.id = runner
    reply = await client(world).ask("PostModelOutputs", request)
    assert reply.status.code == 25602
    assert "version 2, and not tester/tests/colours version 1" in reply.status.details


@pytest.mark.parametrize(
    ("deployment", "code", "words"),
    [
        ("nowhere", 25903, "means model */*/nothing. There is no model"),
        ("lost-version", 25903, "no version '9'"),
        ("faulty", 21350, "could not be loaded"),
    ],
)
async def test_a_deployment_without_a_model_that_answers_says_why(
    world: World, deployment: str, code: int, words: str
) -> None:
    """Gone, or failed."""
    request = service_pb2.PostModelOutputsRequest(inputs=predict_request("colours", PICTURE).inputs)
    request.runner_selector.deployment.id = deployment
    reply = await client(world).ask("PostModelOutputs", request)
    assert reply.status.code == code
    assert words in reply.status.details


async def test_a_deployment_of_a_model_that_is_held_back_says_so(world: World) -> None:
    """To those who ask for it, and to those who predict."""
    state = world.folder / "state"
    write_held(state, {"gather": frozenset({"1"})})
    await world.repository.look()
    try:
        api = client(world)
        request = service_pb2.PostModelOutputsRequest(inputs=predict_request("colours", PICTURE).inputs)
        request.runner_selector.deployment.id = "kept"
        reply = await api.ask("PostModelOutputs", request)
        assert reply.status.code == 25903
        assert "version 1 held back by a rollback" in reply.status.details
        found = await api.ask("GetDeployment", service_pb2.GetDeploymentRequest(user_app_id=IDS, deployment_id="kept"))
        assert found.deployment.status == resources_pb2.Deployment.Status.DISABLED
        assert "held back by a rollback" in found.deployment.description
        assert not found.deployment.deployment_metrics.aggregate.live_replicas
    finally:
        write_held(state, {})
        await world.repository.look()
        await world.repository.wait_settled()


async def test_a_place_does_not_open_a_model_to_those_who_may_not_use_it(world: World) -> None:
    """Neither by deployment nor by runner; and nobody learns which model it is."""
    api = client(world, Principal(name="ada", models=("wide",)))
    request = service_pb2.PostModelOutputsRequest(inputs=predict_request("colours", PICTURE).inputs)
    runner = next(r for r, version in places(world).runners() if version.config.key.model_id == "colours")
    for selector in (by(deployment={"id": "prod-colours"}), by(runner={"id": runner})):
        request.runner_selector.CopyFrom(selector)
        for model in ("", "wide"):
            request.model_id = model
            reply = await api.ask("PostModelOutputs", request)
            assert reply.status.code == 11007
            assert "tester/tests/colours" not in reply.status.details


async def test_answers_are_the_same_as_without_a_place(world: World) -> None:
    """And from the version that was meant."""
    api = client(world)
    plain = await api.predict("colours", PICTURE)
    request = predict_request("colours", PICTURE)
    for selector, version in (
        (by(deployment={"id": "prod-colours"}), "2"),
        (by(deployment={"id": "old-colours"}), "1"),
        (by(nodepool={"id": "line-7", "compute_cluster": OURS}), "2"),
    ):
        request.runner_selector.CopyFrom(selector)
        reply = await api.ask("PostModelOutputs", request)
        assert reply.status.code == 10000
        assert reply.outputs[0].model.model_version.id == version
        assert reply.outputs[0].data == plain.outputs[0].data
