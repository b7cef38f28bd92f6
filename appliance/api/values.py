"""Values of method arguments between Clarifai's `Data` message and our own types, both ways (PROTOCOL 4.2).

What the stock SDK's serializers write is read here, and what is written here they read; a test holds every type against
them. Where older clients wrote something else (a JSON text for a dict, `text.raw` for a str), that is read too.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2
from google.protobuf import json_format, struct_pb2

from appliance.api import arrays, jsonbody
from appliance.api.contents import NOTHING, Fields
from appliance.core.errors import InvalidInput, InvalidRequest
from appliance.core.types import FieldType, Frame, Media, MethodField, Region, ScoredConcept, Value

_LIST_KEY = "_list"
"""Under which the SDK keeps a list in a struct, which can only be a dict."""

_REPEATED = {FieldType.CONCEPT: "concepts", FieldType.REGION: "regions", FieldType.FRAME: "frames"}
_MEDIA = {FieldType.IMAGE: "image", FieldType.AUDIO: "audio", FieldType.VIDEO: "video"}
_LARGE = {**_MEDIA, FieldType.NDARRAY: "ndarray"}
"""Types whose content may have been left out of the message, and where it was."""

_INT64 = 2**63
_OBJECT = 256
"""Bytes of an array, a dict or the like beside its content."""

_FEW = 500
"""Parts of a value that are no work."""


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(field: MethodField, data: resources_pb2.Data, contents: Fields = NOTHING) -> Value:
    """The value of a field's type; what is absent is zero, as proto3 has it.

    Args:    contents: what was left out of `data`.
    Raises:  InvalidInput: `data` carries something of another type, or a value outside the field's range.
    """
    _check_only(field, data)
    return _read(field, data, contents)


def _read(field: MethodField, data: resources_pb2.Data, contents: Fields) -> Value:
    content = contents.get(_LARGE.get(field.type, ""))
    if content is None:
        value = _READERS[field.type](field, data)
    elif field.type is FieldType.NDARRAY:
        value = arrays.array(data.ndarray, field.name, content)
    else:  # copied: a method's values may outlive the request
        value = Media(bytes(content), getattr(data, _MEDIA[field.type]).url)
    _check(field, value)
    return value


def read_from(field: MethodField, data: resources_pb2.Data, source: str, contents: Fields = NOTHING) -> Value:
    """The same of an input of the old form, from one of the field's `sources`: `data` holds other arguments too.

    Raises:  InvalidInput: likewise.
    """
    if source in ("text", "string_value"):  # a type that may be in either of them takes this one
        alone = resources_pb2.Data(string_value=data.string_value)
        if source == "text":
            alone = resources_pb2.Data(text=data.text)
        data = alone
    return _read(field, data, contents)


def sources(field: MethodField) -> tuple[str, ...]:
    """The fields of `Data` in which callers of the old form have such a value; none for what only parts can say."""
    inner = field.items[0].type if field.type is FieldType.LIST else None
    return (_REPEATED[inner],) if inner in _REPEATED else _SOURCES.get(field.type, ())


def _check(field: MethodField, value: Value) -> None:
    if field.range is not None and not field.range[0] <= value <= field.range[1]:
        raise InvalidInput(f"{field.name} is {value:g}; it must be from {field.range[0]:g} to {field.range[1]:g}.")
    if field.choices and field.type is FieldType.STR and value not in field.choices:
        raise InvalidInput(f"{field.name} is {value[:80]!r}; it must be one of {', '.join(field.choices)}.")


def _check_only(field: MethodField, data: resources_pb2.Data) -> None:
    """Raises: InvalidInput: something else is set. A zero is not on the wire, so nothing set is fine."""
    allowed = (*(sources(field) or ("parts",)), *_ALSO.get(field.type, ()), "metadata")
    for descriptor, _ in data.ListFields():
        if descriptor.name not in allowed:
            name, wanted = field.name or "The value", _WORDS[field.type]
            raise InvalidInput(f"{name} must be {wanted}; it came as {descriptor.name}.")


def _str(field: MethodField, data: resources_pb2.Data) -> str:
    text: str = data.string_value or data.text.raw
    return text


def _bytes(field: MethodField, data: resources_pb2.Data) -> bytes:
    content: bytes = data.bytes_value
    return content


def _int(field: MethodField, data: resources_pb2.Data) -> int:
    if data.float_value and not data.int_value:
        if not math.isfinite(data.float_value) or data.float_value != int(data.float_value):
            raise InvalidInput(f"{field.name} is {data.float_value:g}; it must be a whole number.")
        if abs(data.float_value) >= _INT64:
            raise InvalidInput(f"{field.name} is {data.float_value:g}; whole numbers have 64 bits here.")
        return int(data.float_value)
    return int(data.int_value)


def _float(field: MethodField, data: resources_pb2.Data) -> float:
    return float(data.float_value or data.int_value)


def _bool(field: MethodField, data: resources_pb2.Data) -> bool:
    return bool(data.bool_value)


def _ndarray(field: MethodField, data: resources_pb2.Data) -> Value:
    if not data.HasField("ndarray"):
        raise InvalidInput(f"{field.name or 'The value'} must be an array; set ndarray.")
    return arrays.array(data.ndarray, field.name)


def _json(field: MethodField, data: resources_pb2.Data) -> Value:
    """A dict or list; SDKs before 11.11 sent it as a JSON text."""
    if data.HasField("struct_value"):
        try:
            found = json_format.MessageToDict(data.struct_value)
        except (ValueError, RecursionError) as error:  # not finite, say
            raise InvalidInput(f"{field.name} holds a number that is not finite; JSON has none.") from error
        return found[_LIST_KEY] if len(found) == 1 and _LIST_KEY in found else found
    if not data.string_value:
        return {}
    try:
        found = jsonbody.parse(data.string_value.encode())
    except InvalidRequest as error:
        raise InvalidInput(f"{field.name} is a text that is not JSON: {error}") from error
    if not isinstance(found, dict | list):
        raise InvalidInput(f"{field.name} must be a dict or list; it came as the JSON {data.string_value[:40]!r}.")
    return found


def _text(field: MethodField, data: resources_pb2.Data) -> Media:
    return Media((data.text.raw or data.string_value).encode("utf-8", "surrogatepass"), data.text.url)


def _media(field: MethodField, data: resources_pb2.Data) -> Media:
    name = _MEDIA[field.type]
    message = getattr(data, name)
    return Media(message.base64, message.url)


def _one(field: MethodField, data: resources_pb2.Data) -> Value:
    name = _REPEATED[field.type]
    found = getattr(data, name)
    if len(found) != 1:
        raise InvalidInput(f"{field.name or 'The value'} must be {_WORDS[field.type]}; {len(found)} came.")
    return _ELEMENTS[field.type](found[0])


def _list(field: MethodField, data: resources_pb2.Data) -> list[Value]:
    inner = field.items[0]
    if inner.type in _REPEATED:
        return [_ELEMENTS[inner.type](element) for element in getattr(data, _REPEATED[inner.type])]
    return [read(inner, part.data) for part in data.parts]


def _tuple(field: MethodField, data: resources_pb2.Data) -> tuple[Value, ...]:
    if len(data.parts) != len(field.items):
        raise InvalidInput(f"{field.name or 'The tuple'} must have {len(field.items)} items; {len(data.parts)} came.")
    return tuple(read(item, part.data) for item, part in zip(field.items, data.parts, strict=True))


def _named(field: MethodField, data: resources_pb2.Data) -> dict[str, Value]:
    given = {part.id: part.data for part in data.parts}
    missing = [item.name for item in field.items if item.name not in given]
    if missing:
        raise InvalidInput(f"{field.name or 'The value'} lacks the field {missing[0]!r}.")
    return {item.name: read(item, given[item.name]) for item in field.items}


def _concept(message: resources_pb2.Concept) -> ScoredConcept:
    return ScoredConcept(message.id, message.name, message.value)


def _region(message: resources_pb2.Region) -> Region:
    info = message.region_info
    box = info.bounding_box
    return Region(
        box=(box.left_col, box.top_row, box.right_col, box.bottom_row) if info.HasField("bounding_box") else None,
        concepts=tuple(_concept(concept) for concept in message.data.concepts),
        value=message.value,
        id=message.id,
        text=message.data.text.raw,
        track_id=message.track_id,
        mask=Media(info.mask.image.base64, info.mask.image.url) if info.HasField("mask") else None,
        point=(info.point.col, info.point.row, info.point.z) if info.HasField("point") else None,
    )


def _frame(message: resources_pb2.Frame) -> Frame:
    data = message.data
    return Frame(
        image=Media(data.image.base64, data.image.url),
        number=message.frame_info.index or message.frame_info.number,
        time_ms=message.frame_info.time,
        concepts=tuple(_concept(concept) for concept in data.concepts),
        regions=tuple(_region(region) for region in data.regions),
    )


_READERS = {
    FieldType.STR: _str,
    FieldType.BYTES: _bytes,
    FieldType.INT: _int,
    FieldType.FLOAT: _float,
    FieldType.BOOL: _bool,
    FieldType.NDARRAY: _ndarray,
    FieldType.JSON: _json,
    FieldType.TEXT: _text,
    FieldType.IMAGE: _media,
    FieldType.AUDIO: _media,
    FieldType.VIDEO: _media,
    FieldType.CONCEPT: _one,
    FieldType.REGION: _one,
    FieldType.FRAME: _one,
    FieldType.LIST: _list,
    FieldType.TUPLE: _tuple,
    FieldType.NAMED_FIELDS: _named,
}
_ELEMENTS = {FieldType.CONCEPT: _concept, FieldType.REGION: _region, FieldType.FRAME: _frame}

_SOURCES = {
    FieldType.STR: ("text", "string_value"),
    FieldType.BYTES: ("bytes_value",),
    FieldType.INT: ("int_value",),
    FieldType.FLOAT: ("float_value",),
    FieldType.BOOL: ("bool_value",),
    FieldType.NDARRAY: ("ndarray",),
    FieldType.JSON: ("struct_value", "string_value"),
    FieldType.TEXT: ("text",),
    FieldType.IMAGE: ("image",),
    FieldType.AUDIO: ("audio",),
    FieldType.VIDEO: ("video",),
    FieldType.CONCEPT: ("concepts",),
    FieldType.REGION: ("regions",),
    FieldType.FRAME: ("frames",),
}
"""Type → fields of `Data` that hold it."""

_ALSO = {FieldType.INT: ("float_value",), FieldType.FLOAT: ("int_value",), FieldType.TEXT: ("string_value",)}
"""What is read as well when it stands alone: JSON's numbers have one type, and a text is a text."""

