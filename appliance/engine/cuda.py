"""CUDA's own calls that onnxruntime's Python API lacks: pinned memory, copies on a stream of their own, and which of
CUDA's errors leave a process of no more use.

onnxruntime's IO binding copies a host input while it holds the interpreter lock, and its allocators hand out no pinned
memory to Python. Here a copy is `cudaMemcpyAsync` through ctypes, which releases the lock, so that one thread's rows
travel while another's are computed. Nothing here is loaded, let alone called, for sessions on the CPU.
"""

import ctypes
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from appliance.core.types import Array

POISON = {
    214: "an uncorrectable ECC error",
    220: "an uncorrectable NVLink error",
    226: "a contained hardware error",
    700: "an illegal memory access",
    702: "a kernel that ran for too long",
    709: "a destroyed context",
    710: "a device-side assertion",
    714: "a hardware stack error",
    715: "an illegal instruction",
    716: "a misaligned address",
    717: "an address in the wrong address space",
    718: "an invalid program counter",
    719: "a failed kernel launch",
    999: "an unknown error",
}
"""cudaError_t → what happened. Of 226, 700, 702, 710 and 714 to 719 CUDA says: "any further CUDA work will return the
same error. To continue using CUDA, the process must be terminated and relaunched" (CUDA Runtime API, Data types,
cudaError_t; 709: the context is gone). 214 and 220 leave memory in doubt, and of 999 nothing is known."""

_FAILURE = re.compile(r"\bCUDA failure (\d+)|\bcudaError(?:Code)?[ :(=]+(\d+)")
"""How onnxruntime 1.31 begins what it says of a failed call: "CUDA failure 700: … ; GPU=0 ; hostname=…"."""

_TEXTS = {
    "illegal memory access": 700,
    "device-side assert": 710,
    "unspecified launch failure": 719,
    "uncorrectable ecc error": 214,
    "misaligned address": 716,
    "illegal instruction was encountered": 715,
    "launch timed out": 702,
    "hardware stack error": 714,
    "invalid program counter": 718,
}
"""CUDA's texts for these (cudaGetErrorString): TensorRT and cuDNN pass them on without the number."""

_LIBRARY = re.compile(
    r"\bCUDNN failure \d+: (?P<dnn>CUDNN_STATUS_\w+)|\bCUBLAS failure \d+: (?P<blas>CUBLAS_STATUS_\w+)"
)
_LIBRARY_POISON = frozenset({"CUDNN_STATUS_MAPPING_ERROR", "CUBLAS_STATUS_EXECUTION_FAILED"})
_LIBRARY_PREFIXES = ("CUDNN_STATUS_EXECUTION_FAILED",)
"""What cuDNN and cuBLAS say when a kernel of theirs did not run through (cuDNN 9 Backend API, cudnnStatus_t; cuBLAS,
cublasStatus_t: "cannot be launched by the GPU, which can be caused by multiple reasons"). That they lack memory
(…_ALLOC_FAILED) is no poison, and is said of them in other words."""


def poison(text: str) -> str | None:
    """What happened, when an error's text says that this process can do nothing more on its GPU; else None."""
    for match in _FAILURE.finditer(text):
        code = int(match[1] or match[2])
        if code in POISON:
            return f"{POISON[code]} (CUDA error {code})"
    lower = text.lower()
    for words, code in _TEXTS.items():
        if words in lower:
            return f"{POISON[code]} (CUDA error {code})"
    for match in _LIBRARY.finditer(text):
        status = match["dnn"] or match["blas"]
        if status in _LIBRARY_POISON or status.startswith(_LIBRARY_PREFIXES):
            return f"a kernel that did not run through ({status})"
    return None


# ---- the runtime library ---------------------------------------------------------------------------------------------

_LIBRARY_NAME = "libcudart.so.13"
"""The one that onnxruntime-gpu 1.31's CUDA provider is linked to: the loader gives us the same copy."""

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_NON_BLOCKING = 1
_PORTABLE = 1
_ALIGNMENT = 256
"""Of CUDA's own allocations, and as much as any kernel may expect (CUDA C++ Programming Guide, Device memory)."""


class CudaError(RuntimeError):
    """A call of the runtime failed; the text is in onnxruntime's form, so that `poison` reads both."""


class Runtime:
    """The calls of libcudart that we need, each checked. Every thread says its device before it uses one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns cudaError_t. Raises: CudaError."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = self._library.cudaGetErrorString(code).decode(errors="replace")
            # Fetched, an error that is not sticky is gone: it must not be taken for the next call's.
            self._library.cudaGetLastError()
            raise CudaError(f"CUDA failure {code}: {text} ; {name}")

    def use(self, device: int) -> None:
        """Make this thread's calls go to that device."""
        self.call("cudaSetDevice", device)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of this thread's device, as its driver counts them for everybody."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """Address of so many bytes on the device."""
        pointer = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        assert pointer.value is not None
        return pointer.value

    def free(self, address: int) -> None:
        """Give device memory back; waits for the device."""
        self.call("cudaFree", ctypes.c_void_p(address))

    def allocate_pinned(self, size: int) -> int:
        """Address of so many bytes of host memory that the device reads by itself, without a copy in between."""
        pointer = ctypes.c_void_p()
        self.call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(_PORTABLE))
        assert pointer.value is not None
        return pointer.value

    def free_pinned(self, address: int) -> None:
        """Give it back."""
        self.call("cudaFreeHost", ctypes.c_void_p(address))

    def stream(self) -> int:
        """A new stream that waits for no other."""
        pointer = ctypes.c_void_p()
        self.call("cudaStreamCreateWithFlags", ctypes.byref(pointer), ctypes.c_uint(_NON_BLOCKING))
        return pointer.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Give it back."""
        self.call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Begin a copy; from pinned memory it goes on by itself until `wait`."""
        self._copy(device, host, size, _HOST_TO_DEVICE, stream)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Begin a copy the other way."""
        self._copy(host, device, size, _DEVICE_TO_HOST, stream)

    def wait(self, stream: int) -> None:
        """Return when all that was begun on the stream is done; other threads run meanwhile."""
        self.call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def _copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        self.call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            kind,
            ctypes.c_void_p(stream),
        )


@lru_cache(maxsize=1)
def runtime() -> Runtime:
    """The runtime library. Raises: OSError: it is not here."""
    return Runtime(ctypes.CDLL(_LIBRARY_NAME))


# ---- slots -----------------------------------------------------------------------------------------------------------


class Slot:
    """Pinned host memory, as much device memory, and a stream: where one run's inputs lie while they travel.

    It grows to what it is asked to hold. Used by one thread at a time.
    """

    def __init__(self, library: Runtime, device: int) -> None:
        """Args: device: CUDA's number of it."""
        self._library = library
        self._device = device
        self._stream = library.stream()
        self._host = self._on_device = 0
        self.size = 0

    def fill(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        """Bring the arrays onto the device; the address of each there. They are on it when this returns.

        Raises: CudaError: no memory for them, among others.
        """
        offsets, end = {}, 0
        for name, array in feeds.items():
            offsets[name] = end
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if end > self.size:
            self._grow(end)
        for name, array in feeds.items():
            source = self._host + offsets[name]
            memory = memoryview((ctypes.c_char * array.nbytes).from_address(source))
            np.copyto(np.frombuffer(memory, array.dtype).reshape(array.shape), array)
            self._library.to_device(self._on_device + offsets[name], source, array.nbytes, self._stream)
        self._library.wait(self._stream)
        return {name: self._on_device + offset for name, offset in offsets.items()}

    def fetch(self, address: int, target: Array) -> Array:
        """Fill `target`, which is contiguous, from the device; returns it."""
        self._library.to_host(target.ctypes.data, address, target.nbytes, self._stream)
        self._library.wait(self._stream)
        return target

    def close(self) -> None:
        """Give the memory back."""
        self._library.use(self._device)
        self._free()
        self._library.destroy_stream(self._stream)

    def _grow(self, size: int) -> None:
        self._free()
        self._host = self._library.allocate_pinned(size)
        self._on_device = self._library.allocate(size)
        self.size = size

    def _free(self) -> None:
        self.size = 0
        host, on_device, self._host, self._on_device = self._host, self._on_device, 0, 0
        if host:
            self._library.free_pinned(host)
        if on_device:
            self._library.free(on_device)
