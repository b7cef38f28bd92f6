"""What gRPC clients see is the same over the native wire as over grpcio: statuses, sentences, metadata, messages.

grpcio is the oracle: every case runs against both transports with the same stock client, and must end alike. Where
grpcio words its own refusals, or a law concerns what the server itself lives through, the law is stated instead.
"""

import contextlib
import functools
import itertools
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support.appliance import Pki
from support.raw_http2 import connected, framed
from support.waiting import eventually
from support.wire_server import MAX_MESSAGE, Channel, Server

PATIENCE_S = 60.0
"""Seconds for one call; only a hung server takes that long."""

GZIP = grpc.Compression.Gzip
Case: TypeAlias = Callable[[Channel], tuple[Any, ...]]
Raw: TypeAlias = dict[str, Any]
STATUSES = {4: "DEADLINE_EXCEEDED", 5: "NOT_FOUND", 7: "PERMISSION_DENIED", 8: "RESOURCE_EXHAUSTED"}
STATUSES |= {12: "UNIMPLEMENTED", 13: "INTERNAL", 14: "UNAVAILABLE", 16: "UNAUTHENTICATED"}


@pytest.fixture(scope="module")
def servers(pki: Pki) -> Iterator[Callable[[str, str], Server]]:
    """Servers by transport and event loop; each is started when it is first asked for."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda transport, loop: stack.enter_context(Server(pki, transport, loop)))


@pytest.fixture(params=["uvloop", "asyncio"])
def native(request: pytest.FixtureRequest, servers: Callable[[str, str], Server]) -> Server:
    """The native wire, on either event loop."""
    return servers("native", request.param)


@pytest.fixture
def oracle(servers: Callable[[str, str], Server]) -> Server:
    """grpcio's own server."""
    return servers("grpcio", "uvloop")


@pytest.fixture(params=["native-uvloop", "native-asyncio", "grpcio-uvloop"])
def server(request: pytest.FixtureRequest, servers: Callable[[str, str], Server]) -> Server:
    """Either transport, for laws about what a server does; handlers that are held stay held."""
    found = servers(*request.param.split("-"))
    found.do("gate", open_=False)
    return found


# ---- the same calls over both ----------------------------------------------------------------------------------------


def ends(call: Any) -> tuple[Any, ...]:
    """How a call with one answer ended: messages, status, sentence, trailing metadata."""
    return _ended(call, lambda: [call.result()])


def says(call: Any) -> tuple[Any, ...]:
    """The same for a call whose server streams."""
    return _ended(call, lambda: call)


def _ended(call: Any, answers: Callable[[], Iterable[bytes]]) -> tuple[Any, ...]:
    messages: list[object] = []
    with contextlib.suppress(grpc.RpcError):
        messages.extend(_shown(message) for message in answers())
    trailing = dict(tuple(pair) for pair in call.trailing_metadata() or ())
    return messages, call.code().name, call.details(), trailing


def _shown(message: bytes | None) -> object:
    return message if message is None or len(message) < 100 else (len(message), zlib.crc32(message))


def unary(method: str, body: bytes = b"", **how: Any) -> Case:
    """One unary call."""
    return lambda channel: ends(channel.unary(method).future(body, timeout=PATIENCE_S, **how))


def chat(method: str, *bodies: bytes, **how: Any) -> Case:
    """One call whose client streams all it has to say and reads all it is told."""
    return lambda channel: says(channel.chat(method)(iter(bodies), timeout=PATIENCE_S, **how))


def collect(method: str, *bodies: bytes, **how: Any) -> Case:
    """One client-streaming call."""
    return lambda channel: ends(channel.collect(method).future(iter(bodies), timeout=PATIENCE_S, **how))


def count(method: str, body: bytes, **how: Any) -> Case:
    """One server-streaming call."""
    return lambda channel: says(channel.count(method)(body, timeout=PATIENCE_S, **how))


def abort(status: int, message: str, details: bytes = b"") -> bytes:
    """What makes `Abort` end so."""
    return json.dumps({"status": status, "message": message, "details": details.hex()}).encode()


def counting(number: int, size: int) -> bytes:
    """What makes `Count` count so far."""
    return json.dumps({"count": number, "size": size}).encode()


