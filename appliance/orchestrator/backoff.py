"""When a link that broke is tried again."""

import asyncio
import random
import time
from collections.abc import Callable

FIRST_S, MOST_S = 0.5, 60.0
"""Seconds that the first wait is at most, and any."""

_GOOD_S = 45.0
"""Seconds without a failure after which the next one is a first one: longer than an attempt may take."""


def pause_s(
    failures: int, first_s: float, most_s: float, uniform: Callable[[float, float], float] = random.uniform
) -> float:
    """Seconds to wait after so many failures, from 1: exponential with full jitter, so that appliances that lost
    something together do not come back together.

    Args:   first_s, most_s: what the first wait is at most, and any. uniform: a random number between two.
    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return uniform(0.0, min(most_s, first_s * 2.0 ** min(failures - 1, 16)))


class Backoff:
    """One for all that goes over a link: it breaks for all of them at once, and is tried again by all at once."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Args: clock: seconds. uniform: see `pause_s`."""
        self._clock, self._uniform = clock, uniform
        self._failures = 0
        self._failed_at = float("-inf")
        self.until = float("-inf")
        """By the clock, when the next attempt may begin."""

    def begin(self) -> float:
        """Now, to be given to `failed`."""
        return self._clock()

    def failed(self, begun: float) -> bool:
        """What was begun then has failed.

        Returns: whether that is news; what was begun before the last failure, and fails soon after it, has failed of
            the same. What lived on for longer had not, however long ago it was begun.
        """
        now = self._clock()
        if begun <= self._failed_at and now - self._failed_at < _GOOD_S:
            return False
        self._failures = 1 if now - self.until >= _GOOD_S else self._failures + 1
        self._failed_at = now
        self.until = now + pause_s(self._failures, FIRST_S, MOST_S, self._uniform)
        return True

    async def wait(self) -> None:
        """Return when the next attempt may begin."""
        while (left_s := self.until - self._clock()) > 0:  # noqa: ASYNC110  # it is time that is waited for
            await asyncio.sleep(left_s)
