"""Who writes the audit log: what fronts tell is added up; what the disk does not take waits, is said, and follows."""

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.waiting import eventually_async

from appliance.api.keys import KeyEntry
from appliance.api.trail import Trail, Use
from appliance.core.audit import read
from appliance.core.config import Audit, Catalog, Config
from appliance.core.errors import ConfigError
from appliance.core.metrics import Metrics
from appliance.daemon import auditor as auditors
from appliance.daemon.auditor import Auditor

ADA = Use("ada", "key:12345678", "acme/main/digits", "1", 10000)
PLACE = ("PostModelOutputs", "ipv4:10.0.0.7:1", "id")


class Site:
    """An auditor over a folder, and what it wrote."""

    def __init__(self, state: Path, **settings: Any) -> None:
        self.config = Config(catalog=Catalog(state_dir=state), audit=Audit(**settings))
        self.metrics = Metrics()
        self.auditor = Auditor(self.config, self.metrics)
        self.changes = 0
        self.auditor.changed = self._changed

    def _changed(self) -> None:
        self.changes += 1

    def records(self, *events: str) -> list[dict[str, Any]]:
        """Records of these events, or all."""
        found: list[dict[str, Any]] = []
        reading = read(self.config.audit_folder, each=lambda line, record: found.append(json.loads(line)))
        assert reading.faults == []
        return [record for record in found if not events or record["event"] in events]

    def value(self, name: str) -> float | None:
        """A metric."""
        return self.metrics.registry.get_sample_value(f"inference_appliance_{name}")


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Site]]:
    """Make sites, whose auditors look often."""
    monkeypatch.setattr(auditors, "_LOOK_S", 0.01)
    made: list[Site] = []

    def make(**settings: Any) -> Site:
        made.append(Site(tmp_path, **settings))
        return made[-1]

    yield make
    for each in made:
        await each.auditor.close()


