"""What all servers serve: the same ONNX file, one row a request."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.models import minilm, network, resnet, tiny
from bench.workload import OUT, photographs, resnet50


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One model of the comparison.

    Attributes:
        bundle: for our daemon.
        task: "array": a tensor in, a tensor out. "picture": a JPEG in, 20 concepts out.
        row: what is sent; for pictures the file's bytes.
        expected: what the graph gives for it; for pictures the id of the best concept.
    """

    name: str
    title: str
    bundle: Path
    task: str
    input: str
    output: str
    row: Any
    outputs: int
    expected: Any
    seconds: float

    @property
    def file(self) -> Path:
        """The ONNX file."""
        return self.bundle / "1/model.onnx"

    @property
    def v2_type(self) -> str:
        """The element type in KServe's words."""
        return "INT64" if self.row.dtype == np.int64 else "FP32"


def m1() -> Model:
    """An MLP for digits: the front end alone."""
    bundle = OUT / "mlp"
    if not bundle.exists():
        tiny.write_bundle(bundle, tiny.mlp())
    row = np.random.default_rng(1).random(64, np.float32)
    return _array("m1", "an MLP 64 → 64 → 10, batch-1 requests of 64 float32", bundle, "x", "y", row, 2.0)


def m2() -> Model:
    """ResNet-50 on a tensor."""
    bundle = OUT / "resnet50-tensors"
    if not bundle.exists():
        tiny.write_bundle(bundle, resnet.graph().SerializeToString())
    row = np.random.default_rng(2).random((3, 224, 224), np.float32)
    title = "ResNet-50, a float32 tensor of 602 kB a request"
    return _array("m2", title, bundle, "image", "logits", row, 6.0)


def m2j() -> Model:
    """ResNet-50 on a JPEG."""
    workload = resnet50()
    from bench import ort

    expected = ort.measure(workload, (sorted(_usable())[0],), 0.01)["answers"][0]["concept"]
    size = len(photographs()[0]) // 1000
    title = f"ResNet-50 from a {size} kB JPEG to 20 concepts"
    return Model("m2j", title, workload.bundle, "picture", "image", "logits", photographs()[0], 1000, expected, 6.0)


def m3() -> Model:
    """MiniLM on token ids."""
    bundle = OUT / "minilm-ids"
    if not bundle.exists():
        graph = minilm.graph(minilm.fetch() / "model.safetensors", pooled=True)
        network.write_bundle(bundle, graph, {"file": "model.onnx"}, "tensor-to-tensor")
    row = np.random.default_rng(3).integers(1000, 20_000, 64).astype(np.int64)
    return _array("m3", "all-MiniLM-L6-v2, 64 token ids to 384 numbers", bundle, "input_ids", "embedding", row, 4.0)


MODELS = {"m1": m1, "m2": m2, "m2j": m2j, "m3": m3}


def _array(name: str, title: str, bundle: Path, given: str, output: str, row: Any, seconds: float) -> Model:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle / "1/model.onnx"))
    expected = session.run([output], {given: row[None]})[0][0]
    return Model(name, title, bundle, "array", given, output, row, len(expected), expected, seconds)


def _usable() -> set[int]:
    import os

    return os.sched_getaffinity(0)
