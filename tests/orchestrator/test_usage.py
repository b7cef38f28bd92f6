"""What clients sent is what is reported, once: whoever is killed, whatever the receiver answers, full disks too."""

import contextlib
import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from orchestrator.connect_proxy import ConnectProxy
from support.appliance import MODELS, Appliance, Client, Pki, image_input, request_for, text_input
from support.usage_receiver import CUT, SILENCE, TAKEN, Receiver, answer

PICTURE = (MODELS / "digits" / "samples" / "held-out-000-label-2.png").read_bytes()
PRINCIPALS = ("line-3", "laptop", "default")
PAT = "fedcba9876543210"
AMOUNTS = ("calls", "calls_failed", "inputs", "inputs_failed", "bytes_in", "bytes_out")
BY = ("principal", "model", "version", "method")

REQUESTS = [
    (request_for("digits", [image_input(PICTURE)] * 2), ("digits", "1"), 0),
    (request_for("digits", [image_input(PICTURE), image_input(b"no picture")]), ("digits", "1"), 1),
    (request_for("ml-topics", [text_input("gradient descent")]), ("ml-topics", "1"), 0),
]
"""Requests, the version that answers them, and how many of their inputs fail."""

Sums = dict[tuple[str, ...], dict[str, float]]


@pytest.fixture(params=["single", "processes"])
def appliance(request: pytest.FixtureRequest, make_appliance: Callable[..., Appliance]) -> Appliance:
    """An appliance with two models and three principals, which is not started yet."""
    principals = [{"name": name} for name in PRINCIPALS if name != "default"]
    return make_appliance("digits", "ml-topics", processes={"mode": request.param, "fronts": 2}, principal=principals)


@pytest.fixture
def receiver(pki: Pki) -> Iterator[Receiver]:
    """Where it reports to."""
    with Receiver(pki.folder) as made:
        yield made


class Callers:
    """Clients, and what they know that they sent and got."""

    def __init__(self, appliance: Appliance) -> None:
        self._appliance = appliance
        self._keys = {name: appliance.new_key("--principal", name) for name in PRINCIPALS}
        self._sent: dict[tuple[str, ...], Counter[str]] = {}

    def call(self, times: int = 1) -> None:
        """Everybody everything, so many times."""
        port = self._appliance.port()
        for name, key in self._keys.items():
            with Client(port, self._appliance.pki.ca, key) as client:
                for _ in range(times):
                    for request, model, failing in REQUESTS:
                        reply = client.predict(request)
                        assert len(reply.outputs) == len(request.inputs)
                        self._note((name, *model), request, reply, failing)
                    nobody = request_for("nobody", [text_input("x")])
                    self._note((name, "", ""), nobody, client.predict(nobody), 1, inputs=0)

    def _note(self, key: tuple[str, ...], request: Any, reply: Any, failing: int, inputs: int | None = None) -> None:
        inputs = len(request.inputs) if inputs is None else inputs
        amounts = (1, int(failing > 0), inputs, min(failing, inputs), request.ByteSize(), reply.ByteSize())
        counts = self._sent.setdefault((*key, "PostModelOutputs"), Counter())
        counts.update(dict(zip(AMOUNTS, amounts, strict=True)))

    @property
    def sent(self) -> Sums:
        """All of it, by principal, model, version and method."""
        return {key: {name: counts[name] for name in AMOUNTS} for key, counts in self._sent.items()}


def exported(appliance: Appliance) -> Sums:
    """What `appliance usage export` says, likewise."""
    by = [word for name in BY for word in ("--by", name)]
    records = [json.loads(line) for line in appliance.command("usage", "export", *by).stdout.splitlines()]
    return {
        tuple(record[name] for name in BY): {name: record[name] for name in AMOUNTS}
        for record in records
        if record["method"] == "PostModelOutputs"
    }


def reported(receiver: Receiver) -> Sums:
    """What its records add up to, each report once."""
    sums = receiver.sums(*BY, of=AMOUNTS)
    return {key: counts for key, counts in sums.items() if key[-1] == "PostModelOutputs"}


def report_to(appliance: Appliance, receiver: Receiver, **changes: Any) -> None:
    """Configure it so."""
    section = {"usage_url": receiver.url, "root_ca": appliance.pki.ca, "usage_interval_s": 1}
    appliance.write_config(orchestrator={**section, "pat_file": appliance.home / "orchestrator.pat", **changes})


