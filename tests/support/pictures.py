"""Image files of many kinds, as bytes; small, and each with content in which a turned or mirrored copy shows."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 12, 8


def rgb_pixels(width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """uint8 (height, width, 3): red grows to the right, green downwards, blue is chequered in blocks of four."""
    y, x = np.mgrid[0:height, 0:width]
    red = x * 255 // max(1, width - 1)
    green = y * 255 // max(1, height - 1)
    blue = ((x // 4 + y // 4) % 2) * 200
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def grey_pixels(width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """uint8 (height, width): a diagonal ramp."""
    y, x = np.mgrid[0:height, 0:width]
    return ((x * 7 + y * 13) % 256).astype(np.uint8)


def deep_pixels(width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint16]:
    """uint16 (height, width): the whole range from 0 to 65535."""
    return np.linspace(0, 65535, width * height).astype(np.uint16).reshape(height, width)


def rgba_pixels(width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """uint8 (height, width, 4): `rgb_pixels`, from transparent on the left to opaque on the right."""
    alpha = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), (height, width))
    return np.dstack([rgb_pixels(width, height), alpha])


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """`image` as a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(width: int = 64, height: int = 48, *, mode: str = "RGB", orientation: int = 0, quality: int = 95) -> bytes:
    """A JPEG of mode RGB, L or CMYK, with an EXIF orientation 1–8 if one is given."""
    image = Image.fromarray(rgb_pixels(width, height)).convert(mode)
    options: dict[str, Any] = {}
    if orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    return encoded(image, "JPEG", quality=quality, subsampling=0, **options)


def png(pixels: NDArray[Any] | None = None) -> bytes:
    """A PNG of these pixels: uint8 (h, w), (h, w, 3), (h, w, 4) or uint16 (h, w); default: `rgb_pixels`."""
    return encoded(Image.fromarray(rgb_pixels() if pixels is None else pixels), "PNG")


def png_palette(*, transparent: bool = True) -> bytes:
    """A PNG with a palette of eight colours, of which the first is transparent if asked for."""
    indices = (np.arange(WIDTH * HEIGHT) % 8).astype(np.uint8).reshape(HEIGHT, WIDTH)
    image = Image.frombytes("P", (WIDTH, HEIGHT), indices.tobytes())
    image.putpalette(palette().tobytes())
    return encoded(image, "PNG", **({"transparency": 0} if transparent else {}))


def palette() -> NDArray[np.uint8]:
    """The colours of `png_palette`, (8, 3)."""
    return np.array([[i * 30, 255 - i * 20, (i * 70) % 256] for i in range(8)], np.uint8)


def bomb(width: int = 100_000, height: int = 100_000) -> bytes:
    """A whole, valid start of a PNG that says it has `width` × `height` pixels, in a few dozen bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def truncated(data: bytes, share: float = 0.5) -> bytes:
    """The first part of a file."""
    return data[: int(len(data) * share)]


def animated_gif() -> bytes:
    """Two frames of one colour each: red, then blue."""
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def multi_page_tiff() -> bytes:
    """Two pages: `rgb_pixels`, then black."""
    pages = [Image.fromarray(rgb_pixels()), Image.new("RGB", (WIDTH, HEIGHT))]
    return encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])


def samples() -> dict[str, bytes]:
    """One small file of every kind that is read, by a name that says what it is."""
    picture = Image.fromarray(rgb_pixels())
    clear = Image.fromarray(rgba_pixels())
    grey = Image.fromarray(grey_pixels())
    deep = Image.fromarray(deep_pixels())
    return {
        "jpeg rgb": jpeg(WIDTH, HEIGHT),
        "jpeg grey": jpeg(WIDTH, HEIGHT, mode="L"),
        "jpeg cmyk": jpeg(WIDTH, HEIGHT, mode="CMYK"),
        "png rgb": png(),
        "png rgba": png(rgba_pixels()),
        "png grey": png(grey_pixels()),
        "png 16-bit grey": png(deep_pixels()),
        "png grey with alpha": encoded(clear.convert("LA"), "PNG"),
        "png 1-bit": encoded(grey.convert("1"), "PNG"),
        "png palette": png_palette(transparent=False),
        "png palette with transparency": png_palette(),
        "webp": encoded(picture, "WEBP", lossless=True),
        "webp with alpha": encoded(clear, "WEBP", lossless=True, exact=True),
        "bmp": encoded(picture, "BMP"),
        "tiff": encoded(picture, "TIFF"),
        "tiff deflate": encoded(picture, "TIFF", compression="tiff_deflate"),
        "tiff 16-bit grey": encoded(deep, "TIFF"),
        "tiff cmyk": encoded(picture.convert("CMYK"), "TIFF"),
        "tiff pages": multi_page_tiff(),
        "gif": encoded(picture.quantize(16), "GIF"),
        "gif animated": animated_gif(),
    }
