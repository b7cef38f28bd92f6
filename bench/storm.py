"""Ten thousand appliances lose their orchestrator together and come back, in virtual time: who knocks when, until when.

Ours have the agent's own `Backoff`, one each, with the clock and the chance of this simulation. An attempt makes one
connection for the registration and one for each runner, at once, which the agent's channels do. The stock runner is
what was observed of it: every stream by itself makes a connection, again and again after 1.15 s, and the control stream
after 5 s; two hundredths more or less, or all would knock in the same instant for ever.

The orchestrator is a queue: it does so many TLS handshakes a second, lets so many connections wait, and refuses those
that find the queue full. While it is down, it refuses all.
"""

import argparse
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import numpy as np

from appliance.orchestrator.backoff import Backoff
from bench import charts
from bench.common import between_markers, number, table, write
from bench.workload import ROOT

PAGE = ROOT / "docs" / "fleet.md"
STEP_S = 0.01
FIRST_S = 2
"""Seconds after the loss that are told apart: whoever was connected notices at once."""

STOCK_STREAMS, STOCK_S, STOCK_CONTROL_S, STOCK_SPREAD = 32, 1.15, 5.0, 0.02
"""PROTOCOL 5.3, 5.4: streams of a runner, seconds between two attempts of one, and of the control stream."""

OUTAGES_S = (1.0, 10.0, 60.0, 600.0)
SHOWN_S = 60.0
"""The outage that is drawn."""

_GIVEN_UP_S = 3600.0


@dataclass(frozen=True)
class Centre:
    """Attributes: handshakes_s: TLS handshakes a second. queue: connections that may wait for theirs."""

    handshakes_s: float
    queue: int


