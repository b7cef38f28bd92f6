"""The catalog as whoever answers calls sees it: bundles, their versions, and what answers for them.

`Repository` keeps it in step with the disk; `Mirror` is a front's copy, told by the supervisor, which has the disk.
"""

import asyncio
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from pydantic import TypeAdapter

from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.core.errors import NotDeployed, NotReady, UnknownModel
from appliance.core.types import ModelKey

Signature: TypeAlias = tuple[object, ...]


class Loaded(Protocol):
    """What the repository holds for a ready version."""

    @property
    def problem(self) -> str | None:
        """Why it cannot answer any more, or None."""

    async def drain(self) -> None:
        """Return when everything accepted has ended."""

    def close(self) -> None:
        """Let it go."""


S = TypeVar("S", bound=Loaded)


class State(enum.Enum):
    """What a version is; the words of `/readyz` and of the metrics."""

    SETTLING = "settling"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    HELD = "held"


@dataclass(eq=False)
class Running(Generic[S]):
    """A servable and how many requests hold it; it is not drained away before the last one lets go."""

    servable: S
    users: int = 0
    free: asyncio.Event = field(default_factory=asyncio.Event)

    def hold(self) -> S:
        """One more request needs it, until it calls `let_go`."""
        if not self.users:
            self.free.clear()
        self.users += 1
        return self.servable

    def let_go(self) -> None:
        """One request less."""
        self.users -= 1
        if not self.users:
            self.free.set()

    def __enter__(self) -> S:
        return self.hold()

    def __exit__(self, *_: object) -> None:
        self.let_go()


@dataclass(eq=False)
class Version(Generic[S]):
    """One version of one bundle, as the catalog sees it.

    Attributes:
        problem: why it is not (or no longer newly) loaded; set beside a running servable when the files on disk
            became bad and the last good load goes on.
        first_seen, loaded_at: Unix time.
    """

    id: str
    config: BundleConfig
    folder: VersionFolder
    signature: Signature
    first_seen: float
    state: State = State.LOADING
    problem: str = ""
    running: Running[S] | None = None
    loaded_at: float = 0.0
    load_seconds: float = 0.0
    checksums: Mapping[str, str] = field(default_factory=dict)
    task: "asyncio.Task[None] | None" = None

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.running is not None and self.running.servable.problem is None

    @property
    def servable(self) -> S | None:
        """What answers, or None."""
        return self.running.servable if self.running else None


@dataclass(eq=False)
class Bundle(Generic[S]):
    """One bundle under the root. `problem` says why it could not be read, "" when it could."""

    name: str
    path: Path
    key: ModelKey | None = None
    problem: str = ""
    settling: bool = True
    seen: Signature = ()
    seen_since: float = 0.0
    done: Signature | None = None
    versions: dict[str, Version[S]] = field(default_factory=dict)


