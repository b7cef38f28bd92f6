"""The audit log's files: what follows each other is whole, whatever interrupts it, and what was touched is found."""

import hashlib
import json
import os
import resource
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core import audit
from appliance.core.audit import Writer, read, read_head
from appliance.core.errors import ConfigError

SMALL = 4096


def event(name: str = "use", **fields: object) -> dict[str, object]:
    return {"time": audit.now(), "event": name, **fields}


def write(folder: Path, *names: str, files: int = 100, size: int = SMALL) -> Writer:
    """Write one record of each name, as one process of the appliance."""
    writer = Writer(folder, size, files)
    writer.write(deque(event(name, padding="x" * 100) for name in names))
    writer.close()
    return writer


def life(uses: int = 3) -> list[str]:
    return ["started", *["use"] * uses, "stopped"]


def records(folder: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    read(folder, each=lambda line, record: found.append(dict(record)))
    return found


def faults(folder: Path, anchors: dict[int, str] | None = None) -> list[str]:
    return read(folder, anchors).faults


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audit"


def test_records_are_numbered_and_whole(folder: Path) -> None:
    write(folder, *life())
    found = read(folder)
    assert (found.faults, found.notes) == ([], [])
    assert (found.files, found.records, found.first, found.last.seq) == (1, 6, 1, 6)
    assert [record["event"] for record in records(folder)] == ["file", *life()]
    assert [record["seq"] for record in records(folder)] == [1, 2, 3, 4, 5, 6]
    head = read_head(folder)
    assert head == found.last


def test_files_are_readable_by_the_group_and_nobody_else(folder: Path) -> None:
    """Whatever the unit's umask is."""
    before = os.umask(0o077)
    try:
        write(folder, *life(100))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert len(audit.files_in(folder)) > 1
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_a_later_process_goes_on_where_the_last_one_ended(folder: Path) -> None:
    for _ in range(3):
        writer = write(folder, *life())
        assert not {"unclean", "lost", "no_head"} & writer.found.keys()
    assert [record["seq"] for record in records(folder)] == list(range(1, 17))
    assert faults(folder) == []


def test_one_that_did_not_stop_is_told_of(folder: Path) -> None:
    write(folder, "started", "use")
    assert write(folder, *life()).found == {"unclean": True}
    assert faults(folder) == []


def test_two_at_once_are_refused(folder: Path) -> None:
    writer = Writer(folder, SMALL, 2)
    writer.open()
    with pytest.raises(ConfigError, match="Another appliance writes"):
        Writer(folder, SMALL, 2).open()
    writer.close()
    write(folder, *life())


def test_text_of_any_kind_is_kept(folder: Path) -> None:
    texts = ["\ud800", "\n", '","hash":"' + "0" * 64 + '"}', "\x1b[2J", "größe"]
    writer = Writer(folder, SMALL, 2)
    writer.write(deque([event("started", texts=texts), event("stopped")]))
    assert faults(folder) == []
    assert records(folder)[1]["texts"] == texts


class TestRotation:
    def test_old_files_go_and_what_is_left_is_whole(self, folder: Path) -> None:
        for _ in range(6):
            write(folder, *life(40), files=3)
            found = read(folder)
            assert found.faults == []
        assert len(audit.files_in(folder)) == 3
        assert found.first > 1
        assert found.last.seq > 200

    def test_files_that_no_record_says_were_removed_are_missed(self, folder: Path) -> None:
        write(folder, *life(150))
        first, second, third, *_ = audit.files_in(folder).values()
        first.unlink()
        assert faults(folder) == ["the files before 2 are missing, and no record says that they were removed"]
        third.unlink()
        assert any("files 3 to 3 are missing" in fault for fault in faults(folder))
        assert second.exists()

    def test_a_cut_at_the_end_of_an_older_file_is_found(self, folder: Path) -> None:
        write(folder, *life(150))
        path = audit.files_in(folder)[2]
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
        assert any("does not follow" in fault for fault in faults(folder))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write(folder, *life(40))
    assert len(audit.files_in(folder)) > 2
    return folder


class TestTampering:
    """Each of these leaves files that look well by themselves."""

    def lines(self, folder: Path) -> list[bytes]:
        return (folder / "audit-00000001.jsonl").read_bytes().splitlines(keepends=True)

    def put(self, folder: Path, lines: list[bytes]) -> list[str]:
        (folder / "audit-00000001.jsonl").write_bytes(b"".join(lines))
        return faults(folder)

    def test_a_record_that_was_taken_out(self, folder: Path) -> None:
        write(folder, *life())
        lines = self.lines(folder)
        assert "line 3: record 4 was changed, or does not follow" in self.put(folder, lines[:2] + lines[3:])[0]

    def test_records_in_another_order(self, folder: Path) -> None:
        write(folder, *life())
        lines = self.lines(folder)
        assert self.put(folder, [*lines[:2], lines[3], lines[2], *lines[4:]])

    def test_a_record_that_was_put_in_or_stands_twice(self, folder: Path) -> None:
        write(folder, *life())
        lines = self.lines(folder)
        assert self.put(folder, [*lines[:3], lines[2], *lines[3:]])
        assert self.put(folder, [*lines[:3], b"no record at all\n", *lines[3:]]) == [
            "audit-00000001.jsonl, line 4: it is no record"
        ]

    @pytest.mark.parametrize("count", [1, 3, 5])
    def test_records_that_were_cut_off_at_the_end(self, folder: Path, count: int) -> None:
        write(folder, *life())
        (fault,) = self.put(folder, self.lines(folder)[:-count])
        assert fault == f"the log ends with record {6 - count}, and the head record is of record 6: it was cut"

    def test_a_cut_is_found_after_the_appliance_went_on(self, folder: Path) -> None:
        write(folder, *life())
        self.put(folder, self.lines(folder)[:-2])
        assert write(folder, *life()).found == {"unclean": True, "lost": 2}
        (fault,) = faults(folder)
        assert "line 5: record 7 was changed, or does not follow the one before it" in fault

    def test_files_that_are_all_gone(self, folder: Path) -> None:
        write(folder, *life())
        (folder / "audit-00000001.jsonl").unlink()
        assert len(faults(folder)) == 2
        assert write(folder, *life()).found == {"lost": 6}
        (fault,) = faults(folder)
        assert fault == "the files before 2 are missing, and no record says that they were removed"

    def test_a_head_that_is_gone(self, folder: Path) -> None:
        write(folder, *life())
        (folder / "head.json").unlink()
        assert faults(folder) == ["the head record is missing, so that a cut at the end cannot be seen"]
        assert write(folder, *life()).found == {"no_head": True}

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"seq": 9, "hash": "x", "file": 1}', "\udcff"])
    def test_a_head_that_is_none(self, folder: Path, text: str) -> None:
        write(folder, *life())
        (folder / "head.json").write_bytes(text.encode(errors="surrogateescape"))
        assert "the head record is missing" in faults(folder)[0]

    def test_a_log_made_anew_differs_from_a_head_that_was_kept_elsewhere(self, folder: Path, tmp_path: Path) -> None:
        write(folder, *life())
        kept = read(folder).last
        assert faults(folder, {kept.seq: kept.hash}) == []
        other = tmp_path / "other"
        write(other, *life(4))
        assert faults(other) == []
        assert faults(other, {kept.seq: kept.hash}) == [
            "audit-00000001.jsonl, line 6: record 6 is not the one that the record that was kept elsewhere is of"
        ]
        assert "it was cut" in faults(other, {99: kept.hash})[0]

    def test_a_head_that_was_kept_and_whose_file_is_removed_is_no_fault(self, folder: Path) -> None:
        write(folder, *life(200), files=2)
        found = read(folder, {1: "0" * 64})
        assert found.faults == []
        assert "older than what is kept" in found.notes[0]

    @given(data=st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])
    def test_any_byte_that_was_changed_or_end_that_was_cut_is_found(self, written: Path, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(list(audit.files_in(written).values())))
        content = path.read_bytes()
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            changed = content[:place]
        else:
            value = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
            changed = content[:place] + bytes([value]) + content[place + 1 :]
        path.write_bytes(changed)
        try:
            assert faults(written)
        finally:
            path.write_bytes(content)
        assert not faults(written)


