"""Files that are replaced as a whole, for the service to read and nobody else; folders that one process changes at a
time; files in memory alone; and names of files as they may be shown."""

import contextlib
import errno
import fcntl
import grp
import os
import re
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from appliance.core.errors import AccessRefused, CertificateError, ConfigError, DiskFull

SERVICE_GROUP = "inference-appliance"
"""The group that the service runs in; what root writes for it is readable by that group."""

_NO_LOCKS = frozenset({errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
"""What flock(2) says of a folder where the file system has no locks for folders, NFS for one."""

_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

# Control characters, line and paragraph separators, direction overrides, lone surrogates.
_UNSHOWABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """The text of anything on one line that every terminal, log and encoding takes: what they do not is escaped."""
    return _UNSHOWABLE.sub(_escaped, str(text))


def one_line(error: Exception) -> str:
    """What an error says, on one line: a list of problems has one each."""
    parts = [part.strip() for part in str(error).splitlines()]
    return printable("; ".join(filter(None, parts)).replace(":; ", ": "))


def _escaped(found: re.Match[str]) -> str:
    number = ord(found[0])
    # A byte of a file name that is not UTF-8 reaches Python as a surrogate (PEP 383): show that byte.
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else found[0].encode("unicode_escape").decode()


def file_error(error: OSError, sentence: str) -> ConfigError:
    """The operator's error for a file that cannot be used, by who can mend it how.

    Args: sentence: names the file and what to do.
    """
    if error.errno in _REFUSED:
        return AccessRefused(sentence)
    return DiskFull(sentence) if error.errno in _FULL else ConfigError(sentence)


@contextlib.contextmanager
def authorities_of(key: str, file: Path | None) -> Iterator[None]:
    """Read a PEM file of authorities' certificates into an SSLContext within this block.

    Args:   key: of the configuration, which names it.
    Raises: CertificateError: it cannot be read, or holds no certificate.
    """
    try:
        yield
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError, and bears no errno of the system's
        why = None if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
        raise CertificateError(
            f"{key} {file} cannot be used: {why or 'it is not a PEM file of certificates'}. Name a file that the "
            "service may read, or remove the key."
        ) from error


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Keep out others who want to change the same folder: a lock on it, freed too when the process is killed.

    Without effect where the file system cannot lock a folder.

    Raises: OSError: the folder cannot be opened; somebody has the lock (BlockingIOError) and `wait` is not wanted.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def service_group() -> int | None:
    """The service group's number when root is writing and there is one, else None."""
    if os.geteuid() != 0:
        return None
    try:
        return grp.getgrnam(SERVICE_GROUP).gr_gid
    except KeyError:
        return None


def make_folder(folder: Path) -> None:
    """A folder and those above it: where root makes them, 0750 with the service's group. Raises: OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    group = service_group()
    for path in reversed(missing):
        path.mkdir(mode=0o700)
        if group is not None:
            os.chown(path, -1, group)
            path.chmod(0o750)


def write_atomically(path: Path, text: str, mode: int | None = None) -> None:
    """Replace a file as a whole: readers see the old content or the new, also after a crash.

    Args:   mode: of what is nobody's secret; by default 0640 with the service group where root writes for that, else
        0600.
    Raises: OSError.
    """
    group = service_group() if mode is None else None
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if group is not None:
                os.fchown(file.fileno(), -1, group)
            os.fchmod(file.fileno(), mode or (0o600 if group is None else 0o640))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, 0600, for the block to write; it is removed again when that fails.

    Raises: OSError: it cannot be made (FileExistsError: it is there), or not be written.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def in_memory(content: bytes) -> Iterator[str]:
    """A file in memory alone, as a path: `ssl` loads keys from files only, and a key must not touch a disk."""
    handle = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)
