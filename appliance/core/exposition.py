"""The metrics page as text, written from numbers.

prometheus-client's own writer makes an object of every sample, and escapes every label at every scrape: 50 ms for 20
models on three processes, in which a single process answers nobody. Here the beginning of each line is kept, which
leaves a fifth of that. A test holds the text against what prometheus-client writes.

Source: the text formats of Prometheus 0.0.4 and OpenMetrics 1.0.0.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client import metrics as client
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString

from appliance.core.ledger import Note

CONTENT_TYPES = {False: CONTENT_TYPE_LATEST, True: openmetrics.CONTENT_TYPE_LATEST}
"""Whether a page is OpenMetrics → its content type."""

Page: TypeAlias = Callable[[bool], bytes]
"""Writes a page; told whether as OpenMetrics."""

_END = b"# EOF\n"


class Lines:
    """Writes one family."""

    def __init__(self, kind: str, name: str, text: str, labels: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        self._kind, self._name, self._labels = kind, name, labels
        self._text = _escaped(text)
        self._bounds = tuple(_number(float(bound)) for bound in (*bounds, float("inf"))) if kind == "histogram" else ()
        self._kept: dict[tuple[str, ...], tuple[str, ...]] = {}

    def write(
        self,
        counted: Iterable[tuple[tuple[str, ...], tuple[float, list[float], Mapping[int, Note]]]],
        opened: bool,
        limit: int,
    ) -> Iterator[str]:
        """All series. Args: opened: as OpenMetrics. limit: of series whose lines' beginnings are kept."""
        yield from self._head(self._name + ("_total" if self._kind == "counter" and not opened else ""), self._kind)
        created = []
        if len(self._kept) > limit:  # versions come and go
            self._kept.clear()
        for key, (moment, cells, notes) in counted:
            heads = self._kept.get(key)
            if heads is None:
                heads = self._kept[key] = tuple(self._heads(key))
            total = 0.0
            for cell in range(max(1, len(self._bounds))):
                total += cells[cell]
                if total != total:  # a gauge without a value
                    continue
                note = notes.get(cell) if opened and notes else None
                yield f"{heads[cell]}{_number(total)}{_exemplar(note) if note is not None else ''}\n"
            if self._bounds:
                yield f"{heads[-3]}{_number(total)}\n{heads[-2]}{_number(cells[-1])}\n"
            if self._kind != "gauge" and client._use_created:
                line = f"{heads[-1]}{_number(moment)}\n"
                if opened:
                    yield line
                else:
                    created.append(line)
        if created:
            yield from self._head(f"{self._name}_created", "gauge")
            yield from created

    def _head(self, name: str, kind: str) -> Iterator[str]:
        yield f"# HELP {name} {self._text}\n# TYPE {name} {kind}\n"

    def _heads(self, key: tuple[str, ...]) -> Iterator[str]:
        own = dict(zip(self._labels, key, strict=True))
        suffix = {"counter": "_total", "gauge": "", "histogram": "_bucket"}[self._kind]
        for bound in self._bounds:
            yield f"{self._name}{suffix}{_braced({**own, 'le': bound})} "
        if not self._bounds:
            yield f"{self._name}{suffix}{_braced(own)} "
        for more in ("_count", "_sum", "_created") if self._bounds else ("_created",):
            yield f"{self._name}{more}{_braced(own)} "


def page(others: CollectorRegistry, lines: Iterable[str], opened: bool) -> bytes:
    """The whole page. Args: others: what is not ours to write. opened: as OpenMetrics."""
    write = openmetrics.generate_latest if opened else generate_latest
    head: bytes = write(others)
    end = _END if opened else b""
    return head.removesuffix(end) + "".join(lines).encode() + end


def _braced(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in sorted(labels.items())) + "}"


def _escaped(text: str, *, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float) -> str:
    if 0 <= value < 1e6:
        return repr(value)
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _exemplar(note: Note) -> str:
    name, value = note.label
    return f' # {{{name}="{value}"}} {_number(note.value)} {round(note.at, 3)}'
