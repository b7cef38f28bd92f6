"""`appliance metrics`: the reference of the metrics page, made of the registry."""

import itertools
from pathlib import Path
from typing import Any

import click
from prometheus_client.utils import floatToGoString

from appliance.core.errors import ConfigError
from appliance.core.metrics import BUILD_TEXT, COUNTER, HISTOGRAM, PREFIX, VERSION, Family, Metrics

BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
"""Lines of a page between which the tables stand."""

_TABLE = "| name | type | labels | |\n| --- | --- | --- | --- |\n"

_OWN = f"""| `build_info` | gauge | `metrics`, `onnxruntime`, `version` | {BUILD_TEXT} |
| `process_cpu_seconds_total` | counter | | CPU time of the process that was started: all in one, or the supervisor. |
| `process_resident_memory_bytes`, `process_virtual_memory_bytes` | gauge | | Its memory. |
| `process_open_fds`, `process_max_fds` | gauge | | Its descriptors, and how many it may have. |
| `process_start_time_seconds` | gauge | | When it started, Unix time. |
"""


@click.command()
@click.option(
    "--into",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write them into this file, between its lines that mark the place, instead of printing them.",
)
def metrics(into: Path | None) -> None:
    """Print the tables of all metrics, in Markdown."""
    if into is None:
        click.echo(reference(), nl=False)
        return
    try:
        page = into.read_text(encoding="utf-8")
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ConfigError(f"{into} has no lines {BEGIN.strip()} and {END.strip()}; the tables go between them.")
        into.write_text(f"{before}{BEGIN}{reference()}{END}{after}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{into} cannot be read and written: {error.strerror}.") from error


def reference() -> str:
    """The tables: names, types, labels and help of all metrics, and the buckets of histograms."""
    from appliance.api.status import REASONS  # Clarifai's messages, which other verbs do without

    families = list(Metrics().families.values())
    parts = [f"\nVersion {VERSION}. Each name begins with `{PREFIX}_`.\n"]
    for section, members in itertools.groupby(families, key=lambda family: family.section):
        parts += [f"\n## {section}\n\n{_TABLE}", *map(_row, members)]
    parts += ["\n## The build, and the daemon's own process\n\n", _TABLE, _OWN]
    parts.append(f"\n## Reasons of `rejected_total`\n\n{', '.join(f'`{reason}`' for reason in sorted(REASONS))}\n")
    parts.append("\n## Buckets\n\n| of | upper bounds |\n| --- | --- |\n")
    by_bounds: dict[tuple[float, ...], list[str]] = {}
    for family in families:
        if family.kind == HISTOGRAM:
            by_bounds.setdefault(family.bounds, []).append(f"`{family.name}`")
    for bounds, names in by_bounds.items():
        shown = ", ".join(floatToGoString(bound) for bound in bounds)  # type: ignore[no-untyped-call]
        parts.append(f"| {', '.join(names)} | {shown} |\n")
    return "".join([*parts, "\n"])


def _row(family: Family[Any]) -> str:
    name = f"{family.name}_total" if family.kind == COUNTER else family.name
    labels = ", ".join(f"`{label}`" for label in family.label_names)
    text = family.text + (" Has exemplars." if family.noted else "")
    return f"| `{name}` | {family.kind} | {labels} | {text} |\n"
