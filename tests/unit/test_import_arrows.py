"""The import arrows of DESIGN.md: rooms look downwards only, and some libraries belong to one room.

`cli → daemon → orchestrator → api → tasks → media, engine → catalog → core`; `wire` and `pki` see only `core`;
`connect`, the other program, stands beside the daemon and sees `wire`, `pki` and `core`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import appliance

PACKAGE = Path(appliance.__file__).parent
MAY_SEE = {
    "core": set(),
    "pki": {"core"},
    "wire": {"core"},
    "connect": {"wire", "pki", "core"},
    "catalog": {"core"},
    "media": {"catalog", "core"},
    "engine": {"catalog", "core"},
    "tasks": {"media", "engine", "catalog", "core"},
    "api": {"tasks", "media", "engine", "catalog", "wire", "pki", "core"},
    "orchestrator": {"api", "tasks", "media", "engine", "catalog", "wire", "pki", "core"},
    "daemon": {"orchestrator", "api", "tasks", "media", "engine", "catalog", "wire", "pki", "core"},
    "cli": {"connect", "daemon", "orchestrator", "api", "tasks", "media", "engine", "catalog", "wire", "pki", "core"},
}
"""Room → rooms below it that it may import."""

ONLY_IN = {
    "onnxruntime": ("engine/session.py",),
    "clarifai_grpc": ("api/", "orchestrator/"),
    "google.protobuf": ("api/", "orchestrator/"),
    "httpx": ("api/otlp.py", "cli/admin.py", "cli/predict.py", "orchestrator/usage_reports.py"),
    "opentelemetry": ("api/otlp.py",),
    "h11": ("daemon/trial.py", "media/fetch.py", "wire/http1.py"),
    "requests": (),
    "urllib.request": (),
    "urllib3": (),
    "http.client": ("orchestrator/reach.py",),
    "pickle": (),
}
"""Library → the only places that may import it."""


def violations(package: Path) -> list[str]:
    """Every import in `package` that goes against an arrow, as a sentence."""
    found = []
    for file in sorted(package.rglob("*.py")):
        place = file.relative_to(package).as_posix()
        room = place.split("/")[0] if "/" in place else ""
        imports = list(_imports(file, package))
        if place == "core/errors.py" and imports:
            found.append(f"{place}: imports {imports[0]}, and may import nothing")
        for name in imports:
            found += [f"{place}: imports {name}" for rule in [_broken(place, room, name)] if rule]
    return found


def _imports(file: Path, package: Path) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` is a.b, and relative ones are resolved."""
    base = [package.name, *file.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(base[: len(base) + 1 - node.level]) + "." if node.level else ""
            module = (parent + (node.module or "")).rstrip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "?"


def _broken(place: str, room: str, name: str) -> bool:
    for library, places in ONLY_IN.items():
        if f"{name}.".startswith(f"{library}.") and not any(place.startswith(allowed) for allowed in places):
            return True
    first, _, rest = name.partition(".")
    if first != "appliance":
        return False
    other = rest.split(".")[0]
    if other == "__version__":
        return False
    if place == "__main__.py":
        return not name.startswith("appliance.cli.main")
    return other != room and other not in MAY_SEE.get(room, set())


def test_imports_point_downwards_only() -> None:
    assert violations(PACKAGE) == []


def test_every_room_has_its_arrows_written_down() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert rooms <= set(MAY_SEE)


def test_the_rule_knows_that_the_owning_modules_do_import_their_library() -> None:
    """A rule about a library that nobody imports any more would prove nothing."""
    for library in ("onnxruntime", "clarifai_grpc", "google.protobuf", "httpx", "opentelemetry", "h11"):
        for place in ONLY_IN[library]:
            files = [PACKAGE / place] if place.endswith(".py") else list((PACKAGE / place).glob("*.py"))
            names = [name for file in files for name in _imports(file, PACKAGE)]
            assert not files or any(f"{name}.".startswith(f"{library}.") for name in names), (library, place)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("core/types.py", "from appliance.catalog.bundle import BundleConfig"),
        ("core/types.py", "from ..catalog import bundle"),
        ("core/types.py", "from ..catalog.bundle import BundleConfig"),
        ("core/errors.py", "import sys"),
        ("core/errors.py", "from appliance.core import types"),
        ("catalog/bundle.py", "from appliance.engine import plan"),
        ("catalog/bundle.py", "import appliance.media.images"),
        ("media/images.py", "from appliance.wire import grpcio"),
        ("media/images.py", "from appliance.engine.plan import Plan"),
        ("engine/plan.py", "from appliance.media import images"),
        ("engine/plan.py", "from appliance.tasks.base import Task"),
        ("engine/worker.py", "import onnxruntime"),
        ("engine/worker.py", "from onnxruntime.capi import onnxruntime_pybind11_state"),
        ("engine/worker.py", "ort = __import__('onnxruntime')"),
        ("engine/worker.py", "import importlib\nort = importlib.import_module('onnxruntime')"),
        ("tasks/base.py", "def late():\n    from appliance.api import messages"),
        ("tasks/base.py", "from google.protobuf import struct_pb2"),
        ("tasks/base.py", "from clarifai_grpc.grpc.api import resources_pb2"),
        ("tasks/base.py", "from google import protobuf"),
        ("wire/grpcio.py", "from appliance.api import messages"),
        ("wire/grpcio.py", "from appliance.pki import inspect"),
        ("pki/root.py", "from appliance.wire import grpcio"),
        ("api/predict.py", "from appliance.daemon.service import Daemon"),
        ("connect/forwarder.py", "from appliance.daemon.sockets import Sockets"),
        ("connect/answers.py", "from appliance.api import status"),
        ("daemon/service.py", "from appliance.connect import settings"),
        ("api/predict.py", "from appliance.cli import admin"),
        ("api/predict.py", "import httpx"),
        ("media/urls.py", "import h11"),
        ("media/fetch.py", "import httpx"),
        ("daemon/admin.py", "from appliance.cli.main import cli"),
        ("daemon/admin.py", "from urllib.request import urlopen"),
        ("catalog/importer.py", "import pickle"),
        ("cli/models.py", "import httpx"),
        ("cli/models.py", "import appliance"),
        ("cli/models.py", "from appliance import anything"),
        ("__main__.py", "from appliance.daemon.service import Daemon"),
        ("newroom/thing.py", "from appliance.core import types"),
    ],
)
def test_an_import_against_the_arrows_is_found(tmp_path: Path, place: str, line: str) -> None:
    file = tmp_path / "appliance" / place
    file.parent.mkdir(parents=True)
    file.write_text(f"{line}\n", encoding="utf-8")
    assert len(violations(tmp_path / "appliance")) == 1


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("cli/serve.py", "from appliance.daemon.service import Daemon"),
        ("cli/main.py", "from appliance import __version__"),
        ("cli/connect.py", "from appliance.connect.forwarder import Forwarder"),
        ("connect/answers.py", "from appliance.wire.h2 import Http2"),
        ("cli/check.py", "from appliance.wire.grpcio import Server\nfrom appliance.pki import root"),
        ("api/auth.py", "from appliance.pki.inspect import client_identity"),
        ("engine/session.py", "import onnxruntime as ort"),
        ("media/fetch.py", "import h11\nfrom urllib.parse import urlsplit"),
        ("cli/admin.py", "import httpx"),
        ("catalog/state.py", "from appliance.core.files import write_atomically\nfrom . import bundle"),
        ("orchestrator/agent.py", "from clarifai_grpc.grpc.api import service_pb2"),
        ("__main__.py", "from appliance.cli.main import main"),
    ],
)
def test_an_import_along_the_arrows_is_allowed(tmp_path: Path, place: str, line: str) -> None:
    file = tmp_path / "appliance" / place
    file.parent.mkdir(parents=True)
    file.write_text(f"{line}\n", encoding="utf-8")
    assert violations(tmp_path / "appliance") == []
