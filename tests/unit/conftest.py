"""A world of bundles for whoever asks an API; loaded once for each file of tests."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support.api_world import World

from appliance.core import logs

logs.limit(1_000_000)  # tests that look for a line share the second with many that make some


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Loaded once for a file; see `World`."""
    async with World(tmp_path_factory.mktemp("world")).opened() as made:
        yield made
