"""Configuration: frozen models of the sections, read from layers, every problem reported at once.

Layers, later ones win: built-in defaults → vendor file → main file → `conf.d/*.toml` in name order → systemd's
credential `appliance.toml`, for secrets that shall not lie on the disk → `APPLIANCE_*` environment
(`APPLIANCE_SERVER__BASE_URL=…` sets `server.base_url`; the value is read as TOML, else as text).
`[[principal]]` and `[[deployment]]` tables of all files are put one behind the other: a drop-in file can add one.
Keys that an earlier version knew by another name are read for one version more (`migration`).
"""

import difflib
import ipaddress
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from appliance.core import migration
from appliance.core.errors import AccessRefused, ConfigError
from appliance.core.files import SERVICE_GROUP
from appliance.core.logs import Level
from appliance.core.types import NAME_PATTERN

VENDOR_FILE = Path("/usr/lib/inference-appliance/appliance.toml")
MAIN_FILE = Path("/etc/inference-appliance/appliance.toml")
CREDENTIAL = "appliance.toml"
"""Name of the credential (LoadCredentialEncrypted=) that is read as one more file. systemd reads it when it starts the
service, so that what changes there needs a restart."""
CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
DROP_INS = "conf.d"
"""The folder beside the main file whose files are read after it."""
MAIN_FILE_VARIABLE = "APPLIANCE_CONFIG"
ENVIRONMENT_PREFIX = "APPLIANCE_"
BUILT_IN = "built-in default"

DEVICE_PATTERN = r"^(auto|cpu|gpu|gpu:(\d+|(GPU|MIG)-[0-9A-Za-z/-]{1,80}))$"
"""What may stand for a device, here and in bundles."""

