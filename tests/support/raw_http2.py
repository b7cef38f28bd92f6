"""An HTTP/2 client that does what it is told and nothing else: stock ones are too polite for some tests."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import h2.config
import h2.connection
import h2.events
from hyperframe.frame import GoAwayFrame

from support.wire_server import Server

TIMEOUT_S = 20.0
"""Only a hung server takes that long."""


class RawClient:
    """One connection.

    Attributes:
        sock: TLS or plain.
        heard: what the server has said so far.
        ended: whether the server closed the connection.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.heard: list[Any] = []
        self.ended = False
        self.session = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        # The library takes a GOAWAY for the end; in truth it is the end of new streams only.
        machine, table = self.session.state_machine, self.session._frame_dispatch_table
        handle = table[GoAwayFrame]

        def go_on(frame: Any) -> Any:
            state = machine.state
            result = handle(frame)
            machine.state = state
            return result

        table[GoAwayFrame] = go_on

    def greet(self) -> None:
        """Preface and SETTINGS."""
        self.session.initiate_connection()
        self.send()

    def send(self) -> None:
        """What the session has to say."""
        self.sock.sendall(self.session.data_to_send())

    def ask(self, stream: int, path: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        """A gRPC request that is complete."""
        self.begin(stream, path, body, headers, end=True)

    def begin(
        self, stream: int, path: str, body: bytes, headers: dict[str, str] | None = None, *, end: bool = False
    ) -> None:
        """A gRPC request that goes on."""
        given = {":method": "POST", ":path": path, ":scheme": "https", ":authority": "localhost"}
        given |= {"content-type": "application/grpc", "te": "trailers", **(headers or {})}
        self.session.send_headers(stream, sorted(given.items()))
        self.session.send_data(stream, body, end_stream=end)
        self.send()

    def hear(self, *, answer: bool = True) -> None:
        """Wait for something, or the end of the connection. Args: answer: pings, settings and windows."""
        try:
            data = self.sock.recv(65536)
        except (ConnectionError, ssl.SSLError):
            data = b""
        if not data:
            self.ended = True
            return
        self.heard += self.session.receive_data(data)
        if answer:
            with contextlib.suppress(OSError):
                self.send()

    def until(self, kind: type[Any], *, answer: bool = True) -> Any:
        """The next event of a kind. Raises: AssertionError: the connection ended before."""
        while True:
            for number, event in enumerate(self.heard):
                if isinstance(event, kind):
                    return self.heard.pop(number)
            assert not self.ended, f"the server closed; heard {self.heard}"
            self.hear(answer=answer)

    def until_end(self, *, answer: bool = True) -> None:
        """Listen until the server closes."""
        while not self.ended:
            self.hear(answer=answer)

    def reply(self, stream: int) -> dict[str, Any]:
        """Headers and trailers of one stream, `:body`, and how it ended: `:end` is "ended", "reset" or "lost"."""
        found: dict[str, Any] = {":body": b"", ":end": ""}
        while not found[":end"]:
            if not self.heard:
                if self.ended:
                    found[":end"] = "lost"
                    break
                self.hear()
            for event in [event for event in self.heard if getattr(event, "stream_id", None) == stream]:
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    found |= {name.decode(): value.decode() for name, value in event.headers or ()}
                elif isinstance(event, h2.events.DataReceived):
                    found[":body"] += event.data or b""
                elif isinstance(event, h2.events.StreamEnded):
                    found[":end"] = "ended"
                elif isinstance(event, h2.events.StreamReset):
                    found[":end"] = found[":end"] or "reset"
            self.heard.clear()
        return found


@contextlib.contextmanager
def connected(server: Server, how: str = "tls", alpn: tuple[str, ...] = ("h2",)) -> Iterator[RawClient]:
    """A connection that has not said anything yet, or, with TLS, has only shaken hands."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection(("localhost", server.ports[how]), TIMEOUT_S))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if how == "tls":
            context = ssl.create_default_context(cafile=str(server.pki.ca))
            if alpn:
                context.set_alpn_protocols(list(alpn))
            sock = stack.enter_context(context.wrap_socket(sock, server_hostname="localhost"))
        yield RawClient(sock)


def framed(message: bytes, flag: int = 0, length: int | None = None) -> bytes:
    """A gRPC message."""
    return bytes([flag]) + (len(message) if length is None else length).to_bytes(4, "big") + message
