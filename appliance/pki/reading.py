"""From a file the operator names to certificates and keys, in the formats CAs hand out; errors name the file."""

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs7

from appliance.core.errors import CertificateError
from appliance.pki.files import read_file
from appliance.pki.inspect import check_readable, key_is_encrypted, load_certificates, load_private_key, supported_key
from appliance.pki.keys import PrivateKey


def read_certificates(path: Path) -> list[x509.Certificate]:
    """Return the certificates of a PEM, DER or PKCS#7 (.p7b) file; at least one.

    Raises: CertificateError: names the file and what to do.
    """
    content = read_file(path)
    try:
        return _certificates(content)
    except CertificateError as error:
        raise CertificateError(f"{path}: {error}", detail=error.detail) from error


def read_key(path: Path, passphrase: bytes | None, remedy: str = "") -> PrivateKey:
    """Return the private key of a PEM or DER file: PKCS#8, EC or RSA, encrypted or not.

    `remedy` is what the error adds when a passphrase is missing.

    Raises: CertificateError: names the file and what to do; never shows any of its content.
    """
    content = read_file(path)
    try:
        if content[:1] == b"\x30":
            return _der_key(content, passphrase)
        return load_private_key(content, passphrase)
    except CertificateError as error:
        hint = f" {remedy}" if remedy and passphrase is None and key_is_encrypted(content) else ""
        raise CertificateError(f"{path}: {error}{hint}") from error


def read_passphrase(path: Path) -> bytes:
    """Return the first line of the file, without its line end.

    Raises: CertificateError: unreadable or empty.
    """
    passphrase = read_file(path).split(b"\n", 1)[0].removesuffix(b"\r")
    if not passphrase:
        raise CertificateError(f"{path} is empty; its first line must be the passphrase.")
    return passphrase


def _certificates(content: bytes) -> list[x509.Certificate]:
    if b"-----BEGIN CERTIFICATE REQUEST-----" in content or b"-----BEGIN NEW CERTIFICATE REQUEST-----" in content:
        raise CertificateError("This is the certificate request; send it to the CA and import what it sends back.")
    if b"-----BEGIN PKCS7-----" in content:
        return _pkcs7(content, pem=True)
    if content[:1] != b"\x30":
        return load_certificates(content)
    try:
        certificate = x509.load_der_x509_certificate(content)
    except ValueError:
        return _pkcs7(content, pem=False)
    check_readable(certificate)
    return [certificate]


def _pkcs7(content: bytes, *, pem: bool) -> list[x509.Certificate]:
    load = pkcs7.load_pem_pkcs7_certificates if pem else pkcs7.load_der_pkcs7_certificates
    try:
        certificates = load(content)
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(
            "This is neither a DER certificate nor a PKCS#7 bundle. If it is PKCS#12 (.p12, .pfx), convert it: "
            "openssl pkcs12 -in FILE -nokeys -out chain.pem; openssl pkcs12 -in FILE -nocerts -out key.pem."
        ) from None
    if not certificates:
        raise CertificateError("This PKCS#7 bundle holds no certificate.")
    for certificate in certificates:
        check_readable(certificate)
    return certificates


def _der_key(content: bytes, passphrase: bytes | None) -> PrivateKey:
    try:
        return supported_key(serialization.load_der_private_key(content, None))
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError("This binary file is not a private key we can read; give PEM or PKCS#8 DER.") from None
    except TypeError:
        pass  # encrypted
    if not passphrase:
        raise CertificateError("The private key is encrypted and no passphrase was given.")
    try:
        return supported_key(serialization.load_der_private_key(content, passphrase))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError("The private key cannot be decrypted; the passphrase is wrong.") from None
