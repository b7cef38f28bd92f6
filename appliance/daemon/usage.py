"""Keeps what callers used: reads what all processes counted every few seconds, and writes what is new to the disk.

What was counted and not written is in memory. A kill of the whole daemon costs that, some seconds' worth; the end of a
child does not, nor a full disk, which is tried again for ever.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping

from appliance.core.config import Config
from appliance.core.errors import ConfigError
from appliance.core.metrics import Metrics
from appliance.core.usage import CALLS, Amounts, UsageKey
from appliance.orchestrator.usage_reports import Reporter
from appliance.orchestrator.usage_store import FILE, Period, Place, UsageStore, added

_log = logging.getLogger(__name__)

_WRITE_S = 10.0
"""Seconds between two looks at what was counted: what a kill may cost."""


class Usage:
    """Writes and reports. Used from the event loop's thread; the disk is a thread's business."""

    def __init__(
        self,
        config: Config,
        counted: Callable[[], Mapping[UsageKey, Amounts]],
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args: counted: sums since the daemon began, on any thread. clock: Unix time, which may jump."""
        self._counted, self._metrics, self._clock = counted, metrics, clock
        self._store = UsageStore(config.catalog.state_dir / FILE)
        self._reporter = Reporter(config, self._store, self.write, metrics)
        self._taken: dict[UsageKey, Amounts] = {}
        self._pending: dict[Place, Amounts] = {}
        self._lock = threading.Lock()  # a write that was cancelled goes on in its thread
        self._fails = False
        for result in ("ok", "failed"):
            metrics.usage_writes.labels(result)

    def configure(self, config: Config) -> None:
        """Take over a new configuration."""
        self._reporter.configure(config)

    async def run(self) -> None:
        """Write and report for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_writing())
            group.create_task(self._reporter.run())

    async def write(self) -> None:
        """Have on the disk what was counted until now, if it can be written."""
        problem = await asyncio.to_thread(self._write)
        self._metrics.usage_writes.labels("ok" if problem is None else "failed").inc()
        if problem is not None and not self._fails:
            _log.error("usage cannot be written, and is kept in memory until it can: %s", problem)
        elif problem is None and self._fails:
            _log.info("usage is written again")
        self._fails = problem is not None

    async def close(self) -> None:
        """Write the last of it, and close the file."""
        await self.write()
        lost = sum(amounts[CALLS] for amounts in self._pending.values())
        if lost:
            _log.critical("usage was lost: it could not be written before the end", extra={"calls": int(lost)})
        await asyncio.to_thread(self._store.close)

    async def _keep_writing(self) -> None:
        while True:
            try:
                await self.write()
            except Exception:
                # Whatever it is, it must not end the writing.
                _log.exception("usage could not be written")
            await asyncio.sleep(_WRITE_S)

    def _write(self) -> ConfigError | None:
        """Write what is new, with what could not be written before. Returns: why it could not be."""
        with self._lock:
            self._take()
            try:
                self._store.add(self._pending)
                self._pending = {}
                self._store.compact()
            except ConfigError as error:
                # Days, so that it stays small for as long as this may take.
                days = ((_day(place), amounts) for place, amounts in self._pending.items())
                self._pending = added(days)
                return error
        return None

    def _take(self) -> None:
        """Put what was counted since the last time into the minute it is now."""
        start = Period.MINUTE.start(self._clock())
        for key, amounts in self._counted().items():
            before = self._taken.get(key, Amounts())
            if amounts != before:
                place = Place(Period.MINUTE, start, key)
                new = Amounts(*(now - then for now, then in zip(amounts, before, strict=True)))
                self._pending[place] = self._pending.get(place, Amounts()).plus(new)
                self._taken[key] = amounts


def _day(place: Place) -> Place:
    return Place(Period.DAY, Period.DAY.start(place.start), place.key)
