"""The engine inside this process: sessions, and a batcher with its own thread for each."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from appliance.core.config import Engine as EngineSettings
from appliance.core.errors import BundleInvalid, DeviceError, InferenceFailed
from appliance.core.machine import usable_cpus
from appliance.core.metrics import Metrics
from appliance.core.types import Array
from appliance.engine import probes, tensorrt
from appliance.engine.admission import Admission, Content, content_of
from appliance.engine.batcher import Batcher, Outcome, RunRecord
from appliance.engine.inline import LONGEST_RUN_S, TURN_S, InlineLane, Waiter, Watchdog
from appliance.engine.session import Device, Session, TensorSpec, resolve_device, version
from appliance.engine.tensorrt import Compiled
from appliance.engine.transport import Batching, LoadRequest

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class LocalModel:
    """A session with its batcher and, if its runs are short, its inline lane; implements `LoadedModel`."""

    def __init__(
        self, session: Session, batcher: Batcher, lane: InlineLane | None, device: Device, batching: Batching
    ) -> None:
        self._batcher = batcher
        self._lane = lane
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.providers = session.providers
        self.device = device
        self.batching = batching

    @property
    def death(self) -> str | None:
        """Why the worker thread died, or None."""
        return self._batcher.death

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue now."""
        return self._batcher.waiting_rows + (self._lane.waiting_rows if self._lane else 0)

    def prompt(self, rows: int) -> bool:
        """Whether so many rows that are submitted now are run soon, on the loop's own thread."""
        return self._lane is not None and self._lane.takes(rows)

    def submit(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], deadline: float | None, principal: str
    ) -> "asyncio.Future[Outcome]":
        """Run rows inline if that is quick, else queue them; see `Batcher.submit`."""
        if self._lane is not None:
            count = len(next(iter(feeds.values())))
            if self._lane.takes(count):
                return self._lane.submit(feeds, outputs, count, deadline, principal)
        return self._batcher.submit(feeds, outputs, deadline, principal)

    def submit_prompt(
        self,
        waiter: Waiter,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        rows: int,
        deadline: float | None,
        principal: str,
    ) -> None:
        """Run rows inline; `prompt` has just said yes to them. The waiter is told once, later than now."""
        assert self._lane is not None, "not prompt"
        self._lane.submit_for(waiter, feeds, outputs, rows, deadline, principal)

    async def drain(self) -> None:
        """Return when everything accepted has ended."""
        if self._lane is not None:
            await self._lane.wait_idle()
        await self._batcher.wait_idle()

    def close(self) -> None:
        """Answer what waits; the session goes when the worker lets go of it."""
        self._batcher.close()


class LocalEngine:
    """Loads graphs into this process; implements `Engine`."""

    def __init__(
        self,
        settings: EngineSettings,
        metrics: Metrics,
        state_dir: Path | None = None,
        on_poison: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Find the device.

        Args:
            state_dir: where footprints and TensorRT's engines are; None: nowhere.
            on_poison: called on a run's thread when this process can use its GPU no more; it should end the process.
        Raises:  DeviceError: the device is required and cannot be used.
        """
        self.device = resolve_device(settings.device)
        self._threads = settings.threads or usable_cpus()
        self._queue_rows = settings.queue_rows
        self._gpu_memory = settings.gpu_memory
        self._cuda_graphs = settings.cuda_graphs
        self._state_dir = state_dir
        self._on_poison = on_poison
        self._admission = Admission(state_dir, settings.gpu_headroom)
        self._load_timeout_s = settings.load_timeout_s
        self._metrics = metrics
        self._watchdog = Watchdog()

    async def load(self, request: LoadRequest) -> LocalModel:
        """Load, probe and warm up a graph; see `Engine.load`."""
        device = self.device if request.device in (None, "auto") else resolve_device(request.device or "auto")
        loading = _Loading()
        try:
            async with asyncio.timeout(self._load_timeout_s):
                session, batching = await _on_own_thread(lambda: self._admitted(request, device, loading))
                loading.succeeded()
        except TimeoutError as error:
            raise BundleInvalid(
                f"The model was not loaded and warmed up within {self._load_timeout_s:g} s (engine.load_timeout_s)."
            ) from error
        finally:
            loading.end()
        on_run = self._observer(request.name)
        batcher = Batcher(
            session,
            max_rows=batching.max_rows,
            queue_rows=self._queue_rows,
            separate=batching.mode == "separate",
            whole=batching.mode == "whole",
            pad=device.kind == "gpu",
            on_run=on_run,
            on_death=lambda reason: _log.critical("model is not ready any more", extra=_fields(request, reason)),
        )
        lane = None
        if batching.inline_rows:
            lane = InlineLane(
                session,
                batcher,
                self._watchdog,
                batching.inline_rows,
                on_run,
                lambda reason: _log.warning("runs have their own thread from now on", extra=_fields(request, reason)),
            )
        return LocalModel(session, batcher, lane, device, batching)

    def _admitted(self, request: LoadRequest, device: Device, loading: "_Loading") -> tuple[Session, Batching]:
        """The slow part, on a thread of its own. On a GPU: if it fits, and then measured.

        Raises: DeviceError: it does not fit.
        """
        if device.kind == "cpu":
            return self._prepare(request, device, loading, None)
        try:
            content = content_of(request.plan)
        except OSError as error:
            raise BundleInvalid(f"{request.plan.file} cannot be read: {error.strerror}.") from error
        name = ":".join(request.name)
        compiled = self._compiled(content, device)
        if compiled is not None and tensorrt.covers(compiled, request.examples):
            rows = min(request.max_rows or compiled.max_rows, compiled.max_rows)
            try:
                with self._admission.load(content, device, "tensorrt", name):
                    session, batching = self._prepare(replace(request, max_rows=rows), device, loading, compiled)
                    session.settle()
                    return session, batching
            except (BundleInvalid, DeviceError) as error:
                _log.warning("TensorRT's engine cannot be used, CUDA serves", extra=_fields(request, str(error)))
        with self._admission.load(content, device, "cuda", name):
            session, batching = self._prepare(request, device, loading, None)
            graphs = self._cuda_graphs if request.plan.cuda_graphs is None else request.plan.cuda_graphs
            if graphs and batching.mode == "rows":
                found = session.capture(request.served, _batches(request, batching.max_rows))
                _log.info("CUDA graphs were tried", extra=_fields(request, found))
            session.settle()
            return session, batching

    def _compiled(self, content: Content, device: Device) -> Compiled | None:
        """TensorRT's engine for that graph on this GPU, if one was built."""
        try:
            folder = self.engine_folder(content, device)
        except OSError:  # no TensorRT here
            return None
        return tensorrt.find(folder) if folder else None

    def engine_folder(self, content: Content, device: Device) -> Path | None:
        """Where TensorRT's engine for that graph is or would be; None without a state folder or the GPU's name.

        Raises: OSError: there is no TensorRT here.
        """
        if self._state_dir is None or not device.name:
            return None
        return tensorrt.folder_of(self._state_dir, content.key, version(), tensorrt.version(), device.name)

    def _prepare(
        self, request: LoadRequest, device: Device, loading: "_Loading", compiled: Compiled | None
    ) -> tuple[Session, Batching]:
        """Session, probes, warm-up of every bucket."""
        plan = request.plan
        session = Session(
            plan.model or plan.file,
            plan.file.parent,
            device,
            self._threads,
            self._gpu_memory,
            tf32=plan.tf32,
            compiled=compiled,
            on_poison=self._on_poison,
        )
        loading.take(session)
        buckets = request.examples
        coarse = plan.half or plan.tf32 or (compiled is not None and compiled.fp16)
        batching = _batching(session, request, coarse)
        if batching.mode == "whole":
            _first_run(session, request, buckets)
            return session, batching
        for rows in buckets:
            _first_run(session, request, [rows])
        if batching.mode == "separate":
            return session, replace(batching, inline_rows=_inline_rows(session, request, device, 1))
        limit = request.max_rows or probes.MAX_ROWS
        # The longest bucket decides: shorter rows at that size are cheaper still. All sizes get warm on the way.
        sizes = [probes.best_rows(session, request.served, rows[0], limit) for rows in buckets]
        max_rows = request.max_rows or sizes[-1]
        inline_rows = _inline_rows(session, request, device, max_rows)
        return session, Batching("rows", max_rows, batching.reason, inline_rows)

    def _observer(self, name: tuple[str, str]) -> Callable[[RunRecord], None]:
        compute = self._metrics.compute_seconds.labels(*name)
        rows = self._metrics.batch_rows.labels(*name)
        queue = self._metrics.queue_seconds.labels(*name)

        def observe(record: RunRecord) -> None:
            compute.observe(record.seconds)
            rows.observe(record.rows)
            for wait in record.waits:
                queue.observe(wait)

        return observe


class _Loading:
    """A load in progress: when nobody waits for it any more, its runs are ended."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._ended = False

    def take(self, session: Session) -> None:
        """The session exists now. Called on the load's thread."""
        self._session = session
        if self._ended:
            session.terminate(for_good=True)

    def succeeded(self) -> None:
        """The session is somebody's now."""
        self._session = None

    def end(self) -> None:
        """Nobody waits any more."""
        self._ended = True
        if self._session is not None:
            self._session.terminate(for_good=True)


async def _on_own_thread(work: Callable[[], _T]) -> _T:
    """The result of `work`, on a daemon thread: a graph that never ends must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def end(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # without an error there is a result

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # handed to whoever waits
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(end, result, failure)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await future


def _batching(session: Session, request: LoadRequest, coarse: bool) -> Batching:
    """Whether rows may share a run, from the graph's axes, its operators and the probes."""
    if not request.examples:
        return Batching("whole", 1, "its inputs have axes of unknown length, so its rows could not be probed")
    fixed = [spec for spec in session.inputs if not spec.dynamic_batch]
    if any(not spec.shape or spec.shape[0] != 1 for spec in fixed):
        return Batching("whole", 1, f"the input {fixed[0].name!r} has no dynamic batch axis")
    if fixed:
        return Batching("separate", 1, f"the batch axis of {fixed[0].name!r} is fixed at 1; export it as dynamic")
    if request.plan.mixes_rows:
        return Batching("separate", 1, request.plan.mixes_rows)
    for rows in request.examples:
        dependence = probes.row_dependence(session, request.compared, rows, coarse=coarse)
        if dependence:
            return Batching("separate", 1, dependence)
    return Batching("rows", probes.MAX_ROWS, "the probes show rows independent")


def _inline_rows(session: Session, request: LoadRequest, device: Device, max_rows: int) -> int:
    """How many rows of the longest bucket one turn of the loop may run itself; 0 when a single one takes too long."""
    row = request.examples[-1][0]
    if device.kind != "cpu" or probes.run_seconds(session, request.served, row, 1) > LONGEST_RUN_S:
        return 0
    try:
        return int(TURN_S / probes.run_seconds(session, request.served, row, max_rows) * max_rows)
    except InferenceFailed:  # the bundle's max_rows does not fit in memory: the batcher finds out what does
        return 0


def _batches(request: LoadRequest, max_rows: int) -> list[dict[str, Array]]:
    """What the batcher makes of each bucket's rows: powers of two, and `max_rows`."""
    sizes = sorted({min(1 << power, max_rows) for power in range(max_rows.bit_length() + 1)})
    return [probes.join([rows[0]] * size) for rows in request.examples for size in sizes]


def _first_run(session: Session, request: LoadRequest, buckets: Sequence[Sequence[Mapping[str, Array]]]) -> None:
    """Run one row of each bucket. Raises: BundleInvalid: the model fails on an ordinary input."""
    for rows in buckets:
        try:
            session.run(request.served, rows[0])
        except InferenceFailed as error:
            first = error.detail.strip().splitlines()[0][:300] if error.detail.strip() else str(error)
            raise BundleInvalid(f"The model fails on a trial input: {first}") from error


def _fields(request: LoadRequest, reason: str) -> dict[str, str]:
    return {"model": request.name[0], "version": request.name[1], "reason": reason}
