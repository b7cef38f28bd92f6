"""Whether a client certificate that TLS verified once is still believed: its authorities, their dates, revocation.

TLS looks at a certificate when the connection begins; connections live for weeks. This looks on every request, and so
must cost next to nothing for a certificate it has seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Final

from cryptography import x509

from appliance.core.errors import CertificateError
from appliance.pki.chain import climb
from appliance.pki.inspect import date_problems, fingerprint, load_certificates, name_title, title
from appliance.pki.revocation import RevocationList

MAX_VERDICTS: Final = 4096
"""Certificates whose verdict is remembered; beyond it they are judged anew, which costs under a millisecond each."""

_ALWAYS, _NEVER = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found, and between which moments nothing changes it: no certificate or list begins or ends there."""

    problem: str | None
    after: datetime
    until: datetime


class Trust:
    """Whom the appliance believes now. It never changes: a reload makes a new one. Any thread may ask."""

    def __init__(
        self,
        authorities: Sequence[x509.Certificate],
        lists: Sequence[RevocationList] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Make it.

        Args:    authorities: the trust bundle; each is believed by itself, intermediates without their root too.
                 lists: their revocation lists; None: nobody is revoked (tls.crl is not set).
                 strict: refuse certificates of an authority without a current list.
        """
        self.authorities = tuple(authorities)
        self.lists = None if lists is None else tuple(lists)
        self._strict = strict
        self._marks = {fingerprint(authority) for authority in authorities}
        self._verdicts: dict[tuple[bytes, bytes], _Verdict] = {}

    def problem(self, leaf: bytes, chain: bytes, now: datetime) -> str | None:
        """Why a client certificate is not believed, as a sentence for its holder; None when it is.

        The leaf's own dates and purpose are not looked at here.

        Args:    leaf: PEM. chain: PEM of the certificates above it, as TLS verified them; empty where the transport
                 does not tell.
        """
        verdict = self._verdicts.get((leaf, chain))
        if verdict is None or not verdict.after < now <= verdict.until:
            verdict = self._judge(leaf, chain, now)
            if len(self._verdicts) >= MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[leaf, chain] = verdict
        return verdict.problem

    def _judge(self, leaf_pem: bytes, chain_pem: bytes, now: datetime) -> _Verdict:
        try:
            leaf = load_certificates(leaf_pem)[0]
            sent = load_certificates(chain_pem) if chain_pem else []
        except CertificateError:
            return _Verdict("The client certificate, or one above it, cannot be read.", _ALWAYS, _NEVER)
        problem = self._problem(leaf, sent, now)
        moments = [
            moment
            for cert in (*sent, *self.authorities)
            for moment in (cert.not_valid_before_utc, cert.not_valid_after_utc)
        ]
        moments += [moment for each in self.lists or () for moment in (each.this_update, each.next_update)]
        return _Verdict(
            problem,
            max((moment for moment in moments if moment < now), default=_ALWAYS),
            min((moment for moment in moments if moment >= now), default=_NEVER),
        )

    def _problem(self, leaf: x509.Certificate, sent: Sequence[x509.Certificate], now: datetime) -> str | None:
        path = self._path(leaf, sent, now)
        trusted = [place for place, cert in enumerate(path) if place and fingerprint(cert) in self._marks]
        if not trusted:
            return self._without_anchor(path, sent)
        for authority in path[1 : trusted[0] + 1]:
            for sentence in date_problems(authority, now):
                return f"The client certificate {title(leaf)} is no longer backed by a valid CA: {sentence}"
        # Above the bundle's topmost nobody has a list here: one that a connection brought may be out of the bundle now.
        return next(self._list_problems(path[: trusted[-1] + 1], now), None)

    def _path(
        self, leaf: x509.Certificate, sent: Sequence[x509.Certificate], now: datetime
    ) -> tuple[x509.Certificate, ...]:
        """From the leaf up as far as it goes, through certificates of the bundle where there is a choice.

        It goes on beyond the first trusted authority, because one above it may have revoked that one.
        """
        trusted = sorted(self.authorities, key=lambda authority: bool(date_problems(authority, now)))
        return climb(leaf, (*trusted, *sent))

    def _without_anchor(self, path: Sequence[x509.Certificate], sent: Sequence[x509.Certificate]) -> str | None:
        """Judge a certificate above which nothing of the bundle was found."""
        if sent or not self.authorities:
            return (
                f"The client certificate {title(path[0])} comes from {name_title(path[-1].issuer)}, which this "
                "appliance does not trust (any more): tls.client_ca does not hold that CA."
            )
        # The transport told the leaf alone, and an intermediate that the client sent is not known here. TLS verified
        # it against the bundle of that moment; revocation cannot be looked up, so where it is wanted we refuse.
        if self.lists is None:
            return None
        return (
            f"The client certificate {title(path[0])} cannot be checked against the revocation lists: the CA that "
            f"issued it, {name_title(path[0].issuer)}, must be in tls.client_ca for that."
        )

    def _list_problems(self, path: Sequence[x509.Certificate], now: datetime) -> Iterator[str]:
        if self.lists is None:
            return
        for cert, issuer in pairwise(path):
            for each in self.lists:
                if cert.serial_number in each.serials and each.covers(issuer):
                    what = "The client certificate" if cert is path[0] else "A CA above the client certificate,"
                    yield (
                        f"{what} {title(cert)} (serial {cert.serial_number:x}) was revoked by {title(issuer)} "
                        f"{each.entry(cert.serial_number)}."
                    )
        if not self._strict:
            return
        for issuer in path[1:]:
            theirs = [each for each in self.lists if each.covers(issuer)]  # several, where a list comes in parts
            if not theirs or not all(each.current(now) for each in theirs):
                yield (
                    f"Client certificates of {title(issuer)} are refused while there is no current revocation list of "
                    'that CA (tls.crl_policy is "strict"); the operator must renew the file of tls.crl.'
                )
