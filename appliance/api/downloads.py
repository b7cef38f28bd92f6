"""Inputs that lie behind URLs, for one request: fetched a few at a time, each URL once, all bounds held.

A caller must not make a flood of us: over all requests there are so many downloads at once, for one principal fewer;
the others wait, principals in turn, until their request's deadline. What arrives is taken from the request's memory
before it is kept, and given back when the download fails.
"""

import asyncio
import logging
import ssl
import sys
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from appliance.api.context import Context
from appliance.api.messages import UrlInput
from appliance.core.config import Config, Limits, Urls
from appliance.core.errors import (
    ApplianceError,
    CertificateError,
    DownloadFailed,
    InputTooLarge,
    InvalidInput,
    Overloaded,
    RequestError,
    UrlRefused,
)
from appliance.core.logs import RateLimitedLog
from appliance.core.metrics import Metrics
from appliance.core.types import Payload
from appliance.media import urls
from appliance.media.fetch import fetch, trust

_log = logging.getLogger(__name__)

_OUTCOMES: dict[type[ApplianceError], str] = {
    UrlRefused: "refused",
    DownloadFailed: "failed",
    InputTooLarge: "too_large",
    InvalidInput: "unreadable",
    Overloaded: "no_memory",
}


class Downloads:
    """Fetches what requests link to. Used from the event loop's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._errors = RateLimitedLog(_log)
        self._turns = Turns()
        self._urls, self._limits = Urls(), Limits()
        self._context: ssl.SSLContext | None = None
        metrics.watch(metrics.downloads_in_flight, lambda: self._turns.taken)

    def configure(self, config: Config) -> None:
        """Take over a new configuration; downloads that go on finish under the old one."""
        self._urls, self._limits = config.urls, config.limits
        self._context = None  # its file may have changed
        self._turns.configure(config.urls.connections, config.urls.connections_per_principal)

    async def payloads(self, context: Context, links: Sequence[UrlInput]) -> list[Payload | RequestError]:
        """What lies behind each link, in order, or why it could not be had.

        Raises: Overloaded: the memory for it is not free; that ends the whole request. Cancelling ends all downloads.
        """
        wanted = {(link.url, link.finish): link for link in links}
        found: dict[object, Payload | RequestError] = {}

        left = iter(wanted.items())

        async def work() -> None:
            for key, link in left:
                found[key] = await self._payload(context, link)

        try:
            async with asyncio.TaskGroup() as group:
                # More of them would only wait, and make a long queue for others to be looked through.
                for _ in range(min(len(wanted), self._urls.connections_per_principal)):
                    group.create_task(work())
        except ExceptionGroup as failed:
            # One of them speaks for the request.
            raise failed.exceptions[0] from None
        answers = [found[link.url, link.finish] for link in links]
        # Looking at an image leaves something in its payload, so each input has its own; the bytes are shared.
        return [replace(answer) if isinstance(answer, Payload) else answer for answer in answers]

    async def _payload(self, context: Context, link: UrlInput) -> Payload | RequestError:
        outcome = "cancelled"
        try:
            async with self._turns.one(context.principal):
                payload = await self._fetched(context, link)
            outcome = "ok"
            return payload
        except ApplianceError as error:
            outcome = next((word for kind, word in _OUTCOMES.items() if isinstance(error, kind)), "failed")
            self._note(context, link, error)
            if not isinstance(error, RequestError):
                raise
            return error
        finally:
            self._metrics.downloads.labels(outcome).inc()

    async def _fetched(self, context: Context, link: UrlInput) -> Payload:
        """Raises: InputError. Overloaded."""
        held = 0

        def reserve(count: int) -> None:
            nonlocal held
            self._metrics.download_bytes.labels().inc(count)
            context.memory.grow(count)
            held += count

        limit = f"{link.kind.value.lower()}_size"
        try:
            body = await fetch(
                link.url,
                self._urls,
                getattr(self._limits, limit),
                limit=f"limits.{limit}",
                trust=self._trust,
                reserve=reserve,
            )
            payload = link.finish(body)
            if payload.text is not None:
                context.memory.grow(sys.getsizeof(payload.text))
            return payload
        except BaseException:
            context.memory.shrink_to(context.memory.count - held)
            raise

    def _trust(self) -> ssl.SSLContext:
        """Made once a configuration: that takes 20 ms."""
        if self._context is None:
            try:
                self._context = trust(self._urls.ca)
            except CertificateError as error:  # it was sound when the configuration was taken over
                raise DownloadFailed(
                    "The appliance cannot check certificates of URLs now.", detail=str(error)
                ) from error
        return self._context

    def _note(self, context: Context, link: UrlInput, error: ApplianceError) -> None:
        """A line for the operator. Of the URL only the host: what comes behind it may be somebody's secret."""
        try:
            host = urls.read(link.url).authority
        except UrlRefused:
            host = ""
        self._errors.write(
            "download",
            logging.WARNING,
            f"an input's URL was not fetched: {error}",
            host=host,
            principal=context.principal,
            req_id=context.req_id,
            **({"detail": error.detail} if error.detail else {}),
        )


class Turns:
    """So many at once over all, and so many for one principal; who waits is served in order, principals in turn."""

    def __init__(self) -> None:
        self.taken = 0
        self._most, self._most_each = 1, 1
        self._held: dict[str, int] = {}
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def configure(self, most: int, most_each: int) -> None:
        """Change the bounds; who is in stays in."""
        self._most, self._most_each = most, most_each
        self._admit()

    @asynccontextmanager
    async def one(self, principal: str) -> AsyncIterator[None]:
        """A place, for as long as the block lasts."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(principal, deque()).append(turn)
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._leave(principal)
            else:
                self._give_up(principal, turn)

    def _admit(self) -> None:
        """Let in whoever may: one of each principal, then one of each again."""
        while self.taken < self._most:
            principal = next((name for name in self._waiting if self._held.get(name, 0) < self._most_each), None)
            if principal is None:
                return
            queue = self._waiting[principal]
            turn = queue.popleft()
            self._waiting.move_to_end(principal)
            if not queue:
                del self._waiting[principal]
            if turn.done():
                continue  # cancelled in this very moment
            self.taken += 1
            self._held[principal] = self._held.get(principal, 0) + 1
            turn.set_result(None)

    def _leave(self, principal: str) -> None:
        self.taken -= 1
        self._held[principal] -= 1
        if not self._held[principal]:
            del self._held[principal]
        self._admit()

    def _give_up(self, principal: str, turn: "asyncio.Future[None]") -> None:
        queue = self._waiting.get(principal)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[principal]
