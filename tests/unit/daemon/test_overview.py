"""The status document: whole, as its schema says, and cheap however many models there are and however many ask."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from support.appliance import MODELS, ROOT

from appliance.catalog.bundle import VersionFolder, read_config
from appliance.catalog.view import Bundle, Running, State, Version, View
from appliance.core.config import Config
from appliance.core.metrics import Counted, Metrics
from appliance.daemon.overview import Overview
from appliance.daemon.status import VERSION, Status

SCHEMA = TypeAdapter(Status)


class Loaded:
    """What answers for a version."""

    problem: str | None = None

    def described(self) -> dict[str, object]:
        return {"device": "cpu"}

    async def drain(self) -> None: ...

    def close(self) -> None: ...


class Catalog(View[Loaded]):
    """One whose bundles the test adds."""

    complete = True

    def add(self, name: str, state: State = State.READY, problem: str = "") -> None:
        path = MODELS / "digits"
        config, _, _ = read_config(path, "appliance", "main")
        assert config is not None
        key = dataclasses.replace(config.key, model_id=name)
        bundle: Bundle[Loaded] = Bundle(name, path, key=key, settling=False)
        folder = VersionFolder("1", path / "1", path / "1" / "model.onnx")
        version: Version[Loaded] = Version(
            "1", dataclasses.replace(config, key=key), folder, (), 5.0, state, problem=problem
        )
        version.running = Running(Loaded()) if state is State.READY else None
        bundle.versions["1"] = version
        self._bundles[name] = bundle

    def add_unreadable(self, name: str, problem: str) -> None:
        self._bundles[name] = Bundle(name, Path(name), problem=problem, settling=False)


class Staff:
    """One process that counts for real and does no work; the rest of `Staff` is not asked."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.away: dict[str, str] = {}
        self.link: dict[str, object] = {}
        self.asked = 0

    def counted(self, *names: str, notes: bool = False) -> Mapping[str, Mapping[tuple[str, ...], Counted]]:
        return self.metrics.counted(*names, notes=notes)

    def describe(self) -> dict[str, object]:
        self.asked += 1
        return {
            "mode": "processes",
            "transport": "native",
            "device": "cpu",
            "device_reason": "no GPU",
            "orchestrator": self.link,
            "processes": [{"name": "front 0", "pid": 7, "problem": self.away.get("front 0", ""), "device": "cpu"}],
        }

    def problems(self) -> dict[str, str]:
        return self.away


@dataclasses.dataclass
class World:
    """A daemon's insides."""

    metrics: Metrics
    staff: Staff
    catalog: Catalog
    overview: Overview
    config: Config
    ready: bool = True
    phase: str = "ready"

    def status(self) -> Status:
        return self.overview.status(self.config)

    def why(self) -> list[tuple[str, str]]:
        return [(reason.what, reason.runbook) for reason in self.status().reasons]


@pytest.fixture
def world() -> Iterator[World]:
    metrics, catalog = Metrics(), Catalog()
    metrics.keys.set(1)
    metrics.certificate_expiry.labels("server").set(time.time() + 90 * 86400)
    for gauge, size in ((metrics.disk_free, 50), (metrics.disk_size, 100)):
        gauge.labels("models").set(size * 2**30)
    staff = Staff(metrics)

    def readiness() -> tuple[bool, dict[str, object]]:
        return made.ready, {"phase": made.phase, "not_ready": staff.away | catalog.not_ready()}

    overview = Overview(metrics, staff, catalog, readiness)  # type: ignore[arg-type]
    made = World(metrics, staff, catalog, overview, Config())
    yield made
    overview.close()


def test_all_well_is_healthy(world: World) -> None:
    world.catalog.add("digits")
    found = world.status()
    assert (found.health, found.reasons, found.more_reasons) == ("healthy", [], 0)
    assert [(model.model, model.state, model.input) for model in found.models] == [
        ("appliance/main/digits", "ready", "image")
    ]


