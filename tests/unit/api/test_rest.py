"""The REST twin says what gRPC says: for every RPC, by every path that its annotation gives it."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from google.protobuf import json_format, message_factory
from support import graphs, pictures
from support.api_world import IDS, PICTURE, SERVICE, V2, World, predict_request
from support.rest_world import MIB, Web, bindings, message_of, said

from appliance.api import status
from appliance.core.config import Limits, Principal
from appliance.core.types import Endpoint, RpcAbort, RpcStatus

pytestmark = pytest.mark.asyncio(loop_scope="module")

U = f"/v2/users/{graphs.USER}/apps/{graphs.APP}"


@pytest_asyncio.fixture(loop_scope="module")
async def web(world: World) -> AsyncIterator[Web]:
    """A fresh API and its pages."""
    made = Web(world.api())
    async with made.http:
        yield made
    assert made.client.budget.used == 0, "all memory was given back"


def picture_json(picture: bytes = PICTURE) -> dict[str, Any]:
    return {"data": {"image": {"base64": base64.b64encode(picture).decode()}}}


def said_of(answer: httpx.Response) -> tuple[int, int, str]:
    content = answer.json()["status"]
    return answer.status_code, content["code"], content.get("details", "")


# ---- the same as gRPC ------------------------------------------------------------------------------------------------


def model(kind: Any, model_id: str = "colours", **more: Any) -> Any:
    return kind(user_app_id=IDS, model_id=model_id, **more)


P = service_pb2
BLACK = pictures.png(pictures.rgb_pixels(8, 8) * 0)
BAD_PICTURE = resources_pb2.Input(id="bad", data=resources_pb2.Data(image=resources_pb2.Image(base64=b"no picture")))


def with_version(request: Any) -> Any:
    request.version_id = "1"
    return request


SIGNATURES = json_format.ParseDict(
    {"data": {"metadata": {"_method_name": "_GET_SIGNATURES"}, "parts": [{}]}}, resources_pb2.Input()
)
PREDICTIONS: dict[str, Callable[[], Any]] = {
    "a picture": lambda: with_version(predict_request("colours", PICTURE)),
    "the newest": lambda: predict_request("colours", PICTURE),
    "many": lambda: predict_request("wide", *[PICTURE] * 40, output_config={"max_concepts": 200}),
    "few concepts": lambda: predict_request("colours", PICTURE, output_config={"max_concepts": 1, "min_value": 0.1}),
    "a text": lambda: predict_request("topic", "a sphinx of black quartz"),
    "a vector": lambda: predict_request("vector", PICTURE, PICTURE),
    "some bad": lambda: predict_request("colours", PICTURE, BAD_PICTURE),
    "all bad": lambda: predict_request("colours", BAD_PICTURE),
    "no inputs": lambda: predict_request("colours"),
    "too many": lambda: predict_request("colours", *["x"] * 129),
    "unknown model": lambda: predict_request("nobody", PICTURE),
    "unknown version": lambda: predict_request("colours", PICTURE, version="99"),
    "bad argument": lambda: predict_request("colours", PICTURE, output_config={"max_concepts": 500}),
    "broken": lambda: predict_request("broken", PICTURE),
    "model fails": lambda: predict_request("fragile", BLACK),
    "signatures": lambda: predict_request("colours", SIGNATURES),
    "signatures of nobody": lambda: predict_request("nobody", SIGNATURES),
}

CASES: dict[str, list[Any]] = {
    "PostWorkflowResults": [
        P.PostWorkflowResultsRequest(
            user_app_id=IDS, workflow_id="nobody", inputs=predict_request("colours", PICTURE).inputs
        ),
        P.PostWorkflowResultsRequest(user_app_id=IDS, workflow_id="nobody"),
    ],
    "GetApp": [P.GetAppRequest(user_app_id=IDS), P.GetAppRequest(user_app_id={"user_id": "x", "app_id": "y"})],
    "ListApps": [P.ListAppsRequest(user_app_id=IDS), P.ListAppsRequest(user_app_id=IDS, page=2)],
    "GetWorkflow": [P.GetWorkflowRequest(user_app_id=IDS, workflow_id="nobody")],
    "ListWorkflows": [P.ListWorkflowsRequest(user_app_id=IDS), P.ListWorkflowsRequest(user_app_id=IDS, page=2)],
    "GetWorkflowVersion": [P.GetWorkflowVersionRequest(user_app_id=IDS, workflow_id="nobody", workflow_version_id="1")],
    "ListWorkflowVersions": [P.ListWorkflowVersionsRequest(user_app_id=IDS, workflow_id="nobody")],
    "GetComputeCluster": [
        P.GetComputeClusterRequest(user_app_id=IDS, compute_cluster_id=name) for name in ("on-prem", "elsewhere")
    ],
    "ListComputeClusters": [P.ListComputeClustersRequest(user_app_id=IDS)],
    "GetNodepool": [
        P.GetNodepoolRequest(user_app_id=IDS, compute_cluster_id="on-prem", nodepool_id="elsewhere"),
        P.GetNodepoolRequest(user_app_id=IDS, compute_cluster_id="elsewhere", nodepool_id="x"),
    ],
    "ListNodepools": [
        P.ListNodepoolsRequest(user_app_id=IDS),
        P.ListNodepoolsRequest(user_app_id=IDS, compute_cluster_id="on-prem", per_page=1),
    ],
    "GetDeployment": [P.GetDeploymentRequest(user_app_id=IDS, deployment_id=name) for name in ("colours", "elsewhere")],
    "ListDeployments": [P.ListDeploymentsRequest(user_app_id=IDS, per_page=2)],
    "GetRunner": [
        P.GetRunnerRequest(user_app_id=IDS, compute_cluster_id="on-prem", nodepool_id="elsewhere", runner_id="x")
    ],
    "ListRunners": [
        P.ListRunnersRequest(user_app_id=IDS, compute_cluster_id="on-prem", nodepool_id="elsewhere"),
        P.ListRunnersRequest(user_app_id=IDS),
    ],
    "GetModel": [
        model(P.GetModelRequest),
        model(P.GetModelRequest, version_id="1"),
        model(P.GetModelRequest, "nobody"),
        model(P.GetModelRequest, "broken"),
        P.GetModelRequest(model_id="colours"),
    ],
    "GetModelOutputInfo": [
        model(P.GetModelRequest),
        model(P.GetModelRequest, version_id="1"),
        model(P.GetModelRequest, "broken"),
    ],
    "ListModels": [
        P.ListModelsRequest(),
        P.ListModelsRequest(user_app_id=IDS, page=2, per_page=3),
        P.ListModelsRequest(user_app_id=IDS, page=99),
        P.ListModelsRequest(user_app_id=IDS, per_page=1001),
        P.ListModelsRequest(user_app_id=IDS, query="col", model_version_ids=["1", "2"]),
    ],
    "GetModelVersion": [
        model(P.GetModelVersionRequest, version_id="2"),
        model(P.GetModelVersionRequest, version_id="9"),
    ],
    "ListModelVersions": [model(P.ListModelVersionsRequest), model(P.ListModelVersionsRequest, "nobody")],
    "ListModelConcepts": [
        model(P.ListModelConceptsRequest, "wide", page=2, per_page=100),
        model(P.ListModelConceptsRequest, version_id="1"),
        model(P.ListModelConceptsRequest, search="r"),
    ],
    "ListConcepts": [P.ListConceptsRequest(user_app_id=IDS, per_page=5), P.ListConceptsRequest()],
    "GetModelType": [
        P.GetModelTypeRequest(user_app_id=IDS, model_type_id="visual-classifier"),
        P.GetModelTypeRequest(user_app_id=IDS, model_type_id="nothing/like it"),
    ],
    "ListModelTypes": [P.ListModelTypesRequest(user_app_id=IDS), P.ListModelTypesRequest(per_page=2)],
    "GetUser": [
        P.GetUserRequest(user_app_id=resources_pb2.UserAppIDSet(user_id="me")),
        P.GetUserRequest(user_app_id=resources_pb2.UserAppIDSet(user_id="somebody else")),
    ],
    "MyScopes": [P.MyScopesRequest(user_app_id=IDS), P.MyScopesRequest()],
    "ListStatusCodes": [P.ListStatusCodesRequest()],
    "GetStatusCode": [
        P.GetStatusCodeRequest(status_code_id="21200"),
        P.GetStatusCodeRequest(status_code_id="mixed_status"),
        P.GetStatusCodeRequest(status_code_id="no such"),
    ],
}
STREAMS = ("GenerateModelOutputs", "StreamModelOutputs")


def scrubbed(message: Any) -> Any:
    """Without what differs from one call to the next."""
    for field, value in message.ListFields():
        if field.name in ("req_id", "created_at"):
            message.ClearField(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in value if field.is_repeated else [value]:
                scrubbed(one)
    if message.DESCRIPTOR.name == "Output" and len(message.id) == 32:
        message.id = ""
    if message.DESCRIPTOR.name == "Input" and len(message.id) == 32:
        message.id = ""
    return message


async def check_equal(web: Web, rpc: str, request: Any, camel: bool = False, **call: Any) -> int:
    """By every path that can say the request; how many there were."""
    descriptor = SERVICE.methods_by_name[rpc]
    try:
        expected = scrubbed(await web.client.ask(rpc, request, **call))
    except RpcAbort as abort:
        expected = message_factory.GetMessageClass(descriptor.output_type)()
        expected.status.CopyFrom(status.of_abort(abort))
        scrubbed(expected)
    count = 0
    for binding in bindings(rpc):
        told = said(binding, request, camel=camel)
        if told is None:
            continue
        count += 1
        path, more = told
        answer = await web.ask(binding.verb, path, **more, key=call.get("key", ""))
        content = answer.json() if answer.headers["content-type"] == "application/json" else _lines(answer)
        assert scrubbed(message_of(rpc, content)) == expected, binding.template
        assert answer.status_code == status.http_of(expected.status), binding.template
    return count


def _lines(answer: httpx.Response) -> Any:
    assert answer.headers["content-type"] == "application/x-ndjson"
    (line,) = answer.text.splitlines()
    return json.loads(line)["result"]


class TestTheSameAsGrpc:
    async def test_every_rpc_is_asked(self, web: Web) -> None:
        """A new one must come with its cases; what siblings add is asked too, with nothing in it."""
        served = {name.removeprefix(V2) for name in web.client.endpoints if name.startswith(V2)}
        assert {"PostModelOutputs", *STREAMS, *CASES} == served

    @pytest.mark.parametrize("camel", [False, True])
    @pytest.mark.parametrize("name", PREDICTIONS)
    async def test_predictions(self, web: Web, name: str, camel: bool) -> None:
        request = PREDICTIONS[name]()
        assert await check_equal(web, "PostModelOutputs", request, camel) >= 2

    @pytest.mark.parametrize("rpc", STREAMS)
    @pytest.mark.parametrize("name", ["a picture", "the newest", "some bad", "all bad", "unknown model", "no inputs"])
    async def test_streams_of_one_message(self, web: Web, rpc: str, name: str) -> None:
        assert await check_equal(web, rpc, PREDICTIONS[name]()) >= 1

    @pytest.mark.parametrize(("rpc", "number"), [(rpc, n) for rpc, cases in CASES.items() for n in range(len(cases))])
    async def test_the_rest(self, web: Web, rpc: str, number: int) -> None:
        assert await check_equal(web, rpc, CASES[rpc][number]) >= 1

    @pytest.mark.parametrize("key", [None, "0123456789abcdef"])
    async def test_who_may_not_come_in_hears_the_same(self, web: Web, key: str | None) -> None:
        for name, endpoint in web.client.endpoints.items():
            rpc = name.removeprefix(V2)
            if not name.startswith(V2) or endpoint.unary is None:
                continue
            request = CASES[rpc][0] if rpc in CASES else predict_request("colours", PICTURE)
            await check_equal(web, rpc, request, key=key)

    async def test_an_empty_request_to_whatever_is_served(self, web: Web) -> None:
        """Also to RPCs that have no cases here: by every path, with `x` where it wants a value."""
        for name in web.client.endpoints:
            if not name.startswith(V2) or name.removeprefix(V2) in STREAMS:
                continue
            rpc = name.removeprefix(V2)
            for binding in bindings(rpc):
                request = message_factory.GetMessageClass(SERVICE.methods_by_name[rpc].input_type)()
                for names in binding.variables:
                    place = request
                    for part in names[:-1]:
                        place = getattr(place, part)
                    setattr(place, names[-1], "x")
                expected = scrubbed(await web.client.ask(rpc, request))
                path, more = said(binding, request) or ("", {})
                answer = await web.ask(binding.verb, path, **more)
                assert scrubbed(message_of(rpc, answer.json())) == expected, binding.template
                assert answer.status_code == status.http_of(expected.status)

    async def test_what_ends_a_grpc_call_is_said_in_the_body(self, world: World) -> None:
        web = Web(world.api())
        web.client.api.refuse_new()
        answer = await web.ask("GET", "/v2/models")
        assert said_of(answer) == (503, 10030, "The appliance is shutting down; try again, or try another one.")
        assert answer.headers["retry-after"] == "1"
        web = Web(world.api(limits=Limits(request_timeout_s=1e-9)))
        answer = await web.post("/v2/models/colours/outputs", {"inputs": [picture_json()]})
        assert said_of(answer)[:2] == (504, 98009)

    async def test_the_callers_own_deadline_counts(self, web: Web) -> None:
        answer = await web.ask("GET", "/v2/models", headers={"grpc-timeout": "0n"})
        assert said_of(answer)[:2] == (504, 98009)
        answer = await web.ask("GET", "/v2/models", headers={"grpc-timeout": "soon"})
        assert said_of(answer)[:2] == (400, 11100)


# ---- statuses --------------------------------------------------------------------------------------------------------


class TestStatuses:
    @pytest.mark.parametrize(
        ("name", "http", "code"),
        [
            ("a picture", 200, 10000),
            ("some bad", 207, 10010),
            ("all bad", 400, 10020),
            ("no inputs", 400, 39999),
            ("too many", 400, 30105),
            ("unknown model", 404, 21200),
            ("bad argument", 400, 21202),
            ("broken", 500, 21350),
            ("model fails", 500, 10020),
        ],
    )
    async def test_a_code_has_its_http_status(self, web: Web, name: str, http: int, code: int) -> None:
        """30105 has two: too many inputs is 400, too large a one 413."""
        path, more = said(bindings("PostModelOutputs")[2], PREDICTIONS[name]()) or ("", {})
        answer = await web.ask("POST", path, **more)
        assert said_of(answer)[:2] == (http, code)

    async def test_an_input_that_is_too_large_is_413_alone_and_among_others(self, world: World) -> None:
        web = Web(world.api(limits=Limits(image_size=100)))
        large = picture_json(pictures.png(pictures.rgb_pixels(64, 64)))
        answer = await web.post(f"{U}/models/colours/outputs", {"inputs": [large, large]})
        assert said_of(answer)[:2] == (413, 10020)
        assert [output["status"]["code"] for output in answer.json()["outputs"]] == [30105, 30105]
        answer = await web.post(f"{U}/models/colours/outputs", {"inputs": [large, {"data": {}}]})
        assert said_of(answer)[:2] == (400, 10020)

    async def test_who_is_not_known_is_told_how_to_authenticate(self, web: Web) -> None:
        answer = await web.ask("GET", "/v2/models", key=None)
        assert said_of(answer)[:2] == (401, 11102)
        assert answer.headers["www-authenticate"].startswith("Key ")

    async def test_who_is_too_fast_is_told_when_to_come_again(self, world: World) -> None:
        web = Web(world.api(Principal(name="slow", requests_per_second=0.001)))
        assert (await web.ask("GET", "/v2/models")).status_code == 200
        answer = await web.ask("GET", "/v2/models")
        assert said_of(answer)[:2] == (429, 11005)
        assert answer.headers["retry-after"] == "1"

    async def test_calls_are_counted_once_by_the_same_endpoints(self, web: Web) -> None:
        assert (await web.post(f"{U}/models/colours/outputs", {"inputs": [picture_json()]})).status_code == 200
        labels = {"model": "colours", "version": "2", "method": "PostModelOutputs", "code": "10000"}
        assert web.client.count("requests_total", **labels) == 1
        await web.post(f"{U}/models/colours/outputs", b"no json")
        assert web.client.count("rejected_total", reason="malformed") == 1


# ---- what a request says ---------------------------------------------------------------------------------------------


class TestRequests:
    async def test_the_browser_sample_of_the_documentation(self, web: Web) -> None:
        """The short path, ids in the body, `output_info` in its old place, text/plain, which is what browsers send."""
        body = {
            "user_app_id": {"user_id": graphs.USER, "app_id": graphs.APP},
            "inputs": [picture_json()],
            "model": {"output_info": {"output_config": {"max_concepts": 2}}},
        }
        for kind in ("text/plain;charset=UTF-8", "application/json", ""):
            headers = {"content-type": kind} if kind else {}
            answer = await web.post("/v2/models/colours/outputs", body, headers=headers)
            assert answer.status_code == 200, kind
            (output,) = answer.json()["outputs"]
            assert [set(concept) >= {"id", "name", "value"} for concept in output["data"]["concepts"]] == [True] * 2

    async def test_the_path_wins_over_the_body_and_the_body_over_the_query(self, web: Web) -> None:
        body = {"model_id": "nobody", "inputs": [picture_json()]}
        assert (await web.post(f"{U}/models/colours/outputs?model_id=nothing", body)).status_code == 200
        answer = await web.ask("GET", f"{U}/models/colours?model_id=nobody&user_app_id.user_id=x")
        assert answer.json()["model"]["id"] == "colours"

    @pytest.mark.parametrize("query", ["per_page=2&page=2", "perPage=2&page=2", "page=2&per_page=2&_=12345&callback=x"])
    async def test_a_query_in_either_case_and_with_what_nobody_knows(self, web: Web, query: str) -> None:
        answer = await web.ask("GET", f"/v2/models/types?{query}")
        assert [one["id"] for one in answer.json()["model_types"]] == ["text-classifier", "text-embedder"]

    async def test_booleans_as_pythons_json_channel_sends_them(self, web: Web) -> None:
        assert (await web.ask("GET", "/v2/models?trained_only=True&userAppId.appId=nothing")).status_code == 200
        answer = await web.ask("GET", "/v2/models?trained_only=perhaps")
        assert said_of(answer) == (400, 11100, "The query's 'trained_only' must be true or false.")

    @pytest.mark.parametrize(
        ("query", "sentence"),
        [
            ("page=two", "page must be a whole number; it is text."),
            ("page=-1", "page must be from 0 to 4294967295."),
            ("user_app_id=x", "The query names 'user_app_id', which is no single value; name one of its fields."),
            ("page.x=1", "The query names 'page' as if it had fields to set."),
            ("name=%ff", "The query is not percent-encoded UTF-8."),
            ("&".join(["x=1"] * 1001), "The query has more than 1000 parameters."),
        ],
    )
    async def test_a_query_that_says_nothing_that_fits(self, web: Web, query: str, sentence: str) -> None:
        assert said_of(await web.ask("GET", f"/v2/models?{query}")) == (400, 11100, sentence)

    async def test_percent_encoded_slashes_and_letters_belong_to_the_id(self, web: Web) -> None:
        answer = await web.ask("GET", "/v2/models/a%2Fb")
        assert said_of(answer)[:2] == (404, 21200)
        assert "a/b" in said_of(answer)[2]
        assert (await web.ask("GET", "/v2/%6dodels/c%6flours")).json()["model"]["id"] == "colours"
        assert said_of(await web.ask("GET", "/v2/models/%ff")) == (400, 11100, "The path is not percent-encoded UTF-8.")

    @pytest.mark.parametrize(
        "path",
        ["/v2/models/", "/v2//models", "/v2/models//outputs", "/v2", "/v2/models/colours/", "/V2/models", "/v3/models"],
    )
    async def test_other_paths_are_not_served(self, web: Web, path: str) -> None:
        assert said_of(await web.ask("GET", path))[:2] == (404, 11101)

    @pytest.mark.parametrize(
        ("verb", "path", "allow"),
        [
            ("POST", "/v2/models/types", {"GET", "HEAD"}),
            ("GET", "/v2/models/colours/outputs", {"POST"}),
            ("OPTIONS", "/v2/models/colours/outputs", {"POST"}),
            ("DELETE", f"{U}/models/colours", {"GET", "HEAD"}),
        ],
    )
    async def test_other_verbs_are_not_allowed(self, web: Web, verb: str, path: str, allow: set[str]) -> None:
        answer = await web.ask(verb, path)
        assert said_of(answer)[:2] == (405, 11103)
        assert set(answer.headers["allow"].split(", ")) == allow

    async def test_literals_win_over_values(self, web: Web) -> None:
        assert "model_types" in (await web.ask("GET", "/v2/models/types")).json()
        assert (await web.ask("GET", f"{U}/models/types/raw")).json()["status"]["code"] in (10000, 11101)
        assert said_of(await web.ask("GET", "/v2/models/types/outputs"))[:2] == (404, 11101)  # a type of that name

    async def test_head_is_get_without_a_body(self, web: Web) -> None:
        assert (await web.ask("HEAD", "/v2/models")).status_code == 200

    @pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "deflate, gzip"])
    async def test_compressed_bodies_are_refused(self, web: Web, encoding: str) -> None:
        answer = await web.post(f"{U}/models/colours/outputs", b"\x1f\x8b", headers={"content-encoding": encoding})
        assert said_of(answer)[:2] == (415, 11100)
        assert answer.headers["accept-encoding"] == "identity"

    @pytest.mark.parametrize("body", [b"", b"{}", b" \r\n", b'{"inputs": []}', b'{"inputs": null}'])
    async def test_a_body_with_nothing_in_it_is_an_empty_request(self, web: Web, body: bytes) -> None:
        assert said_of(await web.post(f"{U}/models/colours/outputs", body))[:2] == (400, 39999)

    @pytest.mark.parametrize(
        "body",
        [
            b"[1]",
            b"{",
            b"\xff\xfe",
            b'{"inputs": ' + b"[" * 1000 + b"]" * 1000 + b"}",
            b'{"inputs": ' + b"[" * 200_000,
            b'{"a": 1, "a": 1}',
            b'{"inputs": [{"data": {"image": {"base64": "?"}}}]}',
            b'{"inputs": [{"id": NaN}]}',
            b'{"inputs": [{"id": 1e999}]}',
            b'{"inputs": ' + b"9" * 5000 + b"}",
            b'{"user_app_id": {"user_id": "\\ud800"}}',
            b"\0",
        ],
    )
    async def test_hostile_bodies_are_the_callers_fault(self, web: Web, body: bytes) -> None:
        answer = await web.post(f"{U}/models/colours/outputs", body)
        assert said_of(answer)[:2] == (400, 11100)
        assert web.client.count("rejected_total", reason="malformed") == 1

    async def test_a_picture_under_the_wrong_name_is_named(self, web: Web) -> None:
        body = {"inputs": [{"data": {"img": {"url": "https://x"}}}]}
        answer = await web.post(f"{U}/models/colours/outputs", body)
        assert said_of(answer)[:2] == (400, 30104)
        assert "did you mean 'image'" in said_of(answer)[2]


# ---- memory ----------------------------------------------------------------------------------------------------------


class TestMemory:
    async def test_who_is_not_known_is_refused_before_the_body_is_read(self, web: Web) -> None:
        async def body() -> AsyncIterator[bytes]:
            raise AssertionError("the body was asked for")
            yield b""

        answer = await web.ask("POST", f"{U}/models/colours/outputs", key=None, content=body())
        assert answer.status_code == 401
        assert web.admitted == []

    async def test_a_bodys_bytes_are_the_callers_from_its_admission_on(self, world: World) -> None:
        web = Web(world.api(Principal(name="ann")))
        answer = await web.post(f"{U}/models/colours/outputs", {"inputs": [picture_json()]})
        assert answer.status_code == 200
        assert [memory._owner for memory in web.admitted] == ["ann"]
        assert web.client.budget.used == 0

    async def test_a_large_request_of_a_known_caller_is_served(self, world: World) -> None:
        web = Web(world.api(memory=400 * MIB))
        padding = "x" * (70 * MIB)
        body = json.dumps({"inputs": [picture_json()], "ignored": padding}).encode()
        assert (await web.post(f"{U}/models/colours/outputs", body)).status_code == 200
        assert web.client.budget.used == 0

    @pytest.mark.parametrize("announced", [True, False])
    async def test_a_bomb_of_brackets_is_refused_by_its_cost(self, world: World, announced: bool) -> None:
        web = Web(world.api(memory=64 * MIB))
        body = b'{"inputs": [' + b"{}," * (MIB // 2) + b"{}]}"

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), MIB):
                yield body[start : start + MIB]

        content = body if announced else pieces()
        answer = await web.ask("POST", f"{U}/models/colours/outputs", content=content)
        assert said_of(answer)[:2] == (503, 21354)
        assert "limits.memory_in_flight" in said_of(answer)[2]
        assert web.client.budget.used == 0

    async def test_a_request_over_the_limit_is_refused_however_it_comes(self, world: World) -> None:
        web = Web(world.api(), request_size=1000)

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(4):
                yield b" " * 500

        path = f"{U}/models/colours/outputs"
        assert said_of(await web.post(path, b" " * 1501))[:2] == (413, 30105)
        assert said_of(await web.ask("POST", path, content=pieces()))[:2] == (413, 30105)
        large = picture_json(bytes(1001))
        answer = await web.post(path, json.dumps({"inputs": [large]}).encode())
        assert said_of(answer)[:2] == (413, 30105)
        assert "limits.request_size, 1000 bytes" in said_of(answer)[2]
        assert web.client.budget.used == 0


# ---- streams ---------------------------------------------------------------------------------------------------------


GOING = RpcAbort(RpcStatus.UNAVAILABLE, "going")


class Scripted:
    """An endpoint whose replies a test lets go one by one."""

    def __init__(self, web: Web) -> None:
        self.go = asyncio.Semaphore(0)
        self.read: list[bytes] = []
        self.reads = asyncio.Semaphore(0)
        self.ended = asyncio.Event()
        self.abort: RpcAbort | Exception | None = None
        real = web.client.endpoints[V2 + "StreamModelOutputs"]
        self.endpoint = Endpoint(stream=self._stream, admit=real.admit)

    async def _stream(self, call: Any, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for body in requests:
                self.read.append(body)
                self.reads.release()
                await self.go.acquire()
                if self.abort is not None:
                    raise self.abort
                yield P.MultiOutputResponse(status=status.success(str(len(self.read)))).SerializeToString()
        finally:
            self.ended.set()


class TestStreams:
    @staticmethod
    def scripted(world: World) -> tuple[Web, Scripted]:
        client = world.api()
        script = Scripted(Web(client))
        client.endpoints = {**client.endpoints, V2 + "StreamModelOutputs": script.endpoint}
        return Web(client), script

    @pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
    async def test_each_line_is_a_message_and_each_reply_a_line(self, world: World, end: bytes) -> None:
        web, script = self.scripted(world)
        script.go = asyncio.Semaphore(9)
        answer = await web.post("/v2/models/outputs/stream", b'{"model_id": "1"}\n\n{"model_id": "2"}' + end)
        assert [json.loads(line)["result"]["status"]["req_id"] for line in answer.text.splitlines()] == ["1", "2"]
        assert [json.loads(line) for line in script.read] == [{"model_id": "1"}, {"model_id": "2"}]

    @pytest.mark.parametrize("text", ["{", "[[", '\\"{', "}", "\\"])
    async def test_what_a_text_holds_does_not_make_two_lines_one(self, world: World, text: str) -> None:
        web, script = self.scripted(world)
        script.go = asyncio.Semaphore(9)
        messages = [{"model_id": text}, {"model_id": "2"}]
        await web.post("/v2/models/outputs/stream", "\n".join(map(json.dumps, messages)).encode())
        assert [json.loads(line) for line in script.read] == messages

    async def test_a_body_over_several_lines_is_one_message(self, world: World) -> None:
        web, script = self.scripted(world)
        script.go = asyncio.Semaphore(9)
        body = json.dumps({"model_id": "m", "inputs": [{"id": "a"}]}, indent=2).encode()
        answer = await web.post("/v2/models/outputs/stream", body)
        assert len(answer.text.splitlines()) == 1
        assert json.loads(script.read[0])["model_id"] == "m"

    async def test_a_reply_is_on_its_way_before_the_next_request_is_read(self, world: World) -> None:
        web, script = self.scripted(world)
        lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        sent: asyncio.Queue[Any] = asyncio.Queue()
        for piece in (b'{"model_id": "1"}\n', b'{"model_id": "2"}\n'):
            await sent.put({"type": "http.request", "body": piece, "more_body": True})
        scope = scope_of(web, "/v2/models/outputs/stream")
        task = asyncio.create_task(web._serve(scope, sent.get, lines.put))
        script.go.release()
        assert (await lines.get())["status"] == 200
        first = await lines.get()
        assert json.loads(first["body"])["result"]["status"]["req_id"] == "1"
        assert first["more_body"]
        assert lines.empty()
        await sent.put({"type": "http.disconnect"})
        script.go.release()
        await asyncio.wait_for(task, 30)
        assert script.ended.is_set()
        assert web.client.budget.used == 0

    async def test_a_client_that_leaves_ends_the_endpoint(self, world: World) -> None:
        web, script = self.scripted(world)
        sent: asyncio.Queue[Any] = asyncio.Queue()
        await sent.put({"type": "http.request", "body": b"{}\n", "more_body": True})

        async def send(message: Any) -> None:
            raise OSError("gone")

        task = asyncio.create_task(web._serve(scope_of(web, "/v2/models/outputs/stream"), sent.get, send))
        await script.reads.acquire()
        task.cancel()  # what a connection does when its client is gone and nobody waits for it
        with pytest.raises(asyncio.CancelledError):
            await task
        assert script.ended.is_set()
        assert web.client.budget.used == 0

    @pytest.mark.parametrize("after", [0, 1])
    async def test_an_abort_is_the_status_or_the_last_line(self, world: World, after: int) -> None:
        web, script = self.scripted(world)
        script.go = asyncio.Semaphore(9)
        if after:
            script.go = asyncio.Semaphore(1)
            asked = asyncio.create_task(web.post("/v2/models/outputs/stream", b"{}\n{}\n"))
            await script.reads.acquire()
            await script.reads.acquire()
            script.abort = GOING
            script.go.release()
            answer = await asked
            last = json.loads(answer.text.splitlines()[-1])
            assert answer.status_code == 200
            assert last["error"]["code"] == 14
            assert last["status"]["code"] == 10030
            assert "result" not in last
        else:
            script.abort = GOING
            answer = await web.post("/v2/models/outputs/stream", b"{}\n")
            assert said_of(answer)[:2] == (503, 10030)

    async def test_what_is_not_foreseen_tells_nothing(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        web, script = self.scripted(world)
        script.go, script.abort = asyncio.Semaphore(9), ValueError("a secret")
        answer = await web.post("/v2/models/outputs/stream", b"{}\n")
        assert said_of(answer)[:2] == (500, 98004)
        assert "secret" not in answer.text
        assert "a secret" in caplog.text

    async def test_a_stream_of_predictions(self, web: Web) -> None:
        request = {"user_app_id": {"user_id": graphs.USER, "app_id": graphs.APP}, "model_id": "colours"}
        lines = "\n".join(json.dumps({**request, "inputs": [picture_json()]}) for _ in range(3))
        answer = await web.post("/v2/models/outputs/stream", lines.encode())
        replies = [json.loads(line)["result"] for line in answer.text.splitlines()]
        assert [reply["status"]["code"] for reply in replies] == [10000] * 3
        assert all(reply["outputs"][0]["data"]["concepts"] for reply in replies)


def scope_of(web: Web, path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"authorization", f"Key {web.client.keys[0]}".encode())],
        "root_path": "",
        "http_version": "1.1",
    }


# ---- other pages -----------------------------------------------------------------------------------------------------


class TestOtherPages:
    async def test_the_sdks_probe_needs_no_credentials(self, web: Web) -> None:
        answer = await web.ask("GET", "/v2/auth/methods", key=None)
        assert said_of(answer)[:2] == (200, 10000)

    async def test_organizations_are_none_for_whom_getuser_answers(self, web: Web) -> None:
        answer = await web.ask("GET", "/v2/users/me/organizations")
        assert said_of(answer)[:2] == (200, 10000)
        assert answer.json()["organizations"] == []
        assert said_of(await web.ask("GET", "/v2/users/me/organizations", key=None))[:2] == (401, 11102)
        assert said_of(await web.ask("GET", "/v2/users/nobody/organizations"))[:2] == (404, 11101)

    async def test_keys_are_never_logged(self, web: Web, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("DEBUG")
        key = "0123456789abcdef" * 4
        await web.ask("GET", "/v2/models", key=key)
        await web.ask("GET", f"/v2/models?key={web.client.keys[0]}")
        await web.post("/v2/models/colours/outputs", {"user_app_id": web.client.keys[0]})
        await web.post("/v2/models/colours/outputs", web.client.keys[0].encode())
        ours = [record.__dict__ for record in caplog.records if record.name.startswith("appliance")]
        logged = str(ours)
        assert len(ours) >= 3
        assert key not in logged
        assert web.client.keys[0] not in logged
