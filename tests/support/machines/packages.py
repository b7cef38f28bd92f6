"""The packages under test, and the version after them.

`python -m support.machines.packages` makes that version, with packaging/build.py like any other, from a copy of this
repository in which three things differ: the number, the file in /etc (so that an upgrade meets an edited one), and two
keys of the configuration (so that there is something to migrate).
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from appliance import __version__
from support.appliance import ROOT

BUILT = Path(os.environ.get("E2E_PACKAGES", ROOT / "dist"))
"""Where `make packages` leaves the packages."""
MADE = ROOT / "build" / "e2e" / "packages"
"""Where machines see all of them."""

RENAMED, NEW_NAME = "catalog.scan_interval_s", "catalog.settle_s"
DROPPED = "log.sample"
_CONFIGURATION = "packaging/etc/appliance.toml"
_MIGRATION = "appliance/core/migration.py"
NEW_LINE = "# This line came with the next version."


@dataclass(frozen=True)
class Packages:
    """Files in one folder, by their names.

    Attributes:
        version, deb, rpm: under test.
        old_deb: the same deb, its content compressed with xz: Debian 11 reads no zstd.
        next_version, next_deb, next_rpm: the version after it.
    """

    version: str
    next_version: str
    folder: Path = MADE

    @property
    def deb(self) -> str:
        return f"inference-appliance_{self.version}_amd64.deb"

    @property
    def old_deb(self) -> str:
        return f"xz/{self.deb}"

    @property
    def next_deb(self) -> str:
        return f"inference-appliance_{self.next_version}_amd64.deb"

    @property
    def rpm(self) -> str:
        return f"inference-appliance-{self.version}-1.x86_64.rpm"

    @property
    def next_rpm(self) -> str:
        return f"inference-appliance-{self.next_version}-1.x86_64.rpm"

    def size(self, name: str) -> int:
        """Bytes."""
        return (self.folder / name).stat().st_size


def _versions() -> Packages:
    major, minor, patch = __version__.split(".")
    return Packages(__version__, f"{major}.{minor}.{int(patch) + 1}")


def find_packages() -> Packages:
    """Raises: FileNotFoundError: with what makes them."""
    packages = _versions()
    for name in (packages.deb, packages.old_deb, packages.next_deb, packages.rpm, packages.next_rpm):
        if not (MADE / name).exists():
            raise FileNotFoundError(f"{MADE / name} is missing: make e2e")
    return packages


def main() -> None:
    """Gather what machines install. What is there and newer than what it is made from stays."""
    packages = _versions()
    (MADE / "xz").mkdir(parents=True, exist_ok=True)
    for name in (packages.deb, packages.rpm):
        if not (BUILT / name).exists():
            sys.exit(f"{BUILT / name} is missing: make packages")
    newest = (BUILT / packages.deb).stat().st_mtime
    fresh = {name for name in _names(MADE) if (MADE / name).stat().st_mtime >= newest}
    for name in (packages.deb, packages.rpm):
        shutil.copy2(BUILT / name, MADE / name)
    if packages.old_deb not in fresh:
        _compress_anew(MADE / packages.deb, MADE / packages.old_deb)
    if not {packages.next_deb, packages.next_rpm} <= fresh:
        _make_next(packages)


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


_COMPRESS = """
cd "$(mktemp -d)"
ar x "$1"
if [ -e data.tar.zst ]; then
  zstd -dcq data.tar.zst | xz -1 -T0 > data.tar.xz
  rm data.tar.zst
fi
rm -f "$2"
ar rc "$2" debian-binary control.tar.* data.tar.*
rm -r "$PWD"
"""


def _compress_anew(deb: Path, target: Path) -> None:
    """The same deb with its content as xz."""
    subprocess.run(["bash", "-euo", "pipefail", "-c", _COMPRESS, "compress", str(deb), str(target)], check=True)


def _make_next(packages: Packages) -> None:
    scratch = ROOT / "build" / "e2e" / "next"
    shutil.rmtree(scratch, ignore_errors=True)
    listed = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, scratch / name)
    _git(scratch, "init", "--quiet")
    _change(scratch / _CONFIGURATION, r"\Z", f"{NEW_LINE}\n")
    rows = (
        f'(Change("{RENAMED}", "{NEW_NAME}", "{packages.next_version}", "9.9.9"), '
        f'Change("{DROPPED}", "", "{packages.next_version}", "9.9.9", "All are written."))'
    )
    _change(scratch / _MIGRATION, r"(?<=^CHANGES: tuple\[Change, \.\.\.\] = )\(.*?\)$", rows)
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or _git(ROOT, "log", "-1", "--format=%ct").strip()
    command = [sys.executable, "packaging/build.py", "packages", "--version", packages.next_version]
    environment = os.environ | {"SOURCE_DATE_EPOCH": epoch}
    subprocess.run([*command, "--out", str(scratch / "dist")], cwd=scratch, check=True, env=environment)
    for name in (packages.next_deb, packages.next_rpm):
        shutil.move(scratch / "dist" / name, MADE / name)
    shutil.rmtree(scratch)


def _change(file: Path, pattern: str, text: str) -> None:
    """Replace one place. Exits: it is not there any more."""
    changed, count = re.subn(pattern, lambda _: text, file.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    if not count:
        sys.exit(f"{file.name} is not as tests/support/machines/packages.py expects: {pattern}")
    file.write_text(changed, encoding="utf-8")


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
