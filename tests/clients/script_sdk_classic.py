"""Runs inside an environment with a stock Clarifai SDK: classic calls. Prints what came back as JSON.

Usage: script_sdk_classic.py BASE_URL ROOT_CERTIFICATE SAMPLES; the key is in CLARIFAI_PAT.
"""

import json
import sys
from pathlib import Path

from clarifai.client.input import Inputs
from clarifai.client.model import Model
from clarifai_grpc.grpc.api import resources_pb2

base_url, root, samples = sys.argv[1:4]
PATHS = sorted(Path(samples).glob("*.png"))
DIGIT = PATHS[0].read_bytes()


def model(name, version=""):
    """The model by its URL, as on the cloud, but for base_url and the root certificate."""
    url = f"https://clarifai.com/appliance/main/models/{name}" + (f"/versions/{version}" if version else "")
    return Model(url=url, base_url=base_url, root_certificates_path=root)


def ids(reply, index=0):
    """Concept ids of one output."""
    return [concept.id for concept in reply.outputs[index].data.concepts]


def failure(call):
    """What the SDK raises, as text."""
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


digits, topics = model("digits"), model("ml-topics")
batch = [Inputs.get_input_from_bytes(f"input-{i}", image_bytes=PATHS[i % len(PATHS)].read_bytes()) for i in range(128)]
everything = digits.predict(batch)
text = b"Decision trees are grown on bootstrap samples and vote together."
results = {
    "truth": [PATHS[i % len(PATHS)].stem.rsplit("-", 1)[1] for i in range(128)],
    "batch": [ids(everything, i)[0] for i in range(128)],
    "batch_ids": [output.input.id for output in everything.outputs],
    "too_many": failure(lambda: digits.predict([*batch, batch[0]])),
    "by_bytes": ids(digits.predict_by_bytes(DIGIT, input_type="image")),
    "by_bytes_untyped": ids(digits.predict_by_bytes(DIGIT)),
    "by_filepath": ids(digits.predict_by_filepath(str(PATHS[0]), input_type="image")),
    "by_url": failure(lambda: digits.predict_by_url("http://127.0.0.1:1/x.png", input_type="image")),
    "three": ids(digits.predict_by_bytes(DIGIT, input_type="image", output_config={"max_concepts": 3})),
    "min_value": ids(digits.predict_by_bytes(DIGIT, input_type="image", output_config={"min_value": 0.6})),
    "selected": ids(
        digits.predict_by_bytes(
            DIGIT, input_type="image", output_config={"select_concepts": [resources_pb2.Concept(id="4")]}
        )
    ),
    "max_201": failure(lambda: digits.predict_by_bytes(DIGIT, input_type="image", output_config={"max_concepts": 201})),
    "text": ids(topics.predict_by_bytes(text, input_type="text")),
    "version": ids(model("digits", "1").predict_by_bytes(DIGIT, input_type="image")),
    "unknown_version": failure(lambda: model("digits", "9").predict_by_bytes(DIGIT, input_type="image")),
    "unknown_model": failure(lambda: model("nothing").predict_by_bytes(DIGIT, input_type="image")),
    "corrupt": failure(lambda: digits.predict_by_bytes(b"no picture", input_type="image")),
    "versions": [found.model_version.id for found in digits.list_versions()],
    "wrong_key": failure(
        lambda: Model(
            url="https://clarifai.com/appliance/main/models/digits",
            base_url=base_url,
            root_certificates_path=root,
            pat="0" * 64,
        ).predict_by_bytes(DIGIT, input_type="image")
    ),
}
print(json.dumps(results))
