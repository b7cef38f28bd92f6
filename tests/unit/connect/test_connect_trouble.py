"""What went wrong becomes a sentence: what is wrong, what to do."""

import errno
import socket
import ssl
from collections.abc import Callable

import pytest

from appliance.connect import trouble
from appliance.connect.credentials import Credentials, Loaded

from .conftest import Site


@pytest.fixture
def loaded(site: Site) -> Loaded:
    """Good files."""
    return Credentials(site.settings, {}).loaded


def tls(reason: str) -> ssl.SSLError:
    """As OpenSSL reports it."""
    error = ssl.SSLError(1, f"[SSL: {reason}]")
    error.reason = reason
    return error


def distrust(code: int) -> ssl.SSLCertVerificationError:
    """As OpenSSL refuses a certificate."""
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "because"
    return error


@pytest.mark.parametrize(
    ("make", "kind", "says", "http"),
    [
        (
            lambda: socket.gaierror(-2, "Name or service not known"),
            "dns",
            "localhost cannot be looked up",
            503,
        ),
        (TimeoutError, "timeout", "did not answer within connect_timeout_s, 10 s", 503),
        (ConnectionRefusedError, "refused", "nobody listens at https://localhost:1", 503),
        (ConnectionResetError, "reset", "closed the connection during the TLS handshake", 503),
        (lambda: OSError(errno.EHOSTUNREACH, "No route to host"), "unreachable", "No route to host", 503),
        (lambda: tls("WRONG_VERSION_NUMBER"), "not_tls", "does not speak TLS", 502),
        (lambda: tls("UNSUPPORTED_PROTOCOL"), "tls_version", "no TLS version", 502),
        (lambda: tls("TLSV1_ALERT_NO_APPLICATION_PROTOCOL"), "http2", "does not speak HTTP/2", 502),
        (lambda: tls("TLSV1_ALERT_UNKNOWN_CA"), "certificate", "its issuer is not among the authorities", 502),
        (lambda: tls("SSLV3_ALERT_CERTIFICATE_REVOKED"), "certificate", "it was revoked", 502),
        (lambda: tls("SSLV3_ALERT_CERTIFICATE_EXPIRED"), "certificate", "it has expired", 502),
        (lambda: tls("TLSV13_ALERT_CERTIFICATE_REQUIRED"), "certificate", "it did not arrive", 502),
        (lambda: tls("SOMETHING_ODD"), "tls", "SOMETHING_ODD", 502),
        (lambda: distrust(62), "name", "does not name the host localhost", 502),
        (lambda: distrust(20), "unknown_ca", "was not issued by the authorities in", 502),
        (lambda: distrust(10), "server_expired", "has expired", 502),
        (lambda: distrust(9), "server_expired", "is not valid yet", 502),
        (lambda: distrust(23), "server_certificate", "because", 502),
        (lambda: ValueError("a secret"), "unforeseen", "ValueError", 502),
    ],
)
def test_each_failure_has_its_sentence(
    site: Site, loaded: Loaded, make: Callable[[], Exception], kind: str, says: str, http: int
) -> None:
    found = trouble.of_connecting(make(), site.settings, loaded)
    assert (found.kind, found.http) == (kind, http)
    assert says in found.what
    assert found.remedy
    assert found.sentence.startswith("appliance connect: ")
    assert "secret" not in found.sentence
    assert len(found.sentence) < 1000  # the wire cuts a status there


def test_an_end_right_after_the_handshake_means_the_certificate_in_tls_13(site: Site, loaded: Loaded) -> None:
    found = trouble.of_silence(ConnectionResetError(), "TLSv1.3", site.settings, loaded)
    assert found.kind == "certificate"
    assert "the appliance refused this client certificate: 'ada', issued by 'Site Root'" in found.what
    assert trouble.of_silence(None, "TLSv1.2", site.settings, loaded).kind == "reset"
    alert = trouble.of_silence(tls("TLSV1_ALERT_UNKNOWN_CA"), "TLSv1.3", site.settings, loaded)
    assert "its issuer is not among the authorities" in alert.what


def test_an_expired_certificate_is_named_as_the_reason(site: Site) -> None:
    site.install(site.make(days_left=-1))
    found = trouble.of_silence(None, "TLSv1.3", site.settings, Credentials(site.settings, {}).loaded)
    assert "'ada' expired on" in found.remedy
    assert str(site.settings.certificate) in found.remedy


def test_without_ca_the_systems_authorities_are_named(site: Site, loaded: Loaded) -> None:
    settings = site.settings.model_copy(update={"ca": None})
    assert "the authorities that this system trusts" in trouble.of_connecting(distrust(20), settings, loaded).what
