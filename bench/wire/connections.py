"""Connections without calls: what opening one costs a server, and what one that idles does.

`python -m bench.wire.connections` is the client's process, see client.py.
"""

import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.wire.client import Client, listen, say
from bench.wire.process import cpu_ns, memory_bytes

# RFC 9113, 3.4: what a client says first; then an empty SETTINGS frame, and the acknowledgement of the server's.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS_SEEN = b"\0\0\0\4\1\0\0\0\0"
_SOCKET_TIMEOUT_S = 20.0
_OPEN_TIMEOUT_S = 120.0
_THREADS = 4
_SPARE_FILES = 200
"""Descriptors that a process needs beside the connections."""


@dataclass(frozen=True, slots=True)
class Handshakes:
    """Opening connections, one after the other in a few threads: TCP, TLS, and each side's first HTTP/2 frame.

    Attributes:
        per_s: connections a second. cpu_us: CPU microseconds of the server for one.
        load_share: how much of its CPU the client used; near 1, the client was the limit.
    """

    per_s: float
    cpu_us: float
    load_share: float
    errors: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Idle:
    """Connections that are open and silent. Attributes: bytes_each: growth of the server's memory for one."""

    opened: int
    wanted: int
    bytes_each: float
    seconds: float
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


# ---- in the benchmark's own process ----------------------------------------------------------------------------------


def measure_handshakes(
    port: int, mode: str, folder: Path, pids: Sequence[int], cpu: tuple[int, ...], seconds: float
) -> Handshakes:
    """Open and close connections for so many seconds."""
    job = {"do": "handshakes", "port": port, "mode": mode, "folder": str(folder), "seconds": seconds}
    client = Client("bench.wire.connections", cpu, job)
    client.hear()  # it is ready
    before, load_before, begun = cpu_ns(pids), cpu_ns([client.pid]), time.monotonic()
    client.tell()
    found = client.hear()
    span = time.monotonic() - begun
    work, load = cpu_ns(pids) - before, cpu_ns([client.pid]) - load_before
    client.end()
    count = max(1, found["count"])
    return Handshakes(found["count"] / span, work / 1e3 / count, load / 1e9 / span, found["errors"])


def measure_idle(port: int, mode: str, folder: Path, pids: Sequence[int], cpu: tuple[int, ...], wanted: int) -> Idle:
    """Open connections and keep them, while the server's memory is read; then close them."""
    job = {"do": "idle", "port": port, "mode": mode, "folder": str(folder), "count": wanted}
    client = Client("bench.wire.connections", cpu, job)
    client.hear()  # it has connected once: what the server makes for its first connection is not counted
    before, begun = memory_bytes(pids), time.monotonic()
    client.tell()
    found = client.hear()
    seconds = time.monotonic() - begun
    grown = memory_bytes(pids) - before
    client.end()
    return Idle(found["count"], wanted, grown / max(1, found["count"]), seconds, found["problem"])


# ---- in the client's process -----------------------------------------------------------------------------------------


def main() -> None:
    """Do the job."""
    job = listen()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    open_one = _opener(job["port"], job["mode"], Path(job["folder"]))
    open_one().close()
    say("ready")
    listen()
    if job["do"] == "handshakes":
        say(_open_for(open_one, job["seconds"]))
    else:
        say(_open_many(open_one, min(job["count"], most - _SPARE_FILES)))
    listen()


def _opener(port: int, mode: str, folder: Path) -> Callable[[], socket.socket]:
    """A function that opens one connection; it returns when the server has sent its SETTINGS, so has accepted us."""
    context = None
    if mode != "plain":
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        context.set_alpn_protocols(["h2"])
        if mode == "mtls":
            context.load_cert_chain(folder / "client.crt", folder / "client.key")

    def open_one() -> socket.socket:
        bare = socket.create_connection(("127.0.0.1", port), timeout=_SOCKET_TIMEOUT_S)
        bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is sent in parts does not wait for an answer
        connection = context.wrap_socket(bare, server_hostname="localhost") if context else bare
        connection.sendall(_HELLO)
        if not connection.recv(4096):
            connection.close()
            raise ConnectionError("closed by the server")
        connection.sendall(_SETTINGS_SEEN)
        return connection

    return open_one


def _open_for(open_one: Callable[[], socket.socket], seconds: float) -> dict[str, Any]:
    """Open and close for so many seconds, in several threads, so that the server is not kept waiting."""
    end = time.monotonic() + seconds
    counts, errors = [0] * _THREADS, [0] * _THREADS

    def work(index: int) -> None:
        while time.monotonic() < end:
            try:
                open_one().close()
                counts[index] += 1
            except OSError:
                errors[index] += 1

    _in_threads(work)
    return {"count": sum(counts), "errors": sum(errors)}


def _open_many(open_one: Callable[[], socket.socket], count: int) -> dict[str, Any]:
    """Open so many connections and keep them."""
    kept: list[socket.socket] = []
    problems: list[str] = []
    give_up = time.monotonic() + _OPEN_TIMEOUT_S

    def work(index: int) -> None:
        for _ in range(index, count, _THREADS):
            if problems or time.monotonic() > give_up:
                return
            try:
                connection = open_one()
            except OSError as error:
                problems.append(f"{type(error).__name__}: {error}")
                return
            # The client's TLS state is let go, for its memory's sake: nothing more is said on this connection.
            kept.append(socket.socket(fileno=connection.detach()))

    _in_threads(work)
    if not problems and len(kept) < count:
        problems.append(f"no more than {len(kept)} in {_OPEN_TIMEOUT_S:.0f} s")
    _keep.extend(kept)
    return {"count": len(kept), "problem": problems[0] if problems else ""}


_keep: list[socket.socket] = []
"""Open until the process ends."""


def _in_threads(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
