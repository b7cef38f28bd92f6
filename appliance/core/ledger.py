"""What one process counts, in memory that another reads: cells of float64, and a directory of what they are.

Whoever counts writes, and never waits; whoever reads needs no help of it, also after it is gone. A segment holds, in
bytes: 0 to 7 where the directory ends (int64, written last); from 64 on the directory, a line for each series: its
CRC-32, a blank, and JSON; from the end of the segment downwards the cells, each series' notes behind them. Numbers are
in the machine's own order, and 8 bytes that are aligned are read and written as a whole.

A note says of one cell whose number was the last in it: value, Unix time, and the request's id. It is written in one
piece of 128 bytes, which is no lock: a reader that meets the writer finds two readings that differ, and leaves it out.

What is read is not believed: a model with a memory fault may have written anywhere in its process.
"""

import json
import logging
import re
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, Union

from appliance.core.shared import Segment
from appliance.core.timing import TRACE

SIZE = 32 * 2**20
"""Bytes of a segment with room for some ten thousand series; only what is used costs memory."""

_log = logging.getLogger(__name__)

_START = 64
_CELL = 8

OTHER = "other"
"""Label of what there is no room to count by itself."""

Cells: TypeAlias = Union[list[float], "memoryview[float]"]
"""Numbers of one series, in this process alone or for all to see."""

NOTE = struct.Struct("dd112s")
"""A note: value, Unix time, id; all zero where there is none."""

_ID = re.compile(rb"[!#-\[\]-~]+")
"""What an id may be made of: printable ASCII without blanks, quotes and backslashes."""


class Note(NamedTuple):
    """Whose number was the last in a cell."""

    value: float
    at: float
    """Unix time."""
    id: str
    """The request's, or behind `TRACE` that of its trace."""

    @property
    def label(self) -> tuple[str, str]:
        """What an exemplar says of it: name and value."""
        return ("trace_id", self.id.removeprefix(TRACE)) if self.id.startswith(TRACE) else ("req_id", self.id)


def write_note(notes: "bytearray | memoryview[int]", cell: int, value: float, request: str) -> None:
    """Note whose number went into a cell. Args: notes: of all cells. request: its id, 112 characters at most."""
    place = cell * NOTE.size
    notes[place : place + NOTE.size] = NOTE.pack(value, time.time(), request.encode("ascii", "replace"))


def read_note(data: bytes) -> Note | None:
    """What is noted there, if it can be so."""
    value, at, text = NOTE.unpack(data)
    name = text.rstrip(b"\0")
    if not (0 < at < float("inf") and 0 <= value < float("inf") and _ID.fullmatch(name)):
        return None
    return Note(value, at, name.decode("ascii"))


@dataclass(frozen=True, slots=True)
class Entry:
    """One series, and where its cells are."""

    family: str
    kind: str
    labels: tuple[str, ...]
    created: float
    """Unix time."""
    offset: int
    count: int
    notes: int
    """How many of the first cells have notes."""

    @property
    def size(self) -> int:
        """Bytes from `offset` on."""
        return self.count * _CELL + self.notes * NOTE.size


class Ledger:
    """The side that counts. There is one for a segment, which nobody has written to before."""

    def __init__(self, segment: Segment) -> None:
        self._view = segment.view
        self._end = segment.view[:_CELL].cast("q")  # written as a whole, which struct.pack_into does not do
        self._end[0] = _START
        self._cells = segment.size
        self._full = False

    def add(
        self, family: str, kind: str, labels: tuple[str, ...], created: float, count: int, notes: int = 0
    ) -> "tuple[Cells, memoryview[int]] | None":
        """Cells for one more series and notes for the first of them, all zero.

        Returns: None when the segment is full, which the log says once.
        """
        end, offset = self._end[0], self._cells - count * _CELL - notes * NOTE.size
        text = json.dumps([family, kind, labels, created, offset, count, notes], separators=(",", ":")).encode()
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        if end + len(line) > offset:
            if not self._full:
                _log.warning("there is no room for more metrics; new series of this process are not shown")
            self._full = True
            return None
        self._view[end : end + len(line)] = line
        self._cells = offset
        self._end[0] = end + len(line)
        behind = offset + count * _CELL
        return self._view[offset:behind].cast("d"), self._view[behind : behind + notes * NOTE.size]


class LedgerReader:
    """The side that reads."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._read = _START

    def new_entries(self) -> Iterator[Entry]:
        """Those added since the last call; they stay where they are.

        A line that is not whole ends it: the next call tries again. One that is, and says what cannot be, is left out.
        """
        view = self.segment.view
        end = min(struct.unpack_from("q", view)[0], self.segment.size)
        # On some processors the length may be seen before the lines: their checksums tell.
        for line in bytes(view[self._read : end] if end > self._read else b"").splitlines(keepends=True):
            text = line[9:-1]
            if line != b"%08x %b\n" % (zlib.crc32(text), text):
                return
            self._read += len(line)
            entry = _entry(text)
            if entry is not None and _START <= entry.offset <= self.segment.size - entry.size:
                yield entry

    def values(self, entry: Entry) -> list[float]:
        """What its cells hold now: any numbers, infinite ones and NaN among them."""
        return list(struct.unpack_from(f"{entry.count}d", self.segment.view, entry.offset))

    def notes(self, entry: Entry) -> dict[int, Note]:
        """What is noted of its cells now, by cell."""
        start = entry.offset + entry.count * _CELL
        one, two = (bytes(self.segment.view[start : start + entry.notes * NOTE.size]) for _ in range(2))
        found = {}
        for cell in range(entry.notes):
            place = slice(cell * NOTE.size, (cell + 1) * NOTE.size)
            note = read_note(one[place]) if one[place] == two[place] else None
            if note is not None:
                found[cell] = note
        return found


def _entry(text: bytes) -> Entry | None:
    try:
        family, kind, labels, created, offset, count, notes = json.loads(text)
        entry = Entry(
            str(family), str(kind), tuple(map(str, labels)), float(created), int(offset), int(count), int(notes)
        )
        "".join(entry.labels).encode()  # what is not UTF-8 would fail the whole exposition
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    sound = 0 <= entry.notes <= entry.count > 0 and entry.offset % _CELL == 0 and 0 <= entry.created < float("inf")
    return entry if sound else None
