"""GPUs of this machine: which there are, how full they are, which one a `device` means, and which one has room.

Facts come from NVML through the optional package nvidia-ml-py; without it from the files of the driver, which know no
memory. MIG instances are GPUs of their own here, and take the place of the GPU they are cut from. Numbers ("gpu:1")
count in the order of the PCI bus, as `nvidia-smi` does, and as CUDA does because `session.py` sets
CUDA_DEVICE_ORDER=PCI_BUS_ID. This module imports no CUDA library, so that a supervisor may look without becoming a
process that has a CUDA context.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from appliance.core import machine
from appliance.core.errors import DeviceError

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""CUDA shows a process these GPUs alone, numbered from 0 (CUDA C++ Programming Guide, environment variables)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU or MIG instance.

    Attributes:
        index: its number on this machine, as in "gpu:1".
        ordinal: CUDA's number for it in this process, which counts visible ones only.
        uuid: "GPU-…" or "MIG-…"; "" when the driver does not say.
        memory_total, memory_free: bytes; None without NVML.
        capability: compute capability, (9, 0) for Hopper; None without NVML.
    """

    index: int
    ordinal: int
    uuid: str
    name: str
    memory_total: int | None = None
    memory_free: int | None = None
    capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        memory = ""
        if self.memory_total is not None and self.memory_free is not None:
            memory = f", {gib(self.memory_free)} of {gib(self.memory_total)} GiB free"
        return f"gpu:{self.index} ({self.name or 'NVIDIA GPU'}{' ' if self.uuid else ''}{self.uuid}{memory})"


def gib(count: int) -> str:
    """Bytes as GiB, for sentences."""
    return f"{count / 2**30:.1f}"


def devices() -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows this process, in CUDA's order; empty when there are none."""
    return visible(_on_machine(), os.environ.get(VISIBLE))


def visible(gpus: Sequence[Gpu], value: str | None) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order: numbers or beginnings of UUIDs, up to the first wrong one.

    Args:    value: of the variable; None where it is not set, and all are seen.
    """
    if value is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in value.split(",")):
        found = [gpu for gpu in gpus if entry and (gpu.uuid.startswith(entry) or entry == str(gpu.index))]
        if len(found) != 1 or found[0].index in {gpu.index for gpu in chosen}:
            break
        chosen.append(replace(found[0], ordinal=len(chosen)))
    return tuple(chosen)


def driver_version() -> str:
    """The NVIDIA driver's version, "" without NVML."""
    with _nvml() as nvml:
        return str(nvml.nvmlSystemGetDriverVersion()) if nvml else ""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a GPU's sensors say at one moment; None for what it does not tell, as MIG instances and cards do.

    Attributes:
        utilization: part of the last moment in which it computed, 0 to 1.
        temperature: degrees Celsius. power: watts. clock: of its processors, hertz.
    """

    gpu: Gpu
    utilization: float | None
    temperature: float | None
    power: float | None
    clock: float | None

    @property
    def memory_total(self) -> int | None:
        """Bytes."""
        return self.gpu.memory_total

    @property
    def memory_used(self) -> int | None:
        """Bytes, by anybody."""
        total, free = self.gpu.memory_total, self.gpu.memory_free
        return None if total is None or free is None else total - free


def readings() -> list[Reading]:
    """What the sensors of all GPUs say now, whichever this process may use; empty without NVML.

    Takes some milliseconds, in which NVML is opened and closed.
    """
    with _nvml() as nvml:
        if nvml is None:
            return []

        def told(function: str, handle: Any, *more: Any) -> Any:
            try:
                return getattr(nvml, function)(handle, *more)
            except nvml.NVMLError:  # not supported there
                return None

        found = []
        for index, (handle, gpu) in enumerate(_handles(nvml)):
            rates = told("nvmlDeviceGetUtilizationRates", handle)
            power = told("nvmlDeviceGetPowerUsage", handle)
            clock = told("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM)
            found.append(
                Reading(
                    _described(nvml, index, handle, gpu),
                    None if rates is None else rates.gpu / 100,
                    told("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
                    None if power is None else power / 1000,
                    None if clock is None else clock * 1e6,
                )
            )
        return found


def used_by_this_process(gpu: Gpu) -> int | None:
    """Bytes of the GPU's memory that this process holds; None when NVML does not know it.

    In a container with process numbers of its own, NVML counts with the host's and does not find us.
    """
    with _nvml() as nvml:
        if nvml is None or not gpu.uuid:
            return None
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
        except nvml.NVMLError:  # not supported there, say: then it is not known
            pass
        return None


def find(wanted: str, gpus: Sequence[Gpu]) -> Gpu:
    """The GPU that "gpu", "gpu:1" or "gpu:GPU-…" means; plain "gpu" means the first.

    Raises: DeviceError: it is not there; lists those that are.
    """
    which = wanted.partition(":")[2]
    for gpu in gpus:
        if not which or which == str(gpu.index) or (gpu.uuid and which.lower() == gpu.uuid.lower()):
            return gpu
    here = "; ".join(map(str, gpus)) or "none at all"
    raise DeviceError(f'There is no GPU "{wanted}" that this process may use. Here is: {here}.')


@dataclass(frozen=True, slots=True)
class Need:
    """GPU memory that a model takes.

    Attributes:
        known: where the number comes from, for the sentence: "measured when it was last loaded".
    """

    size: int
    known: str

    def __str__(self) -> str:
        return f"{gib(self.size)} GiB of GPU memory ({self.known})"


def place(need: Need, candidates: Sequence[Gpu], headroom: int) -> Gpu:
    """The GPU to load a model on: of those where it fits, the one with the most free memory.

    A GPU whose memory is not known is taken when no other fits: its driver will refuse what is too much.

    Args:    headroom: bytes that stay free.
    Raises:  DeviceError: it fits nowhere; with the numbers.
    """
    fits = [gpu for gpu in candidates if gpu.memory_free is not None and gpu.memory_free - headroom >= need.size]
    if fits:
        return max(fits, key=lambda gpu: (gpu.memory_free or 0, -gpu.index))
    unknown = [gpu for gpu in candidates if gpu.memory_free is None]
    if unknown:
        return unknown[0]
    here = "; ".join(map(str, candidates)) or "there is no GPU"
    raise DeviceError(
        f"It needs {need}, and {gib(headroom)} GiB must stay free (engine.gpu_headroom): {here}. Hold a model back, "
        "move it to another GPU (onnx.device) or to the CPU, or lower its batching.max_rows."
    )


# ---- where the facts come from ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The module pynvml, initialised, while the block runs; None without package, driver or GPU."""
    try:
        module: Any = importlib.import_module("pynvml")
        module.nvmlInit()
    except Exception:  # ImportError; NVML's own errors, whose class is known only once the import has succeeded
        yield None
        return
    try:
        yield module
    finally:
        module.nvmlShutdown()


