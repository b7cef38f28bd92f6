"""Who may call: keys, client certificates, principals, rate and concurrency; on live connections too."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from clarifai_grpc.grpc.api import service_pb2
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from support import graphs
from support.appliance import Appliance, Client, Pki, array_input, make_pki, request_for, text_input
from support.handmade import handmade_client

NOTHING = service_pb2.ListModelsRequest()
LINE_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}


def code(client: Client, request: object = NOTHING, rpc: str = "ListModels") -> int:
    """The Clarifai status of a call."""
    return int(client.call(rpc, request).status.code)


@pytest.fixture
def certified(make_appliance: Callable[..., Appliance]) -> Iterator[Appliance]:
    """A running appliance that knows callers by certificate only, and only `line-3`."""
    with make_appliance("ml-topics", auth={"require": "certificate"}, principal=[LINE_3]) as appliance:
        yield appliance


class TestKeys:
    def test_a_key_opens_the_door_as_key_and_as_bearer(self, shared: Appliance, client: Client) -> None:
        assert code(client) == StatusCode.SUCCESS
        client.metadata = (("authorization", f"Bearer {shared.key}"),)
        assert code(client) == StatusCode.SUCCESS

    @pytest.mark.parametrize(
        ("metadata", "expected"),
        [
            ((), StatusCode.CONN_INVALID_REQUEST),
            ((("authorization", "Key "),), StatusCode.CONN_INVALID_REQUEST),
            ((("authorization", "Basic YTpi"),), StatusCode.CONN_INVALID_REQUEST),
            ((("authorization", "Key 0123456789abcdef"),), StatusCode.CONN_KEY_INVALID),
        ],
    )
    def test_a_missing_or_wrong_key_is_refused_by_every_rpc(
        self, client: Client, metadata: tuple[tuple[str, str], ...], expected: int
    ) -> None:
        client.metadata = metadata
        assert code(client) == expected
        assert code(client, request_for("ml-topics", [text_input("x")]), "PostModelOutputs") == expected
        assert code(client, service_pb2.GetUserRequest(), "GetUser") == expected

    def test_a_revoked_key_is_refused_on_a_live_connection(
        self, make_appliance: Callable[..., Appliance], pki: Pki
    ) -> None:
        appliance = make_appliance("ml-topics")
        key = appliance.new_key()
        with appliance, Client(appliance.port(), pki.ca, key) as client:
            assert code(client) == StatusCode.SUCCESS
            listed = appliance.command("keys", "list", "--json").stdout
            key_id = listed.split('"id": "')[1].split('"')[0]
            appliance.command("keys", "revoke", key_id)
            assert code(client) == StatusCode.CONN_KEY_INVALID
        assert key not in appliance.log
        assert key not in (appliance.home / "keys.json").read_text(encoding="utf-8")

    def test_a_new_key_works_without_a_restart(self, make_appliance: Callable[..., Appliance], pki: Pki) -> None:
        with make_appliance("ml-topics") as appliance, Client(appliance.port(), pki.ca, appliance.new_key()) as client:
            assert code(client) == StatusCode.SUCCESS


class TestPrincipals:
    def test_they_reach_only_what_they_are_allowed(self, make_appliance: Callable[..., Appliance], pki: Pki) -> None:
        appliance = make_appliance(
            "digits", "ml-topics", principal=[{"name": "reader", "models": ["ml-*"], "user_id": "reader-1"}]
        )
        key = appliance.new_key("--principal", "reader")
        with appliance, Client(appliance.port(), pki.ca, key) as client:
            request = request_for("ml-topics", [text_input("ridge regression")])
            assert code(client, request, "PostModelOutputs") == StatusCode.SUCCESS
            request.model_id = "digits"
            assert code(client, request, "PostModelOutputs") == StatusCode.CONN_INSUFFICIENT_SCOPES
            listed = client.call("ListModels", NOTHING)
            assert [model.id for model in listed.models] == ["ml-topics"]
            request = service_pb2.GetModelRequest(model_id="digits")
            assert code(client, request, "GetModel") == StatusCode.CONN_INSUFFICIENT_SCOPES
            user = client.call("GetUser", service_pb2.GetUserRequest(user_app_id={"user_id": "me"}))
            assert user.user.id == "reader-1"

    def test_over_their_rate_they_are_throttled(self, make_appliance: Callable[..., Appliance], pki: Pki) -> None:
        principal = {"name": "slow", "requests_per_second": 0.001, "burst": 2}
        appliance = make_appliance("ml-topics", principal=[principal])
        key = appliance.new_key("--principal", "slow")
        with appliance, Client(appliance.port(), pki.ca, key) as client:
            assert [code(client) for _ in range(3)] == [
                StatusCode.SUCCESS,
                StatusCode.SUCCESS,
                StatusCode.CONN_THROTTLED,
            ]

    def test_over_their_concurrency_they_are_throttled(
        self, make_appliance: Callable[..., Appliance], pki: Pki
    ) -> None:
        appliance = make_appliance(principal=[{"name": "one", "concurrency": 1}])
        graphs.write_raw(appliance.models / "slow", graphs.slow_model(rounds=400, width=512))
        key = appliance.new_key("--principal", "one")
        codes: list[int] = []
        with appliance, Client(appliance.port(), pki.ca, key) as client:
            request = request_for("slow", [array_input(np.ones((1, 512), np.float32))], user="", app="")
            threads = [
                threading.Thread(target=lambda: codes.append(code(client, request, "PostModelOutputs")))
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert set(codes) == {StatusCode.SUCCESS, StatusCode.CONN_THROTTLED}


class TestCertificates:
    def test_a_principals_certificate_needs_no_key(self, certified: Appliance, pki: Pki) -> None:
        port = certified.port("server.mtls_listen")
        with Client(port, pki.ca, certificate=pki.client("line-3")) as client:
            assert code(client) == StatusCode.SUCCESS

    def test_a_certificate_without_a_principal_is_refused(self, certified: Appliance, pki: Pki) -> None:
        """A laptop's certificate from the enterprise's CA is not a key."""
        port = certified.port("server.mtls_listen")
        with Client(port, pki.ca, certificate=pki.client("laptop")) as client:
            assert code(client) == StatusCode.CONN_INSUFFICIENT_SCOPES

    def test_the_tls_port_says_that_a_certificate_is_missing(self, certified: Appliance, pki: Pki) -> None:
        with Client(certified.port(), pki.ca, certified.new_key()) as client:
            assert code(client) == StatusCode.CONN_INVALID_REQUEST

    def test_no_certificate_gets_no_connection(self, certified: Appliance, pki: Pki) -> None:
        with Client(certified.port("server.mtls_listen"), pki.ca) as client:
            assert refused(client)

    def test_another_authoritys_certificate_gets_no_connection(
        self, certified: Appliance, pki: Pki, tmp_path: Path
    ) -> None:
        stranger = make_pki(tmp_path / "stranger", clients=("line-3",))
        with Client(certified.port("server.mtls_listen"), pki.ca, certificate=stranger.client("line-3")) as client:
            assert refused(client)

    def test_an_expired_certificate_gets_no_connection(self, certified: Appliance, pki: Pki) -> None:
        old = handmade_client(pki, "uri:spiffe://test/line-3", ends_days=-1)
        with Client(certified.port("server.mtls_listen"), pki.ca, certificate=old) as client:
            assert refused(client)

    def test_a_certificate_without_client_auth_is_refused(self, certified: Appliance, pki: Pki) -> None:
        odd = handmade_client(pki, "uri:spiffe://test/line-3", usage=None)
        with Client(certified.port("server.mtls_listen"), pki.ca, certificate=odd) as client:
            assert refused(client) or code(client) == StatusCode.CONN_INSUFFICIENT_SCOPES

    def test_a_removed_principal_is_refused_on_a_live_connection(self, certified: Appliance, pki: Pki) -> None:
        port = certified.port("server.mtls_listen")
        with Client(port, pki.ca, certificate=pki.client("line-3")) as client:
            assert code(client) == StatusCode.SUCCESS
            certified.write_config(principal=[{**LINE_3, "identities": ["uri:spiffe://test/other"]}])
            certified.signal(signal.SIGHUP)
            certified.wait(lambda: code(client) == StatusCode.CONN_INSUFFICIENT_SCOPES, "the refusal")

    def test_both_means_both(self, make_appliance: Callable[..., Appliance], pki: Pki) -> None:
        """Rights intersect: the key may use digits, the certificate may not."""
        principals = [{**LINE_3, "models": ["ml-topics"]}, {"name": "app"}]
        appliance = make_appliance("digits", "ml-topics", auth={"require": "both"}, principal=principals)
        key = appliance.new_key("--principal", "app")
        certificate = pki.client("line-3")
        with appliance:
            port = appliance.port("server.mtls_listen")
            with Client(port, pki.ca, key, certificate) as client:
                assert [model.id for model in client.call("ListModels", NOTHING).models] == ["ml-topics"]
            with Client(port, pki.ca, "", certificate) as client:
                assert code(client) == StatusCode.CONN_INVALID_REQUEST
            with Client(port, pki.ca, "wrong", certificate) as client:
                assert code(client) == StatusCode.CONN_KEY_INVALID
            with Client(appliance.port(), pki.ca, key) as client:
                assert code(client) == StatusCode.CONN_INVALID_REQUEST

    def test_either_takes_the_certificate_if_one_was_sent_else_the_key(
        self, make_appliance: Callable[..., Appliance], pki: Pki
    ) -> None:
        appliance = make_appliance("ml-topics", auth={"require": "either"}, principal=[LINE_3])
        key = appliance.new_key()
        with appliance:
            with Client(appliance.port(), pki.ca, key) as client:
                assert code(client) == StatusCode.SUCCESS
            port = appliance.port("server.mtls_listen")
            with Client(port, pki.ca, certificate=pki.client("line-3")) as client:
                assert code(client) == StatusCode.SUCCESS
            with Client(port, pki.ca, key, pki.client("laptop")) as client:
                assert code(client) == StatusCode.CONN_INSUFFICIENT_SCOPES


def test_health_needs_no_credentials_and_reflection_does(shared: Appliance, pki: Pki) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with Client(shared.port(), pki.ca) as client:
        health = health_pb2_grpc.HealthStub(client.channel)
        for service in ("", "clarifai.api.V2", "appliance/main/digits"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        assert next(iter(health.Watch(health_pb2.HealthCheckRequest()))).status == reply.status
        with pytest.raises(grpc.RpcError) as error:
            health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        reflect = reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo
        with pytest.raises(grpc.RpcError) as error:
            next(iter(reflect(iter([question]))))
        assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answers = reflect(iter([question]), metadata=(("authorization", f"Key {shared.key}"),))
        services = {service.name for service in next(iter(answers)).list_services_response.service}
        assert {"clarifai.api.V2", "grpc.health.v1.Health"} <= services


def test_unknown_rpcs_are_unimplemented(client: Client) -> None:
    for rpc, request in (("PostInputs", service_pb2.PostInputsRequest()),):
        with pytest.raises(grpc.RpcError) as error:
            client.call(rpc, request)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    method = client.channel.unary_unary("/clarifai.api.V2/NoSuchThing")
    with pytest.raises(grpc.RpcError) as error:
        method(b"")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def refused(client: Client) -> bool:
    """Whether the handshake failed, so that no call was ever made."""
    with contextlib.suppress(grpc.RpcError):
        client.call("ListModels", NOTHING)
        return False
    return True
