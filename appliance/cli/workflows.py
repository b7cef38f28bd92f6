"""`appliance workflows list`."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from appliance.catalog.workflows import Workflows
from appliance.cli import admin
from appliance.core import config as configuration
from appliance.core.config import Config
from appliance.core.files import printable


@click.group()
def workflows() -> None:
    """See what workflows are served."""


@workflows.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def list_workflows(config_file: Path | None, as_json: bool) -> None:
    """List workflow files, what they are served as, and what keeps a file or a node from being served."""
    rows = _rows(configuration.load(config_file).config)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table("file", "workflow", "nodes", "version", "problem")
    for row in rows:
        cells = (row["file"], row["workflow"], row["nodes"] or "", row["version"], row["problem"])
        table.add_row(*(Text(printable(cell)) for cell in cells))  # what files say is no markup
    Console().print(table)


def _rows(config: Config) -> Sequence[Mapping[str, Any]]:
    """What the daemon serves; what the files say when it does not run."""
    try:
        rows: Sequence[Mapping[str, Any]] = admin.ask(config.admin.socket, "/status")["workflows"]
    except admin.NotRunning:
        click.echo("The daemon does not run: this is what the files say, whatever models there are.", err=True)
        found = Workflows(config.catalog.model_copy(update={"settle_s": 0.0}))
        asyncio.run(found.look())
        return found.describe()
    return rows
