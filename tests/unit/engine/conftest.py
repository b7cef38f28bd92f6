"""Batchers that end with the test."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from support.fake_model import WAIT_S, FakeModel

from appliance.engine.batcher import Batcher


@pytest.fixture
def model() -> Iterator[FakeModel]:
    fake = FakeModel()
    yield fake
    fake.open_gate()


@pytest.fixture
async def make(model: FakeModel) -> Any:
    """Makes batchers of the fake model; all are closed at the end, and their threads gone."""
    made: list[Batcher] = []

    def build(**settings: Any) -> Batcher:
        batcher = Batcher(settings.pop("model", model), **{"max_rows": 8, "queue_rows": 100, **settings})
        made.append(batcher)
        return batcher

    yield build
    model.open_gate()
    for batcher in made:
        batcher.close()
        for worker in batcher._workers:
            await asyncio.to_thread(worker.thread.join, WAIT_S)
            assert not worker.thread.is_alive()
