"""A ResNet-50 of random weights: the cost of a real picture classifier without anybody's weights.

The graph is what an export of a trained one looks like once batch normalisation is folded into the convolutions: 53
convolutions with bias, 25.5 million weights, 4.1 billion multiply-adds for one picture.
Source: He et al. 2015, Deep Residual Learning, table 1, with the stride in the 3×3 convolution as torchvision has it.
"""

from pathlib import Path

import onnx
from onnx import TensorProto

from bench.models.network import Network, classes, photograph, write_bundle

CLASSES = 1000
SIZE = 224
_BLOCKS = (3, 4, 6, 3)
_BRANCH_SCALE = 0.25
"""Shrinks what each block adds, so that the sum over 16 blocks stays of the order of one, as in a trained network."""


def write(bundle: Path) -> Path:
    """100 MB; the same bytes every time."""
    section = {"image": photograph(size=SIZE), "scores": {"output": "logits", "activation": "softmax"}}
    return write_bundle(bundle, graph(), section, "visual-classifier", concepts=classes(CLASSES))


def graph() -> onnx.ModelProto:
    """Logits (batch, 1000) for `image` (batch, 3, 224, 224)."""
    net = Network(50)
    x = net.relu(net.convolution("image", 3, 64, kernel=7, stride=2))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, blocks in enumerate(_BLOCKS):
        width = 64 << stage
        for block in range(blocks):
            x = _bottleneck(net, x, channels, width, 2 if stage and not block else 1)
            channels = 4 * width
    x = net.node("Flatten", net.node("GlobalAveragePool", x), axis=1)
    weight = net.weight((CLASSES, channels), (1 / channels) ** 0.5)
    net.node("Gemm", x, weight, net.weight((CLASSES,), 0.01), output="logits", transB=1)
    shape: list[object] = ["batch", 3, SIZE, SIZE]
    return net.model("resnet50", {"image": (TensorProto.FLOAT, shape)}, {"logits": ["batch", CLASSES]})


def _bottleneck(net: Network, x: str, channels: int, width: int, stride: int) -> str:
    y = net.relu(net.convolution(x, channels, width, kernel=1))
    y = net.relu(net.convolution(y, width, width, kernel=3, stride=stride))
    y = net.convolution(y, width, 4 * width, kernel=1, scale=_BRANCH_SCALE)
    if channels != 4 * width:
        x = net.convolution(x, channels, 4 * width, kernel=1, stride=stride)
    return net.relu(net.node("Add", y, x))
