"""The stock Triton client over gRPC and HTTP, over TLS from a custom root: KServe V2 as its users write it."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from support import graphs, pictures
from support.appliance import PATIENCE_S, ROOT, Appliance, Client, Pki, image_input, request_for
from support.client_matrix import Matrix

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
NAME = "Triton client"
LANES = (("native", "grpc"), ("native", "http"), ("grpcio", "grpc"))
"""Which wire serves, and which of Triton's two clients asks; grpcio serves no HTTP."""

WORDS = {"grpc": "gRPC", "http": "HTTP"}
PICTURE = pictures.png(pictures.rgb_pixels(8, 8))
LINE_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
Make = Callable[..., Appliance]


def with_models(appliance: Appliance) -> Appliance:
    """Raw models of some datatypes, classifiers and an embedder."""
    graphs.write_raw(appliance.models / "pair", graphs.two_in_two_out_model())
    for name, kind in (("int64", TensorProto.INT64), ("fp16", TensorProto.FLOAT16), ("bool", TensorProto.BOOL)):
        graphs.write_raw(appliance.models / name, graphs.identity_model(("batch", 3), kind))
    graphs.write_image_classifier(appliance.models / "colours")
    graphs.write_text_classifier(appliance.models / "topic", max_tokens=16)
    graphs.write_image_embedder(appliance.models / "vector")
    return appliance


