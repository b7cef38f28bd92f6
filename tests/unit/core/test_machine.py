"""What the kernel's control groups leave us, read from trees like theirs."""

import os
from pathlib import Path

import pytest

from appliance.core import machine

GIB = 2**30


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup tree; we are in `/system.slice/our.service`."""
    own = tmp_path / "system.slice" / "our.service"
    own.mkdir(parents=True)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    real = machine._text
    monkeypatch.setattr(
        machine,
        "_text",
        lambda path: "0::/system.slice/our.service\n" if path == Path("/proc/self/cgroup") else real(path),
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return own


def test_without_limits_affinity_and_physical_memory_count(tree: Path) -> None:
    (tree / "cpu.max").write_text("max 100000\n")
    (tree / "memory.max").write_text("max\n")
    assert machine.usable_cpus() == 8
    assert machine.usable_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("quota", "cpus"), [("200000 100000", 2), ("250000 100000", 3), ("1000 100000", 1), ("9900000 100000", 8)]
)
def test_a_quota_is_rounded_up_to_whole_cpus_and_never_over_affinity(tree: Path, quota: str, cpus: int) -> None:
    (tree / "cpu.max").write_text(f"{quota}\n")
    assert machine.usable_cpus() == cpus


def test_the_tightest_of_all_enclosing_groups_counts(tree: Path) -> None:
    (tree / "cpu.max").write_text("400000 100000\n")
    (tree.parent / "cpu.max").write_text("150000 100000\n")
    (tree / "memory.max").write_text(f"{GIB}\n")
    (tree.parent / "memory.max").write_text(f"{GIB // 2}\n")
    assert machine.usable_cpus() == 2
    assert machine.usable_memory() == GIB // 2


def test_the_first_version_of_control_groups_counts_too(tree: Path) -> None:
    (tree.parent.parent / "memory").mkdir()
    (tree.parent.parent / "memory" / "memory.limit_in_bytes").write_text(f"{GIB // 4}\n")
    assert machine.usable_memory() == GIB // 4


@pytest.mark.parametrize("text", ["", "nonsense", "100000", "-1 100000", "max max"])
def test_a_quota_that_cannot_be_read_bounds_nothing(tree: Path, text: str) -> None:
    (tree / "cpu.max").write_text(text)
    assert machine.usable_cpus() == 8


def test_this_machine_leaves_us_something() -> None:
    assert machine.usable_cpus() >= 1
    assert machine.usable_memory() > 2**20


def test_accelerators_are_named_in_the_order_of_their_device_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver lists all of the machine; only those whose files are here count."""
    monkeypatch.setattr(machine, "_DEVICES", tmp_path / "dev")
    monkeypatch.setattr(machine, "_GPUS", tmp_path / "gpus")
    assert machine.accelerators() == ()
    (tmp_path / "dev").mkdir()
    for name in ("nvidia2", "nvidia10", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    for bus, minor, name in (("a", 10, "NVIDIA H200"), ("b", 2, "NVIDIA L4"), ("c", 0, "NVIDIA T4")):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
        text = f"Model: \t\t {name}\nIRQ:   \t\t 7\nDevice Minor: \t {minor}\nno colon\n"
        (tmp_path / "gpus" / bus / "information").write_text(text)
    assert machine.accelerators() == ("NVIDIA L4", "", "NVIDIA H200")


def test_gpus_are_told_in_the_order_of_the_pci_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nvidia-smi numbers them; those that the driver does not tell of come last, by their device files."""
    monkeypatch.setattr(machine, "_DEVICES", tmp_path / "dev")
    monkeypatch.setattr(machine, "_GPUS", tmp_path / "gpus")
    assert machine.gpus() == ()
    (tmp_path / "dev").mkdir()
    for minor in (0, 1, 7):
        (tmp_path / "dev" / f"nvidia{minor}").touch()
    for bus, minor, name in (("0000:c1:00.0", 0, "NVIDIA H200"), ("0000:41:00.0", 1, "NVIDIA L4")):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
        text = f"Model: \t\t {name}\nGPU UUID: \t GPU-{minor}\nDevice Minor: \t {minor}\n"
        (tmp_path / "gpus" / bus / "information").write_text(text)
    assert machine.gpus() == (
        machine.GpuFile(1, "NVIDIA L4", "GPU-1"),
        machine.GpuFile(0, "NVIDIA H200", "GPU-0"),
        machine.GpuFile(7, "", ""),
    )
