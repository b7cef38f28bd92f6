"""Subject alternative names: what an operator types, checked, turned into what a certificate holds."""

import ipaddress
import re
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509

from appliance.core.errors import CertificateError

MAX_COMMON_NAME: Final = 64
"""Characters a common name may have. Source: RFC 5280, appendix A.1, ub-common-name."""

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
_EMAIL: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@(?P<domain>[^@]+)", re.ASCII)
_URI: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+", re.ASCII)


def server_san(text: str) -> x509.GeneralName:
    """Read one `--san` of a server: `host`, `*.domain`, an IP address, or either with `dns:` / `ip:` before it.

    Raises: CertificateError: neither a host name nor an address that a client could connect to.
    """
    kind, value = _split(text, ("dns", "ip"))
    if kind == "ip" or (kind == "" and _looks_like_ip(value)):
        return x509.IPAddress(_address(value))
    return x509.DNSName(dns_name(value, wildcard=True))


def client_san(text: str) -> x509.GeneralName:
    """Read one `--san` of a client: `uri:spiffe://…`, `dns:host` or `email:a@b`.

    Raises: CertificateError: the type is missing, or the value is not of that type.
    """
    kind, value = _split(text, ("uri", "dns", "email"))
    match kind:
        case "uri":
            return x509.UniformResourceIdentifier(_uri(value))
        case "dns":
            return x509.DNSName(dns_name(value, wildcard=False))
        case "email":
            return x509.RFC822Name(_email(value))
        case _:
            raise CertificateError(
                f"--san {text!r} does not say what it is; write uri:{text}, dns:{text} or email:{text}."
            )


def server_sans(texts: Sequence[str]) -> tuple[x509.GeneralName, ...]:
    """Read all names of a server, without repetitions.

    Raises: CertificateError: there is none, or one is not valid.
    """
    if not texts:
        raise CertificateError("A server certificate needs a name: give --san HOST or --san ADDRESS, or several.")
    return tuple(dict.fromkeys(server_san(text) for text in texts))


def client_sans(texts: Sequence[str]) -> tuple[x509.GeneralName, ...]:
    """Read all names of a client, without repetitions; none is fine, the common name then speaks.

    Raises: CertificateError: one is not valid, or a SPIFFE ID has a second URI beside it.
    Source: SPIFFE X.509-SVID, section 2: exactly one URI.
    """
    names = tuple(dict.fromkeys(client_san(text) for text in texts))
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    if len(uris) > 1 and any(uri.lower().startswith("spiffe:") for uri in uris):
        raise CertificateError("A certificate with a SPIFFE ID may carry no other URI; leave the other --san uri: out.")
    return names


def common_name(text: str) -> str:
    """Return the text when it can be a common name.

    Raises: CertificateError: it is empty, too long, or has control characters.
    """
    if not text.strip() or len(text) > MAX_COMMON_NAME or not text.isprintable():
        raise CertificateError(f"{text!r} cannot be a name; give 1 to {MAX_COMMON_NAME} printable characters.")
    return text


def server_common_name(names: Sequence[x509.GeneralName]) -> str:
    """Return the first name, or, where that is too long for a common name, the first that fits.

    Raises: CertificateError: none fits.
    """
    texts = [name_text(name) for name in names]
    for text in texts:
        if len(text) <= MAX_COMMON_NAME:
            return text
    raise CertificateError(
        f"Every name is longer than the {MAX_COMMON_NAME} characters of a common name; add a shorter --san."
    )


def dns_name(text: str, *, wildcard: bool) -> str:
    """Return the host name in lower case.

    Raises: CertificateError: it is not a host name.
    Source: RFC 1123, section 2.1 (labels); RFC 9525, section 6.3 (`*` only as the whole left-most label).
    """
    name = text.lower()
    labels = name.split(".")
    if not name.isascii():
        raise CertificateError(f"--san {text!r} is not ASCII; write an international name in its xn-- form.")
    if labels[0] == "*":
        if not wildcard:
            raise CertificateError(f"--san {text!r}: a client has a name of its own; a wildcard is for servers.")
        labels = labels[1:]
        if len(labels) < 2:
            raise CertificateError(f"--san {text!r} is too wide, no TLS client accepts it; write *.domain.tld.")
    if "*" in "".join(labels):
        raise CertificateError(f"--san {text!r}: a wildcard stands alone in the left-most label, as in *.example.com.")
    valid = len(name) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()
    if not valid:
        raise CertificateError(
            f"--san {text!r} is neither a host name nor an IP address; give letters, digits and hyphens between dots."
        )
    return name


def name_text(name: x509.GeneralName) -> str:
    """Return a name's value as text, without its type."""
    return str(name.value)


def typed_text(name: x509.GeneralName) -> str:
    """Return a name as `dns:`, `ip:`, `uri:` or `email:` and its value; other kinds as `other:` and their class."""
    match name:
        case x509.DNSName():
            return f"dns:{name.value}"
        case x509.IPAddress():
            return f"ip:{name.value}"
        case x509.UniformResourceIdentifier():
            return f"uri:{name.value}"
        case x509.RFC822Name():
            return f"email:{name.value}"
        case _:
            return f"other:{type(name).__name__}"


def _split(text: str, kinds: tuple[str, ...]) -> tuple[str, str]:
    kind, colon, value = text.strip().partition(":")
    if colon and kind.lower() in kinds:
        return kind.lower(), value
    return "", text.strip()


def _looks_like_ip(value: str) -> bool:
    """True for addresses and for what was meant to be one, so that the error speaks of addresses."""
    return ":" in value or "/" in value or bool(re.fullmatch(r"[0-9.]+", value))


def _address(value: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    literal = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    try:
        address = ipaddress.ip_address(literal)
    except ValueError:
        raise CertificateError(
            f"--san {value!r} is not an IP address; give one, without range, port or zone."
        ) from None
    if address.is_unspecified or address.is_multicast or getattr(address, "scope_id", None):
        raise CertificateError(f"--san {value!r} is not an address that a client connects to; give the host's own.")
    return address


def _uri(value: str) -> str:
    if not _URI.fullmatch(value):
        raise CertificateError(
            f"--san uri:{value} is not an absolute URI in ASCII, such as uri:spiffe://example.org/app."
        )
    try:
        parts = urlsplit(value)
    except ValueError:
        raise CertificateError(f"--san uri:{value} is not a URI; its host part cannot be read.") from None
    if parts.scheme == "spiffe":
        # SPIFFE-ID, section 2: a trust domain and a path, nothing else.
        if not re.fullmatch(r"[a-z0-9._-]+", parts.netloc) or parts.query or parts.fragment or parts.path.endswith("/"):
            raise CertificateError(f"--san uri:{value} is not a SPIFFE ID; write spiffe://trust-domain/path.")
    elif "://" in value and not parts.netloc:
        raise CertificateError(f"--san uri:{value} has no host after its //.")
    return value


def _email(value: str) -> str:
    found = _EMAIL.fullmatch(value)
    if not found:
        raise CertificateError(f"--san email:{value} is not an e-mail address in ASCII.")
    domain = dns_name(found["domain"], wildcard=False)
    return f"{value[: found.start('domain')]}{domain}"
