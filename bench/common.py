"""What all commands share: their options, facts about the machine, tables, files."""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.cpu import Cpus, choose_cpus
from bench.server import MODES
from bench.workload import ROOT, WORKLOADS

_BUSY = 1.0
"""Load average from which somebody else must have been at work."""
_PACKAGES = ("grpcio", "onnxruntime", "protobuf", "numpy", "pillow", "uvloop", "clarifai-grpc")


def parser(name: str, text: str, *, seconds: float, repeat: int = 3) -> argparse.ArgumentParser:
    """The options that all commands have. Args: text: what it measures. seconds: default of one measurement."""
    made = argparse.ArgumentParser(prog=f"python -m bench {name}", description=text)
    made.set_defaults(name=name, default_seconds=seconds, default_repeat=repeat)
    made.add_argument("--quick", action="store_true", help="one short repetition, to see that it works")
    made.add_argument("--seconds", type=float, help=f"length of one measurement; default {seconds:g}")
    made.add_argument("--repeat", type=int, help=f"repetitions; default {repeat}")
    made.add_argument(
        "--mode", choices=MODES, default="default", help="processes of the daemon; default: its own choice"
    )
    made.add_argument("--server-cpus", type=int, default=1, metavar="N", help="CPUs of the server; the others load it")
    made.add_argument("--settings", default="", metavar="TOML", help="more of the daemon's configuration")
    made.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for the results")
    return made


def of_workloads(made: argparse.ArgumentParser, default: Sequence[str]) -> argparse.ArgumentParser:
    """Adds --models."""
    known = ", ".join(WORKLOADS)
    made.add_argument("--models", type=names, default=tuple(default), help=f"of {known}; default {','.join(default)}")
    return made


def names(text: str) -> tuple[str, ...]:
    """a,b → ("a", "b")."""
    return tuple(part for part in text.split(",") if part)


def numbers(text: str) -> tuple[int, ...]:
    """1,8 → (1, 8)."""
    return tuple(int(part) for part in names(text))


@dataclass(frozen=True, slots=True)
class Bar:
    """What must be shown, and what was."""

    name: str
    wanted: str
    measured: str
    met: bool


class Run:
    """One run of a command: its options, what it writes, and the bars that it can tell of.

    Attributes: part: of the results' names, where one command measures several things.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.mode: str = options.mode
        self.settings: str = options.settings.replace("\\n", "\n")
        self.seconds: float = options.seconds or (0.5 if options.quick else options.default_seconds)
        self.repeat: int = options.repeat or (1 if options.quick else options.default_repeat)
        self.cpus = choose_cpus(options.server_cpus)
        self.part = ""
        self.facts = machine_facts(self.cpus) | {"mode": self.mode, "command": options.name}
        self.bars: list[Bar] = []
        self._begun = time.monotonic()

    def say(self, sentence: str) -> None:
        """On the terminal, with the seconds since the begin."""
        print(f"{time.monotonic() - self._begun:6.0f} s  {sentence}", flush=True)

    def expect(self, seconds: float) -> None:
        """Say how long this will take."""
        self.say(f"this takes about {max(1, round(seconds / 60))} min")

    def _whole(self, content: Mapping[str, Any]) -> dict[str, Any]:
        return {"machine": self.facts, "bars": [asdict(bar) for bar in self.bars], **content}

    def head(self, title: str, *more: str) -> list[str]:
        """The first lines of every result."""
        return head(self.facts, title, f"Medians of {self.repeat} repetitions.", *more)

    def bar(self, name: str, wanted: str, measured: str, met: bool) -> str:
        """Keep a bar. Returns: a sentence about it."""
        self.bars.append(Bar(name, wanted, measured, met))
        return f"The bar, {name} {wanted}: {measured}, {'met' if met else 'MISSED'}."

    def write(self, text: str, content: Mapping[str, Any], charts: Mapping[str, str] | None = None) -> None:
        """Print the text; write it, the content as JSON, and the charts."""
        print(text)
        parts = [f"{datetime.now(UTC):%Y-%m-%d}-{self.options.name}"]
        parts += [self.part] if self.part else []
        parts += [self.mode] if self.mode != "default" else []
        parts += ["quick"] if self.options.quick else []
        for file in write(self.options.out, "-".join(parts), text, self._whole(content), charts or {}):
            print(f"written: {file.name}")


def bars_table(bars: Sequence[Bar]) -> str:
    """For a report."""
    rows = [[bar.name, bar.wanted, bar.measured, "met" if bar.met else "MISSED"] for bar in bars]
    return table(["bar", "wanted", "measured", ""], rows)


def head(facts: Mapping[str, Any], title: str, *more: str) -> list[str]:
    """Title and facts as Markdown."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", *_PACKAGES))
    where = (
        f"ONE CPU for both sides ({facts['load_on_cpu']}): the load takes from the server"
        if facts["shared"]
        else f"server and raw figures on CPU {facts['server_and_raw_on_cpu']}, load on CPU {facts['load_on_cpu']}"
    )
    lines = [
        f"# {title}, {facts['date']}, commit {facts['commit']}",
        "",
        f"* {facts['cpu']}, {facts['cpus_usable']} of {facts['cpus']} CPUs usable; {where}.",
        f"* Load average at the start: {facts['load_average_at_start']}. What else ran is not subtracted."
        + (" PROVISIONAL: others used this machine." if facts["load_average_at_start"] > _BUSY else ""),
        f"* {versions}.",
    ]
    if facts.get("mode", "default") != "default":
        lines.append(f"* The daemon's processes: {facts['mode']}.")
    lines += [f"* {sentence}" for sentence in more]
    if facts["settings"]:
        lines.append("* Settings: " + ", ".join(f"{name}={value}" for name, value in facts["settings"].items()) + ".")
    return lines


def write(
    folder: Path, name: str, text: str, content: Mapping[str, Any], charts: Mapping[str, str] | None = None
) -> list[Path]:
    """Write the Markdown, the figures as JSON, the plots. Args: charts: name → SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}.md": text, folder / f"{name}.json": json.dumps(content, indent=1, ensure_ascii=False)}
    files |= {folder / f"{name}-{chart}.svg": drawn for chart, drawn in (charts or {}).items()}
    for file, written in files.items():
        file.write_text(written.rstrip("\n") + "\n", encoding="utf-8")
    return list(files)


def between_markers(page: str, made_by: str, text: str) -> str:
    """The page with `text` between its two comments "made by …: begin" and "… end". Raises: ValueError: it has none."""
    begin, end = (f"<!-- made by {made_by}: {mark} -->" for mark in ("begin", "end"))
    before, found, rest = page.partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise ValueError(f"the page has no {begin} with an end behind it")
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def machine_facts(cpus: Cpus) -> dict[str, Any]:
    """What somebody must know to compare; nothing that names the machine or its folders."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "server_and_raw_on_cpu": ", ".join(map(str, cpus.server)),
        "load_on_cpu": ", ".join(map(str, cpus.load)),
        "shared": cpus.shared,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "settings": {name: value for name, value in os.environ.items() if name.startswith("APPLIANCE_")},
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right."""
    widths = [max(len(line[index]) for line in [head, *rows]) for index in range(len(head))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [head, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _commit() -> str:
    """The commit, and whether the product differs from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changed = _git("status", "--porcelain", "--", "appliance", "models", "bench")
    return f"{commit} with local changes" if changed else commit


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
