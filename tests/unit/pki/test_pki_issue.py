"""Making a root, issuing from it, renewing."""

import ipaddress
import os
import stat
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from appliance.core.errors import CertificateError
from appliance.pki.chain import verify
from appliance.pki.files import Layout
from appliance.pki.inspect import (
    check_server_pair,
    check_trust_bundle,
    extended_key_usages,
    key_matches,
    key_usages,
    server_names,
    signed_by,
)
from appliance.pki.keys import KeyAlgorithm, key_pem, key_type
from appliance.pki.leaf import Subject, issue, renew, request, write_leaf
from appliance.pki.names import client_sans, server_sans
from appliance.pki.profiles import CLIENT, ROOT, SERVER
from appliance.pki.reading import read_certificates, read_key
from appliance.pki.root import create_root, load_root, write_root
from appliance.pki.signing import Issued, certificate_pem

HOSTS = Subject("edge.example.com", server_sans(["edge.example.com", "10.0.0.5", "*.pool.example.com"]), "Acme")
ADA = Subject("ada", client_sans(["uri:spiffe://example.org/ada", "email:ada@example.org"]))


@pytest.fixture
def root(layout: Layout, now: datetime) -> Issued:
    made = create_root("Test Root", "Acme", now)
    write_root(layout, made, replace=False)
    return made


@pytest.fixture
def server(layout: Layout, root: Issued, now: datetime) -> Issued:
    leaf = issue(root, HOSTS, SERVER, now)
    write_leaf(layout, "server", None, leaf, replace=False)
    return leaf


