"""What answers calls in one process: the API, its transport, and what they stand on.

The daemon has one in its own process, or one in each front's.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from starlette.routing import BaseRoute

from appliance.api.auth import Authenticator
from appliance.api.keys import KeyStore
from appliance.api.kserve_http import kserve_routes
from appliance.api.load import Load
from appliance.api.openai import openai_routes
from appliance.api.pages import pages
from appliance.api.rest import rest_routes
from appliance.api.service import Api
from appliance.catalog.view import View
from appliance.catalog.workflows import Workflows
from appliance.core.config import Config
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.sharing import SharedLimits
from appliance.core.types import Endpoint
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.checks import memory_for_requests
from appliance.daemon.front import Front, Sockets, open_front
from appliance.daemon.staff import Readiness
from appliance.tasks.servable import Servable

_log = logging.getLogger(__name__)

_LAST_REPLIES_S = 2.0
"""Seconds in which the last replies may reach their callers before connections are cut."""

_LAST_CALLERS_S, _QUIET_S = 2.0, 0.3
"""Seconds in which callers are refused before the port closes: at most so many, and until nobody came for a while."""


class Serving:
    """API and transport over a catalog. Used from the event loop's thread."""

    def __init__(
        self,
        config: Config,
        catalog: View[Servable],
        workflows: Workflows,
        metrics: Metrics,
        readiness: Readiness,
        certificates: CertificateFiles,
        keys: KeyStore,
        limits: SharedLimits | None = None,
    ) -> None:
        """Find everything that can be wrong before a port is bound.

        Args:   limits: what fronts know of each other, so that they hold for all together; None: this is the only one.
        Raises: ConfigError.
        """
        self._config = config
        self._metrics = metrics
        self._readiness = readiness
        self.certificates = certificates
        self.keys = keys
        self._budget = MemoryBudget(memory_for_requests(config), limits.memory() if limits else None)
        self._calls = limits.calls() if limits else None
        self._measuring: asyncio.Task[None] | None = None
        authenticator = Authenticator(config, keys, trust=certificates.trust, limits=limits)
        self.api = Api(config, catalog, authenticator, self._budget, metrics, workflows)
        self._front: Front | None = None

    @property
    def ports(self) -> Mapping[str, int]:
        """Setting → port number; empty before `listen`."""
        return {} if self._front is None else self._front.ports

    @property
    def transport(self) -> str:
        """Which transport answers; "" before `listen`."""
        return "" if self._front is None else self._front.name

    async def listen(self, sockets: Sockets) -> None:
        """Answer on these. Raises: ConfigError: the transport cannot do what is configured."""
        endpoints = self.api.endpoints()
        app = pages(self._readiness, self._routes(endpoints))
        self._front = open_front(self._config, endpoints, app, self.certificates, self._budget, self._metrics, sockets)
        await self._front.start()
        if self._config.server.load_reports:
            load = Load(self._budget, self._answered, gpus=self._config.engine.device != "cpu")
            self._measuring = asyncio.create_task(load.measure(self._front.report))

    def _answered(self) -> float:
        """Calls that ended since the start, at all fronts."""
        own = self._metrics.requests.total()
        if self._calls is None:
            return own
        self._calls.write(int(own))
        return own + self._calls.others()

    def _routes(self, endpoints: Mapping[str, Endpoint]) -> list[BaseRoute]:
        """What the main port serves over HTTP: KServe's and OpenAI's surfaces, and the twins of Clarifai's RPCs."""
        return [
            *kserve_routes(self.api.kserve, self.api),
            *openai_routes(self.api.direct, self.api),
            *rest_routes(endpoints, self._config.limits.request_size),
        ]

    def configure(self, config: Config, keys: KeyStore) -> None:
        """Take over a new configuration, whose certificates are taken over already."""
        self._config = config
        self.keys.adopt(keys)
        self.api.configure(config)
        self._budget.limit = memory_for_requests(config)

    def publish(self, ready: bool, models: Mapping[str, bool]) -> None:
        """The catalog has changed: tell health checks what is ready, and forget what is gone."""
        self.api.health.publish(ready, dict(models))
        self.api.catalog_changed()

    async def drain(self, now: asyncio.Event, on_shut: Callable[[], None] = lambda: None) -> None:
        """Balancers notice → accept no more → finish what was accepted → answer the rest.

        Args: now: set when nothing shall be waited for any more. on_shut: called when no more is accepted.
        """
        settings, front = self._config.shutdown, self._front
        assert front is not None, "it listens"
        front.last()
        await _unless(now, now.wait(), settings.lame_duck_s)
        until = asyncio.get_running_loop().time() + settings.drain_s
        on_shut()
        await _unless(now, front.retire(settings.drain_s), settings.drain_s + _LAST_CALLERS_S)
        # Where a call may still come, it is answered UNAVAILABLE while the port is open: grpcio's own shutdown would
        # reset those that arrive in its very moment, which clients do not try again.
        self.api.refuse_new()
        await _unless(now, self.api.wait_idle(), max(0.0, until - asyncio.get_running_loop().time()))
        if not front.retires:
            await _unless(now, self._callers_gone(), _LAST_CALLERS_S)
        if self.api.in_flight:
            _log.warning("calls were told to try again", extra={"count": self.api.in_flight})
        self.api.end()
        await front.stop(_LAST_REPLIES_S)
        await self.api.tracing.close()
        lost = self.api.in_flight
        if lost:
            self._metrics.lost.inc(lost)
            _log.critical("calls were lost: they ended without a result or a status", extra={"count": lost})

    async def stop(self) -> None:
        """Close the ports at once; after `drain` they are closed."""
        if self._measuring is not None:
            self._measuring.cancel()
        if self._front is not None:
            await self._front.stop(0.0)

    async def _callers_gone(self) -> None:
        """Return when nobody was refused for a while: those who were have heard it, and went elsewhere."""
        while self.api.refused_ago() < _QUIET_S:  # noqa: ASYNC110  # what is waited for is that nothing happens
            await asyncio.sleep(_QUIET_S / 4)


async def _unless(now: asyncio.Event, wait: Coroutine[Any, Any, object], seconds: float) -> None:
    """Wait for something, at most so long, and not beyond `now`."""
    tasks = {asyncio.ensure_future(wait), asyncio.ensure_future(now.wait())}
    _, pending = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
