"""The service as its clients see it, from outside of its machine, while it is reloaded, killed, drained and restarted.

The tests follow each other on one machine; each leaves the service running.
"""

import json
import time
from pathlib import Path

import pytest
from support.machines.installed import CLIENT, ETC, SAMPLE, SERVICE, SOCKET, Installed
from support.machines.load import Outcome, told
from support.machines.machine import HOST, OUTSIDE, Machine
from support.machines.measured import Measured
from support.machines.packages import Packages
from support.machines.systems import Deb
from support.stock import CLIENT_TESTS, executable, plain_environment

MACHINE, ROOT_FS = "serving", "debian12"
_ON = "Debian 12"
_ENGINE = "appliance.daemon.engine_process"


@pytest.fixture(scope="module", autouse=True)
def _serving(machine: Machine, installed: Installed, packages: Packages) -> None:
    Deb(machine).install(packages)
    installed.set_up()
    installed.start()


def nothing_lost(outcome: Outcome) -> None:
    """Every call that was taken ended; some were answered, or the test says nothing."""
    assert outcome.lost == 0, outcome
    assert outcome.other == {}, outcome
    assert outcome.answered > 0, outcome


def nothing_noticed(outcome: Outcome) -> None:
    """No caller saw anything."""
    nothing_lost(outcome)
    assert (outcome.unavailable, outcome.deploying, outcome.refused) == (0, 0, 0), outcome


class TestAnswers:
    def test_shipped_bundles_are_ready(self, installed: Installed) -> None:
        assert {"digits", "ml-topics"} <= set(installed.ready())

    def test_status_says_where_it_serves(self, machine: Machine) -> None:
        assert "serving https://" in machine.show(SERVICE, "StatusText")

    def test_a_stock_sdk_outside_predicts_over_tls(self, installed: Installed, measured: Measured) -> None:
        assert installed.predict() == "two"
        measured.fact("stock Clarifai SDK from another machine, TLS", _ON, "right answer")

    def test_a_client_certificate_lets_in_without_a_key(
        self, machine: Machine, installed: Installed, measured: Measured
    ) -> None:
        """mTLS, with the stock stub: SDKs cannot present a certificate."""
        installed.configure(
            '[server]\nmtls_listen = "[::]:8444"\n[auth]\nrequire = "either"\n'
            f'[[principal]]\nname = "{CLIENT}"\nidentities = ["uri:spiffe://plant/{CLIENT}"]\n'
        )
        pair = installed.client_certificate()
        machine.run("systemctl", "restart", SERVICE)

        assert _stub_says(machine, installed, 8443, *pair) == _stub_says(machine, installed, 8444, *pair) == "two"
        assert "two" not in _stub_says(machine, installed, 8443)
        assert _stub_says(machine, installed, 8444) == "UNAVAILABLE"
        measured.fact("stock clarifai-grpc with a client certificate and no key, mTLS", _ON, "right answer")

    @pytest.mark.usefixtures("enforced")
    def test_clients_that_setup_did_not_name_are_kept_out(self, machine: Machine) -> None:
        """IPAddressDeny=any: packets of others are dropped, so a connection is not refused but never made."""
        machine.outside("ip", "address", "add", "10.77.0.9/24", "dev", "ve-serving")
        try:
            named, other = (_connect_from(machine, address) for address in ("10.77.0.1", "10.77.0.9"))
        finally:
            machine.outside("ip", "address", "del", "10.77.0.9/24", "dev", "ve-serving")
        assert (named, other) == ("connected", "TimeoutError")


def _stub_says(machine: Machine, installed: Installed, port: int, *certificate: Path) -> str:
    """What the stock stub outside gets without a key, with a client certificate if one is given."""
    done = machine.outside(
        *(executable("sdk-12"), CLIENT_TESTS / "script_certificate.py"),
        *(f"{HOST}:{port}", installed.ca, SAMPLE, *certificate),
        environment=plain_environment(),
    )
    return str(json.loads(done.stdout.splitlines()[-1]))


def _connect_from(machine: Machine, address: str) -> str:
    code = (
        "import socket, sys\n"
        "try: socket.create_connection((sys.argv[1], 8443), 3, (sys.argv[2], 0)); print('connected')\n"
        "except OSError as error: print(type(error).__name__)"
    )
    return machine.outside("python3", "-c", code, HOST, address).stdout.strip()


