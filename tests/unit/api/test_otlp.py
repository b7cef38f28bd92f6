"""Calls that have ended become spans, as OpenTelemetry's own messages read them. How they are sent: test_traces."""

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from appliance.api.otlp import Spans, Traced, destination
from appliance.api.tracing import check_traces
from appliance.core.config import Traces
from appliance.core.errors import ConfigError
from appliance.core.timing import Run, Timing, Trace, new_id


def traced(trace: Trace | None = None, *runs: Run, good: bool = True) -> Traced:
    """A call that began a second ago, and took half of one."""
    begun = time.monotonic() - 1
    timing = Timing(begun, trace or Trace(new_id(128), new_id(64), "", "", True), asked=False)
    timing.known_at = begun + 0.1
    timing.decode(begun + 0.1, begun + 0.2)
    for run in runs or (Run(8, begun + 0.2, begun + 0.25, 0.05, 0.1),):
        timing.ran(run)
    timing.end(begun + 0.5, begun + 0.4, begun + 0.45, 10000)
    assert timing.trace is not None
    return Traced(timing.trace, timing, "PostModelOutputs", good, {"appliance.code": 10000, "appliance.model": "m"})


def read(message: bytes) -> tuple[Any, list[Any]]:
    """The resource and the spans of an OTLP request."""
    (of,) = ExportTraceServiceRequest.FromString(message).resource_spans
    (scope,) = of.scope_spans
    assert scope.scope.name == "inference-appliance"
    return of.resource, list(scope.spans)


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


def test_a_call_becomes_a_span_with_one_for_each_step() -> None:
    """The call's is a server's, with the caller's as its parent; the steps are its children, one behind the other."""
    trace = Trace("4bf92f3577b34da6a3ce929d0e0e4736", "1234567890abcdef", "00f067aa0ba902b7", "vendor=1", True)
    before = time.time_ns()
    _, (call, *steps) = read(Spans(Traces()).message([traced(trace)]))
    assert [step.name for step in steps] == ["auth", "decode", "queue", "batch wait", "compute", "encode"]
    assert (call.name, call.kind) == ("PostModelOutputs", call.SPAN_KIND_SERVER)
    assert (call.trace_id.hex(), call.span_id.hex(), call.parent_span_id.hex()) == trace[:3]
    assert attributes(call) == {"appliance.code": 10000, "appliance.model": "m"}
    assert abs(call.start_time_unix_nano - (before - 10**9)) < 10**9
    for step in steps:
        assert (step.trace_id, step.parent_span_id, step.trace_state) == (call.trace_id, call.span_id, "vendor=1")
        assert call.start_time_unix_nano <= step.start_time_unix_nano <= step.end_time_unix_nano
        assert step.end_time_unix_nano <= call.end_time_unix_nano
    for one, other in itertools.pairwise(steps):
        assert abs(one.end_time_unix_nano - other.start_time_unix_nano) < 1000, (one.name, other.name)
    assert len({span.span_id for span in (call, *steps)}) == 7
    durations = [round((step.end_time_unix_nano - step.start_time_unix_nano) / 1e6) for step in steps]
    assert durations == [100, 100, 50, 50, 100, 50]


def test_a_trace_of_our_own_has_no_parent() -> None:
    """An id of zeros would be read as one that is wrong."""
    _, (call, *_) = read(Spans(Traces()).message([traced()]))
    assert call.parent_span_id == b""
    assert len(call.trace_id) == 16


def test_only_what_failed_is_an_error() -> None:
    """What is fine has no status, as OpenTelemetry wants it."""
    _, spans = read(Spans(Traces()).message([traced(), traced(good=False)]))
    statuses = [span.status.code for span in spans if span.kind == span.SPAN_KIND_SERVER]
    assert statuses == [0, 2]
    assert [span.status.code for span in spans if span.kind != span.SPAN_KIND_SERVER] == [0] * 12


