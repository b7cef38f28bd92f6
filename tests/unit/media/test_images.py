"""Images: whatever the file, the pixels are what its author saw; and its header is believed before it is decoded.

The references here are computed with plain Pillow and numpy on paths of their own, not with the code under test.
"""

import io
import resource
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support import pictures

from appliance.core.errors import InputError, InputTooLarge, InvalidInput, UnsupportedFormat
from appliance.media import images
from appliance.media.images import ImageRecipe, decode_image, read_header

MAX_BYTES = 20 * 2**20
MAX_PIXELS = 85_000_000
H, W = pictures.HEIGHT, pictures.WIDTH


def recipe(
    height: int = H,
    width: int = W,
    *,
    color: str = "rgb",
    resize: str = "stretch",
    shorter: int = 0,
    filter: str = "bilinear",
) -> ImageRecipe:
    return ImageRecipe(height, width, color, resize, shorter or max(height, width), filter)  # type: ignore[arg-type]


def decoded(data: bytes, *, color: str = "rgb", height: int = H, width: int = W) -> NDArray[np.uint8]:
    read_header(data, MAX_BYTES, MAX_PIXELS)
    return decode_image(data, recipe(height, width, color=color))


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What a person sees of it on paper, (h, w, 3)."""
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def luma(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """ITU-R 601 luma, (h, w, 1)."""
    return (rgb.astype(float) @ [0.299, 0.587, 0.114])[..., None]


# ---- formats and modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(pictures.samples()))
def test_every_kind_is_read_and_its_header_tells_its_size(kind: str) -> None:
    data = pictures.samples()[kind]
    header = read_header(data, MAX_BYTES, MAX_PIXELS)
    assert (header.width, header.height, header.pixels) == (W, H, W * H)
    assert header.format in images.FORMATS
    for color, channels in (("rgb", 3), ("bgr", 3), ("grey", 1)):
        pixels = decoded(data, color=color)
        assert pixels.shape == (H, W, channels)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
    assert np.array_equal(decoded(data, color="bgr"), decoded(data)[:, :, ::-1])


@pytest.mark.parametrize("kind", ["png rgb", "webp", "bmp", "tiff", "tiff deflate", "tiff pages"])
def test_lossless_colour_is_exact(kind: str) -> None:
    assert np.array_equal(decoded(pictures.samples()[kind]), pictures.rgb_pixels())


def test_a_jpeg_is_decoded_in_full() -> None:
    data = pictures.jpeg(64, 48)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decoded(data, height=48, width=64), expected)
    assert np.abs(expected.astype(int) - pictures.rgb_pixels(64, 48)).max() < 40


def test_a_large_jpeg_shrunk_much_is_not_decoded_at_a_smaller_scale() -> None:
    """Pillow's draft mode would be faster, and change scores."""
    data = pictures.jpeg(800, 600, quality=80)
    expected = Image.open(io.BytesIO(data)).convert("RGB").resize((20, 15), Image.Resampling.BILINEAR)
    assert np.array_equal(decoded(data, height=15, width=20), np.asarray(expected))


def test_a_cmyk_jpeg_looks_like_the_picture_it_was_made_of() -> None:
    data = pictures.jpeg(64, 48, mode="CMYK", quality=100)
    assert np.abs(decoded(data, height=48, width=64).astype(int) - pictures.rgb_pixels(64, 48)).max() <= 12


def test_grey_of_a_colour_picture_is_its_luma() -> None:
    assert np.abs(decoded(pictures.png(), color="grey") - luma(pictures.rgb_pixels())).max() <= 1


def test_colour_of_a_grey_picture_is_the_grey_three_times() -> None:
    assert np.array_equal(
        decoded(pictures.png(pictures.grey_pixels())), np.repeat(pictures.grey_pixels()[:, :, None], 3, axis=2)
    )
    assert np.array_equal(decoded(pictures.png(pictures.grey_pixels()), color="grey")[:, :, 0], pictures.grey_pixels())


