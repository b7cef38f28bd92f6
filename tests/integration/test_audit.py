"""The audit log of a real daemon: who called what, who changed what, and that it is whole whatever happens to it."""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from clarifai_grpc.grpc.api import service_pb2
from clarifai_grpc.grpc.api.status.status_code_pb2 import StatusCode
from support.appliance import Appliance, Client, Load, Pki, mode, request_for, text_input
from support.waiting import eventually

Make = Callable[..., Appliance]

PREDICT = request_for("ml-topics", [text_input("ridge regression")])
LINE_3 = {"name": "line-3", "identities": ["uri:spiffe://test/line-3"], "models": ["none"]}
ME = f"uid:{os.getuid()}"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


@pytest.fixture(scope="module", params=["single", "processes"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """In one process, and with fronts that tell what calls there were."""
    with mode(request.param):
        yield "native"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """A running one without models, for tests that do not change it."""
    made = Appliance(tmp_path_factory.mktemp("shared"), pki, transport=transport)
    made.key = made.new_key()
    with made:
        yield made


def verify(appliance: Appliance, *arguments: str) -> dict[str, Any]:
    """What `appliance audit verify` found."""
    done = appliance.command("audit", "verify", "--json", *arguments, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["whole"] else 1)
    return found


def records(appliance: Appliance, *events: str) -> list[dict[str, Any]]:
    """As `appliance audit export` prints them."""
    options = [option for event in events for option in ("--event", event)]
    done = appliance.command("audit", "export", *options)
    return [json.loads(line) for line in done.stdout.splitlines()]


def code(client: Client) -> int:
    """How a prediction ends."""
    return int(client.predict(PREDICT).status.code)


def test_what_was_done_and_called_is_recorded(make_appliance: Make, pki: Pki) -> None:
    """Keys, models, levels, reloads, refusals and uses of one life, each with who and what."""
    appliance = make_appliance("ml-topics", principal=[LINE_3], auth={"require": "either"})
    key = appliance.new_key()
    (key_id,) = (each["id"] for each in json.loads(appliance.command("keys", "list", "--json").stdout))
    with appliance:
        with Client(appliance.port(), pki.ca, key) as client:
            assert [code(client) for _ in range(5)] == [StatusCode.SUCCESS] * 5
            with Client(appliance.port(), pki.ca, "unknown-key") as stranger:
                refused = stranger.predict(PREDICT).status
            with Client(appliance.port(), pki.ca, certificate=pki.client("line-3")) as certified:
                forbidden = certified.predict(PREDICT).status
                assert forbidden.code == StatusCode.CONN_INSUFFICIENT_SCOPES
            appliance.new_key("--principal", "line-3")
            appliance.command("keys", "revoke", key_id)
            eventually(lambda: records(appliance, "key")[1:], 60, "both changes of keys are recorded")
            revoked = client.predict(PREDICT).status
            assert revoked.code == StatusCode.CONN_KEY_INVALID
        appliance.command("log-level", "wire", "debug")
        appliance.write_config(limits={"inputs_per_request": 7})
        appliance.command("reload")
        appliance.write_config(limits={"inputs_per_request": 7000})
        appliance.signal(signal.SIGHUP)
        appliance.wait(lambda: "reload failed" in appliance.log, "the old state goes on")
        appliance.write_config(limits={"inputs_per_request": 7})
        shutil.rmtree(appliance.models / "ml-topics")
        eventually(lambda: records(appliance, "model")[1:], 60, "the model's end is recorded")
        assert verify(appliance)["whole"]
    found = verify(appliance)
    assert (found["whole"], found["notes"]) == (True, [])
    events = [record["event"] for record in records(appliance)]
    assert (events[0], events[1], events[-1]) == ("file", "started", "stopped")
    started, added, removed = records(appliance, "started", "key")
    assert started["keys"] == {key_id: "default"}
    assert (added["change"], added["principal"]) == ("added", "line-3")
    assert (removed["change"], removed["id"]) == ("removed", key_id)
    served, gone = records(appliance, "model")
    assert (served["change"], served["model"], served["version"]) == ("served", "appliance/main/ml-topics", "1")
    assert "model.onnx" in served["sha256"]
    assert (gone["change"], gone["model"]) == ("withdrawn", "appliance/main/ml-topics")
    (level,) = records(appliance, "log-level")
    assert (level["by"], level["component"], level["level"]) == (ME, "wire", "debug")
    good, bad = records(appliance, "reload")
    assert (good["by"], good["result"], good["changed"]) == (ME, "ok", ["limits.inputs_per_request"])
    assert (bad["by"], bad["result"]) == ("signal", "failed")
    assert "inputs_per_request" in bad["why"]

    refusals = {record["req_id"]: record for record in records(appliance, "refused")}
    assert set(refusals) == {status.req_id for status in (refused, forbidden, revoked)}
    strange, certified_one = refusals[refused.req_id], refusals[forbidden.req_id]
    assert (strange["code"], strange["principal"], strange["credential"]) == (StatusCode.CONN_KEY_INVALID, "", "")
    assert strange["peer"].startswith("ipv4:127.0.0.1:")
    assert (certified_one["code"], certified_one["principal"]) == (StatusCode.CONN_INSUFFICIENT_SCOPES, "line-3")
    assert certified_one["credential"].startswith("certificate:")
    assert certified_one["model"] == "appliance/main/ml-topics"

    uses = [
        (use["principal"], use["credential"], use["model"], use["version"], use["code"], use["count"])
        for use in records(appliance, "use")
    ]
    asked = "appliance/main/ml-topics"
    certificate = certified_one["credential"]
    assert sorted(uses) == sorted(
        [
            ("default", f"key:{key_id}", asked, "1", StatusCode.SUCCESS, 5),
            ("line-3", certificate, asked, "1", StatusCode.CONN_INSUFFICIENT_SCOPES, 1),
            ("", "", "", "", StatusCode.CONN_KEY_INVALID, 2),
        ]
    )
    firsts = [(use["principal"], use["code"]) for use in records(appliance, "first")]
    assert sorted(firsts) == sorted((use[0], use[4]) for use in uses)


def test_every_call_is_counted_while_it_is_verified(make_appliance: Make, pki: Pki) -> None:
    """Over all fronts, whichever answered, and whoever reads the log meanwhile."""
    appliance = make_appliance("ml-topics", audit={"file_size": 4096, "files": 3})
    key = appliance.new_key()
    with appliance, Load(appliance.port(), pki.ca, key, PREDICT, callers=8) as load:
        for _ in range(3):
            load.wait_for(50)
            found = verify(appliance)
            assert found["whole"], found
    assert verify(appliance)["whole"]
    counted = sum(use["count"] for use in records(appliance, "use") if use["code"] == StatusCode.SUCCESS)
    assert counted == load.ends["answered"]


def test_a_workflow_and_other_doors_are_named(shared: Appliance, client: Client) -> None:
    """What is no prediction has no model; the method of a first use says what it was."""
    client.call("ListModels", service_pb2.ListModelsRequest())
    listed = eventually(
        lambda: [each for each in records(shared, "first") if each["method"] == "ListModels"], 60, "it is recorded"
    )
    assert listed[0]["model"] == ""


class TestKilled:
    def test_the_daemon_killed_leaves_a_whole_log(self, make_appliance: Make, pki: Pki) -> None:
        appliance = make_appliance("ml-topics")
        key = appliance.new_key()
        appliance.start()
        with Client(appliance.port(), pki.ca, key) as client:
            assert code(client) == StatusCode.SUCCESS
        eventually(lambda: records(appliance, "first"), 60, "it is recorded")
        appliance.signal(signal.SIGKILL)
        assert appliance.process is not None
        appliance.process.wait(60)
        assert verify(appliance)["whole"]
        with appliance:
            pass
        found = verify(appliance)
        assert found["whole"], found
        first, second = records(appliance, "started")
        assert "unclean" not in first
        assert second["unclean"] is True

    def test_a_front_killed_loses_a_second_at_most(self, make_appliance: Make, pki: Pki, transport: str) -> None:
        appliance = make_appliance("ml-topics")
        key = appliance.new_key()
        with appliance:
            fronts = [each for each in appliance.admin("/status").get("processes", ()) if "front" in each["name"]]
            if not fronts:
                pytest.skip("all is in one process")
            with Client(appliance.port(), pki.ca, key) as client:
                assert code(client) == StatusCode.SUCCESS
                eventually(lambda: records(appliance, "first"), 60, "it is recorded")
            for front in fronts:
                os.kill(front["pid"], signal.SIGKILL)
            appliance.wait(lambda: appliance.metric("inference_appliance_worker_restarts_total") >= 0, "it is seen")

            def replaced() -> bool:
                now = {each["name"]: each for each in appliance.admin("/status")["processes"]}
                return all(
                    not now[each["name"]]["problem"] and now[each["name"]]["pid"] != each["pid"] for each in fronts
                )

            appliance.wait(replaced, "they are replaced")
            with Client(appliance.port(), pki.ca, key) as client:
                assert code(client) == StatusCode.SUCCESS
        assert sum(use["count"] for use in records(appliance, "use")) == 2
        assert len(records(appliance, "first")) == 1, "whoever saw it first"


class TestTouched:
    def test_what_was_changed_or_cut_off_is_found(self, make_appliance: Make, pki: Pki, tmp_path: Path) -> None:
        appliance = make_appliance()
        with appliance, Client(appliance.port(), pki.ca, "unknown-key") as stranger:
            stranger.predict(PREDICT)
        found = verify(appliance)
        kept = f"{found['last']['seq']}:{found['last']['hash']}"
        assert verify(appliance, "--head", kept)["whole"]
        file = appliance.state / "audit" / "audit-00000001.jsonl"
        content = file.read_bytes()
        file.write_bytes(content.replace(b"unknown", b"unknowm").replace(b"127.0.0.1", b"127.0.0.2"))
        assert "was changed" in verify(appliance)["faults"][0]
        done = appliance.command("audit", "export", check=False)
        assert done.returncode == 1
        assert "was changed" in done.stderr
        file.write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])
        assert "it was cut" in verify(appliance)["faults"][0]
        shutil.rmtree(appliance.state / "audit")
        with appliance:
            pass
        assert verify(appliance)["whole"], "all of it made anew"
        assert not verify(appliance, "--head", kept)["whole"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("verify", "--head", "7"), "is not SEQ:HASH"),
            (("verify", "--folder", "/nowhere"), "The audit log in /nowhere cannot be read"),
            (("export", "--since", "yesterday"), "'yesterday' is no date or time"),
        ],
    )
    def test_a_wrong_command_says_what_is_right(self, shared: Appliance, arguments: tuple[str, ...], said: str) -> None:
        done = shared.command("audit", *arguments, check=False)
        assert done.returncode == 2
        assert said in done.stderr


