"""TensorRT: engines that `appliance models compile` built, and when one may serve.

An engine is good for exactly one graph with its weights, one onnxruntime, one TensorRT and one kind of GPU. All of that
is in the name of the folder it lies in, so that any change finds no engine, and CUDA's own kernels serve. To build one
takes minutes: it is never done at load.
"""

import ctypes
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from appliance.core.errors import BundleInvalid
from appliance.core.files import write_atomically
from appliance.core.types import Array

LIBRARIES = ("libnvinfer.so.10", "libnvonnxparser.so.10")
"""What onnxruntime-gpu 1.31's TensorRT provider is linked to."""

_PACKAGE = "tensorrt_libs"
"""Where the packages tensorrt-cu13 put these libraries, beside other Python packages."""

_RECORD = "complete.json"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """An engine on disk.

    Attributes:
        max_rows: rows in one run that it was built for.
        shortest, longest: input name → shape of the smallest and the largest run.
        files: the engines' names → bytes, as they were built.
    """

    folder: Path
    fp16: bool
    max_rows: int
    shortest: Mapping[str, Shape]
    longest: Mapping[str, Shape]
    files: Mapping[str, int]


def problem() -> str | None:
    """Why TensorRT cannot be used here, and what helps; None when its libraries can be loaded."""
    for name in LIBRARIES:
        try:
            _library(name)
        except OSError as error:
            return (
                f"The library {name} cannot be loaded ({str(error).splitlines()[0]}); install TensorRT 10 for CUDA 13, "
                'e.g. pip install "tensorrt-cu13>=10.13,<11". Until then CUDA serves.'
            )
    return None


def version() -> int:
    """TensorRT's version as it spells it, 101300 for 10.13. Raises: OSError: it is not here."""
    return int(_library(LIBRARIES[0]).getInferLibVersion())


@lru_cache
def _library(name: str) -> ctypes.CDLL:
    """Raises: OSError."""
    try:
        return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:
        # Loaded by path it is found by name from then on, by onnxruntime's provider too.
        found = importlib.util.find_spec(_PACKAGE)
        for folder in (found.submodule_search_locations or ()) if found else ():
            if (Path(folder) / name).exists():
                return ctypes.CDLL(str(Path(folder) / name), ctypes.RTLD_GLOBAL)
        raise


def folder_of(state_dir: Path, plan: str, onnxruntime: str, tensorrt: int, gpu: str) -> Path:
    """Where the engine for that plan, those libraries and that GPU lies, or would lie.

    Args:    plan: its key, see `admission.content_of`. gpu: its product name.
    """
    key = hashlib.sha256(json.dumps([plan, onnxruntime, tensorrt, gpu]).encode()).hexdigest()[:32]
    return state_dir / "cache" / "tensorrt" / key


def find(folder: Path) -> Compiled | None:
    """The engine in a folder; None when there is none, or not all of it."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        found = Compiled(
            folder,
            bool(record["fp16"]),
            int(record["max_rows"]),
            {name: tuple(shape) for name, shape in record["shortest"].items()},
            {name: tuple(shape) for name, shape in record["longest"].items()},
            {str(name): int(size) for name, size in record["files"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.files and found.files == _engines(folder) else None


def shapes(
    examples: Sequence[Sequence[Mapping[str, Array]]], max_rows: int
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The shapes of the smallest and the largest run: one row of the shortest bucket, `max_rows` of the longest.

    Args:    examples: as in `LoadRequest`.
    Raises:  BundleInvalid: the lengths are not known beforehand, or TensorRT's option cannot spell an input's name.
    """
    if not examples:
        raise BundleInvalid("It has inputs of unknown length: TensorRT needs to know the largest run beforehand.")
    shortest = {name: array.shape for name, array in examples[0][0].items()}
    longest = {name: (array.shape[0] * max_rows, *array.shape[1:]) for name, array in examples[-1][0].items()}
    strange = [name for name in longest if not name or set(name) & set(":,; ")]
    if strange:
        raise BundleInvalid(f"The input's name {strange[0]!r} has a character that TensorRT's options cannot take.")
    return shortest, longest


def covers(compiled: Compiled, examples: Sequence[Sequence[Mapping[str, Array]]]) -> bool:
    """Whether all runs of these buckets are among those that the engine was built for."""
    try:
        return shapes(examples, compiled.max_rows) == (dict(compiled.shortest), dict(compiled.longest))
    except BundleInvalid:
        return False


def options(compiled: Compiled, device: int) -> dict[str, str]:
    """Provider options, the same for building and for serving: else onnxruntime would build anew.

    Source: onnxruntime's documentation, TensorRT Execution Provider, "Explicit shape range for dynamic shape input".
    """
    longest = _spelled(compiled.longest)
    return {
        "device_id": str(device),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(compiled.folder),
        "trt_fp16_enable": "1" if compiled.fp16 else "0",
        "trt_profile_min_shapes": _spelled(compiled.shortest),
        "trt_profile_opt_shapes": longest,  # full batches are where time goes
        "trt_profile_max_shapes": longest,
    }


def _spelled(shapes: Mapping[str, Shape]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def begin(folder: Path) -> Path:
    """An empty folder to build in, beside the one that `complete` puts in its place. Raises: OSError."""
    work = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def complete(built: Compiled, folder: Path) -> Compiled:
    """Make what was built in `built.folder` the engine of `folder`.

    Raises: BundleInvalid: nothing was built. OSError.
    """
    record: dict[str, Any] = asdict(built) | {"files": _engines(built.folder)}
    if not record["files"]:
        raise BundleInvalid("TensorRT takes no part of this graph, so there is nothing to serve: CUDA stays.")
    del record["folder"]
    write_atomically(built.folder / _RECORD, json.dumps(record, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    built.folder.rename(folder)
    found = find(folder)
    assert found is not None, "it has just been written"
    return found


def _engines(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.engine"))}
