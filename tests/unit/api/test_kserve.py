"""KServe V2 over gRPC: models as tensors, every limit of the other door, and what strangers send."""

import struct
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from clarifai_grpc.grpc.api.status import status_code_pb2
from numpy.typing import NDArray
from onnx import TensorProto
from support import graphs, pictures
from support.api_world import PICTURE, QUICK, Client, World, soon
from support.infer import infer_request

from appliance.api import inference_pb2 as pb
from appliance.api import oip, status
from appliance.core.config import Limits, Principal
from appliance.core.types import RpcAbort, RpcStatus

pytestmark = pytest.mark.asyncio(loop_scope="module")

SERVICE = "/inference.GRPCInferenceService/"
FULL = f"{graphs.USER}/{graphs.APP}/"

TYPES = {
    "BOOL": (TensorProto.BOOL, [[True, False, True]]),
    "UINT8": (TensorProto.UINT8, [[0, 1, 255]]),
    "UINT16": (TensorProto.UINT16, [[0, 1, 2**16 - 1]]),
    "UINT32": (TensorProto.UINT32, [[0, 1, 2**32 - 1]]),
    "UINT64": (TensorProto.UINT64, [[0, 1, 2**64 - 1]]),
    "INT8": (TensorProto.INT8, [[-128, 0, 127]]),
    "INT16": (TensorProto.INT16, [[-(2**15), 0, 2**15 - 1]]),
    "INT32": (TensorProto.INT32, [[-(2**31), 0, 2**31 - 1]]),
    "INT64": (TensorProto.INT64, [[-(2**63), 0, 2**63 - 1]]),
    "FP16": (TensorProto.FLOAT16, [[-1.5, 0, 65504]]),
    "FP32": (TensorProto.FLOAT, [[-1.5, 0, 3e38]]),
    "FP64": (TensorProto.DOUBLE, [[-1.5, 0, 1e300]]),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """The usual models, one that gives back what it gets for each type of number, and one of a method of its own."""
    made = World(tmp_path_factory.mktemp("world"))
    for name, (kind, _) in TYPES.items():
        graphs.write_raw(made.root / f"same-{name.lower()}", graphs.identity_model(("batch", 3), kind), **QUICK)
    graphs.write_raw(made.root / "one", graphs.no_batch_axis_model(), **QUICK)
    array = {"type": "ndarray"}
    same = {"name": "predict", "arguments": [{"name": "x", **array}], "returns": {"output": "y", **array}}
    graphs.write_raw(made.root / "declared", methods=[same], **QUICK)
    async with made.opened():
        yield made


async def ask(client: Client, rpc: str, request: Any = None, **call: Any) -> Any:
    """The reply as the RPC's message."""
    descriptor = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[rpc]
    request = getattr(pb, descriptor.input_type.name)() if request is None else request
    body = await client.raw(SERVICE + rpc, request.SerializeToString(), **call)
    return getattr(pb, descriptor.output_type.name).FromString(body)


async def refused(client: Client, rpc: str, request: Any = None, **call: Any) -> RpcAbort:
    """How a call ends that is refused."""
    with pytest.raises(RpcAbort) as caught:
        await ask(client, rpc, request, **call)
    return caught.value


def elements(*values: bytes) -> bytes:
    """A BYTES tensor in binary form."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def strings(raw: bytes) -> list[bytes]:
    """What is in it."""
    found = []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        found.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return found


def array_of(reply: pb.ModelInferResponse, name: str) -> NDArray[Any]:
    """A numeric output."""
    index = [output.name for output in reply.outputs].index(name)
    output = reply.outputs[index]
    return np.frombuffer(reply.raw_output_contents[index], oip.DTYPES[output.datatype]).reshape(output.shape)


# ---- server and models -----------------------------------------------------------------------------------------------


async def test_the_servers_health_needs_no_credentials(world: World) -> None:
    """As grpc.health.v1; live before it is ready."""
    client = world.api()
    assert (await ask(client, "ServerLive", key=None)).live
    assert not (await ask(client, "ServerReady", key=None)).ready
    client.api.health.publish(True, {})
    assert (await ask(client, "ServerReady", key=None)).ready


@pytest.mark.parametrize("rpc", ["ModelReady", "ServerMetadata", "ModelMetadata", "RepositoryIndex", "ModelInfer"])
async def test_all_else_does(world: World, rpc: str) -> None:
    """Without a key, with a wrong one; and before the body is let in."""
    client = world.api()
    assert (await refused(client, rpc, key=None)).status is RpcStatus.UNAUTHENTICATED
    assert (await refused(client, rpc, key="0" * 64)).status is RpcStatus.UNAUTHENTICATED
    endpoint = client.endpoints[SERVICE + rpc]
    assert endpoint.admit is not None
    with pytest.raises(RpcAbort):
        endpoint.admit(client.call(SERVICE + rpc, key=None), 10)


async def test_server_metadata(world: World) -> None:
    """Name, version, and the extensions that are served."""
    reply = await ask(world.api(), "ServerMetadata")
    assert reply.name == "inference-appliance"
    assert reply.version
    assert "binary_tensor_data" in reply.extensions


@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        ("pair", [(n, "FP32", [-1, 2]) for n in ("a", "b")], [(n, "FP32", [-1, 2]) for n in ("sum", "product")]),
        ("colours", [("image", "BYTES", [-1])], [("values", "FP32", [-1, -1]), ("concepts", "BYTES", [-1, -1])]),
        ("topic", [("text", "BYTES", [-1])], [("values", "FP32", [-1, -1]), ("concepts", "BYTES", [-1, -1])]),
        ("vector", [("image", "BYTES", [-1])], [("embedding", "FP32", [-1, 3])]),
        ("one", [("x", "FP32", [3])], [("y", "FP32", [])]),
        ("same-fp16", [("x", "FP16", [-1, 3])], [("y", "FP16", [-1, 3])]),
    ],
)  # fmt: skip
async def test_model_metadata(world: World, model: str, inputs: Any, outputs: Any) -> None:
    """Inputs and outputs with -1 for free axes; the name as it was asked for."""
    for name in (model, FULL + model):
        reply = await ask(world.api(), "ModelMetadata", pb.ModelMetadataRequest(name=name))
        assert reply.name == name
        assert reply.platform == "onnxruntime_onnx"
        assert [(t.name, t.datatype, list(t.shape)) for t in reply.inputs] == inputs
        assert [(t.name, t.datatype, list(t.shape)) for t in reply.outputs] == outputs


async def test_versions_are_listed_newest_first(world: World) -> None:
    """Whichever version was asked for."""
    for version in ("", "1", "2"):
        reply = await ask(world.api(), "ModelMetadata", pb.ModelMetadataRequest(name="colours", version=version))
        assert list(reply.versions) == ["2", "1"]


async def test_a_model_that_has_no_form_in_tensors(world: World) -> None:
    """A task that this door does not know is refused, not guessed at."""
    for rpc, request in (
        ("ModelMetadata", pb.ModelMetadataRequest(name="declared")),
        ("ModelInfer", infer_request("declared", ("x", "FP32", [1, 3], ROW))),
    ):
        abort = await refused(world.api(), rpc, request)
        assert abort.status is RpcStatus.INVALID_ARGUMENT
        assert "Clarifai's API" in abort.message


async def test_model_readiness(world: World) -> None:
    """A model that cannot be loaded is not ready, one that is not there is an error."""
    client = world.api()
    client.api.health.publish(True, {})

    async def ready(name: str, version: str = "") -> bool:
        return bool((await ask(client, "ModelReady", pb.ModelReadyRequest(name=name, version=version))).ready)

    assert await ready("colours")
    assert await ready(FULL + "colours", "1")
    assert not await ready("broken")
    for request in (pb.ModelReadyRequest(name="nothing"), pb.ModelReadyRequest(name="colours", version="9")):
        assert (await refused(client, "ModelReady", request)).status is RpcStatus.NOT_FOUND


async def test_the_index_has_every_version_with_its_state(world: World) -> None:
    """And only what the caller may use."""
    index = await ask(world.api(), "RepositoryIndex")
    states = {(model.name, model.version): model.state for model in index.models}
    assert states[FULL + "colours", "2"] == "READY"
    assert states[FULL + "broken", "1"] == "UNAVAILABLE"
    ready = await ask(world.api(), "RepositoryIndex", pb.RepositoryIndexRequest(ready=True))
    assert {model.state for model in ready.models} == {"READY"}
    narrow = await ask(world.api(Principal(name="narrow", models=("pair",))), "RepositoryIndex")
    assert [model.name for model in narrow.models] == [FULL + "pair"]


@pytest.mark.parametrize("rpc", ["ModelMetadata", "ModelReady", "ModelInfer"])
async def test_others_models_may_not_be_used(world: World, rpc: str) -> None:
    """PERMISSION_DENIED, as 403."""
    client = world.api(Principal(name="narrow", models=("pair",)))
    request = infer_request("colours") if rpc == "ModelInfer" else getattr(pb, f"{rpc}Request")(name="colours")
    assert (await refused(client, rpc, request)).status is RpcStatus.PERMISSION_DENIED


@pytest.mark.parametrize("name", ["", "a/b", "a/b/c/d", "/a/b", "a//b", "tester/tests/nothing", "nothing"])
async def test_a_name_that_names_no_model(world: World, name: str) -> None:
    """Says in which forms a model is named, or that there is none."""
    abort = await refused(world.api(), "ModelInfer", infer_request(name))
    assert abort.status is RpcStatus.NOT_FOUND
    assert "user/app/model" in abort.message or "There is no model" in abort.message


# ---- raw tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", TYPES)
async def test_every_datatype_as_bytes(world: World, datatype: str) -> None:
    """What goes in comes out, two rows of it."""
    array = np.array(TYPES[datatype][1] * 2, oip.DTYPES[datatype])
    request = infer_request(f"same-{datatype.lower()}", ("x", datatype, [2, 3], array.tobytes()), id="seven")
    reply = await ask(world.api(), "ModelInfer", request)
    assert (reply.model_name, reply.model_version, reply.id) == (f"same-{datatype.lower()}", "1", "seven")
    assert reply.outputs[0].datatype == datatype
    np.testing.assert_array_equal(array_of(reply, "y"), array)


FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip


@pytest.mark.parametrize("datatype", FIELDS)
async def test_every_datatype_as_typed_contents(world: World, datatype: str) -> None:
    """The same; only FP16 has no such field."""
    values = TYPES[datatype][1]
    request = pb.ModelInferRequest(model_name=f"same-{datatype.lower()}")
    given = request.inputs.add(name="x", datatype=datatype, shape=[1, 3])
    getattr(given.contents, FIELDS[datatype]).extend(values[0])
    reply = await ask(world.api(), "ModelInfer", request)
    np.testing.assert_array_equal(array_of(reply, "y"), np.array(values, oip.DTYPES[datatype]))


async def test_several_inputs_and_outputs(world: World) -> None:
    """By name, in any order; outputs in the order they were asked for."""
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[5, 6], [7, 8]], np.float32)
    tensors = [("b", "FP32", [2, 2], b.tobytes()), ("a", "FP32", [2, 2], a.tobytes())]
    client = world.api()
    reply = await ask(client, "ModelInfer", infer_request(FULL + "pair", *tensors))
    np.testing.assert_array_equal(array_of(reply, "sum"), a + b)
    np.testing.assert_array_equal(array_of(reply, "product"), a * b)
    for wanted in (["product"], ["product", "sum"]):
        request = infer_request("pair", *tensors)
        for name in wanted:
            request.outputs.add(name=name)
        reply = await ask(client, "ModelInfer", request)
        assert [output.name for output in reply.outputs] == wanted
        assert len(reply.raw_output_contents) == len(wanted)
        np.testing.assert_array_equal(array_of(reply, "product"), a * b)


async def test_a_graph_without_a_batch_axis(world: World) -> None:
    """Its tensors are what it says, a scalar too."""
    array = np.array([1, 2, 3], np.float32)
    reply = await ask(world.api(), "ModelInfer", infer_request("one", ("x", "FP32", [3], array.tobytes())))
    assert list(reply.outputs[0].shape) == []
    assert array_of(reply, "y") == 6


# ---- images and texts ------------------------------------------------------------------------------------------------


async def test_a_classifier_answers_as_clarifais_door_does(world: World) -> None:
    """The same ids and values, best first, a row an element."""
    client = world.api()
    other = pictures.png(pictures.rgb_pixels(8, 8)[::-1] // 2)
    request = infer_request("colours", ("image", "BYTES", [2], elements(PICTURE, other)), model_version="1")
    reply = await ask(client, "ModelInfer", request)
    clarifais = await client.predict("colours", PICTURE, other, version="1")
    assert reply.model_version == "1"
    assert [list(output.shape) for output in reply.outputs] == [[2, 3], [2, 3]]
    np.testing.assert_array_equal(
        array_of(reply, "values"), np.float32([[c.value for c in output.data.concepts] for output in clarifais.outputs])
    )
    ids = [concept.id.encode() for output in clarifais.outputs for concept in output.data.concepts]
    assert strings(reply.raw_output_contents[1]) == ids


async def test_typed_bytes_contents(world: World) -> None:
    """A text an element, in a column too."""
    client = world.api()
    for shape in ([2], [2, 1]):
        request = pb.ModelInferRequest(model_name="topic")
        given = request.inputs.add(name="text", datatype="BYTES", shape=shape)
        given.contents.bytes_contents.extend([b"the good model", b"bad"])
        reply = await ask(client, "ModelInfer", request)
        assert list(reply.outputs[0].shape) == [2, 2]


async def test_max_concepts_is_a_parameter(world: World) -> None:
    """The configured number by default."""
    client = world.api(limits=Limits(concepts_default=5))
    request = infer_request("wide", ("image", "BYTES", [1], elements(PICTURE)))
    assert list((await ask(client, "ModelInfer", request)).outputs[0].shape) == [1, 5]
    request.parameters["max_concepts"].int64_param = 200
    assert list((await ask(client, "ModelInfer", request)).outputs[0].shape) == [1, 200]
    for value in (0, -1, 201):
        request.parameters["max_concepts"].int64_param = value
        abort = await refused(client, "ModelInfer", request)
        assert abort.status is RpcStatus.INVALID_ARGUMENT
        assert "max_concepts" in abort.message
    request.parameters["max_concepts"].string_param = "5"
    assert "whole number" in (await refused(client, "ModelInfer", request)).message


async def test_an_embedder(world: World) -> None:
    """One row an image."""
    client = world.api()
    reply = await ask(client, "ModelInfer", infer_request("vector", ("image", "BYTES", [3], elements(*[PICTURE] * 3))))
    vector = (await client.predict("vector", PICTURE)).outputs[0].data.embeddings[0].vector
    np.testing.assert_array_equal(array_of(reply, "embedding"), np.float32([vector] * 3))


async def test_one_bad_input_fails_the_request_and_is_named(world: World) -> None:
    """The protocol has no other way to say it."""
    client = world.api()
    good_one, bad = PICTURE, b"no picture"
    request = infer_request("colours", ("image", "BYTES", [3], elements(good_one, bad, good_one)))
    abort = await refused(client, "ModelInfer", request)
    assert abort.status is RpcStatus.INVALID_ARGUMENT
    assert "Input 1 of 3: " in abort.message
    abort = await refused(client, "ModelInfer", infer_request("colours", ("image", "BYTES", [1], elements(bad))))
    assert not abort.message.startswith("Input")
    black = pictures.png(np.zeros((8, 8, 3), np.uint8))
    abort = await refused(client, "ModelInfer", infer_request("fragile", ("image", "BYTES", [1], elements(black))))
    assert abort.status is RpcStatus.INTERNAL
    assert "finite" in abort.message


# ---- what is wrong with a request ------------------------------------------------------------------------------------

ROW = np.zeros((1, 3), np.float32).tobytes()
HUGE = [2**40, 2**40, 2**40]


@pytest.mark.parametrize(
    ("model", "tensor", "sentence"),
    [
        ("tensor", ("x", "FP32", [1, -3], ROW), "negative"),
        ("tensor", ("x", "FP32", [-1, -3], ROW), "negative"),
        ("tensor", ("x", "FP32", HUGE, ROW), "needs"),
        ("tensor", ("x", "FP32", [0, 2**62, 2**62], b""), "larger than any array"),
        ("tensor", ("x", "FP32", [1] * 33, b"1234"), "33 axes"),
        ("tensor", ("x", "FP32", [1, 3], ROW[:-1]), "needs 12 bytes; it came with 11"),
        ("tensor", ("x", "FP32", [2, 3], ROW), "needs 24 bytes; it came with 12"),
        ("tensor", ("x", "FP32", [0, 3], b""), "rows"),
        ("tensor", ("x", "FP32", [3], ROW), r"shape \[3\]; it is FP32 \[-1, 3\]"),
        ("tensor", ("x", "FP32", [3, 1], ROW), r"shape \[3, 1\]; it is FP32"),
        ("tensor", ("x", "FP64", [1, 3], ROW * 2), r"came as FP64; it is FP32 \[-1, 3\]"),
        ("tensor", ("x", "BF16", [1, 3], ROW[:6]), "BF16.*send FP32"),
        ("tensor", ("x", "float32", [1, 3], ROW), "'float32'; use BOOL"),
        ("tensor", ("x", "", [1, 3], ROW), "datatype ''"),
        ("tensor", ("z", "FP32", [1, 3], ROW), "no input 'z'; it takes x"),
        ("tensor", ("x", "BYTES", [1], elements(b"a")), "came as BYTES; it is FP32"),
        ("same-bool", ("x", "BOOL", [1, 3], b"\x00\x01\x02"), "neither 0 nor 1"),
        ("colours", ("image", "UINT8", [1], b"a"), "came as UINT8; it is BYTES"),
        ("colours", ("image", "BYTES", [1], struct.pack("<I", 10) + b"abc"), "element 0 has 10 bytes; 3 are left"),
        ("colours", ("image", "BYTES", [1], struct.pack("<I", 2**32 - 1)), "4294967295 bytes; 0 are left"),
        ("colours", ("image", "BYTES", [2], elements(b"abc")), "ends before element 1 of 2"),
        ("colours", ("image", "BYTES", [1], b""), "ends before element 0 of 1"),
        ("colours", ("image", "BYTES", [1], elements(b"abc", b"d")), "5 bytes after its last element"),
        ("colours", ("image", "BYTES", [0], b""), "no inputs"),
        ("colours", ("image", "BYTES", [129], elements(*[b""] * 129)), "129 inputs; the limit is 128"),
        ("colours", ("image", "BYTES", [2**60], b""), "the limit is 128"),
        ("colours", ("image", "BYTES", [1, 2], elements(b"", b"")), "an element an input"),
        ("colours", ("image", "BYTES", [], elements(b"")), "an element an input"),
        ("topic", ("text", "BYTES", [1], elements(b"\xff\xfe")), "UTF-8"),
    ],
)
async def test_a_tensor_that_contradicts_itself(world: World, model: str, tensor: Any, sentence: str) -> None:
    """INVALID_ARGUMENT, and a sentence with the numbers."""
    abort = await refused(world.api(), "ModelInfer", infer_request(model, tensor))
    assert abort.status is RpcStatus.INVALID_ARGUMENT
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(abort.message)


def _change(request: pb.ModelInferRequest, how: str) -> None:
    if how == "no inputs":
        request.ClearField("inputs")
        request.ClearField("raw_input_contents")
    elif how == "more raw than inputs":
        request.raw_input_contents.append(b"")
    elif how == "both":
        request.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    elif how == "neither":
        request.ClearField("raw_input_contents")
    elif how == "wrong field":
        request.ClearField("raw_input_contents")
        request.inputs[0].contents.int_contents.extend([1, 2, 3])
    elif how == "too few":
        request.ClearField("raw_input_contents")
        request.inputs[0].contents.fp32_contents.extend([1, 2])
    elif how == "twice":
        request.inputs.add().CopyFrom(request.inputs[0])
        request.raw_input_contents.append(ROW)
    elif how == "unknown output":
        request.outputs.add(name="z")
    elif how == "output twice":
        request.outputs.add(name="y")
        request.outputs.add(name="y")
    elif how == "classification":
        request.outputs.add(name="y").parameters["classification"].int64_param = 3
    elif how == "shared memory":
        request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    elif how == "unknown parameter":
        request.parameters["priority"].uint64_param = 1
    elif how == "max_concepts":
        request.parameters["max_concepts"].int64_param = 1
    elif how == "empty parameter":
        request.parameters["x"].SetInParent()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no inputs", "'x' is missing"),
        ("more raw than inputs", "1 inputs and 2 raw_input_contents"),
        ("both", "beside raw_input_contents"),
        ("neither", "3 elements; 0 came"),
        ("wrong field", "belong into fp32_contents, not int_contents"),
        ("too few", "3 elements; 2 came"),
        ("twice", "came twice"),
        ("unknown output", "no output 'z'; it has y"),
        ("output twice", "asked for twice"),
        ("classification", "'classification'; it takes none"),
        ("shared memory", "'shared_memory_region'; it takes none"),
        ("unknown parameter", "'priority'; this model takes none"),
        ("max_concepts", "'max_concepts'; this model takes none"),
        ("empty parameter", "has no value"),
    ],
)
async def test_a_request_that_contradicts_itself(world: World, how: str, sentence: str) -> None:
    """As with tensors."""
    request = infer_request("tensor", ("x", "FP32", [1, 3], ROW))
    _change(request, how)
    abort = await refused(world.api(), "ModelInfer", request)
    assert abort.status is RpcStatus.INVALID_ARGUMENT
    assert sentence in abort.message


async def test_values_that_their_datatype_cannot_hold(world: World) -> None:
    """INT8 travels in 32 bits; 200 is no INT8."""
    request = pb.ModelInferRequest(model_name="same-int8")
    request.inputs.add(name="x", datatype="INT8", shape=[1, 3]).contents.int_contents.extend([1, 2, 200])
    assert "INT8 cannot hold" in (await refused(world.api(), "ModelInfer", request)).message


async def test_many_typed_values(world: World) -> None:
    """Become an array beside the loop."""
    request = pb.ModelInferRequest(model_name="tensor")
    request.inputs.add(name="x", datatype="FP32", shape=[40_000, 3]).contents.fp32_contents.extend([0.5] * 120_000)
    client = world.api()
    reply = await ask(client, "ModelInfer", request)
    assert (array_of(reply, "y") == 0.5).all()
    assert client.budget.used == 0


async def test_half_floats_travel_only_raw(world: World) -> None:
    """They have no field of their own."""
    request = pb.ModelInferRequest(model_name="same-fp16")
    request.inputs.add(name="x", datatype="FP16", shape=[1, 3]).contents.fp32_contents.extend([1, 2, 3])
    assert "only raw_input_contents" in (await refused(world.api(), "ModelInfer", request)).message


async def test_bytes_that_are_no_message(world: World) -> None:
    """INVALID_ARGUMENT."""
    client = world.api()
    for rpc in ("ModelInfer", "ModelMetadata", "ModelReady", "RepositoryIndex"):
        with pytest.raises(RpcAbort) as caught:
            await client.raw(SERVICE + rpc, b"\xff\xff\xff")
        assert caught.value.status is RpcStatus.INVALID_ARGUMENT


# ---- the steps of every call -----------------------------------------------------------------------------------------


async def test_rates_memory_and_deadlines_hold_here_too(world: World) -> None:
    """RESOURCE_EXHAUSTED for a principal's rate, UNAVAILABLE where trying again helps, DEADLINE_EXCEEDED."""
    request = infer_request("tensor", ("x", "FP32", [1, 3], ROW))
    client = world.api(Principal(name="slow", requests_per_second=0.001, burst=1))
    await ask(client, "ModelInfer", request)
    assert (await refused(client, "ModelInfer", request)).status is RpcStatus.RESOURCE_EXHAUSTED
    small = world.api(memory=64 * 1024)
    large = infer_request("tensor", ("x", "FP32", [10_000, 3], bytes(120_000)))
    assert (await refused(small, "ModelInfer", large)).status is RpcStatus.UNAVAILABLE
    assert small.budget.used == 0
    late = await refused(world.api(), "ModelInfer", request, deadline=soon(-1))
    assert late.status is RpcStatus.DEADLINE_EXCEEDED
    stopping = world.api()
    stopping.api.refuse_new()
    assert (await refused(stopping, "ModelInfer", request)).status is RpcStatus.UNAVAILABLE


async def test_a_model_that_could_not_be_loaded(world: World) -> None:
    """INTERNAL, and where the operator looks; no reason from inside."""
    abort = await refused(world.api(), "ModelInfer", infer_request("broken"))
    assert abort.status is RpcStatus.INTERNAL
    assert "appliance models list" in abort.message


async def test_calls_are_counted(world: World) -> None:
    """Good and bad, under the names of this protocol."""
    client = world.api()
    request = infer_request("tensor", ("x", "FP32", [1, 3], ROW))
    await ask(client, "ModelInfer", request)
    request.inputs[0].shape[1] = 4
    await refused(client, "ModelInfer", request)
    labels = {"model": "tensor", "version": "1", "method": "kserve.ModelInfer"}
    good_code, bad_code = str(status_code_pb2.SUCCESS), str(status_code_pb2.INPUT_INVALID_ARGUMENT)
    assert client.count("requests_total", **labels, code=good_code) == 1
    assert client.count("requests_total", **{**labels, "model": "", "version": ""}, code=bad_code) == 1
    assert client.count("inputs_total", model="tensor", version="1", code=good_code) == 1


async def test_an_unforeseen_error_has_a_stock_sentence(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing from inside reaches the caller, on the quick way (one input) and on the ordinary one (two)."""

    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(oip, "answer_of", fail)
    for request in (
        infer_request("tensor", ("x", "FP32", [1, 3], ROW)),
        infer_request("topic", ("text", "BYTES", [2], elements(b"good", b"bad"))),
    ):
        abort = await refused(world.api(), "ModelInfer", request)
        assert abort.status is RpcStatus.INTERNAL
        assert "secret" not in abort.message
        assert b"secret" not in abort.details


async def test_a_refusal_carries_clarifais_status(world: World) -> None:
    """So that one can quote the request id."""
    abort = await refused(world.api(), "ModelInfer", infer_request("nothing"))
    assert isinstance(abort, status.Refusal)
    assert abort.req_id
    assert abort.req_id.encode() in abort.details


# ---- streams ---------------------------------------------------------------------------------------------------------


async def test_a_stream_answers_each_message_and_tells_what_is_wrong_with_one(world: World) -> None:
    """In its place, and goes on."""
    client = world.api()
    good_one = infer_request("tensor", ("x", "FP32", [1, 3], ROW), id="a").SerializeToString()
    bad = infer_request("tensor", ("x", "FP32", [1, 4], ROW)).SerializeToString()
    bodies = await client.stream(SERVICE + "ModelStreamInfer", [good_one, bad, good_one])
    replies = [pb.ModelStreamInferResponse.FromString(body) for body in bodies]
    assert [reply.infer_response.id for reply in replies] == ["a", "", "a"]
    np.testing.assert_array_equal(array_of(replies[2].infer_response, "y"), np.zeros((1, 3), np.float32))
    assert "needs 16 bytes" in replies[1].error_message
    assert not replies[0].error_message


async def test_a_stranger_has_no_stream(world: World) -> None:
    """Who is calling is known before the first message, and again at each."""
    client = world.api()
    with pytest.raises(RpcAbort) as caught:
        await client.stream(SERVICE + "ModelStreamInfer", [b""], key=None)
    assert caught.value.status is RpcStatus.UNAUTHENTICATED
