"""CPU microseconds of the server for a request, stage by stage, and a flame graph of all its processes.

py-spy, in an environment of its own, samples all threads of all the daemon's processes. A sample belongs to the
innermost frame of ours in its stack, and so to a stage; it weighs what the kernel counts for its thread.
"""

import contextlib
import linecache
import re
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench import charts, flame
from bench.common import Bar, Run, number, of_workloads, parser, table
from bench.generator import Job, begin
from bench.peers.models import m1
from bench.peers.servers import install
from bench.peers.surfaces import SURFACES
from bench.server import Server, serving
from bench.workload import WORKLOADS, Shape, Workload

_RATE = 200
_LEAD_S = 3.0
_THREAD = re.compile(r"thread \((?P<id>\d+)\): ?(?P<name>.*)")
_ROOTS = re.compile(r".*/(site-packages/|python3\.\d+/|(?=appliance/))")
_WAITING = re.compile(r"\.wait\(|\.get\(block|sleep\(|\.acquire\(|\.join\(|work_queue\.get")
_FRAME = re.compile(r"(?P<function>.+) \((?P<file>[^():]+):?(?P<line>\d*)\)")

_REPLY = "reply: arrays to bytes"
_REPLY_SIDE = re.compile(r"(encode|answer|_squeezed) \(appliance/tasks/|appliance/api/replies\.py")
"""Whatever is called from there belongs to making the reply."""
_REPLY_BAR_US = 7.0

_STAGES = (
    ("wire: TLS, HTTP/2, gRPC", re.compile(r"appliance/wire/|ssl\.py")),
    ("caller: key, rights, limits", re.compile(r"appliance/api/(auth|limits|keys|context)\.py")),
    ("parse: message to questions", re.compile(r"appliance/api/(parsing|messages|questions|oip|kserve|values|arrays)")),
    ("api: the rest", re.compile(r"appliance/api/")),
    ("decode: inputs to rows", re.compile(r"appliance/media/|tokenizers|PIL/")),
    ("model: session.run", re.compile(r"appliance/engine/session\.py|onnxruntime")),
    ("batcher, plan, transport", re.compile(r"appliance/engine/")),
    ("tasks: the rest", re.compile(r"appliance/tasks/")),
    ("catalog", re.compile(r"appliance/catalog/")),
    ("metrics, memory budget, logs", re.compile(r"appliance/core/")),
    ("processes", re.compile(r"appliance/daemon/")),
)
_NONE = "loop, interpreter"


def main(arguments: list[str]) -> list[Bar]:
    """Measure, print, write."""
    made = of_workloads(parser("stages", __doc__, seconds=8.0, repeat=1), ("digits", "mlp", "minilm", "resnet50"))
    made.add_argument("--batch", type=int, default=1, help="inputs of a request; default 1")
    made.add_argument(
        "--door", choices=("clarifai", "kserve"), default="clarifai", help="kserve: mlp alone, ModelInfer"
    )
    made.add_argument("--connections", type=int, default=64, help="default 64")
    run = Run(made.parse_args(arguments))
    run.expect(len(run.options.models) * (run.seconds + 25))
    spy = str(install("pyspy", run.say).parent / "py-spy")
    shape = Shape(run.options.batch)
    run.part = f"{run.options.door}-{shape.inputs}"
    lines = run.head("CPU by stage", f"{shape.name} at {run.options.connections} connections, closed loop, TLS.")
    content: dict[str, Any] = {}
    drawn: dict[str, str] = {}
    stages: dict[str, dict[str, float]] = {}
    for name in run.options.models:
        workload = WORKLOADS[name]()
        stacks, cpu_us, rate = _sample(workload, shape, run, spy)
        by_stage, by_place = _sorted(stacks)
        total = sum(by_stage.values())
        rows = [
            [
                stage,
                f"{count / total:.1%}",
                number(cpu_us * count / total),
                number(cpu_us * count / total / shape.inputs),
            ]
            for stage, count in by_stage.most_common()
        ]
        places = [
            [place, f"{count / total:.1%}", number(cpu_us * count / total)] for place, count in by_place.most_common(20)
        ]
        lines += ["", f"## {workload.title}", "", f"{number(cpu_us)} µs for a request, {number(rate)} requests/s."]
        lines += ["", table(["stage", "share", "µs/request", "µs/item"], rows), "", "Where, the 20 dearest places:", ""]
        lines += [table(["function", "share", "µs/request"], places)]
        content[name] = {"cpu_us": cpu_us, "stages": dict(by_stage), "places": dict(by_place.most_common(60))}
        door = "-kserve" if run.options.door == "kserve" else ""
        drawn[f"flame-{name}-{shape.inputs}{door}"] = flame.draw(
            f"{name}, {shape.name}: {cpu_us:.0f} µs a request", stacks
        )
        stages[name] = {stage: 100 * count / total for stage, count in by_stage.items()}
        if shape.inputs == 128 and name == "digits":
            reply_us = cpu_us * by_stage[_REPLY] / total / shape.inputs
            met = reply_us <= _REPLY_BAR_US
            what = f"{name}, batch 128: CPU µs an output for making the reply (of {cpu_us / shape.inputs:.0f} in all)"
            lines += ["", run.bar(what, f"≤ {_REPLY_BAR_US:g}", f"{reply_us:.1f}", met)]
        run.say(name)
    drawn["shares"] = charts.bars("CPU time by stage", "per cent", stages)
    run.write("\n".join(lines), {"stages": content}, drawn)
    return run.bars