EDGES = [0, 1, 5, 16_384, *range(65_525, 65_546), 131_072, 2**20, 20 * 2**20, MAX_MESSAGE]
METADATA = (("x-one", "1"), ("x-two", "a"), ("x-two", "b"), ("x-raw-bin", b"\x00\xff"), ("x-spaced", "a  b"))
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

CASES: dict[str, Case] = {
    **{f"{size} bytes": unary("Echo", b"x" * size) for size in EDGES},
    **{f"{size} bytes back": unary("Make", str(size).encode()) for size in EDGES},
    **{f"{size} bytes up": unary("Length", b"x" * size) for size in EDGES[-4:]},
    "nothing in a stream": chat("Chat"),
    "empty messages in a stream": chat("Chat", b"", b"", b""),
    "streams": chat("Chat", *(b"%d" % number for number in range(500))),
    "large messages in a stream": chat("Chat", *(bytes([48 + n]) * (300_000 * n) for n in range(8))),
    "messages around the window": chat("Chat", *(b"y" * size for size in range(65_528, 65_540))),
    "client streaming": collect("Collect", *(b"z" * number for number in range(300))),
    "client streaming of nothing": collect("Collect"),
    "client streaming of one window each": collect("Collect", *(b"z" * 65_530 for _ in range(20))),
    "client streaming of large messages": collect("Collect", *(b"z" * 3_000_000 for _ in range(10))),
    "server streaming": count("Count", counting(1000, 10)),
    "server streaming of large messages": count("Count", counting(10, 2_000_000)),
    "server streaming of nothing": count("Count", counting(0, 0)),
    "server streaming of empty messages": count("Count", counting(3, 0)),
    "a stream that is aborted": chat("AbortAfter", b"a", b"b", b"stop", b"c"),
    "a stream that is aborted at once": chat("AbortAfter", b"stop"),
    "a stream that crashes": chat("CrashAfter", b"a", b"b"),
    "a stream that ends early": chat("FirstOnly", b"a", b"b", b"c"),
    "a unary method in a stream": chat("Echo", b"one"),
    "a unary call of a stream": unary("Chat", b"one"),
    "a unary call of a stream without an answer": unary("Count", counting(0, 0)),
    "a unary call without a message": collect("Echo"),
    "a crash": unary("Crash"),
    "metadata": unary("Metadata", metadata=METADATA),
    "no metadata": unary("Metadata"),
    "a long header": unary("Metadata", metadata=(("x-long", "v" * 15_000),)),
    "many headers": unary("Metadata", metadata=tuple((f"x-{number}", "v") for number in range(100))),
    **{f"status {name}": unary("Abort", abort(status, f"for {name}")) for status, name in STATUSES.items()},
    "a sentence in every language": unary("Abort", abort(5, "Grüße, 世界! 100 % «so» \U0001f600 a\nb\tc ~ \x7f")),
    "an empty sentence": unary("Abort", abort(5, "")),
    "a long sentence": unary("Abort", abort(5, "so " * 300)),
    "details": unary("Abort", abort(8, "with details", bytes(range(256)))),
    "one byte of details": unary("Abort", abort(8, "with details", b"\0")),
    "no deadline": lambda channel: ends(channel.unary("Deadline").future(b"")),
    "gzip": unary("Echo", b"a" * 10_000, compression=GZIP),
    "gzip of nothing": unary("Echo", b"", compression=GZIP),
    "gzip of what does not shrink": unary("Echo", bytes(range(100)), compression=GZIP),
    "gzip over several windows": unary("Length", b"".join(b"%d," % n for n in range(10**6)), compression=GZIP),
    "gzip in a stream": chat("Chat", b"a" * 1000, b"b" * 100_000, compression=GZIP),
    "gzip in a stream that begins small": chat("Chat", b"a", b"b" * 1000, b"c", b"d" * 1000, compression=GZIP),
    "a quick answer": unary("Quick", b"fox"),
    "a quick handler that passes": unary("Quick", b"slow"),
    "a quick handler that answers later": unary("Quick", b"later"),
    "a quick handler that aborts": unary("Quick", b"abort"),
    "gzip to a quick handler": unary("Quick", b"fox" * 100, compression=GZIP),
    "a guarded method": unary("Guarded", b"x" * 100),
    "a guarded method, large": unary("Guarded", b"x" * 1_000_000),
    **{
        f"{method} refused by {how}": unary(method, b"x" * size, metadata=(("x-admit", how),))
        for method in ("Guarded", "GuardedStream")
        for how in ("reply", "abort", "crash")
        for size in (0, 200_000)
    },
    "health": unary(HEALTH + "Check", health_pb2.HealthCheckRequest(service="").SerializeToString()),
    "health of a stranger": unary(HEALTH + "Check", health_pb2.HealthCheckRequest(service="x").SerializeToString()),
    "health of rubbish": unary(HEALTH + "Check", b"\xff\xff"),
    "reflection": chat(
        REFLECTION,
        reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString(),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health").SerializeToString(),
    ),
    "reflection of rubbish": chat(REFLECTION, b"\xff\xff"),
}
QUICK = {"a quick answer", "a quick handler that answers later", "a quick handler that aborts"}
"""grpcio asks no quick handlers; what they say is stated below."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_a_call_ends_alike_on_both_transports(native: Server, oracle: Server, name: str) -> None:
    """Messages, status, sentence and trailing metadata."""
    answers = []
    for server in (native, oracle):
        with server.channel() as channel:
            answers.append(CASES[name](channel))
    assert answers[0] == answers[1]


def test_details_of_a_status_arrive(server: Server) -> None:
    """As the bytes they were."""
    with server.channel() as channel:
        for details in (b"\0", bytes(range(256)), b"xy", b"xyz"):
            end = ends(channel.unary("Abort").future(abort(8, "with details", details), timeout=PATIENCE_S))
            assert end[1:] == ("RESOURCE_EXHAUSTED", "with details", {"grpc-status-details-bin": details})


def test_quick_handlers_answer_like_all_others(native: Server) -> None:
    """At once, later, or with a status."""
    with native.channel() as channel:
        assert CASES["a quick answer"](channel) == ([b"quick fox"], "OK", "", {})
        assert CASES["a quick handler that answers later"](channel) == ([b"it is later"], "OK", "", {})
        assert CASES["a quick handler that aborts"](channel) == ([], "NOT_FOUND", "nothing here", {})


def test_what_grpcio_words_its_own_way_has_the_same_status(native: Server, oracle: Server) -> None:
    """Methods that are not there."""
    for server in (native, oracle):
        with server.channel() as channel:
            for method in ("Nothing", "/no.Such/Thing", "/", "/wire.Test/"):
                assert ends(channel.unary(method).future(b"", timeout=PATIENCE_S))[1] == "UNIMPLEMENTED"


def test_what_only_ours_can_answer(native: Server) -> None:
    """grpcio never ends a call with CANCELLED by itself, and unpacks deflate, which we do not speak."""
    with native.channel() as channel:
        assert unary("Abort", abort(1, "no more"))(channel) == ([], "CANCELLED", "no more", {})
        packed = unary("Echo", b"a" * 1000, compression=grpc.Compression.Deflate)
        assert packed(channel)[1] == "UNIMPLEMENTED"


def test_a_method_that_asks_for_no_credentials_takes_little(native: Server) -> None:
    """Memory is for those who are known."""
    with native.channel() as channel:
        assert ends(channel.unary("Open").future(b"x" * 4000, timeout=PATIENCE_S))[1] == "OK"
        assert ends(channel.unary("Open").future(b"x" * 500_000, timeout=PATIENCE_S))[1] == "RESOURCE_EXHAUSTED"


def test_everything_goes_over_plaintext_and_unix_sockets(pki: Pki, oracle: Server, tmp_path: Path) -> None:
    """The same answers without TLS."""
    names = ["streams", "details", f"{2**20} bytes", "gzip", "metadata", "large messages in a stream"]
    with Server(pki, unix=tmp_path / "wire.sock") as native, oracle.channel() as right:
        for how in ("plain", "unix"):
            with native.channel(how) as channel:
                for name in names:
                    assert CASES[name](channel) == CASES[name](right)


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_message_over_the_limit_is_refused_with_its_setting(native: Server, oracle: Server) -> None:
    """Both end with RESOURCE_EXHAUSTED; ours says which setting to change."""
    for server in (native, oracle):
        with server.channel() as channel:
            _, code, sentence, _ = ends(channel.unary("Echo").future(b"x" * (MAX_MESSAGE + 1), timeout=PATIENCE_S))
            assert code == "RESOURCE_EXHAUSTED"
            assert server is oracle or "limits.request_size" in str(sentence)
            call = channel.chat("Chat")(iter([b"a", b"x" * (MAX_MESSAGE + 1)]), timeout=PATIENCE_S)
            assert says(call)[1] == "RESOURCE_EXHAUSTED"
            assert ends(channel.unary("Echo").future(b"still here", timeout=PATIENCE_S))[1] == "OK"


def test_a_gzip_message_over_the_limit_is_refused(native: Server, oracle: Server) -> None:
    """What counts is what it unpacks to."""
    bomb = b"\0" * (MAX_MESSAGE + 1)
    for server in (native, oracle):
        with server.channel() as channel:
            call = channel.unary("Length").future(bomb, timeout=PATIENCE_S, compression=GZIP)
            _, code, sentence, _ = ends(call)
            assert code == "RESOURCE_EXHAUSTED"
            assert server is oracle or "limits.request_size" in str(sentence)
            call = channel.collect("Collect").future(iter([b"a", bomb]), timeout=PATIENCE_S, compression=GZIP)
            assert ends(call)[1] == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_a_reply_over_the_limit_names_its_setting(pki: Pki, transport: str) -> None:
    """Unary and streaming."""
    with Server(pki, transport, max_reply=1000) as server, server.channel() as channel:
        assert ends(channel.unary("Make").future(b"1000", timeout=PATIENCE_S))[1] == "OK"
        for end in (
            ends(channel.unary("Make").future(b"1001", timeout=PATIENCE_S)),
            says(channel.count("Count")(counting(1, 1001), timeout=PATIENCE_S)),
        ):
            _, code, sentence, _ = end
            assert code == "RESOURCE_EXHAUSTED"
            assert "limits.reply_size" in str(sentence)


@pytest.mark.parametrize("size", [17_000, 60_000])
def test_headers_over_the_limit_are_refused(native: Server, oracle: Server, size: int) -> None:
    """Ours names the setting; the connection goes on. grpcio lets pass what is a little over."""
    for server in (native, oracle) if size > 20_000 else (native,):
        with server.channel() as channel:
            call = channel.unary("Echo").future(b"", metadata=(("x-long", "v" * size),), timeout=PATIENCE_S)
            _, code, sentence, _ = ends(call)
            assert code == "RESOURCE_EXHAUSTED"
            assert server is oracle or "limits.metadata_size" in str(sentence)
            assert ends(channel.unary("Echo").future(b"x", timeout=PATIENCE_S))[1] == "OK"


def test_an_overloaded_budget_is_resource_exhausted(native: Server) -> None:
    """Admission that finds no memory says so before the body comes."""
    with native.channel() as channel:
        how = (("x-admit", "overloaded"),)
        call = channel.unary("Guarded").future(b"x" * 200_000, metadata=how, timeout=PATIENCE_S)
        assert ends(call)[1:3] == ("RESOURCE_EXHAUSTED", "too much of everything")


@pytest.mark.parametrize("how", ["reply", "abort"])
def test_a_refused_caller_need_not_send_its_body(native: Server, how: str) -> None:
    """The refusal comes while nearly all of 20 MB are still at the client: the stream's window never opens."""
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(20):
            yield b"x" * 2**20
            sent += 1

    with native.channel() as channel:
        call = channel.collect("GuardedStream").future(body(), metadata=(("x-admit", how),), timeout=PATIENCE_S)
        messages, code, *_ = ends(call)
        assert (messages, code) == (([b"refused"], "OK") if how == "reply" else ([], "PERMISSION_DENIED"))
        assert sent <= 2  # what grpcio itself takes ahead


def test_the_memory_budget_is_given_back(native: Server) -> None:
    """Whatever became of the calls, nothing is held when they are over."""
    with native.channel() as channel:
        for how in ("", "reply", "abort", "overloaded", "crash"):
            for method in ("Guarded", "GuardedStream"):
                metadata = (("x-admit", how),)
                ends(channel.unary(method).future(b"x" * 3_000_000, metadata=metadata, timeout=PATIENCE_S))
        call = channel.unary("Guarded").future(b"x" * 20_000_000, timeout=PATIENCE_S)
        call.cancel()
    eventually(lambda: native.ask("used") == 0)


# ---- raw requests that no stock client sends -------------------------------------------------------------------------


def by_hand(server: Server, body: bytes, *headers: tuple[str, str], path: str = "/wire.Test/Echo", **more: str) -> Raw:
    """A gRPC call from scratch, and what came back. Args: more: pseudo-headers without their colon."""
    with connected(server) as client:
        client.greet()
        client.ask(1, path, body, dict(headers) | {f":{name}": value for name, value in more.items()})
        return client.reply(1)


def test_a_call_by_hand(native: Server) -> None:
    """Headers, message and trailers as the specification has them."""
    found = by_hand(native, framed(b"hello"))
    assert found[":body"] == framed(b"hello")
    assert (found[":status"], found["content-type"], found["grpc-status"]) == ("200", "application/grpc", "0")


