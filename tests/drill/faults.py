"""The faults: how each is made, where it is seen, and what its page of the runbook says."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from drill.scene import DAY_S, RULES, SLOW, Scene
from support.appliance import MODELS

_ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


@dataclass(frozen=True)
class Fault:
    """One fault, where it is seen, and what the runbook says.

    Attributes:
        metric: an expression that has a value while it is there.
        alerts: what tells of it; the first one's page is followed.
        log: part of a line, as a regular expression.
        reason: `what` and `runbook` of a reason on the status page.
        inject: makes it.
        mend: looks where the runbook says, and does what it says.
        proof: holds when all is well again.
        fixed_by: in words.
    """

    metric: str
    alerts: tuple[str, ...]
    log: str
    reason: tuple[str, str]
    inject: Callable[[Scene], None]
    mend: Callable[[Scene], None]
    fixed_by: str
    proof: Callable[[Scene], None] = lambda scene: None

    @property
    def places(self) -> set[str]:
        """Where it is seen and, when it is mended, no more; a line of the log stays."""
        return {"metric", "page", *self.alerts}

    @property
    def waits_s(self) -> float:
        """Until its alerts have fired; one that waits for an hour is not waited for."""
        return max((s for s in map(patience_s, self.alerts) if s < 3600), default=0.0)


def patience_s(alert: str) -> float:
    """What the rule says: how long it must be so."""
    number, unit = re.fullmatch(r"(\d+)([smh])", _ALERTS[alert].get("for", "0s")).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def kill_engine(scene: Scene) -> None:
    pid = next(each["pid"] for each in scene.page()["processes"] if each["name"] == "engine")
    os.kill(pid, signal.SIGKILL)


def after_the_engine(scene: Scene) -> None:
    """It was replaced: the log has the sentence, and nobody is away."""
    assert "ended by SIGKILL" in scene.appliance.log
    assert "engine" not in scene.appliance.admin("/readyz")["not_ready"]


def no_call_was_lost(scene: Scene) -> None:
    assert scene.predict() == 10000
    assert scene.prometheus.value("inference_appliance_requests_lost_total") == 0


def stop_centre(scene: Scene) -> None:
    scene.centre.stop()


def start_centre(scene: Scene) -> None:
    told = json.loads(scene.said("orchestrator", "status", "--json"))
    assert (told["answers"], "UNAVAILABLE" in told["problem"]) == (False, True), told
    scene.centre.start()


def fill_disk(scene: Scene) -> None:
    """With what the runbook says may go: a TensorRT engine of an older version."""
    folder = scene.appliance.state / "cache" / "tensorrt"
    folder.mkdir(parents=True)
    with (folder / "old.engine").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def tidy_disk(scene: Scene) -> None:
    """`du` says what takes the space."""
    state = scene.appliance.state
    command = ["du", "-x", "--max-depth=2", str(state)]
    sizes = [line.split("\t") for line in subprocess.check_output(command, text=True).splitlines()]
    _, largest = max((int(kib), Path(folder)) for kib, folder in sizes if Path(folder).parents[1] == state)
    assert largest == state / "cache" / "tensorrt"
    shutil.rmtree(largest)


def audit_is_whole(scene: Scene) -> None:
    assert json.loads(scene.said("audit", "verify", "--json"))["whole"]


def add_broken_bundle(scene: Scene) -> None:
    """Its graph ends in the middle; it comes as a whole, as the runbook asks."""
    made = scene.appliance.home / "ml-topics"
    shutil.copytree(MODELS / "ml-topics", made)
    graph = made / "1" / "model.onnx"
    os.truncate(graph, graph.stat().st_size // 2)
    made.rename(scene.appliance.models / "ml-topics")


def mend_bundle(scene: Scene) -> None:
    assert "failed" in scene.said("models", "list")
    assert "problem" in scene.said("models", "inspect", "ml-topics", check=False)
    scene.said("models", "add", MODELS / "ml-topics", "--replace")


def bundle_is_served(scene: Scene) -> None:
    assert scene.appliance.state_of("ml-topics") == "ready"


def jump(scene: Scene) -> None:
    scene.clock.set_by(90)


def set_clock(scene: Scene) -> None:
    """As a time service does."""
    scene.clock.set_by(0)


def show_old_certificate(scene: Scene) -> None:
    for kind in ("key", "crt"):
        os.replace(scene.appliance.tls / f"old.{kind}", scene.appliance.tls / f"server.{kind}")


def renew_certificate(scene: Scene) -> None:
    folder = scene.appliance.tls
    assert re.search(r"\([12] days left\)", scene.said("certs", "inspect", folder / "server.crt"))
    scene.said("certs", "renew", "server", "--dir", folder)


def certificate_is_new(scene: Scene) -> None:
    """It is shown without a restart, and lasts as long as the one before did."""
    (server,) = [each for each in scene.page()["certificates"] if each["name"] == "server"]
    assert server["at"] - time.time() > 89 * DAY_S
    assert scene.prometheus.value('inference_appliance_certificate_reloads_total{result="failed"}') == 0
    assert scene.predict() == 10000


def overload(scene: Scene) -> None:
    scene.callers.start()


def limit_greedy(scene: Scene) -> None:
    """Whose queue, who calls most: then that one is limited."""
    calls = "topk(1, sum by (principal) (rate(inference_appliance_principal_requests_total[5m])))"
    (most,) = scene.prometheus.ask("/query", query=calls)["result"]
    assert most["metric"]["principal"] == "greedy"
    assert (scene.prometheus.value(f'inference_appliance_queue_rows{{model="{SLOW}"}}') or 0) > 0
    scene.appliance.write_config(principal=[{"name": "line-3"}, {"name": "greedy", "concurrency": 1}])
    scene.said("reload")


def others_are_served(scene: Scene) -> None:
    assert scene.predict() == 10000
    scene.callers.stop()


FAULTS = {
    "engine killed (SIGKILL)": Fault(
        metric='increase(inference_appliance_worker_restarts_total{process="engine",reason="signal"}[1m]) > 0',
        alerts=("ApplianceWorkerRestarts",),
        log="the engine was ended by SIGKILL",
        reason=("engine", "worker-restarts"),
        inject=kill_engine,
        mend=after_the_engine,
        proof=no_call_was_lost,
        fixed_by="itself: the engine was replaced, no call was lost",
    ),
    "orchestrator down": Fault(
        metric="inference_appliance_orchestrator_connected == 0",
        alerts=("ApplianceOrchestratorSilent",),
        log="nothing comes from the orchestrator",
        reason=("orchestrator", "orchestrator-silent"),
        inject=stop_centre,
        mend=start_centre,
        fixed_by="the orchestrator was started again; the agent connected by itself",
    ),
    "disk full": Fault(
        metric='inference_appliance_disk_free_bytes{folder="state"} / inference_appliance_disk_size_bytes < 0.1',
        alerts=("ApplianceDiskFull", "ApplianceAuditNotWritten"),
        log="disk of state: only",
        reason=("disk of state", "disk-full"),
        inject=fill_disk,
        mend=tidy_disk,
        proof=audit_is_whole,
        fixed_by="what `du` showed was removed (an old TensorRT engine); `appliance audit verify`: nothing is missing",
    ),
    "bad bundle": Fault(
        metric='inference_appliance_model_state{state="failed"} == 1',
        alerts=("ApplianceModelNotReady",),
        log="cannot be loaded",
        reason=("ml-topics:1", "model-not-ready"),
        inject=add_broken_bundle,
        mend=mend_bundle,
        proof=bundle_is_served,
        fixed_by="`appliance models add --replace` with whole files",
    ),
    "clock jump (90 s)": Fault(
        metric="abs(inference_appliance_clock_seconds - timestamp(inference_appliance_clock_seconds)) > 5",
        alerts=("ApplianceClockSkew",),
        log="the machine's clock was set",
        reason=("clock", "clock-skew"),
        inject=jump,
        mend=set_clock,
        fixed_by="the clock was set right; no restart",
    ),
    "certificate near its end (36 h)": Fault(
        metric='(inference_appliance_certificate_expiry_timestamp_seconds{role="server"} - time()) / 86400 < 14',
        alerts=("ApplianceCertificateExpiresSoon", "ApplianceCertificateExpires"),
        log="certificate server: it ends in",
        reason=("certificate server", "certificate-expires"),
        inject=show_old_certificate,
        mend=renew_certificate,
        proof=certificate_is_new,
        fixed_by="`appliance certs renew server`; taken over by itself",
    ),
    "queue overload": Fault(
        metric='increase(inference_appliance_rejected_total{reason="queue_full"}[1m]) > 0',
        alerts=("ApplianceRejects",),
        log="calls: .* were refused just now",
        reason=("calls", "rejects"),
        inject=overload,
        mend=limit_greedy,
        proof=others_are_served,
        fixed_by="`concurrency = 1` for the `[[principal]]` who calls most, `appliance reload`",
    ),
}
