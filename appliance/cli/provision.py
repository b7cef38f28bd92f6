"""What `appliance setup` does once it knows what is wanted: each step leaves what is there already, and writes the rest
whole or not at all, so that it can be run again after any failure."""

import os
import socket
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import ValidationError

from appliance.api import keys as key_store
from appliance.catalog import changes
from appliance.core import config as configuration
from appliance.core.config import BUILT_IN, DROP_INS, MAIN_FILE, Config, LoadedConfig
from appliance.core.errors import CertificateError, ConfigError
from appliance.core.files import file_error, make_folder, new_file, write_atomically
from appliance.pki import inspect
from appliance.pki.files import Layout, NewFile, exists, write_all
from appliance.pki.importing import Installed, Sources, install
from appliance.pki.keys import key_pem
from appliance.pki.leaf import Subject, issue, request
from appliance.pki.names import server_common_name, server_sans
from appliance.pki.profiles import DEFAULTS
from appliance.pki.reading import read_certificates
from appliance.pki.root import create_root, load_root
from appliance.pki.signing import Issued, certificate_pem

SHIPPED = Path("/usr/lib/inference-appliance/models")
"""Bundles that come with the packages."""

FILE = "10-setup.toml"
ROOT_NAME = "Inference Appliance Root"

Tables: TypeAlias = dict[str, dict[str, Any]]


def default_host() -> str:
    """What clients probably call this machine."""
    name = socket.getfqdn().lower()
    return name if "." in name and not name.endswith(".arpa") else socket.gethostname().lower() or "localhost"


# ---- configuration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where the configuration is.

    Attributes:
        main: the main file.
        named: as given with --config, None for the default place.
    """

    main: Path
    named: Path | None

    @property
    def file(self) -> Path:
        """What setup writes."""
        return self.main.parent / DROP_INS / FILE


def place_of(config_file: Path | None) -> Place:
    """Where the configuration is, or shall be."""
    named = config_file.absolute() if config_file else None
    return Place(named or MAIN_FILE, named if named != MAIN_FILE else None)


def load(place: Place) -> LoadedConfig:
    """The configuration as it is; a main file that is named and not there yet counts as empty.

    Raises: ConfigInvalid: what is there is wrong.
    """
    if place.named is None or os.path.lexists(place.main):
        return configuration.load(place.named)
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / place.main.name
        empty.touch()
        return configuration.load(empty)


def own_folders(place: Place, loaded: LoadedConfig) -> Tables:
    """Paths for an appliance that is not the machine's own: all beside its file, unless configured otherwise."""
    if place.named is None:
        return {}
    home = place.main.parent
    wanted: Tables = {
        "tls": {
            "certificate": home / "tls" / "server.crt",
            "key": home / "tls" / "server.key",
            "client_ca": home / "tls" / "ca.crt",
        },
        "auth": {"keys_file": home / "keys.json"},
        "catalog": {"root": home / "models", "state_dir": home / "state"},
        "admin": {"socket": home / "admin.sock"},
        "orchestrator": {"pat_file": home / "orchestrator.pat"},
    }
    return {
        section: found
        for section, keys in wanted.items()
        if (found := {k: str(v) for k, v in keys.items() if _untouched(loaded, f"{section}.{k}", place)})
    }


def _untouched(loaded: LoadedConfig, key: str, place: Place) -> bool:
    """Whether nobody but setup said anything about that key."""
    return loaded.origins.get(key, BUILT_IN) in (BUILT_IN, str(configuration.VENDOR_FILE), str(place.file))


def configure(place: Place, wanted: Tables) -> tuple[LoadedConfig, bool]:
    """Write what is wanted into setup's file, beside what an earlier setup wrote, and read everything anew.

    Returns: the configuration, and whether the file changed.
    Raises: ConfigError: it would not be valid, or cannot be written; the file is as it was.
    """
    _check(wanted)
    before = _read(place.file)
    tables: Tables = tomllib.loads(before or "")
    for section, keys in wanted.items():
        tables[section] = {**tables.get(section, {}), **keys}
    content = _as_toml(tables)
    if place.named is not None and not os.path.lexists(place.main):
        _write(place.main, "# What this appliance does differently; every key: appliance config example\n")
    if content == before:
        return configuration.load(place.named), False
    _write(place.file, content)
    try:
        return configuration.load(place.named), True
    except ConfigError:
        if before is None:
            place.file.unlink(missing_ok=True)
        else:
            _write(place.file, before)
        raise


