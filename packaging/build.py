"""Makes the packages: one deb and one rpm from one tree, and the CUDA payload for them.

    python packaging/build.py packages    deb and rpm, SBOM, checksums into dist/ (what `make packages` runs)
    python packaging/build.py cuda        the same of inference-appliance-cuda13
    python packaging/build.py release     packages at their smallest, made twice: both have to be the same bytes
    python packaging/build.py runtime     the compiled runtime alone

Each step has a folder in the cache, named by the hash of all that goes into it, so it is done again exactly when
something changed:

    root      the old Debian to compile in       runtime/root.sh
    sources   Debian's signed sources            runtime/sources.lock
    runtime   CPython, OpenSSL, libnghttp2       runtime/compile.sh in the root, without a network
    wheels    packages of the index              requirements/package*.txt, by hash
    stage     the tree that is packed            stage/assemble.sh in the root, without a network; stage/files.txt

Needs root, for it mounts; the programs it needs are in the Makefile's PACKAGES_APT. docs/packages.md says more.
"""

import argparse
import contextlib
import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "runtime")]

import sbom  # noqa: E402  # beside this script, which is no package: `packaging` is one of the index
import sources  # noqa: E402

APP = "usr/lib/inference-appliance"
PACKAGE = "inference-appliance"
CUDA = "inference-appliance-cuda13"
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Debian's names of architectures, which are used here, and rpm's and the index's."""
RUNTIME_EPOCH = 1763596800
"""Seconds since 1970 that the runtime gives as its time; any constant will do."""
SDISTS = ("systemd-python",)
"""Packages of the index that have no wheels."""
GLIBC = 31
"""glibc 2.x that the packages need at most; the root's."""


class BuildError(Exception):
    """The packages cannot be made. Its text says what to do."""


@dataclass(frozen=True)
class Settings:
    """What is asked for."""

    architecture: str
    version: str
    epoch: int
    """Seconds since 1970 that everything in the packages has as its time."""
    cache: Path
    out: Path
    compression: str = "zstd"
    """Of the deb: zstd or xz. Debian 11 reads no zstd."""
    level: str = "6"
    """The compressor's; xz knows 9e as well, the smallest there is."""

    @property
    def machine(self) -> str:
        """rpm's name of the architecture."""
        return MACHINES[self.architecture]

    @property
    def rpm_level(self) -> int:
        """zstd's level of the rpm, which goes with the deb's: fast, or small."""
        return 19 if self.compression == "xz" and self.level >= "6" else 6


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["packages", "cuda", "release", "runtime"])
    parser.add_argument("--version", default="", help="version of the packages; default: the appliance's own")
    parser.add_argument("--architecture", default=_this_architecture(), choices=sorted(MACHINES))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist")
    parser.add_argument("--compression", default="zstd-6", help="of the deb: zstd-6 (fast), xz-1, … xz-9e")
    given = parser.parse_args()
    try:
        settings = _settings(given)
        with _one_at_a_time(settings.cache):
            {"packages": packages, "cuda": cuda_packages, "release": release, "runtime": runtime}[given.step](settings)
    except (BuildError, sources.SourceError) as problem:
        sys.exit(f"packages: {problem}")
    except subprocess.CalledProcessError as problem:
        sys.exit(f"packages: {problem.cmd[0]} failed with {problem.returncode}; what it said is above")


def _settings(given: argparse.Namespace) -> Settings:
    if os.geteuid() != 0:
        raise BuildError("the build mounts file systems; run it as root")
    lacking = [tool for tool in ("mmdebstrap", "dh", "rpmbuild", "zstd", "xz", "readelf") if not shutil.which(tool)]
    if lacking:
        raise BuildError(f"{', '.join(lacking)} is missing; `make packages` installs what is needed as root")
    version = given.version or _own_version()
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise BuildError(f"version {version!r} is not of the form 1.2.3, which deb, rpm and Python order in one way")
    compression, _, level = given.compression.partition("-")
    if not re.fullmatch(r"zstd-([1-9]|1[0-9])|xz-[0-9]e?", given.compression):
        raise BuildError(f"compression {given.compression!r} is neither zstd-1 to zstd-19 nor xz-0 to xz-9, xz-9e")
    cache = Path(os.environ.get("APPLIANCE_CACHE") or Path.home() / ".cache/inference-appliance")
    cache.mkdir(parents=True, exist_ok=True)
    return Settings(given.architecture, version, _epoch(), cache, given.out.resolve(), compression, level)


