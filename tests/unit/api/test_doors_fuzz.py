"""Whatever strangers send to the other doors is answered or refused: no internal error, nothing left behind."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import graphs
from support.api_world import PICTURE, QUICK, Client, World
from support.http_client import http_client

from appliance.api import inference_pb2 as pb
from appliance.api.kserve_http import kserve_routes
from appliance.api.openai import openai_routes
from appliance.core.types import RpcAbort, RpcStatus

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = settings(
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
MODELS = ("tensor", "pair", "colours", "topic", "vector", "sentence", "half", "nothing", "tester/tests/tensor", "")
NAMES = ("x", "a", "b", "image", "text", "")
DATATYPES = ("FP32", "FP16", "FP64", "BOOL", "INT8", "UINT64", "BYTES", "BF16", "fp32", "")
AXES = st.one_of(st.integers(-2, 4), st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63)]))
SHAPES = st.lists(AXES, max_size=4)
RAW = st.one_of(st.binary(max_size=64), st.sampled_from([bytes(12), bytes(24), b"\x04\0\0\0good", PICTURE]))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    """An API over the usual models, an embedder of texts, and a raw model of half floats."""
    made = World(tmp_path_factory.mktemp("world"))
    graphs.write_text_embedder(made.root / "sentence", max_tokens=8)
    graphs.write_raw(made.root / "half", graphs.identity_model(("batch", 3), 10), **QUICK)
    async with made.opened():
        yield made.api()


@st.composite
def infer_bodies(draw: st.DrawFn) -> bytes:
    """Requests that are nearly right, some of them cut or with bytes changed."""
    request = pb.ModelInferRequest(
        model_name=draw(st.sampled_from(MODELS)), model_version=draw(st.sampled_from(["", "1"]))
    )
    for _ in range(draw(st.integers(0, 3))):
        made = request.inputs.add(
            name=draw(st.sampled_from(NAMES)), datatype=draw(st.sampled_from(DATATYPES)), shape=draw(SHAPES)
        )
        contents = draw(st.sampled_from(["", "fp32_contents", "int_contents", "bytes_contents", "bool_contents"]))
        if contents:
            values: Any = [b"good", PICTURE] if contents == "bytes_contents" else [1, 0, 1]
            getattr(made.contents, contents).extend(values)
    request.raw_input_contents.extend(draw(st.lists(RAW, max_size=3)))
    if draw(st.booleans()):
        request.outputs.add(name=draw(st.sampled_from(["y", "sum", "values", "z"])))
    if draw(st.booleans()):
        request.parameters["max_concepts"].int64_param = draw(st.integers(-(2**63), 2**63 - 1))
    body = bytearray(request.SerializeToString())
    for _ in range(draw(st.integers(0, 3))):
        if body:
            body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body)


@given(body=infer_bodies())
@SETTINGS
async def test_kserve_over_grpc(fuzzed: Client, body: bytes) -> None:
    """An answer, or a status that says whose fault it is."""
    ended: bytes | RpcAbort
    try:
        ended = await asyncio.wait_for(fuzzed.raw("/inference.GRPCInferenceService/ModelInfer", body), 60)
    except RpcAbort as abort:
        ended = abort
    if isinstance(ended, RpcAbort):
        assert ended.status in (RpcStatus.INVALID_ARGUMENT, RpcStatus.NOT_FOUND), ended.message
        assert 0 < len(ended.message) < 2000
    else:
        assert pb.ModelInferResponse.FromString(ended).outputs
    assert fuzzed.budget.used == 0


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 3),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["x", "image", "text", "FP32", "INT8", "BYTES", "BOOL", "FP16", "data", "good", "1e999", "\ud800"]),
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))
INPUTS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.one_of(st.sampled_from(NAMES), VALUES),
        "datatype": st.one_of(st.sampled_from(DATATYPES), VALUES),
        "shape": st.one_of(SHAPES, VALUES),
        "data": st.one_of(st.just([1, 2, 3]), st.just([[1, 0, 1]]), st.just(["good"]), VALUES),
        "parameters": st.one_of(st.just({"binary_data_size": 12}), VALUES),
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.one_of(st.lists(INPUTS, max_size=3), VALUES),
        "outputs": st.one_of(st.just([{"name": "y", "parameters": {"binary_data": True}}]), VALUES),
        "parameters": st.one_of(st.just({"binary_data_output": True}), VALUES),
        "id": VALUES,
    },
)


@given(
    model=st.sampled_from(MODELS[:-1]),
    content=st.one_of(REQUESTS, VALUES),
    tail=st.binary(max_size=12),
    length=st.one_of(st.none(), st.integers(0, 400), st.just(-1)),
)
@SETTINGS
async def test_kserve_over_rest(fuzzed: Client, model: str, content: Any, tail: bytes, length: int | None) -> None:
    """The same; -1 stands for the right length."""
    text = json.dumps(content).encode()
    headers = {} if length is None else {"inference-header-content-length": str(len(text) if length < 0 else length)}
    async with http_client(kserve_routes(fuzzed.api.kserve, fuzzed.api), fuzzed.keys[0]) as browser:
        answer = await browser.post(f"/kserve/v2/models/{model}/infer", content=text + tail, headers=headers)
    assert answer.status_code in (200, 400, 404), answer.text
    assert answer.status_code == 200 or set(answer.json()) == {"error"}
    assert fuzzed.budget.used == 0


EMBEDDINGS = st.fixed_dictionaries(
    {},
    optional={
        "model": st.one_of(st.sampled_from(["tester/tests/models/sentence", "sentence", "vector", "topic"]), VALUES),
        "input": st.one_of(st.text(max_size=40), st.lists(st.text(max_size=9), max_size=4), VALUES),
        "encoding_format": st.one_of(st.sampled_from(["float", "base64"]), VALUES),
        "dimensions": st.one_of(st.just(4), VALUES),
        "user": VALUES,
    },
)


@given(content=st.one_of(EMBEDDINGS, VALUES))
@SETTINGS
async def test_openais_embeddings(fuzzed: Client, content: Any) -> None:
    """The same, in its shape."""
    async with http_client(openai_routes(fuzzed.api.direct, fuzzed.api), fuzzed.keys[0]) as browser:
        answer = await browser.post("/v2/ext/openai/v1/embeddings", content=json.dumps(content).encode())
    assert answer.status_code in (200, 400, 404), answer.text
    assert answer.status_code == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert fuzzed.budget.used == 0


@given(method=st.sampled_from(["GET", "POST"]), path=st.text("abv2/%:.models-infready ", max_size=40))
@SETTINGS
async def test_any_path(fuzzed: Client, method: str, path: str) -> None:
    """Below both surfaces."""
    routes = [
        *kserve_routes(fuzzed.api.kserve, fuzzed.api),
        *openai_routes(fuzzed.api.direct, fuzzed.api),
    ]
    async with http_client(routes, fuzzed.keys[0]) as browser:
        for base in ("/kserve/v2/models/", "/v2/ext/openai/v1/models/", "/v2/ext/openai/v1/"):
            answer = await browser.request(method, base + path.replace("%", "%25"))
            assert answer.status_code in (200, 400, 404, 405, 503)
            assert answer.json()
