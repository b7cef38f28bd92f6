"""The status page's "try it": hands a call to our own main port, where it is a call like any other.

Over TLS and loopback, as a client would: so it is authenticated, limited, counted and logged by the very code that does
so for everybody, whichever processes do the work.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

import h11

from appliance.core.config import Config
from appliance.core.errors import ApplianceError, ConfigError, InputTooLarge, KeyInvalid, Overloaded
from appliance.daemon.certificates import CertificateFiles
from appliance.pki import inspect
from appliance.pki.signing import certificate_pem
from appliance.wire import proxy

MOST_BYTES = 8 * 2**20
"""Of a call's body, and of its reply: both lie in the daemon's own process, outside limits.memory_in_flight."""

_AT_ONCE = 2
_SLACK_S = 5.0
"""Seconds beyond limits.request_timeout_s that a call may take, its body's way here included."""

_KEY = re.compile(r"[!-~]{0,512}")
_NO_CLIENT = proxy.SIGNATURE + b"\x20\x00\x00\x00"
"""A PROXY header by which a trusted proxy says that it speaks for itself."""

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # nobody listens there; it is where the port listens


class Reply(NamedTuple):
    """What the API answered."""

    http: int
    body: bytes
    """JSON."""


class Trial:
    """Makes the calls. Used from the event loop's thread."""

    def __init__(self, config: Config, certificates: CertificateFiles) -> None:
        self._certificates = certificates
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self.sockets: Sequence[socket.socket] = ()
        """Those of server.listen; none where the transport binds its ports itself, and speaks no HTTP."""
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over what may change while we run."""
        self._timeout_s = config.limits.request_timeout_s + _SLACK_S
        self._proxies = [ipaddress.ip_network(network) for network in config.server.trusted_proxies]

    async def predict(self, path: str, key: str, body: AsyncIterator[bytes]) -> Reply:
        """What the API answers to a POST.

        Args:   path: of the API, percent-encoded. key: the caller's, "" for none. body: JSON.
        Raises: ApplianceError: the call did not reach the API, or its answer not us; says why.
        """
        if not _KEY.fullmatch(key):
            raise KeyInvalid("That is no key: a key is printable ASCII without blanks.")
        if not self.sockets:
            raise ConfigError("The main port speaks no HTTP now (it still starts, stops, or grpcio serves it).")
        if self._turns.locked():
            raise Overloaded("Others are trying a model from this page just now; try again in a moment.")
        try:
            async with self._turns, asyncio.timeout(self._timeout_s):
                content = await _whole(body)
                return await self._post(path, key, content)
        except TimeoutError as error:
            raise ApplianceError(f"There was no answer within {self._timeout_s:g} s.") from error
        except (OSError, h11.RemoteProtocolError) as error:
            raise ApplianceError(f"The main port does not answer this machine: {error}.") from error

    async def _post(self, path: str, key: str, body: bytes) -> Reply:
        reader, writer = await self._connect()
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = [("host", "localhost"), ("connection", "close"), ("content-type", "application/json")]
            headers += [("content-length", str(len(body)))] + ([("authorization", f"Key {key}")] if key else [])
            request = h11.Request(method="POST", target=path, headers=headers)
            for event in (request, h11.Data(data=body), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            # Not waited for until it is written: a refusal may come before the API has taken the body.
            return await _reply(connection, reader)
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the main port, whose certificate is known. Raises: OSError."""
        listening = self.sockets[0]
        host, *rest = listening.getsockname()
        sock = socket.socket(listening.family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (_LOOPBACK.get(host, host), *rest))
            own = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
            own = getattr(own, "ipv4_mapped", None) or own
            if any(own in network for network in self._proxies):
                await loop.sock_sendall(sock, _NO_CLIENT)
            return await asyncio.open_connection(sock=sock, ssl=self._context(), server_hostname="")
        except BaseException:
            sock.close()
            raise

    def _context(self) -> ssl.SSLContext:
        """Trusts the certificate that we show, and no other, whatever names are in it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        leaf = inspect.load_certificates(self._certificates.tls().chain)[0]
        context.load_verify_locations(cadata=certificate_pem(leaf).decode("ascii"))
        context.set_alpn_protocols(["http/1.1"])
        return context


async def _whole(body: AsyncIterator[bytes]) -> bytes:
    content = bytearray()
    async for piece in body:
        content += piece
        if len(content) > MOST_BYTES:
            raise InputTooLarge(f"From this page a call may have {MOST_BYTES // 2**20} MiB; send more with an SDK.")
    return bytes(content)


async def _reply(connection: h11.Connection, reader: asyncio.StreamReader) -> Reply:
    """The whole answer. Raises: ApplianceError: it is too long. h11.RemoteProtocolError: it broke off."""
    http, content = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            http = event.status_code
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > MOST_BYTES:
                raise ApplianceError(f"The answer has more than {MOST_BYTES // 2**20} MiB; ask with an SDK.")
        elif isinstance(event, h11.EndOfMessage):
            return Reply(http, bytes(content))
