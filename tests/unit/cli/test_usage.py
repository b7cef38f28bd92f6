"""`appliance usage export`: what callers used, whole or added up, as JSON and CSV."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.command import Command

from appliance.core.usage import Amounts, UsageKey
from appliance.orchestrator.usage_store import FILE, Period, Place, UsageStore

KEY = UsageKey("line-3", "acme", "main", "digits", "1", "PostModelOutputs")
DAY = 1_796_083_200
"""2026-12-01."""


@pytest.fixture
def used(appliance: Command, tmp_path: Path) -> Command:
    """An appliance that was used."""
    store = UsageStore(tmp_path / "state" / FILE)
    other = KEY._replace(principal="ümlaut,\n", version="2")
    store.add(
        {
            Place(Period.MONTH, DAY - 30 * 86400, KEY): Amounts(calls=100, seconds=1.5),
            Place(Period.MINUTE, DAY, KEY): Amounts(calls=1, inputs=2, bytes_in=10, seconds=0.25),
            Place(Period.MINUTE, DAY + 60, KEY): Amounts(calls=2),
            Place(Period.MINUTE, DAY + 3600, other): Amounts(calls=4, calls_failed=1),
        }
    )
    store.close()
    return appliance


def export(appliance: Command, *arguments: str) -> list[dict[str, Any]]:
    """As it is printed."""
    return [json.loads(line) for line in appliance.good("usage", "export", *arguments).splitlines()]


def test_a_record_a_line(used: Command) -> None:
    records = export(used)
    assert [(record["start"], record["period"], record["calls"]) for record in records] == [
        ("2026-11-01T00:00:00Z", "month", 100),
        ("2026-12-01T00:00:00Z", "minute", 1),
        ("2026-12-01T00:01:00Z", "minute", 2),
        ("2026-12-01T01:00:00Z", "minute", 4),
    ]
    assert records[1] == {
        "start": "2026-12-01T00:00:00Z",
        "period": "minute",
        **KEY._asdict(),
        **Amounts(calls=1, inputs=2, bytes_in=10, seconds=0.25)._asdict(),
    }


def test_the_same_as_csv(used: Command) -> None:
    rows = list(csv.DictReader(io.StringIO(used.good("usage", "export", "--format", "csv"), newline="")))
    assert [{name: str(value) for name, value in record.items()} for record in export(used)] == rows
    assert rows[3]["principal"] == "ümlaut,\n"


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (["--since", "2026-12-01"], [1, 2, 4]),
        (["--since", "2026-12-01T00:01:00Z"], [2, 4]),
        (["--since", "2026-12-01T01:01:00+01:00"], [2, 4]),
        (["--since", "2026-12-01", "--until", "2026-12-01T01:00"], [1, 2]),
        (["--until", "2026-11-01"], []),
    ],
)
def test_a_record_belongs_to_the_time_that_it_begins_in(used: Command, arguments: list[str], calls: list[int]) -> None:
    assert [record["calls"] for record in export(used, *arguments)] == calls


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (["principal"], [{"principal": "line-3", "calls": 103}, {"principal": "ümlaut,\n", "calls": 4}]),
        (["model"], [{"model": "digits", "calls": 107}]),
        (
            ["hour", "version"],
            [
                {"start": "2026-12-01T00:00:00Z", "period": "hour", "version": "1", "calls": 3},
                {"start": "2026-12-01T01:00:00Z", "period": "hour", "version": "2", "calls": 4},
                {"start": "2026-11-01T00:00:00Z", "period": "month", "version": "1", "calls": 100},
            ],
        ),
        (
            ["month"],
            [
                {"start": "2026-11-01T00:00:00Z", "period": "month", "calls": 100},
                {"start": "2026-12-01T00:00:00Z", "period": "month", "calls": 7},
            ],
        ),
    ],
)
def test_by_adds_up_the_rest(used: Command, by: list[str], expected: list[dict[str, Any]]) -> None:
    records = export(used, *(word for name in by for word in ("--by", name)))
    assert [{name: record[name] for name in row} for record, row in zip(records, expected, strict=True)] == expected
    assert set(records[0]) == set(expected[0]) | set(Amounts._fields)


def test_what_cannot_be_is_said(appliance: Command) -> None:
    assert "is not there; the daemon makes it" in appliance.bad("usage", "export")
    for arguments in (["--since", "yesterday"], ["--by", "year"], ["--by", "hour", "--by", "day"], ["--format", "xml"]):
        assert appliance("usage", "export", *arguments).exit_code == 2
