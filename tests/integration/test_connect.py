"""`appliance connect` before a daemon that wants certificate and key: what clients get through it, what they hear."""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from clarifai_grpc.grpc.api import service_pb2
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from cryptography.hazmat.primitives import serialization
from support import graphs
from support.appliance import (
    MODELS,
    PATIENCE_S,
    Appliance,
    Client,
    Pki,
    array_input,
    make_pki,
    notify_socket,
    request_for,
    run,
    text_input,
)
from support.connect import Forwarder, PlainClient
from support.handmade import handmade_client
from support.raw_http2 import RawClient
from support.waiting import eventually
from support.wire_server import Channel, Server

Make = Callable[..., Appliance]
MakeForwarder = Callable[..., Forwarder]

NOTHING = service_pb2.ListModelsRequest()
LINE_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
BOTH = {"auth": {"require": "both"}, "principal": [LINE_3]}
TEXT = request_for("ml-topics", [text_input("decision trees vote in a forest")])
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture(scope="module", params=["native"])
def transport(request: pytest.FixtureRequest) -> str:
    """The forwarder is what is tested here; what grpcio does differently has a test of its own."""
    return str(request.param)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Appliance]:
    """A running appliance that wants a certificate and a key, for tests that do not change it."""
    home = tmp_path_factory.mktemp("both")
    appliance = Appliance(home, pki, BOTH, transport="native")
    graphs.write_raw(appliance.models / "echo", graphs.identity_model(("batch", "wide")))
    shutil.copytree(MODELS / "ml-topics", appliance.models / "ml-topics")
    appliance.key = appliance.new_key()
    with appliance:
        yield appliance


@pytest.fixture
def make_forwarder(tmp_path: Path, pki: Pki) -> Iterator[MakeForwarder]:
    """Make forwarders that are not started yet; all are stopped at the end, and wrote no secret."""
    made: list[Forwarder] = []

    def make(port: int, **settings: Any) -> Forwarder:
        forwarder = Forwarder(tmp_path / f"forwarder-{len(made)}", settings.pop("pki", pki), port, **settings)
        made.append(forwarder)
        return forwarder

    yield make
    for forwarder in made:
        forwarder.stop()
        assert "PRIVATE KEY-----" not in forwarder.log
        assert "Traceback" not in forwarder.log


@pytest.fixture
def forwarder(both: Appliance, make_forwarder: MakeForwarder) -> Forwarder:
    """A running one before `both`."""
    return make_forwarder(both.port()).start()


@pytest.fixture
def client(both: Appliance, forwarder: Forwarder) -> Iterator[PlainClient]:
    """The raw stub on the forwarder's port."""
    with PlainClient(forwarder.port, both.key) as made:
        yield made


def code(client: Client, request: Any = NOTHING, rpc: str = "ListModels") -> int:
    """The Clarifai status of a call."""
    return int(client.call(rpc, request).status.code)


def failure(client: Client) -> str:
    """The gRPC message of a call that must end as UNAVAILABLE."""
    with pytest.raises(grpc.RpcError) as error:
        client.call("ListModels", NOTHING)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(error.value.details())


