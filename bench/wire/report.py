"""What is printed and kept: the bars, the tables, the files."""

import json
import re
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench.wire import build
from bench.wire.digits import LOADS, PEERS, Subject
from bench.wire.load import Figures
from bench.wire.plan import CONNECTIONS, STREAMS, Case, Results
from bench.wire.process import MODES
from bench.wire.workload import Payload

TITLES = {
    "ours": "ours",
    "cpp": "C++ gRPC",
    "aio": "grpc.aio",
    "sync": "grpcio sync",
}
_MODE_TITLES = {"plain": "plaintext", "tls": "TLS", "mtls": "mTLS"}
_ABOUT = {
    "ours": "`appliance.wire.server.WireServer` on uvloop, one process, quick handlers",
    "cpp": "`bench/wire/echo.cc`: asynchronous generic service, one completion queue, one thread, -O2",
    "aio": "`grpc.aio` on uvloop, handlers of bytes",
    "sync": "`grpc.server` with a pool of 8 threads, handlers of bytes",
}
_LIMITED = 0.9
"""Share of its CPU from which the load generator, and not the server, may be what the figure shows."""
_GOAL_RPS = 25_000
"""Digits end to end, on one core for the server and one for the load."""


# ---- the whole -------------------------------------------------------------------------------------------------------


