"""The chains hold in real handshakes: OpenSSL as strict as Python 3.13 has it, and BoringSSL through gRPC."""

import ssl
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from datetime import UTC, datetime

import grpc
import pytest
from support.handshake import shake_hands

from appliance.pki.files import Layout
from appliance.pki.importing import Sources, install
from appliance.pki.keys import KeyAlgorithm, generate
from appliance.pki.leaf import Subject, issue, renew, write_leaf
from appliance.pki.names import client_sans, server_sans
from appliance.pki.profiles import CLIENT, ROOT, SERVER
from appliance.pki.root import create_root, write_root
from appliance.pki.signing import Issued

HOSTS = Subject("localhost", server_sans(["localhost", "127.0.0.1", "*.pool.example.com"]))
ADA = Subject("ada", client_sans(["uri:spiffe://example.org/ada"]))
NAMES = pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "a.pool.example.com"])


def set_up(layout: Layout, root: KeyAlgorithm, server: KeyAlgorithm, client: KeyAlgorithm) -> Issued:
    now = datetime.now(UTC)
    ca = create_root("Test Root", None, now, replace(ROOT, key=root))
    write_root(layout, ca, replace=False)
    write_leaf(layout, "server", None, issue(ca, HOSTS, replace(SERVER, key=server), now), replace=False)
    write_leaf(layout, "client", "ada", issue(ca, ADA, replace(CLIENT, key=client), now), replace=False)
    return ca


def strict(purpose: int, layout: Layout) -> ssl.SSLContext:
    """Return a context as `ssl.create_default_context` of Python 3.13 makes it."""
    context = ssl.SSLContext(purpose)
    context.load_verify_locations(layout.ca_certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def shake(layout: Layout, host: str) -> dict[str, object]:
    """Shake hands in memory, both sides strict, and return what the server learnt of the client."""
    server_context = strict(ssl.PROTOCOL_TLS_SERVER, layout)
    server_context.load_cert_chain(layout.certificate("server"), layout.key("server"))
    client_context = strict(ssl.PROTOCOL_TLS_CLIENT, layout)
    client_context.load_cert_chain(layout.certificate("client", "ada"), layout.key("client", "ada"))
    server, _ = shake_hands(server_context, client_context, host)
    return dict(server.getpeercert() or {})


@pytest.mark.parametrize(
    ("root", "server", "client"),
    [
        ("ecdsa-p256", "ecdsa-p256", "ecdsa-p256"),
        ("ecdsa-p384", "ecdsa-p384", "ecdsa-p384"),
        ("rsa-3072", "rsa-3072", "rsa-3072"),
        ("ed25519", "ecdsa-p256", "ed25519"),
    ],
)
def test_strict_openssl_accepts_every_kind_of_key(
    layout: Layout, root: KeyAlgorithm, server: KeyAlgorithm, client: KeyAlgorithm
) -> None:
    set_up(layout, root, server, client)
    assert ("URI", "spiffe://example.org/ada") in shake(layout, "localhost")["subjectAltName"]


@NAMES
def test_strict_openssl_accepts_each_name(layout: Layout, host: str) -> None:
    set_up(layout, "ecdsa-p256", "ecdsa-p256", "ecdsa-p256")
    shake(layout, host)


@pytest.mark.parametrize("host", ["other.example.com", "127.0.0.2", "a.b.pool.example.com", "pool.example.com"])
def test_strict_openssl_refuses_other_names(layout: Layout, host: str) -> None:
    set_up(layout, "ecdsa-p256", "ecdsa-p256", "ecdsa-p256")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(layout, host)


def test_a_server_leaf_is_no_client(layout: Layout) -> None:
    set_up(layout, "ecdsa-p256", "ecdsa-p256", "ecdsa-p256")
    for kind in (layout.certificate, layout.key):
        kind("client", "ada").write_bytes(kind("server").read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake(layout, "localhost")


def test_renewed_certificates_go_on_working(layout: Layout) -> None:
    set_up(layout, "ecdsa-p256", "ecdsa-p256", "ecdsa-p256")
    renew(layout, layout.certificate("server"), datetime.now(UTC))
    renew(layout, layout.certificate("client", "ada"), datetime.now(UTC), keep_key=True)
    shake(layout, "localhost")


def test_an_imported_chain_is_sent_whole(layout: Layout, maker, put) -> None:
    maker.now = datetime.now(UTC)
    root = maker.root()
    upper = maker.intermediate(root, "Upper")
    lower = maker.intermediate(upper, "Lower")
    server, client = maker.server(lower, "localhost"), maker.client(lower, "ada")
    chain, trust = put("chain.pem", upper.certificate, lower.certificate), put("root.pem", root.certificate)
    given = Sources(put("s.pem", server.certificate), chain, trust, put("s.key", server.key))
    install(layout, "server", None, given, maker.now)
    given = Sources(put("c.pem", client.certificate), chain, None, put("c.key", client.key))
    install(layout, "client", "ada", given, maker.now)
    shake(layout, "localhost")


@pytest.fixture
def greeter() -> Iterator[grpc.Server]:
    """A gRPC server that answers every call with the peer's name."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: b" ".join(context.peer_identities() or [])
            )

    with futures.ThreadPoolExecutor(max_workers=1) as pool:
        server = grpc.server(pool, handlers=[Handler()])
        yield server
        stopped: threading.Event = server.stop(grace=0)
        assert stopped.wait(5)


def call(layout: Layout, server: grpc.Server) -> bytes:
    pair = layout.key("server").read_bytes(), layout.certificate("server").read_bytes()
    trust = layout.ca_certificate.read_bytes()
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([pair], root_certificates=trust, require_client_auth=True)
    )
    server.start()
    key, certificate = layout.key("client", "ada"), layout.certificate("client", "ada")
    credentials = grpc.ssl_channel_credentials(trust, key.read_bytes(), certificate.read_bytes())
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        answer: bytes = channel.unary_unary("/test/Greet")(b"", timeout=10, wait_for_ready=False)
        return answer


@pytest.mark.parametrize(
    ("root", "server", "client"),
    [
        ("ecdsa-p256", "ecdsa-p256", "ecdsa-p256"),
        ("ecdsa-p384", "ecdsa-p384", "ecdsa-p384"),
        ("rsa-3072", "rsa-3072", "rsa-3072"),
        ("ed25519", "ecdsa-p256", "ecdsa-p256"),
    ],
)
def test_grpc_accepts_the_chain_on_both_sides(
    layout: Layout, greeter: grpc.Server, root: KeyAlgorithm, server: KeyAlgorithm, client: KeyAlgorithm
) -> None:
    set_up(layout, root, server, client)
    assert b"spiffe://example.org/ada" in call(layout, greeter)


def test_grpc_refuses_ed25519_leaves_which_is_why_servers_have_none(
    layout: Layout, maker, greeter: grpc.Server
) -> None:
    """Should this ever pass, `keys.server_weakness` may go."""
    ca = set_up(layout, "ecdsa-p256", "ecdsa-p256", "ecdsa-p256")
    maker.now = datetime.now(UTC)
    write_leaf(layout, "server", None, maker.server(ca, "localhost", key=generate("ed25519")), replace=True)
    with pytest.raises(grpc.RpcError) as caught:
        call(layout, greeter)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "andshake" in str(caught.value.details())
