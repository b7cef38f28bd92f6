"""The engine's side of its fronts: their submissions go to the models' batchers, the outcomes back.

Each front has a stream and a slab. Rows are read where they lie; results are told in the stream, or written into the
slab at a place that the front gives. A front that is gone takes its submissions with it.
"""

import asyncio
import json
import logging
import math
import socket
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from appliance.core.errors import ApplianceError, Draining, InferenceFailed, as_data
from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine import link
from appliance.engine.batcher import Outcome
from appliance.engine.link import Definitions, Stream
from appliance.engine.slab import Slab, aligned
from appliance.engine.worker import LocalModel

_log = logging.getLogger(__name__)


class FrontLink:
    """One front, as its engine sees it. Used on the event loop's thread."""

    def __init__(
        self,
        sock: socket.socket,
        slab: Slab,
        models: Mapping[int, LocalModel],
        on_close: "Callable[[FrontLink], None]" = lambda gone: None,
    ) -> None:
        """Args: models: by handle; those loaded later are found in it too."""
        self._models = models
        self._slab = slab
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._asks: dict[int, list[Any]] = {}
        self._layouts: dict[int, list[Any]] = {}
        self._told: Definitions[tuple[Any, ...]] = Definitions(link.LAYOUTS)
        self._submissions: dict[int, _Submission] = {}
        self._leaving: dict[int, weakref.ref[Array]] = {}
        self._stream = Stream(sock, self._receive, self._gone)

    def close(self) -> None:
        """End it: nobody hears of what is still running."""
        self._stream.close()
        self._gone()

    def _gone(self) -> None:
        for submission in list(self._submissions.values()):
            submission.leave()
        self._submissions.clear()
        self._leaving.clear()
        self._slab.close()
        self._on_close(self)

    # ---- in ----

    def _receive(self, kind: int, body: memoryview) -> None:
        if kind == link.SUBMIT:
            self._submit(*link.SUBMITTED.unpack(body))
        elif kind == link.DEFINE:
            what, number = link.DEFINED.unpack_from(body)
            names = self._asks if what == link.ASKS else self._layouts
            names[number] = json.loads(bytes(body[link.DEFINED.size :]))
        elif kind == link.CANCEL:
            self._cancel(*link.NUMBER.unpack(body))
        elif kind == link.PLACE:
            number, offset = link.PLACED.unpack(body)
            submission = self._submissions.get(number)
            if submission is not None and submission.outcome is not None:
                self._write(submission, submission.outcome, offset)

    def _submit(
        self,
        number: int,
        ask: int,
        layout: int,
        rows: int,
        first: int,
        count: int,
        slot: int,
        offset: int,
        deadline: float,
        flags: int,
    ) -> None:
        handle, principal, priority, outputs = self._asks[ask]
        submission = _Submission(self, number, SlabMarks(self._slab, slot))
        self._submissions[number] = submission
        try:
            model = self._models.get(handle)
            if model is None:
                raise Draining
            feeds = self._feeds(submission, self._layouts[layout], rows, first, count, offset)
            until = None if deadline == float("inf") else deadline
            alone, marks = bool(flags & link.ALONE), submission.marks
            told = partial(self._ran, number) if flags & link.TIMED else None
            if not alone and model.prompt(count):
                model.submit_prompt(
                    submission, feeds, outputs, count, until, principal, priority=priority, marks=marks, told=told
                )
            else:
                future = model.submit(
                    feeds, outputs, until, principal, priority=priority, alone=alone, marks=marks, told=told
                )
                submission.future = future
                future.add_done_callback(submission.take)
        except ApplianceError as error:
            submission.set_exception(error)
        except Exception as error:
            # Whatever it is, somebody waits for an answer.
            _log.exception("a submission could not be queued")
            submission.set_exception(InferenceFailed("The model failed on this input.", detail=repr(error)))

    def _feeds(
        self, submission: "_Submission", layout: list[Any], rows: int, first: int, count: int, offset: int
    ) -> dict[str, Array]:
        """The arrays, over the slab's memory. They all hang on one, whose end tells that nobody reads them any more.

        Raises: ValueError: they do not lie within the slab.
        """
        whole, *parts = layout
        shapes = [(name, np.dtype(dtype), rest if whole else (rows, *rest)) for name, dtype, rest in parts]
        sizes = [dtype.itemsize * math.prod(shape) for _, dtype, shape in shapes]
        memory = submission.rows = self._slab.bytes_at(offset, sum(map(aligned, sizes)))
        feeds: dict[str, Array] = {}
        at = 0
        for (name, dtype, shape), size in zip(shapes, sizes, strict=True):
            array = memory[at : at + size].view(dtype).reshape(shape)
            feeds[name] = array if whole or count == rows else array[first : first + count]
            at += aligned(size)
        return feeds

    def _cancel(self, number: int) -> None:
        submission = self._submissions.pop(number, None)
        if submission is None:  # its end and the word that it should end have met
            self._stream.send(link.GONE, link.NUMBER.pack(number))
            return
        rows = submission.rows
        submission.leave()
        if rows is None:
            self._stream.send(link.GONE, link.NUMBER.pack(number))
            return
        # A run may be reading the rows: they are free when the last array over them is gone, on whichever thread.
        self._leaving[number] = weakref.ref(rows, lambda _: self._loop.call_soon_threadsafe(self._let_go, number))

    def _let_go(self, number: int) -> None:
        if self._leaving.pop(number, None) is not None:
            self._stream.send(link.GONE, link.NUMBER.pack(number))

    # ---- out ----

    def _ran(self, number: int, run: Run) -> None:
        """Rows of a submission were in a run."""
        self._stream.send(link.RAN, link.NUMBER_AND_RUN.pack(number, *run))

    def ended(self, submission: "_Submission", outcome: Outcome | BaseException) -> None:
        """A submission has ended: tell its front, at once or when there is a place for the result."""
        if submission.number not in self._submissions:
            return
        submission.marks.let_go()
        if not isinstance(outcome, Outcome):
            if not isinstance(outcome, ApplianceError):
                _log.error("a submission failed unexpectedly", exc_info=outcome)
                outcome = InferenceFailed("The model failed on this input.", detail=repr(outcome))
            del self._submissions[submission.number]
            self._stream.send(link.FAILED, link.NUMBER.pack(submission.number) + json.dumps(as_data(outcome)).encode())
            return
        size = 0
        for array in outcome.arrays.values():
            size += aligned(array.nbytes)
        if size > link.INLINE:
            submission.outcome = outcome
            self._stream.send(link.ROOM, link.NUMBER_AND_SIZE.pack(submission.number, size))
        else:
            self._write(submission, outcome, None)

    def _write(self, submission: "_Submission", outcome: Outcome, place: int | None) -> None:
        arrays = outcome.arrays
        here, layout, rows = b"", link.NOTHING, 0
        if arrays:
            rows, whole = _common_rows(arrays)
            what = link.layout_of(arrays, whole=whole)
            layout = self._told.number(self._stream, what, lambda: what)
            if place is None:
                here = b"".join(_padded(array) for array in arrays.values())
            else:
                for array in arrays.values():
                    self._slab.array(place, array.shape, array.dtype)[...] = array
                    place += aligned(array.nbytes)
        told = b""
        if outcome.errors:
            told = json.dumps({row: as_data(error) for row, error in outcome.errors.items()}).encode()
        del self._submissions[submission.number]
        head = link.OUTCOME.pack(submission.number, layout, rows, len(here), len(told))
        self._stream.send(link.DONE, b"".join((head, told, here)))


