"""Workflows: every input through a graph of models, each node's output with its own status."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import yaml
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import graphs, pictures
from support.api_world import IDS, PICTURE, QUICK, Client, World, predict_request, soon

from appliance.api.predict import Predictions
from appliance.catalog.view import State
from appliance.catalog.workflows import Workflows
from appliance.core.config import Catalog, Limits, Placement, Principal
from appliance.core.errors import Draining, Overloaded
from appliance.core.types import RpcAbort, RpcStatus

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLACK = pictures.png(np.zeros((8, 8, 3), np.uint8))
Make = Callable[..., Awaitable[Client]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """`World` with more models: `narrow` gives two numbers back; `same` (of three) and `both` are declared methods."""
    made = World(tmp_path_factory.mktemp("world"))
    graphs.write_raw(made.root / "narrow", graphs.identity_model(("batch", 2)), **QUICK)
    array = {"type": "ndarray"}
    same = {"name": "predict", "arguments": [{"name": "x", **array}], "returns": {"output": "y", **array}}
    graphs.write_raw(made.root / "same", methods=[same])
    items = [{"name": name, "output": name, **array} for name in ("sum", "product")]
    both = {
        "name": "predict",
        "arguments": [{"name": name, **array} for name in "ab"],
        "returns": {"type": "named_fields", "items": items},
    }
    graphs.write_raw(made.root / "both", graphs.two_in_two_out_model(), methods=[both])
    async with made.opened():
        yield made


def node(name: str, model: str, *inputs: str, **more: Any) -> dict[str, Any]:
    """A node of a workflow."""
    ids = [{"node_id": other} for other in inputs]
    return {"id": name, "model": {"model_id": model}, **({"node_inputs": ids} if ids else {}), **more}


@pytest.fixture
def serving(world: World, tmp_path: Path) -> Make:
    """An API that serves workflows: `await serving({id: nodes}, principals…, section=…)`."""

    async def make(flows: dict[str, list[dict[str, Any]]], *principals: Principal, **sections: Any) -> Client:
        for name, nodes in flows.items():
            content = {"id": name, "user_id": graphs.USER, "app_id": graphs.APP, "nodes": nodes}
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"workflow": content}), encoding="utf-8")
        workflows = Workflows(Catalog(workflows=tmp_path, settle_s=0))
        await workflows.look()
        assert not [row for row in workflows.describe() if not row["workflow"]]
        return world.api(*principals, workflows=workflows, **sections)

    return make


def flow_request(*inputs: Any, workflow: str = "flow", **fields: Any) -> service_pb2.PostWorkflowResultsRequest:
    """A request with these inputs: messages, picture bytes or texts."""
    given = predict_request("", *inputs).inputs
    return service_pb2.PostWorkflowResultsRequest(user_app_id=IDS, workflow_id=workflow, inputs=given, **fields)


async def results(client: Client, *inputs: Any, **fields: Any) -> Any:
    """The reply to a request."""
    return await client.ask("PostWorkflowResults", flow_request(*inputs, **fields))


def codes(reply: Any) -> list[list[int]]:
    """The outputs' codes of each result."""
    return [[output.status.code for output in result.outputs] for result in reply.results]


def floats(data: resources_pb2.Data) -> list[float]:
    """An array's numbers."""
    return np.frombuffer(data.ndarray.buffer, np.float32).tolist()


def vector_input(*numbers: float, input_id: str = "") -> resources_pb2.Input:
    """An input with one array."""
    values = np.array(numbers, np.float32)
    array = resources_pb2.NDArray(buffer=values.tobytes(), shape=values.shape, dtype="float32")
    return resources_pb2.Input(id=input_id, data=resources_pb2.Data(ndarray=array))


# ---- answers ---------------------------------------------------------------------------------------------------------


