"""A real appliance for tests: the installed command, its own folders, ports of the loopback interface, real TLS."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
from clarifai_grpc.channel.clarifai_channel import ClarifaiChannel
from clarifai_grpc.grpc.api import resources_pb2, service_pb2, service_pb2_grpc
from numpy.typing import NDArray

from support import secrets
from support.callers import ANSWERED, Ask, Callers
from support.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
COMMAND = Path(sys.executable).with_name("appliance")

_AS_SYSTEMD = """
import os, sys
for place, number in enumerate(sys.argv[1].split(","), start=3):
    os.dup2(int(number), place)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Passes descriptors on from number 3, and becomes the command."""

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("APPLIANCE_", "CLARIFAI_"))}

_modes = [os.environ.get("TEST_MODE", "")]


@contextlib.contextmanager
def mode(name: str) -> Iterator[None]:
    """Appliances made meanwhile have their work done so: "single", "processes", or "" for their own choice."""
    _modes.append(name)
    yield
    _modes.pop()


def run(*arguments: str | Path, config: Path | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run the `appliance` command to its end."""
    chosen = ["--config", str(config)] if config else []
    done = subprocess.run(
        [str(COMMAND), *chosen, *map(str, arguments)],
        check=check,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=PATIENCE_S,
    )
    if arguments[:2] == ("keys", "create"):
        secrets.never_to_be_written(*done.stdout.split()[-1:])
    else:
        secrets.said(f"`{' '.join(map(str, done.args))}`", done.stdout + done.stderr)
    return done


@dataclass(frozen=True)
class Pki:
    """A throw-away root and what it signed, in the layout that `appliance certs` writes."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The root's certificate."""
        return self.folder / "ca.crt"

    def client(self, name: str) -> tuple[bytes, bytes]:
        """Key and certificate of a client, PEM."""
        pair = (self.folder / "clients" / f"{name}.key", self.folder / "clients" / f"{name}.crt")
        return pair[0].read_bytes(), pair[1].read_bytes()


def make_pki(folder: Path, clients: tuple[str, ...] = (), names: tuple[str, ...] = ("localhost", "127.0.0.1")) -> Pki:
    """A root, a server certificate for these names, and clients with the identity `uri:spiffe://test/<name>`."""
    run("certs", "init", "--dir", folder)
    run("certs", "issue", "server", "--dir", folder, *(part for name in names for part in ("--san", name)))
    for name in clients:
        run("certs", "issue", "client", name, "--dir", folder, "--san", f"uri:spiffe://test/{name}")
    return Pki(folder)