def _on_machine() -> tuple[Gpu, ...]:
    with _nvml() as nvml:
        found = list(_handles(nvml)) if nvml else None
        if found is None:
            named = machine.gpus()
            return tuple(Gpu(index, index, gpu.uuid, gpu.name) for index, gpu in enumerate(named))
        return tuple(_described(nvml, index, *handles) for index, handles in enumerate(found))


def _handles(nvml: Any) -> Iterator[tuple[Any, Any]]:
    """Each GPU or MIG instance, and the GPU that it is (on)."""
    for index in range(nvml.nvmlDeviceGetCount()):
        gpu = nvml.nvmlDeviceGetHandleByIndex(index)
        instances = list(_instances(nvml, gpu))
        if instances:
            yield from ((instance, gpu) for instance in instances)
        else:
            yield gpu, gpu


def _instances(nvml: Any, gpu: Any) -> Iterator[Any]:
    try:
        if nvml.nvmlDeviceGetMigMode(gpu)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except nvml.NVMLError:  # not supported: a GPU that cannot be cut
        return
    for index in range(count):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index)
        except nvml.NVMLError:  # an empty place
            continue


def _described(nvml: Any, index: int, handle: Any, gpu: Any) -> Gpu:
    memory, capability = None, None
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(gpu))
    except nvml.NVMLError:  # GPUs that share the machine's memory have none of their own, say
        pass
    return Gpu(
        index,
        index,
        str(nvml.nvmlDeviceGetUUID(handle)),
        str(nvml.nvmlDeviceGetName(handle)),
        None if memory is None else int(memory.total),
        None if memory is None else int(memory.free),
        None if capability is None else (int(capability[0]), int(capability[1])),
    )


def environment(gpu: Gpu) -> Mapping[str, str]:
    """Variables for an engine process that shall see this GPU alone, as its number 0."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VISIBLE: gpu.uuid or str(gpu.index)}
