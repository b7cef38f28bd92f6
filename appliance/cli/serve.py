"""`appliance serve` and `appliance reload`."""

import asyncio
import faulthandler
import logging
import resource
import signal
from pathlib import Path

import click
import uvloop

from appliance.cli import admin
from appliance.core import config as configuration
from appliance.core import logs
from appliance.core.config import Admin, ConfigInvalid
from appliance.core.errors import ConfigError
from appliance.daemon.child import leave, return_large_blocks, spare_the_collector
from appliance.daemon.service import Daemon
from appliance.media.images import ignore_warnings

_log = logging.getLogger(__name__)

_OTHER_FILES = 512
"""Files and sockets that are no connections: models, logs, listeners, pipes."""


@click.command()
@click.pass_obj
def serve(config_file: Path | None) -> None:
    """Run the daemon in the foreground (systemd starts it this way)."""
    # A reload asked for before there is anything to reload must not be the default, death.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faulthandler.enable()  # systemd's watchdog aborts a supervisor that hangs: where it hung is worth knowing
    loaded = configuration.load(config_file)
    logs.set_up(loaded.config.log.level)
    ignore_warnings()
    return_large_blocks()
    spare_the_collector()
    _allow_descriptors(loaded.config.connections.max)

    async def run() -> None:
        await Daemon(loaded, config_file).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    leave(0)  # everybody has been answered


def _allow_descriptors(connections: int) -> None:
    """Raise the soft limit of open files to the hard one: systemd gives 1024, and a connection takes one each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < connections + _OTHER_FILES:
        _log.warning(
            "the system allows %d open files, which is too few for connections.max = %d; raise LimitNOFILE in the unit",
            hard,
            connections,
        )


@click.command()
@click.pass_obj
def reload(config_file: Path | None) -> None:
    """Let the running daemon take over configuration, certificates, keys and bundles.

    Exits non-zero, with the reason, when the daemon kept its last good state.
    """
    answer = admin.ask(_socket(config_file), "/reload", post=True)
    if not answer.get("ok"):
        raise ConfigError(f"The daemon kept its last good state: {answer.get('message')}")
    if not logs.stderr_is_journal():  # there the daemon has said so itself
        click.echo(answer["message"])


def _socket(config_file: Path | None) -> Path:
    """Where the daemon is asked. What is wrong with the configuration is the daemon's to say, and to count."""
    try:
        return configuration.load(config_file).config.admin.socket
    except ConfigInvalid:
        usual = Admin().socket
        if config_file in (None, configuration.MAIN_FILE) and usual.exists():
            return usual
        raise
