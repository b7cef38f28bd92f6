"""docs/sdk.md is executed: every block of every section, in order, in the environment that it names.

A fence's first word is a language, its second word where it runs: ```` ```python sdk-12 ```` with that environment's
Python, ```` ```sh sdk-12 ```` with a shell that finds that environment's commands first (`sh system`: the system's),
```` ```java Digits ```` as the class of that name.
RUNNERS knows the languages. What a section's `sh` blocks export holds for its later blocks. ```` ```yaml NAME ````
is a file that later blocks find under that name, and ```` ```text ```` is what the block before it prints, "…" standing
for anything.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.appliance import PATIENCE_S, ROOT, Appliance, Pki
from support.java import java_command
from support.programs import environment, need_programs, node_project
from support.stock import SAMPLES, executable

pytestmark = pytest.mark.clients

PAGE = (ROOT / "docs" / "sdk.md").read_text(encoding="utf-8")
ANYTHING = "…"
_FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_EXPORT = re.compile(r"^export (\w+)=(\S*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes: place: an environment, or a file's name.
    """

    language: str
    place: str
    content: str


SECTIONS = {
    section.partition("\n")[0].strip(): [Block(*match) for match in _FENCE.findall(section)]
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
}


def _python(block: Block, folder: Path) -> list[str | Path]:
    script = folder / "block.py"
    script.write_text(block.content, encoding="utf-8")
    return [executable(block.place), script]


def _shell(block: Block, folder: Path) -> list[str | Path]:
    path = "" if block.place == "system" else f"PATH={executable(block.place).parent}:$PATH\n"
    return ["bash", "-euc", path + block.content]


def _node(block: Block, folder: Path) -> list[str | Path]:
    node_project(folder)
    script = folder / "block.mjs"
    script.write_text(block.content, encoding="utf-8")
    return ["node", script]


def _java(block: Block, folder: Path) -> list[str | Path]:
    return java_command(block.content, block.place, folder)


def _php(block: Block, folder: Path) -> list[str | Path]:
    need_programs("php-cli php-curl", "php")
    script = folder / "block.php"
    script.write_text(block.content, encoding="utf-8")
    return ["php", script]


RUNNERS: dict[str, Callable[[Block, Path], list[str | Path]]] = {
    "python": _python,
    "sh": _shell,
    "js": _node,
    "java": _java,
    "php": _php,
}
"""By language, the command that runs a block whose placeholders are filled, in the section's folder."""

FILES = ("yaml", "toml", "json", "html", "mjs")
"""What a browser is to read is run by test_browser."""


class Reader:
    """Somebody who copies a section's blocks, with their own address, root, key and pictures."""

    def __init__(self, folder: Path, native: Appliance, pki: Pki, web: str) -> None:
        picture = sorted(SAMPLES.glob("*.png"))[0]
        key = pki.folder / "clients" / "line-3.key"
        self.folder, self.printed, self.exported = folder, "", {"HOME": str(folder)}
        shutil.copy(picture, folder / "picture.png")
        # The longer ones first.
        self._places = {
            "https://images.example/picture.png": f"{web}/{picture.name}",
            "appliance.example:8443": f"localhost:{native.port()}",
            "appliance.example:8444": f"localhost:{native.port('server.mtls_listen')}",
            "/path/to/ca.crt": str(pki.ca),
            "/path/to/client.key": str(key),
            "/path/to/client.crt": str(key.with_suffix(".crt")),
            "YOUR_PAT": native.key,
        }

    def filled(self, text: str) -> str:
        """With the reader's own in the place of what the page says."""
        for said, own in self._places.items():
            text = text.replace(said, own)
        return text

    def take(self, block: Block) -> None:
        """Do what a block is for."""
        block = Block(block.language, block.place, self.filled(block.content))
        if block.language in FILES:
            assert block.place, f"a {block.language} block needs a file's name"
            (self.folder / block.place).write_text(block.content, encoding="utf-8")
        elif block.language == "text":
            self._compare(block.content)
        else:
            assert block.language in RUNNERS, f"nothing here runs {block.language}; RUNNERS does"
            assert block.place, f"the {block.language} block does not say where it runs:\n{block.content}"
            self._run(block)

    def _run(self, block: Block) -> None:
        done = subprocess.run(
            RUNNERS[block.language](block, self.folder),
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=environment(**self.exported),
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{block.content}\n{done.stdout}\n{done.stderr}"
        self.printed = done.stdout
        if block.language == "sh":
            self.exported |= dict(_EXPORT.findall(block.content))

    def _compare(self, expected: str) -> None:
        pattern = re.escape(expected.strip()).replace(re.escape(ANYTHING), ".*")
        assert re.fullmatch(pattern, self.printed.strip(), re.DOTALL), (
            f"the page says\n{expected}\nand it is\n{self.printed}"
        )


@pytest.mark.parametrize("section", SECTIONS)
def test_the_section_does_what_it_says(section: str, native: Appliance, pki: Pki, web: str, tmp_path: Path) -> None:
    """From top to bottom."""
    assert SECTIONS[section], f"there is nothing to copy in {section!r}"
    reader = Reader(tmp_path, native, pki, web)
    for block in SECTIONS[section]:
        reader.take(block)


def test_every_fence_is_looked_at() -> None:
    """None is written in a way that hides it from this test."""
    assert len(re.findall(r"^\s*(?:```|~~~)", PAGE, re.MULTILINE)) == 2 * sum(map(len, SECTIONS.values()))
