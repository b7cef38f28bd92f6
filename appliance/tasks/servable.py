"""A servable: one version of a model, loaded, that answers inputs."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from appliance.catalog.bundle import BundleConfig, OnnxSection, VersionFolder, check_inside, concepts_of
from appliance.core.config import Limits
from appliance.core.errors import ApplianceError, BundleInvalid, InputError
from appliance.core.machine import usable_cpus
from appliance.core.memory import Reservation
from appliance.core.metrics import Metrics
from appliance.core.timing import Run, Timing
from appliance.core.types import Concept, Payload, PredictOptions, Result, Tensors
from appliance.engine import plan as plans
from appliance.engine.batcher import Outcome
from appliance.engine.inline import Waiter
from appliance.engine.plan import Plan
from appliance.engine.transport import Engine, LoadedModel, LoadRequest
from appliance.media.text import TextTokenizer
from appliance.tasks.base import Decoded, ImageSide, InputSide, Task, TextSide
from appliance.tasks.classifier import Classifier
from appliance.tasks.declared import Declared
from appliance.tasks.embedder import Embedder
from appliance.tasks.tensors import RawTensors

PREDICT = "predict"
"""The method of callers that name none (PROTOCOL 4.3)."""

_LARGE_ANSWER = 64 * 1024
"""Bytes of a declared method's outputs from which what it returns is made on a thread."""

_LARGE_COPY = 1 << 20
"""Bytes of rows from which they are put together on a thread: some hundred microseconds."""

_SMALL_WORK = 256 * 1024
"""Bytes of decoded inputs below which a request is decoded on the loop: a hop to a thread costs more than the work."""
_FEW = 8
"""Headers that are looked at on the loop; more would make its other callers wait."""

Answer = Result | ApplianceError
_serials = itertools.count(1)
_T = TypeVar("_T")


@dataclass(slots=True)
class Ticket:
    """What a request brings along to the model.

    Attributes:
        principal: whose turn in the queue it uses.
        deadline: `time.monotonic()` seconds.
        memory: grows by what decoding needs.
        priority: higher goes first.
        computed_at: when the model's last results were here, `time.monotonic()` seconds; 0 before.
        timing: what is noted of the request's time, where somebody wants to know.
    """

    principal: str
    deadline: float | None
    memory: Reservation
    priority: int = field(default=0, kw_only=True)
    computed_at: float = field(default=0.0, init=False)
    timing: Timing | None = field(default=None, init=False)

    @property
    def told(self) -> Callable[[Run], None] | None:
        """Who hears of the runs that the request's rows were in, if anybody does."""
        return None if self.timing is None else self.timing.ran


