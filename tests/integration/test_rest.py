"""The REST twin on a real daemon's main port, over TLS, in HTTP/1.1 and HTTP/2: as browsers, curl and the SDK ask."""

import base64
import json
import shutil
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from clarifai_grpc.grpc.api import service_pb2
from google.protobuf import json_format
from support import pictures
from support.appliance import MODELS, PATIENCE_S, Appliance, Client, Pki, request_for, text_input

ORIGIN = "https://lab.example.com"
U = "/v2/users/appliance/apps/main"
OUTPUTS = f"{U}/models/ml-topics/outputs"
BODY = {"inputs": [{"id": "a", "data": {"text": {"raw": "ridge regression"}}}]}
MIB = 2**20
Make = Callable[..., Appliance]
Asks = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def transport() -> str:
    """REST is the native wire's alone."""
    return "native"


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Appliance]:
    """A running appliance, whose pages one origin may call."""
    config = {
        "server": {"cors_origins": [ORIGIN]},
        "limits": {"memory_in_flight": "1GiB", "request_timeout_s": 30},
    }
    made = Appliance(tmp_path_factory.mktemp("rest"), pki, config, transport="native")
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, made.models / bundle)
    made.key = made.new_key()
    with made:
        yield made


@pytest.fixture(params=["1.1", "2"])
def http(request: pytest.FixtureRequest, appliance: Appliance, pki: Pki) -> Iterator[httpx.Client]:
    """A client that speaks one HTTP, with the key."""
    context = ssl.create_default_context(cafile=str(pki.ca))
    two = request.param == "2"
    base, headers = f"https://localhost:{appliance.port()}", {"authorization": f"Key {appliance.key}"}
    with httpx.Client(
        http1=not two, http2=two, verify=context, base_url=base, headers=headers, timeout=PATIENCE_S
    ) as made:
        yield made


def stranger(http: httpx.Client) -> httpx.Client:
    """The same without a key."""
    del http.headers["authorization"]
    return http


def status_of(answer: httpx.Response) -> tuple[int, int]:
    return answer.status_code, answer.json()["status"]["code"]


def scrubbed(message: Any) -> Any:
    """Without what differs from one call to the next."""
    for output in message.outputs:
        output.ClearField("id")
        output.ClearField("created_at")
        output.status.ClearField("req_id")
    message.status.ClearField("req_id")
    return message


class TestPredict:
    def test_the_answer_is_that_of_grpc(self, http: httpx.Client, appliance: Appliance, pki: Pki) -> None:
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            wanted = scrubbed(client.predict(request_for("ml-topics", [text_input("ridge regression", "a")])))
        answer = http.post(OUTPUTS, json=BODY)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        found = json_format.ParseDict(answer.json(), service_pb2.MultiOutputResponse())
        assert scrubbed(found) == wanted

    def test_numbers_are_plain_and_names_snake_case(self, http: httpx.Client) -> None:
        text = http.post(OUTPUTS, json=BODY).text
        (output,) = json.loads(text)["outputs"]
        assert output["status"]["code"] == 10000
        assert output["created_at"].endswith("Z")
        assert output["model"]["model_version"]["id"]
        assert all(isinstance(concept["value"], float) for concept in output["data"]["concepts"])
        assert max(len(str(concept["value"])) for concept in output["data"]["concepts"]) < 14

    def test_a_large_batch_is_answered(self, http: httpx.Client) -> None:
        body = {"inputs": BODY["inputs"] * 128}
        answer = http.post(OUTPUTS, json=body)
        assert status_of(answer) == (200, 10000)
        assert len(answer.json()["outputs"]) == 128

    def test_errors_have_their_http_status(self, http: httpx.Client) -> None:
        assert status_of(http.get("/v2/models/nobody")) == (404, 21200)
        assert status_of(http.post(OUTPUTS, json={"inputs": BODY["inputs"] * 129})) == (400, 30105)
        assert status_of(http.post(OUTPUTS, json={"inputs": [BODY["inputs"][0], {}]})) == (207, 10010)
        assert status_of(http.post(OUTPUTS, content=b"{")) == (400, 11100)
        answer = stranger(http).post(OUTPUTS, json=BODY)
        assert status_of(answer) == (401, 11102)
        assert answer.headers["www-authenticate"]

    def test_a_prediction_is_counted_once(self, http: httpx.Client, appliance: Appliance) -> None:
        labels = 'method="PostModelOutputs",model="ml-topics",version="1"'
        name = f"inference_appliance_request_seconds_count{{{labels}}}"
        before = appliance.metric(name)
        http.post(OUTPUTS, json=BODY)
        assert appliance.metric(name) == before + 1


