"""Integration tests run over both wires, and once more with fronts and engines as processes."""

from collections.abc import Iterator

import pytest
from support.appliance import mode


@pytest.fixture(scope="session", params=["native", "grpcio", "processes"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which wire serves; "processes" is the native one, in two fronts beside an engine."""
    if request.param == "processes":
        with mode("processes"):
            yield "native"
    else:
        yield request.param
