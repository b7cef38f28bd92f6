"""A site in network namespaces: three appliances, each on a machine of its own as far as the network goes, a balancer,
a centre. Things go wrong under load, and what callers heard of it is told.

Run by `conftest.py` as `python -m fleet.site FOLDER OUT PARTS` where only the loopback device is there. OUT gets a
JSON object: part → what was seen, or an "error".
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fleet.balancers import ADDRESS, ENVOY, Balancer
from fleet.callers import over_grpc, over_rest
from fleet.quota import Quotas, cpu_s, reason_not
from orchestrator.enrolled import SLOW, deployment_of, enrolled_with
from orchestrator.enrolled import row as row_at_deployment
from orchestrator.enrolled import slow as write_slow
from orchestrator.running import RunningCentre
from orchestrator.stock_runner import PAT, USER
from support import graphs
from support.appliance import MODELS, PATIENCE_S, ROOT, Appliance, array_input, make_pki, request_for
from support.callers import Begin, Callers

NAME = "edge.example.com"
SERVERS = {f"edge-{number}": f"10.83.0.{10 + number}" for number in (1, 2, 3)}
VISITOR = "10.83.7.7"
"""Another address of this end: a client that is not the balancer."""
PICTURE = sorted((MODELS / "digits" / "samples").glob("*.png"))[0]
NEXT_VERSION = "0.1.1.fleet"
WHO = ("direct", "deployment", "REST", "no policy")
"""Who calls: through the balancer; the centre; the balancer; the balancer, where the others try again."""

_REST = "/v2/users/appliance/apps/main/models/digits/outputs"
_SLOW_ROUNDS = 200
_PAUSE_S = 0.02
"""Between two calls of a loop, so that the machine keeps some CPU for the rest."""
_CALLS = 40
"""Calls of each kind that must be answered before, during and after a trouble."""


def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
    """Return when it is true; balancers are asked less often than `support.waiting` asks."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < patience_s, f"{what}: not within {patience_s:g} s"
        time.sleep(0.02)


def ip(*words: str) -> None:
    """iproute2."""
    subprocess.run(["ip", *words], check=True)


def paced(begin: Begin, count: int, pause_s: float = _PAUSE_S) -> Callers:
    """Callers who wait so long between two calls."""
    return Callers([begin] * count, lambda end: pause_s)


