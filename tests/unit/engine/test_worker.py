"""The engine in this process: a graph is loaded, probed, warmed up, and served in the mode that the probes allow."""

import asyncio
import gc
import json
import os
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import graphs
from support.cuda_doubles import Host, OnHost
from support.engine_graphs import engine, pixel_model, plain, planned, write_pixels
from support.waiting import eventually_async

from appliance.core.config import Engine as EngineSettings
from appliance.core.errors import BundleInvalid, DeviceError, Draining
from appliance.core.metrics import Metrics
from appliance.engine import curves, gpu, probes, tensorrt, worker
from appliance.engine import plan as plans
from appliance.engine import session as sessions
from appliance.engine.admission import content_of
from appliance.engine.batcher import Batcher, powers_of_two
from appliance.engine.session import gpu_problem
from appliance.engine.transport import LoadRequest
from appliance.engine.worker import LocalEngine, LocalModel
from appliance.media.text import TextTokenizer
from appliance.tasks.base import ImageSide, TextSide
from appliance.tasks.tensors import RawTensors


def raw_request(folder: Path, max_rows: int | None = 8, device: str | None = None) -> LoadRequest:
    """What the raw-tensor task asks the engine for; few rows, so that measuring is quick."""
    plan = planned(folder)[3]
    task = RawTensors(plan.inputs, plan.outputs)
    names = task.compared()
    return LoadRequest(("raw", "1"), plan, device, names, names, max_rows, task.examples())


def image_request(folder: Path, max_rows: int | None = 8) -> LoadRequest:
    """What an image task asks for."""
    config, _, _, plan = planned(folder)
    assert config.onnx.image is not None
    examples = ImageSide(config.onnx.image, True).examples()
    return LoadRequest(
        ("pixels", "1"), plan, None, (plans.SCORES,), (plans.TOP_VALUES, plans.TOP_INDICES), max_rows, examples
    )


async def load_raw(folder: Path, model: Any, **settings: Any) -> LocalModel:
    """A raw bundle of that graph, loaded."""
    return await engine().load(raw_request(graphs.write_raw(folder, model), **settings))


async def ask(model: LocalModel, values: Any, name: str = "x", output: str = "y") -> np.ndarray:
    """The answer to these rows."""
    outcome = await model.submit({name: np.asarray(values)}, (output,), None, "ada")
    assert not outcome.errors
    return outcome.arrays[output]


async def test_an_independent_graph_merges_rows(tmp_path: Path) -> None:
    """Up to the size that was measured, or that the bundle says."""
    model = await load_raw(tmp_path / "b", graphs.identity_model(), max_rows=4)
    assert (model.batching.mode, model.batching.max_rows) == ("rows", 4)
    assert model.batching.reason == "the probes show rows independent"
    values = np.random.default_rng(0).random((30, 3), np.float32)
    np.testing.assert_array_equal(await ask(model, values), values)
    model.close()


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (graphs.dynamic_quantize_model(), "DynamicQuantizeLinear takes one scale over all rows"),
        (graphs.batch_mean_model(), "'y' of a row changes with its neighbours"),
    ],
)
async def test_a_graph_that_mixes_rows_runs_one_at_a_time(tmp_path: Path, graph: Any, reason: str) -> None:
    """Bit for bit the answer of a row alone, however many neighbours ask at the same time."""
    model = await load_raw(tmp_path / "b", graph)
    assert model.batching.mode == "separate"
    assert reason in model.batching.reason
    values = np.random.default_rng(0).random((12, 3), np.float32)
    values[5] *= 1000
    alone = np.concatenate([await ask(model, row[None]) for row in values])
    together = await ask(model, values)
    singles = await asyncio.gather(*(ask(model, row[None]) for row in values))
    assert together.tobytes() == alone.tobytes()
    assert np.concatenate(singles).tobytes() == alone.tobytes()
    model.close()


