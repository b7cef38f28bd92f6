"""`appliance support-bundle`: everything that helps is in it, and no secret, wherever one was planted."""

import os
import stat
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.command import Command

from appliance.api.keys import create_key, digest
from appliance.cli import redact, units
from appliance.core import config as configuration

PASSPHRASE = "correct horse battery"
CENTRE_PAT = "c0ffee" * 5 + "00"


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(configuration, "VENDOR_FILE", tmp_path / "none.toml")
    command = Command(tmp_path / "appliance")
    command.good("setup", "--base-url", "https://edge.example.com:8443", "--device", "cpu", "--no-samples", "--no-pat")
    command.file.write_text('[server]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n')
    return command


def read(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers()}
    found = {}
    with tarfile.open(path) as archive:
        for name in members:
            file = archive.extractfile(name)
            assert file is not None
            found[name.removeprefix("inference-appliance-support/")] = file.read().decode()
    return found


def programs(folder: Path, **texts: str) -> None:
    """Programs that print a text each: systemctl and journalctl of a machine that has no systemd."""
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
        (folder / name).write_text(f"#!/bin/sh\ncat {folder}/{name}.txt\n")
        (folder / name).chmod(0o755)


def test_no_secret_leaves_the_machine(ready: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, entry = create_key(ready.folder / "keys.json", "default", "for the line")
    private = (ready.folder / "tls" / "server.key").read_text()
    (ready.folder / "conf.d" / "50-secret.toml").write_text(f'[tls]\nkey_passphrase = "{PASSPHRASE}"\n')
    (ready.folder / "notes.txt").write_text(f"{key} {PASSPHRASE}")
    programs(
        tmp_path / "bin",
        systemctl=f'Environment="APPLIANCE_TLS__KEY_PASSPHRASE={PASSPHRASE}" CLARIFAI_PAT={CENTRE_PAT}\n'
        f"Environment=CLARIFAI_PAT={CENTRE_PAT}\nExecStart=/usr/bin/appliance serve\n",
        journalctl=f"somebody logged authorization: Key {key}\nand {key} alone, and Bearer {CENTRE_PAT}\n{private}\n"
        f"the end; model sha256 {digest('model')} principal line-3\n",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CLARIFAI_PAT", CENTRE_PAT)
    monkeypatch.setattr(units, "systemd_runs", lambda: True)
    path = tmp_path / "bundle.tar.gz"
    ready.good("support-bundle", "--output", path)
    found = read(path)
    everything = "\n".join(found.values())
    body = private.splitlines()[1]
    for secret in (key, PASSPHRASE, CENTRE_PAT, body, entry.sha256):
        assert secret not in everything, [name for name, text in found.items() if secret in text]
    # What is no secret is there.
    assert "the end; model sha256 " + digest("model") in found["journal.txt"]
    assert "line-3" in found["journal.txt"]
    assert "ExecStart=/usr/bin/appliance serve" in found["units.txt"]
    assert 'tls.key_passphrase = "********"' in found["configuration.txt"] or "[removed]" in found["configuration.txt"]


def test_what_helps_is_in_it(ready: Command, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    assert f"wrote {path}" in ready.good("support-bundle", "--output", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = read(path)
    assert set(found) >= {
        "README.txt", "versions.txt", "configuration.txt", "doctor.txt", "files.txt", "status.txt", "readyz.txt",
        "metrics.txt", "certificates.json", "machine.txt",
    }  # fmt: skip
    assert 'server.base_url = "https://edge.example.com:8443"' in found["configuration.txt"]
    assert "ok    chain" in found["doctor.txt"]
    assert "-rw------- " in found["files.txt"]
    assert str(ready.folder / "tls" / "server.key") in found["files.txt"]
    assert "does not answer" in found["status.txt"]  # the daemon does not run, which is worth knowing
    assert "edge.example.com" in found["certificates.json"]
    assert "onnxruntime" in found["versions.txt"]


def test_a_configuration_that_is_wrong_is_part_of_it(ready: Command, tmp_path: Path) -> None:
    ready.file.write_text('[log]\nlevel = "loud"\n')
    path = tmp_path / "bundle.tar.gz"
    ready.good("support-bundle", "-o", path)
    found = read(path)
    assert "log.level" in found["configuration.txt"]
    assert "log.level" in found["doctor.txt"]


def test_a_file_that_is_there_is_not_overwritten(ready: Command, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_text("mine")
    assert "File exists" in ready.bad("support-bundle", "-o", path)
    assert path.read_text() == "mine"


def test_a_disk_that_is_full_leaves_nothing_and_ends_with_6(ready: Command) -> None:
    result = ready("support-bundle", "-o", "/dev/full/x")
    assert result.exit_code == 2  # no folder
    assert "/dev/full/x cannot be written" in result.stderr


# ---- the redactor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        'key_passphrase = "SECRETVALUE"',
        "APPLIANCE_TLS__KEY_PASSPHRASE=SECRETVALUE with spaces",
        "Environment='APPLIANCE_TLS__KEY_PASSPHRASE=SECRETVALUE'",
        "authorization: Key SECRETVALUE",
        "Authorization: Bearer SECRETVALUE",
        "x-clarifai-session-token: SECRETVALUE",
        '{"password": "SECRETVALUE"}',
        "CLARIFAI_PAT=SECRETVALUE",
        'proxy = "http://user:SECRETVALUE@proxy.example.com:3128"',
        "pat: SECRETVALUE",
        "used Key SECRETVALUESECRETVALUE to call",
        "-----BEGIN EC PRIVATE KEY-----\nSECRETVALUE\n-----END EC PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nSECRETVALUE and the rest is cut",
    ],
)
def test_what_looks_like_a_secret_goes(line: str) -> None:
    assert "SECRETVALUE" not in redact.Redactor()(f"before\n{line}")
    assert "before" in redact.Redactor()(f"before\n{line}")


@pytest.mark.parametrize(
    "line",
    [
        "tokens_total 5",
        "path: /etc/inference-appliance/keys.json",
        "sha256 " + "ab" * 32,
        "principal line-3 identities uri:spiffe://example.org/line-3",
        "keys: 3 in /etc/x",
        "serving https://edge.example.com:8443/v2 for ada@example.com",
        "patterns = 4",
        "compatible: yes",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert redact.Redactor()(line) == line


@given(st.text(), st.text(min_size=4, max_size=40), st.text())
def test_a_known_secret_never_stays(before: str, secret: str, after: str) -> None:
    assert secret in redact.GONE or secret not in redact.Redactor([secret])(before + secret + after).replace(
        redact.GONE, ""
    )
