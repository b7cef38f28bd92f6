"""Files are replaced as a whole, or not at all."""

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from appliance.core import files
from appliance.core.files import alone, printable, write_atomically


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0, 0o077])
def test_only_the_writer_reads_it_where_there_is_no_service_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    monkeypatch.setattr(files, "service_group", lambda: None)
    old = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", "text é")
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "text é"
    assert mode_of(tmp_path / "a") == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hand a file to another group")
def test_what_root_writes_the_service_group_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the daemon could not read what `sudo appliance models rollback` wrote."""
    monkeypatch.setattr(files, "service_group", lambda: 65534)
    write_atomically(tmp_path / "a", "text")
    assert mode_of(tmp_path / "a") == 0o640
    assert (tmp_path / "a").stat().st_gid == 65534


def test_an_existing_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o666)
    inode = (tmp_path / "a").stat().st_ino
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    assert mode_of(tmp_path / "a") == 0o600
    assert (tmp_path / "a").stat().st_ino != inode
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "fchmod", "replace"])
def test_a_crash_on_the_way_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (tmp_path / "a").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", "new")
    monkeypatch.undo()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_text_that_cannot_be_encoded_leaves_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a", "\ud800")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "a", "text")


def test_a_link_is_replaced_and_what_it_led_to_is_untouched(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "a").symlink_to("target")
    write_atomically(tmp_path / "a", "new")
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "target").read_text() == "old"


def test_readers_never_see_a_half_written_file(tmp_path: Path) -> None:
    """Every read while a writer replaces the file over and over is one whole content."""
    path = tmp_path / "a"
    contents = ["0" * 50_000, "1" * 70_000]
    write_atomically(path, contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                write_atomically(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_text() for _ in range(300)}
    stop.set()
    writer.join()
    assert seen <= set(contents)


def test_one_changes_a_folder_at_a_time(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(BlockingIOError), alone(tmp_path, wait=False):
        pass
    with alone(tmp_path, wait=False):
        pass


def test_a_file_system_without_locks_for_folders_is_worked_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS wants a file open for writing."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone(tmp_path):
        pass


def test_what_a_terminal_or_an_encoding_does_not_take_is_escaped() -> None:
    name = Path(os.fsdecode(b"a\xff\x1b[31m\n")) / "\u202e\ud800 \u00e9"
    assert printable(name) == r"a\xff\x1b[31m\n/\u202e\ud800 é"