_WORDS = {
    FieldType.STR: "a text",
    FieldType.BYTES: "bytes",
    FieldType.INT: "a whole number",
    FieldType.FLOAT: "a number",
    FieldType.BOOL: "true or false",
    FieldType.NDARRAY: "an array",
    FieldType.JSON: "a dict or list",
    FieldType.TEXT: "a text",
    FieldType.IMAGE: "an image",
    FieldType.AUDIO: "audio",
    FieldType.VIDEO: "a video",
    FieldType.CONCEPT: "one concept",
    FieldType.REGION: "one region",
    FieldType.FRAME: "one frame",
    FieldType.LIST: "a list",
    FieldType.TUPLE: "a tuple",
    FieldType.NAMED_FIELDS: "named fields",
}


# ---- from JSON: defaults, and `inference_params` ---------------------------------------------------------------------


def from_json(field: MethodField, value: Any) -> Value:
    """A value from what JSON says of it; numbers may come as texts, as Clarifai's samples write them.

    Raises: InvalidInput: it is not of the field's type, or outside its range.
    """
    made = _from_json(field, value)
    _check(field, made)
    return made


def default_of(field: MethodField) -> Value:
    """The value of an argument that was left out; `field.default` is not None."""
    assert field.default is not None
    return from_json(field, field.default if field.type is FieldType.STR else json.loads(field.default))


