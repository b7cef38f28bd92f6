"""Every panel and every rule shows something when a real Prometheus watches real appliances under a mixed load.

Two appliances, one in several processes and one in a single one, answer all kinds of models, refuse what is wrong, take
over a new version, lose an engine, are reloaded with good and bad files, and one is drained and started again. One of
them takes work from an orchestrator, too. What the panels ask, with Grafana's variables filled in, is asked over the
HTTP API. There is no GPU here: readings of sensors are made up, on a page of their own. UPDATE_DOCS=1 writes the values
into docs/dashboards.md, and the pictures beside it.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from clarifai_grpc.grpc.api import resources_pb2
from orchestrator.enrolled import at_deployment, enrolled_with
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support import dashboards, documents, graphs, secrets
from support.appliance import (
    MODELS,
    PATIENCE_S,
    ROOT,
    Appliance,
    Client,
    Pki,
    array_input,
    image_input,
    make_pki,
    request_for,
    run,
    text_input,
)
from support.callers import Ask, Begin, Callers
from support.collector import Collector
from support.dashboards import Asked
from support.programs import need
from support.prometheus import Prometheus, needs_prometheus
from support.stock import SAMPLES, files_over_http
from support.usage_receiver import Receiver

from appliance.core.metrics import PREFIX, Metrics
from appliance.daemon.gauges import show_gpus
from appliance.engine.gpu import Gpu, Reading

pytestmark = needs_prometheus

RULES = ROOT / "packaging" / "prometheus" / "inference-appliance.rules.yml"
BUILD = ROOT / "build" / "dashboards"
PICTURES = ROOT / "docs" / "dashboards"
PICTURE_LIMIT = 150_000
"""Bytes of one picture in the repository."""
RATE_S = 5.0
"""Seconds that a rate looks at: many scrapes, and less than the run takes."""
PAUSE_S = 0.02
"""Seconds between two calls of a caller, so that two CPUs have time for Prometheus as well."""

APPLIANCES = ("press-1.plant", "press-2.plant")
MADE_UP = "made-up"
"""What Prometheus calls the appliances, and the page of made-up GPUs, which only the GPU's dashboard is shown."""
GIB = 2**30

GPU = "needs an NVIDIA GPU"
EMPTY_PANELS = {
    ("overview", "Appliances: GPU memory"): GPU,
    ("model", "Versions that are loaded: GPU memory"): GPU,
}
"""What cannot have values here, and why; each is empty indeed."""

ASKED = dashboards.asked()


def key(asked: Asked) -> tuple[str, str]:
    return asked.sheet, asked.name


RULE_EXPRESSIONS = {
    rule.get("alert") or rule["record"]: rule["expr"]
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}

Samples = list[dict[str, Any]]
"""What Prometheus answers: series with their labels and values."""


# ---- the load --------------------------------------------------------------------------------------------------------


def good_requests(web: str) -> list[Any]:
    """All kinds of models, alone and in batches, by content and by URL, for the cache and not."""
    digits = [image_input(path.read_bytes()) for path in sorted(SAMPLES.glob("*.png"))]
    linked = resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(url=f"{web}/{DIGIT.name}")))
    cached = request_for("digits", digits[:2])
    cached.use_predict_cache = True
    texts = [text_input("k-means " * count) for count in (1, 5, 40)]
    return [
        request_for("digits", digits[:1]),
        request_for("digits", digits),
        cached,
        request_for("digits", [linked]),
        request_for("ml-topics", texts),
        request_for("faces", digits[:4], user="", app=""),
        request_for("sentences", [text_input("the quick brown fox")], user="", app=""),
        request_for("tensors", [array_input(np.ones((1, 3), np.float32))], user="", app=""),
    ]


def bad_requests() -> list[Any]:
    """What is refused: for its content, its number of inputs, its URL, its model."""
    digit = image_input(DIGIT.read_bytes())
    inside = resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(url="https://10.0.0.1/a.png")))
    return [
        request_for("digits", [image_input(b"no picture"), digit]),
        request_for("digits", [digit] * 129),
        request_for("digits", [inside]),
        request_for("nothing", [digit]),
    ]


