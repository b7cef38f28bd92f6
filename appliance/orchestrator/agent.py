"""The agent: keeps what the orchestrator knows of us right, says how we are, and takes work from there.

Without the orchestrator nothing here fails: it is tried again, ever less often, with one `Backoff` for everything.
"""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from appliance.catalog.view import View
from appliance.core.config import Config
from appliance.core.errors import ApplianceError, ConfigError
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.types import Endpoint
from appliance.orchestrator.backoff import Backoff
from appliance.orchestrator.central import Central, Secrets
from appliance.orchestrator.created import Created, registering
from appliance.orchestrator.desired import Desired, desired
from appliance.orchestrator.reconcile import Registered, reconcile
from appliance.orchestrator.reports import Reports
from appliance.orchestrator.work import OUTCOMES, Place, Runner, Work
from appliance.tasks.servable import Servable

_log = logging.getLogger(__name__)

_REPORT_S = 60.0
"""Seconds between two words about how we are, without which nothing has changed."""

_COMPARE_S = 600.0
"""Seconds, more or less, after which what is registered is compared though nothing has changed here: another appliance
may have taken something of the nodepool's with it when it left."""

_LOOK_S = 1.0
"""Seconds between two looks at the file with the PAT, and at who else is registering."""

_MOST_WARNINGS = 10
"""Different problems that are logged while the link is down, each once: it may be down for weeks, and is tried again
every minute, by every name and address that the orchestrator has."""

CALLER = "orchestrator"
"""The principal of all work from there; `[[principal]]` may bound it."""


