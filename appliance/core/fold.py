"""What all processes count, as one: the supervisor's own series, those of the living children, and what the dead left.

Counters and histograms are sums that never go down: a child that ends leaves its counts, and one that takes its place
begins at zero. Gauges are sums over those that live; of those that mean the same everywhere (`Family.shared`), the
largest counts. What callers used (`usage`) is a sum likewise.
"""

import operator
import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import chain

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from appliance.core.exposition import page
from appliance.core.ledger import Entry, LedgerReader
from appliance.core.metrics import GAUGE, Counted, Metrics
from appliance.core.shared import Segment
from appliance.core.usage import FAMILY, KIND, MOST_AT_ONCE, MOST_KEYS, Amounts, UsageKey

_Series = tuple[str, tuple[str, ...]]
"""Name of the family without the prefix, and the labels' values."""

_LABEL = 256
"""Characters of a part of a usage key: no name that we know is as long."""


class Fold(Collector):
    """The exposition of several processes. Any thread may scrape."""

    def __init__(self, own: Metrics) -> None:
        """Args: own: the supervisor's; its families are those that are shown."""
        self._own = own
        self._children: dict[str, _Child] = {}
        self._left: dict[_Series, Counted] = {}
        self._used: dict[UsageKey, Amounts] = {}
        self._lock = threading.Lock()
        self.registry = CollectorRegistry()
        """All families, as prometheus-client collects them."""
        self.registry.register(self)

    def attach(self, name: str, segment: Segment) -> None:
        """Show what a child counts in `segment`; one that had that name before is retired."""
        with self._lock:
            self._retire(name)
            self._children[name] = _Child(segment, self._own)

    def retire(self, name: str) -> Mapping[_Series, float]:
        """Keep what a child that is gone has counted, and close its segment here.

        Returns: the last values of its gauges; what was watched is as old as its last `Metrics.sample`. Empty when
            there is no such child.
        """
        with self._lock:
            return self._retire(name)

    def gauge(self, name: str) -> float:
        """A gauge without labels, summed over the children that live."""
        with self._lock:
            series = (counted for child in self._children.values() for counted in child.counted())
            return sum(values[0] for (family, _), (_, values, _) in series if family == name)

    def usage(self) -> dict[UsageKey, Amounts]:
        """What callers used of those that live and those that are dead: sums since we began."""
        with self._lock:
            used = dict(self._used)
            for child in self._children.values():
                _add_usage(used, child)
        return used

    def counted(self, *names: str, notes: bool = False) -> dict[str, dict[tuple[str, ...], Counted]]:
        """As `Metrics.counted`, over all processes."""
        return self._folded(names, notes)

    def describe(self) -> Iterable[Metric]:
        """All names, for the registry."""
        return chain.from_iterable(family.describe() for family in self._own.families.values())

    def collect(self) -> Iterable[Metric]:
        """All families."""
        families = self._own.families
        return [families[name].exposed(counted) for name, counted in self._folded().items()]

    def page(self, opened: bool) -> bytes:
        """What is scraped; of processes by themselves the supervisor's is in it. Args: opened: as OpenMetrics."""
        families, folded = self._own.families, self._folded()
        lines = (line for name, counted in folded.items() for line in families[name].write(counted, opened))
        return page(self._own.others, lines, opened)

    def _folded(self, names: Iterable[str] = (), notes: bool = True) -> dict[str, dict[tuple[str, ...], Counted]]:
        """The numbers of these families, of all if none is named."""
        families = self._own.families
        shown = {name: families[name].counted(notes) for name in names or families}
        with self._lock:
            for (name, labels), counted in chain(
                self._left.items(), *(child.counted(shown, notes) for child in self._children.values())
            ):
                if name in shown:
                    series = shown[name]
                    series[labels] = _added(series.get(labels), counted, largest=families[name].shared)
        return shown

    def _retire(self, name: str) -> dict[_Series, float]:
        child = self._children.pop(name, None)
        if child is None:
            return {}
        gauges = {}
        for series, counted in child.counted():
            if self._own.families[series[0]].kind == GAUGE:
                gauges[series] = counted.cells[0]
            else:
                self._left[series] = _added(self._left.get(series), counted)
        _add_usage(self._used, child)
        child.close()
        return gauges


class _Child:
    """What one child counts. It is not believed: what cannot be leaves the last value that could."""

    def __init__(self, segment: Segment, own: Metrics) -> None:
        self._reader = LedgerReader(segment)
        self._families = own.families
        self._known: dict[Entry, list[float]] = {}
        self._used: dict[Entry, list[float]] = {}

    def counted(self, names: Container[str] | None = None, notes: bool = True) -> Iterator[tuple[_Series, Counted]]:
        """Its numbers now, or those of some families; a gauge without a value is left out."""
        self._look()
        for entry, known in self._known.items():
            if names is not None and entry.family not in names:
                continue
            now = self._reader.values(entry)
            if entry.kind != GAUGE:
                known[:] = [new if old <= new < float("inf") else old for old, new in zip(known, now, strict=True)]
            elif abs(now[0]) < float("inf"):
                known[:] = now
            else:
                continue
            yield (
                (entry.family, entry.labels),
                Counted(entry.created, known, self._reader.notes(entry) if notes else {}),
            )

    def usage(self) -> Iterator[tuple[UsageKey, list[float]]]:
        """What callers used of it until now."""
        self._look()
        for entry, known in self._used.items():
            now = self._reader.values(entry)
            known[:] = [new if 0 <= new - old <= MOST_AT_ONCE else old for old, new in zip(known, now, strict=True)]
            yield UsageKey(*entry.labels), known

    def close(self) -> None:
        """Let its memory go."""
        self._reader.segment.close()

    def _look(self) -> None:
        """Know the entries that were added."""
        for entry in self._reader.new_entries():
            if self._fits(entry):
                self._known[entry] = [0.0] * entry.count
            elif _is_usage(entry) and len(self._used) <= MOST_KEYS:
                self._used[entry] = [0.0] * entry.count

    def _fits(self, entry: Entry) -> bool:
        family = self._families.get(entry.family)
        return family is not None and (family.kind, len(family.label_names), family.width, family.note_count) == (
            entry.kind,
            len(entry.labels),
            entry.count,
            entry.notes,
        )


def _is_usage(entry: Entry) -> bool:
    shape = (entry.family, entry.kind, len(entry.labels), entry.count, entry.notes)
    fits = shape == (FAMILY, KIND, len(UsageKey._fields), len(Amounts._fields), 0)
    return fits and all(len(label) <= _LABEL for label in entry.labels)


def _add_usage(into: dict[UsageKey, Amounts], child: _Child) -> None:
    for key, amounts in child.usage():
        into[key] = into.get(key, Amounts()).plus(amounts)


def _added(one: Counted | None, other: Counted, *, largest: bool = False) -> Counted:
    """Both together, in a list of its own; of two notes the later one."""
    if one is None:
        return Counted(other.created, list(other.cells), other.notes)
    add = max if largest else operator.add
    notes = dict(one.notes)
    for cell, note in other.notes.items():
        if cell not in notes or notes[cell].at < note.at:
            notes[cell] = note
    cells = [add(a, b) for a, b in zip(one.cells, other.cells, strict=True)]
    return Counted(min(one.created, other.created), cells, notes)
