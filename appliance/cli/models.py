"""`appliance models list | add | remove | rollback | inspect | compile`."""

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from appliance.catalog import bundle as bundles
from appliance.catalog import changes, importer
from appliance.catalog.repository import bundle_paths
from appliance.catalog.state import read_held
from appliance.cli import admin
from appliance.core import config as configuration
from appliance.core.config import Config
from appliance.core.errors import BundleInvalid, ConfigError
from appliance.core.files import printable

_WAIT = click.option("--wait", type=float, default=0.0, help="Seconds to wait until the daemon serves the change.")


@click.group()
def models() -> None:
    """See and change what is served."""


@models.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def list_models(config_file: Path | None, as_json: bool) -> None:
    """List bundles and versions, their state, and why one is not ready."""
    config = configuration.load(config_file).config
    rows = _catalog(config)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table("bundle", "model", "version", "state", "why not")
    for row in rows:
        for entry in row["versions"]:
            _add_row(table, row["bundle"], row["model"], entry["version"], entry["state"], entry["problem"])
        if row["problem"]:
            _add_row(table, row["bundle"], row["model"], "", "", row["problem"])
    Console().print(table)


@models.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--name", default="", help="Name of the bundle's folder; default: the source's.")
@click.option("--replace", is_flag=True, help="Replace versions and the config that are there already.")
@_WAIT
@click.pass_obj
def add(config_file: Path | None, source: Path, name: str, replace: bool, wait: float) -> None:
    """Add a bundle, new versions of one, or a bare .onnx file."""
    config = configuration.load(config_file).config
    added = changes.add(source, config.catalog, name=name, replace=replace)
    click.echo(f"added {added.name}, version {', '.join(added.versions)}")
    if added.released:
        click.echo(f"no longer held back: {', '.join(added.released)}")
    if added.sentence:
        click.echo(printable(added.sentence))
    _settle(config, added.name, wait)


@models.command()
@click.argument("name")
@click.option("--version", default="", help="Only this version.")
@click.pass_obj
def remove(config_file: Path | None, name: str, version: str) -> None:
    """Take a bundle (or one version) away; requests it has are finished."""
    config = configuration.load(config_file).config
    changes.remove(name, version, config.catalog)
    click.echo(f"removed {name}" + (f" version {version}" if version else ""))
    _settle(config, "", 0.0)


@models.command()
@click.argument("name")
@click.option("--to", default="", help="The version to go back (or forward) to; default: the one before the newest.")
@_WAIT
@click.pass_obj
def rollback(config_file: Path | None, name: str, to: str, wait: float) -> None:
    """Serve an older version: newer ones are held back until you roll forward with --to."""
    config = configuration.load(config_file).config
    newest, held = changes.rollback(name, to, config.catalog)
    click.echo(f"{name}: newest is {newest}" + (f"; held back: {', '.join(held)}" if held else "; none held back"))
    _settle(config, name, wait)


@models.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def inspect(config_file: Path | None, name: str, as_json: bool) -> None:
    """Show one bundle: its explicit config, its versions, checksums, and how its rows are batched and why."""
    config = configuration.load(config_file).config
    path = changes.find(name, config.catalog)
    explicit, model, concepts = bundles.read_config(path, config.catalog.user_id, config.catalog.app_id)
    versions = bundles.find_versions(path, bundles.graph_file(explicit))
    if explicit is None:
        explicit = importer.infer_config(
            path, versions[0], model, concepts, config.catalog.user_id, config.catalog.app_id
        )
    rows = (row for row in _catalog(config) if row["bundle"] == name)
    served: dict[str, Any] = next(rows, {"versions": []})
    if as_json:
        content = {"config": bundles.as_yaml(explicit), "sentence": explicit.sentence, "served": served}
        click.echo(json.dumps(content, indent=1))
        return
    click.echo(bundles.as_yaml(explicit).rstrip())
    by_id = {entry["version"]: entry for entry in served["versions"]}
    for version in versions:
        entry = by_id.get(version.id, {})
        click.echo(f"\nversion {version.id}: {entry.get('state', 'on disk')}")
        for key in ("problem", "device", "batching", "curve", "load_seconds"):
            if entry.get(key):
                click.echo(f"  {key.replace('_', ' ')}: {printable(entry[key])}")
        for note in entry.get("notes", ()):
            click.echo(f"  note: {printable(note)}")
        for file, digest in (entry.get("sha256") or bundles.checksums(version)).items():
            click.echo(f"  sha256 {digest}  {printable(file)}")


