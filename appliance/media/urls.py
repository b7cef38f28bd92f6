"""What a caller's URL says, and whether the operator lets it be fetched: its host, its port, its addresses.

One reading only: what programs disagree about (user names, backslashes, numbers for addresses, names that are not
ASCII) is refused instead of understood, so that nobody we hand a host to can take it for another one.
"""

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from appliance.core.config import Urls, parse_host
from appliance.core.errors import UrlRefused

_LONGEST = 8192
"""Characters of a URL: signed ones have a few thousand, and servers take no more."""

_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_-]{1,63}")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\]")
_AS_IT_IS = "".join(chr(code) for code in range(0x21, 0x7F))
"""What stands in a request line as the caller wrote it; anything else is percent-encoded."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_OUTSIDE = ipaddress.ip_network("2000::/3")
"""All that is routed in IPv6. Source: IANA, Internet Protocol Version 6 Address Space."""

_NEVER: tuple[_Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "169.254.0.0/16",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
        # Where clouds tell a machine its own secrets, at addresses that other ranges would let through.
        "100.100.100.200/32",
        "168.63.129.16/32",
        "fd00:ec2::254/128",
        "fd20:ce::254/128",
    )
)
"""Addresses that no picture lies behind: special purposes, tunnels (Teredo, 6to4), the metadata services of clouds.

Source: IANA, IPv4 and IPv6 Special-Purpose Address Registries."""

_PRIVATE: tuple[_Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "fc00::/7",
        "::1/128",
    )
)
"""What `urls.private_addresses` opens. Link-local addresses are not among them."""

_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""NAT64 (RFC 6052): an IPv4 address in the last four bytes."""

_ISATAP = (0x00005EFE, 0x02005EFE)
"""RFC 5214: with this in the third quarter of an IPv6 address, the last one is an IPv4 address."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL asks for.

    Attributes:
        scheme: "http" | "https".
        host: a name in lower case, or an address without brackets.
        path: path and query as they stand in the request line; begins with "/".
    """

    scheme: str
    host: str
    port: int
    path: str

    @property
    def address(self) -> str | None:
        """The host, when it is an address."""
        return self.host if ":" in self.host or self.host.rpartition(".")[2].isdigit() else None

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL, written in the one way there is."""
        return f"{self.scheme}://{self.authority}{self.path}"


def read(url: str) -> Target:
    """A URL as what it asks for; a fragment is left out. Raises: UrlRefused: it can be read in more than one way."""
    if len(url) > _LONGEST:
        raise UrlRefused(f"The URL has {len(url)} characters; the limit is {_LONGEST}. Send the bytes instead.")
    match = _URL.fullmatch(url)
    if match is None or not match[2]:
        raise UrlRefused("Only http and https URLs are fetched; send the bytes instead.")
    if "@" in match[2]:
        raise UrlRefused("The URL carries a user name or password; these are never sent on. Send the bytes instead.")
    if _FORBIDDEN.search(url):
        raise UrlRefused("The URL has a backslash or a control character in it; percent-encode it.")
    authority = _AUTHORITY.fullmatch(match[2])
    if authority is None:
        raise UrlRefused(
            "The URL's host cannot be read. Write a name in letters, digits, dots and hyphens (an international one in "
            "its xn-- form) or an address, then the port if it needs one."
        )
    scheme = match[1].lower()
    port = int(authority[2]) if authority[2] else _PORTS[scheme]
    if not 0 < port < 65536:
        raise UrlRefused("The URL's port is not a number between 1 and 65535.")
    try:
        path = quote(match[3], safe=_AS_IT_IS)
    except UnicodeEncodeError as error:
        raise UrlRefused("The URL has characters in it that are no text; percent-encode them.") from error
    return Target(scheme, _host(authority[1].lower()), port, path if path.startswith("/") else f"/{path}")


def _host(text: str) -> str:
    if text.startswith("["):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError as error:
            raise UrlRefused("The URL's host is not an IPv6 address, though it stands in brackets.") from error
    labels = text.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # What resolvers take for an address: octal, hexadecimal, one number for all four.
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError as error:
            raise UrlRefused("An address in a URL must be written as four decimal numbers.") from error
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise UrlRefused("The URL's host is not a name: between its dots stand 1 to 63 letters, digits and hyphens.")
    return text


def check_listed(target: Target, policy: Urls) -> None:
    """Raises: UrlRefused: neither the host nor "*" is listed, or not with this port."""
    listed = [_entry(entry) for entry in policy.hosts]
    ports = [port for pattern, port in listed if _matches(pattern, target)]
    if not ports:
        raise UrlRefused(f"The host {target.host!r} is not among those this appliance may fetch from (urls.hosts).")
    usual = _PORTS[target.scheme]
    if not any(target.port == (usual if port is None else port) for port in ports):
        raise UrlRefused(
            f"Port {target.port} of {target.host!r} is not listed; without a port in urls.hosts, "
            f"{target.scheme} is fetched from port {usual} only."
        )


_entry = lru_cache(maxsize=1024)(parse_host)


def _matches(pattern: str, target: Target) -> bool:
    if pattern.startswith("*."):
        return target.address is None and target.host.endswith(pattern[1:])
    return pattern in ("*", target.host)


def may_connect(text: str, policy: Urls) -> bool:
    """Whether an address, however it is wrapped, is of the open internet, or private and private ones are allowed."""
    try:
        address = _unwrapped(ipaddress.ip_address(text))
    except ValueError:
        return False
    if getattr(address, "scope_id", None) or _in(address, _NEVER):
        return False
    if _in(address, _PRIVATE):
        return policy.private_addresses
    if isinstance(address, ipaddress.IPv6Address):
        within = address.packed
        if int.from_bytes(within[8:12], "big") in _ISATAP and not may_connect(
            str(ipaddress.IPv4Address(within[12:])), policy
        ):
            return False
        return address in _OUTSIDE
    return True


def _unwrapped(address: _Address) -> _Address:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _TRANSLATED:
            return ipaddress.IPv4Address(address.packed[-4:])
    return address


def _in(address: _Address, networks: tuple[_Network, ...]) -> bool:
    return any(address.version == network.version and address in network for network in networks)
