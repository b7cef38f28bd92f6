"""The page as a real Prometheus sees it: Debian's package, its linter and its server.

Skipped with a reason where the package is not installed; `.ci/run` installs it.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.appliance import MODELS, PATIENCE_S, Appliance, Client, Pki, image_input, mode, request_for

from appliance.core.metrics import PREFIX, Metrics

Make = Callable[..., Appliance]

DIGIT = (MODELS / "digits" / "samples" / "held-out-000-label-2.png").read_bytes()
PREDICT = request_for("digits", [image_input(DIGIT)])

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed; on Debian: apt-get install prometheus",
)


@pytest.fixture(scope="module")
def transport() -> Iterator[str]:
    """Several processes: what one page makes of them is the harder case."""
    with mode("processes"):
        yield "native"


class Prometheus:
    """A server with an appliance as its target, seen over its HTTP API."""

    def __init__(self, folder: Path, target: str, **scrape: Any) -> None:
        """Args: target: "host:port". scrape: more of its scrape configuration."""
        folder.mkdir()
        job = {"job_name": "appliance", "static_configs": [{"targets": [target]}], **scrape}
        config = {"global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"}, "scrape_configs": [job]}
        file = folder / "prometheus.yml"
        file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        subprocess.run(["promtool", "check", "config", str(file)], check=True, capture_output=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._log = (folder / "log").open("wb")
        command = [
            "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
        ]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self._api = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=PATIENCE_S)

    def ask(self, page: str, **parameters: str) -> Any:
        """What the API answers."""
        content = self._api.get(page, params=parameters).raise_for_status().json()
        assert content["status"] == "success"
        return content["data"]

    def value(self, query: str) -> float | None:
        """The value of an expression that gives one, None while it gives none."""
        result = self.ask("/query", query=query)["result"]
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Return when it is true; says what was not, and what the server thinks of its target."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if condition():
                    return
            time.sleep(0.1)
        raise AssertionError(f"{what} did not happen: {self.ask('/targets')}")

    def __enter__(self) -> "Prometheus":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        self._api.close()
        self._log.close()


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
