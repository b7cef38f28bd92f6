"""A model behind KServe's Python server: `kserve_server.py FILE HTTP_PORT GRPC_PORT`, in KServe's own environment."""

import os
import sys

import kserve
import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse
from kserve.utils.utils import generate_uuid


class Model(kserve.Model):
    def __init__(self, file: str) -> None:
        super().__init__("model")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self._session = onnxruntime.InferenceSession(file, options)
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name
        self.ready = True

    async def predict(self, payload: InferRequest, headers: dict | None = None, response_headers: dict | None = None):
        array = self._session.run(None, {self._input: payload.inputs[0].as_numpy()})[0]
        output = InferOutput(name=self._output, shape=list(array.shape), datatype="FP32")
        output.set_data_from_numpy(array, binary_data=True)
        return InferResponse(response_id=generate_uuid(), model_name="model", infer_outputs=[output])


if __name__ == "__main__":
    file, http_port, grpc_port = sys.argv[1:]
    sys.argv = sys.argv[:1]
    server = kserve.ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1, enable_grpc=True)
    server.start([Model(file)])
