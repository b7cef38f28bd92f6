"""Who writes the audit log: the daemon's own process, once a second, in a thread.

Fronts tell what calls there were (`api/trail`); admin actions are recorded where they are done. What is lost with a
process that is killed: the last second, and of uses the running minute, whose first of each kind is written at once.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from appliance.api.keys import KeyEntry
from appliance.api.trail import Told, Trail, Use
from appliance.catalog.view import View
from appliance.core.audit import Event, Writer, now
from appliance.core.config import Config
from appliance.core.errors import ConfigError, DiskFull
from appliance.core.files import file_error
from appliance.core.ledger import OTHER
from appliance.core.machine import space
from appliance.core.metrics import Metrics
from appliance.daemon.checks import FULL_BYTES

_log = logging.getLogger(__name__)

_EVENTS = 10_000
"""Records that wait while they cannot be written; more are lost, and counted."""

_USES = 50_000
"""Uses of a minute that are counted by themselves, and first uses that are remembered."""

_LOOK_S = 1.0
_MINUTE_S = 60.0
_HEAD_S = 3600.0
"""Seconds between two heads in the log."""

_JUMP_S = 2.0
"""Seconds that the machine's clock may gain or lose between two looks before that is a record of its own."""


class Auditor:
    """Collects records, and has them written. Called on the event loop's thread."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        """Touch no file yet."""
        settings = config.audit
        self._settings = settings
        self._metrics = metrics
        self._writer: Writer | None = None
        if settings.mode != "off":
            self._writer = Writer(config.audit_folder, settings.file_size, settings.files)
        self._events: deque[Event] = deque()
        self._lost = 0
        self._uses: dict[Use, int] = {}
        self._known: set[Use] = set()
        self._keys: dict[str, str] = {}
        self._models: dict[tuple[str, str], dict[str, str]] = {}
        self._since = (now(), time.monotonic())
        self._head_at = -math.inf
        self._clock = time.time() - time.monotonic()
        self._trails: list[Trail] = []
        self._task: asyncio.Task[None] | None = None
        self._end = asyncio.Event()
        self.problem = ""
        """Why nothing can be written now; "" while it can."""
        self.changed: Callable[[], None] = lambda: None
        """Called when there is a problem, and when there is none any more."""

    @property
    def refuses(self) -> bool:
        """Whether calls must be refused, as they could not be recorded."""
        return bool(self.problem) and self._settings.mode == "required"

    # ---- what is recorded ----

    def record(self, event: str, **fields: Any) -> None:
        """Something happened now."""
        if self._writer is None:
            return
        if len(self._events) >= _EVENTS:
            self._lost += 1
            self._metrics.audit_lost.inc()
            return
        self._events.append({"time": now(), "event": event, **fields})

    def watch(self, trail: Trail) -> None:
        """Take what it has before each write."""
        self._trails.append(trail)

    def take(self, told: Told) -> None:
        """A front tells what calls there were; see `Trail.take`."""
        if self._writer is None:
            return
        for *use, count in told["uses"]:
            self._count(Use(*use), count)
        for use, place in told["first"]:
            self._note_first(Use(*use), place)
        for use, place in told["refused"]:
            self.record("refused", **Use(*use)._asdict(), **place)
        if told["left_out"]:
            self.record("refused", count=told["left_out"], why="These came too fast to be written one by one.")

    def note_keys(self, keys: Iterable[KeyEntry]) -> None:
        """Record which ones came or went. Args: keys: those that are valid now."""
        before, self._keys = self._keys, _principals(keys)
        for change, one, other in (("added", self._keys, before), ("removed", before, self._keys)):
            for key_id in one.keys() - other.keys():
                self.record("key", change=change, id=key_id, principal=one[key_id])

    def note_models(self, catalog: View[Any]) -> None:
        """Record which versions are served from now on, or no more, and which files they are."""
        before = self._models
        self._models = {
            (str(bundle.key), version.id): dict(version.checksums)
            for bundle in catalog.bundles
            for version in bundle.versions.values()
            if version.servable is not None
        }
        for (model, version), files in self._models.items():
            if before.get((model, version)) != files:
                self.record("model", change="served", model=model, version=version, sha256=files)
        for model, version in before.keys() - self._models.keys():
            self.record("model", change="withdrawn", model=model, version=version)

    def _count(self, use: Use, count: int) -> None:
        if use not in self._uses and len(self._uses) >= _USES:
            use = Use(OTHER, "", "", "", use.code)
        self._uses[use] = self._uses.get(use, 0) + count

    def _note_first(self, use: Use, place: Mapping[str, str]) -> None:
        """Of all fronts, one is the first."""
        if use not in self._known and len(self._known) < _USES:
            self._known.add(use)
            self.record("first", **use._asdict(), **place)

    # ---- writing ----

    async def open(self, version: str, settings: str, keys: Iterable[KeyEntry]) -> None:
        """Find where the log ends, and write that the daemon has started.

        Args:   version: of the appliance. settings: a digest of the configuration. keys: those that are valid now.
        Raises: ConfigError: it can never be written as things are. A full disk may be mended while we serve.
        """
        if self._writer is None:
            return
        try:
            await asyncio.to_thread(self._writer.open)
        except OSError as error:
            remedy = "mend its permissions, or set audit.folder"
            sentence = f"audit.folder {self._writer.folder} cannot be used: {error.strerror}; {remedy}."
            found = file_error(error, sentence)
            if not isinstance(found, DiskFull):
                raise found from error
        self._keys = _principals(keys)
        self.record("started", appliance=version, settings=settings, keys=self._keys, **self._writer.found)
        await self._write(self._writer)
        self._task = asyncio.create_task(self._run(self._writer))

    async def close(self) -> None:
        """Write the last of it; idempotent."""
        writer, task = self._writer, self._task
        if writer is None or task is None:
            return
        self._task = None
        self._end.set()
        await task
        self._collect()
        self._end_minute()
        self.record("stopped")
        await self._write(writer)
        await asyncio.to_thread(writer.close)
        _log.info("the audit log ends here", extra={"seq": writer.head.seq, "hash": writer.head.hash})

    async def _run(self, writer: Writer) -> None:
        """Write once a second. It is not cancelled: a thread would go on writing."""
        while not self._end.is_set():
            try:
                self._collect()
                self._note_clock()
                if not self.problem and time.monotonic() - self._since[1] >= _MINUTE_S:
                    self._end_minute()
                await self._write(writer)
            except Exception:
                # One bad second must not end the log.
                _log.exception("writing the audit log failed unexpectedly")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), _LOOK_S)

    def _collect(self) -> None:
        for trail in self._trails:
            told = trail.take()
            if told is not None:
                self.take(told)

    async def _write(self, writer: Writer) -> None:
        """Write what waits, if it can be; else say so, and leave it for the next time."""
        events, self._events = self._events, deque()
        waiting = len(events)
        problem = await asyncio.to_thread(_written, writer, events)
        self._metrics.audit_records.inc(waiting - len(events))
        self._events.extendleft(reversed(events))
        self._show(problem)
        if not problem:
            self._tell_head(writer)

    def _end_minute(self) -> None:
        """Have the uses counted since the last time written."""
        started, begun = self._since
        seconds = round(time.monotonic() - begun, 1)
        for use, count in self._uses.items():
            self.record("use", since=started, seconds=seconds, **use._asdict(), count=count)
        self._uses = {}
        self._since = (now(), time.monotonic())

    def _note_clock(self) -> None:
        """The times of records are the machine's clock's, which somebody may set."""
        offset = time.time() - time.monotonic()
        if abs(offset - self._clock) > _JUMP_S:
            self.record("clock", jumped_s=round(offset - self._clock, 1))
        self._clock = offset

    def _show(self, problem: str) -> None:
        """Have the metrics, the log and whoever serves know whether it can be written."""
        self._metrics.audit_writable.labels().set(0.0 if problem else 1.0)
        if bool(problem) != bool(self.problem):
            self.problem = problem
            if problem:
                what = "calls are refused" if self.refuses else "calls go on"
                _log.critical("the audit log cannot be written, %s: %s", what, problem)
            else:
                _log.warning("the audit log is written again")
            self.changed()
        self.problem = problem
        if not problem and self._lost:
            lost, self._lost = self._lost, 0
            self.record("lost", count=lost, why="These could not be written, and there was no room to keep them.")

    def _tell_head(self, writer: Writer) -> None:
        """Where the log ends now, for a place that those who can change it cannot reach."""
        if time.monotonic() - self._head_at > _HEAD_S:
            self._head_at = time.monotonic()
            _log.info("the audit log goes on", extra={"seq": writer.head.seq, "hash": writer.head.hash})


def _principals(keys: Iterable[KeyEntry]) -> dict[str, str]:
    """Whose each key is, by the keys' ids."""
    return {entry.id: entry.principal for entry in keys}


def _written(writer: Writer, events: deque[Event]) -> str:
    """Why records cannot be written, "" when they were; those that were are taken out."""
    try:
        writer.write(events)
        found = space(writer.folder)
    except OSError as error:
        return f"{writer.folder}: {error.strerror}"
    except ConfigError as error:
        return str(error)
    if found.free < FULL_BYTES or not found.more_files:
        return f"{writer.folder}: there is no space left"
    return ""
