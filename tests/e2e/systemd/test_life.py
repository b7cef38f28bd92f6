"""A package's life on one machine, by apt and by dnf: install, upgrade under load, downgrade, remove, install again.

The tests follow each other. What is kept is what the operator edited, models, keys, certificates and state.
"""

from collections.abc import Callable, Iterator

import pytest
from support.graphs import identity_model, write_raw
from support.machines.installed import ETC, SERVICE, STATE, Installed
from support.machines.load import told
from support.machines.machine import Machine
from support.machines.measured import Measured, System
from support.machines.packages import DROPPED, NEW_LINE, NEW_NAME, RENAMED, Packages
from support.machines.systems import Deb, Rpm, describe, timed

EDITED = "\n[limits]\nconcepts_default = 7\n# edited by the operator\n"
_CHANGED_KEYS = "[catalog]\nscan_interval_s = 0.5\n[log]\nsample = 0.25\n"


@pytest.fixture(scope="module", params=["deb", "rpm"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def machine(kind: str, boot: Callable[[str, str], Machine], put_away: Callable[[Machine], None]) -> Iterator[Machine]:
    """One for each kind."""
    made = boot(f"life-{kind}", {"deb": "debian12", "rpm": "dnf"}[kind])
    yield made
    put_away(made)


@pytest.fixture(scope="module")
def way(kind: str, machine: Machine, packages: Packages) -> Deb | Rpm:
    if kind == "deb":
        return Deb(machine)
    way = Rpm(machine)
    way.prepare(packages)
    return way


@pytest.fixture(scope="module")
def where(kind: str) -> str:
    """For the table."""
    return {"deb": "deb, Debian 12", "rpm": "rpm, dnf"}[kind]


@pytest.mark.parametrize("kind", ["rpm"], indirect=True, scope="module")
def test_dnf_solves_dependencies(machine: Machine, way: Deb | Rpm) -> None:
    """Without what a Red Hat system has it is refused, by name: nothing is told to be ignored."""
    assert isinstance(way, Rpm)
    machine.run("rpm", "--erase", "distribution-stub")
    refused = way.dnf("install", "inference-appliance", check=False)
    assert "nothing provides" in refused
    assert "glibc" in refused
    machine.shell("rpm -i /srv/stub/*.rpm")


def test_it_is_installed_and_set_up(
    machine: Machine, installed: Installed, way: Deb | Rpm, packages: Packages, measured: Measured
) -> None:
    row = rows[way.kind] = describe(machine, packages, way, measured)
    assert machine.state() == "running"
    installed.set_up()
    machine.run("systemctl", "enable", "--now", SERVICE)
    row.ready_s = installed.seconds_to_ready()
    assert installed.predict() == "two"


def test_files_are_as_in_the_package(kind: str, machine: Machine) -> None:
    """Owners and modes too, which rpm knows; `appliance setup` writes files of its own and edits none."""
    command = {"deb": ("dpkg", "--verify"), "rpm": ("rpm", "--verify")}[kind]
    assert machine.run(*command, "inference-appliance").stdout == ""


def test_an_upgrade_under_load_loses_no_call(
    machine: Machine,
    installed: Installed,
    way: Deb | Rpm,
    packages: Packages,
    measured: Measured,
    where: str,
) -> None:
    machine.shell(f"cat >> {ETC}/appliance.toml <<'END'\n{EDITED}END")
    installed.configure(_CHANGED_KEYS)
    write_raw(installed.folder / "mine", identity_model())
    machine.copy_in(installed.folder / "mine", f"{STATE}/models/mine", "inference-appliance:inference-appliance")
    machine.run("systemctl", "reload", SERVICE)
    machine.wait(lambda: "mine" in installed.ready(), "the operator's own model is ready")
    kept.clear()
    kept.update(_contents(machine))
    assert any(path.endswith("keys.json") for path in kept)
    assert any("/models/mine/" in path for path in kept)
    before = installed.pid
    with installed.load() as load:
        took_s = timed(lambda: way.upgrade(packages))
        machine.wait(lambda: installed.active() == "active", "the service is back")
    assert installed.pid != before
    assert load.outcome.lost == 0, load.outcome
    assert load.outcome.other == {}, load.outcome
    assert not [note for note in load.outcome.notes if "no connection" in note], load.outcome
    rows[way.kind].upgrade_s = took_s
    measured.fact(f"upgrade {packages.version} → {packages.next_version} under load", where, told(load.outcome))


kept: dict[str, str] = {}
"""Path → checksum of what is the operator's, before the upgrade."""
rows: dict[str, System] = {}
"""Kind of package → its machine's row of the table."""


def _contents(machine: Machine) -> dict[str, str]:
    """Path → checksum of everything below /etc/inference-appliance, and of the models."""
    found = machine.shell(f"find {ETC} {STATE}/models -type f -exec sha256sum {{}} +").stdout
    pairs = (line.split(maxsplit=1) for line in found.splitlines())
    return {path: digest for digest, path in pairs if not path.endswith((".rpmnew", ".dpkg-dist"))}


class TestAfterTheUpgrade:
    def test_it_is_the_new_version(self, machine: Machine, packages: Packages) -> None:
        assert packages.next_version in machine.run("appliance", "--version").stdout

    def test_what_the_operator_has_is_kept(self, machine: Machine) -> None:
        assert _contents(machine) == kept

    def test_the_packages_own_file_lies_beside_the_edited_one(self, kind: str, machine: Machine) -> None:
        other = {"deb": "dpkg-dist", "rpm": "rpmnew"}[kind]
        assert machine.read(f"{ETC}/appliance.toml").endswith(EDITED)
        assert NEW_LINE in machine.read(f"{ETC}/appliance.toml.{other}")

    def test_models_and_keys_serve_as_before(self, installed: Installed) -> None:
        assert installed.predict() == "two"
        assert {"digits", "ml-topics", "mine"} <= set(installed.ready())

    def test_renamed_keys_are_read_under_their_new_names_and_said(
        self, machine: Machine, installed: Installed, measured: Measured, where: str
    ) -> None:
        shown = machine.run("appliance", "config", "show").stdout
        line = next(line for line in shown.splitlines() if line.startswith(NEW_NAME))
        assert "0.5" in line
        warned = installed.said("--priority=warning", "--boot")
        for name in (RENAMED, DROPPED):
            assert name in warned
        measured.fact(
            "configuration with a renamed and a dropped key", where, "read with a warning each, file unchanged"
        )

    def test_no_unit_has_failed(self, machine: Machine) -> None:
        assert machine.state() == "running"

    def test_only_configuration_differs_from_the_package(self, kind: str, machine: Machine) -> None:
        command = {"deb": ("dpkg", "--verify"), "rpm": ("rpm", "--verify")}[kind]
        lines = machine.run(*command, "inference-appliance", check=False).stdout.splitlines()
        assert [line.split()[-1] for line in lines] == [f"{ETC}/appliance.toml"]
        assert lines[0].split()[-2] == "c"


def test_a_downgrade_serves_as_before(
    machine: Machine, installed: Installed, way: Deb | Rpm, packages: Packages, measured: Measured, where: str
) -> None:
    way.downgrade(packages)
    assert packages.version in machine.run("appliance", "--version").stdout
    assert installed.active() == "active"
    assert _contents(machine) == kept
    assert installed.predict() == "two"
    measured.fact(f"downgrade {packages.next_version} → {packages.version}", where, "serving, everything kept")


def test_a_removal_stops_it_and_keeps_what_is_the_operators(
    kind: str, machine: Machine, installed: Installed, way: Deb | Rpm
) -> None:
    said = way.remove()
    assert installed.active() == "inactive"
    assert machine.show(SERVICE, "LoadState") in ("not-found", "masked")
    assert not machine.exists("/usr/lib/inference-appliance/python")
    assert not machine.exists("/usr/bin/appliance")
    left = _contents(machine)
    if kind == "rpm":
        left[f"{ETC}/appliance.toml"] = left.pop(f"{ETC}/appliance.toml.rpmsave")
        assert f"{ETC} is kept" in said
        assert f"{STATE} is kept" in said
    assert left == kept
    assert machine.state() == "running"


def test_it_serves_again_when_it_is_installed_again(
    kind: str,
    machine: Machine,
    installed: Installed,
    way: Deb | Rpm,
    packages: Packages,
    measured: Measured,
    where: str,
) -> None:
    way.install(packages)
    if kind == "rpm":
        machine.run("systemctl", "enable", "--now", SERVICE)  # a removal disables, and its preset is the site's
    machine.wait(lambda: installed.active() == "active", "the service is back")
    assert installed.predict() == "two"
    measured.fact("remove and install again", where, "serving with the same keys, certificates and models")


@pytest.mark.parametrize("kind", ["deb"], indirect=True, scope="module")
class TestPurge:
    """rpm has no such thing."""

    def test_keys_certificates_and_models_are_kept_and_said(
        self, machine: Machine, installed: Installed, way: Deb | Rpm, measured: Measured, where: str
    ) -> None:
        assert isinstance(way, Deb)
        said = way.purge()
        assert installed.active() == "inactive"
        for folder in (ETC, STATE):
            assert f"{folder} is kept" in said
        gone = set(kept) - set(_contents(machine))
        assert gone == {f"{ETC}/appliance.toml"}
        measured.fact("purge", where, "keys, certificates, models kept, and the operator is told where")

    def test_even_then_it_serves_when_it_is_installed_again(
        self, machine: Machine, installed: Installed, way: Deb | Rpm, packages: Packages
    ) -> None:
        assert isinstance(way, Deb)
        way.install(packages)
        machine.wait(lambda: installed.active() == "active", "the service is back")
        assert installed.predict() == "two"
