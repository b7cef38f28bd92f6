"""The native session: bytes in, events out; replies in, bytes out. No sockets; see native/h2.h for the words."""

import itertools
import os
import random
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import h2.events
import h2.settings
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import h2_peer as peer
from support.h2_peer import GRPC, HTTP, PREFACE, WINDOW, Pair, call, frame, frames, message, messages, opened

from appliance.wire import _h2

HEAD, MESSAGE, END, RESET, WANT = _h2.HEAD, _h2.MESSAGE, _h2.END, _h2.RESET, _h2.WANT


def flags_of(events: "list[_h2.Event]", stream: int = 1) -> list[int]:
    """What was said about a stream."""
    return [event[1] for event in events if event[0] == stream]


def bodies_of(events: "list[_h2.Event]", stream: int = 1) -> list[bytes]:
    """Its messages."""
    return [event[3] for event in events if event[0] == stream and event[3] is not None]


def head_of(event: "_h2.Event") -> dict[bytes, bytes]:
    """Its head, by name."""
    assert event[2] is not None
    parts = event[2].split(b"\0")
    return dict(zip(parts[0::2], parts[1::2], strict=False))


class Clock:
    """Time, as a server tells it to a session: second by second."""

    def __init__(self, native: _h2.Session) -> None:
        self._native = native
        self._now = time.monotonic()

    def wait(self, seconds: int) -> None:
        """Let so much of it pass."""
        for _ in range(seconds):
            self._now += 1
            self._native.tick(self._now, 60)


def fresh(size: int = 100) -> bytes:
    """Bytes that nobody else refers to."""
    return random.Random(size).randbytes(size)


# ---- requests --------------------------------------------------------------------------------------------------------


def test_a_whole_call_is_one_event() -> None:
    """Most calls come in one piece: head, message and end are told together."""
    (event,) = opened().feed(call(1, b"hello"))
    assert event[:2] == (1, HEAD | MESSAGE | END)
    assert event[3] == b"hello"
    assert event[4] == -1
    head = head_of(event)
    assert head[b":path"] == b"/test/Echo"
    assert head[b"content-type"] == b"application/grpc"


@pytest.mark.parametrize("end_apart", [False, True])
def test_an_empty_message_is_a_message(end_apart: bool) -> None:
    """Five bytes are enough; the end of the stream may come in a frame of its own."""
    native = opened()
    packed = frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block())
    data = frame(peer.DATA, 0 if end_apart else peer.END_STREAM, 1, message(b""))
    (event,) = native.feed(packed + data + (frame(peer.DATA, peer.END_STREAM, 1) if end_apart else b""))
    assert event[1] == HEAD | MESSAGE | END
    assert event[3] == b""


def test_the_same_head_is_the_same_object() -> None:
    """A client that repeats its headers costs no new bytes: the timeout, which differs, is apart from them."""
    native = opened()
    first, second = (native.feed(call(stream, b"", (*GRPC, ("grpc-timeout", f"{stream}S"))))[0] for stream in (1, 3))
    assert first[2] is second[2]
    assert (first[4], second[4]) == (1_000_000, 3_000_000)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 900), max_size=8), st.integers(0, 300), st.integers(0, 2))
