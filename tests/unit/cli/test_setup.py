"""`appliance setup`: from nothing to an appliance that serves; run again, it keeps what is there."""

import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.appliance import MODELS
from support.command import Command

from appliance.api.keys import digest, read_keys
from appliance.cli import clients
from appliance.core import config as configuration
from appliance.core.config import Config, Orchestrator


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """A folder in which there is nothing yet."""
    monkeypatch.setattr(configuration, "VENDOR_FILE", tmp_path / "none.toml")
    return Command(tmp_path / "appliance")


def setup(command: Command, *arguments: str | Path) -> str:
    return command.good("setup", "--base-url", "https://edge.example.com:9443", "--no-samples", *arguments)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=True).stdout


# ---- own certificates ------------------------------------------------------------------------------------------------


def test_everything_an_appliance_needs_is_made(fresh: Command) -> None:
    said = setup(fresh, "--samples", "--samples-from", MODELS, "--device", "cpu", "--organisation", "Acme")
    config = fresh.config
    assert (config.server.base_url, config.engine.device) == ("https://edge.example.com:9443", "cpu")
    tls = fresh.folder / "tls"
    assert openssl("verify", "-CAfile", tls / "ca.crt", "-verify_hostname", "edge.example.com", tls / "server.crt")
    assert "Acme" in openssl("x509", "-in", tls / "server.crt", "-noout", "-subject")
    assert {path.name for path in config.catalog.root.glob("[!.]*")} == {"digits", "ml-topics"}
    key = next(line for line in said.splitlines() if line.startswith("key ")).removeprefix("key ")
    assert [entry.sha256 for entry in read_keys(config.auth.keys_file)] == [digest(key)]
    assert f"appliance --config {fresh.file} serve" in said
    assert fresh.good("check")


def test_what_is_secret_is_readable_by_nobody_else(fresh: Command) -> None:
    before = os.umask(0)
    try:
        setup(fresh, "--pat-file", fresh.folder.parent / "pat")
    finally:
        os.umask(before)
    files = ["appliance.toml", "conf.d/10-setup.toml", "keys.json", "tls/server.key", "tls/ca.key", "../pat"]
    assert {name: mode(fresh.folder / name) for name in files} == dict.fromkeys(files, 0o600)


def test_a_second_run_changes_nothing(fresh: Command) -> None:
    setup(fresh, "--samples", "--samples-from", MODELS)
    before = tree(fresh.folder)
    said = setup(fresh, "--samples", "--samples-from", MODELS)
    assert tree(fresh.folder) == before
    assert not [line for line in said.splitlines() if line.startswith(("wrote", "added", "key "))]


def test_without_flags_a_second_run_keeps_what_the_first_was_told(fresh: Command) -> None:
    setup(fresh, "--device", "cpu")
    before = tree(fresh.folder)
    fresh.good("setup")
    assert tree(fresh.folder) == before


def test_another_host_has_the_certificate_issued_anew_by_the_same_root(fresh: Command) -> None:
    setup(fresh)
    tls = fresh.folder / "tls"
    root = (tls / "ca.crt").read_bytes()
    fresh.good("setup", "--base-url", "https://other.example.com:8443")
    assert (tls / "ca.crt").read_bytes() == root
    assert openssl("verify", "-CAfile", tls / "ca.crt", "-verify_hostname", "other.example.com", tls / "server.crt")


def test_a_foreign_root_is_not_replaced_unless_forced(fresh: Command) -> None:
    tls = fresh.folder / "tls"
    tls.mkdir(parents=True)
    (tls / "ca.crt").write_text("the enterprise's")
    result = fresh("setup", "--base-url", "https://edge.example.com:8443")
    assert result.exit_code == 3
    assert "--certificates csr" in result.stderr
    assert (tls / "ca.crt").read_text() == "the enterprise's"
    setup(fresh, "--force")
    assert openssl("verify", "-CAfile", tls / "ca.crt", tls / "server.crt")


# ---- the enterprise's CA ---------------------------------------------------------------------------------------------


def test_a_request_is_signed_elsewhere_and_imported(fresh: Command, tmp_path: Path) -> None:
    said = setup(fresh, "--certificates", "csr", "--san", "10.1.2.3")
    tls = fresh.folder / "tls"
    assert not (tls / "server.crt").exists()
    assert "setup --certificates import --cert FILE --chain FILE --ca FILE" in said
    assert setup(fresh).count("kept") >= 2  # the key goes on waiting: no certificate is made beside it
    ca, signed = tmp_path / "ca", tmp_path / "signed.crt"
    usage = "keyUsage=critical,keyCertSign,cRLSign"
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{ca}.key")
    openssl("req", "-x509", *key, "-out", f"{ca}.crt", "-subj", "/CN=Enterprise", "-days", "30", "-addext", usage)
    by = ("-CA", f"{ca}.crt", "-CAkey", f"{ca}.key")
    openssl("x509", "-req", "-in", tls / "server.csr", *by, "-days", "20", "-copy_extensions", "copy", "-out", signed)
    arguments = ("--certificates", "import", "--cert", signed, "--ca", f"{ca}.crt")
    setup(fresh, *arguments)
    assert openssl("verify", "-CAfile", tls / "ca.crt", "-verify_ip", "10.1.2.3", tls / "server.crt")
    assert not (tls / "server.key.pending").exists()
    before = tree(fresh.folder)
    setup(fresh, *arguments)
    assert tree(fresh.folder) == before


