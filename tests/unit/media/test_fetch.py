"""Fetching a caller's URL: off until hosts are named, and never a way into the operator's network.

The servers are real ones on loopback; the resolver is one that the test asks its own questions.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st
from support.http_site import Site, Talk, answer, certificate, redirect, serving
from support.waiting import eventually, eventually_async

from appliance.core.config import Urls
from appliance.core.errors import CertificateError, DownloadFailed, InputTooLarge, Overloaded, UrlRefused
from appliance.core.memory import MemoryBudget
from appliance.media import fetch as module
from appliance.media.fetch import fetch, look_up, trust

LIMIT = 100_000
UNREACHABLE = "could not be reached, or did not answer as an HTTP server does"


def listing(site: Site, *hosts: str, **changes: Any) -> Urls:
    """A policy that lists hosts with the site's port."""
    names = [f"{host}:{site.port}" for host in ("127.0.0.1", "a.test", "b.test", "localhost", *hosts)]
    return Urls(hosts=tuple(names), **{"private_addresses": True, "timeout_s": 5, **changes})


class Names:
    """A resolver: each name has its answers, one a question, the last one for ever."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(found) for name, found in answers.items()}
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        found = self.answers.get(host)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found.pop(0) if len(found) > 1 else found[0]


HERE = Names(a_test=[["127.0.0.1"]], b_test=[["127.0.0.1"]])


async def get(site: Site, path: str, *, host: str = "127.0.0.1", scheme: str = "http", **options: Any) -> bytes:
    """What `fetch` makes of the site's page."""
    policy = options.pop("policy", None) or listing(site)
    options = {"trust": lambda: trust(None), "resolve": HERE, **options}
    return await fetch(site.at(host, path, scheme), policy, options.pop("max_bytes", LIMIT), **options)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with serving() as made:
        yield made


# ---- what is fetched -------------------------------------------------------------------------------------------------


async def test_the_bytes_behind_a_listed_url_are_fetched_and_nothing_else_is_sent(site: Site) -> None:
    assert await get(site, "/a?b=c") == b"picture"
    assert site.asked == [
        f"GET /a?b=c HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nUser-Agent: inference-appliance\r\nAccept: */*\r\n"
        "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
    ]


async def test_a_fragment_stays_here(site: Site) -> None:
    assert await get(site, "/a#secret") == b"picture"
    assert site.paths == ["/a"]


async def test_cookies_credentials_and_referrers_are_not_carried_to_the_next_place(site: Site) -> None:
    site.pages["/1"] = answer(b"", "302 Found", "Location: /2", "Set-Cookie: a=b", "WWW-Authenticate: Basic")
    assert await get(site, "/1?token=secret") == b"picture"
    site.pages["/1?token=secret"] = site.pages["/1"]
    assert await get(site, "/1?token=secret") == b"picture"
    for headers in site.headers:
        assert set(headers) == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert "secret" not in site.asked[-1]


