"""Listening sockets: bound, inherited, kept over a restart, and never shared with a stranger."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.waiting import eventually

from appliance.core.errors import ConfigError
from appliance.daemon import sockets
from appliance.daemon.sockets import ListeningSockets, open_listening

PATIENCE_S = 60.0


@dataclass
class Store:
    """systemd's store, as far as we talk to it: name → addresses; the real one is tested with its own messages."""

    said: list[tuple[str, ...]] = field(default_factory=list)

    def store(self, name: str, sock: socket.socket) -> None:
        self.said.append(("store", name, text(sock)))

    def forget(self, name: str) -> None:
        self.said.append(("forget", name))

    def wait_heard(self) -> None:
        self.said.append(("wait",))


def text(sock: socket.socket) -> str:
    """host:port, or a unix socket's path."""
    where = sock.getsockname()
    return where if isinstance(where, str) else f"{where[0]}:{where[1]}"


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def opened(store: Store) -> Iterator[Callable[..., ListeningSockets]]:
    """Calls `open_listening` in this process, as if started by hand, and closes everything at the end."""
    with contextlib.ExitStack() as stack:

        def call(wanted: dict[str, str], **options: int) -> ListeningSockets:
            found = open_listening(wanted, store, environment={}, **options)  # type: ignore[arg-type]
            stack.callback(found.close)
            return found

        yield call


def answers(sock: socket.socket, host: str) -> bool:
    """Whether a client on `host` reaches that listening socket."""
    with socket.create_connection((host, sock.getsockname()[1]), PATIENCE_S):
        sock.settimeout(PATIENCE_S)
        sock.accept()[0].close()
    return True


# ---- binding ----


def test_every_setting_gets_its_socket_and_it_is_put_into_the_store(
    opened: Callable[..., ListeningSockets], store: Store
) -> None:
    found = opened({"server.listen": "127.0.0.1:0", "server.mtls_listen": "127.0.0.1:0"})
    (main,), (mtls,) = found.by_name["server.listen"], found.by_name["server.mtls_listen"]
    assert store.said == [
        ("store", "stored.server.listen", text(main)),
        ("store", "stored.server.mtls_listen", text(mtls)),
    ]
    assert answers(main, "127.0.0.1")
    assert not os.get_inheritable(main.fileno())
    assert not main.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_all_addresses_means_ipv4_and_ipv6(opened: Callable[..., ListeningSockets]) -> None:
    (sock,) = opened({"server.listen": "[::]:0"}).by_name["server.listen"]
    assert answers(sock, "127.0.0.1")
    assert answers(sock, "::1")


