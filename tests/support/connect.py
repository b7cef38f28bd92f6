"""A real `appliance connect` for tests: the installed command, on a free port of the loopback interface."""

import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import grpc
from clarifai_grpc.channel.clarifai_channel import ClarifaiChannel
from clarifai_grpc.grpc.api import service_pb2_grpc

from support import secrets
from support.appliance import COMMAND, ENVIRONMENT, PATIENCE_S, Client, Pki, toml_value

_LISTENING = re.compile(r"http://127\.0\.0\.1:(\d+)\b")


class Forwarder:
    """One forwarder process in a folder of its own, with its own copies of a client's files."""

    def __init__(self, home: Path, pki: Pki, port: int, name: str = "line-3", **settings: Any) -> None:
        """Write its files, and start nothing.

        Args:
            port: the appliance's.
            name: whose certificate it holds.
            settings: keys that differ; None leaves one out.
        """
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        secrets.written_in(home)
        self.install(*pki.client(name))
        self.ca.write_bytes(pki.ca.read_bytes())
        self.settings: dict[str, Any] = {
            "upstream": f"https://localhost:{port}",
            "certificate": self.certificate,
            "key": self.key,
            "ca": self.ca,
            "listen": "localhost:0",
            "stop_s": 0.0,
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self._read_from = 0
        self.pat = ""  # for tests that hand one on

    certificate = property(lambda self: self.home / "client.crt")
    key = property(lambda self: self.home / "client.key")
    ca = property(lambda self: self.home / "ca.crt")
    file = property(lambda self: self.home / "connect.toml")

    def install(self, key: bytes, certificate: bytes) -> None:
        """Put a pair in place, each file as a whole."""
        for path, content in ((self.key, key), (self.certificate, certificate)):
            fresh = path.with_suffix(".new")
            fresh.touch(mode=0o600)
            fresh.write_bytes(content)
            fresh.replace(path)

    def write(self) -> None:
        """Write the configuration file."""
        lines = [f"{key} = {toml_value(value)}\n" for key, value in self.settings.items() if value is not None]
        self.file.write_text("".join(lines), encoding="utf-8")

    @property
    def log(self) -> str:
        """What it has written so far."""
        path = self.home / "connect.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def start(self, environment: dict[str, str] | None = None) -> Self:
        """Start it, and return when it listens."""
        self.write()
        path = self.home / "connect.log"
        self._read_from = path.stat().st_size if path.exists() else 0
        with path.open("ab") as log:
            command = [str(COMMAND), "connect", "--config", str(self.file)]
            environment = {**ENVIRONMENT, **(environment or {})}
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self.wait(lambda: "are forwarded to" in self.log[self._read_from :])
        return self

    @property
    def port(self) -> int:
        """Where it listens."""
        found = _LISTENING.search(self.log[self._read_from :])
        assert found is not None, self.log
        return int(found[1])

    def wait(self, condition: Any, what: str = "") -> None:
        """Return when `condition()` is true; fail with the log when it never is, or the process ended."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if condition():
                return
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"{what or 'what was waited for'} did not happen; the forwarder's log:\n{self.log}")

    def wait_for(self, text: str) -> None:
        """Return when the log has that."""
        self.wait(lambda: text in self.log, f"{text!r} in the log")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def memory(self) -> int:
        """Bytes that are resident."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def descriptors(self) -> int:
        """Open files and sockets."""
        assert self.process is not None
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def stop(self) -> int:
        """Terminate it and return its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class PlainClient(Client):
    """The raw Clarifai stub on an insecure channel, as its users write it for a local forwarder."""

    def __init__(self, target: int | str, key: str = "", *, retries: bool = False) -> None:
        """Args: target: a port of localhost, or anything gRPC can name. retries: as the stock channel."""
        base = f"localhost:{target}" if isinstance(target, int) else target
        # The stub works only once a stock channel was made in this process (PROTOCOL 1.3).
        ClarifaiChannel.get_insecure_grpc_channel(base="localhost", port=1).close()
        sizes = [(f"grpc.max_{way}_message_length", 2**30) for way in ("send", "receive")]
        options = [*sizes, ("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
        options += [("grpc.initial_reconnect_backoff_ms", 50)]
        if not retries:
            options.append(("grpc.enable_retries", 0))
        self.channel = grpc.insecure_channel(base, options=options)
        self.stub = service_pb2_grpc.V2Stub(self.channel)
        self.metadata = (("authorization", f"Key {key}"),) if key else ()
