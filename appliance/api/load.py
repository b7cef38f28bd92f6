"""How busy we are, as balancers read it in the trailers of calls: ORCA load reports.

Source: xds.data.orca.v3.OrcaLoadReport (github.com/cncf/xds), gRPC proposal A51, "Custom Backend Metrics".
"""

import asyncio
import logging
import struct
import time
from base64 import b64encode
from collections.abc import Callable

from appliance.api.varints import varint
from appliance.core.machine import Usage
from appliance.core.memory import MemoryBudget
from appliance.engine import gpu

_log = logging.getLogger(__name__)

_EVERY_S = 1.0

_CPU, _MEMORY, _RATE, _APPLICATION = (varint(number << 3 | 1) for number in (1, 2, 6, 9))
"""cpu_utilization, mem_utilization, rps_fractional, application_utilization; all of them doubles."""


def encoded(cpu: float, memory: float, rate: float, application: float) -> bytes:
    """An OrcaLoadReport. Args: rate: calls a second; all others: parts of what there is, 0 to 1."""
    fields = ((_CPU, cpu), (_MEMORY, memory), (_RATE, rate), (_APPLICATION, application))
    return b"".join(key + struct.pack("<d", value) for key, value in fields)


class Load:
    """Measures how busy we are. Used from the event loop's thread."""

    def __init__(self, budget: MemoryBudget, answered: Callable[[], float], *, gpus: bool) -> None:
        """Args:

        answered: calls that have ended since the start, at all fronts: a balancer compares machines.
        gpus: whether there may be any that are ours.
        """
        self._budget, self._answered, self._gpus = budget, answered, gpus
        self._usage = Usage()
        self._before = (time.monotonic(), answered())

    async def measure(self, tell: Callable[[bytes], None]) -> None:
        """Tell a report in base64, now and every second, for ever."""
        while True:
            try:
                tell(b64encode(await self._report()))
            except Exception:
                # Without a report a balancer goes on as if there were no such thing; we must not fail for it.
                _log.exception("the load could not be measured")
                tell(b"")
            await asyncio.sleep(_EVERY_S)

    async def _report(self) -> bytes:
        usage = self._usage
        cpu, memory = usage.cpus() / usage.all_cpus, usage.memory() / usage.all_memory
        busiest = await asyncio.to_thread(_busiest_gpu) if self._gpus else 0.0
        # What is fullest decides how much more can come.
        application = max(cpu, busiest, self._budget.taken / self._budget.limit)
        return encoded(cpu, memory, self._rate(), application)

    def _rate(self) -> float:
        now, answered = time.monotonic(), self._answered()
        (before, known), self._before = self._before, (now, answered)
        # A front that died takes its count along.
        return max(0.0, answered - known) / (now - before) if now > before else 0.0


def _busiest_gpu() -> float:
    return max((reading.utilization or 0.0 for reading in gpu.readings()), default=0.0)
