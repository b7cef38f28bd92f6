"""Methods that a bundle declares, called by the stock Python SDK and its CLI over TLS from a custom root."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from support import graphs, pictures
from support.appliance import PATIENCE_S, ROOT, Appliance, Pki
from support.client_matrix import Matrix

from appliance.media import sound

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
SDK = ROOT / ".clients" / "sdk-12"
CLIENT = "Python SDK 12.5.0"
F, I64, U8, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL
X = ("batch", "n")


def method(name: str, arguments: list[Any], returns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments, "returns": returns, **more}


def echo(name: str, file: str, argument: dict[str, Any], returns: dict[str, Any]) -> dict[str, Any]:
    return method(f"echo_{name}", [{"name": "x", **argument}], returns, file=file)


def detector() -> Any:
    """`image` (batch, 3, 8, 8) → `boxes` (batch, 2, 4) in pixels, `scores` (batch, 2): 0.9 and 0.5 for any picture."""
    return graphs.make(
        [
            helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
            helper.make_node("Mul", ["mean", "zero"], ["none"]),
            helper.make_node("Reshape", ["none", "column"], ["tall"]),
            helper.make_node("Add", ["tall", "certain"], ["scores"]),
            helper.make_node("Reshape", ["none", "cube"], ["deep"]),
            helper.make_node("Add", ["deep", "where"], ["boxes"]),
        ],
        {"image": (F, ["batch", 3, 8, 8])},
        {"boxes": (F, ["batch", 2, 4]), "scores": (F, ["batch", 2])},
        {
            "zero": np.zeros((), np.float32),
            "column": np.array([-1, 1], np.int64),
            "cube": np.array([-1, 1, 1], np.int64),
            "certain": np.array([[0.5, 0.9]], np.float32),
            "where": np.array([[[0, 0, 4, 8], [2, 2, 6, 6]]], np.float32),
        },
    )


def scale() -> Any:
    """`x` (batch, n), `factor` () → `y` = x · factor."""
    return graphs.make(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        {"x": (F, X), "factor": (F, [])},
        {"y": (F, X)},
    )


FILES = {
    "floats.onnx": graphs.identity_model(X),
    "row.onnx": graphs.identity_model(("batch", 3)),
    "box.onnx": graphs.identity_model(("batch", 4)),
    "float.onnx": graphs.identity_model(("batch",)),
    "int.onnx": graphs.identity_model(("batch",), I64),
    "places.onnx": graphs.identity_model(X, I64),
    "ints.onnx": graphs.identity_model(("batch", "n", "m"), I64),
    "bool.onnx": graphs.identity_model(("batch",), BOOL),
    "bytes.onnx": graphs.identity_model(X, U8),
    "picture.onnx": graphs.identity_model(("batch", 8, 8, 3), U8),
    "pair.onnx": graphs.two_in_two_out_model(),
    "scale.onnx": scale(),
}
PICTURE = {"image": {"size": [8, 8], "layout": "nhwc"}}
CHOICES = {"choices": ["no", "yes"]}
LIST = {"name": "x", "type": "list[float]"}
FACTOR = {"name": "factor", "type": "float", "default": 2.0}
ITEMS = [{"name": name, "type": "list[float]"} for name in "ab"]
RESULTS = [{"name": name, "type": "list[float]", "output": name} for name in ("sum", "product")]
METHODS = [
    method(
        "analyze",
        [
            {"name": "image", "type": "image", "image": {"size": [8, 8]}},
            {"name": "threshold", "type": "float", "default": 0.25, "range": [0, 1]},
        ],
        {"type": "list[region]", "output": "boxes", "scores": "scores", "box_size": [8, 8], "min_score": "threshold"},
        description="Objects in the picture.",
    ),
    echo("int", "int.onnx", {"type": "int"}, {"type": "int"}),
    echo("float", "float.onnx", {"type": "float"}, {"type": "float"}),
    echo("bool", "bool.onnx", {"type": "bool"}, {"type": "bool"}),
    echo("str", "int.onnx", {"type": "str", **CHOICES}, {"type": "str", **CHOICES}),
    echo("text", "int.onnx", {"type": "text", **CHOICES}, {"type": "text", **CHOICES}),
    echo("bytes", "bytes.onnx", {"type": "bytes"}, {"type": "bytes"}),
    echo("ndarray", "row.onnx", {"type": "ndarray"}, {"type": "ndarray"}),
    echo("json", "row.onnx", {"type": "json"}, {"type": "json", "output": "y"}),
    echo("image", "picture.onnx", {"type": "image", **PICTURE}, {"type": "image", "layout": "nhwc"}),
    echo("frame", "picture.onnx", {"type": "frame", **PICTURE}, {"type": "frame", "layout": "nhwc"}),
    echo("audio", "floats.onnx", {"type": "audio", "sample_rate": 8000}, {"type": "audio", "sample_rate": 8000}),
    echo("video", "bytes.onnx", {"type": "video"}, {"type": "video"}),
    echo("concept", "row.onnx", {"type": "concept"}, {"type": "concept"}),
    echo("concepts", "row.onnx", {"type": "list[concept]"}, {"type": "list[concept]"}),
    echo("region", "box.onnx", {"type": "region"}, {"type": "list[float]"}),
    echo("list", "ints.onnx", {"type": "list[list[int]]"}, {"type": "list[list[int]]"}),
    method(
        "both_tuple",
        [{"name": "pair", "type": "tuple", "items": ITEMS}],
        {"type": "tuple", "items": RESULTS},
        file="pair.onnx",
    ),
    method(
        "both_named",
        [{"name": "pair", "type": "named_fields", "items": ITEMS}],
        {"type": "named_fields", "items": RESULTS},
        file="pair.onnx",
    ),
    method("each", [LIST, FACTOR], {"type": "float", "iterator": True}, file="scale.onnx"),
    method(
        "spell",
        [{"name": "x", "type": "list[str]", **CHOICES}],
        {"type": "str", "iterator": True, **CHOICES},
        file="places.onnx",
    ),
    method("generate", [LIST, FACTOR], {"type": "float", "iterator": True}, file="scale.onnx"),
    method(
        "converse", [{**LIST, "iterator": True}, FACTOR], {"type": "list[float]", "iterator": True}, file="scale.onnx"
    ),
    method(
        "stream", [{**LIST, "iterator": True}, FACTOR], {"type": "list[float]", "iterator": True}, file="scale.onnx"
    ),
    method("predict", [{"name": "x", "type": "str", **CHOICES}], {"type": "str", **CHOICES}, file="int.onnx"),
]


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """A daemon with a bundle of many methods."""
    made = Appliance(tmp_path_factory.mktemp("methods"), pki, transport=transport)
    section = {"methods": METHODS, "batching": {"max_rows": 2}}
    config = graphs.bundle_config(made.models / "methods", "any-to-any", section, ("cat", "dog", "bird"))
    files = {name: model.SerializeToString() for name, model in FILES.items()}
    graphs.write_bundle(made.models / "methods", detector(), config, files=files)
    made.key = made.new_key()
    picture = made.home / "picture.png"
    picture.write_bytes(pictures.png(np.full((8, 8, 3), 128, np.uint8)))
    picture.with_suffix(".wav").write_bytes(sound.encode_wav(np.zeros(80, np.float32), 8000))
    with made:
        yield made


def variables(methods: Appliance, pki: Pki) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CLARIFAI_") and k != "PYTHONPATH"}
    return kept | {"CLARIFAI_PAT": methods.key, "HOME": str(methods.home)}


@pytest.fixture(scope="module")
def called(methods: Appliance, pki: Pki) -> dict[str, Any]:
    """What the stock SDK got."""
    done = subprocess.run(
        [
            SDK / "bin" / "python",
            HERE / "script_sdk_declared.py",
            f"https://localhost:{methods.port()}",
            pki.ca,
            methods.home / "picture.png",
        ],
        capture_output=True,
        text=True,
        env=variables(methods, pki),
        timeout=5 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


DOG, CAT = ["cat", 0.9, [0.25, 0.25, 0.75, 0.75]], ["cat", 0.5, [0.0, 0.0, 0.5, 1.0]]


def test_analyze_is_called_as_the_platform_documents_it(called: dict[str, Any], matrix: Matrix) -> None:
    """Keywords, position, defaults left out, a list of dicts."""
    matrix.row(
        CLIENT, "`model.analyze(image=…, threshold=…)`: any method that a bundle declares, by keyword or position"
    )
    matrix.row(CLIENT, "`model.analyze([{…}, {…}])`: a batch of calls of one method")
    assert called["analyze"] == called["analyze_default"] == [DOG, CAT]
    assert called["analyze_positional"] == [DOG]
    assert called["batch"] == [[DOG, CAT], [DOG]]


def test_methods_are_discovered(called: dict[str, Any], matrix: Matrix) -> None:
    matrix.row(
        CLIENT, "`model.available_methods()`, `method_signature(…)`, `generate_client_script()`: several methods"
    )
    assert called["available"] == sorted(m["name"] for m in METHODS)
    assert (
        called["signature"]
        == "def analyze(image: data_types.Image, threshold: float = 0.25) -> List[data_types.Region]:"
    )
    assert all(f"model.{m['name']}(" in called["script"] for m in METHODS)


def test_every_type_goes_there_and_back(called: dict[str, Any], matrix: Matrix) -> None:
    matrix.row(CLIENT, "every type of the method protocol as argument and as return value")
    expected = {
        "int": 7,
        "zero": 0,
        "float": 0.5,
        "bool": [True, False],
        "str": "yes",
        "text": "yes",
        "bytes": [1, 2],
        "ndarray": [1.0, 2.0, 3.0],
        "json": [1.0, 2.5, 3.0],
        "image": [8, 8, 3],
        "frame": [8, 8, 3],
        "audio": True,
        "video": [5, 6],
        "concept": "dog",
        "concepts": ["dog"],
        "region": [0.125, 0.25, 0.5, 0.75],
        "list": [[1, 2], [3, 4]],
        "tuple": [[4.0, 6.0], [3.0, 8.0]],
        "named": {"sum": [4.0, 6.0], "product": [3.0, 8.0]},
    }
    assert {name: called[name] for name in expected} == expected


def test_streams_flow_one_way_and_both(called: dict[str, Any], matrix: Matrix) -> None:
    matrix.row(CLIENT, "`for item in model.each(…)`, `model.generate(…)`: server-streaming methods of any name")
    matrix.row(CLIENT, "`model.converse(iter(…), …)`, `model.stream(…)`: bidirectional methods of any name")
    assert called["each"] == [2.0, 4.0, 6.0]
    assert called["generate"] == [2.0, 4.0]
    assert called["converse"] == [[3.0], [6.0], [9.0]]
    assert called["stream"] == [[2.0], [4.0]]


def test_errors_say_what_to_do(called: dict[str, Any], matrix: Matrix) -> None:
    """Some are the SDK's own, before it calls."""
    matrix.row(CLIENT, "unknown, missing and wrong arguments, unknown methods: an exception with the reason")
    assert "treshold" in called["unknown_argument"]
    assert "Missing required argument: image" in called["missing_argument"]
    assert "threshold is 1.5; it must be from 0 to 1" in called["out_of_range"]
    assert "must be one of no, yes" in called["bad_choice"]
    assert "is empty" in called["bad_item"]
    assert "nothing" in called["unknown_method"]
    assert not any(called[name].startswith("no error") for name in ("unknown_argument", "missing_argument", "bad_item"))


