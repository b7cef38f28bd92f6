"""`appliance support-bundle`: what whoever helps must know, in one file, without secrets."""

import dataclasses
import importlib.metadata
import io
import json
import platform
import pwd
import socket
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import click

from appliance import __version__
from appliance.cli import admin, redact, units
from appliance.cli.doctor import examine
from appliance.cli.report import Report
from appliance.core import config as configuration
from appliance.core.config import LoadedConfig
from appliance.core.errors import ApplianceError, ConfigError
from appliance.core.files import file_error, new_file, printable
from appliance.pki.files import Layout
from appliance.pki.report import inspect_directory

_COMMAND_S = 30.0
_MOST_FILES = 5000
_README = """\
Support bundle of inference-appliance {version}, host {host}, {now} UTC.

In it: the effective configuration, what `appliance doctor` says, the daemon's status, readiness and metrics, the unit
files, the end of the journal, versions, and a list of files with owner, mode and size. Model names, host names,
addresses, principals and certificate names are in it. Keys (PATs), private keys and passphrases are not: look through
it before you pass it on all the same.
"""


@click.command(name="support-bundle")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write it; default: a new file here.")
@click.option(
    "--lines", type=click.IntRange(0, 1_000_000), default=5000, show_default=True, help="Lines of the journal."
)
@click.pass_obj
def support_bundle(config_file: Path | None, output: Path | None, lines: int) -> None:
    """Collect what whoever helps you must know into a tar.gz: configuration, doctor, status, metrics, journal.

    Secrets are taken out; the file is readable by you alone. Run it with sudo, so that it sees what the service sees.
    """
    host, now = socket.gethostname(), datetime.now(UTC)
    path = output or Path(f"inference-appliance-support-{host}-{now:%Y%m%dT%H%M%SZ}.tar.gz")
    loaded, problem = _configuration(config_file)
    clean = redact.of(loaded)
    readme = _README.format(version=__version__, host=host, now=f"{now:%Y-%m-%d %H:%M}")
    try:
        with new_file(path) as stream, tarfile.open(fileobj=stream, mode="w:gz") as archive:
            _add(archive, "README.txt", readme)
            for name, make in _parts(config_file, loaded, problem, lines):
                _add(archive, name, clean(_said(make)))
    except OSError as error:
        raise file_error(error, f"{path} cannot be written: {error.strerror}; name another with --output.") from error
    click.echo(f"wrote {path}")


Part = tuple[str, Callable[[], str]]


def _parts(config_file: Path | None, loaded: LoadedConfig | None, problem: str, lines: int) -> Iterator[Part]:
    """Each file of the bundle, and what makes its text."""
    yield "versions.txt", _versions
    yield "configuration.txt", lambda: _effective(loaded) if loaded else problem
    yield "doctor.txt", lambda: _doctor(config_file)
    yield "files.txt", lambda: "\n".join(_files(config_file, loaded)) + "\n"
    if loaded is not None:
        config = loaded.config
        for page in ("status", "readyz", "metrics"):
            yield f"{page}.txt", lambda page=page: admin.text(config.admin.socket, f"/{page}")  # type: ignore[misc]
        yield "certificates.json", lambda: _certificates(config.tls.certificate.parent)
    yield "machine.txt", _machine
    if units.systemd_runs():
        names = (units.SERVICE, units.SOCKET)
        yield "units.txt", lambda: _run("systemctl", "cat", *names) + _run("systemctl", "show", *names)
        flags = [flag for name in names for flag in ("--unit", name)]
        yield "journal.txt", lambda: _run("journalctl", *flags, f"--lines={lines}", "--no-pager", "--output=short-iso")


def _configuration(config_file: Path | None) -> tuple[LoadedConfig | None, str]:
    try:
        return configuration.load(config_file), ""
    except ConfigError as error:
        return None, f"{error}\n"


def _said(make: Callable[[], str]) -> str:
    """The text, or why there is none: one part that fails must not cost the others."""
    try:
        return make()
    except (ApplianceError, OSError, ValueError) as error:
        return f"{error}\n"


def _add(archive: tarfile.TarFile, name: str, text: str) -> None:
    content = text.encode("utf-8", "replace")
    info = tarfile.TarInfo(f"inference-appliance-support/{name}")
    info.size, info.mtime, info.mode = len(content), int(time.time()), 0o600
    archive.addfile(info, io.BytesIO(content))


def _versions() -> str:
    lines = [f"inference-appliance {__version__}", f"Python {platform.python_version()} {platform.python_build()[1]}"]
    lines += [" ".join(platform.uname())]
    with suppress(OSError):
        lines += Path("/etc/os-release").read_text(encoding="utf-8").splitlines()[:5]
    found = ((dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions())
    lines += sorted({f"{name} {version}" for name, version in found}, key=str.lower)
    return "\n".join(lines) + "\n" + _run("systemctl", "--version")


def _effective(loaded: LoadedConfig) -> str:
    rows = [f"{key} = {json.dumps(value, ensure_ascii=False)}  # {origin}" for key, value, origin in loaded.rows()]
    return "\n".join([*(f"warning: {text}" for text in loaded.warnings), *rows]) + "\n"


def _doctor(config_file: Path | None) -> str:
    report = Report(quiet=True)
    examine(config_file, report)
    return "".join(f"{line}\n" for line in report.lines)


def _certificates(folder: Path) -> str:
    reports = inspect_directory(Layout(folder), None, datetime.now(UTC))
    return json.dumps([dataclasses.asdict(report) for report in reports], indent=1) + "\n"


def _files(config_file: Path | None, loaded: LoadedConfig | None) -> Iterator[str]:
    """Owner, group, mode, size and time of all files of ours; never what is in them."""
    folders = [(config_file or configuration.MAIN_FILE).parent]
    if loaded is not None:
        folders += [loaded.config.catalog.state_dir, loaded.config.catalog.root]
    seen: set[Path] = set()
    for folder in folders:
        for path in (folder, *sorted(folder.rglob("*"))):
            if path not in seen and len(seen) < _MOST_FILES:
                seen.add(path)
                yield _listed(path)


def _listed(path: Path) -> str:
    try:
        found = path.lstat()
    except OSError as error:
        return f"{printable(path)}: {error.strerror}"
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = str(found.st_uid)
    moment = datetime.fromtimestamp(found.st_mtime, UTC)
    mode = stat.filemode(found.st_mode)
    return f"{mode} {owner}:{found.st_gid} {found.st_size:>12} {moment:%Y-%m-%dT%H:%M:%SZ} {printable(path)}"


def _machine() -> str:
    parts = []
    for file in ("/proc/meminfo", "/proc/loadavg", "/proc/driver/nvidia/version", "/etc/resolv.conf"):
        with suppress(OSError):
            parts.append(f"== {file}\n{Path(file).read_text(encoding='utf-8', errors='replace')}")
    commands = (("df", "-h"), ("ss", "-ltnp"), ("ip", "-brief", "address"), ("nvidia-smi",), ("timedatectl",))
    return "\n".join([*parts, *(_run(*command) for command in commands)])


def _run(*command: str) -> str:
    """What a program of the system says, with its name above; that it is not there is said too."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=_COMMAND_S, check=False)  # noqa: S603
        text = (done.stdout + done.stderr).decode("utf-8", "replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        text = f"{error}\n"
    return f"== {' '.join(command)}\n{text}"
