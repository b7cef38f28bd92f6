"""What every child of the supervisor does first and always: it hears of its end, and never outlives it."""

import asyncio
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import uvloop

from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.catalog.view import config_of, folder_of
from appliance.core import logs
from appliance.core.channel import Body
from appliance.core.config import Log
from appliance.media.images import ignore_warnings

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

HEARTBEAT_S = 0.2
"""Seconds between two signs of life on a child's board."""


def run(name: str, make: Callable[[socket.socket], object]) -> None:
    """Run a child until it leaves, as it does when its supervisor is gone; never returns.

    Args:    name: for lists of processes, 15 letters of it. make: makes it, on the loop, of the line to the supervisor.
    """
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    libc = ctypes.CDLL(None, use_errno=True)
    # Source: prctl(2). Whatever ends the supervisor, also SIGKILL, ends us; it may have ended before we said so.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NAME, name.encode()[:15])
    if os.getppid() != parent:
        os._exit(0)
    # What a terminal or systemd sends to the whole group is the supervisor's to hear.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ignore_warnings()
    spare_the_collector()

    async def main() -> None:
        kept = make(socket.socket(fileno=descriptor))  # what hangs on it must not be collected
        await asyncio.Event().wait()
        raise AssertionError(f"{kept} leaves by itself")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def place_of(request: Mapping[str, Any]) -> tuple[Path, BundleConfig, VersionFolder]:
    """The bundle and version that the supervisor asks to load."""
    return Path(request["path"]), config_of(request["config"]), folder_of(request["folder"])


def set_up_log(settings: Log, levels: Body) -> None:
    """Log as the configuration says; of levels, what `take_levels` takes."""
    logs.set_up(settings.level, settings.format)
    logs.limit(settings.rate)
    take_levels(levels, [])


def take_levels(levels: Body, descriptors: list[int]) -> None:
    """The supervisor tells which levels are written from now on."""
    logs.set_levels(levels["level"], levels["own"])


def leave(code: int) -> None:
    """End this process now. A thread of a graph that never ends would keep the interpreter from finishing."""
    logs.tell_left_out()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def spare_the_collector() -> None:
    """Let the garbage collector leave alone what was imported, and look for cycles less often.

    What was imported stays for good, and to look through its 90 000 objects takes 50 to 100 ms, in which nobody is
    answered. Answering makes no cycles, so there is little to find; but it makes many objects, and with the usual 700
    the collector would look in every turn of a busy loop. Models are loaded later: what is replaced is still found.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def return_large_blocks() -> None:
    """Let blocks of a MiB and more go back to the system when they are freed.

    glibc raises that threshold as it sees large blocks come and go, and then keeps hundreds of MiB of decoded pictures.
    Source: mallopt(3), M_MMAP_THRESHOLD = -3; other C libraries have no such knob.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**20)
