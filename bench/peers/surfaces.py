"""The same question in each server's own protocol: its bytes, and whether an answer is right."""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import inference_pb2
from bench.peers.models import Model
from bench.workload import METHOD

_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Surface:
    """A protocol. Attributes: http1: HTTP/1.1 with JSON, else gRPC. right: model, reply → whether it is the answer."""

    name: str
    path: str
    http1: bool
    request: Callable[[Model, str], bytes]
    right: Callable[[Model, bytes], bool]


def _v2_request(model: Model, model_id: str) -> bytes:
    request = inference_pb2.ModelInferRequest(model_name=model_id)
    tensor = request.inputs.add(name=model.input, datatype=model.v2_type)
    tensor.shape.extend((1, *model.row.shape))
    request.raw_input_contents.append(model.row.tobytes())
    return bytes(request.SerializeToString())


def _v2_right(model: Model, reply: bytes) -> bool:
    message = inference_pb2.ModelInferResponse.FromString(reply)
    if message.raw_output_contents:
        return _near(model, np.frombuffer(message.raw_output_contents[0], np.float32))
    return _near(model, np.array(message.outputs[0].contents.fp32_contents, np.float32))


def _clarifai_request(model: Model, model_id: str) -> bytes:
    if model.task == "picture":
        data = resources_pb2.Data(image=resources_pb2.Image(base64=model.row))
    else:
        array = resources_pb2.NDArray(buffer=model.row.tobytes(), shape=model.row.shape, dtype=model.row.dtype.name)
        data = resources_pb2.Data(ndarray=array)
    ids = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")
    request = service_pb2.PostModelOutputsRequest(user_app_id=ids, model_id=model_id)
    request.inputs.add(data=data)
    return bytes(request.SerializeToString())


def _clarifai_right(model: Model, reply: bytes) -> bool:
    message = service_pb2.MultiOutputResponse.FromString(reply)
    if message.status.code != 10000 or len(message.outputs) != 1:
        return False
    data = message.outputs[0].data
    if model.task == "picture":
        return bool(data.concepts) and len(data.concepts) == 20 and bool(data.concepts[0].id == model.expected)
    array = data.ndarray if data.HasField("ndarray") else data.parts[0].data.ndarray
    return _near(model, np.frombuffer(array.buffer, np.float32))


def _http_request(model: Model, model_id: str) -> bytes:
    return json.dumps({"x": base64.b64encode(model.row.tobytes()).decode()}).encode()


def _http_right(model: Model, reply: bytes) -> bool:
    return _near(model, np.frombuffer(base64.b64decode(json.loads(reply)["y"]), np.float32))


def _near(model: Model, found: Any) -> bool:
    return found.size == model.expected.size and np.allclose(found.ravel(), model.expected, _TOLERANCE, _TOLERANCE)


SURFACES = {
    "v2": Surface("V2 gRPC", "/inference.GRPCInferenceService/ModelInfer", False, _v2_request, _v2_right),
    "clarifai": Surface("Clarifai gRPC", METHOD, False, _clarifai_request, _clarifai_right),
    "http": Surface("HTTP JSON", "/predict", True, _http_request, _http_right),
}
