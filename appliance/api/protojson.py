"""Messages as JSON and JSON as messages: what REST callers send and read.

Written: snake_case names, enums as numbers, bytes as base64, 64-bit integers as text, times as RFC 3339, floats as the
shortest text that is the same float32. Fields that are not set are left out, but for numbers that measure something
(floats: `concept.value` is there when it is 0) and `status.code`.

Read: snake_case and camelCase, what protobuf's JSON form allows. A field that we do not know is passed over, as clients
newer than our messages send such; but where nothing is known of what an input carries, or of a whole request, it is
refused with the likely name, as it would be lost in silence (Clarifai's own Node sample writes `img` for `image`).

Source: protobuf.dev/programming-guides/json. Its own Python code quotes whole values in its errors, which may be keys
or pictures, and cannot be told what to leave out; a test compares the two.
"""

import base64
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NoReturn

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2
from clarifai_grpc.grpc.api.status import status_pb2
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from appliance.api.jsonbody import dumped, from_base64, kind_of, shown
from appliance.core.errors import InputTooLarge, InvalidInput, InvalidRequest, RequestError
from appliance.wire import sentences

_MAX_DEPTH = 100
"""Messages within messages; protobuf's own limit."""

_FLOAT32_MAX = float(np.finfo(np.float32).max) * (1 + 2.0**-26)
"""A little more than the largest float32: its shortest text, 3.4028235e+38, is, and is read as that number."""

_NAME = 40
"""Characters of a name that are looked at, or shown."""

_WELL_KNOWN = "google.protobuf."
"""Messages whose JSON form is their own (Timestamp, Struct, …): protobuf's code reads and writes them."""

_INTEGER = re.compile(r"-?[0-9]{1,20}")
_WORDS_FOR_FLOATS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_F = FieldDescriptor
_INTEGERS = {
    _F.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    _F.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    _F.CPPTYPE_UINT32: (0, 2**32 - 1),
    _F.CPPTYPE_UINT64: (0, 2**64 - 1),
}


# ---- writing ---------------------------------------------------------------------------------------------------------


def text(message: Message) -> bytes:
    """The message as JSON text."""
    return dumped(plain(message))


def plain(message: Message) -> Any:
    """The message as what `json.dumps` takes."""
    writer = _writer(message.DESCRIPTOR)
    if writer is None:
        return json_format.MessageToDict(message)
    fields, always = writer
    content = {}
    for field, value in message.ListFields():
        name, convert = fields[field.number]
        content[name] = value if convert is None else convert(value)
    for name in always:
        if name not in content:
            content[name] = 0 if name == "code" else 0.0
    return content


@cache
def _writer(descriptor: Descriptor) -> tuple[dict[int, tuple[str, Callable[[Any], Any] | None]], list[str]] | None:
    """How a message's fields are written, by number, and the names that are always there; None: protobuf's own way."""
    if descriptor.full_name.startswith(_WELL_KNOWN):
        return None
    fields = {field.number: (field.name, _field_writer(field)) for field in descriptor.fields}
    measures = [
        field.name
        for field in descriptor.fields
        if field.cpp_type in (_F.CPPTYPE_FLOAT, _F.CPPTYPE_DOUBLE) and not field.is_repeated and not field.has_presence
    ]
    return fields, ["code"] if descriptor is status_pb2.Status.DESCRIPTOR else measures


def _field_writer(field: FieldDescriptor) -> Callable[[Any], Any] | None:
    if _is_map(field):
        return partial(_written_map, _value_writer(_entry(field)["value"]))
    if field.is_repeated and field.cpp_type == _F.CPPTYPE_FLOAT:
        return _shortest_all
    one = _value_writer(field)
    if not field.is_repeated:
        return one
    return list if one is None else partial(_written_list, one)


def _value_writer(field: FieldDescriptor) -> Callable[[Any], Any] | None:
    """None: as it is."""
    if field.cpp_type == _F.CPPTYPE_MESSAGE:
        return plain
    if field.type == _F.TYPE_BYTES:
        return _base64
    if field.cpp_type in (_F.CPPTYPE_INT64, _F.CPPTYPE_UINT64):
        return str
    if field.cpp_type == _F.CPPTYPE_FLOAT:
        return _shortest
    return _finite if field.cpp_type == _F.CPPTYPE_DOUBLE else None


