"""One request sent over and over, in a closed loop or at a fixed rate: what the caller saw, and what the server did."""

import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import answers
from bench.answers import Expected
from bench.cpu import pin_to
from bench.generator import Job, Outcome, generate, quantile
from bench.server import Counters, Server
from bench.workload import METHOD, ROOT, Shape, Workload

_EDGE = 20
"""One part in so many of h2load's replies is left out at each end: connections open, and run dry."""
_GRPC_PREFIX = 5
"""Bytes before a message: compressed or not, and its length (gRPC over HTTP2, Length-Prefixed-Message)."""
_SIZE_TOLERANCE = 0.02
"""Replies to one request differ in length only by their time stamps."""
_TIMEOUT_S = 300.0
_DATA = re.compile(r"traffic: .*\((\d+)\) data")


@dataclass(frozen=True, slots=True)
class Request:
    """A request ready to be sent, and what must come back.

    Attributes:
        file: serialised message.
        framed: the same with gRPC's prefix, as h2load posts it.
        expected: for each input.
    """

    inputs: int
    file: Path
    framed: Path
    expected: Sequence[Expected]


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement.

    Attributes:
        items_per_s: inputs answered rightly.
        requests: right replies.
        errors: replies that were not right, or that did not come.
        server_us: CPU microseconds of all the server's processes for one request; opening connections is in it.
        server_share, load_share: CPUs that each side kept busy.
        rows_per_run: inputs that shared a run of the model, on average.
        rate: requests a second that were to be sent; 0: a closed loop.
        late_ms: what 99 % of the calls left later than they were due at most; in a closed loop nothing is due.
        problems: sentence → count, for `errors`.
    """

    items_per_s: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    requests: int
    errors: int
    server_us: float
    server_share: float
    load_share: float
    rows_per_run: float
    rate: float = 0.0
    late_ms: float = 0.0
    problems: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def prepare(workload: Workload, shape: Shape, expected: Sequence[Expected], folder: Path) -> Request:
    """Write a request's files into `folder`. Args: expected: of the workload's inputs, in their order."""
    body = workload.request(shape)
    file, framed = folder / f"{workload.name}-{shape.inputs}", folder / f"{workload.name}-{shape.inputs}.framed"
    file.write_bytes(body)
    framed.write_bytes(b"\0" + len(body).to_bytes(4, "big") + body)
    return Request(shape.inputs, file, framed, [expected[index % len(expected)] for index in range(shape.inputs)])


class Load:
    """Sends one request over and over, and reads what it cost."""

    def __init__(self, server: Server, cpus: tuple[int, ...]) -> None:
        """Args: cpus: where the generator runs."""
        self._server = server
        self._cpus = cpus
        self._rates: dict[tuple[Path, int], float] = {}

    def closed(self, request: Request, connections: int, seconds: float, generator: str = "lean") -> Figures:
        """Keep `connections` calls in flight for about so many seconds. Args: generator: "lean", or "h2load"."""
        if generator == "h2load" and shutil.which("h2load"):
            return self._by_h2load(request, connections, seconds)
        return self._by_generator(request, Job(self._server.target(), (str(request.file),), connections, seconds))

    def open(self, request: Request, connections: int, rate: float, seconds: float) -> Figures:
        """Send `rate` requests a second over `connections` connections, whether replies come or not."""
        warm_up = min(1.0, seconds / 4)
        files = (str(request.file),)
        job = Job(self._server.target(), files, connections, seconds, rate=rate, warm_up=warm_up)
        return self._by_generator(request, job)

    def _by_generator(self, request: Request, job: Job) -> Figures:
        before = self._server.counters()
        outcome = generate(job, self._cpus)
        work = self._server.counters().since(before)
        problems = dict(outcome.problems)
        for reply in outcome.replies.get(0, []):
            if wrong := answers.problem(reply, request.expected):
                problems[wrong] = problems.get(wrong, 0) + 1
        return _figures(request, job, outcome, problems, work)

    def _by_h2load(self, request: Request, connections: int, seconds: float) -> Figures:
        """h2load looks at no message and no trailer, where a reply's status is. So one request is asked by our own
        generator first and its reply looked at in full; then the server's own count, and the length of the replies,
        tell of the rest. How many requests fill the time is found by a short run."""
        rate = self._rates.get((request.file, connections))
        if rate is None:
            rate = self._shot(request, connections, 4 * connections).items_per_s / request.inputs
        figures = self._shot(request, connections, max(2 * connections, round(rate * seconds)))
        self._rates[request.file, connections] = figures.items_per_s / request.inputs
        return figures

    def _shot(self, request: Request, connections: int, count: int) -> Figures:
        first = generate(Job(self._server.target(), (str(request.file),), 1, 0.0, warm_up=0.001), self._cpus[:1])
        replies = first.replies.get(0, [])
        length = len(replies[0]) if replies else 0
        wrong = answers.problem(replies[0], request.expected) if replies else "no reply"
        log = request.file.with_suffix(".log")
        log.unlink(missing_ok=True)  # h2load appends
        threads = min(len(self._cpus), connections)
        command = ["h2load", "--clients", str(connections), "--requests", str(count), "--max-concurrent-streams", "1"]
        command += ["--threads", str(threads), "--data", str(request.framed), "--log-file", str(log)]
        command += ["--header", "content-type: application/grpc", "--header", "te: trailers"]
        command += ["--header", f"authorization: Key {self._server.key}", f"https://{self._server.address}{METHOD}"]
        before, cpu_s = self._server.counters(), _children_s()
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            preexec_fn=pin_to(*self._cpus),
            timeout=_TIMEOUT_S,
            check=True,
        )
        work, cpu_s = self._server.counters().since(before), _children_s() - cpu_s
        rows = [line.split("\t") for line in log.read_text(encoding="ascii").splitlines()]
        times = [(int(start) / 1e6, int(took) / 1e6) for start, status, took in rows if status == "200"]
        received = sum(int(value) for value in _DATA.findall(done.stdout))
        wanted = count * (length + _GRPC_PREFIX)
        wrong_length = abs(received - wanted) > _SIZE_TOLERANCE * wanted
        problems = {
            wrong: count if wrong else 0,
            "no HTTP status 200": count - len(times),
            "not counted as a success by the server": count - work.succeeded,
            f"replies of {received // count} bytes on average, not {wanted // count}": count if wrong_length else 0,
        }
        problems = {sentence: times_ for sentence, times_ in problems.items() if times_ > 0}
        errors = max(problems.values(), default=0)
        rate, durations = _steady_rate(times), sorted(took for _, took in times)
        server_us = work.cpu_s / count * 1e6
        return Figures(
            items_per_s=rate * request.inputs * (1 - errors / count),
            p50_ms=quantile(durations, 50) * 1e3,
            p99_ms=quantile(durations, 99) * 1e3,
            p999_ms=quantile(durations, 99.9) * 1e3,
            requests=len(times),
            errors=errors,
            server_us=server_us,
            server_share=server_us * rate / 1e6,
            load_share=cpu_s / max(1e-9, _span(times)),
            rows_per_run=work.rows / max(1, work.runs),
            problems=problems,
        )


def _figures(request: Request, job: Job, outcome: Outcome, problems: dict[str, int], work: Counters) -> Figures:
    wall = job.warm_up + max(1e-9, outcome.ended - outcome.begun)
    answered = max(1, work.succeeded)  # those of the warm-up too, as in the CPU time
    rate = _middle(outcome) if not job.rate else outcome.per_s
    return Figures(
        items_per_s=rate * request.inputs,
        p50_ms=outcome.ms(50),
        p99_ms=outcome.ms(99),
        p999_ms=outcome.ms(99.9),
        requests=outcome.right,
        errors=sum(problems.values()),
        server_us=work.cpu_s / answered * 1e6,
        server_share=work.cpu_s / wall,
        load_share=outcome.cpu_s / wall,
        rows_per_run=work.rows / max(1, work.runs),
        rate=job.rate,
        late_ms=quantile(outcome.lateness, 99) * 1e3 if job.rate else 0.0,
        problems=problems,
    )


def _middle(outcome: Outcome) -> float:
    return _steady_rate([(due, took) for due, took in outcome.moments])


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _steady_rate(times: Sequence[tuple[float, float]]) -> float:
    """Replies a second, without the first and the last part; of few replies all count, from the first one's start."""
    if not times:
        return 0.0
    ends = sorted(start + duration for start, duration in times)
    edge = len(ends) // _EDGE
    begun = ends[edge - 1] if edge else min(start for start, _ in times)
    return (len(ends) - 2 * edge) / max(1e-9, ends[-1 - edge] - begun)


def _span(times: Sequence[tuple[float, float]]) -> float:
    return max((s + d for s, d in times), default=0.0) - min((s for s, _ in times), default=0.0)


def ask(server: Server, request: Request, cpus: tuple[int, ...]) -> None:
    """One request, its answer looked at. Raises: RuntimeError: it is not right."""
    outcome = generate(Job(server.target(), (str(request.file),), 1, 0.05, warm_up=0.0), cpus[:1])
    replies = outcome.replies.get(0, [])
    wrong = answers.problem(replies[0], request.expected) if replies else str(outcome.problems or "no reply")
    if wrong:
        raise RuntimeError(f"a first request is not answered rightly: {wrong}")
