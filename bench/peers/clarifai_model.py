"""A model as a user of Clarifai's runner writes it; copied into the folder that the runner is given.

The environment says which: BENCH_MODEL the ONNX file, BENCH_TASK "array" or "picture".
"""

import os

import numpy as np
import onnxruntime
from clarifai.runners.models.model_class import ModelClass
from clarifai.runners.utils.data_types import Concept, Image


class _Session:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self._session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)
        self._name = self._session.get_inputs()[0].name

    def run(self, row: np.ndarray) -> np.ndarray:
        return self._session.run(None, {self._name: row[None]})[0][0]


if os.environ["BENCH_TASK"] == "picture":

    class Picture(ModelClass):
        def load_model(self) -> None:
            self.session = _Session()

        @ModelClass.method
        def predict(self, image: Image) -> list[Concept]:
            from PIL import Image as Pillow

            picture = image.to_pil().convert("RGB")
            shorter = 256 / min(picture.size)
            size = (round(picture.width * shorter), round(picture.height * shorter))
            picture = picture.resize(size, Pillow.Resampling.BILINEAR)
            left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
            pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32) / 255
            pixels = (pixels - np.float32((0.485, 0.456, 0.406))) / np.float32((0.229, 0.224, 0.225))
            logits = self.session.run(pixels.transpose(2, 0, 1).astype(np.float32))
            scores = np.exp(logits - logits.max())
            scores /= scores.sum()
            best = np.argsort(-scores)[:20]
            return [Concept(id=f"class-{i:04}", name=f"class {i}", value=float(scores[i])) for i in best]

else:

    class Array(ModelClass):
        def load_model(self) -> None:
            self.session = _Session()

        @ModelClass.method
        def predict(self, x: np.ndarray) -> np.ndarray:
            return self.session.run(x)
