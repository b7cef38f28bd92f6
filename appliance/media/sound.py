"""Sound: WAV files to samples and back. Other formats are a caller's to convert: the platform takes WAV only."""

import io
import wave

import numpy as np
from numpy.typing import NDArray

from appliance.core.errors import InputTooLarge, InvalidInput, UnsupportedFormat

_FULL_SCALE = {1: 2**7, 2: 2**15, 3: 2**23, 4: 2**31}
"""Bytes a sample → what full scale is; 8-bit WAV is unsigned, the others signed (RIFF WAVE, Microsoft 1994)."""

_BROKEN = (wave.Error, EOFError, ValueError, RuntimeError)
"""What the library raises for files that are no WAV; RuntimeError for a chunk that ends beyond the one it stands in."""

_NO_WAV = "The audio is not a WAV file with PCM samples; convert it."


def read_header(data: bytes, max_bytes: int, sample_rate: int) -> int:
    """Look at the header of a WAV file; returns the bytes that decoding takes.

    Raises: InvalidInput: empty, or of another rate. InputTooLarge: over `max_bytes`. UnsupportedFormat: no PCM WAV.
    """
    if not data:
        raise InvalidInput("The audio is empty; send the bytes of a WAV file.")
    if len(data) > max_bytes:
        raise InputTooLarge(f"The audio has {len(data)} bytes; the limit is {max_bytes} (limits.audio_size).")
    with _open(data) as file:
        if file.getframerate() != sample_rate:
            raise InvalidInput(
                f"The audio has {file.getframerate()} samples a second; this model takes {sample_rate}. Resample it."
            )
        if file.getsampwidth() not in _FULL_SCALE or not file.getnchannels():
            raise UnsupportedFormat(f"The audio has {8 * file.getsampwidth()}-bit samples; send 8 to 32-bit PCM.")
    return 16 * len(data)


def decode_wav(data: bytes) -> NDArray[np.float32]:
    """Mono samples, float32 (samples,), full scale 1; channels are averaged. Raises: as `read_header`."""
    with _open(data) as file:
        width, channels = file.getsampwidth(), file.getnchannels()
        if width not in _FULL_SCALE or not channels:
            raise UnsupportedFormat(_NO_WAV)
        try:
            raw = file.readframes(file.getnframes())
        except _BROKEN as error:
            raise UnsupportedFormat("The audio is broken; send a whole WAV file.") from error
    count = len(raw) // (width * channels) * channels
    if width == 3:
        packed = np.frombuffer(raw, np.uint8)[: count * 3].reshape(-1, 3)
        wide = np.zeros((count, 4), np.uint8)
        wide[:, 1:] = packed  # the sign is in the highest byte
        values = wide.view("<i4").reshape(-1).astype(np.float32) / 2**31
    elif width == 1:
        values = (np.frombuffer(raw, np.uint8)[:count].astype(np.float32) - 128) / _FULL_SCALE[1]
    else:
        values = np.frombuffer(raw[: count * width], f"<i{width}").astype(np.float32) / _FULL_SCALE[width]
    mono: NDArray[np.float32] = values.reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return mono


def encode_wav(samples: NDArray[np.float32], sample_rate: int) -> bytes:
    """Mono samples, full scale 1, as a 16-bit WAV file; what is louder is clipped."""
    words = (np.clip(samples, -1.0, 1.0) * (2**15 - 1)).astype("<i2")
    with io.BytesIO() as target:
        with wave.open(target, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(words.tobytes())
        return target.getvalue()


def _open(data: bytes) -> wave.Wave_read:
    try:
        return wave.open(io.BytesIO(data), "rb")
    except _BROKEN as error:
        raise UnsupportedFormat(_NO_WAV) from error
