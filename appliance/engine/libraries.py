"""Which NVIDIA driver is here, and whether the CUDA libraries that we brought fit it and one another.

Asks each library for its version and starts nothing: no context is made on any GPU.
"""

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

DRIVER_FILE = Path("/proc/driver/nvidia/version")

OLDEST_DRIVER = 580
"""Branch of the oldest driver that CUDA 13 runs on. Source: CUDA 13 Release Notes, table "CUDA Toolkit and Minimum
Required Driver Version for CUDA Minor Version Compatibility"."""

_DRIVER, _RUNTIME, _CUDNN = "libcuda.so.1", "libcudart.so.13", "libcudnn.so.9"


@dataclass(frozen=True, slots=True)
class Versions:
    """What was found; "" or None for what is not there or does not say.

    Attributes:
        driver: of the kernel's module, "580.65.06".
        library: of the driver's own library, which must be the same.
        driver_cuda: the newest CUDA that the driver runs, 13000 for 13.0.
        runtime: CUDA's runtime that we brought, in the same form.
        cudnn: 91200 for 9.12.0. cudnn_cuda: the CUDA that it was built for.
    """

    driver: str = ""
    library: str = ""
    driver_cuda: int | None = None
    runtime: int | None = None
    cudnn: int | None = None
    cudnn_cuda: int | None = None

    def __str__(self) -> str:
        parts = [
            f"driver {self.driver or 'none'}",
            f"which runs CUDA up to {_dotted(self.driver_cuda)}" if self.driver_cuda else "",
            f"CUDA runtime {_dotted(self.runtime)}",
            f"cuDNN {_cudnn_dotted(self.cudnn)}",
        ]
        return ", ".join(filter(None, parts))


def look() -> Versions:
    """Ask kernel and libraries."""
    library = _load(_DRIVER)
    runtime, cudnn = _load(_RUNTIME), _load(_CUDNN)
    return Versions(
        driver=_kernel_driver(),
        library=_file_version(),
        driver_cuda=_by_pointer(library, "cuDriverGetVersion"),
        runtime=_by_pointer(runtime, "cudaRuntimeGetVersion"),
        cudnn=_by_result(cudnn, "cudnnGetVersion"),
        cudnn_cuda=_by_result(cudnn, "cudnnGetCudartVersion"),
    )


def problems(found: Versions) -> list[str]:
    """Sentences on what does not fit, each with what to do; empty when all does."""
    if not found.driver:
        return ["The NVIDIA driver is not loaded; install it from your distribution or NVIDIA, and reboot."]
    said = []
    branch = found.driver.partition(".")[0]
    if branch.isdigit() and int(branch) < OLDEST_DRIVER:
        said.append(
            f"The NVIDIA driver is {found.driver}, and CUDA 13 needs {OLDEST_DRIVER} or newer; update the driver."
        )
    if found.library and found.library != found.driver:
        said.append(
            f"The driver's kernel module is {found.driver} and its library {found.library}: it was updated while it "
            "ran. Reboot."
        )
    if found.driver_cuda is None:
        said.append(f"The driver's library {_DRIVER} is not there; install the driver's compute libraries.")
    if found.runtime is None or found.cudnn is None:
        missing = " and ".join(name for name, v in ((_RUNTIME, found.runtime), (_CUDNN, found.cudnn)) if v is None)
        said.append(f"{missing} cannot be loaded; install the package inference-appliance-cuda13.")
    elif found.cudnn_cuda is not None and found.cudnn_cuda // 1000 != found.runtime // 1000:
        said.append(
            f"cuDNN was built for CUDA {_dotted(found.cudnn_cuda)}, and the runtime is {_dotted(found.runtime)}; "
            "install the package inference-appliance-cuda13 anew."
        )
    if found.driver_cuda and found.runtime and found.driver_cuda // 1000 < found.runtime // 1000:
        said.append(
            f"The driver runs CUDA up to {_dotted(found.driver_cuda)}, and the runtime is {_dotted(found.runtime)}; "
            "update the driver."
        )
    return said


def _kernel_driver() -> str:
    try:
        text = DRIVER_FILE.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    match = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text)
    return match[1] if match else ""


def _load(name: str) -> ctypes.CDLL | None:
    """The library, where the loader finds it, or beside us as a Python package of NVIDIA's."""
    beside = (path for folder in sys.path for path in sorted(Path(folder or ".").glob(f"nvidia/*/lib/{name}")))
    for candidate in (name, *map(str, beside)):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    return None


def _file_version() -> str:
    """Version in the name of the driver's library that was loaded, "" when none was or its name has none."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(r"/libcuda\.so\.(\d+\.[\d.]+)$", maps, re.MULTILINE)
    return match[1] if match else ""


def _by_pointer(library: ctypes.CDLL | None, name: str) -> int | None:
    version = ctypes.c_int()
    if library is None or getattr(library, name)(ctypes.byref(version)) != 0:
        return None
    return version.value


def _by_result(library: ctypes.CDLL | None, name: str) -> int | None:
    if library is None:
        return None
    function = getattr(library, name)
    function.restype = ctypes.c_size_t
    return int(function())


def _dotted(version: int | None) -> str:
    return "none" if version is None else f"{version // 1000}.{version % 1000 // 10}"


def _cudnn_dotted(version: int | None) -> str:
    return "none" if version is None else f"{version // 10000}.{version % 10000 // 100}.{version % 100}"
