"""The fold: several processes are scraped as if one had counted everything."""

import random
import re
import struct
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from support.counting import Child, Step, count
from support.waiting import eventually

from appliance.core.fold import Fold
from appliance.core.ledger import SIZE
from appliance.core.metrics import PREFIX, Metrics
from appliance.core.shared import Segment


def segment() -> Segment:
    return Segment.create("test", SIZE)


def samples(registry: CollectorRegistry, *, created: bool = False) -> dict[Any, float]:
    """What a scrape says, but for what the process itself takes."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.startswith(f"{PREFIX}_process") and (created or not sample.name.endswith("_created"))
    }


def value(fold: Fold, name: str, **labels: str) -> float | None:
    """One sample."""
    return fold.registry.get_sample_value(f"{PREFIX}_{name}", labels)


def everything(names: st.SearchStrategy[str]) -> st.SearchStrategy[Step]:
    """Steps of counters and histograms; whole numbers, so that sums do not depend on their order."""
    amounts = st.integers(0, 1000)
    return st.one_of(
        st.tuples(st.just("inc"), st.just("inputs"), st.tuples(names, names, names), amounts),
        st.tuples(st.just("inc"), st.just("requests_lost"), st.just(()), amounts),
        st.tuples(st.just("observe"), st.just("batch_rows"), st.tuples(names, names), amounts),
        st.tuples(st.just("observe"), st.just("handshake_seconds"), st.just(()), amounts),
        st.tuples(st.just("set"), st.just("keys"), st.just(()), amounts),
    )


NAMES = st.sampled_from(["", "a", 'b"\n', "ü"])


@given(st.lists(st.tuples(st.integers(0, 3), everything(NAMES), st.booleans()), max_size=30))
def test_the_fold_of_many_is_one_that_did_everything(steps: list[tuple[int, Step, bool]]) -> None:
    """Whoever counted it: the supervisor (0) or a child, living, dead, or come again under its name."""
    own, one = Metrics(), Metrics()
    fold = Fold(own)
    live = {number: Metrics(made) for number in (1, 2, 3) if fold.attach(str(number), made := segment()) is None}
    largest = 0.0
    for number, step, restarts in steps:
        if step[1] == "keys":  # means the same everywhere, so it is not a sum
            largest = max(largest, step[3])
            step = ("set", "keys", (), largest)
            count(own, [step])
        else:
            count(own if number == 0 else live[number], [step])
        count(one, [step])
        if number and restarts:
            fold.attach(str(number), made := segment())
            live[number] = Metrics(made)
    assert samples(fold.registry) == samples(one.registry)
    for number in live:
        fold.retire(str(number))
    assert samples(fold.registry) == samples(one.registry)


def test_children_are_processes() -> None:
    """Three of them and a supervisor count what one would; the page says it in the same words."""
    chance = random.Random(7)
    own, one = Metrics(), Metrics()
    fold = Fold(own)
    with ExitStack() as stack:
        children = []
        for number in range(3):
            fold.attach(f"front {number}", made := segment())
            children.append(stack.enter_context(Child(made)))
        for child in (*children, None):
            steps: list[Step] = []
            for _ in range(500):
                model = (chance.choice("abc"), "1")
                steps += [
                    ("inc", "requests", (*model, "PostModelOutputs", "10000"), 1),
                    ("observe", "compute_seconds", model, chance.randrange(100) / 64),
                    ("observe", "batch_rows", model, chance.randrange(200)),
                ]
            count(one, steps)
            if child is None:
                count(own, steps)
            else:
                child.tell("count", steps)
        for child in children:
            assert child.hear() == "done"
        assert samples(fold.registry) == samples(one.registry)
        texts = [
            sorted(re.sub(r"(_created.*) .*", r"\1", line) for line in each.page(False).decode().splitlines())
            for each in (fold, one)
        ]
        assert [line for line in texts[0] if "process" not in line] == [
            line for line in texts[1] if "process" not in line
        ]


def test_a_child_killed_while_it_writes_leaves_what_it_counted() -> None:
    """Scrapes meanwhile never go down, and the last one is what stays."""
    fold = Fold(Metrics())
    name, count_name = f"{PREFIX}_requests_total", f"{PREFIX}_request_seconds_count"
    for scrapes in range(5):  # the first is killed while it makes its series
        fold.attach("engine", made := segment())
        before = samples(fold.registry)
        with Child(made) as child:
            assert child.ask("for ever") == "begun"

            def grown() -> bool:
                nonlocal before
                now = samples(fold.registry)
                assert all(now[key] >= before[key] for key in before)
                grew = sum(now[key] - before.get(key, 0) for key in now if key[0] == name)
                before = now
                return grew > 100

            for _ in range(scrapes):
                eventually(grown)
            child.kill()
        last = samples(fold.registry)
        fold.retire("engine")
        assert samples(fold.registry) == last
        counted = sum(number for key, number in last.items() if key[0] == name)
        observed = sum(number for key, number in last.items() if key[0] == count_name)
        assert 0 <= counted - observed <= 5  # each kill may fall between the two


def test_a_child_in_anothers_place_begins_at_zero_and_the_sum_goes_on() -> None:
    """Prometheus sees no reset: nobody's rate jumps when an engine is replaced."""
    fold = Fold(Metrics())
    for total in (3, 6, 9):
        fold.attach("engine", made := segment())
        child = Metrics(made)
        child.inputs.labels("m", "1", 10000).inc(3)
        assert value(fold, "inputs_total", model="m", version="1", code="10000") == total


