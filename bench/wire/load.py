"""Load by h2load: one request sent over and over, every reply counted, the server's CPU time for each."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.cpu import pin_to
from bench.wire.process import cpu_ns

_EDGE = 20
"""One part in so many of the replies is left out at each end: connections open, and run dry."""
_SAMPLE_S = 0.005
_FEWEST_SAMPLES = 5
_GRPC_PREFIX = 5
"""Bytes before a message: compressed or not, and its length (gRPC over HTTP2, Length-Prefixed-Message)."""
_TIMEOUT_S = 120.0
_FIRST_COUNT = 100
_TRIES = 6
_LONG_ENOUGH = 0.7
"""How many requests fill the time is found by doing: a run shorter than this part of it is repeated with more."""
_CIPHER = re.compile(r"^Cipher: (\S+)", re.MULTILINE)
_DATA = re.compile(r"traffic: .*\((\d+)\) data")


@dataclass(frozen=True, slots=True)
class Shot:
    """What one run of h2load sends.

    Attributes:
        url: http:// for plaintext, https:// for TLS.
        body: file of the request with gRPC's prefix.
        reply_bytes: length of the right reply.
        headers: beside gRPC's own.
        tolerance: part by which replies may differ from that length.
        certificate: files of a client certificate and its key.
    """

    url: str
    body: Path
    reply_bytes: int
    connections: int
    streams: int
    headers: tuple[str, ...] = ()
    tolerance: float = 0.0
    certificate: tuple[Path, Path] | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """One measurement.

    Attributes:
        rps: replies a second, in the middle of the run.
        cpu_us: CPU microseconds of the server for one of them; opening the connections is not in it.
        requests: replies that came.
        errors: replies that were not right, or did not come.
        server_share, load_share: how much of its CPU each side used.
        cipher: of TLS, as far as the generator tells.
    """

    rps: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    requests: int
    errors: int
    server_share: float
    load_share: float
    problems: list[str] = field(default_factory=list)
    cipher: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class H2load:
    """Runs h2load on one CPU. Attributes: missing: why it cannot run, or ""."""

    def __init__(self, cpu: tuple[int, ...], folder: Path, preload: Path | None) -> None:
        """Args: folder: for log files. preload: the built client_certificate.c, for shots with a certificate."""
        self.missing = "" if shutil.which("h2load") else "h2load is missing; on Debian: apt-get install nghttp2-client"
        self._cpu = cpu
        self._log = folder / "h2load.log"
        self._preload = preload

    def measure(self, shot: Shot, pids: Sequence[int], seconds: float, rate: float | None = None) -> Figures:
        """Load for about so many seconds. Args: rate: requests a second to expect; None: found by short runs first."""
        fewest = 4 * shot.connections * shot.streams
        count = max(fewest, round(rate * seconds) if rate else _FIRST_COUNT)
        for _ in range(_TRIES):
            figures = self._run(shot, pids, count)
            if figures.errors or count >= _LONG_ENOUGH * seconds * figures.rps:
                break
            count = max(2 * count, round(figures.rps * seconds))
        return figures

    def _run(self, shot: Shot, pids: Sequence[int], count: int) -> Figures:
        """Send `count` requests."""
        self._log.unlink(missing_ok=True)  # h2load appends
        command = ["h2load", "--clients", str(shot.connections), "--max-concurrent-streams", str(shot.streams)]
        command += ["--requests", str(count), "--data", str(shot.body), "--log-file", str(self._log)]
        for header in ("content-type: application/grpc", "te: trailers", *shot.headers):
            command += ["--header", header]
        process = subprocess.Popen(
            [*command, shot.url],
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment(shot),
            preexec_fn=pin_to(*self._cpu),
        )
        samples = _watch(process, pids)
        output = process.communicate()[0]
        rows = [line.split("\t") for line in self._log.read_text(encoding="ascii").splitlines()]
        good = [(int(start) / 1e6, int(took) / 1e6) for start, status, took in rows if status == "200"]
        figures = _figures(good, samples, _problems(shot, count, len(good), output), count)
        cipher = _CIPHER.search(output)
        return replace(figures, cipher=cipher[1] if cipher else "")

    def _environment(self, shot: Shot) -> dict[str, str] | None:
        if shot.certificate is None:
            return None
        certificate, key = shot.certificate
        files = {"LD_PRELOAD": str(self._preload), "BENCH_CERTIFICATE": str(certificate), "BENCH_KEY": str(key)}
        return dict(os.environ) | files


Sample = tuple[float, int, int]
"""Seconds since the epoch, CPU nanoseconds of the server, CPU nanoseconds of the generator."""


def _watch(process: "subprocess.Popen[str]", pids: Sequence[int]) -> list[Sample]:
    """Read the CPU clocks until the generator ends."""
    samples = []
    give_up = time.monotonic() + _TIMEOUT_S
    while process.poll() is None:
        samples.append((time.time(), cpu_ns(pids), cpu_ns([process.pid])))
        if time.monotonic() > give_up:
            process.kill()
        time.sleep(_SAMPLE_S)
    return samples


def _problems(shot: Shot, count: int, good: int, output: str) -> list[str]:
    """h2load sees no gRPC status; but a call that failed has no message, so that the bytes of all replies tell."""
    problems = []
    if good != count:
        problems.append(f"{count - good} of {count} without HTTP status 200")
    received = sum(int(value) for value in _DATA.findall(output))
    expected = count * (shot.reply_bytes + _GRPC_PREFIX)
    if abs(received - expected) > shot.tolerance * expected:
        problems.append(f"replies of {received / count:.1f} bytes on average, not {expected / count:.0f}")
    return problems


def _figures(times: list[tuple[float, float]], samples: list[Sample], problems: list[str], count: int) -> Figures:
    """Args: times: start (since the epoch) and duration of each good reply, seconds."""
    errors = count if problems else 0
    if not times:
        return Figures(0.0, 0.0, 0.0, 0.0, 0, errors, 0.0, 0.0, problems)
    ends = sorted(start + took for start, took in times)
    durations = sorted(took for _, took in times)
    edge = len(ends) // _EDGE
    inside = [sample for sample in samples if ends[edge] <= sample[0] <= ends[-1 - edge]]
    if len(inside) >= _FEWEST_SAMPLES:
        (begin, server, load), (end, server_after, load_after) = inside[0], inside[-1]
        answered = max(1, sum(begin < moment <= end for moment in ends))
    else:  # too short a run for our clock: all of it, so that opening the connections is in it
        (_, server, load), (_, server_after, load_after) = samples[0], samples[-1]
        begin, end, answered = min(start for start, _ in times), ends[-1], len(ends)
    span = max(end - begin, 1e-6)
    return Figures(
        rps=answered / span,
        p50_ms=quantile(durations, 50) * 1e3,
        p99_ms=quantile(durations, 99) * 1e3,
        cpu_us=(server_after - server) / 1e3 / answered,
        requests=len(times),
        errors=errors,
        server_share=(server_after - server) / 1e9 / span,
        load_share=(load_after - load) / 1e9 / span,
        problems=problems,
    )


def quantile(ordered: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed: the nearest rank, so a value that did happen."""
    rank = -(-percent * len(ordered) // 100)
    return ordered[max(1, rank) - 1] if ordered else 0.0
