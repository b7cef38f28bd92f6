"""Other servers beside ours: the same model file, CPUs, protocol and load, in turns; ratios within each pair.

Each peer runs in an environment of its own (build/bench/<name>, made from requirements/bench-<name>.txt). For each pair
both servers are up, and take turns cell by cell, so that a neighbour on this machine meets both.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import grpc

from bench import charts
from bench.common import Bar, Run, names, number, numbers, parser, table
from bench.cpu import pin_to
from bench.generator import Job, Outcome, generate, quantile
from bench.h2 import Target
from bench.peers.models import MODELS, Model
from bench.peers.servers import PEERS, Peer, Running, install, ours, peer
from bench.peers.surfaces import SURFACES, Surface
from bench.server import rest
from bench.wire.process import cpu_ns, memory_bytes, tree
from bench.workload import CONNECTIONS, ROOT

_START_S = 120.0
_WARM_UP_S = 0.5
_GRPC_PREFIX = 5
_DATA = re.compile(r"traffic: .*\((\d+)\) data")
_DONE = re.compile(r"requests: \d+ total, \d+ started, \d+ done, (\d+) succeeded, (\d+) failed, (\d+) errored")
_LIGHT = {"m1"}
"""Models whose requests are so short that only h2load is quick enough to ask for them."""


@dataclass(slots=True)
class Cell:
    """One server at a number of connections, once. Attributes: refused: part of the calls that ended with no answer."""

    rps: float
    p50_ms: float
    p99_ms: float
    refused: float
    cpu_us: float


@dataclass(slots=True)
class Pair:
    """A peer and ours on one model. Attributes: cells: (ours?, connections) → repetitions. start_s, memory: by ours?"""

    peer: Peer
    model: Model
    cells: dict[tuple[bool, int], list[Cell]]
    start_s: dict[bool, float]
    memory: dict[bool, tuple[float, float, int]]
    problem: str = ""

    def ratio(self, connections: int) -> float:
        """Ours to the peer's right answers a second, the median of the repetitions' ratios; 99 at most."""
        own, other = self.cells[True, connections], self.cells[False, connections]
        return median(min(99.0, a.rps / max(1e-9, b.rps)) for a, b in zip(own, other, strict=True))

    def cpu_ratio(self, connections: int) -> float:
        """The peer's CPU time for a right answer to ours."""
        own, other = self.cells[True, connections], self.cells[False, connections]
        return median(min(99.0, b.cpu_us / max(1e-9, a.cpu_us)) for a, b in zip(own, other, strict=True))


def main(arguments: list[str]) -> list[Bar]:
    """Measure, print, write."""
    made = parser("peers", __doc__, seconds=0.0)
    made.add_argument("--models", type=names, default=tuple(MODELS), help="of m1, m2, m2j, m3; default all")
    made.add_argument("--peers", type=names, default=tuple(p.name for p in PEERS), help="default all")
    made.add_argument("--connections", type=numbers, default=CONNECTIONS, help="default 1,8,64")
    made.add_argument("--together", action="store_true", help="servers and load share all CPUs, as in older figures")
    run = Run(made.parse_args(arguments))
    options = run.options
    chosen = [one for one in PEERS if one.name in options.peers]
    for one in chosen:
        install(one.environment, run.say)
    models = [MODELS[name]() for name in options.models]
    todo = [(one, model) for model in models for one in chosen if model.task in one.tasks]
    each = sum((_seconds(run, model) + 2) * 2 * len(options.connections) * run.repeat + 15 for _, model in todo)
    run.expect(each)
    pairs = [_pair(one, model, run) for one, model in todo]
    lines = run.head(
        "Peers",
        "Plaintext, loopback, closed loop; one row a request. Each peer beside ours, cell by cell in turns.",
        "refused: calls that ended with no answer; they count neither in the rate nor in ours/peer.",
        "Servers and load share all CPUs." if options.together else "Servers on their CPUs, the load on others.",
    )
    for model in models:
        mine = [pair for pair in pairs if pair.model.name == model.name]
        if mine:
            lines += ["", f"## {model.name}: {model.title}", "", _text(mine, options.connections)]
            lines += ["", *(f"* {pair.peer.name}: {pair.problem}" for pair in mine if pair.problem)]
    lines += ["", "## The bar: ours ≥ the peer in every cell", "", _bar(pairs, options.connections)]
    compared = [(pair, count) for pair in pairs if not pair.problem for count in options.connections]
    below = [f"{pair.model.name} {pair.peer.name} c={count}" for pair, count in compared if pair.ratio(count) < 1]
    measured = f"{len(compared) - len(below)} of {len(compared)}" + (f", not {'; '.join(below)}" if below else "")
    run.bar("cells where ours ≥ the peer", "all", measured, not below)
    content = [_as_dict(pair) for pair in pairs]
    run.write("\n".join(lines), {"pairs": content}, {"ratio": _chart(pairs, options.connections)})
    return run.bars


