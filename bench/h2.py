"""A small HTTP/2 client for gRPC calls, cheap enough to stand in for many callers on one CPU.

Nothing waits: whoever runs the loop says when a request is to leave, and is told when its reply is complete. One
thread, no event loop library, because those count time in milliseconds.
"""

import contextlib
import select
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpack import Decoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 0x1, 0x1, 0x4, 0x8, 0x20
"""Frames and flags. Source: RFC 9113, 6."""

_WIDE = 2**31 - 1
_INITIAL_WINDOW = 65_535
_INITIAL_STREAMS = 100
_FRAME = 16_384
_FIRST_DYNAMIC = 62
_ENTRY_OVERHEAD, _TABLE = 32, 4096
"""HPACK's table of what was sent before. Source: RFC 7541, 2.3.3, 4.1."""
_READ = 262_144
_CONNECT_S = 30.0


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """One frame. Source: RFC 9113, 4.1."""
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


@dataclass(frozen=True, slots=True)
class Target:
    """Where calls go. Attributes: ca: PEM file of the server's root; "": plaintext. headers: beside gRPC's own."""

    address: str
    path: str
    ca: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class Heads:
    """The header blocks of a connection's calls: the first one teaches the server's table, the rest point at it."""

    def __init__(self, target: Target) -> None:
        host = target.address.partition(":")[0]
        fields = [(":path", target.path), (":authority", "localhost" if target.ca else host)]
        fields += [("content-type", "application/grpc"), ("te", "trailers"), *target.headers]
        fixed = bytes((0x83, 0x87 if target.ca else 0x86))  # POST, https or http: entries 3, 7, 6 of the static table
        literal = [_text(name) + _text(value) for name, value in fields]
        if sum(len(name) + len(value) + _ENTRY_OVERHEAD for name, value in fields) > _TABLE:
            self.first = self.later = fixed + b"".join(b"\0" + field for field in literal)  # would not stay in it
            return
        self.first = fixed + b"".join(b"\x40" + field for field in literal)
        last = _FIRST_DYNAMIC + len(fields) - 1
        self.later = fixed + bytes(0x80 | (last - place) for place in range(len(fields)))


def _text(value: str) -> bytes:
    """A string literal without Huffman coding, of at most 16 kB. Source: RFC 7541, 5.1, 5.2."""
    data = value.encode("ascii")
    if len(data) < 127:
        return bytes((len(data),)) + data
    rest, length = len(data) - 127, b"\x7f"
    while rest >= 128:
        length += bytes((rest % 128 | 0x80,))
        rest //= 128
    return length + bytes((rest,)) + data


@dataclass(slots=True)
class Pending:
    """One call. Attributes: due: when it should leave. sent: when it left. size, head: of its reply, how it begins."""

    kind: int
    due: float
    sent: float
    size: int = 0
    body: list[bytes] | None = None
    head: bytes = b""
    window: int = 0
    rest: memoryview | None = None


Done = Callable[["Connection", Pending, str], None]
"""Called for each call that ended: "" when gRPC says OK, else what was wrong."""


