"""Reading certificates and keys: what they say, and what is wrong with them.

Nothing here touches a file or the clock, so that the daemon and the command line judge alike and tests can set the
time. `now` is always aware (UTC).
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from appliance.core.errors import CertificateError
from appliance.pki.keys import PrivateKey, weakness
from appliance.pki.profiles import EXTENDED_KEY_USAGES, KEY_USAGES

Extension = TypeVar("Extension", bound=x509.ExtensionType)

SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class ClientIdentity:
    """Who a client certificate says its holder is.

    `names` are typed and in the order uri:, dns:, email:, as written in the certificate (DNS names in lower case);
    `cn:` stands there only when there is no URI, DNS name or e-mail address. `fingerprint` is SHA-256 and `serial`
    the number, both in lower-case hex without separators. `client_auth` is False also when there is no EKU at all.
    """

    names: tuple[str, ...]
    fingerprint: str
    serial: str
    not_before: datetime
    not_after: datetime
    client_auth: bool


def load_certificates(pem: bytes) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, in its order; at least one. Other PEM blocks are skipped.

    Raises: CertificateError: no certificate in it, or one that cannot be read.
    """
    if b"-----BEGIN" not in pem:
        if pem[:1] == b"\x30":
            raise CertificateError("The content is DER, not PEM; convert it: openssl x509 -inform DER -in FILE.")
        raise CertificateError("The content is not PEM; expected lines from BEGIN CERTIFICATE to END CERTIFICATE.")
    if b"-----BEGIN CERTIFICATE-----" not in pem and b"-----BEGIN X509 CERTIFICATE-----" not in pem:
        first = pem.split(b"-----BEGIN ", 1)[1].split(b"-----", 1)[0].decode("ascii", "replace")[:40]
        raise CertificateError(f"The content is PEM, but holds no certificate: it begins with {first}.")
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        for certificate in certificates:
            check_readable(certificate)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise CertificateError("A certificate in it is damaged and cannot be read.", detail=str(error)) from error
    return certificates


def check_readable(certificate: x509.Certificate) -> None:
    """Return when all parts of the certificate can be read; the library reads them only when asked.

    Raises: CertificateError: a part is damaged, or an extension is there twice.
    """
    try:
        _ = (certificate.subject, certificate.issuer, certificate.extensions, certificate.not_valid_after_utc)
        _ = (certificate.not_valid_before_utc, certificate.serial_number, certificate.public_key())
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm) as error:
        raise CertificateError("A certificate in it is damaged and cannot be read.", detail=str(error)) from error


