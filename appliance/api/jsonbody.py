"""JSON from strangers: strict, bounded in depth, and paid for before it is read."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from appliance.core.errors import InvalidRequest
from appliance.core.memory import Reservation

_LARGE = 256 * 1024
"""Bytes from which JSON is read on a thread."""

_DIGITS = 400
"""Digits that a whole number may have: a double has no more, and reading them takes their square."""

T = TypeVar("T")


def weight(text: bytes) -> int:
    """Bytes that Python needs for JSON at most, or nearly: objects weigh far more than their digits."""
    brackets = text.count(b"[") + text.count(b"{")
    return 4 * len(text) + 72 * brackets + 64 * text.count(b",") + 32 * text.count(b'"')


def loaded(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises: InvalidRequest: it is no JSON, nested too deeply, or no object."""
    try:
        content = json.loads(text, parse_int=whole, parse_constant=_no_number)
    except RecursionError:
        raise InvalidRequest("The request's JSON is nested too deeply.") from None
    except ValueError as error:  # also what is not UTF-8
        raise InvalidRequest(f"The request is not JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise InvalidRequest("The request is not a JSON object.")
    return content


def whole(digits: str) -> int:
    """A whole number of JSON; other threads have their turns between two. Raises: InvalidRequest: it is too long."""
    if len(digits) > _DIGITS:
        raise InvalidRequest(f"The request's JSON has a whole number of more than {_DIGITS} digits.")
    return int(digits)


async def load(text: bytes, memory: Reservation) -> dict[str, Any]:
    """The same; `memory` grows by its weight. Raises: Overloaded."""
    memory.grow(weight(text))
    return loaded(text) if len(text) < _LARGE else await asyncio.to_thread(loaded, text)


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


def dumped(content: object) -> bytes:
    """UTF-8 without spaces. Raises: ValueError: a number is not finite."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")
