"""The cache of files: what comes back is what was put there, or nothing; trouble with the disk is nobody's."""

import logging
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from appliance.engine.cache import FileCache


def cache(folder: Path, most_bytes: int = 10_000) -> FileCache:
    return FileCache(folder / "deep" / "cache", most_bytes)


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "deep" / "cache").iterdir()}


@pytest.mark.parametrize("content", [b"", b"\0\n\n\xff", b"x" * 5000])
def test_what_was_put_there_comes_back(tmp_path: Path, content: bytes) -> None:
    """In another process too: nothing is kept in memory."""
    cache(tmp_path).put("one", content)
    assert cache(tmp_path).get("one") == content
    assert cache(tmp_path).get("two") is None
    assert kept(tmp_path) == {"one"}


@pytest.mark.parametrize("size", [0, 10, 64, 65, 66, 100])
def test_a_file_that_was_cut_off_is_as_good_as_none(tmp_path: Path, size: int) -> None:
    """After a crash, say. It is taken away, and written anew when somebody has made its content again."""
    cache(tmp_path).put("one", b"x" * 100)
    os.truncate(tmp_path / "deep" / "cache" / "one", size)
    assert cache(tmp_path).get("one") is None
    assert kept(tmp_path) == set()
    cache(tmp_path).put("one", b"new")
    assert cache(tmp_path).get("one") == b"new"


@pytest.mark.parametrize("place", [0, 63, 64, 65, 164])
def test_a_file_with_one_wrong_bit_is_as_good_as_none(tmp_path: Path, place: int) -> None:
    """Wherever it is."""
    cache(tmp_path).put("one", b"x" * 100)
    path = tmp_path / "deep" / "cache" / "one"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert cache(tmp_path).get("one") is None


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    """Reading is using."""
    small = cache(tmp_path, 1000)
    for number, key in enumerate(("a", "b", "c")):
        small.put(key, b"x" * 200)
        os.utime(tmp_path / "deep" / "cache" / key, (number, number))
    assert small.get("a") is not None
    small.put("d", b"x" * 200)
    assert kept(tmp_path) == {"a", "c", "d"}


def test_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    """The others are not worth less for it than it is."""
    small = cache(tmp_path, 1000)
    small.put("large", b"x" * 2000)
    assert small.get("large") is None
    assert kept(tmp_path) == set()


def test_what_a_crash_left_behind_goes_too(tmp_path: Path) -> None:
    """A temporary file counts like any other."""
    small = cache(tmp_path, 1000)
    small.put("a", b"x" * 200)
    left = tmp_path / "deep" / "cache" / ".new-left"
    left.write_bytes(b"x" * 900)
    os.utime(left, (0, 0))
    small.put("b", b"x" * 200)
    assert kept(tmp_path) == {"a", "b"}


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every put fails and says nothing more, until one succeeds."""
    (tmp_path / "deep").write_text("a file where a folder should be")
    broken = cache(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            broken.put("one", b"x")
            assert broken.get("one") is None
    assert len(caplog.records) == 1
    (tmp_path / "deep").unlink()
    broken.put("one", b"x")
    assert broken.get("one") == b"x"


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system's own limit on a file's size stands for it: what is there stays, and nothing is added."""
    whole = cache(tmp_path, 10**7)
    whole.put("one", b"x" * 100)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        whole.put("one", b"y" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(caplog.records) == 1
    assert whole.get("one") == b"x" * 100
    assert kept(tmp_path) == {"one"}


def test_many_may_use_one_folder(tmp_path: Path) -> None:
    """Threads here, processes in life: every read is whole or nothing, and no put fails for its neighbours."""
    wrong: list[object] = []

    def work(number: int) -> None:
        mine = cache(tmp_path, 3000)
        for round_ in range(30):
            key = str((number + round_) % 5)
            mine.put(key, key.encode() * 400)
            found = mine.get(key)
            if found not in (None, key.encode() * 400) or mine._failing:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