@pytest.mark.parametrize("flag", [0, 1])
def test_an_unknown_encoding_is_unimplemented_and_ours_are_named(native: Server, flag: int) -> None:
    """Whether or not the message is compressed."""
    found = by_hand(native, framed(b"\xff" * 20, flag), ("grpc-encoding", "snappy"))
    assert found["grpc-status"] == "12"
    assert "gzip" in found["grpc-accept-encoding"]


def test_a_gzip_message_by_hand_is_understood(server: Server) -> None:
    """And its length is that of what it unpacks to."""
    packed = zlib.compress(b"a" * 1000, wbits=31)
    assert (
        by_hand(server, framed(packed, 1), ("grpc-encoding", "gzip"), path="/wire.Test/Length")[":body"][5:] == b"1000"
    )


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(framed(b"abc", 1), id="compressed, and no encoding named"),
        pytest.param(framed(b"abc", 0, 10), id="cut short"),
        pytest.param(b"\0\0", id="cut short in its prefix"),
        pytest.param(b"", id="nothing"),
        pytest.param(framed(b"abc") + framed(b"def"), id="two messages"),
        pytest.param(framed(b"abc", 7), id="an unknown flag"),
    ],
)
def test_a_broken_unary_call_is_internal_or_unimplemented(server: Server, body: bytes) -> None:
    """It ends with a status, and no handler hears of it. grpcio takes the first of two messages."""
    found = by_hand(server, body)
    if server.transport == "grpcio":
        assert found.get("grpc-status", "reset") in ("0", "8", "12", "13", "reset")
    else:
        assert found["grpc-status"] in ("12", "13")
        assert found["grpc-message"]