@dataclass
class Appliance:
    """One daemon in a folder of its own.

    Attributes:
        key: a key that fixtures made, if they did.
        transport: which wire serves; "" is the appliance's own choice.
        mode: which processes do the work; likewise.
        config: sections of the configuration file beside what the folder layout gives.
        through: a command that the daemon is started through, which becomes it.
    """

    home: Path
    pki: Pki
    config: dict[str, Any] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    key: str = ""
    transport: str = ""
    mode: str = field(default_factory=lambda: _modes[-1])
    through: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for folder in (self.models, self.state):
            folder.mkdir(parents=True, exist_ok=True)
        secrets.written_in(self.home)
        self.tls = self.home / "tls"
        if not self.tls.exists():
            shutil.copytree(self.pki.folder, self.tls)
        self.write_config()

    @property
    def models(self) -> Path:
        """The catalog's root."""
        return self.home / "models"

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.home / "state"

    @property
    def file(self) -> Path:
        """The configuration file."""
        return self.home / "appliance.toml"

    @property
    def log(self) -> str:
        """What the daemon has written so far."""
        return (self.home / "daemon.log").read_text(encoding="utf-8")

    def write_config(self, **changes: Any) -> None:
        """Write the configuration file; `changes` are sections merged over what there is."""
        for section, content in changes.items():
            if isinstance(content, dict):
                self.config[section] = {**self.config.get(section, {}), **content}
            else:
                self.config[section] = content
        base: dict[str, Any] = {
            "server": {"base_url": "https://localhost:8443", "listen": "127.0.0.1:0", "mtls_listen": "127.0.0.1:0"},
            "tls": {
                "certificate": self.tls / "server.crt",
                "key": self.tls / "server.key",
                "client_ca": self.tls / "ca.crt",
            },
            "auth": {"keys_file": self.home / "keys.json"},
            "catalog": {"root": self.models, "state_dir": self.state, "settle_s": 0.2, "scan_interval_s": 0.1},
            "admin": {"listen": "127.0.0.1:0", "socket": self.home / "admin.sock"},
            "shutdown": {"lame_duck_s": 0.2, "drain_s": 60},
        }
        if self.transport:
            base["server"]["transport"] = self.transport
        if self.mode:
            base["processes"] = {"mode": self.mode, "fronts": 2}
        for section, content in self.config.items():
            base[section] = {**base.get(section, {}), **content} if isinstance(content, dict) else content
        secrets.never_to_be_written(base["tls"].get("key_passphrase", ""))
        self.file.write_text(to_toml(base), encoding="utf-8")

    def command(self, *arguments: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run the `appliance` command with this configuration."""
        return run(*arguments, config=self.file, check=check)

    def new_key(self, *arguments: str) -> str:
        """Make a key."""
        return self.command("keys", "create", "--quiet", *arguments).stdout.strip()

    # ---- life ----

    def spawn(
        self, environment: Mapping[str, str] | None = None, listening: Mapping[str, socket.socket] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start the daemon and do not wait for it.

        Args:    listening: sockets to pass as systemd does, by name.
        """
        log = (self.home / "daemon.log").open("ab")
        command = [*self.through, str(COMMAND), "--config", str(self.file), "serve"]
        passed = dict(environment or {})
        if listening:
            # sd_listen_fds(3): descriptors from 3 on, for the process whose number is in LISTEN_PID.
            numbers = [str(sock.fileno()) for sock in listening.values()]
            command = [sys.executable, "-c", _AS_SYSTEMD, ",".join(numbers), *command]
            passed |= {"LISTEN_FDS": str(len(numbers)), "LISTEN_FDNAMES": ":".join(listening)}
        self.process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **passed},
            pass_fds=[sock.fileno() for sock in (listening or {}).values()],
        )
        log.close()
        return self.process

    def start(self) -> "Appliance":
        """Start the daemon and return when it is ready."""
        self.spawn()
        self.wait(lambda: self.admin("/readyz").get("ready") is True)
        return self

    def wait(self, condition: Any, what: str = "") -> None:
        """Return when `condition()` is true; fail with the log when it never is, or the daemon ended."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with contextlib.suppress(http.client.HTTPException, httpx.HTTPError, OSError, KeyError):
                if condition():
                    return
            if self.process is not None and self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"{what or 'what was waited for'} did not happen; the daemon's log:\n{self.log}")

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> int:
        """Terminate the daemon and return its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def __enter__(self) -> "Appliance":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- asking ----

    def admin(self, page: str, *, post: bool = False) -> dict[str, Any]:
        """One page of the admin socket."""
        connection = _UnixConnection(self.home / "admin.sock")
        try:
            connection.request("POST" if post else "GET", page)
            text = connection.getresponse().read().decode()
            secrets.said(f"{self.home}, {page}", text)
            content: dict[str, Any] = json.loads(text)
            return content
        finally:
            connection.close()

    def port(self, name: str = "server.listen") -> int:
        """A port that the daemon bound."""
        number: int = self.admin("/status")["ports"][name]
        return number

    def metric(self, name: str) -> float:
        """One sample of the metrics page; 0 when it is not there yet."""
        lines = [line for line in self.metrics().splitlines() if line.startswith(name)]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0

    def metrics(self) -> str:
        """The Prometheus page."""
        text = httpx.get(f"http://127.0.0.1:{self.port('admin.listen')}/metrics", timeout=PATIENCE_S).text
        secrets.said(f"{self.home}, /metrics", text)
        return text

    def state_of(self, bundle: str, version: str = "1") -> str:
        """A version's state, "" when it is not known."""
        for row in self.admin("/status")["catalog"]:
            if row["bundle"] == bundle:
                return next((str(v["state"]) for v in row["versions"] if v["version"] == version), "")
        return ""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("appliance", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """The raw Clarifai stub, as its users write it."""

    def __init__(
        self, port: int, ca: Path, key: str = "", certificate: tuple[bytes, bytes] | None = None, retries: bool = False
    ) -> None:
        """Args: certificate: (key, certificate chain) PEM. retries: as the stock channel, 5 attempts on UNAVAILABLE.

        Without them a call is still moved to the next connection when the client itself had not sent it yet as it heard
        of the last one's end: every gRPC client does so, and no server can spare it that.
        """
        if certificate is None and retries:
            self.channel = ClarifaiChannel.get_grpc_channel(base=f"localhost:{port}", root_certificates_path=str(ca))
        else:
            # The stub works only once a stock channel was made in this process (PROTOCOL 1.3).
            ClarifaiChannel.get_grpc_channel(base="localhost:1", root_certificates_path=str(ca)).close()
            credentials = grpc.ssl_channel_credentials(ca.read_bytes(), *(certificate or ()))
            sizes = [(f"grpc.max_{way}_message_length", 2**30) for way in ("send", "receive")]
            options = [*sizes, ("grpc.use_local_subchannel_pool", 1)]
            self.channel = grpc.secure_channel(f"localhost:{port}", credentials, options=options)
        self.stub = service_pb2_grpc.V2Stub(self.channel)
        self.metadata = (("authorization", f"Key {key}"),) if key else ()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, rpc: str, request: Any, **options: Any) -> Any:
        """Any unary RPC."""
        return getattr(self.stub, rpc)(request, metadata=self.metadata, timeout=PATIENCE_S, **options)

    def predict(self, request: service_pb2.PostModelOutputsRequest) -> service_pb2.MultiOutputResponse:
        """PostModelOutputs."""
        return self.call("PostModelOutputs", request)


