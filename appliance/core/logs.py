"""Logging: one line an event, with fields; to the journal as fields of its own under systemd, else as text or JSON.

Each component, a room of the package, may have a level of its own (`set_levels`). Errors and refusals are logged each,
up to a rate; what was left out is counted and said. Keys never come here: code logs principals' names and key ids.
docs/logs.md is for operators.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from appliance.core.files import printable

ROOT = "appliance"
COMPONENTS = ("api", "catalog", "core", "daemon", "engine", "media", "orchestrator", "pki", "tasks", "wire")
"""Rooms of the daemon; what else is logged has the level of the configuration."""

Level: TypeAlias = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[str, ...] = get_args(Level)

_PLAIN = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}
# Source: syslog(3). The journal's priorities.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


# Source: api/keys.py. A key is 64 hexadecimal digits.
_KEY = re.compile(r"[0-9a-fA-F]{64,}")


def without_keys(text: str) -> str:
    """A sentence that quotes a caller, who may have put a key where a name belongs."""
    return _KEY.sub("[64 digits]", text)


class SentenceFormatter(logging.Formatter):
    """`sentence key=value …`, for the journal, which stamps time and level itself."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_quoted(value)}" for key, value in extra_fields(record).items())
        line = f"{printable(record.getMessage())} {fields}".rstrip()
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class FieldFormatter(SentenceFormatter):
    """`2026-11-21T10:00:00.000Z INFO sentence key=value …`."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{_stamp(record)} {record.levelname:<7} {super().format(record)}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: time, level, component, pid, message, the fields, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "component": _component(record),
            "pid": record.process,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in extra_fields(record).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, separators=(",", ":"))


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """What was given as `extra=`."""
    return {key: value for key, value in record.__dict__.items() if key not in _PLAIN}


def set_up(level: str, form: str = "text", own: Mapping[str, str] | None = None) -> None:
    """Send the log to the journal when systemd reads our stderr and its library is here, else to stderr.

    Libraries' warnings go the same way.

    Args: form: of lines on stderr, "text" or "json". level, own: see `set_levels`.
    """
    handler = _journal_handler() or _stderr_handler(form)
    ours, libraries = logging.getLogger(ROOT), logging.getLogger()
    ours.propagate = False
    for logger in (ours, libraries):
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
    set_levels(level, own or {})


def set_levels(level: str, own: Mapping[str, str]) -> None:
    """Change the least level that is written. Args: own: of components that have one of their own."""
    logging.getLogger(ROOT).setLevel(level.upper())
    for component in COMPONENTS:
        logging.getLogger(f"{ROOT}.{component}").setLevel(own.get(component, "notset").upper())


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
        from systemd.journal import send  # optional dependency: the `systemd` extra
    except ImportError:
        return None
    return JournalHandler(send)


class JournalHandler(logging.Handler):
    """Sends each line with its fields, in upper case, as fields of the journal; they stand in the line as well."""

    def __init__(self, send: Callable[..., object]) -> None:
        """Args: send: `systemd.journal.send`. The library's own handler sends Python's inner values along."""
        super().__init__()
        self._send = send
        self.setFormatter(SentenceFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Send it."""
        try:
            fields = {key.upper(): printable(value) for key, value in extra_fields(record).items()}
            fields |= {
                "PRIORITY": str(_PRIORITIES.get(record.levelno, 5)),
                "SYSLOG_IDENTIFIER": "inference-appliance",
                "COMPONENT": _component(record),
                "LOGGER": record.name,
            }
            self._send(
                self.format(record),
                CODE_FILE=record.pathname,
                CODE_LINE=record.lineno,
                CODE_FUNC=record.funcName,
                **fields,
            )
        except Exception:
            # As every handler: what cannot be logged must not fail who logs.
            self.handleError(record)


def _stderr_handler(form: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else FieldFormatter())
    return handler


def _later(seconds: float, work: Callable[[], None]) -> None:
    """Have `work` done on the running loop; where there is none it is done with the next line."""
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop().call_later(seconds, work)


class Share:
    """How many lines a second all rate-limited logs of a process may write together."""

    def __init__(self, lines: int) -> None:
        self.lines = lines
        self._second = 0
        self._written = 0

    def take(self, second: int) -> bool:
        """Whether there may be one more in that second; it is counted then."""
        if second != self._second:
            self._second, self._written = second, 0
        self._written += 1
        return self._written <= self.lines


_share = Share(100)


def limit(lines: int) -> None:
    """Have the rate-limited logs of this process write so many lines a second at most."""
    _share.lines = lines


class RateLimitedLog:
    """Writes so many lines of a kind a second, within the process's `Share`; a second later it says what it left out.

    Used from one thread. Kinds come from fixed tables.
    """

    def __init__(
        self,
        logger: logging.Logger,
        per_second: int = 10,
        share: Share = _share,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], None] = _later,
    ) -> None:
        """Args: per_second: lines of one kind. later: has something done after so many seconds."""
        self._logger = logger
        self._per_second = per_second
        self._share = share
        self._clock = clock
        self._later = later
        self._second = 0
        self._counts: dict[str, int] = {}
        self._left_out: dict[str, tuple[int, int]] = {}  # kind → level, lines
        _limited.add(self)

    def write(self, kind: str, level: int, message: str, **fields: Any) -> None:
        """Log `message` with `fields`, unless this kind, or all together, have had their share of this second.

        Args: message: may quote a caller. fields: an `exc_info` among them is an exception, whose traceback is written.
        """
        if not self._logger.isEnabledFor(level):
            return
        second = int(self._clock())
        if second != self._second:
            self.tell()
            self._second = second
            self._counts.clear()
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count <= self._per_second and self._share.take(second):
            self._logger.log(level, "%s", without_keys(message), exc_info=fields.pop("exc_info", None), extra=fields)
            return
        if not self._left_out:
            self._later(1.0, self.tell)
        self._left_out[kind] = (level, self._left_out.get(kind, (level, 0))[1] + 1)

    def tell(self) -> None:
        """Say now what was left out since it was said last."""
        for kind, (level, count) in self._left_out.items():
            fields = {"kind": kind, "count": count}
            self._logger.log(level, "%d more lines of this kind were left out", count, extra=fields)
        self._left_out.clear()


_limited: "weakref.WeakSet[RateLimitedLog]" = weakref.WeakSet()


def tell_left_out() -> None:
    """Say now what every `RateLimitedLog` left out: the process ends."""
    for limited in list(_limited):
        limited.tell()


def _stamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _component(record: logging.LogRecord) -> str:
    """The room that a line comes from; of a library its name."""
    first, _, rest = record.name.partition(".")
    return rest.partition(".")[0] if first == ROOT else first


def _quoted(value: object) -> str:
    text = str(value)
    if not text or " " in text or '"' in text:
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return printable(text)
