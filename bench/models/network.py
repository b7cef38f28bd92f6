"""Graphs built node by node: methods take the name of a tensor and return the name of the next one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


class Network:
    """Collects nodes and weights. Weights that nobody gives are random, the same ones every time."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[TensorProto] = []

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        """Any operator with one output."""
        name = output or f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def weight(self, shape: Sequence[int], deviation: float, mean: float = 0.0) -> str:
        """Normally distributed float32."""
        values = self._random.standard_normal(tuple(shape), np.float32) * np.float32(deviation) + np.float32(mean)
        return self.constant(values)

    def constant(self, values: NDArray[np.generic]) -> str:
        """These values."""
        name = f"weight{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def numbers(self, *values: int) -> str:
        """An int64 vector: shapes, axes."""
        return self.constant(np.array(values, np.int64))

    def convolution(self, x: str, inputs: int, outputs: int, kernel: int, stride: int = 1, scale: float = 1.0) -> str:
        """With bias, padded to keep the size. Source: He et al. 2015, Delving Deep into Rectifiers."""
        deviation = scale * (2 / (inputs * kernel * kernel)) ** 0.5
        weight = self.weight((outputs, inputs, kernel, kernel), deviation)
        bias = self.weight((outputs,), 0.01)
        pads = [kernel // 2] * 4
        return self.node("Conv", x, weight, bias, kernel_shape=[kernel, kernel], strides=[stride, stride], pads=pads)

    def relu(self, x: str) -> str:
        """max(x, 0)."""
        return self.node("Relu", x)

    def silu(self, x: str) -> str:
        """x · sigmoid(x)."""
        return self.node("Mul", x, self.node("Sigmoid", x))

    def model(
        self, name: str, inputs: dict[str, tuple[int, list[object]]], outputs: dict[str, list[object]]
    ) -> onnx.ModelProto:
        """Args: inputs: name → element type, shape. outputs: name → shape, float32."""
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info(key, kind, shape) for key, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in outputs.items()],
            self._weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_bundle(
    bundle: Path, model: onnx.ModelProto | bytes, section: dict[str, object], kind: str, **more: object
) -> Path:
    """Write `config.yaml` and `1/model.onnx`; the folder's name is the model's id.

    Args: section: under `onnx:`. kind: model_type_id. more: other keys of the config.
    """
    (bundle / "1").mkdir(parents=True, exist_ok=True)
    data = model if isinstance(model, bytes) else model.SerializeToString()
    (bundle / "1/model.onnx").write_bytes(data)
    ids = {"id": bundle.name, "user_id": "appliance", "app_id": "main", "model_type_id": kind}
    config = {"model": ids, **more, "onnx": section}
    text = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110)
    (bundle / "config.yaml").write_text(text, encoding="utf-8")
    return bundle


def classes(count: int) -> list[dict[str, str]]:
    """Concepts class-0000, class-0001, …"""
    return [{"id": f"class-{index:04}", "name": f"class {index}"} for index in range(count)]


def photograph(input_name: str = "image", size: int = 224, resize: str = "crop") -> dict[str, object]:
    """The image section of networks trained on ImageNet's normalisation."""
    section: dict[str, object] = {
        "input": input_name,
        "layout": "nchw",
        "color": "rgb",
        "size": [size, size],
        "resize": resize,
        "interpolation": "bilinear",
        "scale": 1 / 255,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    if resize == "crop":
        section["resize_shorter"] = size * 8 // 7
    return section
