"""The gRPC calls of an HTTP/2 connection that are not answered at once: what they have received, and how they end.

Whatever happens, a call ends once: with its reply, with a status, or because the client is gone.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from appliance.core.errors import Overloaded
from appliance.core.memory import Reservation
from appliance.core.types import Call, RpcAbort, RpcStatus
from appliance.wire import grpc, sentences
from appliance.wire.context import Head

if TYPE_CHECKING:
    from appliance.wire.h2 import Http2

MARK = 64 * 1024
"""Bytes that may wait for a client before the handler that streams to it is held back."""

_WAITING_TO_ALL = 64
"""Messages that may wait for an endpoint that asks for no credentials."""

_IN_A_ROW = 16
"""Messages that an endpoint which never waits may take before others have their turn."""

_MESSAGE_COST = 256
"""Bytes that a waiting message costs us beyond its own: a stream of empty ones is not free."""

_FINE = RpcAbort(RpcStatus.OK, "")
_GOING = RpcAbort(RpcStatus.UNAVAILABLE, "The appliance is stopping; try again.")
_EXPIRED = RpcAbort(RpcStatus.DEADLINE_EXCEEDED, "The deadline that the caller set is over.")


class Unary:
    """A unary call that is not answered yet."""

    def __init__(self, connection: "Http2", stream: int, head: Head, call: Call) -> None:
        self.connection, self.stream, self.head, self.call = connection, stream, head, call
        self._task: asyncio.Task[None] | None = None
        self._served = False  # the request is here, and in somebody's hands
        self._compress = False
        self._until = time.monotonic() + connection.context.settings.request_timeout_s
        self._timer = _at_deadline(call, self.abort)

    @property
    def receiving(self) -> bool:
        """Whether the request is not here yet."""
        return not self._served

    def admitted(self, memory: Reservation | None, size: int) -> None:
        """The request may come; its bytes are held."""
        release(self.call)
        self.call.memory = memory

    def whole(self, body: bytes) -> None:
        """The request is here, and all of it."""
        self._served = True
        self._task = asyncio.create_task(self._run(body))

    def message(self, body: bytes, compressed: bool) -> None:
        """The request is here; perhaps more than it."""
        if self._served:
            self.abort(grpc.more_than_one())
            return
        self._compress = compressed and self.head.wants_gzip
        if compressed:
            try:
                body = _inflated(self, body)
            except RpcAbort as abort:
                self.abort(abort)
                return
        quick = self.head.endpoint.quick
        if quick is not None and not compressed and quick(self.call, body, self.answer):
            self._served = True
        else:
            self.whole(body)

    def ended(self) -> None:
        """The client has said everything."""
        if not self._served:
            self.abort(RpcAbort(RpcStatus.INTERNAL, grpc.NO_MESSAGE))

    def drained(self) -> None:
        """Nobody waits for that."""

    def tick(self, now: float) -> None:
        """A request that takes too long ends."""
        if not self._served and now >= self._until:
            self.abort(_late(self.connection))

    def answer(self, reply: bytes | RpcAbort) -> None:
        """End with a reply, or with a status."""
        self._over()
        self.connection.reply(self.stream, reply)

    def abort(self, abort: RpcAbort) -> None:
        """End with a status; a handler that is at work is cancelled."""
        self.lost()
        self.connection.finish(self.stream, abort)

    def expel(self) -> None:
        """End because the server does."""
        self.abort(_GOING)

    def lost(self) -> None:
        """The client is gone."""
        self._over()
        if self._task is not None:
            self._task.cancel()

    async def _run(self, body: bytes) -> None:
        assert self.head.endpoint.unary is not None
        reply: bytes | None = None
        end: RpcAbort | None = None
        try:
            reply = await self.head.endpoint.unary(self.call, body)
        except RpcAbort as abort:
            end = abort
        except asyncio.CancelledError:
            end = _GOING  # by the server's end; a client that is gone hears nothing
        except Exception:
            end = grpc.unforeseen(self.head.method)
        finally:
            self._over()
        if reply is None:
            self.connection.finish(self.stream, end or _GOING)
        elif self._compress:
            self.connection.reply(self.stream, grpc.deflate(reply), True)
        else:
            self.connection.reply(self.stream, reply)

    def _over(self) -> None:
        release(self.call)
        if self._timer is not None:
            self._timer.cancel()
        if self.head.timed:
            self.connection.tell_timing(self.stream, self.call)
        self.connection.done(self.stream)


class Stream:
    """A call whose endpoint reads and writes messages as they come."""

    def __init__(self, connection: "Http2", stream: int, head: Head, call: Call) -> None:
        self.connection, self.stream, self.head, self.call = connection, stream, head, call
        self._messages: deque[tuple[bytes, Reservation, bool]] = deque()
        self._coming: Reservation | None = None  # for the message that is on its way
        self._until = 0.0  # when it must be here; 0: none is on its way
        self._ended = False
        self._news: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._task = asyncio.create_task(self._run())
        self._timer = _at_deadline(call, self.abort)

    @property
    def receiving(self) -> bool:
        """Streams may stay open for ever; their messages count by themselves."""
        return False

    def whole(self, body: bytes) -> None:
        """The one message of a client that has said everything."""
        self.message(body, False)
        self.ended()

    def admitted(self, memory: Reservation | None, size: int) -> None:
        """A message may come; its bytes are held until the endpoint is done with it."""
        self._forget_coming()
        self._coming = memory
        if size:
            self._until = time.monotonic() + self.connection.context.settings.request_timeout_s

    def message(self, body: bytes, compressed: bool) -> None:
        """The client has sent a message."""
        if self.head.endpoint.admit is None and len(self._messages) >= _WAITING_TO_ALL:
            self.abort(RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, f"More than {_WAITING_TO_ALL} messages wait to be read."))
            return
        memory, self._coming, self._until = self._coming, None, 0.0
        if memory is None:
            memory = self.connection.context.budget.expect(0, grpc.owner(self.head.endpoint))
        try:
            memory.grow(max(0, len(body) + _MESSAGE_COST - memory.count))
        except Overloaded as error:
            memory.release()
            self.abort(RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, str(error)))
            return
        self._messages.append((body, memory, compressed))
        wake(self._news)

    def ended(self) -> None:
        """The client has said everything."""
        self._ended = True
        wake(self._news)

    def drained(self) -> None:
        """The client has taken enough for more to be written."""
        wake(self._room)

    def tick(self, now: float) -> None:
        """Streams may take their time, but a message that has begun may not: memory is held for it."""
        if self._until and now >= self._until:
            self.abort(_late(self.connection))

    def answer(self, reply: bytes) -> None:
        """End with one message, as the endpoint itself would."""
        end = _FINE
        try:
            self.connection.push(self.stream, reply, False)
        except RpcAbort as abort:
            end = abort
        self.abort(end)

    def abort(self, abort: RpcAbort) -> None:
        """End with a status; the endpoint is cancelled."""
        self.lost()
        self.connection.finish(self.stream, abort)

    def expel(self) -> None:
        """End because the server does."""
        self.abort(_GOING)

    def lost(self) -> None:
        """The client is gone."""
        self._over()
        self._task.cancel()

    async def _run(self) -> None:
        assert self.head.endpoint.stream is not None
        end = _FINE
        try:
            replies = self.head.endpoint.stream(self.call, self._received())
            async with contextlib.aclosing(replies):  # type: ignore[type-var]  # endpoints are async generators
                async for reply in replies:
                    await self._send(reply)
        except RpcAbort as abort:
            end = abort
        except asyncio.CancelledError:
            end = _GOING  # as above
        except Exception:
            end = grpc.unforeseen(self.head.method)
        finally:
            self._over()
        self.connection.finish(self.stream, end)

    async def _send(self, reply: bytes) -> None:
        # All of them or none: which it is was said before the first, and clients pack only what gets smaller by it.
        compress = self.head.wants_gzip
        message = grpc.deflate(reply) if compress else reply
        if not self.connection.push(self.stream, message, compress):
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def _received(self) -> AsyncIterator[bytes]:
        """The client's messages. Each is let in anew when the one before was taken: an endpoint that is slow holds its
        client back."""
        taken = 0
        while True:
            taken += 1
            if taken % _IN_A_ROW == 0:
                await asyncio.sleep(0)
            while not self._messages:
                if self._ended:
                    return
                self._news = asyncio.get_running_loop().create_future()
                await self._news
            body, memory, compressed = self._messages.popleft()
            release(self.call)
            self.call.memory = memory
            yield _inflated(self, body) if compressed else body
            self.connection.session.credit(self.stream, len(body))
            self.connection.plan_flush()

    def _forget_coming(self) -> None:
        memory, self._coming = self._coming, None
        if memory is not None:
            memory.release()

    def _over(self) -> None:
        release(self.call)
        self._forget_coming()
        for _, memory, _ in self._messages:
            memory.release()
        self._messages.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self.head.timed:
            self.connection.tell_timing(self.stream, self.call)
        self.connection.done(self.stream)


def _inflated(opened: "Unary | Stream", body: bytes) -> bytes:
    """A compressed message unpacked, paid for from the memory budget. Raises: RpcAbort."""
    if not opened.head.gzip:
        raise RpcAbort(RpcStatus.INTERNAL, "A message is marked as compressed, and the call names no grpc-encoding.")
    context, call = opened.connection.context, opened.call
    if call.memory is None:
        call.memory = context.budget.expect(0, grpc.owner(opened.head.endpoint))
    limit = grpc.message_limit(opened.head.endpoint, context.settings.max_message)
    return grpc.unpack(body, limit, call.memory.grow)


def _at_deadline(call: Call, abort: Callable[[RpcAbort], None]) -> asyncio.TimerHandle | None:
    """Not every client cancels what it no longer waits for."""
    if call.deadline is None:
        return None
    return asyncio.get_running_loop().call_later(max(0.0, call.deadline - time.monotonic()), abort, _EXPIRED)


def _late(connection: "Http2") -> RpcAbort:
    seconds = connection.context.settings.request_timeout_s
    return RpcAbort(RpcStatus.DEADLINE_EXCEEDED, sentences.request_too_late(seconds))


def release(call: Call) -> None:
    """Give back what the call holds, if anything."""
    memory: Reservation | None = call.memory
    if memory is not None:
        call.memory = None
        memory.release()


def wake(future: "asyncio.Future[None] | None") -> None:
    """Let whoever waits for it go on."""
    if future is not None and not future.done():
        future.set_result(None)
