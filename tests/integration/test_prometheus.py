"""The page as a real Prometheus sees it: Debian's package, its linter and its server.

Skipped with a reason where the package is not installed; `.ci/run` installs it.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.appliance import MODELS, Appliance, Client, Pki, image_input, mode, request_for
from support.prometheus import Prometheus, needs_prometheus

from appliance.core.metrics import PREFIX, Metrics

Make = Callable[..., Appliance]

DIGIT = (MODELS / "digits" / "samples" / "held-out-000-label-2.png").read_bytes()
PREDICT = request_for("digits", [image_input(DIGIT)])

pytestmark = needs_prometheus


@pytest.fixture(scope="module")
def transport() -> Iterator[str]:
    """Several processes: what one page makes of them is the harder case."""
    with mode("processes"):
        yield "native"


def test_promtool_finds_no_fault_in_the_page(appliance: Appliance, pki: Pki) -> None:
    """In the older format, which is what it reads; after calls, failures, and with every family that there is."""
    with Client(appliance.port(), pki.ca, appliance.key) as client:
        client.predict(PREDICT)
        client.predict(request_for("digits", [image_input(b"no picture")]))
    check = subprocess.run(
        ["promtool", "check", "metrics"], input=appliance.metrics(), text=True, capture_output=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_prometheus_keeps_what_the_page_says(appliance: Appliance, pki: Pki, tmp_path: Path) -> None:
    """Series with their values, types and help; exemplars with the ids that callers were told."""
    target = f"127.0.0.1:{appliance.port('admin.listen')}"
    with (
        Prometheus(tmp_path / "prometheus", target) as prometheus,
        Client(appliance.port(), pki.ca, appliance.key) as client,
    ):
        prometheus.wait(lambda: prometheus.value("up") == 1, "a first scrape")
        begun = time.time()
        told = {client.predict(PREDICT).status.req_id for _ in range(5)}
        failed = client.predict(request_for("digits", [image_input(b"no picture")])).status.req_id
        succeeded = f'{PREFIX}_requests_total{{model="digits",method="PostModelOutputs",code="10000"}}'
        prometheus.wait(lambda: prometheus.value(succeeded) == 5, "a scrape after the calls")

        def exemplars(name: str) -> set[str]:
            span = {"start": str(begun - 1), "end": str(time.time() + 1)}
            found = prometheus.ask("/query_exemplars", query=name, **span)
            return {each["labels"]["req_id"] for series in found for each in series["exemplars"]}

        prometheus.wait(lambda: exemplars(f"{PREFIX}_requests_total") == {failed}, "the failed call's exemplar")
        found = exemplars(f"{PREFIX}_request_seconds_bucket")
        assert found
        assert found <= told | {failed}
        metadata = prometheus.ask("/metadata")
        for name, family in Metrics().families.items():
            (entry,) = metadata[f"{PREFIX}_{name}"]
            assert (entry["type"], entry["help"]) == (family.kind, family.text)
        quantile = f"histogram_quantile(0.99, sum by (le) ({PREFIX}_request_seconds_bucket))"
        prometheus.wait(lambda: 0 < (prometheus.value(quantile) or 0) < 60, "a quantile of the durations")


@pytest.mark.parametrize("credentials", ["bearer", "certificate"])
def test_prometheus_scrapes_from_another_machine(
    make_appliance: Make, pki: Pki, tmp_path: Path, credentials: str
) -> None:
    """Over TLS, with the configuration that docs/metrics.md shows."""
    principal = {"name": "prometheus", "identities": ["uri:spiffe://test/line-3"], "models": []}
    appliance = make_appliance(
        "digits", principal=[principal], admin={"listen": "0.0.0.0:0", "principals": ["prometheus"]}
    )
    tls: dict[str, str] = {"ca_file": str(pki.ca)}
    scrape: dict[str, Any] = {"scheme": "https", "tls_config": tls}
    if credentials == "bearer":
        key = tmp_path / "key"
        key.write_text(appliance.new_key("--principal", "prometheus"), encoding="utf-8")
        scrape["authorization"] = {"credentials_file": str(key)}
    else:
        folder = pki.folder / "clients"
        tls |= {"cert_file": str(folder / "line-3.crt"), "key_file": str(folder / "line-3.key")}
    with appliance:
        target = f"localhost:{appliance.port('admin.listen')}"
        with Prometheus(tmp_path / "prometheus", target, **scrape) as prometheus:
            prometheus.wait(lambda: prometheus.value("up") == 1, "a scrape over TLS")
            prometheus.wait(lambda: prometheus.value(f"{PREFIX}_keys") is not None, "its samples")
