"""The daemon's life: start → ready → drain → stop, and reload in between.

`Daemon.run` is the table of contents. What is opened is closed in the reverse order; ready is announced after it is
true, draining before it is. Which processes do the work is a `Staff`'s business: all in this one (`single`), or fronts
and engines of their own (`supervisor`).
"""

import asyncio
import contextlib
import enum
import errno
import fcntl
import hashlib
import logging
import os
import signal
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

from appliance import __version__
from appliance.api.keys import KeyStore
from appliance.api.tracing import check_traces
from appliance.api.trail import Trail
from appliance.catalog.repository import Repository
from appliance.catalog.view import describe
from appliance.catalog.workflows import Workflows
from appliance.core import config as configuration
from appliance.core import logs
from appliance.core.config import Config, LoadedConfig
from appliance.core.errors import ApplianceError, ConfigError, Draining, readable
from appliance.core.files import file_error, one_line
from appliance.core.machine import usable_memory
from appliance.core.metrics import VERSION as METRICS_VERSION
from appliance.core.metrics import Metrics
from appliance.core.systemd import Notifier
from appliance.daemon import gauges
from appliance.daemon.admin import AdminServer
from appliance.daemon.auditor import Auditor
from appliance.daemon.certificates import CertificateFiles, base_url_warning
from appliance.daemon.checks import check_urls, memory_for_requests, space_warning
from appliance.daemon.front import open_sockets, pass_through_warning
from appliance.daemon.overview import Overview
from appliance.daemon.staff import Loaded, Staff, choose
from appliance.daemon.trial import Trial
from appliance.daemon.usage import Usage

_log = logging.getLogger(__name__)


class Phase(enum.IntEnum):
    """Where the daemon is in its life; only moves forward."""

    STARTING = 0
    READY = 1
    DRAINING = 2
    STOPPED = 3


