"""The appliance on a machine, as its operator and its clients see it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.appliance import MODELS, array_input, image_input, request_for
from support.graphs import APP, USER, slow_model, write_raw
from support.machines.load import Job, Load
from support.machines.machine import HOST, OUTSIDE, Machine
from support.stock import CLIENT_TESTS, executable, plain_environment

SERVICE = "inference-appliance.service"
SOCKET = "inference-appliance.socket"
HOME = "/usr/lib/inference-appliance"
ETC = "/etc/inference-appliance"
STATE = "/var/lib/inference-appliance"
PACKAGES = "/srv/packages"
"""Where machines see the packages."""
SAMPLE = MODELS / "digits" / "samples" / "held-out-000-label-2.png"
CLIENT = "line-3"
"""The principal that a client certificate of ours is."""
_SLOW_INPUTS = 128


@dataclass
class Installed:
    """An appliance that was installed and provisioned. Attributes: key: a PAT. folder: outside, for clients."""

    machine: Machine
    folder: Path
    key: str = ""

    # ---- the operator

    def set_up(self, *more: str) -> "Installed":
        """What `appliance setup` does without asking; afterwards there is a key and its root's certificate outside."""
        flags = ("--yes", "--base-url", f"https://{HOST}:8443", "--clients", f"{OUTSIDE}/32", *more)
        said = self.machine.run("appliance", "setup", *flags)
        found = re.search(r"^key\s+(\S+)", said.stdout, re.MULTILINE)
        assert found, said.stdout
        self.key = found.group(1)
        self.fetch_root()
        return self

    def fetch_root(self) -> None:
        """Give clients the root's certificate, as the operator would."""
        self.ca.write_text(self.machine.read(f"{ETC}/tls/ca.crt"))

    def start(self) -> float:
        """Start the service. Returns: seconds until systemd was told READY, by its own clock."""
        self.machine.run("systemctl", "start", SERVICE)
        return self.seconds_to_ready()

    def seconds_to_ready(self) -> float:
        """How long the last start took: from the first process until READY."""
        begun = int(self.machine.show(SERVICE, "ExecMainStartTimestampMonotonic"))
        ready = int(self.machine.show(SERVICE, "ActiveEnterTimestampMonotonic"))
        return (ready - begun) / 1e6

    def configure(self, text: str, name: str = "50-test.toml") -> None:
        """Write a drop-in of the configuration that the service may read."""
        place = f"{ETC}/conf.d/{name}"
        self.machine.write(place, text, 0o640)
        self.machine.run("chgrp", "inference-appliance", place)

    def drop_in(self, text: str) -> None:
        """Change the unit as `systemctl edit` does; "" takes that back. In force with the next start."""
        place = f"/etc/systemd/system/{SERVICE}.d/50-test.conf"
        if text:
            self.machine.write(place, text)
        else:
            self.machine.run("rm", place)
        self.machine.run("systemctl", "daemon-reload")

    def in_unit(self, script: str) -> int:
        """The exit status of lines of bash that run in the service's own control group, under its rules for packets."""
        cgroup = self.machine.show(SERVICE, "ControlGroup")
        join = f'echo $$ > "/sys/fs/cgroup{cgroup}/cgroup.procs"'
        return self.machine.run("bash", "-ec", f"{join}\n{script}", check=False).returncode

    def add_slow_model(self) -> None:
        """A model whose request of `slow_body` takes about a second; returns when it is ready."""
        folder = self.folder / "slow"
        if not folder.exists():
            write_raw(folder, slow_model(rounds=400, width=512))
        self.machine.copy_in(folder, f"{STATE}/models/slow", "inference-appliance:inference-appliance")
        self.machine.wait(lambda: "slow" in self.ready(), "the slow model is loaded")

    # ---- what the service says

    @property
    def pid(self) -> int:
        """The service's main process."""
        return int(self.machine.show(SERVICE, "MainPID"))

    def restarts(self) -> int:
        """How often systemd started it anew by itself."""
        return int(self.machine.show(SERVICE, "NRestarts"))

    def active(self) -> str:
        """active, inactive, failed …"""
        return self.machine.show(SERVICE, "ActiveState")

    def processes(self, name: str) -> list[int]:
        """The service's processes with that in their command line."""
        cgroup = self.machine.show(SERVICE, "ControlGroup")
        each = 'echo "$p $(tr "\\0" " " </proc/$p/cmdline)"'
        script = f'for p in $(cat "/sys/fs/cgroup{cgroup}/cgroup.procs"); do {each}; done'
        lines = self.machine.run("sh", "-c", script).stdout.splitlines()
        return [int(line.split()[0]) for line in lines if name in line]

    def ready(self) -> list[str]:
        """Bundles with a version that is ready; none while nobody answers."""
        done = self.machine.run("appliance", "models", "list", "--json", check=False)
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        return [row["bundle"] for row in rows if any(version["state"] == "ready" for version in row["versions"])]

    def journal(self, *options: str) -> list[dict[str, Any]]:
        """The service's entries."""
        done = self.machine.run("journalctl", "--unit", SERVICE, "--output", "json", "--no-pager", *options)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def said(self, *options: str) -> str:
        """The service's messages, and systemd's about it, a line each."""
        return "\n".join(str(entry.get("MESSAGE", "")) for entry in self.journal(*options))

    # ---- clients, outside

    @property
    def ca(self) -> Path:
        """The root's certificate, for clients."""
        return self.folder / "ca.crt"

    def predict(self) -> str:
        """What a stock Clarifai SDK outside says is on a picture of a two; only base_url and the root are ours."""
        done = self.machine.outside(
            executable("sdk-12"),
            CLIENT_TESTS / "script_first_predict.py",
            f"https://{HOST}:8443",
            self.ca,
            SAMPLE,
            environment=plain_environment(CLARIFAI_PAT=self.key),
        )
        return str(json.loads(done.stdout.splitlines()[-1]))

    def client_certificate(self) -> tuple[Path, Path]:
        """Key and chain of a client that this machine's own root signed, outside."""
        pair = self.folder / f"{CLIENT}.key", self.folder / f"{CLIENT}.crt"
        if not pair[0].exists():
            san = f"uri:spiffe://plant/{CLIENT}"
            self.machine.run("appliance", "certs", "issue", "client", CLIENT, "--san", san)
            for place in pair:
                place.write_text(self.machine.read(f"{ETC}/tls/clients/{place.name}"))
        return pair

    def load(self, *, callers: int = 4, slow: bool = False, port: int = 8443) -> Load:
        """Callers of the digits, or of the slow model; to be entered."""
        body = self.folder / ("slow.request" if slow else "digits.request")
        if slow:
            row = array_input(np.zeros(512, dtype=np.float32))
            request = request_for("slow", [row] * _SLOW_INPUTS, user=USER, app=APP)
        else:
            request = request_for("digits", [image_input(SAMPLE.read_bytes())])
        body.write_bytes(request.SerializeToString())
        return Load(self.machine, Job(HOST, port, str(self.ca), self.key, str(body), callers=callers))
