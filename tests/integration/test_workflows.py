"""Workflows and places to run over TLS, on both transports, with the files and the configuration that the docs show."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from support.appliance import MODELS, ROOT, Appliance, Client, Pki, image_input, request_for

Make = Callable[..., Appliance]
IDS = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")
DIGIT = sorted((MODELS / "digits" / "samples").glob("*.png"))[0].read_bytes()


def documented(page: str, language: str) -> str:
    """The first code block of a page in that language."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL)
    return blocks[0]


def put(appliance: Appliance, text: str, name: str = "read-digits.yaml") -> Path:
    """Put a workflow where the appliance looks for them, as a whole."""
    folder = appliance.home / "workflows"
    folder.mkdir(exist_ok=True)
    (folder / f".{name}").write_text(text, encoding="utf-8")
    return (folder / f".{name}").replace(folder / name)


def ask(client: Client, workflow: str = "read-digits", **fields: Any) -> Any:
    """The reply to one digit."""
    return client.call(
        "PostWorkflowResults",
        service_pb2.PostWorkflowResultsRequest(
            user_app_id=IDS, workflow_id=workflow, inputs=[image_input(DIGIT, "digit")], **fields
        ),
    )


def problems(appliance: Appliance) -> dict[str, str]:
    """What is not ready, and why."""
    found: dict[str, str] = appliance.admin("/readyz")["not_ready"]
    return found


def test_a_workflow_follows_its_file_and_its_models(make_appliance: Make, pki: Pki) -> None:
    """Served from the start, taken over when it changes, kept when it becomes bad, gone with its file or folder."""
    appliance = make_appliance("digits")
    key = appliance.new_key()
    text = documented("workflows.md", "yaml")
    path = put(appliance, text)
    with appliance, Client(appliance.port(), pki.ca, key) as client:
        reply = ask(client)
        assert reply.status.code == StatusCode.SUCCESS
        guess, ranking = reply.results[0].outputs
        assert [len(output.data.concepts) for output in (guess, ranking)] == [1, 10]
        alone = client.predict(request_for("digits", [image_input(DIGIT)]))
        assert ranking.data == alone.outputs[0].data
        assert problems(appliance) == {}

        put(appliance, text.replace("max_concepts: 1", "max_concepts: 3"))
        appliance.wait(lambda: len(ask(client).results[0].outputs[0].data.concepts) == 3)

        put(appliance, text.replace("model_id: digits", "model: digits"))
        appliance.wait(lambda: "workflows/read-digits.yaml" in problems(appliance))
        assert "model.model: is not a key we know" in problems(appliance)["workflows/read-digits.yaml"]
        assert appliance.admin("/readyz")["ready"] is True
        assert ask(client).status.code == StatusCode.SUCCESS
        listed = appliance.command("workflows", "list", "--json").stdout
        assert '"workflow": "appliance/main/read-digits"' in listed
        assert "is not a key we know" in listed
        checked = appliance.command("check", check=False)
        assert checked.returncode == 1
        assert "fail  workflow       read-digits.yaml: " in checked.stdout

        put(appliance, text)
        appliance.wait(lambda: not problems(appliance))
        shutil.rmtree(appliance.models / "digits")
        appliance.wait(lambda: "node 'guess': There is no model" in problems(appliance)["workflows/read-digits.yaml"])
        gone = ask(client)
        assert gone.status.code == StatusCode.FAILURE
        codes = [output.status.code for output in gone.results[0].outputs]
        assert codes == [StatusCode.MODEL_DOES_NOT_EXIST] * 2

        path.unlink()
        appliance.wait(lambda: ask(client).status.code == StatusCode.WORKFLOW_DOES_NOT_EXIST)
        assert client.call("ListWorkflows", service_pb2.ListWorkflowsRequest(user_app_id=IDS)).workflows == []

        elsewhere = appliance.home / "elsewhere"
        elsewhere.mkdir()
        put(appliance, text).rename(elsewhere / "x.yaml")
        appliance.write_config(catalog={"workflows": elsewhere})
        appliance.signal(signal.SIGHUP)
        appliance.wait(lambda: ask(client).status.code == StatusCode.FAILURE)  # it is there, and its model is not
    assert "workflow cannot be served" in appliance.log
    assert "Traceback" not in appliance.log


READING = {
    "GetComputeCluster": {"compute_cluster_id": "on-prem"},
    "ListComputeClusters": {},
    "ListNodepools": {"compute_cluster_id": "on-prem"},
    "GetDeployment": {"deployment_id": "digits"},
    "ListDeployments": {},
    "ListRunners": {},
    "ListWorkflows": {},
}
"""RPC → what it is asked of an appliance without a configuration of its places."""


