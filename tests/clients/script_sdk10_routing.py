"""Runs inside an environment with the stock Clarifai SDK 10: places and workflows. Prints what came back as JSON.

Usage: script_sdk10_routing.py BASE_URL ROOT_CERTIFICATE SAMPLES; the key is in CLARIFAI_PAT.
"""

import json
import sys
from pathlib import Path

from clarifai.client.model import Model
from clarifai.client.workflow import Workflow

base_url, root, samples = sys.argv[1:4]
PATH = min(Path(samples).glob("*.png"))
DIGIT = PATH.read_bytes()
HERE = {"base_url": base_url, "root_certificates_path": root}
CLOUD = "https://clarifai.com/appliance/main"
MODEL = Model(url=f"{CLOUD}/models/digits", **HERE)


def classic(**where):
    """The first concept of a call at a place."""
    return MODEL.predict_by_bytes(DIGIT, "image", **where).outputs[0].data.concepts[0].id


def failure(call):
    """What the SDK raises, as text."""
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def answers(reply):
    """The concept ids of each output."""
    return [[concept.id for concept in output.data.concepts] for output in reply.results[0].outputs]


flow = Workflow(url=f"{CLOUD}/workflows/read-digits", **HERE)
print(
    json.dumps(
        {
            "plain": classic(),
            "deployment": classic(deployment_id="prod-digits"),
            "place": classic(compute_cluster_id="plant-berlin", nodepool_id="line-7"),
            "file": MODEL.predict_by_filepath(str(PATH), "image", deployment_id="prod-digits")
            .outputs[0]
            .data.concepts[0]
            .id,
            "unknown_deployment": failure(lambda: classic(deployment_id="other")),
            "unknown_nodepool": failure(lambda: classic(compute_cluster_id="plant-berlin", nodepool_id="other")),
            "unknown_cluster": failure(lambda: classic(compute_cluster_id="other", nodepool_id="line-7")),
            "other_model": failure(lambda: classic(deployment_id="prod-topics")),
            "flow": answers(flow.predict_by_bytes(DIGIT, input_type="image")),
            "flow_file": answers(flow.predict_by_filepath(str(PATH), input_type="image")),
            "flow_versions": [found.version.id for found in flow.list_versions()],
            "flow_unknown": failure(
                lambda: Workflow(url=f"{CLOUD}/workflows/other", **HERE).predict_by_bytes(DIGIT, input_type="image")
            ),
        }
    )
)
