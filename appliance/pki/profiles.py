"""Certificate profiles: what a root, a server and a client certificate of ours look like.

The defaults stand here, so that they are there without the repository; `certs/profiles/*.toml` shows the same values as
files to copy and change, and a unit test holds the two equal.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from appliance.core.errors import CertificateError
from appliance.pki.keys import KEY_ALGORITHMS, KeyAlgorithm, PrivateKey, server_weakness

Kind = Literal["root", "server", "client"]
Role = Literal["server", "client"]

KEY_USAGES: Final = {
    "digitalSignature": "digital_signature",
    "nonRepudiation": "content_commitment",
    "keyEncipherment": "key_encipherment",
    "dataEncipherment": "data_encipherment",
    "keyAgreement": "key_agreement",
    "keyCertSign": "key_cert_sign",
    "cRLSign": "crl_sign",
}
"""Names by RFC 5280, section 4.2.1.3, and the library's. encipherOnly and decipherOnly have no use in TLS."""

EXTENDED_KEY_USAGES: Final = {
    "serverAuth": ExtendedKeyUsageOID.SERVER_AUTH,
    "clientAuth": ExtendedKeyUsageOID.CLIENT_AUTH,
}
"""Source: RFC 5280, section 4.2.1.12."""

ROLE_USAGE: Final[dict[Role, str]] = {"server": "serverAuth", "client": "clientAuth"}

MAX_DAYS: Final = 36500
"""A century; more is a slip of the finger, and X.509 ends with the year 9999."""


@dataclass(frozen=True)
class Profile:
    """What a certificate of one kind carries, apart from its names.

    `days` of validity from now; `backdate_minutes` before now, for clients whose clock is slow; `path_length` is how
    many certificate authorities may stand below a root, None for a leaf.
    """

    kind: Kind
    days: int
    key: KeyAlgorithm
    key_usage: tuple[str, ...]
    extended_key_usage: tuple[str, ...]
    path_length: int | None
    backdate_minutes: int

    def check(self, source: str) -> None:
        """Return when a certificate of this profile would be accepted by TLS clients.

        Raises: CertificateError: lists every problem; `source` says where the profile came from.
        """
        problems = []
        if self.kind not in get_args(Kind):
            problems.append(f"kind = {self.kind!r}: use root, server or client")
        if not 1 <= self.days <= MAX_DAYS:
            problems.append(f"days = {self.days}: use 1 to {MAX_DAYS}")
        if self.key not in KEY_ALGORITHMS:
            problems.append(f"key = {self.key!r}: use one of {', '.join(KEY_ALGORITHMS)}")
        if not 0 <= self.backdate_minutes <= 1440:
            problems.append(f"backdate_minutes = {self.backdate_minutes}: use 0 to 1440")
        problems += [
            f"key_usage {usage!r}: use one of {', '.join(KEY_USAGES)}"
            for usage in self.key_usage
            if usage not in KEY_USAGES
        ]
        problems += [
            f"extended_key_usage {usage!r}: use serverAuth, clientAuth or an OID such as 1.3.6.1.5.5.7.3.1"
            for usage in self.extended_key_usage
            if usage not in EXTENDED_KEY_USAGES and not _is_oid(usage)
        ]
        problems += self._kind_problems()
        if problems:
            raise CertificateError(f"{source}: " + "; ".join(problems) + ".")

    def _kind_problems(self) -> list[str]:
        if self.kind == "root":
            problems = [] if "keyCertSign" in self.key_usage else ["key_usage: a root needs keyCertSign"]
            if self.path_length is not None and self.path_length < 0:
                problems.append(f"path_length = {self.path_length}: use 0 or more")
            return problems
        problems = [] if "digitalSignature" in self.key_usage else ["key_usage: TLS needs digitalSignature"]
        if "keyCertSign" in self.key_usage:
            problems.append("key_usage: a leaf may not have keyCertSign")
        if self.path_length is not None:
            problems.append("path_length: only a root has one")
        needed = "serverAuth" if self.kind == "server" else "clientAuth"
        if needed not in self.extended_key_usage:
            problems.append(f"extended_key_usage: a {self.kind} needs {needed}")
        if self.kind == "server" and self.key == "ed25519":
            problems.append("key = 'ed25519': gRPC clients do not accept an Ed25519 server certificate")
        return problems

    def check_key(self, key: PrivateKey) -> None:
        """Return when the key can serve in a certificate of this kind.

        Raises: CertificateError: stock clients would refuse it.
        """
        reason = server_weakness(key.public_key()) if self.kind == "server" else None
        if reason:
            raise CertificateError(f"The key cannot be used for a server: {reason}.")

    def extensions(self) -> list[tuple[x509.ExtensionType, bool]]:
        """Return basicConstraints, keyUsage and extendedKeyUsage, each with whether it is critical.

        Source: RFC 5280, sections 4.2.1.9 and 4.2.1.3 (critical), 4.2.1.12 (not critical, so that old clients read on).
        """
        constraints = x509.BasicConstraints(ca=self.kind == "root", path_length=self.path_length)
        extensions: list[tuple[x509.ExtensionType, bool]] = [(constraints, True), (key_usage(self.key_usage), True)]
        if self.extended_key_usage:
            oids = [EXTENDED_KEY_USAGES.get(use) or x509.ObjectIdentifier(use) for use in self.extended_key_usage]
            extensions.append((x509.ExtendedKeyUsage(oids), False))
        return extensions