async def test_outputs_that_nobody_reads_are_not_computed(tmp_path: Path) -> None:
    """A declared method may read one of several; here the other one fails at every run."""
    model = graphs.identity_model()
    model.graph.node.append(helper.make_node("Gather", ["x", "far"], ["broken"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([99]), "far"))
    model.graph.output.append(helper.make_tensor_value_info("broken", TensorProto.FLOAT, ["rows", 3]))
    request = raw_request(graphs.write_raw(tmp_path / "b", model))
    loaded = await engine().load(replace(request, compared=("y",), served=("y",)))
    assert (await ask(loaded, np.ones((2, 3), np.float32))).tolist() == [[1, 1, 1], [1, 1, 1]]
    loaded.close()


async def test_a_neighbour_cannot_change_an_answer(tmp_path: Path) -> None:
    """Merged rows give what they give alone, within the rounding of single precision."""
    model = await engine().load(image_request(write_pixels(tmp_path / "b", pixel_model(50), concepts=50)))
    assert model.batching.mode == "rows"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), dtype=np.uint8)
    pixels[7] = 255
    names = (plans.SCORES,)
    alone = [(await model.submit({plans.IMAGE: p[None]}, names, None, "a")).arrays[plans.SCORES] for p in pixels]
    futures = [model.submit({plans.IMAGE: p[None]}, names, None, f"p{i % 3}") for i, p in enumerate(pixels)]
    together = [outcome.arrays[plans.SCORES] for outcome in await asyncio.gather(*futures)]
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), atol=1e-5, rtol=0)
    model.close()


async def test_a_batch_axis_fixed_at_one_runs_one_at_a_time(tmp_path: Path) -> None:
    """A picture model exported without a dynamic batch is served, and the reason says what to export."""
    model = await engine().load(image_request(write_pixels(tmp_path / "b", pixel_model(5, batch=1))))
    assert model.batching.mode == "separate"
    assert model.batching.reason == "the batch axis of 'appliance_image' is fixed at 1; export it as dynamic"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    outcome = await model.submit({plans.IMAGE: pixels}, (plans.SCORES,), None, "ada")
    assert outcome.arrays[plans.SCORES].shape == (5, 5)
    model.close()


