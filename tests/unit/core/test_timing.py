"""W3C trace context, and what is said of one call's time."""

import pytest

from appliance.core.ledger import NOTE, read_note, write_note
from appliance.core.timing import MOST, Run, Timing, Trace, trace_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"


def test_a_call_is_part_of_its_callers_trace() -> None:
    """Its span is a new one; whether it is sampled the caller has decided, whatever our share is."""
    found = trace_of({"traceparent": GIVEN, "tracestate": "vendor=1,other=2"}, 0.0)
    assert found is not None
    assert (found.id, found.parent, found.state, found.sampled) == (TRACE, PARENT, "vendor=1,other=2", True)
    assert len(found.span) == 16
    assert found.span != PARENT
    unsampled = trace_of({"traceparent": GIVEN[:-1] + "0"}, 1.0)
    assert unsampled is not None
    assert (unsampled.id, unsampled.sampled) == (TRACE, False)


@pytest.mark.parametrize("flags", ["03", "ff"])
def test_flags_that_we_do_not_know_change_nothing(flags: str) -> None:
    """Only the last bit says sampled."""
    found = trace_of({"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}, 0.0)
    assert found is not None
    assert found.sampled


def test_a_later_version_is_read_as_far_as_we_know_it() -> None:
    """It may have more behind the flags."""
    found = trace_of({"traceparent": f"01-{TRACE}-{PARENT}-01-more"}, 0.0)
    assert found is not None
    assert found.id == TRACE


@pytest.mark.parametrize(
    "given",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"{GIVEN}\n",
        f" {GIVEN}",
    ],
)
def test_a_traceparent_that_cannot_be_read_is_as_none(given: str) -> None:
    """The call begins a trace of its own, if we sample it, without the state that came along."""
    assert trace_of({"traceparent": given}, 0.0) is None
    found = trace_of({"traceparent": given, "tracestate": "vendor=1"}, 1.0)
    assert found is not None
    assert found.id != TRACE
    assert (found.parent, found.state, found.sampled) == ("", "", True)
    assert len(found.id) == 32


@pytest.mark.parametrize("state", ["", "x" * 513, "a=1\x7f", "ä=1"])
def test_a_tracestate_that_cannot_be_written_is_left_out(state: str) -> None:
    """The trace goes on without it."""
    found = trace_of({"traceparent": GIVEN, "tracestate": state}, 0.0)
    assert found is not None
    assert found.state == ""


def test_the_share_of_calls_is_kept() -> None:
    """None, all, and about half; each has ids of its own."""
    assert [trace_of({}, 0.0) for _ in range(100)] == [None] * 100
    found = [trace_of({}, 1.0) for _ in range(100)]
    assert len({trace.id for trace in found if trace is not None}) == 100
    assert 350 < sum(trace_of({}, 0.5) is not None for _ in range(1000)) < 650


def test_what_is_said_is_what_happened() -> None:
    """In the words of Server-Timing, milliseconds; of several runs the longest wait and the sums."""
    timing = Timing(10.0, None, asked=True)
    timing.decode(10.001, 10.003)
    timing.ran(Run(3, 10.003, 10.004, 0.0005, 0.01))
    timing.ran(Run(8, 10.003, 10.006, 0.0005, 0.02))
    timing.end(10.05, 10.04, 10.041, 10000)
    assert timing.said == (
        "decode;dur=2.000, queue;dur=3.000, batch;dur=1.000, compute;dur=30.000, encode;dur=1.000, total;dur=50.000, "
        'rows;desc="8"'
    )


def test_what_did_not_happen_is_not_said() -> None:
    """A call that reached no model has a total, and no more; nobody who did not ask is told anything."""
    asked, traced = Timing(1.0, None, asked=True), Timing(1.0, None, asked=False)
    for timing in (asked, traced):
        timing.end(1.5, 0.0, 0.0, 10000)
    assert (asked.said, traced.said) == ("total;dur=500.000", "")


def test_many_runs_are_added_up_and_few_are_kept() -> None:
    """A submission of a thousand rows that run one by one costs no memory to speak of."""
    timing = Timing(0.0, None, asked=True)
    for number in range(100):
        timing.decode(0.0, 0.001)
        timing.ran(Run(1, 0.0, float(number), 0.0, 0.001))
    timing.end(100.0, 0.0, 0.0, 10000)
    assert len(timing.runs) == len(timing.decoded) == MOST
    assert "decode;dur=100.000, queue;dur=99000.000, batch;dur=0.000, compute;dur=100.000" in timing.said


def test_the_first_code_stays() -> None:
    """It is that of the status that ended the call."""
    timing = Timing(0.0, None, asked=False)
    timing.code = 11008
    timing.end(1.0, 0.0, 0.0, 10000)
    assert timing.code == 11008


def test_metrics_note_the_trace_of_a_call_that_is_sampled() -> None:
    """Nobody could look up that of another; the log has it all the same."""
    sampled = Timing(0.0, Trace(TRACE, "1" * 16, "", "", True), asked=False)
    unsampled = Timing(0.0, Trace(TRACE, "1" * 16, "", "", False), asked=False)
    assert (sampled.logged(), unsampled.logged()) == ({"trace_id": TRACE}, {"trace_id": TRACE})
    assert Timing(0.0, None, asked=True).logged() == {}
    notes = bytearray(2 * NOTE.size)
    for cell, timing in enumerate((sampled, unsampled)):
        write_note(notes, cell, 1.0, timing.noted("abc-123"))
    read = [read_note(bytes(notes[place : place + NOTE.size])) for place in (0, NOTE.size)]
    assert [note.label for note in read if note is not None] == [("trace_id", TRACE), ("req_id", "abc-123")]
