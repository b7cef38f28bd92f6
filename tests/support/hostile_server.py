"""A server for `test_hostile.py`, in a process of its own: short limits, small budget, no TLS.

Prints its port, then serves until its standard input ends. `GET /stats` tells what it holds.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvloop

from appliance.core.errors import Overloaded
from appliance.core.memory import MemoryBudget
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.wire.server import WireServer
from appliance.wire.settings import WireSettings

BUDGET = 64 * 2**20
SETTINGS = WireSettings(
    max_message=16 * 2**20,
    max_reply=16 * 2**20,
    request_timeout_s=3,
    handshake_timeout_s=3,
    idle_s=30,
    streams=100,
    max_connections=1200,
    per_address=1000,
)


def _admission(budget: MemoryBudget) -> Any:
    def admit(call: Call, size: int) -> bytes | None:
        if call.metadata.get("authorization") != "key":
            raise RpcAbort(RpcStatus.UNAUTHENTICATED, "No key.")
        try:
            call.memory = budget.expect(size, "key")
        except Overloaded as error:
            raise RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, str(error)) from error
        return None

    return admit


async def _echo(call: Call, body: bytes) -> bytes:
    await asyncio.sleep(0)
    return body


async def _large(call: Call, body: bytes) -> bytes:
    return bytes(int(body))


async def _watch(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for body in requests:
        yield body
        await asyncio.Event().wait()


async def _chat(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for body in requests:
        yield body


async def _serve() -> None:
    budget = MemoryBudget(BUDGET)
    admit = _admission(budget)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/stats":
            found = {
                "used": budget.used,
                "connections": server._gate.open,
                "tasks": len(asyncio.all_tasks()),
            }
            body = json.dumps(found).encode()
        else:
            body = b""
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    endpoints = {
        "/test/Echo": Endpoint(unary=_echo, admit=admit),
        "/test/Large": Endpoint(unary=_large, admit=admit),
        "/test/Chat": Endpoint(stream=_chat, admit=admit),
        "/test/Open": Endpoint(unary=_echo),
        "/test/Watch": Endpoint(stream=_watch),
    }
    server = WireServer(endpoints, app, SETTINGS, budget)
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server.listen("server.listen", sock, None)
    await server.start()
    print(server.ports["server.listen"], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1)


if __name__ == "__main__":
    if os.environ.get("PLAIN_ASYNCIO"):
        asyncio.run(_serve())
    else:
        uvloop.run(_serve())
