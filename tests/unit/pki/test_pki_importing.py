"""Taking over what another CA issued: everything is checked, everything is told, all is written or nothing."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import pkcs7
from cryptography.x509.oid import ExtendedKeyUsageOID

from appliance.core.errors import CertificateError
from appliance.pki.chain import verify
from appliance.pki.files import Layout
from appliance.pki.importing import Sources, install
from appliance.pki.inspect import check_server_pair, key_matches
from appliance.pki.keys import generate, key_pem
from appliance.pki.leaf import Subject, request
from appliance.pki.names import server_sans
from appliance.pki.profiles import SERVER
from appliance.pki.reading import read_certificates, read_key, read_passphrase
from appliance.pki.signing import Issued


@dataclass
class Site:
    """An enterprise's CA: a root, two intermediates, and a server's certificate for a pending request."""

    root: Issued
    upper: Issued
    lower: Issued
    server: Issued


@pytest.fixture
def site(layout: Layout, maker) -> Site:
    hosts = Subject("edge.example.com", server_sans(["edge.example.com"]))
    request(layout, "server", None, hosts, SERVER, replace=False)
    root = maker.root()
    upper = maker.intermediate(root, "Upper")
    lower = maker.intermediate(upper, "Lower")
    return Site(root, upper, lower, maker.server(lower, key=read_key(layout.pending_key("server"), None)))


@pytest.fixture
def sources(site: Site, put: Callable[..., Path]) -> Sources:
    return Sources(
        put("sent.pem", site.server.certificate),
        put("chain.pem", site.upper.certificate, site.lower.certificate),
        put("root.pem", site.root.certificate),
    )


def written(layout: Layout) -> set[str]:
    return {str(path.relative_to(layout.directory)) for path in layout.directory.rglob("*") if path.is_file()}


PENDING = {"server.csr", "server.key.pending"}


def test_a_requested_certificate_is_installed_with_its_chain_in_order(
    layout: Layout, site: Site, sources: Sources, now: datetime
) -> None:
    done = install(layout, "server", None, sources, now)
    expected = [site.server.certificate, site.lower.certificate, site.upper.certificate]
    assert read_certificates(layout.certificate("server")) == expected
    assert read_certificates(layout.ca_certificate) == [site.root.certificate]
    assert key_matches(site.server.certificate, read_key(layout.key("server"), None))
    assert stat.S_IMODE(layout.key("server").stat().st_mode) & 0o037 == 0
    assert written(layout) == {"ca.crt", "server.crt", "server.key"}
    assert done.notes == ()
    pair = layout.certificate("server").read_bytes(), layout.key("server").read_bytes()
    assert check_server_pair(*pair, None, now) == []
    assert verify(expected, [site.root.certificate], now) == []


def test_one_file_with_everything_in_any_order_will_do(layout: Layout, site: Site, put, now: datetime) -> None:
    parts = (site.root, site.upper, site.server, site.lower)
    everything = put("all.pem", *(part.certificate for part in parts))
    install(layout, "server", None, Sources(everything, trust=put("root.pem", site.root.certificate)), now)
    assert read_certificates(layout.certificate("server"))[0] == site.server.certificate
    assert len(read_certificates(layout.certificate("server"))) == 3


@pytest.mark.parametrize("form", ["der", "p7b-der", "p7b-pem"])
def test_the_formats_cas_send_are_read(layout: Layout, site: Site, put, der, now: datetime, form: str) -> None:
    chain = [site.lower.certificate, site.upper.certificate]
    if form == "der":
        sent, more = put("s.cer", der(site.server.certificate)), put("chain.pem", *chain)
    else:
        encoding = serialization.Encoding.DER if form == "p7b-der" else serialization.Encoding.PEM
        bundle = pkcs7.serialize_certificates([*chain, site.server.certificate], encoding)
        sent, more = put("s.p7b", bundle), None
    install(layout, "server", None, Sources(sent, more, put("root.pem", site.root.certificate)), now)
    assert read_certificates(layout.certificate("server"))[0] == site.server.certificate


@pytest.mark.parametrize("form", ["pkcs8", "traditional", "der"])
@pytest.mark.parametrize("passphrase", [None, b"open sesame"])
def test_a_key_made_elsewhere_is_read_in_its_format(
    layout: Layout, site: Site, maker, put, now: datetime, form: str, passphrase: bytes | None
) -> None:
    key = rsa.generate_private_key(65537, 2048)
    protection = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    encoding = serialization.Encoding.DER if form == "der" else serialization.Encoding.PEM
    style = (
        serialization.PrivateFormat.TraditionalOpenSSL if form == "traditional" else serialization.PrivateFormat.PKCS8
    )
    given = Sources(
        put("s.pem", maker.server(site.root, key=key).certificate),
        trust=put("root.pem", site.root.certificate),
        key=put("s.key", key.private_bytes(encoding, style, protection)),
        passphrase=passphrase,
    )
    install(layout, "server", None, given, now)
    assert read_key(layout.key("server"), None).public_key() == key.public_key()
    assert written(layout) == {"ca.crt", "server.crt", "server.key", *PENDING}


def test_a_key_may_stay_encrypted(layout: Layout, site: Site, sources: Sources, put, now: datetime) -> None:
    key = put("s.key", key_pem(site.server.key, b"secret"))
    given = Sources(sources.certificate, sources.chain, sources.trust, key, b"secret")
    install(layout, "server", None, given, now, keep_encrypted=True)
    with pytest.raises(CertificateError, match="no passphrase"):
        read_key(layout.key("server"), None)
    assert key_matches(site.server.certificate, read_key(layout.key("server"), b"secret"))


def test_an_encrypted_key_in_use_does_not_stand_in_the_way_of_the_pending_one(
    layout: Layout, site: Site, sources: Sources, now: datetime
) -> None:
    layout.key("server").write_bytes(key_pem(generate("ecdsa-p256"), b"forgotten"))
    install(layout, "server", None, sources, now, replace=True)
    assert key_matches(site.server.certificate, read_key(layout.key("server"), None))


def test_without_any_key_both_ways_to_one_are_told(layout: Layout, site: Site, sources: Sources, now) -> None:
    layout.pending_key("server").unlink()
    with pytest.raises(CertificateError, match=r"no key: .*certs csr.*--key"):
        install(layout, "server", None, sources, now)


def test_an_encrypted_key_without_its_passphrase_is_refused_with_the_option(
    layout: Layout, site: Site, sources: Sources, put, now: datetime
) -> None:
    key = put("s.key", key_pem(site.server.key, b"secret"))
    with pytest.raises(CertificateError, match=r"s\.key.*--passphrase-file"):
        install(layout, "server", None, Sources(sources.certificate, sources.chain, sources.trust, key), now)
    wrong = Sources(sources.certificate, sources.chain, sources.trust, key, b"guess")
    with pytest.raises(CertificateError, match=r"s\.key.*wrong"):
        install(layout, "server", None, wrong, now)
    assert written(layout) == PENDING


def test_a_certificate_renewed_for_the_key_in_use_leaves_the_key_alone(
    layout: Layout, site: Site, sources: Sources, maker, put, now: datetime
) -> None:
    install(layout, "server", None, sources, now)
    before = layout.key("server").stat().st_ino
    again = maker.server(site.lower, key=site.server.key)
    given = Sources(put("again.pem", again.certificate), sources.chain)
    with pytest.raises(CertificateError, match=r"server\.crt.*--force"):
        install(layout, "server", None, given, now)
    done = install(layout, "server", None, given, now, replace=True)
    assert done.paths == (layout.certificate("server"),)
    assert layout.key("server").stat().st_ino == before
    assert read_certificates(layout.certificate("server"))[0] == again.certificate


Change = Callable[[Site, object, Callable[..., Path], Sources], Sources]


def swap(site_part: Callable[[Site, object], Issued]) -> Change:
    def change(site: Site, maker: object, put: Callable[..., Path], sources: Sources) -> Sources:
        return Sources(put("sent.pem", site_part(site, maker).certificate), sources.chain, sources.trust)

    return change


HOSTILE: dict[str, tuple[Change, str]] = {
    "key of another certificate": (swap(lambda s, m: m.server(s.lower)), r"sent\.pem does not belong to the key in"),
    "wrong CA": (
        lambda s, m, put, src: Sources(src.certificate, src.chain, put("r.pem", m.root("Other").certificate)),
        "'Corp Root' is neither in the chain nor in the trust bundle",
    ),
    "impostor CA": (
        lambda s, m, put, src: Sources(src.certificate, src.chain, put("r.pem", m.root().certificate)),
        "same name and another key",
    ),
    "intermediate missing": (
        lambda s, m, put, src: Sources(src.certificate, put("c.pem", s.upper.certificate), src.trust),
        "'Lower' is neither in the chain",
    ),
    "no chain": (lambda s, m, put, src: Sources(src.certificate, None, src.trust), "'Lower' is neither"),
    "trust is an intermediate": (
        lambda s, m, put, src: Sources(src.certificate, src.chain, put("r.pem", s.upper.certificate)),
        "its root 'Corp Root' is not in the trust bundle",
    ),
    "trust is a leaf": (
        lambda s, m, put, src: Sources(src.certificate, src.chain, src.certificate),
        "not a certificate authority",
    ),
    "expired": (
        swap(lambda s, m: m.server(s.lower, key=s.server.key, end=timedelta(days=-1))),
        "expired on 2026-05-31",
    ),
    "not yet valid": (
        swap(lambda s, m: m.server(s.lower, key=s.server.key, start=timedelta(days=1))),
        "not valid before",
    ),
    "wrong purpose": (
        swap(lambda s, m: m.server(s.lower, key=s.server.key, usages=[ExtendedKeyUsageOID.CLIENT_AUTH])),
        "misses serverAuth",
    ),
    "no names": (swap(lambda s, m: m.server(s.lower, key=s.server.key, names=[])), "no subject alternative name"),
    "not PEM": (lambda s, m, put, src: Sources(put("x", b"hello"), src.chain, src.trust), "x: The content is not PEM"),
    "PKCS#12": (
        lambda s, m, put, src: Sources(put("x.pfx", b"\x30\x82\0\0"), src.chain, src.trust),
        r"x\.pfx: .*openssl pkcs12",
    ),
    "the request": (
        lambda s, m, put, src: Sources(put("x.csr", b"-----BEGIN CERTIFICATE REQUEST-----\n"), src.chain, src.trust),
        "certificate request",
    ),
    "a key": (lambda s, m, put, src: Sources(put("x", s.server.key), src.chain, src.trust), "holds no certificate"),
    "absent": (lambda s, m, put, src: Sources(Path("/nowhere/x.pem"), src.chain, src.trust), "does not exist"),
    "no anchor": (lambda s, m, put, src: Sources(src.certificate, src.chain), r"ca\.crt does not exist; .*--ca"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_each_fault_is_refused_and_nothing_is_written(
    layout: Layout, site: Site, sources: Sources, maker, put, now: datetime, case: str
) -> None:
    change, says = HOSTILE[case]
    with pytest.raises(CertificateError, match=says):
        install(layout, "server", None, change(site, maker, put, sources), now, replace=True)
    assert written(layout) == PENDING


def test_ed25519_is_refused_for_a_server(layout: Layout, site: Site, sources: Sources, maker, put, now) -> None:
    leaf = maker.server(site.root, key=generate("ed25519"))
    given = Sources(put("s.pem", leaf.certificate), trust=sources.trust, key=put("s.key", leaf.key))
    with pytest.raises(CertificateError, match="gRPC clients"):
        install(layout, "server", None, given, now)


def test_every_problem_is_told_at_once(layout: Layout, site: Site, maker, put, now: datetime) -> None:
    layout.certificate("server").write_bytes(b"old")
    bad = maker.make("edge", site.lower, end=timedelta(days=-1))
    with pytest.raises(CertificateError) as caught:
        install(layout, "server", None, Sources(put("bad.pem", bad.certificate), None, put("r.pem", b"x")), now)
    for words in ("does not belong", "expired", "serverAuth", "subject alternative name", "r.pem", "--force"):
        assert words in str(caught.value)
    assert str(caught.value).startswith("Nothing was installed, for 6 reasons:\n  1. ")
    assert written(layout) == {*PENDING, "server.crt"}


def test_existing_files_stay_as_they_are_without_force(layout: Layout, sources: Sources, now: datetime, put) -> None:
    layout.ca_certificate.write_bytes(b"precious")
    with pytest.raises(CertificateError, match=r"ca\.crt.*--force"):
        install(layout, "server", None, sources, now)
    assert layout.ca_certificate.read_bytes() == b"precious"
    assert written(layout) == {*PENDING, "ca.crt"}


def test_a_failure_while_writing_puts_everything_back(
    layout: Layout, sources: Sources, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(source: Path, target: Path, **options: bool) -> None:
        if Path(target) == layout.certificate("server"):
            raise OSError(28, "No space left on device")
        real(source, target, **options)

    real = os.link
    monkeypatch.setattr(os, "link", failing)
    with pytest.raises(CertificateError, match="No space"):
        install(layout, "server", None, sources, now)
    assert written(layout) == PENDING


def test_what_deserves_a_word_is_noted(layout: Layout, maker, put, now: datetime) -> None:
    root = maker.root(bits=None)
    leaf = maker.server(root, end=timedelta(days=7))
    stranger = maker.intermediate(maker.root("Other"), "Stranger")
    given = Sources(
        put("s.pem", leaf.certificate),
        put("c.pem", stranger.certificate),
        put("r.pem", root.certificate),
        put("s.key", leaf.key),
    )
    done = install(layout, "server", None, given, now)
    text = " ".join(done.notes)
    for words in ("expires in 7 days", "Python 3.13", "'Stranger' is not part of the chain"):
        assert words in text
    assert read_certificates(layout.certificate("server")) == [leaf.certificate]


def test_a_client_certificate_is_installed_under_its_name(layout: Layout, maker, put, now: datetime) -> None:
    root = maker.root()
    leaf = maker.client(root, "ada", names=[x509.UniformResourceIdentifier("spiffe://example.org/ada")])
    given = Sources(put("s.pem", leaf.certificate), None, put("r.pem", root.certificate), put("s.key", leaf.key))
    install(layout, "client", "ada", given, now)
    assert written(layout) == {"ca.crt", "clients/ada.crt", "clients/ada.key"}
    server = maker.server(root)
    wrong = Sources(put("t.pem", server.certificate), key=put("t.key", server.key))
    with pytest.raises(CertificateError, match="misses clientAuth"):
        install(layout, "client", "bob", wrong, now)


def test_the_passphrase_is_the_first_line_of_its_file(put, tmp_path: Path) -> None:
    assert read_passphrase(put("p", b"open sesame\r\nnot this\n")) == b"open sesame"
    with pytest.raises(CertificateError, match="empty"):
        read_passphrase(put("q", b"\n"))


def test_sources_do_not_show_the_passphrase() -> None:
    assert "sesame" not in repr(Sources(Path("x"), passphrase=b"sesame"))
