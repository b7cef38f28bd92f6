"""Protobuf messages from strangers, paid for before they are parsed.

Two bytes on the wire are a message of two hundred in memory, when it is an empty one: 128 MiB could become 12 GiB, and
the parser stops for nobody. So whatever is not small is walked through first, field by field, without making anything.
Source: protobuf.dev/programming-guides/encoding.
"""

import asyncio
from functools import cache, partial
from typing import TypeAlias, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from appliance.api.contents import Contents, taken_out
from appliance.core.errors import InputTooLarge, InvalidRequest
from appliance.core.memory import Reservation

_SMALL = 64 * 1024
"""Bytes of a body that may become what they will: forty times as much at worst."""

_LARGE = 256 * 1024
"""Bytes from which a body is weighed and parsed on a thread: 50 ms at worst; there the loop gets its turns."""

_MOST = 1_000_000
"""Fields that one message may have, with those of the messages in it: a fifth of a second in one piece."""

_MESSAGE, _PIECE, _NUMBER = 64, 40, 8
"""Bytes that a message takes beside its fields, a text or bytes beside their content, and a number or a reference. A
list's former places stay where it outgrew them, so a piece of 16 bytes is more than that."""

_F = FieldDescriptor
_FIXED = {_F.TYPE_FLOAT, _F.TYPE_DOUBLE, _F.TYPE_FIXED32, _F.TYPE_FIXED64, _F.TYPE_SFIXED32, _F.TYPE_SFIXED64}
_VARINT, _EIGHT, _BYTES, _BEGIN, _END, _FOUR = range(6)

M = TypeVar("M", bound=Message)

_Kinds: TypeAlias = dict[int, tuple[int, int, "Descriptor | None"]]
"""Field number → bytes of an element, bytes that each byte of it becomes, and what is in it."""


async def parsed(kind: type[M], body: bytes, memory: Reservation, apart: dict[int, Contents] | None = None) -> M:
    """The message that a body is; `memory`, which holds the body's bytes, grows by what the message takes beside them.

    Args:    apart: takes the large contents of a PostModelOutputsRequest, by input, in place of the message: they stay
        in the body.
    Raises: InvalidRequest: it is not that message. InputTooLarge: it has too many parts. Overloaded.
    """
    try:
        if len(body) >= _SMALL:
            look = partial(_looked_at, cast(Descriptor, kind.DESCRIPTOR), body, apart)
            body, count = look() if len(body) < _LARGE else await asyncio.to_thread(look)
            memory.grow(count)
        if len(body) < _LARGE:
            return kind.FromString(body)
        return await asyncio.to_thread(kind.FromString, body)
    except DecodeError as error:
        raise InvalidRequest(f"The request is not a {kind.DESCRIPTOR.name} message.") from error


def _looked_at(descriptor: Descriptor, body: bytes, apart: dict[int, Contents] | None) -> tuple[bytes, int]:
    """What is to be parsed, and what that takes beside the body. Raises: InputTooLarge: it has too many parts."""
    found = None if apart is None else taken_out(body)
    if apart is None or found is None:
        return body, weight(descriptor, body)
    rest, contents = found
    apart.update(contents)
    return rest, len(rest) + (weight(descriptor, rest) if len(rest) >= _SMALL else 0)


def weight(descriptor: Descriptor, body: bytes) -> int:
    """Bytes that a message takes in memory, about, beside those of its body; of a broken one, until it breaks.

    Raises: InputTooLarge: it has too many parts.
    """
    total = count = place = 0
    end = len(body)
    kinds = _kinds(descriptor)
    outer: list[tuple[int, _Kinds]] = []
    try:
        while True:
            if place >= end:
                if place > end or not outer:
                    return total
                end, kinds = outer.pop()
                continue
            tag, place = _varint(body, place)
            wire = tag & 7
            element, byte, inner = kinds.get(tag >> 3, _UNKNOWN)
            total += element
            count += 1
            if count > _MOST:
                raise InputTooLarge(f"The request has more than {_MOST} fields in it. Send several requests.")
            if wire == _BYTES:
                length, place = _varint(body, place)
                total += byte * length
                if inner is not None and length:
                    outer.append((end, kinds))
                    end, kinds = place + length, _kinds(inner)
                else:
                    place += length
            elif wire == _VARINT:
                _, place = _varint(body, place)
            elif wire in (_EIGHT, _FOUR):
                place += 8 if wire == _EIGHT else 4
            elif wire not in (_BEGIN, _END):  # a group's fields are counted as if they stood outside it
                return total
    except IndexError:
        return total


def _varint(body: bytes, place: int) -> tuple[int, int]:
    """A number, and the place behind it. Raises: IndexError: the body ends in it."""
    value = body[place]
    place += 1
    if value < 0x80:
        return value, place
    value &= 0x7F
    shift = 7
    while True:
        more = body[place]
        place += 1
        value |= (more & 0x7F) << shift
        if more < 0x80 or shift > 63:
            return value, place
        shift += 7


_UNKNOWN: tuple[int, int, None] = (0, 1, None)
"""A field that is not known is kept as it came."""


@cache
def _kinds(descriptor: Descriptor) -> _Kinds:
    found: _Kinds = {}
    for field in descriptor.fields:
        inner = field.message_type
        if inner is not None:
            found[field.number] = (_NUMBER + _MESSAGE + sum(map(_room, inner.fields)), 0, inner)
        elif field.is_repeated:
            # Numbers are packed: a byte each at least, where their size is not fixed.
            packed = 0 if field.type in _FIXED or field.cpp_type == _F.CPPTYPE_STRING else _NUMBER
            found[field.number] = (_room(field), packed, None)
        else:
            found[field.number] = (0, 0, None)
    return found


def _room(field: FieldDescriptor) -> int:
    """Bytes of a field in its message, or of an element."""
    return _PIECE if field.cpp_type == _F.CPPTYPE_STRING else _NUMBER