class Connection:
    """One connection, any number of calls on it at once. Not for several threads."""

    def __init__(self, target: Target, bodies: Sequence[bytes], done: Done, *, keep: bool = False) -> None:
        """Connect. Args: bodies: messages that may be sent. keep: whether replies are kept whole, for `Pending.body`.

        Raises: OSError.
        """
        self.open = True
        self.waiting: deque[tuple[int, float]] = deque()
        self._done, self._keep = done, keep
        self._heads = Heads(target)
        self._bodies = [b"\0" + len(body).to_bytes(4, "big") + body for body in bodies]
        self._short = [self._template(body, self._heads.later) for body in self._bodies]
        self._calls: dict[int, Pending] = {}
        self._stream = 1
        self._streams = _INITIAL_STREAMS
        self._window, self._stream_window = _INITIAL_WINDOW, _INITIAL_WINDOW
        self._blocked: deque[int] = deque()
        self._out = bytearray()
        self._in = bytearray()
        self._received = 0
        self._decoder = Decoder()
        self._known: dict[bytes, dict[str, str]] = {}
        self._block: tuple[int, int, bytes] | None = None
        self._goaway = False
        self._offered = 0
        self.socket = self._connect(target)
        self._send(
            PREFACE
            + frame(SETTINGS, 0, 0, struct.pack(">HIHI", 2, 0, 4, _WIDE))  # no push; a stream's window
            + frame(WINDOW, 0, 0, (_WIDE - _INITIAL_WINDOW).to_bytes(4, "big"))
        )

    def _connect(self, target: Target) -> socket.socket:
        host, _, port = target.address.rpartition(":")
        plain = socket.create_connection((host, int(port)), timeout=_CONNECT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.ca:
            context = ssl.create_default_context(cafile=target.ca)
            context.set_alpn_protocols(["h2"])
            plain = context.wrap_socket(plain, server_hostname="localhost")
        plain.setblocking(False)
        return plain

    @property
    def in_flight(self) -> int:
        """Calls that have not ended."""
        return len(self._calls) + len(self.waiting)

    def unanswered(self) -> list[Pending]:
        """Calls that have not ended."""
        return [*self._calls.values(), *(Pending(kind, due, due) for kind, due in self.waiting)]

    def fileno(self) -> int:
        """For epoll."""
        return self.socket.fileno()

    def close(self) -> None:
        """Calls in flight end as failed."""
        self._lost("connection closed")

    # ---- out

    def start(self, kind: int, due: float) -> None:
        """Send message number `kind` now, or as soon as the server takes one more call."""
        if len(self._calls) >= self._streams:
            self.waiting.append((kind, due))
            return
        stream, self._stream = self._stream, self._stream + 2
        call = self._calls[stream] = Pending(kind, due, time.perf_counter(), body=[] if self._keep else None)
        short, size = self._short[kind], len(self._bodies[kind])
        if stream > 1 and short and size <= self._window and size <= self._stream_window and not self._blocked:
            number = stream.to_bytes(4, "big")
            self._window -= size
            self._send(number.join(short))
            return
        block = self._heads.first if stream == 1 else self._heads.later
        self._send(frame(HEADERS, END_HEADERS, stream, block))
        call.window, call.rest = self._stream_window, memoryview(self._bodies[kind])
        self._blocked.append(stream)
        self._push()

    @staticmethod
    def _template(body: bytes, block: bytes) -> tuple[bytes, bytes, bytes] | None:
        """A whole request, to be joined by its stream's number; None if it takes more than one frame."""
        if len(body) > _FRAME:
            return None
        head = frame(HEADERS, END_HEADERS, 0, block)
        data = frame(DATA, END_STREAM, 0, body)
        return head[:5], head[9:] + data[:5], data[9:]

    def _push(self) -> None:
        """Send of the long bodies what the windows allow."""
        for _ in range(len(self._blocked)):
            stream = self._blocked.popleft()
            call = self._calls.get(stream)
            if call is None or call.rest is None:
                continue
            pieces = []
            while call.rest is not None and (size := min(len(call.rest), self._window, call.window, _FRAME)) > 0:
                last = size == len(call.rest)
                pieces.append(frame(DATA, END_STREAM if last else 0, stream, bytes(call.rest[:size])))
                self._window -= size
                call.window -= size
                call.rest = None if last else call.rest[size:]
            if pieces:
                self._send(b"".join(pieces))
            if call.rest is not None:
                self._blocked.append(stream)

    def _send(self, data: bytes) -> None:
        if self._out:
            self._out += data
            return
        sent = self._take(data)
        if sent < len(data):
            self._out += data[sent:]

    def _take(self, data: bytes) -> int:
        """How many bytes the socket took."""
        try:
            sent = self.socket.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._offered = len(data)
            return 0
        except OSError as error:
            self._lost(f"connection lost: {type(error).__name__}: {error}")
            return 0
        self._offered = 0
        return sent

    @property
    def wants_to_write(self) -> bool:
        """Whether bytes wait for the socket."""
        return bool(self._out)

    def write(self) -> None:
        """The socket takes more."""
        while self._out and self.open:
            # TLS has encrypted some of what it could not send yet: it must be offered as much again.
            sent = self._take(bytes(self._out[: max(_READ, self._offered)]))
            if not sent:
                return
            del self._out[:sent]

    # ---- in

    def read(self) -> None:
        """Take what the socket has; ends calls."""
        try:
            data = self.socket.recv(_READ)
            while isinstance(self.socket, ssl.SSLSocket) and (more := self.socket.pending()):
                data += self.socket.recv(more)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._lost(f"connection lost: {type(error).__name__}: {error}")
            return
        if not data:
            self._lost("connection closed by the server")
            return
        if self._in:
            self._in += data
            data = bytes(self._in)
        place, end = 0, len(data)
        while end - place >= 9:
            size = data[place] << 16 | data[place + 1] << 8 | data[place + 2]
            if end - place < 9 + size:
                break
            self._frame(data, place, size)
            if not self.open:
                return
            place += 9 + size
        self._in = bytearray(data[place:])

    def _frame(self, data: bytes, place: int, size: int) -> None:
        kind, flags = data[place + 3], data[place + 4]
        stream = int.from_bytes(data[place + 5 : place + 9], "big") & _WIDE
        begin, end = place + 9, place + 9 + size
        if kind == DATA:
            self._data(stream, flags, data, begin, end)
        elif kind in (HEADERS, CONTINUATION):
            self._header(kind, stream, flags, data[begin:end])
        elif kind == SETTINGS:
            if not flags & ACK:
                self._settings(data[begin:end])
        elif kind == WINDOW:
            more = int.from_bytes(data[begin:end], "big") & _WIDE
            if not stream:
                self._window += more
            elif stream in self._calls:
                self._calls[stream].window += more
            if self._blocked:
                self._push()
        elif kind == PING:
            if not flags & ACK:
                self._send(frame(PING, ACK, 0, data[begin:end]))
        elif kind == RESET:
            self._end(stream, f"stream reset with code {int.from_bytes(data[begin:end], 'big')}")
        elif kind == GOAWAY:
            self._go_away(data[begin:end])

    def _data(self, stream: int, flags: int, data: bytes, begin: int, end: int) -> None:
        self._received += end - begin
        if self._received > 2**29:
            self._send(frame(WINDOW, 0, 0, self._received.to_bytes(4, "big")))
            self._received = 0
        if flags & PADDED:
            begin, end = begin + 1, end - data[begin]
        call = self._calls.get(stream)
        if call is not None:
            call.size += end - begin
            if call.body is not None:
                call.body.append(data[begin:end])
            elif len(call.head) < 32:
                call.head += data[begin : begin + 32]
        if flags & END_STREAM:
            self._end(stream, "no trailers")

    def _header(self, kind: int, stream: int, flags: int, block: bytes) -> None:
        if kind == HEADERS:
            if flags & PADDED:
                block = block[1 : len(block) - block[0]]
            if flags & PRIORITISED:
                block = block[5:]
        elif self._block is not None:
            stream, flags_before, before = self._block
            block, flags = before + block, flags | flags_before
        if not flags & END_HEADERS:
            self._block = (stream, flags & END_STREAM, block)
            return
        self._block = None
        fields = self._known.get(block)
        if fields is None:
            fields = {str(name): str(value) for name, value in self._decoder.decode(block)}
            # A block of single bytes that point at entries leaves the table as it was; any other may change it.
            if all(0x80 < byte < 0xFF for byte in block):
                self._known[block] = fields
            else:
                self._known.clear()
        status = fields.get("grpc-status")
        if status is not None:
            self._end(stream, "" if status == "0" else f"gRPC {status}: {fields.get('grpc-message', '')}")
        elif fields.get(":status", "200") != "200":
            self._end(stream, f"HTTP {fields[':status']}")
        elif flags & END_STREAM:
            self._end(stream, "no grpc-status")

    def _settings(self, body: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", body):
            if name == 3:
                self._streams = value
            elif name == 4:
                change, self._stream_window = value - self._stream_window, value
                for call in self._calls.values():
                    call.window += change
        self._send(frame(SETTINGS, ACK, 0))
        self._push()
        self._start_waiting()

    def _go_away(self, body: bytes) -> None:
        last = int.from_bytes(body[:4], "big") & _WIDE
        self._goaway = True
        for stream in [stream for stream in self._calls if stream > last]:
            self._end(stream, "refused by GOAWAY")
        if not self._calls:
            self._lost("connection closed by the server")

    def _end(self, stream: int, problem: str) -> None:
        call = self._calls.pop(stream, None)
        if call is None:
            return
        self._start_waiting()
        self._done(self, call, problem)

    def _start_waiting(self) -> None:
        while self.waiting and len(self._calls) < self._streams:
            self.start(*self.waiting.popleft())

    def _lost(self, why: str) -> None:
        if not self.open:
            return
        self.open = False
        with contextlib.suppress(OSError):
            self.socket.close()
        calls = self.unanswered()
        self._calls.clear()
        self.waiting.clear()
        for call in calls:
            self._done(self, call, why)


class Poller:
    """Waits for sockets to the microsecond. epoll alone counts in milliseconds, select alone has 1024 files."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._known: dict[int, tuple[Connection, int]] = {}

    def watch(self, connection: Connection) -> None:
        """From now on."""
        self._known[connection.fileno()] = (connection, select.EPOLLIN)
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def forget(self, connection: Connection, number: int) -> None:
        """After it closed; its file number was `number`."""
        self._known.pop(number, None)

    def turn(self, timeout: float) -> None:
        """Wait at most so many seconds, and let the connections that can go on do so."""
        if not select.select([self._epoll], [], [], max(0.0, timeout))[0]:
            return
        for number, events in self._epoll.poll(0):
            connection, watched = self._known[number]
            if events & select.EPOLLOUT and connection.open:
                connection.write()
            if events & ~select.EPOLLOUT and connection.open:
                connection.read()
            if connection.open:
                wanted = select.EPOLLIN | (select.EPOLLOUT if connection.wants_to_write else 0)
                if wanted != watched:
                    self._epoll.modify(number, wanted)
                    self._known[number] = (connection, wanted)
            else:
                self.forget(connection, number)

    def look(self, connection: Connection) -> None:
        """A connection was given something to send outside of `turn`."""
        if connection.open and connection.wants_to_write:
            number = connection.fileno()
            _, watched = self._known[number]
            if not watched & select.EPOLLOUT:
                self._epoll.modify(number, select.EPOLLIN | select.EPOLLOUT)
                self._known[number] = (connection, select.EPOLLIN | select.EPOLLOUT)
