"""The only code that opens a caller's URL.

Off until the operator names hosts. A caller must not reach into the operator's network through us: the host must be
on the list, its name is looked up once a hop, all its addresses are checked, and one of these very addresses is
connected to, so that a second DNS answer changes nothing; redirects are followed only to listed hosts and never from
https to http. Nothing goes out but the request line and five fixed headers: no credentials, no cookie, no proxy of the
environment. Size, time, and what an answer may cost us to read are capped.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urljoin

import h11

from appliance.core.config import Urls
from appliance.core.errors import DownloadFailed, InputTooLarge, UrlRefused
from appliance.core.files import authorities_of
from appliance.media import urls
from appliance.media.urls import Target

_REDIRECTS = 3
_REDIRECTING = (301, 302, 303, 307, 308)
_ADDRESSES = 3
"""Addresses of one host that are tried."""

_HEAD = 16 * 1024
"""Bytes of an answer's head, give or take one read."""

_READ = 64 * 1024
_INTERIM = 8
"""Answers with 1xx that may come before the real one."""

_PIECES, _PIECE = 4096, 256
"""From so many pieces of a body on, they must have so many bytes on average: each costs us as much as a large one."""

_BREATH = 64
"""Pieces after which other callers have their turn."""

_LOOK_UPS = threading.BoundedSemaphore(32)
"""So many names may be looked up at once; the system's resolver cannot be interrupted: who left is still with it."""

_TOLD = 200
"""Characters of an error that the log is told: some repeat what the host sent."""

_UNREACHABLE = "The URL's host could not be reached, or did not answer as an HTTP server does."

Resolve: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host name and port → addresses. Raises: OSError."""

Reserve: TypeAlias = Callable[[int], object]
"""Told of so many bytes before they are kept. What it raises ends the download."""


async def fetch(
    url: str,
    policy: Urls,
    max_bytes: int,
    *,
    limit: str = "limits.image_size",
    trust: Callable[[], ssl.SSLContext],
    reserve: Reserve = lambda count: None,
    resolve: "Resolve | None" = None,
) -> bytes:
    """The bytes behind a URL; one byte at least.

    Args:    limit: what `max_bytes` is called in the configuration. trust: the TLS context, when one is needed.
             resolve: instead of the system's resolver.
    Raises:  UrlRefused: the policy forbids it. DownloadFailed: allowed, and the host did not deliver. InputTooLarge.
             Their sentences name no address, and of a redirect not where it led; their details do.
    """
    if not policy.hosts:
        raise UrlRefused("Inputs by URL are off on this appliance (urls.hosts is empty); send the bytes instead.")
    target = urls.read(url)
    urls.check_listed(target, policy)
    try:
        async with asyncio.timeout(policy.timeout_s):
            for _ in range(_REDIRECTS + 1):
                addresses = await _addresses(target, policy, resolve or look_up)
                reader, writer = await _connect(target, addresses, policy, trust)
                try:
                    answer = await _get(reader, writer, target, max_bytes, limit, reserve)
                finally:
                    # Not closed politely: a peer that dawdles over a goodbye would hold a connection nobody counts.
                    writer.transport.abort()
                if isinstance(answer, bytes):
                    return answer
                target = _redirected(target, answer.location, policy)
    except TimeoutError as error:
        raise DownloadFailed(f"The URL did not deliver within {policy.timeout_s:g} s (urls.timeout_s).") from error
    except (h11.ProtocolError, OSError, ValueError) as error:  # ValueError: a host name that ssl will not take
        raise DownloadFailed(_UNREACHABLE, detail=_said(error)) from error
    raise DownloadFailed(f"The URL redirects more than {_REDIRECTS} times.")


def trust(ca: Path | None) -> ssl.SSLContext:
    """Whose certificates are believed: the system's authorities, and those of the file beside them.

    Raises: CertificateError: the file cannot be read, or holds no certificate.
    """
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca is not None:
        with authorities_of("urls.ca", ca):
            context.load_verify_locations(cafile=ca)
    return context


# ---- where to --------------------------------------------------------------------------------------------------------


async def _addresses(target: Target, policy: Urls, resolve: Resolve) -> Sequence[str]:
    """The host's addresses; all of them are fit to be connected to, or none is used. Raises: UrlRefused."""
    if target.address is not None:
        if not urls.may_connect(target.address, policy):
            raise UrlRefused(
                "The URL's host is an address that inputs may not be fetched from; send the bytes instead."
            )
        return [target.address]
    try:
        found = list(dict.fromkeys(await resolve(target.host, target.port)))
    except socket.gaierror as error:
        if error.errno == socket.EAI_AGAIN:
            raise DownloadFailed(
                "The URL's host could not be looked up now; try again.", detail=_said(error)
            ) from error
        found, why = [], _said(error)
    else:
        why = f"it leads to {', '.join(found[:8])}"
    if not found or not all(urls.may_connect(address, policy) for address in found):
        # One sentence for both, or callers would learn which names there are inside.
        raise UrlRefused(
            f"The host {target.host!r} has no address that inputs may be fetched from: it is unknown, or one of its "
            "addresses is private (urls.private_addresses).",
            detail=why,
        )
    return found