async def test_every_node_gives_what_its_model_gives(serving: Make) -> None:
    """For each input, in the workflow's order; the input is named, and the workflow told."""
    client = await serving({"flow": [node("b", "tensor", "a"), node("a", "vector"), node("c", "colours")]})
    reply = await results(client, resources_pb2.Input(id="mine", data={"image": {"base64": PICTURE}}), BLACK)
    assert reply.status.code == 10000
    assert [output.model.id for output in reply.results[0].outputs] == ["vector", "tensor", "colours"]
    embedded, passed, classified = reply.results[0].outputs
    alone = {name: (await client.predict(name, PICTURE)).outputs[0] for name in ("vector", "colours")}
    assert embedded.data == alone["vector"].data
    assert floats(passed.data) == list(embedded.data.embeddings[0].vector)
    assert classified.data == alone["colours"].data
    assert classified.model == alone["colours"].model
    for index, result in enumerate(reply.results):
        assert result.status.code == 10000
        assert len(result.id) == 32
        assert result.created_at.seconds
        assert not result.suppress_output
        assert {output.input.id for output in result.outputs} == {result.input.id}
        assert not result.input.data.ByteSize()  # bytes are not sent back
        assert (result.input.id == "mine") == (index == 0)
        assert {output.status.req_id for output in result.outputs} == {reply.status.req_id}
    assert reply.workflow.id == "flow"
    assert [found.id for found in reply.workflow.nodes] == ["a", "b", "c"]
    assert (
        reply.workflow
        == (
            await client.ask("GetWorkflow", service_pb2.GetWorkflowRequest(user_app_id=IDS, workflow_id="flow"))
        ).workflow
    )


async def test_128_inputs_go_through_together_and_no_more(serving: Make) -> None:
    """As with a model."""
    client = await serving({"flow": [node("a", "tensor"), node("b", "tensor", "a")]})
    reply = await results(client, *(vector_input(i, 1, 2, input_id=f"i{i}") for i in range(128)))
    assert reply.status.code == 10000
    assert [floats(result.outputs[1].data)[0] for result in reply.results] == list(range(128))
    assert [result.input.id for result in reply.results] == [f"i{i}" for i in range(128)]
    assert (await results(client, *["x"] * 129)).status.code == 30105
    assert (await results(client)).status.code == 39999


async def test_suppressed_nodes_give_no_output(serving: Make) -> None:
    """What they computed is used all the same; and their failing counts."""
    client = await serving(
        {
            "flow": [node("a", "vector", suppress_output=True), node("b", "tensor", "a")],
            "silent": [node("a", "vector", suppress_output=True)],
        }
    )
    reply = await results(client, PICTURE)
    assert [output.model.id for output in reply.results[0].outputs] == ["tensor"]
    silent = await results(client, PICTURE, workflow="silent")
    assert silent.status.code == 10000
    assert silent.results[0].suppress_output
    assert not silent.results[0].outputs
    assert (await results(client, "a text", workflow="silent")).status.code == 10020


async def test_arrays_are_joined_by_name(serving: Make) -> None:
    """One without a name has its node's; named ones keep theirs."""
    client = await serving(
        {
            "flow": [node("a", "narrow"), node("b", "narrow"), node("both", "pair", "a", "b")],
            "named": [node("p", "pair"), node("q", "pair", "p")],
        }
    )
    reply = await results(client, vector_input(2, 3))
    parts = {part.id: floats(part.data) for part in reply.results[0].outputs[2].data.parts}
    assert parts == {"sum": [4, 6], "product": [4, 9]}
    arrays = {name: vector_input(1, 2).data.ndarray for name in "ab"}
    given = resources_pb2.Input(data={"parts": [{"id": n, "data": {"ndarray": a}} for n, a in arrays.items()]})
    named = await results(client, given, workflow="named")
    assert codes(named) == [[10000, 22001]]
    assert "takes the arrays 'a', 'b', and the nodes before it give 'sum', 'product'" in (
        named.results[0].outputs[1].status.details
    )


