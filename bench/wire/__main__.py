"""`python -m bench.wire`: the wire beside grpc.aio, grpcio sync and C++ gRPC, in one run on one machine."""

import argparse
import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

from bench.common import machine_facts
from bench.cpu import Cpus, choose_cpus
from bench.wire import build, certificates, digits, report, workload
from bench.wire.load import H2load
from bench.wire.plan import Bench, Results, cases
from bench.wire.process import Process, python_server, running
from bench.workload import ROOT

_SERVERS = ("ours", "cpp", "aio", "sync")
_IDLE_SERVERS = ("ours", "cpp", "aio")
_IDLE = 10_000
_PAYLOADS = ("text", "jpeg", "batch")
_PARTS = ("h2load", "clients", "handshakes", "idle")


def main(given: list[str] | None = None) -> None:
    """Measure, print, write."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: stopped"))  # unwinds, so the servers are stopped too
    arguments = _arguments(given)
    cpus = choose_cpus()
    facts = machine_facts(cpus) | report.wire_facts()
    os.sched_setaffinity(0, cpus.load)  # this process reads clocks while the server runs; not on its CPU
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    seconds = arguments.seconds or (0.1 if arguments.quick else 0.5)
    try:
        if arguments.digits:
            subjects = digits.measure(cpus, rounds, 2 * seconds, _say)
            text = report.render_digits(facts, subjects, rounds)
            content = report.digits_as_dict(facts, subjects)
        else:
            results = Results()
            payloads = _measure(results, arguments, cpus, rounds, seconds)
            text = report.render(facts, results, payloads, rounds)
            content = report.as_dict(facts, results)
    except RuntimeError as error:
        sys.exit(f"bench: {error}")
    print(text)
    what = "wire" + "-digits" * arguments.digits + "-quick" * arguments.quick
    for file in report.write(arguments.out, f"{datetime.now(UTC):%Y-%m-%d}-{what}", text, content):
        print(f"written: {file.name}")


def _measure(
    results: Results, arguments: argparse.Namespace, cpus: Cpus, rounds: int, seconds: float
) -> dict[str, workload.Payload]:
    """Everything but digits, into `results`."""
    # Started servers inherit it; 10 000 idle connections need as many descriptors.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="bench-wire-") as name:
        folder = Path(name)
        payloads = workload.write(folder)
        certificates.write(folder)
        preload = None
        try:
            preload = build.client_certificate(folder)
        except RuntimeError as error:
            results.mtls = str(error)
        bench = Bench(folder, cpus, payloads, H2load(cpus.load, folder, preload), seconds)
        if bench.h2load.missing:
            raise RuntimeError(bench.h2load.missing)
        commands = _commands(arguments.rows, folder, results)

        def start(server: str) -> AbstractContextManager[Process]:
            return running(server, commands[server], cpus.server)

        with contextlib.ExitStack() as stack:
            servers = _start_all(list(commands), start, stack, results)
            results.problems += bench.check(servers)
            for problem in results.problems:
                _say(f"ERRORS: {problem}")
            for number in range(1, rounds + 1):
                begun = time.monotonic()
                _round(bench, results, servers, arguments)
                _say(f"round {number} of {rounds} took {time.monotonic() - begun:.0f} s")
        if "idle" in arguments.parts:
            names = [server for server in results.servers if server in _IDLE_SERVERS]
            bench.idle(results, start, names, 200 if arguments.quick else _IDLE)
            _say("idle connections done")
    return payloads


def _commands(rows: Sequence[str], folder: Path, results: Results) -> dict[str, list[str]]:
    """How each server is started; those that cannot be are noted with the reason."""
    commands = {}
    for row in rows:
        try:
            commands[row] = [str(build.cpp_server(folder)), str(folder)] if row == "cpp" else python_server(row, folder)
        except RuntimeError as error:
            results.skipped[row] = str(error)
            _say(f"{row}: no row, {error}")
    return commands


def _start_all(
    names: Sequence[str],
    start: Callable[[str], AbstractContextManager[Process]],
    stack: contextlib.ExitStack,
    results: Results,
) -> list[Process]:
    servers = []
    for name in names:
        try:
            servers.append(stack.enter_context(start(name)))
            results.servers.append(name)
        except RuntimeError as error:
            results.skipped[name] = str(error)
            _say(f"{name}: no row, {error}")
    return servers


def _round(bench: Bench, results: Results, servers: Sequence[Process], arguments: argparse.Namespace) -> None:
    parts = arguments.parts
    if "h2load" in parts:
        wanted = [case for case in cases() if case.payload in arguments.payloads]
        bench.by_h2load(results, servers, [case for case in wanted if case.mode != "mtls" or not results.mtls])
    if "clients" in parts:
        bench.by_grpcio(results, servers)
    if "handshakes" in parts:
        bench.handshakes(results, servers)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _arguments(given: list[str] | None) -> argparse.Namespace:
    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            unknown = set(text.split(",")) - set(known)
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
            return text.split(",")

        return parse

    parser = argparse.ArgumentParser(prog="python -m bench.wire", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of a moment each, to see that it works")
    parser.add_argument(
        "--rows", type=names(_SERVERS), default=list(_SERVERS), help=f"servers, of {','.join(_SERVERS)}; default all"
    )
    parser.add_argument("--parts", type=names(_PARTS), default=list(_PARTS), help=f"of {','.join(_PARTS)}; default all")
    parser.add_argument(
        "--payloads", type=names(_PAYLOADS), default=list(_PAYLOADS), help=f"of {','.join(_PAYLOADS)}; default all"
    )
    parser.add_argument("--digits", action="store_true", help="instead, the real daemon with the digits model")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument(
        "--seconds", type=float, help="of one short measurement; those that bars stand on take twice it"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
