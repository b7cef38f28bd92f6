"""Hours of a link that comes and goes, in seconds: no item is lost, none is answered twice, usage is reported in full.

The agent and the reports of usage run here on an event loop whose clock is fast, with their own back-off on that clock;
centre, receiver, TLS and gRPC are real, and so are their seconds. Chance has a seed. FLAPPING_HOURS says how many:
`make fleet` takes a day of them, which is a minute and a half.
"""

import asyncio
import itertools
import logging
import math
import os
import random
import selectors
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from clarifai_grpc.grpc.api import service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from orchestrator.enrolled import row
from orchestrator.link import Link
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support import graphs
from support.api_world import QUICK, World
from support.appliance import ROOT, Pki
from support.usage_receiver import Receiver
from support.waiting import eventually_async

from appliance.api.auth import OneCaller
from appliance.api.service import Api
from appliance.core.config import Catalog, Config, Limits, Orchestrator, Placement
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.daemon.usage import Usage
from appliance.orchestrator import agent as agents
from appliance.orchestrator import usage_reports, work
from appliance.orchestrator.agent import CALLER, Agent
from appliance.orchestrator.backoff import Backoff
from bench.common import between_markers, table

PAGE = ROOT / "docs" / "fleet.md"

SPEED = 960.0
"""Seconds of the agent's for one of the world's."""

HOURS = float(os.environ.get("FLAPPING_HOURS", "3"))
UP_S, DOWN_S, ITEM_S = 600.0, 180.0, 30.0
"""The agent's seconds: how long the link is good, and bad, on average; between two items."""

TROUBLES = ("refused", "frozen", "reset")
MODEL = "echo"
SEED = 8


