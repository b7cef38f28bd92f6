"""The status document, page and commands of a running appliance, in one process and in several."""

import asyncio
import base64
import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from support.appliance import (
    COMMAND,
    ENVIRONMENT,
    MODELS,
    PATIENCE_S,
    Appliance,
    Client,
    Pki,
    image_input,
    mode,
    request_for,
)

from appliance.daemon.status import Status
from appliance.daemon.trial import MOST_BYTES

PICTURE = MODELS / "digits" / "samples" / "held-out-000-label-2.png"
BODY = json.dumps({"inputs": [{"data": {"image": {"base64": base64.b64encode(PICTURE.read_bytes()).decode()}}}]})
DIGITS = "/try/appliance/main/digits"
SCHEMA = TypeAdapter(Status)
Make = Callable[..., Appliance]


@pytest.fixture(scope="module", params=["single", "processes"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Appliance]:
    """One appliance with both bundles and a key."""
    made = Appliance(tmp_path_factory.mktemp("status"), pki, transport="native", mode=request.param)
    for bundle in ("digits", "ml-topics"):
        shutil.copytree(MODELS / bundle, made.models / bundle)
    made.key = made.new_key()
    with made:
        yield made


@pytest.fixture
def transport() -> Iterator[str]:
    """What a test makes for itself does everything in one process, on the native wire."""
    with mode("single"):
        yield "native"


def url(appliance: Appliance, path: str = "/status.json") -> str:
    return f"http://127.0.0.1:{appliance.port('admin.listen')}{path}"


def document(appliance: Appliance) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(url(appliance), timeout=PATIENCE_S).json()
    return found


def attempt(appliance: Appliance, key: str = "", body: str | bytes = BODY, path: str = DIGITS) -> httpx.Response:
    headers = {"x-appliance-key": key} if key else {}
    return httpx.post(url(appliance, path), content=body, headers=headers, timeout=PATIENCE_S)


# ---- the document ----------------------------------------------------------------------------------------------------


def test_the_document_is_what_the_schema_says(running: Appliance) -> None:
    """On the port and on the socket alike."""
    for found in (document(running), running.admin("/status.json")):
        assert SCHEMA.dump_python(SCHEMA.validate_json(json.dumps(found), strict=True)) == found
    models = {(each["model"], each["state"], each["input"]) for each in found["models"]}
    assert models == {("appliance/main/digits", "ready", "image"), ("appliance/main/ml-topics", "ready", "text")}
    assert [each["name"] for each in found["processes"]] == (
        [] if running.mode == "single" else ["engine", "front 0", "front 1"]
    )
    assert {each["name"] for each in found["certificates"]} == {"server", "client_ca"}
    assert found["orchestrator"]["enrolled"] is False
    assert found["keys"] == 1


def test_calls_and_failures_show(running: Appliance, pki: Pki) -> None:
    with Client(running.port(), pki.ca, running.key) as client:
        for _ in range(5):
            client.predict(request_for("digits", [image_input(PICTURE.read_bytes())]))
    with Client(running.port(), pki.ca, "invented") as client:
        assert client.predict(request_for("digits", [image_input(b"x")])).status.code == 11008

    def shown() -> bool:
        found = document(running)
        failed = {(each["code"], each["name"]) for each in found["failures"]}
        return any(found["history"]["requests_per_s"]) and any(found["history"]["p99_s"]) and any(
            code == 11008 for code, _ in failed
        )  # fmt: skip

    running.wait(shown, "calls in the document")
    found = document(running)
    failure = next(each for each in found["failures"] if each["code"] == 11008)
    assert failure["name"] == "CONN_KEY_INVALID"
    assert failure["req_id"] in running.log
    assert "invented" not in json.dumps(found)
    assert found["load"]["refused"]["auth"] >= 1
    assert found["devices"][0]["memory_used_bytes"] > 2**20


def test_a_bad_bundle_shows_and_goes(running: Appliance) -> None:
    """Within seconds, with the page of the runbook that leads to the mending; and it is healthy no more."""
    folder = running.models / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: [", "utf-8")

    def reasons() -> dict[str, str]:
        return {each["what"]: each["runbook"] for each in document(running)["reasons"]}

    try:
        running.wait(lambda: reasons().get(folder.name) == "model-not-ready", "the bundle among the reasons")
        assert document(running)["health"] == "degraded"
        status = running.command("status", check=False)
        assert (status.returncode, folder.name in status.stdout) == (1, True)
    finally:
        shutil.rmtree(folder)
    running.wait(lambda: folder.name not in reasons(), "the reason gone")


def test_an_engine_that_is_killed_is_a_reason(running: Appliance) -> None:
    if running.mode == "single":
        pytest.skip("there is no engine by itself")
    pid = next(each["pid"] for each in document(running)["processes"] if each["name"] == "engine")
    os.kill(pid, signal.SIGKILL)

    def told() -> bool:
        found = document(running)
        why = {each["what"]: each for each in found["reasons"]}
        back = all(not each["problem"] for each in found["processes"])
        return back and why.get("engine", {}).get("runbook") == "worker-restarts" and bool(found["log"])

    running.wait(told, "the engine replaced, and told of")
    assert "SIGKILL" in document(running)["log"][0]["text"] or "engine" in document(running)["log"][0]["text"]


def test_many_who_poll_get_what_was_made_once(running: Appliance) -> None:
    """A hundred pages cost the daemon's own process little: documents are made once a second."""

    async def poll() -> tuple[set[float], float]:
        at: set[float] = set()
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(limits=limits, timeout=PATIENCE_S) as client:
            begun = time.monotonic()
            where = url(running)
            for _ in range(10):
                replies = await asyncio.gather(*(client.get(where) for _ in range(100)))
                at |= {reply.json()["at"] for reply in replies}
        return at, time.monotonic() - begun

    before = cpu_seconds(running)
    at, took = asyncio.run(poll())
    assert len(at) <= took + 2
    print(f"1000 documents for 100 clients: {cpu_seconds(running) - before:.2f} s of CPU")


def cpu_seconds(appliance: Appliance) -> float:
    """Of the daemon's own process."""
    assert appliance.process is not None
    fields = Path(f"/proc/{appliance.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(appliance: Appliance) -> int:
    assert appliance.process is not None
    pages = int(Path(f"/proc/{appliance.process.pid}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_those_who_ask_and_never_read_hold_up_nobody(running: Appliance) -> None:
    """A hundred connections with fifty requests each, of which no answer is taken."""
    before = resident(running)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", running.port("admin.listen"))))
            sock.sendall(b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        for _ in range(20):
            assert document(running)["format"] == "1.0"
            assert httpx.get(url(running, "/readyz"), timeout=PATIENCE_S).status_code == 200
        assert resident(running) - before < 128 * 2**20


# ---- trying a model --------------------------------------------------------------------------------------------------


def test_a_model_can_be_tried_with_a_key(running: Appliance) -> None:
    reply = attempt(running, running.key)
    assert reply.status_code == 200, reply.text
    assert reply.json()["outputs"][0]["data"]["concepts"][0]["name"] == "two"
    assert reply.headers["x-content-type-options"] == "nosniff"
    text = json.dumps({"inputs": [{"data": {"text": {"raw": "a support vector machine with a kernel"}}}]})
    reply = attempt(running, running.key, text, "/try/appliance/main/ml-topics")
    assert reply.json()["outputs"][0]["data"]["concepts"]


def test_it_is_a_call_as_any_other(running: Appliance) -> None:
    """Without a key, with a bad one, for a model that is not there: the API says no, counts it and logs it."""
    counted = 'inference_appliance_requests_total{code="%d",method="PostModelOutputs"'
    before = running.metric(counted % 11008)
    log = len(running.log)
    assert attempt(running).json()["status"]["code"] == 11102
    refused = attempt(running, "wrong-key")
    assert (refused.status_code, refused.json()["status"]["code"]) == (401, 11008)
    assert attempt(running, running.key, path="/try/appliance/main/none").json()["status"]["code"] == 21200
    assert attempt(running, running.key, body=b"{").json()["status"]["code"] == 11100
    running.wait(lambda: running.metric(counted % 11008) == before + 1, "the refusal counted")
    assert "not known" in running.log[log:]
    assert "wrong-key" not in running.log
    assert running.key not in running.log


def test_a_large_body_with_a_bad_key_hears_the_refusal(running: Appliance) -> None:
    """The API refuses before it has taken the body; that answer must not be lost."""
    body = json.dumps({"inputs": [{"data": {"image": {"base64": "A" * 6 * 2**20}}}]})
    for _ in range(5):
        reply = attempt(running, "wrong-key", body)
        assert (reply.status_code, reply.json()["status"]["code"]) == (401, 11008)


def test_what_is_too_much_for_the_page_is_refused(running: Appliance) -> None:
    reply = attempt(running, running.key, b"x" * (MOST_BYTES + 1))
    assert (reply.status_code, "8 MiB" in reply.json()["error"]) == (413, True)
    for key in ("with blanks", "x" * 600, "tab\there"):
        assert attempt(running, key).status_code == 401


def test_two_at_a_time_and_those_who_leave_make_room(running: Appliance) -> None:
    head = (
        f"POST {DIGITS} HTTP/1.1\r\nHost: localhost\r\nX-Appliance-Key: {running.key}\r\nContent-Length: 1000\r\n\r\n"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", running.port("admin.listen"))))
            sock.sendall(head.encode() + b"{")
        running.wait(lambda: attempt(running, running.key).status_code == 503, "both turns taken")
    running.wait(lambda: attempt(running, running.key).status_code == 200, "a turn again")


def test_dns_rebinding_reaches_nothing(running: Appliance) -> None:
    for path in ("/", "/status.js", "/status.json"):
        assert httpx.get(url(running, path), headers={"host": "evil.example:9464"}).status_code == 421
    for headers in ({"host": "evil.example:9464"}, {"origin": "http://evil.example"}):
        reply = httpx.post(url(running, DIGITS), content=BODY, headers={**headers, "x-appliance-key": running.key})
        assert reply.status_code in (421, 403)
    asked = {"origin": "http://evil.example", "access-control-request-headers": "x-appliance-key"}
    preflight = httpx.options(url(running, DIGITS), headers={**asked, "access-control-request-method": "POST"})
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers


def test_a_trusted_proxy_on_this_machine_changes_nothing(make_appliance: Make) -> None:
    """The main port then waits for a PROXY header from loopback addresses."""
    made = make_appliance("digits", server={"trusted_proxies": ["127.0.0.0/8", "::1"]})
    made.key = made.new_key()
    with made:
        assert attempt(made, made.key).status_code == 200


@pytest.mark.parametrize("listen", ["[::]:0", "0.0.0.0:0", "[::1]:0", "localhost:0"])
def test_wherever_the_main_port_listens_it_is_found(make_appliance: Make, listen: str) -> None:
    made = make_appliance("digits", server={"listen": listen})
    made.key = made.new_key()
    with made:
        assert attempt(made, made.key).status_code == 200


def test_where_grpcio_serves_it_says_what_it_lacks(tmp_path: Path, pki: Pki) -> None:
    made = Appliance(tmp_path / "a", pki, transport="grpcio", mode="single")
    shutil.copytree(MODELS / "digits", made.models / "digits")
    with made:
        reply = attempt(made, "some-key")
        assert (reply.status_code, "grpcio" in reply.json()["error"]) == (501, True)


def test_a_reload_changes_the_certificate_that_is_trusted(make_appliance: Make, tmp_path: Path) -> None:
    """It trusts what is shown, whoever signed it."""
    made = make_appliance("digits")
    made.key = made.new_key()
    with made:
        made.command("certs", "renew", "server", "--dir", made.tls)
        made.command("reload")
        assert attempt(made, made.key).status_code == 200


# ---- where others reach the page -------------------------------------------------------------------------------------


def test_elsewhere_the_files_are_for_all_and_the_rest_for_those_who_are_named(make_appliance: Make, pki: Pki) -> None:
    principals = [{"name": "operator", "models": []}, {"name": "ada"}]
    made = make_appliance("digits", principal=principals, admin={"listen": "0.0.0.0:0", "principals": ["operator"]})
    operator, ada = made.new_key("--principal", "operator"), made.new_key("--principal", "ada")
    context = ssl.create_default_context(cafile=pki.ca)
    with made, httpx.Client(
        verify=context, base_url=f"https://localhost:{made.port('admin.listen')}", timeout=PATIENCE_S
    ) as client:  # fmt: skip
        for path in ("/", "/status.css", "/status.js"):
            reply = client.get(path)
            assert reply.status_code == 200
            assert "main/digits" not in reply.text
            assert "script-src 'self'" in reply.headers["content-security-policy"]
        assert client.get("/status.json").status_code == 401
        assert client.get("/status.json", headers={"authorization": f"Bearer {ada}"}).status_code == 403
        reader = {"authorization": f"Bearer {operator}"}
        assert client.get("/status.json", headers=reader).json()["health"] in ("healthy", "degraded")
        assert client.post(DIGITS, content=BODY, headers={"x-appliance-key": ada}).status_code == 401
        reply = client.post(DIGITS, content=BODY, headers={**reader, "x-appliance-key": ada})
        assert reply.json()["outputs"][0]["data"]["concepts"][0]["name"] == "two"
        assert client.post(DIGITS, content=BODY, headers={**reader, "x-appliance-key": operator}).status_code != 200


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_status_goes_by_health(running: Appliance) -> None:
    found = json.loads(running.command("status", "--json", check=False).stdout)
    shown = running.command("status", check=False)
    assert shown.returncode == (0 if found["health"] == "healthy" else 1)
    assert "appliance/main/digits" in shown.stdout
    assert "appliance/main/digits" in running.command("top", "--once").stdout


class Terminal:
    """A terminal in which a command runs; what it shows now is not told apart from what it showed."""

    def __init__(self, *command: str | Path) -> None:
        self._main, child = pty.openpty()
        termios.tcsetwinsize(child, (50, 160))
        self.before = termios.tcgetattr(child)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *map(str, command)],
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
            stdin=child,
            stdout=child,
            stderr=child,
            env={**ENVIRONMENT, "TERM": "xterm"},
        )
        self._child = child
        self._shown = ""

    def until(self, text: str) -> None:
        """Read until it is shown; then forget what was."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._shown):
            ready, _, _ = select.select([self._main], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown:\n{self._shown}"
            self._shown += os.read(self._main, 65536).decode("utf-8", "replace")
        self._shown = ""

    def press(self, keys: bytes) -> None:
        os.write(self._main, keys)

    def ends(self) -> int:
        """Its exit status; the terminal is as it was."""
        status = self.process.wait(PATIENCE_S)
        assert termios.tcgetattr(self._child) == self.before
        os.close(self._main)
        os.close(self._child)
        return status


@pytest.mark.parametrize("keys", [b"q", b"\x03"])
def test_top_goes_on_when_the_daemon_restarts_and_ends_with_a_key(make_appliance: Make, keys: bytes) -> None:
    made = make_appliance("digits").start()
    terminal = Terminal(COMMAND, "--config", made.file, "top", "--interval", "0.2")
    try:
        terminal.until("appliance/main/digits")
        made.stop()
        terminal.until("does not answer")
        made.start()
        terminal.until("appliance/main/digits")
        terminal.until("up for")
        terminal.press(b"x")
        terminal.press(keys)
        assert terminal.ends() == 0
    finally:
        terminal.process.kill()


def test_top_answers_keys_while_the_daemon_hangs(make_appliance: Make) -> None:
    """It waits for seconds, not for minutes."""
    made = make_appliance("digits").start()
    made.signal(signal.SIGSTOP)
    terminal = Terminal(COMMAND, "--config", made.file, "top", "--interval", "0.2")
    try:
        terminal.until("does not answer")
        terminal.press(b"q")
        assert terminal.ends() == 0
    finally:
        made.signal(signal.SIGCONT)
        terminal.process.kill()
