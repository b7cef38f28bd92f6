"""Load reports: an OrcaLoadReport as everybody reads it, and what is in it."""

import asyncio
from base64 import b64decode
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from appliance.api import load
from appliance.api.load import Load, encoded
from appliance.core.memory import MemoryBudget

FIELDS = {"cpu_utilization": 1, "mem_utilization": 2, "rps_fractional": 6, "application_utilization": 9}
"""Of xds.data.orca.v3.OrcaLoadReport, github.com/cncf/xds; all of them double."""


@pytest.fixture(scope="module")
def read() -> Callable[[bytes], dict[str, float]]:
    """Reads a report with protobuf's own code."""
    file = descriptor_pb2.FileDescriptorProto(name="orca.proto", package="orca", syntax="proto3")
    message = file.message_type.add(name="OrcaLoadReport")
    for name, number in FIELDS.items():
        message.field.add(name=name, number=number, type="TYPE_DOUBLE", label="LABEL_OPTIONAL")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("orca.OrcaLoadReport"))

    def fields(body: bytes) -> dict[str, float]:
        report = kind.FromString(body)
        return {name: getattr(report, name) for name in FIELDS}

    return fields


def test_it_is_read_as_it_was_meant(read: Callable[[bytes], dict[str, float]]) -> None:
    """And nothing else is in it: a byte and a double for each field."""
    assert len(encoded(0.25, 0.5, 1234.5, 1.5)) == 36
    assert read(encoded(0.25, 0.5, 1234.5, 1.5)) == {
        "cpu_utilization": 0.25,
        "mem_utilization": 0.5,
        "rps_fractional": 1234.5,
        "application_utilization": 1.5,
    }


async def test_what_is_fullest_is_told(
    read: Callable[[bytes], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full memory budget is a full appliance, however idle its CPUs are; the rate is of what ended meanwhile."""
    monkeypatch.setattr(load, "_EVERY_S", 0.05)
    budget, ended = MemoryBudget(1000), [0.0]
    reports: asyncio.Queue[bytes] = asyncio.Queue()
    task = asyncio.create_task(Load(budget, lambda: ended[0], gpus=False).measure(reports.put_nowait))
    await reports.get()
    with budget.hold(1000):
        ended[0] = 5.0
        found = read(b64decode(await reports.get()))
    task.cancel()
    assert found["application_utilization"] == 1.0
    assert 0 < found["rps_fractional"] <= 100
    assert 0 < found["mem_utilization"] < 1
    assert 0 <= found["cpu_utilization"] <= 1


async def test_what_cannot_be_measured_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """And tried again: a balancer goes on without."""
    monkeypatch.setattr(load, "_EVERY_S", 0.01)
    fails = [True]

    def ended() -> float:
        if fails[0]:
            raise OSError("gone")
        return 0.0

    reports: asyncio.Queue[bytes] = asyncio.Queue()
    fails[0] = False
    made = Load(MemoryBudget(1), ended, gpus=False)
    fails[0] = True
    task = asyncio.create_task(made.measure(reports.put_nowait))
    assert await reports.get() == b""
    fails[0] = False
    while not await reports.get():
        pass
    task.cancel()


async def test_a_front_that_died_makes_no_negative_rate(
    read: Callable[[bytes], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its count is gone with it."""
    monkeypatch.setattr(load, "_EVERY_S", 0.01)
    counts = iter([100.0])
    reports: asyncio.Queue[bytes] = asyncio.Queue()
    task = asyncio.create_task(Load(MemoryBudget(1), lambda: next(counts, 0.0), gpus=False).measure(reports.put_nowait))
    assert read(b64decode(await reports.get()))["rps_fractional"] == 0
    task.cancel()
