"""Which CPUs the two sides of a benchmark use, and how much of them a process took."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cpus:
    """CPU numbers: those of `server` also run the raw figures, those of `load` the load generator."""

    server: tuple[int, ...]
    load: tuple[int, ...]

    @property
    def shared(self) -> bool:
        """Whether there are too few CPUs, so that the generator takes from the server."""
        return bool(set(self.server) & set(self.load))


def choose_cpus(server: int = 1) -> Cpus:
    """The first `server` CPUs that we may use for the server, the others (four at most) for the load."""
    usable = sorted(os.sched_getaffinity(0))
    own, rest = usable[:server], usable[server : server + 4]
    return Cpus(tuple(own), tuple(rest or own[-1:]))


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
