"""What a request asks: methods by name or by default, arguments, old form, streams; over real graphs, no sockets."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from support import graphs
from support.api_world import IDS, V2, Client, World

from appliance.api import methods, predict, questions
from appliance.api.questions import Conversation, Rpc, understand
from appliance.core.config import Limits
from appliance.core.errors import RequestError
from appliance.core.memory import MemoryBudget
from appliance.core.types import RpcAbort, RpcStatus

Code = status_code_pb2.StatusCode
Data = resources_pb2.Data
F = TensorProto.FLOAT
pytestmark = pytest.mark.asyncio(loop_scope="module")


def method(name: str, arguments: list[Any], returns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments, "returns": returns, **more}


def scale_model() -> Any:
    """`x` (batch, n), `factor` () → `y` = x · factor."""
    return graphs.make(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        {"x": (F, ["batch", "n"]), "factor": (F, [])},
        {"y": (F, ["batch", "n"])},
    )


ROW = {"name": "x", "type": "list[float]"}
FACTOR = {"name": "factor", "type": "float", "default": 2.0, "range": [-100, 100]}
NUMBERS = {"type": "list[float]"}
IDENTITY = graphs.identity_model(("batch", 3)).SerializeToString()
INDEX = graphs.identity_model(("batch",), TensorProto.INT64).SerializeToString()
METHODS = [
    method("scale", [ROW, FACTOR], NUMBERS),
    method("generate", [ROW, FACTOR], {"type": "float", "iterator": True}),
    method("stream", [{**ROW, "iterator": True}, FACTOR], {**NUMBERS, "iterator": True}),
    method("each", [ROW, FACTOR], {"type": "float", "iterator": True}),
    method("classify", [ROW], {"type": "list[concept]", "output": "y"}, file="three.onnx"),
    method("best", [ROW], {"type": "concept", "output": "y"}, file="three.onnx"),
    method(
        "spell",
        [{"name": "x", "type": "str", "choices": ["no", "yes"], "default": "no"}],
        {"type": "str", "choices": ["NO", "YES"]},
        file="index.onnx",
    ),
    method(
        "predict",
        [{"name": "x", "type": "str", "choices": ["no", "yes"]}],
        {"type": "str", "choices": ["NO", "YES"]},
        file="index.onnx",
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def many(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A catalog with one bundle of many methods, `many`, and one whose only method is raw, `plain`."""
    made = World(tmp_path_factory.mktemp("many"))
    section = {"methods": METHODS, "batching": {"max_rows": 2}}
    config = graphs.bundle_config(made.root / "many", "any-to-any", section, ("cat", "dog", "bird"))
    files = {"three.onnx": IDENTITY, "index.onnx": INDEX}
    graphs.write_bundle(made.root / "many", scale_model(), config, files=files)
    graphs.write_raw(made.root / "plain", graphs.identity_model(), batching={"max_rows": 2})
    await made.look()
    yield made
    await made.close()


@pytest.fixture
def api(many: World) -> Client:
    return many.api()


def floats(*numbers: float) -> Data:
    """A list of floats, as the SDK sends it."""
    data = Data()
    for number in numbers:
        part = data.parts.add()
        part.data.float_value = number
    return data


def call(name: str, **arguments: Any) -> resources_pb2.Input:
    """A pythonic input."""
    given_input = resources_pb2.Input()
    if name:
        given_input.data.metadata["_method_name"] = name
    for key, value in arguments.items():
        part = given_input.data.parts.add(id=key)
        if isinstance(value, Data):
            part.data.CopyFrom(value)
        elif isinstance(value, str):
            part.data.string_value = value
        elif isinstance(value, int):
            part.data.int_value = value
        else:
            part.data.float_value = value
    return given_input


def asking(*inputs: resources_pb2.Input, params: Any = None, model: str = "many", **output_config: Any) -> Any:
    request = service_pb2.PostModelOutputsRequest(user_app_id=IDS, model_id=model, inputs=inputs)
    info = request.model.model_version.output_info
    if params:
        info.params.update(params)
    if output_config:
        info.output_config.CopyFrom(resources_pb2.OutputConfig(**output_config))
    return request


def numbers(output: Any) -> list[float]:
    """The floats in what a pythonic call returned."""
    (part,) = output.data.parts
    assert part.id == "return"
    return [each.data.float_value for each in part.data.parts]