def test_however_bytes_are_cut_the_calls_are_the_same(cuts: list[int], size: int, kind: int) -> None:
    """The network may cut anywhere; only how the events are grouped depends on it."""
    wire = PREFACE + peer.settings()
    wire += call(1, b"a" * size) + call(3, b"b" * (size // 2), HTTP if kind == 1 else GRPC)
    if kind == 2:
        wire += frame(peer.RST_STREAM, 0, 3, struct.pack(">I", 8))
    native = peer.session()
    events: list[_h2.Event] = []
    places = sorted({min(cut, len(wire)) for cut in cuts} | {0, len(wire)})
    for start, end in itertools.pairwise(places):
        events += native.feed(wire[start:end])
        native.pull(2**20)
        events += native.events()
    assert b"".join(bodies_of(events)) == b"a" * size
    assert [bool(flags & HEAD) for flags in flags_of(events)] == [True] + [False] * (len(flags_of(events)) - 1)
    assert flags_of(events)[-1] & END
    expected = message(b"b" * (size // 2)) if kind == 1 else b"b" * (size // 2)
    assert b"".join(bodies_of(events, 3)) == expected
    assert bool(flags_of(events, 3)[-1] & RESET) == (kind == 2)


def test_byte_by_byte_the_events_are_head_want_message() -> None:
    """A call that trickles in is announced once its head is complete, then asks once, then is there."""
    native = opened()
    events: list[_h2.Event] = []
    for byte in call(1, b"hello"):
        events += native.feed(bytes([byte]))
    assert [flags & ~END for flags in flags_of(events)] == [HEAD, WANT, MESSAGE]
    assert flags_of(events)[-1] & END
    assert events[1][5] == 5


def test_a_large_body_waits_to_be_let_in() -> None:
    """The first event says how large the message is; no more than the window comes before it was admitted."""
    pair = Pair(peer.session(max_message=10 * 2**20))
    body = fresh(2**20)
    stream = pair.open()
    whole = message(body)
    pair.send(stream, whole[:WINDOW])
    (event,) = pair.pump()
    assert event[1] == HEAD | WANT
    assert event[5] == len(body)
    assert pair.client.local_flow_control_window(stream) == 0
    assert pair.session.admit(stream)
    pair.pump()
    assert pair.client.local_flow_control_window(stream) == len(whole) - WINDOW
    pair.send(stream, whole[WINDOW:], end=True)
    assert bodies_of(pair.pump()) == [body]


def test_an_admission_that_nobody_asked_for_changes_nothing() -> None:
    """Only a message that is on its way can be let in."""
    pair = Pair()
    stream = pair.open()
    pair.pump()
    assert not pair.session.admit(stream)
    assert not pair.session.admit(999)


def test_a_handler_that_does_not_take_holds_its_client_back() -> None:
    """Messages of a stream come until the window is used up; taking them makes room again."""
    pair = Pair()
    stream = pair.open()
    sent = 0
    while pair.client.local_flow_control_window(stream) >= 1005:
        pair.send(stream, message(fresh(1000)))
        pair.pump()
        sent += 1
    assert sent == WINDOW // 1005
    assert len(bodies_of(pair.events)) == sent
    for _ in range(sent // 2 - 2):
        pair.session.credit(stream, 1000)
        pair.pump()
    assert pair.client.local_flow_control_window(stream) < 1005, "small differences wait"
    for _ in range(4):
        pair.session.credit(stream, 1000)
    pair.pump()
    assert pair.client.local_flow_control_window(stream) > WINDOW // 2 - 1005


def test_nothing_follows_a_large_message_that_nobody_took() -> None:
    """Its own bytes are let in and not one more: else a slow handler would have a client's whole stream in memory."""
    pair = Pair()
    stream = pair.open()
    whole = message(fresh(300_000))
    pair.send(stream, whole[:WINDOW])
    pair.pump()
    pair.session.admit(stream)
    pair.pump()
    pair.send(stream, whole[WINDOW:])
    pair.pump()
    assert pair.client.local_flow_control_window(stream) == 0
    pair.session.credit(stream, 300_000)
    pair.pump()
    assert pair.client.local_flow_control_window(stream) == WINDOW


def test_padding_does_not_choke_a_body() -> None:
    """Padding takes room in the window; a client that pads everything gets its message through all the same."""
    pair = Pair()
    body = fresh(400_000)
    stream = pair.open()
    rest = message(body)
    asked = False
    while rest:
        room = min(pair.client.local_flow_control_window(stream), 1000 + 256)
        assert room > 256, "the client is stuck"
        pair.send(stream, rest[: room - 256], pad=255, end=len(rest) <= room - 256)
        rest = rest[room - 256 :]
        for event in pair.pump():
            if event[1] & WANT:
                assert not asked
                asked = pair.session.admit(stream)
                pair.pump()
    assert bodies_of(pair.events) == [body]


def test_trailers_of_a_request_end_it() -> None:
    """Some clients send them; they say nothing to us."""
    pair = Pair()
    stream = pair.open()
    pair.send(stream, message(b"body"))
    pair.client.send_headers(stream, [("x-checksum", "1")], end_stream=True)
    (event,) = pair.pump()
    assert event[1] == HEAD | MESSAGE | END


def test_http_bodies_come_in_pieces() -> None:
    """What is not gRPC has no messages: each feed's bytes are a piece, and credit lets more in."""
    pair = Pair()
    stream = pair.open(HTTP)
    body = fresh(200_000)
    rest = body
    while rest:
        room = pair.client.local_flow_control_window(stream)
        assert room, "the client is stuck"
        pair.send(stream, rest[:room], end=len(rest) <= room)
        rest = rest[room:]
        for piece in bodies_of(pair.pump()):
            pair.session.credit(stream, len(piece))
        pair.pump()
    assert b"".join(bodies_of(pair.events)) == body
    assert all(flags & _h2.HTTP for flags in flags_of(pair.events))
    assert flags_of(pair.events)[-1] & END


@pytest.mark.parametrize(
    "kind", ["application/grpc-web", "application/grpc-web+proto", "application/grpcx", "text/html"]
)
def test_only_grpc_is_grpc(kind: str) -> None:
    """gRPC-Web is HTTP to the session."""
    (event,) = opened().feed(call(1, b"x", (*GRPC[:4], ("content-type", kind))))
    assert event[1] & _h2.HTTP


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1H", 3_600_000_000),
        ("99999999H", 99_999_999 * 3_600_000_000),
        ("2M", 120_000_000),
        ("3S", 3_000_000),
        ("4m", 4_000),
        ("5u", 5),
        ("1999n", 1),
        ("0S", 0),
        ("", -2),
        ("S", -2),
        ("5", -2),
        ("5s", -2),
        ("-5S", -2),
        ("+5S", -2),
        ("5 S", -2),
        ("123456789S", -2),
        ("1.5S", -2),
    ],
)
def test_a_timeout_is_microseconds(text: str, expected: int) -> None:
    """One to eight digits and a unit; everything else is said to be unreadable, not guessed."""
    (event,) = opened().feed(call(1, b"", (*GRPC, ("grpc-timeout", text))))
    assert event[4] == expected


def test_a_message_over_the_limit_is_told_by_its_prefix() -> None:
    """Five bytes are enough to refuse it; what follows is dropped."""
    native = opened(max_message=1000)
    data = frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block()) + frame(peer.DATA, 0, 1, struct.pack(">BI", 0, 1001))
    (event,) = native.feed(data)
    assert event[1] == HEAD | _h2.TOO_BIG
    assert event[5] == 1001
    assert native.feed(frame(peer.DATA, peer.END_STREAM, 1, b"x" * 1001)) == []


@pytest.mark.parametrize("data", [b"\0\0\0", message(b"hello")[:-1], b"\2\0\0\0\0", message(b"whole") + b"\0"])
def test_a_call_that_breaks_off_or_is_no_grpc_is_broken(data: bytes) -> None:
    """The end comes inside a message, or its flag is none."""
    native = opened()
    events = native.feed(
        frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block()) + frame(peer.DATA, peer.END_STREAM, 1, data)
    )
    assert flags_of(events)[-1] & _h2.BROKEN
    assert not flags_of(events)[-1] & MESSAGE


def test_the_compressed_flag_is_told() -> None:
    """Unpacking is the caller's."""
    native = opened()
    head = frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block())
    (event,) = native.feed(head + frame(peer.DATA, peer.END_STREAM, 1, message(b"x", 1)))
    assert event[1] == HEAD | MESSAGE | END | _h2.COMPRESSED


