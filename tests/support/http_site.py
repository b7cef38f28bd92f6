"""An HTTP server that says exactly what a test wants it to, byte by byte."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Talk = Callable[[asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole answer."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def redirect(place: str, status: str = "302 Found") -> bytes:
    """An answer that sends elsewhere."""
    return answer(b"", status, f"Location: {place}")


class Site:
    """A server on loopback.

    Attributes:
        pages: path → the bytes of an answer, or a coroutine function that writes them.
        usual: the answer of every other path.
        asked: the head of every request, as it came.
        open: connections now; most: the most there were at once.
    """

    def __init__(self) -> None:
        self.pages: dict[str, bytes | Talk] = {}
        self.usual = answer(b"picture")
        self.asked: list[str] = []
        self.open = 0
        self.most = 0
        self.accepted = 0
        self.port = 0
        self.release = asyncio.Event()
        """Set when the test is over, for talks that wait."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.accepted += 1
        self.most = max(self.most, self.open)
        try:
            if await reader.readexactly(3) != b"GET":
                writer.write(answer(b"", "400 Bad Request"))
                return
            head = b"GET" + await reader.readuntil(b"\r\n\r\n")
            self.asked.append(head.decode("latin-1"))
            page = self.pages.get(head.split(b" ")[1].decode(), self.usual)
            talk = asyncio.create_task(page(writer)) if callable(page) else None
            if isinstance(page, bytes):
                writer.write(page)
                if b"content-length" in page.lower():
                    return
            if talk is not None:
                gone = asyncio.create_task(reader.read())
                await asyncio.wait({talk, gone}, return_when=asyncio.FIRST_COMPLETED)
                talk.cancel()
                gone.cancel()
                await asyncio.gather(talk, gone, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client had enough
        finally:
            self.open -= 1
            with contextlib.suppress(OSError):
                writer.close()

    @property
    def headers(self) -> list[Mapping[str, str]]:
        """Of every request, names in lower case."""
        return [
            {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in head.split("\r\n")[1:] if line}
            for head in self.asked
        ]

    @property
    def paths(self) -> list[str]:
        """What was asked for, in order."""
        return [head.split(" ")[1] for head in self.asked]

    def at(self, host: str, path: str, scheme: str = "http") -> str:
        """A URL of this server under that name."""
        return f"{scheme}://{host}:{self.port}{path}"


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    """A `Site`, until the block ends."""
    site = Site()
    server = await asyncio.start_server(site._serve, "127.0.0.1", 0, ssl=context)
    site.port = server.sockets[0].getsockname()[1]
    async with server:
        yield site
        site.release.set()


def certificate(folder: Path, *names: x509.GeneralName, valid: timedelta = timedelta(days=1)) -> ssl.SSLContext:
    """A server's context with a self-signed certificate, which lies in `ca.pem`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    start = datetime.now(UTC) - timedelta(days=2)
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), start, datetime.now(UTC) + valid
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.pem").write_bytes(pem)
    (folder / "both.pem").write_bytes(
        pem
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both.pem")
    return context
