"""Stock Python SDKs name a place to run, look at places, and run workflows; the snippets of the docs, word for word."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.appliance import MODELS, PATIENCE_S, ROOT, Appliance, Pki
from support.client_matrix import Matrix

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
DIGIT = sorted((MODELS / "digits" / "samples").glob("*.png"))[0]
SDK_12, SDK_10 = "Python SDK 12.5.0", "Python SDK 10.11.1"
HALF = {
    "id": "half",
    "nodes": [
        {"id": "reads", "model": {"model_id": "digits"}},
        {"id": "topic", "model": {"model_id": "ml-topics"}, "node_inputs": [{"node_id": "reads"}]},
    ],
}
"""Its second node cannot take what the first one gives."""


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in that language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """An appliance with the places of docs/routing.md and the workflow of docs/workflows.md."""
    config = {
        "placement": {"compute_cluster_id": "plant-berlin", "nodepool_id": "line-7"},
        "deployment": [{"id": "prod-digits", "model": "digits"}, {"id": "prod-topics", "model": "ml-topics"}],
    }
    appliance = Appliance(tmp_path_factory.mktemp("placed"), pki, config, transport=transport)
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, appliance.models / bundle)
    (appliance.home / "workflows").mkdir()
    (appliance.home / "workflows" / "docs.yaml").write_text(blocks("workflows.md", "yaml")[0], encoding="utf-8")
    (appliance.home / "workflows" / "half.yaml").write_text(yaml.safe_dump({"workflow": HALF}), encoding="utf-8")
    appliance.key = appliance.new_key()
    with appliance:
        yield appliance


def run(environment: str, script: Path, appliance: Appliance, pki: Pki, *arguments: Path, asks: bool = False) -> str:
    """What a script printed. Args: asks: whether the SDK's own connections learn from the environment where we are."""
    python = ROOT / ".clients" / environment / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing; `make test` makes it")
    base_url = f"https://localhost:{appliance.port()}"
    variables = {k: v for k, v in os.environ.items() if not k.startswith("CLARIFAI_")} | {"CLARIFAI_PAT": appliance.key}
    if asks:
        variables |= {"CLARIFAI_API_BASE": base_url, "CLARIFAI_ROOT_CERTIFICATES_PATH": str(pki.ca)}
    done = subprocess.run(
        [python, script, base_url, pki.ca, *arguments],
        capture_output=True,
        text=True,
        env=variables,
        timeout=5 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def new(placed: Appliance, pki: Pki) -> dict[str, Any]:
    """What SDK 12 said."""
    script = HERE / "script_sdk_routing.py"
    found: dict[str, Any] = json.loads(run("sdk-12", script, placed, pki, MODELS / "digits" / "samples", asks=True))
    return found


@pytest.fixture(scope="module")
def old(placed: Appliance, pki: Pki) -> dict[str, Any]:
    """What SDK 10 said."""
    script = HERE / "script_sdk10_routing.py"
    found: dict[str, Any] = json.loads(run("sdk-10", script, placed, pki, MODELS / "digits" / "samples"))
    return found


class TestPlaces:
    def test_a_model_is_used_at_this_appliance(self, new: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(SDK_12, "`Model(…, deployment_id=…, deployment_user_id=…)`: classic, pythonic, `generate_by_bytes`")
        matrix.row(SDK_12, "`Model(…, compute_cluster_id=…, nodepool_id=…, deployment_user_id=…)`")
        assert new["plain"] == new["deployment"] == new["own_deployment"] == new["place"] == new["pythonic"]
        assert new["generate"] == [new["plain"]]

    def test_without_an_owner_the_sdk_asks_who_the_caller_is(self, new: dict[str, Any], matrix: Matrix) -> None:
        """Over a connection of its own, which only the environment can direct (PROTOCOL 2.2)."""
        matrix.row(
            SDK_12, "`Model(…, deployment_id=…)` with `CLARIFAI_API_BASE`, `CLARIFAI_ROOT_CERTIFICATES_PATH` set"
        )
        matrix.row(SDK_12, "`Model(…, compute_cluster_id=…, nodepool_id=…)` with the same set")
        assert new["plain"] == new["asked_deployment"] == new["asked_place"]

    def test_other_places_are_refused(self, new: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(SDK_12, "a deployment, nodepool, cluster or owner that is not here is refused in the constructor")
        for name, words in {
            "unknown_deployment": "Deployment 'other' not found for user_id 'appliance'. Status: Deployment does not",
            "unknown_nodepool": "Nodepool 'other' not found",
            "unknown_cluster": "Status: Compute cluster does not exist",
            "unknown_owner": "Deployment 'prod-digits' not found for user_id 'bob'",
        }.items():
            assert words in new[name]
        assert "DEPLOYMENT_INVALID_ARGUMENT" in new["other_model"]
        assert "serves model appliance/main/ml-topics" in new["other_model"]

    def test_places_can_be_looked_at(self, new: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(
            SDK_12, "`User.list_compute_clusters`, `.compute_cluster`, `ComputeCluster.list_nodepools`, `.nodepool`"
        )
        matrix.row(SDK_12, "`Nodepool.list_deployments`, `.deployment`, `.list_runners`, `.runner`")
        assert new["clusters"] == ["plant-berlin"]
        assert new["nodepools"] == new["direct_cluster"] == ["line-7"]
        assert int(new["cpus"]) >= 1
        assert new["deployments"] == new["direct_nodepool"] == ["prod-digits", "prod-topics", "digits", "ml-topics"]
        assert new["got_deployment"] == "digits"
        assert new["runners"] == ["digits", "ml-topics"]
        assert new["got_runner"] == "digits"

    def test_old_sdks_name_a_place_with_the_call(self, old: dict[str, Any], matrix: Matrix) -> None:
        """And the model's owner as the place's (PROTOCOL 2.3)."""
        matrix.row(SDK_10, "`predict_by_bytes(…, deployment_id=…)`, `predict_by_filepath(…, deployment_id=…)`")
        matrix.row(SDK_10, "`predict_by_bytes(…, compute_cluster_id=…, nodepool_id=…)`")
        matrix.row(SDK_10, "a place that is not here is refused")
        assert old["plain"] == old["deployment"] == old["place"] == old["file"]
        assert "DEPLOYMENT_DOES_NOT_EXIST" in old["unknown_deployment"]
        assert "NODEPOOL_DOES_NOT_EXIST" in old["unknown_nodepool"]
        assert "COMPUTE_CLUSTER_DOES_NOT_EXIST" in old["unknown_cluster"]
        assert "DEPLOYMENT_INVALID_ARGUMENT" in old["other_model"]


class TestWorkflows:
    def test_a_workflow_predicts(self, new: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(
            SDK_12, "`Workflow(url=…)`, `Workflow(workflow_id=…)`: `predict`, `predict_by_bytes`, `predict_by_filepath`"
        )
        matrix.row(SDK_12, "`Workflow(…, output_config={…})`")
        matrix.row(SDK_12, "`Workflow(…).predict_by_bytes(…)` without `input_type`, with `CLARIFAI_API_BASE` set")
        guess, ranking = new["flow"]
        assert guess == ranking[:1] == [new["plain"]]
        assert len(ranking) == 10
        assert new["flow"] == new["flow_untyped"] == new["flow_file"] == new["flow_ids_form"] == new["flow_version"]
        assert new["flow_many"] == new["truth"]
        assert new["flow_ids"] == [f"i{index}" for index in range(30)]
        assert new["flow_limited"] == [ranking[:2], ranking[:2]]

    def test_a_workflow_that_fails_says_why(self, new: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(SDK_12, "`Workflow(…).predict_by_url(…)` is refused while URL inputs are off")
        matrix.row(SDK_12, "a workflow with a bad node, a bad input or an unknown id raises with the reason")
        assert "INPUT_INVALID_URL" in new["flow_url"]
        assert "INPUT_UNSUPPORTED_FORMAT" in new["flow_bad_input"]
        assert "with WORKFLOW_NO_MATCHING_INPUT" in new["flow_broken"]
        assert "WORKFLOW_DOES_NOT_EXIST" in new["flow_unknown"]

    def test_workflows_can_be_looked_at(self, new: dict[str, Any], matrix: Matrix) -> None:
        """What is exported is what we read."""
        matrix.row(SDK_12, "`Workflow.list_versions`, `.export`, `App.list_workflows`, `App.workflow`")
        assert new["flows"] == ["half", "read-digits"]
        assert len(new["flow_versions"]) == 1
        exported = yaml.safe_load(new["flow_exported"])["workflow"]
        assert exported["id"] == "read-digits"
        model = {"model_id": "digits", "model_version_id": "1", "user_id": "appliance", "app_id": "main"}
        assert exported["nodes"] == [{"id": "guess", "model": model}, {"id": "ranking", "model": model}]

    def test_what_the_sdk_exports_is_served(self, new: dict[str, Any], placed: Appliance, matrix: Matrix) -> None:
        """Under another id, as one of that id is there."""
        matrix.row(SDK_12, "what `Workflow.export` writes is read as it is")
        text = new["flow_exported"].replace("read-digits", "exported")
        (placed.home / "workflows" / ".exported").write_text(text, encoding="utf-8")
        (placed.home / "workflows" / ".exported").replace(placed.home / "workflows" / "exported.yaml")
        rows = placed.admin("/look", post=True)["workflows"]
        placed.wait(lambda: "appliance/main/exported" in [r["workflow"] for r in placed.admin("/status")["workflows"]])
        assert rows is not None

    def test_old_sdks_run_workflows(self, old: dict[str, Any], new: dict[str, Any], matrix: Matrix) -> None:
        matrix.row(SDK_10, "`Workflow(…)`: `predict_by_bytes`, `predict_by_filepath`, `list_versions`")
        assert old["flow"] == old["flow_file"] == new["flow"]
        assert old["flow_versions"] == new["flow_versions"]
        assert "WORKFLOW_DOES_NOT_EXIST" in old["flow_unknown"]


@pytest.mark.parametrize("page", ["routing.md", "workflows.md"])
def test_the_snippets_of_the_docs_work_as_they_stand(page: str, placed: Appliance, pki: Pki, tmp_path: Path) -> None:
    """With the key in the environment, as everywhere."""
    (snippet,) = blocks(page, "python")
    script = tmp_path / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    printed = run("sdk-12", script, placed, pki, DIGIT)
    assert printed == {"routing.md": "two", "workflows.md": "two 10"}[page]