def render(facts: Mapping[str, Any], results: Results, payloads: Mapping[str, Payload], rounds: int) -> str:
    """Everything as Markdown whose tables are also readable as they are."""
    parts = [_facts_text("Wire benchmark", facts, rounds), _servers_text(results)]
    parts += [f"ERRORS, {problem}." for problem in results.problems] + _errors(results)
    if "ours" in results.servers and results.load:
        parts += ["## Bars", _bars_text(results)]
    if results.load:
        parts += _h2load_parts(results, payloads)
    parts += ["## grpcio's own client", _clients_text(results)]
    parts += ["## Opening connections", _handshakes_text(results)]
    parts += ["## Idle connections", _idle_text(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _h2load_parts(results: Results, payloads: Mapping[str, Payload]) -> list[str]:
    """The tables of what h2load measured."""
    parts = [
        "## Bytes in, prepared bytes out, load by h2load",
        "In each round the servers take turns, case by case. "
        "Requests a second · CPU µs of the server for one request. `8 × 16`: 8 connections with 16 streams each. "
        "`*`: the load generator's CPU was busier than the server's, which could have done more requests; its CPU µs "
        "hold all the same.",
    ]
    parts.append(_ciphers_text(results))
    if results.mtls:
        parts.append(f"No mTLS by h2load: {results.mtls}.")
    for payload in payloads.values():
        parts += [f"### {payload.title}", _load_text(results, payload.name, "prepared", _speed)]
    parts += ["### p50 / p99, ms"]
    for payload in payloads.values():
        parts += [f"{payload.name}:", _load_text(results, payload.name, "prepared", _latency)]
    parts += [
        "## Parse the request, build the reply, load by h2load",
        "With Clarifai's messages: in Python by protobuf's own parser, and the reply joined from pieces that were "
        "serialised before; in C++ by generated classes on an arena, the usual way. Replies are equal, byte for byte.",
    ]
    parts += [_load_text(results, payload.name, "predict", _speed, payload.name) for payload in payloads.values()]
    return parts


def render_digits(facts: Mapping[str, Any], subjects: Sequence[Subject], rounds: int) -> str:
    """The daemon's figures beside the peers'."""
    parts = [_facts_text("Digits end to end", facts, rounds)]
    parts.append(
        "`appliance serve` with its default settings, TLS, a key on every call; load by h2load, one picture or array a "
        "request. The daemon has one core and the load the other, where nothing else is said."
    )
    best = {
        clients: max((rates[index], name) for name, rates in PEERS.items()) for index, clients in enumerate((1, 8, 64))
    }
    bars = []
    for subject in subjects:
        parts += [f"## {subject.title}", _digits_table(subject)]
        parts += sorted(
            {f"ERRORS: {problem}." for rounds in subject.figures.values() for one in rounds for problem in one.problems}
        )
        top, at = max((_median(subject.figures[load], "rps"), load) for load in LOADS)
        cpu_us = _number(_median(subject.figures[at], "cpu_us"))
        measured = f"{top:.0f} at {at[0]} × {at[1]}, {cpu_us} µs of CPU each"
        bars.append([subject.name, f"{_GOAL_RPS} requests/s at some load", measured, _met(top >= _GOAL_RPS)])
        for clients, (rate, name) in best.items() if subject.like_peers else ():
            ours = _median(subject.figures[clients, 1], "rps")
            what = f"ahead of all peers at {clients} (best: {name}, {rate})"
            bars.append([subject.name, what, f"{ours:.0f} at {clients} × 1", _met(ours > rate)])
    parts += ["## Bars", _table(["bundle", "bar", "measured", ""], bars)]
    rows = [[name, *map(str, rates)] for name, rates in PEERS.items()]
    parts += [
        "## Reference, another run",
        "To be held against `mlp-as-peers`. Requests a second of an MLP for digits, 64 floats → 10, plaintext, one "
        "request at a time on 1, 8 and 64 connections; server and client shared two cores of the same kind of machine; "
        "best of 2 or 3 runs.",
        _table(["peer", "1", "8", "64"], rows),
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, name: str, text: str, content: Mapping[str, Any]) -> list[Path]:
    """Write the Markdown, and every round's figures as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.md", folder / f"{name}.json"]
    files[0].write_text(text, encoding="utf-8")
    files[1].write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return files


def as_dict(facts: Mapping[str, Any], results: Results) -> dict[str, Any]:
    """For JSON."""

    def flat(cells: Mapping[Any, Sequence[Any]]) -> list[dict[str, Any]]:
        return [
            (asdict(key) if isinstance(key, Case) else {"mode": key})
            | {"server": server, "rounds": [figures.as_dict() for figures in rounds]}
            for (key, server), rounds in cells.items()
            if rounds
        ]

    return {
        "machine": dict(facts),
        "servers": results.servers,
        "skipped": results.skipped,
        "problems": results.problems,
        "bars": bars(results),
        "h2load": flat(results.load),
        "grpcio_clients": flat(results.clients),
        "handshakes": flat(results.handshakes),
        "idle": flat(results.idle),
    }


def digits_as_dict(facts: Mapping[str, Any], subjects: Sequence[Subject]) -> dict[str, Any]:
    """For JSON."""
    return {
        "machine": dict(facts),
        "reference_rps_at_1_8_64": PEERS,
        "bundles": [
            {
                "name": subject.name,
                "title": subject.title,
                "loads": [
                    {"connections": load[0], "streams": load[1], "rounds": [one.as_dict() for one in rounds]}
                    for load, rounds in subject.figures.items()
                ],
            }
            for subject in subjects
        ],
    }


def wire_facts() -> dict[str, Any]:
    """Versions that matter here, beside those of `bench.common.machine_facts`."""
    return {
        "libgrpc++": build.grpc_version(),
        "openssl": ssl.OPENSSL_VERSION.removeprefix("OpenSSL ").split()[0],
        "h2load": _h2load_version(),
        "cryptography": version("cryptography"),
    }


def _h2load_version() -> str:
    if shutil.which("h2load") is None:
        return "missing"
    found = re.search(r"nghttp2/(\S+)", subprocess.run(["h2load", "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else "unknown"


# ---- bars ------------------------------------------------------------------------------------------------------------


def bars(results: Results) -> list[dict[str, Any]]:
    """The bars and how they stand; ratios are medians of the rounds' ratios."""
    found: list[dict[str, Any]] = []

    def ratio(bar: str, least: float, what: str, ours: Sequence[Figures], other: Sequence[Figures]) -> None:
        if ours and other:
            by_rps, by_cpu = _ratios(ours, other)
            verdict = _verdict(by_rps >= least, by_cpu >= least, [*ours, *other])
            found.append({"bar": bar, "case": what, "by_rps": by_rps, "by_cpu": by_cpu, "verdict": verdict})

    def cells(work: str, payload: str, mode: str, clients: int, server: str) -> list[Figures]:
        return results.load.get((Case(payload, work, mode, clients, 1), server), [])

    for other, least in (("aio", 8.0), ("cpp", 0.5)):
        for work in ("prepared", "predict"):
            for clients in (8, 64):
                ours, theirs = (cells(work, "text", "plain", clients, name) for name in ("ours", other))
                title = f"≥ {least:g} × {TITLES[other]}"
                ratio(title, least, f"text, {work}, plaintext, {clients} × 1", ours, theirs)
    for work in ("prepared", "predict"):
        ours, theirs = (cells(work, "text", "plain", 1, name) for name in ("ours", "cpp"))
        if ours and theirs:
            slower = median(a.p50_ms / max(b.p50_ms, 1e-9) for a, b in zip(ours, theirs, strict=False))
            verdict = _verdict(slower <= 2, slower <= 2, [*ours, *theirs])
            case = f"text, {work}, plaintext, 1 × 1"
            found.append({"bar": "idle p50 ≤ 2 × C++ gRPC", "case": case, "p50": round(slower, 3), "verdict": verdict})
    for payload, least, counts in (("text", 0.8, (8, 64)), ("jpeg", 0.6, (8,))):
        for mode in ("tls", "mtls"):
            for clients in counts:
                for work in ("prepared", "predict"):
                    (ours, own), cpp = (
                        [cells(work, payload, with_tls, clients, name) for with_tls in (mode, "plain")]
                        for name in ("ours", "cpp")
                    )
                    title = f"{_MODE_TITLES[mode]} ≥ {least:g} × own plaintext"
                    ratio(title, least, f"{payload}, {work}, {clients} × 1", ours, own)
                    if ours and own and all(cpp):
                        found[-1]["cpp"] = _ratios(*cpp)
    return found


def _ratios(ours: Sequence[Figures], other: Sequence[Figures]) -> tuple[float, float]:
    """Medians of the rounds' ratios: requests a second, and the other's CPU time for a request to ours."""
    by_rps = median(a.rps / max(b.rps, 1e-9) for a, b in zip(ours, other, strict=False))
    by_cpu = median(b.cpu_us / max(a.cpu_us, 1e-9) for a, b in zip(ours, other, strict=False))
    return round(by_rps, 3), round(by_cpu, 3)


def _verdict(by_rps: bool, by_cpu: bool, rounds: Sequence[Figures]) -> str:
    if any(figures.errors for figures in rounds):
        return "ERRORS: worth nothing"
    if by_rps != by_cpu:
        return "met by requests/s only" if by_rps else "met by CPU only"
    return _met(by_rps)


def _met(met: bool) -> str:
    return "met" if met else "NOT MET"


def _bars_text(results: Results) -> str:
    rows = []
    for bar in bars(results):
        figures = [f"p50 {bar['p50']:.2f} ×", ""] if "p50" in bar else [f"{bar['by_rps']:.2f}", f"{bar['by_cpu']:.2f}"]
        cpp = " · ".join(f"{figure:.2f}" for figure in bar.get("cpp", ()))
        rows.append([bar["bar"], bar["case"], *figures, cpp, bar["verdict"]])
    head = ["bar", "case", "by requests/s", "by CPU", "C++ gRPC, the same", ""]
    return (
        _table(head, rows)
        + "\n\nBy CPU: the other's CPU µs for one request to ours; hardly moves with the neighbours' load. "
        "C++ gRPC, the same: its own TLS to its own plaintext, by requests/s · by CPU."
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def _facts_text(title: str, facts: Mapping[str, Any], rounds: int) -> str:
    names = ("python", "grpcio", "protobuf", "uvloop", "libgrpc++", "openssl", "h2load", "onnxruntime")
    shared = "ONE CPU for both: worth little" if facts["server_and_raw_on_cpu"] == facts["load_on_cpu"] else ""
    lines = [
        f"# {title}, {facts['date']}, commit {facts['commit']}",
        "",
        f"* {facts['cpu']}, {facts['cpus_usable']} of {facts['cpus']} CPUs usable; server on CPU "
        f"{facts['server_and_raw_on_cpu']}, load on CPU {facts['load_on_cpu']}. {shared}".rstrip(),
        f"* Load average at the start: {facts['load_average_at_start']}. What else ran is not subtracted.",
        "* " + ", ".join(f"{name} {facts[name]}" for name in names if name in facts) + ".",
        f"* Medians; rounds: {rounds}. Loopback, closed loop.",
        "* CPU: user and system of all the server's threads, as the scheduler accounts it, in the middle of each run; "
        "opening connections is not in it.",
    ]
    if facts.get("settings"):
        lines.append("* Settings: " + ", ".join(f"{name}={value}" for name, value in facts["settings"].items()) + ".")
    return "\n".join(lines)


def _servers_text(results: Results) -> str:
    lines = [f"* {TITLES[name]}: {_ABOUT[name]}." for name in results.servers]
    lines += [f"* {TITLES[name]}: NO ROW, {why}." for name, why in results.skipped.items()]
    return "\n".join(lines)


def _load_text(
    results: Results, payload: str, work: str, show: Callable[[Sequence[Figures]], str], corner: str = ""
) -> str:
    rows = []
    for mode in MODES:
        for streams in STREAMS:
            for clients in CONNECTIONS:
                case = Case(payload, work, mode, clients, streams)
                cells = [results.load.get((case, server), []) for server in results.servers]
                if any(cells):
                    name = f"{_MODE_TITLES[mode]}, {clients} × {streams}"
                    rows.append([name, *(show(rounds) for rounds in cells)])
    return _table([corner, *(TITLES[server] for server in results.servers)], rows) if rows else ""


def _ciphers_text(results: Results) -> str:
    """Which cipher each server chose: they have different orders, and one is cheaper than the other."""
    chosen: dict[str, set[str]] = {}
    for (case, server), rounds in results.load.items():
        if case.mode != "plain":
            chosen.setdefault(server, set()).update(figures.cipher for figures in rounds)
    told = [f"{TITLES[server]} {' or '.join(sorted(ciphers))}" for server, ciphers in chosen.items()]
    return f"Ciphers: {', '.join(told)}." if told else ""


def _speed(rounds: Sequence[Figures]) -> str:
    limited = _median(rounds, "load_share") > _LIMITED > _median(rounds, "server_share") if rounds else False
    return _cell(
        rounds, lambda: f"{_rate(_median(rounds, 'rps'))}{'*' * limited} · {_number(_median(rounds, 'cpu_us'))}"
    )


def _latency(rounds: Sequence[Figures]) -> str:
    return _cell(rounds, lambda: f"{_median(rounds, 'p50_ms'):.3f} / {_median(rounds, 'p99_ms'):.3f}")


def _cell(rounds: Sequence[Figures], text: Callable[[], str]) -> str:
    """The figures, unless there were errors: then they are worth nothing."""
    if not rounds:
        return "–"
    return "ERRORS" if any(figures.errors for figures in rounds) else text()


def _errors(results: Results) -> list[str]:
    """A sentence for every cell with errors."""
    return [
        f"ERRORS, {TITLES[server]}, {_case_title(case)}: {problem}."
        for cells in (results.load, results.clients)
        for (case, server), rounds in cells.items()
        for problem in sorted({problem for figures in rounds if figures.errors for problem in figures.problems})
    ]


def _case_title(case: Case | str) -> str:
    if isinstance(case, str):
        return f"grpcio's client, {_MODE_TITLES[case]}"
    return f"{case.payload}, {case.work}, {_MODE_TITLES[case.mode]}, {case.connections} × {case.streams}"


def _clients_text(results: Results) -> str:
    rows = []
    for mode in MODES:
        cells = [results.clients.get((mode, server), []) for server in results.servers]
        if any(cells):
            rows.append([_MODE_TITLES[mode], *(_speed(rounds) for rounds in cells)])
            rows.append(["p50 / p99, ms", *(_latency(rounds) for rounds in cells)])
    if not rows:
        return "Not measured."
    about = (
        "Text, prepared reply. Two processes of `grpc.aio`, each with one connection and 4 calls in flight; deadline, "
    )
    about += "key and a new request id on every call. The clients, in Python, are the limit: compare the CPU µs."
    return about + "\n\n" + _table(["", *(TITLES[server] for server in results.servers)], rows)


def _handshakes_text(results: Results) -> str:
    rows = []
    for mode in MODES:
        cells = [results.handshakes.get((mode, server), []) for server in results.servers]
        if any(cells):
            row = [_MODE_TITLES[mode]]
            for rounds in cells:
                errors = sum(figures.errors for figures in rounds)
                limited = _median(rounds, "load_share") > _LIMITED
                rate = f"{_rate(_median(rounds, 'per_s'))}{'*' * limited} · {_number(_median(rounds, 'cpu_us'))}"
                row.append(f"{errors} ERRORS" if errors else rate)
            rows.append(row)
    if not rows:
        return "Not measured."
    about = "Connections a second · CPU µs of the server for one: TCP, TLS 1.3 without resumption (ECDSA P-256 on both "
    about += "sides), each side's first SETTINGS, close. `*`: the client, in Python, was the limit."
    return about + "\n\n" + _table(["", *(TITLES[server] for server in results.servers)], rows)


def _idle_text(results: Results) -> str:
    servers = [server for server in results.servers if any(name == server for _, name in results.idle)]
    rows = []
    for mode in MODES:
        cells = [results.idle.get((mode, server), []) for server in servers]
        if any(cells):
            row = [_MODE_TITLES[mode]]
            for rounds in cells:
                last = rounds[-1]
                count = f"{last.opened}" + (f" of {last.wanted}: {last.problem}" if last.problem else "")
                row.append(f"{last.bytes_each / 1024:.1f} kB each · {count} in {last.seconds:.0f} s")
            rows.append(row)
    if not rows:
        return "Not measured."
    about = (
        "Growth of the server's memory (PSS) for one open connection that says nothing after its SETTINGS; a server "
    )
    about += "started anew for each, measured once. The system's own memory for sockets is not in it."
    return about + "\n\n" + _table(["", *(TITLES[server] for server in servers)], rows)


def _digits_table(subject: Subject) -> str:
    rows = []
    for load in LOADS:
        rounds = subject.figures[load]
        figures = [_speed(rounds), _latency(rounds), f"{_median(rounds, 'server_share'):.0%}"]
        rows.append([f"{load[0]} × {load[1]}", *figures, f"{_median(rounds, 'load_share'):.0%}"])
    head = ["connections × streams", "requests/s · server CPU µs", "p50 / p99 ms", "server CPU", "load CPU"]
    return _table(head, rows)


def _median(rounds: Sequence[Any], name: str) -> float:
    return median(getattr(figures, name) for figures in rounds) if rounds else 0.0


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left and the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(head))]

    def text(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        return "| " + " | ".join([line[0].ljust(widths[0]), *cells[1:]]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def _rate(value: float) -> str:
    return f"{value / 1000:.1f} k" if value >= 1000 else f"{value:.0f}"


def _number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
