"""CUDA's errors that end a process's use of the GPU, and slots; CUDA's runtime is a double on host memory."""

import numpy as np
import pytest
from support.cuda_doubles import HostRuntime, at

from appliance.engine import cuda
from appliance.engine.cuda import CudaError, Slot

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
