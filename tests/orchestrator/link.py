"""What goes wrong between machines: a TCP link to a port that is delayed, slow, cut, refused or dead on demand.

TLS passes through unseen, so that client and centre meet what a real network does to them.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Self

_PIECE = 64 * 1024
_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: on, 0 s. Closing then sends RST instead of FIN."""


@dataclass(eq=False)
class _Pipe:
    """One connection through the link."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)


class Link:
    """Forwards a loopback port of its own to a port, in a thread of its own, and breaks when it is told to.

    Attributes:
        port: where clients connect to.
        accepted: how many connections there were.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._delay_s = 0.0
        self._bytes_per_s = 0.0
        self._pipes: list[_Pipe] = []
        self.port = self.accepted = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._run(self._close())
        finally:  # a thread that went on would keep the whole run from ending
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # ---- what can be done to it ----

    def delay(self, seconds: float) -> None:
        """From now on every piece arrives so much later, either way."""
        self._delay_s = seconds

    def slow(self, bytes_per_s: float) -> None:
        """From now on each connection carries no more than this, either way: readers look slow. 0: no bound."""
        self._bytes_per_s = bytes_per_s

    def freeze(self) -> None:
        """From now on nothing arrives, and nothing is closed: both ends are left half-open. New connections too."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def thaw(self) -> None:
        """What is still there flows on."""
        self._loop.call_soon_threadsafe(self._flowing.set)

    def reset(self) -> None:
        """Every connection is cut with RST; new ones are welcome."""
        self._run(self._cut())

    def refuse(self) -> None:
        """Every connection is cut, and new ones are refused until `accept`."""
        self._run(self._stop_listening())
        self._run(self._cut())

    def accept(self) -> None:
        """New connections are welcome again, on the same port."""
        self._run(self._listen())

    # ---- the thread's side ----

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        # Who was accepted just now is let in first: asyncio would forget that socket.
        for listening in self._server.sockets:
            self._loop.remove_reader(listening.fileno())
        await asyncio.sleep(0)
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pipe = _Pipe(writer, far_writer)
        pipe.tasks = [
            asyncio.ensure_future(self._carry(reader, far_writer)),
            asyncio.ensure_future(self._carry(far_reader, writer)),
        ]
        self._pipes.append(pipe)
        await asyncio.wait(pipe.tasks)
        for end in (writer, far_writer):
            end.close()
        if pipe in self._pipes:
            self._pipes.remove(pipe)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(_PIECE):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                if self._bytes_per_s:
                    await asyncio.sleep(len(piece) / self._bytes_per_s)
                await self._flowing.wait()
                writer.write(piece)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except OSError:  # one end was reset, as by the kill of a process; the other must not be left half-open
            await self._flowing.wait()
            writer.transport.abort()

    async def _cut(self) -> None:
        pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            for end in (pipe.near, pipe.far):
                raw = end.get_extra_info("socket")
                with contextlib.suppress(OSError):  # it is closed already
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                end.transport.abort()
            for task in pipe.tasks:  # one of a frozen link waits for a thaw
                task.cancel()
            await asyncio.wait(pipe.tasks)

    async def _close(self) -> None:
        await self._stop_listening()
        self._flowing.set()
        await self._cut()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if others:
            await asyncio.wait(others, timeout=5)
