"""Requests of HTTP: JSON that says what a message says, and what may happen to it; paths, queries, headers, verbs."""

import base64
import json
import struct
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx
from fuzz import media
from fuzz.messages import SERVICE, Requests, harmed_bytes
from fuzz.world import World
from google.protobuf import json_format
from google.protobuf.message import Message
from hypothesis import strategies as st
from support import rest_world

from appliance.api.bindings import bindings_of
from appliance.api.catalogue import RPCS

VERBS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "get")
_LONGEST_TARGET = 40_000
"""Bytes of a path and its query: more than any header may have; hpack takes minutes for a million of them."""

MODELS = ("tensor", "pair", "colours", "topic", "vector", "sentence", "half", "nothing", "nans", "tools")


@dataclass(frozen=True)
class Asked:
    """One HTTP request."""

    verb: str
    target: bytes
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""
    two: bool = field(default=False)

    def __str__(self) -> str:
        shown = "".join(f"\n{name}: {value}" for name, value in self.headers if name.lower() != "authorization")
        return f"HTTP/{2 if self.two else 1.1} {self.verb} {self.target!r}{shown}\n\n{self.body[:20_000]!r}"


@dataclass(frozen=True)
class Pairs:
    """A JSON object, its names in order, some of them twice."""

    items: tuple[tuple[str, Any], ...]


_ODD = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    1e308,
    "",
    "1",
    "NaN",
    "Infinity",
    "-0",
    " 1",
    "1e5",
    "0x10",
    "true",
    "ü",
    "\ud800",
    "\udc00x",
    "\0",
    "!!!not base64",
    "QUJD\nQUJD",
    "QUJDR",
    "data:image/png;base64,QUJD",
    [],
    [[]],
    [None],
    {},
    {"": None},
    {"base64": "AAAA"},
    Pairs((("a", 1), ("a", 2))),
    Pairs((("id", "x"), ("id", "y"))),
)


