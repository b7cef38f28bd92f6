"""Integration tests run over both wires, and once more with fronts and engines as processes."""

from collections.abc import Callable, Iterator

import pytest
from support.appliance import Appliance, mode


@pytest.fixture(scope="session", params=["native", "grpcio", "processes"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which wire serves; "processes" is the native one, in two fronts beside an engine."""
    if request.param == "processes":
        with mode("processes"):
            yield "native"
    else:
        yield request.param


@pytest.fixture
def appliance(make_appliance: Callable[..., Appliance]) -> Iterator[Appliance]:
    """A running appliance with the digits bundle and a key."""
    made = make_appliance("digits")
    made.key = made.new_key()
    with made:
        yield made
