"""The agent registers by itself and takes work, as the stock runner does, whatever a link and a centre do to it."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from onnx import TensorProto, helper
from orchestrator.enrolled import SLOW, STREAMS, at_deployment, enrolled_with, row, slow
from orchestrator.link import Link
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import ENVIRONMENT as SDK
from orchestrator.stock_runner import PAT, USER
from orchestrator.test_enrolment import lacking
from orchestrator.transcript import DATA
from support import graphs
from support.appliance import MODELS, PATIENCE_S, Appliance, Client, image_input, request_for
from support.stock import executable, plain_environment

SAMPLES = sorted((MODELS / "digits" / "samples").glob("*.png"))
ENDLESS = "endless"


@pytest.fixture
def link(centre: RunningCentre) -> Iterator[Link]:
    """What lies between appliance and centre."""
    with Link(centre.port) as made:
        yield made


@pytest.fixture
def appliance(
    centre: RunningCentre, link: Link, tmp_path: Path, make_appliance: Callable[..., Appliance]
) -> Iterator[Appliance]:
    """One that takes work for `digits`; it runs."""
    made = new_appliance(make_appliance, centre, f"https://localhost:{link.port}", tmp_path)
    with made:
        waits(centre, made, 1)
        yield made


def new_appliance(
    make_appliance: Callable[..., Appliance], centre: RunningCentre, base_url: str, home: Path, **more: Any
) -> Appliance:
    """One that is enrolled, with `digits`; it is not started."""
    return make_appliance(
        "digits",
        processes={"mode": "auto", "fronts": 1},
        placement={"compute_cluster_id": "plants", "nodepool_id": "hall-3"},
        orchestrator=enrolled_with(base_url, centre, home, **more),
    )


def waits(centre: RunningCentre, appliance: Appliance, runners: int) -> None:
    """Return when all streams of so many runners wait for items."""
    try:
        centre.wait(
            lambda state: (
                sum(state["idle"].values()) == STREAMS * runners
                and len([count for count in state["controls"].values() if count]) == runners
            ),
            "all streams wait",
        )
    except AssertionError as error:
        raise AssertionError(f"{error}\n{appliance.log}") from None


def digits(centre: RunningCentre, *, count: int = 1) -> list[str]:
    """What the deployment `digits` says of the first sample pictures, asked through the centre."""
    request = request_for("digits", [image_input(file.read_bytes()) for file in SAMPLES[:count]])
    with Client(centre.port, centre.pki.ca, PAT) as client:
        reply = client.predict(at_deployment(request, "digits"))
    assert reply.status.code == status_code_pb2.SUCCESS, reply.status
    return [output.data.concepts[0].name for output in reply.outputs]


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RIGHT = [NAMES[int(file.stem.rsplit("-", 1)[1])] for file in SAMPLES]


def state_of(appliance: Appliance) -> dict[str, Any]:
    """How the daemon says that its link is."""
    found: dict[str, Any] = appliance.admin("/status").get("orchestrator", {})
    return found


def items(appliance: Appliance, outcome: str, model: str = "digits") -> float:
    """How many items had that outcome."""
    return appliance.metric(
        f'inference_appliance_orchestrator_items_total{{model="{model}",outcome="{outcome}",version="1"}}'
    )


def endless(folder: Path) -> None:
    """A bundle whose runs never end where x is above a thousand."""
    graphs.write_raw(folder, graphs.endless_model(only_above=1000.0), batching={"max_rows": 1})


# ---- as it should be -------------------------------------------------------------------------------------------------


def test_it_registers_works_and_says_how_it_is(centre: RunningCentre, appliance: Appliance) -> None:
    assert digits(centre, count=3) == RIGHT[:3]
    appliance.wait(lambda: state_of(appliance)["connected"], "it says that it is connected")
    appliance.wait(lambda: appliance.metric("inference_appliance_orchestrator_connected") == 1)
    appliance.wait(lambda: items(appliance, "answered") == 1, "the item is counted")
    assert appliance.metric('inference_appliance_inputs_total{code="10000",model="digits",version="1"}') == 3
    nodepool = service_pb2.GetNodepoolRequest(
        user_app_id=resources_pb2.UserAppIDSet(user_id=USER), nodepool_id="hall-3"
    )
    ready = resources_pb2.Nodepool.NodepoolStatus.NODEPOOL_STATUS_READY
    with Client(centre.port, centre.pki.ca, PAT) as client:
        appliance.wait(lambda: client.call("GetNodepool", nodepool).nodepool.status == ready, "the centre knows")
    (metrics, *_) = [
        event.content for event in centre.events() if (event.rpc, event.what) == ("PostComputePlaneMetrics", "request")
    ]
    assert float(metrics["compute_plane_metrics"][0]["cpu_metrics"][0]["memory_bytes"]) > 2**20
    assert PAT not in appliance.log


def test_its_streams_are_those_of_the_stock_runner(centre: RunningCentre, appliance: Appliance) -> None:
    """Hello, outputs under the item's id, half-close, the next stream at once; each message has the same fields."""
    since = centre.last_event()
    digits(centre)
    waits(centre, appliance, 1)
    hello = [
        call["sent"][0]
        for call in json.loads((DATA / "stock-registers.json").read_text(encoding="utf-8"))
        if call["rpc"] == "ProcessRunnerItems"
    ]
    ours = [event for event in centre.events() if (event.rpc, event.what) == ("ProcessRunnerItems", "request")]
    for theirs, kind in ((hello[0], "Control connection"), (hello[1], "Success")):
        mine = next(event.content for event in ours if event.content["status"].get("description") == kind)
        assert lacking(theirs, mine) == lacking(mine, theirs) == []
    after = [event for event in centre.events(since) if event.rpc == "ProcessRunnerItems"]
    served = next(event.call for event in after if event.what == "reply")
    (answer,) = [event.content for event in after if event.call == served and event.what == "request"]
    (stock,) = json.loads((DATA / "stock-answers.json").read_text(encoding="utf-8"))
    assert set(answer) == set(stock)
    assert (answer["status"]["code"], answer["status"]["description"]) == ("SUCCESS", "Success")
    assert [event.content["outcome"] for event in after if event.call == served and event.what == "end"] == ["OK"]
    assert sum(event.what == "open" for event in after) == 1


