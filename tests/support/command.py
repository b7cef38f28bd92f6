"""The `appliance` command on a configuration of a test's own, run in this process."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner, Result

from appliance.cli.main import cli
from appliance.core import config as configuration
from appliance.core.config import Config


@dataclass
class Command:
    """Runs `appliance …` with a configuration of its own."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "appliance.toml"

    @property
    def root(self) -> Path:
        return self.folder / "models"

    @property
    def keys(self) -> Path:
        return self.folder / "keys.json"

    @property
    def config(self) -> Config:
        return configuration.load(self.file, {}).config

    def __call__(self, *arguments: str | Path) -> Result:
        result = CliRunner().invoke(cli, ["--config", str(self.file), *map(str, arguments)], terminal_width=200)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception  # an error of ours is a sentence and an exit code, never a traceback
        return result

    def good(self, *arguments: str | Path) -> str:
        result = self(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def bad(self, *arguments: str | Path, status: int = 2) -> str:
        result = self(*arguments)
        assert result.exit_code == status, result.output
        assert result.stderr.startswith("error: ")
        return result.stderr


_RIGHTS = "-dac_override,-dac_read_search"


def without_privileges(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run `appliance …` in a process of its own, for which modes of files count even when it is root's."""
    command = [sys.executable, "-m", "appliance", *map(str, arguments)]
    if os.geteuid() == 0:
        command = ["setpriv", f"--inh-caps={_RIGHTS}", f"--bounding-set={_RIGHTS}", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)
