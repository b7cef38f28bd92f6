"""Who is calling, and what may they do.

The socket verifies a client certificate when one is sent; who may do what is decided here, on every request, so that a
principal removed or a certificate expired takes effect at once, on live connections too; a key revoked, within a
millisecond (`keys.LOOK_S`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Protocol

from appliance.api.keys import DEFAULT_PRINCIPAL, KeyEntry, KeyStore
from appliance.core.config import Config, Principal
from appliance.core.errors import CertificateError, CredentialsMissing, KeyInvalid, NotPermitted, RateLimited
from appliance.core.sharing import SharedLimits, SharedMeter
from appliance.core.types import Call, ModelKey
from appliance.pki.inspect import ClientIdentity, client_identity
from appliance.pki.trust import Trust

_SCHEMES = ("key", "bearer")
_PRIORITIES = {"low": -1, "normal": 0, "high": 1}
_SESSION_HEADER = "x-clarifai-session-token"
"""Where the SDKs put what their user passes as `token=`, a PAT too (PROTOCOL 1.4)."""
_ROUNDING = 1e-3
"""Requests: what a float may be off for a rate of thousands after months."""
_identity_of = lru_cache(maxsize=4096)(client_identity)
"""A certificate is parsed once, not on every request of its connection."""


class Meter:
    """Rate and concurrency of one principal, at all fronts together if there are several.

    The rate is a token bucket (Turner 1986), kept as two numbers that fronts can add up without waiting for each other:
    requests admitted so far, and `idle`, those that were missed for good while the bucket was full. By the clock,
    `clock() * rate` requests were due; what was admitted or missed beyond that is missing in the bucket. While
    fronts decide at once, each may admit one request too many; it is missing afterwards.
    """

    def __init__(self, principal: Principal, clock: Callable[[], float], limits: SharedLimits | None = None) -> None:
        """Args: limits: what fronts know of each other; None: there is only this one."""
        self.principal = principal
        self._rate, self._concurrency = principal.requests_per_second, principal.concurrency
        size = principal.burst or max(1.0, self._rate)
        self._shared: SharedMeter | None = None
        if limits is not None and (self._rate or self._concurrency):
            self._shared = limits.meter(f"{principal.name} {self._rate} {size} {self._concurrency}")
            if self._shared is None:  # no room for one more: each front has its part
                self._rate /= limits.fronts
                size = max(1.0, size / limits.fronts)
                self._concurrency = self._concurrency and max(1, self._concurrency // limits.fronts)
        self._most = size - 1 + _ROUNDING
        self._clock = clock
        self._admitted = 0
        self._idle = 0.0
        self.in_flight = 0
        """Requests at this front, where no others are counted."""

    def check(self) -> None:
        """Raises: RateLimited: this request would be over the principal's rate or concurrency."""
        principal, shared = self.principal, self._shared
        if self._concurrency and (shared.in_flight() if shared else self.in_flight) >= self._concurrency:
            raise RateLimited(
                f"Principal {principal.name!r} exceeded its limit of {principal.concurrency} requests at once."
            )
        if self._rate:
            due = self._clock() * self._rate
            admitted, idle = shared.look() if shared else (self._admitted, self._idle)
            idle = self._idle = idle if idle > due - admitted else due - admitted
            if admitted + idle - due > self._most:
                raise RateLimited(
                    f"Principal {principal.name!r} exceeded its limit of "
                    f"{principal.requests_per_second:g} requests per second."
                )

    def take(self) -> None:
        """Count one request that `check` let pass, until it leaves."""
        if self._shared:
            self._shared.take(self._idle)
        else:
            self.in_flight += 1
            self._admitted += 1

    def leave(self) -> None:
        """The request is over."""
        if self._shared:
            self._shared.leave()
        else:
            self.in_flight -= 1


