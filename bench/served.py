"""Served against raw: closed loops over TLS connections, in turns with ONNX Runtime alone on the same CPUs."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import charts, ort
from bench.common import Bar, Run, number, numbers, of_workloads, parser, table
from bench.load import Figures, Load, ask, prepare
from bench.server import serving
from bench.workload import BATCHES, CONNECTIONS, WORKLOADS, Shape, Workload

BAR = 0.95
"""Served to raw items/s, of models that are nearly all of the work."""
_LIMITED = 0.9
"""CPUs from which the load generator, and not the server, may be what the figure shows."""
_MOST_IN_FLIGHT = 256
"""Heavy inputs at once: with more, a request takes many seconds and tells nothing more."""


@dataclass(frozen=True, slots=True)
class Row:
    """One served figure: a request shape at a number of connections, once for each repetition."""

    shape: Shape
    connections: int
    repetitions: list[Figures]

    def median(self, name: str) -> float:
        """The median of one of the figures."""
        return median(getattr(figures, name) for figures in self.repetitions)

    @property
    def errors(self) -> int:
        """In all repetitions together."""
        return sum(figures.errors for figures in self.repetitions)


@dataclass(slots=True)
class Result:
    """All figures of one workload; `raw` and each row's repetitions go together, index by index."""

    workload: Workload
    raw: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def raw_rate(self, graph: str, batch: int) -> float:
        """Median items/s of a graph at a batch size."""
        return median(figures[graph][str(batch)]["items_per_s"] for figures in self.raw)

    @property
    def best_batch(self) -> int:
        """The batch size at which the bundle's own graph is fastest."""
        return max(self.workload.batches, key=lambda batch: self.raw_rate("plain", batch))

    def best_raw(self, repetition: int) -> dict[str, float]:
        """Speed of the bundle's own graph at its best batch size."""
        speed: dict[str, float] = self.raw[repetition]["plain"][str(self.best_batch)]
        return speed

    def ceiling(self, repetition: int) -> float:
        """Items/s when the CPUs decode and run the model in turn, with nothing else to do."""
        decode = self.raw[repetition]["decode"]["items_per_s"]
        return 1 / (1 / self.best_raw(repetition)["items_per_s"] + 1 / decode)

    def of_raw(self, row: Row) -> float:
        """Served items/s to raw ones of the same repetition, the median over the repetitions."""
        return median(f.items_per_s / self.best_raw(i)["items_per_s"] for i, f in enumerate(row.repetitions))

    def of_raw_cpu(self, row: Row) -> float:
        """The same by CPU time: what the raw run takes for one item to what the server takes."""
        pairs = ((self.best_raw(i)["cpu_us"], f.server_us / row.shape.inputs) for i, f in enumerate(row.repetitions))
        return median(raw_us / max(1e-9, served_us) for raw_us, served_us in pairs)

    def of_ceiling(self, row: Row) -> float:
        """Served items/s to what decoding and running leave possible, the median over the repetitions."""
        return median(f.items_per_s / self.ceiling(i) for i, f in enumerate(row.repetitions))


def main(arguments: list[str]) -> list[Bar]:
    """Measure, print, write."""
    made = of_workloads(parser("served", __doc__, seconds=3.0), tuple(WORKLOADS))
    made.add_argument("--connections", type=numbers, default=CONNECTIONS, help="default 1,8,64")
    made.add_argument("--batches", type=numbers, default=BATCHES, help="inputs of a request; default 1,8,128")
    run = Run(made.parse_args(arguments))
    cells = sum(len(_cells(WORKLOADS[name](), run)) for name in run.options.models)
    run.expect(run.repeat * (cells * (run.seconds + 2) + 15 * len(run.options.models)) + 60)
    results = [_measure(WORKLOADS[name](), run) for name in run.options.models]
    lines = run.head("Served against raw", "Raw and served in turns. TLS, one key, loopback, closed loop.")
    for result in results:
        lines += ["", f"## {result.workload.title}", "", _raw_text(result), "", _served_text(result), ""]
        lines += [f"* {note}" for note in _notes(result)]
    heavy = [result for result in results if result.workload.heavy]
    if heavy:
        lines += ["", "## The bar: heavy models ≥ 0.95 of the best raw items/s", "", _bar_text(heavy, run)]
    run.write("\n".join(lines), {"workloads": [_as_dict(result) for result in results]}, {"ratio": _chart(results)})
    return run.bars


def _cells(workload: Workload, run: Run) -> list[tuple[Shape, int]]:
    """What is measured: heavy models with few connections when requests are large."""
    return [
        (shape, connections)
        for shape in workload.shapes(run.options.batches)
        for connections in run.options.connections
        if not workload.heavy or shape.inputs * connections <= _MOST_IN_FLIGHT or connections == 1
    ]