class DecodePool:
    """Threads that decode inputs; Pillow and the tokenizers release the interpreter lock."""

    def __init__(self, threads: int) -> None:
        self.threads = threads or usable_cpus()
        self._executor: Executor = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    async def map(self, function: Callable[[Payload], _T], payloads: Sequence[Payload], small: bool) -> list[_T]:
        """`function` of each payload, in order; on the loop's own thread when the work is small."""
        if small:
            return [function(payload) for payload in payloads]
        loop = asyncio.get_running_loop()
        chunks = [payloads[start :: self.threads] for start in range(min(self.threads, len(payloads)))]
        jobs = [loop.run_in_executor(self._executor, _each, function, chunk) for chunk in chunks]
        results: list[_T | None] = [None] * len(payloads)
        for start, answers in enumerate(await asyncio.gather(*jobs)):
            results[start :: self.threads] = answers
        return results  # type: ignore[return-value]  # every place has been filled

    async def run(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """What `function` returns, on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def close(self) -> None:
        """Let the threads end; work that has not begun is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _each(function: Callable[[Payload], _T], payloads: Sequence[Payload]) -> list[_T]:
    return [function(payload) for payload in payloads]


@dataclass(frozen=True, slots=True)
class Offer:
    """One method of a model: what it takes and gives, and the graph that it runs."""

    task: Task
    model: LoadedModel


class Servable:
    """One version of a model: its methods, its loaded graphs and what clients are told about it.

    Attributes:
        offers: method name → its task and graph; `predict` is always among them, and is `task` and `model`.
        models: the graphs, each once.
    """

    def __init__(
        self,
        config: BundleConfig,
        version: VersionFolder,
        concepts: tuple[Concept, ...],
        offers: Sequence[Offer],
        pool: DecodePool,
        metrics: Metrics,
        notes: tuple[str, ...],
    ) -> None:
        """Args: offers: one of them is named `predict`."""
        self.config = config
        self.key = config.key
        self.version = version.id
        self.concepts = concepts
        self.offers = {offer.task.method.name: offer for offer in offers}
        self.task, self.model = self.offers[PREDICT].task, self.offers[PREDICT].model
        self.models = tuple({id(offer.model): offer.model for offer in self.offers.values()}.values())
        self.notes = notes
        self._pool = pool
        self._decode_seconds = metrics.decode_seconds.labels(self.key.model_id, self.version)
        self._request_rows = metrics.request_rows.labels(self.key.model_id, self.version)
        self.serial = next(_serials)
        """No other load has it, not even one of the same version: what was computed by this one bears it."""

        self._companions: dict[object, Any] = {}

    @property
    def problem(self) -> str | None:
        """Why this servable cannot answer any more, or None."""
        for model in self.models:
            if model.death:
                return model.death
        return None

    def companion(self, kind: "Callable[[Servable], _T]") -> _T:
        """What `kind` makes of this servable, for whoever serves it; made once, and gone with it."""
        found: _T | None = self._companions.get(kind)
        if found is None:
            found = self._companions[kind] = kind(self)
        return found

    async def predict(
        self,
        payloads: Sequence[Payload | ApplianceError],
        options: PredictOptions,
        ticket: Ticket,
        limits: Limits,
        method: str = PREDICT,
    ) -> list[Answer]:
        """Answer each payload, in order; a bad one gets its own error and its neighbours are answered.

        Args:
            payloads: an error in place of a payload is passed through.
            method: one of `offers`.
        Raises:  CapacityError: the whole request must be tried later. Cancelling takes its rows out of the queue.
        """
        begun = time.monotonic()
        offer = self.offers[method]
        answers: list[Answer | None] = [p if isinstance(p, ApplianceError) else None for p in payloads]
        present = [(i, p) for i, p in enumerate(payloads) if not isinstance(p, ApplianceError)]
        decoded = await self._decode(offer.task, present, answers, ticket, limits)
        self._note_decoding(ticket, begun)
        if decoded:
            self._request_rows.observe(sum(row.rows for row in decoded.values()))
        await self._compute(offer, decoded, answers, options, ticket)
        return answers  # type: ignore[return-value]  # every place has been filled

    def ask(
        self, payload: Payload, options: PredictOptions, ticket: Ticket, limits: Limits, waiter: Waiter
    ) -> Decoded | None:
        """Decode an input of a small request here and now and submit it; `answer` makes the answer of its outcome.

        Args:    waiter: is told the outcome, once and later than now.
        Returns: None when that is better left to `predict`: nothing is submitted, but the ticket's memory may have
            grown.
        Raises: InputError. Overloaded: its memory is not free.
        """
        if not self.model.prompt(1):
            return None
        begun = time.monotonic()
        cost = self.task.cost(payload, limits)
        if cost >= _SMALL_WORK:
            return None
        ticket.memory.grow(cost)
        row = self.task.decode(payload)
        ticket.memory.grow(_bytes(row.feeds))
        if row.rows > 1 and not self.model.prompt(row.rows):
            return None
        self._note_decoding(ticket, begun)
        self._request_rows.observe(row.rows)
        self.model.submit_prompt(
            waiter,
            row.feeds,
            self.task.outputs(options),
            row.rows,
            ticket.deadline,
            ticket.principal,
            priority=ticket.priority,
            told=ticket.told,
        )
        return row

    def _note_decoding(self, ticket: Ticket, begun: float) -> None:
        now = time.monotonic()
        self._decode_seconds.observe(now - begun)
        if ticket.timing is not None:
            ticket.timing.decode(begun, now)

    def answer(self, row: Decoded, outcome: Outcome, options: PredictOptions, ticket: Ticket) -> Answer:
        """What became of an input that `ask` submitted. Raises: Overloaded: the memory of the answer is not free."""
        ticket.computed_at = time.monotonic()
        ticket.memory.grow(_bytes(outcome.arrays))
        if outcome.errors:
            return next(iter(outcome.errors.values()))
        return _squeezed(self.task.encode(outcome.arrays, 1, options)[0], row)

    async def _joined(self, model: LoadedModel, rows: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """The rows as one array an input, where the engine finds them; large ones are copied on a thread."""
        if sum(_bytes(row) for row in rows) < _LARGE_COPY:
            return model.join(rows)
        return await self._pool.run(model.join, rows)

    def described(self) -> dict[str, object]:
        """Device, batching and notes, as plain data for operators."""
        batching = self.model.batching
        return {
            "device": str(self.model.device),
            "batching": f"{batching.mode}, up to {batching.max_rows} rows: {batching.reason}",
            "curve": batching.curve,
            "providers": list(self.model.providers),
            "notes": list(self.notes),
        }

    async def drain(self) -> None:
        """Return when everything accepted has ended."""
        await asyncio.gather(*(model.drain() for model in self.models))

    def close(self) -> None:
        """Let the model go; what waits is told to try again."""
        for model in self.models:
            model.close()

    async def _decode(
        self,
        task: Task,
        present: list[tuple[int, Payload]],
        answers: list[Answer | None],
        ticket: Ticket,
        limits: Limits,
    ) -> dict[int, Decoded]:
        """Look at all headers, reserve the memory that the largest need at once, then decode."""
        body = sum(_size(payload) for _, payload in present)
        costs = await self._pool.map(
            partial(_tried, lambda payload: task.cost(payload, limits)),
            [payload for _, payload in present],
            body < _SMALL_WORK and len(present) <= _FEW,
        )
        sound = []
        for (index, payload), cost in zip(present, costs, strict=True):
            if isinstance(cost, ApplianceError):
                answers[index] = cost
            else:
                sound.append((index, payload, cost))
        largest = sorted((cost for _, _, cost in sound), reverse=True)[: self._pool.threads]
        ticket.memory.grow(sum(largest))
        small = sum(cost for _, _, cost in sound) < _SMALL_WORK
        rows = await self._pool.map(partial(_tried, task.decode), [payload for _, payload, _ in sound], small)
        decoded = {}
        for (index, _, _), row in zip(sound, rows, strict=True):
            if isinstance(row, ApplianceError):
                answers[index] = row
            else:
                decoded[index] = row
        ticket.memory.grow(sum(_bytes(row.feeds) for row in decoded.values()))
        return decoded

    async def _compute(
        self,
        offer: Offer,
        decoded: dict[int, Decoded],
        answers: list[Answer | None],
        options: PredictOptions,
        ticket: Ticket,
    ) -> None:
        """Submit the rows, those of one shape together, and put the answers in their places."""
        task, model = offer.task, offer.model
        outputs = task.outputs(options)
        # Where a submission is one run as it is, inputs must not meet in it.
        merge = task.merges and model.batching.mode != "whole"
        groups = _groups(decoded, merge)
        futures = []
        try:
            for members in groups:
                feeds = await self._joined(model, [decoded[index].feeds for index in members])
                futures.append(
                    model.submit(
                        feeds, outputs, ticket.deadline, ticket.principal, priority=ticket.priority, told=ticket.told
                    )
                )
            if len(futures) == 1:
                outcomes = [await futures[0]]
            else:
                outcomes = await asyncio.gather(*futures)  # takes note of the errors that nobody awaits any more, too
        finally:
            # One refused or cancelled: nobody reads the others any more.
            for future in futures:
                future.cancel()
        ticket.computed_at = time.monotonic()
        # The arrays become the reply, which is held until it is sent.
        ticket.memory.grow(sum(_bytes(outcome.arrays) for outcome in outcomes))
        for members, outcome in zip(groups, outcomes, strict=True):
            if not outcome.arrays:
                results: Sequence[Answer] = [next(iter(outcome.errors.values()))] * len(members)
            elif task.kind == "values" and _bytes(outcome.arrays) >= _LARGE_ANSWER:
                # What a declared method returns is made value by value: a millisecond for a thousand of them.
                results = await self._pool.run(task.encode, outcome.arrays, len(members), options)
            else:
                results = task.encode(outcome.arrays, len(members), options)
            for position, index in enumerate(members):
                error = outcome.errors.get(position)
                if not merge and outcome.errors:
                    error = next(iter(outcome.errors.values()))
                answers[index] = error or _squeezed(results[position], decoded[index])


def watch_queue(servable: Servable, metrics: Metrics) -> None:
    """Show how many rows wait for the servable, until that gauge is cleared."""
    gauge = metrics.queue_rows.labels(servable.key.model_id, servable.version)
    metrics.watch(gauge, lambda: servable.model.waiting_rows)


MakePlan: TypeAlias = Callable[[Path, BundleConfig, VersionFolder, int], Plan]


async def load(
    bundle: Path,
    config: BundleConfig,
    version: VersionFolder,
    engine: Engine,
    pool: DecodePool,
    metrics: Metrics,
    limits: Limits,
    make_plan: MakePlan = plans.make_plan,
) -> Servable:
    """Read, wrap, load, probe and warm up one version.

    Plans are made, and graphs loaded, in an order that depends on nothing but the arguments.

    Args:   make_plan: in a front, gives the plans that the engine's process made.
    Raises: BundleInvalid, DeviceError: with what is wrong and what to do.
    """
    concepts = await asyncio.to_thread(concepts_of, config, version)
    plan = await asyncio.to_thread(make_plan, bundle, config, version, len(concepts))
    concepts = _numbered(concepts, config, plan)
    tasks: list[tuple[Plan, Task]] = []
    if all(section.name != PREDICT for section in config.onnx.methods):
        tasks.append((plan, await asyncio.to_thread(_make_task, bundle, config, version, plan, limits)))
    tasks += await asyncio.to_thread(_declared, bundle, config, version, concepts, limits, plan, make_plan)
    models: dict[tuple[Plan, bool], LoadedModel] = {}
    try:
        # Tasks on one graph share its session, but for inputs that are no rows: theirs is not cut into rows.
        for key in [(place, _takes_rows(task)) for place, task in tasks]:
            if key not in models:
                others = [other for place, other in tasks if (place, _takes_rows(other)) == key]
                models[key] = await engine.load(_load_request(config, version, key[0], others))
        offers = [Offer(task, models[place, _takes_rows(task)]) for place, task in tasks]
        return Servable(config, version, concepts, offers, pool, metrics, plan.notes)
    except BaseException:
        for model in models.values():
            model.close()
        raise


def _takes_rows(task: Task) -> bool:
    return task.batched if isinstance(task, RawTensors) else task.merges


def _load_request(config: BundleConfig, version: VersionFolder, plan: Plan, tasks: Sequence[Task]) -> LoadRequest:
    """For all tasks on one graph: their rows are merged when each of their outputs is proven independent."""
    return LoadRequest(
        name=(config.key.model_id, version.id),
        plan=plan,
        device=config.onnx.device,
        compared=_union([task.compared() for task in tasks]),
        served=_union([task.outputs(PredictOptions()) for task in tasks]),
        max_rows=config.onnx.batching.max_rows,
        examples=next((found for task in tasks if (found := task.examples())), []),
        parallel=config.onnx.batching.parallel,
        threads=config.onnx.batching.threads,
    )


def _union(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in names for name in each))


def _declared(
    bundle: Path,
    config: BundleConfig,
    version: VersionFolder,
    concepts: tuple[Concept, ...],
    limits: Limits,
    main: Plan,
    make_plan: MakePlan,
) -> list[tuple[Plan, Task]]:
    """The declared methods, each with its file as it is; those of one file have the same plan.

    Raises:  BundleInvalid.
    """
    found: dict[Path, Plan] = {} if main.wrapped_input or main.wrapped_output else {main.file: main}
    tasks: list[tuple[Plan, Task]] = []
    for section in config.onnx.methods:
        file = check_inside(bundle, version.path / section.file if section.file else version.model_file)
        if file not in found:
            ways = config.onnx.model_dump(include={"device", "precision", "tf32", "cuda_graphs"})
            raw = dataclasses.replace(config, onnx=OnnxSection(file=file.name, **ways))
            found[file] = make_plan(bundle, raw, dataclasses.replace(version, model_file=file), 0)
        plan = found[file]
        task = Declared(
            section, plan.inputs, plan.outputs, concepts, version.path, limits.concepts_default, plan.finds_rows
        )
        tasks.append((plan, task))
    return tasks


def _make_task(bundle: Path, config: BundleConfig, version: VersionFolder, plan: Plan, limits: Limits) -> Task:
    section = config.onnx
    dtypes = {spec.name: spec.dtype for spec in plan.inputs if spec.dtype is not None}
    side: InputSide
    if section.image:
        side = ImageSide(section.image, plan.wrapped_input, dtypes.get(section.image.input))
    elif section.text:
        path = check_inside(bundle, version.path / section.text.tokenizer)
        side = TextSide(section.text, TextTokenizer(path, section.text.max_tokens), dtypes)
    else:
        return RawTensors(plan.inputs, plan.outputs)
    if section.scores:
        return Classifier(side, section.scores, plan.wrapped_output, limits.concepts_default)
    assert section.embedding is not None
    return Embedder(side, section.embedding, plan.wrapped_output)


def _numbered(concepts: tuple[Concept, ...], config: BundleConfig, plan: Plan) -> tuple[Concept, ...]:
    """The concepts, numbered when the bundle names none. Raises: BundleInvalid: their count is not the graph's."""
    if config.onnx.scores is None:
        return concepts
    name = plans.SCORES if plan.wrapped_output else config.onnx.scores.output
    shape = next((spec.shape for spec in plan.outputs if spec.name == name), ())
    known = [axis for axis in shape[1:] if axis is not None]
    width = int(np.prod(known)) if shape and len(known) == len(shape) - 1 else None
    if concepts and width is not None and width != len(concepts):
        raise BundleInvalid(
            f"The graph has {width} scores and the bundle lists {len(concepts)} concepts; list one for each score, in "
            "output order."
        )
    if not concepts and width is None:
        raise BundleInvalid("How many scores the graph has is not fixed; list the concepts in config.yaml.")
    return concepts or tuple(Concept(str(index), str(index)) for index in range(width or 0))


def _tried(function: Callable[[Payload], _T], payload: Payload) -> _T | ApplianceError:
    try:
        return function(payload)
    except InputError as error:
        return error


def _bytes(arrays: Mapping[str, np.ndarray]) -> int:
    count = 0
    for array in arrays.values():
        count += array.nbytes
    return count


def _size(payload: Payload) -> int:
    size = len(payload.image or b"") + len(payload.text or "") + sum(a.nbytes for a in payload.arrays.values())
    # What the values of a declared method weigh is not looked at: they are never small work.
    return size + _SMALL_WORK if payload.arguments else size


def _groups(decoded: Mapping[int, Decoded], merge: bool) -> list[list[int]]:
    """Inputs whose rows have the same shapes, together; each by itself when they may have several rows."""
    groups: dict[object, list[int]] = {}
    for index, row in decoded.items():
        key = tuple((name, array.shape) for name, array in row.feeds.items()) if merge else index
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _squeezed(answer: Answer, row: Decoded) -> Answer:
    if row.squeeze and isinstance(answer, Tensors):
        return Tensors({name: array[0] if array.ndim else array for name, array in answer.arrays.items()})
    return answer
