"""The stock SDKs, none of which can send a client certificate, before an appliance that demands one and a key."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import MODELS, PATIENCE_S, ROOT, Appliance, Pki
from support.client_matrix import Matrix
from support.connect import Forwarder

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
CLIENT = "`appliance connect`, where client certificates are demanded"
PYTHON_FORMS = {
    '`Model(url, base_url="http://localhost:PORT")`, `predict_by_bytes`': "by_bytes",
    '`Model(url, base_url="http://127.0.0.1:PORT")`': "by_ip",
    "`predict([Input…])`, a batch of 128": "batch",
    "`await async_predict([Input…])`": "async",
    "`predict(image=…, max_concepts=3)`": "pythonic",
    "`predict(text=…)`": "text",
    "`generate([Input…])`": "streamed",
    "`available_methods()`": "methods",
    "`list_versions()`": "versions",
}
NODE_FORMS = {
    '`new Model({ url, authConfig: { pat, base: "http://localhost:PORT" } })`, `predictByBytes`': "by_bytes",
    '`base: "http://127.0.0.1:PORT"`': "by_ip",
    "`predict({ inputs })`, a batch of 128": "batch",
    '`predictByBytes({ inputBytes, inputType: "text" })`': "text",
    "`availableMethods()`": "methods",
}


@pytest.fixture(scope="module")
def forwarder(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Forwarder]:
    """A forwarder before an appliance that wants both."""
    home = tmp_path_factory.mktemp("connect")
    principal = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
    config = {"auth": {"require": "both"}, "principal": [principal]}
    appliance = Appliance(home / "appliance", pki, config, transport="native")
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, appliance.models / bundle)
    key = appliance.new_key()
    with appliance, Forwarder(home / "forwarder", pki, appliance.port()) as made:
        made.pat = key
        yield made
        assert key not in made.log


def run_client(forwarder: Forwarder, *command: str | Path) -> dict[str, Any]:
    """What a script printed as JSON."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("CLARIFAI_")}
    done = subprocess.run(
        [*command, f"http://localhost:{forwarder.port}", MODELS / "digits" / "samples"],
        capture_output=True,
        text=True,
        env=variables | {"CLARIFAI_PAT": forwarder.pat},
        timeout=5 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def python_sdk(forwarder: Forwarder) -> dict[str, Any]:
    """What the Python SDK got."""
    python = ROOT / ".clients" / "sdk-12" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing; `make test` makes it")
    return run_client(forwarder, python, HERE / "script_connect.py")


@pytest.fixture(scope="module")
def node_sdk(forwarder: Forwarder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the Node SDK got."""
    modules = ROOT / ".clients" / "node" / "node_modules"
    if shutil.which("node") is None or not (modules / "clarifai-nodejs").exists():
        pytest.skip("the Node SDK is not installed: `make test` does it where npm is")
    folder = tmp_path_factory.mktemp("node")
    (folder / "node_modules").symlink_to(modules)
    script = folder / "connect.mjs"
    shutil.copy(HERE / "node" / "connect.mjs", script)
    package = json.loads((modules / "clarifai-nodejs" / "package.json").read_text(encoding="utf-8"))
    return {**run_client(forwarder, "node", script), "version": f"clarifai-nodejs {package['version']}"}


def expected(found: dict[str, Any]) -> dict[str, Any]:
    """What each form must give."""
    ranked = found["by_bytes"]
    assert ranked[0] == found["truth"][0]
    return {
        "by_bytes": ranked,
        "by_ip": ranked,
        "async": ranked,
        "batch": found["truth"],
        "pythonic": ranked[:3],
        "text": "clustering",
        "streamed": ranked[:1],
        "methods": ["predict"],
        "versions": ["1"],
    }


@pytest.mark.parametrize("form", PYTHON_FORMS)
def test_the_python_sdk_gets_through(python_sdk: dict[str, Any], matrix: Matrix, form: str) -> None:
    result = PYTHON_FORMS[form]
    assert python_sdk[result] == expected(python_sdk)[result]
    matrix.row(CLIENT, f"Python SDK: {form}")


@pytest.mark.parametrize("form", NODE_FORMS)
def test_the_node_sdk_gets_through(
    node_sdk: dict[str, Any], python_sdk: dict[str, Any], matrix: Matrix, form: str
) -> None:
    result = NODE_FORMS[form]
    assert node_sdk[result] == expected(node_sdk)[result]
    matrix.row(CLIENT, f"Node SDK: {form}")
    matrix.version(CLIENT, f"{python_sdk['version']}, {node_sdk['version']}")


def test_they_would_not_without_it(forwarder: Forwarder, matrix: Matrix) -> None:
    """The same SDK straight to the appliance: its key is good, and it has no certificate to send."""
    python = ROOT / ".clients" / "sdk-12" / "bin" / "python"
    upstream = forwarder.settings["upstream"]
    line = (
        "import sys; from clarifai.client.model import Model; "
        "Model(url='https://clarifai.com/appliance/main/models/digits', base_url=sys.argv[1], "
        "root_certificates_path=sys.argv[2])"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("CLARIFAI_")}
    done = subprocess.run(
        [python, "-c", line, upstream, forwarder.ca],
        capture_output=True,
        text=True,
        env=variables | {"CLARIFAI_PAT": forwarder.pat},
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    assert "certificate" in done.stderr
    matrix.row(CLIENT, "Python SDK straight to the appliance", why="no stock SDK can send a client certificate")
