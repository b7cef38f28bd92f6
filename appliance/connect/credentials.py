"""The client certificate, its key, and whom we trust: read, checked, and kept until better ones come."""

import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

from cryptography import x509

from appliance.connect.settings import PASSPHRASE_VARIABLE, Settings
from appliance.core.errors import CertificateError
from appliance.core.files import in_memory
from appliance.pki import inspect
from appliance.pki.files import MAX_FILE_BYTES, too_open
from appliance.pki.signing import certificate_pem

T = TypeVar("T")

_log = logging.getLogger(__name__)

Alpn = Literal["h2", "http/1.1"]
ALPNS: tuple[Alpn, ...] = ("h2", "http/1.1")

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2, as the appliance has them. Source: RFC 9113, section 9.2.2 and appendix A."""

_TRY_AGAIN_S = 60.0
"""Seconds after which files that were not taken over are tried again, though they did not change: a certificate that is
not valid yet becomes so."""

_WARN_DAYS = (1, 7, 30)
"""Days before its end at which a certificate is complained of."""


@dataclass(frozen=True, slots=True, repr=False)
class Loaded:
    """One good set of files.

    Attributes:
        contexts: for the next handshake, by what is to be spoken.
        certificates: the leaf first.
        authorities: whom the appliance is verified with; empty: the system's.
    """

    contexts: Mapping[Alpn, ssl.SSLContext]
    certificates: list[x509.Certificate]
    authorities: list[x509.Certificate]

    @property
    def leaf(self) -> x509.Certificate:
        """The client certificate."""
        return self.certificates[0]

    def title(self) -> str:
        """The client certificate in a sentence: whose it is, who signed it, when it ends."""
        ends = self.leaf.not_valid_after_utc
        return f"{inspect.title(self.leaf)}, issued by {inspect.name_title(self.leaf.issuer)}, valid until {ends:%F}"

    def problems(self) -> list[str]:
        """What is wrong with the client certificate today that does not keep us from sending it: it has expired, it is
        not for clients."""
        now = datetime.now(UTC)
        found = inspect.leaf_problems(self.leaf, "clientAuth", now)
        return found + [text for other in self.certificates[1:] for text in inspect.date_problems(other, now)]


class Credentials:
    """What we show and trust now; keeps the last good set when the files become bad.

    For the event loop's thread alone.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str] | None = None) -> None:
        """Raises: CertificateError: a file is missing or unusable; says everything that is wrong.

        A certificate that has merely expired is no reason not to start: clients hear of it, and a new one is taken
        over.
        """
        self._settings = settings
        self._environ = os.environ if environ is None else environ
        self._stamps = self._look()
        self.loaded = read(settings, self._environ)
        self._refused = ""
        self._refused_at = 0.0
        self._warned: tuple[str, int] | None = None

    def refresh(self, *, force: bool = False) -> bool:
        """Take over files that changed; if they are bad, say so once and keep the last good ones.

        Args:    force: also when they did not change.
        Returns: whether another set is in force now.
        """
        stamps = self._look()
        changed = stamps != self._stamps
        again = bool(self._refused) and time.monotonic() - self._refused_at >= _TRY_AGAIN_S
        if not (changed or again or force):
            return False
        self._stamps = stamps
        try:
            loaded = read(self._settings, self._environ)
            faults = loaded.problems()
            if faults and not self.loaded.problems():
                raise CertificateError(" ".join(faults))
        except CertificateError as error:
            if str(error) != self._refused or changed:
                _log.error("the changed certificate files are not taken over, the ones before stay: %s", error)
            self._refused, self._refused_at = str(error), time.monotonic()
            return False
        self.loaded, self._refused = loaded, ""
        _log.info("certificates reloaded: %s", loaded.title())
        self.warn()
        return True

    @property
    def refused(self) -> str:
        """Why the files that lie there now are not in force, or ""."""
        return self._refused

    def warn(self) -> None:
        """Say that the certificate ends soon, or that it is of no use: once for each of 30, 7 and 1 days before."""
        loaded, now = self.loaded, datetime.now(UTC)
        days = inspect.days_left(loaded.leaf, now)
        faults = loaded.problems()
        level = 0 if faults else next((limit for limit in _WARN_DAYS if days <= limit), None)
        if level is None:
            return
        mark = (inspect.fingerprint(loaded.leaf), level)
        if mark == self._warned:
            return
        self._warned = mark
        if faults:
            _log.error("the appliance will refuse the client certificate: %s", " ".join(faults))
        else:
            when = f"{loaded.leaf.not_valid_after_utc:%F %H:%M} UTC"
            _log.warning(
                "the client certificate %s ends in %.1f days, on %s; put a new one in its place (%s)",
                inspect.title(loaded.leaf),
                days,
                when,
                self._settings.certificate,
            )

    def _look(self) -> tuple[object, ...]:
        settings = self._settings
        stamps: list[object] = []
        for path in (settings.certificate, settings.key, settings.ca, settings.key_passphrase_file):
            if path is None:
                continue
            try:
                stat = os.stat(path)
                stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
            except OSError as error:
                stamps.append((error.errno,))
        return tuple(stamps)


def read(settings: Settings, environ: Mapping[str, str]) -> Loaded:
    """Read and check all files. Raises: CertificateError: says everything that is wrong."""
    problems: list[str] = []
    now = datetime.now(UTC)

    def attempt(what: Callable[[], T]) -> T | None:
        try:
            return what()
        except CertificateError as error:
            problems.append(str(error))
            return None

    certificates = attempt(lambda: read_certificates(settings))
    passphrase = attempt(lambda: read_passphrase(settings, environ))
    key = attempt(lambda: content(settings.key, "key"))
    if certificates and key is not None and passphrase is not None:
        attempt(lambda: check_pair(settings, certificates, key, passphrase))
    authorities = attempt(lambda: read_authorities(settings, now))
    if problems or not certificates or key is None or passphrase is None or authorities is None:
        raise CertificateError(" ".join(problems))
    contexts = {alpn: _context(alpn, settings, certificates, key, passphrase, authorities) for alpn in ALPNS}
    return Loaded(contexts, certificates, authorities)


def read_certificates(settings: Settings) -> list[x509.Certificate]:
    """The client certificate and those above it, in order. Raises: CertificateError."""
    path = settings.certificate
    try:
        certificates = inspect.load_certificates(content(path, "certificate"))
    except CertificateError as error:
        if str(path) in str(error):
            raise
        raise CertificateError(f"{path} (certificate): {error}", detail=error.detail) from error
    problems = inspect.order_problems(certificates)
    if problems:
        raise CertificateError(f"{path} (certificate): {' '.join(problems)}")
    return certificates


def read_passphrase(settings: Settings, environ: Mapping[str, str]) -> bytes:
    """The key's passphrase, b"" for none. Raises: CertificateError: its file cannot be read."""
    path = settings.key_passphrase_file
    if path is None:
        return environ.get(PASSPHRASE_VARIABLE, "").encode()
    return content(path, "key_passphrase_file", 4096).split(b"\n")[0].rstrip(b"\r")


def check_pair(settings: Settings, certificates: list[x509.Certificate], key: bytes, passphrase: bytes) -> None:
    """Return when the key can be read and is the certificate's. Raises: CertificateError."""
    try:
        private = inspect.load_private_key(key, passphrase)
    except CertificateError as error:
        advice = f" Set key_passphrase_file, or {PASSPHRASE_VARIABLE}." if inspect.key_is_encrypted(key) else ""
        raise CertificateError(f"{settings.key} (key): {error}{advice}") from error
    if inspect.key_matches(certificates[0], private):
        return
    if any(inspect.key_matches(other, private) for other in certificates[1:]):
        raise CertificateError(f"{settings.certificate} (certificate): the client's own certificate must come first.")
    raise CertificateError(
        f"{settings.key} (key) does not belong to {settings.certificate} (certificate); install the two together."
    )


def read_authorities(settings: Settings, now: datetime) -> list[x509.Certificate]:
    """The roots of `ca`; none where the system's are meant. Raises: CertificateError: they cannot be used."""
    path = settings.ca
    if path is None:
        return []
    pem = content(path, "ca")
    problems = inspect.check_trust_bundle(pem, now)
    if problems:
        raise CertificateError(f"{path} (ca): {' '.join(problems)}")
    return inspect.load_certificates(pem)


def open_key(settings: Settings) -> str | None:
    """A sentence when others may read the key, or None."""
    return too_open(settings.key, "service")


def content(path: Path, key: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file that the configuration's `key` names. Raises: CertificateError."""
    try:
        with path.open("rb") as file:
            found = file.read(limit + 1)
    except FileNotFoundError:
        raise CertificateError(f"{path} ({key}) does not exist; put the file there, or set {key}.") from None
    except OSError as error:
        raise CertificateError(f"{path} ({key}) cannot be read: {error.strerror}; mend its permissions.") from error
    if len(found) > limit:
        raise CertificateError(f"{path} ({key}) has more than {limit} bytes; it is not what belongs there.")
    return found


def _context(
    alpn: Alpn,
    settings: Settings,
    certificates: list[x509.Certificate],
    key: bytes,
    passphrase: bytes,
    authorities: list[x509.Certificate],
) -> ssl.SSLContext:
    """Raises: CertificateError: OpenSSL does not take the files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols([alpn])
    try:
        # What was checked is what is loaded. The password is always given, because OpenSSL would ask the terminal.
        with in_memory(certificate_pem(*certificates)) as chain, in_memory(key) as private:
            context.load_cert_chain(chain, private, password=lambda: passphrase)
        if authorities:
            context.load_verify_locations(cadata=certificate_pem(*authorities).decode("ascii"))
            # An authority that was named is trusted by itself, as the appliance does with its own.
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    except ssl.SSLError as error:
        text = f"{settings.certificate} (certificate) and its key, or the ca, are refused by OpenSSL: {error.reason}."
        raise CertificateError(text) from error
    except OSError as error:
        raise CertificateError(f"{settings.certificate} (certificate) cannot be loaded: {error.strerror}.") from error
    return context
