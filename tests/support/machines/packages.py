"""The packages under test: those that `make packages` left in dist/, and the same as the version after it."""

import os
from dataclasses import dataclass
from pathlib import Path

from support.appliance import ROOT


@dataclass(frozen=True)
class Packages:
    """Files in one folder, by their names. Attributes: next_…: the same content as the version after it."""

    folder: Path
    version: str
    next_version: str
    deb: str
    next_deb: str
    rpm: str
    next_rpm: str

    def size(self, name: str) -> int:
        """Bytes."""
        return (self.folder / name).stat().st_size


def find_packages() -> Packages:
    """Raises: FileNotFoundError: with what makes them."""
    folder = Path(os.environ.get("E2E_PACKAGES", ROOT / "dist"))
    debs = sorted(folder.glob("inference-appliance_*_amd64.deb"))
    if len(debs) < 2:
        raise FileNotFoundError(f"{folder} has no packages of two versions: make packages")
    versions = [deb.name.split("_")[1] for deb in debs]
    rpms = sorted(folder.glob("inference-appliance-[0-9]*.rpm"))
    return Packages(
        folder.resolve(),
        versions[0],
        versions[1],
        debs[0].name,
        debs[1].name,
        *(rpms[i].name if rpms else "" for i in (0, 1)),
    )
