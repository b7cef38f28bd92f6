"""A model for Triton's Python backend; copied into its model repository. BENCH_MODEL is the ONNX file."""

import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as utils


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self._session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name

    def execute(self, requests: list) -> list:
        rows = [utils.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        array = self._session.run(None, {self._input: np.concatenate(rows)})[0]
        replies, begin = [], 0
        for row in rows:
            part = array[begin : begin + len(row)]
            begin += len(row)
            replies.append(utils.InferenceResponse([utils.Tensor(self._output, part)]))
        return replies
