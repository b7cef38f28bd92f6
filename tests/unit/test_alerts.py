"""Alerts and their runbook: rules that read what there is, cases for each, and a page that leads on.

Where Prometheus is installed its own `promtool` judges rules and cases; what they are made of is held everywhere.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from appliance.cli.main import cli
from appliance.core.config import Config, Principal
from appliance.core.metrics import COUNTER, HISTOGRAM, PREFIX, Metrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "packaging" / "prometheus" / "inference-appliance.rules.yml"
CASES = ROOT / "tests" / "prometheus" / "rules.test.yml"

GROUPS: list[Any] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
ALERTS: dict[str, Any] = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
TESTS: list[Any] = yaml.safe_load(CASES.read_text(encoding="utf-8"))["tests"]
PAGES = sorted((ROOT / "docs" / "runbook").glob("*.md"))

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed; on Debian: apt-get install prometheus"
)


@needs_promtool
@pytest.mark.parametrize("command", [("check", "rules", RULES), ("test", "rules", CASES)])
def test_promtool_agrees(command: tuple[str, str, Path]) -> None:
    """With the rules, and with what they say of every case."""
    done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_read_what_there_is() -> None:
    """Names that the page has, and bounds that are a bucket's; else an alert would be silent for ever."""
    names = set()
    for name, family in Metrics().families.items():
        suffixes = {COUNTER: ("_total",), HISTOGRAM: ("_bucket", "_count", "_sum")}.get(family.kind, ("",))
        names |= {f"{PREFIX}_{name}{suffix}" for suffix in suffixes}
    recorded = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
    bounds = {f"{bound:g}" for bound in Metrics().request_seconds.bounds}
    for group in GROUPS:
        for rule in group["rules"]:
            asked = set(re.findall(rf"\b{PREFIX}[:_][a-z0-9_:]+", rule["expr"]))
            assert asked
            assert asked <= names | recorded, rule
            assert set(re.findall(r'le="([^"]*)"', rule["expr"])) <= bounds


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_every_alert_is_seen_to_fire_and_to_resolve(alert: str) -> None:
    """In one case: nothing, then the alert, then nothing again."""
    courses = [[bool(at["exp_alerts"]) for at in test["alert_rule_test"] if at["alertname"] == alert] for test in TESTS]
    assert any(course and not course[0] and True in course and not course[-1] for course in courses)


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_every_alert_leads_to_a_page(alert: str) -> None:
    """It names the alert, and says what it means, where to look and what to do."""
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"].endswith(".")
    text = (ROOT / rule["annotations"]["runbook"]).read_text(encoding="utf-8")
    assert alert in text.split("\n\n")[1].removeprefix("Alerts: ").split(", ")
    assert re.findall(r"^## (.*)$", text, re.M) == ["What it means", "Where to look", "What to do"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_say_what_is_true(page: Path) -> None:
    """Their alerts exist, and so do pages, verbs, settings and metrics that they name."""
    text = page.read_text(encoding="utf-8")
    assert set(text.split("\n\n")[1].removeprefix("Alerts: ").split(", ")) <= set(ALERTS)
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (page.parent / link).is_file(), link
    for words in re.findall(r"`appliance ([a-z -]+)", text):
        assert CliRunner().invoke(cli, [*words.split(), "--help"]).exit_code == 0, words
    for name in re.findall(rf"{PREFIX}_([a-z0-9_]+)", text):
        assert re.sub(r"_(total|bucket|count|sum)$", "", name) in Metrics().families, name
    for section, key in re.findall(
        r"`(tls|limits|engine|cache|processes|shutdown|catalog|metrics|audit)\.([a-z_]+)", text
    ):
        assert key in type(getattr(Config(), section)).model_fields, f"{section}.{key}"
    for key in re.findall(r"`(requests_per_second|concurrency|priority)", text):
        assert key in Principal.model_fields
