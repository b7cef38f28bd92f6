"""Debian's signed sources of what the runtime is compiled from: locked by hash, downloaded by hash.

    python3 packaging/runtime/sources.py lock           write sources.lock anew
    python3 packaging/runtime/sources.py fetch FOLDER   download what the lock names

`lock` has apt read the archive's indices in folders of its own, so that this machine's apt is as before. apt checks the
archive's signature over the indices; the indices hold the hash of every file. `fetch` needs the lock only.

Mirrors are those of this machine's apt. On a machine that has none, or to choose another, set DEBIAN_MIRROR and
DEBIAN_SECURITY_MIRROR.
"""

import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOCK = Path(__file__).with_name("sources.lock")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
STABLE = ("trixie", "trixie-updates", "trixie-security")
"""Debian 13: old enough to be settled, and its faults are mended for years."""
CURRENT = ("forky", "sid")


@dataclass(frozen=True)
class Wanted:
    """A source that is compiled in. patched: Debian's own changes are wanted beside the upstream source."""

    suites: tuple[str, ...] = STABLE
    patched: bool = True


WANTED = {
    "autoconf": Wanted(patched=False),  # a tool, for libffi's sake
    "bzip2": Wanted(),
    "expat": Wanted((*STABLE, *CURRENT)),  # it is mended by new versions, which Debian 13 takes over
    "libffi": Wanted(),
    # Its bounds against floods grow from version to version; Debian's changes are about its own builds.
    "nghttp2": Wanted(CURRENT, patched=False),
    "openssl": Wanted(),
    "python3.13": Wanted(),
    "sqlite3": Wanted(),
    "xz-utils": Wanted(),
    "zlib": Wanted(),
}


class SourceError(Exception):
    """Sources cannot be had. Its text says what to do."""


@dataclass(frozen=True)
class Source:
    """One file of a source package. path: below the archive, `pool/…`."""

    component: str
    version: str
    sha256: str
    path: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.path.rsplit("/", 1)[1]


def read_lock() -> list[Source]:
    """What the lock names."""
    lines = LOCK.read_text().splitlines()
    return [Source(*line.split()) for line in lines if line and not line.startswith("#")]


def mirrors() -> tuple[str, str]:
    """Where Debian's archive and its security archive are, in this order. Raises: SourceError."""
    main, security = os.environ.get("DEBIAN_MIRROR"), os.environ.get("DEBIAN_SECURITY_MIRROR")
    for uri in _configured_mirrors():
        if "security" in uri:
            security = security or uri
        elif re.search(r"/debian/?$", uri):
            main = main or uri
    if not main:
        raise SourceError("This machine's apt names no Debian mirror: set DEBIAN_MIRROR to the URL of one.")
    main = main.rstrip("/")
    return main, (security or main + "-security").rstrip("/")


def _configured_mirrors() -> Iterator[str]:
    apt = Path("/etc/apt")
    for file in sorted((apt / "sources.list.d").glob("*.sources")):
        for line in file.read_text().splitlines():
            if line.startswith("URIs:"):
                yield from line.split()[1:]
    for file in [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]:
        if file.exists():
            for line in file.read_text().splitlines():
                if line.startswith("deb "):
                    yield re.sub(r"\[[^]]*\]", "", line).split()[1]


def fetch(source: Source, folder: Path) -> None:
    """Download one file into the folder, unless it is there. Raises: SourceError: it is not what the lock says."""
    target = folder / source.name
    if target.exists() and sha256(target) == source.sha256:
        return
    main, security = mirrors()
    base = security if source.path.startswith("pool/updates/") else main
    helper = ["/usr/lib/apt/apt-helper", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "download-file"]
    # A tilde may be sent as it is; a plus sign is read as a space by some mirrors.
    url = f"{base}/{source.path.replace('+', '%2b')}"
    done = subprocess.run([*helper, url, str(target), f"SHA256:{source.sha256}"], capture_output=True, text=True)
    if done.returncode:
        target.unlink(missing_ok=True)
        raise SourceError(
            f"{source.name} cannot be downloaded with the hash that sources.lock has. When Debian has moved on, run "
            f"`make lock-sources` and commit what it writes. apt said: {(done.stderr or done.stdout).strip()}"
        )


