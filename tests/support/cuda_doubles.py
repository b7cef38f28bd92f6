"""Doubles of what only a machine with a GPU has: NVML, CUDA's runtime library, and an onnxruntime session on CUDA.

"Device memory" is host memory here, so that what was copied where can be looked at. Tests marked `gpu` do the same with
the real ones.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from appliance.core.types import Array
from appliance.engine.cuda import CudaError, Runtime


class HostRuntime(Runtime):
    """CUDA's runtime on host memory; `calls` are the names of what was called, `fails` those that shall fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, str] = {}
        self.memory_of: dict[int, Any] = {}
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
        elif name == "cudaMemcpyAsync":
            target, source, size = arguments[:3]
            ctypes.memmove(target.value, source.value, size.value)


def at(address: int, shape: Sequence[int], dtype: Any) -> Array:
    """What lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape)


@dataclass
class Options:
    """Run options that remember their entries."""

    entries: dict[str, str] = field(default_factory=dict)

    def add_run_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value


class DoublingSession:
    """An onnxruntime session whose output `y` is twice its input `x`; it reads `x` where it is bound.

    Attributes: runs: how each run came: "run", or "bound" and its graph's number.
    """

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.fails: str = ""

    def run(self, outputs: list[str], feeds: Mapping[str, Array], options: Options) -> list[Array]:
        self.runs.append("run")
        return [feeds["x"] * 2 for _ in outputs]

    def io_binding(self) -> Any:
        bound = SimpleNamespace(inputs={}, outputs=[], results=[], given={})
        bound.bind_input = lambda name, kind, index, dtype, shape, address: bound.inputs.update(
            {name: (kind, address, shape, dtype)}
        )
        bound.bind_output = lambda name, kind="cpu", index=0: bound.outputs.append((name, kind))
        bound.bind_ortvalue_output = lambda name, value: bound.given.update({name: value})
        bound.get_outputs = lambda: bound.results
        bound.copy_outputs_to_cpu = lambda: [value.array.copy() for value in bound.results]
        return bound

    def run_with_iobinding(self, bound: Any, options: Options) -> None:
        self.runs.append(f"bound {options.entries.get('gpu_graph_id', '')}".strip())
        if self.fails:
            raise RuntimeError(self.fails)
        kind, address, shape, dtype = bound.inputs["x"]
        assert kind == "cuda"
        result = at(address, shape, dtype) * 2
        if bound.given:
            for value in bound.given.values():
                value.array[...] = result
            return
        bound.results = [
            SimpleNamespace(
                array=array, shape=lambda a=array: list(a.shape), data_ptr=lambda a=array: a.ctypes.data
            )
            for array in (result.copy() for _ in bound.outputs)
        ]


class Nvml:
    """The module pynvml of a machine with such GPUs; each may be cut into MIG instances."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        """As the module's own."""

    def __init__(self, *gpus: Mapping[str, Any]) -> None:
        """Args: gpus: uuid, name, total, free; perhaps instances, a list of the same, None for an empty place."""
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

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return str(handle["uuid"])

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return str(handle["name"])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[SimpleNamespace]:
        return self.processes