def test_created_is_the_earliest() -> None:
    """Of the process that counted it first, dead or alive."""
    own = Metrics()
    fold = Fold(own)
    fold.attach("a", one := segment())
    fold.attach("b", two := segment())
    moments = []
    for metrics in (Metrics(one), Metrics(two), own):
        series = metrics.swaps.labels("m")
        series.inc()
        moments.append(series.created)
    for _ in range(2):
        assert value(fold, "model_swaps_created", model="m") == moments[0]
        fold.retire("a")
    assert moments[0] < moments[1]


def exemplars(fold: Fold) -> dict[str, str]:
    """Bound of a bucket → id of the request."""
    (family,) = [metric for metric in fold.registry.collect() if metric.name == f"{PREFIX}_request_seconds"]
    return {sample.labels["le"]: sample.exemplar.labels["req_id"] for sample in family.samples if sample.exemplar}


def test_the_latest_request_is_the_exemplar_whoever_answered_it() -> None:
    """Also when that process is gone."""
    own = Metrics()
    fold = Fold(own)
    labels = ("m", "1", "x")
    for name, value, request in (("a", 0.3, "one"), ("b", 0.4, "two"), ("a", 3, "three")):
        fold.attach(name, made := segment())
        Metrics(made).request_seconds.labels(*labels).observe_for(value, 1.0, request)
    assert exemplars(fold) == {"0.5": "two", "5.0": "three"}
    own.request_seconds.labels(*labels).observe_for(0.35, 1.0, "four")
    for name in ("a", "b"):
        assert exemplars(fold) == {"0.5": "four", "5.0": "three"}
        fold.retire(name)
    assert exemplars(fold) == {"0.5": "four", "5.0": "three"}


class TestGauges:
    def test_they_are_sums_over_who_lives(self) -> None:
        """The supervisor's own among them."""
        own = Metrics()
        fold = Fold(own)
        own.connections.set(1)
        for name, number in (("a", 10), ("b", 100)):
            fold.attach(name, made := segment())
            child = Metrics(made)
            child.watch(child.connections, lambda number=number: number)  # type: ignore[misc]
            child.sample()
            child.queue_rows.labels("m", name).set(number)
        assert value(fold, "connections") == 111
        assert value(fold, "queue_rows", model="m", version="b") == 100
        fold.retire("b")
        assert value(fold, "connections") == 11
        assert value(fold, "queue_rows", model="m", version="b") is None

    def test_what_means_the_same_everywhere_is_no_sum(self) -> None:
        """Two fronts with one limit have that limit."""
        own = Metrics()
        fold = Fold(own)
        own.keys.set(3)
        for name in ("a", "b"):
            fold.attach(name, made := segment())
            child = Metrics(made)
            child.keys.set(2)
            child.memory_limit.set(2**30)
            child.certificate_expiry.labels("server").set(1.8e9)
        assert value(fold, "keys") == 3
        assert value(fold, "memory_in_flight_limit_bytes") == 2**30
        assert value(fold, "certificate_expiry_timestamp_seconds", role="server") == 1.8e9

    def test_one_that_is_cleared_has_no_sample(self) -> None:
        """Until it is set anew; that takes no new place in the segment, however often it happens."""
        fold = Fold(Metrics())
        fold.attach("a", made := segment())
        child = Metrics(made)
        (used,) = struct.unpack_from("q", made.view)
        for number in range(100):
            child.model_state.labels("m", "1", "ready").set(number)
            assert value(fold, "model_state", model="m", version="1", state="ready") == number
            if number == 0:
                (used,) = struct.unpack_from("q", made.view)
            child.model_state.clear()
            assert value(fold, "model_state", model="m", version="1", state="ready") is None
        assert struct.unpack_from("q", made.view) == (used,)

    def test_a_dead_childs_last_values_are_told(self) -> None:
        """So that the calls it had in flight are counted as lost, by the process that is left."""
        own = Metrics()
        fold = Fold(own)
        fold.attach("front", made := segment())
        with Child(made) as child:
            child.ask("watch", 7)
            child.ask("count", [("inc", "rejected", ["auth"], 2)])
            child.kill()
        gauges = fold.retire("front")
        assert gauges["in_flight_requests", ()] == 7
        assert not any(name == "rejected" for name, _ in gauges)
        assert value(fold, "in_flight_requests") == 0
        assert value(fold, "rejected_total", reason="auth") == 2
        assert fold.retire("front") == {}