def test_without_ipv6_all_addresses_are_the_ipv4_ones(
    opened: Callable[..., ListeningSockets], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is [::]; a kernel without IPv6 must not keep the appliance from starting."""
    monkeypatch.setattr(sockets, "_has_ipv6", lambda: False)
    (sock,) = opened({"server.listen": "[::]:0"}).by_name["server.listen"]
    assert sock.getsockname()[0] == "0.0.0.0"


def test_a_name_with_two_addresses_is_served_on_both_with_one_port(
    opened: Callable[..., ListeningSockets], monkeypatch: pytest.MonkeyPatch
) -> None:
    v6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))
    v4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [v6, v4])
    found = opened({"server.plain_listen": "localhost:0"}).by_name["server.plain_listen"]
    assert [sock.getsockname()[0] for sock in found] == ["::1", "127.0.0.1"]
    assert len({sock.getsockname()[1] for sock in found}) == 1


def test_one_address_of_a_name_is_enough(
    opened: Callable[..., ListeningSockets], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("203.0.113.1", 0))
    v4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [foreign, v4])
    assert len(opened({"server.plain_listen": "localhost:0"}).by_name["server.plain_listen"]) == 1


def test_a_unix_socket_is_for_the_group_and_stays_out_of_the_store(
    opened: Callable[..., ListeningSockets], store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "wire.sock"
    opened({"server.plain_listen": f"unix:{path}"})
    assert path.stat().st_mode & 0o777 == 0o660
    assert store.said == []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))


def test_a_file_in_place_of_the_unix_socket_is_named_with_its_setting(
    opened: Callable[..., ListeningSockets], tmp_path: Path
) -> None:
    (tmp_path / "wire.sock").write_text("precious")
    with pytest.raises(ConfigError, match=r"server\.plain_listen .*is not a socket"):
        opened({"server.plain_listen": f"unix:{tmp_path / 'wire.sock'}"})


def test_what_is_in_the_unix_sockets_place_stays_there(opened: Callable[..., ListeningSockets], tmp_path: Path) -> None:
    """A file is the operator's, and a socket that answers is another appliance's."""
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        opened({"server.plain_listen": f"unix:{file}"})
    assert file.read_text() == "precious"
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="Another appliance answers"):
            opened({"server.plain_listen": f"unix:{path}"})
    assert path.exists()


def test_a_taken_port_is_said_with_the_setting_and_what_to_do(opened: Callable[..., ListeningSockets]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = text(stranger)
        with pytest.raises(ConfigError, match=f"server.listen {address} cannot be bound: the port is taken .*ss -ltnp"):
            opened({"server.listen": address})


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("203.0.113.1:0", "not this machine's"),
        ("no-such-host.invalid:0", "server.listen no-such-host.invalid:0 cannot be bound"),
    ],
)
def test_an_address_that_is_not_ours_is_said(opened: Callable[..., ListeningSockets], address: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        opened({"server.listen": address})


def test_a_privileged_port_points_to_the_socket_unit(
    opened: Callable[..., ListeningSockets], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(sockets, "_socket", denied)
    with pytest.raises(ConfigError, match=r"enable inference-appliance\.socket"):
        opened({"server.listen": "127.0.0.1:443"})


def test_one_setting_that_cannot_be_bound_frees_the_others(opened: Callable[..., ListeningSockets]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = text(free)
    with pytest.raises(ConfigError):
        opened({"server.listen": address, "server.mtls_listen": "203.0.113.1:0"})
    assert opened({"server.listen": address})


# ---- several fronts ----


def test_each_front_has_its_socket_on_the_same_port(opened: Callable[..., ListeningSockets], store: Store) -> None:
    found = opened({"server.listen": "127.0.0.1:0"}, fronts=3).by_name["server.listen"]
    assert len({text(sock) for sock in found}) == 1
    assert len(found) == 3
    assert store.said == [("store", "stored.server.listen", text(found[0]))] * 3


def test_a_second_appliance_cannot_share_the_port_unasked(opened: Callable[..., ListeningSockets]) -> None:
    """The system would allow it: SO_REUSEPORT asks for the same user, no more. The message says who is there."""
    first = opened({"server.listen": "127.0.0.1:0"}, fronts=2)
    address = text(first.by_name["server.listen"][0])
    with pytest.raises(ConfigError, match=rf"another appliance \(process {os.getpid()}\) serves it"):
        opened({"server.listen": address}, fronts=2)
    with pytest.raises(ConfigError, match="the port is taken"):
        opened({"server.listen": address})
    first.close()
    assert opened({"server.listen": address}, fronts=2)


def test_a_stranger_that_would_share_the_port_is_noticed(opened: Callable[..., ListeningSockets]) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as stranger, pytest.raises(ConfigError, match="taken"):
        opened({"server.listen": text(stranger)}, fronts=2)


# ---- what systemd passes ----

_RECEIVER = """
import json, os, sys
from appliance.core.errors import ConfigError
from appliance.daemon.sockets import open_listening
wanted, fronts, said = json.loads(sys.argv[1]), int(sys.argv[2]), []
class Store:
    def store(self, name, sock): said.append(["store", name, sock.getsockname()[1]])
    def forget(self, name): said.append(["forget", name])
    def wait_heard(self): said.append(["wait"])
try:
    opened = open_listening(wanted, Store(), fronts=fronts)
except ConfigError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
found = [sock for socks in opened.by_name.values() for sock in socks]
print(json.dumps({
    "places": {n: [s.getsockname() if isinstance(s.getsockname(), str) else s.getsockname()[1] for s in socks]
               for n, socks in opened.by_name.items()},
    "said": said,
    "environment": [name for name in os.environ if name.startswith("LISTEN_")],
    "inheritable": [os.get_inheritable(sock.fileno()) for sock in found],
}))
"""

_AS_SYSTEMD = """
import json, os, sys
numbers, names, pid = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
for index, number in enumerate(numbers):
    os.dup2(number, 3 + index, inheritable=True)
    os.close(number)
os.environ.update(LISTEN_PID=pid or str(os.getpid()), LISTEN_FDS=str(len(numbers)), LISTEN_FDNAMES=names)
os.execv(sys.executable, [sys.executable, *sys.argv[4:]])
"""


def started_with(passed: list[tuple[str, socket.socket]], *arguments: str, pid: str = "") -> "subprocess.Popen[str]":
    """Start Python with sockets passed as systemd does: descriptors from 3 on, its own process id in LISTEN_PID."""
    numbers = [fcntl.fcntl(sock, fcntl.F_DUPFD, 100) for _, sock in passed]
    names = ":".join(name for name, _ in passed)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _AS_SYSTEMD, json.dumps(numbers), names, pid, *arguments],
            pass_fds=numbers,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        for number in numbers:
            os.close(number)


def passed_to(
    wanted: dict[str, str], *passed: tuple[str, socket.socket], fronts: int = 1, pid: str = ""
) -> dict[str, Any]:
    """What another process makes of sockets that are passed to it."""
    process = started_with(list(passed), "-c", _RECEIVER, json.dumps(wanted), str(fronts), pid=pid)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(output)
    return found


@pytest.fixture
def listening() -> Iterator[Callable[..., socket.socket]]:
    """Makes listening sockets on loopback ports, as a .socket unit would."""
    with contextlib.ExitStack() as stack:

        def make(reuse_port: bool = False, port: int = 0) -> socket.socket:
            return stack.enter_context(socket.create_server(("127.0.0.1", port), reuse_port=reuse_port))

        yield make


def port(sock: socket.socket) -> int:
    number: int = sock.getsockname()[1]
    return number


def test_a_socket_named_like_a_setting_is_that_settings(listening: Callable[..., socket.socket]) -> None:
    """Whatever address the setting names; and the .socket unit keeps it, so it is not stored."""
    given = listening()
    found = passed_to({"server.listen": "127.0.0.1:0", "server.mtls_listen": "127.0.0.1:0"}, ("server.listen", given))
    assert found["places"]["server.listen"] == [port(given)]
    assert [said[:2] for said in found["said"]] == [["store", "stored.server.mtls_listen"]]


def test_a_socket_with_a_settings_address_is_that_settings(listening: Callable[..., socket.socket]) -> None:
    given = listening()
    found = passed_to({"server.listen": text(given)}, ("inference-appliance.socket", given))
    assert found["places"] == {"server.listen": [port(given)]}
    assert found["said"] == []


def test_a_socket_of_no_setting_is_served_beside_the_main_one(listening: Callable[..., socket.socket]) -> None:
    """Port 443 of the socket unit: the configured port stays, and comes first."""
    given = listening()
    found = passed_to({"server.listen": "127.0.0.1:0"}, ("inference-appliance.socket", given))
    own, beside = found["places"]["server.listen"]
    assert beside == port(given) != own
    assert found["said"] == [["store", "stored.server.listen", own]]


def test_a_unix_socket_of_a_unit_is_taken(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as given:
        given.bind(str(tmp_path / "wire.sock"))
        given.listen(1)
        wanted = {"server.listen": "127.0.0.1:0", "server.plain_listen": f"unix:{tmp_path / 'wire.sock'}"}
        found = passed_to(wanted, ("plain.socket", given))
    assert found["places"]["server.plain_listen"] == [str(tmp_path / "wire.sock")]


def test_a_stored_socket_comes_back_to_its_address(listening: Callable[..., socket.socket]) -> None:
    """By address, not by name: two settings may have changed places."""
    one, two = listening(), listening()
    found = passed_to(
        {"server.listen": text(two), "server.mtls_listen": text(one)},
        ("stored.server.listen", one),
        ("stored.server.mtls_listen", two),
    )
    assert found["places"] == {"server.listen": [port(two)], "server.mtls_listen": [port(one)]}
    assert found["said"] == [
        ["store", "stored.server.listen", port(two)],
        ["store", "stored.server.mtls_listen", port(one)],
    ]


def test_a_stored_socket_comes_back_where_the_system_chose_the_port(listening: Callable[..., socket.socket]) -> None:
    given = listening()
    found = passed_to({"server.listen": "127.0.0.1:0"}, ("stored.server.listen", given))
    assert found["places"] == {"server.listen": [port(given)]}


def test_a_stored_socket_that_nobody_wants_any_more_is_closed_and_forgotten(
    listening: Callable[..., socket.socket],
) -> None:
    """Before the new one is bound, and systemd has let go by then: the new address may overlap the old one."""
    given = listening()
    found = passed_to({"server.listen": "127.0.0.2:0"}, ("stored.server.listen", given))
    (own,) = found["places"]["server.listen"]
    assert own != port(given)
    assert found["said"] == [["forget", "stored.server.listen"], ["wait"], ["store", "stored.server.listen", own]]


def test_a_units_socket_goes_before_a_stored_one(listening: Callable[..., socket.socket]) -> None:
    given, stored = listening(), listening()
    found = passed_to({"server.listen": text(stored)}, ("stored.server.listen", stored), ("server.listen", given))
    assert found["places"] == {"server.listen": [port(given)]}
    assert found["said"] == [["forget", "stored.server.listen"], ["wait"]]


def test_stored_sockets_of_several_fronts_all_come_back(listening: Callable[..., socket.socket]) -> None:
    """Also when there are fewer fronts now: each has its own queue, and closing one would reset who waits in it."""
    first = listening(reuse_port=True)
    others = [listening(reuse_port=True, port=port(first)) for _ in range(2)]
    passed = [("stored.server.listen", sock) for sock in (first, *others)]
    assert passed_to({"server.listen": text(first)}, *passed, fronts=2)["places"]["server.listen"] == [port(first)] * 3
    assert passed_to({"server.listen": text(first)}, *passed, fronts=4)["places"]["server.listen"] == [port(first)] * 4


@pytest.mark.parametrize(
    ("stored", "now", "kept"),
    [("", "", True), ("@ab12", "ab12", True), ("@ab12", "cd34", False), ("", "ab12", False), ("@ab12", "", False)],
)
def test_a_stored_socket_comes_back_only_under_the_rule_that_it_was_opened_under(
    listening: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch, stored: str, now: str, kept: bool
) -> None:
    """systemd's rule on who may connect stays with a socket for ever: one of another rule is closed, and bound anew."""
    given = listening()
    address, number = text(given), port(given)
    monkeypatch.setenv("ADDRESS_RULE", now)
    passed = (f"stored.server.listen{stored}", given)
    found = passed_to({"server.listen": address if kept else "127.0.0.1:0"}, passed)
    (own,) = found["places"]["server.listen"]
    assert (own == number) is kept
    put = ["store", "stored.server.listen" + (f"@{now}" if now else ""), own]
    assert found["said"] == ([put] if kept else [["forget", f"stored.server.listen{stored}"], ["wait"], put])


def test_one_stored_socket_is_shared_by_all_fronts(listening: Callable[..., socket.socket]) -> None:
    given = listening()
    found = passed_to({"server.listen": text(given)}, ("stored.server.listen", given), fronts=4)
    assert found["places"]["server.listen"] == [port(given)]


def test_children_inherit_neither_sockets_nor_their_announcement(listening: Callable[..., socket.socket]) -> None:
    found = passed_to({"server.listen": "127.0.0.1:0"}, ("server.listen", listening()))
    assert found["environment"] == []
    assert found["inheritable"] == [False]


def test_what_was_passed_to_somebody_else_is_not_ours(listening: Callable[..., socket.socket]) -> None:
    """A parent that was socket-activated may have forgotten to clean its environment."""
    given = listening()
    found = passed_to({"server.listen": "127.0.0.1:0"}, ("server.listen", given), pid="1")
    assert found["places"]["server.listen"] != [port(given)]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("connected", "does not listen (the unit needs Accept=no)"),
        ("datagram", "is not a stream socket (ListenStream=)"),
        ("netlink", "is neither an IP nor a unix socket"),
        ("file", "is not a socket"),
    ],
)
def test_something_else_than_a_listening_socket_is_refused(tmp_path: Path, kind: str, why: str) -> None:
    with contextlib.ExitStack() as stack:
        given: Any
        if kind == "connected":
            given = stack.enter_context(socket.socket())
        elif kind == "datagram":
            given = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        elif kind == "netlink":
            given = stack.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
        else:
            given = stack.enter_context((tmp_path / "file").open("w"))
        found = passed_to({"server.listen": "127.0.0.1:0"}, ("odd.socket", given))
    assert found == {"error": f'What systemd passed as "odd.socket" (descriptor 3) {why}; mend the .socket unit.'}


