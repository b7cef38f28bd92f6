"""The metrics: counted in plain numbers, exposed as prometheus-client's own objects are."""

import logging
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client import metrics as client
from prometheus_client.openmetrics import exposition as openmetrics

from appliance.core.config import Metrics as Settings
from appliance.core.ledger import OTHER
from appliance.core.metrics import _ROWS, _SECONDS, PREFIX, Metrics
from appliance.core.shared import Segment

_MODEL = ("model", "version")
_VALUES = (0, 0.00005, 0.00006, 0.3, 60, 61, 1e9)


def count(requests: Any, inputs: Any, seconds: Any, rows: Any) -> None:
    """The same to both."""
    requests.labels("digits", "1", "PostModelOutputs", 10000).inc()
    requests.labels("digits", "1", "PostModelOutputs", 10000).inc()
    requests.labels("", "", "ListModels", 11102).inc()
    inputs.labels("digits", 'odd "name"\n', 10000).inc(128)
    for value in _VALUES:
        seconds.labels("digits", "1", "PostModelOutputs").observe(value)
    for value in (1, 2, 3, 128, 129):
        rows.labels("digits", "1").observe(value)
    rows.labels("digits", "2")


def _comparable(text: bytes) -> list[str]:
    """The moments at which series were made differ."""
    return [re.sub(r"(_created(?:\{.*\})?) .*", r"\1", line) for line in text.decode().splitlines()]


@pytest.mark.parametrize("write", [generate_latest, openmetrics.generate_latest])
def test_what_is_exposed_is_what_prometheus_clients_objects_expose(
    write: Callable[[CollectorRegistry], bytes],
) -> None:
    """Names, labels, buckets, order and moments of creation, in both formats."""
    metrics, theirs = Metrics(), CollectorRegistry()
    count(metrics.requests, metrics.inputs, metrics.request_seconds, metrics.batch_rows)
    text = "Calls that ended, by Clarifai status code; model and version are empty where a call reached none."
    requests = Counter(f"{PREFIX}_requests", text, (*_MODEL, "method", "code"), registry=theirs)
    inputs = Counter(
        f"{PREFIX}_inputs", "Inputs answered, by Clarifai status code.", (*_MODEL, "code"), registry=theirs
    )
    seconds = Histogram(
        f"{PREFIX}_request_seconds", "From call to reply.", (*_MODEL, "method"), buckets=_SECONDS, registry=theirs
    )
    rows = Histogram(f"{PREFIX}_batch_rows", "Rows in one run of the model.", _MODEL, buckets=_ROWS, registry=theirs)
    count(requests, inputs, seconds, rows)
    ours = CollectorRegistry()
    for family in (metrics.requests, metrics.inputs, metrics.request_seconds, metrics.batch_rows):
        ours.register(family)
    assert _comparable(write(ours)) == _comparable(write(theirs))


