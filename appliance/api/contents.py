"""The large contents of a predict request, left where they lie in its body while protobuf parses the rest.

Parsing copies every byte of a body, and reading a field copies it once more: 7 ms for 128 pictures of 50 kB. Here the
way to each picture, sound, film and array is walked, their bytes are left out, and the parser gets the small message
that remains. It misses nothing but bytes that it would not have looked at, so it is as strict as with the whole body.
Where anything on the way is unusual (a field that is there twice, a number in more bytes than it needs, a group)
nothing is left out: how such a body is to be read is the parser's business.

Source of the encoding: protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api.varints import Pieces, varint

HERE = -1
"""In place of a part's number: in the input's `data` itself."""

Fields: TypeAlias = Mapping[str, memoryview]
"""What was left out of one `data`: field ("image", "ndarray", …) → content."""

Contents: TypeAlias = Mapping[int, Fields]
"""What was left out of one input: number of the part → what of its `data`."""

NOTHING: Mapping[Any, Any] = MappingProxyType({})
"""For inputs, parts and arguments of which nothing was."""

_LEAST = 16 * 1024
"""Bytes of a content that is left out: to copy less twice is as cheap as to find it."""

_MOST_FIELDS = 10_000
"""Fields that are looked at: a few milliseconds. 128 inputs with all they may have are a tenth."""

_MOST_LEFT = 256 * 1024
"""Bytes that may remain. A request of which more remains is not one of large contents."""

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


@dataclass(slots=True)
class _Step:
    """A field on the way to contents.

    Attributes:
        name: of a field that has the content in it; "" for others.
        inner: the next steps by their tags; None: this is the content.
    """

    name: str
    repeated: bool
    inner: "dict[int, _Step] | None"


class _Unusual(Exception):
    """Left to the parser."""


def taken_out(body: bytes) -> tuple[bytes, dict[int, Contents]] | None:
    """A PostModelOutputsRequest without its large contents, and these by the inputs' numbers: views of `body`.

    Returns: None when the body is to be parsed as it is: it has no large contents, or is unusual, or no such message.
    """
    scan = _Scan(body)
    try:
        pieces, size = scan.rest(0, len(body), _REQUEST, ())
    except (_Unusual, IndexError):
        return None
    if not scan.found or size > _MOST_LEFT:
        return None
    contents: dict[int, dict[int, dict[str, memoryview]]] = {}
    for (number, *part, name), content in scan.found.items():
        contents.setdefault(number, {}).setdefault(part[0] if part else HERE, {})[name] = content
    return b"".join(pieces), dict(contents)


class _Scan:
    def __init__(self, body: bytes) -> None:
        self._body = body
        self._view = memoryview(body)
        self._left = _MOST_FIELDS
        self.found: dict[tuple[Any, ...], memoryview] = {}

    def rest(self, place: int, end: int, steps: dict[int, _Step], way: tuple[Any, ...]) -> tuple[Pieces, int]:
        """The message between two places without its contents, and how many bytes that are.

        Raises: _Unusual, IndexError.
        """
        body, view = self._body, self._view
        pieces: Pieces = []
        total = 0
        kept = place  # from here on nothing is in `pieces` yet
        counts: dict[int, int] = {}
        while place < end:
            self._left -= 1
            if self._left < 0:
                raise _Unusual
            start = place
            tag, place = (body[place], place + 1) if body[place] < 128 else _number(body, place)
            wire = tag & 7
            if wire == _BYTES:
                tag_end = place
                size, place = (body[place], place + 1) if body[place] < 128 else _number(body, place)
                inside, place = place, place + size
                if place > end:
                    raise _Unusual
                step = steps.get(tag)
                if step is None:
                    continue
                count = counts[tag] = counts.get(tag, -1) + 1
                if count and not step.repeated:
                    raise _Unusual  # messages are merged, and of contents the last one counts
                if size < _LEAST:
                    continue
                if step.inner is None:
                    self.found[way] = view[inside:place]
                    pieces.append(view[kept:start])
                else:
                    further = (*way, count) if step.repeated else (*way, step.name) if step.name else way
                    inner, length = self.rest(inside, place, step.inner, further)
                    if length == size:
                        continue
                    head = body[start:tag_end] + varint(length)
                    pieces += view[kept:start], head, *inner
                    total += len(head) + length
                total += start - kept
                kept = place
            elif wire == _VARINT:
                last = place + 10
                while body[place] > 127:
                    place += 1
                    if place == last:
                        raise _Unusual
                place += 1
            elif wire in (_EIGHT, _FOUR):
                place += 8 if wire == _EIGHT else 4
            else:
                raise _Unusual
        if place != end:
            raise _Unusual
        pieces.append(view[kept:end])
        return pieces, total + end - kept


def _number(body: bytes, place: int) -> tuple[int, int]:
    """A tag or a length, and the place behind it. Raises: _Unusual: it is written in more bytes than it needs."""
    number = body[place] & 127
    for shift in (7, 14, 21, 28):
        place += 1
        group = body[place]
        number |= (group & 127) << shift
        if group < 128:
            if not group:
                raise _Unusual
            return number, place + 1
    raise _Unusual


def _tag(message: Any, field: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[field].number) << 3 | _BYTES


def _content(message: Any, field: str) -> dict[int, _Step]:
    return {_tag(message, field): _Step("", False, None)}


_KINDS = {
    "image": _content(resources_pb2.Image, "base64"),
    "video": _content(resources_pb2.Video, "base64"),
    "audio": _content(resources_pb2.Audio, "base64"),
    "ndarray": _content(resources_pb2.NDArray, "buffer"),
}
_IN_DATA = {_tag(resources_pb2.Data, name): _Step(name, False, steps) for name, steps in _KINDS.items()}
_PART = {_tag(resources_pb2.Part, "data"): _Step("", False, _IN_DATA)}
_DATA = {**_IN_DATA, _tag(resources_pb2.Data, "parts"): _Step("", True, _PART)}
_INPUT = {_tag(resources_pb2.Input, "data"): _Step("", False, _DATA)}
_REQUEST = {_tag(service_pb2.PostModelOutputsRequest, "inputs"): _Step("", True, _INPUT)}
