"""`use_predict_cache` from stock clients: the raw stub says it, the Python SDK has no word for it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.appliance import MODELS, PATIENCE_S, ROOT, Appliance, Pki
from support.client_matrix import Matrix

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
DIGIT = min((MODELS / "digits" / "samples").glob("*.png"))
HITS = 'inference_appliance_cache_hits_total{model="digits",version="1"}'


@pytest.fixture
def appliance(tmp_path: Path, pki: Pki) -> Iterator[Appliance]:
    """A running appliance with a cache."""
    made = Appliance(tmp_path / "cached", pki, {"cache": {"size": "1MiB"}}, transport="native")
    shutil.copytree(MODELS / "digits", made.models / "digits")
    made.key = made.new_key()
    with made:
        yield made


def test_the_stub_is_answered_from_the_cache_and_the_sdk_cannot_ask(
    appliance: Appliance, pki: Pki, matrix: Matrix
) -> None:
    """Three equal calls run the model once."""
    matrix.row("clarifai-grpc 12.6.0", "`PostModelOutputsRequest(use_predict_cache=True)`")
    matrix.row(
        "Python SDK 12.5.0",
        "`use_predict_cache`",
        why="the SDK has no parameter for it and leaves it unset; the raw stub and REST have it",
    )
    python = ROOT / ".clients" / "sdk-12" / "bin" / "python"
    variables = {k: v for k, v in os.environ.items() if not k.startswith("CLARIFAI_")} | {"CLARIFAI_PAT": appliance.key}
    done = subprocess.run(
        [python, HERE / "script_grpc_cache.py", f"https://localhost:{appliance.port()}", pki.ca, DIGIT],
        capture_output=True,
        text=True,
        env=variables,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [10000] * 3
    assert found["same"]
    assert appliance.metric(HITS) == 2
    assert appliance.metric('inference_appliance_batch_rows_sum{model="digits",version="1"}') == 1
    assert found["sources"] > 50
    assert not found["sdk_knows_it"]
    assert (found["versions"]["clarifai"], found["versions"]["clarifai-grpc"]) == ("12.5.0", "12.6.0")