@pytest.mark.parametrize("write", [generate_latest, openmetrics.generate_latest])
@pytest.mark.parametrize("shared", [False, True])
def test_gauges_and_series_without_labels_are_exposed_as_prometheus_clients(
    write: Callable[[CollectorRegistry], bytes], shared: bool
) -> None:
    """Zero from the beginning; what was cleared is gone, and comes back at the end; wherever the numbers are."""
    segment = Segment.create("test", 2**16) if shared else None
    metrics, theirs, ours = Metrics(segment), CollectorRegistry(), CollectorRegistry()
    lost = Counter(
        f"{PREFIX}_requests_lost",
        "Accepted calls that ended without a result or a status; stays 0.",
        registry=theirs,
    )
    in_flight = Gauge(f"{PREFIX}_in_flight_requests", "Calls being worked on.", registry=theirs)
    in_flight.set_function(lambda: 7)
    metrics.watch(metrics.in_flight, lambda: 7)
    rows = Gauge(f"{PREFIX}_queue_rows", "Rows waiting for the model.", _MODEL, registry=theirs)
    handshakes = Histogram(
        f"{PREFIX}_handshake_seconds",
        "From accept to the end of the TLS handshake.",
        buckets=_SECONDS,
        registry=theirs,
    )
    for name in ("requests_lost", "in_flight_requests", "queue_rows", "handshake_seconds"):
        ours.register(metrics.families[name])
    assert _comparable(write(ours)) == _comparable(write(theirs))
    lost.inc(3)
    metrics.lost.inc(3)
    handshakes.observe(0.02)
    metrics.handshake_seconds.observe(0.02)
    for gauge in (metrics.queue_rows, rows):
        for model in "abc":
            gauge.labels(model, 1).set(2.5)
        gauge.clear()
        for model in "ca":
            gauge.labels(model, 1)
        gauge.labels("c", 1).set(-1)
    assert _comparable(write(ours)) == _comparable(write(theirs))


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("created", [False, True])
def test_the_page_is_written_as_prometheus_client_writes_it(
    opened: bool, created: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line: odd labels, large numbers, what has no sample, exemplars; and once more from what was kept."""
    monkeypatch.setattr(client, "_use_created", created)
    metrics = Metrics()
    odd = 'odd "name"\\n\n\\ ü'
    for number in (0, 1, 0.1, 123456, 1234567, 1e9, 123456789.5, -3, 1e-7, float("nan")):
        metrics.queue_rows.labels(odd, number).set(number)
    write = openmetrics.generate_latest if opened else generate_latest

    def theirs() -> list[str]:
        return [*generate(metrics.others), *generate(metrics.registry)]

    def generate(registry: CollectorRegistry) -> list[str]:
        return [line for line in write(registry).decode().splitlines() if line != "# EOF"]

    def plain(lines: list[str]) -> list[str]:
        """A process takes more with every line of this test."""
        return [line for line in lines if not re.match(rf"{PREFIX}_(process|clock)", line)]

    for value in (0.3, 7e9):
        metrics.requests.labels(odd, "1", "x", 10000).inc(value * 1e6)
        metrics.requests.labels("m", "1", "x", 21313).inc_for("an-id")
        metrics.request_seconds.labels("m", odd, "x").observe_for(value, value, "another")
        metrics.handshake_seconds.observe(value)
        metrics.queue_rows.labels("m", "1").set(value)
        page = metrics.page(opened).decode()
        assert plain(page.removesuffix("# EOF\n").splitlines()) == plain(theirs())
        assert page.endswith("# EOF\n") == opened
        metrics.queue_rows.clear()


def test_what_is_cleared_is_watched_no_more() -> None:
    """Nothing of a model that went is kept alive, nor asked."""
    metrics = Metrics()
    metrics.watch(metrics.queue_rows.labels("m", "1"), lambda: 1 / 0)
    metrics.queue_rows.clear()
    metrics.queue_rows.labels("m", "1")
    metrics.sample()
    assert metrics.registry.get_sample_value(f"{PREFIX}_queue_rows", {"model": "m", "version": "1"}) == 0


def test_a_run_is_counted_in_one_step_as_in_four() -> None:
    """Every bucket and sum, whatever the values."""
    one, four = Metrics(), Metrics()
    count_run = one.run_counter("m", "1")
    for rows in (1, 2, 3, 512, 513):
        for seconds in (0.0, 1e-5, 2e-5, 0.3, 61.0):
            count_run(rows, seconds, seconds / 2, seconds * 2)
            four.batch_rows.labels("m", "1").observe(rows)
            four.compute_seconds.labels("m", "1").observe(seconds)
            four.batch_wait_seconds.labels("m", "1").observe(seconds / 2)
            four.queue_seconds.labels("m", "1").observe(seconds * 2)
    for name in ("batch_rows", "compute_seconds", "batch_wait_seconds", "queue_seconds"):
        assert [counted.cells for counted in one.families[name].counted().values()] == [
            counted.cells for counted in four.families[name].counted().values()
        ]


def exemplars(metrics: Metrics, name: str) -> dict[str, Any]:
    """Bound of a bucket, or "", → exemplar."""
    (family,) = metrics.families[name].collect()
    return {sample.labels.get("le", ""): sample.exemplar for sample in family.samples if sample.exemplar}


@pytest.mark.parametrize("shared", [False, True])
def test_the_last_request_of_a_bucket_is_its_exemplar(shared: bool) -> None:
    """With its own value and the time; a bucket notes one at most in a tenth of a second."""
    metrics = Metrics(Segment.create("test", 2**16) if shared else None)
    seconds = metrics.request_seconds.labels("m", "1", "x")
    for value, now, name in ((0.004, 10.0, "a"), (0.003, 10.05, "b"), (0.5, 10.05, "c"), (70.0, 10.06, "d")):
        seconds.observe_for(value, now, name)
    found = exemplars(metrics, "request_seconds")
    assert {bound: (each.labels, each.value) for bound, each in found.items()} == {
        "0.005": ({"req_id": "a"}, 0.004),
        "0.5": ({"req_id": "c"}, 0.5),
        "+Inf": ({"req_id": "d"}, 70.0),
    }
    assert all(abs(each.timestamp - time.time()) < 60 for each in found.values())
    seconds.observe_for(0.0026, 10.11, "e")
    assert exemplars(metrics, "request_seconds")["0.005"].labels == {"req_id": "e"}
    assert metrics.registry.get_sample_value(
        f"{PREFIX}_request_seconds_count", {"model": "m", "version": "1", "method": "x"}
    ) == 5  # fmt: skip
    text = openmetrics.generate_latest(metrics.registry).decode()
    assert re.search(r'_request_seconds_bucket\{le="0.5",.*\} 4\.0 # \{req_id="c"\} 0\.5 \d+\.\d+\n', text)
    assert "#  {" not in generate_latest(metrics.registry).decode(), "the older format has none"
    assert "req_id" not in generate_latest(metrics.registry).decode()


def test_the_last_failed_call_is_the_exemplar_of_its_count() -> None:
    """So that whoever sees errors has one to look up in the log."""
    metrics = Metrics()
    metrics.requests.labels("m", "1", "x", 10000).inc()
    metrics.requests.labels("m", "1", "x", 21313).inc_for("a")
    metrics.requests.labels("m", "1", "x", 21313).inc_for("line-b")
    assert {label: each.labels for label, each in exemplars(metrics, "requests").items()} == {"": {"req_id": "line-b"}}
    labels = {"model": "m", "version": "1", "method": "x", "code": "21313"}
    assert metrics.registry.get_sample_value(f"{PREFIX}_requests_total", labels) == 2


class TestBounds:
    """As many series as `metrics.series` says, whatever is counted."""

    SETTINGS = Settings(series=100)

    @pytest.mark.parametrize("shared", [False, True])
    def test_more_are_counted_together(self, shared: bool, caplog: pytest.LogCaptureFixture) -> None:
        """No count is lost, those that were there go on, and the log says so once."""
        segment = Segment.create("test", 2**22) if shared else None
        metrics = Metrics(segment, self.SETTINGS)
        with caplog.at_level(logging.WARNING):
            for number in range(1000):
                metrics.requests.labels(f"m{number}", "1", "x", 10000).inc()
                metrics.requests.labels("m1", "1", "x", 10000).inc()
                metrics.compute_seconds.labels(f"m{number}", "1").observe(1)
        (requests,) = metrics.requests.collect()
        totals = {sample.labels["model"]: sample.value for sample in requests.samples if sample.name.endswith("_total")}
        assert len(totals) == 101
        assert (totals["m0"], totals["m1"], totals[OTHER]) == (1, 1001, 900)
        assert [record.message.split()[0] for record in caplog.records] == [
            f"{PREFIX}_requests",
            f"{PREFIX}_compute_seconds",
        ]
        counts = [s.value for s in metrics.compute_seconds.collect()[0].samples if s.name.endswith("_count")]
        assert (len(counts), sum(counts)) == (101, 1000)

    def test_gauges_beyond_it_have_no_sample(self) -> None:
        """A sum of states would say nothing; those that went make room."""
        metrics = Metrics(None, self.SETTINGS)
        for round_ in range(3):
            metrics.model_state.clear()
            for number in range(150):
                metrics.model_state.labels(f"m{round_}-{number}", "1", "ready").set(1)
            samples = metrics.model_state.collect()[0].samples
            assert [sample.labels["model"] for sample in samples] == [f"m{round_}-{n}" for n in range(100)]


def test_no_call_fails_for_a_full_segment() -> None:
    """What has no room is counted all the same, where nobody else sees it."""
    segment = Segment.create("test", 4096)
    metrics = Metrics(segment)
    for number in range(100):
        metrics.swaps.labels(number).inc()
        metrics.batch_rows.labels(number, 1).observe(1)
    assert metrics.registry.get_sample_value(f"{PREFIX}_model_swaps_total", {"model": "99"}) == 1


def test_a_series_is_made_once() -> None:
    """Whatever its values' types."""
    metrics = Metrics()
    assert metrics.inputs.labels("digits", "1", 10000) is metrics.inputs.labels("digits", "1", "10000")


def test_a_series_has_all_its_labels() -> None:
    """A slip is found at once, not by whoever scrapes."""
    with pytest.raises(ValueError, match="labels"):
        Metrics().inputs.labels("digits")


def test_a_name_is_taken_once() -> None:
    """The registry knows our families' names."""
    metrics = Metrics()
    with pytest.raises(ValueError, match="Duplicated"):
        Counter(f"{PREFIX}_requests", "Again.", registry=metrics.registry)