# ---- a transport that binds its ports itself ----

_GRPCIO = """
import asyncio, contextlib, io, json, logging, os, sys
from datetime import UTC, datetime
from pathlib import Path
from appliance.core.config import Config, Server, Tls
from appliance.core.errors import ConfigError
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.front import open_front, open_sockets
from appliance.pki.files import Layout
from appliance.pki.leaf import Subject, issue, write_leaf
from appliance.pki.names import server_sans
from appliance.pki.profiles import SERVER
from appliance.pki.root import create_root
folder, listen, said, heard = Path(sys.argv[1]), sys.argv[2], [], io.StringIO()
logging.basicConfig(stream=heard)
class Store:
    def forget(self, name): said.append(["forget", name])
    def wait_heard(self): said.append(["wait"])
layout, now = Layout(folder / "tls"), datetime.now(UTC)
leaf = issue(create_root("Root", None, now), Subject("localhost", server_sans(["localhost"])), SERVER, now)
write_leaf(layout, "server", None, leaf, replace=False)
paths = {"certificate": layout.certificate("server"), "key": layout.key("server"), "client_ca": folder / "none"}
config = Config(server=Server(listen=listen, transport="grpcio"), tls=Tls(**paths))
async def run():
    try:
        sockets = open_sockets(config, Store()).by_name
        front = open_front(config, {}, None, CertificateFiles(config), MemoryBudget(1), Metrics(), sockets)
    except ConfigError as error:
        return {"error": str(error)}
    await front.start()
    await front.stop(0)
    return {"ports": front.ports, "said": said, "heard": heard.getvalue()}
print(json.dumps(asyncio.run(run())))
"""


