"""GPUs of the machine, which one a device means, and which one has room; NVML is a double (tests/support)."""

import os
import sys
from types import SimpleNamespace

import pytest
from support.cuda_doubles import Nvml

from appliance.core import machine
from appliance.core.errors import DeviceError
from appliance.engine import gpu
from appliance.engine.gpu import Gpu, Need

GIB = 2**30
A, B = "GPU-aaaaaaaa-0000-0000-0000-000000000000", "GPU-bbbbbbbb-0000-0000-0000-000000000000"
TWO = (
    Gpu(0, 0, A, "NVIDIA H200", 140 * GIB, 100 * GIB, (9, 0)),
    Gpu(1, 1, B, "NVIDIA L4", 24 * GIB, 20 * GIB, (8, 9)),
)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """An H200, and an H200 that is cut in two with an empty place between."""
    double = Nvml(
        {"uuid": A, "name": "NVIDIA H200", "total": 140 * GIB, "free": 100 * GIB},
        {
            "uuid": B,
            "name": "NVIDIA H200",
            "total": 140 * GIB,
            "free": 70 * GIB,
            "instances": [
                {"uuid": "MIG-1", "name": "NVIDIA H200 MIG 3g.71gb", "total": 70 * GIB, "free": 69 * GIB},
                None,
                {"uuid": "MIG-2", "name": "NVIDIA H200 MIG 1g.18gb", "total": 18 * GIB, "free": 17 * GIB},
            ],
        },
    )
    monkeypatch.setitem(sys.modules, "pynvml", double)
    monkeypatch.delenv(gpu.VISIBLE, raising=False)
    return double


def test_sensors_tell_what_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """In base units; a MIG instance has memory and little else."""
    double = Nvml(
        {"uuid": A, "name": "H200", "total": 140, "free": 100, "percent": 37, "milliwatts": 512_300, "degrees": 61}
        | {"megahertz": 1980},
        {"uuid": B, "name": "H200", "instances": [{"uuid": "MIG-1", "name": "H200 MIG", "total": 70, "free": 69}]},
    )
    monkeypatch.setitem(sys.modules, "pynvml", double)
    whole, instance = gpu.readings()
    assert (whole.gpu.uuid, instance.gpu.uuid) == (A, "MIG-1")
    assert (whole.utilization, whole.power, whole.temperature, whole.clock) == (0.37, 512.3, 61, 1.98e9)
    assert (whole.memory_used, whole.memory_total) == (40, 140)
    assert (instance.memory_used, instance.memory_total) == (1, 70)
    assert (instance.utilization, instance.power, instance.temperature, instance.clock) == (None,) * 4
    assert double.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.readings() == []


# ---- what there is ---------------------------------------------------------------------------------------------------


def test_mig_instances_take_the_place_of_their_gpu(nvml: Nvml) -> None:
    """Each has its own number, name, UUID and memory; the GPU that is cut cannot be used as a whole."""
    found = gpu.devices()
    assert [(each.index, each.ordinal, each.uuid) for each in found] == [(0, 0, A), (1, 1, "MIG-1"), (2, 2, "MIG-2")]
    assert found[2] == Gpu(2, 2, "MIG-2", "NVIDIA H200 MIG 1g.18gb", 18 * GIB, 17 * GIB, (9, 0))
    assert gpu.driver_version() == "580.95.05"
    assert nvml.open == 0, "NVML is left as it was found"