class TestWays:
    def test_the_curl_sample_of_the_documentation(self, appliance: Appliance, pki: Pki) -> None:
        for version, spoken in (("--http1.1", "1.1"), ("--http2", "2")):
            command = ["curl", "--silent", "--show-error", "--cacert", str(pki.ca), version, "-X", "POST"]
            command += [f"https://localhost:{appliance.port()}{OUTPUTS}", "-H", f"Authorization: Key {appliance.key}"]
            command += ["-H", "Content-Type: application/json", "-d", json.dumps(BODY)]
            command += ["--write-out", "\n%{http_code} %{http_version}"]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout
            content, _, how = printed.rpartition("\n")
            assert how == f"200 {spoken}"
            assert json.loads(content)["status"]["code"] == 10000

    def test_the_sdks_probe_of_a_bare_host(self, appliance: Appliance, pki: Pki) -> None:
        """`clarifai.client.auth.helper` opens it with urllib and looks no further than the status."""
        context = ssl.create_default_context(cafile=str(pki.ca))
        url = f"https://localhost:{appliance.port()}/v2/auth/methods"
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            assert answer.status == 200

    def test_the_sdks_list_of_organizations_is_empty(self, http: httpx.Client) -> None:
        assert http.get("/v2/users/me/organizations").json()["organizations"] == []

    def test_percent_encoded_slashes_stay_in_the_id(self, http: httpx.Client) -> None:
        answer = http.get("/v2/models/a%2Fb")
        assert status_of(answer) == (404, 21200)
        assert "a/b" in answer.json()["status"]["details"]

    def test_heads_and_other_verbs(self, http: httpx.Client) -> None:
        answer = http.head("/v2/models")
        assert (answer.status_code, answer.content) == (200, b"")
        answer = http.request("OPTIONS", OUTPUTS)
        assert status_of(answer) == (405, 11103)
        assert answer.headers["allow"] == "POST"
        assert status_of(http.get(f"{U}/models/")) == (404, 11101)

    def test_the_openapi_document_is_there_for_everybody(self, http: httpx.Client) -> None:
        document = stranger(http).get("/v2/openapi.json").json()
        assert "/v2/models/{model_id}/outputs" in document["paths"]

    def test_a_certificate_opens_it_as_it_opens_grpc(self, make_appliance: Make, pki: Pki) -> None:
        line_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"]}
        made = make_appliance("ml-topics", auth={"require": "certificate"}, principal=[line_3])
        seen = {}
        with made:
            for name in ("line-3", "laptop", ""):
                context = ssl.create_default_context(cafile=str(pki.ca))
                if name:
                    folder = pki.folder / "clients"
                    context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
                answer = httpx.get(f"https://localhost:{made.port()}/v2/models", verify=context, timeout=PATIENCE_S)
                seen[name] = status_of(answer)
        assert seen == {"line-3": (200, 10000), "laptop": (403, 11007), "": (401, 11102)}


ASKS = {"origin": ORIGIN, "access-control-request-method": "POST"}


