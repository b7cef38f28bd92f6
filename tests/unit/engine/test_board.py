"""What a supervisor sees of an engine."""

import os

from appliance.core.shared import Segment
from appliance.engine import board as boards
from appliance.engine.board import Board


def both() -> tuple[Board, Board]:
    """The engine's board and the supervisor's."""
    segment = Segment.create("board", boards.SIZE)
    return Board(Segment.attach(os.dup(segment.descriptor))), Board(segment)


def test_runs_and_loads_are_seen_while_they_last() -> None:
    """With the version's number."""
    engine, supervisor = both()
    run = engine.begin(7)
    load = engine.begin(0, loads=True)
    other = engine.begin(9)
    found = {activity.number: activity for activity in supervisor.activities()}
    assert set(found) == {7, 0, 9}
    assert (found[7].loads, found[0].loads) == (False, True)
    for place in (run, load, other):
        engine.end(place)
    assert not supervisor.activities()


def test_the_longest_run_is_kept_and_loads_do_not_count() -> None:
    """A canary waits as long as runs may take."""
    engine, supervisor = both()
    engine.end(engine.begin(1, loads=True))
    assert supervisor.longest_run_s == 0
    engine.end(engine.begin(1))
    assert 0 < supervisor.longest_run_s < 60


def test_more_runs_than_places_are_not_told() -> None:
    """And end like all others."""
    engine, supervisor = both()
    places = [engine.begin(1) for _ in range(600)]
    assert len(supervisor.activities()) == 512
    for place in places:
        engine.end(place)
    assert not supervisor.activities()


def test_a_turn_of_the_loop_is_seen() -> None:
    """Silence is measured from it."""
    engine, supervisor = both()
    engine.turned()
    assert 0 <= supervisor.turned_ago_s < 60
