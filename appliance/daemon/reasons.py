"""Why the appliance is not healthy: what the alerts say (packaging/prometheus), without their patience, and what is not
ready. Each has a page in docs/runbook."""

from collections.abc import Iterator, Mapping

from appliance.core.config import Config
from appliance.core.files import printable
from appliance.daemon.status import Device, Disk, Ending, Orchestrator, Reason
from appliance.daemon.watch import Event, shown

_DAY_S = 86400.0
_CERTIFICATE_DAYS = 14
_FULL_DISK, _FULL_GPU, _MANY_REFUSED = 0.1, 0.92, 0.05

_HAPPENED: Mapping[str, tuple[float, str, str]] = {
    "lost": (600.0, "some were accepted and ended without a result or a status", "requests-lost"),
    "restart": (900.0, "the process ended and was replaced, {ago} ago", "worker-restarts"),
    "reload": (1800.0, "changed files were not taken over, {ago} ago; those before are in force", "reload-failed"),
    "clock": (600.0, "it was set by more than 5 s, {ago} ago", "clock-skew"),
}
"""Kind of an event → seconds for which it is a reason, the sentence, the page."""


def not_serving(phase: str, problems: Mapping[str, str]) -> Iterator[Reason]:
    """Why it does not serve."""
    if phase != "ready":
        yield Reason("appliance", f"it is {phase}", "")
    elif problems:
        yield Reason("appliance", "no model is ready", "model-not-ready")


def not_ready(problems: Mapping[str, str], processes: Mapping[str, str]) -> Iterator[Reason]:
    """Who is not ready. Args: problems: of all; processes: those of them that are of processes."""
    for name, why in problems.items():
        yield Reason(shown(name), shown(why), "worker-restarts" if name in processes else "model-not-ready")


def recent(happened: Mapping[Event, float], now: float) -> Iterator[Reason]:
    """What happened not long ago. Args: now: by the monotonic clock."""
    for (kind, subject), at in happened.items():
        seconds, sentence, page = _HAPPENED[kind]
        if now - at < seconds:
            yield Reason(printable(subject), sentence.format(ago=_spoken(now - at)), page)


def overload(calls: float, refused: float) -> Iterator[Reason]:
    """More is asked than can be done. Args: calls: of the last looks; refused: of these, for that."""
    if refused > _MANY_REFUSED * calls:
        yield Reason("calls", f"{refused:.0f} of {calls:.0f} were refused just now: too much to do", "rejects")


def silent(link: Orchestrator) -> Iterator[Reason]:
    """The orchestrator does not answer, or does not know us."""
    if link.connected is False and link.problem:
        yield Reason("orchestrator", f"its link is down: {link.problem}", "orchestrator-silent")


def due(certificates: list[Ending], lists: list[Ending], now: float) -> Iterator[Reason]:
    """What must be renewed. Args: now: Unix time."""
    for ending in certificates:
        days = (ending.at - now) / _DAY_S
        if days < _CERTIFICATE_DAYS:
            when = f"ends in {days:.1f} days" if days > 0 else "has ended"
            yield Reason(f"certificate {ending.name}", f"it {when}", "certificate-expires")
    for ending in lists:
        if ending.at - now < _DAY_S:
            when = "is due within a day" if ending.at > now else "is out of date"
            yield Reason(f"revocation list {ending.name}", f"it {when}", "revocation-list-due")


def full(disks: list[Disk], devices: list[Device]) -> Iterator[Reason]:
    """Disks and GPUs with little space."""
    for disk in disks:
        if disk.free_bytes < _FULL_DISK * disk.size_bytes:
            share = disk.free_bytes / disk.size_bytes
            yield Reason(f"disk of {disk.name}", f"only {share:.1%} of it are free", "disk-full")
    for device in devices:
        if device.name.startswith("gpu") and device.memory_total_bytes:
            share = (device.memory_used_bytes or 0) / device.memory_total_bytes
            if share > _FULL_GPU:
                yield Reason(device.name, f"{share:.0%} of its memory are in use", "gpu-memory")


def nobody_may_call(config: Config, keys: int) -> Iterator[Reason]:
    """A key is asked for, and there is none."""
    if config.auth.require in ("key", "both") and not keys:
        yield Reason("keys", "there is none, so nobody can call; make one: appliance keys create", "")


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
