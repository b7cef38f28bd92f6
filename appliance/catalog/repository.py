"""The repository: what lies under the root becomes what is served, and stays in step with it.

A look at the root every `scan_interval_s`; a bundle is read once its files have settled, or at once when it was put
there as a whole. A new or changed version is
loaded and warmed aside, switched to in one step, and the one it replaces is drained. A bundle that cannot be read or
loaded has its reason shown and hurts nobody; what it served before goes on.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from appliance.catalog import bundle as bundles
from appliance.catalog import changes, importer
from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.catalog.state import Memory, read_held, was_published
from appliance.catalog.view import Bundle, Running, S, Signature, State, Version, View
from appliance.core.config import Catalog
from appliance.core.errors import BundleInvalid, ConfigError, ModelError
from appliance.core.files import printable
from appliance.core.types import NAME_PATTERN

_log = logging.getLogger(__name__)

_TURN_S = 10.0
"""Seconds for which a load keeps the next one waiting."""


@dataclass(frozen=True, slots=True)
class _Read:
    """What the disk says of one bundle: its config and versions, each with the signature of all it depends on."""

    configs: Mapping[str, BundleConfig]
    folders: Mapping[str, VersionFolder]
    signatures: Mapping[str, Signature]


Load: TypeAlias = Callable[[Path, BundleConfig, VersionFolder], Awaitable[S]]


class Repository(View[S]):
    """All bundles, their versions and what answers for them. Used from the event loop's thread."""

    def __init__(
        self,
        settings: Catalog,
        load: Load[S],
        changed: Callable[[], None] = lambda: None,
        swapped: Callable[[str], None] = lambda model: None,
        ended: Callable[[str, str, str], None] = lambda model, version, result: None,
        remember: bool = True,
    ) -> None:
        """Read what was remembered.

        Args:    load: makes a servable of a version. changed: called after every change of what is ready.
                 swapped: called with the model id when one servable replaced another.
                 ended: called with model id, version and "ok" or "failed" at the end of every load.
                 remember: whether to write down what is seen; not when somebody only looks.
        Raises:  ConfigError: the root or the state is unusable.
        """
        super().__init__()
        self.settings = settings
        self._load = load

        def tell() -> None:
            self._answering.clear()
            changed()

        self._changed = tell
        self._swapped = swapped
        self._ended = ended
        self._remember = remember
        self._loads = asyncio.Semaphore(1)
        self._drains: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._looked = asyncio.Event()
        self._looking = asyncio.Lock()
        if not settings.root.is_dir():
            raise ConfigError(f"catalog.root {settings.root} is not a folder; make it, or name another one.")
        if not settings.state_dir.is_dir():
            raise ConfigError(f"catalog.state_dir {settings.state_dir} is not a folder; make it, or name another one.")
        self._memory = Memory(settings.state_dir)
        self._held = read_held(settings.state_dir)
        self._held_problem = ""

    @property
    def complete(self) -> bool:
        """See `View.complete`."""
        return self._looked.is_set() and all(bundle.done is not None for bundle in self._bundles.values())

    # ---- keeping in step ----

    async def run(self) -> None:
        """Look at the root again and again, until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.look()
            except ConfigError:
                pass  # the root cannot be read: said when it was new
            except Exception:
                # One bad look (a disk error, say) must not end the watch; the next one may be better.
                _log.exception("looking at the catalog failed")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.settings.scan_interval_s)

    def wake(self) -> None:
        """Look now rather than at the next interval."""
        self._wake.set()

    async def wait_settled(self) -> None:
        """Return when every wanted version is ready or failed."""
        await self._looked.wait()
        while True:
            loading = [v.task for b in self._bundles.values() for v in b.versions.values() if v.task]
            if loading:
                await asyncio.wait(loading)
            elif any(bundle.settling for bundle in self._bundles.values()):
                await asyncio.sleep(self.settings.scan_interval_s / 4)
            else:
                return

    async def look(self) -> None:
        """Compare the root with what is served, and start what is needed to make them equal.

        Raises: ConfigError: the root cannot be read; what is loaded goes on.
        """
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        try:
            self._held = await asyncio.to_thread(read_held, self.settings.state_dir)
            self._held_problem = ""
        except ConfigError as error:
            if str(error) != self._held_problem:
                _log.error("%s What was held back before stays so.", error)
            self._held_problem = str(error)
        held = self._held
        paths = await self._paths()
        for name in sorted(set(self._bundles) - set(paths)):
            self._forget_bundle(name)
        for name, path in paths.items():
            self._bundles.setdefault(name, Bundle(name, path)).path = path
        for name, path in sorted(paths.items()):
            bundle = self._bundles[name]
            try:
                looks, changed_at = await asyncio.to_thread(_look_at, path)
            except FileNotFoundError:
                continue  # removed meanwhile: the next look tells
            except OSError as error:
                bundle.settling, bundle.done = False, None
                if printable(error) != bundle.problem:
                    self._unreadable(bundle, str(error))
                continue
            signature = (path, *looks, held.get(name, frozenset()))
            now = time.monotonic()
            if signature != bundle.seen:
                bundle.seen, bundle.seen_since = signature, now
            quiet = max(now - bundle.seen_since, time.time() - changed_at)
            bundle.settling = (
                signature != bundle.done
                and quiet < self.settings.settle_s
                and not await asyncio.to_thread(was_published, self.settings.state_dir, name, looks)
            )
            if signature != bundle.done and not bundle.settling:
                await self._read_bundle(bundle, held.get(name, frozenset()))
                bundle.done = signature
        self._looked.set()

    async def _paths(self) -> dict[str, Path]:
        """Where the bundles lie. Raises: ConfigError: the root cannot be read; logged when that is new."""
        try:
            if self._remember:
                await asyncio.to_thread(changes.mend, self.settings.root)
            paths = await asyncio.to_thread(bundle_paths, self.settings.root)
        except OSError as error:
            why = printable(error.strerror or error)
            problem = f"catalog.root {self.settings.root} cannot be read ({why}); what is loaded goes on. Put it back."
            if problem != self._root_problem:
                self._root_problem = problem
                _log.error("%s", problem)
                self._changed()
            raise ConfigError(problem) from error
        if self._root_problem:
            self._root_problem = ""
            _log.info("catalog.root %s can be read again", self.settings.root)
            self._changed()
        return paths

    async def close(self) -> None:
        """Stop loading, and let every servable go."""
        tasks = [v.task for b in self._bundles.values() for v in b.versions.values() if v.task]
        for task in [*tasks, *self._drains]:
            task.cancel()
        await asyncio.gather(*tasks, *self._drains, return_exceptions=True)
        for bundle in self._bundles.values():
            for version in bundle.versions.values():
                if version.running is not None:
                    version.running.servable.close()

    async def _read_bundle(self, bundle: Bundle[S], held: frozenset[str]) -> None:
        """Take in what the disk says now; a bundle that cannot be read keeps what it serves."""
        try:
            read = await asyncio.to_thread(_read, bundle.path, self.settings)
            self._check_owner(bundle, read)
        except (ModelError, OSError) as error:
            self._unreadable(bundle, str(error))
            return
        except Exception as error:
            # A bundle is a stranger's file: whatever it makes a parser raise must not keep the others from being read.
            _log.exception("reading failed unexpectedly", extra={"bundle": bundle.name})
            self._unreadable(bundle, f"{type(error).__name__}: {error}")
            return
        bundle.problem = ""
        key = next(iter(read.configs.values())).key
        if bundle.key not in (None, key):
            self._retry_unreadable()
        bundle.key = key
        for version_id in [v for v in bundle.versions if v not in read.folders]:
            self._forget_version(bundle, version_id)
        for version_id in read.folders:
            self._want(bundle, version_id, read, version_id in held)
        self._save_memory()
        self._changed()

    def _unreadable(self, bundle: Bundle[S], problem: str) -> None:
        bundle.problem = problem = printable(problem)
        _log.error("bundle cannot be read: %s", problem, extra={"bundle": bundle.name})
        self._changed()

    def _retry_unreadable(self) -> None:
        """A model's key is free again: a bundle that wanted it may have it at the next look."""
        for bundle in self._bundles.values():
            if bundle.problem:
                bundle.done = None

    def _check_owner(self, bundle: Bundle[S], read: _Read) -> None:
        keys = {config.key for config in read.configs.values()}
        for other in self._bundles.values():
            if other is not bundle and other.key in keys:
                raise BundleInvalid(
                    f"{bundle.path} says it is model {other.key}, which bundle {other.name!r} is already; change "
                    "model.id in one of them, or remove it."
                )

    def _want(self, bundle: Bundle[S], version_id: str, read: _Read, held: bool) -> None:
        """Make one version be loaded, or held back, unless it is so already."""
        version = bundle.versions.get(version_id)
        signature = read.signatures[version_id]
        if version is not None and version.signature == signature and held == (version.state is State.HELD):
            return
        if version is None:
            seen = self._memory.first_seen(bundle.name, version_id, time.time())
            version = Version(version_id, read.configs[version_id], read.folders[version_id], signature, seen)
            bundle.versions[version_id] = version
        version.config, version.folder = read.configs[version_id], read.folders[version_id]
        version.signature = signature
        if version.task:
            version.task.cancel()
        if held:
            version.state, version.problem = State.HELD, ""
            self._retire(version)
            return
        version.state = State.LOADING
        version.task = asyncio.create_task(self._load_version(bundle, version))

    async def _load_version(self, bundle: Bundle[S], version: Version[S]) -> None:
        """Load aside, then switch."""
        fields = {"model": str(bundle.key), "version": version.id}
        async with self._turn():
            begun = time.monotonic()
            _log.info("loading", extra=fields)
            try:
                checksums = await asyncio.to_thread(bundles.verify_checksums, version.folder)
                servable = await self._load(bundle.path, version.config, version.folder)
            except (ModelError, ConfigError, OSError) as error:
                self._failed(version, str(error), fields)
            except Exception as error:
                # A bundle is a stranger's file: whatever it makes a library raise is that bundle's failure only.
                _log.exception("loading failed unexpectedly", extra=fields)
                self._failed(version, f"{type(error).__name__}: {error}", fields)
            else:
                replaced = version.running is not None
                self._retire(version)
                version.running = Running(servable)
                version.running.free.set()
                version.state, version.problem = State.READY, ""
                version.checksums = checksums
                self._ended(version.config.key.model_id, version.id, "ok")
                version.loaded_at, version.load_seconds = time.time(), time.monotonic() - begun
                self._memory.remember(bundle.name, version.id, checksums)
                _log.info("ready after %.2f s", version.load_seconds, extra=fields)
                if replaced and bundle.key:
                    self._swapped(bundle.key.model_id)
            finally:
                if version.task is asyncio.current_task():
                    version.task = None
            self._save_memory()
            self._changed()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One load at a time, so that a heavy model does not slow down every other one; but only for a while, so that
        one that takes for ever does not keep the others from being served."""
        await self._loads.acquire()
        ends = contextlib.ExitStack()
        ends.callback(self._loads.release)
        timer = asyncio.get_running_loop().call_later(_TURN_S, ends.close)
        try:
            yield
        finally:
            timer.cancel()
            ends.close()

    def _failed(self, version: Version[S], problem: str, fields: Mapping[str, str]) -> None:
        self._ended(version.config.key.model_id, version.id, "failed")
        version.problem = problem
        version.state = State.READY if version.running else State.FAILED
        kept = "; the version loaded before goes on" if version.running else ""
        _log.error("cannot be loaded: %s%s", problem, kept, extra=dict(fields))

    def _retire(self, version: Version[S]) -> None:
        """Take a servable out of service: new requests do not find it, the ones it has are finished."""
        if version.running is None:
            return
        task = asyncio.create_task(_drain(version.running))
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)
        version.running = None

    def _forget_version(self, bundle: Bundle[S], version_id: str) -> None:
        version = bundle.versions.pop(version_id)
        if version.task:
            version.task.cancel()
        self._retire(version)
        _log.info("removed", extra={"model": str(bundle.key), "version": version_id})

    def _forget_bundle(self, name: str) -> None:
        bundle = self._bundles.pop(name)
        self._retry_unreadable()
        for version_id in list(bundle.versions):
            self._forget_version(bundle, version_id)
        self._save_memory()
        self._changed()

    def _save_memory(self) -> None:
        if not self._remember:
            return
        known = {b.name: set(b.versions) if b.versions and not b.problem else None for b in self._bundles.values()}
        self._memory.keep_only(known)
        try:
            self._memory.save()
        except OSError as error:
            # Serving goes on with a full disk; only first-seen times and checksums are not kept.
            _log.warning("the catalog's state cannot be saved: %s", error)


async def _drain(running: Running[S]) -> None:
    await running.free.wait()
    await running.servable.drain()
    running.servable.close()


def bundle_paths(root: Path) -> dict[str, Path]:
    """Folders and `.onnx` files under the root; hidden names are work in progress. Raises: OSError.

    A name that no bundle may have (`read_config` refuses it) is there in a spelling that can be shown everywhere.
    """
    paths: dict[str, Path] = {}
    for path in sorted(root.iterdir(), key=lambda path: (path.is_file(), path.name)):
        if not path.name.startswith(".") and (path.is_dir() or path.suffix == ".onnx"):
            name = path.stem if path.is_file() and path.stem not in paths else path.name
            paths[name if NAME_PATTERN.fullmatch(name) else _spelled(name)] = path
    return paths


def _spelled(name: str) -> str:
    """A file's name in printable characters; backslashes are doubled, so that no two names become one."""
    return printable(name.replace("\\", "\\\\"))


def _look_at(path: Path) -> tuple[Signature, float]:
    """The bundle's signature, and the Unix time of the last change that any of its files saw."""
    files = [path] if path.is_file() else [path, *path.rglob("*")]
    changed_at = 0.0
    for file in files:
        with contextlib.suppress(OSError):
            changed_at = max(changed_at, file.stat().st_ctime)
    return bundles.signature(path), changed_at


def _read(path: Path, settings: Catalog) -> _Read:
    """Raises: BundleInvalid: with everything that is wrong. OSError."""
    config, model, concepts = bundles.read_config(path, settings.user_id, settings.app_id)
    folders = {v.id: v for v in bundles.find_versions(path, bundles.graph_file(config))}
    configs = {
        version_id: config or importer.infer_config(path, folder, model, concepts, settings.user_id, settings.app_id)
        for version_id, folder in folders.items()
    }
    shared = tuple(entry for entry in bundles.signature(path) if Path(entry[0]).parts[0] not in folders)
    signatures: dict[str, Signature] = {
        version_id: (shared, () if folder.path == path or folder.bare else bundles.signature(folder.path))
        for version_id, folder in folders.items()
    }
    return _Read(configs, folders, signatures)
