"""Taking over a certificate that another CA issued: everything is checked, then all of it is installed, or none."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from appliance.core.errors import CertificateError
from appliance.pki.chain import find_path
from appliance.pki.files import Layout, NewFile, exists, read_file, remove, require_absent, write_all
from appliance.pki.inspect import (
    check_trust_bundle,
    days_left,
    fingerprint,
    is_authority,
    is_self_signed,
    key_matches,
    key_usages,
    leaf_problems,
    title,
)
from appliance.pki.keys import PrivateKey, key_pem, server_weakness
from appliance.pki.profiles import ROLE_USAGE, Role
from appliance.pki.reading import read_certificates, read_key
from appliance.pki.signing import certificate_pem

SOON_DAYS: Final = 30
"""Closer to its end than this, a certificate deserves a word when it is installed."""


@dataclass(frozen=True)
class Sources:
    """The files a CA sent, and the key if it was made elsewhere (else the pending one from `certs csr`)."""

    certificate: Path
    chain: Path | None = None
    trust: Path | None = None
    key: Path | None = None
    passphrase: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Installed:
    """What was written, and what the operator should know though it is no error."""

    leaf: x509.Certificate
    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def install(
    layout: Layout,
    role: Role,
    name: str | None,
    sources: Sources,
    now: datetime,
    *,
    keep_encrypted: bool = False,
    replace: bool = False,
) -> Installed:
    """Check what a CA sent, and install it: trust bundle, key, and certificate with its intermediates in order.

    The key is written without its passphrase unless `keep_encrypted`, so that the service can start unattended.

    Raises: CertificateError: lists every problem; nothing was written.
    """
    problems: list[str] = []
    given = _read(sources.certificate, problems)
    others = _read(sources.chain, problems)
    new_trust = _read(sources.trust, problems)
    anchors = new_trust if sources.trust else _current_trust(layout, problems)
    if sources.trust and new_trust:
        problems += [f"{sources.trust}: {reason}" for reason in check_trust_bundle(certificate_pem(*new_trust), now)]
    keys, key_problems = _read_keys(layout, role, name, sources)

    leaf = _choose_leaf(given, [key for _, key in keys])
    files: list[NewFile] = []
    notes: list[str] = []
    key_path, key = next(((path, key) for path, key in keys if leaf and key_matches(leaf, key)), (None, None))
    if key is None:  # of several keys one may be unreadable, if another is the right one
        problems += key_problems
    if leaf is not None:
        if keys and key is None:
            tried = " nor ".join(str(path) for path, _ in keys)
            problems.append(f"{sources.certificate} does not belong to the key in {tried}; give its own with --key.")
        problems += [f"{sources.certificate}: {reason}" for reason in leaf_problems(leaf, ROLE_USAGE[role], now)]
        weak = server_weakness(leaf.public_key()) if role == "server" else None
        if weak and not any(weak in problem for problem in problems):
            problems.append(f"{sources.certificate}: {weak}.")
        pool = [cert for cert in (*given, *others) if cert != leaf]
        path = find_path(leaf, pool, anchors, now)
        if anchors:
            problems += path.problems
        notes = _notes(leaf, path.certificates, pool, now)
        files = _plan_trust(layout, new_trust, replace)
        if key is not None and key_path != layout.key(role, name):
            if sources.passphrase and not keep_encrypted:
                notes.append(f"{layout.key(role, name)} has no passphrase, so that the service starts unattended.")
            files.append(
                NewFile(
                    layout.key(role, name),
                    key_pem(key, sources.passphrase if keep_encrypted else None),
                    "service",
                    replace,
                )
            )
        content = certificate_pem(leaf, *path.intermediates)
        files.append(NewFile(layout.certificate(role, name), content, "public", replace))
    _check_targets(files, problems)
    _refuse(problems)

    write_all(files)
    if key_path == layout.pending_key(role, name):
        remove(key_path)
        remove(layout.request(role, name))
    assert leaf is not None  # without one there was a problem
    return Installed(leaf, tuple(file.path for file in files), tuple(notes))


def _read(path: Path | None, problems: list[str]) -> list[x509.Certificate]:
    if path is None:
        return []
    try:
        return read_certificates(path)
    except CertificateError as error:
        problems.append(str(error))
        return []


def _current_trust(layout: Layout, problems: list[str]) -> list[x509.Certificate]:
    if not exists(layout.ca_certificate):
        problems.append(
            f"There is no trust anchor: {layout.ca_certificate} does not exist; give the CA's root with --ca."
        )
        return []
    return _read(layout.ca_certificate, problems)


def _read_keys(
    layout: Layout, role: Role, name: str | None, sources: Sources
) -> tuple[list[tuple[Path, PrivateKey]], list[str]]:
    """Return the key given, or else the pending one and the one in use, which the CA may have certified again."""
    pending = layout.pending_key(role, name)
    if sources.key is not None:
        candidates = [sources.key]
    else:
        candidates = [path for path in (pending, layout.key(role, name)) if exists(path)]
    if not candidates:
        return [], [f"There is no key: neither {pending} (from `appliance certs csr`) nor --key FILE."]
    keys, problems = [], []
    for path in candidates:
        try:
            keys.append((path, read_key(path, sources.passphrase, remedy="Give --passphrase-file.")))
        except CertificateError as error:
            problems.append(str(error))
    return keys, problems


def _choose_leaf(given: list[x509.Certificate], keys: list[PrivateKey]) -> x509.Certificate | None:
    """Return the certificate of one of the keys; else, so that the rest can be checked too, the first that is no CA."""
    owned = [cert for key in keys for cert in given if key_matches(cert, key)]
    leaves = [cert for cert in given if not is_authority(cert)]
    return next(iter([*owned, *leaves, *given]), None)


def _plan_trust(layout: Layout, new_trust: list[x509.Certificate], replace: bool) -> list[NewFile]:
    content = certificate_pem(*new_trust)
    if not content or (exists(layout.ca_certificate) and read_file(layout.ca_certificate) == content):
        return []
    return [NewFile(layout.ca_certificate, content, "public", replace)]


def _notes(
    leaf: x509.Certificate,
    path: tuple[x509.Certificate, ...],
    pool: list[x509.Certificate],
    now: datetime,
) -> list[str]:
    notes = []
    if days_left(leaf, now) < SOON_DAYS:
        notes.append(f"{title(leaf)} expires in {days_left(leaf, now):.0f} days.")
    notes += [
        f"{title(cert)} has no keyUsage; clients on Python 3.13 and later refuse it. Ask its CA for one with it."
        for cert in path[1:]
        if key_usages(cert) is None
    ]
    used = {fingerprint(cert) for cert in path}
    notes += [
        f"{title(cert)} is not part of the chain and was left out."
        for cert in pool
        if fingerprint(cert) not in used and not is_self_signed(cert)
    ]
    return notes


def _check_targets(files: list[NewFile], problems: list[str]) -> None:
    try:
        require_absent([file.path for file in files if not file.replace])
    except CertificateError as error:
        problems.append(str(error))


def _refuse(problems: list[str]) -> None:
    if len(problems) == 1:
        raise CertificateError(f"Nothing was installed. {problems[0]}")
    if problems:
        listed = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        raise CertificateError(f"Nothing was installed, for {len(problems)} reasons:{listed}")
