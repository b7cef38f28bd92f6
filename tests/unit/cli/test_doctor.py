"""`appliance doctor`: each fault is a line of its own, with what to do, and keeps nothing else from being looked at."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Command
from support.folders import let_others_in

from appliance.cli import doctor as doctors
from appliance.cli import rights, units
from appliance.cli.report import Report
from appliance.cli.rights import Who
from appliance.core import config as configuration

Found = dict[str, list[tuple[str, str]]]


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """An appliance as setup leaves it, with ports that nobody has."""
    monkeypatch.setattr(configuration, "VENDOR_FILE", tmp_path / "none.toml")
    command = Command(tmp_path / "appliance")
    command.good("setup", "--base-url", "https://localhost:8443", "--device", "cpu", "--no-samples")
    command.file.write_text('[server]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n')
    command.file.chmod(0o640)
    return command


def found(command: Command, code: int) -> Found:
    """What → its lines, as (state, text)."""
    result = command("doctor", "--json")
    assert result.exit_code == code, result.output
    lines: Found = {}
    for line in json.loads(result.stdout):
        lines.setdefault(line["what"], []).append((line["state"], line["text"]))
    return lines


def failed(lines: Found) -> list[str]:
    return [text for several in lines.values() for state, text in several if state == "fail"]


def test_a_sound_appliance_passes(ready: Command) -> None:
    lines = found(ready, 0)
    assert failed(lines) == []
    assert {what for what, several in lines.items() if {state for state, _ in several} == {"ok"}} >= {
        "configuration", "certificates", "names", "expiry", "chain", "keys", "device", "port", "disk", "permissions",
        "base url",
    }  # fmt: skip
    assert lines["daemon"][0][0] == "warn"  # it does not run here
    assert "localhost" in lines["names"][0][1]


def test_lines_are_for_people_without_json(ready: Command) -> None:
    output = ready.good("doctor")
    assert "ok    chain          leads to a root in" in output
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in output.splitlines())


def test_a_configuration_that_is_wrong_is_told(ready: Command) -> None:
    ready.file.write_text('[log]\nlevel = "loud"\n')
    lines = found(ready, 1)
    assert "log.level" in failed(lines)[0]


def test_a_port_that_is_taken_is_told_with_the_remedy(ready: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ready.file.write_text(f'[server]\nlisten = "{address}"\n[admin]\nlisten = "127.0.0.1:0"\n')
        (text,) = failed(found(ready, 1))
    assert f"server.listen {address} cannot be bound: the port is taken (`ss -ltnp` shows by whom)" in text


def test_a_certificate_that_ends_soon_is_a_warning(ready: Command) -> None:
    tls = ready.folder / "tls"
    ready.good("certs", "issue", "server", "--san", "localhost", "--days", "9", "--dir", tls, "--force")
    ((state, text),) = found(ready, 0)["expiry"]
    assert state == "warn"
    assert "in 9 days; renew it: appliance certs renew server" in text


def test_a_chain_that_clients_do_not_trust_is_a_warning(ready: Command, tmp_path: Path) -> None:
    other = tmp_path / "other"
    ready.good("certs", "init", "--dir", other)
    shutil.copy(other / "ca.crt", ready.folder / "tls" / "ca.crt")
    ((state, text),) = found(ready, 0)["chain"]
    assert state == "warn"
    assert "does not trust the server" in text


def test_a_missing_certificate_fails_and_the_rest_is_looked_at(ready: Command) -> None:
    (ready.folder / "tls" / "server.crt").unlink()
    lines = found(ready, 1)
    assert "certs init" in failed(lines)[0]
    assert {"keys", "port", "disk"} <= set(lines)


def test_a_host_that_nobody_knows_is_a_warning(ready: Command) -> None:
    ready.good("setup", "--base-url", "https://nobody.invalid:8443", "--no-samples")
    assert found(ready, 0)["base url"][0][0] == "warn"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_full_disk_fails(ready: Command) -> None:
    state = ready.folder / "state"
    script = f"mount -t tmpfs -o size=1m none {state}; exec {sys.executable} -m appliance --config {ready.file} doctor"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"fail  disk           0.0 GiB free at {state}, or no more files; free some" in done.stdout


# ---- permissions -----------------------------------------------------------------------------------------------------


def obstacles(command: Command, who: Who) -> list[str]:
    return rights.problems(command.config, command.file, who)


@pytest.fixture
def service(ready: Command) -> Who:
    """A user that is not ours, whose group may read everything, as in /etc."""
    who = Who("service", 54321, frozenset({54322}))
    let_others_in(ready.folder.parent)
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    for path in (ready.folder, *ready.folder.rglob("*")):
        os.chown(path, -1, 54322)
        path.chmod(0o750 if path.is_dir() else 0o640)
    (ready.folder / "tls" / "ca.key").chmod(0o600)
    os.chown(ready.folder / "state", 54321, -1)
    return who


def test_what_the_service_can_reach_is_fine(ready: Command, service: Who) -> None:
    assert obstacles(ready, service) == []


@pytest.mark.parametrize(
    ("path", "mode", "sentence"),
    [
        ("tls/server.key", 0o600, "is not for user service to read; run: chgrp inference-appliance"),
        ("appliance.toml", 0o600, "is not for user service to read"),
        ("conf.d/10-setup.toml", 0o600, "is not for user service to read"),
        ("keys.json", 0o600, "is not for user service to read"),
        ("conf.d", 0o700, "is not for user service to read"),
        ("tls", 0o700, "does not let user service through to server.crt"),
        ("state", 0o500, "is not for user service to write to; run: chown service"),
        ("models", 0o700, "is not for user service to read"),
        ("tls/server.key", 0o644, "lets in others than it should; run: chmod 0640"),
        ("tls/ca.key", 0o640, "lets in others than it should; run: chmod 0600"),
        ("keys.json", 0o644, "lets in others than it should; run: chmod 0640"),
        ("appliance.toml", 0o646, "lets in others than it should; run: chmod 0640"),
    ],
)
def test_each_wrong_mode_is_told_with_the_command_that_mends_it(
    ready: Command, service: Who, path: str, mode: int, sentence: str
) -> None:
    (ready.folder / path).chmod(mode)
    said = obstacles(ready, service)
    assert any(str(ready.folder / path) in text and sentence in text for text in said), said


def test_a_bundle_that_the_service_cannot_read_is_told(ready: Command, service: Who) -> None:
    file = ready.folder / "models" / "net" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    file.chmod(0o600)
    assert any(str(file) in text for text in obstacles(ready, service))


# ---- systemd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deny", "allow", "only_here", "everybody"),
    [
        ("", "", False, True),
        ("::/0 0.0.0.0/0", "127.0.0.0/8 ::1/128", True, False),
        ("0.0.0.0/0 ::/0", "127.0.0.0/8 ::1/128 10.0.0.0/8", False, False),
        ("0.0.0.0/0 ::/0", "0.0.0.0/0 ::/0 127.0.0.0/8", False, True),
        ("0.0.0.0/0 ::/0", "", True, False),
    ],
)
def test_systemds_rule_is_understood(deny: str, allow: str, only_here: bool, everybody: bool) -> None:
    properties = {"IPAddressDeny": deny, "IPAddressAllow": allow}
    assert units.only_this_machine(properties) is only_here
    assert units.lets_all_in(properties) is everybody


def test_whom_the_service_calls_is_no_client() -> None:
    """Its name servers and its orchestrator are let through, and still nobody can connect."""
    rule = {"IPAddressDeny": "::/0 0.0.0.0/0", "IPAddressAllow": "127.0.0.0/8 ::1/128 10.9.9.9/32 fd00::7/128"}
    assert units.only_this_machine(rule, ["10.9.9.9", "fd00::7"])
    assert not units.only_this_machine(rule, ["10.9.9.9"])


@pytest.mark.parametrize(
    ("allow", "address", "passes"),
    [
        ("127.0.0.0/8 ::1/128", "127.0.0.1", True),
        ("127.0.0.0/8 ::1/128", "10.1.2.3", False),
        ("127.0.0.0/8 10.0.0.0/8", "10.1.2.3", True),
        ("127.0.0.0/8 10.0.0.0/8", "fe80::1%eth0", False),
        ("fe80::/64", "fe80::1%eth0", True),
        ("0.0.0.0/0 ::/0", "192.0.2.1", True),
    ],
)
def test_whether_an_address_passes_is_told(allow: str, address: str, passes: bool) -> None:
    """The base URL's, say, from which programs on this machine call: it is no loopback address."""
    assert units.lets_in({"IPAddressDeny": "0.0.0.0/0 ::/0", "IPAddressAllow": allow}, address) is passes


