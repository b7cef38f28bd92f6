"""The way to the orchestrator, step by step: a name, a connection (through a proxy), TLS. `appliance doctor` takes each
step by itself, so that the first that fails is known; `appliance setup` opens the unit's address rule for it."""

import http.client
import ipaddress
import socket
import ssl
from importlib import resources
from urllib.parse import urlsplit

from appliance.core.config import Orchestrator

_STEP_S = 10.0
"""How long a connection, the proxy's answer or a handshake may take."""


def called(settings: Orchestrator) -> tuple[str, ...]:
    """URLs that the service itself connects to: the central API and what is named *_url, or the proxy on the way."""
    urls = tuple(value for name, value in settings if value and (name == "api_base" or name.endswith("_url")))
    return (settings.proxy,) if urls and settings.proxy else urls


def addresses(url: str) -> tuple[str, ...]:
    """What the URL's host is, without interfaces. Raises: OSError: it cannot be looked up here."""
    found = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    return tuple(sorted({str(entry[4][0]).partition("%")[0] for entry in found}))


def all_addresses(settings: Orchestrator) -> tuple[str, ...]:
    """Those of everybody in `called` that are on other machines. Raises: OSError: one cannot be looked up here."""
    found = dict.fromkeys(address for url in called(settings) for address in addresses(url))
    return tuple(address for address in found if not ipaddress.ip_address(address).is_loopback)


def connect(settings: Orchestrator) -> socket.socket:
    """A connection to the central API, through the proxy if there is one. Raises: OSError: also what a proxy says."""
    assert settings.api_base is not None, "it is enrolled"
    api = urlsplit(settings.api_base)
    via = urlsplit(settings.proxy or settings.api_base)
    assert api.hostname is not None
    assert via.hostname is not None
    connection = http.client.HTTPConnection(via.hostname, via.port, timeout=_STEP_S)
    if settings.proxy:
        connection.set_tunnel(api.hostname, api.port)
    connection.connect()
    return connection.sock


def handshake(settings: Orchestrator, raw: socket.socket) -> ssl.SSLSocket:
    """TLS over the connection, verified as the calls' own, which gRPC makes: with its roots unless there is a root_ca.

    Raises: OSError (SSLCertVerificationError among them): there is none; a file of the section cannot be read.
    """
    roots = settings.root_ca or resources.files("grpc") / "_cython" / "_credentials" / "roots.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=roots.read_bytes().decode("ascii", "ignore"))
    if settings.certificate is not None:
        context.load_cert_chain(settings.certificate, settings.key)
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(raw, server_hostname=urlsplit(settings.api_base).hostname)