def _written_list(convert: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    return [convert(value) for value in values]


def _written_map(convert: Callable[[Any], Any] | None, values: Mapping[Any, Any]) -> dict[str, Any]:
    return {_key_text(key): values[key] if convert is None else convert(values[key]) for key in values}


def _key_text(key: object) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _shortest(value: float) -> float | str:
    """The float32 as the double that prints shortest and is the same float32."""
    return _finite(float(str(np.float32(value))))


def _shortest_all(values: Iterable[float]) -> list[float | str]:
    array = np.fromiter(values, np.float32)
    if np.isfinite(array).all():
        return [float(shown) for shown in map(str, array)]
    return [_shortest(value) for value in array]


def _finite(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


# ---- reading ---------------------------------------------------------------------------------------------------------


def fill(message: Message, content: object, limit: int) -> None:
    """Set a message's fields from JSON objects; fields that are not named stay as they are.

    Args:    limit: bytes of text, and of bytes decoded from base64.
    Raises:  InvalidRequest: it is not that message. InvalidInput: an input that carries nothing we know.
        InputTooLarge: over the limit.
    """
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body must be a JSON object; it is {kind_of(content)}.")
    _Filling(limit).message(message, content, "", 0)


def field_named(descriptor: Descriptor, name: str) -> FieldDescriptor | None:
    """The field that has this name in JSON, in either case."""
    known = _fields(descriptor).get(name)
    return None if known is None else known.descriptor


@dataclass(frozen=True, slots=True)
class _Field:
    """A field as it is read.

    Attributes: convert: JSON value and path → what protobuf takes; None: a message.
    """

    descriptor: FieldDescriptor
    name: str
    convert: "Callable[[_Filling, Any, str], Any] | None"


@cache
def _fields(descriptor: Descriptor) -> dict[str, _Field]:
    """A message's fields by each name that they may have in JSON."""
    found: dict[str, _Field] = {}
    for field in descriptor.fields:
        known = _Field(field, field.name, _converter(field))
        found[field.name] = found[field.json_name] = known
    return found


class _Filling:
    """One message being read."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0

    def message(self, message: Message, content: Any, path: str, depth: int) -> None:
        """Set a message from a JSON object."""
        descriptor = message.DESCRIPTOR
        if descriptor.full_name.startswith(_WELL_KNOWN):
            self._well_known(message, content, path)
            return
        if not isinstance(content, dict):
            _refuse(path, f"must be an object; it is {kind_of(content)}")
        if depth > _MAX_DEPTH:
            _refuse("", "is nested too deeply")
        fields = _fields(descriptor)
        seen: dict[str, str] = {}
        for name, value in content.items():
            field = fields.get(name)
            if field is None:
                continue
            if field.name in seen:
                _refuse(_join(path, name), "is given twice, under both of its names")
            oneof = field.descriptor.containing_oneof
            if oneof is not None and value is not None:
                self._check_alone(oneof, field, seen, path)
            seen[field.name] = name
            self._field(message, field, value, _join(path, name), depth)
        if content and not seen:
            _check_understood(descriptor, content, path)

    @staticmethod
    def _check_alone(oneof: Any, field: _Field, seen: Mapping[str, str], path: str) -> None:
        for other in oneof.fields:
            if other.name in seen and other.name != field.name:
                _refuse(_join(path, field.name), f"excludes {other.name}, which is given too")

    def _field(self, message: Message, field: _Field, value: Any, path: str, depth: int) -> None:
        descriptor, name, convert = field.descriptor, field.name, field.convert
        if value is None and not _takes_null(descriptor):
            message.ClearField(name)
        elif _is_map(descriptor):
            self._map(message, descriptor, value, path, depth)
        elif descriptor.is_repeated:
            if not isinstance(value, list):
                _refuse(path, f"must be a list; it is {kind_of(value)}")
            self._list(getattr(message, name), convert, value, path, depth)
        elif convert is None:
            inner = getattr(message, name)
            inner.SetInParent()
            self.message(inner, value, path, depth + 1)
        else:
            known = convert(self, value, path)
            if known is not None:
                setattr(message, name, known)

    def _list(self, found: Any, convert: Any, values: list[Any], path: str, depth: int) -> None:
        del found[:]
        if convert is None:
            for index, value in enumerate(values):
                self.message(found.add(), value, f"{path}[{index}]", depth + 1)
            return
        known = (convert(self, value, f"{path}[{index}]") for index, value in enumerate(values))
        found.extend(value for value in known if value is not None)

    def _map(self, message: Message, descriptor: FieldDescriptor, values: Any, path: str, depth: int) -> None:
        if not isinstance(values, dict):
            _refuse(path, f"must be an object; it is {kind_of(values)}")
        message.ClearField(descriptor.name)
        found = getattr(message, descriptor.name)
        key_field, convert_value = _entry(descriptor)["key"], _converter(_entry(descriptor)["value"])
        for text_key, value in values.items():
            place = f"{path}[{shown(text_key)}]"
            key = _key(self, key_field, text_key, place)
            if convert_value is None:
                self.message(found[key], value, place, depth + 1)
            else:
                known = convert_value(self, value, place)
                if known is not None:
                    found[key] = known

    def _well_known(self, message: Message, content: Any, path: str) -> None:
        try:
            json_format.ParseDict(content, message)
        except Exception:
            # Many kinds, and texts that quote what the caller sent, whole.
            short = message.DESCRIPTOR.name
            raise InvalidRequest(f"{path or 'The body'} is not a {short} in protobuf's JSON form.") from None

    def count(self, size: int) -> None:
        """So many bytes more are in the message. Raises: InputTooLarge."""
        self._size += size
        if self._size > self._limit:
            raise InputTooLarge(sentences.request_too_large(self._limit))


def _check_understood(descriptor: Any, content: Mapping[str, Any], path: str) -> None:
    """Raises: RequestError: of the request, or of what an input carries, nothing is known."""
    error: type[RequestError] = InvalidInput
    if descriptor is not resources_pb2.Data.DESCRIPTOR:
        if path:
            return
        error = InvalidRequest
    name = next(iter(content))
    # What is compared is short: finding what is close to a name takes its length times theirs, and more memory.
    likely = difflib.get_close_matches(name[:_NAME], [field.name for field in descriptor.fields], 1, 0.5)
    hint = f"; did you mean {likely[0]!r}?" if likely else "."
    raise error(f"{path or 'The request'} has nothing that is known here: there is no field {shown(name)} in it{hint}")


# ---- values ----------------------------------------------------------------------------------------------------------


def _converter(field: FieldDescriptor) -> "Callable[[_Filling, Any, str], Any] | None":
    kind = field.cpp_type
    if kind == _F.CPPTYPE_MESSAGE:
        return None
    if field.type == _F.TYPE_BYTES:
        return _read_bytes
    if kind == _F.CPPTYPE_STRING:
        return _read_string
    if kind == _F.CPPTYPE_BOOL:
        return _read_bool
    if kind == _F.CPPTYPE_ENUM:
        return partial(_read_enum, field.enum_type)
    if kind in _INTEGERS:
        return partial(_read_integer, *_INTEGERS[kind])
    return partial(_read_float, _FLOAT32_MAX if kind == _F.CPPTYPE_FLOAT else math.inf)


def _read_string(filling: _Filling, value: Any, path: str) -> str:
    if not isinstance(value, str):
        _refuse(path, f"must be text; it is {kind_of(value)}")
    filling.count(len(value))
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(path, "has half of a surrogate pair")
    return str(value)


def _read_bytes(filling: _Filling, value: Any, path: str) -> bytes:
    if not isinstance(value, str):
        _refuse(path, f"must be base64 text; it is {kind_of(value)}")
    filling.count(len(value) // 4 * 3)
    if value.startswith("data:"):
        _refuse(path, "is a data: URL; send only the base64 that follows its comma")
    try:
        return from_base64(value)
    except ValueError:
        _refuse(path, "is not base64")


def _read_bool(filling: _Filling, value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        _refuse(path, f"must be true or false; it is {kind_of(value)}")
    return bool(value)


def _read_integer(least: int, most: int, filling: _Filling, value: Any, path: str) -> int:
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif (isinstance(value, float) and value.is_integer()) or (isinstance(value, str) and _INTEGER.fullmatch(value)):
        number = int(value)
    if number is None:
        _refuse(path, f"must be a whole number; it is {kind_of(value)}")
    if not least <= number <= most:
        _refuse(path, f"must be from {least} to {most}")
    return number


def _read_float(most: float, filling: _Filling, value: Any, path: str) -> float:
    number = math.nan
    if isinstance(value, str):
        if value in _WORDS_FOR_FLOATS:
            return _WORDS_FOR_FLOATS[value]
        try:
            number = float(value) if len(value) < 100 and "_" not in value else math.nan
        except ValueError:
            number = math.nan
        if math.isnan(number):
            _refuse(path, "must be a number; it is text")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = _as_float(value)
    else:
        _refuse(path, f"must be a number; it is {kind_of(value)}")
    if math.isinf(number) or abs(number) > most:
        _refuse(path, "is too large a number for its field")
    return number


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _read_enum(enum: Any, filling: _Filling, value: Any, path: str) -> int | None:
    """The number; None for a name that we do not know."""
    if isinstance(value, str) and not _INTEGER.fullmatch(value):
        known = enum.values_by_name.get(value)
        return None if known is None else known.number
    return _read_integer(*_INTEGERS[_F.CPPTYPE_INT32], filling, value, path)


def _key(filling: _Filling, field: FieldDescriptor, text_key: str, path: str) -> Any:
    if field.cpp_type == _F.CPPTYPE_BOOL:
        if text_key not in ("true", "false"):
            _refuse(path, "must be true or false")
        return text_key == "true"
    convert = _converter(field)
    assert convert is not None
    return convert(filling, text_key, path)


def _is_map(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and kind.GetOptions().map_entry


def _entry(field: FieldDescriptor) -> Mapping[str, FieldDescriptor]:
    """Key and value of a map's entries."""
    assert field.message_type is not None
    return field.message_type.fields_by_name


def _takes_null(field: FieldDescriptor) -> bool:
    """Whether JSON's null is a value of that field, and does not mean that it is not set."""
    return field.message_type is not None and field.message_type.full_name == "google.protobuf.Value"


# ---- words -----------------------------------------------------------------------------------------------------------


def _refuse(path: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{path or 'The body'} {problem}.")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