def served_by_grpcio(folder: Path, listen: str, passed: list[tuple[str, socket.socket]]) -> dict[str, Any]:
    """What becomes of grpcio's port when sockets are passed, that nobody else holds."""
    process = started_with(passed, "-c", _GRPCIO, str(folder), listen)
    for _, sock in passed:
        sock.close()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(output)
    return found


def test_grpcio_gets_the_port_that_an_earlier_run_stored(
    listening: Callable[..., socket.socket], tmp_path: Path
) -> None:
    """It steps in by itself where the native wire is missing, after an upgrade that went wrong, say."""
    given = listening()
    listen, number = text(given), port(given)
    found = served_by_grpcio(tmp_path, listen, [("stored.server.listen", given)])
    assert found.get("ports") == {"server.listen": number}, found
    assert found["said"] == [["forget", "stored.server.listen"], ["wait"]]


def test_a_units_socket_that_grpcio_cannot_serve_is_told(
    listening: Callable[..., socket.socket], tmp_path: Path
) -> None:
    given = listening()
    place = text(given)
    found = served_by_grpcio(tmp_path, "127.0.0.1:0", [("more.socket", given)])
    assert f"{place}, passed by systemd as more.socket, is not served" in found["heard"]
    assert found["said"] == []


# ---- hand-over ----

