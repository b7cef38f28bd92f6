"""Blocks of a slab: no two overlap, and all of it is free again when all are given back."""

import random
from collections import deque

import numpy as np
import pytest

from appliance.core.errors import Overloaded
from appliance.core.shared import Segment
from appliance.engine import slab as slabs
from appliance.engine.slab import Blocks, FrontSlab, Slab


@pytest.mark.parametrize("seed", range(20))
def test_blocks_never_overlap(seed: int) -> None:
    """In any order of taking and giving back; and what was given back can be had as a whole."""
    dice = random.Random(seed)
    blocks = Blocks(20)
    taken: dict[int, int] = {}
    for _ in range(600):
        if taken and dice.random() < 0.5:
            offset = dice.choice(list(taken))
            del taken[offset]
            if dice.random() < 0.8:
                blocks.give_back(offset)
            else:
                blocks.give_back_later(offset)
            continue
        size = dice.choice([1, 200, 256, 257, 5_000, 40_000, 200_000])
        try:
            offset = blocks.take(size)
        except Overloaded:
            continue
        assert offset >= 0
        assert offset + size <= 1 << 20
        for other, length in taken.items():
            assert offset + size <= other or other + length <= offset
        taken[offset] = size
    for offset in taken:
        blocks.give_back(offset)
    assert blocks.take(1 << 20) == 0


def test_a_full_slab_says_so() -> None:
    """With how much was wanted, and how much there is."""
    blocks = Blocks(10)
    blocks.take(1024)
    with pytest.raises(Overloaded, match=r"block of 1 bytes .* \(1024 bytes\)"):
        blocks.take(1)


class Raced(deque[int]):
    """Whenever it is seen to have something, another thread is quicker."""

    def __bool__(self) -> bool:
        found = len(self) > 0
        self.clear()
        return found


def test_another_thread_may_be_quicker_to_take_back() -> None:
    """Rows are joined in several threads; what finalisers gave back is taken back by one of them."""
    blocks = Blocks(20)
    blocks._returned = Raced([blocks.take(1)])
    assert blocks.take(1) >= 0


def test_small_blocks_are_joined_when_a_large_one_is_wanted() -> None:
    """They are kept apart only while nobody needs them."""
    blocks = Blocks(12)
    offsets = [blocks.take(256) for _ in range(16)]
    for offset in offsets:
        blocks.give_back(offset)
    assert blocks.take(4096) == 0


def test_both_ends_see_the_same_arrays() -> None:
    """The front writes, the engine reads; nothing is copied."""
    segment = Segment.create("slab", Slab.size_for(16))
    front = FrontSlab(segment)
    engine = Slab(Segment.attach(_copy(segment)))
    assert front.order == engine.order == 16
    offset = front.take(400)
    front.array(offset, (10, 10), np.dtype(np.float32))[...] = np.arange(100).reshape(10, 10)
    assert engine.array(offset, (10, 10), np.dtype(np.float32))[3, 4] == 34
    engine.marks[5] = 9
    assert front.marks[5] == 9


def test_an_array_outside_is_refused() -> None:
    """Whoever sent such a descriptor is broken."""
    slab = Slab(Segment.create("slab", Slab.size_for(16)))
    for offset in (-1, (1 << 16) - 4):
        with pytest.raises((ValueError, TypeError)):
            slab.array(offset, (10,), np.dtype(np.float32))


def test_the_pages_of_large_free_blocks_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once nobody has taken a block for a while; those that are taken keep what they hold."""
    monkeypatch.setattr(slabs, "_REST_S", 0.0)
    slab = FrontSlab(Segment.create("slab", Slab.size_for(22)))
    kept, left = slab.take(1 << 20), slab.take(1 << 20)
    for offset in (kept, left):
        slab.array(offset, (1 << 20,), np.dtype(np.uint8))[...] = 1
    slab.blocks.give_back(left)
    assert not slab.rest()
    assert slab.array(kept, (1 << 20,), np.dtype(np.uint8)).all()
    assert not slab.array(left, (1 << 20,), np.dtype(np.uint8)).any()


def _copy(segment: Segment) -> int:
    import os

    return os.dup(segment.descriptor)
