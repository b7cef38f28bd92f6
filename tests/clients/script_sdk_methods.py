"""Runs inside an environment with the stock Clarifai SDK 12: the forms of its pythonic methods and of its async calls.

Usage: script_sdk_methods.py BASE_URL ROOT_CERTIFICATE SAMPLES WEB; the key is in CLARIFAI_PAT. Prints a JSON object:
form → what came back, or the error that its user sees.
"""

import asyncio
import io
import json
import logging
import sys
import types
from pathlib import Path

import numpy
import PIL.Image
from clarifai.client import model_client
from clarifai.client.input import Inputs
from clarifai.client.model import Model
from clarifai.runners.utils.data_types import Image, Text

base_url, root, samples, web = sys.argv[1:5]
logging.disable(logging.CRITICAL)
PATHS = sorted(Path(samples).glob("*.png"))
DIGIT = PATHS[0].read_bytes()
PICTURE = Image(bytes=DIGIT)
PIL_PICTURE = PIL.Image.open(io.BytesIO(DIGIT))
TEXT = "Decision trees are grown on bootstrap samples and vote together."


def model(name):
    """The model by its URL."""
    url = f"https://clarifai.com/appliance/main/models/{name}"
    return Model(url=url, base_url=base_url, root_certificates_path=root)


digits, topics = model("digits"), model("ml-topics")


def ids(concepts):
    """Ids of the concepts that a method returned."""
    return [concept.id for concept in concepts]


def output_ids(reply):
    """Ids of the concepts of a reply's first output."""
    return ids(reply.outputs[0].data.concepts)


def image():
    """An input of the classic kind."""
    return Inputs.get_input_from_bytes("", image_bytes=DIGIT)


def with_proto():
    """What was returned, and that the reply came with it."""
    found, reply = digits.predict(image=PICTURE, with_proto=True)
    return [ids(found), reply.status.code, reply.outputs[0].data.parts[0].id]


def batch(count):
    """The best concept of each of so many pictures."""
    pictures = [Image(bytes=PATHS[i % len(PATHS)].read_bytes()) for i in range(count)]
    return [found[0].id for found in digits.predict([{"image": picture, "max_concepts": 1} for picture in pictures])]


PYTHONIC = {
    "`available_methods()`": lambda: list(digits.available_methods()),
    "`method_signature(…)`": lambda: digits.method_signature("predict"),
    "`generate_client_script()`": lambda: digits.generate_client_script(),
    "`predict(image=Image(bytes=…))`": lambda: ids(digits.predict(image=PICTURE)),
    "`predict(image=Image(url=…))`": lambda: ids(digits.predict(image=Image(url=f"{web}/{PATHS[0].name}"))),
    "`predict(image=Image.from_pil(…))`": lambda: ids(digits.predict(image=Image.from_pil(PIL_PICTURE))),
    "`predict(image=Image.from_numpy(…))`": lambda: ids(
        digits.predict(image=Image.from_numpy(numpy.asarray(PIL_PICTURE)))
    ),
    "`predict(image=<PIL image>)`": lambda: ids(digits.predict(image=PIL_PICTURE)),
    "`predict(Image(…))`, positional": lambda: ids(digits.predict(PICTURE)),
    "`predict(Image(…), 3)`, limits too": lambda: ids(digits.predict(PICTURE, 3)),
    "`predict(text='…')`": lambda: ids(topics.predict(text=TEXT)),
    "`predict('…')`": lambda: ids(topics.predict(TEXT)),
    "`predict(text=Text(…))`": lambda: ids(topics.predict(text=Text(TEXT))),
    "`predict(…, max_concepts=3)`": lambda: ids(digits.predict(image=PICTURE, max_concepts=3)),
    "`predict(…, min_value=0.6)`": lambda: ids(digits.predict(image=PICTURE, min_value=0.6)),
    "`predict(…, min_value=0.0)`": lambda: ids(digits.predict(image=PICTURE, min_value=0.0)),
    "`predict(…, select_concepts=['4', 'five'])`": lambda: sorted(
        ids(digits.predict(image=PICTURE, select_concepts=["4", "five"]))
    ),
    "`predict([{…}, {…}])`, a batch of 128": lambda: batch(128),
    "`predict([{…}, …])`, a batch of 129": lambda: batch(129),
    "`predict(…, with_proto=True)`": with_proto,
    "`model.client.predict(…)`": lambda: ids(digits.client.predict(image=PICTURE)),
    "an unknown argument": lambda: ids(digits.predict(image=PICTURE, threshold=0.5)),
    "too many arguments": lambda: ids(digits.predict(PICTURE, 3, 0.5, [], "more")),
    "an argument given twice": lambda: ids(digits.predict(PICTURE, image=PICTURE)),
    "a required argument that is missing": lambda: ids(digits.predict(max_concepts=3)),
    "an argument of the wrong type": lambda: ids(digits.predict(image=PICTURE, max_concepts="many")),
    "`max_concepts=201` as argument": lambda: ids(digits.predict(image=PICTURE, max_concepts=201)),
    "a method that the model has not": lambda: digits.analyze(image=PICTURE),
    "a picture that is none": lambda: ids(digits.predict(image=Image(bytes=b"no picture"))),
}


