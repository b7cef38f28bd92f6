"""When a broken link is tried again: with growing, random waits, one for all that goes over it."""

import random

import pytest

from appliance.orchestrator.backoff import FIRST_S, MOST_S, Backoff


class Time:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self.most: list[float] = []

    def clock(self) -> float:
        return self.now

    def longest(self, low: float, high: float) -> float:
        """Instead of a random number: the largest, noted."""
        assert low == 0.0
        self.most.append(high)
        return high


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def backoff(time: Time) -> Backoff:
    return Backoff(time.clock, time.longest)


def fails(backoff: Backoff, time: Time, attempts: int) -> None:
    """Attempts that fail at once, one after the other."""
    for _ in range(attempts):
        time.now += 0.001
        begun = backoff.begin()
        time.now += 0.001
        assert backoff.failed(begun)
        time.now += time.most[-1]


def test_waits_double_up_to_the_longest(backoff: Backoff, time: Time) -> None:
    fails(backoff, time, 10)
    assert time.most[:4] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S, 8 * FIRST_S]
    assert time.most[-1] == MOST_S


def test_what_breaks_together_fails_once(backoff: Backoff, time: Time) -> None:
    """Thirty-two streams of one connection are one failure."""
    begun = [backoff.begin() for _ in range(32)]
    time.now += 5
    assert [backoff.failed(each) for each in begun] == [True, *[False] * 31]
    assert time.most == [FIRST_S]


def test_what_lives_on_after_a_failure_fails_anew(backoff: Backoff, time: Time) -> None:
    """A stream that waits for hours is older than some other failure; when all break, they wait all the same."""
    old = [backoff.begin() for _ in range(2)]
    time.now += 1
    fails(backoff, time, 1)
    time.now += 3600
    assert [backoff.failed(each) for each in old] == [True, False]
    assert backoff.until > time.now


def test_after_a_good_while_the_next_failure_is_a_first_one(backoff: Backoff, time: Time) -> None:
    fails(backoff, time, 6)
    time.now += 60
    fails(backoff, time, 1)
    assert time.most[-1] == FIRST_S


def test_waits_are_spread_over_the_whole_span(time: Time) -> None:
    """Full jitter: of a thousand appliances that lose their orchestrator, no tenth of the time sees a quarter."""
    waits = []
    for seed in range(1000):
        time.now = 100.0
        each = Backoff(time.clock, random.Random(seed).uniform)
        for _ in range(8):
            time.now += 0.001
            begun = each.begin()
            time.now += 0.001
            each.failed(begun)
            time.now = max(time.now, each.until)
        waits.append(each.until - 100.0)
    spread = max(waits) - min(waits)
    tenths = [int(10 * (wait - min(waits)) / spread) for wait in waits]
    assert max(tenths.count(tenth) for tenth in range(10)) < 1000 / 4


@pytest.mark.asyncio
async def test_whoever_waits_begins_when_it_is_time() -> None:
    backoff = Backoff(uniform=lambda low, high: high / 50)
    await backoff.wait()
    begun = backoff.begin()
    backoff.failed(begun)
    await backoff.wait()
    assert backoff.begin() - begun >= FIRST_S / 50
