"""JSON from strangers: strict, bounded in depth, and paid for before it is read."""

import asyncio
import binascii
import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from appliance.core.errors import InvalidRequest
from appliance.core.memory import Reservation

_LARGE = 256 * 1024
"""Bytes from which JSON is looked at and read on a thread."""

_OBJECT_COST, _LIST_COST, _VALUE_COST = 300, 120, 80
"""Bytes that a JSON object, a list, and a value in one of them cost us in memory, about."""

_SPACE = b" \t\r\n"
_STANDARD = bytes.maketrans(b"-_", b"+/")

_DIGITS = 400
"""Digits that a whole number may have: a double has no more, and reading them takes their square."""

T = TypeVar("T")


# ---- reading ---------------------------------------------------------------------------------------------------------


def cost(body: bytes) -> int:
    """Bytes of memory that a text takes while it is parsed: decoded, as Python's objects, and their bytes."""
    wide = 4 if b"\\u" in body or not body.isascii() else 1
    opens, lists, commas = body.count(b"{"), body.count(b"["), body.count(b",")
    return 2 * wide * len(body) + _OBJECT_COST * opens + _LIST_COST * lists + _VALUE_COST * (commas + opens + lists)


async def pay(body: bytes, memory: Reservation) -> None:
    """Have `memory` hold what a text will cost. Raises: Overloaded."""
    memory.grow(cost(body) if len(body) < _LARGE else await asyncio.to_thread(cost, body))


def parse(body: bytes) -> Any:
    """A JSON text as Python's objects, which take `cost` bytes. Raises: InvalidRequest."""
    try:
        decoded = str(body, "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8: byte {error.start} cannot be read.") from None
    try:
        # The parser of numbers never lets the interpreter's lock go, so that on a thread it would stop the loop, too:
        # 0.7 s for 20 MB of them. With functions of ours it takes twice as long, and others have their turns.
        numbers: dict[str, Any] = {"parse_float": _float} if len(body) >= _LARGE else {}
        return json.loads(decoded, object_pairs_hook=_object, parse_int=_whole, parse_constant=_no_constant, **numbers)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"The body is not JSON: {error.msg} ({where}).") from None
    except RecursionError:
        raise InvalidRequest("The JSON of the body is nested too deeply.") from None


async def load(body: bytes, memory: Reservation) -> dict[str, Any]:
    """A JSON object, paid for. Raises: InvalidRequest: it is none. Overloaded."""
    await pay(body, memory)
    content = parse(body) if len(body) < _LARGE else await asyncio.to_thread(parse, body)
    if not isinstance(content, dict):
        raise InvalidRequest(f"The body must be a JSON object; it is {kind_of(content)}.")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1) if len(names) < 1000 else "…"
        raise InvalidRequest(f"The body names {shown(twice)} twice in one object.")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise InvalidRequest(f"The body has a whole number of more than {_DIGITS} digits.")
    return int(digits)


def _float(digits: str) -> float:
    return float(digits)


def _no_constant(word: str) -> NoReturn:
    raise InvalidRequest(f"The body has the number {word}, which is not JSON.")


# ---- what was read ---------------------------------------------------------------------------------------------------


def typed(content: Mapping[str, Any], name: str, kind: type[T], default: T, words: str) -> T:
    """A member of that type, exactly; the default when it is not there. Raises: InvalidRequest."""
    value = content.get(name, default)
    if type(value) is not kind:
        raise InvalidRequest(f"{name!r} is not {words}.")
    return value


def objects(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A member that is a list of objects; empty when it is not there. Raises: InvalidRequest."""
    value = content.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidRequest(f"{name!r} is not a list of JSON objects.")
    return value


def from_base64(text: str) -> bytes:
    """Bytes as JSON carries them: of either alphabet, padded or not. Raises: ValueError: it is not base64."""
    raw = text.encode("ascii")
    if b"-" in raw or b"_" in raw:
        raw = raw.translate(_STANDARD)
    try:
        return binascii.a2b_base64(_padded(raw), strict_mode=True)
    except binascii.Error:
        # Tools break long lines.
        return binascii.a2b_base64(_padded(raw.translate(None, _SPACE)), strict_mode=True)


def _padded(raw: bytes) -> bytes:
    return raw + b"=" * (-len(raw) % 4)


def kind_of(value: object) -> str:
    """What a JSON value is, and never what is in it: it may be a key, or a picture."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


def shown(name: str) -> str:
    """A name that the caller chose, short."""
    return repr(name if len(name) <= 40 else name[:40] + "…")


# ---- writing ---------------------------------------------------------------------------------------------------------


def dumped(content: object) -> bytes:
    """UTF-8 without spaces. Raises: ValueError: a number is not finite."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
