"""The predict cache: the same answer without a run, to whoever asked for it, and to nobody else."""

import asyncio
import gc
import tracemalloc
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clarifai_grpc.grpc.api import resources_pb2
from hypothesis import given
from hypothesis import strategies as st
from support import graphs, pictures
from support.api_world import PICTURE, Client, World, predict_request
from support.http_site import answer, serving

from appliance.api.cache import PredictCache, digest
from appliance.core.config import Cache, Limits, Principal, Urls
from appliance.core.errors import InferenceFailed, InvalidInput, Overloaded
from appliance.core.memory import MemoryBudget
from appliance.core.metrics import Metrics
from appliance.core.types import ConceptScores, Embedding, Payload, PredictOptions, Tensors
from appliance.tasks.servable import Servable

pytestmark = pytest.mark.asyncio(loop_scope="module")

Input, Data, Image = resources_pb2.Input, resources_pb2.Data, resources_pb2.Image
OTHER = pictures.png(np.full((8, 8, 3), 200, np.uint8))
MIB = 2**20


# ---- through the API -------------------------------------------------------------------------------------------------


class Runs:
    """Counts the payloads that servables are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        theirs = Servable.predict

        async def predict(servable: Servable, payloads: Sequence[Any], *arguments: Any, **options: Any) -> Any:
            self.count += len(payloads)
            return await theirs(servable, payloads, *arguments, **options)

        monkeypatch.setattr(Servable, "predict", predict)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


async def ask(client: Client, model: str, *inputs: Any, key: str = "", flag: bool = True, **more: Any) -> Any:
    """The reply to a request that says `use_predict_cache`."""
    request = predict_request(model, *inputs, **more)
    request.use_predict_cache = flag
    return await client.ask("PostModelOutputs", request, key=key)


def cached(world: World, *principals: Principal, **sections: Any) -> Client:
    return world.api(*principals, **{"cache": Cache(size=MIB), **sections})


def hits(client: Client, model: str = "colours", version: str = "2") -> float:
    return client.count("cache_hits_total", model=model, version=version)


@pytest.mark.parametrize(
    ("model", "given", "kind"),
    [("colours", PICTURE, "image"), ("topic", "good", "text"), ("vector", PICTURE, "image")],
)
@pytest.mark.parametrize("pythonic", [False, True])
async def test_a_hit_is_the_same_answer_without_a_run(
    world: World, runs: Runs, model: str, given: Any, kind: str, pythonic: bool
) -> None:
    """In the old form and in the new one; id, time and request id are the reply's own."""
    client = cached(world)
    content = (
        {"image": {"base64": given}}
        if kind == "image"
        else {"string_value" if pythonic else "text": given if pythonic else {"raw": given}}
    )
    message = Input(id="mine")
    if pythonic:
        message.data.metadata["_method_name"] = "predict"
        message.data.parts.add(id=kind).data.CopyFrom(Data(**content))
    else:
        message.data.CopyFrom(Data(**content))
    first = await ask(client, model, message)
    second = await ask(client, model, message)
    assert (first.status.code, second.status.code) == (10000, 10000), first
    assert second.outputs[0].data == first.outputs[0].data
    assert second.outputs[0].model == first.outputs[0].model
    assert second.outputs[0].input.id == "mine"
    assert second.outputs[0].id != first.outputs[0].id
    assert second.status.req_id != first.status.req_id
    assert runs.count == 1
    assert (
        client.count("inputs_total", model=model, version=second.outputs[0].model.model_version.id, code="10000") == 2
    )
    assert client.budget.used == 0


def array(values: Any, dtype: str = "float32") -> Any:
    found = np.array(values, dtype)
    return resources_pb2.NDArray(buffer=found.tobytes(), shape=found.shape, dtype=dtype)


async def test_arrays_are_found_by_their_values_and_shapes(world: World, runs: Runs) -> None:
    client = cached(world)
    given = [[1, 2, 3], [1, 2, 4], [[1, 2, 3]]]
    plain = await world.api().predict("tensor", *[Input(data=Data(ndarray=array(values))) for values in given])
    assert plain.status.code == 10000
    runs.count = 0
    for _ in range(2):
        for values, output in zip(given, plain.outputs, strict=True):
            reply = await ask(client, "tensor", Input(data=Data(ndarray=array(values))))
            assert reply.outputs[0].data == output.data
    assert runs.count == 3


