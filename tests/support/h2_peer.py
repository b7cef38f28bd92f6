"""The client of a native session, without sockets: Python's `h2` where it is honest, bare frames where it is not."""

import struct
from collections.abc import Iterable
from typing import Any

import h2.config
import h2.connection
import h2.events
from hpack import Encoder

from appliance.wire import _h2

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 65_535
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8
ENHANCE_YOUR_CALM = 0xB

GRPC = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test/Echo"),
    (":authority", "here"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
)
HTTP = (*GRPC[:2], (":path", "/echo"), GRPC[3], ("content-type", "text/plain"))


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    """One frame."""
    return len(data).to_bytes(3) + bytes((kind, flags)) + struct.pack(">I", stream) + data


def settings(*pairs: tuple[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def message(body: bytes, flag: int = 0) -> bytes:
    """A gRPC message with its head."""
    return struct.pack(">BI", flag, len(body)) + body


def messages(data: bytes) -> list[bytes]:
    """The whole gRPC messages in `data`, which has nothing else."""
    found = []
    while data:
        _, size = struct.unpack(">BI", data[:5])
        assert len(data) >= 5 + size
        found.append(data[5 : 5 + size])
        data = data[5 + size :]
    return found


def frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, stream, payload) of what a server wrote."""
    found = []
    while data:
        size = int.from_bytes(data[:3])
        assert len(data) >= 9 + size, "half a frame"
        found.append((data[3], data[4], int.from_bytes(data[5:9]), data[9 : 9 + size]))
        data = data[9 + size :]
    return found


def session(max_message: int = 2**20, max_headers: int = 4096, streams: int = 100, window: int = WINDOW) -> _h2.Session:
    """A native session with small limits."""
    return _h2.Session(max_message, max_headers, streams, window)


def block(headers: Iterable[tuple[str, str]] = GRPC) -> bytes:
    """Headers as the first of a connection are packed."""
    return Encoder().encode(list(headers))


def call(stream: int, body: bytes = b"", headers: Iterable[tuple[str, str]] = GRPC) -> bytes:
    """A whole unary call, its headers packed without what came before."""
    packed = Encoder()
    packed.header_table_size = 0
    return frame(HEADERS, END_HEADERS, stream, packed.encode(list(headers))) + frame(
        DATA, END_STREAM, stream, message(body)
    )


def opened(*, settled: bool = True, **limits: int) -> _h2.Session:
    """A session that was greeted by raw bytes."""
    made = session(**limits)
    assert made.feed(PREFACE + settings() + (frame(SETTINGS, ACK, 0) if settled else b"")) == []
    made.pull(2**20)
    return made


class Pair:
    """An honest client and the session that it talks to."""

    def __init__(self, native: _h2.Session | None = None) -> None:
        self.session = native or session()
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.client.initiate_connection()
        self.events: list[_h2.Event] = []
        self.heard: list[Any] = []
        self.pump()

    def pump(self) -> "list[_h2.Event]":
        """Carry bytes both ways until nobody has any. Returns: what the session said meanwhile."""
        new: list[_h2.Event] = []
        while True:
            up = self.client.data_to_send()
            new += self.session.feed(up) if up else []
            down = self.session.pull(64 * 1024)
            new += self.session.events()
            if down:
                self.heard += self.client.receive_data(down)
            if not up and not down:
                self.events += new
                return new

    def open(self, headers: Iterable[tuple[str, str]] = GRPC, end: bool = False) -> int:
        """Send headers; returns the stream."""
        stream = self.client.get_next_available_stream_id()
        self.client.send_headers(stream, list(headers), end_stream=end)
        return stream

    def send(self, stream: int, data: bytes, end: bool = False, pad: int | None = None) -> None:
        """Send a body, in frames as large as they may be; there must be room for it."""
        largest = self.client.max_outbound_frame_size - 256
        for start in range(0, max(len(data), 1), largest):
            last = end and start + largest >= len(data)
            self.client.send_data(stream, data[start : start + largest], end_stream=last, pad_length=pad)

    def taken(self, kind: type, stream: int | None = None) -> list[Any]:
        """Events of one kind that the client heard."""
        found = [event for event in self.heard if isinstance(event, kind)]
        return [event for event in found if stream is None or event.stream_id == stream]

    def body(self, stream: int) -> bytes:
        """All DATA of a stream."""
        return b"".join(event.data for event in self.taken(h2.events.DataReceived, stream))

    def headers(self, stream: int) -> dict[str, str]:
        """The reply's headers."""
        (event,) = self.taken(h2.events.ResponseReceived, stream)
        return dict(event.headers)

    def trailers(self, stream: int) -> dict[str, str]:
        """The reply's trailers."""
        (event,) = self.taken(h2.events.TrailersReceived, stream)
        return dict(event.headers)

    def allow(self, stream: int, count: int) -> None:
        """Take `count` bytes: let so many more come on the stream and the connection."""
        self.client.increment_flow_control_window(count, stream)
        self.client.increment_flow_control_window(count)
