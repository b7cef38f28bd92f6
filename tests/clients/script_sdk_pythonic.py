"""Runs inside an environment with the stock Clarifai SDK 12: pythonic calls. Prints what came back as JSON.

Usage: script_sdk_pythonic.py BASE_URL ROOT_CERTIFICATE SAMPLES; the key is in CLARIFAI_PAT.
"""

import json
import sys
from pathlib import Path

from clarifai.client.model import Model
from clarifai.runners.utils.data_types import Image

base_url, root, samples = sys.argv[1:4]
PATHS = sorted(Path(samples).glob("*.png"))
PICTURE = Image(bytes=PATHS[0].read_bytes())


def model(name):
    """The model by its URL."""
    url = f"https://clarifai.com/appliance/main/models/{name}"
    return Model(url=url, base_url=base_url, root_certificates_path=root)


def failure(call):
    """What the SDK raises, as text."""
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


digits, topics = model("digits"), model("ml-topics")
batch = digits.predict([{"image": Image(bytes=path.read_bytes()), "max_concepts": 1} for path in PATHS])
results = {
    "methods": {name: sorted(digits.available_methods()) for name in ["digits"]},
    "first": [concept.id for concept in digits.predict(image=PICTURE)],
    "positional": [concept.id for concept in digits.predict(PICTURE)],
    "two": [concept.name for concept in digits.predict(image=PICTURE, max_concepts=2)],
    "min_value": [concept.id for concept in digits.predict(image=PICTURE, min_value=0.6)],
    "select": sorted(concept.id for concept in digits.predict(image=PICTURE, select_concepts=["4", "five"])),
    "truth": [path.stem.rsplit("-", 1)[1] for path in PATHS],
    "batch": [concepts[0].id for concepts in batch],
    "text": topics.predict(text="k-means clusters the samples into groups")[0].id,
    "max_201": failure(lambda: digits.predict(image=PICTURE, max_concepts=201)),
    "missing": failure(lambda: digits.predict(max_concepts=2)),
}
print(json.dumps(results))
