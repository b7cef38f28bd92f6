"""The engine in this process: a graph is loaded, probed, warmed up, and served in the mode that the probes allow."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from support import graphs
from support.cuda_doubles import Host, OnHost
from support.engine_graphs import engine, pixel_model, planned, write_pixels

from appliance.core.config import Engine as EngineSettings
from appliance.core.errors import BundleInvalid, DeviceError, Draining
from appliance.core.metrics import Metrics
from appliance.engine import gpu, tensorrt, worker
from appliance.engine import plan as plans
from appliance.engine import session as sessions
from appliance.engine.admission import content_of
from appliance.engine.session import gpu_problem
from appliance.engine.transport import LoadRequest
from appliance.engine.worker import LocalEngine, LocalModel
from appliance.tasks.base import ImageSide
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


async def test_the_size_is_measured_when_the_bundle_says_nothing(tmp_path: Path) -> None:
    """A power of two, 128 at most."""
    model = await load_raw(tmp_path / "b", graphs.identity_model(), max_rows=None)
    assert model.batching.max_rows in (1, 2, 4, 8, 16, 32, 64, 128)
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
    """The first caller does not pay for the first run of a shape."""
    from appliance.engine import worker
    from appliance.media.text import TextTokenizer
    from appliance.tasks.base import TextSide

    shapes = set()
    original = worker.Session.run

    def spy(self: Any, outputs: Any, feeds: Any) -> Any:
        shapes.add(feeds["input_ids"].shape)
        return original(self, outputs, feeds)

    monkeypatch.setattr(worker.Session, "run", spy)
    folder = graphs.write_text_classifier(tmp_path / "b", max_tokens=40)
    config, version, _, plan = planned(folder)
    assert config.onnx.text is not None
    side = TextSide(config.onnx.text, TextTokenizer(version.path / "tokenizer.json", 40), {})
    request = LoadRequest(("t", "1"), plan, None, (plans.SCORES,), (plans.TOP_VALUES,), 4, side.examples())
    model = await engine().load(request)
    assert {width for _, width in shapes} == {16, 32, 40}
    assert {(1, 16), (2, 32), (3, 40), (4, 40)} <= shapes
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
