"""Runs inside an environment with a stock Clarifai SDK, old or new: every classic form, by what its user writes.

Usage: script_sdk_forms.py BASE_URL ROOT_CERTIFICATE SAMPLES WEB SLOW_KEY; the key is in CLARIFAI_PAT, SLOW_KEY is of a
principal with a rate of one request a second. Prints a JSON object: form → what came back, or the error that its user
sees.
"""

import json
import logging
import os
import sys
import time
import types
from pathlib import Path

from clarifai.client.app import App
from clarifai.client.auth import stub
from clarifai.client.input import Inputs
from clarifai.client.model import Model
from clarifai.client.user import User
from clarifai_grpc.grpc.api import resources_pb2

base_url, root, samples, web, slow_key = sys.argv[1:6]
logging.disable(logging.CRITICAL)
stub.time = types.SimpleNamespace(sleep=lambda _: None)  # five seconds before it tries again
PATHS = sorted(Path(samples).glob("*.png"))
PATH = str(PATHS[0])
DIGIT = PATHS[0].read_bytes()
TEXT = b"Decision trees are grown on bootstrap samples and vote together."
HERE = {"base_url": base_url, "root_certificates_path": root}
DIGITS = "https://clarifai.com/appliance/main/models/digits"
KEY = os.environ["CLARIFAI_PAT"]

digits = Model(url=DIGITS, **HERE)
topics = Model(url="https://clarifai.com/appliance/main/models/ml-topics", **HERE)


def ids(reply):
    """Concept ids of the first output."""
    return [concept.id for concept in reply.outputs[0].data.concepts]


def predicted(model):
    """What a model made this way says of the digit."""
    return ids(model.predict_by_bytes(DIGIT, input_type="image"))


def limited(**config):
    """The digit, with these limits."""
    return ids(digits.predict_by_bytes(DIGIT, input_type="image", output_config=config))


def streamed(replies):
    """Concept ids of each message of a stream."""
    return [ids(reply) for reply in replies]


def image(input_id="", data=DIGIT):
    """An input."""
    return Inputs.get_input_from_bytes(input_id, image_bytes=data)


def fresh(url=DIGITS):
    """A model that has not learnt its input type."""
    return Model(url=url, **HERE)


def throttled():
    """What the second of two predictions of a slow principal gives, and for how long the SDK wanted to wait."""
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        time.sleep(1.1)

    before, stub.time.sleep = stub.time.sleep, sleep
    try:
        model = Model(url=DIGITS, pat=slow_key, **HERE)
        return [[predicted(model) for _ in range(2)][1], sorted(set(waits))]
    finally:
        stub.time.sleep = before


def batch(count):
    """Ids and best concepts of that many inputs."""
    inputs = [image(f"demo_{i}", PATHS[i % len(PATHS)].read_bytes()) for i in range(count)]
    outputs = digits.predict(inputs).outputs
    return [[output.input.id, output.data.concepts[0].id] for output in outputs]


app = App(user_id="appliance", app_id="main", **HERE)
user = User(user_id="appliance", **HERE)
concept = resources_pb2.Concept

