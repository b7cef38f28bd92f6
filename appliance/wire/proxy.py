"""PROXY protocol v2: what a trusted proxy says, in front of a connection, about the client behind it.

Bytes in, an address out; no socket. A header is 16 bytes that say how long the rest is, then addresses, then
type-length-value fields, of which only the checksum is looked at.

Source: https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, section 2.2 (sizes and codes are its).
"""

import ipaddress
import struct
from dataclasses import dataclass

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
HEAD_BYTES = 16
MAX_BODY_BYTES = 2048
"""Addresses take 216 bytes at most; what proxies add (TLS details, a VPC's id) stays far below this."""

_LOCAL, _PROXY = 0, 1
_UNSPECIFIED, _INET, _INET6, _UNIX = 0, 1, 2, 3
_STREAM = 1
_ADDRESSES_BYTES = {_UNSPECIFIED: 0, _INET: 12, _INET6: 36, _UNIX: 216}
_CRC32C = 0x03


class ProxyHeaderInvalid(Exception):
    """A connection of a trusted proxy does not begin with a header that we understand; the text says why."""


@dataclass(frozen=True, slots=True)
class Source:
    """The client behind the proxy.

    Attributes:
        address: IP address; IPv4 also when it came as an IPv4-mapped IPv6 address.
    """

    address: str
    port: int


def body_length(head: bytes) -> int:
    """How many bytes follow the first 16.

    Raises: ProxyHeaderInvalid: this is no v2 header, or one longer than we take.
    """
    if head[:12] != SIGNATURE:
        if head.startswith(b"PROXY "):
            raise ProxyHeaderInvalid("the header is version 1 (text); set the proxy to send version 2")
        raise ProxyHeaderInvalid("the connection does not begin with a PROXY v2 header; set the proxy to send one")
    if head[12] >> 4 != 2:
        raise ProxyHeaderInvalid(f"the header's version is {head[12] >> 4}, not 2")
    length = int.from_bytes(head[14:16], "big")
    if length > MAX_BODY_BYTES:
        raise ProxyHeaderInvalid(f"the header announces {length} bytes; the limit is {MAX_BODY_BYTES}")
    return length


def parse(head: bytes, body: bytes) -> Source | None:
    """Read a whole header.

    Args:    body: as many bytes as `body_length(head)` said.
    Returns: the client; None when the proxy speaks for itself (its health check) or names no IP address: then the
             connection is the proxy's own.
    Raises:  ProxyHeaderInvalid: a field is unknown or cut short, or the checksum is wrong.
    """
    command, family, transport = head[12] & 15, head[13] >> 4, head[13] & 15
    if command == _LOCAL:
        return None  # whatever else stands in the header is to be ignored
    if command != _PROXY:
        raise ProxyHeaderInvalid(f"the header's command is {command}, which nobody defined")
    if family not in _ADDRESSES_BYTES or transport not in (0, _STREAM):
        raise ProxyHeaderInvalid(f"the header's address family {family} and transport {transport} are not a stream's")
    fields_start = _ADDRESSES_BYTES[family]
    if len(body) < fields_start:
        raise ProxyHeaderInvalid(f"the header has {len(body)} bytes where its addresses take {fields_start}")
    _check_fields(head, body, fields_start)
    if transport != _STREAM:
        return None
    if family == _INET:
        address, port = struct.unpack_from("!4s4xH", body)
        return Source(str(ipaddress.IPv4Address(address)), port)
    if family == _INET6:
        address, port = struct.unpack_from("!16s16xH", body)
        v6 = ipaddress.IPv6Address(address)
        return Source(str(v6.ipv4_mapped or v6), port)
    return None


def _check_fields(head: bytes, body: bytes, start: int) -> None:
    """Walk over the fields behind the addresses. Raises: ProxyHeaderInvalid: one is cut short, or a wrong checksum."""
    position = start
    while position < len(body):
        end = position + 3 + int.from_bytes(body[position + 1 : position + 3], "big")
        if position + 3 > len(body) or end > len(body):
            raise ProxyHeaderInvalid("a field of the header is longer than the header")
        if body[position] == _CRC32C:
            value = body[position + 3 : end]
            blank = head + body[: position + 3] + bytes(len(value)) + body[end:]
            if len(value) != 4 or int.from_bytes(value, "big") != crc32c(blank):
                raise ProxyHeaderInvalid("the header's checksum is wrong")
        position = end


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum. Source: RFC 3720, appendix B.4; polynomial 0x1EDC6F41, bits reflected."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF
