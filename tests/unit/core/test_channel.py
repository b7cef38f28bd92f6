"""The line between supervisor and child."""

import asyncio
import json
import os
import struct
from typing import Any

import pytest

from appliance.core.channel import Body, Channel, ChannelClosed, pair
from appliance.core.errors import ApplianceError, BundleInvalid, DeadlineExceeded, TooManyInputs


class Ends:
    """Both ends in one loop; the far one answers "echo", "fail", "crash" and "stay"."""

    def __init__(self) -> None:
        ours, theirs = pair()
        self.told: list[tuple[Body, list[int]]] = []
        self.heard = asyncio.Event()
        self.closed = asyncio.Event()
        self.error: Exception = BundleInvalid("no good", detail="inside")
        self.far = Channel(
            theirs,
            {"echo": self._echo, "fail": self._fail, "stay": self._stay},
            {"news": self._news, "bad news": self._bad_news},
        )
        self.near = Channel(ours, {}, on_close=self.closed.set)

    async def _echo(self, body: Body, descriptors: list[int]) -> Body:
        for descriptor in descriptors:
            os.write(descriptor, b"here")
            os.close(descriptor)
        return body

    async def _fail(self, body: Body, descriptors: list[int]) -> None:
        raise self.error

    async def _stay(self, body: Body, descriptors: list[int]) -> None:
        await asyncio.Event().wait()

    def _news(self, body: Body, descriptors: list[int]) -> None:
        self.told.append((body, descriptors))
        self.heard.set()

    def _bad_news(self, body: Body, descriptors: list[int]) -> None:
        raise ValueError("oh")

    def close(self) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
async def ends() -> Any:
    made = Ends()
    yield made
    made.close()


async def test_a_call_is_answered(ends: Ends) -> None:
    """Also a message larger than what a socket takes at once, and several at the same time."""
    bodies: list[Body] = [{"n": n, "text": "é" * 300_000} for n in range(4)]
    assert await asyncio.gather(*(ends.near.call("echo", body) for body in bodies)) == bodies


async def test_descriptors_travel(ends: Ends) -> None:
    """Ours stays open; the other end has its own. They belong to their message, whatever else is sent."""
    reading, writing = os.pipe()
    large: Body = {"text": "x" * 500_000}
    calls = [ends.near.call("echo", large), ends.near.call("echo", {}, [writing]), ends.near.call("echo", large)]
    await asyncio.gather(*calls)
    assert os.read(reading, 10) == b"here"
    os.close(writing)
    os.close(reading)


async def test_an_error_arrives_as_what_it_was(ends: Ends) -> None:
    """Class, sentence and detail."""
    with pytest.raises(BundleInvalid, match="no good") as caught:
        await ends.near.call("fail")
    assert caught.value.detail == "inside"


@pytest.mark.parametrize("error", [DeadlineExceeded(2.0), TooManyInputs(200, 128)])
async def test_an_error_that_builds_its_sentence_keeps_it(ends: Ends, error: ApplianceError) -> None:
    """It is not built a second time."""
    ends.error = error
    with pytest.raises(type(error)) as caught:
        await ends.near.call("fail")
    assert str(caught.value) == str(error)


async def test_an_unforeseen_error_is_an_answer_too(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever asked does not wait for ever; the other end's log has the traceback."""
    ends.error = ZeroDivisionError("what")
    with pytest.raises(ApplianceError, match="ZeroDivisionError"):
        await ends.near.call("fail")
    assert "failed" in caplog.text


async def test_who_waits_is_told_when_the_other_end_goes(ends: Ends) -> None:
    """And so is whoever calls afterwards."""
    waiting = asyncio.ensure_future(ends.near.call("stay"))
    await asyncio.sleep(0)
    ends.far.close()
    with pytest.raises(ChannelClosed):
        await waiting
    await asyncio.wait_for(ends.closed.wait(), 10)
    with pytest.raises(ChannelClosed):
        await ends.near.call("echo")
    ends.near.tell("news")


async def test_news_come_in_their_order(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    """One that fails does not keep the next from being heard."""
    ends.near.tell("news", {"n": 1})
    ends.near.tell("bad news")
    ends.near.tell("news", {"n": 2})
    await ends.near.call("echo")
    assert [body["n"] for body, _ in ends.told] == [1, 2]
    assert "not taken" in caplog.text


async def test_messages_are_put_together_again_wherever_they_are_cut() -> None:
    """A stream has no boundaries."""
    ours, theirs = pair()
    heard: list[Body] = []
    channel = Channel(theirs, {}, {"news": lambda body, descriptors: heard.append(body)})
    for n in range(3):
        text = json.dumps({"tell": "news", "body": {"n": n}, "descriptors": 0}).encode()
        for byte in struct.pack("<I", len(text)) + text:
            ours.send(bytes([byte]))
            await asyncio.sleep(0)
    while len(heard) < 3:  # noqa: ASYNC110  # every turn reads what is there
        await asyncio.sleep(0)
    assert [body["n"] for body in heard] == [0, 1, 2]
    channel.close()
    ours.close()
