"""The log: one line an event whatever callers send, fields behind it, floods counted and not written."""

import asyncio
import json
import logging
import os
import re
import secrets
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core import logs
from appliance.core.logs import FieldFormatter, JournalHandler, RateLimitedLog, Share

ROOMS = tuple(f".{component}" for component in logs.COMPONENTS)


def record(message: str, *args: object, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("appliance.test", logging.INFO, "file", 1, message, args, None)
    made.__dict__.update(fields)
    return made


def formatted(message: str, *args: object, **fields: object) -> str:
    return FieldFormatter().format(record(message, *args, **fields))


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.on_record: Callable[[], None] = lambda: None

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.on_record()


@pytest.fixture
def logger() -> tuple[logging.Logger, Kept]:
    kept = Kept()
    made = logging.Logger("test")  # not registered: no other test sees it
    made.addHandler(kept)
    return made, kept


def test_a_line_is_time_level_sentence_and_fields() -> None:
    made = record("ready after %.1f s", 2.0, model="digits", version="3")
    made.created, made.msecs = 1764000000.5, 500
    assert FieldFormatter().format(made) == "2025-11-24T16:00:00.500Z INFO    ready after 2.0 s model=digits version=3"


def test_a_value_with_spaces_or_quotes_is_quoted() -> None:
    assert formatted("x", note='say "hi" now', empty="").endswith(r'note="say \"hi\" now" empty=""')


def test_a_value_cannot_close_its_quotes_and_start_a_field_of_its_own() -> None:
    line = formatted("x", note='\\" level=ERROR user="root')
    assert shlex.split(line.split(" x ", 1)[1]) == ['note=\\" level=ERROR user="root']


@pytest.mark.parametrize("breaker", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028", "\u2029"])
def test_what_a_caller_sent_never_starts_a_line_of_its_own(breaker: str) -> None:
    line = formatted(f"bad{breaker}2026-01-01 INFO forged", name_=f"a{breaker}b")
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("control", ["\x1b[2J", "\x00", "\x07", "\x9b31m", "\x7f", "\u202e"])
def test_what_a_caller_sent_cannot_steer_the_terminal(control: str) -> None:
    line = formatted(f"bad {control}", field=control)
    assert control[0] not in line


@given(st.text(), st.text(min_size=1))
def test_any_text_is_one_printable_line(sentence: str, value: str) -> None:
    line = formatted("%s", sentence, field=value)
    assert len(line.splitlines()) == 1
    assert {unicodedata.category(char) for char in line}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})


def test_letters_of_other_scripts_stay_readable() -> None:
    assert "größe 数字 😀" in formatted("größe 数字 😀")


