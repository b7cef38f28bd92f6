"""A child as its supervisor has it: one process, from its start to its end, and when another takes its place."""

import asyncio
import contextlib
import math
import mmap
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from appliance.core.channel import Body, Channel, ChannelClosed, pair
from appliance.core.errors import ConfigError
from appliance.core.ledger import SIZE as COUNTS_SIZE
from appliance.core.shared import Segment
from appliance.engine import board as boards
from appliance.engine.board import DEVICE_GONE, Activity, Board

_STUCK_S = 1.0
"""Seconds of silence after which a child is replaced whose loop's thread was not once given a CPU meanwhile, though
it does not wait for one: it is stopped, or waits for ever. One that computes, or gets no CPU, has longer."""

_START_S = 60.0
"""Seconds in which a child must have started."""

_BACK_OFF_S = (0.0, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a child is started again, by how many of its ends lie within the last minute."""

WHY = ("signal", "silent", "canary", "device", "exit")
"""Why a child ended: a crash or somebody's signal; by us, as it was silent or its canary run failed; it gave its device
up; anything else."""


class Child:
    """One process of ours: its line, its board, its counts."""

    def __init__(
        self,
        name: str,
        module: str,
        handlers: Mapping[str, Callable[[Body, list[int]], None]],
        on_end: "Callable[[Child], None]",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. Raises: OSError. Args: on_end: called once, when the process is gone."""
        self.name = name
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self.board = Board(Segment.create(f"{name} board", boards.SIZE))
        self.counts = Segment.create(f"{name} counts", COUNTS_SIZE)
        ours, theirs = pair()
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID") and not key.startswith("LISTEN_")
        }
        self.process = subprocess.Popen(  # noqa: S603  # our own modules
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**inherited, **(environment or {})},
        )
        theirs.close()
        self.patient_from = time.monotonic()
        """Silence before this moment does not count."""
        self._turns, self._moved_at = "", self.patient_from
        self.started = False
        self.gone = asyncio.Event()
        self.last: list[Activity] = []
        """What it was doing when it ended."""
        self._reason = ""
        self._cpu_s = 0.0
        self._pidfd = os.pidfd_open(self.process.pid)
        self._loop.add_reader(self._pidfd, self._ended)
        self.channel = Channel(ours, {}, handlers)

    async def start(self, body: Body, *segments: Segment) -> Body:
        """Have it begin; what it answers. Raises: ApplianceError: it cannot. ChannelClosed: it ended."""
        shared = [self.board.segment.descriptor, self.counts.descriptor, *(each.descriptor for each in segments)]
        async with asyncio.timeout(_START_S):
            answer = await self.channel.call("start", body, shared)
        if self.gone.is_set():  # it ended in this very moment
            raise ChannelClosed
        self.started = True
        return answer

    @property
    def silent_s(self) -> float:
        """Seconds since it last showed that it lives."""
        return min(self.board.turned_ago_s, time.monotonic() - self.patient_from)

    def is_stuck(self) -> bool:
        """Whether its loop is silent, and its thread stood still all that time; to be asked again and again."""
        try:
            turns = Path(f"/proc/{self.process.pid}/schedstat").read_text(encoding="ascii").split()[2]
            state = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
        except (OSError, IndexError):  # it is gone, or the kernel does not count: silence alone decides
            return False
        now = time.monotonic()
        if turns != self._turns:
            self._turns, self._moved_at = turns, now
        # Source: proc(5). R waits for a CPU, D for a disk; T is stopped, S sleeps: the loop's longest sleep is shorter.
        return state in "TtS" and min(self.silent_s, now - self._moved_at) > _STUCK_S

    def kill(self, reason: str = "") -> None:
        """End it now. Args: reason: a word for `why_it_ended`."""
        self._reason = self._reason or reason
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def resident_bytes(self) -> float:
        """Memory that it has resident; NaN when it is gone. Any thread may ask."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        except (OSError, IndexError):
            return math.nan
        return float(int(pages) * mmap.PAGESIZE)

    def cpu_seconds(self) -> float:
        """CPU time that it took; what was last known when it is gone."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            # Source: proc(5), fields 14 and 15; the third is the first behind the name.
            self._cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError):
            pass
        return self._cpu_s

    def why_it_ended(self) -> str:
        """In one of the words of `WHY`."""
        if self._reason:
            return self._reason
        code = self.process.returncode
        if code is not None and code < 0:
            return "signal"
        return "device" if code == DEVICE_GONE else "exit"

    def how_it_ended(self) -> str:
        """In words."""
        code = self.process.returncode
        if code is not None and code < 0:
            named = {number.value: number.name for number in signal.Signals}
            return f"was ended by {named.get(-code, f'signal {-code}')}"
        return f"ended with exit code {code}"

    def _ended(self) -> None:
        if self.process.poll() is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.channel.close()
        self.last = self.board.activities()
        self.gone.set()
        self._on_end(self)
        self.board.close()
        self.counts.close()


class NeverStarted(ConfigError):
    """A child ended, or said nothing, before it had started."""


class EngineDied(Exception):
    """The process of an engine ended while it was asked for something."""

    def __init__(self, child: Child) -> None:
        super().__init__(child.name)
        self.child = child


class Restarts:
    """When a child that ended is started again."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=len(_BACK_OFF_S))

    def pause_s(self) -> float:
        """Seconds to wait now; counts this end."""
        now = time.monotonic()
        self._ends.append(now)
        recent = sum(now - end < 60 for end in self._ends)
        return _BACK_OFF_S[min(recent, len(_BACK_OFF_S)) - 1]