_HOST = re.compile(r"(\*|(?:\*\.)?[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?\s*")
_UNIT = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNIT |= {"ki": 2**10, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_size(value: object) -> object:
    """Turn "20 MiB" into bytes; numbers pass through. Raises ValueError with the forms that are understood."""
    if not isinstance(value, str | bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    count = float(match[1]) * _UNIT[match[2] or ""] if match else math.inf
    if not math.isfinite(count):
        raise ValueError('is not a size; write bytes or e.g. "20MiB", "1.5GB"')
    return int(count)


def parse_address(value: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`. Raises ValueError: not that form."""
    host, separator, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError('is not an address; write "host:port", e.g. "[::]:8443" or "127.0.0.1:8443"')
    return host, int(port)


def parse_host(entry: str) -> tuple[str, int | None]:
    """Split an entry of `urls.hosts` into host, in lower case and without brackets, and port.

    Raises: ValueError: it is neither a name, "*.name", "*" nor an address.
    """
    match = _HOST.fullmatch(entry.lower())
    host, port = (match[1], int(match[2]) if match[2] else None) if match else ("", None)
    last = host.rpartition(".")[2]
    try:
        if host.startswith("["):
            host = str(ipaddress.IPv6Address(host[1:-1]))
        elif last.isdigit() or last.startswith("0x"):
            host = str(ipaddress.IPv4Address(host))
    except ValueError:
        host = ""
    if not host or (port is not None and not 0 < port < 65536):
        raise ValueError(
            f'"{entry}" is not a host; write "name", "*.name", "*", "10.0.0.5" or "[fd00::5]", and ":port" behind it '
            "for another port than 80 and 443 (an international name in its xn-- form)"
        )
    return host, port


def is_loopback(address: str) -> bool:
    """Whether nobody outside this machine can reach that listening address."""
    host, _ = parse_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_local(value: str, why: str) -> str:
    """A listening address that nobody outside this machine can reach. Raises ValueError: it is none; says why."""
    if value.startswith("unix:"):
        if not value.startswith("unix:/") or not 1 < len(os.fsencode(value.removeprefix("unix:"))) < 108:
            raise ValueError('must be "unix:/absolute/path", with a path of at most 107 bytes')
    elif not is_loopback(value):
        raise ValueError(f"must be a loopback address or unix:/path: {why}")
    return value


def _origin(value: str, scheme: str, port: int) -> str:
    """Scheme, host and port, the usual port written out. Raises ValueError: it is more, or less."""
    parts = urlsplit(value)
    try:
        number = parts.port or port
    except ValueError:
        raise ValueError("has a port that is not a number between 0 and 65535") from None
    if parts.scheme != scheme or not parts.hostname or parts.username or parts.path or parts.query or parts.fragment:
        raise ValueError(f'must be "{scheme}://host" or "{scheme}://host:port", with nothing behind it')
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{scheme}://{host}:{number}"


def _address(value: str) -> str:
    parse_address(value)
    return value


def _name(value: str) -> str:
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError("may have letters, digits and . _ - inside, 64 characters at most")
    return value


def _path(value: object) -> object:
    if value == "":
        raise ValueError("is empty; write a path")  # Path("") would be whatever folder the service happens to run in
    return value


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Address = Annotated[str, AfterValidator(_address)]
Name = Annotated[str, AfterValidator(_name)]
FilePath = Annotated[Path, BeforeValidator(_path), PlainSerializer(str, return_type=str)]


class Section(BaseModel):
    """What all sections have in common: immutable once read, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Server(Section):
    """Where clients connect."""

    base_url: str = Field(
        "https://localhost:8443",
        description="What clients are told: scheme, host and port, without a path. Its host should be in the "
        "certificate's subject alternative names.",
    )
    listen: Address = Field(
        "[::]:8443", description="TLS port for all clients (the stock SDKs).", json_schema_extra={"restart": True}
    )
    mtls_listen: Address | None = Field(
        None,
        examples=["[::]:8444"],
        description='One more port that demands a client certificate signed by tls.client_ca, e.g. "[::]:8444". The '
        'main port only asks for one; transport = "grpcio" cannot ask, and needs this port for certificates. Unset: no '
        "such port.",
        json_schema_extra={"restart": True},
    )
    plain_listen: str | None = Field(
        None,
        examples=["127.0.0.1:8080"],
        description="Port without TLS for programs on this machine: a loopback address, or unix:/path. Unset: none.",
        json_schema_extra={"restart": True},
    )
    transport: Literal["native", "grpcio"] = Field(
        "native",
        description='Which wire serves the ports: "native" speaks gRPC, gRPC-Web and HTTP on one port; "grpcio" is '
        "slower and speaks gRPC only. It steps in by itself where the native extension is missing.",
        json_schema_extra={"restart": True},
    )
    trusted_proxies: tuple[str, ...] = Field(
        (),
        description="Addresses or networks of proxies whose connections begin with a PROXY protocol v2 header, e.g. "
        '["10.0.0.5", "fd00::/64"]; limits and logs then show the real client. Nobody else may send one.',
        json_schema_extra={"restart": True},
    )
    load_reports: bool = Field(
        False,
        description="Say in the trailers of gRPC calls how busy this machine is, for balancers that weigh by it "
        '(ORCA: endpoint-load-metrics-bin). Needs transport = "native".',
        json_schema_extra={"restart": True},
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description='Web origins whose pages may call (gRPC-Web, REST), e.g. ["https://lab.example.com"]; "*": all.',
        json_schema_extra={"restart": True},
    )

    @field_validator("plain_listen")
    @classmethod
    def _check_plain(cls, value: str | None) -> str | None:
        return value if value is None else check_local(value, "nothing is encrypted there")

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            try:
                network = ipaddress.ip_network(value)
            except ValueError:
                raise ValueError(f'"{value}" is not an address or a network such as 10.0.0.0/24') from None
            if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
                raise ValueError(f'"{value}" would never match: write IPv4 addresses as IPv4')
        return values

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            parts = urlsplit(value)
            origin = f"{parts.scheme}://{parts.netloc}".lower()
            if value != "*" and (
                parts.scheme not in ("http", "https") or not parts.hostname or "@" in value or value != origin
            ):
                raise ValueError(f'"{value}" must be "*" or scheme and host as browsers send them: https://host[:port]')
        return values

    @field_validator("base_url")
    @classmethod
    def _check_base_url(cls, value: str) -> str:
        parts = urlsplit(value)
        try:
            _ = parts.port
        except ValueError:
            raise ValueError("has a port that is not a number between 0 and 65535") from None
        if parts.scheme != "https" or not parts.hostname:
            raise ValueError('must be "https://host" or "https://host:port"')
        if parts.path or parts.query or parts.fragment or parts.username:
            raise ValueError("must end after the port: the stock SDKs cannot use a path or a trailing slash")
        return value


class Tls(Section):
    """The appliance's certificate, and whose client certificates it trusts."""

    certificate: FilePath = Field(
        Path("/etc/inference-appliance/tls/server.crt"),
        description="PEM file: the server's certificate, then the intermediates.",
    )
    key: FilePath = Field(Path("/etc/inference-appliance/tls/server.key"), description="PEM file: its private key.")
    key_passphrase: SecretStr | None = Field(
        None, examples=["…"], description="Passphrase of the private key, if it has one."
    )
    client_ca: FilePath = Field(
        Path("/etc/inference-appliance/tls/ca.crt"),
        description="PEM file: the authorities whose client certificates are trusted. Without the file, client "
        "certificates are not asked for.",
    )
    sni_certificates: tuple[FilePath, ...] = Field(
        (),
        description="PEM files of more server certificates, chosen by the host name a client asks for; the key of each "
        "lies beside it, with the ending .key.",
    )
    crl: FilePath | None = Field(
        None,
        examples=["/etc/inference-appliance/tls/crl.pem"],
        description="PEM file: revocation lists of the authorities in client_ca. Unset: nobody is revoked.",
    )
    crl_policy: Literal["last_good", "strict"] = Field(
        "last_good",
        description='When there is no newer revocation list and the last good one is past its nextUpdate: "last_good" '
        'goes on with it and warns, "strict" refuses client certificates until there is a current one.',
    )


class Connections(Section):
    """What connections may cost us. Needs transport = "native", except where it says otherwise."""

    max: int = Field(
        16_384,
        ge=1,
        description="Connections at once, over all clients; when all are taken, health probes wait as well.",
        json_schema_extra={"restart": True},
    )
    per_address: int = Field(
        2048, ge=1, description="Connections at once from one address.", json_schema_extra={"restart": True}
    )
    handshakes: int = Field(
        256,
        ge=1,
        description="Connections at once that have not finished their TLS handshake; more wait in the system's queue.",
        json_schema_extra={"restart": True},
    )
    handshake_timeout_s: float = Field(
        10.0,
        gt=0,
        le=300,
        description="Seconds for the TLS handshake, and for the first request's headers.",
        json_schema_extra={"restart": True},
    )
    idle_s: float = Field(
        3600.0,
        ge=0,
        le=604_800,
        description="Seconds without a request after which a connection is closed; 0: never.",
        json_schema_extra={"restart": True},
    )
    keepalive_s: float = Field(
        300.0,
        ge=0,
        le=86_400,
        description="Seconds of silence after which the peer is asked for a sign of life; 0: never.",
        json_schema_extra={"restart": True},
    )
    keepalive_timeout_s: float = Field(
        20.0, gt=0, le=600, description="Seconds in which it must come.", json_schema_extra={"restart": True}
    )
    age_s: float = Field(
        0.0,
        ge=0,
        le=604_800,
        description="Seconds after which a client is asked to connect, and authenticate, anew; up "
        "to a tenth is added or taken away by chance so that not all come at once. 0: never.",
        json_schema_extra={"restart": True},
    )
    age_grace_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds that calls may go on when their connection is closed for age.",
        json_schema_extra={"restart": True},
    )
    streams: int = Field(
        256, ge=1, le=4096, description="Calls at once on one connection.", json_schema_extra={"restart": True}
    )


class Auth(Section):
    """Who may call."""

    require: Literal["key", "certificate", "either", "both", "none"] = Field(
        "key",
        description="What a call must bring: a key (PAT), a client certificate that a [[principal]] names, either "
        '(the certificate counts if one was sent), or both (rights intersect). "none" only on loopback addresses.',
    )
    keys_file: FilePath = Field(
        Path("/etc/inference-appliance/keys.json"),
        description="Hashed keys, written by `appliance keys`; read again whenever it changes.",
    )


class Principal(Section):
    """One who calls, what they may reach, and how fast. Written as [[principal]]."""

    name: Name = Field(
        examples=["line-3"], description="Short name, used in logs and by `appliance keys create --principal`."
    )
    identities: tuple[str, ...] = Field(
        (),
        description='Client certificates that are this principal: "uri:…", "dns:…", "email:…" or "cn:…".',
    )
    users: tuple[str, ...] = Field(("*",), description='User ids whose models it may use; "*" matches any text.')
    apps: tuple[str, ...] = Field(("*",), description='App ids whose models it may use; "*" matches any text.')
    models: tuple[str, ...] = Field(("*",), description='Model ids it may use; "*" matches any text.')
    user_id: Name | None = Field(
        None, examples=["line-3"], description='Who the caller is for GetUser("me"); unset: catalog.user_id.'
    )
    requests_per_second: float = Field(
        0, ge=0, allow_inf_nan=False, description="Requests a second on average; 0: no limit."
    )
    burst: int = Field(0, ge=0, description="Requests that may come at once; 0: one second's worth.")
    concurrency: int = Field(0, ge=0, description="Requests in flight at once; 0: no limit.")
    priority: Literal["low", "normal", "high"] = Field(
        "normal",
        description="Whose inputs a model runs first when it has more than it can do. A lower priority that waits is "
        "passed over for at most nine runs in a row. Principals of one priority take turns.",
    )

    @field_validator("identities")
    @classmethod
    def _check_identities(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            kind, separator, rest = value.partition(":")
            if not separator or not rest or kind not in ("uri", "dns", "email", "cn"):
                raise ValueError(f'identity "{value}" must begin with uri:, dns:, email: or cn:')
        return values


class Catalog(Section):
    """Where models are, and whose they are when a bundle does not say."""

    root: FilePath = Field(
        Path("/var/lib/inference-appliance/models"),
        description="Folder of bundles; watched.",
        json_schema_extra={"restart": True},
    )
    state_dir: FilePath = Field(
        Path("/var/lib/inference-appliance"),
        description="Folder for what the appliance remembers over a restart.",
        json_schema_extra={"restart": True},
    )
    scan_interval_s: float = Field(1.0, gt=0, le=3600, description="Seconds between two looks at the root.")
    settle_s: float = Field(
        2.0,
        ge=0,
        le=3600,
        description="Seconds a bundle's files must stay unchanged before they are loaded, unless `appliance models "
        "add` or `appliance setup` put it there as a whole.",
    )
    start_wait_s: float = Field(
        60.0, ge=0, le=3600, description="Seconds that start waits for bundles to load before it says ready."
    )
    user_id: Name = Field(
        "appliance",
        description="Owner of bundles whose config.yaml names no user_id.",
        json_schema_extra={"restart": True},
    )
    app_id: Name = Field(
        "main",
        description="App of bundles whose config.yaml names no app_id.",
        json_schema_extra={"restart": True},
    )
    workflows: FilePath | None = Field(
        None,
        examples=["/var/lib/inference-appliance/workflows"],
        description="Folder of workflows, a YAML file each; watched. Unset: the folder `workflows` beside the root, if "
        "there is one.",
    )


class Placement(Section):
    """What this appliance is called as a place to run: one nodepool of a compute cluster."""

    user_id: Name | None = Field(
        None, examples=["acme"], description="Owner of the cluster and its deployments; unset: catalog.user_id."
    )
    compute_cluster_id: Name = Field("on-prem", description="The compute cluster that this appliance belongs to.")
    nodepool_id: Name | None = Field(
        None, examples=["plant-7"], description="The nodepool that this appliance is; unset: this machine's host name."
    )


class Deployment(Section):
    """A deployment id that clients name, and the model it means. Written as [[deployment]]. Besides, each model has a
    deployment of its own, called like the model."""

    id: Name = Field(examples=["prod-digits"], description="The id that clients name, `deployment_id` of the SDKs.")
    model: Name = Field(examples=["digits"], description="The model's id.")
    user_id: Name | None = Field(
        None, examples=["appliance"], description="The model's user; unset: any, when only one has such a model."
    )
    app_id: Name | None = Field(
        None, examples=["main"], description="The model's app; unset: any, when only one has such a model."
    )
    version: Name | None = Field(
        None, examples=["1"], description="The version it stays with; unset: the newest that is ready."
    )


class Orchestrator(Section):
    """The central orchestrator that this appliance is enrolled with; written by `appliance orchestrator enroll`."""

    api_base: str | None = Field(
        None,
        examples=["https://api.example.com"],
        description='The central API: "https://host" or "https://host:port". Unset: this appliance stands alone.',
    )
    user_id: Name | None = Field(
        None,
        examples=["acme"],
        description="The user there who owns what is registered: cluster, nodepool, app, models, deployments.",
    )
    app_id: Name | None = Field(
        None,
        examples=["plant"],
        description="The app there that all models are registered in; unset: each in one called like its app here.",
    )
    site: str = Field(
        "",
        max_length=128,
        examples=["Berlin, hall 3"],
        description="Where this machine stands, as the orchestrator shows it.",
    )
    pat_file: FilePath = Field(
        Path("/etc/inference-appliance/orchestrator.pat"),
        description="File with the user's personal access token (PAT), and nothing else.",
    )
    root_ca: FilePath | None = Field(
        None,
        examples=["/etc/inference-appliance/tls/orchestrator-ca.crt"],
        description="PEM file: the authorities of a private orchestrator's certificate. Unset: the public ones.",
    )
    proxy: str | None = Field(
        None,
        examples=["http://proxy.example.com:3128"],
        description='HTTP proxy (CONNECT) on the way there, "http://host:port". Unset: none.',
    )
    certificate: FilePath | None = Field(
        None,
        examples=["/etc/inference-appliance/tls/orchestrator.crt"],
        description="PEM file: the certificate that we show to a private orchestrator, with its chain. Unset: none.",
    )
    key: FilePath | None = Field(
        None,
        examples=["/etc/inference-appliance/tls/orchestrator.key"],
        description="PEM file: its private key.",
    )
    agent: bool = Field(
        True,
        description="A process that registers whatever changes by itself, says how we are, and takes work from there, "
        "behind everybody who calls here. false: `appliance orchestrator sync` registers, and no work is taken.",
    )
    streams: int = Field(
        32,
        ge=1,
        le=256,
        description="How many inputs of one version are taken at once: streams that wait for work there.",
    )
    keepalive_s: float = Field(
        45.0,
        ge=10,
        le=3600,
        description="Seconds without a word after which we ask whether the orchestrator is still there; it may be told "
        "to hang up on those who ask often. An answer has 20 seconds.",
    )
    usage_url: str | None = Field(
        None,
        examples=["https://usage.example.com/v1/reports"],
        description="Where reports of what callers used are posted, with the PAT if there is one, and with root_ca, "
        "proxy, certificate and key (docs/usage.md). Unset: nowhere; `appliance usage export` prints them.",
    )
    usage_interval_s: float = Field(
        60.0, ge=1, le=3600, description="Seconds between two of these reports, give or take half of that by chance."
    )

    @property
    def has_agent(self) -> bool:
        """Whether there is an orchestrator, and a process of ours keeps in touch with it."""
        return self.api_base is not None and self.agent

    @field_validator("usage_url")
    @classmethod
    def _check_usage_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        plain = value.isascii() and value.isprintable() and not set(value) & set(" @?#")
        if parts.scheme != "https" or not parts.hostname or not plain:
            raise ValueError('must be "https://host/path" or "https://host:port/path", without a user or a query')
        return _origin(f"https://{parts.netloc}", "https", 443) + parts.path

    @field_validator("api_base")
    @classmethod
    def _check_api_base(cls, value: str | None) -> str | None:
        return value if value is None else _origin(value, "https", 443)

    @field_validator("proxy")
    @classmethod
    def _check_proxy(cls, value: str | None) -> str | None:
        return value if value is None else _origin(value, "http", 80)

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if self.api_base and not self.user_id:
            raise ValueError("api_base is set and user_id is not; `appliance orchestrator enroll` writes both")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: set both, or none")
        return self


class Processes(Section):
    """Which processes do the work."""

    mode: Literal["auto", "single", "processes"] = Field(
        "auto",
        description='"processes": fronts that talk to clients, and an engine for each device that runs models, so that '
        'a model that crashes takes nothing down. "single": all in one process, for CPUs alone, and no work from an '
        'orchestrator. "auto": single on a machine with fewer than 4 CPUs and no GPU that takes no such work, else '
        "processes.",
        json_schema_extra={"restart": True},
    )
    fronts: int = Field(
        0,
        ge=0,
        le=64,
        description="How many fronts; 0: by the CPUs we may use, one for every two beside a GPU, else for every four, "
        "8 at most, and 512 MiB of memory for each.",
        json_schema_extra={"restart": True},
    )
    engine_silence_s: float = Field(
        10.0,
        ge=1,
        le=600,
        description="Seconds without a sign of life after which an engine is replaced that computes all the while; "
        "one that stands still is replaced after one second.",
        json_schema_extra={"restart": True},
    )


class Engine(Section):
    """How models run."""

    device: str = Field(
        "auto",
        pattern=DEVICE_PATTERN,
        description='"cpu", "gpu", "gpu:N" (the number that nvidia-smi shows), "gpu:GPU-…" or "gpu:MIG-…" (a UUID from '
        'nvidia-smi -L), or "auto" (GPU if one works, else CPU). "gpu" is a requirement: it never falls back.',
        json_schema_extra={"restart": True},
    )
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads a model may use for one run; 0: as many as the CPUs we may use.",
        json_schema_extra={"restart": True},
    )
    parallel: int = Field(
        0,
        ge=0,
        le=256,
        description="Runs of one model at a time; 0: as many as are measured to give most, one if that gains little.",
        json_schema_extra={"restart": True},
    )
    decode_threads: int = Field(
        0,
        ge=0,
        description="Threads that decode inputs; 0: as many as the CPUs we may use.",
        json_schema_extra={"restart": True},
    )
    queue_rows: int = Field(
        4096,
        ge=1,
        description="Inputs that may wait for one model; more are refused as overload.",
        json_schema_extra={"restart": True},
    )
    queue_size: Size = Field(
        2**30,
        description="Bytes that the inputs which wait for one model may have, decoded; more are refused as overload.",
        json_schema_extra={"restart": True},
    )
    load_timeout_s: float = Field(
        300.0,
        gt=0,
        le=86400,
        description="Seconds in which a model must be loaded and warmed up.",
        json_schema_extra={"restart": True},
    )
    run_memory: Size | None = Field(
        None,
        examples=["2GiB"],
        description="Bytes of memory that all runs on the CPU may take together, their results included; a run that "
        "needs more fails. The inputs of one run have half of it at most. Unset: a third of the memory we may use.",
        json_schema_extra={"restart": True},
    )
    gpu_memory: Size | None = Field(
        None,
        examples=["4GiB"],
        description="Bytes of GPU memory one session's arena may take, weights not counted; unset: no bound.",
        json_schema_extra={"restart": True},
    )
    gpu_headroom: Size = Field(
        512 * 2**20,
        description="Bytes of a GPU's memory that stay free: a model that would leave less is not loaded.",
        json_schema_extra={"restart": True},
    )
    cuda_graphs: bool = Field(
        False,
        description="Whether batches are replayed as CUDA graphs, for models that are measured to run at least 5 % "
        "faster with them when they are loaded. A bundle's onnx.cuda_graphs goes before it.",
        json_schema_extra={"restart": True},
    )


class Limits(Section):
    """What one request may ask; each may be lowered, the API's own maxima are never exceeded."""

    inputs_per_request: int = Field(128, ge=1, le=128, description="Inputs in one request.")
    concepts_default: int = Field(
        20,
        ge=1,
        le=200,
        description="Concepts returned when the caller does not say.",
        json_schema_extra={"restart": True},
    )
    concepts_max: int = Field(200, ge=1, le=200, description="Concepts that a caller may ask for.")
    request_size: Size = Field(
        128 * 2**20,
        le=128 * 2**20,
        description="Bytes of one request; its JSON may have half as many more.",
        json_schema_extra={"restart": True},
    )
    reply_size: Size = Field(
        512 * 2**20,
        le=2**30,
        description="Bytes of one reply message; stock clients take 1 GiB.",
        json_schema_extra={"restart": True},
    )
    metadata_size: Size = Field(
        16 * 2**10,
        ge=2**10,
        le=2**20,
        description="Bytes of one call's headers, counted as HTTP/2 does (names, values and 32 each).",
        json_schema_extra={"restart": True},
    )
    image_size: Size = Field(20 * 2**20, le=20 * 2**20, description="Bytes of one image file.")
    image_pixels: int = Field(
        85_000_000, ge=1, le=85_000_000, description="Pixels of one image, checked before it is decoded."
    )
    text_size: Size = Field(20 * 2**20, le=20 * 2**20, description="Bytes of one text.")
    audio_size: Size = Field(20 * 2**20, le=20 * 2**20, description="Bytes of one audio file.")
    video_size: Size = Field(128 * 2**20, le=128 * 2**20, description="Bytes of one video file.")
    memory_in_flight: Size | None = Field(
        None,
        examples=["2GiB"],
        description="Bytes that requests may hold at once (bodies, decoded inputs, replies); one principal may "
        "announce three quarters. Unset: a quarter of the memory this service may use.",
    )
    request_timeout_s: float = Field(
        60.0, gt=0, le=3600, description="Seconds after which a request is answered that its time is over."
    )

    @model_validator(mode="after")
    def _check_concepts(self) -> Self:
        if self.concepts_default > self.concepts_max:
            raise ValueError(f"concepts_default {self.concepts_default} is over concepts_max {self.concepts_max}")
        return self


class Urls(Section):
    """Inputs given as URLs. Off until hosts are named here; docs/url-inputs.md says what is refused and why."""

    hosts: tuple[str, ...] = Field(
        (),
        description='Hosts that inputs may be fetched from, e.g. ["images.example.com", "*.cdn.example.com"]; "*": any '
        "on the open internet. http is fetched from port 80 and https from 443, unless an entry names a port: "
        '"images.example.com:8443".',
    )
    private_addresses: bool = Field(
        False,
        description="Whether these hosts may have private or loopback addresses. Link-local ones, where clouds keep "
        "their machines' secrets, they never may.",
    )
    ca: FilePath | None = Field(
        None,
        examples=["/etc/inference-appliance/tls/urls-ca.crt"],
        description="PEM file: authorities that may have signed these hosts' certificates, beside those that the "
        "machine trusts. Unset: only those.",
    )
    timeout_s: float = Field(10.0, gt=0, le=300, description="Seconds one download may take, redirects included.")
    connections: int = Field(32, ge=1, le=1024, description="Downloads at once, over all callers; more wait.")
    connections_per_principal: int = Field(
        8, ge=1, le=1024, description="Downloads at once for one principal; more wait."
    )

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            parse_host(value)
        return values

    @model_validator(mode="after")
    def _check_reach(self) -> Self:
        if self.private_addresses and any(parse_host(host)[0] == "*" for host in self.hosts):
            raise ValueError(
                'hosts has "*" and private_addresses is true: callers could reach all of this network; name the hosts'
            )
        return self


class Cache(Section):
    """Answers kept for requests that ask for it (`use_predict_cache`). Off until it has a size."""

    size: Annotated[int, BeforeValidator(parse_size), Field(ge=0)] = Field(
        0,
        examples=["256MiB"],
        description="Bytes of answers that are kept, beside limits.memory_in_flight; the least used go first. 0: none "
        "are kept, and the flag changes nothing.",
    )
    ttl_s: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after which an answer is computed anew; 0: when the model's version is replaced or "
        "removed.",
    )


