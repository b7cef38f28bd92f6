"""The process of an engine: sessions and batchers on one device, for all fronts. It may die, and is replaced alone."""

import asyncio
import logging
import socket
import time
from dataclasses import replace
from pathlib import Path

from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.core import config as configuration
from appliance.core.channel import Body, Channel
from appliance.core.config import Config
from appliance.core.errors import NotReady
from appliance.core.metrics import Metrics
from appliance.core.shared import Segment
from appliance.daemon import child
from appliance.engine import plan as plans
from appliance.engine import session
from appliance.engine.board import DEVICE_GONE, Board, VersionBoard
from appliance.engine.plan import Plan
from appliance.engine.remote import describe
from appliance.engine.server import FrontLink
from appliance.engine.slab import Slab
from appliance.engine.transport import LoadRequest
from appliance.engine.worker import LocalEngine, LocalModel
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool, Servable

_log = logging.getLogger(__name__)

_SAMPLE_S = 1.0

_HANDLES = 256
"""Graphs that one version may have: its methods are fewer."""


class EngineProcess:
    """Answers the supervisor, and serves fronts."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(
            sock,
            {"start": self._start, "load": self._load, "unload": self._unload, "canary": self._canary},
            {"front": self._front, "levels": child.take_levels},
            on_close=lambda: child.leave(0),
        )
        self._models: dict[int, LocalModel] = {}
        self._servables: dict[int, Servable] = {}
        self._told: dict[int, Body] = {}
        self._loading: dict[int, asyncio.Task[Servable]] = {}
        self._fronts: set[FrontLink] = set()
        self._pool = DecodePool(1)

    async def _start(self, body: Body, descriptors: list[int]) -> Body:
        """Find the device. Raises: DeviceError."""
        config: Config = configuration.of_data(body["config"])
        self._config = config
        child.set_up_log(config.log, body["levels"])
        self._board = Board(Segment.attach(descriptors[0]))
        self._metrics = Metrics(Segment.attach(descriptors[1]), config.metrics)
        settings = config.engine.model_copy(update={"device": body["device"]})
        self._engine = await asyncio.to_thread(
            LocalEngine, settings, self._metrics, config.catalog.state_dir, _poisoned
        )
        self._plans = plans.cache_in(config.catalog.state_dir)
        self._beating = asyncio.create_task(self._beat())
        device = self._engine.device
        return {"device": str(device), "reason": device.reason, "onnxruntime": session.version()}

    async def _beat(self) -> None:
        """Show that the loop turns, and leave when a model cannot be run any more: only a new process can."""
        sampled = 0.0
        while True:
            self._board.turned()
            now = time.monotonic()
            if now - sampled > _SAMPLE_S:
                sampled = now
                self._metrics.sample()
                for model in self._models.values():
                    if model.death is not None:
                        _log.critical("the engine gives up, to be replaced: %s", model.death)
                        child.leave(DEVICE_GONE)
                self._tell_changes()
            await asyncio.sleep(child.HEARTBEAT_S)

    def _tell_changes(self) -> None:
        """Have everybody know what was measured since a version was loaded."""
        for number, told in self._told.items():
            now = self._described(number)
            if now != told:
                self._told[number] = now
                self._channel.tell("changed", {"number": number, **now})

    def _described(self, number: int) -> Body:
        """What fronts and operators must know of a version that is loaded."""
        own = {handle: model for handle, model in self._models.items() if handle // _HANDLES == number}
        return {
            "models": [{"handle": handle, **describe(model)} for handle, model in own.items()],
            "described": self._servables[number].described(),
        }

    def _front(self, body: Body, descriptors: list[int]) -> None:
        """A front's stream and slab."""
        stream, slab = descriptors
        link = FrontLink(socket.socket(fileno=stream), Slab(Segment.attach(slab)), self._models, self._fronts.discard)
        self._fronts.add(link)

    async def _load(self, body: Body, descriptors: list[int]) -> Body:
        """Load a version. Returns: what fronts must know of it. Raises: BundleInvalid, DeviceError."""
        number: int = body["number"]
        engine = _Numbered(self._engine, number, VersionBoard(self._board, number))
        recorded: list[Plan] = []

        def make_plan(bundle: Path, config: BundleConfig, version: VersionFolder, concepts: int) -> Plan:
            plan = plans.make_plan(bundle, config, version, concepts, self._plans)
            recorded.append(plan)
            return plan

        place = self._board.begin(number, loads=True)
        try:
            loading = self._loading[number] = asyncio.create_task(
                servable.load(*child.place_of(body), engine, self._pool, self._metrics, self._config.limits, make_plan)
            )
            loaded = await loading
        except asyncio.CancelledError:
            raise NotReady("Nobody wants this version any more.") from None
        finally:
            self._loading.pop(number, None)
            self._board.end(place)
        self._servables[number] = loaded
        self._models.update(engine.models)
        self._show(number)
        self._told[number] = self._described(number)
        return {"plans": [plan.described() for plan in recorded], **self._told[number]}

    async def _unload(self, body: Body, descriptors: list[int]) -> None:
        """Let a version go: no front asks for it any more."""
        loading = self._loading.get(body["number"])
        if loading is not None:
            loading.cancel()
            await asyncio.wait({loading})
        loaded = self._servables.pop(body["number"], None)
        self._told.pop(body["number"], None)
        if loaded is None:
            return
        await loaded.drain()
        for handle in [handle for handle in self._models if handle // _HANDLES == body["number"]]:
            del self._models[handle]
        loaded.close()
        for gauge in (self._metrics.queue_rows, self._metrics.gpu_model_memory):
            gauge.clear()
        for number in self._servables:
            self._show(number)

    def _show(self, number: int) -> None:
        """Have the gauges of a version, until these are cleared."""
        loaded = self._servables[number]
        servable.watch_queue(loaded, self._metrics)
        own = (model for handle, model in self._models.items() if handle // _HANDLES == number)
        taken = sum(model.gpu_memory or 0 for model in own)
        if taken:
            labels = (loaded.key.model_id, loaded.version, loaded.model.device.uuid)
            self._metrics.gpu_model_memory.labels(*labels).set(taken)

    async def _canary(self, body: Body, descriptors: list[int]) -> None:
        """Run something small on the device. Raises: ApplianceError: it does not."""
        await asyncio.to_thread(session.canary, self._engine.device)


def _poisoned(reason: str) -> None:
    """The device is lost to this process, and what it would compute is worth nothing: leave, to be replaced."""
    _log.critical("the engine gives up, to be replaced: %s", reason)
    child.leave(DEVICE_GONE)


class _Numbered:
    """The engine, as one load sees it: gives its graphs handles, the same ones in every process that loads it."""

    def __init__(self, engine: LocalEngine, number: int, board: VersionBoard) -> None:
        self._engine = engine
        self._number = number
        self._board = board
        self.device = engine.device
        self.models: dict[int, LocalModel] = {}

    async def load(self, request: LoadRequest) -> LocalModel:
        """See `Engine.load`."""
        if len(self.models) == _HANDLES:
            raise NotReady(f"A version may have {_HANDLES} graphs.")
        model = await self._engine.load(replace(request, board=self._board))
        self.models[self._number * _HANDLES + len(self.models)] = model
        return model


def main() -> None:
    """The process's life."""
    child.run("engine", EngineProcess)


if __name__ == "__main__":
    main()
