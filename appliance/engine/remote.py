"""The front's side of an engine in another process: `RemoteModel` is a `LoadedModel` whose runs happen there.

The front keeps the rows of every submission in its slab until they are answered, so that an engine may die: those that
only queued are submitted again to the one that takes its place. Rows of the run that was on when it died, which the
slab's marks tell, are submitted again one by one, each in a run of its own with nothing else beside it ("alone"). A
row whose second run crashes the engine too is answered with an error, and its neighbours with their results.
"""

import asyncio
import dataclasses
import json
import logging
import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from appliance.core.errors import ApplianceError, DeadlineExceeded, InferenceFailed, Overloaded, of_data
from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine import link
from appliance.engine.batcher import Outcome, check_queue, put_together
from appliance.engine.inline import Waiter
from appliance.engine.link import Definitions, Stream
from appliance.engine.session import Device, TensorSpec
from appliance.engine.slab import Blocks, FrontSlab, aligned
from appliance.engine.transport import Batching, LoadedModel

_log = logging.getLogger(__name__)

_NEVER = float("inf")

_LOOK_S = 0.25
"""Seconds between two looks for submissions whose deadline has passed: the engine may be unable to say so."""

_PROMPT_TURNS = 4
"""Turns' worth of rows on their way up to which a tiny model counts as prompt: more would wait for more than that."""


class Joined(dict[str, Array]):
    """Rows that lie in a block of the slab; `EngineLink.submit` takes it over, else it is free when this goes."""

    def __init__(self, arrays: Mapping[str, Array], blocks: Blocks, offset: int) -> None:
        super().__init__(arrays)
        self._blocks: Blocks | None = blocks
        self.offset = offset

    def take_over(self) -> int:
        """The block's offset; who calls it frees the block from now on."""
        self._blocks = None
        return self.offset

    def let_go(self) -> None:
        """Free it, unless it was taken over."""
        if self._blocks is not None:
            self._blocks.give_back_later(self.offset)
            self._blocks = None

    def __del__(self) -> None:
        self.let_go()


class _Pending:
    """A submission that has no outcome yet, or a part of one that a crash has cut into parts."""

    __slots__ = (
        "alone",
        "ask",
        "count",
        "deadline",
        "first",
        "layout",
        "model",
        "number",
        "place",
        "rows",
        "slot",
        "told",
        "waiter",
    )

    def __init__(
        self,
        number: int,
        model: "RemoteModel",
        ask: tuple[int, str, int, tuple[str, ...]],
        layout: tuple[Any, ...],
        rows: "_Rows",
        first: int,
        count: int,
        deadline: float,
        waiter: "Waiter | _Part",
        told: Callable[[Run], None] | None,
    ) -> None:
        self.number = number
        self.model = model
        self.ask = ask
        self.layout = layout
        self.rows = rows
        self.first = first
        self.count = count
        self.deadline = deadline
        self.waiter = waiter
        self.told = told
        self.alone = False
        self.slot = 0
        self.place = -1  # offset of the block that was taken for its result


class _Rows:
    """A block of rows in the slab; `users` are the submissions that need it."""

    __slots__ = ("count", "offset", "users")

    def __init__(self, offset: int, count: int) -> None:
        self.offset = offset
        self.count = count
        self.users = 1


class _Split:
    """A submission in parts: its waiter is told when all of them have ended."""

    def __init__(self, waiter: "Waiter | _Part", count: int) -> None:
        self._waiter = waiter
        self._count = count
        self._outcomes: list[tuple[int, Outcome]] = []
        self._error: BaseException | None = None
        self.open = 0

    def done(self) -> bool:
        """Whether nobody waits any more."""
        return self._waiter.done()

    def ended(self, part: "_Part", outcome: Outcome | BaseException) -> None:
        """One part has ended."""
        self.open -= 1
        if isinstance(outcome, InferenceFailed):
            outcome = Outcome({}, dict.fromkeys(range(part.count), outcome))
        if isinstance(outcome, BaseException):
            self._error = outcome
        else:
            self._outcomes.append((part.first, outcome))
        if self.open or self._waiter.done():
            return
        if self._error is not None:
            self._waiter.set_exception(self._error)
            return
        errors = {first + row: error for first, part in self._outcomes for row, error in part.errors.items()}
        pieces = [(first, part.arrays) for first, part in self._outcomes if part.arrays]
        try:
            self._waiter.set_result(put_together(self._count, pieces, errors))
        except InferenceFailed as error:
            self._waiter.set_exception(error)


