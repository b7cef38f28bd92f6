"""Driver and CUDA libraries: what does not fit is told with what to do.

The libraries are real ones that the loader loads, of our own making."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.engine.libraries import Versions, problems

GOOD = Versions("580.65.06", "580.65.06", 13000, 13000, 91200, 13000)

_LOOK = """
import json, sys
from pathlib import Path
from appliance.engine import libraries
libraries.DRIVER_FILE = Path(sys.argv[1])
found = libraries.look()
print(json.dumps([found.driver, found.library, found.driver_cuda, found.runtime, found.cudnn, found.cudnn_cuda]))
"""


def changed(**values: object) -> Versions:
    return Versions(**{**{name: getattr(GOOD, name) for name in Versions.__slots__}, **values})  # type: ignore[arg-type]


def test_what_fits_is_no_problem() -> None:
    assert problems(GOOD) == []
    assert str(GOOD) == "driver 580.65.06, which runs CUDA up to 13.0, CUDA runtime 13.0, cuDNN 9.12.0"
    assert problems(changed(driver="610.1", library="610.1", driver_cuda=13020)) == []


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        (Versions(), ["The NVIDIA driver is not loaded"]),
        (changed(driver="570.86.15", library="570.86.15"), ["needs 580 or newer; update the driver"]),
        (changed(library="580.95.05"), ["it was updated while it ran. Reboot."]),
        (changed(driver_cuda=None, library=""), ["libcuda.so.1 is not there"]),
        (changed(runtime=None), ["libcudart.so.13 cannot be loaded; install the package inference-appliance-cuda13"]),
        (changed(runtime=None, cudnn=None, cudnn_cuda=None), ["libcudart.so.13 and libcudnn.so.9 cannot be loaded"]),
        (changed(cudnn_cuda=12090), ["cuDNN was built for CUDA 12.9, and the runtime is 13.0"]),
        (changed(driver_cuda=12080), ["The driver runs CUDA up to 12.8, and the runtime is 13.0"]),
        (changed(driver="550.54", library="550.54", driver_cuda=12040), ["needs 580 or newer", "up to 12.4"]),
    ],
)
def test_what_does_not_fit_is_said_with_the_remedy(found: Versions, sentences: list[str]) -> None:
    said = problems(found)
    assert len(said) == len(sentences)
    for sentence, part in zip(said, sentences, strict=True):
        assert part in sentence


def library(folder: Path, name: str, code: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
    subprocess.run(command, input=code, text=True, check=True)


def look(driver_file: Path, library_path: Path, python_path: Path) -> list[object]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library_path), "PYTHONPATH": str(python_path)}
    command = [sys.executable, "-c", _LOOK, str(driver_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: list[object] = json.loads(done.stdout)
    return found


def test_kernel_and_libraries_are_asked(tmp_path: Path) -> None:
    """Driver and runtime where the loader looks, cuDNN beside us as NVIDIA's Python packages have it."""
    driver_file = tmp_path / "version"
    driver_file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder)\n"
        "GCC version: 13\n"
    )
    library(tmp_path / "lib", "libcuda.so.580.65.06", "int cuDriverGetVersion(int *v) { *v = 13000; return 0; }")
    (tmp_path / "lib" / "libcuda.so.1").symlink_to("libcuda.so.580.65.06")
    nvidia = tmp_path / "site" / "nvidia"
    library(tmp_path / "lib", "libcudart.so.13", "int cudaRuntimeGetVersion(int *v) { *v = 13010; return 0; }")
    library(
        nvidia / "cudnn" / "lib",
        "libcudnn.so.9",
        "#include <stddef.h>\nsize_t cudnnGetVersion(void) { return 91200; }\n"
        "size_t cudnnGetCudartVersion(void) { return 13000; }",
    )
    found = look(driver_file, tmp_path / "lib", tmp_path / "site")
    assert found == ["580.65.06", "580.65.06", 13000, 13010, 91200, 13000]


def test_where_there_is_nothing_nothing_is_found(tmp_path: Path) -> None:
    """CUDA's toolkit may be installed on a machine without a driver."""
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has an NVIDIA driver")
    assert look(tmp_path / "none", tmp_path, tmp_path)[:3] == ["", "", None]
