"""What is counted. One registry a daemon; names, labels and units are fixed here and nowhere else.

Labels come only from configuration and fixed tables (model, version, method, code, reason): a caller cannot make new
series by inventing names.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

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


class Metrics:
    """All metrics of one daemon, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace=PREFIX, registry=self.registry)
        model = ("model", "version")
        self.build = Info(f"{PREFIX}_build", "Version of the appliance.", registry=self.registry)
        self.requests = self._counter(
            "requests", "Calls answered, by Clarifai status code.", (*model, "method", "code")
        )
        self.rejected = self._counter("rejected", "Calls refused before they reached a model.", ("reason",))
        self.inputs = self._counter("inputs", "Inputs answered, by Clarifai status code.", (*model, "code"))
        self.request_seconds = self._histogram("request_seconds", "From call to reply.", ("method",))
        self.decode_seconds = self._histogram("decode_seconds", "Inputs to tensors, one request.", model)
        self.queue_seconds = self._histogram("queue_seconds", "From queue to the run that takes a row.", model)
        self.compute_seconds = self._histogram("compute_seconds", "One run of the model.", model)
        self.batch_rows = self._histogram("batch_rows", "Rows in one run of the model.", model, _ROWS)
        self.in_flight = self._gauge("in_flight_requests", "Calls being worked on.")
        self.queue_rows = self._gauge("queue_rows", "Rows waiting for the model.", model)
        self.memory_in_flight = self._gauge("memory_in_flight_bytes", "Bytes that requests hold now.")
        self.memory_limit = self._gauge("memory_in_flight_limit_bytes", "Bytes that requests may hold at once.")
        self.model_state = self._gauge("model_state", "1 for the state a version is in.", (*model, "state"))
        self.model_load_seconds = self._gauge("model_load_seconds", "How long the last load took.", model)
        self.swaps = self._counter("model_swaps", "Versions that replaced a running one.", ("model",))
        self.lost = self._counter("requests_lost", "Accepted calls that ended without a result or a status; stays 0.")
        self.reloads = self._counter("config_reloads", "Reloads of the configuration.", ("result",))
        self.keys = self._gauge("keys", "Keys that are valid now.")
        self.certificate_expiry = self._gauge(
            "certificate_expiry_timestamp_seconds", "When a certificate ends, Unix time.", ("role",)
        )

    def watch(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Let `gauge` read its value when it is scraped."""
        gauge.set_function(read)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=buckets, registry=self.registry)
