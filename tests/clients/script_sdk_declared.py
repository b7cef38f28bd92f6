"""Runs inside an environment with the stock Clarifai SDK 12: a bundle's own methods. Prints what came back as JSON.

Usage: script_sdk_declared.py BASE_URL ROOT_CERTIFICATE PICTURE; the key is in CLARIFAI_PAT.
"""

import asyncio
import inspect
import json
import sys
from pathlib import Path

import numpy as np
from clarifai.client.model import Model
from clarifai.runners.utils.data_types import Audio, Concept, Frame, Image, NamedFields, Region, Text, Video

base_url, root, picture = sys.argv[1:4]
PICTURE = Image(bytes=Path(picture).read_bytes())
WAV = Path(picture).with_suffix(".wav").read_bytes()
URL = "https://clarifai.com/tester/tests/models/methods"


def model():
    """The model by its URL."""
    return Model(url=URL, base_url=base_url, root_certificates_path=root)


def failure(call):
    """What the SDK raises, as text."""
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def seen(regions):
    return [[region.concepts[0].name, round(region.concepts[0].value, 3), region.box] for region in regions]


m = model()
results = {
    "available": sorted(m.available_methods()),
    "signature": m.method_signature("analyze"),
    "script": m.generate_client_script(),
    # the issue's own example
    "analyze": seen(m.analyze(image=PICTURE, threshold=0.3)),
    "analyze_default": seen(m.analyze(PICTURE)),
    "analyze_positional": seen(m.analyze(PICTURE, 0.7)),
    # a batch
    "batch": [seen(each) for each in m.analyze([{"image": PICTURE}, {"image": PICTURE, "threshold": 0.7}])],
    # each type, there and back
    "int": m.echo_int(x=7),
    "zero": m.echo_int(x=0),
    "float": m.echo_float(x=0.5),
    "bool": [m.echo_bool(x=flag) for flag in (True, False)],
    "str": m.echo_str(x="yes"),
    "text": m.echo_text(x=Text("yes")).text,
    "bytes": list(m.echo_bytes(x=b"\x01\x02")),
    "ndarray": m.echo_ndarray(x=np.array([1, 2, 3], np.float32)).tolist(),
    "json": m.echo_json(x=[1.0, 2.5, 3.0]),
    "image": m.echo_image(x=PICTURE).to_numpy().shape,
    "frame": m.echo_frame(x=Frame(image=PICTURE)).image.to_numpy().shape,
    "audio": len(m.echo_audio(x=Audio(bytes=WAV)).bytes) == len(WAV),
    "video": list(m.echo_video(x=Video(bytes=b"\x05\x06")).bytes),
    "concept": m.echo_concept(x=Concept("dog", 0.5)).name,
    "concepts": [c.name for c in m.echo_concepts(x=[Concept("dog", 0.5), Concept("cat", 0.25)], max_concepts=1)],
    "region": m.echo_region(x=Region(box=[0.125, 0.25, 0.5, 0.75])),
    "list": m.echo_list(x=[[1, 2], [3, 4]]),
    "tuple": m.both_tuple(pair=([1.0, 2.0], [3.0, 4.0])),
    "named": dict(m.both_named(pair=NamedFields(a=[1.0, 2.0], b=[3.0, 4.0])).items()),
    # streams
    "each": list(m.each(x=[1.0, 2.0, 3.0])),
    "generate": list(m.generate(x=[1.0, 2.0])),
    "converse": list(m.converse(x=iter([[1.0], [2.0], [3.0]]), factor=3.0)),
    "stream": list(m.stream(x=iter([[1.0], [2.0]]))),
    # errors
    "unknown_argument": failure(lambda: m.analyze(image=PICTURE, treshold=0.3)),
    "missing_argument": failure(lambda: m.analyze(threshold=0.3)),
    "out_of_range": failure(lambda: m.analyze(image=PICTURE, threshold=1.5)),
    "bad_choice": failure(lambda: m.echo_str(x="maybe")),
    "bad_item": failure(lambda: list(m.each(x=[]))),
    "unknown_method": failure(lambda: m.nothing(x=1)),
    # a client that must ask the server, as the version has no signatures for it
    "old_form": m.predict_by_bytes(b"yes", input_type="text").outputs[0].data.text.raw,
}
value, response = m.echo_int(x=7, with_proto=True)
results["with_proto"] = [value, response.status.code, response.outputs[0].data.parts[0].id]


async def settled(value):
    """In 12.5.0 what a coroutine gives may be one again."""
    while inspect.isawaitable(value):
        value = await value
    return value


async def in_async():
    """The same where a loop runs."""
    n = model()
    calls = n.async_client
    return {
        "async_plain": [n.analyze is n.client.analyze, n.client.async_stub is None],
        "async_unary": seen(await settled(calls.analyze(image=PICTURE, threshold=0.3))),
        "async_many": await asyncio.gather(*(settled(calls.echo_int(x=i)) for i in range(5))),
        "async_each": [item async for item in await settled(calls.each(x=[1.0, 2.0]))],
        "async_generate": [item async for item in await settled(n.async_generate(x=[1.0, 2.0]))],
        "async_predict": await settled(n.async_predict(x="yes")),
    }


results |= asyncio.run(in_async())
print(json.dumps(results))
