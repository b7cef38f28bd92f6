"""Load: closed loops over separate TLS connections, made by h2load or by grpcio, and what the server did under it."""

import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cpu import pin_to
from bench.server import Counters, Server
from bench.workload import METHOD, ROOT, Shape, Workload

GENERATORS = ("h2load", "grpcio")

_EDGE = 20
"""One part in so many of the replies is left out at each end of a measurement: connections open, and run dry."""

_GRPC_PREFIX = 5
"""Bytes before a message: compressed or not, and its length (gRPC over HTTP2, Length-Prefixed-Message)."""

_SIZE_TOLERANCE = 0.02
"""Replies to one request differ in length only by their time stamps."""

_PROCESS_TIMEOUT_S = 300.0
_DATA = re.compile(r"traffic: .*\((\d+)\) data")


@dataclass(frozen=True, slots=True)
class Request:
    """A request ready to be sent, and what must come back.

    Attributes:
        file: serialised message.
        framed: the same with gRPC's prefix, as h2load posts it.
        concepts: for each input the id of the best concept.
    """

    inputs: int
    file: Path
    framed: Path
    concepts: list[str]


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement.

    Attributes:
        items_per_s: inputs answered rightly.
        requests: replies that the rate and the latencies stand on.
        errors: replies that were not the right answer, or that did not come.
        server_us: CPU microseconds of all the server's processes for one request; opening connections is in it.
        server_share, load_share: how much of its CPU each side used.
        rows_per_run: inputs that shared a run of the model, on average.
        problems: sentence → count, for `errors`.
    """

    items_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    errors: int
    server_us: float
    server_share: float
    load_share: float
    rows_per_run: float
    problems: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def choose_generator(wanted: str, workload: Workload) -> str:
    """The generator to use. Raises: RuntimeError: h2load is asked for and not there."""
    present = shutil.which("h2load") is not None
    if wanted == "h2load" and not present:
        raise RuntimeError("h2load is not installed; Debian and Ubuntu have it in nghttp2-client.")
    if wanted == "auto":
        return workload.generator if present else "grpcio"
    return wanted


def prepare(workload: Workload, shape: Shape, concepts: list[str], folder: Path) -> Request:
    """Write a request's files into `folder`. Args: concepts: of the workload's pictures, in their order."""
    body = workload.request(shape)
    file, framed = folder / f"{workload.name}-{shape.inputs}", folder / f"{workload.name}-{shape.inputs}.framed"
    file.write_bytes(body)
    framed.write_bytes(b"\0" + len(body).to_bytes(4, "big") + body)
    best = [concepts[index % len(concepts)] for index in range(shape.inputs)]
    return Request(shape.inputs, file, framed, best)


class Load:
    """Sends one request over and over, and reads what it cost."""

    def __init__(self, server: Server, generator: str, cpu: int) -> None:
        """Args: cpu: where the generator runs."""
        self.generator = generator
        self._server = server
        self._cpu = cpu
        self._rates: dict[tuple[Path, int], float] = {}

    def measure(self, request: Request, connections: int, seconds: float) -> Figures:
        """Keep `connections` calls in flight for about so many seconds."""
        if self.generator == "grpcio":
            return self._by_grpcio(request, connections, seconds)
        rate = self._rates.get((request.file, connections))
        if rate is None:  # how many requests fill the time is found by a short run first
            rate = self._by_h2load(request, connections, 4 * connections).items_per_s / request.inputs
        figures = self._by_h2load(request, connections, max(2 * connections, round(rate * seconds)))
        self._rates[request.file, connections] = figures.items_per_s / request.inputs
        return figures

    def _by_grpcio(self, request: Request, connections: int, seconds: float) -> Figures:
        before = self._server.counters()
        samples = self._grpcio(request, connections, seconds)
        work = self._server.counters().since(before)
        problems = samples["problems"]
        errors = sum(problems.values())
        times = samples["times"]
        return _figures(request, times, len(times), errors, problems, work, samples["cpu_share"])

    def _by_h2load(self, request: Request, connections: int, count: int) -> Figures:
        """Send `count` requests, all of them answered before it returns.

        h2load looks at no message and no trailer, where a reply's status is. So one request is asked by grpcio first
        and its reply looked at in full; then the server's own count, and the length of the replies, tell of the rest.
        """
        first = self._grpcio(request, 1, 0.0)
        log = request.file.with_suffix(".log")
        log.unlink(missing_ok=True)  # h2load appends
        command = ["h2load", "--clients", str(connections), "--requests", str(count), "--max-concurrent-streams", "1"]
        command += ["--data", str(request.framed), "--log-file", str(log)]
        command += ["--header", "content-type: application/grpc", "--header", "te: trailers"]
        command += ["--header", f"authorization: Key {self._server.key}", f"https://{self._server.address}{METHOD}"]
        before, cpu_s = self._server.counters(), _children_s()
        output = self._run(command)
        work, cpu_s = self._server.counters().since(before), _children_s() - cpu_s
        rows = [line.split("\t") for line in log.read_text(encoding="ascii").splitlines()]
        times = [(int(start) / 1e6, int(took) / 1e6) for start, status, took in rows if status == "200"]
        received = sum(int(value) for value in _DATA.findall(output))
        expected = count * (first["reply_bytes"] + _GRPC_PREFIX)
        wrong_length = abs(received - expected) > _SIZE_TOLERANCE * expected
        problems = dict.fromkeys(first["problems"], count) | {
            "no HTTP status 200": count - len(times),
            "not counted as a success by the server": count - work.succeeded,
            f"replies of {received // count} bytes on average, not {expected // count}": count if wrong_length else 0,
        }
        problems = {sentence: number for sentence, number in problems.items() if number > 0}
        share = cpu_s / max(1e-9, _span(times))
        return _figures(request, times, count, max(problems.values(), default=0), problems, work, share)

    def _grpcio(self, request: Request, connections: int, seconds: float) -> dict[str, Any]:
        job = {
            "address": self._server.address,
            "ca": str(self._server.ca),
            "key": self._server.key,
            "request": str(request.file),
            "concepts": request.concepts,
            "connections": connections,
            "seconds": seconds,
        }
        samples: dict[str, Any] = json.loads(self._run([sys.executable, "-m", "bench.client"], json.dumps(job)))
        return samples

    def _run(self, command: list[str], text: str | None = None) -> str:
        done = subprocess.run(
            command,
            input=text,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            preexec_fn=pin_to(self._cpu),
            timeout=_PROCESS_TIMEOUT_S,
            check=True,
        )
        return done.stdout


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _figures(
    request: Request,
    times: list[Any],
    calls: int,
    errors: int,
    problems: dict[str, int],
    work: Counters,
    load_share: float,
) -> Figures:
    """Args: times: start and duration of each reply, seconds. calls: all that `work` was done for."""
    rate = _steady_rate(times)
    durations = sorted(duration for _, duration in times)
    server_us = work.cpu_s / calls * 1e6
    return Figures(
        items_per_s=rate * request.inputs * (1 - errors / calls),
        p50_ms=_quantile(durations, 50) * 1000,
        p99_ms=_quantile(durations, 99) * 1000,
        requests=len(times),
        errors=errors,
        server_us=server_us,
        server_share=server_us * rate / 1e6,
        load_share=load_share,
        rows_per_run=work.rows / max(1, work.runs),
        problems=problems,
    )


def _steady_rate(times: list[Any]) -> float:
    """Replies a second, without the first and the last part; of few replies all count, from the first one's start."""
    if not times:
        return 0.0
    ends = sorted(start + duration for start, duration in times)
    edge = len(ends) // _EDGE
    begun = ends[edge - 1] if edge else min(start for start, _ in times)
    return (len(ends) - 2 * edge) / max(1e-9, ends[-1 - edge] - begun)


def _span(times: list[tuple[float, float]]) -> float:
    return max((s + d for s, d in times), default=0.0) - min((s for s, _ in times), default=0.0)


def _quantile(ordered: list[float], percent: int) -> float:
    """The value that so many percent do not exceed: the nearest rank, so a value that did happen."""
    rank = -(-percent * len(ordered) // 100)
    return ordered[max(1, rank) - 1] if ordered else 0.0
