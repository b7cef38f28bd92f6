"""Memory that several processes see: a memfd of fixed size, mapped by each of them.

Who makes it seals its size, so that nobody can shrink it under another's feet (a SIGBUS there). Its descriptor travels
to others over unix sockets or by inheritance; the memory is gone when the last of them has closed it.
"""

import contextlib
import fcntl
import mmap
import os
from typing import Self

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """One mapped memfd. All of it is zero when it is made; pages cost memory once they are written to."""

    def __init__(self, descriptor: int, mapped: mmap.mmap) -> None:
        """Use `create` or `attach`."""
        self.descriptor = descriptor
        self.size = len(mapped)
        self._mapped = mapped
        self.view = memoryview(mapped)
        """Its bytes, writable."""

    @classmethod
    def create(cls, name: str, size: int) -> Self:
        """Make one of `size` bytes, rounded up to whole pages; `name` shows in /proc. Raises: OSError."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            return cls(descriptor, mmap.mmap(descriptor, size))
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def attach(cls, descriptor: int) -> Self:
        """Map one that another process made; its descriptor is ours then. Raises: ValueError: not sealed."""
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ValueError("the shared memory's size is not sealed")
            return cls(descriptor, mmap.mmap(descriptor, os.fstat(descriptor).st_size))
        except BaseException:
            os.close(descriptor)
            raise

    def give_back(self, start: int, length: int) -> None:
        """Let the system have the whole pages of a range again; they read as zeros then.

        Source: fallocate(2), FALLOC_FL_PUNCH_HOLE; madvise's MADV_REMOVE is the same for a shared mapping.
        """
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._mapped.madvise(mmap.MADV_REMOVE, first, last - first)

    def __del__(self) -> None:
        # Whoever fails before there is anybody to close it leaves no descriptor behind; views keep what is mapped.
        if getattr(self, "descriptor", -1) >= 0:
            os.close(self.descriptor)

    def close(self) -> None:
        """Unmap it here, once no array looks at it any more; idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        with contextlib.suppress(BufferError):  # an array looks at it: it goes with the last of them
            self.view.release()
            self._mapped.close()