@pytest.mark.parametrize("kind", ["png 16-bit grey", "tiff 16-bit grey"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    expected = np.round(pictures.deep_pixels() / 257)
    pixels = decoded(pictures.samples()[kind], color="grey")[:, :, 0]
    assert np.abs(pixels - expected).max() <= 1
    assert (pixels[0, 0], pixels[-1, -1]) == (0, 255)
    assert len(np.unique(pixels)) > 80
    assert np.array_equal(decoded(pictures.samples()[kind])[:, :, 0], pixels)


def test_sixteen_bits_in_big_endian_order_are_the_same_picture() -> None:
    big = Image.frombytes("I;16B", (W, H), pictures.deep_pixels().astype(">u2").tobytes())
    little = Image.frombytes("I;16", (W, H), pictures.deep_pixels().astype("<u2").tobytes())
    assert np.array_equal(
        decoded(pictures.encoded(big, "TIFF"), color="grey"), decoded(pictures.encoded(little, "TIFF"), color="grey")
    )


def test_floating_point_pictures_are_scaled_by_their_brightest_pixel() -> None:
    values = np.linspace(0, 1000, W * H, dtype=np.float32).reshape(H, W)
    pixels = decoded(pictures.encoded(Image.fromarray(values), "TIFF"), color="grey")[:, :, 0]
    assert np.abs(pixels - values * 255 / 1000).max() <= 1


def test_floating_point_pictures_in_the_unit_range_are_not_black() -> None:
    values = np.linspace(0, 1, W * H, dtype=np.float32).reshape(H, W)
    assert decoded(pictures.encoded(Image.fromarray(values), "TIFF"), color="grey").max() == 255


_SIGNALS = np.uint32(0x7FA00000).view(np.float32)
"""A NaN that signals, which arithmetic tells of."""


@pytest.mark.parametrize("odd", [np.nan, _SIGNALS, np.inf, -np.inf, -1e30])
def test_a_floating_point_picture_with_odd_values_is_still_a_picture(odd: np.floating) -> None:
    values = np.full((H, W), 0.5, np.float32)
    values.view(np.uint32)[0, 0] = np.float32(odd).view(np.uint32)
    pixels = decoded(pictures.encoded(Image.fromarray(values), "TIFF"), color="grey")[:, :, 0]
    assert pixels[0, 0] in (0, 255)
    assert len(np.unique(pixels[1:])) == 1


def test_one_bit_is_black_and_white() -> None:
    bits = np.asarray(Image.fromarray(pictures.grey_pixels()).convert("1"))
    assert np.array_equal(decoded(pictures.samples()["png 1-bit"], color="grey")[:, :, 0], bits * 255)


# ---- transparency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png rgba", "webp with alpha"])
def test_transparency_is_composited_on_white(kind: str) -> None:
    pixels = decoded(pictures.samples()[kind])
    assert np.abs(pixels - on_white(pictures.rgba_pixels())).max() <= 1
    assert np.all(pixels[:, 0] == 255)


def test_transparent_grey_is_composited_on_white() -> None:
    grey = np.asarray(Image.fromarray(pictures.rgba_pixels()).convert("LA"))
    rgba = np.dstack([np.repeat(grey[..., :1], 3, axis=2), grey[..., 1:]])
    assert np.abs(decoded(pictures.samples()["png grey with alpha"]) - on_white(rgba)).max() <= 1


def test_transparency_counts_for_grey_models_too() -> None:
    expected = luma(on_white(pictures.rgba_pixels()).round().astype(np.uint8))
    assert np.abs(decoded(pictures.png(pictures.rgba_pixels()), color="grey") - expected).max() <= 1


def test_a_transparent_palette_colour_is_white() -> None:
    indices = (np.arange(W * H) % 8).reshape(H, W)
    assert np.array_equal(decoded(pictures.png_palette(transparent=False)), pictures.palette()[indices])
    colours = pictures.palette().copy()
    colours[0] = 255
    assert np.array_equal(decoded(pictures.png_palette()), colours[indices])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_colour_that_a_png_declares_transparent_is_white(mode: str) -> None:
    pixels = pictures.grey_pixels() if mode == "L" else pictures.rgb_pixels()
    clear = int(pixels[0, 0]) if mode == "L" else tuple(map(int, pixels[0, 0]))
    data = pictures.encoded(Image.fromarray(pixels), "PNG", transparency=clear)
    expected = np.asarray(Image.fromarray(pixels).convert("RGB")).copy()
    expected[(pixels == clear) if mode == "L" else (pixels == clear).all(axis=2)] = 255
    assert np.array_equal(decoded(data), expected)


# ---- orientation -----------------------------------------------------------------------------------------------------

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""What the eight EXIF orientations mean for the stored pixels (JEITA CP-3451, tag 0x0112)."""


@pytest.mark.parametrize("orientation", list(TURNS))
def test_exif_orientation_is_applied(orientation: int) -> None:
    data = pictures.jpeg(64, 48, orientation=orientation)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    expected = TURNS[orientation](stored)
    height, width = expected.shape[:2]
    assert np.array_equal(decoded(data, height=height, width=width), expected)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_whatever_the_format(form: str) -> None:
    """Formats keep it in different places; the files without any are the ones that are not looked at twice."""
    stored = pictures.rgb_pixels(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(stored).save(file, form, exif=exif, lossless=True)
    assert np.array_equal(decoded(file.getvalue(), height=6, width=4), np.rot90(stored, -1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_let_be(orientation: int) -> None:
    plain = decoded(pictures.jpeg(64, 48), height=48, width=64)
    assert np.array_equal(decoded(pictures.jpeg(64, 48, orientation=orientation), height=48, width=64), plain)


# ---- animations and pages --------------------------------------------------------------------------------------------


def test_of_an_animation_the_first_frame_is_taken() -> None:
    assert np.array_equal(decoded(pictures.animated_gif())[0, 0], [255, 0, 0])


# ---- refused before decoding -----------------------------------------------------------------------------------------


def test_nothing_is_said_to_be_empty() -> None:
    with pytest.raises(InvalidInput, match="empty"):
        read_header(b"", MAX_BYTES, MAX_PIXELS)


@pytest.mark.parametrize(
    "data",
    [
        b"hello, this is text",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"RIFF\0\0\0\0WEBP",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\0" * 1000,
    ],
)
def test_what_is_not_an_image_we_read_is_said_to_be_so(data: bytes) -> None:
    with pytest.raises(UnsupportedFormat, match="JPEG, PNG, WebP, BMP, TIFF or GIF"):
        read_header(data, MAX_BYTES, MAX_PIXELS)


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "SGI"])
def test_other_formats_that_pillow_knows_are_not_opened(kind: str) -> None:
    data = pictures.encoded(Image.fromarray(pictures.rgb_pixels()), kind)
    with pytest.raises(UnsupportedFormat):
        read_header(data, MAX_BYTES, MAX_PIXELS)


def test_too_many_bytes_are_refused_with_both_numbers() -> None:
    with pytest.raises(InputTooLarge, match=r"101 bytes; the limit is 100 \(limits.image_size\)"):
        read_header(b"x" * 101, 100, MAX_PIXELS)


def test_a_bomb_is_refused_by_its_header_with_the_limit_and_no_memory() -> None:
    data = pictures.bomb()
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputTooLarge, match=r"100000 × 100000 = 10000000000 pixels; the limit is 85000000"):
        read_header(data, MAX_BYTES, MAX_PIXELS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("size", [(9220, 9220), (85_000_001, 1), (1, 85_000_001)])
def test_one_pixel_over_the_limit_is_too_many(size: tuple[int, int]) -> None:
    with pytest.raises(InputTooLarge):
        read_header(pictures.bomb(*size), MAX_BYTES, MAX_PIXELS)
    assert read_header(pictures.bomb(*size), MAX_BYTES, size[0] * size[1]).pixels == size[0] * size[1]


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedFormat):
        read_header(pictures.bomb(*size), MAX_BYTES, MAX_PIXELS)


def test_a_header_that_promises_more_than_there_is_is_broken() -> None:
    """The pixels that a short file claims are never made up."""
    data = pictures.bomb(2000, 2000)
    assert read_header(data, MAX_BYTES, MAX_PIXELS).pixels == 4_000_000
    with pytest.raises(UnsupportedFormat, match="broken"):
        decode_image(data, recipe())


@pytest.mark.parametrize("kind", ["jpeg rgb", "png rgb", "webp", "bmp", "gif", "tiff"])
def test_a_truncated_file_is_broken_and_not_half_grey(kind: str) -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    name = kind.split()[0].upper()
    data = pictures.truncated(pictures.encoded(large, name), 0.6)
    with pytest.raises(UnsupportedFormat):
        decoded(data)


@pytest.mark.parametrize("kind", sorted(pictures.samples()))
def test_a_file_in_the_midst_of_a_request_is_decoded_where_it_lies(kind: str) -> None:
    """Every format; what stands around it does not show."""
    file = pictures.samples()[kind]
    lying = memoryview(b"before" + file + b"behind")[6:-6]
    header = read_header(lying, MAX_BYTES, MAX_PIXELS)
    assert header == read_header(file, MAX_BYTES, MAX_PIXELS)
    wanted = decode_image(file, recipe())
    for source in (header, lying):
        np.testing.assert_array_equal(decode_image(source, recipe()), wanted)


def test_a_large_file_in_a_request_is_not_copied() -> None:
    """A picture that is over long before the file is."""
    file = pictures.png(np.zeros((8, 8, 3), np.uint8))
    body = memoryview(file + bytes(16 * 2**20))
    tracemalloc.start()
    decode_image(read_header(body, MAX_BYTES, MAX_PIXELS), recipe(16, 16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("transparent", [False, True])
def test_a_picture_whose_palette_comes_after_its_pixels_is_broken(transparent: bool) -> None:
    """Found by fuzzing. PNG wants PLTE before IDAT, and Pillow looks for it there."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 3, 0, 0, 0)),
        *([(b"tRNS", b"\0")] if transparent else []),
        (b"IDAT", zlib.compress(b"\0\0\1")),
        (b"PLTE", bytes(6)),
        (b"IEND", b""),
    ]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    with pytest.raises(UnsupportedFormat, match="broken: it has no palette"):
        decoded(data)


def test_the_sentence_about_a_broken_file_does_not_show_our_buffers() -> None:
    with pytest.raises(UnsupportedFormat) as caught:
        decode_image(pictures.truncated(pictures.jpeg(64, 48)), recipe())
    assert "0x" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)
    with pytest.raises(UnsupportedFormat) as caught:
        decode_image(memoryview(b"no picture"), recipe())
    assert "Reader" not in str(caught.value)


