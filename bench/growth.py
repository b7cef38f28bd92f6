"""What more of everything costs: connections, idle and busy; models loaded; concepts; inputs of a request.

Each figure is CPU microseconds of all the daemon's processes for a request, in a closed loop on 8 connections where
nothing else is said, and the memory that it holds. Tiny models, so that what grows is the appliance's own.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import charts
from bench.common import Run, names, number, parser, table
from bench.generator import Job, begin
from bench.models import tiny
from bench.server import Server, serving
from bench.workload import WORKLOADS, Shape, Workload

PARTS = ("connections", "models", "concepts", "batch")
_CONNECTIONS = (1, 10, 100, 1000)
_MODELS = (1, 10, 50)
_CONCEPTS = (10, 100, 1000, 10_000)
_BATCHES = (1, 8, 32, 128)


@dataclass(slots=True)
class Point:
    """One figure. Attributes: cpu_us: for a request, one a repetition. items: inputs of a request."""

    part: str
    count: int
    memory_mib: float = 0.0
    cpu_us: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    items: int = 1
    errors: int = 0


def main(arguments: list[str]) -> None:
    """Measure, print, write."""
    made = parser("growth", __doc__, seconds=3.0)
    made.add_argument("--parts", type=names, default=PARTS, help=f"of {', '.join(PARTS)}; default all")
    run = Run(made.parse_args(arguments))
    run.expect(len(run.options.parts) * 5 * (run.seconds + 4) * run.repeat + 90)
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as name:
        for part in run.options.parts:
            points += _MEASURES[part](run, Path(name))
            run.say(part)
    lines = run.head("What more costs", "Tiny models; CPU of all the daemon's processes; memory without program files.")
    drawn = {}
    titles = {
        "connections": "Connections, all busy",
        "idle": "Idle connections beside 8 busy ones",
        "models": "Models loaded, one of them asked",
        "concepts": "Concepts of the model, 20 returned",
        "batch": "Inputs of a request",
    }
    for part, title in titles.items():
        mine = [point for point in points if point.part == part]
        if mine:
            lines += ["", f"## {title}", "", _text(mine)]
            each = {"CPU µs": [(float(max(1, point.count)), median(point.cpu_us)) for point in mine]}
            drawn[part] = charts.lines(title, part, "CPU µs a request", each, log_x=True)
    content = [{"part": p.part, "count": p.count, "memory_mib": p.memory_mib, "cpu_us": p.cpu_us} for p in points]
    run.write("\n".join(lines), {"points": content}, drawn)


def _text(points: Sequence[Point]) -> str:
    first = points[0]
    rows = []
    for point in points:
        more = point.count - first.count
        rows.append(
            [
                str(point.count),
                number(median(point.cpu_us)),
                number(median(point.cpu_us) / point.items),
                number(median(point.per_s)),
                number(median(point.p50_ms)),
                number(median(point.p99_ms)),
                f"{point.memory_mib:.1f}",
                f"{1024 * (point.memory_mib - first.memory_mib) / more:.1f}" if more else "",
                str(point.errors),
            ]
        )
    head = [
        "count",
        "CPU µs/request",
        "µs/input",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "MiB",
        "KiB for each more",
        "errors",
    ]
    return table(head, rows)


def _load(server: Server, file: Path, connections: int, run: Run, point: Point, idle: int = 0) -> None:
    """One repetition of a point. CPU and memory are read while calls go on: opening connections is not in them."""
    opening = 1.0 + 0.004 * (idle + connections)
    job = Job(server.target(), (str(file),), connections, opening + run.seconds + 0.5, idle=idle)
    running = begin(job, run.cpus.load)
    time.sleep(opening)
    before = server.counters()
    time.sleep(run.seconds)
    work = server.counters().since(before)
    point.memory_mib = server.memory_mib()
    outcome = running.wait()
    point.cpu_us.append(work.cpu_s / max(1, work.succeeded) * 1e6)
    point.p50_ms.append(outcome.ms(50))
    point.p99_ms.append(outcome.ms(99))
    point.per_s.append(work.succeeded / run.seconds)
    point.errors += sum(outcome.problems.values())


def _write(folder: Path, workload: Workload, inputs: int) -> Path:
    file = folder / f"{workload.bundle.name}-{inputs}"
    file.write_bytes(workload.request(Shape(inputs)))
    return file


def _connections(run: Run, folder: Path) -> list[Point]:
    workload = WORKLOADS["digits"]()
    file = _write(folder, workload, 1)
    busy = [Point("connections", count) for count in _CONNECTIONS]
    idle = [Point("idle", count) for count in (0, *_CONNECTIONS[1:])]
    with serving(workload.bundle, run.cpus.server, mode=run.mode, settings=run.settings) as server:
        for _ in range(run.repeat):
            for point in busy:
                _load(server, file, point.count, run, point)
            for point in idle:
                _load(server, file, 8, run, point, point.count)
    return [*busy, *idle]


def _tiny(folder: Path, name: str, concepts: int) -> Workload:
    bundle = tiny.write_classifier(folder / "bundles" / name, concepts)
    return Workload(name, name, bundle, WORKLOADS["digits"]().inputs, "image")


def _models(run: Run, folder: Path) -> list[Point]:
    points = []
    for count in _MODELS:
        workloads = [_tiny(folder, f"tiny-{number_}", 10) for number_ in range(count)]
        bundles = [workload.bundle for workload in workloads]
        points.append(_alone(run, bundles, _write(folder, workloads[-1], 1), Point("models", count)))
    return points


def _concepts(run: Run, folder: Path) -> list[Point]:
    points = []
    for count in _CONCEPTS:
        workload = _tiny(folder, f"concepts-{count}", count)
        points.append(_alone(run, [workload.bundle], _write(folder, workload, 1), Point("concepts", count)))
        shutil.rmtree(workload.bundle)
    return points


def _batch(run: Run, folder: Path) -> list[Point]:
    workload = WORKLOADS["digits"]()
    points = [Point("batch", count, items=count) for count in _BATCHES]
    with serving(workload.bundle, run.cpus.server, mode=run.mode, settings=run.settings) as server:
        for _ in range(run.repeat):
            for point in points:
                _load(server, _write(folder, workload, point.count), 8, run, point)
    return points


def _alone(run: Run, bundles: list[Path], file: Path, point: Point) -> Point:
    with serving(bundles, run.cpus.server, mode=run.mode, settings=run.settings) as server:
        for _ in range(run.repeat):
            _load(server, file, 8, run, point)
    return point


_MEASURES: dict[str, Any] = {
    "connections": _connections,
    "models": _models,
    "concepts": _concepts,
    "batch": _batch,
}
