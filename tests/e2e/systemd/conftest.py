"""Machines with a booted systemd, and the packages that are installed on them.

What these tests need and cannot have fails them: a root that cannot be made, no nspawn, no packages. Only
`E2E_SYSTEMD="skip REASON"` skips them. Tests of what the sandbox keeps out are skipped, with the reason, where it is
not enforced (`enforced`).
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.appliance import ROOT
from support.machines import roots
from support.machines.installed import PACKAGES, Installed
from support.machines.machine import Machine, clear_leftovers, missing
from support.machines.measured import Measured
from support.machines.packages import Packages, find_packages
from support.machines.probe import not_enforced

_OUT = ROOT / "build" / "e2e"
_running: list[Machine] = []


@pytest.fixture(scope="session", autouse=True)
def _machines_can_be_booted() -> None:
    """Skip all when somebody said why; end the run when something is missing."""
    choice = os.environ.get("E2E_SYSTEMD", "")
    if choice.startswith("skip"):
        reason = choice.removeprefix("skip").strip()
        if not reason:
            pytest.exit('E2E_SYSTEMD="skip REASON" needs the reason', returncode=1)
        pytest.skip(f"no booted systemd: {reason}")
    if remedy := missing():
        pytest.exit(f"no machine can be booted: {remedy}", returncode=1)
    for name in clear_leftovers():
        print(f"removed what an earlier run left: {name}")
    try:
        for recipe in roots.RECIPES.values():
            roots.make(recipe)
    except RuntimeError as error:
        pytest.exit(str(error), returncode=1)


@pytest.fixture(scope="session")
def packages(_machines_can_be_booted: None) -> Packages:
    """The packages under test, and those of the version after it."""
    try:
        return find_packages()
    except FileNotFoundError as error:
        pytest.exit(str(error), returncode=1)


@pytest.fixture(scope="session")
def boot(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Machine]]:
    """Boot a machine, by its own name and its root's; all are gone at the end."""

    def made(name: str, root: str) -> Machine:
        home = tmp_path_factory.mktemp(name)
        machine = Machine(name, roots.RECIPES[root].folder, home, {packages.folder: PACKAGES})
        machine.boot()
        _running.append(machine)
        return machine

    yield made
    while _running:
        _put_away(_running[0])


@pytest.fixture(scope="session")
def put_away() -> Callable[[Machine], None]:
    """End a machine before its session does."""
    return _put_away


def _put_away(machine: Machine) -> None:
    """End a machine and keep its journal."""
    _OUT.mkdir(parents=True, exist_ok=True)
    journal = machine.run("journalctl", "--no-pager", "--output", "short-precise", check=False).stdout
    (_OUT / f"{machine.name}.journal").write_text(journal, encoding="utf-8")
    machine.kill()
    _running.remove(machine)


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest, boot: Callable[[str, str], Machine]) -> Iterator[Machine]:
    """The module's machine; it says MACHINE, ROOT_FS = name, root."""
    made = boot(request.module.MACHINE, request.module.ROOT_FS)
    yield made
    _put_away(made)


@pytest.fixture(scope="module")
def installed(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The appliance on the module's machine, wherever the module's tests have brought it."""
    return Installed(machine, tmp_path_factory.mktemp(f"{machine.name}-clients"))


@pytest.fixture(scope="session")
def _enforcement(boot: Callable[[str, str], Machine]) -> str:
    machine = boot("probe", "debian12")
    found = not_enforced(machine)
    _put_away(machine)
    return found


@pytest.fixture
def enforced(_enforcement: str) -> None:
    """For tests of what the sandbox keeps out."""
    if _enforcement:
        pytest.skip(f"not enforced here: {_enforcement}")


@pytest.fixture(scope="session")
def measured() -> Iterator[Measured]:
    """What is measured; written when the run ends, into docs/install.md only with UPDATE_DOCS=1."""
    found = Measured()
    yield found
    found.write(into_page=os.environ.get("UPDATE_DOCS") == "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Show the end of each machine's journal with a failure."""
    report = yield
    if report.failed:
        for machine in _running:
            journal = machine.run(
                "journalctl", "--no-pager", "--lines=60", "--output=short-precise", check=False
            ).stdout
            report.sections.append((f"journal of {machine.name}", journal))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules in the order of a machine's life: the probe, the installation, the rest."""
    order = {name: place for place, name in enumerate(("test_machines", "test_deb_install"))}
    items.sort(key=lambda item: order.get(Path(item.path).stem, len(order)))