# ---- headers that are too much ---------------------------------------------------------------------------------------


def heavy(size: int) -> tuple[tuple[str, str], ...]:
    """Headers of at least `size` bytes."""
    return (*GRPC, *((f"x-{number}", "v" * 968) for number in range(size // 1000 + 1)))


def test_headers_over_the_limit_are_told_and_not_kept() -> None:
    """The caller can answer why; the body is not read."""
    pair = Pair()
    pair.client.update_settings({})
    pair.pump()
    stream = 1
    native = opened()
    events = native.feed(frame(peer.HEADERS, peer.END_HEADERS, stream, peer.block(heavy(5000))))
    ((_, flags, head, body, _, _),) = events
    assert flags & _h2.HEAVY
    assert not head
    assert body is None
    assert native.feed(frame(peer.DATA, 0, stream, message(b"x"))) == []
    assert native.finish(stream, 8, b"too many headers", b"")
    kinds = [kind for kind, _, number, _ in frames(native.pull(2**20)) if number == stream]
    assert kinds == [peer.HEADERS, peer.RST_STREAM]


def test_headers_far_over_the_limit_are_not_answered() -> None:
    """Eight times the limit is no mistake: the stream is reset, and nobody is told of it."""
    native = opened(max_headers=1000)
    assert native.feed(frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block(heavy(10_000)))) == []
    assert [kind for kind, _, number, _ in frames(native.pull(2**20)) if number == 1] == [peer.RST_STREAM]
    assert native.events() == []
    assert native.streams == 0
    assert native.alive


def test_trailers_count_as_headers() -> None:
    """A bomb of indexed headers may hide in a request's trailers as well."""
    native = opened(max_headers=1000)
    native.feed(frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block((*GRPC, ("x-bomb", "v" * 800)))))
    native.feed(frame(peer.HEADERS, peer.END_HEADERS | peer.END_STREAM, 1, b"\xbe" * 5000))
    assert [kind for kind, _, number, _ in frames(native.pull(2**20)) if number == 1] == [peer.RST_STREAM]
    assert flags_of(native.events()) == [RESET]


# ---- replies ---------------------------------------------------------------------------------------------------------


def test_a_reply_is_headers_a_message_and_trailers() -> None:
    """As gRPC wants it."""
    pair = Pair()
    stream = pair.open()
    pair.send(stream, message(b"question"), end=True)
    pair.pump()
    assert pair.session.reply(stream, b"answer", False)
    pair.pump()
    assert pair.headers(stream)[":status"] == "200"
    assert messages(pair.body(stream)) == [b"answer"]
    assert pair.trailers(stream) == {"grpc-status": "0"}
    assert pair.session.streams == 0


def test_a_load_report_is_in_the_trailers_of_what_succeeds() -> None:
    """From when it is told until it is taken back; a call that fails says nothing of the load."""
    pair = Pair()

    def trailers(status: int) -> dict[str, str]:
        stream = pair.open()
        pair.send(stream, message(b"question"), end=True)
        pair.pump()
        assert pair.session.push(stream, b"part", False)
        assert pair.session.finish(stream, status, b"", b"")
        pair.pump()
        return pair.trailers(stream)

    assert trailers(0) == {"grpc-status": "0"}
    assert pair.session.load(b"CQAAAAAAAOA/")
    assert trailers(0) == {"grpc-status": "0", "endpoint-load-metrics-bin": "CQAAAAAAAOA/"}
    assert trailers(14) == {"grpc-status": "14"}
    stream = pair.open()
    pair.send(stream, message(b"question"), end=True)
    pair.pump()
    assert pair.session.reply(stream, b"answer", False)
    pair.pump()
    assert pair.trailers(stream)["endpoint-load-metrics-bin"] == "CQAAAAAAAOA/"
    assert pair.session.load(b"")
    assert trailers(0) == {"grpc-status": "0"}


def test_a_refusal_is_headers_alone() -> None:
    """Trailers-only; details and message go along."""
    pair = Pair()
    stream = pair.open(end=True)
    pair.pump()
    assert pair.session.finish(stream, 16, b"no%20key", b"AAAA")
    pair.pump()
    headers = pair.headers(stream)
    assert headers["grpc-status"] == "16"
    assert headers["grpc-message"] == "no%20key"
    assert headers["grpc-status-details-bin"] == "AAAA"
    assert pair.body(stream) == b""


@pytest.mark.parametrize("end", ["reply", "push", "finish"])
def test_where_the_time_went_is_a_trailer(end: str) -> None:
    """Of a reply, of a stream, and beside a status; what was said last counts, and what is said too late does not."""
    pair = Pair()
    stream = pair.open()
    pair.send(stream, message(b"hello"), end=True)
    pair.pump()
    assert pair.session.time(stream, b"too early")
    assert pair.session.time(stream, b"total;dur=1.5")
    if end == "reply":
        assert pair.session.reply(stream, b"fine", False)
    else:
        if end == "push":
            assert pair.session.push(stream, b"fine", False)
        assert pair.session.finish(stream, 0, b"", b"")
    assert not pair.session.time(stream, b"too late")
    pair.pump()
    found = pair.headers(stream) if end == "finish" else pair.trailers(stream)
    assert found["x-appliance-timing"] == "total;dur=1.5"
    assert found["grpc-status"] == "0"
    assert not pair.session.time(99, b"nobody's")


def test_an_early_reply_asks_the_client_to_stop() -> None:
    """Who is answered before all was read is told to keep the rest: RST_STREAM NO_ERROR, after the trailers."""
    native = opened()
    native.feed(frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block()))
    native.finish(1, 7, b"", b"")
    out = [(kind, flags, data) for kind, flags, number, data in frames(native.pull(2**20)) if number == 1]
    assert [kind for kind, _, _ in out] == [peer.HEADERS, peer.RST_STREAM]
    assert out[0][1] & peer.END_STREAM
    assert out[1][2] == bytes(4)
    assert native.events() == [], "that is no cancellation"
    assert native.streams == 0


