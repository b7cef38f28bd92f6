"""The pages of the main port over an API of `api_world`, without sockets; and requests of gRPC said in REST."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
from google.protobuf import json_format, message_factory

from appliance.api.bindings import Binding, bindings_of
from appliance.api.pages import pages
from appliance.api.rest import rest_routes
from appliance.core.memory import Reservation
from appliance.wire.asgi import PEER
from appliance.wire.peer import Peer
from support.api_world import SERVICE, Client

MIB = 2**20


class Web:
    """Speaks HTTP to an API, as a connection would."""

    def __init__(self, client: Client, request_size: int = 128 * MIB) -> None:
        self.client = client
        self.admitted: list[Reservation] = []
        self._app = pages(lambda: (True, {}), rest_routes(client.endpoints, request_size))
        transport = httpx.ASGITransport(self._serve, raise_app_exceptions=False)  # type: ignore[arg-type]
        self.http = httpx.AsyncClient(transport=transport, base_url="https://box")

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"] = {
            PEER: Peer("127.0.0.1", "ipv4:127.0.0.1:1", True),
            "appliance.admitted": self.admitted.append,
        }
        await self._app(scope, receive, send)

    async def ask(self, verb: str, path: str, *, key: str | None = "", **more: Any) -> httpx.Response:
        """One request; with the first key unless another one, or None, is given."""
        headers = dict(more.pop("headers", {}))
        if key is not None:
            headers.setdefault("authorization", f"Key {key or self.client.keys[0]}")
        return await self.http.request(verb, path, headers=headers, **more)

    async def post(self, path: str, content: Any, **more: Any) -> httpx.Response:
        """A POST of JSON."""
        return await self.ask(
            "POST", path, content=content if isinstance(content, bytes) else json.dumps(content), **more
        )


def bindings(rpc: str) -> list[Binding]:
    """All ways to an RPC."""
    return bindings_of(SERVICE.methods_by_name[rpc])


def said(binding: Binding, request: Any, *, camel: bool = False) -> tuple[str, dict[str, Any]] | None:
    """The request as path, and `params` or `json`; None where the path wants a field that the request leaves empty."""
    rest = type(request).FromString(request.SerializeToString())
    parts = []
    for segment in binding.segments:
        if isinstance(segment, str):
            parts.append(segment)
            continue
        message = rest
        for name in segment[:-1]:
            message = getattr(message, name)
        value = getattr(message, segment[-1])
        if not value:
            return None
        message.ClearField(segment[-1])
        parts.append(str(httpx.URL("/").copy_with(path="/" + value).raw_path[1:], "ascii").replace("/", "%2F"))
    content = json_format.MessageToDict(rest, preserving_proto_field_name=not camel)
    path = "/" + "/".join(parts)
    return path, {"content": json.dumps(content)} if binding.body else {"params": list(_parameters(content))}


def _parameters(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _parameters(value, f"{prefix}{name}.")
        else:
            for one in value if isinstance(value, list) else [value]:
                yield prefix + name, str(one)


def message_of(rpc: str, content: Any) -> Any:
    """A reply in JSON as the RPC's message."""
    kind = message_factory.GetMessageClass(SERVICE.methods_by_name[rpc].output_type)
    return json_format.ParseDict(content, kind())
