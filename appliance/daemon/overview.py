"""Makes the status document, however many pages ask for it: it is kept for a second, and with very many models for so
long that making it takes a twentieth of the time at most."""

import asyncio
import json
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from appliance import __version__
from appliance.catalog.bundle import TASK_OF_TYPE
from appliance.catalog.view import State, Version, View
from appliance.core import logs
from appliance.core.config import Config
from appliance.core.errors import ConfigError
from appliance.core.machine import resident_memory, usable_memory
from appliance.core.metrics import Metrics
from appliance.daemon import reasons
from appliance.daemon.staff import Loaded, Readiness, Staff
from appliance.daemon.status import (
    VERSION,
    Device,
    Disk,
    Ending,
    Failure,
    Load,
    Model,
    Orchestrator,
    Process,
    Reason,
    Status,
)
from appliance.daemon.watch import NO_CALLS, STEP_S, SUCCESS, Numbers, RecentLog, Watch, shown

_log = logging.getLogger(__name__)

_KEPT_S, _SHARE = 1.0, 20
"""Seconds that a document is kept, and at least how many times as long as it took to make."""

_MOST_REASONS, _MOST_FAILURES = 50, 20

_JUDGED = (
    *("disk_free_bytes", "disk_size_bytes", "certificate_expiry_timestamp_seconds", "crl_next_update_seconds"),
    *("gpu_utilization_ratio", "gpu_memory_used_bytes", "gpu_memory_total_bytes"),
    *("gpu_temperature_celsius", "gpu_power_watts"),
)
"""Metrics that are shown, and in which reasons may lie."""

_SHOWN = (
    *("queue_rows", "in_flight_requests", "connections", "memory_in_flight_bytes", "memory_in_flight_limit_bytes"),
    *("requests_lost", "rejected", "keys", "worker_resident_memory_bytes", *_JUDGED),
)
"""Metrics that the document is made of, beside those that `Watch` looks at."""

_SAID = frozenset(("certificate-expires", "disk-full", "gpu-memory", "rejects"))
"""Pages of reasons that nobody else logs when they begin."""


