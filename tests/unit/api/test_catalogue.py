"""The reading RPCs: what there is, in pages, with every field that clients read."""

from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from support import graphs
from support.api_world import IDS, World

from appliance.api import messages
from appliance.api.catalogue import RPCS, page
from appliance.core.config import Principal
from appliance.core.errors import InvalidRequest
from appliance.tasks.servable import Servable

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = ["broken", "colours", "fragile", "gather", "pair", "tensor", "topic", "vector", "wide"]


def of(kind: Any, **fields: Any) -> Any:
    """A request for a model of the tests."""
    return kind(user_app_id=IDS, **fields)


# ---- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "size", "found"),
    [(0, 0, range(20)), (1, 0, range(20)), (2, 0, range(20, 25)), (3, 10, range(20, 25)), (1, 1000, range(25))],
)
async def test_pages_are_counted_from_one(number: int, size: int, found: range) -> None:
    """Zero is not said; 20 a page."""
    assert list(page(range(25), number, size)) == list(found)


@pytest.mark.parametrize(("number", "size"), [(3, 0), (26, 1), (2**32 - 1, 1000)])
async def test_past_the_end_there_is_nothing(number: int, size: int) -> None:
    """However far."""
    assert list(page(range(25), number, size)) == []


async def test_a_page_may_not_be_larger_than_allowed() -> None:
    """With the limit."""
    with pytest.raises(InvalidRequest, match="per_page is 1001; the limit is 1000"):
        page(range(3), 1, 1001)


@pytest.mark.parametrize(
    "rpc", ["ListModels", "ListModelVersions", "ListModelConcepts", "ListConcepts", "ListModelTypes", "ListApps"]
)
async def test_past_the_end_a_reply_has_only_its_status(world: World, rpc: str) -> None:
    """Else the Python lister loops for ever (PROTOCOL 0.7); and the pages together are everything, once."""
    kind = getattr(service_pb2, f"{rpc}Request")
    ids = {"model_id": "colours"} if "model_id" in kind.DESCRIPTOR.fields_by_name else {}
    client = world.api()
    items: list[Any] = []
    for number in range(1, 300):
        reply = await client.ask(rpc, of(kind, page=number, per_page=2, **ids))
        assert reply.status.code == 10000
        found = [value for field, value in reply.ListFields() if field.name != "status"]
        if not found:
            break
        items += found[0]
    else:
        pytest.fail("the pages do not end")
    everything = await client.ask(rpc, of(kind, page=1, per_page=1000, **ids))
    (all_items,) = [value for field, value in everything.ListFields() if field.name != "status"]
    assert list(all_items) == items


async def test_a_page_that_is_too_large_is_refused(world: World) -> None:
    """As malformed."""
    reply = await world.api().ask("ListModels", of(service_pb2.ListModelsRequest, per_page=5000))
    assert reply.status.code == 11100


# ---- models ----------------------------------------------------------------------------------------------------------


async def test_a_model_has_what_clients_read(world: World) -> None:
    """With its newest ready version and its signatures: Node reads them from here."""
    reply = await world.api().ask("GetModel", of(service_pb2.GetModelRequest, model_id="colours"))
    model = reply.model
    assert reply.status.code == 10000
    assert (model.id, model.user_id, model.app_id) == ("colours", graphs.USER, graphs.APP)
    assert (model.model_type_id, model.version_count) == ("visual-classifier", 2)
    assert (model.model_version.id, model.model_version.status.code) == ("2", 21100)
    assert model.model_version.method_signatures
    assert model.model_version.active_concept_count == 3
    assert model.created_at.seconds
    assert model.modified_at.seconds


@pytest.mark.parametrize("rpc", ["GetModel", "GetModelOutputInfo", "GetModelVersion"])
@pytest.mark.parametrize(("version", "given"), [("", "2"), ("1", "1")])
async def test_an_empty_version_is_the_newest(world: World, rpc: str, version: str, given: str) -> None:
    """For all three."""
    kind = service_pb2.GetModelVersionRequest if rpc == "GetModelVersion" else service_pb2.GetModelRequest
    reply = await world.api().ask(rpc, of(kind, model_id="colours", version_id=version))
    found = reply.model_version if rpc == "GetModelVersion" else reply.model.model_version
    assert found.id == given


@pytest.mark.parametrize(
    ("rpc", "kind"),
    [
        ("GetModel", service_pb2.GetModelRequest),
        ("GetModelOutputInfo", service_pb2.GetModelRequest),
        ("GetModelVersion", service_pb2.GetModelVersionRequest),
        ("ListModelVersions", service_pb2.ListModelVersionsRequest),
        ("ListModelConcepts", service_pb2.ListModelConceptsRequest),
    ],
)
async def test_an_unknown_model_is_21200(world: World, rpc: str, kind: Any) -> None:
    """Everywhere."""
    assert (await world.api().ask(rpc, of(kind, model_id="nothing"))).status.code == 21200