class View(Generic[S]):
    """Bundles and versions, to be asked. Used from the event loop's thread."""

    def __init__(self) -> None:
        self._bundles: dict[str, Bundle[S]] = {}
        self._answering: dict[tuple[str, str, str, str], Version[S]] = {}
        """What `answering` found for which ids; as good as new only until something changes."""
        self._root_problem = ""

    @property
    def complete(self) -> bool:
        """Whether every bundle there is has been read: only then is a model that is not here unknown."""
        raise NotImplementedError

    @property
    def bundles(self) -> list[Bundle[S]]:
        """All bundles, by name."""
        return [self._bundles[name] for name in sorted(self._bundles)]

    def versions(self, bundle: Bundle[S]) -> list[Version[S]]:
        """A bundle's versions, newest first: by number when all are numbers, else by when they were first seen."""
        versions = list(bundle.versions.values())
        if all(version.id.isdigit() for version in versions):
            return sorted(versions, key=lambda version: int(version.id), reverse=True)
        return sorted(versions, key=lambda version: (version.first_seen, version.id), reverse=True)

    def offered(self, bundle: Bundle[S]) -> list[Version[S]]:
        """Those that callers hear of: all but the ones held back; newest first."""
        return [version for version in self.versions(bundle) if version.state is not State.HELD]

    def find(self, user_id: str, app_id: str, model_id: str) -> Bundle[S]:
        """The bundle of a model; an empty user or app id matches any.

        Raises: UnknownModel: there is none, or several. NotReady: there may be one that was not read yet.
        """
        found = [
            bundle
            for bundle in self._bundles.values()
            if bundle.key is not None
            and bundle.key.model_id == model_id
            and user_id in ("", bundle.key.user_id)
            and app_id in ("", bundle.key.app_id)
        ]
        asked = "/".join(part or "*" for part in (user_id, app_id, model_id))
        if len(found) > 1:
            raise UnknownModel(f"Several models match {asked}; name the user id and app id too.")
        if not found and not self.complete:
            raise NotReady(f"Bundles are still being read; whether there is a model {asked} shows soon. Try again.")
        if not found:
            raise UnknownModel(f"There is no model {asked} on this appliance; ListModels names those there are.")
        return found[0]

    def version(self, bundle: Bundle[S], version_id: str) -> Version[S]:
        """A version that is known; "" for the newest ready one, else the newest there is.

        Raises: UnknownModel: no such version.
        """
        if version_id:
            found = bundle.versions.get(version_id)
            if found is None or found.state is State.HELD:
                ready = ", ".join(v.id for v in self.versions(bundle) if v.ready) or "none"
                raise UnknownModel(f"Model {bundle.key} has no version {version_id!r}; ready versions: {ready}.")
            return found
        newest = self.offered(bundle)
        if not newest:
            raise UnknownModel(f"Model {bundle.key} has no versions.")
        return next((version for version in newest if version.ready), newest[0])

    def answering(self, user_id: str, app_id: str, model_id: str, version_id: str) -> Version[S]:
        """The version that answers for these ids; it is ready.

        Raises: UnknownModel. NotReady: it is still loading. NotDeployed: it could not be loaded.
        """
        ids = (user_id, app_id, model_id, version_id)
        known = self._answering.get(ids)
        if known is not None and known.ready:
            return known
        bundle = self.find(user_id, app_id, model_id)
        version = self.version(bundle, version_id)
        if version.ready:
            self._answering[ids] = version
            return version
        if version.state in (State.LOADING, State.SETTLING):
            raise NotReady(f"Model {bundle.key} version {version.id} is still loading; try again.")
        why = version.servable.problem if version.servable else version.problem
        raise NotDeployed(
            f"Model {bundle.key} version {version.id} could not be loaded; the operator sees why with "
            "`appliance models list`.",
            detail=why or "",
        )

    def use(self, user_id: str, app_id: str, model_id: str, version_id: str) -> Running[S]:
        """The servable that answers for these ids; within `with` it is not drained away.

        Raises: as `answering`.
        """
        running = self.answering(user_id, app_id, model_id, version_id).running
        assert running is not None, "a ready version has one"
        return running

    def not_ready(self) -> dict[str, str]:
        """Bundles and versions that do not answer, and why; empty when all is well."""
        problems = {"catalog.root": self._root_problem} if self._root_problem else {}
        for bundle in self.bundles:
            if bundle.problem:
                problems[bundle.name] = bundle.problem
            elif bundle.settling and not bundle.versions:
                problems[bundle.name] = "its files are still changing"
            for version in bundle.versions.values():
                name = f"{bundle.name}:{version.id}"
                if version.servable is not None and version.servable.problem:
                    problems[name] = version.servable.problem
                elif version.state is State.LOADING:
                    problems[name] = "loading"
                elif version.problem:
                    problems[name] = version.problem
        return problems


