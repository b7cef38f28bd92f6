"""What is counted. One set a process; names, labels and units are fixed here and nowhere else.

Labels come only from configuration and fixed tables (model, version, method, code, reason): a caller cannot make new
series by inventing names.

All of it is kept in plain numbers, and made into prometheus-client's samples when it is scraped: its own objects take a
lock and several calls for each number, which is a tenth of a small model's call. What is written comes out as from its
own objects; a test compares the two. A child process counts in a segment (`ledger`), which the supervisor adds up
(`fold`).
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client import metrics as client
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from appliance.core.ledger import Cells, Ledger
from appliance.core.shared import Segment

PREFIX = "inference_appliance"
_SECONDS = (
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
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

COUNTER, HISTOGRAM, GAUGE = "counter", "histogram", "gauge"

_GONE = float("nan")
"""What the cell of a gauge holds that has no sample."""

Counted: TypeAlias = tuple[float, list[float]]
"""One series: when it was made, in Unix time, and its cells."""

_Sample: TypeAlias = tuple[str, dict[str, str], float]
"""Suffix of the name, labels beside the series' own, value."""


class Series(Protocol):
    """`Tally`, `Spread` or `Level`."""

    cells: Cells
    created: float


class Tally:
    """One series of a counter. One cell: the count. Written by the event loop's thread only."""

    __slots__ = ("cells", "created")

    def __init__(self, cells: Cells, created: float) -> None:
        self.cells = cells
        self.created = created

    def inc(self, amount: float = 1.0) -> None:
        """So many more."""
        self.cells[0] += amount


class Spread:
    """One series of a histogram. Cells: each bucket's count, and the sum. Written by the event loop's thread only."""

    __slots__ = ("_bounds", "_last", "cells", "created")

    def __init__(self, cells: Cells, created: float, bounds: tuple[float, ...]) -> None:
        """Args: bounds: the upper ones of the buckets, included, ascending; one more bucket takes what is above."""
        self._bounds = bounds
        self._last = len(cells) - 1
        self.cells = cells
        self.created = created

    def observe(self, value: float) -> None:
        """One more value."""
        cells = self.cells
        # Floats and no negative index: the interpreter has short cuts for these.
        cells[bisect_left(self._bounds, value)] += 1.0
        cells[self._last] += value


class Level:
    """One series of a gauge. One cell: the value; one that is no number has no sample. Written by one thread only."""

    __slots__ = ("cells", "created", "read")

    def __init__(self, cells: Cells, created: float) -> None:
        self.cells = cells
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
        make: Callable[[Cells, float], S],
        ledger: Ledger | None,
        *,
        bounds: tuple[float, ...] = (),
        shared: bool = False,
    ) -> None:
        """Make it.

        Args:
            kind: COUNTER, HISTOGRAM or GAUGE.
            name: without the prefix; a counter's without "_total".
            ledger: where its numbers are; None: in this process alone.
            bounds: of a histogram's buckets.
            shared: every process that sets it means the same thing: the largest counts, not the sum.
        """
        self.kind, self.name, self.label_names, self.shared = kind, name, labels, shared
        self._full, self._text = f"{PREFIX}_{name}", text
        self._make, self._ledger, self._bounds = make, ledger, bounds
        self.width = len(bounds) + 2 if kind == HISTOGRAM else 1
        """Cells of one series."""
        self._series: dict[tuple[str, ...], S] = {}
        self._cleared: dict[tuple[str, ...], S] = {}
        self.labels = lru_cache(maxsize=None)(self._find)
        """One series by its labels' values; no more of them are kept than there are series."""

    def describe(self) -> Iterable[Metric]:
        """The name, for the registry."""
        return [Metric(self._full, self._text, self.kind)]

    def collect(self) -> Iterable[Metric]:
        """What is scraped; on any thread."""
        return [self.exposed(self.counted())]

    def sample(self) -> None:
        """Have the cells hold what is watched."""
        for series in tuple(self._series.values()):
            if isinstance(series, Level):
                series.sample()

    def counted(self) -> dict[tuple[str, ...], Counted]:
        """A copy of all numbers, by the labels' values; what is watched is read."""
        self.sample()
        return {key: (series.created, list(series.cells)) for key, series in tuple(self._series.items())}

    def exposed(self, counted: dict[tuple[str, ...], Counted]) -> Metric:
        """Those numbers as they are scraped."""
        metric = Metric(self._full, self._text, self.kind)
        samples = {COUNTER: _counter, HISTOGRAM: self._histogram, GAUGE: _gauge}[self.kind]
        for values, (created, cells) in counted.items():
            own = dict(zip(self.label_names, values, strict=True))
            for suffix, more, value in samples(cells):
                metric.add_sample(self._full + suffix, own | more, value)
            if client._use_created and self.kind != GAUGE:  # an environment variable of prometheus-client's decides
                metric.add_sample(f"{self._full}_created", own, created)
        return metric

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
        for bound, count in zip((*self._bounds, float("inf")), cells, strict=False):
            total += count
            yield "_bucket", {"le": floatToGoString(bound)}, total  # type: ignore[no-untyped-call]
        yield "_count", {}, total
        yield "_sum", {}, cells[-1]

    def _find(self, *values: object) -> S:
        key = tuple(map(str, values))
        if len(key) != len(self.label_names):
            raise ValueError(f"{self._full} has the labels {self.label_names}, not {key}")
        if key not in self._series:
            self._series[key] = self._new(key)
        return self._series[key]

    def _new(self, key: tuple[str, ...]) -> S:
        if key in self._cleared:  # a ledger takes a series once
            series = self._cleared.pop(key)
            series.cells[0] = 0.0
            return series
        created, cells = time.time(), None
        if self._ledger is not None:
            cells = self._ledger.add(self.name, self.kind, key, created, self.width)
        return self._make(cells if cells is not None else [0.0] * self.width, created)


