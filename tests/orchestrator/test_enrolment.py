"""An appliance enrols with the centre: planned, done once, kept right, taken back; in one process and in several."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2
from orchestrator.connect_proxy import ConnectProxy
from orchestrator.link import Link
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from orchestrator.transcript import DATA, compare, transcript
from support.appliance import COMMAND, ENVIRONMENT, PATIENCE_S, Appliance, Client

CHANGES = ("Post", "Patch", "Delete")
ACME = resources_pb2.UserAppIDSet(user_id=USER)


@pytest.fixture(params=["single", "processes"])
def appliance(request: pytest.FixtureRequest, make_appliance: Callable[..., Appliance]) -> Appliance:
    """An appliance with two models, which is not started yet."""
    placement = {"compute_cluster_id": "plants", "nodepool_id": "hall-3"}
    return make_appliance("digits", "ml-topics", processes={"mode": request.param, "fronts": 1}, placement=placement)


def orchestrator(appliance: Appliance, *arguments: str, pat: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a verb of `appliance orchestrator`."""
    return subprocess.run(
        [str(COMMAND), "--config", str(appliance.file), "orchestrator", *arguments],
        input=pat,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=PATIENCE_S,
        check=False,
    )


def enrolled(appliance: Appliance, centre: RunningCentre, base_url: str = "") -> None:
    """Enrol it before it starts; its PAT lies beside its configuration."""
    appliance.write_config(orchestrator={"pat_file": appliance.home / "orchestrator.pat", "agent": False})
    where = ["--api-base", base_url or centre.base_url, "--user-id", USER, "--root-ca", str(centre.pki.ca)]
    done = orchestrator(appliance, "enroll", *where, pat=f"{PAT}\n")
    assert done.returncode == 0, done.stderr


def steps(appliance: Appliance, verb: str) -> list[str]:
    """What a verb says that it does or would do: "create nodepool", …"""
    done = orchestrator(appliance, verb, "--json")
    assert done.returncode == 0, done.stderr
    return [f"{step['verb']} {step['kind']}" for step in json.loads(done.stdout)["steps"]]


def changes(centre: RunningCentre, since: int) -> list[str]:
    """The RPCs that change something, but for the nodepool's status, in order."""
    return [rpc for rpc in centre.calls(since) if rpc.startswith(CHANGES) and rpc != "PostNodepoolStatus"]


def ask(centre: RunningCentre, rpc: str, **fields: Any) -> Any:
    """The centre's reply to an RPC."""
    with Client(centre.port, centre.pki.ca, PAT) as client:
        return client.call(rpc, getattr(service_pb2, f"{rpc}Request")(**fields))


FIRST = [
    "create compute cluster",
    "create nodepool",
    "create app",
    *["create model", "create version", "create runner", "create deployment"] * 2,
]


