"""Where the forwarder listens: this machine only, and nobody else's place."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.connect import forwarder
from appliance.core.errors import ConfigError


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no [::1]")


@contextlib.contextmanager
def bound(address: str) -> Iterator[list[str]]:
    """What is bound for an address, as clients write it."""
    made = forwarder._listen(address)
    try:
        yield [forwarder._as_url(sock) for sock in made]
    finally:
        for sock in made:
            sock.close()


@ipv6
def test_localhost_is_both_families_on_one_port() -> None:
    with bound("localhost:0") as (four, six):
        port = four.rsplit(":", 1)[1]
        assert (four, six) == (f"http://127.0.0.1:{port}", f"http://[::1]:{port}")


@pytest.mark.parametrize(
    ("address", "begins"),
    [
        ("127.0.0.1:0", "http://127.0.0.1:"),
        ("127.0.0.7:0", "http://127.0.0.7:"),
        pytest.param("[::1]:0", "http://[::1]:", marks=ipv6),
    ],
)
def test_an_address_is_itself(address: str, begins: str) -> None:
    with bound(address) as (one,):
        assert one.startswith(begins)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_machine_without_ipv6_listens_on_the_rest(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = socket.socket

    def without(family: int = -1, *more: Any, **named: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(number, "not here")
        return real(family, *more, **named)

    monkeypatch.setattr(forwarder.socket, "socket", without)
    with bound("localhost:0") as (one,):
        assert one.startswith("http://127.0.0.1:")


@ipv6
def test_half_of_localhost_is_not_enough_where_somebody_has_the_other() -> None:
    """Else clients that prefer IPv6 would speak to whoever has it."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=r"Address already in use.*perhaps appliance connect runs already"):
            forwarder._listen(f"localhost:{port}")


def test_a_unix_socket_that_is_served_stays_and_a_file_too(tmp_path: Path) -> None:
    path, plain = tmp_path / "served", tmp_path / "file"
    plain.write_text("mine")
    with socket.socket(socket.AF_UNIX) as served:
        served.bind(str(path))
        served.listen()
        for taken in (path, plain):
            with pytest.raises(ConfigError, match="Address already in use"):
                forwarder._listen(f"unix:{taken}")
    assert plain.read_text() == "mine"
    with bound(f"unix:{path}") as (one,):  # nobody serves it any more
        assert one == f"unix:{path}"
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="No such file or directory"):
        forwarder._listen(f"unix:{tmp_path}/nowhere/socket")