async def stream(api: Client, *requests: Any, rpc: str = "StreamModelOutputs") -> list[Any]:
    bodies = [request.SerializeToString() for request in requests]
    return [service_pb2.MultiOutputResponse.FromString(body) for body in await api.stream(V2 + rpc, bodies)]


# ---- which method ----------------------------------------------------------------------------------------------------


async def test_a_method_is_called_by_its_name(api: Client) -> None:
    reply = await api.ask("PostModelOutputs", asking(call("scale", x=floats(1, 2), factor=3.0)))
    assert reply.status.code == Code.SUCCESS, reply
    assert numbers(reply.outputs[0]) == [3.0, 6.0]


async def test_every_method_is_published(api: Client) -> None:
    request = service_pb2.GetModelVersionRequest(user_app_id=IDS, model_id="many")
    reply = await api.ask("GetModelVersion", request)
    kinds = {signature.name: signature.method_type for signature in reply.model_version.method_signatures}
    assert kinds == {m["name"]: {"generate": 2, "each": 2, "stream": 4}.get(m["name"], 1) for m in METHODS}
    asked = await api.ask("PostModelOutputs", asking(call(methods.GET_SIGNATURES)))
    assert set(json.loads(asked.outputs[0].data.text.raw)) == set(kinds)


async def test_several_methods_in_one_request_are_answered_each_by_its_own(api: Client) -> None:
    reply = await api.ask(
        "PostModelOutputs",
        asking(
            call("scale", x=floats(1)), call("spell", x="yes"), call("nonsense"), call("scale", x=floats(5), factor=1.0)
        ),
    )
    assert reply.status.code == Code.MIXED_STATUS
    assert [output.status.code for output in reply.outputs] == [
        Code.SUCCESS,
        Code.SUCCESS,
        Code.MODEL_INVALID_ARGUMENT,
        Code.SUCCESS,
    ]
    assert numbers(reply.outputs[0]) == [2.0]
    assert reply.outputs[1].data.parts[0].data.string_value == "YES"
    assert "has no method 'nonsense'; it has scale, generate" in reply.outputs[2].status.details
    assert numbers(reply.outputs[3]) == [5.0]


async def test_each_rpc_has_the_method_of_callers_that_name_none(api: Client) -> None:
    """predict, generate, stream; the reply to parts is pythonic, that to the old form is not."""
    pythonic = await api.ask("PostModelOutputs", asking(call("", x="yes")))
    assert pythonic.outputs[0].data.parts[0].data.string_value == "YES"
    old = resources_pb2.Input(data=Data(text=resources_pb2.Text(raw="yes")))
    reply = await api.ask("PostModelOutputs", asking(old))
    assert (reply.outputs[0].data.string_value, reply.outputs[0].data.text.raw) == ("YES", "YES")
    generated = await stream(api, asking(call("", x=floats(1, 2))), rpc="GenerateModelOutputs")
    assert [each.outputs[0].data.parts[0].data.float_value for each in generated] == [2.0, 4.0]
    streamed = await stream(api, asking(call("", x=floats(1))))
    assert numbers(streamed[0].outputs[0]) == [2.0]