def test_an_early_response_gives_the_client_a_moment_to_end_by_itself() -> None:
    """Clients of the web may forget the answer over a reset: only who goes on sending is told to stop."""
    native = opened()
    for stream in (1, 3):
        native.feed(frame(peer.HEADERS, peer.END_HEADERS, stream, call(1, b"", HTTP)[9:-14]))
        native.respond(stream, 403, [], True)
    kinds = [(kind, flags) for kind, flags, _, _ in frames(native.pull(2**20))]
    assert kinds == [(peer.HEADERS, peer.END_HEADERS | peer.END_STREAM)] * 2
    assert native.feed(frame(peer.DATA, 0, 1, b"more") + frame(peer.DATA, peer.END_STREAM, 3)) == []
    assert native.streams == 1
    Clock(native).wait(3)
    assert frames(native.pull(2**20)) == [(peer.RST_STREAM, 0, 1, bytes(4))]
    assert native.events() == []
    assert native.streams == 0


@pytest.mark.parametrize("pushed", [False, True])
def test_trailers_that_cannot_be_sent_end_the_call_all_the_same(pushed: bool) -> None:
    """The library sends no header block over 64 kB, and says nothing: the stream is reset instead of forgotten."""
    native = opened()
    native.feed(call(1))
    if pushed:
        native.push(1, b"first", False)
        native.pull(2**20)
    native.finish(1, 13, b"x" * 70_000, b"")
    assert frames(native.pull(2**20)) == [(peer.RST_STREAM, 0, 1, struct.pack(">I", 2))]
    assert native.streams == 0


def test_the_first_reply_counts() -> None:
    """A second one, or one to a stream that is gone, is no error and changes nothing; its bytes are let go."""
    native = opened()
    native.feed(call(1) + call(3))
    late = fresh(50)
    before = sys.getrefcount(late)
    assert native.reply(1, b"first", False)
    assert not native.reply(1, late, False)
    assert not native.push(1, late, False)
    assert not native.finish(1, 13, b"", b"")
    native.feed(frame(peer.RST_STREAM, 0, 3, struct.pack(">I", 8)))
    assert not native.reply(3, late, False)
    assert not native.reply(77, late, False)
    assert not native.reply(-5, late, False)
    assert sys.getrefcount(late) == before
    native.pull(2**20)
    assert not native.reply(1, late, False)


