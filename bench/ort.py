"""ONNX Runtime alone, and decoding alone, in a process of their own.

`python -m bench.ort` reads a job (JSON) on its standard input and writes the figures (JSON) to its standard output.
"""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.cpu import pin_to
from bench.workload import ROOT, Workload

_TIMEOUT_S = 900.0
_LONG_CALL_S = 3.0


def measure(workload: Workload, cpus: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Measure in a process pinned to `cpus`, about `seconds` for each figure.

    Returns:
        plain: batch size (as text) → speed of the bundle's own graph on prepared rows; of one session that uses all
            CPUs and one session for each CPU, the faster.
        wrapped: the same for the graph as served, for pictures from uint8 pixels to the best concepts.
        decode: speed of the product's own decoding, or tokenising.
        answers: for each input what `answers.problem` expects, by the bundle's own graph.
        A speed is {"items_per_s": …, "cpu_us": CPU microseconds for one item, "sessions": how many}.
    """
    job = {
        "bundle": str(workload.bundle),
        "kind": workload.kind,
        "inputs": [base64.b64encode(_bytes(given)).decode("ascii") for given in workload.inputs],
        "batches": workload.batches,
        "seconds": seconds,
    }
    return asked("bench.ort", job, cpus, _TIMEOUT_S)


def asked(module: str, job: Mapping[str, Any], cpus: tuple[int, ...], timeout_s: float) -> dict[str, Any]:
    """What a module of ours, run in a process pinned to `cpus`, makes of a job: JSON in, JSON out."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=pin_to(*cpus),
        timeout=timeout_s,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _bytes(given: bytes | str) -> bytes:
    return given.encode() if isinstance(given, str) else given


# ---- the process -----------------------------------------------------------------------------------------------------


class _Subject:
    """One bundle: its plain graph and its wrapped one, with rows for both.

    Attributes:
        plain, wrapped: graph (a file's name, or bytes), outputs to ask for, rows: input name → array of all inputs.
        decode: the product's own decoding of all inputs.
        folder: of the file.
        answer: outputs of the plain graph → what `answers.problem` expects for each input.
    """

    def __init__(self, bundle: Path, kind: str, inputs: list[bytes]) -> None:
        import numpy as np

        from appliance.catalog.bundle import concepts_of, find_versions, read_config
        from appliance.core.types import Payload
        from appliance.engine import plan as plans
        from appliance.media.text import TextTokenizer
        from appliance.tasks.base import ImageSide, TextSide

        config, _, _ = read_config(bundle, "appliance", "main")
        assert config is not None
        section, version = config.onnx, find_versions(bundle)[0]
        concepts = concepts_of(config, version)
        plan = plans.make_plan(bundle, config, version, len(concepts))
        file, self.folder = str(version.model_file), str(version.model_file.parent)
        graph = plan.model or file
        image = section.image or _declared_picture(section)
        if kind == "tensor":
            rows = {plan.inputs[0].name: np.stack([np.frombuffer(given, np.float32) for given in inputs])}
            name = plan.outputs[0].name
            self.plain, self.wrapped = (file, [name], rows), (graph, [name], rows)
            self.decode: Callable[[], object] = lambda: [np.frombuffer(given, np.float32) for given in inputs]
            self.answer = lambda found: [{"array": row.tolist()} for row in found[0]]
            return
        payloads = [Payload(image=given) if kind == "image" else Payload(text=given.decode()) for given in inputs]
        if kind == "image":
            assert image is not None
            own: Any = ImageSide(image, wrapped=False)
            served: Any = ImageSide(image, wrapped=plan.wrapped_input)
        else:
            assert section.text is not None
            tokenizer = TextTokenizer(version.path / section.text.tokenizer, section.text.max_tokens)
            own = served = TextSide(section.text, tokenizer, {})
        rows, served_rows = _stacked(own, payloads), _stacked(served, payloads)
        self.decode = lambda: [served.decode(payload) for payload in payloads]
        if section.scores:
            self.plain = (file, [section.scores.output], rows)
            self.wrapped = (graph, [plans.TOP_VALUES, plans.TOP_INDICES], served_rows)
            self.answer = lambda found: [{"concept": concepts[index].id} for index in found[0].argmax(axis=1)]
        elif section.embedding:
            self.plain = (file, [section.embedding.output], rows)
            wrapped = plans.EMBEDDING if plan.wrapped_output else section.embedding.output
            self.wrapped = (graph, [wrapped], served_rows)
            mask = rows[section.text.inputs.mask] if section.text and section.text.inputs.mask else None
            self.answer = lambda found: [{"vector": vector.tolist()} for vector in _pooled(found[0], mask)]
        else:
            outputs = [str(section.methods[0].returns.output), str(section.methods[0].returns.scores)]
            self.plain = self.wrapped = (file, outputs, rows)
            self.answer = lambda found: [{"regions": int((row.max(axis=1) >= 0.25).sum())} for row in found[1]]


def _declared_picture(section: Any) -> Any:
    """The picture that a declared method takes, None if there is no such method."""
    from appliance.catalog.sections import ImageInput

    argument = section.methods[0].arguments[0] if section.methods else None
    if argument is None or argument.image is None:
        return None
    return ImageInput(**argument.image.model_dump(), input=argument.input or argument.name)


def _stacked(side: Any, payloads: list[Any]) -> dict[str, Any]:
    import numpy as np

    rows = [side.decode(payload).feeds for payload in payloads]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _pooled(hidden: Any, mask: Any) -> Any:
    """The mean over tokens, of length 1."""
    import numpy as np

    weights = mask[:, :, None].astype(np.float32)
    vectors = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _measure_here(bundle: Path, kind: str, inputs: list[bytes], batches: list[int], seconds: float) -> dict[str, Any]:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported
    import numpy as np
    import onnxruntime

    cpus = len(os.sched_getaffinity(0))
    subject = _Subject(bundle, kind, inputs)

    def sessions(model: str | bytes, count: int) -> list[Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpus // count
        if isinstance(model, bytes):  # a wrapped graph's weights stay in the bundle's file
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", subject.folder)
        return [onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"]) for _ in range(count)]

    figures: dict[str, Any] = {"plain": {}, "wrapped": {}}
    for name, (model, outputs, rows) in (("plain", subject.plain), ("wrapped", subject.wrapped)):
        for count in sorted({1, cpus}):
            ready = sessions(model, count)
            if name == "plain" and count == 1:
                figures["answers"] = subject.answer(ready[0].run(outputs, rows))
            for batch in batches:
                chosen = np.arange(batch) % len(inputs)
                feeds = {key: values[chosen] for key, values in rows.items()}
                speed = _speed([_bound(session.run, outputs, feeds) for session in ready], batch, seconds)
                known = figures[name].get(str(batch))
                if known is None or speed["items_per_s"] > known["items_per_s"]:
                    figures[name][str(batch)] = speed | {"sessions": count}
    figures["decode"] = _speed([subject.decode] * cpus, len(inputs), seconds)
    return figures


def _bound(function: Callable[..., object], outputs: list[str], feeds: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: function(outputs, feeds)


def _speed(functions: list[Callable[[], object]], items: int, seconds: float) -> dict[str, float]:
    """Speed of calls that do `items` items each, a thread for each function, over at least so many seconds.

    The first call, which allocates, counts only if it takes so long that this cannot matter.
    """
    calls = [0] * len(functions)

    def work(place: int, until: float) -> None:
        while not calls[place] or time.perf_counter() < until:
            functions[place]()
            calls[place] += 1

    def together(until: float) -> None:
        if len(functions) == 1:
            work(0, until)
            return
        threads = [threading.Thread(target=work, args=(place, until)) for place in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    begun, cpu = time.perf_counter(), time.process_time()
    together(begun)
    if time.perf_counter() - begun < _LONG_CALL_S:
        begun, cpu, calls = time.perf_counter(), time.process_time(), [0] * len(functions)
        together(begun + seconds)
    elapsed, used, done = time.perf_counter() - begun, time.process_time() - cpu, sum(calls) * items
    return {"items_per_s": done / elapsed, "cpu_us": used / done * 1e6}


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    inputs = [base64.b64decode(given) for given in job["inputs"]]
    json.dump(_measure_here(Path(job["bundle"]), job["kind"], inputs, job["batches"], job["seconds"]), sys.stdout)


if __name__ == "__main__":
    main()
