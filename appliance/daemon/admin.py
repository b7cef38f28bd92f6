"""For operators: /livez, /readyz, /metrics and the status page on a port; the same and more on a unix socket.

The port is plain HTTP on a loopback address. On any other one it is TLS on our own wire, and answers only who is named
in `admin.principals`: these pages tell names of models, principals and processes. The status page's files tell nothing,
and are for everybody: so the page can ask for the key that its document needs.

What the `appliance` command asks for (/status, /registration, /log-levels, /reload, /look) is on the socket only, whose
file mode says who may.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from appliance.api import status as statuses
from appliance.api.auth import Authenticator
from appliance.api.keys import KeyStore
from appliance.api.trail import Trail, Use
from appliance.core.config import Config, is_loopback, parse_address
from appliance.core.errors import (
    AccessError,
    AddressError,
    ApplianceError,
    ConfigError,
    CredentialsMissing,
    KeyInvalid,
    NotPermitted,
)
from appliance.core.exposition import CONTENT_TYPES, Page
from appliance.core.files import file_error
from appliance.core.logs import RateLimitedLog
from appliance.core.memory import MemoryBudget
from appliance.core.types import Call
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.page import DOCUMENT, FILES, page_routes
from appliance.daemon.trial import Trial
from appliance.wire.asgi import PEER, ASGIApp, Receive, Send
from appliance.wire.peer import Peer
from appliance.wire.settings import WireSettings

_log = logging.getLogger(__name__)

_MOST = 16 * 2**20
"""Bytes of a page that is read from elsewhere: more than a hundred models' metrics."""

_MEMORY = 4 * _MOST
"""Bytes that all of them may take together while they wait to be taken."""


class Operations(Protocol):
    """What the admin pages ask of the daemon."""

    def readiness(self) -> tuple[bool, dict[str, object]]:
        """Whether we serve, and who is not ready and why."""

    def describe(self) -> dict[str, object]:
        """Version, device, catalog and calls in flight, as plain data."""

    def overview(self) -> bytes:
        """The status document (`daemon.status`) as JSON."""

    async def reload(self, by: str) -> str:
        """Take over configuration, certificates, keys and bundles. Raises: ApplianceError: the old ones stay."""

    async def registration(self) -> dict[str, object]:
        """What the orchestrator shall know of us, as plain data. Raises: ApplianceError: it cannot be told now."""

    async def look(self) -> None:
        """Look at the catalog's root now."""

    def log_levels(self) -> dict[str, object]:
        """Which levels are logged, as plain data."""

    def set_log_level(self, component: str, level: str | None, by: str) -> None:
        """Change one, or take that back. Raises: ConfigError: there is no such component or level."""


class _Json(JSONResponse):
    """JSON in ASCII, whatever a bundle put into a string: no page may fail for it."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, ensure_ascii=True, default=str, separators=(",", ":")).encode("ascii")


def public_app(operations: Operations, page: Page, more: Sequence[Route] = ()) -> Starlette:
    """The pages of the port. Args: more: the status page's."""

    async def livez(request: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def readyz(request: Request) -> Response:
        ready, content = operations.readiness()
        return _Json(content, status_code=200 if ready else 503)

    async def metrics(request: Request) -> Response:
        opened = "application/openmetrics-text" in request.headers.get("accept", "")
        return Response(page(opened), media_type=CONTENT_TYPES[opened])

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics), *more])


def private_app(operations: Operations, page: Page) -> Starlette:
    """The pages of the unix socket: the public ones and the operator's."""

    async def status(request: Request) -> Response:
        return _Json(operations.describe())

    async def overview(request: Request) -> Response:
        return Response(operations.overview(), media_type="application/json")

    async def reload(request: Request) -> Response:
        try:
            return _Json({"ok": True, "message": await operations.reload(_who(request))})
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

    async def log_levels(request: Request) -> Response:
        if request.method == "POST":
            try:
                asked = await request.json()
                operations.set_log_level(asked["component"], asked["level"], _who(request))
            except (ValueError, KeyError, TypeError):
                return _Json({"ok": False, "message": "Send {component, level} as JSON."}, status_code=400)
            except ApplianceError as error:
                return _Json({"ok": False, "message": str(error)}, status_code=409)
        return _Json({"ok": True, **operations.log_levels()})

    app = public_app(operations, page)
    app.router.routes += [
        Route("/log-levels", log_levels, methods=["GET", "POST"]),
        Route("/status", status),
        Route(DOCUMENT, overview),
        Route("/registration", registration),
        Route("/reload", reload, methods=["POST"]),
        Route("/look", look, methods=["POST"]),
    ]
    return app


