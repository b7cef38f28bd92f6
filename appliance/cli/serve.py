"""`appliance serve`."""

import asyncio
import faulthandler
import logging
import resource
import signal
from pathlib import Path

import click
import uvloop

from appliance.core import config as configuration
from appliance.core import logs
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
    settings = loaded.config.log
    logs.set_up(settings.level, settings.format)
    logs.limit(settings.rate)
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
