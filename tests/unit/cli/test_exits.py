"""Exit statuses: each kind of fault has its own, and the unit's list of those that a restart cannot mend fits."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Command, without_privileges

from appliance.cli import exits
from appliance.core.errors import (
    AccessRefused,
    AddressError,
    ApplianceError,
    CertificateError,
    ConfigError,
    DeviceError,
    DiskFull,
)
from appliance.core.files import file_error

UNIT = Path(__file__).parents[3] / "systemd" / "inference-appliance.service"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (ApplianceError("x"), 2),
        (CertificateError("x"), 3),
        (AddressError("x"), 4),
        (AccessRefused("x"), 5),
        (DiskFull("x"), 6),
        (DeviceError("x"), 7),
    ],
)
def test_each_kind_of_fault_has_a_status_of_its_own(error: ApplianceError, status: int) -> None:
    assert exits.status_of(error) == status
    assert any(number == status and meaning.endswith(".") for number, meaning, _ in exits.STATUSES)


def test_the_unit_starts_again_only_after_what_may_mend_itself() -> None:
    line = next(x for x in UNIT.read_text().splitlines() if x.startswith("RestartPreventExitStatus="))
    prevented = {int(number) for number in line.partition("=")[2].split()}
    assert prevented == {exits.status_of(kind("x")) for kind in (ConfigError, CertificateError, AccessRefused)}


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EACCES, AccessRefused),
        (errno.EROFS, AccessRefused),
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EIO, ConfigError),
    ],
)
def test_what_the_system_says_of_a_file_decides_the_kind(number: int, kind: type[ConfigError]) -> None:
    assert type(file_error(OSError(number, os.strerror(number)), "sentence")) is kind


def test_a_full_disk_that_nobody_looked_for_is_a_sentence_too() -> None:
    found = exits.foreseen(OSError(errno.ENOSPC, "No space left on device", "/var/x"))
    assert isinstance(found, DiskFull)
    assert str(found) == "/var/x cannot be used: No space left on device."
    assert exits.foreseen(OSError(errno.EIO, "Input/output error", "/var/x")) is None


def mounted(appliance: Command, options: str, before: str) -> "subprocess.CompletedProcess[str]":
    """`appliance keys create` with the keys on a file system of its own, mounted where nobody else sees it."""
    folder = appliance.folder / "etc"
    folder.mkdir()
    config = appliance.file.read_text().replace(f"{appliance.folder}/keys.json", f"{folder}/keys.json")
    appliance.file.write_text(config)
    command = f"{sys.executable} -m appliance --config {appliance.file} keys create"
    script = f"mount -t tmpfs -o size=64k none {folder} && {before} {folder}{options}; exec {command}"
    return subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_full_disk_ends_with_6(appliance: Command) -> None:
    done = mounted(appliance, "/filler 2>/dev/null", "cat /dev/zero >")
    assert (done.returncode, done.stdout) == (6, "")
    assert "keys.json cannot be written: No space left on device" in done.stderr


def test_a_folder_that_may_not_be_written_ends_with_5(appliance: Command) -> None:
    appliance.folder.chmod(0o500)
    done = without_privileges("--config", appliance.file, "keys", "create")
    appliance.folder.chmod(0o700)
    assert done.returncode == 5
    assert "keys.json cannot be written: Permission denied" in done.stderr


def test_a_keys_file_that_may_not_be_read_ends_with_5_and_the_remedy(appliance: Command) -> None:
    appliance.keys.write_text('{"keys": []}')
    appliance.keys.chmod(0)
    done = without_privileges("--config", appliance.file, "keys", "list")
    assert done.returncode == 5
    assert "chmod 0640" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_read_only_file_system_ends_with_5(appliance: Command) -> None:
    done = mounted(appliance, "", "mount -o remount,ro")
    assert (done.returncode, done.stdout) == (5, "")
    assert "keys.json cannot be written: Read-only file system" in done.stderr


def test_under_systemd_an_error_is_one_line_with_its_priority(appliance: Command) -> None:
    """JOURNAL_STREAM names the stream that stderr is, as systemd sets it; a pipe stands in for the journal's."""
    appliance.file.write_text('[log]\nlevel = "loud"\nsample = 7\n')
    read, write = os.pipe()
    stat = os.fstat(write)
    command = [sys.executable, "-m", "appliance", "--config", str(appliance.file), "serve"]
    environment = {**os.environ, "JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}
    done = subprocess.run(command, stderr=write, env=environment, check=False)
    os.close(write)
    with open(read, encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    assert done.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith("<3>The configuration has 2 problems: log.level")
    assert "log.sample" in lines[0]
