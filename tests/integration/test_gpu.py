"""What needs a GPU: required means used, answers equal the CPU's, slots, graphs, TensorRT, admission, poison.

`make gpu-check` runs these alone.
"""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper
from support import graphs
from support.appliance import MODELS, ROOT, Appliance, Client, Pki, image_input, request_for, run, text_input
from support.engine_graphs import CPU, planned

from appliance.core.config import Engine
from appliance.core.errors import DeviceError
from appliance.core.metrics import Metrics
from appliance.core.types import Array
from appliance.engine import cuda, gpu, tensorrt
from appliance.engine.admission import content_of
from appliance.engine.binding import Bound, Graphs
from appliance.engine.half import TOLERANCE, halve
from appliance.engine.session import Device, Session, gpu_problem, resolve_device
from appliance.engine.transport import LoadRequest
from appliance.engine.worker import LocalEngine
from appliance.tasks.tensors import RawTensors

PROBLEM = gpu_problem(0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(PROBLEM is not None, reason=f"no GPU: {PROBLEM}")]

PICTURES = [path.read_bytes() for path in sorted((MODELS / "digits" / "samples").glob("*.png"))]
REQUESTS = {
    "digits": request_for("digits", [image_input(body) for body in PICTURES]),
    "ml-topics": request_for("ml-topics", [text_input("k-means " * count) for count in (1, 5, 40, 100)]),
}
NOWHERE = Path("/nowhere")
RANDOM = np.random.default_rng(0)


def scores(client: Client, model: str) -> list[dict[str, float]]:
    """Every concept's value, of each output."""
    outputs: Any = client.predict(REQUESTS[model]).outputs
    return [{concept.id: concept.value for concept in output.data.concepts} for output in outputs]