def test_calls_that_shared_a_run_are_linked() -> None:
    """Each compute span to the first one of its run, of another call; the run has an id and its rows."""
    run = Run(3, 100.0, 101.0, 0.1, 0.2)
    makes = Spans(Traces())
    _, first = read(makes.message([traced(None, run), traced(None, Run(1, 100.0, 102.0, 0.1, 0.2))]))
    _, later = read(makes.message([traced(None, run._replace(queued_at=100.5))]))
    computed = [span for span in (*first, *later) if span.name == "compute"]
    assert [[link.span_id for link in span.links] for span in computed] == [[], [], [computed[0].span_id]]
    assert computed[2].links[0].trace_id == computed[0].trace_id
    assert [attributes(span)["appliance.run.rows"] for span in computed] == [3, 1, 3]
    ids = [attributes(span)["appliance.run"] for span in computed]
    assert ids[0] == ids[2] != ids[1]


def test_a_call_that_was_stopped_early_has_the_steps_it_took() -> None:
    """Refused before it was known who calls: no step at all."""
    timing = Timing(time.monotonic(), Trace(new_id(128), new_id(64), "", "", True), asked=False)
    timing.end(time.monotonic(), 0.0, 0.0, 11008)
    assert timing.trace is not None
    _, spans = read(Spans(Traces()).message([Traced(timing.trace, timing, "GetModel", False, {})]))
    assert [span.name for span in spans] == ["GetModel"]


def test_what_sends_is_described() -> None:
    """As the configuration says, with version and machine."""
    settings = Traces(service_name="plant-7", attributes=("deployment.environment.name = test", "line=3=b"))
    resource, _ = read(Spans(settings).message([traced()]))
    found = attributes(resource)
    assert found["service.name"] == "plant-7"
    assert found["deployment.environment.name"] == "test"
    assert found["line"] == "3=b"
    assert set(found) >= {"service.version", "host.name", "process.pid"}


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("https://c.example:4318", "https://c.example:4318/v1/traces"),
        ("https://c.example:4318/", "https://c.example:4318/v1/traces"),
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://c.example/otlp/v1/traces", "https://c.example/otlp/v1/traces"),
    ],
)
def test_an_endpoint_without_a_path_gets_the_usual_one(endpoint: str, url: str) -> None:
    """Some services have one of their own."""
    assert destination(Traces(endpoint=endpoint)).url == url


# ---- what must be there ----


def test_nothing_of_opentelemetry_is_imported_while_traces_are_off() -> None:
    """Nor the HTTP client that sends them."""
    script = "import sys, appliance.daemon.serving, appliance.daemon.front_process as f; " + (
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'httpx'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_the_packages_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a port is bound, and only when traces are on."""
    monkeypatch.delitem(sys.modules, "appliance.api.otlp")
    monkeypatch.delattr("appliance.api.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.trace.v1", None)
    check_traces(Traces())
    with pytest.raises(ConfigError, match=r"pip install 'inference-appliance\[traces\]'"):
        check_traces(Traces(endpoint="https://c:4318"))


def test_files_that_are_not_what_they_must_be_are_named(tmp_path: Path) -> None:
    """The line is, and not what stands in it: that is a secret."""
    headers = tmp_path / "headers"
    with pytest.raises(ConfigError, match=f"traces.headers_file {headers} cannot be read: No such file"):
        check_traces(Traces(endpoint="https://c:4318", headers_file=headers))
    for content in ("authorization: Bearer s3cret\nx-s3cret\n", "a: b\nx-s3cret: \x01", "a: b\n: s3cret"):
        headers.write_text(content)
        with pytest.raises(ConfigError, match=f"Line 2 of traces.headers_file {headers} is no header") as caught:
            check_traces(Traces(endpoint="https://c:4318", headers_file=headers))
        assert "s3cret" not in str(caught.value)
    headers.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no text"):
        check_traces(Traces(endpoint="https://c:4318", headers_file=headers))
    with pytest.raises(ConfigError, match=r"traces.ca .* cannot be used: No such file"):
        check_traces(Traces(endpoint="https://c:4318", ca=tmp_path / "none"))
    with pytest.raises(ConfigError, match="it is not a PEM file of certificates"):
        check_traces(Traces(endpoint="https://c:4318", ca=headers))
