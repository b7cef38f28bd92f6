"""Traces of a real daemon's calls at a collector, over TLS; and the timing that a caller is told, on every door."""

import base64
import contextlib
import re
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from support.appliance import MODELS, PATIENCE_S, Appliance, Client, Pki, image_input, mode, request_for
from support.collector import Collector, attributes
from support.infer import infer_request

Make = Callable[..., Appliance]

DIGIT = (MODELS / "digits" / "samples" / "held-out-000-label-2.png").read_bytes()
PREDICT = request_for("digits", [image_input(DIGIT)])
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
OUTPUTS = "/v2/users/appliance/apps/main/models/digits/outputs"
BODY = {"inputs": [{"data": {"image": {"base64": base64.b64encode(DIGIT).decode()}}}]}
INFER = "/kserve/v2/models/digits/infer"
TENSOR = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(DIGIT).decode()]}
FRAMES = {"content-type": "application/grpc-web+proto"}
FRAMED = struct.pack(">BI", 0, PREDICT.ByteSize()) + PREDICT.SerializeToString()
STEPS = ["auth", "decode", "queue", "batch wait", "compute", "encode"]
SAID = re.compile(
    r"auth;dur=[0-9.]+, decode;dur=[0-9.]+, queue;dur=[0-9.]+, batch;dur=[0-9.]+, compute;dur=[0-9.]+, "
    r'encode;dur=[0-9.]+, total;dur=[0-9.]+, rows;desc="1"'
)


