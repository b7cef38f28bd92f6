"""The metrics page of a real daemon: the whole interface, counted once whoever counted it, and bounded."""

import os
import random
import re
import shutil
import signal
import ssl
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from clarifai_grpc.grpc.api import resources_pb2
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_page
from support.appliance import MODELS, Appliance, Client, Pki, image_input, make_pki, request_for

from appliance.core.ledger import OTHER
from appliance.core.metrics import COUNTER, PREFIX, Metrics

Make = Callable[..., Appliance]

DIGIT = (MODELS / "digits" / "samples" / "held-out-000-label-2.png").read_bytes()
PREDICT = request_for("digits", [image_input(DIGIT)])
DIGITS = {"model": "digits", "version": "1"}
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}


@pytest.fixture(scope="module", params=["single", "processes"])
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Counted in one process or in several: the page is the same. grpcio counts nothing by itself."""
    from support.appliance import mode

    with mode(request.param):
        yield "native"


class Page:
    """What a scrape says."""

    def __init__(self, appliance: Appliance) -> None:
        self.text = appliance.metrics()
        self.families: dict[str, Metric] = {family.name: family for family in read_page(self.text)}

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        full = f"{PREFIX}_{name}"
        return sum(
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == full and labels.items() <= sample.labels.items()
        )


def test_the_page_is_the_interface(appliance: Appliance, pki: Pki) -> None:
    """Every family has the name, type, help and labels of the registry, and there is no other of ours."""
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        client.predict(PREDICT)
    page, families = Page(appliance), Metrics().families
    ours = {
        name.removeprefix(f"{PREFIX}_"): family
        for name, family in page.families.items()
        if name.startswith(PREFIX) and not name.endswith("_created") and f"{PREFIX}_process_" not in name
    }
    assert set(ours) == {*families, "build_info"}
    for name, family in families.items():
        found = ours[name]
        assert (found.type, found.documentation) == (family.kind, family.text)
        for sample in found.samples:
            assert set(sample.labels) - {"le"} == set(family.label_names), sample
        if family.kind == COUNTER:
            assert all(sample.name.endswith("_total") for sample in found.samples)
    info = ours["build_info"].samples[0].labels
    assert set(info) == {"version", "onnxruntime", "metrics"}
    for name in ("resident_memory_bytes", "cpu_seconds", "open_fds", "start_time_seconds"):
        assert f"{PREFIX}_process_{name}" in page.families


def test_one_call_is_counted_once_wherever_its_time_goes(appliance: Appliance, pki: Pki) -> None:
    """Queue, decode, batch wait, compute and encode of one request, and its rows; no process adds one of its own."""
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        client.predict(request_for("digits", [image_input(DIGIT)] * 3))
    appliance.wait(lambda: Page(appliance).value("batch_rows_sum", **DIGITS) == 3)
    page = Page(appliance)
    for stage in ("decode", "queue", "batch_wait", "compute", "encode"):
        assert page.value(f"{stage}_seconds_count", **DIGITS) == 1, stage
        assert 0 <= page.value(f"{stage}_seconds_sum", **DIGITS) < 60
    assert page.value("compute_seconds_sum", **DIGITS) > 0
    assert page.value("encode_seconds_sum", **DIGITS) > 0
    method = {"method": "PostModelOutputs"}
    assert page.value("request_seconds_count", **DIGITS, **method) == 1
    assert page.value("request_seconds_sum", **DIGITS) > sum(
        page.value(f"{stage}_seconds_sum", **DIGITS) for stage in ("decode", "queue", "compute", "encode")
    )
    assert page.value("requests_total", **DIGITS, **method, code="10000") == 1
    assert page.value("inputs_total", **DIGITS, code="10000") == 3
    assert page.value("request_rows_sum", **DIGITS) == page.value("batch_rows_sum", **DIGITS) == 3
    assert page.value("in_flight_requests") == 0
    assert page.value("requests_lost_total") == 0
    assert page.value("principal_requests_total") == 0, "nobody asked for it"


def test_refusals_are_counted_by_reason(make_appliance: Make, pki: Pki) -> None:
    """Whichever step refused: the wire, the gate, the limits, a picture's decoder, or who opens URLs."""
    appliance = make_appliance("digits", limits={"request_size": "1MiB"}, urls={"hosts": ["pictures.example.com"]})
    appliance.key = appliance.new_key()
    link = resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(url="https://10.0.0.1/a.png")))
    with appliance, Client(appliance.port(), pki.ca, appliance.key) as client:
        with Client(appliance.port(), pki.ca, "no such key") as stranger:
            stranger.predict(PREDICT)
        client.predict(
            request_for("digits", [image_input(b"no picture"), image_input(DIGIT), image_input(b"nor this")])
        )
        client.predict(request_for("digits", [image_input(DIGIT)] * 129))
        client.predict(request_for("digits", [link]))
        client.predict(request_for("nothing", [image_input(DIGIT)]))
        for size in (2**20 + 2**12, 2**21):
            with pytest.raises(grpc.RpcError, match="request_size"):
                client.predict(request_for("digits", [image_input(bytes(size))]))
        url = f"https://localhost:{appliance.port()}/v2/models/digits/outputs"
        with httpx.Client(
            verify=ssl.create_default_context(cafile=pki.ca), headers={"authorization": f"Key {appliance.key}"}
        ) as web:
            assert web.post(url, content=bytes(2**21)).status_code == 413
        page = Page(appliance)
        found = {
            sample.labels["reason"]: sample.value
            for sample in page.families[f"{PREFIX}_rejected"].samples
            if sample.value and sample.name.endswith("_total")
        }
        assert found == {"auth": 1, "decode": 2, "batch_limit": 1, "ssrf": 1, "unknown_model": 1, "too_large": 3}
        assert page.value("rejected_total", reason="draining") == 0
        assert 'reason="draining"' in page.text, "what never happened is there at nought"