def requests_elsewhere() -> list[Any]:
    """For users of the orchestrator, who name the deployment."""
    return [
        at_deployment(request_for("digits", [image_input(DIGIT.read_bytes())]), "digits"),
        at_deployment(request_for("ml-topics", [text_input("k-means")]), "ml-topics"),
    ]


DIGIT = sorted(SAMPLES.glob("*.png"))[0]


def in_turn(port: int, pki: Pki, key: str, requests: Sequence[Any], *, anew: bool = False) -> Begin:
    """A client that sends these, one after the other, for ever. Args: anew: over a new connection each."""

    @contextlib.contextmanager
    def begin() -> Iterator[Ask]:
        with contextlib.ExitStack() as kept:
            client = None if anew else kept.enter_context(Client(port, pki.ca, key))
            turns = itertools.cycle(requests)

            def ask() -> str:
                with contextlib.ExitStack() as once:
                    try:
                        reply = (client or once.enter_context(Client(port, pki.ca, key))).predict(next(turns))
                    except grpc.RpcError as error:
                        return str(error.code().name)
                    return str(reply.status.code)

            yield ask

    return begin


# ---- the appliances, and what happens to them ------------------------------------------------------------------------


def make(folder: Path, pki: Pki, web: str, mode: str, **more: Any) -> Appliance:
    """One with all kinds of models, which is found at the same place when it is started again."""
    place = web.removeprefix("http://")
    ports = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    config = {
        "server": {"listen": ports[0]},
        "admin": {"listen": ports[1]},
        "tls": {"crl": folder / "tls" / "crl.pem"},
        "urls": {"hosts": [place], "private_addresses": True},
        "cache": {"size": "1MiB"},
        "metrics": {"principals": 2},
        "principal": [{"name": "line-3"}, {"name": "hasty", "requests_per_second": 1, "burst": 1}],
        **more,
    }
    made = Appliance(folder, pki, config, mode=mode, transport="native")
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, made.models / bundle)
    graphs.write_image_embedder(made.models / "faces")
    graphs.write_text_embedder(made.models / "sentences")
    graphs.write_raw(made.models / "tensors")
    return made


def write_gpus(file: Path) -> None:
    """A page of metrics as an appliance with two GPUs writes it. The readings are made up."""
    metrics = Metrics()
    first, second = (Gpu(index, index, f"GPU-{index}", "", 80 * GIB, free * GIB) for index, free in ((0, 50), (1, 14)))
    readings = [Reading(first, 0.34, 41, 210, 1.41e9), Reading(second, 0.88, 63, 540, 1.83e9)]
    show_gpus(metrics, readings, (first.uuid, second.uuid))
    for model, gpu, size in (("digits", first, 2), ("faces", second, 9)):
        metrics.gpu_model_memory.labels(model, "1", gpu.uuid).set(size * GIB)
    page = metrics.page(False)
    file.write_bytes(b"".join(line for line in page.splitlines(keepends=True) if b"_gpu_" in line))


