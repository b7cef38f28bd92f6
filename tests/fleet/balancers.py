"""Real balancers, run with the files that we ship: their example addresses and paths become those of a site."""

import csv
import json
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from support.appliance import PATIENCE_S, ROOT, Pki

SHIPPED = ROOT / "packaging"
ENVOY = ROOT / ".clients" / "envoy" / "bin" / "envoy"
ADDRESS = "10.83.0.1"
"""Where clients find a balancer; also where the centre is."""


def configuration(kind: str, name: str, folder: Path, pki: Pki, servers: dict[str, str]) -> Path:
    """A shipped file, for a site. Args: kind: "haproxy" or "envoy". servers: name in the file → address."""
    text = (SHIPPED / kind / name).read_text(encoding="utf-8")
    pair = folder / "edge.pem"
    pair.write_bytes(b"".join((pki.folder / f"server.{end}").read_bytes() for end in ("crt", "key")))
    for old, new in {
        "/etc/haproxy/site-ca.crt": str(pki.ca),
        "/etc/haproxy/edge.example.com.pem": str(pair),
        "/run/haproxy/admin.sock": str(folder / "haproxy.sock"),
        "/etc/envoy/site-ca.crt": str(pki.ca),
        "/etc/envoy/edge.example.com.crt": str(pki.folder / "server.crt"),
        "/etc/envoy/edge.example.com.key": str(pki.folder / "server.key"),
        **{f"192.0.2.1{server.removeprefix('edge-')}": address for server, address in servers.items()},
    }.items():
        text = text.replace(old, new)
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


@dataclass
class Balancer:
    """One that runs, from `with` on.

    Attributes:
        kind: "haproxy" or "envoy".
        name: of the shipped file.
        servers: name → address.
    """

    kind: str
    name: str
    folder: Path
    pki: Pki
    servers: dict[str, str]
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    @property
    def log(self) -> str:
        """What it wrote."""
        return (self.folder / f"{self.kind}.log").read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> "Balancer":
        self.folder.mkdir(parents=True, exist_ok=True)
        file = configuration(self.kind, self.name, self.folder, self.pki, self.servers)
        command = {
            "haproxy": [shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin") or "haproxy", "-db", "-f"],
            "envoy": [str(ENVOY), "--concurrency", "1", "--log-level", "warning", "-c"],
        }[self.kind]
        with (self.folder / f"{self.kind}.log").open("wb") as log:
            self._process = subprocess.Popen([*command, str(file)], stdout=log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_S / 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(PATIENCE_S)

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def up(self) -> set[str]:
        """The servers that it sends to now; none while it starts."""
        assert self._process is not None
        assert self._process.poll() is None, self.log
        try:
            return self._haproxy_up() if self.kind == "haproxy" else self._envoy_up()
        except (OSError, httpx.TransportError):
            return set()

    def tell(self, command: str) -> str:
        """Have HAProxy do something; what it says."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(self.folder / "haproxy.sock"))
            connection.sendall(command.encode() + b"\n")
            with connection.makefile() as answer:
                return answer.read()

    def _haproxy_up(self) -> set[str]:
        lines = self.tell("show stat").removeprefix("# ").splitlines()
        # "UP 1/2": a check failed, and it is still sent to.
        rows = [row for row in csv.DictReader(lines) if row["svname"] in self.servers]
        return {row["svname"] for row in rows if row["status"].startswith("UP")}

    def _envoy_up(self) -> set[str]:
        bad = ("failed_active_health_check", "failed_outlier_check", "pending_active_hc")
        states = {name: host.get("health_status", {}) for name, host in self._envoy_hosts().items()}
        return {name for name, state in states.items() if not any(state.get(each) for each in bad)}

    def weights(self) -> dict[str, int]:
        """Envoy's, of each server."""
        return {name: int(host.get("weight", 0)) for name, host in self._envoy_hosts().items()}

    def _envoy_hosts(self) -> dict[str, dict[str, dict[str, object]]]:
        page = json.loads(httpx.get("http://127.0.0.1:9901/clusters?format=json", timeout=PATIENCE_S).text)
        (cluster,) = page["cluster_statuses"]
        by_address = {host["address"]["socket_address"]["address"]: host for host in cluster["host_statuses"]}
        return {name: by_address[address] for name, address in self.servers.items()}
