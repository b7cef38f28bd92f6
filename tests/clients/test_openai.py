"""The stock OpenAI client, over TLS from a custom root: only base_url and the root certificate change."""

import base64
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import graphs, pictures
from support.appliance import PATIENCE_S, ROOT, Appliance, Client, Pki, request_for, text_input
from support.client_matrix import Matrix

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
NAME = "OpenAI Python"
SENTENCE = f"{graphs.USER}/{graphs.APP}/models/sentence"
PICTURE = pictures.png(pictures.rgb_pixels(8, 8))
LINE_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
Make = Callable[..., Appliance]


@pytest.fixture(scope="module")
def transport() -> str:
    """grpcio serves no HTTP."""
    return "native"


def with_models(appliance: Appliance) -> Appliance:
    """Two embedders and a classifier."""
    graphs.write_text_embedder(appliance.models / "sentence")
    graphs.write_image_embedder(appliance.models / "vector")
    graphs.write_text_classifier(appliance.models / "topic", max_tokens=16)
    return appliance


def run_script(name: str, *arguments: str | Path) -> dict[str, Any]:
    """Run one of the scripts beside this file with the stock client, and return what it printed."""
    python = ROOT / ".clients" / "openai" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing; `make test` makes it")
    done = subprocess.run(
        [python, HERE / name, *arguments],
        input=base64.b64encode(PICTURE).decode(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def url(appliance: Appliance, port: str = "server.listen") -> str:
    """Where it is."""
    return f"https://localhost:{appliance.port(port)}"


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """A running one with a key."""
    made = with_models(Appliance(tmp_path_factory.mktemp("openai"), pki, transport=transport))
    made.key = made.new_key()
    with made:
        yield made


@pytest.fixture(scope="module")
def found(appliance: Appliance, pki: Pki) -> dict[str, Any]:
    """What the client got."""
    return run_script("script_openai.py", url(appliance), pki.ca, appliance.key)


class TestModels:
    def test_models_are_listed_and_found(self, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.version(NAME, f"openai {found['version']}")
        matrix.row(NAME, "`client.models.list()`, `retrieve(id)`, by Clarifai's URL too")
        assert found["models"] == [SENTENCE.replace("sentence", name) for name in ("sentence", "topic", "vector")]
        assert found["model"] == found["model_by_url"] == SENTENCE


class TestEmbeddings:
    def test_they_are_those_of_clarifais_door(
        self, found: dict[str, Any], appliance: Appliance, pki: Pki, matrix: Matrix
    ) -> None:
        matrix.row(NAME, "`client.embeddings.create(model, input)`: a text, a list, by Clarifai's URL")
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            request = request_for("sentence", [text_input("good")], user=graphs.USER, app=graphs.APP)
            vector = client.predict(request).outputs[0].data.embeddings[0].vector
        assert np.float32(found["one"]).tolist() == list(vector)
        assert found["one"] == found["again"] == found["by_url"]
        assert len(found["several"]) == 2
        assert found["tokens"] == 4 + 6
        assert len(found["request_id"]) == 32

    def test_both_encodings_are_the_same_numbers(self, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(
            NAME, '`encoding_format="float"`, and base64, which it asks for by itself; `dimensions` of the model'
        )
        assert np.float32(found["floats"]).tolist() == np.float32(found["several"]).tolist()

    def test_pictures_come_as_data_uris(self, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(NAME, "`embeddings.create` of a picture, as a `data:` URI")
        assert len(found["picture"]) == 3

    def test_the_asynchronous_client_gets_the_same(self, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(NAME, "`AsyncOpenAI`")
        assert found["async"][0] == found["one"]
        assert found["async"][1] != found["one"]
        assert found["async_models"] == found["models"]


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "kind", "status", "code", "sentence"),
        [
            ("unknown", "NotFoundError", 404, "model_not_found", "There is no model"),
            ("tokens_in", "BadRequestError", 400, "model_invalid_argument", "token ids"),
            ("dimensions", "BadRequestError", 400, "model_invalid_argument", "this model has 4"),
            ("wrong_key", "AuthenticationError", 401, "invalid_api_key", "not known to this appliance"),
        ],
    )
    def test_the_client_raises_what_its_users_catch(
        self, found: dict[str, Any], call: str, kind: str, status: int, code: str, sentence: str
    ) -> None:
        error = found[call]
        assert (error["kind"], error["status"], error["code"]) == (kind, status, code)
        assert sentence in error["text"]

    def test_language_models_are_not_here(self, found: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(
            NAME, "`chat.completions`, `responses`", why="there are no language models here; it raises NotFoundError"
        )
        for call in ("chat", "responses"):
            assert found[call]["kind"] == "NotFoundError"
            assert "no language models" in found[call]["text"]

    def test_a_rate_is_waited_for(self, make_appliance: Make, pki: Pki, matrix: Matrix) -> None:
        """The client comes again when `retry-after` says so; its users notice nothing."""
        matrix.row(NAME, "retries on 429, after `retry-after`")
        slow = with_models(make_appliance(principal=[{"name": "slow", "requests_per_second": 1.5, "burst": 1}]))
        key = slow.new_key("--principal", "slow")
        with slow:
            found = run_script("script_openai_retries.py", url(slow), pki.ca, key)
        assert found["refused"] == {"code": "rate_limit_exceeded", "retry_after": "1"}
        assert found["answered"] == [1, 1]


class TestCertificates:
    def test_a_client_certificate_with_a_key(self, make_appliance: Make, pki: Pki, matrix: Matrix) -> None:
        matrix.row(NAME, '`http_client` with a client certificate, `auth.require = "both"`')
        both = with_models(make_appliance(auth={"require": "both"}, principal=[LINE_3]))
        key = both.new_key("--principal", "line-3")
        pair = [pki.folder / "clients" / f"line-3.{kind}" for kind in ("crt", "key")]
        with both:
            found = run_script("script_openai.py", url(both), pki.ca, key, *pair)
            assert len(found["models"]) == 3
            found = run_script("script_openai.py", url(both, "server.mtls_listen"), pki.ca, key, *pair)
            assert found["one"] == found["async"][0]
