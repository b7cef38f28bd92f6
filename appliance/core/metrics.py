"""What is counted. One set a process; names, labels and units are fixed here and nowhere else.

Labels come only from configuration and fixed tables (model, version, method, code, reason): a caller cannot make new
series by inventing names, and `[metrics] series` bounds what a catalog that changes all the time can make. What is here
is an interface (`VERSION`): docs/metrics.md is made of it (`appliance metrics`), and a test holds the two together.

All of it is kept in plain numbers, and written as text when it is scraped (`exposition`): prometheus-client's own
objects take a lock and several calls for each number, which is a tenth of a small model's call. What is written comes
out as from its own objects; tests compare the two. A child process counts in a segment (`ledger`), which the supervisor
adds up (`fold`).
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client import metrics as client
from prometheus_client.core import Exemplar, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from appliance.core.config import Metrics as Settings
from appliance.core.exposition import Lines, page
from appliance.core.ledger import NOTE, OTHER, Cells, Ledger, Note, read_note, write_note
from appliance.core.shared import Segment
from appliance.core.usage import UsageCounts

_log = logging.getLogger(__name__)

VERSION = "1.1"
"""Of the interface: the first number grows when something that was there changes its name, type, labels or meaning, or
goes; the second when something is added."""

PREFIX = "inference_appliance"
BUILD_TEXT = "Version of the appliance, of onnxruntime, and of these metrics as an interface."
_SECONDS = (
    0.00001,
    0.000025,
    0.00005,
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
)
"""From a part of a model's run of 50 µs to one of a minute."""

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

COUNTER, HISTOGRAM, GAUGE = "counter", "histogram", "gauge"

_GONE = float("nan")
"""What the cell of a gauge holds that has no sample."""

_NOTE_S = 0.1
"""Seconds in which one request at most is noted for a bucket: a note costs more than all the rest of an observation."""

Notes: TypeAlias = "bytearray | memoryview[int]"


class Counted(NamedTuple):
    """One series: when it was made, in Unix time, its cells, and what is noted of them."""

    created: float
    cells: list[float]
    notes: Mapping[int, Note]


_Sample: TypeAlias = tuple[str, dict[str, str], float, int | None]
"""Suffix of the name, labels beside the series' own, value, and the cell whose note goes with it."""


class Series(Protocol):
    """`Tally`, `Spread` or `Level`."""

    cells: Cells
    notes: Notes
    created: float


class Tally:
    """One series of a counter. One cell: the count. Written by the event loop's thread only."""

    __slots__ = ("cells", "created", "notes")

    def __init__(self, cells: Cells, notes: Notes, created: float) -> None:
        self.cells = cells
        self.notes = notes
        self.created = created

    def inc(self, amount: float = 1.0) -> None:
        """So many more."""
        self.cells[0] += amount

    def inc_for(self, request: str) -> None:
        """One more, and whose it is. Args: request: its id; see `Note`."""
        self.cells[0] += 1.0
        write_note(self.notes, 0, 1.0, request)


