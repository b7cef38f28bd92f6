"""Sessions: what onnxruntime may do, what it may not, and what its errors become."""

import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from support import graphs
from support.cuda_doubles import Host, HostRuntime, OnHost
from support.engine_graphs import CPU
from support.waiting import eventually

import appliance
from appliance.core.errors import BundleInvalid, DeviceError, InferenceFailed
from appliance.engine import gpu
from appliance.engine import session as sessions
from appliance.engine.session import (
    Device,
    DevicePoisoned,
    OutOfMemory,
    Session,
    TensorSpec,
    gpu_problem,
    resolve_device,
)
from appliance.engine.tensorrt import Compiled

_GPU_PROBLEM = gpu_problem(0)


def session_of(model: Any) -> Session:
    """A session on the CPU."""
    return Session(model.SerializeToString(), Path("/nowhere"), CPU, 1)


# ---- telemetry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "0"])
def test_a_session_writes_nothing_outside_its_bundle(tmp_path: Path, given: str | None) -> None:
    """onnxruntime's telemetry keeps a database in the home folder; with it off, before the import, there is none.

    Whatever the environment said: nobody can switch it on by accident.
    """
    home = tmp_path / "home"
    folders = {"HOME": home, "XDG_CACHE_HOME": home / "cache", "XDG_DATA_HOME": home / "data"}
    folders |= {"XDG_CONFIG_HOME": home / "config", "XDG_STATE_HOME": home / "state", "TMPDIR": home / "tmp"}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    model = graphs.write_raw(tmp_path / "bundle") / "1" / "model.onnx"
    code = (
        "import os, sys; import numpy as np; from pathlib import Path\n"
        "from appliance.engine.session import Device, Session\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "path = Path(sys.argv[1])\n"
        "session = Session(path, path.parent, Device('cpu'), 1)\n"
        "for _ in range(3): session.run(['y'], {'x': np.ones((2, 3), np.float32)})\n"
    )
    environment = {name: str(folder) for name, folder in folders.items()}
    environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(appliance.__file__).parents[1])}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, env=environment, cwd=home, timeout=60)
    assert [str(path) for path in home.rglob("*") if not path.is_dir()] == []
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.onnx"]


def test_telemetry_is_off_before_the_import() -> None:
    """The order of two lines that a formatter might swap."""
    source = Path(sessions.__file__).read_text()
    assert source.index('os.environ["ORT_DISABLE_TELEMETRY"] = "1"') < source.index("import onnxruntime")


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_inputs_and_outputs_are_described() -> None:
    """Names, dtypes, and which axes are dynamic; what is no numeric tensor has no dtype."""
    session = session_of(graphs.text_classifier_model(2))
    assert session.inputs == (
        TensorSpec("input_ids", np.dtype(np.int64), (None, None)),
        TensorSpec("attention_mask", np.dtype(np.int64), (None, None)),
    )
    assert session.outputs == (TensorSpec("logits", np.dtype(np.float32), (None, 2)),)
    assert session.providers == ("CPUExecutionProvider",)
    assert session_of(graphs.string_model()).inputs[0].dtype is None


@pytest.mark.parametrize(
    ("shape", "dynamic"), [((None, 3), True), ((1, 3), False), ((0, 3), False), ((), False), ((4,), False)]
)
def test_a_batch_axis_is_a_dynamic_first_axis(shape: tuple[int | None, ...], dynamic: bool) -> None:
    """Scalars have none."""
    assert TensorSpec("x", np.dtype(np.float32), shape).dynamic_batch is dynamic


@pytest.mark.parametrize("kind", [t for t in sessions._DTYPES if t != "tensor(bool)"])
def test_every_dtype_goes_in_and_out(kind: str) -> None:
    """The table of dtypes is onnxruntime's."""
    dtype = np.dtype(sessions._DTYPES[kind])
    session = session_of(graphs.identity_model(dtype=helper.np_dtype_to_tensor_dtype(dtype)))
    assert session.inputs[0].dtype == dtype
    values = np.array([[1, 2, 3]], dtype)
    result = session.run(["y"], {"x": values})[0]
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, values)


