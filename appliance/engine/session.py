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
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Self

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# CUDA's own order is "fastest first"; a number in a device must mean the GPU that nvidia-smi shows under it.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

import numpy as np
import onnxruntime as ort  # after the variables above

from appliance.core.errors import BundleInvalid, DeviceError, InferenceFailed
from appliance.core.types import Array
from appliance.engine import binding, cuda, gpu, tensorrt
from appliance.engine.tensorrt import Compiled

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

    def described(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        return {
            "name": self.name,
            "dtype": None if self.dtype is None else self.dtype.str,
            "shape": list(self.shape),
        }

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Self:
        """What `described` tells of. Raises: KeyError, TypeError, ValueError: that is no such description."""
        dtype = None if described["dtype"] is None else np.dtype(described["dtype"])
        shape = tuple(None if axis is None else int(axis) for axis in described["shape"])
        return cls(str(described["name"]), dtype, shape)


@dataclass(frozen=True, slots=True)
class Device:
    """Where sessions run: "cpu", or one GPU.

    Attributes:
        index: CUDA's number of it in this process.
        reason: why "auto" took it.
        uuid, name: of the GPU, where the driver says.
    """

    kind: str
    index: int = 0
    reason: str = ""
    uuid: str = ""
    name: str = ""

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


class OutOfMemory(InferenceFailed):
    """The device had no room for this run; fewer rows may fit."""

    def __init__(self, detail: str) -> None:
        super().__init__("The device has too little free memory for this input.", detail=detail)


class DevicePoisoned(InferenceFailed):
    """The device failed in a way that only a new process gets over; see `cuda.POISON`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__("The GPU failed; the engine is being replaced. Try again.", detail=f"{reason}: {detail}")
        self.reason = reason


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
        *,
        tf32: bool = False,
        compiled: Compiled | None = None,
        on_poison: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Load a graph.

        Args:
            model: serialised ModelProto, or the file.
            external_folder: where tensors stored outside the graph lie.
            threads: CPU threads for one run.
            gpu_memory: bound of the session's GPU arena, bytes; weights come on top.
            weights: content of files that tensors are stored in, by the name that the graph gives them; not read from
                the folder then, and not needed any more once the session is there (on a GPU: once it is settled).
            tf32: the GPU may round to 10 bits of mantissa in matrix products and convolutions.
            compiled: the TensorRT engine to run instead of CUDA's kernels.
            on_poison: called on the thread whose run showed that this process can use its GPU no more.
        Raises:
            BundleInvalid: onnxruntime cannot load the graph.
            DeviceError: the graph did not get the GPU it must have.
        """
        self.device = device
        self._gpu_memory = gpu_memory
        self._tf32 = tf32
        self._on_poison = on_poison
        load = partial(_load, model, external_folder, device, threads, weights or {})
        self._load = load if device.kind == "gpu" else None
        wanted = _providers(device, gpu_memory, tf32=tf32, compiled=compiled)
        self._session = load(wanted)
        self._runs: dict[int, Any] = {}
        self._ended = False
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if device.kind == "gpu" and self.providers[0] != wanted[0][0]:
            missing = tensorrt.problem() if compiled else gpu_problem(device.index)
            raise DeviceError(missing or f"onnxruntime fell back from {wanted[0][0]} to {self.providers[0]}.")
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self._bound: binding.Bound | binding.Graphs | None = None
        self._closing: Callable[[], object] = lambda: None
        if device.kind == "gpu":
            self._bound = self._bind(self._session)

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Compute the named outputs; the arrays are the caller's own.

        Raises: OutOfMemory: fewer rows may fit. DevicePoisoned: nothing runs in this process any more.
            InferenceFailed: the graph cannot compute these inputs.
        """
        try:
            return self._run(outputs, feeds)
        except OutOfMemory:
            if not _bounded or self.device.kind == "gpu":
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
            if self._bound is not None:
                return self._bound.run(outputs, feeds, options)
            results: list[Array] = self._session.run(list(outputs), dict(feeds), options)
        except Exception as error:  # onnxruntime raises classes of its own, and RuntimeError
            raise self._failure(str(error)) from error
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

    def capture(self, outputs: Sequence[str], batches: Sequence[Mapping[str, Array]]) -> str:
        """Replay CUDA graphs of these batches from now on, if they then run at least 5 % faster in sum.

        For sessions on CUDA's own kernels, before anybody else runs them. While both ways are compared, the weights
        are on the GPU twice.

        Returns: what was found, in a sentence.
        Raises:  InferenceFailed: as `run`.
        """
        assert self._load is not None, "settled already"
        assert isinstance(self._bound, binding.Bound), "nothing to compare with"
        without = [binding.seconds(partial(self.run, outputs, feeds)) for feeds in batches]
        try:
            session = self._load(_providers(self.device, self._gpu_memory, tf32=self._tf32, graphs=True))
        except BundleInvalid as error:  # no memory for the weights twice, or nodes that only the CPU has
            return f"no CUDA graphs: {error}"
        places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        elsewhere = [node.name for node, place in places if place.name != "Cuda"]
        if elsewhere:  # a shape, say: it is copied to the host when it is bound, and a replay would not see it change
            return f"no CUDA graphs: the input {elsewhere[0]!r} is read on the host"
        graphs = binding.Graphs(session, cuda.runtime(), self.device.index, _dtypes(self._session.get_outputs()))
        try:
            for feeds in batches:
                graphs.capture(outputs, feeds, ort.RunOptions)
            captured = [binding.seconds(partial(_replay, graphs, outputs, feeds)) for feeds in batches]
        except Exception as error:  # onnxruntime's own: some operators cannot be captured
            graphs.close()
            failure = self._failure(str(error))
            if isinstance(failure, DevicePoisoned):
                raise failure from error
            return f"no CUDA graphs: they cannot be captured ({_first_line(error)})"
        share = sum(captured) / sum(without)
        found = f"runs take {share:.2f} of the time with CUDA graphs"
        if share > binding.WINS:
            graphs.close()
            return f"no CUDA graphs: {found}"
        self._closing()  # the other session goes, and its weights
        self._session, self._bound, self._closing = session, graphs, _close_with(self, graphs)
        return f"CUDA graphs: {found}"

    def settle(self) -> None:
        """Warm-up is over: inputs larger than those so far leave no memory behind on the GPU."""
        self._load = None
        if isinstance(self._bound, binding.Bound):
            self._bound.settle()

    def _bind(self, session: Any) -> binding.Bound | None:
        try:
            library = cuda.runtime()
        except OSError:  # onnxruntime found it where the loader does not look: its own way is slower, and works
            return None
        inputs, outputs = _dtypes(session.get_inputs()), _dtypes(session.get_outputs())
        bound = binding.Bound(session, library, self.device.index, inputs, outputs)
        self._closing = _close_with(self, bound)
        return bound

    def _failure(self, text: str) -> InferenceFailed:
        """The error for a run that onnxruntime or CUDA failed with this text."""
        if any(mark in text.lower() for mark in _OUT_OF_MEMORY):
            return OutOfMemory(text)
        reason = self._poison(text) if self.device.kind == "gpu" else None
        if reason is None:
            return InferenceFailed("The model failed on this input.", detail=text)
        self._on_poison(reason)
        return DevicePoisoned(reason, text)

    def _poison(self, text: str) -> str | None:
        """Why this process can use the GPU no more: the text says so, or CUDA does when it is asked."""
        reason = cuda.poison(text)
        if reason is None and isinstance(self._bound, binding.Bound | binding.Graphs):
            try:
                cuda.runtime().use(self.device.index)
                cuda.runtime().call("cudaDeviceSynchronize")
            except cuda.CudaError as error:  # a sticky error is every later call's too
                return cuda.poison(str(error))
        return reason


def _load(
    model: bytes | Path,
    external_folder: Path,
    device: Device,
    threads: int,
    weights: Mapping[str, bytes],
    providers: Sequence[Any],
) -> ort.InferenceSession:
    """Raises: BundleInvalid: onnxruntime cannot load the graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1 if device.kind == "gpu" else threads
    options.inter_op_num_threads = 1
    # Spinning threads starve their neighbours when cores are shared with decoding and TLS.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(external_folder))
    if weights:
        sizes = [len(content) for content in weights.values()]
        options.add_external_initializers_from_files_in_memory(list(weights), list(weights.values()), sizes)
    if _bounded:
        options.add_session_config_entry("session.use_env_allocators", "1")
    if _bounded or device.kind == "gpu":
        # Weights are not what runs take; and they would be rounded up in an arena.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    more = {}
    if device.kind == "gpu":
        more["enable_fallback"] = 0  # its Python layer would go on with the CPU after an error
    try:
        return ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=providers, **more
        )
    except Exception as error:  # onnxruntime raises classes of its own, and RuntimeError, for bad graphs
        raise BundleInvalid(f"onnxruntime {ort.__version__} cannot load the graph: {_first_line(error)}") from error