def free_port() -> int:
    """A port of the loopback interface that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def let_happen(several: Appliance, single: Appliance) -> None:
    """What an appliance goes through, one after the other, while it is called; each is waited for."""
    # A version beside the first, which takes its place, and is taken back; and one that replaces its own content.
    staged = several.home / "staged" / "digits"
    shutil.copytree(MODELS / "digits", staged)
    (staged / "1").rename(staged / "2")
    several.command("models", "add", staged, "--wait", "100")
    several.wait(lambda: several.state_of("digits", "2") == "ready", "the new version")
    several.command("models", "rollback", "digits", "--wait", "100")
    several.wait(lambda: several.state_of("digits", "2") == "held", "the rollback")
    fresh = graphs.write_raw(several.home / "fresh" / "tensors", graphs.fixed_batch_model())
    (fresh / "1" / "model.onnx").replace(several.models / "tensors" / "1" / "model.onnx")
    several.wait(lambda: several.metric(f'{PREFIX}_model_swaps_total{{model="tensors"') >= 1, "the swap in place")
    # A bundle that cannot be loaded.
    graphs.write_raw(several.models / "broken", b"this is no graph")
    failures = f'{PREFIX}_model_loads_total{{model="broken"'
    several.wait(lambda: several.metric(failures), "the failed load")
    # Files that are taken over, and some that are not.
    good = several.file.read_text(encoding="utf-8")
    for text, result in ((good + "\n[nonsense]\n", "failed"), (good, "ok")):
        several.file.write_text(text, encoding="utf-8")
        several.signal(signal.SIGHUP)
        counted = f'{PREFIX}_config_reloads_total{{result="{result}"}}'
        several.wait(lambda counted=counted: several.metric(counted), result)
    several.command("certs", "renew", "server", "--dir", several.tls)
    several.wait(lambda: several.metric(f'{PREFIX}_certificate_reloads_total{{result="ok"}}'), "the new certificate")
    # Somebody who does not speak TLS.
    with socket.create_connection(("127.0.0.1", several.port())) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.recv(1)
    # An engine that crashes, and a drain.
    engine = next(row["pid"] for row in several.admin("/status")["processes"] if row["name"] == "engine")
    os.kill(engine, signal.SIGKILL)
    crashes = f'{PREFIX}_worker_restarts_total{{process="engine",reason="signal"}}'
    several.wait(lambda: several.metric(crashes), "the crash")
    several.wait(lambda: several.admin("/readyz")["ready"], "the next engine")
    assert single.stop() == 0
    single.start()


@dataclass
class World:
    """What is watched: a Prometheus, its appliances, who calls them, and since when."""

    prometheus: Prometheus
    callers: Callers
    begun: float

    def ask(self, expression: str, **chosen: Sequence[str] | str) -> Samples:
        """An expression's values now, with variables filled in."""
        return list(self.prometheus.ask("/query", query=self.filled(expression, **chosen))["result"])

    def course(self, expression: str, **chosen: Sequence[str] | str) -> Samples:
        """Its values from the beginning to now."""
        now = time.time()
        span = {"start": str(self.begun), "end": str(now), "step": str(max(0.5, (now - self.begun) / 150))}
        return list(self.prometheus.ask("/query_range", query=self.filled(expression, **chosen), **span)["result"])

    def filled(self, expression: str, **chosen: Sequence[str] | str) -> str:
        """With all appliances, models and versions, unless some are chosen."""
        variables = {"instance": APPLIANCES, "model": ".+", "version": ".+", "device": ".+", **chosen}
        return dashboards.filled(expression, RATE_S, time.time() - self.begun, variables)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """The appliances, after all that happens to them; they are still being called."""
    pki = make_pki(tmp_path / "pki")
    run("certs", "crl", "--dir", pki.folder)
    secrets.never_to_be_written(PAT)
    with contextlib.ExitStack() as stack:
        web, gpus = (stack.enter_context(files_over_http(each)) for each in (SAMPLES, tmp_path))
        write_gpus(tmp_path / "metrics")
        centre = stack.enter_context(RunningCentre(tmp_path / "centre", pki))
        centre.tell("admit", pat=PAT, user=USER)
        collector = stack.enter_context(Collector(pki))
        receiver = stack.enter_context(Receiver(pki.folder))
        reports = {"usage_url": receiver.url, "usage_interval_s": 1}
        several, single = made = (
            make(
                tmp_path / "several", pki, web, "processes",
                orchestrator=enrolled_with(centre.base_url, centre, tmp_path, streams=2, **reports),
                traces={"endpoint": collector.url, "ca": pki.ca, "sample": 0.1},
            ),
            make(tmp_path / "single", pki, web, "single"),
        )  # fmt: skip
        keys = [(each.new_key("--principal", "line-3"), each.new_key("--principal", "hasty")) for each in made]
        for each in made:
            stack.enter_context(each)
        places = {MADE_UP: gpus.removeprefix("http://")}
        places |= zip(APPLIANCES, (each.config["admin"]["listen"] for each in made), strict=True)
        targets = [{"targets": [place], "labels": {"instance": name}} for name, place in places.items()]
        prometheus = stack.enter_context(Prometheus(tmp_path / "prometheus", rules=RULES, static_configs=targets))
        prometheus.wait(lambda: prometheus.value("sum(up)") == len(targets), "a first scrape")
        begun = time.time()
        loops = [in_turn(centre.port, pki, PAT, requests_elsewhere())]
        for each, (key, hasty) in zip(made, keys, strict=True):
            several_kinds = (good_requests(web), good_requests(web)[::-1], bad_requests())
            loops.extend(in_turn(each.port(), pki, key, requests) for requests in several_kinds)
            loops.append(in_turn(each.port(), pki, hasty, good_requests(web)[:1]))
            loops.append(in_turn(each.port(), pki, "no such key", good_requests(web)[:1], anew=True))
        callers = stack.enter_context(Callers(loops, lambda end: PAUSE_S))
        let_happen(several, single)
        ready = f'min(sum by (instance) ({PREFIX}_catalog_versions{{state="ready"}}))'
        prometheus.wait(lambda: prometheus.value(ready) == 5, "a scrape of both after all that")
        yield World(prometheus, callers, begun)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def numbers(samples: Samples) -> list[float]:
    """All values in them."""
    return [float(value) for each in samples for _, value in each.get("values") or [each["value"]]]