def test_a_graph_that_onnxruntime_refuses_is_an_invalid_bundle() -> None:
    """In one line, with onnxruntime's version: the operator may need a newer or older export."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "nowhere"], ["y"])], "bad", [x], [y])
    with pytest.raises(
        BundleInvalid, match=rf"onnxruntime {sessions.version()} cannot load the graph: .*nowhere"
    ) as error:
        session_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert "\n" not in str(error.value)


def test_an_operator_set_from_the_future_is_an_invalid_bundle() -> None:
    """onnxruntime says which ones it knows."""
    model = graphs.identity_model()
    model.opset_import[0].version = 99
    with pytest.raises(BundleInvalid, match="cannot load the graph"):
        session_of(model)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x07"])
def test_bytes_that_are_no_graph_are_an_invalid_bundle(content: bytes) -> None:
    """However they got past the reader."""
    with pytest.raises(BundleInvalid, match="cannot load the graph"):
        Session(content, Path("/nowhere"), CPU, 1)


def test_the_content_of_files_is_copied() -> None:
    """Nobody needs it once the session is there, nor need it lie at a round address."""
    table = np.random.default_rng(0).random((500, 7)).astype(np.float32)
    model = graphs.make(
        [helper.make_node("Gather", ["table", "index"], ["y"])],
        {"index": (TensorProto.INT64, ["n"])},
        {"y": (TensorProto.FLOAT, ["n", 7])},
        {"table": table},
    )
    content = bytearray(b"x" + graphs.store_outside(model.graph.initializer[0], "deep/weights.bin"))
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "offset").value = "1"
    weights: Any = {"deep/weights.bin": content}
    session = Session(model.SerializeToString(), Path("/nowhere"), CPU, 1, weights=weights)
    content[:] = bytes(len(content))
    np.testing.assert_array_equal(session.run(["y"], {"index": np.array([499, 3])})[0], table[[499, 3]])


# ---- running ---------------------------------------------------------------------------------------------------------


def test_only_the_outputs_asked_for_are_computed() -> None:
    """In the order they were asked for."""
    session = session_of(graphs.two_in_two_out_model())
    feeds = {"a": np.array([[1, 2]], np.float32), "b": np.array([[3, 4]], np.float32)}
    assert [r.tolist() for r in session.run(["product", "sum"], feeds)] == [[[3, 8]], [[4, 6]]]
    assert len(session.run(("sum",), feeds)) == 1


@pytest.mark.parametrize(
    ("outputs", "feeds"),
    [
        (["y"], {"index": np.array([[5000]], np.int64)}),
        (["y"], {"index": np.array([[1.0]], np.float32)}),
        (["y"], {"index": np.array([1], np.int64)}),
        (["y"], {"other": np.array([[1]], np.int64)}),
        (["y"], {}),
        (["z"], {"index": np.array([[1]], np.int64)}),
    ],
    ids=["out of range", "dtype", "rank", "name", "missing", "output"],
)
def test_whatever_a_run_raises_is_inference_failed(outputs: list[str], feeds: dict[str, Any]) -> None:
    """The caller reads a stock sentence; onnxruntime's own goes to the log."""
    with pytest.raises(InferenceFailed) as error:
        session_of(graphs.gather_model()).run(outputs, feeds)
    assert str(error.value) == "The model failed on this input."
    assert error.value.detail
    assert not isinstance(error.value, OutOfMemory)


@pytest.mark.parametrize(
    "text",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : BFCArena::AllocateRawInternal Failed to allocate memory",
        "CUDA failure 2: out of memory ; GPU=0",
        "std::bad_alloc",
    ],
)
def test_running_out_of_memory_is_told_apart(text: str) -> None:
    """Fewer rows may fit, so the batcher must know."""

    def run(*arguments: Any) -> Any:
        raise RuntimeError(text)

    session = session_of(graphs.identity_model())
    session._session = SimpleNamespace(run=run)
    with pytest.raises(OutOfMemory) as error:
        session.run(["y"], {})
    assert text not in str(error.value)
    assert error.value.detail == text


def test_only_the_run_on_that_thread_is_ended() -> None:
    """Runs of one session on several threads: whoever waits for another one keeps it."""
    session = session_of(graphs.endless_model())
    ended: list[int] = []

    def run() -> None:
        with pytest.raises(InferenceFailed):
            session.run(["y"], {"x": np.ones((1, 2), np.float32)})
        ended.append(threading.get_ident())

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(session._runs) == 2)
    session.terminate(threads[0].ident)
    threads[0].join(20)
    assert ended == [threads[0].ident]
    assert threads[1].is_alive()
    session.terminate()
    threads[1].join(20)
    assert ended == [thread.ident for thread in threads]


