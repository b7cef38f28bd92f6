"""The engine inside this process: sessions, and a batcher with its own thread for each."""

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from appliance.core.config import Engine as EngineSettings
from appliance.core.errors import BundleInvalid, DeviceError, InferenceFailed
from appliance.core.machine import resident_memory, usable_cpus, usable_memory
from appliance.core.metrics import Metrics
from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine import curves, probes, tensorrt
from appliance.engine.admission import Admission, Content, content_of
from appliance.engine.batcher import Batcher, Outcome, RunRecord, powers_of_two, shape_key
from appliance.engine.cache import FileCache
from appliance.engine.curves import Idle, Measured, Subject
from appliance.engine.gate import Marks, RunGate
from appliance.engine.inline import LONGEST_RUN_S, TURN_S, InlineLane, Waiter, Watchdog
from appliance.engine.plan import only
from appliance.engine.session import Device, Session, TensorSpec, bound_runs, resolve_device, version
from appliance.engine.tensorrt import Compiled
from appliance.engine.threads import on_own_thread
from appliance.engine.transport import Batching, LoadRequest

_log = logging.getLogger(__name__)

_CURVES_SIZE = 4 * 2**20
"""Bytes of all curves that are kept; those of one model have one or two thousand."""

_Build: TypeAlias = Callable[[Batching], tuple[Batcher, InlineLane | None]]


