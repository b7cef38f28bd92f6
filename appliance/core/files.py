"""Files that are replaced as a whole, for the service to read and nobody else."""

import contextlib
import grp
import os
import tempfile
from pathlib import Path

SERVICE_GROUP = "inference-appliance"
"""The group that the service runs in; what root writes for it is readable by that group."""


def service_group() -> int | None:
    """The service group's number when root is writing and there is one, else None."""
    if os.geteuid() != 0:
        return None
    try:
        return grp.getgrnam(SERVICE_GROUP).gr_gid
    except KeyError:
        return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: readers see the old content or the new, also after a crash.

    Its mode is 0640 with the service group where root writes for that, else 0600. Raises: OSError.
    """
    group = service_group()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            if group is not None:
                os.fchown(file.fileno(), -1, group)
            os.fchmod(file.fileno(), 0o600 if group is None else 0o640)
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