def _from_json(field: MethodField, value: Any) -> Value:
    kind = field.type
    if kind in (FieldType.STR, FieldType.TEXT) and isinstance(value, str):
        return value if kind is FieldType.STR else Media(value.encode("utf-8", "surrogatepass"))
    if kind is FieldType.BOOL and isinstance(value, bool):
        return value
    if kind in (FieldType.INT, FieldType.FLOAT) and not isinstance(value, bool):
        number = _number(value)
        if kind is FieldType.FLOAT and math.isfinite(number):
            return float(number)
        if math.isfinite(number) and number == int(number) and abs(number) < _INT64:
            return int(number)
    if kind is FieldType.LIST and isinstance(value, list):
        return [from_json(field.items[0], item) for item in value]
    if kind is FieldType.JSON and isinstance(value, dict | list):
        return value
    raise InvalidInput(f"{field.name or 'The value'} must be {_WORDS[kind]}; it came as {str(value)[:80]!r}.")


def _number(value: Any) -> int | float:
    """A number, also one that came as a text; NaN when it is none."""
    if isinstance(value, int) and abs(value) < _INT64:
        return value  # all its digits
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(field: MethodField, value: Value) -> resources_pb2.Data:
    """The value as clients of the method protocol read it."""
    data = resources_pb2.Data()
    fill(data, field, value)
    return data


def fill(data: resources_pb2.Data, field: MethodField, value: Value) -> None:
    """The same into a message that is there."""
    kind = field.type
    if kind in _ATOMS:
        setattr(data, _ATOMS[kind], value)
    elif kind in _MEDIA:
        message = getattr(data, _MEDIA[kind])
        message.base64, message.url = value.content, value.url
        message.SetInParent()
    elif kind is FieldType.TEXT:
        data.text.raw, data.text.url = value.content.decode("utf-8", "replace"), value.url
        data.text.SetInParent()
    elif kind in _REPEATED:
        _fill_element(getattr(data, _REPEATED[kind]).add(), value)
    elif kind is FieldType.NDARRAY:
        arrays.fill(data.ndarray, value)
    elif kind is FieldType.JSON:
        _fill_struct(data.struct_value, value)
    elif kind is FieldType.LIST:
        _fill_list(data, field.items[0], value)
    elif kind is FieldType.TUPLE:
        for index, (item, inner) in enumerate(zip(field.items, value, strict=True)):
            fill(data.parts.add(id=str(index)).data, item, inner)
    else:
        for item in field.items:
            fill(data.parts.add(id=item.name).data, item, value[item.name])