@pytest.mark.parametrize(
    ("nodes", "given", "words"),
    [
        (
            [node("a", "colours"), node("b", "colours", "a")],
            PICTURE,
            "takes images, and node 'a' before it gives concep",
        ),
        (
            [node("a", "colours"), node("b", "topic", "a")],
            PICTURE,
            "takes texts, and node 'a' before it gives concepts",
        ),
        ([node("a", "topic"), node("b", "tensor", "a")], "good", "takes arrays, and node 'a' before it gives concepts"),
        (
            [node("a", "vector"), node("b", "colours", "a")],
            PICTURE,
            "takes images, and node 'a' before it gives embedd",
        ),
        (
            [node("a", "vector"), node("c", "vector"), node("b", "colours", "a", "c")],
            PICTURE,
            "takes one input, and has 2 nodes before it: 'a', 'c'",
        ),
        (
            [node("p", "pair", "x", "y"), node("x", "narrow"), node("y", "narrow")],
            vector_input(1, 2),
            "takes the arrays 'a', 'b', and the nodes before it give 'x', 'y'; an array without a name has the id",
        ),
    ],
)
async def test_outputs_that_do_not_fit_are_told_at_the_node(
    serving: Make, nodes: list[dict[str, Any]], given: Any, words: str
) -> None:
    """With what it takes and what it got; the others answer."""
    client = await serving({"flow": nodes})
    reply = await results(client, given)
    assert reply.status.code == 10010
    *good, last = reply.results[0].outputs
    assert {output.status.code for output in good} == {10000}
    assert last.status.code == 22001
    assert words in last.status.details
    assert last.model.id


# ---- what fails ------------------------------------------------------------------------------------------------------


async def test_one_bad_node_says_so_and_the_others_go_on(serving: Make) -> None:
    """Those behind it say which one failed, however far behind."""
    client = await serving(
        {
            "flow": [
                node("bad", "broken"),
                node("after", "tensor", "bad"),
                node("far", "tensor", "after"),
                node("good", "vector"),
                node("fine", "tensor", "good"),
            ]
        }
    )
    reply = await results(client, PICTURE)
    assert reply.status.code == 10010
    assert reply.results[0].status.code == 10010
    by_model = list(reply.results[0].outputs)
    assert [output.status.code for output in by_model] == [21350, 22108, 22108, 10000, 10000]
    assert "could not be loaded" in by_model[0].status.details
    for output, name in zip(by_model[1:3], ("after", "far"), strict=True):
        assert f"Node '{name}' was not run: node 'bad', whose output it needs, failed." in output.status.details
        assert output.status.details.count("was not run") == 1
        assert "could not be loaded" in output.status.details
        assert not output.data.ByteSize()
    assert [output.model.id for output in by_model] == ["broken", "tensor", "tensor", "vector", "tensor"]
    assert "3 of 5 nodes failed; the first one, 'bad', with MODEL_DEPLOYMENT_FAILED" in reply.status.details


async def test_a_model_that_is_gone_is_told_at_its_node(serving: Make) -> None:
    """The workflow is there all the same."""
    client = await serving({"flow": [node("a", "nothing"), node("b", "vector")]})
    reply = await results(client, PICTURE)
    assert codes(reply) == [[21200, 10000]]
    assert reply.results[0].outputs[0].model.id == "nothing"


async def test_a_bad_input_fails_alone(serving: Make) -> None:
    """At the nodes that take it, and those behind."""
    client = await serving({"flow": [node("a", "fragile"), node("v", "vector"), node("t", "tensor", "v")]})
    reply = await results(client, PICTURE, b"no picture", BLACK, "a text")
    assert codes(reply) == [[10000] * 3, [30101, 30101, 22108], [21313, 10000, 10000], [30104, 30104, 22108]]
    assert [result.status.code for result in reply.results] == [10000, 10020, 10010, 10020]
    assert reply.status.code == 10010
    assert reply.status.details.startswith("3 of 4 inputs failed; the first one: 3 of 3 nodes failed")


async def test_when_nothing_is_good_the_whole_is_a_failure(serving: Make) -> None:
    """And when something is, mixed."""
    client = await serving({"flow": [node("a", "vector")]})
    assert (await results(client, "text", "text")).status.code == 10020
    assert (await results(client, "text", PICTURE)).status.code == 10010