def test_a_gzip_message_that_is_none_is_refused(server: Server) -> None:
    """With a status, not with a broken stream."""
    found = by_hand(server, framed(b"no gzip at all", 1), ("grpc-encoding", "gzip"))
    assert found["grpc-status"] in ("8", "13")


@pytest.mark.parametrize("timeout", ["1n", "0S", "1m"])
def test_a_deadline_that_is_over_ends_the_call(server: Server, timeout: str) -> None:
    """Also when the client does not cancel: the handler is told, the client gets DEADLINE_EXCEEDED."""
    found = by_hand(server, framed(b"over"), ("grpc-timeout", timeout), path="/wire.Test/Hold")
    if server.transport == "native":
        assert found["grpc-status"] == "4"
    for _ in range(server.told("holding", id="over")):
        server.wait("holding", id="over")
        server.wait("cancelled", id="over")


@pytest.mark.parametrize("timeout", ["", "1", "S", "123456789S", "-1S", "1.5S", "1s", "1 S"])
def test_a_timeout_that_cannot_be_read_is_an_error(native: Server, timeout: str) -> None:
    """It is not taken for "none": the caller would wait for ever."""
    assert by_hand(native, framed(b""), ("grpc-timeout", timeout))["grpc-status"] == "13"


@pytest.mark.parametrize("unit", ["99999999H", "99999999M", "99999999S", "60000m", "60000000u", "99999999n"])
def test_every_unit_of_a_timeout_is_understood(server: Server, unit: str) -> None:
    """Up to eight digits."""
    body = by_hand(server, framed(b""), ("grpc-timeout", unit), path="/wire.Test/Deadline")[":body"]
    assert float(body[5:]) > (50 if not unit.endswith("n") else 0)


@pytest.mark.parametrize("type_", ["application/json", "text/plain", "application/grpcx"])
def test_another_content_type_is_not_grpc(server: Server, type_: str) -> None:
    """It gets an HTTP error, not a gRPC one."""
    found = by_hand(server, b"{}", ("content-type", type_))
    if server.transport == "native":  # grpcio takes whatever comes
        assert found[":status"] == "404"
        assert "grpc-status" not in found


