"""docs/install.md: short enough, and every command in it is one that there is. `make e2e` executes the marked ones."""

import re
import shlex
from pathlib import Path

import click
import pytest

from appliance.cli import exits
from appliance.cli.main import cli

PAGE = (Path(__file__).parents[3] / "docs" / "install.md").read_text(encoding="utf-8")


def commands(*marks: str) -> list[str]:
    """Lines of the blocks with one of these marks ("" is none), without comments."""
    found = []
    for mark, block in re.findall(r"```sh ?(\w*)\n(.*?)```", PAGE, re.DOTALL):
        if mark in marks:
            found += [line for line in block.splitlines() if line and not line.startswith("#")]
    return found


@pytest.mark.parametrize("package", ["deb", "rpm"])
def test_a_first_predict_takes_ten_commands_at_most(package: str) -> None:
    steps = commands(package, "both")
    assert 3 <= len(steps) <= 10
    assert steps[0].split()[0] in ("apt-get", "dnf")
    assert steps[-1].startswith("appliance predict")


def test_every_verb_and_flag_on_the_page_exists() -> None:
    inline = re.findall(r"`(appliance [^`]*)`", PAGE)
    lines = [line for line in commands("", "deb", "rpm", "both") if line.startswith("appliance ")]
    assert len(lines) > 5
    for line in [*lines, *inline]:
        words = shlex.split(" ".join(line.split()), comments=True)[1:]
        command: click.Command = cli
        while isinstance(command, click.Group) and words:
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, line
            command = found
        flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= flags, line


def test_the_exit_statuses_are_those_that_there_are() -> None:
    rows = re.findall(r"^\| (\d) \|", PAGE, re.MULTILINE)
    assert [int(row) for row in rows] == [status for status, _, kind in exits.STATUSES if status >= exits.OPERATOR]