def test_replies_of_the_wrong_kind_are_refused() -> None:
    """A gRPC stream takes messages, an HTTP stream takes a response; neither takes the other's."""
    native = opened()
    native.feed(call(1) + call(3, b"", HTTP))
    assert not native.respond(1, 200, [], True)
    assert not native.data(1, b"x", True)
    assert not native.reply(3, b"x", False)
    assert not native.finish(3, 0, b"", b"")
    assert not native.data(3, b"x", True), "its headers come first"


def test_an_http_response_is_written_as_it_is_made() -> None:
    """Headers, pieces, an end."""
    pair = Pair()
    stream = pair.open(HTTP, end=True)
    pair.pump()
    assert pair.session.respond(stream, 201, [(b"x-a", b"1"), (b"x-b", b"2")], False)
    pair.pump()
    for piece, last in ((b"one", False), (b"", False), (b"two", True)):
        assert pair.session.data(stream, piece, last)
        pair.pump()
    assert not pair.session.data(stream, b"three", True)
    assert pair.headers(stream) == {":status": "201", "x-a": "1", "x-b": "2"}
    assert pair.body(stream) == b"onetwo"
    assert pair.taken(h2.events.StreamEnded, stream)


def test_a_large_reply_comes_whole_through_small_windows() -> None:
    """100 MB through a window of 1 MB, byte for byte, and the session lets go of them."""
    native = opened()
    reply = random.Random(1).randbytes(2**20) * 100
    native.feed(peer.settings((4, 2**20)) + frame(peer.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)) + call(1))
    before = sys.getrefcount(reply)
    assert native.reply(1, reply, False)
    assert sys.getrefcount(reply) == before + 1
    received = bytearray()
    while True:
        out = frames(native.pull(256 * 1024))
        data = b"".join(data for kind, _, _, data in out if kind == peer.DATA)
        received += data
        if any(flags & peer.END_STREAM for kind, flags, _, _ in out if kind == peer.HEADERS):
            break
        assert native.pending == len(reply) + 5 - len(received)
        native.feed(frame(peer.WINDOW_UPDATE, 0, 1, struct.pack(">I", len(data))) if data else b"")
    assert received[5:] == reply
    assert sys.getrefcount(reply) == before
    assert native.pending == 0


def test_pull_keeps_to_its_limit() -> None:
    """What is handed out at once is the limit and a frame more at most, however much may be sent."""
    native = opened()
    windows = struct.pack(">I", 2**30)
    native.feed(peer.settings((4, 2**31 - 1), (5, 2**24 - 1)) + frame(peer.WINDOW_UPDATE, 0, 0, windows) + call(1))
    native.reply(1, bytes(5 * 2**20), False)
    while data := native.pull(100_000):
        assert len(data) <= 100_000 + 16 * 1024 + 100
    assert native.pending == 0


def test_a_stream_tells_when_its_queue_is_drained() -> None:
    """Who pushes faster than the client takes asks once and hears once; the event is not lost in the next feed."""
    pair = Pair()
    stream = pair.open()
    pair.pump()
    for _ in range(3):
        assert pair.session.push(stream, fresh(50_000), False)
    assert pair.session.queued(stream, 64 * 1024) == 3 * 50_005
    native = pair.session
    wire = native.pull(2**20)
    assert native.has_events is False, "65 535 bytes may go, and more than the mark is left"
    pair.heard += pair.client.receive_data(wire)
    pair.allow(stream, 60_000)
    assert native.feed(pair.client.data_to_send()) == []
    pair.heard += pair.client.receive_data(native.pull(2**20))
    assert native.has_events
    events = native.feed(frame(peer.PING, 0, 0, b"12345678"))
    assert flags_of(events, stream) == [_h2.DRAINED]
    assert native.queued(stream, 64 * 1024) <= 64 * 1024
    assert native.queued(999, 0) == 0


def test_a_cancelled_stream_lets_go_of_its_replies() -> None:
    """Their bytes are borrowed from Python, and must be given back at once."""
    native = opened()
    native.feed(peer.settings((4, 0)) + call(1) + call(3))
    reply = fresh(1000)
    before = sys.getrefcount(reply)
    native.push(1, reply, False)
    native.reply(3, reply, False)
    native.pull(2**20)
    assert sys.getrefcount(reply) == before + 2
    events = native.feed(b"".join(frame(peer.RST_STREAM, 0, number, struct.pack(">I", 8)) for number in (1, 3)))
    assert sys.getrefcount(reply) == before
    assert native.pending == 0
    assert flags_of(events, 1) == [RESET]


def test_a_session_that_is_dropped_lets_go_of_everything() -> None:
    """Events that nobody took, and replies that nobody read."""
    native = opened()
    native.feed(peer.settings((4, 0)) + call(1, b"x"))
    reply = fresh(1000)
    before = sys.getrefcount(reply)
    native.reply(1, reply, False)
    native.pull(2**20)
    del native
    assert sys.getrefcount(reply) == before


