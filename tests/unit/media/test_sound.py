"""WAV files: whole ones, and broken ones, which are the caller's fault and nobody else's."""

import contextlib

import numpy as np
import pytest
from fuzz import media
from hypothesis import given, settings

from appliance.core.errors import InputError, UnsupportedFormat
from appliance.media import sound

RATE = 16_000
LIMIT = 2**20


def test_samples_survive_a_file() -> None:
    samples = np.linspace(-1, 1, 100, dtype=np.float32)
    file = sound.encode_wav(samples, RATE)
    assert sound.read_header(file, LIMIT, RATE) >= samples.nbytes
    assert np.abs(sound.decode_wav(file) - samples).max() < 2**-14


def test_a_chunk_that_says_it_is_longer_than_the_file_is_refused() -> None:
    """The library raises a bare RuntimeError for it."""
    file = bytearray(sound.encode_wav(np.zeros(40, np.float32), RATE))
    file[4:8] = (20).to_bytes(4, "little")
    with pytest.raises(UnsupportedFormat, match="not a WAV file"):
        sound.read_header(bytes(file), LIMIT, RATE)


@given(media.harmed_sounds())
@settings(max_examples=400, deadline=None)
def test_broken_files_are_refused_with_a_sentence(file: bytes) -> None:
    """Whatever happened to them: both what looks and what decodes raise nothing else."""
    for look in (lambda: sound.read_header(file, LIMIT, RATE), lambda: sound.decode_wav(file)):
        with contextlib.suppress(InputError):
            look()
