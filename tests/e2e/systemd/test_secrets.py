"""Secrets on a real machine: a passphrase as systemd's encrypted credential; lists and keys that are read again."""

import json
import secrets
from collections.abc import Iterator

import pytest
from support.machines.installed import CLIENT, ETC, HOME, SAMPLE, SERVICE, Installed
from support.machines.machine import HOST, Machine
from support.machines.packages import Packages
from support.machines.systems import Deb
from support.stock import CLIENT_TESTS, executable, plain_environment

MACHINE, ROOT_FS = "secrets", "debian12"
_PASSPHRASE = secrets.token_hex(16)
_ENCRYPTED = f"{ETC}/secret.cred"


@pytest.fixture(scope="module", autouse=True)
def _serving(machine: Machine, installed: Installed, packages: Packages) -> None:
    Deb(machine).install(packages)
    installed.set_up()
    installed.start()


@pytest.fixture(scope="class")
def _passphrase(machine: Machine, installed: Installed) -> Iterator[None]:
    """One on the TLS key."""
    key = f"{ETC}/tls/server.key"
    machine.write("/root/passphrase", _PASSPHRASE, 0o600)
    machine.shell(
        f"cp -a {key} /root/plain.key\n"
        f"openssl pkey -in /root/plain.key -aes256 -passout file:/root/passphrase -out /root/locked.key\n"
        f"cat /root/locked.key > {key}; rm /root/passphrase /root/locked.key"
    )
    yield
    installed.drop_in("")
    machine.shell(f"cp -a /root/plain.key {key}; systemctl restart {SERVICE}")


@pytest.mark.usefixtures("_passphrase")
class TestCredential:
    """As inference-appliance(8) says, "Secrets"."""

    def test_without_it_the_key_is_of_no_use(self, machine: Machine) -> None:
        assert machine.run("systemctl", "restart", SERVICE, check=False).returncode != 0
        assert machine.show(SERVICE, "ExecMainStatus") == "3"

    def test_the_service_reads_it_from_systemd(self, machine: Machine, installed: Installed) -> None:
        command = ["systemd-creds", "encrypt", "--with-key=host", "--name=appliance.toml", "-", _ENCRYPTED]
        machine.run(*command, stdin=f'[tls]\nkey_passphrase = "{_PASSPHRASE}"\n')
        installed.drop_in(f"[Service]\nLoadCredentialEncrypted=appliance.toml:{_ENCRYPTED}\n")
        machine.run("systemctl", "reset-failed", SERVICE)
        installed.start()
        assert installed.predict() == "two"

    def test_nobody_else_sees_it(self, machine: Machine) -> None:
        for command in (("systemctl", "show", SERVICE), ("journalctl", "--no-pager", "--all"), ("ps", "axewww")):
            assert _PASSPHRASE not in machine.run(*command).stdout
        found = machine.run("grep", "--recursive", "--files-with-matches", _PASSPHRASE, "/etc", "/var", check=False)
        assert found.stdout == ""


class TestReadAgain:
    """Without a restart."""

    def test_a_revoked_certificate_is_refused_after_a_reload(self, machine: Machine, installed: Installed) -> None:
        machine.run("appliance", "certs", "crl")
        installed.configure(
            f'[tls]\ncrl = "{ETC}/tls/crl.pem"\n[auth]\nrequire = "either"\n'
            f'[[principal]]\nname = "{CLIENT}"\nidentities = ["uri:spiffe://plant/{CLIENT}"]\n'
        )
        pair = installed.client_certificate()
        machine.run("systemctl", "restart", SERVICE)
        before = installed.pid

        def answer() -> str:
            done = machine.outside(
                *(executable("sdk-12"), CLIENT_TESTS / "script_certificate.py"),
                *(f"{HOST}:8443", installed.ca, SAMPLE, *pair),
                environment=plain_environment(),
            )
            return str(json.loads(done.stdout.splitlines()[-1]))

        assert answer() == "two"
        machine.run("appliance", "certs", "revoke", CLIENT)
        machine.run("systemctl", "reload", SERVICE)
        assert answer() != "two"
        assert installed.pid == before

    def test_a_revoked_key_is_refused_after_a_reload(self, machine: Machine, installed: Installed) -> None:
        machine.shell("umask 077; appliance keys create --quiet > /root/second-key")
        predict = ("appliance", "predict", "digits", f"{HOME}/share/samples/digit-2.png")
        predict += ("--base-url", "https://localhost:8443", "--key-file")
        machine.run("systemctl", "reload", SERVICE)
        assert machine.run(*predict, "/root/second-key").stdout.startswith("two")
        rows = json.loads(machine.run("appliance", "keys", "list", "--json").stdout)
        machine.run("appliance", "keys", "revoke", rows[-1]["id"])
        machine.run("systemctl", "reload", SERVICE)
        assert machine.run(*predict, "/root/second-key", check=False).returncode != 0
        assert installed.predict() == "two", "the first key goes on"
