"""What a URL says and whether it is listed: one reading only, and no way around the list or into the network."""

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.config import Urls
from appliance.core.errors import UrlRefused
from appliance.media import urls


def policy(*hosts: str, private: bool = False) -> Urls:
    return Urls(hosts=hosts, private_addresses=private)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("http://example.com", "http://example.com/"),
        ("HTTP://EXAMPLE.com:80/A?b=c#d", "http://example.com/A?b=c"),
        ("https://example.com:443", "https://example.com/"),
        ("https://example.com:80/", "https://example.com:80/"),
        ("http://example.com?x=1", "http://example.com/?x=1"),
        ("http://example.com/a b/ä.png", "http://example.com/a%20b/%C3%A4.png"),
        ("http://example.com/%2e%2e/%00?q=%0d%0a", "http://example.com/%2e%2e/%00?q=%0d%0a"),
        ("http://example.com/p@q:r", "http://example.com/p@q:r"),
        ("http://xn--exmple-cua.com/", "http://xn--exmple-cua.com/"),
        ("http://a_b.example.com/", "http://a_b.example.com/"),
        ("http://8.8.8.8/", "http://8.8.8.8/"),
        ("http://[2606:4700:0:0::1111]:8080/", "http://[2606:4700::1111]:8080/"),
        ("http://[::FFFF:127.0.0.1]/", "http://[::ffff:7f00:1]/"),
    ],
)
def test_a_url_is_read_in_one_way(url: str, written: str) -> None:
    assert urls.read(url).url == written
    assert urls.read(written) == urls.read(url)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://127.0.0.1/etc/passwd",
        "ftp://example.com/a",
        "gopher://example.com/_GET",
        "dict://example.com:11211/stats",
        "data:image/png;base64,AAAA",
        "blob:https://example.com/0b1e",
        "javascript:alert(1)",
        "unix:///run/admin.sock",
        "http+unix://%2frun%2fadmin.sock/",
        "view-source:http://example.com/",
        "//example.com/a",
        "example.com/a",
        " http://example.com/",
        "http:example.com",
        "http:/example.com",
        "http://",
        "http:///a",
        "http://?x",
        "http://#x",
        "",
        "\x00",
    ],
)
def test_anything_but_http_and_https_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused, match="Only http and https"):
        urls.read(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://ada:secret@example.com/",
        "http://ada@example.com/",
        "http://:@example.com/",
        "http://@example.com/",
        "http://example.com@evil.org/",
        "http://example.com:80@evil.org/",
        "http://evil.org\\@example.com/",
        "http://example.com%40x@evil.org/",
    ],
)
def test_a_user_name_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UrlRefused, match="user name or password") as caught:
        urls.read(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0X7F.0.0.0x1",
        "0177.0.0.1",
        "017700000001",
        "127.1",
        "127.0.1",
        "127.0.0.01",
        "127.0.0.1.",
        "0",
        "1.2.3.4.5",
        "256.0.0.1",
        "0x",
        "example.0x7f",
        "127.0.0.1%00.example.com",
        "127。0。0。1",
        "①②⑦.0.0.1",
        "example。com",
        "ex\u00e4mple.com",
        "\u0435xample.com",
        "exam\u00adple.com",
        "💩",
        "%31%32%37.0.0.1",
        "example%2ecom",
        "example.com%2f.evil.org",
        "example.com.",
        ".example.com",
        "a..b",
        "...",
        f"{'a' * 64}.example.com",
        ".".join(["a" * 60] * 5),
        "a b",
        "a\tb",
        "a\x00b",
        "a\r\nHost: evil.org",
        "evil.org\\.example.com",
        "[::1",
        "::1",
        "[::1]x",
        "[::1%25eth0]",
        "[fe80::1%eth0]",
        "[127.0.0.1]",
        "[example.com]",
        "[v1.fe80]",
        "[]",
        "a:",
        "a:x",
        "a:-1",
        "a:0",
        "a:65536",
        "a:99999999999",
        "a:80:80",
        "a:８０",
        "a,b",
        "*",
        "a;b",
    ],
)
def test_a_host_that_programs_read_in_different_ways_is_refused(host: str) -> None:
    """Numbers for addresses, other dots, percent signs, names that are not ASCII, ends that are dots."""
    with pytest.raises(UrlRefused):
        urls.read(f"http://{host}/x")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/\r\nX: y",
        "http://example.com/\x7f",
        "http://example.com/\ud800",
        "http://example.com/a\\b",
        "http://example.com/" + "a" * 8192,
    ],
)
def test_a_path_that_could_say_more_than_a_path_is_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        urls.read(url)


@given(st.text(max_size=60), st.sampled_from(["", "http://", "https://a", "http://a:1", "http://[", "http://a/?"]))
def test_any_text_is_read_or_refused(text: str, before: str) -> None:
    """And what is read has a request line that no space or line end can break."""
    try:
        target = urls.read(before + text)
    except UrlRefused:
        return
    assert target.path.isascii()
    assert target.path.isprintable()
    assert " " not in target.path
    assert urls.read(target.url) == target


