"""The metrics as a documented interface: the page that operators read is what the program exposes."""

import itertools
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from appliance.cli.main import cli
from appliance.cli.metrics import reference
from appliance.core.metrics import COUNTER, GAUGE, HISTOGRAM, VERSION, Metrics

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"

UNITS = ("seconds", "bytes", "ratio", "celsius", "watts", "hertz", "rows")
"""Base units, as Prometheus's conventions have them, and our rows; what has none counts things."""

ABBREVIATED = re.compile(r"_(ms|us|ns|milliseconds|microseconds|kb|mb|mib|gb|percent)(_|$)")


def test_the_page_holds_the_interface() -> None:
    """Names, types, labels, help and buckets. One that differs changes somebody's dashboards: VERSION says how much.

    `appliance metrics --into docs/metrics.md` writes it anew.
    """
    assert reference() in PAGE.read_text(encoding="utf-8")
    assert f"\nVersion {VERSION}. " in reference()


def test_names_follow_the_conventions() -> None:
    """Base units at the end, no type in a counter's name but _total, which the page adds; labels of one vocabulary."""
    labels = set()
    for name, family in Metrics().families.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*[a-z]", name)
        assert not ABBREVIATED.search(name), name
        assert not name.endswith("_total"), name
        assert family.text.endswith("."), name
        assert family.kind in (COUNTER, GAUGE, HISTOGRAM)
        if family.kind == HISTOGRAM:
            assert name.endswith(UNITS), name
            assert list(family.bounds) == sorted(set(family.bounds))
        labels |= set(family.label_names)
    own = {"model", "version", "method", "code", "reason", "principal", "state", "result", "process", "device", "uuid"}
    assert labels == own | {"outcome", "task", "sha256", "providers", "role", "issuer", "folder", "api_base"}


def test_durations_suit_models_of_50_us_and_of_a_minute() -> None:
    """Each is far from both ends."""
    bounds = Metrics().compute_seconds.bounds
    assert sum(bound <= 50e-6 for bound in bounds) >= 3
    assert bounds[-1] >= 60
    assert all(after / before <= 3 for before, after in itertools.pairwise(bounds))


def test_the_tables_are_printed_or_written(tmp_path: Path) -> None:
    """Into a page that has a place for them, and nothing else of it changes."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n", encoding="utf-8")
    runner = CliRunner()
    assert runner.invoke(cli, ["metrics"]).output == reference()
    for _ in range(2):
        assert runner.invoke(cli, ["metrics", "--into", str(page)]).exit_code == 0
        text = page.read_text(encoding="utf-8")
        assert text == f"before\n<!-- tables -->\n{reference()}<!-- end of tables -->\nafter\n"


@pytest.mark.parametrize("text", [None, "no place\n", "<!-- tables -->\n"])
def test_a_page_without_a_place_is_left_alone(tmp_path: Path, text: str | None) -> None:
    """With a sentence and the operator's exit code."""
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(cli, ["metrics", "--into", str(page)])
    assert result.exit_code == 2
    assert str(page) in result.output
    assert not page.exists() or page.read_text(encoding="utf-8") == text
