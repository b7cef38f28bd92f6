"""Root file systems of small machines, made once with mmdebstrap and kept by their recipe's hash.

`python -m support.machines.roots` makes those that are missing. They lie as folders in
`${APPLIANCE_CACHE:-~/.cache/inference-appliance}/roots/<name>-<key>`; machines never write to them. Delete a folder to
have it made anew, with the distribution's packages of that day.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("APPLIANCE_CACHE", "~/.cache/inference-appliance")).expanduser()
_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
_MIRROR = "http://deb.debian.org/debian"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

_BASE = (
    "systemd,systemd-sysv,dbus,libpam-systemd,ca-certificates,iproute2,procps"
    # What our deb depends on: an offline installation finds it in every Debian system that is not minimal.
    ",adduser,init-system-helpers,libstdc++6,libsystemd0,zlib1g"
)
_QUIET = (
    "systemd-firstboot.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-timesyncd.service",
)
"""What has nothing to do in a machine without console and network, and would only fail or wait."""

_STUB = """\
# What a Red Hat system has and this root has not, so that dnf solves the dependencies of our package instead of being
# told to ignore them. The root itself is Debian: this says nothing about SELinux, crypto policies or Red Hat's glibc.
Name: distribution-stub
Version: 9
Release: 1
Summary: Provides what a Red Hat 9 system has
License: none
BuildArch: x86_64
AutoReqProv: no
Provides: /bin/sh
Provides: /sbin/nologin
Provides: /usr/sbin/nologin
Provides: ca-certificates = 2024
Provides: glibc = 2.34
Provides: glibc(x86-64) = 2.34
Provides: libstdc++ = 11.5
Provides: libstdc++(x86-64) = 11.5
Provides: libgcc = 11.5
Provides: zlib = 1.2.11
Provides: shadow-utils = 4.9
Provides: systemd = 252
Provides: systemd-libs = 252
Provides: systemd-libs(x86-64) = 252
%description
Provides what a Red Hat 9 system has.
%files
"""
_MAKE_STUB = (
    "mkdir -p /srv/stub && cd /srv/stub && cat >stub.spec && rpm --initdb && "
    "rpmbuild -bb --quiet --define '_topdir /srv/stub' stub.spec && rpm -i RPMS/x86_64/*.rpm && "
    "cp RPMS/x86_64/*.rpm . && rm -rf BUILD BUILDROOT RPMS SOURCES SPECS SRPMS stub.spec"
)


@dataclass(frozen=True)
class Recipe:
    """How one root is made. Attributes: packages: beside the common ones, with commas. stub: for dnf's solver."""

    name: str
    suite: str
    packages: str = ""
    stub: bool = False

    @property
    def key(self) -> str:
        """A hash of everything that decides what is in it, apart from the day."""
        parts = [self.name, self.suite, _BASE, self.packages, *_QUIET, _STUB + _MAKE_STUB if self.stub else "", _FORMAT]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where it lies, once it is made."""
        return CACHE / "roots" / f"{self.name}-{self.key}"


_FORMAT = "4"
"""Raised when the steps of `make` change."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The main root: with man, so that `systemd-analyze verify` looks for our pages.
        Recipe("debian12", "bookworm", "man-db"),
        Recipe("debian11", "bullseye"),
        Recipe("debian13", "trixie"),
        Recipe("dnf", "bookworm", "rpm,dnf,createrepo-c", stub=True),
    )
}


def make(recipe: Recipe) -> float:
    """Make a root unless it is there. Returns: seconds it took; 0 when it was there.

    Raises: RuntimeError: it cannot be made; the sentence has the end of mmdebstrap's output.
    """
    if recipe.folder.exists():
        return 0.0
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        raise RuntimeError(
            f"the root {recipe.name} is made by mmdebstrap as root: apt-get install mmdebstrap, then sudo"
        )
    begun = time.monotonic()
    recipe.folder.parent.mkdir(parents=True, exist_ok=True)
    made = recipe.folder.with_suffix(f".partial-{os.getpid()}")
    include = _BASE + (f",{recipe.packages}" if recipe.packages else "")
    options = ["--variant=minbase", "--mode=root", f"--include={include}"]
    options += [f"--aptopt={option}" for option in ('Acquire::Languages "none"', 'APT::Install-Recommends "false"')]
    options += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "locale", "doc")]
    try:
        done = subprocess.run(
            ["mmdebstrap", "--quiet", *options, recipe.suite, str(made), _line(recipe.suite)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"mmdebstrap could not make the root {recipe.name}:\n{done.stderr[-2000:]}")
        _settle(made, recipe)
        made.rename(recipe.folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return time.monotonic() - begun


def _line(suite: str) -> str:
    """The source of packages: this machine's own mirror, if it is a Debian system."""
    found = re.search(r"^URIs: *(\S+)", _SOURCES.read_text(), re.MULTILINE) if _SOURCES.exists() else None
    return f"deb [signed-by={_KEYRING}] {found.group(1) if found else _MIRROR} {suite} main"


def _settle(root: Path, recipe: Recipe) -> None:
    """Make it bootable in a container, and like a machine that somebody installed."""
    (root / "etc/machine-id").write_text("uninitialized\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    for name in ("hostname", "resolv.conf"):  # mmdebstrap's machine has left its own
        (root / "etc" / name).unlink(missing_ok=True)
    for unit in _QUIET:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    # What kept this root small must not keep our package's pages out.
    for file in (root / "etc/dpkg/dpkg.cfg.d").glob("99mmdebstrap"):
        file.unlink()
    if recipe.stub:
        done = subprocess.run(
            ["chroot", str(root), "sh", "-ec", _MAKE_STUB], input=_STUB, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the stub for dnf cannot be made:\n{done.stderr[-2000:]}")


def main() -> None:
    """Make what is missing, and say how long each took."""
    chosen = [RECIPES[name] for name in sys.argv[1:] or RECIPES]
    with ThreadPoolExecutor(2) as pool:  # half of the time they wait for the mirror or the disk
        for recipe, took in zip(chosen, pool.map(make, chosen), strict=True):
            print(f"{recipe.name}: {f'made in {took:.0f} s' if took else 'there'}, {recipe.folder}", flush=True)


if __name__ == "__main__":
    main()