@dataclass
class Story:
    """What became of one outage.

    Attributes:
        knocks: connections that were tried, by second since the loss.
        refused: those of them that were tried in vain after the orchestrator was back.
        back_s: seconds after it was back → part of the fleet that is connected.
    """

    client: str
    outage_s: float
    knocks: list[int] = field(default_factory=list)
    refused: int = 0
    back_s: list[tuple[float, float]] = field(default_factory=list)

    def after(self, part: float) -> float:
        """Seconds after it was back in which that part of the fleet was."""
        return next(at for at, connected in self.back_s if connected >= part)

    @property
    def first(self) -> int:
        """Connections tried in the first seconds."""
        return sum(self.knocks[:FIRST_S])

    @property
    def waiting(self) -> float:
        """Connections tried a second in the second half of the outage, or its last ten seconds."""
        end = int(self.outage_s)
        seconds = self.knocks[end - max(1, min(10, end // 2)) : end]
        return sum(seconds) / len(seconds)

    @property
    def peak(self) -> int:
        """Most connections tried in a second from when it was back."""
        return max(self.knocks[int(self.outage_s) :])


class Clients(Protocol):
    """A fleet that lost its orchestrator at 0 s."""

    connections: int
    """That one knock is."""
    count: int

    def due(self, step: int) -> int:
        """How many knock now; all of them are answered by `refused`, as far as they are."""

    def refused(self, step: int, count: int) -> None:
        """So many of those that just knocked must try again."""


class Ours:
    """Appliances with the agent's back-off, or with another chance than its full jitter."""

    def __init__(self, count: int, runners: int, uniform: Callable[[float, float], float]) -> None:
        self.count, self.connections = count, 1 + runners
        self._now = 0.0
        self._due: defaultdict[int, list[Backoff]] = defaultdict(list)
        self._knocking: list[Backoff] = []
        for _ in range(count):
            self._fail(Backoff(lambda: self._now, uniform))

    def _fail(self, backoff: Backoff) -> None:
        backoff.failed(backoff.begin())
        self._due[math.ceil(backoff.until / STEP_S)].append(backoff)

    def due(self, step: int) -> int:
        self._now = step * STEP_S
        self._knocking = self._due.pop(step, [])
        return len(self._knocking)

    def refused(self, step: int, count: int) -> None:
        # An attempt takes no time here, and one that begins in the moment of the last failure is the same one.
        self._now = step * STEP_S + STEP_S / 2
        for backoff in self._knocking[:count]:
            self._fail(backoff)


class Stock:
    """Streams of stock runners; all are alike, so that they are only counted."""

    connections = 1

    def __init__(self, count: int, runners: int, chance: np.random.Generator) -> None:
        self._chance = chance
        self._kinds = [(count * runners * STOCK_STREAMS, STOCK_S), (count * runners, STOCK_CONTROL_S)]
        self.count = sum(streams for streams, _ in self._kinds)
        self._due: list[defaultdict[int, int]] = [defaultdict(int) for _ in self._kinds]
        self._knocking = [streams for streams, _ in self._kinds]
        self.refused(0, self.count)

    def due(self, step: int) -> int:
        self._knocking = [due.pop(step, 0) for due in self._due]
        return sum(self._knocking)

    def refused(self, step: int, count: int) -> None:
        workers = min(self._knocking[0], round(count * self._knocking[0] / max(1, sum(self._knocking))))
        for due, (_, pause_s), part in zip(self._due, self._kinds, (workers, count - workers), strict=True):
            first, last = (round(pause_s * (1 + sign * STOCK_SPREAD) / STEP_S) for sign in (-1, 1))
            spread = self._chance.multinomial(part, [1 / (last - first + 1)] * (last - first + 1))
            for place, some in enumerate(spread):
                due[step + first + place] += int(some)


def tell(client: str, clients: Clients, centre: Centre, outage_s: float) -> Story:
    """Let it happen."""
    story = Story(client, outage_s)
    waiting = served = 0.0
    connected = 0
    for step in _steps():
        now = step * STEP_S
        if step % round(1 / STEP_S) == 0:
            story.knocks.append(0)
        knocking = clients.due(step)
        story.knocks[-1] += knocking * clients.connections
        up = now >= outage_s
        served = min(waiting, centre.handshakes_s * STEP_S) if up else 0.0
        waiting -= served
        room = int((centre.queue - waiting) // clients.connections) if up else 0
        taken = min(knocking, room)
        waiting += taken * clients.connections
        clients.refused(step, knocking - taken)
        if up:
            story.refused += (knocking - taken) * clients.connections
            connected += taken
            # Who waits in the queue is connected when it is through.
            story.back_s.append((now - outage_s, (connected - waiting / clients.connections) / clients.count))
            if connected == clients.count and waiting < 1:
                return story
    raise RuntimeError(f"{client}: not all are back after {_GIVEN_UP_S:g} s")


def _steps() -> Iterator[int]:
    return iter(range(round(_GIVEN_UP_S / STEP_S)))


def stories(count: int, runners: int, centre: Centre, seed: int) -> list[Story]:
    """Every client over every outage."""
    found = []
    for outage_s in OUTAGES_S:
        kinds: dict[str, Clients] = {
            "ours, full jitter": Ours(count, runners, random.Random(seed).uniform),
            "the same without jitter": Ours(count, runners, lambda low, high: high),
            "stock runner, flat": Stock(count, runners, np.random.default_rng(seed)),
        }
        found += [tell(name, clients, centre, outage_s) for name, clients in kinds.items()]
    return found


def main(arguments: list[str]) -> None:
    """Simulate, print, write."""
    made = argparse.ArgumentParser(prog="python -m bench storm", description=__doc__)
    made.add_argument("--appliances", type=int, default=10_000)
    made.add_argument("--runners", type=int, default=1, help="versions that each of them serves; default 1")
    made.add_argument("--handshakes", type=float, default=1000.0, help="TLS handshakes a second of the orchestrator")
    made.add_argument("--queue", type=int, default=4096, help="connections that wait there; default 4096")
    made.add_argument("--seed", type=int, default=8)
    made.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for the results")
    made.add_argument("--page", action="store_true", help="write the table into docs/fleet.md too")
    options = made.parse_args(arguments)
    centre = Centre(options.handshakes, options.queue)
    found = stories(options.appliances, options.runners, centre, options.seed)
    text = "\n".join(
        [
            f"{options.appliances} appliances with {options.runners} runner each; the orchestrator does "
            f"{centre.handshakes_s:g} TLS handshakes a second and lets {centre.queue} connections wait. Connections:",
            "",
            _table(found),
        ]
    )
    drawn = [story for story in found if story.outage_s == SHOWN_S]
    chart = charts.lines(
        f"{options.appliances} appliances, {SHOWN_S:g} s without the orchestrator",
        "seconds since the loss",
        "connections tried a second",
        {s.client: [(second, max(1, knocks)) for second, knocks in enumerate(s.knocks[:-1])] for s in drawn},
        log_y=True,
    )
    chosen = {name: value for name, value in vars(options).items() if name not in ("out", "page")}
    content = {"options": chosen, "stories": [_kept(story) for story in found]}
    print(text)
    name = f"{datetime.now(UTC):%Y-%m-%d}-storm"
    for file in write(options.out, name, f"# A reconnect storm\n\n{text}", content, {"knocks": chart}):
        print(f"written: {file.name}")
    if options.page:
        PAGE.write_text(between_markers(PAGE.read_text(encoding="utf-8"), "bench storm", text), encoding="utf-8")


def _table(found: list[Story]) -> str:
    rows = [
        [
            f"{story.outage_s:g} s",
            story.client,
            number(story.first),
            number(story.waiting),
            number(story.peak),
            str(story.refused),
            f"{story.after(0.5):.0f} s",
            f"{story.after(1.0):.0f} s",
        ]
        for story in found
    ]
    head = [
        "down for",
        "client",
        f"in the first {FIRST_S} s",
        "a second while down",
        "most a second once back",
        "in vain once back",
        "half are back after",
        "all after",
    ]
    return table(head, rows)


def _kept(story: Story) -> dict[str, object]:
    """What a plot is made of."""
    return {name: value for name, value in asdict(story).items() if name != "back_s"}