class TestJournal:
    def test_entries_have_fields(self, installed: Installed) -> None:
        entries = installed.journal("MODEL=appliance/main/digits", "VERSION=1")
        entry = next(entry for entry in entries if entry["MESSAGE"].startswith("ready after"))
        assert entry["SYSLOG_IDENTIFIER"] == "inference-appliance"
        assert entry["_SYSTEMD_UNIT"] == SERVICE
        assert entry["PRIORITY"] == "6"

    def test_a_refusal_names_method_code_and_request(self, machine: Machine, installed: Installed) -> None:
        assert "two" not in _stub_says(machine, installed, 8443)
        entry = installed.journal("METHOD=PostModelOutputs")[-1]
        assert entry["CODE"].startswith("CONN_")
        assert entry["REQ_ID"]
        assert entry["COMPONENT"] == "api"
        assert entry["PRIORITY"] == "4"

    def test_no_key_is_in_it(self, machine: Machine, installed: Installed) -> None:
        assert installed.key not in machine.run("journalctl", "--no-pager", "--all").stdout

    def test_it_has_no_errors(self, installed: Installed) -> None:
        assert installed.said("--priority=err") == ""


class TestAudit:
    def test_it_is_kept_in_the_state_folder_for_the_service_group(self, machine: Machine) -> None:
        machine.run("appliance", "audit", "verify")
        folder = "/var/lib/inference-appliance/audit"
        listed = machine.shell(f"stat -c '%U:%G %a %n' {folder} {folder}/*").stdout.splitlines()
        owner = "inference-appliance:inference-appliance"
        assert listed[0] == f"{owner} 750 {folder}"
        assert {line.rsplit(" ", 1)[0] for line in listed[1:]} == {f"{owner} 640"}

    def test_it_says_which_user_asked(self, machine: Machine) -> None:
        machine.run("appliance", "log-level", "wire", "info")
        machine.run("appliance", "log-level", "--reset")
        exported = 'appliance audit export --event log-level | grep -c \'"by":"uid:0"\''
        machine.shell(f"until test $({exported}) = 2; do sleep 0.2; done")


class TestHelp:
    def test_the_support_bundle_has_the_journal_and_no_secret(self, machine: Machine, installed: Installed) -> None:
        machine.shell(
            "appliance support-bundle --output /root/support.tar.gz; mkdir /root/support; "
            "tar --directory /root/support --extract --auto-compress --file /root/support.tar.gz"
        )
        for secret in (installed.key, "PRIVATE KEY"):
            found = machine.run("grep", "--recursive", "--files-with-matches", secret, "/root/support", check=False)
            assert found.stdout == ""
        assert machine.run("grep", "--recursive", "--files-with-matches", "ready after", "/root/support").stdout

    def test_doctor_finds_nothing_wrong_and_says_who_may_connect(self, machine: Machine) -> None:
        said = machine.run("appliance", "doctor").stdout
        assert "IPAddressDeny" in said
        assert OUTSIDE in said


class TestReload:
    def test_a_rotated_certificate_is_taken_over_and_no_call_notices(
        self, machine: Machine, installed: Installed, measured: Measured
    ) -> None:
        before = _serial(machine, installed)
        with installed.load() as load:
            machine.run("appliance", "certs", "renew", "server")
            machine.run("systemctl", "reload", SERVICE)
            after = _serial(machine, installed)
        nothing_noticed(load.outcome)
        assert before != after
        measured.fact("reload with a rotated certificate under load", _ON, told(load.outcome))

    def test_a_broken_certificate_fails_the_reload_and_changes_nothing(
        self, machine: Machine, installed: Installed
    ) -> None:
        before = _serial(machine, installed)
        machine.run("cp", "-a", f"{ETC}/tls/server.crt", "/root/kept.crt")
        machine.shell(f"echo broken > {ETC}/tls/server.crt")
        try:
            assert machine.run("systemctl", "reload", SERVICE, check=False).returncode != 0
            assert installed.active() == "active"
            assert _serial(machine, installed) == before
            assert "server.crt" in installed.said("--priority=warning")
        finally:
            machine.run("cp", "-a", "/root/kept.crt", f"{ETC}/tls/server.crt")
        machine.run("systemctl", "reload", SERVICE)
        assert installed.predict() == "two"


def _serial(machine: Machine, installed: Installed) -> str:
    """The serial number of the certificate that clients are shown."""
    code = (
        "import socket, ssl, sys\n"
        "context = ssl.create_default_context(cafile=sys.argv[2])\n"
        "plain = socket.create_connection((sys.argv[1], 8443), 30)\n"
        "print(context.wrap_socket(plain, server_hostname=sys.argv[1]).getpeercert()['serialNumber'])"
    )
    return machine.outside("python3", "-c", code, HOST, installed.ca).stdout.strip()


class TestRestart:
    def test_a_restart_refuses_nobody(self, machine: Machine, installed: Installed, measured: Measured) -> None:
        """systemd keeps the listening sockets; who connects meanwhile waits."""
        with installed.load() as load:
            machine.run("systemctl", "restart", SERVICE)
        nothing_lost(load.outcome)
        assert not [note for note in load.outcome.notes if "no connection" in note], load.outcome
        measured.fact("restart under load", _ON, told(load.outcome))

    def test_a_restart_behind_the_socket_unit_refuses_nobody(
        self, machine: Machine, installed: Installed, measured: Measured
    ) -> None:
        """Port 443 belongs to the socket unit."""
        machine.run("systemctl", "stop", SERVICE)  # no socket can be opened for a service that runs
        machine.run("systemctl", "enable", "--now", SOCKET)
        machine.run("systemctl", "start", SERVICE)
        with installed.load(port=443) as load:
            machine.run("systemctl", "restart", SERVICE)
        nothing_lost(load.outcome)
        assert not [note for note in load.outcome.notes if "no connection" in note], load.outcome
        measured.fact("restart under load, port 443 by the socket unit", _ON, told(load.outcome))

    def test_while_the_service_is_down_the_socket_unit_starts_it(self, machine: Machine, installed: Installed) -> None:
        machine.run("systemctl", "stop", SERVICE)
        with installed.load(port=443, callers=1) as load:
            machine.wait(lambda: installed.active() == "active", "the service is started")
        nothing_lost(load.outcome)
        machine.run("systemctl", "disable", "--now", SOCKET)
        machine.run("systemctl", "restart", SERVICE)


class TestDrain:
    def test_a_stop_answers_what_is_in_flight(self, machine: Machine, installed: Installed, measured: Measured) -> None:
        installed.add_slow_model()
        with installed.load(slow=True, callers=3) as load:
            machine.run("systemctl", "stop", SERVICE)
            assert machine.show(SERVICE, "Result") == "success"
        nothing_lost(load.outcome)
        assert "calls were lost" not in installed.said()
        measured.fact("stop with requests of about a second in flight", _ON, told(load.outcome))
        installed.start()


class TestKilled:
    def test_an_engine_that_is_killed_is_replaced_without_a_restart(
        self, machine: Machine, installed: Installed, measured: Measured
    ) -> None:
        installed.configure('[processes]\nmode = "processes"\n', "60-processes.toml")
        machine.run("systemctl", "restart", SERVICE)
        supervisor, (engine, *_) = installed.pid, installed.processes(_ENGINE)
        with installed.load() as load:
            machine.run("kill", "-KILL", str(engine))
            machine.wait(lambda: set(installed.processes(_ENGINE)) - {engine}, "another engine")
            machine.wait(lambda: "digits" in installed.ready(), "digits is ready again")
        nothing_lost(load.outcome)
        assert installed.pid == supervisor
        assert installed.restarts() == 0
        measured.fact("kill -9 of the engine under load", _ON, told(load.outcome))

    def test_a_supervisor_that_stands_still_is_killed_and_recovers(
        self, machine: Machine, installed: Installed, measured: Measured
    ) -> None:
        """The watchdog; what the old processes had is gone with them, and the new one serves."""
        before, begun = installed.pid, time.monotonic()
        machine.run("kill", "-STOP", str(before))
        machine.wait(lambda: installed.pid not in (0, before) and installed.active() == "active", "recovery")
        took = time.monotonic() - begun
        assert installed.predict() == "two"
        assert installed.restarts() == 1
        assert "Watchdog timeout" in installed.said()
        assert not [pid for pid in installed.processes("appliance") if pid == before]
        measured.fact("SIGSTOP of the supervisor: watchdog, restart, serving", _ON, f"after {took:.0f} s")

    def test_a_slow_batch_is_no_reason_for_the_watchdog(self, installed: Installed) -> None:
        """Recorded by systemd: no restart beside the one above, after all the slow calls of this module."""
        assert installed.restarts() == 1
        assert installed.said().count("Watchdog timeout") == 1


def test_the_callers_would_have_noticed_a_loss(machine: Machine, installed: Installed) -> None:
    """kill -9 of everything with calls in flight loses them, and they are counted: a 0 above means something."""
    with installed.load(slow=True, callers=3) as load:
        machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
        machine.wait(lambda: "slow" in installed.ready(), "the service is back")
    assert load.outcome.lost > 0, load.outcome
