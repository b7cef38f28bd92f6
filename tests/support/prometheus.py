"""A real Prometheus, Debian's package; who wants one is skipped with a reason where it is not installed."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.appliance import PATIENCE_S

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed; on Debian: apt-get install prometheus",
)
"""`.ci/run` installs it."""


class Prometheus:
    """A server with appliances as its targets, seen over its HTTP API."""

    def __init__(self, folder: Path, *targets: str, rules: Path | None = None, **scrape: Any) -> None:
        """Args: targets: "host:port" each. rules: a file of rules. scrape: more of its scrape configuration."""
        folder.mkdir()
        job = {"job_name": "appliance", "static_configs": [{"targets": targets}], **scrape}
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "scrape_configs": [job],
            "rule_files": [str(rules)] if rules else [],
        }
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
