"""The API path without a wire: `python -m bench.inprocess` prints microseconds a call, asserts nothing.

Calls go to the endpoints as a transport makes them: to the quick handler, and to the unary one where the quick one
leaves the call alone. "closed" has one call at a time; "burst" has 64 calls in one turn of the loop, as many
connections make them. CPU time counts all of the process's threads; the model has one.
"""

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import inference_pb2
from appliance.api.auth import Authenticator
from appliance.api.keys import KeyStore, create_key
from appliance.api.service import Api
from appliance.catalog.repository import Repository
from appliance.core.config import Auth, Catalog, Config, Engine, Limits
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.types import Call, Endpoint
from appliance.engine.worker import LocalEngine
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool, Servable
from bench.models.tiny import mlp, write_bundle
from bench.peers.surfaces import SURFACES
from bench.workload import METHOD, ROOT

_BURST = 64
_IDS = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")


@dataclass(frozen=True, slots=True)
class Case:
    """One request, sent over and over; `quick` says whether the quick handler may take it."""

    name: str
    body: bytes
    quick: bool = True
    rpc: str = METHOD


def main(given: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one repetition")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions; the best one is shown")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_measure(Path(folder), options.seconds, options.repeat, options.only))


async def _measure(folder: Path, seconds: float, repeat: int, only: str) -> None:
    root = folder / "models"
    (folder / "state").mkdir()
    for name in ("digits", "ml-topics"):
        shutil.copytree(ROOT / "models" / name, root / name)
    write_bundle(root / "digits-graph", (ROOT / "models/digits/1/model.onnx").read_bytes())
    write_bundle(root / "mlp", mlp())
    metrics, pool = Metrics(), DecodePool(0)
    engine = LocalEngine(Engine(device="cpu", threads=1), metrics)

    async def load(path: Path, config: Any, version: Any) -> Servable:
        return await servable.load(path, config, version, engine, pool, metrics, Limits())

    settings = Catalog(root=root, state_dir=folder / "state", settle_s=0)
    repository: Repository[Servable] = Repository(settings, load)
    await repository.look()
    await repository.wait_settled()
    key, _ = create_key(folder / "keys.json", "default", "")
    config = Config(auth=Auth(keys_file=folder / "keys.json"))
    authenticator = Authenticator(config, KeyStore(folder / "keys.json"))
    api = Api(config, repository, authenticator, MemoryBudget(2**30), metrics)
    endpoints = api.endpoints()
    print(f"{'case':<28}{'closed µs':>10}{'CPU µs':>10}{'burst µs':>10}{'CPU µs':>10}  µs a call, CPU of all threads")
    for case in _cases():
        if only in case.name:
            best: dict[str, tuple[float, float]] = {}
            for _ in range(repeat):
                for name, calls in (("closed", 1), ("burst", _BURST if len(case.body) < 4096 else 4)):
                    figures = await _run(endpoints[case.rpc], key, case, calls, seconds)
                    best[name] = min(best.get(name, figures), figures)
            row = "".join(f"{value:>10.1f}" for name in ("closed", "burst") for value in best[name])
            print(f"{case.name:<28}{row}", flush=True)
    await repository.close()
    pool.close()


async def _run(endpoint: Endpoint, key: str, case: Case, at_once: int, seconds: float) -> tuple[float, float]:
    """Wall and CPU microseconds a call."""
    walls, cpus = [], []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        wall, cpu = time.perf_counter(), time.process_time()
        await _turn(endpoint, key, case, at_once)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    # Medians: the neighbours on this machine disturb some turns, and the garbage collector others.
    return statistics.median(walls) / at_once * 1e6, statistics.median(cpus) / at_once * 1e6