async def test_a_long_stream_is_held_and_lets_others_have_their_turns(api: Client) -> None:
    """All replies are made before the first is sent."""
    turns: list[int] = []

    async def others() -> None:
        while True:
            turns.append(api.budget.used)
            await asyncio.sleep(0)

    asked = asking(call("", x=floats(*range(3000))))
    other = asyncio.create_task(others())
    try:
        replies = await stream(api, asked, rpc="GenerateModelOutputs")
    finally:
        other.cancel()
    size = 3000 * len(replies[0].SerializeToString())
    assert max(turns) > size * 0.9
    assert len({used for used in turns if used > size // 10}) > 30


async def test_raw_tensors_called_by_parts_answer_in_a_part(api: Client) -> None:
    """Whether they name the method or not: parts are the method protocol."""
    array = Data(ndarray=resources_pb2.NDArray(buffer=np.ones(3, np.float32).tobytes(), shape=[3], dtype="float32"))
    for name in ("", "predict"):
        reply = await api.ask("PostModelOutputs", asking(call(name, x=array), model="plain"))
        assert reply.outputs[0].data.parts[0].id == "return"
        assert reply.outputs[0].data.parts[0].data.ndarray.shape == [3]
    old = await api.ask("PostModelOutputs", asking(resources_pb2.Input(data=array), model="plain"))
    assert old.outputs[0].data.ndarray.shape == [3]


@pytest.mark.parametrize(
    ("name", "rpc", "words"),
    [
        ("each", "PostModelOutputs", "Method 'each' streams; call it with GenerateModelOutputs"),
        ("stream", "PostModelOutputs", "call it with StreamModelOutputs"),
        ("stream", "GenerateModelOutputs", "call it with StreamModelOutputs"),
    ],
)
async def test_a_streaming_method_called_by_another_rpc_says_which_one(
    api: Client, name: str, rpc: str, words: str
) -> None:
    reply = await api.ask(rpc, asking(call(name, x=floats(1))))
    assert reply.status.code == Code.MODEL_INVALID_ARGUMENT
    assert words in reply.status.details


@pytest.mark.parametrize("rpc", ["PostModelOutputs", "GenerateModelOutputs", "StreamModelOutputs"])
async def test_a_method_that_does_not_stream_is_called_by_any_rpc(api: Client, rpc: str) -> None:
    reply = await api.ask(rpc, asking(call("scale", x=floats(1)), call("scale", x=floats(2))))
    assert [numbers(output) for output in reply.outputs] == [[2.0], [4.0]]


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_input", "code", "words"),
    [
        (call("scale", factor=1.0), Code.INPUT_INVALID_ARGUMENT, "Missing required field: x; method 'scale' takes it"),
        (call("scale"), Code.INPUT_INVALID_ARGUMENT, "Missing required field: x"),
        (call("scale", x=floats(1), y=1.0), Code.INPUT_INVALID_ARGUMENT, "has no argument 'y'; it takes factor, x"),
        (
            call("scale", x=floats(1), factor="two"),
            Code.INPUT_INVALID_ARGUMENT,
            "factor must be a number; it came as string_value",
        ),
        (
            call("scale", x=floats(1), factor=101.0),
            Code.INPUT_INVALID_ARGUMENT,
            "factor is 101; it must be from -100 to 100",
        ),
        (
            call("scale", x=floats(1), factor=float("nan")),
            Code.INPUT_INVALID_ARGUMENT,
            "factor is nan; it must be from",
        ),
        (call("scale", x=floats()), Code.INPUT_INVALID_ARGUMENT, "is empty"),
        (call("spell", x="maybe"), Code.INPUT_INVALID_ARGUMENT, "x is 'maybe'; it must be one of no, yes"),
        (call("classify", x=floats(1, 2, 3), max_concepts=0), Code.MODEL_INVALID_ARGUMENT, "max_concepts is 0"),
        (call("classify", x=floats(1, 2, 3), max_concepts=201), Code.MODEL_INVALID_ARGUMENT, "from 1 to 200"),
        (call("classify", x=floats(1, 2, 3), min_value=2.0), Code.MODEL_INVALID_ARGUMENT, "from 0 to 1"),
        (
            call("best", x=floats(1, 2, 3), max_concepts=1),
            Code.INPUT_INVALID_ARGUMENT,
            "has no argument 'max_concepts'",
        ),
    ],
)
async def test_a_bad_argument_is_that_inputs_own(api: Client, given_input: Any, code: int, words: str) -> None:
    """With the argument's name and what to do; its neighbour is answered."""
    reply = await api.ask("PostModelOutputs", asking(given_input, call("scale", x=floats(1))))
    assert [output.status.code for output in reply.outputs] == [code, Code.SUCCESS]
    assert words in reply.outputs[0].status.details


async def test_an_argument_given_twice_is_refused(api: Client) -> None:
    given_input = call("scale", x=floats(1))
    given_input.data.parts.add(id="x").data.CopyFrom(floats(2))
    reply = await api.ask("PostModelOutputs", asking(given_input))
    assert "was given an argument twice" in reply.outputs[0].status.details


async def test_the_first_argument_may_stand_in_data_itself(api: Client) -> None:
    """Required or not; an empty part, and nothing at all, are no argument."""
    inlined = call("spell")
    inlined.data.string_value = "yes"
    empty = call("spell")
    empty.data.parts.add()
    reply = await api.ask("PostModelOutputs", asking(inlined, empty, call("spell")))
    assert [output.data.parts[0].data.string_value for output in reply.outputs] == ["YES", "NO", "NO"]


async def test_limits_are_arguments_where_concepts_are_returned(api: Client) -> None:
    some = call("classify", x=floats(0.1, 0.9, 0.5), max_concepts=2)
    reply = await api.ask("PostModelOutputs", asking(some, call("classify", x=floats(0.1, 0.9, 0.5), min_value=0.6)))
    found = [[c.id for c in output.data.parts[0].data.concepts] for output in reply.outputs]
    assert found == [["c-dog", "c-bird"], ["c-dog"]]
    wanted = Data()
    wanted.parts.add().data.string_value = "cat"
    wanted.parts.add().data.string_value = "nobody"
    reply = await api.ask("PostModelOutputs", asking(call("classify", x=floats(0.1, 0.9, 0.5), select_concepts=wanted)))
    assert reply.status.code == Code.MIXED_STATUS
    assert "'nobody'" in reply.status.details
    assert [c.id for c in reply.outputs[0].data.parts[0].data.concepts] == ["c-cat"]


# ---- the old form ----------------------------------------------------------------------------------------------------


DETECT = [
    {"name": "boxes", "type": "ndarray"},
    {"name": "scores", "type": "list[float]", "default": [0.25, 0.5]},
    {"name": "least", "type": "float", "default": 0.125},
]
REGIONS = {"type": "list[region]", "output": "b", "scores": "s", "min_score": "least"}


def boxes_model() -> Any:
    """`boxes` (batch, n, 4), `scores` (batch, n) → `b`, `s`, the same."""
    shapes = ((F, ["batch", "n", 4]), (F, ["batch", "n"]))
    nodes = [helper.make_node("Identity", ["boxes"], ["b"]), helper.make_node("Identity", ["scores"], ["s"])]
    return graphs.make(nodes, dict(zip(("boxes", "scores"), shapes, strict=True)), dict(zip("bs", shapes, strict=True)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def old(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Bundles whose `predict` is declared: `concepts` (x, ndarray → concepts), `scale` (ndarray and factor)."""
    made = World(tmp_path_factory.mktemp("old"))
    array = {"name": "x", "type": "ndarray"}
    for name, model, section in (
        ("concepts", graphs.identity_model(("batch", 3)), method("predict", [array], {"type": "list[concept]"})),
        ("scale", scale_model(), method("predict", [array, FACTOR], {"type": "ndarray"})),
        ("detector", boxes_model(), method("predict", DETECT, REGIONS)),
    ):
        config = graphs.bundle_config(made.root / name, "any-to-any", {"methods": [section]}, ("cat", "dog", "bird"))
        graphs.write_bundle(made.root / name, model, config)
    await made.look()
    yield made
    await made.close()


def array_input(*values: float) -> resources_pb2.Input:
    body = np.array(values, np.float32)
    return resources_pb2.Input(
        data=Data(ndarray=resources_pb2.NDArray(buffer=body.tobytes(), shape=body.shape, dtype="float32"))
    )


async def test_output_config_cuts_a_declared_methods_concepts(old: World) -> None:
    api = old.api()
    given_input = array_input(0.1, 0.9, 0.5)
    both = await api.ask("PostModelOutputs", asking(given_input, model="concepts", max_concepts=2))
    assert [c.id for c in both.outputs[0].data.concepts] == ["c-dog", "c-bird"]
    named = await api.ask("PostModelOutputs", asking(given_input, model="concepts", params={"max_concepts": 1}))
    assert [c.id for c in named.outputs[0].data.concepts] == ["c-dog"]
    bad = await api.ask("PostModelOutputs", asking(given_input, model="concepts", max_concepts=201))
    assert (bad.status.code, len(bad.outputs)) == (Code.MODEL_INVALID_ARGUMENT, 0)
    foreign = await api.ask("PostModelOutputs", asking(given_input, model="concepts", language="ja"))
    assert foreign.status.code == Code.MODEL_INVALID_ARGUMENT
    assert "leave it out" in foreign.status.details


@pytest.mark.parametrize("factor", [3, 3.0, "3", "3.0"])
async def test_inference_params_are_arguments(old: World, factor: Any) -> None:
    """Numbers may come as texts, as the platform's samples write them."""
    reply = await old.api().ask("PostModelOutputs", asking(array_input(1, 2), model="scale", params={"factor": factor}))
    assert np.frombuffer(reply.outputs[0].data.ndarray.buffer, np.float32).tolist() == [3.0, 6.0]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"fctor": 3}, "no parameter 'fctor'; it has factor, x"),
        ({"factor": "three"}, "factor must be a number; it came as 'three'"),
        ({"factor": 101}, "factor is 101; it must be from -100 to 100"),
        ({"factor": [1]}, "factor must be a number"),
        ({"factor": None}, "factor must be a number"),
        ({"factor": float("nan")}, "factor is not finite"),
    ],
)
async def test_a_bad_parameter_is_the_requests_own(old: World, params: Any, words: str) -> None:
    """At the top, 21202, before anything is run."""
    reply = await old.api().ask("PostModelOutputs", asking(array_input(1, 2), model="scale", params=params))
    assert (reply.status.code, len(reply.outputs)) == (Code.MODEL_INVALID_ARGUMENT, 0)
    assert words in reply.status.details


