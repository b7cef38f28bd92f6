"""Revocation lists (CRLs): which certificates an authority took back. Read, checked, and signed with our root.

Whether a caller's certificate is believed is for `trust`. Source: RFC 5280, sections 5 (what a list holds) and 6.3 (how
it is used).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization

from appliance.core.errors import CertificateError
from appliance.core.files import alone
from appliance.pki.files import Layout, NewFile, exists, read_file, write_all
from appliance.pki.inspect import Extension, key_usages, load_certificates, name_title, signed_by, title
from appliance.pki.keys import signature_hash
from appliance.pki.root import load_root
from appliance.pki.signing import Issued, authority_key_identifier

MAX_LISTS: Final = 64
"""Lists in one file: one for each authority of a trust bundle."""

MAX_LIST_BYTES: Final = 16 * 1024 * 1024
"""Bytes of a file of lists: some 300 000 revoked certificates."""

DEFAULT_DAYS: Final = 30
"""Days until our root's list must be signed anew."""

REASONS: Final = {
    reason.value: reason
    for reason in (
        x509.ReasonFlags.unspecified,
        x509.ReasonFlags.key_compromise,
        x509.ReasonFlags.affiliation_changed,
        x509.ReasonFlags.superseded,
        x509.ReasonFlags.cessation_of_operation,
        x509.ReasonFlags.privilege_withdrawn,
    )
}
"""Why a leaf is taken back for good, by its name in RFC 5280, section 5.3.1."""

_BEGIN, _END = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"
_BACKDATE: Final = timedelta(minutes=5)
"""As for certificates: for clocks that are slow."""


@dataclass(frozen=True, eq=False, slots=True)
class RevocationList:
    """One list whose signature is good.

    Attributes:
        issuer: the authority that signed it.
        number: crlNumber, higher for later lists; -1 without one.
        serials: the serial numbers of what is revoked.
    """

    issuer: x509.Certificate
    number: int
    this_update: datetime
    next_update: datetime
    serials: frozenset[int]
    crl: x509.CertificateRevocationList

    def covers(self, authority: x509.Certificate) -> bool:
        """Whether it speaks of what that authority issued: the same name and key, perhaps in a renewed certificate."""
        return _signer_mark(authority) == _signer_mark(self.issuer)

    def current(self, now: datetime) -> bool:
        """Whether a newer one need not be there yet."""
        return self.this_update <= now <= self.next_update

    def staleness(self, now: datetime) -> str | None:
        """A sentence when the list is past its time, or before it."""
        if now > self.next_update:
            return (
                f"The revocation list of {title(self.issuer)} was due for replacement on {_day(self.next_update)} "
                "(its nextUpdate); get a newer one from that CA, or sign ours anew with `appliance certs crl`."
            )
        if now < self.this_update:
            return (
                f"The revocation list of {title(self.issuer)} is dated {_day(self.this_update)}, which is still to "
                "come; check this machine's clock."
            )
        return None

    def entry(self, serial: int) -> str:
        """When and why a serial number of this list was revoked: `on 2026-11-20 10:00 UTC (keyCompromise)`."""
        found = self.crl.get_revoked_certificate_by_serial_number(serial)
        if found is None:
            return "on a day that is not known"
        try:
            reason = found.extensions.get_extension_for_class(x509.CRLReason).value.reason.value
        except (x509.ExtensionNotFound, ValueError, x509.DuplicateExtension):
            reason = x509.ReasonFlags.unspecified.value
        return f"on {_day(found.revocation_date_utc)}" + ("" if reason == "unspecified" else f" ({reason})")


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_lists(pem: bytes) -> list[x509.CertificateRevocationList]:
    """Return the lists of a PEM file, in its order; at least one. Other PEM blocks are skipped.

    Raises: CertificateError: no list in it, too many, or one that cannot be read.
    """
    if len(pem) > MAX_LIST_BYTES:
        raise CertificateError(f"The content has {len(pem)} bytes; at most {MAX_LIST_BYTES} can be revocation lists.")
    blocks = pem.split(_BEGIN)[1:]
    if not blocks:
        if pem[:1] == b"\x30":
            raise CertificateError("The content is DER, not PEM; convert it: openssl crl -inform DER -in FILE.")
        raise CertificateError("The content holds no revocation list; expected a line BEGIN X509 CRL.")
    if len(blocks) > MAX_LISTS:
        raise CertificateError(f"The content holds {len(blocks)} revocation lists; the limit is {MAX_LISTS}.")
    crls = []
    for block in blocks:
        body, end, _ = block.partition(_END)
        if not end:
            raise CertificateError("A revocation list in it is cut short: its line END X509 CRL is missing.")
        try:
            crls.append(x509.load_pem_x509_crl(_BEGIN + body + _END))
        except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
            raise CertificateError(
                "A revocation list in it is damaged and cannot be read.", detail=str(error)
            ) from error
    return crls