def _this_architecture() -> str:
    machine = os.uname().machine
    return next((name for name, theirs in MACHINES.items() if theirs == machine), machine)


def _own_version() -> str:
    found = re.search(r'__version__ = "(.+)"', (REPOSITORY / "appliance/__init__.py").read_text())
    assert found
    return found[1]


def _epoch() -> int:
    """SOURCE_DATE_EPOCH, or when the last commit was made: the same for everybody who builds it."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    return int(given or _output("git", "-C", str(REPOSITORY), "log", "-1", "--format=%ct"))


# ---- what is made ----


def packages(settings: Settings) -> list[Path]:
    """deb, rpm, SBOM and SHA256SUMS in settings.out. Returns: deb and rpm."""
    staged = stage(settings)
    return _publish(settings, PACKAGE, HERE / "deb", HERE / "rpm", staged)


def cuda_packages(settings: Settings) -> list[Path]:
    """The same of the CUDA payload."""
    staged = cuda_stage(settings)
    return _publish(settings, CUDA, HERE / "cuda/deb", HERE / "cuda/rpm", staged)


def release(settings: Settings) -> list[Path]:
    """Packages at their smallest. Raises: BuildError: a second build of everything gave other bytes."""
    settings = replace(settings, compression="xz", level="9e")
    made = packages(settings)
    with tempfile.TemporaryDirectory(dir=settings.cache, prefix="again-") as scratch:
        _say("building everything once more, from nothing, to compare")
        again = replace(settings, cache=Path(scratch) / "cache", out=Path(scratch) / "dist")
        again.cache.mkdir()
        # What was downloaded is known by its hash. The rest is made anew.
        for name in ("sources", "wheels"):
            for folder in settings.cache.glob(f"{name}-{settings.architecture}-*"):
                shutil.copytree(folder, again.cache / folder.name)
        for one, other in zip(made, packages(again), strict=True):
            if sources.sha256(one) != sources.sha256(other):
                kept = settings.out / f"{other.name}.again"
                shutil.move(other, kept)
                raise BuildError(f"two builds differ: {one} and {kept}; `diffoscope` shows where")
    _say("both builds gave the same bytes")
    return made


def _publish(settings: Settings, package: str, deb: Path, rpm: Path, staged: Path) -> list[Path]:
    settings.out.mkdir(parents=True, exist_ok=True)
    tree = staged / "tree"
    made = [_deb(settings, package, deb, tree), _rpm(settings, package, rpm, tree)]
    listed = settings.out / f"{package}_{settings.version}_{settings.architecture}.sbom.cdx.json"
    shutil.copyfile(staged / "sbom.cdx.json", listed)
    _sign_rpm(made[1])
    sums = settings.out / "SHA256SUMS"
    # One list for all that lies there: the CUDA payload is made by a command of its own.
    kept = sorted(each for each in settings.out.iterdir() if each.suffix in (".deb", ".rpm", ".json"))
    sums.write_text("".join(f"{sources.sha256(each)}  {each.name}\n" for each in kept))
    _sign_sums(sums)
    for each in made:
        _say(f"{each}: {each.stat().st_size / 1e6:.1f} MB, sha256 {sources.sha256(each)}")
    return made


def _deb(settings: Settings, package: str, folder: Path, tree: Path) -> Path:
    """Build the deb of a tree from the debhelper files in the folder."""
    started = time.monotonic()
    with _scratch("deb") as scratch:
        debian = scratch / "build/debian"
        debian.mkdir(parents=True)
        control = (folder / "control").read_text().replace("@ARCHITECTURE@", settings.architecture)
        (debian / "control").write_text(control)
        for name in ("rules", "copyright"):
            shutil.copy(HERE / "deb" / name, debian / name)
        for each in folder.iterdir():
            if each.name not in ("control", "rules", "copyright"):
                shutil.copy(each, debian / f"{package}.{each.name}")
        date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(settings.epoch))
        (debian / "changelog").write_text(
            f"{PACKAGE} ({settings.version}) stable; urgency=medium\n\n"
            "  * See /usr/share/doc/inference-appliance/NEWS.md.\n\n"
            f" -- Inference Appliance Packaging <packaging@inference-appliance.invalid>  {date}\n"
        )
        environment = {
            "PACKAGE": package,
            "TREE": str(tree),
            "COMPRESSION": settings.compression,
            "LEVEL": settings.level.rstrip("e"),
            "STRATEGY": "-Sextreme" if settings.level.endswith("e") else "",
            # The number of threads changes xz's bytes; so it is the same everywhere, and one where size matters most.
            "DPKG_DEB_THREADS_MAX": "1" if settings.level.endswith("e") else "2",
            "DEB_BUILD_OPTIONS": "nostrip nocheck parallel=2",
        }
        if settings.architecture != _this_architecture():
            environment |= {"DEB_HOST_ARCH": settings.architecture}
        _run(["debian/rules", "binary"], settings.epoch, cwd=scratch / "build", environment=environment)
        made = scratch / f"{package}_{settings.version}_{settings.architecture}.deb"
        target = settings.out / made.name
        shutil.move(made, target)
    _say(f"deb packed in {time.monotonic() - started:.0f} s")
    return target


def _rpm(settings: Settings, package: str, folder: Path, tree: Path) -> Path:
    """Build the rpm of a tree from the spec in the folder."""
    started = time.monotonic()
    with _scratch("rpm") as scratch:
        (scratch / "files").write_text("\n".join(_rpm_files(package, tree)) + "\n")
        date = time.strftime("%a %b %d %Y", time.gmtime(settings.epoch))
        defined = {
            "_topdir": str(scratch / "top"),
            "version_": settings.version,
            "release_date": date,
            "tree": str(tree),
            "file_list": str(scratch / "files"),
            "payload": f"w{settings.rpm_level}T2.zstdio",
            "architecture": settings.machine,
        }
        options = [option for key, value in defined.items() for option in ("--define", f"{key} {value}")]
        command = [
            "rpmbuild",
            "-bb",
            "--quiet",
            "--target",
            settings.machine,
            *options,
            str(folder / f"{package}.spec"),
        ]
        _run(command, settings.epoch, cwd=scratch)
        made = scratch / f"top/RPMS/{settings.machine}/{package}-{settings.version}-1.{settings.machine}.rpm"
        target = settings.out / made.name
        shutil.move(made, target)
    _say(f"rpm packed in {time.monotonic() - started:.0f} s")
    return target


def _rpm_files(package: str, tree: Path) -> Iterator[str]:
    """The spec's list of files, from what the tree has and tmpfiles makes, so that `rpm -V` and tmpfiles agree."""
    own = APP if package == PACKAGE else f"{APP}/cuda"
    yield "%defattr(-,root,root,-)"
    yield f"/{own}"
    for each in sorted(tree.rglob("*")):
        place = each.relative_to(tree)
        if place.is_relative_to(own) or (each.is_dir() and not each.is_symlink()):
            continue
        if place.is_relative_to(f"etc/{PACKAGE}"):
            yield f"%config(noreplace) %attr(0640,root,{PACKAGE}) /{place}"
        elif place.is_relative_to("etc"):
            yield f"%exclude /{place}"  # for a program of Debian's
        elif place.is_relative_to("usr/share/doc"):
            yield f"%doc /{place}"
        else:
            yield f"/{place}"
    if package != PACKAGE:
        yield f"%dir /usr/lib/systemd/system/{PACKAGE}.service.d"
        return
    for line in (tree / f"usr/lib/tmpfiles.d/{package}.conf").read_text().splitlines():
        if line.startswith("d "):
            _, place, mode, user, group, *_ = line.split()
            yield f"%dir %attr({mode},{user},{group}) {place}"


def _sign_rpm(rpm: Path) -> None:
    """SIGN_KEY, a key of gpg's: sign the rpm with it. Off unless it is set."""
    if key := os.environ.get("SIGN_KEY"):
        # Debian's rpm looks for a gpg2 that Debian no longer has.
        defined = [f"_gpg_name {key}", f"__gpg {shutil.which('gpg')}"]
        options = [option for each in defined for option in ("--define", each)]
        _run(["rpmsign", "--addsign", *options, str(rpm)], RUNTIME_EPOCH)


def _sign_sums(sums: Path) -> None:
    """SIGN_KEY: SHA256SUMS.asc by gpg. SIGN_COMMAND: any program, called with SHA256SUMS' path. Off unless set."""
    if key := os.environ.get("SIGN_KEY"):
        subprocess.run(
            ["gpg", "--batch", "--yes", "--local-user", key, "--armor", "--detach-sign", str(sums)], check=True
        )
    if command := os.environ.get("SIGN_COMMAND"):
        subprocess.run(["/bin/sh", "-c", f'{command} "$1"', "sign", str(sums)], check=True)


# ---- steps ----


def root(settings: Settings) -> Path:
    """The old Debian to compile in."""

    def make(folder: Path) -> None:
        main_mirror, _ = sources.mirrors()
        script = str(HERE / "runtime/root.sh")
        folder.rmdir()  # the script makes it, when it is complete
        _run([script, settings.architecture, str(folder), main_mirror], settings.epoch)

    return _cached(settings, "root", [_text("packaging/runtime/root.sh")], make)


