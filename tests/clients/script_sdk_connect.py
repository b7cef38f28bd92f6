"""Runs inside an environment with a stock Clarifai SDK: ways to reach the appliance, one prediction each.

Usage: script_sdk_connect.py PICTURE CASES; CASES is a JSON object: case → [arguments of Model, variables].
Prints case → the concept ids of the picture, or the error that its user sees. Each case has a process of its own,
forked before anything was sent: the SDK remembers hosts, and gRPC its trust.
"""

import json
import logging
import multiprocessing
import os
import sys
from pathlib import Path

from clarifai.client.auth import stub
from clarifai.client.model import Model

logging.disable(logging.CRITICAL)
_helper, _attempts, *_others = stub.create_stub.__defaults__
stub.create_stub.__defaults__ = (_helper, 1, *_others)  # else ten tries, five seconds apart


def outcome(arguments, variables):
    """What a prediction over a model made with these gives."""
    os.environ.update(variables)
    arguments = {"url": "https://clarifai.com/appliance/main/models/digits"} | arguments
    try:
        reply = Model(**arguments).predict_by_bytes(Path(sys.argv[1]).read_bytes(), input_type="image")
        return [concept.id for concept in reply.outputs[0].data.concepts]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


cases = json.loads(sys.argv[2])
with multiprocessing.get_context("fork").Pool(4, maxtasksperchild=1) as pool:
    print(json.dumps(dict(zip(cases, pool.starmap(outcome, cases.values(), chunksize=1), strict=True))))
