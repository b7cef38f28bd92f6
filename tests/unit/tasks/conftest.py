"""Servables that end with the test."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from support.engine_graphs import loaded

from appliance.core.memory import MemoryBudget
from appliance.tasks.servable import DecodePool, Servable, Ticket

Load = Callable[[Path], Awaitable[Servable]]


@pytest.fixture
async def load() -> AsyncIterator[Load]:
    """Loads bundles; what was loaded is closed at the end."""
    pool = DecodePool(2)
    made: list[Servable] = []

    async def run(folder: Path) -> Servable:
        made.append(await loaded(folder, pool))
        return made[-1]

    yield run
    for servable in made:
        servable.close()
    pool.close()


@pytest.fixture
def budget() -> MemoryBudget:
    """A MiB hundredfold."""
    return MemoryBudget(100 * 2**20)


@pytest.fixture
def ticket(budget: MemoryBudget) -> Ticket:
    """Of a request that has no deadline."""
    return Ticket("ada", None, budget.hold(0))
