"""`appliance usage export`: what callers used, as lines of JSON or as CSV; exit statuses are those of `exits`."""

import csv
import json
import math
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import click

from appliance.cli.moments import Moment
from appliance.core import config as configuration
from appliance.core.usage import Amounts, UsageKey
from appliance.orchestrator.usage_store import FILE, Period, Place, Row, added, read

_PERIODS = {period.name.lower(): period for period in Period}


@click.group()
def usage() -> None:
    """Tell what callers used."""


@usage.command()
@click.option("--since", type=Moment(), show_default="the beginning", help="From this time on (UTC).")
@click.option("--until", type=Moment(), show_default="for ever", help="Up to this time, without it (UTC).")
@click.option(
    "--by",
    type=click.Choice([*UsageKey._fields, *_PERIODS]),
    multiple=True,
    help="Add up everything but this; may be given several times, one of them a period.",
)
@click.option(
    "--format", "form", type=click.Choice(["json", "csv"]), default="json", show_default=True, help="Of a line."
)
@click.pass_obj
def export(
    config_file: Path | None, since: datetime | None, until: datetime | None, by: tuple[str, ...], form: str
) -> None:
    """Print what callers used, a record a line (docs/usage.md says what is in it).

    What was used in the last ten seconds may not be there yet. A record belongs to the time in which its period began:
    old ones are of hours, days and months.
    """
    wanted = [_PERIODS[name] for name in by if name in _PERIODS]
    if len(wanted) > 1:
        raise click.UsageError("--by takes one period: minute, hour, day or month.")
    begin, end = since.timestamp() if since else 0.0, until.timestamp() if until else math.inf
    rows = read(configuration.load(config_file).config.catalog.state_dir / FILE, begin, end)
    records = [row.record() for row in (_added_up(rows, by, wanted) if by else rows)]
    keys = [name for name in UsageKey._fields if not by or name in by]
    names = [*(("start", "period") if wanted or not by else ()), *keys, *Amounts._fields]
    if form == "json":
        for record in records:
            click.echo(json.dumps({name: record[name] for name in names}))
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([record[name] for name in names] for record in records)


def _added_up(rows: Iterable[Row], by: tuple[str, ...], wanted: list[Period]) -> list[Row]:
    """The rows, added up over what is not in `by`; by a period, a row of a longer one stays as it is."""

    def place(row: Row) -> Place:
        key = UsageKey(*(value if name in by else "" for name, value in row.place.key._asdict().items()))
        if not wanted:
            return Place(Period.MONTH, 0, key)
        period = max(wanted[0], row.place.period)
        return Place(period, period.start(row.place.start), key)

    sums = added((place(row), row.amounts) for row in rows)
    return sorted(Row(*each) for each in sums.items())
