"""What counting costs: `python -m bench metrics` prints microseconds of CPU a call, asserts nothing.

First the updates that one predict call on the quick way makes, in a loop: ours in a shared segment, as a front counts,
and prometheus-client's own objects, each with the readings of the clock that nothing else needs. Then the API path of
`bench.inprocess`, in turns with metrics and without: the same calls to three worlds in one process, of which two count
into nothing. The ratio of these two says how much of the other one is chance.
"""

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from appliance.api.auth import Authenticator
from appliance.api.keys import KeyStore, create_key
from appliance.api.service import Api, _Counts
from appliance.catalog.repository import Repository
from appliance.core.config import Auth, Catalog, Config, Engine, Limits
from appliance.core.ledger import SIZE
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import HISTOGRAM, Metrics
from appliance.core.shared import Segment
from appliance.core.types import Endpoint
from appliance.engine.worker import LocalEngine
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool, Servable
from bench.inprocess import _BURST, _cases, _turn
from bench.workload import ROOT

_MODEL = ("digits", "1")
_METHOD = "PostModelOutputs"
_REQUEST = "0123456789abcdef0123456789abcdef"
_WANTED_US = 2.0


class _Nothing:
    """Takes whatever is counted, and keeps nothing."""

    def labels(self, *_: object) -> "_Nothing":
        return self

    def __call__(self, *_: object) -> None:
        pass

    def _ignore(self, *_: object) -> None:
        pass

    inc = inc_for = observe = observe_for = set = clear = sample = _ignore


class _Uncounted(Metrics):
    """Metrics that count nothing."""

    def __init__(self) -> None:
        super().__init__()
        nothing: Any = _Nothing()
        for name in vars(self):
            if not name.startswith("_") and name not in ("families", "registry", "build"):
                setattr(self, name, nothing)

    def run_counter(self, model: str, version: str) -> Any:
        """Nothing is counted."""
        return _Nothing()

    def watch(self, gauge: object, read: Callable[[], float]) -> None:
        """Nothing is watched."""


def main(given: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench metrics", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions; medians are shown")
    options = parser.parse_args(given)
    seconds = options.seconds * options.repeat
    print(f"about {2 * seconds + 15:.0f} s\n")
    _updates(options.repeat)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_paths(Path(folder), options.seconds, options.repeat))


# ---- the updates alone -----------------------------------------------------------------------------------------------


def _updates(repeat: int) -> None:
    ours = _by_ours(Metrics(Segment.create("bench", SIZE)))
    theirs = _by_prometheus_client()
    rows = {"ours": ours, "prometheus-client": theirs}
    best: dict[str, tuple[float, float]] = {}
    for _ in range(20 * repeat):  # the least disturbed of many short ones
        for name, (call, run) in rows.items():
            figures = (_timed(call), _timed(run))
            best[name] = tuple(map(min, best.get(name, figures), figures))  # type: ignore[assignment]
    empty = min(_timed(lambda: None) for _ in range(20 * repeat))
    print(f"{'updates, CPU µs':<22}{'a call':>10}{'a run':>10}{'both':>10}")
    for name, (call_us, run_us) in best.items():
        call_us, run_us = call_us - empty, run_us - empty
        print(f"{name:<22}{call_us:>10.2f}{run_us:>10.2f}{call_us + run_us:>10.2f}")
    total = sum(best["ours"]) - 2 * empty
    print(
        f"wanted: at most {_WANTED_US:g} µs a request in total: {'yes' if total <= _WANTED_US else 'no'}, {total:.2f}\n"
    )


def _timed(function: Callable[[], object], times: int = 2_000) -> float:
    """Microseconds of CPU: the neighbours on this machine take turns with us."""
    begun = time.thread_time()
    for _ in range(times):
        function()
    return (time.thread_time() - begun) / times * 1e6


def _by_ours(metrics: Metrics) -> tuple[Callable[[], object], Callable[[], object]]:
    """What a call does, and what a run of the model does; as api/service, tasks/servable and engine/worker do it."""
    decode, request_rows = metrics.decode_seconds.labels(*_MODEL), metrics.request_rows.labels(*_MODEL)
    count = metrics.run_counter(*_MODEL)
    in_flight, monotonic, clock = metrics.in_flight, time.monotonic, time.perf_counter

    @lru_cache(maxsize=1024)
    def counts_of(model: tuple[str, str], method: str) -> _Counts:
        return _Counts(
            model,
            metrics.requests.labels(*model, method, 10000),
            metrics.request_seconds.labels(*model, method),
            metrics.encode_seconds.labels(*model),
            metrics.inputs.labels(*model, 10000),
        )

    def call() -> None:
        in_flight.set(1)
        begun = clock()
        decode.observe(clock() - begun)
        request_rows.observe(1)
        computed_at = monotonic()
        now = monotonic()
        counts: Any = counts_of(_MODEL, _METHOD)
        counts.seconds.observe_for(now - computed_at, now, _REQUEST)
        counts.encode.observe(now - computed_at)
        counts.answered.inc()
        counts.inputs.inc(1)
        in_flight.set(0)

    def run() -> None:
        count(1, 0.00003, 0.0, 0.0001)

    return call, run


