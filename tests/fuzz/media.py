"""Media files of many kinds, and what may happen to a file on its way: bits flip, ends are lost, headers lie."""

import io
import itertools
import struct
import wave
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from support import pictures

_LIES = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""What a header may say instead of the truth."""

_WORDS = ("the quick brown fox", "ridge regression", "good", "bad model")
_ODD = (
    "",
    " ",
    "\0",
    "\0good\0",
    "\ufeffgood",
    "\u202egood",
    "go\u0301od",
    "g\u200bo\u200do\u00add",
    "\ud7ff\ue000",
    "\U0010ffff" * 40,
    "\ufdd0\ufffe\uffff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 20,
    "a\u0300" * 300,
    "ﷺ" * 50,
    "\u1680\u2028\u2029\x85",
    "x" * 20_000,
    "\n" * 2000,
    "[CLS] [SEP] [PAD] [UNK]",
    "\x1b[31mred",
)


@cache
def pictures_of_all_kinds() -> tuple[bytes, ...]:
    """Small whole pictures: every format that is read, in every mode that Pillow writes."""
    picture = Image.fromarray(pictures.rgb_pixels())
    grey = Image.fromarray(pictures.grey_pixels())
    clear = Image.fromarray(pictures.rgba_pixels())
    blue = Image.new("RGB", picture.size, "blue")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    encoded = pictures.encoded
    more = [
        pictures.jpeg(orientation=6),
        encoded(picture, "JPEG", progressive=True, quality=30, exif=exif.tobytes(), comment=b"a comment"),
        encoded(picture, "PNG", exif=exif.tobytes(), dpi=(72, 72)),
        encoded(picture, "PNG", save_all=True, append_images=[blue], duration=10),
        interlaced_png(),
        encoded(picture, "WEBP", quality=20, exif=exif.tobytes()),
        encoded(picture, "WEBP", save_all=True, append_images=[blue], duration=10),
        encoded(grey.convert("1"), "BMP"),
        encoded(grey, "BMP"),
        encoded(picture.quantize(4), "BMP"),
        encoded(clear, "BMP"),
        *(encoded(picture, "TIFF", compression=how) for how in ("tiff_lzw", "packbits", "jpeg", "tiff_adobe_deflate")),
        encoded(grey.convert("1"), "TIFF", compression="group4"),
        encoded(grey.convert("F"), "TIFF"),
        encoded(clear, "TIFF", exif=exif.tobytes()),
        encoded(picture.quantize(16), "GIF", interlace=1, comment=b"a comment"),
        encoded(grey, "GIF", transparency=3),
    ]
    return (*pictures.samples().values(), *more)


def interlaced_png(width: int = 8, height: int = 8) -> bytes:
    """A grey PNG in seven passes, which Pillow reads and does not write (PNG specification, 8.2)."""
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    pixels = pictures.grey_pixels(width, height)
    rows = b"".join(
        b"\0" + row.tobytes() for top, down, left, right in passes for row in pixels[top::down, left::right] if row.size
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@cache
def sounds_of_all_kinds() -> tuple[bytes, ...]:
    """Short WAV files: 8 to 32 bits, mono and stereo, of 16 kHz and of another rate; one of floats, one of nothing."""
    made = []
    for width, channels, rate, count in (
        (1, 1, 16000, 40),
        (2, 1, 16000, 40),
        (2, 2, 16000, 40),
        (3, 1, 16000, 40),
        (4, 1, 16000, 40),
        (2, 1, 44100, 40),
        (2, 1, 16000, 0),
    ):
        with io.BytesIO() as target:
            with wave.open(target, "wb") as file:
                file.setnchannels(channels)
                file.setsampwidth(width)
                file.setframerate(rate)
                file.writeframes(bytes(range(256))[: count * width * channels].ljust(count * width * channels, b"\1"))
            made.append(target.getvalue())
    samples = np.linspace(-2, 2, 40, dtype="<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return (*made, b"RIFF" + struct.pack("<I", len(body)) + body)


@dataclass(frozen=True)
class Harm:
    """One thing that happens to a file; places and sizes are taken modulo what there is."""

    kind: str
    where: int
    what: int
    other: bytes = b""

    def __call__(self, data: bytes) -> bytes:
        """The file afterwards."""
        if not data:
            return self.other
        place = self.where % len(data)
        match self.kind:
            case "flip":
                return data[:place] + bytes([data[place] ^ (1 << self.what % 8)]) + data[place + 1 :]
            case "cut":
                return data[:place]
            case "lose":
                return data[:place] + data[place + 1 + self.what % 64 :]
            case "double":
                return data[: place + 1 + self.what % 64] + data[place:]
            case "put":
                return data[:place] + self.other + data[place:]
            case "join":
                return data + self.other
            case "lie":
                return self._lie(data, place)
            case _:
                return self._shuffle(data)

    def _lie(self, data: bytes, place: int) -> bytes:
        """Overwrite a number, of 1, 2 or 4 bytes, near the start, where headers have sizes and counts."""
        place %= 96
        width = (1, 2, 4)[self.what % 3]
        value = _LIES[self.what // 3 % len(_LIES)] & ((1 << 8 * width) - 1)
        order: str = ("little", "big")[self.what // 60 % 2]
        return data[:place] + value.to_bytes(width, order) + data[place + width :]  # type: ignore[arg-type]

    def _shuffle(self, data: bytes) -> bytes:
        """Swap two pieces: those that the format has, as far as it is one with chunks."""
        pieces = chunks(data)
        one, two = self.where % len(pieces), self.what % len(pieces)
        pieces[one], pieces[two] = pieces[two], pieces[one]
        return b"".join(pieces)


def chunks(data: bytes) -> list[bytes]:
    """A file in pieces: chunks of PNG and RIFF, markers of JPEG, else slices of equal length."""
    if data.startswith(b"\x89PNG"):
        cuts, place = [0, 8], 8
        while place + 12 <= len(data):
            place += 12 + int.from_bytes(data[place : place + 4], "big")
            cuts.append(place)
    elif data.startswith(b"RIFF"):
        cuts, place = [0, 12], 12
        while place + 8 <= len(data):
            place += 8 + int.from_bytes(data[place + 4 : place + 8], "little")
            cuts.append(place)
    elif data.startswith(b"\xff\xd8"):
        cuts = [0, *(i for i in range(2, len(data) - 1) if data[i] == 0xFF and data[i + 1] >= 0xC0)]
    else:
        cuts = list(range(0, len(data), max(1, len(data) // 8)))
    cuts = [*(cut for cut in dict.fromkeys(cuts) if cut < len(data)), len(data)]
    return [data[one:two] for one, two in itertools.pairwise(cuts)] or [data]


_KINDS = ("flip", "cut", "lose", "double", "put", "join", "lie", "shuffle")


def harms(*kinds: str) -> st.SearchStrategy[Harm]:
    """Anything that may happen, or only these kinds."""
    other = st.one_of(st.binary(max_size=16), st.sampled_from(pictures_of_all_kinds()))
    return st.builds(Harm, st.sampled_from(kinds or _KINDS), st.integers(0, 2**20), st.integers(0, 2**12), other)


@st.composite
def harmed(draw: st.DrawFn, files: tuple[bytes, ...]) -> bytes:
    """One of the files after one or more harms; now and then none."""
    data = draw(st.sampled_from(files))
    for harm in draw(st.lists(harms(), max_size=4)):
        data = harm(data)
    return data


def harmed_pictures() -> st.SearchStrategy[bytes]:
    """Pictures that may be broken."""
    return harmed(pictures_of_all_kinds())


def harmed_sounds() -> st.SearchStrategy[bytes]:
    """WAV files that may be broken."""
    return harmed(sounds_of_all_kinds())


def texts() -> st.SearchStrategy[str]:
    """Texts, odd ones included; each can be written as UTF-8."""
    odd = st.sampled_from((*_WORDS, *_ODD))
    return st.one_of(odd, st.text(max_size=60), st.builds("".join, st.lists(odd, max_size=4)))
