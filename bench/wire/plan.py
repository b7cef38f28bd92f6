"""What is measured: the cases, in turns over all servers, so that a neighbour who comes or goes meets them all."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench.cpu import Cpus
from bench.wire import calls, connections
from bench.wire.connections import Handshakes, Idle
from bench.wire.load import Figures, H2load, Shot
from bench.wire.process import MODES, Process
from bench.wire.workload import PREDICT, Payload

CONNECTIONS = (1, 8, 64)
STREAMS = (1, 16)

_CORE_FACTOR = 2.0
"""Rows that a bar stands on are measured longer than the others by this."""


@dataclass(frozen=True, slots=True)
class Case:
    """One load. Attributes: work: "prepared" (bytes in, prepared bytes out) or "predict" (parse, build the reply)."""

    payload: str
    work: str
    mode: str
    connections: int
    streams: int

    @property
    def core(self) -> bool:
        """Whether a bar stands on it."""
        return self.streams == 1 and (self.payload == "text" or (self.payload, self.connections) == ("jpeg", 8))


def cases() -> list[Case]:
    """All loads by h2load; those that are compared with each other stand together."""
    prepared = [
        Case(payload, "prepared", mode, clients, streams)
        for payload in ("text", "jpeg", "batch")
        for streams in STREAMS
        for clients in CONNECTIONS
        for mode in MODES
    ]
    predict = [
        *(Case("text", "predict", mode, clients, 1) for clients in CONNECTIONS for mode in MODES),
        *(Case("jpeg", "predict", mode, 8, 1) for mode in MODES),
        *(Case("batch", "predict", "plain", clients, 1) for clients in (8, 64)),
    ]
    return prepared + predict


@dataclass(slots=True)
class Results:
    """Everything found; figures by case (or mode) and server, one for each round.

    Attributes:
        skipped: server → why it has no row.
        problems: wrong answers found before anything was measured.
        mtls: why there are no rows of mTLS by h2load, or "".
    """

    servers: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    mtls: str = ""
    load: defaultdict[tuple[Case, str], list[Figures]] = field(default_factory=lambda: defaultdict(list))
    clients: defaultdict[tuple[str, str], list[Figures]] = field(default_factory=lambda: defaultdict(list))
    handshakes: defaultdict[tuple[str, str], list[Handshakes]] = field(default_factory=lambda: defaultdict(list))
    idle: defaultdict[tuple[str, str], list[Idle]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements need. Attributes: folder: certificates and messages; seconds: of one measurement."""

    folder: Path
    cpus: Cpus
    payloads: dict[str, Payload]
    h2load: H2load
    seconds: float

    def by_h2load(self, results: Results, servers: Sequence[Process], chosen: Sequence[Case]) -> None:
        """One round of all cases."""
        for case in chosen:
            for server in servers:
                known = results.load[case, server.name]
                seconds = self.seconds * (_CORE_FACTOR if case.core else 1.0)
                figures = self.h2load.measure(
                    self._shot(case, server), [server.pid], seconds, known[-1].rps if known else None
                )
                known.append(figures)

    def by_grpcio(self, results: Results, servers: Sequence[Process]) -> None:
        """One round of grpcio clients, in all modes."""
        text = self.payloads["text"]
        for mode in MODES:
            for server in servers:
                figures = calls.measure(
                    f"localhost:{server.ports[mode]}",
                    mode,
                    text.prepared,
                    self.folder / text.name,
                    self.folder,
                    [server.pid],
                    self.cpus.load,
                    2 * self.seconds,
                )
                results.clients[mode, server.name].append(figures)

    def handshakes(self, results: Results, servers: Sequence[Process]) -> None:
        """One round of opening connections."""
        for mode in MODES:
            for server in servers:
                figures = connections.measure_handshakes(
                    server.ports[mode], mode, self.folder, [server.pid], self.cpus.load, 2 * self.seconds
                )
                results.handshakes[mode, server.name].append(figures)

    def idle(
        self,
        results: Results,
        start: Callable[[str], AbstractContextManager[Process]],
        names: Sequence[str],
        wanted: int,
    ) -> None:
        """Idle connections, on a server started for each row: what an earlier row left in its memory does not count."""
        for mode in MODES[:2]:
            for name in names:
                with start(name) as server:
                    figures = connections.measure_idle(
                        server.ports[mode], mode, self.folder, [server.pid], self.cpus.load, wanted
                    )
                results.idle[mode, name].append(figures)

    def check(self, servers: Sequence[Process]) -> list[str]:
        """Ask each server once for everything; sentences for what is wrong."""
        names, asked = [], []
        for server in servers:
            for mode in MODES:
                for payload in self.payloads.values():
                    for method in (payload.prepared, PREDICT):
                        if payload.name == "jpeg" and method != PREDICT:
                            continue  # the prepared reply is the text's
                        names.append(f"{server.name}, {mode}, {payload.name}, {method}")
                        asked.append(
                            {
                                "address": f"localhost:{server.ports[mode]}",
                                "mode": mode,
                                "method": method,
                                "request": str(self.folder / f"{payload.name}.request"),
                                "expected": str(self.folder / f"{payload.name}.expected"),
                            }
                        )
        found = calls.check(asked, self.folder, self.cpus.load)
        return [f"{name}: {problem}" for name, problem in zip(names, found, strict=True) if problem]

    def _shot(self, case: Case, server: Process) -> Shot:
        payload = self.payloads[case.payload]
        scheme = "http" if case.mode == "plain" else "https"
        method = payload.prepared if case.work == "prepared" else PREDICT
        return Shot(
            url=f"{scheme}://127.0.0.1:{server.ports[case.mode]}{method}",
            body=self.folder / f"{payload.name}.framed",
            reply_bytes=len(payload.reply),
            connections=case.connections,
            streams=case.streams,
            certificate=(self.folder / "client.crt", self.folder / "client.key") if case.mode == "mtls" else None,
        )
