"""Certificates, keys, trust bundle and revocation lists: read, checked, and kept until better ones come.

Two groups of files, each taken over as a whole or not at all: what we show and trust (certificates, keys, authorities),
and what was revoked. A broken list must not keep a renewed certificate away, nor the other way round.
"""

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from appliance.core.config import Config
from appliance.core.errors import CertificateError
from appliance.core.files import SERVICE_GROUP, in_memory
from appliance.pki import inspect
from appliance.pki.files import MAX_FILE_BYTES
from appliance.pki.revocation import MAX_LIST_BYTES, RevocationList, read_lists
from appliance.pki.signing import certificate_pem
from appliance.pki.trust import Trust
from appliance.wire.settings import Credentials

_log = logging.getLogger(__name__)

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""For TLS 1.2: forward secrecy and authenticated encryption alone, which is what HTTP/2 allows there.

Source: RFC 9113, section 9.2.2 and appendix A. TLS 1.3 has no others."""

_TRY_AGAIN_S = 60.0
"""Seconds after which files that were not taken over are tried again, though they did not change: a certificate that is
not valid yet becomes so, and what the system lacked (memory, descriptors) may be there."""

_SAY_AGAIN_S = 3600.0
"""Seconds after which a revocation list that is out of date is complained of again."""


@dataclass(frozen=True, slots=True, repr=False)
class _Pair:
    """A certificate with its chain, and its key as read (still encrypted, if it is). No repr shows it."""

    path: Path
    certificates: list[x509.Certificate]
    key: bytes

    @property
    def leaf(self) -> x509.Certificate:
        return self.certificates[0]


@dataclass(frozen=True, slots=True, repr=False)
class _Shown:
    """What the ports show and trust: replaced as a whole.

    Attributes:
        optional: for the main port: a client certificate is asked for where there is a trust bundle.
        demanding: for a port that demands one; None without a trust bundle.
        client_ca: the trust bundle's PEM; None: client certificates are not asked for.
        ends: role → when the certificate ends, Unix time.
    """

    tls: Credentials
    client_ca: bytes | None
    authorities: list[x509.Certificate]
    optional: ssl.SSLContext
    demanding: ssl.SSLContext | None
    ends: dict[str, float]


class CertificateFiles:
    """What the ports show and trust now; keeps the last good set when the files become bad.

    `context`, `tls`, `mtls` and `trust` may be called from any thread: each answer is replaced as a whole.
    """

    def __init__(self, config: Config, counted: Callable[[str], object] = lambda result: None) -> None:
        """Read them.

        Args:   counted: told "ok" of changed files that were taken over by themselves, "failed" of those that were not.
        Raises: CertificateError: a file is missing, or the set is unusable; says everything that is wrong.
        """
        self._counted = counted
        self._changing = threading.Lock()  # one that began before a reload must not put the old files back after it
        self.reload(config)

    def context(self, demand: bool = False) -> ssl.SSLContext:
        """For the next handshake of the native wire. The same object until the files change.

        Args: demand: refuse clients without a certificate in the handshake; else it is asked for, and verified when
            one is sent.

        Raises: CertificateError: one is demanded, and there is no trust bundle.
        """
        if not demand:
            return self._shown.optional
        if self._shown.demanding is None:
            raise CertificateError(_no_client_ca(self.config, "a port that demands client certificates"))
        return self._shown.demanding

    def tls(self) -> Credentials:
        """For the fallback transport's port that asks for no client certificate."""
        return self._shown.tls

    def mtls(self) -> Credentials:
        """For its port that demands one."""
        shown = self._shown
        return Credentials(shown.tls.chain, shown.tls.key, shown.client_ca)

    def trust(self) -> Trust:
        """Whose client certificates are believed at this moment."""
        return self._trust

    @property
    def expiry(self) -> dict[str, float]:
        """When certificates end, Unix time, by role: `server`, `client_ca`, `sni:<file name without its ending>`."""
        return self._shown.ends

    @property
    def crl_next_update(self) -> dict[str, float]:
        """When each authority's revocation list is due for replacement, Unix time."""
        due: dict[str, float] = {}
        for each in self._trust.lists or ():
            name = each.issuer.subject.rfc4514_string()
            due[name] = min(due.get(name, float("inf")), each.next_update.timestamp())
        return due

    def stale_lists(self) -> list[str]:
        """A sentence for each revocation list that is out of date, and in strict for each that is missing."""
        lists, now = self._trust.lists, datetime.now(UTC)
        if lists is None:
            return []
        sentences = [text for each in lists if (text := each.staleness(now))]
        if self.config.tls.crl_policy == "strict":
            sentences += [
                f"The file of tls.crl holds no revocation list of {inspect.title(authority)}, an authority of "
                "tls.client_ca; add one, or take that CA out."
                for authority in self._trust.authorities
                if not any(each.covers(authority) for each in lists)
            ]
        return sentences

    def reload(self, config: Config) -> None:
        """Read everything anew. Raises: CertificateError: nothing was taken over."""
        with self._changing:
            stamps = _stamps(_shown_paths(config)), _stamps(_list_paths(config))
            shown = _read_shown(config)
            lists = _read_lists(config, shown.authorities)
            self.config, self._shown = config, shown
            self._trust = Trust(shown.authorities, lists, strict=config.tls.crl_policy == "strict")
            self._shown_stamps, self._list_stamps = stamps
            self._refused_shown, self._refused_lists = _Refusal(), _Refusal()
            self._complained = -_SAY_AGAIN_S

    def refresh(self) -> None:
        """Take over files that changed; if they are bad, say so once and keep the last good ones."""
        with self._changing:
            shown_stamps, list_stamps = _stamps(_shown_paths(self.config)), _stamps(_list_paths(self.config))
            new_shown, new_lists = shown_stamps != self._shown_stamps, list_stamps != self._list_stamps
            self._shown_stamps, self._list_stamps = shown_stamps, list_stamps
            if new_shown:
                self._refused_shown = _Refusal()
            taken_over = (new_shown or self._refused_shown.due) and self._refresh_shown()
            if taken_over or new_lists:  # a new bundle may know the CA of a list that was refused before
                self._refused_lists = _Refusal()
                self._refresh_lists()
                self._complained = -_SAY_AGAIN_S
            elif self._refused_lists.due:
                self._refresh_lists()
            self._complain()

    def _refresh_shown(self) -> bool:
        """Whether what is shown and trusted was taken over."""
        try:
            self._shown = _read_shown(self.config, client_ca_expected=self._shown.client_ca is not None)
        except CertificateError as error:
            if self._refused_shown.note("changed certificate files are not taken over, the ones before stay", error):
                self._counted("failed")
            return False
        self._refused_shown = _Refusal()
        self._counted("ok")
        _log.info("certificates reloaded", extra={"certificate": str(self.config.tls.certificate)})
        return True

    def _refresh_lists(self) -> None:
        lists: Sequence[RevocationList] | None = self._trust.lists
        try:
            lists = _read_lists(self.config, self._shown.authorities)
        except CertificateError as error:
            if self._refused_lists.note("the changed revocation lists are not taken over, the ones before stay", error):
                self._counted("failed")
        else:
            self._refused_lists = _Refusal()
            if lists is not None:
                self._counted("ok")
                _log.info("revocation lists read", extra={"crl": str(self.config.tls.crl), "lists": len(lists)})
        self._trust = Trust(self._shown.authorities, lists, strict=self.config.tls.crl_policy == "strict")

    def _complain(self) -> None:
        """Say that a list is out of date: at once, and then every hour."""
        if time.monotonic() - self._complained < _SAY_AGAIN_S:
            return
        stale = self.stale_lists()
        if not stale:
            return
        self._complained = time.monotonic()
        for sentence in stale:
            _log.warning("%s %s", sentence, _CONSEQUENCE[self.config.tls.crl_policy])


