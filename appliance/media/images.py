"""Images: bytes to pixels, the header always looked at first.

What a picture will cost is known from its header, so a bomb is refused before a pixel is decoded. Every mode ends as
8-bit RGB or grey the way the file's author saw it: EXIF rotation applied, transparency composited on white, CMYK and
16 bit converted.
"""

import io
import struct
import warnings
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from appliance.core.errors import InputTooLarge, InvalidInput, UnsupportedFormat

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_READS = "JPEG, PNG, WebP, BMP, TIFF or GIF"

# Pillow's own limit warns; ours (pixels, from the header) is the one that counts and comes first.
Image.MAX_IMAGE_PIXELS = None

_LARGEST_WHOLE = 2**22
"""Pixels up to which a picture is resized whole before it is cropped."""

_TELL_ALL_IN_INFO = ("PNG", "GIF", "BMP")
"""Formats of which Pillow keeps what stands beside the pixels in `info`: none there means no orientation either."""

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What a picture says of itself before it is decoded; width and height in pixels.

    Attributes:
        opened: the file, read as far as its header, so that decoding need not begin anew.
    """

    format: str
    width: int
    height: int
    opened: ImageFile.ImageFile = field(repr=False, compare=False)

    @property
    def pixels(self) -> int:
        """Pixels once decoded."""
        return self.width * self.height

    @property
    def decoding_bytes(self) -> int:
        """Memory that decoding takes at its peak: transparency is composited through several 4-byte copies."""
        mode = self.opened.mode
        if mode == "P" or self.opened.has_transparency_data:
            return 16 * self.pixels
        return (8 if mode.startswith(("I", "F")) else 4) * self.pixels


def read_header(data: bytes | memoryview, max_bytes: int, max_pixels: int) -> ImageHeader:
    """Look at the header of an encoded image; nothing is decoded.

    Raises: InvalidInput: empty. InputTooLarge: over `max_bytes` or `max_pixels`. UnsupportedFormat: not an image of
        the formats we read.
    """
    if not data:
        raise InvalidInput(f"The image is empty; send the bytes of a {_READS} file.")
    if len(data) > max_bytes:
        raise InputTooLarge(f"The image has {len(data)} bytes; the limit is {max_bytes} (limits.image_size).")
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise InputTooLarge(
            f"The image has {width} × {height} = {width * height} pixels; the limit is {max_pixels} "
            "(limits.image_pixels). Scale it down."
        )
    if width == 0 or height == 0:
        raise UnsupportedFormat(f"The image is {width} × {height} pixels: there is nothing in it.")
    return ImageHeader(image.format or "", width, height, image)


@dataclass(frozen=True, slots=True)
class ImageRecipe:
    """How a model wants its picture.

    Attributes:
        height, width: pixels of the result.
        color: channel order of the result.
        resize: "stretch" to the size, or "crop": shorter side to `shorter`, then the centre.
        filter: one of Pillow's resampling filters, by name.
    """

    height: int
    width: int
    color: Literal["rgb", "bgr", "grey"]
    resize: Literal["stretch", "crop"]
    shorter: int
    filter: str


def decode_image(source: bytes | memoryview | ImageHeader, recipe: ImageRecipe) -> NDArray[np.uint8]:
    """Decode in full (no scaled JPEG decoding: scores equal the training framework's) and fit to the recipe.

    Args:    source: the file's bytes, or what `read_header` made of them.
    Returns: uint8 (height, width, channels), contiguous; 1 channel for grey, else 3.
    Raises: UnsupportedFormat: the file is broken behind its header.
    """
    image: Image.Image = source.opened if isinstance(source, ImageHeader) else _open(source)
    try:
        image.load()
        if image.mode == "P" and image.palette is None:
            raise ValueError("it has no palette where one belongs")
        if image.info or image.format not in _TELL_ALL_IN_INFO:
            image = ImageOps.exif_transpose(image)
        image = _eight_bit(image, "L" if recipe.color == "grey" else "RGB")
        image = _fit(image, recipe)
    except (OSError, ValueError, SyntaxError, struct.error, IndexError, TypeError, OverflowError) as error:
        # Pillow's decoders raise any of these for broken data; the list grew from fuzzing.
        raise UnsupportedFormat(f"The image is broken: {_reason(error)}. Send a whole {_READS} file.") from error
    # As `np.asarray(image)`, which asks the image many things first.
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if recipe.color == "bgr" else pixels


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels, uint8 (h, w, 3), (h, w, 4) or (h, w, 1), as a PNG file."""
    with io.BytesIO() as target:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(target, format="PNG")
        return target.getvalue()


def ignore_warnings() -> None:
    """Let Pillow's warnings about odd files be: a caller's file is no news for the log, and what is broken raises.

    For the whole process, at its start: changing filters around each decode is not safe between threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


class _Viewed(io.RawIOBase):
    """A file whose bytes lie elsewhere: `BytesIO` would copy them all."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: "memoryview | bytearray") -> int:  # type: ignore[override]  # the stub's type is private
        part = self._data[self._place : self._place + len(target)]
        target[: len(part)] = part
        self._place += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        # Broken pictures ask for places before the first byte; they are answered as `BytesIO` answers them.
        if whence == io.SEEK_SET and offset < 0:
            raise ValueError(f"negative seek value {offset}")
        self._place = max(0, (0, self._place, len(self._data))[whence] + offset)
        return self._place


def _open(data: bytes | memoryview) -> ImageFile.ImageFile:
    file = io.BytesIO(data) if isinstance(data, bytes) else io.BufferedReader(_Viewed(data))
    try:
        return Image.open(file, formats=FORMATS)
    except (OSError, ValueError, SyntaxError, struct.error, IndexError, TypeError, OverflowError) as error:
        raise UnsupportedFormat(f"The bytes are not an image we can read; send a {_READS} file.") from error


def _eight_bit(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    """Any of Pillow's modes as 8-bit grey or RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey arrives as I;16 or I; Pillow's own conversion clips at 255 instead of scaling.
        image = Image.fromarray(_scaled(np.asarray(image), 65535.0 if image.mode.startswith("I") else None))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, coloured).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _scaled(values: NDArray[np.generic], full: float | None) -> NDArray[np.uint8]:
    """Values from 0 to `full` as 0 to 255; `full` None: the largest finite one, at least 1.

    Row by row, as eight-byte intermediates of the whole picture would be many times what its header promised.
    """
    result = np.empty(values.shape, np.uint8)
    if full is None:
        full = max([1.0, *(float(row[np.isfinite(row)].max(initial=1.0)) for row in values)])
    with np.errstate(invalid="ignore"):  # a NaN that signals is one all the same
        for row, target in zip(values, result, strict=True):
            wide = np.nan_to_num(row.astype(np.float64), posinf=full, neginf=0.0)
            target[:] = np.clip(wide * (255.0 / full), 0, 255).round()
    return result


def _fit(image: Image.Image, recipe: ImageRecipe) -> Image.Image:
    resampling = FILTERS[recipe.filter]
    if recipe.resize == "stretch":
        size = (recipe.width, recipe.height)
        return image if image.size == size else image.resize(size, resampling)
    width, height = resized_size(image.size, recipe.shorter)
    left, top = round((width - recipe.width) / 2), round((height - recipe.height) / 2)
    if width * height <= max(_LARGEST_WHOLE, 4 * recipe.shorter**2):
        image = image if image.size == (width, height) else image.resize((width, height), resampling)
        return image.crop((left, top, left + recipe.width, top + recipe.height))
    # Scaling the whole of a 1 × 85,000,000 strip up would eat the memory; what stays is scaled alone. Pillow keeps the
    # box as 32-bit floats, so that pixels may differ by a hair from the way above.
    across, down = image.width / width, image.height / height
    right, bottom = min((left + recipe.width) * across, image.width), min((top + recipe.height) * down, image.height)
    return image.resize((recipe.width, recipe.height), resampling, (left * across, top * down, right, bottom))


def resized_size(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Width and height once the shorter side is `shorter`; the longer one is cut to whole pixels.

    Source: torchvision.transforms.Resize(shorter), so that scores agree with models trained through it.
    """
    width, height = size
    return (shorter, shorter * height // width) if width <= height else (shorter * width // height, shorter)


def _reason(error: Exception) -> str:
    """Pillow's sentence without what it says of our buffers."""
    text = str(error).split("<", 1)[0].strip().rstrip(".")
    return text[:120] or type(error).__name__
