"""A request of an HTTP/2 connection that is not gRPC: the ASGI app answers it."""

import asyncio
import time
from typing import TYPE_CHECKING

from appliance.core.errors import Overloaded
from appliance.core.memory import STRANGER, Reservation
from appliance.wire import sentences
from appliance.wire.asgi import (
    OVERLOADED,
    TIMED_OUT,
    TOO_LARGE,
    Exchange,
    Headers,
    Problem,
    body_limit,
    cors_headers,
    scope,
)
from appliance.wire.calls import MARK, wake
from appliance.wire.context import header_pairs

if TYPE_CHECKING:
    from appliance.wire.h2 import Http2

NO_ERROR, INTERNAL_ERROR = 0x0, 0x2
"""Error codes of RFC 9113, 7."""


class HttpRequest:
    """A request for the ASGI app; it is the app's `Outlet`."""

    def __init__(self, connection: "Http2", stream: int, head: bytes) -> None:
        self.connection, self.stream = connection, stream
        self._room: asyncio.Future[None] | None = None
        self._head: tuple[int, Headers] | None = None  # of the reply, until its first piece is written
        headers = header_pairs(head)
        pseudo = {name: value for name, value in headers if name[:1] == b":"}
        plain = [(name, value) for name, value in headers if name[:1] != b":"]
        if b":authority" in pseudo:
            plain.insert(0, (b"host", pseudo[b":authority"]))
        self._limit = body_limit(connection.context.settings)
        self._cors = cors_headers(plain, connection.context.settings)
        self._received = 0
        self._until = time.monotonic() + connection.context.settings.request_timeout_s  # when the body must be here
        # For what was given to the exchange, and not taken by the app.
        self._held = connection.context.budget.expect(0, STRANGER)
        self._exchange = Exchange(
            connection.context.app,
            scope(
                connection.peer,
                http_version="2",
                method=pseudo.get(b":method", b"").decode("latin-1"),
                path=pseudo.get(b":path", b""),
                headers=plain,
            ),
            self,
        )
        self._exchange.begin()

    # ---- from the connection ----

    @property
    def receiving(self) -> bool:
        """The app's work is not counted elsewhere."""
        return True

    def feed(self, data: bytes) -> None:
        """A piece of the body."""
        self._received += len(data)
        if self._received > self._limit:
            self.connection.context.too_large()
            self._refuse(TOO_LARGE, sentences.body_too_large(self.connection.context.settings.max_message))
            return
        try:
            self._held.grow(len(data))
        except Overloaded as error:
            self._refuse(OVERLOADED, str(error))
            return
        self._exchange.feed(data)

    def _refuse(self, problem: Problem, details: str) -> None:
        """End without the app, whatever it is doing."""
        self.connection.done(self.stream)
        self.lost()
        self.connection.refuse_http(self.stream, problem, details, self._cors)

    def ended(self) -> None:
        """The body is complete."""
        self._until = 0.0
        self._exchange.end()

    def lost(self) -> None:
        """The client is gone."""
        self._held.release()
        self._exchange.lost()

    def expel(self) -> None:
        """End because the server does."""
        self.connection.session.reset(self.stream, INTERNAL_ERROR if self._exchange.started else NO_ERROR)
        self.connection.done(self.stream)
        self.lost()

    def tick(self, now: float) -> None:
        """A request whose body takes too long is answered so."""
        if not self._until or now < self._until:
            return
        seconds = self.connection.context.settings.request_timeout_s
        if self._exchange.queued:  # the app is slow, not the client
            self._until = now + seconds
        else:
            self._refuse(TIMED_OUT, sentences.request_too_late(seconds))

    def drained_now(self) -> None:
        """The client has taken enough for more to be written."""
        wake(self._room)

    # ---- from the app ----

    def start(self, status: int, headers: Headers) -> None:
        """See `Outlet.start`."""
        self._head = (status, headers)

    def body(self, data: bytes, last: bool) -> None:
        """See `Outlet.body`."""
        no_room = self.connection.no_room(len(data)) if len(data) > MARK else None
        if no_room is not None:
            raise Overloaded(no_room)
        if self._head is not None:
            (status, headers), self._head = self._head, None
            self.connection.session.respond(self.stream, status, list(headers), False)
        self.connection.session.data(self.stream, data, last)
        if last:
            self._held.release()
            self.connection.done(self.stream)
        self.connection.queued(len(data))

    async def drained(self) -> None:
        """See `Outlet.drained`."""
        if self.connection.session.queued(self.stream, MARK) > MARK:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def admitted(self, memory: Reservation) -> None:
        """See `Outlet.admitted`."""
        self._held.follow(memory)

    def credit(self, count: int) -> None:
        """See `Outlet.credit`."""
        self._held.shrink_to(max(0, self._held.count - count))
        self.connection.session.credit(self.stream, count)
        self.connection.plan_flush()

    def cut(self) -> None:
        """See `Outlet.cut`."""
        self._held.release()
        self.connection.session.reset(self.stream, INTERNAL_ERROR)
        self.connection.done(self.stream)
        self.connection.plan_flush()
