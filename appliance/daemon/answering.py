"""A child that answers for models which run in the engines' processes: its copy of the catalog, its streams to them."""

import asyncio
import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appliance.api.service import Api
from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.catalog.view import Mirror, Running
from appliance.catalog.workflows import Workflows
from appliance.core import config as configuration
from appliance.core.channel import Body, Channel
from appliance.core.config import Config
from appliance.core.metrics import Metrics
from appliance.core.shared import Segment
from appliance.core.sharing import SharedLimits
from appliance.daemon import child
from appliance.daemon.checks import check_urls
from appliance.engine.board import Board
from appliance.engine.plan import Plan
from appliance.engine.remote import EngineLink, RemoteModel
from appliance.engine.session import Device
from appliance.engine.slab import FrontSlab
from appliance.engine.transport import Batching, LoadRequest
from appliance.orchestrator.desired import as_data, desired
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool, Servable

_log = logging.getLogger(__name__)

_REPORT_S = 1.0


class Answering:
    """What fronts and the agent have in common: everything but whom they answer. Subclasses say that."""

    _api: Api
    _config: Config
    _metrics: Metrics
    _limits: SharedLimits
    _workflows: Workflows

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(
            sock,
            {
                "start": self._start,
                "prepare": self._prepare,
                "drop": self._drop,
                "listen": self._listen,
                "configure": self._configure,
                "registration": self._registration,
                "drain": self._drain,
            },
            {
                "engine": self._connect,
                "available": self._available,
                "dead": self._dead,
                "changed": self._version_changed,
                "catalog": self._take_catalog,
                "levels": child.take_levels,
                "unrecorded": self._refuse_calls,
                "now": lambda body, descriptors: self._now.set(),
            },
            on_close=lambda: child.leave(0),
        )
        self._now = asyncio.Event()
        self._catalog: Mirror[Servable] = Mirror()
        self._engines: dict[str, EngineLink] = {}
        self._running: dict[int, Running[Servable]] = {}
        self._preparing: dict[int, asyncio.Task[Any]] = {}
        self._models: dict[int, list[RemoteModel]] = {}
        self._tasks: list[asyncio.Task[Any]] = []

    # ---- what a subclass does ----

    def _open(self) -> None:
        """Make what answers, `_api` among it; configuration, catalog, metrics and limits are there.

        Raises: ConfigError.
        """
        raise NotImplementedError

    async def _listen(self, body: Body, descriptors: list[int]) -> Body:
        """Answer from now on. Raises: ConfigError."""
        raise NotImplementedError

    async def _configure(self, body: Body, descriptors: list[int]) -> None:
        """Take over a configuration. Raises: ApplianceError: nothing of it was taken over."""
        raise NotImplementedError

    async def _drain(self, body: Body, descriptors: list[int]) -> None:
        """Answer what was accepted, and nothing more."""
        raise NotImplementedError

    def _take_catalog(self, body: Body, descriptors: list[int]) -> None:
        """What is served, and whether we are ready, changed."""
        self._catalog.take(body["catalog"], self._running)

    async def _registration(self, body: Body, descriptors: list[int]) -> Body:
        """What the orchestrator shall know of us. Raises: ConfigError: we are enrolled nowhere."""
        return as_data(desired(self._config, self._catalog))

    # ---- life ----

    async def _start(self, body: Body, descriptors: list[int]) -> None:
        """Everything but answering. Raises: ConfigError."""
        config = configuration.of_data(body["config"])
        self._config = config
        child.set_up_log(config.log, body["levels"])
        board, metrics, slab, limits = descriptors
        self._board = Board(Segment.attach(board))
        self._metrics = Metrics(Segment.attach(metrics), config.metrics)
        self._slab = FrontSlab(Segment.attach(slab))
        self._limits = SharedLimits.attach(limits, body["index"])
        self._pool = DecodePool(config.engine.decode_threads)
        check_urls(config)
        self._workflows = Workflows(config.catalog, self._catalog)
        self._open()
        self._tasks += [asyncio.create_task(work) for work in (self._beat(), self._report(), self._workflows.run())]

    async def _beat(self) -> None:
        """Show that the loop turns, and what is watched."""
        while True:
            self._board.turned()
            self._metrics.sample()
            await asyncio.sleep(child.HEARTBEAT_S)

    # ---- the audit log ----

    async def _report(self) -> None:
        """Once a second: calls to be recorded."""
        while True:
            await asyncio.sleep(_REPORT_S)
            self._tell_calls()

    def _tell_calls(self) -> None:
        """Tell what calls there were since the last time."""
        told = self._api.trail.take()
        if told is not None:
            self._channel.tell("audit", told)

    def _refuse_calls(self, body: Body, descriptors: list[int]) -> None:
        """Calls cannot be recorded and must be, or can again."""
        self._api.unrecorded = body["unrecorded"]

    # ---- engines and models ----

    def _connect(self, body: Body, descriptors: list[int]) -> None:
        """The stream to an engine; one that took another's place has its name."""
        (stream,) = descriptors
        self._engine(body["name"]).connect(socket.socket(fileno=stream))

    def _engine(self, name: str) -> EngineLink:
        """That engine, which may not be there now."""
        if name not in self._engines:
            self._engines[name] = EngineLink(self._slab, self._config.engine.queue_rows)
        return self._engines[name]

    def _available(self, body: Body, descriptors: list[int]) -> None:
        """A version's graphs are loaded in the engine that we are connected to now."""
        for model in self._models.get(body["number"], ()):
            model.available()

    def _dead(self, body: Body, descriptors: list[int]) -> None:
        """A version cannot be run any more."""
        for model in self._models.get(body["number"], ()):
            model.give_up(body["reason"])

    def _version_changed(self, body: Body, descriptors: list[int]) -> None:
        """The engine has measured more of a version."""
        for model, told in zip(self._models.get(body["number"], ()), body["models"], strict=False):
            model.batching = Batching(**told["batching"])

    async def _prepare(self, body: Body, descriptors: list[int]) -> None:
        """Have all of a version that is not in the engine: tasks, tokenizers, concepts. Raises: BundleInvalid."""
        number = body["number"]
        task = asyncio.current_task()
        assert task is not None, "every call has one"
        self._preparing[number] = task
        try:
            await self._prepare_version(number, body)
        finally:
            del self._preparing[number]

    async def _prepare_version(self, number: int, body: Body) -> None:
        engine = _Told(self._engine(body["engine"]), body["models"])
        told = iter(body["plans"])

        def make_plan(bundle: Path, config: BundleConfig, version: VersionFolder, concepts: int) -> Plan:
            return Plan.of(next(told))

        limits = self._config.limits
        loaded = await servable.load(*child.place_of(body), engine, self._pool, self._metrics, limits, make_plan)
        running = Running(loaded)
        running.free.set()
        self._running[number], self._models[number] = running, engine.models

    async def _drop(self, body: Body, descriptors: list[int]) -> None:
        """Let a version go, when nobody uses it any more."""
        preparing = self._preparing.get(body["number"])
        if preparing is not None:  # its load was given up meanwhile
            await asyncio.wait({preparing})
        running = self._running.pop(body["number"], None)
        models = self._models.pop(body["number"], [])
        if running is not None:
            await running.free.wait()
            await running.servable.drain()
            running.servable.close()
        for model in models:
            model.close()


class _Told:
    """An engine whose graphs are loaded already, in another process: gives them in the order they were loaded in."""

    def __init__(self, engine: EngineLink, models: list[Mapping[str, Any]]) -> None:
        self._engine = engine
        self._left = list(models)
        self.models: list[RemoteModel] = []
        self.device = Device(**models[0]["device"])

    async def load(self, request: LoadRequest) -> RemoteModel:
        """See `Engine.load`."""
        told = self._left.pop(0)
        model = RemoteModel(self._engine, told["handle"], told)
        self.models.append(model)
        return model
