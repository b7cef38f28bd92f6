"""HTTP routes called as the connection's side calls them: no sockets."""

from collections.abc import MutableMapping, Sequence
from typing import Any

import httpx
from starlette.routing import BaseRoute

from appliance.api.pages import pages
from appliance.wire.asgi import PEER, ASGIApp, Receive, Send
from appliance.wire.peer import Peer


def http_client(routes: Sequence[BaseRoute], key: str | None = None) -> httpx.AsyncClient:
    """A client of the main port's application with these routes."""
    app: ASGIApp = pages(lambda: (True, {}), routes)

    async def with_peer(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        scope.setdefault("extensions", {})[PEER] = Peer("127.0.0.1", "ipv4:127.0.0.1:1", secure=True)
        await app(scope, receive, send)

    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(with_peer)
    return httpx.AsyncClient(transport=transport, base_url="https://box", headers=headers)
