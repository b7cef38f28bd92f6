"""Runs inside an environment with the stock Clarifai SDK 12: asks a model behind a centre. Prints what came as JSON.

Usage: ask.py BASE_URL ROOT_CERTIFICATE MODEL_URL DEPLOYMENT; the key is in CLARIFAI_PAT. What the SDK asks over a
connection of its own needs CLARIFAI_API_BASE and CLARIFAI_ROOT_CERTIFICATES_PATH.
"""

import json
import sys

from clarifai.client.input import Inputs
from clarifai.client.model import Model

base_url, root, url, deployment = sys.argv[1:5]
HERE = {"url": url, "base_url": base_url, "root_certificates_path": root}


def failure(call):
    """What the SDK raises, as text."""
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


model = Model(deployment_id=deployment, **HERE)
placed = Model(compute_cluster_id="local-runner-compute-cluster", nodepool_id="local-runner-nodepool", **HERE)
texts = [Inputs.get_text_input(f"i{i}", raw_text=text) for i, text in enumerate(("one", "two"))]
results = {
    "methods": sorted(model.available_methods()),
    "predict": model.predict(text="stressed"),
    "batch": model.predict([{"text": "one"}, {"text": "two"}]),
    "classic": [output.data.text.raw for output in model.predict(texts).outputs],
    "generate": list(model.letters(text="abc")),
    "stream": list(model.lines(texts=iter(["a", "bc"]))),
    "fail": failure(lambda: model.fail(text="luck")),
    "at a nodepool": placed.predict(text="drawer"),
    "by default": Model(**HERE).predict(text="lager"),
    "unknown deployment": failure(lambda: Model(deployment_id="other", **HERE)),
}
print(json.dumps(results))
