"""Memory over a million mixed requests: does it grow after the warm-up.

Kinds and sizes are mixed: pictures, tensors of many lengths, texts, requests of many inputs, and such as are refused.
The memory is what all the daemon's processes hold (anonymous and shared pages, each counted once; not those of program
files, whose share hangs on what else runs), read every few seconds, always under the same number of connections. The
daemon is left alone first, for what it measures of its models while idle. The first tenth of the requests is the
warm-up: the median over the fifth after it stands against that over the last fifth.
"""

import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from bench import charts
from bench.common import Bar, Run, number, parser, table
from bench.generator import Job, begin
from bench.server import rest, serving
from bench.wire.process import memory_bytes
from bench.workload import WORKLOADS, Shape

BAR = 0.01
_WARM_UP, _WINDOW = 0.10, 0.20
_CONNECTIONS = 16
_BODIES = 400
"""Different requests, sent in turns by each connection's process."""
_SHIFT_S = 20.0
"""Load is made in pieces of so many seconds, each with connections and requests of its own."""


def main(arguments: list[str]) -> list[Bar]:
    """Measure, print, write."""
    made = parser("memory", __doc__, seconds=2.0, repeat=1)
    made.add_argument("--requests", type=int, default=0, help="default 1000000; 20000 with --quick")
    made.add_argument("--heavy", type=int, default=250, help="one request in so many is for MiniLM; 0: none")
    run = Run(made.parse_args(arguments))
    wanted = run.options.requests or (20_000 if run.options.quick else 1_000_000)
    run.expect(wanted / 1500)
    names = ["digits", "mlp", *(["minilm"] if run.options.heavy else [])]
    samples: list[tuple[float, float, int]] = []
    parts: dict[str, list[float]] = {}
    with (
        serving(
            [WORKLOADS[name]().bundle for name in names], run.cpus.server, mode=run.mode, settings=run.settings
        ) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        settled = server.memory_mib()
        run.say(f"at rest {settled:.1f} MiB")
        begun = time.monotonic()
        done, shift, ends = 0, 0, {"answered": 0, "refused": 0, "lost": 0}
        while done < wanted:
            files = _write_bodies(Path(folder), shift, run.options.heavy)
            job = Job(server.target(), files, _CONNECTIONS, _SHIFT_S if not run.options.quick else 3.0)
            running = begin(job, run.cpus.load)
            until = time.monotonic() + job.seconds
            while time.monotonic() < until:
                time.sleep(min(run.seconds, max(0.05, until - time.monotonic())))
                counters = server.counters()
                done = counters.succeeded + counters.failed
                samples.append((time.monotonic() - begun, server.memory_mib(), done))
            outcome = running.wait()
            ends["answered"] += outcome.right
            ends["lost"] += outcome.lost
            ends["refused"] += sum(outcome.problems.values()) - outcome.lost
            shift += 1
            if shift % 5 == 1:
                run.say(f"{done} requests, {samples[-1][1]:.1f} MiB")
        rest(server.pid)
        idle = server.memory_mib()
        for pid in server.pids():
            line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            parts[f"{pid} {_last(line)}"] = [memory_bytes([pid], files=False) / 2**20]
    total = samples[-1][2]

    def between(low: float, high: float) -> float:
        return median([mib for _, mib, count in samples if low * total <= count <= high * total] or [samples[-1][1]])

    first, last = between(_WARM_UP, _WARM_UP + _WINDOW), between(1 - _WINDOW, 1)
    growth = last / first - 1
    rows = [
        [f"{part:.0%}", number(between(max(0.0, part - 0.05), part))]
        for part in (0.05, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0)
    ]
    lines = run.head("Memory over time", f"{total:,} requests in {samples[-1][0]:.0f} s, mixed kinds and sizes.")
    lines += ["", table(["of the requests", "MiB (median)"], rows), ""]
    lines += [f"After the warm-up {first:.1f} MiB, at the end {last:.1f} MiB: {growth:+.2%}."]
    lines += [f"At rest, before the first request {settled:.1f} MiB, after the last {idle:.1f} MiB."]
    lines += [f"Calls: {json.dumps(ends)}. Refused ones are meant to be.", ""]
    lines += [
        run.bar(
            f"memory after {total:,} mixed requests, to the end of the warm-up",
            "< +1 %",
            f"{growth:+.2%}",
            growth < BAR,
        )
    ]
    lines += ["", *(f"* process {name}: {values[0]:.1f} MiB" for name, values in parts.items())]
    chart = charts.lines("Memory of the daemon", "requests", "MiB", {"held": [(n, mib) for _, mib, n in samples]})
    content = {"samples": samples, "growth": growth, "ends": ends, "processes": parts}
    run.write("\n".join(lines), content, {"time": chart})
    return run.bars


def _last(arguments: list[bytes]) -> str:
    words = [word.decode(errors="replace") for word in arguments if word]
    return next((word for word in words if word.startswith("appliance")), words[-1] if words else "?")


def _write_bodies(folder: Path, shift: int, heavy: int) -> tuple[str, ...]:
    """Requests of this shift, other ones than in the one before."""
    files = []
    for index, body in enumerate(_bodies(random.Random(shift), heavy)):
        file = folder / f"{index:04}"
        file.write_bytes(body)
        files.append(str(file))
    return tuple(files)


def _bodies(chance: random.Random, heavy: int) -> Iterator[bytes]:
    mlp, minilm = WORKLOADS["mlp"], WORKLOADS["minilm"]
    pictures = WORKLOADS["digits"]()
    for index in range(_BODIES):
        kind = chance.random()
        if heavy and index % heavy == heavy - 1:
            yield minilm().request(Shape(chance.choice((1, 1, 2))))
        elif kind < 0.60:
            yield pictures.request(Shape(1))
        elif kind < 0.66:
            yield pictures.request(Shape(chance.randint(2, 24)))
        elif kind < 0.67:
            yield pictures.request(Shape(128))
        elif kind < 0.90:
            rows = chance.choice((1, 1, 2, 3, 7, 8, 32, 100))
            values = np.random.default_rng(index).random((rows, 64), np.float32)
            array = resources_pb2.NDArray(buffer=values.tobytes(), shape=[rows, 64], dtype="float32")
            yield _request("mlp", resources_pb2.Data(ndarray=array))
        elif kind < 0.95:
            limits = resources_pb2.OutputInfo(
                output_config=resources_pb2.OutputConfig(max_concepts=chance.randint(1, 200))
            )
            yield _request("digits", pictures.data(pictures.inputs[0]), limits)
        elif kind < 0.97:
            yield _request("digits", pictures.data(chance.randbytes(chance.randint(1, 30_000))))  # no picture
        elif kind < 0.99:
            yield _request("nothing-of-that-name", resources_pb2.Data())
        else:
            yield _request("mlp", mlp().data(chance.randbytes(12)))  # too short a row


def _request(model: str, data: resources_pb2.Data, output: "resources_pb2.OutputInfo | None" = None) -> bytes:
    ids = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")
    request = service_pb2.PostModelOutputsRequest(user_app_id=ids, model_id=model)
    request.inputs.add(data=data)
    if output is not None:
        request.model.model_version.output_info.CopyFrom(output)
    return bytes(request.SerializeToString())
