"""Changing what lies under the root: add, remove, roll back. Every change is one rename, so that the watching daemon
sees the old state or the new one; what is half written has a hidden name.

A version that takes another's place needs two renames. The old one is `.replaced-<version>` beside it until the new
one is there; if that fails, it is renamed back, and after a kill in between `mend` does it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from appliance.catalog import bundle as bundles
from appliance.catalog import importer
from appliance.catalog.bundle import CONFIG_FILE, REPLACED, BundleConfig, VersionFolder
from appliance.catalog.graph import read_graph
from appliance.catalog.state import read_held, write_held, write_published
from appliance.core.config import Catalog
from appliance.core.errors import BundleInvalid, ConfigError
from appliance.core.files import alone, file_error, printable
from appliance.core.types import NAME_PATTERN

_STAGING = ".staging-"
_LOCK = ".lock"
"""In every staging folder: a file that is locked as long as its maker lives."""


class Added(NamedTuple):
    """What was added.

    Attributes:
        sentence: the importer's; "" when the config was explicit.
        released: those of the versions that were held back from before, and are no longer.
    """

    name: str
    versions: list[str]
    sentence: str
    released: list[str]


def add(source: Path, settings: Catalog, *, name: str = "", replace: bool = False) -> Added:
    """Copy a bundle (or a bare `.onnx` file) under the root, checked, with checksums and an explicit config.

    Args:
        name: of the bundle's folder; default: the source's.
        replace: whether versions and the config that are there already may be replaced.
    Raises: BundleInvalid: it cannot be served. ConfigError: it is there already, or the root cannot be written.
    """
    if not source.exists():
        raise ConfigError(f"There is no {printable(source)}; name a bundle's folder or an .onnx file.")
    name = name or (source.stem if source.is_file() else source.resolve().name)
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be a bundle's name; use letters, digits and . _ - inside (--name).")
    if (settings.root / f"{name}.onnx").exists():
        raise ConfigError(f"{settings.root / name}.onnx is bundle {name!r} already; remove it, or say --name.")
    with _os_errors(settings.root):
        settings.root.mkdir(parents=True, exist_ok=True)
    read_held(settings.state_dir)  # if what is held back cannot be read, say so before anything is changed
    with _os_errors(settings.root), _staging(settings.root) as staged:
        folder = staged / name
        versions, config = _stage(source, folder, settings)
        _hand_over(folder, settings.root)
        with alone(settings.root):
            _mend_bundle(settings.root / name)
            added = _publish(folder, settings.root / name, replace, settings)
    added = added or [version.id for version in versions]
    return Added(name, added, config.sentence, _release(name, added, settings))


def remove(name: str, version: str, settings: Catalog) -> None:
    """Take a bundle, or one version of it, away, and with it that it was held back.

    Raises: ConfigError: there is none, or it cannot be removed.
    """
    target = find(name, settings)
    read_held(settings.state_dir)
    with _os_errors(settings.root), alone(settings.root):
        _mend_bundle(target)  # or what was set aside would come back for what is removed now
    if version:
        if target.is_file() or not NAME_PATTERN.fullmatch(version) or not (target / version).is_dir():
            raise ConfigError(f"Bundle {name!r} has no version {version!r} of its own folder.")
        target = target / version
    with _os_errors(settings.root), _staging(settings.root) as staged:
        os.rename(target, staged / "removed")
    _release(name, [version] if version else None, settings)


def rollback(name: str, to: str, settings: Catalog) -> tuple[str, list[str]]:
    """Hold back every version newer than `to` (default: all but the second newest and older), release the others.

    Returns: the version that "newest" now means, and those held back.
    Raises: ConfigError: no such version, or nothing to go back to.
    """
    path = find(name, settings)
    ids = [version.id for version in bundles.find_versions(path, _file(path, settings))]
    with _os_errors(settings.state_dir), alone(settings.state_dir):
        return _hold(name, to, path, ids, settings)


def _hold(name: str, to: str, path: Path, ids: list[str], settings: Catalog) -> tuple[str, list[str]]:
    held = read_held(settings.state_dir)
    if not all(version_id.isdigit() for version_id in ids):
        order = sorted(ids, key=lambda version_id: (path / version_id).stat().st_ctime)
    else:
        order = sorted(ids, key=int)
    if not to:
        free = [version_id for version_id in order if version_id not in held.get(name, frozenset())]
        if len(free) < 2:
            raise ConfigError(f"Bundle {name!r} has no older version to go back to; it has {', '.join(order)}.")
        to = free[-2]
    if to not in order:
        raise ConfigError(f"Bundle {name!r} has no version {to!r}; it has {', '.join(order)}.")
    held[name] = frozenset(order[order.index(to) + 1 :])
    write_held(settings.state_dir, held)
    return to, sorted(held[name])


def _release(name: str, versions: Collection[str] | None, settings: Catalog) -> list[str]:
    """Hold these versions of a bundle (None: all) back no longer. Returns: those that were. Raises: ConfigError."""
    if name not in read_held(settings.state_dir):
        return []
    with _os_errors(settings.state_dir), alone(settings.state_dir):
        held = read_held(settings.state_dir)
        before = held.get(name, frozenset())
        held[name] = frozenset() if versions is None else before - set(versions)
        if held[name] != before:
            write_held(settings.state_dir, held)
    return sorted(before - held[name])


def find(name: str, settings: Catalog) -> Path:
    """Where a bundle lies. Raises: ConfigError: there is none of that name."""
    for path in (settings.root / name, settings.root / f"{name}.onnx"):
        if NAME_PATTERN.fullmatch(name) and path.exists():
            return path
    names = sorted(printable(p.stem if p.is_file() else p.name) for p in settings.root.glob("[!.]*"))
    known = ", ".join(names) or "none"
    raise ConfigError(f"There is no bundle {name!r} in {settings.root}; there are: {known}.")


def _file(bundle: Path, settings: Catalog) -> str:
    """Name of the ONNX file in a bundle's versions."""
    config, _, _ = bundles.read_config(bundle, settings.user_id, settings.app_id)
    return bundles.graph_file(config)


