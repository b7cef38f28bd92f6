"""The front: which transport serves the ports, on which sockets.

The native wire is the rule. Where its extension is missing, grpcio steps in and the log says what that costs.
"""

import logging
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeAlias

from appliance.core.config import Config
from appliance.core.errors import ConfigError
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.systemd import Notifier
from appliance.core.types import Endpoint
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.sockets import ListeningSockets, close_inherited, open_listening
from appliance.wire.asgi import ASGIApp
from appliance.wire.settings import WireSettings

_log = logging.getLogger(__name__)

_LAST_NEWS_S = 2.0
"""Seconds that clients have to hear that no new calls are taken."""


Sockets: TypeAlias = Mapping[str, Sequence[socket.socket]]
"""Setting → the sockets that listen for it. A transport that binds its ports itself is given none."""


class Front(Protocol):
    """A transport with its ports bound."""

    @property
    def name(self) -> str:
        """Which transport it is."""

    @property
    def ports(self) -> Mapping[str, int]:
        """Setting → port number."""

    async def start(self) -> None:
        """Accept connections."""

    def report(self, load: bytes) -> None:
        """Tell balancers how busy we are. Args: load: a report in base64."""

    @property
    def retires(self) -> bool:
        """Whether `retire` keeps new calls out; else they must be refused while the port is open."""

    def last(self) -> None:
        """The end is near: tell those clients that can only be told with an answer."""

    async def retire(self, bodies_s: float) -> None:
        """Take no new calls without losing one, and wait at most so long for bodies that are on their way."""

    async def stop(self, grace_s: float) -> None:
        """Accept no more, let calls end for `grace_s` seconds, then end them."""


def open_sockets(config: Config, notifier: Notifier, fronts: int = 1) -> ListeningSockets:
    """Have a listening socket for every setting and front, or none where the transport binds its ports itself.

    Raises: ConfigError: one cannot be bound.
    """
    if not native(config):
        close_inherited(notifier)
        return ListeningSockets({})
    wanted = {
        "server.listen": config.server.listen,
        "server.mtls_listen": config.server.mtls_listen,
        "server.plain_listen": config.server.plain_listen,
    }
    return open_listening({name: address for name, address in wanted.items() if address}, notifier, fronts=fronts)


def open_front(
    config: Config,
    endpoints: Mapping[str, Endpoint],
    pages: ASGIApp,
    certificates: CertificateFiles,
    budget: MemoryBudget,
    metrics: Metrics,
    sockets: Sockets,
) -> Front:
    """The transport on its sockets. Raises: ConfigError: it cannot do what is configured."""
    if native(config):
        return _Native(config, endpoints, pages, certificates, budget, metrics, sockets)
    problem = _native_problem()
    if config.server.transport == "native" and problem is not None:
        _log.warning(
            "the native wire cannot be used, grpcio serves instead: slower, gRPC only (no REST, no gRPC-Web), "
            "client certificates only on server.mtls_listen, nothing of tls.sni_certificates: %s",
            problem,
        )
        _check_grpcio_will_do(config, problem)
    return _Grpcio(config, endpoints, certificates)


def native(config: Config) -> bool:
    """Whether the native wire serves."""
    return config.server.transport == "native" and _native_problem() is None


def _native_problem() -> str | None:
    """Why the native wire cannot be used, or None."""
    try:
        from appliance.wire import _h2  # noqa: F401  # what is asked is whether it can be imported
    except ImportError as error:
        return str(error)
    return None


def _check_grpcio_will_do(config: Config, problem: str) -> None:
    lacking = ""
    if config.auth.require in ("certificate", "both") and not config.server.mtls_listen:
        lacking = f'auth.require = "{config.auth.require}" then needs server.mtls_listen'
    elif config.server.plain_listen:
        lacking = "server.plain_listen needs the native wire"
    elif config.server.trusted_proxies:
        lacking = "server.trusted_proxies needs the native wire: grpcio would take PROXY headers for broken handshakes"
    if lacking:
        raise ConfigError(
            f"The native wire cannot be used ({problem}), and {lacking}. Install the package built for this machine."
        )


