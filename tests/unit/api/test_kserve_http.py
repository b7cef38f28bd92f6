"""KServe V2 over REST: the same answers as over gRPC, in JSON and in Triton's binary form."""

import base64
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from onnx import TensorProto
from support import graphs, pictures
from support.api_world import PICTURE, QUICK, Client, World
from support.http_client import http_client

from appliance.api import oip
from appliance.api.kserve_http import kserve_routes
from appliance.core.config import Limits, Principal

pytestmark = pytest.mark.asyncio(loop_scope="module")

FULL = f"{graphs.USER}/{graphs.APP}/"
KINDS = {
    "BOOL": (TensorProto.BOOL, [True, False, True]),
    "UINT8": (TensorProto.UINT8, [0, 1, 255]),
    "INT8": (TensorProto.INT8, [-128, 0, 127]),
    "INT64": (TensorProto.INT64, [-(2**63), 0, 2**63 - 1]),
    "UINT64": (TensorProto.UINT64, [0, 1, 2**64 - 1]),
    "FP16": (TensorProto.FLOAT16, [-1.5, 0, 65504]),
    "FP32": (TensorProto.FLOAT, [-1.5, 0, 2.5]),
    "FP64": (TensorProto.DOUBLE, [-1.5, 0, 1e300]),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """The usual models, and some that give back what they get."""
    made = World(tmp_path_factory.mktemp("world"))
    for name, (kind, _) in KINDS.items():
        graphs.write_raw(made.root / f"same-{name.lower()}", graphs.identity_model(("batch", 3), kind), **QUICK)
    graphs.write_raw(made.root / "cube", graphs.identity_model(("batch", 2, 2)), **QUICK)
    graphs.write_raw(made.root / "divide", graphs.nan_model(), **QUICK)
    async with made.opened():
        yield made


def browser(client: Client, key: str | None = "") -> httpx.AsyncClient:
    """A client of the routes; with the first key unless another, or None, is given."""
    return http_client(kserve_routes(client.api.kserve, client.api), client.keys[0] if key == "" else key)


async def post(client: Client, model: str, content: Any, **more: Any) -> httpx.Response:
    """An inference request, JSON or bytes."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    async with browser(client) as made:
        return await made.post(f"/kserve/v2/models/{model}/infer", content=body, **more)


def asked(*inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A request."""
    return {"inputs": list(inputs), **more}


def given(name: str, datatype: str, shape: list[int], data: Any, **parameters: Any) -> dict[str, Any]:
    """An input; without data where it comes as binary."""
    made = {"name": name, "datatype": datatype, "shape": shape}
    if data is not None:
        made["data"] = data
    return {**made, "parameters": parameters} if parameters else made


ROW = given("x", "FP32", [1, 3], [1, 2, 3])


# ---- server and models -----------------------------------------------------------------------------------------------


async def test_health_needs_no_credentials(world: World) -> None:
    """Live at once, ready when it is."""
    client = world.api()
    async with browser(client, None) as nobody:
        assert (await nobody.get("/kserve/v2/health/live")).json() == {"live": True}
        answer = await nobody.get("/kserve/v2/health/ready")
        assert (answer.status_code, answer.json()) == (503, {"ready": False})
        client.api.health.publish(True, {})
        assert (await nobody.get("/kserve/v2/health/ready")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/kserve/v2"),
        ("GET", "/kserve/v2/models/colours"),
        ("GET", "/kserve/v2/models/colours/ready"),
        ("POST", "/kserve/v2/models/colours/infer"),
        ("POST", "/kserve/v2/repository/index"),
    ],
)
async def test_all_else_does(world: World, method: str, path: str) -> None:
    """401, in this protocol's shape, and how to authenticate."""
    client = world.api()
    for key in (None, "0" * 64):
        async with browser(client, key) as stranger:
            answer = await stranger.request(method, path, content=b"{}")
        assert answer.status_code == 401
        assert set(answer.json()) == {"error"}
        assert "www-authenticate" in answer.headers


async def test_server_metadata(world: World) -> None:
    """With and without a slash."""
    for path in ("/kserve/v2", "/kserve/v2/"):
        async with browser(world.api()) as made:
            answer = await made.get(path)
        assert answer.json()["name"] == "inference-appliance"
        assert "binary_tensor_data" in answer.json()["extensions"]


