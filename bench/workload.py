"""What is measured: a bundle, pictures for it, and the requests made of them."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from PIL import Image

from bench import resnet

ROOT = Path(__file__).parent.parent
OUT = Path(__file__).parent / "out"
"""Where what is built for a run lies; not in git."""

BATCHES = (1, 8, 32, 128)
"""Batch sizes of the raw figures."""

METHOD = "/clarifai.api.V2/PostModelOutputs"

_JPEG_SIZE = (500, 375)
_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of request: how many pictures it carries, and at how many connections it is sent."""

    inputs: int
    connections: tuple[int, ...]

    @property
    def name(self) -> str:
        """For tables."""
        return "unary" if self.inputs == 1 else f"batch {self.inputs}"


@dataclass(frozen=True, slots=True)
class Workload:
    """One model under test.

    Attributes:
        bundle: its folder.
        pictures: encoded files; a request takes them in turn.
        generator: "h2load" where a request is so short that a Python generator would be the limit, else "grpcio".
    """

    name: str
    title: str
    bundle: Path
    pictures: tuple[bytes, ...]
    shapes: tuple[Shape, ...]
    generator: str

    def pictures_of(self, shape: Shape) -> list[bytes]:
        """The pictures of one request, in its order."""
        return [self.pictures[index % len(self.pictures)] for index in range(shape.inputs)]

    def request(self, shape: Shape) -> bytes:
        """A serialised PostModelOutputsRequest; the bundles name user, app and model this way."""
        inputs = [
            resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(base64=picture)))
            for picture in self.pictures_of(shape)
        ]
        ids = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")
        message = service_pb2.PostModelOutputsRequest(user_app_id=ids, model_id=self.name, inputs=inputs)
        return bytes(message.SerializeToString())


def digits() -> Workload:
    """The shipped digits bundle, with its own samples."""
    bundle = ROOT / "models" / "digits"
    samples = tuple(path.read_bytes() for path in sorted((bundle / "samples").glob("*.png")))
    shapes = (Shape(1, (1, 8, 64)), Shape(128, (1, 8, 64)))
    title = "digits: the shipped bundle, 8×8 grey PNG of about 200 bytes, 10 concepts"
    return Workload("digits", title, bundle, samples, shapes, "h2load")


def resnet50() -> Workload:
    """A ResNet-50 of random weights, with photographs."""
    bundle = resnet.make_bundle(OUT / "resnet50")
    pictures = _photographs()
    size = sum(len(picture) for picture in pictures) // len(pictures) // 1000
    title = f"resnet50: random weights, 500×375 JPEG of about {size} kB, 1000 concepts of which 20 are returned"
    # One request of 128 takes seconds: two at a time already keep the model busy without a pause.
    shapes = (Shape(1, (1, 8, 64)), Shape(128, (1, 2)))
    return Workload("resnet50", title, bundle, pictures, shapes, "grpcio")


WORKLOADS: dict[str, Callable[[], Workload]] = {"digits": digits, "resnet50": resnet50}


def _photographs() -> tuple[bytes, ...]:
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