class _Submission:
    """A front's submission here; waits for its outcome, see `Waiter`."""

    __slots__ = ("_front", "_over", "_then", "future", "marks", "number", "outcome", "rows")

    def __init__(self, front: FrontLink, number: int, marks: "SlabMarks") -> None:
        self._front = front
        self._over = False
        self._then: Callable[[object], object] | None = None
        self.number = number
        self.marks = marks
        self.rows: Array | None = None
        self.future: asyncio.Future[Outcome] | None = None
        self.outcome: Outcome | None = None  # waits for a place

    def done(self) -> bool:
        """See `Waiter.done`."""
        return self._over

    def set_result(self, outcome: Outcome | BaseException, /) -> None:
        """See `Waiter.set_result`."""
        self._over = True
        self._front.ended(self, outcome)
        if self._then is not None:
            self._then(self)

    def set_exception(self, error: BaseException, /) -> None:
        """See `Waiter.set_exception`."""
        self.set_result(error)

    def cancel(self) -> None:
        """See `Waiter.cancel`."""
        if not self._over:
            self.set_exception(Draining())

    def add_done_callback(self, callback: Callable[[object], object], /) -> None:
        """See `Waiter.add_done_callback`; there is one at most."""
        self._then = callback

    def take(self, future: "asyncio.Future[Outcome]") -> None:
        """The batcher's future is done."""
        if future.cancelled():
            self.cancel()
        elif (error := future.exception()) is not None:
            if not self._over:
                self.set_exception(error)
        elif not self._over:
            self.set_result(future.result())

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self._over = True
        self.marks.let_go()
        if self.future is not None:
            self.future.cancel()
        if self._then is not None:
            self._then(self)
        self.rows = self.outcome = None


class SlabMarks:
    """Shows in the slab which rows of a submission are in a run: `Marks` that outlive their process.

    Of several runs at once it shows all rows from the first of them to the last.
    """

    __slots__ = ("_runs", "_slab", "_slot")

    def __init__(self, slab: Slab, slot: int) -> None:
        self._slab = slab
        self._slot = slot
        self._runs: tuple[tuple[int, int], ...] = ()

    def running(self, start: int, count: int) -> None:
        """See `Marks.running`."""
        self._show((*self._runs, (start, count)))

    def idle(self, start: int, count: int) -> None:
        """See `Marks.idle`."""
        self._show(tuple(run for run in self._runs if run != (start, count)))

    def let_go(self) -> None:
        """The front may give the slot to another submission now, also where a run of this one goes on."""
        self._slot = 0

    def _show(self, runs: tuple[tuple[int, int], ...]) -> None:
        self._runs = runs
        slot = self._slot
        if not slot:
            return
        mark = 0
        if runs:
            first = min(start for start, _ in runs)
            mark = (first + 1) << 32 | (max(start + count for start, count in runs) - first)
        # One store of eight aligned bytes: whoever reads it after a crash sees all of it or what was there before.
        self._slab.marks[slot] = mark


def _common_rows(arrays: Mapping[str, Array]) -> tuple[int, bool]:
    """How many rows all arrays have, and whether they must be told whole as they have no such number."""
    counts = {array.shape[0] if array.ndim else -1 for array in arrays.values()}
    if len(counts) == 1 and -1 not in counts:
        return counts.pop(), False
    return 0, True


def _padded(array: Array) -> bytes:
    data = array.tobytes()
    return data + bytes(aligned(len(data)) - len(data))
