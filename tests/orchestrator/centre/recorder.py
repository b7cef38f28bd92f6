"""Every call that came, message by message, in the order of events, without secrets; tests read it from its file."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from clarifai_grpc.grpc.api import service_pb2  # noqa: F401  its messages are in the pool once it is imported
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.json_format import MessageToDict

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    sequence INTEGER PRIMARY KEY, at REAL, call INTEGER, rpc TEXT, what TEXT, type TEXT, body BLOB
);
"""
_SECRET_HEADERS = ("authorization", "x-clarifai-session-token", "cookie")
REDACTED = "<secret>"


@dataclass(frozen=True)
class Event:
    """One event of one call.

    Attributes:
        at: seconds since the epoch, by the centre's clock.
        call: numbers the calls of one life of the centre.
        what: "open" (content: the metadata), "request", "reply" (content: a message as JSON) or "end" (the outcome).
    """

    sequence: int
    at: float
    call: int
    rpc: str
    what: str
    content: dict[str, Any]


class Recorder:
    """Writes what comes and goes."""

    def __init__(self, file: Path) -> None:
        self._database = sqlite3.connect(file, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.executescript(_SCHEMA)
        last = self._database.execute("SELECT COALESCE(MAX(call), 0) FROM events").fetchone()[0]
        self._numbers = count(last + 1)

    def close(self) -> None:
        self._database.close()

    def open(self, rpc: str, metadata: Iterable[tuple[str, str | bytes]]) -> int:
        """A call came. Returns its number."""
        call = next(self._numbers)
        headers = {
            name: REDACTED if name.lower() in _SECRET_HEADERS else value if isinstance(value, str) else value.hex()
            for name, value in metadata
        }
        self._write(call, rpc, "open", "", json.dumps(headers).encode())
        return call

    def message(self, call: int, rpc: str, what: str, message: Any, secret: str) -> None:
        """A message came or goes; `secret` is the caller's token, which is not written wherever it is."""
        body = message.SerializeToString()
        if secret and secret.encode() in body:
            copy = type(message)()
            copy.CopyFrom(message)
            _hide(copy, secret)
            body = copy.SerializeToString()
        self._write(call, rpc, what, message.DESCRIPTOR.full_name, body)

    def end(self, call: int, rpc: str, outcome: str) -> None:
        """The call is over: "OK", a gRPC code, or "CANCELLED"."""
        self._write(call, rpc, "end", "", json.dumps({"outcome": outcome}).encode())

    def _write(self, call: int, rpc: str, what: str, type_name: str, body: bytes) -> None:
        self._database.execute(
            "INSERT INTO events (at, call, rpc, what, type, body) VALUES (?, ?, ?, ?, ?, ?)",
            (time.time(), call, rpc, what, type_name, body),
        )


def recorded(file: Path, since: int = 0) -> Iterator[Event]:
    """The events after number `since`, in order."""
    database = sqlite3.connect(file)
    try:
        rows = database.execute(
            "SELECT sequence, at, call, rpc, what, type, body FROM events WHERE sequence > ? ORDER BY sequence",
            (since,),
        ).fetchall()
    finally:
        database.close()
    for sequence, at, call, rpc, what, type_name, body in rows:
        if type_name:
            kind = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(type_name))
            content = MessageToDict(kind.FromString(body), preserving_proto_field_name=True)
        else:
            content = json.loads(body)
        yield Event(sequence, at, call, rpc, what, content)


def _hide(message: Any, secret: str) -> None:
    """Replace the secret in every text of a message."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for inner in value.values():
                if hasattr(inner, "ListFields"):
                    _hide(inner, secret)
        elif field.message_type is not None:
            for inner in values:
                _hide(inner, secret)
        elif field.type == field.TYPE_STRING and any(secret in text for text in values):
            if field.is_repeated:
                replaced = [text.replace(secret, REDACTED) for text in value]
                del value[:]
                value.extend(replaced)
            else:
                setattr(message, field.name, value.replace(secret, REDACTED))
