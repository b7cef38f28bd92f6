"""Who does the work of a daemon: everything in its own process, or children of it."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from appliance.api.keys import KeyStore
from appliance.catalog import view
from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.catalog.view import View
from appliance.catalog.workflows import Workflows
from appliance.core.config import Config
from appliance.core.errors import ConfigError
from appliance.core.machine import accelerators, usable_cpus
from appliance.core.metrics import Counted, Metrics
from appliance.core.usage import Amounts, UsageKey
from appliance.daemon.auditor import Auditor
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.sockets import ListeningSockets

Readiness: TypeAlias = Callable[[], tuple[bool, dict[str, object]]]
"""Whether we serve, and who is not ready and why."""

_SINGLE_BELOW = 4
"""CPUs below which one process does everything: more of them would only take each other's turns."""


class Loaded(view.Loaded, Protocol):
    """What answers for one version."""

    def described(self) -> dict[str, object]:
        """Its device, batching and notes, as plain data."""


class Staff(Protocol):
    """Those who do the work. Used from the event loop's thread."""

    fronts: int
    """How many listening sockets a port wants."""

    async def open(self) -> None:
        """The devices are there. Raises: ConfigError, DeviceError: what keeps them from it."""

    async def load(self, path: Path, config: BundleConfig, version: VersionFolder) -> Loaded:
        """A version, loaded and warmed up. Raises: BundleInvalid, DeviceError."""

    async def serve(
        self,
        catalog: View[Any],
        workflows: Workflows,
        certificates: CertificateFiles,
        keys: KeyStore,
        readiness: Readiness,
        sockets: ListeningSockets,
    ) -> Mapping[str, int]:
        """Answer what comes to these sockets. Returns: setting → port. Raises: ConfigError."""

    def publish(self, ready: bool, models: Mapping[str, bool]) -> None:
        """The catalog has changed: answer by it, and tell health checks what is ready."""

    async def configure(self, config: Config, keys: KeyStore) -> None:
        """Take over a configuration whose files have been read and are good. Raises: ApplianceError."""

    def refuse_calls(self, unrecorded: bool) -> None:
        """Refuse calls, as they could not be recorded, or take them again."""

    def set_levels(self, level: str, own: Mapping[str, str]) -> None:
        """Have the children log from that level on. Args: own: of components that have one of their own."""

    @property
    def in_flight(self) -> int:
        """Calls being worked on."""

    def page(self, opened: bool) -> bytes:
        """The metrics page, over all processes. Args: opened: as OpenMetrics."""

    def usage(self) -> Mapping[UsageKey, Amounts]:
        """What callers used since the daemon began, over all processes; on any thread."""

    def counted(self, *names: str, notes: bool = False) -> Mapping[str, Mapping[tuple[str, ...], Counted]]:
        """What these metrics count, over all processes (`Metrics.counted`)."""

    def problems(self) -> dict[str, str]:
        """Who of them is not at work, and why; empty when all is well."""

    def describe(self) -> dict[str, object]:
        """Transport, device and processes, as plain data."""

    async def registration(self) -> dict[str, object]:
        """What the orchestrator shall know of us (`orchestrator.desired`), as plain data.

        Raises: ConfigError: we are enrolled nowhere. NotReady: nobody who knows the models is there yet.
        """

    async def drain(self, now: asyncio.Event) -> None:
        """Stop serving without losing a call; until `now` is set, when nothing is waited for any more."""

    async def stop(self) -> None:
        """End at once; does nothing a second time."""


def choose(config: Config, metrics: Metrics, changed: Callable[[], None], auditor: Auditor) -> Staff:
    """By the machine, unless the configuration says.

    Args:   changed: told when `problems` are others than before. auditor: told what calls there were.
    Raises: ConfigError: one process shall do everything, beside a GPU.
    """
    device = config.engine.device
    gpu = device.startswith("gpu") or (device == "auto" and bool(accelerators()))
    mode = config.processes.mode
    if mode == "single" and gpu:
        raise ConfigError(
            'processes.mode is "single" and engine.device takes a GPU: only the end of a process truly frees its '
            'memory. Set processes.mode = "auto", or engine.device = "cpu".'
        )
    alone = not gpu and not config.orchestrator.has_agent and usable_cpus() < _SINGLE_BELOW
    if mode == "single" or (mode == "auto" and alone):
        from appliance.daemon.single import Single  # only a process that runs models loads onnxruntime

        return Single(config, metrics, auditor)
    from appliance.daemon.supervisor import Supervisor

    return Supervisor(config, metrics, changed, auditor)
