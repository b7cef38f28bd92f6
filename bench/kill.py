"""kill -9 of engine processes under load: every call must end with a result or a status, and soon as before.

Two loads at a fixed rate, each call once (no retries): texts for MiniLM, which take milliseconds each, and digits. In
each round a fresh daemon's engine is killed twice: a third crash in five minutes would rightly take the model out of
service. lost: calls that got neither a result nor a gRPC or API status.
"""

import contextlib
import os
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import charts
from bench.common import Bar, Run, number, parser, table
from bench.generator import Job, Outcome, begin, quantile
from bench.server import Server, serving
from bench.workload import WORKLOADS, Shape

ENGINE = "appliance.daemon.engine_process"
"""What the command line of an engine process holds."""
_KILLS = 2
_START_S = 60.0


@dataclass(slots=True)
class Side:
    """What became of one load. Attributes: gaps: seconds from a kill to the next result of a call made after it."""

    ends: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    latencies: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    first: list[tuple[float, float]] = field(default_factory=list)

    def add(self, outcome: Outcome, kills: list[float], length: float) -> None:
        """One round. Args: kills: when, seconds since the epoch. length: seconds of the load, the gap if none came."""
        self.ends.update(outcome.ends)
        self.lost += outcome.lost
        self.latencies += outcome.latencies
        for at in kills:
            after = [due + took for due, took in outcome.moments if outcome.begun + due > at]
            self.gaps.append(outcome.begun + min(after, default=length) - at)
        self.first = self.first or [(due, took * 1e3) for due, took in sorted(outcome.moments)]


def main(arguments: list[str]) -> list[Bar]:
    """Measure, print, write."""
    made = parser("kill", __doc__, seconds=15.0, repeat=5)
    made.set_defaults(mode="processes")
    made.add_argument("--rate", type=float, default=20.0, help="texts a second; ten times as many digits; default 20")
    run = Run(made.parse_args(arguments))
    run.expect(run.repeat * (3 * run.seconds + 25))
    sides = {"minilm": Side(), "digits": Side()}
    replaced: list[float] = []
    told = [_round(run, sides, replaced) for _ in range(run.repeat)]
    rows = []
    for name, side in sides.items():
        times = sorted(side.latencies)
        right = side.ends[""]
        cells = [name, str(side.ends.total()), str(right), str(side.ends.total() - right - side.lost), str(side.lost)]
        cells += [number(1e3 * quantile(times, percent)) for percent in (50, 99, 100)]
        rows.append([*cells, number(median(side.gaps)), number(max(side.gaps))])
    head = ["load", "calls", "results", "statuses", "lost", "p50 ms", "p99 ms", "slowest ms"]
    head += ["s to the next result", "at most"]
    lost = sum(side.lost for side in sides.values())
    lines = run.head("Killed engines", f"{len(replaced)} kills with SIGKILL, {_KILLS} a round. No retries.")
    lines += ["", table(head, rows), ""]
    lines += [f"* {name}: {end}, {n} times." for name, side in sides.items() for end, n in side.ends.items() if end]
    lines += [f"* Another engine process after {median(replaced):.2f} s (median), {max(replaced):.2f} s at most."]
    lines += [f"* The daemons' own requests_lost_total: {', '.join(told)}.", ""]
    lines += [run.bar(f"lost calls in {len(replaced)} kills of an engine under load", "= 0", str(lost), not lost)]
    loads = {name: {"ends": dict(side.ends), "gaps_s": side.gaps} for name, side in sides.items()}
    series = {name: side.first[:: max(1, len(side.first) // 2000)] for name, side in sides.items()}
    drawn = charts.lines("Latency in a round of two kills", "s", "ms", series, log_y=True)
    run.write("\n".join(lines), {"replaced_s": replaced, "loads": loads, "lost": lost}, {"latency": drawn})
    return run.bars


def _round(run: Run, sides: dict[str, Side], replaced: list[float]) -> str:
    """A daemon, both loads, two kills. Returns: how many requests the daemon itself says that it lost."""
    workloads = [WORKLOADS[name]() for name in sides]
    bundles = [workload.bundle for workload in workloads]
    with (
        serving(bundles, run.cpus.server, mode=run.mode, settings=run.settings) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        if not engines(server):
            raise RuntimeError(f"the daemon has no process of {ENGINE}; is it in the mode 'processes'?")
        loads = []
        for workload, rate in zip(workloads, (run.options.rate, 10 * run.options.rate), strict=True):
            file = Path(folder) / workload.name
            file.write_bytes(workload.request(Shape(1)))
            length = (_KILLS + 1) * run.seconds
            job = Job(server.target(), (str(file),), 8, length, rate=rate, warm_up=2.0, reconnect=True, wait_s=90.0)
            loads.append(begin(job, run.cpus.load[:1]))
        time.sleep(3.0)
        kills = []
        for _ in range(_KILLS):
            time.sleep(0.7 * run.seconds)
            kills.append(time.time())
            replaced.append(_kill(server))
            run.say(f"killed; another engine after {replaced[-1]:.2f} s")
            time.sleep(0.3 * run.seconds)
        for name, load in zip(sides, loads, strict=True):
            sides[name].add(load.wait(), kills, (_KILLS + 1) * run.seconds)
        return _lost_by_the_daemon(server)


def engines(server: Server) -> list[int]:
    """The daemon's engine processes."""
    found = []
    for pid in server.pids():
        with contextlib.suppress(OSError):
            if ENGINE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _kill(server: Server) -> float:
    """Kill the engine; seconds until there is another process. Raises: RuntimeError: none comes."""
    before, begun = engines(server), time.monotonic()
    for pid in before:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while time.monotonic() < begun + _START_S:
        if any(pid not in before for pid in engines(server)):
            return time.monotonic() - begun
        time.sleep(0.01)
    raise RuntimeError(f"no engine came in {_START_S:.0f} s")


def _lost_by_the_daemon(server: Server) -> str:
    for line in server.metrics().splitlines():
        if line.startswith("inference_appliance_requests_lost_total"):
            return line.rsplit(" ", 1)[1]
    return "not told"
