"""Shared memory: sealed, seen by every process, and gone with the last of them."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.core.shared import Segment

_OTHER = """
import sys
from appliance.core.shared import Segment
segment = Segment.attach(int(sys.argv[1]))
assert bytes(segment.view[:3]) == b"one"
segment.view[-3:] = b"two"
"""


def test_another_process_sees_what_is_written_both_ways() -> None:
    """A descriptor is all that it needs."""
    segment = Segment.create("test", 100)
    segment.view[:3] = b"one"
    subprocess.run(
        [sys.executable, "-c", _OTHER, str(segment.descriptor)],
        pass_fds=(segment.descriptor,),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        check=True,
    )
    assert segment.size == mmap.PAGESIZE
    assert bytes(segment.view[-3:]) == b"two"
    segment.close()


def test_nobody_can_change_its_size() -> None:
    """Else whoever has it mapped could be killed by another's mistake."""
    segment = Segment.create("test", 4096)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.descriptor, size)
    segment.close()


def test_what_is_not_sealed_is_not_mapped() -> None:
    """Its descriptor is closed all the same: it was handed over."""
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    with pytest.raises(ValueError, match="not sealed"):
        Segment.attach(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_what_is_given_back_reads_as_zeros() -> None:
    """Whole pages only: what lies beside them stays."""
    page = mmap.PAGESIZE
    segment = Segment.create("test", 4 * page)
    segment.view[:] = b"x" * segment.size
    segment.give_back(page - 1, 2 * page)
    assert bytes(segment.view) == b"x" * page + bytes(page) + b"x" * (2 * page)
    segment.close()


def test_its_descriptor_goes_with_it() -> None:
    """Whoever failed before anybody could close it leaves none behind; what was mapped stays while it is looked at."""
    segment = Segment.create("test", 4096)
    descriptor, view = segment.descriptor, segment.view
    del segment
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    view[:3] = b"one"
    assert bytes(view[:3]) == b"one"


def test_closing_waits_for_whoever_looks() -> None:
    """And may be done twice."""
    segment = Segment.create("test", 4096)
    cells = segment.view[:16].cast("d")
    segment.close()
    segment.close()
    cells[1] = 2.5
    assert cells[1] == 2.5
