"""What callers used, kept on the disk: one SQLite file, in rows of a minute that become coarser as they grow old.

A row says how much a `UsageKey` used in a period that began then. Rows are never dropped: when there are more of a
period than `MOST_ROWS`, the older half of them is added up to the next longer one, and months at last to one row a
month for everybody. Nothing here depends on what the clock says but the period that is written down: a clock that jumps
makes a few odd periods, and each amount is still in one row.

Rows are reported once: those of a new report are marked in the transaction that keeps the report, which stays until it
was taken. What is used of the same period afterwards is in a row of its own.
"""

import contextlib
import enum
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from appliance.core.errors import AccessRefused, ConfigError, DiskFull
from appliance.core.files import file_error
from appliance.core.usage import EVERYBODY_ELSE, Amounts, UsageKey

FILE = "usage.sqlite3"
"""Its name in the state folder; SQLite has two more beside it, `-wal` and `-shm`."""

_PATIENCE_S = 5.0
"""Seconds that whoever finds the file locked waits."""

_WAL_SIZE = 8 * 2**20
"""Bytes that the log of changes shrinks to when it is empty."""

_REFUSED = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

REPORT_ROWS = 500
"""Rows of one report at most: some 150 kB."""


class Period(enum.IntEnum):
    """How long a row's time is."""

    MINUTE = 0
    HOUR = 1
    DAY = 2
    MONTH = 3

    def start(self, moment: float) -> int:
        """When the period that a moment lies in began; both Unix time. Moments of no calendar go to its ends."""
        second = _second(moment)
        if self is Period.MONTH:
            return int(datetime.fromtimestamp(second, UTC).replace(day=1, hour=0, minute=0, second=0).timestamp())
        return second - second % _SECONDS[self]


def _second(moment: float) -> int:
    return int(min(max(moment, 0), _LAST))


_SECONDS = {Period.MINUTE: 60, Period.HOUR: 3600, Period.DAY: 86400}
_LAST = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())

MOST_ROWS: Mapping[Period, int] = {
    Period.MINUTE: 40_000,
    Period.HOUR: 30_000,
    Period.DAY: 20_000,
    Period.MONTH: 10_000,
}
"""Rows of each period, of those that were reported and of those that were not: some 40 MB together."""


class Place(NamedTuple):
    """Where an amount belongs: a period, when it began in Unix time, and who used it."""

    period: Period
    start: int
    key: UsageKey

    def longer(self) -> "Place":
        """The same in the next longer period; of a month, that month of everybody."""
        if self.period is Period.MONTH:
            return self._replace(key=EVERYBODY_ELSE)
        period = Period(self.period + 1)
        return Place(period, period.start(self.start), self.key)


class Row(NamedTuple):
    """How much was used by whom in which period."""

    place: Place
    amounts: Amounts

    def record(self) -> dict[str, object]:
        """As it is told to others, in reports and exports (docs/usage.md)."""
        period, start, key = self.place
        amounts = self.amounts._asdict() | {"seconds": round(self.amounts.seconds, 6)}
        return {"start": iso(start), "period": period.name.lower(), **key._asdict(), **amounts}


@dataclass(frozen=True, slots=True)
class Report:
    """What is posted: the same bytes until it was taken.

    Attributes:
        number: counts reports from 1.
        id: its idempotency key.
        full: it has as many rows as one may have, so that there are more.
    """

    number: int
    id: str
    body: bytes
    full: bool


_KEY = ("reported", "period", "start", *UsageKey._fields)
_SCHEMA_VERSION = 1
_SCHEMA = f"""
CREATE TABLE usage (
    reported INTEGER NOT NULL,
    period INTEGER NOT NULL,
    start INTEGER NOT NULL,
    {"".join(f"{name} TEXT NOT NULL, " for name in UsageKey._fields)}
    {"".join(f"{name} INTEGER NOT NULL, " for name in Amounts._fields[:-1])}
    seconds REAL NOT NULL,
    PRIMARY KEY ({", ".join(_KEY)})
) STRICT, WITHOUT ROWID;
CREATE TABLE report (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, body BLOB NOT NULL, rows INTEGER NOT NULL
) STRICT;
CREATE TABLE appliance (id TEXT NOT NULL) STRICT;
"""

