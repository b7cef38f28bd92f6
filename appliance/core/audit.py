"""The audit log as files: records that only follow each other, and whether they still do.

A record is a JSON object on a line of its own. Its last member, `hash`, is the SHA-256 of the hash before it and of the
line without that member, so that no record can be changed, taken out or put in without all that follow. `seq` counts
from 1. The first record of each file (`audit-00000001.jsonl`, …) repeats the hash of the last record of the file
before. The oldest files are removed once there are more than wanted, which a record says first. The head record, a file
beside them, says where the log ends: records that were cut off at the end are missed too.

Whoever may write all of it can make all of it anew. A copy of a head that is kept elsewhere (the journal has some)
shows that.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from appliance.core.errors import ConfigError
from appliance.core.files import alone, printable, write_atomically

Event: TypeAlias = Mapping[str, Any]
"""What a record says: `time`, `event`, and more."""

BEGINNING = "0" * 64
"""The hash before the first record."""

_NAME = re.compile(r"audit-([0-9]{8})\.jsonl")
_LINE = re.compile(rb'(\{.*),"hash":"([0-9a-f]{64})"\}\n')
_HEAD = "head.json"
_MODE = 0o640
_TAIL = 2**20
"""Bytes at the end of a file in which its last record is: none is longer."""

_BUFFER = 2**16

_OPENINGS = 100
"""Attempts at opening all files before any of them is removed."""


@dataclass(frozen=True, slots=True)
class Head:
    """A record by its number, its hash and the number of its file."""

    seq: int
    hash: str
    file: int


def now() -> str:
    """The time as records have it, by the machine's clock."""
    return written(datetime.now(UTC))


