"""Why the appliance cannot be reached, in sentences for whoever called and for the log: what is wrong, what to do."""

import socket
import ssl
from dataclasses import dataclass

from appliance.connect.credentials import Loaded
from appliance.connect.settings import Settings

_CERTIFICATE_ALERTS = {
    "BAD_CERTIFICATE": "it cannot be verified there",
    "UNSUPPORTED_CERTIFICATE": "its kind is not taken there",
    "CERTIFICATE_REVOKED": "it was revoked",
    "CERTIFICATE_EXPIRED": "it has expired",
    "CERTIFICATE_UNKNOWN": "it is not acceptable there",
    "UNKNOWN_CA": "its issuer is not among the authorities that are trusted there",
    "ACCESS_DENIED": "it is valid, and may not come in",
    "CERTIFICATE_REQUIRED": "it did not arrive",
    "DECRYPT_ERROR": "its signature does not fit",
    "HANDSHAKE_FAILURE": "the handshake failed there",
}
"""TLS alert → what it says of a client certificate. Source: RFC 8446, section 6.2."""

_NAME_MISMATCH = (62, 64)
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21, 27)
_NOT_YET, _EXPIRED = 9, 10
"""X509_V_ERR_*. Source: OpenSSL, X509_STORE_CTX_get_error(3)."""

_NOT_TLS = {
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "UNKNOWN_PROTOCOL",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
}
_NOTHING_IN_COMMON = {"UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE", "TLSV1_ALERT_PROTOCOL_VERSION"}


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a connection was not to be.

    Attributes:
        kind: one word for the log and the tests.
        what: what is wrong, one sentence.
        remedy: what to do.
        http: status of an answer over HTTP: 503 for what may pass by itself, 502 for what somebody must mend, 400 for
            what its client must.
    """

    kind: str
    what: str
    remedy: str
    http: int = 502

    @property
    def sentence(self) -> str:
        """As whoever called reads it."""
        return f"appliance connect: {self.what} {self.remedy}"


class Refused(Exception):
    """A connection was not to be; `trouble` says why."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.sentence)
        self.trouble = trouble


def full(limit: int) -> Trouble:
    """As many connections are open as may be."""
    return Trouble(
        "max_connections",
        f"{limit} connections are forwarded already.",
        "Close some, or raise max_connections, and try again.",
        503,
    )


def no_http2(settings: Settings) -> Trouble:
    """The other side speaks TLS, and not what gRPC needs."""
    return Trouble(
        "http2",
        f"{settings.upstream} does not speak HTTP/2, which gRPC needs.",
        "Set upstream to the appliance's own port, or let the proxy before it pass HTTP/2 (ALPN h2) through.",
    )


def of_connecting(error: Exception, settings: Settings, loaded: Loaded) -> Trouble:
    """Why no connection came about: look-up, TCP, TLS handshake."""
    where = settings.upstream
    again = "Is the appliance running, and is that its address (upstream)? It is tried again with the next call."
    match error:
        case ssl.SSLCertVerificationError():
            return _distrusted(error, settings)
        case ssl.SSLError():
            return _of_tls(error, settings, loaded)
        case socket.gaierror():
            return Trouble(
                "dns",
                f"the name {settings.host} cannot be looked up ({error.strerror}).",
                "Set upstream to a host that this machine's DNS knows, or mend the network.",
                503,
            )
        case TimeoutError():
            return Trouble(
                "timeout",
                f"{where} did not answer within connect_timeout_s, {settings.connect_timeout_s:g} s.",
                "Does a firewall stand between? " + again,
                503,
            )
        case ConnectionRefusedError():
            return Trouble("refused", f"nobody listens at {where} (connection refused).", again, 503)
        case ConnectionError():
            return Trouble("reset", f"{where} closed the connection during the TLS handshake.", again, 503)
        case OSError():
            return Trouble("unreachable", f"{where} cannot be reached ({error.strerror or error}).", again, 503)
    return Trouble("unforeseen", f"{where} cannot be reached ({type(error).__name__}).", again)


