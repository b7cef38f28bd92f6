"""What no process of the suite may write: its keys, PATs, passphrases and private keys; and the search for them.

Whoever makes a secret or starts a process says so here. The search is at the end of the run (tests/conftest.py):
through the logs and the state of every process, and what commands and pages said.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_LEAST = 8
"""Bytes of a secret from which on it is not found by chance."""

_known: set[bytes] = set()
_folders: dict[Path, None] = {}
_said: dict[str, bytes] = {}


def never_to_be_written(*texts: str) -> None:
    """Remember secrets."""
    _known.update(text.encode() for text in texts if len(text) >= _LEAST)


def written_in(folder: Path) -> None:
    """A process has its logs and its state there."""
    _folders[folder] = None


def said(who: str, text: str) -> None:
    """Remember what somebody said; of whoever says much only the last."""
    _said[who] = text.encode(errors="replace")


def found() -> tuple[list[str], str]:
    """Where a secret stands, a sentence each; and what was looked through."""
    secrets = _known | set(_private_keys(_folders))
    files = [file for folder in _folders for file in _written(folder)]
    leaks = _leaks(((str(file), file.read_bytes()) for file in files), secrets)
    leaks += _leaks(_said.items(), secrets)
    return leaks, f"{len(secrets)} secrets in {len(files)} files and {len(_said)} texts"


def _leaks(places: Iterable[tuple[str, bytes]], secrets: set[bytes]) -> list[str]:
    """Each place that has a secret; which one is not said again."""
    return [f"{place} has a secret of the suite" for place, text in places if any(each in text for each in secrets)]


def _written(folder: Path) -> Iterator[Path]:
    """Logs, and everything in the state folder."""
    for pattern in ("*.log", "state/**/*"):
        yield from (path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink())


def _private_keys(folders: Iterable[Path]) -> Iterator[bytes]:
    """A line of every private key that lies there."""
    for folder in folders:
        for file in folder.rglob("*.key"):
            with contextlib.suppress(OSError):
                lines = file.read_bytes().splitlines()
                if lines and b"PRIVATE KEY" in lines[0]:
                    yield max(lines[1:-1], key=len, default=lines[0])
