"""TLS contexts of a server and of clients under the test's root."""

import ssl
from typing import Any

from support.appliance import Pki


def server_tls(pki: Pki, **changes: Any) -> ssl.SSLContext:
    """What the appliance shows: its certificate, and optional client certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.folder / "server.crt", pki.folder / "server.key")
    context.load_verify_locations(pki.ca)
    for name, value in changes.items():
        setattr(context, name, value)
    return context


def client_tls(pki: Pki, name: str = "") -> ssl.SSLContext:
    """A client that trusts the test's root."""
    context = ssl.create_default_context(cafile=str(pki.ca))
    if name:
        context.load_cert_chain(pki.folder / "clients" / f"{name}.crt", pki.folder / "clients" / f"{name}.key")
    return context
