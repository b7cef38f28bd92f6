"""The helpers the daemon reads certificates with."""

import ipaddress
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.core.errors import CertificateError
from appliance.pki.inspect import (
    check_server_pair,
    check_trust_bundle,
    client_identity,
    covers_host,
    days_left,
    key_matches,
    load_certificates,
    load_private_key,
    server_names,
)
from appliance.pki.keys import KEY_ALGORITHMS, KeyAlgorithm, generate, key_pem


def test_certificates_come_in_the_files_order_and_other_blocks_are_skipped(maker, pem) -> None:
    root = maker.root()
    leaf = maker.server(root)
    text = b"Bag Attributes\n" + pem(leaf.key, leaf.certificate, root.certificate)
    assert load_certificates(text) == [leaf.certificate, root.certificate]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not PEM"),
        (b"hello", "not PEM"),
        (b"\xff\xfe\x00", "not PEM"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "damaged"),
        (b"-----BEGIN CERTIFICATE-----\n", "damaged"),
        (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", "CERTIFICATE REQUEST"),
    ],
)
def test_what_is_no_certificate_is_told_apart(content: bytes, says: str) -> None:
    with pytest.raises(CertificateError, match=says):
        load_certificates(content)


def test_der_is_answered_with_the_command_that_converts_it(maker, der) -> None:
    with pytest.raises(CertificateError, match="openssl x509 -inform DER"):
        load_certificates(der(maker.root().certificate))


def test_a_damaged_extension_is_found_when_loading_not_when_serving(maker, pem) -> None:
    broken = x509.UnrecognizedExtension(x509.oid.ExtensionOID.NAME_CONSTRAINTS, b"\x30\x05nope")
    with pytest.raises(CertificateError, match="damaged"):
        load_certificates(pem(maker.make("x", None, more=[broken]).certificate))


@pytest.mark.parametrize("algorithm", KEY_ALGORITHMS)
def test_each_kind_of_key_survives_writing_and_reading(algorithm: KeyAlgorithm) -> None:
    key = generate(algorithm)
    assert load_private_key(key_pem(key), None).public_key() == key.public_key()
    assert load_private_key(key_pem(key, b"secret"), b"secret").public_key() == key.public_key()
    assert load_private_key(key_pem(key), b"not needed").public_key() == key.public_key()


@pytest.mark.parametrize("passphrase", [None, b"open sesame"])
def test_the_traditional_formats_of_openssl_are_read(passphrase: bytes | None) -> None:
    protection = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    for key in (generate("ecdsa-p256"), rsa.generate_private_key(65537, 2048)):
        text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, protection)
        assert load_private_key(text, passphrase).public_key() == key.public_key()


def test_an_encrypted_key_needs_its_own_passphrase() -> None:
    text = key_pem(generate("ecdsa-p256"), b"right")
    with pytest.raises(CertificateError, match="no passphrase"):
        load_private_key(text, None)
    with pytest.raises(CertificateError, match="wrong"):
        load_private_key(text, b"wrong")


def test_a_damaged_key_is_told_without_showing_it() -> None:
    text = key_pem(generate("ecdsa-p256"))
    lines = text.split(b"\n")
    lines[1] = lines[1][:20]
    with pytest.raises(CertificateError, match="damaged") as caught:
        load_private_key(b"\n".join(lines), None)
    assert lines[1].decode() not in str(caught.value) + caught.value.detail
    with pytest.raises(CertificateError, match="not a private key"):
        load_private_key(b"certainly not", None)


