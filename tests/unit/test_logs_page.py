"""docs/logs.md names what there is: fields of the log, events of the audit log, and commands as they stand."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import appliance
from appliance.cli.main import cli

PACKAGE = Path(appliance.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "logs.md").read_text(encoding="utf-8")


def source(file: str) -> str:
    return (PACKAGE / file).read_text(encoding="utf-8")


def test_it_has_every_field_of_a_call() -> None:
    (body,) = re.findall(r"def _fields\(.*?\n    return ", source("api/service.py"), re.S)
    fields = set(re.findall(r'"([a-z_]+)":', body))
    assert len(fields) > 8
    assert not {field for field in fields if f"`{field.upper()}`" not in PAGE}


def test_it_has_every_event_of_the_audit_log() -> None:
    events = {
        event
        for file in ("daemon/auditor.py", "daemon/service.py", "core/audit.py")
        for event in re.findall(r'(?:\.record\(|"event": )"([a-z-]+)"', source(file))
    }
    assert len(events) > 12
    assert not {event for event in events if f"`{event}`" not in PAGE}


@pytest.mark.parametrize("words", sorted(set(re.findall(r"appliance ((?:log-level|audit [a-z]+))", PAGE))))
def test_its_commands_are_there(words: str) -> None:
    assert CliRunner().invoke(cli, [*words.split(), "--help"]).exit_code == 0
