"""What one process counts, in memory that another reads: cells of float64, and a directory of what they are.

Whoever counts writes, and never waits; whoever reads needs no help of it, also after it is gone. A segment holds, in
bytes: 0 to 7 where the directory ends (int64, written last); from 64 on the directory, a line for each series: its
CRC-32, a blank, and JSON; from the end of the segment downwards the cells. Numbers are in the machine's own order, and
8 bytes that are aligned are read and written as a whole.

What is read is not believed: a model with a memory fault may have written anywhere in its process.
"""

import json
import logging
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, Union

from appliance.core.shared import Segment

SIZE = 4 * 2**20
"""Bytes of a segment with room for more than ten thousand series; only what is used costs memory."""

_log = logging.getLogger(__name__)

_START = 64
_CELL = 8

Cells: TypeAlias = Union[list[float], "memoryview[float]"]
"""Numbers of one series, in this process alone or for all to see."""


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


class Ledger:
    """The side that counts. There is one for a segment, which nobody has written to before."""

    def __init__(self, segment: Segment) -> None:
        self._view = segment.view
        self._end = segment.view[:_CELL].cast("q")  # written as a whole, which struct.pack_into does not do
        self._end[0] = _START
        self._cells = segment.size
        self._full = False

    def add(self, family: str, kind: str, labels: tuple[str, ...], created: float, count: int) -> Cells | None:
        """Cells for one more series, all zero; None when the segment is full, which the log says once."""
        end, offset = self._end[0], self._cells - count * _CELL
        text = json.dumps([family, kind, labels, created, offset, count], separators=(",", ":")).encode()
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        if end + len(line) > offset:
            if not self._full:
                _log.warning("there is no room for more metrics; new series of this process are not shown")
            self._full = True
            return None
        self._view[end : end + len(line)] = line
        self._cells = offset
        self._end[0] = end + len(line)
        return self._view[offset : offset + count * _CELL].cast("d")


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
            if entry is not None and _START <= entry.offset <= self.segment.size - entry.count * _CELL:
                yield entry

    def values(self, entry: Entry) -> list[float]:
        """What its cells hold now: any numbers, infinite ones and NaN among them."""
        return list(struct.unpack_from(f"{entry.count}d", self.segment.view, entry.offset))


def _entry(text: bytes) -> Entry | None:
    try:
        family, kind, labels, created, offset, count = json.loads(text)
        entry = Entry(str(family), str(kind), tuple(map(str, labels)), float(created), int(offset), int(count))
        "".join(entry.labels).encode()  # what is not UTF-8 would fail the whole exposition
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return entry if entry.count > 0 and entry.offset % _CELL == 0 and 0 <= entry.created < float("inf") else None
