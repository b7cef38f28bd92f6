"""KServe requests as tests make them."""

from typing import Any

from appliance.api import inference_pb2 as pb


def infer_request(model: str, *tensors: tuple[str, str, list[int], bytes], **fields: Any) -> pb.ModelInferRequest:
    """A request whose tensors are raw."""
    request = pb.ModelInferRequest(model_name=model, **fields)
    for name, datatype, shape, raw in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    return request
