"""For operators: /livez, /readyz and /metrics on a loopback port; the same and more on a unix socket.

What the `appliance` command asks for (/status, /registration, /reload, /look) is on the socket only, whose file mode
says who may.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from appliance.core.config import Admin, parse_address
from appliance.core.errors import AddressError, ApplianceError, ConfigError
from appliance.core.files import file_error


class Operations(Protocol):
    """What the admin pages ask of the daemon."""

    def readiness(self) -> tuple[bool, dict[str, object]]:
        """Whether we serve, and who is not ready and why."""

    def describe(self) -> dict[str, object]:
        """Version, device, catalog and calls in flight, as plain data."""

    async def reload(self) -> str:
        """Take over configuration, certificates, keys and bundles. Raises: ApplianceError: the old ones stay."""

    async def registration(self) -> dict[str, object]:
        """What the orchestrator shall know of us, as plain data. Raises: ApplianceError: it cannot be told now."""

    async def look(self) -> None:
        """Look at the catalog's root now."""


class _Json(JSONResponse):
    """JSON in ASCII, whatever a bundle put into a string: no page may fail for it."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, ensure_ascii=True, default=str, separators=(",", ":")).encode("ascii")


def public_app(operations: Operations, registry: CollectorRegistry) -> Starlette:
    """The pages of the loopback port."""

    async def livez(request: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def readyz(request: Request) -> Response:
        ready, content = operations.readiness()
        return _Json(content, status_code=200 if ready else 503)

    async def metrics(request: Request) -> Response:
        if "application/openmetrics-text" in request.headers.get("accept", ""):
            return Response(
                openmetrics.generate_latest(registry),  # type: ignore[no-untyped-call]
                media_type=openmetrics.CONTENT_TYPE_LATEST,
            )
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics)])


def private_app(operations: Operations, registry: CollectorRegistry) -> Starlette:
    """The pages of the unix socket: the public ones and the operator's."""

    async def status(request: Request) -> Response:
        return _Json(operations.describe())

    async def reload(request: Request) -> Response:
        try:
            return _Json({"ok": True, "message": await operations.reload()})
        except ApplianceError as error:
            return _Json({"ok": False, "message": str(error)}, status_code=409)

    async def look(request: Request) -> Response:
        with contextlib.suppress(ApplianceError):  # the root cannot be read: the catalog and /readyz say so
            await operations.look()
        return _Json(operations.describe())

    async def registration(request: Request) -> Response:
        try:
            return _Json({"ok": True, "desired": await operations.registration()})
        except ApplianceError as error:
            return _Json({"ok": False, "message": str(error)}, status_code=409)

    app = public_app(operations, registry)
    app.router.routes += [
        Route("/status", status),
        Route("/registration", registration),
        Route("/reload", reload, methods=["POST"]),
        Route("/look", look, methods=["POST"]),
    ]
    return app


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class AdminServer:
    """Both listeners."""

    def __init__(self, settings: Admin, operations: Operations, registry: CollectorRegistry) -> None:
        """Bind them. Raises: ConfigError: an address or path cannot be bound."""
        tcp = _bind_tcp(settings.listen)
        try:
            unix = bind_unix(settings.socket)
        except BaseException:
            tcp.close()
            raise
        self.port: int = tcp.getsockname()[1]
        self._path = settings.socket
        self._inode = settings.socket.stat().st_ino
        self._sockets = (tcp, unix)
        self._servers = (
            _server(public_app(operations, registry)),
            _server(private_app(operations, registry)),
        )
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Serve."""
        self._tasks = [
            asyncio.create_task(server.serve(sockets=[bound]))
            for server, bound in zip(self._servers, self._sockets, strict=True)
        ]

    async def stop(self) -> None:
        """Serve no more."""
        for server in self._servers:
            server.should_exit = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for bound in self._sockets:
            bound.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:  # nobody else's
                self._path.unlink()


def _server(app: Callable[..., Awaitable[None]]) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=5,
        )
    )


def _bind_tcp(address: str) -> socket.socket:
    host, port = parse_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "the port is taken (`ss -ltnp` shows by whom)" if taken else error.strerror or str(error)
        raise AddressError(f"admin.listen {address} cannot be bound: {why}; set admin.listen.") from error
    return bound


def bind_unix(path: Path, key: str = "admin.socket") -> socket.socket:
    """Bind a unix socket, 0660, in place of one that a dead daemon left.

    Args: key: the setting that names it. Raises: ConfigError.
    """
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError(f"{key} {path} is a file that is not a socket; remove it, or name another.")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise AddressError(f"Another appliance answers on {key} {path}; stop it, or name another.")
            path.unlink()
        before = os.umask(0o117)
        try:
            bound.bind(str(path))
        finally:
            os.umask(before)
    except ConfigError:
        bound.close()
        raise
    except OSError as error:
        bound.close()
        sentence = f"{key} {path} cannot be bound: {error.strerror or error}; mend its folder, or set {key}."
        raise file_error(error, sentence) from error
    return bound
