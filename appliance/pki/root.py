"""The root CA of a site that has none of its own."""

from datetime import datetime

from cryptography import x509
from cryptography.x509.oid import NameOID

from appliance.core.errors import CertificateError
from appliance.pki.files import Layout, NewFile, exists, write_all
from appliance.pki.inspect import authority_problem, date_problems, key_matches
from appliance.pki.keys import generate, key_pem
from appliance.pki.names import common_name
from appliance.pki.profiles import ROOT, Profile
from appliance.pki.reading import read_certificates, read_key
from appliance.pki.signing import Issued, certificate_pem, sign, validity


def create_root(name: str, organisation: str | None, now: datetime, profile: Profile = ROOT) -> Issued:
    """Return a new self-signed root.

    Raises: CertificateError: the name cannot be one, or the profile is not a root's.
    """
    profile.check("The root's profile")
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name(name))]
    if organisation:
        attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, common_name(organisation)))
    key = generate(profile.key)
    certificate = sign(
        subject=x509.Name(attributes),
        key=key,
        issuer=None,
        issuer_key=key,
        period=validity(profile, now),
        extensions=profile.extensions(),
    )
    return Issued(certificate, key)


def write_root(layout: Layout, root: Issued, *, replace: bool) -> None:
    """Write `ca.key` and `ca.crt`.

    Raises: CertificateError: one exists and may not be replaced, or the directory cannot be written.
    """
    key = NewFile(layout.ca_key, key_pem(root.key), "owner", replace)
    write_all([key, NewFile(layout.ca_certificate, certificate_pem(root.certificate), "public", replace)])


def load_root(layout: Layout, now: datetime) -> Issued:
    """Return the CA that signs on this machine.

    Raises: CertificateError: there is none, its key belongs to no certificate in ca.crt, or it may not sign now.
    """
    if not exists(layout.ca_key):
        raise CertificateError(
            f"{layout.ca_key} does not exist, so nothing can be signed here. Make a root: `appliance certs init`; "
            "or use the enterprise's CA: `appliance certs csr`, then `appliance certs import`."
        )
    key = read_key(layout.ca_key, None)
    certificates = read_certificates(layout.ca_certificate)
    certificate = next((cert for cert in certificates if key_matches(cert, key)), None)
    if certificate is None:
        raise CertificateError(
            f"{layout.ca_key} does not belong to any certificate in {layout.ca_certificate}; put the right pair back, "
            "or get certificates from the CA in it: `appliance certs csr`, then `appliance certs import`."
        )
    reason = next(iter(date_problems(certificate, now)), authority_problem(certificate))
    if reason:
        raise CertificateError(f"{layout.ca_certificate}: {reason}")
    return Issued(certificate, key)
