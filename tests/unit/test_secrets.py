"""The suite's own search for secrets, which fails the run: it finds what is there."""

from pathlib import Path

import pytest
from support import secrets


def test_the_search_for_secrets_finds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a log, in the state, in what a command said; of a private key any line will do."""
    for name in ("_known", "_folders", "_said"):
        monkeypatch.setattr(secrets, name, type(getattr(secrets, name))())
    secrets.written_in(tmp_path)
    secrets.never_to_be_written("a-secret-of-the-suite")
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / "server.key").write_text(
        "-----BEGIN PRIVATE KEY-----\nline-of-a-key\n-----END PRIVATE KEY-----\n"
    )
    (tmp_path / "state" / "cache").mkdir(parents=True)
    (tmp_path / "daemon.log").write_text("nothing odd\n")
    assert secrets.found() == ([], "2 secrets in 1 files and 0 texts")
    (tmp_path / "daemon.log").write_text("key=line-of-a-key\n")
    (tmp_path / "state" / "cache" / "x").write_bytes(b"\xffa-secret-of-the-suite\0")
    secrets.said("a command", "Key a-secret-of-the-suite")
    leaks, _ = secrets.found()
    assert len(leaks) == 3
    assert "a-secret-of-the-suite" not in "".join(leaks)
