"""`appliance workflows list` while the daemon does not run: what the files say."""

import json

from support.command import Command

GOOD = "workflow: {id: flow, nodes: [{id: a, model: {model_id: digits}}]}\n"


def put(appliance: Command, name: str, text: str) -> None:
    """A file in the folder beside the models."""
    folder = appliance.folder / "workflows"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def test_without_a_folder_there_is_nothing(appliance: Command) -> None:
    assert json.loads(appliance.good("workflows", "list", "--json")) == []


def test_files_are_listed_with_what_they_are_and_what_is_wrong(appliance: Command) -> None:
    put(appliance, "good.yaml", GOOD)
    put(appliance, "[red]bad.yaml", "workflow: {id: x}\n")
    result = appliance("workflows", "list")
    assert result.exit_code == 0
    assert "The daemon does not run" in result.stderr
    assert "appliance/main/flow" in result.stdout
    assert "[red]bad.yaml" in result.stdout  # a name is no markup
    assert "Field required" in result.stdout
    rows = {row["file"]: row for row in json.loads(appliance.good("workflows", "list", "--json"))}
    assert rows["good.yaml"]["nodes"] == 1
    assert not rows["good.yaml"]["problem"]
    assert "workflow.nodes: Field required" in rows["[red]bad.yaml"]["problem"]


def test_a_folder_that_is_configured_and_missing_is_a_problem(appliance: Command) -> None:
    appliance.file.write_text(
        appliance.file.read_text().replace("[catalog]\n", f'[catalog]\nworkflows = "{appliance.folder}/none"\n')
    )
    (row,) = json.loads(appliance.good("workflows", "list", "--json"))
    assert "is not there" in row["problem"]