@pytest.mark.clients
def test_the_stock_sdk_hears_the_same_through_the_centre(
    centre: RunningCentre, link: Link, tmp_path: Path, make_appliance: Callable[..., Appliance]
) -> None:
    """Methods, batches, streams both ways, errors: asked of the appliance, and of the centre at its deployments."""
    made = new_appliance(make_appliance, centre, f"https://localhost:{link.port}", tmp_path)
    write_methods(made.models / "many")
    key = made.new_key()
    with made:
        waits(centre, made, 2)
        script = Path(__file__).parent / "stock" / "ask_both.py"
        answers = []
        here = (f"https://localhost:{made.port()}", key, "appliance")
        for base_url, pat, user in (here, (centre.base_url, PAT, USER)):
            done = subprocess.run(
                [executable(SDK), script, base_url, centre.pki.ca, user, SAMPLES[0], SAMPLES[1]],
                env=plain_environment(
                    CLARIFAI_PAT=pat,
                    CLARIFAI_USER_ID=user,
                    CLARIFAI_API_BASE=base_url,
                    CLARIFAI_ROOT_CERTIFICATES_PATH=centre.pki.ca,
                    GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=centre.pki.ca,
                    HOME=tmp_path,
                ),
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr + made.log
            answers.append(json.loads(done.stdout.splitlines()[-1]))
    assert answers[0]["digits"] == [RIGHT[0], RIGHT[1]]
    assert answers[0] == answers[1]


def write_methods(folder: Path) -> None:
    """A bundle with a method of each kind: unary, one that streams, one that streams both ways."""
    row_of = {"name": "x", "type": "list[float]"}
    factor = {"name": "factor", "type": "float", "default": 2.0}
    numbers = {"type": "list[float]"}
    methods = [
        {"name": "scale", "arguments": [row_of, factor], "returns": numbers},
        {"name": "each", "arguments": [row_of, factor], "returns": {"type": "float", "iterator": True}},
        {
            "name": "converse",
            "arguments": [{**row_of, "iterator": True}, factor],
            "returns": {**numbers, "iterator": True},
        },
    ]
    graph = graphs.make(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        {"x": (TensorProto.FLOAT, ["batch", "n"]), "factor": (TensorProto.FLOAT, [])},
        {"y": (TensorProto.FLOAT, ["batch", "n"])},
    )
    config = graphs.bundle_config(folder, "any-to-any", {"methods": methods}, user_id="appliance", app_id="main")
    graphs.write_bundle(folder, graph, config)


def test_models_that_come_and_go_are_registered_by_themselves(centre: RunningCentre, appliance: Appliance) -> None:
    shutil.copytree(MODELS / "ml-topics", appliance.models / "ml-topics")
    waits(centre, appliance, 2)
    shutil.rmtree(appliance.models / "ml-topics")
    waits(centre, appliance, 1)
    assert digits(centre) == RIGHT[:1]


def test_a_reload_ends_the_agent_and_brings_it_back(centre: RunningCentre, appliance: Appliance) -> None:
    section = appliance.config["orchestrator"]
    appliance.write_config(orchestrator={**section, "agent": False})
    appliance.command("reload")
    centre.wait(lambda state: not state["idle"], "its streams are gone")
    appliance.write_config(orchestrator={**section, "agent": True})
    appliance.command("reload")
    waits(centre, appliance, 1)
    assert digits(centre) == RIGHT[:1]


def test_a_reload_while_the_agent_starts_leaves_none_behind(centre: RunningCentre, appliance: Appliance) -> None:
    """Who is told off before it has begun ends like any other; nothing is said of a link that is no more."""
    section = appliance.config["orchestrator"]

    def agents() -> list[str]:
        assert appliance.process is not None
        daemon = appliance.process.pid
        children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text(encoding="ascii").split()
        commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        return [child for child, command in commands.items() if b"agent_process" in command]

    (first,) = agents()
    appliance.write_config(orchestrator={**section, "streams": 2})
    appliance.admin("/reload", post=True)
    appliance.wait(lambda: agents() not in ([], [first]), "the next one starts")
    appliance.write_config(orchestrator={**section, "agent": False})
    appliance.admin("/reload", post=True)
    appliance.wait(lambda: not agents(), "it has ended")
    appliance.wait(lambda: state_of(appliance) == {}, "the daemon has heard of it")
    appliance.wait(lambda: "inference_appliance_orchestrator_connected{" not in appliance.metrics(), "and shows it")


# ---- items that end otherwise ----------------------------------------------------------------------------------------


def test_a_caller_that_leaves_ends_the_run(centre: RunningCentre, appliance: Appliance) -> None:
    """The control stream tells; the graph that never ends is ended, and the next item is answered."""
    endless(appliance.models / ENDLESS)
    waits(centre, appliance, 2)
    with Client(centre.port, centre.pki.ca, PAT) as client:
        call = client.stub.PostModelOutputs.future(row(ENDLESS, 2000.0, 2000.0), metadata=client.metadata)
        centre.wait(lambda state: state["busy"], "the appliance has the item")
        call.cancel()
        appliance.wait(lambda: items(appliance, "cancelled", ENDLESS) == 1, "the item is cancelled")
        waits(centre, appliance, 2)
        reply = client.predict(row(ENDLESS, 1.0, 1.0))
    assert reply.status.code == status_code_pb2.SUCCESS


def test_what_cannot_be_answered_now_is_kept_and_then_given_back(
    centre: RunningCentre, link: Link, tmp_path: Path, make_appliance: Callable[..., Appliance]
) -> None:
    """The principal of work from there may have one call at once: the second waits for the first; behind one that never
    ends it is given back."""
    made = new_appliance(make_appliance, centre, f"https://localhost:{link.port}", tmp_path)
    made.write_config(principal=[{"name": "orchestrator", "concurrency": 1}])
    slow(made.models / "slow", 300)
    endless(made.models / ENDLESS)
    with made, Client(centre.port, centre.pki.ca, PAT) as client:
        waits(centre, made, 3)
        request = row("slow", *SLOW)
        calls = [client.stub.PostModelOutputs.future(request, metadata=client.metadata) for _ in range(2)]
        assert [call.result(PATIENCE_S).status.code for call in calls] == [status_code_pb2.SUCCESS] * 2
        for_ever = client.stub.PostModelOutputs.future(row(ENDLESS, 2000.0, 2000.0), metadata=client.metadata)
        centre.wait(lambda state: state["busy"], "the appliance has the item")
        behind = client.stub.PostModelOutputs.future(request, metadata=client.metadata)
        made.wait(lambda: items(made, "given_back", "slow") >= 1, "it was given back")
        for_ever.cancel()
        assert behind.result(PATIENCE_S).status.code == status_code_pb2.SUCCESS
    assert centre.state()["counts"]["handed out again"] >= 1


def test_what_is_no_prediction_is_refused(centre: RunningCentre, appliance: Appliance) -> None:
    """An input that the model cannot take is an answer, as everywhere; a model's error reaches the caller unchanged."""
    request = at_deployment(request_for("digits", [image_input(b"no picture")]), "digits")
    with Client(centre.port, centre.pki.ca, PAT) as client:
        reply = client.predict(request)
    assert reply.outputs[0].status.code == status_code_pb2.INPUT_UNSUPPORTED_FORMAT
    appliance.wait(lambda: items(appliance, "answered") == 1, "it is an answer")


def test_duplicates_are_answered_once_to_their_caller(centre: RunningCentre, appliance: Appliance) -> None:
    centre.tell("duplicate", times=3)
    for _ in range(3):
        assert digits(centre) == RIGHT[:1]
        waits(centre, appliance, 1)
    counts = centre.state()["counts"]
    assert (counts["duplicated"], counts["answered"]) == (3, 3)


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_stop_answers_what_was_taken(centre: RunningCentre, appliance: Appliance) -> None:
    """The item is answered, no other is taken, and the centre is told that we go."""
    slow(appliance.models / "slow")
    waits(centre, appliance, 2)
    with Client(centre.port, centre.pki.ca, PAT) as client:
        call = client.stub.PostModelOutputs.future(row("slow", *SLOW), metadata=client.metadata)
        centre.wait(lambda state: state["busy"], "the appliance has the item")
        assert appliance.stop() == 0
        assert call.result(PATIENCE_S).status.code == status_code_pb2.SUCCESS
    assert not centre.state()["counts"].get("handed out again")
    statuses = [
        event.content.get("status_description")
        for event in centre.events()
        if (event.rpc, event.what) == ("PostNodepoolStatus", "request")
    ]
    assert statuses[-1] == "The appliance is stopping."


def test_a_killed_agent_is_replaced_and_its_item_answered(centre: RunningCentre, appliance: Appliance) -> None:
    """The centre hands the item out again; everybody else hears nothing of it."""
    slow(appliance.models / "slow")
    waits(centre, appliance, 2)
    (agent,) = [each for each in appliance.admin("/status")["processes"] if each["name"] == "agent"]
    with Client(centre.port, centre.pki.ca, PAT) as client:
        call = client.stub.PostModelOutputs.future(row("slow", *SLOW), metadata=client.metadata)
        centre.wait(lambda state: state["busy"], "the agent has the item")
        os.kill(agent["pid"], signal.SIGKILL)
        # While no stream is open the centre answers that the model is deploying, as it does for every dead runner.
        assert call.result(PATIENCE_S).status.code in (status_code_pb2.SUCCESS, status_code_pb2.MODEL_DEPLOYING)
        waits(centre, appliance, 2)
    assert digits(centre) == RIGHT[:1]
    assert appliance.metric("inference_appliance_requests_lost_total") == 0


# ---- the link --------------------------------------------------------------------------------------------------------


def restart(centre: RunningCentre, link: Link) -> None:
    """The centre is killed, and comes back with its state."""
    centre.restart()


def forget(centre: RunningCentre, link: Link) -> None:
    """The centre loses its state; what we are is registered again."""
    centre.restart(lose_state=True)
    centre.tell("admit", pat=PAT, user=USER)


def reset(centre: RunningCentre, link: Link) -> None:
    """Every connection is cut."""
    link.reset()


def refuse(centre: RunningCentre, link: Link) -> None:
    """The link is down for a while."""
    link.refuse()
    link.accept()


def unavailable(centre: RunningCentre, link: Link) -> None:
    """A balancer in front of the centre loses it."""
    centre.tell("break_streams", grpc_code="UNAVAILABLE")


def unknown(centre: RunningCentre, link: Link) -> None:
    """What ends the stock runner for good."""
    centre.tell("break_streams", grpc_code="UNKNOWN")


@pytest.mark.parametrize("trouble", [restart, forget, reset, refuse, unavailable, unknown])
def test_it_comes_back_after(
    centre: RunningCentre, link: Link, appliance: Appliance, trouble: Callable[[RunningCentre, Link], None]
) -> None:
    """Without a verb: all streams are there again, the control stream too, and items are answered."""
    trouble(centre, link)
    waits(centre, appliance, 1)
    assert digits(centre) == RIGHT[:1]
    appliance.wait(lambda: state_of(appliance)["connected"], "it says so")


def test_a_revoked_pat_is_said_and_a_new_one_taken(centre: RunningCentre, appliance: Appliance) -> None:
    """No restart, no reload: the file is read again."""
    centre.tell("revoke", pat=PAT)
    appliance.wait(lambda: "CONN_KEY_INVALID" in state_of(appliance)["problem"], "it names the reason")
    assert appliance.admin("/readyz")["ready"] is True, "who calls here notices nothing"
    centre.tell("admit", pat="another-token-that-nobody-may-read", user=USER)
    Path(appliance.config["orchestrator"]["pat_file"]).write_text("another-token-that-nobody-may-read")
    waits(centre, appliance, 1)
    assert "that-nobody-may-read" not in appliance.log


def test_a_link_that_is_dead_and_not_closed_is_noticed(
    centre: RunningCentre, link: Link, tmp_path: Path, make_appliance: Callable[..., Appliance]
) -> None:
    """Nothing arrives, nothing is closed: our pings find out, after keepalive_s and 20 s."""
    made = new_appliance(make_appliance, centre, f"https://localhost:{link.port}", tmp_path, keepalive_s=10)
    with made:
        waits(centre, made, 1)
        link.freeze()
        made.wait(lambda: not state_of(made)["connected"], "it notices")
        link.thaw()
        waits(centre, made, 1)
    assert digits_fail_quietly(centre)


def digits_fail_quietly(centre: RunningCentre) -> bool:
    """Without an appliance callers hear that the model is deploying; nothing waits for ever."""
    request = at_deployment(request_for("digits", [image_input(SAMPLES[0].read_bytes())]), "digits")
    with Client(centre.port, centre.pki.ca, PAT) as client:
        return client.predict(request).status.code == status_code_pb2.MODEL_DEPLOYING


def test_it_serves_and_starts_without_the_centre(
    centre: RunningCentre, link: Link, tmp_path: Path, make_appliance: Callable[..., Appliance]
) -> None:
    """The link is down from the start: ready all the same; when it comes up, the rest follows."""
    link.refuse()
    made = new_appliance(make_appliance, centre, f"https://localhost:{link.port}", tmp_path)
    key = made.new_key()
    with made:
        assert made.admin("/readyz")["not_ready"] == {}
        with Client(made.port(), made.pki.ca, key) as client:
            reply = client.predict(request_for("digits", [image_input(SAMPLES[0].read_bytes())]))
        assert reply.status.code == status_code_pb2.SUCCESS
        made.wait(lambda: "does not answer" in state_of(made).get("problem", ""), "it says what is wrong")
        link.accept()
        waits(centre, made, 1)
        assert digits(centre) == RIGHT[:1]


def test_one_process_for_everything_takes_no_work_and_says_so(
    centre: RunningCentre, tmp_path: Path, make_appliance: Callable[..., Appliance]
) -> None:
    made = new_appliance(make_appliance, centre, centre.base_url, tmp_path)
    made.write_config(processes={"mode": "single"})
    with made:
        assert "nothing is registered with the orchestrator by itself" in made.log
    assert centre.calls() == []
