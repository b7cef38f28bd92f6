"""OpenAI's surface: models and embeddings, and errors as its clients read them."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from support import graphs
from support.api_world import PICTURE, Client, World
from support.http_client import http_client

from appliance.api import openai
from appliance.api.direct import ModelName
from appliance.api.openai import openai_routes
from appliance.core.config import Limits, Principal
from appliance.core.errors import UnknownModel

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = "/v2/ext/openai/v1"
PREFIX = f"{graphs.USER}/{graphs.APP}/models/"
SENTENCE = PREFIX + "sentence"
URI = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """The usual models, and `sentence`, which embeds texts of eight tokens at most."""
    made = World(tmp_path_factory.mktemp("world"))
    graphs.write_text_embedder(made.root / "sentence", max_tokens=8)
    async with made.opened():
        yield made


def browser(client: Client, key: str | None = "") -> httpx.AsyncClient:
    """A client of the routes; with the first key unless another, or None, is given."""
    return http_client(openai_routes(client.api.direct, client.api), client.keys[0] if key == "" else key)


async def embed(client: Client, **body: Any) -> httpx.Response:
    """POST /embeddings."""
    async with browser(client) as made:
        return await made.post(f"{BASE}/embeddings", content=json.dumps({"model": SENTENCE, **body}))


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error, whose shape is always the same."""
    content = answer.json()
    assert set(content) == {"error"}
    error: dict[str, Any] = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def vector_of(*words: str) -> Any:
    """What `sentence` says of a text: the mean of its tokens' vectors."""
    ids = [2, *(graphs.WORDS.index(word) + 4 for word in words), 3]
    return graphs.token_table()[ids].mean(axis=0)


# ---- models ----------------------------------------------------------------------------------------------------------


async def test_models_are_listed_by_their_ids(world: World) -> None:
    """Those that answer, and that the caller may use."""
    async with browser(world.api()) as made:
        content = (await made.get(f"{BASE}/models")).json()
    assert content["object"] == "list"
    ids = [model["id"] for model in content["data"]]
    assert SENTENCE in ids
    assert PREFIX + "broken" not in ids
    assert len(set(ids)) == len(ids)
    model = content["data"][ids.index(SENTENCE)]
    assert (model["object"], model["owned_by"]) == ("model", graphs.USER)
    assert model["created"] > 1_700_000_000
    async with browser(world.api(Principal(name="narrow", models=("sentence",)))) as made:
        assert [model["id"] for model in (await made.get(f"{BASE}/models")).json()["data"]] == [SENTENCE]


@pytest.mark.parametrize(
    "name",
    [
        SENTENCE,
        SENTENCE + "/versions/1",
        "https://clarifai.com/" + SENTENCE,
        "https://clarifai.com/" + SENTENCE + "/versions/1",
        "sentence",
    ],
)
async def test_a_model_is_found_by_every_form_of_its_id(world: World, name: str) -> None:
    """As PROTOCOL 2.7 has them, percent-encoded as the stock client does and plain; and where it is one of a kind."""
    async with browser(world.api()) as made:
        for written in (name, name.replace("/", "%2F").replace(":", "%3A")):
            assert (await made.get(f"{BASE}/models/{written}")).json()["id"] == SENTENCE
    assert (await embed(world.api(), model=name, input="good")).json()["model"] == name


async def test_a_model_whose_name_nobody_can_write_is_not_there(world: World) -> None:
    """JSON can name half of a surrogate pair; the answer that quotes it must still be one, and no call be lost."""
    client = world.api()
    async with browser(client) as made:
        answer = await made.post(f"{BASE}/embeddings", content=b'{"model": "\\udc00x", "input": "good"}')
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert client.count("requests_lost_total") == 0


@pytest.mark.parametrize(
    "name", ["nothing", PREFIX + "nothing", "a/b", "a/b/c", SENTENCE + "/versions/9", "https://x/y"]
)
async def test_a_model_that_is_not_there(world: World, name: str) -> None:
    """404, `model_not_found`: in both places."""
    async with browser(world.api()) as made:
        for answer in (await made.get(f"{BASE}/models/{name}"), await embed(world.api(), model=name, input="good")):
            assert answer.status_code == 404
            assert error_of(answer)["code"] == "model_not_found"


