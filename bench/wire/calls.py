"""Load by grpcio's own client; `python -m bench.wire.calls` is the client's process, see client.py.

Every call has a deadline, a key and a request id of its own, so that its headers are new to the server each time.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from bench.wire.client import Client, listen, say
from bench.wire.load import Figures, quantile
from bench.wire.process import cpu_ns

PROCESSES = 2
IN_FLIGHT = 4
"""Calls at a time of each process, on one connection."""

_DEADLINE_S = 30.0
_WARM_UP_S = 0.3


# ---- in the benchmark's own process ----------------------------------------------------------------------------------


def check(checks: Sequence[dict[str, Any]], folder: Path, cpu: tuple[int, ...]) -> list[str]:
    """Make one call for each check; what is wrong with its reply, or "".

    Args: checks: each with address, mode, method, and the files `request` and `expected`.
    """
    client = Client("bench.wire.calls", cpu, {"checks": list(checks), "folder": str(folder)})
    found: list[str] = client.hear()
    client.end()
    return found


def measure(
    address: str,
    mode: str,
    method: str,
    payload: Path,
    folder: Path,
    pids: Sequence[int],
    cpu: tuple[int, ...],
    seconds: float,
) -> Figures:
    """Load for so many seconds. Args: payload: path of the request's files without the suffix."""
    job = {
        "address": address,
        "mode": mode,
        "method": method,
        "request": str(payload.with_suffix(".request")),
        "expected": str(payload.with_suffix(".expected")),
        "folder": str(folder),
    }
    clients = [Client("bench.wire.calls", cpu, job) for _ in range(PROCESSES)]
    for client in clients:
        client.hear()  # it is connected
    loads = [client.pid for client in clients]
    end = time.time() + _WARM_UP_S + seconds
    for client in clients:
        client.tell({"until": end})
    time.sleep(_WARM_UP_S)
    started, before, load_before = time.time(), cpu_ns(pids), cpu_ns(loads)
    time.sleep(max(0.0, end - time.time()))
    ended, after, load_after = time.time(), cpu_ns(pids), cpu_ns(loads)
    found = [client.hear() for client in clients]
    for client in clients:
        client.end()
    durations = sorted(took for one in found for end, took in one["times"] if started < end <= ended)
    problems = sorted({problem for one in found for problem in one["problems"]})
    answered = max(1, len(durations))
    return Figures(
        rps=len(durations) / (ended - started),
        p50_ms=quantile(durations, 50) * 1e3,
        p99_ms=quantile(durations, 99) * 1e3,
        cpu_us=(after - before) / 1e3 / answered,
        requests=len(durations),
        errors=sum(one["errors"] for one in found) + (not durations),
        server_share=(after - before) / 1e9 / (ended - started),
        load_share=(load_after - load_before) / 1e9 / (ended - started),
        problems=problems,
    )


# ---- in the client's process -----------------------------------------------------------------------------------------


def main() -> None:
    """Do the job."""
    job = listen()
    say(asyncio.run(_check(job) if "checks" in job else _load(job)))
    listen()


async def _check(job: dict[str, Any]) -> list[str]:
    found = []
    for one in job["checks"]:
        request, expected = _files(one)
        async with _channel(one["address"], one["mode"], Path(job["folder"])) as channel:
            try:
                call = channel.unary_unary(one["method"])
                reply = await call(request, timeout=_DEADLINE_S, wait_for_ready=True)
            except grpc.RpcError as error:
                found.append(f"gRPC {error.code().name}: {error.details()}")
            else:
                found.append("" if reply == expected else f"a wrong reply of {len(reply)} bytes")
    return found


async def _load(job: dict[str, Any]) -> dict[str, Any]:
    """Times: end (since the epoch) and duration of each call that was answered rightly."""
    request, expected = _files(job)
    times: list[tuple[float, float]] = []
    problems: dict[str, int] = {}

    async def ask_until(end: float, call: Any, number: int) -> None:
        sent = 0
        while time.time() < end:
            sent += 1
            metadata = (
                ("authorization", "Key 0123456789abcdef0123456789abcdef"),
                ("x-request-id", f"{os.getpid():08x}{number:08x}{sent:016x}"),
            )
            begun = time.perf_counter()
            try:
                reply = await call(request, timeout=_DEADLINE_S, metadata=metadata)
                problem = "" if reply == expected else f"a wrong reply of {len(reply)} bytes"
            except grpc.RpcError as error:
                problem = f"gRPC {error.code().name}: {error.details()}"
            if problem:
                problems[problem] = problems.get(problem, 0) + 1
                await asyncio.sleep(0.1)  # a server that is gone is not asked a million times
            else:
                times.append((time.time(), time.perf_counter() - begun))

    async with _channel(job["address"], job["mode"], Path(job["folder"])) as channel:
        await asyncio.wait_for(channel.channel_ready(), _DEADLINE_S)
        say("connected")
        end = listen()["until"]
        call = channel.unary_unary(job["method"])
        await asyncio.gather(*(ask_until(end, call, number) for number in range(IN_FLIGHT)))
    return {"times": times, "errors": sum(problems.values()), "problems": list(problems)}


def _files(job: dict[str, Any]) -> tuple[bytes, bytes]:
    """The request, and the right reply."""
    return Path(job["request"]).read_bytes(), Path(job["expected"]).read_bytes()


def _channel(address: str, mode: str, folder: Path) -> Any:
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    if mode == "plain":
        return grpc.aio.insecure_channel(address, options=options)
    client = [(folder / f"client.{kind}").read_bytes() if mode == "mtls" else None for kind in ("key", "crt")]
    return grpc.aio.secure_channel(
        address, grpc.ssl_channel_credentials((folder / "ca.crt").read_bytes(), *client), options=options
    )


if __name__ == "__main__":
    main()