def _by_prometheus_client() -> tuple[Callable[[], object], Callable[[], object]]:
    """The same with its objects; the engine's, and those of a model, are kept, as it advises."""
    registry = CollectorRegistry()
    made: dict[str, Any] = {}
    for name, family in Metrics().families.items():
        kind = {"counter": Counter, "histogram": Histogram, "gauge": Gauge}[family.kind]
        more = {"buckets": family.bounds} if family.kind == HISTOGRAM else {}
        made[name] = kind(f"bench_{name}", family.text, family.label_names, registry=registry, **more)
    by_model = [name for name, family in Metrics().families.items() if family.label_names == ("model", "version")]
    of_model = {name: made[name].labels(*_MODEL) for name in by_model}
    in_flight, monotonic, clock = made["in_flight_requests"], time.monotonic, time.perf_counter

    def call() -> None:
        in_flight.set(1)
        begun = clock()
        of_model["decode_seconds"].observe(clock() - begun)
        of_model["request_rows"].observe(1)
        computed_at = monotonic()
        now = monotonic()
        of_model["encode_seconds"].observe(now - computed_at)
        made["request_seconds"].labels(*_MODEL, _METHOD).observe(now - computed_at, {"req_id": _REQUEST})
        made["requests"].labels(*_MODEL, _METHOD, 10000).inc()
        made["inputs"].labels(*_MODEL, 10000).inc(1)
        in_flight.set(0)

    def run() -> None:
        of_model["compute_seconds"].observe(0.00003)
        of_model["batch_wait_seconds"].observe(0.0)
        of_model["batch_rows"].observe(1)
        of_model["queue_seconds"].observe(0.0001)

    return call, run


# ---- with and without ------------------------------------------------------------------------------------------------


async def _paths(folder: Path, seconds: float, repeat: int) -> None:
    key, _ = create_key(folder / "keys.json", "default", "")
    worlds = {
        "with": await _world(folder, "with", Metrics(Segment.create("bench", SIZE))),
        "without": await _world(folder, "without", _Uncounted()),
        "again": await _world(folder, "again", _Uncounted()),
    }
    case = next(case for case in _cases() if case.name == "digits image")
    print(f"{'digits image, CPU µs':<24}{'with':>10}{'without':>10}{'ratio':>10}{'of none to none':>18}")
    for name, at_once in (("one at a time", 1), (f"{_BURST} in a turn", _BURST)):
        figures: dict[str, list[float]] = {world: [] for world in worlds}
        for _ in range(repeat):
            until = time.perf_counter() + seconds
            order = list(worlds)
            while time.perf_counter() < until:
                order.reverse()  # whoever is second finds the caches warm
                for world in order:
                    endpoints, _ = worlds[world]
                    begun = time.process_time()
                    await _turn(endpoints[case.rpc], key, case, at_once)
                    figures[world].append((time.process_time() - begun) / at_once * 1e6)
        counted, *uncounted = (statistics.median(figures[world]) for world in worlds)
        one, other = sorted(uncounted)
        without = (one + other) / 2
        print(
            f"{name:<24}{counted:>10.1f}{without:>10.1f}{counted / without:>10.3f}{other / one:>18.3f}",
            flush=True,
        )
    for _, close in worlds.values():
        await close()


async def _world(
    folder: Path, name: str, metrics: Metrics, **sections: Any
) -> tuple[dict[str, Endpoint], Callable[[], Any]]:
    """An API over the digits bundle, and what closes it."""
    root, state, pool = folder / name, folder / f"{name}-state", DecodePool(1)
    state.mkdir()
    shutil.copytree(ROOT / "models/digits", root / "digits")
    engine = LocalEngine(Engine(device="cpu", threads=1), metrics)

    async def load(path: Path, config: Any, version: Any) -> Servable:
        return await servable.load(path, config, version, engine, pool, metrics, Limits())

    repository: Repository[Servable] = Repository(Catalog(root=root, state_dir=state, settle_s=0), load)
    await repository.look()
    await repository.wait_settled()
    config = Config(auth=Auth(keys_file=folder / "keys.json"), **sections)
    authenticator = Authenticator(config, KeyStore(folder / "keys.json"))
    api = Api(config, repository, authenticator, MemoryBudget(2**30), metrics)

    async def close() -> None:
        await api.tracing.close()
        await repository.close()
        pool.close()

    return api.endpoints(), close


if __name__ == "__main__":
    main()