def _seconds(run: Run, model: Model) -> float:
    return run.options.seconds or (1.0 if run.options.quick else model.seconds)


def _pair(chosen: Peer, model: Model, run: Run) -> Pair:
    pair = Pair(chosen, model, {}, {}, {})
    surface = SURFACES[chosen.surface]
    own_surface = SURFACES["v2" if surface.http1 else chosen.surface]
    cpus = tuple(sorted({*run.cpus.server, *run.cpus.load})) if run.options.together else run.cpus.server
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides: dict[bool, tuple[Running, Surface]] = {}
        for is_ours in (True, False):
            begun = time.monotonic()
            try:
                server = stack.enter_context(
                    ours(model, cpus, run.mode, run.settings) if is_ours else peer(chosen, model, cpus)
                )
                used = own_surface if is_ours else surface
                _first(server, used, model)
            except RuntimeError as error:
                pair.problem = f"{'ours' if is_ours else chosen.name}: {error}"
                run.say(f"{chosen.name}, {model.name}: {pair.problem}")
                return pair
            sides[is_ours] = (server, used)
            pair.start_s[is_ours] = time.monotonic() - begun
            pair.memory[is_ours] = (memory_bytes(tree(server.pid)) / 2**20, 0.0, 0)
        rest(sides[True][0].pid)
        shots = {
            side: _Shot(server, used, model, folder / str(side), run, _first(server, used, model))
            for side, (server, used) in sides.items()
        }
        for shot in shots.values():
            shot.measure(max(run.options.connections), 0.5)  # the same warm-up for all
        for repetition in range(run.repeat):
            for connections in run.options.connections:
                for side in (True, False) if repetition % 2 == 0 else (False, True):
                    with _standing_still(sides[not side][0]):
                        cell = shots[side].measure(connections, _seconds(run, model))
                    pair.cells.setdefault((side, connections), []).append(cell)
        for side, (server, used) in sides.items():
            processes = tree(server.pid)
            pair.memory[side] = (pair.memory[side][0], memory_bytes(processes) / 2**20, len(processes))
            _first(server, used, model)  # still right
    ratios = ", ".join(f"{pair.ratio(connections):.2f}" for connections in run.options.connections)
    run.say(f"{model.name}, {chosen.name}: ours to the peer {ratios}")
    return pair


@contextlib.contextmanager
def _standing_still(server: Running) -> Iterator[None]:
    """Stop a server's processes meanwhile: one that polls for work takes a tenth of the CPU they share (LitServe)."""
    processes = tree(server.pid)
    _signal(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(processes, signal.SIGCONT)


def _signal(processes: Iterable[int], number: signal.Signals) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _rate(outcome: Outcome, connections: int, seconds: float) -> float:
    """Right answers a second of a closed loop.

    Where a call takes a good part of the time there is, counting depends on where its ends lie, and on how many answers
    come together: a server that answers eight at once looks better or worse than one that answers them in turn. What a
    call takes does not depend on that. Source: Little 1961: calls in flight = rate × time in flight. Where some are
    refused the others' number in flight is unknown: then those count that began within the time.
    """
    if outcome.problems or not outcome.latencies:
        return outcome.right / seconds
    return connections / mean(outcome.latencies)


def _first(server: Running, surface: Surface, model: Model) -> int:
    """Wait for the first answer, which must be right. Returns: its length. Raises: RuntimeError."""
    give_up, last = time.monotonic() + _START_S, ""
    body = surface.request(model, server.model_id)
    while time.monotonic() < give_up:
        if server.ended():
            raise RuntimeError("it ended")
        try:
            reply = _ask(server, surface, body)
        except (grpc.RpcError, OSError) as error:
            last = str(error.details() if isinstance(error, grpc.RpcError) else error)
            time.sleep(0.1)
            continue
        if not surface.right(model, reply):
            raise RuntimeError("its answer is not the model's own")
        return len(reply)
    raise RuntimeError(f"no answer in {_START_S:.0f} s: {last}")


def _ask(server: Running, surface: Surface, body: bytes) -> bytes:
    if surface.http1:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://{server.address}{surface.path}", body, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())
    limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, options=limits) as channel:
        return bytes(channel.unary_unary(surface.path)(body, timeout=30, metadata=server.headers))


