"""Runs of a CUDA session with its inputs in pinned slots, and as captured CUDA graphs where those are faster.

The sessions here are onnxruntime's; they are made in `session.py`, which alone imports it.
"""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np

from appliance.core.types import Array
from appliance.engine.cuda import Runtime, Slot

SLOT_BYTES = 256 * 2**20
"""Largest inputs that a slot takes; larger ones go the way that needs no memory of ours."""

WINS = 0.95
"""Share of the time without graphs that they must come down to: below that, they cost more than they are worth (a
thread of their own, one run at a time)."""

_MEASURED_S = 0.3
"""Seconds for which a batch is run each way when both are compared."""

Dtypes: TypeAlias = Mapping[str, "np.dtype[Any] | None"]


class Bound:
    """Runs through IO binding; any number of threads at once, each with a slot of its own."""

    def __init__(self, session: Any, library: Runtime, device: int, inputs: Dtypes, outputs: Dtypes) -> None:
        """Args: device: CUDA's number of it. inputs, outputs: the graph's; None for what is no numeric tensor."""
        self._session = session
        self._library = library
        self._device = device
        self._inputs = inputs
        self._outputs = outputs
        self._free: list[Slot] = []
        self._lock = threading.Lock()
        self._largest = 0
        self._usual: int | None = None

    def settle(self) -> None:
        """Warm-up is over: larger inputs than those so far are rare from now on, and leave no memory behind."""
        self._usual = self._largest

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array], options: Any) -> list[Any]:
        """The outputs, as arrays of their own. Raises: onnxruntime's errors; CudaError."""
        size = sum(array.nbytes for array in feeds.values())
        if self._usual is not None and size > self._usual:
            # The arena would keep what this run needs: it only ever grows (onnxruntime issue 12748).
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{self._device}")
        elif self.takes(outputs, feeds) and size <= SLOT_BYTES:
            self._largest = max(self._largest, size)
            self._library.use(self._device)
            slot = self._take()
            try:
                return bound_run(self._session, slot, self._device, outputs, feeds, options)
            finally:
                with self._lock:
                    self._free.append(slot)
        self._largest = max(self._largest, size)
        results: list[Any] = self._session.run(list(outputs), dict(feeds), options)
        return results

    def takes(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> bool:
        """Whether these can be bound; what is wrong with others, onnxruntime's own `run` says best."""
        return (
            feeds.keys() == self._inputs.keys()
            and all(array.dtype == self._inputs[name] and array.nbytes for name, array in feeds.items())
            and all(self._outputs.get(name) is not None for name in outputs)
        )

    def close(self) -> None:
        """Give the slots' memory back; nothing runs any more."""
        while self._free:
            self._free.pop().close()

    def _take(self) -> Slot:
        with self._lock:
            if self._free:
                return self._free.pop()
        return Slot(self._library, self._device)


def bound_run(
    session: Any, slot: Slot, device: int, outputs: Sequence[str], feeds: Mapping[str, Array], options: Any
) -> list[Any]:
    """One run on inputs that travel in `slot`; the outputs come back to the host as they become known."""
    addresses = slot.fill(feeds)
    binding = session.io_binding()
    _bind_inputs(binding, device, feeds, addresses)
    for name in outputs:
        binding.bind_output(name)
    session.run_with_iobinding(binding, options)
    results: list[Any] = binding.copy_outputs_to_cpu()
    return results


def _bind_inputs(binding: Any, device: int, feeds: Mapping[str, Array], addresses: Mapping[str, int]) -> None:
    for name, array in feeds.items():
        binding.bind_input(name, "cuda", device, array.dtype, list(array.shape), addresses[name])


GraphKey: TypeAlias = tuple[tuple[str, ...], tuple[tuple[str, tuple[int, ...]], ...]]


class Graphs:
    """Runs of a session that was made with `enable_cuda_graph`: batches of known shapes are replayed.

    onnxruntime keeps a captured graph with the thread that captured it, and all runs of such a session on one stream
    (cuda_execution_provider.cc, PerThreadContext), so they have one thread here.
    """

    def __init__(self, session: Any, library: Runtime, device: int, outputs: Dtypes) -> None:
        """Args: device: CUDA's number of it."""
        self._session = session
        self._library = library
        self._device = device
        self._outputs = outputs
        self._captured: dict[GraphKey, _Captured] = {}
        self._thread = ThreadPoolExecutor(1, "cuda-graphs")
        self._slot: Slot | None = None

    def capture(self, outputs: Sequence[str], feeds: Mapping[str, Array], make_options: Callable[[], Any]) -> None:
        """Record the run of a batch of this shape. Raises: whatever onnxruntime says of a graph that cannot be."""
        self._thread.submit(self._capture, tuple(outputs), feeds, make_options).result()

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array], options: Any) -> list[Any]:
        """The outputs; replayed, when a batch of this shape was captured."""
        return self._thread.submit(self._run, tuple(outputs), feeds, options).result()

    def close(self) -> None:
        """Give the memory back; nothing runs any more."""
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    # ---- on the thread ----

    def _run(self, outputs: tuple[str, ...], feeds: Mapping[str, Array], options: Any) -> list[Any]:
        self._library.use(self._device)
        captured = self._captured.get(_key(outputs, feeds))
        if captured is not None:
            return captured.replay(feeds, options)
        options.add_run_config_entry("gpu_graph_id", "-1")  # neither captured nor replayed
        self._slot = self._slot or Slot(self._library, self._device)
        return bound_run(self._session, self._slot, self._device, outputs, feeds, options)

    def _capture(self, outputs: tuple[str, ...], feeds: Mapping[str, Array], make_options: Callable[[], Any]) -> None:
        self._library.use(self._device)
        slot = Slot(self._library, self._device)
        addresses = slot.fill(feeds)
        binding = self._session.io_binding()
        _bind_inputs(binding, self._device, feeds, addresses)
        for name in outputs:
            binding.bind_output(name, "cuda", self._device)
        options = make_options()
        options.add_run_config_entry("gpu_graph_id", "-1")
        self._session.run_with_iobinding(binding, options)  # allocates, and tells the shapes of the outputs
        values = binding.get_outputs()
        for name, value in zip(outputs, values, strict=True):
            binding.bind_ortvalue_output(name, value)  # a replay writes where the captured run did
        arrays = [
            (value.data_ptr(), tuple(value.shape()), self._outputs[name])
            for name, value in zip(outputs, values, strict=True)
        ]
        captured = _Captured(self._session, self._library, slot, binding, values, arrays, len(self._captured) + 1)
        captured.replay(feeds, make_options())  # the first time, onnxruntime runs it, captures it, and replays it
        self._captured[_key(outputs, feeds)] = captured

    def _close(self) -> None:
        for captured in self._captured.values():
            captured.slot.close()
        self._captured.clear()
        if self._slot is not None:
            self._slot.close()
            self._slot = None