def read_lists(pem: bytes, authorities: Sequence[x509.Certificate]) -> list[RevocationList]:
    """Return the lists of a PEM file, each with the authority that signed it; of two by the same one, the later.

    A list that is past its nextUpdate is returned as well: what to do about it is the policy's affair.

    Raises: CertificateError: a list cannot be used; says everything that is wrong.
    """
    problems: list[str] = []
    latest: dict[tuple[object, ...], RevocationList] = {}
    for crl in load_lists(pem):
        try:
            found = _checked(crl, authorities)
        except CertificateError as error:
            problems.append(str(error))
            continue
        # An authority may cut its list in parts by distribution point; each part counts.
        key = (*_signer_mark(found.issuer), _extension(crl, x509.IssuingDistributionPoint))
        kept = latest.get(key)
        if kept is None or (kept.number, kept.this_update) < (found.number, found.this_update):
            latest[key] = found
    if problems:
        raise CertificateError(" ".join(problems))
    return list(latest.values())


def _checked(crl: x509.CertificateRevocationList, authorities: Sequence[x509.Certificate]) -> RevocationList:
    """Raises: CertificateError: the list cannot be used."""
    try:
        name = name_title(crl.issuer)
        issuer = _issuer(crl, authorities)
        _check_scope(crl, name)
        number = _extension(crl, x509.CRLNumber)
        next_update = crl.next_update_utc
        if next_update is None:
            raise CertificateError(
                f"The revocation list of {name} has no nextUpdate, so nobody can say whether it is current; "
                "RFC 5280 demands one."
            )
        serials = frozenset(entry.serial_number for entry in crl)
        return RevocationList(
            issuer, number.crl_number if number else -1, crl.last_update_utc, next_update, serials, crl
        )
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm) as error:
        raise _damaged(error) from error


def _issuer(crl: x509.CertificateRevocationList, authorities: Sequence[x509.Certificate]) -> x509.Certificate:
    """The authority that signed the list. Raises: CertificateError."""
    name = name_title(crl.issuer)
    namesakes = [authority for authority in authorities if authority.subject == crl.issuer]
    if not namesakes:
        raise CertificateError(
            f"The revocation list of {name} belongs to no authority of the trust bundle; add that CA's certificate to "
            "tls.client_ca, or take the list out."
        )
    if isinstance(crl.signature_hash_algorithm, hashes.SHA1 | hashes.MD5):
        algorithm = crl.signature_hash_algorithm.name.upper()
        raise CertificateError(
            f"The revocation list of {name} is signed with {algorithm}, which can be forged; have the CA sign with "
            "SHA-256."
        )
    signer = next((authority for authority in namesakes if _signed(crl, authority)), None)
    if signer is None:
        raise CertificateError(
            f"The revocation list of {name} was not signed by the {name} of the trust bundle: it was changed, or that "
            "CA has the same name and another key; get both from the same CA."
        )
    bits = key_usages(signer)
    if bits is not None and "cRLSign" not in bits:
        raise CertificateError(
            f"{title(signer)} may not sign revocation lists: the keyUsage of its certificate misses cRLSign."
        )
    return signer


