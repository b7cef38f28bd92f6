"""Graphs made here, served as raw tensors."""

from pathlib import Path

import numpy as np
import yaml
from onnx import TensorProto, helper, numpy_helper


def mlp() -> bytes:
    """64 → 64 → 10 with random weights: next to nothing for a model, so that all the rest shows."""
    random = np.random.default_rng(0)
    weights = {"w1": random.standard_normal((64, 64)), "w2": random.standard_normal((64, 10))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("MatMul", ["b", "w2"], ["y"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def write_bundle(bundle: Path, graph: bytes) -> None:
    """A bundle that serves `graph` on its own inputs and outputs, as `appliance/main/<folder's name>`."""
    (bundle / "1").mkdir(parents=True)
    (bundle / "1/model.onnx").write_bytes(graph)
    model = {"id": bundle.name, "user_id": "appliance", "app_id": "main", "model_type_id": "tensor-to-tensor"}
    config = {"model": model, "onnx": {"file": "model.onnx"}}
    (bundle / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
