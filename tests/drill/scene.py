"""An appliance that serves, is enrolled and is scraped by a real Prometheus, and what faults are made with."""

import contextlib
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from orchestrator.enrolled import enrolled_with
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support import graphs, secrets
from support.appliance import (
    COMMAND,
    ENVIRONMENT,
    MODELS,
    PATIENCE_S,
    ROOT,
    Appliance,
    Client,
    Load,
    Pki,
    array_input,
    image_input,
    request_for,
)
from support.callers import ANSWERED
from support.prometheus import Prometheus

RULES = ROOT / "packaging" / "prometheus" / "inference-appliance.rules.yml"
SCRAPE_S = 10
"""Seconds between two scrapes, as in docs/metrics.md; the rules say themselves how often they are evaluated."""

DAY_S = 86400
SLOW = "slow"
"""A model that answers some rows a second, one by one."""

_CALLERS, _QUEUE_ROWS = 12, 4
_DIGIT = sorted((MODELS / "digits" / "samples").glob("*.png"))[0].read_bytes()


class Clock:
    """A clock for some processes that can be set (clock.c)."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock.so", folder / "set-by"
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
        self._file.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_SET_BY": str(self._file)}

    def set_by(self, seconds: int) -> None:
        """From now on it is so much later than it is."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("=q", seconds))

    def command(self, *arguments: str | Path) -> None:
        """Run the `appliance` command by that clock."""
        command = [str(COMMAND), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, env={**ENVIRONMENT, **self.environment})


@dataclass
class Scene:
    """All of it.

    Attributes:
        callers: more than a model's queue has room for, all of "greedy".
        keys: by principal: "line-3", who does nothing wrong, and "greedy".
    """

    appliance: Appliance
    prometheus: Prometheus
    centre: RunningCentre
    clock: Clock
    keys: Mapping[str, str]
    callers: Load

    def __post_init__(self) -> None:
        self._page = f"http://127.0.0.1:{self.appliance.port('admin.listen')}/status.json"

    def page(self) -> dict[str, Any]:
        """What the status page shows."""
        found: dict[str, Any] = httpx.get(self._page, timeout=PATIENCE_S).json()
        return found

    def alerts(self) -> dict[str, dict[str, Any]]:
        """Alerts that are pending or firing, by name."""
        return {each["labels"]["alertname"]: each for each in self.prometheus.ask("/alerts")["alerts"]}

    def said(self, *arguments: str | Path, check: bool = True) -> str:
        """What the `appliance` command says, with this configuration."""
        done = self.appliance.command(*arguments, check=check)
        return done.stdout + done.stderr

    def predict(self) -> int:
        """The status of a call of somebody who has done nothing wrong."""
        with Client(self.appliance.port(), self.appliance.pki.ca, self.keys["line-3"]) as client:
            code: int = client.predict(request_for("digits", [image_input(_DIGIT)])).status.code
            return code


@contextlib.contextmanager
def opened(home: Path) -> Iterator[Scene]:
    """One in which all is well, and everybody says so."""
    with contextlib.ExitStack() as stack:
        clock = Clock(home)
        pki = _old_pki(clock, home / "tls")
        centre = stack.enter_context(RunningCentre(home / "centre", pki))
        secrets.never_to_be_written(PAT)
        centre.tell("admit", pat=PAT, user=USER)
        appliance = _appliance(home, centre, clock)
        _mount(appliance.state, stack)
        keys = {name: appliance.new_key("--principal", name) for name in ("line-3", "greedy")}
        stack.enter_context(appliance)
        target = f"127.0.0.1:{appliance.port('admin.listen')}"
        times = {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}
        prometheus = stack.enter_context(Prometheus(home / "prometheus", target, rules=RULES, **times))
        callers = _greedy(appliance, keys["greedy"])
        stack.callback(callers.stop)
        scene = Scene(appliance, prometheus, centre, clock, keys, callers)
        appliance.wait(lambda: scene.page()["health"] == "healthy", "all is well")
        appliance.wait(lambda: scene.predict() == 10000, "calls are answered")
        # What grows is seen to grow only where it was scraped before.
        prometheus.wait(lambda: (prometheus.value("count_over_time(up[5m])") or 0) >= 2, "two scrapes")
        prometheus.wait(lambda: not scene.alerts(), "no alert")
        yield scene


def _old_pki(clock: Clock, folder: Path) -> Pki:
    """A root of 200 days ago, a certificate that was issued now, and `old`, which ends in 36 hours."""
    names = ("--san", "localhost", "--san", "127.0.0.1", "--days", "90")
    clock.set_by(-200 * DAY_S)
    clock.command("certs", "init", "--dir", folder)
    clock.set_by(-177 * DAY_S // 2)
    clock.command("certs", "issue", "server", "--dir", folder, *names)
    for kind in ("crt", "key"):
        (folder / f"server.{kind}").rename(folder / f"old.{kind}")
    clock.set_by(0)
    clock.command("certs", "issue", "server", "--dir", folder, *names)
    return Pki(folder)


def _appliance(home: Path, centre: RunningCentre, clock: Clock) -> Appliance:
    """One that lives by that clock; it is not started."""
    config = {
        "orchestrator": enrolled_with(centre.base_url, centre, home, streams=1),
        "placement": {"compute_cluster_id": "plants", "nodepool_id": "hall-3"},
        "processes": {"mode": "processes", "fronts": 2},
        "engine": {"queue_rows": _QUEUE_ROWS, "parallel": 1},
        "principal": [{"name": "line-3"}, {"name": "greedy"}],
        "metrics": {"principals": 10},
    }
    through = ("env", *(f"{name}={value}" for name, value in clock.environment.items()))
    made = Appliance(home / "appliance", centre.pki, config, transport="native", through=through)
    shutil.copytree(MODELS / "digits", made.models / "digits")
    graphs.write_raw(made.models / SLOW, graphs.slow_model(1000, 512), batching={"max_rows": 1})
    return made


def _greedy(appliance: Appliance, key: str) -> Load:
    """Callers that are not started; who is told to try again waits for half a second."""
    request = request_for(SLOW, [array_input(np.ones(512, np.float32))], user=graphs.USER, app=graphs.APP)
    calls = appliance.port(), appliance.pki.ca, key, request
    return Load(*calls, callers=_CALLERS, pause_s=lambda end: 0.0 if end == ANSWERED else 0.5)


def _mount(folder: Path, stack: contextlib.ExitStack) -> None:
    """Have a small file system there."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here, so that no disk can be filled; run it as root")
    stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
