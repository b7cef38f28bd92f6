"""docs/install.md: from a bare machine to the first predict, command by command, for the deb and the rpm."""

import re
from collections.abc import Callable, Iterator

import pytest
from support.machines.installed import ETC, PACKAGES, SERVICE, Installed
from support.machines.machine import HOST, Machine
from support.machines.measured import PAGE, Measured
from support.machines.packages import Packages

_MOST = 10
"""Commands that it may take."""
_NAME, _NETWORKS = "edge.example.com", "10.0.0.0/8"
"""What the reader puts something of their own for; the second fits these machines."""
_DOWNLOADS = "/root/downloads"


@pytest.fixture(scope="module", params=["deb", "rpm"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def machine(
    kind: str, packages: Packages, boot: Callable[[str, str], Machine], put_away: Callable[[Machine], None]
) -> Iterator[Machine]:
    """A bare machine with a package that was downloaded."""
    made = boot(f"page-{kind}", {"deb": "debian12", "rpm": "dnf"}[kind])
    package = {"deb": packages.deb, "rpm": packages.rpm}[kind]
    made.run("install", "-D", "--target-directory", _DOWNLOADS, f"{PACKAGES}/{package}")
    yield made
    put_away(made)


def _commands(kind: str) -> list[str]:
    """The lines of the blocks that say `deb`, `rpm` or `both`, as the reader types them."""
    blocks = re.findall(r"^```sh (deb|rpm|both)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    text = "".join(block for of, block in blocks if of in (kind, "both")).replace("\\\n", " ")
    return [line.replace(_NAME, HOST) for line in text.splitlines() if line and not line.startswith("#")]


def _promised() -> str:
    """What the page says that the last command prints."""
    page = PAGE.read_text(encoding="utf-8")
    after = page[page.rindex("```sh both") :]
    found = re.search(r"^```text\n(.*?)^```", after, re.DOTALL | re.MULTILINE)
    assert found
    return found.group(1)


def test_its_commands_lead_to_an_answer(kind: str, machine: Machine, installed: Installed, measured: Measured) -> None:
    commands = _commands(kind)
    assert 3 <= len(commands) <= _MOST
    assert any(_NETWORKS in command for command in commands)
    for command in commands:
        done = machine.shell(command, cwd=_DOWNLOADS)
    assert done.stdout.splitlines()[0] == _promised().splitlines()[0]
    assert machine.show(SERVICE, "UnitFileState") == "enabled"

    installed.key = machine.read("/root/appliance-pat").strip()
    installed.fetch_root()
    assert installed.predict() == "two"
    measured.fact("docs/install.md, word for word", kind, f"{len(commands)} commands to the first predict")


def test_the_key_was_nowhere_but_in_its_file(machine: Machine, installed: Installed) -> None:
    assert installed.key not in machine.run("journalctl", "--no-pager", "--all").stdout
    assert machine.run("grep", "--recursive", "--files-with-matches", installed.key, ETC, check=False).stdout == ""
    assert machine.run("stat", "--format=%a", "/root/appliance-pat").stdout.strip() == "600"


def test_every_link_of_the_page_leads_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)|^\[[^]]+\]: (\S+)$", text, re.MULTILINE)
    missing = [target for pair in targets for target in pair if target and not (PAGE.parent / target).exists()]
    assert missing == []
