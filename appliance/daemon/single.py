"""Everything in the daemon's own process: for machines with few CPUs and no GPU."""

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from appliance.api.keys import KeyStore
from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.catalog.view import View
from appliance.catalog.workflows import Workflows
from appliance.core.config import Config
from appliance.core.errors import NotReady
from appliance.core.metrics import Counted, Metrics
from appliance.core.usage import Amounts, UsageKey
from appliance.daemon.auditor import Auditor
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.serving import Serving
from appliance.daemon.sockets import ListeningSockets
from appliance.daemon.staff import Readiness
from appliance.engine import plan as plans
from appliance.engine import session
from appliance.engine.worker import LocalEngine
from appliance.orchestrator.desired import as_data, desired
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool, Servable

_log = logging.getLogger(__name__)


class Single:
    """The API, the transport and the engine, here; implements `Staff`."""

    fronts = 1

    def __init__(self, config: Config, metrics: Metrics, auditor: Auditor) -> None:
        self._config = config
        self._metrics = metrics
        self._auditor = auditor
        self._serving: Serving | None = None
        self._plans = plans.cache_in(config.catalog.state_dir)
        self._pool = DecodePool(config.engine.decode_threads)

    async def open(self) -> None:
        """See `Staff.open`."""
        self._warn()
        self._engine = LocalEngine(self._config.engine, self._metrics, self._config.catalog.state_dir)
        _log.info("device %s: %s", self._engine.device, self._engine.device.reason)

    async def load(self, path: Path, config: BundleConfig, version: VersionFolder) -> Servable:
        """See `Staff.load`."""
        limits = self._config.limits
        make_plan = partial(plans.make_plan, cache=self._plans)
        return await servable.load(path, config, version, self._engine, self._pool, self._metrics, limits, make_plan)

    async def serve(
        self,
        catalog: View[Servable],
        workflows: Workflows,
        certificates: CertificateFiles,
        keys: KeyStore,
        readiness: Readiness,
        sockets: ListeningSockets,
    ) -> Mapping[str, int]:
        """See `Staff.serve`."""
        self._catalog = catalog
        self._sockets = sockets
        self._serving = Serving(self._config, catalog, workflows, self._metrics, readiness, certificates, keys)
        self._auditor.watch(self._serving.api.trail)
        self.refuse_calls(self._auditor.refuses)
        await self._serving.listen(sockets.by_name)
        return self._serving.ports

    def publish(self, ready: bool, models: Mapping[str, bool]) -> None:
        """See `Staff.publish`."""
        self._metrics.queue_rows.clear()  # a version that is gone leaves no sample, and no reference to its session
        if self._serving is None:
            return
        self._serving.publish(ready, models)
        for bundle in self._catalog.bundles:
            for version in bundle.versions.values():
                if version.servable is not None:
                    servable.watch_queue(version.servable, self._metrics)

    async def configure(self, config: Config, keys: KeyStore) -> None:
        """See `Staff.configure`."""
        self._config = config
        self._warn()
        if self._serving is not None:
            self._serving.configure(config, keys)

    def _warn(self) -> None:
        if self._config.orchestrator.has_agent:
            _log.warning(
                "one process does everything here: nothing is registered with the orchestrator by itself, and no work "
                'comes from there; restart with processes.mode = "auto", or set orchestrator.agent = false'
            )

    def refuse_calls(self, unrecorded: bool) -> None:
        """See `Staff.refuse_calls`."""
        if self._serving is not None:
            self._serving.api.unrecorded = unrecorded

    def set_levels(self, level: str, own: Mapping[str, str]) -> None:
        """See `Staff.set_levels`: there are no children."""

    @property
    def in_flight(self) -> int:
        """See `Staff.in_flight`."""
        return 0 if self._serving is None else self._serving.api.in_flight

    def page(self, opened: bool) -> bytes:
        """See `Staff.page`."""
        return self._metrics.page(opened)

    def usage(self) -> Mapping[UsageKey, Amounts]:
        """See `Staff.usage`."""
        return self._metrics.usage.counted()

    def counted(self, *names: str, notes: bool = False) -> Mapping[str, Mapping[tuple[str, ...], Counted]]:
        """See `Staff.counted`."""
        return self._metrics.counted(*names, notes=notes)

    def problems(self) -> dict[str, str]:
        """See `Staff.problems`: what is wrong here is the daemon's own end."""
        return {}

    def describe(self) -> dict[str, object]:
        """See `Staff.describe`."""
        return {
            "mode": "single",
            "transport": "" if self._serving is None else self._serving.transport,
            "device": str(self._engine.device),
            "device_reason": self._engine.device.reason,
            "onnxruntime": session.version(),
        }

    async def registration(self) -> dict[str, object]:
        """See `Staff.registration`."""
        if self._serving is None:
            raise NotReady("The appliance is still starting; try again.")
        return as_data(desired(self._config, self._catalog))

    async def drain(self, now: asyncio.Event) -> None:
        """See `Staff.drain`."""
        if self._serving is not None:
            await self._serving.drain(now)

    async def stop(self) -> None:
        """See `Staff.stop`."""
        if self._serving is not None:
            await self._serving.stop()
            self._sockets.close()
        self._pool.close()
