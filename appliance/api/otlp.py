"""Spans, and how they reach a collector: OTLP over HTTP, from a thread of its own. The only import of opentelemetry,
whose messages (`opentelemetry-proto`) are all that is taken of it; this module is imported when traces are on.

A call that has ended waits here with its times, and becomes spans on the thread, so that answering costs next to
nothing more. There is a bound to the calls that wait, and to attempts at sending them: a collector that is slow, or
away, costs traces, and nobody's answer.
"""

import contextlib
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from appliance import __version__
from appliance.core.config import Traces
from appliance.core.errors import ConfigError
from appliance.core.files import authorities_of, file_error, printable
from appliance.core.metrics import Tally
from appliance.core.timing import Run, Timing, Trace, new_id

_log = logging.getLogger(__name__)

_WAITING = 2048
"""Calls that wait to be sent; more are dropped."""

_AT_ONCE = 128
"""Calls in one message: some 300 kB."""

_PAUSE_S = 1.0
"""Seconds that calls wait for others to be sent with them, at most."""

_REST_S = 0.25
"""Seconds between two messages: whoever has every call traced takes a small part of a core from the others, no more."""

_TIMEOUT_S = 10.0
"""Seconds that one attempt may take."""

_PATIENCE_S = 30.0
"""Seconds in which what can be tried again is."""

_FIRST_WAIT_S = 1.0
_TRY_AGAIN = (429, 502, 503, 504)
"""HTTP statuses after which the same message may be taken. Source: OTLP specification 1.x, "Failures"."""

_RUNS = 1024
"""Runs whose first span is known, for others to be linked to."""

_LAST_S = 2.0
"""Seconds for what waits when the appliance stops."""

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\x20-\x7e]+")

_About: TypeAlias = Mapping[str, str | int]
_NOTHING: _About = {}

_Span = trace_pb2.Span
_Status = trace_pb2.Status


@dataclass(frozen=True, slots=True)
class Traced:
    """One call that has ended, and is to have spans."""

    trace: Trace
    timing: Timing
    method: str
    good: bool
    attributes: _About


@dataclass(frozen=True, slots=True)
class Destination:
    """Where to, and how."""

    url: str
    headers: Mapping[str, str]
    trust: ssl.SSLContext


def destination(settings: Traces) -> Destination:
    """Read what the settings name, which have an endpoint. Raises: ConfigError: a file is not what it must be."""
    assert settings.endpoint is not None, "traces are on"
    base = settings.endpoint.rstrip("/")
    url = base if "/" in base.partition("://")[2] else f"{base}/v1/traces"
    with authorities_of("traces.ca", settings.ca):
        trust = ssl.create_default_context(cafile=settings.ca)
    return Destination(url, _headers(settings), trust)