def test_the_document_is_what_the_schema_says(world: World) -> None:
    """Nothing is missing, and nothing else is in it; the schema that is committed is that of the classes."""
    world.catalog.add("digits")
    world.catalog.add("topics", State.FAILED, "broken")
    world.metrics.requests.labels("digits", "1", "PostModelOutputs", 11008).inc_for("r-1")
    logging.getLogger("appliance.test").error("something failed")
    for labels, value in ((("gpu:0", "GPU-1"), 0.5),):
        for gauge in (world.metrics.gpu_utilization, world.metrics.gpu_memory_total, world.metrics.gpu_memory_used):
            gauge.labels(*labels).set(value)
    body = world.overview.document(world.config)
    content = json.loads(body)
    assert SCHEMA.dump_python(SCHEMA.validate_json(body, strict=True)) == content
    assert content["format"] == VERSION
    schema = json.loads((ROOT / "docs" / "status.schema.json").read_text("utf-8"))
    assert content.keys() == set(schema["required"])


def test_each_field_is_described_or_says_it_by_its_name() -> None:
    """A field's description reaches the schema."""
    schema = SCHEMA.json_schema(mode="serialization")
    assert schema["properties"]["health"]["description"].startswith("Degraded: it serves")
    assert schema["$defs"]["Model"]["properties"]["queue_rows"]["description"] == "Rows that wait for it."


def test_each_thing_that_is_wrong_is_a_reason_with_a_page(world: World) -> None:
    world.catalog.add("digits")
    world.catalog.add_unreadable("half", "config.yaml is not YAML")
    world.staff.away["front 0"] = "is being replaced"
    world.metrics.certificate_expiry.labels("server").set(time.time() + 86400)
    world.metrics.crl_next_update.labels("CN=root").set(time.time() - 1)
    world.metrics.disk_free.labels("models").set(2**30)
    for gauge, value in ((world.metrics.gpu_memory_used, 95), (world.metrics.gpu_memory_total, 100)):
        gauge.labels("gpu:0", "GPU-1").set(value)
    world.metrics.keys.set(0)
    found = world.status()
    assert found.health == "degraded"
    assert set(world.why()) == {
        ("half", "model-not-ready"), ("front 0", "worker-restarts"), ("certificate server", "certificate-expires"),
        ("revocation list CN=root", "revocation-list-due"), ("disk of models", "disk-full"), ("gpu:0", "gpu-memory"),
        ("keys", ""),
    }  # fmt: skip


