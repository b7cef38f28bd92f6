"""`appliance serve` and `appliance reload`."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import sys
from pathlib import Path

import click
import uvloop

from appliance.cli import admin
from appliance.core import config as configuration
from appliance.core import logs
from appliance.core.errors import ConfigError
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
    loaded = configuration.load(config_file)
    logs.set_up(loaded.config.log.level)
    ignore_warnings()
    _return_large_blocks()
    _spare_the_collector()
    _allow_descriptors(loaded.config.connections.max)

    async def run() -> None:
        await Daemon(loaded, config_file).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    # Everybody has been answered. A thread of a graph that never ends would keep the interpreter from finishing, or
    # crash it on the way out.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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


def _return_large_blocks() -> None:
    """Let blocks of a MiB and more go back to the system when they are freed.

    glibc raises that threshold as it sees large blocks come and go, and then keeps hundreds of MiB of decoded pictures.
    Source: mallopt(3), M_MMAP_THRESHOLD = -3; other C libraries have no such knob.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 2**20)


def _spare_the_collector() -> None:
    """Let the garbage collector leave alone what was imported, and look for cycles less often.

    What was imported stays for good, and to look through its 90 000 objects takes 50 to 100 ms, in which nobody is
    answered. Answering makes no cycles, so there is little to find; but it makes many objects, and with the usual 700
    the collector would look in every turn of a busy loop. Models are loaded later: what is replaced is still found.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


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