@pytest.mark.parametrize(
    ("properties", "state", "sentence"),
    [
        ({"ActiveState": "active", "StatusText": "serving", "NRestarts": "0"}, "ok", "active (serving)"),
        ({"ActiveState": "active", "NRestarts": "3"}, "warn", "restarted 3 times"),
        ({"ActiveState": "inactive", "ConditionResult": "no"}, "warn", "appliance setup"),
        ({"ActiveState": "inactive", "ConditionResult": "yes"}, "warn", "systemctl start"),
        (
            {"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "3"},
            "fail",
            "failed (exit-code, status 3: A certificate, its key",
        ),
        ({"ActiveState": "failed", "Result": "watchdog", "ExecMainStatus": "6"}, "fail", "failed (watchdog"),
    ],
)
def test_what_systemd_says_of_the_unit_becomes_a_line(properties: dict[str, str], state: str, sentence: str) -> None:
    report = Report(quiet=True)
    doctors._unit_state({"UnitFileState": "enabled", **properties}, report)
    (line,) = report.lines
    assert line.state == state
    assert sentence in line.text


def test_a_unit_that_does_not_start_at_boot_is_told() -> None:
    report = Report(quiet=True)
    doctors._unit_state({"ActiveState": "active", "UnitFileState": "disabled"}, report)
    assert [line.state for line in report.lines] == ["ok", "warn"]
