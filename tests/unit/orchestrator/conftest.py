"""The bundles are loaded once for each file of tests, as for the API."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support.api_world import World

from appliance.engine import worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Loaded once for a file; see `World`."""
    made = World(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        # However slow and busy this machine is now, the tiny graphs are run inline.
        patch.setattr(worker, "LONGEST_RUN_S", 10)
        patch.setattr(worker, "TURN_S", 10)
        await made.open()
    yield made
    await made.close()