class Agent:
    """The side towards the orchestrator. Used from one event loop; `run` is its life, `drain` its end."""

    def __init__(
        self,
        config: Config,
        catalog: View[Servable],
        endpoints: Mapping[str, Endpoint],
        budget: MemoryBudget,
        metrics: Metrics,
        told: Callable[[dict[str, object]], None],
    ) -> None:
        """Args:

        config: of an appliance that is enrolled.
        endpoints: those of the API, which answer work; its callers are let in already.
        told: hears how the link is, as plain data, whenever that changes.
        """
        self._config, self._catalog, self._endpoints = config, catalog, endpoints
        self._budget, self._metrics, self._told = budget, metrics, told
        self._backoff = Backoff()
        self._reports = Reports(gpus=config.engine.device != "cpu")
        self._news = asyncio.Event()
        self._draining = False
        self._life: asyncio.Task[Any] | None = None
        self._registered: Desired | None = None  # what was desired when it last succeeded
        self._compare_at = 0.0
        self._place: Place | None = None
        self._central: Central | None = None
        self._work: dict[str, Work] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._heard_at = math.nan
        self._warned: set[str] = set()  # problems since it was last connected
        self._connected_now, self._problem, self._since = False, "it is being connected to", time.time()
        self._show()
        self._tell()

    # ---- what happens outside ----

    def catalog_changed(self) -> None:
        """What is desired may be something else."""
        self._news.set()

    def configure(self, config: Config) -> None:
        """Take over a configuration whose [orchestrator] and place are the same."""
        self._config = config
        self._news.set()

    # ---- life ----

    async def run(self) -> None:
        """Connect, register, report, for ever; streams of runners live beside it."""
        self._life = asyncio.current_task()
        while not self._draining:
            await self._backoff.wait()
            begun = self._backoff.begin()
            self._news.clear()
            try:
                central = await self._connected()
                wanted = desired(self._config, self._catalog)
                await self._register(central, wanted)
                await self._report(central, wanted)
            except ApplianceError as error:
                self._failed(begun, error)
                continue
            except Exception as error:
                # The agent must go on whatever an orchestrator answers.
                _log.exception("the agent failed unexpectedly; it goes on")
                self._failed(begun, ConfigError(f"unexpected {type(error).__name__}"))
                continue
            self._heard_at = time.monotonic()
            self._link(connected=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), _REPORT_S)

    async def drain(self) -> None:
        """Take no more work, finish what was taken, say that we go, and close."""
        self._draining = True
        if self._life is not None:  # what it registers or says from now on would be untrue soon
            self._life.cancel()
            await asyncio.wait({self._life})
        if self._work:
            await asyncio.gather(*(work.drain() for work in self._work.values()))
        if self._ending:
            await asyncio.wait(self._ending)
        if self._central is not None:
            if self._place is not None and self._connected_now:
                with contextlib.suppress(ApplianceError):
                    await self._reports.last(self._central, self._place, list(self._work.values()))
            await self._central.close()

    # ---- registration ----

    async def _connected(self) -> Central:
        """A channel for everything but work, made with what the files hold now. Raises: ConfigError: no PAT."""
        settings = self._config.orchestrator
        secrets = await asyncio.to_thread(Secrets.read, settings)
        if self._central is not None and self._central.secrets != secrets:
            await self._forget_connections()
        if self._central is None:
            self._central = Central(settings, secrets)
        return self._central

    async def _forget_connections(self) -> None:
        """There is another PAT, or certificate: what is open has the old one."""
        assert self._central is not None, "there is one"
        old, self._central, self._registered = self._central, None, None
        await old.close()
        for runner_id in list(self._work):
            self._end_work(runner_id)

    async def _register(self, central: Central, wanted: Desired) -> None:
        """See that what is there is what is desired, unless it is known; then work for the runners that we have.

        Raises: ApplianceError.
        """
        if wanted == self._registered and time.monotonic() < self._compare_at:
            return
        result = "failed"
        try:
            with await self._alone():
                # Somebody else may have been at it: `leave` deletes all of it, and then the PAT.
                if await asyncio.to_thread(Secrets.read, self._config.orchestrator) != central.secrets:
                    raise ConfigError("The PAT or a file of TLS was replaced just now; the new one is tried next.")
                found = await reconcile(central, wanted, self._created())
            result = "ok"
        finally:
            self._metrics.orchestrator_registrations.labels(result).inc()
        for step in found.steps:
            _log.info("registered: %s", step)
        for model, why in wanted.left_out.items():
            _log.info("not registered: %s (%s)", model, why)
        self._reports.status_was_posted(wanted.status, wanted.status_description)
        self._registered = wanted
        self._compare_at = time.monotonic() + random.uniform(0.5, 1.5) * _COMPARE_S  # noqa: S311  # not a secret
        self._adopt(wanted, found)

    async def _alone(self) -> contextlib.ExitStack:
        """To be left when we are done: nobody else registers meanwhile. Raises: ConfigError."""
        while True:
            with contextlib.ExitStack() as stack, contextlib.suppress(BlockingIOError):
                stack.enter_context(registering(self._config.catalog.state_dir, wait=False))
                return stack.pop_all()
            await asyncio.sleep(_LOOK_S)

    def _created(self) -> Created:
        settings = self._config.orchestrator
        return Created(self._config.catalog.state_dir, str(settings.api_base), str(settings.user_id))

    def _adopt(self, wanted: Desired, found: Registered) -> None:
        """Work for every runner of ours, and for no other."""
        if self._place is None:
            self._place = Place(wanted.user_id, wanted.cluster.id, wanted.nodepool.id)
        runners = {runner.id: runner for runner in _runners(wanted, found)}
        for runner_id, work in list(self._work.items()):
            if runners.get(runner_id) != work.runner:
                self._end_work(runner_id)
        for runner in runners.values():
            if runner.id not in self._work and not self._draining:
                self._begin_work(runner)

    def _begin_work(self, runner: Runner) -> None:
        assert self._central is not None and self._place is not None, "it is registered"  # noqa: PT018
        channel = Central(self._config.orchestrator, self._central.secrets)
        for outcome in OUTCOMES:  # an alert on growth needs to see it at nought before
            self._metrics.orchestrator_items.labels(runner.key.model_id, runner.local_version, outcome)
        work = self._work[runner.id] = Work(
            runner,
            self._place,
            channel,
            self._endpoints,
            self._budget,
            self._metrics,
            self._backoff,
            self._work_failed,
            self._config.limits.request_size,
        )
        work.start(self._config.orchestrator.streams)

    def _end_work(self, runner_id: str) -> None:
        """A runner is ours no more; what was taken is finished."""
        task = asyncio.create_task(self._work.pop(runner_id).drain())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    # ---- what is said of us ----

    async def _report(self, central: Central, wanted: Desired) -> None:
        assert self._place is not None, "it is registered"
        await self._reports.post(
            central, self._place, wanted.status, wanted.status_description, list(self._work.values())
        )

    def _show(self) -> None:
        """Have the link among the metrics."""
        metrics, base = self._metrics, str(self._config.orchestrator.api_base)
        metrics.watch(metrics.orchestrator_connected.labels(base), lambda: float(self._connected_now))
        begun = time.monotonic()
        metrics.watch(
            metrics.orchestrator_silence.labels(base),
            lambda: time.monotonic() - (begun if math.isnan(self._heard_at) else self._heard_at),
        )
        streams, works = metrics.orchestrator_streams, self._work
        metrics.watch(streams.labels("waiting"), lambda: float(sum(work.waiting for work in works.values())))
        metrics.watch(streams.labels("busy"), lambda: float(sum(work.busy for work in works.values())))
        for result in ("ok", "failed"):
            metrics.orchestrator_registrations.labels(result)

    # ---- the link ----

    def _failed(self, begun: float, error: ApplianceError) -> None:
        # What is there may have changed while we were away: it is compared anew.
        self._registered = None
        self._backoff.failed(begun)
        self._link(connected=False, problem=str(error))

    def _work_failed(self, problem: str) -> None:
        """A stream broke, or was refused: by link, PAT or registration, which the next attempt looks at in turn."""
        self._registered = None
        self._news.set()
        self._link(connected=False, problem=f"a stream of work ended: {problem}")

    def _link(self, *, connected: bool, problem: str = "") -> None:
        """Say how the link is, when that is news."""
        if (connected, problem) == (self._connected_now, self._problem):
            return
        base = self._config.orchestrator.api_base
        if connected != self._connected_now:
            self._since = time.time()
        self._connected_now, self._problem = connected, problem
        if connected:
            self._warned.clear()
            _log.info("the orchestrator knows us, and answers", extra={"api_base": base, "runners": len(self._work)})
        elif problem not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(problem)
            _log.warning("nothing comes from the orchestrator: %s", problem, extra={"api_base": base})
        self._tell()

    def _tell(self) -> None:
        self._told(
            {
                "api_base": self._config.orchestrator.api_base,
                "connected": self._connected_now,
                "problem": self._problem,
                "since": self._since,
                "runners": len(self._work),
            }
        )


def _runners(wanted: Desired, found: Registered) -> Iterator[Runner]:
    """Those that we have there now."""
    for model in wanted.models:
        for version in model.versions:
            there = (model.message.app_id, model.message.id, version.local)
            if there in found.runners:
                yield Runner(found.runners[there], there[0], found.versions[there], model.key, version.local)
