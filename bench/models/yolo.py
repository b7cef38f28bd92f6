"""A detector of random weights, shaped like a small YOLO: 640×640 in, 84 numbers for each of 8400 anchors out.

A convolutional backbone with residual blocks and SiLU, a pyramid of three scales (strides 8, 16, 32), one head a scale.
About 4 billion multiply-adds for one picture, as the smallest YOLOv8 has.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from bench.models.network import Network, classes, write_bundle

SIZE, CLASSES, ANCHORS = 640, 80, 8400
_SURE = -5.0
"""Added to every class score, so that only a few anchors hold something, as in a trained network."""


def write(bundle: Path) -> Path:
    """A few MB; the same bytes every time. Answers are regions, as callers of a detector want them."""
    picture = {"size": [SIZE, SIZE], "layout": "nchw", "resize": "stretch", "scale": 1 / 255}
    threshold = {"name": "threshold", "type": "float", "default": 0.25, "range": [0, 1]}
    returns = {
        "type": "list[region]",
        "output": "boxes",
        "scores": "scores",
        "box": "cxcywh",
        "box_size": [SIZE, SIZE],
        "min_score": "threshold",
    }
    method = {
        "name": "predict",
        "description": "Objects in a picture, the surest first.",
        "arguments": [{"name": "image", "type": "image", "input": "images", "image": picture}, threshold],
        "returns": returns,
    }
    return write_bundle(bundle, graph(), {"methods": [method]}, "any-to-any", concepts=classes(CLASSES))


def graph() -> onnx.ModelProto:
    """For `images` (batch, 3, 640, 640): `output0` (batch, 84, 8400), and the same as `boxes` and `scores`."""
    net = Network(8)

    def block(x: str, inputs: int, outputs: int, stride: int, depth: int) -> str:
        x = net.silu(net.convolution(x, inputs, outputs, 3, stride))
        for _ in range(depth):
            y = net.silu(net.convolution(x, outputs, outputs // 2, 1))
            x = net.node("Add", x, net.silu(net.convolution(y, outputs // 2, outputs, 3, scale=0.5)))
        return x

    x = block("images", 3, 16, 2, 0)
    x = block(x, 16, 32, 2, 1)
    eighth = block(x, 32, 64, 2, 2)
    sixteenth = block(eighth, 64, 128, 2, 2)
    last = block(sixteenth, 128, 256, 2, 1)
    doubled = net.constant(np.array([1, 1, 2, 2], np.float32))

    def up(x: str) -> str:
        return net.node("Resize", x, "", doubled, mode="nearest")

    middle = block(net.node("Concat", up(last), sixteenth, axis=1), 384, 128, 1, 1)
    fine = block(net.node("Concat", up(middle), eighth, axis=1), 192, 64, 1, 1)
    boxes, scores = [], []
    for x, channels, stride in ((fine, 64, 8), (middle, 128, 16), (last, 256, 32)):
        cells = (SIZE // stride) ** 2
        for found, width in ((boxes, 4), (scores, CLASSES)):
            y = net.convolution(net.silu(net.convolution(x, channels, 64, 3)), 64, width, 1)
            found.append(net.node("Reshape", y, net.numbers(0, width, cells)))
    box = net.node("Sigmoid", net.node("Concat", *boxes, axis=2))
    box = net.node("Mul", box, net.constant(np.float32(SIZE)))
    score = net.node("Add", net.node("Concat", *scores, axis=2), net.constant(np.float32(_SURE)))
    score = net.node("Sigmoid", score)
    net.node("Concat", box, score, axis=1, output="output0")
    net.node("Transpose", box, output="boxes", perm=[0, 2, 1])
    net.node("Transpose", score, output="scores", perm=[0, 2, 1])
    image: list[object] = ["batch", 3, SIZE, SIZE]
    outputs: dict[str, list[object]] = {
        "output0": ["batch", 4 + CLASSES, ANCHORS],
        "boxes": ["batch", ANCHORS, 4],
        "scores": ["batch", ANCHORS, CLASSES],
    }
    return net.model("yolo", {"images": (TensorProto.FLOAT, image)}, outputs)
