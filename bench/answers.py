"""Whether a reply is the right one: each output a success, and what it says what the plain graph says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from clarifai_grpc.grpc.api import service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2

Expected = dict[str, Any]
"""What the plain graph gives for one input: {"concept": id of the best one}, {"vector": unit vector}, {"regions": how
many}, or {"array": numbers}."""

_TOLERANCE = 2e-3
"""Of vectors and arrays: sums are made in another order when rows share a run."""


def problem(reply: bytes, expected: Sequence[Expected]) -> str:
    """What is wrong with a reply to one input for each entry of `expected`, or ""."""
    message = service_pb2.MultiOutputResponse.FromString(reply)
    if message.status.code != status_code_pb2.SUCCESS:
        return f"status {message.status.code} {message.status.description}: {message.status.details}"
    if len(message.outputs) != len(expected):
        return f"{len(message.outputs)} outputs for {len(expected)} inputs"
    for output, wanted in zip(message.outputs, expected, strict=True):
        if output.status.code != status_code_pb2.SUCCESS:
            return f"output status {output.status.code} {output.status.description}"
        if wrong := _wrong(output.data, wanted):
            return wrong
    return ""


def _wrong(data: Any, wanted: Expected) -> str:
    if "concept" in wanted:
        found = data.concepts
        return (
            "" if found and found[0].id == wanted["concept"] else "an output whose best concept is not the model's own"
        )
    if "regions" in wanted:
        # A score on the threshold may fall on either side when rows share a run.
        near = abs(len(data.regions) - wanted["regions"]) <= 1 + wanted["regions"] // 50
        return "" if near else f"{len(data.regions)} regions, not {wanted['regions']}"
    if "vector" in wanted:
        vector = np.array(data.embeddings[0].vector if data.embeddings else [], np.float32)
        return _differs(vector, wanted["vector"])
    return _differs(np.frombuffer(data.ndarray.buffer, np.float32), wanted["array"])


def _differs(found: "np.ndarray[Any, Any]", wanted: Sequence[float]) -> str:
    right = np.array(wanted, np.float32)
    if found.shape != right.shape or not np.allclose(found, right, rtol=_TOLERANCE, atol=_TOLERANCE):
        return "an output that is not the model's own"
    return ""
