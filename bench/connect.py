"""`python -m bench.connect`: what `appliance connect` costs, beside direct TLS to the same servers in the same run.

The forwarder runs on the load generator's CPU, as it does on a client's host: directly, that CPU does TLS in h2load;
through the forwarder, h2load speaks plaintext and the forwarder does TLS. Needs h2load. h2load cannot send a client
certificate, so that the direct figures are without one; after its handshake a connection costs the same.
"""

import argparse
import asyncio
import contextlib
import re
import resource
import select
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from appliance.core.memory import MemoryBudget
from appliance.core.types import Call, Endpoint
from appliance.wire.server import WireServer
from appliance.wire.settings import WireSettings
from bench.common import machine_facts
from bench.cpu import Cpus, choose_cpus, pin_to
from bench.server import serving
from bench.wire.process import cpu_ns, memory_bytes
from bench.workload import METHOD, ROOT, digits

_ECHO = "/bench.Connect/Echo"
_START_S = 30.0
_PORT = re.compile(r"http://127\.0\.0\.1:(\d+)")
_RATE = re.compile(r"finished in .*, ([\d.]+) req/s")
_FAILED = re.compile(r"(\d+) failed, (\d+) errored")
_WINDOWS = ["--window-bits", "24", "--connection-window-bits", "26"]
_WARM_UP_S = 1.0
"""Seconds for the connections to open in, which are not counted."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of call. Attributes: method: full name. body: the message."""

    name: str
    port: int
    method: str
    body: bytes
    connections: int
    headers: tuple[str, ...] = ()


@dataclass(slots=True)
class Figures:
    """Repetitions of one case, one way. Attributes: cpu_us: of the client's side, h2load and forwarder, for a call."""

    per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Of one column."""
        return statistics.median(getattr(self, name))


def main(given: list[str] | None = None) -> None:
    """Measure, print, write."""
    arguments = _arguments(given)
    if arguments.serve:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(arguments.serve))
        return
    if shutil.which("h2load") is None:
        sys.exit("bench: h2load is not installed; Debian and Ubuntu have it in nghttp2-client.")
    text = _run(arguments, choose_cpus())
    print(text)
    file = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-connect.md"
    file.write_text(text, encoding="utf-8")
    print(f"written: {file.name}")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.connect", description="appliance connect beside direct TLS.")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement, default 3")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions, default 3")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where the result goes")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def _run(arguments: argparse.Namespace, cpus: Cpus) -> str:
    workload = digits()
    facts = machine_facts(cpus)
    one, batch = (workload.request(shape) for shape in workload.shapes((1, 128)))
    results: list[tuple[Case, Figures, Figures]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-connect-")))
        server = stack.enter_context(serving(workload.bundle, cpus.server))
        tls = server.ca.parent
        _appliance("certs", "issue", "client", "bench", "--dir", str(tls))
        echo = stack.enter_context(_echo_server(tls, cpus.server))
        port = int(server.address.rpartition(":")[2])
        ways = {
            upstream: stack.enter_context(_forwarder(folder, upstream, tls, cpus.load)) for upstream in (port, echo)
        }
        key = (f"authorization: Key {server.key}",)
        cases = [
            *(Case("predict, one 8×8 picture", port, METHOD, one, count, key) for count in (1, 8, 64)),
            Case("predict, batch of 128", port, METHOD, batch, 8, key),
            *(Case("echo, 1 kB", echo, _ECHO, b"x" * 1024, count) for count in (1, 64)),
            Case("echo, 1 MiB", echo, _ECHO, b"x" * 2**20, 4),
            Case("echo, 20 MiB", echo, _ECHO, b"x" * (20 * 2**20), 4),
        ]
        results = [(case, Figures(), Figures()) for case in cases]
        for _ in range(arguments.repeat):
            for case, direct, through in results:
                _measure(case, None, direct, arguments.seconds, cpus.load, folder)
                _measure(case, ways[case.port], through, arguments.seconds, cpus.load, folder)
        connects = {
            name: _connects(case_port, secure)
            for name, case_port, secure in (("directly", port, True), ("through", ways[port][1], False))
        }
        memory = memory_bytes([ways[port][0]]) / 2**20
        cost = cpu_ns([ways[echo][0]]) / 1e9
    return _text(facts, arguments.repeat, results, connects, memory, cost)


# ---- the programs ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _forwarder(folder: Path, upstream: int, tls: Path, cpu: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Its process and its port."""
    log = folder / f"connect-{upstream}.log"
    command = [sys.executable, "-m", "appliance", "connect", "--upstream", f"https://localhost:{upstream}"]
    command += ["--cert", str(tls / "clients/bench.crt"), "--key", str(tls / "clients/bench.key")]
    command += ["--ca", str(tls / "ca.crt"), "--listen", "127.0.0.1:0", "--stop-s", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, preexec_fn=pin_to(*cpu))
    try:
        give_up = time.monotonic() + _START_S
        while (found := _PORT.search(log.read_text(encoding="utf-8"))) is None:
            if time.monotonic() > give_up or process.poll() is not None:
                raise RuntimeError(f"appliance connect did not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.05)
        yield process.pid, int(found[1])
    finally:
        process.terminate()
        process.wait(_START_S)


@contextlib.contextmanager
def _echo_server(tls: Path, cpu: tuple[int, ...]) -> Iterator[int]:
    """The port of the product's own wire, whose endpoint gives back what it gets."""
    command = [sys.executable, "-m", "bench.connect", "--serve", str(tls)]
    quiet = subprocess.DEVNULL  # uvloop complains of replies to clients that stopped in the middle
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=quiet, preexec_fn=pin_to(*cpu))
    assert process.stdout is not None
    try:
        if not select.select([process.stdout], [], [], _START_S)[0]:
            raise RuntimeError("The echo server did not start.")
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(_START_S)
        process.stdout.close()


