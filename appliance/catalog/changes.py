"""Changing what lies under the root: add, remove, roll back. Every change is one rename, so that the watching daemon
sees the old state or the new one; what is half written has a hidden name."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from appliance.catalog import bundle as bundles
from appliance.catalog import importer
from appliance.catalog.bundle import CONFIG_FILE, BundleConfig, VersionFolder
from appliance.catalog.graph import read_graph
from appliance.catalog.state import read_held, write_held
from appliance.core.config import Catalog
from appliance.core.errors import BundleInvalid, ConfigError
from appliance.core.types import NAME_PATTERN


def add(source: Path, settings: Catalog, *, name: str = "", replace: bool = False) -> tuple[str, list[str], str]:
    """Copy a bundle (or a bare `.onnx` file) under the root, checked, with checksums and an explicit config.

    Args:
        name: of the bundle's folder; default: the source's.
        replace: whether versions and the config that are there already may be replaced.
    Returns: the bundle's name, the versions added, and the importer's sentence ("" when the config was explicit).
    Raises: BundleInvalid: it cannot be served. ConfigError: it is there already, or the root cannot be written.
    """
    if not source.exists():
        raise ConfigError(f"There is no {source}; name a bundle's folder or an .onnx file.")
    name = name or (source.stem if source.is_file() else source.resolve().name)
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be a bundle's name; use letters, digits and . _ - inside (--name).")
    if (settings.root / f"{name}.onnx").exists():
        raise ConfigError(f"{settings.root / name}.onnx is bundle {name!r} already; remove it, or say --name.")
    with _os_errors(settings.root):
        settings.root.mkdir(parents=True, exist_ok=True)
    with _os_errors(settings.root), _staging(settings.root) as staged:
        folder = staged / name
        versions, config = _stage(source, folder, settings)
        added = _publish(folder, settings.root / name, replace, settings)
    return name, added or [version.id for version in versions], config.sentence


def remove(name: str, version: str, settings: Catalog) -> None:
    """Take a bundle, or one version of it, away. Raises: ConfigError: there is none, or it cannot be removed."""
    target = find(name, settings)
    if version:
        if target.is_file() or not NAME_PATTERN.fullmatch(version) or not (target / version).is_dir():
            raise ConfigError(f"Bundle {name!r} has no version {version!r} of its own folder.")
        target = target / version
    with _os_errors(settings.root), _staging(settings.root) as staged:
        os.rename(target, staged / "removed")


def rollback(name: str, to: str, settings: Catalog) -> tuple[str, list[str]]:
    """Hold back every version newer than `to` (default: all but the second newest and older), release the others.

    Returns: the version that "newest" now means, and those held back.
    Raises: ConfigError: no such version, or nothing to go back to.
    """
    path = find(name, settings)
    ids = [version.id for version in bundles.find_versions(path, _file(path, settings))]
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
    with _os_errors(settings.state_dir):
        write_held(settings.state_dir, held)
    return to, sorted(held[name])


def find(name: str, settings: Catalog) -> Path:
    """Where a bundle lies. Raises: ConfigError: there is none of that name."""
    for path in (settings.root / name, settings.root / f"{name}.onnx"):
        if NAME_PATTERN.fullmatch(name) and path.exists():
            return path
    known = ", ".join(sorted(p.stem if p.is_file() else p.name for p in settings.root.glob("[!.]*"))) or "none"
    raise ConfigError(f"There is no bundle {name!r} in {settings.root}; there are: {known}.")


def _file(bundle: Path, settings: Catalog) -> str:
    """Name of the ONNX file in a bundle's versions."""
    config, _, _ = bundles.read_config(bundle, settings.user_id, settings.app_id)
    return config.onnx.file if config else "model.onnx"


def _stage(source: Path, folder: Path, settings: Catalog) -> tuple[list[VersionFolder], BundleConfig]:
    """Copy the source into the staging folder in our layout, and check what can be checked without loading it."""
    if source.is_file():
        (folder / "1").mkdir(parents=True)
        shutil.copyfile(source, folder / "1" / "model.onnx")
    else:
        bundles.check_links(source)
        shutil.copytree(source, folder, symlinks=False, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    config, model, concepts = bundles.read_config(folder, settings.user_id, settings.app_id)
    versions = bundles.find_versions(folder, config.onnx.file if config else "model.onnx")
    if versions[0].path == folder:
        # A bare model.onnx at the top: give it the version folder that the layout has.
        (folder / "1").mkdir()
        for path in [p for p in folder.iterdir() if p.name not in ("1", CONFIG_FILE)]:
            os.rename(path, folder / "1" / path.name)
        versions = bundles.find_versions(folder, config.onnx.file if config else "model.onnx")
    if config is None:
        config = importer.infer_config(folder, versions[0], model, concepts, settings.user_id, settings.app_id)
        explicit = bundles.as_yaml(config, folder / CONFIG_FILE)
        (folder / CONFIG_FILE).write_text(explicit, encoding="utf-8")
    for version in versions:
        read_graph(folder, bundles.check_inside(folder, version.model_file))
        bundles.write_checksums(version)
    return versions, config


def _publish(folder: Path, target: Path, replace: bool, settings: Catalog) -> list[str]:
    """Rename the staged bundle, or its versions, into place. Returns: the versions added to a bundle that was there."""
    if not target.exists():
        os.rename(folder, target)
        return []
    versions = bundles.find_versions(folder, _file(folder, settings))
    present = {path.name for path in target.iterdir() if path.is_dir()}
    clash = sorted(present & {version.id for version in versions})
    old, new = (
        (place / CONFIG_FILE).read_bytes() if (place / CONFIG_FILE).is_file() else b"" for place in (target, folder)
    )
    if not replace and clash:
        raise ConfigError(
            f"{target.name} has version {', '.join(clash)} already; give the new one another number, or say --replace."
        )
    if not replace and old != new:
        raise ConfigError(f"The {CONFIG_FILE} of {target.name} is another one than there is now; say --replace.")
    if old != new:
        os.replace(folder / CONFIG_FILE, target / CONFIG_FILE)
    for version in versions:
        if version.id in present:
            os.rename(target / version.id, folder / f".replaced-{version.id}")
        os.rename(folder / version.id, target / version.id)
    return [version.id for version in versions]


@contextlib.contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """A hidden folder beside the bundles, on the same file system; gone afterwards with all that is left in it."""
    folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _os_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except (BundleInvalid, ConfigError):
        raise
    except OSError as error:
        raise ConfigError(f"{error.filename or place} cannot be written: {error.strerror or error}.") from error
