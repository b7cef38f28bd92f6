"""What the daemon sees of its own numbers: rates of the last seconds and minutes, and what has happened lately."""

import logging
import operator
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from appliance.core.files import printable
from appliance.core.machine import usable_cpus
from appliance.core.metrics import Counted
from appliance.daemon.status import History, LogLine, Rates

_log = logging.getLogger(__name__)

STEP_S = 5.0
"""Seconds between two looks, which are those that rates are of."""

_STEPS = 60
"""Looks that are remembered: five minutes."""

_REFUSED_STEPS = 4
"""Looks over which refusals are compared with calls."""

_MOST_LINES = 20
_LONGEST_TEXT = 1000
"""Characters of a text that are shown; a bundle, a caller or a library may have made it."""

_CLOCK_S = 5.0
"""Seconds that the clock may be set by between two looks without a word."""

NO_CALLS = Rates(0.0, 0.0, None, None)

SUCCESS = "10000"
"""Clarifai's code of a call that succeeded, as a label."""

_LOOKED_AT = (
    *("request_seconds", "rejected", "requests_lost", "worker_restarts", "worker_cpu_seconds"),
    *("config_reloads", "certificate_reloads"),
)
_RELOADS = {"config_reloads": "configuration", "certificate_reloads": "certificates"}

Numbers: TypeAlias = Mapping[str, Mapping[tuple[str, ...], Counted]]
"""By a metric's name and its labels' values."""

Event: TypeAlias = tuple[str, str]
"""What happened ("restart", "reload", "lost", "clock"), and to what."""


class Source(Protocol):
    """Whoever counts: the daemon's staff."""

    def counted(self, *names: str, notes: bool = False) -> Numbers:
        """See `Staff.counted`."""


class RecentLog(logging.Handler):
    """Keeps the last warnings and errors of this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[LogLine] = deque(maxlen=_MOST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one; never a traceback, which may quote anything."""
        self.lines.append(LogLine(round(record.created, 3), record.levelname.lower(), shown(record.getMessage())))


