"""Framing, time-outs, messages and gzip as PROTOCOL-HTTP2 has them."""

import contextlib
import gzip
import time
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.wire import grpc

EMPTY_MEMBER = gzip.compress(b"", mtime=0)


def test_a_frame_is_a_flag_a_big_endian_length_and_the_message() -> None:
    assert grpc.frame(b"abc") == b"\x00\x00\x00\x00\x03abc"
    assert grpc.frame(b"", 0x80) == b"\x80\x00\x00\x00\x00"


# ---- grpc-message ----


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("plain text, even ~ and &", b"plain text, even ~ and &"),
        ("100 %", b"100 %25"),
        ("a\r\nb\0\x7f", b"a%0D%0Ab%00%7F"),
        ("Zürich", b"Z%C3%BCrich"),
        ("\ud800", b"?"),
    ],
)
def test_a_message_is_printable_ascii_whatever_it_says(text: str, encoded: bytes) -> None:
    assert grpc.percent_encode(text) == encoded


@given(st.text())
def test_an_encoded_message_is_one_header_line_and_decodes_to_itself(text: str) -> None:
    encoded = grpc.percent_encode(text)
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    assert unquote_to_bytes(encoded) == text.encode("utf-8", "replace")


# ---- grpc-timeout ----


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1H", 3600), ("2M", 120), ("3S", 3), ("500m", 0.5), ("7u", 7e-6), ("99999999n", 0.099999999), ("0S", 0)],
)
def test_a_timeout_is_digits_and_a_unit(value: str, seconds: float) -> None:
    assert grpc.timeout_seconds(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "S", "1", "1s", "-1S", "+1S", "1.5S", "123456789S", " 1S", "1S\n", "١S", "1SS"])
def test_what_is_no_timeout_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="grpc-timeout must be"):
        grpc.timeout_seconds(value)


# ---- gzip ----


@given(st.binary(max_size=1000))
def test_what_was_packed_unpacks_to_itself(data: bytes) -> None:
    assert grpc.inflate(grpc.deflate(data), len(data)) == data


def test_a_message_may_have_several_members() -> None:
    assert grpc.inflate(gzip.compress(b"one") + EMPTY_MEMBER + gzip.compress(b" two"), 100) == b"one two"


def test_a_large_message_comes_out_whole() -> None:
    data = bytes(range(256)) * 4096
    assert grpc.inflate(grpc.deflate(data), len(data)) == data


def test_no_more_than_the_limit_is_unpacked() -> None:
    """A bomb of a few kB costs what the limit allows, not what it would grow to."""
    bomb = gzip.compress(bytes(50 * 2**20), 9)
    with pytest.raises(ValueError, match=r"limits\.request_size"):
        grpc.inflate(bomb, 1000)
    with pytest.raises(ValueError, match=r"limits\.request_size"):
        grpc.inflate(gzip.compress(b"a" * 60) + gzip.compress(b"b" * 60), 119)


def test_what_is_unpacked_is_counted_as_it_comes() -> None:
    """So that a memory budget can stop it before it is all there."""
    counts: list[int] = []
    grpc.inflate(gzip.compress(bytes(5 * 2**20)), 2**30, counts.append)
    assert sum(counts) == 5 * 2**20
    assert max(counts) <= 2**20


@pytest.mark.parametrize("cut", [0, 1, 5, 10, 15, -1])
def test_a_message_that_is_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="cut short"):
        grpc.inflate(gzip.compress(b"hello")[:cut], 100)


@pytest.mark.parametrize("data", [b"plain text", b"x\x9c\x03\x00", gzip.compress(b"a", mtime=0) + b"rest", bytes(100)])
def test_what_is_not_gzip_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be unpacked"):
        grpc.inflate(data, 1000)


def test_millions_of_empty_members_cost_nothing() -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match="members"):
        grpc.inflate(EMPTY_MEMBER * 1_000_000, 100)
    assert time.process_time() - begun < 5


@given(st.binary(max_size=200))
def test_whatever_comes_is_unpacked_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert len(grpc.inflate(data, 100)) <= 100