class Mirror(View[S]):
    """A copy of another process's catalog, replaced as a whole whenever that changes."""

    def __init__(self) -> None:
        super().__init__()
        self._complete = False

    @property
    def complete(self) -> bool:
        """See `View.complete`."""
        return self._complete

    def take(self, told: Mapping[str, Any], running: Mapping[int, "Running[S]"]) -> None:
        """Take over what `tell` wrote.

        Args:    running: by the numbers that it uses; one that is not here does not answer.
        """
        fresh: dict[str, Bundle[S]] = {}
        for row in told["bundles"]:
            bundle: Bundle[S] = Bundle(
                row["name"],
                Path(row["path"]),
                key=ModelKey(*row["key"]) if row["key"] else None,
                problem=row["problem"],
                settling=row["settling"],
            )
            before = self._bundles.get(bundle.name)
            for entry in row["versions"]:
                known = before.versions.get(entry["id"]) if before else None
                version = _version(entry, known)
                version.running = None if entry["running"] is None else running.get(entry["running"])
                bundle.versions[version.id] = version
            fresh[bundle.name] = bundle
        self._bundles = fresh
        self._answering.clear()
        self._root_problem = told["root_problem"]
        self._complete = told["complete"]


_CONFIG: TypeAdapter[BundleConfig] = TypeAdapter(BundleConfig)
_FOLDER: TypeAdapter[VersionFolder] = TypeAdapter(VersionFolder)


def config_data(config: BundleConfig) -> Any:
    """A bundle's config as plain data."""
    return _CONFIG.dump_python(config, mode="json")


def folder_data(folder: VersionFolder) -> Any:
    """A version's place on disk as plain data."""
    return _FOLDER.dump_python(folder, mode="json")


def config_of(data: Any) -> BundleConfig:
    """The config that `config_data` wrote."""
    return _CONFIG.validate_python(data)


def folder_of(data: Any) -> VersionFolder:
    """The place that `folder_data` wrote."""
    return _FOLDER.validate_python(data)


def tell(view: View[S], number: Callable[[S], int]) -> dict[str, Any]:
    """The whole catalog as plain data, for a `Mirror`; `number` names what answers for a version."""
    return {
        "complete": view.complete,
        "root_problem": view._root_problem,
        "bundles": [
            {
                "name": bundle.name,
                "path": str(bundle.path),
                "key": None if bundle.key is None else [bundle.key.user_id, bundle.key.app_id, bundle.key.model_id],
                "problem": bundle.problem,
                "settling": bundle.settling,
                "versions": [
                    {
                        "id": version.id,
                        "config": config_data(version.config),
                        "folder": folder_data(version.folder),
                        "first_seen": version.first_seen,
                        "state": version.state.value,
                        "problem": version.problem,
                        "loaded_at": version.loaded_at,
                        "load_seconds": version.load_seconds,
                        "checksums": dict(version.checksums),
                        "running": None if version.servable is None else number(version.servable),
                    }
                    for version in bundle.versions.values()
                ],
            }
            for bundle in view.bundles
        ],
    }


def _version(entry: Mapping[str, Any], known: "Version[S] | None") -> "Version[S]":
    config = config_of(entry["config"])
    if known is not None and known.config == config:
        config = known.config  # replies that were made with it stay good
    return Version(
        entry["id"],
        config,
        folder_of(entry["folder"]),
        (),
        entry["first_seen"],
        state=State(entry["state"]),
        problem=entry["problem"],
        loaded_at=entry["loaded_at"],
        load_seconds=entry["load_seconds"],
        checksums=entry["checksums"],
    )


def describe(repository: View[S], describe_servable: Callable[[S], dict[str, object]]) -> list[dict[str, object]]:
    """The whole catalog as plain data, for `appliance models list` and the admin socket."""
    rows: list[dict[str, object]] = []
    for bundle in repository.bundles:
        versions = [
            {
                "version": version.id,
                "state": (State.READY if version.ready else version.state).value,
                "problem": version.problem or (version.servable.problem if version.servable else "") or "",
                "loaded_at": version.loaded_at,
                "load_seconds": round(version.load_seconds, 3),
                "sha256": dict(version.checksums),
                **(describe_servable(version.servable) if version.servable else {}),
            }
            for version in repository.versions(bundle)
        ]
        rows.append(
            {
                "bundle": bundle.name,
                "model": str(bundle.key) if bundle.key else "",
                "problem": bundle.problem or ("its files are still changing" if bundle.settling else ""),
                "versions": versions,
            }
        )
    return rows