_ADD = (
    f"INSERT INTO usage ({', '.join((*_KEY, *Amounts._fields))}) "
    f"VALUES ({', '.join('?' * len((*_KEY, *Amounts._fields)))}) "
    f"ON CONFLICT DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in Amounts._fields)}"
)
_SELECT = f"SELECT {', '.join((*_KEY[1:], *Amounts._fields))} FROM usage "
_SUMS = (
    f"SELECT {', '.join((*_KEY[1:], *(f'sum({name})' for name in Amounts._fields)))} FROM usage "
    f"WHERE start >= ? AND start < ? GROUP BY {', '.join(_KEY[1:])} ORDER BY start, {', '.join(_KEY[1:])}"
)
_DELETE = f"DELETE FROM usage WHERE {' AND '.join(f'{name} = ?' for name in _KEY)}"
_CAN_SHRINK = f"reported = ? AND period = ? AND (period < {Period.MONTH} OR method <> '{EVERYBODY_ELSE.method}')"
"""Rows that can be added up: all but months of everybody together."""


def iso(second: int) -> str:
    """Unix time as ISO 8601 in UTC has it."""
    return datetime.fromtimestamp(second, UTC).isoformat().replace("+00:00", "Z")


def added(amounts: Iterable[tuple[Place, Amounts]]) -> dict[Place, Amounts]:
    """The amounts of each place together."""
    sums: dict[Place, Amounts] = {}
    for place, more in amounts:
        sums[place] = sums.get(place, Amounts()).plus(more)
    return sums


class UsageStore:
    """The file, opened when it is first needed. Any thread may use it.

    Methods raise ConfigError when the file cannot be used, and have changed nothing then; the next call tries anew.
    """

    def __init__(self, path: Path, most_rows: Mapping[Period, int] = MOST_ROWS) -> None:
        self.path = path
        self._most_rows = most_rows
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the file; idempotent."""
        with self._lock:
            self._close()

    def add(self, amounts: Mapping[Place, Amounts]) -> None:
        """So much more was used: all of it is on the disk when this returns."""
        with self._transaction() as connection:
            _add(connection, amounts.items())

    def compact(self) -> None:
        """Add old rows up where there are more than there may be."""
        for reported in (False, True):
            for period, most in self._most_rows.items():
                with self._transaction() as connection:
                    query = f"SELECT count(*) FROM usage WHERE {_CAN_SHRINK}"
                    count = connection.execute(query, (reported, period)).fetchone()[0]
                    if count > most:
                        _shrink(connection, period, count // 2, reported=reported)

    def next_report(self, about: Mapping[str, object], now: float) -> Report | None:
        """The report that was not taken yet, else a new one of what was never reported; None when all was.

        Args: about: what its receiver is told of this appliance. now: Unix time.
        """
        with self._transaction() as connection:
            query = "SELECT number, id, body, rows FROM report ORDER BY number LIMIT 1"
            found = connection.execute(query).fetchone() or _make_report(connection, about, now)
        if found is None:
            return None
        number, report_id, body, rows = found
        return Report(number, report_id, body, full=rows == REPORT_ROWS)

    def taken(self, report: Report) -> None:
        """The receiver has it."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM report WHERE number = ?", (report.number,))

    def waiting(self) -> int:
        """How many rows no receiver has."""
        with self._transaction() as connection:
            new = connection.execute("SELECT count(*) FROM usage WHERE reported = 0").fetchone()[0]
            return int(new + connection.execute("SELECT coalesce(sum(rows), 0) FROM report").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _told(self.path):
            try:
                connection = self._connection or self._open()
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                finally:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
            except sqlite3.DatabaseError as error:
                # After a full disk or a bad sector the connection stays, so that nobody can doubt what was committed.
                if not isinstance(error, sqlite3.OperationalError):
                    self._close()
                raise

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
        connection = sqlite3.connect(self.path, _PATIENCE_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # Each commit is on the disk: a report that was posted and then forgotten would be made, and counted, again.
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_SIZE}")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                appliance = f"INSERT INTO appliance VALUES ('{uuid.uuid4().hex}');"
                end = f"PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {appliance} {end}")
            _check_version(self.path, version or _SCHEMA_VERSION)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()


