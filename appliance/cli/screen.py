"""The status document on a terminal: what `appliance status` and `appliance top` have in common.

What the appliance says is data: no markup for rich, and nothing that steers the terminal.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from appliance.core.files import printable
from appliance.daemon.status import Device, Ending, Model, Orchestrator, Status

SIGNS = {"healthy": ("●", "green"), "degraded": ("▲", "yellow"), "unhealthy": ("✕", "red")}
_NUMBERS = ("queue", "calls/s", "fails/s", "p50", "p99")
_STATES = {"ready": "green", "failed": "red", "loading": "yellow"}
_BARS = "▁▂▃▄▅▆▇█"
_SPARK = 30
"""Values of a sparkline: half of those that there are."""


def screen(status: Status, *, models: int, errors: int) -> RenderableType:
    """All of it. Args: models, errors: how many of them are shown at most; the busiest, the newest."""
    sign, colour = SIGNS[status.health]
    about = f"  {status.host}, {status.version}, up for {span(status.at - status.started_at)}"
    return Group(
        Text(f"{sign} {status.health}", style=f"bold {colour}").append(printable(about), style="not bold default"),
        *_reasons(status),
        Text(),
        _facts(status),
        Text(),
        *_models(status.models, models),
        *_errors(status, errors),
    )


def _reasons(status: Status) -> Iterator[Text]:
    for reason in status.reasons:
        line = Text("  ").append(printable(reason.what), style="bold").append(printable(f": {reason.why}"))
        yield line.append(f" (docs/runbook/{reason.runbook}.md)" if reason.runbook else "", style="dim")
    if status.more_reasons:
        yield Text(f"  and {status.more_reasons} more")


def _facts(status: Status) -> Table:
    load, rates = status.load, status.rates
    facts = [
        ("clients", f"{status.base_url} ({status.transport}, {status.mode})"),
        (
            "calls",
            f"{spark(status.history.requests_per_s)} {rates.requests_per_s:.1f}/s, failures "
            f"{rates.failures_per_s:.1f}/s, p50 {duration(rates.p50_s)}, p99 {duration(rates.p99_s)}",
        ),
        (
            "load",
            f"{load.in_flight} in flight, {load.connections} connections, requests hold "
            f"{size(load.memory_in_flight_bytes)} of {size(load.memory_in_flight_limit_bytes)}, {load.lost} lost",
        ),
        ("refused", ", ".join(f"{why} {count}" for why, count in load.refused.items()) or "none"),
        *(("device", _device(device)) for device in status.devices),
        *(("process", f"{each.name}: {each.problem}") for each in status.processes if each.problem),
        *(("disk", f"{disk.name}: {size(disk.free_bytes)} of {size(disk.size_bytes)} free") for disk in status.disks),
        *(("certificate", _ending(each, status.at, "ends")) for each in status.certificates),
        *(("revocations", _ending(each, status.at, "due")) for each in status.revocation_lists),
        ("keys", str(status.keys)),
        ("orchestrator", _orchestrator(status.orchestrator)),
    ]
    return _table((), ([name, text] for name, text in facts))


def _device(device: Device) -> str:
    load = "load unknown" if device.load is None else f"{device.load:.0%}"
    more = [] if device.temperature_celsius is None else [f"{device.temperature_celsius:.0f} °C"]
    more += [] if device.power_watts is None else [f"{device.power_watts:.0f} W"]
    memory = f"{size(device.memory_used_bytes)} of {size(device.memory_total_bytes)}"
    return ", ".join([f"{device.name}: {load}", memory, *more])


def _ending(ending: Ending, now: float, what: str) -> str:
    when = f"in {span(ending.at - now)}" if ending.at > now else f"{span(now - ending.at)} ago"
    return f"{ending.name}: {what} {when}, {_moment(ending.at)}"


def _orchestrator(link: Orchestrator) -> str:
    if not link.enrolled:
        return "not enrolled"
    state = {None: "", True: f", link up, {link.runners} runners", False: ", link down"}[link.connected]
    created = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in link.created.items())
    return f"enrolled with {link.api_base} as {link.user_id}{state}; created there: {created or 'nothing yet'}"


def _models(models: Sequence[Model], most: int) -> Iterator[RenderableType]:
    """Those that should be ready and are not come first, then the busiest. Why they are not is said above."""
    chosen = sorted(models, key=lambda each: (each.state in ("ready", "held"), -each.rates.requests_per_s))
    heads = ("model", "version", "state", *_NUMBERS)
    yield _table(heads, map(_model, chosen[:most]))
    if len(models) > most:
        ready = sum(each.state == "ready" for each in models)
        yield Text(f"and {len(models) - most} more; {ready} of {len(models)} are ready")
    elif not models:
        yield Text("no models yet; add one: appliance models add")


def _model(model: Model) -> list[str | Text]:
    rates = model.rates
    return [
        model.model or model.bundle,
        model.version,
        Text(model.state, style=_STATES.get(model.state, "")),
        str(model.queue_rows),
        f"{rates.requests_per_s:.1f}",
        f"{rates.failures_per_s:.1f}",
        duration(rates.p50_s),
        duration(rates.p99_s),
    ]


def _errors(status: Status, most: int) -> Iterator[RenderableType]:
    lines = []
    for each in status.failures:
        where = " ".join(filter(None, (each.method, each.model, each.version)))
        lines.append((each.at, f"{each.code} {each.name} × {each.count}: {where}, last {each.req_id}"))
    lines += [(each.at, f"{each.level}: {each.text}") for each in status.log]
    if lines:
        yield Text("\nlast errors", style="bold")
        newest = sorted(lines, reverse=True)[:most]
        yield _table((), ([_moment(at), text] for at, text in newest))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    """Columns with their heads, or a name and its text."""
    table = Table(box=None, padding=(0, 1 if heads else 2, 0, 0), show_header=bool(heads), pad_edge=False)
    for head in heads or ("", ""):
        table.add_column(head, justify="right" if head in _NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    return table


# ---- texts -----------------------------------------------------------------------------------------------------------


def spark(values: Sequence[float | None], width: int = _SPARK) -> str:
    """The last values as bars; what is not known is blank."""
    shown = values[-width:]
    most = max((value for value in shown if value is not None), default=0.0) or 1.0
    return "".join(" " if value is None else _BARS[round(value / most * (len(_BARS) - 1))] for value in shown)


def duration(seconds: float | None) -> str:
    """As "1.5 ms"; "–" for nothing."""
    if seconds is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def size(count: int | None) -> str:
    """As "1.5 GiB"; "–" for what is not known."""
    if count is None:
        return "–"
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def span(seconds: float) -> str:
    """As "3 days"."""
    for unit, scale in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds // scale:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _moment(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}"