async def look_up(host: str, port: int) -> Sequence[str]:
    """The system's resolver, on a thread of its own: it may hang longer than anybody waits. Raises: OSError."""
    if not _LOOK_UPS.acquire(blocking=False):
        raise socket.gaierror(socket.EAI_AGAIN, "too many names are being looked up")
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[str]] = loop.create_future()

    def tell(found: Sequence[str] | OSError) -> None:
        if answer.done():
            return  # nobody waits any more
        if isinstance(found, OSError):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def work() -> None:
        found: Sequence[str] | OSError
        try:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except OSError as error:
            found = error
        except ValueError as error:  # a name that its codec cannot say
            found = socket.gaierror(socket.EAI_NONAME, str(error))
        finally:
            _LOOK_UPS.release()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, found)

    # A daemon thread, so that the process need not wait for it when it stops.
    threading.Thread(target=work, name="look-up", daemon=True).start()
    return await answer


async def _connect(
    target: Target, addresses: Sequence[str], policy: Urls, trust: Callable[[], ssl.SSLContext]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first of these addresses that takes one; TLS is for the host's name."""
    secure = {"ssl": trust(), "server_hostname": target.host} if target.scheme == "https" else {}
    tried = addresses[:_ADDRESSES]
    failures = []
    for address in tried:
        try:
            async with asyncio.timeout(policy.timeout_s / len(tried)):
                return await asyncio.open_connection(address, target.port, limit=_READ, **secure)  # type: ignore[arg-type]
        except OSError as error:  # TimeoutError, ssl.SSLError and failed verification are such
            failures.append(f"{address}: {_said(error)}")
    raise DownloadFailed(_UNREACHABLE, detail="; ".join(failures))


def _redirected(target: Target, location: bytes, policy: Urls) -> Target:
    """Where a redirect leads. Raises: UrlRefused, without a word on what lies there."""
    try:
        after = urls.read(urljoin(target.url, location.decode("ascii")))
        urls.check_listed(after, policy)
    except (UrlRefused, ValueError) as error:
        raise UrlRefused(
            "The URL redirects to where this appliance may not fetch from (urls.hosts).", detail=_said(error)
        ) from error
    if (target.scheme, after.scheme) == ("https", "http"):
        raise UrlRefused("The URL redirects from https to http; that is not followed.")
    return after


# ---- one request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: bytes


async def _get(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    target: Target,
    max_bytes: int,
    limit: str,
    reserve: Reserve,
) -> bytes | _Redirect:
    """One GET. Returns: the body, or where a redirect leads."""
    talk = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD)
    headers = {
        "Host": target.authority,
        "User-Agent": "inference-appliance",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    writer.write(talk.send(h11.Request(method="GET", target=target.path, headers=list(headers.items()))) or b"")
    talk.send(h11.EndOfMessage())
    response = await _head(talk, reader)
    if response.status_code in _REDIRECTING:
        places = _values(response, b"location")
        if len(places) != 1:
            raise DownloadFailed(f"The URL answered HTTP {response.status_code} without saying where to go.")
        return _Redirect(places[0])
    if response.status_code != 200:
        raise DownloadFailed(f"The URL answered HTTP {response.status_code}.")
    if any(value.strip().lower() not in (b"", b"identity") for value in _values(response, b"content-encoding")):
        raise DownloadFailed("The URL delivers compressed bytes, which were not asked for.")
    return await _body(talk, reader, response, max_bytes, limit, reserve)


async def _head(talk: h11.Connection, reader: asyncio.StreamReader) -> h11.Response:
    for _ in range(_INTERIM + 1):
        event = await _next(talk, reader, _HEAD)
        if isinstance(event, h11.Response):
            if not event.http_version.startswith(b"1."):  # h11 takes any digit
                raise DownloadFailed(_UNREACHABLE, detail=f"an answer in HTTP {event.http_version.decode()}")
            return event
    raise DownloadFailed(_UNREACHABLE, detail=f"more than {_INTERIM} answers with 1xx")


async def _body(
    talk: h11.Connection,
    reader: asyncio.StreamReader,
    response: h11.Response,
    max_bytes: int,
    limit: str,
    reserve: Reserve,
) -> bytes:
    too_large = InputTooLarge(f"The URL delivers more than {max_bytes} bytes, the limit for one input ({limit}).")
    announced = _values(response, b"content-length")
    if announced and int(announced[0]) > max_bytes:  # h11 has seen that it is a number
        raise too_large
    body = bytearray()
    pieces = 0
    while isinstance(event := await _next(talk, reader, _READ), h11.Data):
        if len(body) + len(event.data) > max_bytes:
            raise too_large
        reserve(len(event.data))
        body += event.data
        pieces += 1
        if pieces > _PIECES and len(body) < pieces * _PIECE:
            raise DownloadFailed("The URL delivers in pieces that are too small.")
        if pieces % _BREATH == 0:
            await asyncio.sleep(0)
    if not isinstance(event, h11.EndOfMessage):
        raise DownloadFailed(_UNREACHABLE, detail=f"{event} in the body")
    if not body:
        raise DownloadFailed("The URL delivers nothing: its body is empty.")
    return bytes(body)


async def _next(talk: h11.Connection, reader: asyncio.StreamReader, count: int) -> object:
    """What comes next. Raises: h11.RemoteProtocolError: it is not HTTP, or ends too soon."""
    while (event := talk.next_event()) is h11.NEED_DATA:
        talk.receive_data(await reader.read(count))
    return event


def _values(response: h11.Response, name: bytes) -> list[bytes]:
    return [value for key, value in response.headers if key == name]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_TOLD]
