"""`appliance audit verify | export`."""

import csv
import json
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from appliance.cli import exits
from appliance.cli.moments import Moment
from appliance.core import audit as records
from appliance.core import config as configuration
from appliance.core.audit import Event, Reading
from appliance.core.errors import ConfigError
from appliance.core.files import file_error, printable

_FOLDER = click.option("--folder", type=click.Path(path_type=Path), help="Folder of the log; default: the configured.")
_COLUMNS = (
    "seq",
    "time",
    "event",
    "principal",
    "credential",
    "model",
    "version",
    "code",
    "count",
    "method",
    "peer",
    "req_id",
    "by",
)
"""Of CSV; what else a record says stands in the last one, as JSON."""


@click.group()
def audit() -> None:
    """Check the audit log, or take it out for others to read."""


@audit.command()
@click.option("--head", "heads", multiple=True, metavar="SEQ:HASH", help="A record's number and hash kept elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_FOLDER
@click.pass_obj
def verify(config_file: Path | None, heads: tuple[str, ...], as_json: bool, folder: Path | None) -> None:
    """Whether every record follows the one before it, and none is missing.

    Exits with 1 when that is not so. The daemon may go on writing meanwhile. Who can write to the folder can make the
    whole log anew: compare with heads that are kept elsewhere, such as those in the journal (docs/logs.md).
    """
    found = _read(_place(config_file, folder), dict(map(_anchor, heads)))
    if as_json:
        shown = {
            "whole": not found.faults,
            "files": found.files,
            "records": found.records,
            "first": found.first,
            "last": {"seq": found.last.seq, "hash": found.last.hash},
            "faults": found.faults,
            "notes": found.notes,
        }
        click.echo(json.dumps(shown, indent=1))
    else:
        for fault in found.faults:
            click.echo(f"fault: {fault}")
        for note in found.notes:
            click.echo(f"note: {note}")
        click.echo(
            f"records {found.first} to {found.last.seq} in {found.files} files: "
            + (f"{len(found.faults)} faults" if found.faults else f"whole; the last one's hash is {found.last.hash}")
        )
    sys.exit(exits.FOUND if found.faults else exits.OK)


@audit.command()
@click.option("--since", type=Moment(), show_default="the beginning", help="From this time on (UTC).")
@click.option("--until", type=Moment(), show_default="for ever", help="Up to this time, without it (UTC).")
@click.option("--event", "events", multiple=True, help="Only records of this event; may be given several times.")
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
@_FOLDER
@click.pass_obj
def export(
    config_file: Path | None,
    since: datetime | None,
    until: datetime | None,
    events: tuple[str, ...],
    form: str,
    folder: Path | None,
) -> None:
    """Print records, in their order: as they stand in the log (jsonl), or as a table.

    What is wrong with the log is said on stderr, and the exit status is 1 then.
    """
    begin, end = (records.written(each) if each else "" for each in (since, until))
    write = _csv() if form == "csv" else _jsonl

    def each(line: bytes, record: Event) -> None:
        at = record["time"]
        if (not begin or at >= begin) and (not end or at < end) and (not events or record["event"] in events):
            write(line, record)

    found = _read(_place(config_file, folder), {}, each)
    for fault in found.faults:
        click.echo(f"fault: {fault}", err=True)
    sys.exit(exits.FOUND if found.faults else exits.OK)


def _jsonl(line: bytes, record: Event) -> None:
    sys.stdout.write(line.decode())


def _csv() -> Callable[[bytes, Event], None]:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow([*_COLUMNS, "more"])

    def write(line: bytes, record: Event) -> None:
        more = {key: value for key, value in record.items() if key not in (*_COLUMNS, "hash")}
        table.writerow([*(_cell(record.get(column, "")) for column in _COLUMNS), json.dumps(more) if more else ""])

    return write


def _cell(value: Any) -> str:
    """What callers sent must neither steer a terminal nor be a formula to a spreadsheet (CWE-1236)."""
    text = printable(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _place(config_file: Path | None, folder: Path | None) -> Path:
    return folder or configuration.load(config_file).config.audit_folder


def _read(folder: Path, anchors: dict[int, str], each: Callable[[bytes, Event], None] = lambda *_: None) -> Reading:
    """Raises: ConfigError: it cannot be read."""
    try:
        return records.read(folder, anchors, each)
    except OSError as error:
        sentence = f"The audit log in {folder} cannot be read: {error.strerror}; run the command with sudo, or name it."
        raise file_error(error, sentence) from error


def _anchor(text: str) -> tuple[int, str]:
    """SEQ:HASH. Raises: ConfigError: it is not that."""
    match = re.fullmatch(r"([0-9]+):([0-9a-f]{64})", text)
    if match is None:
        raise ConfigError(f"--head {text[:80]!r} is not SEQ:HASH, a number and 64 hex digits as the journal has them.")
    return int(match[1]), match[2]
