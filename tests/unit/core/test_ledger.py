"""The ledger: what one process writes down, another reads, and believes nothing that cannot be."""

import logging
import struct
import time
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.ledger import NOTE, Ledger, LedgerReader, Note, read_note, write_note
from appliance.core.shared import Segment


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create("test", 8192)
    yield made
    made.close()


def test_what_is_written_is_read(segment: Segment) -> None:
    """Each entry once, its numbers whenever they are asked for."""
    ledger, reader = Ledger(segment), LedgerReader(segment)
    one = ledger.add("requests", "counter", ("m", 'odd "name"\n\r\u2028é'), 1.5, 1)
    assert one is not None
    cells, notes = one
    assert len(notes) == 0
    (entry,) = reader.new_entries()
    assert (entry.family, entry.kind, entry.labels, entry.created, entry.count) == (
        "requests", "counter", ("m", 'odd "name"\n\r\u2028é'), 1.5, 1,
    )  # fmt: skip
    cells[0] += 2.5
    assert reader.values(entry) == [2.5]
    assert list(reader.new_entries()) == []
    two = ledger.add("seconds", "histogram", (), 2.0, 5)
    assert two is not None
    (other,) = reader.new_entries()
    two[0][4] = 7
    assert reader.values(other) == [0, 0, 0, 0, 7]
    assert reader.values(entry) == [2.5]


def test_whoever_reads_later_reads_everything(segment: Segment) -> None:
    """The reader may begin after the writer is gone."""
    ledger = Ledger(segment)
    for number in range(20):
        ledger.add("requests", "counter", (str(number),), 1.0, 1)
    assert [entry.labels for entry in LedgerReader(segment).new_entries()] == [(str(n),) for n in range(20)]


def test_a_segment_that_nobody_has_written_to_is_empty(segment: Segment) -> None:
    """The child may not have begun."""
    assert list(LedgerReader(segment).new_entries()) == []


def test_a_full_segment_takes_no_more_and_says_so_once(segment: Segment, caplog: pytest.LogCaptureFixture) -> None:
    """What is in it stays right: directory and cells never overlap."""
    ledger = Ledger(segment)
    cells = []
    with caplog.at_level(logging.WARNING):
        while (more := ledger.add("requests", "counter", (str(len(cells)),), 1.0, 3)) is not None:
            more[0][0] = more[0][2] = len(cells)
            cells.append(more)
        assert ledger.add("requests", "counter", ("again",), 1.0, 3) is None
    assert len(caplog.records) == 1
    reader = LedgerReader(segment)
    entries = list(reader.new_entries())
    assert [reader.values(entry) for entry in entries] == [[n, 0, n] for n in range(len(cells))]
    assert len(cells) > 50


def test_half_an_entry_is_not_seen_until_it_is_whole(segment: Segment) -> None:
    """Also where a processor shows the length before the line."""
    ledger, reader = Ledger(segment), LedgerReader(segment)
    ledger.add("one", "counter", (), 1.0, 1)
    ledger.add("two", "counter", (), 1.0, 1)
    (end,) = struct.unpack_from("q", segment.view)
    line = bytes(segment.view[64:end])
    segment.view[end - 9 : end] = bytes(9)
    assert [entry.family for entry in reader.new_entries()] == ["one"]
    segment.view[64:end] = line
    assert [entry.family for entry in reader.new_entries()] == ["two"]


@pytest.mark.parametrize(
    "text",
    [
        b"null",
        b"[]",
        b"not JSON",
        b"[" * 5000,
        b'["f","counter",["m"],1.0,NaN,1,0]',
        b'["f","counter",["m"],1.0,1e999,1,0]',
        b'["f","counter",["m"],NaN,8000,1,0]',
        b'["f","counter",["m"],-1,8000,1,0]',
        b'["f","counter",["\\ud800"],1.0,8000,1,0]',
        b'["f","counter",["m"],1.0,8184,2,0]',
        b'["f","counter",["m"],1.0,8000,0,0]',
        b'["f","counter",["m"],1.0,8000,-1,0]',
        b'["f","counter",["m"],1.0,8000,99999999999999999999,0]',
        b'["f","counter",["m"],1.0,8001,1,0]',
        b'["f","counter",["m"],1.0,0,1,0]',
        b'["f","counter",["m"],1.0,-8,1,0]',
        b'["f","counter",["m"],1.0,8000,1]',
        b'["f","counter",["m"],1.0,8000,1,-1]',
        b'["f","counter",["m"],1.0,8000,1,2]',
        b'["f","histogram",["m"],1.0,8000,2,2]',
    ],
)
def test_what_cannot_be_is_left_out(segment: Segment, text: bytes) -> None:
    """A line with a right checksum too; those after it count."""
    line = b"%08x %b\n" % (zlib.crc32(text), text)
    good = b'["f","counter",["good"],1.0,8000,1,0]'
    line += b"%08x %b\n" % (zlib.crc32(good), good)
    segment.view[64 : 64 + len(line)] = line
    struct.pack_into("q", segment.view, 0, 64 + len(line))
    assert [entry.labels for entry in LedgerReader(segment).new_entries()] == [("good",)]


