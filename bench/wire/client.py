"""A client process: it is given a job, says when it is ready, is told to begin, and says what it found.

Both sides talk in lines of JSON over the client's standard input and output.
"""

import json
import os
import select
import subprocess
import sys
from typing import Any

from bench.cpu import pin_to
from bench.workload import ROOT

_TIMEOUT_S = 300.0


# ---- in the benchmark's own process ----------------------------------------------------------------------------------


class Client:
    """A running `python -m MODULE`, pinned to one CPU."""

    def __init__(self, module: str, cpu: tuple[int, ...], job: dict[str, Any]) -> None:
        """Start it and give it its job."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"GRPC_VERBOSITY": "NONE"},
            preexec_fn=pin_to(*cpu),
        )
        self.pid = self._process.pid
        self.tell(job)

    def tell(self, message: dict[str, Any] | None = None) -> None:
        """Send a line; without a message it is the sign to go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message or {}) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """The next thing it says. Raises: RuntimeError: it ended, or says nothing."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _TIMEOUT_S)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            self._process.wait()
            raise RuntimeError("a client process ended early, or said nothing")
        return json.loads(line)

    def end(self) -> None:
        """Let it end."""
        self.tell()
        self._process.communicate(timeout=_TIMEOUT_S)


# ---- in the client's process -----------------------------------------------------------------------------------------


def listen() -> dict[str, Any]:
    """Wait for the next line from the benchmark."""
    heard: dict[str, Any] = json.loads(sys.stdin.readline() or "{}")
    return heard


def say(message: Any) -> None:
    """Say something to it."""
    print(json.dumps(message), flush=True)