def runtime(settings: Settings) -> Path:
    """The folder with runtime.tar."""
    old = root(settings)

    def fetch(folder: Path) -> None:
        for each in sources.read_lock():
            sources.fetch(each, folder)

    fetched = _cached(settings, "sources", [_text("packaging/runtime/sources.lock")], fetch)

    def make(folder: Path) -> None:
        with _scratch("runtime") as scripts:
            # Bash reads a script while it runs it: nobody shall edit this one meanwhile.
            shutil.copy(HERE / "runtime/compile.sh", scripts)
            binds = [f"{fetched}:/sources:ro", f"{scripts}:/scripts:ro", f"{folder}:/out"]
            _in_root(settings, old, binds, ["bash", "/scripts/compile.sh"], RUNTIME_EPOCH)

    # The compiler and its headers are part of what comes out.
    parts = [(old / "installed").read_text(), str(RUNTIME_EPOCH)]
    parts += [_text(f"packaging/runtime/{name}") for name in ("compile.sh", "in-root.sh", "sources.lock")]
    return _cached(settings, "runtime", parts, make)


def wheels(settings: Settings) -> Path:
    """What requirements/package.txt and package-build.txt lock."""
    locks = [_text(f"requirements/{name}.txt") for name in ("package", "package-build")]

    def make(folder: Path) -> None:
        _download(settings, folder, "".join(locks))

    return _cached(settings, "wheels", [*locks, str(GLIBC)], make)


def _download(settings: Settings, folder: Path, lock: str) -> None:
    """Download what a lock names, by hash, for CPython 3.13 on a glibc as old as the root's."""
    built = [entry for name, entry in _entries(lock).items() if name in SDISTS]
    ready = [entry for name, entry in _entries(lock).items() if name not in SDISTS]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--require-hashes", "--dest", str(folder)]
    tags = [f"manylinux_2_{minor}_{settings.machine}" for minor in range(GLIBC, 4, -1)]
    tags += [f"{name}_{settings.machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1")]
    target = ["--only-binary=:all:", "--implementation=cp", "--python-version=3.13"]
    target += ["--abi=cp313", "--abi=abi3", "--abi=none", *(f"--platform={tag}" for tag in tags)]
    with _scratch("lock") as scratch:
        for name, entries, options in (("wheels", ready, target), ("sdists", built, ["--no-build-isolation"])):
            if entries:
                (scratch / name).write_text("\n".join(entries))
                _run([*pip, *options, "-r", str(scratch / name)], settings.epoch)


