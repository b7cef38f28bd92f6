"""Load from one cheap process: closed loops, or a fixed rate whose latency counts from when a call should have left.

`python -m bench.generator` reads a job (JSON) on its standard input and writes what happened (JSON) to its standard
output. `generate` does that for each CPU it is given, and adds up.
"""

import array
import base64
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cpu import pin_to
from bench.h2 import Connection, Pending, Poller, Target
from bench.workload import ROOT

_SPARE_S = 150.0
_KEPT = 64
"""Replies that are kept whole, at most, of each kind of message."""
_SUCCESS = b"\x08\x90\x4e"
"""How the status of a Clarifai reply begins when its code is 10000: field 1, varint."""
_UNANSWERED = ("connection", "stream reset", "refused by GOAWAY", "no ")
"""How the ends of calls begin that got neither a result nor a status."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to send.

    Attributes:
        bodies: files of messages; calls take them in turn.
        connections: opened before anything is measured.
        seconds: that calls are begun for, after `warm_up` seconds whose calls are not counted.
        rate: calls a second over all connections, whether replies come or not; 0: a closed loop, one call in flight
            on each connection.
        idle: connections more that say nothing.
        clarifai: whether replies must hold Clarifai's success code, 10000.
        reconnect: whether a lost connection is opened again.
        wait_s: how long the last replies are waited for; what has not come by then is lost.
    """

    target: Target
    bodies: tuple[str, ...]
    connections: int
    seconds: float
    rate: float = 0.0
    warm_up: float = 0.0
    idle: int = 0
    clarifai: bool = True
    reconnect: bool = False
    wait_s: float = 60.0


@dataclass(slots=True)
class Outcome:
    """What happened.

    Attributes:
        latencies: seconds of each right reply, by when it was due; sorted.
        ends: "" → right replies, sentence → how many calls ended so, or never.
        lateness: seconds by which calls left after they were due, sorted: the generator's own fault, or the window's.
        begun, ended: seconds since the epoch: first call due, last reply.
        cpu_s: of the generator.
        replies: kind of message → some replies to it.
        moments: for each right reply when it was due (seconds after `begun`) and its latency; in the order of replies.
        bytes: of all right replies.
    """

    latencies: list[float] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    lateness: list[float] = field(default_factory=list)
    begun: float = 0.0
    ended: float = 0.0
    cpu_s: float = 0.0
    replies: dict[int, list[bytes]] = field(default_factory=dict)
    moments: list[tuple[float, float]] = field(default_factory=list)
    bytes: int = 0

    @property
    def right(self) -> int:
        """Calls answered rightly."""
        return self.ends.get("", 0)

    @property
    def problems(self) -> dict[str, int]:
        """All other ends."""
        return {sentence: number for sentence, number in self.ends.items() if sentence}

    @property
    def lost(self) -> int:
        """Calls that got neither a result nor a status."""
        return sum(number for sentence, number in self.ends.items() if sentence.startswith(_UNANSWERED))

    @property
    def per_s(self) -> float:
        """Right replies a second."""
        return self.right / max(1e-9, self.ended - self.begun)

    def ms(self, percent: float) -> float:
        """Latency that so many percent do not exceed, in milliseconds."""
        return quantile(self.latencies, percent) * 1e3


