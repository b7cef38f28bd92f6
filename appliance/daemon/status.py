"""The status document: what `/status.json`, the status page, `appliance status` and `appliance top` show.

An interface (`VERSION`): docs/status.schema.json is made of these classes (packaging/generate.py), and a test holds the
two together. Times are Unix time, durations seconds, sizes bytes; None is what is not known, or what nothing was
measured of.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

VERSION = "1.0"
"""The first number grows when something that was there changes its name, type or meaning, or goes; the second when
something is added."""


class _Part:
    """What all parts have in common: for the schema, what is written beneath a field is its description."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)


@dataclass(frozen=True)
class Reason(_Part):
    """Something that is not as it should be."""

    what: str
    """What it is about: a model, a certificate, a process, a disk."""
    why: str
    """A sentence."""
    runbook: str
    """Name of the page in docs/runbook that says what to do; "" for none."""


@dataclass(frozen=True)
class Rates(_Part):
    """Calls of the last few seconds."""

    requests_per_s: float
    """Calls that ended."""
    failures_per_s: float
    """Of these, calls that ended with another code than success."""
    p50_s: float | None
    """From call to reply, the median, as the buckets of `request_seconds` tell."""
    p99_s: float | None
    """The same of the slowest hundredth."""


@dataclass(frozen=True)
class History(_Part):
    """The last minutes, oldest first; None from before the start, or where nothing was called."""

    step_s: float
    """Seconds that a value stands for."""
    requests_per_s: list[float | None]
    failures_per_s: list[float | None]
    p50_s: list[float | None]
    p99_s: list[float | None]


@dataclass(frozen=True)
class Load(_Part):
    """What is going on now."""

    in_flight: int
    """Calls being worked on."""
    connections: int
    memory_in_flight_bytes: int
    """What requests hold."""
    memory_in_flight_limit_bytes: int
    """What they may hold."""
    lost: int
    """Accepted calls that ended without a result or a status, since the start; stays 0."""
    refused: dict[str, int]
    """Calls and inputs refused since the start, by reason."""


@dataclass(frozen=True)
class Device(_Part):
    """What models run on."""

    name: str
    """As a bundle may name it: "cpu", "gpu:0"."""
    load: float | None
    """Part of it that is in use, 0 to 1; of the CPU, what our processes take of the CPUs that we may use."""
    memory_used_bytes: int | None
    """Of a GPU, by anybody; else by our processes."""
    memory_total_bytes: int | None
    """Of a GPU, what it has; else what this service may use."""
    temperature_celsius: float | None
    power_watts: float | None


@dataclass(frozen=True)
class Process(_Part):
    """A process of ours beside the daemon's own."""

    name: str
    pid: int
    """0 when it is not there."""
    problem: str
    """Why it is not at work; "" when it is."""


@dataclass(frozen=True)
class Model(_Part):
    """One version in the catalog, or a bundle that has none."""

    bundle: str
    model: str
    """user id/app id/model id; "" when the bundle does not say."""
    version: str
    """"" when there is none."""
    state: Literal["settling", "loading", "ready", "failed", "held"]
    problem: str
    """Why it is not ready, or not newly loaded; "" for nothing."""
    input: Literal["image", "text", ""]
    """What may be sent to it from the page; "" when it takes something else."""
    device: str
    queue_rows: int
    """Rows that wait for it."""
    rates: Rates
    """Summed over models of this id, if there are several."""


@dataclass(frozen=True)
class Ending(_Part):
    """Something that must be renewed in time."""

    name: str
    """Of a certificate `server`, `client_ca` or `sni:FILE`; of a revocation list its issuer."""
    at: float
    """When it ends, or is due."""


@dataclass(frozen=True)
class Disk(_Part):
    """A file system."""

    name: str
    """What lies there: `models` or `state`."""
    free_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class Orchestrator(_Part):
    """The central orchestrator."""

    enrolled: bool
    api_base: str
    """Its address; "" when not enrolled."""
    user_id: str
    created: dict[str, int]
    """How many things of each kind this appliance has created there."""
    connected: bool | None
    """Whether the agent's link is up; None where no agent runs, or says anything yet."""
    since: float | None
    """When that changed last."""
    problem: str
    """Why it is down; "" for nothing."""
    runners: int
    """Models that take work from there."""


@dataclass(frozen=True)
class Failure(_Part):
    """The last of a kind of call that ended with another code than success."""

    at: float
    code: int
    """Clarifai's."""
    name: str
    """Of the code."""
    model: str
    """The model's id; "" where a call reached none."""
    version: str
    method: str
    count: int
    """How many of this kind there were since the start."""
    req_id: str
    """The last one's id, as in the reply's status and in the log."""


@dataclass(frozen=True)
class LogLine(_Part):
    """A line of the daemon's own process; the other processes write theirs to the journal alone."""

    at: float
    level: str
    text: str


@dataclass(frozen=True)
class Status(_Part):
    """The whole document."""

    format: str
    """Version of this document."""
    at: float
    """When it was made."""
    host: str
    version: str
    """Of the appliance."""
    started_at: float
    phase: Literal["starting", "ready", "draining", "stopped"]
    health: Literal["healthy", "degraded", "unhealthy"]
    """Degraded: it serves, and something needs a look. Unhealthy: it does not serve."""
    reasons: list[Reason]
    """Why it is not healthy; what is most urgent comes first."""
    more_reasons: int
    """How many are left out."""
    base_url: str
    """What clients are told."""
    root_certificate: str
    """Path, on this machine, of the authorities that clients may trust."""
    mode: str
    """Whether one process does everything, or several."""
    transport: str
    device: str
    """The first device, and what it is."""
    devices: list[Device]
    processes: list[Process]
    models: list[Model]
    rates: Rates
    load: Load
    history: History
    certificates: list[Ending]
    revocation_lists: list[Ending]
    keys: int
    """Keys that are valid now."""
    disks: list[Disk]
    orchestrator: Orchestrator
    failures: list[Failure]
    """The newest first."""
    log: list[LogLine]
    """Warnings and errors, the newest first."""
