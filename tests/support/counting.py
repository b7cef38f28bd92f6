"""A child process that counts in shared segments and is driven by its standard input: a line of JSON, a line back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from appliance.api.auth import Meter
from appliance.core.config import Principal
from appliance.core.errors import Overloaded, RateLimited
from appliance.core.memory import MemoryBudget, Reservation
from appliance.core.metrics import Family, Metrics
from appliance.core.shared import Segment
from appliance.core.sharing import SharedLimits

_ROOT = Path(__file__).parents[2]

Step = tuple[str, str, Sequence[str], float]
"""What is done ("inc", "observe", "set" or "clear"), to which metric, with which labels, by how much."""


def count(metrics: Metrics, steps: Sequence[Step]) -> None:
    """Do those steps."""
    for what, name, labels, value in steps:
        family: Family[Any] = metrics.families[name]
        if what == "clear":
            family.clear()
        else:
            getattr(family.labels(*labels), what)(value)


class Child:
    """The process, seen from the test; killed at the end of a block."""

    def __init__(self, segment: Segment, *arguments: object) -> None:
        command = [sys.executable, "-m", __name__, str(segment.descriptor), *map(str, arguments)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(segment.descriptor,),
            text=True,
            env={**os.environ, "PYTHONPATH": f"{_ROOT}:{_ROOT / 'tests'}"},
        )

    def tell(self, *words: object) -> None:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """What it answers, once it does."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, *words: object) -> Any:
        """Both."""
        self.tell(*words)
        return self.hear()

    def kill(self) -> None:
        """As the kernel does it: it does nothing any more."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:  # closes its pipes
            self._process.kill()


# ---- in the child ----


def _count(descriptor: int) -> None:
    metrics = Metrics(Segment.attach(descriptor))
    for words in _told():
        if words[0] == "count":
            count(metrics, words[1])
            metrics.sample()
            _answer("done")
        elif words[0] == "watch":
            metrics.watch(metrics.in_flight, lambda value=words[1]: float(value))  # type: ignore[misc]
            _answer("done")
        else:  # count for ever, with a thousand new series in the beginning
            _answer("begun")
            number = 0
            while True:
                metrics.requests.labels("m", "1", f"method-{number // 5 % 1000}", 10000).inc()
                metrics.request_seconds.labels("m", "1", "all").observe_for(1, number, f"id-{number}")
                number += 1


def _front(descriptor: int, index: str, limit: str, principal: str) -> None:
    shared = SharedLimits.attach(descriptor, int(index))
    budget = MemoryBudget(int(limit), shared.memory())
    meter = Meter(Principal.model_validate_json(principal), time.monotonic, shared)
    held: list[Reservation] = []
    _answer("ready")
    for words in _told():
        match words:
            case ["hold", size]:
                try:
                    held.append(budget.hold(size))
                    _answer("held")
                except Overloaded:
                    _answer("refused")
            case ["call"]:
                _answer(_let_through(meter))
            case ["leave"]:
                meter.leave()
                _answer("left")
            case ["claim", names]:
                for name in names:
                    shared.meter(name)
                _answer("claimed")
            case ["fill and empty", size, rounds]:
                held = _fill_and_empty(budget, size, rounds)
                _answer(len(held))
            case ["release all"]:
                for reservation in held:
                    reservation.release()
                _answer("released")
            case ["hammer", rounds]:
                began = time.monotonic()
                passed = 0
                for _ in range(rounds):
                    if _let_through(meter):
                        passed += 1
                        meter.leave()
                _answer([passed, began, time.monotonic()])


def _fill_and_empty(budget: MemoryBudget, size: int, rounds: int) -> list[Reservation]:
    """What is held after a last filling."""
    held: list[Reservation] = []
    number = 0
    while True:
        number += 1
        try:
            held.append(budget.hold(size))
        except Overloaded:
            if number > rounds:
                return held
        if number < rounds and held and number % 3 == 0:
            held.pop().release()


def _let_through(meter: Meter) -> bool:
    try:
        meter.check()
    except RateLimited:
        return False
    meter.take()
    return True


def _told() -> Any:
    return map(json.loads, sys.stdin)


def _answer(words: object) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _count(int(sys.argv[1]))
    else:
        _front(int(sys.argv[1]), *sys.argv[2:])
