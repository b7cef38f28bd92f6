"""Which calls are traced, what is said of them, and that nobody pays who does not ask. Spans are made in test_otlp."""

import asyncio
import logging
import re
import threading
from typing import Any

import pytest
from support.api_world import PICTURE, V2, Client, World, predict_request

from appliance.api import otlp
from appliance.api.otlp import Exporter, Traced
from appliance.core.config import Log, Traces
from appliance.core.timing import HEADER
from appliance.core.types import RpcAbort
from appliance.engine.worker import LocalModel

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
ON = Traces(endpoint="http://127.0.0.1:9", sample=0)
PREDICT = V2 + "PostModelOutputs"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Traced]:
    """The calls that would be sent; nothing is."""
    calls: list[Traced] = []
    monkeypatch.setattr(Exporter, "_run", lambda exporter: None)
    monkeypatch.setattr(Exporter, "take", lambda exporter, call: calls.append(call) or True)
    return calls


async def post(client: Client, *inputs: Any, model: str = "colours", **call: Any) -> bytes:
    return await client.raw("PostModelOutputs", predict_request(model, *inputs).SerializeToString(), **call)


async def test_a_call_on_the_quick_way_is_traced_step_by_step(world: World, taken: list[Traced]) -> None:
    """Its caller's trace, and times that follow each other; nothing of its content."""
    client = world.api(traces=ON)
    await post(client, PICTURE, traceparent=PARENT)
    (call,) = taken
    timing = call.timing
    assert (call.trace.id, call.trace.parent) == (TRACE, PARENT.split("-")[2])
    assert (call.method, call.good, timing.code) == ("PostModelOutputs", True, 10000)
    ((decode_begun, decode_ended),), (run,) = timing.decoded, timing.runs
    steps = [timing.begun, timing.known_at, decode_begun, decode_ended, run.queued_at, run.taken_at]
    steps += [run.taken_at + run.batch_wait + run.compute, timing.computed_at, timing.encoded_at, timing.ended_at]
    assert steps == sorted(steps)
    assert run.rows == 1
    assert dict(call.attributes) == {
        "rpc.method": "PostModelOutputs",
        "appliance.peer": "ipv4:127.0.0.1:1",
        "appliance.req_id": call.attributes["appliance.req_id"],
        "appliance.code": 10000,
        "appliance.principal": "default",
        "appliance.model": "colours",
        "appliance.version": "2",
        "appliance.inputs": 1,
    }


async def test_a_call_on_the_ordinary_way_is_traced_as_well(world: World, taken: list[Traced]) -> None:
    """Three inputs share a run, and one of them is no picture."""
    client = world.api(traces=ON)
    await post(client, PICTURE, b"no picture", PICTURE, traceparent=PARENT)
    (call,) = taken
    assert [run.rows for run in call.timing.runs] == [2]
    assert len(call.timing.decoded) == 1
    assert call.good, "some were answered"
    assert call.attributes["appliance.inputs"] == 3


async def test_a_stream_has_a_span_for_each_message(world: World, taken: list[Traced]) -> None:
    """As it has a count for each; they are parts of one trace."""
    client = world.api(traces=ON)
    body = predict_request("colours", PICTURE).SerializeToString()
    await client.stream(V2 + "StreamModelOutputs", [body, body], traceparent=PARENT)
    assert [(call.trace.id, call.method, call.timing.code) for call in taken] == [
        (TRACE, "StreamModelOutputs", 10000)
    ] * 2
    assert taken[0].trace.span != taken[1].trace.span


async def test_who_may_not_call_is_traced_up_to_there(world: World, taken: list[Traced]) -> None:
    """Whether the body was there already, or not yet."""
    client = world.api(traces=ON)
    await post(client, PICTURE, key="f" * 64, traceparent=PARENT)
    admit = client.endpoints[PREDICT].admit
    assert admit is not None
    assert admit(client.call(PREDICT, key="f" * 64, traceparent=PARENT), 10) is not None
    for call in taken:
        assert (call.good, call.timing.code, call.timing.known_at, call.timing.runs) == (False, 11008, 0.0, [])
        assert "f" * 64 not in str(call.attributes)
    assert len(taken) == 2


async def test_a_call_that_a_status_ended_is_traced_with_its_code(world: World, taken: list[Traced]) -> None:
    """Over its deadline, say."""
    client = world.api(traces=ON)
    with pytest.raises(RpcAbort):
        await post(client, PICTURE, deadline=1.0, traceparent=PARENT)
    (call,) = taken
    assert (call.good, call.timing.code) == (False, 98009)


