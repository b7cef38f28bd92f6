"""Attempts to reach the appliance: shared, and rarer while they fail."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from support.waiting import eventually_async

from appliance.connect.credentials import Credentials
from appliance.connect.trouble import Refused, Trouble
from appliance.connect.upstream import Upstream

from .conftest import Site


class Closer:
    """A server that closes each connection when it is let go; it counts them."""

    def __init__(self) -> None:
        self.count = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.count += 1
        await self.gate.wait()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.fixture
async def closer(site: Site) -> AsyncIterator[Closer]:
    """It is what the site's settings name as upstream."""
    made = Closer()
    server = await asyncio.start_server(made.take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    site.settings = site.settings.model_copy(update={"upstream": f"https://127.0.0.1:{port}"})
    async with server:
        yield made
        made.gate.set()


async def refusal(upstream: Upstream) -> Trouble:
    """Why a connection is not to be."""
    with pytest.raises(Refused) as error:
        await upstream.connect("h2", asyncio.Protocol)
    return error.value.trouble


def made(site: Site) -> Upstream:
    """Before the site's upstream."""
    return Upstream(site.settings, Credentials(site.settings, {}))


async def test_while_it_fails_nobody_tries_until_the_pause_is_over(site: Site, closer: Closer) -> None:
    upstream = made(site)
    assert (await refusal(upstream)).kind == "reset"
    for _ in range(20):
        await refusal(upstream)
    assert closer.count == 1


async def test_attempts_after_the_pause_are_one_for_all(site: Site, closer: Closer) -> None:
    upstream = made(site)
    await refusal(upstream)
    upstream.try_now()
    closer.gate.clear()
    asking = [asyncio.create_task(refusal(upstream)) for _ in range(20)]
    await eventually_async(lambda: closer.count == 2)
    closer.gate.set()
    assert {found.kind for found in await asyncio.gather(*asking)} == {"reset"}
    assert closer.count == 2


async def test_a_client_that_leaves_while_it_tries_leaves_the_turn_to_the_next(site: Site, closer: Closer) -> None:
    upstream = made(site)
    await refusal(upstream)
    upstream.try_now()
    closer.gate.clear()
    first = asyncio.create_task(refusal(upstream))
    await eventually_async(lambda: closer.count == 2)
    second = asyncio.create_task(refusal(upstream))
    await asyncio.sleep(0)
    first.cancel()
    await eventually_async(lambda: closer.count == 3)
    assert upstream.trouble is not None  # who left has proven nothing
    closer.gate.set()
    await second


async def test_pauses_double_up_to_their_limit_and_are_spread(site: Site, closer: Closer) -> None:
    site.settings = site.settings.model_copy(update={"retry_max_s": 0.5})
    upstream = made(site)
    pauses = []
    for _ in range(6):
        await refusal(upstream)
        pauses.append(upstream.retry_at - time.monotonic())
        upstream._retry_at = 0.0
    for pause, expected in zip(pauses, (0.1, 0.2, 0.4, 0.5, 0.5, 0.5), strict=True):
        assert 0.8 * expected - 0.05 <= pause <= 1.2 * expected
    upstream.proven()
    await refusal(upstream)
    assert upstream.retry_at - time.monotonic() <= 0.12


async def test_many_that_fail_together_are_one_step(site: Site, closer: Closer) -> None:
    upstream = made(site)
    closer.gate.clear()
    asking = [asyncio.create_task(refusal(upstream)) for _ in range(20)]
    await eventually_async(lambda: closer.count == 20)
    closer.gate.set()
    await asyncio.gather(*asking)
    assert upstream.retry_at - time.monotonic() <= 0.12


async def test_trouble_is_said_once_and_its_end_too(
    site: Site, closer: Closer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    upstream = made(site)
    for _ in range(5):
        await refusal(upstream)
        upstream.try_now()
    assert caplog.text.count("closed the connection during the TLS handshake") == 1
    upstream.refused()
    upstream.proven()
    upstream.proven()
    assert caplog.text.count("answers again") == 1
    assert "1 connections were refused" in caplog.text


async def test_new_certificate_files_are_tried_at_once(site: Site, closer: Closer) -> None:
    upstream = made(site)
    await refusal(upstream)
    site.install(site.make("bob"))
    await refusal(upstream)
    assert closer.count == 2