FORMS = {
    # ---- the model ----
    "`Model(url=…)`": lambda: predicted(fresh()),
    '`Model("https://…")`, the URL as first argument': lambda: predicted(Model(DIGITS, **HERE)),
    "`Model(url=…/versions/1)`": lambda: predicted(fresh(f"{DIGITS}/versions/1")),
    "`Model(model_id=…, user_id=…, app_id=…)`": lambda: predicted(
        Model(model_id="digits", user_id="appliance", app_id="main", **HERE)
    ),
    "`Model(model_id=…, model_version={'id': …})`": lambda: predicted(
        Model(model_id="digits", model_version={"id": "1"}, user_id="appliance", app_id="main", **HERE)
    ),
    "`Model(pat=…)`": lambda: predicted(Model(url=DIGITS, pat=KEY, **HERE)),
    "an unknown model": lambda: predicted(fresh("https://clarifai.com/appliance/main/models/nothing")),
    "an unknown version": lambda: predicted(fresh(f"{DIGITS}/versions/9")),
    "a wrong PAT": lambda: predicted(Model(url=DIGITS, pat="0" * 64, **HERE)),
    "a principal over its rate: the SDK waits five seconds and tries again": throttled,
    # ---- inputs ----
    "`predict([Input, …])`": lambda: ids(digits.predict([image()])),
    "`predict(inputs=[Input, …])`": lambda: ids(digits.predict(inputs=[image()])),
    "`predict_by_bytes(…, input_type='image')`": lambda: ids(digits.predict_by_bytes(DIGIT, input_type="image")),
    "`predict_by_bytes(…, input_type='text')`": lambda: ids(topics.predict_by_bytes(TEXT, input_type="text")),
    "`predict_by_bytes('…', 'text')`, a str": lambda: ids(topics.predict_by_bytes(TEXT.decode(), "text")),
    "`predict_by_bytes(…)` without input_type, an image": lambda: ids(fresh().predict_by_bytes(DIGIT)),
    "`predict_by_bytes(…)` without input_type, a text": lambda: ids(
        fresh("https://clarifai.com/appliance/main/models/ml-topics").predict_by_bytes(TEXT)
    ),
    "`predict_by_filepath(…, input_type='image')`": lambda: ids(digits.predict_by_filepath(PATH, input_type="image")),
    "`predict_by_filepath(…)` without input_type": lambda: ids(fresh().predict_by_filepath(PATH)),
    "`predict_by_url(…, input_type='image')`": lambda: ids(
        digits.predict_by_url(f"{web}/{PATHS[0].name}", input_type="image")
    ),
    "`predict_by_url(…, input_type='text')`": lambda: ids(topics.predict_by_url(f"{web}/text.txt", input_type="text")),
    "`predict_by_url(…)` without input_type": lambda: ids(fresh().predict_by_url(f"{web}/{PATHS[0].name}")),
    "`Inputs.get_input_from_file`": lambda: ids(digits.predict([Inputs.get_input_from_file("", image_file=PATH)])),
    "`Inputs.get_input_from_url`": lambda: ids(
        digits.predict([Inputs.get_input_from_url("", image_url=f"{web}/{PATHS[0].name}")])
    ),
    "`Inputs.get_text_input`": lambda: ids(topics.predict([Inputs.get_text_input("", raw_text=TEXT.decode())])),
    "a batch of 128": lambda: batch(128),
    "a batch of 129": lambda: batch(129),
    "bytes that are no image": lambda: ids(digits.predict_by_bytes(b"no picture", input_type="image")),
    "a URL of a host that is not allowed": lambda: ids(
        digits.predict_by_url("http://169.254.169.254/latest/meta-data", input_type="image")
    ),
    # ---- what to say about them ----
    "`inference_params={…}`": lambda: ids(
        digits.predict_by_bytes(DIGIT, input_type="image", inference_params={"temperature": "0.7", "max_tokens": 30})
    ),
    "`output_config={'max_concepts': 3}`": lambda: limited(max_concepts=3),
    "`output_config={'max_concepts': 201}`": lambda: limited(max_concepts=201),
    "`output_config={'min_value': 0.6}`": lambda: limited(min_value=0.6),
    "`output_config={'select_concepts': [Concept(id=…), Concept(name=…)]}`": lambda: sorted(
        limited(select_concepts=[concept(id="4"), concept(name="five")])
    ),
    "`output_config={'select_concepts': [{'id': …}]}`": lambda: limited(select_concepts=[{"id": "4"}]),
    "`output_config={'select_concepts': ['name']}`": lambda: limited(select_concepts=["five"]),
    "`output_config={'select_concepts': …}` that matches in part": lambda: limited(
        select_concepts=[concept(id="4"), concept(id="no such")]
    ),
    "`output_config={'select_concepts': …}` that matches nothing": lambda: limited(
        select_concepts=[concept(id="none")]
    ),
    # ---- streams ----
    "`generate([Input])`": lambda: streamed(digits.generate([image()])),
    "`generate_by_bytes(…)`": lambda: streamed(digits.generate_by_bytes(DIGIT, "image")),
    "`generate_by_filepath(…)`": lambda: streamed(digits.generate_by_filepath(PATH, "image")),
    "`generate_by_url(…)`": lambda: streamed(digits.generate_by_url(f"{web}/{PATHS[0].name}", "image")),
    "`generate(…, output_config=…)`": lambda: streamed(digits.generate([image()], output_config={"max_concepts": 3})),
    "`stream(iter([[Input], …]))`": lambda: streamed(digits.stream(iter([[image()], [image()]]))),
    "`stream_by_bytes(iter([…]))`": lambda: streamed(digits.stream_by_bytes(iter([DIGIT, DIGIT]), "image")),
    "`stream_by_filepath(…)`": lambda: streamed(digits.stream_by_filepath(PATH, "image")),
    "`stream_by_url(iter([…]))`": lambda: streamed(
        digits.stream_by_url(iter([f"{web}/{PATHS[0].name}"]), "image"),
    ),
    "`stream(…, output_config=…)`": lambda: streamed(
        digits.stream(iter([[image()]]), output_config={"max_concepts": 3}),
    ),
    # ---- what there is ----
    "`list_versions()`": lambda: [found.model_version.id for found in digits.list_versions()],
    "`list_versions(page_no=1, per_page=1)`": lambda: [
        found.model_version.id for found in digits.list_versions(page_no=1, per_page=1)
    ],
    "`load_info()`": lambda: [fresh().load_info(), digits.model_info.id][1:],
    "`load_input_types()`": lambda: loaded_types(),
    "`App.list_models()`": lambda: sorted(model.id for model in app.list_models()),
    "`App.list_concepts()`": lambda: f"{len(list(app.list_concepts()))} concepts",
    "`App.model(…).predict_by_bytes(…)`": lambda: predicted(app.model("digits")),
    "`App.list_trainable_model_types()`": lambda: list(app.list_trainable_model_types()),
    "`User.app(…)`": lambda: user.app("main").id,
    "`User.list_apps()`": lambda: [found.id for found in user.list_apps()],
}


def loaded_types():
    """What the SDK finds out when it is not told."""
    model = fresh()
    model.load_input_types()
    return list(model.input_types)


if hasattr(User, "get_user_info"):
    FORMS["`User.get_user_info('me')`"] = lambda: user.get_user_info("me").user.id
if hasattr(User, "list_models"):
    FORMS["`User.list_models()`"] = lambda: sorted(row["id"] for row in user.list_models(show=False))
    FORMS["`User.list_models(return_clarifai_model=True)`"] = lambda: sorted(
        model.id for model in user.list_models(show=False, return_clarifai_model=True)
    )


def outcome(call):
    """What a form gives, or what its user reads."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


print(json.dumps({form: outcome(call) for form, call in FORMS.items()}))
