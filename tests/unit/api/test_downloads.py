"""Inputs behind URLs, from a request to its reply: bounded, counted, fetched once, and each its own input's fault."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from clarifai_grpc.grpc.api import resources_pb2
from cryptography.x509 import DNSName
from hypothesis import given, settings
from hypothesis import strategies as st
from support import pictures
from support.api_world import PICTURE, World, predict_request, soon
from support.http_site import Site, answer, certificate, redirect, serving
from support.waiting import eventually_async

from appliance.api.downloads import Turns
from appliance.core.config import Limits, Principal, Urls
from appliance.core.types import RpcAbort, RpcStatus

pytestmark = pytest.mark.asyncio(loop_scope="module")

Input, Data, Image, Text = resources_pb2.Input, resources_pb2.Data, resources_pb2.Image, resources_pb2.Text


@pytest_asyncio.fixture(loop_scope="module")
async def site() -> AsyncIterator[Site]:
    """Answers with a picture wherever nothing else is said."""
    async with serving() as made:
        made.usual = answer(PICTURE)
        yield made


def urls(site: Site, **changes: Any) -> Urls:
    return Urls(hosts=(f"127.0.0.1:{site.port}",), private_addresses=True, **changes)


def linked(site: Site, *paths: str) -> list[Any]:
    """Inputs whose pictures lie there."""
    return [Input(data=Data(image=Image(url=site.at("127.0.0.1", path)))) for path in paths]


def codes(reply: Any) -> list[int]:
    return [output.status.code for output in reply.outputs]


async def hold(writer: asyncio.StreamWriter) -> None:
    """Begins an answer that never ends."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 1000)
    await writer.drain()
    await asyncio.Event().wait()


# ---- answers ---------------------------------------------------------------------------------------------------------


async def test_urls_are_off_unless_hosts_are_listed(world: World, site: Site) -> None:
    """Each such input is refused by itself; the URL is echoed, as in Clarifai's replies."""
    reply = await world.api().predict("colours", *linked(site, "/cat.png"), PICTURE)
    assert codes(reply) == [30106, 10000]
    assert reply.outputs[0].input.data.image.url == site.at("127.0.0.1", "/cat.png")
    assert site.accepted == 0


async def test_what_a_url_delivers_is_answered_in_its_place(world: World, site: Site) -> None:
    """As if its bytes had been sent; a download that fails is its own input's fault, with its own code."""
    site.pages |= {
        "/404": answer(b"no", "404 Not Found"),
        "/text": answer(b"no picture"),
        "/big": answer(b"x" * 5000),
        "/far": redirect("http://10.0.0.1/"),
        "/near": redirect("/cat"),
    }
    client = world.api(urls=urls(site), limits=Limits(image_size=4000))
    others = Input(data=Data(image=Image(url="file:///etc/passwd")))
    inputs = [*linked(site, "/cat", "/404", "/text", "/big", "/far", "/near"), others, PICTURE]
    reply = await client.predict("colours", *inputs)
    assert codes(reply) == [10000, 30002, 30101, 30105, 30106, 10000, 30106, 10000]
    assert "limits.image_size" in reply.outputs[3].status.details
    assert reply.outputs[0].data == reply.outputs[5].data == reply.outputs[7].data
    assert client.budget.used == 0
    outcomes = ("ok", "failed", "too_large", "refused", "unreadable", "no_memory", "cancelled")
    assert [client.count("downloads_total", outcome=word) for word in outcomes] == [3, 1, 1, 2, 0, 0, 0]
    assert client.count("download_bytes_total") == 2 * len(PICTURE) + len(b"no picture")
    assert client.count("downloads_in_flight") == 0


@pytest.mark.parametrize("rpc", ["PostModelOutputs", "GenerateModelOutputs"])
async def test_arguments_of_methods_may_be_urls_as_well(world: World, site: Site, rpc: str) -> None:
    """The same picture as an argument, by URL and by bytes."""

    def pythonic(image: Any) -> Any:
        message = Input()
        message.data.metadata["_method_name"] = "predict"
        message.data.parts.add(id="image").data.image.CopyFrom(image)
        return message

    client = world.api(urls=urls(site))
    inputs = [pythonic(Image(url=site.at("127.0.0.1", "/cat"))), pythonic(Image(base64=PICTURE))]
    reply = await client.ask(rpc, predict_request("colours", *inputs))
    assert codes(reply) == [10000, 10000]
    assert reply.outputs[0].data == reply.outputs[1].data
    assert site.paths == ["/cat"]