def test_a_traceback_is_written_whole() -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        made = logging.LogRecord("n", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    line = FieldFormatter().format(made)
    assert "Traceback" in line
    assert line.splitlines()[-1] == "ValueError: inside"


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """Gives the lines that were logged to standard error; afterwards all is as it was."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    loggers = [logging.getLogger(), *(logging.getLogger(f"{logs.ROOT}{room}") for room in ("", *ROOMS))]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield lambda: capsys.readouterr().err.splitlines()
    for logger, level, handlers, propagate in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def test_our_log_goes_to_stderr_once_and_at_its_level(stderr: Callable[[], list[str]]) -> None:
    logs.set_up("info")
    logs.set_up("warning")  # a second time
    logging.getLogger("appliance.some.room").info("quiet")
    logging.getLogger("appliance.some.room").warning("loud", extra={"model": "digits"})
    logs.set_levels("debug", {})
    logging.getLogger("appliance.some.room").debug("now too")
    logging.getLogger("some.library").warning("of a library")
    logging.getLogger("some.library").info("which says less")
    lines = [line.split(" ", 1)[1] for line in stderr()]
    assert lines == ["WARNING loud model=digits", "DEBUG   now too", "WARNING of a library"]


def test_a_component_may_have_a_level_of_its_own_and_lose_it(stderr: Callable[[], list[str]]) -> None:
    wire, api = logging.getLogger("appliance.wire.h2"), logging.getLogger("appliance.api.service")
    logs.set_up("warning", own={"wire": "debug"})
    wire.debug("one")
    api.info("not this")
    logs.set_levels("info", {"api": "error"})
    wire.debug("nor this")
    wire.info("two")
    api.warning("nor that")
    assert [line.split()[-1] for line in stderr()] == ["one", "two"]


def test_components_are_the_rooms_that_log() -> None:
    """Of the daemon; `appliance log-level` would name one in vain, or miss one."""
    package = Path(logs.__file__).parents[1]
    rooms = {file.parent.name for file in package.glob("*/*.py") if "getLogger(__name__)" in file.read_text("utf-8")}
    assert rooms - {"cli", "connect"} <= set(logs.COMPONENTS)
    assert set(logs.COMPONENTS) <= {folder.name for folder in package.iterdir()}


def test_json_lines_have_time_level_component_and_fields(stderr: Callable[[], list[str]]) -> None:
    logs.set_up("info", "json")
    logging.getLogger("appliance.api.service").warning(
        "bad\n%s", "\ud800", extra={"model": "digits", "duration_us": 7, "level": "forged", "path": Path("/x")}
    )
    try:
        raise ValueError("inside")
    except ValueError:
        logging.getLogger("some.library").exception("failed")
    first, second = map(json.loads, stderr())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first.pop("pid") == os.getpid()
    assert first == {
        "level": "warning",
        "component": "api",
        "message": "bad\n\ud800",
        "model": "digits",
        "duration_us": 7,
        "path": "/x",
    }
    assert second["component"] == "some"
    assert second["exception"].endswith("ValueError: inside")


def test_the_journal_is_given_fields() -> None:
    sent: list[tuple[str, dict[str, object]]] = []
    handler = JournalHandler(lambda message, **fields: sent.append((message, fields)))
    made = record("loading %s", "it", model="digits", duration_us=7, note="a\nb \ud800", priority="forged")
    made.name = "appliance.catalog.repository"
    handler.handle(made)
    ((message, fields),) = sent
    assert message == 'loading it model=digits duration_us=7 note="a\\nb \\ud800" priority=forged'
    assert fields == {
        "MODEL": "digits",
        "DURATION_US": "7",
        "NOTE": "a\\nb \\ud800",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "inference-appliance",
        "COMPONENT": "catalog",
        "LOGGER": "appliance.catalog.repository",
        "CODE_FILE": "file",
        "CODE_LINE": 1,
        "CODE_FUNC": None,
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a /run of its own")
def test_the_journals_own_library_sends_what_journald_reads() -> None:
    """To a socket where journald's is. Source: systemd.io/JOURNAL_NATIVE_PROTOCOL: a line a field."""
    pytest.importorskip("systemd.journal")
    code = """
import logging, os, socket
from appliance.core import logs
journald = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journald.bind("/run/systemd/journal/socket")
stderr = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{stderr.st_dev}:{stderr.st_ino}"
logs.set_up("info", "json")
logging.getLogger("appliance.api.service").warning("no", extra={"model": "a/b/c", "duration_us": 7, "note": "a\\nb"})
print(journald.recv(65536).decode())
"""
    script = f'mount -t tmpfs none /run && mkdir -p /run/systemd/journal && exec {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, code], capture_output=True, text=True, check=True, timeout=60
    )
    fields = dict(line.split("=", 1) for line in done.stdout.strip().splitlines())
    assert fields["MESSAGE"] == "no model=a/b/c duration_us=7 note=a\\nb"
    assert (fields["MODEL"], fields["DURATION_US"], fields["NOTE"]) == ("a/b/c", "7", "a\\nb")
    assert (fields["PRIORITY"], fields["COMPONENT"], fields["LOGGER"]) == ("4", "api", "appliance.api.service")
    assert fields["SYSLOG_IDENTIFIER"] == "inference-appliance"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("level", "priority"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 2)]
)
def test_levels_are_the_journals_priorities(level: str, priority: int) -> None:
    """Source: syslog(3)."""
    sent: list[dict[str, object]] = []
    made = record("x")
    made.levelno = getattr(logging, level)
    JournalHandler(lambda message, **fields: sent.append(fields)).handle(made)
    assert sent[0]["PRIORITY"] == str(priority)


# ---- floods ----------------------------------------------------------------------------------------------------------


def test_a_flood_is_cut_and_what_was_left_out_is_counted(logger: tuple[logging.Logger, Kept]) -> None:
    clock = [100.0]
    log, kept = logger
    limited = RateLimitedLog(log, 3, Share(100), clock=lambda: clock[0])
    for number in range(10):
        limited.write("refused", logging.WARNING, f"refused {number}", principal="ada")
    assert [entry.getMessage() for entry in kept.records] == ["refused 0", "refused 1", "refused 2"]
    assert kept.records[0].__dict__["principal"] == "ada"
    clock[0] = 101.0
    limited.write("refused", logging.WARNING, "refused again")
    assert [entry.getMessage() for entry in kept.records[3:]] == [
        "7 more lines of this kind were left out",
        "refused again",
    ]
    assert kept.records[3].__dict__["kind"] == "refused"