# ---- the list --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "url", "listed"),
    [
        ("example.com", "http://example.com/", True),
        ("Example.COM", "http://eXample.com/", True),
        ("example.com", "https://example.com/", True),
        ("example.com", "http://www.example.com/", False),
        ("example.com", "http://example.com.evil.org/", False),
        ("example.com", "http://evil-example.com/", False),
        ("*.example.com", "http://a.example.com/", True),
        ("*.example.com", "http://a.b.example.com/", True),
        ("*.example.com", "http://example.com/", False),
        ("*.example.com", "http://example.com.evil.org/", False),
        ("*.example.com", "http://evilexample.com/", False),
        ("*", "http://anything.org/", True),
        ("*", "http://8.8.8.8/", True),
        ("8.8.8.8", "http://8.8.8.8/", True),
        ("[2606:4700:0::1111]", "http://[2606:4700::1111]/", True),
        ("[::ffff:8.8.8.8]", "http://8.8.8.8/", False),
        # Ports: the scheme's own, or the one that is named.
        ("example.com", "http://example.com:8080/", False),
        ("example.com", "http://example.com:443/", False),
        ("example.com", "https://example.com:80/", False),
        ("example.com", "http://example.com:22/", False),
        ("example.com:8080", "http://example.com:8080/", True),
        ("example.com:8080", "https://example.com:8080/", True),
        ("example.com:8080", "http://example.com/", False),
        ("*.example.com:8080", "http://a.example.com:8080/", True),
        ("*:8080", "http://a.org:8080/", True),
        ("*", "http://a.org:8080/", False),
        ("[fd00::5]:81", "http://[fd00::5]:81/", True),
    ],
)
def test_an_entry_matches_whole_names_and_its_port(entry: str, url: str, listed: bool) -> None:
    target = urls.read(url)
    if listed:
        urls.check_listed(target, policy(entry))
    else:
        with pytest.raises(UrlRefused, match=r"urls\.hosts"):
            urls.check_listed(target, policy(entry))


def test_one_entry_of_many_is_enough() -> None:
    urls.check_listed(urls.read("http://a.org:81/"), policy("b.org", "a.org", "a.org:81"))


# ---- addresses -------------------------------------------------------------------------------------------------------

OUTSIDE = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
PRIVATE = [
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.8.8.8",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "::1",
    "fd00::1",
    "fc00::1",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "64:ff9b::a00:1",
    "64:ff9b::7f00:1",
]
NEVER = [
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "169.254.1.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "100.100.100.200",
    "168.63.129.16",
    "::",
    "::ffff:0.0.0.0",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::a00:1",
    "::10.0.0.1",
    "::8.8.8.8",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:a00:1::",
    "2002:808:808::",
    "3fff::1",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1111%eth0",
    "fec0::1",
    "ff02::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "100::1",
    "5f00::1",
    "not an address",
    "127.1",
    "",
]


@pytest.mark.parametrize("address", OUTSIDE)
@pytest.mark.parametrize("private", [True, False])
def test_addresses_of_the_open_internet_may_be_connected_to(address: str, private: bool) -> None:
    assert urls.may_connect(address, policy("a", private=private))


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_only_when_that_is_allowed(address: str) -> None:
    assert not urls.may_connect(address, policy("a"))
    assert urls.may_connect(address, policy("a", private=True))


@pytest.mark.parametrize("address", NEVER)
@pytest.mark.parametrize("private", [True, False])
def test_link_local_metadata_and_tunnelled_addresses_never(address: str, private: bool) -> None:
    assert not urls.may_connect(address, policy("a", private=private))


@pytest.mark.parametrize(("inner", "allowed"), [("8.8.8.8", True), ("10.0.0.1", False), ("127.0.0.1", False)])
def test_what_a_tunnel_hides_is_looked_at(inner: str, allowed: bool) -> None:
    """ISATAP within a routed prefix."""
    packed = ipaddress.IPv6Address("2606:4700::5efe:0:0").packed[:12] + ipaddress.IPv4Address(inner).packed
    assert urls.may_connect(str(ipaddress.IPv6Address(packed)), policy("a")) is allowed


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_nothing_is_let_through_that_python_calls_private(address: Any) -> None:
    """Its own tables are another reading of the same registries; NAT64 of an open address is the one exception."""
    if urls.may_connect(str(address), policy("a")):
        assert address.is_global or ipaddress.IPv6Address("64:ff9b::") <= address
        assert not address.is_multicast


# ---- the configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "http://example.com",
        "example.com/",
        "example.com.",
        "a..b",
        "*example.com",
        "a.*.com",
        "**",
        "*.",
        "exämple.com",
        "a:0",
        "a:65536",
        "a:",
        "::1",
        "[::1",
        "127.1",
        "0x7f.1",
        "1.2.3.4.5",
        "*.3.4",
        "10.0.0.0/8",
        "ada@example.com",
        "a b",
    ],
)
def test_an_entry_that_would_never_match_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        policy(entry)


def test_every_host_and_private_addresses_together_are_refused() -> None:
    """That would open the operator's network to every caller."""
    with pytest.raises(ValueError, match="name the hosts"):
        policy("a.example.com", "*:8080", private=True)
