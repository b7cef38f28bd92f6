"""The process of the agent: a front whose only caller is the orchestrator; models run in the engines' processes.

What strangers send there is parsed and decoded here, never in the supervisor.
"""

import asyncio
import socket

from appliance.api.auth import OneCaller
from appliance.api.service import Api
from appliance.core import config as configuration
from appliance.core import logs
from appliance.core.channel import Body
from appliance.core.config import Config
from appliance.core.memory import MemoryBudget
from appliance.daemon import child
from appliance.daemon.answering import Answering
from appliance.daemon.checks import check_urls, memory_for_requests
from appliance.orchestrator.agent import CALLER, Agent

_LAST_WORDS_S = 2.0
"""Seconds in which the last items must have been given back."""


class AgentProcess(Answering):
    """Answers the orchestrator."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._agent: Agent | None = None

    def _open(self) -> None:
        config = self._config
        self._budget = MemoryBudget(memory_for_requests(config), self._limits.memory())
        caller = OneCaller(config, CALLER, limits=self._limits)
        self._api = Api(config, self._catalog, caller, self._budget, self._metrics, self._workflows)

    def _take_catalog(self, body: Body, descriptors: list[int]) -> None:
        super()._take_catalog(body, descriptors)
        self._api.catalog_changed()
        if self._agent is not None:
            self._agent.catalog_changed()

    async def _listen(self, body: Body, descriptors: list[int]) -> Body:
        """Begin to register, and to take work."""
        self._agent = Agent(
            self._config,
            self._catalog,
            self._api.endpoints(),
            self._budget,
            self._metrics,
            lambda state: self._channel.tell("orchestrator", state),
        )
        self._tasks.append(asyncio.create_task(self._agent.run()))
        return {}

    async def _configure(self, body: Body, descriptors: list[int]) -> None:
        """Take over a configuration in which the orchestrator and our place are the same. Raises: ConfigError."""
        config: Config = configuration.of_data(body["config"])
        check_urls(config)
        self._config = config
        self._api.configure(config)
        self._budget.limit = memory_for_requests(config)
        if self._agent is not None:
            self._agent.configure(config)
        self._workflows.settings = config.catalog
        self._workflows.wake()
        logs.limit(config.log.rate)
        self._metrics.sample()

    async def _drain(self, body: Body, descriptors: list[int]) -> None:
        """See `Agent.drain`; what is not done by `shutdown.drain_s`, or when nothing is waited for, is told to be tried
        elsewhere."""
        if self._agent is None:
            return
        drained = asyncio.ensure_future(self._agent.drain())
        hurry = asyncio.ensure_future(self._now.wait())
        await asyncio.wait({drained, hurry}, timeout=self._config.shutdown.drain_s, return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            self._api.end()
            await asyncio.wait({drained}, timeout=_LAST_WORDS_S)
        self._tell_calls()
        await self._api.tracing.close()
        self._metrics.sample()


def main() -> None:
    """The process's life."""
    child.return_large_blocks()
    child.run("agent", AgentProcess)


if __name__ == "__main__":
    main()