def test_what_cannot_be_imported_is_told_and_nothing_installed(fresh: Command, tmp_path: Path) -> None:
    (tmp_path / "odd.crt").write_text("no certificate")
    result = fresh("setup", "--certificates", "import", "--cert", str(tmp_path / "odd.crt"))
    assert result.exit_code == 3
    assert "odd.crt" in result.stderr
    assert not (fresh.folder / "tls" / "server.crt").exists()


def test_a_certificate_of_another_ca_is_not_replaced_by_one_of_our_root(fresh: Command, tmp_path: Path) -> None:
    """Even where there is a root of our own, for clients' certificates."""
    setup(fresh)
    other = tmp_path / "other"
    fresh.good("certs", "init", "--dir", other)
    fresh.good("certs", "issue", "server", "--san", "edge.example.com", "--dir", other)
    tls = fresh.folder / "tls"
    for name in ("server.crt", "server.key"):
        (tls / name).write_bytes((other / name).read_bytes())
    before = tree(tls)
    result = fresh("setup", "--base-url", "https://new.example.com:8443", "--no-samples")
    assert result.exit_code == 3
    assert "was not issued by a root of your own here" in result.stderr
    assert tree(tls) == before


# ---- answers that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--base-url", "http://edge"), "server.base_url"),
        (("--base-url", "https://edge/path"), "server.base_url"),
        (("--device", "tpu"), "engine.device"),
        (("--clients", "10.0.0.0/40"), "--clients '10.0.0.0/40'"),
        (("--clients", "any,10.0.0.0/8"), "stands alone"),
    ],
)
def test_a_wrong_answer_is_refused_before_anything_is_written(
    fresh: Command, arguments: tuple[str, ...], named: str
) -> None:
    error = fresh.bad("setup", *arguments)
    assert named in error
    assert not fresh.folder.exists()


def test_an_answer_that_does_not_fit_the_rest_leaves_the_files_as_they_were(fresh: Command) -> None:
    setup(fresh)
    fresh.file.write_text('[auth]\nrequire = "none"\n[server]\nlisten = "127.0.0.1:8443"\n')
    before = tree(fresh.folder)
    (fresh.folder / "conf.d" / "20-mine.toml").write_text('[server]\nlisten = "[::]:8443"\n')
    assert "auth.require" in fresh.bad("setup", "--device", "cpu")
    assert {k: v for k, v in tree(fresh.folder).items() if "20-mine" not in k} == before


def test_a_key_whose_file_cannot_be_written_is_not_made(fresh: Command) -> None:
    taken = fresh.folder.parent / "taken"
    taken.write_text("")
    assert "is there already" in fresh.bad("setup", "--no-samples", "--pat-file", taken)
    assert fresh("setup", "--no-samples", "--pat-file", "/dev/full/pat").exit_code == 2
    assert read_keys(fresh.folder / "keys.json") == []
    setup(fresh, "--pat-file", fresh.folder.parent / "pat")  # after a failure it can be run again
    assert len(read_keys(fresh.folder / "keys.json")) == 1


def test_what_another_file_sets_later_is_said(fresh: Command) -> None:
    setup(fresh)
    late = fresh.folder / "conf.d" / "90-site.toml"
    late.write_text('[engine]\ndevice = "cpu"\n')
    assert f"engine.device is set by {late} too" in setup(fresh, "--device", "auto")


# ---- who may connect -------------------------------------------------------------------------------------------------


def test_clients_are_let_in_by_service_and_socket(fresh: Command, tmp_path: Path) -> None:
    units = tmp_path / "units"
    setup(fresh, "--clients", "10.1.2.3/8,192.168.7.9", "--clients", "fd00::/8", "--unit-folder", units)
    for unit, section in (("service", "Service"), ("socket", "Socket")):
        path = units / f"inference-appliance.{unit}.d" / "20-clients.conf"
        lines = path.read_text().splitlines()
        assert lines[1:5] == [
            f"[{section}]",
            "IPAddressAllow=10.0.0.0/8",
            "IPAddressAllow=192.168.7.9/32",
            "IPAddressAllow=fd00::/8",
        ]
        assert mode(path) == 0o644
    setup(fresh, "--clients", "any", "--unit-folder", units)
    assert path.read_text().splitlines()[1:] == ["[Socket]", "IPAddressAllow=any"]
    setup(fresh, "--clients", "none", "--unit-folder", units)
    assert not list(units.rglob("*.conf"))