class Daemon:
    """One appliance, from start to stop."""

    def __init__(self, loaded: LoadedConfig, main_file: Path | None) -> None:
        """Args: main_file: where a reload reads the configuration again; None for the default place."""
        self._config = loaded.config
        self._old_keys = loaded.warnings
        self._levels: dict[str, str] = {}
        self._main_file = main_file
        self._phase = Phase.STARTING
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._reload_waits = False
        self._tasks: set[asyncio.Task[object]] = set()
        self._admin: AdminServer | None = None
        self.ports: Mapping[str, int] = {}

    async def run(self) -> None:
        """Serve until told to stop. Raises: ConfigError: what the operator must change before it can start."""
        async with contextlib.AsyncExitStack() as stack:
            self._watch_signals()
            await self._open(stack)
            await self._listen(stack)
            await self._load_models(stack)
            self._say_ready()
            await self._stop.wait()
            await self._drain()
        self._phase = Phase.STOPPED
        _log.info("stopped")

    # ---- start ----

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        """Everything that can be wrong is found here, before a port is bound."""
        config = self._config
        self._notifier = Notifier()
        stack.enter_context(_lock(config.catalog.state_dir))
        self._metrics = Metrics(settings=config.metrics)
        gauges.begin(self._metrics)
        loop = asyncio.get_running_loop()
        self._certificates = CertificateFiles(
            config, lambda result: loop.call_soon_threadsafe(self._certificates_changed, result)
        )
        check_urls(config)
        check_traces(config.traces)
        self._keys = KeyStore(config.auth.keys_file)
        self._auditor = Auditor(config, self._metrics)
        stack.push_async_callback(self._auditor.close)
        await self._auditor.open(__version__, _digest(config), self._keys.look())
        self._staff: Staff = choose(config, self._metrics, self._publish, self._auditor)
        self._usage = Usage(config, self._staff.usage, self._metrics)
        stack.push_async_callback(self._usage.close)  # after the staff, whose last counts it writes
        stack.push_async_callback(self._staff.stop)
        self._repository: Repository[Loaded] = Repository(
            config.catalog,
            self._staff.load,
            self._publish,
            lambda model: self._metrics.swaps.labels(model).inc(),
            lambda *load: self._metrics.model_loads.labels(*load).inc(),
        )
        self._workflows = Workflows(config.catalog, self._repository)
        self._auditor.changed = self._audit_changed
        await self._staff.open()
        stack.push_async_callback(self._repository.close)
        facts = self._staff.describe()
        self._metrics.build.info(
            {"version": __version__, "onnxruntime": str(facts["onnxruntime"]), "metrics": METRICS_VERSION}
        )
        self._metrics.watch(self._metrics.keys, lambda: len(self._keys))
        self._overview = Overview(self._metrics, self._staff, self._repository, self.readiness)
        stack.callback(self._overview.close)
        self._trial = Trial(config, self._certificates)
        self._warn()

    async def _listen(self, stack: contextlib.AsyncExitStack) -> None:
        """Bind every port, then answer: what still loads says so, and nobody is refused."""
        config = self._config
        trail = Trail()
        self._auditor.watch(trail)
        self._admin = AdminServer(config, self, self._staff.page, self._keys, self._certificates, self._trial, trail)
        await self._admin.start()
        stack.push_async_callback(self._admin.stop)
        sockets = open_sockets(config, self._notifier, self._staff.fronts)
        stack.callback(sockets.close)
        self._trial.sockets = sockets.by_name.get("server.listen", ())
        ports = await self._staff.serve(
            self._repository, self._workflows, self._certificates, self._keys, self.readiness, sockets
        )
        self.ports = {**ports, "admin.listen": self._admin.port}

    async def _load_models(self, stack: contextlib.AsyncExitStack) -> None:
        """Wait until every wanted bundle is ready or failed, but not for ever; a stop does not wait for it."""
        self._spawn(self._repository.run(), stack)
        self._spawn(self._workflows.run(), stack)
        self._spawn(self._tick(), stack)
        self._spawn(self._usage.run(), stack)
        self._spawn(self._overview.run(lambda: self._config), stack)
        wait_s = self._config.catalog.start_wait_s
        self._notifier.extend_timeout(wait_s + 10)
        settled: asyncio.Future[Any] = asyncio.gather(self._repository.wait_settled(), self._workflows.wait_settled())
        stopped: asyncio.Future[Any] = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({settled, stopped}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        stopped.cancel()

    def _say_ready(self) -> None:
        if self._stop.is_set():
            return
        self._phase = Phase.READY
        self._publish()
        waiting = self._not_ready()
        for name, problem in waiting.items():
            _log.warning("not ready: %s", problem, extra={"bundle": name})
        ports = " ".join(f"{name}={port}" for name, port in self.ports.items())
        _log.info("ready", extra={"base_url": self._config.server.base_url, **_flat(self.ports)})
        self._notifier.ready(f"serving {self._config.server.base_url} ({ports})")

    # ---- stop: the mirror of start ----

    async def _drain(self) -> None:
        """Not ready → balancers notice → accept no more → finish what was accepted → answer the rest."""
        self._phase = Phase.DRAINING
        settings = self._config.shutdown
        self._notifier.stopping()
        self._notifier.extend_timeout(settings.lame_duck_s + settings.drain_s + 10)
        self._publish()
        _log.info("draining", extra={"in_flight": self._staff.in_flight})
        await self._staff.drain(self._stop_now)

    # ---- signals and reload ----

    def _watch_signals(self) -> None:
        """From the first moment on: a stop during the start is a stop, and no failure.

        Nothing runs between two steps of the start that do not wait, so that a reload finds the ports bound.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal)

    def _on_stop_signal(self) -> None:
        """The first one drains, the second one means now."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    def _on_reload_signal(self) -> None:
        """One reload at a time, and one that waits: it takes over whatever changed before it begins."""

        async def reload() -> None:
            with contextlib.suppress(ApplianceError):  # logged where it happened
                await self.reload("signal")

        if not self._reload_waits:
            self._reload_waits = True
            self._spawn(reload())

    async def reload(self, by: str) -> str:
        """Build the new state aside and take it over as a whole; if any of it is bad, the old one goes on.

        Args:    by: who wants it, for the audit log.
        Returns: what was taken over, and what needs a restart.
        Raises:  ApplianceError: nothing was taken over.
        """
        async with self._reloading:
            self._reload_waits = False
            if self._stop.is_set():
                raise Draining
            if self._phase is Phase.READY:  # systemd takes the end of a reload for that of the start
                self._notifier.reloading()
            try:
                config, keys, message = await asyncio.to_thread(self._reloaded)
                await self._staff.configure(config, keys)
            except ApplianceError as error:
                self._metrics.reloads.labels("failed").inc()
                self._auditor.record("reload", by=by, result="failed", why=readable(one_line(error)))
                _log.error("reload failed, the old state goes on: %s", one_line(error))
                self._say_reloaded(f"reload failed: {str(error).splitlines()[0]}")
                raise
            except Exception as error:
                # systemd must hear that the reload is over, whatever it was.
                self._metrics.reloads.labels("failed").inc()
                self._auditor.record("reload", by=by, result="failed", why=type(error).__name__)
                _log.exception("reload failed unexpectedly, the old state goes on")
                self._say_reloaded("reload failed unexpectedly")
                raise ConfigError("The reload failed unexpectedly; the daemon's log tells more.") from error
            changed = configuration.changed_keys(self._config, config)
            self._auditor.record("reload", by=by, result="ok", changed=changed, settings=_digest(config))
            self._config = config
            self._keys.adopt(keys)
            self._auditor.note_keys(self._keys.look())
            if self._admin is not None:
                self._admin.configure(config)
            self._usage.configure(config)
            self._trial.configure(config)
            self._apply_levels()
            logs.limit(config.log.rate)
            self._repository.settings = self._workflows.settings = self._config.catalog
            self._repository.wake()
            self._workflows.wake()
            self._warn()
            self._metrics.reloads.labels("ok").inc()
            _log.info("reloaded: %s", message)
            self._say_reloaded(f"serving {self._config.server.base_url}")
            return message

    def _say_reloaded(self, status: str) -> None:
        if self._phase is Phase.READY:  # else a stop would be taken back
            self._notifier.ready(status)

    def _reloaded(self) -> tuple[Config, KeyStore, str]:
        """The part of a reload that reads files; of those, only certificates are taken over here."""
        loaded = configuration.load(self._main_file)
        fresh = loaded.config
        needs_restart = configuration.restart_needed(self._config, fresh)
        config = configuration.keeping(self._config, fresh, needs_restart)
        problems = configuration.cross_problems(config)
        if problems:  # the new file is sound, but not together with what only a restart can change
            raise configuration.ConfigInvalid(problems)
        keys = KeyStore(config.auth.keys_file)
        check_urls(config)
        check_traces(config.traces)
        self._certificates.reload(config)
        self._old_keys = loaded.warnings
        if needs_restart:
            return config, keys, f"configuration taken over, except what needs a restart: {', '.join(needs_restart)}"
        return config, keys, "configuration, certificates and keys taken over"

    # ---- what others ask ----

    def readiness(self) -> tuple[bool, dict[str, object]]:
        """Whether we serve, and who is not ready and why."""
        problems = self._not_ready()
        some = any(v.ready for b in self._repository.bundles for v in b.versions.values())
        ready = self._phase is Phase.READY and (some or not self._repository.bundles) and not self._auditor.refuses
        return ready, {"ready": ready, "phase": self._phase.name.lower(), "not_ready": problems}

    def describe(self) -> dict[str, object]:
        """Version, device, catalog and calls in flight, as plain data."""
        return {
            "version": __version__,
            "phase": self._phase.name.lower(),
            "base_url": self._config.server.base_url,
            "ports": dict(self.ports),
            "in_flight": self._staff.in_flight,
            **self._staff.describe(),
            "catalog": describe(self._repository, lambda loaded: loaded.described()),
            "workflows": self._workflows.describe(),
        }

    def overview(self) -> bytes:
        """The status document as JSON; made anew at most once a second."""
        return self._overview.document(self._config)

    def log_levels(self) -> dict[str, object]:
        """The configured level, and those of components: all of them, and which were changed since the start."""
        level = self._config.log.level
        return {
            "level": level,
            "components": {component: self._levels.get(component, level) for component in logs.COMPONENTS},
            "changed": sorted(self._levels),
        }

    def set_log_level(self, component: str, level: str | None, by: str) -> None:
        """Give a component, or "all", a level of its own until a restart.

        Args:   level: None: the configured one again. by: who wants it, for the audit log.
        Raises: ConfigError: there is no such component or level.
        """
        components = logs.COMPONENTS if component == "all" else (component,)
        if not set(components) <= set(logs.COMPONENTS):
            raise ConfigError(f"There is no component {component!r}; there are {', '.join(logs.COMPONENTS)}, and all.")
        if level not in (None, *logs.LEVELS):
            raise ConfigError(f"There is no level {level!r}; there are {', '.join(logs.LEVELS)}.")
        for each in components:
            if level is None:
                self._levels.pop(each, None)
            else:
                self._levels[each] = level
        self._apply_levels()
        self._auditor.record("log-level", by=by, component=component, level=level)
        _log.warning("the log level of %s is %s", component, level or f"{self._config.log.level} again")

    async def registration(self) -> dict[str, object]:
        """What the orchestrator shall know of us. Raises: ApplianceError."""
        return await self._staff.registration()

    async def look(self) -> None:
        """Look at the catalog's root and the workflows now."""
        await self._workflows.look()
        await self._repository.look()

    def _not_ready(self) -> dict[str, str]:
        """Bundles, versions and workflows that do not answer, and why."""
        unrecorded = {"audit": self._auditor.problem} if self._auditor.problem else {}
        return self._staff.problems() | self._repository.not_ready() | self._workflows.problems() | unrecorded

    # ---- helpers ----

    def _apply_levels(self) -> None:
        """Log from the configured level on, and components from their own, here and in every child."""
        logs.set_levels(self._config.log.level, self._levels)
        self._staff.set_levels(self._config.log.level, self._levels)

    def _publish(self) -> None:
        """Tell health checks and metrics what is ready."""
        models = {
            str(bundle.key): any(version.ready for version in bundle.versions.values())
            for bundle in self._repository.bundles
            if bundle.key is not None
        }
        self._staff.publish(self.readiness()[0], models)
        gauges.show_catalog(self._metrics, self._repository)
        self._auditor.note_models(self._repository)

    def _audit_changed(self) -> None:
        """The audit log cannot be written, or can again."""
        self._staff.refuse_calls(self._auditor.refuses)
        self._publish()

    def _certificates_changed(self, result: str) -> None:
        """Changed files were taken over, "ok", or not, "failed"."""
        self._metrics.certificate_reloads.labels(result).inc()
        self._auditor.record("certificates", result=result)

    async def _tick(self) -> None:
        """Once a second: certificates that changed, keys, a model that died, and a word to the watchdog."""
        pause = min(1.0, self._notifier.watchdog_s / 2) if self._notifier.watchdog_s else 1.0
        healthy = None
        while True:
            self._notifier.alive()
            try:
                await asyncio.to_thread(self._certificates.refresh)
                self._auditor.note_keys(self._keys.look())
                gauges.show_certificates(self._metrics, self._certificates)
                gauges.show_disks(self._metrics, await asyncio.to_thread(gauges.look_at_disks, self._config))
                state = self._not_ready()
                if state != healthy:
                    healthy = state
                    self._publish()
            except Exception:
                # The watchdog must not bark because a certificate file was odd.
                _log.exception("the daemon's second-by-second look failed")
            await asyncio.sleep(pause)

    def _warn(self) -> None:
        """What the operator should know and need not change."""
        for warning in (
            *self._old_keys,
            base_url_warning(self._config, self._certificates.tls().chain),
            pass_through_warning(self._config),
            space_warning(self._config.catalog.state_dir),
        ):
            if warning:
                _log.warning("%s", warning)
        kept = self._config.cache.size + memory_for_requests(self._config)
        if self._config.cache.size and kept > usable_memory():
            _log.warning(
                "cache.size and limits.memory_in_flight together are more than the memory this service may use"
            )
        if self._config.auth.require in ("key", "both") and not len(self._keys):
            _log.warning("there is no key yet, so nobody can call; make one with `appliance keys create`")

    def _spawn(self, work: Coroutine[Any, Any, object], stack: contextlib.AsyncExitStack | None = None) -> None:
        """Run something beside; on the stack, it is cancelled when the daemon stops."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if stack is not None:
            stack.push_async_callback(_cancelled, task)

    def _ended(self, task: asyncio.Task[object]) -> None:
        """A task beside the daemon is over; one that failed is not passed over in silence."""
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.critical("a task of the daemon failed", exc_info=task.exception())


async def _cancelled(task: "asyncio.Task[object]") -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@contextlib.contextmanager
def _lock(state_dir: Path) -> Iterator[None]:
    """Hold the state folder for this process. Raises: ConfigError: another daemon has it, or it cannot be written."""
    path = state_dir / "lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "make it, or mend its permissions"
        raise file_error(error, f"catalog.state_dir {state_dir} cannot be used: {error.strerror}; {remedy}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"Another appliance (process {owner}) uses {state_dir} already; stop it, or set catalog.state_dir."
            ) from None
        with contextlib.suppress(OSError):  # a courtesy to whoever is refused; a full disk must not stop the start
            os.truncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def _digest(config: Config) -> str:
    """What tells one configuration from another, without telling what is in it."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def _flat(ports: Mapping[str, int]) -> dict[str, int]:
    return {name.replace(".", "_"): port for name, port in ports.items()}
