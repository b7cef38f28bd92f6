"""Private keys: made, named, written."""

from typing import Final, Literal, TypeAlias, get_args

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

KeyAlgorithm = Literal["ecdsa-p256", "ecdsa-p384", "rsa-3072", "ed25519"]
KEY_ALGORITHMS: Final[tuple[KeyAlgorithm, ...]] = get_args(KeyAlgorithm)

PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

MIN_RSA_BITS: Final = 2048
"""Below this OpenSSL's default security level refuses the key. Source: NIST SP 800-131A rev. 2, section 3."""

TLS_CURVES: Final = ("secp256r1", "secp384r1", "secp521r1")
"""Curves a TLS 1.3 certificate may be verified with. Source: RFC 8446, section 4.2.3."""


def generate(algorithm: KeyAlgorithm) -> PrivateKey:
    """Return a fresh private key."""
    match algorithm:
        case "ecdsa-p256":
            return ec.generate_private_key(ec.SECP256R1())
        case "ecdsa-p384":
            return ec.generate_private_key(ec.SECP384R1())
        case "rsa-3072":
            return rsa.generate_private_key(public_exponent=65537, key_size=3072)
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()


def key_type(public_key: object) -> str:
    """Name a public key the way `--key-type` does: `ecdsa-p256`, `rsa-4096`; foreign kinds by their class."""
    match public_key:
        case rsa.RSAPublicKey():
            return f"rsa-{public_key.key_size}"
        case ec.EllipticCurvePublicKey():
            short = {"secp256r1": "p256", "secp384r1": "p384", "secp521r1": "p521"}
            return f"ecdsa-{short.get(public_key.curve.name, public_key.curve.name)}"
        case ed25519.Ed25519PublicKey():
            return "ed25519"
        case _:
            return type(public_key).__name__.removesuffix("PublicKey").lower()


def weakness(public_key: object) -> str | None:
    """Return why TLS clients refuse this kind of key in any certificate, or None."""
    match public_key:
        case rsa.RSAPublicKey() if public_key.key_size < MIN_RSA_BITS:
            return f"its RSA key has {public_key.key_size} bits; TLS clients demand {MIN_RSA_BITS} or more"
        case ec.EllipticCurvePublicKey() if public_key.curve.name not in TLS_CURVES:
            return f"its curve {public_key.curve.name} is not one TLS 1.3 knows; use P-256 or P-384"
        case rsa.RSAPublicKey() | ec.EllipticCurvePublicKey() | ed25519.Ed25519PublicKey():
            return None
        case _:
            return f"its key type {key_type(public_key)} is not one we serve with; use ECDSA or RSA"


def server_weakness(public_key: object) -> str | None:
    """Return why stock clients refuse this key in a server certificate, or None.

    Source: BoringSSL, which gRPC links, offers no ed25519 among its signature algorithms unless told to, so that an
    Ed25519 server leaf ends the handshake with `no suitable signature algorithm`; a unit test holds the fact.
    """
    if isinstance(public_key, ed25519.Ed25519PublicKey):
        return "gRPC clients do not accept an Ed25519 server certificate; use ecdsa-p256, ecdsa-p384 or rsa-3072"
    return weakness(public_key)


def signature_hash(key: PrivateKey) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | None:
    """Return the hash that matches the strength of the signing key; None for Ed25519, which brings its own.

    Source: RFC 8446, section 4.2.3, pairs each curve with one hash.
    """
    match key:
        case ed25519.Ed25519PrivateKey():
            return None
        case ec.EllipticCurvePrivateKey() if key.curve.key_size > 384:
            return hashes.SHA512()
        case ec.EllipticCurvePrivateKey() if key.curve.key_size > 256:
            return hashes.SHA384()
        case _:
            return hashes.SHA256()


def key_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """Return the key as PKCS#8 PEM, encrypted when a passphrase is given."""
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        protection = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