def run_script(wire: str, appliance: Appliance, pki: Pki, port: str = "server.listen", *pair: Path) -> dict[str, Any]:
    """Run the script beside this file with the stock client, and return what it printed."""
    python = ROOT / ".clients" / "triton" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing; `make test` makes it")
    address = f"localhost:{appliance.port(port)}"
    done = subprocess.run(
        [python, HERE / "script_triton.py", wire, address, pki.ca, appliance.key, *pair],
        input=PICTURE,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module", params=LANES, ids="-".join)
def lane(request: pytest.FixtureRequest) -> tuple[str, str]:
    """One of them."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture(scope="module")
def transport(lane: tuple[str, str]) -> str:
    """Which wire serves."""
    return lane[0]


@pytest.fixture(scope="module")
def wire(lane: tuple[str, str]) -> str:
    """Which of its two clients asks."""
    return lane[1]


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """A running one with a key, on each transport."""
    made = with_models(Appliance(tmp_path_factory.mktemp("triton"), pki, transport=transport))
    made.key = made.new_key()
    with made:
        yield made


@pytest.fixture(scope="module")
def found(wire: str, appliance: Appliance, pki: Pki) -> dict[str, Any]:
    """What the client got."""
    return run_script(wire, appliance, pki)


class TestServerAndModels:
    def test_health_and_metadata(self, wire: str, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.version(NAME, f"tritonclient {found['version']}")
        forms = "`is_server_live`, `is_server_ready`, `is_model_ready`, `get_model_metadata`"
        base = "; base path `host:port/kserve`" if wire == "http" else ""
        matrix.row(NAME, f"{WORDS[wire]} {forms}{base}")
        assert all(found[name] for name in ("live", "ready", "model_ready", "version_ready"))
        content = found["metadata"]
        assert content["name"] == f"{graphs.USER}/{graphs.APP}/pair"
        assert content["versions"] == ["1"]
        assert content["platform"] == "onnxruntime_onnx"
        shapes = [list(map(int, spec["shape"])) for spec in (*content["inputs"], *content["outputs"])]
        assert shapes == [[-1, 2]] * 4

    def test_the_repository_is_listed(self, wire: str, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(NAME, f"{WORDS[wire]} `get_model_repository_index`")
        index = found["index"]["models"] if wire == "grpc" else found["index"]
        assert {entry["state"] for entry in index} == {"READY"}
        assert f"{graphs.USER}/{graphs.APP}/colours" in {entry["name"] for entry in index}


class TestInference:
    def test_raw_tensors(self, wire: str, found: dict[str, Any], matrix: Matrix) -> None:
        data = " with binary data, its default" if wire == "http" else ""
        matrix.row(NAME, f"{WORDS[wire]} `infer` on raw tensors{data}; outputs by name; model and `user/app/model`")
        assert found["sum"] == [[6, 8], [10, 12]]
        assert found["full_name"] == [[5, 12], [21, 32]]
        assert found["one_output"] == ["product"]
        assert found["int64"]
        assert found["fp16"]
        assert found["bool"]

    def test_a_classifiers_answers_are_those_of_clarifais_door(
        self, wire: str, found: dict[str, Any], appliance: Appliance, pki: Pki, matrix: Matrix
    ) -> None:
        matrix.row(NAME, f"{WORDS[wire]} `infer` on pictures and texts as BYTES; `max_concepts` as a parameter")
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            request = request_for("colours", [image_input(PICTURE)], user=graphs.USER, app=graphs.APP)
            concepts = client.predict(request).outputs[0].data.concepts
        assert found["concepts"] == [[concept.id for concept in concepts]] * 2
        assert np.float32(found["values"]).tolist() == [[concept.value for concept in concepts]] * 2
        assert found["two"] == [row[:2] for row in found["concepts"]]
        assert [set(row) for row in found["texts"]] == [{"c-good", "c-bad"}] * 2
        assert np.shape(found["embedding"]) == (2, 3)

    def test_the_asynchronous_clients(self, wire: str, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(NAME, f"{WORDS[wire]} `aio` client")
        assert found["async"] == [True, [[[5, 12], [21, 32]]] * 3]

    def test_what_only_one_of_them_has(self, wire: str, found: dict[str, Any], matrix: Matrix) -> None:
        if wire == "grpc":
            matrix.row(NAME, "gRPC `start_stream`, `async_stream_infer`: an error of one request in its place")
            assert found["stream"][0] == found["stream"][2] == [[6, 8], [10, 12]]
            assert "There is no model" in found["stream"][1]
            return
        matrix.row(NAME, "HTTP `infer` with `binary_data=False` both ways; `async_infer`")
        assert found["json"] == [[6, 8], [10, 12]]
        assert found["pending"] == [[[6, 8], [10, 12]]] * 2
        matrix.row(NAME, "HTTP `request_compression_algorithm`", why="compressed bodies are refused with 415")
        assert "content-encoding" in found["compressed"]["text"]


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "grpc", "http", "sentence"),
        [
            ("unknown", "NOT_FOUND", "404", "There is no model"),
            ("shape", "INVALID_ARGUMENT", "400", "has shape [2, 3]"),
            ("picture", "INVALID_ARGUMENT", "400", "JPEG"),
            ("no_key", "UNAUTHENTICATED", "401", "brings no key"),
        ],
    )
    def test_the_client_raises_with_a_status_and_a_sentence(
        self, wire: str, found: dict[str, Any], call: str, grpc: str, http: str, sentence: str
    ) -> None:
        assert (grpc if wire == "grpc" else http) in found[call]["status"]
        assert sentence in found[call]["text"]

    def test_the_classification_extension_is_refused(self, wire: str, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(
            NAME,
            f"{WORDS[wire]} `class_count` (classification extension)",
            why="refused; ask `concepts` with `max_concepts`",
        )
        assert "'classification'" in found["classification"]["text"]


class TestCertificates:
    def test_a_client_certificate_with_a_key(self, wire: str, make_appliance: Make, pki: Pki, matrix: Matrix) -> None:
        matrix.row(NAME, f'{WORDS[wire]} with a client certificate, `auth.require = "both"`')
        both = with_models(make_appliance(auth={"require": "both"}, principal=[LINE_3]))
        both.key = both.new_key("--principal", "line-3")
        pair = [pki.folder / "clients" / f"line-3.{kind}" for kind in ("crt", "key")]
        with both:
            found = run_script(wire, both, pki, "server.mtls_listen", *pair)
        assert found["sum"] == [[6, 8], [10, 12]]