def answered(client: Client) -> bool:
    """Whether a call gets through by now."""
    with contextlib.suppress(grpc.RpcError):
        return code(client) == StatusCode.SUCCESS
    return False


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class TestForwarding:
    def test_a_stub_without_a_certificate_gets_through(
        self, both: Appliance, pki: Pki, forwarder: Forwarder, client: PlainClient
    ) -> None:
        reply = client.predict(TEXT)
        assert reply.outputs[0].data.concepts[0].id == "trees-ensembles"
        with Client(both.port(), pki.ca, both.key) as direct:
            assert code(direct) == StatusCode.CONN_INVALID_REQUEST  # there is no certificate
        with PlainClient(forwarder.port) as nobody:
            assert code(nobody) == StatusCode.CONN_INVALID_REQUEST  # and here is no key
        with PlainClient(forwarder.port, "0" * 32) as stranger:
            assert code(stranger) == StatusCode.CONN_KEY_INVALID
        assert both.key not in forwarder.log

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
    def test_every_loopback_name_works(self, both: Appliance, forwarder: Forwarder, host: str) -> None:
        with PlainClient(f"{host}:{forwarder.port}", both.key) as client:
            assert code(client) == StatusCode.SUCCESS
        assert httpx.get(f"http://{host}:{forwarder.port}/readyz").json() == {"ready": True}

    def test_streams_answer_message_by_message(self, client: PlainClient) -> None:
        assert len(list(client.stub.GenerateModelOutputs(TEXT, metadata=client.metadata))) == 1
        sent = threading.Semaphore(1)

        def requests() -> Iterator[Any]:
            """Each only after the answer to the one before."""
            for _ in range(3):
                assert sent.acquire(timeout=PATIENCE_S)
                yield TEXT

        answers = 0
        for _ in client.stub.StreamModelOutputs(requests(), metadata=client.metadata):
            answers += 1
            sent.release()
        assert answers == 3

    def test_twenty_megabytes_go_both_ways_unchanged(self, client: PlainClient) -> None:
        array = np.random.default_rng(1).random((5, 1 << 20), np.float32)
        request = request_for("echo", [array_input(array)], user="", app="")
        reply = client.predict(request)
        assert reply.status.code == StatusCode.SUCCESS, reply.status
        assert reply.outputs[0].data.ndarray.buffer == array.tobytes()

    def test_a_hundred_calls_at_once(self, client: PlainClient) -> None:
        futures = [client.stub.PostModelOutputs.future(TEXT, metadata=client.metadata) for _ in range(100)]
        assert {future.result(PATIENCE_S).status.code for future in futures} == {StatusCode.SUCCESS}

    def test_many_connections_at_once(self, both: Appliance, forwarder: Forwarder) -> None:
        def one(_: int) -> int:
            with PlainClient(forwarder.port, both.key) as client:
                return code(client)

        with ThreadPoolExecutor(40) as pool:
            assert set(pool.map(one, range(120))) == {StatusCode.SUCCESS}
        forwarder.wait(lambda: forwarder.descriptors() < 40, "the end of all connections")

    def test_http1_keeps_its_connection(self, forwarder: Forwarder) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{forwarder.port}") as client:
            assert [client.get("/readyz").status_code for _ in range(3)] == [200] * 3
            assert client.get("/nothing/here").json()["status"]["code"] == StatusCode.CONN_DOES_NOT_EXIST
            assert client.head("/readyz").status_code == 200

    def test_http2_without_grpc_is_forwarded_or_refused_in_json(
        self, forwarder: Forwarder, make_forwarder: MakeForwarder
    ) -> None:
        assert curl_h2(forwarder.port) == ({"ready": True}, "200 2")
        content, how = curl_h2(make_forwarder(free_port()).start().port)
        assert how == "503 2"
        assert content["status"]["code"] == StatusCode.TRY_AGAIN
        assert "nobody listens at" in content["status"]["details"]

    def test_http1_answers_a_client_that_closed_its_half(self, forwarder: Forwarder) -> None:
        with socket.create_connection(("127.0.0.1", forwarder.port), PATIENCE_S) as sock:
            sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            assert received(sock).endswith(b'{"ready":true}')

    def test_a_unix_socket_is_for_its_user_alone(
        self, both: Appliance, make_forwarder: MakeForwarder, tmp_path: Path
    ) -> None:
        path = tmp_path / "connect.sock"
        left_behind = socket.socket(socket.AF_UNIX)
        left_behind.bind(str(path))
        left_behind.close()
        forwarder = make_forwarder(both.port(), listen=f"unix:{path}").start()
        assert path.stat().st_mode & 0o777 == 0o600
        with PlainClient(f"unix:{path}", both.key) as client:
            assert code(client) == StatusCode.SUCCESS
        forwarder.stop()
        assert not path.exists()

    def test_grpcio_as_the_appliances_transport(
        self, make_appliance: Make, make_forwarder: MakeForwarder, pki: Pki, tmp_path: Path
    ) -> None:
        made = Appliance(tmp_path / "grpcio", pki, BOTH, transport="grpcio")
        key = made.new_key()
        with made:
            port = made.port("server.mtls_listen")
            with PlainClient(make_forwarder(port).start().port, key) as client:
                assert code(client) == StatusCode.SUCCESS
            stranger = make_forwarder(port, pki=make_pki(tmp_path / "stranger", clients=("line-3",)))
            stranger.ca.write_bytes(pki.ca.read_bytes())
            with PlainClient(stranger.start().port, key) as client:
                assert "refused this client certificate" in failure(client)


