"""Graphs that tell every pixel, channel and token from every other, and how tests of the engine open a bundle."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from appliance.catalog.bundle import BundleConfig, VersionFolder, concepts_of, find_versions, read_config
from appliance.core.config import Engine as EngineSettings
from appliance.core.config import Limits
from appliance.core.metrics import Metrics
from appliance.core.types import Concept
from appliance.engine.plan import Plan, make_plan
from appliance.engine.session import Device, Session
from appliance.engine.worker import LocalEngine
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool, Servable
from support import graphs

SIZE = (4, 6)
"""Height and width: different ones, so that a swap shows."""

CPU = Device("cpu")


def pixel_model(
    count: int,
    *,
    channels: int = 3,
    layout: str = "nchw",
    dtype: int = TensorProto.FLOAT,
    result: int | None = None,
    opset: int = 17,
    ir_version: int | None = None,
    listed: bool = False,
    tail: Sequence[int] = (),
    batch: int | str = "batch",
) -> ModelProto:
    """`image` → `scores` (batch, count, *tail): every pixel and channel has a weight of its own.

    Args:
        result: type of the output; that of the input unless given, float32 for uint8.
        listed: whether the initializers are among the inputs too, as old exporters write them.
        tail: axes of length 1 behind the concepts.
    """
    height, width = SIZE
    size = channels * height * width
    random = np.random.default_rng(7)
    scale = 4 / (255 if dtype == TensorProto.UINT8 else 1) / np.sqrt(size)
    weight = (random.standard_normal((size, count)) * scale).astype(np.float32)
    shape = [batch, channels, height, width] if layout == "nchw" else [batch, height, width, channels]
    out = result or (TensorProto.FLOAT if dtype == TensorProto.UINT8 else dtype)
    weights = {"weight": weight}
    nodes = [
        helper.make_node("Cast", ["image"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["values"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
    ]
    if tail:
        weights["shape"] = np.array([0, count, *tail], np.int64)  # type: ignore[assignment]
        nodes.append(helper.make_node("Reshape", ["product", "shape"], ["tall"]))
    nodes.append(helper.make_node("Cast", [nodes[-1].output[0]], ["scores"], to=out))
    inputs = {"image": (dtype, shape)}
    if listed:
        inputs |= {
            name: (helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape)) for name, value in weights.items()
        }
    model = graphs.make(nodes, inputs, {"scores": (out, [batch, count, *tail])}, weights, opset=opset)
    if ir_version:
        model.ir_version = ir_version
    return model


def constant_model(scores: NDArray[Any]) -> ModelProto:
    """`image` float32 (batch, 3, 4, 6) → `scores`: the same for every picture."""
    return graphs.make(
        [
            helper.make_node("ReduceSum", ["image", "axes"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
            helper.make_node("Reshape", ["nothing", "column"], ["tall"]),
            helper.make_node("Add", ["tall", "values"], ["scores"]),
        ],
        {"image": (TensorProto.FLOAT, ["batch", 3, *SIZE])},
        {"scores": (TensorProto.FLOAT, ["batch", len(scores)])},
        {
            "axes": np.array([1, 2, 3], np.int64),
            "zero": np.zeros((), np.float32),
            "column": np.array([-1, 1], np.int64),
            "values": scores.astype(np.float32)[None],
        },
    )


def write_pixels(
    folder: Path,
    model: ModelProto,
    *,
    concepts: int | Sequence[str] = 5,
    activation: str = "softmax",
    plan: str = "wrapped",
    image: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """A visual-classifier bundle of such a model."""
    names = [f"n{index}" for index in range(concepts)] if isinstance(concepts, int) else list(concepts)
    section = {
        "plan": plan,
        "image": {"input": "image", "size": list(SIZE), **(image or {})},
        "scores": {"output": "scores", "activation": activation},
        **more,
    }
    return graphs.write_bundle(folder, model, graphs.bundle_config(folder, "visual-classifier", section, names))


@dataclass
class Opened:
    """A bundle read, planned and loaded, without a batcher."""

    config: BundleConfig
    version: VersionFolder
    concepts: tuple[Concept, ...]
    plan: Plan
    session: Session


def planned(folder: Path) -> tuple[BundleConfig, VersionFolder, tuple[Concept, ...], Plan]:
    """The bundle's config, version, concepts and plan."""
    config, _, _ = read_config(folder, "u", "a")
    assert config is not None
    version = find_versions(folder, config.onnx.file)[0]
    concepts = concepts_of(config, version)
    return config, version, concepts, make_plan(folder, config, version, len(concepts))


def opened(folder: Path) -> Opened:
    """The bundle's graph as the engine would load it."""
    config, version, concepts, plan = planned(folder)
    assert plan.model is not None
    session = Session(plan.model, plan.file.parent, CPU, 1, weights=plan.weights)
    return Opened(config, version, concepts, plan, session)


def plain(folder: Path) -> Session:
    """The bundle's own file, nothing done to it."""
    file = folder / "1" / "model.onnx"
    return Session(file, file.parent, CPU, 1)


def engine(metrics: Metrics | None = None, queue_rows: int = 1000) -> LocalEngine:
    """An engine on one CPU thread."""
    settings = EngineSettings(device="cpu", threads=1, queue_rows=queue_rows)
    return LocalEngine(settings, metrics or Metrics())


async def loaded(folder: Path, pool: DecodePool | None = None, limits: Limits | None = None) -> Servable:
    """The bundle as a servable; close it."""
    config, _, _ = read_config(folder, "u", "a")
    assert config is not None
    version = find_versions(folder, config.onnx.file)[0]
    metrics = Metrics()
    return await servable.load(
        folder, config, version, engine(metrics), pool or DecodePool(2), metrics, limits or Limits()
    )


def as_initializer(name: str, value: Any) -> TensorProto:
    """A constant of a graph."""
    return numpy_helper.from_array(np.asarray(value), name)
