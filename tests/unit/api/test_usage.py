"""What a call used is counted for whoever made it, on every way through the API, and however it ended."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from support import graphs
from support.api_world import IDS, PICTURE, V2, Client, World, predict_request
from support.infer import infer_request
from support.waiting import eventually_async

from appliance.catalog.workflows import Workflows
from appliance.core.config import Catalog, Principal
from appliance.core.types import RpcAbort
from appliance.core.usage import Amounts, UsageKey

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADA, BOB = Principal(name="ada"), Principal(name="bob")
COLOURS = UsageKey("ada", graphs.USER, graphs.APP, "colours", "2", "PostModelOutputs")


def used(client: Client) -> dict[UsageKey, Amounts]:
    """By everybody who used anything; whole numbers only."""
    return {key: amounts for key, amounts in client.metrics.usage.counted().items() if any(amounts)}


def but_time(amounts: Amounts) -> Amounts:
    """That took some."""
    assert amounts.seconds > 0
    return amounts._replace(seconds=0)


@pytest.mark.parametrize("quick", [True, False])
async def test_a_prediction_is_counted_on_both_ways(world: World, quick: bool) -> None:
    client = world.api(ADA, BOB)
    request = predict_request("colours", PICTURE)
    body = request.SerializeToString()
    sent = 0
    for _ in range(3):
        if quick:
            replied: asyncio.Future[bytes | RpcAbort] = asyncio.get_running_loop().create_future()
            endpoint = client.endpoints[V2 + "PostModelOutputs"]
            assert endpoint.quick is not None
            assert endpoint.quick(client.call(V2 + "PostModelOutputs"), body, replied.set_result)
            reply = await replied
        else:
            unary = client.endpoints[V2 + "PostModelOutputs"].unary
            assert unary is not None
            reply = await unary(client.call(V2 + "PostModelOutputs"), body)
        assert isinstance(reply, bytes)
        sent += len(reply)
    await client.predict("colours", PICTURE, key=client.keys[1])
    found = used(client)
    assert but_time(found[COLOURS]) == Amounts(calls=3, inputs=3, bytes_in=3 * len(body), bytes_out=sent)
    assert found[COLOURS._replace(principal="bob")].calls == 1
    assert len(found) == 2


async def test_what_failed_is_counted_as_such(world: World) -> None:
    """One bad input of two fails its call, and is one failed input; a call for no model has none."""
    client = world.api(ADA)
    await client.predict("colours", PICTURE, b"no picture")
    await client.predict("nothing", PICTURE)
    found = used(client)
    assert found[COLOURS][:4] == (1, 1, 2, 1)
    nobody = UsageKey("ada", "", "", "", "", "PostModelOutputs")
    assert found[nobody][:4] == (1, 1, 0, 0)
    assert found[nobody].bytes_in > len(PICTURE)


async def test_who_was_not_let_in_used_nothing(world: World) -> None:
    client = world.api(Principal(name="ada", requests_per_second=0.0001, burst=1))
    await client.predict("colours", PICTURE, key="wrong")
    await client.predict("colours", PICTURE, key=None)
    await client.predict("colours", PICTURE)
    await client.predict("colours", PICTURE)
    assert used(client)[COLOURS].calls == 1
    assert len(used(client)) == 1


async def test_each_message_of_a_stream_is_a_call(world: World) -> None:
    client = world.api(ADA)
    body = predict_request("colours", PICTURE).SerializeToString()
    replies = await client.stream(V2 + "StreamModelOutputs", [body] * 3)
    found = used(client)
    expected = Amounts(calls=3, inputs=3, bytes_in=3 * len(body), bytes_out=sum(map(len, replies)))
    assert but_time(found[COLOURS._replace(method="StreamModelOutputs")]) == expected


async def test_a_caller_that_leaves_has_used_what_it_sent(world: World) -> None:
    client = world.api(ADA)
    unary = client.endpoints[V2 + "PostModelOutputs"].unary
    assert unary is not None
    body = predict_request("colours", *[PICTURE] * 100).SerializeToString()
    task = asyncio.ensure_future(unary(client.call(V2 + "PostModelOutputs"), body))
    await eventually_async(lambda: client.api.in_flight)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (amounts,) = used(client).values()
    assert amounts[:3] == (1, 1, 0)
    assert amounts.bytes_in == len(body)


async def test_other_doors_are_methods_of_their_own(world: World) -> None:
    client = world.api(ADA)
    picture = len(PICTURE).to_bytes(4, "little") + PICTURE
    request = infer_request("colours", ("image", "BYTES", [1], picture))
    await client.raw("/inference.GRPCInferenceService/ModelInfer", request.SerializeToString())
    (found,) = used(client)
    assert found == COLOURS._replace(method="kserve.ModelInfer")


async def test_a_workflows_nodes_use_inputs_of_their_models(world: World, tmp_path: Path) -> None:
    """The call itself, its bytes and its time are counted once, without a model."""
    nodes: list[dict[str, Any]] = [{"id": name, "model": {"model_id": "colours"}} for name in ("one", "two")]
    nodes.append({"id": "three", "model": {"model_id": "vector"}})
    content = {"id": "flow", "user_id": graphs.USER, "app_id": graphs.APP, "nodes": nodes}
    (tmp_path / "flow.yaml").write_text(yaml.safe_dump({"workflow": content}), encoding="utf-8")
    workflows = Workflows(Catalog(workflows=tmp_path, settle_s=0))
    await workflows.look()
    client = world.api(ADA, workflows=workflows)
    inputs = [resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(base64=given)))
              for given in (PICTURE, b"no picture")]  # fmt: skip
    request = service_pb2.PostWorkflowResultsRequest(user_app_id=IDS, workflow_id="flow", inputs=inputs)
    await client.ask("PostWorkflowResults", request)
    found = {key[1:]: amounts[:4] for key, amounts in used(client).items()}
    flow = "PostWorkflowResults"
    assert found == {
        (graphs.USER, graphs.APP, "colours", "2", flow): (0, 0, 4, 2),
        (graphs.USER, graphs.APP, "vector", "1", flow): (0, 0, 2, 1),
        ("", "", "", "", flow): (1, 1, 0, 0),
    }


async def test_calls_without_a_prediction_count_too(world: World) -> None:
    client = world.api(ADA)
    await client.ask("ListModels")
    await client.ask("GetModelVersion", service_pb2.GetModelVersionRequest(
        user_app_id=IDS, model_id="colours", version_id="2"
    ))  # fmt: skip
    assert {(key.model, key.method): amounts.calls for key, amounts in used(client).items()} == {
        ("", "ListModels"): 1,
        ("colours", "GetModelVersion"): 1,
    }