def test_a_reset_of_ours_ends_the_stream() -> None:
    """The rest of the request is dropped, and so is a reply that comes after."""
    native = opened()
    native.feed(frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block(HTTP)))
    assert native.reset(1, 2)
    assert not native.data(1, b"late", True)
    out = [(kind, data) for kind, _, number, data in frames(native.pull(2**20)) if number == 1]
    assert out == [(peer.RST_STREAM, struct.pack(">I", 2))]
    assert native.streams == 0
    assert not native.reset(1, 2)


def test_frames_are_of_the_usual_size() -> None:
    """A peer that allows frames of 16 MB gets those of 16 kB: the library would keep a buffer for larger ones."""
    native = opened()
    windows = frame(peer.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30))
    native.feed(peer.settings((4, 2**31 - 1), (5, 2**24 - 1)) + windows + call(1))
    native.reply(1, bytes(300_000), False)
    sizes = []
    while data := native.pull(2**20):
        sizes += [len(payload) for kind, _, _, payload in frames(data) if kind == peer.DATA]
    assert sum(sizes) == 300_005
    assert max(sizes) == 16 * 1024


# ---- the connection --------------------------------------------------------------------------------------------------


def test_shutting_down_loses_no_stream() -> None:
    """A notice that names no stream, then a ping, twice; when that is answered, the last stream. Until then calls go
    on: gRPC's C core answers a ping before it sends the calls that it had begun."""
    native = opened()
    native.feed(call(1))
    native.shut()
    native.shut()
    out = frames(native.pull(2**20))
    assert [kind for kind, *_ in out] == [peer.GOAWAY, peer.PING]
    assert out[0][3][:4] == struct.pack(">I", 2**31 - 1)
    assert flags_of(native.feed(call(3)), 3) == [HEAD | MESSAGE | END], "sent before the client knew"
    assert not native.retired
    native.feed(frame(peer.PING, peer.ACK, 0, out[1][3]))
    assert not native.retired
    assert flags_of(native.feed(call(5)), 5) == [HEAD | MESSAGE | END], "begun before the client knew"
    assert frames(native.pull(2**20)) == [out[1]]
    native.feed(frame(peer.PING, peer.ACK, 0, out[1][3]))
    assert native.retired
    (goaway,) = frames(native.pull(2**20))
    assert goaway[0] == peer.GOAWAY
    assert goaway[3][:4] == struct.pack(">I", 5)
    assert native.feed(call(7)) == [], "refused: the client knew"
    native.feed(frame(peer.PING, peer.ACK, 0, out[1][3]) * 3)
    assert peer.GOAWAY not in [kind for kind, *_ in frames(native.pull(2**20))]
    for number in (1, 3, 5):
        assert native.alive
        native.reply(number, b"x", False)
        native.pull(2**20)
    assert not native.alive
    assert native.fault is None


def test_a_ping_is_sent_and_one_is_answered() -> None:
    """Both ways; an answer to a ping of keepalive does not end a connection."""
    native = opened()
    native.ping()
    ((kind, flags, _, data),) = frames(native.pull(2**20))
    assert (kind, flags) == (peer.PING, 0)
    native.feed(frame(peer.PING, peer.ACK, 0, data) + frame(peer.PING, 0, 0, b"87654321"))
    assert frames(native.pull(2**20)) == [(peer.PING, peer.ACK, 0, b"87654321")]
    assert not native.retired


def test_an_abandoned_connection_says_why() -> None:
    """GOAWAY with the code, then nothing."""
    native = opened()
    native.abandon(peer.ENHANCE_YOUR_CALM)
    ((kind, _, _, data),) = frames(native.pull(2**20))
    assert kind == peer.GOAWAY
    assert data[4:8] == struct.pack(">I", peer.ENHANCE_YOUR_CALM)
    assert not native.alive


def test_a_peer_that_breaks_the_protocol_is_given_up_for_it() -> None:
    """What libnghttp2 itself ends connections for is told too."""
    native = opened()
    native.feed(frame(peer.HEADERS, peer.END_HEADERS, 1, b"\xff" * 12))
    ((kind, _, _, data),) = frames(native.pull(2**20))
    assert (kind, data[4:8]) == (peer.GOAWAY, struct.pack(">I", 9))
    assert native.fault == "COMPRESSION_ERROR"
    assert not native.alive


def test_no_http2_no_connection() -> None:
    """What does not begin as HTTP/2 ends at once, and what follows is not looked at."""
    native = peer.session()
    native.pull(2**20)
    assert native.feed(b"GET / HTTP/1.1\r\n\r\n") == []
    assert native.fault
    assert not native.alive
    assert native.feed(PREFACE + call(1)) == []
    native.pull(2**20)


