"""A centre as a test has it: a process, what it is told, and what it wrote down."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.centre.recorder import Event, recorded
from support.appliance import PATIENCE_S, Pki

TESTS = Path(__file__).resolve().parents[1]


@dataclass
class RunningCentre:
    """One centre in a folder of its own.

    Attributes:
        port: where it listens; the same after a restart.
        prefix: a command that runs it elsewhere, in another network.
        settings: more of `orchestrator.centre.__main__.Settings`.
    """

    home: Path
    pki: Pki
    settings: dict[str, Any] = field(default_factory=dict)
    port: int = 0
    prefix: tuple[str, ...] = ()
    process: "subprocess.Popen[str] | None" = None

    @property
    def base_url(self) -> str:
        """What clients are given."""
        return f"https://localhost:{self.port}"

    @property
    def record(self) -> Path:
        """The file of the recorder; it outlives the state."""
        return self.home / "record.sqlite"

    @property
    def log(self) -> str:
        """What it wrote to stderr."""
        return (self.home / "centre.log").read_text(encoding="utf-8")

    # ---- life ----

    def start(self) -> "RunningCentre":
        """Start it and return when it listens."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "control.sock").unlink(missing_ok=True)
        settings = {
            "listen": f"127.0.0.1:{self.port}",
            "certificate": str(self.pki.folder / "server.crt"),
            "key": str(self.pki.folder / "server.key"),
            "state": str(self.home / "state.sqlite"),
            "record": str(self.record),
            "control": str(self.home / "control.sock"),
        }
        file = self.home / "settings.json"
        file.write_text(json.dumps(settings | self.settings), encoding="utf-8")
        with (self.home / "centre.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "orchestrator.centre", str(file)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(TESTS)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the centre did not start:\n{self.log}"
        self.port = json.loads(line)["port"]
        return self

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, by a signal."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(PATIENCE_S)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def restart(self, *, lose_state: bool = False) -> None:
        """Kill it and start it on the same port; without its state, it knows nobody any more."""
        self.stop(signal.SIGKILL)
        if lose_state:
            for file in self.home.glob("state.sqlite*"):
                file.unlink()
        self.start()

    def __enter__(self) -> "RunningCentre":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- talking ----

    def tell(self, do: str, **order: Any) -> dict[str, Any]:
        """Have it do something; see `Control`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(self.home / "control.sock"))
            connection.sendall(json.dumps({"do": do, **order}).encode() + b"\n")
            with connection.makefile() as lines:
                answer: dict[str, Any] = json.loads(lines.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def state(self) -> dict[str, Any]:
        """Streams, items and counts."""
        return self.tell("state")

    def events(self, since: int = 0) -> list[Event]:
        """What was written down."""
        return list(recorded(self.record, since))

    def last_event(self) -> int:
        """The number of the last event, to read on from."""
        events = self.events()
        return events[-1].sequence if events else 0

    def calls(self, since: int = 0) -> list[str]:
        """The RPCs that were begun, in order."""
        return [event.rpc for event in self.events(since) if event.what == "open"]

    def wait(self, condition: Callable[[dict[str, Any]], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        """Return the first true `condition(state)`."""
        deadline = time.monotonic() + patience_s
        while True:
            state = self.state()
            if value := condition(state):
                return value
            assert time.monotonic() < deadline, f"{what}: not within {patience_s:g} s; the centre says {state}"
            time.sleep(0.05)
