"""PHP: messages that protoc makes of the protos, on Debian's runtime for them; calls go over php-curl.

Debian has no `grpc` extension, which the generated client class and Clarifai's own package are built upon.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from support.appliance import Appliance, Pki
from support.client_matrix import Matrix
from support.forms import DIGIT, TOPIC, Instead, Of, Says, check, says, why
from support.programs import debian_versions, generate, need, need_programs, run
from support.stock import CLIENT_TESTS, SAMPLES

pytestmark = pytest.mark.clients

PHP = "PHP"
PACKAGES = "php-cli php-curl php-google-protobuf protobuf-compiler protobuf-compiler-grpc"
NO_EXTENSION = "Debian has no package of the `grpc` extension (PECL)"
LABELS = [path.stem.rsplit("-", 1)[1] for path in sorted(SAMPLES.glob("*.png"))]

FORMS: dict[str, Any] = {
    "the messages that `protoc --php_out` makes": ['Clarifai\\Api\\V2Client: Class "Grpc\\BaseStub" not found'],
    "the extension `grpc`": Instead("not loaded", NO_EXTENSION),
    "`PostModelOutputs`, `image.base64`": DIGIT,
    "`PostModelOutputs`, `image.url`": DIGIT,
    "`PostModelOutputs`, `text.raw`": TOPIC,
    "`version_id`": DIGIT,
    "`model.output_info.output_config`, as documented": Of("digits", 3),
    "`model.model_version.output_info.output_config`": Of("digits", 3),
    "`min_value`": Of("digits", 1),
    "`select_concepts`": ["4", "5"],
    "`max_concepts` 201": says("MODEL_INVALID_ARGUMENT", "from 1 to 200"),
    "a batch of 128": [[f"demo_{index}", LABELS[index % len(LABELS)]] for index in range(128)],
    "a batch of 129": says("INPUT_OVER_LIMIT", "129 inputs; the limit is 128"),
    "`GenerateModelOutputs`": [DIGIT],
    "gRPC over HTTP/2, by php-curl": DIGIT,
    "an RPC that is not served": says("gRPC 12: .*ListInputs"),
    "`GetModel`": "1",
    "`ListModels`": ["digits", "ml-topics"],
    "a wrong PAT": says("CONN_KEY_INVALID", "not known to this appliance"),
    "an unknown model": says("MODEL_DOES_NOT_EXIST", "appliance/main/nothing"),
    "without the root certificate": Says(
        ("self-signed certificate in certificate chain",),
        "the system does not trust the custom root; set CURLOPT_CAINFO",
    ),
}

ALONE = ("the messages that `protoc --php_out` makes", "the extension `grpc`", "gRPC over HTTP/2, by php-curl")


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what protoc makes for PHP of all protos."""
    need_programs(PACKAGES, "php", "protoc", "grpc_php_plugin")
    need(Path("/usr/share/php/Google/Protobuf").is_dir(), "php-google-protobuf", f"apt-get install {PACKAGES}")
    need("curl" in run("php", "-m").split(), "php-curl", f"apt-get install {PACKAGES}")
    folder = tmp_path_factory.mktemp("php") / "stubs"
    generate(folder, "--php_out=.", "--plugin=protoc-gen-grpc=/usr/bin/grpc_php_plugin", "--grpc_out=.")
    return folder


@pytest.fixture(scope="module")
def found(stubs: Path, native: Appliance, pki: Pki, web: str) -> dict[str, Any]:
    """What each form gave."""
    words = [f"https://localhost:{native.port()}", pki.ca, SAMPLES, web, stubs]
    said = run("php", CLIENT_TESTS / "php" / "forms.php", *words, CLARIFAI_PAT=native.key)
    return dict(json.loads(said.splitlines()[-1]))


@pytest.fixture
def about(matrix: Matrix) -> Matrix:
    """The matrix, told what is driven."""
    matrix.version(PHP, debian_versions("php-cli", "php-curl", "php-google-protobuf", "protobuf-compiler"))
    return matrix


@pytest.mark.parametrize("form", FORMS)
def test_php(form: str, found: dict[str, Any], truth: dict[str, list[str]], about: Matrix) -> None:
    """It gives what the raw stub of Python reads, or the error that it should."""
    check(found[form], FORMS[form], truth)
    about.row(PHP, form if form in ALONE else f"gRPC-Web over php-curl: {form}", why=why(FORMS[form]))


def test_the_generated_client_needs_what_debian_lacks(stubs: Path, found: dict[str, Any], about: Matrix) -> None:
    """The plugin writes the class; PHP cannot load it here."""
    assert "class V2Client extends \\Grpc\\BaseStub" in (stubs / "Clarifai/Api/V2Client.php").read_text("utf-8")
    assert found["the extension `grpc`"] == "not loaded"
    needs = f"{NO_EXTENSION}, whose `\\Grpc\\BaseStub` it extends"
    about.row(PHP, "the client that `grpc_php_plugin` makes: `new V2Client(…)`", why=needs)
    about.row(PHP, "the stock `ClarifaiClient::grpc($base)`", why=f"{NO_EXTENSION}; it makes such a client")


def test_no_form_is_forgotten(found: dict[str, Any]) -> None:
    """Each that the script drives is looked at."""
    assert set(found) == set(FORMS)
