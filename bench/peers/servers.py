"""Starting the peers, each in its own environment, and our own daemon beside them."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.cpu import pin_to
from bench.peers.models import Model
from bench.server import free_ports, serving
from bench.workload import ROOT

ENVIRONMENTS = ROOT / "build/bench"
HERE = Path(__file__).parent
_STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server that was started. Attributes: address: without TLS. headers: what calls must bring. ended: did it?"""

    pid: int
    address: str
    model_id: str
    headers: tuple[tuple[str, str], ...] = ()
    ended: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Peer:
    """Another server. Attributes: surface: a key of `SURFACES`. command: model, folder, ports → what to run."""

    name: str
    surface: str
    environment: str
    tasks: tuple[str, ...]
    command: Callable[[Model, Path, Sequence[int]], tuple[list[str], Mapping[str, str]]]


def install(name: str, say: Callable[[str], None]) -> Path:
    """The peer's Python; its environment is made first from its hashed requirements if it is not there.

    Raises: RuntimeError: it cannot be installed.
    """
    folder, requirements = ENVIRONMENTS / name, ROOT / f"requirements/bench-{name}.txt"
    done = folder / "ready"
    if not done.exists() or done.read_bytes() != requirements.read_bytes():
        say(f"installing {name} (some minutes)")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(folder / "bin/pip"), "install", "--quiet", "--require-hashes", "-r", str(requirements)]
        if subprocess.run(pip, check=False).returncode:
            raise RuntimeError(f"{name} could not be installed")
        shutil.copyfile(requirements, done)
    return folder / "bin/python"


@contextlib.contextmanager
def peer(chosen: Peer, model: Model, cpus: Sequence[int]) -> Iterator[Running]:
    """The peer with this model on these CPUs; stopped at the end, with all its processes."""
    with tempfile.TemporaryDirectory(prefix="bench-peer-") as name, open(f"{name}/log", "w") as log:
        ports = free_ports(3)
        command, variables = chosen.command(model, Path(name), ports)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        process = subprocess.Popen(
            command,
            cwd=name,
            stdout=log,
            stderr=log,
            env=environment | {"BENCH_MODEL": str(model.file), "BENCH_TASK": model.task, **variables},
            preexec_fn=lambda: (os.setsid(), pin_to(*cpus)()),  # type: ignore[func-returns-value]
        )
        try:
            yield Running(process.pid, f"127.0.0.1:{ports[0]}", "model", ended=lambda: process.poll() is not None)
        except Exception:
            tail = Path(f"{name}/log").read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            sys.stderr.write("\n".join([f"{chosen.name}, end of its log:", *tail, ""]))
            raise
        finally:
            _stop_group(process)


@contextlib.contextmanager
def ours(model: Model, cpus: Sequence[int], mode: str, settings: str) -> Iterator[Running]:
    """Our daemon with the same file, asked in plaintext as the peers are."""
    with serving(model.bundle, cpus, mode=mode, settings=settings, rested=False) as server:
        key = (("authorization", f"Key {server.key}"),)
        yield Running(server.pid, server.plain_address, model.bundle.name, key)


def _stop_group(process: "subprocess.Popen[bytes]") -> None:
    """The process and all that it started: they are a session of their own."""
    for signal in (15, 9):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal)
        give_up = time.monotonic() + _STOP_S
        while time.monotonic() < give_up:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def _python(name: str) -> str:
    return str(ENVIRONMENTS / name / "bin/python")


def _site(name: str) -> Path:
    return next((ENVIRONMENTS / name / "lib").glob("python3.*/site-packages"))


def _clarifai(model: Model, folder: Path, ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
    (folder / "1").mkdir()
    shutil.copyfile(HERE / "clarifai_model.py", folder / "1/model.py")
    (folder / "requirements.txt").write_text("clarifai\n", encoding="utf-8")
    (folder / "config.yaml").write_text(_CLARIFAI, encoding="utf-8")
    command = [_python("clarifai"), "-m", "clarifai.runners.server", "--grpc", "--model_path", str(folder)]
    command += ["--port", str(ports[0]), "--health_check_port", "-1", "--max_queue_size", "20"]
    return command, {"CLARIFAI_PAT": "none", "CLARIFAI_USER_ID": "bench", "LOG_LEVEL": "ERROR"}


_CLARIFAI = """\
model: {id: model, user_id: bench, app_id: main, model_type_id: any-to-any}
build_info: {python_version: "3.11"}
inference_compute_info: {cpu_limit: "1", cpu_memory: 1Gi, num_accelerators: 0}
"""


def _kserve(model: Model, folder: Path, ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
    command = [_python("kserve"), str(HERE / "kserve_server.py"), str(model.file), str(ports[1]), str(ports[0])]
    return command, {}


def _litserve(model: Model, folder: Path, ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
    shape = ",".join(map(str, model.row.shape))
    variables = {"BENCH_PORT": str(ports[0]), "BENCH_TYPE": model.row.dtype.name, "BENCH_SHAPE": shape}
    return [_python("litserve"), str(HERE / "litserve_server.py")], variables


def _triton(model: Model, folder: Path, ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
    """The binary alone, without pytriton's proxy. Its Python backend loads the libpython that it finds by name."""
    site = _site("triton")
    server = site / "pytriton/tritonserver"
    version = ".".join(site.parent.name.removeprefix("python").split(".")[:2])
    backends = folder / "backends"
    shutil.copytree(server / "backends/python", backends / "python", symlinks=True)
    stub = backends / "python/triton_python_backend_stub"
    stub.symlink_to(server / f"python_backend_stubs/{version}/triton_python_backend_stub")
    repository = folder / "repository/model"
    (repository / "1").mkdir(parents=True)
    shutil.copyfile(HERE / "triton_model.py", repository / "1/model.py")
    kind, shape = model.v2_type, ", ".join(map(str, model.row.shape))
    text = f"""\
name: "model"
backend: "python"
max_batch_size: 32
input [{{ name: "{model.input}" data_type: TYPE_{kind} dims: [ {shape} ] }}]
output [{{ name: "{model.output}" data_type: TYPE_FP32 dims: [ {model.outputs} ] }}]
dynamic_batching {{ }}
instance_group [{{ kind: KIND_CPU count: 1 }}]
"""
    (repository / "config.pbtxt").write_text(text, encoding="utf-8")
    command = [str(server / "bin/tritonserver"), "--model-repository", str(folder / "repository")]
    command += ["--backend-directory", str(backends), "--grpc-port", str(ports[0]), "--http-port", str(ports[1])]
    command += ["--metrics-port", str(ports[2]), "--log-info", "false", "--cache-directory", str(server / "caches")]
    command += ["--backend-config", f"python,shm-region-prefix-name=bench{os.getpid()}-{ports[0]}"]
    # The backend heeds no PYTHONPATH: it takes the packages of the first python3 on PATH. It needs numpy 1, as the
    # environment has: with another every output would have no bytes.
    real, own = Path(os.path.realpath(_python("triton"))), Path(_python("triton")).parent
    path = f"{own}:{os.environ['PATH']}"
    return command, {"LD_LIBRARY_PATH": str(real.parent.parent / "lib"), "PATH": path}


PEERS = (
    Peer("triton", "v2", "triton", ("array",), _triton),
    Peer("kserve", "v2", "kserve", ("array",), _kserve),
    Peer("clarifai", "clarifai", "clarifai", ("array", "picture"), _clarifai),
    Peer("litserve", "http", "litserve", ("array",), _litserve),
)
