"""Doubles of what only a machine with a GPU has: NVML and CUDA's runtime library.

"Device memory" is host memory here: it can be looked at, and onnxruntime's CPU provider can be bound to it. Tests
marked `gpu` do the same with the real ones.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto

from appliance.core.types import Array
from appliance.engine import session as sessions
from appliance.engine.cuda import CudaError, Runtime
from appliance.engine.session import Device


class HostRuntime(Runtime):
    """CUDA's runtime on host memory; `calls` are the names of what was called, `fails` those that shall fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, str] = {}
        self.memory_of: dict[int, Any] = {}
        self.free_bytes, self.total_bytes = 10 * 2**30, 12 * 2**30
        self._streams = 0

    def call(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise CudaError(self.fails[name])
        if name in ("cudaMalloc", "cudaHostAlloc"):
            block = ctypes.create_string_buffer(arguments[1].value)
            address = ctypes.addressof(block)
            self.memory_of[address] = block
            arguments[0]._obj.value = address
        elif name in ("cudaFree", "cudaFreeHost"):
            del self.memory_of[arguments[0].value]
        elif name == "cudaStreamCreateWithFlags":
            self._streams += 1
            arguments[0]._obj.value = self._streams
        elif name == "cudaMemGetInfo":
            arguments[0]._obj.value, arguments[1]._obj.value = self.free_bytes, self.total_bytes
        elif name == "cudaMemcpyAsync":
            target, source, size = arguments[:3]
            ctypes.memmove(target.value, source.value, size.value)


def at(address: int, shape: Sequence[int], dtype: Any) -> Array:
    """What lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)


class OnHost:
    """A session of onnxruntime's CPU provider, bound where `HostRuntime` has its "device memory".

    Attributes: runs: how each run came: "run", or "bound" and the number of its CUDA graph, if it had one.
    """

    def __init__(self, model: ModelProto) -> None:
        self._session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.runs: list[str] = []
        self.before: Callable[[], None] = lambda: None
        """Called when a bound run begins."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_input_memory_infos(self) -> list[Any]:
        return [SimpleNamespace(name="Cuda") for _ in self._session.get_inputs()]

    def run(self, outputs: list[str], feeds: Mapping[str, Array], options: Any) -> Any:
        self.runs.append("run")
        return self._session.run(outputs, feeds, options)

    def io_binding(self) -> Any:
        return _BindingOnHost(self._session.io_binding())

    def run_with_iobinding(self, binding: "_BindingOnHost", options: Any) -> None:
        self.runs.append(f"bound {entry(options, 'gpu_graph_id')}".strip())
        self.before()
        self._session.run_with_iobinding(binding.real, options)


class _BindingOnHost:
    """IO binding that takes "cuda" for the host."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, name: str, kind: str, index: int, dtype: Any, shape: list[int], address: int) -> None:
        assert kind == "cuda"
        self.real.bind_input(name, "cpu", index, dtype, shape, address)

    def bind_output(self, name: str, kind: str = "cpu", index: int = 0) -> None:
        assert kind in ("cpu", "cuda")
        self.real.bind_output(name, "cpu", index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class Host:
    """A place where sessions "on a GPU" run on the CPU.

    Attributes: loaded: onnxruntime's sessions, in the order in which they were made.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device = Device("gpu", 0, name="NVIDIA H200")
        self.library = HostRuntime()
        self.loaded: list[OnHost] = []
        self.seconds = [1.0, 1.0]
        monkeypatch.setattr(sessions.cuda, "runtime", lambda: self.library)
        monkeypatch.setattr(sessions, "_load", self._load)
        monkeypatch.setattr(sessions.binding, "seconds", self._seconds)

    def _load(self, model: bytes | Path, *_: Any) -> OnHost:
        graph = model if isinstance(model, bytes) else model.read_bytes()
        self.loaded.append(OnHost(ModelProto.FromString(graph)))
        return self.loaded[-1]

    def _seconds(self, run: Any) -> float:
        run()
        return self.seconds[len(self.loaded) - 1]


def entry(options: Any, name: str) -> str:
    """A run option, "" when it is not set."""
    try:
        return str(options.get_run_config_entry(name))
    except RuntimeError:
        return ""


class Nvml:
    """The module pynvml of a machine with such GPUs; each may be cut into MIG instances."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        """As the module's own."""

    def __init__(self, *gpus: Mapping[str, Any]) -> None:
        """Args: gpus: uuid, name, total, free; perhaps instances, a list of the same, None for an empty place; perhaps
        percent, milliwatts, degrees and megahertz.
        """
        self._gpus = gpus
        self.processes: list[SimpleNamespace] = []
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"

    def nvmlDeviceGetCount(self) -> int:
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self._gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        return next(gpu for gpu in self._gpus if gpu["uuid"] == uuid)

    def nvmlDeviceGetMigMode(self, gpu: Any) -> list[int]:
        if "instances" not in gpu:
            raise self.NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Any) -> int:
        return len(gpu["instances"])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Any, index: int) -> Any:
        if gpu["instances"][index] is None:
            raise self.NVMLError("Not Found")
        return gpu["instances"][index]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        if "total" not in handle:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(total=handle["total"], free=handle["free"])

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        return SimpleNamespace(gpu=self._told(handle, "percent"), memory=0)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return self._told(handle, "milliwatts")

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._told(handle, "degrees")

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:
        assert kind == self.NVML_CLOCK_SM
        return self._told(handle, "megahertz")

    def _told(self, handle: Any, what: str) -> int:
        if what not in handle:
            raise self.NVMLError("Not Supported")
        return int(handle[what])

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return str(handle["uuid"])

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return str(handle["name"])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[SimpleNamespace]:
        return self.processes
