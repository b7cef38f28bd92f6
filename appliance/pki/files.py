"""Where certificates and keys lie, and how they get there: whole, with the right mode, all of them or none."""

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from appliance.core.errors import CertificateError
from appliance.core.files import service_group
from appliance.pki.profiles import Role

DEFAULT_DIR: Final = Path("/etc/inference-appliance/tls")

CLIENT_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,63}", re.ASCII)
MAX_FILE_BYTES: Final = 4 * 1024 * 1024
"""An enterprise's whole trust bundle has a few hundred kB; more is the wrong file."""

Access = Literal["public", "service", "owner"]
"""Who may read a file: everybody (a certificate), the owner and the service group (a key), the owner (the CA's key)."""


@dataclass(frozen=True)
class Layout:
    """The files under one TLS directory."""

    directory: Path

    @property
    def ca_certificate(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.directory / "ca.key"

    @property
    def crl(self) -> Path:
        return self.directory / "crl.pem"

    def certificate(self, role: Role, name: str | None = None) -> Path:
        """Return `server.crt`, or `clients/<name>.crt`.

        Raises: CertificateError: a client without a name that can be a file's.
        """
        return self._leaf(role, name, ".crt")

    def key(self, role: Role, name: str | None = None) -> Path:
        """Return the key beside `certificate`."""
        return self._leaf(role, name, ".key")

    def pending_key(self, role: Role, name: str | None = None) -> Path:
        """Return where `certs csr` leaves a key that waits for its certificate."""
        return self._leaf(role, name, ".key.pending")

    def request(self, role: Role, name: str | None = None) -> Path:
        """Return where `certs csr` writes the request."""
        return self._leaf(role, name, ".csr")

    def _leaf(self, role: Role, name: str | None, suffix: str) -> Path:
        if role == "server":
            return self.directory / f"server{suffix}"
        if name is None or not CLIENT_NAME.fullmatch(name):
            raise CertificateError(
                f"{name!r} cannot name a client's files; use up to 64 letters, digits and . _ @ -, a letter first."
            )
        return self.directory / "clients" / f"{name}{suffix}"


@dataclass(frozen=True)
class NewFile:
    """A file to be written. `access` decides its mode; `replace` lets it take the place of an older one."""

    path: Path
    content: bytes
    access: Access
    replace: bool = False

    def __repr__(self) -> str:  # the content may be a private key; a traceback must not show it
        return f"NewFile({self.path}, {len(self.content)} bytes, {self.access})"


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file the operator named, at most `limit` bytes (4 MiB).

    Raises: CertificateError: missing, unreadable, not a plain file, or too big.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise CertificateError(f"{path} does not exist.") from None
    except PermissionError:
        raise CertificateError(f"{path} may not be read by this user; run the command with sudo.") from None
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > limit:
        raise CertificateError(f"{path} has more than {limit} bytes; it is not what belongs there.")
    return content


def exists(path: Path) -> bool:
    """True when the file is there.

    Raises: CertificateError: its directory may not be searched by this user, so that nobody can say.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        raise CertificateError(f"{path} may not be looked for by this user; run the command with sudo.") from None
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from error
    return True


def require_absent(paths: Sequence[Path]) -> None:
    """Return when none of the files exists.

    Raises: CertificateError: names those that do.
    """
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        verb, them = ("exist", "them") if len(existing) > 1 else ("exists", "it")
        raise CertificateError(f"{', '.join(existing)} {verb} already; give --force to replace {them}.")


def write_all(files: Sequence[NewFile]) -> None:
    """Write all files, in their order, or none; a reader sees an old or a new file, never half of one.

    Each is made complete beside its target (O_EXCL, its final mode before its first byte, fsync) and then moved into
    place. Files that replace others are moved one after the other, so that for an instant a new key may stand beside
    an old certificate: give the key first, and let the reader keep its last good pair.

    Raises: CertificateError: a file exists and may not be replaced, or cannot be written; nothing changed.
    """
    require_absent([file.path for file in files if not file.replace])
    directories = list(dict.fromkeys(file.path.parent for file in files))
    with contextlib.ExitStack() as cleanup:
        for directory in directories:
            _make_directory(directory, cleanup)
        staged = [_stage(file, cleanup) for file in files]
        with contextlib.ExitStack() as undo:
            for file, temporary in zip(files, staged, strict=True):
                _publish(file, temporary, cleanup, undo)
            for directory in directories:
                _sync_directory(directory)
            undo.pop_all()


def remove(path: Path) -> None:
    """Remove the file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def too_open(path: Path, access: Access) -> str | None:
    """Return a sentence when more people may read or write the file than should, or None."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        return f"{path}: its mode cannot be read: {error.strerror}."
    allowed = {"public": 0o755, "service": 0o640, "owner": 0o600}[access]
    if access != "public":
        allowed |= 0o100  # an execute bit for the owner gives nobody anything
    if mode & ~allowed & 0o777:
        wanted = {"public": "0644", "service": "0640", "owner": "0600"}[access]
        return f"{path} has mode {mode:04o}, which lets in others than it should; run: chmod {wanted} {path}"
    return None


def _ownership(file: NewFile) -> tuple[int, int, int]:
    """Return uid, gid (-1: as it comes) and mode.

    A key that the operator handed to another user or group stays theirs when it is replaced.
    """
    if file.access == "public":
        return -1, -1, 0o644
    if file.access == "owner":
        return -1, -1, 0o600
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # nothing there to follow; if there is more to it, writing will tell
            old = file.path.lstat()
            if old.st_uid != 0 or old.st_gid != 0:
                return old.st_uid, old.st_gid, (stat.S_IMODE(old.st_mode) & 0o640) | 0o400
    gid = service_group()
    return (-1, gid, 0o640) if gid is not None else (-1, -1, 0o600)


def _make_directory(directory: Path, cleanup: contextlib.ExitStack) -> None:
    missing = []
    probe = directory
    while not os.path.lexists(probe):
        missing.append(probe)
        probe = probe.parent
    for path in reversed(missing):
        gid = service_group()
        try:
            path.mkdir(mode=0o700)
            cleanup.callback(_remove_directory_if_empty, path)
            if gid is not None:
                os.chown(path, -1, gid)
                path.chmod(0o750)
        except OSError as error:
            raise _cannot_write(path, error) from error


def _stage(file: NewFile, cleanup: contextlib.ExitStack) -> Path:
    temporary = file.path.with_name(f".{file.path.name}.{secrets.token_hex(8)}.new")
    uid, gid, mode = _ownership(file)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        cleanup.callback(remove, temporary)
        with os.fdopen(descriptor, "wb") as stream:
            # While the file is empty it has nothing to hide: group first, then the mode that lets the group read.
            if uid != -1 or gid != -1:
                os.fchown(descriptor, uid, gid)
            os.fchmod(descriptor, mode)
            stream.write(file.content)
            stream.flush()
            os.fsync(descriptor)
    except OSError as error:
        raise _cannot_write(file.path, error) from error
    return temporary


def _publish(file: NewFile, temporary: Path, cleanup: contextlib.ExitStack, undo: contextlib.ExitStack) -> None:
    """Move the file into place, and note how to take it back."""
    try:
        if file.replace and os.path.lexists(file.path):
            backup = file.path.with_name(f".{file.path.name}.{secrets.token_hex(8)}.old")
            os.link(file.path, backup, follow_symlinks=False)
            cleanup.callback(remove, backup)
            undo.callback(os.replace, backup, file.path)
            os.replace(temporary, file.path)
        else:
            # link, unlike rename, fails when somebody made the target in the meantime
            os.link(temporary, file.path)
            undo.callback(remove, file.path)
    except FileExistsError:
        raise CertificateError(
            f"{file.path} exists already; nothing was written. Give --force to replace it."
        ) from None
    except OSError as error:
        raise _cannot_write(file.path, error) from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_directory_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _cannot_write(path: Path, error: OSError) -> CertificateError:
    remedy = "free some space" if error.errno == errno.ENOSPC else "run the command with sudo, or choose another --dir"
    return CertificateError(f"{path} cannot be written: {error.strerror}; nothing was written. To go on, {remedy}.")