class Overview:
    """The status of one daemon. Used from the event loop's thread."""

    def __init__(self, metrics: Metrics, staff: Staff, catalog: View[Loaded], readiness: Readiness) -> None:
        self._staff, self._catalog, self._readiness = staff, catalog, readiness
        self._watch = Watch(staff, metrics.request_seconds.bounds)
        self._log = RecentLog()
        self._started_at = time.time()
        self._memory = usable_memory()
        self._created: Mapping[str, int] = {}
        self._document = b""
        self._kept_until = 0.0
        self._said: set[tuple[str, str]] = set()
        logging.getLogger(logs.ROOT).addHandler(self._log)

    def close(self) -> None:
        """Listen to the log no more."""
        logging.getLogger(logs.ROOT).removeHandler(self._log)

    async def run(self, config: Callable[[], Config]) -> None:
        """Look at the numbers again and again. Args: config: gives the configuration in force."""
        while True:
            try:
                self.look()
                self.tell()
                self._created = await asyncio.to_thread(_created, config())
            except Exception:
                # One bad look must not end the watch.
                _log.exception("a look at our own numbers failed")
            await asyncio.sleep(STEP_S)

    def look(self) -> None:
        """Look at the numbers now."""
        self._watch.look()

    def tell(self) -> None:
        """Log what is not as it should be and was when it was told last, and what is again."""
        found = {
            (each.what, each.runbook): each.why
            for each in self._measured(time.time(), self._staff.counted(*_JUDGED))
            if each.runbook in _SAID
        }
        for what, page in found.keys() - self._said:
            _log.warning("%s: %s", what, found[what, page], extra={"runbook": page})
        for what, page in self._said - found.keys():
            _log.info("%s: it is as it should be again", what, extra={"runbook": page})
        self._said = set(found)

    def document(self, config: Config) -> bytes:
        """The document as JSON in ASCII."""
        begun = time.monotonic()
        if begun >= self._kept_until:
            content = json.dumps(self.status(config), default=vars, allow_nan=False, separators=(",", ":"))
            self._document = content.encode("ascii")
            now = time.monotonic()
            self._kept_until = now + max(_KEPT_S, _SHARE * (now - begun))
        return self._document

    def status(self, config: Config) -> Status:
        """What is true now."""
        now, facts, numbers = time.time(), self._staff.describe(), self._staff.counted(*_SHOWN)
        ready, told = self._readiness()
        phase: Any = told["phase"]
        problems: Any = told["not_ready"]
        keys = _count(numbers, "keys")
        link = self._orchestrator(config, facts.get("orchestrator") or {})
        found = [
            *(() if ready else reasons.not_serving(phase, problems)),
            *reasons.not_ready(problems, self._staff.problems()),
            *reasons.recent(self._watch.happened, time.monotonic()),
            *reasons.nobody_may_call(config, keys),
            *reasons.silent(link),
            *self._measured(now, numbers),
        ]
        processes: Any = facts.get("processes", ())
        return Status(
            format=VERSION,
            at=round(now, 3),
            host=socket.gethostname(),
            version=__version__,
            started_at=round(self._started_at, 3),
            phase=phase,
            health="unhealthy" if not ready else "degraded" if found else "healthy",
            reasons=found[:_MOST_REASONS],
            more_reasons=max(0, len(found) - _MOST_REASONS),
            base_url=config.server.base_url,
            root_certificate=str(config.tls.client_ca),
            mode=str(facts["mode"]),
            transport=str(facts["transport"]),
            device=shown(f"{facts['device']}: {facts['device_reason']}"),
            devices=self._devices(numbers),
            processes=[Process(each["name"], each["pid"], shown(each["problem"])) for each in processes],
            models=list(self._models(numbers)),
            rates=self._watch.rates,
            load=Load(
                _count(numbers, "in_flight_requests"),
                _count(numbers, "connections"),
                _count(numbers, "memory_in_flight_bytes"),
                _count(numbers, "memory_in_flight_limit_bytes"),
                _count(numbers, "requests_lost"),
                {why: int(each.cells[0]) for (why,), each in numbers["rejected"].items() if each.cells[0]},
            ),
            history=self._watch.history(),
            certificates=_certificates(numbers),
            revocation_lists=_lists(numbers),
            keys=keys,
            disks=_disks(numbers),
            orchestrator=link,
            failures=self._failures(),
            log=list(reversed(self._log.lines)),
        )

    def _measured(self, now: float, numbers: Numbers) -> Iterator[Reason]:
        """Reasons that lie in the numbers. Args: now: Unix time. numbers: of `_JUDGED` at least."""
        yield from reasons.due(_certificates(numbers), _lists(numbers), now)
        yield from reasons.full(_disks(numbers), list(_gpus(numbers)))
        yield from reasons.overload(*self._watch.refused)

    def _devices(self, numbers: Numbers) -> list[Device]:
        name = "worker_resident_memory_bytes"
        used = resident_memory() + sum(_value(numbers, name, *labels) or 0.0 for labels in numbers[name])
        return [Device("cpu", self._watch.cpu_load, int(used), self._memory, None, None), *_gpus(numbers)]

    def _models(self, numbers: Numbers) -> Iterator[Model]:
        for bundle in self._catalog.bundles:
            name, model = shown(bundle.name), str(bundle.key or "")
            for version in self._catalog.versions(bundle):
                yield self._model(name, model, version, numbers)
            if bundle.problem or not bundle.versions:
                problem = shown(bundle.problem) or "its files are still changing"
                state = State.FAILED if bundle.problem else State.SETTLING
                yield Model(name, model, "", state.value, problem, "", "", 0, NO_CALLS)

    def _model(self, bundle: str, model: str, version: Version[Loaded], numbers: Numbers) -> Model:
        servable, labels = version.servable, (version.config.key.model_id, version.id)
        takes: Any = TASK_OF_TYPE.get(version.config.model_type_id, ("",))[0]
        return Model(
            bundle,
            model,
            version.id,
            (State.READY if version.ready else version.state).value,
            shown(version.problem or (servable.problem if servable else "") or ""),
            takes,
            str(servable.described().get("device", "")) if servable else "",
            int(_value(numbers, "queue_rows", *labels) or 0),
            self._watch.of_model.get(labels, NO_CALLS),
        )

    def _orchestrator(self, config: Config, link: Any) -> Orchestrator:
        """Args: link: what the agent says of it; empty where it has said nothing."""
        settings = config.orchestrator
        return Orchestrator(
            settings.api_base is not None,
            settings.api_base or "",
            settings.user_id or "",
            dict(self._created),
            link.get("connected"),
            link.get("since"),
            shown(link.get("problem") or ""),
            link.get("runners", 0),
        )

    def _failures(self) -> list[Failure]:
        failed = [
            (each.notes[0], labels, each.cells[0])
            for labels, each in self._watch.calls.items()
            if each.notes and labels[-1] != SUCCESS and labels[-1].isdigit()
        ]
        if not failed:
            return []
        from appliance.api.status import name_of  # Clarifai's messages, which a supervisor starts sooner without

        failed.sort(key=lambda each: -each[0].at)
        return [
            Failure(round(note.at, 3), int(code), name_of(int(code)), model, version, method, int(count), note.id)
            for note, (model, version, method, code), count in failed[:_MOST_FAILURES]
        ]