def test_a_process_that_may_see_one_gpu_sees_one(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA numbers it 0; the number that the operator knows it by stays."""
    monkeypatch.setenv(gpu.VISIBLE, "MIG-2")
    (only,) = gpu.devices()
    assert (only.index, only.ordinal) == (2, 0)
    assert gpu.find("gpu:2", gpu.devices()) == gpu.find("gpu", gpu.devices()) == only


def test_an_engines_environment_shows_it_that_gpu_alone(nvml: Nvml) -> None:
    """By its UUID, which no change of order can make another's."""
    for each in gpu.devices():
        (only,) = gpu.visible(gpu.devices(), gpu.environment(each)[gpu.VISIBLE])
        assert only.uuid == each.uuid


@pytest.mark.parametrize(
    ("value", "indices"),
    [
        (None, [0, 1]),
        ("1,0", [1, 0]),
        ("0", [0]),
        ("", []),
        ("-1", []),
        ("1,7,0", [1]),
        ("0,0", [0]),
        (B, [1]),
        ("GPU-b", [1]),
        ("GPU-", []),
        (f"{B}, {A}", [1, 0]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(value: str | None, indices: list[int]) -> None:
    """In their order, up to the first entry that is wrong; a beginning of a UUID is enough when it is one GPU's."""
    found = gpu.visible(TWO, value)
    assert [each.index for each in found] == indices
    assert [each.ordinal for each in found] == list(range(len(indices)))


def test_without_nvml_the_drivers_files_tell_names_and_uuids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is not known then."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv(gpu.VISIBLE, raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: (machine.GpuFile(3, "NVIDIA L4", A), machine.GpuFile(1, "", "")))
    assert gpu.devices() == (Gpu(0, 0, A, "NVIDIA L4"), Gpu(1, 1, "", ""))
    assert gpu.driver_version() == ""
    assert gpu.used_by_this_process(TWO[0]) is None


def test_a_gpu_without_memory_of_its_own_is_one_all_the_same(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NVML does not support on it is not known."""
    monkeypatch.setitem(sys.modules, "pynvml", Nvml({"uuid": A, "name": "NVIDIA GB10"}))
    assert gpu.devices() == (Gpu(0, 0, A, "NVIDIA GB10"),)


def test_own_memory_is_that_of_this_process(nvml: Nvml) -> None:
    """Not its neighbours'; None when NVML does not know our process number."""
    nvml.processes = [SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=1)]
    assert gpu.used_by_this_process(TWO[0]) is None
    nvml.processes.append(SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 * GIB))
    assert gpu.used_by_this_process(TWO[0]) == 5 * GIB


# ---- which one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "index"), [("gpu", 0), ("gpu:0", 0), ("gpu:1", 1), (f"gpu:{B}", 1), (f"gpu:{B.lower()}", 1)]
)
def test_a_device_names_a_gpu(wanted: str, index: int) -> None:
    """By number or UUID; plain "gpu" is the first."""
    assert gpu.find(wanted, TWO).index == index


@pytest.mark.parametrize("wanted", ["gpu:2", "gpu:GPU-cccc", "gpu:MIG-1"])
def test_a_device_that_is_not_there_is_told_with_those_that_are(wanted: str) -> None:
    """So that the operator can copy one."""
    with pytest.raises(DeviceError) as error:
        gpu.find(wanted, TWO)
    assert wanted in str(error.value)
    assert f"gpu:1 (NVIDIA L4 {B}, 20.0 of 24.0 GiB free)" in str(error.value)


def test_where_there_is_no_gpu_that_is_said() -> None:
    with pytest.raises(DeviceError, match="Here is: none at all"):
        gpu.find("gpu", ())


# ---- where there is room ---------------------------------------------------------------------------------------------


def test_a_model_goes_where_most_is_free() -> None:
    """Of those where it fits with the headroom, to the byte."""
    need = Need(19 * GIB, "measured")
    assert gpu.place(need, TWO, GIB).index == 0
    assert gpu.place(need, TWO[1:], GIB).index == 1
    with pytest.raises(DeviceError):
        gpu.place(Need(19 * GIB + 1, "measured"), TWO[1:], GIB)


def test_a_model_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    with pytest.raises(DeviceError) as error:
        gpu.place(Need(101 * GIB, "measured when it was last loaded"), TWO, GIB)
    text = str(error.value)
    assert text.startswith("It needs 101.0 GiB of GPU memory (measured when it was last loaded), and 1.0 GiB must stay")
    assert "100.0 of 140.0 GiB free" in text
    assert "20.0 of 24.0 GiB free" in text


def test_a_gpu_whose_memory_is_not_known_is_the_last_resort() -> None:
    """Its driver will say when it is full."""
    unknown = Gpu(2, 2, "", "")
    assert gpu.place(Need(GIB, "measured"), (unknown, *TWO), 0).index == 0
    assert gpu.place(Need(500 * GIB, "measured"), (*TWO, unknown), 0) is unknown


def test_no_gpu_at_all_is_refused_too() -> None:
    with pytest.raises(DeviceError, match="there is no GPU"):
        gpu.place(Need(1, "measured"), (), 0)