async def test_texts_have_a_limit_of_their_own_and_must_be_utf8(world: World, site: Site) -> None:
    site.pages |= {"/good": answer(b"good"), "/odd": answer(b"\xff\xfe"), "/big": answer(b"a" * 100)}
    client = world.api(urls=urls(site), limits=Limits(text_size=50, image_size=20))
    inputs = [Input(data=Data(text=Text(url=site.at("127.0.0.1", path)))) for path in ("/good", "/odd", "/big")]
    reply = await client.predict("topic", *inputs, "good")
    assert codes(reply) == [10000, 30104, 30105, 10000]
    assert "limits.text_size" in reply.outputs[2].status.details
    assert reply.outputs[0].data == reply.outputs[3].data
    assert reply.outputs[0].input.data.text.url == site.at("127.0.0.1", "/good")
    assert client.count("downloads_total", outcome="unreadable") == 1


async def test_a_url_that_is_there_many_times_is_fetched_once(world: World, site: Site) -> None:
    """Whatever `allow_duplicate_url` says; each input has its own answer."""
    site.pages["/404"] = answer(b"no", "404 Not Found")
    inputs = linked(site, *["/cat"] * 100, *["/404"] * 28)
    inputs[5].data.image.allow_duplicate_url = True
    client = world.api(urls=urls(site))
    reply = await client.predict("colours", *inputs)
    assert codes(reply) == [10000] * 100 + [30002] * 28
    assert sorted(site.paths) == ["/404", "/cat"]
    assert client.budget.used == 0


async def test_a_private_ca_of_the_hosts_is_trusted(world: World, tmp_path: Path) -> None:
    """`urls.ca`; without it, or after its file has gone, the download fails and nothing else does."""
    async with serving(certificate(tmp_path, DNSName("localhost"))) as secure:
        secure.usual = answer(PICTURE)
        hosts = (f"localhost:{secure.port}",)
        given = Input(data=Data(image=Image(url=secure.at("localhost", "/cat", "https"))))
        found = []
        for ca in (tmp_path / "ca.pem", None, tmp_path / "gone.pem"):
            policy = Urls(hosts=hosts, private_addresses=True, ca=ca)
            found += codes(await world.api(urls=policy).predict("colours", given))
        assert found == [10000, 30002, 30002]
        assert len(secure.asked) == 1


# ---- what others may see ---------------------------------------------------------------------------------------------


