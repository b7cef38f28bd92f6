"""A virtual machine for what containers cannot show here: limits of memory, tasks and CPU time, which the kernel
enforces only where its controllers are in cgroup v2, and a CPU that is older than this machine's.

qemu emulates it (no /dev/kvm is needed), so it is ten times slower. Its whole disk is an initramfs: a root of
`roots` with the package installed and set up. One script runs in it and reports; then it powers itself off.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.machines.roots import CACHE, Recipe

CPU = "Nehalem"
"""qemu's model of 2008 without AVX: x86-64-v2, what numpy's wheels demand."""
CPUS, MEMORY = 2, "3G"
PATIENCE_S = 900.0
"""How long it may take from power-on to power-off."""

_PACKAGES = ("qemu-system-x86", "cpio", "mmdebstrap")
_KERNEL = "linux-image-cloud-amd64"

_INIT = """\
#!/bin/sh
# The kernel's first root cannot be left, which sandboxes must: put the same tree over it, as an ordinary mount.
mount -n -t proc proc /proc
mkdir /over
mount -n --bind / /over
cd /over
mount -n --move . /
exec chroot . /lib/systemd/systemd
"""
_NODES = "cd dev; [ -e console ] || mknod -m 600 console c 5 1; [ -e null ] || mknod -m 666 null c 1 3"
_UNIT = """\
[Unit]
After=multi-user.target systemd-tmpfiles-setup.service
[Service]
Type=oneshot
ExecStart=-/usr/lib/inference-appliance/python/bin/python3.13 -I /root/script
StandardOutput=file:/dev/ttyS1
StandardError=inherit
ExecStopPost=/bin/systemctl poweroff --no-block
TimeoutStartSec=infinity
"""


def missing() -> str:
    """What keeps it from being started here, in one sentence with the remedy; "" if nothing does."""
    if os.geteuid() != 0:
        return "a virtual machine's root is made as root"
    programs = ("qemu-system-x86_64", "cpio", "mmdebstrap")
    lacking = [package for program, package in zip(programs, _PACKAGES, strict=True) if shutil.which(program) is None]
    return f"apt-get install {' '.join(lacking)}" if lacking else ""


def kernel() -> Path:
    """Debian's kernel for virtual machines, downloaded and verified by apt, and kept. Raises: CalledProcessError."""
    depends = _output("apt-cache", "depends", _KERNEL)
    found = re.search(r"Depends: (linux-image-\S+)", depends.replace("\n", " "))
    assert found, f"apt knows no {_KERNEL}: {depends}"
    image = CACHE / "roots" / f"{found[1]}.vmlinuz"
    if not image.exists():
        scratch = CACHE / "roots" / f"kernel-{os.getpid()}"
        scratch.mkdir(parents=True)
        try:
            _output("apt-get", "download", found[1], cwd=scratch)
            (deb,) = scratch.glob("*.deb")
            _output("dpkg-deb", "-x", str(deb), str(scratch / "tree"))
            (made,) = (scratch / "tree/boot").glob("vmlinuz-*")
            made.rename(image)
        finally:
            shutil.rmtree(scratch)
    return image


def boot(recipe: Recipe, deb: Path, prepare: str, home: Path) -> dict[str, Any]:
    """Install a deb on a root, run `prepare` there with this machine's CPU, then limits_script in the virtual machine.

    Args:    prepare: lines of bash, run as root. home: an empty folder of its own.
    Returns: what the script found, by name.
    Raises:  RuntimeError: it did not end in time; the sentence has the end of its console.
    """
    initramfs, console, report = home / "initramfs", home / "console.log", home / "report"
    with _tree(recipe, home) as tree:
        shutil.copy2(deb, tree / "root" / deb.name)
        _inside(tree, f"dpkg -i /root/{deb.name} && rm /root/{deb.name}\n{prepare}")
        (tree / "etc/machine-id").write_text(f"{'0123456789abcdef' * 2}\n")  # no first boot, which enables all units
        _output("sh", "-ec", _NODES, cwd=tree)
        (tree / "init").write_text(_INIT)
        (tree / "init").chmod(0o755)
        shutil.copy(Path(__file__).with_name("limits_script.py"), tree / "root/script")
        (tree / "etc/systemd/system/script.service").write_text(_UNIT)
        wants = tree / "etc/systemd/system/default.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / "script.service").symlink_to("../script.service")
        pack = f"find . -xdev -print0 | cpio --null --create --format=newc --quiet > {initramfs}"
        _output("sh", "-ec", pack, cwd=tree)
    command = ["setpriv", "--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-machine", "pc", "-cpu", CPU]
    command += ["-accel", "tcg,thread=multi", "-smp", str(CPUS), "-m", MEMORY, "-nodefaults", "-display", "none"]
    command += ["-no-reboot", "-kernel", str(kernel()), "-initrd", str(initramfs)]
    command += ["-append", "rdinit=/init console=ttyS0 panic=-1 systemd.show_status=no"]
    command += [part for file in (console, report) for part in ("-serial", f"file:{file}")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        said = done.stderr
    except subprocess.TimeoutExpired:
        said = f"it was ended after {PATIENCE_S:.0f} s"
    finally:
        initramfs.unlink(missing_ok=True)
    lines, tail = ([line for line in _text(file).splitlines() if line] for file in (report, console))
    if not lines or lines[-1] != "end":
        raise RuntimeError("\n".join(["the virtual machine did not come to its end", said, *lines, *tail[-60:]]))
    return dict(json.loads(line) for line in lines[:-1])


@contextlib.contextmanager
def _tree(recipe: Recipe, home: Path) -> Iterator[Path]:
    """The root with a writable layer over it, kept in memory."""
    layer, tree = home / "layer", home / "tree"
    layer.mkdir()
    tree.mkdir()
    _output("mount", "-t", "tmpfs", "-o", "size=4g,mode=755", "layer", str(layer))
    try:
        (layer / "upper").mkdir()
        (layer / "work").mkdir()
        options = f"lowerdir={recipe.folder},upperdir={layer}/upper,workdir={layer}/work"
        _output("mount", "-t", "overlay", "-o", options, "overlay", str(tree))
        try:
            yield tree
        finally:
            _output("umount", "--lazy", str(tree))
    finally:
        _output("umount", "--lazy", str(layer))


def _inside(tree: Path, script: str) -> None:
    """Run lines of bash in the tree, with its own /proc and without a network. Fails with what they said."""
    enter = 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" bash -euo pipefail -c "$1"'
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child=KILL", "--", "sh", "-ec", enter]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run([*command, str(tree), script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _output(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""