async def test_a_proxy_netrc_and_agents_of_the_services_environment_do_not_count(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ada password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert await get(site, "/a") == b"picture"
    assert "authorization" not in site.headers[0]


@pytest.mark.parametrize(
    "page",
    [
        answer(b"picture"),
        b"HTTP/1.0 200 OK\r\n\r\npicture",
        b"HTTP/1.1 200\r\nConnection: close\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\npic\r\n4\r\nture\r\n0\r\nTrailer: x\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + answer(b"picture"),
        answer(b"picture", "200 OK", "Content-Encoding: identity"),
        answer(b"picture", "200 OK", "Content-Type: text/html", "Set-Cookie: x=y"),
    ],
)
async def test_every_proper_answer_is_understood(site: Site, page: bytes) -> None:
    site.pages["/a"] = page
    assert await get(site, "/a") == b"picture"


async def test_a_body_of_just_the_limit_is_taken(site: Site) -> None:
    site.pages["/a"] = answer(b"x" * LIMIT)
    assert len(await get(site, "/a")) == LIMIT


async def test_redirects_to_listed_hosts_are_followed_and_each_name_is_asked_once_a_hop(site: Site) -> None:
    names = Names(a_test=[["127.0.0.1"]], b_test=[["127.0.0.1"]])
    site.pages |= {
        "/1": redirect(site.at("b.test", "/2")),
        "/2": redirect("sub/../3?x"),
        "/3?x": redirect(f"//a.test:{site.port}/4"),
    }
    assert await get(site, "/1", host="a.test", resolve=names) == b"picture"
    assert site.paths == ["/1", "/2", "/3?x", "/4"]
    assert [headers["host"].partition(":")[0] for headers in site.headers] == ["a.test", "b.test", "b.test", "a.test"]
    assert [host for host, _ in names.asked] == ["a.test", "b.test", "b.test", "a.test"]


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
async def test_every_kind_of_redirect_is_one(site: Site, status: str) -> None:
    site.pages["/a"] = redirect("/b", status)
    assert await get(site, "/a") == b"picture"


async def test_another_address_is_tried_when_the_first_takes_no_connection(site: Site) -> None:
    """An IPv6 address that leads nowhere, say."""
    names = Names(a_test=[["127.0.0.2", "127.0.0.1"]])  # the site listens on the second only
    assert await get(site, "/a", host="a.test", resolve=names) == b"picture"


async def test_an_ipv6_address_is_fetched_from() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer(head.split(b"\r\n")[1]))
        writer.close()

    async with await asyncio.start_server(serve, "::1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        policy = Urls(hosts=(f"[::1]:{port}",), private_addresses=True)
        body = await fetch(f"http://[0:0::1]:{port}/", policy, LIMIT, trust=lambda: trust(None))
    assert body == f"Host: [::1]:{port}".encode()


# ---- TLS -------------------------------------------------------------------------------------------------------------


async def test_https_is_checked_against_the_hosts_name_though_its_address_is_connected_to(tmp_path: Path) -> None:
    asked: list[str | None] = []
    context = certificate(tmp_path, x509.DNSName("a.test"))
    context.sni_callback = lambda _, name, __: asked.append(name)  # type: ignore[assignment]
    async with serving(context) as site:
        made = trust(tmp_path / "ca.pem")
        assert await get(site, "/a", host="a.test", scheme="https", trust=lambda: made) == b"picture"
        assert site.headers[0]["host"] == f"a.test:{site.port}"
        assert asked == ["a.test"]
        for host in ("b.test", "127.0.0.1"):
            with pytest.raises(DownloadFailed, match=UNREACHABLE) as caught:
                await get(site, "/a", host=host, scheme="https", trust=lambda: made)
            assert "certificate verify failed" in caught.value.detail
        assert len(site.asked) == 1


async def test_an_authority_that_is_not_trusted_is_refused(tmp_path: Path) -> None:
    async with serving(certificate(tmp_path, x509.DNSName("a.test"))) as site:
        with pytest.raises(DownloadFailed, match=UNREACHABLE):
            await get(site, "/a", host="a.test", scheme="https")
        assert site.asked == []


async def test_a_certificate_that_has_ended_is_refused(tmp_path: Path) -> None:
    async with serving(certificate(tmp_path, x509.DNSName("a.test"), valid=-timedelta(days=1))) as site:
        with pytest.raises(DownloadFailed, match=UNREACHABLE):
            await get(site, "/a", host="a.test", scheme="https", trust=lambda: trust(tmp_path / "ca.pem"))
        assert site.asked == []


async def test_https_to_a_server_without_tls_and_the_other_way_round_fail(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed, match=UNREACHABLE):
        await get(site, "/a", scheme="https")
    async with serving(certificate(tmp_path, x509.DNSName("a.test"))) as secure:
        with pytest.raises(DownloadFailed, match=UNREACHABLE):
            await get(secure, "/a")


async def test_a_redirect_from_https_to_http_is_refused(site: Site, tmp_path: Path) -> None:
    async with serving(certificate(tmp_path, x509.DNSName("a.test"))) as secure:
        secure.pages["/a"] = redirect(site.at("a.test", "/b"))
        policy = Urls(hosts=(f"a.test:{site.port}", f"a.test:{secure.port}"), private_addresses=True)
        with pytest.raises(UrlRefused, match="from https to http"):
            await get(
                secure, "/a", host="a.test", scheme="https", policy=policy, trust=lambda: trust(tmp_path / "ca.pem")
            )
    assert site.accepted == 0


@pytest.mark.parametrize(
    "content", [None, b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"]
)
def test_authorities_that_cannot_be_read_are_said(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CertificateError, match=rf"urls\.ca {path} cannot be used"):
        trust(path)


# ---- what is refused -------------------------------------------------------------------------------------------------


async def test_urls_are_off_by_default(site: Site) -> None:
    with pytest.raises(UrlRefused, match=r"off on this appliance \(urls\.hosts is empty\)"):
        await get(site, "/a", policy=Urls())
    assert site.accepted == 0


async def test_a_host_that_is_not_listed_is_not_even_looked_up(site: Site) -> None:
    names = Names(c_test=[["127.0.0.1"]])
    with pytest.raises(UrlRefused, match=r"'c\.test'.*urls\.hosts"):
        await get(site, "/a", host="c.test", resolve=names)
    assert (names.asked, site.accepted) == ([], 0)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0", "[::]", "2130706433", "0177.0.0.1"],
)
async def test_a_private_address_is_not_connected_to_however_it_is_written(site: Site, host: str) -> None:
    with pytest.raises(UrlRefused):
        await get(site, "/a", host=host, policy=Urls(hosts=(f"*:{site.port}",)))
    assert site.accepted == 0


@pytest.mark.parametrize(
    "answers",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["127.0.0.1", "8.8.8.8"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1%lo"],
        ["169.254.169.254"],
        ["0.0.0.0"],
        [],
    ],
)
async def test_all_addresses_of_a_name_must_be_of_the_open_internet(site: Site, answers: list[str]) -> None:
    """Else the second one is where a caller gets in. A name that is unknown is refused in the same words."""
    policy = Urls(hosts=(f"*:{site.port}",))
    sentences = set()
    for names in (Names(a_test=[answers]), Names()):
        with pytest.raises(UrlRefused) as caught:
            await get(site, "/a", host="a.test", policy=policy, resolve=names)
        sentences.add(str(caught.value))
        assert not any(address in str(caught.value) for address in answers)
        assert all(address in caught.value.detail for address in answers) or names.answers == {}
    assert len(sentences) == 1
    assert site.accepted == 0


async def test_a_name_that_changes_its_mind_changes_nothing(site: Site) -> None:
    """DNS rebinding: the address that was checked is the one connected to; nobody asks again."""
    names = Names(a_test=[["127.0.0.1"], ["10.0.0.1"]])
    assert await get(site, "/a", host="a.test", resolve=names) == b"picture"
    assert names.asked == [("a.test", site.port)]


async def test_a_name_that_changes_its_mind_between_two_hops_is_checked_anew(site: Site) -> None:
    names = Names(a_test=[["127.0.0.1"], ["169.254.169.254"]])
    site.pages["/a"] = redirect("/latest/meta-data")
    with pytest.raises(UrlRefused, match="no address that inputs may be fetched from"):
        await get(site, "/a", host="a.test", resolve=names)
    assert site.paths == ["/a"]


@pytest.mark.parametrize(
    "place",
    [
        "http://10.0.0.1/x",
        "http://127.0.0.1/x",
        "http://169.254.169.254/latest/meta-data",
        "http://c.test/x",
        "http://b.test:22/x",
        "file:///etc/passwd",
        "ftp://b.test/x",
        "gopher://b.test/_x",
        "data:image/png;base64,AAAA",
        "//10.0.0.1/x",
        "\\\\b.test/x",
        "http://ada:secret@b.test/x",
        "http://b.test\\@c.test/x",
        "http://2130706433/x",
        "http://[",
        "http://b.test:x/",
        "gopher:x",
        "\xe4\xf6",
        "http://[::ffff:127.0.0.1]/x",
    ],
)
async def test_a_redirect_off_the_list_is_refused_without_saying_where_it_led(site: Site, place: str) -> None:
    site.pages["/a"] = redirect(place)
    with pytest.raises(UrlRefused) as caught:
        await get(site, "/a", host="a.test")
    assert str(caught.value) == "The URL redirects to where this appliance may not fetch from (urls.hosts)."
    assert site.accepted == 1


async def test_too_many_redirects_are_given_up(site: Site) -> None:
    site.pages["/loop"] = redirect("/loop")
    with pytest.raises(DownloadFailed, match="redirects more than 3 times"):
        await get(site, "/loop")
    assert len(site.asked) == 4


@pytest.mark.parametrize("page", [answer(b"", "302 Found"), answer(b"", "302 Found", "Location: /a", "Location: /b")])
async def test_a_redirect_without_one_place_is_a_failed_download(site: Site, page: bytes) -> None:
    site.pages["/a"] = page
    with pytest.raises(DownloadFailed, match="HTTP 302 without saying where"):
        await get(site, "/a")


# ---- what fails ------------------------------------------------------------------------------------------------------


def trickle(*parts: bytes, pause: float = 0.02, again: bytes = b"") -> Talk:
    """Writes the parts, then `again` over and over, with a pause between."""

    async def talk(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        while again:
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(pause)
        await asyncio.Event().wait()

    return talk


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "page",
    [
        answer(b"x" * (LIMIT + 1)),
        OK + b"Content-Length: 99999999999999999999\r\n\r\n",
        trickle(OK + b"\r\n", again=b"x" * 65536, pause=0),
        trickle(OK + b"Transfer-Encoding: chunked\r\n\r\n", again=b"8000\r\n" + b"x" * 0x8000 + b"\r\n", pause=0),
    ],
)
async def test_more_than_the_limit_is_cut_off(site: Site, page: bytes | Talk) -> None:
    """At once where it is announced, else when it is reached; the sentence names the limit's key."""
    site.pages["/a"] = page
    with pytest.raises(InputTooLarge, match=rf"more than {LIMIT} bytes.*limits\.text_size"):
        await get(site, "/a", limit="limits.text_size")
    await eventually_async(lambda: not site.open)


@pytest.mark.parametrize(
    "page",
    [
        trickle(),
        trickle(again=b"H"),
        trickle(b"HTTP/1.1 200 OK\r\nX: ", again=b"x"),
        trickle(OK + b"Content-Length: 5000\r\n\r\n", again=b"x"),
        trickle(OK + b"\r\n", again=b"x"),
        trickle(OK + b"Transfer-Encoding: chunked\r\n\r\n", again=b"1\r\nx\r\n"),
    ],
)
async def test_a_host_that_dawdles_is_given_up_after_the_whole_time(site: Site, page: Talk) -> None:
    """However often it gives a sign of life: one byte a while is not a download."""
    site.pages["/a"] = page
    begun = time.monotonic()
    with pytest.raises(DownloadFailed, match=r"within 0\.3 s \(urls\.timeout_s\)"):
        await get(site, "/a", policy=listing(site, timeout_s=0.3))
    assert time.monotonic() - begun < 10
    await eventually_async(lambda: not site.open)


async def test_the_time_is_for_all_hops_together(site: Site) -> None:
    async def late(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        writer.write(redirect("/late"))

    site.pages["/late"] = late
    with pytest.raises(DownloadFailed, match=r"within 0\.3 s"):
        await get(site, "/late", policy=listing(site, timeout_s=0.3))
    assert len(site.asked) <= 2


async def test_a_host_that_takes_no_handshake_is_given_up() -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        writer.close()
        gone.set()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        policy = Urls(hosts=(f"127.0.0.1:{port}",), private_addresses=True, timeout_s=0.2)
        with pytest.raises(DownloadFailed):
            await fetch(f"https://127.0.0.1:{port}/", policy, LIMIT, trust=lambda: trust(None))
        await asyncio.wait_for(gone.wait(), 20)
        await asyncio.sleep(0)


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 305, 400, 401, 403, 404, 407, 429, 500, 503, 999])
async def test_another_status_than_200_is_named(site: Site, status: int) -> None:
    site.pages["/a"] = answer(b"" if status in (204, 304) else b"inside", f"{status} Banner of the host")
    with pytest.raises(DownloadFailed, match=rf"^The URL answered HTTP {status}\.$"):
        await get(site, "/a")


