"""`appliance serve` and `appliance reload`."""

import asyncio
import contextlib
import ctypes
import logging
import os
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


def _return_large_blocks() -> None:
    """Let blocks of a MiB and more go back to the system when they are freed.

    glibc raises that threshold as it sees large blocks come and go, and then keeps hundreds of MiB of decoded pictures.
    Source: mallopt(3), M_MMAP_THRESHOLD = -3; other C libraries have no such knob.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 2**20)


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
