"""`appliance reload`. Not beside `serve`, which starts sooner without an HTTP client."""

from pathlib import Path

import click

from appliance.cli import admin
from appliance.core import config as configuration
from appliance.core import logs
from appliance.core.config import Admin, ConfigInvalid
from appliance.core.errors import ConfigError


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