class _Native:
    """Everything on one port; see `appliance.wire.server`."""

    name = "native"
    retires = True

    def __init__(
        self,
        config: Config,
        endpoints: Mapping[str, Endpoint],
        pages: ASGIApp,
        certificates: CertificateFiles,
        budget: MemoryBudget,
        metrics: Metrics,
        sockets: Sockets,
    ) -> None:
        from appliance.wire.server import WireServer  # imports the extension, which may be missing elsewhere

        self._server = WireServer(endpoints, pages, wire_settings(config), budget, metrics)
        tls: dict[str, Callable[[], ssl.SSLContext] | None] = {
            "server.listen": certificates.context,
            "server.mtls_listen": partial(certificates.context, demand=True),
            "server.plain_listen": None,
        }
        for name, own in sockets.items():
            for sock in own:
                self._server.listen(name, sock, tls[name])

    @property
    def ports(self) -> Mapping[str, int]:
        """See `Front.ports`."""
        return self._server.ports

    async def start(self) -> None:
        """See `Front.start`."""
        await self._server.start()

    def report(self, load: bytes) -> None:
        """See `Front.report`."""
        self._server.report(load)

    def last(self) -> None:
        """See `Front.last`."""
        self._server.last()

    async def retire(self, bodies_s: float) -> None:
        """See `Front.retire`."""
        await self._server.retire(_LAST_NEWS_S, bodies_s)

    async def stop(self, grace_s: float) -> None:
        """See `Front.stop`."""
        await self._server.stop(grace_s)


class _Grpcio:
    """gRPC alone; see `appliance.wire.grpcio`."""

    name = "grpcio"
    retires = False

    def __init__(self, config: Config, endpoints: Mapping[str, Endpoint], certificates: CertificateFiles) -> None:
        from appliance.wire.grpcio import GrpcioServer  # takes a tenth of a second, for what hardly anybody chooses

        self._server = GrpcioServer(endpoints, wire_settings(config))
        self._server.listen("server.listen", config.server.listen, certificates.tls)
        if config.server.mtls_listen:
            self._server.listen("server.mtls_listen", config.server.mtls_listen, certificates.mtls)

    @property
    def ports(self) -> Mapping[str, int]:
        """See `Front.ports`."""
        return self._server.ports

    async def start(self) -> None:
        """See `Front.start`."""
        await self._server.start()

    def report(self, load: bytes) -> None:
        """It cannot; the setting says so."""

    def last(self) -> None:
        """There are no such clients."""

    async def retire(self, bodies_s: float) -> None:
        """grpcio cannot: its own shutdown resets calls that arrive in its very moment."""

    async def stop(self, grace_s: float) -> None:
        """See `Front.stop`."""
        await self._server.stop(grace_s)


def pass_through_warning(config: Config) -> str:
    """A sentence when proxies stand before us and client certificates are asked for, else ""."""
    if not config.server.trusted_proxies or config.auth.require in ("key", "none"):
        return ""
    return (
        f'auth.require is "{config.auth.require}" and server.trusted_proxies names proxies: they must pass TLS through '
        "to us; one that ends TLS itself takes the clients' certificates away."
    )


def wire_settings(config: Config) -> WireSettings:
    """What the wire must know of the configuration."""
    limits, connections = config.limits, config.connections
    return WireSettings(
        max_message=limits.request_size,
        max_reply=limits.reply_size,
        metadata=limits.metadata_size,
        request_timeout_s=limits.request_timeout_s,
        max_connections=connections.max,
        per_address=connections.per_address,
        handshakes=connections.handshakes,
        handshake_timeout_s=connections.handshake_timeout_s,
        idle_s=connections.idle_s,
        keepalive_s=connections.keepalive_s,
        keepalive_timeout_s=connections.keepalive_timeout_s,
        age_s=connections.age_s,
        age_grace_s=connections.age_grace_s,
        streams=connections.streams,
        trusted_proxies=config.server.trusted_proxies,
        cors_origins=config.server.cors_origins,
    )