# Ten years: a root is replaced by hand at every client. No path below it but leaves.
ROOT: Final = Profile(
    kind="root",
    days=3650,
    key="ecdsa-p256",
    key_usage=("keyCertSign", "cRLSign"),
    extended_key_usage=(),
    path_length=0,
    backdate_minutes=5,
)

# A year and a month: under the 398 days (CA/Browser Forum baseline requirements, 6.3.2, before March 2026) and the
# 825 days (Apple, for private roots) that clients have enforced. digitalSignature alone: TLS 1.3 and ECDHE sign, they
# do not encipher with the certificate's key (RFC 8446, section 4.4.2.2).
SERVER: Final = Profile(
    kind="server",
    days=397,
    key="ecdsa-p256",
    key_usage=("digitalSignature",),
    extended_key_usage=("serverAuth",),
    path_length=None,
    backdate_minutes=5,
)

CLIENT: Final = dataclasses.replace(SERVER, kind="client", extended_key_usage=("clientAuth",))

DEFAULTS: Final[dict[Kind, Profile]] = {"root": ROOT, "server": SERVER, "client": CLIENT}


def load_profile(path: Path, kind: Kind) -> Profile:
    """Return the profile in a TOML file; keys it leaves out have their defaults.

    Raises: CertificateError: unreadable, not TOML, unknown keys, wrong types, or a profile of another kind.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CertificateError(f"{path} is not valid TOML: {error}.") from error
    if table.get("kind") != kind:
        raise CertificateError(
            f"{path} says kind = {table.get('kind')!r}; this command needs a profile of kind {kind!r}."
        )
    problems = []
    values: dict[str, object] = {}
    for key, value in table.items():
        if key not in _FIELD_TYPES:
            problems.append(f"unknown key {key!r}; known are {', '.join(_FIELD_TYPES)}")
        elif type(value) is not _FIELD_TYPES[key] or (type(value) is list and any(type(v) is not str for v in value)):
            problems.append(f"{key} = {value!r} is not a {_TYPE_WORDS[_FIELD_TYPES[key]]}")
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    if problems:
        raise CertificateError(f"{path}: " + "; ".join(problems) + ".")
    profile = dataclasses.replace(DEFAULTS[kind], **values)  # type: ignore[arg-type]  # types were checked above
    profile.check(str(path))
    return profile


_FIELD_TYPES: Final[dict[str, type]] = {
    "kind": str,
    "days": int,
    "key": str,
    "key_usage": list,
    "extended_key_usage": list,
    "path_length": int,
    "backdate_minutes": int,
}
_TYPE_WORDS: Final[dict[type, str]] = {str: "string", int: "whole number", list: "list of strings"}


def key_usage(names: tuple[str, ...]) -> x509.KeyUsage:
    """Return the keyUsage extension with the named bits set."""
    bits = {attribute: name in names for name, attribute in KEY_USAGES.items()}
    return x509.KeyUsage(**bits, encipher_only=False, decipher_only=False)


def _is_oid(text: str) -> bool:
    try:
        x509.ObjectIdentifier(text)
    except ValueError:
        return False
    return True
