"""Runs inside an environment with a stock Clarifai SDK 12, before `appliance connect`. Prints what came back as JSON.

Usage: script_connect.py BASE_URL SAMPLES; the key is in CLARIFAI_PAT. Nothing here knows of a certificate.
"""

import asyncio
import json
import sys
from importlib import metadata
from pathlib import Path

from clarifai.client.input import Inputs
from clarifai.client.model import Model
from clarifai.runners.utils.data_types import Image

base_url, samples = sys.argv[1:3]
PATHS = sorted(Path(samples).glob("*.png"))
DIGIT = PATHS[0].read_bytes()


def model(name, base=base_url):
    """The model by its URL."""
    return Model(url=f"https://clarifai.com/appliance/main/models/{name}", base_url=base)


def ids(reply, index=0):
    """Concept ids of one output."""
    return [concept.id for concept in reply.outputs[index].data.concepts]


async def asynchronous(made):
    """The asynchronous classic call."""
    return ids(await made.async_predict([Inputs.get_input_from_bytes("one", image_bytes=DIGIT)]))


digits, topics = model("digits"), model("ml-topics")
batch = [Inputs.get_input_from_bytes(f"input-{i}", image_bytes=PATHS[i % len(PATHS)].read_bytes()) for i in range(128)]
everything = digits.predict(batch)
print(
    json.dumps(
        {
            "version": f"clarifai {metadata.version('clarifai')}, grpcio {metadata.version('grpcio')}",
            "truth": [PATHS[i % len(PATHS)].stem.rsplit("-", 1)[1] for i in range(128)],
            "batch": [ids(everything, i)[0] for i in range(128)],
            "by_bytes": ids(digits.predict_by_bytes(DIGIT, input_type="image")),
            "by_ip": ids(
                model("digits", base_url.replace("localhost", "127.0.0.1")).predict_by_bytes(DIGIT, input_type="image")
            ),
            "async": asyncio.run(asynchronous(model("digits"))),
            "pythonic": [concept.id for concept in digits.predict(image=Image(bytes=DIGIT), max_concepts=3)],
            "text": topics.predict(text="k-means clusters the samples into groups")[0].id,
            "streamed": [ids(reply)[0] for reply in digits.generate(batch[:1])],
            "methods": sorted(digits.available_methods()),
            "versions": [found.model_version.id for found in digits.list_versions()],
        }
    )
)
