"""Whether the service may read what it must, and whether others may read what they must not.

Looks at owner, group and mode; access lists beyond them are not looked at.
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.core.config import DROP_INS, Config, Section
from appliance.core.files import SERVICE_GROUP
from appliance.pki.files import Access, too_open

SERVICE_USER = "inference-appliance"
_READ, _WRITE, _SEARCH = 4, 2, 1
_MOST_FILES = 2000
"""Files of bundles that are looked at."""


@dataclass(frozen=True, slots=True)
class Who:
    """Somebody who must be able to read files."""

    name: str
    uid: int
    gids: frozenset[int]


def service() -> Who | None:
    """The service's user; None where there is none."""
    try:
        entry = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return None
    groups = {group.gr_gid for group in grp.getgrall() if SERVICE_USER in group.gr_mem}
    return Who(SERVICE_USER, entry.pw_uid, frozenset({entry.pw_gid, *groups}))


def myself() -> Who:
    """Whoever runs this."""
    return Who(pwd.getpwuid(os.geteuid()).pw_name, os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def problems(config: Config, main: Path, who: Who) -> list[str]:
    """Sentences on what `who` cannot reach and must, and on what others can and must not."""
    found = []
    for path, want in _needed(config, main):
        obstacle = _obstacle(path, want, who)
        if obstacle:
            found.append(obstacle)
    return found + list(_too_open(config, main))


def _needed(config: Config, main: Path) -> Iterator[tuple[Path, int]]:
    """What must be reached, as far as it is there, and how."""
    yield main, _READ
    yield main.parent / DROP_INS, _READ | _SEARCH
    yield from ((path, _READ) for path in sorted((main.parent / DROP_INS).glob("*.toml")))
    yield from ((path, _READ) for _, path in _files(config))
    yield config.catalog.state_dir, _READ | _WRITE | _SEARCH
    yield config.catalog.root, _READ | _SEARCH
    for index, path in enumerate(config.catalog.root.rglob("*")):
        if index >= _MOST_FILES:
            break
        if not any(part.startswith(".") for part in path.relative_to(config.catalog.root).parts):
            yield path, _READ | _SEARCH if path.is_dir() else _READ


def _files(config: Config) -> Iterator[tuple[str, Path]]:
    """Every file that a setting names, by the setting's name; folders and sockets are none."""
    for name, section in config:
        if isinstance(section, Section) and name not in ("catalog", "admin"):
            yield from ((key, value) for key, value in section if isinstance(value, Path))
    for certificate in config.tls.sni_certificates:
        yield from (("certificate", certificate), ("key", certificate.with_suffix(".key")))


def _obstacle(path: Path, want: int, who: Who) -> str | None:
    """Why `who` cannot do that, with the remedy; None when they can, or there is no such path."""
    if who.uid == 0:
        return None
    try:
        for folder in reversed(path.resolve().parents):
            if not _granted(folder, who) & _SEARCH:
                return (
                    f"{folder} does not let user {who.name} through to {path.name}; run: {_mend(folder, _SEARCH, who)}"
                )
        if _granted(path, who) & want == want:
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} cannot be looked at ({error.strerror}); run this with sudo"
    verb = "write to" if want & _WRITE else "read"
    return f"{path} is not for user {who.name} to {verb}; run: {_mend(path, want, who)}"


def _granted(path: Path, who: Who) -> int:
    """The bits that the mode gives them."""
    found = path.stat()
    shift = 6 if found.st_uid == who.uid else 3 if found.st_gid in who.gids else 0
    return found.st_mode >> shift & 7


def _mend(path: Path, want: int, who: Who) -> str:
    if want & _WRITE:
        return f"chown {who.name} {path} && chmod u+rwx {path}"
    letters = ("r" if want & _READ else "") + ("x" if want & _SEARCH else "")
    return f"chgrp {SERVICE_GROUP} {path} && chmod g+{letters} {path}"


def _too_open(config: Config, main: Path) -> Iterator[str]:
    secrets: list[tuple[Path, Access]] = [
        (path, "service") for key, path in _files(config) if key in ("key", "pat_file", "keys_file", "headers_file")
    ]
    secrets += [(config.tls.certificate.with_name("server.key.pending"), "service")]
    secrets += [(config.tls.certificate.with_name("ca.key"), "owner")]
    for path, access in secrets:
        if path.exists() and (sentence := too_open(path, access)):
            yield sentence
    forbidden = 0o006 if config.tls.key_passphrase else 0o002
    for path in (main, *(main.parent / DROP_INS).glob("*.toml")):
        if path.is_file() and (mode := stat.S_IMODE(path.stat().st_mode)) & forbidden:
            yield f"{path} has mode {mode:04o}, which lets in others than it should; run: chmod 0640 {path}"
