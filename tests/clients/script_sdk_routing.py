"""Runs inside an environment with the stock Clarifai SDK 12: places and workflows. Prints what came back as JSON.

Usage: script_sdk_routing.py BASE_URL ROOT_CERTIFICATE SAMPLES; the key is in CLARIFAI_PAT. What the SDK asks over a
connection of its own needs CLARIFAI_API_BASE and CLARIFAI_ROOT_CERTIFICATES_PATH.
"""

import json
import sys
import tempfile
from pathlib import Path

from clarifai.client.app import App
from clarifai.client.compute_cluster import ComputeCluster
from clarifai.client.input import Inputs
from clarifai.client.model import Model
from clarifai.client.nodepool import Nodepool
from clarifai.client.user import User
from clarifai.client.workflow import Workflow
from clarifai.runners.utils.data_types import Image

base_url, root, samples = sys.argv[1:4]
PATHS = sorted(Path(samples).glob("*.png"))
DIGIT = PATHS[0].read_bytes()
HERE = {"base_url": base_url, "root_certificates_path": root}
CLOUD = "https://clarifai.com/appliance/main"
OWNER = {"deployment_user_id": "appliance"}
PLACE = {"compute_cluster_id": "plant-berlin", "nodepool_id": "line-7"}


def model(**where):
    """The model, at a place."""
    return Model(url=f"{CLOUD}/models/digits", **HERE, **where)


def top(reply):
    """The first concept of a reply to one input."""
    return reply.outputs[0].data.concepts[0].id


def classic(**where):
    """The first concept of a classic call."""
    return top(model(**where).predict_by_bytes(DIGIT, input_type="image"))


def failure(call):
    """What the SDK raises, as text."""
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def answers(reply, index=0):
    """The concept ids of each output of one input."""
    return [[concept.id for concept in output.data.concepts] for output in reply.results[index].outputs]


flow = Workflow(url=f"{CLOUD}/workflows/read-digits", **HERE)
cluster = User(user_id="appliance", **HERE).compute_cluster("plant-berlin")
nodepool = cluster.nodepool("line-7")
inputs = [Inputs.get_input_from_bytes(f"i{i}", image_bytes=path.read_bytes()) for i, path in enumerate(PATHS[:30])]
many = flow.predict(inputs)
exported = Path(tempfile.mkdtemp()) / "flow.yaml"
flow.export(str(exported))

results = {
    "plain": classic(),
    "deployment": classic(deployment_id="prod-digits", **OWNER),
    "own_deployment": classic(deployment_id="digits", **OWNER),
    "place": classic(**PLACE, **OWNER),
    "asked_deployment": classic(deployment_id="prod-digits"),
    "asked_place": classic(**PLACE),
    "pythonic": model(deployment_id="prod-digits", **OWNER).predict(image=Image(bytes=DIGIT))[0].id,
    "generate": [
        top(reply) for reply in model(deployment_id="prod-digits", **OWNER).generate_by_bytes(DIGIT, input_type="image")
    ],
    "unknown_deployment": failure(lambda: classic(deployment_id="other", **OWNER)),
    "unknown_nodepool": failure(lambda: classic(compute_cluster_id="plant-berlin", nodepool_id="other", **OWNER)),
    "unknown_cluster": failure(lambda: classic(compute_cluster_id="other", nodepool_id="line-7", **OWNER)),
    "unknown_owner": failure(lambda: classic(deployment_id="prod-digits", deployment_user_id="bob")),
    "other_model": failure(lambda: classic(deployment_id="prod-topics", **OWNER)),
    "clusters": [found.id for found in User(user_id="appliance", **HERE).list_compute_clusters()],
    "nodepools": [found.id for found in cluster.list_nodepools()],
    "cpus": nodepool.instance_types[0].compute_info.cpu_limit,
    "deployments": [found.id for found in nodepool.list_deployments()],
    "got_deployment": nodepool.deployment("prod-digits").worker.model.id,
    "runners": [found.worker.model.id for found in nodepool.list_runners()],
    "got_runner": nodepool.runner(next(iter(nodepool.list_runners())).id).worker.model.id,
    "direct_nodepool": [
        found.id
        for found in Nodepool(
            nodepool_id="line-7", user_id="appliance", compute_cluster={"id": "plant-berlin"}, **HERE
        ).list_deployments()
    ],
    "direct_cluster": [
        found.id
        for found in ComputeCluster(compute_cluster_id="plant-berlin", user_id="appliance", **HERE).list_nodepools()
    ],
    "flow": answers(flow.predict_by_bytes(DIGIT, input_type="image")),
    "flow_untyped": answers(flow.predict_by_bytes(DIGIT)),
    "flow_file": answers(flow.predict_by_filepath(str(PATHS[0]), input_type="image")),
    "flow_url": failure(lambda: flow.predict_by_url("http://127.0.0.1:1/x.png", input_type="image")),
    "flow_many": [answers(many, index)[0][0] for index in range(len(inputs))],
    "flow_ids": [result.input.id for result in many.results],
    "truth": [path.stem.rsplit("-", 1)[1] for path in PATHS[:30]],
    "flow_ids_form": answers(
        Workflow(workflow_id="read-digits", user_id="appliance", app_id="main", **HERE).predict_by_bytes(
            DIGIT, input_type="image"
        )
    ),
    "flow_limited": answers(
        Workflow(
            url=f"{CLOUD}/workflows/read-digits", output_config={"max_concepts": 2, "min_value": 0.0}, **HERE
        ).predict_by_bytes(DIGIT, input_type="image")
    ),
    "flow_versions": [found.version.id for found in flow.list_versions()],
    "flow_exported": exported.read_text(),
    "flows": sorted(found.id for found in App(app_id="main", user_id="appliance", **HERE).list_workflows()),
    "got_flow": App(app_id="main", user_id="appliance", **HERE).workflow("read-digits").id,
    "flow_bad_input": failure(lambda: flow.predict_by_bytes(b"no picture", input_type="image")),
    "flow_broken": failure(
        lambda: Workflow(url=f"{CLOUD}/workflows/half", **HERE).predict_by_bytes(DIGIT, input_type="image")
    ),
    "flow_unknown": failure(
        lambda: Workflow(url=f"{CLOUD}/workflows/other", **HERE).predict_by_bytes(DIGIT, input_type="image")
    ),
}
by_version = Workflow(url=f"{CLOUD}/workflows/read-digits/versions/{results['flow_versions'][0]}", **HERE)
results["flow_version"] = answers(by_version.predict_by_bytes(DIGIT, input_type="image"))
print(json.dumps(results))