def test_a_session_on_the_cpu_uses_nothing_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its library nor a slot, even where there is CUDA; its errors are never taken for the GPU's."""

    def touched(*arguments: Any) -> Any:
        pytest.fail("CUDA was touched")

    monkeypatch.setattr(sessions.cuda, "runtime", touched)
    monkeypatch.setattr(sessions.cuda, "poison", touched)
    monkeypatch.setattr(sessions.binding.Bound, "__init__", touched)
    session = session_of(graphs.identity_model())
    feeds = {"x": np.ones((2, 3), np.float32)}
    assert session.run(["y"], feeds)[0].tolist() == feeds["x"].tolist()
    session.settle()
    with pytest.raises(InferenceFailed) as error:
        session.run(["y"], {"x": np.ones((2, 2), np.float32)})
    assert type(error.value) is InferenceFailed


def test_a_poisoned_gpu_is_told_before_the_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's process may end within the callback: nothing but that ends such an error."""
    told: list[str] = []
    session = session_of(graphs.identity_model())
    session.device, session._on_poison = Device("gpu", 0), told.append
    text = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=host"
    monkeypatch.setattr(session, "_session", SimpleNamespace(run=lambda *arguments: _raise(RuntimeError(text))))
    with pytest.raises(DevicePoisoned) as error:
        session.run(["y"], {})
    assert told == [error.value.reason] == ["an illegal memory access (CUDA error 700)"]
    assert text in error.value.detail
    assert "700" not in str(error.value)


def test_an_error_without_cause_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN may not say why it failed; a sticky error is what CUDA then answers to any call."""
    library = HostRuntime()
    monkeypatch.setattr(sessions.cuda, "runtime", lambda: library)
    told: list[str] = []
    session = session_of(graphs.identity_model())
    session.device, session._on_poison = Device("gpu", 0), told.append
    session._bound = sessions.binding.Bound(
        SimpleNamespace(run=lambda *arguments: _raise(RuntimeError("CUDNN_FE failure 11"))), library, 0, {}, {}
    )
    with pytest.raises(InferenceFailed) as error:
        session.run(["y"], {"x": np.ones(1)})
    assert type(error.value) is InferenceFailed, "the device answers: the error was this run's alone"
    library.fails["cudaDeviceSynchronize"] = "CUDA failure 719: unspecified launch failure ; cudaDeviceSynchronize"
    with pytest.raises(DevicePoisoned):
        session.run(["y"], {"x": np.ones(1)})
    assert told == ["a failed kernel launch (CUDA error 719)"]


def _raise(error: Exception) -> Any:
    raise error


def test_the_gpus_options_are_those_that_were_chosen() -> None:
    """TF32, graphs and TensorRT only where they are asked for."""
    (name, options), cpu = sessions._providers(Device("gpu", 1), 2**30)
    assert (name, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {
        "device_id": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "gpu_mem_limit": str(2**30),
    }
    (_, options), _ = sessions._providers(Device("gpu", 0), None, tf32=True, graphs=True)
    assert (options["use_tf32"], options["enable_cuda_graph"], "gpu_mem_limit" in options) == ("1", "1", False)
    compiled = Compiled(Path("/engines"), False, 8, {"x": (1, 3)}, {"x": (8, 3)}, {})
    names = [entry[0] for entry in sessions._providers(Device("gpu", 0), None, compiled=compiled)[:2]]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    assert sessions._providers(CPU, 2**30) == ["CPUExecutionProvider"]


# ---- as on a GPU, on host memory ------------------------------------------------------------------------------------


def session_on(host: Host) -> Session:
    """`y` is `x`, (batch, 3)."""
    return Session(graphs.identity_model().SerializeToString(), Path("/nowhere"), host.device, 1)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


THREE = {"x": np.ones((2, 3), np.float32)}


def test_slots_go_with_their_session(host: Host) -> None:
    """A model that is replaced leaves nothing on the GPU."""
    session = session_on(host)
    np.testing.assert_array_equal(session.run(["y"], THREE)[0], THREE["x"])
    assert host.loaded[0].runs == ["bound"]
    assert host.library.memory_of
    del session
    assert host.library.memory_of == {}


def test_graphs_that_win_take_over_and_the_other_session_goes(host: Host) -> None:
    """With its weights: nothing holds it any more."""
    host.seconds = [1.0, 0.9]
    session = session_on(host)
    gone = weakref.ref(host.loaded[0])
    assert session.capture(["y"], [THREE]) == "CUDA graphs: runs take 0.90 of the time with CUDA graphs"
    session.settle()
    session.run(["y"], THREE)
    assert host.loaded[1].runs[-1] == "bound 1"
    del host.loaded[0]
    assert gone() is None
    del session
    assert host.library.memory_of == {}


def test_graphs_that_do_not_win_by_five_percent_go(host: Host) -> None:
    host.seconds = [1.0, 0.96]
    session = session_on(host)
    assert session.capture(["y"], [THREE]).startswith("no CUDA graphs: runs take 0.96 of the time")
    before = len(host.loaded[0].runs)
    session.run(["y"], THREE)
    assert host.loaded[0].runs[before:] == ["bound"]
    gone = weakref.ref(host.loaded.pop())
    assert gone() is None


def test_an_input_that_the_host_reads_is_not_captured(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would not see it change."""
    monkeypatch.setattr(OnHost, "get_input_memory_infos", lambda self: [SimpleNamespace(name="Cpu")])
    assert session_on(host).capture(["y"], [THREE]) == "no CUDA graphs: the input 'x' is read on the host"


