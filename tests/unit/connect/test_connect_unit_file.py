"""The systemd user unit."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.appliance import COMMAND, ROOT

from appliance.connect import settings

UNIT = ROOT / "systemd" / "user" / "inference-appliance-connect.service"


def test_systemd_takes_every_line_of_it(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # The package puts the command there; here it is elsewhere.
    file = tmp_path / UNIT.name
    file.write_text(UNIT.read_text(encoding="utf-8").replace("/usr/bin/appliance", str(COMMAND)), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", file],
        capture_output=True,
        text=True,
        env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert UNIT.name not in done.stderr, done.stderr


def test_it_names_the_default_file_and_lets_it_stop_in_its_time() -> None:
    lines = dict(line.split("=", 1) for line in UNIT.read_text(encoding="utf-8").splitlines() if "=" in line)
    place = str(settings.DEFAULT_FILE).replace("~/.config", "%E")
    assert lines["ExecStart"].endswith(f"appliance connect --config {place}")
    assert lines["ConditionPathExists"] == place
    assert float(lines["TimeoutStopSec"]) > settings.Settings.model_fields["stop_s"].default
    assert lines["Type"] == "notify"