async def test_secrets_are_neither_sent_on_nor_logged(
    world: World, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller's key stays here; the log names the host, and not what stands behind it in the URL."""
    client = world.api(urls=urls(site))
    inputs = linked(site, "/404/tok-path?sig=tok-query", "/cat?sig=tok-query")
    inputs.append(Input(data=Data(image=Image(url="http://ada:tok-user@127.0.0.1/tok-path"))))
    inputs.append(Input(data=Data(image=Image(url="http://unlisted.test/tok-path"))))
    site.pages["/404/tok-path?sig=tok-query"] = answer(b"tok-banner", "404 tok-banner")
    with caplog.at_level(logging.DEBUG):
        reply = await client.predict("colours", *inputs)
    assert codes(reply) == [30002, 10000, 30106, 30106]
    assert client.keys[0] not in "".join(site.asked)
    told = [
        f"{record.getMessage()} {record.__dict__}" for record in caplog.records if record.name.startswith("appliance")
    ]
    assert not [line for line in told if "tok-" in line]
    assert "tok-banner" not in str(reply)
    notes = [record for record in caplog.records if "an input's URL was not fetched" in record.getMessage()]
    hosts = sorted(record.__dict__["host"] for record in notes)
    assert hosts == ["", f"127.0.0.1:{site.port}", "unlisted.test"]
    assert all(record.__dict__["principal"] == "default" for record in notes)


async def test_why_a_host_was_not_reached_is_for_the_log_only(
    world: World, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.pages["/ssh"] = b"SSH-2.0-OpenSSH_9.2p1" + b"x" * 9000 + b"\r\n\r\n"
    with caplog.at_level(logging.WARNING):
        reply = await world.api(urls=urls(site)).predict("colours", *linked(site, "/ssh"))
    assert "OpenSSH" not in str(reply)
    details = [record.__dict__["detail"] for record in caplog.records if "detail" in record.__dict__]
    assert "RemoteProtocolError" in details[0]
    assert len(details[0]) < 300


# ---- bounds ----------------------------------------------------------------------------------------------------------


async def test_one_principal_has_so_many_downloads_at_once(world: World, site: Site) -> None:
    """Over all its requests; the others wait, and all are answered."""

    async def slow(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        writer.write(answer(PICTURE))

    for number in range(40):
        site.pages[f"/{number}"] = slow
    client = world.api(urls=urls(site, connections_per_principal=3, timeout_s=60))
    replies = await asyncio.gather(
        client.predict("colours", *linked(site, *(f"/{n}" for n in range(20)))),
        client.predict("colours", *linked(site, *(f"/{n}" for n in range(20, 40)))),
    )
    assert [codes(reply) for reply in replies] == [[10000] * 20] * 2
    assert site.most == 3


async def test_whoever_waits_for_slow_hosts_does_not_hold_up_others(world: World, site: Site) -> None:
    """And over all principals there are so many at most."""
    for number in range(30):
        site.pages[f"/slow{number}"] = hold
    ada, bob = Principal(name="ada"), Principal(name="bob")
    client = world.api(ada, bob, urls=urls(site, connections=5, connections_per_principal=4, timeout_s=60))
    slow = asyncio.create_task(client.predict("colours", *linked(site, *(f"/slow{n}" for n in range(30)))))
    await eventually_async(lambda: len(site.asked) == 4)
    reply = await client.predict("colours", *linked(site, "/1", "/2", "/3"), key=client.keys[1])
    assert codes(reply) == [10000] * 3
    assert site.most == 5
    assert client.count("downloads_in_flight") == 4
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    await eventually_async(lambda: not site.open)
    assert client.count("downloads_in_flight") == 0
    assert client.count("downloads_total", outcome="cancelled") == 4
    assert client.budget.used == 0


async def test_the_requests_deadline_ends_its_downloads(world: World, site: Site) -> None:
    """Those that wait for their turn, too."""
    site.pages |= {f"/{number}": hold for number in range(20)}
    client = world.api(urls=urls(site, timeout_s=60))
    with pytest.raises(RpcAbort) as caught:
        await client.predict("colours", *linked(site, *site.pages), deadline=soon(2))
    assert caught.value.status is RpcStatus.DEADLINE_EXCEEDED
    await eventually_async(lambda: not site.open)
    assert (client.budget.used, client.api.in_flight, site.accepted) == (0, 0, 8)


async def test_downloads_over_the_memory_budget_are_refused(world: World, site: Site) -> None:
    """21354 for the request, not an internal error; what has come is given back, and no more is read."""
    big = b"HTTP/1.1 200 OK\r\n\r\n"

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(big)
        while True:
            writer.write(b"\0" * 65536)
            await writer.drain()

    site.pages |= {"/1": endless, "/2": endless, "/3": endless}
    client = world.api(memory=1_000_000, urls=urls(site))
    reply = await client.predict("colours", *linked(site, "/1", "/2", "/3"))
    assert (reply.status.code, len(reply.outputs)) == (21354, 0)
    assert client.budget.used == 0
    assert client.count("download_bytes_total") < 1_200_000
    await eventually_async(lambda: not site.open)


async def test_memory_is_held_while_a_download_goes_on_and_given_back_when_it_fails(world: World, site: Site) -> None:
    async def fails(writer: asyncio.StreamWriter) -> None:
        await hold_until(writer, go)

    go = asyncio.Event()

    async def hold_until(writer: asyncio.StreamWriter, event: asyncio.Event) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 200_000)
        await writer.drain()
        await event.wait()

    site.pages |= {"/fails": fails, "/stays": hold}
    client = world.api(urls=urls(site, timeout_s=60))
    task = asyncio.create_task(client.predict("colours", *linked(site, "/fails", "/stays")))
    await eventually_async(lambda: client.budget.used > 200_000)
    go.set()
    await eventually_async(lambda: 1000 <= client.budget.used < 2000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.budget.used == 0


async def test_a_text_of_wide_characters_is_counted_as_wide_as_it_is(world: World, site: Site) -> None:
    """One emoji makes four bytes of every letter in memory."""
    body = "a" * 200_000 + "💩"
    site.pages["/wide"] = answer(body.encode())
    client = world.api(memory=700_000, urls=urls(site))
    reply = await client.predict("topic", Input(data=Data(text=Text(url=site.at("127.0.0.1", "/wide")))))
    assert reply.status.code == 21354
    assert client.budget.used == 0


async def test_a_reload_changes_hosts_and_bounds(world: World, site: Site) -> None:
    client = world.api()
    assert codes(await client.predict("colours", *linked(site, "/cat"))) == [30106]
    config = client.api._config
    client.api.configure(config.model_copy(update={"urls": urls(site, connections=1)}))
    assert codes(await client.predict("colours", *linked(site, *map("/{}".format, range(9))))) == [10000] * 9
    assert site.most == 1


async def test_each_picture_keeps_its_own_header(world: World, site: Site) -> None:
    """Inputs that share one download share its bytes, and not what the decoder left."""
    random = np.random.default_rng(0)
    site.usual = answer(pictures.png(random.integers(0, 256, (300, 300, 3), dtype=np.uint8)))
    reply = await world.api(urls=urls(site)).predict("colours", *linked(site, *["/cat"] * 64))
    assert codes(reply) == [10000] * 64
    assert len({str(output.data) for output in reply.outputs}) == 1


# ---- turns -----------------------------------------------------------------------------------------------------------


async def test_principals_have_their_turn_one_after_the_other() -> None:
    turns = Turns()
    turns.configure(1, 1)
    order: list[str] = []

    async def take(name: str) -> None:
        async with turns.one(name):
            order.append(name)
            await asyncio.sleep(0)

    await asyncio.gather(*map(take, ["ada"] * 4 + ["bob"] * 2 + ["eve"]))
    assert order == ["ada", "ada", "bob", "eve", "ada", "bob", "ada"]
    assert (turns.taken, turns._held, dict(turns._waiting)) == (0, {}, {})


async def test_whoever_gives_up_leaves_no_place_taken() -> None:
    """While waiting, in the very moment of being let in, and inside."""
    turns = Turns()
    turns.configure(1, 1)
    inside = asyncio.Event()

    async def stay() -> None:
        async with turns.one("ada"):
            inside.set()
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(stay()) for _ in range(3)]
    await inside.wait()
    tasks[1].cancel()  # waits
    await asyncio.sleep(0)
    tasks[0].cancel()  # is in; the third is let in by it, and cancelled before it knows
    tasks[2].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (turns.taken, turns._held, dict(turns._waiting)) == (0, {}, {})


async def test_wider_bounds_let_in_whoever_waits() -> None:
    turns = Turns()
    turns.configure(1, 1)
    count = 0

    async def stay() -> None:
        nonlocal count
        async with turns.one("ada"):
            count += 1
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(stay()) for _ in range(5)]
    await eventually_async(lambda: count == 1)
    turns.configure(4, 3)
    await eventually_async(lambda: count == 3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert turns.taken == 0


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=30)
async def test_bounds_hold_and_nobody_is_forgotten_whoever_leaves_when(seed: int, most: int, each: int) -> None:
    chance = random.Random(seed)
    turns = Turns()
    turns.configure(most, each)
    inside: Counter[str] = Counter()
    served = 0

    async def take(name: str) -> None:
        nonlocal served
        async with turns.one(name):
            inside[name] += 1
            try:
                assert inside[name] <= each
                assert inside.total() == turns.taken or inside.total() < turns.taken <= most
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                served += 1
            finally:
                inside[name] -= 1

    tasks = [asyncio.create_task(take(chance.choice("abc"))) for _ in range(60)]
    leaving = chance.sample(tasks, 20)
    for task in leaving:
        for _ in range(chance.randrange(3)):
            await asyncio.sleep(0)
        task.cancel()
    ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert not [end for end in ends if isinstance(end, Exception)]
    assert served >= 40
    assert (turns.taken, turns._held, dict(turns._waiting)) == (0, {}, {})
