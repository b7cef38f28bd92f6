"""`appliance keys create | list | revoke`."""

import json
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from appliance.api import keys as store
from appliance.api.keys import DEFAULT_PRINCIPAL
from appliance.core import config as configuration
from appliance.core.errors import ConfigError
from appliance.core.files import printable

_KEYS_FILE = click.option(
    "--keys-file", type=click.Path(path_type=Path), help="Instead of the configured auth.keys_file."
)


@click.group()
def keys() -> None:
    """Make, list and revoke keys (PATs)."""


@keys.command()
@click.option("--principal", default=DEFAULT_PRINCIPAL, show_default=True, help="Whose key it is: a [[principal]].")
@click.option("--note", default="", help="What it is for.")
@click.option("--quiet", is_flag=True, help="Print the key alone, for scripts.")
@_KEYS_FILE
@click.pass_obj
def create(config_file: Path | None, principal: str, note: str, quiet: bool, keys_file: Path | None) -> None:
    """Make a key. It is shown once and stored as a hash."""
    loaded = configuration.load(config_file).config
    known = {DEFAULT_PRINCIPAL, *(entry.name for entry in loaded.principal)}
    if principal not in known:
        raise ConfigError(f"There is no [[principal]] {principal!r}; configured: {', '.join(sorted(known))}.")
    key, entry = store.create_key(keys_file or loaded.auth.keys_file, principal, note)
    if quiet:
        click.echo(key)
        return
    click.echo(f"id        {entry.id}\nprincipal {entry.principal}\nkey       {key}")
    click.echo("The key is not shown again. Clients send it as `authorization: Key …` (SDK: pat=…).", err=True)


@keys.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_KEYS_FILE
@click.pass_obj
def list_keys(config_file: Path | None, as_json: bool, keys_file: Path | None) -> None:
    """List keys by id; the keys themselves are not stored."""
    entries = store.read_keys(keys_file or configuration.load(config_file).config.auth.keys_file)
    if as_json:
        shown = [{"id": e.id, "principal": e.principal, "note": e.note, "created_at": e.created_at} for e in entries]
        click.echo(json.dumps(shown, indent=1))
        return
    table = Table("id", "principal", "made", "note")
    for entry in entries:
        made = datetime.fromtimestamp(entry.created_at, UTC).strftime("%Y-%m-%d %H:%M")
        # What the file says is data: no markup for the table, and nothing that steers the terminal.
        table.add_row(*(Text(printable(cell)) for cell in (entry.id, entry.principal, made, entry.note)))
    Console().print(table)


@keys.command()
@click.argument("key_id")
@_KEYS_FILE
@click.pass_obj
def revoke(config_file: Path | None, key_id: str, keys_file: Path | None) -> None:
    """Revoke a key by its id; it is refused from the next request on."""
    entry = store.revoke_key(keys_file or configuration.load(config_file).config.auth.keys_file, key_id)
    click.echo(f"revoked {entry.id} of principal {entry.principal}")
