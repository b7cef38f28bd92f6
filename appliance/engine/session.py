"""ONNX Runtime sessions: the only module that imports onnxruntime.

Telemetry is switched off before the import: onnxruntime's Linux wheels since 1.29 upload usage data and keep a device
database otherwise, and `disable_telemetry_events()` comes too late to prevent the database.
"""

import contextlib
import ctypes
import functools
import io
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime as ort  # after the variable above

from appliance.core.errors import BundleInvalid, DeviceError, InferenceFailed
from appliance.core.types import Array

ort.set_default_logger_severity(4)  # what fails is raised, and logged by us at a bounded rate

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16,
    "tensor(int16)": np.int16,
    "tensor(uint32)": np.uint32,
    "tensor(int32)": np.int32,
    "tensor(uint64)": np.uint64,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}

_OUT_OF_MEMORY = ("failed to allocate", "out of memory", "bad_alloc", "bad allocation", "bfcarena")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        dtype: None for what is not a plain numeric tensor (strings, sequences, maps).
        shape: a number for a fixed axis, None for a dynamic one.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | None, ...]

    @property
    def dynamic_batch(self) -> bool:
        """Whether the first axis may have any length."""
        return bool(self.shape) and self.shape[0] is None


@dataclass(frozen=True, slots=True)
class Device:
    """Where sessions run: "cpu", or one GPU by its CUDA index; `reason` says why "auto" took it."""

    kind: str
    index: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


class OutOfMemory(InferenceFailed):
    """The device had no room for this run; fewer rows may fit."""

    def __init__(self, detail: str) -> None:
        super().__init__("The device has too little free memory for this input.", detail=detail)


class Session:
    """One loaded graph on one device. `run` may be called from any thread; it releases the interpreter lock."""

    def __init__(
        self,
        model: bytes | Path,
        external_folder: Path,
        device: Device,
        threads: int,
        gpu_memory: int | None = None,
        weights: Mapping[str, bytes] | None = None,
    ) -> None:
        """Load a graph.

        Args:
            model: serialised ModelProto, or the file.
            external_folder: where tensors stored outside the graph lie.
            threads: CPU threads for one run.
            gpu_memory: bound of the session's GPU arena, bytes.
            weights: content of files that tensors are stored in, by the name that the graph gives them; not read from
                the folder then, and not needed any more once the session is there.
        Raises:
            BundleInvalid: onnxruntime cannot load the graph.
            DeviceError: the graph did not get the GPU it must have.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1 if device.kind == "gpu" else threads
        options.inter_op_num_threads = 1
        # Spinning threads starve their neighbours when cores are shared with decoding and TLS.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if isinstance(model, bytes):
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(external_folder)
            )
        if _bound:
            # Weights are not what runs take.
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if weights:
            sizes = [len(content) for content in weights.values()]
            options.add_external_initializers_from_files_in_memory(list(weights), list(weights.values()), sizes)
        try:
            self._session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=_providers(device, gpu_memory)
            )
        except Exception as error:  # onnxruntime raises classes of its own, and RuntimeError, for bad graphs
            raise BundleInvalid(f"onnxruntime {ort.__version__} cannot load the graph: {_first_line(error)}") from error
        self._runs: dict[int, Any] = {}
        self._ended = False
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if device.kind == "gpu" and self.providers[0] != "CUDAExecutionProvider":
            raise DeviceError(gpu_problem(device.index) or "onnxruntime fell back from the GPU to the CPU.")
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Compute the named outputs.

        Raises: OutOfMemory: fewer rows may fit. InferenceFailed: the graph cannot compute these inputs.
        """
        try:
            return self._run(outputs, feeds)
        except OutOfMemory:
            if not _bound:
                raise
        # What the arena keeps for runs of other shapes may be what is missing.
        give_memory_back()
        return self._run(outputs, feeds)

    def _run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        options = ort.RunOptions()
        thread = threading.get_ident()
        self._runs[thread] = options
        options.terminate = self._ended
        try:
            results: list[Array] = self._session.run(list(outputs), dict(feeds), options)
        except Exception as error:  # as above
            text = str(error)
            if any(mark in text.lower() for mark in _OUT_OF_MEMORY):
                raise OutOfMemory(text) from error
            raise InferenceFailed("The model failed on this input.", detail=text) from error
        finally:
            del self._runs[thread]
        return results

    def terminate(self, thread: int | None = None, *, for_good: bool = False) -> None:
        """End the runs in progress soon: they raise InferenceFailed. Called from any thread.

        Args:
            thread: only the run on this thread (`threading.get_ident`).
            for_good: later runs fail at once too.
        """
        self._ended = self._ended or for_good
        for runner, options in tuple(self._runs.items()):
            if thread is None or runner == thread:
                options.terminate = True