class Admin(Section):
    """Where operators and Prometheus look."""

    listen: Address = Field(
        "127.0.0.1:9464",
        description="Port for the status page, /livez, /readyz and /metrics: plain HTTP on a loopback address. On any "
        "other it is TLS, with tls.certificate, and answers the principals in admin.principals only.",
        json_schema_extra={"restart": True},
    )
    principals: tuple[Name, ...] = Field(
        (),
        description="Where admin.listen is no loopback address: the [[principal]]s that may read these pages, with "
        'their key ("Authorization: Bearer …") or their client certificate. Give one that only watches models = [].',
    )
    socket: FilePath = Field(
        Path("/run/inference-appliance/admin.sock"),
        description="Unix socket for the `appliance` command.",
        json_schema_extra={"restart": True},
    )


class Log(Section):
    """What is written about requests, and how; docs/logs.md."""

    level: Level = Field(
        "info",
        description="Least level that is written; `appliance log-level` changes that of a component while it runs.",
    )
    format: Literal["text", "json"] = Field(
        "text",
        description="How lines on standard error look. Where systemd's journal reads it, it is given fields instead.",
        json_schema_extra={"restart": True},
    )
    sample: float = Field(
        0.01, ge=0, le=1, description="Share of successful requests that are logged; errors always are."
    )
    rate: int = Field(
        200,
        ge=1,
        le=100_000,
        description="Lines a second about requests and connections, over all fronts, ten of one kind in each; how many "
        "were left out is logged. systemd's journal takes 333 a second on average unless told otherwise.",
    )


