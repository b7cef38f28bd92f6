"""The basics of the stock Python SDK over each wire: only base_url changes. Form by form: test_python_sdk_forms.py."""

from typing import Any

import pytest
from support.appliance import Appliance, Pki
from support.stock import SAMPLES, run_script

pytestmark = pytest.mark.clients


def run(name: str, shared: Appliance, pki: Pki) -> dict[str, Any]:
    """What one of the scripts beside this file printed."""
    target = f"https://localhost:{shared.port()}"
    found: dict[str, Any] = run_script("sdk-12", name, target, pki.ca, SAMPLES, CLARIFAI_PAT=shared.key)
    return found


@pytest.fixture(scope="module")
def classic(shared: Appliance, pki: Pki) -> dict[str, Any]:
    """What the classic calls gave."""
    return run("script_sdk_classic.py", shared, pki)


@pytest.fixture(scope="module")
def pythonic(shared: Appliance, pki: Pki) -> dict[str, Any]:
    """What the pythonic calls gave."""
    return run("script_sdk_pythonic.py", shared, pki)


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
