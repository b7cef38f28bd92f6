"""When what happened to one call, for those who want to know it of this very call: a trace, or the caller who asks.

A `Timing` exists for such a call only. Every other one has what the metrics count, and no more.
"""

import random
import re
import time
from collections.abc import Mapping
from typing import NamedTuple

HEADER = "x-appliance-timing"
"""Sent with "1" by callers who want to know where the time goes; the answer has it too, and says so."""

MOST = 16
"""Runs, and rounds of decoding, of one call that are kept one by one; all are added up."""

_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE = re.compile(r"[\x20-\x7e]{1,512}")
_SAMPLED = 1


class Trace(NamedTuple):
    """What a call belongs to, ids in hexadecimal.

    Attributes:
        span: the call's own.
        parent: the span of the caller that the call is part of; "" for none.
        state: the caller's `tracestate`.
        sampled: whether spans are made; else the ids are for the log.
    """

    id: str
    span: str
    parent: str
    state: str
    sampled: bool


def trace_of(metadata: Mapping[str, str], share: float) -> Trace | None:
    """The trace that a call belongs to: its caller's, who has decided whether it is sampled, or one of its own.

    Args:   share: of calls without a caller's trace, 0 to 1, that get one.
    Source: W3C Trace Context, level 2: a `traceparent` that cannot be read is as none, and its `tracestate` too.
    """
    given = _PARENT.fullmatch(metadata.get("traceparent", ""))
    if given is not None:
        version, trace, parent, flags, more = given.groups()
        sound = version != "ff" and not (version == "00" and more) and int(trace, 16) and int(parent, 16)
        if sound:
            state = metadata.get("tracestate", "")
            kept = state if _STATE.fullmatch(state) else ""
            return Trace(trace, new_id(64), parent, kept, bool(int(flags, 16) & _SAMPLED))
    if random.random() >= share:  # noqa: S311  # not a secret
        return None
    return Trace(new_id(128), new_id(64), "", "", True)


def new_id(bits: int) -> str:
    """An id of so many bits, which are not all zero."""
    return f"{random.getrandbits(bits) or 1:0{bits // 4}x}"


class Run(NamedTuple):
    """One run of a model, as a submission has it whose rows were in it.

    Attributes:
        rows: in the run, whosever they are.
        queued_at: when the submission was queued, `time.monotonic()` seconds, which are the same in all processes.
        taken_at: when the run's rows were taken; rows of one run have this in common.
        batch_wait, compute: seconds; see `RunRecord`.
    """

    rows: int
    queued_at: float
    taken_at: float
    batch_wait: float
    compute: float


class Timing:
    """One call's times, `time.monotonic()` seconds; 0: not yet, or not at all.

    Attributes:
        known_at: when it was known who calls.
        decoded: begin and end of decoding.
        runs: those that its rows were in.
        computed_at, encoded_at: when the model's last results, and the reply, were here.
        code: Clarifai's, of the reply; 0: nobody was told one, as the caller left.
        said: what the caller is told of it, in the words of the Server-Timing header; "" until the call has ended.
    """

    __slots__ = (
        "_asked",
        "_rows",
        "_seconds",
        "begun",
        "code",
        "computed_at",
        "decoded",
        "encoded_at",
        "ended_at",
        "known_at",
        "runs",
        "said",
        "trace",
    )

    def __init__(self, begun: float, trace: Trace | None, *, asked: bool) -> None:
        """Args: asked: by the caller, in a header."""
        self.begun = begun
        self.trace = trace
        self._asked = asked
        self.known_at = self.computed_at = self.encoded_at = self.ended_at = 0.0
        self.decoded: list[tuple[float, float]] = []
        self.runs: list[Run] = []
        self.code = 0
        self.said = ""
        self._rows = 0
        self._seconds: dict[str, float] = {}

    def known(self) -> None:
        """Who calls is known now."""
        self.known_at = time.monotonic()
        self._add("auth", self.known_at - self.begun)

    def decode(self, begun: float, ended: float) -> None:
        """Inputs were decoded."""
        if len(self.decoded) < MOST:
            self.decoded.append((begun, ended))
        self._add("decode", ended - begun)

    def ran(self, run: Run) -> None:
        """Rows of the call were in a run, whose results come next."""
        if len(self.runs) < MOST:
            self.runs.append(run)
        self._rows = max(self._rows, run.rows)
        self._seconds["queue"] = max(self._seconds.get("queue", 0.0), run.taken_at - run.queued_at)
        self._add("batch", run.batch_wait)
        self._add("compute", run.compute)

    def end(self, now: float, computed_at: float, encoded_at: float, code: int) -> None:
        """The call has ended. Args: code: unless one is set already."""
        self.ended_at, self.computed_at, self.encoded_at = now, computed_at, encoded_at
        self.code = self.code or code
        if computed_at and encoded_at:
            self._add("encode", encoded_at - computed_at)
        if self._asked:
            self._seconds["total"] = now - self.begun
            parts = [f"{name};dur={seconds * 1000:.3f}" for name, seconds in self._seconds.items()]
            self.said = ", ".join([*parts, f'rows;desc="{self._rows}"'] if self._rows else parts)

    def noted(self, req_id: str) -> str:
        """What metrics note of the call: its trace, if that can be looked up, else its id. See `ledger.Note`."""
        trace = self.trace
        return f"{TRACE}{trace.id}" if trace is not None and trace.sampled else req_id

    def logged(self) -> dict[str, str]:
        """What the log says of it beside its id."""
        return {} if self.trace is None else {"trace_id": self.trace.id}

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


TRACE = "trace_id="
"""Stands before a trace's id where else a request's would be; no request's has that sign in it."""
