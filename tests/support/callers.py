"""Callers in closed loops, in threads: each makes one call after the other, and how every call ended is counted."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

from support.waiting import PATIENCE_S

ANSWERED = "answered"
Ask = Callable[[], str]
"""Makes one call. Returns: ANSWERED, or how else it ended."""
Begin = Callable[[], "contextlib.AbstractContextManager[Ask]"]
"""What a loop has from its first call to its last: a connection of its own, say."""


class Callers:
    """Loops, from `with` on; a call that raised was lost, and ends its loop.

    Attributes:
        ends: how often calls ended how.
        times_s: how long each took.
    """

    def __init__(self, loops: Sequence[Begin], pause_s: Callable[[str], float] = lambda end: 0.0) -> None:
        """Args: pause_s: between two calls of a loop, by how the first one ended."""
        self._loops, self._pause_s = loops, pause_s
        self.ends: Counter[str] = Counter()
        self.times_s: list[float] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Have them call."""
        self._threads = [threading.Thread(target=self._run, args=(begin,)) for begin in self._loops]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """They have had enough; idempotent."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a caller never got an answer: its call was lost"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, begin: Begin) -> None:
        with begin() as ask:
            while not self._stop.is_set():
                begun, end = time.monotonic(), "lost"
                try:
                    end = ask()
                finally:
                    with self._lock:
                        self.times_s.append(time.monotonic() - begun)
                        self.ends[end] += 1
                self._stop.wait(self._pause_s(end))

    @property
    def answered(self) -> int:
        """Calls that ended as they should."""
        return self.ends[ANSWERED]

    def told(self) -> dict[str, Any]:
        """How all calls ended."""
        others = {end: count for end, count in self.ends.items() if end != ANSWERED}
        return {"answered": self.answered, "others": others, "slowest_s": round(max(self.times_s, default=0.0), 2)}

    def wait_for(self, count: int, end: str = ANSWERED) -> None:
        """Return when `count` more calls ended so."""
        goal = self.ends[end] + count
        deadline = time.monotonic() + PATIENCE_S
        while self.ends[end] < goal:
            assert time.monotonic() < deadline, f"no progress: {self.ends}"
            time.sleep(0.005)
