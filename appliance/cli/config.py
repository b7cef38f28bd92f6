"""`appliance config show | example`."""

import json
from pathlib import Path

import click

from appliance.core import config as configuration


@click.group()
def config() -> None:
    """See what is configured."""


@config.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def show(config_file: Path | None, as_json: bool) -> None:
    """Print every effective value and where it came from; secrets are redacted."""
    loaded = configuration.load(config_file)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    rows = list(loaded.rows())
    if as_json:
        click.echo(json.dumps({key: {"value": value, "from": origin} for key, value, origin in rows}, indent=1))
        return
    width = max(len(key) for key, _, _ in rows)
    for key, value, origin in rows:
        shown = "(unset)" if value is None else json.dumps(value, ensure_ascii=False)
        click.echo(f"{key:<{width}}  {shown}  # {origin}")


@config.command()
def example() -> None:
    """Print a configuration file with every key, its meaning and its default."""
    click.echo(configuration.example(), nl=False)
