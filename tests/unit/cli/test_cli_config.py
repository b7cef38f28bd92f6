"""`appliance config`: what is in force and where it came from, without its secrets."""

import json
import tomllib

import pytest
from support.command import Command

from appliance.core import config as configuration


def test_show_prints_each_value_and_its_origin(appliance: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_LOG__LEVEL", "debug")
    lines = {line.split()[0]: line for line in appliance.good("config", "show").splitlines()}
    assert '"debug"  # APPLIANCE_LOG__LEVEL' in lines["log.level"]
    assert f"# {appliance.file}" in lines["catalog.root"]
    assert "128  # built-in default" in lines["limits.inputs_per_request"]
    assert "(unset)" in lines["server.mtls_listen"]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_show_redacts_secrets(appliance: Command, flags: tuple[str, ...]) -> None:
    appliance.file.write_text(appliance.file.read_text() + '[tls]\nkey_passphrase = "hunter2"\n')
    output = appliance.good("config", "show", *flags)
    assert "hunter2" not in output
    assert "********" in output


def test_show_as_json_has_value_and_origin(appliance: Command) -> None:
    shown = json.loads(appliance.good("config", "show", "--json"))
    assert shown["catalog.root"] == {"value": str(appliance.root), "from": str(appliance.file)}
    assert shown["tls.key_passphrase"]["value"] is None
    assert set(shown) >= {"server.base_url", "auth.require", "limits.image_size"}


def test_problems_are_all_told_and_the_exit_code_is_2(appliance: Command) -> None:
    appliance.file.write_text('[log]\nlevle = 1\n[limits]\nimage_size = "big"\n')
    error = appliance.bad("config", "show")
    assert "2 problems" in error
    assert "Did you mean 'level'?" in error
    assert "limits.image_size" in error


def test_a_file_that_is_not_there_is_told(appliance: Command) -> None:
    appliance.file.unlink()
    assert "there is no such file" in appliance.bad("config", "show")


def test_example_is_toml_and_our_own(appliance: Command) -> None:
    output = appliance.good("config", "example")
    assert output == configuration.example()
    tables = set(configuration.Config.model_fields) - {"principal", "deployment"}  # those stand there as comments
    assert tomllib.loads(output) == {name: {} for name in tables}
