"""`appliance top`: the status document, live."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from appliance.cli import admin
from appliance.cli.screen import screen
from appliance.cli.status import DOCUMENT, read
from appliance.core import config as configuration
from appliance.core.errors import ConfigError
from appliance.daemon.status import Status

_PATIENCE_S = 3.0
"""Seconds that the daemon has for an answer, in which keys wait."""

_OTHER_LINES, _ERRORS = 24, 5
"""Lines of the screen that are no models, about, and how many of them are errors."""


@click.command()
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Show it once, and end.")
@click.pass_obj
def top(config_file: Path | None, interval: float, once: bool) -> None:
    """Show what `status` shows, live, until q or Ctrl-C. When the daemon restarts meanwhile, it goes on."""
    socket = configuration.load(config_file).config.admin.socket
    console = Console()
    if once:
        console.print(_frame(_ask(socket), "", console.height))
    elif console.is_terminal:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(socket, console, interval)
    else:
        raise click.UsageError("top needs a terminal; `appliance status` and `appliance top --once` do not.")


def _watch(socket: Path, console: Console, interval_s: float) -> None:
    """Show it until somebody has seen enough."""
    found: Status | None = None
    with _keys() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            trouble = ""
            try:
                found = _ask(socket)
            except ConfigError as error:  # it restarts, and may be of another version for a moment
                trouble = str(error)
            live.update(_frame(found, trouble, console.height), refresh=True)
            if _seen_enough(keyboard, interval_s):
                return


def _ask(socket: Path) -> Status:
    return read(admin.text(socket, DOCUMENT, timeout_s=_PATIENCE_S))


def _frame(found: Status | None, trouble: str, height: int) -> RenderableType:
    parts: list[RenderableType] = [Text(f"✕ {trouble} Trying again.", style="bold red")] if trouble else []
    if found is not None:
        parts.append(screen(found, models=max(5, height - _OTHER_LINES), errors=_ERRORS))
    return Group(*parts)


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal's keys one by one and unseen, as a descriptor; None where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _seen_enough(keyboard: int | None, seconds: float) -> bool:
    """Wait so long. Returns: whether q was pressed meanwhile, or the terminal is gone."""
    deadline = time.monotonic() + seconds
    while (rest := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([] if keyboard is None else [keyboard], [], [], rest)
        if readable:
            pressed = os.read(readable[0], 64)
            if not pressed or b"q" in pressed.lower():
                return True
    return False
