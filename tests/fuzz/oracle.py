"""What must be true of every answer, and of the daemon after each: no internal error, nothing told that is ours."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from clarifai_grpc.grpc.api.status import status_pb2
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from google.protobuf.message import Message
from google.rpc import status_pb2 as rpc_status_pb2
from support.appliance import ROOT

from appliance.api import status

CODES = {
    row.code
    for row in (
        *status.TABLE.values(),
        *status._PLACEMENTS.values(),
        *status._MISMATCHES.values(),
        status.SUCCESS,
        status.MIXED,
        status.FAILURE,
        status.METHOD_NOT_ALLOWED,
        status.NOT_IMPLEMENTED,
        status.READY_VERSION,
    )
}
"""Every code that the error table knows."""

MODEL_FAILED = {StatusCode.MODEL_PREDICTION_FAILED, StatusCode.WORKFLOW_INTERNAL_FAILURE}
"""Failures of a model, for which HTTP says 500."""

NOT_LOADED = {StatusCode.MODEL_DEPLOYMENT_FAILED, StatusCode.MODEL_DEPLOYING}
"""Of the bundle that cannot be loaded."""

RPC = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "UNIMPLEMENTED",
}
"""How a call may end that is not cancelled by its caller."""

HTTP = {200, 204, 207, 400, 401, 403, 404, 405, 406, 408, 409, 411, 413, 414, 415, 417, 424, 429, 431, 501, 503, 505}
"""HTTP statuses that need no further reason; 500 does."""

LONGEST_SENTENCE = 2000
"""Characters of an error that one can still read; an answer must not give back what was sent, whole."""

_LEAK = re.compile(
    rb"Traceback \(most|File \"/|site-packages|<class '|<function |<built-in| object at 0x|NoneType|"
    rb"ONNXRuntimeError|\.py\b|/usr/lib|" + re.escape(str(ROOT).encode())
)
"""What only Python, or whoever looks into our file system, says."""


class Finding(AssertionError):
    """Something that must not be. `request` is what did it, as text to read and as bytes to send again."""

    def __init__(self, what: str, request: str = "", body: bytes = b"") -> None:
        super().__init__(f"{what}\n{request}" if request else what)
        self.what = what
        self.request = request
        self.body = body


class Oracle:
    """Judges answers. Args: secrets: what no answer may hold: the key, folders of the daemon."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        self._secrets = [secret.encode() for secret in secrets]

    def text(self, body: bytes) -> None:
        """Raises: Finding: it tells what is ours alone."""
        leak = _LEAK.search(body)
        if leak:
            raise Finding(f"the answer has {leak[0]!r}: …{body[max(0, leak.start() - 200) : leak.end() + 200]!r}…")
        for secret in self._secrets:
            if secret in body:
                raise Finding(f"the answer has {secret.decode()!r}")

    def message(self, reply: Message, *, lists_codes: bool = False) -> int:
        """A reply of Clarifai's service; its status code. Raises: Finding."""
        self.text(reply.SerializeToString())
        if lists_codes:
            self.status(reply.status)  # type: ignore[attr-defined]
        else:
            for found in statuses(reply):
                self.status(found)
        code: int = reply.status.code  # type: ignore[attr-defined]
        if not code:
            raise Finding("the reply has no status")
        return code

    def status(self, found: status_pb2.Status) -> None:
        """Raises: Finding: no status of the table, or one that says nothing."""
        if found.code not in CODES:
            raise Finding(f"a status that no table has: {found}")
        # What a listing says of a version that is not served has its reason on the admin's pages.
        quiet = {row.code for row in (status.SUCCESS, status.MIXED, status.FAILURE, status.READY_VERSION)} | NOT_LOADED
        if found.code not in quiet and not found.details:
            raise Finding(f"an error without a sentence: {found}")
        if len(found.details) > LONGEST_SENTENCE:
            raise Finding(f"a sentence of {len(found.details)} characters: {found.details[:300]}…")

    def ended(self, name: str, details: str, trailers: Mapping[str, bytes | str]) -> None:
        """A call that ended with a gRPC status. Raises: Finding."""
        self.text(details.encode("utf-8", "replace"))
        if name not in RPC and not (name == "INTERNAL" and self._codes_in(trailers) & (MODEL_FAILED | NOT_LOADED)):
            raise Finding(f"the call ended {name}: {details[:500]}")
        if not details:
            raise Finding(f"the call ended {name} without a sentence")
        if len(details) > LONGEST_SENTENCE:
            raise Finding(f"a sentence of {len(details)} characters: {details[:300]}…")

    @staticmethod
    def _codes_in(trailers: Mapping[str, bytes | str]) -> set[int]:
        packed = trailers.get("grpc-status-details-bin", b"")
        found = status_pb2.Status()
        each = rpc_status_pb2.Status.FromString(packed if isinstance(packed, bytes) else packed.encode()).details
        return {found.code for one in each if one.Unpack(found)}

    def http(self, code: int, body: bytes, kind: str, path: str) -> None:
        """An HTTP answer. Raises: Finding."""
        self.text(body)
        contents = [json_of(line) for line in body.splitlines()] if "ndjson" in kind else []
        if "json" in kind and not contents and body:
            contents = [json_of(body)]
        told: set[int] = set()
        if not path.startswith(("/v2/status_codes", "/v2/openapi.json")):
            told = {code for content in contents for code in codes(content)}
        if wrong := told - CODES:
            raise Finding(f"a status that no table has: {wrong} in {body[:500]!r}")
        if code >= 400 and "json" not in kind and "grpc" not in kind and body:
            raise Finding(f"HTTP {code} is told in {kind!r}: {body[:300]!r}")
        if code in HTTP:
            return
        door = "/kserve/" in path or "/openai/" in path
        own = door and (b"not finite" in body or b"could not be loaded" in body)  # their errors have no codes
        if code != 500 or not (own or told & (MODEL_FAILED | NOT_LOADED)):
            raise Finding(f"HTTP {code}: {body[:500]!r}")


def statuses(message: Message) -> Iterator[status_pb2.Status]:
    """Every status in a message, itself included."""
    if isinstance(message, status_pb2.Status):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for one in value if field.is_repeated else [value]:
            yield from statuses(one)


def codes(content: Any) -> Iterator[int]:
    """Every `status.code` in JSON."""
    if isinstance(content, list):
        for one in content:
            yield from codes(one)
    elif isinstance(content, dict):
        for name, value in content.items():
            if name == "status" and isinstance(value, dict) and isinstance(value.get("code"), int):
                yield value["code"]
            yield from codes(value)


def json_of(body: bytes) -> Any:
    """JSON as strict readers read it. Raises: Finding."""

    def refuse(word: str) -> Any:
        raise Finding(f"the answer is no JSON: it has {word}")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise Finding(f"the answer is no JSON: {error}: {body[:300]!r}") from error


_BAD_LINES = re.compile(
    r"unforeseen error|Traceback|^\S+Z (?:ERROR|CRITICAL) |Warning: |never retrieved|never awaited", re.M
)


def bad_log(text: str, key: str) -> str:
    """What the log must not say; "" when it does not."""
    if key in text:
        return "the log has the key"
    found = _BAD_LINES.search(text)
    return text[max(0, found.start() - 200) : found.end() + 4000] if found else ""
