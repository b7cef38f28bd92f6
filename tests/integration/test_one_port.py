"""The main port of a real daemon: gRPC, gRPC-Web and HTTP, with and without a client certificate, behind a proxy."""

import base64
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import pytest
from clarifai_grpc.grpc.api import service_pb2, service_pb2_grpc
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from google.rpc import status_pb2
from support.appliance import ROOT, Appliance, Client, Pki, make_pki, request_for, text_input
from support.raw_http2 import connected, framed

NOTHING = service_pb2.ListModelsRequest()
LINE_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
TOPIC = request_for("ml-topics", [text_input("ridge regression")])
Make = Callable[..., Appliance]


@pytest.fixture
def transport() -> str:
    """Only the native wire speaks everything on one port."""
    return "native"


@pytest.fixture
def appliance(make_appliance: Make) -> Iterator[Appliance]:
    """A running appliance that takes a key or a certificate, on one port."""
    made = make_appliance(
        "ml-topics",
        server={"mtls_listen": None, "cors_origins": ["https://lab.example.com"]},
        auth={"require": "either"},
        principal=[LINE_3],
    )
    made.key = made.new_key()
    with made:
        yield made


def code(client: Client) -> int:
    """The Clarifai status of a call."""
    return int(client.call("ListModels", NOTHING).status.code)


def curl(appliance: Appliance, pki: Pki, *arguments: str) -> str:
    """What curl prints for a page of the main port."""
    command = ["curl", "--silent", "--show-error", "--cacert", str(pki.ca), *arguments]
    url = f"https://localhost:{appliance.port()}/readyz"
    return subprocess.run([*command, url], check=True, capture_output=True, text=True, timeout=60).stdout


class TestEverythingOnIt:
    @pytest.mark.parametrize(("version", "spoken"), [("--http2", "2"), ("--http1.1", "1.1")])
    def test_balancers_ask_for_readyz_in_either_http(
        self, appliance: Appliance, pki: Pki, version: str, spoken: str
    ) -> None:
        answer = curl(appliance, pki, version, "--write-out", " %{http_code} %{http_version}")
        assert answer == '{"ready":true} 200 ' + spoken

    @pytest.mark.parametrize("text", [False, True])
    def test_browsers_predict_over_grpc_web(self, appliance: Appliance, pki: Pki, text: bool) -> None:
        body = TOPIC.SerializeToString()
        framed = b"\0" + struct.pack(">I", len(body)) + body
        kind = "application/grpc-web-text+proto" if text else "application/grpc-web+proto"
        with httpx.Client(verify=ssl.create_default_context(cafile=str(pki.ca))) as browser:
            answer = browser.post(
                f"https://localhost:{appliance.port()}/clarifai.api.V2/PostModelOutputs",
                content=base64.b64encode(framed) if text else framed,
                headers={
                    "content-type": kind,
                    "authorization": f"Key {appliance.key}",
                    "origin": "https://lab.example.com",
                },
            )
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://lab.example.com"
        frames = _decoded(answer.content) if text else answer.content
        size = int.from_bytes(frames[1:5], "big")
        reply = service_pb2.MultiOutputResponse.FromString(frames[5 : 5 + size])
        assert reply.status.code == StatusCode.SUCCESS
        assert b"grpc-status: 0" in frames[5 + size :] or b"grpc-status:0" in frames[5 + size :]

    def test_other_pages_are_refused_in_the_shape_of_the_api(self, appliance: Appliance, pki: Pki) -> None:
        with httpx.Client(verify=ssl.create_default_context(cafile=str(pki.ca))) as browser:
            answer = browser.get(f"https://localhost:{appliance.port()}/v2/nothing")
        assert answer.status_code == 404
        assert answer.json()["status"]["code"] > 0

    def test_a_refusal_that_is_a_grpc_status_carries_the_details(self, make_appliance: Make, pki: Pki) -> None:
        """`grpc-status-details-bin` is a google.rpc.Status with Clarifai's own inside."""
        made = make_appliance("ml-topics", limits={"request_timeout_s": 0.000001})
        made.key = made.new_key()
        with made, Client(made.port(), pki.ca, made.key) as client, pytest.raises(grpc.RpcError) as caught:
            client.predict(TOPIC)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
        assert status_pb2.Status.FromString(details).message == caught.value.details()