async def twice(call):
    """What a coroutine's own coroutine gives."""
    return await (await call)


async def collected(stream):
    """The messages of an async stream."""
    return [output_ids(reply) async for reply in await stream]


async def once():
    """What one `await` gives."""
    found = await digits.async_predict(image=PICTURE)
    kind = type(found).__name__
    if kind == "coroutine":
        found.close()
    return kind


async def hidden_error():
    """What is left of an error; the ten seconds that the SDK tries again for go by at once."""
    clock = iter(range(0, 10**6, 6))
    real = model_client.time, model_client.asyncio
    model_client.time = types.SimpleNamespace(time=lambda: next(clock))
    model_client.asyncio = types.SimpleNamespace(sleep=lambda _: asyncio.sleep(0))
    try:
        return output_ids(await digits.async_predict([Inputs.get_input_from_bytes("", image_bytes=b"no picture")]))
    finally:
        model_client.time, model_client.asyncio = real


async def gathered():
    """Several at a time."""
    return [output_ids(reply) for reply in await asyncio.gather(*(digits.async_predict([image()]) for _ in range(8)))]


ASYNC = {
    "`await async_predict([Input, …])`": lambda: then(output_ids, digits.async_predict([image()])),
    "`await async_predict(inputs=[Input, …], output_config=…)`": lambda: then(
        output_ids, digits.async_predict(inputs=[image()], output_config={"max_concepts": 3})
    ),
    "`await (await async_predict(image=…))`": lambda: then(ids, twice(digits.async_predict(image=PICTURE))),
    "`await async_predict(image=…)`": once,
    "`await (await client.predict(image=…))`": lambda: then(ids, twice(digits.async_client.predict(image=PICTURE))),
    "`asyncio.gather` of eight": gathered,
    "an error of `async_predict`": hidden_error,
    "`async for … in await async_generate([Input])`": lambda: collected(digits.async_generate([image()])),
    "`async for … in await async_stream(iter([[Input], …]))`": lambda: collected(
        digits.async_stream(iter([[image()], [image()]]))
    ),
}


async def then(read, call):
    """What is read from what a call gives."""
    return read(await call)


async def outcomes():
    """Each async form in turn, in one loop, as its stub needs it."""
    found = {}
    for form, call in ASYNC.items():
        try:
            found[form] = await call()
        except Exception as error:
            found[form] = f"{type(error).__name__}: {error}"
    return found


def outcome(call):
    """What a form gives, or what its user reads."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


results = {form: outcome(call) for form, call in PYTHONIC.items()}
print(json.dumps(results | asyncio.run(outcomes())))
