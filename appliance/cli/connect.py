"""`appliance connect`: run the forwarder that holds a client certificate for clients that cannot send one."""

import asyncio
import logging
import resource
import signal
from pathlib import Path
from typing import Any

import click
import uvloop
from click.core import ParameterSource

from appliance.connect import checking, settings
from appliance.connect.credentials import Credentials
from appliance.connect.forwarder import Forwarder
from appliance.connect.settings import Settings
from appliance.core import logs
from appliance.core.errors import ConfigError
from appliance.core.systemd import Notifier

_log = logging.getLogger(__name__)

_FILES_EACH, _OTHER_FILES = 2, 512
"""Descriptors of a forwarded connection; and of those that are answered here, listeners, files."""


def _options(command: Any) -> Any:
    """An option for each setting; the field's description is its help."""
    for name, field in reversed(Settings.model_fields.items()):
        kind = type(field.default) if isinstance(field.default, int | float) else str
        default = "" if field.is_required() or field.default is None else f"  [default: {field.default}]"
        flag = "--" + name.replace("_", "-")
        flags = (flag, "--cert") if name == "certificate" else (flag,)
        command = click.option(*flags, name, type=kind, help=f"{field.description}{default}")(command)
    return command


@click.command()
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help=f"Configuration file; default: {settings.DEFAULT_FILE}, which need not exist.",
)
@_options
@click.option("--check", is_flag=True, help="Look at files, connection and certificate, say what is wrong, and end.")
@click.option("--example", is_flag=True, help="Print a configuration file with every key, its meaning and default.")
@click.pass_context
def connect(ctx: click.Context, /, file: Path | None, check: bool, example: bool, **flags: object) -> None:
    """Forward local connections to an appliance that demands a client certificate.

    Runs on the client's host. Point the SDK's base_url at http://localhost:8080 (--listen); each connection becomes a
    TLS connection to --upstream, with --certificate. The key's passphrase comes from a file or the environment, never
    from a flag.

    --check exits with 1 when clients would not get through; a configuration that cannot be used exits with 2, a
    certificate or key with 3, a port that is taken with 4.
    """
    if example:
        click.echo(settings.example(), nl=False)
        return
    if ctx.parent is not None and ctx.parent.get_parameter_source("config_file") == ParameterSource.COMMANDLINE:
        raise ConfigError("--config before connect names the daemon's file; write: appliance connect --config FILE.")
    loaded = settings.load(file, flags)
    if check:
        ctx.exit(_check(loaded))
    # A reload asked for before there is anything to reload must not be the default, death.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logs.set_up(loaded.log_level)
    _allow_descriptors(loaded.max_connections)
    forwarder = Forwarder(loaded, Credentials(loaded), Notifier())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(forwarder.run())
    logs.tell_left_out()


def _check(loaded: Settings) -> int:
    logging.getLogger(logs.ROOT).addHandler(logging.NullHandler())  # the report says it all
    logging.getLogger(logs.ROOT).propagate = False
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(checking.check(loaded))
    for finding in found:
        click.echo(f"{finding.state:<5} {finding.step:<12} {finding.text}")
    return int(any(finding.state == "fail" for finding in found))


def _allow_descriptors(connections: int) -> None:
    """Raise the soft limit of open files to the hard one: a login session gives 1024, and a connection takes two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = connections * _FILES_EACH + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        _log.warning(
            "the system allows %d open files, which is too few for max_connections = %d; allow %d, or lower it",
            hard,
            connections,
            needed,
        )