class TestCertificates:
    def test_a_key_or_a_certificate_opens_the_same_port(self, appliance: Appliance, pki: Pki) -> None:
        with Client(appliance.port(), pki.ca, appliance.key) as keyed:
            assert code(keyed) == StatusCode.SUCCESS
        with Client(appliance.port(), pki.ca, certificate=pki.client("line-3")) as certified:
            assert code(certified) == StatusCode.SUCCESS
        with Client(appliance.port(), pki.ca, certificate=pki.client("laptop")) as unknown:
            assert code(unknown) == StatusCode.CONN_INSUFFICIENT_SCOPES
        with Client(appliance.port(), pki.ca) as nobody:
            assert code(nobody) == StatusCode.CONN_INVALID_REQUEST

    def test_a_revoked_certificate_is_refused_on_a_live_connection(self, make_appliance: Make, tmp_path: Path) -> None:
        own = make_pki(tmp_path / "own", clients=("line-3", "line-4"))
        line_4 = {"name": "line-4", "identities": ["uri:spiffe://test/line-4"]}
        made = make_appliance("ml-topics", auth={"require": "certificate"}, principal=[LINE_3, line_4])
        for name in ("server.crt", "server.key", "ca.crt"):
            shutil.copyfile(own.folder / name, made.tls / name)
        made.command("certs", "crl", "--dir", own.folder)
        made.write_config(tls={"crl": own.folder / "crl.pem"})
        with (
            made,
            Client(made.port(), own.ca, certificate=own.client("line-3")) as revoked,
            Client(made.port(), own.ca, certificate=own.client("line-4")) as other,
        ):
            assert code(revoked) == code(other) == StatusCode.SUCCESS
            made.command("certs", "revoke", "line-3", "--dir", own.folder)
            made.wait(lambda: code(revoked) == StatusCode.CONN_INSUFFICIENT_SCOPES, "the revocation")
            assert code(other) == StatusCode.SUCCESS

    def test_the_name_a_client_asks_for_chooses_the_certificate(
        self, make_appliance: Make, pki: Pki, tmp_path: Path
    ) -> None:
        second = tmp_path / "second"
        shutil.copytree(pki.folder, second)
        made = make_appliance("ml-topics")
        made.command("certs", "issue", "server", "--dir", second, "--san", "lab.example.com", "--force")
        made.write_config(tls={"sni_certificates": [str(second / "server.crt")]})
        context = ssl.create_default_context(cafile=str(pki.ca))
        with made:
            for name in ("localhost", "lab.example.com"):
                with (
                    socket.create_connection(("127.0.0.1", made.port())) as plain,
                    context.wrap_socket(plain, server_hostname=name) as secure,
                ):
                    assert secure.version() == "TLSv1.3"