@pytest.mark.parametrize("type_", ["application/grpc+proto", "application/grpc;charset=utf-8"])
def test_content_types_that_begin_like_grpc_are(server: Server, type_: str) -> None:
    """`application/grpc` with a suffix or a parameter."""
    assert by_hand(server, framed(b"x"), ("content-type", type_))["grpc-status"] == "0"


def test_only_post_is_grpc(native: Server) -> None:
    """Other methods end with a status."""
    assert by_hand(native, framed(b"x"), method="PUT")["grpc-status"] in ("12", "13")


# ---- deadlines, cancellation, clients that leave ---------------------------------------------------------------------


@functools.cache
def names() -> Iterator[str]:
    """A name for every call."""
    return (f"call-{number}" for number in itertools.count())


def held(server: Server, channel: Channel, kind: str) -> tuple[str, grpc.Call]:
    """A call that stays in its handler, which has it already, and its name; `kind`: "unary" or "stream"."""
    name = next(names())
    if kind == "unary":
        call = channel.unary("Hold").future(name.encode())
    else:
        call = channel.chat("HoldStream")(iter([name.encode()]))
        assert next(call) == name.encode()
    server.wait("holding", id=name)
    return name, call


def test_a_deadline_reaches_the_handler(server: Server) -> None:
    """As seconds that are left; and when they are over, the call is."""
    with server.channel() as channel:
        assert 90 < float(channel.unary("Deadline")(b"", timeout=100)) <= 100
        name = next(names())
        call = channel.unary("Hold").future(name.encode(), timeout=0.3)
        assert ends(call)[1] == "DEADLINE_EXCEEDED"
        server.wait("cancelled", id=name)


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_a_cancelled_call_cancels_its_handler(server: Server, kind: str) -> None:
    """At once: the handler has nothing else that could end it."""
    with server.channel() as channel:
        name, call = held(server, channel, kind)
        call.cancel()
        server.wait("cancelled", id=name)


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_a_client_that_goes_cancels_its_handlers(server: Server, kind: str) -> None:
    """The connection's end is the end of all its calls."""
    with server.channel() as channel:
        name, call = held(server, channel, kind)
        assert call.is_active()
    server.wait("cancelled", id=name)


def test_a_cancel_in_the_middle_of_a_large_body_is_heard(server: Server) -> None:
    """Nothing is left behind, and the connection goes on."""
    with server.channel() as channel:
        calls = [channel.unary("Guarded").future(b"x" * 20_000_000) for _ in range(3)]
        server.wait("asked")
        for call in calls:
            call.cancel()
        assert channel.unary("Echo")(b"still here", timeout=PATIENCE_S) == b"still here"


def test_a_handler_that_answers_too_late_harms_nobody(server: Server) -> None:
    """Its answer is dropped; the connection and its neighbours go on."""
    with server.channel() as channel:
        name = next(names())
        call = channel.unary("Linger").future(name.encode())
        server.wait("holding", id=name)
        call.cancel()
        server.wait("ignored", id=name)
        assert channel.unary("Echo")(b"still here", timeout=PATIENCE_S) == b"still here"


def test_a_stream_may_speak_before_its_client_has_ended(server: Server) -> None:
    """Half-close: question and answer alternate on an open stream, then the client ends."""
    questions: list[bytes] = [b"1", b"2", b"3"]
    answered = threading.Semaphore(1)

    def asking() -> Iterator[bytes]:
        for question in questions:
            answered.acquire()
            yield question

    with server.channel() as channel:
        heard = []
        for answer in channel.chat("Chat")(asking(), timeout=PATIENCE_S):
            heard.append(answer)
            answered.release()
        assert heard == questions


def test_a_stream_that_ends_early_stops_its_client(server: Server) -> None:
    """The client still had things to say; it gets its answer and OK."""
    endless = (b"%d" % number for number in itertools.count())
    with server.channel() as channel:
        assert says(channel.chat("FirstOnly")(endless, timeout=PATIENCE_S))[:2] == ([b"0"], "OK")


def test_health_is_watched(server: Server) -> None:
    """Each change once, until the client leaves."""
    request = health_pb2.HealthCheckRequest(service="u/a/m").SerializeToString()
    with server.channel() as channel:
        watch = channel.count(HEALTH + "Watch")(request, timeout=PATIENCE_S)
        said = (health_pb2.HealthCheckResponse.FromString(message).status for message in watch)
        first = next(said)
        server.do("healthy", ready=True)
        if first != health_pb2.HealthCheckResponse.SERVING:
            assert next(said) == health_pb2.HealthCheckResponse.SERVING
        server.do("healthy", ready=False)
        assert next(said) == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


