"""A request of an HTTP/2 connection that is not gRPC: the ASGI app answers it."""

import asyncio
import time
from typing import TYPE_CHECKING

from appliance.core.errors import Overloaded
from appliance.wire.asgi import (
    OVERLOADED,
    TIMED_OUT,
    TOO_LARGE,
    Exchange,
    Headers,
    Problem,
    body_limit,
    scope,
    too_large,
)
from appliance.wire.calls import MARK, wake

if TYPE_CHECKING:
    from appliance.wire.h2 import Http2

NO_ERROR, INTERNAL_ERROR = 0x0, 0x2
"""Error codes of RFC 9113, 7."""

_HTTP1_ONLY = (b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"proxy-connection")
"""Headers that HTTP/2 forbids. Source: RFC 9113, 8.2.2."""


class HttpRequest:
    """A request for the ASGI app; it is the app's `Outlet`."""

    def __init__(self, connection: "Http2", stream: int, head: bytes) -> None:
        self.connection, self.stream = connection, stream
        self._room: asyncio.Future[None] | None = None
        parts = head.split(b"\0")
        headers = list(zip(parts[0::2], parts[1::2], strict=False))
        pseudo = {name: value for name, value in headers if name[:1] == b":"}
        plain = [(name, value) for name, value in headers if name[:1] != b":"]
        if b":authority" in pseudo:
            plain.insert(0, (b"host", pseudo[b":authority"]))
        self._limit = body_limit(plain, connection.context.settings)
        self._received = 0
        self._until = time.monotonic() + connection.context.settings.request_timeout_s  # when the body must be here
        self._held = connection.context.budget.hold(0)  # for what was given to the exchange, and not taken by the app
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
            self._refuse(TOO_LARGE, too_large(self.connection.context.settings))
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
        self.connection.refuse_http(self.stream, problem, details)

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
        self.connection.session.reset(self.stream, NO_ERROR)
        self.connection.done(self.stream)
        self.lost()

    def late(self, now: float) -> bool:
        """Whether the body takes too long; then the request is answered so."""
        if not self._until or now < self._until:
            return False
        if self._exchange.queued:  # the app is slow, not the client
            self._until = now + self.connection.context.settings.request_timeout_s
            return False
        self._refuse(TIMED_OUT, _too_late(self.connection.context.settings.request_timeout_s))
        return False

    def drained_now(self) -> None:
        """The client has taken enough for more to be written."""
        wake(self._room)

    # ---- from the app ----

    def start(self, status: int, headers: Headers) -> None:
        """See `Outlet.start`."""
        kept = [(name, value) for name, value in headers if name not in _HTTP1_ONLY]
        self.connection.session.respond(self.stream, status, kept, False)
        self.connection.plan_flush()

    def body(self, data: bytes, last: bool) -> None:
        """See `Outlet.body`."""
        self.connection.session.data(self.stream, data, last)
        if last:
            self._held.release()
            self.connection.done(self.stream)
        self.connection.plan_flush()

    async def drained(self) -> None:
        """See `Outlet.drained`."""
        if self.connection.session.queued(self.stream, MARK) > MARK:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

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


def _too_late(seconds: float) -> str:
    return f"The request did not arrive within {seconds:g} s."
