"""The two ways to install: apt with debs, dnf with rpms; each without a network."""

import time
from collections.abc import Callable

from support.machines.installed import HOME, PACKAGES
from support.machines.machine import Machine
from support.machines.measured import Measured, System
from support.machines.packages import Packages


class Deb:
    """apt, as docs/install.md has it; questions about changed files are answered by keeping them."""

    kind = "deb"
    _KEEP = ("--option=Dpkg::Options::=--force-confdef", "--option=Dpkg::Options::=--force-confold")

    def __init__(self, machine: Machine, *, reads_zstd: bool = True) -> None:
        self._machine, self._zstd = machine, reads_zstd

    def file(self, packages: Packages) -> str:
        """What is installed."""
        return packages.deb if self._zstd else packages.old_deb

    def _apt(self, *arguments: str) -> str:
        return self._machine.run("apt-get", "--yes", "--quiet", *arguments, cwd=PACKAGES).stdout

    def install(self, packages: Packages) -> str:
        """Install the version under test."""
        return self._apt("install", f"./{self.file(packages)}")

    def upgrade(self, packages: Packages) -> str:
        """Install the version after it over that."""
        return self._apt("install", *self._KEEP, f"./{packages.next_deb}")

    def downgrade(self, packages: Packages) -> str:
        """Install the version under test over the one after it."""
        return self._apt("install", "--allow-downgrades", *self._KEEP, f"./{packages.deb}")

    def remove(self) -> str:
        """Remove it; configuration and state stay."""
        return self._apt("remove", "inference-appliance")

    def purge(self) -> str:
        """Remove what may be removed."""
        return self._apt("purge", "inference-appliance")


class Rpm:
    """dnf, from a folder of packages as an offline mirror has it."""

    kind = "rpm"
    _OPTIONS = (
        *(
            "--assumeyes",
            "--releasever=9",
            "--disableplugin=*",
            "--setopt=cachedir=/tmp/dnf",
            "--setopt=logdir=/tmp/dnf",
        ),
        "--nogpgcheck",
    )

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def file(self, packages: Packages) -> str:
        """What is installed."""
        return packages.rpm

    def dnf(self, *arguments: str, check: bool = True) -> str:
        """Any dnf command."""
        done = self._machine.run("dnf", *self._OPTIONS, *arguments, check=check)
        return done.stdout + done.stderr

    def prepare(self, packages: Packages) -> None:
        """Repositories of one package each, made on the machine."""
        for name, rpm in (("under-test", packages.rpm), ("next", packages.next_rpm)):
            self._machine.shell(
                f"mkdir -p /srv/{name} /etc/yum.repos.d && cp {PACKAGES}/{rpm} /srv/{name}/ && "
                f"createrepo_c --quiet /srv/{name} && printf '[{name}]\\nname={name}\\nbaseurl=file:///srv/{name}\\n"
                f"gpgcheck=0\\nenabled={int(name == 'under-test')}\\n' > /etc/yum.repos.d/{name}.repo"
            )

    def install(self, packages: Packages) -> str:
        """Install the version under test."""
        return self.dnf("install", "inference-appliance")

    def upgrade(self, packages: Packages) -> str:
        """Install the version after it over that."""
        return self.dnf("--enablerepo=next", "upgrade", "inference-appliance")

    def downgrade(self, packages: Packages) -> str:
        """Install the version under test over the one after it."""
        return self.dnf("downgrade", "inference-appliance")

    def remove(self) -> str:
        """Remove it; what was edited, and state, stay."""
        return self.dnf("remove", "inference-appliance")


def timed(step: Callable[[], object]) -> float:
    """Seconds that a step takes."""
    begun = time.monotonic()
    step()
    return time.monotonic() - begun


def describe(machine: Machine, packages: Packages, way: Deb | Rpm, measured: Measured) -> System:
    """Install the package under test, and begin this system's row of the table."""
    took = timed(lambda: way.install(packages))
    name = machine.shell('. /etc/os-release; echo "$PRETTY_NAME"').stdout.strip()
    system = System(
        distribution=name if way.kind == "deb" else f"{name} with dnf and rpm, a stub for a Red Hat 9 system",
        systemd=machine.run("systemctl", "--version").stdout.split()[1],
        glibc=machine.run("ldd", "--version").stdout.splitlines()[0].split()[-1],
        package=way.kind,
        size=packages.size(way.file(packages)),
        install_s=took,
        installed=int(machine.run("du", "--bytes", "--summarize", HOME).stdout.split()[0]),
        boot_s=machine.boot_s,
    )
    return measured.systems.setdefault(f"{way.kind} {name}", system)
