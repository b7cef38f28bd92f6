"""Server and client certificates: issued by our root, renewed, or requested from another CA."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, cast

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from appliance.core.errors import CertificateError
from appliance.pki.files import Layout, NewFile, require_absent, write_all
from appliance.pki.inspect import (
    alternative_names,
    extended_key_usages,
    extension,
    is_authority,
    key_matches,
    name_title,
    signed_by,
    title,
)
from appliance.pki.keys import KEY_ALGORITHMS, KeyAlgorithm, PrivateKey, generate, key_pem, key_type, signature_hash
from appliance.pki.names import common_name
from appliance.pki.profiles import DEFAULTS, Profile, Role, key_usage
from appliance.pki.reading import read_certificates, read_key
from appliance.pki.root import load_root
from appliance.pki.signing import Issued, certificate_pem, sign, validity

_KEPT_EXTENSIONS: Final = (x509.KeyUsage, x509.ExtendedKeyUsage)


@dataclass(frozen=True)
class Subject:
    """Whom a leaf is for: its common name, its organisation, its alternative names."""

    common_name: str
    names: tuple[x509.GeneralName, ...]
    organisation: str | None = None

    def name(self) -> x509.Name:
        """Return the distinguished name.

        Raises: CertificateError: a part is empty, too long, or has control characters.
        """
        attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name(self.common_name))]
        if self.organisation:
            attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, common_name(self.organisation)))
        return x509.Name(attributes)


def issue(root: Issued, subject: Subject, profile: Profile, now: datetime, key: PrivateKey | None = None) -> Issued:
    """Return a leaf signed by the root, with a fresh key unless one is given; it never outlives the root.

    Raises: CertificateError: the profile or the key would be refused by TLS clients, or a name cannot be one.
    """
    profile.check(f"The {profile.kind}'s profile")
    key = key or generate(profile.key)
    profile.check_key(key)
    extensions = profile.extensions()
    if subject.names:
        extensions.append((x509.SubjectAlternativeName(subject.names), False))
    certificate = sign(
        subject=subject.name(),
        key=key,
        issuer=root.certificate,
        issuer_key=root.key,
        period=_within(root.certificate, validity(profile, now)),
        extensions=extensions,
    )
    return Issued(certificate, key)


def write_leaf(layout: Layout, role: Role, name: str | None, leaf: Issued, *, replace: bool) -> tuple[Path, Path]:
    """Write a leaf's key and certificate, and return the certificate's path and the key's.

    Raises: CertificateError: one exists and may not be replaced, or the directory cannot be written.
    """
    certificate, key = layout.certificate(role, name), layout.key(role, name)
    write_all(
        [
            NewFile(key, key_pem(leaf.key), "service", replace),
            NewFile(certificate, certificate_pem(leaf.certificate), "public", replace),
        ]
    )
    return certificate, key


def renew(layout: Layout, path: Path, now: datetime, *, keep_key: bool = False, days: int | None = None) -> Issued:
    """Replace a certificate of ours by one with the same subject, names, usages and length, and return it.

    The key beside it (`x.key` for `x.crt`) is made anew, or kept with `keep_key`. The key is replaced first and the
    certificate last: a reader that wakes when the certificate changes finds a pair that belongs together, and one that
    reads in between finds a mismatch for an instant and keeps its last good pair.

    Raises: CertificateError: not NAME.crt, not signed by our root, a root itself, or unreadable or unwritable.
    """
    if path.suffix != ".crt":
        raise CertificateError(f"{path} cannot be renewed; name a NAME.crt, whose key is in NAME.key beside it.")
    old = read_certificates(path)[0]
    key_path = path.with_suffix(".key")
    if is_authority(old):
        raise CertificateError(
            f"{path} is a CA, and a CA is not renewed in place: every client must get the new one first. Make one "
            "aside with `appliance certs init --dir NEW_DIR`, and let clients trust both for a while (certs/README.md)."
        )
    root = load_root(layout, now)
    if not signed_by(old, root.certificate):
        raise CertificateError(
            f"{path} was issued by {name_title(old.issuer)}, not by the CA in {layout.ca_certificate}, so it cannot be "
            "renewed here. Ask its CA: `appliance certs csr`, then `appliance certs import --force`."
        )
    kept = read_key(key_path, None) if keep_key else None
    if kept is not None and not key_matches(old, kept):
        raise CertificateError(f"{key_path} does not belong to {path}; leave --keep-key out to make a new key.")
    role: Role = "server" if "serverAuth" in (extended_key_usages(old) or ()) else "client"
    key = kept or generate(_same_algorithm(old, role))
    renewed = Issued(_reissue(root, old, key, role, now, days), key)
    files = [NewFile(path, certificate_pem(renewed.certificate), "public", replace=True)]
    if kept is None:
        files.insert(0, NewFile(key_path, key_pem(key), "service", replace=True))
    write_all(files)
    return renewed


def request(layout: Layout, role: Role, name: str | None, subject: Subject, profile: Profile, *, replace: bool) -> Path:
    """Make a key and a certificate request for another CA, and return the request's path.

    The key waits as `*.key.pending`, unused, until `importing.install` finds that the certificate belongs to it.

    Raises: CertificateError: a request is pending already, or the directory cannot be written.
    """
    profile.check(f"The {role}'s profile")
    pending, path = layout.pending_key(role, name), layout.request(role, name)
    if not replace:
        require_absent([pending, path])
    key = generate(profile.key)
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject.name())
    for value, critical in profile.extensions():
        builder = builder.add_extension(value, critical)
    if subject.names:
        builder = builder.add_extension(x509.SubjectAlternativeName(subject.names), critical=False)
    content = builder.sign(key, signature_hash(key)).public_bytes(serialization.Encoding.PEM)
    write_all([NewFile(pending, key_pem(key), "service", replace), NewFile(path, content, "public", replace)])
    return path


def _reissue(
    root: Issued, old: x509.Certificate, key: PrivateKey, role: Role, now: datetime, days: int | None
) -> x509.Certificate:
    profile = DEFAULTS[role]
    profile.check_key(key)
    start = now.replace(microsecond=0) - timedelta(minutes=profile.backdate_minutes)
    length = old.not_valid_after_utc - old.not_valid_before_utc
    end = start + length if days is None else now.replace(microsecond=0) + timedelta(days=days)
    extensions: list[tuple[x509.ExtensionType, bool]] = [(x509.BasicConstraints(ca=False, path_length=None), True)]
    for kind in _KEPT_EXTENSIONS:
        value = extension(old, cast("type[x509.ExtensionType]", kind))
        if value is not None:
            extensions.append((value, kind is x509.KeyUsage))
        elif kind is x509.KeyUsage:
            extensions.append((key_usage(profile.key_usage), True))
    names: Sequence[x509.GeneralName] = alternative_names(old)
    if names:
        extensions.append((x509.SubjectAlternativeName(names), False))
    return sign(
        subject=old.subject,
        key=key,
        issuer=root.certificate,
        issuer_key=root.key,
        period=_within(root.certificate, (start, end)),
        extensions=extensions,
    )


def _same_algorithm(old: x509.Certificate, role: Role) -> KeyAlgorithm:
    """Return the algorithm of the old key, or the profile's where that is none we make."""
    found = key_type(old.public_key())
    return next((algorithm for algorithm in KEY_ALGORITHMS if algorithm == found), DEFAULTS[role].key)


def _within(root: x509.Certificate, period: tuple[datetime, datetime]) -> tuple[datetime, datetime]:
    """Return the period cut to the root's: a leaf outside it is valid nowhere (RFC 5280, section 6.1.3)."""
    start, end = max(period[0], root.not_valid_before_utc), min(period[1], root.not_valid_after_utc)
    if start >= end:
        raise CertificateError(f"The CA {title(root)} is not valid in the time asked for; make a new one.")
    return start, end