def _value(numbers: Numbers, name: str, *labels: str) -> float | None:
    """One sample; None where there is none."""
    counted = numbers[name].get(labels)
    value = counted.cells[0] if counted else math.nan
    return value if math.isfinite(value) else None


def _count(numbers: Numbers, name: str) -> int:
    """A sample without labels, as a whole number."""
    return int(_value(numbers, name) or 0)


def _endings(numbers: Numbers, name: str) -> list[Ending]:
    """What ends, soonest first."""
    ends = ((subject, _value(numbers, name, subject)) for (subject,) in numbers[name])
    return sorted((Ending(shown(subject), at) for subject, at in ends if at is not None), key=lambda each: each.at)


def _certificates(numbers: Numbers) -> list[Ending]:
    return _endings(numbers, "certificate_expiry_timestamp_seconds")


def _lists(numbers: Numbers) -> list[Ending]:
    return _endings(numbers, "crl_next_update_seconds")


def _disks(numbers: Numbers) -> list[Disk]:
    name, size = "disk_free_bytes", "disk_size_bytes"
    found = ((folder, _value(numbers, name, folder), _value(numbers, size, folder)) for (folder,) in numbers[name])
    return [Disk(folder, int(free), int(all_)) for folder, free, all_ in found if free is not None and all_]


def _gpus(numbers: Numbers) -> Iterator[Device]:
    """Those that have a sample; what a driver does not tell of one is None."""
    for labels in sorted(numbers["gpu_memory_total_bytes"]):
        load, used, total, celsius, watts = (
            _value(numbers, f"gpu_{name}", *labels)
            for name in (
                *("utilization_ratio", "memory_used_bytes", "memory_total_bytes"),
                *("temperature_celsius", "power_watts"),
            )
        )
        yield Device(labels[0], load, _whole(used), _whole(total), celsius, watts)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _created(config: Config) -> dict[str, int]:
    """How many things of each kind we created at the orchestrator; reads a file."""
    settings = config.orchestrator
    if settings.api_base is None:
        return {}
    from appliance.orchestrator.created import ORDER, Created  # protobuf, which those who stand alone do without

    try:
        created = Created(config.catalog.state_dir, settings.api_base, settings.user_id or "")
    except ConfigError:  # `appliance orchestrator` says what is wrong with the file
        return {}
    return {kind: count for kind in ORDER if (count := len(created.paths(kind)))}