class TestOtherWaysIn:
    def test_programs_on_this_machine_call_without_tls(self, make_appliance: Make, tmp_path: Path) -> None:
        """On a loopback port and on a unix socket; a key is asked for all the same."""
        made = make_appliance("ml-topics", server={"plain_listen": "127.0.0.1:0"})
        made.key = made.new_key()
        with made:
            self._predicts(f"127.0.0.1:{made.port('server.plain_listen')}", made.key)
        made.write_config(server={"plain_listen": f"unix:{tmp_path}/api.sock"})
        with made:
            self._predicts(f"unix:{tmp_path}/api.sock", made.key)
            with grpc.insecure_channel(f"unix:{tmp_path}/api.sock") as channel:
                reply = service_pb2_grpc.V2Stub(channel).ListModels(NOTHING, timeout=60)
            assert reply.status.code == StatusCode.CONN_INVALID_REQUEST

    @staticmethod
    def _predicts(target: str, key: str) -> None:
        Client(1, ROOT / "README.md").channel.close()  # the stub works only once a stock channel was made
        with grpc.insecure_channel(target) as channel:
            stub = service_pb2_grpc.V2Stub(channel)
            reply = stub.PostModelOutputs(TOPIC, metadata=(("authorization", f"Key {key}"),), timeout=60)
        assert reply.status.code == StatusCode.SUCCESS

    def test_behind_a_trusted_proxy_the_log_shows_the_real_client(self, make_appliance: Make, pki: Pki) -> None:
        made = make_appliance("ml-topics", server={"trusted_proxies": ["127.0.0.1"]})
        context = ssl.create_default_context(cafile=str(pki.ca))
        context.set_alpn_protocols(["http/1.1"])
        header = (
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes([203, 0, 113, 7, 127, 0, 0, 1]) + struct.pack(">HH", 55, 1)
        )
        body = NOTHING.SerializeToString()
        framed = b"\0" + struct.pack(">I", len(body)) + body
        request = (
            b"POST /clarifai.api.V2/ListModels HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/grpc-web\r\n"
            b"authorization: Key wrong\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(framed), framed)
        )
        with made, socket.create_connection(("127.0.0.1", made.port())) as plain:
            plain.sendall(header)
            with context.wrap_socket(plain, server_hostname="localhost") as secure:
                secure.sendall(request)
                assert secure.recv(100).startswith(b"HTTP/1.1 200")
            made.wait(lambda: "203.0.113.7" in made.log, "a line about the real client")

    def test_load_reports_are_in_the_trailers_where_they_are_asked_for(self, make_appliance: Make, pki: Pki) -> None:
        """Of every call, however many fronts there are; without the setting nobody is told."""
        for asked in (True, False):
            made = make_appliance("ml-topics", server={"load_reports": asked})
            made.key = made.new_key()
            with made:

                def report(made: Appliance = made) -> bytes:
                    # gRPC's own clients take that trailer for themselves.
                    server = SimpleNamespace(ports={"tls": made.port()}, pki=pki)
                    path = "/clarifai.api.V2/PostModelOutputs"
                    headers = {"authorization": f"Key {made.key}"}
                    with connected(server) as peer:
                        peer.greet()
                        peer.ask(1, path, framed(TOPIC.SerializeToString()), headers)
                        reply = peer.reply(1)
                    assert reply["grpc-status"] == "0"
                    return base64.b64decode(reply.get("endpoint-load-metrics-bin", ""))

                if asked:
                    made.wait(lambda: len(report()) == 36, "four doubles")
                else:
                    assert report() == b""

    def test_where_the_extension_is_missing_grpcio_serves_and_says_so(
        self, make_appliance: Make, pki: Pki, tmp_path: Path
    ) -> None:
        (tmp_path / "sitecustomize.py").write_text('import sys\nsys.modules["appliance.wire._h2"] = None\n')
        made = make_appliance("ml-topics")
        made.key = made.new_key()
        made.spawn({"PYTHONPATH": str(tmp_path)})
        made.wait(lambda: made.admin("/readyz").get("ready") is True)
        assert made.admin("/status")["transport"] == "grpcio"
        assert "the native wire cannot be used, grpcio serves instead" in made.log
        with Client(made.port(), pki.ca, made.key) as client:
            assert client.predict(TOPIC).status.code == StatusCode.SUCCESS


def _decoded(content: bytes) -> bytes:
    """Pieces of base64, each padded by itself: whole groups of four."""
    return b"".join(base64.b64decode(content[start : start + 4]) for start in range(0, len(content), 4))