def _headers(settings: Traces) -> dict[str, str]:
    path = settings.headers_file
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise file_error(
            error, f"traces.headers_file {path} cannot be read: {error.strerror}; make it, or mend its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"traces.headers_file {path} is no text; write a header a line: name: value.") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, value = (part.strip() for part in line.partition(":"))
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            # What stands there may be a secret.
            raise ConfigError(f"Line {number} of traces.headers_file {path} is no header; write name: value.")
        found[name] = value
    return found


class Exporter:
    """Takes calls on the loop's thread, sends them on its own."""

    def __init__(self, settings: Traces, sent: Tally, failed: Tally) -> None:
        """Start. Args: sent, failed: count calls, on the exporter's thread."""
        self.settings = settings
        """Where to; when others are set, they and their files are read anew."""
        self._sent, self._failed = sent, failed
        self._problem = ""
        self._waiting: deque[Traced] = deque()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def take(self, call: Traced) -> bool:
        """Have a call sent in a while. Returns: False: too many wait, and it is not."""
        waiting = len(self._waiting)
        if waiting >= _WAITING:
            return False
        self._waiting.append(call)
        if waiting + 1 == _AT_ONCE:
            self._wake.set()
        return True

    def close(self) -> None:
        """Send what waits, for two seconds at most, and end; not on the loop's thread."""
        self._closed.set()
        self._wake.set()
        self._thread.join(_LAST_S)

    # ---- on the exporter's thread ----

    def _run(self) -> None:
        to: Destination | None = None
        while not self._over:
            settings = self.settings
            try:
                to = destination(settings)
            except ConfigError as error:  # the files were sound when the configuration was taken over
                self._say(str(error))
            if to is None:
                if self._closed.wait(_PAUSE_S):
                    return
                continue
            with httpx.Client(verify=to.trust, headers=to.headers, timeout=_TIMEOUT_S, trust_env=False) as client:
                spans = Spans(settings)
                while self.settings is settings and not self._over:
                    self._wake.wait(_PAUSE_S)
                    self._wake.clear()
                    while self._waiting and self.settings is settings:
                        self._send_some(client, to.url, spans)
                        self._closed.wait(_REST_S)

    @property
    def _over(self) -> bool:
        """Whether there is nothing more to do."""
        return self._closed.is_set() and not self._waiting

    def _send_some(self, client: httpx.Client, url: str, spans: "Spans") -> None:
        calls = [self._waiting.popleft() for _ in range(min(_AT_ONCE, len(self._waiting)))]
        try:
            problem = self._post(client, url, spans.message(calls))
        except Exception as error:
            # Whatever it is, a bug of ours too, costs these traces only.
            problem = repr(error)
        (self._failed if problem else self._sent).inc(len(calls))
        self._say(problem and f"traces are not sent to {url}: {problem[:300]}")

    def _say(self, problem: str) -> None:
        """Tell the log what is wrong, when that changes; "" for nothing."""
        if problem != self._problem:
            self._problem = problem
            if problem:
                _log.warning("%s", printable(problem))
            else:
                _log.info("traces are sent again")

    def _post(self, client: httpx.Client, url: str, message: bytes) -> str:
        """Send a message, again while that may help. Returns: why it was not taken; "" when it was."""
        headers = {"content-type": "application/x-protobuf"}
        until, wait = time.monotonic() + _PATIENCE_S, _FIRST_WAIT_S
        while True:
            try:
                reply = client.post(url, content=message, headers=headers)
            except httpx.HTTPError as error:
                problem, again = str(error) or type(error).__name__, True
            else:
                problem, again = _answered(reply), reply.status_code in _TRY_AGAIN
            wait *= random.uniform(1, 2)  # noqa: S311  # so that not all come back at once
            if not again or time.monotonic() + wait > until or self._closed.wait(wait):
                return problem


def _answered(reply: httpx.Response) -> str:
    """What a collector's answer finds wrong; "" for nothing."""
    if not reply.is_success:
        return f"HTTP {reply.status_code}"
    with contextlib.suppress(Exception):  # what is no such message says nothing, and the status says all is well
        told = trace_service_pb2.ExportTraceServiceResponse.FromString(reply.content).partial_success
        if told.rejected_spans:
            return f"{told.rejected_spans} spans were rejected: {told.error_message}"
    return ""


class Spans:
    """Makes spans of calls."""

    def __init__(self, settings: Traces) -> None:
        about: _About = {
            "service.name": settings.service_name,
            "service.version": __version__,
            "host.name": socket.gethostname(),
            "process.pid": os.getpid(),
            **{name.strip(): value.strip() for name, _, value in (each.partition("=") for each in settings.attributes)},
        }
        self._resource = resource_pb2.Resource(attributes=_attributes(about))
        self._scope = common_pb2.InstrumentationScope(name="inference-appliance", version=__version__)
        self._first: OrderedDict[float, tuple[bytes, bytes]] = OrderedDict()

    def message(self, calls: list[Traced]) -> bytes:
        """An OTLP request with the spans of these calls."""
        request = trace_service_pb2.ExportTraceServiceRequest()
        mine = request.resource_spans.add(resource=self._resource).scope_spans.add(scope=self._scope)
        offset = time.time_ns() - time.monotonic_ns()
        for call in calls:
            mine.spans.extend(self._of_call(call, offset))
            time.sleep(0)  # lets the loop go on, which else waits for the interpreter's lock up to 5 ms
        data: bytes = request.SerializeToString()
        return data

    def _of_call(self, call: Traced, offset: int) -> Iterator[Any]:
        """The call's span, and one for each step of it. Args: offset: from our times to Unix time, nanoseconds."""
        trace, timing = call.trace, call.timing
        trace_id, own = bytes.fromhex(trace.id), bytes.fromhex(trace.span)

        def span(name: str, begun: float, ended: float, about: _About = _NOTHING, **more: Any) -> Any:
            step: dict[str, Any] = {"span_id": bytes.fromhex(new_id(64)), "parent_span_id": own}
            step["kind"] = _Span.SPAN_KIND_INTERNAL
            return _Span(
                trace_id=trace_id,
                name=name,
                start_time_unix_nano=int(begun * 1e9) + offset,
                end_time_unix_nano=int(ended * 1e9) + offset,
                attributes=_attributes(about),
                trace_state=trace.state,
                **(step | more),
            )

        yield span(
            call.method,
            timing.begun,
            timing.ended_at,
            call.attributes,
            span_id=own,
            parent_span_id=bytes.fromhex(trace.parent),
            kind=_Span.SPAN_KIND_SERVER,
            status=None if call.good else _Status(code=_Status.STATUS_CODE_ERROR),
        )
        if timing.known_at:
            yield span("auth", timing.begun, timing.known_at)
        for begun, ended in timing.decoded:
            yield span("decode", begun, ended)
        for run in timing.runs:
            about: _About = {"appliance.run": f"{int(run.taken_at * 1e9):x}", "appliance.run.rows": run.rows}
            gathered = run.taken_at + run.batch_wait
            yield span("queue", run.queued_at, run.taken_at, about)
            yield span("batch wait", run.taken_at, gathered, about)
            computed = span("compute", gathered, gathered + run.compute, about)
            self._link(computed, run)
            yield computed
        if timing.computed_at and timing.encoded_at:
            yield span("encode", timing.computed_at, timing.encoded_at)

    def _link(self, computed: Any, run: Run) -> None:
        """Link the span of a run to the first one of that run that we know, of another call."""
        first = self._first.setdefault(run.taken_at, (computed.trace_id, computed.span_id))
        if first[0] != computed.trace_id:
            computed.links.add(trace_id=first[0], span_id=first[1])
        if len(self._first) > _RUNS:
            self._first.popitem(last=False)


def _attributes(about: _About) -> list[Any]:
    return [
        common_pb2.KeyValue(
            key=key,
            value=common_pb2.AnyValue(int_value=value)
            if isinstance(value, int)
            else common_pb2.AnyValue(string_value=value),
        )
        for key, value in about.items()
    ]
