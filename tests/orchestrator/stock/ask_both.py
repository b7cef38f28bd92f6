"""Runs inside an environment with the stock Clarifai SDK 12: the same questions of an appliance, or of a centre.

Usage: ask_both.py BASE_URL ROOT_CERTIFICATE USER PICTURE PICTURE; the key is in CLARIFAI_PAT. Prints what came as JSON.
"""

import json
import sys
from pathlib import Path

from clarifai.client.model import Model
from clarifai.runners.utils.data_types import Image

base_url, root, user = sys.argv[1:4]
pictures = [Image(bytes=Path(file).read_bytes()) for file in sys.argv[4:]]
HERE = {"base_url": base_url, "root_certificates_path": root}


def failure(call):
    """What the SDK raises, as text, without what differs from call to call."""
    try:
        return f"no error: {call()}"
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return text.split("req_id")[0]


digits = Model(url=f"https://clarifai.com/{user}/main/models/digits", deployment_id="digits", **HERE)
many = Model(url=f"https://clarifai.com/{user}/main/models/many", deployment_id="many", **HERE)
results = {
    "methods": sorted(many.available_methods()),
    "digits": [digits.predict(image=picture)[0].name for picture in pictures],
    "scores": [[concept.value for concept in digits.predict(image=picture)] for picture in pictures],
    "batch": [found[0].name for found in digits.predict([{"image": picture} for picture in pictures])],
    "scale": many.scale(x=[1.0, 2.0], factor=3.0),
    "each": list(many.each(x=[1.0, 2.0, 3.0])),
    "converse": list(many.converse(x=iter([[1.0], [2.0], [3.0]]), factor=3.0)),
    "bad picture": failure(lambda: digits.predict(image=Image(bytes=b"none"))),
}
print(json.dumps(results))
