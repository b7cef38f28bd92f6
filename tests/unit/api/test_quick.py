"""The quick way: the same answers, counts and limits as the ordinary one, or a clean refusal to serve."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_pb2
from google.rpc import status_pb2 as rpc_status_pb2
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support import graphs, pictures
from support.api_world import IDS, PICTURE, V2, Client, World, predict_request, soon
from support.infer import infer_request

from appliance.api import inference_pb2 as pb
from appliance.api import oip
from appliance.api.keys import revoke_key
from appliance.core.config import Principal
from appliance.core.types import RpcAbort, RpcStatus
from appliance.engine.inline import InlineLane
from appliance.engine.session import Session

pytestmark = pytest.mark.asyncio(loop_scope="module")

PREDICT = V2 + "PostModelOutputs"


INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Door:
    """A call with a quick way: its usual request, for `colours`, and one whose picture is none."""

    rpc: str
    name: str
    reply: Any
    usual: Any
    bad: Any


def element(content: bytes) -> bytes:
    """A BYTES tensor of one element, in binary form."""
    return len(content).to_bytes(4, "little") + content


def picture_request(content: bytes, **fields: Any) -> pb.ModelInferRequest:
    """For `colours`."""
    return infer_request("colours", ("image", "BYTES", [1], element(content)), **fields)


CLARIFAI = Door(
    PREDICT,
    "PostModelOutputs",
    service_pb2.MultiOutputResponse,
    predict_request("colours", PICTURE),
    predict_request("colours", b"bad"),
)
KSERVE = Door(INFER, "kserve.ModelInfer", pb.ModelInferResponse, picture_request(PICTURE), picture_request(b"bad"))


@pytest.fixture(params=[CLARIFAI, KSERVE], ids=lambda door: door.name)
def door(request: pytest.FixtureRequest) -> Any:
    """Both of them."""
    return request.param


class Quick:
    """Calls that take the quick way or none."""

    def __init__(self, client: Client, door: Door = CLARIFAI) -> None:
        self.client = client
        self.door = door
        self.endpoint = client.endpoints[door.rpc]
        self.replies: list[bytes | RpcAbort] = []

    def offer(self, request: Any, **call: Any) -> bool:
        """Whether the call was taken."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        assert self.endpoint.quick is not None
        return self.endpoint.quick(self.client.call(self.door.rpc, **call), body, self.replies.append)

    async def ask(self, request: Any, **call: Any) -> Any:
        """The reply, a message or an RpcAbort."""
        assert self.offer(request, **call)
        await asyncio.wait_for(self.client.api.wait_idle(), 10)
        reply = self.replies.pop()
        return reply if isinstance(reply, RpcAbort) else self.door.reply.FromString(reply)


def counters(client: Client) -> dict[Any, float]:
    """Every sample that says how often something happened."""
    return {
        (sample.name, tuple(sample.labels.items())): sample.value
        for metric in client.metrics.registry.collect()
        for sample in metric.samples
        if sample.name.endswith(("_total", "_count")) and "process" not in sample.name
    }


def array(shape: list[int]) -> resources_pb2.Input:
    """Ones."""
    buffer = np.ones(shape, np.float32).tobytes()
    ndarray = resources_pb2.NDArray(buffer=buffer, shape=shape, dtype="float32")
    return resources_pb2.Input(id="mine", data=resources_pb2.Data(ndarray=ndarray))


