"""What the centre keeps, refuses, routes, breaks and writes down."""

from collections.abc import Callable, Iterator

import grpc
import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from orchestrator import hand_runner as hand
from orchestrator.hand_runner import DEPLOYMENT, USER_APP, at_deployment, at_nodepool, predict_request, register, stream
from orchestrator.link import Link
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT
from support.appliance import PATIENCE_S, Client

Code = status_code_pb2.StatusCode


@pytest.fixture
def client(centre: RunningCentre) -> Iterator[Client]:
    """A client with the user's token."""
    with Client(centre.port, centre.pki.ca, PAT) as made:
        yield made


def waits(centre: RunningCentre, streams: int) -> None:
    """Return when so many streams wait for items."""
    centre.wait(lambda state: sum(state["idle"].values()) == streams, f"{streams} streams wait")


def refusal(reply: object) -> str:
    """The name of the code of a reply's status."""
    return Code.Name(reply.status.code)  # type: ignore[attr-defined]


# ---- resources ----


def test_resources_are_there_after_the_centre_was_killed(centre: RunningCentre, client: Client) -> None:
    runner, version = register(client)
    centre.restart()
    with Client(centre.port, centre.pki.ca, PAT) as again:
        asked = service_pb2.GetDeploymentRequest(user_app_id=USER_APP, deployment_id=DEPLOYMENT)
        found = hand.ok(again.call("GetDeployment", asked)).deployment
        assert found.worker.model.model_version.id == version
        asked = service_pb2.GetRunnerRequest(user_app_id=USER_APP, runner_id=runner)
        assert hand.ok(again.call("GetRunner", asked)).runner.nodepool.id == hand.NODEPOOL


def test_lost_state_means_that_nobody_is_known(centre: RunningCentre, client: Client) -> None:
    register(client)
    centre.restart(lose_state=True)
    with Client(centre.port, centre.pki.ca, PAT) as again:
        asked = service_pb2.GetDeploymentRequest(user_app_id=USER_APP, deployment_id=DEPLOYMENT)
        assert refusal(again.call("GetDeployment", asked)) == "CONN_KEY_INVALID"
        centre.tell("admit", pat=PAT, user="acme")
        assert refusal(again.call("GetDeployment", asked)) == "DEPLOYMENT_DOES_NOT_EXIST"
        assert centre.calls()[:2] == ["PostComputeClusters", "PostNodepools"], (
            "what was written down outlives the state"
        )


def test_a_token_acts_for_its_own_user_only(client: Client) -> None:
    asked = service_pb2.GetAppRequest(user_app_id=resources_pb2.UserAppIDSet(user_id="other", app_id="plant"))
    assert refusal(client.call("GetApp", asked)) == "CONN_INSUFFICIENT_SCOPES"


def test_a_clusters_key_is_never_shown(client: Client) -> None:
    register(client)
    asked = service_pb2.GetComputeClusterRequest(user_app_id=USER_APP, compute_cluster_id=hand.CLUSTER)
    assert not hand.ok(client.call("GetComputeCluster", asked)).compute_cluster.HasField("key")


def test_what_is_in_use_cannot_be_deleted(client: Client) -> None:
    runner, version = register(client)
    at = {"user_app_id": USER_APP, "compute_cluster_id": hand.CLUSTER}
    s = service_pb2
    steps = [
        ("DeleteDeployments", s.DeleteDeploymentsRequest(user_app_id=USER_APP, ids=[DEPLOYMENT])),
        ("DeleteRunners", s.DeleteRunnersRequest(**at, nodepool_id=hand.NODEPOOL, ids=[runner])),
        ("DeleteModelVersion", s.DeleteModelVersionRequest(user_app_id=USER_APP, model_id="echo", version_id=version)),
        ("DeleteModel", s.DeleteModelRequest(user_app_id=USER_APP, model_id="echo")),
        ("DeleteApp", s.DeleteAppRequest(user_app_id=USER_APP)),
        ("DeleteNodepools", s.DeleteNodepoolsRequest(**at, ids=[hand.NODEPOOL])),
        ("DeleteComputeClusters", s.DeleteComputeClustersRequest(user_app_id=USER_APP, ids=[hand.CLUSTER])),
    ]
    for rpc, request in steps[2:]:
        assert refusal(client.call(rpc, request)) != "SUCCESS", f"{rpc} took away what is in use"
    for rpc, request in steps:
        hand.ok(client.call(rpc, request))


