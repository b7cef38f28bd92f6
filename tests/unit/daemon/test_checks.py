"""What a machine lacks for a configuration, told before it hurts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.daemon.checks import space_warning


def test_a_disk_with_space_is_no_news(tmp_path: Path) -> None:
    assert space_warning(tmp_path) == ""
    assert space_warning(tmp_path / "none") == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("options", ["size=64k", "size=16m,nr_inodes=1"])
def test_a_full_disk_is_told(tmp_path: Path, options: str) -> None:
    """Of bytes, or of files."""
    call = f"print(space_warning(Path({str(tmp_path)!r})))"
    code = f"from pathlib import Path; from appliance.daemon.checks import space_warning; {call}"
    script = f'mount -t tmpfs -o {options} none {tmp_path}; exec {sys.executable} -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", code], capture_output=True, text=True, check=True
    )
    assert f"There is no space left at {tmp_path} (catalog.state_dir)" in done.stdout
