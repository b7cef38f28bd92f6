"""The file of usage: nothing is lost, counted twice or dropped, whatever clock, disk and names do; it stays small."""

import contextlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.core.errors import ConfigError, DiskFull
from appliance.core.usage import EVERYBODY_ELSE, Amounts, UsageKey
from appliance.orchestrator import usage_store
from appliance.orchestrator.usage_store import FILE, REPORT_ROWS, Period, Place, Row, UsageStore, iso, read

KEY = UsageKey("line-3", "acme", "main", "digits", "1", "PostModelOutputs")
MONDAY = 1796017260
"""2026-11-30, some full minute."""

FEW = {Period.MINUTE: 20, Period.HOUR: 10, Period.DAY: 6, Period.MONTH: 4}
EVER = (0.0, float(2**53))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the file will be."""
    return tmp_path / FILE


@pytest.fixture
def store(path: Path) -> Iterator[UsageStore]:
    """An empty one."""
    made = UsageStore(path)
    yield made
    made.close()


def minute(moment: float, key: UsageKey = KEY) -> Place:
    """The minute of a moment."""
    return Place(Period.MINUTE, Period.MINUTE.start(moment), key)


def total(rows: list[Row]) -> Amounts:
    """Everything together."""
    sums = Amounts()
    for row in rows:
        sums = sums.plus(row.amounts)
    return sums


def records(body: bytes) -> list[dict[str, Any]]:
    """Of a report."""
    found: list[dict[str, Any]] = json.loads(body)["records"]
    return found


# ---- writing and reading ---------------------------------------------------------------------------------------------


def test_what_is_added_is_read_and_adds_up(store: UsageStore, path: Path) -> None:
    store.add({minute(MONDAY): Amounts(2, 1, 4, 1, 1000, 50, 0.5)})
    store.add({minute(MONDAY + 59): Amounts(1, 0, 1, 0, 10, 5, 0.25), minute(MONDAY + 60): Amounts(calls=9)})
    assert read(path, *EVER) == [
        Row(minute(MONDAY), Amounts(3, 1, 5, 1, 1010, 55, 0.75)),
        Row(minute(MONDAY + 60), Amounts(calls=9)),
    ]
    assert read(path, MONDAY + 60, *EVER[1:]) == [Row(minute(MONDAY + 60), Amounts(calls=9))]
    assert read(path, 0, MONDAY + 60) == [Row(minute(MONDAY), Amounts(3, 1, 5, 1, 1010, 55, 0.75))]


def test_it_is_all_there_after_a_kill(path: Path) -> None:
    """Whoever is killed leaves its log of changes behind, which the next one reads."""
    program = (
        "import os, sys; from pathlib import Path; from appliance.orchestrator.usage_store import *\n"
        "from appliance.core.usage import *\n"
        f"store = UsageStore(Path(sys.argv[1])); key = UsageKey(*{tuple(KEY)!r})\n"
        f"store.add({{Place(Period.MINUTE, {MONDAY}, key): Amounts(calls=7)}}); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -9
    assert total(read(path, *EVER)).calls == 7
    store = UsageStore(path)
    store.add({minute(MONDAY): Amounts(calls=1)})
    store.close()
    assert total(read(path, *EVER)).calls == 8


@pytest.mark.parametrize(
    "name",
    ["'; DROP TABLE usage; --", 'quo"te', "a\nb\r\n", "nul\0byte", "ünï\u2028\U0001f600", "other", "", "%s{}", "=1+1"],
)
def test_names_are_kept_as_they_are(store: UsageStore, path: Path, name: str) -> None:
    key = UsageKey(*[name] * len(UsageKey._fields))
    store.add({minute(MONDAY, key): Amounts(calls=1)})
    assert [row.place.key for row in read(path, *EVER)] == [key]
    report = store.next_report({}, MONDAY)
    assert report is not None
    assert records(report.body)[0]["principal"] == name


def test_several_threads_and_a_reader_at_once(store: UsageStore, path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store.add({minute(MONDAY): Amounts()})
    with ThreadPoolExecutor(8) as pool:
        writes = [pool.submit(store.add, {minute(MONDAY): Amounts(calls=1)}) for _ in range(50)]
        seen = [total(pool.submit(read, path, *EVER).result()).calls for _ in range(10)]
    for write in writes:
        write.result()
    assert seen == sorted(seen)
    assert total(read(path, *EVER)).calls == 50


# ---- becoming coarser ------------------------------------------------------------------------------------------------


def rows_by_period(path: Path) -> dict[Period, int]:
    """How many there are."""
    found = dict.fromkeys(Period, 0)
    for row in read(path, *EVER):
        found[row.place.period] += 1
    return found


def test_old_rows_become_coarser_and_none_is_dropped(path: Path) -> None:
    """Years of it, in as many rows as there may be; the newest are still minutes, the oldest months of everybody."""
    store = UsageStore(path, FEW)
    count = 0
    for day in range(0, 5 * 365, 3):
        store.add({minute(MONDAY + day * 86400 + 60 * number): Amounts(1, 0, 2, 0, 3, 4, 0.5) for number in range(4)})
        store.compact()
        count += 4
        # A pass takes the older half of each; what it moves up is seen to in the same pass, being further along.
        assert all(number <= FEW[period] for period, number in rows_by_period(path).items() if period < Period.MONTH)
    assert total(read(path, *EVER)) == Amounts(count, 0, 2 * count, 0, 3 * count, 4 * count, count / 2)
    rows = read(path, *EVER)
    assert rows[-1].place == minute(MONDAY + day * 86400 + 180)
    assert rows[0].place.key == EVERYBODY_ELSE
    assert {row.place.period for row in rows} == set(Period)
    own = [row for row in rows if row.place.period is Period.MONTH and row.place.key == KEY]
    assert len(own) <= FEW[Period.MONTH]
    months = [row.place.start for row in rows if row.place.key == EVERYBODY_ELSE]
    assert len(months) == len(set(months)), "one row a month"
    store.close()


@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(-(2**40), 2**60), st.integers(MONDAY - 10**6, MONDAY + 10**6)),
            st.sampled_from(["a", "b", "other"]),
            st.integers(0, 1000),
            st.sampled_from(["add", "add", "add", "compact", "report", "taken"]),
        ),
        max_size=80,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_sums_hold_whatever_the_clock_says(tmp_path: Path, steps: list[tuple[int, str, int, str]]) -> None:
    """Any clock, any order of writing, adding up and reporting: rows sum to what was added, and so do reports."""
    path = tmp_path / f"{time.monotonic_ns()}.sqlite3"
    store = UsageStore(path, {Period.MINUTE: 6, Period.HOUR: 4, Period.DAY: 3, Period.MONTH: 2})
    store.add({})
    count, reported, seen = 0, 0, set()
    for moment, name, calls, step in steps:
        if step == "add":
            store.add({minute(moment, KEY._replace(principal=name)): Amounts(calls=calls)})
            count += calls
        elif step == "compact":
            store.compact()
        else:
            report = store.next_report({}, moment)
            if report is not None:
                if report.id not in seen:
                    reported += sum(record["calls"] for record in records(report.body))
                seen.add(report.id)
                if step == "taken":
                    store.taken(report)
    assert total(read(path, *EVER)).calls == count
    while (report := store.next_report({}, 0)) is not None:
        if report.id not in seen:
            reported += sum(record["calls"] for record in records(report.body))
        store.taken(report)
    assert reported == count
    assert store.waiting() == 0
    store.close()


@pytest.mark.parametrize(
    ("moment", "starts"),
    [
        (
            MONDAY + 59.9,
            ["2026-11-30T05:41:00Z", "2026-11-30T05:00:00Z", "2026-11-30T00:00:00Z", "2026-11-01T00:00:00Z"],
        ),
        (-1e18, ["1970-01-01T00:00:00Z"] * 4),
        (0.0, ["1970-01-01T00:00:00Z"] * 4),
        (1e300, ["9999-12-31T23:59:00Z", "9999-12-31T23:00:00Z", "9999-12-31T00:00:00Z", "9999-12-01T00:00:00Z"]),
        (951782399, ["2000-02-28T23:59:00Z", "2000-02-28T23:00:00Z", "2000-02-28T00:00:00Z", "2000-02-01T00:00:00Z"]),
    ],
)
def test_periods_begin_where_the_calendar_says(moment: float, starts: list[str]) -> None:
    assert [iso(period.start(moment)) for period in Period] == starts


def test_a_clock_that_flaps_makes_no_more_rows_than_there_may_be(path: Path) -> None:
    """Each write another year: what is written down is coarse at once, and all of it is there."""
    store = UsageStore(path, FEW)
    for number in range(400):
        store.add({minute((number * 7919 % 400) * 86400 * 200): Amounts(calls=1)})
        store.compact()
    found = rows_by_period(path)
    assert total(read(path, *EVER)).calls == 400
    assert all(found[period] <= FEW[period] for period in (Period.MINUTE, Period.HOUR, Period.DAY))
    store.close()


def test_many_keys_at_once_stay_bounded(path: Path) -> None:
    """More keys in one minute than rows there may be: they end as one row for that month, and the file stays small."""
    store = UsageStore(path, {Period.MINUTE: 1000, Period.HOUR: 800, Period.DAY: 600, Period.MONTH: 400})
    for number in range(6):
        keys = [KEY._replace(version=str(version)) for version in range(2000)]
        store.add({minute(MONDAY + 60 * number, key): Amounts(calls=1) for key in keys})
        for _ in range(4):
            store.compact()
    assert total(read(path, *EVER)).calls == 12_000
    assert len(read(path, *EVER)) <= 1000 + 800 + 600 + 400 + 1
    store.close()
    assert path.stat().st_size < 3 * 2**20


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_stays_the_same_until_it_was_taken(path: Path) -> None:
    """Over the end of the process, and whatever is used or added up meanwhile."""
    store = UsageStore(path, FEW)
    store.add({minute(MONDAY + 60 * number): Amounts(calls=1) for number in range(30)})
    first = store.next_report({"host": "here"}, MONDAY)
    assert first is not None
    store.add({minute(MONDAY): Amounts(calls=5)})
    store.compact()
    store.close()
    store = UsageStore(path, FEW)
    assert store.next_report({"host": "elsewhere"}, MONDAY + 9999) == first
    store.taken(first)
    second = store.next_report({}, MONDAY)
    assert second is not None
    assert second.number == first.number + 1
    assert second.id != first.id
    assert [(record["start"], record["calls"]) for record in records(second.body)] == [("2026-11-30T05:41:00Z", 5)]
    store.taken(second)
    assert store.next_report({}, MONDAY) is None
    assert total(read(path, *EVER)).calls == 35, "what was reported is kept"
    store.close()


def test_a_report_tells_who_reports_and_what(store: UsageStore) -> None:
    store.add({minute(MONDAY): Amounts(3, 1, 5, 2, 1010, 55, 0.7512345678)})
    report = store.next_report({"site": "hall 3"}, MONDAY + 75.5)
    assert report is not None
    content = json.loads(report.body)
    appliance = content["appliance"].pop("id")
    assert len(appliance) == 32
    assert content == {
        "schema": 1,
        "id": report.id,
        "number": 1,
        "made_at": "2026-11-30T05:42:15Z",
        "appliance": {"site": "hall 3"},
        "records": [
            {
                "start": "2026-11-30T05:41:00Z",
                "period": "minute",
                **KEY._asdict(),
                "calls": 3,
                "calls_failed": 1,
                "inputs": 5,
                "inputs_failed": 2,
                "bytes_in": 1010,
                "bytes_out": 55,
                "seconds": 0.751235,
            }
        ],
    }
    store.taken(report)
    store.add({minute(MONDAY): Amounts(calls=1)})
    again = store.next_report({}, MONDAY)
    assert again is not None
    assert json.loads(again.body)["appliance"]["id"] == appliance


def test_reports_have_an_end_and_the_rest_is_in_the_next(store: UsageStore) -> None:
    keys = [KEY._replace(version=str(number)) for number in range(REPORT_ROWS + 7)]
    store.add({minute(MONDAY, key): Amounts(calls=1) for key in keys})
    assert store.waiting() == len(keys)
    first = store.next_report({}, MONDAY)
    assert first is not None
    assert first.full
    assert store.waiting() == len(keys), "one that was not taken waits"
    assert len(records(first.body)) == REPORT_ROWS
    store.taken(first)
    assert store.waiting() == 7
    second = store.next_report({}, MONDAY)
    assert second is not None
    assert not second.full
    versions = [record["version"] for report in (first, second) for record in records(report.body)]
    assert sorted(versions) == sorted(key.version for key in keys)


# ---- when it goes wrong ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can be longer than `size` bytes: what the kernel says of a quota, for this process (setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_is_not_written_in_part(store: UsageStore, path: Path) -> None:
    """At every size that the log of changes may be cut at: all of a write, or nothing; and later it goes on."""
    store.add({minute(MONDAY): Amounts(calls=1)})
    keys = [KEY._replace(version=str(number)) for number in range(500)]
    count, failures = 1, 0
    for size in range(0, 400_000, 20_000):
        with full_disk(size):
            try:
                store.add({minute(MONDAY, key): Amounts(calls=1) for key in keys})
                count += len(keys)
            except ConfigError:
                failures += 1
        assert total(read(path, *EVER)).calls == count
    assert 0 < failures < 20
    store.add({minute(MONDAY): Amounts(calls=1)})
    assert total(read(path, *EVER)).calls == count + 1


def test_a_report_that_cannot_be_kept_is_not_made(store: UsageStore) -> None:
    store.add({minute(MONDAY, KEY._replace(version=str(number))): Amounts(calls=1) for number in range(300)})
    with full_disk(4096), pytest.raises(ConfigError):
        store.next_report({}, MONDAY)
    report = store.next_report({}, MONDAY)
    assert report is not None
    assert report.number == 1
    assert sum(record["calls"] for record in records(report.body)) == 300
    with full_disk(4096), pytest.raises(ConfigError):
        store.taken(report)
    assert store.next_report({}, MONDAY) == report, "posted again, with the same key"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_says_so_and_takes_it_later(small_disk: Path) -> None:
    path = small_disk / FILE
    store = UsageStore(path)
    store.add({minute(MONDAY): Amounts(calls=1)})
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    many = {minute(MONDAY, KEY._replace(version=str(number))): Amounts(calls=1) for number in range(200)}
    with pytest.raises(DiskFull, match="free some space"):
        store.add(many)
    filler.unlink()
    store.add(many)
    assert total(read(path, *EVER)).calls == 201
    store.close()


def test_a_disk_that_is_full_from_the_beginning(small_disk: Path) -> None:
    with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    store = UsageStore(small_disk / FILE)
    with pytest.raises(DiskFull):
        store.add({minute(MONDAY): Amounts(calls=1)})
    (small_disk / "filler").unlink()
    store.add({minute(MONDAY): Amounts(calls=1)})
    assert total(read(small_disk / FILE, *EVER)).calls == 1
    store.close()


def test_a_damaged_file_is_named_and_a_new_one_begun_when_it_is_away(path: Path) -> None:
    path.write_bytes(b"this is no database" * 500)
    store = UsageStore(path)
    with pytest.raises(ConfigError, match="move it away"):
        store.add({minute(MONDAY): Amounts(calls=1)})
    with pytest.raises(ConfigError, match="move it away"):
        read(path, *EVER)
    path.rename(path.with_suffix(".damaged"))
    store.add({minute(MONDAY): Amounts(calls=1)})
    assert total(read(path, *EVER)).calls == 1
    store.close()


def test_a_file_of_another_version_is_left_alone(store: UsageStore, path: Path) -> None:
    store.add({minute(MONDAY): Amounts(calls=1)})
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 9")
    for work in (lambda: store.add({}), lambda: read(path, *EVER)):
        with pytest.raises(ConfigError, match="another version"):
            work()


def test_no_file_and_no_rights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        read(tmp_path / FILE, *EVER)
    with pytest.raises(ConfigError, match="is not there"):
        UsageStore(tmp_path / "nowhere" / FILE).add({})
    (tmp_path / "folder").mkdir()
    store = UsageStore(tmp_path / "folder")
    with pytest.raises(ConfigError, match="cannot be used"):
        store.add({})
    code = (
        "import sys; from pathlib import Path; from appliance.core.errors import AccessRefused\n"
        "from appliance.orchestrator.usage_store import UsageStore\n"
        "try:\n    UsageStore(Path(sys.argv[1])).add({})\nexcept AccessRefused as error:\n    print(error)"
    )
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    command = [sys.executable, "-c", code, str(locked / FILE)]
    if os.geteuid() == 0:
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--inh-caps={rights}", f"--bounding-set={rights}", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert str(locked / FILE) in done.stdout


def test_a_writer_that_is_locked_out_waits_and_then_says_so(
    store: UsageStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_store, "_PATIENCE_S", 0.05)
    store.add({})
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConfigError, match="locked"):
            store.add({minute(MONDAY): Amounts(calls=1)})
        other.execute("ROLLBACK")
    store.add({minute(MONDAY): Amounts(calls=1)})
    assert total(read(path, *EVER)).calls == 1


def test_the_file_is_not_for_everybody(path: Path) -> None:
    old = os.umask(0)
    try:
        store = UsageStore(path)
        store.add({minute(MONDAY): Amounts(calls=1)})
        for file in path.parent.glob(f"{FILE}*"):
            assert file.stat().st_mode & 0o027 == 0, file
        store.close()
    finally:
        os.umask(old)
