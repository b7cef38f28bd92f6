"""What an operator may type after --san."""

import ipaddress

import pytest
from cryptography import x509

from appliance.core.errors import CertificateError
from appliance.pki.names import client_san, client_sans, common_name, server_common_name, server_san, server_sans


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Edge.Example.COM", x509.DNSName("edge.example.com")),
        ("localhost", x509.DNSName("localhost")),
        ("*.edge.example.com", x509.DNSName("*.edge.example.com")),
        ("xn--bcher-kva.example", x509.DNSName("xn--bcher-kva.example")),
        ("dns:10.example.com", x509.DNSName("10.example.com")),
        ("10.0.0.5", x509.IPAddress(ipaddress.ip_address("10.0.0.5"))),
        ("2001:db8::1", x509.IPAddress(ipaddress.ip_address("2001:db8::1"))),
        ("[::1]", x509.IPAddress(ipaddress.ip_address("::1"))),
        ("ip:192.0.2.1", x509.IPAddress(ipaddress.ip_address("192.0.2.1"))),
        ("IP:fe80::1", x509.IPAddress(ipaddress.ip_address("fe80::1"))),
    ],
)
def test_a_server_name_is_recognised_as_host_or_address(text: str, expected: x509.GeneralName) -> None:
    assert server_san(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dns:",
        "bad_host",
        "-edge.example.com",
        "edge-.example.com",
        "edge..example.com",
        "edge.example.com.",
        "a" * 64 + ".example.com",
        ".".join(["a" * 60] * 5),
        "bücher.example",
        "https://edge.example.com",
        "edge.example.com:8443",
        "edge.example.com/path",
        "edge example.com",
        "edge.example.com\n",
        "edge\0.example.com",
        "10.0.0.300",
        "10.0.0",
        "10.0.0.0/8",
        "dns:10.0.0.5",
        "ip:edge.example.com",
        "fe80::1%eth0",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "*",
        "*.com",
        "edge.*.example.com",
        "e*.example.com",
        "*.*.example.com",
        "email:a@example.com",
    ],
)
def test_what_no_client_can_connect_to_is_refused_by_name(text: str) -> None:
    if text.endswith("\n"):  # surrounding space is a slip, not a name
        assert server_san(text) == x509.DNSName("edge.example.com")
        return
    with pytest.raises(CertificateError, match="--san"):
        server_san(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uri:spiffe://example.org/app", x509.UniformResourceIdentifier("spiffe://example.org/app")),
        ("uri:urn:uuid:1", x509.UniformResourceIdentifier("urn:uuid:1")),
        ("dns:Worker.Example.com", x509.DNSName("worker.example.com")),
        ("email:Ada@Example.COM", x509.RFC822Name("Ada@example.com")),
    ],
)
def test_a_client_name_is_typed(text: str, expected: x509.GeneralName) -> None:
    assert client_san(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "ada",
        "spiffe://example.org/app",
        "ip:10.0.0.5",
        "uri:example.org",
        "uri:https://",
        "uri:https://[::1",
        "uri:spiffe://example.org:8443/app",
        "uri:spiffe://user@example.org/app",
        "uri:spiffe://example.org/app?x=1",
        "uri:spiffe://example.org/app/",
        "uri:spiffe://EXAMPLE.org/app",
        "uri:spiffe:///app",
        "uri:https://exämple.org",
        "uri:https://example.org/a b",
        "dns:*.example.com",
        "email:ada",
        "email:ada@",
        "email:a@b@example.com",
        "email:ädä@example.com",
        "email:ada@bad_host",
    ],
)
def test_a_client_name_that_is_not_of_its_type_is_refused(text: str) -> None:
    with pytest.raises(CertificateError, match="--san"):
        client_san(text)


def test_a_spiffe_id_stands_alone_among_uris() -> None:
    with pytest.raises(CertificateError, match="SPIFFE"):
        client_sans(["uri:spiffe://example.org/a", "uri:https://example.org/"])
    assert len(client_sans(["uri:spiffe://example.org/a", "dns:a.example.org"])) == 2


def test_repeated_names_count_once_and_a_server_needs_one() -> None:
    assert len(server_sans(["a.example.com", "A.example.com", "10.0.0.5"])) == 2
    with pytest.raises(CertificateError, match="--san"):
        server_sans([])


def test_the_common_name_is_the_first_that_fits() -> None:
    long = ".".join(["a" * 40, "b" * 40, "example.com"])
    assert server_common_name(server_sans([long, "edge.example.com"])) == "edge.example.com"
    with pytest.raises(CertificateError, match="64"):
        server_common_name(server_sans([long]))


@pytest.mark.parametrize("text", ["", "  ", "a" * 65, "a\nb", "a\x1b[31m"])
def test_a_common_name_is_short_and_printable(text: str) -> None:
    with pytest.raises(CertificateError):
        common_name(text)
