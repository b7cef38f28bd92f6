"""A ResNet-50 of random weights as a bundle: the cost of a real picture classifier without anybody's weights.

The graph is what an export of a trained one looks like once batch normalisation is folded into the convolutions: 53
convolutions with bias, 25.5 million weights, 4.1 billion multiply-adds for one picture.
Source: He et al. 2015, Deep Residual Learning, table 1, with the stride in the 3×3 convolution as torchvision has it.
"""

from pathlib import Path

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

CLASSES = 1000
SIZE = 224
_BLOCKS = (3, 4, 6, 3)
_SEED = 50
_BRANCH_SCALE = 0.25
"""Shrinks what each block adds, so that the sum over 16 blocks stays of the order of one, as in a trained network."""


def make_bundle(folder: Path) -> Path:
    """Write `config.yaml` and `1/model.onnx` (100 MB) into `folder`; the same bytes every time."""
    (folder / "1").mkdir(parents=True, exist_ok=True)
    onnx.save(_Builder().model(), folder / "1" / "model.onnx")
    text = yaml.safe_dump(_config(), sort_keys=False, default_flow_style=None, width=110)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    return folder


def _config() -> dict[str, object]:
    return {
        "model": {
            "id": "resnet50",
            "user_id": "appliance",
            "app_id": "main",
            "model_type_id": "visual-classifier",
            "name": "ResNet-50 of random weights",
        },
        "concepts": [{"id": f"class-{index:04}", "name": f"class {index}"} for index in range(CLASSES)],
        "onnx": {
            "image": {
                "input": "image",
                "layout": "nchw",
                "color": "rgb",
                "size": [SIZE, SIZE],
                "resize": "crop",
                "resize_shorter": 256,
                "interpolation": "bilinear",
                "scale": 1 / 255,
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
            },
            "scores": {"output": "logits", "activation": "softmax"},
        },
    }


class _Builder:
    """Collects nodes and weights; methods take the name of a tensor and return the name of the next one."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(_SEED)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[TensorProto] = []

    def model(self) -> onnx.ModelProto:
        """Logits (batch, 1000) for `image` (batch, 3, 224, 224)."""
        x = self._relu(self._convolution("image", 3, 64, kernel=7, stride=2))
        x = self._node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        channels = 64
        for stage, blocks in enumerate(_BLOCKS):
            width = 64 << stage
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = self._bottleneck(x, channels, width, stride)
                channels = 4 * width
        x = self._node("Flatten", self._node("GlobalAveragePool", x), axis=1)
        deviation = (1 / channels) ** 0.5
        weight = self._weight((CLASSES, channels), deviation)
        self._node("Gemm", x, weight, self._weight((CLASSES,), 0.01), output="logits", transB=1)
        graph = helper.make_graph(
            self._nodes,
            "resnet50",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
            self._weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def _bottleneck(self, x: str, channels: int, width: int, stride: int) -> str:
        y = self._relu(self._convolution(x, channels, width, kernel=1))
        y = self._relu(self._convolution(y, width, width, kernel=3, stride=stride))
        y = self._convolution(y, width, 4 * width, kernel=1, scale=_BRANCH_SCALE)
        if channels != 4 * width:
            x = self._convolution(x, channels, 4 * width, kernel=1, stride=stride)
        return self._relu(self._node("Add", y, x))

    def _convolution(self, x: str, inputs: int, outputs: int, kernel: int, stride: int = 1, scale: float = 1.0) -> str:
        # He et al. 2015, Delving Deep into Rectifiers: variance 2 / fan-in.
        deviation = scale * (2 / (inputs * kernel * kernel)) ** 0.5
        weight = self._weight((outputs, inputs, kernel, kernel), deviation)
        bias = self._weight((outputs,), 0.01)
        pads = [kernel // 2] * 4
        return self._node("Conv", x, weight, bias, kernel_shape=[kernel, kernel], strides=[stride, stride], pads=pads)

    def _relu(self, x: str) -> str:
        return self._node("Relu", x)

    def _weight(self, shape: tuple[int, ...], deviation: float) -> str:
        name = f"weight{len(self._weights)}"
        values = self._random.standard_normal(shape, np.float32) * np.float32(deviation)
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def _node(self, operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        name = output or f"{operator.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name
