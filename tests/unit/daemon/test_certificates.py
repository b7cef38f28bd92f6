"""The files behind the ports, in real handshakes in memory: who is let in, what is shown, and what a change changes."""

import errno
import logging
import os
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import Name, NameAttribute, ReasonFlags
from cryptography.x509.oid import NameOID
from support.handshake import shake_hands

from appliance.core.config import Auth, Config, Server, Tls
from appliance.core.errors import CertificateError
from appliance.daemon import certificates
from appliance.daemon.certificates import CertificateFiles
from appliance.pki import inspect
from appliance.pki.files import Layout
from appliance.pki.inspect import client_identity
from appliance.pki.keys import generate, key_pem
from appliance.pki.leaf import Subject, issue, write_leaf
from appliance.pki.names import client_sans, server_sans
from appliance.pki.profiles import CLIENT, ROOT, SERVER
from appliance.pki.revocation import RevocationList, renew_list, serial_of, sign_list
from appliance.pki.root import create_root, write_root
from appliance.pki.signing import Issued, certificate_pem, sign

NOW = datetime.now(UTC)


def encoded(signed: RevocationList) -> bytes:
    """A revocation list as PEM."""
    return signed.crl.public_bytes(serialization.Encoding.PEM)


class Site:
    """A folder of certificates as `appliance certs` leaves it, with a client `ada`."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(folder)
        self.root = create_root("Site Root", None, NOW)
        write_root(self.layout, self.root, replace=False)
        self.serve("localhost")
        write_leaf(self.layout, "client", "ada", self.client("ada"), replace=False)

    def client(self, name: str) -> Issued:
        return issue(self.root, Subject(name, client_sans([f"uri:spiffe://site/{name}"])), CLIENT, NOW)

    def server(self, *names: str, **changes: Any) -> Issued:
        return issue(self.root, Subject(names[0], server_sans(names)), replace(SERVER, **changes), NOW)

    def serve(self, *names: str) -> None:
        """Put a new server certificate in place."""
        write_leaf(self.layout, "server", None, self.server(*names), replace=True)

    def other(self, stem: str, *names: str) -> Path:
        """A further certificate, for SNI."""
        leaf = self.server(*names)
        path = self.layout.directory / f"{stem}.crt"
        path.write_bytes(certificate_pem(leaf.certificate))
        path.with_suffix(".key").write_bytes(key_pem(leaf.key))
        return path

    def config(self, require: Any = "key", mtls: str | None = None, **tls: Any) -> Config:
        paths = {
            "certificate": self.layout.certificate("server"),
            "key": self.layout.key("server"),
            "client_ca": self.layout.ca_certificate,
        }
        return Config(server=Server(mtls_listen=mtls), auth=Auth(require=require), tls=Tls(**{**paths, **tls}))

    def files(self, **tls: Any) -> CertificateFiles:
        return CertificateFiles(self.config(**tls))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "tls")


def client_context(site: Site, identity: Issued | None = None, alpn: tuple[str, ...] = ("h2",)) -> ssl.SSLContext:
    """A client that trusts the site's root."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=certificate_pem(site.root.certificate).decode())
    context.check_hostname = False
    context.set_alpn_protocols(list(alpn))
    if identity is not None:
        path = site.layout.directory / "presented.pem"
        path.write_bytes(key_pem(identity.key) + certificate_pem(identity.certificate))
        context.load_cert_chain(path)
    return context


def shown(server: ssl.SSLContext, site: Site, host: str | None = "localhost") -> set[str]:
    """The DNS names of the certificate that a client which asks for `host` is shown."""
    certificate = shake_hands(server, client_context(site), host)[1].getpeercert()
    assert certificate is not None
    return {str(value) for kind, value in certificate["subjectAltName"] if kind == "DNS"}  # type: ignore[misc]


# ---- one handshake ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(("h2",), "h2"), (("http/1.1",), "http/1.1"), (("http/1.1", "h2"), "h2"), (("spdy/3",), None)],
)
def test_both_protocols_are_spoken(site: Site, offered: tuple[str, ...], chosen: str | None) -> None:
    server, _ = shake_hands(site.files().context(), client_context(site, alpn=offered))
    assert server.selected_alpn_protocol() == chosen


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_every_cipher_has_forward_secrecy_and_is_authenticated(site: Site, version: ssl.TLSVersion) -> None:
    client = client_context(site)
    client.minimum_version = client.maximum_version = version
    server, _ = shake_hands(site.files().context(), client)
    name = (server.cipher() or ("",))[0]
    assert "GCM" in name or "CHACHA20" in name
    assert name.startswith(("ECDHE", "TLS_"))


