"""ONNX Runtime alone on the device, every way that it can be fed, in a process of its own.

`python -m bench.gpu.raw` reads a job (JSON) on its standard input and writes the figures (JSON) to its standard output.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.gpu.subjects import Subject
from bench.ort import asked

WAYS = {
    "numpy": "`session.run` on numpy arrays, onnxruntime's options as they come",
    "nhwc": "the same with `prefer_nhwc`, which the appliance does not set",
    "slot": "the appliance's Session: pinned slot, IO binding, its options",
    "threads": "the same from two threads",
    "resident": "IO binding with the input on the GPU already: what the kernels can do",
    "graph": "the appliance's captured CUDA graph, input and output travelling",
}
_TIMEOUT_S = 400.0


def measure(
    subject: Subject, cpus: tuple[int, ...], device: str, batches: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Measure in a process pinned to `cpus`, about `seconds` for each figure.

    Returns:
        ways: way → batch (as text) → items a second.
        decode: items a second that the product's decoding makes on all the CPUs.
        answers: for each picture what `bench.answers` expects, by this device in this precision.
        load_s, notes.
    """
    job = {
        "bundle": str(subject.workload.bundle),
        "inputs": [value.hex() for value in subject.workload.inputs if isinstance(value, bytes)],
        "device": device,
        "batches": list(batches),
        "seconds": seconds,
    }
    return asked("bench.gpu.raw", job, cpus, _TIMEOUT_S)


# ---- the process -----------------------------------------------------------------------------------------------------


def _measure_here(job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    from appliance.catalog.bundle import concepts_of, find_versions, read_config
    from appliance.core.types import Payload
    from appliance.engine import plan as plans
    from appliance.engine.session import Session, resolve_device
    from appliance.tasks.base import ImageSide

    bundle = Path(job["bundle"])
    config, _, _ = read_config(bundle, "appliance", "main")
    assert config is not None
    assert config.onnx.image is not None
    version = find_versions(bundle)[0]
    concepts = concepts_of(config, version)
    plan = plans.make_plan(bundle, config, version, len(concepts))
    assert plan.model is not None
    device = resolve_device(job["device"])
    side = ImageSide(config.onnx.image, wrapped=True)
    payloads = [Payload(image=bytes.fromhex(text)) for text in job["inputs"]]
    pixels = np.concatenate([side.decode(payload).feeds[plans.IMAGE] for payload in payloads])
    outputs = [plans.TOP_VALUES, plans.TOP_INDICES]
    threads = len(os.sched_getaffinity(0))
    begun = time.perf_counter()
    graph = plans.only(plan.model, outputs)  # as it is loaded
    session = Session(graph, plan.file.parent, device, threads, weights=plan.weights)
    figures: dict[str, Any] = {"load_s": round(time.perf_counter() - begun, 2), "ways": {}, "notes": []}
    best = session.run(outputs, {plans.IMAGE: pixels})[1][:, 0]
    figures["answers"] = [{"concept": concepts[index].id} for index in best]
    figures["decode"] = _rate(
        [lambda: [side.decode(payload) for payload in payloads]] * threads, len(payloads), job["seconds"]
    )
    feeds = {batch: {plans.IMAGE: pixels[np.arange(batch) % len(pixels)]} for batch in job["batches"]}

    def take(way: str, batch: int, runs: list[Callable[[], object]]) -> None:
        figures["ways"].setdefault(way, {})[str(batch)] = _rate(runs, batch, job["seconds"])

    def ours(batch: int) -> Callable[[], object]:
        return lambda: session.run(outputs, feeds[batch])

    plain = _plain(graph, plan.file.parent, device, threads)
    nhwc = _plain(graph, plan.file.parent, device, threads, prefer_nhwc="1") if device.kind == "gpu" else None
    for batch in job["batches"]:
        take("numpy", batch, [lambda batch=batch: plain.run(outputs, feeds[batch])])  # type: ignore[misc]
        if nhwc is not None:
            take("nhwc", batch, [lambda batch=batch: nhwc.run(outputs, feeds[batch])])  # type: ignore[misc]
        take("slot", batch, [ours(batch)])
        take("threads", batch, [ours(batch), ours(batch)])
        if device.kind == "gpu":
            take("resident", batch, [_resident(plain, device.index, outputs, feeds[batch])])
    if device.kind == "gpu":
        figures["notes"].append(_with_graphs(session, outputs, feeds))
        for batch in job["batches"]:
            take("graph", batch, [ours(batch)])
    return figures


def _plain(model: bytes, folder: Path, device: Any, threads: int, **more: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1 if device.kind == "gpu" else threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    gpu = [("CUDAExecutionProvider", {"device_id": str(device.index), "use_tf32": "0", **more})]
    cpu: list[Any] = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model, options, providers=(gpu if device.kind == "gpu" else []) + cpu)


def _resident(session: Any, index: int, outputs: Sequence[str], feeds: Mapping[str, Any]) -> Callable[[], object]:
    import onnxruntime

    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", index) for name, array in feeds.items()}

    def run() -> None:
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cuda", index)
        session.run_with_iobinding(binding)

    return run


def _with_graphs(session: Any, outputs: Sequence[str], feeds: Mapping[int, Mapping[str, Any]]) -> str:
    """Make the session replay graphs whether they win or not, for the figure's sake; what it found."""
    from appliance.engine import binding

    binding.WINS = float("inf")
    return str(session.capture(outputs, list(feeds.values())))


def _rate(runs: Sequence[Callable[[], object]], items: int, seconds: float) -> float:
    """Items a second of runs of `items` each, one after the other in each of the threads: 1 / median of their times."""
    times: list[list[float]] = [[] for _ in runs]

    def work(place: int) -> None:
        runs[place]()
        runs[place]()
        end = time.perf_counter() + seconds
        before = time.perf_counter()
        while before < end or len(times[place]) < 3:
            runs[place]()
            after = time.perf_counter()
            times[place].append(after - before)
            before = after

    threads = [threading.Thread(target=work, args=(place,)) for place in range(1, len(runs))]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    return round(sum(items / median(taken) for taken in times), 1)


def main() -> None:
    """Do the job on standard input."""
    json.dump(_measure_here(json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