class TestRefusals:
    """What keeps the forwarder from the appliance is told to its clients, and to the log."""

    @pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
    def test_an_appliance_that_is_not_there(self, make_forwarder: MakeForwarder, host: str) -> None:
        port = free_port()
        forwarder = make_forwarder(0, upstream=f"https://{host}:{port}").start()
        expected = "nobody listens at" if host == "localhost" else f"the name {host} cannot be looked up"
        with PlainClient(forwarder.port, "a-key") as client:
            sentence = failure(client)
            assert sentence.startswith("appliance connect: ")
            assert expected in sentence
            with pytest.raises(grpc.RpcError) as error:
                list(client.stub.StreamModelOutputs(iter([TEXT] * 3), metadata=client.metadata))
            assert expected in str(error.value.details())
            big = request_for("echo", [array_input(np.zeros((1, 1 << 20), np.float32))])
            with pytest.raises(grpc.RpcError) as error:
                client.predict(big)
            assert expected in str(error.value.details())
            futures = [client.stub.PostModelOutputs.future(TEXT) for _ in range(100)]
            assert {future.exception(PATIENCE_S).code() for future in futures} == {grpc.StatusCode.UNAVAILABLE}
        for _ in range(3):
            reply = httpx.post(f"http://localhost:{forwarder.port}/v2/models", content=b"x" * 1_000_000)
            assert reply.status_code == 503
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["status"]["code"] == StatusCode.TRY_AGAIN
            assert expected in reply.json()["status"]["details"]
        head = httpx.head(f"http://localhost:{forwarder.port}/")
        assert (head.status_code, head.content) == (503, b"")
        assert forwarder.log.count("WARNING") == 1  # said once, not for each of them

    def test_another_authority_is_not_believed(
        self, both: Appliance, make_forwarder: MakeForwarder, tmp_path: Path
    ) -> None:
        forwarder = make_forwarder(both.port())
        stranger = make_pki(tmp_path / "stranger")
        forwarder.ca.write_bytes(stranger.ca.read_bytes())
        with PlainClient(forwarder.start().port, both.key) as client:
            assert f"was not issued by the authorities in {forwarder.ca}" in failure(client)
            forwarder.ca.write_bytes(Path(both.tls / "ca.crt").read_bytes())
            eventually(lambda: answered(client), PATIENCE_S)
        forwarder.wait_for("answers again")

    def test_an_appliance_of_another_name_is_not_believed(self, make_forwarder: MakeForwarder, tmp_path: Path) -> None:
        run("certs", "init", "--dir", tmp_path / "tls")
        run("certs", "issue", "server", "--dir", tmp_path / "tls", "--san", "other.example.com")
        run("certs", "issue", "client", "line-3", "--dir", tmp_path / "tls")
        own = Pki(tmp_path / "tls")
        with Server(own) as server:
            forwarder = make_forwarder(server.ports["tls"], pki=own).start()
            with PlainClient(forwarder.port) as client:
                assert "does not name the host localhost" in failure(client)
            reply = httpx.get(f"http://localhost:{forwarder.port}/readyz")
            assert reply.status_code == 502
            assert "does not name the host localhost" in reply.json()["status"]["details"]

    def test_what_does_not_speak_tls(self, make_forwarder: MakeForwarder, pki: Pki) -> None:
        with Server(pki) as server, PlainClient(make_forwarder(server.ports["plain"]).start().port) as client:
            assert "does not speak TLS" in failure(client)

    def test_what_does_not_speak_http2(self, make_forwarder: MakeForwarder, pki: Pki) -> None:
        with Mute(tls_of(pki)) as server, PlainClient(make_forwarder(server.port).start().port) as client:
            assert "does not speak HTTP/2" in failure(client)

    def test_what_never_answers(self, make_forwarder: MakeForwarder) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            forwarder = make_forwarder(listener.getsockname()[1], connect_timeout_s=0.5).start()
            with PlainClient(forwarder.port) as client:
                assert "did not answer within connect_timeout_s, 0.5 s" in failure(client)

    @pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
    def test_a_certificate_of_another_authority(
        self, make_forwarder: MakeForwarder, tmp_path: Path, pki: Pki, version: str
    ) -> None:
        """OpenSSL itself answers here, as most servers do: with an alert."""
        context = tls_of(pki)
        context.load_verify_locations(pki.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        context.maximum_version = ssl.TLSVersion[version]
        context.set_alpn_protocols(["h2"])
        with Mute(context) as server:
            forwarder = make_forwarder(server.port, pki=make_pki(tmp_path / "stranger", clients=("line-3",)))
            forwarder.ca.write_bytes(pki.ca.read_bytes())
            with PlainClient(forwarder.start().port) as client:
                sentence = failure(client)
        assert "the appliance refused this client certificate: its issuer is not among the authorities" in sentence
        assert "tls.client_ca" in sentence

    def test_a_certificate_that_the_appliance_does_not_know(
        self, both: Appliance, make_forwarder: MakeForwarder, tmp_path: Path, pki: Pki
    ) -> None:
        forwarder = make_forwarder(both.port(), pki=make_pki(tmp_path / "stranger", clients=("line-3",)))
        forwarder.ca.write_bytes(pki.ca.read_bytes())
        with PlainClient(forwarder.start().port, both.key) as client:
            assert "refused this client certificate" in failure(client)
        reply = httpx.get(f"http://localhost:{forwarder.port}/readyz")
        assert reply.status_code == 502
        assert "refused this client certificate" in reply.json()["status"]["details"]

    def test_a_certificate_that_has_expired_and_is_renewed(
        self, both: Appliance, make_forwarder: MakeForwarder, pki: Pki
    ) -> None:
        forwarder = make_forwarder(both.port())
        forwarder.install(*handmade_client(pki, "uri:spiffe://test/line-3", ends_days=-1))
        forwarder.start()
        assert "the appliance will refuse the client certificate: 'handmade' expired on" in forwarder.log
        with PlainClient(forwarder.port, both.key) as client:
            sentence = failure(client)
            assert "refused this client certificate" in sentence
            assert "expired on" in sentence
            forwarder.install(*pki.client("line-3"))
            eventually(lambda: answered(client), PATIENCE_S)

    def test_a_revoked_certificate_is_refused_by_the_appliance_itself(
        self, make_appliance: Make, make_forwarder: MakeForwarder, tmp_path: Path
    ) -> None:
        own = make_pki(tmp_path / "own", clients=("line-3",))
        made = make_appliance(**BOTH, tls={"client_ca": own.folder / "ca.crt", "crl": own.folder / "crl.pem"})
        run("certs", "crl", "--dir", own.folder)
        key = made.new_key()
        with made:
            forwarder = make_forwarder(made.port(), pki=own)
            forwarder.ca.write_bytes((made.tls / "ca.crt").read_bytes())
            with PlainClient(forwarder.start().port, key) as client:
                assert code(client) == StatusCode.SUCCESS
                run("certs", "revoke", "line-3", "--dir", own.folder)
                made.wait(lambda: code(client) == StatusCode.CONN_INSUFFICIENT_SCOPES, "the revocation")

    def test_clients_beyond_the_limit_are_told(self, both: Appliance, make_forwarder: MakeForwarder) -> None:
        forwarder = make_forwarder(both.port(), max_connections=2).start()
        with contextlib.ExitStack() as stack:
            inside = [stack.enter_context(PlainClient(forwarder.port, both.key)) for _ in range(2)]
            assert [code(client) for client in inside] == [StatusCode.SUCCESS] * 2
            late = stack.enter_context(PlainClient(forwarder.port, both.key))
            assert "2 connections are forwarded already" in failure(late)
            assert httpx.get(f"http://localhost:{forwarder.port}/readyz").status_code == 503
            inside[0].channel.close()
            eventually(lambda: answered(late), PATIENCE_S)
            assert code(inside[1]) == StatusCode.SUCCESS

    def test_without_the_native_extension_the_log_and_http1_have_the_sentence(
        self, both: Appliance, make_forwarder: MakeForwarder, tmp_path: Path
    ) -> None:
        """A client's host on which it was not built: what can be forwarded is."""
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['appliance.wire._h2'] = None\n")
        paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
        with PlainClient(make_forwarder(both.port()).start(paths).port, both.key) as client:
            assert code(client) == StatusCode.SUCCESS
        forwarder = make_forwarder(free_port()).start(paths)
        assert "the native HTTP/2 extension was not built here" in forwarder.log
        with PlainClient(forwarder.port) as client:
            failure(client)
        forwarder.wait_for("nobody listens at")
        assert "nobody listens at" in httpx.get(f"http://localhost:{forwarder.port}/readyz").text


class TestRestarts:
    def test_an_appliance_that_comes_later(self, make_appliance: Make, make_forwarder: MakeForwarder) -> None:
        port = free_port()
        made = make_appliance(server={"listen": f"127.0.0.1:{port}"}, **BOTH)
        key = made.new_key()
        with PlainClient(make_forwarder(port).start().port, key) as client:
            failure(client)
            with made:
                eventually(lambda: answered(client), PATIENCE_S)

    def test_an_appliance_that_restarts_under_load(self, make_appliance: Make, make_forwarder: MakeForwarder) -> None:
        """Calls meanwhile may be UNAVAILABLE, and are nothing else; all clients recover by themselves."""
        port = free_port()
        made = make_appliance("ml-topics", server={"listen": f"127.0.0.1:{port}"}, **BOTH)
        key = made.new_key()
        with made, load(make_forwarder(port).start().port, key) as seen:
            eventually(lambda: seen.good > 50, PATIENCE_S)
            made.stop()
            eventually(lambda: seen.others["UNAVAILABLE"] > 0, PATIENCE_S)
            made.start()
            seen.reset()
            eventually(lambda: all(count > 20 for count in seen.by_thread), PATIENCE_S)
        assert set(seen.all_others) <= {"UNAVAILABLE"}

    def test_a_certificate_that_is_rotated_under_load(
        self, both: Appliance, make_forwarder: MakeForwarder, pki: Pki
    ) -> None:
        """No call fails; new connections show the new certificate, and bad files are not taken over."""
        forwarder = make_forwarder(both.port()).start()
        with load(forwarder.port, both.key) as seen:
            eventually(lambda: seen.good > 20, PATIENCE_S)
            forwarder.install(*pki.client("laptop"))
            with PlainClient(forwarder.port, both.key) as client:
                assert code(client) == StatusCode.CONN_INSUFFICIENT_SCOPES  # a laptop is no principal
            before = seen.good
            eventually(lambda: seen.good > before + 20, PATIENCE_S)
            forwarder.install(*handmade_client(pki, "uri:spiffe://test/line-3"))
            with PlainClient(forwarder.port, both.key) as client:
                assert code(client) == StatusCode.SUCCESS
            for key, certificate, reason in (
                (b"no key", pki.client("line-3")[1], "is not a private key"),
                (pki.client("laptop")[0], pki.client("line-3")[1], "does not belong to"),
                (*handmade_client(pki, "uri:spiffe://test/line-3", ends_days=-1), "expired on"),
            ):
                forwarder.install(key, certificate)
                forwarder.signal(signal.SIGHUP)
                forwarder.wait_for(reason)
                with PlainClient(forwarder.port, both.key) as client:
                    assert code(client) == StatusCode.SUCCESS
        assert not seen.all_others
        assert forwarder.log.count("certificates reloaded") == 2

    def test_a_forwarder_that_is_killed_and_started_again(self, both: Appliance, make_forwarder: MakeForwarder) -> None:
        port = free_port()
        forwarder = make_forwarder(both.port(), listen=f"localhost:{port}").start()
        with PlainClient(port, both.key) as client:
            assert code(client) == StatusCode.SUCCESS
            forwarder.signal(signal.SIGKILL)
            assert forwarder.process is not None
            forwarder.process.wait(PATIENCE_S)
            failure(client)
            forwarder.start()
            eventually(lambda: answered(client), PATIENCE_S)

    def test_a_stop_lets_calls_end_within_its_time(self, make_appliance: Make, make_forwarder: MakeForwarder) -> None:
        made = make_appliance(**BOTH)
        graphs.write_raw(made.models / "slow", graphs.slow_model(rounds=300, width=512))
        key = made.new_key()
        with made:
            forwarder = make_forwarder(made.port(), stop_s=60.0).start()
            with PlainClient(forwarder.port, key) as client:
                request = request_for("slow", [array_input(np.ones((1, 512), np.float32))], user="", app="")
                going = client.stub.PostModelOutputs.future(request, metadata=client.metadata)
                made.wait(lambda: made.metric("inference_appliance_requests_in_flight") > 0 or going.done())
                forwarder.signal(signal.SIGTERM)
                forwarder.wait_for("stopping")
                assert going.result(PATIENCE_S).status.code == StatusCode.SUCCESS
            assert forwarder.process is not None
            assert forwarder.process.wait(PATIENCE_S) == 0


class TestOddClients:
    @pytest.mark.parametrize("garbage", [b"\x00\x01\x02\x03" * 100, b"\r\n\r\n", b"\xff" * 10])
    def test_garbage_is_refused_and_hurts_nobody(
        self, forwarder: Forwarder, client: PlainClient, garbage: bytes
    ) -> None:
        with socket.create_connection(("127.0.0.1", forwarder.port), PATIENCE_S) as sock:
            sock.sendall(garbage)
            assert received(sock).startswith(b"HTTP/1.1 400 ")
        assert code(client) == StatusCode.SUCCESS

    def test_a_preface_with_garbage_behind_it(self, forwarder: Forwarder, client: PlainClient) -> None:
        with socket.create_connection(("127.0.0.1", forwarder.port), PATIENCE_S) as sock:
            sock.sendall(PREFACE + os.urandom(100_000))
            received(sock)
        assert code(client) == StatusCode.SUCCESS

    def test_a_client_that_speaks_tls_is_named_in_the_log(self, forwarder: Forwarder) -> None:
        context = ssl.create_default_context()
        with (
            socket.create_connection(("127.0.0.1", forwarder.port), PATIENCE_S) as sock,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            context.wrap_socket(sock, server_hostname="localhost")
        forwarder.wait_for("must begin with http://, not https://")

    def test_clients_that_leave_at_once_leave_nothing_behind(self, forwarder: Forwarder, client: PlainClient) -> None:
        assert code(client) == StatusCode.SUCCESS
        before = forwarder.descriptors()
        for first in (b"", b"P", PREFACE, PREFACE[:10]):
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", forwarder.port), PATIENCE_S) as sock:
                    sock.sendall(first)
        forwarder.wait(lambda: forwarder.descriptors() <= before, "the end of their connections")
        assert code(client) == StatusCode.SUCCESS

    def test_an_idle_connection_is_closed_and_comes_back(self, both: Appliance, make_forwarder: MakeForwarder) -> None:
        forwarder = make_forwarder(both.port(), idle_s=0.5).start()
        with PlainClient(forwarder.port, both.key) as client:
            assert code(client) == StatusCode.SUCCESS
            before = forwarder.descriptors()
            forwarder.wait(lambda: forwarder.descriptors() < before, "the end of the idle connection")
            eventually(lambda: answered(client), PATIENCE_S)

    def test_a_slow_reader_holds_little_and_delays_nobody(self, make_forwarder: MakeForwarder, pki: Pki) -> None:
        """200 MB are asked for, and not read: the appliance is held back, and memory stays."""
        with Server(pki) as server:
            forwarder = make_forwarder(server.ports["tls"]).start()
            with grpc.insecure_channel(f"localhost:{forwarder.port}") as channel:
                ask = Channel(channel)
                assert ask.unary("Echo")(b"x", timeout=PATIENCE_S) == b"x"
                before = forwarder.memory()
                with socket.create_connection(("127.0.0.1", forwarder.port), PATIENCE_S) as sock:
                    slow = RawClient(sock)
                    slow.greet()
                    slow.session.increment_flow_control_window(2**30)
                    slow.session.update_settings({4: 2**30})
                    slow.begin(1, "/wire.Test/Count", _framed(b'{"count": 200, "size": 1048576}'), end=True)
                    eventually(lambda: _steady(lambda: server.ask("made"), lambda: ask.unary("Echo")(b"x")), PATIENCE_S)
                    assert ask.unary("Echo")(b"x", timeout=PATIENCE_S) == b"x"
                    assert server.ask("made") < 100
                    assert forwarder.memory() - before < 16 * 2**20
                    total = 0
                    while total < 200 * 2**20:
                        total += len(sock.recv(1 << 20))

    def test_a_slow_appliance_holds_its_client_back(self, make_forwarder: MakeForwarder, pki: Pki) -> None:
        """What the appliance does not read is not taken from the client either."""
        with Mute(tls_of(pki)) as server:
            forwarder = make_forwarder(server.port).start()
            before = forwarder.memory()
            with socket.create_connection(("127.0.0.1", forwarder.port), PATIENCE_S) as sock:
                sock.sendall(b"POST / HTTP/1.1\r\n")
                assert server.heard.wait(PATIENCE_S)
                sock.settimeout(1.0)
                sent = 0
                with contextlib.suppress(TimeoutError):
                    while sent < 200 * 2**20:
                        sent += sock.send(b"x" * 65536)
                assert sent < 100 * 2**20
                assert forwarder.memory() - before < 16 * 2**20


class TestCommand:
    def test_the_check_finds_nothing_wrong(self, both: Appliance, make_forwarder: MakeForwarder) -> None:
        code_, lines = checked(make_forwarder(both.port()))
        assert code_ == 0
        steps = ["certificate", "key", "validity", "ca", "reachable", "tls", "accepted", "ready"]
        assert [(state, step) for state, step, _ in lines] == [("ok", step) for step in steps]

    def test_the_check_says_what_is_wrong(
        self, both: Appliance, make_forwarder: MakeForwarder, pki: Pki, tmp_path: Path
    ) -> None:
        forwarder = make_forwarder(both.port())
        stranger = make_pki(tmp_path / "stranger", clients=("line-3",))
        faults: list[tuple[str, str, Callable[[], object]]] = [
            ("key", "does not belong to", lambda: forwarder.key.write_bytes(pki.client("laptop")[0])),
            ("key", "does not exist", lambda: forwarder.key.unlink()),
            ("certificate", "is not PEM", lambda: forwarder.certificate.write_bytes(b"nothing")),
            ("ca", "does not exist", lambda: forwarder.ca.unlink()),
            ("tls", "was not issued by", lambda: forwarder.ca.write_bytes(stranger.ca.read_bytes())),
            ("accepted", "refused this client certificate", lambda: forwarder.install(*stranger.client("line-3"))),
            (
                "validity",
                "expired on",
                lambda: forwarder.install(*handmade_client(pki, "uri:spiffe://test/line-3", ends_days=-1)),
            ),
            (
                "validity",
                "misses clientAuth",
                lambda: forwarder.install(*handmade_client(pki, "uri:spiffe://test/line-3", usage=None)),
            ),
            (
                "reachable",
                "nobody listens",
                lambda: forwarder.settings.update(upstream=f"https://localhost:{free_port()}"),
            ),
        ]
        for step, reason, break_it in faults:
            forwarder.install(*pki.client("line-3"))
            forwarder.ca.write_bytes(pki.ca.read_bytes())
            break_it()
            code_, lines = checked(forwarder)
            failed = {found: text for state, found, text in lines if state == "fail"}
            assert code_ == 1
            assert reason in failed[step], (step, lines)

    def test_a_forwarder_that_cannot_be_is_refused_in_one_sentence_each(
        self, make_forwarder: MakeForwarder, both: Appliance, tmp_path: Path
    ) -> None:
        forwarder = make_forwarder(both.port(), listen="0.0.0.0:8080", idle_s=-1, unknown=1)
        forwarder.write()
        done = run("connect", "--config", forwarder.file, "--upstream", "http://x", check=False)
        assert done.returncode == 2
        assert all(key in done.stderr for key in ("listen", "idle_s", "unknown", "--upstream", "4 problems"))
        forwarder.settings = {**forwarder.settings, "listen": "localhost:0", "idle_s": 1, "unknown": None}
        forwarder.key.unlink()
        forwarder.write()
        done = run("connect", "--config", forwarder.file, check=False)
        assert done.returncode == 3
        assert f"{forwarder.key} (key) does not exist" in done.stderr

    def test_systemd_hears_how_it_goes(self, both: Appliance, make_forwarder: MakeForwarder, tmp_path: Path) -> None:
        pytest.importorskip("systemd.daemon", reason="the `systemd` extra is not installed")
        forwarder = make_forwarder(both.port())
        with notify_socket(tmp_path) as notified:

            def told(text: str) -> None:
                while text not in notified.recv(4096).decode():
                    pass

            forwarder.start({"NOTIFY_SOCKET": str(tmp_path / "notify")})
            told("READY=1\nSTATUS=http://127.0.0.1:")
            told("WATCHDOG=1")
            with PlainClient(forwarder.port, both.key) as client:
                assert code(client) == StatusCode.SUCCESS
                told("1 connections")
                forwarder.signal(signal.SIGHUP)
                told("RELOADING=1")
                told("READY=1")
                forwarder.ca.write_bytes(make_pki(tmp_path / "stranger").ca.read_bytes())
                httpx.get(f"http://127.0.0.1:{forwarder.port}/readyz")
                told("was not issued by the authorities")
            forwarder.signal(signal.SIGTERM)
            told("STOPPING=1")

    def test_a_port_that_is_taken_is_named(self, both: Appliance, make_forwarder: MakeForwarder) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            forwarder = make_forwarder(both.port(), listen=f"localhost:{taken.getsockname()[1]}")
            forwarder.write()
            done = run("connect", "--config", forwarder.file, check=False)
        assert done.returncode == 4
        assert "cannot be listened on: Address already in use" in done.stderr
        forwarder.start()  # it is free now

    def test_an_encrypted_key_takes_its_passphrase_from_a_file_or_the_environment(
        self, both: Appliance, make_forwarder: MakeForwarder, pki: Pki, tmp_path: Path
    ) -> None:
        forwarder = make_forwarder(both.port())
        plain, certificate = pki.client("line-3")
        key = serialization.load_pem_private_key(plain, None)
        locked = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open sesame"),
        )
        forwarder.install(locked, certificate)
        forwarder.write()
        done = run("connect", "--config", forwarder.file, check=False)
        assert "Set key_passphrase_file, or INFERENCE_APPLIANCE_CONNECT_PASSPHRASE" in done.stderr
        forwarder.start({"INFERENCE_APPLIANCE_CONNECT_PASSPHRASE": "open sesame"})
        with PlainClient(forwarder.port, both.key) as client:
            assert code(client) == StatusCode.SUCCESS
        forwarder.stop()
        (tmp_path / "passphrase").write_text("open sesame\n")
        forwarder.settings["key_passphrase_file"] = tmp_path / "passphrase"
        forwarder.start()
        with PlainClient(forwarder.port, both.key) as client:
            assert code(client) == StatusCode.SUCCESS
        assert "sesame" not in forwarder.log


# ---- helpers ---------------------------------------------------------------------------------------------------------


def checked(forwarder: Forwarder) -> tuple[int, list[tuple[str, str, str]]]:
    """Exit code and lines of --check."""
    forwarder.write()
    done = run("connect", "--config", forwarder.file, "--check", check=False)
    return done.returncode, [tuple(line.split(None, 2)) for line in done.stdout.splitlines()]  # type: ignore[misc]


def curl_h2(port: int) -> tuple[Any, str]:
    """A page over HTTP/2 with prior knowledge: its content, its status and the HTTP that it came by."""
    command = ["curl", "--silent", "--http2-prior-knowledge", "--write-out", "\n%{http_code} %{http_version}"]
    url = f"http://localhost:{port}/readyz"
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    body, how = done.stdout.split("\n")
    return json.loads(body), how


def received(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def tls_of(pki: Pki) -> ssl.SSLContext:
    """A server's context with the certificate for localhost."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.folder / "server.crt", pki.folder / "server.key")
    return context


class Mute:
    """A TLS server that reads one byte of each connection, and does nothing more until the test ends."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._open: list[socket.socket] = []
        self.heard = threading.Event()
        self.port: int = self._listener.getsockname()[1]

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._open.append(sock)
                with contextlib.suppress(OSError):
                    tls = self._context.wrap_socket(sock, server_side=True)
                    self._open.append(tls)
                    if tls.recv(1):
                        self.heard.set()
                    else:
                        tls.close()

    def __enter__(self) -> "Mute":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._thread.join(PATIENCE_S)


def _framed(message: bytes) -> bytes:
    return bytes(1) + len(message).to_bytes(4, "big") + message


def _steady(look: Callable[[], int], work: Callable[[], object]) -> bool:
    """Whether a number does not grow any more while the server does other work."""
    first = look()
    for _ in range(100):
        work()
    return first > 0 and look() == first


class Seen:
    """What callers of `load` lived through."""

    def __init__(self, threads: int) -> None:
        self.by_thread = [0] * threads
        self.others: Counter[str] = Counter()
        self.all_others: Counter[str] = Counter()

    @property
    def good(self) -> int:
        """Calls that succeeded."""
        return sum(self.by_thread)

    def reset(self) -> None:
        """Count anew."""
        self.by_thread = [0] * len(self.by_thread)
        self.others.clear()


@contextlib.contextmanager
def load(port: int, key: str, threads: int = 4) -> Iterator[Seen]:
    """Callers in threads, each on a connection of its own."""
    seen, stop = Seen(threads), threading.Event()

    def call(number: int) -> None:
        with PlainClient(port, key) as client:
            while not stop.is_set():
                try:
                    status = client.call("ListModels", NOTHING).status.code
                except grpc.RpcError as error:
                    name = error.code().name
                    stop.wait(0.01)
                else:
                    name = "" if status == StatusCode.SUCCESS else StatusCode.Name(status)
                if name:
                    seen.others[name] += 1
                    seen.all_others[name] += 1
                else:
                    seen.by_thread[number] += 1

    workers = [threading.Thread(target=call, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield seen
    finally:
        stop.set()
        for worker in workers:
            worker.join(PATIENCE_S)
