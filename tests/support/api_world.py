"""An API over real bundles, called as bytes: no sockets."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from google.protobuf import message_factory

from appliance.api.auth import Authenticator
from appliance.api.keys import KeyStore, create_key
from appliance.api.service import Api
from appliance.catalog.repository import Repository
from appliance.catalog.workflows import Workflows
from appliance.core.config import Auth, Catalog, Config, Limits, Principal
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.types import Call, RpcAbort
from appliance.engine import worker
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool, Servable
from support import graphs, pictures
from support.engine_graphs import engine

V2 = "/clarifai.api.V2/"
SERVICE = service_pb2.DESCRIPTOR.services_by_name["V2"]
QUICK = {"batching": {"max_rows": 4}}
"""Few sizes to measure, so that loading is quick."""


class World:
    """A catalog of tiny bundles, and APIs on it: each has its own keys, budget and metrics.

    Models: `colours` (versions 1 and 2) and `wide` classify pictures (3 and 250 concepts), `topic` texts, `vector`
    embeds pictures, `tensor` is raw with one input, `pair` raw with two inputs and outputs, `fragile` says NaN for
    black pictures, `gather` fails for an index over 1000, `broken` cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "models"
        self.root.mkdir(parents=True)
        (folder / "state").mkdir()
        self._pool = DecodePool(2)
        self._number = 0

    async def open(self) -> None:
        """Write the bundles, and load them."""
        for version in ("1", "2"):
            graphs.write_image_classifier(self.root / "colours", version=version, onnx_section=QUICK)
        names = [f"n{index}" for index in range(250)]
        graphs.write_image_classifier(self.root / "wide", concepts=names, onnx_section=QUICK)
        fragile = graphs.nan_classifier_model()
        graphs.write_image_classifier(self.root / "fragile", model=fragile, onnx_section=QUICK)
        graphs.write_text_classifier(self.root / "topic", max_tokens=16)
        graphs.write_image_embedder(self.root / "vector")
        graphs.write_raw(self.root / "tensor", **QUICK)
        graphs.write_raw(self.root / "pair", graphs.two_in_two_out_model(), **QUICK)
        graphs.write_raw(self.root / "gather", graphs.gather_model(), **QUICK)
        graphs.write_raw(self.root / "broken", graphs.string_model())
        await self.look()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator["World"]:
        """Open it for the block, tiny graphs inline however slow and busy this machine is now."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker, "LONGEST_RUN_S", 10)
            patch.setattr(worker, "TURN_S", 10)
            await self.open()
        try:
            yield self
        finally:
            await self.close()

    async def look(self) -> None:
        """Load what lies there now."""
        settings = Catalog(root=self.root, state_dir=self.folder / "state", settle_s=0, scan_interval_s=0.05)
        metrics = Metrics()
        runner = engine(metrics)

        async def load(path: Path, config: Any, version: Any) -> Servable:
            return await servable.load(path, config, version, runner, self._pool, metrics, Limits())

        self.repository: Repository[Servable] = Repository(settings, load)
        await self.repository.look()
        await asyncio.wait_for(self.repository.wait_settled(), 60)

    async def close(self) -> None:
        """Let all go."""
        await self.repository.close()
        self._pool.close()

    def api(
        self,
        *principals: Principal,
        memory: int = 200 * 2**20,
        workflows: Workflows | None = None,
        **sections: Any,
    ) -> "Client":
        """A fresh API with a key for each principal, the first one's is the client's."""
        self._number += 1
        path = self.folder / f"keys-{self._number}.json"
        keys = [create_key(path, principal.name, "")[0] for principal in principals or (Principal(name="default"),)]
        config = Config(auth=Auth(keys_file=path), principal=principals, **sections)
        budget = MemoryBudget(memory)
        metrics = Metrics()
        api = Api(config, self.repository, Authenticator(config, KeyStore(path)), budget, metrics, workflows)
        return Client(api, keys, budget, metrics)


class Client:
    """Calls an API's endpoints with messages, as a transport does with bytes."""

    def __init__(self, api: Api, keys: list[str], budget: MemoryBudget, metrics: Metrics) -> None:
        self.api, self.keys, self.budget, self.metrics = api, keys, budget, metrics
        self.endpoints = api.endpoints()

    def call(self, method: str, *, key: str | None = "", deadline: float | None = None, **headers: str) -> Call:
        """What a transport knows of a call; the first key unless another one, or None, is given."""
        metadata = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            metadata["authorization"] = f"Key {key or self.keys[0]}"
        return Call(method, metadata, "ipv4:127.0.0.1:1", deadline)

    async def raw(self, rpc: str, body: bytes, **call: Any) -> bytes:
        """One message in, one out; streaming RPCs are given a stream of one. The quick way is tried first."""
        name = rpc if rpc.startswith("/") else V2 + rpc
        endpoint = self.endpoints[name]
        if endpoint.quick is not None:
            replied: asyncio.Future[bytes | RpcAbort] = asyncio.get_running_loop().create_future()
            if endpoint.quick(self.call(name, **call), body, replied.set_result):
                reply = await replied
                if isinstance(reply, RpcAbort):
                    raise reply
                return reply
        if endpoint.unary is not None:
            return await endpoint.unary(self.call(name, **call), body)
        (reply,) = await self.stream(name, [body], **call)
        return reply

    async def stream(self, name: str, bodies: list[bytes], **call: Any) -> list[bytes]:
        """All replies to a stream of messages."""

        async def requests() -> AsyncIterator[bytes]:
            for body in bodies:
                yield body

        endpoint = self.endpoints[name]
        assert endpoint.stream is not None
        return [reply async for reply in endpoint.stream(self.call(name, **call), requests())]

    async def ask(self, rpc: str, request: Any = None, **call: Any) -> Any:
        """The reply as the RPC's message."""
        descriptor = SERVICE.methods_by_name[rpc]
        request = message_factory.GetMessageClass(descriptor.input_type)() if request is None else request
        body = await self.raw(rpc, request.SerializeToString(), **call)
        return message_factory.GetMessageClass(descriptor.output_type).FromString(body)

    def count(self, name: str, **labels: str) -> float:
        """A metric's value, 0 when it was never touched."""
        return self.metrics.registry.get_sample_value(f"inference_appliance_{name}", labels) or 0.0

    async def predict(self, model: str, *inputs: Any, version: str = "", **more: Any) -> Any:
        """PostModelOutputs."""
        call = {key: more.pop(key) for key in ("key", "deadline") if key in more}
        return await self.ask("PostModelOutputs", predict_request(model, *inputs, version=version, **more), **call)


IDS = resources_pb2.UserAppIDSet(user_id=graphs.USER, app_id=graphs.APP)


def predict_request(model: str, *inputs: Any, version: str = "", output_config: Mapping[str, Any] | None = None) -> Any:
    """A request with these inputs: messages, picture bytes or texts."""
    request = service_pb2.PostModelOutputsRequest(user_app_id=IDS, model_id=model, version_id=version)
    for given in inputs:
        if isinstance(given, bytes):
            request.inputs.add().data.image.base64 = given
        elif isinstance(given, str):
            request.inputs.add().data.text.raw = given
        else:
            request.inputs.add().CopyFrom(given)
    if output_config:
        request.model.model_version.output_info.output_config.CopyFrom(resources_pb2.OutputConfig(**output_config))
    return request


PICTURE = pictures.png(pictures.rgb_pixels(8, 8))


def soon(seconds: float = 30.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds
