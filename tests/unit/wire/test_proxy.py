"""The PROXY v2 header: what proxies send is understood, everything else is refused with a reason."""

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.wire import proxy
from appliance.wire.proxy import HEAD_BYTES, SIGNATURE, ProxyHeaderInvalid, Source, crc32c


def header(body: bytes, *, command: int = 1, family: int = 0x11, version: int = 2) -> bytes:
    """A header with `body` behind its first 16 bytes."""
    return SIGNATURE + bytes([version << 4 | command, family]) + len(body).to_bytes(2, "big") + body


def tcp4(source: str, port: int, fields: bytes = b"") -> bytes:
    """The header of an IPv4 client."""
    packed = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address("10.0.0.1").packed
    return header(packed + struct.pack("!HH", port, 443) + fields)


def tcp6(source: str, port: int) -> bytes:
    """The header of an IPv6 client."""
    packed = ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address("fd00::1").packed
    return header(packed + struct.pack("!HH", port, 443), family=0x21)


def read(whole: bytes) -> Source | None:
    """Parse as the listener does: first 16 bytes, then as many as they say."""
    head = whole[:HEAD_BYTES]
    length = proxy.body_length(head)
    assert len(whole) == HEAD_BYTES + length
    return proxy.parse(head, whole[HEAD_BYTES:])


def with_checksum(whole: bytes) -> bytes:
    """The same header with a checksum field behind it."""
    body = whole[HEAD_BYTES:] + b"\x03\x00\x04" + bytes(4)
    blank = whole[:14] + len(body).to_bytes(2, "big") + body
    return blank[:-4] + crc32c(blank).to_bytes(4, "big")


def test_an_ipv4_client_is_named() -> None:
    assert read(tcp4("192.0.2.7", 51234)) == Source("192.0.2.7", 51234)


def test_a_header_as_the_specification_lays_it_out_is_read() -> None:
    """Bytes written out by hand, so that the test's own helper cannot share a mistake with the parser."""
    whole = bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 000c 7f000001 7f000002 1f90 01bb")
    assert read(whole) == Source("127.0.0.1", 8080)


def test_an_ipv6_client_is_named() -> None:
    assert read(tcp6("2001:db8::7", 9)) == Source("2001:db8::7", 9)


def test_an_ipv4_client_in_ipv6_clothes_is_the_ipv4_client() -> None:
    """Else one client would have two names, and twice the connections."""
    assert read(tcp6("::ffff:192.0.2.7", 9)) == Source("192.0.2.7", 9)


@pytest.mark.parametrize(
    "whole",
    [
        header(b"", command=0, family=0x00),
        header(b"\x00" * 12, command=0, family=0x11),
        header(b"anything at all", command=0, family=0xFF),
        header(b"", family=0x00),
        header(b"/run/client\x00".ljust(108, b"\x00") * 2, family=0x31),
    ],
    ids=["local", "local with addresses", "local with nonsense", "unspecified", "unix"],
)
def test_a_proxy_that_names_no_client_address_speaks_for_itself(whole: bytes) -> None:
    """Health checks of the proxy, above all: they are served, as connections of the proxy."""
    assert read(whole) is None


@pytest.mark.parametrize(
    ("whole", "why"),
    [
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 51234 443\r\n", "version 1"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", "does not begin with"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03abcde", "does not begin with"),
        (header(b"\x00" * 12, version=3), "version is 3"),
        (header(b"\x00" * 12, command=2), "command is 2"),
        (header(b"\x00" * 12, family=0x41), "family 4"),
        (header(b"\x00" * 12, family=0x12), "transport 2"),
        (header(b"\x00" * 11), "11 bytes where its addresses take 12"),
        (header(b"\x00" * 12, family=0x21), "12 bytes where its addresses take 36"),
        (header(b"\x00" * (proxy.MAX_BODY_BYTES + 1)), "limit is 2048"),
        (tcp4("192.0.2.7", 1, b"\x20"), "longer than the header"),
        (tcp4("192.0.2.7", 1, b"\x20\x00\x05abcd"), "longer than the header"),
        (tcp4("192.0.2.7", 1, b"\x03\x00\x03abc"), "checksum is wrong"),
    ],
)
def test_a_header_that_is_not_understood_is_refused_with_the_reason(whole: bytes, why: str) -> None:
    with pytest.raises(ProxyHeaderInvalid, match=why):
        read(whole)


def test_fields_behind_the_addresses_are_skipped() -> None:
    fields = b"\x02\x00\x05a.com" + b"\x20\x00\x00" + b"\xea\x00\x03vpc" + b"\x04\x00\x02\x00\x00"
    assert read(tcp4("192.0.2.7", 1, fields)) == Source("192.0.2.7", 1)


def test_the_checksum_is_castagnolis() -> None:
    """The check value of CRC-32C, and a vector of RFC 3720, appendix B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_a_right_checksum_passes() -> None:
    assert read(with_checksum(tcp4("192.0.2.7", 1))) == Source("192.0.2.7", 1)


@given(st.integers(0, 8 * (HEAD_BYTES + 19) - 1))
def test_any_flipped_bit_under_a_checksum_is_noticed(bit: int) -> None:
    whole = bytearray(with_checksum(tcp4("192.0.2.7", 51234)))
    whole[bit // 8] ^= 1 << bit % 8
    head, body = bytes(whole[:HEAD_BYTES]), bytes(whole[HEAD_BYTES:])
    try:
        length = proxy.body_length(head)
        source = proxy.parse(head, body) if length == len(body) else None
    except ProxyHeaderInvalid:
        return
    # What is left: another length (the listener would wait for more), another family or command that names nobody, or
    # a type that is not the checksum's any more.
    assert source is None or whole[HEAD_BYTES + 12] != 3


@given(st.ip_addresses(), st.integers(0, 65535), st.binary(max_size=200))
def test_every_address_and_port_comes_through(address: ipaddress.IPv4Address, port: int, value: bytes) -> None:
    if address.version == 4:
        fields = b"\x05" + len(value).to_bytes(2, "big") + value
        assert read(tcp4(str(address), port, fields)) == Source(str(address), port)
    else:
        mapped = getattr(address, "ipv4_mapped", None)
        assert read(tcp6(str(address), port)) == Source(str(mapped or address), port)


@given(st.binary(max_size=16), st.binary(max_size=300), st.booleans())
def test_whatever_comes_ends_in_an_address_or_a_refusal(start: bytes, body: bytes, signed: bool) -> None:
    """No other exception, whatever the bytes are; and an address is one that the socket library understands."""
    head = (SIGNATURE + start[:4] if signed else start).ljust(HEAD_BYTES, b"\x00")
    try:
        length = proxy.body_length(head)
        assert 0 <= length <= proxy.MAX_BODY_BYTES
        source = proxy.parse(head, body)
    except ProxyHeaderInvalid:
        return
    if source is not None:
        socket.inet_pton(socket.AF_INET6 if ":" in source.address else socket.AF_INET, source.address)
