"""A server process for tests of the wire: either transport, endpoints that show what the wire does to them.

It is told what to do by JSON lines on its standard input, and tells by JSON lines on its standard output what its
handlers live through: a test waits for events instead of guessing how long something takes. `support.wire_server` is
the test's side.
"""

import argparse
import asyncio
import json
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import uvloop

from appliance.api.health import Health
from appliance.api.reflection import reflection_endpoints
from appliance.core.errors import Overloaded
from appliance.core.memory import MemoryBudget
from appliance.core.types import Call, Done, Endpoint, RpcAbort, RpcStatus
from appliance.wire.grpcio import GrpcioServer
from appliance.wire.server import WireServer
from appliance.wire.settings import Credentials, WireSettings

BUDGET = 2**30


def tell(event: str, **fields_: object) -> None:
    """Tell the test something."""
    print(json.dumps({"event": event, **fields_}), flush=True)


class _OpenToAll:
    """Stands in for the authenticator: reflection asks nothing else of it."""

    def grant(self, call: Call) -> None:
        """Everybody may."""


class App:
    """The endpoints, and what the test can ask about them.

    Attributes:
        gate: what handlers that are held wait for.
        made: messages that `Count` has given to the wire.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.made = 0
        self.health = Health()

    def endpoints(self) -> dict[str, Endpoint]:
        """By full method name."""
        ours = {
            "Open": Endpoint(unary=_length),
            "Echo": Endpoint(unary=_echo),
            "Length": Endpoint(unary=_length),
            "Make": Endpoint(unary=_make),
            "Abort": Endpoint(unary=_abort),
            "Crash": Endpoint(unary=_crash),
            "Metadata": Endpoint(unary=_metadata),
            "Deadline": Endpoint(unary=_deadline),
            "Identity": Endpoint(unary=_identity),
            "Quick": Endpoint(unary=_echo, quick=_quick),
            "Hold": Endpoint(unary=self._hold),
            "Linger": Endpoint(unary=self._linger),
            "Guarded": Endpoint(unary=_length, admit=self._admit),
            "Chat": Endpoint(stream=_chat),
            "Collect": Endpoint(stream=_collect),
            "Count": Endpoint(stream=self._count),
            "Slow": Endpoint(stream=self._slow),
            "HoldStream": Endpoint(stream=self._hold_stream),
            "AbortAfter": Endpoint(stream=_abort_after),
            "CrashAfter": Endpoint(stream=_crash_after),
            "FirstOnly": Endpoint(stream=_first_only),
            "GuardedStream": Endpoint(stream=_collect, admit=self._admit),
        }
        # Those without admission take very little: here everybody may send as much as the limits allow.
        ours = {
            name: endpoint if name == "Open" else replace(endpoint, admit=endpoint.admit or self._welcome)
            for name, endpoint in ours.items()
        }
        reflection = reflection_endpoints(_OpenToAll())  # type: ignore[arg-type]
        return (
            {f"/wire.Test/{name}": endpoint for name, endpoint in ours.items()} | self.health.endpoints() | reflection
        )

    def bind(self, budget: MemoryBudget) -> None:
        """Where admission reserves."""
        self._budget = budget

    def _welcome(self, call: Call, size: int) -> None:
        """Let everybody in."""
        call.memory = self._budget.hold(size)

    def _admit(self, call: Call, size: int) -> bytes | None:
        """Let in, or turn away as the header x-admit says."""
        how = call.metadata.get("x-admit", "")
        tell("asked", size=size, how=how)
        if how == "reply":
            return b"refused"
        if how == "abort":
            raise RpcAbort(RpcStatus.PERMISSION_DENIED, "not you")
        if how == "overloaded":
            raise Overloaded("too much of everything")
        if how == "crash":
            raise ValueError("a secret")
        call.memory = self._budget.hold(size)
        return None

    async def _hold(self, call: Call, body: bytes) -> bytes:
        """Hold the call until the gate opens; tell how that ends."""
        name = body.decode()
        tell("holding", id=name)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            tell("cancelled", id=name)
            raise
        tell("let go", id=name)
        return body

    async def _linger(self, call: Call, body: bytes) -> bytes:
        """A handler that does not mind being cancelled, and answers when nobody listens."""
        name = body.decode()
        tell("holding", id=name)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            tell("ignored", id=name)
        return b"late"

    async def _hold_stream(self, call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Answer the first message, then hold the stream until the gate opens."""
        name = ""
        try:
            async for body in requests:
                name = name or body.decode()
                yield body
                tell("holding", id=name)
                await self.gate.wait()
        except (asyncio.CancelledError, GeneratorExit):
            tell("cancelled", id=name)
            raise

    async def _slow(self, call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Take one message, then no more until the gate opens."""
        count = total = 0
        async for body in requests:
            count += 1
            total += len(body)
            if count == 1:
                tell("took one")
                await self.gate.wait()
        yield f"{count} {total}".encode()

    async def _count(self, call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """So many messages of so many bytes."""
        async for body in requests:
            wanted = json.loads(body)
            for number in range(wanted["count"]):
                self.made += 1
                yield number.to_bytes(4, "big").ljust(wanted["size"], b".")


async def _echo(call: Call, body: bytes) -> bytes:
    return body


async def _length(call: Call, body: bytes) -> bytes:
    return str(len(body)).encode()


async def _make(call: Call, body: bytes) -> bytes:
    return b"m" * int(body)


async def _abort(call: Call, body: bytes) -> bytes:
    wanted = json.loads(body)
    raise RpcAbort(RpcStatus(wanted["status"]), wanted["message"], bytes.fromhex(wanted.get("details", "")))


async def _crash(call: Call, body: bytes) -> bytes:
    raise ValueError("a secret")


async def _metadata(call: Call, body: bytes) -> bytes:
    ours = {name: value for name, value in call.metadata.items() if name.startswith("x-")}
    return json.dumps({"method": call.method, **ours}, sort_keys=True).encode()


async def _deadline(call: Call, body: bytes) -> bytes:
    return b"none" if call.deadline is None else f"{call.deadline - time.monotonic():.3f}".encode()


async def _identity(call: Call, body: bytes) -> bytes:
    leaf = (call.certificate or b"").decode()
    return json.dumps({"leaf": leaf, "chain": call.chain.decode(), "peer": call.peer}).encode()


def _quick(call: Call, body: bytes, done: Done) -> bool:
    if body == b"slow":
        return False
    if body == b"later":
        asyncio.get_running_loop().call_soon(done, b"it is later")
    elif body == b"abort":
        done(RpcAbort(RpcStatus.NOT_FOUND, "nothing here"))
    else:
        done(b"quick " + body)
    return True


async def _chat(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for body in requests:
        yield body


async def _collect(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    sizes = [len(body) async for body in requests]
    yield f"{len(sizes)} {sum(sizes)}".encode()


async def _abort_after(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Answer every message, and the one that says "stop" with a status."""
    async for body in requests:
        if body == b"stop":
            raise RpcAbort(RpcStatus.NOT_FOUND, "no more")
        yield body


async def _crash_after(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for body in requests:
        yield body
        raise ValueError("a secret")


async def _first_only(call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Answer the first message and end, whatever the client still has to say."""
    async for body in requests:
        yield body
        return


async def rest(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI app: `/hello` says which HTTP it was, `/length` how long the body; two answer at once."""
    count, more = 0, scope["path"] not in ("/early", "/empty")
    while more:
        message = await receive()
        count += len(message.get("body", b""))
        more = message.get("more_body", False)
    pages = {"/hello": f"hello over {scope['http_version']}", "/length": str(count), "/early": "no", "/empty": ""}
    body = pages.get(scope["path"], "not found").encode()
    status = 404 if scope["path"] not in pages else 401 if body in (b"", b"no") else 200
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Tls:
    """The context for the next handshake; `use` changes it."""

    def __init__(self, folder: Path) -> None:
        self.use(folder)

    def use(self, folder: Path) -> None:
        """Take certificate, key and authorities from another folder."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        context.load_verify_locations(folder / "ca.crt")
        context.verify_mode = ssl.CERT_OPTIONAL
        context.set_alpn_protocols(["h2", "http/1.1"])
        self.context = context


def _bound(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind(address)
    sock.listen(1024)
    return sock


def _native(app: App, settings: WireSettings, budget: MemoryBudget, tls: Tls, unix: str) -> WireServer:
    server = WireServer(app.endpoints(), rest, settings, budget)
    server.listen("tls", _bound(socket.AF_INET, ("127.0.0.1", 0)), lambda: tls.context)
    server.listen("plain", _bound(socket.AF_INET, ("127.0.0.1", 0)), None)
    if unix:
        server.listen("unix", _bound(socket.AF_UNIX, unix), None)
    return server


def _grpcio(app: App, settings: WireSettings, folder: Path) -> GrpcioServer:
    server = GrpcioServer(app.endpoints(), settings)
    chain, key = (folder / "server.crt").read_bytes(), (folder / "server.key").read_bytes()
    server.listen("tls", "127.0.0.1:0", lambda: Credentials(chain, key, None))
    return server


async def _lines() -> AsyncIterator[dict[str, Any]]:
    """What the test says; ends when it is gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until the test goes away."""
    wanted = json.loads(arguments.settings)
    settings = WireSettings(**{f.name: wanted[f.name] for f in fields(WireSettings) if f.name in wanted})
    app, budget, tls = App(), MemoryBudget(BUDGET), Tls(arguments.tls)
    app.bind(budget)
    native = arguments.transport == "native"
    server: WireServer | GrpcioServer = (
        _native(app, settings, budget, tls, arguments.unix) if native else _grpcio(app, settings, arguments.tls)
    )
    await server.start()
    tell("ready", ports=server.ports)
    stopping: set[asyncio.Task[None]] = set()

    async def stop(grace_s: float) -> None:
        await server.stop(grace_s)
        tell("stopped", used=budget.used, tasks=len(asyncio.all_tasks()))

    def stop_later(grace_s: float = 0.0) -> None:
        stopping.add(asyncio.create_task(stop(grace_s)))

    async def retire(timeout_s: float) -> None:
        assert isinstance(server, WireServer)
        await server.retire(timeout_s, 0)
        tell("retired")

    def retire_later(timeout_s: float) -> None:
        stopping.add(asyncio.create_task(retire(timeout_s)))

    def gate(open_: bool) -> None:
        (app.gate.set if open_ else app.gate.clear)()

    commands: dict[str, Callable[..., None]] = {
        "stop": stop_later,
        "retire": retire_later,
        "gate": gate,
        "made": lambda: tell("made", count=app.made),
        "used": lambda: tell("used", bytes=budget.used),
        "healthy": lambda ready: app.health.publish(ready, {"u/a/m": True}),
        "certificate": lambda folder: tls.use(Path(folder)),
    }
    async for said in _lines():
        commands[said.pop("do")](**said)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--transport", choices=("native", "grpcio"), required=True)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), required=True)
    parser.add_argument("--tls", type=Path, required=True)
    parser.add_argument("--unix", default="")
    parser.add_argument("--settings", default="{}")
    arguments = parser.parse_args()
    (uvloop.run if arguments.loop == "uvloop" else asyncio.run)(serve(arguments))


if __name__ == "__main__":
    main()