async def test_what_is_missing_in_the_old_form_is_said(old: World) -> None:
    text = resources_pb2.Input(data=Data(text=resources_pb2.Text(raw="hello")))
    reply = await old.api().ask("PostModelOutputs", asking(text, array_input(1), model="scale"))
    assert [output.status.code for output in reply.outputs] == [Code.INPUT_INVALID_ARGUMENT, Code.SUCCESS]
    assert (
        "Field x is required but not set; method 'predict' takes it from data.ndarray"
        in reply.outputs[0].status.details
    )


@pytest.mark.parametrize(
    ("params", "output_config", "expected"),
    [
        ({}, {}, [0.5, 0.25]),
        ({"least": 0.3}, {}, [0.5]),
        ({}, {"min_value": 0.3}, [0.5]),
        ({"least": 0.2}, {"min_value": 0.3}, [0.5, 0.25]),  # what the parameter says is closer
        ({"scores": [0.75, 0.5]}, {}, [0.75, 0.5]),
        ({}, {"select_concepts": [resources_pb2.Concept(name="dog")]}, []),
    ],
)
async def test_regions_are_cut_by_output_config_too(old: World, params: Any, output_config: Any, expected: Any) -> None:
    """There `min_value` is the method's own threshold; a parameter of that name comes first."""
    body = np.zeros((2, 4), np.float32)
    array = resources_pb2.NDArray(buffer=body.tobytes(), shape=body.shape, dtype="float32")
    request = asking(resources_pb2.Input(data=Data(ndarray=array)), model="detector", params=params, **output_config)
    reply = await old.api().ask("PostModelOutputs", request)
    assert reply.status.code == Code.SUCCESS, reply
    assert [region.value for region in reply.outputs[0].data.regions] == expected


