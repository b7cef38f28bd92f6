"""What `appliance certs inspect` tells about certificate files, as plain values ready for a table or JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509

from appliance.core.errors import CertificateError
from appliance.pki import chain
from appliance.pki.files import Layout, exists, read_file, too_open
from appliance.pki.inspect import (
    SECONDS_PER_DAY,
    alternative_names,
    authority_problem,
    date_problems,
    days_left,
    extended_key_usages,
    fingerprint,
    is_authority,
    key_matches,
    key_usages,
    leaf_problems,
    order_problems,
    title,
)
from appliance.pki.keys import key_type, server_weakness
from appliance.pki.names import typed_text
from appliance.pki.profiles import ROLE_USAGE, Role
from appliance.pki.reading import read_certificates, read_key
from appliance.pki.revocation import MAX_LIST_BYTES, RevocationList, read_lists


@dataclass(frozen=True)
class Report:
    """One certificate of a file. Fields named like the extension are None when the certificate lacks it.

    `kind`: "ca" | "server" | "client" | "other". `chain`, `key`: what was found, as a word or a sentence.
    `problems`: what must be mended, as sentences; empty when all is well.
    """

    path: str
    kind: str
    subject: str
    issuer: str
    serial: str
    sha256: str
    not_before: str
    not_after: str
    days_left: float
    key_type: str
    key_usage: list[str] | None
    extended_key_usage: list[str] | None
    names: list[str]
    followed_by: list[str]
    chain: str
    key: str
    problems: list[str]


@dataclass(frozen=True)
class ListReport:
    """One revocation list of a file; of a file that cannot be used there is nothing but `path` and `problems`.

    `number` is None when the list has none; `revoked` counts its entries. `problems`: as above.
    """

    path: str
    issuer: str = ""
    number: int | None = None
    this_update: str = ""
    next_update: str = ""
    days_left: float = 0.0
    revoked: int = 0
    problems: list[str] = field(default_factory=list)


def is_list_file(path: Path) -> bool:
    """True when the file holds revocation lists. Raises: CertificateError: it cannot be read."""
    return b"-----BEGIN X509 CRL-----" in read_file(path, MAX_LIST_BYTES)


def inspect_lists(layout: Layout, paths: Sequence[Path], now: datetime) -> list[ListReport]:
    """Return a report on every revocation list of the files, whose signers are looked for in the directory's `ca.crt`.

    Raises: CertificateError: `ca.crt` or a file cannot be read.
    """
    reports = []
    for path in paths:
        content = read_file(path, MAX_LIST_BYTES)
        try:
            lists = read_lists(content, read_certificates(layout.ca_certificate))
        except CertificateError as error:
            reports.append(ListReport(str(path), problems=[str(error)]))
        else:
            reports += [_list_report(path, each, now) for each in lists]
    return reports


def _list_report(path: Path, each: RevocationList, now: datetime) -> ListReport:
    stale = each.staleness(now)
    return ListReport(
        path=str(path),
        issuer=each.issuer.subject.rfc4514_string(),
        number=each.number if each.number >= 0 else None,
        this_update=each.this_update.isoformat(),
        next_update=each.next_update.isoformat(),
        days_left=round((each.next_update - now).total_seconds() / SECONDS_PER_DAY, 2),
        revoked=len(each.serials),
        problems=[stale] if stale else [],
    )


def inspect_directory(layout: Layout, passphrase: bytes | None, now: datetime) -> list[Report]:
    """Return a report on `ca.crt`, `server.crt` and every client's certificate in the directory.

    Raises: CertificateError: there are none, or one cannot be read.
    """
    clients = sorted((layout.directory / "clients").glob("*.crt"))
    paths = [path for path in (layout.ca_certificate, layout.certificate("server"), *clients) if exists(path)]
    if not paths:
        raise CertificateError(
            f"There is no certificate in {layout.directory}; make one with `appliance certs init`, or name files."
        )
    return inspect_files(layout, paths, passphrase, now)


def inspect_files(layout: Layout, paths: Sequence[Path], passphrase: bytes | None, now: datetime) -> list[Report]:
    """Return a report on the leaf of each file, and on every CA of a file that holds CAs.

    A chain is verified against the directory's `ca.crt`; a key is looked for beside the file, as `NAME.key`.

    Raises: CertificateError: a file cannot be read, or holds no certificate.
    """
    anchors = read_certificates(layout.ca_certificate) if exists(layout.ca_certificate) else None
    reports = []
    for path in paths:
        certificates = read_certificates(path)
        if is_authority(certificates[0]):
            reports += [_authority_report(path, cert, certificates, passphrase, now) for cert in certificates]
        else:
            reports.append(_leaf_report(layout, path, certificates, anchors, passphrase, now))
    return reports


def _authority_report(
    path: Path, cert: x509.Certificate, bundle: list[x509.Certificate], passphrase: bytes | None, now: datetime
) -> Report:
    reason = authority_problem(cert)
    problems = [*date_problems(cert, now), *([reason] if reason else [])]
    key_path = path.with_suffix(".key")
    key = "none here"
    if exists(key_path):
        key, key_problems = _key_state(key_path, [cert], passphrase)
        if key_problems and any(_key_state(key_path, [other], passphrase)[0] == "matches" for other in bundle):
            key, key_problems = "of another CA in this file", []
        open_key = too_open(key_path, "owner")
        problems += [*key_problems, *([open_key] if open_key else [])]
    return _report(path, "ca", cert, [], "trust anchor", key, problems, now)


def _leaf_report(
    layout: Layout,
    path: Path,
    certificates: list[x509.Certificate],
    anchors: list[x509.Certificate] | None,
    passphrase: bytes | None,
    now: datetime,
) -> Report:
    leaf, *others = certificates
    role = _role(leaf)
    problems = leaf_problems(leaf, ROLE_USAGE[role], now) if role else date_problems(leaf, now)
    weak = server_weakness(leaf.public_key()) if role == "server" else None
    if weak and not any(weak in problem for problem in problems):
        problems.append(f"{title(leaf)}: {weak}.")
    problems += order_problems(certificates)
    if anchors is None:
        chain_state = f"not checked: {layout.ca_certificate} does not exist"
    else:
        chain_problems = chain.verify(certificates, anchors, now)
        chain_state = "not verified" if chain_problems else f"verified against {layout.ca_certificate}"
        problems += chain_problems
    key_path = path.with_suffix(".key")
    key_state = "none beside it"
    if exists(key_path):
        key_state, key_problems = _key_state(key_path, certificates, passphrase)
        open_key = too_open(key_path, "service")
        problems += [*key_problems, *([open_key] if open_key else [])]
    elif path == layout.certificate("server"):
        problems.append(f"{key_path} does not exist, so {path} cannot be served; put it back or issue both anew.")
    open_certificate = too_open(path, "public")
    problems += [open_certificate] if open_certificate else []
    return _report(path, role or "other", leaf, others, chain_state, key_state, list(dict.fromkeys(problems)), now)


def _key_state(key_path: Path, certificates: list[x509.Certificate], passphrase: bytes | None) -> tuple[str, list[str]]:
    try:
        key = read_key(key_path, passphrase, remedy="Give --passphrase-file.")
    except CertificateError as error:
        return "not compared", [str(error)]
    if key_matches(certificates[0], key):
        return "matches", []
    if any(key_matches(other, key) for other in certificates[1:]):
        return "does not match", [f"{key_path} belongs to a later certificate of the file; the leaf must come first."]
    return "does not match", [f"{key_path} does not belong to {title(certificates[0])}; install the two together."]


def _role(leaf: x509.Certificate) -> Role | None:
    usages = extended_key_usages(leaf) or []
    if "serverAuth" in usages:
        return "server"
    return "client" if "clientAuth" in usages else None


def _report(
    path: Path,
    kind: str,
    cert: x509.Certificate,
    others: list[x509.Certificate],
    chain_state: str,
    key_state: str,
    problems: list[str],
    now: datetime,
) -> Report:
    return Report(
        path=str(path),
        kind=kind,
        subject=cert.subject.rfc4514_string(),
        issuer=cert.issuer.rfc4514_string(),
        serial=f"{cert.serial_number:x}",
        sha256=fingerprint(cert),
        not_before=cert.not_valid_before_utc.isoformat(),
        not_after=cert.not_valid_after_utc.isoformat(),
        days_left=round(days_left(cert, now), 2),
        key_type=key_type(cert.public_key()),
        key_usage=key_usages(cert),
        extended_key_usage=extended_key_usages(cert),
        names=[typed_text(name) for name in alternative_names(cert)],
        followed_by=[other.subject.rfc4514_string() for other in others],
        chain=chain_state,
        key=key_state,
        problems=problems,
    )