@pytest.fixture(scope="module", params=["single", "processes"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Spans are made where clients are answered, wherever models run. Of grpcio there is a test at the end."""
    with mode(request.param):
        yield "native"


@pytest.fixture
def collector(pki: Pki) -> Iterator[Collector]:
    with Collector(pki) as made:
        yield made


@pytest.fixture
def traced(make_appliance: Make, pki: Pki, collector: Collector, tmp_path: Path) -> Iterator[Appliance]:
    """A running appliance that traces calls whose callers say so."""
    headers = tmp_path / "headers"
    headers.write_text("authorization: Bearer for-the-collector\n")
    headers.chmod(0o600)
    settings = {"endpoint": collector.url, "ca": str(pki.ca), "headers_file": str(headers), "sample": 0}
    made = make_appliance("digits", traces=settings)
    made.key = made.new_key()
    with made:
        yield made


@contextlib.contextmanager
def web(appliance: Appliance, pki: Pki, *, two: bool = False) -> Iterator[httpx.Client]:
    """HTTP to the main port, with the key."""
    context = ssl.create_default_context(cafile=str(pki.ca))
    base, headers = f"https://localhost:{appliance.port()}", {"authorization": f"Key {appliance.key}"}
    with httpx.Client(
        http1=not two, http2=two, verify=context, base_url=base, headers=headers, timeout=PATIENCE_S
    ) as made:
        yield made


def post(client: Client, request: Any = PREDICT, **headers: str) -> Any:
    """The reply, and what the call ended with."""
    metadata = [*client.metadata, *((name.replace("_", "-"), value) for name, value in headers.items())]
    return client.stub.PostModelOutputs.with_call(request, metadata=metadata, timeout=PATIENCE_S)


def test_a_call_of_each_door_is_a_trace_at_the_collector(traced: Appliance, pki: Pki, collector: Collector) -> None:
    """Its caller's, with all steps in their order; nothing of its content, nor of anybody's key."""
    with Client(traced.port(), pki.ca, traced.key) as client:
        reply, _ = post(client, traceparent=PARENT, tracestate="vendor=1")
        assert reply.status.code == 10000
    with web(traced, pki) as http:
        asked = {"traceparent": PARENT}
        assert http.post(OUTPUTS, json=BODY, headers=asked).status_code == 200
        assert http.post(INFER, json={"inputs": [TENSOR]}, headers=asked).status_code == 200
        http.post("/clarifai.api.V2/PostModelOutputs", content=FRAMED, headers=asked | FRAMES)
    collector.wait(lambda: len(collector.calls()) == 4)
    assert sorted(call.name for call in collector.calls()) == ["PostModelOutputs"] * 3 + ["kserve.ModelInfer"]
    for call in collector.calls():
        assert (call.trace_id.hex(), call.parent_span_id.hex()) == (TRACE, PARENT.split("-")[2])
        steps = collector.steps(call)
        assert list(steps) == STEPS
        begins = [step.start_time_unix_nano for step in steps.values()]
        assert begins == sorted(begins)
        assert steps["compute"].end_time_unix_nano > steps["compute"].start_time_unix_nano
        assert steps["encode"].end_time_unix_nano <= call.end_time_unix_nano
        about = attributes(call)
        assert (about["appliance.model"], about["appliance.version"], about["appliance.code"]) == ("digits", "1", 10000)
    assert {call.trace_state for call in collector.calls()} == {"vendor=1", ""}
    assert {headers["authorization"] for headers in collector.headers} == {"Bearer for-the-collector"}
    assert collector.resources[0]["service.name"] == "inference-appliance"
    seen = str([*collector.spans, *collector.resources])
    assert traced.key not in seen
    assert "for-the-collector" not in seen + traced.log
    traced.wait(lambda: traced.metric('inference_appliance_traces_total{outcome="sent"}') == 4)


def test_metrics_and_log_lead_to_the_trace(traced: Appliance, pki: Pki, collector: Collector) -> None:
    """An exemplar of the call's bucket, and the line about what it got."""
    with Client(traced.port(), pki.ca, traced.key) as client:
        post(client, traceparent=PARENT)
        post(client, request_for("nothing", [image_input(DIGIT)]), traceparent=PARENT)
    collector.wait(lambda: len(collector.calls()) == 2)
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    page = httpx.get(f"http://127.0.0.1:{traced.port('admin.listen')}/metrics", headers=accept).text
    assert len(re.findall(rf'request_seconds_bucket.* # {{trace_id="{TRACE}"}}', page)) == 2
    assert re.search(rf'requests_total{{code="21200".* # {{trace_id="{TRACE}"}}', page)
    assert re.search(rf"trace_id={TRACE}", traced.log)


def test_a_share_of_calls_is_traced_without_being_asked(make_appliance: Make, pki: Pki, collector: Collector) -> None:
    """With an id of its own each; callers who say no are heard."""
    made = make_appliance("digits", traces={"endpoint": collector.url, "ca": str(pki.ca), "sample": 1.0})
    made.key = made.new_key()
    with made, Client(made.port(), pki.ca, made.key) as client:
        for _ in range(3):
            post(client)
        post(client, traceparent=PARENT[:-1] + "0")
        collector.wait(lambda: len(collector.calls()) == 3)
    assert len({call.trace_id for call in collector.calls()}) == 3
    assert all(call.parent_span_id == b"" for call in collector.calls())


def test_calls_that_shared_a_run_say_so(make_appliance: Make, pki: Pki, collector: Collector) -> None:
    """Compute spans of one run have its id and rows; those of one process are linked to the first."""
    made = make_appliance("digits", traces={"endpoint": collector.url, "ca": str(pki.ca), "sample": 1.0})
    made.key = made.new_key()
    several = request_for("digits", [image_input(DIGIT)] * 16)
    with made, Client(made.port(), pki.ca, made.key) as client:
        waiting = [client.stub.PostModelOutputs.future(several, metadata=client.metadata) for _ in range(40)]
        for each in waiting:
            assert each.result(timeout=PATIENCE_S).status.code == 10000
        collector.wait(lambda: len(collector.calls()) == 40)
    computed = [span for span in collector.spans if span.name == "compute"]
    by_run: dict[str, list[Any]] = {}
    for span in computed:
        by_run.setdefault(attributes(span)["appliance.run"], []).append(span)
    assert all(len({attributes(span)["appliance.run.rows"] for span in spans}) == 1 for spans in by_run.values())
    known = {span.span_id: attributes(span)["appliance.run"] for span in computed}
    for span in computed:
        assert [known[link.span_id] for link in span.links] in ([], [attributes(span)["appliance.run"]])


def test_a_collector_that_is_away_costs_nobody_an_answer(traced: Appliance, pki: Pki, collector: Collector) -> None:
    """What waits is sent when it is back; the log says what is wrong once."""
    collector.close()
    with Client(traced.port(), pki.ca, traced.key) as client:
        for _ in range(20):
            assert post(client, traceparent=PARENT)[0].status.code == 10000
        with Collector(pki, collector.port) as back:
            back.wait(lambda: len(back.calls()) == 20)


def test_what_a_collector_does_not_take_is_counted(traced: Appliance, pki: Pki, collector: Collector) -> None:
    """503 is tried again; 400 is not, and neither is anything that was refused for good."""
    collector.answers.append(503)
    with Client(traced.port(), pki.ca, traced.key) as client:
        post(client, traceparent=PARENT)
        collector.wait(lambda: len(collector.calls()) == 1)
        assert collector.asked == 2
        collector.answers.append(400)
        post(client, traceparent=PARENT)
        traced.wait(lambda: traced.metric('inference_appliance_traces_total{outcome="failed"}') == 1)
    assert collector.asked == 3
    assert f"traces are not sent to {collector.url}/v1/traces: HTTP 400" in traced.log


def test_a_stop_sends_what_waits(traced: Appliance, pki: Pki, collector: Collector) -> None:
    """The last calls are the ones that one wants to see."""
    with Client(traced.port(), pki.ca, traced.key) as client:
        for _ in range(5):
            post(client, traceparent=PARENT)
    assert traced.stop() == 0
    assert len(collector.calls()) == 5


def test_a_reload_sends_them_elsewhere_and_turns_them_off(traced: Appliance, pki: Pki, collector: Collector) -> None:
    """What is bad is refused, and the old goes on."""
    with Collector(pki) as other, Client(traced.port(), pki.ca, traced.key) as client:
        traced.write_config(traces={"endpoint": other.url})
        traced.command("reload")
        post(client, traceparent=PARENT)
        other.wait(lambda: len(other.calls()) == 1)
        traced.write_config(traces={"headers_file": str(traced.home / "none")})
        refused = traced.command("reload", check=False)
        assert refused.returncode != 0
        assert "traces.headers_file" in refused.stderr
        post(client, traceparent=PARENT)
        other.wait(lambda: len(other.calls()) == 2)
        del traced.config["traces"]
        traced.write_config()
        traced.command("reload")
        post(client, traceparent=PARENT)
        traced.stop()
        assert len(other.calls()) == 2
    assert collector.calls() == []


def test_a_callers_headers_make_no_trouble(traced: Appliance, pki: Pki, collector: Collector) -> None:
    """Whatever stands in them."""
    odd = ["", "00", "x" * 5000, f"00-{'0' * 32}-{'0' * 16}-01", PARENT + "-more", "-", PARENT.upper()]
    with Client(traced.port(), pki.ca, traced.key) as client:
        for value in odd:
            assert post(client, traceparent=value, tracestate="=" * 600)[0].status.code == 10000
        post(client, traceparent=PARENT, tracestate=",= " * 100)
    collector.wait(lambda: len(collector.calls()) == 1)


# ---- timing on request -----------------------------------------------------------------------------------------------


ASKED = {"x-appliance-timing": "1"}


def told_over_grpc(appliance: Appliance, pki: Pki) -> None:
    """Trailers of a reply, of a stream, and beside a status; none where nobody asked."""
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        assert SAID.fullmatch(dict(post(client, **ASKED)[1].trailing_metadata())["x-appliance-timing"])
        assert "x-appliance-timing" not in dict(post(client)[1].trailing_metadata())
        metadata = [*client.metadata, *ASKED.items()]
        stream = client.stub.GenerateModelOutputs(PREDICT, metadata=metadata)
        assert [reply.status.code for reply in stream] == [10000]
        assert SAID.fullmatch(dict(stream.trailing_metadata())["x-appliance-timing"])
        infer = client.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            infer(infer_request("nothing").SerializeToString(), metadata=metadata, timeout=PATIENCE_S)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert re.fullmatch(
            r"auth;dur=[0-9.]+, total;dur=[0-9.]+", dict(error.trailing_metadata())["x-appliance-timing"]
        )


def test_who_asks_over_grpc_is_told_where_the_time_went(appliance: Appliance, pki: Pki) -> None:
    """On the native wire."""
    told_over_grpc(appliance, pki)


def test_grpcio_tells_the_same(make_appliance: Make, pki: Pki) -> None:
    """The other wire."""
    made = make_appliance("digits")
    made.transport = "grpcio"
    made.write_config()
    made.key = made.new_key()
    with made:
        told_over_grpc(made, pki)


@pytest.mark.parametrize("two", [False, True], ids=["HTTP/1.1", "HTTP/2"])
def test_who_asks_over_http_is_told_in_a_header(appliance: Appliance, pki: Pki, two: bool) -> None:
    """REST, KServe; gRPC-Web has it beside the status. Errors say it too."""
    with web(appliance, pki, two=two) as http:
        assert SAID.fullmatch(http.post(OUTPUTS, json=BODY, headers=ASKED).headers["x-appliance-timing"])
        assert "x-appliance-timing" not in http.post(OUTPUTS, json=BODY).headers
        unknown = http.get("/v2/users/appliance/apps/main/models/nothing", headers=ASKED)
        assert unknown.status_code == 404
        assert unknown.headers["x-appliance-timing"].startswith("auth;dur=")
        assert SAID.fullmatch(http.post(INFER, json={"inputs": [TENSOR]}, headers=ASKED).headers["x-appliance-timing"])
        reply = http.post("/clarifai.api.V2/PostModelOutputs", content=FRAMED, headers=ASKED | FRAMES)
        assert SAID.search(reply.content.decode("latin-1"))
