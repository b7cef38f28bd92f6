"""What callers used: counted in every process, added up by the supervisor, whoever lives or dies, and not believed."""

import logging
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from appliance.core.fold import Fold
from appliance.core.ledger import SIZE, Ledger, LedgerReader
from appliance.core.metrics import Metrics
from appliance.core.shared import Segment
from appliance.core.usage import BYTES_IN, CALLS, EVERYBODY_ELSE, FAMILY, KIND, Amounts, UsageCounts, UsageKey

KEY = UsageKey("line-3", "acme", "main", "digits", "1", "PostModelOutputs")


def used(found: dict[UsageKey, Amounts]) -> dict[UsageKey, Amounts]:
    """Those who used anything."""
    return {key: amounts for key, amounts in found.items() if any(amounts)}


@pytest.fixture
def segments() -> Iterator[list[Segment]]:
    """Memory of three children."""
    with ExitStack() as stack:
        made = [Segment.create("test", SIZE) for _ in range(3)]
        for segment in made:
            stack.callback(segment.close)
        yield made


def test_one_key_has_one_set_of_cells() -> None:
    counts = UsageCounts(None)
    counts.cells(*KEY)[CALLS] += 1
    counts.cells(*KEY)[BYTES_IN] += 700
    assert used(counts.counted()) == {KEY: Amounts(calls=1, bytes_in=700)}


@pytest.mark.parametrize("shared", [False, True])
def test_who_comes_when_there_is_no_room_is_counted_with_the_others_and_the_log_says_so(
    segments: list[Segment], caplog: pytest.LogCaptureFixture, shared: bool
) -> None:
    """By the number of keys, and of what was counted nothing is dropped."""
    counts = UsageCounts(Ledger(segments[0]) if shared else None, most=3)
    with caplog.at_level(logging.WARNING):
        for number in range(10):
            counts.cells(*KEY._replace(principal=f"p{number}"))[CALLS] += 1
    found = used(counts.counted())
    assert found.pop(EVERYBODY_ELSE).calls == 7
    assert [key.principal for key in found] == ["p0", "p1", "p2"]
    assert len(caplog.records) == 1


def test_a_full_ledger_counts_with_the_others_too() -> None:
    segment = Segment.create("test", 4096)
    counts = UsageCounts(Ledger(segment))
    for number in range(1000):
        counts.cells(*KEY._replace(version=str(number)))[CALLS] += 1
    assert sum(amounts.calls for amounts in counts.counted().values()) == 1000
    assert counts.counted()[EVERYBODY_ELSE].calls > 900
    segment.close()


def test_usage_is_no_metric() -> None:
    metrics = Metrics()
    before = metrics.page(False)
    metrics.usage.cells(*KEY)[CALLS] += 1
    assert b"line-3" not in metrics.page(False)
    assert len(metrics.page(False).splitlines()) == len(before.splitlines())


def test_the_living_and_the_dead_are_added_up(segments: list[Segment]) -> None:
    """A child that ends leaves what it counted to the last call; one that takes its name begins anew."""
    fold = Fold(Metrics())
    for number, segment in enumerate(segments[:2]):
        fold.attach(f"front {number}", segment)
        Metrics(segment).usage.cells(*KEY)[CALLS] += 10
    assert used(fold.usage()) == {KEY: Amounts(calls=20)}
    fold.retire("front 0")
    assert used(fold.usage()) == {KEY: Amounts(calls=20)}
    fold.attach("front 0", segments[2])
    cells = Metrics(segments[2]).usage.cells(*KEY)
    cells[CALLS] += 3
    assert used(fold.usage()) == {KEY: Amounts(calls=23)}
    cells[CALLS] += 4
    fold.retire("front 0")
    fold.retire("front 1")
    assert used(fold.usage()) == {KEY: Amounts(calls=27)}


@pytest.mark.parametrize("wild", [-1.0, float("nan"), float("inf"), 1e300, 2.0**60])
def test_what_cannot_be_is_not_believed(segments: list[Segment], wild: float) -> None:
    """A process with a memory fault writes anything; what it counted before stays, and the rest of its cells count."""
    fold, segment = Fold(Metrics()), segments[0]
    fold.attach("front 0", segment)
    cells = Metrics(segment).usage.cells(*KEY)
    cells[CALLS], cells[BYTES_IN] = 5, 100
    assert fold.usage()[KEY] == Amounts(calls=5, bytes_in=100)
    cells[CALLS], cells[BYTES_IN] = wild, 200
    assert fold.usage()[KEY] == Amounts(calls=5, bytes_in=200)
    fold.retire("front 0")
    assert fold.usage()[KEY] == Amounts(calls=5, bytes_in=200)


def test_entries_of_another_shape_are_left_out(segments: list[Segment]) -> None:
    fold, segment = Fold(Metrics()), segments[0]
    ledger = Ledger(segment)
    fold.attach("front 0", segment)
    width = len(Amounts._fields)
    ledger.add(FAMILY, KIND, KEY[:-1], 0.0, width)
    ledger.add(FAMILY, KIND, KEY, 0.0, width - 1)
    ledger.add(FAMILY, "counter", KEY, 0.0, width)
    ledger.add(FAMILY, KIND, KEY._replace(model="m" * 300), 0.0, width)
    assert fold.usage() == {}
    ledger.add(FAMILY, KIND, KEY, 0.0, width)
    assert list(fold.usage()) == [KEY]


def test_the_cells_are_where_the_amounts_say(segments: list[Segment]) -> None:
    """What the supervisor reads are doubles in the order of `Amounts`."""
    Metrics(segments[0]).usage.cells(*KEY)[BYTES_IN] = 7.0
    (entry,) = [each for each in LedgerReader(segments[0]).new_entries() if each.labels == KEY]
    values = struct.unpack_from(f"{entry.count}d", segments[0].view, entry.offset)
    assert Amounts(*values) == Amounts(bytes_in=7.0)
