"""An appliance that is enrolled with an orchestrator on another machine: set up, let through, registered, left.

The tests follow each other on one machine. No clients are let in, so that what passes is the orchestrator's alone.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support.appliance import Pki, run
from support.machines.installed import ETC, SERVICE, Installed
from support.machines.machine import HOST, OUTSIDE, Machine
from support.machines.measured import Measured
from support.machines.packages import Packages
from support.machines.systems import Deb

MACHINE, ROOT_FS = "enrolled", "debian12"
_NAME, _PORT = "centre.example", 9443
_DROP_IN = f"/etc/systemd/system/{SERVICE}.d/20-clients.conf"
_TIMED_OUT = 124
_CONNECT = f"timeout 3 bash -c 'exec 3<>/dev/tcp/{OUTSIDE}/{_PORT}'"


@pytest.fixture(scope="module")
def centre(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCentre]:
    """A centre on the machine's other side, with a certificate of its own authority."""
    folder = tmp_path_factory.mktemp("centre")
    tls = folder / "tls"
    run("certs", "init", "--dir", tls)
    run("certs", "issue", "server", "--dir", tls, "--san", _NAME)
    settings = {"listen": f"{OUTSIDE}:{_PORT}"}
    with RunningCentre(folder, Pki(tls), settings, prefix=tuple(machine.beside())) as made:
        made.tell("admit", pat=PAT, user=USER)
        machine.shell(f"echo {OUTSIDE} {_NAME} >> /etc/hosts")
        machine.write("/root/centre-ca.crt", Pki(tls).ca.read_text())
        machine.write("/root/centre-pat", f"{PAT}\n", 0o600)
        yield made


@pytest.fixture(scope="module", autouse=True)
def _serving(machine: Machine, packages: Packages, centre: RunningCentre) -> None:
    """Set up with an orchestrator by flags, and with no clients."""
    Deb(machine).install(packages)
    machine.run("install", "-m", "644", "/root/centre-ca.crt", f"{ETC}/tls/orchestrator-ca.crt")
    where = ["--orchestrator-api-base", f"https://{_NAME}:{_PORT}", "--orchestrator-user-id", USER]
    where += ["--orchestrator-root-ca", f"{ETC}/tls/orchestrator-ca.crt", "--orchestrator-pat-file", "/root/centre-pat"]
    said = machine.run("appliance", "setup", "--yes", "--base-url", f"https://{HOST}:8443", *where).stdout
    assert f"enrolled with https://{_NAME}:{_PORT} as {USER}" in said
    assert f"wrote {_DROP_IN}" in said
    machine.run("systemctl", "start", SERVICE)


def test_the_service_reads_the_pat_and_others_do_not(machine: Machine) -> None:
    found = machine.run("stat", "--format=%a %U:%G", f"{ETC}/orchestrator.pat").stdout.strip()
    assert found == "640 root:inference-appliance"
    machine.run("runuser", "-u", "inference-appliance", "--", "test", "-r", f"{ETC}/orchestrator.pat")
    assert PAT not in machine.run("journalctl", "--no-pager", "--all").stdout


def test_the_rule_has_the_orchestrator_and_no_clients(machine: Machine) -> None:
    assert f"{OUTSIDE}/32" in machine.show(SERVICE, "IPAddressAllow").split()
    said = machine.run("appliance", "doctor").stdout
    assert "only programs on this machine may connect" in said


@pytest.mark.usefixtures("enforced")
def test_packets_of_the_service_get_there(machine: Machine, installed: Installed) -> None:
    """And without the drop-in they do not: doctor names that cause, and setup mends it."""
    assert installed.in_unit(_CONNECT) == 0
    machine.shell(f"mv {_DROP_IN} /root/kept && systemctl daemon-reload && systemctl restart {SERVICE}")
    assert installed.in_unit(_CONNECT) == _TIMED_OUT
    said = machine.run("appliance", "doctor", check=False).stdout
    assert f"{OUTSIDE}, a name server or on the way to the orchestrator, is not let through either" in said
    machine.run("appliance", "setup", "--yes", "--no-samples")
    machine.run("systemctl", "restart", SERVICE)
    assert machine.read(_DROP_IN) == machine.read("/root/kept")
    assert installed.in_unit(_CONNECT) == 0


def test_doctor_goes_the_whole_way(machine: Machine) -> None:
    lines = [line for line in machine.run("appliance", "doctor").stdout.splitlines() if " orchestrator " in line]
    assert [line.split()[0] for line in lines] == ["ok"] * 4, lines
    assert f"{_NAME} is {OUTSIDE}" in lines[0]


def test_the_agent_registers_from_inside_the_unit_and_leave_takes_it_back(
    machine: Machine, centre: RunningCentre, measured: Measured
) -> None:
    machine.wait(lambda: "PostNodepools" in centre.calls(), "the agent registers")
    plan = ("appliance", "orchestrator", "plan")
    machine.wait(lambda: "nothing differs" in machine.run(*plan, check=False).stdout, "everything is registered")
    said = machine.run("appliance", "orchestrator", "leave").stdout
    assert f"removed {_DROP_IN}" in said
    machine.run("systemctl", "restart", SERVICE)
    assert not machine.exists(f"{ETC}/orchestrator.pat")
    assert OUTSIDE not in machine.show(SERVICE, "IPAddressAllow")
    assert " orchestrator " not in machine.run("appliance", "doctor").stdout
    measured.fact("setup, doctor, sync and leave with an orchestrator on another machine", "Debian 12", "done")


def test_the_pat_was_nowhere_but_in_its_file(machine: Machine, tmp_path: Path) -> None:
    machine.run("rm", "/root/centre-pat")
    found = machine.run("grep", "--recursive", "--files-with-matches", PAT, "/etc", "/var", "/root", check=False)
    assert found.stdout == ""