def good(samples: Samples) -> bool:
    """There are values, and each is a number."""
    found = numbers(samples)
    return bool(found) and all(map(math.isfinite, found))


def measured(expression: str) -> str:
    """An alert's expression with its comparisons as values, 1 or 0, so that it has one when it does not fire, too."""
    parts = re.split(r"(\{[^}]*\})", expression)
    return "".join(part if part.startswith("{") else re.sub(r"([<>]=?|[!=]=)", r"\1 bool", part) for part in parts)


def seen_by(asked: Asked) -> dict[str, Sequence[str]]:
    """Which appliances it is asked of, where they are not those of all."""
    return {"instance": (*APPLIANCES, MADE_UP)} if asked.sheet == "gpu" else {}


def patiently(asks: Mapping[Any, Callable[[], Samples]]) -> dict[Any, Samples]:
    """Ask until each has values that are numbers, or the time is over: what is asked last counts."""
    deadline = time.monotonic() + PATIENCE_S
    found = {each: ask() for each, ask in asks.items()}
    while missing := [each for each in asks if not good(found[each])]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
        found |= {each: asks[each]() for each in missing}
    return found


def test_every_panel_and_every_rule_shows_something(world: World) -> None:
    """One test, as several processes may share the tests of a file, and each would start all of this."""
    panels = {each: functools.partial(world.ask, each.expression, **seen_by(each)) for each in ASKED}
    answers = patiently({each: ask for each, ask in panels.items() if key(each) not in EMPTY_PANELS})
    rules = patiently({name: functools.partial(world.ask, measured(text)) for name, text in RULE_EXPRESSIONS.items()})
    check_values(world, answers, rules)
    check_load(world, answers)
    for sheet in dashboards.SHEETS:
        check_variables(world, sheet)
    empty = {each: ask() for each, ask in panels.items() if each not in answers}
    assert {key(each) for each, samples in empty.items() if not samples} == EMPTY_PANELS.keys()
    text = page_part(answers, rules)
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "table.md").write_text(text, encoding="utf-8")
    if os.environ.get("UPDATE_DOCS") == "1":
        page = dashboards.PAGE.read_text(encoding="utf-8")
        dashboards.PAGE.write_text(documents.with_part(page, dashboards.MADE, text), encoding="utf-8")
        draw(world, answers)


def check_values(world: World, answers: Mapping[Asked, Samples], rules: Mapping[str, Samples]) -> None:
    """Now, and at every moment since the beginning at which there are some: numbers, none of them infinite."""
    without: list[tuple[str, ...]] = [
        (*key(asked), asked.expression) for asked, samples in answers.items() if not good(samples)
    ]
    without += [
        (*key(asked), asked.expression, "as a course")
        for asked in answers
        if not asked.now and not good(world.course(asked.expression, **seen_by(asked)))
    ]
    without += [(name, measured(RULE_EXPRESSIONS[name])) for name, samples in rules.items() if not good(samples)]
    assert without == []


