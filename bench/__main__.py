"""`python -m bench`: served against raw, for a tiny model and a heavy one, in one run on one machine."""

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench import raw, report
from bench.cpu import Cpus, choose_cpus
from bench.load import GENERATORS, Load, choose_generator, prepare
from bench.report import Result, Row
from bench.server import serving
from bench.workload import ROOT, WORKLOADS, Shape, Workload

_LIMIT_S = 600.0
"""A whole run takes no longer, as far as leaving out repetitions can help."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asks for: seconds for each figure, repetitions, and when to begin no more of these."""

    seconds: float
    repeat: int
    load: str
    give_up_at: float


def main() -> None:
    """Measure, print, write."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))  # unwinds, so the daemon is stopped too
    try:
        _run(_arguments())
    except RuntimeError as error:
        sys.exit(f"bench: {error}")


def _run(arguments: argparse.Namespace) -> None:
    seconds = arguments.seconds or (0.5 if arguments.quick else 3.0)
    repeat = arguments.repeat or (1 if arguments.quick else 3)
    settings = Settings(seconds, repeat, arguments.load, time.monotonic() + _LIMIT_S)
    names = [arguments.only] if arguments.only else list(WORKLOADS)
    cpus = choose_cpus()
    facts = report.machine_facts(cpus)
    results = [_measure(WORKLOADS[name](), settings, cpus) for name in names]
    text = report.render(facts, results, repeat, cpus)
    print(text)
    what = "-".join(["served", *([arguments.only] if arguments.only else []), *(["quick"] if arguments.quick else [])])
    for file in report.write(arguments.out, f"{datetime.now(UTC):%Y-%m-%d}-{what}", text, facts, results):
        print(f"written: {file.name}")


def _measure(workload: Workload, settings: Settings, cpus: Cpus) -> Result:
    """Raw and served in turns, as often as asked for and time allows."""
    result = Result(workload, choose_generator(settings.load, workload))
    if result.generator != workload.generator:
        result.notes.append(f"The generator meant for this model is {workload.generator}; this is {result.generator}.")
    with serving(workload.bundle, cpus.server) as server, tempfile.TemporaryDirectory() as folder:
        load = Load(server, result.generator, cpus.load)
        longest = 0.0
        for repetition in range(settings.repeat):
            begun = time.monotonic()
            if repetition and begun + longest > settings.give_up_at:
                result.notes.append(f"Stopped after {repetition} repetitions: the time for a run is over.")
                break
            _repeat(result, load, settings, cpus, Path(folder))
            longest = max(longest, time.monotonic() - begun)
            print(f"{workload.name}: repetition {repetition + 1} took {time.monotonic() - begun:.0f} s", flush=True)
    return result


def _repeat(result: Result, load: Load, settings: Settings, cpus: Cpus, folder: Path) -> None:
    """All figures once: raw, then served."""
    workload = result.workload
    figures = raw.measure(workload, cpus.server, settings.seconds / 4)
    result.raw.append(figures)
    rate = max(speed["items_per_s"] for speed in figures["plain"].values())
    for shape in workload.shapes:
        request = prepare(workload, shape, figures["concepts"], folder)
        for connections in shape.connections:
            seconds = max(settings.seconds, connections * shape.inputs / rate)  # each connection gets its turn
            _row(result, shape, connections).repetitions.append(load.measure(request, connections, seconds))


def _row(result: Result, shape: Shape, connections: int) -> Row:
    for row in result.rows:
        if row.shape == shape and row.connections == connections:
            return row
    row = Row(shape, connections, [])
    result.rows.append(row)
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", choices=list(WORKLOADS), help="measure this model alone")
    parser.add_argument("--quick", action="store_true", help="one short repetition, to see that it works")
    parser.add_argument("--seconds", type=float, help="length of one measurement; default 3")
    parser.add_argument("--repeat", type=int, help="repetitions; default 3")
    parser.add_argument(
        "--load",
        choices=["auto", *GENERATORS],
        default="auto",
        help="load generator; auto: h2load for digits where it is installed, else grpcio",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