def test_keys_that_tls_clients_refuse_are_refused() -> None:
    for key, says in [
        (rsa.generate_private_key(65537, 1024), "2048"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
        (dsa.generate_private_key(2048), "neither"),
    ]:
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with pytest.raises(CertificateError, match=says):
            load_private_key(text, None)


def test_a_key_matches_only_its_own_certificate(maker) -> None:
    root = maker.root()
    one, two = maker.server(root), maker.server(root)
    assert key_matches(one.certificate, one.key)
    assert not key_matches(one.certificate, two.key)
    assert not key_matches(one.certificate, generate("rsa-3072"))


def test_server_names_are_the_alternative_names_never_the_common_name(maker) -> None:
    address = x509.IPAddress(ipaddress.ip_address("2001:db8::1"))
    leaf = maker.make("cn.example.com", maker.root(), names=[x509.DNSName("A.example.com"), address])
    assert server_names(leaf.certificate) == ["a.example.com", "2001:db8::1"]
    assert server_names(maker.make("cn.example.com", maker.root()).certificate) == []


@pytest.mark.parametrize(
    ("host", "covered"),
    [
        ("edge.example.com", True),
        ("EDGE.example.com.", True),
        ("a.pool.example.com", True),
        ("pool.example.com", False),
        (".pool.example.com", False),
        ("a.b.pool.example.com", False),
        ("example.com", False),
        ("", False),
        ("10.0.0.5", True),
        ("10.0.0.6", False),
        ("::1", True),
        ("[::1]", True),
        ("0:0:0:0:0:0:0:1", True),
        ("10.0.0.7", False),
    ],
)
def test_a_host_is_covered_as_rfc_6125_says(maker, host: str, covered: bool) -> None:
    names = [
        x509.DNSName("edge.example.com"),
        x509.DNSName("*.pool.example.com"),
        x509.DNSName("10.0.0.7"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.5")),
        x509.IPAddress(ipaddress.ip_address("::1")),
    ]
    assert covers_host(maker.make("example.com", maker.root(), names=names).certificate, host) == covered


def test_days_left_is_negative_once_expired(maker, now: datetime) -> None:
    certificate = maker.root(end=timedelta(days=2)).certificate
    assert days_left(certificate, now) == 2
    assert days_left(certificate, now + timedelta(days=3)) == -1


def test_a_good_pair_has_no_problems(maker, pem, now: datetime) -> None:
    root = maker.root()
    middle = maker.intermediate(root)
    leaf = maker.server(middle)
    assert check_server_pair(pem(leaf.certificate, middle.certificate), pem(leaf.key), None, now) == []
    encrypted = key_pem(leaf.key, b"secret")
    assert check_server_pair(pem(leaf.certificate, middle.certificate), encrypted, b"secret", now) == []
    only_root = maker.server(root)
    assert check_server_pair(pem(only_root.certificate, root.certificate), pem(only_root.key), None, now) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"start": timedelta(days=-9), "end": timedelta(days=-1)}, "expired on 2026-05-31"),
        ({"start": timedelta(days=1)}, "not valid before 2026-06-02"),
        ({"usages": [ExtendedKeyUsageOID.CLIENT_AUTH]}, "serverAuth"),
        ({"usages": []}, "serverAuth"),
        ({"usages": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]}, "serverAuth"),
        ({"names": []}, "subject alternative name"),
        ({"names": [x509.RFC822Name("a@example.com")]}, "subject alternative name"),
        ({"bits": ("keyEncipherment",)}, "digitalSignature"),
        ({"ca": True, "bits": ("digitalSignature", "keyCertSign")}, "certificate authority"),
    ],
)
def test_each_fault_of_a_server_certificate_is_one_sentence(maker, pem, now, changes, says: str) -> None:
    leaf = maker.server(maker.root(), **changes)
    problems = check_server_pair(pem(leaf.certificate), pem(leaf.key), None, now)
    assert len(problems) == 1
    assert says in problems[0]


def test_the_key_of_another_certificate_is_found(maker, pem, now: datetime) -> None:
    root = maker.root()
    problems = check_server_pair(pem(maker.server(root).certificate), pem(maker.server(root).key), None, now)
    assert len(problems) == 1
    assert "does not belong" in problems[0]


def test_a_chain_in_the_wrong_order_is_found(maker, pem, now: datetime) -> None:
    root = maker.root()
    upper = maker.intermediate(root, "Upper")
    lower = maker.intermediate(upper, "Lower")
    leaf = maker.server(lower)
    swapped = pem(leaf.certificate, upper.certificate, lower.certificate)
    problems = check_server_pair(swapped, pem(leaf.key), None, now)
    assert any("out of order" in problem and "'Lower' must follow" in problem for problem in problems)
    last = pem(lower.certificate, upper.certificate, leaf.certificate)
    assert any("not the first" in problem for problem in check_server_pair(last, pem(leaf.key), None, now))
    hole = pem(leaf.certificate, upper.certificate)
    assert any("out of order" in problem for problem in check_server_pair(hole, pem(leaf.key), None, now))


