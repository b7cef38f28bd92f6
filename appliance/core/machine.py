"""What this machine lets us use: CPUs and memory, as the kernel's control groups bound them, and disks."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_DEVICES = Path("/dev")
_GPUS = Path("/proc/driver/nvidia/gpus")


def usable_cpus() -> int:
    """CPUs that affinity and the cgroup's quota leave us; at least 1."""
    cpus = len(os.sched_getaffinity(0))
    quota = _cpu_quota()
    return max(1, min(cpus, math.ceil(quota)) if quota else cpus)


def cpu_model() -> str:
    """What the kernel calls this machine's CPUs; "" where it does not say."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "CPU part", "cpu model"):
            return value.strip()
    return ""


def usable_memory() -> int:
    """Bytes of memory that the cgroup leaves us, or that the machine has."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(folder / "memory.max") for folder in _own_cgroups()]
    limits.append(_number(_CGROUP / "memory" / "memory.limit_in_bytes"))
    return min([physical, *(limit for limit in limits if limit)])


def resident_memory() -> int:
    """Bytes of memory that this process has now."""
    return int(_text(Path("/proc/self/statm")).split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Usage:
    """What the whole machine does, whoever does it. Source: proc(5), `stat` and `meminfo`."""

    def __init__(self) -> None:
        self.all_cpus = os.cpu_count() or 1
        self.all_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        """Bytes."""
        self._before = self._times()

    def cpus(self) -> float:
        """CPUs' worth of work since the last call, or since this was made."""
        busy, passed = self._times()
        before, self._before = self._before, (busy, passed)
        share = (busy - before[0]) / (passed - before[1]) if passed > before[1] else 0.0
        return min(1.0, max(0.0, share)) * self.all_cpus

    def memory(self) -> int:
        """Bytes that are in use, and could not be given to somebody else."""
        for line in _text(Path("/proc/meminfo")).splitlines():
            if line.startswith("MemAvailable:"):
                return max(0, self.all_memory - 1024 * int(line.split()[1]))
        return 0

    def _times(self) -> tuple[int, int]:
        """Ticks of all CPUs: in which they worked, and in all."""
        ticks = [int(field) for field in _text(Path("/proc/stat")).partition("\n")[0].split()[1:9]]
        idle = sum(ticks[3:5])  # waiting for a disk is idleness too
        return sum(ticks) - idle, sum(ticks)


@dataclass(frozen=True, slots=True)
class GpuFile:
    """An NVIDIA GPU that we may open, as the driver's files tell of it; "" for what they do not say."""

    minor: int
    name: str
    uuid: str


@dataclass(frozen=True, slots=True)
class Space:
    """Of a file system.

    Attributes:
        free: bytes that are left for us, who are not root.
        size: bytes in all.
        more_files: whether one more file can be made.
    """

    free: int
    size: int
    more_files: bool


def space(folder: Path) -> Space:
    """What is left where a folder lies. May take as long as its file system likes. Raises: OSError."""
    found = os.statvfs(folder)
    more_files = not found.f_files or found.f_favail > 0
    return Space(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, more_files)


def gpus() -> tuple[GpuFile, ...]:
    """Every NVIDIA GPU that we may open, in the order of the PCI bus; those the driver does not tell of come last.

    A container sees the driver's list of all GPUs, and the device files of its own only.
    """
    listed = {}
    for file in sorted(_GPUS.glob("*/information")):
        found = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in _text(file).splitlines())}
        minor = found.get("Device Minor", "")
        if minor.isdigit():
            listed[int(minor)] = GpuFile(int(minor), found.get("Model", ""), found.get("GPU UUID", ""))
    minors = {int(name) for path in _DEVICES.glob("nvidia[0-9]*") if (name := path.name[len("nvidia") :]).isdigit()}
    untold = (GpuFile(minor, "", "") for minor in sorted(minors - listed.keys()))
    return (*(gpu for minor, gpu in listed.items() if minor in minors), *untold)


def accelerators() -> tuple[str, ...]:
    """The product name of every NVIDIA GPU that we may open, in the order of their device files; "" where the driver
    does not say."""
    return tuple(gpu.name for gpu in sorted(gpus(), key=lambda gpu: gpu.minor))


def _cpu_quota() -> float | None:
    """CPUs' worth of time that the tightest enclosing cgroup grants, None when unbounded (cgroup v2 `cpu.max`)."""
    quotas = []
    for folder in _own_cgroups():
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _own_cgroups() -> list[Path]:
    """Our cgroup v2 folder and all above it: each may bound us."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::"):
            folder = _CGROUP / line.removeprefix("0::").strip().lstrip("/")
            return [folder, *(parent for parent in folder.parents if parent.is_relative_to(_CGROUP))]
    return []


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
