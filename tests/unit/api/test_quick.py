"""The quick way: the same answers, counts and limits as the ordinary one, or a clean refusal to serve."""

import asyncio
import logging
from typing import Any

import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_pb2
from google.rpc import status_pb2 as rpc_status_pb2
from grpc_health.v1 import health_pb2
from support import pictures
from support.api_world import IDS, PICTURE, V2, Client, World, predict_request, soon

from appliance.api.keys import revoke_key
from appliance.core.config import Principal
from appliance.core.types import RpcAbort, RpcStatus
from appliance.engine.inline import InlineLane
from appliance.engine.session import Session

pytestmark = pytest.mark.asyncio(loop_scope="module")

PREDICT = V2 + "PostModelOutputs"


class Quick:
    """Calls that take the quick way or none."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.endpoint = client.endpoints[PREDICT]
        self.replies: list[bytes | RpcAbort] = []

    def offer(self, request: Any, **call: Any) -> bool:
        """Whether the call was taken."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        assert self.endpoint.quick is not None
        return self.endpoint.quick(self.client.call(PREDICT, **call), body, self.replies.append)

    async def ask(self, request: Any, **call: Any) -> Any:
        """The reply, a message or an RpcAbort."""
        assert self.offer(request, **call)
        await asyncio.wait_for(self.client.api.wait_idle(), 10)
        reply = self.replies.pop()
        return reply if isinstance(reply, RpcAbort) else service_pb2.MultiOutputResponse.FromString(reply)


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


async def test_the_counts_are_the_ordinary_ones(world: World) -> None:
    """Metrics, budget, meters and calls in flight."""
    quick, ordinary = (world.api(Principal(name="ada", concurrency=9)) for _ in range(2))
    request = predict_request("colours", PICTURE)
    await Quick(quick).ask(request)
    assert ordinary.endpoints[PREDICT].unary is not None
    await ordinary.endpoints[PREDICT].unary(ordinary.call(PREDICT), request.SerializeToString())
    assert counters(quick) == counters(ordinary)
    for client in (quick, ordinary):
        assert client.budget.used == 0
        assert client.api.in_flight == 0
        assert next(iter(client.api._authenticator._meters.values())).in_flight == 0