@given(st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=40)), max_size=8), st.integers())
def test_no_garbage_does_more_than_hide_series(garbage: list[tuple[int, bytes]], end: int) -> None:
    """A model's stray write may have hit any byte: the reader neither fails nor looks outside the segment."""
    segment = Segment.create("test", 4096)
    ledger, reader = Ledger(segment), LedgerReader(segment)
    for number in range(5):
        room = ledger.add("requests", "counter", (str(number),), 1.0, 2, 1)
        assert room is not None
        write_note(room[1], 0, 1.0, "abc")
    for place, some in garbage:
        segment.view[place : place + len(some)] = some
    if end % 2:
        segment.view[:8].cast("q")[0] = max(-(2**63), min(end, 2**63 - 1))
    for _ in range(2):
        for entry in reader.new_entries():
            assert entry.labels in [(str(number),) for number in range(5)]
            assert len(reader.values(entry)) == 2
            assert len(reader.notes(entry)) <= 1
    segment.close()


class TestNotes:
    def test_the_last_one_of_each_cell_is_read(self, segment: Segment) -> None:
        """Beside the numbers, and without disturbing a neighbour's."""
        ledger, reader = Ledger(segment), LedgerReader(segment)
        one = ledger.add("seconds", "histogram", ("a",), 1.0, 4, 3)
        two = ledger.add("seconds", "histogram", ("b",), 1.0, 4, 3)
        assert one is not None
        assert two is not None
        for value, name in ((0.5, "first"), (0.75, "x" * 97)):
            write_note(one[1], 2, value, name)
        two[0][3] = one[0][0] = 7
        entries = list(reader.new_entries())
        (found,) = reader.notes(entries[0]).items()
        assert (found[0], found[1].value, found[1].id) == (2, 0.75, "x" * 97)
        assert abs(found[1].at - time.time()) < 60
        assert reader.notes(entries[1]) == {}
        assert [reader.values(entry) for entry in entries] == [[7, 0, 0, 0], [0, 0, 0, 7]]

    @pytest.mark.parametrize(
        ("value", "at", "name"),
        [
            (1.0, 0.0, b"abc"),
            (1.0, float("nan"), b"abc"),
            (1.0, float("inf"), b"abc"),
            (float("nan"), 1.0, b"abc"),
            (float("inf"), 1.0, b"abc"),
            (-1.0, 1.0, b"abc"),
            (1.0, 1.0, b""),
            (1.0, 1.0, b"a b"),
            (1.0, 1.0, b'a"b'),
            (1.0, 1.0, b"a\\b"),
            (1.0, 1.0, b"a\nb"),
            (1.0, 1.0, b"a\0b"),
            (1.0, 1.0, "\u00e9".encode()),
        ],
    )
    def test_what_cannot_be_is_no_note(self, value: float, at: float, name: bytes) -> None:
        """A stray write must not put a line into the page, nor make a scrape fail."""
        assert read_note(NOTE.pack(value, at, name)) is None
        assert read_note(NOTE.pack(1.0, 1.5, b"abc")) == Note(1.0, 1.5, "abc")

    def test_one_that_is_being_written_is_left_out(self, segment: Segment) -> None:
        """Two readings that differ say that it is half of one and half of another."""
        ledger = Ledger(segment)
        room = ledger.add("seconds", "histogram", (), 1.0, 2, 1)
        assert room is not None
        write_note(room[1], 0, 1.0, "one")
        reader = LedgerReader(segment)
        (entry,) = reader.new_entries()
        behind = iter([bytes(room[1]), NOTE.pack(1.0, 1.0, b"two")])

        class Changing:
            view = property(lambda self: next(behind).rjust(entry.offset + entry.size))

        reader.segment = Changing()  # type: ignore[assignment]
        assert reader.notes(entry) == {}