@pytest.mark.parametrize(
    "page",
    [
        b"picture",
        b"<html>picture</html>\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        b"220 mail.internal ESMTP\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\npicture",
        b"HTTP/1.1 2000 OK\r\n\r\npicture",
        b"HTTP/1.1 OK\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Length: 8\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0x7\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\nContent-Length: 7, 7, 8\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\nx",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloworld\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA b: c\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\nA: b\x00c\r\n\r\npicture",
        b"HTTP/1.1 200 OK\r\n A: b\r\n\r\npicture",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + answer(b"picture"),
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
        b"\x16\x03\x01\x00\x05hello",
        b"",
    ],
)
async def test_what_is_not_http_is_a_failed_download_and_not_repeated(site: Site, page: bytes) -> None:
    """One sentence for all of it: what answers there is nobody's business."""

    async def talk(writer: asyncio.StreamWriter) -> None:
        writer.write(page)
        await writer.drain()
        writer.close()

    site.pages["/a"] = talk
    with pytest.raises(DownloadFailed, match=UNREACHABLE) as caught:
        await get(site, "/a")
    assert str(caught.value) == "The URL's host could not be reached, or did not answer as an HTTP server does."


PARTS = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"\r\n", b"\r\n\r\n", OK, b"HTTP/1.0 200\r\n", b"HTTP/1.1 302 F\r\n"]),
    st.sampled_from([b"HTTP/1.1 100 C\r\n\r\n", b"Location: /x\r\n", b"Connection: keep-alive\r\n", b"x: y\r\n z\r\n"]),
    st.sampled_from([b"Content-Length: 5\r\n", b"Content-Length: " + b"9" * 5000 + b"\r\n"]),
    st.sampled_from([b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n"]),
)


class _Nobody:
    """A writer whose reader the test is."""

    def write(self, data: bytes) -> None:
        assert data.startswith(b"GET ")


@given(st.lists(PARTS, max_size=8))
@settings(max_examples=500)
async def test_whatever_a_host_says_is_a_body_a_redirect_or_a_failure(parts: list[bytes]) -> None:
    """No other error comes of it, and it always ends."""
    reader: Any = asyncio.StreamReader()
    for part in parts:
        reader.feed_data(part)
    reader.feed_eof()
    nobody: Any = _Nobody()
    target = module.urls.read("http://a.test/")
    with contextlib.suppress(DownloadFailed, InputTooLarge, module.h11.ProtocolError, ValueError):
        found = await module._get(reader, nobody, target, 8, "limits.image_size", lambda count: None)
        assert isinstance(found, module._Redirect) or 0 < len(found) <= 8


async def test_a_port_that_is_closed_is_told_in_the_same_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    policy = Urls(hosts=(f"127.0.0.1:{port}",), private_addresses=True)
    with pytest.raises(DownloadFailed, match=UNREACHABLE) as caught:
        await fetch(f"http://127.0.0.1:{port}/a", policy, LIMIT, trust=lambda: trust(None))
    assert "127.0.0.1" not in str(caught.value)


async def test_a_connection_that_is_reset_is_told_in_the_same_words(site: Site) -> None:
    async def talk(writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"Content-Length: 100\r\n\r\nx")
        await writer.drain()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    site.pages["/a"] = talk
    with pytest.raises(DownloadFailed, match=UNREACHABLE):
        await get(site, "/a")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP", "identity, gzip"])
async def test_compressed_bytes_are_refused(site: Site, encoding: str) -> None:
    """Nobody asked for them, and a small bomb would be a large input."""
    site.pages["/a"] = answer(b"\x1f\x8b", "200 OK", f"Content-Encoding: {encoding}")
    with pytest.raises(DownloadFailed, match="compressed"):
        await get(site, "/a")


@pytest.mark.parametrize(
    "page", [answer(b""), OK + b"Connection: close\r\n\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"]
)
async def test_an_empty_body_is_a_failed_download(site: Site, page: bytes) -> None:
    async def talk(writer: asyncio.StreamWriter) -> None:
        writer.write(page)
        await writer.drain()
        writer.close()

    site.pages["/a"] = talk
    with pytest.raises(DownloadFailed, match="its body is empty"):
        await get(site, "/a")


async def test_a_body_in_crumbs_is_given_up_and_others_have_their_turn(site: Site) -> None:
    """Each piece costs as much as a large one; a stream of them must not stop the loop."""
    chunks = b"1\r\nx\r\n" * 10_000
    site.pages["/a"] = trickle(OK + b"Transfer-Encoding: chunked\r\n\r\n", again=chunks, pause=0)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(count())
    with pytest.raises(DownloadFailed, match="pieces that are too small"):
        await get(site, "/a", max_bytes=10**7, policy=listing(site, timeout_s=60))
    other.cancel()
    assert turns > 40


async def test_small_pieces_of_a_small_body_are_nobodys_fault(site: Site) -> None:
    site.pages["/a"] = OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 4000 + b"0\r\n\r\n"
    assert await get(site, "/a") == b"x" * 4000


# ---- memory, and leaving ---------------------------------------------------------------------------------------------


async def test_bytes_are_reserved_while_they_arrive(site: Site) -> None:
    """A body that will never end holds what has come, not more and not less."""
    reservation = MemoryBudget(10**6).hold(0)
    site.pages["/a"] = trickle(OK + b"Content-Length: 90000\r\n\r\n" + b"x" * 50_000)
    task = asyncio.create_task(get(site, "/a", reserve=reservation.grow))
    await eventually_async(lambda: reservation.count == 50_000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_body_that_the_budget_has_no_room_for_is_not_read_on(site: Site) -> None:
    reservation = MemoryBudget(200_000).hold(0)
    site.pages["/a"] = trickle(OK + b"\r\n", again=b"x" * 65536, pause=0)
    with pytest.raises(Overloaded):
        await get(site, "/a", max_bytes=10**9, reserve=reservation.grow)
    assert reservation.count <= 200_000
    await eventually_async(lambda: not site.open)


@pytest.mark.parametrize(
    "page", [trickle(), trickle(b"HTTP/1.1 200"), trickle(OK + b"\r\nx"), trickle(OK + b"\r\n", again=b"x" * 100)]
)
async def test_whoever_leaves_closes_the_connection(site: Site, page: Talk) -> None:
    site.pages["/a"] = page
    task = asyncio.create_task(get(site, "/a"))
    await eventually_async(lambda: site.asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually_async(lambda: not site.open)


async def test_no_connection_is_left_behind_by_any_end(site: Site) -> None:
    for path, page in {
        "/ok": answer(b"picture"),
        "/404": answer(b"no", "404 Not Found"),
        "/big": answer(b"x" * (LIMIT + 1)),
        "/odd": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        "/far": redirect("http://elsewhere.test/"),
    }.items():
        site.pages[path] = page
        with contextlib.suppress(DownloadFailed, InputTooLarge, UrlRefused):
            await get(site, path)
    await eventually_async(lambda: not site.open)


# ---- the system's resolver -------------------------------------------------------------------------------------------


async def test_the_systems_resolver_is_asked_by_default(site: Site) -> None:
    assert "127.0.0.1" in await look_up("localhost", site.port)
    assert await get(site, "/a", host="localhost", resolve=None) == b"picture"


async def test_a_name_that_is_not_there_is_an_error_of_the_resolver() -> None:
    with pytest.raises(socket.gaierror):
        await look_up("nothing.invalid", 80)


async def test_a_resolver_that_does_not_answer_now_may_be_asked_again(site: Site) -> None:
    """That is not the caller's fault, and says nothing about the name."""

    async def down(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with pytest.raises(DownloadFailed, match="could not be looked up now; try again"):
        await get(site, "/a", host="a.test", resolve=down)


async def test_a_resolver_that_hangs_keeps_nobody_and_nothing_waiting(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's one cannot be interrupted: each look-up has a thread of its own, and there are so many at most."""
    gate = threading.Event()
    asked: list[str] = []

    def hang(host: str, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        gate.wait(60)
        return [(0, 0, 0, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(module.socket, "getaddrinfo", hang)
    policy = listing(site, timeout_s=0.2)
    try:
        ends = await asyncio.gather(
            *(get(site, "/a", host="a.test", policy=policy, resolve=None) for _ in range(40)), return_exceptions=True
        )
        assert sum("within 0.2 s" in str(end) for end in ends) == 32
        assert sum("try again" in str(end) for end in ends) == 8
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5) == 1  # the loop's own threads are free
    finally:
        gate.set()
    await eventually_async(lambda: module._LOOK_UPS._value == 32)
    assert await get(site, "/a", host="a.test", resolve=None) == b"picture"


def test_an_answer_that_comes_after_the_loop_is_closed_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, done = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> list[Any]:
        gate.wait(60)
        done.set()
        return []

    monkeypatch.setattr(module.socket, "getaddrinfo", hang)

    async def leave() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(look_up("a.test", 80), 0.05)

    asyncio.run(leave())
    gate.set()
    assert done.wait(20)
    eventually(lambda: not any(thread.name == "look-up" for thread in threading.enumerate()))