def _measure(workload: Workload, run: Run) -> Result:
    """Raw and served in turns."""
    result = Result(workload)
    with (
        serving(workload.bundle, run.cpus.server, mode=run.mode, settings=run.settings) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        load = Load(server, run.cpus.load)
        for repetition in range(run.repeat):
            begun = time.monotonic()
            figures = ort.measure(workload, run.cpus.server, run.seconds / 4)
            expected = figures.pop("answers")
            result.raw.append(figures)
            rate = max(speed["items_per_s"] for speed in figures["plain"].values())
            for shape, connections in _cells(workload, run):
                request = prepare(workload, shape, expected, Path(folder))
                if not repetition:
                    ask(server, request, run.cpus.load)
                seconds = max(run.seconds, connections * shape.inputs / rate)  # each connection gets its turn
                _row(result, shape, connections).repetitions.append(
                    load.closed(request, connections, seconds, workload.generator)
                )
            run.say(f"{workload.name}: repetition {repetition + 1} took {time.monotonic() - begun:.0f} s")
    return result


def _row(result: Result, shape: Shape, connections: int) -> Row:
    for row in result.rows:
        if row.shape == shape and row.connections == connections:
            return row
    row = Row(shape, connections, [])
    result.rows.append(row)
    return row


def _raw_text(result: Result) -> str:
    rows = [
        [
            str(batch),
            number(result.raw_rate("plain", batch)),
            number(result.raw_rate("wrapped", batch)),
            "best" if batch == result.best_batch else "",
        ]
        for batch in result.workload.batches
    ]
    decode = median(figures["decode"]["items_per_s"] for figures in result.raw)
    ceiling = median(result.ceiling(index) for index in range(len(result.raw)))
    return "\n".join(
        [
            "Raw ONNX Runtime, items/s:",
            "",
            table(["batch", "plain graph", "wrapped graph", ""], rows),
            "",
            f"Decoding alone: {number(decode)} inputs/s. Decoding and the best plain run in turns on these CPUs, and "
            f"nothing else: {number(ceiling)} items/s (the ceiling).",
        ]
    )


def _served_text(result: Result) -> str:
    head = ["request", "conns", "items/s", "of raw", "by CPU", "of ceiling", "p50 ms", "p99 ms"]
    head += ["server µs/request", "µs/item", "server CPU", "load CPU", "rows/run", "requests", "errors"]
    rows = []
    for row in result.rows:
        server_us = row.median("server_us")
        rows.append(
            [
                row.shape.name,
                str(row.connections),
                number(row.median("items_per_s")),
                f"{result.of_raw(row):.3f}",
                f"{result.of_raw_cpu(row):.3f}",
                f"{result.of_ceiling(row):.3f}",
                number(row.median("p50_ms")),
                number(row.median("p99_ms")),
                number(server_us),
                number(server_us / row.shape.inputs),
                f"{row.median('server_share'):.0%}",
                f"{row.median('load_share'):.0%}",
                number(row.median("rows_per_run")),
                str(sum(figures.requests for figures in row.repetitions)),
                str(row.errors),
            ]
        )
    return "\n".join([f"Served, load by {result.workload.generator}:", "", table(head, rows)])


def _bar_text(results: list[Result], run: Run) -> str:
    rows = []
    for result in results:
        row = max(result.rows, key=result.of_raw)
        best, by_cpu = result.of_raw(row), max(result.of_raw_cpu(row) for row in result.rows)
        verdict = "met" if best >= BAR else "met by CPU" if by_cpu >= BAR else "MISSED"
        what = f"{result.workload.name} served, to the best raw items/s (by CPU {by_cpu:.2f})"
        run.bar(what, f"≥ {BAR}", f"{best:.3f}", best >= BAR)
        rows.append(
            [result.workload.name, f"{row.shape.name} at {row.connections}", f"{best:.3f}", f"{by_cpu:.3f}", verdict]
        )
    return table(["model", "best served", "of raw", "best by CPU", ""], rows)


def _notes(result: Result) -> list[str]:
    notes = []
    for row in result.rows:
        name = f"{row.shape.name} at {row.connections}"
        problems = {problem for figures in row.repetitions for problem in figures.problems}
        if problems:
            notes.append(f"ERRORS, {name}: {'; '.join(sorted(problems))}. The figures of this row are worth nothing.")
        if row.median("load_share") > _LIMITED and row.median("server_share") < _LIMITED:
            notes.append(f"{name}: the load generator was busier than the server, which could have done more.")
    return notes


def _chart(results: list[Result]) -> str:
    groups = {
        result.workload.name: {
            f"{row.shape.name} at {row.connections}": result.of_raw(row)
            for row in result.rows
            if result.of_raw(row) > 0
        }
        for result in results
    }
    return charts.bars("Served items/s to the best raw ones", "served / raw", groups, line=BAR)


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        "name": result.workload.name,
        "title": result.workload.title,
        "generator": result.workload.generator,
        "best_batch": result.best_batch,
        "raw": result.raw,
        "served": [
            {
                "request": row.shape.name,
                "inputs": row.shape.inputs,
                "connections": row.connections,
                "of_raw": round(result.of_raw(row), 4),
                "of_raw_cpu": round(result.of_raw_cpu(row), 4),
                "of_ceiling": round(result.of_ceiling(row), 4),
                "repetitions": [figures.as_dict() for figures in row.repetitions],
            }
            for row in result.rows
        ],
        "notes": _notes(result),
    }