async def test_a_threshold_that_is_no_number_is_refused(old: World) -> None:
    body = np.zeros((2, 4), np.float32)
    array = Data(ndarray=resources_pb2.NDArray(buffer=body.tobytes(), shape=body.shape, dtype="float32"))
    reply = await old.api().ask("PostModelOutputs", asking(call("", boxes=array, least=float("nan")), model="detector"))
    assert "least is nan; it must be a number" in reply.outputs[0].status.details


async def test_a_million_bytes_of_numbers_are_read_beside_the_loop(api: Client) -> None:
    """The loop goes on turning, and the answer is the same."""
    request = asking(call("scale", x=floats(*range(1, 150_001)), factor=2.0))
    assert request.ByteSize() > 1 << 20
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turning = asyncio.ensure_future(turn())
    reply = await api.ask("PostModelOutputs", request)
    turning.cancel()
    assert turns > 10
    assert numbers(reply.outputs[0])[-1] == 300_000.0


# ---- streams out -----------------------------------------------------------------------------------------------------


async def test_a_method_that_streams_sends_a_message_for_each_element(api: Client) -> None:
    replies = await stream(api, asking(call("each", x=floats(1, 2, 3))), rpc="GenerateModelOutputs")
    assert [reply.status.code for reply in replies] == [Code.SUCCESS] * 3
    assert [reply.outputs[0].data.parts[0].data.float_value for reply in replies] == [2.0, 4.0, 6.0]
    assert len({reply.outputs[0].id for reply in replies}) == 3


async def test_no_elements_are_no_messages(many: World) -> None:
    """The stream just ends."""
    servable = _servable(many)
    task = servable.offers["each"].task
    (answer,) = task.encode({"y": np.zeros((1, 0), np.float32)}, 1, questions.PredictOptions())
    assert answer.value == []
    assert predict._elements(answer) == []