async def test_failures_are_logged_and_counted(serving: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Once a request, by whoever asked; each output under its model."""
    client = await serving({"flow": [node("a", "vector"), node("b", "nothing")]})
    with caplog.at_level(logging.WARNING):
        await results(client, PICTURE, PICTURE)
    (record,) = [record for record in caplog.records if "nodes failed" in record.message]
    assert record.workflow == f"{graphs.USER}/{graphs.APP}/flow"  # type: ignore[attr-defined]
    assert record.principal == "default"  # type: ignore[attr-defined]
    assert client.count("inputs_total", model="vector", version="1", code="10000") == 2
    assert client.count("inputs_total", model="nothing", version="", code="21200") == 2
    assert client.count("requests_total", model="", version="", method="PostWorkflowResults", code="10010") == 1


async def test_a_method_is_none_of_a_workflow(serving: Make) -> None:
    """Whoever names one would be answered in a form that no node takes."""
    client = await serving({"flow": [node("a", "colours")]})
    for name in ("predict", "_GET_SIGNATURES"):
        given = resources_pb2.Input(data={"image": {"base64": PICTURE}})
        given.data.metadata["_method_name"] = name
        reply = await results(client, given, PICTURE)
        assert codes(reply) == [[30104], [10000]]
        assert "no methods" in reply.results[0].outputs[0].status.details


@pytest.mark.parametrize("error", [Overloaded("Full."), Draining()])
async def test_what_is_to_be_tried_later_ends_the_whole_request(
    serving: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Clients wait and ask again by the reply's own status."""
    client = await serving({"flow": [node("a", "vector"), node("b", "colours")]})
    real = Predictions.post

    async def post(self: Predictions, context: Any, request: Any) -> Any:
        if request.model_id == "colours":
            raise error
        return await real(self, context, request)

    monkeypatch.setattr(Predictions, "post", post)
    if isinstance(error, Draining):
        with pytest.raises(RpcAbort) as caught:
            await results(client, PICTURE)
        assert caught.value.status is RpcStatus.UNAVAILABLE
    else:
        reply = await results(client, PICTURE)
        assert reply.status.code == 21354
        assert not reply.results
    assert client.api.in_flight == 0
    assert client.budget.used == 0


async def test_while_a_model_loads_the_whole_request_waits(
    world: World, serving: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """21351: the SDK says "still deploying" and asks again."""
    client = await serving({"flow": [node("a", "vector"), node("b", "tensor", "a")]})
    bundle = world.repository.find(graphs.USER, graphs.APP, "tensor")
    version = bundle.versions["1"]
    with monkeypatch.context() as patch:
        patch.setattr(version, "running", None)
        patch.setattr(version, "state", State.LOADING)
        assert (await results(client, PICTURE)).status.code == 21351
    assert (await results(client, PICTURE)).status.code == 10000


async def test_the_memory_of_all_nodes_is_the_requests(serving: Make) -> None:
    """It is bounded, and given back."""
    client = await serving({"flow": [node(f"n{i}", "vector") for i in range(20)]}, memory=100_000)
    wide = pictures.png(pictures.rgb_pixels(64, 64))
    reply = await results(client, wide)
    assert reply.status.code == 21354
    assert client.budget.used == 0
    assert (await results(await serving({"flow": [node("a", "vector")]}, memory=100_000), wide)).status.code == 10000


async def test_memory_that_a_copied_input_needs_is_the_requests_too(serving: Make) -> None:
    """Large inputs are copied for each node that takes them; beyond the budget all of it is tried later."""
    large = resources_pb2.Input(data={"image": {"base64": b"x" * 2_000_000}})
    few = await serving({"flow": [node("a", "vector")]}, memory=9_000_000)
    assert codes(await results(few, large)) == [[30101]]
    many = await serving({"flow": [node(f"n{i}", "vector") for i in range(5)]}, memory=9_000_000)
    reply = await results(many, large)
    assert reply.status.code == 21354
    assert not reply.results
    assert many.budget.used == 0


async def test_large_answers_come_as_small_ones(serving: Make) -> None:
    """They are put together beside the loop."""
    client = await serving({"flow": [node("a", "tensor"), node("b", "tensor", "a")]})
    many = np.arange(300_000, dtype=np.float32).reshape(100_000, 3)
    given = resources_pb2.Input(data={"ndarray": {"buffer": many.tobytes(), "shape": many.shape, "dtype": "float32"}})
    reply = await results(client, given)
    assert reply.status.code == 10000
    assert reply.results[0].outputs[1].data.ndarray.buffer == many.tobytes()


# ---- at the same time ------------------------------------------------------------------------------------------------


class Gate:
    """Holds nodes' predictions until so many have come."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came: list[str] = []
        self.ended: list[str] = []
        self.full = asyncio.Event()
        gate, real = self, Predictions.post

        async def post(self: Predictions, context: Any, request: Any) -> Any:
            gate.came.append(request.model_id)
            try:
                if len(gate.came) >= count:
                    gate.full.set()
                await gate.full.wait()
                return await real(self, context, request)
            finally:
                gate.ended.append(request.model_id)

        monkeypatch.setattr(Predictions, "post", post)


async def test_nodes_that_need_nothing_of_each_other_run_at_the_same_time(
    serving: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the gate would never open."""
    gate = Gate(3, monkeypatch)
    client = await serving(
        {"flow": [node("a", "vector"), node("b", "colours"), node("c", "wide"), node("d", "tensor", "a")]}
    )
    reply = await asyncio.wait_for(results(client, PICTURE), 20)
    assert reply.status.code == 10000
    assert sorted(gate.came[:3]) == ["colours", "vector", "wide"]
    assert gate.came[3] == "tensor"


async def test_a_deadline_ends_every_node(serving: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the call, by its gRPC status."""
    gate = Gate(99, monkeypatch)
    client = await serving({"flow": [node("a", "vector"), node("b", "colours"), node("c", "tensor", "a")]})
    request = flow_request(PICTURE).SerializeToString()
    with pytest.raises(RpcAbort) as caught:
        await client.raw("PostWorkflowResults", request, deadline=soon(0.2))
    assert caught.value.status is RpcStatus.DEADLINE_EXCEEDED
    assert sorted(gate.ended) == ["colours", "vector"]
    assert client.api.in_flight == 0


async def test_a_caller_that_leaves_ends_every_node(serving: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes on for nobody."""
    gate = Gate(2, monkeypatch)
    gate.full.wait = asyncio.Event().wait  # type: ignore[method-assign]  # it never opens
    client = await serving({"flow": [node("a", "vector"), node("b", "colours")]})
    call = asyncio.ensure_future(results(client, PICTURE))
    await asyncio.wait_for(asyncio.Event.wait(gate.full), 20)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert sorted(gate.ended) == ["colours", "vector"]
    assert client.api.in_flight == 0
    assert client.budget.used == 0


# ---- what a request may ask ------------------------------------------------------------------------------------------


async def test_limits_of_the_request_go_before_those_of_the_nodes(serving: Make) -> None:
    """And they are for nodes that give concepts."""
    client = await serving(
        {
            "flow": [
                node("a", "colours", output_info={"params": {"max_concepts": 1}}),
                node("b", "wide"),
                node("v", "vector"),
                node("t", "tensor", "v"),
            ]
        }
    )

    async def counts(**config: Any) -> list[int]:
        reply = await results(client, PICTURE, output_config=resources_pb2.OutputConfig(**config))
        assert reply.status.code == 10000, reply.status
        return [len(output.data.concepts) for output in reply.results[0].outputs]

    assert await counts() == [1, 20, 0, 0]
    assert await counts(max_concepts=2) == [2, 2, 0, 0]
    assert await counts(min_value=1.0) == [0, 0, 0, 0]


async def test_selected_concepts_are_those_of_each_node(serving: Make) -> None:
    """A node that has none of them says so; a node without concepts is not asked."""
    client = await serving({"flow": [node("a", "colours"), node("v", "vector"), node("b", "wide")]})
    selected = resources_pb2.OutputConfig(select_concepts=[{"id": "c-red"}])
    reply = await results(client, PICTURE, output_config=selected)
    assert codes(reply) == [[10000, 10000, 21202]]
    assert [concept.id for concept in reply.results[0].outputs[0].data.concepts] == ["c-red"]


async def test_a_concept_that_a_node_does_not_have_is_noted(serving: Make) -> None:
    """As with a model: mixed, with good outputs."""
    client = await serving({"flow": [node("a", "colours")]})
    selected = resources_pb2.OutputConfig(select_concepts=[{"id": "c-red"}, {"id": "mauve"}])
    reply = await results(client, PICTURE, output_config=selected)
    assert codes(reply) == [[10000]]
    assert reply.status.code == 10010
    assert "Node 'a': The model has no concept 'mauve'" in reply.status.details


async def test_a_nodes_own_selection_holds(serving: Make) -> None:
    """By id or name, from its file."""
    chosen = {"output_config": {"select_concepts": [{"name": "red"}, {"id": "c-dark"}], "min_value": 0.0}}
    client = await serving({"flow": [node("a", "colours", output_info=chosen)]})
    reply = await results(client, PICTURE)
    assert {concept.id for concept in reply.results[0].outputs[0].data.concepts} == {"c-red", "c-dark"}


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"output_config": resources_pb2.OutputConfig(max_concepts=201)}, 21202, "from 1 to 200"),
        ({"output_config": resources_pb2.OutputConfig(min_value=1.5)}, 21202, "from 0 to 1"),
        ({"workflow_state": resources_pb2.WorkflowState(id="init")}, 22104, "leave it out"),
        ({"node_runner_selectors": {"z": resources_pb2.RunnerSelector()}}, 22104, "names node 'z'"),
        ({"workflow": "nothing"}, 22102, "no workflow tester/tests/nothing"),
        ({"workflow": ""}, 22102, "no default workflow"),
        ({"version_id": "1"}, 22102, "has no version '1'"),
    ],
)
async def test_what_no_node_could_give_is_refused_as_a_whole(
    serving: Make, fields: dict[str, Any], code: int, words: str
) -> None:
    """With a sentence."""
    client = await serving({"flow": [node("a", "colours")]})
    reply = await results(client, PICTURE, **fields)
    assert reply.status.code == code
    assert words in reply.status.details
    assert not reply.results


