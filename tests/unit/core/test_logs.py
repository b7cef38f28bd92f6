"""The log: one line an event whatever callers send, fields behind it, floods counted and not written."""

import io
import logging
import shlex
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core import logs
from appliance.core.logs import FieldFormatter, RateLimitedLog, SentenceFormatter


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

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


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


def test_the_journals_fields_are_not_said_twice() -> None:
    """Its handler adds them in upper case to what the line has already."""
    assert SentenceFormatter().format(record("loading", model="digits", MODEL="digits")) == "loading model=digits"


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


def test_our_log_goes_to_stderr_once_and_at_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    ours = logging.getLogger(logs.ROOT)
    before = (ours.level, list(ours.handlers), ours.propagate)
    try:
        logs.set_up("info")
        logs.set_up("warning")  # a second time, as after a reload
        logging.getLogger("appliance.some.room").info("quiet")
        logging.getLogger("appliance.some.room").warning("loud", extra={"model": "digits"})
        logs.set_level("debug")
        logging.getLogger("appliance.some.room").debug("now too")
    finally:
        for handler in list(ours.handlers):
            ours.removeHandler(handler)
        for handler in before[1]:
            ours.addHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[2]
    lines = stream.getvalue().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["WARNING loud model=digits", "DEBUG   now too"]


# ---- floods ----------------------------------------------------------------------------------------------------------


def test_a_flood_is_cut_and_what_was_left_out_is_counted(logger: tuple[logging.Logger, Kept]) -> None:
    clock = [100.0]
    log, kept = logger
    limited = RateLimitedLog(log, per_second=3, clock=lambda: clock[0])
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


def test_kinds_have_a_share_each(logger: tuple[logging.Logger, Kept]) -> None:
    log, kept = logger
    limited = RateLimitedLog(log, per_second=1, clock=lambda: 5.0)
    for kind in ("a", "a", "b", "b"):
        limited.write(kind, logging.INFO, kind)
    assert [entry.getMessage() for entry in kept.records] == ["a", "b"]


def test_below_the_rate_nothing_is_left_out(logger: tuple[logging.Logger, Kept]) -> None:
    clock = [0.0]
    log, kept = logger
    limited = RateLimitedLog(log, per_second=2, clock=lambda: clock[0])
    for _ in range(6):
        limited.write("a", logging.INFO, "line")
        clock[0] += 0.5
    assert [entry.getMessage() for entry in kept.records] == ["line"] * 6


def test_percent_signs_in_a_message_are_text(logger: tuple[logging.Logger, Kept]) -> None:
    log, kept = logger
    RateLimitedLog(log).write("a", logging.INFO, "100% of %s")
    assert kept.records[0].getMessage() == "100% of %s"
