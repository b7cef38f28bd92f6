"""A model behind LitServe, in LitServe's own environment.

The environment says what, because LitServe's workers run this file again without arguments: BENCH_MODEL the ONNX file,
BENCH_PORT, BENCH_TYPE and BENCH_SHAPE of a row.

A tensor comes and goes as base64 in JSON: LitServe has no form for raw bytes that is also batched.
"""

import base64
import os

import litserve
import numpy as np
import onnxruntime

KIND, SHAPE = os.environ["BENCH_TYPE"], [int(axis) for axis in os.environ["BENCH_SHAPE"].split(",")]


class Model(litserve.LitAPI):
    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self._session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)
        self._input = self._session.get_inputs()[0].name

    def decode_request(self, request: dict) -> np.ndarray:
        return np.frombuffer(base64.b64decode(request["x"]), KIND).reshape(SHAPE)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self._session.run(None, {self._input: x})[0]

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict:
        return {"y": base64.b64encode(output.tobytes()).decode()}


if __name__ == "__main__":
    server = litserve.LitServer(Model(max_batch_size=32, batch_timeout=0.002), accelerator="cpu", workers_per_device=1)
    server.run(
        port=int(os.environ["BENCH_PORT"]),
        host="127.0.0.1",
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )
