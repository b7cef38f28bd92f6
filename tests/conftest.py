"""Fixtures that integration, client and end-to-end tests share."""

import faulthandler
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support import secrets
from support.appliance import MODELS, Appliance, Client, Pki, make_pki

# Machines are slow at times, which is no fault of what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

_GRACE_S = 30
"""How long threads may take to end after the last test."""

_WORKER = "workeroutput"
"""What a worker of pytest-xdist has on its configuration, to be told to the run that it belongs to."""

_searches = pytest.StashKey[list[tuple[list[str], str]]]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a process of the suite wrote a secret."""
    searches = session.config.stash.setdefault(_searches, [])
    if not getattr(session.config.option, "tx", None):  # else every worker has looked through what is its own
        searches.append(secrets.found())
    if hasattr(session.config, _WORKER):
        getattr(session.config, _WORKER)["searches"] = searches
    if any(leaks for leaks, _ in searches):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker found is said with the rest."""
    node.config.stash.setdefault(_searches, []).extend(getattr(node, _WORKER, {}).get("searches", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was looked through, and where a secret stands."""
    for leaks, extent in config.stash.get(_searches, []):
        terminalreporter.write_line(f"looked for {extent}: {len(leaks)} found", red=bool(leaks))
        for leak in leaks:
            terminalreporter.write_line(leak, red=True)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """A thread that a failed test left behind must not keep the run from ending, which would hide the failure."""
    threads = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    end = time.monotonic() + _GRACE_S
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback()
        sys.stdout.flush()
        os._exit(pytest.ExitCode.TESTS_FAILED)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """One root for the whole run, with a few clients."""
    return make_pki(tmp_path_factory.mktemp("pki") / "tls", clients=("line-3", "laptop"))


@pytest.fixture(scope="session", params=["native", "grpcio"])
def transport(request: pytest.FixtureRequest) -> str:
    """Which wire serves. Tests that take it, or an appliance, run over each: grpcio is the oracle of the other."""
    return str(request.param)


@pytest.fixture
def make_appliance(tmp_path: Path, pki: Pki, transport: str) -> Iterator[Callable[..., Appliance]]:
    """Make appliances that are not started yet; all are stopped at the end."""
    made: list[Appliance] = []

    def make(*bundles: str, **config: Any) -> Appliance:
        appliance = Appliance(tmp_path / f"appliance-{len(made)}", pki, config, transport=transport)
        for bundle in bundles:
            shutil.copytree(MODELS / bundle, appliance.models / bundle)
        made.append(appliance)
        return appliance

    yield make
    for appliance in made:
        appliance.stop()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """One running appliance with the shipped bundles, for tests that do not change it; its key is `shared.key`."""
    appliance = Appliance(tmp_path_factory.mktemp("shared"), pki, transport=transport)
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, appliance.models / bundle)
    appliance.key = appliance.new_key()
    with appliance:
        yield appliance


@pytest.fixture
def client(shared: Appliance, pki: Pki) -> Iterator[Client]:
    """The raw stub on the shared appliance's TLS port."""
    with Client(shared.port(), pki.ca, shared.key) as made:
        yield made