# ---- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        predict_request("colours", PICTURE),
        predict_request("colours", PICTURE, version="1"),
        predict_request("colours", PICTURE, output_config={"max_concepts": 2, "min_value": 0.1}),
        predict_request("wide", PICTURE),
        predict_request("topic", "a text about cats"),
        predict_request("vector", PICTURE),
        predict_request("tensor", array([3])),
        predict_request("tensor", array([2, 3])),
    ],
    ids=lambda request: request.model_id,
)
async def test_the_answer_is_the_ordinary_one(world: World, request_: Any) -> None:
    """But for ids and times."""
    client = world.api()
    found = await Quick(client).ask(request_)
    assert client.endpoints[PREDICT].unary is not None
    body = await client.endpoints[PREDICT].unary(client.call(PREDICT), request_.SerializeToString())
    wanted = service_pb2.MultiOutputResponse.FromString(body)
    for response in (found, wanted):
        assert response.status.code == 10000
        for status in (response.status, response.outputs[0].status):
            assert len(status.req_id) == 32
            status.req_id = ""
        for name in ("id", "created_at"):
            response.outputs[0].ClearField(name)
        if request_.inputs[0].id:
            assert response.outputs[0].input.id == request_.inputs[0].id
        response.outputs[0].input.id = ""
    assert found == wanted


async def test_the_counts_are_the_ordinary_ones(world: World, door: Door) -> None:
    """Metrics, budget, meters and calls in flight."""
    quick, ordinary = (world.api(Principal(name="ada", concurrency=9)) for _ in range(2))
    request = door.usual
    await Quick(quick, door).ask(request)
    assert ordinary.endpoints[door.rpc].unary is not None
    await ordinary.endpoints[door.rpc].unary(ordinary.call(door.rpc), request.SerializeToString())
    assert counters(quick) == counters(ordinary)
    for client in (quick, ordinary):
        assert client.budget.used == 0
        assert client.api.in_flight == 0
        assert next(iter(client.api._authenticator._meters.values())).in_flight == 0


async def test_the_log_line_is_the_ordinary_one(world: World, door: Door, caplog: pytest.LogCaptureFixture) -> None:
    """One in so many, with the same fields."""
    caplog.set_level(logging.INFO)
    client = world.api(log={"sample": 1.0})
    await Quick(client, door).ask(door.usual)
    (record,) = [record for record in caplog.records if record.message == "answered"]
    fields: Any = record
    assert (fields.method, fields.principal) == (door.name, "default")
    assert (fields.model, fields.version) == (f"{graphs.USER}/{graphs.APP}/colours", "2")
    assert len(fields.req_id) == 32