def test_a_reply_that_is_not_taken_ends_in_time() -> None:
    """Whatever else the client says meanwhile: the reply to that stream waits in our memory. Others are not touched."""
    native = opened()
    native.feed(call(1) + call(3))
    native.feed(peer.settings((4, 0)) + call(5))
    reply = fresh(5000)
    before = sys.getrefcount(reply)
    clock = Clock(native)
    for number in (1, 5):
        native.reply(number, reply, False)
    native.pull(2**20)
    clock.wait(59)
    native.feed(frame(peer.PING, 0, 0, b"12345678"))
    native.pull(2**20)
    native.feed(frame(peer.WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)))
    clock.wait(3)
    out = [(kind, number) for kind, _, number, _ in frames(native.pull(2**20)) if kind == peer.RST_STREAM]
    assert sorted(number for _, number in out) == [1, 5]
    native.pull(0)
    assert native.feed(b"") is not None
    assert sys.getrefcount(reply) == before
    assert native.streams == 1
    assert native.alive


def test_a_slow_client_is_no_crawling_one() -> None:
    """Who takes something worth mentioning in each period keeps its stream for as long as that takes."""
    native = opened()
    native.feed(peer.settings((4, 0)) + call(1))
    native.reply(1, bytes(200_000), False)
    native.pull(2**20)
    clock = Clock(native)
    for _ in range(10):
        clock.wait(50)
        native.feed(b"".join(frame(peer.WINDOW_UPDATE, 0, number, struct.pack(">I", 16 * 1024)) for number in (0, 1)))
        assert peer.RST_STREAM not in [kind for kind, *_ in frames(native.pull(2**20))]
    assert native.pending < 50_000


def test_a_server_that_was_busy_blames_nobody() -> None:
    """While it did not listen its clients could not be heard: that time hardly counts."""
    native = opened()
    native.feed(peer.settings((4, 0)) + call(1))
    native.reply(1, b"waits", False)
    now = time.monotonic()
    for late in (100, 200, 300):
        native.tick(now + late, 60)
    assert peer.RST_STREAM not in [kind for kind, *_ in frames(native.pull(2**20))]


def test_headers_that_never_end_are_not_waited_for() -> None:
    """A header block keeps every other frame of its connection out: it has as long as a body, then all is over."""
    native = opened()
    native.feed(frame(peer.HEADERS, 0, 1, peer.block()))
    clock = Clock(native)
    clock.wait(59)
    assert native.alive
    clock.wait(3)
    assert [kind for kind, *_ in frames(native.pull(2**20))] == [peer.GOAWAY]
    assert native.fault


def test_one_thread_at_a_time() -> None:
    """Large blocks are worked on without the interpreter lock; another thread that comes meanwhile is turned away."""
    native = opened(max_message=2**30)
    native.feed(peer.settings((4, 2**31 - 1)) + frame(peer.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)) + call(1))
    native.reply(1, bytes(200 * 2**20), False)
    done = threading.Event()
    refused: list[BaseException] = []

    def disturb() -> None:
        while not done.is_set():
            try:
                native.queued(1, 0)
            except RuntimeError as error:
                refused.append(error)
                return

    thread = threading.Thread(target=disturb)
    thread.start()
    while native.pending and not refused:
        native.pull(64 * 2**20)
    done.set()
    thread.join()
    assert all("one thread at a time" in str(error) for error in refused)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda native: native.reply(1, "text", False),
        lambda native: native.reply(1, bytearray(b"x"), False),
        lambda native: native.reply("1", b"x", False),
        lambda native: native.reply(1, b"x"),
        lambda native: native.feed("text"),
        lambda native: native.respond(1, 200, ((b"a", b"b"),), True),
        lambda native: native.respond(1, 200, [(b"a", "b")], True),
        lambda native: native.respond(1, 200, [b"a"], True),
        lambda native: native.finish(1, 0, "x", b""),
        lambda native: native.tick("now", 1),
        lambda native: native.pull("much"),
    ],
)
def test_arguments_of_the_wrong_type_are_a_type_error(wrong: Any) -> None:
    """And nothing has happened."""
    native = opened()
    native.feed(call(1, b"", HTTP))
    with pytest.raises(TypeError):
        wrong(native)
    assert native.respond(1, 204, [], True)


# ---- floods ----------------------------------------------------------------------------------------------------------


def fed(native: _h2.Session, wire: bytes, times: int) -> int:
    """Feed `wire` up to so many times, reading what comes. Returns: how often before the session gave up."""
    for number in range(times):
        native.feed(wire)
        native.pull(2**20)
        native.events()
        if not native.alive:
            return number + 1
    return times


@pytest.mark.parametrize(
    ("wire", "at_most"),
    [
        (frame(peer.PING, 0, 0, bytes(8)), 12_000),
        (peer.settings((4, 70_000)), 1_000),
        (frame(peer.SETTINGS, peer.ACK, 0), 1_000),
        (frame(peer.DATA, 0, 1), 12_000),
        (frame(peer.DATA, peer.PADDED, 1, b"\0"), 12_000),
        (frame(peer.DATA, peer.PADDED, 1, b"\x64" + bytes(100)), 12_000),
        (frame(peer.PRIORITY, 0, 1, bytes(5)), 12_000),
    ],
    ids=["PING", "SETTINGS", "SETTINGS ACK", "empty DATA", "padding", "more padding", "PRIORITY"],
)
def test_frames_that_carry_nothing_are_counted(wire: bytes, at_most: int) -> None:
    """A peer that reads all our answers is stopped as well: they cost us more than it."""
    native = opened()
    native.feed(frame(peer.HEADERS, peer.END_HEADERS, 1, peer.block()))
    assert fed(native, wire, at_most) < at_most
    assert not native.alive