async def test_an_error_is_the_streams_one_message(api: Client) -> None:
    (reply,) = await stream(api, asking(call("each", x=floats())), rpc="GenerateModelOutputs")
    assert reply.status.code == Code.FAILURE
    assert reply.outputs[0].status.code == Code.INPUT_INVALID_ARGUMENT


async def test_a_method_that_streams_takes_one_input(api: Client) -> None:
    (reply,) = await stream(api, asking(*[call("each", x=floats(1))] * 2), rpc="GenerateModelOutputs")
    assert reply.status.code == Code.MODEL_INVALID_ARGUMENT
    assert "2 inputs came; send one in a message" in reply.status.details


# ---- streams both ways -----------------------------------------------------------------------------------------------


async def test_the_first_message_carries_the_arguments_of_all(api: Client) -> None:
    """Later ones bring the stream's item alone."""
    replies = await stream(
        api, asking(call("stream", x=floats(1), factor=3.0)), *(asking(call("stream", x=floats(i))) for i in (2, 3))
    )
    assert [numbers(reply.outputs[0]) for reply in replies] == [[3.0], [6.0], [9.0]]


async def test_an_item_that_fails_ends_nothing(api: Client) -> None:
    replies = await stream(
        api,
        asking(call("stream", x=floats(1))),
        asking(call("stream", x=floats())),
        asking(call("stream", x=floats(3))),
    )
    assert [reply.status.code for reply in replies] == [Code.SUCCESS, Code.FAILURE, Code.SUCCESS]
    assert numbers(replies[2].outputs[0]) == [6.0]


async def test_two_streams_share_nothing(api: Client) -> None:
    one, two = await asyncio.gather(
        stream(api, asking(call("stream", x=floats(1), factor=3.0)), asking(call("stream", x=floats(1)))),
        stream(api, asking(call("stream", x=floats(1), factor=5.0)), asking(call("stream", x=floats(1)))),
    )
    assert [numbers(reply.outputs[0]) for reply in (*one, *two)] == [[3.0], [3.0], [5.0], [5.0]]


async def test_limits_hold_for_each_message(api: Client) -> None:
    replies = await stream(
        api, asking(), asking(call("stream", x=floats(1))), asking(*[call("stream", x=floats(1))] * 129)
    )
    assert [reply.status.code for reply in replies] == [Code.INPUT_INVALID_REQUEST, Code.SUCCESS, Code.INPUT_OVER_LIMIT]


async def test_what_a_stream_keeps_is_reserved_until_it_ends(many: World) -> None:
    """The first message's arguments stay; they are counted, and given back however the stream ends."""
    api = many.api()
    first = call("stream", x=floats(1), factor=3.0)
    seen = []

    async def requests() -> AsyncIterator[bytes]:
        yield asking(first).SerializeToString()
        seen.append(api.budget.used)
        yield asking(call("stream", x=floats(2))).SerializeToString()
        seen.append(api.budget.used)

    endpoint = api.endpoints[V2 + "StreamModelOutputs"].stream
    assert endpoint is not None
    replies = [reply async for reply in endpoint(api.call(V2 + "StreamModelOutputs"), requests())]
    assert len(replies) == 2
    assert seen[0] == seen[1] == first.data.parts[1].data.ByteSize()
    assert api.budget.used == 0


async def test_a_stream_that_wants_to_keep_more_than_is_free_is_refused(many: World) -> None:
    """And keeps nothing."""
    budget = MemoryBudget(1000)
    conversation = Conversation(lambda owner: budget.expect(0, owner))
    called = _servable(many).offers["stream"].task.method
    large = Data(string_value="x" * 900)
    conversation.complete("m", called, {"x": floats(1), "factor": large})
    with pytest.raises(Exception, match="are free for it"):
        conversation.reserve("ada")
    assert budget.used == 0
    assert conversation.complete("m", called, {"x": floats(1)}) == {"x": floats(1)}


async def test_a_caller_who_leaves_in_the_middle_leaves_nothing_behind(many: World) -> None:
    """Memory, concurrency and what is in flight are given back; nothing is lost."""
    api = many.api()
    endpoint = api.endpoints[V2 + "GenerateModelOutputs"].stream
    assert endpoint is not None

    async def requests() -> AsyncIterator[bytes]:
        yield asking(call("each", x=floats(1, 2, 3))).SerializeToString()

    replies = endpoint(api.call(V2 + "GenerateModelOutputs"), requests())
    await anext(replies)
    assert api.api.in_flight == 1  # the caller has not taken all yet
    assert api.budget.used > 0
    await replies.aclose()  # type: ignore[attr-defined]
    assert (api.api.in_flight, api.budget.used) == (0, 0)
    await api.api.wait_idle()
    assert api.count("requests_lost_total") == 0


