"""Keys (PATs): 256 random bits, shown once, stored as a hash, read again whenever the file changes.

A plain SHA-256 is enough: a key is random and as long as the hash, so there is nothing to guess that a slow hash
would protect.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appliance.core.errors import ConfigError
from appliance.core.files import SERVICE_GROUP, alone, file_error, write_atomically

_log = logging.getLogger(__name__)

DEFAULT_PRINCIPAL = "default"
"""Whose a key is that was made without naming a principal; may reach everything unless a [[principal]] says less."""

LOOK_S = 0.001
"""Seconds between two looks at the file, while the keys that come are known ones: many calls share a look."""


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key as it is stored; the key itself is not.

    Attributes:
        id: first 8 hex digits of the hash; safe to show and to log.
        sha256: hash of the key, hex.
        created_at: Unix time.
    """

    id: str
    sha256: str
    principal: str
    note: str
    created_at: float


def digest(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def read_keys(path: Path) -> list[KeyEntry]:
    """All keys in the file; none when there is no file. Raises: ConfigError: it cannot be read or is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [KeyEntry(**entry) for entry in content["keys"]]
        if not isinstance(content["keys"], list) or not all(_sound(entry) for entry in entries):
            raise ValueError("not a list of keys")
        return entries
    except FileNotFoundError:
        return []
    except OSError as error:
        remedy = f"the service's group must be able to: chgrp {SERVICE_GROUP} {path} && chmod 0640 {path}"
        raise file_error(error, f"The keys file {path} cannot be read: {error.strerror}; {remedy}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a keys file written by `appliance keys`; put a backup back.") from error


def _sound(entry: KeyEntry) -> bool:
    texts = (entry.id, entry.sha256, entry.principal, entry.note)
    return all(isinstance(text, str) for text in texts) and isinstance(entry.created_at, int | float)


def create_key(path: Path, principal: str, note: str) -> tuple[str, KeyEntry]:
    """Make a key and store its hash. Returns: the key, to be shown once, and its entry.

    Raises: ConfigError: the file cannot be read or written.
    """
    key = secrets.token_hex(32)
    sha256 = digest(key)
    entry = KeyEntry(sha256[:8], sha256, principal, note, time.time())
    with _alone(path):
        _write(path, [*read_keys(path), entry])
    return key, entry


def revoke_key(path: Path, key_id: str) -> KeyEntry:
    """Take a key out. Raises: ConfigError: no such id; the file cannot be written."""
    with _alone(path):
        entries = read_keys(path)
        found = next((entry for entry in entries if entry.id == key_id), None)
        if found is None:
            known = ", ".join(entry.id for entry in entries) or "none"
            raise ConfigError(f"There is no key with id {key_id!r} in {path}; ids: {known}.")
        _write(path, [entry for entry in entries if entry is not found])
    return found


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep two commands that change the keys at once from undoing each other: a lock on the file's folder."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(path.parent))
        except OSError as error:
            raise file_error(error, f"The keys file {path} cannot be written: {error.strerror}.") from error
        yield


def _write(path: Path, entries: list[KeyEntry]) -> None:
    content = {"keys": [asdict(entry) for entry in entries]}
    try:
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise file_error(error, f"The keys file {path} cannot be written: {error.strerror}.") from error


class KeyStore:
    """The keys that are valid now: looks whether the file changed, and keeps the last good content if it became bad.

    A key that was revoked may be found for `LOOK_S` more; one that was made is found at once.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises: ConfigError: the file is there and is not ours."""
        self.path = path
        self._clock = clock
        self._look_at = 0.0
        self._stamp: tuple[Any, ...] = ()
        self._entries: dict[str, KeyEntry] = {}
        self._refresh(strict=True)

    def __len__(self) -> int:
        return len(self._entries)

    def adopt(self, other: "KeyStore") -> None:
        """Become what `other` is: the same keys from the same file."""
        self.path, self._stamp, self._entries = other.path, other._stamp, other._entries

    def find(self, key: str) -> KeyEntry | None:
        """The entry of a valid key, or None."""
        sha256 = digest(key)
        if self._clock() < self._look_at and (entry := self._entries.get(sha256)) is not None:
            return entry
        self._refresh(strict=False)
        return self._entries.get(sha256)

    def look(self) -> list[KeyEntry]:
        """All valid keys, as the file has them now."""
        self._refresh(strict=False)
        return list(self._entries.values())

    def _refresh(self, *, strict: bool) -> None:
        """Read the file again if it is another one than last time: one stat."""
        self._look_at = self._clock() + LOOK_S
        try:
            stat = os.stat(self.path)
            # The time of change too: a file that could not be read is tried again once its rights are mended.
            stamp: tuple[Any, ...] = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        except FileNotFoundError:
            stamp = ("missing",)
        except OSError as error:
            stamp = ("unreadable", error.errno)
        if stamp == self._stamp:
            return
        known_before = bool(self._stamp)
        self._stamp = stamp
        try:
            if stamp == ("missing",) and known_before:
                raise ConfigError(f"The keys file {self.path} is gone.")
            self._entries = {entry.sha256: entry for entry in read_keys(self.path)}
        except ConfigError as error:
            if strict:
                raise
            _log.error("%s The keys read before stay valid.", error)