# ---- flow control ----------------------------------------------------------------------------------------------------


def memory(server: Server) -> int:
    """Bytes that the process has resident."""
    text = Path(f"/proc/{server.pid}/status").read_text(encoding="ascii")
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


def settled(value: Callable[[], int]) -> int:
    """A value once it has stopped growing."""
    last, since = -1, time.monotonic()

    def still() -> bool:
        nonlocal last, since
        now = value()
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > 0.4

    eventually(still, PATIENCE_S)
    return last


def test_a_client_that_reads_slowly_holds_the_handler_back(native: Server) -> None:
    """100 MB of replies are not made while nobody takes them; none is lost when somebody does."""
    with native.channel() as channel:
        before, made = memory(native), native.ask("made")
        call = channel.count("Count")(counting(10_000, 10_000), timeout=PATIENCE_S)
        next(call)
        waiting = settled(lambda: native.ask("made")) - made
        assert waiting < 3000
        assert memory(native) - before < 40 * 2**20
        rest = [int.from_bytes(message[:4], "big") for message in call]
        assert rest == list(range(1, 10_000))


@pytest.mark.parametrize(("size", "number"), [(10_000, 10_000), (4_000_000, 40), (20_000_000, 12)])
def test_a_slow_handler_holds_its_client_back(native: Server, size: int, number: int) -> None:
    """Whatever the size of its messages: what waits for the handler is bounded, and all of it comes through."""
    sent = 0

    def messages() -> Iterable[bytes]:
        nonlocal sent
        for _ in range(number):
            yield b"m" * size
            sent += 1

    native.do("gate", open_=False)
    with native.channel() as channel:
        before = memory(native)
        call = channel.collect("Slow").future(messages(), timeout=PATIENCE_S)
        native.wait("took one")
        assert settled(lambda: sent) < number / 2
        assert memory(native) - before < 30 * 2**20 + 3 * size
        native.do("gate", open_=True)
        assert call.result() == f"{number} {number * size}".encode()
    assert native.ask("used") == 0


# ---- many at once ----------------------------------------------------------------------------------------------------


def mixed(channel: Channel, number: int) -> list[Any]:
    """Start so many calls of several kinds."""
    kinds: list[Callable[[int], Any]] = [
        lambda n: channel.unary("Echo").future(b"%d" % n, timeout=PATIENCE_S),
        lambda n: channel.unary("Length").future(b"x" * (70_000 + n), timeout=PATIENCE_S),
        lambda n: channel.unary("Quick").future(b"later", timeout=PATIENCE_S),
        lambda n: channel.collect("Collect").future(iter([b"x" * n] * 3), timeout=PATIENCE_S),
        lambda n: channel.unary("Make").future(b"%d" % (n * 100), timeout=PATIENCE_S),
        lambda n: channel.unary("Abort").future(abort(5, f"{n}"), timeout=PATIENCE_S),
    ]
    return [kinds[n % len(kinds)](n) for n in range(number)]


def test_hundreds_of_calls_at_once_end_alike(native: Server, oracle: Server) -> None:
    """500 on one connection: more than the streams it may have."""
    with native.channel() as channel, oracle.channel() as right:
        ours = [ends(call) for call in mixed(channel, 500)]
        theirs = [ends(call) for call in mixed(right, 500)]
        quick = [number for number in range(500) if number % 6 == 2]
        assert all(ours[number][0] == [b"it is later"] for number in quick)
        assert [end for n, end in enumerate(ours) if n % 6 != 2] == [end for n, end in enumerate(theirs) if n % 6 != 2]


def test_calls_on_many_connections_do_not_mix(native: Server) -> None:
    """20 connections with 30 calls each."""
    with native.channel() as first:
        expected = [ends(call) for call in mixed(first, 30)]
    channels = [native.channel() for _ in range(20)]
    try:
        calls = [mixed(channel.__enter__(), 30) for channel in channels]
        for started in calls:
            assert [ends(call) for call in started] == expected
    finally:
        for channel in channels:
            channel.__exit__(None, None, None)
