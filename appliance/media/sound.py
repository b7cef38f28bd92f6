"""Sound: WAV files to samples and back. Other formats are a caller's to convert: the platform takes WAV only.

Source of the format: Microsoft and IBM, Multimedia Programming Interface and Data Specifications 1.0 (1991), chapter 3;
Microsoft, WAVEFORMATEXTENSIBLE.
"""

import io
import struct
import wave
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import InputTooLarge, InvalidInput, UnsupportedFormat

_PCM = 1
_EXTENSIBLE = 0xFFFE
_CHUNKS = 256
"""Chunks before the samples; a file of millions of empty ones would keep a thread busy for seconds."""


@dataclass(frozen=True, slots=True)
class _Wav:
    """What a header says; `width` is bytes a sample, the samples lie from `start` to `end`."""

    rate: int
    channels: int
    width: int
    start: int
    end: int


def read_header(data: bytes, max_bytes: int, sample_rate: int) -> int:
    """Look at the header of a WAV file; returns the bytes that decoding takes.

    Raises: InvalidInput: empty, or of another rate. InputTooLarge: over `max_bytes`. UnsupportedFormat: no PCM WAV.
    """
    if not data:
        raise InvalidInput("The audio is empty; send the bytes of a WAV file.")
    if len(data) > max_bytes:
        raise InputTooLarge(f"The audio has {len(data)} bytes; the limit is {max_bytes} (limits.audio_size).")
    header = _read(data)
    if header.rate != sample_rate:
        raise InvalidInput(
            f"The audio has {header.rate} samples a second; this model takes {sample_rate}. Resample it."
        )
    return 16 * len(data)


def decode_wav(data: bytes) -> NDArray[np.float32]:
    """Mono samples, float32 (samples,), full scale 1; channels are averaged. Raises: UnsupportedFormat: no PCM WAV."""
    header = _read(data)
    width, channels = header.width, header.channels
    raw = memoryview(data)[header.start : header.end]
    count = len(raw) // (width * channels) * channels  # a last frame that is cut short is left out
    raw = raw[: count * width]
    if width == 1:  # 8-bit WAV is unsigned, the others signed
        words, full = np.frombuffer(raw, np.uint8).astype(np.float32) - 128, 2**7
    elif width == 3:
        wide = np.zeros((count, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)  # the sign is in the highest byte
        words, full = wide.view("<i4").reshape(-1).astype(np.float32), 2**31
    else:
        words, full = np.frombuffer(raw, f"<i{width}").astype(np.float32), 2 ** (8 * width - 1)
    mono: NDArray[np.float32] = words.reshape(-1, channels).mean(axis=1, dtype=np.float32) / np.float32(full)
    return mono


def encode_wav(samples: NDArray[np.float32], sample_rate: int) -> bytes:
    """Mono samples, full scale 1, as a 16-bit WAV file; what is louder is clipped."""
    words = np.rint(np.clip(samples, -1.0, 1.0) * (2**15 - 1)).astype("<i2")
    with io.BytesIO() as target:
        with wave.open(target, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(words.tobytes())
        return target.getvalue()


def _read(data: bytes) -> _Wav:
    """Find format and samples. Raises: UnsupportedFormat."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise UnsupportedFormat("The audio is not a WAV file; convert it to WAV with PCM samples.")
    place, found = 12, None
    for _ in range(_CHUNKS):
        if place + 8 > len(data):
            break
        name, (size,) = data[place : place + 4], struct.unpack_from("<I", data, place + 4)
        place += 8
        if name == b"fmt ":
            found = _format(data[place : place + min(size, 40)])
        elif name == b"data" and found:
            # Recorders that stream write no length, or a wrong one: what is there counts.
            return _Wav(*found, place, min(place + size, len(data)))
        place += size + size % 2
    raise UnsupportedFormat("The audio is a WAV file without samples, or cut short; send the whole file.")


def _format(chunk: bytes) -> tuple[int, int, int]:
    """Samples a second, channels, bytes a sample. Raises: UnsupportedFormat."""
    if len(chunk) < 16:
        raise UnsupportedFormat("The audio is a WAV file whose format is cut short; send the whole file.")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == _EXTENSIBLE and len(chunk) >= 26:
        (kind,) = struct.unpack_from("<H", chunk, 24)
    if kind != _PCM or bits not in (8, 16, 24, 32) or not channels or not rate:
        raise UnsupportedFormat(
            f"The audio is a WAV file of format {kind} with {bits}-bit samples; send PCM (format 1) of 8, 16, 24 or 32."
        )
    return rate, channels, bits // 8