async def test_calls_of_one_turn_share_a_run(world: World, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own answer; all are in flight until then."""
    runs = []
    original = Session.run

    def spy(self: Any, outputs: Any, feeds: Any) -> Any:
        runs.append({name: len(array) for name, array in feeds.items()})
        return original(self, outputs, feeds)

    monkeypatch.setattr(Session, "run", spy)
    client = world.api()
    quick = Quick(client, door)
    request = door.usual.SerializeToString()
    assert all(quick.offer(request) for _ in range(3))
    assert client.api.in_flight == 3
    assert not quick.replies
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert len(quick.replies) == 3
    assert [list(run.values()) for run in runs] == [[3]]
    assert client.budget.used == 0


# ---- KServe: the same answers ----------------------------------------------------------------------------------------

ROW = np.array([[0.5, -1, 2]], np.float32).tobytes()
PAIR = [(name, "FP32", [2, 2], np.arange(4, dtype=np.float32).tobytes()) for name in "ba"]


def typed_request(model: str, name: str, datatype: str, shape: list[int], field: str, values: Any) -> Any:
    """A request of one tensor in a field of its own."""
    request = pb.ModelInferRequest(model_name=model)
    given_ = request.inputs.add(name=name, datatype=datatype, shape=shape)
    getattr(given_.contents, field).extend(values)
    return request


def changed(request: Any, **fields: Any) -> Any:
    """With outputs asked for by name, or parameters that are whole numbers."""
    for name in fields.get("outputs", ()):
        request.outputs.add(name=name)
    for name, value in fields.get("parameters", {}).items():
        request.parameters[name].int64_param = value
    return request


@pytest.mark.parametrize(
    "request_",
    [
        picture_request(PICTURE),
        picture_request(PICTURE, model_version="1", id="seven"),
        changed(picture_request(PICTURE), parameters={"max_concepts": 2}, outputs=["concepts"]),
        typed_request("colours", "image", "BYTES", [1, 1], "bytes_contents", [PICTURE]),
        infer_request("wide", ("image", "BYTES", [1], element(PICTURE))),
        infer_request("topic", ("text", "BYTES", [1], element("Über cats".encode()))),
        infer_request("vector", ("image", "BYTES", [1], element(PICTURE))),
        infer_request("tensor", ("x", "FP32", [1, 3], ROW)),
        infer_request(f"{graphs.USER}/{graphs.APP}/tensor", ("x", "FP32", [3, 3], ROW * 3)),
        typed_request("tensor", "x", "FP32", [2, 3], "fp32_contents", [0, 1, 2, 3, 4, 5]),
        infer_request("pair", *PAIR),
        changed(infer_request("pair", *PAIR), outputs=["product", "sum"]),
    ],
    ids=lambda request: f"{request.model_name} {len(request.inputs[0].shape)}",
)
async def test_kserves_answer_is_the_ordinary_one(world: World, request_: Any) -> None:
    """Byte for byte: it has neither ids of ours nor times."""
    client = world.api()
    quick = Quick(client, KSERVE)
    assert quick.offer(request_)
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert client.endpoints[INFER].unary is not None
    assert quick.replies == [await client.endpoints[INFER].unary(client.call(INFER), request_.SerializeToString())]
    assert client.budget.used == 0


@pytest.mark.parametrize(
    "request_",
    [
        b"\xff\xff\xff",
        pb.ModelInferRequest(),
        infer_request("no-such-model"),
        infer_request("broken"),
        picture_request(PICTURE, model_version="no-such-version"),
        picture_request(b"not a picture"),
        picture_request(pictures.truncated(pictures.png(), 0.7)),
        infer_request("colours", ("image", "BYTES", [2], 2 * element(PICTURE))),
        infer_request("colours", ("image", "BYTES", [0], b"")),
        infer_request("topic", ("text", "BYTES", [1], element(b"\xff\xfe"))),
        infer_request("topic", ("text", "BYTES", [1], element(b"x" * 100_000))),
        infer_request("tensor", ("x", "FP32", [3], ROW)),
        infer_request("tensor", ("x", "FP32", [0, 3], b"")),
        infer_request("tensor", ("x", "FP32", [100, 3], 100 * ROW)),
        infer_request("tensor", ("z", "FP32", [1, 3], ROW)),
        infer_request("pair", PAIR[0]),
        typed_request("tensor", "x", "FP32", [2000, 3], "fp32_contents", [0] * 6000),
        changed(picture_request(PICTURE), parameters={"max_concepts": 1000}),
        changed(picture_request(PICTURE), parameters={"classification": 1}),
        changed(picture_request(PICTURE), outputs=["no such output"]),
    ],
    ids=lambda request: str(request)[:40],
)
async def test_what_is_unusual_for_kserve_is_left_alone(world: World, request_: Any) -> None:
    """Nothing was counted, held or logged."""
    client = world.api(Principal(name="ada", requests_per_second=1, burst=1))
    before = counters(client)
    quick = Quick(client, KSERVE)
    assert not quick.offer(request_)
    assert counters(client) == before
    assert (client.budget.used, client.api.in_flight, quick.replies) == (0, 0, [])
    assert await quick.ask(KSERVE.usual)  # the only token is still there


FLOATS = st.floats(width=32, allow_nan=False)
CONTENTS = {"FP32": "fp32_contents", "INT64": "int64_contents", oip.BYTES: "bytes_contents"}
FILES = st.sampled_from(
    [PICTURE, PICTURE, PICTURE, pictures.png(np.zeros((8, 8, 3), np.uint8)), b"no picture", b"a text", b"\xff"]
)
TAKES = {
    "tensor": (("x", "FP32", 3),),
    "pair": (("a", "FP32", 2), ("b", "FP32", 2)),
    "gather": (("index", "INT64", 1),),
    "colours": (("image", oip.BYTES, 0),),
    "fragile": (("image", oip.BYTES, 0),),
    "vector": (("image", oip.BYTES, 0),),
    "topic": (("text", oip.BYTES, 0),),
}
OUTPUTS = ["y", "sum", "product", "values", "concepts", "embedding"]


@st.composite
def infer_bodies(draw: st.DrawFn) -> bytes:
    """Requests as they should be, most of them: of every kind of model, raw and typed; some have bytes changed."""
    model = draw(st.sampled_from(sorted(TAKES)))
    request = pb.ModelInferRequest(
        model_name=draw(st.sampled_from(["", f"{graphs.USER}/{graphs.APP}/"])) + model,
        model_version=draw(st.sampled_from(["", "", "1"])),
        id=draw(st.text(max_size=3)),
    )
    rows, raw = draw(st.sampled_from([1, 1, 1, 2, 4, 5, 0])), draw(st.booleans())
    for name, datatype, width in draw(st.permutations(TAKES[model])):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[rows, width] if width else [rows])
        count = rows * (width or 1)
        kind = {"FP32": FLOATS, "INT64": st.integers(-2, 1100), oip.BYTES: FILES}[datatype]
        values: Any = draw(st.lists(kind, min_size=count, max_size=count))
        if not raw:
            getattr(tensor.contents, CONTENTS[datatype]).extend(values)
        elif width:
            request.raw_input_contents.append(np.array(values, oip.DTYPES[datatype]).tobytes())
        else:
            request.raw_input_contents.append(b"".join(map(element, values)))
    changed(request, outputs=draw(st.sampled_from([[], [], draw(st.lists(st.sampled_from(OUTPUTS), max_size=2))])))
    changed(request, parameters=draw(st.sampled_from([{}, {}, {"max_concepts": 2}, {"max_concepts": 0}])))
    body = bytearray(request.SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(world: World) -> AsyncIterator[tuple[Client, Client]]:
    """Two APIs that are alike."""
    yield world.api(), world.api()


def told(ended: bytes | RpcAbort) -> Any:
    """What a caller is told, but for the request's id."""
    return (ended.status, ended.message) if isinstance(ended, RpcAbort) else ended


@given(body=infer_bodies())
@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
async def test_whichever_way_a_call_goes_it_is_told_the_same(two: tuple[Client, Client], body: bytes) -> None:
    """Answers byte for byte, refusals word for word; the counts are the same, and nothing is held afterwards."""
    client, ordinary = two
    before = counters(client)
    quick = Quick(client, KSERVE)
    if quick.offer(body):
        event("quick")
        await asyncio.wait_for(client.api.wait_idle(), 10)
        (found,) = quick.replies
    else:
        assert counters(client) == before
        assert (client.budget.used, client.api.in_flight) == (0, 0)
        found = await ended(client, body)
    assert told(found) == told(await ended(ordinary, body))
    assert counters(client) == counters(ordinary)
    assert (client.budget.used, ordinary.budget.used) == (0, 0)


async def ended(client: Client, body: bytes) -> bytes | RpcAbort:
    """How a call ends on the ordinary way."""
    unary = client.endpoints[INFER].unary
    assert unary is not None
    try:
        return await unary(client.call(INFER), body)
    except RpcAbort as abort:
        return abort


async def test_what_fails_in_the_model_ends_kserves_call(world: World) -> None:
    """With the ordinary status: the caller is told nothing else, and no input is counted."""
    client = world.api()
    index = np.array([[5000]], np.int64).tobytes()
    black = element(pictures.png(np.zeros((8, 8, 3), np.uint8)))
    for model, tensor in (("gather", ("index", "INT64", [1, 1], index)), ("fragile", ("image", "BYTES", [1], black))):
        request = infer_request(model, tensor)
        abort = await Quick(client, KSERVE).ask(request)
        assert told(abort) == told(await ended(client, request.SerializeToString()))
        assert abort.status is RpcStatus.INTERNAL
        labels = {"model": model, "version": "1", "method": KSERVE.name, "code": "21313"}
        assert client.count("requests_total", **labels) == 2
        assert client.count("inputs_total", model=model, version="1", code="21313") == 0
    assert (client.budget.used, client.api.in_flight) == (0, 0)


# ---- what is left to the ordinary way --------------------------------------------------------------------------------


def named(method: str) -> resources_pb2.Input:
    """A pythonic call."""
    given = resources_pb2.Input()
    given.data.image.base64 = PICTURE
    given.data.metadata["_method_name"] = method
    return given


def placed(runner: str) -> service_pb2.PostModelOutputsRequest:
    """A request that names where it wants to run."""
    request = predict_request("colours", PICTURE)
    request.runner_selector.runner.id = runner
    return request


@pytest.mark.parametrize(
    "request_",
    [
        b"not a message",
        predict_request("colours"),
        predict_request("colours", PICTURE, PICTURE),
        predict_request("colours", resources_pb2.Input(data={"image": {"url": "http://x/y.png"}})),
        predict_request("colours", named("predict")),
        predict_request("colours", named("_GET_SIGNATURES")),
        predict_request("colours", b"not a picture"),
        predict_request("colours", pictures.truncated(pictures.png(), 0.7)),
        predict_request("colours", "a text"),
        predict_request("colours", PICTURE, output_config={"max_concepts": 1000}),
        predict_request("colours", PICTURE, output_config={"select_concepts": [{"id": "no-such-concept"}]}),
        predict_request("colours", PICTURE, version="no-such-version"),
        predict_request("no-such-model", PICTURE),
        predict_request("broken", PICTURE),
        predict_request("tensor", array([0, 3])),
        predict_request("topic", "x" * 100_000),
        service_pb2.PostModelOutputsRequest(
            user_app_id=IDS, model_id="colours", runner_selector={"runner": {"id": "x"}}
        ),
    ],
    ids=lambda request: str(request)[:40],
)
async def test_what_is_unusual_is_left_alone(world: World, request_: Any) -> None:
    """Nothing was counted, held or logged."""
    client = world.api(Principal(name="ada", requests_per_second=1, burst=1))
    before = counters(client)
    quick = Quick(client)
    assert not quick.offer(request_)
    assert counters(client) == before
    assert (client.budget.used, client.api.in_flight, quick.replies) == (0, 0, [])
    assert await quick.ask(predict_request("colours", PICTURE))  # the only token is still there


async def test_limits_are_left_to_the_ordinary_way(world: World, door: Door) -> None:
    """Rate, concurrency, memory, rights, keys, deadlines: it looks, and counts nothing."""
    request = door.usual
    client = world.api(Principal(name="ada", requests_per_second=0.001, burst=1))
    quick = Quick(client, door)
    await quick.ask(request)
    assert not quick.offer(request)
    assert not Quick(world.api(memory=100), door).offer(request)
    assert not Quick(world.api(Principal(name="ada", models=("topic",))), door).offer(request)
    assert not Quick(world.api(), door).offer(request, key="f" * 64)
    assert not Quick(world.api(), door).offer(request, key=None)
    assert not Quick(world.api(), door).offer(request, deadline=soon(-1))
    one = Quick(world.api(Principal(name="ada", concurrency=1)), door)
    assert one.offer(request)
    assert not one.offer(request)
    await asyncio.wait_for(one.client.api.wait_idle(), 10)
    assert one.offer(request)
    await asyncio.wait_for(one.client.api.wait_idle(), 10)


async def test_a_revoked_key_is_refused_at_once(world: World, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next look, whatever is remembered of it."""
    monkeypatch.setattr("appliance.api.keys.LOOK_S", 0.0)
    client = world.api()
    quick = Quick(client, door)
    request = door.usual
    await quick.ask(request)
    store = client.api._authenticator.keys
    revoke_key(store.path, next(iter(store._entries.values())).id)
    assert not quick.offer(request)


async def test_what_a_transport_reserved_stays_as_it_was(world: World, door: Door) -> None:
    """A call that is left alone keeps its reservation; one that is served gives it back, and may do so twice."""
    client = world.api()
    endpoint = client.endpoints[door.rpc]
    assert endpoint.quick is not None
    call = client.call(door.rpc)
    call.memory = client.budget.hold(1000)
    assert not endpoint.quick(call, door.bad.SerializeToString(), lambda reply: None)
    assert client.budget.used == 1000
    assert endpoint.quick(call, door.usual.SerializeToString(), lambda reply: None)
    assert client.budget.used >= 1000
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert client.budget.used == 0
    call.memory.release()
    assert client.budget.used == 0


async def test_without_a_lane_nothing_is_quick(world: World, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose runs are long has its own thread."""
    monkeypatch.setattr(InlineLane, "takes", lambda self, count: False)
    assert not Quick(world.api(), door).offer(door.usual)


# ---- every call ends exactly once ------------------------------------------------------------------------------------


async def test_a_failing_run_is_an_error_of_the_input(world: World) -> None:
    """As on the ordinary way: the batcher finds out which row is at fault."""
    client = world.api()
    index = resources_pb2.NDArray(buffer=np.array([5000], np.int64).tobytes(), shape=[1], dtype="int64")
    reply = await Quick(client).ask(
        predict_request("gather", resources_pb2.Input(data=resources_pb2.Data(ndarray=index)))
    )
    assert reply.status.code == 10020
    assert reply.outputs[0].status.code == 21313
    assert client.count("inputs_total", model="gather", version="1", code="21313") == 1
    assert client.budget.used == 0


async def test_scores_that_are_no_numbers_are_an_error_of_the_input(world: World) -> None:
    """Black pictures, for that model."""
    black = pictures.png(np.zeros((8, 8, 3), np.uint8))
    reply = await Quick(world.api()).ask(predict_request("fragile", black))
    assert (reply.status.code, reply.outputs[0].status.code) == (10020, 21313)


async def test_an_answer_without_memory_is_an_error(world: World, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the arrays take is reserved too."""
    client = world.api()
    quick = Quick(client, door)
    assert quick.offer(door.usual)
    client.budget.limit = client.budget.used
    await asyncio.wait_for(client.api.wait_idle(), 10)
    (reply,) = quick.replies
    if isinstance(reply, RpcAbort):
        assert reply.status is RpcStatus.UNAVAILABLE
    else:
        assert service_pb2.MultiOutputResponse.FromString(reply).status.code == 21354
    assert client.budget.used == 0
    assert client.count("rejected_total", reason="queue_full") == 1


async def test_an_unforeseen_error_is_a_stock_sentence(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """98004; the log has the traceback."""

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError("the secret")

    client = world.api()
    monkeypatch.setattr("appliance.api.replies.good_reply", fail)
    reply = await Quick(client).ask(predict_request("colours", PICTURE))
    assert reply.status.code == 98004
    assert "secret" not in str(reply)
    assert sum(record.exc_info is not None for record in caplog.records) == 1
    assert client.budget.used == 0


async def test_end_answers_running_calls_unavailable(world: World, door: Door) -> None:
    """And new ones are not taken."""
    client = world.api()
    quick = Quick(client, door)
    assert quick.offer(door.usual)
    client.api.end()
    assert not quick.offer(door.usual)
    await asyncio.wait_for(client.api.wait_idle(), 10)
    (abort,) = quick.replies
    assert isinstance(abort, RpcAbort)
    assert abort.status is RpcStatus.UNAVAILABLE
    assert client.budget.used == 0


async def test_a_drain_waits_for_quick_calls(world: World, door: Door) -> None:
    """They hold their servable, whatever happens to the catalog."""
    client = world.api()
    quick = Quick(client, door)
    assert quick.offer(door.usual)
    running = world.repository.answering(IDS.user_id, IDS.app_id, "colours", "").running
    assert running is not None
    assert running.users == 1
    assert not running.free.is_set()
    client.api.refuse_new()
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert len(quick.replies) == 1
    assert running.users == 0
    assert running.free.is_set()


async def test_a_transport_that_breaks_is_counted_as_a_lost_call(world: World, door: Door) -> None:
    """And nothing stays held."""
    client = world.api()
    endpoint = client.endpoints[door.rpc]
    assert endpoint.quick is not None
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context["exception"]))

    def done(reply: Any) -> None:
        raise ZeroDivisionError

    assert endpoint.quick(client.call(door.rpc), door.usual.SerializeToString(), done)
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert [type(problem) for problem in problems] == [ZeroDivisionError]
    assert client.count("requests_lost_total") == 1
    assert (client.budget.used, client.api.in_flight) == (0, 0)


# ---- statuses with details -------------------------------------------------------------------------------------------


async def test_a_grpc_status_carries_clarifais_own(world: World) -> None:
    """As google.rpc.Status, for `grpc-status-details-bin`."""
    client = world.api()
    with pytest.raises(RpcAbort) as abort:
        await client.predict("colours", PICTURE, deadline=soon(-1))
    details = rpc_status_pb2.Status.FromString(abort.value.details)
    assert (details.code, details.message) == (int(RpcStatus.DEADLINE_EXCEEDED), abort.value.message)
    found = status_pb2.Status()
    assert details.details[0].Unpack(found)
    assert found.details == abort.value.message
    assert len(found.req_id) == 32


# ---- health ----------------------------------------------------------------------------------------------------------


async def test_a_health_check_is_quick(world: World) -> None:
    """What is not known is left to the ordinary handler, which says so."""
    api = world.api().api
    check = api.endpoints()["/grpc.health.v1.Health/Check"]
    assert check.quick is not None
    call = world.api().call("/grpc.health.v1.Health/Check", key=None)
    replies: list[Any] = []
    for ready, wanted in ((False, "NOT_SERVING"), (True, "SERVING")):
        api.health.publish(ready, {})
        assert check.quick(call, b"", replies.append)
        found = health_pb2.HealthCheckResponse.FromString(replies.pop())
        assert found.status == health_pb2.HealthCheckResponse.ServingStatus.Value(wanted)
    unknown = health_pb2.HealthCheckRequest(service="no-such-model").SerializeToString()
    assert not check.quick(call, unknown, replies.append)
    assert not check.quick(call, b"\xff", replies.append)
    assert not replies


# ---- memory of streams -----------------------------------------------------------------------------------------------


async def test_every_message_of_a_stream_is_paid_for(world: World) -> None:
    """The transport's reservation is the first one's; what comes later is reserved when it is here, and given back."""
    client = world.api(memory=2**20)
    name = V2 + "StreamModelOutputs"
    small = predict_request("topic", "a text").SerializeToString()
    large = predict_request("topic", "x" * 2**20).SerializeToString()
    call = client.call(name)
    call.memory = client.budget.hold(len(small))
    used: list[int] = []

    async def requests() -> Any:
        for body in (small, large, small):
            yield body
            used.append(client.budget.used)

    stream = client.endpoints[name].stream
    assert stream is not None
    codes = [service_pb2.MultiOutputResponse.FromString(reply).status.code async for reply in stream(call, requests())]
    assert codes == [10000, 21354, 10000]
    assert used == [0, 0, 0]
    call.memory.release()
    assert client.budget.used == 0
