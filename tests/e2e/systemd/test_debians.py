"""The same deb on Debian 11, 12 and 13 with no Python but its own: install, set up, serve, remove."""

from collections.abc import Callable, Iterator

import pytest
from support.machines.installed import PACKAGES, SERVICE, Installed
from support.machines.machine import Machine
from support.machines.measured import Measured
from support.machines.packages import Packages
from support.machines.systems import Deb, describe


@pytest.fixture(scope="module", params=["debian11", "debian12", "debian13"])
def machine(
    request: pytest.FixtureRequest, boot: Callable[[str, str], Machine], put_away: Callable[[Machine], None]
) -> Iterator[Machine]:
    """One of each."""
    made = boot(request.param, request.param)
    yield made
    put_away(made)


def test_there_is_no_python(machine: Machine) -> None:
    assert machine.shell("ls /usr/bin/python* /usr/local/bin/python* 2>/dev/null || true").stdout == ""


def test_it_installs_and_serves(machine: Machine, installed: Installed, packages: Packages, measured: Measured) -> None:
    row = describe(machine, packages, Deb(machine, reads_zstd=not machine.name.endswith("11")), measured)
    assert machine.state() == "running"
    installed.set_up()
    row.ready_s = installed.start()
    assert installed.predict() == "two"


def test_it_says_nothing_bad(machine: Machine, installed: Installed) -> None:
    """systemd 247 names, at every reload, the one setting of the unit that came with 248."""
    said = installed.said("--priority=warning").splitlines()
    assert [line for line in said if not (_is_old(machine) and "'PrivateIPC'" in line)] == []
    assert machine.state() == "running"


def test_its_files_are_as_in_the_package(machine: Machine) -> None:
    assert machine.run("dpkg", "--verify", "inference-appliance").stdout == ""


def test_its_unit_is_understood(machine: Machine) -> None:
    """Settings that systemd does not know yet are warnings."""
    done = machine.run("systemd-analyze", "verify", "--man=no", SERVICE, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if not (_is_old(machine) and "'PrivateIPC'" in line)] == []
    assert done.returncode == 0


def _is_old(machine: Machine) -> bool:
    """Whether its systemd is 247, the oldest that we take."""
    return machine.run("systemctl", "--version").stdout.split()[1] == "247"


def test_it_goes_without_a_trace_of_a_process(machine: Machine, installed: Installed) -> None:
    Deb(machine).remove()
    assert installed.active() == "inactive"
    assert machine.run("pgrep", "--full", PACKAGES + "|inference-appliance", check=False).stdout == ""
    assert machine.state() == "running"