class _Known(H11Protocol):
    """HTTP/1.1 over a unix socket, where `scope["client"]` is the user at the other end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Ask the kernel. Source: unix(7), SO_PEERCRED: process, user and group when it connected."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self.client = (f"uid:{uid}", pid)


def _who(request: Request) -> str:
    """Who asks over the unix socket, for the audit log."""
    return request.client.host if request.client is not None else ""


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals are the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class AdminServer:
    """Both listeners."""

    def __init__(
        self,
        config: Config,
        operations: Operations,
        page: Page,
        keys: KeyStore,
        certificates: CertificateFiles,
        trial: Trial,
        trail: Trail,
    ) -> None:
        """Bind them.

        Args:   trail: told who may not read the pages.
        Raises: ConfigError: an address or path cannot be bound, or the port cannot be protected.
        """
        settings = config.admin
        tcp = _bind_tcp(settings.listen)
        self._guarded: _Guarded | None = None
        served: list[tuple[uvicorn.Server, socket.socket]] = []
        try:
            local = is_loopback(settings.listen)
            app = public_app(operations, page, page_routes(operations.overview, trial, local=local))
            if local:
                served.append((_server(app), tcp))
            else:
                self._guarded = _Guarded(app, tcp, config, keys, certificates, trail)
            unix = bind_unix(settings.socket)
        except BaseException:
            tcp.close()
            raise
        self._served = (*served, (_server(private_app(operations, page), _Known), unix))
        self.port: int = tcp.getsockname()[1]
        self._path = settings.socket
        self._inode = settings.socket.stat().st_ino
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Serve."""
        self._tasks = [asyncio.create_task(server.serve(sockets=[bound])) for server, bound in self._served]
        if self._guarded is not None:
            await self._guarded.start()

    def configure(self, config: Config) -> None:
        """Take over who may read the pages."""
        if self._guarded is not None:
            self._guarded.configure(config)

    async def stop(self) -> None:
        """Serve no more."""
        for server, _ in self._served:
            server.should_exit = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, bound in self._served:
            bound.close()
        if self._guarded is not None:
            await self._guarded.stop()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:  # nobody else's
                self._path.unlink()


class _Guarded:
    """The pages where others than this machine can reach them; on our own wire, with its bounds and its TLS."""

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        config: Config,
        keys: KeyStore,
        certificates: CertificateFiles,
        trail: Trail,
    ) -> None:
        """Raises: ConfigError: this machine lacks the native wire."""
        try:
            from appliance.wire.server import WireServer  # imports the extension, which may be missing
        except ImportError as error:
            raise ConfigError(
                f"admin.listen {config.admin.listen} is not a loopback address, and needs the native wire, which "
                f"cannot be used ({error}). Install the package built for this machine, or bind it to 127.0.0.1."
            ) from error
        self._authenticator = Authenticator(_accepting(config), keys, trust=certificates.trust)
        self._app = app
        self._trail = trail
        self._log = RateLimitedLog(_log, per_second=1)
        self.configure(config)
        settings = WireSettings(
            max_message=_MOST, max_reply=_MOST, max_connections=64, per_address=16, handshakes=16, idle_s=300.0
        )
        self._server = WireServer({}, self._answer, settings, MemoryBudget(_MEMORY))
        sock.listen(64)
        self._server.listen("admin.listen", sock, certificates.context)

    def configure(self, config: Config) -> None:
        """Take over who may read them."""
        self._authenticator.configure(_accepting(config))
        self._readers = frozenset(config.admin.principals)

    async def start(self) -> None:
        """Serve."""
        await self._server.start()

    async def stop(self) -> None:
        """Serve no more."""
        await self._server.stop(1.0)

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        peer: Peer = scope["extensions"][PEER]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] in FILES:
            await self._app(scope, receive, send)
            return
        call = Call(scope["path"], headers, peer.text, certificate=peer.certificate, chain=peer.chain)
        refusal: Response
        name = credential = ""
        try:
            grant = self._authenticator.grant(call)
            name, credential = grant.name, grant.credential
            if not all(meter.principal.name in self._readers for meter in grant.meters):
                raise NotPermitted(f"Principal {grant.name!r} is not among admin.principals.")
        except AccessError as error:
            told = str(error)
            unknown = isinstance(error, CredentialsMissing | KeyInvalid)
            refusal = _Json(
                {"error": told}, 401 if unknown else 403, {"www-authenticate": "Bearer"} if unknown else None
            )
            use = Use(name, credential, "", "", int(statuses.row_of(error).code))
        else:
            await self._app(scope, receive, send)
            return
        self._log.write("admin", logging.WARNING, "an admin page was refused", peer=peer.text, told=told)
        path = scope["path"][:200]
        self._trail.count(use, path, peer.text, "")
        self._trail.refused(use, path, peer.text, "", told)
        await refusal(scope, receive, send)


def _accepting(config: Config) -> Config:
    """The configuration with what these pages take: a key or a certificate, or more where calls need more."""
    if config.auth.require in ("certificate", "both"):
        return config
    return config.model_copy(update={"auth": config.auth.model_copy(update={"require": "either"})})


def _server(app: Callable[..., Awaitable[None]], protocol: type[asyncio.Protocol] = H11Protocol) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            app,
            http=protocol,
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