def test_enrolled_synced_kept_right_and_left(centre: RunningCentre, appliance: Appliance) -> None:
    enrolled(appliance, centre)
    with appliance:
        since = centre.last_event()
        assert steps(appliance, "plan") == FIRST
        assert changes(centre, since) == [], "a plan changes nothing"

        assert steps(appliance, "sync") == FIRST
        nodepool = ask(centre, "GetNodepool", user_app_id=ACME, nodepool_id="hall-3").nodepool
        assert nodepool.status == resources_pb2.Nodepool.NodepoolStatus.NODEPOOL_STATUS_READY
        assert nodepool.instance_types[0].compute_info.cpu_limit

        since = centre.last_event()
        assert steps(appliance, "plan") == steps(appliance, "sync") == []
        assert changes(centre, since) == [], "a second time does nothing"

        # Somebody takes a deployment away; it is brought back.
        ask(centre, "DeleteDeployments", user_app_id=ACME, ids=["digits"])
        assert steps(appliance, "sync") == ["create deployment"]

        # A model breaks: what is registered of it stays, as it may come back.
        graph = appliance.models / "ml-topics" / "1" / "model.onnx"
        graph.write_bytes(b"no graph")
        appliance.stop()
        appliance.start()
        appliance.wait(lambda: appliance.state_of("ml-topics") == "failed", "it does not load")
        assert steps(appliance, "plan") == []

        # A model goes; what we created for it goes.
        for file in sorted((appliance.models / "ml-topics").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        (appliance.models / "ml-topics").rmdir()
        appliance.wait(lambda: not appliance.state_of("ml-topics"), "the model is gone")
        gone = ["delete deployment", "delete runner", "delete version", "delete model"]
        assert steps(appliance, "plan") == steps(appliance, "sync") == gone

        status = json.loads(orchestrator(appliance, "status", "--json").stdout)
        assert status["answers"] is True
        assert status["differences"] == 0
        assert status["models"] == ["main/digits"]

        done = orchestrator(appliance, "leave")
        assert done.returncode == 0, done.stderr
        for rpc, field in [("ListComputeClusters", "compute_clusters"), ("ListApps", "apps")]:
            assert not getattr(ask(centre, rpc, user_app_id=ACME), field)
        assert not (appliance.home / "orchestrator.pat").exists()
    assert PAT not in appliance.log
    for file in appliance.home.rglob("*"):
        assert not file.is_file() or PAT.encode() not in file.read_bytes(), f"{file} has the token"


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
def test_leave_deletes_nothing_of_others(centre: RunningCentre, appliance: Appliance) -> None:
    """A cluster and an app that were there before stay."""
    cluster = resources_pb2.ComputeCluster(id="plants", cluster_type="local-dev")
    ask(centre, "PostComputeClusters", user_app_id=ACME, compute_clusters=[cluster])
    ask(centre, "PostApps", user_app_id=ACME, apps=[resources_pb2.App(id="main")])
    enrolled(appliance, centre)
    with appliance:
        assert steps(appliance, "sync") == [
            step for step in FIRST if step not in ("create compute cluster", "create app")
        ]
        assert orchestrator(appliance, "leave").returncode == 0
    assert [found.id for found in ask(centre, "ListComputeClusters", user_app_id=ACME).compute_clusters] == ["plants"]
    assert [found.id for found in ask(centre, "ListApps", user_app_id=ACME).apps] == ["main"]
    assert not ask(centre, "ListNodepools", user_app_id=ACME).nodepools
    assert not ask(centre, "ListModels", user_app_id=ACME).models


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
@pytest.mark.parametrize("rpc", ["PostNodepools", "PostModelVersions", "PostRunners", "PostDeployments"])
def test_a_lost_reply_leaves_nothing_behind_and_nothing_twice(
    centre: RunningCentre, appliance: Appliance, rpc: str
) -> None:
    """It was done and nobody heard of it: sync again finds it, and leave deletes it."""
    enrolled(appliance, centre)
    with appliance:
        centre.tell("fault", rpc=rpc, at="reply", grpc="UNAVAILABLE")
        broken = orchestrator(appliance, "sync")
        assert (broken.returncode, rpc in broken.stderr) == (2, True)
        steps(appliance, "sync")
        assert steps(appliance, "plan") == []
        assert len(ask(centre, "ListRunners", user_app_id=ACME).runners) == 2
        done = orchestrator(appliance, "leave")
        assert done.returncode == 0, done.stderr
    assert not ask(centre, "ListComputeClusters", user_app_id=ACME).compute_clusters
    assert not ask(centre, "ListApps", user_app_id=ACME).apps


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
def test_two_appliances_of_one_nodepool_share_runners(
    centre: RunningCentre, appliance: Appliance, make_appliance: Callable[..., Appliance]
) -> None:
    """The second one finds all but nothing to create: the same versions are replicas of the same runners."""
    second = make_appliance("digits", **appliance.config)
    enrolled(appliance, centre)
    enrolled(second, centre)
    with appliance, second:
        steps(appliance, "sync")
        assert steps(second, "sync") == []
        assert orchestrator(second, "leave").returncode == 0
        assert steps(appliance, "plan") == [], "what the first created is still there"


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
def test_calls_that_may_be_repeated_survive_a_bad_minute(centre: RunningCentre, appliance: Appliance) -> None:
    """UNAVAILABLE and throttling, and a link that is cut."""
    with Link(centre.port) as link:
        enrolled(appliance, centre, f"https://localhost:{link.port}")
        with appliance:
            centre.tell("fault", rpc="GetNodepool", grpc="UNAVAILABLE", times=2)
            throttled = status_code_pb2.StatusCode.Value("CONN_THROTTLED")
            centre.tell("fault", rpc="PostApps", status=throttled, times=1)
            assert steps(appliance, "sync")[:3] == FIRST[:3] or steps(appliance, "plan") == []
            link.refuse()
            status = json.loads(orchestrator(appliance, "status", "--json").stdout)
            assert status["answers"] is False
            assert "UNAVAILABLE" in status["problem"]


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "pat", "sentence"),
    [
        ([], "somebody-elses-token", "CONN_KEY_INVALID"),
        ([], "", "one PAT and nothing else"),
        ([], "two words", "one PAT and nothing else"),
        (["--user-id", "other"], PAT, "acts for the user 'acme'"),
        (["--proxy", "proxy:3128"], PAT, "--proxy: must be"),
        (["--pat-file", "/nowhere/pat"], None, "cannot be read from /nowhere/pat"),
    ],
)
def test_enrolment_that_cannot_be_says_why_and_writes_nothing(
    centre: RunningCentre, appliance: Appliance, arguments: list[str], pat: str | None, sentence: str
) -> None:
    appliance.write_config(orchestrator={"pat_file": appliance.home / "orchestrator.pat"})
    where = ["--api-base", centre.base_url, "--user-id", USER, "--root-ca", str(centre.pki.ca)]
    done = orchestrator(appliance, "enroll", *where, *arguments, pat=pat)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert not pat or pat not in done.stderr + done.stdout
    assert not (appliance.home / "conf.d").exists()
    assert not (appliance.home / "orchestrator.pat").exists()


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
def test_a_private_centre_sees_our_certificate(
    make_centre: Callable[..., RunningCentre], appliance: Appliance, tmp_path: Path
) -> None:
    centre = make_centre()
    centre.settings["client_ca"] = str(centre.pki.ca)
    centre.restart()
    appliance.write_config(orchestrator={"pat_file": appliance.home / "orchestrator.pat"})
    where = ["--api-base", centre.base_url, "--user-id", USER, "--root-ca", str(centre.pki.ca)]
    clients = centre.pki.folder / "clients"
    pair = ["--certificate", str(clients / "line-3.crt"), "--key", str(clients / "line-3.key")]
    assert orchestrator(appliance, "enroll", *where, pat=PAT).returncode == 2
    assert orchestrator(appliance, "enroll", *where, *pair, pat=PAT).returncode == 0
    again = orchestrator(appliance, "enroll", pat=PAT)
    assert again.returncode == 0, "a new PAT needs no options"
    assert (appliance.home / "conf.d" / "orchestrator.toml").read_text().count("=") == 5


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
def test_a_proxy_stands_between(centre: RunningCentre, appliance: Appliance, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configured one, and not that of the environment."""
    appliance.write_config(orchestrator={"pat_file": appliance.home / "orchestrator.pat"})
    where = ["--api-base", centre.base_url, "--user-id", USER, "--root-ca", str(centre.pki.ca)]
    monkeypatch.setitem(ENVIRONMENT, "https_proxy", "http://127.0.0.1:9")
    assert orchestrator(appliance, "enroll", *where, pat=PAT).returncode == 0
    with ConnectProxy() as proxy:
        done = orchestrator(appliance, "enroll", *where, "--proxy", f"http://127.0.0.1:{proxy.port}", pat=PAT)
        assert done.returncode == 0, done.stderr
    assert proxy.asked == [f"CONNECT localhost:{centre.port} HTTP/1.1"]


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
def test_it_registers_as_the_stock_runner_does(centre: RunningCentre, appliance: Appliance, tmp_path: Path) -> None:
    """The same posts in the same order, each with whatever the stock runner says in it; the transcript is committed."""
    shutil.rmtree(appliance.models / "ml-topics")
    enrolled(appliance, centre)
    since = centre.last_event()
    with appliance:
        steps(appliance, "sync")
    ours = transcript(centre.events(since))
    compare("appliance-registers.json", ours)
    stock = json.loads((DATA / "stock-registers.json").read_text(encoding="utf-8"))
    posts = [[call for call in calls if call["rpc"].startswith("Post")] for calls in (stock, ours)]
    assert [call["rpc"] for call in posts[0]] + ["PostNodepoolStatus"] == [call["rpc"] for call in posts[1]]
    for theirs, mine in zip(*posts, strict=False):
        assert lacking(theirs["sent"], mine["sent"]) == [], theirs["rpc"]


def lacking(theirs: Any, mine: Any, where: str = "") -> list[str]:
    """Fields of one message that another lacks, whatever their values."""
    if isinstance(theirs, list) and isinstance(mine, list):
        return [] if not theirs else ([where] if not mine else lacking(theirs[0], mine[0], where))
    if isinstance(theirs, dict) and isinstance(mine, dict):
        missing = [f"{where}.{name}" for name in theirs if name not in mine]
        return missing + [
            found
            for name in theirs.keys() & mine.keys()
            for found in lacking(theirs[name], mine[name], f"{where}.{name}")
        ]
    return []


@pytest.mark.parametrize("appliance", ["single"], indirect=True)
def test_two_nodepools_share_a_deployment_and_leave_it_in_any_order(
    centre: RunningCentre, appliance: Appliance, make_appliance: Callable[..., Appliance]
) -> None:
    """Who leaves takes its own nodepool out of it; what the other one uses stays, and is deleted by nobody."""
    placement = {"compute_cluster_id": "plants", "nodepool_id": "hall-4"}
    shutil.rmtree(appliance.models / "ml-topics")
    second = make_appliance("digits", **{**appliance.config, "placement": placement})
    enrolled(appliance, centre)
    enrolled(second, centre)

    def halls() -> list[str]:
        found = ask(centre, "GetDeployment", user_app_id=ACME, deployment_id="digits").deployment
        return [nodepool.id for nodepool in found.nodepools]

    with appliance, second:
        steps(appliance, "sync")
        assert steps(second, "sync") == ["create nodepool", "create runner", "change deployment"]
        assert halls() == ["hall-3", "hall-4"]
        done = orchestrator(appliance, "leave")
        assert done.returncode == 0, done.stderr
        assert "still in use, kept: version" in done.stderr
        assert halls() == ["hall-4"]
        assert steps(second, "plan") == []
        done = orchestrator(second, "leave")
        assert done.returncode == 0, done.stderr
    assert not ask(centre, "ListNodepools", user_app_id=ACME).nodepools
    assert not ask(centre, "ListRunners", user_app_id=ACME).runners
