"""The digits bundle's pictures: scikit-learn's handwritten digits, and the one split everybody uses.

1797 scans of 8×8 pixels with 17 levels, white ink on black (Alpaydin and Kaynak, "Optical Recognition of Handwritten
Digits", UCI Machine Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0; the copy inside scikit-learn).
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT = 360
"""The last 360 of the 1797 scans are held out: people wrote them in runs, so a cut is a harder test than a shuffle."""

INK_LEVELS = 16
"""The scans count ink from 0 to 16; as a picture, 16 is white (255)."""


def scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return all (pictures, labels) in the data set's order: uint8 (1797, 8, 8) grey levels, int64 (1797,)."""
    digits = load_digits()
    return np.round(digits.images * (255 / INK_LEVELS)).astype(np.uint8), digits.target.astype(np.int64)


def training() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the (pictures, labels) the model is fitted to."""
    pictures, labels = scans()
    return pictures[:-HELD_OUT], labels[:-HELD_OUT]


def held_out() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the (pictures, labels) the model never sees; sample `held-out-017-…` is number 17 of these."""
    pictures, labels = scans()
    return pictures[-HELD_OUT:], labels[-HELD_OUT:]


def enlarged(picture: NDArray[np.uint8], size: int) -> Image.Image:
    """Return a scan as a grey picture of size × size pixels, each scan pixel a square."""
    return Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)


def encoded(image: Image.Image, format: str) -> bytes:
    """Return the picture as a file: "PNG", or "JPEG" of quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 90} if format == "JPEG" else {}))
    return buffer.getvalue()


def model_input(file: bytes) -> NDArray[np.float32]:
    """Return what config.yaml's `image` section makes of a picture file: float32 (1, 8, 8) in -1..1.

    This is the reference for that section in Pillow and numpy, used to measure and to test the model.
    """
    grey = Image.open(io.BytesIO(file)).convert("L").resize((8, 8), Image.Resampling.BOX)
    return ((np.asarray(grey, dtype=np.float32) / 255 - 0.5) / 0.5)[None]
