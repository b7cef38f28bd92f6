"""The log of a real daemon: what its lines say, levels that change while it runs, and what never stands there."""

import json
import os
import re
import signal
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from clarifai_grpc.grpc.api import service_pb2
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from support import secrets
from support.appliance import MODELS, Appliance, Client, Pki, image_input, mode, request_for, text_input

Make = Callable[..., Appliance]

PREDICT = request_for("ml-topics", [text_input("ridge regression")])


@pytest.fixture(scope="module", params=["single", "processes"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """In one process, and in several, whose lines come together."""
    with mode(request.param):
        yield "native"


@pytest.fixture
def appliance(make_appliance: Make) -> Iterator[Appliance]:
    """A running one that writes JSON."""
    made = make_appliance("ml-topics", "digits", log={"format": "json", "sample": 0})
    made.key = made.new_key()
    with made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """A running one without models, for tests that do not change it."""
    made = Appliance(tmp_path_factory.mktemp("shared"), pki, transport=transport)
    made.key = made.new_key()
    with made:
        yield made


def lines(appliance: Appliance) -> list[dict[str, Any]]:
    """Those of ours that are whole; libraries in C write what they like."""
    found = appliance.log.splitlines(keepends=True)
    return [json.loads(line) for line in found if line.startswith("{") and line.endswith("\n")]


def found(appliance: Appliance, **fields: object) -> list[dict[str, Any]]:
    """Lines with these fields."""
    return [line for line in lines(appliance) if fields.items() <= line.items()]


def levels(appliance: Appliance) -> dict[str, str]:
    """As `appliance log-level` shows them."""
    shown: dict[str, str] = json.loads(appliance.command("log-level", "--json").stdout)["components"]
    return shown


def answered(appliance: Appliance, client: Client) -> bool:
    """Whether a call that is answered now is logged."""
    before = len(found(appliance, message="answered"))
    assert client.predict(PREDICT).status.code == StatusCode.SUCCESS
    return len(found(appliance, message="answered")) > before


def test_a_refusal_says_who_what_and_how_long(appliance: Appliance, pki: Pki) -> None:
    """The request's id is the one in its status, with the client's own prefix."""
    (key_id,) = (key["id"] for key in json.loads(appliance.command("keys", "list", "--json").stdout))
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        client.metadata = (*client.metadata, ("x-clarifai-request-id-prefix", "mine-7"))
        reply = client.predict(request_for("ml-topics", [image_input(b"no text")], version="1"))
    assert reply.outputs[0].status.code != StatusCode.SUCCESS
    assert reply.status.req_id.startswith("mine-7-")
    appliance.wait(lambda: found(appliance, req_id=reply.status.req_id), "a line about it")
    (line,) = found(appliance, req_id=reply.status.req_id)
    assert line["level"] == "warning"
    assert line["component"] == "api"
    assert line["method"] == "PostModelOutputs"
    assert (line["model"], line["version"]) == ("appliance/main/ml-topics", "1")
    assert (line["principal"], line["credential"]) == ("default", f"key:{key_id}")
    assert line["code"] == StatusCode.Name(reply.status.code)
    assert 0 < line["duration_us"] < 60_000_000


def test_a_flood_is_cut_and_what_was_left_out_is_counted(appliance: Appliance, pki: Pki) -> None:
    """Nothing needs to follow for that."""
    with Client(appliance.port(), pki.ca, "no key of ours") as stranger:
        for _ in range(200):
            assert stranger.predict(PREDICT).status.code == StatusCode.CONN_KEY_INVALID

    def accounted() -> int:
        told = [line["count"] for line in found(appliance, kind="auth")]
        return len(found(appliance, code="CONN_KEY_INVALID")) + sum(told)

    appliance.wait(lambda: accounted() == 200, "every refusal is written or counted")
    assert len(found(appliance, code="CONN_KEY_INVALID")) < 200


def test_successes_are_sampled(make_appliance: Make, pki: Pki) -> None:
    made = make_appliance("ml-topics", log={"format": "json", "sample": 1})
    made.key = made.new_key()
    with made, Client(made.port(), pki.ca, made.key) as client:
        reply = client.predict(PREDICT)
        made.wait(lambda: found(made, message="answered"), "a line about it")
        (line,) = found(made, message="answered")
        assert line["req_id"] == reply.status.req_id
        assert line["code"] == "SUCCESS"
        made.write_config(log={"format": "json", "sample": 0})
        made.command("reload")
        assert not answered(made, client)


class TestLevels:
    def test_a_component_is_heard_and_silenced_in_every_process(self, appliance: Appliance, pki: Pki) -> None:
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            assert not answered(appliance, client)
            appliance.command("log-level", "api", "debug")
            appliance.wait(lambda: answered(appliance, client), "calls are logged")
            assert found(appliance, message="answered")[-1]["level"] == "debug"
            assert levels(appliance)["api"] == "debug"
            assert levels(appliance)["wire"] == "info"
            said = appliance.command("log-level").stdout
            assert re.search(r"^api +debug \(changed\)$", said, re.M)
            appliance.command("log-level", "--reset", "api")
            appliance.wait(lambda: not answered(appliance, client), "they are not any more")
            assert set(levels(appliance).values()) == {"info"}

    def test_a_change_outlives_a_reload_and_a_child(self, appliance: Appliance, pki: Pki) -> None:
        appliance.command("log-level", "api", "debug")
        appliance.write_config(log={"format": "json", "sample": 0, "level": "warning"})
        appliance.command("reload")
        assert levels(appliance)["api"] == "debug"
        assert levels(appliance)["wire"] == "warning"
        for process in appliance.admin("/status").get("processes", ()):
            os.kill(process["pid"], signal.SIGKILL)

        def back() -> bool:
            processes = appliance.admin("/status").get("processes", ())
            return appliance.admin("/readyz")["ready"] and not any(each["problem"] for each in processes)

        appliance.wait(back, "the children are replaced")
        with Client(appliance.port(), pki.ca, appliance.key, retries=True) as client:
            appliance.wait(lambda: answered(appliance, client), "calls are logged")

    def test_an_engine_hears_of_it(self, appliance: Appliance) -> None:
        """What it measures is news of level info."""
        appliance.command("log-level", "all", "error")
        before = len(found(appliance, component="engine"))
        for version in ("2", "3"):
            (appliance.models / "digits" / version).mkdir()
            for file in (appliance.models / "digits" / "1").iterdir():
                (appliance.models / "digits" / version / file.name).write_bytes(file.read_bytes())
            appliance.wait(lambda version=version: appliance.state_of("digits", version) == "ready", "it is loaded")
        appliance.wait(
            lambda: "curve" in appliance.command("models", "inspect", "digits").stdout.split("version 3")[1], "measured"
        )
        assert len(found(appliance, component="engine")) == before
        assert not found(appliance, component="catalog", version="3")

    @pytest.mark.parametrize(
        ("body", "status", "said"),
        [
            (b"no JSON", 400, "Send {component, level}"),
            (b"[]", 400, "Send {component, level}"),
            (b'{"component": "api"}', 400, "Send {component, level}"),
            (b'{"component": ["api"], "level": "debug"}', 400, "Send {component, level}"),
            (b'{"component": "nothing", "level": "debug"}', 409, "There is no component 'nothing'"),
            (b'{"component": "api", "level": "loud"}', 409, "There is no level 'loud'"),
        ],
    )
    def test_what_cannot_be_is_refused(self, shared: Appliance, body: bytes, status: int, said: str) -> None:
        transport = httpx.HTTPTransport(uds=str(shared.home / "admin.sock"))
        with httpx.Client(transport=transport, base_url="http://appliance") as client:
            reply = client.post("/log-levels", content=body)
        assert (reply.status_code, reply.json()["ok"]) == (status, False)
        assert said in reply.json()["message"]
        assert set(levels(shared).values()) == {"info"}

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("nothing", "debug"), "'nothing' is not one of"),
            (("api", "loud"), "'loud' is not one of"),
            (("api",), "Give api a LEVEL"),
            (("api", "debug", "--reset"), "not both"),
        ],
    )
    def test_a_wrong_command_says_what_is_right(self, shared: Appliance, arguments: tuple[str, ...], said: str) -> None:
        done = shared.command("log-level", *arguments, check=False)
        assert done.returncode == 2
        assert said in done.stderr


