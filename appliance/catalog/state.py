"""What the catalog remembers over a restart, in small files with one writer each, which are replaced atomically.

`catalog.json` is the daemon's: when each version was first seen, and its checksums. `wanted.json` is the operator's,
written by `appliance models rollback`: versions that are held back. `published.json` is written by `changes.add`: how a
bundle looks that it put under the root in one step, so that nobody waits for more of it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appliance.core.errors import ConfigError
from appliance.core.files import write_atomically


def _read(path: Path) -> dict[str, Any]:
    """Raises: ConfigError: the file is there and is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); mend its permissions, or move it away.") from error
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise ConfigError(f"{path} is not a state file of ours; move it away.")
    return content


class Memory:
    """The daemon's `catalog.json`: first-seen times and checksums by bundle and version."""

    def __init__(self, state_dir: Path) -> None:
        """Raises: ConfigError: the file is there and is not ours."""
        self._path = state_dir / "catalog.json"
        self._content = _read(self._path)
        if not all(isinstance(entry, dict) for versions in self._content.values() for entry in versions.values()):
            raise ConfigError(f"{self._path} is not a state file of ours; move it away.")

    def first_seen(self, bundle: str, version: str, now: float) -> float:
        """Unix time at which this version was first seen, `now` if that is now."""
        entry = self._entry(bundle, version)
        if "first_seen" not in entry:
            entry["first_seen"] = now
        return float(entry["first_seen"])

    def checksums(self, bundle: str, version: str) -> Mapping[str, str]:
        """SHA-256 by file name, as of the last load."""
        found: Mapping[str, str] = self._entry(bundle, version).get("sha256", {})
        return found

    def remember(self, bundle: str, version: str, checksums: Mapping[str, str]) -> None:
        """Keep the checksums of what was loaded."""
        self._entry(bundle, version)["sha256"] = dict(checksums)

    def keep_only(self, bundles: Mapping[str, set[str] | None]) -> None:
        """Forget what is no longer on disk. None for a bundle: its versions are not known now, keep them all."""
        self._content = {
            bundle: {version: entry for version, entry in versions.items() if kept is None or version in kept}
            for bundle, versions in self._content.items()
            for kept in ([bundles[bundle]] if bundle in bundles else [])
        }

    def save(self) -> None:
        """Write it down. Raises: OSError."""
        text = json.dumps(self._content, indent=1, sort_keys=True)
        write_atomically(self._path, text)

    def _entry(self, bundle: str, version: str) -> dict[str, Any]:
        entry: dict[str, Any] = self._content.setdefault(bundle, {}).setdefault(version, {})
        return entry


def read_held(state_dir: Path) -> dict[str, frozenset[str]]:
    """Versions held back, by bundle. Raises: ConfigError."""
    content = _read(state_dir / "wanted.json")
    try:
        return {bundle: frozenset(map(str, entry.get("held", []))) for bundle, entry in content.items()}
    except TypeError as error:
        raise ConfigError(f"{state_dir / 'wanted.json'} is not a state file of ours; move it away.") from error


def write_held(state_dir: Path, held: Mapping[str, frozenset[str]]) -> None:
    """Replace the versions held back. Raises: OSError."""
    content = {bundle: {"held": sorted(versions)} for bundle, versions in sorted(held.items()) if versions}
    write_atomically(state_dir / "wanted.json", json.dumps(content, indent=1))


def write_published(state_dir: Path, bundle: str, signature: object) -> None:
    """Note how a bundle looks that is about to appear as a whole (`bundle.signature`). Raises: OSError, ConfigError."""
    path = state_dir / "published.json"
    content = {**_read(path), bundle: {"signature": _digest(signature)}}
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True))


def was_published(state_dir: Path, bundle: str, signature: object) -> bool:
    """Whether a bundle that looks so was put there as a whole, and has not been touched since."""
    try:
        entry = _read(state_dir / "published.json").get(bundle, {})
    except ConfigError:
        return False  # then it is waited for, as for any other
    return bool(entry.get("signature") == _digest(signature))


def _digest(signature: object) -> str:
    return hashlib.sha256(repr(signature).encode()).hexdigest()
