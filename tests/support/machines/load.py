"""Callers that go on while a machine's appliance is reloaded, killed, drained or upgraded, and count every call's end.

`python -m support.machines.load` reads a job (a line of JSON), says "begun" when the callers have had their first
answers, calls until its standard input ends, and then prints what became of the calls. It speaks HTTP/2 by itself,
because gRPC's own client calls a refused connection, a call that the server said it did not take, and an accepted call
whose connection was lost all UNAVAILABLE; only the last is a loss. Nothing is tried again.
"""

import asyncio
import contextlib
import itertools
import json
import ssl
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
from clarifai_grpc.grpc.api import service_pb2

from support.machines.machine import HOST, PATIENCE_S, Machine

_TESTS = Path(__file__).resolve().parents[2]
_PAUSE_S = 0.01
"""Between a refused call and the next one of that caller."""
_READ = 65_536
_UNAVAILABLE = "14"
_DEPLOYING = 21351
_HEAD, _GOAWAY = 9, 7
"""Bytes before a frame's content; the type of GOAWAY. Source: RFC 9113, 4.1, 6.8."""


@dataclass(frozen=True)
class Job:
    """What to send, and where. Attributes: body: a file. certificate: PEM file of chain and key, or ""."""

    host: str
    port: int
    ca: str
    key: str
    body: str
    path: str = "/clarifai.api.V2/PostModelOutputs"
    callers: int = 4
    certificate: str = ""


@dataclass
class Outcome:
    """What became of the calls.

    Attributes:
        answered: with a result.
        unavailable: with gRPC's status UNAVAILABLE, sent by the server.
        deploying: with 21351, "model is deploying", which SDKs ask again for: after a start, until models are loaded.
        refused: not taken: no connection, or the server said so (GOAWAY, REFUSED_STREAM).
        lost: taken, and ended with neither a result nor a status.
        other: any other status → how often.
        gap_s: the longest time in which no call was answered.
        slowest_s: the longest that an answered call took.
        notes: the first few ends that were no answer, with their time in seconds since the start.
    """

    answered: int = 0
    unavailable: int = 0
    deploying: int = 0
    refused: int = 0
    lost: int = 0
    other: dict[str, int] = field(default_factory=dict)
    gap_s: float = 0.0
    slowest_s: float = 0.0
    notes: list[str] = field(default_factory=list)


def told(outcome: Outcome) -> str:
    """For the table."""
    return (
        f"{outcome.answered} answered, {outcome.lost} lost, {outcome.unavailable} UNAVAILABLE, "
        f"{outcome.deploying} 'model is deploying', {outcome.refused} refused; "
        f"longest time without an answer {outcome.gap_s:.2f} s"
    )


class Load:
    """Callers in a process outside of the machine, from `with` to its end; `outcome` afterwards."""

    def __init__(self, machine: Machine, job: Job) -> None:
        self.outcome = Outcome()
        self._machine, self._job = machine, job

    def __enter__(self) -> "Load":
        command = [sys.executable, "-m", "support.machines.load"]
        self._process = self._machine.begin_outside(*command, cwd=_TESTS)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(self._job)) + "\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline()
        if said.strip() != "begun":
            raise AssertionError(f"the callers cannot begin: {said} {self._process.communicate()}")
        return self

    def __exit__(self, *_: object) -> None:
        """Every call that was begun ends before this returns."""
        try:
            out, err = self._process.communicate(timeout=2 * PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        assert self._process.returncode == 0, err
        self.outcome = Outcome(**json.loads(out))


# ---- the process


class _NotTaken(Exception):
    """The server did not take the call, and said so; or there was no connection."""


class _Lost(Exception):
    """The call was sent, and nobody said what became of it."""


class _Connection:
    """One connection with one call at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, job: Job) -> None:
        self._reader, self._writer, self._job = reader, writer, job
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(2**30)
        self._in = bytearray()
        self.usable = True

    def close(self) -> None:
        self.usable = False
        self._writer.close()

    async def call(self, body: bytes) -> tuple[str, bytes]:
        """gRPC's status with its message, and the reply. Raises: _NotTaken, _Lost."""
        job, stream = self._job, self._h2.get_next_available_stream_id()
        head = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", job.path),
            (":authority", f"{job.host}:{job.port}"),
        ]
        head += [("content-type", "application/grpc"), ("te", "trailers")]
        head += [("authorization", f"Key {job.key}")] if job.key else []
        reply, fields, rest = bytearray(), {}, memoryview(b"\0" + struct.pack(">I", len(body)) + body)
        try:
            self._h2.send_headers(stream, head)
            while True:
                while rest and (room := self._room(stream)):
                    self._h2.send_data(stream, bytes(rest[:room]), end_stream=room >= len(rest))
                    rest = rest[room:]
                self._writer.write(self._h2.data_to_send())
                data = await self._reader.read(_READ)
                if not data:
                    raise ConnectionResetError("closed")
                for event in self._heard(data, stream):
                    if isinstance(event, h2.events.DataReceived):
                        reply += event.data or b""
                        self._h2.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
                    elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                        fields |= dict(event.headers or ())
                    elif isinstance(event, h2.events.StreamReset):
                        self._reset(event)
                    if isinstance(event, h2.events.StreamEnded):
                        self._writer.write(self._h2.data_to_send())
                        status = fields.get("grpc-status", f"HTTP {fields.get(':status')}")
                        return f"{status} {fields.get('grpc-message', '')}".strip(), bytes(reply[5:])
        except (OSError, h2.exceptions.ProtocolError, asyncio.IncompleteReadError) as error:
            self.close()
            raise _Lost(f"{type(error).__name__} {error}") from error

    def _room(self, stream: int) -> int:
        return min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)

    def _reset(self, event: h2.events.StreamReset) -> None:
        if event.error_code == h2.errors.ErrorCodes.REFUSED_STREAM:
            raise _NotTaken("REFUSED_STREAM")
        raise _Lost(f"stream reset with {event.error_code}")

    def _heard(self, data: bytes, stream: int = 0) -> list[h2.events.Event]:
        """What whole frames say. Raises: _NotTaken: GOAWAY, and the server had not taken the call on this stream.

        GOAWAY is read here: h2 takes nothing more after one, but the server still owes answers to what it took
        (RFC 9113, 6.8).
        """
        self._in += data
        events: list[h2.events.Event] = []
        while len(self._in) >= _HEAD and len(self._in) >= (size := _HEAD + int.from_bytes(self._in[:3], "big")):
            frame = bytes(self._in[:size])
            del self._in[:size]
            if frame[3] != _GOAWAY:
                events += self._h2.receive_data(frame)
                continue
            self.usable = False
            if stream > int.from_bytes(frame[_HEAD : _HEAD + 4], "big") & 0x7FFFFFFF:
                raise _NotTaken("GOAWAY")
        return events

    async def told_to_go_meanwhile(self) -> None:
        """Hear what the server said between two calls, without waiting for more."""
        with contextlib.suppress(TimeoutError, OSError, h2.exceptions.ProtocolError):
            while self.usable:
                data = await asyncio.wait_for(self._reader.read(_READ), 0.0001)
                if not data:
                    break
                self._heard(data)
                self._writer.write(self._h2.data_to_send())
            self.close()


