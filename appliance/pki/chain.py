"""From a leaf to a root: finding the path, and saying where it breaks.

The walk is ours because the operator needs the one sentence that says which certificate is missing; name constraints,
where a CA has any, are judged by the library's verifier.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.x509 import verification

from appliance.pki.inspect import (
    authority_problem,
    date_problems,
    extension,
    fingerprint,
    is_self_signed,
    name_title,
    signed_by,
    title,
)

MAX_DEPTH: Final = 8
"""Certificates in a path; real ones have two to four."""

MAX_PATHS: Final = 32
"""Cross-signed bundles offer several paths; more than this many is a bundle made to waste time."""


@dataclass(frozen=True)
class Path:
    """A leaf, what signed it, up to a root (left out when none was found); and what is wrong, as sentences."""

    certificates: tuple[x509.Certificate, ...]
    problems: tuple[str, ...]

    @property
    def intermediates(self) -> tuple[x509.Certificate, ...]:
        """What a server sends after its leaf: all but the root, which clients have."""
        return tuple(cert for cert in self.certificates[1:] if not is_self_signed(cert))


def find_path(
    leaf: x509.Certificate,
    others: Sequence[x509.Certificate],
    anchors: Sequence[x509.Certificate],
    now: datetime,
) -> Path:
    """Return the first path from the leaf to a trusted root without problems, else the first path with them.

    Args: others: may be used on the way, in any order; anchors: the trust bundle, where a path must end at a root.
    """
    trusted = {fingerprint(cert) for cert in anchors}
    first: Path | None = None
    for number, found in enumerate(_walk((leaf,), (*others, *anchors), trusted)):
        path = Path(found, tuple(_path_problems(found, now)))
        if not path.problems:
            return path
        first = first or path
        if number >= MAX_PATHS:
            break
    return first or _broken_path(leaf, others, anchors)


def verify(certificates: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate], now: datetime) -> list[str]:
    """Return why a client that trusts `anchors` refuses what a server sends (leaf first); empty when it does not."""
    return list(find_path(certificates[0], certificates[1:], anchors, now).problems)


def climb(leaf: x509.Certificate, candidates: Sequence[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """Return the leaf and what signed it, as far up as it goes; where there is a choice, the earlier candidate."""
    path = [leaf]
    while len(path) < MAX_DEPTH and not is_self_signed(path[-1]):
        upper = next((cert for cert in candidates if cert not in path and signed_by(path[-1], cert)), None)
        if upper is None:
            break
        path.append(upper)
    return tuple(path)


def _walk(
    path: tuple[x509.Certificate, ...], candidates: Sequence[x509.Certificate], trusted: set[str]
) -> Iterator[tuple[x509.Certificate, ...]]:
    top = path[-1]
    if is_self_signed(top):
        if fingerprint(top) in trusted and len(path) > 1:
            yield path
        return
    if len(path) >= MAX_DEPTH:
        return
    tried = {fingerprint(cert) for cert in path}
    for candidate in candidates:
        mark = fingerprint(candidate)
        if candidate.subject == top.issuer and mark not in tried and signed_by(top, candidate):
            tried.add(mark)
            yield from _walk((*path, candidate), candidates, trusted)


def _path_problems(path: Sequence[x509.Certificate], now: datetime) -> Iterator[str]:
    for cert in path[:-1]:
        yield from _signature_problems(cert)
    for below, authority in enumerate(path[1:]):
        yield from date_problems(authority, now)
        reason = authority_problem(authority)
        if reason:
            yield reason
        constraints = extension(authority, x509.BasicConstraints)
        # RFC 5280, section 4.2.1.9: the limit counts CAs below this one, without the leaf.
        if constraints is not None and constraints.path_length is not None and below > constraints.path_length:
            yield f"{title(authority)} allows {constraints.path_length} CAs below it, and the chain has {below}."
    yield from _constraint_problems(path)


def _signature_problems(cert: x509.Certificate) -> Iterator[str]:
    try:
        algorithm = cert.signature_hash_algorithm
    except UnsupportedAlgorithm:
        yield f"{title(cert)} is signed with an algorithm that TLS clients do not know."
        return
    if isinstance(algorithm, hashes.SHA1 | hashes.MD5):
        yield f"{title(cert)} is signed with {algorithm.name.upper()}, which TLS clients refuse; have it issued anew."


def _constraint_problems(path: Sequence[x509.Certificate]) -> Iterator[str]:
    """Judge name constraints alone: of the library's other rules some are narrower than what TLS clients do."""
    if all(extension(cert, x509.NameConstraints) is None for cert in path[1:]):
        return
    anything = verification.ExtensionPolicy.permit_all()
    authority = anything.require_present(x509.BasicConstraints, verification.Criticality.AGNOSTIC, None)
    leaf, *between, root = path
    moment = max(cert.not_valid_before_utc for cert in path)  # dates are judged, and worded, elsewhere
    policy = verification.PolicyBuilder().store(verification.Store([root])).time(moment)
    verifier = policy.extension_policies(ca_policy=authority, ee_policy=anything).build_client_verifier()
    try:
        verifier.verify(leaf, between)
    except verification.VerificationError as error:
        yield f"{title(leaf)} breaks the name constraints of a CA above it: {error}."


def _broken_path(
    leaf: x509.Certificate, others: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate]
) -> Path:
    """Follow the chain as far as it goes, and say what would have to come next."""
    path = climb(leaf, (*others, *anchors))
    top = path[-1]
    if is_self_signed(top):
        what = (
            "is self-signed, and no CA of the trust bundle signed it" if top == leaf else "is not in the trust bundle"
        )
        reason = f"{title(top)} {what}; trust another root, or have the certificate issued by a trusted one."
    elif any(signed_by(top, cert) for cert in path):
        reason = f"The chain goes in a circle at {title(top)}, and no root in it is in the trust bundle; add one."
    elif broken := next(_signature_problems(top), None):
        reason = broken
    elif any(cert.subject == top.issuer for cert in (*others, *anchors)):
        reason = (
            f"{title(top)} was not signed by the {name_title(top.issuer)} given here: "
            "that CA has the same name and another key; get the right one."
        )
    elif top in anchors:
        reason = (
            f"{title(top)} is an intermediate, and its root {name_title(top.issuer)} is not in the trust bundle; "
            "add the root, TLS clients need it."
        )
    else:
        reason = (
            f"The chain ends at {title(top)}: its issuer {name_title(top.issuer)} is neither in the chain "
            "nor in the trust bundle; add that certificate."
        )
    return Path(path, (reason,))
