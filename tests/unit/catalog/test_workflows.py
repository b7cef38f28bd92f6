"""Workflow files: read strictly, every problem at once; the folder kept in step, bad files hurting nobody."""

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import graphs
from support.waiting import eventually_async

from appliance.catalog.repository import Repository
from appliance.catalog.workflow_format import MAX_NODES, Workflow, read_workflow
from appliance.catalog.workflows import Workflows
from appliance.core.config import Catalog
from appliance.core.errors import UnknownWorkflow, WorkflowInvalid
from appliance.core.types import ModelKey

Write = Callable[..., Path]


def node(name: str, *inputs: str, model: str = "digits", **more: Any) -> dict[str, Any]:
    """A node; keywords beginning with `model_` go into its model."""
    inside = {key: more.pop(key) for key in list(more) if key.startswith("model_")}
    wanted: dict[str, Any] = {"id": name, "model": {"model_id": model, **inside}, **more}
    if inputs:
        wanted["node_inputs"] = [{"node_id": other} for other in inputs]
    return wanted


def content(*nodes: Mapping[str, Any], name: str = "flow", **more: Any) -> dict[str, Any]:
    """What a file says."""
    return {"workflow": {"id": name, "nodes": list(nodes) or [node("a")], **more}}


def nested(depth: int) -> Any:
    """Lists in lists."""
    return [nested(depth - 1)] if depth else []


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a workflow file: text as it is, else as YAML."""
    (tmp_path / "workflows").mkdir()

    def write(what: Any, file: str = "flow.yaml") -> Path:
        path = tmp_path / "workflows" / file
        temporary = path.with_suffix(".tmp")
        temporary.write_text(what if isinstance(what, str) else yaml.safe_dump(what), encoding="utf-8")
        temporary.replace(path)
        return path

    return write


def read(path: Path) -> Workflow:
    """As the appliance does."""
    return read_workflow(path, "appliance", "main")


# ---- the format ------------------------------------------------------------------------------------------------------


def test_a_file_of_clarifais_format_is_read(write: Write) -> None:
    """As its SDK exports them, and as its examples are written."""
    path = write(
        """
workflow:
  id: digits-twice
  nodes:
    - id: first
      model: {model_id: digits, model_version_id: '1', user_id: ada, app_id: lab}
    - id: second
      model:
        model_id: pair
        model_type_id: tensor-to-tensor
        output_info: {params: {max_concepts: 3, threshold: 0.5}}
      node_inputs:
        - node_id: first
      suppress_output: true
"""
    )
    workflow = read(path)
    assert str(workflow) == "appliance/main/digits-twice"
    assert workflow.changed_at == path.stat().st_mtime
    first, second = workflow.nodes
    assert (first.id, first.model, first.version) == ("first", ModelKey("ada", "lab", "digits"), "1")
    assert (first.inputs, first.suppressed) == ((), False)
    assert second.model == ModelKey("appliance", "main", "pair")
    assert (second.version, second.inputs, second.suppressed) == ("", ("first",), True)
    assert second.model_type_id == "tensor-to-tensor"
    assert second.params == {"threshold": 0.5}
    assert second.output_config.max_concepts == 3


def test_an_owner_in_the_file_is_that_of_its_models_too(write: Write) -> None:
    workflow = read(write(content(user_id="ada", app_id="lab", description="Reads.")))
    assert str(workflow) == "ada/lab/flow"
    assert workflow.nodes[0].model == ModelKey("ada", "lab", "digits")
    assert workflow.description == "Reads."


def test_numbers_may_be_ids(write: Write) -> None:
    """YAML makes numbers of 1 and 2."""
    workflow = read(write(content(node("1", model_version_id=2), node("b", "1"))))
    assert workflow.nodes[0].version == "2"
    assert workflow.nodes[1].inputs == ("1",)


def test_the_version_stands_for_what_the_file_says(write: Write) -> None:
    """Not for how, nor when: comments and order of keys do not matter."""
    first = read(write(content(node("a"))))
    again = read(write("# a comment\nworkflow: {nodes: [{model: {model_id: digits}, id: a}], id: flow}\n"))
    other = read(write(content(node("a", model_version_id="1"))))
    assert first.version == again.version != other.version
    assert len(first.version) == 32


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ([node("a"), node("b", "a"), node("c", "b")], "abc"),
        ([node("c", "b"), node("b", "a"), node("a")], "abc"),
        ([node("d", "b", "c"), node("b", "a"), node("c", "a"), node("a")], "abcd"),
        ([node("x"), node("b", "a"), node("a"), node("y")], "xaby"),
    ],
)
def test_nodes_come_behind_what_they_need(write: Write, nodes: list[dict[str, Any]], wanted: str) -> None:
    """Whatever their order in the file, which else is kept."""
    assert "".join(found.id for found in read(write(content(*nodes))).nodes) == wanted


def test_limits_may_be_parameters_or_output_config(write: Write) -> None:
    """For a node or for its model."""
    limits = {"max_concepts": 2, "min_value": 0.5, "select_concepts": ["zero", {"id": "1"}]}
    proto = {**limits, "select_concepts": [{"name": "zero"}, {"id": "1"}]}
    forms = [
        node("a", output_info={"params": limits}),
        node("a", output_info={"output_config": proto}),
        node("a", model_output_info=None),
        node("a", output_info={"params": {"min_value": 0.5}, "output_config": {"max_concepts": 2}}),
    ]
    forms[2]["model"] = {"model_id": "digits", "output_info": {"params": limits}}
    made = [read(write(content(form))).nodes[0] for form in forms]
    for found in made[:3]:
        assert (found.output_config.max_concepts, found.output_config.min_value) == (2, 0.5)
        assert [(c.id, c.name) for c in found.output_config.select_concepts] == [("", "zero"), ("1", "")]
        assert not found.params
    assert (made[3].output_config.max_concepts, made[3].output_config.min_value) == (2, 0.5)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("", "must be a mapping with a `workflow:` section; see docs/workflows.md"),
        ("[1, 2]", "must be a mapping"),
        ("workflow: [", "is not YAML"),
        ("model: {id: x}", "workflow: Field required"),
        ("workflow: !!python/object/apply:os.system ['true']", "is not YAML"),
        (content(), "workflow.steps: is not a key we know"),
        (content(node("a", color="red")), "workflow.nodes.0.color: is not a key we know"),
        (content(node("a", model_name="x")), "workflow.nodes.0.model.model_name: is not a key we know"),
        (content(node("a", output_info={"data": {}})), "output_info.data: is not a key we know"),
        (content(node("a", output_info={"output_config": {"language": "en"}})), "language: is not a key we know"),
        (content(node("a", node_inputs=[{"node": "b"}])), "node_inputs.0.node: is not a key we know"),
        (content(name="a b"), "workflow.id: "),
        (content(name=""), "workflow.id: "),
        ({"workflow": {"id": "x", "nodes": []}}, "workflow.nodes: "),
        ({"workflow": {"id": "x"}}, "workflow.nodes: Field required"),
        ({"workflow": {"id": "x", "nodes": [{"id": "a"}]}}, "workflow.nodes.0.model: Field required"),
        ({"workflow": {"id": "x", "nodes": [{"id": "a", "model": {}}]}}, "model_id: Field required"),
        (content(node("")), "workflow.nodes.0.id: "),
        (content(node("x" * 65)), "workflow.nodes.0.id: "),
        (content(node("a\nb")), "cannot be shown on one line"),
        (content(node("a\x07")), "holds a control character"),
        (content(node("a"), node("a")), "id 'a' is given twice"),
        (content(node("a", "b")), "node 'a' takes the output of 'b', and there is no such node"),
        (content(node("a", "a")), "in a circle: 'a' ← 'a'"),
        (content(node("z"), node("a", "b"), node("b", "c"), node("c", "a")), "'a' ← 'b' ← 'c' ← 'a'"),
        (content(node("x", "a"), node("a", "b"), node("b", "a")), "'a' ← 'b' ← 'a'"),
        (content(node("a"), node("b", "a", "a")), "node 'b' takes the output of 'a' twice"),
        (content(*(node(f"n{i}") for i in range(MAX_NODES + 1))), f"at most {MAX_NODES}"),
        (content(node("a", output_info={"params": {"max_concepts": 201}})), "params.max_concepts: "),
        (content(node("a", output_info={"params": {"max_concepts": 0}})), "params.max_concepts: "),
        (content(node("a", output_info={"params": {"min_value": 1.5}})), "params.min_value: "),
        (content(node("a", output_info={"output_config": {"min_value": float("nan")}})), "min_value: "),
        (content(node("a", output_info={"output_config": {"select_concepts": [{}]}})), "needs an id or a name"),
        (
            content(node("a", output_info={"params": {"max_concepts": 1}, "output_config": {"max_concepts": 1}})),
            "max_concepts is given in params and in output_config",
        ),
        ("workflow: {id: x, nodes: [{id: a, model: {model_id: d}, output_info: {params: {d: 2024-01-01}}}]}", "params"),
        (content(node("a", output_info={"params": {"x": 10**400}})), "finite numbers"),
        (content(node("a", output_info={"params": {"x": {1: 2}}})), "mappings by text"),
        (content(node("a", output_info={"params": {"x": nested(20)}})), "16 deep at most"),
        ("# " + "x" * 2**20, "make several workflows of it"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_bad_file_is_refused_with_the_place_and_the_reason(write: Write, what: Any, words: str) -> None:
    """And with its name."""
    if words == "workflow.steps: is not a key we know":
        what["workflow"]["steps"] = 1
    path = write(what)
    with pytest.raises(WorkflowInvalid) as caught:
        read(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_output_info_cannot_be_given_twice(write: Write) -> None:
    """For the node and for its model."""
    twice = node("a", output_info={"params": {"x": 1}})
    twice["model"]["output_info"] = {"params": {"x": 2}}
    with pytest.raises(WorkflowInvalid, match="for the node and for its model; keep one"):
        read(write(content(twice)))


def test_every_problem_is_told_at_once(write: Write) -> None:
    """One line each would be several trials."""
    with pytest.raises(WorkflowInvalid) as caught:
        read(write(content(node("a", "x"), node("b", "y"), node("b"))))
    assert all(words in str(caught.value) for words in ("'x'", "'y'", "'b' is given twice"))


def test_aliases_are_bounded(write: Write) -> None:
    """As in a bundle's config."""
    aliases = "\n".join(f"    - {{id: n{i}, model: *m}}" for i in range(30))
    with pytest.raises(WorkflowInvalid, match="aliases"):
        read(write(f"workflow:\n  id: x\n  nodes:\n    - {{id: a, model: &m {{model_id: d}}}}\n{aliases}\n"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Nor a folder read."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml"):
        with pytest.raises(WorkflowInvalid, match="not a regular file"):
            read(tmp_path / name)


# ---- the folder ------------------------------------------------------------------------------------------------------


def watcher(tmp_path: Path, repository: Repository[Any] | None = None, **settings: Any) -> Workflows:
    """The workflows of a catalog whose root is `models`; files count as settled at once."""
    return Workflows(Catalog(root=tmp_path / "models", state_dir=tmp_path, **{"settle_s": 0, **settings}), repository)


@pytest.fixture
def repository(tmp_path: Path) -> Repository[Any]:
    """An empty catalog that was looked at; nothing is loaded."""
    (tmp_path / "models").mkdir()

    async def load(*_: Any) -> Any:
        raise WorkflowInvalid("nothing is loaded here")

    return Repository(Catalog(root=tmp_path / "models", state_dir=tmp_path, settle_s=0), load)


def ids(workflows: Workflows) -> list[str]:
    """What is served."""
    return [workflow.id for workflow in workflows.all]


async def test_files_of_the_folder_beside_the_models_are_served(tmp_path: Path, write: Write) -> None:
    """Both endings of YAML; hidden and other files are nobody's business."""
    write(content(name="one"), "one.yaml")
    write(content(name="two"), "two.yml")
    write("not: [yaml", ".hidden.yaml")
    write("not: [yaml", "notes.txt")
    workflows = watcher(tmp_path)
    await workflows.look()
    assert ids(workflows) == ["one", "two"]
    assert workflows.find("", "", "one").version
    assert workflows.find("appliance", "main", "two").id == "two"


async def test_no_folder_is_no_workflow(tmp_path: Path) -> None:
    """Nobody has to have any."""
    workflows = watcher(tmp_path)
    await workflows.look()
    await asyncio.wait_for(workflows.wait_settled(), 10)
    assert workflows.all == []
    assert workflows.problems() == {}
    with pytest.raises(UnknownWorkflow, match="no workflow \\*/\\*/flow"):
        workflows.find("", "", "flow")


async def test_a_folder_that_is_configured_must_be_there(tmp_path: Path, write: Write) -> None:
    """When it goes, what was read stays; when it comes back, all is well."""
    write(content())
    folder = tmp_path / "workflows"
    workflows = watcher(tmp_path, workflows=folder)
    await workflows.look()
    folder.rename(tmp_path / "away")
    await workflows.look()
    assert ids(workflows) == ["flow"]
    assert "is not there" in workflows.problems()["workflows"]
    assert any("is not there" in str(row["problem"]) for row in workflows.describe())
    (tmp_path / "away").rename(folder)
    await workflows.look()
    assert "workflows" not in workflows.problems()


async def test_changes_are_taken_over_and_removals_too(tmp_path: Path, write: Write) -> None:
    """Also another folder, as a reload brings it."""
    path = write(content(node("a")))
    workflows = watcher(tmp_path)
    await workflows.look()
    before = workflows.find("", "", "flow")
    write(content(node("b")))
    await workflows.look()
    after = workflows.find("", "", "flow")
    assert [found.id for found in after.nodes] == ["b"]
    assert after.version != before.version
    path.unlink()
    await workflows.look()
    assert workflows.all == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.yaml").write_text(yaml.safe_dump(content(name="x")))
    workflows.settings = workflows.settings.model_copy(update={"workflows": tmp_path / "other"})
    await workflows.look()
    assert ids(workflows) == ["x"]


async def test_a_file_that_became_bad_keeps_what_it_said(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """With the reason where operators look; and a good one heals it."""
    write(content(node("a")))
    write("workflow: 1", "bad.yaml")
    workflows = watcher(tmp_path)
    await workflows.look()
    assert ids(workflows) == ["flow"]
    write(content(node("a", "nobody")))
    await workflows.look()
    assert [found.id for found in workflows.find("", "", "flow").nodes] == ["a"]
    problems = workflows.problems()
    assert "no such node" in problems["workflows/flow.yaml"]
    assert "workflow: " in problems["workflows/bad.yaml"]
    assert "what it said before goes on" in caplog.text
    rows = {row["file"]: row for row in workflows.describe()}
    assert rows["flow.yaml"]["workflow"] == "appliance/main/flow"
    assert "no such node" in str(rows["flow.yaml"]["problem"])
    assert rows["bad.yaml"]["workflow"] == ""
    write(content(node("a"), node("b", "a")))
    await workflows.look()
    assert workflows.describe()[1]["nodes"] == 2


async def test_a_file_is_read_once_it_is_still(tmp_path: Path, write: Write) -> None:
    """Somebody may still write it."""
    write(content())
    workflows = watcher(tmp_path, settle_s=3600)
    await workflows.look()
    assert workflows.all == []
    assert workflows.describe()[0]["problem"] == "its file is still changing"
    workflows.settings = workflows.settings.model_copy(update={"settle_s": 0.0})
    await workflows.look()
    assert ids(workflows) == ["flow"]


async def test_two_files_cannot_be_the_same_workflow(tmp_path: Path, write: Write, repository: Repository[Any]) -> None:
    """The one that is served goes on; when it goes, the other one takes its place."""
    first = write(content(node("a")), "m.yaml")
    workflows = watcher(tmp_path)
    await workflows.look()
    write(content(node("b")), "a.yaml")
    await workflows.look()
    assert [found.id for found in workflows.find("", "", "flow").nodes] == ["a"]
    assert "which m.yaml is already" in workflows.problems()["workflows/a.yaml"]
    first.unlink()
    await workflows.look()
    assert [found.id for found in workflows.find("", "", "flow").nodes] == ["b"]


async def test_a_workflow_may_be_renamed_and_its_id_taken(tmp_path: Path, write: Write) -> None:
    """By a file that wanted it before."""
    write(content(), "b.yaml")
    write(content(), "c.yaml")
    workflows = watcher(tmp_path)
    await workflows.look()
    write(content(name="other"), "b.yaml")
    await workflows.look()
    await workflows.look()
    assert ids(workflows) == ["flow", "other"]


async def test_ids_of_several_owners_must_be_told_apart(tmp_path: Path, write: Write) -> None:
    """As of models."""
    write(content(), "a.yaml")
    write(content(user_id="ada"), "b.yaml")
    workflows = watcher(tmp_path)
    await workflows.look()
    with pytest.raises(UnknownWorkflow, match="Several workflows match"):
        workflows.find("", "", "flow")
    assert workflows.find("ada", "", "flow").user_id == "ada"


async def test_models_that_are_not_there_are_told_and_may_come_later(
    tmp_path: Path, write: Write, repository: Repository[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """In any order; the workflow is there meanwhile."""
    write(content(node("a", model="colours"), node("b", "a", model="tensor", model_type_id="text-embedder")))
    workflows = watcher(tmp_path, repository)
    await workflows.look()
    assert workflows.problems() == {}  # the catalog was not read yet
    await repository.look()
    problem = workflows.problems()["workflows/flow.yaml"]
    assert "node 'a': There is no model appliance/main/colours" in problem
    assert "node 'b': There is no model appliance/main/tensor" in problem
    for name in ("colours", "tensor"):
        graphs.write_raw(tmp_path / "models" / name)
        (tmp_path / "models" / name / "config.yaml").write_text(
            yaml.safe_dump({"model": {"id": name, "model_type_id": "tensor-to-tensor"}, "onnx": {}})
        )
    await repository.look()
    problem = workflows.problems()["workflows/flow.yaml"]
    assert "node 'a'" not in problem
    assert "is a tensor-to-tensor, and model_type_id says text-embedder" in problem
    write(content(node("z", model="nothing")))
    await workflows.look()
    assert "node 'z': There is no model appliance/main/nothing" in caplog.text
    await repository.close()


async def test_the_watch_goes_on_whatever_a_look_finds(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And looks at once when it is woken."""
    workflows = watcher(tmp_path, scan_interval_s=3600)
    looks: list[int] = []
    real = workflows._look

    async def look() -> None:
        looks.append(1)
        if len(looks) == 1:
            raise OSError("a disk error")
        await real()

    monkeypatch.setattr(workflows, "_look", look)
    write(content())
    watch = asyncio.create_task(workflows.run())
    try:
        await eventually_async(lambda: looks)
        workflows.wake()
        await eventually_async(lambda: workflows.all)
    finally:
        watch.cancel()
    assert "looking at the workflows failed" in caplog.text
