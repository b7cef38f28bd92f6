"""Make the digits bundle: train a small convolutional network, export it, measure it, write config and samples.

Run it with torch 2.13.0 (CPU), onnx, onnxruntime, scikit-learn, Pillow and PyYAML installed; it takes half a minute:

    python models/digits/make.py

The same versions on the same kind of processor give the same bytes. Nothing is tuned on the held-out scans: the
recipe was chosen by cross-validation within the training scans, and the last epoch is what ships.
"""

import os
import warnings
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported

import data
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

BUNDLE = Path(__file__).parent
MODEL = BUNDLE / "1" / "model.onnx"
SAMPLES = BUNDLE / "samples"

SEED = 20
EPOCHS = 60
BATCH = 64
SAMPLE_COUNT = 32
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DigitNet(nn.Module):
    """Logits (batch, 10) for pictures (batch, 1, 8, 8) in -1..1, white ink on black or black ink on white."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            *_convolution(64, 64),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 4 * 4, 10),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Bring every picture to light ink on a dark ground, then classify it.

        A digit covers well under half of its picture (at most 0.43 of the light, over all scans), so a picture whose
        mean is above the middle is dark ink on a light ground: its negative is what the layers know.
        """
        light_ground = image.mean(dim=(1, 2, 3), keepdim=True) > 0
        return self.layers(torch.where(light_ground, -image, image))


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]


def distorted(images: Tensor) -> Tensor:
    """Return the pictures (batch, 1, 8, 8) in 0..1 slightly turned, sheared, scaled, moved and noisy.

    Four in five are warped, bilinearly, which also stands for scans that were enlarged and softened on their way here.
    """
    count = len(images)
    angle, scale, shear = _uniform(count, 0.2), 1 + _uniform(count, 0.15), _uniform(count, 0.15)
    matrix = torch.stack([scale * angle.cos(), shear - angle.sin(), angle.sin(), scale * angle.cos()], 1).view(-1, 2, 2)
    move = torch.stack([_uniform(count, 0.2), _uniform(count, 0.2)], 1)[..., None]
    grid = F.affine_grid(torch.cat([matrix, move], 2), list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, align_corners=False)
    images = torch.where((torch.rand(count) < 0.8)[:, None, None, None], warped, images)
    return (images + torch.randn_like(images) * 0.04 * torch.rand(count, 1, 1, 1)).clamp(0, 1)


def _uniform(count: int, limit: float) -> Tensor:
    return (torch.rand(count) * 2 - 1) * limit


def train() -> DigitNet:
    """Return the network fitted to the training scans, in evaluation mode."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums in one order, whatever the number of cores
    pictures, labels = data.training()
    images, targets = torch.from_numpy(pictures).float()[:, None] / 255, torch.from_numpy(labels)
    network = DigitNet()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            logits = network((distorted(images[rows]) - 0.5) / 0.5)
            loss = F.cross_entropy(logits, targets[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def export(network: DigitNet) -> None:
    """Write the network as ONNX with a free batch axis, and check the file."""
    MODEL.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # dynamo=False: the exporter whose bytes repeat
        torch.onnx.export(
            network,
            (torch.zeros(2, 1, 8, 8),),
            MODEL,
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    onnx.checker.check_model(str(MODEL), full_check=True)


def measure(picture_size: int, format: str, negative: bool = False) -> float:
    """Return the accuracy of the written model on the held-out scans, each sent through a picture file."""
    pictures, labels = data.held_out()
    pictures = 255 - pictures if negative else pictures
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    files = [data.encoded(data.enlarged(picture, picture_size), format) for picture in pictures]
    batch: NDArray[np.float32] = np.stack([data.model_input(file) for file in files])
    (logits,) = session.run(["logits"], {"image": batch})
    return float((logits.argmax(1) == labels).mean())


def write_config(accuracy: float) -> None:
    """Write config.yaml; the concepts stand in the order of the outputs."""
    config = {
        "model": {
            "id": "digits",
            "user_id": "appliance",
            "app_id": "main",
            "model_type_id": "visual-classifier",
            "name": "Handwritten digits",
            "description": "Names the one handwritten digit a picture shows, seen as 8x8 grey pixels. "
            f"Accuracy {accuracy:.1%} on {data.HELD_OUT} held-out scans of the UCI digits.",
        },
        "concepts": [{"id": str(digit), "name": name} for digit, name in enumerate(NAMES)],
        "inference_compute_info": {"cpu_limit": "1", "cpu_memory": "256Mi", "num_accelerators": 0},
        "onnx": {
            "file": "model.onnx",
            "image": {
                "input": "image",
                "layout": "nchw",
                "color": "grey",
                "size": [8, 8],
                "resize": "stretch",
                "interpolation": "box",
                "scale": 1 / 255,
                "mean": [0.5],
                "std": [0.5],
            },
            "scores": {"output": "logits", "activation": "softmax"},
        },
    }
    text = "# Written by make.py; the keys are explained in models/README.md.\n"
    text += yaml.safe_dump({"model": config.pop("model")}, sort_keys=False, width=120)
    text += yaml.safe_dump(config, sort_keys=False, width=120, default_flow_style=None)
    (BUNDLE / "config.yaml").write_text(text, encoding="utf-8")


def write_samples() -> None:
    """Write the first held-out scans as 64×64 PNGs for people to try, the true digit in each name."""
    SAMPLES.mkdir(exist_ok=True)
    for old in SAMPLES.glob("held-out-*.png"):
        old.unlink()
    pictures, labels = data.held_out()
    for number in range(SAMPLE_COUNT):
        file = data.encoded(data.enlarged(pictures[number], 64), "PNG")
        (SAMPLES / f"held-out-{number:03d}-label-{labels[number]}.png").write_bytes(file)


def main() -> None:
    """Make the whole bundle and print what it is worth."""
    export(train())
    accuracy = measure(8, "PNG")
    write_config(accuracy)
    write_samples()
    for size, format in ((8, "PNG"), (32, "PNG"), (64, "PNG"), (32, "JPEG"), (64, "JPEG")):
        print(f"held-out accuracy, {size}x{size} {format}: {measure(size, format):.4f}")
    print(f"held-out accuracy, 64x64 PNG, dark on light: {measure(64, 'PNG', negative=True):.4f}")
    print(f"{MODEL.stat().st_size} bytes")


if __name__ == "__main__":
    main()