class Watch:
    """Looks at the numbers every `STEP_S` seconds, and remembers. Used from the event loop's thread."""

    def __init__(
        self,
        source: Source,
        bounds: Sequence[float],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Args: bounds: of the buckets of `request_seconds`. clock: monotonic. wall: Unix time."""
        self._source, self._bounds, self._clock, self._wall = source, bounds, clock, wall
        self.rates = NO_CALLS
        """Of all calls since the look before the last."""
        self.of_model: Mapping[tuple[str, str], Rates] = {}
        """The same by the labels `model` and `version`."""
        self.refused: tuple[float, float] = (0.0, 0.0)
        """Of the last looks: calls that ended, and calls and inputs refused as there was too much to do."""
        self.happened: dict[Event, float] = {}
        """When something happened last, by the monotonic clock; a failed reload is forgotten when one succeeds."""
        self.cpu_load: float | None = None
        """What our processes take of the CPUs that we may use, 0 to 1."""
        self.calls: Mapping[tuple[str, ...], Counted] = {}
        """Calls that ended, by model, version, method and code, with the last one that failed, as of the last look."""
        self._steps: deque[Rates | None] = deque([None] * _STEPS, _STEPS)
        self._refused: deque[tuple[float, float]] = deque(maxlen=_REFUSED_STEPS)
        self._looked_at = clock()
        self._ahead = wall() - self._looked_at
        self._sums: dict[tuple[str, str], _Sums] = {}
        self._tallies: dict[Event, float] = {}
        self._cpu_s = 0.0

    def history(self) -> History:
        """The last minutes."""

        def of(name: str) -> list[float | None]:
            return [None if step is None else getattr(step, name) for step in self._steps]

        return History(STEP_S, *map(of, ("requests_per_s", "failures_per_s", "p50_s", "p99_s")))

    def look(self) -> None:
        """Take the rates since the last look, and note what has happened since; the first only begins to count."""
        now = self._clock()
        seconds, self._looked_at = max(now - self._looked_at, 1e-3), now
        numbers = {**self._source.counted(*_LOOKED_AT), **self._source.counted("requests", notes=True)}
        self.calls = numbers["requests"]
        sums, before = _Sums.of(numbers, len(self._bounds) + 1), self._sums
        tallies, tallies_before = _tallies(numbers), self._tallies
        cpu_s = time.process_time() + sum(each.cells[0] for each in numbers["worker_cpu_seconds"].values())
        self._sums, self._tallies = sums, tallies
        self._cpu_s, cpu_before = cpu_s, self._cpu_s
        if not before:
            return
        self.of_model = {key: self._since(each, before.get(key), seconds) for key, each in sums.items() if key != _ALL}
        self.rates = self._since(sums[_ALL], before.get(_ALL), seconds)
        self._steps.append(self.rates)
        self.cpu_load = round(min(1.0, max(0.0, cpu_s - cpu_before) / seconds / usable_cpus()), 4)
        grown = {event: count - tallies_before.get(event, 0.0) for event, count in tallies.items()}
        self._refused.append((self.rates.requests_per_s * seconds, grown.pop(_FULL)))
        self.refused = (sum(calls for calls, _ in self._refused), sum(refused for _, refused in self._refused))
        for event, count in grown.items():
            if count > 0:
                self._note(event, now)
        ahead = self._wall() - now
        if abs(ahead - self._ahead) > _CLOCK_S:
            self.happened["clock", "clock"] = now
            _log.warning("the machine's clock was set", extra={"by_s": round(ahead - self._ahead, 1)})
        self._ahead = ahead

    def _note(self, event: Event, now: float) -> None:
        kind, subject = event
        if kind == "reloaded":
            self.happened.pop(("reload", subject), None)
        else:
            self.happened[event] = now

    def _since(self, sums: "_Sums", before: "_Sums | None", seconds: float) -> Rates:
        if before is None:
            before = _Sums(len(sums.buckets))
        if sums.requests == before.requests:
            return NO_CALLS  # most versions of a large catalog, most of the time
        buckets = list(map(operator.sub, sums.buckets, before.buckets))
        return Rates(
            round((sums.requests - before.requests) / seconds, 3),
            round((sums.failures - before.failures) / seconds, 3),
            quantile(self._bounds, buckets, 0.5),
            quantile(self._bounds, buckets, 0.99),
        )


class _Sums:
    """Calls of one version, or of all, since the start."""

    __slots__ = ("buckets", "failures", "requests")

    def __init__(self, buckets: int) -> None:
        self.requests = 0.0
        self.failures = 0.0
        self.buckets = [0.0] * buckets

    @classmethod
    def of(cls, numbers: Numbers, buckets: int) -> "dict[tuple[str, str], _Sums]":
        """Over methods and codes, by model and version; `_ALL` has the sum of them."""
        found: defaultdict[tuple[str, str], _Sums] = defaultdict(lambda: cls(buckets))
        for (model, version, _, code), counted in numbers["requests"].items():
            each = found[model, version]
            each.requests += counted.cells[0]
            each.failures += counted.cells[0] if code != SUCCESS else 0.0
        for (model, version, _), counted in numbers["request_seconds"].items():
            each = found[model, version]
            each.buckets = list(map(operator.add, each.buckets, counted.cells))  # their last cell is no bucket
        total = cls(buckets)
        total.requests = sum(each.requests for each in found.values())
        total.failures = sum(each.failures for each in found.values())
        total.buckets = list(map(sum, zip(*(each.buckets for each in found.values()), strict=True))) or total.buckets
        return {**found, _ALL: total}


_ALL = ("", "*")
"""No model has this for its id and version."""
_FULL = ("full", "")


def _tallies(numbers: Numbers) -> dict[Event, float]:
    """Counts whose growth is an event, since the start."""
    found: dict[Event, float] = {_FULL: 0.0}
    for (process, _), counted in numbers["worker_restarts"].items():
        found["restart", process] = found.get(("restart", process), 0.0) + counted.cells[0]
    for counted in numbers["requests_lost"].values():
        found["lost", "calls"] = counted.cells[0]
    for name, subject in _RELOADS.items():
        for (result,), counted in numbers[name].items():
            found["reload" if result == "failed" else "reloaded", subject] = counted.cells[0]
    for (reason,), counted in numbers["rejected"].items():
        found[_FULL] += counted.cells[0] if reason in ("queue_full", "deadline") else 0.0
    return found


def quantile(bounds: Sequence[float], counts: Sequence[float], share: float) -> float | None:
    """The value below which that share of what was counted lies; None of nothing.

    Within a bucket values are taken to lie evenly; above the last bound, on it. Source: Prometheus, histogram_quantile.
    """
    rank, below = share * sum(counts), 0.0
    for index, count in enumerate(counts):
        if count > 0 and below + count >= rank:
            if index == len(bounds):
                return bounds[-1]
            lower = bounds[index - 1] if index else 0.0
            return float(f"{lower + (bounds[index] - lower) * (rank - below) / count:.4g}")
        below += count
    return None


def shown(text: str) -> str:
    """A text as it is shown: on one line, and not endless."""
    return printable(text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …")
