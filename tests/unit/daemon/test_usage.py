"""What was counted comes to the disk once, whatever becomes of the clock, the disk and the daemon."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import eventually_async

from appliance.core.config import Catalog, Config
from appliance.core.metrics import Metrics
from appliance.core.usage import CALLS, UsageKey
from appliance.daemon.usage import Usage
from appliance.orchestrator.usage_store import FILE, Period, Row, iso, read

KEY = UsageKey("line-3", "acme", "main", "digits", "1", "PostModelOutputs")
YEAR = 365 * 86400


class World:
    """A process that counts, a clock, and a disk that may be away."""

    def __init__(self, state: Path) -> None:
        self.state, self.metrics, self.now = state, Metrics(), 1_800_000_000.0
        self.usage = Usage(self.config, self.metrics.usage.counted, self.metrics, lambda: self.now)

    @property
    def config(self) -> Config:
        return Config(catalog=Catalog(root=self.state / "models", state_dir=self.state))

    def call(self, count: int = 1, key: UsageKey = KEY) -> None:
        self.metrics.usage.cells(*key)[CALLS] += count

    def write(self) -> None:
        asyncio.run(self.usage.write())

    def rows(self) -> list[Row]:
        return read(self.state / FILE, 0, 2.0**53)

    def calls(self) -> int:
        return int(sum(row.amounts.calls for row in self.rows()))

    def result(self, name: str) -> float:
        return float(self.metrics.usage_writes.labels(name).cells[0])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """With a state folder."""
    made = World(tmp_path / "state")
    made.state.mkdir()
    yield made
    asyncio.run(made.usage.close())


def test_what_is_new_is_written_and_nothing_twice(world: World) -> None:
    world.call(3)
    world.write()
    world.write()
    world.call(2)
    world.write()
    assert world.calls() == 5
    assert world.result("ok") == 3


@pytest.mark.parametrize("jump", [-50 * YEAR, -YEAR, -3600, -1, 0, 1, 3600, YEAR, 50 * YEAR, 10**15, -(10**15)])
def test_a_clock_that_jumps_neither_loses_nor_doubles(world: World, jump: float) -> None:
    """There and back again: one row for each minute that it said, and the sums are right."""
    for moment in (0.0, jump, jump, 0.0):
        world.now = 1_800_000_000.0 + moment
        world.call()
        world.write()
    assert world.calls() == 4
    assert len(world.rows()) <= 2
    assert [row.amounts.calls for row in world.rows()] in ([4], [2, 2])


def test_a_clock_that_jumps_all_day_makes_one_row_a_write_at_most(world: World) -> None:
    for number in range(200):
        world.now = (number * 7919 % 211) * 100_000_000.0
        world.call()
        world.write()
    assert world.calls() == 200
    assert len(world.rows()) <= 200


def test_what_cannot_be_written_is_kept_and_written_later(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """By day, so that it stays small; one line says that it fails, and one that it does no more."""
    caplog.set_level(logging.INFO)
    aside = world.state.rename(world.state.with_name("aside"))
    for hour in range(50):
        world.now = 1_800_000_000.0 + 3600 * hour
        world.call(2)
        world.write()
    assert world.result("failed") == 50
    assert len(world.usage._pending) == 3
    aside.rename(world.state)
    world.now += 3600
    world.call(1)
    world.write()
    assert world.calls() == 101
    assert [(iso(row.place.start), row.place.period.name, row.amounts.calls) for row in world.rows()] == [
        ("2027-01-15T00:00:00Z", "DAY", 32),
        ("2027-01-16T00:00:00Z", "DAY", 48),
        ("2027-01-17T00:00:00Z", "DAY", 20),
        ("2027-01-17T10:00:00Z", "MINUTE", 1),
    ]
    said = [record.getMessage() for record in caplog.records if "usage" in record.getMessage()]
    assert len(said) == 2
    assert "is not there" in said[0]


def test_the_last_is_written_at_the_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.call(4)
    asyncio.run(world.usage.close())
    assert world.calls() == 4


def test_what_is_lost_at_the_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path / "nowhere")
    world.call(4)
    asyncio.run(world.usage.close())
    (record,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert record.__dict__["calls"] == 4


async def test_it_goes_on_when_something_unforeseen_happens(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop that writes may not end as long as the daemon runs."""
    monkeypatch.setattr("appliance.daemon.usage._WRITE_S", 0.01)
    world.call()
    counted, broken = world.usage._counted, [True]

    def count() -> object:
        if broken:
            raise RuntimeError(broken.pop())
        return counted()

    monkeypatch.setattr(world.usage, "_counted", count)
    task = asyncio.create_task(world.usage.run())
    await eventually_async(lambda: (world.state / FILE).exists() and world.calls() == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert "usage could not be written" in caplog.text


def test_periods_of_a_write_are_minutes(world: World) -> None:
    world.call()
    world.write()
    (row,) = world.rows()
    assert row.place == (Period.MINUTE, 1_800_000_000, KEY)