def load_private_key(pem: bytes, passphrase: bytes | None) -> PrivateKey:
    """Return the private key of a PEM file: PKCS#8, EC or RSA; a passphrase that is not needed is ignored.

    Raises: CertificateError: no key, a damaged or unsupported one, or the passphrase is missing or wrong.
    """
    if b"PRIVATE KEY-----" not in pem:
        raise CertificateError("The content is not a private key in PEM; expected a line BEGIN PRIVATE KEY.")
    encrypted = key_is_encrypted(pem)
    if encrypted and not passphrase:
        raise CertificateError("The private key is encrypted and no passphrase was given.")
    try:
        key = serialization.load_pem_private_key(pem, passphrase if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if encrypted:
            raise CertificateError("The private key cannot be decrypted; the passphrase is wrong.") from None
        raise CertificateError("The private key is damaged and cannot be read.") from None
    return supported_key(key)


def key_is_encrypted(pem: bytes) -> bool:
    """True when the PEM key needs a passphrase. Source: RFC 7468, section 11; RFC 1421, section 4.6.1.1 (Proc-Type)."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in pem or b"Proc-Type: 4,ENCRYPTED" in pem


def supported_key(key: object) -> PrivateKey:
    """Return the key when it is of a kind we serve with.

    Raises: CertificateError: another kind, or too weak for TLS clients.
    """
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise CertificateError("The private key is neither ECDSA nor RSA nor Ed25519; make another, as ecdsa-p256.")
    reason = weakness(key.public_key())
    if reason:
        raise CertificateError(f"The private key cannot be used: {reason}.")
    return key


def key_matches(cert: x509.Certificate, key: PrivateKey) -> bool:
    """True when the certificate was issued for this key."""
    return _spki(cert.public_key()) == _spki(key.public_key())


def extension(cert: x509.Certificate, kind: type[Extension]) -> Extension | None:
    """Return the value of one extension, or None when the certificate has none.

    Raises: CertificateError: an extension is damaged.
    """
    try:
        return cert.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise CertificateError("An extension of the certificate cannot be read.", detail=str(error)) from error


def server_names(cert: x509.Certificate) -> list[str]:
    """Return the DNS names and IP addresses of the certificate as text, in its order; never its common name.

    Source: RFC 9525, section 2: the common name identifies no server.
    """
    return [
        name.value.lower() if isinstance(name, x509.DNSName) else str(name.value)
        for name in alternative_names(cert)
        if isinstance(name, x509.DNSName | x509.IPAddress)
    ]


def covers_host(cert: x509.Certificate, host: str) -> bool:
    """True when a client that connects to `host` (a DNS name or an IP literal, `[::1]` too) accepts this certificate.

    Source: RFC 6125, section 6.4.3: `*` stands for exactly one label, the left-most; section 6.4.4 and RFC 9525: no
    common name, and an address matches only an iPAddress entry.
    """
    literal = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    names = alternative_names(cert)
    try:
        address = ipaddress.ip_address(literal)
    except ValueError:
        wanted = host.lower().removesuffix(".")
        return any(_dns_matches(name.value.lower(), wanted) for name in names if isinstance(name, x509.DNSName))
    return any(name.value == address for name in names if isinstance(name, x509.IPAddress))


def days_left(cert: x509.Certificate, now: datetime) -> float:
    """Return the days until the certificate expires; negative once it has."""
    return (cert.not_valid_after_utc - now).total_seconds() / SECONDS_PER_DAY


def check_server_pair(cert_pem: bytes, key_pem: bytes, passphrase: bytes | None, now: datetime) -> list[str]:
    """Return what keeps `server.crt` and `server.key` from being served, as sentences; empty when nothing does.

    It looks at the pair itself: dates, key, extendedKeyUsage, names, and that each certificate is followed by the one
    that signed it. Whether clients trust the last one is for `chain.verify`.
    """
    try:
        certificates = load_certificates(cert_pem)
    except CertificateError as error:
        return [f"Server certificate: {error}"]
    problems: list[str] = []
    leaf = certificates[0]
    try:
        key = load_private_key(key_pem, passphrase)
    except CertificateError as error:
        problems.append(f"Server key: {error}")
    else:
        if not key_matches(leaf, key):
            if any(key_matches(other, key) for other in certificates[1:]):
                problems.append("The server's own certificate is not the first in its file; put it before the chain.")
            else:
                problems.append("The private key does not belong to the server certificate; install the two together.")
    problems += leaf_problems(leaf, "serverAuth", now)
    problems += order_problems(certificates)
    problems += [problem for other in certificates[1:] for problem in date_problems(other, now)]
    return problems


def check_trust_bundle(pem: bytes, now: datetime) -> list[str]:
    """Return what keeps a trust bundle from being used, as sentences; empty when nothing does.

    A certificate in it that is no CA is a problem. One that has expired, or is not valid yet, is a problem only when
    no valid one remains: bundles hold the old and the new root while a site changes over.
    """
    try:
        certificates = load_certificates(pem)
    except CertificateError as error:
        return [f"Trust bundle: {error}"]
    problems = []
    dated = []
    for certificate in certificates:
        reason = authority_problem(certificate)
        if reason:
            problems.append(reason)
        dated.append(date_problems(certificate, now))
    if all(dated):
        problems += [problem for several in dated for problem in several]
    return problems


def client_identity(pem: bytes) -> ClientIdentity:
    """Return who the first certificate of the PEM text identifies.

    Raises: CertificateError: not a readable certificate.
    """
    cert = load_certificates(pem)[0]
    names = alternative_names(cert)
    typed = [f"uri:{name.value}" for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    typed += [f"dns:{name.value.lower()}" for name in names if isinstance(name, x509.DNSName)]
    typed += [f"email:{name.value}" for name in names if isinstance(name, x509.RFC822Name)]
    common_names = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not typed and common_names:
        # Directories write the path to an entry as several CNs (CN=Users, CN=Ada); the last is the entry itself.
        typed = [f"cn:{common_names[-1].value!s}"]
    return ClientIdentity(
        names=tuple(typed),
        fingerprint=fingerprint(cert),
        serial=f"{cert.serial_number:x}",
        not_before=cert.not_valid_before_utc,
        not_after=cert.not_valid_after_utc,
        client_auth="clientAuth" in (extended_key_usages(cert) or ()),
    )


def fingerprint(cert: x509.Certificate) -> str:
    """Return the SHA-256 fingerprint, 64 lower-case hex digits."""
    return cert.fingerprint(hashes.SHA256()).hex()


def alternative_names(cert: x509.Certificate) -> list[x509.GeneralName]:
    """Return all subject alternative names, in the certificate's order; empty without the extension."""
    return list(extension(cert, x509.SubjectAlternativeName) or ())


def key_usages(cert: x509.Certificate) -> list[str] | None:
    """Return the keyUsage bits by their RFC 5280 names, or None when the extension is absent."""
    usage = extension(cert, x509.KeyUsage)
    if usage is None:
        return None
    return [name for name, attribute in KEY_USAGES.items() if getattr(usage, attribute)]


def extended_key_usages(cert: x509.Certificate) -> list[str] | None:
    """Return serverAuth, clientAuth, and other purposes as OIDs, or None when the extension is absent."""
    usages = extension(cert, x509.ExtendedKeyUsage)
    if usages is None:
        return None
    names = {oid: name for name, oid in EXTENDED_KEY_USAGES.items()}
    return [names.get(oid, oid.dotted_string) for oid in usages]


def is_authority(cert: x509.Certificate) -> bool:
    """True when basicConstraints says CA."""
    constraints = extension(cert, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def is_self_signed(cert: x509.Certificate) -> bool:
    """True for a root: its own key signed it.

    Old roots signed themselves with SHA-1, which the library no longer verifies; nobody checks that signature, trust in
    a root comes from the bundle it lies in (RFC 5280, section 6.1.1 d).
    """
    if cert.subject != cert.issuer:
        return False
    try:
        cert.verify_directly_issued_by(cert)
    except (ValueError, UnsupportedAlgorithm):  # the names agree, so what it cannot do is the algorithm
        return True
    except (TypeError, InvalidSignature):
        return False
    return True


def signed_by(cert: x509.Certificate, issuer: x509.Certificate) -> bool:
    """True when the issuer's name and key are those that signed the certificate."""
    try:
        cert.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def title(cert: x509.Certificate) -> str:
    """Return what to call the certificate in a sentence: its common name in quotes, else its whole subject."""
    return name_title(cert.subject)


def name_title(name: x509.Name) -> str:
    """Return a distinguished name's common name in quotes, else all of it."""
    common_names = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return f"'{common_names[-1].value!s}'" if common_names else f"'{name.rfc4514_string()}'"


def date_problems(cert: x509.Certificate, now: datetime) -> list[str]:
    """Return that the certificate has expired or is not valid yet, if so."""
    if now > cert.not_valid_after_utc:
        return [f"{title(cert)} expired on {_day(cert.not_valid_after_utc)}; renew it."]
    if now < cert.not_valid_before_utc:
        return [f"{title(cert)} is not valid before {_day(cert.not_valid_before_utc)}; check this machine's clock."]
    return []


def leaf_problems(leaf: x509.Certificate, usage: str, now: datetime) -> list[str]:
    """Return what keeps a leaf from its role, whoever signed it; `usage` is "serverAuth" or "clientAuth".

    Source: RFC 5280, sections 4.2.1.3, 4.2.1.9 and 4.2.1.12. anyExtendedKeyUsage is not taken for the purpose itself,
    as OpenSSL and BoringSSL do not either.
    """
    problems = date_problems(leaf, now)
    usages = extended_key_usages(leaf)
    if usages is None or usage not in usages:
        has = ", ".join(usages) if usages else "none"
        problems.append(
            f"{title(leaf)} misses {usage} in its extendedKeyUsage (it has {has}); have it issued anew with it."
        )
    bits = key_usages(leaf)
    if bits is not None and "digitalSignature" not in bits:
        problems.append(f"{title(leaf)} misses digitalSignature in its keyUsage; have it issued anew.")
    if is_authority(leaf):
        problems.append(f"{title(leaf)} is a certificate authority, not a leaf; install the certificate it issued.")
    if usage == "serverAuth" and not server_names(leaf):
        problems.append(f"{title(leaf)} has no subject alternative name (DNS or IP); clients ignore the common name.")
    if usage == "clientAuth" and not client_has_name(leaf):
        problems.append(f"{title(leaf)} names nobody: no URI, DNS or e-mail alternative name, and no common name.")
    reason = weakness(leaf.public_key())
    if reason:
        problems.append(f"{title(leaf)} cannot be used: {reason}.")
    return problems


def client_has_name(leaf: x509.Certificate) -> bool:
    """True when a client certificate identifies somebody: by URI, DNS name, e-mail address or common name."""
    kinds = (x509.UniformResourceIdentifier, x509.DNSName, x509.RFC822Name)
    if any(isinstance(name, kinds) for name in alternative_names(leaf)):
        return True
    return bool(leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME))


def order_problems(certificates: Sequence[x509.Certificate]) -> list[str]:
    """Return where a certificate is not followed by the one that signed it.

    Source: RFC 5246, section 7.4.2, demands the order; RFC 8446, section 4.4.2, wishes it, and TLS 1.2 clients need it.
    """
    problems = []
    for lower, upper in pairwise(certificates):
        if not signed_by(lower, upper):
            problems.append(
                f"The chain is out of order: {title(upper)} follows {title(lower)} and did not sign it; "
                f"{name_title(lower.issuer)} must follow. `appliance certs import` puts a chain in order."
            )
    return problems


def authority_problem(cert: x509.Certificate) -> str | None:
    """Return why the certificate cannot sign others, or None."""
    if not is_authority(cert):
        return f"{title(cert)} is not a certificate authority (basicConstraints CA); only CAs belong in a trust bundle."
    bits = key_usages(cert)
    if bits is not None and "keyCertSign" not in bits:
        return f"{title(cert)} may not sign certificates: its keyUsage misses keyCertSign."
    reason = weakness(cert.public_key())
    return f"{title(cert)} cannot be used: {reason}." if reason else None


def _dns_matches(pattern: str, host: str) -> bool:
    if pattern.startswith("*."):
        label, dot, rest = host.partition(".")
        return bool(label and dot) and rest == pattern[2:]
    return pattern == host


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _spki(key: object) -> bytes:
    public_bytes = key.public_bytes  # type: ignore[attr-defined]  # every public key of the library has it
    content: bytes = public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return content