@pytest.mark.parametrize("name", ["colours", FULL + "colours", (FULL + "colours").replace("/", "%2F")])
@pytest.mark.parametrize("version", ["", "1"])
async def test_model_metadata_by_every_form_of_the_name(world: World, name: str, version: str) -> None:
    """One segment, three, or three percent-encoded."""
    async with browser(world.api()) as made:
        answer = await made.get(f"/kserve/v2/models/{name}" + (f"/versions/{version}" if version else ""))
    content = answer.json()
    assert content["name"] == name.replace("%2F", "/")
    assert content["versions"] == ["2", "1"]
    assert content["platform"] == "onnxruntime_onnx"
    assert content["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert content["outputs"][0] == {"name": "values", "datatype": "FP32", "shape": [-1, -1]}


async def test_model_readiness(world: World) -> None:
    """200, 503 and 404."""
    client = world.api()
    client.api.health.publish(True, {})
    async with browser(client) as made:
        for path, code in (
            ("colours/ready", 200),
            ("colours/versions/1/ready", 200),
            (FULL + "colours/versions/2/ready", 200),
            ("broken/ready", 503),
            ("nothing/ready", 404),
            ("colours/versions/9/ready", 404),
        ):
            answer = await made.get(f"/kserve/v2/models/{path}")
            assert answer.status_code == code, path
            assert answer.json().get("ready") == {200: True, 503: False, 404: None}[code]


async def test_the_index_is_a_list(world: World) -> None:
    """Name, version and state; only ready ones when asked for."""
    async with browser(world.api()) as made:
        everything = (await made.post("/kserve/v2/repository/index")).json()
        ready = (await made.post("/kserve/v2/repository/index", json={"ready": True})).json()
    assert {"name": FULL + "broken", "version": "1", "state": "UNAVAILABLE", "reason": ""} in everything
    assert {entry["state"] for entry in ready} == {"READY"}


@pytest.mark.parametrize("path", ["", "a/b", "a/b/c/d/infer", "versions/1/x/y", "colours/config", "a/b/c/versions"])
async def test_a_path_that_names_no_model(world: World, path: str) -> None:
    """404, with the paths that there are."""
    async with browser(world.api()) as made:
        for method in ("GET", "POST"):
            answer = await made.request(method, f"/kserve/v2/models/{path}")
            assert answer.status_code == 404
            assert "user/app/model" in answer.json()["error"]


async def test_a_name_may_look_like_a_verb(world: World) -> None:
    """Three segments are a name, whatever they say."""
    async with browser(world.api()) as made:
        assert "tester/tests/infer" in (await made.get("/kserve/v2/models/tester/tests/infer")).json()["error"]
        answer = await made.get("/kserve/v2/models/u/versions/m/versions/1")
        assert "u/versions/m" in answer.json()["error"]


async def test_the_wrong_method_for_a_path(world: World) -> None:
    """405."""
    async with browser(world.api()) as made:
        for method, path in (("GET", "colours/infer"), ("POST", "colours"), ("POST", "colours/ready")):
            answer = await made.request(method, f"/kserve/v2/models/{path}")
            assert answer.status_code == 405
            assert "POST" in answer.json()["error"]


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", KINDS)
async def test_datatypes_as_json(world: World, datatype: str) -> None:
    """Flat and nested; what goes in comes out, 64-bit numbers to the last digit."""
    values = KINDS[datatype][1]
    for data in (values * 2, [values, values]):
        content = asked(given("x", datatype, [2, 3], data), id="seven")
        answer = (await post(world.api(), f"same-{datatype.lower()}", content)).json()
        assert answer == {
            "id": "seven",
            "model_name": f"same-{datatype.lower()}",
            "model_version": "1",
            "outputs": [{"name": "y", "datatype": datatype, "shape": [2, 3], "data": values * 2}],
        }


async def test_deeper_nesting(world: World) -> None:
    """As the shape says."""
    content = asked(given("x", "FP32", [2, 2, 2], [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]))
    answer = (await post(world.api(), "cube", content)).json()
    assert answer["outputs"][0]["data"] == [1, 2, 3, 4, 5, 6, 7, 8]


async def test_outputs_by_name(world: World) -> None:
    """In the order they were asked for."""
    inputs = [given("a", "FP32", [1, 2], [1, 2]), given("b", "FP32", [1, 2], [3, 4])]
    answer = (await post(world.api(), FULL + "pair", asked(*inputs, outputs=[{"name": "product"}]))).json()
    assert answer["outputs"] == [{"name": "product", "datatype": "FP32", "shape": [1, 2], "data": [3, 8]}]


async def test_pictures_are_base64_and_texts_are_texts(world: World) -> None:
    """JSON has no bytes; the answers are those of Clarifai's door."""
    client = world.api()
    content = asked(given("image", "BYTES", [1], [base64.b64encode(PICTURE).decode()]), parameters={"max_concepts": 2})
    answer = (await post(client, "colours/versions/1", content)).json()
    concepts = (await client.predict("colours", PICTURE, version="1")).outputs[0].data.concepts
    assert answer["outputs"][1]["data"] == [concept.id for concept in concepts[:2]]
    np.testing.assert_array_equal(np.float32(answer["outputs"][0]["data"]), np.float32([c.value for c in concepts[:2]]))
    answer = (await post(client, "topic", asked(given("text", "BYTES", [2], ["the good model", "bad"])))).json()
    assert answer["outputs"][0]["shape"] == [2, 2]


async def test_what_json_cannot_say_is_had_in_binary_form(world: World) -> None:
    """NaN."""
    content = asked(given("x", "FP32", [1, 3], [0, 1, 2]))
    answer = await post(world.api(), "divide", content)
    assert answer.status_code == 400
    assert "binary_data" in answer.json()["error"]
    answer = await post(world.api(), "divide", asked(*content["inputs"], parameters={"binary_data_output": True}))
    assert answer.status_code == 200
    assert np.isnan(np.frombuffer(answer.content[-12:], np.float32)[0])


# ---- binary data -----------------------------------------------------------------------------------------------------


def binary(header: dict[str, Any], *pieces: bytes) -> tuple[bytes, dict[str, str]]:
    """A body and its headers."""
    text = json.dumps(header).encode()
    return b"".join((text, *pieces)), {"inference-header-content-length": str(len(text))}


def read(answer: httpx.Response) -> dict[str, Any]:
    """Output name → array or list of bytes, of a binary reply."""
    size = int(answer.headers["inference-header-content-length"])
    content, rest = json.loads(answer.content[:size]), answer.content[size:]
    found: dict[str, Any] = {}
    for output in content["outputs"]:
        if "parameters" not in output:
            found[output["name"]] = output["data"]
            continue
        count = output["parameters"]["binary_data_size"]
        piece, rest = rest[:count], rest[count:]
        if output["datatype"] == "BYTES":
            strings = []
            while piece:
                (length,) = struct.unpack_from("<I", piece)
                strings.append(piece[4 : 4 + length])
                piece = piece[4 + length :]
            found[output["name"]] = strings
        else:
            found[output["name"]] = np.frombuffer(piece, oip.DTYPES[output["datatype"]]).reshape(output["shape"])
    assert not rest
    return found


@pytest.mark.parametrize("padding", range(8))
async def test_arrays_behind_json_of_any_length(world: World, padding: int) -> None:
    """However the bytes come to lie, two tensors behind each other."""
    a, b = np.array([[1, 2]], np.float32), np.array([[3, 4]], np.float32)
    inputs = [
        given("a", "FP32", [1, 2], None, binary_data_size=8),
        given("b", "FP32", [1, 2], None, binary_data_size=8),
    ]
    header = asked(*inputs, id="x" * padding, parameters={"binary_data_output": True})
    body, headers = binary(header, a.tobytes(), b.tobytes())
    answer = await post(world.api(), "pair", body, headers=headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    found = read(answer)
    np.testing.assert_array_equal(found["sum"], a + b)
    np.testing.assert_array_equal(found["product"], a * b)


async def test_each_output_in_the_form_it_was_asked_for(world: World) -> None:
    """One binary, one JSON; and one input of each."""
    inputs = [given("a", "FP32", [1, 2], [1, 2]), given("b", "FP32", [1, 2], None, binary_data_size=8)]
    outputs = [{"name": "sum", "parameters": {"binary_data": True}}, {"name": "product"}]
    body, headers = binary(asked(*inputs, outputs=outputs), np.array([3, 4], np.float32).tobytes())
    found = read(await post(world.api(), "pair", body, headers=headers))
    np.testing.assert_array_equal(found["sum"], [[4, 6]])
    assert found["product"] == [3, 8]


async def test_files_as_they_are(world: World) -> None:
    """Length and bytes, as over gRPC."""
    element = struct.pack("<I", len(PICTURE)) + PICTURE
    header = asked(
        given("image", "BYTES", [1], None, binary_data_size=len(element)), parameters={"binary_data_output": True}
    )
    body, headers = binary(header, element)
    found = read(await post(world.api(), "colours", body, headers=headers))
    assert found["values"].shape == (1, 3)
    assert {name.decode() for name in found["concepts"]} == {"c-dark", "c-red", "c-bright"}


# ---- what is wrong with a request ------------------------------------------------------------------------------------

DEEP = b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "must be a JSON object; it is a list"),
        (b'{"inputs": 3}', "'inputs' is not a list"),
        (b'{"inputs": [3]}', "'inputs' is not a list"),
        (b"{}", "'x' is missing"),
        (DEEP, "nested too deeply"),
        (json.dumps(asked(given("x", "FP32", [1, 3], [1, 2, float("nan")]))).encode(), "the number NaN"),
        (json.dumps(asked(given("x", "FP32", [1, 3], [1, 2, float("inf")]))).encode(), "the number Infinity"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[1e999,1,1]}]}', "cannot hold"),
        (b'{"id": ' + b"9" * 5000 + b"}", "more than 400 digits"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[' + b"9" * 400 + b",1,1]}]}", "cannot hold"),
        (asked(given("x", "FP32", [1, 3], [1, 2])), "3 elements; 2 came"),
        (asked(given("x", "FP32", [1, 3], [[1, 2], [3]])), "nested otherwise"),
        (asked(given("x", "FP32", [1, 3], [[1], [2], [3]])), "nested otherwise"),
        (asked(given("x", "FP32", [1, 3], [[[1, 2, 3]]])), "nested otherwise"),
        (asked(given("x", "FP32", [1, 3], [1, [2], 3])), "something else in it"),
        (asked(given("x", "FP32", [1, 3], [1, "2", 3])), "something else in it"),
        (asked(given("x", "FP32", [1, 3], [1, None, 3])), "something else in it"),
        (asked(given("x", "FP32", [1, 3], [1, True, 3])), "something else in it"),
        (asked(given("x", "FP32", [1, 3], "abc")), "no list"),
        (asked(given("x", "FP32", [1, 3], {})), "no list"),
        (asked(given("x", "FP32", [1, -3], [])), "negative"),
        (asked(given("x", "FP32", [2**62, 2**62], [1])), "elements; 1 came"),
        (asked(given("x", "FP32", [10**300, 10**300], [1])), "longer than any array"),
        (asked(given("x", "FP32", [0, 2**62], [])), "larger than any array"),
        (asked(given("x", "FP32", [1, True], [1])), "no shape"),
        (asked(given("x", "FP32", [1, 3.0], [1, 2, 3])), "no shape"),
        (asked({"name": "x", "datatype": "FP32", "data": [1]}), "no shape"),
        (asked({"name": "x", "datatype": "FP32", "shape": [1, 3]}), "has no data"),
        (asked({"name": "x", "shape": [1, 3], "data": [1]}), "datatype ''"),
        (asked(given("x", "BF16", [1, 3], [1, 2, 3])), "send FP32"),
        (asked(given("x", "FP32", [1, 3], [1, 2, 3], color="red")), "'color'"),
        (asked(given("x", "FP32", [1, 3], None, binary_data_size=12)), "0 bytes are left"),
        (asked(given("x", "FP32", [1, 3], None, binary_data_size=-1)), "0 bytes are left"),
        (asked(given("x", "FP32", [1, 3], None, binary_data_size="12")), "0 bytes are left"),
        (asked(given("x", "FP32", [1, 3], [1, 2, 3], binary_data_size=0)), "send one"),
        (asked(ROW, parameters=[]), "'parameters' is not"),
        (asked(ROW, parameters={"a": []}), "no text, number or boolean"),
        (asked(ROW, parameters={"timeout": 5}), "'timeout'; this model takes none"),
        (asked(ROW, outputs=[{"name": "y", "parameters": {"classification": 2}}]), "'classification'; it takes"),
        (asked(ROW, outputs=[{"name": "z"}]), "no output 'z'"),
        (asked(ROW, id=7), "'id' is not a string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_request_is_told_what_is_wrong(world: World, body: Any, sentence: str) -> None:
    """400, and nothing of it stays in the budget."""
    client = world.api()
    answer = await post(client, "tensor", body)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]
    assert client.budget.used == 0


@pytest.mark.parametrize("value", [0, 201, 10**300, True, "5", 2.0])
async def test_max_concepts_out_of_its_range(world: World, value: Any) -> None:
    """400, in a sentence of a sane length."""
    content = asked(given("image", "BYTES", [1], [""]), parameters={"max_concepts": value})
    answer = await post(world.api(), "colours", content)
    assert answer.status_code == 400
    assert "from 1 to 200" in answer.json()["error"]
    assert len(answer.content) < 200


@pytest.mark.parametrize(
    ("datatype", "values"),
    [("INT8", [128, 0, 0]), ("UINT8", [-1, 0, 0]), ("INT64", [2**63, 0, 0]), ("INT8", [1.0, 0, 0])],
)
async def test_numbers_that_their_datatype_cannot_hold(world: World, datatype: str, values: list[Any]) -> None:
    """400."""
    answer = await post(world.api(), f"same-{datatype.lower()}", asked(given("x", datatype, [1, 3], values)))
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("model", "element", "sentence"),
    [
        ("colours", "no base64!", "not base64"),
        ("colours", base64.b64encode(b"no picture").decode(), "JPEG"),
        ("colours", 7, "must be strings"),
        ("topic", "\ud800", "half a character"),
    ],
)
async def test_elements_that_cannot_be_read(world: World, model: str, element: Any, sentence: str) -> None:
    """400."""
    name = "image" if model == "colours" else "text"
    answer = await post(world.api(), model, asked(given(name, "BYTES", [1], [element])))
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "abc", "99999", "1e3", "", "9" * 40])
async def test_a_length_of_the_header_that_is_none(world: World, length: str) -> None:
    """Says what it must be."""
    answer = await post(world.api(), "tensor", asked(ROW), headers={"inference-header-content-length": length})
    assert answer.status_code == 400
    assert "Inference-Header-Content-Length" in answer.json()["error"]


