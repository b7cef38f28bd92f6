"""WAV files become samples, and samples WAV files; what is no PCM WAV is refused with what to do."""

import io
import struct
import time
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import InputError, InputTooLarge, InvalidInput, UnsupportedFormat
from appliance.media import sound

LEVELS = np.array([0.0, 0.5, -0.5, 0.25, -1.0], np.float64)
FULL = {1: 2**7, 2: 2**15, 3: 2**23, 4: 2**31}


def pcm(levels: np.ndarray, width: int) -> bytes:
    """Samples as a WAV file holds them."""
    numbers = [int(level * FULL[width]) + (128 if width == 1 else 0) for level in levels]
    return b"".join(number.to_bytes(width, "little", signed=width > 1) for number in numbers)


def wav(raw: bytes, width: int = 2, channels: int = 1, rate: int = 16000) -> bytes:
    with io.BytesIO() as target:
        with wave.open(target, "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(width)
            file.setframerate(rate)
            file.writeframes(raw)
        return target.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def riff(*chunks: bytes) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_each_width_have_full_scale_one(width: int) -> None:
    data = wav(pcm(LEVELS, width), width)
    assert sound.read_header(data, 10**6, 16000) > 0
    samples = sound.decode_wav(data)
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, LEVELS)


def test_channels_are_averaged() -> None:
    samples = sound.decode_wav(wav(pcm(np.array([0.5, -0.5, 0.25, 0.75]), 2), channels=2))
    np.testing.assert_array_equal(samples, [0.0, 0.5])


def test_the_extensible_format_is_read() -> None:
    """What many tools write for 24 bits and for more than two channels."""
    raw = pcm(LEVELS, 3)
    extension = struct.pack("<HHIH14s", 22, 24, 4, 1, b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71")
    form = struct.pack("<HHIIHH", 0xFFFE, 1, 16000, 48000, 3, 24) + extension
    data = riff(chunk(b"LIST", b"odd"), chunk(b"fmt ", form), chunk(b"data", raw))
    np.testing.assert_array_equal(sound.decode_wav(data), LEVELS)


def test_a_recording_without_a_length_is_read_to_its_end() -> None:
    data = bytearray(wav(pcm(LEVELS, 2)))
    data[40:44] = b"\xff\xff\xff\xff"
    np.testing.assert_array_equal(sound.decode_wav(bytes(data)), LEVELS)


def test_a_frame_that_is_cut_short_is_left_out() -> None:
    data = wav(pcm(np.array([0.5, 0.5, 0.5, 0.5]), 2), channels=2)
    assert len(sound.decode_wav(data[:-1])) == 1


def test_what_is_written_is_read_again() -> None:
    samples = np.linspace(-1, 1, 101, dtype=np.float32)
    data = sound.encode_wav(np.concatenate([samples, [3.0, -3.0]]), 8000)
    sound.read_header(data, 10**6, 8000)
    read = sound.decode_wav(data)
    np.testing.assert_allclose(read[:-2], samples, atol=1e-4)
    np.testing.assert_allclose(read[-2:], [1, -1], atol=1e-4)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", InvalidInput, "is empty"),
        (wav(b"\0\0" * 600), InputTooLarge, "limits.audio_size"),
        (wav(b"\0\0", rate=8000), InvalidInput, "8000 samples a second; this model takes 16000. Resample it"),
        (b"ID3\x03 an MP3", UnsupportedFormat, "is not a WAV file"),
        (wav(b"\0\0")[:20], UnsupportedFormat, "cut short"),
        (wav(b"\0\0")[:36], UnsupportedFormat, "without samples"),
        (riff(chunk(b"fmt ", b"\1\0")), UnsupportedFormat, "cut short"),
        (riff(chunk(b"fmt ", struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32))), UnsupportedFormat, "of format 3"),
        (riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16000, 48000, 3, 20))), UnsupportedFormat, "20-bit"),
        (riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 0, 16000, 0, 0, 16))), UnsupportedFormat, "send PCM"),
    ],
)
def test_what_cannot_be_used_is_refused(data: bytes, error: type[InputError], words: str) -> None:
    with pytest.raises(error, match=words):
        sound.read_header(data, 1000, 16000)


def test_a_file_of_empty_chunks_keeps_nobody_busy() -> None:
    """20 MB of them would be two and a half million."""
    data = riff(chunk(b"junk", b"") * 2_500_000)
    begun = time.process_time()
    with pytest.raises(UnsupportedFormat):
        sound.read_header(data, 2**26, 16000)
    assert time.process_time() - begun < 0.1


@given(st.integers(0, 60), st.binary(max_size=6), st.integers(1, 4), st.integers(1, 3))
def test_a_damaged_header_is_refused_or_read(place: int, noise: bytes, width: int, channels: int) -> None:
    """And nothing else."""
    data = wav(bytes(width * channels * 4), width, channels)
    broken = data[:place] + noise + data[place + len(noise) :]
    try:
        sound.read_header(broken, 10**6, 16000)
        samples = sound.decode_wav(broken)
    except InputError:
        return
    assert samples.ndim == 1
    assert np.isfinite(samples).all()