def test_every_call_is_reported_once_however_the_receiver_fails(
    appliance: Appliance, pki: Pki, make_appliance: Callable[..., Appliance]
) -> None:
    """Through a proxy, with a client certificate and the PAT; resets, half answers, 500 and 429 in between."""
    (appliance.home / "orchestrator.pat").write_text(f"{PAT}\n")
    own = {"certificate": pki.folder / "clients/line-3.crt", "key": pki.folder / "clients/line-3.key"}
    with Receiver(pki.folder, pki.ca) as receiver, ConnectProxy() as proxy:
        # Between failures one is taken, so that waits stay short.
        for bad in (None, CUT, answer("500 No"), answer("429 Later", "Retry-After: 1"), CUT):
            receiver.answers += [bad, TAKEN]
        report_to(appliance, receiver, proxy=f"http://127.0.0.1:{proxy.port}", site="hall 3", **own)
        callers = Callers(appliance)
        with appliance:
            while receiver.answers:
                callers.call()
                seen = len(receiver.posts)
                appliance.wait(lambda seen=seen: len(receiver.posts) > seen)
            appliance.wait(lambda: reported(receiver) == callers.sent, "all is reported")
            appliance.wait(lambda: exported(appliance) == callers.sent, "all is exported")
            appliance.wait(lambda: appliance.metric("inference_appliance_usage_unreported_records") == 0)
            assert appliance.metric('inference_appliance_usage_reports_total{result="failed"}') == 5
        assert PAT not in appliance.log
        assert len(receiver.posts) == len(receiver.reports()) + 5, "what was taken is not posted again"
        for post in receiver.posts:
            assert post.headers["authorization"] == f"Key {PAT}"
            assert ("URI", "spiffe://test/line-3") in post.certificate["subjectAltName"]
            assert post.content["appliance"]["site"] == "hall 3"
        assert len(proxy.asked) == len(receiver.posts)


def test_a_kill_between_commit_and_answer_costs_nothing(appliance: Appliance, receiver: Receiver) -> None:
    """The report that nobody answered is posted again by the next daemon, byte by byte."""
    receiver.answers.append(SILENCE)
    report_to(appliance, receiver)
    callers = Callers(appliance)
    appliance.start()
    callers.call()
    appliance.wait(lambda: len(receiver.posts) == 1, "it posts")
    appliance.wait(lambda: exported(appliance) == callers.sent, "the rest is written")
    assert appliance.process is not None
    appliance.process.kill()
    appliance.process.wait()
    with appliance:
        callers.call()
        appliance.wait(lambda: reported(receiver) == callers.sent, "all is reported")
    keys = [post.headers["idempotency-key"] for post in receiver.posts]
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


@pytest.mark.parametrize("appliance", ["processes"], indirect=True)
def test_a_front_that_is_killed_leaves_what_it_counted(appliance: Appliance) -> None:
    callers = Callers(appliance)
    with appliance:
        callers.call()
        fronts = {row["name"]: row["pid"] for row in appliance.admin("/status")["processes"] if "front" in row["name"]}
        for pid in fronts.values():
            os.kill(pid, signal.SIGKILL)
        appliance.wait(
            lambda: all(
                row["pid"] not in (0, fronts.get(row["name"])) and not row["problem"]
                for row in appliance.admin("/status")["processes"]
                if "front" in row["name"]
            ),
            "the fronts are replaced",
        )
        callers.call()
    assert exported(appliance) == callers.sent, "and the last is written at the end"


def test_without_a_link_it_starts_serves_and_reports_later(appliance: Appliance, receiver: Receiver) -> None:
    receiver.hang_up()
    report_to(appliance, receiver)
    callers = Callers(appliance)
    for _ in range(2):
        with appliance:
            callers.call()
            appliance.wait(lambda: "usage reports wait" in appliance.log)
        assert appliance.stop() == 0
        assert exported(appliance) == callers.sent
    receiver.listen()
    with appliance:
        appliance.wait(lambda: reported(receiver) == callers.sent, "all is reported")


@pytest.fixture
def small_state(appliance: Appliance) -> Iterator[Path]:
    """The state folder on a file system of 16 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(appliance.state)], check=False)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield appliance.state
    appliance.stop()
    subprocess.run(["umount", "-l", str(appliance.state)], check=True)


def test_a_full_disk_costs_nothing(appliance: Appliance, receiver: Receiver, small_state: Path) -> None:
    """It serves, says that it cannot write, and writes and reports what was used when there is space again."""
    report_to(appliance, receiver)
    callers = Callers(appliance)
    with appliance:
        callers.call()
        appliance.wait(lambda: reported(receiver) == callers.sent)
        with (small_state / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        failed = 'inference_appliance_usage_writes_total{result="failed"}'
        for _ in range(30):  # there may be room for the first ones in what the file has already
            callers.call()
            if appliance.metric(failed):
                break
        appliance.wait(lambda: appliance.metric(failed) > 0, "it cannot write")
        assert "usage cannot be written" in appliance.log
        assert "free some space" in appliance.log
        callers.call()
        (small_state / "filler").unlink()
        appliance.wait(lambda: reported(receiver) == callers.sent, "all is reported")
        assert "usage is written again" in appliance.log
