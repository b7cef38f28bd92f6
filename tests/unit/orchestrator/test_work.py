"""Streams towards an orchestrator that is odd: no stream dies of it, and nothing is shown that nobody may read."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2, status_pb2

from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.types import ModelKey
from appliance.orchestrator.backoff import Backoff
from appliance.orchestrator.central import Central
from appliance.orchestrator.work import Place, Runner, Work

PAT = "a-token-that-nobody-may-read"
RUNNER = Runner("r", "app", "there", ModelKey("u", "a", "m"), "1")
PATIENCE_S = 10.0


class Stream:
    """A call: what it says, by its kind ("r" or "control-r"), comes from the script; then nothing ever does."""

    def __init__(self, centre: "Centre") -> None:
        self._centre = centre
        self._script: Iterator[Any] = iter(())

    async def write(self, message: Any) -> None:
        if message.runner_item_id:
            self._centre.answers.append(message)
            self._centre.news.set()
            return
        opened = self._centre.opened[message.runner_id] = self._centre.opened[message.runner_id] + 1
        self._script = iter(self._centre.script(message.runner_id, opened))
        self._centre.news.set()

    async def read(self) -> Any:
        for said in self._script:
            if isinstance(said, Exception):
                raise said
            return said
        return await asyncio.get_running_loop().create_future()

    def cancel(self) -> None:
        pass

    async def code(self) -> Any:
        return await asyncio.get_running_loop().create_future()

    async def done_writing(self) -> None:
        pass


class Centre:
    """Instead of `Central`: streams that are played."""

    pat = PAT
    shown = Central.shown

    def __init__(self, script: Callable[[str, int], list[Any]]) -> None:
        """Args: script: what stream number n (from 1) of a runner id says."""
        self.script = script
        self.opened: dict[str, int] = defaultdict(int)
        self.answers: list[Any] = []
        self.news = asyncio.Event()

    def stream(self, rpc: str, request_id: str) -> Stream:
        return Stream(self)

    async def close(self) -> None:
        pass

    async def until(self, runner_id: str, count: int) -> None:
        """Return when so many of its streams were opened."""
        async with asyncio.timeout(PATIENCE_S):
            while self.opened[runner_id] < count:
                self.news.clear()
                await self.news.wait()


def worked(centre: Centre, trouble: list[str]) -> Work:
    """A runner's work with one stream."""
    backoff = Backoff(uniform=lambda low, high: low)
    work = Work(
        RUNNER,
        Place("u", "c", "n"),
        centre,
        {},
        MemoryBudget(1000),
        Metrics(),
        backoff,
        trouble.append,  # type: ignore[arg-type]
        100,
    )
    work.start(1)
    return work


async def test_a_message_that_nobody_can_read_ends_no_stream_for_good() -> None:
    """grpc gives None for bytes that are no message: the control stream too is opened again."""
    centre = Centre(lambda runner_id, number: [None] if number == 1 else [])
    work = worked(centre, [])
    for runner_id in ("r", "control-r"):
        await centre.until(runner_id, 2)
    await work.close()


@pytest.mark.parametrize("code", [status_code_pb2.ZERO, status_code_pb2.RUNNER_STREAM_START])
async def test_a_message_that_says_nothing_is_no_refusal(code: int) -> None:
    """An orchestrator may say that a stream is open before it has an item."""
    empty = service_pb2.MultiRunnerItemResponse(status=status_pb2.Status(code=code))
    refused = service_pb2.MultiRunnerItemResponse(status=status_pb2.Status(code=status_code_pb2.RUNNER_DOES_NOT_EXIST))
    trouble: list[str] = []
    centre = Centre(lambda runner_id, number: [empty, refused] if number == 1 else [])
    work = worked(centre, trouble)
    await centre.until("r", 2)
    assert str(status_code_pb2.RUNNER_DOES_NOT_EXIST) in trouble[0], "what it said second"
    await work.close()


async def test_a_pat_that_the_orchestrator_repeats_is_not_shown() -> None:
    details = f"no such token: {PAT}"
    unauthenticated = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAUTHENTICATED, grpc.aio.Metadata(), grpc.aio.Metadata(), details
    )
    status = status_pb2.Status(code=status_code_pb2.CONN_KEY_INVALID, details=details)
    refused = service_pb2.MultiRunnerItemResponse(status=status)
    trouble: list[str] = []
    centre = Centre(lambda runner_id, number: [[unauthenticated], [refused], []][min(number, 3) - 1])
    work = worked(centre, trouble)
    await centre.until("r", 3)
    assert len(trouble) >= 2
    assert all("no such token: ****" in each for each in trouble)
    await work.close()


async def test_a_request_that_is_too_large_is_refused_with_the_limit() -> None:
    """Broken off it would come again and again."""
    item = service_pb2.RunnerItem(id="i")
    item.processing_info.runner_method_type = resources_pb2.UNARY_UNARY
    item.post_model_outputs_request.model_id = "x" * 200
    handed_out = service_pb2.MultiRunnerItemResponse(runner_items=[item])
    centre = Centre(lambda runner_id, number: [handed_out] if (runner_id, number) == ("r", 1) else [])
    work = worked(centre, [])
    await centre.until("r", 2)
    (answer,) = centre.answers
    assert answer.status.code == status_code_pb2.RUNNER_PROCESSING_FAILED
    assert "limits.request_size allows 100" in answer.status.details
    await work.close()