async def test_arrays_are_found_by_their_names(world: World, runs: Runs) -> None:
    """And come back by theirs."""
    client = cached(world)

    def pair(a: list[float], b: list[float]) -> Any:
        parts = [resources_pb2.Part(id=name, data=Data(ndarray=array(v))) for name, v in (("a", a), ("b", b))]
        message = Input(data=Data(parts=parts))
        message.data.metadata["_method_name"] = "predict"
        return message

    first = await ask(client, "pair", pair([1, 2], [3, 4]))
    assert first.status.code == 10000
    assert (await ask(client, "pair", pair([1, 2], [3, 4]))).outputs[0].data == first.outputs[0].data
    assert runs.count == 1
    await ask(client, "pair", pair([3, 4], [1, 2]))
    assert runs.count == 2


async def test_without_the_flag_nothing_is_looked_up_or_kept(world: World, runs: Runs) -> None:
    client = cached(world)
    await ask(client, "colours", PICTURE)
    reply = await ask(client, "colours", PICTURE, OTHER, flag=False)
    assert reply.status.code == 10000
    assert (hits(client), client.count("cache_entries")) == (0, 1)
    assert runs.count == 3


async def test_it_is_off_by_default_and_the_flag_changes_nothing(world: World) -> None:
    """Not even the quick way."""
    client = world.api()
    for _ in range(2):
        request = predict_request("colours", PICTURE)
        request.use_predict_cache = True
        call = client.call("/clarifai.api.V2/PostModelOutputs")
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        quick = client.endpoints["/clarifai.api.V2/PostModelOutputs"].quick
        assert quick is not None
        assert quick(call, request.SerializeToString(), done.set_result)
        await done
    reply = await ask(client, "colours", PICTURE, PICTURE)
    assert reply.status.code == 10000
    assert (hits(client), client.count("cache_entries"), client.count("cache_limit_bytes")) == (0, 0, 0)


async def test_a_turned_on_cache_leaves_the_quick_way_to_those_without_the_flag(world: World) -> None:
    client = cached(world)
    body = predict_request("colours", PICTURE).SerializeToString()
    quick = client.endpoints["/clarifai.api.V2/PostModelOutputs"].quick
    assert quick is not None
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    assert quick(client.call("/clarifai.api.V2/PostModelOutputs"), body, done.set_result)
    await done


async def test_options_versions_models_and_principals_are_kept_apart(world: World, runs: Runs) -> None:
    """Who sent the same input must not show in how fast another one is answered."""
    client = cached(world, Principal(name="ada"), Principal(name="bob"))
    asked: list[dict[str, Any]] = [
        {},
        {"output_config": {"max_concepts": 1}},
        {"output_config": {"max_concepts": 2}},
        {"output_config": {"min_value": 0.3}},
        {"output_config": {"select_concepts": [{"name": graphs.CONCEPTS[0]}]}},
        {"output_config": {"select_concepts": [{"name": graphs.CONCEPTS[1]}]}},
        {"version": "1"},
        {"key": client.keys[1]},
        {"key": client.keys[1], "version": "1"},
    ]
    first = [await ask(client, "colours", PICTURE, **more) for more in asked]
    wide = await ask(client, "wide", PICTURE)
    assert runs.count == len(asked) + 1
    assert hits(client) == hits(client, version="1") == 0
    again = [await ask(client, "colours", PICTURE, **more) for more in asked]
    assert runs.count == len(asked) + 1
    assert [reply.outputs[0].data for reply in again] == [reply.outputs[0].data for reply in first]
    assert (await ask(client, "wide", PICTURE)).outputs[0].data == wide.outputs[0].data
    assert {len(reply.outputs[0].data.concepts) for reply in again} >= {1, 2, 3}


async def test_what_is_said_out_loud_and_the_default_are_the_same(world: World, runs: Runs) -> None:
    """`max_concepts` 20 is what a request has that says nothing."""
    client = cached(world)
    await ask(client, "colours", PICTURE)
    await ask(client, "colours", PICTURE, output_config={"max_concepts": 20})
    assert (runs.count, hits(client)) == (1, 1)


async def test_hits_and_misses_of_one_request_stand_in_their_places(world: World, runs: Runs) -> None:
    """Bad inputs, too; equal ones are run once."""
    client = cached(world)
    plain = await world.api().predict("colours", PICTURE, OTHER)
    runs.count = 0
    await ask(client, "colours", OTHER)
    reply = await ask(client, "colours", b"no picture", PICTURE, OTHER, PICTURE, "a text", PICTURE)
    assert [output.status.code for output in reply.outputs] == [30101, 10000, 10000, 10000, 30104, 10000]
    mine, other = plain.outputs[0].data, plain.outputs[1].data
    assert [output.data for output in reply.outputs] == [Data(), mine, other, mine, Data(), mine]
    assert runs.count == 1 + 3  # no picture, PICTURE, a text
    assert hits(client) == 3
    assert client.count("cache_misses_total", model="colours", version="2") == 4


async def test_failures_are_not_kept(world: World, runs: Runs) -> None:
    client = cached(world)
    black = pictures.png(np.zeros((8, 8, 3), np.uint8))
    for _ in range(2):
        reply = await ask(client, "fragile", black, b"no picture")
        assert [output.status.code for output in reply.outputs] == [21313, 30101]
    assert runs.count == 4
    assert client.count("cache_entries") == 0


async def test_a_url_is_found_by_what_it_delivers(world: World, runs: Runs) -> None:
    """It is fetched every time: what lies there now is what is answered."""
    async with serving() as site:
        site.pages |= {"/a": answer(PICTURE), "/b": answer(PICTURE)}
        client = cached(world, urls=Urls(hosts=(f"127.0.0.1:{site.port}",), private_addresses=True))

        def linked(path: str) -> Any:
            return Input(data=Data(image=Image(url=site.at("127.0.0.1", path))))

        first = await ask(client, "colours", PICTURE)
        for path in ("/a", "/b"):
            assert (await ask(client, "colours", linked(path))).outputs[0].data == first.outputs[0].data
        assert runs.count == 1
        site.pages["/a"] = answer(OTHER)
        changed = await ask(client, "colours", linked("/a"))
        assert changed.outputs[0].data != first.outputs[0].data
        assert (runs.count, site.paths) == (2, ["/a", "/b", "/a"])


async def test_streams_find_and_keep_as_well(world: World, runs: Runs) -> None:
    client = cached(world)
    request = predict_request("colours", PICTURE)
    request.use_predict_cache = True
    await client.ask("GenerateModelOutputs", request)
    bodies = [request.SerializeToString()] * 2
    await client.stream("/clarifai.api.V2/StreamModelOutputs", bodies)
    assert (runs.count, hits(client)) == (1, 2)


async def test_a_reload_makes_it_smaller_or_turns_it_off(world: World, runs: Runs) -> None:
    client = cached(world)
    await ask(client, "colours", PICTURE)
    client.api.configure(client.api._config.model_copy(update={"cache": Cache()}))
    assert client.count("cache_entries") == client.count("cache_bytes") == 0
    client.api.configure(client.api._config.model_copy(update={"cache": Cache(size=MIB)}))
    await ask(client, "colours", PICTURE)
    assert (runs.count, hits(client)) == (2, 0)


async def test_what_is_not_served_any_more_is_forgotten(world: World, runs: Runs) -> None:
    """Here nothing is gone, and so all is kept; the servable that is swapped is the integration tests' matter."""
    client = cached(world)
    await ask(client, "colours", PICTURE)
    client.api.catalog_changed()
    assert (client.count("cache_entries"), hits(client)) == (1, 0)
    await ask(client, "colours", PICTURE)
    assert (runs.count, hits(client)) == (1, 1)


# ---- the cache by itself ---------------------------------------------------------------------------------------------


