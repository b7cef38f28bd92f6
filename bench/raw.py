"""The other side of the comparison: ONNX Runtime alone, and decoding alone, in a process of their own.

`python -m bench.raw` reads a job (JSON) on its standard input and writes the figures (JSON) to its standard output.
"""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cpu import pin_to
from bench.workload import BATCHES, ROOT, Workload

_TIMEOUT_S = 600.0
_LONG_CALL_S = 3.0


def measure(workload: Workload, cpu: int, seconds: float) -> dict[str, Any]:
    """Measure in a process pinned to `cpu`, about `seconds` for each figure.

    Returns:
        plain: batch size (as text) → speed of the bundle's own graph on prepared floats.
        wrapped: the same for the graph as served: from uint8 pixels to the best concepts.
        decode: speed of the product's own decoding.
        concepts: for each picture the id of its best concept, by the bundle's own graph.
        A speed is {"items_per_s": …, "cpu_us": CPU microseconds for one item}.
    """
    job = {
        "bundle": str(workload.bundle),
        "pictures": [base64.b64encode(picture).decode("ascii") for picture in workload.pictures],
        "seconds": seconds,
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.raw"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=pin_to(cpu),
        timeout=_TIMEOUT_S,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _measure_here(bundle: Path, pictures: list[bytes], seconds: float) -> dict[str, Any]:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported
    import numpy as np
    import onnxruntime

    from appliance.catalog.bundle import concepts_of, find_versions, read_config
    from appliance.core.types import Payload
    from appliance.engine import plan as plans
    from appliance.tasks.base import ImageSide

    config, _, _ = read_config(bundle, "appliance", "main")
    assert config is not None
    assert config.onnx.image is not None
    assert config.onnx.scores is not None
    version = find_versions(bundle)[0]
    concepts = concepts_of(config, version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))  # as many as the appliance would take here

    def session(model: str | bytes) -> Any:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    plan = plans.make_plan(bundle, config, version, len(concepts))
    assert plan.model is not None
    sizes = [len(content) for content in plan.weights.values()]
    options.add_external_initializers_from_files_in_memory(list(plan.weights), list(plan.weights.values()), sizes)
    plain, wrapped = session(str(version.model_file)), session(plan.model)
    floats_side, pixels_side = ImageSide(config.onnx.image, wrapped=False), ImageSide(config.onnx.image, wrapped=True)
    payloads = [Payload(image=picture) for picture in pictures]
    floats = np.concatenate([floats_side.decode(payload).feeds[config.onnx.image.input] for payload in payloads])
    pixels = np.concatenate([pixels_side.decode(payload).feeds[plans.IMAGE] for payload in payloads])
    logits = plain.run([config.onnx.scores.output], {config.onnx.image.input: floats})[0]

    figures: dict[str, Any] = {
        "plain": {},
        "wrapped": {},
        "concepts": [concepts[index].id for index in logits.argmax(axis=1)],
    }
    for batch in BATCHES:
        rows = np.arange(batch) % len(pictures)
        runs = (
            ("plain", plain, [config.onnx.scores.output], {config.onnx.image.input: floats[rows]}),
            ("wrapped", wrapped, [plans.TOP_VALUES, plans.TOP_INDICES], {plans.IMAGE: pixels[rows]}),
        )
        for name, model, outputs, feeds in runs:
            figures[name][str(batch)] = _speed(_bound(model.run, outputs, feeds), batch, seconds)

    def decode_all() -> None:
        for payload in payloads:
            pixels_side.decode(payload)

    figures["decode"] = _speed(decode_all, len(payloads), seconds)
    return figures


def _bound(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _speed(function: Callable[[], object], items: int, seconds: float) -> dict[str, float]:
    """Speed of calls that do `items` items each, over at least so many seconds.

    The first call, which allocates, counts only if it takes so long that this cannot matter.
    """
    begun, cpu = time.perf_counter(), time.process_time()
    function()
    calls = 1
    if time.perf_counter() - begun < _LONG_CALL_S:
        begun, cpu, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - begun < seconds:
        function()
        calls += 1
    elapsed, used = time.perf_counter() - begun, time.process_time() - cpu
    return {"items_per_s": calls * items / elapsed, "cpu_us": used / (calls * items) * 1e6}


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    pictures = [base64.b64decode(picture) for picture in job["pictures"]]
    json.dump(_measure_here(Path(job["bundle"]), pictures, job["seconds"]), sys.stdout)


if __name__ == "__main__":
    main()