class LocalModel:
    """A session with its batcher and, if its runs are short, its inline lane; implements `LoadedModel`."""

    def __init__(self, session: Session, device: Device, batching: Batching, build: _Build, idle: Idle) -> None:
        """Args: build: makes batcher and lane. idle: told of every submission."""
        self._build = build
        self._idle = idle
        self._batcher, self._lane = build(batching)
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        self.providers = session.providers
        self.device = device
        self.batching = batching
        self.closed = False
        self.unmeasured: _Unmeasured | None = None
        """What is left to measure while the engine is idle."""
        self.gpu_memory: int | None = None
        """Bytes of GPU memory that it took when that was last measured; None on CPUs."""

    @property
    def death(self) -> str | None:
        """Why the worker thread died, or None."""
        return self._batcher.death

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue now."""
        return self._batcher.waiting_rows + (self._lane.waiting_rows if self._lane else 0)

    @property
    def at_rest(self) -> bool:
        """Whether it accepts rows, and has none."""
        return self._batcher.at_rest and not (self._lane and self._lane.waiting_rows)

    @property
    def ended(self) -> bool:
        """Whether it accepts no rows any more."""
        return self.closed or self._batcher.death is not None

    def rebatch(self, batching: Batching) -> bool:
        """Run rows so from now on. Returns: whether it does: not while there are rows."""
        if not self.at_rest:
            return False
        if self._lane is not None and self._lane.closed:  # it was found too slow for the loop
            batching = replace(batching, inline_rows=0)
        old = self._batcher
        self._batcher, self._lane = self._build(batching)
        self.batching = batching
        old.close()
        return True

    def prompt(self, rows: int) -> bool:
        """Whether so many rows that are submitted now are run soon, on the loop's own thread."""
        return self._lane is not None and self._lane.takes(rows)

    def join(self, rows: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
        """See `LoadedModel.join`."""
        return rows[0] if len(rows) == 1 else probes.join(rows)

    def submit(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        deadline: float | None,
        principal: str,
        *,
        priority: int = 0,
        alone: bool = False,
        marks: Marks | None = None,
        told: Callable[[Run], None] | None = None,
    ) -> "asyncio.Future[Outcome]":
        """Run rows inline if that is quick, else queue them; see `Batcher.submit`."""
        if not self._idle.asked:
            self._idle.ask()
        if self._lane is not None and not alone:
            count = len(next(iter(feeds.values())))
            if self._lane.takes(count):
                return self._lane.submit(
                    feeds, outputs, count, deadline, principal, priority=priority, marks=marks, told=told
                )
        return self._batcher.submit(
            feeds, outputs, deadline, principal, priority=priority, alone=alone, marks=marks, told=told
        )

    def submit_prompt(
        self,
        waiter: Waiter,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        rows: int,
        deadline: float | None,
        principal: str,
        *,
        priority: int = 0,
        marks: Marks | None = None,
        told: Callable[[Run], None] | None = None,
    ) -> None:
        """Run rows inline; `prompt` has just said yes to them. The waiter is told once, later than now."""
        assert self._lane is not None, "not prompt"
        if not self._idle.asked:
            self._idle.ask()
        self._lane.submit_for(
            waiter, feeds, outputs, rows, deadline, principal, priority=priority, marks=marks, told=told
        )

    async def drain(self) -> None:
        """Return when everything accepted has ended."""
        if self._lane is not None:
            await self._lane.wait_idle()
        await self._batcher.wait_idle()

    def close(self) -> None:
        """Answer what waits; the session goes when the worker lets go of it."""
        self.closed = True
        self.unmeasured = None
        self._idle.ask()  # it may be this one that is measured
        self._batcher.close()


@dataclass(frozen=True, slots=True)
class _Unmeasured:
    """What is known of a model, what is to be measured, and what that is kept under."""

    request: LoadRequest
    measured: Measured
    subject: Subject
    key: str


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
            state_dir: what is measured is kept in there, under cache/curves and in footprints.json, and TensorRT's
                engines are looked for; None: none of it.
            on_poison: called on a run's thread when this process can use its GPU no more; it should end the process.
        Raises:  DeviceError: the device is required and cannot be used.
        """
        memory = settings.run_memory or usable_memory() // 3
        bound_runs(memory)
        self.device = resolve_device(settings.device)
        self._threads = settings.threads or usable_cpus()
        self._parallel = settings.parallel
        self._most_bytes = memory // 2
        self._queue_rows = settings.queue_rows
        self._queue_bytes = settings.queue_size
        self._gpu_memory = settings.gpu_memory
        self._cuda_graphs = settings.cuda_graphs
        self._state_dir = state_dir
        self._on_poison = on_poison
        self._admission = Admission(state_dir, settings.gpu_headroom)
        self._load_timeout_s = settings.load_timeout_s
        self._metrics = metrics
        self._watchdog = Watchdog()
        self._gate = RunGate()
        self._kept = FileCache(state_dir / "cache" / "curves", _CURVES_SIZE) if state_dir else None
        self._loads = 0
        self._models: weakref.WeakSet[LocalModel] = weakref.WeakSet()
        self._idle = Idle(self._busy)
        self._unmeasured: deque[weakref.ref[LocalModel]] = deque()
        self._measuring: asyncio.Task[None] | None = None

    async def load(self, request: LoadRequest) -> LocalModel:
        """Load, probe and warm up a graph; see `Engine.load`."""
        wanted = request.device or "auto"
        device = self.device if wanted == "auto" else resolve_device(wanted)
        loading = _Loading()
        self._loads += 1
        self._idle.ask()
        try:
            async with asyncio.timeout(self._load_timeout_s):
                session, batching, unmeasured = await on_own_thread(
                    lambda: self._admitted(request, device, loading), "load"
                )
                loading.succeeded()
        except TimeoutError as error:
            raise BundleInvalid(
                f"The model was not loaded and warmed up within {self._load_timeout_s:g} s (engine.load_timeout_s)."
            ) from error
        finally:
            self._loads -= 1
            loading.end()
        # What is kept for as long as the model is there must not keep the files' content.
        request = replace(request, plan=replace(request.plan, model=None, weights={}))
        model = LocalModel(session, device, batching, self._builder(request, session, device), self._idle)
        model.gpu_memory = loading.gpu_memory
        self._models.add(model)
        self._idle.ask()
        if unmeasured is not None:
            model.unmeasured = replace(unmeasured, request=request)
            self._unmeasured.append(weakref.ref(model))
            if self._measuring is None or self._measuring.done():
                self._measuring = asyncio.create_task(self._measure_all(), name="curves")
        return model

    def _builder(self, request: LoadRequest, session: Session, device: Device) -> _Build:
        """Makes batcher and lane of that session."""
        on_run = self._observer(request.name)

        def build(batching: Batching) -> tuple[Batcher, InlineLane | None]:
            firsts = [rows[0] for rows in request.examples]
            batcher = Batcher(
                session,
                max_rows=batching.max_rows,
                queue_rows=self._queue_rows,
                queue_bytes=self._queue_bytes,
                max_bytes=self._most_bytes,
                gate=self._gate,
                board=request.board,
                separate=batching.mode == "separate",
                whole=batching.mode == "whole",
                sizes=powers_of_two(batching.max_rows) if device.kind == "gpu" else (),
                parallel=batching.parallel,
                spread=device.kind == "cpu",
                shapes={shape_key(row): rows for row, rows in zip(firsts, batching.buckets, strict=False)},
                on_run=on_run,
                on_death=lambda reason: _log.critical("model is not ready any more", extra=_fields(request, reason)),
            )
            if not batching.inline_rows:
                return batcher, None
            lane = InlineLane(
                session,
                batcher,
                self._watchdog,
                batching.inline_rows,
                on_run,
                lambda reason: _log.warning("runs have their own thread from now on", extra=_fields(request, reason)),
            )
            return batcher, lane

        return build

    # ---- loading, on a thread of its own ----

    def _admitted(
        self, request: LoadRequest, device: Device, loading: "_Loading"
    ) -> tuple[Session, Batching, _Unmeasured | None]:
        """Load. On a GPU: if it fits, and then measured; by TensorRT's engine, if one was built.

        Raises: DeviceError: it does not fit.
        """
        if device.kind == "cpu":
            return self._prepare(request, device, loading, None)
        content = content_of(request.plan)
        name = ":".join(request.name)
        compiled = self._compiled(content, device)
        if compiled is not None and tensorrt.covers(compiled, request.examples):
            rows = min(request.max_rows or compiled.max_rows, compiled.max_rows)
            try:
                with self._admission.load(content, device, "tensorrt", name):
                    prepared = self._prepare(replace(request, max_rows=rows), device, loading, compiled)
                    prepared[0].settle()
                loading.gpu_memory = self._admission.footprint(content, device, "tensorrt")
                return prepared
            except (BundleInvalid, DeviceError) as error:
                _log.warning("TensorRT's engine cannot be used, CUDA serves", extra=_fields(request, str(error)))
        with self._admission.load(content, device, "cuda", name):
            prepared = self._prepare(request, device, loading, None)
            session, batching, _ = prepared
            graphs = self._cuda_graphs if request.plan.cuda_graphs is None else request.plan.cuda_graphs
            if graphs and batching.mode == "rows":
                found = session.capture(request.served, _batches(request, batching))
                _log.info("CUDA graphs were tried", extra=_fields(request, found))
            session.settle()
        loading.gpu_memory = self._admission.footprint(content, device, "cuda")
        return prepared

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
    ) -> tuple[Session, Batching, _Unmeasured | None]:
        """Session, a run of every bucket, and what is known or quickly found out of the model."""
        plan = request.plan
        assert plan.model is not None, "a description cannot be loaded"
        threads = request.threads or self._threads
        graph = only(plan.model, {*request.served, *request.compared})
        session = Session(
            graph,
            plan.file.parent,
            device,
            threads,
            self._gpu_memory,
            plan.weights,
            tf32=plan.tf32,
            compiled=compiled,
            on_poison=self._on_poison,
        )
        loading.take(session)
        seconds = _first_runs(session, request)
        mode, reason = _mode(session, request)
        if mode == "whole":
            return session, Batching(mode, 1, reason, parallel=request.parallel or self._parallel or 1), None
        asked: list[object] = [request.compared, request.served, request.max_rows, request.parallel or self._parallel]
        asked += ["tensorrt"] if compiled is not None else []
        key = curves.key_of(plan.key, device, threads, asked)
        kept = curves.read(self._kept, key) if self._kept and plan.key else None
        coarse = plan.half or plan.tf32 or (compiled is not None and compiled.fp16)
        measured = kept or _quickly_measured(session, request, mode, coarse)
        subject = None
        if not measured.measured_at:
            subject = self._subject(session, request, device, threads, mode, measured)
        if subject is not None and device.kind == "gpu":
            with contextlib.suppress(InferenceFailed):
                measured = curves.at_once(curves.steps(subject, measured, visits=1))
            subject = None
        batching = self._batching(request, device, mode, reason, measured, kept is not None, seconds)
        if subject is None and not measured.measured_at:  # the bundle and the configuration say all there is to say
            batching = replace(batching, curve="")
        if kept is None:
            self._keep(key, measured)
        if device.kind == "gpu" and (kept is not None or not measured.measured_at):
            _warm(session, request, batching)
        return session, batching, _Unmeasured(request, measured, subject, key) if subject is not None else None

    def _subject(
        self, session: Session, request: LoadRequest, device: Device, threads: int, mode: str, measured: Measured
    ) -> Subject | None:
        """What is to be measured, if anything is."""
        rows = mode == "rows" and not measured.dependence
        runs: Sequence[int] = powers_of_two(threads if device.kind == "cpu" else 2)
        if request.parallel or self._parallel or _is_tiny(measured, device):
            runs = ()
        most_rows = (request.max_rows or probes.MAX_ROWS) if rows else 1
        if len(runs) < 2 and (most_rows == 1 or request.max_rows):
            return None
        firsts = [bucket[0] for bucket in request.examples]
        if most_rows == 1:
            firsts = firsts[-1:]
        # What a GPU's runs take is found out by whoever admits models to it.
        memory = resident_memory if device.kind == "cpu" else lambda: 0
        return Subject(session, request.served, firsts, most_rows, self._most_bytes, runs, memory)

    def _batching(
        self,
        request: LoadRequest,
        device: Device,
        mode: str,
        reason: str,
        measured: Measured,
        kept: bool,
        seconds: Sequence[float] = (),
    ) -> Batching:
        """How rows are run, by what is known. Args: seconds: what the first run of each bucket took."""
        if mode == "rows" and measured.dependence:
            mode, reason = "separate", measured.dependence
        most = request.max_rows or probes.MAX_ROWS
        buckets: tuple[int, ...] = ()
        if mode == "separate":
            most = 1
        elif request.max_rows is None and measured.measured_at:
            buckets = tuple(curves.best_rows(curve, self._most_bytes) for curve in measured.curves)
            most = max(buckets)
        elif request.max_rows is None:
            buckets = tuple(curves.default_rows(min(first, measured.row_seconds), most) for first in seconds)
            most = max(buckets, default=curves.default_rows(measured.row_seconds, most))
        return Batching(
            mode,
            most,
            reason,
            inline_rows=int(TURN_S / measured.shared_seconds) if _is_tiny(measured, device) else 0,
            buckets=buckets,
            parallel=request.parallel or self._parallel or curves.best_runs(measured.at_a_time),
            curve=curves.told(measured, kept),
        )

    # ---- measuring, while nothing is asked for ----

    def _busy(self) -> bool:
        return self._loads > 0 or any(not (model.at_rest or model.ended) for model in self._models)

    async def _measure_all(self) -> None:
        """Measure what was loaded, one model after the other."""
        while self._unmeasured:
            model = self._unmeasured.popleft()()
            if model is not None:
                await self._measure(model)
            del model  # it may go while others are measured

    async def _measure(self, model: LocalModel) -> None:
        """Measure a model, and run its rows accordingly."""
        work = model.unmeasured
        if work is None:
            return
        try:
            measured = await self._idle.measure(
                curves.steps(work.subject, work.measured), work.subject.model.terminate, lambda: model.ended
            )
        except InferenceFailed as error:
            _log.warning("the model cannot be measured", extra=_fields(work.request, str(error)))
            return
        if measured is None:
            return
        await asyncio.to_thread(self._keep, work.key, measured)
        old = model.batching
        batching = self._batching(work.request, model.device, old.mode, old.reason, measured, kept=False)
        while not model.ended and not model.rebatch(batching):
            await self._idle.wait(lambda: model.ended)
        model.unmeasured = None
        _log.info("measured", extra=_fields(work.request, batching.curve))

    def _keep(self, key: str, measured: Measured) -> None:
        if self._kept is not None:
            curves.write(self._kept, key, measured)

    def _observer(self, name: tuple[str, str]) -> Callable[[RunRecord], None]:
        count = self._metrics.run_counter(*name)
        queue = self._metrics.queue_seconds.labels(*name)

        def observe(record: RunRecord) -> None:
            first, *others = record.waits
            count(record.rows, record.seconds, record.batch_wait, first)
            for wait in others:
                queue.observe(wait)

        return observe


class _Loading:
    """A load in progress: when nobody waits for it any more, its runs are ended."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._ended = False
        self.gpu_memory: int | None = None

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


def _mode(session: Session, request: LoadRequest) -> tuple[str, str]:
    """What the graph's axes and operators say of its rows, and why; the probes have the last word about "rows"."""
    if not request.examples:
        return "whole", "its inputs have axes of unknown length, so its rows could not be probed"
    fixed = [spec for spec in session.inputs if not spec.dynamic_batch]
    if any(not spec.shape or spec.shape[0] != 1 for spec in fixed):
        return "whole", f"the input {fixed[0].name!r} has no dynamic batch axis"
    if fixed:
        return "separate", f"the batch axis of {fixed[0].name!r} is fixed at 1; export it as dynamic"
    if request.plan.mixes_rows:
        return "separate", request.plan.mixes_rows
    return "rows", "the probes show rows independent"


def _dependence(session: Session, request: LoadRequest, coarse: bool) -> str:
    """Why rows must not share a run, by the probes; "" when they may."""
    for rows in request.examples:
        dependence = probes.row_dependence(session, request.compared, rows, coarse=coarse)
        if dependence:
            return dependence
    return ""


def _quickly_measured(session: Session, request: LoadRequest, mode: str, coarse: bool) -> Measured:
    """What a few runs tell: whether rows may share one, and how many may be expected to be worth running together."""
    dependence = _dependence(session, request, coarse) if mode == "rows" else ""
    row = request.examples[-1][0]
    one = curves.shortest_run(session, request.served, row)
    shared = one
    if one <= LONGEST_RUN_S and mode == "rows" and not dependence:
        rows = request.max_rows or probes.MAX_ROWS
        # Where so many do not fit in memory, the batcher finds out what does.
        with contextlib.suppress(InferenceFailed):
            shared = curves.shortest_run(session, request.served, probes.join([row] * rows)) / rows
    return Measured(dependence, one, shared)


def _is_tiny(measured: Measured, device: Device) -> bool:
    """Whether the loop may run it itself."""
    return device.kind == "cpu" and measured.row_seconds <= LONGEST_RUN_S


def _warm(session: Session, request: LoadRequest, batching: Batching) -> None:
    """Run every size once that a GPU will see: the first run of a shape is slow."""
    for feeds in _batches(request, batching):
        with contextlib.suppress(InferenceFailed):
            session.run(request.served, feeds)


def _batches(request: LoadRequest, batching: Batching) -> list[dict[str, Array]]:
    """What the batcher makes of each bucket's rows."""
    most = batching.buckets or (batching.max_rows,) * len(request.examples)
    pairs = zip(request.examples, most, strict=False)  # what was kept may be of other buckets
    return [probes.join([rows[0]] * size) for rows, limit in pairs for size in powers_of_two(limit)]


def _first_runs(session: Session, request: LoadRequest) -> list[float]:
    """Run one row of each bucket; the seconds of each. Raises: BundleInvalid: it fails on an ordinary input."""
    seconds = []
    for rows in request.examples:
        begun = time.perf_counter()
        try:
            session.run(request.served, rows[0])
        except InferenceFailed as error:
            first = error.detail.strip().splitlines()[0][:300] if error.detail.strip() else str(error)
            raise BundleInvalid(f"The model fails on a trial input: {first}") from error
        seconds.append(time.perf_counter() - begun)
    return seconds


def _fields(request: LoadRequest, reason: str) -> dict[str, str]:
    return {"model": request.name[0], "version": request.name[1], "reason": reason}