async def test_binary_data_that_belongs_to_nothing(world: World) -> None:
    """Is not passed over."""
    body, headers = binary(asked(ROW), b"1234")
    answer = await post(world.api(), "tensor", body, headers=headers)
    assert "4 bytes of binary data that belong to no input" in answer.json()["error"]


async def test_compressed_bodies_are_not_read(world: World) -> None:
    """415, and how to send it."""
    answer = await post(world.api(), "tensor", asked(ROW), headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "gzip" in answer.json()["error"]


# ---- the steps of every call -----------------------------------------------------------------------------------------


async def test_statuses_are_those_of_the_table(world: World) -> None:
    """403, 404, 429 with when to come again, 503, 413."""
    assert (await post(world.api(Principal(name="narrow", models=("pair",))), "tensor", asked(ROW))).status_code == 403
    assert (await post(world.api(), "nothing", asked(ROW))).status_code == 404
    client = world.api(Principal(name="slow", requests_per_second=0.001, burst=1))
    assert (await post(client, "tensor", asked(ROW))).status_code == 200
    answer = await post(client, "tensor", asked(ROW))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    answer = await post(world.api(memory=16 * 1024), "tensor", asked(ROW) | {"pad": "x" * 9000})
    assert answer.status_code == 503
    client = world.api(limits=Limits(request_size=1000))
    assert (await post(client, "tensor", asked(ROW) | {"pad": "x" * 9000})).status_code == 413
    answer = await post(client, "tensor", b"{}" + b"x" * 1001, headers={"inference-header-content-length": "2"})
    assert (answer.status_code, "limits.request_size, 1000 bytes" in answer.json()["error"]) == (413, True)


async def test_large_json_both_ways(world: World) -> None:
    """Read and written beside the loop, with the same result."""
    values = [0.5] * 30_000
    client = world.api()
    answer = await post(client, "tensor", asked(given("x", "FP32", [10_000, 3], [values[:3]] * 10_000)))
    assert answer.json()["outputs"][0]["data"] == values
    assert client.budget.used == 0


async def test_json_is_paid_for_before_it_is_read(world: World) -> None:
    """Empty lists weigh twenty times their digits."""
    client = world.api(memory=8 * 2**20)
    body = b'{"inputs": [' + b"[]," * 200_000 + b"[]]}"
    answer = await post(client, "tensor", body)
    assert answer.status_code == 503
    assert "memory_in_flight" in answer.json()["error"]
    assert client.budget.used == 0


async def test_a_failing_input_is_named(world: World) -> None:
    """500 for the model's fault."""
    black = base64.b64encode(pictures.png(np.zeros((8, 8, 3), np.uint8))).decode()
    good = base64.b64encode(PICTURE).decode()
    answer = await post(world.api(), "fragile", asked(given("image", "BYTES", [2], [good, black])))
    assert answer.status_code == 500
    assert "Input 1 of 2" in answer.json()["error"]
