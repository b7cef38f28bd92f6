"""The forwarder's configuration: layers, limits, and problems that are told all at once."""

from pathlib import Path
from typing import Any

import pytest

from appliance.connect import settings
from appliance.connect.settings import Settings
from appliance.core.config import ConfigInvalid

GOOD = {"upstream": "https://edge.example.com:8443", "certificate": "/c.crt", "key": "/c.key"}


def problems(**changes: Any) -> list[str]:
    """What is wrong with the good settings, changed so."""
    with pytest.raises(ConfigInvalid) as error:
        settings.load(Path(__file__), {**GOOD, **changes})
    return [str(problem) for problem in error.value.problems if "is not TOML" not in str(problem)]


def write(folder: Path, text: str) -> Path:
    """A configuration file."""
    file = folder / "connect.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_example_is_a_valid_file_and_names_every_key(tmp_path: Path) -> None:
    text = settings.example()
    assert settings.load(write(tmp_path, text)).upstream == "https://appliance.example.com:8443"
    everything = "\n".join(line.removeprefix("#") if line[1:2].isalpha() else line for line in text.splitlines())
    loaded = settings.load(write(tmp_path, everything))
    assert loaded.model_fields_set == set(Settings.model_fields)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'upstream = "https://one"\ncertificate = "/a"\nkey = "/b"\nidle_s = 5\n')
    loaded = settings.load(file, {"upstream": "https://two:99/", "idle_s": None})
    assert (loaded.upstream, loaded.host, loaded.port, loaded.idle_s) == ("https://two:99", "two", 99, 5)
    assert settings.load(file).port == 443


def test_paths_begin_at_the_file_flags_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    file = write(tmp_path, 'upstream = "https://one"\ncertificate = "client.crt"\nkey = "~/client.key"\n')
    loaded = settings.load(file, {"ca": "ca.crt"})
    assert loaded.certificate == tmp_path / "client.crt"
    assert loaded.key == Path("/home/ada/client.key")
    assert loaded.ca == Path.cwd() / "ca.crt"


def test_the_default_file_need_not_exist_and_follows_xdg(tmp_path: Path) -> None:
    assert settings.load(None, GOOD, {"XDG_CONFIG_HOME": str(tmp_path)}).listen == "localhost:8080"
    (tmp_path / "inference-appliance").mkdir()
    write(tmp_path / "inference-appliance", 'listen = "[::1]:9000"')
    assert settings.load(None, GOOD, {"XDG_CONFIG_HOME": str(tmp_path)}).listen == "[::1]:9000"
    with pytest.raises(ConfigInvalid, match="there is no such file"):
        settings.load(tmp_path / "nothing.toml", GOOD)


def test_every_problem_is_told_with_key_value_and_remedy(tmp_path: Path) -> None:
    file = write(tmp_path, 'upstrem = "https://one"\nlisten = "0.0.0.0:1"\nidle_s = "long"\n')
    with pytest.raises(ConfigInvalid) as error:
        settings.load(file)
    text = str(error.value)
    assert "6 problems" in text
    assert "Did you mean 'upstream'?" in text
    assert f'listen = "0.0.0.0:1" ({file}): must be a loopback address or unix:/path' in text
    assert "Give --certificate, or the key certificate" in text
    assert 'idle_s = "long"' in text


@pytest.mark.parametrize("listen", ["localhost:0", "127.0.0.1:80", "127.9.9.9:80", "[::1]:80", "unix:/run/x.sock"])
def test_only_this_machine_may_be_listened_on(listen: str) -> None:
    assert Settings.model_validate({**GOOD, "listen": listen}).listen == listen


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:80", "[::]:80", "10.0.0.1:80", "example.com:80", "80", "unix:relative", "unix:/" + "x" * 107, ""],
)
def test_nothing_else_may(listen: str) -> None:
    assert len(problems(listen=listen)) == 1


@pytest.mark.parametrize(
    "upstream",
    [
        "http://x",
        "x:8443",
        "https://",
        "https://x:0",
        "https://x:99999",
        "https://x/path",
        "https://me@x",
        "https://[::1",
    ],
)
def test_upstream_is_a_base_url(upstream: str) -> None:
    (problem,) = problems(upstream=upstream)
    assert problem.startswith(f'upstream = "{upstream}" (--upstream): ')


def test_an_ipv6_upstream_loses_its_brackets() -> None:
    assert Settings.model_validate({**GOOD, "upstream": "https://[fd00::7]:8443"}).host == "fd00::7"
