"""Whether a model fits on its GPU: what it took when it was last loaded, or an estimate, against what is free.

Footprints are kept in `footprints.json` of the state folder, by content of the plan, execution provider and GPU: a
model that changes is measured anew.
"""

import contextlib
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.core.files import alone, write_atomically
from appliance.engine import cuda, gpu
from appliance.engine.gpu import Gpu, Need
from appliance.engine.plan import Plan
from appliance.engine.session import Device

_log = logging.getLogger(__name__)

_FILE = "footprints.json"
_KEPT = 256
"""Footprints that are kept; the ones measured longest ago go first."""

_WEIGHTS = 1.2
_WORKSPACE = 512 * 2**20
"""An estimate: weights and a fifth, for what is rounded up and packed, and workspaces, activations and kernels."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a plan's graph and weights are.

    Attributes:
        key: a digest of them: equal for equal content, wherever it lies.
        size: bytes.
    """

    key: str
    size: int


def content_of(plan: Plan) -> Content:
    """Of a plan that was made here. Its key is by content, config and libraries: whatever changes is measured anew."""
    assert plan.model is not None, "a description has no content"
    key = plan.key or hashlib.sha256(plan.model).hexdigest()
    return Content(key[:32], len(plan.model) + sum(len(content) for content in plan.weights.values()))


def need(content: Content, footprint: int | None) -> Need:
    """What to reckon with. Args: footprint: bytes, measured; None when it never was."""
    if footprint is not None:
        return Need(footprint, "measured when it was last loaded")
    estimate = int(content.size * _WEIGHTS) + _WORKSPACE
    return Need(
        estimate, f"estimated from {gpu.gib(content.size)} GiB of graph and weights; loading it will measure it"
    )


class Footprints:
    """`footprints.json`: key → bytes of GPU memory. Several engine processes may share it."""

    def __init__(self, state_dir: Path | None) -> None:
        """Args: state_dir: None keeps nothing."""
        self._folder = state_dir

    def get(self, key: str) -> int | None:
        """What was measured, if it was."""
        found = self._read().get(key, {})
        size = found.get("bytes") if isinstance(found, dict) else None
        return size if isinstance(size, int) and size > 0 else None

    def put(self, key: str, size: int, model: str) -> None:
        """Remember it. Args: model: for those who read the file. Raises: OSError."""
        if self._folder is None:
            return
        with alone(self._folder):
            known = self._read()
            known.pop(key, None)
            known[key] = {"model": model, "bytes": size}
            kept = dict(list(known.items())[-_KEPT:])
            write_atomically(self._folder / _FILE, json.dumps(kept, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        """A file that cannot be read is as good as none: the next load measures anew."""
        if self._folder is None:
            return {}
        try:
            content = json.loads((self._folder / _FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


class Admission:
    """Lets models onto one engine's GPU when they fit, and measures what they take."""

    def __init__(self, state_dir: Path | None, headroom: int) -> None:
        """Args: headroom: bytes of the GPU that stay free."""
        self._footprints = Footprints(state_dir)
        self._headroom = headroom
        self._lock = threading.Lock()
        self._loading = self._begun = 0

    def footprint(self, content: Content, device: Device, provider: str) -> int | None:
        """Bytes of GPU memory that it took when that was last measured, or None."""
        return self._footprints.get(_key(content, device, provider))

    @contextlib.contextmanager
    def load(self, content: Content, device: Device, provider: str, model: str) -> Iterator[None]:
        """Load within the block. Its footprint is measured if it ends well and no other load ran beside it.

        Raises: DeviceError: it does not fit; with the numbers.
        """
        key = _key(content, device, provider)
        here = _now(device)
        gpu.place(need(content, self._footprints.get(key)), [here], self._headroom)
        before = _used(device)
        with self._lock:
            self._loading += 1
            self._begun += 1
            alone_since = self._begun if self._loading == 1 else None
        try:
            yield
            with self._lock:
                undisturbed = alone_since == self._begun
            after = _used(device)
            if undisturbed and before is not None and after is not None and after > before:
                with contextlib.suppress(OSError):  # a full disk: the next load estimates again
                    self._footprints.put(key, after - before, model)
                _log.info("takes %s GiB of GPU memory", gpu.gib(after - before), extra={"model": model})
        finally:
            with self._lock:
                self._loading -= 1


def _key(content: Content, device: Device, provider: str) -> str:
    return f"{content.key}/{provider}/{device.name or 'GPU'}"


def _now(device: Device) -> Gpu:
    """The device with its free memory of this moment."""
    found = next((each for each in gpu.devices() if each.ordinal == device.index), None)
    if found is not None and found.memory_free is not None:
        return found
    memory = _memory(device)
    index, uuid, name = (found.index, found.uuid, found.name) if found else (device.index, device.uuid, device.name)
    return Gpu(index, device.index, uuid, name, *(memory[::-1] if memory else (None, None)))


def _used(device: Device) -> int | None:
    """Bytes of its memory that this process holds; where that is not known, that anybody holds."""
    found = next((each for each in gpu.devices() if each.ordinal == device.index), None)
    own = gpu.used_by_this_process(found) if found is not None else None
    if own is not None:
        return own
    memory = _memory(device)
    return memory[1] - memory[0] if memory else None


def _memory(device: Device) -> tuple[int, int] | None:
    """Free and total bytes, as CUDA knows them; None where its library is not found."""
    try:
        library = cuda.runtime()
        library.use(device.index)
        return library.memory()
    except (OSError, cuda.CudaError):
        return None
