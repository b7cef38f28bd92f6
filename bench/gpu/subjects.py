"""The models that are measured on a GPU, in single and in half precision, with pictures; nothing is fetched."""

import io
import os
import shutil
from dataclasses import dataclass

import numpy as np
import yaml
from PIL import Image

from bench.models import resnet, vit
from bench.workload import OUT, ROOT, Workload, photographs

_WRITE = {"resnet50": resnet.write, "vit-b16": vit.write}
MODELS = tuple(_WRITE)
PRECISIONS = ("fp32", "fp16")
TEXTS = ROOT / "models" / "ml-topics"
"""The text classifier that the product ships: rows of many lengths."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One model in one precision, as a workload of the other benchmarks."""

    model: str
    precision: str
    workload: Workload

    def __str__(self) -> str:
        return f"{self.model} {self.precision}"


def subject(model: str, precision: str) -> Subject:
    """The bundle is written if it is not there yet."""
    bundle = OUT / "gpu" / precision / model
    if not (bundle / "config.yaml").exists():
        plain = OUT / "gpu" / "fp32" / model
        if not (plain / "config.yaml").exists():
            _WRITE[model](plain)
        if precision != "fp32":
            shutil.copytree(plain, bundle, copy_function=os.link)
            config = yaml.safe_load((plain / "config.yaml").read_text(encoding="utf-8"))
            config["onnx"]["precision"] = precision
            (bundle / "config.yaml").unlink()  # a link to the other's
            (bundle / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    pictures = _pictures()
    size = sum(len(picture) for picture in pictures) // len(pictures) // 1000
    title = f"{model}, random weights, {precision}; 500×375 JPEG of about {size} kB, 20 of 1000 concepts"
    return Subject(model, precision, Workload(model, title, bundle, pictures, "image"))


def _pictures() -> tuple[bytes, ...]:
    """Photographs, or where scikit-learn is missing something of about their size and detail."""
    try:
        return photographs()
    except ImportError:
        random, files = np.random.default_rng(0), []
        for _ in range(8):
            coarse = Image.fromarray(random.integers(0, 255, (24, 32, 3), np.uint8)).resize((500, 375))
            noisy = np.asarray(coarse, np.int16) + random.integers(-14, 14, (375, 500, 3), np.int16)
            file = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
            files.append(file.getvalue())
        return tuple(files)


def gib(count: int | None) -> float:
    """Bytes as GiB with two digits, for JSON."""
    return round((count or 0) / 2**30, 2)