def network(width: int = 64, layers: int = 4) -> ModelProto:
    """`x` (batch, 3, 32, 32) → `y` (batch, 10): some convolutions and a product."""
    nodes, weights, source, channels = [], {}, "x", 3
    for layer in range(layers):
        kernel = RANDOM.standard_normal((width, channels, 3, 3)) / (3 * channels**0.5)
        weights[f"w{layer}"] = kernel.astype(np.float32)
        nodes.append(helper.make_node("Conv", [source, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        source, channels = f"r{layer}", width
    nodes += [
        helper.make_node("GlobalAveragePool", [source], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("MatMul", ["flat", "last"], ["y"]),
    ]
    weights["last"] = RANDOM.standard_normal((width, 10)).astype(np.float32)
    shapes = {"x": (TensorProto.FLOAT, ["batch", 3, 32, 32])}, {"y": (TensorProto.FLOAT, ["batch", 10])}
    return graphs.make(nodes, *shapes, weights)


def pictures(count: int) -> dict[str, Array]:
    return {"x": RANDOM.random((count, 3, 32, 32), np.float32)}


@pytest.fixture(scope="module")
def device() -> Device:
    return resolve_device("gpu")


@pytest.fixture(scope="module")
def model() -> bytes:
    return network().SerializeToString()


@pytest.fixture(scope="module")
def expected(model: bytes) -> Callable[[Mapping[str, Array]], Array]:
    """The CPU's answer."""
    session = Session(model, NOWHERE, CPU, 2)
    return lambda feeds: session.run(["y"], feeds)[0]


# ---- the whole appliance ---------------------------------------------------------------------------------------------


def test_answers_equal_the_cpus(make_appliance: Callable[..., Appliance], pki: Pki) -> None:
    answers = {}
    for kind in ("cpu", "gpu"):
        appliance = make_appliance(*REQUESTS, engine={"device": kind})
        key = appliance.new_key()
        with appliance, Client(appliance.port(), pki.ca, key) as client:
            assert appliance.admin("/status")["device"].startswith(kind)
            answers[kind] = {name: scores(client, name) for name in REQUESTS}
    for name in REQUESTS:
        for on_cpu, on_gpu in zip(answers["cpu"][name], answers["gpu"][name], strict=True):
            assert on_gpu == pytest.approx(on_cpu, abs=1e-4)


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_the_gpus_are_told_as_cuda_sees_them(device: Device) -> None:
    """NVML's memory and CUDA's agree, as far as others leave it alone meanwhile."""
    found = gpu.devices()
    assert found, "the driver's files name GPUs even without NVML"
    here = found[device.index]
    assert (here.uuid, here.name) == (device.uuid, device.name)
    if here.memory_total is None:
        pytest.skip("nvidia-ml-py is not installed")
    cuda.runtime().use(device.index)
    _, total = cuda.runtime().memory()
    assert total == pytest.approx(here.memory_total, rel=0.05)
    assert here.capability is not None
    assert here.capability >= (7, 5)


def test_a_gpu_is_found_by_its_uuid_and_no_other_is(device: Device) -> None:
    assert resolve_device(f"gpu:{device.uuid}").index == device.index
    with pytest.raises(DeviceError, match=device.uuid):
        resolve_device("gpu:GPU-00000000-0000-0000-0000-000000000000")


def test_an_engine_process_sees_its_gpu_alone(device: Device) -> None:
    """By the environment that the supervisor gives it, as CUDA's number 0."""
    here = gpu.devices()[device.index]
    code = "from appliance.engine.session import resolve_device; d = resolve_device('gpu'); print(d.index, d.uuid)"
    environment = {**os.environ, **gpu.environment(here), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", here.uuid]


# ---- sessions --------------------------------------------------------------------------------------------------------


def test_bound_runs_give_the_cpus_answers(device: Device, model: bytes, expected: Callable[..., Array]) -> None:
    """For one shape after the other, in slots that grow; TF32 is off."""
    session = Session(model, NOWHERE, device, 1)
    assert isinstance(session._bound, Bound)
    for count in (1, 64, 3, 64):
        feeds = pictures(count)
        np.testing.assert_allclose(session.run(["y"], feeds)[0], expected(feeds), rtol=1e-3, atol=1e-4)


def test_two_threads_share_a_session(device: Device, model: bytes, expected: Callable[..., Array]) -> None:
    """Each has its own slot: nobody's rows are in another's answer."""
    session = Session(model, NOWHERE, device, 1)
    wrong: list[str] = []

    def work() -> None:
        for count in (1, 5, 8, 8, 5) * 10:
            feeds = pictures(count)
            if not np.allclose(session.run(["y"], feeds)[0], expected(feeds), rtol=1e-3, atol=1e-4):
                wrong.append(f"{count} rows")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert isinstance(session._bound, Bound)
    assert 1 <= len(session._bound._free) <= 2


def test_an_outlier_leaves_no_memory_behind(device: Device, model: bytes) -> None:
    """After warm-up with small batches, a run of a thousand rows gives back what it took."""
    session = Session(model, NOWHERE, device, 1)
    for _ in range(3):
        session.run(["y"], pictures(8))
    session.settle()
    library = cuda.runtime()
    library.use(device.index)
    free, _ = library.memory()
    session.run(["y"], pictures(1024))
    session.run(["y"], pictures(8))
    after, _ = library.memory()
    assert free - after < 64 * 2**20


def test_a_session_that_goes_frees_its_slots(device: Device, model: bytes) -> None:
    """With weights and arena: what a hundred loads took is not there twice."""
    library = cuda.runtime()
    library.use(device.index)

    def load() -> int:
        session = Session(model, NOWHERE, device, 1)
        session.run(["y"], pictures(64))
        del session
        gc.collect()
        return library.memory()[0]

    load()
    before = load()
    for _ in range(10):
        after = load()
    assert before - after < 32 * 2**20


def test_half_precision_stays_within_its_tolerance(device: Device, expected: Callable[..., Array]) -> None:
    """On tensor cores as in the CPU's imitation of it."""
    graph = ModelProto.FromString(network().SerializeToString())
    exact = Session(graph.SerializeToString(), NOWHERE, device, 1)
    assert halve(graph) > 0
    rounded = Session(graph.SerializeToString(), NOWHERE, device, 1)
    feeds = pictures(16)
    one, other = exact.run(["y"], feeds)[0], rounded.run(["y"], feeds)[0]
    np.testing.assert_allclose(softmax(other), softmax(one), atol=TOLERANCE)


def softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def test_graphs_give_the_same_answers_or_say_why_not(
    device: Device, expected: Callable[..., Array], model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured shapes and others, whichever way won; both ways are tried here."""
    batches = [pictures(1), pictures(8)]
    for share, kind in ((0.0, Bound), (1000.0, Graphs)):
        monkeypatch.setattr("appliance.engine.binding.WINS", share)
        session = Session(model, NOWHERE, device, 1)
        found = session.capture(["y"], batches)
        assert "of the time with CUDA graphs" in found, found
        assert isinstance(session._bound, kind)
        session.settle()
        for feeds in (*batches, pictures(3), pictures(8)):
            np.testing.assert_allclose(session.run(["y"], feeds)[0], expected(feeds), rtol=1e-3, atol=1e-4)


def test_a_graph_with_operators_of_the_cpu_is_run_without(device: Device) -> None:
    """onnxruntime refuses to capture it; that is no failure of the load."""
    session = Session(graphs.if_model().SerializeToString(), NOWHERE, device, 1)
    feeds = {
        spec.name: np.ones([axis or 1 for axis in spec.shape], spec.dtype) for spec in session.inputs if spec.dtype
    }
    names = [spec.name for spec in session.outputs]
    before = session.run(names, feeds)
    assert session.capture(names, [feeds]).startswith("no CUDA graphs: ")
    for one, other in zip(session.run(names, feeds), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_input_that_the_host_reads_is_never_replayed(device: Device) -> None:
    """The shape of a Reshape: a replay would give every caller the shape of the one before."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("Relu", ["r"], ["y"])]
    inputs = {"x": (TensorProto.FLOAT, ["batch", 4]), "shape": (TensorProto.INT64, [2])}
    graph = graphs.make(nodes, inputs, {"y": (TensorProto.FLOAT, ["a", "b"])}, {})
    session = Session(graph.SerializeToString(), NOWHERE, device, 1)
    feeds = {"x": np.ones((2, 4), np.float32), "shape": np.array([4, 2])}
    assert session.capture(["y"], [feeds]).startswith("no CUDA graphs: ")
    assert session.run(["y"], feeds)[0].shape == (4, 2)
    assert session.run(["y"], feeds | {"shape": np.array([1, 8])})[0].shape == (1, 8)


# ---- admission -------------------------------------------------------------------------------------------------------


def raw_request(folder: Path, graph: ModelProto) -> LoadRequest:
    plan = planned(graphs.write_raw(folder, graph))[3]
    task = RawTensors(plan.inputs, plan.outputs)
    return LoadRequest(("net", "1"), plan, None, task.compared(), task.compared(), 8, task.examples())


async def test_a_load_is_measured_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """The second time by the footprint, the third by a headroom that leaves nothing."""
    request = raw_request(tmp_path / "net", network(width=256))
    engine = LocalEngine(Engine(device="gpu"), Metrics(), tmp_path)
    loaded = await engine.load(request)
    loaded.close()
    key = f"{content_of(request.plan).key}/cuda/{engine.device.name}"
    footprint = engine._admission._footprints.get(key)
    assert footprint is not None
    assert 2**20 < footprint < 2**32
    full = LocalEngine(Engine(device="gpu", gpu_headroom=2**50), Metrics(), tmp_path)
    with pytest.raises(DeviceError, match=r"measured when it was last loaded\), and 1048576\.0 GiB must stay free"):
        await full.load(request)


# ---- TensorRT --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(tensorrt.problem() is not None, reason=f"no TensorRT: {tensorrt.problem()}")
def test_a_compiled_model_is_served_by_tensorrt(make_appliance: Callable[..., Appliance], pki: Pki) -> None:
    """By the command that operators use; answers stay the CPU's."""
    appliance = make_appliance("digits", engine={"device": "gpu"})
    run("models", "compile", "digits", config=appliance.file)
    answers = {}
    for kind in ("gpu", "cpu"):
        appliance.write_config(engine={"device": kind})
        key = appliance.new_key()
        with appliance, Client(appliance.port(), pki.ca, key) as client:
            answers[kind] = scores(client, "digits")
    for on_cpu, on_gpu in zip(answers["cpu"], answers["gpu"], strict=True):
        assert on_gpu == pytest.approx(on_cpu, abs=1e-3)


def test_compiling_without_tensorrt_says_what_to_install(make_appliance: Callable[..., Appliance]) -> None:
    if tensorrt.problem() is None:
        pytest.skip("TensorRT is here")
    appliance = make_appliance("digits", engine={"device": "gpu"})
    done = run("models", "compile", "digits", config=appliance.file, check=False)
    assert done.returncode == 7
    assert "tensorrt-cu13" in done.stderr


# ---- poison ----------------------------------------------------------------------------------------------------------

_POISONED = """
import ctypes, os, sys
import numpy as np
from pathlib import Path
from appliance.engine.session import DevicePoisoned, Session, resolve_device

session = Session(Path(sys.argv[1]), Path(sys.argv[1]).parent, resolve_device("gpu"), 1,
                  on_poison=lambda reason: print("told:", reason, flush=True))
feeds = {"x": np.ones((1, 3, 32, 32), np.float32)}
session.run(["y"], feeds)
library = ctypes.CDLL("libcuda.so.1")
ptx = b'''.version 7.0
.target sm_70
.address_size 64
.visible .entry crash() { .reg .u64 %a; .reg .u32 %v; mov.u64 %a, 8; mov.u32 %v, 1; st.global.u32 [%a], %v; ret; }
'''
module, function = ctypes.c_void_p(), ctypes.c_void_p()
assert library.cuModuleLoadData(ctypes.byref(module), ptx) == 0
assert library.cuModuleGetFunction(ctypes.byref(function), module, b"crash") == 0
library.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
library.cuCtxSynchronize()
try:
    session.run(["y"], feeds)
except DevicePoisoned as error:
    print("raised:", error.reason, flush=True)
    os._exit(75)
os._exit(0)
"""


def test_an_illegal_access_poisons_the_process_and_is_told(tmp_path: Path, model: bytes) -> None:
    """A kernel that writes to address 8: every later run fails with a sticky error, which is recognised."""
    file = tmp_path / "model.onnx"
    file.write_bytes(model)
    done = subprocess.run(
        [sys.executable, "-c", _POISONED, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 75, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2].removeprefix("told:") == lines[-1].removeprefix("raised:")
    assert "(CUDA error 7" in lines[-1]