def written(moment: datetime) -> str:
    """A time in UTC as records have it, so that times compare as text."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def files_in(folder: Path) -> dict[int, Path]:
    """The log's files by their numbers, ascending. Raises: OSError."""
    found = {int(match[1]): folder / name for name in os.listdir(folder) if (match := _NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def read_head(folder: Path) -> Head | None:
    """The head record; None when it is not there, or says nothing that could be one. Raises: OSError."""
    try:
        content = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
        head = Head(int(content["seq"]), str(content["hash"]), int(content["file"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return head if re.fullmatch(r"[0-9a-f]{64}", head.hash) else None


# ---- writing ---------------------------------------------------------------------------------------------------------


class Writer:
    """Appends to the log of one folder; one process does at a time. Every call may take as long as the disk does."""

    def __init__(self, folder: Path, file_size: int, files: int) -> None:
        """Touch nothing yet. Args: file_size: bytes after which another file is begun. files: how many are kept."""
        self.folder = folder
        self._file_size = file_size
        self._files = files
        self._held = contextlib.ExitStack()
        self._file = -1
        self._size = 0
        self._unwritten = bytearray()
        self.head = self._shown_head = Head(0, BEGINNING, 0)
        """Where the log ends."""
        self.found: dict[str, object] = {}
        """What `open` found that the next record should say: it did not end as it should."""

    def open(self) -> None:
        """Have the folder, and know where the log ends; does nothing a second time.

        Raises: OSError. ConfigError: another appliance writes there.
        """
        if self._file >= 0:
            return
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            self.folder.chmod(0o750)  # whatever the umask is
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(alone(self.folder, wait=False))
            except BlockingIOError:
                raise ConfigError(
                    f"Another appliance writes its audit log to {self.folder}; stop it, or set audit.folder."
                ) from None
            self._find_end()
            self._held = held.pop_all()

    def write(self, events: deque[Event]) -> None:
        """Append records, and take from `events` what has its place in the log.

        Raises: OSError: the rest stays in `events`. A record that was written in part is finished by the next call.
        """
        self.open()
        self._flush()
        while events:
            if self._size + len(self._unwritten) >= self._file_size:
                self._begin_file()
            self._put(events.popleft())
            if len(self._unwritten) >= _BUFFER:
                self._flush()
        self._flush()
        if self.head != self._shown_head:
            self._write_head()

    def close(self) -> None:
        """Let the folder go; idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._held.close()

    def _put(self, event: Event) -> None:
        """Give a record its place; it is written by the next `_flush`."""
        before = self.head
        body = json.dumps({"seq": before.seq + 1, **event}, separators=(",", ":"))[:-1]
        digest = _digest(before.hash, body.encode())
        self._unwritten += f'{body},"hash":"{digest}"}}\n'.encode()
        self.head = Head(before.seq + 1, digest, before.file)

    def _flush(self) -> None:
        """Have on the disk what has its place. Raises: OSError."""
        if not self._unwritten:
            return
        while self._unwritten:
            count = os.write(self._file, self._unwritten)
            self._size += count
            del self._unwritten[:count]
        os.fdatasync(self._file)

    def _write_head(self) -> None:
        head = {"seq": self.head.seq, "hash": self.head.hash, "file": self.head.file, "time": now()}
        write_atomically(self.folder / _HEAD, json.dumps(head) + "\n", _MODE)
        self._shown_head = self.head

    def _begin_file(self) -> None:
        """Go on in another file, and remove the oldest ones."""
        self._flush()
        number = max(self.head.file, *files_in(self.folder), 0) + 1
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fresh = os.open(_path(self.folder, number), flags, _MODE)
        os.fchmod(fresh, _MODE)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = fresh, 0
        self.head = Head(self.head.seq, self.head.hash, number)
        self._put({"time": now(), "event": "file", "number": number, "previous": self.head.hash})
        for old in list(files_in(self.folder))[: -self._files]:
            self._put({"time": now(), "event": "removed", "number": old})
            self._flush()
            with contextlib.suppress(OSError):  # one that may not be removed stays, which is no fault
                _path(self.folder, old).unlink()

    def _find_end(self) -> None:
        """Go on behind the last record, or behind what the head record says was the last one."""
        self._unwritten.clear()
        files, head = files_in(self.folder), read_head(self.folder)
        last: Head | None = None
        event = ""
        for number, path in reversed(files.items()):
            found = _last_record(path)
            if found is not None:
                last, event = Head(int(found["seq"]), str(found["hash"]), number), str(found["event"])
                break
        if last is not None and event != "stopped":
            self.found["unclean"] = True
        if head is None and last is not None:
            self.found["no_head"] = True
        if head is not None and (last is None or last.seq < head.seq):
            self.found["lost"] = head.seq - (last.seq if last else 0)
            last = head
        self.head = last or self.head
        if not files or self.head.file not in files:
            self._begin_file()
            return
        newest = max(files)
        self.head = Head(self.head.seq, self.head.hash, newest)
        self._file = os.open(files[newest], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size = os.fstat(self._file).st_size
        if self._size and _tail(files[newest], 1) != b"\n":
            self._unwritten += b"\n"  # the end of a process cut a record short
        if _last_record(files[newest]) is None:
            self._put({"time": now(), "event": "file", "number": newest, "previous": self.head.hash})


def _digest(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()


def _path(folder: Path, number: int) -> Path:
    return folder / f"audit-{number:08d}.jsonl"


def _tail(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return file.read()


def _last_record(path: Path) -> dict[str, Any] | None:
    """The last whole record of a file, None when there is none. Of a line that was cut its end alone may be missing."""
    for line in reversed(_tail(path, _TAIL).splitlines()):
        record = _record(line + b"\n")
        if record is not None:
            return record
    return None


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line says; None when it is no record."""
    if not _LINE.fullmatch(line):
        return None
    try:
        record: dict[str, Any] = json.loads(line)
        whole = isinstance(record["seq"], int) and isinstance(record["event"], str) and isinstance(record["time"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return record if whole else None


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What was found of a log.

    Attributes:
        faults: why it cannot be believed, a sentence each.
        notes: what is odd and no fault.
    """

    files: int = 0
    records: int = 0
    first: int = 0
    last: Head = field(default_factory=lambda: Head(0, BEGINNING, 0))
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(
    folder: Path, anchors: Mapping[int, str] | None = None, each: Callable[[bytes, Event], None] = lambda *_: None
) -> Reading:
    """Read a log from its first record to its last, also while it is written.

    Args:
        anchors: hashes of records, by `seq`, that were kept elsewhere.
        each: called with every record, as the line and as what it says.
    Raises:  OSError.
    """
    head = read_head(folder)  # first: the files are never behind it
    reader = _Reader(dict(anchors or {}), each)
    if head is not None:
        reader.expect(head.seq, head.hash, "the head record")
    with contextlib.ExitStack() as opened:
        streams = _opened(folder, opened)
        for number, stream in streams.items():
            reader.begin(number)
            for index, line in enumerate(_lines(stream), start=1):
                reader.take(line, f"{_path(folder, number).name}, line {index}", last=number == max(streams))
    return reader.end(head)


def _opened(folder: Path, stack: contextlib.ExitStack) -> dict[int, BinaryIO]:
    """The log's files of one moment, by their numbers. Raises: OSError."""
    for _ in range(_OPENINGS):
        with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
            # One that is removed meanwhile is named by a record in a file that is newer than these.
            streams: dict[int, BinaryIO] = {}
            for number, path in files_in(folder).items():
                streams[number] = opened.enter_context(path.open("rb"))
            stack.enter_context(opened.pop_all())
            return streams
    raise OSError(errno.EAGAIN, "its files are removed faster than they can be opened")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Those that there are now: of one that is being written the rest would come as a line of its own."""
    left = os.fstat(stream.fileno()).st_size
    while left > 0 and (line := stream.readline()):
        left -= len(line)
        yield line


class _Reader:
    """Follows the chain."""

    def __init__(self, anchors: dict[int, str], each: Callable[[bytes, Event], None]) -> None:
        self._anchors = {seq: (digest, "the record that was kept elsewhere") for seq, digest in anchors.items()}
        self._each = each
        self._found = Reading()
        self._file = 0
        self._fresh = False
        self._before = ""
        self._removed = 0
        self._torn = ""
        """Where a line is that is no record; it was cut short if the next one is the first of a process, or a file."""

    def expect(self, seq: int, digest: str, who: str) -> None:
        """That record must have that hash."""
        if seq in self._anchors and self._anchors[seq][0] != digest:
            self._fault(f"{who} and the record that was kept elsewhere differ for record {seq}")
        self._anchors.setdefault(seq, (digest, who))

    def begin(self, number: int) -> None:
        """The next file."""
        if self._found.files and number != self._file + 1:
            self._fault(f"files {self._file + 1} to {number - 1} are missing")
        if not self._found.files:
            self._first_file = number
        self._file, self._fresh = number, True
        self._found.files += 1

    def take(self, line: bytes, place: str, last: bool) -> None:
        """The next line. Args: last: it is of the last file."""
        record = _record(line)
        if record is None:
            self._end_torn()
            self._torn = place
            if last and not line.endswith(b"\n"):
                self._torn = ""
                self._found.notes.append(f"{place}: it is not whole; it is being written, or that was interrupted")
            return
        if self._torn and record["event"] in ("started", "file"):
            self._found.notes.append(f"{self._torn}: it is not whole; the appliance ended while it wrote it")
            self._torn = ""
        self._end_torn()
        self._follow(line, record, place)
        self._each(line, record)

    def end(self, head: Head | None) -> Reading:
        """There is no more."""
        self._end_torn()
        found = self._found
        if not found.records:
            self._fault("there are no records")
        elif self._first_file > 1 and self._removed < self._first_file - 1:
            self._fault(f"the files before {self._first_file} are missing, and no record says that they were removed")
        if head is None:
            self._fault("the head record is missing, so that a cut at the end cannot be seen")
        for seq, (_, who) in sorted(self._anchors.items()):
            if seq > found.last.seq:
                self._fault(f"the log ends with record {found.last.seq}, and {who} is of record {seq}: it was cut")
            elif seq < found.first:
                found.notes.append(f"{who} is of record {seq}, which is older than what is kept")
        return found

    def _follow(self, line: bytes, record: dict[str, Any], place: str) -> None:
        found, seq = self._found, record["seq"]
        match = _LINE.fullmatch(line)
        assert match is not None, "it is a record"
        own = match[2].decode()
        if self._fresh and (record["event"], record.get("number")) != ("file", self._file):
            self._fault(f"{place}: the file does not begin as it should")
        elif self._fresh and not found.records and self._file == self._first_file:
            self._before = BEGINNING if self._file == 1 else str(record.get("previous"))
        self._fresh = False
        if _digest(self._before, match[1]) != own:
            self._fault(f"{place}: record {seq} was changed, or does not follow the one before it")
        elif found.records and seq != found.last.seq + 1:
            self._fault(f"{place}: record {seq} follows record {found.last.seq}")
        expected = self._anchors.get(seq)
        if expected is not None and expected[0] != own:
            self._fault(f"{place}: record {seq} is not the one that {expected[1]} is of")
        if record["event"] == "removed" and isinstance(record.get("number"), int):
            self._removed = max(self._removed, record["number"])
        found.first = found.first or seq
        found.records += 1
        found.last = Head(seq, own, self._file)
        self._before = own

    def _end_torn(self) -> None:
        if self._torn:
            self._fault(f"{self._torn}: it is no record")
            self._torn = ""

    def _fault(self, sentence: str) -> None:
        self._found.faults.append(printable(sentence))