def test_no_payload_and_no_secret_is_logged(appliance: Appliance, pki: Pki) -> None:
    """At the lowest level, whatever a call brings and whichever way it fails."""
    canary = "canary-of-a-payload-" + "0123456789abcdef" * 4
    secrets.never_to_be_written(canary)
    appliance.command("log-level", "all", "debug")
    picture = (MODELS / "digits" / "samples" / "held-out-000-label-2.png").read_bytes() + canary.encode()
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        client.predict(request_for("ml-topics", [text_input(canary)]))
        client.predict(request_for("digits", [image_input(picture)]))
        client.predict(request_for("digits", [image_input(canary.encode())]))
        client.predict(request_for("digits", [text_input(canary)]))
        with Client(appliance.port(), pki.ca, canary) as stranger:
            stranger.call("ListModels", service_pb2.ListModelsRequest())
        url = f"https://localhost:{appliance.port()}/v2/users/appliance/apps/main/models/ml-topics/outputs"
        headers = {"authorization": f"Key {appliance.key}", "x-canary": canary}
        with httpx.Client(verify=ssl.create_default_context(cafile=str(pki.ca)), headers=headers) as rest:
            broken = rest.post(url, content=f'{{"inputs": [{{"data": {{"text": {{"raw": "{canary}"')
            assert broken.json()["status"]["code"] == StatusCode.CONN_BAD_REQUEST_FORMAT
            rest.post(url, json={"inputs": [{"data": {"text": {"raw": canary}}}]})
        appliance.wait(lambda: found(appliance, code="CONN_BAD_REQUEST_FORMAT"), "the last one is logged")
    assert canary not in appliance.log
    assert appliance.key not in appliance.log
