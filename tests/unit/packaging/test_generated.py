"""What the packages install besides the program: in step with the code, and good for the programs that read it."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import appliance

ROOT = Path(__file__).parents[3]
PACKAGING = ROOT / "packaging"
PAGES = ("appliance.1", "appliance.toml.5", "inference-appliance.8")


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", PACKAGING / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(generator().outputs()), ids=lambda path: path.name)
def test_what_is_committed_is_what_the_code_says(path: Path) -> None:
    """If this fails: python packaging/generate.py"""
    assert path.read_text(encoding="utf-8") == generator().outputs()[path]


# ---- man pages -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_good_roff(page: str) -> None:
    command = ["man", "--warnings=all", "--local-file", str(PACKAGING / "man" / page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "SEE ALSO" in done.stdout


def test_every_verb_and_every_exit_status_is_in_the_manual() -> None:
    page = (PACKAGING / "man" / "appliance.1").read_text()
    verbs = ["serve", "reload", "setup", "doctor", "support-bundle", "check", "certs issue server", "models add"]
    for verb in verbs:
        assert "\\fBappliance " + verb.replace("-", "\\-") + "\\fR" in page
    assert [int(number) for number in re.findall(r"^\\fB(\d)\\fR$", page, re.MULTILINE)] == list(range(8))


def test_what_the_manual_says_of_the_unit_is_so() -> None:
    page = (PACKAGING / "man" / "inference-appliance.8").read_text().replace("\\-", "-")
    unit = (ROOT / "systemd" / "inference-appliance.service").read_text()
    assert "IPAddressDeny=any" in page
    assert "IPAddressDeny=any" in unit
    assert "watchdog (20 s)" in page
    assert "WatchdogSec=20\n" in unit
    assert "ten starts in five minutes" in page
    assert "StartLimitBurst=10\n" in unit
    assert "StartLimitIntervalSec=300\n" in unit
    assert "After exit statuses 2, 3 and 5" in page
    assert "RestartPreventExitStatus=2 3 5\n" in unit


# ---- completion ------------------------------------------------------------------------------------------------------


def shell(tmp_path: Path, *command: str, script: str) -> str:
    """What a shell prints that has `appliance` on its path."""
    program = tmp_path / "appliance"
    program.write_text(f'#!/bin/sh\necho started >> {tmp_path}/started\nexec {sys.executable} -m appliance "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    return subprocess.run(
        [*command, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    ).stdout


def test_bash_completes_verbs_and_starts_python_only_then(tmp_path: Path) -> None:
    source = f"source {PACKAGING}/completion/appliance.bash\n"
    assert shell(tmp_path, "bash", "--norc", script=source + "complete -p appliance") != ""
    assert not (tmp_path / "started").exists()
    ask = 'COMP_WORDS=(appliance sup); COMP_CWORD=1; _appliance_completion appliance; echo "${COMPREPLY[@]}"'
    assert shell(tmp_path, "bash", "--norc", script=source + ask).split() == ["support-bundle"]
    assert (tmp_path / "started").exists()


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes_verbs(tmp_path: Path) -> None:
    script = f"source {PACKAGING}/completion/appliance.fish; complete -C 'appliance sup'"
    assert shell(tmp_path, "fish", "--no-config", script=script).split("\t")[0] == "support-bundle"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    """As a function of its own, autoloaded from a folder of fpath: its first line says for which command."""
    script = f"fpath=({PACKAGING}/completion $fpath); autoload -U compinit; compinit -D -u; echo ${{_comps[appliance]}}"
    assert shell(tmp_path, "zsh", "-f", script=script).strip() == "_appliance"


# ---- logcheck --------------------------------------------------------------------------------------------------------


def quiet_sentences() -> set[str]:
    """What the daemon writes at level info, with something in the place of what varies."""
    found = set()
    package = Path(appliance.__file__).parent
    for file in sorted(package.rglob("*.py")):
        if file.is_relative_to(package / "connect"):  # another program's
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "info"
                and isinstance(node.func.value, ast.Name)
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                sentence = re.sub(r"%\.?\d*[sd]", "7", str(node.args[0].value))
                found.add(re.sub(r"%\.?\d*f", "0.25", sentence))
    return found


def ignored(line: str) -> bool:
    rules = PACKAGING / "logcheck" / "inference-appliance"
    command = ["grep", "--extended-regexp", "--quiet", f"--file={rules}"]
    return subprocess.run(command, input=line + "\n", text=True, check=False).returncode == 0


def test_what_is_no_news_is_left_out_of_logcheck_s_mail() -> None:
    sentences = quiet_sentences()
    assert {"ready", "stopped", "loading", "ready after 0.25 s"} <= sentences
    said = [s for s in sentences if not ignored(f"Nov 30 10:00:00 edge inference-appliance[712]: {s}")]
    assert said == []


@pytest.mark.parametrize(
    "line",
    [
        "Nov 30 10:00:00 edge systemd[1]: Started inference-appliance.service - Clarifai's predict API on this "
        "machine.",
        "2026-11-30T10:00:00.000000+00:00 edge systemd[1]: inference-appliance.service: Deactivated successfully.",
        "2026-11-30T10:00:00.000000+00:00 edge inference-appliance[7]: ready",
        "2026-11-30T10:00:00.000000+00:00 edge inference-appliance[7]: ready after 0.5 s model=appliance/main/digits",
    ],
)
def test_what_systemd_says_of_a_normal_life_is_left_out_too(line: str) -> None:
    assert ignored(line)


@pytest.mark.parametrize(
    "line",
    [
        "Nov 30 10:00:00 edge inference-appliance[7]: reload failed, the old state goes on: x",
        "Nov 30 10:00:00 edge inference-appliance[7]: not ready: x",
        "Nov 30 10:00:00 edge systemd[1]: inference-appliance.service: Watchdog timeout (limit 20s)!",
        "Nov 30 10:00:00 edge systemd[1]: inference-appliance.service: Failed with result 'exit-code'.",
        "Nov 30 10:00:00 edge systemd[1]: Failed to start inference-appliance.service.",
    ],
)
def test_what_is_news_is_not_left_out(line: str) -> None:
    assert not ignored(line)