def test_a_client_with_old_ciphers_only_is_refused(site: Site) -> None:
    client = client_context(site)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("ECDHE+AES128+SHA256:AES128-GCM-SHA256:AES128-SHA:@SECLEVEL=0")
    client.set_ciphers("AES128-GCM-SHA256:AES128-SHA:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"(?i)no.shared.cipher|handshake.failure"):
        shake_hands(site.files().context(), client)


def test_tls_1_1_is_refused(site: Site) -> None:
    client = client_context(site)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.protocol|protocol.version"):
        shake_hands(site.files().context(), client)


def test_a_client_certificate_is_asked_for_and_not_needed(site: Site) -> None:
    context = site.files().context()
    assert shake_hands(context, client_context(site))[0].getpeercert(True) is None
    pem = ssl.DER_cert_to_PEM_cert(
        shake_hands(context, client_context(site, site.client("ada")))[0].getpeercert(True) or b""
    )
    assert client_identity(pem.encode()).names == ("uri:spiffe://site/ada",)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_certificate_of_a_stranger_ends_the_handshake(site: Site, version: ssl.TLSVersion) -> None:
    """Whoever shows one must show a good one, where none is needed too."""
    stranger = issue(create_root("Site Root", None, NOW), Subject("ada", ()), CLIENT, NOW)
    client = client_context(site, stranger)
    client.maximum_version = version
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(site.files().context(), client)


def test_a_port_that_demands_a_certificate_gets_one(site: Site) -> None:
    context = site.files().context(demand=True)
    shake_hands(context, client_context(site, site.client("ada")))
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake_hands(context, client_context(site))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_authority_in_the_bundle_needs_no_root(site: Site, tmp_path: Path, version: ssl.TLSVersion) -> None:
    """A site may believe one issuing CA, and not its whole root."""
    root, key = create_root("Corp Root", None, NOW, replace(ROOT, path_length=None)), generate("ecdsa-p256")
    authority = sign(
        subject=Name([NameAttribute(NameOID.COMMON_NAME, "Corp Issuing")]),
        key=key,
        issuer=root.certificate,
        issuer_key=root.key,
        period=(NOW - timedelta(days=1), NOW + timedelta(days=9)),
        extensions=ROOT.extensions(),
    )
    bundle = tmp_path / "issuing.pem"
    bundle.write_bytes(certificate_pem(authority))
    client = client_context(site, issue(Issued(authority, key), Subject("ada", ()), replace(CLIENT, days=5), NOW))
    client.maximum_version = version
    server, _ = shake_hands(site.files(client_ca=bundle).context(), client)
    assert server.getpeercert(True)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_tickets_are_given(site: Site, version: ssl.TLSVersion) -> None:
    """A resumed connection would bring the client's certificate without its chain."""
    client = client_context(site)
    client.maximum_version = version
    _, end = shake_hands(site.files().context(), client)
    assert end.session is None or not end.session.has_ticket


# ---- which files are there -------------------------------------------------------------------------------------------


def test_without_a_bundle_no_certificate_is_asked_for(site: Site) -> None:
    site.layout.ca_certificate.unlink()
    files = site.files()
    server, _ = shake_hands(files.context(), client_context(site, site.client("ada")))
    assert server.getpeercert(True) is None
    assert files.trust().authorities == ()
    with pytest.raises(CertificateError, match=r"tls\.client_ca"):
        files.context(demand=True)


@pytest.mark.parametrize(
    ("changes", "who"),
    [
        ({"require": "certificate"}, 'auth.require = "certificate"'),
        ({"require": "both"}, 'auth.require = "both"'),
        ({"mtls": "127.0.0.1:0"}, "server.mtls_listen"),
        ({"crl": Path("/nowhere/crl.pem")}, "tls.crl"),
    ],
)
def test_a_bundle_that_is_needed_must_be_there(site: Site, changes: dict[str, Any], who: str) -> None:
    site.layout.ca_certificate.unlink()
    with pytest.raises(CertificateError) as error:
        CertificateFiles(site.config(**changes))
    assert f"{site.layout.ca_certificate} (tls.client_ca), and {who} needs" in str(error.value)


def test_a_bundle_that_is_a_link_to_nowhere_is_a_fault(site: Site) -> None:
    """Only a name that is not there means that no certificates are wanted."""
    site.layout.ca_certificate.unlink()
    site.layout.ca_certificate.symlink_to("/nowhere/ca.crt")
    with pytest.raises(CertificateError, match=r"ca\.crt"):
        site.files()


def test_everything_that_is_wrong_is_said_at_once(site: Site) -> None:
    other = site.other("lab", "lab.example.com")
    other.with_suffix(".key").write_bytes(b"broken")
    site.layout.key("server").unlink()
    site.layout.ca_certificate.write_bytes(b"broken")
    with pytest.raises(CertificateError) as error:
        site.files(sni_certificates=(other,))
    for name in ("server.key", "lab.key", "ca.crt"):
        assert name in str(error.value)


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_key_with_a_passphrase_is_served(site: Site, encrypted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never lies decrypted in a file: what `ssl` is given is a copy in memory of what was read."""
    path = site.layout.key("server")
    leaf = site.server("localhost")
    site.layout.certificate("server").write_bytes(certificate_pem(leaf.certificate))
    path.write_bytes(key_pem(leaf.key, b"secret" if encrypted else None))
    loaded: list[bytes] = []
    real = ssl.SSLContext.load_cert_chain

    def spy(context: ssl.SSLContext, chain: str, key: str, password: Any) -> None:
        assert os.readlink(key).startswith("/memfd:")
        loaded.append(Path(key).read_bytes())
        real(context, chain, key, password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", spy)
    before = len(os.listdir("/proc/self/fd"))
    files = site.files(key_passphrase="secret")
    assert set(loaded) == {path.read_bytes()}
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.undo()
    shake_hands(files.context(), client_context(site))


@pytest.mark.parametrize("passphrase", [None, "wrong"])
def test_a_passphrase_that_does_not_fit_is_said_and_not_shown(site: Site, passphrase: str | None) -> None:
    leaf = site.server("localhost")
    site.layout.certificate("server").write_bytes(certificate_pem(leaf.certificate))
    site.layout.key("server").write_bytes(key_pem(leaf.key, b"secret"))
    with pytest.raises(CertificateError, match="passphrase") as error:
        site.files(key_passphrase=passphrase)
    assert "wrong." in str(error.value) or passphrase is None


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(site: Site) -> CertificateFiles:
    """The main certificate and three more, one with a wildcard."""
    site.serve("localhost", "main.example.com", "*.example.org")
    others = (
        site.other("lab", "lab.example.com", "xn--bcher-kva.example"),
        site.other("pool", "*.example.com", "*.example.org"),
        site.other("more", "main.example.com", "a.example.org"),
    )
    return site.files(sni_certificates=others)


@pytest.mark.parametrize("demand", [False, True])
@pytest.mark.parametrize(
    ("asked", "owner"),
    [
        ("lab.example.com", "lab.example.com"),
        ("LAB.Example.COM", "lab.example.com"),
        ("bücher.example", "lab.example.com"),
        ("x.example.com", "*.example.com"),
        ("main.example.com", "localhost"),  # the main certificate comes first
        ("b.example.org", "localhost"),
        ("a.example.org", "a.example.org"),  # a whole name comes before a wildcard
        ("x.y.example.com", "localhost"),  # a wildcard is one label
        ("example.com", "localhost"),
        ("elsewhere.test", "localhost"),
        (None, "localhost"),
    ],
)
def test_the_name_asked_for_chooses_the_certificate(
    site: Site, named: CertificateFiles, asked: str | None, owner: str, demand: bool
) -> None:
    client = client_context(site, site.client("ada") if demand else None)
    server, end = shake_hands(named.context(demand=demand), client, asked)
    certificate = end.getpeercert()
    assert certificate is not None
    assert owner in {value for _, value in certificate["subjectAltName"]}
    assert server.selected_alpn_protocol() == "h2"


def test_client_certificates_are_judged_alike_under_every_name(site: Site, named: CertificateFiles) -> None:
    stranger = issue(create_root("Other", None, NOW), Subject("ada", ()), CLIENT, NOW)
    for host in ("localhost", "lab.example.com"):
        server, _ = shake_hands(named.context(), client_context(site, site.client("ada")), host)
        assert server.getpeercert(True)
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(named.context(), client_context(site, stranger), host)
        with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN"):
            shake_hands(named.context(demand=True), client_context(site), host)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # `ssl` cannot decode it, and says so
def test_a_hostile_name_ends_its_own_handshake_alone(site: Site, named: CertificateFiles) -> None:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client_context(site).wrap_bio(down, up, server_hostname="lab.example.com").do_handshake()
    up.write(up.read().replace(b"lab.example.com", b"\xff\xfe\xfd.example.com"))
    with pytest.raises(ssl.SSLError, match="CALLBACK_FAILED"):
        named.context().wrap_bio(up, down, server_side=True).do_handshake()
    assert shown(named.context(), site, "lab.example.com") == {"lab.example.com", "xn--bcher-kva.example"}


def test_a_further_certificate_without_a_name_is_refused(site: Site) -> None:
    with pytest.raises(CertificateError, match="has no DNS name"):
        site.files(sni_certificates=(site.other("lab", "10.0.0.1"),))


def test_the_end_of_every_certificate_is_told(site: Site, named: CertificateFiles) -> None:
    assert set(named.expiry) == {"server", "client_ca", "sni:lab", "sni:pool", "sni:more"}
    assert all(
        abs(end - (NOW + timedelta(days=397)).timestamp()) < 10
        for role, end in named.expiry.items()
        if role != "client_ca"
    )


# ---- changes ---------------------------------------------------------------------------------------------------------


def test_a_change_is_for_new_handshakes_alone(site: Site) -> None:
    files = site.files()
    before = files.context()
    server, client = shake_hands(before, client_context(site))
    site.serve("localhost", "new.example.com")
    files.refresh()
    assert "new.example.com" in shown(files.context(), site)
    client.write(b"still here")
    assert server.read(10) == b"still here"


def test_the_context_is_made_once(site: Site) -> None:
    files = site.files()
    first, demanding = files.context(), files.context(demand=True)
    files.refresh()
    assert files.context() is first
    assert files.context(demand=True) is demanding
    os.utime(site.layout.certificate("server"))
    files.refresh()
    assert files.context() is not first


def test_bad_files_keep_the_last_good_ones(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """All of them or none: half of a change is no state that anybody wants."""
    lab = site.other("lab", "lab.example.com")
    files = site.files(sni_certificates=(lab,))
    before = files.context(), files.trust()
    site.serve("localhost", "new.example.com")
    lab.with_suffix(".key").write_bytes(b"broken")
    for _ in range(3):
        files.refresh()
    assert caplog.text.count("the ones before stay") == 1
    assert files.context() is before[0]
    site.other("lab", "lab2.example.com")
    files.refresh()
    assert shown(files.context(), site, "lab2.example.com") == {"lab2.example.com"}
    assert "new.example.com" in shown(files.context(), site)


def test_files_whose_rights_are_mended_are_taken_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who copies a key and then gives it to the service changes neither its size nor the time of its content."""
    files = site.files()
    site.serve("localhost", "new.example.com")
    key = site.layout.key("server")
    key.chmod(0)
    really_open = Path.open

    def open_as_service(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == key and not path.stat().st_mode & 0o400:  # root, who may run this test, may read everything
            raise PermissionError(errno.EACCES, "Permission denied")
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_as_service)
    files.refresh()
    assert shown(files.context(), site) == {"localhost"}
    before = key.stat().st_ctime_ns
    while key.stat().st_ctime_ns == before:  # the clock of files is coarse
        key.chmod(0o640)
    files.refresh()
    assert "new.example.com" in shown(files.context(), site)


def test_a_certificate_of_tomorrow_is_taken_over_tomorrow(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody touches its file again; and what is wrong with it is said once, however often it is tried."""
    files = site.files()
    tomorrow = NOW + timedelta(days=1)
    hosts = Subject("new.example.com", server_sans(["new.example.com"]))
    write_leaf(site.layout, "server", None, issue(site.root, hosts, SERVER, tomorrow), replace=True)
    start = time.monotonic()
    for seconds in (0.0, 1.0, 100.0, 200.0):
        monkeypatch.setattr(certificates.time, "monotonic", lambda now=start + seconds: now)
        files.refresh()
    assert caplog.text.count("is not valid before") == 1
    assert shown(files.context(), site) == {"localhost"}

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Tomorrow":
            return cls.fromtimestamp((tomorrow + timedelta(hours=1)).timestamp(), tz)

    monkeypatch.setattr(certificates, "datetime", Tomorrow)
    monkeypatch.setattr(certificates.time, "monotonic", lambda: start + 300.0)
    files.refresh()
    assert set(inspect.server_names(inspect.load_certificates(files.tls().chain)[0])) == {"new.example.com"}


def test_want_of_descriptors_does_not_cost_a_renewed_certificate(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a fault like others: said, and tried again."""
    files = site.files()
    site.serve("localhost", "new.example.com")

    def none_left(*_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", none_left)
        files.refresh()
    assert "Too many open files" in caplog.text
    assert shown(files.context(), site) == {"localhost"}
    later = time.monotonic() + 100
    monkeypatch.setattr(certificates.time, "monotonic", lambda: later)
    files.refresh()
    assert "new.example.com" in shown(files.context(), site)


def test_a_bundle_that_vanishes_is_a_fault_until_a_reload(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A file on its way must not lock out everybody with a certificate."""
    files = site.files()
    context = files.context()
    site.layout.ca_certificate.unlink()
    files.refresh()
    assert files.context() is context
    assert "is gone" in caplog.text
    files.reload(files.config)
    assert files.context().verify_mode == ssl.CERT_NONE


def test_a_reload_with_bad_files_changes_nothing(site: Site) -> None:
    files = site.files()
    before = files.context(), files.trust(), files.config
    site.layout.key("server").write_bytes(b"broken")
    with pytest.raises(CertificateError):
        files.reload(site.config(crl=site.layout.crl))
    assert (files.context(), files.trust(), files.config) == before


def test_an_authority_that_is_taken_out_is_not_believed_any_more(site: Site) -> None:
    """On live connections: their certificate is judged anew on every request."""
    files = site.files()
    ada = site.layout.certificate("client", "ada").read_bytes()
    root = site.layout.ca_certificate.read_bytes()
    assert files.trust().problem(ada, root, NOW) is None
    site.layout.ca_certificate.write_bytes(certificate_pem(create_root("New Root", None, NOW).certificate))
    files.refresh()
    assert "does not trust" in str(files.trust().problem(ada, root, NOW))


# ---- revocation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(site: Site) -> Callable[[CertificateFiles], str]:
    """Why ada is refused, or nothing."""
    ada, root = site.layout.certificate("client", "ada").read_bytes(), site.layout.ca_certificate.read_bytes()
    return lambda files: files.trust().problem(ada, root, datetime.now(UTC)) or ""


def revoke_ada(site: Site) -> None:
    now = datetime.now(UTC)
    renew_list(site.layout, now, 30, (serial_of(site.layout, "ada", now), ReasonFlags.unspecified))


def test_a_list_that_changes_counts_from_then_on(site: Site, refused: Any) -> None:
    """And the contexts stay: nothing about handshakes changed."""
    renew_list(site.layout, NOW, 30)
    files = site.files(crl=site.layout.crl)
    context = files.context()
    assert refused(files) == ""
    revoke_ada(site)
    files.refresh()
    assert "was revoked by 'Site Root'" in refused(files)
    assert files.context() is context
    shake_hands(context, client_context(site, site.client("bob")))


def test_a_list_that_could_not_be_read_is_tried_again(
    site: Site, refused: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else want of descriptors, which clients can bring about, would keep a revocation out for good. Said once."""
    renew_list(site.layout, NOW, 30)
    files = site.files(crl=site.layout.crl)
    revoke_ada(site)
    real, start = Path.open, time.monotonic()

    def none_left(path: Path, *words: Any) -> Any:
        if path == site.layout.crl:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *words)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", none_left)
        for later in (0, 100):
            patch.setattr(certificates.time, "monotonic", lambda later=later: start + later)
            files.refresh()
    assert refused(files) == ""
    assert caplog.text.count("Too many open files") == 1
    monkeypatch.setattr(certificates.time, "monotonic", lambda: start + 200)
    files.refresh()
    assert "was revoked" in refused(files)


def test_a_list_must_be_there_and_good_at_start(site: Site) -> None:
    """There is no last good one."""
    with pytest.raises(CertificateError, match=r"crl\.pem.*appliance certs crl"):
        site.files(crl=site.layout.crl)
    site.layout.crl.write_bytes(b"broken")
    with pytest.raises(CertificateError, match=r"crl\.pem \(tls\.crl\): "):
        site.files(crl=site.layout.crl)


@pytest.mark.parametrize("policy", ["last_good", "strict"])
@pytest.mark.parametrize("content", [b"", b"broken", None])
def test_a_list_that_becomes_bad_keeps_the_last_good_one(
    site: Site, refused: Any, policy: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is current, so that strict is content too; and a new certificate is taken over all the same."""
    revoke_ada(site)
    files = site.files(crl=site.layout.crl, crl_policy=policy)
    if content is None:
        site.layout.crl.unlink()
    else:
        site.layout.crl.write_bytes(content)
    site.serve("localhost", "new.example.com")
    for _ in range(3):
        files.refresh()
    assert caplog.text.count("revocation lists are not taken over") == 1
    assert "was revoked" in refused(files)
    assert "new.example.com" in shown(files.context(), site)


def test_a_list_out_of_date_is_complained_of_at_every_change_and_hourly(
    site: Site, refused: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = sign_list(site.root, [], 1, NOW - timedelta(days=40), 30)
    site.layout.crl.write_bytes(encoded(stale))
    files = site.files(crl=site.layout.crl)
    said = []
    for seconds in (0.0, 10.0, 3599.0, 3601.0):
        monkeypatch.setattr(certificates.time, "monotonic", lambda now=seconds: now)
        files.refresh()
        said.append(caplog.text.count("goes on being used"))
    assert said == [1, 1, 1, 2]
    assert refused(files) == ""
    assert len(files.stale_lists()) == 1
    assert files.crl_next_update == {"CN=Site Root": stale.next_update.timestamp()}
    renew_list(site.layout, NOW, 30)
    files.refresh()
    assert files.stale_lists() == []


def test_strict_refuses_certificates_until_there_is_a_current_list(
    site: Site, refused: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The handshake goes on, for those who bring a key as well."""
    site.layout.crl.write_bytes(encoded(sign_list(site.root, [], 1, NOW - timedelta(days=40), 30)))
    files = site.files(crl=site.layout.crl, crl_policy="strict")
    files.refresh()
    assert "no current revocation list" in refused(files)
    assert "are refused until then" in caplog.text
    shake_hands(files.context(), client_context(site, site.client("ada")))
    renew_list(site.layout, NOW, 30)
    files.refresh()
    assert refused(files) == ""


def test_strict_tells_of_an_authority_without_a_list(site: Site) -> None:
    renew_list(site.layout, NOW, 30)
    with site.layout.ca_certificate.open("ab") as bundle:
        bundle.write(certificate_pem(create_root("Other", None, NOW).certificate))
    assert site.files(crl=site.layout.crl).stale_lists() == []
    (sentence,) = site.files(crl=site.layout.crl, crl_policy="strict").stale_lists()
    assert "no revocation list of 'Other'" in sentence


def test_a_new_authority_may_come_after_its_list(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two files are never replaced in one moment."""
    renew_list(site.layout, NOW, 30)
    files = site.files(crl=site.layout.crl)
    other = create_root("Other", None, NOW)
    site.layout.crl.write_bytes(site.layout.crl.read_bytes() + encoded(sign_list(other, [], 1, NOW, 30)))
    files.refresh()
    assert "belongs to no authority" in caplog.text
    with site.layout.ca_certificate.open("ab") as bundle:
        bundle.write(certificate_pem(other.certificate))
    files.refresh()
    assert set(files.crl_next_update) == {"CN=Site Root", "CN=Other"}


def test_no_key_is_in_a_log_or_a_repr(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    files = site.files()
    secret = site.layout.key("server").read_text().splitlines()[1]
    site.layout.key("server").write_bytes(key_pem(generate("ecdsa-p256")))
    files.refresh()
    assert "does not belong" in caplog.text
    assert secret not in caplog.text + repr(files) + repr(vars(files))


def test_a_look_that_began_before_a_reload_does_not_bring_the_old_files_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both run on threads of their own, and replacing the files and sending SIGHUP is how certificates are rotated."""
    config = site.config()
    files = CertificateFiles(config)
    read, looking, go_on = certificates._read_shown, threading.Event(), threading.Event()

    def slowly(*arguments: Any, **options: Any) -> Any:
        shown = read(*arguments, **options)
        if threading.current_thread().name == "look":
            looking.set()
            assert go_on.wait(60)
        return shown

    monkeypatch.setattr(certificates, "_read_shown", slowly)
    os.utime(site.layout.certificate("server"))
    look = threading.Thread(target=files.refresh, name="look")
    look.start()
    assert looking.wait(60)
    site.serve("localhost")
    reload = threading.Thread(target=files.reload, args=(config,))
    reload.start()
    go_on.set()
    look.join(60)
    reload.join(60)
    assert files.tls().chain == site.layout.certificate("server").read_bytes()