async def test_a_drain_lets_a_stream_finish_its_message_and_ends_it_after(many: World) -> None:
    """What was accepted is answered; the next message is told to try elsewhere."""
    api = many.api()
    endpoint = api.endpoints[V2 + "StreamModelOutputs"].stream
    assert endpoint is not None

    async def requests() -> AsyncIterator[bytes]:
        yield asking(call("stream", x=floats(1))).SerializeToString()
        api.api.refuse_new()
        yield asking(call("stream", x=floats(2))).SerializeToString()

    replies = endpoint(api.call(V2 + "StreamModelOutputs"), requests())
    assert await anext(replies)
    with pytest.raises(RpcAbort) as caught:
        await anext(replies)
    assert caught.value.status is RpcStatus.UNAVAILABLE
    await api.api.wait_idle()
    assert (api.budget.used, api.count("requests_lost_total")) == (0, 0)


# ---- anything --------------------------------------------------------------------------------------------------------


def _servable(world: World) -> Any:
    with world.repository.use(graphs.USER, graphs.APP, "many", "") as servable:
        return servable


TEXTS = st.text(max_size=8)
VALUES = st.one_of(
    TEXTS.map(lambda text: Data(string_value=text.encode("utf-8", "replace").decode())),
    st.floats().map(lambda number: Data(float_value=number)),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: Data(int_value=number)),
    st.binary(max_size=40).map(lambda body: Data(image=resources_pb2.Image(base64=body))),
    st.builds(
        lambda body, shape, dtype: Data(ndarray=resources_pb2.NDArray(buffer=body, shape=shape, dtype=dtype)),
        st.binary(max_size=24),
        st.lists(st.integers(0, 2**32 - 1), max_size=3),
        st.sampled_from(["float32", "int64", "O", "", "U9", "float32,float32"]),
    ),
    st.lists(st.floats(), max_size=3).map(lambda found: floats(*found)),
)
INPUTS = st.builds(
    lambda name, parts, top: _composed(name, parts, top),
    st.sampled_from(["", *[m["name"] for m in METHODS], "nonsense"]),
    st.lists(
        st.tuples(st.sampled_from(["x", "factor", "max_concepts", "min_value", "select_concepts", "", "z"]), VALUES),
        max_size=3,
    ),
    st.none() | VALUES,
)


def _composed(name: str, parts: list[tuple[str, Data]], top: Data | None) -> resources_pb2.Input:
    made = call(name)
    for key, value in parts:
        made.data.parts.add(id=key).data.CopyFrom(value)
    if top is not None:
        made.data.MergeFrom(top)
    return made


PARAMS = st.dictionaries(
    st.sampled_from(["x", "factor", "max_concepts", "q"]),
    st.floats() | st.text("0.aé", max_size=4) | st.booleans(),
    max_size=2,
)


async def test_whatever_comes_is_a_question_or_a_request_error(many: World) -> None:
    """Nothing else is ever raised, and each input has its question."""
    servable = _servable(many)

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(st.lists(INPUTS, min_size=1, max_size=2), st.sampled_from(Rpc), PARAMS)
    def check(inputs: Any, rpc: Rpc, params: Any) -> None:
        budget = MemoryBudget(10**6)
        conversation = Conversation(lambda owner: budget.expect(0, owner)) if rpc is Rpc.STREAM else None
        try:
            found, _ = understand(asking(*inputs, params=params), servable, Limits(), rpc, conversation)
        except RequestError:
            return
        assert len(found) == len(inputs)

    check()


async def test_whatever_bytes_come_as_data_are_understood_or_refused(many: World) -> None:
    """Bytes that are a message by accident too."""
    servable = _servable(many)

    @settings(max_examples=300)
    @given(st.binary(max_size=200))
    def check(body: bytes) -> None:
        with contextlib.suppress(DecodeError, RequestError):
            given_input = resources_pb2.Input(data=Data.FromString(body))
            understand(asking(given_input), servable, Limits(), Rpc.POST)

    check()