async def test_a_lower_limit_of_the_operator_holds(serving: Make) -> None:
    """For what a node's file asks too."""
    many = node("a", "wide", output_info={"params": {"max_concepts": 50}})
    client = await serving({"flow": [many]}, limits=Limits(concepts_max=30))
    reply = await results(client, PICTURE)
    assert codes(reply) == [[21202]]
    assert "from 1 to 30" in reply.results[0].outputs[0].status.details


async def test_a_place_may_be_named_for_a_node(serving: Make) -> None:
    """Ours is taken, any other one is the node's failure."""
    client = await serving({"flow": [node("a", "colours"), node("b", "vector")]}, placement=Placement(nodepool_id="p"))
    ours = resources_pb2.RunnerSelector(nodepool={"id": "p"})
    other = resources_pb2.RunnerSelector(deployment={"id": "elsewhere"})
    reply = await results(client, PICTURE, node_runner_selectors={"a": ours, "b": other})
    assert codes(reply) == [[10000, 25900]]


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({"output_info": {"params": {"colour": 1}}}, 21202, "params 'colour' are none that model tester/tests/vector"),
        ({"model": {"model_id": "vector", "model_type_id": "text-embedder"}}, 21200, "is a visual-embedder, and the"),
        ({"model": {"model_id": "vector", "model_version_id": "9"}}, 21200, "no version '9'"),
    ],
)
async def test_what_a_file_says_wrongly_of_a_model_is_told_at_its_node(
    serving: Make, more: dict[str, Any], code: int, words: str
) -> None:
    """To the caller, who can tell the operator."""
    client = await serving({"flow": [{**node("a", "vector"), **more}]})
    reply = await results(client, PICTURE)
    assert codes(reply) == [[code]]
    assert words in reply.results[0].outputs[0].status.details


