"""What goes wrong on real machines: each has an exit status, one clear line in the journal, and the remedy in it.

Each test breaks one thing on a machine that serves, looks, and mends it; the service must then start again.
"""

import contextlib
from collections.abc import Iterator

import pytest
from support.machines.installed import ETC, HOME, SERVICE, STATE, Installed
from support.machines.machine import Machine
from support.machines.packages import Packages
from support.machines.systems import Deb

MACHINE, ROOT_FS = "faults", "debian12"


@pytest.fixture(scope="module", autouse=True)
def _serving(machine: Machine, installed: Installed, packages: Packages) -> None:
    Deb(machine).install(packages)
    installed.set_up()
    installed.configure("[shutdown]\nlame_duck_s = 0\n")  # nobody balances here, and there are many stops
    installed.start()


@pytest.fixture(autouse=True)
def _mended(machine: Machine, installed: Installed) -> Iterator[None]:
    """Stopped before, and able to start after."""
    machine.run("systemctl", "stop", SERVICE)
    machine.run("systemctl", "reset-failed")
    yield
    machine.run("systemctl", "stop", SERVICE, check=False)
    machine.run("systemctl", "reset-failed")
    installed.start()
    assert installed.predict() == "two"


def _fails_with(machine: Machine, installed: Installed, status: int, *words: str, again: bool = False) -> None:
    """Start it: the exit status, and one error of the service's own that has these words and is one line.

    Args: again: whether systemd tries again by itself, because time may mend it.
    """
    before = machine.now()
    assert machine.run("systemctl", "start", SERVICE, check=False).returncode != 0
    entries = installed.journal("--priority=err", f"--since={before}")
    lines = [entry["MESSAGE"] for entry in entries if entry.get("SYSLOG_IDENTIFIER") == "inference-appliance"]
    assert lines, installed.said()
    assert len(set(lines)) == 1, lines
    assert "Traceback" not in lines[0]
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert int(machine.show(SERVICE, "ExecMainStatus")) == status, lines[0]
    assert (machine.show(SERVICE, "ActiveState") == "activating") == again


@contextlib.contextmanager
def _changed(machine: Machine, path: str, command: str) -> Iterator[None]:
    """A file changed by a command for a while."""
    machine.run("cp", "--archive", path, "/root/kept")
    try:
        machine.shell(command)
        yield
    finally:
        machine.run("cp", "--archive", "/root/kept", path)


class TestDisk:
    def test_a_full_disk_is_named_and_tried_again(self, machine: Machine, installed: Installed) -> None:
        """Not a file can be made any more. Somebody may free some space meanwhile."""
        _mount_full(machine, "nr_inodes=2")
        try:
            _fails_with(machine, installed, 6, STATE, "space", again=True)
        finally:
            machine.run("systemctl", "stop", SERVICE)
            machine.run("umount", STATE)

    def test_a_disk_that_fills_up_does_not_stop_answers(self, machine: Machine, installed: Installed) -> None:
        """What is only remembered for the next start cannot be written; calls go on."""
        installed.start()
        _mount_full(machine, "nr_inodes=1000")
        try:
            with installed.load(callers=2) as load:
                machine.run("systemctl", "reload", SERVICE)
            assert load.outcome.lost == 0, load.outcome
            assert load.outcome.answered > 0, load.outcome
            assert installed.active() == "active"
        finally:
            machine.run("umount", STATE)

    def test_a_command_that_would_write_says_so(self, machine: Machine) -> None:
        _mount_full(machine, "nr_inodes=1000")
        try:
            done = machine.run("appliance", "models", "add", f"{HOME}/models/digits", check=False)
        finally:
            machine.run("umount", STATE)
        assert done.returncode == 6
        assert len(done.stderr.strip().splitlines()) == 1
        assert STATE in done.stderr


def _mount_full(machine: Machine, limit: str) -> None:
    """A file system without a byte to spare in the place of the state folder."""
    options = f"size=64k,{limit},mode=750,uid=$(id -u inference-appliance),gid=$(id -g inference-appliance)"
    machine.shell(
        f"mount -t tmpfs -o {options} full {STATE}; mkdir {STATE}/models || true; "
        f"dd if=/dev/zero of={STATE}/filler 2>/dev/null || true"
    )