async def _serve(tls: Path) -> None:
    budget = MemoryBudget(2**31)

    async def echo(call: Call, body: bytes) -> bytes:
        return body

    def admit(call: Call, size: int) -> None:
        call.memory = budget.hold(size)

    async def nothing(scope: object, receive: object, send: object) -> None:
        """Nobody asks over plain HTTP."""

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls / "server.crt", tls / "server.key")
    context.load_verify_locations(tls / "ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    context.set_alpn_protocols(["h2", "http/1.1"])
    server = WireServer({_ECHO: Endpoint(unary=echo, admit=admit)}, nothing, WireSettings(), budget)
    server.listen("tls", socket.create_server(("127.0.0.1", 0), backlog=1024), lambda: context)
    await server.start()
    print(server.ports["tls"], flush=True)
    await asyncio.Event().wait()


def _appliance(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "appliance", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE)


# ---- measuring -------------------------------------------------------------------------------------------------------


def _measure(
    case: Case, forwarder: tuple[int, int] | None, figures: Figures, seconds: float, cpu: tuple[int, ...], folder: Path
) -> None:
    """One measurement: calls for so many seconds, after some in which connections open."""
    pids, address = ([forwarder[0]], f"http://127.0.0.1:{forwarder[1]}") if forwarder else ([], _direct(case))
    data, log = folder / "body", folder / "h2load.log"
    data.write_bytes(bytes(1) + len(case.body).to_bytes(4, "big") + case.body)
    log.unlink(missing_ok=True)  # h2load appends
    command = ["h2load", "-c", str(case.connections), "-m", "1", "-d", str(data), *_WINDOWS]
    command += ["-D", f"{seconds:g}", "--warm-up-time", f"{_WARM_UP_S:g}", "--log-file", str(log)]
    for line in ("content-type: application/grpc", "te: trailers", *case.headers):
        command += ["-H", line]
    command.append(address + case.method)
    before = cpu_ns(pids) / 1e3 + _children_us()
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=pin_to(*cpu), check=False)
    rows = [line.split("\t") for line in log.read_text(encoding="ascii").splitlines()] if log.exists() else []
    took = sorted(int(us) / 1e3 for _, status, us in rows if status == "200")
    rate, failed = _RATE.search(done.stdout), _FAILED.search(done.stdout)
    if not took or rate is None or failed is None or failed.groups() != ("0", "0"):
        raise RuntimeError(f"{case.name} failed:\n{done.stdout}{done.stderr}")
    figures.per_s.append(float(rate[1]))
    used = cpu_ns(pids) / 1e3 + _children_us() - before
    figures.cpu_us.append(used / (seconds + _WARM_UP_S) / float(rate[1]))
    figures.p50_ms.append(took[len(took) // 2])
    figures.p99_ms.append(took[min(len(took) - 1, len(took) * 99 // 100)])


def _direct(case: Case) -> str:
    return f"https://127.0.0.1:{case.port}"


def _children_us() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1e6


def _connects(port: int, secure: bool, count: int = 200) -> float:
    """Milliseconds from nothing to the first answer on a new connection, the median."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    took = []
    for _ in range(count):
        begun = time.perf_counter()
        with contextlib.ExitStack() as stack:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if secure:
                sock = stack.enter_context(context.wrap_socket(sock))
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        took.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(took)


def _text(
    facts: dict[str, object],
    repeat: int,
    results: list[tuple[Case, Figures, Figures]],
    connects: dict[str, float],
    memory: float,
    cost: float,
) -> str:
    lines = [
        f"# appliance connect, {facts['date']}, commit {facts['commit']}",
        "",
        f"* {facts['cpu']}, {facts['cpus_usable']} of {facts['cpus']} CPUs usable; server on CPU "
        f"{facts['server_and_raw_on_cpu']}, load and forwarder on CPU {facts['load_on_cpu']}.",
        f"* Load average at the start: {facts['load_average_at_start']}. What else ran is not subtracted.",
        f"* python {facts['python']}, h2load; medians of {repeat} rounds; closed loop, one call in flight on each "
        "connection.",
        "* directly: TLS 1.3 in h2load, without a client certificate; through: plaintext to the forwarder, which does "
        "TLS with one.",
        "",
        "| case | connections | calls/s directly | through | ratio | p50 ms directly | through | p99 ms directly "
        "| through | client's CPU µs a call directly | through | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for case, direct, through in results:
        cells = [case.name, str(case.connections)]
        for name, places in (("per_s", 1), ("p50_ms", 2), ("p99_ms", 2), ("cpu_us", 0)):
            cells += [f"{side.median(name):.{places}f}" for side in (direct, through)]
            if name in ("per_s", "cpu_us"):
                cells.append(f"**{through.median(name) / direct.median(name):.2f}**")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "A new connection and its first answer (HTTP/1.1, one after the other): "
        f"{connects['directly']:.2f} ms directly, {connects['through']:.2f} ms through.",
        f"The forwarder of the predict cases held {memory:.0f} MiB (PSS) at the end; that of the echo cases used "
        f"{cost:.1f} s of CPU in all.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
