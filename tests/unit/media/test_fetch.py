"""Fetching a caller's URL: off until hosts are named, and never a way into the operator's network.

The servers are real ones on loopback.
"""

import asyncio
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from appliance.core.config import Urls
from appliance.core.errors import DownloadFailed, InputTooLarge, UrlRefused
from appliance.media import fetch as module
from appliance.media.fetch import fetch

LIMIT = 100_000
LOCAL = Urls(hosts=("127.0.0.1", "localhost"), private_addresses=True, timeout_s=5)


class Handler(BaseHTTPRequestHandler):
    """Answers by path; remembers what it was asked."""

    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []
    release: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        self.asked.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        path = self.path.split("?")[0]
        if path.startswith("/status/"):
            self._answer(int(path.split("/")[2]), b"no")
        elif path.startswith("/to/"):
            self._redirect(path.removeprefix("/to/"))
        elif path == "/loop":
            self._redirect("/loop")
        elif path == "/relative":
            self._redirect("picture")
        elif path == "/nowhere":
            self._answer(302, b"")
        elif path == "/garbled":
            self._redirect("http://[")
        elif path == "/opaque":
            self._redirect("gopher:x")
        elif path == "/big":
            self._answer(200, b"x" * (LIMIT + 1))
        elif path == "/exact":
            self._answer(200, b"x" * LIMIT)
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while not self.release.is_set():
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass
        elif path == "/slow":
            self.release.wait(20)
            self._answer(200, b"late")
        elif path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x")
        else:
            self._answer(200, b"picture")

    def _redirect(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, status: int, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # the client had enough

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A refused handshake is what some tests are about."""


def serving(server: Server) -> Iterator[int]:
    Handler.asked.clear()
    Handler.release.clear()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    Handler.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def port() -> Iterator[int]:
    yield from serving(Server(("127.0.0.1", 0), Handler))


def certificate(folder: Path, *names: x509.GeneralName) -> Path:
    """A self-signed certificate and its key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "both.pem").write_bytes(pem)
    (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return folder / "both.pem"


@pytest.fixture
def tls_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """An HTTPS server for `localhost` only, whose authority the machine trusts."""
    both = certificate(tmp_path, x509.DNSName("localhost"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    server = Server(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    monkeypatch.setattr(module, "_TRUST", ssl.create_default_context(cafile=str(tmp_path / "ca.pem")))
    yield from serving(server)


# ---- what is fetched -------------------------------------------------------------------------------------------------


async def test_the_bytes_behind_an_allowed_url_are_fetched(port: int) -> None:
    assert await fetch(f"http://127.0.0.1:{port}/a?b=c#d", LOCAL, LIMIT) == b"picture"
    path, headers = Handler.asked[0]
    assert path == "/a?b=c"
    assert headers["host"] == f"127.0.0.1:{port}"
    assert headers["user-agent"] == "inference-appliance"
    assert headers["accept-encoding"] == "identity"
    assert "authorization" not in headers
    assert "cookie" not in headers


async def test_https_is_checked_against_the_hosts_name_though_its_address_is_connected_to(tls_port: int) -> None:
    assert await fetch(f"https://localhost:{tls_port}/a", LOCAL, LIMIT) == b"picture"
    assert Handler.asked[0][1]["host"] == f"localhost:{tls_port}"


async def test_a_certificate_for_another_name_is_refused(tls_port: int) -> None:
    with pytest.raises(DownloadFailed):
        await fetch(f"https://127.0.0.1:{tls_port}/a", LOCAL, LIMIT)
    assert Handler.asked == []


async def test_an_authority_that_is_not_trusted_is_refused(tls_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRUST", None)
    with pytest.raises(DownloadFailed):
        await fetch(f"https://localhost:{tls_port}/a", LOCAL, LIMIT)
    assert Handler.asked == []


async def test_a_body_of_just_the_limit_is_taken(port: int) -> None:
    assert len(await fetch(f"http://127.0.0.1:{port}/exact", LOCAL, LIMIT)) == LIMIT


async def test_redirects_to_listed_hosts_are_followed(port: int) -> None:
    assert await fetch(f"http://127.0.0.1:{port}/to/http://localhost:{port}/relative", LOCAL, LIMIT) == b"picture"
    assert [headers["host"] for _, headers in Handler.asked] == [
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        f"localhost:{port}",
    ]


async def test_a_proxy_and_netrc_of_the_services_environment_do_not_count(
    port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ada password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await fetch(f"http://127.0.0.1:{port}/a", LOCAL, LIMIT) == b"picture"
    assert "authorization" not in Handler.asked[0][1]


# ---- what is refused -------------------------------------------------------------------------------------------------


async def test_urls_are_off_by_default(port: int) -> None:
    with pytest.raises(UrlRefused, match=r"off on this appliance \(urls\.hosts is empty\)"):
        await fetch(f"http://127.0.0.1:{port}/a", Urls(), LIMIT)
    assert Handler.asked == []


async def test_a_host_that_is_not_listed_is_refused_by_name(port: int) -> None:
    with pytest.raises(UrlRefused, match=r"'127\.0\.0\.1'.*urls\.hosts"):
        await fetch(f"http://127.0.0.1:{port}/a", Urls(hosts=("images.example.com",), private_addresses=True), LIMIT)
    assert Handler.asked == []


@pytest.mark.parametrize(
    ("pattern", "host", "listed"),
    [
        ("*.cdn.example.com", "a.cdn.example.com", True),
        ("*.cdn.example.com", "A.CDN.Example.COM", True),
        ("*.cdn.example.com", "cdn.example.com", False),
        ("*.cdn.example.com", "cdn.example.com.evil.org", False),
        ("*.cdn.example.com", "evilcdn.example.com", False),
        ("example.com", "example.com.evil.org", False),
        ("example.com", "evil-example.com", False),
        ("example.com", "example.com.", False),
    ],
)
async def test_host_patterns_match_whole_names(pattern: str, host: str, listed: bool) -> None:
    try:
        module._allowed(f"http://{host}/x", Urls(hosts=(pattern,)))
    except UrlRefused:
        assert not listed
    else:
        assert listed


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "0", "[::ffff:127.0.0.1]"])
async def test_a_private_address_is_refused_however_it_is_written(port: int, host: str) -> None:
    with pytest.raises((UrlRefused, DownloadFailed), match=r"private address|cannot be resolved"):
        await fetch(f"http://{host}:{port}/a", Urls(hosts=("*",)), LIMIT)
    assert Handler.asked == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:a00:1::", False),
        ("::10.0.0.1", False),
    ],
)
def test_only_addresses_of_the_open_internet_are_public(address: str, public: bool) -> None:
    ipaddress.ip_address(address.partition("%")[0])
    assert module._public(address) is public


async def test_all_addresses_of_a_host_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second answer is where a caller gets in."""

    async def answers(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(2, 1, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", answers)
    with pytest.raises(UrlRefused, match="private address"):
        await fetch("http://images.example.com/a", Urls(hosts=("*.example.com",)), LIMIT)


async def test_the_address_that_was_checked_is_the_one_connected_to(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is resolved once; a second, other answer would have no effect."""
    asked = []

    async def answers(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", answers)
    policy = Urls(hosts=("images.example.com",), private_addresses=True)
    assert await fetch(f"http://images.example.com:{port}/a", policy, LIMIT) == b"picture"
    assert asked.count("images.example.com") == 1
    assert Handler.asked[0][1]["host"] == f"images.example.com:{port}"


@pytest.mark.parametrize(
    "target",
    ["http://10.0.0.1/x", "http://images.example.com/x", "file:///etc/passwd", "ftp://127.0.0.1/x", "//10.0.0.1/x"],
)
async def test_a_redirect_off_the_list_is_refused(port: int, target: str) -> None:
    with pytest.raises(UrlRefused):
        await fetch(f"http://127.0.0.1:{port}/to/{target}", LOCAL, LIMIT)


async def test_a_redirect_with_credentials_is_refused(port: int) -> None:
    with pytest.raises(UrlRefused, match="password"):
        await fetch(f"http://127.0.0.1:{port}/to/http://ada:secret@127.0.0.1:{port}/a", LOCAL, LIMIT)
    assert len(Handler.asked) == 1


@pytest.mark.parametrize("userinfo", ["ada:secret", "ada", ":", "ada:"])
async def test_credentials_in_a_url_are_refused_and_not_sent(port: int, userinfo: str) -> None:
    with pytest.raises(UrlRefused) as caught:
        await fetch(f"http://{userinfo}@127.0.0.1:{port}/a", LOCAL, LIMIT)
    assert "secret" not in str(caught.value)
    assert Handler.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://127.0.0.1/etc/passwd",
        "ftp://127.0.0.1/a",
        "data:image/png;base64,AAAA",
        "127.0.0.1/a",
        "http://",
        "http:///a",
        "http://[::1",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:x/",
        "",
        "\x00",
        "unix:///run/admin.sock",
    ],
)
async def test_anything_but_http_and_https_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        await fetch(url, LOCAL, LIMIT)


# ---- what fails ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/big", "/endless"])
async def test_more_than_the_limit_is_cut_off(port: int, path: str) -> None:
    with pytest.raises(InputTooLarge, match=f"{LIMIT} bytes"):
        await fetch(f"http://127.0.0.1:{port}{path}", LOCAL, LIMIT)


async def test_a_host_that_takes_too_long_is_given_up(port: int) -> None:
    with pytest.raises(DownloadFailed, match=r"within 0\.2 s \(urls\.timeout_s\)"):
        await fetch(f"http://127.0.0.1:{port}/slow", LOCAL.model_copy(update={"timeout_s": 0.2}), LIMIT)


@pytest.mark.parametrize("status", [204, 304, 400, 401, 404, 500, 503])
async def test_another_status_than_200_is_named(port: int, status: int) -> None:
    with pytest.raises(DownloadFailed, match=f"HTTP {status}"):
        await fetch(f"http://127.0.0.1:{port}/status/{status}", LOCAL, LIMIT)


async def test_too_many_redirects_are_given_up(port: int) -> None:
    with pytest.raises(DownloadFailed, match="redirects more than 3 times"):
        await fetch(f"http://127.0.0.1:{port}/loop", LOCAL, LIMIT)
    assert len(Handler.asked) == 4


@pytest.mark.parametrize("path", ["/nowhere", "/garbled", "/opaque", "/short"])
async def test_an_answer_that_makes_no_sense_is_a_failed_download(port: int, path: str) -> None:
    with pytest.raises((DownloadFailed, UrlRefused)):
        await fetch(f"http://127.0.0.1:{port}{path}", LOCAL, LIMIT)


async def test_a_host_that_is_not_there_is_a_failed_download() -> None:
    with pytest.raises(DownloadFailed):
        await fetch("http://127.0.0.1:9/a", LOCAL, LIMIT)


@pytest.mark.parametrize(
    "url",
    [
        f"http://{'a' * 70}.example.com/",
        "http://exämple.com/",
        "http://xn--a/",
        "http://a\x00b/",
        "http://a b/",
        "http://a%0d%0ab/",
        "http://a..b/",
        "http://.../",
        "http://💩/",
        "http://127.0.0.1:9/" + "a" * 70_000,
        "http://127.0.0.1:9/\x7f\x01",
        "http://127.0.0.1:9/\ud800",
    ],
)
async def test_an_odd_url_is_the_callers_fault_and_nothing_else(url: str) -> None:
    with pytest.raises((UrlRefused, DownloadFailed)):
        await fetch(url, LOCAL.model_copy(update={"hosts": ("*",)}), LIMIT)