def test_local_versions_run_in_local_clusters_only(client: Client) -> None:
    register(client, deployed=False)
    at = {"user_app_id": USER_APP, "compute_cluster_id": "big"}
    clusters = [resources_pb2.ComputeCluster(id="big", cluster_type="dedicated")]
    s = service_pb2
    hand.ok(
        client.call(
            "PostComputeClusters", s.PostComputeClustersRequest(user_app_id=USER_APP, compute_clusters=clusters)
        )
    )
    hand.ok(client.call("PostNodepools", s.PostNodepoolsRequest(**at, nodepools=[hand.nodepool()])))
    runners = [resources_pb2.Runner(worker=hand.worker(hand.new_version(client)))]
    reply = client.call("PostRunners", s.PostRunnersRequest(**at, nodepool_id=hand.NODEPOOL, runners=runners))
    assert refusal(reply) == "RUNNER_INVALID_REQUEST"


def test_lists_end(client: Client) -> None:
    """A page past the end has a status and nothing else, or the stock lister asks for ever (PROTOCOL 0.7)."""
    register(client)
    pages = [
        client.call("ListRunners", service_pb2.ListRunnersRequest(user_app_id=USER_APP, page=page)) for page in (1, 2)
    ]
    assert [len(hand.ok(page).runners) for page in pages] == [1, 0]


def test_a_deployments_worker_changes_by_what_is_desired(client: Client) -> None:
    """And by the action "overwrite" alone (PROTOCOL 5.1)."""
    _, first = register(client)
    second = hand.new_version(client)

    def patch(action: str, **worker: object) -> object:
        changes = [resources_pb2.Deployment(id=DEPLOYMENT, **worker)]
        patched = service_pb2.PatchDeploymentsRequest(user_app_id=USER_APP, action=action, deployments=changes)
        return client.call("PatchDeployments", patched)

    assert refusal(patch("merge", desired_worker=hand.worker(second))) == "DEPLOYMENT_INVALID_REQUEST"
    ignored = hand.ok(patch("overwrite", worker=hand.worker(second)))
    assert ignored.deployments[0].worker.model.model_version.id == first
    done = hand.ok(patch("overwrite", desired_worker=hand.worker(second)))
    assert done.deployments[0].worker.model.model_version.id == second


def test_unknown_rpcs_are_unimplemented(client: Client) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        client.call("ListWorkflows", service_pb2.ListWorkflowsRequest(user_app_id=USER_APP))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- routing ----


@pytest.mark.parametrize("place", [at_deployment, at_nodepool, lambda: None], ids=["deployment", "nodepool", "default"])
def test_a_request_finds_its_runner(centre: RunningCentre, client: Client, place: Callable[[], object]) -> None:
    runner, _ = register(client)
    with stream(client, runner) as waiting:
        waits(centre, 1)
        call = client.stub.PostModelOutputs.future(predict_request(runner_selector=place()), metadata=client.metadata)
        item = waiting.answer("done")
        assert item.processing_info.runner_method_type == resources_pb2.UNARY_UNARY
        assert item.post_model_outputs_request.inputs[0].data.text.raw == "x"
        assert hand.ok(call.result(PATIENCE_S)).outputs[0].data.text.raw == "done"


def test_what_cannot_be_routed_is_refused(client: Client) -> None:
    _, version = register(client, deployed=False)
    for request, code in [
        (predict_request(), "MODEL_NOT_DEPLOYED"),
        (predict_request(runner_selector=at_deployment("other")), "DEPLOYMENT_DOES_NOT_EXIST"),
        (predict_request(runner_selector=at_nodepool("other")), "NODEPOOL_DOES_NOT_EXIST"),
        (predict_request(runner_selector=at_nodepool(), version_id="other"), "MODEL_DOES_NOT_EXIST"),
        (predict_request(runner_selector=at_nodepool(), version_id=version), "MODEL_DEPLOYING"),
    ]:
        assert refusal(client.predict(request)) == code