async def test_a_caller_who_left_is_traced_without_a_code(
    world: World, taken: list[Traced], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody was told one."""
    submitted = asyncio.Event()

    def submit(*arguments: Any, **more: Any) -> Any:
        submitted.set()
        return asyncio.get_running_loop().create_future()

    monkeypatch.setattr(LocalModel, "prompt", lambda *arguments: False)
    monkeypatch.setattr(LocalModel, "submit", submit)
    task = asyncio.create_task(post(world.api(traces=ON), PICTURE, traceparent=PARENT))
    await submitted.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (call,) = taken
    assert (call.good, call.timing.code) == (False, 0)


async def test_what_is_not_sampled_is_not_sent(world: World, taken: list[Traced]) -> None:
    """By us, or by the caller."""
    client = world.api(traces=ON)
    await post(client, PICTURE)
    await post(client, PICTURE, traceparent=PARENT[:-1] + "0")
    assert taken == []


async def test_while_traces_are_off_what_callers_bring_changes_nothing(world: World, taken: list[Traced]) -> None:
    """Nothing is noted of their calls."""
    client = world.api()
    call = client.call(PREDICT, traceparent=PARENT)
    unary = client.endpoints[PREDICT].unary
    assert unary is not None
    await unary(call, predict_request("colours", PICTURE).SerializeToString())
    assert call.timing is None
    assert taken == []


async def test_a_reload_turns_traces_on_and_off(world: World, taken: list[Traced]) -> None:
    """For calls that begin then."""
    client = world.api()
    config = client.api._config
    client.api.configure(config.model_copy(update={"traces": ON}))
    await post(client, PICTURE, traceparent=PARENT)
    assert len(taken) == 1
    client.api.configure(config)
    await post(client, PICTURE, traceparent=PARENT)
    assert len(taken) == 1


async def test_calls_that_find_no_room_are_counted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector is slow, or away: they are answered all the same."""
    monkeypatch.setattr(Exporter, "_run", lambda exporter: None)
    monkeypatch.setattr(otlp, "_WAITING", 2)
    client = world.api(traces=ON)
    for _ in range(5):
        assert await post(client, PICTURE, traceparent=PARENT)
    assert client.count("traces_total", outcome="dropped") == 3


async def test_exemplars_bear_the_trace_of_a_call_that_is_sampled(world: World, taken: list[Traced]) -> None:
    """The id that the reply has, where it is not."""
    client = world.api(traces=ON)
    await post(client, PICTURE, traceparent=PARENT)
    page = client.metrics.page(opened=True).decode()
    (found,) = re.findall(r'request_seconds_bucket\{.*method="PostModelOutputs".*\} 1.0 # (\{.*?\})', page)
    assert found == f'{{trace_id="{TRACE}"}}'
    await post(client, PICTURE, model="nothing", traceparent=PARENT)
    await client.predict("nothing", PICTURE, key="f" * 64)
    page = client.metrics.page(opened=True).decode()
    failed = dict(re.findall(r'requests_total\{code="(21200|11008)".*\} 1.0 # \{(\w+)=', page))
    assert failed == {"21200": "trace_id", "11008": "req_id"}


async def test_lines_of_the_log_bear_the_trace(
    world: World, taken: list[Traced], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled or not: the caller can find them."""
    monkeypatch.setattr(logging.getLogger("appliance"), "propagate", True)
    client = world.api(traces=ON, log=Log(sample=1))
    caplog.set_level(logging.INFO)
    await post(client, PICTURE, traceparent=PARENT)
    await post(client, PICTURE, traceparent=PARENT[:-1] + "0", model="nothing")
    await post(client, PICTURE)
    logged = [getattr(record, "trace_id", None) for record in caplog.records if hasattr(record, "req_id")]
    assert logged == [TRACE, TRACE, None]


# ---- timing on request -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [(PICTURE,), (PICTURE, PICTURE)], ids=["quick", "ordinary"])
async def test_a_caller_who_asks_is_told_where_the_time_went(world: World, inputs: tuple[bytes, ...]) -> None:
    """Traces may be off."""
    client = world.api()
    call = client.call(PREDICT, **{HEADER: "1"})
    body = predict_request("colours", *inputs).SerializeToString()
    endpoint = client.endpoints[PREDICT]
    replied: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    assert endpoint.quick is not None
    assert endpoint.unary is not None
    if endpoint.quick(call, body, replied.set_result):
        await replied
    else:
        await endpoint.unary(call, body)
    assert call.timing is not None
    names = re.findall(r"(\w+);dur=\d+\.\d{3}(?:, |$)", call.timing.said)
    assert names == ["auth", "decode", "queue", "batch", "compute", "encode", "total"]
    assert call.timing.said.endswith(f', rows;desc="{len(inputs)}"')


@pytest.mark.parametrize("value", ["0", "", "yes"])
async def test_who_asks_otherwise_is_not_told(world: World, value: str) -> None:
    """Only "1" asks."""
    client = world.api()
    call = client.call(PREDICT, **{HEADER: value})
    unary = client.endpoints[PREDICT].unary
    assert unary is not None
    await unary(call, predict_request("colours", PICTURE).SerializeToString())
    assert call.timing is None


async def test_a_call_that_reaches_no_model_has_no_such_steps(world: World) -> None:
    """What did not happen is not said."""
    client = world.api()
    call = client.call(V2 + "GetModel", **{HEADER: "1"})
    unary = client.endpoints[V2 + "GetModel"].unary
    assert unary is not None
    await unary(call, b"")
    assert call.timing is not None
    assert re.fullmatch(r"auth;dur=[\d.]+, total;dur=[\d.]+", call.timing.said)


# ---- off -------------------------------------------------------------------------------------------------------------


async def test_no_thread_is_there_while_traces_are_off(world: World) -> None:
    """And none is left when they were turned off."""
    client = world.api()
    assert not [thread for thread in threading.enumerate() if thread.name == "traces"]
    client.api.configure(client.api._config.model_copy(update={"traces": ON}))
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "traces"]
    await client.api.tracing.close()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