_SERVER = """
import asyncio, signal, sys, uvloop
from appliance.daemon.sockets import open_listening
from appliance.core.systemd import Notifier
from appliance.wire.listener import Gate, Listener
from appliance.wire.settings import WireSettings

class Echo(asyncio.Protocol):
    def __init__(self, released): self.released = released
    def connection_made(self, transport): self.transport = transport
    def data_received(self, data): self.transport.write(data)
    def connection_lost(self, exc): self.released()

async def main():
    loop, stop, settings = asyncio.get_running_loop(), asyncio.Event(), WireSettings()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    gate = Gate(settings)
    opened = open_listening({"server.listen": sys.argv[1]}, Notifier())
    listeners = [Listener("server.listen", sock, None, lambda peer, released: Echo(released), gate, settings)
                 for sock in opened.by_name["server.listen"]]
    for listener in listeners:
        listener.start()
    print("ready", flush=True)
    await stop.wait()
    for listener in listeners:
        listener.close()
        await listener.wait_closed()
    while gate.open:
        await asyncio.sleep(0.001)
    opened.close()

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


def test_nobody_is_refused_while_one_process_follows_another() -> None:
    """Clients connect all the time, four processes serve in turn on one socket that the parent holds, as systemd does:
    every client is answered, and there are moments in which nobody serves."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as kept:
        ends: Counter[str] = Counter()
        done = threading.Event()

        def call() -> None:
            while not done.is_set():
                try:
                    with socket.create_connection(kept.getsockname(), PATIENCE_S) as client:
                        client.sendall(b"hello")
                        ends["answered" if client.recv(5, socket.MSG_WAITALL) == b"hello" else "cut"] += 1
                except OSError as error:
                    ends[type(error).__name__] += 1

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        try:
            for _ in range(4):
                server = started_with([("stored.server.listen", kept)], "-c", _SERVER, text(kept))
                try:
                    assert server.stdout is not None
                    assert server.stdout.readline() == "ready\n"
                    goal = ends["answered"] + 50
                    eventually(lambda goal=goal: ends["answered"] >= goal, PATIENCE_S)  # type: ignore[misc]
                    server.terminate()
                    server.communicate(timeout=PATIENCE_S)
                    assert server.returncode == 0
                finally:
                    server.kill()
                    server.communicate(timeout=PATIENCE_S)
            # Whoever connected after the last one left still waits; one more process, and all are answered.
            server = started_with([("stored.server.listen", kept)], "-c", _SERVER, text(kept))
            done.set()
            for caller in callers:
                caller.join(PATIENCE_S)
            server.terminate()
            server.communicate(timeout=PATIENCE_S)
        finally:
            done.set()
        assert set(ends) == {"answered"}
