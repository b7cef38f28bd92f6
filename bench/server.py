"""The appliance under test: a real daemon with its own certificates, key and bundles, on loopback ports."""

import contextlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cpu import pin_to, tree_seconds
from bench.h2 import Target
from bench.wire.process import memory_bytes, tree
from bench.workload import METHOD, ROOT

MODES = ("default", "single", "processes")
"""Of the daemon's processes: as it chooses, all in one, or supervisor, fronts and engines."""

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
_REST_S = 180.0
_HOST = "127.0.0.1"
_METRIC = re.compile(r"inference_appliance_(\w+?)(?:\{(.*)\})? (\S+)")
_CODE = re.compile(r'code="(\d+)"')
_SUCCESS = "10000"


@dataclass(frozen=True, slots=True)
class Counters:
    """What a daemon has done so far: CPU seconds of its processes, calls by outcome, runs of the model, their rows."""

    cpu_s: float
    succeeded: int
    failed: int
    runs: int
    rows: int

    def since(self, before: "Counters") -> "Counters":
        """What was done between two readings."""
        return Counters(
            self.cpu_s - before.cpu_s,
            self.succeeded - before.succeeded,
            self.failed - before.failed,
            self.runs - before.runs,
            self.rows - before.rows,
        )


@dataclass(frozen=True, slots=True)
class Server:
    """A running daemon.

    Attributes:
        address: "host:port" of its TLS port.
        plain_address: the same without TLS.
        ca: PEM file of the root that signed its certificate.
        key: a PAT that it accepts.
    """

    address: str
    plain_address: str
    ca: Path
    key: str
    pid: int
    admin_port: int
    folder: Path

    def target(self, path: str = METHOD, *, plain: bool = False) -> Target:
        """For the load generator, with the key."""
        headers = (("authorization", f"Key {self.key}"),)
        if plain:
            return Target(self.plain_address, path, headers=headers)
        return Target(self.address, path, str(self.ca), headers)

    def pids(self) -> list[int]:
        """All of the daemon's processes, its own first."""
        return tree(self.pid)

    def memory_mib(self) -> float:
        """What all its processes hold, pages that they share counted once; without those of files."""
        return memory_bytes(self.pids(), files=False) / 2**20

    def metrics(self) -> str:
        """Its page of metrics."""
        return _get(f"http://{_HOST}:{self.admin_port}/metrics")

    def page(self, path: str) -> str:
        """Another page of the admin listener. Raises: OSError: not a success."""
        return _get(f"http://{_HOST}:{self.admin_port}{path}")

    def counters(self) -> Counters:
        """Read the counters, from the kernel and from the daemon's own metrics."""
        succeeded = failed = runs = rows = 0
        for line in self.metrics().splitlines():
            match = _METRIC.fullmatch(line)
            if not match:
                continue
            name, labels, value = match[1], match[2] or "", int(float(match[3]))
            if name == "requests_total":
                code = _CODE.search(labels)
                if code and code[1] == _SUCCESS:
                    succeeded += value
                else:
                    failed += value
            elif name == "batch_rows_count":
                runs += value
            elif name == "batch_rows_sum":
                rows += value
        return Counters(tree_seconds(self.pid), succeeded, failed, runs, rows)


@contextlib.contextmanager
def serving(
    bundles: Path | Sequence[Path],
    cpus: Sequence[int],
    *,
    mode: str = "default",
    settings: str = "",
    rested: bool = True,
) -> Iterator[Server]:
    """A daemon that serves these bundles on these CPUs; stopped and removed at the end.

    Args: mode: one of `MODES`. settings: more of its configuration, TOML. rested: left alone first, see `rest`.
    Raises: RuntimeError: it did not become ready; with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="appliance-bench-") as name:
        folder = Path(name)
        (folder / "models").mkdir()
        for bundle in [bundles] if isinstance(bundles, Path) else bundles:
            shutil.copytree(bundle, folder / "models" / bundle.name, copy_function=_link)
        (folder / "state").mkdir()
        port, plain_port, admin_port = free_ports(3)
        config = folder / "appliance.toml"
        text = _config(folder, port, plain_port, admin_port)
        text += f'[processes]\nmode = "{mode}"\n' if mode != "default" else ""
        config.write_text(text + settings, encoding="utf-8")
        tls = str(folder / "tls")
        _appliance("certs", "init", "--dir", tls)
        _appliance("certs", "issue", "server", "--san", "localhost", "--san", _HOST, "--dir", tls)
        key = _appliance("--config", str(config), "keys", "create", "--quiet")
        log = folder / "daemon.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "appliance", "--config", str(config), "serve"],
                cwd=ROOT,
                stdout=file,
                stderr=file,
                preexec_fn=pin_to(*cpus),
            )
        try:
            _wait_ready(process, admin_port, log)
            addresses = f"{_HOST}:{port}", f"{_HOST}:{plain_port}"
            if rested:
                rest(process.pid)
            yield Server(*addresses, folder / "tls" / "ca.crt", key, process.pid, admin_port, folder)
        finally:
            _stop(process)


def rest(pid: int) -> None:
    """Wait until a daemon has measured its models, as it does while idle: until it hardly uses its CPUs."""
    give_up, quiet = time.monotonic() + _REST_S, 0
    while quiet < 3 and time.monotonic() < give_up:
        before, begun = tree_seconds(pid), time.monotonic()
        time.sleep(1.0)
        quiet = quiet + 1 if tree_seconds(pid) - before < 0.05 * (time.monotonic() - begun) else 0


def _link(source: str, target: str) -> None:
    """A hard link where it can be: some models are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _config(folder: Path, port: int, plain_port: int, admin_port: int) -> str:
    """Everything as shipped, except where things are, and how long a stop takes."""
    return f"""\
[server]
base_url = "https://localhost:{port}"
listen = "{_HOST}:{port}"
plain_listen = "{_HOST}:{plain_port}"
[tls]
certificate = "{folder}/tls/server.crt"
key = "{folder}/tls/server.key"
client_ca = "{folder}/tls/ca.crt"
[auth]
keys_file = "{folder}/keys.json"
[catalog]
root = "{folder}/models"
state_dir = "{folder}/state"
[admin]
listen = "{_HOST}:{admin_port}"
socket = "{folder}/admin.sock"
[shutdown]
lame_duck_s = 0.0
drain_s = 5.0
"""


def _appliance(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "appliance", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(12_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as bound:
            bound.bind((_HOST, port))
            found.append(port)
    return found


def _wait_ready(process: "subprocess.Popen[bytes]", admin_port: int, log: Path) -> None:
    give_up = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < give_up and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):  # not listening yet, or 503: not ready yet
            _get(f"http://{_HOST}:{admin_port}/readyz")
            return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-10:])
    raise RuntimeError(f"The appliance did not become ready:\n{tail}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return str(reply.read().decode("utf-8"))