@dataclass(frozen=True, slots=True)
class Grant:
    """What a caller was found to be: one principal, or two whose rights intersect (`require = "both"`)."""

    meters: tuple[Meter, ...]
    key_id: str = ""
    certificate: str = ""
    """SHA-256 of the client certificate, hex, if it counted."""
    credential: str = field(init=False)
    """What was shown, for the log: "key:" and the key's id, "certificate:" and 16 digits of its SHA-256, or both."""
    name: str = field(init=False)
    """For logs and fair queues."""
    priority: int = field(init=False)
    """In queues, higher goes first; of two principals the lower one."""
    _allowed: dict[ModelKey, bool] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "+".join(meter.principal.name for meter in self.meters))
        shown = {"key": self.key_id, "certificate": self.certificate[:16]}
        object.__setattr__(self, "credential", "+".join(f"{kind}:{text}" for kind, text in shown.items() if text))
        object.__setattr__(self, "priority", min(_PRIORITIES[meter.principal.priority] for meter in self.meters))

    def user_id(self, default: str) -> str:
        """Who the caller is for GetUser("me")."""
        return next((meter.principal.user_id for meter in self.meters if meter.principal.user_id), default)

    def allows(self, model: ModelKey) -> bool:
        """Whether every principal of the grant may use that model."""
        known = self._allowed.get(model)
        if known is None:
            known = self._allowed[model] = all(
                _matches(model.user_id, meter.principal.users)
                and _matches(model.app_id, meter.principal.apps)
                and _matches(model.model_id, meter.principal.models)
                for meter in self.meters
            )
        return known

    def check_model(self, model: ModelKey) -> None:
        """Raises: NotPermitted: not every principal of the grant may use that model."""
        if not self.allows(model):
            raise NotPermitted(f"Principal {self.name!r} may not use model {model}.")

    def check(self) -> None:
        """See whether a request may come now; it is not counted. Raises: RateLimited."""
        for meter in self.meters:
            meter.check()

    def take(self) -> None:
        """Count one request that `check` let pass, until it calls `leave`."""
        for meter in self.meters:
            meter.take()

    def leave(self) -> None:
        """The request is over."""
        for meter in self.meters:
            meter.leave()

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count one request against rate and concurrency for the length of a block. Raises: RateLimited."""
        self.check()
        self.take()
        try:
            yield
        finally:
            self.leave()


class Authentication(Protocol):
    """Tells who is calling."""

    def configure(self, config: Config) -> None:
        """Take over a configuration."""

    def grant(self, call: Call) -> Grant:
        """Who that is. Raises: AccessError: nobody who may call."""


class Authenticator:
    """Turns a call's credentials into a grant, by `[auth] require`."""

    def __init__(
        self,
        config: Config,
        keys: KeyStore,
        clock: Callable[[], float] = time.monotonic,
        trust: Callable[[], Trust] | None = None,
        limits: SharedLimits | None = None,
    ) -> None:
        """Make it.

        Args:
            trust: whose client certificates are believed at this moment; None: whoever the transport let in.
            limits: what fronts know of each other, so that they hold for all together; None: there is only this one.
        """
        self.keys = keys
        self._trust = trust
        self._clock = clock
        self._limits = limits
        self._meters: dict[str, Meter] = {}
        self._by_identity: dict[str, str] = {}
        self._by_key: dict[str, tuple[KeyEntry, Grant]] = {}
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over new principals; those that did not change keep their counters."""
        self._require = config.auth.require
        principals = {principal.name: principal for principal in config.principal}
        principals.setdefault(DEFAULT_PRINCIPAL, Principal(name=DEFAULT_PRINCIPAL))
        self._meters = {
            name: self._meters[name]
            if name in self._meters and self._meters[name].principal == principal
            else Meter(principal, self._clock, self._limits)
            for name, principal in principals.items()
        }
        self._by_key = {}  # made anew with the meters of now
        self._by_identity = {
            _comparable(identity): principal.name for principal in config.principal for identity in principal.identities
        }

    def grant(self, call: Call) -> Grant:
        """Who is calling.

        Raises: CredentialsMissing: no key or certificate where one is required. KeyInvalid: unknown or revoked.
            NotPermitted: a certificate or key that belongs to no principal; a certificate that is revoked, expired or
                of an authority that is not trusted any more.
        """
        if self._require == "none":
            return Grant((self._meters[DEFAULT_PRINCIPAL],))
        by_certificate = self._require in ("certificate", "both") or (
            self._require == "either" and call.certificate is not None
        )
        certified = self._certificate(call) if by_certificate else None
        if certified is not None and self._require != "both":
            return certified
        keyed = self._key(call)
        if certified is None:
            return keyed
        # Key and certificate of one principal: its limits count once.
        return Grant(tuple(dict.fromkeys((*certified.meters, *keyed.meters))), keyed.key_id, certified.certificate)

    def _key(self, call: Call) -> Grant:
        scheme, _, key = call.metadata.get("authorization", "").strip().partition(" ")
        if not scheme:
            scheme, key = _SCHEMES[0], call.metadata.get(_SESSION_HEADER, "")
        key = key.strip()
        if not key or scheme.lower() not in _SCHEMES:
            raise CredentialsMissing('The call brings no key; send the header "authorization: Key <PAT>".')
        entry = self.keys.find(key)
        if entry is None:
            raise KeyInvalid("The key is not known to this appliance, or was revoked; ask its operator for one.")
        known = self._by_key.get(entry.sha256)
        if known is not None and known[0] is entry:
            return known[1]
        meter = self._meters.get(entry.principal)
        if meter is None:
            raise NotPermitted(f"Key {entry.id} belongs to principal {entry.principal!r}, which is not configured.")
        grant = Grant((meter,), entry.id)
        self._by_key[entry.sha256] = (entry, grant)
        return grant

    def _certificate(self, call: Call) -> Grant:
        if call.certificate is None:
            raise CredentialsMissing(
                "The call brings no client certificate; connect with one that a [[principal]] of this appliance names."
            )
        try:
            identity = _identity_of(call.certificate)
        except CertificateError as error:
            raise NotPermitted("The client certificate cannot be read.", detail=str(error)) from error
        self._check_usable(call, identity)
        for name in identity.names:
            if name in self._by_identity:
                return Grant((self._meters[self._by_identity[name]],), certificate=identity.fingerprint)
        shown = ", ".join(identity.names) or "no name"
        raise NotPermitted(f"The client certificate ({shown}) belongs to no principal of this appliance.")

    def _check_usable(self, call: Call, identity: ClientIdentity) -> None:
        """Raises: NotPermitted: out of its time, for servers, revoked, or of an authority not trusted any more."""
        now = datetime.now(UTC)
        if not identity.not_before <= now <= identity.not_after:
            raise NotPermitted(f"The client certificate is valid from {identity.not_before} to {identity.not_after}.")
        if not identity.client_auth:
            raise NotPermitted("The client certificate lacks the extended key usage clientAuth.")
        problem = self._trust().problem(call.certificate or b"", call.chain, now) if self._trust else None
        if problem is not None:
            raise NotPermitted(problem)


class OneCaller:
    """Every call is of one principal, whom somebody else has let in; behind all others in every queue.

    The principal is the configured one of that name, for its models, rate and concurrency; else it may use all of them.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        limits: SharedLimits | None = None,
    ) -> None:
        """Args: limits: as for `Authenticator`."""
        self._name, self._clock, self._limits = name, clock, limits
        self._grant: Grant | None = None
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over the principal as it is configured now; unchanged, it keeps its counters."""
        found = next((each for each in config.principal if each.name == self._name), Principal(name=self._name))
        principal = found.model_copy(update={"priority": "low"})
        if self._grant is None or self._grant.meters[0].principal != principal:
            self._grant = Grant((Meter(principal, self._clock, self._limits),))

    def grant(self, call: Call) -> Grant:
        """The one there is."""
        assert self._grant is not None, "configured"
        return self._grant


def _comparable(identity: str) -> str:
    """DNS names have no case; certificates' come in lower case."""
    return identity.lower() if identity.startswith("dns:") else identity


def _matches(text: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)