@models.command(name="compile")
@click.argument("model")
@click.option("--fp16", is_flag=True, help="Let TensorRT compute in half precision.")
@click.pass_obj
def compile_model(config_file: Path | None, model: str, fp16: bool) -> None:
    """Build TensorRT engines for a bundle, BUNDLE or BUNDLE:VERSION; it is served by them from its next load on.

    Takes minutes and much of the GPU; the daemon goes on with CUDA meanwhile. An engine holds for this GPU, this
    TensorRT and this content of the bundle; anything else is served by CUDA. To go back, remove cache/tensorrt in the
    state folder.
    """
    from appliance.cli.compiling import compile_bundle  # the engine, which the other verbs do not need

    name, _, version = model.partition(":")
    compile_bundle(configuration.load(config_file).config, name, version, fp16=fp16, say=click.echo)


def _add_row(table: Table, *cells: str) -> None:
    """What bundles say is data: no markup for the table, and nothing that steers the terminal."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def _catalog(config: Config) -> list[dict[str, Any]]:
    """What the daemon serves; what lies on disk when it does not run."""
    try:
        rows: list[dict[str, Any]] = admin.ask(config.admin.socket, "/status")["catalog"]
    except admin.NotRunning:
        click.echo("The daemon does not run: this is what lies on disk.", err=True)
        return _on_disk(config)
    return rows


def _on_disk(config: Config) -> list[dict[str, Any]]:
    held = read_held(config.catalog.state_dir)
    rows = []
    for name, path in sorted(_paths(config).items()):
        row: dict[str, Any] = {"bundle": name, "model": "", "problem": "", "versions": []}
        try:
            explicit, _, _ = bundles.read_config(path, config.catalog.user_id, config.catalog.app_id)
            row["model"] = str(explicit.key) if explicit else ""
            row["versions"] = [
                {"version": v.id, "state": "held" if v.id in held.get(name, ()) else "on disk", "problem": ""}
                for v in bundles.find_versions(path, bundles.graph_file(explicit))
            ]
        except (BundleInvalid, OSError) as error:
            row["problem"] = printable(error)
        rows.append(row)
    return rows


def _paths(config: Config) -> dict[str, Path]:
    try:
        return bundle_paths(config.catalog.root)
    except OSError as error:
        raise ConfigError(f"catalog.root {config.catalog.root} cannot be read: {error.strerror}.") from error


def _settle(config: Config, name: str, wait_s: float) -> None:
    """Tell a running daemon to look, and wait until the bundle is served, if asked to."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            rows = admin.ask(config.admin.socket, "/look", post=True)["catalog"]
        except admin.NotRunning:
            if wait_s:
                raise
            return
        row = next((row for row in rows if row["bundle"] == name), None)
        if not wait_s or row is None or _served(row):
            return
        problem = row["problem"] or next((v["problem"] for v in row["versions"] if v["state"] == "failed"), "")
        if time.monotonic() >= deadline:
            held = bool(row["versions"]) and all(v["state"] == "held" for v in row["versions"])
            why = problem or ("all its versions are held back" if held else "still loading")
            raise ConfigError(f"{name} is not served after {wait_s:g} s: {why}")
        if any(v["state"] == "failed" for v in row["versions"]):
            raise ConfigError(f"{name} cannot be served: {problem}")
        time.sleep(0.2)


def _served(row: dict[str, Any]) -> bool:
    states = {entry["state"] for entry in row["versions"]}
    return "ready" in states and states <= {"ready", "held"} and not row["problem"]
