"""Run a centre as a process: `python -m orchestrator.centre SETTINGS`, a JSON file; see `Settings`.

It says on stdout which port it bound, as one line of JSON, and ends on SIGTERM.
"""

import asyncio
import dataclasses
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
from clarifai_grpc.grpc.api.status import status_code_pb2
from orchestrator.centre.faults import Fault
from orchestrator.centre.recorder import Recorder
from orchestrator.centre.resources import Refused
from orchestrator.centre.service import Aborted, Centre
from orchestrator.centre.store import Store


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a centre runs.

    Attributes:
        listen: host:port; port 0 for any.
        certificate, key: PEM files that it shows.
        client_ca: PEM file; clients must show a certificate of it. "": no certificates are asked for.
        state, record: its SQLite files.
        control: where its unix socket is made.
        patience_s, queue_s: see `Work`.
        keepalive_s: how often it pings its clients, which is how it notices those that are gone; 0: never.
        pings_apart_s: clients that ping more often are sent away (gRPC's own default is 300 s).
        clock_ahead_s: how much later it is there than here.
    """

    listen: str
    certificate: str
    key: str
    state: str
    record: str
    control: str
    client_ca: str = ""
    patience_s: float = 1.0
    queue_s: float = 30.0
    keepalive_s: float = 0.0
    pings_apart_s: float = 10.0
    clock_ahead_s: float = 0.0


class Control:
    """What tests tell a centre: a line of JSON each, answered by one."""

    def __init__(self, centre: Centre) -> None:
        self._centre = centre

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        while line := await reader.readline():
            order = json.loads(line)
            try:
                answer = getattr(self, f"do_{order.pop('do')}")(**order)
            except Exception as error:  # whatever is wrong with an order is the test's to read
                answer = {"error": f"{type(error).__name__}: {error}"}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    def do_admit(self, pat: str, user: str) -> Any:
        """A token from now on acts for a user."""
        self._centre.store.admit(pat, user)
        return {}

    def do_revoke(self, pat: str) -> Any:
        """A token acts for nobody any more; streams under it are told, and end."""
        self._centre.store.revoke(pat)
        code = status_code_pb2.StatusCode.Value("CONN_KEY_INVALID")
        return {"ended": self._centre.break_streams(Refused(code, "This access token was revoked."), pat)}

    def do_fault(self, **fault: Any) -> Any:
        """Something goes wrong from now on; see `Fault`."""
        self._centre.faults.active.append(Fault(**fault))
        return {}

    def do_duplicate(self, times: int) -> Any:
        """The next items go to two streams each."""
        self._centre.faults.duplicates = times
        return {}

    def do_clear(self) -> Any:
        """Nothing goes wrong any more."""
        self._centre.faults.clear()
        return {}

    def do_break_streams(self, grpc_code: str) -> Any:
        """All runners' streams end with a gRPC code."""
        return {"ended": self._centre.break_streams(Aborted(grpc.StatusCode[grpc_code], "a fault of the test"))}

    def do_state(self) -> Any:
        """Streams, items and counts."""
        return self._centre.work.state()


def _credentials(settings: Settings) -> Any:
    roots = Path(settings.client_ca).read_bytes() if settings.client_ca else None
    pair = (Path(settings.key).read_bytes(), Path(settings.certificate).read_bytes())
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


async def run(settings: Settings) -> None:
    """Serve until SIGTERM."""
    store, recorder = Store(Path(settings.state)), Recorder(Path(settings.record))
    centre = Centre(store, recorder, settings.patience_s, settings.queue_s)
    centre.clock_ahead_s = settings.clock_ahead_s
    options = [
        ("grpc.max_receive_message_length", 2**30),
        ("grpc.max_send_message_length", 2**30),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(settings.pings_apart_s * 1000)),
    ]
    if settings.keepalive_s:
        options += [
            ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(settings.keepalive_s * 1000)),
        ]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((centre,))
    port = server.add_secure_port(settings.listen, _credentials(settings))
    await server.start()
    control = await asyncio.start_unix_server(Control(centre).serve, settings.control)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(json.dumps({"port": port}), flush=True)
    await stopping.wait()
    control.close()
    await server.stop(grace=0)
    store.close()
    recorder.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(run(Settings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