def test_a_version_nobody_runs_is_deploying_and_a_busy_one_busy(make_centre: Callable[..., RunningCentre]) -> None:
    centre = make_centre(patience_s=0.1, queue_s=0.5)
    with Client(centre.port, centre.pki.ca, PAT) as client:
        runner, _ = register(client)
        assert refusal(client.predict(predict_request())) == "MODEL_DEPLOYING"
        with stream(client, runner) as waiting:
            waits(centre, 1)
            first = client.stub.PostModelOutputs.future(predict_request(), metadata=client.metadata)
            item = waiting.item()
            assert refusal(client.predict(predict_request())) == "MODEL_BUSY_PLEASE_RETRY"
            waiting.say(item.id, status_code_pb2.SUCCESS, "at last")
            assert hand.ok(first.result(PATIENCE_S)).outputs[0].data.text.raw == "at last"


# ---- items ----


def test_streams_bring_their_outputs_as_they_come(centre: RunningCentre, client: Client) -> None:
    runner, _ = register(client)
    with stream(client, runner) as waiting:
        waits(centre, 1)
        replies = client.stub.GenerateModelOutputs(predict_request(), metadata=client.metadata)
        item = waiting.item()
        assert item.processing_info.runner_method_type == resources_pb2.UNARY_STREAMING
        for text in ("a", "b"):
            waiting.say(item.id, status_code_pb2.SUCCESS, text)
            assert next(replies).outputs[0].data.text.raw == text
        waiting.end()
        assert list(replies) == []


def test_what_a_runner_gives_back_is_handed_out_again(centre: RunningCentre, client: Client) -> None:
    """RUNNER_NEEDS_RETRY, and a stream that ends without an output."""
    runner, _ = register(client)
    with stream(client, runner) as first:
        waits(centre, 1)
        call = client.stub.PostModelOutputs.future(predict_request(), metadata=client.metadata)
        first.say(first.item().id, status_code_pb2.RUNNER_NEEDS_RETRY)
        with stream(client, runner) as second:
            second.item()
            second.call.cancel()
            with stream(client, runner) as third:
                third.answer("third time lucky")
                assert hand.ok(call.result(PATIENCE_S)).outputs[0].data.text.raw == "third time lucky"
    assert centre.state()["counts"]["handed out again"] == 2


def test_a_failure_of_the_runner_reaches_the_caller(centre: RunningCentre, client: Client) -> None:
    runner, _ = register(client)
    with stream(client, runner) as waiting:
        waits(centre, 1)
        call = client.stub.PostModelOutputs.future(predict_request(), metadata=client.metadata)
        waiting.say(waiting.item().id, status_code_pb2.RUNNER_PROCESSING_FAILED)
        assert refusal(call.result(PATIENCE_S)) == "RUNNER_PROCESSING_FAILED"


def test_half_of_a_stream_is_not_begun_anew(centre: RunningCentre, client: Client) -> None:
    """Its caller has seen outputs: it hears of the end instead."""
    runner, _ = register(client)
    with stream(client, runner) as waiting:
        waits(centre, 1)
        replies = client.stub.GenerateModelOutputs(predict_request(), metadata=client.metadata)
        waiting.say(waiting.item().id, status_code_pb2.SUCCESS, "a")
        assert next(replies).outputs[0].data.text.raw == "a"
        waiting.call.cancel()
        assert refusal(next(replies)) == "MODEL_PREDICTION_FAILED"


def test_a_duplicated_item_is_answered_once(centre: RunningCentre, client: Client) -> None:
    runner, _ = register(client)
    with stream(client, runner) as first, stream(client, runner) as second:
        waits(centre, 2)
        centre.tell("duplicate", times=1)
        call = client.stub.PostModelOutputs.future(predict_request(), metadata=client.metadata)
        assert first.answer("one").id == second.answer("two").id
        assert hand.ok(call.result(PATIENCE_S)).outputs[0].data.text.raw in ("one", "two")
        centre.wait(lambda state: state["counts"].get("outputs dropped") == 1, "the other answer is dropped")
    assert centre.state()["counts"]["answered"] == 1