def _stage(source: Path, folder: Path, settings: Catalog) -> tuple[list[VersionFolder], BundleConfig]:
    """Copy the source into the staging folder in our layout, and check what can be checked without loading it."""
    if source.is_file():
        (folder / "1").mkdir(parents=True)
        shutil.copyfile(source, folder / "1" / "model.onnx")
    else:
        bundles.check_links(source)
        _copy_folder(source, folder)
    config, model, concepts = bundles.read_config(folder, settings.user_id, settings.app_id)
    versions = bundles.find_versions(folder, bundles.graph_file(config))
    if versions[0].path == folder:
        # A bare model.onnx at the top: give it the version folder that the layout has.
        (folder / "1").mkdir()
        for path in [p for p in folder.iterdir() if p.name not in ("1", CONFIG_FILE)]:
            os.rename(path, folder / "1" / path.name)
        versions = bundles.find_versions(folder, bundles.graph_file(config))
    if config is None:
        config = importer.infer_config(folder, versions[0], model, concepts, settings.user_id, settings.app_id)
        explicit = bundles.as_yaml(config, folder / CONFIG_FILE)
        (folder / CONFIG_FILE).write_text(explicit, encoding="utf-8")
    for version in versions:
        read_graph(folder, bundles.check_inside(folder, version.model_file))
        bundles.write_checksums(version)
    return versions, config


def _hand_over(folder: Path, root: Path) -> None:
    """Give what root has staged to whoever owns the catalog, readable by its owner whatever root's umask is."""
    if os.geteuid() != 0:
        return
    owner = root.stat()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        path.chmod(path.stat().st_mode | (0o500 if path.is_dir() else 0o400))


