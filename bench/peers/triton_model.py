"""A model for Triton's Python backend; copied into its model repository.

The environment says what: BENCH_MODEL the ONNX file, BENCH_SITE where packages lie (the backend takes no PYTHONPATH).
"""

import os
import sys

sys.path.append(os.environ["BENCH_SITE"])

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as utils  # noqa: E402


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self._session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name

    def execute(self, requests: list) -> None:
        rows = [utils.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        array = self._session.run(None, {self._input: np.concatenate(rows)})[0]
        begin = 0
        for request, row in zip(requests, rows, strict=True):
            part = utils.Tensor(self._output, np.array(array[begin : begin + len(row)], np.float32))
            begin += len(row)
            reply = utils.InferenceResponse([part])
            request.get_response_sender().send(reply, utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
