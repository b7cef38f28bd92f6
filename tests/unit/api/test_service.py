"""The API as bytes: every accepted call ends exactly once, with an answer, a status, or a gRPC status."""

import asyncio
import json
import logging
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from google.protobuf import json_format, message_factory
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import graphs, pictures
from support.api_world import IDS, PICTURE, SERVICE, V2, Client, World, predict_request, soon

from appliance.api.catalogue import RPCS
from appliance.api.keys import digest
from appliance.api.service import _request_id
from appliance.core.config import Limits, Log, Principal
from appliance.core.types import Call, RpcAbort, RpcStatus
from appliance.engine.worker import LocalModel

pytestmark = pytest.mark.asyncio(loop_scope="module")

Input, Data, Image = resources_pb2.Input, resources_pb2.Data, resources_pb2.Image
BLACK = pictures.png(np.zeros((8, 8, 3), np.uint8))


def values(output: Any) -> dict[str, float]:
    """Concept name → value."""
    return {concept.name: concept.value for concept in output.data.concepts}


def wanted(pixels: Any) -> dict[str, float]:
    """What the classifier of colours says, by hand."""
    weight, bias = graphs.classifier_weights(3, 3)
    logits = (pixels / 255).mean(axis=(0, 1)) @ weight + bias
    powers = np.exp(logits)
    return dict(zip(graphs.CONCEPTS, powers / powers.sum(), strict=True))


def pythonic(**arguments: Any) -> Any:
    """An input as `model.predict(…)` sends it."""
    message = Input()
    message.data.metadata["_method_name"] = "predict"
    for name, value in arguments.items():
        message.data.parts.add(id=name).data.CopyFrom(value if isinstance(value, Data) else Data(**value))
    return message


def array(values_: Any, dtype: str = "float32") -> Any:
    """An array as a message."""
    found = np.array(values_, dtype)
    return resources_pb2.NDArray(buffer=found.tobytes(), shape=found.shape, dtype=dtype)


# ---- predicting ------------------------------------------------------------------------------------------------------


async def test_a_picture_is_classified(world: World) -> None:
    """One output for one input, with all that clients read."""
    reply = await world.api().predict("colours", Input(id="mine", data=Data(image=Image(base64=PICTURE))))
    assert (reply.status.code, reply.status.description) == (10000, "Ok")
    (output,) = reply.outputs
    assert (output.status.code, output.input.id, len(output.id)) == (10000, "mine", 32)
    assert output.created_at.seconds > 1_700_000_000
    model = output.model
    assert (model.id, model.user_id, model.app_id) == ("colours", graphs.USER, graphs.APP)
    assert (model.model_type_id, model.model_version.id, model.model_version.status.code) == (
        "visual-classifier",
        "2",
        21100,
    )
    found = values(output)
    expected = wanted(pictures.rgb_pixels(8, 8))
    assert list(found) == sorted(expected, key=lambda name: -expected[name])
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5)
    assert output.data.concepts[0].id == f"c-{output.data.concepts[0].name}"


async def test_128_inputs_are_answered_in_order(world: World) -> None:
    """Each with its own values, whatever batches they ran in."""
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(128)]
    inputs = [Input(id=f"i{n}", data=Data(image=Image(base64=pictures.png(p)))) for n, p in enumerate(pixels)]
    reply = await world.api().predict("colours", *inputs)
    assert reply.status.code == 10000
    assert [output.input.id for output in reply.outputs] == [f"i{n}" for n in range(128)]
    for output, own in zip(reply.outputs, pixels, strict=True):
        for name, value in wanted(own).items():
            assert values(output)[name] == pytest.approx(value, abs=1e-5)


async def test_129_inputs_are_refused_with_the_limit(world: World) -> None:
    """Raw callers are not checked by an SDK."""
    reply = await world.api().predict("colours", *([PICTURE] * 129))
    assert reply.status.code == 30105
    assert "129 inputs; the limit is 128" in reply.status.details
    assert not reply.outputs


async def test_no_inputs_are_refused(world: World) -> None:
    """With how many there may be."""
    reply = await world.api().predict("colours")
    assert (reply.status.code, len(reply.outputs)) == (39999, 0)
    assert "1 and 128" in reply.status.details


@pytest.mark.parametrize(
    ("model", "version", "words"),
    [
        ("nothing", "", "no model tester/tests/nothing"),
        ("", "", "no model tester/tests/"),
        ("Colours", "", "no model"),
        ("../colours", "", "no model"),
        ("colours", "3", "no version '3'; ready versions: 2, 1"),
        ("colours", "latest", "no version 'latest'"),
    ],
)
async def test_an_unknown_model_or_version_is_named(world: World, model: str, version: str, words: str) -> None:
    """With what there is."""
    reply = await world.api().predict(model, PICTURE, version=version)
    assert reply.status.code == 21200
    assert words in reply.status.details


@pytest.mark.parametrize(("version", "given"), [("", "2"), ("1", "1"), ("2", "2")])
async def test_an_empty_version_is_the_newest(world: World, version: str, given: str) -> None:
    """A named one is that one."""
    reply = await world.api().predict("colours", PICTURE, version=version)
    assert reply.outputs[0].model.model_version.id == given


async def test_a_model_that_could_not_be_loaded_says_so(world: World) -> None:
    """The reason is the operator's business."""
    reply = await world.api().predict("broken", PICTURE)
    assert reply.status.code == 21350
    assert "appliance models list" in reply.status.details
    assert "numeric" not in str(reply)


async def test_one_bad_input_of_many_is_mixed(world: World) -> None:
    """Its own code, and the neighbours' answers (PROTOCOL 3.2)."""
    reply = await world.api().predict("colours", PICTURE, b"no picture", pictures.bomb(), "a text", PICTURE)
    assert reply.status.code == 10010
    assert "3 of 5 inputs failed" in reply.status.details
    assert [output.status.code for output in reply.outputs] == [10000, 30101, 30105, 30104, 10000]
    assert [output.HasField("data") for output in reply.outputs] == [True, False, False, False, True]
    assert all(output.input.id for output in reply.outputs)


async def test_all_bad_inputs_are_a_failure(world: World) -> None:
    """10020 at the top."""
    reply = await world.api().predict("colours", b"no picture", b"neither")
    assert (reply.status.code, [o.status.code for o in reply.outputs]) == (10020, [30101, 30101])


async def test_an_input_whose_run_fails_is_alone(world: World) -> None:
    """The model says NaN for black pictures, and fails on a large index."""
    reply = await world.api().predict("fragile", PICTURE, BLACK, PICTURE)
    assert (reply.status.code, [o.status.code for o in reply.outputs]) == (10010, [10000, 21313, 10000])
    inputs = [Input(data=Data(ndarray=array([[n]], "int64"))) for n in (1, 5000, 3)]
    reply = await world.api().predict("gather", *inputs)
    assert [o.status.code for o in reply.outputs] == [10000, 21313, 10000]
    assert "5000" not in reply.outputs[1].status.details


@pytest.mark.parametrize(
    ("config", "count"),
    [({}, 20), ({"max_concepts": 1}, 1), ({"max_concepts": 200}, 200), ({"min_value": 1.0}, 0)],
)
async def test_output_config_cuts_the_concepts(world: World, config: Any, count: int) -> None:
    """20 unless told."""
    reply = await world.api().predict("wide", PICTURE, output_config=config)
    assert reply.status.code == 10000
    assert len(reply.outputs[0].data.concepts) == count


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_concepts": 201}, "max_concepts is 201; it must be from 1 to 200"),
        ({"min_value": 1.5}, "min_value is 1.5"),
        ({"min_value": -0.5}, "min_value is -0.5"),
        ({"min_value": float("nan")}, "min_value is nan"),
        ({"select_concepts": [resources_pb2.Concept(id="nothing")]}, "none of 'nothing'"),
    ],
)
async def test_a_bad_output_config_is_refused_as_a_whole(world: World, config: Any, words: str) -> None:
    """Before anything is decoded."""
    reply = await world.api().predict("wide", PICTURE, output_config=config)
    assert (reply.status.code, len(reply.outputs)) == (21202, 0)
    assert words in reply.status.details


async def test_output_config_is_read_from_both_places(world: World) -> None:
    """Field by field; the new place wins (PROTOCOL 0.5)."""
    request = predict_request("wide", PICTURE)
    request.model.output_info.output_config.max_concepts = 7
    client = world.api()
    reply = await client.ask("PostModelOutputs", request)
    assert len(reply.outputs[0].data.concepts) == 7
    request.model.model_version.output_info.output_config.max_concepts = 3
    request.model.output_info.output_config.select_concepts.extend(
        [resources_pb2.Concept(id=f"c-n{n}") for n in range(5)]
    )
    reply = await client.ask("PostModelOutputs", request)
    assert len(reply.outputs[0].data.concepts) == 3
    assert set(values(reply.outputs[0])) <= {f"n{n}" for n in range(5)}


async def test_selecting_partly_is_mixed(world: World) -> None:
    """The matched ones are returned, the others named; no duplicates (PROTOCOL 3.3)."""
    select = [resources_pb2.Concept(name="red"), resources_pb2.Concept(id="c-red"), resources_pb2.Concept(id="unicorn")]
    reply = await world.api().predict("colours", PICTURE, output_config={"select_concepts": select})
    assert (reply.status.code, reply.status.details) == (10010, "The model has no concept 'unicorn'.")
    assert list(values(reply.outputs[0])) == ["red"]
    assert reply.outputs[0].status.code == 10000


async def test_a_text_is_classified(world: World) -> None:
    """In the old form."""
    reply = await world.api().predict("topic", "good model", "")
    assert [o.status.code for o in reply.outputs] == [10000, 10000]
    assert sum(values(reply.outputs[0]).values()) == pytest.approx(1, abs=1e-5)


async def test_a_picture_is_embedded(world: World) -> None:
    """embeddings[0], with its length."""
    reply = await world.api().predict("vector", PICTURE)
    (embedding,) = reply.outputs[0].data.embeddings
    np.testing.assert_allclose(embedding.vector, pictures.rgb_pixels(8, 8).mean(axis=(0, 1)) / 255, atol=1e-5)
    assert embedding.num_dimensions == 3


async def test_the_pythonic_form_is_answered_in_its_own_place(world: World) -> None:
    """parts[return], of the signature's type; the same values as in the old form."""
    client = world.api()
    old = await client.predict("colours", PICTURE)
    new = await client.predict(
        "colours", pythonic(image={"image": Image(base64=PICTURE)}, max_concepts={"int_value": 2})
    )
    (part,) = new.outputs[0].data.parts
    assert part.id == "return"
    assert [c.value for c in part.data.concepts] == [c.value for c in old.outputs[0].data.concepts][:2]
    assert not new.outputs[0].data.concepts
    new = await client.predict("vector", pythonic(image={"image": Image(base64=PICTURE)}))
    assert new.outputs[0].data.parts[0].data.ndarray.dtype == "float32"


async def test_tensors_in_both_forms(world: World) -> None:
    """One input and two; named fields come back as parts."""
    client = world.api()
    reply = await client.predict("tensor", Input(data=Data(ndarray=array([1, 2, 3]))))
    assert np.frombuffer(reply.outputs[0].data.ndarray.buffer, "f4").tolist() == [1, 2, 3]
    reply = await client.predict("tensor", pythonic(x={"ndarray": array([1, 2, 3])}))
    assert list(reply.outputs[0].data.parts[0].data.ndarray.shape) == [3]
    reply = await client.predict("pair", pythonic(a={"ndarray": array([1, 2])}, b={"ndarray": array([3, 4])}))
    parts = {
        p.id: np.frombuffer(p.data.ndarray.buffer, "f4").tolist() for p in reply.outputs[0].data.parts[0].data.parts
    }
    assert parts == {"sum": [4, 6], "product": [3, 8]}


async def test_inputs_with_limits_of_their_own_are_cut_each_by_its_own(world: World) -> None:
    """In one request, in both forms, and a bad one among them."""
    image = {"image": Image(base64=PICTURE)}
    reply = await world.api().predict(
        "wide",
        pythonic(image=image, max_concepts={"int_value": 3}),
        PICTURE,
        pythonic(image=image, max_concepts={"int_value": 201}),
        pythonic(image=image, nonsense={"int_value": 3}),
        pythonic(max_concepts={"int_value": 3}),
        pythonic(image=image, max_concepts={"int_value": 5}),
    )
    assert [o.status.code for o in reply.outputs] == [10000, 10000, 21202, 30104, 30104, 10000]
    counts = [
        len(o.data.concepts) or (len(o.data.parts[0].data.concepts) if o.data.parts else 0) for o in reply.outputs
    ]
    assert counts == [3, 20, 0, 0, 0, 5]


async def test_an_unknown_method_is_named(world: World) -> None:
    """With the one there is; SDKs read the reply as a whole."""
    message = pythonic(image={"image": Image(base64=PICTURE)})
    message.data.metadata["_method_name"] = "analyze_video"
    reply = await world.api().predict("colours", message)
    assert reply.status.code == 10020
    assert reply.outputs[0].status.code == 21202
    assert "'analyze_video'; it has predict" in reply.status.details


async def test_a_place_that_is_not_this_one_is_refused(world: World) -> None:
    """Each by its own code."""
    client = world.api()
    for field, code in (("deployment", 25900), ("nodepool", 25700), ("runner", 25600)):
        request = predict_request("colours", PICTURE)
        getattr(request.runner_selector, field).id = "elsewhere"
        reply = await client.ask("PostModelOutputs", request)
        assert reply.status.code == code


# ---- signatures ------------------------------------------------------------------------------------------------------


def get_signatures() -> Any:
    """What the SDK asks when GetModelVersion had none."""
    message = Input()
    message.data.metadata["_method_name"] = "_GET_SIGNATURES"
    message.data.parts.add()
    return message


@pytest.mark.parametrize("model", ["colours", "topic", "vector", "tensor", "pair"])
async def test_signatures_are_published_for_every_model(world: World, model: str) -> None:
    """By GetModel, GetModelVersion and _GET_SIGNATURES, and they are the same (PROTOCOL 2.2)."""
    client = world.api()
    ids = {"user_app_id": IDS, "model_id": model}
    one = (await client.ask("GetModel", service_pb2.GetModelRequest(**ids))).model.model_version.method_signatures
    two = (
        await client.ask("GetModelVersion", service_pb2.GetModelVersionRequest(**ids))
    ).model_version.method_signatures
    reply = await client.predict(model, get_signatures())
    assert (reply.status.code, reply.outputs[0].status.code) == (10000, 10000)
    content = json.loads(reply.outputs[0].data.text.raw)
    three = [json_format.ParseDict(value, resources_pb2.MethodSignature()) for value in content.values()]
    assert list(one) == list(two) == three
    assert [signature.name for signature in one] == ["predict"]


@pytest.mark.parametrize(("model", "code"), [("nothing", 21200), ("broken", 21350)])
async def test_a_refused_question_for_signatures_has_one_output(world: World, model: str, code: int) -> None:
    """The SDK reads outputs[0] whatever the status, and must not mistake it for 30101."""
    reply = await world.api().predict(model, get_signatures())
    assert [reply.status.code, *(output.status.code for output in reply.outputs)] == [code, code]


# ---- streams ---------------------------------------------------------------------------------------------------------


async def test_generate_answers_one_message(world: World) -> None:
    """The same as PostModelOutputs."""
    request = predict_request("colours", PICTURE)
    reply = await world.api().ask("GenerateModelOutputs", request)
    assert (reply.status.code, len(reply.outputs)) == (10000, 1)


async def test_a_stream_answers_message_by_message(world: World) -> None:
    """A bad one in between ends nothing."""
    bodies = [
        predict_request("colours", PICTURE).SerializeToString(),
        b"\xff\xff",
        predict_request("nothing", PICTURE).SerializeToString(),
        predict_request("topic", "good", "bad").SerializeToString(),
    ]
    client = world.api()
    replies = [
        service_pb2.MultiOutputResponse.FromString(body)
        for body in await client.stream(V2 + "StreamModelOutputs", bodies)
    ]
    assert [reply.status.code for reply in replies] == [10000, 11100, 21200, 10000]
    assert await client.stream(V2 + "StreamModelOutputs", []) == []
    assert client.api.in_flight == 0


# ---- around each call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rpc", RPCS)
@pytest.mark.parametrize("body", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"garbage", b"\xff" * 2_000_000])
async def test_bytes_that_are_no_message_are_malformed(world: World, rpc: str, body: bytes) -> None:
    """For every RPC, small or large; the reply is that RPC's own message."""
    client = world.api()
    reply = await client.raw(rpc, body)
    message = message_factory.GetMessageClass(SERVICE.methods_by_name[rpc].output_type).FromString(reply)
    assert message.status.code == 11100
    assert message.status.req_id
    assert client.budget.used == 0


@pytest.mark.parametrize("rpc", RPCS)
async def test_every_rpc_asks_who_calls(world: World, rpc: str) -> None:
    """Even for what is harmless."""
    client = world.api()
    for key, code in ((None, 11102), ("0" * 64, 11008)):
        reply = await client.ask(rpc, key=key)
        assert reply.status.code == code
    assert client.count("rejected_total", reason="auth") == 2


async def test_the_endpoints_are_those_of_the_service(world: World) -> None:
    """Full names; everything else is the transport's UNIMPLEMENTED."""
    ours = {name for name in world.api().endpoints if name.startswith(V2)}
    assert ours == {V2 + name for name in RPCS}
    assert {name.removeprefix(V2) for name in ours} <= set(SERVICE.methods_by_name)


async def test_a_principal_may_use_only_its_models(world: World) -> None:
    """Refused by name, for predicting and reading alike; lists leave them out."""
    client = world.api(Principal(name="ada", models=("colours", "topic")))
    assert (await client.predict("colours", PICTURE)).status.code == 10000
    reply = await client.predict("wide", PICTURE)
    assert reply.status.code == 11007
    assert "'ada' may not use model tester/tests/wide" in reply.status.details
    ids = {"user_app_id": IDS, "model_id": "wide"}
    for rpc in ("GetModel", "GetModelOutputInfo"):
        assert (await client.ask(rpc, service_pb2.GetModelRequest(**ids))).status.code == 11007
    reply = await client.ask("GetModelVersion", service_pb2.GetModelVersionRequest(**ids))
    assert reply.status.code == 11007
    reply = await client.ask("ListModelVersions", service_pb2.ListModelVersionsRequest(**ids))
    assert reply.status.code == 11007
    reply = await client.ask("ListModelConcepts", service_pb2.ListModelConceptsRequest(**ids))
    assert reply.status.code == 11007
    listed = await client.ask("ListModels", service_pb2.ListModelsRequest(user_app_id=IDS))
    assert {model.id for model in listed.models} == {"colours", "topic"}
    concepts = await client.ask("ListConcepts", service_pb2.ListConceptsRequest(user_app_id=IDS))
    assert {concept.name for concept in concepts.concepts} == {*graphs.CONCEPTS, "good", "bad"}


async def test_a_principal_over_its_rate_is_told_so(world: World) -> None:
    """11005, which stock clients try again after five seconds."""
    client = world.api(Principal(name="ada", requests_per_second=0.001, burst=2))
    codes = [(await client.predict("colours", PICTURE)).status.code for _ in range(3)]
    assert codes == [10000, 10000, 11005]
    assert client.count("rejected_total", reason="rate_limit") == 1


async def test_a_body_over_the_memory_budget_is_refused(world: World) -> None:
    """21354 with how much there is; nothing stays reserved."""
    client = world.api(memory=1000)
    reply = await client.predict(
        "colours", pictures.png(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    )
    assert reply.status.code == 21354
    assert "limits.memory_in_flight" in reply.status.details
    assert client.budget.used == 0


async def test_pixels_over_the_memory_budget_are_refused(world: World) -> None:
    """A small file, a large picture: counted from its header."""
    client = world.api(memory=100_000)
    reply = await client.predict("colours", pictures.png(np.zeros((500, 500, 3), np.uint8)))
    assert reply.status.code == 21354
    assert client.budget.used == 0


async def test_memory_is_given_back_however_a_call_ends(world: World) -> None:
    """Answered, refused, failed, cancelled."""
    client = world.api()
    await client.predict("colours", PICTURE, b"bad")
    await client.predict("nothing", PICTURE)
    await client.raw("PostModelOutputs", b"\xff" * 100)
    with pytest.raises(RpcAbort):
        await client.predict("colours", PICTURE, deadline=time.monotonic() - 1)
    task = asyncio.create_task(client.predict("colours", *([PICTURE] * 100)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.budget.used == 0
    assert client.api.in_flight == 0


# ---- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rpc", ["PostModelOutputs", "GetModel", "ListStatusCodes"])
async def test_a_deadline_that_is_over_ends_the_call(world: World, rpc: str) -> None:
    """With gRPC's own status; nothing is computed for nobody."""
    client = world.api()
    with pytest.raises(RpcAbort) as abort:
        await client.ask(rpc, deadline=time.monotonic() - 0.1)
    assert abort.value.status is RpcStatus.DEADLINE_EXCEEDED
    assert client.count("rejected_total", reason="deadline") == 1


async def test_a_deadline_ahead_is_no_matter(world: World) -> None:
    """The answer comes first."""
    assert (await world.api().predict("colours", PICTURE, deadline=soon())).status.code == 10000


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> "list[asyncio.Future[Any]]":
    """Let nothing reach any device: what is submitted waits for ever."""
    futures: list[asyncio.Future[Any]] = []

    def submit(*arguments: Any, **more: Any) -> Any:
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    monkeypatch.setattr(LocalModel, "submit", submit)
    monkeypatch.setattr(LocalModel, "prompt", lambda *arguments: False)
    return futures


async def until(ready: Any) -> None:
    """Let the loop turn until that is true."""
    async with asyncio.timeout(10):
        while not ready():  # noqa: ASYNC110  # an event would be the thing under test
            await asyncio.sleep(0.001)


async def test_the_servers_own_deadline_holds_where_the_client_set_none(world: World, stuck: Any) -> None:
    """Stock clients set none, and would wait for ever; the rows leave the queue."""
    client = world.api(limits=Limits(request_timeout_s=0.05))
    with pytest.raises(RpcAbort, match=r"deadline of 0\.0\d* s passed") as abort:
        await client.predict("colours", PICTURE)
    assert abort.value.status is RpcStatus.DEADLINE_EXCEEDED
    assert [future.cancelled() for future in stuck] == [True]
    assert client.budget.used == 0


async def test_a_clients_deadline_takes_its_rows_out_of_the_queue(world: World, stuck: Any) -> None:
    """While they wait."""
    with pytest.raises(RpcAbort) as abort:
        await world.api().predict("colours", PICTURE, deadline=time.monotonic() + 0.05)
    assert abort.value.status is RpcStatus.DEADLINE_EXCEEDED
    assert [future.cancelled() for future in stuck] == [True]


async def test_a_caller_that_goes_away_takes_its_rows_out_of_the_queue(world: World, stuck: Any) -> None:
    """Cancelled by the transport, not told anything."""
    client = world.api()
    task = asyncio.create_task(client.predict("colours", PICTURE))
    await until(lambda: stuck)
    assert client.api.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stuck[0].cancelled()
    await asyncio.wait_for(client.api.wait_idle(), 5)


# ---- the end ---------------------------------------------------------------------------------------------------------


async def test_end_answers_running_calls_unavailable(world: World, stuck: Any) -> None:
    """UNAVAILABLE is what every client tries elsewhere; unary calls and streams alike."""
    client = world.api()
    request = predict_request("colours", PICTURE).SerializeToString()
    tasks = [
        asyncio.create_task(client.raw("PostModelOutputs", request)),
        asyncio.create_task(client.stream(V2 + "StreamModelOutputs", [request])),
        asyncio.create_task(client.stream(V2 + "GenerateModelOutputs", [request])),
    ]
    await until(lambda: len(stuck) == 3)
    client.api.end()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, RpcAbort)
        assert result.status is RpcStatus.UNAVAILABLE
        assert "shutting down" in result.message
    await asyncio.wait_for(client.api.wait_idle(), 5)
    assert all(future.cancelled() for future in stuck)


async def test_end_answers_an_idle_stream_unavailable(world: World) -> None:
    """It is open between two messages, and would be forgotten."""
    client = world.api()
    never = asyncio.Event()

    async def requests() -> Any:
        yield predict_request("colours", PICTURE).SerializeToString()
        await never.wait()

    replies = []

    async def read() -> None:
        endpoint = client.endpoints[V2 + "StreamModelOutputs"].stream
        assert endpoint is not None
        async for reply in endpoint(client.call(V2 + "StreamModelOutputs"), requests()):
            replies.append(reply)  # noqa: PERF401

    task = asyncio.create_task(read())
    await until(lambda: replies)
    assert client.api.in_flight == 0
    client.api.end()
    with pytest.raises(RpcAbort) as abort:
        await task
    assert abort.value.status is RpcStatus.UNAVAILABLE


async def test_after_the_end_new_calls_are_unavailable(world: World) -> None:
    """Not accepted, so not lost."""
    client = world.api()
    client.api.end()
    for rpc in ("PostModelOutputs", "GetModel", "StreamModelOutputs"):
        with pytest.raises(RpcAbort) as abort:
            await client.raw(rpc, b"")
        assert abort.value.status is RpcStatus.UNAVAILABLE


async def test_new_calls_are_refused_while_running_ones_go_on(world: World, stuck: Any) -> None:
    """What a drain does first."""
    client = world.api()
    task = asyncio.create_task(client.predict("colours", PICTURE))
    await until(lambda: stuck)
    client.api.refuse_new()
    with pytest.raises(RpcAbort):
        await client.predict("colours", PICTURE)
    assert not task.done()
    assert client.api.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ---- what was not foreseen -------------------------------------------------------------------------------------------


async def test_an_unforeseen_error_is_a_stock_sentence(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """98004 and where to look; the traceback is in the log, once, under the same request id."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError("the secret of /etc/shadow")

    monkeypatch.setattr("appliance.api.messages.payload_of", fail)
    caplog.set_level(logging.INFO)
    client = world.api()
    reply = await client.predict("colours", PICTURE)
    assert reply.status.code == 98004
    assert "shadow" not in str(reply)
    assert not reply.status.stack_trace
    assert not reply.status.internal_details
    records = [record for record in caplog.records if record.exc_info]
    assert len(records) == 1
    assert records[0].req_id == reply.status.req_id  # type: ignore[attr-defined]
    assert "secret of /etc/shadow" in caplog.text
    assert client.count("requests_total", model="colours", version="2", method="PostModelOutputs", code="98004") == 1


async def test_a_call_that_ends_without_an_end_is_counted_as_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter that must stay 0 is one that can move: here the error table itself breaks."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError

    client = world.api()
    assert client.count("requests_lost_total") == 0
    monkeypatch.setattr("appliance.api.status.of_error", fail)
    with pytest.raises(ZeroDivisionError):
        await client.predict("no-such-model", PICTURE)
    assert client.count("requests_lost_total") == 1


async def test_the_detail_of_a_failure_is_for_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The caller learns that its input failed, the operator why the bundle did."""
    reply = await world.api().predict("broken", PICTURE)
    assert "numeric" not in str(reply)
    assert any("not numeric tensors" in str(getattr(record, "detail", "")) for record in caplog.records)


async def test_keys_and_inputs_are_never_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes well or wrong."""
    caplog.set_level(logging.DEBUG)
    client = world.api(log=Log(sample=1.0))
    await client.predict("topic", "the quick brown secret")
    await client.predict("topic", Input(data=Data(ndarray=array([1]))))
    await client.predict("nothing", "the quick brown secret")
    await client.predict("topic", "the quick brown secret", key="f" * 64)
    text = "\n".join(str(record.__dict__) for record in caplog.records)
    assert "answered" in text
    assert client.keys[0] not in text
    assert "f" * 64 not in text
    assert "secret" not in text


async def test_a_bundle_that_vanishes_meanwhile_is_answered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was accepted is answered, with the model it was accepted for."""
    client = world.api()
    original = LocalModel.submit

    def submit(self: Any, *arguments: Any, **more: Any) -> Any:
        world.repository._bundles.pop("colours", None)
        return original(self, *arguments, **more)

    bundle = world.repository._bundles["colours"]
    monkeypatch.setattr(LocalModel, "submit", submit)
    try:
        reply = await client.predict("colours", PICTURE)
    finally:
        world.repository._bundles["colours"] = bundle
    assert reply.status.code == 10000
    assert reply.outputs[0].model.model_version.id == "2"


async def test_calls_and_inputs_are_counted(world: World) -> None:
    """By model, version, method and code; names that callers invent make no series."""
    client = world.api()
    await client.predict("colours", PICTURE, b"bad")
    await client.predict("no-such-model", PICTURE)
    labels = {"model": "colours", "version": "2"}
    assert client.count("requests_total", method="PostModelOutputs", code="10010", **labels) == 1
    assert client.count("inputs_total", code="10000", **labels) == 1
    assert client.count("inputs_total", code="30101", **labels) == 1
    assert client.count("requests_total", method="PostModelOutputs", code="21200", model="", version="") == 1
    series = Counter(
        s.labels["model"] for m in client.metrics.registry.collect() for s in m.samples if "model" in s.labels
    )
    assert "no-such-model" not in series


# ---- request ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["sdk-python-12.5.0", "sdk-python-10.11.1", "x", "a" * 64])
async def test_a_request_id_begins_with_the_clients_prefix(world: World, prefix: str) -> None:
    """And is in every status of the reply."""
    client = world.api()
    body = predict_request("colours", PICTURE, b"bad").SerializeToString()
    reply = service_pb2.MultiOutputResponse.FromString(
        await client.raw("PostModelOutputs", body, x_clarifai_request_id_prefix=prefix)
    )
    assert reply.status.req_id.startswith(f"{prefix}-")
    assert len(reply.status.req_id) == len(prefix) + 33
    assert {output.status.req_id for output in reply.outputs} == {reply.status.req_id}


@pytest.mark.parametrize("prefix", ["", "a" * 65, "a b", "a\nlevel=ERROR", "<script>", "ä", "x\0"])
async def test_a_prefix_that_is_not_plain_is_left_out(world: World, prefix: str) -> None:
    """It is written into logs."""
    found = _request_id(Call("/m", {"x-clarifai-request-id-prefix": prefix}, "peer"))
    assert len(found) == 32
    assert int(found, 16)


# ---- any bytes -------------------------------------------------------------------------------------------------------


def templates() -> dict[str, list[bytes]]:
    """Valid requests of every RPC, to be broken."""
    requests: dict[str, list[Any]] = {
        "PostModelOutputs": [
            predict_request("colours", PICTURE),
            predict_request("topic", "good", output_config={"max_concepts": 2, "min_value": 0.25}),
            predict_request("tensor", Input(data=Data(ndarray=array([[1, 2, 3]])))),
            predict_request("pair", pythonic(a={"ndarray": array([1, 2])}, b={"ndarray": array([3, 4])})),
            predict_request("colours", pythonic(image={"image": Image(base64=PICTURE)}, max_concepts={"int_value": 2})),
            predict_request("colours", get_signatures()),
        ],
        "GetStatusCode": [service_pb2.GetStatusCodeRequest(status_code_id="10000")],
        "ListModels": [service_pb2.ListModelsRequest(user_app_id=IDS, page=1, per_page=2)],
        "GetModelType": [service_pb2.GetModelTypeRequest(model_type_id="visual-classifier")],
        "GetUser": [service_pb2.GetUserRequest(user_app_id=resources_pb2.UserAppIDSet(user_id="me"))],
    }
    requests["GenerateModelOutputs"] = requests["StreamModelOutputs"] = requests["PostModelOutputs"]
    ids = {"user_app_id": IDS, "model_id": "colours", "version_id": "1"}
    for name in RPCS:
        kind = message_factory.GetMessageClass(SERVICE.methods_by_name[name].input_type)
        known = {key: value for key, value in ids.items() if key in kind.DESCRIPTOR.fields_by_name}
        requests.setdefault(name, [kind(**known)])
    return {name: [request.SerializeToString() for request in kinds] for name, kinds in requests.items()}


TEMPLATES = templates()


@st.composite
def broken_requests(draw: Any) -> tuple[str, bytes]:
    """An RPC and a body: noise, or a valid request with some bytes changed, cut out, doubled or put in."""
    rpc = draw(st.sampled_from(RPCS))
    if draw(st.integers(0, 9)) == 0:
        return rpc, draw(st.binary(max_size=60))
    body = bytearray(draw(st.sampled_from(TEMPLATES[rpc])))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(body) - 1)))
        match draw(st.integers(0, 3)):
            case 0 if body:
                body[place] = draw(st.integers(0, 255))
            case 1:
                del body[place : place + draw(st.integers(1, 8))]
            case 2:
                body[place:place] = draw(st.binary(min_size=1, max_size=8))
            case _:
                body[place:place] = body[place : place + draw(st.integers(1, 40))]
    return rpc, bytes(body)