class TestDrain:
    # CPython's ssl leaves a socket to the garbage collector that was cut off before its handshake began.
    @pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
    def test_keep_alive_clients_of_http1_lose_nothing(self, make_appliance: Make, pki: Pki) -> None:
        """Each answer is complete; the last one on a connection says so, and none is cut off by the stop."""
        made = make_appliance("ml-topics", shutdown={"lame_duck_s": 3, "drain_s": 30})
        made.start()
        url = f"https://localhost:{made.port()}/livez"
        context = ssl.create_default_context(cafile=str(pki.ca))
        ends: Counter[str] = Counter()
        stop = threading.Event()

        def ask() -> None:
            with httpx.Client(verify=context) as client:
                while not stop.is_set():
                    try:
                        ends[str(client.get(url, timeout=60).status_code)] += 1
                    except httpx.ConnectError:
                        ends["nobody listens any more"] += 1
                        return
                    except httpx.HTTPError as error:
                        ends[type(error).__name__] += 1
                    stop.wait(0.002)

        callers = [threading.Thread(target=ask) for _ in range(8)]
        for caller in callers:
            caller.start()
        made.wait(lambda: ends["200"] > 100)
        made.signal(signal.SIGTERM)
        assert made.process is not None
        assert made.process.wait(120) == 0
        stop.set()
        for caller in callers:
            caller.join(120)
        assert set(ends) <= {"200", "nobody listens any more"}, ends

    def test_an_upload_on_its_way_is_waited_for(self, make_appliance: Make, pki: Pki) -> None:
        made = make_appliance("ml-topics", shutdown={"lame_duck_s": 0, "drain_s": 60})
        made.key = made.new_key()
        made.start()
        body = request_for("ml-topics", [text_input("ridge regression " * 20_000)]).SerializeToString()
        framed = b"\0" + struct.pack(">I", len(body)) + body
        context = ssl.create_default_context(cafile=str(pki.ca))
        half = threading.Event()

        def slowly() -> Iterator[bytes]:
            yield framed[: len(framed) // 2]
            half.set()
            made.wait(lambda: "draining" in made.log, "the drain")
            yield framed[len(framed) // 2 :]

        def stop_it() -> None:
            half.wait(60)
            made.signal(signal.SIGTERM)

        stopper = threading.Thread(target=stop_it)
        stopper.start()
        with httpx.Client(verify=context, timeout=120) as client:
            answer = client.post(
                f"https://localhost:{made.port()}/clarifai.api.V2/PostModelOutputs",
                content=slowly(),
                headers={"content-type": "application/grpc-web", "authorization": f"Key {made.key}"},
            )
        stopper.join(60)
        assert b"grpc-status: 0" in answer.content or b"grpc-status:0" in answer.content


class TestShares:
    @pytest.mark.parametrize("who", ["a principal", "strangers"])
    def test_what_is_announced_and_never_sent_shuts_nobody_out(self, make_appliance: Make, pki: Pki, who: str) -> None:
        """One connection takes all the memory that it can get and sends nothing; others are served as ever."""
        appliance = make_appliance(
            "ml-topics", limits={"memory_in_flight": "8MiB"}, principal=[{"name": "greedy"}, {"name": "honest"}]
        )
        greedy, honest = (appliance.new_key("--principal", name) for name in ("greedy", "honest"))
        if who == "strangers":
            path, headers, sizes = "/grpc.health.v1.Health/Check", {}, [4096] * 250
        else:
            path, headers = "/clarifai.api.V2/PostModelOutputs", {"authorization": f"Key {greedy}"}
            sizes = [2**20] * 20 + [4096] * 230
        with appliance:
            ports = {"tls": appliance.port()}
            with connected(SimpleNamespace(ports=ports, pki=pki)) as attacker:
                attacker.greet()
                for number, size in enumerate(sizes):
                    attacker.begin(2 * number + 1, path, framed(b"x", length=size), headers)
                share = 2**23 // 16 if who == "strangers" else 2**23 // 4 * 3
                held = "inference_appliance_memory_in_flight_bytes"
                appliance.wait(lambda: appliance.metric(held) > share - 4096, "what is held")
                with Client(appliance.port(), pki.ca, honest) as client:
                    ends = Counter(client.predict(TOPIC).status.code for _ in range(50))
                assert appliance.metric(held) <= share
        assert ends == {StatusCode.SUCCESS: 50}
