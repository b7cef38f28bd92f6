"""A slab: shared memory in which a front keeps the rows of its requests, and where the engine finds them.

The front owns it: it alone takes blocks and gives them back. The engine maps it, reads rows, writes large results into
blocks that the front took for them, and shows which rows it runs (the marks, at the slab's start), so that the
front knows after a crash what was in the run that crashed.

Blocks are taken by halving (Knuth, The Art of Computer Programming 1, section 2.5, "buddy system"). A block's size is a
power of two, but only pages that are written to cost memory; those of large blocks go back to the system when the slab
has been at rest for a while.
"""

import contextlib
import math
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from appliance.core.errors import Overloaded
from appliance.core.shared import Segment
from appliance.core.types import Array

SLOTS = 1 << 14
"""Submissions of one front that have marks of their own; slot 0 is no slot."""

_MARKS = SLOTS * 8
_SMALLEST = 8
"""log2 of the smallest block's bytes."""

_KEPT_WHOLE = 16
"""log2 of the largest block that is kept as it is when it is free: halving and joining again costs microseconds."""
_KEPT_COUNT = 64

_RETURNED = 19
"""log2 of the smallest free block whose pages go back to the system."""

_REST_S = 2.0
"""Seconds without a new block after which the pages of free ones go back."""

_ALIGN = 64
"""Bytes to which arrays in a block are aligned: a cache line, and what onnxruntime aligns its own to."""


class Blocks:
    """Which parts of `1 << order` bytes are free. May be used from any thread."""

    def __init__(self, order: int) -> None:
        self._lock = threading.Lock()
        self._order = order
        self._free: list[set[int]] = [set() for _ in range(order + 1)]
        self._free[order].add(0)
        self._kept: list[list[int]] = [[] for _ in range(_KEPT_WHOLE + 1)]
        self._taken: dict[int, int] = {}
        self._returned: deque[int] = deque()
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes in blocks that are taken."""
        self._take_back()
        return self._used

    def take(self, size: int) -> int:
        """The offset of a free block of at least `size` bytes. Raises: Overloaded: there is none."""
        order = max(_SMALLEST, (size - 1).bit_length()) if size > 1 else _SMALLEST
        self._take_back()
        with self._lock:
            if order <= _KEPT_WHOLE and self._kept[order]:
                offset = self._kept[order].pop()
            else:
                found = self._find(order)
                if found is None:
                    self._join_kept()
                    found = self._find(order)
                if found is None:
                    raise Overloaded(
                        f"No block of {size} bytes is free in the memory between this front and its engine "
                        f"({1 << self._order} bytes). Try again."
                    )
                offset = found
            self._taken[offset] = order
            self._used += 1 << order
        return offset

    def give_back(self, offset: int) -> None:
        """The block at `offset` is free again."""
        with self._lock:
            order = self._taken.pop(offset)
            self._used -= 1 << order
            if order <= _KEPT_WHOLE and len(self._kept[order]) < _KEPT_COUNT:
                self._kept[order].append(offset)
            else:
                self._join(offset, order)

    def give_back_later(self, offset: int) -> None:
        """The block at `offset` is free from the next `take` on. For finalisers, which must not wait for a lock."""
        self._returned.append(offset)

    def _take_back(self) -> None:
        while self._returned:
            try:
                offset = self._returned.popleft()
            except IndexError:  # another thread took the last one
                return
            self.give_back(offset)

    def return_pages(self, give_back: Callable[[int, int], None]) -> None:
        """Have `give_back` called with offset and length of each large free block; none of them is taken meanwhile."""
        with self._lock:
            for order in range(_RETURNED, self._order + 1):
                for offset in self._free[order]:
                    give_back(offset, 1 << order)

    def _find(self, order: int) -> int | None:
        for larger in range(order, self._order + 1):
            if self._free[larger]:
                offset = self._free[larger].pop()
                for half in range(larger - 1, order - 1, -1):
                    self._free[half].add(offset + (1 << half))
                return offset
        return None

    def _join(self, offset: int, order: int) -> None:
        while order < self._order and offset ^ (1 << order) in self._free[order]:
            self._free[order].discard(offset ^ (1 << order))
            offset &= ~(1 << order)
            order += 1
        self._free[order].add(offset)

    def _join_kept(self) -> None:
        for order, offsets in enumerate(self._kept):
            for offset in offsets:
                self._join(offset, order)
            offsets.clear()


class Slab:
    """One mapped slab, as its front or an engine sees it."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._base = -(-_MARKS // mmap.PAGESIZE) * mmap.PAGESIZE
        self.marks = np.frombuffer(segment.view[:_MARKS], np.uint64)
        """By slot: 0, or `(first row + 1) << 32 | rows` of what an engine runs of that submission now."""
        self.memory = segment.view[self._base :]

    @staticmethod
    def size_for(order: int) -> int:
        """Bytes of a segment whose blocks come to `1 << order`."""
        return (1 << order) + -(-_MARKS // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def order(self) -> int:
        """log2 of the bytes for blocks."""
        return len(self.memory).bit_length() - 1

    def array(self, offset: int, shape: Sequence[int], dtype: "np.dtype[np.generic]") -> Array:
        """An array over the slab's own memory, which keeps it mapped. Raises: ValueError: it does not lie within."""
        return self.bytes_at(offset, dtype.itemsize * math.prod(shape)).view(dtype).reshape(shape)

    def bytes_at(self, offset: int, size: int) -> Array:
        """The same as uint8 (size,). Raises: ValueError."""
        # `frombuffer` holds the memory's buffer, where `ndarray` would let the mapping be closed under it.
        return np.frombuffer(self.memory, np.uint8, size, offset) if size else np.empty(0, np.uint8)

    def give_pages_back(self, offset: int, length: int) -> None:
        """The pages of a free block cost no memory any more."""
        self.segment.give_back(self._base + offset, length)

    def close(self) -> None:
        """Unmap it, once no array looks at it any more; idempotent."""
        with contextlib.suppress(BufferError):  # an array does
            self.memory.release()
        self.segment.close()


class FrontSlab(Slab):
    """The slab as its owner has it: also which blocks and slots are free."""

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment)
        self.blocks = Blocks(self.order)
        self.slots = list(range(SLOTS - 1, 0, -1))
        self._dirty = False
        self._used_at = 0.0

    def take(self, size: int) -> int:
        """A block; see `Blocks.take`. Raises: Overloaded."""
        offset = self.blocks.take(size)
        self._dirty = True
        self._used_at = time.monotonic()
        return offset

    def rest(self) -> bool:
        """Give the pages of large free blocks back when none was taken for a while; True while that is to come."""
        if self._dirty and time.monotonic() - self._used_at > _REST_S:
            self._dirty = False
            self.blocks.return_pages(self.give_pages_back)
        return self._dirty


def aligned(size: int) -> int:
    """`size` rounded up to where the next array of a block begins."""
    return (size + _ALIGN - 1) & -_ALIGN
