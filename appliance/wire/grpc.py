"""What gRPC over HTTP/2 and gRPC-Web have in common: the message frame, `grpc-timeout`, `grpc-message`, gzip.

Source: grpc/grpc doc/PROTOCOL-HTTP2.md.
"""

import re
import struct
import zlib
from collections.abc import Callable

FRAME_HEAD = struct.Struct(">BI")
"""A message's five bytes: flag (1: compressed), length."""

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
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


def timeout_seconds(value: bytes | str) -> float:
    """Seconds of a `grpc-timeout`. Raises: ValueError: it is not one to eight digits and a unit of HMSmun."""
    found = _TIMEOUT.fullmatch(value.encode("utf-8", "replace") if isinstance(value, str) else value)
    if found is None:
        raise ValueError('grpc-timeout must be one to eight digits and one of H, M, S, m, u, n, e.g. "500m".')
    return int(found[1]) * _UNIT_S[found[2]]


def too_large(limit: int) -> str:
    """The sentence for a request message of more than `limit` bytes."""
    return f"The request has more than {limit} bytes, which limits.request_size allows. Send fewer or smaller inputs."


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
