"""`appliance connect` as its users type it, as far as nothing is forwarded."""

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from appliance.cli.main import cli
from appliance.connect import settings


def typed(*words: str | Path) -> Result:
    """What the command prints."""
    return CliRunner().invoke(cli, list(map(str, words)))


def test_the_example_is_printed() -> None:
    assert typed("connect", "--example").output == settings.example()


def test_every_setting_is_a_flag_and_a_passphrase_is_none() -> None:
    text = typed("connect", "--help").output
    for name in settings.Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "--cert " in text.replace(",", " ")
    assert "--key-passphrase " not in text


def test_the_daemons_file_is_not_taken_for_this_one(tmp_path: Path) -> None:
    done = typed("--config", tmp_path / "appliance.toml", "connect", "--check")
    assert done.exit_code == 2
    assert "write: appliance connect --config FILE" in done.output


def test_missing_settings_are_told_and_nothing_starts(tmp_path: Path) -> None:
    (tmp_path / "connect.toml").write_text("")
    done = typed("connect", "--config", tmp_path / "connect.toml")
    assert done.exit_code == 2
    assert all(f"Give --{name}" in done.output for name in ("upstream", "certificate", "key"))


def test_no_model_server_is_loaded_for_it() -> None:
    """A client's host need not have onnxruntime, and a forwarder need not hold it in memory."""
    line = (
        "import sys; from appliance.cli.main import cli; cli(['connect', '--example'], standalone_mode=False); "
        "print('LOADED', [name for name in ('onnxruntime', 'onnx', 'grpc', 'clarifai_grpc', 'starlette') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout
