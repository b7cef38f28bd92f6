"""The format of a workflow's file: Clarifai's own YAML, read strictly; docs/workflows.md explains the keys.

What a file says is judged by itself here: keys, limits, the graph of its nodes. Whether there are such models is not.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance.catalog.bundle import read_yaml, unshowable
from appliance.core.config import Name, said
from appliance.core.errors import BundleInvalid, WorkflowInvalid
from appliance.core.files import printable
from appliance.core.types import ModelKey

MAX_NODES = 64
MAX_CONCEPTS = 200
MAX_DEPTH = 16
"""Levels of lists and mappings in a node's parameters."""

_LIMITS = ("max_concepts", "min_value", "select_concepts")
"""Parameters that are limits of a classifier's answer; `output_config` has them too."""


# ---- the format ------------------------------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class SelectedConcept(_Part):
    """A concept by id, by name, or both."""

    id: str = ""
    name: str = ""

    @model_validator(mode="after")
    def _check(self) -> "SelectedConcept":
        if not self.id and not self.name:
            raise ValueError("needs an id or a name")
        return self


class OutputConfig(_Part):
    """How a node's answer is cut; what is None is not said."""

    max_concepts: Annotated[int, Field(ge=1, le=MAX_CONCEPTS)] | None = None
    min_value: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    select_concepts: tuple[SelectedConcept, ...] = ()


