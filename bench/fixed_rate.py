"""Open loop: requests at a fixed rate, whether replies come or not; latency counts from when a request was due.

The rates are parts of what a closed loop of the same requests reached just before on the most connections. A caller
who waits while the server is slow would not be seen in a closed loop (coordinated omission); here it is.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench import charts, ort
from bench.common import Run, number, numbers, of_workloads, parser, table
from bench.load import Load, prepare
from bench.server import serving
from bench.workload import BATCHES, CONNECTIONS, WORKLOADS, Workload

PARTS = (0.5, 0.8)
_LATE_MS = 5.0
"""Lateness from which the generator, not the server, may be what the latency shows."""

Cell = tuple[str, str, int, float]
"""Model, request, connections, part of the closed loop's rate."""


def main(arguments: list[str]) -> None:
    """Measure, print, write."""
    made = of_workloads(parser("open", __doc__, seconds=5.0), ("digits", "minilm", "resnet50"))
    made.add_argument("--connections", type=numbers, default=CONNECTIONS, help="default 1,8,64")
    made.add_argument("--batches", type=numbers, default=BATCHES, help="inputs of a request; default 1,8,128")
    made.add_argument("--rates", type=_parts, default=PARTS, help="parts of the closed loop's rate; default 0.5,0.8")
    run = Run(made.parse_args(arguments))
    options = run.options
    shapes = sum(len(WORKLOADS[name]().shapes(options.batches)) for name in options.models)
    each = len(options.connections) * len(options.rates) * (1.5 * run.seconds + 2) + run.seconds
    run.expect(run.repeat * shapes * each + 30 * len(options.models))
    cells: dict[Cell, list[dict[str, Any]]] = {}
    for name in options.models:
        _measure(WORKLOADS[name](), run, cells)
    lines = run.head("Fixed rate", "TLS, one key, loopback. Latency from when a request was due.")
    lines += ["", _text(cells), "", *_notes(cells)]
    content = [
        {"model": name, "request": request, "connections": connections, "part": part, "repetitions": figures}
        for (name, request, connections, part), figures in cells.items()
    ]
    run.write("\n".join(lines), {"open": content}, {"p99": _chart(cells)})


def _parts(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _measure(workload: Workload, run: Run, cells: dict[Cell, list[dict[str, Any]]]) -> None:
    expected = ort.measure(workload, run.cpus.server, 0.01)["answers"]
    with (
        serving(workload.bundle, run.cpus.server, mode=run.mode, settings=run.settings) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        load = Load(server, run.cpus.load)
        for repetition in range(run.repeat):
            for shape in workload.shapes(run.options.batches):
                request = prepare(workload, shape, expected, Path(folder))
                most = 8 if workload.heavy else max(run.options.connections)
                closed = load.closed(request, most, run.seconds / 2)
                capacity = closed.items_per_s / shape.inputs
                for connections in run.options.connections:
                    for part in run.options.rates:
                        rate = max(part * capacity, 0.2)
                        seconds = max(run.seconds, 4 / rate)
                        figures = load.open(request, connections, rate, seconds).as_dict()
                        cells.setdefault((workload.name, shape.name, connections, part), []).append(figures)
            run.say(f"{workload.name}: repetition {repetition + 1}")


def _text(cells: dict[Cell, list[dict[str, Any]]]) -> str:
    head = ["model", "request", "conns", "load", "rate/s", "answered/s", "p50 ms", "p99 ms", "p99.9 ms", "late ms"]
    head += ["server CPU", "load CPU", "rows/run", "requests", "errors"]
    rows = []
    for (name, request, connections, part), figures in cells.items():

        def middle(key: str, figures: list[dict[str, Any]] = figures) -> float:
            return median(one[key] for one in figures)

        rows.append(
            [
                name,
                request,
                str(connections),
                f"{part:.0%}",
                number(middle("rate")),
                number(middle("items_per_s") / _inputs(request)),
                *(number(middle(key)) for key in ("p50_ms", "p99_ms", "p999_ms", "late_ms")),
                f"{middle('server_share'):.0%}",
                f"{middle('load_share'):.0%}",
                number(middle("rows_per_run")),
                str(sum(one["requests"] for one in figures)),
                str(sum(one["errors"] for one in figures)),
            ]
        )
    return table(head, rows)


def _inputs(request: str) -> int:
    return 1 if request == "unary" else int(request.removeprefix("batch "))


def _notes(cells: dict[Cell, list[dict[str, Any]]]) -> list[str]:
    notes = [
        "* p99.9 of fewer than 1000 requests is the slowest one. late: 99 % of the calls left at most so much after "
        f"they were due; from {_LATE_MS:g} ms on the generator lacked CPU, and the latencies hold that too."
    ]
    for (name, request, connections, part), figures in cells.items():
        problems = {problem for one in figures for problem in one["problems"]}
        if problems:
            notes.append(f"* ERRORS, {name}, {request} at {connections}, {part:.0%}: {'; '.join(sorted(problems))}.")
    return notes


def _chart(cells: dict[Cell, list[dict[str, Any]]]) -> str:
    groups: dict[str, dict[str, float]] = {}
    for (name, request, connections, part), figures in cells.items():
        if request == "unary":
            line = groups.setdefault(f"{name} {connections}", {})
            line[f"p50 at {part:.0%}"] = median(one["p50_ms"] for one in figures)
            line[f"p99 at {part:.0%}"] = median(one["p99_ms"] for one in figures)
    return charts.bars("Unary requests at a fixed rate, by model and connections", "ms", groups)