async def test_the_log_line_is_the_ordinary_one(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """One in so many, with the same fields."""
    caplog.set_level(logging.INFO)
    client = world.api(log={"sample": 1.0})
    await Quick(client).ask(predict_request("colours", PICTURE))
    (record,) = [record for record in caplog.records if record.message == "answered"]
    fields: Any = record
    assert (fields.method, fields.model, fields.principal) == ("PostModelOutputs", "colours:2", "default")
    assert len(fields.req_id) == 32


async def test_calls_of_one_turn_share_a_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own answer; all are in flight until then."""
    runs = []
    original = Session.run

    def spy(self: Any, outputs: Any, feeds: Any) -> Any:
        runs.append({name: len(array) for name, array in feeds.items()})
        return original(self, outputs, feeds)

    monkeypatch.setattr(Session, "run", spy)
    client = world.api()
    quick = Quick(client)
    request = predict_request("colours", PICTURE).SerializeToString()
    assert all(quick.offer(request) for _ in range(3))
    assert client.api.in_flight == 3
    assert not quick.replies
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert len(quick.replies) == 3
    assert [list(run.values()) for run in runs] == [[3]]
    assert client.budget.used == 0


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


async def test_limits_are_left_to_the_ordinary_way(world: World) -> None:
    """Rate, concurrency, memory, rights, keys, deadlines: it looks, and counts nothing."""
    request = predict_request("colours", PICTURE)
    client = world.api(Principal(name="ada", requests_per_second=0.001, burst=1))
    quick = Quick(client)
    await quick.ask(request)
    assert not quick.offer(request)
    assert not Quick(world.api(memory=100)).offer(request)
    assert not Quick(world.api(Principal(name="ada", models=("topic",)))).offer(request)
    assert not Quick(world.api()).offer(request, key="f" * 64)
    assert not Quick(world.api()).offer(request, key=None)
    assert not Quick(world.api()).offer(request, deadline=soon(-1))
    one = Quick(world.api(Principal(name="ada", concurrency=1)))
    assert one.offer(request)
    assert not one.offer(request)
    await asyncio.wait_for(one.client.api.wait_idle(), 10)
    assert one.offer(request)
    await asyncio.wait_for(one.client.api.wait_idle(), 10)


async def test_a_revoked_key_is_refused_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next look, whatever is remembered of it."""
    monkeypatch.setattr("appliance.api.keys.LOOK_S", 0.0)
    client = world.api()
    quick = Quick(client)
    request = predict_request("colours", PICTURE)
    await quick.ask(request)
    store = client.api._authenticator.keys
    revoke_key(store.path, next(iter(store._entries.values())).id)
    assert not quick.offer(request)


async def test_what_a_transport_reserved_stays_as_it_was(world: World) -> None:
    """A call that is left alone keeps its reservation; one that is served gives it back, and may do so twice."""
    client = world.api()
    endpoint = client.endpoints[PREDICT]
    assert endpoint.quick is not None
    call = client.call(PREDICT)
    call.memory = client.budget.hold(1000)
    assert not endpoint.quick(call, predict_request("colours", b"bad").SerializeToString(), lambda reply: None)
    assert client.budget.used == 1000
    assert endpoint.quick(call, predict_request("colours", PICTURE).SerializeToString(), lambda reply: None)
    assert client.budget.used >= 1000
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert client.budget.used == 0
    call.memory.release()
    assert client.budget.used == 0


async def test_without_a_lane_nothing_is_quick(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose runs are long has its own thread."""
    monkeypatch.setattr(InlineLane, "takes", lambda self, count: False)
    assert not Quick(world.api()).offer(predict_request("colours", PICTURE))


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


async def test_an_answer_without_memory_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the arrays take is reserved too."""
    client = world.api()
    quick = Quick(client)
    assert quick.offer(predict_request("colours", PICTURE))
    client.budget.limit = client.budget.used
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert service_pb2.MultiOutputResponse.FromString(quick.replies[0]).status.code == 21354
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


async def test_end_answers_running_calls_unavailable(world: World) -> None:
    """And new ones are not taken."""
    client = world.api()
    quick = Quick(client)
    assert quick.offer(predict_request("colours", PICTURE))
    client.api.end()
    assert not quick.offer(predict_request("colours", PICTURE))
    await asyncio.wait_for(client.api.wait_idle(), 10)
    (abort,) = quick.replies
    assert isinstance(abort, RpcAbort)
    assert abort.status is RpcStatus.UNAVAILABLE
    assert client.budget.used == 0


async def test_a_drain_waits_for_quick_calls(world: World) -> None:
    """They hold their servable, whatever happens to the catalog."""
    client = world.api()
    quick = Quick(client)
    assert quick.offer(predict_request("colours", PICTURE))
    running = world.repository.answering(IDS.user_id, IDS.app_id, "colours", "").running
    assert running is not None
    assert running.users == 1
    assert not running.free.is_set()
    client.api.refuse_new()
    await asyncio.wait_for(client.api.wait_idle(), 10)
    assert len(quick.replies) == 1
    assert running.users == 0
    assert running.free.is_set()


async def test_a_transport_that_breaks_is_counted_as_a_lost_call(world: World) -> None:
    """And nothing stays held."""
    client = world.api()
    endpoint = client.endpoints[PREDICT]
    assert endpoint.quick is not None
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context["exception"]))

    def done(reply: Any) -> None:
        raise ZeroDivisionError

    assert endpoint.quick(client.call(PREDICT), predict_request("colours", PICTURE).SerializeToString(), done)
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
