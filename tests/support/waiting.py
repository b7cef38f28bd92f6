"""Waiting for what becomes true, with a deadline; a test never sleeps for a fixed time and hopes."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 120.0
"""How long a test waits for something that must happen; only a hung machine takes that long."""

T = TypeVar("T")
_STEP_S = 0.005


def eventually(predicate: Callable[[], T], timeout_s: float = 20, what: str = "") -> T:
    """The first true value of `predicate`. Raises: AssertionError: none within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {timeout_s:g} s: {what or predicate}")
        time.sleep(_STEP_S)


async def eventually_async(predicate: Callable[[], T], timeout_s: float = 20, what: str = "") -> T:
    """`eventually` that lets the event loop turn meanwhile."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {timeout_s:g} s: {what or predicate}")
        await asyncio.sleep(_STEP_S)
