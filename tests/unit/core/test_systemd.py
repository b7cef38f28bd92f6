"""What systemd is told, as it arrives on its socket."""

import os
import socket
import threading
from pathlib import Path

import pytest
from support.appliance import notify_socket

from appliance.core.systemd import Notifier

pytest.importorskip("systemd.daemon", reason="the `systemd` extra is not installed")


def received(notified: socket.socket) -> tuple[str, list[int]]:
    """One message and the descriptors that came with it."""
    message, descriptors, _, _ = socket.recv_fds(notified, 4096, 8)
    return message.decode(), list(descriptors)


def test_a_stored_socket_arrives_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with notify_socket(tmp_path) as notified, socket.create_server(("127.0.0.1", 0)) as sock:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        Notifier().store("stored.server.listen", sock)
        message, (descriptor,) = received(notified)
        assert message.splitlines() == ["FDSTORE=1", "FDNAME=stored.server.listen"]
        with socket.socket(fileno=descriptor) as kept:
            assert kept.getsockname() == sock.getsockname()


def test_an_abstract_notify_socket_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd of containers gives such a one: "@" stands for the zero byte."""
    name = f"appliance-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(f"\0{name}")
        notified.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        Notifier().forget("stored.server.listen")
        assert received(notified)[0].splitlines() == ["FDSTOREREMOVE=1", "FDNAME=stored.server.listen"]


def test_it_waits_until_systemd_has_heard_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The barrier is over when systemd closes what it was sent, and not before."""
    with notify_socket(tmp_path) as notified:
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        waiting = threading.Thread(target=Notifier().wait_heard, args=(60,))
        waiting.start()
        message, (descriptor,) = received(notified)
        assert message == "BARRIER=1"
        assert waiting.is_alive()
        os.close(descriptor)
        waiting.join(60)
        assert not waiting.is_alive()


def test_a_systemd_that_never_answers_holds_nobody_up_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with notify_socket(tmp_path):
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        Notifier().wait_heard(0.01)


def test_without_systemd_nothing_is_kept_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        notifier.store("stored.server.listen", sock)
    notifier.forget("stored.server.listen")
    notifier.wait_heard()


def test_a_systemd_that_is_gone_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notifier = Notifier()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        notifier.store("stored.server.listen", sock)
    notifier.wait_heard()
