"""Certificates for the tests, good ones and every kind of bad one, made by a builder that allows what ours does not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.pki.files import Layout
from appliance.pki.keys import PrivateKey, key_pem
from appliance.pki.profiles import key_usage
from appliance.pki.signing import Issued, certificate_pem

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass
class Maker:
    """Makes certificates with any content; everything is valid around `now`, unless told otherwise."""

    now: datetime
    counter: int = field(default=1)

    def root(self, name: str = "Corp Root", **changes: object) -> Issued:
        return self.make(name, None, ca=True, **changes)

    def intermediate(self, parent: Issued, name: str = "Corp Issuing", **changes: object) -> Issued:
        return self.make(name, parent, ca=True, **changes)

    def server(self, parent: Issued, *hosts: str, **changes: object) -> Issued:
        names = [x509.DNSName(host) for host in hosts or ("edge.example.com",)]
        return self.make("edge.example.com", parent, **{"names": names, "usages": [SERVER], **changes})

    def client(self, parent: Issued, name: str = "ada", **changes: object) -> Issued:
        return self.make(name, parent, **{"usages": [CLIENT], **changes})

    def make(
        self,
        name: str | None,
        parent: Issued | None,
        *,
        ca: bool = False,
        path_length: int | None = None,
        names: Sequence[x509.GeneralName] = (),
        usages: Sequence[x509.ObjectIdentifier] = (),
        bits: tuple[str, ...] | None = (),
        start: timedelta = timedelta(days=-10),
        end: timedelta = timedelta(days=100),
        key: PrivateKey | None = None,
        more: Sequence[x509.ExtensionType] = (),
        subject: x509.Name | None = None,
        algorithm: hashes.HashAlgorithm | None = None,
    ) -> Issued:
        self.counter += 1
        key = key or ec.generate_private_key(ec.SECP256R1())
        own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) if name else x509.Name([])
        own = subject or own
        signer = parent.key if parent else key
        builder = (
            x509.CertificateBuilder()
            .subject_name(own)
            .issuer_name(parent.certificate.subject if parent else own)
            .public_key(key.public_key())
            .serial_number(self.counter)
            .not_valid_before(self.now + start)
            .not_valid_after(self.now + end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if bits is not None:
            default = ("keyCertSign", "cRLSign") if ca else ("digitalSignature",)
            builder = builder.add_extension(key_usage(bits or default), critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not own.rdns)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        for extension in more:
            builder = builder.add_extension(extension, critical=True)
        return Issued(builder.sign(signer, algorithm or hashes.SHA256()), key)


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
def maker() -> Maker:
    return Maker(NOW)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "tls")


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Write certificates, a key or bytes to a file of that name, and return its path."""

    def write(name: str, *content: x509.Certificate | PrivateKey | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(as_bytes(part) for part in content))
        return path

    return write


def as_bytes(part: x509.Certificate | PrivateKey | bytes) -> bytes:
    if isinstance(part, bytes):
        return part
    return certificate_pem(part) if isinstance(part, x509.Certificate) else key_pem(part)


@pytest.fixture
def pem() -> Callable[..., bytes]:
    """Join certificates and keys as PEM."""
    return lambda *parts: b"".join(as_bytes(part) for part in parts)


@pytest.fixture
def der() -> Callable[[x509.Certificate], bytes]:
    return lambda certificate: certificate.public_bytes(serialization.Encoding.DER)