async def test_output_info_is_in_both_places(world: World) -> None:
    """Of today and deprecated; concepts in output order."""
    reply = await world.api().ask("GetModelOutputInfo", of(service_pb2.GetModelRequest, model_id="colours"))
    for info in (reply.model.model_version.output_info, reply.model.output_info):
        assert [concept.name for concept in info.data.concepts] == list(graphs.CONCEPTS)
        assert info.output_config.max_concepts == 20


async def test_a_model_that_could_not_be_loaded_is_shown_with_its_status(world: World) -> None:
    """In lists too; who asks for its concepts is not told to wait for them."""
    client = world.api()
    reply = await client.ask("GetModel", of(service_pb2.GetModelRequest, model_id="broken"))
    assert (reply.status.code, reply.model.model_version.status.code) == (10000, 21350)
    reply = await client.ask("GetModelOutputInfo", of(service_pb2.GetModelRequest, model_id="broken"))
    assert reply.status.code == 21350


async def test_a_model_that_died_is_not_said_to_be_loading(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients would poll for ten minutes."""
    monkeypatch.setattr(Servable, "problem", "the worker died")
    reply = await world.api().ask("GetModel", of(service_pb2.GetModelRequest, model_id="colours"))
    assert reply.model.model_version.status.code == 21350


async def test_models_are_listed(world: World) -> None:
    """Of an app, or of all; with filters."""
    client = world.api()

    async def listed(**fields: Any) -> list[str]:
        reply = await client.ask("ListModels", service_pb2.ListModelsRequest(**fields))
        return [model.id for model in reply.models]

    assert await listed() == await listed(user_app_id=IDS) == MODELS
    assert await listed(user_app_id=resources_pb2.UserAppIDSet(user_id="somebody")) == []
    assert await listed(model_type_id="text-classifier") == ["topic"]
    assert await listed(name="COL*") == ["colours"]
    assert await listed(search="vect") == ["vector"]
    assert await listed(name="no such") == []


@pytest.mark.parametrize("rpc", ["ListModels", "ListConcepts"])
async def test_what_cannot_be_shown_is_left_out_and_logged_and_the_others_are_listed(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rpc: str
) -> None:
    """One bundle must not empty the list for everybody."""
    client = world.api()
    kind = getattr(service_pb2, f"{rpc}Request")
    (before,) = [value for field, value in (await client.ask(rpc, of(kind, per_page=1000))).ListFields()[1:]]
    brief, concepts = messages.model_full, messages.concept_messages

    def full(version: Any) -> Any:
        return brief(version) if version.config.key.model_id != "wide" else resources_pb2.Model(name="\ud800")

    def listed(servable: Any) -> Any:
        return concepts(servable) if servable.key.model_id != "wide" else [resources_pb2.Concept(name="\ud800")]

    monkeypatch.setattr(messages, "model_full", full)
    monkeypatch.setattr(messages, "concept_messages", listed)
    reply = await client.ask(rpc, of(kind, per_page=1000))
    assert reply.status.code == 10000
    (after,) = [value for field, value in reply.ListFields() if field.name != "status"]
    assert 0 < len(after) < len(before)
    assert "cannot be listed: " in caplog.text


async def test_versions_are_listed_newest_first(world: World) -> None:
    """By number."""
    reply = await world.api().ask("ListModelVersions", of(service_pb2.ListModelVersionsRequest, model_id="colours"))
    assert [version.id for version in reply.model_versions] == ["2", "1"]
    assert all(version.status.code == 21100 for version in reply.model_versions)


async def test_concepts_are_listed(world: World) -> None:
    """Of one model in output order, of all without repeating an id."""
    client = world.api()
    reply = await client.ask("ListModelConcepts", of(service_pb2.ListModelConceptsRequest, model_id="colours"))
    assert [concept.id for concept in reply.concepts] == [f"c-{name}" for name in graphs.CONCEPTS]
    reply = await client.ask(
        "ListModelConcepts", of(service_pb2.ListModelConceptsRequest, model_id="wide", search="N24", per_page=100)
    )
    assert len(reply.concepts) == 11
    reply = await client.ask("ListConcepts", of(service_pb2.ListConceptsRequest, per_page=1000))
    ids = [concept.id for concept in reply.concepts]
    assert len(ids) == len(set(ids)) == 250 + 3 + 2


# ---- types, users, scopes, codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "takes", "gives"),
    [
        ("visual-classifier", "image", "concepts"),
        ("visual-embedder", "image", "embeddings"),
        ("text-classifier", "text", "concepts"),
        ("text-embedder", "text", "embeddings"),
        ("tensor-to-tensor", "ndarray", "ndarray"),
    ],
)
async def test_a_model_type_names_one_input_field(world: World, name: str, takes: str, gives: str) -> None:
    """The SDK needs exactly one, when the caller names no input type (PROTOCOL 2.1)."""
    reply = await world.api().ask("GetModelType", of(service_pb2.GetModelTypeRequest, model_type_id=name))
    assert (list(reply.model_type.input_fields), list(reply.model_type.output_fields)) == ([takes], [gives])


async def test_an_unknown_model_type_is_named(world: World) -> None:
    """With those there are."""
    reply = await world.api().ask("GetModelType", of(service_pb2.GetModelTypeRequest, model_type_id="oracle"))
    assert reply.status.code == 11101
    assert "visual-classifier" in reply.status.details


@pytest.mark.parametrize(("asked", "code"), [("", 10000), ("me", 10000), ("ada-id", 10000), ("bob", 11101)])
async def test_the_caller_is_the_only_user(world: World, asked: str, code: int) -> None:
    """By "me" or by its own id."""
    client = world.api(Principal(name="ada", user_id="ada-id"))
    request = service_pb2.GetUserRequest(user_app_id=resources_pb2.UserAppIDSet(user_id=asked))
    reply = await client.ask("GetUser", request)
    assert reply.status.code == code
    assert reply.user.id == ("ada-id" if code == 10000 else "")


@pytest.mark.parametrize(
    ("user_id", "app_id", "code"),
    [(IDS.user_id, IDS.app_id, 10000), ("", IDS.app_id, 10000), (IDS.user_id, "no", 11101), ("no", IDS.app_id, 11101)],
)
async def test_an_app_is_where_models_are(world: World, user_id: str, app_id: str, code: int) -> None:
    """As the SDK's `User(…).app(…)` asks for it."""
    ids = resources_pb2.UserAppIDSet(user_id=user_id, app_id=app_id)
    reply = await world.api().ask("GetApp", service_pb2.GetAppRequest(user_app_id=ids))
    assert reply.status.code == code
    assert (reply.app.id, reply.app.user_id) == ((IDS.app_id, IDS.user_id) if code == 10000 else ("", ""))


async def test_an_app_without_a_model_for_the_caller_is_not_there(world: World) -> None:
    """Whoever may use nothing sees nothing."""
    client = world.api(Principal(name="ada", models=["else/where/*"]))
    assert (await client.ask("GetApp", service_pb2.GetAppRequest(user_app_id=IDS))).status.code == 11101
    assert not (await client.ask("ListApps")).apps


@pytest.mark.parametrize(("field", "text"), [("id", "nothing"), ("name", "nothing")])
async def test_apps_are_found_by_name(world: World, field: str, text: str) -> None:
    """A part of it is enough."""
    client = world.api()
    everything = (await client.ask("ListApps")).apps
    assert [(app.user_id, app.id) for app in everything] == [(IDS.user_id, IDS.app_id)]
    part = service_pb2.ListAppsRequest(**{field: IDS.app_id[1:]})
    assert list((await client.ask("ListApps", part)).apps) == list(everything)
    assert not (await client.ask("ListApps", service_pb2.ListAppsRequest(**{field: text}))).apps


async def test_my_scopes_say_what_a_key_may_do(world: World) -> None:
    """Predict and read."""
    reply = await world.api().ask("MyScopes")
    assert "Predict" in reply.scopes
    assert set(reply.endpoints) == {f"/clarifai.api.V2/{name}" for name in RPCS}


async def test_status_codes_are_listed_and_looked_up(world: World) -> None:
    """By number or name; the reply's own status is the code asked for."""
    client = world.api()
    listed = (await client.ask("ListStatusCodes")).statuses
    assert len(listed) == len(status_code_pb2.StatusCode.values()) - 1
    assert {entry.details for entry in listed} >= {"SUCCESS", "MODEL_DOES_NOT_EXIST"}
    for asked in ("21200", "MODEL_DOES_NOT_EXIST", "model_does_not_exist"):
        reply = await client.ask("GetStatusCode", service_pb2.GetStatusCodeRequest(status_code_id=asked))
        assert (reply.status.code, reply.status.details) == (21200, "MODEL_DOES_NOT_EXIST")


@pytest.mark.parametrize("asked", ["", "0", "ZERO", "12345", "²", "١٠٠٠٠", "1" * 5000, "-10000", "10000.0", " 10000"])
async def test_an_unknown_status_code_is_named(world: World, asked: str) -> None:
    """Also when its digits are of another script, or are thousands."""
    reply = await world.api().ask("GetStatusCode", service_pb2.GetStatusCodeRequest(status_code_id=asked))
    assert reply.status.code == 11101
    assert len(reply.status.details) < 300
