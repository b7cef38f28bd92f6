"""Fixtures: a centre with one user."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support import secrets
from support.appliance import Pki


@pytest.fixture
def transport() -> str:
    """How clients reach the appliance does not matter here."""
    return "native"


@pytest.fixture
def make_centre(tmp_path: Path, pki: Pki) -> Iterator[Callable[..., RunningCentre]]:
    """Start centres that know the user; all are stopped at the end."""
    made: list[RunningCentre] = []

    def make(**settings: Any) -> RunningCentre:
        centre = RunningCentre(tmp_path / f"centre-{len(made)}", pki, settings).start()
        made.append(centre)
        secrets.never_to_be_written(PAT)
        centre.tell("admit", pat=PAT, user=USER)
        return centre

    yield make
    for centre in made:
        centre.stop()


@pytest.fixture
def centre(make_centre: Callable[..., RunningCentre]) -> RunningCentre:
    """A centre that knows the user."""
    return make_centre()