def test_the_message_comes_along_when_asked_for(called: dict[str, Any], matrix: Matrix) -> None:
    matrix.row(CLIENT, "`model.method(…, with_proto=True)`: the value and the reply message")
    assert called["with_proto"] == [7, 10000, "return"]


def test_the_old_form_reaches_a_declared_predict(called: dict[str, Any], matrix: Matrix) -> None:
    matrix.row(CLIENT, "`predict_by_bytes(…)` of a model whose `predict` a bundle declares")
    assert called["old_form"] == "yes"


def test_all_of_it_works_where_a_loop_runs(called: dict[str, Any], matrix: Matrix) -> None:
    matrix.row(CLIENT, "`await model.async_client.method(…)`, `async for` over its streaming methods")
    matrix.row(CLIENT, "`await model.async_predict(…)`, `async for … in model.async_generate(…)`: declared methods")
    matrix.row(
        CLIENT,
        "`await model.method(…)` of any other name than predict, generate and stream",
        why="SDK 12.5.0 gives it to a client without an async stub; write `await model.async_client.method(…)`",
    )
    assert called["async_plain"] == [True, True]
    assert called["async_unary"] == [DOG, CAT]
    assert called["async_many"] == [0, 1, 2, 3, 4]
    assert called["async_each"] == called["async_generate"] == [2.0, 4.0]
    assert called["async_predict"] == "yes"


