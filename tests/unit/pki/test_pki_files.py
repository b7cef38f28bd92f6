"""How files are written: right mode from the first byte, whole, all or none."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.folders import let_others_in

from appliance.core.errors import CertificateError
from appliance.pki import files
from appliance.pki.files import Layout, NewFile, read_file, too_open, write_all

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may hand files to a group")


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=["umask000", "umask022", "umask077"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    old = os.umask(request.param)
    yield
    os.umask(old)


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[None]:
    """Run as a user without rights; root may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    let_others_in(tmp_path)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)
    os.setegid(0)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def listing(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("umask")
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "service_group", lambda: None)
    write_all(
        [
            NewFile(tmp_path / "tls" / "clients" / "a.key", b"key", "service"),
            NewFile(tmp_path / "tls" / "ca.key", b"key", "owner"),
            NewFile(tmp_path / "tls" / "ca.crt", b"crt", "public"),
        ]
    )
    assert mode(tmp_path / "tls" / "clients" / "a.key") == 0o600
    assert mode(tmp_path / "tls" / "ca.key") == 0o600
    assert mode(tmp_path / "tls" / "ca.crt") == 0o644
    assert mode(tmp_path / "tls") == mode(tmp_path / "tls" / "clients") == 0o700


@as_root
@pytest.mark.usefixtures("umask")
def test_the_service_group_reads_leaf_keys_and_never_the_ca_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "service_group", lambda: NOBODY)
    write_all(
        [
            NewFile(tmp_path / "tls" / "server.key", b"key", "service"),
            NewFile(tmp_path / "tls" / "ca.key", b"key", "owner"),
        ]
    )
    key, ca_key = (tmp_path / "tls" / name for name in ("server.key", "ca.key"))
    assert (mode(key), key.stat().st_uid, key.stat().st_gid) == (0o640, 0, NOBODY)
    assert (mode(ca_key), ca_key.stat().st_uid, ca_key.stat().st_gid) == (0o600, 0, 0)
    assert (mode(tmp_path / "tls"), (tmp_path / "tls").stat().st_gid) == (0o750, NOBODY)


@as_root
def test_a_replaced_key_stays_with_the_user_it_was_given_to(tmp_path: Path) -> None:
    key = tmp_path / "server.key"
    key.write_bytes(b"old")
    os.chown(key, NOBODY, NOBODY)
    key.chmod(0o666)
    write_all([NewFile(key, b"new", "service", replace=True)])
    assert (mode(key), key.stat().st_uid, key.stat().st_gid) == (0o640, NOBODY, NOBODY)


@pytest.mark.usefixtures("umask")
def test_a_key_is_never_readable_by_others_not_even_before_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step that could show the key is watched: open, change of mode, write."""
    seen: list[int] = []
    real_open, real_fchmod = os.open, os.fchmod

    def watched_open(path: os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        descriptor = real_open(path, flags, mode)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    def watched_fchmod(descriptor: int, mode: int) -> None:
        assert os.fstat(descriptor).st_size == 0
        real_fchmod(descriptor, mode)
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "fchmod", watched_fchmod)
    write_all([NewFile(tmp_path / "server.key", b"key", "service")])
    assert len(seen) == 2
    assert all(bits & 0o037 == 0 for bits in seen)


def test_if_one_target_exists_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "server.crt").write_bytes(b"old")
    with pytest.raises(CertificateError, match=r"server\.crt.*--force"):
        write_all([NewFile(tmp_path / "server.key", b"k", "service"), NewFile(tmp_path / "server.crt", b"c", "public")])
    assert listing(tmp_path) == {"server.crt": b"old"}


def test_a_dangling_symlink_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "server.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CertificateError, match="--force"):
        write_all([NewFile(tmp_path / "server.key", b"k", "service")])
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_appears_meanwhile_is_not_overwritten_and_the_others_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "require_absent", lambda paths: (tmp_path / "server.crt").write_bytes(b"raced"))
    with pytest.raises(CertificateError, match="--force"):
        write_all([NewFile(tmp_path / "server.key", b"k", "service"), NewFile(tmp_path / "server.crt", b"c", "public")])
    assert listing(tmp_path) == {"server.crt": b"raced"}


def test_a_failed_replacement_puts_the_old_files_back(tmp_path: Path) -> None:
    (tmp_path / "server.key").write_bytes(b"old")
    (tmp_path / "server.crt").mkdir()
    with pytest.raises(CertificateError, match=r"server\.crt"):
        write_all(
            [
                NewFile(tmp_path / "server.key", b"new", "service", replace=True),
                NewFile(tmp_path / "server.crt", b"new", "public", replace=True),
            ]
        )
    assert listing(tmp_path) == {"server.key": b"old"}


def test_replacing_leaves_no_copies_behind(tmp_path: Path) -> None:
    key = tmp_path / "server.key"
    write_all([NewFile(key, b"one", "service")])
    write_all([NewFile(key, b"two", "service", replace=True)])
    assert listing(tmp_path) == {"server.key": b"two"}


@pytest.mark.usefixtures("nobody")
def test_an_unwritable_directory_is_named_with_a_remedy(tmp_path: Path) -> None:
    place = Path("/proc") / "tls"
    with pytest.raises(CertificateError, match=r"/proc/tls.*--dir"):
        write_all([NewFile(place / "server.key", b"k", "service")])
    if os.getuid() == 0:  # tmp_path is root's, and we are nobody
        with pytest.raises(CertificateError, match="sudo"):
            write_all([NewFile(tmp_path / "server.key", b"k", "service")])
        assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_directorys_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "tls").write_bytes(b"")
    with pytest.raises(CertificateError, match="tls"):
        write_all([NewFile(tmp_path / "tls" / "server.key", b"k", "service")])


def test_directories_made_in_vain_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CertificateError, match="No space"):
        write_all([NewFile(tmp_path / "tls" / "clients" / "a.key", b"k", "service")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bits", "access", "fine"),
    [
        (0o600, "owner", True),
        (0o400, "owner", True),
        (0o640, "owner", False),
        (0o640, "service", True),
        (0o660, "service", False),
        (0o644, "service", False),
        (0o644, "public", True),
        (0o664, "public", False),
        (0o646, "public", False),
    ],
)
def test_modes_too_open_are_told_with_the_command_that_mends_them(
    put: Callable[..., Path], bits: int, access: files.Access, fine: bool
) -> None:
    path = put("a.key", b"x")
    path.chmod(bits)
    sentence = too_open(path, access)
    assert (sentence is None) == fine
    assert fine or f"chmod 06{ {'owner': '00', 'service': '40', 'public': '44'}[access] } {path}" in str(sentence)


@pytest.mark.parametrize("name", [None, "", "../server", "a/b", ".hidden", "-rf", "a" * 65, "ä", "a\n"])
def test_a_client_name_cannot_leave_its_directory(layout: Layout, name: str | None) -> None:
    with pytest.raises(CertificateError, match="name"):
        layout.key("client", name)


def test_a_directory_or_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="cannot be read"):
        read_file(tmp_path)
    big = tmp_path / "big"
    with big.open("wb") as stream:
        stream.truncate(files.MAX_FILE_BYTES + 1)
    with pytest.raises(CertificateError, match="big"):
        read_file(big)


def test_a_planned_file_does_not_show_its_content() -> None:
    assert "SECRET" not in repr(NewFile(Path("a.key"), b"SECRET", "service"))
