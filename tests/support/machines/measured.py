"""What the tests measured: the table in docs/install.md, written by the run that measured it."""

import os
import time
from dataclasses import dataclass, field

from support.appliance import ROOT
from support.documents import table, with_part

PAGE = ROOT / "docs" / "install.md"
TABLE = ROOT / "build" / "e2e" / "table.md"


@dataclass
class System:
    """One root with one package. Attributes: times in seconds, sizes in bytes; 0 was not measured."""

    distribution: str
    systemd: str
    glibc: str
    package: str
    size: int
    install_s: float
    installed: int = 0
    boot_s: float = 0.0
    ready_s: float = 0.0
    upgrade_s: float = 0.0


@dataclass
class Measured:
    """Rows of both tables, in the order of the tests."""

    systems: dict[str, System] = field(default_factory=dict)
    facts: list[tuple[str, str, str]] = field(default_factory=list)

    def fact(self, what: str, where: str, result: str) -> None:
        """A row of the second table; only a test that passed so far calls it."""
        self.facts.append((what, where, result))

    def text(self) -> str:
        """Both tables."""
        head = ["system", "systemd", "glibc", "package", "size", "on disk", "install", "upgrade", "start to READY"]
        rows = [
            [
                system.distribution,
                system.systemd,
                system.glibc,
                system.package,
                f"{system.size / 1e6:.1f} MB",
                f"{system.installed / 1e6:.0f} MB" if system.installed else "–",
                _seconds(system.install_s),
                _seconds(system.upgrade_s),
                _seconds(system.ready_s),
            ]
            for system in self.systems.values()
        ]
        facts = [[what, where, result] for what, where, result in self.facts]
        run = f"Run of {time.strftime('%Y-%m-%d', time.gmtime())}, {len(os.sched_getaffinity(0))} CPUs."
        return f"{run}\n\n{table(head, rows)}\n{table(['shown', 'on', 'result'], facts)}"

    def write(self, *, into_page: bool) -> None:
        """Write build/e2e/table.md and, if asked for, the part of docs/install.md between its markers.

        Raises: ValueError: the page has no markers.
        """
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(self.text(), encoding="utf-8")
        if into_page:
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(with_part(page, "measured by make e2e", f"\n{self.text()}"), encoding="utf-8")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value else "–"
