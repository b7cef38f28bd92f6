"""The centre is faithful: the stock runner registers with it and serves through it, the stock SDK asks through it.

Real processes, unchanged: `clarifai model serve` of clarifai 12.5.0 with clarifai-protocol, and the SDK.
"""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import ENVIRONMENT, MODEL_URL, PAT, STOCK, StockRunner, environment
from orchestrator.transcript import compare, transcript
from support.appliance import PATIENCE_S, Client
from support.stock import executable
from support.waiting import eventually

pytestmark = pytest.mark.clients


@pytest.fixture
def runner(centre: RunningCentre, tmp_path: Path) -> Iterator[StockRunner]:
    """A stock runner that is registered and waits for items."""
    with StockRunner(centre, tmp_path / "runner") as made:
        yield made.ready()


def request(method: str, text: str) -> service_pb2.PostModelOutputsRequest:
    """A call of a method of the model with one text."""
    data = resources_pb2.Data(
        parts=[resources_pb2.Part(id="text", data=resources_pb2.Data(string_value=text))],
        metadata={"_method_name": method},
    )
    return service_pb2.PostModelOutputsRequest(
        user_app_id=resources_pb2.UserAppIDSet(user_id="acme", app_id="plant"),
        model_id="echo",
        inputs=[resources_pb2.Input(data=data)],
    )


def test_stock_runner_registers_as_the_committed_transcripts_say(centre: RunningCentre, tmp_path: Path) -> None:
    """First on a fresh account, then a second time, when everything is there."""
    with StockRunner(centre, tmp_path / "runner") as runner:
        runner.ready()
        compare("stock-registers.json", transcript(centre.events()))
    last = centre.last_event()
    with StockRunner(centre, tmp_path / "runner") as runner:
        runner.ready()
        compare("stock-registers-again.json", transcript(centre.events(last)))


def test_nothing_written_down_shows_the_token(centre: RunningCentre, runner: StockRunner) -> None:
    """The runner sends it with every call, and once inside a message."""
    assert any(event.rpc == "PostComputeClusters" and event.what == "request" for event in centre.events())
    for file in centre.home.glob("*.sqlite*"):
        assert PAT.encode() not in file.read_bytes(), f"{file} has the token"
    assert PAT not in centre.log


def test_stock_sdk_gets_the_runners_answers(centre: RunningCentre, runner: StockRunner, tmp_path: Path) -> None:
    """Every kind of method, by deployment, by nodepool and by default."""
    done = subprocess.run(
        [executable(ENVIRONMENT), STOCK / "ask.py", centre.base_url, centre.pki.ca, MODEL_URL, "local-echo"],
        env=environment(centre, tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr + runner.log
    found = json.loads(done.stdout.splitlines()[-1])
    assert "no luck here" in found.pop("fail")
    assert "does not exist" in found.pop("unknown deployment")
    assert found == {
        "methods": ["fail", "letters", "lines", "predict", "wait"],
        "predict": "desserts",
        "batch": ["eno", "owt"],
        "classic": ["eno", "owt"],
        "generate": ["a", "b", "c"],
        "stream": ["A", "BC"],
        "at a nodepool": "reward",
        "by default": "regal",
    }


def test_one_item_a_stream_and_a_fresh_stream_after_it(centre: RunningCentre, runner: StockRunner) -> None:
    """What the agent must do alike (PROTOCOL 5.3): hello, outputs under the item's id, half-close, the next stream."""
    last = centre.last_event()
    with Client(centre.port, centre.pki.ca, PAT) as client:
        assert client.predict(request("predict", "abc")).outputs[0].data.parts[0].data.string_value == "cba"
    runner.ready()
    streams = [event for event in centre.events(last) if event.rpc == "ProcessRunnerItems"]
    served = next(event.call for event in streams if event.what == "reply")
    (item,) = next(event.content["runner_items"] for event in streams if event.what == "reply")
    said = [event.content for event in streams if event.call == served and event.what == "request"]
    assert [(message["runner_item_id"], message["status"]["code"]) for message in said] == [(item["id"], "SUCCESS")]
    compare("stock-answers.json", [dict.fromkeys(said[0], "")])
    assert [event.content["outcome"] for event in streams if event.call == served and event.what == "end"] == ["OK"]
    assert sum(event.what == "open" for event in streams) == 1


def test_a_caller_that_leaves_reaches_the_model(centre: RunningCentre, runner: StockRunner) -> None:
    """The control stream carries the cancellation."""
    with Client(centre.port, centre.pki.ca, PAT) as client:
        call = client.stub.PostModelOutputs.future(request("wait", "long"), metadata=client.metadata)
        eventually((runner.marks / "long-began").exists, PATIENCE_S, "the model has the item")
        call.cancel()
        eventually((runner.marks / "long-cancelled").exists, PATIENCE_S, "the model heard of the cancellation")
    assert centre.state()["counts"]["cancelled"] == 1


def test_runner_comes_back_after_a_restart_of_the_centre(centre: RunningCentre, runner: StockRunner) -> None:
    """Its own recovery, unchanged; the centre's state survives being killed. Its control stream does not come back."""
    centre.restart()
    runner.ready(control=False)
    with Client(centre.port, centre.pki.ca, PAT) as client:
        assert client.predict(request("predict", "ab")).outputs[0].data.parts[0].data.string_value == "ba"


def test_an_item_of_a_killed_runner_goes_to_another(centre: RunningCentre, runner: StockRunner, tmp_path: Path) -> None:
    """Two replicas of one runner; nobody saw an output of the item yet, so it is handed out again."""
    other = StockRunner(centre, tmp_path / "runner-2")
    (other.home / ".config").parent.mkdir(parents=True)
    config = runner.home / ".config"
    if config.exists():
        subprocess.run(["cp", "-r", config, other.home], check=True)
    with Client(centre.port, centre.pki.ca, PAT) as client, other:
        call = client.stub.PostModelOutputs.future(request("wait", "x"), metadata=client.metadata)
        eventually((runner.marks / "x-began").exists, PATIENCE_S, "the first has it")
        centre.wait(lambda state: len(state["replicas"]) == 2, "both wait for items")
        runner.stop(signal.SIGKILL)
        eventually((other.marks / "x-began").exists, PATIENCE_S, f"the second has it\n{other.log}")
        call.cancel()
        eventually((other.marks / "x-cancelled").exists, PATIENCE_S, "and hears of its end")
