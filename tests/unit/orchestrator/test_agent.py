"""The agent between what others do meanwhile: who leaves has left, and who stops says nothing more."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.catalog.view import Mirror
from appliance.core.config import Catalog, Config, Orchestrator
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.orchestrator import agent as agents
from appliance.orchestrator.agent import Agent
from appliance.orchestrator.backoff import Backoff
from appliance.orchestrator.central import CentralError
from appliance.orchestrator.created import registering
from appliance.orchestrator.reconcile import Registered

PATIENCE_S = 10.0


class Centre:
    """Instead of reconciliation and reports: what was done, in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.reconciling = asyncio.Event()
        self.may_end = asyncio.Event()
        self.problems: list[str] = []
        """What goes wrong next, one after the other."""

    async def reconcile(self, *_: Any, **__: Any) -> Registered:
        self.reconciling.set()
        if self.problems:
            raise CentralError(self.problems.pop())
        await self.may_end.wait()
        self.done.append("registered")
        return Registered()


@pytest.fixture
def centre(monkeypatch: pytest.MonkeyPatch) -> Centre:
    made = Centre()
    monkeypatch.setattr(agents, "reconcile", made.reconcile)
    monkeypatch.setattr(agents, "_LOOK_S", 0.01)
    monkeypatch.setattr(agents, "Backoff", lambda: Backoff(uniform=lambda low, high: low))
    return made


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def agent(tmp_path: Path, centre: Centre, told: list[dict[str, Any]]) -> Agent:
    pat_file = tmp_path / "orchestrator.pat"
    pat_file.write_text("a-token")
    orchestrator = Orchestrator(api_base="https://localhost:9", user_id="acme", pat_file=pat_file)
    config = Config(orchestrator=orchestrator, catalog=Catalog(state_dir=tmp_path))
    return Agent(config, Mirror(), {}, MemoryBudget(1000), Metrics(), told.append)


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)


async def test_who_leaves_while_the_agent_waits_has_left(
    tmp_path: Path, centre: Centre, agent: Agent, told: list[dict[str, Any]]
) -> None:
    """`leave` deletes what is there, and then the PAT: the agent, which had read it before, registers nothing again."""
    centre.may_end.set()
    with registering(tmp_path):
        life = asyncio.create_task(agent.run())
        await until(lambda: agent._central is not None)
        (tmp_path / "orchestrator.pat").unlink()
    await until(lambda: centre.done or "orchestrator.pat" in told[-1]["problem"])
    assert centre.done == []
    life.cancel()


async def test_who_stops_registers_nothing_more(centre: Centre, agent: Agent) -> None:
    """The last word about the nodepool is that it stops, whatever was under way."""
    life = asyncio.create_task(agent.run())
    async with asyncio.timeout(PATIENCE_S):
        await centre.reconciling.wait()
        await agent.drain()
        centre.may_end.set()
        await asyncio.wait({life})
    assert centre.done == []


async def test_a_link_that_is_down_for_weeks_is_no_flood_of_warnings(
    centre: Centre, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    """Each attempt may fail in another way than the last one, and in the same ways again and again."""
    centre.problems = ["by IPv4", "by IPv6", "a stream"] * 20
    life = asyncio.create_task(agent.run())
    await until(lambda: not centre.problems)
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 3
    life.cancel()