def test_what_nobody_else_logs_is_logged_when_it_begins_and_when_it_ends(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, not with every look; with the page that leads to the mending."""
    caplog.set_level("INFO", "appliance")
    world.overview.tell()
    assert caplog.records == []
    world.metrics.certificate_expiry.labels("server").set(time.time() + 1.5 * 86400)
    world.metrics.disk_free.labels("models").set(2**30)
    for _ in range(3):
        world.overview.tell()
    told = {(each.levelname, each.getMessage(), each.__dict__["runbook"]) for each in caplog.records}
    assert told == {
        ("WARNING", "certificate server: it ends in 1.5 days", "certificate-expires"),
        ("WARNING", "disk of models: only 1.0% of it are free", "disk-full"),
    }
    assert len(caplog.records) == 2
    caplog.clear()
    world.metrics.disk_free.labels("models").set(50 * 2**30)
    world.overview.tell()
    assert [each.getMessage() for each in caplog.records] == ["disk of models: it is as it should be again"]


def test_every_page_that_a_reason_names_is_there(world: World) -> None:
    from appliance.daemon import reasons

    source = Path(reasons.__file__).read_text("utf-8") + (ROOT / "appliance/daemon/assets/status.js").read_text("utf-8")
    pages = {path.stem for path in (ROOT / "docs" / "runbook").glob("*.md")}
    named = {page for page in pages if f'"{page}"' in source}
    assert named >= {"requests-lost", "worker-restarts", "rejects", "clock-skew", "disk-full", "gpu-memory"}
    world.catalog.add_unreadable("half", "x")
    assert {page for _, page in world.why()} <= pages


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [("starting", "it is starting"), ("draining", "it is draining"), ("ready", "no model is ready")],
)
def test_who_does_not_serve_is_unhealthy_and_says_that_first(world: World, phase: str, sentence: str) -> None:
    world.catalog.add("digits", State.FAILED, "broken")
    world.ready, world.phase = False, phase
    found = world.status()
    assert (found.health, found.reasons[0].why) == ("unhealthy", sentence)


def test_what_models_and_bundles_say_is_one_line_of_ascii_json(world: World) -> None:
    world.catalog.add_unreadable("<b>\udcff", "half \ud800\n\x1b[31m" + "x" * 5000)
    body = world.overview.document(world.config)
    assert body.isascii()
    (model,) = json.loads(body)["models"]
    assert model["bundle"] == "<b>\\xff"
    assert model["problem"].startswith("half \\ud800\\n\\x1b[31mxxx")
    assert len(model["problem"]) < 1100


def test_the_document_is_made_once_a_second_however_many_ask(world: World) -> None:
    world.catalog.add("digits")
    begun = time.monotonic()
    bodies = {world.overview.document(world.config) for _ in range(1000)}
    assert world.staff.asked <= 1 + (time.monotonic() - begun)
    assert len(bodies) == world.staff.asked


def test_a_thousand_models_take_a_twentieth_of_the_time_at_most(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document that takes long to make is kept for longer."""
    from appliance.daemon import overview as module

    for number in range(1000):
        world.catalog.add(f"model-{number}", State.FAILED if number % 2 else State.READY, "why " * (number % 2))
    monkeypatch.setattr(module, "_KEPT_S", 0.0)
    begun = time.monotonic()
    world.overview.document(world.config)
    took = time.monotonic() - begun
    asked = world.staff.asked
    while time.monotonic() < begun + took + 10 * took:
        content = world.overview.document(world.config)
    assert world.staff.asked <= asked + 1
    found = json.loads(content)
    assert (len(found["models"]), len(found["reasons"]), found["more_reasons"]) == (1000, 50, 450)
    print(f"a document of 1000 models: {len(content)} bytes, {1000 * took:.1f} ms")


def test_the_link_to_the_orchestrator_shows(world: World) -> None:
    """As the agent tells of it: nothing, up, or down and why."""
    assert (world.status().orchestrator.enrolled, world.status().orchestrator.connected) == (False, None)
    orchestrator = {"api_base": "https://api.example.com", "user_id": "acme"}
    world.config = Config.model_validate({"orchestrator": orchestrator})
    world.catalog.add("digits")
    world.staff.link = {"connected": True, "problem": "", "since": 5.0, "runners": 2}
    found = world.status()
    assert (found.orchestrator.api_base, found.orchestrator.user_id) == ("https://api.example.com:443", "acme")
    assert (found.orchestrator.connected, found.orchestrator.since, found.orchestrator.runners) == (True, 5.0, 2)
    assert found.health == "healthy"
    world.staff.link = {"connected": False, "problem": "it refuses the PAT", "since": 6.0, "runners": 0}
    assert world.why() == [("orchestrator", "orchestrator-silent")]


def test_failures_are_the_last_of_each_kind(world: World) -> None:
    metrics: Any = world.metrics
    metrics.requests.labels("digits", "1", "PostModelOutputs", 10000).inc()
    metrics.requests.labels("digits", "1", "PostModelOutputs", 21354).inc_for("r-1")
    metrics.requests.labels("digits", "1", "PostModelOutputs", 21354).inc_for("r-2")
    metrics.requests.labels("", "", "PostModelOutputs", 11008).inc_for("r-3")
    metrics.requests.labels("other", "other", "other", "other").inc_for("r-4")
    world.overview.look()
    found = [(each.code, each.name, each.count, each.req_id) for each in world.status().failures]
    assert found == [(11008, "CONN_KEY_INVALID", 1, "r-3"), (21354, "MODEL_BUSY_PLEASE_RETRY", 2, "r-2")]


def test_a_closed_overview_hears_nothing_any_more(world: World) -> None:
    world.overview.close()
    logging.getLogger("appliance.test").error("after the end")
    assert world.status().log == []