class Spread:
    """One series of a histogram. Cells: each bucket's count, and the sum. Written by the event loop's thread only."""

    __slots__ = ("_bounds", "_due", "_last", "cells", "created", "notes")

    def __init__(self, cells: Cells, notes: Notes, created: float, bounds: tuple[float, ...]) -> None:
        """Args: bounds: the upper ones of the buckets, included, ascending; one more bucket takes what is above."""
        self._bounds = bounds
        self._last = len(cells) - 1
        self._due = [0.0] * (len(notes) // NOTE.size)
        self.cells = cells
        self.notes = notes
        self.created = created

    def observe(self, value: float) -> None:
        """One more value."""
        cells = self.cells
        # Floats and no negative index: the interpreter has short cuts for these.
        cells[bisect_left(self._bounds, value)] += 1.0
        cells[self._last] += value

    def observe_for(self, value: float, now: float, request: str) -> None:
        """One more value, and whose it is. Args: now: `time.monotonic()` seconds. request: its id; see `Note`."""
        cells = self.cells
        bucket = bisect_left(self._bounds, value)
        cells[bucket] += 1.0
        cells[self._last] += value
        if now >= self._due[bucket]:
            self._due[bucket] = now + _NOTE_S
            write_note(self.notes, bucket, value, request)


class Level:
    """One series of a gauge. One cell: the value; one that is no number has no sample. Written by one thread only."""

    __slots__ = ("cells", "created", "notes", "read")

    def __init__(self, cells: Cells, notes: Notes, created: float) -> None:
        self.cells = cells
        self.notes = notes
        self.created = created
        self.read: Callable[[], float] | None = None
        """Where the value comes from, if it is watched."""

    def set(self, value: float) -> None:
        """It is so much now."""
        self.cells[0] = value

    def sample(self) -> None:
        """Have the cell hold what is watched."""
        if self.read is not None:
            self.cells[0] = self.read()


S = TypeVar("S", bound=Series)


class Family(Collector, Generic[S]):
    """All series of one metric, by their labels' values."""

    def __init__(
        self,
        kind: str,
        name: str,
        text: str,
        labels: tuple[str, ...],
        make: Callable[[Cells, Notes, float], S],
        ledger: Ledger | None,
        *,
        limit: int,
        bounds: tuple[float, ...] = (),
        shared: bool = False,
        noted: bool = False,
        section: str = "",
    ) -> None:
        """Make it.

        Args:
            kind: COUNTER, HISTOGRAM or GAUGE.
            name: without the prefix; a counter's without "_total".
            ledger: where its numbers are; None: in this process alone.
            limit: series it may have; what is counted for more is counted as OTHER, and gauges have no more samples.
            bounds: of a histogram's buckets.
            shared: every process that sets it means the same thing: the largest counts, not the sum.
            noted: the last requests that it counted are shown with it, as exemplars.
            section: of the reference.
        """
        self.kind, self.name, self.label_names, self.shared = kind, name, labels, shared
        self.text, self.bounds, self.noted, self.section = text, bounds, noted, section
        self._full = f"{PREFIX}_{name}"
        self._make, self._ledger, self._limit = make, ledger, limit
        self.width = len(bounds) + 2 if kind == HISTOGRAM else 1
        """Cells of one series."""
        self.note_count = self.width - (kind == HISTOGRAM) if noted else 0
        """Cells of one series that have notes: all but a histogram's sum."""
        self._series: dict[tuple[str, ...], S] = {}
        self._cleared: dict[tuple[str, ...], S] = {}
        self._said_full = False
        self._lines = Lines(kind, self._full, text, labels, bounds)
        self.labels = lru_cache(maxsize=2 * limit)(self._find)
        """One series by its labels' values."""

    def describe(self) -> Iterable[Metric]:
        """The name, for the registry."""
        return [Metric(self._full, self.text, self.kind)]

    def collect(self) -> Iterable[Metric]:
        """What is scraped; on any thread."""
        return [self.exposed(self.counted())]

    def total(self) -> float:
        """What a counter's series have counted in this process, all together."""
        return sum(float(series.cells[0]) for series in tuple(self._series.values()))

    def sample(self) -> None:
        """Have the cells hold what is watched."""
        for series in tuple(self._series.values()):
            if isinstance(series, Level):
                series.sample()

    def counted(self, notes: bool = True) -> dict[tuple[str, ...], Counted]:
        """A copy of all numbers, by the labels' values; what is watched is read. Args: notes: with what is noted."""
        self.sample()
        return {
            key: Counted(series.created, list(series.cells), _read_notes(series.notes) if notes else {})
            for key, series in tuple(self._series.items())
        }

    def exposed(self, counted: dict[tuple[str, ...], Counted]) -> Metric:
        """Those numbers as they are scraped."""
        metric = Metric(self._full, self.text, self.kind)
        samples = {COUNTER: _counter, HISTOGRAM: self._histogram, GAUGE: _gauge}[self.kind]
        for values, (created, cells, notes) in counted.items():
            own = dict(zip(self.label_names, values, strict=True))
            for suffix, more, value, cell in samples(cells):
                note = notes.get(cell) if cell is not None else None
                exemplar = Exemplar(dict([note.label]), note.value, round(note.at, 3)) if note is not None else None
                metric.add_sample(self._full + suffix, own | more, value, exemplar=exemplar)
            if client._use_created and self.kind != GAUGE:  # an environment variable of prometheus-client's decides
                metric.add_sample(f"{self._full}_created", own, created)
        return metric

    def write(self, counted: dict[tuple[str, ...], Counted], opened: bool) -> Iterator[str]:
        """Those numbers as text. Args: opened: as OpenMetrics."""
        return self._lines.write(counted.items(), opened, 2 * self._limit)

    def clear(self: "Family[Level]") -> None:
        """No series has a sample any more, nor is one watched; whoever wants one asks for it anew."""
        self.labels.cache_clear()
        for series in self._series.values():
            series.read = None
            series.set(_GONE)
        self._cleared |= self._series
        self._series.clear()

    def _histogram(self, cells: list[float]) -> Iterator[_Sample]:
        """A bucket counts what the ones before it do, too."""
        total = 0.0
        for cell, bound in enumerate((*self.bounds, float("inf"))):
            total += cells[cell]
            yield "_bucket", {"le": floatToGoString(bound)}, total, cell  # type: ignore[no-untyped-call]
        yield "_count", {}, total, None
        yield "_sum", {}, cells[-1], None

    def _find(self, *values: object) -> S:
        key = tuple(map(str, values))
        if len(key) != len(self.label_names):
            raise ValueError(f"{self._full} has the labels {self.label_names}, not {key}")
        if key not in self._series:
            if len(self._series) >= self._limit:
                return self._one_too_many()
            self._series[key] = self._new(key)
        return self._series[key]

    def _new(self, key: tuple[str, ...]) -> S:
        if key in self._cleared:  # a ledger takes a series once
            series = self._cleared.pop(key)
            series.cells[0] = 0.0
            return series
        created, room = time.time(), None
        if self._ledger is not None:
            room = self._ledger.add(self.name, self.kind, key, created, self.width, self.note_count)
        cells, notes = room or ([0.0] * self.width, bytearray(self.note_count * NOTE.size))
        return self._make(cells, notes, created)

    def _one_too_many(self) -> S:
        """What stands for a series for which there is no room."""
        if not self._said_full:
            self._said_full = True
            _log.warning(
                "%s has %d series, as many as it may (metrics.series); more are counted as %r until a restart",
                self._full,
                self._limit,
                OTHER,
            )
        if self.kind == GAUGE:
            return self._make([_GONE], bytearray(), time.time())
        key = (OTHER,) * len(self.label_names)
        if key not in self._series:
            self._series[key] = self._new(key)
        return self._series[key]


def _read_notes(notes: Notes) -> dict[int, Note]:
    data = bytes(notes)
    found = (
        (place // NOTE.size, read_note(data[place : place + NOTE.size])) for place in range(0, len(data), NOTE.size)
    )
    return {cell: note for cell, note in found if note is not None}


def _counter(cells: list[float]) -> Iterator[_Sample]:
    yield "_total", {}, cells[0], 0


def _gauge(cells: list[float]) -> Iterator[_Sample]:
    if cells[0] == cells[0]:
        yield "", {}, cells[0], None


class Metrics:
    """All metrics of one process, in a registry of its own."""

    def __init__(self, segment: Segment | None = None, settings: Settings | None = None) -> None:
        """Make them.

        Args:
            segment: where the numbers are, for the supervisor to read; None: in this process alone.
            settings: how many series there may be; None for the defaults.
        """
        self._ledger = Ledger(segment) if segment is not None else None
        self.usage = UsageCounts(self._ledger)
        """For usage reports; on no page."""
        self._limit = (settings or Settings()).series
        self.families: dict[str, Family[Any]] = {}
        """By their names without the prefix, in the order in which they are scraped."""
        self.others = CollectorRegistry()
        """What prometheus-client collects by itself: the build, and this process."""
        ProcessCollector(namespace=PREFIX, registry=self.others)
        self.build = Info(f"{PREFIX}_build", BUILD_TEXT, registry=self.others)
        self.registry = CollectorRegistry()
        """All families, as it collects them."""
        model = ("model", "version")
        self._section = "Calls"
        self.requests = self._tallies(
            "requests",
            "Calls that ended, by Clarifai status code; model and version are empty where a call reached none.",
            (*model, "method", "code"),
            noted=True,
        )
        self.rejected = self._tallies(
            "rejected",
            "Calls refused before they reached a model, and inputs of other calls that were refused by themselves.",
            ("reason",),
        )
        self.inputs = self._tallies("inputs", "Inputs answered, by Clarifai status code.", (*model, "code"))
        self.in_flight = self._levels("in_flight_requests", "Calls being worked on.").labels()
        self.lost = self._tallies(
            "requests_lost", "Accepted calls that ended without a result or a status; stays 0."
        ).labels()
        self.principal_requests = self._tallies(
            "principal_requests",
            "Calls that ended, by who called; only with metrics.principals.",
            ("principal", "code"),
        )
        self.principal_inputs = self._tallies(
            "principal_inputs", "Inputs answered, by who called; only with metrics.principals.", ("principal",)
        )
        self._section = "Where a call's time goes"
        self.request_seconds = self._spreads("request_seconds", "From call to reply.", (*model, "method"), noted=True)
        self.decode_seconds = self._spreads("decode_seconds", "Inputs to tensors, one request.", model)
        self.queue_seconds = self._spreads("queue_seconds", "From queue to the run that takes a row.", model)
        self.batch_wait_seconds = self._spreads(
            "batch_wait_seconds",
            "From rows taken for a run to their results, without the run: waiting for the device's turn, putting rows "
            "together and results apart.",
            model,
        )
        self.compute_seconds = self._spreads("compute_seconds", "One run of the model.", model)
        self.encode_seconds = self._spreads(
            "encode_seconds", "From the model's results to the reply, one request.", model
        )
        self.batch_rows = self._spreads("batch_rows", "Rows in one run of the model.", model, _ROWS)
        self.request_rows = self._spreads("request_rows", "Rows that one request brings to the model.", model, _ROWS)
        self.queue_rows = self._levels("queue_rows", "Rows waiting for the model.", model)
        self.traces = self._tallies(
            "traces", "Calls that were traced, by what became of their spans; only with traces.endpoint.", ("outcome",)
        )
        self._section = "Memory, downloads, cache"
        self.memory_in_flight = self._levels("memory_in_flight_bytes", "Bytes that requests hold now.").labels()
        self.memory_limit = self._levels(
            "memory_in_flight_limit_bytes", "Bytes that requests may hold at once.", shared=True
        ).labels()
        self.downloads = self._tallies("downloads", "Inputs by URL, by what became of them.", ("outcome",))
        self.download_bytes = self._tallies("download_bytes", "Bytes that URLs delivered.", ())
        self.downloads_in_flight = self._levels("downloads_in_flight", "Downloads going on now.").labels()
        self.cache_hits = self._tallies("cache_hits", "Inputs answered from the predict cache.", model)
        self.cache_misses = self._tallies("cache_misses", "Inputs that were looked for in it in vain.", model)
        self.cache_evictions = self._tallies("cache_evictions", "Answers taken out of it.", ("reason",))
        self.cache_entries = self._levels("cache_entries", "Answers in it.").labels()
        self.cache_bytes = self._levels("cache_bytes", "Bytes these take.").labels()
        self.cache_limit = self._levels("cache_limit_bytes", "Bytes they may take.").labels()
        self._section = "Connections"
        self.connections = self._levels("connections", "Connections that are open, handshakes included.").labels()
        self.connections_accepted = self._tallies("connections_accepted", "Connections that were established.").labels()
        self.connections_refused = self._tallies(
            "connections_refused", "Connections closed before they were established.", ("reason",)
        )
        self.handshake_seconds = self._spreads(
            "handshake_seconds", "From accept to the end of the TLS handshake."
        ).labels()
        self._section = "Models"
        self.model_state = self._levels(
            "model_state", "1 for the state a version is in.", (*model, "state"), shared=True
        )
        self.model_info = self._levels(
            "model_info",
            "Always 1: what a version that is loaded is.",
            (*model, "task", "sha256", "providers"),
            shared=True,
        )
        self.model_load_seconds = self._levels("model_load_seconds", "How long the last load took.", model, shared=True)
        self.model_loads = self._tallies("model_loads", "Loads of a version that ended.", (*model, "result"))
        self.swaps = self._tallies("model_swaps", "Versions that replaced a running one.", ("model",))
        self.catalog_versions = self._levels(
            "catalog_versions", "Versions in the catalog, by state.", ("state",), shared=True
        )
        self.catalog_unreadable = self._levels(
            "catalog_unreadable_bundles", "Bundles that cannot be read.", shared=True
        ).labels()
        self._section = "Processes and devices"
        self.worker_up = self._levels(
            "worker_up", "Whether a process of ours is at work: 1 or 0.", ("process",), shared=True
        )
        self.worker_restarts = self._tallies(
            "worker_restarts", "Processes that ended and were replaced.", ("process", "reason")
        )
        self.worker_memory = self._levels(
            "worker_resident_memory_bytes",
            "Memory that a process of ours has resident; pages that several share count in each.",
            ("process",),
            shared=True,
        )
        self.worker_cpu = self._tallies(
            "worker_cpu_seconds", "CPU time that a process of ours took, with those whose place it took.", ("process",)
        )
        gpu = ("device", "uuid")
        self.gpu_utilization = self._levels(
            "gpu_utilization_ratio", "Part of the last moment in which the GPU computed, 0 to 1.", gpu, shared=True
        )
        self.gpu_memory_used = self._levels("gpu_memory_used_bytes", "GPU memory in use, by anybody.", gpu, shared=True)
        self.gpu_memory_total = self._levels("gpu_memory_total_bytes", "GPU memory there is.", gpu, shared=True)
        self.gpu_temperature = self._levels("gpu_temperature_celsius", "The GPU's temperature.", gpu, shared=True)
        self.gpu_power = self._levels("gpu_power_watts", "What the GPU draws.", gpu, shared=True)
        self.gpu_clock = self._levels("gpu_sm_clock_hertz", "Clock of the GPU's processors.", gpu, shared=True)
        self.gpu_model_memory = self._levels(
            "gpu_model_memory_bytes",
            "GPU memory that a version takes, as measured at its last undisturbed load.",
            (*model, "uuid"),
            shared=True,
        )
        self._section = "Configuration, keys, certificates"
        self.reloads = self._tallies("config_reloads", "Reloads of the configuration.", ("result",))
        self.keys = self._levels("keys", "Keys that are valid now.", shared=True).labels()
        self.certificate_reloads = self._tallies(
            "certificate_reloads", "Changed certificate files that were taken over, or not.", ("result",)
        )
        self.certificate_expiry = self._levels(
            "certificate_expiry_timestamp_seconds",
            "When a certificate ends, Unix time; days left: (this - time()) / 86400.",
            ("role",),
            shared=True,
        )
        self.crl_next_update = self._levels(
            "crl_next_update_seconds",
            "When a revocation list is due for replacement, Unix time.",
            ("issuer",),
            shared=True,
        )
        self._section = "Orchestrator"
        self.orchestrator_connected = self._levels(
            "orchestrator_connected",
            "Whether it answers, and what is registered there is right: 1 or 0; only where the agent runs.",
            ("api_base",),
        )
        self.orchestrator_silence = self._levels(
            "orchestrator_heartbeat_age_seconds", "Since it last answered, or since the agent began.", ("api_base",)
        )
        self.orchestrator_streams = self._levels(
            "orchestrator_streams", "Streams that wait for work, or have some (busy).", ("state",)
        )
        self.orchestrator_items = self._tallies(
            "orchestrator_items", "Items of work taken, by what became of them.", (*model, "outcome")
        )
        self.orchestrator_registrations = self._tallies(
            "orchestrator_registrations", "How often what is registered was compared, and mended.", ("result",)
        )
        self._section = "Audit log"
        self.audit_writable = self._levels(
            "audit_writable", "1 while the audit log can be written, else 0; none where it is off.", shared=True
        )
        self.audit_records = self._tallies("audit_records", "Records that were written to it.").labels()
        self.audit_lost = self._tallies(
            "audit_lost_records", "Records that could not be written, and for which there was no room to wait."
        ).labels()
        self._section = "The machine"
        self.disk_free = self._levels(
            "disk_free_bytes", "Free space where a folder of ours lies.", ("folder",), shared=True
        )
        self.disk_size = self._levels(
            "disk_size_bytes", "Size of the file system where it lies.", ("folder",), shared=True
        )
        self.usage_writes = self._tallies("usage_writes", "Attempts to write usage to the disk.", ("result",))
        self.usage_reports = self._tallies(
            "usage_reports", "Attempts to post a usage report to orchestrator.usage_url.", ("result",)
        )
        self.usage_unreported = self._levels(
            "usage_unreported_records",
            "Records of usage that its receiver does not have yet; only with orchestrator.usage_url.",
            shared=True,
        )
        self.clock = self._levels("clock_seconds", "The machine's clock, Unix time.", shared=True).labels()

    def run_counter(self, model: str, version: str) -> Callable[[float, float, float, float], None]:
        """What counts a run of a version: called with its rows, and seconds of compute, batch wait and queue.

        A tiny model has a run for every call, of one row that waited for nobody: in one step, and without a search for
        what is known, the four observations cost a third less.
        """
        compute, wait = self.compute_seconds.labels(model, version), self.batch_wait_seconds.labels(model, version)
        queue, size = self.queue_seconds.labels(model, version), self.batch_rows.labels(model, version)
        computes, waits, queues, sizes = compute.cells, wait.cells, queue.cells, size.cells
        last, last_size = len(computes) - 1, len(sizes) - 1

        def count(rows: float, seconds: float, batch_wait: float, queued: float) -> None:
            computes[bisect_left(_SECONDS, seconds)] += 1.0
            computes[last] += seconds
            if batch_wait:
                waits[bisect_left(_SECONDS, batch_wait)] += 1.0
                waits[last] += batch_wait
            else:
                waits[0] += 1.0
            queues[bisect_left(_SECONDS, queued)] += 1.0
            queues[last] += queued
            sizes[bisect_left(_ROWS, rows) if rows > 1 else 0] += 1.0
            sizes[last_size] += rows

        return count

    def watch(self, gauge: Level, read: Callable[[], float]) -> None:
        """Let `gauge` have the value that `read` gives: when it is scraped here, and at each `sample`."""
        gauge.read = read

    def sample(self) -> None:
        """Have all that is watched written down, for the supervisor to read; a child calls it again and again."""
        for family in self.families.values():
            family.sample()

    def counted(self, *names: str, notes: bool = False) -> dict[str, dict[tuple[str, ...], Counted]]:
        """The numbers of some families, by their names. Args: notes: with what is noted of them, which takes longer."""
        return {name: self.families[name].counted(notes) for name in names}

    def page(self, opened: bool) -> bytes:
        """What is scraped. Args: opened: as OpenMetrics."""
        shown = [(family, family.counted()) for family in self.families.values()]
        return page(self.others, (line for family, counted in shown for line in family.write(counted, opened)), opened)

    def _tallies(self, name: str, text: str, labels: tuple[str, ...] = (), *, noted: bool = False) -> Family[Tally]:
        return self._add(COUNTER, name, text, labels, Tally, noted=noted)

    def _spreads(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...] = (),
        bounds: tuple[float, ...] = _SECONDS,
        *,
        noted: bool = False,
    ) -> Family[Spread]:
        def make(cells: Cells, notes: Notes, created: float) -> Spread:
            return Spread(cells, notes, created, bounds)

        return self._add(HISTOGRAM, name, text, labels, make, bounds=bounds, noted=noted)

    def _levels(self, name: str, text: str, labels: tuple[str, ...] = (), *, shared: bool = False) -> Family[Level]:
        return self._add(GAUGE, name, text, labels, Level, shared=shared)

    def _add(
        self,
        kind: str,
        name: str,
        text: str,
        labels: tuple[str, ...],
        make: Callable[[Cells, Notes, float], S],
        **more: Any,
    ) -> Family[S]:
        family = Family(kind, name, text, labels, make, self._ledger, limit=self._limit, section=self._section, **more)
        self.registry.register(family)
        self.families[family.name] = family
        return family
