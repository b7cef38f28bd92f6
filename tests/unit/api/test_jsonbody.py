"""JSON from strangers: what it costs is known before it is read, and reading it stops nobody."""

import asyncio
import time
import tracemalloc

import pytest

from appliance.api import jsonbody
from appliance.core.errors import InvalidRequest
from appliance.core.memory import MemoryBudget


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 100_000 + b"0]",
        b"[" + b"{}," * 100_000 + b"0]",
        b"[" + b"1," * 300_000 + b"0]",
        b'"' + b"x" * 10**6 + b'"',
    ],
)
def test_what_a_text_costs_is_no_less_than_what_it_takes(body: bytes) -> None:
    """A bomb of brackets takes thirty times its length; the memory budget must know before."""
    tracemalloc.start()
    try:
        content = jsonbody.parse(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert content
    assert jsonbody.cost(body) >= peak * 0.9


async def test_what_is_loaded_is_paid_for() -> None:
    budget = MemoryBudget(10_000)
    with budget.hold(0) as memory:
        assert await jsonbody.load(b'{"a": [1, 2.5]}', memory) == {"a": [1, 2.5]}
        assert memory.count == jsonbody.cost(b'{"a": [1, 2.5]}')


@pytest.mark.parametrize("body", [b"", b"[1]", b'"a"', b"{", b"\xff", b'{"a":NaN}', b'{"a":1,"a":2}', b"[" * 100_000])
async def test_what_is_no_object_is_the_callers_fault(body: bytes) -> None:
    with MemoryBudget(10**9).hold(0) as memory, pytest.raises(InvalidRequest):
        await jsonbody.load(body, memory)


async def test_many_numbers_do_not_stop_the_loop() -> None:
    """While they are read, the loop's turns and the reader's alternate; else one long pause would be all of it."""
    body = b'{"d":[' + b"0.25," * 600_000 + b"1]}"
    pauses, last = 0, time.perf_counter()
    with MemoryBudget(10**9).hold(0) as memory:
        work = asyncio.create_task(jsonbody.load(body, memory))
        while not work.done():
            await asyncio.sleep(0)
            pauses += time.perf_counter() - last > 0.002
            last = time.perf_counter()
        content = await work
    assert len(content["d"]) == 600_001
    assert pauses > 8