class _Part:
    """Waits for one part of a `_Split`; see `Waiter`. `first` and `count` are relative to the submission."""

    __slots__ = ("_over", "_split", "count", "first")

    def __init__(self, split: _Split, first: int, count: int) -> None:
        self._split = split
        self._over = False
        self.first = first
        self.count = count
        split.open += 1

    def done(self) -> bool:
        """See `Waiter.done`."""
        return self._over or self._split.done()

    def set_result(self, outcome: Outcome, /) -> None:
        """See `Waiter.set_result`."""
        self._over = True
        self._split.ended(self, outcome)

    def set_exception(self, error: BaseException, /) -> None:
        """See `Waiter.set_exception`."""
        self._over = True
        self._split.ended(self, error)


class EngineLink:
    """One engine, as a front sees it; it may be replaced while submissions wait. Used on the event loop's thread."""

    def __init__(self, slab: FrontSlab, queue_rows: int) -> None:
        """Args: slab: the front's, for all its engines. queue_rows: rows that may wait for one model."""
        self._slab = slab
        self._queue_rows = queue_rows
        self._loop = asyncio.get_running_loop()
        self._stream: Stream | None = None
        self._asks: Definitions[tuple[int, str, int, tuple[str, ...]]] = Definitions(link.ASKS)
        self._layouts: Definitions[tuple[Any, ...]] = Definitions(link.LAYOUTS)
        self._heard: dict[int, list[Any]] = {}  # layouts that the engine defined
        self._pending: dict[int, _Pending] = {}
        self._leaving: dict[int, _Pending] = {}  # cancelled; the engine may still look at their rows
        self._models: set[RemoteModel] = set()
        self._number = 0
        self._look: asyncio.TimerHandle | None = None

    @property
    def up(self) -> bool:
        """Whether there is an engine at the other end."""
        return self._stream is not None

    # ---- engines come and go ----

    def connect(self, sock: socket.socket) -> None:
        """An engine is there, with the same models under the same handles as the one before: submit what waits."""
        if self._stream is not None:  # the one before it is gone, and we have not heard of it yet
            self._stream.close()
            self._lost()
        for model in self._models:  # what was told of the one before it may have come after its end
            model.is_available = False
        self._stream = Stream(sock, self._receive, self._lost)
        self._asks = Definitions(link.ASKS)
        self._layouts = Definitions(link.LAYOUTS)
        self._heard = {}

    def available(self, model: "RemoteModel") -> None:
        """The engine that is there now has loaded that model: submit what waits for it."""
        for pending in list(self._pending.values()):
            if pending.model is model and self._stream is not None:
                self._send(pending)

    def close(self, error: ApplianceError) -> None:
        """There will be no engine any more: everything that waits ends with `error`."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        for pending in [*self._leaving.values(), *self._pending.values()]:
            self._end(pending, error)
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _lost(self) -> None:
        """The engine is gone, and all that it sent has been received. The marks tell what it ran."""
        self._stream = None
        for model in self._models:
            model.is_available = False
        for pending in list(self._leaving.values()):
            del self._leaving[pending.number]
            self._release(pending)
        for pending in list(self._pending.values()):
            self._give_place_back(pending)
            mark = int(self._slab.marks[pending.slot]) if pending.slot else (1 << 32) | pending.count
            if pending.slot:
                self._slab.marks[pending.slot] = 0
            if mark:
                self._crashed(pending, (mark >> 32) - 1, mark & 0xFFFFFFFF)

    def _crashed(self, pending: _Pending, first: int, count: int) -> None:
        """Rows of this submission were in the run that was on when the engine died."""
        if pending.alone:
            detail = "the engine died twice with this row in a run, the second time with nothing beside it"
            error = InferenceFailed("The model's process crashed on this input, twice.", detail=detail)
            self._end(pending, Outcome({}, {0: error}))
            return
        if pending.count == 1 or pending.layout[0]:
            pending.alone = True
            return
        first = min(max(0, first), pending.count)  # what the dead wrote is not believed
        end = min(pending.count, first + count)
        split = _Split(pending.waiter, pending.count)
        spans = [(0, first, False), *((row, row + 1, True) for row in range(first, end)), (end, pending.count, False)]
        for start, stop, alone in spans:
            if stop > start:
                part = _Part(split, start, stop - start)
                self._add(pending, part, pending.first + start, stop - start, alone)
        del self._pending[pending.number]
        pending.model.waiting_rows -= pending.count
        self._release(pending)

    def _add(self, whole: _Pending, part: _Part, first: int, count: int, alone: bool) -> None:
        self._number += 1
        rows = whole.rows
        rows.users += 1
        pending = _Pending(
            self._number, whole.model, whole.ask, whole.layout, rows, first, count, whole.deadline, part, whole.told
        )
        pending.alone = alone
        self._keep(pending)

    def add(self, model: "RemoteModel") -> None:
        """That model is in the engine, or will be."""
        self._models.add(model)

    def drop(self, model: "RemoteModel", error: ApplianceError) -> None:
        """That model will not answer any more: what waits for it ends with `error`."""
        self._models.discard(model)
        for pending in [each for each in self._pending.values() if each.model is model]:
            self._leave(pending, error)

    # ---- submitting ----

    def take(self, rows: Sequence[Mapping[str, Array]]) -> Joined:
        """Copy rows, each with an axis for them, into one block of the slab. Raises: Overloaded: there is no room."""
        first = rows[0]
        if len(rows) == 1:
            counts, shapes = 1, {name: array.shape for name, array in first.items()}
        else:
            counts = sum(len(next(iter(row.values()))) for row in rows)
            shapes = {name: (counts, *array.shape[1:]) for name, array in first.items()}
        size, offsets = 0, {}
        for name, array in first.items():
            offsets[name] = size
            size += aligned(array.dtype.itemsize * math.prod(shapes[name]))
        block = self._slab.take(size)
        try:
            arrays = {
                name: self._slab.array(block + offsets[name], shapes[name], array.dtype)
                for name, array in first.items()
            }
            for name, target in arrays.items():
                if len(rows) == 1:
                    target[...] = first[name]
                else:
                    np.concatenate([row[name] for row in rows], out=target)
        except BaseException:
            self._slab.blocks.give_back(block)
            raise
        return Joined(arrays, self._slab.blocks, block)

    def submit(
        self,
        model: "RemoteModel",
        waiter: Waiter,
        feeds: Joined,
        outputs: Sequence[str],
        deadline: float | None,
        principal: str,
        priority: int,
        told: Callable[[Run], None] | None = None,
    ) -> int:
        """Send rows to the engine, or keep them for the next one; the waiter is told once.

        Returns: the submission's number. Raises: InferenceFailed, Overloaded: nothing was submitted.
        """
        whole = model.batching.mode == "whole"
        count = 1 if whole else len(next(iter(feeds.values())))
        try:
            if model.death is not None:
                raise InferenceFailed("The model cannot run any more; its operator is told why.", detail=model.death)
            check_queue(model.waiting_rows, count, self._queue_rows)
        except ApplianceError:
            feeds.let_go()
            raise
        layout = link.layout_of(feeds, whole=whole)
        self._number += 1
        pending = _Pending(
            self._number,
            model,
            (model.handle, principal, priority, tuple(outputs)),
            layout,
            _Rows(feeds.take_over(), count),
            0,
            count,
            _NEVER if deadline is None else deadline,
            waiter,
            told,
        )
        self._keep(pending)
        if model.is_available and self._stream is not None:
            self._send(pending)
        if self._look is None:
            self._look = self._loop.call_later(_LOOK_S, self._look_around)
        return pending.number

    def cancel(self, number: int) -> None:
        """Nobody waits for that submission any more."""
        pending = self._pending.get(number)
        if pending is not None:
            self._leave(pending, None)

    def _keep(self, pending: _Pending) -> None:
        pending.slot = self._slab.slots.pop() if self._slab.slots else 0
        self._pending[pending.number] = pending
        pending.model.waiting_rows += pending.count

    def _send(self, pending: _Pending) -> None:
        stream = self._stream
        assert stream is not None, "there is an engine"
        layout, ask, rows = pending.layout, pending.ask, pending.rows
        body = link.SUBMITTED.pack(
            pending.number,
            self._asks.number(stream, ask, lambda: ask),
            self._layouts.number(stream, layout, lambda: layout),
            rows.count,
            pending.first,
            pending.count,
            pending.slot,
            rows.offset,
            pending.deadline,
            (link.ALONE if pending.alone else 0) | (0 if pending.told is None else link.TIMED),
        )
        stream.send(link.SUBMIT, body)

    # ---- ending ----

    def _receive(self, kind: int, body: memoryview) -> None:
        if kind == link.DONE:
            self._done(body)
            return
        if kind == link.DEFINE:
            _, number = link.DEFINED.unpack_from(body)
            self._heard[number] = json.loads(bytes(body[link.DEFINED.size :]))
            return
        (number,) = link.NUMBER.unpack_from(body)
        if kind == link.RAN:
            timed = self._pending.get(number)
            if timed is not None and timed.told is not None:
                timed.told(Run(*link.NUMBER_AND_RUN.unpack(body)[1:]))
        elif kind == link.GONE:
            leaving = self._leaving.pop(number, None)
            if leaving is not None:
                self._release(leaving)
        elif kind == link.ROOM:
            self._give_room(*link.NUMBER_AND_SIZE.unpack(body))
        else:
            pending = self._pending.get(number) or self._leaving.get(number)
            if pending is not None:
                self._end(pending, of_data(json.loads(bytes(body[link.NUMBER.size :]))))

    def _done(self, body: memoryview) -> None:
        number, layout, rows, here, told = link.OUTCOME.unpack_from(body)
        pending = self._pending.get(number) or self._leaving.get(number)
        if pending is None:
            return
        errors: dict[int, ApplianceError] = {}
        start = link.OUTCOME.size
        if told:
            spoken = json.loads(bytes(body[start : start + told]))
            errors = {int(row): of_data(error) for row, error in spoken.items()}
        # A copy of its own: the message's memory is shared with its neighbours, and the slab's is soon another's.
        source, offset = bytearray(body[start + told : start + told + here]), max(0, pending.place)
        arrays: dict[str, Array] = {}
        if layout != link.NOTHING:
            whole, *parts = self._heard[layout]
            for name, dtype, rest in parts:
                shape = rest if whole else (rows, *rest)
                if pending.place >= 0:
                    arrays[name] = self._slab.array(offset, shape, np.dtype(dtype)).copy()
                else:
                    arrays[name] = np.ndarray(shape, dtype, source, offset)
                offset += aligned(arrays[name].nbytes)
        self._end(pending, Outcome(arrays, errors))

    def _give_room(self, number: int, size: int) -> None:
        """A long result may be written into the slab; where there is no room for it, it is not wanted any more."""
        pending = self._pending.get(number)
        if pending is None:
            return
        try:
            pending.place = self._slab.take(size)
        except Overloaded as error:
            self._leave(pending, error)
            return
        if self._stream is not None:
            self._stream.send(link.PLACE, link.PLACED.pack(number, pending.place))

    def _leave(self, pending: _Pending, error: ApplianceError | None) -> None:
        """It ends here; its memory is free when the engine does not look at it any more."""
        del self._pending[pending.number]
        pending.model.waiting_rows -= pending.count
        if self._stream is not None:
            self._leaving[pending.number] = pending
            self._stream.send(link.CANCEL, link.NUMBER.pack(pending.number))
        else:
            self._release(pending)
        if error is not None and not pending.waiter.done():
            pending.waiter.set_exception(error)

    def _end(self, pending: _Pending, outcome: Outcome | ApplianceError) -> None:
        if self._leaving.pop(pending.number, None) is not None:
            self._release(pending)
            return
        del self._pending[pending.number]
        pending.model.waiting_rows -= pending.count
        self._release(pending)
        waiter = pending.waiter
        if waiter.done():
            return
        if isinstance(outcome, Outcome):
            waiter.set_result(outcome)
        else:
            waiter.set_exception(outcome)

    def _release(self, pending: _Pending) -> None:
        """Its memory, its slot and its place are free."""
        self._give_place_back(pending)
        if pending.slot:
            self._slab.marks[pending.slot] = 0
            self._slab.slots.append(pending.slot)
            pending.slot = 0
        pending.rows.users -= 1
        if not pending.rows.users:
            self._slab.blocks.give_back(pending.rows.offset)

    def _give_place_back(self, pending: _Pending) -> None:
        if pending.place >= 0:
            self._slab.blocks.give_back(pending.place)
            pending.place = -1

    # ---- looking around ----

    def _look_around(self) -> None:
        """End what is over its deadline, and let the slab give back what nobody has needed for a while."""
        now = time.monotonic()
        # Parts of a submission whose caller left, too: nobody cancels them.
        for pending in [each for each in self._pending.values() if each.deadline <= now or each.waiter.done()]:
            self._leave(pending, DeadlineExceeded())
        again = self._slab.rest() or self._pending
        self._look = self._loop.call_later(_LOOK_S, self._look_around) if again else None


class RemoteModel:
    """A graph in an engine's process; implements `LoadedModel`."""

    def __init__(self, engine: EngineLink, handle: int, described: Mapping[str, Any]) -> None:
        """Args: handle: what the engine knows it by. described: what `describe` made of it there."""
        self._link = engine
        self.handle = handle
        self.inputs = tuple(TensorSpec.of(each) for each in described["inputs"])
        self.outputs = tuple(TensorSpec.of(each) for each in described["outputs"])
        self.device = Device(**described["device"])
        self.providers = tuple(described["providers"])
        self.batching = Batching(**described["batching"])
        self.waiting_rows = 0
        self.death: str | None = None
        self.is_available = False
        """Whether the engine that is there now has it; else what is submitted waits."""
        engine.add(self)

    def prompt(self, rows: int) -> bool:
        """See `LoadedModel.prompt`: the engine runs it in the next turns of its loop."""
        inline = self.batching.inline_rows
        return rows <= inline and self.waiting_rows + rows <= inline * _PROMPT_TURNS and self.is_available

    def join(self, rows: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
        """See `LoadedModel.join`. Raises: Overloaded."""
        return self._link.take(rows)

    def submit(
        self,
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        deadline: float | None,
        principal: str,
        *,
        priority: int = 0,
        told: Callable[[Run], None] | None = None,
    ) -> "asyncio.Future[Outcome]":
        """See `LoadedModel.submit`."""
        joined = feeds if isinstance(feeds, Joined) else self._link.take([feeds])
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        number = self._link.submit(self, future, joined, outputs, deadline, principal, priority, told)
        future.add_done_callback(lambda done: self._link.cancel(number) if done.cancelled() else None)
        return future

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
        told: Callable[[Run], None] | None = None,
    ) -> None:
        """See `LoadedModel.submit_prompt`. Raises: Overloaded: there is no room in the slab."""
        joined = feeds if isinstance(feeds, Joined) else self._link.take([feeds])
        self._link.submit(self, waiter, joined, outputs, deadline, principal, priority, told)

    def available(self) -> None:
        """The engine has loaded it."""
        if not self.is_available:
            self.is_available = True
            self._link.available(self)

    def give_up(self, reason: str) -> None:
        """It cannot run any more: what waits is told, and so is whoever comes."""
        self.death = reason
        self._link.drop(self, InferenceFailed("The model cannot run any more.", detail=reason))

    async def drain(self) -> None:
        """See `LoadedModel.drain`."""
        while self.waiting_rows:  # noqa: ASYNC110  # what ends them are several places; a swap is in no hurry
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """See `LoadedModel.close`: the engine itself is told by the supervisor, when all fronts have let go."""
        self.give_up("it was closed")


def describe(model: LoadedModel) -> dict[str, Any]:
    """What a front must know of a model that is loaded here, as plain data; see `RemoteModel`."""
    batching, device = model.batching, model.device
    return {
        "inputs": [spec.described() for spec in model.inputs],
        "outputs": [spec.described() for spec in model.outputs],
        "device": dataclasses.asdict(device),
        "providers": list(model.providers),
        "batching": {
            "mode": batching.mode,
            "max_rows": batching.max_rows,
            "reason": batching.reason,
            "inline_rows": batching.inline_rows,
        },
    }