def check_load(world: World, answers: Mapping[Asked, Samples]) -> None:
    """It was mixed: results, part results, refusals of every kind, a drain; and each call had an end."""
    codes = {"10000", "10010", "11005", "11008", "21200", "30105", "10020", "UNAVAILABLE"}
    assert codes <= world.callers.ends.keys(), world.callers.ends
    assert not world.callers.ends["lost"]
    (lost,) = [samples for asked, samples in answers.items() if asked.name == "Lost calls"]
    assert numbers(lost) == [0]


def check_variables(world: World, sheet: str) -> None:
    """Each offers what there is, for what is chosen before it; and one appliance shows nothing of another."""
    instance = MADE_UP if sheet == "gpu" else APPLIANCES[0]
    chosen: dict[str, Sequence[str]] = {"instance": [instance], "model": ["digits"]}
    expected = {
        "instance": set(APPLIANCES),
        "model": {"digits", "ml-topics", "faces", "sentences", "tensors"},
        "version": {"1", "2"},
        "device": {"gpu:0", "gpu:1"},
    }
    for variable in dashboards.SHEETS[sheet]["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            offered = world.prometheus.ask(f"/label/{label}/values", **{"match[]": world.filled(metric, **chosen)})
            assert expected[label] <= set(offered)
    for asked in ASKED:
        if asked.sheet == sheet:
            instances = {each["metric"].get("instance") for each in world.ask(asked.expression, **chosen)}
            assert instances <= {instance, None}, asked.expression


# ---- the page --------------------------------------------------------------------------------------------------------


def page_part(answers: Mapping[Asked, Samples], rules: Mapping[str, Samples]) -> str:
    """What docs/dashboards.md has of it: a row for each query of a panel, and for each rule."""
    parts = [f"\nRun of {time.strftime('%Y-%m-%d', time.gmtime())}, two appliances; readings of GPUs are made up.\n"]
    for sheet, content in dashboards.SHEETS.items():
        rows = [(asked.name, cell(asked, answers)) for asked in ASKED if asked.sheet == sheet]
        title = content["title"].partition(" / ")[2]
        parts.append(f"\n### {title}\n\n{documents.table(['panel', 'value'], rows)}")
    rows = [(rule, dashboards.shown(numbers(samples))) for rule, samples in rules.items()]
    told = "Of an alert: 1 where it is on (or waits to be, for its `for`), 0 where it is not."
    parts.append(f"\n### Rules\n\n{told}\n\n{documents.table(['rule', 'value'], rows)}")
    return "".join(parts)


def cell(asked: Asked, answers: Mapping[Asked, Samples]) -> str:
    """What the page says of a query."""
    if why := EMPTY_PANELS.get(key(asked)):
        return f"– ({why})"
    return dashboards.shown(numbers(answers[asked]), asked.unit, asked.decimals)


def draw(world: World, answers: Mapping[Asked, Samples]) -> None:
    """Each dashboard, from every panel's series over the run; small enough for the repository."""
    need(dashboards.DRAW.exists(), str(dashboards.DRAW), "make .clients/draw/ready")
    found: dict[str, dict[int, list[Any]]] = {sheet: {} for sheet in dashboards.SHEETS}
    for asked, samples in answers.items():
        series = samples if asked.now else world.course(asked.expression, **seen_by(asked))
        found[asked.sheet].setdefault(asked.panel, []).append({"legend": asked.legend, "series": series})
    data = BUILD / "data.json"
    notes = {"gpu": "Readings of GPUs are made up."}
    data.write_text(json.dumps({"begun": world.begun, "sheets": found, "notes": notes}), encoding="utf-8")
    subprocess.run([dashboards.DRAW, dashboards.GRAFANA / "render.py", data, PICTURES], check=True, timeout=PATIENCE_S)
    for sheet in dashboards.SHEETS:
        size = (PICTURES / f"{sheet}.png").stat().st_size
        assert 10_000 < size <= PICTURE_LIMIT, f"{sheet}.png has {size} bytes"