@given(request=broken_requests())
@settings(
    max_examples=1200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_any_bytes_are_answered_or_refused(world: World, fuzzed: Client, request: tuple[str, bytes]) -> None:
    """With a reply that can be read; never an internal error, never anything left behind."""
    rpc, body = request
    reply = await asyncio.wait_for(fuzzed.raw(rpc, body), 20)  # nothing in a body asks for a gRPC status
    kind = message_factory.GetMessageClass(SERVICE.methods_by_name[rpc].output_type)
    message = kind.FromString(reply)
    assert message.status.code != 98004 or rpc == "GetStatusCode"
    assert message.status.code
    if isinstance(message, service_pb2.MultiOutputResponse):
        assert all(output.status.code not in (0, 98004) for output in message.outputs)
    assert fuzzed.budget.used == 0
    assert fuzzed.api.in_flight == 0


@given(
    wanted_code=st.one_of(st.text(max_size=12), st.sampled_from(["10000", "SUCCESS", "0", "²", "९", "1" * 5000, "-1"]))
)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_status_code_is_answered(world: World, fuzzed: Client, wanted_code: str) -> None:
    """Digits of other scripts, too."""
    try:
        request = service_pb2.GetStatusCodeRequest(status_code_id=wanted_code)
    except (UnicodeEncodeError, ValueError):
        return
    reply = await fuzzed.ask("GetStatusCode", request)
    name = status_code_pb2.StatusCode.Name(reply.status.code)
    assert reply.status.code == 11101 or wanted_code.upper() in (name, str(reply.status.code))


@given(data=st.binary(max_size=200))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_bytes_as_a_picture_are_that_inputs_own_fault(world: World, fuzzed: Client, data: bytes) -> None:
    """With the beginnings of every format before them; the neighbour is answered."""
    starts = [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF\x20\0\0\0WEBPVP8 "]
    inputs = [start + data for start in starts]
    reply = await fuzzed.predict("colours", *inputs, PICTURE)
    assert reply.status.code == 10010
    assert {output.status.code for output in reply.outputs[:-1]} <= {30101, 30104, 30105}
    assert reply.outputs[-1].status.code == 10000


@pytest.fixture(scope="module")
def fuzzed(world: World) -> Client:
    """One API for all examples."""
    return world.api()


async def test_parsing_never_takes_nonsense_for_a_message() -> None:
    """The templates are valid: what the fuzzing breaks was whole."""
    for name, bodies in TEMPLATES.items():
        kind = message_factory.GetMessageClass(SERVICE.methods_by_name[name].input_type)
        for body in bodies:
            assert kind.FromString(body).SerializeToString() == body
        with pytest.raises(DecodeError):
            kind.FromString(b"\xff")


# ---- the audit log ---------------------------------------------------------------------------------------------------


async def test_every_end_of_a_call_is_told_for_the_audit_log(world: World) -> None:
    """Whichever way it took: who called, with what, which model, and how it ended."""
    client = world.api(Principal(name="ada"), Principal(name="bob", models=("topic",)), Principal(name="eve", burst=1))
    ada, bob, _ = client.keys
    for _ in range(2):
        await client.predict("colours", PICTURE)
    await client.predict("colours", PICTURE, PICTURE, version="1")
    await client.predict("nothing", PICTURE)
    await client.predict("colours", PICTURE, key=bob)
    await client.predict("colours", PICTURE, key="stranger")
    await client.predict("colours", PICTURE, key=None)
    await client.ask("ListModels")
    with pytest.raises(RpcAbort):
        await client.predict("colours", PICTURE, deadline=time.monotonic() - 1)
    told = client.api.trail.take()
    assert told is not None
    ids = {key: f"key:{digest(key)[:8]}" for key in client.keys}
    model = f"{graphs.USER}/{graphs.APP}/colours"
    assert dict(zip(((use[:5]) for use in told["uses"]), (use[5] for use in told["uses"]), strict=True)) == {
        ("ada", ids[ada], model, "2", 10000): 2,
        ("ada", ids[ada], model, "1", 10000): 1,
        ("ada", ids[ada], "", "", 21200): 1,
        ("ada", ids[ada], "", "", 10000): 1,
        ("ada", ids[ada], "", "", 98009): 1,
        ("bob", ids[bob], model, "2", 11007): 1,
        ("", "", "", "", 11008): 1,
        ("", "", "", "", 11102): 1,
    }
    refused = [(use.principal, use.code, place["method"]) for use, place in told["refused"]]
    assert refused == [
        ("bob", 11007, "PostModelOutputs"),
        ("", 11008, "PostModelOutputs"),
        ("", 11102, "PostModelOutputs"),
    ]


async def test_a_caller_over_its_rate_is_told_by_name(world: World) -> None:
    client = world.api(Principal(name="eve", requests_per_second=0.001, burst=1))
    await client.predict("colours", PICTURE)
    assert (await client.predict("colours", PICTURE)).status.code == 11005
    told = client.api.trail.take()
    assert told is not None
    ((use, place),) = told["refused"]
    assert (use.principal, use.code) == ("eve", 11005)
    assert place["req_id"]


async def test_calls_that_could_not_be_recorded_are_told_to_go_elsewhere(world: World) -> None:
    """Before anything else is done with them; where a body is on its way, before it comes."""
    client = world.api()
    client.api.unrecorded = True
    endpoint = client.endpoints[V2 + "PostModelOutputs"]
    assert endpoint.admit is not None
    with pytest.raises(RpcAbort) as one:
        await client.predict("colours", PICTURE)
    with pytest.raises(RpcAbort) as other:
        endpoint.admit(client.call(V2 + "PostModelOutputs"), 2**20)
    assert {abort.value.status for abort in (one, other)} == {RpcStatus.UNAVAILABLE}
    assert "cannot record calls" in one.value.message
    assert client.count("rejected_total", reason="audit") == 2
    client.api.unrecorded = False
    assert (await client.predict("colours", PICTURE)).status.code == 10000
