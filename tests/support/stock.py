"""Stock clients in environments of their own: a script runs there and prints JSON, or a command is run."""

import functools
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.appliance import MODELS, PATIENCE_S, ROOT

SAMPLES = MODELS / "digits" / "samples"
CLIENT_TESTS = ROOT / "tests" / "clients"
SCRIPT_PATIENCE_S = 5 * PATIENCE_S
_TRUST = ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def executable(environment: str, name: str = "python") -> Path:
    """A program of a client's environment; the test fails with what to do when it is missing."""
    found = ROOT / ".clients" / environment / "bin" / name
    if not found.exists():
        pytest.fail(f"{found} is missing; `make test` makes it")
    return found


def plain_environment(**variables: str | Path) -> dict[str, str]:
    """The environment a user starts with, and these variables: nothing of ours, no trust, no Clarifai settings."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("CLARIFAI_", "PYTHONPATH")) and k not in _TRUST}
    return ours | {name: str(value) for name, value in variables.items()}


def run_script(environment: str, script: str, *arguments: object, **variables: str | Path) -> Any:
    """Run a script of tests/clients with a stock client's Python; what it printed last, as JSON."""
    done = subprocess.run(
        [executable(environment), CLIENT_TESTS / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=plain_environment(**variables),
        timeout=SCRIPT_PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def versions(environment: str, *packages: str) -> str:
    """What the packages of an environment say of themselves: "clarifai 12.5.0, grpcio 1.85.1"."""
    code = "import sys, importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    done = subprocess.run(
        [executable(environment), "-c", code, *packages], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    return done.stdout.strip()


class _Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def files_over_http(folder: Path) -> Iterator[str]:
    """A web server on loopback with the files of a folder; its base URL, no slash at its end."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Files, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