class TestBrowsers:
    """The documentation's sample: fetch, POST, the short path, an Authorization header, no content type."""

    @pytest.mark.parametrize("asked", ["authorization", "authorization,content-type,x-clarifai-request-id-prefix"])
    def test_a_preflight_needs_no_credentials(self, http: httpx.Client, asked: str) -> None:
        headers = {**ASKS, "access-control-request-headers": asked}
        answer = stranger(http).options("/v2/models/ml-topics/outputs", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = answer.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
        assert set(asked.split(",")) <= set(allowed)
        assert "access-control-allow-credentials" not in answer.headers

    def test_another_origin_may_not_call(self, http: httpx.Client) -> None:
        other = {**ASKS, "origin": "https://evil.example.com"}
        answer = stranger(http).options("/v2/models/ml-topics/outputs", headers=other)
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers
        answer = http.get("/v2/models", headers={"origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in answer.headers

    def test_the_sample_works(self, http: httpx.Client) -> None:
        body = {"user_app_id": {"user_id": "appliance", "app_id": "main"}, **BODY}
        headers = {"origin": ORIGIN, "content-type": "text/plain;charset=UTF-8"}
        answer = http.post("/v2/models/ml-topics/outputs", content=json.dumps(body), headers=headers)
        assert status_of(answer) == (200, 10000)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "retry-after" in answer.headers["access-control-expose-headers"]

    @pytest.mark.parametrize(
        ("verb", "path", "status"),
        [("GET", "/v2/models/nobody", 404), ("GET", "/nothing", 404), ("PUT", OUTPUTS, 405), ("POST", OUTPUTS, 400)],
    )
    def test_pages_can_read_errors_too(self, http: httpx.Client, verb: str, path: str, status: int) -> None:
        answer = http.request(verb, path, headers={"origin": ORIGIN})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN

    def test_a_page_without_a_key_reads_why(self, http: httpx.Client) -> None:
        answer = stranger(http).post(OUTPUTS, json=BODY, headers={"origin": ORIGIN})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, ORIGIN)


class TestBodies:
    def test_a_large_request_of_a_known_caller_is_served(self, http: httpx.Client, appliance: Appliance) -> None:
        """100 MB of JSON; when it is over, nothing is held."""
        body = json.dumps({**BODY, "padding": "x" * (100 * 10**6)}).encode()
        # In pieces: httpx copies all that is left of one for each of HTTP/2's windows.
        pieces = (body[start : start + MIB] for start in range(0, len(body), MIB))
        answer = http.post(OUTPUTS, content=pieces, headers={"content-length": str(len(body))})
        assert status_of(answer) == (200, 10000)
        appliance.wait(lambda: appliance.metric("inference_appliance_memory_in_flight_bytes") == 0, "the memory")

    def test_in_chunks_too(self, http: httpx.Client) -> None:
        def pieces() -> Iterator[bytes]:
            yield b'{"padding": "'
            for _ in range(20):
                yield b"x" * MIB
            yield b'", ' + json.dumps(BODY)[1:].encode()

        assert status_of(http.post(OUTPUTS, content=pieces())) == (200, 10000)

    def test_an_image_in_base64_of_either_alphabet(self, http: httpx.Client) -> None:
        picture = pictures.png(pictures.rgb_pixels(16, 16))
        for text in (base64.b64encode(picture).decode(), base64.urlsafe_b64encode(picture).decode().rstrip("=")):
            answer = http.post(f"{U}/models/digits/outputs", json={"inputs": [{"data": {"image": {"base64": text}}}]})
            assert status_of(answer) == (200, 10000)

    @pytest.mark.parametrize("version", ["--http1.1", "--http2"])
    def test_a_strangers_is_not_let_in(self, appliance: Appliance, pki: Pki, tmp_path: Path, version: str) -> None:
        """Only what was on its way before we could answer was read: curl tells how much it got rid of."""
        (tmp_path / "body").write_bytes(b" " * 30 * MIB)
        command = ["curl", "--silent", "--cacert", str(pki.ca), version, "-X", "POST", "-H", "Expect:"]
        command += [f"https://localhost:{appliance.port()}{OUTPUTS}", "--data-binary", f"@{tmp_path}/body"]
        command += ["--output", str(tmp_path / "answer"), "--write-out", "%{http_code} %{size_upload}"]
        run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
        http_status, uploaded = run.stdout.split()
        assert http_status == "401"
        assert int(uploaded) < 20 * MIB
        assert json.loads((tmp_path / "answer").read_bytes())["status"]["code"] == 11102

    def test_compressed_ones_are_refused(self, http: httpx.Client) -> None:
        answer = http.post(OUTPUTS, content=b"\x1f\x8b\x08", headers={"content-encoding": "gzip"})
        assert status_of(answer) == (415, 11100)


class Raw:
    """HTTP/1.1 by hand."""

    def __init__(self, appliance: Appliance, pki: Pki) -> None:
        context = ssl.create_default_context(cafile=str(pki.ca))
        context.set_alpn_protocols(["http/1.1"])
        plain = socket.create_connection(("127.0.0.1", appliance.port()), timeout=PATIENCE_S)
        self.sock = context.wrap_socket(plain, server_hostname="localhost")
        self.key = appliance.key
        self._heard = b""

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def begin(self, *headers: str, key: bool = True, path: str = OUTPUTS) -> None:
        """A head."""
        lines = [f"POST {path} HTTP/1.1", "host: localhost", *headers]
        lines += [f"authorization: Key {self.key}"] if key else []
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())

    def until(self, end: bytes) -> bytes:
        """What is heard up to these bytes, or to the end of the connection."""
        while end not in self._heard and (more := self.sock.recv(65536)):
            self._heard += more
        place = self._heard.find(end) + len(end) if end in self._heard else len(self._heard)
        found, self._heard = self._heard[:place], self._heard[place:]
        return found

    def chunk(self, data: bytes) -> None:
        """A chunk of the body."""
        self.sock.sendall(b"%x\r\n%b\r\n" % (len(data), data))


class TestByHand:
    def test_who_is_not_known_is_refused_before_the_body_is_let_in(self, appliance: Appliance, pki: Pki) -> None:
        with Raw(appliance, pki) as raw:
            raw.begin(f"content-length: {100 * MIB}", "expect: 100-continue", key=False)
            assert raw.until(b"\r\n").startswith(b"HTTP/1.1 401")
        with Raw(appliance, pki) as raw:
            raw.begin(f"content-length: {100 * MIB}", key=False)
            assert raw.until(b"\r\n").startswith(b"HTTP/1.1 401")

    def test_a_known_caller_is_asked_for_the_body(self, appliance: Appliance, pki: Pki) -> None:
        body = json.dumps(BODY).encode()
        with Raw(appliance, pki) as raw:
            raw.begin(f"content-length: {len(body)}", "expect: 100-continue")
            assert raw.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100")
            raw.sock.sendall(body)
            assert raw.until(b"\r\n").startswith(b"HTTP/1.1 200")

    def test_what_is_announced_over_the_limit_is_not_awaited(self, appliance: Appliance, pki: Pki) -> None:
        with Raw(appliance, pki) as raw:
            raw.begin(f"content-length: {200 * MIB}")
            assert raw.until(b"\r\n").startswith(b"HTTP/1.1 413")
            assert b"limits.request_size" in raw.until(b"}}")

    def test_a_body_that_ends_early_is_no_request(self, appliance: Appliance, pki: Pki) -> None:
        """And leaves nothing behind."""
        with Raw(appliance, pki) as raw:
            raw.begin("content-length: 1000")
            raw.sock.sendall(b"{")
            appliance.wait(lambda: appliance.metric("inference_appliance_memory_in_flight_bytes") > 0, "the body")
        appliance.wait(lambda: appliance.metric("inference_appliance_memory_in_flight_bytes") == 0, "the memory")

    def test_a_body_that_takes_too_long_is_408(self, make_appliance: Make, pki: Pki) -> None:
        slow = make_appliance("ml-topics", limits={"request_timeout_s": 1})
        slow.key = slow.new_key()
        with slow, Raw(slow, pki) as raw:
            raw.begin("content-length: 1000")
            raw.sock.sendall(b"{")
            assert raw.until(b"\r\n").startswith(b"HTTP/1.1 408")
            assert b'"code":98009' in raw.until(b"}}")

    def test_a_stream_answers_line_by_line(self, appliance: Appliance, pki: Pki) -> None:
        """Each reply is here before the next request is sent."""
        message = {"user_app_id": {"user_id": "appliance", "app_id": "main"}, "model_id": "ml-topics", **BODY}
        with Raw(appliance, pki) as raw:
            raw.begin("transfer-encoding: chunked", path="/v2/models/outputs/stream")
            for number in range(3):
                raw.chunk(json.dumps(message).encode() + b"\n")
                if not number:
                    assert raw.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
                assert b'{"result":{"status":{"code":10000' in raw.until(b"}\n\r\n")
            raw.chunk(json.dumps({**message, "model_id": "nobody"}).encode() + b"\n")
            assert b'{"result":{"status":{"code":21200' in raw.until(b"}\n\r\n")
            raw.chunk(b"")
            assert raw.until(b"0\r\n\r\n").endswith(b"0\r\n\r\n")

    def test_a_client_that_leaves_ends_its_stream(self, appliance: Appliance, pki: Pki) -> None:
        held = "inference_appliance_memory_in_flight_bytes"
        with Raw(appliance, pki) as raw:
            raw.begin("transfer-encoding: chunked", path="/v2/models/outputs/stream")
            raw.chunk(b'{"model_id": "half')
            appliance.wait(lambda: appliance.metric(held) > 0, "the message")
        appliance.wait(lambda: appliance.metric(held) == 0, "the memory")


class TestStreams:
    def test_generate_answers_lines(self, http: httpx.Client) -> None:
        answer = http.post(f"{OUTPUTS}/generate", json=BODY)
        assert answer.headers["content-type"] == "application/x-ndjson"
        (line,) = answer.text.splitlines()
        assert json.loads(line)["result"]["outputs"][0]["data"]["concepts"]

    def test_an_error_is_the_whole_answer(self, http: httpx.Client) -> None:
        answer = http.post(f"{U}/models/nobody/outputs/generate", json=BODY)
        assert status_of(answer) == (404, 21200)

    @pytest.mark.parametrize("version", ["--http1.1", "--http2"])
    def test_curl_talks_while_it_listens(self, appliance: Appliance, pki: Pki, version: str) -> None:
        message = {"user_app_id": {"user_id": "appliance", "app_id": "main"}, "model_id": "ml-topics", **BODY}
        command = ["curl", "--silent", "--show-error", "--no-buffer", "--cacert", str(pki.ca), version]
        command += ["-X", "POST", "-T", ".", "-H", f"Authorization: Key {appliance.key}", "-H", "Expect:"]
        url = f"https://localhost:{appliance.port()}/v2/models/outputs/stream"
        with subprocess.Popen([*command, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as curl:
            assert curl.stdin is not None
            assert curl.stdout is not None
            for _ in range(3):
                curl.stdin.write(json.dumps(message).encode() + b"\n")
                curl.stdin.flush()
                assert json.loads(curl.stdout.readline())["result"]["status"]["code"] == 10000
            curl.stdin.close()
            assert curl.stdout.read() == b""
        assert curl.returncode == 0


class TestLog:
    def test_no_key_is_in_it(self, http: httpx.Client, appliance: Appliance, pki: Pki) -> None:
        """Whatever was wrong with a request."""
        key = appliance.key
        http.get(f"/v2/models?key={key}")
        http.get(f"/v2/models/{key}x")
        http.post(OUTPUTS, content=key.encode())
        http.post(OUTPUTS, json={"user_app_id": key})
        http.get("/v2/models", headers={"authorization": f"Basic {key}"})
        with Raw(appliance, pki) as raw:
            raw.sock.sendall(f"GET /v2/models HTTP/1.1\r\nauthorization : Key {key}\r\n\r\n".encode())
            assert raw.until(b"\r\n").startswith(b"HTTP/1.1 400")
        http.post(OUTPUTS, content=b"[]")
        appliance.wait(lambda: "The body must be a JSON object" in appliance.log, "a line about the last one")
        assert key not in appliance.log
        assert Path(appliance.home / "daemon.log").stat().st_size > 0