def image_input(body: bytes, input_id: str = "") -> resources_pb2.Input:
    """An input with the bytes of an image file."""
    return resources_pb2.Input(
        id=input_id, data=resources_pb2.Data(image=resources_pb2.Image(base64=body)) if body is not None else None
    )


def text_input(text: str, input_id: str = "") -> resources_pb2.Input:
    """An input with a text."""
    return resources_pb2.Input(id=input_id, data=resources_pb2.Data(text=resources_pb2.Text(raw=text)))


def array_input(array: NDArray[Any]) -> resources_pb2.Input:
    """An input with one array."""
    message = resources_pb2.NDArray(buffer=array.tobytes(), shape=array.shape, dtype=array.dtype.name)
    return resources_pb2.Input(data=resources_pb2.Data(ndarray=message))


def request_for(
    model: str, inputs: list[resources_pb2.Input], *, version: str = "", user: str = "appliance", app: str = "main"
) -> service_pb2.PostModelOutputsRequest:
    """A predict request without options."""
    return service_pb2.PostModelOutputsRequest(
        user_app_id=resources_pb2.UserAppIDSet(user_id=user, app_id=app),
        model_id=model,
        version_id=version,
        inputs=inputs,
    )


class Load(Callers):
    """Callers of one request, each over a connection of its own. Attributes: odd: what errors of gRPC said."""

    def __init__(
        self,
        port: int,
        ca: Path,
        key: str,
        request: service_pb2.PostModelOutputsRequest,
        callers: int = 4,
        pause_s: Callable[[str], float] = lambda end: 0.01 if end == "UNAVAILABLE" else 0.0,
    ) -> None:
        super().__init__([partial(self._connected, port, ca, key, request)] * callers, pause_s)
        self.odd: list[str] = []

    @contextlib.contextmanager
    def _connected(self, port: int, ca: Path, key: str, request: service_pb2.PostModelOutputsRequest) -> Iterator[Ask]:
        with Client(port, ca, key) as client:

            def ask() -> str:
                try:
                    reply = client.predict(request)
                except grpc.RpcError as error:
                    self.odd.append(f"{error.code().name}: {error.details()}")
                    return str(error.code().name)
                complete = len(reply.outputs) == len(request.inputs)
                return ANSWERED if complete and reply.status.code == 10000 else f"status {reply.status.code}"

            yield ask


def to_toml(tables: Mapping[str, Any]) -> str:
    """Nested tables and arrays of tables as TOML."""
    lines = []
    for name, content in tables.items():
        for table in content if isinstance(content, list) else [content]:
            lines.append(f"[[{name}]]" if isinstance(content, list) else f"[{name}]")
            lines += [f"{key} = {toml_value(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value)


@contextlib.contextmanager
def notify_socket(folder: Path) -> Iterator[socket.socket]:
    """What systemd gives a Type=notify service: a datagram socket that it reads."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(folder / "notify"))
        bound.settimeout(PATIENCE_S)
        yield bound