@dataclass(slots=True)
class _Refusal:
    """Files that were not taken over: said once, and tried again now and then."""

    sentence: str = ""
    at: float = 0.0

    @property
    def due(self) -> bool:
        """Whether there is something to try again, and it is time."""
        return bool(self.sentence) and time.monotonic() - self.at >= _TRY_AGAIN_S

    def note(self, what: str, error: CertificateError) -> bool:
        """They were refused, once more perhaps. Returns: whether that is news."""
        is_news = str(error) != self.sentence
        if is_news:
            _log.error("%s: %s", what, error)
        self.sentence, self.at = str(error), time.monotonic()
        return is_news


_CONSEQUENCE: Mapping[str, str] = {
    "last_good": 'It goes on being used (tls.crl_policy = "last_good").',
    "strict": 'Client certificates of that CA are refused until then (tls.crl_policy = "strict").',
}


# ---- reading and checking --------------------------------------------------------------------------------------------


def _read_shown(config: Config, *, client_ca_expected: bool = False) -> _Shown:
    """Read and check what is shown and trusted.

    Args: client_ca_expected: there was a trust bundle a moment ago: that its file is gone is a fault then.

    Raises: CertificateError: says everything that is wrong.
    """
    now, passphrase = datetime.now(UTC), _passphrase(config)
    problems: list[str] = []
    server = _read_pair(config.tls.certificate, config.tls.key, passphrase, now, problems)
    others = [
        _read_pair(path, path.with_suffix(".key"), passphrase, now, problems) for path in config.tls.sni_certificates
    ]
    client_ca, authorities = _read_bundle(config, client_ca_expected, now, problems)
    problems += [
        f"{pair.path} (tls.sni_certificates) has no DNS name, so no client can ask for it."
        for pair in others
        if pair and not any(isinstance(name, x509.DNSName) for name in inspect.alternative_names(pair.leaf))
    ]
    pairs = [pair for pair in (server, *others) if pair is not None]
    if problems or server is None:
        raise CertificateError(" ".join(problems) + " `appliance certs inspect` shows more.")
    return _Shown(
        tls=Credentials(certificate_pem(*server.certificates), _plain_key(server, passphrase), None),
        client_ca=client_ca,
        authorities=authorities,
        optional=_choosing(pairs, authorities, ssl.CERT_OPTIONAL if authorities else ssl.CERT_NONE, passphrase),
        demanding=_choosing(pairs, authorities, ssl.CERT_REQUIRED, passphrase) if authorities else None,
        ends=_ends(server, pairs[1:], authorities),
    )


def _read_pair(
    certificate: Path, key: Path, passphrase: bytes | None, now: datetime, problems: list[str]
) -> _Pair | None:
    """A certificate and its key, or None and what is wrong with them, added to `problems`."""
    try:
        chain, key_pem = _read_pem(certificate), _read_pem(key)
    except CertificateError as error:
        problems.append(str(error))
        return None
    found = inspect.check_server_pair(chain, key_pem, passphrase, now)
    if found:
        problems.append(f"The certificate {certificate} (key {key}) cannot be used: {' '.join(found)}")
        return None
    return _Pair(certificate, inspect.load_certificates(chain), key_pem)


def _read_bundle(
    config: Config, expected: bool, now: datetime, problems: list[str]
) -> tuple[bytes | None, list[x509.Certificate]]:
    """The trust bundle, as PEM and read; None where there is none and none is needed."""
    path = config.tls.client_ca
    if _absent(path):
        if config.server.mtls_listen:
            problems.append(_no_client_ca(config, "server.mtls_listen"))
        elif config.auth.require in ("certificate", "both"):
            problems.append(_no_client_ca(config, f'auth.require = "{config.auth.require}"'))
        elif config.tls.crl:
            problems.append(_no_client_ca(config, "tls.crl"))
        elif expected:
            problems.append(f"{path} (tls.client_ca) is gone; to trust no client certificates any more, reload.")
        return None, []
    try:
        pem = _read_pem(path)
    except CertificateError as error:
        problems.append(str(error))
        return None, []
    found = inspect.check_trust_bundle(pem, now)
    if found:
        problems += [f"{path}: {text}" for text in found]
        return None, []
    return pem, inspect.load_certificates(pem)


def _read_lists(config: Config, authorities: list[x509.Certificate]) -> list[RevocationList] | None:
    """The revocation lists; None where none are wanted. Raises: CertificateError: they cannot be used."""
    path = config.tls.crl
    if path is None:
        return None
    try:
        return read_lists(_read_pem(path, MAX_LIST_BYTES, "`appliance certs crl` makes ours"), authorities)
    except CertificateError as error:
        raise CertificateError(f"{path} (tls.crl): {error}", detail=error.detail) from error


def _ends(server: _Pair, others: Iterable[_Pair], authorities: Iterable[x509.Certificate]) -> dict[str, float]:
    ends = {"server": server.leaf.not_valid_after_utc.timestamp()}
    for role, cert in [
        *(("client_ca", authority) for authority in authorities),
        *((f"sni:{pair.path.stem}", pair.leaf) for pair in others),
    ]:
        ends[role] = min(ends.get(role, float("inf")), cert.not_valid_after_utc.timestamp())
    return ends


def _plain_key(pair: _Pair, passphrase: bytes | None) -> bytes:
    return inspect.load_private_key(pair.key, passphrase).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _passphrase(config: Config) -> bytes | None:
    secret = config.tls.key_passphrase
    return secret.get_secret_value().encode() if secret else None


def _no_client_ca(config: Config, who: str) -> str:
    return (
        f"There is no file {config.tls.client_ca} (tls.client_ca), and {who} needs the authorities in it; make one "
        "with `appliance certs init`, or name the bundle of your CA."
    )


# ---- contexts --------------------------------------------------------------------------------------------------------


def _choosing(
    pairs: list[_Pair], authorities: list[x509.Certificate], mode: ssl.VerifyMode, passphrase: bytes | None
) -> ssl.SSLContext:
    """A context that shows the first pair, or another one to a client that asks for its name."""
    contexts = [_context(pair, authorities, mode, passphrase) for pair in pairs]
    if len(contexts) > 1:
        # The handshake goes on with the chosen context's certificate; all else is the same in every one.
        contexts[0].sni_callback = _chooser(list(zip([pair.leaf for pair in pairs], contexts, strict=True)))
    return contexts[0]


