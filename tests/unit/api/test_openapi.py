"""The OpenAPI document: sound in its structure, whole, and a request made from it works."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from support import graphs
from support.api_world import SERVICE, V2, World
from support.rest_world import Web, bindings

from appliance.api import openapi, status

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def web(world: World) -> AsyncIterator[Web]:
    made = Web(world.api())
    async with made.http:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def document(web: Web) -> Any:
    """As it is served, to whoever asks."""
    answer = await web.ask("GET", "/v2/openapi.json", key=None)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def nodes(content: Any) -> Iterator[dict[str, Any]]:
    """All objects in it."""
    if isinstance(content, dict):
        yield content
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from nodes(inner)


def operations(document: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            yield path, verb, operation


async def test_every_reference_leads_somewhere(document: Any) -> None:
    references = {node["$ref"] for node in nodes(document) if isinstance(node.get("$ref"), str)}
    assert len(references) > 50
    for reference in references:
        place = document
        assert reference.startswith("#/")
        for part in reference[2:].split("/"):
            place = place[part]


async def test_every_path_that_is_served_is_in_it_and_no_other(web: Web, document: Any) -> None:
    served = {
        (binding.template, binding.verb.lower())
        for name in web.client.endpoints
        if name.startswith(V2)
        for binding in bindings(name.removeprefix(V2))
    }
    assert {(path, verb) for path, verb, _ in operations(document)} == served


async def test_operations_have_what_openapi_asks_for(document: Any) -> None:
    """3.1.1, sections 4.7.1 to 4.7.16: what is required, and unique."""
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"]
    assert document["info"]["version"]
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    for path, verb, operation in operations(document):
        parameters = operation["parameters"]
        places = [(parameter["in"], parameter["name"]) for parameter in parameters]
        assert len(set(places)) == len(places), path
        in_path = {parameter["name"] for parameter in parameters if parameter["in"] == "path"}
        assert in_path == {part[1:-1] for part in path.split("/") if part.startswith("{")}
        assert all(parameter["required"] for parameter in parameters if parameter["in"] == "path")
        assert all("schema" in parameter for parameter in parameters)
        assert ("requestBody" in operation) == (verb != "get")
        assert "200" in operation["responses"]
        assert all("description" in r or "$ref" in r for r in operation["responses"].values())
    assert all("description" in response for response in document["components"]["responses"].values())


async def test_every_status_that_a_call_may_end_with_is_told(document: Any) -> None:
    """All of the error table, but what stands in an output only, and what nobody is there to read."""
    told = set(document["components"]["responses"])
    assert {str(row.http) for row in status.TABLE.values()} - {"424", "499"} <= told


async def test_schemas_are_json_schema(document: Any) -> None:
    """Types are those of JSON, and every field of every message is there."""
    known = {"string", "integer", "number", "boolean", "object", "array", "null"}
    for schema in nodes(document["components"]["schemas"]):
        kind = schema.get("type")
        if isinstance(kind, str):
            assert kind in known
    image = document["components"]["schemas"]["clarifai.api.Image"]["properties"]
    assert image["base64"] == {"type": "string", "contentEncoding": "base64"}
    data = document["components"]["schemas"]["clarifai.api.Part"]["properties"]["data"]
    assert data == {"$ref": "#/components/schemas/clarifai.api.Data"}, "messages may contain themselves"


async def test_a_request_made_from_it_works(web: Web, document: Any) -> None:
    """Every GET: its path parameters filled in, its query parameters as their types have them."""
    values = {"user_app_id.user_id": graphs.USER, "user_app_id.app_id": graphs.APP, "model_id": "colours"}
    values |= {"version_id": "1", "model_type_id": "visual-classifier", "status_code_id": "21200"}
    samples = {"string": "", "boolean": "false", "integer": "1"}
    asked = 0
    for path, verb, operation in operations(document):
        in_path = [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"]
        if verb != "get" or not set(in_path) <= set(values):
            continue
        for name in in_path:
            path = path.replace("{" + name + "}", values[name] if name != "user_app_id.user_id" else graphs.USER)
        query = {
            parameter["name"]: samples[parameter["schema"]["type"]]
            for parameter in operation["parameters"]
            if parameter["in"] == "query" and str(parameter["schema"].get("type")) in samples
        }
        if operation["operationId"].startswith("GetUser"):
            path = "/v2/users/me"
        for params in ({}, query):
            answer = await web.ask("GET", path, params=params)
            assert answer.status_code in (200, 400, 404), (path, answer.text)
            assert "must be" not in answer.text, path
        assert (await web.ask("GET", path)).status_code == 200, path
        asked += 1
    assert asked > 20


async def test_it_tells_nothing_of_this_installation(web: Web, document: Any) -> None:
    text = json.dumps(document)
    for secret in (*web.client.keys, str(web.client.api._config.auth.keys_file), graphs.USER, "colours"):
        assert secret not in text


async def test_every_rpc_of_the_service_can_be_described() -> None:
    """Whatever comes to be served."""
    document = openapi.document(list(SERVICE.methods))
    assert len(document["paths"]) > 250
    json.dumps(document)
    await test_every_reference_leads_somewhere(document)
