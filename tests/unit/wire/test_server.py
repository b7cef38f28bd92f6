"""What is left of a connection when it is over: nothing, and without the garbage collector's help."""

import asyncio
import gc
import http.client
import socket
import weakref
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import uvloop
from support.appliance import Pki
from support.contexts import client_tls, server_tls
from support.waiting import eventually_async
from support.wire_app import rest

from appliance.core.memory import MemoryBudget
from appliance.core.types import Call, Endpoint
from appliance.wire.server import WireServer
from appliance.wire.settings import WireSettings


async def _echo(call: Call, body: bytes) -> bytes:
    return body


def _call_by_grpc(port: int, pki: Pki) -> None:
    credentials = grpc.ssl_channel_credentials(pki.ca.read_bytes())
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        assert channel.unary_unary("/test/Echo")(b"hello", timeout=30) == b"hello"


def _call_by_http(port: int, pki: Pki) -> None:
    connection = http.client.HTTPSConnection("localhost", port, context=client_tls(pki), timeout=30)
    connection.request("GET", "/hello")
    connection.getresponse().read()
    connection.close()


def _say_nothing(port: int, pki: Pki) -> None:
    with client_tls(pki).wrap_socket(socket.create_connection(("127.0.0.1", port)), server_hostname="localhost"):
        pass


@pytest.mark.parametrize("client", [_call_by_grpc, _call_by_http, _say_nothing])
def test_a_connection_that_is_over_is_freed_at_once(client: Callable[[int, Pki], None], pki: Pki) -> None:
    """TLS's buffers are a quarter of a MiB a connection: clients that come and go must not pile them up."""

    async def scenario() -> None:
        server = WireServer({"/test/Echo": Endpoint(unary=_echo)}, rest, WireSettings(), MemoryBudget(2**20))
        context = server_tls(pki)
        context.set_alpn_protocols(["h2", "http/1.1"])
        server.listen("tls", socket.create_server(("127.0.0.1", 0)), lambda: context)
        await server.start()
        seen: list[weakref.ref[Any]] = []
        come = server._come

        def note(connection: Any) -> None:
            tls = connection._transport.get_extra_info("ssl_object")  # TLS's buffers go when it goes
            seen.extend((weakref.ref(connection), weakref.ref(tls)))
            come(connection)

        server._come = note  # type: ignore[method-assign]
        try:
            await asyncio.to_thread(client, server.ports["tls"], pki)
            await eventually_async(lambda: seen and all(ref() is None for ref in seen), what="it is still there")
        finally:
            await server.stop(0)

    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(scenario())
    finally:
        gc.enable()
