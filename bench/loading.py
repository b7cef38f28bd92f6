"""Latency of light requests while a heavy model loads, to the same when all is quiet, in the same run.

Digits at a fixed rate. Again and again the bundle of a heavy model appears among the daemon's models, is loaded, and
goes away. Calls that were due while the log says it was loading stand against those due in the quiet before. Each
load is as the first one of a model: what an earlier load left in the cache is removed.
"""

import re
import shutil
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench import charts
from bench.common import Bar, Run, number, parser, table
from bench.generator import Job, Outcome, begin, quantile
from bench.server import Server, serving
from bench.workload import WORKLOADS, Shape

BAR = 2.0
_LOADED_S = 300.0


def main(arguments: list[str]) -> list[Bar]:
    """Measure, print, write."""
    made = parser("loading", __doc__, seconds=8.0, repeat=5)
    made.add_argument("--heavy", default="vit-b16", help="the model that is loaded; default vit-b16")
    made.add_argument("--again", action="store_true", help="what was measured and wrapped at the first load is kept")
    made.add_argument("--rate", type=float, default=200.0, help="digits a second; default 200")
    run = Run(made.parse_args(arguments))
    run.expect(run.repeat * (run.seconds + 40) + 60)
    light, heavy = WORKLOADS["digits"](), WORKLOADS[run.options.heavy]()
    rounds: list[dict[str, Any]] = []
    with (
        serving(light.bundle, run.cpus.server, mode=run.mode, settings=run.settings) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        file = Path(folder) / "digits"
        file.write_bytes(light.request(Shape(1)))
        takes = _load(server, heavy.bundle, heavy.bundle.name)  # the first one, whose files are not in memory yet
        _unload(server, heavy.bundle.name)
        for _ in range(run.repeat):
            length = run.seconds + 5 + 1.5 * (takes[1] - takes[0])
            job = Job(server.target(), (str(file),), 8, length, rate=run.options.rate, warm_up=2.0)
            running = begin(job, run.cpus.load[:1])
            time.sleep(2.5 + run.seconds)
            quiet_until = time.time()
            if not run.options.again:
                shutil.rmtree(server.folder / "state/cache", ignore_errors=True)
            takes = _load(server, heavy.bundle, heavy.bundle.name)
            outcome = running.wait()
            rounds.append(_round(outcome, quiet_until, takes))
            _unload(server, heavy.bundle.name)
            run.say(f"p99 quiet {rounds[-1]['quiet']['p99']:.2f} ms, loading {rounds[-1]['loading']['p99']:.2f} ms")
    rows = [
        [
            str(index + 1),
            number(one["load_s"]),
            *(number(one[part][name]) for part in ("quiet", "loading") for name in ("p50", "p99", "worst")),
            f"{one['ratio']:.2f}",
            str(one["errors"]),
        ]
        for index, one in enumerate(rounds)
    ]
    ratio = median(one["ratio"] for one in rounds)
    head = ["round", "load s", "quiet p50 ms", "p99", "worst", "loading p50 ms", "p99", "worst", "p99 ratio", "errors"]
    lines = run.head(
        "Light requests while a heavy model loads",
        f"digits at {run.options.rate:g}/s; {heavy.title}."
        + (" Loaded again: with what the cache holds." if run.options.again else ""),
    )
    what = f"p99 of light requests while {heavy.name} loads, to quiet"
    lines += ["", table(head, rows), "", run.bar(what, f"≤ {BAR:g}", f"{ratio:.2f}", ratio <= BAR)]
    names = ("quiet p50", "quiet p99", "loading p50", "loading p99")
    groups = {
        str(index + 1): {name: one[name.split()[0]][name.split()[1]] for name in names}
        for index, one in enumerate(rounds)
    }
    drawn = charts.bars("Light requests, quiet and while a heavy model loads", "ms", groups)
    run.write("\n".join(lines), {"rounds": rounds, "ratio": ratio}, {"latency": drawn})
    return run.bars


def _load(server: Server, bundle: Path, name: str) -> tuple[float, float]:
    """Let the bundle appear; when loading began and ended, seconds since the epoch. Raises: RuntimeError: it failed."""
    log = server.folder / "daemon.log"
    seen = len(log.read_text(encoding="utf-8"))
    aside = server.folder / f"aside-{name}"
    shutil.copytree(bundle, aside)
    aside.rename(server.folder / "models" / name)
    give_up = time.monotonic() + _LOADED_S
    while time.monotonic() < give_up:
        text = log.read_text(encoding="utf-8")[seen:]
        ready = re.search(rf"^(\S+) \w+ +ready after ([\d.]+) s.*/{name} ", text, re.MULTILINE)
        if ready:
            ended = datetime.fromisoformat(ready[1]).timestamp()
            return ended - float(ready[2]), ended
        if "failed" in text:
            raise RuntimeError(f"{name} was not loaded: {text}")
        time.sleep(0.05)
    raise RuntimeError(f"{name} was not loaded in {_LOADED_S:.0f} s")


def _unload(server: Server, name: str) -> None:
    shutil.rmtree(server.folder / "models" / name)
    give_up = time.monotonic() + 60
    while name in server.page("/readyz?verbose") and time.monotonic() < give_up:
        time.sleep(0.2)
    time.sleep(1.0)


def _round(outcome: Outcome, quiet_until: float, takes: tuple[float, float]) -> dict[str, Any]:
    quiet = sorted(took for due, took in outcome.moments if outcome.begun + due < quiet_until - 0.5)
    loading = sorted(took for due, took in outcome.moments if takes[0] <= outcome.begun + due < takes[1])
    parts: dict[str, Any] = {
        name: {
            "p50": quantile(values, 50) * 1e3,
            "p99": quantile(values, 99) * 1e3,
            "worst": max(values, default=0.0) * 1e3,
            "calls": len(values),
        }
        for name, values in (("quiet", quiet), ("loading", loading))
    }
    ratio = parts["loading"]["p99"] / max(1e-9, parts["quiet"]["p99"])
    return parts | {"load_s": takes[1] - takes[0], "ratio": ratio, "errors": sum(outcome.problems.values())}
