"""The only code that opens a caller's URL.

Off until the operator names hosts. A caller must not reach into the operator's network through us: the host must be
on the list, its address is resolved once, checked, and that very address is connected to (so that a second DNS answer
cannot change it); redirects are followed only to listed hosts; no credentials are forwarded; size and time are capped.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from fnmatch import fnmatchcase
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

from appliance.core.config import Urls
from appliance.core.errors import DownloadFailed, InputTooLarge, UrlRefused

_REDIRECTS = 3
_HOLDS_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
"""NAT64 (RFC 6052) and the old compatible form (RFC 4291): an IPv4 address in the last four bytes."""
_TRUST: ssl.SSLContext | None = None


async def fetch(url: str, policy: Urls, max_bytes: int) -> bytes:
    """The bytes behind a URL.

    Raises: UrlRefused: the policy forbids it. DownloadFailed: allowed, and the host did not deliver. InputTooLarge.
    """
    if not policy.hosts:
        raise UrlRefused("Inputs by URL are off on this appliance (urls.hosts is empty); send the bytes instead.")
    try:
        async with asyncio.timeout(policy.timeout_s):
            for _ in range(_REDIRECTS + 1):
                parts = _allowed(url, policy)
                address = await _resolve(parts, policy)
                body, redirect = await _get(parts, address, policy, max_bytes)
                if redirect is None:
                    return body
                url = urljoin(url, redirect)
    except TimeoutError as error:
        raise DownloadFailed(f"The URL did not deliver within {policy.timeout_s:g} s (urls.timeout_s).") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        # ValueError: names that IDNA cannot say, redirects that are no URL.
        raise DownloadFailed(
            f"The URL could not be fetched: {type(error).__name__}.", detail=f"{url}: {error}"
        ) from error
    raise DownloadFailed(f"The URL redirects more than {_REDIRECTS} times.")


def _allowed(url: str, policy: Urls) -> SplitResult:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UrlRefused("The URL cannot be read; send an http or https URL.") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UrlRefused("Only http and https URLs are fetched; send the bytes instead.")
    if parts.username is not None or parts.password is not None:
        raise UrlRefused("The URL carries a user name or password; these are never sent on. Send the bytes instead.")
    if not any(fnmatchcase(host.lower(), pattern.lower()) for pattern in policy.hosts):
        raise UrlRefused(f"The host {host!r} is not among those this appliance may fetch from (urls.hosts).")
    return parts


async def _resolve(parts: SplitResult, policy: Urls) -> str:
    """One address of the host, checked; all its addresses must be fit to be used."""
    assert parts.hostname is not None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        answers = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise DownloadFailed(f"The host {parts.hostname!r} cannot be resolved.") from error
    addresses: Sequence[str] = [str(answer[4][0]) for answer in answers]
    for address in addresses:
        if not policy.private_addresses and not _public(address):
            raise UrlRefused(
                f"The host {parts.hostname!r} has a private address; urls.private_addresses = true allows that."
            )
    return addresses[0]


def _public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and any(address in network for network in _HOLDS_IPV4):
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return address.is_global and not address.is_multicast


async def _get(parts: SplitResult, address: str, policy: Urls, max_bytes: int) -> tuple[bytes, str | None]:
    """One GET to that address. Returns the body, or where a redirect leads."""
    assert parts.hostname is not None
    literal = f"[{address}]" if ":" in address else address
    port = f":{parts.port}" if parts.port else ""
    target = parts._replace(netloc=f"{literal}{port}", fragment="").geturl()
    request = httpx.Request(
        "GET",
        target,
        headers={"Host": f"{parts.hostname}{port}", "User-Agent": "inference-appliance", "Accept-Encoding": "identity"},
        extensions={"sni_hostname": parts.hostname},
    )
    # trust_env off: no proxy and no .netrc credentials from the service's environment.
    async with httpx.AsyncClient(verify=_trust(), trust_env=False, timeout=policy.timeout_s) as client:
        response = await client.send(request, stream=True, follow_redirects=False)
        try:
            if response.has_redirect_location:
                return b"", response.headers["location"]
            if response.status_code != 200:
                raise DownloadFailed(f"The URL answered HTTP {response.status_code}.")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise InputTooLarge(f"The URL delivers more than {max_bytes} bytes, the limit for one input.")
            return bytes(body), None
        finally:
            await response.aclose()


def _trust() -> ssl.SSLContext:
    """The system's authorities, read once: a context costs 20 ms to make."""
    global _TRUST
    if _TRUST is None:
        _TRUST = ssl.create_default_context()
    return _TRUST