@pytest.mark.parametrize(
    ("graph", "values", "answer"),
    [
        (graphs.fixed_batch_model(), [[1, 2, 3]], [[2, 4, 6]]),
        (graphs.no_batch_axis_model(), [1, 2, 3], 6),
        (graphs.identity_model(("n", "m")), [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
    ],
    ids=["fixed batch", "no batch axis", "unknown axes"],
)
async def test_what_cannot_be_probed_runs_whole(tmp_path: Path, graph: Any, values: Any, answer: Any) -> None:
    """Each submission is one run, as it came."""
    model = await load_raw(tmp_path / "b", graph)
    assert (model.batching.mode, model.batching.max_rows) == ("whole", 1)
    assert (await ask(model, np.array(values, np.float32))).tolist() == answer
    model.close()


async def test_a_graph_that_fails_its_first_run_is_an_invalid_bundle(tmp_path: Path) -> None:
    """Before it is announced as ready."""
    model = pixel_model(5)
    model.graph.node[2].input[1] = "short"
    model.graph.initializer.append(graphs.numpy_helper.from_array(np.ones((7, 5), np.float32), "short"))
    del model.graph.initializer[0]
    with pytest.raises(BundleInvalid, match=r"fails on a trial input|cannot load the graph"):
        await engine().load(image_request(write_pixels(tmp_path / "b", model)))


async def test_only_one_row_fails_when_only_one_row_is_bad(tmp_path: Path) -> None:
    """A real graph, a real error from onnxruntime, and the neighbours' real answers."""
    model = await load_raw(tmp_path / "b", graphs.gather_model())
    assert model.batching.mode == "rows"
    index = np.array([[1], [2], [5000], [4], [5]], np.int64)
    outcome = await model.submit({"index": index}, ("y",), None, "ada")
    assert set(outcome.errors) == {2}
    assert "5000" not in str(outcome.errors[2])
    assert outcome.arrays["y"][[0, 1, 3, 4], 0].tolist() == [1, 2, 4, 5]
    model.close()


async def test_every_bucket_is_warm_before_the_model_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first caller does not pay for the first run of a shape, and little else is run: that is for idle hours."""
    runs = spied_runs(monkeypatch)
    folder = graphs.write_text_classifier(tmp_path / "b", max_tokens=40)
    model = await engine().load(text_request(folder))
    assert {width for _, width in runs} == {16, 32, 40}
    assert max(rows for rows, _ in runs) in (3, probes.MAX_ROWS)  # the second for a model that is tiny on this machine
    model.close()


def spied_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what sessions run from now on."""
    shapes: list[tuple[int, ...]] = []
    original = worker.Session.run

    def spy(self: Any, outputs: Any, feeds: Any) -> Any:
        shapes.append(next(iter(feeds.values())).shape)
        return original(self, outputs, feeds)

    monkeypatch.setattr(worker.Session, "run", spy)
    return shapes


def text_request(folder: Path, max_rows: int | None = None) -> LoadRequest:
    """What a text task asks for: three buckets."""
    config, version, _, plan = planned(folder)
    assert config.onnx.text is not None
    side = TextSide(config.onnx.text, TextTokenizer(version.path / "tokenizer.json", 40), {})
    return LoadRequest(("t", "1"), plan, None, (plans.SCORES,), (plans.TOP_VALUES,), max_rows, side.examples())


# ---- what is measured while nothing is asked for ---------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that counts as idle after a blink."""
    monkeypatch.setattr(curves, "_QUIET_S", 0.01)
    monkeypatch.setattr(curves, "_LOOK_S", 0.001)


async def measured(engine: LocalEngine) -> None:
    """Return when nothing is left to measure."""
    assert engine._measuring is not None
    await asyncio.wait_for(engine._measuring, 60)


async def test_each_bucket_has_its_own_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what its first run took, until there are curves: shorter texts share a run where long ones do not."""
    seconds = iter([0.001, 0.01, 0.2])
    monkeypatch.setattr(worker, "_first_runs", lambda session, request: [next(seconds) for _ in request.examples])
    monkeypatch.setattr(curves, "shortest_run", lambda *arguments, **more: 0.2)
    model = await engine().load(text_request(graphs.write_text_classifier(tmp_path / "b", max_tokens=40)))
    assert model.batching.buckets == (32, 4, 1)
    assert model.batching.max_rows == 32
    model.close()


@pytest.mark.usefixtures("hasty")
async def test_the_size_is_measured_while_the_engine_is_idle(tmp_path: Path) -> None:
    """Until then a default; then, for each bucket, what was measured. The batcher that runs is a new one."""
    own = engine()
    model = await own.load(text_request(graphs.write_text_classifier(tmp_path / "b", max_tokens=40)))
    assert model.batching.curve.startswith("not measured yet: defaults")
    assert len(model.batching.buckets) == 3
    assert model.batching.max_rows == max(model.batching.buckets)
    before = model._batcher
    await measured(own)
    assert model.batching.curve.startswith("measured 20")
    assert "bucket 3: rows a run 1: " in model.batching.curve
    assert len(model.batching.buckets) == 3
    assert model.batching.max_rows == max(model.batching.buckets)
    assert set(model.batching.buckets) <= set(powers_of_two(probes.MAX_ROWS))
    assert model._batcher is not before
    assert model._batcher.max_rows == model.batching.max_rows
    ids = np.ones((5, 32), np.int64)
    outcome = await model.submit({"input_ids": ids, "attention_mask": ids}, (plans.SCORES,), None, "ada")
    assert len(outcome.arrays[plans.SCORES]) == 5
    model.close()


@pytest.mark.usefixtures("hasty")
async def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart one run a bucket is all there is, and the same sizes hold; with other weights all begins anew."""
    folder = graphs.write_text_classifier(tmp_path / "b", max_tokens=40)
    own = kept_engine(tmp_path)
    first = await own.load(text_request(folder))
    await measured(own)
    first.close()
    runs = spied_runs(monkeypatch)
    again = kept_engine(tmp_path)
    second = await again.load(text_request(folder))
    assert runs == [(1, 16), (1, 32), (1, 40)]
    assert second.batching == replace(first.batching, curve=second.batching.curve)
    assert ", kept; " in second.batching.curve
    assert again._measuring is None
    second.close()
    graph = folder / "1" / "model.onnx"
    content = onnx.load(graph)
    values = numpy_helper.to_array(content.graph.initializer[0])
    content.graph.initializer[0].CopyFrom(numpy_helper.from_array(values + 1, content.graph.initializer[0].name))
    onnx.save(content, graph)
    third = await again.load(text_request(folder))
    assert third.batching.curve.startswith("not measured yet")
    third.close()


@pytest.mark.usefixtures("hasty")
async def test_what_the_probes_showed_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that must not share a run do not share one after a restart, with the same reason."""
    folder = graphs.write_raw(tmp_path / "b", graphs.batch_mean_model())
    own = kept_engine(tmp_path)
    first = await own.load(raw_request(folder, max_rows=None))
    first.close()
    runs = spied_runs(monkeypatch)
    second = await kept_engine(tmp_path).load(raw_request(folder, max_rows=None))
    assert runs == [(1, 3)]
    assert (second.batching.mode, second.batching.reason) == ("separate", first.batching.reason)
    second.close()


def kept_engine(folder: Path) -> LocalEngine:
    """An engine that keeps what it measures in there."""
    return LocalEngine(EngineSettings(device="cpu", threads=1), Metrics(), folder)


@pytest.mark.usefixtures("hasty")
async def test_requests_come_before_measurements(tmp_path: Path) -> None:
    """While rows keep coming nothing is measured; each gets its answer; when they stop, it goes on."""
    own = engine()
    model = await own.load(raw_request(graphs.write_raw(tmp_path / "b"), max_rows=None))
    for number in range(50):
        value = np.full((2, 3), number, np.float32)
        np.testing.assert_array_equal(await ask(model, value), value)
        assert model.batching.curve.startswith("not measured yet")
    await measured(own)
    assert model.batching.curve.startswith("measured")
    model.close()


@pytest.mark.usefixtures("hasty")
async def test_answers_are_right_while_it_is_measured(tmp_path: Path) -> None:
    """Also in the moment in which a new batcher takes over: nothing is lost, and nothing is refused."""
    own = engine()
    model = await own.load(raw_request(graphs.write_raw(tmp_path / "b"), max_rows=None))
    assert own._measuring is not None
    number = 0
    while not own._measuring.done():
        number += 1
        value = np.full((2, 3), number, np.float32)
        np.testing.assert_array_equal(await ask(model, value), value)
        await asyncio.sleep(0.05)  # longer than a step takes: it must get on
        assert number < 1000
    model.close()


@pytest.mark.usefixtures("hasty")
async def test_a_model_that_goes_is_not_measured(tmp_path: Path) -> None:
    """Nothing of it stays behind, and the next one has its turn."""
    own = engine()
    first = await own.load(raw_request(graphs.write_raw(tmp_path / "a"), max_rows=None))
    second = await own.load(raw_request(graphs.write_raw(tmp_path / "b"), max_rows=None))
    first.close()
    await measured(own)
    assert first.batching.curve.startswith("not measured yet")
    assert second.batching.curve.startswith("measured")
    second.close()
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None


async def test_what_was_read_of_the_files_goes_once_it_is_loaded(tmp_path: Path) -> None:
    """A model has its weights once: not those of the file beside those of the session."""
    folder = write_pixels(tmp_path / "b", pixel_model(50), concepts=50)
    request = image_request(folder, max_rows=None)
    (content,) = request.plan.weights.values()
    model = await engine().load(request)
    assert model.unmeasured is not None
    del request
    # The loop, and the load's thread on its way out, have it in their hands for a moment more.
    await eventually_async(lambda: gc.collect() >= 0 and sys.getrefcount(content) == 2)  # the name, and the argument
    model.close()


@pytest.mark.usefixtures("hasty")
async def test_what_the_bundle_says_is_not_measured(tmp_path: Path) -> None:
    """Its rows, its runs at a time and its threads are taken as they are."""
    own = LocalEngine(EngineSettings(device="cpu", threads=2), Metrics())
    request = replace(raw_request(graphs.write_raw(tmp_path / "b"), max_rows=5), parallel=3, threads=1)
    model = await own.load(request)
    assert (model.batching.max_rows, model.batching.parallel, model.batching.curve) == (5, 3, "")
    assert own._measuring is None
    model.close()


@pytest.mark.usefixtures("hasty")
async def test_runs_at_a_time_are_measured_where_a_run_is_no_trifle(tmp_path: Path) -> None:
    """With two threads, one run at a time and two are compared, for rows that must not share a run too."""
    own = LocalEngine(EngineSettings(device="cpu", threads=2), Metrics())
    folder = graphs.write_raw(tmp_path / "b", graphs.slow_model(rounds=60))
    plan = planned(folder)[3]
    task = RawTensors(plan.inputs, plan.outputs)
    names = task.compared()
    model = await own.load(LoadRequest(("slow", "1"), plan, None, names, names, None, task.examples()))
    await measured(own)
    assert "runs at a time 1: " in model.batching.curve
    assert ", 2: " in model.batching.curve.rpartition("runs at a time")[2]
    assert model.batching.parallel in (1, 2)
    model.close()


@pytest.mark.skipif(gpu_problem(0) is None, reason="a GPU works here")
async def test_a_bundle_that_needs_a_gpu_is_refused_without_one(tmp_path: Path) -> None:
    """The bundle's device overrides the engine's, and never falls back."""
    with pytest.raises(DeviceError):
        await load_raw(tmp_path / "b", graphs.identity_model(), device="gpu")
    model = await load_raw(tmp_path / "c", graphs.identity_model(), device="auto")
    assert str(model.device) == "cpu"
    model.close()


async def test_closing_a_model_answers_who_comes_later(tmp_path: Path) -> None:
    """Drained first, nothing is lost."""
    model = await load_raw(tmp_path / "b", graphs.identity_model())
    await asyncio.wait_for(model.drain(), 5)
    model.close()
    with pytest.raises(Draining):
        await ask(model, np.ones((1, 3), np.float32))
    assert model.death is None
    assert model.waiting_rows == 0


class Threads:
    """Marks that write down on which threads it was told what."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int, bool]] = []

    def running(self, start: int, count: int) -> None:
        self.told.append(("running", start, count, threading.current_thread() is threading.main_thread()))

    def idle(self, start: int, count: int) -> None:
        self.told.append(("idle", start, count, threading.current_thread() is threading.main_thread()))


async def test_rows_in_quarantine_never_run_on_the_loop(tmp_path: Path) -> None:
    """One by one on the worker's thread, though others are quick enough for the loop."""
    model = await load_raw(tmp_path / "b", graphs.identity_model())
    assert model.prompt(2)
    values = np.ones((2, 3), np.float32)
    quick, alone = Threads(), Threads()
    await model.submit({"x": values}, ("y",), None, "ada", marks=quick)
    outcome = await model.submit({"x": values * 2}, ("y",), None, "ada", alone=True, marks=alone)
    assert np.array_equal(outcome.arrays["y"], values * 2)
    assert quick.told == [("running", 0, 2, True), ("idle", 0, 2, True)]
    assert alone.told == [(what, row, 1, False) for row in range(2) for what in ("running", "idle")]
    model.close()


async def test_models_of_one_engine_share_its_gate_and_bounds(tmp_path: Path) -> None:
    """A run that is to be alone is alone in the process."""
    shared = engine()
    one, two = [await shared.load(raw_request(graphs.write_raw(tmp_path / name))) for name in ("b", "c")]
    assert one._batcher.gate is two._batcher.gate
    assert one._batcher._queue_bytes == EngineSettings().queue_size
    for loaded in (one, two):
        loaded.close()


async def test_several_workers_on_one_session_give_its_answers(tmp_path: Path) -> None:
    """Bit for bit, and a run that never ends is ended without its neighbours."""
    session = plain(graphs.write_raw(tmp_path / "b", graphs.endless_model(only_above=1000.0)))
    batcher = Batcher(session, max_rows=8, queue_rows=1000, parallel=2)
    endless = batcher.submit({"x": np.full((1, 2), 2000, np.float32)}, ("y",), None, "eve")
    await eventually_async(lambda: session._runs)
    values = np.arange(400, dtype=np.float32).reshape(200, 2)
    futures = [batcher.submit({"x": values[i : i + 5]}, ("y",), None, f"p{i % 3}") for i in range(0, 200, 5)]
    for start, outcome in zip(range(0, 200, 5), await asyncio.gather(*futures), strict=True):
        assert np.array_equal(outcome.arrays["y"], values[start : start + 5])
    endless.cancel()
    await eventually_async(lambda: not session._runs)
    assert np.array_equal((await batcher.submit({"x": values[:1]}, ("y",), None, "ada")).arrays["y"], values[:1])
    assert batcher.death is None
    batcher.close()


async def test_runs_are_counted(tmp_path: Path) -> None:
    """Rows, seconds of compute and seconds in the queue, by model and version."""
    metrics = Metrics()
    request = raw_request(graphs.write_raw(tmp_path / "b"))
    model = await engine(metrics).load(request)
    await ask(model, np.ones((3, 3), np.float32))
    await asyncio.sleep(0)
    labels = {"model": "raw", "version": "1"}
    value = metrics.registry.get_sample_value
    assert value("inference_appliance_batch_rows_sum", labels) == 3
    assert value("inference_appliance_compute_seconds_count", labels) == 1
    assert value("inference_appliance_queue_seconds_count", labels) == 1
    assert value("inference_appliance_batch_wait_seconds_count", labels) == 1
    assert value("inference_appliance_batch_wait_seconds_sum", labels) >= 0
    model.close()


async def test_a_run_is_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By half of what runs may take together, however many rows it may have."""
    monkeypatch.setattr(worker, "_is_tiny", lambda *_: False)
    own = engine()
    own._most_bytes = 8 * 12
    model = await own.load(raw_request(graphs.write_raw(tmp_path / "b"), max_rows=64))
    runs = spied_runs(monkeypatch)
    assert len(await ask(model, np.ones((20, 3), np.float32))) == 20
    assert max(runs) == (8, 3)
    model.close()


async def test_a_wrapped_half_precision_graph_is_probed_with_its_own_tolerance(tmp_path: Path) -> None:
    """float16 graphs are not made slow by their rounding."""
    folder = write_pixels(tmp_path / "b", pixel_model(5, dtype=TensorProto.FLOAT16))
    model = await engine().load(image_request(folder))
    assert model.batching.mode == "rows"
    model.close()


# ---- as on a GPU, on host memory ------------------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A GPU that is a double; each load takes a GiB of it."""
    double = Host(monkeypatch)
    load = sessions._load

    def take(*arguments: Any) -> Any:
        double.library.free_bytes -= 2**30
        return load(*arguments)

    monkeypatch.setattr(sessions, "_load", take)
    monkeypatch.setattr(worker, "resolve_device", lambda wanted: double.device)
    monkeypatch.setattr(gpu, "devices", tuple)
    return double


def gpu_engine(state: Path | None, **settings: Any) -> LocalEngine:
    return LocalEngine(EngineSettings(device="gpu", **settings), Metrics(), state)


async def test_what_a_load_took_is_what_the_next_one_needs(tmp_path: Path, host: Host) -> None:
    """Also after a restart; a model that does not fit is not loaded at all."""
    request = raw_request(graphs.write_raw(tmp_path / "b"))
    (await gpu_engine(tmp_path).load(request)).close()
    (known,) = json.loads((tmp_path / "footprints.json").read_text()).values()
    assert known == {"model": "raw:1", "bytes": 2**30}
    host.library.free_bytes = 2**30 + 1
    with pytest.raises(DeviceError, match=r"It needs 1\.0 GiB of GPU memory \(measured"):
        await gpu_engine(tmp_path).load(request)
    assert len(host.loaded) == 1
    (await gpu_engine(tmp_path, gpu_headroom=1).load(request)).close()


async def test_nothing_is_written_without_a_state_folder(tmp_path: Path, host: Host) -> None:
    """`appliance check` loads models too."""
    request = raw_request(graphs.write_raw(tmp_path / "b"))
    (await gpu_engine(None).load(request)).close()
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("parallel", [None, 2])
async def test_every_size_is_run_before_a_gpu_serves(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch, parallel: int | None
) -> None:
    """Whether the sizes are measured at this load, were before, or are the bundle's to say: first runs are slow."""
    request = replace(raw_request(graphs.write_raw(tmp_path / "b"), max_rows=5), parallel=parallel)
    for _ in range(2):
        runs = spied_runs(monkeypatch)
        (await gpu_engine(tmp_path).load(request)).close()
        assert {(1, 3), (2, 3), (4, 3), (5, 3)} <= set(runs)


@pytest.mark.parametrize(
    ("engine", "bundle", "tried"), [(False, None, 1), (True, None, 2), (True, False, 1), (False, True, 2)]
)
async def test_graphs_are_tried_where_they_are_wished_for(
    tmp_path: Path, host: Host, engine: bool, bundle: bool | None, tried: int
) -> None:
    """The bundle's word goes before the engine's."""
    host.seconds = [1.0, 0.5]
    request = raw_request(graphs.write_raw(tmp_path / "b", graphs.identity_model(), cuda_graphs=bundle), max_rows=5)
    model = await gpu_engine(None, cuda_graphs=engine).load(request)
    values = np.random.default_rng(0).random((9, 3), np.float32)
    np.testing.assert_array_equal(await ask(model, values), values)
    assert len(host.loaded) == tried
    if tried == 2:
        assert host.loaded[1].runs[-1] in {f"bound {number}" for number in range(1, 5)}, "sizes 1, 2, 4 and 5"
    model.close()


@pytest.mark.parametrize("works", [True, False])
async def test_an_engine_of_tensorrt_serves_and_cuda_does_if_it_fails(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, works: bool
) -> None:
    """It was built for this very plan; why it is not used is in the log."""
    request = raw_request(graphs.write_raw(tmp_path / "b"), max_rows=64)
    monkeypatch.setattr(tensorrt, "version", lambda: 101300)
    engine = gpu_engine(tmp_path)
    folder = engine.engine_folder(content_of(request.plan), host.device)
    assert folder is not None
    work = tensorrt.begin(folder)
    (work / "all.engine").write_bytes(b"engine")
    tensorrt.complete(tensorrt.Compiled(work, False, 8, *tensorrt.shapes(request.examples, 8), {}), folder)
    if works:
        monkeypatch.setattr(OnHost, "get_providers", lambda self: ["TensorrtExecutionProvider"])
    model = await engine.load(request)
    assert model.providers[0] == ("TensorrtExecutionProvider" if works else "CUDAExecutionProvider")
    assert model.batching.max_rows == (8 if works else 64), "no more rows than it was built for"
    assert len(host.loaded) == (1 if works else 2)
    assert ("CUDA serves" in caplog.text) is not works
    model.close()


async def test_poison_is_told_by_whichever_run_meets_it(tmp_path: Path, host: Host) -> None:
    """The batcher tries the rows alone after that, which changes nothing: each run fails the same way."""
    told: list[str] = []
    engine = LocalEngine(EngineSettings(device="gpu"), Metrics(), None, told.append)
    model = await engine.load(raw_request(graphs.write_raw(tmp_path / "b")))
    host.library.fails["cudaSetDevice"] = "CUDA failure 700: an illegal memory access was encountered ; cudaSetDevice"
    outcome = await model.submit({"x": np.ones((2, 3), np.float32)}, ("y",), None, "ada")
    assert set(outcome.errors) == {0, 1}
    assert set(told) == {"an illegal memory access (CUDA error 700)"}
    model.close()
