"""Workflows: models joined to a graph, in Clarifai's own YAML format, read from a folder and kept in step with it.

One file a workflow; docs/workflows.md explains the keys. A file is read once nobody writes it any more. One that is bad
has its reason shown and hurts nobody; what it said before goes on. Which models there are is looked at when a workflow
is asked for, so that bundles and workflows may come in any order.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance.catalog.bundle import read_yaml, unshowable
from appliance.catalog.repository import Repository
from appliance.core.config import Catalog, Name
from appliance.core.errors import BundleInvalid, NotReady, UnknownModel, UnknownWorkflow, WorkflowInvalid
from appliance.core.files import printable
from appliance.core.types import ModelKey

_log = logging.getLogger(__name__)

FOLDER = "workflows"
"""Where they are unless the configuration says otherwise: beside the catalog's root."""

SUFFIXES = (".yaml", ".yml")
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
    return f"{printable(where)}: {entry['msg'].removeprefix('Value error, ')}"


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


# ---- the folder ------------------------------------------------------------------------------------------------------

_Signature: TypeAlias = tuple[int, int, int, int]


@dataclass(eq=False)
class _Entry:
    """One file. `problem` says why what it holds now is not served; `workflow` is the last good content."""

    path: Path
    seen: _Signature | None = None
    seen_since: float = 0.0
    done: _Signature | None = None
    settling: bool = True
    problem: str = ""
    workflow: Workflow | None = None


@dataclass
class _Look:
    """What a look at the folder found: each file with its signature and the Unix time of its last change."""

    files: dict[Path, tuple[_Signature, float]] = field(default_factory=dict)
    problem: str = ""


