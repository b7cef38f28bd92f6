"""kill -9 of engine processes under load: every call must end with a result or a status, and soon as before.

Two loads at a fixed rate, each call once (no retries): texts for MiniLM, which the engine runs, and digits. Every few
seconds the engine process is killed. lost: calls that got neither a result nor a gRPC or API status.
"""

import contextlib
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

from bench import charts
from bench.common import Bar, Run, number, parser, table
from bench.generator import Job, begin
from bench.server import Server, serving
from bench.workload import WORKLOADS, Shape

ENGINE = "appliance.daemon.engine_process"
"""What the command line of an engine process holds."""
_START_S = 60.0


def main(arguments: list[str]) -> list[Bar]:
    """Measure, print, write."""
    made = parser("kill", __doc__, seconds=8.0, repeat=10)
    made.set_defaults(mode="processes")
    made.add_argument("--rate", type=float, default=20.0, help="texts a second; ten times as many digits; default 20")
    run = Run(made.parse_args(arguments))
    run.expect(run.repeat * run.seconds + 60)
    length = (run.repeat + 1) * run.seconds
    kills: list[dict[str, float]] = []
    workloads = [WORKLOADS["minilm"](), WORKLOADS["digits"]()]
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
            job = Job(server.target(), (str(file),), 8, length, rate=rate, warm_up=1.0, reconnect=True, wait_s=90.0)
            loads.append(begin(job, run.cpus.load[:1]))
        time.sleep(3.0)
        for _ in range(run.repeat):
            time.sleep(max(0.5, run.seconds - 1))
            kills.append(_kill(server))
            run.say(f"killed; another engine after {kills[-1]['replaced_s']:.2f} s")
        outcomes = dict(zip([workload.name for workload in workloads], [load.wait() for load in loads], strict=True))
        requests_lost = _lost_by_the_daemon(server)
    rows, served = [], {}
    for name, outcome in outcomes.items():
        statuses = Counter({s: n for s, n in outcome.problems.items()})
        gaps = [_gap(outcome.begun, outcome.moments, kill["at"]) for kill in kills]
        served[name] = gaps
        rows.append(
            [
                name,
                str(sum(outcome.ends.values())),
                str(outcome.right),
                str(sum(statuses.values()) - outcome.lost),
                str(outcome.lost),
                number(outcome.ms(50)),
                number(outcome.ms(99)),
                number(1e3 * max(outcome.latencies, default=0.0)),
                number(median(gaps)),
                number(max(gaps)),
            ]
        )
    head = ["load", "calls", "results", "statuses", "lost", "p50 ms", "p99 ms", "slowest ms"]
    head += ["s to the next result", "at most"]
    lost = sum(outcome.lost for outcome in outcomes.values())
    replaced = [kill["replaced_s"] for kill in kills]
    lines = run.head("Killed engines", f"{len(kills)} kills. No retries; {ENGINE} is killed with SIGKILL.")
    lines += ["", table(head, rows), ""]
    lines += [f"* {name}: {sentence}, {n} times." for name, o in outcomes.items() for sentence, n in o.problems.items()]
    lines += [f"* Another engine process after {median(replaced):.2f} s (median), {max(replaced):.2f} s at most."]
    lines += [f"* The daemon's own requests_lost_total: {requests_lost}."]
    what = f"lost calls in {len(kills)} kills of an engine under load"
    lines += ["", run.bar(what, "= 0", str(lost), not lost)]
    content = {
        "kills": kills,
        "loads": {name: {"ends": o.ends, "gaps_s": served[name], "p99_ms": o.ms(99)} for name, o in outcomes.items()},
        "lost": lost,
    }
    chart = {
        name: [(due, took * 1e3) for due, took in sorted(o.moments)[:: max(1, len(o.moments) // 2000)]]
        for name, o in outcomes.items()
    }
    drawn = charts.lines("Latency over time, engine killed again and again", "s", "ms", chart, log_y=True)
    run.write("\n".join(lines), content, {"latency": drawn})
    return run.bars


def engines(server: Server) -> list[int]:
    """The daemon's engine processes."""
    found = []
    for pid in server.pids():
        with contextlib.suppress(OSError):
            if ENGINE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _kill(server: Server) -> dict[str, float]:
    """Kill the engine, and wait for another. Raises: RuntimeError: none comes."""
    before = engines(server)
    at, begun = time.time(), time.monotonic()
    for pid in before:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while time.monotonic() < begun + _START_S:
        if any(pid not in before for pid in engines(server)):
            return {"at": at, "replaced_s": time.monotonic() - begun, "killed": len(before)}
        time.sleep(0.01)
    raise RuntimeError(f"no engine came in {_START_S:.0f} s")


def _gap(begun: float, moments: list[tuple[float, float]], at: float) -> float:
    """Seconds from a kill to the first result of a call that was due after it."""
    after = [due + took for due, took in moments if begun + due > at]
    return begun + min(after) - at if after else float("inf")


def _lost_by_the_daemon(server: Server) -> str:
    for line in server.metrics().splitlines():
        if line.startswith("inference_appliance_requests_lost_total"):
            return line.rsplit(" ", 1)[1]
    return "not told"