@pytest.fixture
def full() -> Iterator[Callable[[bool], None]]:
    """Let this process write nothing to files, or everything again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda on: resource.setrlimit(resource.RLIMIT_FSIZE, (0 if on else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def told(*uses: Use) -> Any:
    """What a front tells of these calls, as it arrives."""
    trail = Trail()
    for use in uses:
        trail.count(use, *PLACE)
    return json.loads(json.dumps(trail.take()))


async def test_a_life_has_a_beginning_and_an_end(site: Callable[..., Site]) -> None:
    one = site()
    await one.auditor.open("1", "digest", [KeyEntry("12345678", "0" * 64, "ada", "", 0.0)])
    await one.auditor.close()
    await one.auditor.close()
    assert [record["event"] for record in one.records()] == ["file", "started", "stopped"]
    assert one.records("started")[0]["keys"] == {"12345678": "ada"}
    assert one.value("audit_records_total") == 2
    assert one.value("audit_writable") == 1


async def test_what_fronts_tell_is_added_up(site: Callable[..., Site]) -> None:
    """Of one use there is one first, whoever tells it; its counts are written when the minute, or the daemon, ends."""
    one = site()
    await one.auditor.open("1", "", [])
    other = ADA._replace(model="acme/main/other")
    one.auditor.take(told(ADA, ADA, other))
    one.auditor.take(told(ADA))
    await eventually_async(lambda: len(one.records("first")) == 2)
    assert one.records("use") == []
    assert one.records("first")[0]["req_id"] == "id"
    await one.auditor.close()
    counts = {record["model"]: record["count"] for record in one.records("use")}
    assert counts == {"acme/main/digits": 3, "acme/main/other": 1}
    (use, _) = one.records("use")
    assert (use["principal"], use["credential"], use["version"], use["code"]) == ("ada", "key:12345678", "1", 10000)
    assert 0 <= use["seconds"] < 60


async def test_a_minute_is_written_when_it_is_over(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditors, "_MINUTE_S", 0.05)
    one = site()
    await one.auditor.open("1", "", [])
    one.auditor.take(told(ADA))
    await eventually_async(lambda: len(one.records("use")) == 1)
    one.auditor.take(told(ADA, ADA))
    await eventually_async(lambda: len(one.records("use")) == 2)
    first, second = one.records("use")
    assert (first["count"], second["count"]) == (1, 2)
    assert second["since"] > first["since"]


async def test_a_trail_that_is_watched_is_taken_from(site: Callable[..., Site]) -> None:
    one = site()
    trail = Trail()
    one.auditor.watch(trail)
    await one.auditor.open("1", "", [])
    trail.refused(Use("", "", "", "", 11008), *PLACE, "The key is not known.")
    await eventually_async(lambda: bool(one.records("refused")))
    (refused,) = one.records("refused")
    assert (refused["code"], refused["why"], refused["peer"]) == (11008, "The key is not known.", "ipv4:10.0.0.7:1")
    trail.count(ADA, *PLACE)
    await one.auditor.close()
    assert len(one.records("use")) == 1, "the last second's too"


async def test_refusals_that_came_too_fast_are_counted(site: Callable[..., Site]) -> None:
    one = site()
    await one.auditor.open("1", "", [])
    one.auditor.take({"uses": [], "first": [], "refused": [], "left_out": 17})
    await one.auditor.close()
    assert one.records("refused")[0]["count"] == 17


async def test_a_clock_that_was_set_is_recorded(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    one = site()
    await one.auditor.open("1", "", [])
    real = auditors.time.time
    monkeypatch.setattr(auditors.time, "time", lambda: real() - 3600)
    await eventually_async(lambda: bool(one.records("clock")))
    assert one.records("clock")[0]["jumped_s"] == pytest.approx(-3600, abs=1)


async def test_off_is_off(site: Callable[..., Site]) -> None:
    one = site(mode="off")
    await one.auditor.open("1", "", [])
    one.auditor.record("reload")
    one.auditor.take(told(ADA))
    await one.auditor.close()
    assert not one.config.audit_folder.exists()
    assert one.value("audit_writable") is None


@pytest.mark.parametrize("mode", ["on", "required"])
async def test_a_full_disk_is_said_and_nothing_is_lost(
    site: Callable[..., Site], full: Callable[[bool], None], mode: str
) -> None:
    """Only where the log is required are calls refused."""
    one = site(mode=mode)
    await one.auditor.open("1", "", [])
    full(True)
    one.auditor.take(told(ADA, ADA))
    await eventually_async(lambda: one.value("audit_writable") == 0)
    assert one.auditor.refuses is (mode == "required")
    assert str(one.config.audit_folder) in one.auditor.problem
    assert one.changes == 1
    one.auditor.take(told(ADA))
    full(False)
    await eventually_async(lambda: one.value("audit_writable") == 1)
    assert (one.auditor.refuses, one.auditor.problem, one.changes) == (False, "", 2)
    await one.auditor.close()
    assert one.records("use")[0]["count"] == 3
    assert len(one.records("first")) == 1


async def test_minutes_grow_while_they_cannot_be_written(
    site: Callable[..., Site], full: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is bounded by the number of uses, not by the time."""
    one = site()
    await one.auditor.open("1", "", [])
    full(True)
    one.auditor.record("reload")
    await eventually_async(lambda: bool(one.auditor.problem))
    monkeypatch.setattr(auditors, "_MINUTE_S", 0.0)
    for _ in range(5):
        one.auditor.take(told(ADA))
        await asyncio.sleep(0)
    full(False)
    await eventually_async(lambda: bool(one.records("use")))
    assert [record["count"] for record in one.records("use")] == [5]


async def test_beyond_the_bound_records_are_lost_and_counted(
    site: Callable[..., Site], full: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditors, "_EVENTS", 3)
    one = site()
    await one.auditor.open("1", "", [])
    full(True)
    one.auditor.record("reload", number=0)
    await eventually_async(lambda: bool(one.auditor.problem))
    for number in range(1, 10):
        one.auditor.record("reload", number=number)
    lost = one.value("audit_lost_records_total")
    assert lost is not None
    assert lost >= 6
    full(False)
    await eventually_async(lambda: bool(one.records("lost")))
    assert one.records("lost")[0]["count"] == lost
    numbers = [record["number"] for record in one.records("reload")]
    assert numbers == list(range(10 - int(lost)))


async def test_a_disk_that_is_full_at_the_start_keeps_nobody_from_starting(
    site: Callable[..., Site], full: Callable[[bool], None]
) -> None:
    one = site(mode="required")
    one.config.audit_folder.mkdir()
    full(True)
    await one.auditor.open("1", "", [])
    assert one.auditor.refuses
    full(False)
    await eventually_async(lambda: not one.auditor.refuses)
    assert len(one.records("started")) == 1


async def test_a_folder_that_can_never_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = Site(tmp_path, folder=tmp_path / "file" / "audit")
    with pytest.raises(ConfigError, match=r"audit\.folder .* cannot be used"):
        await one.auditor.open("1", "", [])


async def test_two_daemons_do_not_share_one(site: Callable[..., Site], tmp_path: Path) -> None:
    await site().auditor.open("1", "", [])
    with pytest.raises(ConfigError, match="Another appliance writes"):
        await Site(tmp_path).auditor.open("1", "", [])
