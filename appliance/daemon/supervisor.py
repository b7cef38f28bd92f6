"""Fronts and engines as processes of their own: started, joined, watched, replaced.

Each child has a line to us (`core/channel`), a board on which it shows that it lives (`engine/board`), and a segment in
which it counts (`core/metrics`). A front also has a slab, and a stream to every engine. A child that ends, or shows no
sign of life, is replaced; clients' connections to other fronts, and models in other engines, do not notice.

A version is loaded by one engine, then made known to every front, and only then answered for.
"""

import asyncio
import contextlib
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from appliance.api.keys import KeyStore
from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.catalog.view import View, config_data, folder_data, tell
from appliance.catalog.workflows import Workflows
from appliance.core import config as configuration
from appliance.core.channel import Body, ChannelClosed, Listener, pair
from appliance.core.config import Config
from appliance.core.errors import ApplianceError, BundleInvalid, ConfigError, DeviceError, Draining, NotReady
from appliance.core.fold import Fold
from appliance.core.machine import accelerators, usable_cpus, usable_memory
from appliance.core.metrics import Counted, Metrics
from appliance.core.shared import Segment
from appliance.core.sharing import SharedLimits
from appliance.core.usage import Amounts, UsageKey
from appliance.daemon import gauges
from appliance.daemon.auditor import Auditor
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.checks import memory_for_requests
from appliance.daemon.children import WHY, Child, EngineDied, NeverStarted, Restarts
from appliance.daemon.front import native
from appliance.daemon.sockets import ListeningSockets
from appliance.daemon.staff import Readiness
from appliance.engine import gpu
from appliance.engine.gpu import Gpu
from appliance.engine.slab import Slab

_log = logging.getLogger(__name__)

_Member = TypeVar("_Member")

_LOOK_S = 0.25
"""Seconds between two looks at the children's boards."""

_CANARY_S = 5.0
"""Seconds between two canary runs of an engine."""

_CANARY_RUNS = 3
"""Longest runs that an engine may have before it that the canary waits for."""

_FRONT_SILENCE_S = 30.0
"""Seconds without a turn of its loop after which a front is replaced."""

_MEASURE_S = 1.0
"""Seconds between two readings of the children's CPU time."""

_GPU_LOOK_S = 5.0
"""Seconds between two looks at the GPUs' sensors."""

_LATE_S = 1.0
"""Seconds of delay of a look from which on we stood still, and the children may have too."""

_CRASHES, _CRASH_WINDOW_S = 3, 300.0
"""So many crashes in its runs, in so many seconds, and a version is not run any more."""

_LAST_S = 5.0
"""Seconds beyond what a drain may take after which fronts are ended."""

_MOST_FRONTS = 8
_FRONT_MEMORY = 512 * 2**20
"""Bytes of memory that there must be for each front: one takes 120 MiB without a request."""


class Deployed:
    """A version that an engine has loaded, or will have again soon; implements `Loaded`."""

    def __init__(self, supervisor: "Supervisor", number: int, engine: "Engine", request: Body) -> None:
        self._supervisor = supervisor
        self.number = number
        self.engine = engine
        self.request = request
        self.told: Body = {}
        self.crashes: deque[float] = deque(maxlen=_CRASHES)
        self.problem: str | None = None
        self.given_up = False
        self.loaded = False

    def described(self) -> dict[str, object]:
        """See `Loaded.described`."""
        return {**self.told.get("described", {}), "engine": self.engine.name}

    async def drain(self) -> None:
        """Every front lets it go when nobody uses it any more."""
        await self._supervisor.drop(self)

    def close(self) -> None:
        """The engine lets it go."""
        self._supervisor.unload(self)


class Engine:
    """One engine, over all the processes that it has been."""

    def __init__(self, name: str, device: str, gpu: Gpu | None = None) -> None:
        """Args: device: what it is told to use. gpu: which of them that is."""
        self.name = name
        self.device = device
        self.gpu = gpu
        self.child: Child | None = None
        self.facts: Body = {}
        self.problem: str | None = "is starting"
        self.restarts = Restarts()
        self.measured: tuple[Child | None, float] = (None, 0.0)
        """A process, and the seconds of CPU time of it that are counted."""
        self.canary_at = 0.0
        self.canary: asyncio.Task[None] | None = None


