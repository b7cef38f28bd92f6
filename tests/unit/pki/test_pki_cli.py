"""`appliance certs` from the outside: files, words, exit codes."""

import json
import re
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from appliance.cli.certs import certs
from appliance.core.errors import CertificateError, ConfigError
from appliance.pki.chain import verify
from appliance.pki.files import Layout
from appliance.pki.inspect import client_identity, server_names
from appliance.pki.keys import key_pem
from appliance.pki.reading import read_certificates
from appliance.pki.revocation import read_lists, sign_list
from appliance.pki.root import load_root

README = Path(__file__).parents[3] / "certs" / "README.md"


@pytest.fixture
def run(layout: Layout) -> Callable[..., Result]:
    """Run `appliance certs …` with the test's directory; a ConfigError is raised, as the main command expects it."""

    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(certs, [*map(str, arguments), "--dir", str(layout.directory)])
        if isinstance(result.exception, ConfigError):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def site(run: Callable[..., Result]) -> None:
    assert run("init", "--organisation", "Acme").exit_code == 0
    assert run("issue", "server", "--san", "edge.example.com", "--san", "10.0.0.5").exit_code == 0
    assert run("issue", "client", "ada", "--san", "uri:spiffe://example.org/ada").exit_code == 0


@pytest.mark.usefixtures("site")
def test_a_site_is_set_up_with_three_commands(layout: Layout, run: Callable[..., Result]) -> None:
    (server,) = read_certificates(layout.certificate("server"))
    assert server_names(server) == ["edge.example.com", "10.0.0.5"]
    assert verify([server], read_certificates(layout.ca_certificate), datetime.now(UTC)) == []
    assert client_identity(layout.certificate("client", "ada").read_bytes()).names == ("uri:spiffe://example.org/ada",)
    result = run("inspect")
    assert result.exit_code == 0
    assert "problem" not in result.output


@pytest.mark.usefixtures("site")
def test_no_command_prints_a_private_key(layout: Layout, run: Callable[..., Result]) -> None:
    run("csr", "server", "--san", "edge.example.com")
    outputs = [run("renew", "server"), run("inspect"), run("inspect", "--json")]
    secrets = [path.read_text().split("\n")[1] for path in layout.directory.rglob("*.key*")]
    assert len(secrets) == 4
    for result in outputs:
        assert "PRIVATE" not in result.output
        assert not any(secret in result.output for secret in secrets)


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    "arguments",
    [("init",), ("issue", "server", "--san", "x.example.com"), ("issue", "client", "ada")],
)
def test_nothing_is_overwritten_without_force(
    layout: Layout, run: Callable[..., Result], arguments: tuple[str, ...]
) -> None:
    before = {path: path.read_bytes() for path in layout.directory.rglob("*") if path.is_file()}
    with pytest.raises(CertificateError, match="--force"):
        run(*arguments)
    assert {path: path.read_bytes() for path in layout.directory.rglob("*") if path.is_file()} == before
    assert run(*arguments, "--force").exit_code == 0


def test_options_shape_the_root(layout: Layout, run: Callable[..., Result]) -> None:
    run("init", "--name", "My Root", "--organisation", "Acme", "--days", "10", "--key-type", "ecdsa-p384")
    (root,) = read_certificates(layout.ca_certificate)
    assert root.subject.rfc4514_string() == "CN=My Root,O=Acme"
    assert (root.not_valid_after_utc - datetime.now(UTC)).days in (9, 10)
    assert stat.S_IMODE(layout.ca_key.stat().st_mode) == 0o600


def test_a_profile_file_is_used_and_options_come_first(
    layout: Layout, run: Callable[..., Result], put: Callable[..., Path]
) -> None:
    profile = put("server.toml", b'kind = "server"\ndays = 30\nkey = "ecdsa-p384"\n')
    run("init")
    run("issue", "server", "--san", "a.example.com", "--profile", profile, "--days", "5")
    (server,) = read_certificates(layout.certificate("server"))
    assert (server.not_valid_after_utc - datetime.now(UTC)).days in (4, 5)
    assert "ecdsa-p384" in run("inspect", layout.certificate("server")).output


@pytest.mark.usefixtures("site")
def test_json_says_all_there_is_to_know(layout: Layout, run: Callable[..., Result]) -> None:
    told = json.loads(run("inspect", "--json").output)["certificates"]
    assert [one["kind"] for one in told] == ["ca", "server", "client"]
    server = told[1]
    assert server["path"] == str(layout.certificate("server"))
    assert server["subject"] == "CN=edge.example.com"
    assert server["issuer"] == "CN=Inference Appliance Root CA,O=Acme"
    assert re.fullmatch(r"[0-9a-f]{64}", server["sha256"])
    assert 396 < server["days_left"] < 398
    assert server["key_type"] == "ecdsa-p256"
    assert server["key_usage"] == ["digitalSignature"]
    assert server["extended_key_usage"] == ["serverAuth"]
    assert server["names"] == ["dns:edge.example.com", "ip:10.0.0.5"]
    assert server["key"] == "matches"
    assert server["chain"].startswith("verified")
    assert server["problems"] == []