_ATOMS = {
    FieldType.STR: "string_value",
    FieldType.BYTES: "bytes_value",
    FieldType.INT: "int_value",
    FieldType.FLOAT: "float_value",
    FieldType.BOOL: "bool_value",
}


def _fill_list(data: resources_pb2.Data, inner: MethodField, value: list[Value]) -> None:
    if inner.type in _REPEATED:
        target = getattr(data, _REPEATED[inner.type])
        for element in value:
            _fill_element(target.add(), element)
    else:
        for element in value:
            part = data.parts.add()
            part.data.SetInParent()
            fill(part.data, inner, element)


def _fill_struct(target: struct_pb2.Struct, value: Mapping[str, Any] | list[Any]) -> None:
    target.SetInParent()
    target.update({_LIST_KEY: value} if isinstance(value, list) else value)


def _fill_element(message: Any, value: Value) -> None:
    if isinstance(value, ScoredConcept):
        message.id, message.name, message.value = value.id, value.name, value.value
    elif isinstance(value, Region):
        _fill_region(message, value)
    else:
        _fill_frame(message, value)


def _fill_region(message: resources_pb2.Region, region: Region) -> None:
    message.id, message.value, message.track_id = region.id, region.value, region.track_id
    if region.box is not None:
        box = message.region_info.bounding_box
        box.left_col, box.top_row, box.right_col, box.bottom_row = region.box
        box.SetInParent()
    if region.mask is not None:
        message.region_info.mask.image.base64, message.region_info.mask.image.url = region.mask.content, region.mask.url
        message.region_info.mask.image.SetInParent()
    if region.point is not None:
        point = message.region_info.point
        point.col, point.row, point.z = region.point
        point.SetInParent()
    if region.text:
        message.data.text.raw = region.text
    for concept in region.concepts:
        _fill_element(message.data.concepts.add(), concept)


def _fill_frame(message: resources_pb2.Frame, frame: Frame) -> None:
    info = message.frame_info
    info.index = info.number = frame.number
    info.time = frame.time_ms
    if frame.image.content or frame.image.url:
        message.data.image.base64, message.data.image.url = frame.image.content, frame.image.url
    for concept in frame.concepts:
        _fill_element(message.data.concepts.add(), concept)
    for region in frame.regions:
        _fill_region(message.data.regions.add(), region)


# ---- how much they are -----------------------------------------------------------------------------------------------


def weight(value: Value) -> int:
    """Bytes that a value takes, the objects around its content counted generously."""
    if isinstance(value, np.ndarray):
        return _OBJECT + value.nbytes
    if isinstance(value, Mapping):
        return _OBJECT + sum(_OBJECT + len(str(name)) + weight(inner) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return _OBJECT + sum(map(weight, value))
    if dataclasses.is_dataclass(value):
        return _OBJECT + sum(weight(getattr(value, each.name)) for each in dataclasses.fields(value))
    return sys.getsizeof(value) + 8


def is_small(value: Value) -> bool:
    """Whether a value has so few parts that it is written within a millisecond or two; found out as quickly."""
    left, waiting = _FEW, [value]
    while waiting and left > 0:
        part = waiting.pop()
        left -= 1
        if isinstance(part, Mapping):
            part = list(part.values())
        if isinstance(part, list | tuple):
            waiting += part[: max(0, left)]
            left -= len(part)
    return left > 0


def links(field: MethodField, value: Value) -> list[tuple[FieldType, Media]]:
    """Every picture, text, sound or film in a value that is given by URL alone, with its kind."""
    kind = field.type
    if kind is FieldType.TEXT or kind in _MEDIA:
        return [(kind, value)] if value.url and not value.content else []
    if kind is FieldType.FRAME:
        return [(FieldType.IMAGE, value.image)] if value.image.url and not value.image.content else []
    if kind is FieldType.LIST:
        return [link for item in value for link in links(field.items[0], item)]
    if kind is FieldType.TUPLE:
        return [link for item, inner in zip(field.items, value, strict=True) for link in links(item, inner)]
    if kind is FieldType.NAMED_FIELDS:
        return [link for item in field.items for link in links(item, value[item.name])]
    return []