class Audit(Section):
    """Who called what and who changed what, for those who must be able to say so afterwards; docs/logs.md."""

    mode: Literal["on", "required", "off"] = Field(
        "on",
        description='"on": records are kept; where they cannot be, calls go on. "required": then calls are refused. '
        '"off": none are kept.',
        json_schema_extra={"restart": True},
    )
    folder: FilePath | None = Field(
        None,
        examples=["/var/lib/inference-appliance/audit"],
        description="Folder of the records, of this appliance alone. Unset: `audit` in catalog.state_dir.",
        json_schema_extra={"restart": True},
    )
    file_size: Annotated[Size, Field(ge=4096, le=2**28)] = Field(
        16 * 2**20, description="Bytes after which another file is begun.", json_schema_extra={"restart": True}
    )
    files: int = Field(
        64,
        ge=2,
        le=10_000,
        description="How many files are kept; the oldest ones are removed. Export them before, or raise it.",
        json_schema_extra={"restart": True},
    )


class Metrics(Section):
    """What is counted for Prometheus, and how many series that may be."""

    series: int = Field(
        2000,
        ge=100,
        le=100_000,
        description="Series that one metric may have in one process, a histogram's buckets taken together. Every "
        'version that was ever served has some, until a restart; beyond the number, more are counted as "other".',
        json_schema_extra={"restart": True},
    )
    principals: int = Field(
        0,
        ge=0,
        le=1000,
        description="How many principals have counts of their own: the first [[principal]]s of the configuration; all "
        'others are counted together as "other". 0: nothing is counted by principal.',
        json_schema_extra={"restart": True},
    )


