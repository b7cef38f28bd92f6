"""The grpcio load generator: as many connections as asked for, one call in flight on each, every reply checked.

`python -m bench.client` reads a job (JSON) on its standard input and writes the samples (JSON) to its standard output.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
from clarifai_grpc.grpc.api import service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2

from bench.workload import METHOD

_TIMEOUT_S = 120.0
_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # channels to one address would share one connection
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


@dataclass(slots=True)
class _Samples:
    """What happened.

    Attributes:
        times: start and duration of each call, in seconds.
        problems: sentence → how many replies it fits.
        reply_bytes: length of the last reply.
        cpu_share: of this process, while the calls were made.
    """

    times: list[tuple[float, float]] = field(default_factory=list)
    problems: dict[str, int] = field(default_factory=dict)
    reply_bytes: int = 0
    cpu_share: float = 0.0


async def _run(job: dict[str, Any], request: bytes, ca: bytes) -> _Samples:
    metadata = (("authorization", f"Key {job['key']}"),)
    credentials = grpc.ssl_channel_credentials(ca)
    channels = [
        grpc.aio.secure_channel(job["address"], credentials, options=_OPTIONS) for _ in range(job["connections"])
    ]
    calls = [channel.unary_unary(METHOD) for channel in channels]
    samples = _Samples()

    async def ask(call: Any) -> None:
        try:
            reply = await call(request, metadata=metadata, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            problem = f"gRPC {error.code().name}: {error.details()}"
        else:
            samples.reply_bytes = len(reply)
            problem = _problem(reply, job["concepts"])
        if problem:
            samples.problems[problem] = samples.problems.get(problem, 0) + 1

    async def ask_until(call: Any, end: float) -> None:
        begun = 0.0
        while begun < end:  # at least once
            begun = time.perf_counter()
            await ask(call)
            samples.times.append((begun, time.perf_counter() - begun))

    await asyncio.gather(*(asyncio.wait_for(channel.channel_ready(), _TIMEOUT_S) for channel in channels))
    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(ask_until(call, begun + job["seconds"]) for call in calls))
    samples.cpu_share = (time.process_time() - cpu) / max(1e-9, time.perf_counter() - begun)
    await asyncio.gather(*(channel.close() for channel in channels))
    return samples


def _problem(reply: bytes, concepts: list[str]) -> str:
    """What is wrong with a reply, or "": every output must be a success and name the expected concept first."""
    message = service_pb2.MultiOutputResponse.FromString(reply)
    if message.status.code != status_code_pb2.SUCCESS:
        return f"status {message.status.code} {message.status.description}: {message.status.details}"
    if len(message.outputs) != len(concepts):
        return f"{len(message.outputs)} outputs for {len(concepts)} inputs"
    for output, concept in zip(message.outputs, concepts, strict=True):
        if output.status.code != status_code_pb2.SUCCESS:
            return f"output status {output.status.code} {output.status.description}"
        found = output.data.concepts
        if not found or found[0].id != concept:
            return "an output whose best concept is not the model's own"
    return ""


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    samples = asyncio.run(_run(job, Path(job["request"]).read_bytes(), Path(job["ca"]).read_bytes()))
    json.dump(asdict(samples), sys.stdout)


if __name__ == "__main__":
    main()
