"""A server under test as a process: its ports, the CPU time that the scheduler counts for it, its memory."""

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cpu import pin_to
from bench.workload import ROOT

MODES = ("plain", "tls", "mtls")

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Process:
    """A running server. Attributes: ports: by mode, as in `MODES`."""

    name: str
    pid: int
    ports: dict[str, int]


def cpu_ns(pids: Sequence[int]) -> int:
    """CPU nanoseconds that these processes have used: all threads, ended ones included.

    Source: clock_getcpuclockid(3). The number is what the scheduler accounts (/proc/pid/task/*/schedstat, summed); the
    id is ~pid << 3 | CPUCLOCK_SCHED (Linux, include/linux/posix-timers.h).
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # ended meanwhile
            total += time.clock_gettime_ns(~pid << 3 | 2)
    return total


def memory_bytes(pids: Sequence[int], *, files: bool = True) -> int:
    """Memory of these processes, each page that they share counted once between them.

    Args:    files: with the pages of files, as programs and libraries are. Such pages are counted in part for whatever
        else on the machine has the same files, and the kernel takes them back when nobody reads them: without them a
        figure says what the processes themselves hold.
    Source:  proc(5), /proc/pid/smaps_rollup.
    """
    counted = ("Pss:",) if files else ("Pss_Anon:", "Pss_Shmem:")
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith(counted):
                total += int(line.split()[1]) * _KIB
    return total


def tree(root: int) -> list[int]:
    """A process and its living descendants."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            # The name, field 2, may hold blanks and parentheses; the parent is the second field after the last one.
            parent = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(file.parent.name))
    found = [root]
    for pid in found:  # grows meanwhile
        found += children.get(pid, [])
    return found


def python_server(kind: str, folder: Path) -> list[str]:
    """The command of a server of peer.py."""
    return [sys.executable, "-m", "bench.wire.peer", kind, str(folder)]


@contextlib.contextmanager
def running(name: str, command: Sequence[str], cpu: tuple[int, ...]) -> Iterator[Process]:
    """A server pinned to one CPU, listening; stopped at the end.

    Raises: RuntimeError: it did not start; with the end of what it wrote to its standard error.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, preexec_fn=pin_to(*cpu)
        )
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
            line = process.stdout.readline() if ready else ""
            if not line:
                process.kill()
                process.wait()
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"did not start: {last.replace(f'{ROOT}/', '')}")
            yield Process(name, process.pid, json.loads(line))
        finally:
            _stop(process)


def _stop(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.communicate(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
