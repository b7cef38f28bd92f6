"""What making a root and making a leaf have in common."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from appliance.pki.keys import PrivateKey, signature_hash
from appliance.pki.profiles import Profile


@dataclass(frozen=True, repr=False)
class Issued:
    """A certificate and its key. It has no repr, so that no traceback shows a key."""

    certificate: x509.Certificate
    key: PrivateKey


def validity(profile: Profile, now: datetime) -> tuple[datetime, datetime]:
    """Return notBefore and notAfter: whole seconds, the start set back for clocks that are slow."""
    start = now.replace(microsecond=0)
    return start - timedelta(minutes=profile.backdate_minutes), start + timedelta(days=profile.days)


def sign(
    *,
    subject: x509.Name,
    key: PrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: PrivateKey,
    period: tuple[datetime, datetime],
    extensions: Iterable[tuple[x509.ExtensionType, bool]],
) -> x509.Certificate:
    """Return a certificate with the extensions given and both key identifiers; `issuer` None signs it with itself.

    The serial number is random, 159 bits. Source: RFC 5280, sections 4.1.2.2 (at most 20 octets, positive), 4.2.1.1
    and 4.2.1.2 (key identifiers, not critical); CA/Browser Forum baseline requirements, 7.1 (64 bits or more).
    """
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(period[0])
        .not_valid_after(period[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority_key_identifier(issuer, issuer_key), critical=False)
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(issuer_key, signature_hash(issuer_key))


def certificate_pem(*certificates: x509.Certificate) -> bytes:
    """Return the certificates as one PEM text."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def authority_key_identifier(issuer: x509.Certificate | None, issuer_key: PrivateKey) -> x509.AuthorityKeyIdentifier:
    """Return what says whose key signed; `issuer` is None where a root signs itself."""
    if issuer is not None:
        # A CA not made here may have hashed its key in another way: repeat what its certificate says.
        for extension in issuer.extensions:
            if isinstance(extension.value, x509.SubjectKeyIdentifier):
                return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(extension.value)
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
