"""`appliance log-level`."""

import json
from pathlib import Path

import click

from appliance.cli import admin
from appliance.core import config as configuration
from appliance.core.errors import ConfigError
from appliance.core.logs import COMPONENTS, LEVELS


@click.command(name="log-level")
@click.argument("component", required=False, type=click.Choice([*COMPONENTS, "all"]))
@click.argument("level", required=False, type=click.Choice(LEVELS))
@click.option("--reset", is_flag=True, help="Give COMPONENT, or all, the configured level (log.level) again.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def log_level(config_file: Path | None, component: str | None, level: str | None, reset: bool, as_json: bool) -> None:
    """Show from which level on each component of the running daemon logs, or change it, until a restart.

    `api debug` logs calls that were answered, too, ten a second in each front. A change holds in every process, and
    outlives a reload.
    """
    if level is not None and reset:
        raise click.UsageError("Give a LEVEL or --reset, not both.")
    if component is not None and level is None and not reset:
        raise click.UsageError(f"Give {component} a LEVEL, or --reset.")
    socket = configuration.load(config_file).config.admin.socket
    if component is None and not reset:
        answer = admin.ask(socket, "/log-levels")
    else:
        answer = admin.ask(socket, "/log-levels", post=True, body={"component": component or "all", "level": level})
    if not answer.get("ok"):
        raise ConfigError(str(answer.get("message")))
    if as_json:
        shown = {key: answer[key] for key in ("level", "components", "changed")}
        click.echo(json.dumps(shown, indent=1))
        return
    for name, own in answer["components"].items():
        click.echo(f"{name:<14}{own}" + (" (changed)" if name in answer["changed"] else ""))