def _chooser(
    offers: list[tuple[x509.Certificate, ssl.SSLContext]],
) -> Callable[[ssl.SSLObject, str | None, ssl.SSLContext], None]:
    """What `ssl` calls with the name a client asks for (ASCII, an international one in its xn-- form).

    A whole name comes before a wildcard, and the earlier certificate before the later. Source: RFC 6066, section 3.
    """
    whole: dict[str, ssl.SSLContext] = {}
    wild: dict[str, ssl.SSLContext] = {}
    for leaf, context in offers:
        for name in inspect.server_names(leaf):
            if name.startswith("*."):
                wild.setdefault(name[2:], context)
            else:
                whole.setdefault(name, context)

    def choose(connection: ssl.SSLObject, name: str | None, _default: ssl.SSLContext) -> None:
        asked = (name or "").lower().removesuffix(".")
        chosen = whole.get(asked) or wild.get(asked.partition(".")[2])
        if chosen is not None:
            connection.context = chosen

    return choose


def _context(
    pair: _Pair, authorities: list[x509.Certificate], mode: ssl.VerifyMode, passphrase: bytes | None
) -> ssl.SSLContext:
    """Raises: CertificateError: OpenSSL does not take the certificate or the bundle, or cannot be given them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        # What was checked is what is loaded: never the files again, which may have changed in between. The password
        # is always given, because OpenSSL would ask the terminal for one.
        with in_memory(certificate_pem(*pair.certificates)) as chain, in_memory(pair.key) as key:
            context.load_cert_chain(chain, key, password=lambda: passphrase or b"")
        if authorities:
            context.load_verify_locations(cadata=certificate_pem(*authorities).decode("ascii"))
    except ssl.SSLError as error:
        raise CertificateError(
            f"The certificate {pair.path} cannot be used: OpenSSL refuses it or its trust bundle ({error.reason})."
        ) from error
    except OSError as error:
        raise CertificateError(f"The certificate {pair.path} cannot be loaded: {error.strerror}.") from error
    context.verify_mode = mode
    # An authority in the bundle is trusted by itself: a site may believe one issuing CA and not its whole root.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # No tickets: a resumed connection would bring the client's certificate without the chain that was verified, and a
    # ticket key that lives as long as the daemon would undo forward secrecy in TLS 1.2. gRPC connections are few.
    context.options |= ssl.OP_NO_TICKET
    # The client's order of ciphers: ours would be AES-256 first for everyone, a third slower for large bodies.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    return context


# ---- files -----------------------------------------------------------------------------------------------------------


def base_url_warning(config: Config, chain: bytes) -> str:
    """A sentence when the host that clients are told is not in the certificate's names, else ""."""
    host = urlsplit(config.server.base_url).hostname or ""
    leaf = inspect.load_certificates(chain)[0]
    if inspect.covers_host(leaf, host):
        return ""
    names = ", ".join(inspect.server_names(leaf)) or "none"
    return (
        f"server.base_url names the host {host!r}, which is not among the certificate's subject alternative names "
        f"({names}): clients will refuse the connection unless a proxy in front answers for it. Issue a certificate "
        "for that host, or change server.base_url."
    )


_MAKE = "make one with `appliance certs init` and `appliance certs issue server`, or `appliance certs import` yours"


def _read_pem(path: Path, limit: int = MAX_FILE_BYTES, remedy: str = _MAKE) -> bytes:
    """The bytes of a file, at most so many. Raises: CertificateError: names the file and what to do."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise CertificateError(f"There is no file {path}; {remedy}.") from None
    except OSError as error:
        mend = f"the service must be able to: chgrp {SERVICE_GROUP} {path} && chmod 0640 {path}"
        raise CertificateError(f"{path} cannot be read: {error.strerror}; {mend}.") from error
    if len(content) > limit:
        raise CertificateError(f"{path} has more than {limit} bytes; it is not what belongs there.")
    return content


def _absent(path: Path) -> bool:
    """True when there is no such name: not when it cannot be looked at, or is a link that leads nowhere."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _shown_paths(config: Config) -> list[Path]:
    others = [path for cert in config.tls.sni_certificates for path in (cert, cert.with_suffix(".key"))]
    return [config.tls.certificate, config.tls.key, config.tls.client_ca, *others]


def _list_paths(config: Config) -> list[Path]:
    return [config.tls.crl] if config.tls.crl else []


def _stamps(paths: Iterable[Path]) -> tuple[object, ...]:
    stamps: list[object] = []
    for path in paths:
        try:
            stat = os.stat(path)
            # The time of change too: files that could not be read are tried again once their rights are mended.
            stamps.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        except OSError as error:
            stamps.append(error.errno)
    return tuple(stamps)