class OutputInfo(_Part):
    """What a node asks of its model."""

    params: dict[str, Any] = {}
    output_config: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _check(self) -> "OutputInfo":
        if not _is_plain(self.params):
            raise ValueError(
                "params must be texts, finite numbers, truth values, lists and mappings by text, "
                f"{MAX_DEPTH} deep at most"
            )
        return self


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether a parameter can be said in a request (a protobuf Struct, whose numbers are doubles)."""
    if isinstance(value, dict):
        return depth < MAX_DEPTH and all(isinstance(k, str) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return depth < MAX_DEPTH and all(_is_plain(inner, depth + 1) for inner in value)
    if isinstance(value, int | float):
        return -sys.float_info.max <= value <= sys.float_info.max
    return value is None or isinstance(value, str)


class _ModelSection(_Part):
    model_id: Name
    model_version_id: Name | None = None
    user_id: Name | None = None
    app_id: Name | None = None
    model_type_id: str | None = None
    description: str = ""
    output_info: OutputInfo | None = None


class _NodeInput(_Part):
    node_id: Annotated[str, Field(min_length=1)]


class _NodeSection(_Part):
    id: Annotated[str, Field(min_length=1, max_length=64)]
    model: _ModelSection
    node_inputs: tuple[_NodeInput, ...] = ()
    output_info: OutputInfo | None = None
    suppress_output: bool = False

    @model_validator(mode="after")
    def _check(self) -> "_NodeSection":
        if printable(self.id) != self.id:
            raise ValueError(f"id {printable(self.id)!r} holds what cannot be shown on one line; take it out")
        if self.output_info is not None and self.model.output_info is not None:
            raise ValueError("output_info is given twice, for the node and for its model; keep one of them")
        return self


class _WorkflowSection(_Part):
    id: Name
    user_id: Name | None = None
    app_id: Name | None = None
    description: str = ""
    nodes: Annotated[tuple[_NodeSection, ...], Field(min_length=1, max_length=MAX_NODES)]


class _File(_Part):
    workflow: _WorkflowSection


# ---- what it says ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Node:
    """One model of a workflow, and which nodes' outputs it takes; without any it takes the request's input.

    Attributes:
        version: of the model; "" for the newest that is ready.
        model_type_id: what the model must be; "" for anything.
        params: arguments of the model's method, beside the limits in `output_config`.
    """

    id: str
    model: ModelKey
    version: str
    inputs: tuple[str, ...]
    suppressed: bool
    model_type_id: str
    params: Mapping[str, Any]
    output_config: OutputConfig


@dataclass(frozen=True, slots=True)
class Workflow:
    """A workflow, checked as far as its file goes.

    Attributes:
        nodes: each behind all those whose outputs it takes.
        version: 32 hex digits that stand for what the file says; another content is another version.
        changed_at: Unix time of the file.
    """

    user_id: str
    app_id: str
    id: str
    version: str
    description: str
    nodes: tuple[Node, ...]
    changed_at: float

    def __str__(self) -> str:
        return f"{self.user_id}/{self.app_id}/{self.id}"


def read_workflow(path: Path, user_id: str, app_id: str) -> Workflow:
    """Read one file.

    Args:    user_id, app_id: owner of the workflow and of its models, where the file names none.
    Raises:  WorkflowInvalid: every problem of the file at once. OSError.
    """
    try:
        raw = read_yaml(path, "`workflow:` section; see docs/workflows.md", "make several workflows of it")
    except BundleInvalid as error:
        raise WorkflowInvalid(str(error)) from error
    problems = list(unshowable(raw))[:20]
    if problems:
        raise WorkflowInvalid(f"{path} has problems: {'; '.join(problems)}.")
    try:
        section = _File.model_validate(raw).workflow
    except ValidationError as error:
        problems = [_sentence(entry) for entry in error.errors()]
        raise WorkflowInvalid(f"{path} has problems: {'; '.join(problems)}.") from error
    user_id, app_id = section.user_id or user_id, section.app_id or app_id
    nodes = []
    for index, node in enumerate(section.nodes):
        try:
            nodes.append(_node(node, user_id, app_id))
        except ValueError as error:
            problems.append(f"workflow.nodes.{index}: {error}")
    problems += _graph_problems(section.nodes)
    if problems:
        raise WorkflowInvalid(f"{path} has problems: {'; '.join(problems)}.")
    content = json.dumps([section.model_dump(mode="json"), user_id, app_id], sort_keys=True)
    return Workflow(
        user_id,
        app_id,
        section.id,
        hashlib.sha256(content.encode()).hexdigest()[:32],
        section.description,
        _in_order(nodes),
        path.stat().st_mtime,
    )


def _sentence(entry: Any) -> str:
    """One pydantic error: where, what, and for an unknown key so."""
    where = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        return f"{printable(where)}: is not a key we know"
    return f"{printable(where)}: {said(entry)}"


def _node(section: _NodeSection, user_id: str, app_id: str) -> Node:
    """Raises: ValueError: a limit is said twice, or out of its range."""
    model = section.model
    info = section.output_info or model.output_info or OutputInfo()
    params = dict(info.params)
    limits = {name: params.pop(name) for name in _LIMITS if name in params}
    config = info.output_config
    if limits:
        twice = [name for name in limits if name in config.model_fields_set]
        if twice:
            raise ValueError(f"output_info: {', '.join(twice)} is given in params and in output_config; keep one")
        concepts = limits.get("select_concepts")
        if isinstance(concepts, list):
            limits["select_concepts"] = [{"name": c} if isinstance(c, str) else c for c in concepts]
        try:
            config = OutputConfig.model_validate({**config.model_dump(exclude_unset=True), **limits})
        except ValidationError as error:
            raise ValueError("; ".join(f"output_info.params.{_sentence(e)}" for e in error.errors())) from error
    return Node(
        id=section.id,
        model=ModelKey(model.user_id or user_id, model.app_id or app_id, model.model_id),
        version=model.model_version_id or "",
        inputs=tuple(given.node_id for given in section.node_inputs),
        suppressed=section.suppress_output,
        model_type_id=model.model_type_id or "",
        params=params,
        output_config=config,
    )


def _graph_problems(nodes: Sequence[_NodeSection]) -> list[str]:
    """What keeps the nodes from being a graph without circles."""
    ids = [node.id for node in nodes]
    problems = [f"workflow.nodes: id {name!r} is given twice" for name in sorted({i for i in ids if ids.count(i) > 1})]
    for node in nodes:
        inputs = [given.node_id for given in node.node_inputs]
        problems += [
            f"node {node.id!r} takes the output of {name!r}, and there is no such node"
            for name in inputs
            if name not in ids
        ]
        problems += [
            f"node {node.id!r} takes the output of {name!r} twice"
            for name in sorted({i for i in inputs if inputs.count(i) > 1})
        ]
    if not problems:
        circle = _circle({node.id: [given.node_id for given in node.node_inputs] for node in nodes})
        if circle:
            problems.append(f"nodes take each other's outputs in a circle: {' ← '.join(map(repr, circle))}")
    return problems


def _circle(inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """A circle among the nodes, its first node again at the end; empty when there is none."""
    left = dict(inputs)
    while left:
        free = [name for name, needed in left.items() if not any(other in left for other in needed)]
        if not free:
            break
        for name in free:
            del left[name]
    if not left:
        return []
    path = [next(iter(left))]
    while path[-1] not in path[:-1]:  # every node that is left needs another one that is left
        path.append(next(name for name in left[path[-1]] if name in left))
    return path[path.index(path[-1]) :]


def _in_order(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Each node behind those that it needs, else as in the file."""
    ordered: list[Node] = []
    waiting = list(nodes)
    while waiting:
        known = {node.id for node in ordered}
        ready = next(node for node in waiting if known.issuperset(node.inputs))
        ordered.append(ready)
        waiting.remove(ready)
    return tuple(ordered)
