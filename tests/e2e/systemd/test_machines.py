"""What the other tests stand on: machines are alone, their sandbox is enforced, and nothing of them stays behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.appliance import ROOT
from support.machines import roots
from support.machines.machine import PATIENCE_S, Machine, clear_leftovers
from support.waiting import eventually

MACHINE, ROOT_FS = "alone", "debian12"

_BOOT_AND_WAIT = """
import sys
from pathlib import Path
from support.machines.machine import Machine
machine = Machine("orphan", Path(sys.argv[1]), Path(sys.argv[2])).boot()
print(machine.run("cat", "/proc/1/cgroup").stdout, flush=True)
sys.stdin.read()
"""


def test_systemd_runs_and_has_no_failed_unit(machine: Machine) -> None:
    assert machine.state() == "running"


def test_a_machine_has_no_way_out_but_to_its_clients(machine: Machine) -> None:
    """An installation that needed the network would fail."""
    assert sorted(machine.run("ls", "/sys/class/net").stdout.split()) == ["host0", "lo"]
    assert "default" not in machine.run("ip", "route").stdout
    assert "default" not in machine.outside("ip", "route").stdout


def test_what_a_machine_writes_does_not_reach_its_root(machine: Machine) -> None:
    machine.write("/etc/written", "by a test")
    assert not (roots.RECIPES[ROOT_FS].folder / "etc/written").exists()


@pytest.mark.usefixtures("enforced")
def test_addresses_and_devices_are_really_kept_out() -> None:
    """The probe's answer, so that a report shows it: passed, or skipped with what is not enforced."""


def test_nothing_stays_when_the_tests_are_killed(tmp_path: Path) -> None:
    """kill -9 of the process that booted a machine ends all of it; an empty cgroup goes at the next start."""
    command = [sys.executable, "-c", _BOOT_AND_WAIT, str(roots.RECIPES[ROOT_FS].folder), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as tests:
        assert tests.stdout is not None
        assert tests.stdout.readline()
        assert _processes_with(str(tmp_path))
        tests.send_signal(signal.SIGKILL)
    eventually(lambda: not _processes_with(str(tmp_path)), PATIENCE_S)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text(encoding="utf-8")
    assert [name for name in clear_leftovers() if name.endswith("-orphan")]
    assert not clear_leftovers()


def _processes_with(text: str) -> list[int]:
    """Processes with that in their command line, other than this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in line and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def test_a_machine_is_shut_down_cleanly(boot: Callable[[str, str], Machine], tmp_path: Path) -> None:
    machine = Machine("brief", roots.RECIPES[ROOT_FS].folder, tmp_path)
    with machine:
        assert machine.power_off() < PATIENCE_S
