"""Configuration of the forwarder: one TOML file without sections, flags over it, every problem reported at once."""

import difflib
import json
import os
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator

from appliance.core.config import ConfigInvalid, FilePath, Problem, Section, check_local, said

DEFAULT_FILE = Path("~/.config/inference-appliance/connect.toml")
PASSPHRASE_VARIABLE = "INFERENCE_APPLIANCE_CONNECT_PASSPHRASE"  # noqa: S105  # where it is, not what it is
"""Names no setting of the daemon's (`APPLIANCE_*`), which would refuse it in an environment that both share."""

_PATHS = ("certificate", "key", "key_passphrase_file", "ca")


class Settings(Section):
    """All of it. A flag of `appliance connect` has a key's name with dashes, and wins over the file."""

    upstream: str = Field(
        examples=["https://appliance.example.com:8443"],
        description="The appliance: scheme, host and port, as in its server.base_url. The host must be among the names "
        "of its certificate.",
    )
    certificate: FilePath = Field(
        examples=["~/.config/inference-appliance/client.crt"],
        description="The client certificate, PEM, followed by its intermediates. It is read again when it changes, as "
        "all these files are. A path begins with / or ~, or at this file's folder.",
    )
    key: FilePath = Field(
        examples=["~/.config/inference-appliance/client.key"],
        description="Its private key, PEM; only you should be able to read it.",
    )
    key_passphrase_file: FilePath | None = Field(
        None,
        examples=["~/.config/inference-appliance/client.passphrase"],
        description="File whose first line is the key's passphrase; instead, the environment may hold it in "
        f"{PASSPHRASE_VARIABLE}. Unset: the key has none.",
    )
    ca: FilePath | None = Field(
        None,
        examples=["~/.config/inference-appliance/ca.crt"],
        description="The root certificates that the appliance's certificate is verified with, PEM. Unset: those that "
        "this system trusts.",
    )
    listen: str = Field(
        "localhost:8080",
        description="Where clients connect, without TLS: localhost:PORT (127.0.0.1 and [::1]), 127.0.0.1:PORT, "
        "[::1]:PORT, or unix:/absolute/path. Nothing else: whoever can connect here speaks with your certificate.",
    )
    max_connections: int = Field(
        1024,
        ge=1,
        le=16_384,
        description="Connections of clients that are forwarded at once; those beyond are told to come later.",
    )
    connect_timeout_s: float = Field(
        10.0, gt=0, le=120, description="Seconds for a connection to the appliance, name look-up and TLS included."
    )
    retry_max_s: float = Field(
        5.0,
        ge=0.1,
        le=300,
        description="While the appliance cannot be reached, attempts become rarer, up to one in so many seconds; "
        "clients are answered at once in between.",
    )
    idle_s: float = Field(
        3600.0, ge=0, description="Seconds after which a connection on which nothing moves is closed; 0: never."
    )
    stop_s: float = Field(
        5.0, ge=0, le=600, description="Seconds that open connections are given to end by themselves at a stop."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is written.")

    @field_validator("upstream")
    @classmethod
    def _check_upstream(cls, value: str) -> str:
        parts = urlsplit(value)
        try:
            port = parts.port
        except ValueError:
            raise ValueError("has a port that is not a number between 0 and 65535") from None
        if parts.scheme != "https" or not parts.hostname or port == 0:
            raise ValueError('must be "https://host" or "https://host:port"')
        if parts.path.rstrip("/") or parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("must end after the port: paths and queries are the client's affair, credentials too")
        return value.rstrip("/")

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        return check_local(value, "nobody is asked who they are there")

    @property
    def host(self) -> str:
        """The appliance's host, which its certificate must name."""
        return urlsplit(self.upstream).hostname or ""

    @property
    def port(self) -> int:
        """The appliance's port."""
        return urlsplit(self.upstream).port or 443


def load(
    file: Path | None = None, flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """The file with the flags over it.

    Args:
        file: instead of the default, which need not exist.
        flags: key → value; paths in it begin at the working directory.
        environ: instead of `os.environ`, where XDG_CONFIG_HOME may say where the default file is.
    Raises:
        ConfigInvalid: with every problem.
    """
    path = file.expanduser() if file else default_file(os.environ if environ is None else environ)
    problems: list[Problem] = []
    merged, origins = _read(path, file is not None, problems), {}
    origins = dict.fromkeys(merged, str(path))
    for name in _PATHS:
        if isinstance(merged.get(name), str) and merged[name]:
            merged[name] = str(path.parent / Path(merged[name]).expanduser())
    for name, value in (flags or {}).items():
        if value is not None:
            is_path = name in _PATHS and value != ""
            merged[name] = str(Path.cwd() / Path(str(value)).expanduser()) if is_path else value
            origins[name] = f"--{name.replace('_', '-')}"
    settings = None
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        problems += [_problem(entry, merged, origins) for entry in error.errors()]
    if problems or settings is None:
        raise ConfigInvalid(problems)
    return settings


def default_file(environ: Mapping[str, str]) -> Path:
    """Where the file is that nobody named. Source: XDG Base Directory Specification."""
    home = environ.get("XDG_CONFIG_HOME", "")
    if home.startswith("/"):
        return Path(home) / "inference-appliance" / DEFAULT_FILE.name
    return DEFAULT_FILE.expanduser()


def example() -> str:
    """The file with every key, its meaning and its default."""
    lines = [
        "# appliance connect: lets clients that cannot send a client certificate reach an appliance that wants one.",
        f"# Put it at {DEFAULT_FILE}; `appliance connect --check` says what is wrong.",
        "# Keys with a # are shown with their default, or with an example where they are unset by default.",
    ]
    for name, field in Settings.model_fields.items():
        lines += ["", *textwrap.wrap(field.description or "", 116, initial_indent="# ", subsequent_indent="# ")]
        value = field.examples[0] if field.examples else field.default
        lines.append(f"{'' if field.is_required() else '#'}{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _read(path: Path, named: bool, problems: list[Problem]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if named:
            remedy = "Name an existing file; `appliance connect --example` prints one."
            problems.append(Problem(str(path), None, "there is no such file", remedy))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(Problem(str(path), None, f"is not TOML: {error}", "Mend that line."))
    except OSError as error:
        problems.append(Problem(str(path), None, f"cannot be read: {error.strerror}", "Mend its permissions."))
    return {}


def _problem(entry: Any, merged: Mapping[str, Any], origins: Mapping[str, str]) -> Problem:
    """One pydantic error as a sentence with the key, the value and what to do."""
    key = ".".join(str(part) for part in entry["loc"])
    name = str(entry["loc"][0])
    origin = origins.get(name, "")
    if entry["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, Settings.model_fields, n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(Settings.model_fields)}."
        return Problem(key, None, "is not a key we know", remedy, origin)
    description = Settings.model_fields[name].description or ""
    if entry["type"] == "missing":
        remedy = f"Give --{name.replace('_', '-')}, or the key {name} in {DEFAULT_FILE}: {description}"
        return Problem(key, None, "is missing", remedy)
    reason = said(entry).rstrip(".")
    return Problem(key, merged.get(name), reason[:1].lower() + reason[1:], description, origin)
