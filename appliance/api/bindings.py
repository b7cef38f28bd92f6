"""Which RPC a method and a path of HTTP mean, by the `google.api.http` annotations of Clarifai's own descriptors.

Nothing is typed by hand: an RPC that is served has all the paths that its annotation gives it. Where two paths fit,
the one with the earlier literal wins (`/v2/models/types` is no model of that name).

Source: google/api/http.proto, "Path template syntax"; variables of one segment are what Clarifai's annotations have.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from clarifai_grpc.grpc.api import service_pb2
from google.api import annotations_pb2

SERVICE = service_pb2.DESCRIPTOR.services_by_name["V2"]

_VARIABLE = re.compile(r"\{([a-z_0-9.]+)(?:=\*)?\}")
_LITERAL = re.compile(r"[A-Za-z0-9_.~-]+")


@dataclass(frozen=True, slots=True)
class Binding:
    """One way to an RPC.

    Attributes:
        rpc: its descriptor.
        verb: of HTTP, in upper case.
        segments: of the path; a tuple is the field that the segment is the value of, as a path of names.
        body: "" for none, "*" for the whole request, else the name of the field that the body is.
    """

    rpc: Any
    verb: str
    segments: tuple[str | tuple[str, ...], ...]
    body: str

    @property
    def method(self) -> str:
        """The RPC's full gRPC name."""
        return method_of(self.rpc)

    @property
    def variables(self) -> tuple[tuple[str, ...], ...]:
        """The fields in the path, in their order."""
        return tuple(segment for segment in self.segments if not isinstance(segment, str))

    @property
    def template(self) -> str:
        """The path with its variables in braces."""
        shown = (segment if isinstance(segment, str) else "{" + ".".join(segment) + "}" for segment in self.segments)
        return "/" + "/".join(shown)


def method_of(rpc: Any) -> str:
    """The full gRPC name of an RPC."""
    return f"/{SERVICE.full_name}/{rpc.name}"


def bindings_of(rpc: Any) -> list[Binding]:
    """All bindings of an RPC, the primary one first.

    Raises: ValueError: its annotation has something that no annotation of Clarifai's has had.
    """
    rule = rpc.GetOptions().Extensions[annotations_pb2.http]
    return [_binding(rpc, one) for one in (rule, *rule.additional_bindings) if one.WhichOneof("pattern")]


def _binding(rpc: Any, rule: Any) -> Binding:
    kind = rule.WhichOneof("pattern")
    if kind == "custom" or rule.response_body:
        raise ValueError(f"{rpc.name} has an HTTP annotation that is not served: {kind} {rule.response_body}")
    path = getattr(rule, kind)
    if not path.startswith("/"):
        raise ValueError(f"{rpc.name} has the HTTP path {path!r}, which does not begin with /")
    return Binding(rpc, kind.upper(), tuple(_segment(rpc, part) for part in path[1:].split("/")), rule.body)


def _segment(rpc: Any, part: str) -> str | tuple[str, ...]:
    variable = _VARIABLE.fullmatch(part)
    if variable is None:
        if not _LITERAL.fullmatch(part):
            raise ValueError(f"{rpc.name} has the HTTP path segment {part!r}, which is not served")
        return part
    names = tuple(variable[1].split("."))
    message = rpc.input_type
    for name in names[:-1]:
        message = message.fields_by_name[name].message_type
    if names[-1] not in message.fields_by_name:
        raise ValueError(f"{rpc.name} has the HTTP path segment {part!r}, and no such field")
    return names


@dataclass(slots=True)
class _Node:
    """Paths with the same beginning.

    Attributes:
        here: bindings that end here, by verb.
        literals: what follows, by the next segment.
        variable: what follows when the next segment is a value.
    """

    here: dict[str, Binding] = field(default_factory=dict)
    literals: "dict[bytes, _Node]" = field(default_factory=dict)
    variable: "_Node | None" = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a path means.

    Attributes:
        binding: None when the path is served, and not with this verb.
        values: of the binding's variables, percent-decoded.
        verbs: with which the path is served.
    """

    binding: Binding | None
    values: tuple[bytes, ...]
    verbs: tuple[str, ...]


class Paths:
    """All bindings, to be found by verb and path."""

    def __init__(self, bindings: Iterable[Binding]) -> None:
        self._root = _Node()
        for binding in bindings:
            node = self._root
            for segment in binding.segments:
                if isinstance(segment, str):
                    node = node.literals.setdefault(segment.encode(), _Node())
                else:
                    node.variable = node = node.variable or _Node()
            # One path twice: the first RPC that has it, as in a list of routes.
            node.here.setdefault(binding.verb, binding)

    def find(self, verb: str, raw_path: bytes) -> Found | None:
        """What a path means, as it came over the wire: percent-encoded, so that a value may contain a slash.

        None: nobody serves it.
        """
        segments = tuple(unquote_to_bytes(part) for part in raw_path.split(b"/")[1:])
        verbs: dict[str, None] = {}
        for here, values in _matches(self._root, segments):
            wanted = "GET" if verb == "HEAD" and "HEAD" not in here else verb
            if wanted in here:
                return Found(here[wanted], values, ())
            verbs |= dict.fromkeys(here)
        if not verbs:
            return None
        return Found(None, (), tuple(verbs) + (("HEAD",) if "GET" in verbs else ()))


def _matches(
    node: _Node, segments: tuple[bytes, ...], values: tuple[bytes, ...] = ()
) -> Iterator[tuple[Mapping[str, Binding], tuple[bytes, ...]]]:
    """Where a path may end, literals first."""
    if not segments:
        if node.here:
            yield node.here, values
        return
    first, rest = segments[0], segments[1:]
    if first in node.literals:
        yield from _matches(node.literals[first], rest, values)
    if node.variable is not None and first:
        yield from _matches(node.variable, rest, (*values, first))
