"""`appliance serve` and `appliance reload`."""

import asyncio
from pathlib import Path

import click
import uvloop

from appliance.cli import admin
from appliance.core import config as configuration
from appliance.core import logs
from appliance.core.errors import ConfigError
from appliance.daemon.service import Daemon
from appliance.media.images import ignore_warnings


@click.command()
@click.pass_obj
def serve(config_file: Path | None) -> None:
    """Run the daemon in the foreground (systemd starts it this way)."""
    loaded = configuration.load(config_file)
    logs.set_up(loaded.config.log.level)
    ignore_warnings()

    async def run() -> None:
        await Daemon(loaded, config_file).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


@click.command()
@click.pass_obj
def reload(config_file: Path | None) -> None:
    """Let the running daemon take over configuration, certificates, keys and bundles.

    Exits non-zero, with the reason, when the daemon kept its last good state.
    """
    settings = configuration.load(config_file).config.admin
    answer = admin.ask(settings.socket, "/reload", post=True)
    if not answer.get("ok"):
        raise ConfigError(f"The daemon kept its last good state: {answer.get('message')}")
    click.echo(answer["message"])
