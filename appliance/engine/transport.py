"""The engine seam: submit rows, await arrays. Who implements it, and in which process, nobody above needs to know."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from appliance.core.timing import Run
from appliance.core.types import Array
from appliance.engine.batcher import Outcome
from appliance.engine.gate import RunBoard
from appliance.engine.inline import Waiter
from appliance.engine.plan import Plan
from appliance.engine.session import Device, TensorSpec


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What the engine needs to load a model.

    Attributes:
        name: model and version, for the log and metrics: ("digits", "1").
        device: overrides the engine's own; None follows it.
        compared: outputs whose values the independence probe may compare.
        served: the outputs that most requests ask for; used to warm up.
        max_rows, parallel: rows in one run, and runs at a time, from the bundle; None measures it.
        threads: for one run on the CPU, from the bundle; None: as the engine is configured.
        examples: for each shape bucket four rows with a batch axis of 1, the last one an outlier, shortest bucket
            first; empty when the inputs have axes whose length only the caller knows.
        board: told of every run, or None.
    """

    name: tuple[str, str]
    plan: Plan
    device: str | None
    compared: tuple[str, ...]
    served: tuple[str, ...]
    max_rows: int | None
    examples: Sequence[Sequence[Mapping[str, Array]]]
    board: RunBoard | None = None
    parallel: int | None = None
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Batching:
    """How rows of this model are run, and why.

    Attributes:
        mode: "rows" (merged), "separate" (one a run) or "whole" (no batch axis).
        max_rows: in one run, of the shape that may have most.
        inline_rows: how many may be run in one turn of the loop by the loop itself; 0: none, the runs are too long.
        buckets: rows in one run for each shape bucket, shortest first; empty: `max_rows` for each.
        parallel: runs at a time.
        curve: what was measured, for operators.
    """

    mode: str
    max_rows: int
    reason: str = ""
    inline_rows: int = 0
    buckets: tuple[int, ...] = ()
    parallel: int = 1
    curve: str = ""


class LoadedModel(Protocol):
    """One graph on its device, warmed up."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: Device
    providers: tuple[str, ...]
    batching: Batching

    @property
    def death(self) -> str | None:
        """Why this model cannot run any more, or None."""

    @property
    def waiting_rows(self) -> int:
        """Rows in its queue now."""

    def prompt(self, rows: int) -> bool:
        """Whether so many rows that are submitted now are run soon, on the loop's own thread."""

    def join(self, rows: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
        """Rows, each with an axis for them, as one array an input; may be called from any thread.

        What it gives is submitted next, and once: it may lie in memory that the submission frees.

        Raises: Overloaded: there is no memory for them now.
        """

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
        """Queue rows; see `Batcher.submit`."""

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
        """Run rows that `prompt` has just said yes to. The waiter is told once, later than now."""

    async def drain(self) -> None:
        """Return when everything accepted has ended."""

    def close(self) -> None:
        """Answer what waits, and let the graph go."""


class Engine(Protocol):
    """One device's worth of models."""

    device: Device

    async def load(self, request: LoadRequest) -> LoadedModel:
        """Load, probe and warm up a graph.

        Raises: BundleInvalid: it cannot be loaded, or fails its first run. DeviceError: it needs a device we lack.
        """
