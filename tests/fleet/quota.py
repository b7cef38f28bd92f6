"""Parts of a CPU for processes that run: a control group each, of version 2 or 1, whichever the machine has."""

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000


def reason_not() -> str:
    """Why no quota can be given here, or ""."""
    folder = _folder()
    if folder is None:
        return "no control groups for CPU time are mounted"
    try:
        made = folder / f"fleet-probe-{os.getpid()}"
        made.mkdir()
        made.rmdir()
    except OSError as error:
        return f"no control group can be made: {error}"
    return ""


def _folder() -> Path | None:
    """Where groups with the CPU controller are made."""
    if (_ROOT / "cpu" / "cpu.cfs_quota_us").exists():
        return _ROOT / "cpu"
    controlled = _ROOT / "cgroup.subtree_control"
    if controlled.exists() and "cpu" in controlled.read_text(encoding="ascii").split():
        return _ROOT
    return None


def _name(site: Path) -> str:
    return "-".join(["fleet", *site.parts[-2:]])


def remove(site: Path) -> None:
    """The groups of a site that has ended, if it could not do so itself."""
    folder = _folder()
    for group in folder.glob(f"{_name(site)}-*") if folder is not None else ():
        group.rmdir()


class Quotas:
    """Groups of processes that are bounded, from `with` on; none of them stays."""

    def __init__(self, site: Path) -> None:
        """Args: site: the folder of those that use them, which names the groups."""
        folder = _folder()
        assert folder is not None, reason_not()
        self._folder, self._name = folder, _name(site)
        self._groups: dict[str, Path] = {}
        self._before: dict[str, float] = {}

    def __enter__(self) -> "Quotas":
        return self

    def __exit__(self, *_: object) -> None:
        for group in self._groups.values():
            for pid in _pids(group):
                _move(self._folder, pid)
            group.rmdir()

    def bound(self, name: str, pid: int, cpus: float) -> None:
        """The process and all its children have no more than that part of a CPU."""
        group = self._groups[name] = self._folder / f"{self._name}-{name}"
        group.mkdir()
        quota = int(cpus * _PERIOD_US)
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}", encoding="ascii")
        else:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US), encoding="ascii")
            (group / "cpu.cfs_quota_us").write_text(str(quota), encoding="ascii")
        for each in _tree(pid):
            _move(group, each)

    def restart(self) -> None:
        """Count anew."""
        self._before = {name: _spent_s(group) for name, group in self._groups.items()}

    def spent_s(self, name: str) -> float:
        """CPU seconds since then."""
        return _spent_s(self._groups[name]) - self._before[name]


def _move(group: Path, pid: int) -> None:
    try:
        (group / "cgroup.procs").write_text(str(pid), encoding="ascii")
    except ProcessLookupError:
        return


def _pids(group: Path) -> list[int]:
    return [int(line) for line in (group / "cgroup.procs").read_text(encoding="ascii").split()]


def _spent_s(group: Path) -> float:
    """CPU seconds of the processes that are in it."""
    return sum(cpu_s(pid) for pid in _pids(group))


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, 0 when it has ended. Source: proc(5), `stat`: fields 14 and 15."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [pid, *(each for child in children for each in _tree(int(child)))]
