"""Parts of a bundle's `onnx:` section: how a graph is fed, and what its outputs mean."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

FORBIDDEN_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".joblib", ".npy", ".npz", ".so"})
"""Files whose loading may run code; the appliance never opens them, and says so when a config names one."""

Positive = Annotated[int, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _inside(value: str) -> str:
    path = Path(value)
    if path.is_absolute() or ".." in path.parts or not value:
        raise ValueError(f"{value!r} must be a path inside the version's folder")
    if path.suffix.lower() in FORBIDDEN_SUFFIXES:
        raise ValueError(f"{value!r} is a kind of file that may run code; only ONNX, JSON and text files are read")
    return value


InsidePath = Annotated[str, AfterValidator(_inside)]


class Part(BaseModel):
    """What all parts have in common: immutable once read, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Picture(Part):
    """How a graph wants a picture; see models/README.md for the words."""

    layout: Literal["nchw", "nhwc"] = "nchw"
    color: Literal["rgb", "bgr", "grey"] = "rgb"
    size: tuple[Positive, Positive]
    resize: Literal["stretch", "crop"] = "stretch"
    resize_shorter: Positive | None = None
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    scale: Finite = 1 / 255
    mean: tuple[Finite, ...] = (0.0,)
    std: tuple[Finite, ...] = (1.0,)

    @property
    def channels(self) -> int:
        """1 for grey, else 3."""
        return 1 if self.color == "grey" else 3

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values; color {self.color} needs 1 or {self.channels}")
        if any(value == 0 for value in self.std):
            raise ValueError("std must not be 0")
        if self.resize_shorter is not None and self.resize_shorter < max(self.size) and self.resize == "crop":
            raise ValueError(f"resize_shorter {self.resize_shorter} is smaller than size {list(self.size)}")
        if max(*self.size, self.resize_shorter or 0) > 8192:
            raise ValueError(f"size {list(self.size)} or resize_shorter is over 8192")
        return self


class ImageInput(Picture):
    """A picture, and the graph input it goes to."""

    input: str


class TextInputs(Part):
    """Graph input names for token ids, mask and type ids."""

    ids: str = "input_ids"
    mask: str | None = "attention_mask"
    types: str | None = None


class TextInput(Part):
    """How the graph wants its text."""

    tokenizer: InsidePath = "tokenizer.json"
    max_tokens: Annotated[int, Field(gt=0, le=8192)] = 512
    inputs: TextInputs = TextInputs()


class ScoresOutput(Part):
    """Which output holds the concepts' scores, and what turns it into probabilities."""

    output: str
    activation: Literal["softmax", "sigmoid", "none"]


class EmbeddingOutput(Part):
    """Which output holds the embedding."""

    output: str
    pooling: Literal["none", "mean", "cls"] = "none"
    normalize: bool = False