def _check(wanted: Tables) -> None:
    """Say what is wrong with an answer before anything is written."""
    try:
        Config.model_validate(wanted)
    except ValidationError as error:
        parts = [f"{'.'.join(map(str, e['loc']))} {configuration.said(e)}" for e in error.errors()]
        raise ConfigError(f"Nothing was written: {'; '.join(parts)}.") from error


def overridden(loaded: LoadedConfig, wanted: Tables, place: Place) -> list[str]:
    """A sentence for each answer that another layer, read later, overrides."""
    return [
        f"{section}.{key} is set by {origin} too, which counts instead of {place.file}"
        for section, keys in wanted.items()
        for key in keys
        if (origin := loaded.origins.get(f"{section}.{key}", "")) != str(place.file)
    ]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise file_error(error, f"{path} cannot be read: {error.strerror}; run the command with sudo.") from error


def _write(path: Path, content: str) -> None:
    try:
        make_folder(path.parent)
        write_atomically(path, content)
    except OSError as error:
        sentence = f"{path} cannot be written: {error.strerror}; run the command with sudo, or say --config elsewhere."
        raise file_error(error, sentence) from error


def _as_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "# Written by `appliance setup`, which reads it again when it is run again. What stands here counts instead of",
        "# what stands in appliance.toml; files in this folder with a later name count instead of this one.",
    ]
    for section, keys in tables.items():
        lines += ["", f"[{section}]", *(f"{key} = {configuration.toml(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


# ---- certificates ----------------------------------------------------------------------------------------------------

Way: TypeAlias = Literal["own", "csr", "import", "keep"]


def layout_of(config: Config) -> Layout:
    """Where certificates are put. Raises: ConfigError: the configuration has them under other names."""
    layout = Layout(config.tls.certificate.parent)
    if (config.tls.certificate, config.tls.key) != (layout.certificate("server"), layout.key("server")):
        raise ConfigError(
            f"tls.certificate is {config.tls.certificate}, and setup puts certificates at "
            f"{layout.certificate('server')} only; use `appliance certs`, or --certificates keep."
        )
    return layout


def server_names(base_url: str, more: Sequence[str]) -> tuple[str, ...]:
    """Names for the server's certificate: the base URL's host first, then those given, then this machine's."""
    host = urlsplit(base_url).hostname or "localhost"
    own = [socket.gethostname().lower(), "localhost", "127.0.0.1", "::1"]
    return tuple(dict.fromkeys([host, *more, *filter(_can_be_certified, own)]))


def _can_be_certified(name: str) -> bool:
    try:
        server_sans([name])
    except CertificateError:  # a host name with an underscore, say: nobody has to call the machine by it
        return False
    return True


def own_certificates(layout: Layout, names: Sequence[str], organisation: str | None, *, force: bool) -> list[str]:
    """A root of the site's own, and a server certificate from it; what is there already and fits is kept.

    Returns: sentences on what was done. Raises: CertificateError: nothing was written.
    """
    now = datetime.now(UTC)
    subject = Subject(server_common_name(server_sans(names)), server_sans(names), organisation)
    certificate = layout.certificate("server")
    has_root, has_leaf = exists(layout.ca_key), exists(certificate)
    if has_leaf and not force:
        missing = _missing_names(certificate, names[:1])
        if not missing:
            return [f"kept {certificate}"]
        if not has_root or not _is_ours(certificate, load_root(layout, now)):
            raise CertificateError(
                f"{certificate} is not for {missing[0]}, and was not issued by a root of your own here. Have it "
                "issued anew by its CA: --certificates csr; or replace it with one of your own root: --force."
            )
    if not has_root and exists(layout.ca_certificate) and not force:
        raise CertificateError(
            f"{layout.ca_certificate} is there without its key, from another CA; get the certificate from that one "
            "(--certificates csr), or replace it with a root of your own (--force)."
        )
    root = load_root(layout, now) if has_root else create_root(ROOT_NAME, organisation, now, DEFAULTS["root"])
    leaf = issue(root, subject, DEFAULTS["server"], now)
    files = [] if has_root else _root_files(layout, root, force)
    files += [
        NewFile(layout.key("server"), key_pem(leaf.key), "service", replace=has_leaf or force),
        NewFile(certificate, certificate_pem(leaf.certificate), "public", replace=has_leaf or force),
    ]
    write_all(files)
    return [f"wrote {file.path}" for file in files]


def _root_files(layout: Layout, root: Issued, replace: bool) -> list[NewFile]:
    return [
        NewFile(layout.ca_key, key_pem(root.key), "owner", replace),
        NewFile(layout.ca_certificate, certificate_pem(root.certificate), "public", replace),
    ]


def _is_ours(certificate: Path, root: Issued) -> bool:
    return inspect.signed_by(read_certificates(certificate)[0], root.certificate)


def _missing_names(certificate: Path, names: Sequence[str]) -> list[str]:
    leaf = read_certificates(certificate)[0]
    return [name for name in names if not inspect.covers_host(leaf, name)]


def certificate_request(layout: Layout, names: Sequence[str], organisation: str | None, *, force: bool) -> list[str]:
    """A key that waits, and a request for the enterprise's CA; one that waits already is kept.

    Raises: CertificateError: nothing was written.
    """
    path = layout.request("server")
    if exists(path) and exists(layout.pending_key("server")) and not force:
        return [f"kept {path}, whose key waits in {layout.pending_key('server')}"]
    subject = Subject(server_common_name(server_sans(names)), server_sans(names), organisation)
    request(layout, "server", None, subject, DEFAULTS["server"], replace=force)
    return [f"wrote {path}", f"wrote {layout.pending_key('server')}"]


def import_certificates(layout: Layout, sources: Sources, *, force: bool) -> list[str]:
    """Check and install what a CA sent; the very same certificate a second time is fine.

    Raises: CertificateError: with all that is wrong; nothing was written.
    """
    installed = layout.certificate("server")
    if exists(installed) and not force:
        given = {inspect.fingerprint(cert) for cert in read_certificates(sources.certificate)}
        if inspect.fingerprint(read_certificates(installed)[0]) in given:
            return [f"kept {installed}"]
    done: Installed = install(layout, "server", None, sources, datetime.now(UTC), replace=force)
    return [*(f"wrote {path}" for path in done.paths), *(f"note: {note}" for note in done.notes)]


# ---- bundles and keys ------------------------------------------------------------------------------------------------


def add_shipped(config: Config, folder: Path) -> list[str]:
    """Copy the shipped bundles that the catalog lacks. Returns: sentences. Raises: ConfigError, BundleInvalid."""
    if not folder.is_dir():
        raise ConfigError(f"There are no shipped bundles in {folder}; say --no-samples, or install the package.")
    said = []
    for source in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (config.catalog.root / source.name).exists():
            said.append(f"kept bundle {source.name}")
            continue
        changes.add(source, config.catalog)
        said.append(f"added bundle {source.name}")
    return said


def first_key(config: Config, principal: str, file: Path | None) -> str | None:
    """Make a key when there is none.

    Args:   file: a new file for it, 0600, in place of showing it.
    Returns: the key; "" when it was written to the file; None when there are keys already.
    Raises: ConfigError: the file is there already or cannot be written; no key was made.
    """
    if key_store.read_keys(config.auth.keys_file):
        return None
    known = {key_store.DEFAULT_PRINCIPAL, *(entry.name for entry in config.principal)}
    if principal not in known:
        raise ConfigError(f"There is no [[principal]] {principal!r}; configured: {', '.join(sorted(known))}.")
    if file is None:
        return key_store.create_key(config.auth.keys_file, principal, "made by setup")[0]
    entry = None
    try:
        with new_file(file) as stream:
            key, entry = key_store.create_key(config.auth.keys_file, principal, "made by setup")
            stream.write(f"{key}\n".encode("ascii"))
    except FileExistsError:
        raise ConfigError(f"--pat-file {file} is there already; remove it, or name another.") from None
    except BaseException as error:
        if entry is not None:  # nobody has read it, so nobody shall be able to use it
            key_store.revoke_key(config.auth.keys_file, entry.id)
        if isinstance(error, OSError):
            raise file_error(error, f"--pat-file {file} cannot be written: {error.strerror}.") from error
        raise
    return ""
