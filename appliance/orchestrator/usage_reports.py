"""Posting reports of what callers used, at least once each, one after the other, to `orchestrator.usage_url`.

A report is made and kept by `usage_store` before it is posted, and stays the same until its receiver has answered 2xx
to the end. Its id goes along as idempotency key, so that a receiver which sees it twice knows. docs/usage.md says what
is posted, and what is made of each answer.
"""

import asyncio
import contextlib
import logging
import platform
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime

from appliance import __version__
from appliance.core.config import Config, Orchestrator
from appliance.core.errors import ConfigError
from appliance.core.files import printable
from appliance.core.metrics import Metrics
from appliance.orchestrator.backoff import pause_s
from appliance.orchestrator.pat import read_pat
from appliance.orchestrator.usage_store import Report, UsageStore

_log = logging.getLogger(__name__)

_POST_S = 30.0
"""Seconds that one attempt may take."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_LONGEST_ASKED_S = 3600.0
"""Seconds of patience that a receiver may ask for."""

_TRY_AGAIN = frozenset({408, 425, 429})
"""Statuses of 4xx that pass by themselves (RFC 9110, 8470, 6585)."""

_REPLY = 64 * 1024
"""Bytes of an answer that are read; what it says is for the log alone."""

TAKEN, REFUSED, FAILED = RESULTS = ("taken", "refused", "failed")


class NotTaken(ConfigError):
    """The receiver does not have the report, or did not say so.

    Attributes:
        refused: somebody must change something before it will.
        wait_s: seconds that it wants to be left alone.
    """

    def __init__(self, sentence: str, *, refused: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.refused, self.wait_s = refused, wait_s


async def post(settings: Orchestrator, report: Report) -> None:
    """Post a report; its receiver has it when this returns. Args: settings: with a usage_url. Raises: NotTaken."""
    import httpx  # whoever reports nothing does without it

    url = str(settings.usage_url)
    try:
        trust, pat = await asyncio.to_thread(_credentials, settings)
    except ConfigError as error:
        raise NotTaken(str(error), refused=True) from error
    headers = {
        "Content-Type": "application/json",
        "Idempotency-Key": report.id,
        "User-Agent": f"inference-appliance/{__version__}",
        "Accept-Encoding": "identity",
        **({"Authorization": f"Key {pat}"} if pat else {}),
    }
    try:
        async with (
            asyncio.timeout(_POST_S),
            httpx.AsyncClient(verify=trust, proxy=settings.proxy, trust_env=False, timeout=None) as client,  # noqa: S113
            client.stream("POST", url, content=report.body, headers=headers) as reply,
        ):
            said = b""
            async for piece in reply.aiter_raw():
                said += piece
                if len(said) > _REPLY:
                    break
    except TimeoutError as error:
        raise NotTaken(f"{url} did not answer within {_POST_S:g} s.") from error
    except (httpx.HTTPError, OSError) as error:
        why = printable(str(error) or type(error).__name__)[:300]
        remedy = "Check orchestrator.usage_url, root_ca and proxy, and that the port is open from here."
        raise NotTaken(f"{url} cannot be reached: {why}. {remedy}") from error
    if not reply.is_success:
        text = printable(said[:300].decode(errors="replace"))
        code = reply.status_code
        raise NotTaken(
            f"{url} answers HTTP {code}: {text.replace(pat, '********') if pat else text}",
            refused=code < 500 and code not in _TRY_AGAIN,
            wait_s=asked_wait_s(reply.headers.get("retry-after", ""), time.time()),
        )


def _credentials(settings: Orchestrator) -> tuple[ssl.SSLContext, str]:
    """Whom we trust and how we prove who we are, from files as they are now; the PAT is "" where there is none.

    Raises: ConfigError: a file cannot be read, or is not what it must be.
    """
    try:
        trust = ssl.create_default_context(cafile=settings.root_ca)
        if settings.certificate is not None:
            trust.load_cert_chain(settings.certificate, settings.key, password="")  # asks nobody at a terminal
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(f"orchestrator.root_ca, certificate or key cannot be used: {error}.") from error
    if settings.api_base is None and not settings.pat_file.exists():
        return trust, ""
    return trust, read_pat(settings.pat_file)


def asked_wait_s(value: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, an hour at most; 0 where it says nothing that we understand.

    Args: now: Unix time. Source: RFC 9110, section 10.2.3: seconds, or a date.
    """
    wait_s = 0.0
    if value.isascii() and value.isdigit():
        wait_s = float(value)
    elif value:
        with contextlib.suppress(ValueError, OverflowError):
            wait_s = parsedate_to_datetime(value).timestamp() - now
    return min(max(wait_s, 0.0), _LONGEST_ASKED_S)


class Reporter:
    """Has everything reported, as long as `run` runs. Used from the event loop's thread."""

    def __init__(
        self, config: Config, store: UsageStore, write: Callable[[], Awaitable[object]], metrics: Metrics
    ) -> None:
        """Args: write: has the store know what was used until now."""
        self._config = config
        self._store, self._write, self._metrics = store, write, metrics
        self._changed = asyncio.Event()
        self._failures = 0
        self._said = ""
        for result in RESULTS:
            metrics.usage_reports.labels(result)

    def configure(self, config: Config) -> None:
        """Take over a new configuration, now."""
        self._config = config
        self._failures = 0
        self._changed.set()

    async def run(self) -> None:
        """Report for ever."""
        pause_s = self._usual_pause_s()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), pause_s)
            self._changed.clear()
            pause_s = self._usual_pause_s()
            if self._config.orchestrator.usage_url is not None:
                try:
                    await self._report()
                except Exception as error:
                    # Whatever it is, it must not end the reporting.
                    pause_s = self._after(error)

    async def _report(self) -> None:
        """Post what waits. Raises: ConfigError: some of it waits still."""
        await self._write()
        try:
            while (report := await asyncio.to_thread(self._store.next_report, self._about(), time.time())) is not None:
                await post(self._config.orchestrator, report)
                await asyncio.to_thread(self._store.taken, report)
                self._metrics.usage_reports.labels(TAKEN).inc()
                if self._said:
                    _log.info("usage reports are taken again", extra={"attempts": self._failures})
                self._failures, self._said = 0, ""
                if not report.full:
                    break
        finally:
            waiting = await asyncio.to_thread(self._store.waiting)
            self._metrics.usage_unreported.labels().set(waiting)

    def _after(self, error: Exception) -> float:
        """Log and count a failure. Returns: seconds to wait; where somebody must change something, long ones."""
        refused = isinstance(error, NotTaken) and error.refused
        self._metrics.usage_reports.labels(REFUSED if refused else FAILED).inc()
        asked_s = error.wait_s if isinstance(error, NotTaken) else 0.0
        self._failures += 1
        if str(error) != self._said:
            unforeseen = None if isinstance(error, ConfigError) else error
            _log.warning("usage reports wait: %s", error, exc_info=unforeseen, extra={"attempts": self._failures})
        self._said = str(error)
        first_s = _LONGEST_WAIT_S if refused else _FIRST_WAIT_S
        return asked_s + pause_s(self._failures, first_s, _LONGEST_WAIT_S)

    def _usual_pause_s(self) -> float:
        return self._config.orchestrator.usage_interval_s * random.uniform(0.5, 1.5)  # noqa: S311  # not a secret

    def _about(self) -> dict[str, object]:
        """What a report says of us."""
        placement = self._config.placement
        return {
            "version": __version__,
            "host": platform.node(),
            "site": self._config.orchestrator.site,
            "compute_cluster_id": placement.compute_cluster_id,
            "nodepool_id": placement.nodepool_id or "",
        }
