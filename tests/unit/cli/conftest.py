"""A configured appliance whose daemon does not run, and the `appliance` command on it."""

from pathlib import Path

import pytest
from support.command import Command

from appliance.core import config as configuration


@pytest.fixture
def appliance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(configuration, "VENDOR_FILE", tmp_path / "none.toml")
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("models", "state", "run"):
        (tmp_path / name).mkdir()
    command = Command(tmp_path)
    command.file.write_text(
        f'[catalog]\nroot = "{tmp_path}/models"\nstate_dir = "{tmp_path}/state"\n'
        f'[auth]\nkeys_file = "{tmp_path}/keys.json"\n'
        f'[admin]\nsocket = "{tmp_path}/run/admin.sock"\n',
        encoding="utf-8",
    )
    return command