@pytest.fixture
def broken() -> tuple[Fold, Segment, Metrics]:
    """A child that has counted something, and whose memory a test then spoils."""
    fold = Fold(Metrics())
    fold.attach("engine", made := segment())
    child = Metrics(made)
    child.inputs.labels("m", "1", 10000).inc(5)
    child.queue_rows.labels("m", "1").set(5)
    child.compute_seconds.labels("m", "1").observe(0.5)
    return fold, made, child


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -1.0, 4.0])
def test_what_cannot_be_leaves_the_last_value_that_could(broken: tuple[Fold, Segment, Metrics], bad: float) -> None:
    """Counts only grow; a gauge that is no number is not shown."""
    fold, _, child = broken
    before = samples(fold.registry)
    child.inputs.labels("m", "1", 10000).cells[0] = bad
    child.compute_seconds.labels("m", "1").cells[-1] = bad if bad < 0.5 else float("nan")
    assert samples(fold.registry) == before
    child.queue_rows.labels("m", "1").cells[0] = bad
    shown = value(fold, "queue_rows", model="m", version="1")
    assert shown == (bad if abs(bad) < 5 else None)
    fold.retire("engine")
    assert value(fold, "inputs_total", model="m", version="1", code="10000") == 5


def test_a_ruined_segment_does_not_take_the_page_down(broken: tuple[Fold, Segment, Metrics]) -> None:
    """Whatever is in it; the other processes' numbers are shown."""
    fold, made, _ = broken
    fold.attach("front", good := segment())
    Metrics(good).inputs.labels("m", "1", 10000).inc(2)
    fold.attach("late", late := segment())  # nothing of it is read before it is ruined
    Metrics(late).inputs.labels("m", "1", 10000).inc(1)
    for filling in (b"\xff", b"\x00", b"[", b"\n"):
        for each in (made, late):
            each.view[:] = filling * each.size
        assert value(fold, "inputs_total", model="m", version="1", code="10000") in (2, 7)
        for opened in (False, True):
            fold.page(opened)
    for name in ("engine", "late", "front"):
        fold.retire(name)
    assert value(fold, "inputs_total", model="m", version="1", code="10000") in (2, 7)


def test_series_that_do_not_fit_their_family_are_left_out() -> None:
    """A child of another version of the program, or a stray write: nothing of it is made into a sample."""
    fold = Fold(Metrics())
    fold.attach("engine", made := segment())
    ledger = Metrics(made)._ledger
    assert ledger is not None
    before = samples(fold.registry)
    for family, kind, labels, width in (
        ("unheard_of", "counter", ("m",), 1),
        ("inputs", "gauge", ("m", "1", "10000"), 1),
        ("inputs", "counter", ("m", "1"), 1),
        ("inputs", "counter", ("m", "1", "10000"), 2),
        ("batch_rows", "histogram", ("m", "1"), 3),
        ("requests", "counter", ("m", "1", "x", "10000"), 1),  # without its note
    ):
        assert ledger.add(family, kind, labels, 1.0, width) is not None
    assert ledger.add("inputs", "counter", ("m", "1", "10000"), 1.0, 1, 1) is not None
    assert samples(fold.registry) == before
