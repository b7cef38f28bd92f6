"""Graphs that cost next to nothing, so that all the rest shows."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bench.models import network


def mlp(outputs: int = 10, seed: int = 0) -> bytes:
    """64 → 64 → `outputs` with random weights."""
    random = np.random.default_rng(seed)
    weights = {"w1": random.standard_normal((64, 64)) / 8, "w2": random.standard_normal((64, outputs)) / 8}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("MatMul", ["b", "w2"], ["y"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def write_bundle(bundle: Path, graph: bytes) -> Path:
    """A bundle that serves `graph` on its own inputs and outputs as raw tensors."""
    return network.write_bundle(bundle, graph, {"file": "model.onnx"}, "tensor-to-tensor")


def write_classifier(bundle: Path, concepts: int) -> Path:
    """A bundle that classifies 8×8 pictures into so many concepts."""
    net = network.Network(concepts)
    x = net.node("Flatten", "image", axis=1)
    net.node("Gemm", x, net.weight((64, concepts), 0.2), net.weight((concepts,), 0.2), output="logits")
    shape: list[object] = ["batch", 1, 8, 8]
    model = net.model("tiny", {"image": (TensorProto.FLOAT, shape)}, {"logits": ["batch", concepts]})
    image = {"input": "image", "layout": "nchw", "color": "grey", "size": [8, 8], "scale": 1 / 255}
    section = {"image": image, "scores": {"output": "logits", "activation": "softmax"}}
    return network.write_bundle(bundle, model, section, "visual-classifier", concepts=network.classes(concepts))