class _Callers:
    def __init__(self, job: Job) -> None:
        self._job, self._body = job, Path(job.body).read_bytes()
        self._context = ssl.create_default_context(cafile=job.ca)
        self._context.set_alpn_protocols(["h2"])
        if job.certificate:
            self._context.load_cert_chain(job.certificate)
        self.stop = asyncio.Event()
        self._outcome, self._other = Outcome(), Counter[str]()
        self._began = time.monotonic()
        self._answers: list[float] = []

    async def run(self) -> Outcome:
        callers = [asyncio.create_task(self._caller()) for _ in range(self._job.callers)]
        while len(self._answers) < self._job.callers and not self.stop.is_set():
            await asyncio.sleep(0.01)
            if time.monotonic() > self._began + PATIENCE_S:
                raise SystemExit(f"no call is answered: {self._outcome}")
        print("begun", flush=True)
        first = time.monotonic()
        await self.stop.wait()
        last = time.monotonic()
        await asyncio.gather(*callers)
        moments = [first, *(moment for moment in self._answers if first < moment < last), last]
        self._outcome.gap_s = max(after - before for before, after in itertools.pairwise(moments))
        self._outcome.other = dict(self._other)
        return self._outcome

    async def _caller(self) -> None:
        connection: _Connection | None = None
        while not self.stop.is_set():
            begun = time.monotonic()
            try:
                if connection is None or not connection.usable:
                    connection = await self._connect()
                status, reply = await asyncio.wait_for(connection.call(self._body), PATIENCE_S)
                if not self._count(status, reply, time.monotonic() - begun):
                    await asyncio.sleep(_PAUSE_S)
                await connection.told_to_go_meanwhile()
            except _NotTaken as why:
                self._outcome.refused += 1
                self._note(f"refused: {why}")
                await asyncio.sleep(_PAUSE_S)
            except (_Lost, TimeoutError) as why:
                self._outcome.lost += 1
                self._note(f"lost after {time.monotonic() - begun:.2f} s: {why!r}")
            if connection is not None and not connection.usable:
                connection.close()
        if connection is not None:
            connection.close()

    async def _connect(self) -> _Connection:
        """Raises: _NotTaken."""
        job = self._job
        try:
            opened = asyncio.open_connection(job.host, job.port, ssl=self._context, server_hostname=job.host)
            return _Connection(*await asyncio.wait_for(opened, PATIENCE_S), job)
        except (OSError, TimeoutError) as error:
            raise _NotTaken(f"no connection: {type(error).__name__}") from error

    def _count(self, status: str, reply: bytes, took_s: float) -> bool:
        """Returns: whether it was a result."""
        code, _, sentence = status.partition(" ")
        answer = service_pb2.MultiOutputResponse()
        if code == "0":
            answer.ParseFromString(reply)
        if code == "0" and answer.status.code == 10000:
            self._outcome.answered += 1
            self._outcome.slowest_s = max(self._outcome.slowest_s, took_s)
            self._answers.append(time.monotonic())
        elif answer.status.code == _DEPLOYING:
            self._outcome.deploying += 1
        elif code == _UNAVAILABLE:
            self._outcome.unavailable += 1
            self._note(f"UNAVAILABLE: {sentence}")
        else:
            self._other[f"gRPC {status}, {answer.status.code} {answer.status.description}"] += 1
        return code == "0" and answer.status.code == 10000

    def _note(self, what: str) -> None:
        if len(self._outcome.notes) < 20:
            self._outcome.notes.append(f"{time.monotonic() - self._began:.2f} s {what}")


async def _main() -> None:
    job = Job(**json.loads(sys.stdin.readline()))
    callers = _Callers(job)
    loop = asyncio.get_running_loop()
    # Standard input ends when the test wants no more calls, or when the test is gone.
    loop.run_in_executor(None, lambda: (sys.stdin.read(), loop.call_soon_threadsafe(callers.stop.set)))
    print(json.dumps(asdict(await callers.run())))


def job(machine: Machine, ca: Path, key: str, body: Path, **more: int | str) -> Job:
    """A job for a machine's main port."""
    return Job(HOST, 8443, str(ca), key, str(body), **more)  # type: ignore[arg-type]


if __name__ == "__main__":
    asyncio.run(_main())
