"""`appliance status` and `appliance top` on a terminal, as texts that are committed."""

import dataclasses
import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from support.command import Command
from support.status import NOW, document, model

from appliance.cli import admin
from appliance.cli.screen import duration, screen, size, span, spark
from appliance.daemon.status import Rates, Reason, Status

DATA = Path(__file__).parent / "data"


def rendered(status: Status, width: int = 140, models: int = 20, errors: int = 5) -> str:
    said = io.StringIO()
    Console(width=width, file=said).print(screen(status, models=models, errors=errors))
    return "".join(f"{line.rstrip()}\n" for line in said.getvalue().splitlines())


@pytest.mark.parametrize(
    ("name", "status", "width"),
    [
        ("degraded", document(), 140),
        ("narrow", document(), 80),
        ("healthy", document(health="healthy", reasons=[], failures=[], log=[], models=[model("digits")]), 140),
        (
            "unhealthy",
            document(
                health="unhealthy", phase="starting", models=[], failures=[], log=[], disks=[], certificates=[],
                more_reasons=7,
            ),
            140,
        ),
    ],
)  # fmt: skip
def test_a_screen_is_as_it_was(name: str, status: Status, width: int) -> None:
    """UPDATE_DOCS=1 writes them anew."""
    file, text = DATA / f"status-{name}.txt", rendered(status, width)
    if os.environ.get("UPDATE_DOCS"):
        file.write_text(text, "utf-8")
    assert text == file.read_text("utf-8")
    assert all(len(line) <= width for line in text.splitlines())


def test_what_the_appliance_says_neither_marks_up_nor_steers() -> None:
    evil = "[red]x[/red]\x1b[2J\u202e"
    status = document(
        host=evil,
        reasons=[Reason(evil, "x", "")],
        models=[dataclasses.replace(model("x"), bundle=evil, model="", device=evil)],
        log=[dataclasses.replace(document().log[0], text=evil)],
    )
    text = rendered(status, 200)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert text.count("[red]x[/red]\\x1b[2J\\u202e") == 4


def test_of_a_thousand_models_those_that_matter_are_shown() -> None:
    models = [model(f"m{number}", rates=Rates(float(number), 0, 0.1, 0.1)) for number in range(1000)]
    text = rendered(document(models=[*models, model("broken", "failed", "why")]), models=3)
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("appliance/")]
    assert shown == ["appliance/main/broken", "appliance/main/m999", "appliance/main/m998"]
    assert "and 998 more; 1000 of 1001 are ready" in text


def test_texts_of_numbers() -> None:
    assert [duration(s) for s in (None, 0.00004, 0.0184, 59.5)] == ["–", "40 µs", "18.4 ms", "59.5 s"]
    assert [size(n) for n in (None, 5, 1536, 3 * 2**40)] == ["–", "5 B", "1.5 KiB", "3.0 TiB"]
    assert [span(s) for s in (-5, 59, 7200, 3 * 86400)] == ["0 s", "59 s", "2 hours", "3 days"]
    assert spark([None, 0, 5, 10]) == " ▁▅█"
    assert spark([None] * 3) == "   "
    assert spark([0.0] * 40) == "▁" * 30


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the daemon answers."""
    answers = [json.dumps(document(), default=vars)]
    monkeypatch.setattr(admin, "text", lambda *_, **__: answers[0])
    return answers


@pytest.mark.parametrize(("health", "status"), [("healthy", 0), ("degraded", 1), ("unhealthy", 1)])
def test_the_exit_status_goes_by_health(appliance: Command, says: list[str], health: str, status: int) -> None:
    says[0] = json.dumps(document(health=health), default=vars)
    result = appliance("status")
    assert (result.exit_code, health in result.stdout) == (status, True)
    as_json = appliance("status", "--json")
    assert as_json.exit_code == status
    assert json.loads(as_json.stdout)["at"] == NOW


@pytest.mark.parametrize("answer", ["Not Found", "{}", '{"format": "2.0"}', "[]"])
def test_a_daemon_of_another_version_is_named_as_such(appliance: Command, says: list[str], answer: str) -> None:
    says[0] = answer
    assert "runs another version" in appliance.bad("status")
    assert "runs another version" in appliance.bad("top", "--once")


def test_what_a_newer_daemon_adds_is_passed_over(appliance: Command, says: list[str]) -> None:
    says[0] = json.dumps({**json.loads(says[0]), "more": 1})
    assert "edge-7" in appliance("status").stdout


def test_top_once_shows_the_same(appliance: Command, says: list[str]) -> None:
    assert "● degraded" not in appliance.good("top", "--once")
    assert "▲ degraded  edge-7, 0.1.0, up for 3 days" in appliance.good("top", "--once")


def test_top_asks_for_a_terminal(appliance: Command, says: list[str]) -> None:
    assert "needs a terminal" in appliance("top").stderr


def test_a_daemon_that_does_not_run(appliance: Command) -> None:
    assert "does not answer" in appliance.bad("status")
    assert "does not answer" in appliance.bad("top", "--once")