class TestReadOnly:
    @pytest.fixture(autouse=True)
    def _read_only_etc(self, machine: Machine, _mended: None) -> Iterator[None]:
        machine.shell("mount --bind /etc /etc && mount -o remount,ro,bind /etc")
        yield
        machine.run("umount", "/etc")

    def test_the_service_needs_no_writable_etc(self, installed: Installed) -> None:
        installed.start()
        assert installed.predict() == "two"

    def test_a_command_that_would_write_says_so(self, machine: Machine) -> None:
        done = machine.run("appliance", "keys", "create", check=False)
        assert done.returncode == 5
        assert len(done.stderr.strip().splitlines()) == 1
        assert f"{ETC}/keys.json" in done.stderr
        assert "Read-only" in done.stderr


class TestPermissions:
    @pytest.mark.parametrize("name", ["keys.json", "appliance.toml"])
    def test_a_file_that_the_service_may_not_read_is_named(
        self, machine: Machine, installed: Installed, name: str
    ) -> None:
        path = f"{ETC}/{name}"
        with _changed(machine, path, f"chown root:root {path} && chmod 600 {path}"):
            _fails_with(machine, installed, 5, path, "chgrp inference-appliance")

    def test_a_key_that_it_may_not_read_is_named(self, machine: Machine, installed: Installed) -> None:
        path = f"{ETC}/tls/server.key"
        with _changed(machine, path, f"chown root:root {path} && chmod 600 {path}"):
            _fails_with(machine, installed, 3, path)

    def test_a_state_folder_that_it_may_not_write_is_mended_by_systemd(
        self, machine: Machine, installed: Installed
    ) -> None:
        """StateDirectory= gives the folder to the service at every start."""
        machine.run("chown", "-R", "root:root", STATE)
        installed.start()
        assert machine.run("stat", "--format=%U", STATE).stdout.strip() == "inference-appliance"


class TestConfiguration:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("[limits]\ninputs_per_request = 1000\n", ("limits.inputs_per_request", "128")),
            ("[limits]\ninputs_per_requets = 3\n", ("inputs_per_requets", "inputs_per_request")),
            ("[limits\n", ("90-wrong.toml",)),
        ],
    )
    def test_a_wrong_key_is_named_with_file_and_remedy(
        self, machine: Machine, installed: Installed, text: str, words: tuple[str, ...]
    ) -> None:
        installed.configure(text, "90-wrong.toml")
        try:
            _fails_with(machine, installed, 2, "90-wrong.toml", *words)
            assert machine.run("appliance", "check", check=False).returncode == 2
        finally:
            machine.run("rm", f"{ETC}/conf.d/90-wrong.toml")

    def test_a_certificate_without_its_key_is_named(self, machine: Machine, installed: Installed) -> None:
        path = f"{ETC}/tls/server.key"
        with _changed(machine, path, f"rm {path}"):
            _fails_with(machine, installed, 3, path)


class TestPorts:
    def test_a_port_that_is_taken_is_named_and_tried_again(self, machine: Machine, installed: Installed) -> None:
        machine.run("systemd-run", "--unit=other", "--socket-property=ListenStream=[::]:8443", "true")
        try:
            _fails_with(machine, installed, 4, "8443", "ss -ltnp", "server.listen", again=True)
        finally:
            machine.run("systemctl", "stop", SERVICE, "other.socket")

    def test_it_starts_by_itself_when_the_port_is_free_again(self, machine: Machine, installed: Installed) -> None:
        machine.run("systemd-run", "--unit=other", "--socket-property=ListenStream=[::]:8443", "true")
        machine.run("systemctl", "start", SERVICE, check=False)
        machine.run("systemctl", "stop", "other.socket")
        machine.wait(lambda: installed.active() == "active", "the service starts by itself")


class TestNothingToServe:
    def test_an_empty_catalog_is_no_reason_for_the_watchdog(self, machine: Machine, installed: Installed) -> None:
        """Three periods of a watchdog that is more impatient than ours."""
        machine.shell(f"mv {STATE}/models {STATE}/kept; install -d -o inference-appliance -m 750 {STATE}/models")
        installed.drop_in("[Service]\nWatchdogSec=2\n")
        try:
            installed.start()
            fed = int(machine.show(SERVICE, "WatchdogTimestampMonotonic"))
            machine.wait(
                lambda: int(machine.show(SERVICE, "WatchdogTimestampMonotonic")) > fed + 6_000_000,
                "it goes on being fed",
            )
            assert (installed.active(), installed.restarts(), installed.ready()) == ("active", 0, [])
        finally:
            installed.drop_in("")
            machine.shell(f"systemctl stop {SERVICE}; rmdir {STATE}/models; mv {STATE}/kept {STATE}/models")