def test_an_expired_intermediate_is_found(maker, pem, now: datetime) -> None:
    middle = maker.intermediate(maker.root(), end=timedelta(days=-1))
    leaf = maker.server(middle)
    problems = check_server_pair(pem(leaf.certificate, middle.certificate), pem(leaf.key), None, now)
    assert len(problems) == 1
    assert "'Corp Issuing' expired" in problems[0]


def test_rubbish_in_a_pair_is_a_sentence_not_an_exception(maker, pem, now: datetime) -> None:
    leaf = maker.server(maker.root())
    assert check_server_pair(b"\0\1", b"\2", None, now)
    assert "not a private key" in check_server_pair(pem(leaf.certificate), b"", None, now)[0]
    assert "no passphrase" in check_server_pair(pem(leaf.certificate), key_pem(leaf.key, b"x"), None, now)[0]


def test_a_bundle_of_old_and_new_roots_is_fine_while_one_is_valid(maker, pem, now: datetime) -> None:
    old, new = maker.root("Old", end=timedelta(days=-1)), maker.root("New")
    assert check_trust_bundle(pem(old.certificate, new.certificate), now) == []
    assert "expired" in check_trust_bundle(pem(old.certificate), now)[0]
    assert "not valid before" in check_trust_bundle(pem(maker.root(start=timedelta(days=1)).certificate), now)[0]


def test_only_authorities_belong_in_a_bundle(maker, pem, now: datetime) -> None:
    root = maker.root()
    problems = check_trust_bundle(pem(root.certificate, maker.server(root).certificate), now)
    assert len(problems) == 1
    assert "not a certificate authority" in problems[0]
    assert "keyCertSign" in check_trust_bundle(pem(maker.root(bits=("cRLSign",)).certificate), now)[0]
    assert "not PEM" in check_trust_bundle(b"", now)[0]


def test_an_identity_is_typed_and_ordered(maker, pem, now: datetime) -> None:
    names = [
        x509.RFC822Name("Ada@example.com"),
        x509.DNSName("Worker.example.com"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.5")),
        x509.UniformResourceIdentifier("spiffe://example.org/ada"),
    ]
    leaf = maker.client(maker.root(), "ada", names=names)
    identity = client_identity(pem(leaf.certificate))
    assert identity.names == ("uri:spiffe://example.org/ada", "dns:worker.example.com", "email:Ada@example.com")
    assert identity.client_auth
    assert identity.serial == f"{leaf.certificate.serial_number:x}"
    assert len(identity.fingerprint) == 64
    assert (identity.not_before, identity.not_after) == (now - timedelta(days=10), now + timedelta(days=100))


def test_the_common_name_speaks_only_where_no_alternative_name_does(maker, pem) -> None:
    root = maker.root()
    assert client_identity(pem(maker.client(root, "Ada").certificate)).names == ("cn:Ada",)
    with_ip = maker.client(root, "Ada", names=[x509.IPAddress(ipaddress.ip_address("10.0.0.5"))])
    assert client_identity(pem(with_ip.certificate)).names == ("cn:Ada",)
    assert client_identity(pem(maker.client(root, None, names=[x509.DNSName("a.b")]).certificate)).names == ("dns:a.b",)


def test_a_directorys_path_in_the_subject_is_not_an_identity(maker, pem) -> None:
    """CN=Users is a folder that thousands share; matching it would let all of them in."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("Users", "Ada")])
    assert client_identity(pem(maker.client(maker.root(), subject=subject).certificate)).names == ("cn:Ada",)


def test_client_auth_is_false_without_the_extension(maker, pem) -> None:
    root = maker.root()
    assert not client_identity(pem(maker.client(root, usages=[]).certificate)).client_auth
    assert not client_identity(pem(maker.server(root).certificate)).client_auth
    any_usage = maker.client(root, usages=[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
    assert not client_identity(pem(any_usage.certificate)).client_auth


def test_an_identity_of_rubbish_is_refused() -> None:
    with pytest.raises(CertificateError):
        client_identity(b"rubbish")
