"""Rates of the last seconds, and what has happened, from real counters."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.fold import Fold
from appliance.core.ledger import SIZE
from appliance.core.metrics import Metrics
from appliance.core.shared import Segment
from appliance.daemon.status import Rates
from appliance.daemon.watch import RecentLog, Watch, quantile

CALL = ("digits", "1", "PostModelOutputs")


class Clock:
    """Both clocks, which a test turns."""

    def __init__(self) -> None:
        self.now, self.set_by = 1000.0, 0.0

    def wall(self) -> float:
        return 1.8e9 + self.now + self.set_by


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(metrics: Metrics, clock: Clock) -> Watch:
    made = Watch(metrics, metrics.request_seconds.bounds, lambda: clock.now, clock.wall)
    made.look()
    return made


def after(clock: Clock, watch: Watch, seconds: float = 5.0) -> None:
    clock.now += seconds
    watch.look()


def test_rates_are_those_since_the_last_look(metrics: Metrics, clock: Clock, watch: Watch) -> None:
    for _ in range(20):
        metrics.requests.labels(*CALL, 10000).inc()
        metrics.request_seconds.labels(*CALL).observe(0.002)
    metrics.requests.labels(*CALL, 21354).inc_for("r-1")
    metrics.requests.labels("", "", "PostModelOutputs", 11008).inc_for("r-2")
    after(clock, watch)
    assert (watch.rates.requests_per_s, watch.rates.failures_per_s) == (4.4, 0.4)
    assert watch.rates.p50_s == pytest.approx(0.00175)  # in the middle of the bucket from 1 to 2.5 ms
    assert watch.of_model["digits", "1"].requests_per_s == 4.2
    assert watch.history().requests_per_s[-2:] == [None, 4.4]
    after(clock, watch)
    assert watch.rates == Rates(0.0, 0.0, None, None)
    assert watch.history().requests_per_s[-3:] == [None, 4.4, 0.0]


def test_what_was_counted_before_the_first_look_is_no_rate(metrics: Metrics, clock: Clock) -> None:
    metrics.requests.labels(*CALL, 10000).inc(1000)
    metrics.worker_restarts.labels("engine", "signal").inc()
    watch = Watch(metrics, metrics.request_seconds.bounds, lambda: clock.now, clock.wall)
    watch.look()
    after(clock, watch)
    assert watch.rates.requests_per_s == 0
    assert watch.happened == {}


def test_rates_are_over_all_processes_and_a_death_is_no_fall(clock: Clock) -> None:
    own, segment = Metrics(), Segment.create("test", SIZE)
    fold = Fold(own)
    fold.attach("front 0", segment)
    front = Metrics(segment)
    watch = Watch(fold, own.request_seconds.bounds, lambda: clock.now, clock.wall)
    watch.look()
    front.requests.labels(*CALL, 10000).inc(10)
    after(clock, watch)
    assert watch.rates.requests_per_s == 2
    fold.retire("front 0")
    after(clock, watch)
    assert watch.rates.requests_per_s == 0


def test_what_happens_is_noted_when_it_grows(metrics: Metrics, clock: Clock, watch: Watch) -> None:
    for reason in ("signal", "canary"):
        metrics.worker_restarts.labels("engine", reason)
    for result in ("ok", "failed"):
        metrics.reloads.labels(result)
    after(clock, watch)
    assert watch.happened == {}
    metrics.worker_restarts.labels("engine", "signal").inc()
    metrics.lost.inc()
    metrics.reloads.labels("failed").inc()
    after(clock, watch)
    assert watch.happened == {("restart", "engine"): 1010, ("lost", "calls"): 1010, ("reload", "configuration"): 1010}
    metrics.reloads.labels("ok").inc()
    after(clock, watch)
    assert ("reload", "configuration") not in watch.happened


def test_two_reasons_of_one_process_are_both_seen(metrics: Metrics, clock: Clock, watch: Watch) -> None:
    metrics.worker_restarts.labels("engine", "signal").inc(5)
    after(clock, watch)
    metrics.worker_restarts.labels("engine", "canary").inc()
    after(clock, watch)
    assert watch.happened["restart", "engine"] == 1010


def test_a_clock_that_jumps_is_noted_and_one_that_drifts_is_not(
    clock: Clock, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log too, with how much it was."""
    clock.set_by = 4.0
    after(clock, watch)
    assert watch.happened == {}
    clock.set_by = -3600.0
    after(clock, watch)
    assert watch.happened == {("clock", "clock"): clock.now}
    assert [(each.getMessage(), each.__dict__["by_s"]) for each in caplog.records] == [
        ("the machine's clock was set", -3604.0)
    ]


def test_refusals_are_counted_over_the_last_looks(metrics: Metrics, clock: Clock, watch: Watch) -> None:
    metrics.requests.labels(*CALL, 10000).inc(100)
    metrics.rejected.labels("queue_full").inc(20)
    metrics.rejected.labels("auth").inc(50)  # the callers' fault
    after(clock, watch)
    assert watch.refused == pytest.approx((100, 20))
    for _ in range(4):
        after(clock, watch)
    assert watch.refused == (0, 0)


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.floats(0.01, 1))
def test_a_quantile_lies_where_that_share_of_the_counts_is(counts: list[int], share: float) -> None:
    bounds = (1.0, 2.0, 4.0, 8.0)
    found = quantile(bounds, counts, share)
    if not sum(counts):
        assert found is None
        return
    assert found is not None
    rank = share * sum(counts)
    below = sum(count for bound, count in zip((*bounds, float("inf")), counts, strict=True) if bound < found)
    upto = sum(count for bound, count in zip((0.0, *bounds), counts, strict=True) if bound <= found * 1.001)
    assert below <= rank + 1e-9
    assert upto >= rank * 0.99


def test_the_log_keeps_the_last_warnings_on_a_line_each_and_no_traceback() -> None:
    log = RecentLog()
    logger = logging.Logger("test")
    logger.addHandler(log)
    logger.info("no news")
    for number in range(30):
        logger.warning("number %d\nand more\x1b[31m", number)
    try:
        raise ValueError("secret")
    except ValueError:
        logger.exception("it failed")
    assert len(log.lines) == 20
    assert log.lines[-1].text == "it failed"
    assert log.lines[-1].level == "error"
    assert log.lines[-2].text == "number 29\\nand more\\x1b[31m"
    logger.error("%s", "x" * 5000)
    assert len(log.lines[-1].text) == 1002
