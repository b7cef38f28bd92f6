"""What gRPC over HTTP/2 and gRPC-Web have in common: message frame, metadata, `grpc-timeout`, `grpc-message`, gzip.

Source: grpc/grpc doc/PROTOCOL-HTTP2.md.
"""

import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterable

from appliance.core.errors import Overloaded
from appliance.core.memory import STRANGER
from appliance.core.types import Endpoint, RpcAbort, RpcStatus
from appliance.wire import sentences

_log = logging.getLogger(__name__)

OPEN_TO_ALL = 4 * 1024
"""Bytes of a message, packed and unpacked, to an endpoint that asks for no credentials."""

NO_MESSAGE = "The call ended without a message."

FRAME_HEAD = struct.Struct(">BI")
"""A message's five bytes: flag (1: compressed), length."""

_TIMEOUT = re.compile("([0-9]{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_ENCODED = re.compile(rb"[^ -$&-~]")
_GZIP = 16 + zlib.MAX_WBITS
_SLICE = 1 << 16
_PIECE = 1 << 20
_MEMBERS = 1024
"""Members of one gzip message. Real ones have one; millions of empty ones would cost us far more than their sender."""


class TooLarge(ValueError):
    """A message that unpacks to more than is allowed."""


def frame(message: bytes, flag: int = 0) -> bytes:
    """A message with its head."""
    return FRAME_HEAD.pack(flag, len(message)) + message


def percent_encode(text: str) -> bytes:
    """A `grpc-message`: UTF-8, with what is not printable ASCII, and "%", as %XX."""
    return _ENCODED.sub(lambda found: b"%%%02X" % found[0][0], text.encode("utf-8", "replace"))


def timeout_seconds(value: str) -> float:
    """Seconds of a `grpc-timeout`. Raises: ValueError: it is not one to eight digits and a unit of HMSmun."""
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        raise ValueError('grpc-timeout must be one to eight digits and one of H, M, S, m, u, n, e.g. "500m".')
    return int(found[1]) * _UNIT_S[found[2]]


def metadata(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """A call's metadata: header name → first value, without HTTP/2's pseudo-headers and without binary headers."""
    found: dict[str, str] = {}
    for name, value in headers:
        if name[:1] != b":" and name[-4:] != b"-bin":
            found.setdefault(name.decode("latin-1"), value.decode("latin-1"))
    return found


def not_served(method: str) -> RpcAbort:
    """How a call to a method that we do not have ends."""
    return RpcAbort(RpcStatus.UNIMPLEMENTED, f"This appliance does not serve {method[:200]}.")


def encoding_not_served(name: str) -> RpcAbort:
    """How a call ends whose `grpc-encoding` is neither gzip nor identity."""
    sentence = f"Messages encoded as {name[:40]!r} are not understood; use gzip or identity."
    return RpcAbort(RpcStatus.UNIMPLEMENTED, sentence)


def more_than_one() -> RpcAbort:
    """How a unary call ends that has a second message."""
    return RpcAbort(RpcStatus.INTERNAL, "A unary call has one message; this one has more.")


def unforeseen(method: str) -> RpcAbort:
    """The last resort of every call; called while the exception is being handled, which goes to the log."""
    _log.exception("unforeseen error", extra={"method": method})
    return RpcAbort(RpcStatus.INTERNAL, sentences.UNFORESEEN)


def message_limit(endpoint: Endpoint, max_message: int) -> int:
    """Bytes that a message to this endpoint may have, packed and unpacked."""
    return OPEN_TO_ALL if endpoint.admit is None else max_message


def owner(endpoint: Endpoint) -> str | None:
    """Whose share of the memory budget a message takes that the endpoint was not asked about."""
    return STRANGER if endpoint.admit is None else None


def too_large(limit: int) -> str:
    """The sentence for a request message of more than `limit` bytes, a `message_limit`."""
    if limit == OPEN_TO_ALL:
        return f"This method takes {limit} bytes at most."
    return sentences.request_too_large(limit)


def unpack(data: bytes, limit: int, count: Callable[[int], object]) -> bytes:
    """See `inflate`; what it raises, and Overloaded from `count`, ends the call. Raises: RpcAbort."""
    try:
        return inflate(data, limit, count)
    except (TooLarge, Overloaded) as error:
        raise RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, str(error)) from error
    except ValueError as error:
        raise RpcAbort(RpcStatus.INTERNAL, str(error)) from error


def inflate(data: bytes, limit: int, count: Callable[[int], object] = int) -> bytes:
    """Unpack a gzip message of one or several members; no more than `limit` bytes are ever unpacked, plus one.

    Args:    count: told of every piece's bytes once it is unpacked, so that a memory budget can stop it.
    Raises:  TooLarge: it unpacks to more. ValueError: it is cut short, or is not gzip. What `count` raises.
    """
    pieces = []
    room = limit + 1
    members = 1
    member = zlib.decompressobj(_GZIP)
    # In slices: what a member leaves over is copied, and must not be the whole rest of the message each time.
    for start in range(0, len(data), _SLICE):
        rest = data[start : start + _SLICE]
        while rest:
            if member.eof:
                members += 1
                if members > _MEMBERS:
                    raise ValueError(f"The gzip message has more than {_MEMBERS} members.")
                member = zlib.decompressobj(_GZIP)
            try:
                piece = member.decompress(rest, min(room, _PIECE))
            except zlib.error:
                raise ValueError("The message is marked as gzip and cannot be unpacked.") from None
            room -= len(piece)
            if room == 0:
                raise TooLarge(too_large(limit))
            count(len(piece))
            pieces.append(piece)
            rest = member.unused_data or member.unconsumed_tail
    if not member.eof:
        raise ValueError("The gzip message is cut short.")
    return b"".join(pieces)


def deflate(data: bytes) -> bytes:
    """Pack a message as gzip; fast rather than small."""
    return zlib.compress(data, level=1, wbits=_GZIP)
