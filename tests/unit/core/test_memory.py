"""The memory budget: bounded before it is allocated, given back exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.errors import Overloaded
from appliance.core.memory import STRANGER, MemoryBudget

MIB = 2**20


def test_what_is_held_is_used_until_it_is_released() -> None:
    budget = MemoryBudget(100)
    with budget.hold(60) as reservation:
        reservation.grow(40)
        assert budget.used == 100
    assert budget.used == 0


def test_beyond_the_limit_a_request_is_refused_and_nothing_is_taken() -> None:
    budget = MemoryBudget(10 * MIB)
    kept = budget.hold(8 * MIB)
    with pytest.raises(
        Overloaded, match=r"needs 3.0 MiB .* 2.0 MiB of limits.memory_in_flight \(10.0 MiB\).*Try again"
    ):
        budget.hold(3 * MIB)
    assert budget.used == 8 * MIB
    kept.release()
    assert budget.used == 0


def test_what_never_fits_is_told_to_send_less() -> None:
    with pytest.raises(Overloaded, match="Send fewer or smaller inputs"):
        MemoryBudget(10).hold(11)


def test_a_request_that_grows_beyond_the_limit_keeps_what_it_had_and_gives_it_back_once() -> None:
    budget = MemoryBudget(10)
    reservation = budget.hold(6)
    with pytest.raises(Overloaded):
        reservation.grow(5)
    assert budget.used == 6
    reservation.release()
    reservation.release()
    assert budget.used == 0


def test_an_error_inside_gives_everything_back() -> None:
    budget = MemoryBudget(10)
    with pytest.raises(RuntimeError), budget.hold(10):
        raise RuntimeError
    assert budget.used == 0


def test_what_is_still_coming_leaves_room_for_what_is_here() -> None:
    """Whoever announces much and sends it slowly does not shut out those who send little at once."""
    budget = MemoryBudget(800)
    coming = [budget.expect(350, owner) for owner in ("ann", "bob")]
    for owner in (None, "ann", "cleo", STRANGER):
        with pytest.raises(Overloaded, match="Try again"):
            budget.expect(1, owner)
    with budget.hold(100):
        assert (budget.used, budget.free) == (800, -100)
    for reservation in coming:
        reservation.release()
    with pytest.raises(Overloaded, match="Send fewer or smaller inputs"):
        budget.expect(701)
    assert budget.used == 0


@pytest.mark.parametrize(("owner", "share"), [("ann", 1200), (STRANGER, 100)])
def test_nobody_has_all_of_it(owner: str, share: int) -> None:
    """Three quarters for one principal, a sixteenth for all strangers together; others have what is left."""
    budget = MemoryBudget(1600)
    first, second = budget.expect(share - 1, owner), budget.expect(1, owner)
    with pytest.raises(Overloaded, match=r"0\.0 KiB of .* are free for it. Try again"):
        budget.expect(1, owner)
    with pytest.raises(Overloaded, match="Send fewer or smaller inputs"):
        second.grow(share)
    budget.expect(100, "another").release()
    first.shrink_to(10)
    second.grow(share - 11)
    second.release()
    first.release()
    budget.expect(share, owner).release()
    assert budget.used == 0


def test_what_was_a_strangers_gets_an_owner() -> None:
    """Its bytes count in the owner's share from then on, and the strangers' is free for others."""
    budget = MemoryBudget(1600)
    announced = budget.expect(300, "ann")
    body = budget.expect(100, STRANGER)
    body.follow(announced)
    budget.expect(100, STRANGER).release()
    body.grow(800)
    with pytest.raises(Overloaded):
        body.grow(1)
    body.release()
    budget.expect(900, "ann").release()
    announced.release()
    assert (budget.used, budget._shares) == (0, {})


OWNERS = st.sampled_from([None, STRANGER, "ann", "bob"])


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.booleans(), OWNERS), max_size=30))
def test_the_budget_is_never_exceeded_and_always_balances(steps: list[tuple[int, bool, bool, str | None]]) -> None:
    budget = MemoryBudget(100)
    live = []
    for count, release, here, owner in steps:
        used = budget.used
        try:
            live.append(budget.hold(count) if here else budget.expect(count, owner))
        except Overloaded:
            assert used + count > (100 if here else 6)
        else:
            assert used + count <= (100 if here else 88) or not count
        if release and live:
            live.pop(0).release()
        assert budget.used == sum(reservation.count for reservation in live) <= 100
    for reservation in live:
        reservation.release()
    assert budget.used == 0
    budget.expect(75, "ann")


def test_what_turned_out_not_to_be_needed_is_given_back() -> None:
    budget = MemoryBudget(10)
    reservation = budget.hold(3)
    reservation.grow(5)
    reservation.shrink_to(3)
    assert (budget.used, reservation.count) == (3, 3)
    reservation.shrink_to(7)
    assert (budget.used, reservation.count) == (3, 3)
    reservation.release()
    reservation.shrink_to(0)
    assert budget.used == 0


def test_nothing_can_always_be_had() -> None:
    """Replies that wait are counted, not refused, and may take more than there is: who needs no byte is not stopped."""
    budget = MemoryBudget(100)
    budget.used = 150
    with budget.hold(0) as reservation:
        reservation.grow(0)
        with pytest.raises(Overloaded):
            reservation.grow(1)
    assert budget.used == 150
