"""A model whose runs the test controls, in place of a session."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from appliance.core.errors import InferenceFailed
from appliance.core.types import Array
from appliance.engine.batcher import Batcher
from appliance.engine.session import OutOfMemory

WAIT_S = 10.0
"""How long a test waits for what must come at once; only ever spent when it fails."""


class FakeModel:
    """Computes "double" and "next" of the input `x`; blocks, fails and counts as it is told.

    Attributes:
        runs: the values of every run, in order.
        asked: the outputs of every run.
        poison: values whose presence makes a run fail.
        room: rows from which on a run is out of memory, None for all the room in the world.
        crash: raised by the next run instead of anything else.
        obeys: whether a run ends when it is told to.
        terminated: how often it was told to.
    """

    def __init__(self) -> None:
        self.runs: list[list[float]] = []
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.asked: list[tuple[str, ...]] = []
        self.poison: set[float] = set()
        self.room: int | None = None
        self.crash: BaseException | None = None
        self.gated = False
        self.obeys = True
        self.terminated = 0
        self._entered = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def terminate(self, thread: int | None = None) -> None:
        self.terminated += 1
        if self.gated and self.obeys:
            self.crash = InferenceFailed("The model failed on this input.", detail="terminated")
            self._go.release()

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        x = feeds["x"]
        self.runs.append(x.reshape(len(x), -1)[:, 0].tolist() if x.ndim else [float(x)])
        self.shapes.append({name: array.shape for name, array in feeds.items()})
        self.asked.append(tuple(outputs))
        if self.gated:
            self._entered.release()
            assert self._go.acquire(timeout=WAIT_S)
        if self.crash is not None:
            raise self.crash
        if self.room is not None and len(x) > self.room:
            raise OutOfMemory("Failed to allocate memory for requested buffer")
        if self.poison & set(self.runs[-1]):
            raise InferenceFailed("The model failed on this input.", detail="poison")
        return [self.compute(name, x) for name in outputs]

    def compute(self, name: str, x: Array) -> Array:
        return {"double": x * 2, "next": x + 1}[name]

    async def entered(self) -> None:
        """Return when a run has begun."""
        assert await asyncio.to_thread(self._entered.acquire, timeout=WAIT_S), "no run began"

    def let_go(self, runs: int = 1) -> None:
        """Let that many runs go on."""
        self._go.release(runs)

    def open_gate(self) -> None:
        """Block no run any more."""
        self.gated = False
        self._go.release(1000)


def rows(*values: float, width: int = 1) -> dict[str, Array]:
    """One row a value, float32 (rows, width)."""
    return {"x": np.repeat(np.array(values, np.float32)[:, None], width, axis=1)}


Submit = Callable[..., "asyncio.Future[Any]"]


def submitter(batcher: Batcher) -> Submit:
    """`submit` with the arguments that most tests do not care about filled in."""

    def submit(
        *values: float,
        outputs: Sequence[str] = ("double",),
        deadline: float | None = None,
        principal: str = "ada",
        width: int = 1,
        **more: Any,
    ) -> "asyncio.Future[Any]":
        return batcher.submit(rows(*values, width=width), outputs, deadline, principal, **more)

    return submit
