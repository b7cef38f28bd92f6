"""Logging: one line an event, `key=value` fields behind the sentence; to the journal with native fields under systemd.

Errors and refusals are logged each, up to a rate; what was suppressed is counted and said. Keys never come here: code
logs principals' names and key ids.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = "appliance"
# Control characters, line and paragraph separators, direction overrides, lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}


class SentenceFormatter(logging.Formatter):
    """`sentence key=value …`, for the journal, which stamps time and level itself."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_quoted(value)}" for key, value in extra_fields(record).items())
        line = f"{_one_line(record.getMessage())} {fields}".rstrip()
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class FieldFormatter(SentenceFormatter):
    """`2026-11-21T10:00:00Z INFO sentence key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        return f"{stamp} {record.levelname:<7} {super().format(record)}"


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """What was given as `extra=`; not the journal's upper-case fields."""
    return {key: value for key, value in record.__dict__.items() if key not in _PLAIN and not key.isupper()}


def set_up(level: str) -> None:
    """Send our log to the journal when systemd reads our stderr and its library is here, else to stderr as text."""
    root = logging.getLogger(ROOT)
    root.setLevel(level.upper())
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_journal_handler() or _stderr_handler())


def set_level(level: str) -> None:
    """Change the least level that is written."""
    logging.getLogger(ROOT).setLevel(level.upper())


def stderr_is_journal() -> bool:
    """Whether the journal reads our stderr. Source: systemd.exec(5), JOURNAL_STREAM: device and inode of the stream."""
    try:
        stat = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def _journal_handler() -> logging.Handler | None:
    if not stderr_is_journal():
        return None
    try:
        from systemd.journal import JournalHandler  # optional dependency: the `systemd` extra
    except ImportError:
        return None

    class FieldJournalHandler(JournalHandler):  # type: ignore[misc]  # the library has no types
        """Journal fields are upper case; ours come as lower-case `extra=` keys, and stand in the line as well."""

        def emit(self, record: logging.LogRecord) -> None:
            for key, value in extra_fields(record).items():
                record.__dict__[key.upper()] = value
            super().emit(record)

    handler: logging.Handler = FieldJournalHandler(SYSLOG_IDENTIFIER="inference-appliance")
    handler.setFormatter(SentenceFormatter())
    return handler


def _stderr_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FieldFormatter())
    return handler


class RateLimitedLog:
    """Writes up to `per_second` lines of one kind a second, then one line that says how many were left out."""

    def __init__(
        self, logger: logging.Logger, per_second: int = 10, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._per_second = per_second
        self._clock = clock
        self._windows: dict[str, tuple[int, int]] = {}

    def write(self, kind: str, level: int, message: str, **fields: Any) -> None:
        """Log `message` with `fields`, unless this kind has had its share of the running second."""
        second = int(self._clock())
        start, count = self._windows.get(kind, (second, 0))
        if second != start:
            if count > self._per_second:
                suppressed = count - self._per_second
                self._logger.log(level, "%d more lines of this kind were left out", suppressed, extra={"kind": kind})
            start, count = second, 0
        self._windows[kind] = (start, count + 1)
        if count < self._per_second:
            self._logger.log(level, "%s", message, extra=fields)


def _one_line(text: str) -> str:
    """Whatever a caller sent may not start a line of its own in the log, nor steer the terminal that shows it."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _quoted(value: object) -> str:
    text = str(value)
    if not text or " " in text or '"' in text:
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return _one_line(text)
