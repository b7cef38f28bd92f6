"""An HTTP proxy that knows CONNECT alone (RFC 9110, 9.3.6), in threads."""

import contextlib
import socket
import threading
from typing import Self


class ConnectProxy:
    """Listens on loopback; `asked` has the request lines that came."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.asked: list[str] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [self._listening, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in [self._listening, *self._sockets]:
            sock.close()

    def _spawn(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                self._sockets.append(near)
                self._spawn(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = near.recv(4096)
            if not piece:
                return
            head += piece
        line = head.split(b"\r\n")[0].decode()
        self.asked.append(line)
        host, _, port = line.split()[1].rpartition(":")
        far = socket.create_connection((host, int(port)))
        self._sockets.append(far)
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self._spawn(_carry, far, near)
        _carry(near, far)


def _carry(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:  # one end was reset, which the other has to hear of
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
