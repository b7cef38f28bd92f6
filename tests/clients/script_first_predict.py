"""Runs inside an environment with a stock Clarifai SDK: the README's snippet against any appliance.

Usage: script_first_predict.py BASE_URL ROOT_CERTIFICATE PICTURE, and the key in CLARIFAI_PAT. Prints a JSON string, the
first concept's name.
"""

import json
import sys

from clarifai.client.model import Model

base_url, root, picture = sys.argv[1:4]
model = Model(
    url="https://clarifai.com/appliance/main/models/digits",
    base_url=base_url,
    root_certificates_path=root,
)
print(json.dumps(model.predict_by_filepath(picture, input_type="image").outputs[0].data.concepts[0].name))
