"""Runs in the virtual machine (`virtual`), on the packages' own Python: what the kernel makes of the unit's limits.

Prints a line of JSON for each thing that was looked at, [name, what was found], and "end".
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SERVICE = "inference-appliance.service"
HOME = Path("/usr/lib/inference-appliance")
PATIENCE_S = 400.0
_HOLD = "import sys; held = bytearray(b'x') * int(sys.argv[1])"
_MANY = "import threading; [threading.Thread(target=threading.Event().wait, daemon=True).start() for _ in range(8)]"
_SEEN = "from appliance.core.machine import usable_cpus, usable_memory; print(usable_cpus(), usable_memory())"


def say(name: str, found: object) -> None:
    print(json.dumps([name, found]), flush=True)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout.strip()


def status(*command: str) -> int:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


def show(name: str) -> str:
    return run("systemctl", "show", "--value", f"--property={name}", SERVICE)


def predict() -> str:
    return run("appliance", "predict", "digits", HOME / "share/samples/digit-2.png", "--key-file", "/root/pat")


def engine() -> str:
    return run("pgrep", "--full", "appliance.daemon.engine_process").partition("\n")[0]


def wait(happened: Callable[[], object]) -> None:
    """Until it has, or long enough: what is said then tells."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.5)


def in_unit(code: str, *arguments: str, spared: bool = False) -> str:
    """What lines of Python print in the unit's control group. Args: spared: the kernel shall end others for memory."""
    group = Path(f"/sys/fs/cgroup{show('ControlGroup')}")

    def join() -> None:
        if spared:
            Path("/proc/self/oom_score_adj").write_text("-1000")
        (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-I", "-c", code, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=join, check=False).stdout.strip()


def main() -> None:
    say("controllers", Path("/sys/fs/cgroup/cgroup.controllers").read_text())
    say("cpu", next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")))
    unit = ("systemd-run", "--quiet", "--wait", "--collect")
    big = (sys.executable, "-I", "-c", _HOLD, str(100 << 20))
    say("memory_probe", [status(*unit, f"--property=MemoryMax={limit}", *big) for limit in ("infinity", "32M")])
    many = (sys.executable, "-I", "-c", _MANY)
    say("tasks_probe", [status(*unit, f"--property=TasksMax={limit}", *many) for limit in ("infinity", "4")])

    wait(lambda: show("ActiveState") in ("active", "failed"))
    say("state", show("ActiveState"))
    say("predict", predict())
    say("failed", run("systemctl", "--failed", "--quiet", "--no-legend"))
    say("limits", Path(f"/proc/{show('MainPID')}/limits").read_text())
    group = Path(f"/sys/fs/cgroup{show('ControlGroup')}")
    say("group", {name: (group / name).read_text().strip() for name in ("memory.max", "cpu.max", "pids.max")})
    say("seen", in_unit(_SEEN))
    say("cpu.stat", (group / "cpu.stat").read_text())

    # Something takes all the memory that the unit has left, and more. The kernel shall take it from the engine.
    before = engine()
    Path(f"/proc/{before}/oom_score_adj").write_text("1000")
    taken = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
    in_unit(_HOLD, str(int((group / "memory.max").read_text()) - int(taken) + (32 << 20)), spared=True)
    wait(lambda: engine() not in ("", before))
    say("engines", [before, engine()])
    say("memory.events", (group / "memory.events").read_text())
    say("predict_again", predict())
    say("state_again", [show("ActiveState"), show("NRestarts")])


try:
    main()
finally:
    with contextlib.suppress(OSError):
        say("journal", run("journalctl", f"--unit={SERVICE}", "--no-pager", "--output=cat", "--lines=60"))
    print("end", flush=True)