class Site:
    """Everything, from `with` on; all appliances run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pki = make_pki(folder / "tls", names=(NAME, "localhost", ADDRESS))
        # A partition silences streams; whoever has given an item to one must find out.
        settings = {"listen": f"{ADDRESS}:0", "keepalive_s": 2, "patience_s": 10}
        self.centre = RunningCentre(folder / "centre", self.pki, settings)
        self.appliances: dict[str, Appliance] = {}
        self.key = ""

    def __enter__(self) -> "Site":
        self._make_network()
        self.centre.start()
        self.centre.tell("admit", pat=PAT, user=USER)
        for name in SERVERS:
            self.appliances[name] = self._make_appliance(name)
        first, *others = self.appliances.values()
        self.key = first.new_key()
        for other in others:
            shutil.copy(first.home / "keys.json", other.home / "keys.json")
            other.spawn()
        first.spawn()
        for name in SERVERS:
            self._ready(name)
        return self

    def __exit__(self, *_: object) -> None:
        for appliance in self.appliances.values():
            if appliance.process is not None:
                appliance.process.kill()
                appliance.process.wait(PATIENCE_S)
        self.centre.stop()

    def _make_network(self) -> None:
        """A cable from here to each appliance."""
        ip("address", "add", f"{VISITOR}/32", "dev", "lo")
        for name, address in SERVERS.items():
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("address", "add", ADDRESS, "peer", address, "dev", name)
            ip("link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", address, "peer", ADDRESS, "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "route", "add", "default", "via", ADDRESS)

    def _make_appliance(self, name: str) -> Appliance:
        home = self.folder / name
        home.mkdir()
        made = Appliance(
            home,
            self.pki,
            {
                "server": {
                    "base_url": f"https://{NAME}",
                    "listen": "0.0.0.0:8443",
                    "trusted_proxies": [ADDRESS],
                    "load_reports": True,
                },
                "shutdown": {"lame_duck_s": 3, "drain_s": 20},
                "processes": {"mode": "auto", "fronts": 1},
                "catalog": {"user_id": USER},
                "placement": {"compute_cluster_id": "plants", "nodepool_id": "hall-3"},
                "orchestrator": enrolled_with(f"https://{ADDRESS}:{self.centre.port}", self.centre, home),
            },
            transport="native",
            mode="",
            through=("ip", "netns", "exec", name),
        )
        shutil.copytree(MODELS / "digits", made.models / "digits")
        write_slow(made.models / "slow", _SLOW_ROUNDS)
        return made

    # ---- what happens to an appliance ----

    def start(self, name: str, tree: Path | None = None) -> None:
        """Start it, and return when it is ready and takes work. Args: tree: where another version of us is."""
        appliance = self.appliances[name]
        appliance.spawn({} if tree is None else {"PYTHONPATH": os.pathsep.join([str(tree), str(ROOT / "tests")])})
        self._ready(name)

    def _ready(self, name: str) -> None:
        appliance = self.appliances[name]
        appliance.wait(lambda: appliance.admin("/readyz").get("ready") is True, "it is ready")
        appliance.wait(lambda: appliance.admin("/status")["orchestrator"]["connected"], "it is connected")

    def next_version(self) -> Path:
        """Where another version of us is; the next start of edge-1 has another configuration too."""
        tree = self.folder / "next"
        if not tree.exists():
            shutil.copytree(ROOT / "appliance", tree / "appliance")
            file = tree / "appliance" / "__init__.py"
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace('__version__ = "', f'__version__ = "{NEXT_VERSION}"  # "'), encoding="utf-8")
        self.appliances["edge-1"].write_config(limits={"inputs_per_request": 64})
        return tree

    def drain(self, name: str) -> None:
        """Have it end in good order; once, as a second signal would mean: now."""
        self.appliances[name].signal(signal.SIGTERM)

    def gone(self, name: str) -> None:
        """Return when it has drained."""
        process = self.appliances[name].process
        assert process is not None
        assert process.wait(PATIENCE_S) == 0, self.appliances[name].log

    def kill(self, name: str) -> None:
        """End it as a power cut would, but for the network's last words."""
        process = self.appliances[name].process
        assert process is not None
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)

    def cut(self, name: str) -> None:
        """Nothing arrives any more, either way, and nobody is told."""
        for place, device in ((), name), (("-n", name), "eth0"):
            subprocess.run(["tc", *place, "qdisc", "replace", "dev", device, "root", "pfifo", "limit", "0"], check=True)

    def mend(self, name: str) -> None:
        """The cable is whole again."""
        for place, device in ((), name), (("-n", name), "eth0"):
            subprocess.run(["tc", *place, "qdisc", "del", "dev", device, "root"], check=True)

    def metric(self, name: str, sample: str) -> float:
        """A sample of an appliance's page, 0 when it has none."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.appliances[name].home / "admin.sock"))) as client:
            lines = client.get("http://appliance/metrics", timeout=PATIENCE_S).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(sample))

    # ---- who calls ----

    @property
    def _row(self) -> Any:
        rows = array_input(np.array(SLOW, np.float32))
        return request_for("slow", [rows], user=graphs.USER, app=graphs.APP)

    def callers(self, count: int, *, retries: bool, pause_s: float = _PAUSE_S) -> Callers:
        """gRPC through the balancer."""
        return paced(over_grpc(f"{ADDRESS}:443", self.pki.ca, self.key, self._row, retries=retries), count, pause_s)

    def rest_callers(self, count: int) -> Callers:
        """REST through the balancer."""
        return paced(over_rest(f"https://{ADDRESS}", self.pki.ca, self.key, _REST, PICTURE), count)

    def callers_of_the_centre(self, count: int, *, retries: bool) -> Callers:
        """gRPC at the orchestrator, whose items the appliances share."""
        request = row_at_deployment("slow", *SLOW)
        assert request.runner_selector.deployment.id == deployment_of("slow")
        target = f"{ADDRESS}:{self.centre.port}"
        return paced(over_grpc(target, self.pki.ca, PAT, request, retries=retries), count)


def more(callers: list[Callers], count: int = _CALLS) -> None:
    """Return when each kind has had so many more answers."""
    for each in callers:
        goal = each.answered + count
        until(lambda each=each, goal=goal: each.answered >= goal, f"{count} more answers; {each.ends}")


# ---- the parts -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def balanced(site: Site, kind: str, name: str) -> Iterator[Balancer]:
    """A balancer that has found all appliances."""
    with Balancer(kind, name, site.folder / f"{kind}-{name}", site.pki, SERVERS) as balancer:
        try:
            until(lambda: balancer.up() == set(SERVERS), f"all are up; {kind} says", 30)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{balancer.log[-4000:]}") from error
        yield balancer


def door(kind: str, file: str, site: Site) -> dict[str, Any]:
    """REST of a stranger, and whom the appliances take him for."""
    with balanced(site, kind, file):
        statuses = set()
        context = httpx.create_ssl_context(verify=str(site.pki.ca))
        for _ in range(12):  # connections of their own, so that every appliance has some
            transport = httpx.HTTPTransport(verify=context, local_address=VISITOR)
            with httpx.Client(transport=transport, base_url=f"https://{ADDRESS}", timeout=PATIENCE_S) as client:
                statuses.add(client.get("/readyz").status_code)
                client.post(_REST, json={"inputs": []}, headers={"authorization": "Key wrong"})
        saw = [name for name, each in site.appliances.items() if VISITOR in each.log]
    return {"readyz": list(statuses), "saw the visitor": saw}


def trouble(kind: str, file: str, what: str, site: Site) -> dict[str, Any]:
    """What everybody heard while it happened to edge-1. Where it ends in good order nobody tries a call twice."""
    happens, orderly = TROUBLES[what]
    kinds = {
        "direct": site.callers(4, retries=not orderly),
        "deployment": site.callers_of_the_centre(2, retries=not orderly),
        **({"REST": site.rest_callers(2)} if orderly else {"no policy": site.callers(4, retries=False)}),
    }
    bound = [kinds["direct"], kinds["deployment"]]
    with balanced(site, kind, file) as balancer, contextlib.ExitStack() as stack:
        for callers in kinds.values():
            stack.enter_context(callers)
        more(bound)
        begun = time.monotonic()
        happens(site)
        until(lambda: "edge-1" not in balancer.up(), "it is out")
        noticed_s = time.monotonic() - begun
        if orderly:
            site.gone("edge-1")
        more(bound)
        if what == "partitioned":
            site.mend("edge-1")
        else:
            site.start("edge-1", site.next_version() if what == "upgraded" else None)
        until(lambda: balancer.up() == set(SERVERS), "it is back")
        more(bound)
    return {
        "noticed_s": round(noticed_s, 1),
        "calls": {name: callers.told() for name, callers in kinds.items()},
        "version": site.appliances["edge-1"].admin("/status")["version"],
    }


TROUBLES: dict[str, tuple[Callable[[Site], None], bool]] = {
    "drained": (lambda site: site.drain("edge-1"), True),
    "upgraded": (lambda site: site.drain("edge-1"), True),
    "killed": (lambda site: site.kill("edge-1"), False),
    "partitioned": (lambda site: site.cut("edge-1"), False),
}
"""What can happen → what does it, and whether the appliance ends in good order."""


def shared(site: Site) -> dict[str, Any]:
    """The items of one runner go to all appliances of the nodepool."""
    sample = 'inference_appliance_orchestrator_items_total{model="slow",outcome="answered",version="1"}'
    site.centre.wait(lambda state: len(state["replicas"]) == len(SERVERS), "all of them take work")
    before = {name: site.metric(name, sample) for name in SERVERS}
    with site.callers_of_the_centre(6, retries=False) as callers:
        more([callers], 300)
    answered = {name: site.metric(name, sample) - before[name] for name in SERVERS}
    return {"answered": answered, "calls": callers.told()}


def weighed(site: Site) -> dict[str, Any]:
    """Envoy weighs by the load reports: the appliance that has least CPU has the smallest weight."""
    with balanced(site, "envoy", "re-encrypt.yaml") as balancer, Quotas(site.folder) as quotas:
        quotas.bound("edge-1", _pid(site, "edge-1"), 0.1)
        with site.callers(6, retries=True, pause_s=0.0) as callers:
            until(lambda: len(set(balancer.weights().values())) > 1, "weights differ", 60)
            more([callers], 200)
            weights = balancer.weights()
        return {"weights": weights, "calls": callers.told()}


def scaled(site: Site) -> list[dict[str, Any]]:
    """Throughput with one, two and three appliances, each with the same part of a CPU."""
    rows = []
    with balanced(site, "haproxy", "re-encrypt.cfg") as balancer, Quotas(site.folder) as quotas:
        for name in SERVERS:
            quotas.bound(name, _pid(site, name), _SHARE)
        for count in (1, 2, 3):
            for place, name in enumerate(SERVERS):
                balancer.tell(f"set server appliances/{name} state {'ready' if place < count else 'maint'}")
            until(lambda count=count: len(balancer.up()) == count, f"{count} are up")
            with site.callers(4 * count, retries=True, pause_s=0.0) as callers:
                more([callers], 20 * count)  # until all are at work
                quotas.restart()
                begun, before, answered = time.monotonic(), cpu_s(balancer.pid), callers.answered
                ours = time.process_time()
                time.sleep(_SCALE_S)
                seconds, done = time.monotonic() - begun, callers.answered - answered
                spent_s = sum(quotas.spent_s(name) for name in list(SERVERS)[:count])
                balancer_s, callers_s = cpu_s(balancer.pid) - before, time.process_time() - ours
            rows.append(
                {
                    "appliances": count,
                    "per_s": done / seconds,
                    "appliance_ms": 1000 * spent_s / done,
                    "balancer_ms": 1000 * balancer_s / done,
                    "callers_ms": 1000 * callers_s / done,
                    "others": callers.told()["others"],
                }
            )
    return rows


_SHARE, _SCALE_S = 0.2, 10.0
"""CPUs that each appliance may use; seconds of one measurement."""


def _pid(site: Site, name: str) -> int:
    process = site.appliances[name].process
    assert process is not None
    return process.pid


def parts() -> Iterator[tuple[str, Callable[[Site], Any]]]:
    """Name of a part → what does it."""
    files = [("haproxy", "re-encrypt.cfg"), ("haproxy", "pass-through.cfg")]
    files += [("envoy", "re-encrypt.yaml"), ("envoy", "pass-through.yaml")] if ENVOY.exists() else []
    for kind, file in files:
        yield f"{kind} {file} door", functools.partial(door, kind, file)
        for what in TROUBLES:
            yield f"{kind} {file} {what}", functools.partial(trouble, kind, file, what)
    yield "shared", shared
    if not reason_not():
        yield "scaled", scaled
        if ENVOY.exists():
            yield "weighed", weighed


def main(folder: Path, out: Path, chosen: str) -> None:
    """Every part in whose name the pattern `chosen` is found."""
    found: dict[str, Any] = {}
    begun = time.monotonic()
    with Site(folder) as site:
        print(f"{time.monotonic() - begun:6.1f} s  until all were ready", file=sys.stderr, flush=True)
        for name, part in parts():
            if not re.search(chosen, name):
                continue
            begun = time.monotonic()
            try:
                found[name] = part(site)
            except Exception:
                logs = {each: appliance.log[-3000:] for each, appliance in site.appliances.items()}
                found[name] = {"error": traceback.format_exc(), "logs": logs}
            print(f"{time.monotonic() - begun:6.1f} s  {name}", file=sys.stderr, flush=True)
            out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
