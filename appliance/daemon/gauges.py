"""What the daemon's own process shows: catalog, certificates, disks, GPUs, and counts that begin at nought."""

import contextlib
import time
from collections.abc import Collection, Iterable, Mapping

from appliance.catalog.bundle import graph_file
from appliance.catalog.view import State, Version, View
from appliance.core.config import Config
from appliance.core.machine import Space, space
from appliance.core.metrics import Metrics
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.staff import Loaded
from appliance.engine.gpu import Reading


def begin(metrics: Metrics) -> None:
    """Have a series of what may never happen: an alert on its growth needs to see it at nought before."""
    for family in (metrics.reloads, metrics.certificate_reloads):
        for result in ("ok", "failed"):
            family.labels(result)
    metrics.watch(metrics.clock, time.time)


def show_catalog(metrics: Metrics, catalog: View[Loaded]) -> None:
    """Show what is in the catalog now; a version that is gone leaves no sample."""
    for gauge in (metrics.model_state, metrics.model_info, metrics.model_load_seconds):
        gauge.clear()
    count = dict.fromkeys(State, 0)
    for bundle in catalog.bundles:
        for version in bundle.versions.values():
            state = State.READY if version.ready else version.state
            count[state] += 1
            labels = (version.config.key.model_id, version.id)
            metrics.model_state.labels(*labels, state.value).set(1)
            metrics.model_load_seconds.labels(*labels).set(version.load_seconds)
            if version.servable is not None:
                metrics.model_info.labels(*labels, *_info(version, version.servable)).set(1)
    for state, number in count.items():
        metrics.catalog_versions.labels(state.value).set(number)
    metrics.catalog_unreadable.set(sum(bool(bundle.problem) for bundle in catalog.bundles))


def _info(version: Version[Loaded], loaded: Loaded) -> tuple[str, str, str]:
    """Task, SHA-256 of the graph's file, and execution providers."""
    file = version.folder.model_file.name if version.folder.bare else graph_file(version.config)
    providers = loaded.described().get("providers")
    names = ",".join(map(str, providers)) if isinstance(providers, list) else ""
    return version.config.model_type_id, version.checksums.get(file, ""), names


def show_certificates(metrics: Metrics, files: CertificateFiles) -> None:
    """Show when they end; one that is configured no more leaves no sample."""
    for gauge, moments in (
        (metrics.certificate_expiry, files.expiry),
        (metrics.crl_next_update, files.crl_next_update),
    ):
        gauge.clear()
        for name, moment in moments.items():
            gauge.labels(name).set(moment)


def look_at_disks(config: Config) -> dict[str, Space]:
    """The space where we read models and write state, for a thread to find; what cannot be looked at is left out."""
    found = {}
    for name, path in (("models", config.catalog.root), ("state", config.catalog.state_dir)):
        with contextlib.suppress(OSError):
            found[name] = space(path)
    return found


def show_disks(metrics: Metrics, disks: Mapping[str, Space]) -> None:
    """Show these; one that cannot be looked at any more leaves no sample."""
    for gauge in (metrics.disk_free, metrics.disk_size):
        gauge.clear()
    for name, found in disks.items():
        metrics.disk_free.labels(name).set(found.free)
        metrics.disk_size.labels(name).set(found.size)


def show_gpus(metrics: Metrics, readings: Iterable[Reading], ours: Collection[str]) -> None:
    """Show what the sensors of our GPUs say; one that is lost leaves no sample. Args: ours: UUIDs."""
    shown = (
        (metrics.gpu_utilization, "utilization"),
        (metrics.gpu_memory_used, "memory_used"),
        (metrics.gpu_memory_total, "memory_total"),
        (metrics.gpu_temperature, "temperature"),
        (metrics.gpu_power, "power"),
        (metrics.gpu_clock, "clock"),
    )
    for gauge, _ in shown:
        gauge.clear()
    for reading in readings:
        if reading.gpu.uuid in ours:
            for gauge, name in shown:
                value = getattr(reading, name)
                if value is not None:
                    gauge.labels(f"gpu:{reading.gpu.index}", reading.gpu.uuid).set(value)