def _signed(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    try:
        return crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]  # other kinds: TypeError
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _signer_mark(authority: x509.Certificate) -> tuple[bytes, bytes]:
    """Name and key: what signs, whichever certificate says so."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return authority.subject.public_bytes(), authority.public_key().public_bytes(serialization.Encoding.DER, form)


def _check_scope(crl: x509.CertificateRevocationList, name: str) -> None:
    """Return when the list is a whole one for all certificates of its issuer.

    Raises: CertificateError: to take it for a whole one would let in whom it leaves out.
    Source: RFC 5280, sections 5.2.4 (delta), 5.2.5 (scope); 5.2: a critical extension we do not know forbids the use.
    """
    known = (x509.CRLNumber, x509.DeltaCRLIndicator, x509.IssuingDistributionPoint, x509.AuthorityKeyIdentifier)
    scope = _extension(crl, x509.IssuingDistributionPoint)
    partial = scope is not None and (
        scope.only_contains_user_certs
        or scope.only_contains_ca_certs
        or scope.only_contains_attribute_certs
        or scope.only_some_reasons is not None
    )
    unknown = [e.oid.dotted_string for e in crl.extensions if e.critical and not isinstance(e.value, known)]
    if _extension(crl, x509.DeltaCRLIndicator) is not None:
        reason = "holds changes alone (a delta list)"
    elif scope is not None and scope.indirect_crl:
        reason = "speaks for other authorities too (an indirect list)"
    elif partial:
        reason = "is about some certificates or reasons only"
    elif unknown:
        reason = f"has a critical extension we do not know ({', '.join(unknown)})"
    else:
        return
    raise CertificateError(f"The revocation list of {name} {reason}; get the CA's complete list.")


def _extension(crl: x509.CertificateRevocationList, kind: type[Extension]) -> Extension | None:
    try:
        return crl.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


# ---- our root's own list ---------------------------------------------------------------------------------------------


def parse_serial(text: str) -> int:
    """Return the number of a serial as tools print it: hex, with or without colons, 0x and capitals.

    Raises: CertificateError: not a serial number.
    """
    digits = text.strip().lower().removeprefix("0x").replace(":", "")
    try:
        serial = int(digits, 16)
    except ValueError:
        serial = 0
    if serial <= 0 or serial.bit_length() > 160 or not (digits.isascii() and digits.isalnum()):
        raise CertificateError(
            f"--serial {text!r} is not a serial number; give the hex digits that `appliance certs inspect` shows."
        )
    return serial


def serial_of(layout: Layout, name: str, now: datetime) -> int:
    """Return the serial number of a client's present certificate.

    Raises: CertificateError: there is none, or the root whose key is here did not issue it, and cannot take it back.
    """
    path = layout.certificate("client", name)
    leaf = load_certificates(read_file(path))[0]
    root = load_root(layout, now).certificate
    if not signed_by(leaf, root):
        raise CertificateError(
            f"{path} was issued by {name_title(leaf.issuer)}, not with {layout.ca_key} of {title(root)}; have that CA "
            "revoke it, and set tls.crl to its list."
        )
    return leaf.serial_number


def sign_list(
    root: Issued, entries: Iterable[x509.RevokedCertificate], number: int, now: datetime, days: int
) -> RevocationList:
    """Return a list of what the root revoked, due for replacement after `days`. Source: RFC 5280, section 5.1.2."""
    start = now.replace(microsecond=0)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.certificate.subject)
        .last_update(start - _BACKDATE)
        .next_update(start + timedelta(days=days))
        .add_extension(authority_key_identifier(root.certificate, root.key), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for entry in entries:
        builder = builder.add_revoked_certificate(entry)
    return _checked(builder.sign(root.key, signature_hash(root.key)), [root.certificate])


def renew_list(
    layout: Layout, now: datetime, days: int, revoke: tuple[int, x509.ReasonFlags] | None = None
) -> RevocationList:
    """Sign our root's list anew, one certificate longer if asked, and write it; what stood in it stays.

    The list itself is the record of what was revoked: there is no other.

    Args:    revoke: serial number and reason; one that is revoked already keeps its day and reason.
    Raises:  CertificateError: nothing can be signed here, or the present list is not our root's; nothing was written.
    """
    root = load_root(layout, now)
    bits = key_usages(root.certificate)
    if bits is not None and "cRLSign" not in bits:
        raise CertificateError(f"{layout.ca_certificate}: its keyUsage misses cRLSign, so it cannot sign a list.")
    if revoke is not None and revoke[0] == root.certificate.serial_number:
        raise CertificateError("That is the root's own serial number; a root is replaced, with `appliance certs init`.")
    try:
        with alone(layout.directory):  # two commands at once must not lose each other's entry
            return _renew(layout, root, now, days, revoke)
    except OSError as error:
        raise CertificateError(
            f"{layout.directory} cannot be locked: {error.strerror}; nothing was written."
        ) from error


def _renew(
    layout: Layout, root: Issued, now: datetime, days: int, revoke: tuple[int, x509.ReasonFlags] | None
) -> RevocationList:
    old = _own_list(layout, root)
    entries = list(old.crl) if old else []
    if revoke is not None and (old is None or revoke[0] not in old.serials):
        entries.append(_revoked(*revoke, now))
    number = max(old.number if old else 0, 0) + 1
    fresh = sign_list(root, entries, number, now, days)
    pem = fresh.crl.public_bytes(serialization.Encoding.PEM)
    write_all([NewFile(layout.crl, pem, "public", replace=True)])
    return fresh


def _own_list(layout: Layout, root: Issued) -> RevocationList | None:
    """The list that our root signed before. Raises: CertificateError: the file holds something else."""
    if not exists(layout.crl):
        return None
    try:
        content = read_file(layout.crl, MAX_LIST_BYTES)
        if len(load_lists(content)) > 1:
            raise CertificateError("It holds several lists; keep those of other CAs in a file of their own.")
        return read_lists(content, [root.certificate])[0]
    except CertificateError as error:
        raise CertificateError(
            f"{layout.crl} cannot be continued: {error} It is the record of what was revoked: restore it, or move it "
            "away to begin a new one.",
            detail=error.detail,
        ) from error


def _revoked(serial: int, reason: x509.ReasonFlags, now: datetime) -> x509.RevokedCertificate:
    builder = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now.replace(microsecond=0))
    if reason is not x509.ReasonFlags.unspecified:  # RFC 5280, section 5.3.1: then the extension is left out
        builder = builder.add_extension(x509.CRLReason(reason), critical=False)
    return builder.build()


def _damaged(error: Exception) -> CertificateError:
    return CertificateError("A revocation list in it is damaged and cannot be read.", detail=str(error))


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
