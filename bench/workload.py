"""What is measured: a bundle, inputs for it, and the requests made of them."""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from PIL import Image

from bench.models import minilm, resnet, tiny, vit, yolo

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "out"
"""Where what is built for a run lies; not in git."""

METHOD = "/clarifai.api.V2/PostModelOutputs"
CONNECTIONS = (1, 8, 64)
BATCHES = (1, 8, 128)

_JPEG_SIZE = (500, 375)
_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of request: how many inputs it carries."""

    inputs: int

    @property
    def name(self) -> str:
        """For tables."""
        return "unary" if self.inputs == 1 else f"batch {self.inputs}"


@dataclass(frozen=True, slots=True)
class Workload:
    """One model under test.

    Attributes:
        bundle: its folder.
        inputs: what requests take in turn: encoded pictures, texts, or rows of 64 floats.
        kind: of the inputs: "image", "text" or "tensor".
        generator: "h2load" where a request is so short that a Python generator would be the limit, else "lean".
        heavy: whether a run of the model takes so long that nearly all the work is the model's: the bar of 0.95.
        batches: of the raw figures.
        largest: inputs of one request at most, where more would take a quarter of a minute.
    """

    name: str
    title: str
    bundle: Path
    inputs: tuple[bytes, ...] | tuple[str, ...]
    kind: str
    generator: str = "lean"
    heavy: bool = True
    batches: tuple[int, ...] = (1, 8, 32)
    largest: int = 128

    def shapes(self, batches: Sequence[int] = BATCHES) -> list[Shape]:
        """Those of `batches` that make sense here."""
        return [Shape(batch) for batch in batches if batch <= self.largest]

    def inputs_of(self, shape: Shape) -> list[bytes | str]:
        """The inputs of one request, in its order."""
        return [self.inputs[index % len(self.inputs)] for index in range(shape.inputs)]

    def data(self, given: bytes | str) -> resources_pb2.Data:
        """One input as the API has it."""
        if self.kind == "image":
            return resources_pb2.Data(image=resources_pb2.Image(base64=given))
        if self.kind == "text":
            return resources_pb2.Data(text=resources_pb2.Text(raw=given))
        return resources_pb2.Data(ndarray=resources_pb2.NDArray(buffer=given, shape=[len(given) // 4], dtype="float32"))

    def request(self, shape: Shape) -> bytes:
        """A serialised PostModelOutputsRequest; the bundles name user, app and model this way."""
        inputs = [resources_pb2.Input(data=self.data(given)) for given in self.inputs_of(shape)]
        ids = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")
        message = service_pb2.PostModelOutputsRequest(user_app_id=ids, model_id=self.bundle.name, inputs=inputs)
        return bytes(message.SerializeToString())


def digits() -> Workload:
    """The shipped digits bundle, with its own samples."""
    bundle = ROOT / "models" / "digits"
    samples = tuple(path.read_bytes() for path in sorted((bundle / "samples").glob("*.png")))
    title = "digits: the shipped bundle, 8×8 grey PNG of about 200 bytes, 10 concepts"
    return Workload("digits", title, bundle, samples, "image", "h2load", heavy=False, batches=(1, 8, 32, 128))


def mlp() -> Workload:
    """Next to nothing for a model, asked for raw tensors."""
    bundle = _built("mlp", lambda folder: tiny.write_bundle(folder, tiny.mlp()))
    rows = np.random.default_rng(0).random((8, 64), np.float32)
    title = "mlp: 64 → 64 → 10 of random weights, 64 float32 in, 10 out"
    inputs = tuple(row.tobytes() for row in rows)
    return Workload("mlp", title, bundle, inputs, "tensor", "h2load", heavy=False, batches=(1, 8, 32, 128))


def resnet50() -> Workload:
    """A ResNet-50 of random weights, with photographs."""
    title = f"resnet50: random weights, {_pictures_text()}, 1000 concepts of which 20 are returned"
    return Workload("resnet50", title, _built("resnet50", resnet.write), photographs(), "image")


def vit_b16() -> Workload:
    """A ViT-B/16 of random weights, with photographs."""
    title = f"vit-b16: random weights, {_pictures_text()}, 1000 concepts of which 20 are returned"
    return Workload("vit-b16", title, _built("vit-b16", vit.write), photographs(), "image", batches=(1, 8), largest=8)


def detector() -> Workload:
    """A YOLO-shaped detector of random weights, with photographs."""
    title = f"yolo: random weights, {_pictures_text()} at 640×640, 8400 anchors, regions of some 150 of them"
    return Workload("yolo", title, _built("yolo", yolo.write), photographs(), "image", batches=(1, 8), largest=8)


def text_embedder() -> Workload:
    """all-MiniLM-L6-v2, its real weights."""
    title = "minilm: all-MiniLM-L6-v2, sentences of 17 to 30 tokens in rows of 32, 384 numbers each"
    return Workload("minilm", title, _built("minilm", minilm.write), _SENTENCES, "text")


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "digits": digits,
    "mlp": mlp,
    "minilm": text_embedder,
    "resnet50": resnet50,
    "vit-b16": vit_b16,
    "yolo": detector,
}


def _built(name: str, write: Callable[[Path], Path]) -> Path:
    """The bundle, written if it is not there yet or its source is newer."""
    bundle = OUT / name
    sources = max(os.stat(file).st_mtime for file in (Path(__file__).parent / "models").glob("*.py"))
    done = bundle / "config.yaml"
    if not done.exists() or done.stat().st_mtime < sources:
        write(bundle)
    return bundle


def _pictures_text() -> str:
    size = sum(len(picture) for picture in photographs()) // len(photographs()) // 1000
    return f"500×375 JPEG of about {size} kB"


@cache
def photographs() -> tuple[bytes, ...]:
    """Eight JPEG files: four cuts of each of scikit-learn's two sample photographs."""
    from sklearn.datasets import load_sample_images

    files = []
    width, height = _JPEG_SIZE
    for pixels in load_sample_images().images:
        photograph = Image.fromarray(pixels)
        for left in (0, photograph.width - width):
            for top in (0, photograph.height - height):
                file = io.BytesIO()
                cut = photograph.crop((left, top, left + width, top + height))
                cut.save(file, "JPEG", quality=_JPEG_QUALITY)
                files.append(file.getvalue())
    return tuple(files)


_SENTENCES = (
    "The pump at the north gate was replaced in spring, and since then the pressure has been steady.",
    "A kitten slept on the warm bonnet of a car while its owner talked to the neighbours outside.",
    "Shares of the two largest shipping companies fell sharply after the canal was closed for a week.",
    "Add the flour slowly, stir until the dough is smooth, then let it rest for an hour in the cold.",
    "The committee will publish its report on the safety of railway bridges at the end of this month.",
    "Our telescope saw a faint object that moves against the stars, most likely a comet on its way in.",
    "She tuned the old violin by ear, played a few bars of the slow movement, and put it away again.",
    "Please restart the router, wait until both lamps are green, and tell us whether the error remains.",
)
