"""The `appliance` command: groups of verbs, each in a module of its own. Arguments in, exit code out."""

import os
import sys
from pathlib import Path

# Read once, when grpc is imported below: its own lines about every failed handshake would fill the journal.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import click

from appliance import __version__
from appliance.cli.certs import certs
from appliance.cli.check import check
from appliance.cli.config import config
from appliance.cli.keys import keys
from appliance.cli.models import models
from appliance.cli.serve import reload, serve
from appliance.cli.workflows import workflows
from appliance.core.errors import ApplianceError

EXIT_OPERATOR = 2
"""Something that the operator must change: configuration, a file, an argument."""


class _Group(click.Group):
    """Turns our errors into one line and an exit code; a traceback would only hide the sentence."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ApplianceError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(EXIT_OPERATOR)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="inference-appliance")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    envvar="APPLIANCE_CONFIG",
    help="Configuration file; default: /etc/inference-appliance/appliance.toml.",
)
@click.pass_context
def cli(ctx: click.Context, config_file: Path | None) -> None:
    """Clarifai's predict API on your own hardware."""
    ctx.obj = config_file


for command in (serve, reload, check, config, certs, keys, models, workflows):
    cli.add_command(command)


def main() -> None:
    """Entry point."""
    sys.exit(cli())
