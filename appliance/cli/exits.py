"""What the `appliance` command ends with, and how an error of ours is told: one line on stderr, or in the journal."""

from appliance.core import logs
from appliance.core.errors import (
    AccessRefused,
    AddressError,
    ApplianceError,
    CertificateError,
    ConfigError,
    DeviceError,
    DiskFull,
)
from appliance.core.files import file_error, one_line, printable

OK = 0
FOUND = 1
OPERATOR = 2

STATUSES: tuple[tuple[int, str, type[ApplianceError] | None], ...] = (
    (OK, "Done; for `serve`: stopped when it was told to, and everybody was answered.", None),
    (
        FOUND,
        "`check`, `doctor` or `certs inspect` found a fault; `status` says degraded or unhealthy; or something failed "
        "that nobody foresaw.",
        None,
    ),
    (OPERATOR, "The configuration or the command line is wrong, or something else that the sentence names.", None),
    (
        3,
        "A certificate, its key, a trust bundle or a revocation list is missing, unreadable or of no use.",
        CertificateError,
    ),
    (4, "A port or a socket's path is taken, or may not be listened on.", AddressError),
    (5, "A file or folder may not be read or written: its permissions, or a read-only file system.", AccessRefused),
    (6, "The disk, or a quota, is full.", DiskFull),
    (7, "The device that engine.device demands cannot be used.", DeviceError),
)
"""Exit status, what it means, and the errors that end with it; the others end with OPERATOR. The unit does not start
again after 2, 3 and 5 (RestartPreventExitStatus=), which only the operator can mend."""


def status_of(error: ApplianceError) -> int:
    """The exit status that an error ends the command with."""
    return next((status for status, _, kind in STATUSES if kind is not None and isinstance(error, kind)), OPERATOR)


def foreseen(error: OSError) -> ConfigError | None:
    """What the system said of a file where nobody looked at it, when an operator can mend it; else None."""
    where = printable(error.filename) if isinstance(error.filename, str) else "A file"
    found = file_error(error, f"{where} cannot be used: {error.strerror}.")
    return found if isinstance(found, DiskFull) or (type(found) is not ConfigError and error.filename) else None


def tell(error: ApplianceError) -> str:
    """The line for stderr: as it is for a person; under systemd a single line of priority `err`.

    Source: sd-daemon(3): "<3>" in front of a line that the journal reads is its priority.
    """
    return f"<3>{one_line(error)}" if logs.stderr_is_journal() else f"error: {error}"