def _publish(folder: Path, target: Path, replace: bool, settings: Catalog) -> list[str]:
    """Rename the staged bundle, or its versions, into place. Returns: the versions added to a bundle that was there."""
    if not target.exists():
        with contextlib.suppress(OSError, ConfigError):  # without the note it is loaded settle_s later
            write_published(settings.state_dir, target.name, bundles.signature(folder))
        os.rename(folder, target)
        return []
    versions = bundles.find_versions(folder, _file(folder, settings))
    present = {path.name for path in target.iterdir() if path.is_dir()}
    clash = sorted(present & {version.id for version in versions})
    files = (target / CONFIG_FILE, folder / CONFIG_FILE)
    old, new = (bundles.read_bytes(file) if file.is_file() else b"" for file in files)
    if not replace and clash:
        raise ConfigError(
            f"{target.name} has version {', '.join(clash)} already; give the new one another number, or say --replace."
        )
    if not replace and old != new:
        raise ConfigError(f"The {CONFIG_FILE} of {target.name} is another one than there is now; say --replace.")
    with contextlib.ExitStack() as undo:  # what it has done is undone, last first, unless all was done
        if old != new:
            if old:
                shutil.copy2(target / CONFIG_FILE, folder / f"{REPLACED}{CONFIG_FILE}")
            undo.callback(_put_back, folder / f"{REPLACED}{CONFIG_FILE}", target / CONFIG_FILE)
            os.replace(folder / CONFIG_FILE, target / CONFIG_FILE)
        for version in versions:
            if version.id in present:
                aside = target / f"{REPLACED}{version.id}"
                os.rename(target / version.id, aside)
                undo.callback(os.rename, aside, target / version.id)
            os.rename(folder / version.id, target / version.id)
            undo.callback(os.rename, target / version.id, folder / version.id)
        undo.pop_all()
    for aside in _set_aside(target):
        with contextlib.suppress(OSError):  # the new version is there; the next `add` takes the old one away
            os.rename(aside, folder / aside.name)
    return [version.id for version in versions]


def _put_back(kept: Path, file: Path) -> None:
    """Make a file what it was: the copy that was kept of it, or not there."""
    if kept.exists():
        os.replace(kept, file)
    else:
        file.unlink(missing_ok=True)


def mend(root: Path) -> None:
    """Rename back the versions that a killed `add` has set aside; not while another `add` is at it. Never raises."""
    with contextlib.suppress(OSError):
        lost = [bundle for bundle in root.glob("[!.]*") if not all(_partner(p).exists() for p in _set_aside(bundle))]
        if lost:
            with alone(root, wait=False):
                for bundle in lost:
                    _mend_bundle(bundle)


def _mend_bundle(bundle: Path) -> None:
    """Rename back what has nothing in its place, and take the rest away. Raises: OSError."""
    for aside in _set_aside(bundle):
        if _partner(aside).exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, _partner(aside))


def _set_aside(bundle: Path) -> list[Path]:
    found = bundle.glob(f"{REPLACED}*") if bundle.is_dir() else ()
    return [path for path in found if NAME_PATTERN.fullmatch(path.name.removeprefix(REPLACED))]


def _partner(aside: Path) -> Path:
    return aside.with_name(aside.name.removeprefix(REPLACED))


@contextlib.contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A hidden folder beside the bundles, on the same file system; gone afterwards with all that is left in it.

    What a killed command left behind goes too.
    """
    with contextlib.ExitStack() as stack:
        with alone(root):  # so that nobody sweeps a folder whose lock is not taken yet
            _sweep(root)
            folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=root))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = stack.enter_context((folder / _LOCK).open("wb"))
            with contextlib.suppress(OSError):  # a file system without locks: nobody can take it from us either
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder


class _NotCopied(Exception):
    """A file cannot be copied; its argument is the OSError."""


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a bundle. Raises: OSError: of the first file that cannot be copied; copytree tells of all, as a text."""

    def copy(one: str, other: str) -> str:
        try:
            return shutil.copy2(one, other)
        except OSError as error:
            raise _NotCopied(error) from error

    ignored = shutil.ignore_patterns(".*", "__pycache__")
    try:
        shutil.copytree(source, target, symlinks=False, ignore=ignored, copy_function=copy)
    except _NotCopied as failed:
        raise failed.args[0] from None


def _sweep(root: Path) -> None:
    """Remove the staging folders whose makers are no more."""
    for folder in root.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError):
            try:
                lock = (folder / _LOCK).open("r+b")
            except FileNotFoundError:
                shutil.rmtree(folder)
                continue
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


@contextlib.contextmanager
def _os_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except (BundleInvalid, ConfigError):
        raise
    except OSError as error:
        name = error.filename2 or error.filename  # of a copy, the target
        where = printable(os.fsdecode(name)) if isinstance(name, str | bytes) else place
        raise file_error(error, f"{where} cannot be written: {printable(error.strerror or error)}.") from error