def stage(settings: Settings) -> Path:
    """A folder with `tree`, all that the packages install, and sbom.cdx.json."""
    old, compiled, downloaded = root(settings), runtime(settings), wheels(settings)
    files = _staged_files()

    def make(folder: Path) -> None:
        started = time.monotonic()
        with _scratch("stage") as scratch:
            own = _own_source(settings, scratch / "own")
            binds = [f"{compiled}:/runtime:ro", f"{downloaded}:/wheels:ro", f"{own}:/own", f"{folder}:/out"]
            _in_root(settings, old, binds, ["bash", "/own/packaging/stage/assemble.sh"], settings.epoch)
        tree = folder / "tree"
        for source, place, mode in files:
            _install(REPOSITORY / source, tree / place, mode)
        (tree / "usr/bin").mkdir(parents=True)
        (tree / "usr/bin/appliance").symlink_to(f"../{APP.removeprefix('usr/')}/bin/appliance")
        components = [
            *sbom.of_sources(folder / "about/patches"),
            *sbom.of_packages(tree / APP / "python/lib/python3.13/site-packages", downloaded, own_name=PACKAGE),
            *sbom.of_models(tree / APP / "models"),
        ]
        licenses = tree / APP / "share/licenses"
        sbom.collect_licenses(components, licenses, licenses / "openssl/LICENSE.txt")
        document = sbom.document(PACKAGE, settings.version, settings.architecture, settings.epoch, components)
        _finish(folder, document, tree / APP / "share/sbom.cdx.json", settings.epoch)
        _say(f"staged in {time.monotonic() - started:.0f} s")

    parts = [compiled.name, downloaded.name, settings.version, str(settings.epoch)]
    parts += [f"{name} {sources.sha256(REPOSITORY / name)}" for name in _own_files()]
    return _cached(settings, "stage", parts, make)


def cuda_stage(settings: Settings) -> Path:
    """The same of the CUDA payload: packages that the main one lacks or has for CPUs, and the unit's drop-in."""
    old, compiled = root(settings), runtime(settings)
    main_names = _entries(_text("requirements/package.txt"))
    lock = _text("requirements/package-cuda13.txt")
    own = "\n".join(entry for name, entry in _entries(lock).items() if name not in main_names)
    build = _text("requirements/package-build.txt")

    def fetch(folder: Path) -> None:
        _download(settings, folder, own + "\n" + build)

    downloaded = _cached(settings, "wheels-cuda", [own, build], fetch)

    def make(folder: Path) -> None:
        with _scratch("cuda") as scratch:
            shutil.copy(HERE / "cuda/assemble.sh", scratch)
            (scratch / "lock.txt").write_text(own)
            (scratch / "build.txt").write_text(build)
            binds = [f"{compiled}:/runtime:ro", f"{downloaded}:/wheels:ro", f"{scratch}:/own:ro", f"{folder}:/out"]
            _in_root(settings, old, binds, ["bash", "/own/assemble.sh"], settings.epoch)
        tree = folder / "tree"
        drop_in = f"usr/lib/systemd/system/{PACKAGE}.service.d/10-cuda.conf"
        _install(REPOSITORY / "systemd/10-cuda.conf", tree / drop_in, 0o644)
        components = sbom.of_packages(tree / APP / "cuda", downloaded, own_name=CUDA)
        sbom.collect_licenses(components, tree / APP / "cuda/licenses")
        document = sbom.document(CUDA, settings.version, settings.architecture, settings.epoch, components)
        _finish(folder, document, tree / APP / "cuda/sbom.cdx.json", settings.epoch)

    parts = [downloaded.name, compiled.name, settings.version, str(settings.epoch)]
    parts += [_text(name) for name in ("packaging/cuda/assemble.sh", "packaging/sbom.py", "systemd/10-cuda.conf")]
    return _cached(settings, "stage-cuda", parts, make)


def _finish(folder: Path, document: str, inside: Path, epoch: int) -> None:
    """Put the SBOM into the tree and beside it, and give everything one time."""
    inside.write_text(document)
    (folder / "sbom.cdx.json").write_text(document)
    for each in [folder / "tree", *(folder / "tree").rglob("*")]:
        if not each.is_symlink() and each.stat().st_mode & 0o022:
            raise BuildError(f"{each} can be written by others than root")
        os.utime(each, (epoch, epoch), follow_symlinks=False)


