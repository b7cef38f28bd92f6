"""Which CPUs the two sides of a benchmark use, and how much of them a process took."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cpus:
    """CPU numbers: `server` also runs the raw figures, `load` the load generator."""

    server: int
    load: int

    @property
    def shared(self) -> bool:
        """Whether there is only one CPU, so that the generator takes from the server."""
        return self.server == self.load


def choose_cpus() -> Cpus:
    """The first two CPUs we may use."""
    usable = sorted(os.sched_getaffinity(0))
    return Cpus(usable[0], usable[min(1, len(usable) - 1)])


def pin_to(*cpus: int) -> Callable[[], None]:
    """For `preexec_fn`: keep the new process, and all it starts, on these CPUs."""
    return lambda: os.sched_setaffinity(0, cpus)


def tree_seconds(root: int) -> float:
    """CPU seconds, user and system, that a process and all its descendants have used, ended ones included.

    Source: proc(5), /proc/pid/stat: fields 4 (ppid) and 14 to 17 (utime, stime, cutime, cstime).
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, field 2, may hold blanks and parentheses; what follows the last one is plain.
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(int(value) for value in fields[11:15])
    return sum(used for pid, used in ticks.items() if _descends(pid, root, parents)) / _TICKS


def _descends(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid not in (0, root):
        pid = parents.get(pid, 0)
    return pid == root