def record(
    server: Server, spy: str, seconds: float, cpus: tuple[int, ...], folder: Path
) -> dict[tuple[str, ...], float]:
    """Sample the daemon's processes for so many seconds. Returns: stack, its thread first → CPU seconds.

    The profiler takes some waiting threads for running ones; so samples of a line that waits are left out, and the
    others of a thread share what the kernel counted for it.
    """
    file = folder / "stacks"
    command = [
        spy,
        "record",
        "--pid",
        str(server.pid),
        "--subprocesses",
        "--threads",
        "--full-filenames",
        "--rate",
        str(_RATE),
    ]
    command += ["--format", "raw", "--duration", str(max(1, round(seconds))), "--output", str(file)]
    before = _thread_cpu(server)
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cpus)), *command], capture_output=True, text=True, check=False
    )
    after = _thread_cpu(server)
    if not file.exists():
        raise RuntimeError(f"py-spy failed: {done.stderr[-500:]}")
    threads: dict[str, Counter[tuple[str, ...]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        frames, _, count = line.rpartition(" ")
        names = [frame for frame in frames.split(";") if not frame.startswith("process ")]
        thread = _THREAD.fullmatch(names[0]) if names else None
        if thread and not _waits(names[-1]):
            stack = (thread["name"], *(_short(frame) for frame in names[1:]))
            threads.setdefault(thread["id"], Counter())[stack] += int(count)
    stacks: dict[tuple[str, ...], float] = {}
    for number_, used in after.items():
        used -= before.get(number_, 0.0)
        sampled = threads.get(number_) or Counter({("never seen running",): 1})
        whole = sum(sampled.values())
        for stack, count in sampled.items():
            stacks[stack] = stacks.get(stack, 0.0) + used * count / whole
    return stacks


def _waits(frame: str) -> bool:
    """Whether the innermost frame stands where a thread waits: by its line of source."""
    match = _FRAME.fullmatch(frame)
    line = linecache.getline(match["file"], int(match["line"])) if match and match["line"] else ""
    return bool(_WAITING.search(line))


def _thread_cpu(server: Server) -> dict[str, float]:
    """Thread → CPU seconds. Source: proc(5), schedstat: the first number, nanoseconds."""
    used = {}
    for pid in server.pids():
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # ended meanwhile
                used[task.parent.name] = int(task.read_text(encoding="ascii").split()[0]) / 1e9
    return used


def _sample(workload: Workload, shape: Shape, run: Run, spy: str) -> tuple[dict[tuple[str, ...], float], float, float]:
    """Stacks, CPU µs for a request, requests a second."""
    with (
        serving(workload.bundle, run.cpus.server, mode=run.mode, settings=run.settings) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        file = Path(folder) / "request"
        target, body = server.target(), workload.request(shape)
        if run.options.door == "kserve":
            target, body = server.target(SURFACES["v2"].path), SURFACES["v2"].request(m1(), workload.bundle.name)
        file.write_bytes(body)
        # The profiler takes seconds to start and to write; so the load goes on around it.
        clarifai, seconds = run.options.door == "clarifai", run.seconds + 2 * _LEAD_S
        job = Job(target, (str(file),), run.options.connections, seconds, clarifai=clarifai)
        running = begin(job, run.cpus.load[:1])
        time.sleep(_LEAD_S)
        began = time.time()
        stacks = record(server, spy, run.seconds, run.cpus.load, Path(folder))
        span = began, time.time()
        outcome = running.wait()
        if outcome.problems:
            run.say(f"ERRORS: {outcome.problems}")
        done = sum(span[0] <= outcome.begun + due + took < span[1] for due, took in outcome.moments)
        return stacks, sum(stacks.values()) / max(1, done) * 1e6, outcome.per_s


def _short(frame: str) -> str:
    """`function (path:line)` with the path from its package on."""
    match = _FRAME.fullmatch(frame)
    if not match:
        return frame
    path = _ROOTS.sub("", match["file"])
    return f"{match['function']} ({path}:{match['line']})" if match["line"] else f"{match['function']} ({path})"


def _sorted(stacks: dict[tuple[str, ...], float]) -> tuple["Counter[str]", "Counter[str]"]:
    """CPU time by stage and by place."""
    by_stage: Counter[str] = Counter()
    by_place: Counter[str] = Counter()
    for frames, count in stacks.items():
        stage, place = _NONE, frames[-1] if frames else "?"
        replying = any(_REPLY_SIDE.search(frame) for frame in frames)
        for frame in reversed(frames):
            found = next((name for name, pattern in _STAGES if pattern.search(frame)), None)
            if found is not None:
                stage, place = _REPLY if replying else found, frame
                break
        by_stage[stage] += count  # type: ignore[assignment]
        by_place[place] += count  # type: ignore[assignment]
    return by_stage, by_place