def _staged_files() -> list[tuple[str, str, int]]:
    """Rows of stage/files.txt, folders as their files. Raises: BuildError: a source is missing."""
    rows = []
    for line in _text("packaging/stage/files.txt").splitlines():
        if line and not line.startswith("#"):
            source, place, mode = line.split()
            names = _own_files(source) if source.endswith("/") else [source]
            if not names or not all((REPOSITORY / name).is_file() for name in names):
                raise BuildError(f"packaging/stage/files.txt wants {source}, which is not there")
            rows += [(name, place + name[len(source) :], int(mode, 8)) for name in names]
    return rows


def _install(source: Path, target: Path, mode: int) -> None:
    """Copy a file; a target that ends in .gz, as man pages do, is compressed."""
    for folder in reversed([each for each in target.parents if not each.exists()]):
        folder.mkdir(mode=0o755)
    content = source.read_bytes()
    target.write_bytes(gzip.compress(content, 9, mtime=0) if target.suffix == ".gz" else content)
    target.chmod(mode)


_OWN = ("appliance", "certs", "docs", "models", "packaging", "systemd", "requirements")
_OWN += ("pyproject.toml", "setup.py", "README.md", "CHANGELOG.md")
"""What of the repository goes into the packages or says how they are made."""


def _own_files(*wanted: str) -> list[str]:
    """All files of the repository under these names; default: of `_OWN`."""
    wanted = wanted or _OWN
    listed = _output("git", "-C", str(REPOSITORY), "ls-files", "-z", "-co", "--exclude-standard", "--", *wanted)
    return sorted(name for name in set(listed.split("\0")) if name and (REPOSITORY / name).is_file())


def _own_source(settings: Settings, folder: Path) -> Path:
    """A copy of our source that says it is settings.version."""
    for name in _own_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, target)
    stated = folder / "appliance/__init__.py"
    stated.write_text(re.sub('__version__ = ".+"', f'__version__ = "{settings.version}"', stated.read_text()))
    return folder


# ---- the cache, and programs ----


def _cached(settings: Settings, step: str, parts: list[str], make: Callable[[Path], None]) -> Path:
    """The step's folder, made when no folder was made from the same parts. What was used last is kept, two a step."""
    key = hashlib.sha256("\0".join([settings.architecture, *parts]).encode()).hexdigest()[:16]
    folder = settings.cache / f"{step}-{settings.architecture}-{key}"
    if not folder.exists():
        _say(f"{step}: making {folder.name}")
        for unfinished in settings.cache.glob(f"{step}-{settings.architecture}-*.part"):
            shutil.rmtree(unfinished)
        part = settings.cache / f"{folder.name}.part"
        part.mkdir()
        make(part)
        part.rename(folder)
    os.utime(folder)
    kept = sorted(
        settings.cache.glob(f"{step}-{settings.architecture}-{'?' * 16}"), key=lambda each: each.stat().st_mtime
    )
    for old in kept[:-2]:
        shutil.rmtree(old)
    return folder


@contextlib.contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    """Wait until nobody else builds with this cache."""
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _scratch(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"inference-appliance-{name}-") as folder:
        yield Path(folder)


def _in_root(settings: Settings, old: Path, binds: list[str], command: list[str], epoch: int) -> None:
    """Run a command inside a copy-on-write view of the root, without a network."""
    script = str(HERE / "runtime/in-root.sh")
    _run([script, str(old), *binds, "--", *command], epoch, environment={"ARCHITECTURE": settings.architecture})


def _run(command: list[str], epoch: int, *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """Run a program. What it says is shown when it fails. Raises: CalledProcessError."""
    variables = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8", "TZ": "UTC", **(environment or {})}
    done = subprocess.run(
        command, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        sys.stderr.write("\n".join(done.stdout.splitlines()[-60:]) + "\n")
        done.check_returncode()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _text(name: str) -> str:
    path = REPOSITORY / name
    if not path.is_file():
        raise BuildError(f"{name} is missing")
    return path.read_text()


def _entries(lock: str) -> dict[str, str]:
    """The entries of a hash lock by their names, comments left out."""
    lines = [line for line in lock.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    entries = re.findall(r"^[^\s].*(?:\n[ ].*)*", "\n".join(lines), re.M)
    return {re.split(r"[=\[]", entry)[0]: entry for entry in entries}


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