def quantile(ordered: list[float], percent: float) -> float:
    """The nearest rank, so a value that did happen."""
    if not ordered:
        return 0.0
    rank = -int(-percent * len(ordered) // 100)
    return ordered[min(len(ordered), max(1, rank)) - 1]


def generate(job: Job, cpus: tuple[int, ...]) -> Outcome:
    """Load from a process on each of these CPUs, the work shared out among them.

    Raises: RuntimeError: a process failed.
    """
    return begin(job, cpus).wait()


class Running:
    """Load that goes on in processes of its own."""

    def __init__(self, processes: "list[subprocess.Popen[str]]", limit_s: float) -> None:
        self._processes = processes
        self._limit_s = limit_s

    def wait(self) -> Outcome:
        """What came of it. Raises: RuntimeError: a process failed."""
        parts = []
        for process in self._processes:
            text, _ = process.communicate(timeout=self._limit_s)
            if process.returncode:
                raise RuntimeError(f"the load generator ended with {process.returncode}")
            parts.append(json.loads(text))
        return _merged(parts)


def begin(job: Job, cpus: tuple[int, ...]) -> Running:
    """As `generate`, without waiting."""
    count = min(len(cpus), job.connections)
    processes = []
    for index in range(count):
        share = asdict(job) | {
            "connections": job.connections // count + (index < job.connections % count),
            "idle": job.idle // count + (index < job.idle % count),
            "rate": job.rate / count,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.generator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            preexec_fn=pin_to(cpus[index]),
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(share))
        process.stdin.close()
        process.stdin = None
        processes.append(process)
    return Running(processes, job.warm_up + job.seconds + job.wait_s + _SPARE_S)


def _merged(parts: list[dict[str, Any]]) -> Outcome:
    whole = Outcome(begun=min(part["begun"] for part in parts), ended=max(part["ended"] for part in parts))
    ends: Counter[str] = Counter()
    for part in parts:
        dues, times = _floats(part["dues"]), _floats(part["latencies"])
        shift = part["begun"] - whole.begun
        whole.moments += [(due + shift, took) for due, took in zip(dues, times, strict=True)]
        whole.latencies += times
        whole.lateness += _floats(part["lateness"])
        whole.cpu_s += part["cpu_s"]
        whole.bytes += part["bytes"]
        ends.update(part["ends"])
        for kind, replies in part["replies"].items():
            whole.replies.setdefault(int(kind), []).extend(base64.b64decode(reply) for reply in replies)
    whole.latencies.sort()
    whole.lateness.sort()
    whole.ends = dict(ends)
    return whole


def _floats(text: str) -> list[float]:
    values = array.array("d")
    values.frombytes(base64.b64decode(text))
    return values.tolist()


# ---- the process -----------------------------------------------------------------------------------------------------


class _Generator:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._bodies = [Path(file).read_bytes() for file in job.bodies]
        self._poller = Poller()
        self._sent = 0
        self._counted_from = self._until = 0.0
        self._last = 0.0
        self._ends: Counter[str] = Counter()
        self._dues, self._latencies, self._lateness = (array.array("d") for _ in range(3))
        self._replies: dict[int, list[bytes]] = {}
        self._bytes = 0
        self._connections: list[Connection] = []
        self._idle: list[Connection] = []

    def run(self) -> dict[str, Any]:
        job = self._job
        self._connections = [self._connect() for _ in range(job.connections)]
        self._idle = [self._connect() for _ in range(job.idle)]
        for _ in range(3):  # settings and acknowledgements
            self._poller.turn(0.02)
        begun = time.perf_counter()
        self._counted_from, self._until = begun + job.warm_up, begun + job.warm_up + job.seconds
        cpu = _cpu_s()
        if job.rate:
            self._at_rate(begun)
        else:
            for connection in self._connections:
                self._next(connection, time.perf_counter())
            while time.perf_counter() < self._until:
                self._poller.turn(self._until - time.perf_counter())
        give_up = time.perf_counter() + job.wait_s
        while any(connection.in_flight for connection in self._connections) and time.perf_counter() < give_up:
            self._poller.turn(min(0.1, give_up - time.perf_counter()))
        for connection in self._connections:
            for call in list(connection.unanswered()):
                if call.due >= self._counted_from:
                    self._ends["no reply: LOST"] += 1
        epoch = time.time() - time.perf_counter()
        return {
            "dues": base64.b64encode(self._dues.tobytes()).decode(),
            "latencies": base64.b64encode(self._latencies.tobytes()).decode(),
            "lateness": base64.b64encode(self._lateness.tobytes()).decode(),
            "ends": dict(self._ends),
            "begun": epoch + self._counted_from,
            "ended": epoch + max(self._last, self._counted_from),
            "cpu_s": _cpu_s() - cpu,
            "bytes": self._bytes,
            "replies": {
                kind: [base64.b64encode(reply).decode() for reply in replies] for kind, replies in self._replies.items()
            },
        }

    def _connect(self) -> Connection:
        # Replies are kept whole on the first connection only: the rest are judged by how they begin.
        keep = not self._connections
        connection = Connection(self._job.target, self._bodies, self._done, keep=keep)
        self._poller.watch(connection)
        return connection

    def _at_rate(self, begun: float) -> None:
        """Call number k is due at begun + k / rate, whatever became of the others."""
        due, step, turn = begun, 1 / self._job.rate, 0
        while due < self._until:
            now = time.perf_counter()
            while due <= now and due < self._until:
                connection = self._connections[turn]
                if not connection.open and self._job.reconnect:
                    connection = self._connections[turn] = self._connect()
                self._start(connection, due)
                self._sent += 1
                due = begun + self._sent * step
                turn = (turn + 1) % len(self._connections)
            self._poller.turn(due - time.perf_counter())

    def _start(self, connection: Connection, due: float) -> None:
        if not connection.open:
            self._ends["connection lost before"] += 1
            return
        connection.start(self._sent % len(self._bodies), due)
        self._poller.look(connection)

    def _next(self, connection: Connection, now: float) -> None:
        self._sent += 1
        self._start(connection, now)

    def _done(self, connection: Connection, call: Pending, problem: str) -> None:
        now = time.perf_counter()
        head = call.body[0] if call.body else call.head
        if not problem and self._job.clarifai and _SUCCESS not in head[:24]:
            problem = _status(head)
        if call.due >= self._counted_from and (call.due < self._until):
            self._ends[problem] += 1
            if not problem:
                self._dues.append(call.due - self._counted_from)
                self._latencies.append(now - call.due)
                self._lateness.append(call.sent - call.due)
                self._bytes += call.size
                self._last = now
        if call.body is not None and not problem:
            kept = self._replies.setdefault(call.kind, [])
            if len(kept) < _KEPT:
                kept.append(b"".join(call.body)[5:])
        if not self._job.rate and now < self._until:
            if connection.open:
                self._next(connection, now)
            elif self._job.reconnect and connection in self._connections:
                self._replace(connection, now)

    def _replace(self, connection: Connection, now: float) -> None:
        fresh = self._connect()
        self._connections[self._connections.index(connection)] = fresh
        self._next(fresh, now)


def _status(head: bytes) -> str:
    """The status code of a Clarifai reply, from its first bytes: prefix, field 1, its length, field 1, varint."""
    place = 6
    while place < len(head) and head[place] & 0x80:
        place += 1
    code = shift = 0
    for byte in head[place + 2 : place + 6]:
        code |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            break
    return f"status {code}"


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Do the job on standard input."""
    import gc

    given = json.load(sys.stdin)
    given["target"]["headers"] = tuple(tuple(pair) for pair in given["target"]["headers"])
    job = Job(**(given | {"target": Target(**given["target"]), "bodies": tuple(given["bodies"])}))
    gc.freeze()
    json.dump(_Generator(job).run(), sys.stdout)


if __name__ == "__main__":
    main()
