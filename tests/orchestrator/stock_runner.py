"""The stock runner, `clarifai model serve`, unchanged, as a process that registers with a centre."""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from orchestrator.running import RunningCentre
from support.appliance import PATIENCE_S
from support.stock import executable, plain_environment

STOCK = Path(__file__).parent / "stock"
ENVIRONMENT = "sdk-12"
PAT = "a-token-that-nobody-may-read-1"
USER = "acme"
MODEL_URL = "https://clarifai.com/acme/plant/models/echo"


def environment(centre: RunningCentre, home: Path, **more: str) -> dict[str, str]:
    """What a user of the stock clients sets to reach a centre with a CA of its own."""
    return plain_environment(
        HOME=home,
        CLARIFAI_PAT=PAT,
        CLARIFAI_USER_ID=USER,
        CLARIFAI_API_BASE=more.pop("base_url", centre.base_url),
        CLARIFAI_ROOT_CERTIFICATES_PATH=centre.pki.ca,
        GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=centre.pki.ca,
        **more,
    )


@dataclass
class StockRunner:
    """One runner; its CLI context is in `home`, so that a second start there finds what the first one made."""

    centre: RunningCentre
    home: Path
    threads: int = 4
    base_url: str = ""
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def marks(self) -> Path:
        """Where the model leaves files that tell what became of its items."""
        return self.home / "marks"

    @property
    def log(self) -> str:
        """What it said."""
        return (self.home / "runner.log").read_text(encoding="utf-8")

    def start(self) -> "StockRunner":
        """Start it; it is not waited for."""
        self.marks.mkdir(parents=True, exist_ok=True)
        command = [executable(ENVIRONMENT, "clarifai"), "model", "serve", "--verbose"]
        with (self.home / "runner.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--concurrency", str(self.threads), STOCK / "model"],
                cwd=self.home,
                env=environment(
                    self.centre,
                    self.home,
                    ECHO_MARKS=str(self.marks),
                    base_url=self.base_url or self.centre.base_url,
                ),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def ready(self, *, control: bool = True) -> "StockRunner":
        """Return when all its streams are open; `control`: the control stream too."""
        try:
            self.centre.wait(
                lambda state: (
                    sum(state["idle"].values()) == self.threads
                    and (not control or sum(state["controls"].values()) == 1)
                ),
                "the runner waits for items",
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        return self

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """End it, as a user does, or as told."""
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(PATIENCE_S)
            finally:
                if self.process.poll() is None:
                    os.kill(self.process.pid, signal.SIGKILL)
            self.process = None

    def __enter__(self) -> "StockRunner":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