# ---- faults ----


def test_faults_happen_where_and_as_often_as_told(centre: RunningCentre, client: Client) -> None:
    centre.tell("fault", rpc="PostApps", at="reply", grpc="UNAVAILABLE")
    posted = service_pb2.PostAppsRequest(user_app_id=USER_APP, apps=[resources_pb2.App(id="plant")])
    with pytest.raises(grpc.RpcError) as raised:
        client.call("PostApps", posted)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert refusal(client.call("PostApps", posted)) == "CONN_INVALID_REQUEST", "it was done, nobody heard of it"
    centre.tell("fault", rpc="*", status=Code.Value("CONN_THROTTLED"), times=2)
    asked = service_pb2.GetAppRequest(user_app_id=USER_APP)
    assert [refusal(client.call("GetApp", asked)) for _ in range(3)] == ["CONN_THROTTLED", "CONN_THROTTLED", "SUCCESS"]


@pytest.mark.parametrize("code", ["UNAVAILABLE", "UNKNOWN"])
def test_streams_of_runners_can_be_broken(centre: RunningCentre, client: Client, code: str) -> None:
    runner, _ = register(client)
    with stream(client, runner) as waiting:
        waits(centre, 1)
        assert centre.tell("break_streams", grpc_code=code) == {"ended": 1}
        assert waiting.ended() is grpc.StatusCode[code]


def test_a_revoked_token_ends_its_streams_and_opens_none(centre: RunningCentre, client: Client) -> None:
    runner, _ = register(client)
    with stream(client, runner) as waiting:
        waits(centre, 1)
        assert centre.tell("revoke", pat=PAT) == {"ended": 1}
        assert refusal(waiting.next()) == "CONN_KEY_INVALID"
        assert waiting.ended() is grpc.StatusCode.OK
    with stream(client, runner) as refused:
        assert refusal(refused.next()) == "CONN_KEY_INVALID"


def test_an_unknown_runner_is_told_so(client: Client) -> None:
    register(client)
    with stream(client, "f" * 32) as refused:
        assert refusal(refused.next()) == "RUNNER_DOES_NOT_EXIST"


def test_a_centre_may_ask_for_client_certificates(make_centre: Callable[..., RunningCentre]) -> None:
    """A private centre's way; no stock client has one."""
    centre = make_centre()
    centre.settings["client_ca"] = str(centre.pki.ca)
    centre.restart()
    with Client(centre.port, centre.pki.ca, PAT, certificate=centre.pki.client("line-3")) as client:
        register(client)
    with Client(centre.port, centre.pki.ca, PAT) as stranger, pytest.raises(grpc.RpcError):
        stranger.call("GetUser", service_pb2.GetUserRequest(user_app_id=USER_APP))


# ---- the link ----


def test_a_link_delays_freezes_and_cuts(centre: RunningCentre) -> None:
    with Link(centre.port) as link, Client(link.port, centre.pki.ca, PAT) as client:
        asked = service_pb2.GetUserRequest(user_app_id=USER_APP)
        hand.ok(client.call("GetUser", asked))
        link.freeze()
        call = client.stub.GetUser.future(asked, metadata=client.metadata)
        with pytest.raises(grpc.FutureTimeoutError):
            call.result(0.3)
        link.thaw()
        hand.ok(call.result(PATIENCE_S))
        link.freeze()
        call = client.stub.GetUser.future(asked, metadata=client.metadata)
        link.reset()
        with pytest.raises(grpc.RpcError) as raised:
            call.result(PATIENCE_S)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        link.thaw()
        link.refuse()
        with pytest.raises(grpc.RpcError):
            client.stub.GetUser(asked, metadata=client.metadata, timeout=PATIENCE_S)
        link.accept()
        hand.ok(client.stub.GetUser(asked, metadata=client.metadata, timeout=PATIENCE_S, wait_for_ready=True))
        assert link.accepted >= 2
