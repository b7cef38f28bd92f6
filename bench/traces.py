"""What traces cost: `python -m bench traces` prints microseconds of CPU a call, asserts nothing.

The API path of `bench.inprocess` in turns with traces off, on with no call sampled, one in a hundred, and all of them;
and off, with each caller asking where its call's time went. What is counted is the CPU time of the thread that answers;
then comes what the other one takes to make spans of a call, in messages of 128, which go to a program that throws them
away. "off" is there twice: the ratio of the two says how much of the others is chance.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from appliance.api.keys import create_key
from appliance.api.otlp import Spans, Traced
from appliance.core.config import Traces
from appliance.core.metrics import Metrics
from appliance.core.timing import HEADER, Run, Timing, Trace, new_id
from bench.inprocess import _BURST, _cases, _turn
from bench.metrics import _world

_SINK = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Sink(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(server.server_port, flush=True)
server.serve_forever()
"""


def main(given: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench traces", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions; medians are shown")
    options = parser.parse_args(given)
    print(f"about {2 * options.seconds * options.repeat + 15:.0f} s\n")
    sink = subprocess.Popen([sys.executable, "-c", _SINK], stdout=subprocess.PIPE, text=True)
    try:
        assert sink.stdout is not None
        endpoint = f"http://127.0.0.1:{int(sink.stdout.readline())}"
        with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_measure(Path(folder), endpoint, options.seconds, options.repeat))
    finally:
        sink.kill()
        sink.wait()


async def _measure(folder: Path, endpoint: str, seconds: float, repeat: int) -> None:
    key, _ = create_key(folder / "keys.json", "default", "")
    ways: dict[str, tuple[Traces, dict[str, str]]] = {
        "off": (Traces(), {}),
        "off again": (Traces(), {}),
        "none sampled": (Traces(endpoint=endpoint, sample=0), {}),
        "1 % sampled": (Traces(endpoint=endpoint, sample=0.01), {}),
        "all sampled": (Traces(endpoint=endpoint, sample=1), {}),
        "off, timing asked": (Traces(), {HEADER: "1"}),
    }
    worlds = {name: await _world(folder, name, Metrics(), traces=traces) for name, (traces, _) in ways.items()}
    case = next(case for case in _cases() if case.name == "digits image")
    turns = (1, _BURST)
    print(f"{'digits image, CPU µs':<20}" + "".join(f"{f'{at_once} in a turn':>16}{'ratio':>8}" for at_once in turns))
    figures: dict[tuple[str, int], list[float]] = {}
    for at_once in turns:
        order = list(ways)
        until = time.perf_counter() + seconds * repeat
        while time.perf_counter() < until:
            order.append(order.pop(0))  # whoever follows another finds its caches: all take turns in that
            for name in order:
                begun = time.thread_time()
                await _turn(worlds[name][0][case.rpc], key, case, at_once, **ways[name][1])
                figures.setdefault((name, at_once), []).append((time.thread_time() - begun) / at_once * 1e6)
    medians = {what: statistics.median(found) for what, found in figures.items()}
    for name in ways:
        shown = [(medians[name, at_once], medians[name, at_once] / medians["off", at_once]) for at_once in turns]
        print(f"{name:<20}" + "".join(f"{value:>16.1f}{ratio:>8.3f}" for value, ratio in shown))
    for _, close in worlds.values():
        await close()
    _spans()


def _spans() -> None:
    """What the exporter's thread does for a call."""
    now = time.monotonic()
    timing = Timing(now, Trace(new_id(128), new_id(64), "", "", True), asked=False)
    timing.known()
    timing.decode(now, now)
    timing.ran(Run(1, now, now, 0.0, 0.0))
    timing.end(now, now, now, 10000)
    assert timing.trace is not None
    call = Traced(timing.trace, timing, "PostModelOutputs", True, {"appliance.req_id": new_id(128)})
    spans = Spans(Traces())
    took = []
    for _ in range(20):
        begun = time.thread_time()
        size = len(spans.message([call] * 128))
        took.append((time.thread_time() - begun) / 128 * 1e6)
    print(f"\nspans of a call, on the other thread: {min(took):.1f} µs of CPU, {size // 128} bytes")


if __name__ == "__main__":
    main()