# ---- fitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(images.FILTERS))
def test_stretching_is_pillows_resize_with_that_filter(name: str) -> None:
    pixels = pictures.rgb_pixels(40, 30)
    expected = Image.fromarray(pixels).resize((16, 24), images.FILTERS[name])
    assert np.array_equal(decode_image(pictures.png(pixels), recipe(24, 16, filter=name)), np.asarray(expected))


def torchvision_rule(
    pixels: NDArray[np.uint8], height: int, width: int, shorter: int, filter: int
) -> NDArray[np.uint8]:
    """Resize(shorter) then CenterCrop((height, width)), as torchvision documents and computes them on Pillow images.

    Source: torchvision.transforms.functional: `_compute_resized_output_size` (long side int(size * long / short)) and
    `center_crop` (top = int(round((h - ch) / 2.0))).
    """
    h, w = pixels.shape[:2]
    short, long = (w, h) if w <= h else (h, w)
    new_long = int(shorter * long / short)
    size = (shorter, new_long) if w <= h else (new_long, shorter)
    image = Image.fromarray(pixels)
    if (w, h) != size:
        image = image.resize(size, Image.Resampling(filter))
    top, left = round((size[1] - height) / 2.0), round((size[0] - width) / 2.0)
    return np.asarray(image.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (40, 30),
        (30, 40),
        (33, 33),
        (31, 37),
        (37, 31),
        (32, 32),
        (64, 21),
        (99, 100),
        (8, 9),
        (9, 8),
        (200, 30),
        (30, 500),
        (33, 1000),
    ],
)
@pytest.mark.parametrize(("out", "shorter"), [((16, 16), 20), ((24, 24), 24), ((15, 22), 33), ((16, 16), 32)])
@pytest.mark.parametrize("name", ["bilinear", "bicubic", "nearest"])
def test_cropping_is_torchvisions_resize_and_centre_crop(
    width: int, height: int, out: tuple[int, int], shorter: int, name: str
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    expected = torchvision_rule(pixels, *out, shorter, images.FILTERS[name])
    actual = decode_image(pictures.png(pixels), recipe(*out, resize="crop", shorter=shorter, filter=name))
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02  # a rounding in the last bit here and there


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 600))
@example(3, 1024, 256)
def test_the_longer_side_after_resizing_is_torchvisions(width: int, height: int, shorter: int) -> None:
    short, long = min(width, height), max(width, height)
    assert max(images.resized_size((width, height), shorter)) == max(shorter, int(shorter * long / short))
    assert min(images.resized_size((width, height), shorter)) == shorter


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 60_000), (1, 1)])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
@pytest.mark.parametrize("name", ["bilinear", "lanczos", "nearest"])
def test_an_extreme_shape_takes_little_memory_and_time(size: tuple[int, int], resize: str, name: str) -> None:
    """Scaling a 1 × 60,000 strip until its shorter side is 256 would make 3.9 gigapixels."""
    data = pictures.png(np.full((size[1], size[0], 3), 90, np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    pixels = decode_image(data, recipe(224, 224, resize=resize, shorter=256, filter=name))
    assert time.perf_counter() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB
    assert pixels.shape == (224, 224, 3)
    assert np.all(pixels == 90)


def test_a_sixteen_bit_picture_takes_little_more_memory_than_its_pixels() -> None:
    """The budget reserves four bytes a pixel; eight-byte intermediates would be many times that."""
    side = 2000
    data = pictures.png(np.zeros((side, side), np.uint16))
    tracemalloc.start()
    decode_image(data, recipe(16, 16, color="grey"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * side * side


# ---- bytes of any kind -----------------------------------------------------------------------------------------------

SEEDS = list(pictures.samples().values())


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    st.integers(0, 10_000),
    st.binary(max_size=12),
)
@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_files_decode_or_are_the_callers_fault(
    seed: bytes, changes: list[tuple[int, int]], cut: int, inserted: bytes
) -> None:
    """Whatever the bytes, the outcome is a picture of the asked size or an InputError; nothing else is ever raised.

    And it is the same where the file lies in the midst of other bytes.
    """
    data = bytearray(seed)
    for place, value in changes:
        data[place % len(data)] = value
    if inserted:
        place = cut % len(data)
        data[place : place + len(inserted)] = inserted
    elif cut % 3 == 0:
        del data[cut % len(data) :]
    outcomes = []
    for file in (bytes(data), memoryview(b"before" + data + b"behind")[6:-6]):
        try:
            header = read_header(file, MAX_BYTES, 10_000_000)
            pixels = decode_image(header, recipe(6, 5, color="grey" if cut % 2 else "rgb"))
        except InputError as error:
            outcomes.append(str(error))
        else:
            assert pixels.shape == (6, 5, 1 if cut % 2 else 3)
            outcomes.append(pixels.tobytes())
    assert outcomes[0] == outcomes[1]


@given(
    st.binary(max_size=200),
    st.sampled_from(
        [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"RIFF\x10\0\0\0WEBP", b""]
    ),
)
@settings(max_examples=300)
def test_made_up_files_are_the_callers_fault(tail: bytes, start: bytes) -> None:
    try:
        read_header(start + tail, MAX_BYTES, 1_000_000)
        decode_image(start + tail, recipe(4, 4))
    except InputError:
        pass


def test_a_tiff_whose_directory_points_at_itself_ends() -> None:
    data = (
        b"II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<H", 1)
        + struct.pack("<HHII", 256, 3, 1, 4)
        + struct.pack("<I", 8)
    )
    with pytest.raises(InputError):
        decoded(data)


@pytest.mark.parametrize(("width", "height"), [(40, 12_000), (9_000, 30)])
def test_the_middle_of_a_very_long_picture_is_what_resizing_all_of_it_gives(width: int, height: int) -> None:
    smooth = (np.sin(np.arange(height)[:, None] / 15) + np.cos(np.arange(width)[None] / 11) + 2) * 60
    pixels = np.repeat(smooth.astype(np.uint8)[:, :, None], 3, axis=2)
    expected = torchvision_rule(pixels, 224, 224, 256, Image.Resampling.BILINEAR)
    actual = decode_image(pictures.png(pixels), recipe(224, 224, resize="crop", shorter=256))
    assert np.abs(actual.astype(int) - expected).max() <= 2


def test_images_are_decoded_in_many_threads_at_once() -> None:
    data = list(pictures.samples().values()) * 8
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(decoded, data))
    assert all(np.array_equal(one, decoded(each)) for one, each in zip(together, data, strict=True))