@pytest.mark.parametrize("rpc", READING)
def test_without_configuration_places_can_be_read(client: Client, rpc: str) -> None:
    """By the raw stub; lists end with a reply that has only a status."""
    kind = getattr(service_pb2, f"{rpc}Request")
    reply = client.call(rpc, kind(user_app_id=IDS, **READING[rpc]))
    assert reply.status.code == StatusCode.SUCCESS
    found = {field.name for field, _ in reply.ListFields()} - {"status"}
    assert len(found) == (rpc != "ListWorkflows")
    if rpc.startswith("List"):
        past = client.call(rpc, kind(user_app_id=IDS, page=9, **READING[rpc]))
        assert [field.name for field, _ in past.ListFields()] == ["status"]


@pytest.fixture
def placed(make_appliance: Make) -> Appliance:
    """An appliance with the places of the docs."""
    appliance = make_appliance(
        "digits",
        "ml-topics",
        placement={"compute_cluster_id": "plant-berlin", "nodepool_id": "line-7"},
        deployment=[{"id": "prod-digits", "model": "digits"}, {"id": "gone", "model": "nothing"}],
    )
    appliance.key = appliance.new_key()
    return appliance


def test_a_request_may_name_this_appliance(placed: Appliance, pki: Pki) -> None:
    """By deployment, by nodepool, by runner; also without a model."""
    with placed, Client(placed.port(), pki.ca, placed.key) as client:
        plain = client.predict(request_for("digits", [image_input(DIGIT)])).outputs[0]
        runners = client.call("ListRunners", service_pb2.ListRunnersRequest(user_app_id=IDS)).runners
        runner = next(found.id for found in runners if found.worker.model.id == "digits")
        nodepool = {"id": "line-7", "compute_cluster": {"id": "plant-berlin", "user_id": "appliance"}}
        for selector in (
            {"deployment": {"id": "prod-digits", "user_id": "appliance"}},
            {"deployment": {"id": "digits"}},
            {"runner": {"id": runner}},
            {"nodepool": nodepool},
        ):
            for model in ("digits", *([] if "nodepool" in selector else [""])):
                request = request_for(model, [image_input(DIGIT)])
                request.runner_selector.CopyFrom(resources_pb2.RunnerSelector(**selector))
                reply = client.predict(request)
                assert reply.status.code == StatusCode.SUCCESS, selector
                assert reply.outputs[0].data == plain.data
                (streamed,) = client.call("GenerateModelOutputs", request)
                assert streamed.outputs[0].data == plain.data
        for selector, code in (
            ({"deployment": {"id": "other"}}, StatusCode.DEPLOYMENT_DOES_NOT_EXIST),
            ({"deployment": {"id": "ml-topics"}}, StatusCode.DEPLOYMENT_INVALID_ARGUMENT),
            ({"deployment": {"id": "gone"}}, StatusCode.DEPLOYMENT_DISABLED),
            ({"nodepool": {"id": "line-8"}}, StatusCode.NODEPOOL_DOES_NOT_EXIST),
            ({"runner": {"id": "0" * 32}}, StatusCode.RUNNER_DOES_NOT_EXIST),
        ):
            request = request_for("digits", [image_input(DIGIT)])
            request.runner_selector.CopyFrom(resources_pb2.RunnerSelector(**selector))
            assert client.predict(request).status.code == code


def test_places_follow_a_reload(placed: Appliance, pki: Pki) -> None:
    """Without a restart."""
    with placed, Client(placed.port(), pki.ca, placed.key) as client:

        def deployment(name: str) -> Any:
            return client.call("GetDeployment", service_pb2.GetDeploymentRequest(user_app_id=IDS, deployment_id=name))

        assert deployment("prod-digits").deployment.worker.model.id == "digits"
        placed.write_config(placement={"nodepool_id": "line-8"}, deployment=[{"id": "new", "model": "ml-topics"}])
        placed.signal(signal.SIGHUP)
        placed.wait(lambda: deployment("prod-digits").status.code == StatusCode.DEPLOYMENT_DOES_NOT_EXIST)
        found = deployment("new").deployment
        assert found.worker.model.id == "ml-topics"
        assert found.deployment_nodepools[0].nodepool.id == "line-8"
        nodepool = client.call("GetNodepool", service_pb2.GetNodepoolRequest(user_app_id=IDS, nodepool_id="line-8"))
        assert nodepool.nodepool.status == resources_pb2.Nodepool.NodepoolStatus.NODEPOOL_STATUS_READY
        assert nodepool.nodepool.status_description == "2 of 2 models answer."
