"""The stock Python SDKs, each in its own environment, over TLS from a custom root: only base_url changes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.appliance import MODELS, PATIENCE_S, ROOT, Appliance, Pki

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent


def run_script(name: str, environment: str, shared: Appliance, pki: Pki) -> dict[str, Any]:
    """Run one of the scripts beside this file with a stock SDK, and return what it printed."""
    python = ROOT / ".clients" / environment / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing; `make test` makes it")
    variables = {k: v for k, v in os.environ.items() if not k.startswith("CLARIFAI_")} | {"CLARIFAI_PAT": shared.key}
    done = subprocess.run(
        [python, HERE / name, f"https://localhost:{shared.port()}", pki.ca, MODELS / "digits" / "samples"],
        capture_output=True,
        text=True,
        env=variables,
        timeout=5 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module", params=["sdk-12", "sdk-10"])
def classic(request: pytest.FixtureRequest, shared: Appliance, pki: Pki) -> dict[str, Any]:
    """What the classic calls of each SDK gave."""
    return run_script("script_sdk_classic.py", request.param, shared, pki)


@pytest.fixture(scope="module")
def pythonic(shared: Appliance, pki: Pki) -> dict[str, Any]:
    """What the pythonic calls gave."""
    return run_script("script_sdk_pythonic.py", "sdk-12", shared, pki)


class TestClassic:
    def test_a_batch_of_128_is_answered_in_order(self, classic: dict[str, Any]) -> None:
        assert classic["batch"] == classic["truth"]
        assert classic["batch_ids"] == [f"input-{index}" for index in range(128)]

    def test_more_are_refused_by_the_sdk_itself(self, classic: dict[str, Any]) -> None:
        assert "Too many inputs" in classic["too_many"]

    def test_bytes_files_and_texts_are_predicted(self, classic: dict[str, Any]) -> None:
        assert classic["by_bytes"] == classic["by_bytes_untyped"] == classic["by_filepath"] == classic["version"]
        assert classic["by_bytes"][0] == classic["truth"][0]
        assert len(classic["by_bytes"]) == 10
        assert classic["text"][0] == "trees-ensembles"

    def test_the_output_config_is_kept(self, classic: dict[str, Any]) -> None:
        assert classic["three"] == classic["by_bytes"][:3]
        assert classic["min_value"] == classic["by_bytes"][:1]
        assert classic["selected"] == ["4"]
        assert "21202" in classic["max_201"] or "MODEL_INVALID_ARGUMENT" in classic["max_201"]
        assert "200" in classic["max_201"]

    def test_errors_reach_the_user_with_what_to_do(self, classic: dict[str, Any]) -> None:
        for name in ("unknown_version", "unknown_model"):
            assert "MODEL_DOES_NOT_EXIST" in classic[name]
        assert "INPUT_UNSUPPORTED_FORMAT" in classic["corrupt"]
        assert "JPEG" in classic["corrupt"]
        assert "INPUT_INVALID_URL" in classic["by_url"]
        assert "CONN_KEY_INVALID" in classic["wrong_key"]

    def test_versions_are_listed_to_their_end(self, classic: dict[str, Any]) -> None:
        assert classic["versions"] == ["1"]


class TestPythonic:
    def test_methods_are_published(self, pythonic: dict[str, Any]) -> None:
        assert pythonic["methods"] == {"digits": ["predict"]}

    def test_answers_are_the_same_as_the_classic_ones(self, pythonic: dict[str, Any]) -> None:
        assert pythonic["first"] == pythonic["positional"]
        assert pythonic["first"][0] == pythonic["truth"][0]
        assert pythonic["batch"] == pythonic["truth"]
        assert pythonic["text"] == "clustering"

    def test_limits_are_arguments(self, pythonic: dict[str, Any]) -> None:
        assert len(pythonic["two"]) == 2
        assert pythonic["min_value"] == pythonic["first"][:1]
        assert pythonic["select"] == ["4", "5"]
        assert "200" in pythonic["max_201"]
        assert "Missing required" in pythonic["missing"] or "missing" in pythonic["missing"]