def critical(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> bool:
    return certificate.extensions.get_extension_for_class(kind).critical


def test_a_root_is_what_rfc_5280_and_strict_clients_ask_for(root: Issued, now: datetime) -> None:
    cert = root.certificate
    constraints = cert.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    assert key_usages(cert) == ["keyCertSign", "cRLSign"]
    assert critical(cert, x509.KeyUsage)
    assert extended_key_usages(cert) is None
    subject_key = cert.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    authority_key = cert.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert authority_key.key_identifier == subject_key.digest
    assert cert.not_valid_before_utc == now - timedelta(minutes=5)
    assert cert.not_valid_after_utc == now + timedelta(days=3650)
    assert cert.subject.rfc4514_string() == "CN=Test Root,O=Acme"
    assert check_trust_bundle(certificate_pem(cert), now) == []


def test_a_server_leaf_serves_and_nothing_else(root: Issued, server: Issued, now: datetime) -> None:
    cert = server.certificate
    assert check_server_pair(certificate_pem(cert), key_pem(server.key), None, now) == []
    assert verify([cert], [root.certificate], now) == []
    assert server_names(cert) == ["edge.example.com", "10.0.0.5", "*.pool.example.com"]
    assert cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "edge.example.com"
    assert extended_key_usages(cert) == ["serverAuth"]
    assert key_usages(cert) == ["digitalSignature"]
    assert cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert critical(cert, x509.BasicConstraints)
    assert critical(cert, x509.KeyUsage)
    assert x509.IPAddress(ipaddress.ip_address("10.0.0.5")) in list(
        cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )
    authority_key = cert.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    root_key = root.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert authority_key.key_identifier == root_key.digest


def test_a_client_leaf_is_for_clients(root: Issued, now: datetime) -> None:
    leaf = issue(root, ADA, CLIENT, now)
    assert extended_key_usages(leaf.certificate) == ["clientAuth"]
    assert leaf.certificate.subject.rfc4514_string() == "CN=ada"
    assert verify([leaf.certificate], [root.certificate], now) == []


def test_serials_are_random_positive_and_at_most_20_octets(root: Issued, now: datetime) -> None:
    serials = [issue(root, ADA, CLIENT, now).certificate.serial_number for _ in range(20)]
    assert len(set(serials)) == 20
    assert all(0 < serial < 2**159 for serial in serials)
    assert max(serials).bit_length() > 150


@pytest.mark.parametrize("algorithm", ["ecdsa-p256", "ecdsa-p384", "rsa-3072", "ed25519"])
def test_each_kind_of_key_signs_and_is_signed(algorithm: KeyAlgorithm, now: datetime) -> None:
    root = create_root("Root", None, now, replace(ROOT, key=algorithm))
    leaf = issue(root, ADA, replace(CLIENT, key=algorithm), now)
    assert key_type(leaf.certificate.public_key()) == algorithm
    assert verify([leaf.certificate], [root.certificate], now) == []


def test_ed25519_is_refused_for_a_server_with_the_reason(root: Issued, now: datetime) -> None:
    with pytest.raises(CertificateError, match="gRPC clients"):
        issue(root, HOSTS, replace(SERVER, key="ed25519"), now)
    client_key = issue(root, ADA, replace(CLIENT, key="ed25519"), now).key
    with pytest.raises(CertificateError, match="gRPC clients"):
        issue(root, HOSTS, SERVER, now, key=client_key)


def test_a_leaf_does_not_outlive_its_root(root: Issued, now: datetime) -> None:
    late = now + timedelta(days=3600)
    leaf = issue(root, HOSTS, SERVER, late)
    assert leaf.certificate.not_valid_after_utc == root.certificate.not_valid_after_utc


def test_an_expired_root_signs_nothing(layout: Layout, root: Issued, now: datetime) -> None:
    with pytest.raises(CertificateError, match=r"ca\.crt.*expired"):
        load_root(layout, now + timedelta(days=3651))


def test_without_a_root_the_way_to_one_is_told(layout: Layout, now: datetime) -> None:
    with pytest.raises(CertificateError, match=r"certs init.*certs csr"):
        load_root(layout, now)


def test_the_roots_key_must_belong_to_its_certificate(layout: Layout, root: Issued, maker, now: datetime) -> None:
    layout.ca_certificate.write_bytes(certificate_pem(maker.root().certificate))
    with pytest.raises(CertificateError, match="does not belong"):
        load_root(layout, now)
    layout.ca_certificate.write_bytes(certificate_pem(maker.root().certificate, root.certificate))
    assert load_root(layout, now).certificate == root.certificate


def test_files_lie_where_the_daemon_looks_for_them(layout: Layout, root: Issued, server: Issued, now: datetime) -> None:
    write_leaf(layout, "client", "ada", issue(root, ADA, CLIENT, now), replace=False)
    found = {str(path.relative_to(layout.directory)) for path in layout.directory.rglob("*") if path.is_file()}
    assert found == {"ca.crt", "ca.key", "server.crt", "server.key", "clients/ada.crt", "clients/ada.key"}
    for path in layout.directory.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o037 == 0


def test_writing_over_files_needs_force(layout: Layout, root: Issued, server: Issued, now: datetime) -> None:
    before = layout.key("server").read_bytes()
    other = issue(root, HOSTS, SERVER, now)
    with pytest.raises(CertificateError, match=r"server\.key.*server\.crt.*--force"):
        write_leaf(layout, "server", None, other, replace=False)
    assert layout.key("server").read_bytes() == before
    write_leaf(layout, "server", None, other, replace=True)
    assert key_matches(read_certificates(layout.certificate("server"))[0], read_key(layout.key("server"), None))
    with pytest.raises(CertificateError, match=r"ca\.key"):
        write_root(layout, root, replace=False)


@pytest.mark.parametrize("keep_key", [False, True])
def test_renewal_keeps_names_usages_and_length(
    layout: Layout, root: Issued, server: Issued, now: datetime, keep_key: bool
) -> None:
    later = now + timedelta(days=390)
    path = layout.certificate("server")
    renew(layout, path, later, keep_key=keep_key)
    old, (new,) = server.certificate, read_certificates(path)
    key = read_key(layout.key("server"), None)
    assert key_matches(new, key)
    assert key_matches(old, key) == keep_key
    assert new.serial_number != old.serial_number
    assert (new.subject, server_names(new)) == (old.subject, server_names(old))
    for kind in (x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName, x509.BasicConstraints):
        assert new.extensions.get_extension_for_class(kind) == old.extensions.get_extension_for_class(kind)
    assert new.not_valid_before_utc == later - timedelta(minutes=5)
    assert new.not_valid_after_utc - new.not_valid_before_utc == old.not_valid_after_utc - old.not_valid_before_utc
    assert verify([new], [root.certificate], later) == []


def test_renewal_writes_the_key_before_the_certificate(
    layout: Layout, server: Issued, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that wakes for the certificate finds its key in place."""
    order = []
    real = os.replace

    def watched(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    renew(layout, layout.certificate("server"), now)
    assert order == ["server.key", "server.crt"]


def test_renewal_mends_a_pair_that_an_interruption_tore(layout: Layout, server: Issued, root: Issued, now) -> None:
    torn = issue(root, HOSTS, SERVER, now)
    write_leaf(layout, "client", "torn", torn, replace=False)
    layout.key("server").write_bytes(layout.key("client", "torn").read_bytes())
    with pytest.raises(CertificateError, match="--keep-key"):
        renew(layout, layout.certificate("server"), now, keep_key=True)
    renew(layout, layout.certificate("server"), now)
    (new,) = read_certificates(layout.certificate("server"))
    assert key_matches(new, read_key(layout.key("server"), None))


def test_renewal_refuses_what_another_ca_signed_and_names_the_remedy(
    layout: Layout, root: Issued, maker, now: datetime
) -> None:
    foreign = maker.server(maker.root())
    write_leaf(layout, "server", None, foreign, replace=False)
    before = layout.key("server").read_bytes()
    with pytest.raises(CertificateError, match=r"'Corp Root'.*certs csr.*certs import"):
        renew(layout, layout.certificate("server"), now)
    assert layout.key("server").read_bytes() == before


def test_renewal_refuses_an_impostor_of_our_root(layout: Layout, root: Issued, maker, now: datetime) -> None:
    impostor = maker.make(None, None, ca=True, subject=root.certificate.subject)
    leaf = maker.server(impostor)
    assert not signed_by(leaf.certificate, root.certificate)
    write_leaf(layout, "server", None, leaf, replace=False)
    with pytest.raises(CertificateError, match="certs csr"):
        renew(layout, layout.certificate("server"), now)


def test_a_root_is_not_renewed_in_place(layout: Layout, root: Issued, now: datetime) -> None:
    with pytest.raises(CertificateError, match="certs init --dir"):
        renew(layout, layout.ca_certificate, now)


def test_renewal_touches_no_key_it_cannot_be_sure_of(layout: Layout, server: Issued, tmp_path, now: datetime) -> None:
    path = tmp_path / "server.pem"
    path.write_bytes(certificate_pem(server.certificate))
    with pytest.raises(CertificateError, match=r"NAME\.crt"):
        renew(layout, path, now)


def test_a_request_carries_names_and_usage_and_its_key_waits(layout: Layout) -> None:
    path = request(layout, "server", None, HOSTS, SERVER, replace=False)
    csr = x509.load_pem_x509_csr(path.read_bytes())
    assert csr.is_signature_valid
    assert csr.subject == HOSTS.name()
    names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert tuple(names) == HOSTS.names
    usages = csr.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    pending = layout.pending_key("server")
    assert read_key(pending, None).public_key() == csr.public_key()
    assert stat.S_IMODE(pending.stat().st_mode) & 0o037 == 0
    assert not layout.key("server").exists()


def test_a_pending_request_is_not_overwritten_without_force(layout: Layout) -> None:
    request(layout, "client", "ada", ADA, CLIENT, replace=False)
    before = layout.pending_key("client", "ada").read_bytes()
    with pytest.raises(CertificateError, match=r"ada\.key\.pending.*--force"):
        request(layout, "client", "ada", ADA, CLIENT, replace=False)
    assert layout.pending_key("client", "ada").read_bytes() == before
    request(layout, "client", "ada", ADA, CLIENT, replace=True)
    assert layout.pending_key("client", "ada").read_bytes() != before


def test_a_key_is_not_shown_by_the_objects_that_hold_it(root: Issued) -> None:
    assert "PRIVATE" not in repr(root)
    assert repr(root).startswith("<appliance.pki.signing.Issued object")