class _Shot:
    """Load on one server."""

    def __init__(self, server: Running, surface: Surface, model: Model, folder: Path, run: Run, length: int) -> None:
        self._server, self._surface, self._model, self._length = server, surface, model, length
        self._cpus = tuple(sorted({*run.cpus.server, *run.cpus.load})) if run.options.together else run.cpus.load
        folder.mkdir()
        body = surface.request(model, server.model_id)
        self._body, self._framed, self._log = folder / "body", folder / "framed", folder / "log"
        self._body.write_bytes(body)
        self._framed.write_bytes(body if surface.http1 else b"\0" + len(body).to_bytes(4, "big") + body)

    def measure(self, connections: int, seconds: float) -> Cell:
        """A closed loop."""
        quick = self._surface.http1 or (self._model.name in _LIGHT and shutil.which("h2load") is not None)
        return self._by_h2load(connections, seconds) if quick else self._by_generator(connections, seconds)

    def _by_generator(self, connections: int, seconds: float) -> Cell:
        target = Target(self._server.address, self._surface.path, headers=self._server.headers)
        clarifai = self._surface.name.startswith("Clarifai")
        job = Job(target, (str(self._body),), connections, seconds, warm_up=_WARM_UP_S, clarifai=clarifai)
        pids = tree(self._server.pid)
        before = cpu_ns(pids)
        outcome = generate(job, self._cpus[-1:])
        used = (cpu_ns(pids) - before) / 1e3
        for reply in outcome.replies.get(0, []):
            if not self._surface.right(self._model, reply):
                outcome.ends["wrong"] = outcome.ends.get("wrong", 0) + 1
        every = max(1, sum(outcome.ends.values()))
        span = max(1e-9, outcome.ended - outcome.begun)
        share = span / (span + _WARM_UP_S)
        refused = sum(outcome.problems.values()) / every
        cpu_us = used * share / max(1, outcome.right)
        return Cell(_rate(outcome, connections, seconds), outcome.ms(50), outcome.ms(99), refused, cpu_us)

    def _by_h2load(self, connections: int, seconds: float) -> Cell:
        """h2load sees no gRPC status; but a refused call has no message, so that the bytes of all replies tell."""
        self._log.unlink(missing_ok=True)  # h2load appends
        command = [
            "h2load",
            "-c",
            str(connections),
            "-m",
            "1",
            "-d",
            str(self._framed),
            "-D",
            f"{round(1000 * seconds)}ms",
        ]
        command += ["--warm-up-time", f"{round(1000 * _WARM_UP_S)}ms", "--log-file", str(self._log)]
        lines = ["content-type: application/json"] if self._surface.http1 else []
        lines += [] if self._surface.http1 else ["content-type: application/grpc", "te: trailers"]
        for line in (*lines, *(f"{name}: {value}" for name, value in self._server.headers)):
            command += ["-H", line]
        command += ["--h1"] if self._surface.http1 else []
        pids = tree(self._server.pid)
        before = cpu_ns(pids)
        done = subprocess.run(
            [*command, f"http://{self._server.address}{self._surface.path}"],
            capture_output=True,
            text=True,
            preexec_fn=pin_to(*self._cpus),
            check=False,
            cwd=ROOT,
        )
        used = (cpu_ns(pids) - before) / 1e3
        rows = [line.split("\t") for line in self._log.read_text(encoding="ascii").splitlines()]
        times = sorted(int(took) / 1e3 for _, status, took in rows if status == "200")
        counts, data = _DONE.search(done.stdout), _DATA.search(done.stdout)
        if counts is None or data is None:
            raise RuntimeError(f"h2load failed: {done.stdout[-300:]}{done.stderr[-300:]}")
        succeeded, failed, errored = (int(value) for value in counts.groups())
        answered = succeeded
        if not self._surface.http1:
            answered = min(succeeded, round(int(data[1]) / (self._length + _GRPC_PREFIX)))
            answered = succeeded if answered > 0.98 * succeeded else answered  # replies carry time stamps and ids
        every = max(1, succeeded + failed + errored)
        rate = answered / seconds
        cpu_us = used * seconds / (seconds + _WARM_UP_S) / max(1, answered)
        return Cell(rate, quantile(times, 50), quantile(times, 99), 1 - answered / every, cpu_us)


