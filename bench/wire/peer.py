"""The Python servers under test, as a process: `python -m bench.wire.peer ours|aio|sync FOLDER`.

FOLDER holds the replies and certificates. Listens on three ports of loopback, writes them as one line of JSON,
`{"plain": …, "tls": …, "mtls": …}`, and serves until it is stopped. All handlers take bytes and give bytes.
"""

import asyncio
import gc
import json
import resource
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import uvloop

from appliance.core.memory import MemoryBudget
from appliance.core.types import Call, Endpoint
from appliance.wire.settings import WireSettings
from bench.wire.workload import BATCH, ONE, PREDICT, answer

_HOST = "127.0.0.1"
_SYNC_THREADS = 8
_MANY = 100_000
"""More connections and calls than any row opens, for limits that the C++ server does not have."""

_GRPCIO_OPTIONS = [
    # From 1000 waiting calls on, the Python servers refuse some.
    ("grpc.server.max_pending_requests", _MANY),
    ("grpc.server.max_pending_requests_hard_limit", _MANY),
]

Work = Callable[[bytes], bytes]


def main() -> None:
    """Serve."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    one, batch = (folder / "one.reply").read_bytes(), (folder / "batch.reply").read_bytes()
    handlers: dict[str, Work] = {ONE: lambda body: one, BATCH: lambda body: batch, PREDICT: answer}
    gc.collect()
    gc.freeze()
    if kind == "sync":
        _serve_sync(handlers, folder)
    else:
        uvloop.run({"ours": _serve_ours, "aio": _serve_aio}[kind](handlers, folder))


def _print_ports(ports: dict[str, int]) -> None:
    print(json.dumps(ports), flush=True)


async def _stopped() -> None:
    """Returns when the process is told to stop."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


# ---- ours ------------------------------------------------------------------------------------------------------------


async def _serve_ours(handlers: dict[str, Work], folder: Path) -> None:
    # Imported here, so that the other servers run where the extension is not built.
    from appliance.wire.server import WireServer

    budget = MemoryBudget(2**32)

    def admit(call: Call, size: int) -> None:
        """Large bodies are let in, and paid for, as the API does for callers with a key."""
        call.memory = budget.hold(size)

    def endpoint(work: Work) -> Endpoint:
        async def unary(call: Call, body: bytes) -> bytes:
            return work(body)

        def quick(call: Call, body: bytes, done: Callable[[bytes], None]) -> bool:
            done(work(body))
            return True

        return Endpoint(unary=unary, quick=quick, admit=admit)

    settings = WireSettings(max_connections=_MANY, per_address=_MANY, handshakes=_MANY)
    endpoints = {name: endpoint(work) for name, work in handlers.items()}
    server = WireServer(endpoints, _no_page, settings, budget)
    for mode, context in (("plain", None), ("tls", _context(folder, False)), ("mtls", _context(folder, True))):
        listening = socket.create_server((_HOST, 0), backlog=4096)
        server.listen(mode, listening, partial(_same, context) if context else None)
    await server.start()
    _print_ports(server.ports)
    await _stopped()
    await server.stop(0.1)


def _same(context: ssl.SSLContext) -> ssl.SSLContext:
    return context


async def _no_page(scope: Any, receive: Any, send: Any) -> None:
    """What is not gRPC gets 404."""
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body"})


def _context(folder: Path, ask_client: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.num_tickets = 0  # as the daemon's, and so is the next line
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    if ask_client:
        # The product asks and takes what is sent (CERT_OPTIONAL); here one must be sent, to be sure that it is.
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(folder / "ca.crt")
    return context


# ---- grpcio ----------------------------------------------------------------------------------------------------------


async def _serve_aio(handlers: dict[str, Work], folder: Path) -> None:
    def handler(work: Work) -> Any:
        async def serve(body: bytes, context: Any) -> bytes:
            return work(body)

        return grpc.unary_unary_rpc_method_handler(serve)  # without serialisers: bytes

    server = grpc.aio.server(options=_GRPCIO_OPTIONS)
    server.add_generic_rpc_handlers((_Handlers({name: handler(work) for name, work in handlers.items()}),))
    ports = _listen_grpcio(server, folder)
    await server.start()
    _print_ports(ports)
    await _stopped()
    await server.stop(0.1)


def _serve_sync(handlers: dict[str, Work], folder: Path) -> None:
    def handler(work: Work) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda body, context: work(body))

    server = grpc.server(ThreadPoolExecutor(_SYNC_THREADS), options=_GRPCIO_OPTIONS)
    server.add_generic_rpc_handlers((_Handlers({name: handler(work) for name, work in handlers.items()}),))
    ports = _listen_grpcio(server, folder)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server.start()
    _print_ports(ports)
    stop.wait()
    server.stop(0.1).wait()


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    def __init__(self, handlers: dict[str, Any]) -> None:
        self._handlers = handlers

    def service(self, details: Any) -> Any:
        """The handler of a method."""
        return self._handlers.get(details.method)


def _listen_grpcio(server: Any, folder: Path) -> dict[str, int]:
    pair = ((folder / "server.key").read_bytes(), (folder / "server.crt").read_bytes())
    tls = grpc.ssl_server_credentials([pair])
    mtls = grpc.ssl_server_credentials([pair], (folder / "ca.crt").read_bytes(), require_client_auth=True)
    return {
        "plain": server.add_insecure_port(f"{_HOST}:0"),
        "tls": server.add_secure_port(f"{_HOST}:0", tls),
        "mtls": server.add_secure_port(f"{_HOST}:0", mtls),
    }


if __name__ == "__main__":
    main()
