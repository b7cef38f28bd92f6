"""The predict cache: answers kept for requests that say `use_predict_cache`; nobody else's are looked up or stored.

An answer is found again by whoever sent the same content, to the same load of the same version, with the same options:
content as bytes (what a URL delivered, never the URL), principals apart (docs/decisions: the predict cache). Only
results are kept, never failures. The least recently used go first, and all of a servable's when it is not served any
more. Content is not kept: it is remembered by a digest.
"""

import asyncio
import copy
import dataclasses
import hashlib
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from appliance.api import values
from appliance.api.context import Context
from appliance.core.config import Cache
from appliance.core.errors import ApplianceError
from appliance.core.metrics import Metrics
from appliance.core.types import Array, ConceptScores, Embedding, Media, Payload, Result, Returned, Tensors, Value
from appliance.tasks.servable import Answer, Servable

_OVERHEAD = 1024
"""Bytes of an entry beside its result: key, digest, options, their places in two tables. A test weighs it."""

_ARRAY = 256
"""Bytes of an array beside its content, and of its name's place."""

_SHARE = 8
"""One answer may take one part in so many of the cache: a few large ones must not push all others out."""

_SMALL = 256 * 1024
"""Bytes of content that are digested on the loop; more is done on a thread, at about 1 GB/s."""

Key: TypeAlias = tuple[int, str, tuple[Hashable, ...], bytes]
"""Serial of the servable, principal, what was asked of it, digest of the content."""

Run: TypeAlias = Callable[[Sequence[Payload | ApplianceError]], Awaitable[list[Answer]]]


@dataclass(slots=True)
class _Entry:
    result: Result
    size: int
    born: float