class FrontChild:
    """One front, over all the processes that it has been. The agent is one too, without sockets: the last."""

    def __init__(self, index: int, *, agent: bool = False) -> None:
        self.index = index
        self.agent = agent
        self.name = "agent" if agent else f"front {index}"
        self.child: Child | None = None
        self.next: Child | None = None
        """A process that was started ahead of time."""
        self.starting: asyncio.Task[None] | None = None
        """Starts it, or another process in the place of one that ended."""
        self.slab: Segment | None = None
        self.prepared: set[int] = set()
        self.listens = False
        self.problem: str | None = "is starting"
        self.restarts = Restarts()
        self.measured: tuple[Child | None, float] = (None, 0.0)
        """See `Engine.measured`."""

    def tell(self, name: str, body: Body | None = None, descriptors: Sequence[int] = ()) -> None:
        """News for it, if it is there."""
        if self.child is not None:
            self.child.channel.tell(name, body, descriptors)


class Supervisor:
    """Starts, joins and watches the children; implements `Staff`. Used from the event loop's thread."""

    def __init__(self, config: Config, metrics: Metrics, changed: Callable[[], None], auditor: Auditor) -> None:
        """Args: changed: told when `problems` are others than before. auditor: told what calls there were."""
        self._config = config
        self._changed = changed
        self._auditor = auditor
        self._fold = Fold(metrics)
        self._metrics = metrics
        self.fronts = how_many_fronts(config)
        self._fronts = [FrontChild(index) for index in range(self.fronts)]
        if config.orchestrator.has_agent:
            self._fronts.append(FrontChild(self.fronts, agent=True))
        self._limits = SharedLimits.create(self.fronts + 1)  # a reload may bring an agent
        self._link: Body = {}
        """How the agent says that the link to the orchestrator is."""
        self._changing_agent = asyncio.Lock()
        self._engines: dict[str, Engine] = {}
        self._deployed: dict[int, Deployed] = {}
        self._early: dict[int, Body] = {}
        self._next = 0
        self._catalog: View[Deployed] | None = None
        self._readiness: Readiness = lambda: (False, {})
        self._news: Body | None = None
        self._sockets: ListeningSockets | None = None
        self._facts: Body = {}
        self._levels: Body = {"level": config.log.level, "own": {}}
        self._shut: set[int] = set()
        self._draining = False  # no front is started any more
        self._stopping = False  # nor an engine
        self._tasks: set[asyncio.Task[Any]] = set()

    # ---- life ----

    async def open(self) -> None:
        """See `Staff.open`: every engine that is wanted from the start is there."""
        self._spawn(self._watch())
        for front in self._fronts:  # what they import takes as long as the engines' start
            front.next = self._front_process(front)
        refused: ApplianceError | None = None
        for engine in _engines(self._config):
            try:
                await _insisting(self._start_engine, engine)
            except DeviceError as error:
                if self._config.engine.device != "auto":
                    raise
                _log.warning("%s is not used: %s", engine.device, error)
                refused = error
            else:
                self._engines[engine.name] = engine
        if any(engine.gpu is not None for engine in self._engines.values()):
            self._spawn(self._look_at_gpus())
        if refused is not None and not self._engines:
            engine = Engine("engine", "cpu")
            await _insisting(self._start_engine, engine)
            engine.facts["reason"] = str(refused)
            self._engines[engine.name] = engine

    async def serve(
        self,
        catalog: View[Any],
        workflows: Workflows,
        certificates: CertificateFiles,
        keys: KeyStore,
        readiness: Readiness,
        sockets: ListeningSockets,
    ) -> Mapping[str, int]:
        """See `Staff.serve`: fronts read workflows, certificates and keys for themselves."""
        self._catalog, self._readiness, self._sockets = catalog, readiness, sockets
        self._changed()
        await asyncio.gather(*(_insisting(self._start_front, front) for front in self._fronts if not front.agent))
        for front in self._fronts:
            if front.agent and front.starting is None:  # we serve with or without it
                front.starting = self._spawn(self._replace_front(front))
        ports: Mapping[str, int] = self._facts["ports"]
        return ports

    def publish(self, ready: bool, models: Mapping[str, bool]) -> None:
        """See `Staff.publish`."""
        if self._catalog is None:
            return
        self._news = {
            "catalog": tell(self._catalog, lambda deployed: deployed.number),
            "ready": ready,
            "models": dict(models),
            "readiness": self._readiness()[1],
        }
        for front in self._fronts:
            front.tell("catalog", self._news)

    async def configure(self, config: Config, keys: KeyStore) -> None:
        """See `Staff.configure`."""
        before, self._config = self._config, config
        if (before.orchestrator, before.placement) != (config.orchestrator, config.placement):
            self._spawn(self._change_agent())
        fronts = [front for front in self._fronts if front.child is not None and front.listens]
        calls = [
            front.child.channel.call("configure", {"config": self._front_config(front)})
            for front in fronts
            if front.child is not None
        ]
        for front, outcome in zip(fronts, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(outcome, ApplianceError):  # what it read a moment after us was not what we read
                raise ConfigError(f"The {front.name} kept its last good state, reload again: {outcome}")

    def refuse_calls(self, unrecorded: bool) -> None:
        """See `Staff.refuse_calls`."""
        for front in self._fronts:
            front.tell("unrecorded", {"unrecorded": unrecorded})

    def set_levels(self, level: str, own: Mapping[str, str]) -> None:
        """See `Staff.set_levels`."""
        self._levels = {"level": level, "own": dict(own)}
        for member in self._members():
            if member.child is not None:
                member.child.channel.tell("levels", self._levels)

    @property
    def in_flight(self) -> int:
        """See `Staff.in_flight`."""
        return int(self._fold.gauge("in_flight_requests"))

    def page(self, opened: bool) -> bytes:
        """See `Staff.page`."""
        return self._fold.page(opened)

    def usage(self) -> Mapping[UsageKey, Amounts]:
        """See `Staff.usage`."""
        return self._fold.usage()

    def counted(self, *names: str, notes: bool = False) -> Mapping[str, Mapping[tuple[str, ...], Counted]]:
        """See `Staff.counted`."""
        return self._fold.counted(*names, notes=notes)

    def problems(self) -> dict[str, str]:
        """See `Staff.problems`."""
        return {member.name: member.problem for member in self._members() if member.problem is not None}

    def describe(self) -> dict[str, object]:
        """See `Staff.describe`."""
        first = next(iter(self._engines.values()), None)
        facts = first.facts if first else {}
        return {
            "mode": "processes",
            "transport": self._facts.get("transport", ""),
            "device": facts.get("device", ""),
            "device_reason": facts.get("reason", ""),
            "onnxruntime": facts.get("onnxruntime", ""),
            "orchestrator": self._link,
            "processes": [
                {
                    "name": member.name,
                    "pid": member.child.process.pid if member.child else 0,
                    "problem": member.problem or "",
                    **({"device": member.facts.get("device", "")} if isinstance(member, Engine) else {}),
                }
                for member in self._members()
            ],
        }

    async def registration(self) -> dict[str, object]:
        """See `Staff.registration`: fronts know what may be called on a model."""
        for front in self._fronts:
            if front.child is not None and front.listens:
                with contextlib.suppress(ChannelClosed):  # the next one knows it as well
                    return await front.child.channel.call("registration")
        raise NotReady("No front is at work; try again.")

    async def drain(self, now: asyncio.Event) -> None:
        """See `Staff.drain`: every front does it for itself; engines work, and are replaced, until the last is done."""
        self._draining = True
        hurry = asyncio.ensure_future(self._hurry(now))
        settings = self._config.shutdown
        fronts = [front for front in self._fronts if front.child is not None and front.listens]
        calls = [asyncio.ensure_future(self._drain_front(front)) for front in fronts]
        if calls:
            await asyncio.wait(calls, timeout=settings.lame_duck_s + 2 * settings.drain_s + _LAST_S)
        hurry.cancel()

    async def stop(self) -> None:
        """See `Staff.stop`."""
        self._draining = self._stopping = True
        for task in self._tasks:
            task.cancel()
        children = [member.child for member in self._members() if member.child is not None]
        children += [front.next for front in self._fronts if front.next is not None]
        for child in children:
            child.channel.close()  # it ends when it hears that
        for child in children:
            await _end(child)
            self._fold.retire(child.name)

    async def _drain_front(self, front: FrontChild) -> None:
        assert front.child is not None, "it is there"
        with contextlib.suppress(ChannelClosed, ApplianceError):
            await front.child.channel.call("drain")

    async def _hurry(self, now: asyncio.Event) -> None:
        await now.wait()
        for front in self._fronts:
            front.tell("now")

    # ---- versions ----

    async def load(self, path: Path, config: BundleConfig, version: VersionFolder) -> Deployed:
        """See `Staff.load`."""
        engines = await self._engines_for(config)
        for engine in engines:
            try:
                return await self._load_on(engine, path, config, version)
            except DeviceError as error:  # no room on this GPU
                if engine is engines[-1]:
                    raise
                _log.info("another GPU is tried: %s", error, extra={"bundle": path.name})
        raise DeviceError("There is no engine to load it.")

    async def _load_on(self, engine: Engine, path: Path, config: BundleConfig, version: VersionFolder) -> Deployed:
        self._next += 1
        request = {
            "number": self._next,
            "path": str(path),
            "config": config_data(config),
            "folder": folder_data(version),
        }
        deployed = Deployed(self, self._next, engine, request)
        try:
            await self._load_first(deployed)
            self._deployed[deployed.number] = deployed
            await self._prepare_everywhere(deployed)
        except BaseException:
            self._deployed.pop(deployed.number, None)
            self._spawn(self._forget(deployed))
            raise
        self._make_available(deployed)
        early = self._early.pop(deployed.number, None)
        if early is not None:
            self._version_changed(early, [])
        return deployed

    async def _engines_for(self, config: BundleConfig) -> list[Engine]:
        """The engines that may load a bundle, the one with the most free memory first.

        Raises: DeviceError: its device cannot be used.
        """
        wanted = config.onnx.device
        engines = list(self._engines.values())
        if wanted in (None, "auto", "gpu"):
            on_gpus = [engine for engine in engines if engine.gpu is not None]
            if wanted == "gpu" and not on_gpus:
                gpu.find("gpu", ())
            if len(on_gpus) > 1:
                free = {each.uuid or str(each.index): each.memory_free or 0 for each in gpu.devices()}
                on_gpus.sort(key=lambda engine: -free.get(engine.device.removeprefix("gpu:"), 0))
            return on_gpus or engines[:1]
        found = None if wanted == "cpu" else gpu.find(str(wanted), gpu.devices())
        device = "cpu" if found is None else f"gpu:{found.uuid or found.index}"
        for engine in engines:
            if engine.device == device or (engine.facts.get("device") == "cpu" and found is None):
                return [engine]
        engine = Engine(f"engine {wanted}", device, found)
        await self._start_engine(engine)
        self._engines[engine.name] = engine
        for front in self._fronts:
            self._join(front, engine)
        return [engine]

    async def _load_in_engine(self, deployed: Deployed) -> None:
        """Load it in its engine as it is now. Raises: BundleInvalid: it cannot be. EngineDied."""
        await self._wait_for(deployed.engine)
        child = deployed.engine.child
        assert child is not None, "waited for"
        try:
            deployed.told = await child.channel.call("load", deployed.request)
            deployed.loaded = deployed.engine.child is child  # else its next process loads it
        except ChannelClosed:
            await child.gone.wait()
            raise EngineDied(child) from None

    async def _load_first(self, deployed: Deployed) -> None:
        """The same for a version that was never loaded. Raises: BundleInvalid: also when the engine died of it."""
        for attempt in range(_CRASHES):
            try:
                await self._load_in_engine(deployed)
                return
            except EngineDied as death:
                # Where it was not the only thing going on, it may have been another's doing: it is tried once more.
                doing = [(activity.number, activity.loads) for activity in death.child.last]
                if doing == [(deployed.number, True)] or attempt == _CRASHES - 1:
                    raise BundleInvalid(
                        f"The engine {death.child.how_it_ended()} while it loaded this model, which is not tried again "
                        "until its files change."
                    ) from None

    async def _wait_for(self, engine: Engine) -> None:
        while engine.child is None or not engine.child.started:
            if self._draining:
                raise Draining
            await asyncio.sleep(_LOOK_S / 4)

    async def _prepare_everywhere(self, deployed: Deployed) -> None:
        """Every front that is there knows it. Raises: ApplianceError: one cannot."""
        fronts = [front for front in self._fronts if front.child is not None and front.listens]
        await asyncio.gather(*(self._prepare(front, deployed) for front in fronts))

    async def _prepare(self, front: FrontChild, deployed: Deployed) -> None:
        child = front.child
        if child is None or deployed.number in front.prepared or deployed.number not in self._deployed:
            return
        front.prepared.add(deployed.number)  # from here on it must be dropped there, however this ends
        body = {**deployed.request, "engine": deployed.engine.name, **deployed.told}
        with contextlib.suppress(ChannelClosed):  # its replacement is told anew
            await child.channel.call("prepare", body)

    def _make_available(self, deployed: Deployed) -> None:
        if not deployed.loaded:
            return  # its engine has ended since: whoever replaces it does this
        for front in self._fronts:
            if deployed.number in front.prepared:
                front.tell("changed", {"number": deployed.number, "models": deployed.told["models"]})
                front.tell("available", {"number": deployed.number})

    async def drop(self, deployed: Deployed) -> None:
        """Every front lets it go, when nobody uses it any more."""
        self._deployed.pop(deployed.number, None)

        async def drop(front: FrontChild) -> None:
            if front.child is not None and deployed.number in front.prepared:
                front.prepared.discard(deployed.number)
                with contextlib.suppress(ChannelClosed, ApplianceError):
                    await front.child.channel.call("drop", {"number": deployed.number})

        await asyncio.gather(*(drop(front) for front in self._fronts))

    def unload(self, deployed: Deployed) -> None:
        """The engine lets it go."""
        self._deployed.pop(deployed.number, None)
        if not self._stopping:
            self._spawn(self._unload(deployed))

    async def _unload(self, deployed: Deployed) -> None:
        self._early.pop(deployed.number, None)
        if deployed.engine.child is not None:
            with contextlib.suppress(ChannelClosed, ApplianceError):
                await deployed.engine.child.channel.call("unload", {"number": deployed.number})

    async def _forget(self, deployed: Deployed) -> None:
        await self.drop(deployed)
        await self._unload(deployed)

    def _version_changed(self, body: Body, descriptors: list[int]) -> None:
        """An engine has measured more of a version."""
        deployed = self._deployed.get(body["number"])
        if deployed is None:
            self._early[body["number"]] = body  # its load is told of in these very moments, or it is on its way out
            return
        deployed.told |= {"models": body["models"], "described": body["described"]}
        for front in self._fronts:
            front.tell("changed", {"number": body["number"], "models": body["models"]})

    def _give_up(self, deployed: Deployed, reason: str) -> None:
        deployed.given_up, deployed.problem = True, reason
        _log.critical("a model is not run any more: %s", reason, extra={"model": deployed.request["path"]})
        for front in self._fronts:
            front.tell("dead", {"number": deployed.number, "reason": reason})

    # ---- engines ----

    async def _start_engine(self, engine: Engine) -> None:
        """Raises: DeviceError: its device cannot be used."""
        child = Child(
            engine.name,
            "appliance.daemon.engine_process",
            {"changed": self._version_changed},
            lambda gone: self._engine_ended(engine, gone),
            gpu.environment(engine.gpu) if engine.gpu else None,
        )
        body = {"config": configuration.as_data(self._config), "device": engine.device, "levels": self._levels}
        try:
            engine.facts = await child.start(body)
        except (ApplianceError, ChannelClosed, OSError) as error:
            child.kill()
            await child.gone.wait()
            if isinstance(error, ApplianceError):
                raise
            raise NeverStarted(f"The {engine.name} did not start: its process {child.how_it_ended()}.") from error
        self._fold.attach(engine.name, child.counts)
        self._show(engine)
        engine.child, engine.problem = child, None
        child.channel.tell("levels", self._levels)  # it may have missed them while it started
        engine.canary_at = time.monotonic() + _CANARY_S
        _log.info("device %s: %s", engine.facts["device"], engine.facts["reason"], extra={"engine": engine.name})

    def _engine_ended(self, engine: Engine, child: Child) -> None:
        if engine.child is not child:
            return  # it never started
        engine.child = None
        engine.problem = "is being replaced"
        self._fold.retire(engine.name)
        if self._stopping:
            return
        self._metrics.worker_restarts.labels(engine.name, child.why_it_ended()).inc()
        _log.critical(
            "the %s %s; it is replaced", engine.name, child.how_it_ended(), extra={"running": len(child.last)}
        )
        for number in {activity.number for activity in child.last if not activity.loads}:
            self._count_crash(number)
        for deployed in self._deployed.values():
            if deployed.engine is engine:
                deployed.loaded = False
                if not deployed.given_up:
                    deployed.problem = "its engine is being replaced"
        self._changed()
        self._spawn(self._replace_engine(engine))

    def _count_crash(self, number: int) -> None:
        deployed = self._deployed.get(number)
        if deployed is None or deployed.given_up:
            return
        now = time.monotonic()
        deployed.crashes.append(now)
        if len(deployed.crashes) == _CRASHES and now - deployed.crashes[0] < _CRASH_WINDOW_S:
            self._give_up(
                deployed,
                f"its runs crashed the engine {_CRASHES} times within {_CRASH_WINDOW_S / 60:.0f} minutes; mend the "
                "model, or touch its files to have it tried again",
            )

    async def _replace_engine(self, engine: Engine) -> None:
        while not self._stopping:
            await asyncio.sleep(engine.restarts.pause_s())
            try:
                await self._start_engine(engine)
                break
            except (ApplianceError, OSError) as error:
                engine.problem = f"cannot be started: {error}"
                _log.critical("the %s cannot be started again: %s", engine.name, error)
                self._changed()
        for front in self._fronts:
            self._join(front, engine)
        child = engine.child
        for deployed in [each for each in self._deployed.values() if each.engine is engine and not each.given_up]:
            if engine.child is not child or self._stopping:
                return  # gone again: whoever replaces it does the rest
            if deployed.number not in self._deployed:
                continue  # it was removed meanwhile
            try:
                await self._load_in_engine(deployed)
            except EngineDied:
                self._count_crash(deployed.number)
                return  # as above
            except ApplianceError as error:
                if deployed.number in self._deployed:
                    self._give_up(deployed, str(error))
                continue
            if not deployed.loaded:
                return  # as above
            deployed.problem = None
            self._make_available(deployed)
            self._changed()
        self._changed()

    # ---- fronts ----

    async def _start_front(self, front: FrontChild) -> None:
        """Raises: ConfigError: what the operator must change."""
        child, front.next = front.next or self._front_process(front), None
        config = self._config
        order = max(26, (4 * memory_for_requests(config) - 1).bit_length())
        front.prepared = set()
        try:
            front.slab = Segment.create(f"{front.name} slab", Slab.size_for(order))
            body = {"config": self._front_config(front), "index": front.index, "levels": self._levels}
            await child.start(body, front.slab, self._limits.segment)
            front.child = child
            child.channel.tell("levels", self._levels)  # as an engine
            front.tell("unrecorded", {"unrecorded": self._auditor.refuses})
            self._fold.attach(front.name, child.counts)
            self._show(front)
            for engine in self._engines.values():
                self._join(front, engine)
            while config is not self._config:  # it was reloaded meanwhile
                config = self._config
                await child.channel.call("configure", {"config": self._front_config(front)})
            tried: set[int] = set()
            while missing := [each for number, each in self._deployed.items() if number not in tried]:
                for deployed in missing:
                    tried.add(deployed.number)
                    try:
                        await self._prepare(front, deployed)
                    except ApplianceError as error:
                        # Its files have changed since: this front does without it until it is loaded anew.
                        _log.error("%s cannot serve %s: %s", front.name, deployed.request["path"], error)
                    if front.child is not child:
                        raise ChannelClosed
            front.listens = True  # from here on it hears of every new version as the others do
            for deployed in self._deployed.values():
                if deployed.given_up:
                    front.tell("dead", {"number": deployed.number, "reason": deployed.problem})
                elif deployed.loaded:
                    front.tell("available", {"number": deployed.number})
            if self._news is not None:
                front.tell("catalog", self._news)
            names, sockets = ([], []) if front.agent else self._own_sockets(front)
            facts = await child.channel.call("listen", {"sockets": names}, [sock.fileno() for sock in sockets])
            self._facts = facts or self._facts
            if front.child is not child:  # it ended in this very moment
                raise ChannelClosed
        except (ApplianceError, ChannelClosed, OSError) as error:
            front.listens = False
            child.kill()
            await child.gone.wait()
            if front.slab is not None:
                front.slab.close()
                front.slab = None
            if isinstance(error, ApplianceError):
                raise
            raise NeverStarted(f"The {front.name} did not start: its process {child.how_it_ended()}.") from error
        front.problem = None

    def _front_config(self, front: FrontChild) -> Body:
        """The configuration for a front: of what each has for itself, its part."""
        config = self._config
        data = configuration.as_data(config)
        data["cache"]["size"] = 0 if front.agent else config.cache.size // self.fronts
        data["connections"]["max"] = -(-config.connections.max // self.fronts)
        data["log"]["rate"] = max(1, config.log.rate // self.fronts)
        data["engine"]["decode_threads"] = config.engine.decode_threads or max(1, usable_cpus() // self.fronts)
        return data

    def _front_process(self, front: FrontChild) -> Child:
        listeners: dict[str, Listener] = {
            "shut": lambda body, descriptors: self._front_shut(front),
            "audit": lambda body, descriptors: self._auditor.take(body),
            "orchestrator": lambda body, descriptors: self._link_changed(body),
        }
        module = "appliance.daemon.agent_process" if front.agent else "appliance.daemon.front_process"
        return Child(front.name, module, listeners, lambda gone: self._front_ended(front, gone))

    def _own_sockets(self, front: FrontChild) -> tuple[list[str], list[socket.socket]]:
        """The sockets that this front serves: of each port and address its own, or the one that all share."""
        assert self._sockets is not None, "ports are bound"
        names, found = [], []
        for name, sockets in self._sockets.by_name.items():
            places: dict[object, list[socket.socket]] = {}
            for sock in sockets:
                places.setdefault(sock.getsockname(), []).append(sock)
            for own in places.values():
                mine = own[front.index :: self.fronts] or own[-1:]
                names += [name] * len(mine)
                found += mine
        return names, found

    def _front_shut(self, front: FrontChild) -> None:
        """It accepts no more; when none does, nobody shall wait in the ports' queues."""
        self._shut.add(front.index)
        open_ones = {each.index for each in self._fronts if each.child is not None and not each.agent}
        if self._sockets is not None and self._shut >= open_ones:
            self._sockets.close()

    def _front_ended(self, front: FrontChild, child: Child) -> None:
        if front.child is not child:
            return  # it never started
        was_at_work = front.problem is None
        front.child, front.listens, front.problem = None, False, "is being replaced"
        self._link = {} if front.agent else self._link
        gauges = self._fold.retire(front.name)
        self._limits.clear(front.index)
        if front.slab is not None:
            front.slab.close()
            front.slab = None
        if self._stopping or front not in self._fronts:
            return
        # What the agent worked on is not lost: the orchestrator hands it out again.
        lost = 0 if front.agent else int(gauges.get(("in_flight_requests", ()), 0))
        self._metrics.lost.inc(lost)
        self._metrics.worker_restarts.labels(front.name, child.why_it_ended()).inc()
        _log.critical("the %s %s", front.name, child.how_it_ended(), extra={"in_flight": lost})
        self._changed()
        if was_at_work and not self._draining:  # else whoever starts it goes on with that
            front.starting = self._spawn(self._replace_front(front))

    async def _replace_front(self, front: FrontChild) -> None:
        while not (self._stopping or self._draining) and front in self._fronts:
            await asyncio.sleep(front.restarts.pause_s())
            try:
                await self._start_front(front)
                break
            except (ApplianceError, OSError) as error:
                front.problem = f"cannot be started: {error}"
                _log.critical("the %s cannot be started again: %s", front.name, error)
        self._changed()

    # ---- the agent ----

    async def _change_agent(self) -> None:
        """Another orchestrator, or another place there: the agent ends as at a stop, and another one begins."""
        async with self._changing_agent:
            for front in [front for front in self._fronts if front.agent]:
                self._fronts.remove(front)
                if front.starting is not None:  # it is not begun again, but one that has begun goes on to its end
                    await asyncio.wait({front.starting})
                child = front.child or front.next
                if child is front.child is not None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._drain_front(front), self._config.shutdown.drain_s + _LAST_S)
                if child is not None:
                    await _end(child)
            if self._config.orchestrator.has_agent and not self._draining:
                front = FrontChild(self.fronts, agent=True)
                self._fronts.append(front)
                if self._catalog is not None:  # else `serve` begins it
                    front.starting = self._spawn(self._replace_front(front))
            self._changed()

    def _link_changed(self, body: Body) -> None:
        self._link = body

    def _join(self, front: FrontChild, engine: Engine) -> None:
        """A stream between a front and an engine, if both are there."""
        if front.child is None or engine.child is None or front.slab is None:
            return
        ours, theirs = pair()
        front.tell("engine", {"name": engine.name}, [ours.fileno()])
        engine.child.channel.tell("front", {"index": front.index}, [theirs.fileno(), front.slab.descriptor])
        ours.close()
        theirs.close()

    # ---- watching ----

    async def _watch(self) -> None:
        """Replace who shows no sign of life."""
        looked_at = measured_at = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            late_s, looked_at = time.monotonic() - looked_at - _LOOK_S, time.monotonic()
            silence_s = self._config.processes.engine_silence_s
            for member in self._members():
                limit_s = silence_s if isinstance(member, Engine) else _FRONT_SILENCE_S
                child = member.child
                if child is not None and late_s > _LATE_S:
                    child.patient_from = looked_at
                if child is not None and child.started and (child.silent_s > limit_s or child.is_stuck()):
                    _log.critical("the %s shows no sign of life for %.1f s; it is ended", member.name, child.silent_s)
                    child.kill("silent")
                if isinstance(member, Engine) and child is not None and time.monotonic() > member.canary_at:
                    member.canary_at = time.monotonic() + _CANARY_S
                    if member.canary is None or member.canary.done():
                        member.canary = self._spawn(self._run_canary(member, child))
            if looked_at - measured_at > _MEASURE_S:
                measured_at = looked_at
                self._measure()

    def _show(self, member: "Engine | FrontChild") -> None:
        """Have its process among the metrics."""
        metrics = self._metrics
        metrics.watch(
            metrics.worker_up.labels(member.name),
            lambda: float(member.problem is None) if member in self._members() else math.nan,  # an agent may be let go
        )
        metrics.watch(
            metrics.worker_memory.labels(member.name),
            lambda: member.child.resident_bytes() if member.child is not None else math.nan,
        )
        metrics.worker_cpu.labels(member.name)
        for reason in WHY:  # an alert on growth needs to see it at nought before
            metrics.worker_restarts.labels(member.name, reason)

    def _measure(self) -> None:
        """Count the CPU time of the children's processes."""
        for member in self._members():
            child = member.child
            if child is None:
                continue
            taken = child.cpu_seconds()
            if child is not member.measured[0]:
                member.measured = (child, 0.0)
            self._metrics.worker_cpu.labels(member.name).inc(max(0.0, taken - member.measured[1]))
            member.measured = (child, taken)

    async def _look_at_gpus(self) -> None:
        """Show what the sensors of our GPUs say."""
        while True:
            readings = await asyncio.to_thread(gpu.readings)
            ours = {engine.gpu.uuid for engine in self._engines.values() if engine.gpu is not None}
            gauges.show_gpus(self._metrics, readings, ours)
            await asyncio.sleep(_GPU_LOOK_S)

    async def _run_canary(self, engine: Engine, child: Child) -> None:
        """A run on the device, behind as many of the longest runs as may be before it; without it the engine ends."""
        patience_s = self._config.processes.engine_silence_s + _CANARY_RUNS * child.board.longest_run_s
        try:
            async with asyncio.timeout(patience_s):
                await child.channel.call("canary")
        except ChannelClosed:
            return
        except (TimeoutError, ApplianceError) as error:
            why = f"took over {patience_s:.0f} s" if isinstance(error, TimeoutError) else f"failed: {error}"
            _log.critical("the canary run of the %s %s; it is ended", engine.name, why)
            child.kill("canary")

    def _members(self) -> "list[Engine | FrontChild]":
        return [*self._engines.values(), *self._fronts]

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.critical("a task of the supervisor failed", exc_info=task.exception())


async def _end(child: Child) -> None:
    """End a child; return when it is gone."""
    child.channel.close()  # it ends when it hears that
    try:
        await asyncio.wait_for(child.gone.wait(), 1.0)
    except TimeoutError:
        child.kill()
        await child.gone.wait()


async def _insisting(start: Callable[[_Member], Awaitable[None]], member: _Member) -> None:
    """Start a child for the first time; one that ends meanwhile, whoever ended it, is started once more."""
    try:
        await start(member)
    except NeverStarted as error:
        _log.critical("%s It is started once more.", error)
        await start(member)


def how_many_fronts(config: Config) -> int:
    """How many fronts, unless the configuration says."""
    if not native(config):
        return 1  # grpcio binds its ports itself
    if config.processes.fronts:
        return config.processes.fronts
    share = 2 if accelerators() and config.engine.device != "cpu" else 4
    return max(1, min(_MOST_FRONTS, usable_cpus() // share, usable_memory() // _FRONT_MEMORY))


def _engines(config: Config) -> list[Engine]:
    """The engines that are there from the start: one for every GPU that is meant, else one for the CPUs.

    Raises: DeviceError: there is no such GPU.
    """
    device = config.engine.device
    gpus = gpu.devices() if device != "cpu" else ()
    if not device.startswith("gpu") and not gpus:
        return [Engine("engine", device)]
    try:
        meant = gpus if gpus and device in ("auto", "gpu") else [gpu.find(device, gpus)]
    except DeviceError as error:
        raise DeviceError(
            f'engine.device is "{device}": {error} Name another, or set engine.device = "cpu".'
        ) from error
    names = ["engine"] if len(meant) == 1 else [f"engine gpu:{each.index}" for each in meant]
    return [Engine(name, f"gpu:{each.uuid or each.index}", each) for name, each in zip(names, meant, strict=True)]
