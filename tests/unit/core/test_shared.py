"""Memory that several processes see."""

import os
import subprocess
import sys

import numpy as np
import pytest

from appliance.core.shared import Segment

_OTHER = """
import sys
from appliance.core.shared import Segment
segment = Segment.attach(int(sys.argv[1]))
segment.view[0:5] = b"hello"
"""


def test_what_another_process_writes_is_seen_here() -> None:
    """Both map the same pages."""
    segment = Segment.create("test", 100)
    subprocess.run(
        [sys.executable, "-c", _OTHER, str(segment.descriptor)], pass_fds=[segment.descriptor], check=True, timeout=60
    )
    assert bytes(segment.view[:5]) == b"hello"
    segment.close()


def test_nobody_can_shrink_it() -> None:
    """A mapping whose memory is cut off ends the process that reads it."""
    segment = Segment.create("test", 100)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.descriptor, 0)
    segment.close()


def test_memory_whose_size_is_not_sealed_is_refused() -> None:
    """Its owner could shrink it. The descriptor is closed all the same."""
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    with pytest.raises(ValueError, match="not sealed"):
        Segment.attach(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_pages_that_are_given_back_are_zeros() -> None:
    """And only whole pages within the range are."""
    segment = Segment.create("test", 4 * 4096)
    segment.view[:] = b"x" * segment.size
    segment.give_back(10, 2 * 4096)
    found = np.frombuffer(segment.view, np.uint8)
    assert found[:4096].all()
    assert not found[4096 : 2 * 4096].any()
    assert found[2 * 4096 :].all()


def test_an_array_outlives_the_segment() -> None:
    """It keeps the memory until it goes itself."""
    segment = Segment.create("test", 100)
    array = np.frombuffer(segment.view, np.uint8)
    segment.view[3] = 7
    segment.close()
    segment.close()
    assert array[3] == 7