def test_name_servers_elsewhere_are_let_in_for_the_service(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("# by hand\nnameserver 127.0.0.53\nnameserver 10.9.9.9\nnameserver fe80::1%eth0\nnameserver odd\n")
    found = clients.resolvers(file)
    assert found == ("10.9.9.9", "fe80::1")
    outgoing = {"name servers": found}
    assert "IPAddressAllow=10.9.9.9" in clients.text("inference-appliance.service", ("10.0.0.0/8",), outgoing)
    assert "10.9.9.9" not in clients.text("inference-appliance.socket", ("10.0.0.0/8",), outgoing)
    assert "10.9.9.9" not in clients.text("inference-appliance.service", ("any",), outgoing)
    assert clients.resolvers(tmp_path / "none") == ()


CENTRAL = Orchestrator(api_base="https://192.0.2.7", user_id="acme")


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        (CENTRAL, "192.0.2.7"),
        (CENTRAL.model_copy(update={"proxy": "http://192.0.2.8:3128"}), "192.0.2.8"),
    ],
)
def test_the_orchestrator_is_let_through_for_the_service(tmp_path: Path, settings: Orchestrator, address: str) -> None:
    """Or the proxy on the way. It is no client's network, and goes when the appliance leaves."""
    service, socket = (tmp_path / f"inference-appliance.{unit}.d" / "20-clients.conf" for unit in ("service", "socket"))
    assert clients.write(None, settings, tmp_path) == [f"wrote {service}"]
    assert f"IPAddressAllow={address}" in service.read_text().splitlines()
    assert "Environment" not in service.read_text(), "it is no other rule for those who connect"
    assert clients.standing(tmp_path) == ()

    clients.write(("10.0.0.0/8", "fd00::/8"), settings, tmp_path)
    assert f"IPAddressAllow={address}" in service.read_text().splitlines()
    assert address not in socket.read_text()
    assert clients.write(None, settings, tmp_path) == []
    assert clients.standing(tmp_path) == ("10.0.0.0/8", "fd00::/8")

    clients.write(None, Orchestrator(), tmp_path)
    assert address not in service.read_text()
    assert clients.standing(tmp_path) == ("10.0.0.0/8", "fd00::/8")
    clients.write((), settings, tmp_path)
    assert clients.write(None, Orchestrator(), tmp_path) == [f"removed {service}"]


def test_a_name_that_cannot_be_looked_up_leaves_the_rule_as_it_is(tmp_path: Path) -> None:
    clients.write(("10.0.0.0/8",), CENTRAL, tmp_path)
    unknown = CENTRAL.model_copy(update={"api_base": "https://nobody.invalid:443"})
    (note,) = clients.write(None, unknown, tmp_path)
    assert note.startswith("note: the orchestrator is not let through, as it cannot be looked up")
    assert "192.0.2.7" in (tmp_path / "inference-appliance.service.d" / "20-clients.conf").read_text()
    assert clients.write(("10.0.0.0/8",), unknown, tmp_path)[0] == note


def test_each_rule_has_a_name_that_the_service_is_told(tmp_path: Path) -> None:
    def named(*allowed: str) -> str:
        lines = clients.text("inference-appliance.service", allowed, {}).splitlines()
        return next(line for line in lines if line.startswith("Environment="))

    assert named("any") == named("any") != named("10.0.0.0/8")
    assert named("any").startswith("Environment=ADDRESS_RULE=")
    assert "Environment" not in clients.text("inference-appliance.socket", ("any",), {})


def test_drop_ins_that_may_not_be_written_say_so(fresh: Command) -> None:
    result = fresh("setup", "--no-samples", "--clients", "any", "--unit-folder", "/proc/none")
    assert result.exit_code != 0
    assert "20-clients.conf cannot be written" in result.stderr


# ---- questions -------------------------------------------------------------------------------------------------------


def test_in_a_terminal_it_asks_for_what_no_flag_says(fresh: Command) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "appliance", "--config", str(fresh.file), "setup"]
    command += ["--samples-from", str(MODELS), "--unit-folder", str(fresh.folder / "none"), "--device", "cpu"]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    heard = ""
    answers = iter(
        [
            ("URL that clients use", "https://asked.example.com:8443"),
            ("Certificate", ""),
            ("sample", "n"),
            ("Central orchestrator", ""),
        ]
    )
    question, answer = next(answers)
    try:
        while chunk := os.read(master, 4096):
            heard += chunk.decode()
            if question and question in heard and heard.rstrip().endswith(":"):
                os.write(master, f"{answer}\n".encode())
                question, answer = next(answers, ("", ""))
                heard += " (answered)"
    except OSError:  # the terminal is gone with the process
        pass
    assert process.wait() == 0, heard
    os.close(master)
    config: Config = fresh.config
    assert config.server.base_url == "https://asked.example.com:8443"
    assert (fresh.folder / "tls" / "server.crt").exists()
    assert not list(config.catalog.root.iterdir())
    assert question == ""
