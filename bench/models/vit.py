"""A ViT-B/16 of random weights: 86 million weights, 17 billion multiply-adds for one picture.

Source: Dosovitskiy et al. 2020, An Image is Worth 16×16 Words, table 1.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from bench.models.network import Network, classes, photograph, write_bundle
from bench.models.transformer import Encoder

CLASSES, SIZE, PATCH = 1000, 224, 16
_WIDTH, _HEADS, _HIDDEN, _BLOCKS = 768, 12, 3072, 12


def write(bundle: Path) -> Path:
    """350 MB; the same bytes every time."""
    section = {"image": photograph(size=SIZE), "scores": {"output": "logits", "activation": "softmax"}}
    return write_bundle(bundle, graph(), section, "visual-classifier", concepts=classes(CLASSES))


def graph() -> onnx.ModelProto:
    """Logits (batch, 1000) for `image` (batch, 3, 224, 224)."""
    net = Network(16)

    def weights(name: str, shape: tuple[int, ...]) -> str:
        if "norm" in name:
            return net.constant(np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float32))
        return net.weight(shape, (1 / shape[0]) ** 0.5 if len(shape) > 1 else 0.01)

    encoder = Encoder(net, weights, _WIDTH, _HEADS, _HIDDEN, 1e-6)
    patches = (SIZE // PATCH) ** 2
    x = net.node(
        "Conv",
        "image",
        net.weight((_WIDTH, 3, PATCH, PATCH), (1 / (3 * PATCH * PATCH)) ** 0.5),
        net.weight((_WIDTH,), 0.01),
        kernel_shape=[PATCH, PATCH],
        strides=[PATCH, PATCH],
    )
    x = net.node("Transpose", net.node("Reshape", x, net.numbers(0, _WIDTH, patches)), perm=[0, 2, 1])
    batch = net.node("Gather", net.node("Shape", x), net.numbers(0), axis=0)
    shape = net.node("Concat", batch, net.numbers(1, _WIDTH), axis=0)
    x = net.node("Concat", net.node("Expand", net.weight((1, 1, _WIDTH), 1.0), shape), x, axis=1)
    x = net.node("Add", x, net.weight((1, patches + 1, _WIDTH), 0.02))
    for block in range(_BLOCKS):
        names = (f"{block}.query", f"{block}.key", f"{block}.value", f"{block}.out")
        x = net.node("Add", x, encoder.attention(encoder.normal(x, f"{block}.norm1"), names))
        y = encoder.feed_forward(encoder.normal(x, f"{block}.norm2"), f"{block}.up", f"{block}.down")
        x = net.node("Add", x, y)
    first = net.node("Gather", encoder.normal(x, "norm"), net.constant(np.array(0, np.int64)), axis=1)
    weight = net.weight((_WIDTH, CLASSES), (1 / _WIDTH) ** 0.5)
    net.node("Gemm", first, weight, net.weight((CLASSES,), 0.01), output="logits")
    image: list[object] = ["batch", 3, SIZE, SIZE]
    return net.model("vit-b16", {"image": (TensorProto.FLOAT, image)}, {"logits": ["batch", CLASSES]})