class _Captured:
    """One shape's graph: the buffers that it reads and writes, and the number that onnxruntime knows it by."""

    def __init__(
        self,
        session: Any,
        library: Runtime,
        slot: Slot,
        binding: Any,
        values: Any,
        arrays: Sequence[tuple[int, tuple[int, ...], "np.dtype[Any] | None"]],
        number: int,
    ) -> None:
        """Args: values: own the outputs' memory. arrays: address, shape and dtype of each output."""
        self._session = session
        self._library = library
        self.slot = slot
        self._binding = binding
        self._values = values
        self._arrays = arrays
        self._number = str(number)

    def replay(self, feeds: Mapping[str, Array], options: Any) -> list[Any]:
        self.slot.fill(feeds)  # the same shapes, so the same places
        options.add_run_config_entry("gpu_graph_id", self._number)
        self._session.run_with_iobinding(self._binding, options)
        return [self.slot.fetch(address, np.empty(shape, dtype)) for address, shape, dtype in self._arrays]


def _key(outputs: tuple[str, ...], feeds: Mapping[str, Array]) -> GraphKey:
    return outputs, tuple(sorted((name, array.shape) for name, array in feeds.items()))


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Median duration of a run, over a fraction of a second and three runs at least."""
    run()
    durations: list[float] = []
    started = before = clock()
    while len(durations) < 3 or before - started < _MEASURED_S:
        run()
        after = clock()
        durations.append(after - before)
        before = after
    return statistics.median(durations)