class _Fast(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    speed = 1.0

    def select(self, timeout: float | None = None) -> Any:
        return super().select(timeout if timeout is None else timeout / self.speed)


class FastLoop(asyncio.SelectorEventLoop):
    """One on which a day is over soon: from `hurry` on its clock is fast, and so is whatever sleeps on it."""

    def __init__(self) -> None:
        self._fast, self._since = _Fast(), math.inf
        super().__init__(self._fast)

    def hurry(self) -> None:
        """Be fast."""
        self._since, self._fast.speed = super().time(), SPEED

    def time(self) -> float:
        """Seconds, fast ones after `hurry`."""
        real = super().time()
        return real + max(0.0, real - self._since) * (SPEED - 1)


class Small(World):
    """A catalog of one bundle, which gives back what it is given."""

    async def open(self) -> None:
        """Write it, and load it."""
        graphs.write_raw(self.root / MODEL, graphs.identity_model(), **QUICK)
        await self.look()


def enrolled(world: World, centre: RunningCentre, links: list[Link]) -> Config:
    """The configuration: to the centre over the first link, to the receiver of reports over the second."""
    to_centre, to_receiver = links
    pat = world.folder / "orchestrator.pat"
    pat.write_text(PAT, encoding="ascii")
    return Config(
        catalog=Catalog(root=world.root, state_dir=world.folder / "state", user_id=USER),
        placement=Placement(compute_cluster_id="plants", nodepool_id="hall-3"),
        orchestrator=Orchestrator(
            api_base=f"https://localhost:{to_centre.port}",
            user_id=USER,
            pat_file=pat,
            root_ca=centre.pki.ca,
            streams=4,
            usage_url=f"https://localhost:{to_receiver.port}/v1/usage",
            usage_interval_s=300,
        ),
        limits=Limits(request_timeout_s=3600),  # a run takes the world's time
    )


def the_agent(config: Config, world: World, metrics: Metrics, told: list[dict[str, Any]]) -> Agent:
    """One as the agent's process has it."""
    budget = MemoryBudget(100 * 2**20)
    api = Api(config, world.repository, OneCaller(config, CALLER), budget, metrics)
    return Agent(config, world.repository, api.endpoints(), budget, metrics, told.append)


async def flap(links: list[Link], chance: random.Random) -> Counter[str]:
    """Good times and bad times until the hours are over; how often what happened, to all links at once."""
    loop = asyncio.get_running_loop()
    end = loop.time() + HOURS * 3600
    happened: Counter[str] = Counter()
    for trouble in itertools.cycle(TROUBLES):
        await asyncio.sleep(chance.expovariate(1 / UP_S))
        if loop.time() >= end:
            return happened
        begin, over = {
            "refused": (Link.refuse, Link.accept),
            "frozen": (Link.freeze, Link.thaw),
            "reset": (Link.reset, lambda link: None),
        }[trouble]
        for link in links:
            await asyncio.to_thread(begin, link)
        await asyncio.sleep(chance.expovariate(1 / DOWN_S))
        for link in links:
            await asyncio.to_thread(over, link)
        happened[trouble] += 1
    raise AssertionError("it goes round for ever")


class Caller:
    """Asks the centre at random times, each item another question; remembers every answer."""

    def __init__(self, centre: RunningCentre) -> None:
        credentials = grpc.ssl_channel_credentials(centre.pki.ca.read_bytes())
        self._channel = grpc.aio.secure_channel(f"localhost:{centre.port}", credentials)
        self._ask = self._channel.unary_unary(
            "/clarifai.api.V2/PostModelOutputs",
            request_serializer=service_pb2.PostModelOutputsRequest.SerializeToString,
            response_deserializer=service_pb2.MultiOutputResponse.FromString,
        )
        self.asked = 0
        self.answers: dict[int, list[str]] = {}

    async def ask(self, number: int) -> None:
        """One item; its answer must be its own."""
        self.asked += 1
        found = self.answers.setdefault(number, [])
        try:
            reply = await self._ask(row(MODEL, float(number), 0.0, 1.0), metadata=(("authorization", f"Key {PAT}"),))
        except grpc.aio.AioRpcError as error:
            found.append(f"{error.code().name}: {error.details()}")
            return
        if reply.status.code != status_code_pb2.SUCCESS:
            found.append(f"{reply.status.code}: {reply.status.details}")
            return
        (output,) = reply.outputs
        (value, *_) = np.frombuffer(output.data.ndarray.buffer, np.float32)
        found.append("right" if value == number else f"{value} instead of {number}")

    async def keep_asking(self, chance: random.Random) -> None:
        """Until it is cancelled; what was asked is waited for all the same."""
        async with asyncio.TaskGroup() as group:
            try:
                for number in range(1_000_000):
                    await asyncio.sleep(chance.expovariate(1 / ITEM_S))
                    group.create_task(self.ask(number))
            except asyncio.CancelledError:
                asyncio.current_task().uncancel()  # type: ignore[union-attr]

    async def close(self) -> None:
        """No more."""
        await self._channel.close()


def test_a_flapping_link_loses_no_item_answers_none_twice_and_usage_is_complete(
    make_centre: Callable[..., RunningCentre],
    tmp_path: Path,
    pki: Pki,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every question has one answer, its own; who asks while the link is down waits. What ran is reported, once."""
    centre = make_centre(patience_s=300.0, queue_s=600.0)
    chance = random.Random(SEED)
    clocked = partial(Backoff, lambda: asyncio.get_running_loop().time(), random.Random(SEED + 1).uniform)
    monkeypatch.setattr(agents, "Backoff", clocked)
    monkeypatch.setattr(work, "Backoff", clocked)
    for module, name in ((work, "_CLOSING_S"), (usage_reports, "_POST_S")):  # the wire's seconds are the world's
        monkeypatch.setattr(module, name, getattr(module, name) * SPEED)
    metrics, told = Metrics(), list[dict[str, Any]]()

    async def day() -> tuple[Counter[str], Caller]:
        async with Small(tmp_path / "world").opened() as world:
            runner.get_loop().hurry()
            config = enrolled(world, centre, links)
            agent = the_agent(config, world, metrics, told)
            usage = Usage(config, metrics.usage.counted, metrics, asyncio.get_running_loop().time)
            living, counting = asyncio.create_task(agent.run()), asyncio.create_task(usage.run())
            await eventually_async(lambda: told[-1]["connected"], what="it is registered")
            caller = Caller(centre)
            asking = asyncio.create_task(caller.keep_asking(chance))
            happened = await flap(links, chance)
            asking.cancel()
            await asking
            await caller.close()
            await eventually_async(lambda: told[-1]["connected"], what="it is connected again")
            await agent.drain()
            await asyncio.wait({living})
            await eventually_async(lambda: calls_in(receiver.reports()) >= ran(metrics), what="all is reported")
            counting.cancel()
            await asyncio.wait({counting})
            await usage.close()
            return happened, caller

    with (
        Receiver(pki.folder) as receiver,
        Link(centre.port) as to_centre,
        Link(receiver.port) as to_receiver,
        asyncio.Runner(loop_factory=FastLoop) as runner,
    ):
        links = [to_centre, to_receiver]
        happened, caller = runner.run(day())

    wrong = {number: found for number, found in caller.answers.items() if found != ["right"]}
    counts = centre.state()["counts"]
    lost = sum(before["connected"] and not after["connected"] for before, after in itertools.pairwise(told))
    posts, reports = len(receiver.posts), receiver.reports()
    note(happened, lost, counts, ran(metrics), posts, reports)
    assert caller.asked > HOURS * 3600 / ITEM_S / 2
    assert wrong == {}
    assert counts["asked"] == counts["answered"] == caller.asked
    assert set(happened) == set(TROUBLES)
    assert lost >= sum(happened.values()) / 3, "the agent met them"
    assert ran(metrics) >= caller.asked, "an item whose answer was cut off ran twice"
    assert calls_in(reports) == ran(metrics)
    assert [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.ERROR] == []


def ran(metrics: Metrics) -> float:
    """Calls that were counted here."""
    return sum(amounts.calls for amounts in metrics.usage.counted().values())


def calls_in(reports: dict[str, Any]) -> float:
    """Calls that these reports tell of."""
    return sum(record["calls"] for report in reports.values() for record in report["records"])


def note(
    happened: Counter[str], lost: int, counts: dict[str, int], calls: float, posts: int, reports: dict[str, Any]
) -> None:
    """What it was, for docs/fleet.md: written there with UPDATE_DOCS=1 where it was a day."""
    head = ["hours", *TROUBLES, "lost the orchestrator", "items", "handed out again", "answered once"]
    head += ["calls that ran", "calls reported", "posts", "of reports"]
    row = [HOURS, *(happened[each] for each in TROUBLES), lost, counts["asked"], counts.get("handed out again", 0)]
    row += [counts["answered"], calls, calls_in(reports), posts, len(reports)]
    if os.environ.get("UPDATE_DOCS") == "1" and HOURS >= 24:
        text = table(head, [[f"{value:g}" for value in row]])
        PAGE.write_text(between_markers(PAGE.read_text("utf-8"), "the flapping link", text), "utf-8")