def _text(pairs: list[Pair], connections: tuple[int, ...]) -> str:
    head = ["server", "wire", "start s", "PSS MiB (procs)"]
    head += [f"c={count} rps · p50/p99 ms" for count in connections]
    head += ["refused", "CPU µs/answer"]
    head += [f"ours/peer c={count}" for count in connections]
    rows = []
    for pair in pairs:
        if pair.problem:
            continue
        for side in (False, True):
            last = pair.cells[side, connections[-1]]
            before, after, processes = pair.memory[side]
            own = SURFACES["v2" if SURFACES[pair.peer.surface].http1 else pair.peer.surface]
            row = [
                f"ours beside {pair.peer.name}" if side else pair.peer.name,
                own.name if side else SURFACES[pair.peer.surface].name,
                f"{pair.start_s[side]:.1f}",
                f"{before:.0f}→{after:.0f} ({processes})",
            ]
            for count in connections:
                cells = pair.cells[side, count]
                p50, p99 = (median(getattr(cell, name) for cell in cells) for name in ("p50_ms", "p99_ms"))
                row.append(f"{median(cell.rps for cell in cells):,.0f} · {number(p50)}/{number(p99)}")
            row.append(f"{median(cell.refused for cell in last):.0%}")
            row.append(number(median(cell.cpu_us for cell in last)))
            row += [f"{pair.ratio(count):.2f}" if side else "" for count in connections]
            rows.append(row)
    return table(head, rows)


def _bar(pairs: list[Pair], connections: tuple[int, ...]) -> str:
    rows = []
    for pair in pairs:
        if not pair.problem:
            for count in connections:
                ratio, by_cpu = pair.ratio(count), pair.cpu_ratio(count)
                verdict = "met" if ratio >= 1 else "within 2 %" if ratio >= 0.98 else "MISSED"
                rows.append([pair.model.name, pair.peer.name, str(count), f"{ratio:.2f}", f"{by_cpu:.2f}", verdict])
    return table(["model", "peer", "conns", "ours/peer", "by CPU", ""], rows)


def _chart(pairs: list[Pair], connections: tuple[int, ...]) -> str:
    groups = {
        f"{pair.model.name} {pair.peer.name}": {f"c={count}": min(pair.ratio(count), 20.0) for count in connections}
        for pair in pairs
        if not pair.problem
    }
    return charts.bars("Ours to each peer, answers a second", "ratio (20 at most)", groups, line=1.0)


def _as_dict(pair: Pair) -> dict[str, Any]:
    def sides(of: Callable[[bool], Any]) -> dict[str, Any]:
        return {("ours" if side else "peer"): of(side) for side in (True, False)}

    found: dict[str, Any] = {"peer": pair.peer.name, "model": pair.model.name, "problem": pair.problem}
    if pair.problem:
        return found
    counts = sorted({count for _, count in pair.cells})
    return found | {
        "start_s": sides(lambda side: pair.start_s[side]),
        "memory_mib": sides(lambda side: pair.memory[side]),
        "cells": {
            str(count): sides(lambda side, count=count: [asdict(cell) for cell in pair.cells[side, count]])
            | {"ratio": pair.ratio(count), "cpu_ratio": pair.cpu_ratio(count)}
            for count in counts
        },
    }