def _replay(graphs: binding.Graphs, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
    return graphs.run(outputs, feeds, ort.RunOptions())


def _close_with(session: Session, bound: binding.Bound | binding.Graphs) -> Callable[[], object]:
    """Free the slots when the session goes, or what is returned is called; at exit the process takes them along."""
    closing = weakref.finalize(session, _close, bound)
    closing.atexit = False
    return closing


def _close(bound: binding.Bound | binding.Graphs) -> None:
    with contextlib.suppress(cuda.CudaError):  # of a GPU that has failed nothing can be freed
        bound.close()


def _dtypes(nodes: Sequence[Any]) -> dict[str, np.dtype[Any] | None]:
    return {node.name: _spec(node).dtype for node in nodes}


_bounded: list[int] = []


def bound_runs(size: int) -> None:
    """Bound the bytes of the CPU's memory that all runs of this process take at once, results included.

    A graph may make more of its input than anybody reserved: a shape that a caller chooses, say. Weights do not count.
    The first call is the one that counts, for sessions that are made after it.
    """
    if _bounded:
        return
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # Extended as requested: doubling would meet the bound at half of it.
    ort.create_and_register_allocator(info, ort.OrtArenaCfg({"max_mem": size, "arena_extend_strategy": 1}))
    _bounded.append(size)
    give_memory_back()  # an arena never gives its first piece back: let that be a small one


def give_memory_back() -> None:
    """Have the arena of `bound_runs` give back what no run holds; takes some tens of microseconds."""
    if not _bounded:
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
    """Turn "auto", "cpu", "gpu", "gpu:N" or "gpu:UUID" into a device that works.

    Raises: DeviceError: a GPU is required and cannot be used; names what is missing. Never falls back silently.
    """
    if wanted == "cpu":
        return Device("cpu", reason="as configured")
    try:
        here = _gpu_of("gpu" if wanted == "auto" else wanted)
        problem = gpu_problem(here.ordinal)
    except DeviceError as error:
        problem = str(error)
    else:
        if problem is None:
            reason = "as configured" if wanted != "auto" else "a GPU works"
            return Device("gpu", here.ordinal, reason, here.uuid, here.name)
    if wanted == "auto":
        return Device("cpu", reason=problem)
    raise DeviceError(f'engine.device is "{wanted}": {problem} Or set engine.device = "cpu".')


def _gpu_of(wanted: str) -> gpu.Gpu:
    """The GPU that a device names. Raises: DeviceError: it is not there."""
    found = gpu.devices()
    number = wanted.partition(":")[2] or "0"
    if not found and number.isdigit():  # neither NVML nor the driver's files say anything: CUDA may know better
        return gpu.Gpu(int(number), int(number), "", "")
    return gpu.find(wanted, found)


def gpu_problem(index: int) -> str | None:
    """Why GPU `index` (CUDA's number) cannot run a graph, or None when it just ran one."""
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


def _providers(
    device: Device,
    gpu_memory: int | None,
    *,
    tf32: bool = False,
    graphs: bool = False,
    compiled: Compiled | None = None,
) -> list[Any]:
    """What onnxruntime shall try, in this order.

    Source: onnxruntime's documentation, Execution Providers, CUDA and TensorRT: provider options.
    """
    if device.kind == "cpu":
        return ["CPUExecutionProvider"]
    options = {
        "device_id": str(device.index),
        # Doubling arenas waste up to half of the GPU; exhaustive search stalls the first run of every shape.
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 rounds to 10 bits of mantissa: answers would differ from the CPU's.
        "use_tf32": "1" if tf32 else "0",
    }
    if gpu_memory:
        options["gpu_mem_limit"] = str(gpu_memory)
    if graphs:
        options["enable_cuda_graph"] = "1"
    providers: list[Any] = [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    if compiled is not None:
        providers.insert(0, ("TensorrtExecutionProvider", tensorrt.options(compiled, device.index)))
    return providers


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
