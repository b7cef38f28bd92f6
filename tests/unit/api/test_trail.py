"""What calls there were, as a front tells it: every one counted, refusals one by one, and bounded."""

import json

import pytest

from appliance.api import trail as trails
from appliance.api.trail import Trail, Use

ADA = Use("ada", "key:12345678", "acme/main/digits", "1", 10000)
STRANGER = Use("", "", "", "", 11008)
PLACE = ("PostModelOutputs", "ipv4:10.0.0.7:1", "id")


def test_nothing_is_told_of_nothing() -> None:
    trail = Trail()
    assert trail.take() is None
    trail.count(ADA, *PLACE)
    assert trail.take()
    assert trail.take() is None


def test_uses_are_counted_and_their_first_call_is_told() -> None:
    trail = Trail()
    for number in range(3):
        trail.count(ADA, "PostModelOutputs", "ipv4:10.0.0.7:1", f"id-{number}")
    trail.count(STRANGER, *PLACE)
    told = trail.take()
    assert told is not None
    assert told["uses"] == [(*ADA, 3), (*STRANGER, 1)]
    first = {"method": "PostModelOutputs", "peer": "ipv4:10.0.0.7:1", "req_id": "id-0"}
    assert told["first"][0] == (ADA, first)
    trail.count(ADA, *PLACE)
    told = trail.take()
    assert told == {"uses": [(*ADA, 1)], "first": [], "refused": [], "left_out": 0}


def test_it_passes_through_json() -> None:
    trail = Trail()
    trail.count(ADA, *PLACE)
    trail.refused(STRANGER, *PLACE, "The key is not known.")
    told = json.loads(json.dumps(trail.take()))
    assert Use(*told["uses"][0][:-1]) == ADA
    ((use, place),) = told["refused"]
    assert Use(*use) == STRANGER
    assert place["why"] == "The key is not known."


def test_a_flood_of_refusals_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trails, "_REFUSALS", 2)
    trail = Trail()
    for _ in range(5):
        trail.count(STRANGER, *PLACE)
        trail.refused(STRANGER, *PLACE, "no")
    told = trail.take()
    assert told is not None
    assert (len(told["refused"]), told["left_out"]) == (2, 3)
    assert told["uses"] == [(*STRANGER, 5)]


def test_no_caller_makes_it_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound uses are counted together, by their codes: none is missing."""
    monkeypatch.setattr(trails, "_USES", 3)
    trail = Trail()
    for second in range(4):
        for number in range(10):
            trail.count(ADA._replace(version=f"{second}-{number}"), *PLACE)
        told = trail.take()
        assert told is not None
        assert len(told["uses"]) == 4
        assert told["uses"][-1] == ("other", "", "", "", 10000, 7)
        assert sum(use[-1] for use in told["uses"]) == 10