def read(path: Path, since: float, until: float) -> list[Row]:
    """Rows whose periods began within a time, oldest first; `since` is in it, `until` is not. Unix time.

    The daemon may be at work meanwhile.

    Raises: ConfigError: there is no such file, or it cannot be read.
    """
    with _told(path):
        path.stat()  # SQLite does not say why it cannot open a file
        address = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, _PATIENCE_S, uri=True)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:  # it is being made
                return []
            _check_version(path, version)
            return [_row(values) for values in connection.execute(_SUMS, (since, until)).fetchall()]


def _check_version(path: Path, version: int) -> None:
    if version != _SCHEMA_VERSION:
        raise ConfigError(
            f"{path} was written by another version of the appliance (its tables are {version}, and we know "
            f"{_SCHEMA_VERSION}); install that one, or move the file away: a new one is begun then."
        )


def _row(values: Sequence[Any]) -> Row:
    key = 2 + len(UsageKey._fields)
    return Row(Place(Period(values[0]), values[1], UsageKey(*values[2:key])), Amounts(*values[key:]))


def _add(connection: sqlite3.Connection, amounts: Iterable[tuple[Place, Amounts]], *, reported: bool = False) -> None:
    values = ((*place[:2], *place.key, *map(int, more[:-1]), more.seconds) for place, more in amounts)
    connection.executemany(_ADD, ((reported, *each) for each in values))


def _shrink(connection: sqlite3.Connection, period: Period, count: int, *, reported: bool) -> None:
    """Add the `count` oldest rows of a period, or some more, up to the next longer one; of months to everybody's."""
    which = (reported, period)
    query = f"SELECT start FROM usage WHERE {_CAN_SHRINK} ORDER BY start LIMIT 1 OFFSET ?"
    (until,) = connection.execute(query, (*which, count)).fetchone()
    old = connection.execute(f"{_SELECT} WHERE {_CAN_SHRINK} AND start <= ?", (*which, until)).fetchall()
    connection.execute(f"DELETE FROM usage WHERE {_CAN_SHRINK} AND start <= ?", (*which, until))
    sums = added((place.longer(), amounts) for place, amounts in map(_row, old))
    _add(connection, sums.items(), reported=reported)


def _make_report(
    connection: sqlite3.Connection, about: Mapping[str, object], now: float
) -> tuple[int, str, bytes, int] | None:
    """A report of the oldest rows that were never reported, which then are; None when there is none."""
    found = connection.execute(f"{_SELECT} WHERE reported = 0 ORDER BY start LIMIT ?", (REPORT_ROWS,)).fetchall()
    if not found:
        return None
    rows = [_row(values) for values in found]
    connection.executemany(_DELETE, ((False, period, start, *key) for (period, start, key), _ in rows))
    _add(connection, rows, reported=True)
    report_id = uuid.uuid4().hex
    query = "INSERT INTO report (id, body, rows) VALUES (?, x'', ?) RETURNING number"
    (number,) = connection.execute(query, (report_id, len(rows))).fetchone()
    (appliance,) = connection.execute("SELECT id FROM appliance").fetchone()
    content = {
        "schema": 1,
        "id": report_id,
        "number": number,
        "made_at": iso(_second(now)),
        "appliance": {"id": appliance, **about},
        "records": [row.record() for row in rows],
    }
    body = json.dumps(content, separators=(",", ":")).encode()
    connection.execute("UPDATE report SET body = ? WHERE number = ?", (body, number))
    return number, report_id, body, len(rows)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Raises: ConfigError: what is wrong with the file, and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise DiskFull(f"{path} cannot be written: {error}; free some space.") from error
        if code in _REFUSED:
            raise AccessRefused(f"{path}: {error}; it and its folder must be ours to read and write.") from error
        if code in _DAMAGED:
            raise ConfigError(
                f"{path} is damaged, or no database of ours ({error}); move it away, with those beside it that end in "
                "-wal and -shm: a new one is begun then."
            ) from error
        raise ConfigError(f"{path} cannot be used: {error}; see whether its disk is well.") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is not there; the daemon makes it when it starts (catalog.state_dir).") from error
    except OSError as error:
        raise file_error(error, f"{path} cannot be used: {error.strerror}.") from error