@pytest.mark.usefixtures("site")
def test_a_mismatched_key_fails_the_inspection(layout: Layout, run: Callable[..., Result]) -> None:
    layout.key("server").write_bytes(layout.key("client", "ada").read_bytes())
    result = run("inspect", "--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["certificates"][1]["key"] == "does not match"
    assert run("inspect", layout.certificate("client", "ada")).exit_code == 0


@pytest.mark.usefixtures("site")
def test_a_key_others_can_read_fails_the_inspection(layout: Layout, run: Callable[..., Result]) -> None:
    layout.key("server").chmod(0o644)
    result = run("inspect", "--json")
    assert result.exit_code == 1
    assert "chmod 0640" in json.loads(result.output)["certificates"][1]["problems"][0]


@pytest.mark.usefixtures("site")
def test_a_missing_key_and_another_ca_fail_the_inspection(layout: Layout, run: Callable[..., Result], maker) -> None:
    layout.key("server").unlink()
    run("init", "--force")
    told = json.loads(run("inspect", "--json").output)["certificates"]
    assert [one["chain"] for one in told] == ["trust anchor", "not verified", "not verified"]
    assert any("does not exist" in problem for problem in told[1]["problems"])


def test_an_expired_certificate_fails_the_inspection(
    layout: Layout, run: Callable[..., Result], maker, put: Callable[..., Path]
) -> None:
    maker.now = datetime.now(UTC)
    leaf = maker.server(maker.root(), end=timedelta(days=-1))
    path = put("old.crt", leaf.certificate)
    result = run("inspect", path)
    assert result.exit_code == 1
    assert "expired" in result.output
    assert "not checked" in result.output


def test_names_of_strangers_cannot_steer_the_terminal(run: Callable[..., Result], maker, put) -> None:
    maker.now = datetime.now(UTC)
    path = put("evil.crt", maker.make("x\x1b[2J[red]y", None).certificate)
    result = run("inspect", path)
    assert "\x1b[2J" not in result.output
    assert "[red]y" in result.output


def test_an_encrypted_key_is_compared_with_its_passphrase(run: Callable[..., Result], maker, put) -> None:
    maker.now = datetime.now(UTC)
    leaf = maker.server(maker.root())
    path = put("s.crt", leaf.certificate)
    put("s.key", key_pem(leaf.key, b"secret")).chmod(0o600)
    result = run("inspect", path)
    assert result.exit_code == 1
    assert "--passphrase-file" in result.output
    assert run("inspect", path, "--passphrase-file", put("p", b"secret\n")).exit_code == 0


def test_an_empty_directory_is_told_with_the_next_step(run: Callable[..., Result]) -> None:
    with pytest.raises(CertificateError, match="certs init"):
        run("inspect")


def test_a_request_goes_to_a_ca_and_comes_back(layout: Layout, run: Callable[..., Result], maker, put) -> None:
    maker.now = datetime.now(UTC)
    assert run("csr", "server", "--san", "edge.example.com").exit_code == 0
    csr = x509.load_pem_x509_csr(layout.request("server").read_bytes())
    root = maker.root()
    middle = maker.intermediate(root)
    issued = maker.server(middle, key=_Public(csr.public_key()))
    result = run(
        "import",
        "--cert",
        put("sent.pem", issued.certificate),
        "--chain",
        put("chain.pem", middle.certificate),
        "--ca",
        put("root.pem", root.certificate),
    )
    assert result.exit_code == 0, result.output
    assert run("inspect").exit_code == 0
    with pytest.raises(CertificateError, match=r"ca\.key does not exist.*certs csr"):
        run("renew", "server")


@pytest.mark.usefixtures("site")
def test_a_client_is_revoked_by_name(layout: Layout, run: Callable[..., Result]) -> None:
    result = run("revoke", "ada", "--reason", "keyCompromise", "--days", "3")
    assert result.exit_code == 0
    (root,) = read_certificates(layout.ca_certificate)
    (ada,) = read_certificates(layout.certificate("client", "ada"))
    (signed,) = read_lists(layout.crl.read_bytes(), [root])
    assert signed.serials == {ada.serial_number}
    assert signed.entry(ada.serial_number).endswith("(keyCompromise)")
    assert (signed.next_update - datetime.now(UTC)).days in (2, 3)
    assert stat.S_IMODE(layout.crl.stat().st_mode) == 0o644
    assert f'tls.crl = "{layout.crl}"' in result.output
    assert f"{ada.serial_number:x}" in result.output


@pytest.mark.usefixtures("site")
def test_what_was_revoked_stays_revoked_and_numbers_grow(layout: Layout, run: Callable[..., Result]) -> None:
    """The list itself is the record; what is revoked already keeps its day and reason."""
    anchors = read_certificates(layout.ca_certificate)
    run("revoke", "--serial", "AB:CD", "--reason", "superseded")
    first = read_lists(layout.crl.read_bytes(), anchors)[0]
    run("renew", "client", "ada")
    for arguments in (("revoke", "ada"), ("crl",), ("revoke", "--serial", "abcd", "--reason", "keyCompromise")):
        assert run(*arguments).exit_code == 0
    last = read_lists(layout.crl.read_bytes(), anchors)[0]
    assert (first.number, last.number) == (1, 4)
    assert last.serials == {0xABCD, read_certificates(layout.certificate("client", "ada"))[0].serial_number}
    assert last.entry(0xABCD) == first.entry(0xABCD)
    assert len(list(last.crl)) == 2


@pytest.mark.usefixtures("site")
def test_openssl_takes_our_list(layout: Layout, run: Callable[..., Result]) -> None:
    """Others read it too: what we write is what RFC 5280 says."""
    run("revoke", "ada")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(layout.crl)
    assert context.cert_store_stats()["crl"] == 1


@pytest.mark.usefixtures("site")
def test_what_our_root_did_not_issue_it_does_not_revoke(layout: Layout, run: Callable[..., Result]) -> None:
    root = read_certificates(layout.ca_certificate)[0]
    with pytest.raises(CertificateError, match="own serial number"):
        run("revoke", "--serial", f"{root.serial_number:x}")
    with pytest.raises(CertificateError, match=r"bob\.crt does not exist"):
        run("revoke", "bob")
    run("init", "--name", "Another", "--force")
    with pytest.raises(CertificateError, match=r"was issued by 'Inference Appliance Root CA', not with .*'Another'"):
        run("revoke", "ada")
    assert not layout.crl.exists()


@pytest.mark.usefixtures("site")
def test_a_list_that_is_not_ours_is_never_overwritten(layout: Layout, run: Callable[..., Result]) -> None:
    """It may be the only record of what was revoked."""
    run("revoke", "ada")
    old = layout.crl.read_bytes()
    for content in (b"broken", old + old):
        layout.crl.write_bytes(content)
        with pytest.raises(CertificateError, match="cannot be continued"):
            run("crl")
        assert layout.crl.read_bytes() == content
    layout.crl.write_bytes(old)
    run("init", "--force")
    with pytest.raises(CertificateError, match="cannot be continued"):
        run("crl")
    assert layout.crl.read_bytes() == old


@pytest.mark.usefixtures("site")
def test_inspect_shows_revocation_lists(layout: Layout, run: Callable[..., Result]) -> None:
    run("revoke", "ada", "--days", "7")
    assert run("inspect").exit_code == 0
    (told,) = json.loads(run("inspect", "--json").output)["revocation_lists"]
    assert (told["number"], told["revoked"], told["problems"]) == (1, 1, [])
    assert 6.9 < told["days_left"] <= 7
    assert json.loads(run("inspect", layout.crl, "--json").output)["certificates"] == []
    assert "revocation list" in run("inspect", layout.crl).output
    root = load_root(layout, datetime.now(UTC))
    stale = sign_list(root, [], 2, datetime.now(UTC) - timedelta(days=9), 7).crl
    for content, sentence in (
        (stale.public_bytes(serialization.Encoding.PEM), "was due for replacement"),
        (b"-----BEGIN X509 CRL-----\nAA", "cut short"),
    ):
        layout.crl.write_bytes(content)
        result = run("inspect", "--json")
        assert result.exit_code == 1
        assert sentence in json.loads(result.output)["revocation_lists"][0]["problems"][0]
        assert run("inspect").exit_code == 1


class _Public:
    """A requester's key as its CA sees it: the public half."""

    def __init__(self, key: object) -> None:
        self._key = key

    def public_key(self) -> object:
        return self._key


@pytest.mark.parametrize(
    "arguments",
    [
        ("renew", "client"),
        ("renew", "server", "ada"),
        ("renew", "x.crt", "ada"),
        ("import", "--cert", "x", "--role", "client"),
        ("import", "--cert", "x", "--name", "ada"),
        ("import", "--cert", "x", "--keep-encrypted"),
        ("init", "--days", "0"),
        ("init", "--key-type", "dsa"),
        ("revoke",),
        ("revoke", "ada", "--serial", "ab"),
        ("revoke", "ada", "--reason", "certificateHold"),
        ("crl", "--days", "0"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(run: Callable[..., Result], arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_every_command_explains_itself() -> None:
    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                walk(child, (*path, name))
        result = CliRunner().invoke(certs, [*path, "--help"])
        assert result.exit_code == 0
        assert command.help

    walk(certs, ())


def test_the_readme_runs_as_it_stands(tmp_path: Path, layout: Layout) -> None:
    """Each `appliance certs` line of the README's first section is run, with our directory in place of /etc."""
    section = README.read_text().split("## ")[1]
    lines = re.findall(r"^ {4}(?:sudo )?appliance certs (.+?)(?:\s+#.*)?$", section, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        result = CliRunner().invoke(certs, [*line.split(), "--dir", str(layout.directory)], catch_exceptions=False)
        assert result.exit_code == 0, line