class Box:
    """A cache, and a model whose answers the test gives."""

    def __init__(self, size: int = MIB, ttl_s: float = 0.0, budget: int = 100 * MIB) -> None:
        self.metrics = Metrics()
        self.now = 0.0
        self.cache = PredictCache(self.metrics, lambda: self.now)
        self.cache.configure(Cache(size=size, ttl_s=ttl_s))
        self.budget = MemoryBudget(budget)
        self.ran: list[str | None] = []
        self.make: Any = lambda payload: Embedding(np.zeros(100, np.float32))

    async def ask(self, *texts: Any, serial: int = 1, principal: str = "ada", options: Any = PredictOptions()) -> Any:  # noqa: B008
        servable: Any = SimpleNamespace(serial=serial, key=SimpleNamespace(model_id="m"), version="1")

        async def run(payloads: Sequence[Any]) -> Any:
            self.ran += [payload.text for payload in payloads if isinstance(payload, Payload)]
            await asyncio.sleep(0)
            return [self.make(payload) if isinstance(payload, Payload) else payload for payload in payloads]

        with self.budget.hold(0) as memory:
            context: Any = SimpleNamespace(principal=principal, memory=memory)
            payloads = [text if not isinstance(text, str) else Payload(text=text) for text in texts]
            answers = await self.cache.answers(context, servable, ("predict", options), payloads, run)
            self.held = memory.count
            return answers

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"inference_appliance_cache_{name}", labels) or 0.0


async def test_the_least_recently_used_goes_first() -> None:
    box = Box(size=14_000)  # nine answers of 400 bytes and what goes with them
    for name in "abcdefgh":
        await box.ask(name)
    await box.ask("a")
    before = len(box.ran)
    await box.ask("i")
    await box.ask("a")
    await box.ask("b")
    assert box.ran[before:] == ["i", "b"]
    assert box.cache.used <= 14_000
    assert box.count("evictions_total", reason="size") > 0
    assert box.count("bytes") == box.cache.used


async def test_an_answer_larger_than_its_share_is_not_kept() -> None:
    box = Box(size=80_000)
    box.make = lambda payload: Tensors({"x": np.zeros(int(payload.text), np.uint8)})
    await box.ask("20000")
    await box.ask("5000")
    assert box.count("entries") == 1
    assert 5000 < box.cache.used < 10_000


async def test_an_old_answer_is_made_anew() -> None:
    box = Box(ttl_s=10)
    await box.ask("a")
    box.now = 9.9
    await box.ask("a")
    box.now = 10
    await box.ask("a")
    box.now = 19.9
    await box.ask("a")
    assert box.ran == ["a", "a"]
    assert box.count("evictions_total", reason="age") == 1


async def test_what_a_gone_servable_computes_is_not_kept_any_more() -> None:
    """A request may still be with it when another one has taken its place."""
    box = Box()
    await box.ask("a", serial=1)
    await box.ask("a", serial=2)
    box.cache.keep_only({2})
    assert box.count("entries") == 1
    await box.ask("a", serial=1)
    await box.ask("a", serial=1)
    await box.ask("a", serial=2)
    assert box.ran == ["a", "a", "a", "a"]
    assert box.count("evictions_total", reason="model") == 1


async def test_two_requests_at_once_both_run_and_one_answer_is_kept() -> None:
    box = Box()
    await asyncio.gather(box.ask("a"), box.ask("a"))
    assert (box.ran, box.count("entries")) == (["a", "a"], 1)
    await box.ask("a")
    assert box.ran == ["a", "a"]


async def test_kept_answers_are_copies_that_nobody_changes() -> None:
    """Not views that keep a whole batch's arrays alive."""
    box = Box()
    batch = np.arange(100_000, dtype=np.float32).reshape(1000, 100)
    box.make = lambda payload: Embedding(batch[3])
    await box.ask("a")
    batch[:] = 0
    (found,) = await box.ask("a")
    assert found.vector.base is None
    assert found.vector.tolist() == list(range(300, 400))
    with pytest.raises(ValueError, match="read-only"):
        found.vector[0] = 1


async def test_the_memory_of_kept_answers_is_reserved_like_that_of_others() -> None:
    """They become replies as well."""
    box = Box(size=10 * MIB, budget=3 * MIB)
    box.make = lambda payload: Tensors({"x": np.zeros(MIB, np.uint8)})
    await box.ask("a")
    await box.ask("a", "a")
    assert 2 * MIB < box.held < 3 * MIB
    with pytest.raises(Overloaded):
        await box.ask("a", "a", "a")
    box.cache.configure(Cache(size=0))
    box.cache.configure(Cache(size=10 * MIB))
    with pytest.raises(Overloaded):
        await box.ask(*["b"] * 5)
    assert box.budget.used == 0