def headers(stream: int, flags: int = peer.END_HEADERS) -> bytes:
    """A request's headers."""
    return frame(peer.HEADERS, flags, stream, call(stream)[9 : 9 + int.from_bytes(call(stream)[:3])])


MADE_RESETS = {
    "RST_STREAM": lambda s: headers(s) + frame(peer.RST_STREAM, 0, s, struct.pack(">I", 8)),
    "WINDOW_UPDATE 0": lambda s: headers(s) + frame(peer.WINDOW_UPDATE, 0, s, bytes(4)),
    "window overflow": lambda s: headers(s) + frame(peer.WINDOW_UPDATE, 0, s, struct.pack(">I", 2**31 - 1)),
    "DATA after END_STREAM": lambda s: headers(s, 5) + frame(peer.DATA, 0, s, b"x"),
    "HEADERS after END_STREAM": lambda s: headers(s, 5) + headers(s, 5),
    "PRIORITY of a wrong length": lambda s: headers(s) + frame(peer.PRIORITY, 0, s, bytes(4)),
    "trailers without END_STREAM": lambda s: headers(s) + headers(s),
    "wrong content-length": lambda s: call(s, b"", (*GRPC, ("content-length", "1"))),
    "no path": lambda s: call(s, b"", GRPC[:2] + GRPC[3:]),
    "upper-case header": lambda s: frame(peer.HEADERS, 5, s, b"\x82\x86\x84\x41\x01x\x00\x03X-A\x01b"),
    "self-dependency": lambda s: headers(s) + frame(peer.PRIORITY, 0, s, struct.pack(">IB", s, 1)),
}


@pytest.mark.parametrize("kind", MADE_RESETS)
def test_streams_that_are_started_and_thrown_away_are_counted(kind: str) -> None:
    """Whoever resets them: a peer can make us do it, in many ways (CVE-2023-44487, CVE-2025-8671)."""
    native = opened()
    for stream in range(1, 5000, 2):
        native.feed(MADE_RESETS[kind](stream))
        native.pull(2**20)
        for number, flags, *_ in native.events():
            if not flags & RESET:
                native.finish(number, 0, b"", b"")
        if not native.alive:
            break
    assert not native.alive


@pytest.mark.parametrize("piece", [b"", b"\0\1a\1b"], ids=["empty", "with headers"])
def test_a_header_block_has_few_continuations(piece: bytes) -> None:
    """CVE-2024-28182 and its relatives: a block that never ends."""
    native = opened()
    native.feed(frame(peer.HEADERS, 0, 1, peer.block()))
    assert fed(native, frame(peer.CONTINUATION, 0, 1, piece), 100) < 30


def test_a_header_bomb_is_cheap() -> None:
    """Each byte of a block stands for 4 kB of headers: they are not kept, and their stream is reset."""
    native = opened(max_headers=16 * 1024)
    native.feed(frame(peer.HEADERS, 5, 1, peer.block((*GRPC, ("x-bomb", "v" * 3900)))))
    began = time.process_time()
    for stream in range(3, 203, 2):
        native.feed(frame(peer.HEADERS, 5, stream, b"\xbe" * 16_000))
        native.pull(2**20)
    assert native.events() == []
    assert native.streams <= 1
    assert time.process_time() - began < 10, "a hundred bombs of 62 MB"


def test_more_streams_than_allowed_are_refused() -> None:
    """Before the peer could know the limit they are refused; after that they are an offence."""
    native = opened(settled=False, streams=10)
    wire = b"".join(headers(stream) for stream in range(1, 101, 2))
    assert len(native.feed(wire)) == 10
    refused = [data for kind, _, _, data in frames(native.pull(2**20)) if kind == peer.RST_STREAM]
    assert refused == [struct.pack(">I", 7)] * 40
    native.feed(frame(peer.SETTINGS, peer.ACK, 0) + headers(101))
    assert peer.GOAWAY in [kind for kind, *_ in frames(native.pull(2**20))]
    assert not native.alive


@pytest.mark.skipif("H2_MODULE" in os.environ, reason="the sanitizer keeps freed memory for a while, and finds leaks")
def test_calls_leave_nothing_behind() -> None:
    """Memory is flat over 60 000 calls: what each leaked would show from 20 bytes on."""
    run_calls(5_000)
    before = resident()
    for _ in range(3):
        run_calls(20_000)
    assert resident() - before < 2**20


def run_calls(count: int) -> None:
    """So many calls on one session, each with its reply."""
    native = opened()
    native.feed(frame(peer.WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)))
    for stream in range(1, 2 * count, 2):
        ((number, *_),) = native.feed(call(stream, b"x" * 50))
        native.reply(number, b"y" * 50, False)
        native.pull(2**20)


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
