"""What an output costs between the model's arrays and the reply: `python -m bench.replies`; asserts nothing.

CPU microseconds an output in requests of 128, beside what protobuf takes to build and serialise the same reply from
messages; and CPU microseconds a request between its body and its pictures, beside plain parsing and reading.
"""

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import messages, replies
from appliance.api.parsing import parsed
from appliance.api.replies import ReplyWriter
from appliance.catalog.repository import Running, Version
from appliance.catalog.sections import EmbeddingOutput, ImageInput, ScoresOutput
from appliance.core.memory import MemoryBudget
from appliance.core.types import Array, Concept, ConceptScores, Embedding, ModelKey, PredictOptions, Tensors
from appliance.engine import plan
from appliance.tasks.base import ImageSide, Task
from appliance.tasks.classifier import Classifier
from appliance.tasks.embedder import Embedder
from appliance.tasks.tensors import RawTensors

_COUNT = 128
_KEY = ModelKey("appliance", "main", "model")
_REQ_ID = messages.new_id()


@dataclass(frozen=True, slots=True)
class Case:
    """What a model gave for a whole request."""

    name: str
    encode: Callable[[], Sequence[Any]]
    concepts: tuple[Concept, ...] = ()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    seconds = parser.parse_args().seconds
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)  # as the daemon has it
    print(f"{'128 outputs':<24}{'encode µs':>10}{'reply µs':>10}{'messages µs':>13}{'bytes':>8}   CPU an output")
    for case in _cases():
        _measure_reply(case, seconds)
    print(f"{'body → pictures':<24}{'µs':>10}{'plain µs':>13}   CPU a request")
    for count, size in ((1, 100_000), (128, 1000), (128, 5000), (128, 50_000), (5, 20_000_000)):
        _measure_request(count, size, seconds)


def _cases() -> list[Case]:
    random = np.random.default_rng(0)
    side = ImageSide(ImageInput(input="image", size=(1, 1)), True)

    def classifier(known: int, shown: int) -> Case:
        scores = random.random((_COUNT, known), np.float32)
        order = np.argsort(-scores, axis=1)[:, :200]
        arrays = {plan.TOP_VALUES: np.take_along_axis(scores, order, axis=1), plan.TOP_INDICES: order}
        task = Classifier(side, ScoresOutput(output="scores", activation="none"), True, 20)
        concepts = tuple(Concept(f"concept-{index:04}", f"name {index}") for index in range(known))
        return Case(f"{shown} of {known} concepts", _encoder(task, arrays, shown), concepts)

    def embedder(size: int) -> Case:
        task = Embedder(side, EmbeddingOutput(output="vector"), True)
        return Case(f"{size} floats", _encoder(task, {plan.EMBEDDING: random.random((_COUNT, size), np.float32)}, 20))

    def tensors(size: int) -> Case:
        task = RawTensors.__new__(RawTensors)  # how it encodes does not depend on the graph
        array = random.random((1, size), np.float32)
        return Case(f"tensors of {size}", lambda: [task.encode({"y": array}, 1, PredictOptions())[0]] * _COUNT)

    classifiers = [classifier(known, shown) for known, shown in ((10, 10), (1000, 20), (1000, 200))]
    return [*classifiers, embedder(384), embedder(768), tensors(10), tensors(1000), tensors(150_528)]


def _encoder(task: Task, arrays: dict[str, Array], shown: int) -> Callable[[], Sequence[Any]]:
    options = PredictOptions(max_concepts=shown)
    return lambda: task.encode(arrays, _COUNT, options)


def _measure_reply(case: Case, seconds: float) -> None:
    servable: Any = SimpleNamespace(key=_KEY, concepts=case.concepts, problem=None)
    config: Any = SimpleNamespace(key=_KEY, name="A model", model_type_id="visual-classifier")
    version: Version[Any] = Version("1", config, Path(), (), 1_700_000_000.25)  # type: ignore[arg-type]
    version.running = Running(servable)
    writer, answers = ReplyWriter(servable), case.encode()
    inputs = [resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(base64=b"x")))] * _COUNT
    request = service_pb2.PostModelOutputsRequest(inputs=inputs)

    def reply() -> bytes:
        success = replies.success(_REQ_ID)
        head = writer.head(writer.brief(version), success)
        pieces: list[Any] = []
        for given, answer in zip(request.inputs, writer.scored(answers), strict=True):
            pieces += writer.output(head, given, answer)
        return replies.good_reply(pieces, success).body

    def from_messages() -> bytes:
        brief, response = messages.model_brief(version), service_pb2.MultiOutputResponse()
        for given, answer in zip(request.inputs, answers, strict=True):
            output = response.outputs.add(id=messages.new_id(), model=brief, created_at=messages.now())
            messages.fill_input(output, given)
            _fill(output.data, answer, case.concepts)
        return bytes(response.SerializeToString())

    figures = [_microseconds(each, seconds) / _COUNT for each in (case.encode, reply, from_messages)]
    print(f"{case.name:<24}{figures[0]:>10.2f}{figures[1]:>10.2f}{figures[2]:>13.2f}{len(reply()) // _COUNT:>8}")


def _fill(data: resources_pb2.Data, answer: Any, concepts: Sequence[Concept]) -> None:
    if isinstance(answer, ConceptScores):
        for index, value in zip(answer.indices.tolist(), answer.values.tolist(), strict=True):
            data.concepts.add(id=concepts[index].id, name=concepts[index].name, value=value, app_id=_KEY.app_id)
    elif isinstance(answer, Embedding):
        data.embeddings.add(vector=answer.vector.tolist(), num_dimensions=len(answer.vector))
    elif isinstance(answer, Tensors):
        array = answer.arrays["y"]
        data.ndarray.buffer, data.ndarray.dtype = array.tobytes(), array.dtype.name
        data.ndarray.shape.extend(array.shape)


def _measure_request(count: int, size: int, seconds: float) -> None:
    image = resources_pb2.Image(base64=bytes(size))
    inputs = [resources_pb2.Input(data=resources_pb2.Data(image=image))] * count
    body = service_pb2.PostModelOutputsRequest(model_id="model", inputs=inputs).SerializeToString()

    async def read(apart: dict[int, Any] | None) -> list[Any]:
        with MemoryBudget(2**30).hold(len(body)) as memory:
            request = await parsed(service_pb2.PostModelOutputsRequest, body, memory, apart)
        found = apart or {}
        return [messages.payload_of("image", each.data, found.get(n, {})) for n, each in enumerate(request.inputs)]

    with asyncio.Runner() as runner:
        apart, plain = [
            _microseconds(lambda made=made: runner.run(read(made())), seconds) for made in (dict, lambda: None)
        ]
    print(f"{f'{count} of {size} bytes':<24}{apart:>10.0f}{plain:>13.0f}")


def _microseconds(function: Callable[[], object], seconds: float) -> float:
    """Median CPU time of a call, all threads."""
    function()
    times = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.process_time_ns()
        function()
        times.append(time.process_time_ns() - begun)
    return statistics.median(times) / 1000


if __name__ == "__main__":
    main()