class Workflows:
    """All workflows of the folder. Used from the event loop's thread."""

    def __init__(self, settings: Catalog, repository: Repository[Any] | None = None) -> None:
        """Args: repository: what models there are; None when only the files count."""
        self.settings = settings
        self._repository = repository
        self._entries: dict[Path, _Entry] = {}
        self._problem = ""
        self._looking = asyncio.Lock()
        self._looked = asyncio.Event()
        self._wake = asyncio.Event()

    @property
    def folder(self) -> Path:
        """Where they are looked for."""
        return self.settings.workflows or self.settings.root.parent / FOLDER

    # ---- asking ----

    @property
    def all(self) -> list[Workflow]:
        """All that are served, by owner and id."""
        found = [entry.workflow for entry in self._entries.values() if entry.workflow is not None]
        return sorted(found, key=lambda workflow: (workflow.user_id, workflow.app_id, workflow.id))

    def find(self, user_id: str, app_id: str, workflow_id: str) -> Workflow:
        """One workflow; an empty user or app id matches any. Raises: UnknownWorkflow: there is none, or several."""
        found = [
            workflow
            for workflow in self.all
            if workflow.id == workflow_id and user_id in ("", workflow.user_id) and app_id in ("", workflow.app_id)
        ]
        asked = "/".join(part or "*" for part in (user_id, app_id, workflow_id))
        if len(found) > 1:
            raise UnknownWorkflow(f"Several workflows match {asked}; name the user id and app id too.")
        if not found:
            raise UnknownWorkflow(
                f"There is no workflow {asked} on this appliance; ListWorkflows names those there are."
            )
        return found[0]

    def problems(self) -> dict[str, str]:
        """What keeps a file, or a node of a workflow, from being served, by file; empty when all is well."""
        problems = {FOLDER: self._problem} if self._problem else {}
        for entry in self._entries.values():
            found = [entry.problem] if entry.problem else []
            found += self._missing(entry.workflow) if entry.workflow else []
            if found:
                problems[f"{FOLDER}/{printable(entry.path.name)}"] = " ".join(found)
        return problems

    def _missing(self, workflow: Workflow) -> list[str]:
        """A sentence for each node whose model is not what the workflow says, by the catalog of now."""
        if self._repository is None:
            return []
        found = ((node, node_problem(node, self._repository)) for node in workflow.nodes)
        return [f"node {node.id!r}: {problem}" for node, problem in found if problem]

    def describe(self) -> list[dict[str, object]]:
        """The files as plain data, for operators."""
        problems = self.problems()
        rows: list[dict[str, object]] = []
        for entry in sorted(self._entries.values(), key=lambda entry: entry.path):
            name = printable(entry.path.name)
            workflow = entry.workflow
            waits = "its file is still changing" if entry.settling else ""
            rows.append(
                {
                    "file": name,
                    "workflow": str(workflow) if workflow else "",
                    "version": workflow.version if workflow else "",
                    "nodes": len(workflow.nodes) if workflow else 0,
                    "problem": problems.get(f"{FOLDER}/{name}", waits),
                }
            )
        if self._problem:
            rows.append({"file": "", "workflow": "", "version": "", "nodes": 0, "problem": self._problem})
        return rows

    # ---- keeping in step ----

    async def run(self) -> None:
        """Look at the folder again and again, until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.look()
            except Exception:
                # One bad look must not end the watch; the next one may be better.
                _log.exception("looking at the workflows failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.settings.scan_interval_s)

    def wake(self) -> None:
        """Look now rather than at the next interval."""
        self._wake.set()

    async def wait_settled(self) -> None:
        """Return when every file was read, good or bad."""
        await self._looked.wait()
        while any(e.settling for e in self._entries.values()):  # noqa: ASYNC110  # what is waited for is quiet
            await asyncio.sleep(self.settings.scan_interval_s / 4)

    async def look(self) -> None:
        """Compare the folder with what is served, and read what changed."""
        async with self._looking:
            await self._look()
            self._looked.set()

    async def _look(self) -> None:
        settings, folder = self.settings, self.folder
        found = await asyncio.to_thread(_look_at, folder, settings.workflows is None)
        if found.problem:
            if found.problem != self._problem:
                _log.error("%s", found.problem)
            self._problem = found.problem
            return
        self._problem = ""
        for path in set(self._entries) - set(found.files):
            gone = self._entries.pop(path)
            self._retry()
            if gone.workflow is not None:
                _log.info("workflow removed", extra={"workflow": str(gone.workflow)})
        for path, (signature, changed_at) in sorted(found.files.items()):
            entry = self._entries.setdefault(path, _Entry(path))
            now = time.monotonic()
            if signature != entry.seen:
                entry.seen, entry.seen_since = signature, now
            quiet = max(now - entry.seen_since, time.time() - changed_at)
            entry.settling = signature != entry.done and quiet < settings.settle_s
            if signature != entry.done and not entry.settling:
                await self._read(entry, settings)
                entry.done = signature

    async def _read(self, entry: _Entry, settings: Catalog) -> None:
        """Take in what a file says now; one that is bad keeps what it said before."""
        try:
            workflow = await asyncio.to_thread(read_workflow, entry.path, settings.user_id, settings.app_id)
            self._check_owner(entry, workflow)
        except (WorkflowInvalid, OSError) as error:
            self._failed(entry, str(error))
            return
        except Exception as error:
            # Whatever a file makes a parser raise must not keep the others from being read.
            _log.exception("reading a workflow failed unexpectedly", extra={"file": printable(entry.path)})
            self._failed(entry, f"{type(error).__name__}: {error}")
            return
        if entry.workflow is not None and str(entry.workflow) != str(workflow):
            self._retry()
        entry.workflow, entry.problem = workflow, ""
        _log.info("workflow served", extra={"workflow": str(workflow), "version": workflow.version})
        for sentence in self._missing(workflow):
            _log.warning("not ready: %s", sentence, extra={"workflow": str(workflow)})

    def _failed(self, entry: _Entry, problem: str) -> None:
        entry.problem = printable(problem)
        kept = "; what it said before goes on" if entry.workflow else ""
        _log.error("workflow cannot be served: %s%s", entry.problem, kept, extra={"file": printable(entry.path.name)})

    def _retry(self) -> None:
        """An id is free again: a file that wanted it may have it."""
        for entry in self._entries.values():
            if entry.problem:
                entry.done = None

    def _check_owner(self, entry: _Entry, workflow: Workflow) -> None:
        for other in self._entries.values():
            if other is not entry and other.workflow is not None and str(other.workflow) == str(workflow):
                raise WorkflowInvalid(
                    f"{entry.path} says it is workflow {workflow}, which {other.path.name} is already; change "
                    "workflow.id in one of them, or remove it."
                )


def node_problem(node: Node, repository: Repository[Any]) -> str:
    """Why a node's model cannot be what the workflow says, by the catalog of now; "" when it can, or may still load."""
    try:
        bundle = repository.find(node.model.user_id, node.model.app_id, node.model.model_id)
        version = repository.version(bundle, node.version)
    except UnknownModel as error:
        return str(error)
    except NotReady:
        return ""  # the catalog is still being read
    is_type = version.config.model_type_id
    if node.model_type_id not in ("", is_type):
        return f"Model {node.model} is a {is_type}, and model_type_id says {printable(node.model_type_id)}."
    return ""


def _look_at(folder: Path, may_lack: bool) -> _Look:
    """Args: may_lack: whether no folder at all is as good as an empty one."""
    look = _Look()
    try:
        paths = [p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".")]
    except FileNotFoundError:
        if not may_lack:
            look.problem = f"catalog.workflows {folder} is not there; what was read before goes on. Make the folder."
        return look
    except OSError as error:
        look.problem = f"catalog.workflows {folder} cannot be read ({error.strerror}); what was read before goes on."
        return look
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a link to nowhere
            try:
                found = path.stat()
            except PermissionError:  # the next look may; reading it says so
                look.files[path] = ((0, 0, 0, 0), 0.0)
                continue
            signature = (found.st_size, found.st_mtime_ns, found.st_ino, found.st_mode)
            look.files[path] = (signature, found.st_ctime)
    return look
