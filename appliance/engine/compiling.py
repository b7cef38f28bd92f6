"""Building TensorRT's engine for a model, which takes minutes: for `appliance models compile`, never for a load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from appliance.core.errors import BundleInvalid, ConfigError
from appliance.core.types import Array
from appliance.engine import binding, probes, tensorrt
from appliance.engine.admission import content_of
from appliance.engine.plan import only
from appliance.engine.session import Session
from appliance.engine.tensorrt import Compiled
from appliance.engine.transport import LoadRequest
from appliance.engine.worker import LocalEngine

_FEWEST_ROWS = 4
"""The probes at load run up to three rows together, so an engine must take as many."""


@dataclass(frozen=True, slots=True)
class Built:
    """An engine, and how it compares with CUDA's own kernels at full batches.

    Attributes:
        deviation: largest difference between two outputs, of `LoadRequest.compared`.
        cuda_s, tensorrt_s: one run.
    """

    compiled: Compiled
    deviation: float
    cuda_s: float
    tensorrt_s: float


def build(engine: LocalEngine, request: LoadRequest, max_rows: int, *, fp16: bool) -> Built:
    """Build TensorRT's engine for a model and put it where `engine` looks for it at the next load.

    Args:    engine: on a GPU, with a state folder. max_rows: rows of the largest run.
    Raises:  BundleInvalid: it cannot be built. ConfigError: it cannot be kept.
    """
    device, plan = engine.device, request.plan
    rows = max(max_rows, _FEWEST_ROWS)
    shortest, longest = tensorrt.shapes(request.examples, rows)
    assert plan.model is not None, "a description cannot be compiled"
    graph = only(plan.model, {*request.served, *request.compared})  # as a load does
    session = partial(Session, graph, plan.file.parent, device, 1, weights=plan.weights, tf32=plan.tf32)
    try:
        folder = engine.engine_folder(content_of(plan), device)
        if folder is None:
            raise ConfigError("What GPU this is is not known, so no engine can be kept for it; install nvidia-ml-py.")
        wanted = Compiled(tensorrt.begin(folder), fp16, rows, shortest, longest, {})
        built = session(compiled=wanted)  # builds
        plain = session()
        deviation = max((_deviation(plain, built, request, bucket) for bucket in request.examples), default=0.0)
        feeds = probes.join([request.examples[-1][0]] * rows)
        cuda_s, tensorrt_s = (binding.seconds(partial(each.run, request.served, feeds)) for each in (plain, built))
        return Built(tensorrt.complete(wanted, folder), deviation, cuda_s, tensorrt_s)
    except OSError as error:
        raise ConfigError(f"The engine cannot be kept: {error}.") from error


def _deviation(plain: Session, built: Session, request: LoadRequest, bucket: Sequence[Mapping[str, Array]]) -> float:
    """Of the bucket's rows in one run. Raises: BundleInvalid: an output is not a number where CUDA's is."""
    feeds = probes.join(bucket)
    largest = 0.0
    for name, one, other in zip(
        request.compared, plain.run(request.compared, feeds), built.run(request.compared, feeds), strict=True
    ):
        if one.dtype.kind != "f" or not one.size:
            continue
        if not np.array_equal(np.isfinite(one), np.isfinite(other)):
            raise BundleInvalid(f"TensorRT's output {name!r} is not finite where CUDA's is; compile it without --fp16.")
        largest = max(largest, float(np.nanmax(np.abs(one - other), initial=0.0)))
    return largest
