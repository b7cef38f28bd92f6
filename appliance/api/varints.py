"""Numbers as protobuf writes them, seven bits a byte, the lowest first; and what a message is joined from.

Source: protobuf.dev/programming-guides/encoding.
"""

from typing import TypeAlias

Pieces: TypeAlias = list[bytes | memoryview]
"""What stands one after another in a message, to be joined once; a memoryview's items are bytes."""


def _written(number: int) -> bytes:
    groups = bytearray()
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)


SMALL = [_written(number) for number in range(1024)]
"""What most lengths are; where every tenth of a microsecond counts, they are looked up at once."""


def varint(number: int) -> bytes:
    """A number that is not negative."""
    return SMALL[number] if number < 1024 else _written(number)
