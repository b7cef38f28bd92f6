"""What `appliance models compile` does; a module of its own, as it needs the engine, which the other verbs do not."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from appliance.catalog import bundle as bundles
from appliance.catalog import changes, importer
from appliance.core.config import Config
from appliance.core.errors import BundleInvalid, DeviceError
from appliance.core.metrics import Metrics
from appliance.engine import tensorrt
from appliance.engine.compiling import build
from appliance.engine.session import Device
from appliance.engine.transport import LoadRequest
from appliance.engine.worker import LocalEngine, LocalModel
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool


def compile_bundle(config: Config, name: str, version: str, *, fp16: bool, say: Callable[[str], None]) -> None:
    """Build TensorRT's engines for one version of a bundle, or for all.

    Args:    version: "" for all.
    Raises:  DeviceError, BundleInvalid, ConfigError: with what is missing.
    """
    engine = _Compiling(config, fp16, say)
    path = changes.find(name, config.catalog)
    explicit, model, concepts = bundles.read_config(path, config.catalog.user_id, config.catalog.app_id)
    versions = bundles.find_versions(path, bundles.graph_file(explicit))
    wanted = [each for each in versions if version in ("", each.id)]
    if not wanted:
        there = ", ".join(each.id for each in versions)
        raise BundleInvalid(f"{name} has no version {version!r}; it has {there}.")
    for each in wanted:
        owner = config.catalog.user_id, config.catalog.app_id
        found = explicit or importer.infer_config(path, each, model, concepts, *owner)
        asyncio.run(_compile(path, found, each, engine, config))


async def _compile(
    path: Path, found: bundles.BundleConfig, version: bundles.VersionFolder, engine: "_Compiling", config: Config
) -> None:
    pool = DecodePool(1)
    try:
        loaded = await servable.load(path, found, version, engine, pool, engine.metrics, config.limits)
        loaded.close()
    finally:
        pool.close()


class _Compiling:
    """An engine whose loads build; implements `Engine`. Each graph is then loaded as the daemon will."""

    def __init__(self, config: Config, fp16: bool, say: Callable[[str], None]) -> None:
        """Raises: DeviceError: no GPU, or no TensorRT."""
        self.metrics = Metrics()
        self._plain = LocalEngine(config.engine, self.metrics)
        self._serving = LocalEngine(config.engine, self.metrics, config.catalog.state_dir)
        self._fp16 = fp16
        self._say = say
        self.device: Device = self._plain.device
        problem = tensorrt.problem()
        if self.device.kind == "cpu":
            raise DeviceError(f"TensorRT needs a GPU, and the device is the CPU: {self.device.reason}.")
        if problem is not None:
            raise DeviceError(problem)

    async def load(self, request: LoadRequest) -> LocalModel:
        """Build, tell how it compares with CUDA, and load what was built; see `Engine.load`."""
        name = ":".join(request.name)
        measured = await self._plain.load(request)
        rows = measured.batching.max_rows
        await measured.drain()
        measured.close()
        self._say(f"{name}: building for up to {rows} rows a run; this takes minutes")
        built = await asyncio.to_thread(build, self._serving, request, rows, fp16=self._fp16)
        self._say(
            f"{name}: a full batch takes {built.tensorrt_s * 1000:.2f} ms, with CUDA's kernels "
            f"{built.cuda_s * 1000:.2f} ms; outputs differ by {built.deviation:.2g} at most"
        )
        model = await self._serving.load(request)
        if model.providers[0] != "TensorrtExecutionProvider":
            model.close()
            raise BundleInvalid(f"{name}: the engine was built, and a load does not take it; see the log.")
        return model
