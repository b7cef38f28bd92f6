"""The units: what systemd's own tools say of them, and what must agree between them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from appliance.cli import clients
from appliance.core.config import Config

SYSTEMD = Path(__file__).parents[3] / "systemd"
SERVICE = SYSTEMD / "inference-appliance.service"
SOCKET = SYSTEMD / "inference-appliance.socket"

needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def settings(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def exposure(root: Path, drop_in: str = "") -> float:
    folder = root / "usr/lib/systemd/system"
    folder.mkdir(parents=True)
    shutil.copy(SERVICE, folder)
    if drop_in:
        (folder / "inference-appliance.service.d").mkdir()
        (folder / "inference-appliance.service.d" / "10-test.conf").write_text(drop_in)
    command = ["systemd-analyze", "security", "--offline=true", f"--root={root}", "--no-pager", SERVICE.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze is older than 250, which looks at units of other roots")
    match = re.search(r"exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert match, done.stdout + done.stderr
    return float(match[1])


@needs_analyze
def test_the_service_is_as_exposed_as_a_network_service_must_be(tmp_path: Path) -> None:
    assert exposure(tmp_path) <= 1.0


@needs_analyze
def test_with_nvidia_s_devices_hardly_more(tmp_path: Path) -> None:
    assert exposure(tmp_path, (SYSTEMD / "10-cuda.conf").read_text()) <= 1.2


@needs_analyze
@pytest.mark.parametrize("allowed", [("10.0.0.0/8",), ("any",)])
def test_with_clients_let_in_hardly_more(tmp_path: Path, allowed: tuple[str, ...]) -> None:
    assert exposure(tmp_path, clients.text("inference-appliance.service", allowed, {})) <= 1.2


@needs_analyze
@pytest.mark.parametrize("drop_in", ["", "10-cuda.conf"])
def test_systemd_has_nothing_to_say_against_them(tmp_path: Path, drop_in: str) -> None:
    """With a program that is there, as the package's is not here."""
    for unit in (SERVICE, SOCKET):
        text = unit.read_text().replace("/usr/bin/appliance", "/bin/true")
        if drop_in and unit == SERVICE:
            text += (SYSTEMD / drop_in).read_text()
        (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", tmp_path / SERVICE.name, tmp_path / SOCKET.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "inference-appliance" in line]
    assert ours == []


def test_both_wait_for_the_certificate_that_the_configuration_names() -> None:
    wanted = [str(Config().tls.certificate)]
    assert settings(SERVICE)["ConditionPathExists"] == settings(SOCKET)["ConditionPathExists"] == wanted


def test_both_let_in_this_machine_alone() -> None:
    for unit in (SERVICE, SOCKET):
        assert settings(unit)["IPAddressDeny"] == ["any"]
        assert settings(unit)["IPAddressAllow"] == ["localhost"]


def test_a_stop_has_the_time_that_the_defaults_take() -> None:
    shutdown = Config().shutdown
    assert float(settings(SERVICE)["TimeoutStopSec"][0]) >= shutdown.lame_duck_s + shutdown.drain_s + 10


def test_files_are_enough_for_the_connections_that_are_allowed() -> None:
    assert int(settings(SERVICE)["LimitNOFILE"][0]) >= Config().connections.max + 512


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_user_and_folders_are_made(tmp_path: Path) -> None:
    """By systemd's own programs, in a root of our own; owners need root's rights."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (tmp_path / "etc" / "group").write_text("root:x:0:\n")
    users, folders = (SYSTEMD / f"inference-appliance.{kind}.conf" for kind in ("sysusers", "tmpfiles"))
    done = subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", str(users)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"only root may make users: {done.stderr.strip()}")
    assert "inference-appliance" in (tmp_path / "etc" / "passwd").read_text()
    subprocess.run(["systemd-tmpfiles", "--create", f"--root={tmp_path}", str(folders)], check=True)
    user = next(line for line in (tmp_path / "etc" / "passwd").read_text().splitlines() if "inference" in line)
    number = int(user.split(":")[2])
    for name, owner in {
        "etc/inference-appliance/conf.d": 0,
        "etc/inference-appliance/tls": 0,
        "var/lib/inference-appliance/models": number,
    }.items():
        found = (tmp_path / name).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (owner, int(user.split(":")[3]), 0o750), name