def test_a_graph_that_cannot_be_captured_is_run_as_it_is(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """With onnxruntime's word for it."""
    session = session_on(host)
    monkeypatch.setattr(sessions.binding.Graphs, "capture", lambda *_: _raise(RuntimeError("not permitted\nat line 3")))
    assert session.capture(["y"], [THREE]) == "no CUDA graphs: they cannot be captured (not permitted)"
    np.testing.assert_array_equal(session.run(["y"], THREE)[0], THREE["x"])


def test_cudas_own_lack_of_memory_is_told_apart(host: Host) -> None:
    """A slot that could not be had is as good a reason for smaller batches as an arena."""
    host.library.fails["cudaMalloc"] = "CUDA failure 2: out of memory ; cudaMalloc"
    with pytest.raises(OutOfMemory):
        session_on(host).run(["y"], THREE)


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_cpu_is_cpu() -> None:
    """No probe, no surprise."""
    device = resolve_device("cpu")
    assert (str(device), device.reason) == ("cpu", "as configured")
    assert str(Device("gpu", 1)) == "gpu:1"


@pytest.mark.skipif(_GPU_PROBLEM is None, reason="a GPU works here")
@pytest.mark.parametrize("wanted", ["gpu", "gpu:0", "gpu:3", "gpu:GPU-1234"])
def test_a_gpu_that_must_be_there_and_is_not_is_an_error(wanted: str) -> None:
    """Never a silent fallback; the sentence names what is missing and what to do."""
    with pytest.raises(DeviceError) as error:
        resolve_device(wanted)
    text = str(error.value)
    assert text.startswith(f'engine.device is "{wanted}": ')
    assert str(gpu_problem(0)) in text or "There is no GPU" in text
    assert text.endswith('Or set engine.device = "cpu".')


def test_a_gpu_is_found_by_number_or_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session gets CUDA's number of it; where nobody tells of GPUs, a number is tried as it is."""
    there = (gpu.Gpu(4, 0, "GPU-a", "NVIDIA L4"), gpu.Gpu(5, 1, "GPU-b", "NVIDIA L4"))
    monkeypatch.setattr(gpu, "devices", lambda: there)
    monkeypatch.setattr(sessions, "gpu_problem", lambda index: None)
    for wanted, index in (("gpu", 0), ("gpu:5", 1), ("gpu:GPU-b", 1), ("auto", 0)):
        assert resolve_device(wanted).index == index
    assert resolve_device("gpu:5") == Device("gpu", 1, "as configured", "GPU-b", "NVIDIA L4")
    with pytest.raises(DeviceError, match=r'There is no GPU "gpu:1".*gpu:4 \(NVIDIA L4 GPU-a\)'):
        resolve_device("gpu:1")
    monkeypatch.setattr(gpu, "devices", tuple)
    assert resolve_device("gpu:3").index == 3
    with pytest.raises(DeviceError, match="none at all"):
        resolve_device("gpu:GPU-a")


@pytest.mark.skipif(_GPU_PROBLEM is None, reason="a GPU works here")
def test_auto_takes_the_cpu_and_says_why() -> None:
    """The reason is logged at start and shown by `appliance check`."""
    device = resolve_device("auto")
    assert (device.kind, device.reason) == ("cpu", _GPU_PROBLEM)


def test_what_a_gpu_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, then the library, then the probe run."""
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "install the GPU package" in str(gpu_problem(0))
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(sessions, "_provider_libraries", lambda: ["libappliance_none.so.13"])
    monkeypatch.setattr(sessions, "_missing_library", lambda name: name if "appliance" in name else None)
    assert "The library libappliance_none.so.13 cannot be loaded" in str(gpu_problem(0))
    monkeypatch.setattr(sessions, "_missing_library", lambda name: None)
    problem = str(gpu_problem(0))
    if _GPU_PROBLEM is not None:
        assert "GPU 0" in problem


def test_a_missing_library_is_named_and_a_present_one_is_not() -> None:
    """By the loader's own words."""
    assert sessions._missing_library("libappliance_none.so.13") == "libappliance_none.so.13"
    assert sessions._missing_library("libc.so.6") is None


@pytest.mark.skipif(_GPU_PROBLEM is None, reason="a GPU works here")
def test_a_session_that_did_not_get_its_gpu_is_refused(recwarn: pytest.WarningsRecorder) -> None:
    """onnxruntime falls back to the CPU with no more than a warning."""
    with pytest.raises((DeviceError, BundleInvalid)):
        Session(graphs.identity_model().SerializeToString(), Path("/nowhere"), Device("gpu", 0), 1)


@pytest.mark.gpu
@pytest.mark.skipif(_GPU_PROBLEM is not None, reason=f"no GPU: {_GPU_PROBLEM}")
def test_a_gpu_gives_the_answers_of_the_cpu() -> None:
    """Within single precision: TF32 is off."""
    device = resolve_device("gpu")
    model = graphs.image_classifier_model().SerializeToString()
    pixels = np.random.default_rng(0).random((16, 3, 8, 8), np.float32)
    on_gpu = Session(model, Path("/nowhere"), device, 1)
    assert on_gpu.providers[0] == "CUDAExecutionProvider"
    np.testing.assert_allclose(
        on_gpu.run(["logits"], {"image": pixels})[0],
        Session(model, Path("/nowhere"), CPU, 1).run(["logits"], {"image": pixels})[0],
        atol=1e-5,
    )


# ---- memory ----------------------------------------------------------------------------------------------------------

BOUND = """
import sys
from pathlib import Path
import numpy as np
from support import graphs
from appliance.core.errors import InferenceFailed
from appliance.engine import session as sessions
from appliance.engine.session import Device, OutOfMemory, Session

def megabytes(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) >> 10

sessions.bound_runs(256 << 20)
sessions.bound_runs(1 << 40)  # knows nothing of it

def made():
    return Session(graphs.constant_of_shape_model().SerializeToString(), Path("/nowhere"), Device("cpu"), 1)

def size(session, megabytes):
    return session.run(["y"], {"n": np.array([megabytes << 18])})[0].nbytes >> 20
"""


def run_bound(code: str) -> None:
    """Run it in a process of its own: the bound is for good."""
    folders = [str(Path(appliance.__file__).parents[1]), str(Path(graphs.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": ":".join(folders)}
    subprocess.run([sys.executable, "-c", BOUND + code], check=True, env=environment, timeout=120)


def test_a_caller_cannot_make_a_graph_take_more_than_all_runs_may() -> None:
    """A shape among its inputs, say: an error instead of ten gigabytes."""
    run_bound("""
before = megabytes("VmHWM")
session = made()
for wanted in (300, 10_000, 100_000):
    try:
        size(session, wanted)
    except OutOfMemory as error:
        assert str(error) == "The device has too little free memory for this input.", error
    else:
        raise AssertionError(wanted)
assert size(session, 200) == 200
assert megabytes("VmHWM") - before < 300
""")


def test_memory_kept_for_other_shapes_makes_room() -> None:
    """Nobody can fill it with pieces that fit nobody else: what no run holds is given back first."""
    run_bound("""
one, other = made(), made()
for round_ in range(3):
    for wanted in (40, 50, 60, 70):  # 220 of 256, in pieces
        assert size(one, wanted) == wanted
    assert size(other, 240) == 240
    assert size(one, 10) == 10
""")


def test_results_that_are_still_held_count() -> None:
    """Their memory is the run's own; once they are gone it is free."""
    run_bound("""
session = made()
held = session.run(["y"], {"n": np.array([200 << 18])})
try:
    size(session, 100)
except OutOfMemory:
    held.clear()
else:
    raise AssertionError("nothing was counted")
assert size(session, 100) == 100
""")


def test_weights_do_not_count() -> None:
    """They are there for as long as the model is, and nobody who calls can make more of them."""
    run_bound("""
weight = np.ones(75 << 18, np.float32)
shape = (1, ["batch", weight.size])
model = graphs.make([graphs.helper.make_node("Add", ["x", "w"], ["y"])], {"x": shape}, {"y": shape}, {"w": weight})
content = model.SerializeToString()
sessions_ = [Session(content, Path("/nowhere"), Device("cpu"), 1) for _ in range(4)]
assert size(made(), 200) == 200
""")
