"""`appliance status`: the status document on one screen."""

import click
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from appliance.cli import admin, exits
from appliance.cli.screen import screen
from appliance.core import config as configuration
from appliance.core.errors import ConfigError
from appliance.daemon.status import Status

DOCUMENT = "/status.json"
_MODELS, _ERRORS = 20, 5
_READER = TypeAdapter(Status)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON: the document that docs/status.md describes.")
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show on one screen: health and why, calls, devices, models, certificates, orchestrator, last errors.

    Exits with 0 when it is healthy, with 1 when it is degraded (it serves, and something needs a look) or unhealthy (it
    does not serve), with 2 when the daemon does not answer.
    """
    text = admin.text(configuration.load(ctx.obj).config.admin.socket, DOCUMENT)
    found = read(text)
    if as_json:
        click.echo(text)
    else:
        Console().print(screen(found, models=_MODELS, errors=_ERRORS))
    ctx.exit(exits.OK if found.health == "healthy" else exits.FOUND)


def read(text: str) -> Status:
    """The document. Raises: ConfigError: the daemon is of a version that has another one, or none."""
    try:
        return _READER.validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            "The daemon's status cannot be read: it runs another version than this command. Restart it: systemctl "
            "restart inference-appliance."
        ) from error
