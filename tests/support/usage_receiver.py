"""A receiver of usage reports: real HTTPS, and as unreliable as a test wants it to be, answer by answer."""

import contextlib
import json
import socket
import ssl
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: closing resets the connection."""


@dataclass(frozen=True)
class Post:
    """One request, as it came; `headers` by names in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes
    certificate: dict[str, Any]

    @property
    def content(self) -> Any:
        """Its JSON."""
        return json.loads(self.body)


def answer(status: str, *headers: str, body: str = "") -> bytes:
    """A whole answer."""
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", body]).encode()


TAKEN = answer("200 OK", body="thanks")
CUT = TAKEN[:-3]
"""An answer that ends in its middle, and with a reset."""

SILENCE = b""
"""No answer; the connection is open until the client or the test ends it."""


class Receiver:
    """Listens on loopback, in threads.

    Attributes:
        port: the same after a second `listen`.
        posts: every request that came in one piece, in order.
        answers: what the next ones are answered with, one after the other; TAKEN when there are no more. Of several
            pieces each is sent by itself. None: the connection is reset before a byte of the answer.
    """

    def __init__(self, folder: Path, authorities: Path | None = None) -> None:
        """Args: folder: has `server.crt` and `server.key`. authorities: of clients' certificates, demanded then."""
        self._trust = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._trust.load_cert_chain(folder / "server.crt", folder / "server.key")
        if authorities is not None:
            self._trust.load_verify_locations(authorities)
            self._trust.verify_mode = ssl.CERT_REQUIRED
        self.posts: list[Post] = []
        self.answers: deque[bytes | None] = deque()
        self.port = 0
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listening: socket.socket | None = None

    def __enter__(self) -> Self:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._over.set()
        for thread in self._threads:
            thread.join()

    def listen(self) -> None:
        """Be there; a second time on the same port."""
        self._listening = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        self.port = self._listening.getsockname()[1]
        self._spawn(self._accept, self._listening)

    def hang_up(self) -> None:
        """Be there no more."""
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None

    @property
    def url(self) -> str:
        """Where to post."""
        return f"https://localhost:{self.port}/v1/usage"

    def reports(self) -> dict[str, Any]:
        """What came, by idempotency key; every copy of one must be the same."""
        found: dict[str, bytes] = {}
        for post in list(self.posts):
            key = post.headers["idempotency-key"]
            assert found.setdefault(key, post.body) == post.body, "the same report, byte by byte"
        return {key: json.loads(body) for key, body in found.items()}

    def sums(self, *names: str, of: Iterable[str] = ("calls", "inputs")) -> dict[tuple[str, ...], dict[str, float]]:
        """What all records add up to, by these fields of theirs."""
        found: dict[tuple[str, ...], Counter[str]] = {}
        for report in self.reports().values():
            for record in report["records"]:
                counts = found.setdefault(tuple(record[name] for name in names), Counter())
                counts.update({amount: record[amount] for amount in of})
        return {key: dict(counts) for key, counts in found.items()}

    # ---- threads ----

    def _spawn(self, work: Any, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listening.accept()
                self._spawn(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        near.settimeout(0.05)
        with near, contextlib.suppress(OSError, ValueError), self._handshake(near) as sock:
            head, _, body = self._until(sock, b"\r\n\r\n").partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            while len(body) < int(headers["content-length"]):
                body += self._some(sock)
            self.posts.append(Post(first.split()[1], headers, body, sock.getpeercert() or {}))
            said = self.answers.popleft() if self.answers else TAKEN
            if said == SILENCE:
                self._some(sock)
            elif said:
                sock.sendall(said)
            if said is None or said == CUT:
                # Of the socket itself: TLS would say goodbye.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                socket.socket(fileno=sock.detach()).close()

    def _handshake(self, near: socket.socket) -> ssl.SSLSocket:
        near.settimeout(10)
        near.getpeername()  # CPython would leave a socket unclosed whose peer has reset it already
        sock = self._trust.wrap_socket(near, server_side=True)
        sock.settimeout(0.05)
        return sock

    def _until(self, sock: ssl.SSLSocket, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            data += self._some(sock)
        return data

    def _some(self, sock: ssl.SSLSocket) -> bytes:
        """Some bytes. Raises: OSError: there will be none."""
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                data = sock.recv(65536)
                if data:
                    return data
                break
        raise OSError("over")