_bound: list[int] = []


def bound_runs(size: int) -> None:
    """Bound the bytes of the CPU's memory that all runs of this process take at once, results included.

    A graph may make more of its input than anybody reserved: a shape that a caller chooses, say. Weights do not count.
    The first call is the one that counts, for sessions that are made after it.
    """
    if _bound:
        return
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # Extended as requested: doubling would meet the bound at half of it.
    ort.create_and_register_allocator(info, ort.OrtArenaCfg({"max_mem": size, "arena_extend_strategy": 1}))
    _bound.append(size)
    give_memory_back()  # an arena never gives its first piece back: let that be a small one


def give_memory_back() -> None:
    """Have the arena of `bound_runs` give back what no run holds; takes some tens of microseconds."""
    if not _bound:
        return
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    _small_session().run(None, {"x": np.ones((1,), np.float32)}, options)


@functools.cache
def _small_session() -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1")
    return ort.InferenceSession(_identity_graph(), options, providers=["CPUExecutionProvider"])


def version() -> str:
    """onnxruntime's version."""
    return str(ort.__version__)


def canary(device: Device) -> None:
    """Run a graph of one addition on the device. Raises: InferenceFailed, DeviceError: it cannot."""
    _canary_session(device).run(["y"], {"x": np.ones((1,), np.float32)})


@lru_cache(maxsize=1)
def _canary_session(device: Device) -> Session:
    return Session(_identity_graph(), Path(), device, 1)


def resolve_device(wanted: str) -> Device:
    """Turn "auto", "cpu", "gpu" or "gpu:N" into a device that works.

    Raises: DeviceError: a GPU is required and cannot be used; names what is missing. Never falls back silently.
    """
    if wanted == "cpu":
        return Device("cpu", reason="as configured")
    index = int(wanted.partition(":")[2] or 0)
    problem = gpu_problem(index)
    if problem is None:
        return Device("gpu", index, "as configured" if wanted != "auto" else "a GPU works")
    if wanted == "auto":
        return Device("cpu", reason=problem)
    raise DeviceError(f'engine.device is "{wanted}": {problem} Or set engine.device = "cpu".')


def gpu_problem(index: int) -> str | None:
    """Why GPU `index` cannot run a graph, or None when it just ran one."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "This onnxruntime has no CUDA; install the GPU package (extra `gpu`)."
    for library in ("libcuda.so.1", *_provider_libraries()):
        missing = _missing_library(library)
        if missing and library != "libcuda.so.1":
            # CUDA's user libraries may lie beside onnxruntime as Python packages, where the loader does not look by
            # itself. What this prints about those it misses is said better below.
            with contextlib.redirect_stdout(io.StringIO()):
                ort.preload_dlls()
            missing = _missing_library(library)
        if missing:
            return f"The library {missing} cannot be loaded; install the NVIDIA driver and CUDA 13 libraries."
    try:
        session = ort.InferenceSession(_identity_graph(), providers=_providers(Device("gpu", index), None))
        if session.get_providers()[0] != "CUDAExecutionProvider":
            return f"onnxruntime could not use GPU {index}."
        session.run(None, {"x": np.ones((1,), np.float32)})
    except Exception as error:  # as above: any failure means "not usable", and the text says why
        return f"GPU {index} failed a probe run: {_first_line(error)}"
    return None


def _providers(device: Device, gpu_memory: int | None) -> list[Any]:
    if device.kind == "cpu":
        return ["CPUExecutionProvider"]
    options = {
        "device_id": str(device.index),
        # Doubling arenas waste up to half of the GPU; exhaustive search stalls the first run of every shape.
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 rounds to 10 bits of mantissa: answers would differ from the CPU's.
        "use_tf32": "0",
    }
    if gpu_memory:
        options["gpu_mem_limit"] = str(gpu_memory)
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def _provider_libraries() -> list[str]:
    folder = Path(ort.__file__).parent / "capi"
    return [str(path) for path in folder.glob("libonnxruntime_providers_cuda.so")]


def _missing_library(name: str) -> str | None:
    """The library that keeps `name` from loading: itself or one it needs."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        text = str(error)
        # The provider needs a symbol host that only onnxruntime sets up; that is not a missing file.
        return text.partition(":")[0] if "cannot open shared object file" in text else None
    return None


def _spec(node: Any) -> TensorSpec:
    kind = _DTYPES.get(node.type)
    shape = tuple(axis if isinstance(axis, int) and axis >= 0 else None for axis in node.shape)
    return TensorSpec(node.name, None if kind is None else np.dtype(kind), shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__


def _identity_graph() -> bytes:
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