def test_a_key_that_a_caller_put_where_a_name_belongs_is_not_written(logger: tuple[logging.Logger, Kept]) -> None:
    log, kept = logger
    key = secrets.token_hex(32)
    RateLimitedLog(log, share=Share(100)).write("refused", logging.WARNING, f"There is no model {key}x.")
    assert [entry.getMessage() for entry in kept.records] == ["There is no model [64 digits]x."]


def test_kinds_have_a_share_each(logger: tuple[logging.Logger, Kept]) -> None:
    log, kept = logger
    limited = RateLimitedLog(log, 1, Share(100), clock=lambda: 5.0)
    for kind in ("a", "a", "b", "b"):
        limited.write(kind, logging.INFO, kind)
    assert [entry.getMessage() for entry in kept.records] == ["a", "b"]


def test_what_was_left_out_is_said_though_nothing_follows(logger: tuple[logging.Logger, Kept]) -> None:
    """A second later, or when the process ends."""
    waiting: list[tuple[float, Callable[[], None]]] = []
    log, kept = logger
    limited = RateLimitedLog(log, 1, Share(100), lambda: 5.0, lambda seconds, work: waiting.append((seconds, work)))
    for _ in range(3):
        limited.write("a", logging.ERROR, "line")
    ((seconds, work),) = waiting
    assert seconds == 1.0
    work()
    assert [entry.getMessage() for entry in kept.records] == ["line", "2 more lines of this kind were left out"]
    assert (kept.records[1].__dict__["count"], kept.records[1].levelname) == (2, "ERROR")
    limited.write("a", logging.ERROR, "line")
    logs.tell_left_out()
    assert kept.records[-1].getMessage() == "1 more lines of this kind were left out"


async def test_on_a_loop_it_is_said_by_itself(logger: tuple[logging.Logger, Kept]) -> None:
    log, kept = logger
    limited = RateLimitedLog(log, 1, Share(100), clock=lambda: 5.0)
    told = asyncio.Event()
    kept.on_record = lambda: told.set() if len(kept.records) == 2 else None
    for _ in range(2):
        limited.write("a", logging.INFO, "line")
    await asyncio.wait_for(told.wait(), 30)
    assert kept.records[1].getMessage().startswith("1 more")


def test_all_logs_of_a_process_share_one_rate(logger: tuple[logging.Logger, Kept]) -> None:
    """Whatever kinds somebody finds, the journal's own limit is not reached."""
    log, kept = logger
    share = Share(3)
    one, two = (RateLimitedLog(log, 10, share, clock=lambda: 5.0, later=lambda *_: None) for _ in range(2))
    for number in range(4):
        one.write(f"a{number}", logging.INFO, "one")
        two.write(f"b{number}", logging.INFO, "two")
    assert [entry.getMessage() for entry in kept.records] == ["one", "two", "one"]


def test_a_level_that_is_not_written_takes_nothing_of_the_rate(logger: tuple[logging.Logger, Kept]) -> None:
    log, kept = logger
    log.setLevel(logging.WARNING)
    limited = RateLimitedLog(log, 1, Share(100), clock=lambda: 5.0)
    for level in (logging.DEBUG, logging.WARNING):
        limited.write("a", level, "line")
    assert [entry.levelno for entry in kept.records] == [logging.WARNING]


def test_below_the_rate_nothing_is_left_out(logger: tuple[logging.Logger, Kept]) -> None:
    clock = [0.0]
    log, kept = logger
    limited = RateLimitedLog(log, 2, Share(100), clock=lambda: clock[0])
    for _ in range(6):
        limited.write("a", logging.INFO, "line")
        clock[0] += 0.5
    assert [entry.getMessage() for entry in kept.records] == ["line"] * 6


def test_percent_signs_in_a_message_are_text(logger: tuple[logging.Logger, Kept]) -> None:
    log, kept = logger
    RateLimitedLog(log, share=Share(100)).write("a", logging.INFO, "100% of %s")
    assert kept.records[0].getMessage() == "100% of %s"
