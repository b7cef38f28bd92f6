"""`appliance connect --check`: each step from the files to the appliance's first word, looked at without forwarding."""

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from cryptography import x509

from appliance.connect import credentials as files
from appliance.connect.credentials import Alpn, Credentials
from appliance.connect.settings import Settings
from appliance.connect.trouble import Refused
from appliance.connect.tunnel import PREFACE
from appliance.connect.upstream import Upstream
from appliance.core.errors import CertificateError
from appliance.pki import inspect

_SETTINGS_FRAME = struct.pack(">HBBBL", 0, 0, 4, 0, 0)
_SETTINGS = 4
"""An empty SETTINGS frame, and its type. Source: RFC 9113, section 6.5."""

_SOON_DAYS = 30
_STEPS = {
    "dns": "reachable",
    "refused": "reachable",
    "timeout": "reachable",
    "unreachable": "reachable",
    "certificate": "accepted",
}
"""Trouble's kind → the step that fails; all others are the TLS handshake's."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "warn", "fail"]
    step: str
    text: str


async def check(settings: Settings, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Look at every step; what depends on one that failed is left out."""
    environ = os.environ if environ is None else environ
    found = look_at_files(settings, environ)
    if any(finding.state == "fail" and finding.step != "validity" for finding in found):
        return found
    try:
        credentials = Credentials(settings, environ)
    except CertificateError as error:  # OpenSSL is stricter than we are, or the files changed just now
        return [*found, Finding("fail", "certificate", str(error))]
    return [*found, *await _look_at_appliance(settings, credentials)]


def look_at_files(settings: Settings, environ: Mapping[str, str]) -> list[Finding]:
    """Certificate, key, and whom we trust."""
    found: list[Finding] = []
    now = datetime.now(UTC)
    certificates: list[x509.Certificate] = []
    try:
        certificates = files.read_certificates(settings)
    except CertificateError as error:
        found.append(Finding("fail", "certificate", str(error)))
    else:
        leaf, above = certificates[0], len(certificates) - 1
        chain = f", with {above} above it" if above else ""
        title = f"{inspect.title(leaf)}, issued by {inspect.name_title(leaf.issuer)}{chain}"
        found.append(Finding("ok", "certificate", f"{settings.certificate}: {title}"))
    try:
        key = files.content(settings.key, "key")
        passphrase = files.read_passphrase(settings, environ)
        if certificates:
            files.check_pair(settings, certificates, key, passphrase)
        else:
            inspect.load_private_key(key, passphrase)
    except CertificateError as error:
        found.append(Finding("fail", "key", str(error)))
    else:
        readable = files.open_key(settings)
        text = readable or f"{settings.key}: " + ("belongs to the certificate" if certificates else "can be read")
        found.append(Finding("warn" if readable else "ok", "key", text))
    if certificates:
        found.append(_validity(certificates, now))
    try:
        authorities = files.read_authorities(settings, now)
    except CertificateError as error:
        found.append(Finding("fail", "ca", str(error)))
    else:
        names = ", ".join(inspect.title(authority) for authority in authorities)
        text = f"{settings.ca}: {names}" if settings.ca else "those that this system trusts"
        found.append(Finding("ok", "ca", text))
    return found


def _validity(certificates: list[x509.Certificate], now: datetime) -> Finding:
    leaf = certificates[0]
    faults = inspect.leaf_problems(leaf, "clientAuth", now)
    faults += [text for other in certificates[1:] for text in inspect.date_problems(other, now)]
    if faults:
        return Finding("fail", "validity", " ".join(faults))
    text = f"for clients (clientAuth), until {leaf.not_valid_after_utc:%F %H:%M} UTC"
    soon = inspect.days_left(leaf, now) <= _SOON_DAYS
    return Finding("warn" if soon else "ok", "validity", text + ("; renew it soon" if soon else ""))


async def _look_at_appliance(settings: Settings, credentials: Credentials) -> list[Finding]:
    """What gRPC needs, then what HTTP/1.1 does; the second only if the first succeeds."""
    found: list[Finding] = []
    try:
        reply, facts = await _first_word(settings, credentials, "h2", PREFACE + _SETTINGS_FRAME)
        found += [Finding("ok", "reachable", settings.upstream), Finding("ok", "tls", facts), _http2(reply)]
        reply, _ = await _first_word(settings, credentials, "http/1.1", _readyz(settings.host))
        found.append(_ready(reply))
    except Refused as refused:
        trouble = refused.trouble
        found.append(Finding("fail", _STEPS.get(trouble.kind, "tls"), f"{trouble.what} {trouble.remedy}"))
    return found


def _readyz(host: str) -> bytes:
    return f"GET /readyz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


def _http2(reply: bytes) -> Finding:
    if len(reply) > 3 and reply[3] == _SETTINGS:
        text = "the handshake with this client certificate succeeded; whose it is there, the first call tells"
        return Finding("ok", "accepted", text)
    return Finding("fail", "accepted", "what answers does not speak HTTP/2, though it said so. Is upstream right?")


def _ready(reply: bytes) -> Finding:
    words = reply.split(b" ", 2)
    status = words[1].decode("latin-1") if reply.startswith(b"HTTP/1.1 ") and len(words) > 1 else ""
    if status == "200":
        return Finding("ok", "ready", "the appliance says that it is ready")
    if status == "503":
        return Finding("warn", "ready", "the appliance says that it is not ready yet; its operator sees why")
    return Finding("warn", "ready", f"/readyz answers with {status or 'no HTTP'}; is it an appliance?")


async def _first_word(settings: Settings, credentials: Credentials, alpn: Alpn, first: bytes) -> tuple[bytes, str]:
    """What the other side says first, and what the handshake agreed on. Raises: Refused."""
    upstream = Upstream(settings, credentials)
    listener = _Listener()
    began = time.monotonic()
    transport = await upstream.connect(alpn, lambda: listener)
    try:
        tls = transport.get_extra_info("ssl_object")
        facts = f"{tls.version()}, {tls.cipher()[0]}; the certificate names {settings.host} and is trusted"
        transport.write(first)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(listener.word.wait(), settings.connect_timeout_s)
        if not listener.said:
            raise Refused(upstream.explain_silence(transport, listener.error))
        took_ms = (time.monotonic() - began) * 1000
        return bytes(listener.said), f"{facts}, {took_ms:.0f} ms"
    finally:
        transport.abort()


class _Listener(asyncio.Protocol):
    """Waits for the first bytes, or the end."""

    def __init__(self) -> None:
        self.word = asyncio.Event()
        self.said = bytearray()
        self.error: Exception | None = None

    def data_received(self, data: bytes) -> None:
        """The first word, and perhaps more."""
        self.said += data
        self.word.set()

    def connection_lost(self, error: Exception | None) -> None:
        """None comes."""
        self.error = error
        self.word.set()
