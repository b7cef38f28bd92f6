"""The line between the supervisor and one of its children: calls, answers and news as JSON, with descriptors.

A message is its length (4 bytes, little-endian) and a JSON object; descriptors travel beside its first byte
(unix(7), SCM_RIGHTS). Both ends run it on their event loops. When one end goes, whatever waits at the other is told.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias

from appliance.core.errors import ApplianceError, as_data, of_data

_log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
_READ = 1 << 18
_DESCRIPTORS = 64
"""Descriptors that one message may bring; the kernel allows 253."""

Body: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[[Body, list[int]], Awaitable[Body | None]]
"""Answers a call; the descriptors are its own to close."""
Listener: TypeAlias = Callable[[Body, list[int]], None]
"""Takes a piece of news, likewise."""


class ChannelClosed(Exception):
    """The other end is gone."""


class Channel:
    """One end. Everything is called on the event loop's thread."""

    def __init__(
        self,
        sock: socket.socket,
        handlers: Mapping[str, Handler],
        listeners: Mapping[str, Listener] | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Listen at once.

        Args:
            sock: a connected unix stream socket; the channel's own from now on.
            handlers: by the name of what is asked; each call has a task of its own.
            listeners: by the name of what is told; called at once, in the order in which it was told.
            on_close: called once, when the other end is gone or `close` was called.
        """
        self._sock = sock
        self._handlers = handlers
        self._listeners = listeners or {}
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._to_send: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._waiting: dict[int, asyncio.Future[Body]] = {}
        self._next = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._read)

    async def call(self, name: str, body: Body | None = None, descriptors: Sequence[int] = ()) -> Body:
        """Ask the other end, and return what it answers; our descriptors stay open here.

        Raises: ApplianceError: what its handler raised. ChannelClosed: it went before it answered.
        """
        if self.closed:
            raise ChannelClosed
        self._next += 1
        number = self._next
        future: asyncio.Future[Body] = self._loop.create_future()
        self._waiting[number] = future
        try:
            self._send({"call": name, "number": number, "body": body or {}}, descriptors)
            return await future
        finally:
            self._waiting.pop(number, None)

    def tell(self, name: str, body: Body | None = None, descriptors: Sequence[int] = ()) -> None:
        """Send a piece of news; nobody hears it when the other end is gone."""
        if not self.closed:
            self._send({"tell": name, "body": body or {}}, descriptors)

    def close(self) -> None:
        """End it here; idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, held in self._to_send:
            _close_all(held)
        self._to_send.clear()
        _close_all(self._descriptors)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ChannelClosed())
        for task in self._tasks:
            task.cancel()
        self._on_close()

    # ---- out ----

    def _send(self, message: Body, descriptors: Sequence[int]) -> None:
        data = json.dumps({**message, "descriptors": len(descriptors)}, separators=(",", ":")).encode()
        # Copies: whoever gave them may close theirs before they are on their way.
        held = [os.dup(descriptor) for descriptor in descriptors]
        idle = not self._to_send
        self._to_send.append((memoryview(_LENGTH.pack(len(data)) + data), held))
        if idle:
            self._write()

    def _write(self) -> None:
        while self._to_send:
            data, held = self._to_send[0]
            try:
                count = socket.send_fds(self._sock, [data], list(held)) if held else self._sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._write)
                return
            except OSError:
                self._loop.call_soon(self.close)
                return
            _close_all(held)
            if count == len(data):
                self._to_send.popleft()
            else:
                self._to_send[0] = (data[count:], ())
        self._loop.remove_writer(self._sock)

    # ---- in ----

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _READ, _DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        self._descriptors.extend(descriptors)
        if not data:
            self.close()
            return
        self._received += data
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            end = _LENGTH.size + length
            if len(self._received) < end:
                return
            message = json.loads(bytes(self._received[_LENGTH.size : end]))
            del self._received[:end]
            self._take(message, [self._descriptors.popleft() for _ in range(message["descriptors"])])

    def _take(self, message: Body, descriptors: list[int]) -> None:
        if "tell" in message:
            try:
                self._listeners[message["tell"]](message["body"], descriptors)
            except Exception:
                # One piece of news must not keep the next ones from being heard.
                _log.exception("news between the appliance's processes were not taken", extra={"news": message["tell"]})
        elif "call" in message:
            self._spawn(self._answer(message, descriptors))
        else:
            future = self._waiting.get(message["answer"])
            if future is None or future.done():
                return
            if "error" in message:
                future.set_exception(of_data(message["error"]))
            else:
                future.set_result(message["body"])

    async def _answer(self, message: Body, descriptors: list[int]) -> None:
        answer: Body = {"answer": message["number"]}
        try:
            answer["body"] = await self._handlers[message["call"]](message["body"], descriptors) or {}
        except ApplianceError as error:
            answer["error"] = as_data(error)
        except Exception as error:
            # The other end must hear of it: whoever asked waits.
            _log.exception("a call between the appliance's processes failed", extra={"call": message["call"]})
            answer["error"] = as_data(ApplianceError(f"{message['call']} failed: {type(error).__name__}: {error}"))
        if not self.closed:
            self._send(answer, ())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected unix stream sockets; neither is inherited by children unless it is told to be."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def _close_all(descriptors: Sequence[int] | deque[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