async def test_names_are_parsed() -> None:
    """User, app, model, version."""
    assert openai.model_name("u/a/models/m/versions/v") == ModelName("u", "a", "m", "v")
    assert openai.model_name("https://clarifai.com/u/a/models/m") == ModelName("u", "a", "m")
    assert openai.model_name("m") == ModelName("", "", "m")
    for bad in ("", "u/a/models/", "u/a/m", "u/a/models/m/versions", "u/a/models/m/v", "/u/a/models/m"):
        with pytest.raises(UnknownModel):
            openai.model_name(bad)


# ---- embeddings ------------------------------------------------------------------------------------------------------


async def test_one_text(world: World) -> None:
    """Its vector, and how many tokens it was."""
    content = (await embed(world.api(), input="good model")).json()
    assert content["object"] == "list"
    assert content["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    (only,) = content["data"]
    assert (only["object"], only["index"]) == ("embedding", 0)
    np.testing.assert_allclose(only["embedding"], vector_of("good", "model"), rtol=1e-6)


async def test_several_texts_in_either_form(world: World) -> None:
    """Floats, and base64 of little-endian float32; tokens are counted as the model reads them, cut at its limit."""
    texts = ["good", "bad model", "the quick brown fox jumps over the lazy dog"]
    client = world.api()
    floats = (await embed(client, input=texts, encoding_format="float", user="ada")).json()
    packed = (await embed(client, input=texts, encoding_format="base64", dimensions=graphs.DIMENSIONS)).json()
    assert floats["usage"]["prompt_tokens"] == 3 + 4 + 8
    assert [entry["index"] for entry in packed["data"]] == [0, 1, 2]
    for one, other in zip(floats["data"], packed["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_array_equal(np.float32(one["embedding"]), vector)
    np.testing.assert_allclose(floats["data"][1]["embedding"], vector_of("bad", "model"), rtol=1e-6)


async def test_the_answers_are_those_of_clarifais_door(world: World) -> None:
    """One model, two doors."""
    client = world.api()
    theirs = (await client.predict("sentence", "good model")).outputs[0].data.embeddings[0].vector
    ours = (await embed(client, input=["good model"])).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.float32(ours), np.float32(theirs))


async def test_pictures_are_data_uris(world: World) -> None:
    """For a model that embeds pictures; they have no tokens."""
    client = world.api()
    content = (await embed(client, model=PREFIX + "vector", input=[URI, URI])).json()
    theirs = (await client.predict("vector", PICTURE)).outputs[0].data.embeddings[0].vector
    np.testing.assert_array_equal(np.float32(content["data"][1]["embedding"]), np.float32(theirs))
    assert content["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({}, "input", "a text or a list of texts"),
        ({"input": None}, "input", "a text or a list of texts"),
        ({"input": {}}, "input", "a text or a list of texts"),
        ({"input": ["a", None]}, "input", "a text or a list of texts"),
        ({"input": [1, 2, 3]}, "input", "token ids"),
        ({"input": [[1, 2], [3]]}, "input", "token ids"),
        ({"input": []}, None, "no inputs"),
        ({"input": ["good"] * 129}, None, "129 inputs; the limit is 128"),
        ({"input": "\ud800"}, "input", "half a character"),
        ({"input": "good", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": "good", "encoding_format": None}, "encoding_format", "float"),
        ({"input": "good", "dimensions": 3}, "dimensions", "this model has 4"),
        ({"input": "good", "dimensions": 4.0}, "dimensions", "this model has 4"),
        ({"input": "good", "dimensions": True}, "dimensions", "this model has 4"),
        ({"input": "good", "color": "red"}, "color", "Unknown parameter 'color'; known are dimensions"),
        ({"input": "good", "model": 7}, "model", "'model' must be"),
        ({"input": "good", "model": ""}, "model", "'model' must be"),
        ({"input": "good", "model": PREFIX + "topic"}, "model", "text-classifier; embeddings need an embedder"),
        ({"input": "good", "model": PREFIX + "tensor"}, "model", "embeddings need an embedder"),
        ({"input": "good", "model": PREFIX + "vector"}, "input", "data:image/png;base64,"),
        ({"input": "data:image/png;base64,!", "model": PREFIX + "vector"}, None, "not base64"),
        ({"input": "data:image/png;base64,AAAA", "model": PREFIX + "vector"}, None, "JPEG"),
        ({"input": "https://example.com/x.png", "model": PREFIX + "vector"}, "input", "data:image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_request_is_told_what_is_wrong(world: World, body: Any, param: str | None, sentence: str) -> None:
    """400, the member at fault, and a sentence."""
    client = world.api()
    answer = await embed(client, **body)
    error = error_of(answer)
    assert answer.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert sentence in error["message"]
    assert client.budget.used == 0


async def test_of_several_inputs_the_bad_one_is_named(world: World) -> None:
    """Counted from 0, as in the reply."""
    answer = await embed(world.api(), model=PREFIX + "vector", input=[URI, "data:image/png;base64,AAAA"])
    assert "Input 1 of 2" in error_of(answer)["message"]


@pytest.mark.parametrize("body", [b"", b"[1]", b"nothing", b'{"input": ' + b"[" * 100_000, b'{"input": NaN}'])
async def test_a_body_that_is_no_json_object(world: World, body: bytes) -> None:
    """400."""
    async with browser(world.api()) as made:
        answer = await made.post(f"{BASE}/embeddings", content=body)
    assert answer.status_code == 400
    assert "JSON" in error_of(answer)["message"]


# ---- what is not served ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "images/generations", "files"])
async def test_what_is_not_served_says_so(world: World, path: str) -> None:
    """404, which the stock client does not try again; to callers with credentials."""
    client = world.api()
    async with browser(client) as made:
        for method in ("GET", "POST"):
            answer = await made.request(method, f"{BASE}/{path}", json={"model": SENTENCE})
            assert answer.status_code == 404
            error = error_of(answer)
            assert path in error["message"]
            assert "/embeddings" in error["message"]
            assert error["code"] != "model_not_found"
    async with browser(client, None) as stranger:
        assert (await stranger.post(f"{BASE}/{path}", json={})).status_code == 401


async def test_another_method_is_not_served_either(world: World) -> None:
    """In OpenAI's shape."""
    async with browser(world.api()) as made:
        assert (await made.get(f"{BASE}/embeddings")).status_code == 404
        assert error_of(await made.delete(f"{BASE}/models/{SENTENCE}"))["message"]


# ---- the steps of every call -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "0" * 64])
@pytest.mark.parametrize(("method", "path"), [("GET", "models"), ("GET", "models/x"), ("POST", "embeddings")])
async def test_strangers_are_refused(world: World, key: str | None, method: str, path: str) -> None:
    """401, `invalid_api_key`."""
    async with browser(world.api(), key) as stranger:
        answer = await stranger.request(method, f"{BASE}/{path}", content=b"{}")
    assert answer.status_code == 401
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


async def test_statuses_are_those_of_the_table(world: World) -> None:
    """403, 429 with when to come again, 503, 413, 500."""
    answer = await embed(world.api(Principal(name="narrow", models=("pair",))), input="good")
    assert (answer.status_code, error_of(answer)["type"]) == (403, "permission_error")
    client = world.api(Principal(name="slow", requests_per_second=0.001, burst=1))
    assert (await embed(client, input="good")).status_code == 200
    answer = await embed(client, input="good")
    assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
    assert answer.headers["retry-after"] == "1"
    answer = await embed(world.api(memory=16 * 1024), input="good " * 2000)
    assert (answer.status_code, error_of(answer)["type"]) == (503, "server_error")
    assert answer.headers["retry-after"] == "1"
    answer = await embed(world.api(limits=Limits(request_size=1000)), input="good " * 2000)
    assert answer.status_code == 413
    answer = await embed(world.api(), model=PREFIX + "broken", input="good")
    assert (answer.status_code, error_of(answer)["type"]) == (500, "server_error")


async def test_every_reply_has_a_request_id(world: World) -> None:
    """Where OpenAI's clients look for it."""
    client = world.api()
    ids = {(await embed(client, input=text)).headers["x-request-id"] for text in ("good", "bad", [])}
    assert len(ids) == 3
    assert "" not in ids


async def test_calls_are_counted(world: World) -> None:
    """Under this surface's names."""
    client = world.api()
    await embed(client, input=["good", "bad"])
    labels = {"model": "sentence", "version": "1"}
    assert client.count("requests_total", **labels, method="openai.embeddings", code="10000") == 1
    assert client.count("inputs_total", **labels, code="10000") == 2
    assert client.budget.used == 0
