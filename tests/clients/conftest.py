"""What the client tests prove, row by row, becomes docs/clients.md.

A test says with `matrix.row(client, form)` which form of which client it drives; when the test passes the row reads
"pass", and with `why` it reads "not possible" and the test has proven the reason. After a run in which all client tests
were chosen and none failed or was skipped, docs/clients.md is written anew; the run fails when rows differ from those
committed.
"""

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import MODELS, ROOT, Appliance, Client, Pki, image_input, request_for, text_input
from support.client_matrix import Matrix
from support.stock import SAMPLES, files_over_http

_MATRIX = pytest.StashKey[Matrix]()
_FAILED = pytest.StashKey[bool]()
_HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "clients.md"


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> Matrix:
    """The rows of this test; they are kept when it passes."""
    mine = Matrix()
    request.node.stash[_MATRIX] = mine
    return mine


TEXT = "Decision trees are grown on bootstrap samples and vote together."
"""What the clients ask the text classifier about."""


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A web server with the samples of `digits` and a text file, `text.txt`: where inputs by URL come from."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copytree(SAMPLES, folder, dirs_exist_ok=True)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with files_over_http(folder) as base:
        yield base


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory, pki: Pki, web: str) -> Iterator[Appliance]:
    """One appliance on the native wire with the shipped bundles, which may fetch from `web`; its key is `native.key`.

    Client tests take it instead of `shared`, which runs them over both wires.
    """
    place = web.removeprefix("http://")
    config = {
        "urls": {"hosts": [place.partition(":")[0], place], "private_addresses": True},
        "principal": [{"name": "slow", "requests_per_second": 1, "burst": 1}],
    }
    appliance = Appliance(tmp_path_factory.mktemp("native"), pki, config, transport="native")
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, appliance.models / bundle)
    appliance.key = appliance.new_key()
    with appliance:
        yield appliance


@pytest.fixture(scope="session")
def slow_key(native: Appliance) -> str:
    """A key of a principal of `native` that may ask once a second."""
    return native.new_key("--principal", "slow")


@pytest.fixture(scope="session")
def truth(native: Appliance, pki: Pki) -> dict[str, list[str]]:
    """Concept ids by model, best first, of the first sample of `digits` and of TEXT, as the raw stub reads them."""
    picture = sorted(SAMPLES.glob("*.png"))[0].read_bytes()
    with Client(native.port(), pki.ca, native.key) as client:
        replies = {
            "digits": client.predict(request_for("digits", [image_input(picture)])),
            "ml-topics": client.predict(request_for("ml-topics", [text_input(TEXT)])),
        }
    return {model: [concept.id for concept in reply.outputs[0].data.concepts] for model, reply in replies.items()}


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MATRIX] = Matrix()
    config.stash[_FAILED] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report: pytest.TestReport = yield
    if report.failed or report.skipped:  # without a program that a client needs, its rows are missing
        item.config.stash[_FAILED] = True
    if report.when == "call" and report.passed:
        item.config.stash[_MATRIX].adopt(item.stash.get(_MATRIX, Matrix()))
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only a run of every client test may say what clients can do."""
    wanted = set(_HERE.glob("test_*.py"))
    chosen = {Path(item.path) for item in session.items}
    session.config.stash[_FAILED] = not wanted <= chosen or bool(session.config.option.keyword)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    found = session.config.stash[_MATRIX]
    if session.config.stash[_FAILED] or not found.rows:
        return
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    PAGE.write_text(found.page(), encoding="utf-8")
    if not found.same_rows(before):
        print("\ndocs/clients.md said something else about clients; it was written anew: read it and commit it.")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
