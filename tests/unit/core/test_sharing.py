"""What fronts know of each other: one limit for all of them, no waiting, and nothing left behind by the dead."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.counting import Child

from appliance.core.config import Principal
from appliance.core.errors import Overloaded
from appliance.core.memory import MemoryBudget
from appliance.core.sharing import SharedLimits

LIMIT = 1000


def front(shared: SharedLimits, index: int) -> SharedLimits:
    """Take part, in this process."""
    return SharedLimits.attach(os.dup(shared.segment.descriptor), index)


@pytest.fixture
def shared() -> SharedLimits:
    """Three fronts, and room for four principals with limits."""
    return SharedLimits.create(3, slots=4)


@pytest.fixture
def start(shared: SharedLimits) -> Iterator[Callable[..., Child]]:
    """Start fronts that are processes; they are ended with the test."""
    with ExitStack() as stack:

        def make(index: int, **limits: float) -> Child:
            principal = Principal.model_validate({"name": "ada", **limits}).model_dump_json()
            child = stack.enter_context(Child(shared.segment, index, LIMIT, principal))
            assert child.hear() == "ready"
            return child

        yield make


def test_calls_of_all_fronts_are_seen_by_each(shared: SharedLimits) -> None:
    """Those of one that died are gone."""
    one, two = (front(shared, index).calls() for index in (0, 2))
    one.write(5)
    two.write(7)
    assert (one.others(), two.others()) == (7, 5)
    shared.clear(0)
    assert two.others() == 0


class TestMemory:
    def test_the_limit_holds_for_all_fronts_together(self, shared: SharedLimits) -> None:
        """What one holds is not free at another; what is still coming leaves the last eighth there, too."""
        one, two = (MemoryBudget(LIMIT, front(shared, index).memory()) for index in (0, 2))
        held = one.hold(800)
        assert (two.used, two.taken, two.free) == (0, 800, 75)
        with pytest.raises(Overloaded, match=r"0\.2 KiB of .* are free for it. Try again"):
            two.hold(201)
        with pytest.raises(Overloaded):
            two.expect(76)
        with two.hold(200):
            assert one.free == -125
            held.shrink_to(100)
            assert two.free == 575
        held.release()
        assert (one.taken, two.taken) == (0, 0)

    def test_what_replies_take_is_seen(self, shared: SharedLimits) -> None:
        """They are counted, not refused."""
        one, two = (MemoryBudget(LIMIT, front(shared, index).memory()) for index in (0, 1))
        one.add(1500)
        assert two.free == -625
        one.add(-1500)
        assert two.free == 875

    def test_fronts_that_hammer_it_never_hold_too_much(self, start: Callable[..., Child]) -> None:
        """Each may give one request while the others do, not more; and all of the limit is used."""
        children = [start(index) for index in range(3)]
        for _ in range(5):
            for child in children:
                child.tell("fill and empty", 7, 30_000)
            held = 7 * sum(child.hear() for child in children)
            assert LIMIT - 7 < held <= LIMIT + 3 * 7
            for child in children:
                child.ask("release all")

    def test_what_a_dead_front_held_is_free_again(self, shared: SharedLimits, start: Callable[..., Child]) -> None:
        """Once the supervisor has seen it die."""
        one, two = start(0), start(1)
        assert one.ask("hold", 900) == "held"
        assert two.ask("hold", 200) == "refused"
        one.kill()
        assert two.ask("hold", 200) == "refused"
        shared.clear(0)
        assert two.ask("hold", 200) == "held"
        assert start(0).ask("hold", 801) == "refused"


class TestMeters:
    def test_requests_at_once_are_limited_over_all_fronts(self, start: Callable[..., Child]) -> None:
        """However they are spread."""
        one, two = start(0, concurrency=3), start(2, concurrency=3)
        assert [child.ask("call") for child in (one, one, two, two, one)] == [True, True, True, False, False]
        one.ask("leave")
        assert [child.ask("call") for child in (two, one)] == [True, False]

    def test_what_a_dead_front_had_in_flight_is_not(self, shared: SharedLimits, start: Callable[..., Child]) -> None:
        """Its callers heard that their calls failed."""
        one, two = start(0, concurrency=3), start(1, concurrency=3)
        assert [one.ask("call") for _ in range(3)] == [True] * 3
        one.kill()
        assert two.ask("call") is False
        shared.clear(0)
        assert [child.ask("call") for child in (two, start(0, concurrency=3), two, two)] == [True, True, True, False]

    def test_a_burst_is_spent_once(self, shared: SharedLimits, start: Callable[..., Child]) -> None:
        """Not once for each front, nor anew by a front that takes a dead one's place."""
        limits = {"requests_per_second": 0.0001, "burst": 5}
        one, two = start(0, **limits), start(1, **limits)
        assert [child.ask("call") for child in (one, two, one, two)] == [True] * 4
        one.kill()
        shared.clear(0)
        again = start(0, **limits)
        assert [child.ask("call") for child in (again, again, two, start(2, **limits))] == [True, False, False, False]

    def test_a_rate_that_is_hammered_is_held(self, start: Callable[..., Child]) -> None:
        """By all fronts at once: no more than a burst, what time brings, and one for each front."""
        children = [start(index, requests_per_second=2000, burst=50) for index in range(3)]
        for child in children:
            child.tell("hammer", 30_000)
        reports = [child.hear() for child in children]
        passed = sum(count for count, _, _ in reports)
        seconds = max(ended for _, _, ended in reports) - min(began for _, began, _ in reports)
        assert 50 <= passed <= 50 + 2000 * seconds + 3

    def test_a_name_has_one_slot_whoever_takes_it_first(
        self, shared: SharedLimits, start: Callable[..., Child]
    ) -> None:
        """Three fronts start together, with the same principals in another order."""
        names = [f"name {number}" for number in range(4)]
        children = [start(index) for index in range(3)]
        for number, child in enumerate(children):
            child.tell("claim", names[number:] + names[:number])
        assert [child.hear() for child in children] == ["claimed"] * 3
        for name in names:
            one, two = (front(shared, index).meter(name) for index in (0, 1))
            assert one is not None
            assert two is not None
            one.take(0.0)
            assert (two.in_flight(), two.look()) == (1, (1, 0.0))
            one.leave()
            two.take(2.5)
            assert (one.in_flight(), one.look()) == (1, (2, 2.5))

    def test_without_a_slot_there_is_no_meter_and_one_word(
        self, shared: SharedLimits, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Those that have one keep it."""
        one = front(shared, 0)
        with caplog.at_level(logging.WARNING):
            found = [one.meter(str(number)) is not None for number in range(6)]
        assert found == [True] * 4 + [False] * 2
        assert one.meter("0") is not None
        assert len(caplog.records) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.sampled_from(["take", "leave", "die"]))))
def test_meters_add_up(steps: list[tuple[int, str, str]]) -> None:
    """In flight: what the living have; admitted: what anybody ever did."""
    shared = SharedLimits.create(3)
    fronts = [front(shared, index) for index in range(3)]
    admitted = dict.fromkeys("ab", 0)
    flying = {(index, name): 0 for index in range(3) for name in "ab"}
    for index, name, what in steps:
        meter = fronts[index].meter(name)
        assert meter is not None
        if what == "die":
            shared.clear(index)
            fronts[index] = front(shared, index)
            flying |= {(index, name): 0 for name in "ab"}
        elif what == "take":
            meter.take(0.0)
            admitted[name] += 1
            flying[index, name] += 1
        elif flying[index, name]:
            meter.leave()
            flying[index, name] -= 1
        for name in "ab":
            seen = fronts[1].meter(name)
            assert seen is not None
            assert seen.look()[0] == admitted[name]
            assert seen.in_flight() == sum(flying[index, name] for index in range(3))
    for each in (shared, *fronts):
        each.segment.close()


def test_a_front_that_was_not_planned_cannot_take_part(shared: SharedLimits) -> None:
    """A slip is found at once, not by who counts in another's cells."""
    for index in (-1, 3):
        with pytest.raises(ValueError, match="there are 3 fronts"):
            front(shared, index)