def of_silence(error: Exception | None, tls_version: str, settings: Settings, loaded: Loaded) -> Trouble:
    """Why a connection ended after its handshake, before the appliance said anything.

    In TLS 1.3 a client's handshake is over before its certificate was looked at: a refusal comes as the first thing
    read, or as the mere end of the connection. Source: RFC 8446, section 4.4.2.4 and appendix E.1.2.
    """
    if isinstance(error, ssl.SSLError):
        found = _of_tls(error, settings, loaded)
        if found.kind == "certificate":
            return found
    if tls_version == "TLSv1.3":
        return _certificate_refused("", settings, loaded)
    what = f"{settings.upstream} closed the connection right after the TLS handshake, before it said anything."
    return Trouble("reset", what, "It may be restarting; it is tried again with the next call.", 503)


def _of_tls(error: ssl.SSLError, settings: Settings, loaded: Loaded) -> Trouble:
    reason = error.reason or "connection closed"
    if "ALERT" in reason:
        for alert, meaning in _CERTIFICATE_ALERTS.items():
            if reason.endswith(alert):
                return _certificate_refused(meaning, settings, loaded)
    if reason.endswith("NO_APPLICATION_PROTOCOL"):
        return no_http2(settings)
    if reason in _NOT_TLS:
        return Trouble(
            "not_tls",
            f"{settings.upstream} does not speak TLS.",
            "Set upstream to the port of server.listen in the appliance's configuration.",
        )
    if reason in _NOTHING_IN_COMMON:
        return Trouble(
            "tls_version",
            f"{settings.upstream} and this program have no TLS version or cipher in common ({reason}).",
            "The other side must speak TLS 1.2 with ECDHE and AES-GCM or ChaCha20, or TLS 1.3.",
        )
    return Trouble(
        "tls",
        f"the TLS handshake with {settings.upstream} failed ({reason}).",
        "The appliance's log says more; `appliance connect --check` looks at every step.",
    )


def _distrusted(error: ssl.SSLCertVerificationError, settings: Settings) -> Trouble:
    """The appliance's certificate is not to our liking."""
    code = error.verify_code
    if code in _NAME_MISMATCH:
        return Trouble(
            "name",
            f"the certificate of {settings.upstream} does not name the host {settings.host}.",
            "Set upstream to a name that is in it (`appliance certs inspect` on the appliance lists them), or have it "
            f"issued anew with {settings.host}.",
        )
    if code in _UNKNOWN_ISSUER:
        trusted = f"the authorities in {settings.ca}" if settings.ca else "the authorities that this system trusts"
        return Trouble(
            "unknown_ca",
            f"the certificate of {settings.upstream} was not issued by {trusted}.",
            "Set ca to the root certificate of the appliance's site; if it is, somebody else answers there.",
        )
    if code in (_NOT_YET, _EXPIRED):
        when = "has expired" if code == _EXPIRED else "is not valid yet"
        return Trouble(
            "server_expired",
            f"the certificate of {settings.upstream}, or of its authority, {when}.",
            "Its operator must renew it; if that is done, check this machine's clock.",
        )
    return Trouble(
        "server_certificate",
        f"the certificate of {settings.upstream} cannot be verified ({error.verify_message}).",
        "`appliance certs inspect` on the appliance shows what is wrong with it.",
    )


def _certificate_refused(why: str, settings: Settings, loaded: Loaded) -> Trouble:
    """The appliance does not take our certificate; where we can see the reason ourselves, we say it.

    Args:    why: what its alert says; "" when it only closed the connection, as it also does in the moment it stops.
    """
    faults = loaded.problems()
    if not why:
        what = (
            f"{settings.upstream} closed the connection right after the TLS handshake; most often that means: the "
            f"appliance refused this client certificate: {loaded.title()}."
        )
    else:
        what = f"the appliance refused this client certificate: {why}. It is {loaded.title()}."
    if faults:
        remedy = f"{' '.join(faults)} Put a new one in place: {settings.certificate}."
    else:
        remedy = (
            "Its issuer must be among the authorities in the appliance's tls.client_ca, with all certificates between "
            f"in {settings.certificate}; the appliance's log says what it saw."
        )
    return Trouble("certificate", what, remedy)