async def _turn(endpoint: Endpoint, key: str, case: Case, at_once: int, **more: str) -> None:
    """That many calls, made in one turn of the loop; returns when all have their reply. Args: more: headers."""
    loop = asyncio.get_running_loop()
    answered = loop.create_future()
    replies: list[bytes] = []
    slow: list[Awaitable[None]] = []

    def finish(call: Call, reply: Any) -> None:
        if not isinstance(reply, bytes):
            raise reply
        if call.memory is not None:
            call.memory.release()
        replies.append(reply)
        if len(replies) == at_once and not answered.done():
            answered.set_result(None)

    async def serve(call: Call, unary: Callable[[Call, bytes], Awaitable[bytes]]) -> None:
        finish(call, await unary(call, case.body))

    for number in range(at_once):
        headers = {"authorization": f"Key {key}", "x-request-id": str(number), **more}
        call = Call(case.rpc, headers, "ipv4:127.0.0.1:1")
        assert endpoint.unary is not None
        done = _Done(call, finish)
        if not (case.quick and endpoint.quick and endpoint.quick(call, case.body, done)):
            slow.append(loop.create_task(serve(call, endpoint.unary)))
    if slow:
        await asyncio.gather(*slow)
    await answered
    if case.rpc == METHOD:  # any other says by its gRPC status that all is well
        response = service_pb2.MultiOutputResponse.FromString(replies[0])
        assert response.status.code == 10000, response


class _Done:
    """What a transport gives to the quick handler: knows its call."""

    __slots__ = ("_call", "_finish")

    def __init__(self, call: Call, finish: Callable[[Call, Any], None]) -> None:
        self._call, self._finish = call, finish

    def __call__(self, reply: Any) -> None:
        self._finish(self._call, reply)


def _cases() -> list[Case]:
    picture = (ROOT / "models/digits/samples/held-out-000-label-2.png").read_bytes()
    image = resources_pb2.Data(image=resources_pb2.Image(base64=picture))
    row = np.linspace(-1, 1, 64, dtype=np.float32)
    array = resources_pb2.Data(ndarray=resources_pb2.NDArray(buffer=row.tobytes(), shape=[1, 8, 8], dtype="float32"))
    batch = resources_pb2.Data(
        ndarray=resources_pb2.NDArray(buffer=row.tobytes() * 128, shape=[128, 1, 8, 8], dtype="float32")
    )
    vector = resources_pb2.Data(ndarray=resources_pb2.NDArray(buffer=row.tobytes(), shape=[64], dtype="float32"))
    sentence = "The gradient of the loss vanishes when the network is deep and its activations saturate early."
    text = resources_pb2.Data(text=resources_pb2.Text(raw=sentence))

    def body(model: str, data: resources_pb2.Data, count: int = 1) -> bytes:
        inputs = [resources_pb2.Input(data=data)] * count
        request = service_pb2.PostModelOutputsRequest(user_app_id=_IDS, model_id=model, inputs=inputs)
        return bytes(request.SerializeToString())

    def tensor(model: str, name: str, datatype: str, shape: list[int], raw: bytes) -> bytes:
        request = inference_pb2.ModelInferRequest(model_name=model, raw_input_contents=[raw])
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        return bytes(request.SerializeToString())

    def element(content: bytes) -> bytes:
        return len(content).to_bytes(4, "little") + content

    typed = inference_pb2.ModelInferRequest(model_name="mlp")
    given = typed.inputs.add(name="x", datatype="FP32", shape=[1, 64])
    given.contents.fp32_contents.extend(row)
    infer = SURFACES["v2"].path
    floats = tensor("mlp", "x", "FP32", [1, 64], row.tobytes())
    file = tensor("digits", "image", "BYTES", [1], element(picture))

    return [
        Case("digits image", body("digits", image)),
        Case("digits image, unary", body("digits", image), quick=False),
        Case("mlp array", body("mlp", vector)),
        Case("digits array", body("digits-graph", array)),
        Case("digits array, unary", body("digits-graph", array), quick=False),
        Case("ml-topics text", body("ml-topics", text)),
        Case("ml-topics text, unary", body("ml-topics", text), quick=False),
        Case("KServe mlp", floats, rpc=infer),
        Case("KServe mlp, unary", floats, quick=False, rpc=infer),
        Case("KServe mlp, typed", bytes(typed.SerializeToString()), rpc=infer),
        Case("KServe digits image", file, rpc=infer),
        Case("KServe digits image, unary", file, quick=False, rpc=infer),
        Case("KServe ml-topics text", tensor("ml-topics", "text", "BYTES", [1], element(sentence.encode())), rpc=infer),
        Case("digits 128 images", body("digits", image, 128)),
        Case("digits array of 128 rows", body("digits-graph", batch)),
        Case("digits 128 arrays", body("digits-graph", array, 128)),
        Case("ml-topics 128 texts", body("ml-topics", text, 128)),
    ]


if __name__ == "__main__":
    main()
