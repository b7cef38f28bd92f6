"""A throw-away machine: systemd as PID 1 in an nspawn container, on an overlay over a root that is never written to.

It stands in namespaces of its own. Outside of it, but in the same private network, are the clients: they see this
machine's files, reach the machine as `HOST` over a veth pair, and nothing else. When the process that booted it ends,
however it ends, the kernel ends everything with it: unshare's first process is killed by its parent's death, its PID
namespace with it, and mounts, network and tmpfs vanish with their namespaces. Only empty cgroups can stay;
`clear_leftovers` removes them.

nspawn filters bpf(2) unless told not to, and then IPAddressDeny= and DeviceAllow= are silently not enforced; the flags
are in `_ENFORCED`, and `probe` asks whether they helped. Limits of memory and tasks are not enforced where this machine
keeps those controllers in cgroup v1.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PATIENCE_S = 120.0
"""How long something is waited for that must happen; only a hung machine takes that long."""
HOST = "appliance.example"
"""The machine's name for the clients outside."""
ADDRESS, OUTSIDE = "10.77.0.2", "10.77.0.1"
"""The two ends of the veth pair. No other machine is in the same network."""

_CGROUPS = "inference-appliance-e2e-"
_ENFORCED = (
    "--capability=CAP_BPF,CAP_SYS_ADMIN,CAP_PERFMON,CAP_NET_ADMIN,CAP_SYS_RESOURCE",
    "--system-call-filter=bpf",
)
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--")
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
    "SYSTEMD_PAGER": "",
    "SYSTEMD_COLORS": "0",
}

_INNER = """
set -eu
mount --make-rprivate /
# A pure cgroup v2 tree, whatever this machine has; only there the device and address rules are BPF programs.
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$CGROUP"
echo 0 > "/sys/fs/cgroup/$CGROUP/cgroup.procs"
mount -t tmpfs -o size=6g,mode=755 machine "$HOME_OF_IT"
mkdir "$HOME_OF_IT/upper" "$HOME_OF_IT/work" "$HOME_OF_IT/root"
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$HOME_OF_IT/upper,workdir=$HOME_OF_IT/work" "$HOME_OF_IT/root"
printf '127.0.0.1 localhost\\n::1 localhost\\n%s\\n' "$HOSTS_LINE" > "$HOME_OF_IT/hosts"
mount --bind "$HOME_OF_IT/hosts" /etc/hosts
ip link set lo up
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_NSPAWN_LOCK=0
exec systemd-nspawn --quiet --directory="$HOME_OF_IT/root" --machine="$NAME" --boot --register=no --keep-unit \
  --console=pipe --private-network --network-veth --resolv-conf=off --timezone=off --link-journal=no "$@"
"""


def missing() -> str:
    """What keeps machines from being booted here, in one sentence with the remedy; "" if nothing does."""
    if os.geteuid() != 0:
        return "machines with a booted systemd need root: sudo make e2e"
    wanted = {"systemd-nspawn": "systemd-container", "ip": "iproute2", "unshare": "util-linux", "setpriv": "util-linux"}
    packages = sorted({package for program, package in wanted.items() if shutil.which(program) is None})
    return f"apt-get install {' '.join(packages)}" if packages else ""


