"""The `appliance` command: groups of verbs, each in a module of its own. Arguments in, exit code out."""

import importlib
import os
import sys
from pathlib import Path

# Read once, when grpc is imported below: its own lines about every failed handshake would fill the journal.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import click

from appliance import __version__
from appliance.cli import exits
from appliance.core.errors import ApplianceError

_COMMANDS = {
    "audit": "audit",
    "serve": "serve",
    "setup": "setup",
    "support-bundle": "support",
    "reload": "reload",
    "check": "check",
    "config": "config",
    "connect": "connect",
    "certs": "certs",
    "doctor": "doctor",
    "keys": "keys",
    "log-level": "levels",
    "metrics": "metrics",
    "models": "models",
    "orchestrator": "orchestrator",
    "predict": "predict",
    "status": "status",
    "top": "top",
    "usage": "usage",
    "workflows": "workflows",
}
"""Verb → module of this folder. Each is imported when it is wanted: `connect` runs on clients' hosts, where there is no
onnxruntime, and where a forwarder need not hold a model server in memory."""


class _Group(click.Group):
    """Turns our errors into one line and an exit code; a traceback would only hide the sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order of the alphabet."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The verb's command."""
        if name not in _COMMANDS:
            return None
        command: click.Command = getattr(
            importlib.import_module(f"appliance.cli.{_COMMANDS[name]}"), name.replace("-", "_")
        )
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ApplianceError as error:
            click.echo(exits.tell(error), err=True)
            ctx.exit(exits.status_of(error))
        except OSError as error:
            found = exits.foreseen(error)
            if found is None:
                raise
            click.echo(exits.tell(found), err=True)
            ctx.exit(exits.status_of(found))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="inference-appliance")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, readable=False),  # who may not read it is told how to mend that
    envvar="APPLIANCE_CONFIG",
    help="Configuration file; default: /etc/inference-appliance/appliance.toml.",
)
@click.pass_context
def cli(ctx: click.Context, config_file: Path | None) -> None:
    """Clarifai's predict API on your own hardware."""
    ctx.obj = config_file


def main() -> None:
    """Entry point."""
    sys.exit(cli(prog_name="appliance"))  # however it was started: completion goes by the name
