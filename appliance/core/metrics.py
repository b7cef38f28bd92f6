"""What is counted. One registry a daemon; names, labels and units are fixed here and nowhere else.

Labels come only from configuration and fixed tables (model, version, method, code, reason): a caller cannot make new
series by inventing names.

What every call counts is kept in plain numbers, and made into prometheus-client's samples when it is scraped: its own
objects take a lock and several calls for each number, which is a tenth of a small model's call. What is written comes
out as from its own objects; a test compares the two.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Generic, Protocol, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client import metrics as client
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

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

_Sample: TypeAlias = tuple[str, dict[str, str], float]
"""Suffix of the name, labels beside the series' own, value."""


class Tally:
    """One series of a counter. Written by the event loop's thread only."""

    __slots__ = ("_created", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._created = time.time()

    def inc(self, amount: float = 1) -> None:
        """So many more."""
        self._value += amount

    def samples(self) -> Iterator[_Sample]:
        """As they are scraped."""
        yield "_total", {}, self._value
        if client._use_created:  # switched off by an environment variable of prometheus-client's
            yield "_created", {}, self._created


class Spread:
    """One series of a histogram. Written by the event loop's thread only."""

    __slots__ = ("_bounds", "_counts", "_created", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """Args: bounds: the upper ones of the buckets, included, ascending; one more bucket takes what is above."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._created = time.time()

    def observe(self, value: float) -> None:
        """One more value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> Iterator[_Sample]:
        """As they are scraped: a bucket counts what the ones before it do, too."""
        total = 0.0
        for bound, count in zip((*self._bounds, float("inf")), tuple(self._counts), strict=True):
            total += count
            yield "_bucket", {"le": floatToGoString(bound)}, total  # type: ignore[no-untyped-call]
        yield "_count", {}, total
        yield "_sum", {}, self._sum
        if client._use_created:
            yield "_created", {}, self._created


class Series(Protocol):
    """`Tally` or `Spread`."""

    def samples(self) -> Iterator[_Sample]:
        """As they are scraped."""


S = TypeVar("S", bound=Series)


class Family(Collector, Generic[S]):
    """All series of one metric, by their labels' values."""

    def __init__(
        self,
        kind: str,
        name: str,
        text: str,
        labels: tuple[str, ...],
        make: Callable[[], S],
        registry: CollectorRegistry,
    ) -> None:
        """Args: kind: "counter" or "histogram"."""
        self._kind, self._name, self._text, self._labels = kind, f"{PREFIX}_{name}", text, labels
        self._make = make
        self._series: dict[tuple[str, ...], S] = {}
        self.labels = lru_cache(maxsize=None)(self._find)
        """One series by its labels' values; no more of them than there are series, which nobody removes."""
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """The name, for the registry."""
        return [Metric(self._name, self._text, self._kind)]

    def collect(self) -> Iterable[Metric]:
        """What is scraped; on any thread."""
        metric = Metric(self._name, self._text, self._kind)
        for values, series in tuple(self._series.items()):
            for suffix, more, value in series.samples():
                own = dict(zip(self._labels, values, strict=True))
                metric.add_sample(self._name + suffix, own | more, value)
        return [metric]

    def _find(self, *values: object) -> S:
        key = tuple(map(str, values))
        if len(key) != len(self._labels):
            raise ValueError(f"{self._name} has the labels {self._labels}, not {key}")
        if key not in self._series:
            self._series[key] = self._make()
        return self._series[key]


class Metrics:
    """All metrics of one daemon, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace=PREFIX, registry=self.registry)
        model = ("model", "version")
        self.build = Info(f"{PREFIX}_build", "Version of the appliance.", registry=self.registry)
        self.requests = self._tallies(
            "requests", "Calls answered, by Clarifai status code.", (*model, "method", "code")
        )
        self.rejected = self._counter("rejected", "Calls refused before they reached a model.", ("reason",))
        self.inputs = self._tallies("inputs", "Inputs answered, by Clarifai status code.", (*model, "code"))
        self.request_seconds = self._spreads("request_seconds", "From call to reply.", ("method",))
        self.decode_seconds = self._spreads("decode_seconds", "Inputs to tensors, one request.", model)
        self.queue_seconds = self._spreads("queue_seconds", "From queue to the run that takes a row.", model)
        self.compute_seconds = self._spreads("compute_seconds", "One run of the model.", model)
        self.batch_rows = self._spreads("batch_rows", "Rows in one run of the model.", model, _ROWS)
        self.in_flight = self._gauge("in_flight_requests", "Calls being worked on.")
        self.queue_rows = self._gauge("queue_rows", "Rows waiting for the model.", model)
        self.memory_in_flight = self._gauge("memory_in_flight_bytes", "Bytes that requests hold now.")
        self.memory_limit = self._gauge("memory_in_flight_limit_bytes", "Bytes that requests may hold at once.")
        self.downloads = self._tallies("downloads", "Inputs by URL, by what became of them.", ("outcome",))
        self.download_bytes = self._tallies("download_bytes", "Bytes that URLs delivered.", ())
        self.downloads_in_flight = self._gauge("downloads_in_flight", "Downloads going on now.")
        self.cache_hits = self._tallies("cache_hits", "Inputs answered from the predict cache.", model)
        self.cache_misses = self._tallies("cache_misses", "Inputs that were looked for in it in vain.", model)
        self.cache_evictions = self._tallies("cache_evictions", "Answers taken out of it.", ("reason",))
        self.cache_entries = self._gauge("cache_entries", "Answers in it.")
        self.cache_bytes = self._gauge("cache_bytes", "Bytes these take.")
        self.cache_limit = self._gauge("cache_limit_bytes", "Bytes they may take.")
        self.connections = self._gauge("connections", "Connections that are open, handshakes included.")
        self.connections_accepted = self._counter("connections_accepted", "Connections that were established.")
        self.connections_refused = self._counter(
            "connections_refused", "Connections closed before they were established.", ("reason",)
        )
        self.handshake_seconds = self._histogram("handshake_seconds", "From accept to the end of the TLS handshake.")
        self.model_state = self._gauge("model_state", "1 for the state a version is in.", (*model, "state"))
        self.model_load_seconds = self._gauge("model_load_seconds", "How long the last load took.", model)
        self.swaps = self._counter("model_swaps", "Versions that replaced a running one.", ("model",))
        self.lost = self._counter("requests_lost", "Accepted calls that ended without a result or a status; stays 0.")
        self.reloads = self._counter("config_reloads", "Reloads of the configuration.", ("result",))
        self.keys = self._gauge("keys", "Keys that are valid now.")
        self.certificate_expiry = self._gauge(
            "certificate_expiry_timestamp_seconds", "When a certificate ends, Unix time.", ("role",)
        )
        self.crl_next_update = self._gauge(
            "crl_next_update_seconds", "When a revocation list is due for replacement, Unix time.", ("issuer",)
        )

    def watch(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Let `gauge` read its value when it is scraped."""
        gauge.set_function(read)

    def _tallies(self, name: str, text: str, labels: tuple[str, ...]) -> Family[Tally]:
        return Family("counter", name, text, labels, Tally, self.registry)

    def _spreads(
        self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...] = _SECONDS
    ) -> Family[Spread]:
        return Family("histogram", name, text, labels, lambda: Spread(buckets), self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, buckets=_SECONDS, registry=self.registry)
