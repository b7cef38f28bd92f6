"""CUDA's errors that end a process's use of the GPU, and slots; CUDA's runtime is a double on host memory."""

import ctypes
import mmap

import numpy as np
import pytest
from support.cuda_doubles import HostRuntime, at

from appliance.engine import cuda
from appliance.engine.cuda import CudaError, Slot
from appliance.engine.session import gpu_problem

# ---- poison ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(cuda.POISON))
def test_every_error_of_the_table_is_recognised_by_its_number(code: int) -> None:
    """In the form that onnxruntime gives them."""
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. Name:'c' "
        f"Status Message: CUDA error cudaErrorSomething:CUDA failure {code}: what it says ; GPU=0 ; hostname=host ; "
        "file=/src/cuda_call.cc ; line=182 ; expr=cudaStreamSynchronize(stream); "
    )
    assert cuda.poison(text) == f"{cuda.POISON[code]} (CUDA error {code})"


@pytest.mark.parametrize(
    "text",
    [
        "CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0 ; hostname=host",
        "CUDNN failure 5003: CUDNN_STATUS_EXECUTION_FAILED_CUDART ; GPU=0 ; hostname=host",
        "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0 ; hostname=host",
        "TensorRT EP execution failed: an illegal memory access was encountered",
        "device-side assert triggered",
    ],
)
def test_what_follows_in_other_libraries_is_recognised(text: str) -> None:
    """They give the error on, with or without CUDA's number."""
    assert cuda.poison(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=host ; expr=cudaMalloc((void**)&p, size);",
        "CUDA failure 1: invalid argument ; GPU=0 ; hostname=host",
        "CUDA failure 7000: ; GPU=0",
        "CUDNN failure 3000: CUDNN_STATUS_NOT_SUPPORTED ; GPU=0 ; hostname=host",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; hostname=host",
        "indices element out of data bounds, idx=700 must be within the inclusive range [-10,9]",
        "Got invalid dimensions for input: x for the following indices index: 1 Got: 710 Expected: 3",
    ],
)
def test_what_leaves_the_device_in_order_is_no_poison(text: str) -> None:
    """An engine that ended for each of these could be ended by any caller."""
    assert cuda.poison(text) is None


# ---- without CUDA ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(gpu_problem(0) is None, reason="a GPU works here")
def test_without_a_gpu_nothing_is_registered() -> None:
    """Whether CUDA's library is there or not; the caller need not know."""
    with mmap.mmap(-1, 4096) as slab:
        assert cuda.register_pinned(slab) is None
    assert not cuda.is_pinned(np.zeros(3))


# ---- memory of others ------------------------------------------------------------------------------------------------


def test_registered_memory_is_known_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that lie in it, whole and in one piece; nothing else."""
    library = HostRuntime()
    monkeypatch.setattr(cuda, "runtime", lambda: library)
    slab = np.zeros(4096, np.uint8)
    pinned = cuda.register_pinned(slab)
    assert pinned is not None
    inside = slab[64:1024].reshape(3, 320)
    assert cuda.is_pinned(inside)
    assert cuda.is_pinned(slab)
    assert not cuda.is_pinned(inside[:, :3])
    assert not cuda.is_pinned(np.zeros(8, np.uint8))
    pinned.release()
    pinned.release()
    assert not cuda.is_pinned(inside)
    assert library.calls == ["cudaHostRegister", "cudaHostUnregister"]


def test_memory_that_cuda_refuses_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    library = HostRuntime()
    library.fails["cudaHostRegister"] = "CUDA failure 1: invalid argument"
    monkeypatch.setattr(cuda, "runtime", lambda: library)
    slab = np.zeros(4096, np.uint8)
    assert cuda.register_pinned(slab) is None
    assert not cuda.is_pinned(slab)


# ---- slots -----------------------------------------------------------------------------------------------------------


def test_a_slot_brings_every_input_to_a_place_of_its_own() -> None:
    """Aligned, whatever their lengths and strides."""
    library = HostRuntime()
    slot = Slot(library, 0)
    feeds = {
        "a": np.arange(7, dtype=np.uint8),
        "b": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
        "c": np.array([[True, False]]),
    }
    addresses = slot.fill(feeds)
    for name, array in feeds.items():
        np.testing.assert_array_equal(at(addresses[name], array.shape, array.dtype), array)
    base = addresses["a"]
    assert [address - base for address in addresses.values()] == [0, 256, 512]
    assert library.calls[-1] == "cudaStreamSynchronize"


def test_a_slot_grows_and_does_not_shrink() -> None:
    """Smaller runs use what is there; growing frees what was."""
    library = HostRuntime()
    slot = Slot(library, 0)
    for rows in (1, 64, 8, 64):
        slot.fill({"x": np.ones((rows, 100), np.float32)})
    assert library.calls.count("cudaMalloc") == library.calls.count("cudaHostAlloc") == 2
    assert len(library.memory_of) == 2
    slot.close()
    assert library.memory_of == {}


def test_a_slot_that_could_not_grow_can_later() -> None:
    """Nothing of the failed try is kept for good."""
    library = HostRuntime()
    slot = Slot(library, 0)
    library.fails["cudaMalloc"] = "CUDA failure 2: out of memory"
    with pytest.raises(CudaError):
        slot.fill({"x": np.ones(10)})
    library.fails.clear()
    address = slot.fill({"x": np.ones(10)})["x"]
    np.testing.assert_array_equal(at(address, (10,), np.float64), np.ones(10))
    slot.close()
    assert library.memory_of == {}


def test_what_is_pinned_already_is_not_copied_into_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device reads the slab itself."""
    library = HostRuntime()
    monkeypatch.setattr(cuda, "runtime", lambda: library)
    slab = np.arange(64, dtype=np.float32)
    pinned = cuda.register_pinned(slab)
    assert pinned is not None
    slot = Slot(library, 0)
    addresses = slot.fill({"x": slab[:16].reshape(4, 4)})
    np.testing.assert_array_equal(at(addresses["x"], (16,), np.float32), slab[:16])
    untouched = ctypes.string_at(slot._host, 64)
    assert untouched == bytes(64)
    pinned.release()
    slot.close()
