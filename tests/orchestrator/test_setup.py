"""`appliance setup` enrols, too: after everything that needs no other machine."""

import os
import pty
import stat
import subprocess
from pathlib import Path

import pytest
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support.appliance import COMMAND, ENVIRONMENT, PATIENCE_S


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where an appliance is set up that stands alone so far."""
    folder = tmp_path / "appliance"
    done = setup(folder, "")
    assert done.returncode == 0, done.stderr
    return folder


def command(folder: Path, *flags: str) -> list[str]:
    base = ["--base-url", "https://localhost:8443", "--no-samples", "--device", "cpu"]
    return [str(COMMAND), "--config", str(folder / "appliance.toml"), "setup", *base, *flags]


def setup(folder: Path, pat: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Run it with a PAT on stdin."""
    return subprocess.run(
        command(folder, "--yes", *flags),
        input=pat,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=PATIENCE_S,
        check=False,
    )


def where(centre: RunningCentre) -> list[str]:
    return [
        *("--orchestrator-api-base", centre.base_url, "--orchestrator-user-id", USER),
        *("--orchestrator-root-ca", str(centre.pki.ca)),
    ]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_flags_and_a_pat_from_stdin_enrol(centre: RunningCentre, tmp_path: Path) -> None:
    """On a fresh folder, in one command; a second time nothing changes."""
    folder = tmp_path / "appliance"
    done = setup(folder, f"{PAT}\n", *where(centre))
    assert done.returncode == 0, done.stderr
    assert f"enrolled with {centre.base_url} as {USER}" in done.stdout
    assert "orchestrator sync" not in done.stdout, "the agent does it"
    assert PAT not in done.stdout + done.stderr
    pat = folder / "orchestrator.pat"
    assert pat.read_text(encoding="utf-8") == f"{PAT}\n"
    assert not stat.S_IMODE(pat.stat().st_mode) & 0o007
    assert [name for name, content in tree(folder).items() if PAT.encode() in content] == ["orchestrator.pat"]
    before = tree(folder)
    assert setup(folder, PAT, *where(centre)).returncode == 0
    assert setup(folder, "").returncode == 0, "without its flags nothing is asked"
    assert tree(folder) == before


def test_a_pat_file_alone_renews_the_pat(centre: RunningCentre, home: Path, tmp_path: Path) -> None:
    assert setup(home, PAT, *where(centre)).returncode == 0
    new = tmp_path / "new-pat"
    new.write_text("another-token\n", encoding="utf-8")
    refused = setup(home, "", "--orchestrator-pat-file", str(new))
    assert (refused.returncode, "CONN_KEY_INVALID" in refused.stderr) == (2, True)
    centre.tell("admit", pat="another-token", user=USER)
    assert setup(home, "", "--orchestrator-pat-file", str(new)).returncode == 0
    assert (home / "orchestrator.pat").read_text(encoding="utf-8") == "another-token\n"


def test_what_cannot_be_is_refused_before_anything_is_written(centre: RunningCentre, tmp_path: Path) -> None:
    folder = tmp_path / "appliance"
    for pat, flags, words in (
        (PAT, ["--orchestrator-user-id", USER], "--orchestrator-api-base"),
        (PAT, ["--orchestrator-api-base", "api.example.com"], "--orchestrator-api-base: must be"),
        (PAT, [*where(centre), "--orchestrator-proxy", "proxy:3128"], "--orchestrator-proxy: must be"),
        ("", where(centre), "one PAT and nothing else"),
        ("", [*where(centre), "--orchestrator-pat-file", "/nowhere/pat"], "cannot be read from /nowhere/pat"),
    ):
        done = setup(folder, pat, *flags)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
        assert not folder.exists()


def test_an_orchestrator_that_is_away_costs_nothing_but_the_enrolment(centre: RunningCentre, tmp_path: Path) -> None:
    folder = tmp_path / "appliance"
    flags = where(centre)
    centre.stop()
    done = setup(folder, PAT, *flags)
    assert (done.returncode, "UNAVAILABLE" in done.stderr) == (2, True)
    assert (folder / "tls" / "server.crt").exists()
    assert "key " in done.stdout
    assert not (folder / "conf.d" / "orchestrator.toml").exists()
    centre.start()
    assert setup(folder, PAT, *flags).returncode == 0


def test_in_a_terminal_it_asks_and_shows_no_pat(centre: RunningCentre, home: Path) -> None:
    master, slave = pty.openpty()
    units = ["--unit-folder", str(home / "none"), "--certificates", "keep"]
    # In a session of its own there is no terminal but this one that a PAT could be asked for at.
    process = subprocess.Popen(
        command(home, *units), stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT, start_new_session=True
    )
    os.close(slave)
    heard = ""
    answers = [
        ("Central orchestrator", centre.base_url),
        ("User there", USER),
        ("authorities file", str(centre.pki.ca)),
        ("PAT", PAT),
    ]
    try:
        while chunk := os.read(master, 4096):
            heard += chunk.decode()
            if answers and answers[0][0] in heard and heard.rstrip().endswith(":"):
                os.write(master, f"{answers.pop(0)[1]}\n".encode())
                heard += " (answered)"
    except OSError:  # the terminal is gone with the process
        pass
    assert process.wait() == 0, heard
    os.close(master)
    assert answers == []
    assert PAT not in heard
    assert f"enrolled with {centre.base_url}" in heard
