"""What the client tests prove, row by row, becomes docs/clients.md.

A test says with `matrix.row(client, form)` which form of which client it drives; when the test passes the row reads
"pass", and with `why` it reads "not possible" and the test has proven the reason. After a run in which all client tests
were chosen and none failed, docs/clients.md is written anew; the run fails when rows differ from those committed.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import ROOT
from support.client_matrix import Matrix

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


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_MATRIX] = Matrix()
    config.stash[_FAILED] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report: pytest.TestReport = yield
    if report.failed:
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