def test_a_part_of_it_can_be_exported_as_a_table(shared: Appliance, client: Client) -> None:
    client.call("ListModels", service_pb2.ListModelsRequest())
    eventually(lambda: records(shared, "first"), 60, "it is recorded")
    everything = records(shared)
    later = everything[len(everything) // 2]["time"]
    some = shared.command("audit", "export", "--since", later.removesuffix("Z"), "--format", "csv").stdout.splitlines()
    assert some[0].startswith("seq,time,event,principal,")
    assert some[1].split(",")[1] >= later
    assert shared.command("audit", "export", "--until", "2020-01-01").stdout == ""


@needs_root
class TestFullDisk:
    @pytest.fixture(params=["on", "required"])
    def small(self, request: pytest.FixtureRequest, make_appliance: Make) -> Iterator[tuple[Appliance, Path]]:
        """One whose audit log lies on a small file system, and where a file that fills that up goes."""
        appliance = make_appliance("ml-topics", audit={"mode": request.param})
        appliance.key = appliance.new_key()
        folder = appliance.state / "audit"
        folder.mkdir()
        mount = 'mount -t tmpfs -o size=4m none "$0" && exec "$@"'
        appliance.through = ("unshare", "--mount", "sh", "-c", mount, str(folder))
        with appliance:
            assert appliance.process is not None
            yield appliance, Path(f"/proc/{appliance.process.pid}/root") / folder.relative_to("/")

    def test_calls_go_on_or_are_refused_until_there_is_space(self, small: tuple[Appliance, Path], pki: Pki) -> None:
        appliance, inside = small
        required = appliance.config["audit"]["mode"] == "required"
        writable = "inference_appliance_audit_writable"
        with Client(appliance.port(), pki.ca, appliance.key) as client:
            assert code(client) == StatusCode.SUCCESS
            assert appliance.metric(writable) == 1
            filler = inside / "filler"
            _fill(filler)
            appliance.wait(lambda: appliance.metric(writable) == 0, "the metric says so")
            assert "space left" in appliance.admin("/readyz")["not_ready"]["audit"]
            assert appliance.admin("/readyz")["ready"] == (not required)
            assert "the audit log cannot be written" in appliance.log
            if required:
                appliance.wait(lambda: _refused(client), "calls are refused")
                assert appliance.metric('inference_appliance_rejected_total{reason="audit"}') >= 1
            else:
                assert [code(client) for _ in range(3)] == [StatusCode.SUCCESS] * 3
            filler.unlink()
            appliance.wait(lambda: appliance.metric(writable) == 1, "the metric says so")
            appliance.wait(lambda: appliance.admin("/readyz")["ready"] is True, "it is ready")
            appliance.wait(lambda: not _refused(client), "calls are answered")
            shutil.copytree(inside, appliance.home / "copy")
        found = json.loads(
            appliance.command("audit", "verify", "--json", "--folder", appliance.home / "copy", check=False).stdout
        )
        assert found["whole"], found


def _refused(client: Client) -> bool:
    """Whether a call is told to try elsewhere; else it is answered."""
    try:
        assert code(client) == StatusCode.SUCCESS
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE or "cannot record calls" not in error.details():
            raise
        return True
    return False


def _fill(path: Path) -> None:
    """Until nothing more goes in."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