def test_models_and_their_files_are_shown(appliance: Appliance) -> None:
    """States, what was loaded, swaps; a version that goes leaves no gauge behind, and keeps its counts."""
    page = Page(appliance)
    info = [sample.labels for sample in page.families[f"{PREFIX}_model_info"].samples]
    (digits,) = info
    assert (digits["model"], digits["version"], digits["task"]) == ("digits", "1", "visual-classifier")
    assert re.fullmatch(r"[0-9a-f]{64}", digits["sha256"])
    assert digits["providers"] == "CPUExecutionProvider"
    assert page.value("model_loads_total", **DIGITS, result="ok") == 1
    assert page.value("catalog_versions", state="ready") == 1
    assert page.value("catalog_versions", state="failed") == 0
    assert page.value("keys") == 1
    bad = appliance.models / "broken" / "1"
    bad.mkdir(parents=True)
    (bad / "model.onnx").write_bytes(b"this is no graph")
    appliance.wait(
        lambda: (
            (page := Page(appliance)).value("catalog_versions", state="failed")
            + page.value("catalog_unreadable_bundles")
            == 1
        )
    )
    shutil.rmtree(appliance.models / "digits")
    appliance.wait(lambda: Page(appliance).value("catalog_versions", state="ready") == 0)
    page = Page(appliance)
    assert not [
        sample for sample in page.families[f"{PREFIX}_model_info"].samples if sample.labels["model"] == "digits"
    ]
    assert page.value("model_state", model="digits") == 0
    assert page.value("model_loads_total", **DIGITS, result="ok") == 1