@pytest.mark.parametrize(
    ("form", "arguments", "expected"),
    [
        (
            "`--method analyze --file …`: regions",
            ["--method", "analyze", "--file", "PICTURE"],
            "name='cat', value=0.8999",
        ),
        ("`--method … -i name=value`", ["--method", "echo_int", "-i", "x=7", "-o", "json"], '{"result": "7"}'),
        (
            "`--method … --inputs '{…}'`: a streaming method",
            ["--method", "spell", "--inputs", '{"x": ["yes", "no"]}', "-o", "json"],
            '{"result": "yesno"}',
        ),
        ("`--info` of a model with several methods", ["--info"], "def analyze(image: data_types.Image"),
    ],
)
def test_the_cli_calls_methods_by_name(
    methods: Appliance, pki: Pki, matrix: Matrix, form: str, arguments: list[str], expected: str
) -> None:
    """By ids, with everything else in the environment."""
    matrix.row("clarifai CLI 12.5.0", f"`model predict …` {form}")
    where = {"CLARIFAI_API_BASE": f"https://localhost:{methods.port()}", "CLARIFAI_ROOT_CERTIFICATES_PATH": str(pki.ca)}
    given = [str(methods.home / "picture.png") if each == "PICTURE" else each for each in arguments]
    done = subprocess.run(
        [SDK / "bin" / "clarifai", "model", "predict", "tester/tests/models/methods", *given],
        capture_output=True,
        text=True,
        env=variables(methods, pki) | where | {"CLARIFAI_USER_ID": "tester"},
        timeout=PATIENCE_S,
        check=False,
    )
    assert expected in done.stdout, done.stdout + done.stderr