class Machine:
    """One machine, from `boot` to `stop`. Call it from the main thread: it dies with the thread that booted it.

    Attributes:
        name: its host name.
        boot_s: seconds from the start of its first process until systemd had started everything.
    """

    def __init__(self, name: str, root: Path, home: Path, binds: Mapping[Path, str] | None = None) -> None:
        """Args: home: an empty folder of its own, outside. binds: folders outside → where it sees them, read-only."""
        self.name = name
        self.boot_s = 0.0
        self._root = root
        self._home = home
        self._binds = dict(binds or {})
        self._cgroup = f"{_CGROUPS}{os.getpid()}-{name}"
        self._process: subprocess.Popen[bytes] | None = None
        self._nspawn = self._leader = 0

    # ---- life

    def boot(self) -> "Machine":
        """Boot; when it returns, systemd says running or degraded. Raises: RuntimeError: with the console's end."""
        console = self._home / "console.log"
        inside = self._home / "machine"
        inside.mkdir()
        environment = _ENVIRONMENT | {
            "CGROUP": self._cgroup,
            "HOME_OF_IT": str(inside),
            "LOWER": str(self._root),
            "NAME": self.name,
            "HOSTS_LINE": f"{ADDRESS} {HOST}",
        }
        binds = [f"--bind-ro={source}:{target}" for source, target in self._binds.items()]
        begun = time.monotonic()
        with console.open("wb") as log:
            self._process = subprocess.Popen(
                [*_DIES_WITH_US, *_NAMESPACES, "bash", "-c", _INNER, "machine", *_ENFORCED, *binds],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C is for the tests, which then stop the machine
            )
        try:
            self._wait_for_first(lambda: self._find_leader(), console)
            self._wait_for_first(lambda: self.state() in ("running", "degraded"), console)
        except BaseException:
            self.kill()
            raise
        self.boot_s = time.monotonic() - begun
        self._join_network()
        return self

    def _wait_for_first(self, happened: Callable[[], bool], console: Path) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happened():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not boot:\n{console.read_text(errors='replace')[-3000:]}")
            time.sleep(0.02)

    def _find_leader(self) -> bool:
        """Whether there is the container's PID 1: nspawn's child, once it has become systemd."""
        assert self._process is not None
        for nspawn in _children(self._process.pid):
            for child in _children(nspawn):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                        self._nspawn, self._leader = nspawn, child
                        return True
        return False

    def _join_network(self) -> None:
        link = f"ve-{self.name}"[:15]
        self.outside("ip", "address", "add", f"{OUTSIDE}/24", "dev", link)
        self.outside("ip", "link", "set", link, "up")
        self.run("ip", "address", "add", f"{ADDRESS}/24", "dev", "host0")
        self.run("ip", "link", "set", "host0", "up")
        self.run("sh", "-c", 'echo "$1" >> /etc/hosts', "hosts", f"{ADDRESS} {HOST} {self.name}")

    def power_off(self) -> float:
        """Shut down as a machine does. Returns: seconds it took."""
        assert self._process is not None
        begun = time.monotonic()
        os.kill(self._leader, signal.SIGRTMIN + 4)
        self._process.wait(PATIENCE_S)
        self.kill()
        return time.monotonic() - begun

    def kill(self) -> None:
        """End it at once, with everything in it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE_S)
        _remove_cgroup(self._cgroup)

    def __enter__(self) -> "Machine":
        return self.boot()

    def __exit__(self, *_: object) -> None:
        self.kill()

    # ---- in it

    def run(
        self, *command: str | Path, check: bool = True, stdin: str | bytes | None = None, cwd: str = "/"
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in it, as root at its console. A failure fails the test with what was printed, if `check`."""
        return _finish(self._inside(*command, cwd=cwd), check, stdin)

    def shell(self, script: str, check: bool = True, cwd: str = "/") -> "subprocess.CompletedProcess[str]":
        """Run lines of bash in it; the first that fails ends them."""
        return self.run("bash", "-euo", "pipefail", "-c", script, check=check, cwd=cwd)

    def begin(self, *command: str | Path) -> "subprocess.Popen[str]":
        """Start a command in it and go on."""
        return subprocess.Popen(
            self._inside(*command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    def _inside(self, *command: str | Path, cwd: str = "/") -> list[str]:
        set_up = ["env", "-i", "-C", cwd, *(f"{name}={value}" for name, value in _ENVIRONMENT.items())]
        return ["nsenter", "--target", str(self._leader), "--all", "--", *set_up, *map(str, command)]

    def write(self, path: str, content: str | bytes, mode: int = 0o644) -> None:
        """Write a file in it; folders are made, owner is root."""
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"'
        self.run("sh", "-ec", script, "write", path, f"{mode:o}", stdin=content)

    def read(self, path: str) -> str:
        """A text file of it."""
        return self.run("cat", path).stdout

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        return self.run("test", "-e", path, check=False).returncode == 0

    def copy_in(self, folder: Path, target: str, owner: str = "root:root") -> None:
        """Copy a folder into it."""
        packed = subprocess.run(["tar", "-C", str(folder), "-c", "."], capture_output=True, check=True).stdout
        script = 'mkdir -p "$1" && tar -C "$1" -x --no-same-owner && chown -R "$2" "$1"'
        _finish(self._inside("sh", "-ec", script, "copy", target, owner), True, packed)

    def now(self) -> str:
        """Its time, for `journalctl --since`. (--after-cursor leaves out the first entry that a filter finds.)"""
        return self.run("date", "+%F %T.%6N").stdout.strip()

    def state(self) -> str:
        """systemd's own word: starting, running, degraded …"""
        return self.run("systemctl", "is-system-running", check=False).stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit).stdout.strip()

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Return when `condition()` is true; fail when it never is."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE_S:.0f} s"
            time.sleep(0.05)

    # ---- beside it

    def outside(
        self,
        *command: str | Path,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        stdin: str | bytes | None = None,
        cwd: Path | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program of this machine in the network beside it: what a client elsewhere would do."""
        return _finish([*self.beside(cwd), *map(str, command)], check, stdin, environment)

    def begin_outside(
        self, *command: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> "subprocess.Popen[str]":
        """Start such a program and go on."""
        return subprocess.Popen(
            [*self.beside(cwd), *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=None if environment is None else dict(environment),
        )

    def beside(self, cwd: Path | None = None) -> list[str]:
        """What is put in front of a command to run it there."""
        namespaces = ["--mount", "--net", "--pid", f"--wdns={cwd or '/'}"]
        return ["nsenter", "--target", str(self._nspawn), *namespaces, "--"]


def _finish(
    command: list[str],
    check: bool,
    stdin: str | bytes | None,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command,
        input=stdin.encode() if isinstance(stdin, str) else stdin if stdin is not None else b"",
        capture_output=True,
        check=False,
        timeout=5 * PATIENCE_S,
        env=None if environment is None else dict(environment),
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert not (check and done.returncode), f"{command} → {done.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(command, done.returncode, out, err)


def _children(pid: int) -> Iterator[int]:
    """Direct children, of any thread; none when it is gone."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, task.read_text().split())


# ---- leftovers


def clear_leftovers() -> list[str]:
    """End and remove what machines of tests that are gone left; what was found, for a message."""
    found = []
    for folder in _cgroup_root().glob(f"{_CGROUPS}*"):
        owner = int(folder.name.removeprefix(_CGROUPS).partition("-")[0])
        if not Path(f"/proc/{owner}").exists():
            found.append(folder.name)
            _remove_cgroup(folder.name)
    return found


def _remove_cgroup(name: str) -> None:
    """Kill what is in it, and remove it. Killed processes leave it a moment later."""
    top = _cgroup_root() / name
    deadline = time.monotonic() + PATIENCE_S
    while top.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            (top / "cgroup.kill").write_text("1")
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        time.sleep(0.02)


def _cgroup_root() -> Path:
    """Where this machine has its cgroup v2 tree."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise RuntimeError("no cgroup v2 tree is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