async def test_a_version_of_a_model_may_be_named(serving: Make) -> None:
    """Else the newest answers."""
    first = node("a", "colours")
    first["model"]["model_version_id"] = "1"
    client = await serving({"flow": [first, node("b", "colours")]})
    reply = await results(client, PICTURE)
    assert [output.model.model_version.id for output in reply.results[0].outputs] == ["1", "2"]


# ---- asking ----------------------------------------------------------------------------------------------------------


async def test_a_workflow_is_shown_as_its_file_says_it(serving: Make) -> None:
    """With what the SDK's export needs of each node's model."""
    limits = {"params": {"max_concepts": 3}}
    client = await serving(
        {
            "flow": [node("a", "vector", suppress_output=True), node("b", "tensor", "a")],
            "x": [node("c", "colours", output_info=limits), node("d", "nothing")],
        }
    )
    flow = (
        await client.ask("GetWorkflow", service_pb2.GetWorkflowRequest(user_app_id=IDS, workflow_id="flow"))
    ).workflow
    assert (flow.id, flow.user_id, flow.app_id) == ("flow", graphs.USER, graphs.APP)
    assert flow.version.id
    assert flow.version.workflow_id == "flow"
    assert flow.created_at.seconds
    first, second = flow.nodes
    assert (first.id, first.model.id, first.model.model_version.id, first.suppress_output) == ("a", "vector", "1", True)
    assert first.model.model_type_id == "visual-embedder"
    assert [given.node_id for given in second.node_inputs] == ["a"]
    other = (await client.ask("GetWorkflow", service_pb2.GetWorkflowRequest(user_app_id=IDS, workflow_id="x"))).workflow
    assert other.nodes[0].output_info_override.output_config.max_concepts == 3
    assert other.nodes[1].model.id == "nothing"


async def test_versions_are_the_one_of_now(serving: Make) -> None:
    """By Get and by List; a request may name it."""
    client = await serving({"flow": [node("a", "colours")]})
    kinds = service_pb2.ListWorkflowVersionsRequest, service_pb2.GetWorkflowVersionRequest
    listed = await client.ask("ListWorkflowVersions", kinds[0](user_app_id=IDS, workflow_id="flow"))
    (version,) = listed.workflow_versions
    for name in ("", version.id):
        request = kinds[1](user_app_id=IDS, workflow_id="flow", workflow_version_id=name)
        assert (await client.ask("GetWorkflowVersion", request)).workflow_version == version
        assert (await results(client, PICTURE, version_id=name)).status.code == 10000
    request = kinds[1](user_app_id=IDS, workflow_id="flow", workflow_version_id="old")
    assert (await client.ask("GetWorkflowVersion", request)).status.code == 22102


async def test_workflows_are_listed_in_pages_and_by_filters(serving: Make) -> None:
    """Past the end there is only a status."""
    client = await serving({name: [node("a", "colours")] for name in ("one", "two", "three")})

    async def ids(user: str = graphs.USER, **fields: Any) -> list[str]:
        request = service_pb2.ListWorkflowsRequest(user_app_id={"user_id": user, "app_id": graphs.APP}, **fields)
        reply = await client.ask("ListWorkflows", request)
        assert reply.status.code == 10000
        return [workflow.id for workflow in reply.workflows]

    assert sorted(await ids()) == ["one", "three", "two"]
    assert await ids(sort_by_id=True, sort_ascending=True) == ["one", "three", "two"]
    assert await ids(sort_by_id=True, sort_ascending=True, page=2, per_page=2) == ["two"]
    assert await ids(page=4, per_page=1) == []
    assert sorted(await ids(search="T")) == ["three", "two"]
    assert await ids(query="two") == ["two"]
    assert await ids(featured_only=True) == await ids(starred_only=True) == await ids(bookmark=True) == []
    assert len(await ids(visibility=resources_pb2.Visibility(gettable=10))) == 3
    assert await ids(visibility=resources_pb2.Visibility(gettable=50)) == []
    assert await ids(user="bob") == []
    assert sorted(await ids(user="")) == ["one", "three", "two"]


async def test_a_principal_sees_workflows_all_of_whose_models_it_may_use(serving: Make) -> None:
    """And uses no other."""
    flows = {"flow": [node("a", "colours"), node("b", "wide")], "mine": [node("a", "wide")]}
    client = await serving(flows, Principal(name="ada", models=("wide",)))
    listed = await client.ask("ListWorkflows", service_pb2.ListWorkflowsRequest(user_app_id=IDS))
    assert [workflow.id for workflow in listed.workflows] == ["mine"]
    assert (await results(client, PICTURE, workflow="mine")).status.code == 10000
    refused = await results(client, PICTURE)
    assert refused.status.code == 11007
    assert "may not use model tester/tests/colours, which is its node 'a'" in refused.status.details
    for rpc, kind in (
        ("GetWorkflow", service_pb2.GetWorkflowRequest),
        ("GetWorkflowVersion", service_pb2.GetWorkflowVersionRequest),
        ("ListWorkflowVersions", service_pb2.ListWorkflowVersionsRequest),
    ):
        assert (await client.ask(rpc, kind(user_app_id=IDS, workflow_id="flow"))).status.code == 11007