async def test_errors_pass_through_and_only_the_others_are_run() -> None:
    for size in (0, MIB):
        box = Box(size=size)
        bad = InvalidInput("bad")
        box.make = lambda payload: InferenceFailed("no") if payload.text == "x" else Embedding(np.ones(1))
        first, failed, fine = await box.ask(bad, "x", "y")
        assert (first, str(failed), fine.vector[0]) == (bad, "no", 1)
        assert await box.ask(bad) == [bad]
        assert box.ran == ["x", "y"]


async def test_an_error_of_the_run_ends_the_request_and_keeps_nothing() -> None:
    box = Box()

    def fail(payload: Payload) -> Any:
        raise Overloaded("full")

    box.make = fail
    with pytest.raises(Overloaded):
        await box.ask("a")
    assert (box.count("entries"), box.budget.used) == (0, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: ConceptScores(np.arange(n, n + 20), np.full(20, n, np.float32)),
        lambda n: ConceptScores(np.zeros(0, np.int64), np.zeros(0, np.float32)),
        lambda n: ConceptScores(np.array([n]), np.array([n / 3], np.float32)),
        lambda n: Embedding(np.full(384, n, np.float32)),
        lambda n: Tensors({f"output-{i}": np.full((3, 5), n, np.float64) for i in range(4)}),
    ],
)
async def test_what_is_counted_is_no_less_than_what_is_taken(make: Any) -> None:
    """Python's own overheads are counted, too: the bound is one of memory, not of payload."""
    box = Box(size=64 * MIB)
    await box.ask("warm")
    box.make = lambda payload: make(int(payload.text))
    gc.collect()
    tracemalloc.start()
    try:
        before, counted = tracemalloc.get_traced_memory()[0], box.cache.used
        for number in range(1000):
            await box.ask(str(number), options=PredictOptions(selected=(number, 1000 + number)))
        box.ran.clear()
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert box.count("entries") == 1001
    assert taken <= box.cache.used - counted <= 6 * taken


# ---- digests ---------------------------------------------------------------------------------------------------------

payloads = st.builds(
    Payload,
    image=st.none() | st.binary(max_size=4),
    text=st.none() | st.text(max_size=3),
    arrays=st.dictionaries(
        st.sampled_from(["", "a", "b"]),
        st.builds(
            lambda dtype, shape: np.zeros(shape, dtype),
            st.sampled_from(["u1", "i1", "f4", "i4", "f8", ">i4"]),
            st.sampled_from([(), (0,), (1,), (1, 1), (2,), (2, 1), (1, 2)]),
        ),
        max_size=2,
    ),
)


def told(payload: Payload) -> Any:
    """All that tells contents apart."""
    arrays = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in payload.arrays.items()}
    return payload.image, payload.text, tuple(sorted(arrays.items()))


@given(payloads, payloads)
async def test_digests_are_equal_exactly_where_contents_are(one: Payload, other: Payload) -> None:
    assert (digest(one) == digest(other)) == (told(one) == told(other))


async def test_a_digest_is_of_the_content_and_of_nothing_else() -> None:
    """Not of what a decoder left, of the order of names, or of how an array lies in memory."""
    a, b = np.arange(6, dtype=np.int32).reshape(2, 3), np.ones(2)
    one = Payload(arrays={"a": a, "b": b}, opened=object())
    other = Payload(arrays={"b": b, "a": np.asfortranarray(a)})
    assert digest(one) == digest(other)
    assert digest(Payload(text="\ud800")) != digest(Payload(text="?"))
    assert len(digest(Payload())) == 32


async def test_large_contents_do_not_stop_the_loop() -> None:
    box = Box()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(count())
    await box.ask("x" * (64 * MIB))
    other.cancel()
    assert turns > 10


async def test_limits_are_still_checked_for_what_is_not_kept(world: World) -> None:
    client = cached(world, limits=Limits(image_size=10))
    assert [output.status.code for output in (await ask(client, "colours", PICTURE)).outputs] == [30105]
