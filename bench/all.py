"""Everything that the bars stand on, one after the other, and a table of the bars. On a quiet machine: about two hours.

With --quick half an hour, to see that all of it works; its figures are rough. What each command writes is there too.
"""

import importlib
from datetime import UTC, datetime

from bench.common import Bar, Run, bars_table, parser, write

_STEPS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "served": ("served", (), ("--connections", "1,8", "--batches", "1,8")),
    "open": ("fixed_rate", (), ("--models", "digits,minilm", "--connections", "8", "--batches", "1,8")),
    "stages": ("stages", (), ("--models", "digits", "--seconds", "4")),
    "stages of 128": ("stages", ("--models", "digits", "--batch", "128", "--connections", "8"), ("--seconds", "4")),
    "growth": ("growth", (), ()),
    "loading": ("loading", (), ("--seconds", "4", "--repeat", "2")),
    "kill": ("kill", (), ("--seconds", "8", "--repeat", "1")),
    "peers": ("peers.run", (), ("--models", "m1,m3")),
    "memory": ("memory", (), ()),
}
"""Step → module, options, options more with --quick."""


def main(arguments: list[str]) -> None:
    """Run the steps; one that fails is named, and the others go on."""
    run = Run(parser("all", __doc__, seconds=0.0).parse_args(arguments))
    bars: list[Bar] = []
    failed: dict[str, str] = {}
    for step, (module, options, quick) in _STEPS.items():
        run.say(f"==== {step}")
        given = [*options, *(("--quick", *quick) if run.options.quick else ()), "--out", str(run.options.out)]
        given += ["--server-cpus", str(run.options.server_cpus), "--settings", run.options.settings]
        given += [] if step == "kill" else ["--mode", run.mode]  # kills need the processes
        try:
            bars += importlib.import_module(f"bench.{module}").main(given) or []
        except (RuntimeError, OSError) as error:
            failed[step] = str(error)
            run.say(f"{step} failed: {error}")
    lines = [
        *run.head("The bars"),
        "",
        bars_table(bars),
        "",
        *(f"* {step} FAILED: {why}" for step, why in failed.items()),
    ]
    print("\n".join(lines))
    content = {"machine": run.facts, "bars": [[bar.name, bar.wanted, bar.measured, bar.met] for bar in bars]}
    name = f"{datetime.now(UTC):%Y-%m-%d}-bars" + ("-quick" if run.options.quick else "")
    write(run.options.out, name, "\n".join(lines), content | {"failed": failed})