def test_disks_clock_and_certificates_are_shown(make_appliance: Make, tmp_path: Path) -> None:
    """Certificates by role; those that change are counted by the daemon once, not by every front."""
    appliance = make_appliance("digits")
    with appliance:
        page = Page(appliance)
        disk = os.statvfs(appliance.state)
        assert page.value("disk_size_bytes", folder="state") == disk.f_blocks * disk.f_frsize
        assert 0 < page.value("disk_free_bytes", folder="models") < page.value("disk_size_bytes", folder="models")
        ends = {role: page.value("certificate_expiry_timestamp_seconds", role=role) for role in ("server", "client_ca")}
        now = page.value("clock_seconds")
        assert all(now < end for end in ends.values())
        assert page.value("certificate_reloads_total") == page.value("config_reloads_total") == 0
        assert 'config_reloads_total{result="failed"} 0.0' in page.text
        other = make_pki(tmp_path / "other")
        (appliance.tls / "server.crt").write_bytes(b"half a certificate")
        appliance.wait(lambda: Page(appliance).value("certificate_reloads_total", result="failed") == 1)
        for name in ("server.key", "server.crt"):
            (appliance.tls / name).write_bytes((other.folder / name).read_bytes())
        appliance.wait(lambda: Page(appliance).value("certificate_reloads_total", result="ok") >= 1)
        reloads = Page(appliance).value("certificate_reloads_total", result="ok")
        appliance.command("reload")
        appliance.wait(lambda: Page(appliance).value("config_reloads_total", result="ok") == 1)
        assert Page(appliance).value("certificate_reloads_total", result="ok") == reloads == 1


def test_the_last_requests_are_exemplars(appliance: Appliance, pki: Pki) -> None:
    """Under the ids that callers quote: one in the bucket of its duration, a failed one beside its count."""
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        answered = client.predict(PREDICT).status.req_id
        failed = client.predict(request_for("digits", [image_input(b"no picture")])).status.req_id
    url = f"http://127.0.0.1:{appliance.port('admin.listen')}/metrics"
    reply = httpx.get(url, headers=OPENMETRICS)
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in read_openmetrics(reply.text)}
    buckets = [s for s in families[f"{PREFIX}_request_seconds"].samples if s.exemplar and s.labels["model"] == "digits"]
    assert {s.exemplar.labels["req_id"] for s in buckets} <= {answered, failed}
    for sample in buckets:
        assert sample.exemplar.value <= float(sample.labels["le"])
    counts = [s for s in families[f"{PREFIX}_requests"].samples if s.exemplar]
    assert [(s.labels["code"], s.exemplar.labels["req_id"]) for s in counts] == [("10020", failed)]
    assert "req_id" not in Page(appliance).text, "the older format has none"


def test_workers_that_are_replaced_are_counted(make_appliance: Make, pki: Pki) -> None:
    """Their totals stay, and their gauges are those of the process that took their place."""
    appliance = make_appliance("digits")
    appliance.key = appliance.new_key()
    with appliance, Client(appliance.port(), pki.ca, appliance.key) as client:
        if appliance.admin("/status")["mode"] == "single":
            assert f"{PREFIX}_worker_up{{" not in Page(appliance).text, "there is one process, and process_… is of it"
            return
        client.predict(PREDICT)
        names = {"front 0", "front 1", "engine"}
        appliance.wait(lambda: Page(appliance).value("worker_up") == 3)
        appliance.wait(lambda: Page(appliance).value("worker_cpu_seconds_total", process="engine") > 0)
        page = Page(appliance)
        memory = page.families[f"{PREFIX}_worker_resident_memory_bytes"].samples
        assert {sample.labels["process"] for sample in memory} == names
        assert all(sample.value > 10 * 2**20 for sample in memory)
        spent = page.value("worker_cpu_seconds_total", process="engine")
        processes = {row["name"]: row["pid"] for row in appliance.admin("/status")["processes"]}
        for name in ("engine", "front 1"):
            os.kill(processes[name], signal.SIGKILL)
            appliance.wait(
                lambda name=name: Page(appliance).value("worker_restarts_total", process=name, reason="signal") == 1
            )
        appliance.wait(lambda: Page(appliance).value("worker_up") == 3)
        with Client(appliance.port(), pki.ca, appliance.key) as again:
            again.predict(PREDICT)
        appliance.wait(lambda: Page(appliance).value("compute_seconds_count", **DIGITS) == 2)
        page = Page(appliance)
        assert page.value("requests_total", code="10000", method="PostModelOutputs") == 2
        assert page.value("worker_cpu_seconds_total", process="engine") >= spent
        assert page.value("in_flight_requests") == page.value("queue_rows") == page.value("requests_lost_total") == 0


