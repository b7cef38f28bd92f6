"""What a front and an engine tell each other over their Unix stream: descriptors of rows, never the rows themselves.

A message is its length (u32), its kind (u8) and a fixed part, all little-endian, then what has no fixed length. What
is written within one turn of the loop leaves in one piece. Long words are said once: a *layout* (names, dtypes and
shapes of a submission's arrays) and an *ask* (model, principal, priority, outputs) are defined under a number, which
messages then use; a number may be defined anew, and means from then on what was said last.

    front → engine
      DEFINE   number and JSON of an ask or a layout
      SUBMIT   rows `first … first + count` of a block with `rows` rows: queue them
      CANCEL   nobody waits for a submission any more; GONE answers it
      PLACE    where in the slab the result that ROOM announced may be written; nowhere: -1
    engine → front
      DEFINE   of a result's layout
      RAN      a run that rows of a submission were in, before its outcome; if SUBMIT asked for it
      DONE     a submission's outcome: in the message, or in the place that was given
      FAILED   a submission that ended in an error, as JSON
      ROOM     a result of so many bytes is there, and too long for a message
      GONE     the engine does not look at a cancelled submission's block any more
"""

import asyncio
import json
import logging
import socket
import struct
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

from appliance.core.types import Array

_log = logging.getLogger(__name__)

DEFINE, SUBMIT, CANCEL, PLACE, DONE, FAILED, ROOM, GONE, RAN = range(9)

_HEAD = struct.Struct("<IB")
HEAD = _HEAD.size

DEFINED = struct.Struct("<BI")
"""What is defined (ASKS or LAYOUTS), its number; JSON follows."""
ASKS, LAYOUTS = range(2)

SUBMITTED = struct.Struct("<QIIIIIIQdB")
"""Number, ask, layout, rows of the block, first, count, slot of its marks, offset of the block, deadline, flags."""
ALONE = 1
"""Flag: these rows share a run with nobody."""
TIMED = 2
"""Flag: the runs are told."""

NUMBER = struct.Struct("<Q")
NUMBER_AND_SIZE = struct.Struct("<QQ")
NUMBER_AND_RUN = struct.Struct("<QIdddd")
"""Number, and what a `Run` says."""
PLACED = struct.Struct("<Qq")
OUTCOME = struct.Struct("<QIIII")
"""Number, layout, rows, bytes of arrays in this message, bytes of JSON about failed rows before them. Where a place was
given the arrays are there."""
NOTHING = 0xFFFFFFFF
"""In place of a layout: there are no arrays, as every row failed."""

INLINE = 32 * 1024
"""Bytes of a result up to which it travels in the message: to copy it twice costs less than to ask for a place."""

_NAMES = 4096
"""Definitions of one kind that are known at a time."""

_READ = 1 << 18

K = TypeVar("K", bound=Hashable)


def layout_of(arrays: "dict[str, Array]", *, whole: bool) -> tuple[Any, ...]:
    """What a layout says: whether the arrays are whole, then name, dtype and shape of each, without the rows' axis."""
    start = 0 if whole else 1
    return (whole, *((name, array.dtype.str, array.shape[start:]) for name, array in arrays.items()))


class Definitions(Generic[K]):
    """What one end has defined so far: at most so many of a kind, the oldest is defined anew."""

    def __init__(self, kind: int) -> None:
        self._kind = kind
        self._numbers: dict[K, int] = {}
        self._order: list[K | None] = []
        self._next = 0

    def number(self, stream: "Stream", what: K, said: Callable[[], Any]) -> int:
        """The number for `what`; defined on `stream` with what `said` gives, if it is not yet."""
        number = self._numbers.get(what)
        if number is not None:
            return number
        number = self._next % _NAMES
        self._next += 1
        if number < len(self._order):
            del self._numbers[self._order[number]]  # type: ignore[arg-type]  # every place is filled
            self._order[number] = what
        else:
            self._order.append(what)
        self._numbers[what] = number
        stream.send(DEFINE, DEFINED.pack(self._kind, number) + json.dumps(said()).encode())
        return number


class Stream:
    """One end of the Unix stream between a front and an engine. Used on the event loop's thread."""

    def __init__(
        self, sock: socket.socket, receive: Callable[[int, memoryview], None], on_close: Callable[[], None]
    ) -> None:
        """Read at once.

        Args:
            receive: takes a message's kind and what is behind it; it may not keep that.
            on_close: called once when the other end is gone, after all that it sent was received.
        """
        self._sock = sock
        self._receive = receive
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._rest = b""
        self._out: list[bytes] = []
        self._unsent = memoryview(b"")
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._read)

    def send(self, kind: int, body: bytes) -> None:
        """Send a message at the end of this turn of the loop."""
        if self.closed:
            return
        if not self._out and not self._unsent:
            self._loop.call_soon(self._flush)
        self._out.append(_HEAD.pack(len(body), kind))
        self._out.append(body)

    def close(self) -> None:
        """End it here; nothing is called any more."""
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            # Whoever made us has us: neither shall wait for the collector, as a slab's memory would with them.
            self._receive, self._on_close = _nothing, _nothing

    def _flush(self) -> None:
        if self.closed:
            return
        if not self._unsent:
            self._unsent = memoryview(b"".join(self._out))
            self._out.clear()
        try:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
                if not self._unsent and self._out:
                    self._unsent = memoryview(b"".join(self._out))
                    self._out.clear()
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._flush)
            return
        except OSError:
            # The other end is gone: what it sent before is still read, and then the end is met there.
            self._unsent = memoryview(b"")
            self._out.clear()
        self._loop.remove_writer(self._sock)

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            told = self._on_close
            self.close()
            told()
            return
        if self._rest:
            data = self._rest + data
        taken = 0
        for after, kind, body in _messages(data):
            try:
                self._receive(kind, body)
            except Exception:
                # One message must not keep those behind it from being heard: whoever waits for it has a deadline.
                _log.exception("a message between front and engine was not taken", extra={"kind": kind})
            if self.closed:
                return
            taken = after
        self._rest = data[taken:]


def _nothing(*_: object) -> None:
    """Nobody is told any more."""


def _messages(data: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """The whole messages at the beginning of `data`: where each ends, its kind, and what is behind its head."""
    view = memoryview(data)
    start, end = 0, len(data)
    while end - start >= HEAD:
        length, kind = _HEAD.unpack_from(data, start)
        after = start + HEAD + length
        if after > end:
            return
        yield after, kind, view[start + HEAD : after]
        start = after