async def test_without_workflows_there_are_none(world: World) -> None:
    """And nobody fails for it."""
    client = world.api()
    listed = await client.ask("ListWorkflows", service_pb2.ListWorkflowsRequest(user_app_id=IDS))
    assert listed.status.code == 10000
    assert not listed.workflows
    assert (await results(client, PICTURE)).status.code == 22102


# ---- whatever comes --------------------------------------------------------------------------------------------------

ANY_MODEL = ["colours", "topic", "vector", "tensor", "pair", "narrow", "fragile", "gather", "broken", "nothing"]
ANY_MODEL += ["same", "both"]
ANY_INPUT = [
    PICTURE,
    BLACK,
    b"no picture",
    "good model",
    "",
    resources_pb2.Input(),
    vector_input(1, 2),
    vector_input(1, 2, 3),
    vector_input(float("nan"), 0, 1),
    resources_pb2.Input(data={"image": {"url": "http://example.com/x.png"}}),
]


@st.composite
def any_workflow(draw: Any) -> list[dict[str, Any]]:
    """Nodes that take any others before them."""
    nodes: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 6))):
        before = draw(st.lists(st.sampled_from([n["id"] for n in nodes]), unique=True, max_size=2)) if nodes else []
        name = draw(st.sampled_from(["a", "b", "x", "y", "sum"])) + str(number)
        nodes.append(node(name, draw(st.sampled_from(ANY_MODEL)), *before, suppress_output=draw(st.booleans())))
    return draw(st.permutations(nodes))


@given(nodes=any_workflow(), inputs=st.lists(st.sampled_from(ANY_INPUT), min_size=1, max_size=5))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_graph_answers_every_input_at_every_node(
    serving: Make, nodes: list[dict[str, Any]], inputs: list[Any]
) -> None:
    """With a status of its own, by these laws: failing spreads to what is behind and to nothing else."""
    client = await serving({"flow": nodes})
    reply = await results(client, *inputs)
    shown = [found for found in reply.workflow.nodes if not found.suppress_output]
    assert len(reply.results) == len(inputs)
    for result in reply.results:
        assert len(result.outputs) == len(shown)
        assert result.status.code in (10000, 10010, 10020)
        told = {found.id: output for found, output in zip(shown, result.outputs, strict=True)}
        for found in shown:
            output = told[found.id]
            assert output.status.code not in (0, 98004)
            assert bool(output.data.ByteSize()) == (output.status.code == 10000)
            assert output.model.id == found.model.id
            failed = {given.node_id for given in found.node_inputs if given.node_id in told}
            if any(told[name].status.code != 10000 for name in failed):
                assert output.status.code in (22108, 21200, 21350)
            if not found.node_inputs:
                assert output.status.code != 22108
    assert client.budget.used == 0
    assert client.api.in_flight == 0


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_bytes_are_answered_or_refused(serving: Make, data: st.DataObject) -> None:
    """A request some of whose bytes were changed, cut out or put in; nothing is left behind."""
    client = await serving({"flow": [node("a", "vector"), node("b", "tensor", "a"), node("c", "colours")]})
    selectors = {"b": resources_pb2.RunnerSelector(deployment={"id": "colours"})}
    whole = flow_request(
        BLACK, "text", output_config=resources_pb2.OutputConfig(max_concepts=3), node_runner_selectors=selectors
    )
    body = bytearray(whole.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        if data.draw(st.booleans()):
            body[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
        else:
            body[place] = data.draw(st.integers(0, 255))
    reply = service_pb2.PostWorkflowResultsResponse.FromString(await client.raw("PostWorkflowResults", bytes(body)))
    assert reply.status.code not in (0, 98004)
    codes_ = {output.status.code for result in reply.results for output in result.outputs}
    assert not codes_ & {0, 98004}
    assert client.budget.used == 0
    assert client.api.in_flight == 0