def test_principals_have_counts_of_their_own_as_far_as_is_asked(make_appliance: Make, pki: Pki) -> None:
    """The first ones of the configuration by name, all others together."""
    names = ["line-1", "line-2", "line-3"]
    appliance = make_appliance("digits", principal=[{"name": name} for name in names], metrics={"principals": 2})
    keys = {name: appliance.new_key("--principal", name) for name in names}
    with appliance:
        for name, calls in zip(names, (1, 2, 4), strict=True):
            with Client(appliance.port(), pki.ca, keys[name]) as client:
                for _ in range(calls):
                    client.predict(request_for("digits", [image_input(DIGIT)] * 2))
        page = Page(appliance)
        found = {
            sample.labels["principal"]: sample.value
            for sample in page.families[f"{PREFIX}_principal_requests"].samples
            if sample.name.endswith("_total")
        }
        assert found == {"line-1": 1, "line-2": 2, OTHER: 4}
        assert page.value("principal_inputs_total", principal=OTHER) == 8


def test_no_caller_makes_series(make_appliance: Make, pki: Pki) -> None:
    """Hammered with random models, versions, users, apps, methods, keys, headers and paths, the page has the series
    that two calls of the kind had made, and no name that a caller invented."""
    names = ["ada", "bob"]
    appliance = make_appliance("digits", principal=[{"name": name} for name in names], metrics={"principals": 5})
    keys = [appliance.new_key("--principal", name) for name in names]
    chance = random.Random(11)

    def word() -> str:
        return "zz" + "".join(chance.choices(string.ascii_lowercase + string.digits + "-_", k=12))

    def hammer(client: Client, web: httpx.Client, rounds: int) -> None:
        for _ in range(rounds):
            asked = request_for(word(), [image_input(DIGIT, word())], version=word(), user=word(), app=word())
            client.predict(asked)
            client.predict(request_for("digits", [image_input(DIGIT, word())], version=word()))
            client.predict(request_for("digits", [image_input(DIGIT)]))
            with pytest.raises(grpc.RpcError):
                client.channel.unary_unary(f"/clarifai.api.V2/{word()}")(b"", metadata=client.metadata, timeout=60)
            with pytest.raises(grpc.RpcError):
                client.channel.unary_unary(f"/{word()}.{word()}/{word()}")(b"", timeout=60)
            metadata = (("authorization", f"Key {word()}"), ("x-clarifai-request-id-prefix", word()))
            client.stub.PostModelOutputs(asked, metadata=metadata, timeout=60)
            for path in (
                f"/{word()}",
                f"/v2/models/{word()}",
                f"/v2/models/{word()}/infer",
                f"/v2/users/{word()}/apps",
            ):
                web.request(chance.choice(["GET", "POST", "PUT"]), path, headers={"x-user": word()})
            body = {"model": word(), "input": word(), "user": word()}
            web.post("/v2/ext/openai/v1/embeddings", json=body)

    def series() -> set[str]:
        return {line.rsplit(" ", 1)[0] for line in appliance.metrics().splitlines() if not line.startswith("#")}

    with (
        appliance,
        Client(appliance.port(), pki.ca, keys[0]) as client,
        Client(appliance.port(), pki.ca, keys[1]) as two,
    ):
        base = f"https://localhost:{appliance.port()}"
        headers = {"authorization": f"Key {keys[0]}"}
        with httpx.Client(verify=ssl.create_default_context(cafile=pki.ca), headers=headers, base_url=base) as web:
            for each in (client, two):
                hammer(each, web, 6)
            before = series()
            for each in (client, two, client):
                hammer(each, web, 40)
            after = series()
    assert not {name for name in after if "zz" in name}
    assert after - before == set()