def _counter(cells: list[float]) -> Iterator[_Sample]:
    yield "_total", {}, cells[0]


def _gauge(cells: list[float]) -> Iterator[_Sample]:
    if cells[0] == cells[0]:
        yield "", {}, cells[0]


class Metrics:
    """All metrics of one process, in a registry of its own."""

    def __init__(self, segment: Segment | None = None) -> None:
        """Args: segment: where the numbers are, for the supervisor to read; None: in this process alone."""
        self._ledger = Ledger(segment) if segment is not None else None
        self.families: dict[str, Family[Any]] = {}
        """By their names without the prefix, in the order in which they are scraped."""
        self.registry = CollectorRegistry()
        ProcessCollector(namespace=PREFIX, registry=self.registry)
        model = ("model", "version")
        self.build = Info(f"{PREFIX}_build", "Version of the appliance.", registry=self.registry)
        self.requests = self._tallies(
            "requests", "Calls answered, by Clarifai status code.", (*model, "method", "code")
        )
        self.rejected = self._tallies("rejected", "Calls refused before they reached a model.", ("reason",))
        self.inputs = self._tallies("inputs", "Inputs answered, by Clarifai status code.", (*model, "code"))
        self.request_seconds = self._spreads("request_seconds", "From call to reply.", ("method",))
        self.decode_seconds = self._spreads("decode_seconds", "Inputs to tensors, one request.", model)
        self.queue_seconds = self._spreads("queue_seconds", "From queue to the run that takes a row.", model)
        self.compute_seconds = self._spreads("compute_seconds", "One run of the model.", model)
        self.batch_rows = self._spreads("batch_rows", "Rows in one run of the model.", model, _ROWS)
        self.in_flight = self._levels("in_flight_requests", "Calls being worked on.").labels()
        self.queue_rows = self._levels("queue_rows", "Rows waiting for the model.", model)
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
        self.connections = self._levels("connections", "Connections that are open, handshakes included.").labels()
        self.connections_accepted = self._tallies("connections_accepted", "Connections that were established.").labels()
        self.connections_refused = self._tallies(
            "connections_refused", "Connections closed before they were established.", ("reason",)
        )
        self.handshake_seconds = self._spreads(
            "handshake_seconds", "From accept to the end of the TLS handshake."
        ).labels()
        self.model_state = self._levels(
            "model_state", "1 for the state a version is in.", (*model, "state"), shared=True
        )
        self.model_load_seconds = self._levels("model_load_seconds", "How long the last load took.", model, shared=True)
        self.swaps = self._tallies("model_swaps", "Versions that replaced a running one.", ("model",))
        self.lost = self._tallies(
            "requests_lost", "Accepted calls that ended without a result or a status; stays 0."
        ).labels()
        self.reloads = self._tallies("config_reloads", "Reloads of the configuration.", ("result",))
        self.keys = self._levels("keys", "Keys that are valid now.", shared=True).labels()
        self.certificate_expiry = self._levels(
            "certificate_expiry_timestamp_seconds", "When a certificate ends, Unix time.", ("role",), shared=True
        )
        self.crl_next_update = self._levels(
            "crl_next_update_seconds",
            "When a revocation list is due for replacement, Unix time.",
            ("issuer",),
            shared=True,
        )

    def watch(self, gauge: Level, read: Callable[[], float]) -> None:
        """Let `gauge` have the value that `read` gives: when it is scraped here, and at each `sample`."""
        gauge.read = read

    def sample(self) -> None:
        """Have all that is watched written down, for the supervisor to read; a child calls it again and again."""
        for family in self.families.values():
            family.sample()

    def _tallies(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Family[Tally]:
        return self._add(Family(COUNTER, name, text, labels, Tally, self._ledger))

    def _spreads(
        self, name: str, text: str, labels: tuple[str, ...] = (), bounds: tuple[float, ...] = _SECONDS
    ) -> Family[Spread]:
        def make(cells: Cells, created: float) -> Spread:
            return Spread(cells, created, bounds)

        return self._add(Family(HISTOGRAM, name, text, labels, make, self._ledger, bounds=bounds))

    def _levels(self, name: str, text: str, labels: tuple[str, ...] = (), *, shared: bool = False) -> Family[Level]:
        return self._add(Family(GAUGE, name, text, labels, Level, self._ledger, shared=shared))

    def _add(self, family: Family[S]) -> Family[S]:
        self.registry.register(family)
        self.families[family.name] = family
        return family