def _places(content: Any, found: list[tuple[Any, ...]], path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found.append(path)
    if isinstance(content, dict):
        for name, value in content.items():
            _places(value, found, (*path, name))
    elif isinstance(content, list):
        for index, value in enumerate(content):
            _places(value, found, (*path, index))
    return found


def _changed(content: Any, path: tuple[Any, ...], change: Any) -> Any:
    if not path:
        return change(content)
    if isinstance(content, list):
        return [_changed(v, path[1:], change) if i == path[0] else v for i, v in enumerate(content)]
    if isinstance(content, dict):
        return {n: _changed(v, path[1:], change) if n == path[0] else v for n, v in content.items()}
    return content


def _case(name: str, how: int) -> str:
    parts = name.split("_")
    camel = parts[0] + "".join(part.capitalize() for part in parts[1:])
    return (camel, name.upper(), camel.capitalize(), name + " ", "@type")[how % 5]


def _shorter(value: Any, length: int) -> Any:
    return value[:length] if isinstance(value, str) else {"x": value}


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def harmed_json(draw: st.DrawFn, content: Any) -> bytes:
    """A JSON text that says nearly the same."""
    for _ in range(draw(st.integers(0, 3))):
        places = _places(content, [])
        path = places[draw(st.integers(0, 2**16)) % len(places)]
        kind, how = draw(st.integers(0, 6)), draw(st.integers(0, 2**16))
        if kind == 0:
            content = _changed(content, path, lambda value: _ODD[how % len(_ODD)])  # noqa: B023  # called at once
        elif kind == 1:
            content = _changed(
                content, path, lambda value: str(value) if not isinstance(value, dict | list) else [value]
            )
        elif kind == 2:
            content = _changed(
                content,
                path,
                lambda value: Pairs((*value.items(), *list(value.items())[:1])) if isinstance(value, dict) else value,
            )
        elif kind == 3:
            content = _changed(
                content,
                path,
                lambda value: {_case(n, how): v for n, v in value.items()} if isinstance(value, dict) else value,  # noqa: B023
            )
        elif kind == 4:
            content = _changed(content, path, lambda value: _nested(value, (3, 70, 400)[how % 3]))  # noqa: B023
        elif kind == 5:
            content = _changed(content, path, lambda value: _shorter(value, how % 9))  # noqa: B023
        else:
            content = _changed(content, path, lambda value: [value] * (how % 300))  # noqa: B023
        if isinstance(content, Pairs):
            break
    text = dumped(content)
    for harm in draw(st.lists(media.harms("flip", "cut", "lose", "double", "put"), max_size=1)):
        text = harm(text)
    return draw(st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf", b" \n"])) + text


def dumped(content: Any) -> bytes:
    """JSON, also of objects that name something twice, and of half a surrogate pair."""
    if isinstance(content, Pairs):
        inner = b",".join(json.dumps(name).encode() + b":" + dumped(value) for name, value in content.items)
        return b"{" + inner + b"}"
    if isinstance(content, dict):
        return b"{" + b",".join(json.dumps(n).encode() + b":" + dumped(v) for n, v in content.items()) + b"}"
    if isinstance(content, list):
        return b"[" + b",".join(map(dumped, content)) + b"]"
    return json.dumps(content).encode()


class Texts:
    """Strategies for one world's routes."""

    def __init__(self, world: World, requests: Requests, document: Any) -> None:
        """Args: document: the OpenAPI document that the world serves."""
        self._world = world
        self._requests = requests
        self._templates = tuple(document["paths"])
        self._plain = (("authorization", f"Key {world.key}"), ("content-type", "application/json"))
        self.segments = cache(self._segments)
        self._bindings = {rpc: tuple(bindings_of(SERVICE.methods_by_name[rpc])) for rpc in RPCS}

    # ---- requests of gRPC, said in REST ----

    @st.composite
    def _twin(draw: st.DrawFn, self: "Texts", rpc: str, message: Message) -> Asked | None:  # type: ignore[misc]
        binding = draw(st.sampled_from(self._bindings[rpc]))
        camel = draw(st.booleans())
        try:
            said = rest_world.said(binding, message, camel=camel)
        except (json_format.Error, ValueError, httpx.InvalidURL):  # what JSON cannot say
            return None
        if said is None:
            return None
        path, more = said
        target = path.encode("ascii", "replace")
        if "params" in more:
            query = urllib.parse.urlencode(more["params"])
            if draw(st.booleans()):
                for harm in draw(st.lists(media.harms("flip", "cut", "double"), max_size=2)):
                    query = "".join(c for c in harm(query.encode()).decode("latin-1") if "!" <= c <= "~")
            target += b"?" + query.encode()
        body = draw(harmed_json(json.loads(more["content"]))) if "content" in more else b""
        return Asked(binding.verb, target[:_LONGEST_TARGET], self._plain, body, draw(st.booleans()))

    def twins(self) -> st.SearchStrategy[Asked | None]:
        """Any RPC's request in REST, its JSON harmed; None for what cannot be said."""
        predicting = st.tuples(st.sampled_from(RPCS[:3]), self._requests.predicting())
        flow = st.tuples(st.just("PostWorkflowResults"), self._requests.workflows())
        asked = st.one_of(predicting, predicting, flow, self._requests.any_rpc())
        return asked.flatmap(lambda pair: Texts._twin(self, *pair))  # type: ignore[arg-type]

    # ---- odd requests ----

    def _segments(self) -> st.SearchStrategy[str]:
        """What may stand in a path for an id, percent-encoded or as it is."""
        ids = self._requests.ids("model_id", "version_id", "workflow_id", "deployment_id", "user_id", "app_id")
        odd = st.sampled_from(
            [
                "",
                ".",
                "..",
                "%2F",
                "%2f..",
                "%00",
                "%ff",
                "%",
                "%zz",
                "%25",
                "a%2Fb",
                "~",
                "*",
                ";x=1",
                "%C3%BC",
                "a" * 300,
            ]
        )
        return st.one_of(ids.map(lambda text: urllib.parse.quote(text, safe="")), odd, odd)

    @st.composite
    def _path(draw: st.DrawFn, self: "Texts") -> bytes:  # type: ignore[misc]
        pages = ["/", "/v2", "/v2/", "/livez", "/readyz", "/v2/openapi.json", "/v2/auth/methods", "//v2//models"]
        template = draw(st.one_of(st.sampled_from(self._templates), st.sampled_from(pages)))
        parts = [draw(self.segments()) if part.startswith("{") else part for part in template.split("/")]
        if draw(st.integers(0, 5)) == 0:
            parts.insert(draw(st.integers(0, len(parts))), draw(self.segments()))
        path = "/".join(parts)
        names = st.sampled_from(
            [
                "page",
                "per_page",
                "user_app_id.user_id",
                "userAppId.appId",
                "model_id",
                "model",
                "x",
                "a.b.c",
                "",
                "name",
                "filter",
            ]
        )
        values = st.sampled_from(["", "1", "-1", "0", "99999999999", "true", "ü", "%ff", "{}", "1.5", "a" * 500, "*"])
        query = draw(st.lists(st.tuples(names, values), max_size=4))
        if query and draw(st.integers(0, 9)) == 0:
            query *= 400
        if query:
            path += "?" + "&".join(f"{name}={urllib.parse.quote(value, safe='%')}" for name, value in query)
        return ("/" + path.lstrip("/") if not path.startswith("/") else path).encode("ascii", "replace")[
            :_LONGEST_TARGET
        ]

    def headers(self) -> st.SearchStrategy[list[tuple[str, str]]]:
        """A key mostly, and headers that mean something to somebody."""
        key = self._world.key
        who = st.sampled_from([f"Key {key}"] * 6 + [f"Bearer {key}", "Key", "Key nobody", "Basic eDp5", "", key])
        pairs = st.sampled_from(
            [
                ("content-type", "application/json; charset=utf-16"),
                ("content-type", "text/plain"),
                ("content-type", ""),
                ("content-type", "multipart/form-data; boundary=x"),
                ("content-encoding", "gzip"),
                ("content-encoding", "identity"),
                ("accept", "text/html"),
                ("accept-encoding", "gzip, br;q=0"),
                ("origin", "https://evil.example"),
                ("origin", "null"),
                ("access-control-request-method", "POST"),
                ("x-clarifai-request-id-prefix", "me-1"),
                ("x-clarifai-request-id-prefix", "x" * 500),
                ("grpc-timeout", "20S"),
                ("grpc-timeout", "abc"),
                ("grpc-timeout", "99999999H"),
                ("inference-header-content-length", "5"),
                ("inference-header-content-length", "-5"),
                ("inference-header-content-length", "9" * 30),
                ("range", "bytes=0-1"),
                ("expect", "banana"),
                ("x-forwarded-for", "127.0.0.1"),
                ("cookie", "a=b"),
                ("if-none-match", "*"),
                ("te", "trailers"),
            ]
        )
        return st.tuples(who, st.lists(pairs, max_size=3, unique_by=lambda pair: pair[0])).map(
            lambda made: [("authorization", made[0]), *made[1]]
        )

    def bodies(self) -> st.SearchStrategy[bytes]:
        """Anything in a body."""
        jsonish = st.one_of(
            st.just({"inputs": [{"data": {"text": {"raw": "good"}}}]}), st.sampled_from(_ODD), _values()
        )
        deep = st.integers(1, 3000).map(lambda n: b'{"a":' * n + b"1" + b"}" * n)
        lists = st.integers(1, 3000).map(lambda n: b"[" * n)

        lines = st.lists(jsonish.map(dumped), max_size=3).map(b"\n".join)
        return st.one_of(
            st.just(b""),
            jsonish.flatmap(harmed_json),
            deep,
            lists,
            lines,
            st.binary(max_size=60),
            st.sampled_from([b"0" * 60_000, b"0" * 400_000]),
        )

    def odd(self) -> st.SearchStrategy[Asked]:
        """Any verb on any path with any headers and any body."""
        return st.builds(
            Asked,
            st.sampled_from(VERBS + ("GET", "POST") * 6),
            Texts._path(self),  # type: ignore[call-arg,arg-type]
            self.headers(),
            self.bodies(),
            st.booleans(),
        )

    # ---- other doors ----

    def kserve(self) -> st.SearchStrategy[Asked]:
        """KServe's REST paths, with bodies that are nearly right."""
        values = _values()
        shapes = st.lists(
            st.one_of(st.integers(-2, 4), st.sampled_from([2**31, 2**63 - 1, -(2**63), 10**30])), max_size=4
        )
        tensors = st.fixed_dictionaries(
            {},
            optional={
                "name": st.one_of(st.sampled_from(["x", "a", "b", "image", "text"]), values),
                "datatype": st.one_of(st.sampled_from(["FP32", "FP32", "INT64", "BYTES", "BOOL"]), values),
                "shape": st.one_of(st.just([1, 3]), shapes, values),
                "data": st.one_of(st.just([1, 2, 3]), st.just([[0, 0, 1]]), st.just(["good"]), values),
                "parameters": st.one_of(st.just({"binary_data_size": 12}), values),
            },
        )
        content = st.fixed_dictionaries(
            {"inputs": st.one_of(st.lists(tensors, max_size=3), values)},
            optional={
                "outputs": st.one_of(st.just([{"name": "y", "parameters": {"binary_data": True}}]), values),
                "parameters": st.one_of(st.just({"binary_data_output": True}), values),
                "id": values,
            },
        )

        @st.composite
        def build(draw: st.DrawFn) -> Asked:
            text = draw(harmed_json(draw(content)))
            tail = draw(st.one_of(st.just(b""), st.binary(max_size=14)))
            length = draw(st.sampled_from(["", str(len(text)), "0", "3", "-1"]))
            headers = [*self._plain, *([("inference-header-content-length", length)] if length else [])]
            model = draw(st.one_of(st.sampled_from(MODELS), self.segments()))
            rest = draw(st.sampled_from(["/infer"] * 6 + ["", "/ready", "/versions/1/infer", "/versions/9", "/x"]))
            verb = "POST" if rest.endswith("infer") else draw(st.sampled_from(["GET", "POST", "PUT"]))
            target = f"/kserve/v2/models/{model}{rest}".encode("ascii", "replace")
            return Asked(verb, target, headers, text + tail, draw(st.booleans()))

        return build()

    def openai(self) -> st.SearchStrategy[Asked]:
        """OpenAI's paths, likewise."""
        values = _values()
        models = st.sampled_from(["tester/tests/models/sentence", "sentence", "vector", "topic", "nobody"])
        embeddings = st.fixed_dictionaries(
            {"model": st.one_of(models, values)},
            optional={
                "input": st.one_of(media.texts(), st.lists(media.texts(), max_size=4), values),
                "encoding_format": st.one_of(st.sampled_from(["float", "base64"]), values),
                "dimensions": st.one_of(st.just(4), values),
                "user": values,
            },
        )
        chats = st.fixed_dictionaries(
            {"model": models}, optional={"messages": values, "stream": values, "max_tokens": values}
        )
        root = "/v2/ext/openai/v1"

        @st.composite
        def build(draw: st.DrawFn) -> Asked:
            path, content = draw(
                st.one_of(
                    st.tuples(st.just("/embeddings"), embeddings),
                    st.tuples(st.just("/embeddings"), embeddings),
                    st.tuples(st.just("/chat/completions"), chats),
                    st.tuples(self.segments().map(lambda name: f"/models/{name}"), st.none()),
                    st.tuples(st.just("/models"), st.none()),
                )
            )
            verb = draw(st.sampled_from(VERBS)) if draw(st.integers(0, 9)) == 0 else "POST" if content else "GET"
            body = draw(harmed_json(content)) if content is not None else b""
            return Asked(verb, (root + path).encode("ascii", "replace"), self._plain, body, draw(st.booleans()))

        return build()

    def grpc_web(self) -> st.SearchStrategy[Asked]:
        """gRPC-Web, its frames and its messages harmed."""

        messages = st.one_of(*(st.tuples(st.just(rpc), harmed_bytes(self._requests.of_rpc(rpc))) for rpc in RPCS))

        @st.composite
        def build(draw: st.DrawFn) -> Asked:
            rpc, body = draw(messages)
            flag = draw(st.sampled_from([0, 0, 0, 0, 1, 0x80, 0xFF]))
            length = draw(st.sampled_from([len(body)] * 6 + [0, len(body) + 1, 2**31, 2**32 - 1]))
            framed = struct.pack(">BI", flag, length) + body
            kind = draw(
                st.sampled_from(["application/grpc-web+proto", "application/grpc-web", "application/grpc-web-text"])
            )
            if kind.endswith("text"):
                framed = base64.b64encode(framed)
            for harm in draw(st.lists(media.harms("flip", "cut"), max_size=1)):
                framed = harm(framed)
            headers = [("authorization", f"Key {self._world.key}"), ("content-type", kind), ("x-grpc-web", "1")]
            return Asked("POST", f"/clarifai.api.V2/{rpc}".encode(), headers, framed, draw(st.booleans()))

        return build()


@cache
def _values() -> st.SearchStrategy[Any]:
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
        st.sampled_from(["x", "image", "FP32", "BYTES", "data", "good", "float", "base64", "1e999", "\ud800"]),
    )
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=6,
    )