class Traces(Section):
    """Traces of calls, for an OpenTelemetry collector. Off until it has an endpoint; docs/traces.md says what is in
    them."""

    endpoint: str | None = Field(
        None,
        examples=["https://collector.example.com:4318"],
        description="The collector: scheme, host and port where it takes OTLP over HTTP; /v1/traces is added unless a "
        "path is there. Unset: calls are not traced.",
    )
    sample: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of calls that are traced. One that brings a traceparent header does what that says instead.",
    )
    headers_file: FilePath | None = Field(
        None,
        examples=["/etc/inference-appliance/traces.headers"],
        description='File with headers for the collector, "name: value" on each line, such as an authorization. Unset: '
        "none.",
    )
    ca: FilePath | None = Field(
        None,
        examples=["/etc/inference-appliance/tls/collector-ca.crt"],
        description="PEM file: the authorities of the collector's certificate. Unset: those that the machine trusts.",
    )
    service_name: str = Field(
        "inference-appliance", min_length=1, max_length=128, description="What the collector knows this appliance by."
    )
    attributes: tuple[str, ...] = Field(
        (),
        description='More that it shall know, e.g. ["deployment.environment.name=plant-7"].',
    )

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str | None) -> str | None:
        if value is None:
            return value
        parts = urlsplit(value)
        try:
            _ = parts.port
        except ValueError:
            raise ValueError("has a port that is not a number between 0 and 65535") from None
        plain = value.isascii() and value.isprintable() and not set(value) & set(" @?#")
        if parts.scheme not in ("https", "http") or not parts.hostname or not plain:
            raise ValueError('must be "https://host:port" or "http://host:port", with nothing but a path behind it')
        return value

    @field_validator("attributes")
    @classmethod
    def _check_attributes(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            name, sign, _ = value.partition("=")
            if not name.strip() or not sign:
                raise ValueError(f'"{value}" must be "name=value"')
        return values

    @model_validator(mode="after")
    def _check_secret(self) -> Self:
        parts = urlsplit(self.endpoint or "")
        if self.headers_file and parts.scheme == "http" and not is_loopback(f"[{parts.hostname}]:0"):
            raise ValueError("headers_file would be sent unencrypted: give the endpoint https, or remove it")
        return self


class Shutdown(Section):
    """How the appliance stops."""

    lame_duck_s: float = Field(
        3.0, ge=0, le=600, description="Seconds between saying not ready and accepting no more, so balancers notice."
    )
    drain_s: float = Field(
        25.0, ge=0, le=3600, description="Seconds in which accepted requests may finish; the rest are told to retry."
    )


class Config(Section):
    """The whole configuration."""

    server: Server = Server()
    tls: Tls = Tls()
    connections: Connections = Connections()
    auth: Auth = Auth()
    principal: tuple[Principal, ...] = ()
    catalog: Catalog = Catalog()
    placement: Placement = Placement()
    deployment: tuple[Deployment, ...] = ()
    orchestrator: Orchestrator = Orchestrator()
    processes: Processes = Processes()
    engine: Engine = Engine()
    limits: Limits = Limits()
    urls: Urls = Urls()
    cache: Cache = Cache()
    admin: Admin = Admin()
    log: Log = Log()
    audit: Audit = Audit()
    metrics: Metrics = Metrics()
    traces: Traces = Traces()
    shutdown: Shutdown = Shutdown()

    @property
    def audit_folder(self) -> Path:
        """Where the audit log is."""
        return self.audit.folder or self.catalog.state_dir / "audit"


SEVERAL: Mapping[str, type[Section]] = {"principal": Principal, "deployment": Deployment}
"""Sections that there may be several of: arrays of tables."""


def cross_problems(config: Config) -> list["Problem"]:
    """What is wrong between sections; every section by itself is already valid."""
    problems = []
    listens = [("server.listen", config.server.listen), ("server.mtls_listen", config.server.mtls_listen)]
    if config.auth.require == "none":
        problems += [
            Problem(key, address, 'is not a loopback address, and auth.require is "none"', f"Bind {key} to 127.0.0.1.")
            for key, address in listens
            if address and not is_loopback(address)
        ]
    if (
        config.server.transport == "grpcio"
        and config.auth.require in ("certificate", "both")
        and not config.server.mtls_listen
    ):
        problems.append(
            Problem(
                "auth.require",
                config.auth.require,
                "needs client certificates, and no port asks for them",
                'Set server.mtls_listen, e.g. "[::]:8444", or server.transport = "native", or auth.require = "key".',
            )
        )
    if config.server.transport == "grpcio":
        native_only = {
            "server.plain_listen": config.server.plain_listen,
            "server.trusted_proxies": config.server.trusted_proxies,
            "server.cors_origins": config.server.cors_origins,
            "tls.sni_certificates": config.tls.sni_certificates,
        }
        problems += [
            Problem(key, None, "needs the native wire", f'Set server.transport = "native", or remove {key}.')
            for key, value in native_only.items()
            if value
        ]
    if config.server.plain_listen and config.auth.require in ("certificate", "both"):
        problems.append(
            Problem(
                "server.plain_listen",
                config.server.plain_listen,
                f'has no certificates, and auth.require is "{config.auth.require}": nobody could call there',
                "Remove it, or set auth.require.",
            )
        )
    first: dict[str, str] = {}
    for key, address in [*listens, ("server.plain_listen", config.server.plain_listen)]:
        if not address or address.endswith(":0"):
            continue
        if address in first:
            problems.append(
                Problem(key, address, f"is the same as {first[address]}", "Give the two ports different numbers.")
            )
        first.setdefault(address, key)
    seen_names: set[str] = set()
    owner: dict[str, str] = {}
    for index, principal in enumerate(config.principal):
        where = f"principal.{index}"
        if principal.name in seen_names:
            problems.append(
                Problem(f"{where}.name", principal.name, "is used twice", "Give each [[principal]] its own name.")
            )
        seen_names.add(principal.name)
        for identity in principal.identities:
            if identity in owner:
                problems.append(
                    Problem(
                        f"{where}.identities",
                        identity,
                        f"belongs to principal {owner[identity]!r} already",
                        "Name each identity in one [[principal]] only.",
                    )
                )
            owner[identity] = principal.name
    if not is_loopback(config.admin.listen) and not config.admin.principals:
        problems.append(
            Problem(
                "admin.listen",
                config.admin.listen,
                "is not a loopback address, and admin.principals names nobody who may read these pages",
                "Name a [[principal]] there, which has a key or a client certificate; or bind it to 127.0.0.1.",
            )
        )
    problems += [
        Problem("admin.principals", name, "is no [[principal]] of this configuration", "Add it, or mend the name.")
        for name in config.admin.principals
        if name not in seen_names
    ]
    deployments: set[str] = set()
    for index, deployment in enumerate(config.deployment):
        if deployment.id in deployments:
            problems.append(
                Problem(
                    f"deployment.{index}.id", deployment.id, "is used twice", "Give each [[deployment]] its own id."
                )
            )
        deployments.add(deployment.id)
    return problems


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: which key, its value, why, and what to do; and whether a file may not be read."""

    key: str
    value: object
    reason: str
    remedy: str
    origin: str = ""
    unreadable: bool = False

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {_shown(self.value)}"
        origin = f" ({self.origin})" if self.origin else ""
        return f"{self.key}{shown}{origin}: {self.reason}. {self.remedy}"


class ConfigInvalid(ConfigError):
    """The configuration has problems; all of them are in `problems`, one a line in the message."""

    def __init__(self, problems: list[Problem]) -> None:
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        super().__init__(f"The configuration has {count}:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.problems = problems


class ConfigUnreadable(ConfigInvalid, AccessRefused):
    """A file of the configuration may not be read; what else is wrong may come of that."""


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid configuration, for each dotted key which layer it came from, and which keys have another name now."""

    config: Config
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    def rows(self) -> Iterator[tuple[str, object, str]]:
        """Every key with its effective value and origin; secrets are redacted."""
        for key, value in _flatten(self.config.model_dump(mode="json")):
            secret = key.endswith("passphrase") and value is not None
            yield key, "********" if secret else value, self.origins.get(_unindexed(key), BUILT_IN)


def load(main_file: Path | None = None, environ: Mapping[str, str] | None = None) -> LoadedConfig:
    """Read all layers and check them.

    Args:
        main_file: instead of the default; must exist. Its `conf.d/` lies beside it.
        environ: instead of `os.environ`.
    Raises:
        ConfigInvalid: with every problem of every layer.
    """
    environ = os.environ if environ is None else environ
    named = main_file or (Path(environ[MAIN_FILE_VARIABLE]) if MAIN_FILE_VARIABLE in environ else None)
    main = named or MAIN_FILE
    problems: list[Problem] = []
    if named and not os.path.lexists(main):
        problems.append(Problem(str(main), None, "there is no such file", "Name an existing configuration file."))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    warnings: list[str] = []
    files = [VENDOR_FILE, main, *_drop_ins(main.parent / DROP_INS, problems)]
    if CREDENTIALS_VARIABLE in environ:
        files.append(Path(environ[CREDENTIALS_VARIABLE]) / CREDENTIAL)
    layers = [(str(path), _read_file(path, problems)) for path in files]
    for origin, layer in [*layers, *_environment_tables(environ, problems)]:
        warnings += migration.bring_up_to_date(layer, origin)
        _merge(merged, origins, layer, origin)
    config = None
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        problems += [_problem(entry, merged, origins) for entry in error.errors()]
    if config is not None:
        problems += [
            Problem(p.key, p.value, p.reason, p.remedy, origins.get(_unindexed(p.key), BUILT_IN))
            for p in cross_problems(config)
        ]
    if any(problem.unreadable for problem in problems):
        raise ConfigUnreadable(problems)
    if problems or config is None:
        raise ConfigInvalid(problems)
    return LoadedConfig(config, origins, tuple(warnings))


def restart_needed(old: Config, new: Config) -> list[str]:
    """Keys that differ and take effect only after a restart."""
    changed = []
    for section_name in Config.model_fields:
        before, after = getattr(old, section_name), getattr(new, section_name)
        if not isinstance(before, Section):
            continue
        for name, info in type(before).model_fields.items():
            extra = info.json_schema_extra
            needs = isinstance(extra, dict) and bool(extra.get("restart"))
            if needs and getattr(before, name) != getattr(after, name):
                changed.append(f"{section_name}.{name}")
    return changed


def changed_keys(old: Config, new: Config) -> list[str]:
    """Dotted keys whose values differ; other secrets look alike."""
    before, after = (dict(_flatten(config.model_dump(mode="json"))) for config in (old, new))
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def keeping(old: Config, new: Config, keys: list[str]) -> Config:
    """`new`, with the given dotted keys as they are in `old`."""
    changes: dict[str, Section] = {}
    for key in keys:
        section, _, name = key.partition(".")
        current = changes.get(section, getattr(new, section))
        changes[section] = current.model_copy(update={name: getattr(getattr(old, section), name)})
    return new.model_copy(update=changes)


def as_data(config: Config) -> dict[str, Any]:
    """The configuration as plain data, for another process of the appliance: secrets are told in the clear."""
    data: dict[str, Any] = config.model_dump(mode="json")
    for name in Config.model_fields:
        section = getattr(config, name)
        if isinstance(section, Section):
            for key, value in section:
                if isinstance(value, SecretStr):
                    data[name][key] = value.get_secret_value()
    return data


def of_data(data: Mapping[str, Any]) -> Config:
    """The configuration that `as_data` wrote."""
    return Config.model_validate(data)


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Every section with its model, in the order of the file."""
    for name, info in Config.model_fields.items():
        section = SEVERAL.get(name, info.annotation)
        assert isinstance(section, type)
        assert issubclass(section, Section)
        yield name, section


def example() -> str:
    """The configuration file we ship: every key with its documentation and default, commented out."""
    lines = [
        "# inference-appliance: configuration. Every key is shown with its default. What you change goes into",
        "# /etc/inference-appliance/appliance.toml, or a file of yours in conf.d/ beside that one: this file, in",
        "# /usr/lib/inference-appliance, is read before them and replaced by every upgrade. Variables of the",
        "# environment, APPLIANCE_SECTION__KEY, are read last. `appliance check` says what is wrong, `appliance config",
        "# show` what is in force and where it came from.",
    ]
    for name, section in sections():
        header = f"#[[{name}]]" if name in SEVERAL else f"[{name}]"
        lines += ["", *_comment(section.__doc__ or ""), header]
        for key, field in section.model_fields.items():
            restart = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("restart")
            lines += _comment((field.description or "") + (" Needs a restart." if restart else ""))
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            if default is None and field.examples:
                note = "" if field.is_required() else "  # unset by default"
                lines.append(f"#{key} = {toml(field.examples[0])}{note}")
            else:
                lines.append(f"#{key} = {toml(default)}")
    return "\n".join(lines) + "\n"


def _comment(text: str, width: int = 116) -> list[str]:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "#"
        line += f" {word}"
    return [*lines, line]


def toml(value: object) -> str:
    """A value as TOML has it. Args: value: text, number, bool, path, or a tuple of such; None is the empty text."""
    if value is None:
        return '""'
    if isinstance(value, tuple):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return json.dumps(str(value), ensure_ascii=False)


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 200 else text[:197] + "..."


def _read_file(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(Problem(str(path), None, f"is not TOML: {error}", "Mend that line."))
    except OSError as error:
        problems.append(_unreadable(path, error))
    return {}


def _drop_ins(folder: Path, problems: list[Problem]) -> list[Path]:
    """The files of conf.d in the order of their names. A folder that may not be read is a problem, and not empty."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        problems.append(_unreadable(folder, error))
        return []
    return [folder / name for name in sorted(names) if name.endswith(".toml") and not name.startswith(".")]


def _unreadable(path: Path, error: OSError) -> Problem:
    mode = "0750" if path.is_dir() else "0640"
    remedy = f"Run the command with sudo; for the service: chgrp {SERVICE_GROUP} {path} && chmod {mode} {path}."
    return Problem(str(path), None, f"cannot be read: {error.strerror}", remedy, unreadable=True)


def _environment_tables(environ: Mapping[str, str], problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == MAIN_FILE_VARIABLE:
            continue
        section, separator, key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
        if not separator or not key:
            problems.append(
                Problem(
                    variable,
                    None,
                    "is not a setting of ours",
                    f"Write {ENVIRONMENT_PREFIX}SECTION__KEY, e.g. APPLIANCE_SERVER__BASE_URL, or unset it.",
                )
            )
            continue
        value = _environment_value(environ[variable])
        if key.endswith("passphrase") and not isinstance(value, str):
            value = environ[variable]  # digits are a passphrase too, and no number
        yield variable, {section: {key: value}}


def _environment_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(into: dict[str, Any], origins: dict[str, str], layer: dict[str, Any], origin: str) -> None:
    for section, content in layer.items():
        if section in SEVERAL and isinstance(content, list):
            into[section] = [*into.get(section, []), *content]
            origins[section] = origin
        elif isinstance(content, dict) and isinstance(into.get(section, {}), dict):
            into[section] = {**into.get(section, {}), **content}
            origins.update({f"{section}.{key}": origin for key in content})
        else:
            into[section] = content
            origins[section] = origin


def said(entry: Mapping[str, Any]) -> str:
    """What pydantic says is wrong, in our validators' own words. Args: entry: one of `ValidationError.errors()`."""
    return str(entry["msg"]).removeprefix("Value error, ")


def _problem(entry: Any, merged: dict[str, Any], origins: Mapping[str, str]) -> Problem:
    """One pydantic error as a sentence with the key, the value and what to do."""
    location = [str(part) for part in entry["loc"]]
    key = ".".join(location)
    origin = origins.get(_unindexed(key)) or origins.get(location[0], "")
    if entry["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(sorted(known))}."
        return Problem(key, None, "is not a key we know", remedy, origin)
    reason = said(entry)
    reason = reason[:1].lower() + reason[1:]
    field = _field(location)
    description = field.description if field is not None and field.description else "See the example file."
    value = None if "passphrase" in key or entry["type"] == "missing" else entry.get("input")
    if isinstance(value, dict | BaseModel):
        value = None
    return Problem(key, value, reason.rstrip("."), description, origin)


def _section_type(location: list[str]) -> type[Section] | None:
    if not location:
        return Config
    if location[0] in SEVERAL:
        return SEVERAL[location[0]]
    info = Config.model_fields.get(location[0])
    annotation = info.annotation if info else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _known_keys(location: list[str]) -> list[str]:
    section = _section_type(location)
    return list(section.model_fields) if section else []


def _field(location: list[str]) -> Any:
    section = _section_type(location[:1])
    names = [part for part in location[1:] if not part.isdigit()]
    return section.model_fields.get(names[0]) if section and names else None


def _unindexed(key: str) -> str:
    """Origins are kept by section and key: `principal.0.name` came from where `principal` came from."""
    parts = key.split(".")
    return parts[0] if parts[0] in SEVERAL else ".".join(parts[:2])


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif key in SEVERAL and isinstance(value, list):
            for index, table in enumerate(value):
                yield from _flatten(table, f"{key}.{index}.")
        else:
            yield prefix + key, value
