"""A status document for tests, with everything that may be in one."""

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from appliance.daemon.page import page_routes
from appliance.daemon.status import (
    VERSION,
    Device,
    Disk,
    Ending,
    Failure,
    History,
    Load,
    LogLine,
    Model,
    Orchestrator,
    Process,
    Rates,
    Reason,
    Status,
)
from appliance.daemon.trial import Trial
from support.waiting import eventually

NOW = 1796040000.0
"""2026-11-30 12:00:00 UTC."""

_DAY_S = 86400.0
_NO_CALLS = Rates(0.0, 0.0, None, None)


def model(name: str, state: Any = "ready", problem: str = "", rates: Rates = _NO_CALLS, **changes: Any) -> Model:
    """A version of a bundle that takes pictures."""
    made = Model(name, f"appliance/main/{name}", "1", state, problem, "image", "cpu", 0, rates)
    return dataclasses.replace(made, **changes)


def document(**changes: Any) -> Status:
    """A machine with a GPU, enrolled, on which not all is well."""
    calls = [None] * 40 + [float(step % 7) for step in range(20)]
    status = Status(
        format=VERSION,
        at=NOW,
        host="edge-7",
        version="0.1.0",
        started_at=NOW - 3 * _DAY_S,
        phase="ready",
        health="degraded",
        reasons=[
            Reason("topics:2", "model.onnx: its checksum is not that of SHA256SUMS", "model-not-ready"),
            Reason("certificate server", "it ends in 9.5 days", "certificate-expires"),
        ],
        more_reasons=0,
        base_url="https://edge-7.example.com:8443",
        root_certificate="/etc/inference-appliance/tls/ca.crt",
        mode="processes",
        transport="native",
        device="gpu:0 (NVIDIA L4): asked for",
        devices=[
            Device("cpu", 0.25, 3 * 2**29, 16 * 2**30, None, None),
            Device("gpu:0", 0.815, 9 * 2**30, 23 * 2**30, 61.0, 58.4),
        ],
        processes=[Process("engine gpu:0", 4711, ""), Process("front 0", 0, "is being replaced")],
        models=[
            model("digits", rates=Rates(12.4, 0.2, 0.0021, 0.0184), queue_rows=3, device="gpu:0"),
            model("topics", "failed", "model.onnx: its checksum is not that of SHA256SUMS", version="2", input="text"),
            model("older", "held", version="1", input=""),
            Model("half", "", "", "settling", "its files are still changing", "", "", 0, _NO_CALLS),
        ],
        rates=Rates(12.4, 0.2, 0.0021, 0.0184),
        load=Load(3, 17, 5 * 2**20, 4 * 2**30, 0, {"auth": 4, "queue_full": 12}),
        history=History(5.0, calls, [value and value / 10 for value in calls], calls, calls),
        certificates=[Ending("server", NOW + 9.5 * _DAY_S), Ending("client_ca", NOW + 3000 * _DAY_S)],
        revocation_lists=[Ending("CN=Example root", NOW - 3600)],
        keys=3,
        disks=[Disk("models", 40 * 2**30, 100 * 2**30), Disk("state", 40 * 2**30, 100 * 2**30)],
        orchestrator=Orchestrator(
            True, "https://api.example.com:443", "acme", {"nodepool": 1, "model_version": 2}, True, NOW - 3600, "", 2
        ),
        failures=[
            Failure(NOW - 30, 11008, "CONN_KEY_INVALID", "", "", "PostModelOutputs", 4, "r-0123"),
            Failure(NOW - 90, 21354, "MODEL_BUSY_PLEASE_RETRY", "digits", "1", "PostModelOutputs", 12, "r-0456"),
        ],
        log=[LogLine(NOW - 60, "critical", "the front 0 was ended by SIGKILL in_flight=0")],
    )
    return dataclasses.replace(status, **changes)


@contextmanager
def served(body: bytes, trial: Trial) -> Iterator[str]:
    """The status page over that document, on loopback; its address."""
    app = Starlette(routes=page_routes(lambda: body, trial, local=True))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
