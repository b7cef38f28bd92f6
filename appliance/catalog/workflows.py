"""The folder of workflows: models joined to a graph, a YAML file each, kept in step with what lies there.

A file is read once nobody writes it any more. One that is bad has its reason shown and hurts nobody: what it said
before goes on. Which models there are is looked at when a workflow is asked for, so that bundles and workflows may come
in any order.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from appliance.catalog.view import View
from appliance.catalog.workflow_format import Node, Workflow, read_workflow
from appliance.core.config import Catalog
from appliance.core.errors import NotReady, UnknownModel, UnknownWorkflow, WorkflowInvalid
from appliance.core.files import printable

_log = logging.getLogger(__name__)

FOLDER = "workflows"
"""Where they are unless the configuration says otherwise: beside the catalog's root."""

SUFFIXES = (".yaml", ".yml")

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

    def __init__(self, settings: Catalog, repository: View[Any] | None = None) -> None:
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


def node_problem(node: Node, repository: View[Any]) -> str:
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