class PredictCache:
    """All kept answers, within `cache.size` bytes. Used from the event loop's thread."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = 0
        self.used = 0
        self._ttl_s = 0.0
        self._clock = clock
        self._metrics = metrics
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._served: Set[int] | None = None
        metrics.watch(metrics.cache_entries, lambda: len(self._entries))
        metrics.watch(metrics.cache_bytes, lambda: self.used)
        metrics.watch(metrics.cache_limit, lambda: self.limit)

    def configure(self, settings: Cache) -> None:
        """Take over a new configuration; a smaller size holds at once."""
        self.limit, self._ttl_s = settings.size, settings.ttl_s
        self._shrink()

    def keep_only(self, served: Set[int]) -> None:
        """Forget what other servables computed than those with these serials, and take nothing more of theirs."""
        self._served = served
        for key in [key for key in self._entries if key[0] not in served]:
            self._remove(key, "model")

    async def answers(
        self,
        context: Context,
        servable: Servable,
        asked: tuple[Hashable, ...],
        payloads: Sequence[Payload | ApplianceError],
        run: Run,
    ) -> list[Answer]:
        """The answer to each payload, in order: kept ones, and those that `run` makes of the others.

        Equal payloads are run once. An error in place of a payload is its answer.

        Args:    asked: everything that decides the answer beside servable and payload: method, options.
        Raises:  what `run` does. Overloaded: the memory for the kept answers is not free.
        """
        if not self.limit:
            return await run(payloads)
        answers: list[Answer | None] = [p if isinstance(p, ApplianceError) else None for p in payloads]
        present = {index: payload for index, payload in enumerate(payloads) if isinstance(payload, Payload)}
        missing: dict[Key, list[int]] = {}
        for index, digest in zip(present, await _digests(list(present.values())), strict=True):
            key = (servable.serial, context.principal, asked, digest)
            found = self._get(key)
            if found is None:
                missing.setdefault(key, []).append(index)
            else:
                context.memory.grow(found.size)
                answers[index] = found.result
        labels = servable.key.model_id, servable.version
        self._metrics.cache_misses.labels(*labels).inc(len(missing))
        self._metrics.cache_hits.labels(*labels).inc(len(present) - len(missing))
        if missing:
            results = await run([present[indices[0]] for indices in missing.values()])
            for (key, indices), result in zip(missing.items(), results, strict=True):
                for index in indices:
                    answers[index] = result
                if not isinstance(result, ApplianceError):
                    aside = isinstance(result, Returned) and not values.is_small(result.value)
                    size = await asyncio.to_thread(_size, key, result) if aside else _size(key, result)
                    context.memory.grow(size * (len(indices) - 1))  # the first one's is held already
                    if self._takes(key, size):
                        self._put(key, await asyncio.to_thread(_own, result) if aside else _own(result), size)
        return answers  # type: ignore[return-value]  # every place has been filled

    def _get(self, key: Key) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._ttl_s and self._clock() - entry.born >= self._ttl_s:
            self._remove(key, "age")
            return None
        self._entries.move_to_end(key)
        return entry

    def _takes(self, key: Key, size: int) -> bool:
        return size <= self.limit // _SHARE and (self._served is None or key[0] in self._served)

    def _put(self, key: Key, result: Result, size: int) -> None:
        # It may have become smaller meanwhile, or another request made the same.
        if key in self._entries or not self._takes(key, size):
            return
        self._entries[key] = _Entry(result, size, self._clock())
        self.used += size
        self._shrink()

    def _shrink(self) -> None:
        while self.used > self.limit:
            self._remove(next(iter(self._entries)), "size")

    def _remove(self, key: Key, reason: str) -> None:
        self.used -= self._entries.pop(key).size
        self._metrics.cache_evictions.labels(reason).inc()


async def _digests(payloads: Sequence[Payload]) -> list[bytes]:
    small = all(values.is_small(payload.arguments) for payload in payloads)
    if small and sum(map(_content, payloads)) <= _SMALL:
        return [digest(payload) for payload in payloads]
    return await asyncio.to_thread(lambda: [digest(payload) for payload in payloads])


def _content(payload: Payload) -> int:
    """Bytes of a payload whose arguments are few."""
    weighed = values.weight(payload.arrays) + values.weight(payload.arguments)
    return len(payload.image or b"") + len(payload.text or "") + weighed


def digest(payload: Payload) -> bytes:
    """What tells contents apart: 32 bytes, the same for the same bytes, text, and arrays with their names and types."""
    found = hashlib.blake2b(digest_size=32)

    def add(kind: bytes, content: "bytes | memoryview") -> None:
        # With its length before it, no content can look like two others.
        found.update(kind + memoryview(content).nbytes.to_bytes(8, "big"))
        found.update(content)

    def add_array(array: Array) -> None:
        add(b"type", f"{array.dtype.str} {array.shape}".encode())
        add(b"array", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def add_value(value: Value) -> None:
        """A method's argument: containers item by item, each with its kind and count."""
        if isinstance(value, np.ndarray):
            add_array(value)
        elif isinstance(value, bytes):
            add(b"bytes", value)
        elif isinstance(value, Mapping):
            add(b"dict", str(len(value)).encode())
            for name, inner in sorted(value.items()):
                add(b"name", str(name).encode("utf-8", "surrogatepass"))
                add_value(inner)
        elif isinstance(value, list | tuple):
            add(b"list", str(len(value)).encode())
            for inner in value:
                add_value(inner)
        elif isinstance(value, Media):  # by its bytes, never by the URL they came from
            add(b"media", value.content)
        elif dataclasses.is_dataclass(value):
            add_value([getattr(value, each.name) for each in dataclasses.fields(value)])
        else:
            add(type(value).__name__.encode(), repr(value).encode("utf-8", "surrogatepass"))

    if payload.image is not None:
        add(b"image", payload.image)
    if payload.text is not None:
        add(b"text", payload.text.encode("utf-8", "surrogatepass"))
    for name, array in sorted(payload.arrays.items()):
        add(b"name", name.encode("utf-8", "surrogatepass"))
        add_array(array)
    if payload.arguments:
        add_value(payload.arguments)
    return found.digest()


def _own(result: Result) -> Result:
    """The result by itself: not a view into the arrays of a whole batch, and not to be changed by anybody."""
    if isinstance(result, ConceptScores):
        return ConceptScores(_copy(result.indices), _copy(result.values))
    if isinstance(result, Embedding):
        return Embedding(_copy(result.vector))
    if isinstance(result, Returned):
        return Returned(copy.deepcopy(result.value))
    return Tensors({name: _copy(array) for name, array in result.arrays.items()})


def _copy(array: Array) -> Array:
    own = array.copy()
    own.flags.writeable = False
    return own


def _size(key: Key, result: Result) -> int:
    """Bytes that an entry takes."""
    size = _OVERHEAD + sys.getsizeof(key[1]) + 64 * len(getattr(key[2][-1], "selected", None) or ())
    if isinstance(result, ConceptScores):
        return size + 2 * _ARRAY + result.indices.nbytes + result.values.nbytes
    if isinstance(result, Embedding):
        return size + _ARRAY + result.vector.nbytes
    if isinstance(result, Returned):
        return size + values.weight(result.value)
    return size + sum(_ARRAY + len(name) + array.nbytes for name, array in result.arrays.items())
