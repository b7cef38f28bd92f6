"""What is printed and kept: facts about the machine, medians over the repetitions, tables, files."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.cpu import Cpus
from bench.load import Figures
from bench.workload import BATCHES, ROOT, Shape, Workload

_PACKAGES = ("grpcio", "onnxruntime", "protobuf", "numpy", "pillow", "uvloop", "clarifai-grpc")
_LIMITED = 0.9
"""Share of its CPU from which the load generator, and not the server, may be what the figure shows."""


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
    generator: str
    raw: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raw_rate(self, graph: str, batch: int) -> float:
        """Median items/s of a graph at a batch size."""
        return median(figures[graph][str(batch)]["items_per_s"] for figures in self.raw)

    @property
    def best_batch(self) -> int:
        """The batch size at which the bundle's own graph is fastest."""
        return max(BATCHES, key=lambda batch: self.raw_rate("plain", batch))

    def best_raw(self, repetition: int) -> dict[str, float]:
        """Speed of the bundle's own graph at its best batch size."""
        speed: dict[str, float] = self.raw[repetition]["plain"][str(self.best_batch)]
        return speed

    def ceiling(self, repetition: int) -> float:
        """Items/s when one core decodes and runs the model in turn, with nothing else to do."""
        decode = self.raw[repetition]["decode"]["items_per_s"]
        return 1 / (1 / self.best_raw(repetition)["items_per_s"] + 1 / decode)

    def of_raw(self, row: Row) -> float:
        """Served items/s to raw ones of the same repetition, the median over the repetitions."""
        return median(f.items_per_s / self.best_raw(i)["items_per_s"] for i, f in enumerate(row.repetitions))

    def of_raw_cpu(self, row: Row) -> float:
        """The same by CPU time: what the raw run takes for one item to what the server takes."""
        pairs = ((self.best_raw(i)["cpu_us"], f.server_us / row.shape.inputs) for i, f in enumerate(row.repetitions))
        return median(raw_us / served_us for raw_us, served_us in pairs)

    def of_ceiling(self, row: Row) -> float:
        """Served items/s to what decoding and running leave possible, the median over the repetitions."""
        return median(f.items_per_s / self.ceiling(i) for i, f in enumerate(row.repetitions))


def machine_facts(cpus: Cpus) -> dict[str, Any]:
    """What somebody must know to compare; nothing that names the machine or its folders."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "server_and_raw_on_cpu": cpus.server,
        "load_on_cpu": cpus.load,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "settings": {name: value for name, value in os.environ.items() if name.startswith("APPLIANCE_")},
    }


def render(facts: dict[str, Any], results: Sequence[Result], repeat: int, cpus: Cpus) -> str:
    """Everything as Markdown whose tables are also readable as they are."""
    parts = [_facts_text(facts, repeat, cpus)]
    for result in results:
        parts += [f"## {result.workload.title}", _raw_text(result), _served_text(result)]
        parts += [f"* {note}" for note in [*result.notes, *_warnings(result)]]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, name: str, text: str, facts: dict[str, Any], results: Sequence[Result]) -> list[Path]:
    """Write the Markdown, and every repetition's figures as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "workloads": [_as_dict(result) for result in results]}
    files = [folder / f"{name}.md", folder / f"{name}.json"]
    files[0].write_text(text, encoding="utf-8")
    files[1].write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return files


def _facts_text(facts: dict[str, Any], repeat: int, cpus: Cpus) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", *_PACKAGES))
    where = (
        f"ONE CPU only (number {cpus.server}): the load generator takes from the server, so served figures are too low"
        if cpus.shared
        else f"server and raw figures on CPU {cpus.server}, load generator on CPU {cpus.load}"
    )
    lines = [
        f"# Benchmark, {facts['date']}, commit {facts['commit']}",
        "",
        f"* {facts['cpu']}, {facts['cpus_usable']} of {facts['cpus']} CPUs usable; {where}.",
        f"* Load average at the start: {facts['load_average_at_start']}. What else ran is not subtracted.",
        f"* {versions}.",
        f"* Medians of up to {repeat} repetitions, raw and served in turns. TLS, one key, loopback, closed loop.",
    ]
    if facts["settings"]:
        lines.append("* Settings: " + ", ".join(f"{name}={value}" for name, value in facts["settings"].items()) + ".")
    return "\n".join(lines)


def _raw_text(result: Result) -> str:
    rows = [
        [
            str(batch),
            _number(result.raw_rate("plain", batch)),
            _number(result.raw_rate("wrapped", batch)),
            "best" if batch == result.best_batch else "",
        ]
        for batch in BATCHES
    ]
    decode = median(figures["decode"]["items_per_s"] for figures in result.raw)
    ceiling = median(result.ceiling(index) for index in range(len(result.raw)))
    return "\n".join(
        [
            "Raw ONNX Runtime, items/s:",
            "",
            _table(["batch", "plain graph", "wrapped graph", ""], rows),
            "",
            f"Decoding alone: {_number(decode)} images/s. Decoding and the best plain run in turns on this core, and "
            f"nothing else: {_number(ceiling)} items/s (the ceiling).",
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
                _number(row.median("items_per_s")),
                f"{result.of_raw(row):.3f}",
                f"{result.of_raw_cpu(row):.3f}",
                f"{result.of_ceiling(row):.3f}",
                _number(row.median("p50_ms")),
                _number(row.median("p99_ms")),
                _number(server_us),
                _number(server_us / row.shape.inputs),
                f"{row.median('server_share'):.0%}",
                f"{row.median('load_share'):.0%}",
                _number(row.median("rows_per_run")),
                str(sum(figures.requests for figures in row.repetitions)),
                str(row.errors),
            ]
        )
    return "\n".join([f"Served, load by {result.generator}:", "", _table(head, rows)])


def _warnings(result: Result) -> list[str]:
    notes = []
    for row in result.rows:
        name = f"{row.shape.name} at {row.connections}"
        problems = {problem for figures in row.repetitions for problem in figures.problems}
        if problems:
            notes.append(f"ERRORS, {name}: {'; '.join(sorted(problems))}. The figures of this row are worth nothing.")
        if row.median("load_share") > _LIMITED and row.median("server_share") < _LIMITED:
            notes.append(f"{name}: the load generator was busier than the server, which could have done more.")
    return notes


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        "name": result.workload.name,
        "title": result.workload.title,
        "generator": result.generator,
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
        "notes": [*result.notes, *_warnings(result)],
    }


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right."""
    widths = [max(len(line[index]) for line in [head, *rows]) for index in range(len(head))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [head, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


def _number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _commit() -> str:
    """The commit, and whether the product differs from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changed = _git("status", "--porcelain", "--", "appliance", "models", "bench")
    return f"{commit} with local changes" if changed else commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