class TestInterrupted:
    @given(cut=st.integers(1, 10_000), data=st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_process_that_ended_in_the_middle_of_a_write_leaves_no_fault(
        self, tmp_path_factory: pytest.TempPathFactory, cut: int, data: st.DataObject
    ) -> None:
        """Of what it wrote last any part may be missing; the head is written behind it."""
        folder = tmp_path_factory.mktemp("audit")
        write(folder, *life(data.draw(st.integers(0, 60))))
        head = (folder / "head.json").read_bytes()
        newest = max(audit.files_in(folder).values())
        before = newest.stat().st_size
        write(folder, "started", *["use"] * 60, size=2**20)
        content = newest.read_bytes()
        newest.write_bytes(content[: before + cut])
        (folder / "head.json").write_bytes(head)
        write(folder, *life())
        found = read(folder)
        assert found.faults == []
        assert len(found.notes) <= 1

    def test_a_record_of_which_only_the_line_end_is_missing_is_kept(self, folder: Path) -> None:
        write(folder, *life())
        path = folder / "audit-00000001.jsonl"
        path.write_bytes(path.read_bytes()[:-1])
        write(folder, *life())
        found = read(folder)
        assert (found.faults, found.notes, found.records) == ([], [], 11)

    @pytest.mark.parametrize("content", [b"", b'{"seq":7,"time"', b'{"seq":7}\n'])
    def test_a_file_that_was_only_begun_is_gone_on_with(self, folder: Path, content: bytes) -> None:
        write(folder, *life())
        (folder / "audit-00000002.jsonl").write_bytes(content)
        write(folder, *life())
        found = read(folder)
        assert found.faults == []
        assert found.files == 2

    def test_what_is_being_written_is_no_fault(self, folder: Path) -> None:
        write(folder, *life())
        with (folder / "audit-00000001.jsonl").open("ab") as file:
            file.write(b'{"seq":7,"time":"2026')
        found = read(folder)
        assert found.faults == []
        assert "is not whole" in found.notes[0]


@pytest.fixture
def full() -> Iterator[Callable[[int | None], None]]:
    """Bound what this process can write to one file; None: no bound. The kernel's own "no", and no part of ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda count: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if count is None else count, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFull:
    @pytest.mark.parametrize("room", [0, 1, 100, 300, 1000])
    def test_what_could_not_be_written_follows_when_there_is_room(
        self, folder: Path, full: Callable[[int | None], None], room: int
    ) -> None:
        """A record that was written in part is finished, and nothing is there twice."""
        writer = Writer(folder, SMALL, 10)
        writer.write(deque([event("started")]))
        events = deque(event(number=number) for number in range(10))
        full((folder / "audit-00000001.jsonl").stat().st_size + room)
        for _ in range(3):
            with pytest.raises(OSError, match="too large"):
                writer.write(events)
        full(None)
        events.append(event("stopped"))
        writer.write(events)
        assert not events
        found = read(folder)
        assert (found.faults, found.notes) == ([], [])
        assert [record["number"] for record in records(folder) if record["event"] == "use"] == list(range(10))

    def test_a_process_that_ends_while_it_is_full_leaves_no_fault(
        self, folder: Path, full: Callable[[int | None], None]
    ) -> None:
        writer = Writer(folder, SMALL, 10)
        writer.write(deque([event("started")]))
        full((folder / "audit-00000001.jsonl").stat().st_size + 50)
        with pytest.raises(OSError, match="too large"):
            writer.write(deque([event()]))
        full(None)
        writer.close()
        write(folder, *life())
        found = read(folder)
        assert found.faults == []
        assert "the appliance ended while it wrote it" in found.notes[0]

    def test_it_may_be_full_from_the_beginning(self, folder: Path, full: Callable[[int | None], None]) -> None:
        writer = Writer(folder, SMALL, 10)
        events = deque([event("started")])
        full(0)
        with pytest.raises(OSError, match="too large"):
            writer.write(events)
        full(None)
        writer.write(events)
        assert faults(folder) == []
        assert len(records(folder)) == 2


def test_it_can_be_read_while_it_is_written(folder: Path) -> None:
    """Files are begun and removed meanwhile."""
    writer = Writer(folder, SMALL, 3)
    writer.write(deque([event("started")]))
    found = [read(folder)]
    enough = threading.Event()

    def reads() -> None:
        while len(found) < 100 or found[-1].last.seq == found[0].last.seq:
            found.append(read(folder))
        enough.set()

    reader = threading.Thread(target=reads, daemon=True)
    reader.start()
    while not enough.is_set() and reader.is_alive():
        writer.write(deque([event(), event()]))
    reader.join()
    assert enough.is_set()
    assert [each.faults for each in found if each.faults] == []


def test_a_file_that_goes_before_it_is_opened_is_no_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says that it was removed is in a file that was not there yet as the others were listed."""
    writer = Writer(folder, SMALL, 3)
    writer.write(deque(event() for _ in range(200)))
    listed = audit.files_in
    more = [deque(event() for _ in range(200))]

    def and_then_they_go(place: Path) -> dict[int, Path]:
        files = listed(place)
        if more:
            writer.write(more.pop())  # which lists them for itself
        return files

    monkeypatch.setattr(audit, "files_in", and_then_they_go)
    found = read(folder)
    assert found.faults == []
    assert found.last.seq == writer.head.seq


def test_a_line_is_what_the_page_says(folder: Path) -> None:
    """Whoever checks the log with a program of their own reads docs/logs.md."""
    write(folder, *life())
    before = "0" * 64
    for line in (folder / "audit-00000001.jsonl").read_text(encoding="ascii").splitlines():
        own = json.loads(line)["hash"]
        assert hashlib.sha256((before + line.removesuffix(f',"hash":"{own}"}}')).encode()).hexdigest() == own
        before = own