def sha256(path: Path) -> str:
    """Of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock() -> None:
    """Write sources.lock: of each source the newest version that the mirror has. Raises: SourceError."""
    lines = [
        "# Debian's sources that the runtime is compiled from. Made by `make lock-sources` from the archive's signed",
        "# indices. source, version, sha256, path in the archive",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for component, wanted in WANTED.items():
            environment = _apt(Path(scratch), wanted.suites)
            for version, files in _candidates(component, environment):
                needed = [each for each in files if _is_needed(each, wanted)]
                try:
                    for each in needed:
                        fetch(each, Path(scratch))
                except SourceError:  # the indices are newer than the mirror's files, or the other way round
                    print(f"{component} {version} is announced, but the mirror does not have it", file=sys.stderr)
                    continue
                lines += [f"{component} {version} {each.sha256} {each.path}" for each in needed]
                break
            else:
                raise SourceError(f"The mirror has no version of {component} in {', '.join(wanted.suites)}.")
    LOCK.write_text("\n".join(lines) + "\n")


@functools.cache
def _apt(scratch: Path, suites: tuple[str, ...]) -> dict[str, str]:
    """The environment in which apt knows the sources of these suites, and nothing of this machine."""
    main, security = mirrors()
    folder = scratch / "-".join(suites)
    for each in ("lists/partial", "cache/archives/partial"):
        (folder / each).mkdir(parents=True)
    uris = {suite: security if suite.endswith("-security") else main for suite in suites}
    (folder / "list").write_text(
        "".join(f"deb-src [signed-by={KEYRING}] {uri} {suite} main\n" for suite, uri in uris.items())
    )
    (folder / "conf").write_text(
        f'Dir::Etc::sourcelist "{folder}/list"; Dir::Etc::sourceparts "-"; Dir::State::Lists "{folder}/lists";\n'
        f'Dir::Cache "{folder}/cache"; Dir::State::status "/dev/null"; APT::Sandbox::User "root";\n'
        'Acquire::Languages "none";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(folder / "conf")}
    done = subprocess.run(["apt-get", "update", "-qq"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"apt cannot read the archive's indices: {done.stderr.strip()}")
    return environment


def _candidates(component: str, environment: dict[str, str]) -> list[tuple[str, list[Source]]]:
    """Versions that the indices have, the newest first, with their files. A version may be in both archives."""
    shown = subprocess.run(
        ["apt-cache", "showsrc", "--only-source", component],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[tuple[str, list[Source]]] = []
    for entry in shown.stdout.split("\n\n"):
        fields = dict(re.findall(r"^(Version|Directory): (.+)$", entry, re.M))
        hashes = re.search(r"^Checksums-Sha256: *\n((?: .+\n?)+)", entry, re.M)
        if fields and hashes:
            rows = (line.split() for line in hashes[1].splitlines())
            version = fields["Version"]
            files = [Source(component, version, row[0], f"{fields['Directory']}/{row[2]}") for row in rows]
            found.append((version, files))
    return sorted(found, key=lambda each: functools.cmp_to_key(_compare)(each[0]), reverse=True)


def _compare(one: str, other: str) -> int:
    if one == other:
        return 0
    return 1 if subprocess.run(["dpkg", "--compare-versions", one, "gt", other]).returncode == 0 else -1


def _is_needed(source: Source, wanted: Wanted) -> bool:
    upstream = re.search(r"\.orig\.tar\.\w+$", source.name)
    return bool(upstream or (wanted.patched and re.search(r"\.debian\.tar\.\w+$", source.name)))


def main(arguments: list[str]) -> None:
    """The command above."""
    match arguments:
        case ["lock"]:
            lock()
        case ["fetch", folder]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for source in read_lock():
                fetch(source, Path(folder))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SourceError as problem:
        sys.exit(str(problem))
