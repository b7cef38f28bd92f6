"""`python -m bench.gpu`: raw ceilings, JPEG to concepts as served, server against offline, GPU memory, in one run.

Made for one NVIDIA H200 with 16 cores, and for a host without a network: everything is written or carried there.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.common import number, table, write
from bench.cpu import Cpus, choose_cpus
from bench.generator import Job, generate
from bench.gpu import raw
from bench.gpu.subjects import MODELS, PRECISIONS, TEXTS, Subject, gib, subject
from bench.load import Figures, Load, Request, prepare
from bench.server import serving
from bench.workload import ROOT, Shape, Workload

PARTS = ("raw", "served", "server", "memory")
P99_MS = 15.0
"""Limit for the server scenario: that of MLPerf Inference for ResNet-50 (mlcommons/inference_policies)."""

CLOSED = ((1, 64), (1, 256), (32, 16), (128, 8))
"""Inputs of a request, connections."""

_STEPS = 6
_MIXED_TEXTS = (1, 3, 9, 30, 80, 200, 500)
_MIXED_PICTURES = (1, 2, 3, 5, 8, 13, 32, 100)


@dataclass(slots=True)
class Results:
    """All figures of a run."""

    facts: dict[str, Any]
    raw: dict[str, dict[str, Any]] = field(default_factory=dict)
    served: list[dict[str, Any]] = field(default_factory=list)
    server: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ceiling(self, subject: Subject) -> tuple[float, float]:
        """Items/s of the best way to feed the model from the host, and of decoding."""
        figures = self.raw[str(subject)]
        best = max(rate for way, rates in figures["ways"].items() if way != "resident" for rate in rates.values())
        return best, figures["decode"]


class Bench:
    """One run, within its time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begun = time.monotonic()
        usable = len(os.sched_getaffinity(0))
        self.cpus: Cpus = choose_cpus(max(1, usable - max(1, usable // 4)))
        self.seconds = 0.3 if options.quick else options.seconds
        self.settings = f'[engine]\ndevice = "{options.device}"\n[limits]\nrequest_timeout_s = 60.0\n'
        self.results = Results(_facts(self.cpus, options.device))

    def run(self) -> None:
        """All parts for which there is time; the raw figures first, as the others stand on them."""
        subjects = [subject(model, precision) for model in self.options.models for precision in self.options.precisions]
        for each in subjects:
            self.say(f"raw {each}")
            self.results.raw[str(each)] = raw.measure(
                each, self.cpus.server, self.options.device, self.options.batches, self.seconds
            )
        for each in subjects:
            if {"served", "server"} & set(self.options.parts):
                self._in_time(f"served {each}", lambda each=each: self._served(each))  # type: ignore[misc]
        if "memory" in self.options.parts:
            self._in_time("memory", lambda: self._memory(subjects[0]))

    def say(self, sentence: str) -> None:
        """On the terminal, with the seconds since the begin."""
        print(f"{time.monotonic() - self.begun:6.0f} s  {sentence}", flush=True)

    @property
    def left_s(self) -> float:
        """Until the run must be over."""
        return self.begun + float(self.options.limit) - time.monotonic()

    def _in_time(self, what: str, part: Callable[[], None]) -> None:
        if self.left_s < 30:
            self.results.notes.append(f"{what}: left out, the time of {self.options.limit:g} s is over")
            return
        self.say(what)
        try:
            part()
        except (RuntimeError, OSError) as error:  # the other parts' figures are still worth having
            self.results.notes.append(f"{what}: failed: {' '.join(str(error).split())[:500]}")

    def _served(self, each: Subject) -> None:
        """JPEG in, concepts out, over TLS: closed loops, then the search for the highest rate within the limit."""
        best, decode = self.results.ceiling(each)
        answers = self.results.raw[str(each)]["answers"]
        with (
            serving(each.workload.bundle, self.cpus.server, settings=self.settings) as server,
            tempfile.TemporaryDirectory() as folder,
        ):
            load = Load(server, self.cpus.load)
            offline = 0.0
            for inputs, connections in CLOSED:
                request = prepare(each.workload, Shape(inputs), answers, Path(folder))
                figures = load.closed(request, connections, 3 * self.seconds)
                offline = max(offline, figures.items_per_s)
                row = {"subject": str(each), "inputs": inputs, "connections": connections, "gpu_gib": _used_gib()}
                self.results.served.append(row | {"raw": best, "decode": decode} | figures.as_dict())
            if "server" in self.options.parts:
                self._server(each, load, prepare(each.workload, Shape(1), answers, Path(folder)), offline)

    def _server(self, each: Subject, load: Load, request: Request, offline: float) -> None:
        """Bisect for the highest rate of single pictures at which 99 % are answered within the limit, none wrongly."""
        good: Figures | None = None
        low, high = 0.0, offline
        tried = []
        for _ in range(2 if self.options.quick else _STEPS):
            rate = (low + high) / 2 if low or tried else 0.8 * high
            if self.left_s < 15 or rate < 1:
                break
            figures = load.open(request, 64, rate, max(2.0, 3 * self.seconds))
            held = figures.p99_ms <= P99_MS and not figures.errors and figures.items_per_s >= 0.97 * rate
            tried.append({"rate": rate, "p99_ms": figures.p99_ms, "late_ms": figures.late_ms, "held": held})
            if held:
                low, good = rate, figures
            else:
                high = rate
        self.results.server.append(
            {
                "subject": str(each),
                "offline": offline,
                "server": low,
                "ratio": low / offline if offline else 0.0,
                "figures": good.as_dict() if good else None,
                "tried": tried,
            }
        )

    def _memory(self, pictures: Subject) -> None:
        """Requests of many lengths and sizes, one after the other in every order; the GPU's memory meanwhile."""
        wanted = 2_000 if self.options.quick else 100_000
        with (
            serving([pictures.workload.bundle, TEXTS], self.cpus.server, settings=self.settings) as server,
            tempfile.TemporaryDirectory() as name,
        ):
            bodies = _mixed(pictures.workload, Path(name))
            before, samples = server.counters(), [_used_gib()]
            done = 0
            wrong: dict[str, int] = {}
            while done < wanted and self.left_s > 12:
                job = Job(server.target(), tuple(map(str, bodies)), 64, min(5.0, self.left_s - 10))
                outcome = generate(job, self.cpus.load)
                for problem, count in outcome.problems.items():
                    wrong[problem] = wrong.get(problem, 0) + count
                done = server.counters().since(before).succeeded
                samples.append(_used_gib())
            self.results.memory = {
                "requests": done,
                "wanted": wanted,
                "wrong": wrong,
                "gpu_gib": samples,
                "resident_mib": round(server.memory_mib()),
            }


def _mixed(pictures: Workload, folder: Path) -> list[Path]:
    """Files of requests: so many pictures, texts of so many words, in an order that mixes them."""
    files = []
    sentences = Workload(TEXTS.name, "", TEXTS, tuple("k-means " * words for words in _MIXED_TEXTS), "text")
    for place, count in enumerate(_MIXED_PICTURES):
        file = folder / f"pictures-{count}"
        file.write_bytes(pictures.request(Shape(count)))
        files.append((place * 7 % 8, file))
    for place, count in enumerate(_MIXED_PICTURES):
        file = folder / f"texts-{count}"
        file.write_bytes(sentences.request(Shape(count)))
        files.append((place * 5 % 8, file))
    for place, words in enumerate(_MIXED_TEXTS):
        one = Workload(TEXTS.name, "", TEXTS, ("k-means " * words,), "text")
        file = folder / f"words-{words}"
        file.write_bytes(one.request(Shape(1)))
        files += [(index, file) for index in range(place % 3, 8, 3)]
    return [file for _, file in sorted(files, key=lambda entry: entry[0])]


def _used_gib() -> float:
    """Of all GPUs that we see; 0 without NVML."""
    from appliance.engine import gpu

    return gib(sum((each.memory_total or 0) - (each.memory_free or 0) for each in gpu.devices()))


def _facts(cpus: Cpus, device: str) -> dict[str, Any]:
    """What somebody must know to compare; nothing that names the machine or its folders."""
    from appliance.engine import gpu
    from appliance.engine.session import version

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "gpus": [f"{each.name}, {gib(each.memory_total):g} GiB" for each in gpu.devices()],
        "driver": gpu.driver_version(),
        "onnxruntime": version(),
        "python": platform.python_version(),
        "server_and_raw_cpus": len(cpus.server),
        "load_cpus": len(cpus.load),
        "shared": cpus.shared,
    }


# ---- text ------------------------------------------------------------------------------------------------------------


def render(results: Results) -> str:
    """Everything as Markdown whose tables are readable as they are."""
    facts = results.facts
    lines = [
        f"# GPU, {facts['date']}",
        "",
        f"* {'; '.join(facts['gpus']) or 'no GPU'}, driver {facts['driver'] or 'unknown'}, device {facts['device']}.",
        f"* {facts['server_and_raw_cpus']} CPUs for the daemon and the raw figures, {facts['load_cpus']} for the load"
        + ("; THE SAME ONES: the load takes from the server." if facts["shared"] else "."),
        f"* onnxruntime {facts['onnxruntime']}, Python {facts['python']}.",
        "",
        "## Raw: items a second by batch",
        "",
        _raw_table(results),
        "",
        *(f"* {way}: {text}." for way, text in raw.WAYS.items()),
        *(f"* {name}: {note}." for name, figures in results.raw.items() for note in figures["notes"]),
    ]
    if results.served:
        lines += ["", "## Served: JPEG to concepts over TLS, closed loop", "", _served_table(results), ""]
        lines += ["* of both: items/s to min(decode, raw), raw being the best way to feed the model. The bar is 0.85."]
    if results.server:
        lines += ["", f"## Server against offline, p99 ≤ {P99_MS:g} ms", "", _server_table(results.server), ""]
        lines += ["* Single pictures at a fixed rate over 64 connections; latency from when due. Goal: 0.80."]
    if results.memory:
        lines += ["", "## GPU memory over mixed shapes", "", *_memory_text(results.memory)]
    problems = {problem for row in results.served for problem in row["problems"]}
    lines += ["", *(f"* ERRORS: {problem}." for problem in sorted(problems)), *(f"* {note}." for note in results.notes)]
    return "\n".join(lines)


def _raw_table(results: Results) -> str:
    tables = [rates for figures in results.raw.values() for rates in figures["ways"].values()]
    batches = sorted({int(batch) for rates in tables for batch in rates})
    rows = []
    for name, figures in results.raw.items():
        for way, rates in figures["ways"].items():
            rows.append([name, way, *(number(rates[str(batch)]) if str(batch) in rates else "" for batch in batches)])
        rows.append([name, "decode", number(figures["decode"]), *[""] * (len(batches) - 1)])
    return table(["model", "way", *map(str, batches)], rows)


def _served_table(results: Results) -> str:
    head = ["model", "inputs", "conns", "items/s", "of raw", "of both", "p50 ms", "p99 ms", "rows/run", "server CPUs"]
    rows = [
        [
            row["subject"],
            str(row["inputs"]),
            str(row["connections"]),
            number(row["items_per_s"]),
            f"{row['items_per_s'] / row['raw']:.2f}",
            f"{row['items_per_s'] / min(row['raw'], row['decode']):.2f}",
            *(number(row[key]) for key in ("p50_ms", "p99_ms", "rows_per_run", "server_share")),
            number(row["gpu_gib"]),
            str(row["errors"]),
        ]
        for row in results.served
    ]
    return table([*head, "GPU GiB", "errors"], rows)


def _server_table(rows: Sequence[dict[str, Any]]) -> str:
    return table(
        ["model", "offline/s", "server/s", "ratio", "p99 ms"],
        [
            [
                row["subject"],
                number(row["offline"]),
                number(row["server"]),
                f"{row['ratio']:.2f}",
                number(row["figures"]["p99_ms"]) if row["figures"] else "",
            ]
            for row in rows
        ],
    )


def _memory_text(memory: dict[str, Any]) -> list[str]:
    samples = memory["gpu_gib"]
    few = "" if memory["requests"] >= memory["wanted"] else f" (of {memory['wanted']}: the time was over)"
    return [
        f"* {memory['requests']} requests{few}, {sum(memory['wrong'].values())} more not answered rightly.",
        *(f"* ERRORS: {count} times {problem}." for problem, count in sorted(memory["wrong"].items())),
        f"* GPU: {samples[0]:g} GiB after the load, {max(samples):g} GiB at most, {samples[-1]:g} GiB at the end.",
        f"* The daemon's processes hold {memory['resident_mib']} MiB at the end.",
    ]


def main() -> None:
    """Measure, print, write."""
    bench = Bench(_arguments())
    try:
        bench.run()
    finally:  # what was measured before something failed is worth having
        text = render(bench.results)
        print(text)
        name = f"{datetime.now(UTC):%Y-%m-%d}-gpu{'-quick' if bench.options.quick else ''}"
        keep = ("facts", "raw", "served", "server", "memory", "notes")
        for file in write(bench.options.out, name, text, {key: getattr(bench.results, key) for key in keep}):
            print(f"written: {file.name}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)

    def names(text: str) -> tuple[str, ...]:
        return tuple(part for part in text.split(",") if part)

    parser.add_argument("--quick", action="store_true", help="short measurements, to see that it works")
    parser.add_argument("--device", default="gpu", help='engine.device; "cpu" tries the benchmark out')
    parser.add_argument("--parts", type=names, default=PARTS, help=f"of {','.join(PARTS)}; raw is always there")
    parser.add_argument("--models", type=names, default=("resnet50", "vit-b16"), help=f"of {','.join(MODELS)}")
    parser.add_argument("--precisions", type=names, default=PRECISIONS, help="of fp32,fp16")
    parser.add_argument("--batches", type=lambda text: [int(part) for part in names(text)], default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=1.0, help="of one raw figure; served ones take three times it")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for it all; what does not fit is left out")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
