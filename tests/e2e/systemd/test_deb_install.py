"""The deb on a Debian 12 without a network: what is there after the installation, and what is not."""

import re

import pytest
from support.appliance import ROOT
from support.machines.installed import ETC, HOME, PACKAGES, SERVICE, SOCKET, STATE, Installed
from support.machines.machine import Machine
from support.machines.measured import Measured, System
from support.machines.packages import Packages
from support.machines.systems import Deb, describe

MACHINE, ROOT_FS = "install", "debian12"
_MOST = 70e6
"""Bytes that the zstd deb without CUDA may have."""
_BEGUN = "/root/installation-begun"


@pytest.fixture(scope="module", autouse=True)
def system(machine: Machine, packages: Packages, measured: Measured) -> System:
    """The machine with the package installed, as the operator does it."""
    machine.write(_BEGUN, machine.now())
    return describe(machine, packages, Deb(machine), measured)


def since_installation(machine: Machine, *options: str) -> str:
    """What the journal has since then."""
    since = f"--since={machine.read(_BEGUN)}"
    return machine.run("journalctl", since, "--quiet", "--output=cat", "--no-pager", *options).stdout


def test_it_is_small(packages: Packages) -> None:
    assert packages.size(packages.deb) <= _MOST


class TestQuiet:
    """A fresh installation waits for its operator without a word of complaint."""

    def test_no_unit_has_failed(self, machine: Machine) -> None:
        assert machine.state() == "running"
        assert not machine.run("systemctl", "--failed", "--quiet", "--no-legend").stdout

    def test_the_service_is_enabled_and_not_started(self, machine: Machine) -> None:
        assert machine.show(SERVICE, "UnitFileState") == "enabled"
        assert machine.show(SERVICE, "ActiveState") == "inactive"
        assert machine.show(SERVICE, "ConditionResult") == "no"
        assert machine.show(SOCKET, "UnitFileState") == "disabled"

    def test_the_journal_has_no_warning(self, machine: Machine) -> None:
        """Since the installation began: a container's own systemd has said something before."""
        assert since_installation(machine, "--priority=warning") == ""

    def test_logcheck_would_be_quiet(self, machine: Machine) -> None:
        """What the service's units say before there is a certificate, and apart from that nothing."""
        said = since_installation(machine, f"--unit={SERVICE}", f"--unit={SOCKET}")
        assert [line for line in said.splitlines() if "was skipped because of" not in line] == []

    def test_a_start_by_hand_is_quiet_too(self, machine: Machine) -> None:
        machine.run("systemctl", "start", SERVICE)
        assert machine.show(SERVICE, "ActiveState") == "inactive"
        assert machine.state() == "running"


class TestFiles:
    def test_they_are_as_in_the_package(self, machine: Machine) -> None:
        assert machine.run("dpkg", "--verify", "inference-appliance").stdout == ""

    def test_units_lie_in_usr_lib_alone(self, machine: Machine) -> None:
        listed = machine.run("dpkg", "--listfiles", "inference-appliance").stdout.splitlines()
        units = [path for path in listed if path.endswith((".service", ".socket"))]
        assert units
        assert all(path.startswith(("/usr/lib/systemd/", "/lib/systemd/")) for path in units)

    def test_the_configuration_is_readable_by_the_service_alone(self, machine: Machine) -> None:
        for place, mode in (("", "750"), ("/appliance.toml", "640"), ("/conf.d", "750"), ("/tls", "750")):
            assert _stat(machine, f"{ETC}{place}") == f"{mode} root:inference-appliance", place

    def test_state_belongs_to_the_service(self, machine: Machine) -> None:
        for place in ("", "/models"):
            assert _stat(machine, f"{STATE}{place}").endswith(" inference-appliance:inference-appliance"), place

    def test_nothing_that_is_installed_may_be_written_by_the_service(self, machine: Machine) -> None:
        found = machine.run("find", HOME, "!", "-user", "root", "-o", "-perm", "/022", "!", "-type", "l").stdout
        assert found == ""

    def test_the_tests_have_not_made_bytecode(self, machine: Machine) -> None:
        """What Python would write beside its modules, dpkg would neither know nor remove."""
        machine.run("appliance", "--version")
        assert machine.run("find", HOME, "-newer", "/etc/machine-id", "-type", "f").stdout == ""

    def test_there_is_a_user_without_login(self, machine: Machine) -> None:
        assert machine.run("getent", "passwd", "inference-appliance").stdout.strip().endswith("/nologin")


class TestUnits:
    @pytest.mark.parametrize("unit", [SERVICE, SOCKET])
    def test_systemd_has_nothing_to_say_against_them(self, machine: Machine, unit: str) -> None:
        done = machine.run("systemd-analyze", "verify", "--man=yes", unit)
        assert (done.stdout, done.stderr) == ("", "")

    def test_the_service_is_exposed_to_1_0_at_most(self, machine: Machine, measured: Measured) -> None:
        exposure = _exposure(machine)
        assert exposure <= 1.0
        measured.fact("`systemd-analyze security`", "Debian 12", f"exposure {exposure}")

    def test_with_the_gpu_drop_in_to_1_2(self, machine: Machine, measured: Measured) -> None:
        place = f"/run/systemd/system/{SERVICE}.d/10-cuda.conf"
        machine.write(place, (ROOT / "systemd" / "10-cuda.conf").read_bytes())
        machine.run("systemctl", "daemon-reload")
        try:
            exposure = _exposure(machine)
        finally:
            machine.run("rm", place)
            machine.run("systemctl", "daemon-reload")
        assert exposure <= 1.2
        measured.fact("`systemd-analyze security` with the GPU drop-in", "Debian 12", f"exposure {exposure}")


def test_the_manual_is_there(machine: Machine) -> None:
    for page in ("inference-appliance.8", "appliance.1", "appliance.toml.5"):
        name, section = page.rsplit(".", 1)
        assert machine.run("man", "--where", section, name).stdout.strip(), page


def test_it_installs_again_over_itself(installed: Installed, packages: Packages) -> None:
    installed.machine.run("apt-get", "install", "--yes", "--reinstall", f"./{packages.deb}", cwd=PACKAGES)
    assert installed.machine.state() == "running"


def _stat(machine: Machine, path: str) -> str:
    return machine.run("stat", "--format=%a %U:%G", path).stdout.strip()


def _exposure(machine: Machine) -> float:
    """What `systemd-analyze security` says last: 0 is nothing, 10 everything."""
    said = machine.run("systemd-analyze", "security", "--no-pager", SERVICE).stdout.splitlines()[-1]
    found = re.search(r"(\d+\.\d+)", said)
    assert found, said
    return float(found.group(1))
