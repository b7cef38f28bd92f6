"""`appliance check`: everything that can be wrong, looked at without serving."""

import asyncio
from pathlib import Path

import click

from appliance.api.keys import KeyStore
from appliance.api.tracing import check_traces
from appliance.catalog.bundle import BundleConfig, VersionFolder
from appliance.catalog.repository import Repository
from appliance.catalog.workflows import Workflows
from appliance.cli.report import Report
from appliance.core import config as configuration
from appliance.core.config import Catalog, Config, LoadedConfig
from appliance.core.errors import ApplianceError
from appliance.core.metrics import Metrics
from appliance.daemon.certificates import CertificateFiles, base_url_warning
from appliance.daemon.front import pass_through_warning
from appliance.engine.worker import LocalEngine
from appliance.media import fetch
from appliance.tasks import servable
from appliance.tasks.servable import DecodePool, Servable


@click.command()
@click.option("--skip-models", is_flag=True, help="Do not load the bundles.")
@click.pass_context
def check(ctx: click.Context, skip_models: bool) -> None:
    """Check configuration, certificates, keys, device and bundles without serving.

    Exits with 1 when something would keep the appliance or a model from serving.
    """
    report = Report()
    loaded = configuration.load(ctx.obj)  # all its problems are one error by themselves
    config = loaded.config
    look_at_configuration(loaded, report)
    look_at_certificates(config, report)
    look_at_keys(config, report)
    look_at_traces(config, report)
    engine = look_at_device(config, report)
    if engine is not None and not skip_models:
        asyncio.run(_check_models(config, engine, report))
    ctx.exit(1 if report.failed else 0)


def look_at_configuration(loaded: LoadedConfig, report: Report) -> None:
    """A configuration that could be read: valid, perhaps with keys that have another name now."""
    for warning in loaded.warnings:
        report.warn("configuration", warning)
    report.ok("configuration", "valid")


def look_at_certificates(config: Config, report: Report) -> CertificateFiles | None:
    """Certificates, trust, revocation lists, and authorities for URLs."""
    files = report.attempt("certificates", lambda: CertificateFiles(config))
    if files is not None:
        warning = base_url_warning(config, files.tls().chain)
        report.line("warn" if warning else "ok", "certificates", warning or str(config.tls.certificate))
        proxies = pass_through_warning(config)
        if proxies:
            report.warn("proxies", proxies)
        for sentence in files.stale_lists():
            report.line("fail" if config.tls.crl_policy == "strict" else "warn", "revocation", sentence)
    if config.urls.ca is not None and report.attempt("urls", lambda: fetch.trust(config.urls.ca)) is not None:
        report.ok("urls", str(config.urls.ca))
    return files


def look_at_keys(config: Config, report: Report) -> None:
    """Keys, and whether there are some where they are needed."""
    keys = report.attempt("keys", lambda: KeyStore(config.auth.keys_file))
    if keys is not None:
        needed = config.auth.require in ("key", "either", "both") and not len(keys)
        remedy = "; nobody can call without one: appliance keys create" if needed else ""
        report.line("warn" if needed else "ok", "keys", f"{len(keys)} in {config.auth.keys_file}{remedy}")


def look_at_traces(config: Config, report: Report) -> None:
    """Where traces go, if they go anywhere; nobody is asked there."""

    def look() -> str | None:
        check_traces(config.traces)
        return config.traces.endpoint

    endpoint = report.attempt("traces", look)
    if endpoint is not None:
        report.ok("traces", endpoint)


def look_at_device(config: Config, report: Report) -> LocalEngine | None:
    """The device that models run on; None and a line when it cannot be used."""
    engine = report.attempt("device", lambda: LocalEngine(config.engine, Metrics()))
    if engine is not None:
        report.ok("device", f"{engine.device}: {engine.device.reason}")
    return engine


async def _check_models(config: Config, engine: LocalEngine, report: Report) -> None:
    """Load every wanted version once, as the daemon would; nothing is written."""
    pool = DecodePool(config.engine.decode_threads)
    metrics = Metrics()

    async def load(path: Path, bundle: BundleConfig, version: VersionFolder) -> Servable:
        return await servable.load(path, bundle, version, engine, pool, metrics, config.limits)

    try:
        settings = config.catalog.model_copy(update={"settle_s": 0.0})
        repository: Repository[Servable] = Repository(settings, load, remember=False)
    except ApplianceError as error:
        report.fail("catalog", str(error))
        return
    await repository.look()
    await repository.wait_settled()
    problems = repository.not_ready()
    for bundle in repository.bundles:
        if bundle.problem:
            report.fail("bundle", f"{bundle.name}: {bundle.problem}")
        for version in repository.versions(bundle):
            name = f"{bundle.name}:{version.id}"
            if name in problems:
                report.fail("bundle", f"{name}: {problems[name]}")
            elif version.servable is not None:
                model = version.servable.model
                sentence = f" {version.config.sentence}" if version.config.sentence else ""
                batching = f"batching {model.batching.mode} ({model.batching.reason})"
                report.ok("bundle", f"{name}: {version.config.model_type_id} on {model.device}, {batching}.{sentence}")
            else:
                report.ok("bundle", f"{name}: {version.state.value}")
    if not repository.bundles:
        report.warn("bundle", f"there is none in {config.catalog.root}; add one: appliance models add")
    await _check_workflows(settings, repository, report)
    await repository.close()
    pool.close()


async def _check_workflows(settings: Catalog, repository: Repository[Servable], report: Report) -> None:
    """Read every workflow, and look whether there are such models."""
    workflows = Workflows(settings, repository)
    await workflows.look()
    for row in workflows.describe():
        if row["problem"]:
            report.fail("workflow", f"{row['file']}: {row['problem']}".removeprefix(": "))
        else:
            report.ok("workflow", f"{row['file']}: {row['workflow']}, nodes: {row['nodes']}")
