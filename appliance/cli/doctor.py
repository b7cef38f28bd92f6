"""`appliance doctor`: everything around the daemon that can keep clients from being served, each with its remedy.

What `appliance check` looks at is looked at by the same code; bundles are left to it, as loading them takes memory that
a running daemon needs.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import json
import platform
import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from appliance import __version__
from appliance.cli import admin, clients, exits, rights, units
from appliance.cli.check import (
    look_at_certificates,
    look_at_configuration,
    look_at_device,
    look_at_keys,
    look_at_traces,
)
from appliance.cli.report import Report
from appliance.core import config as configuration
from appliance.core.config import MAIN_FILE, Config, Orchestrator, is_loopback, parse_address
from appliance.core.errors import ApplianceError, CertificateError, ConfigError
from appliance.core.files import one_line
from appliance.core.machine import space
from appliance.core.systemd import Notifier
from appliance.daemon.sockets import open_listening
from appliance.engine import libraries
from appliance.orchestrator import reach
from appliance.orchestrator.central import Central, CentralError, Secrets
from appliance.pki import chain, inspect
from appliance.pki.importing import SOON_DAYS
from appliance.pki.reading import read_certificates

_SCARCE_BYTES, _FULL_BYTES = 2**30, 64 * 2**20
"""Free bytes of a file system below which a new model may not fit, and below which nothing does."""

_HANDSHAKE_S = 5.0
_CLOCKS_S = 30.0
"""How far two clocks may be apart before it is worth a line: certificates, logs and reports are compared."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at everything around the daemon: driver, ports, certificates, clock, disk, rights, unit, orchestrator.

    Each line says ok, warn or fail; those that are not ok say what to do. Exits with 1 when any says fail. Run it with
    sudo: the service's files are not for everybody to read.
    """
    report = Report(quiet=as_json)
    examine(ctx.obj, report)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(line) for line in report.lines], indent=1))
    ctx.exit(exits.FOUND if report.failed else exits.OK)


def examine(config_file: Path | None, report: Report) -> None:
    """Look at everything; one thing that cannot be looked at keeps nothing else from it."""
    report.ok("version", f"{__version__}, Python {platform.python_version()}, {platform.machine()}")
    standard = config_file is None or config_file == MAIN_FILE
    try:
        loaded = configuration.load(config_file)
    except ConfigError as error:
        report.fail("configuration", one_line(error))
        if standard:
            _unit(None, None, report)
        return
    config = loaded.config
    look_at_configuration(loaded, report)
    running = _daemon(config, report)
    looks: tuple[Callable[[], object], ...] = (
        lambda: _certificates(config, report),
        lambda: look_at_keys(config, report),
        lambda: look_at_traces(config, report),
        lambda: _device(config, running, report),
        lambda: _ports(config, running, report),
        lambda: _clock(report),
        lambda: _disk(config, report),
        lambda: _permissions(config, config_file or MAIN_FILE, standard, report),
        lambda: _names(config, report),
        lambda: _orchestrator(config.orchestrator, report),
        lambda: _unit(config, running, report) if standard else None,
    )
    for look in looks:
        try:
            look()
        except (OSError, ApplianceError) as error:
            report.warn("doctor", f"could not look: {error}; run this with sudo")


# ---- the daemon ------------------------------------------------------------------------------------------------------


def _daemon(config: Config, report: Report) -> dict[str, Any] | None:
    """What the daemon says of itself; None when it does not run, or not for us."""
    try:
        status = admin.ask(config.admin.socket, "/status")
        ready = admin.ask(config.admin.socket, "/readyz")
    except admin.NotRunning as error:
        if config.admin.socket.exists():
            report.warn("daemon", f"{error} (run this with sudo)")
        else:
            report.warn("daemon", "does not run; start it: systemctl start inference-appliance")
        return None
    problems = ready.get("not_ready") or {}
    for name, why in problems.items():
        report.warn("not ready", f"{name}: {why}")
    if ready.get("ready"):
        report.ok("daemon", f"ready, {status.get('in_flight', 0)} calls in flight")
    elif status.get("phase") == "ready":
        report.fail("daemon", "runs, and no model is ready; see `appliance models list`")
    else:
        report.warn("daemon", f"is {status.get('phase')}")
    return status


# ---- certificates ----------------------------------------------------------------------------------------------------


def _certificates(config: Config, report: Report) -> None:
    files = look_at_certificates(config, report)
    if files is None:
        return
    now = datetime.now(UTC)
    served = inspect.load_certificates(files.tls().chain)
    leaf = served[0]
    report.ok("names", ", ".join(inspect.server_names(leaf)))
    for label, cert in (("server", leaf), *(("intermediate", cert) for cert in served[1:])):
        days = inspect.days_left(cert, now)
        text = f"{label} {inspect.title(cert)} ends on {cert.not_valid_after_utc:%Y-%m-%d}, in {days:.0f} days"
        if days < SOON_DAYS:
            report.warn("expiry", f"{text}; renew it: appliance certs renew server, or appliance certs csr for your CA")
        else:
            report.ok("expiry", text)
    try:
        anchors = read_certificates(config.tls.client_ca)
    except CertificateError:
        report.warn("chain", f"there is no {config.tls.client_ca} to verify the chain with")
        return
    broken = chain.verify(served, anchors, now)
    if broken:
        report.warn("chain", f"who trusts {config.tls.client_ca} does not trust the server: {' '.join(broken)}")
    else:
        report.ok("chain", f"leads to a root in {config.tls.client_ca}")


# ---- the machine -----------------------------------------------------------------------------------------------------


def _device(config: Config, running: dict[str, Any] | None, report: Report) -> None:
    wanted = config.engine.device
    if wanted.startswith("gpu") or libraries.DRIVER_FILE.exists():
        found = libraries.look()
        said = libraries.problems(found)
        for sentence in said:
            report.line("fail" if wanted.startswith("gpu") else "warn", "driver", sentence)
        if not said:
            report.ok("driver", str(found))
    if running is None:
        look_at_device(config, report)
    else:  # it has tried already, and a second probe would take memory of the device
        report.ok("device", f"{running.get('device')}: {running.get('device_reason')}")


def _ports(config: Config, running: dict[str, Any] | None, report: Report) -> None:
    if running is None:
        _bind(config, report)
        return
    for name, port in sorted(running.get("ports", {}).items()):
        report.ok("port", f"{name} is {port or 'a unix socket'}")
    port = running.get("ports", {}).get("server.listen")
    host = parse_address(config.server.listen)[0]
    if port and (host in ("::", "0.0.0.0") or is_loopback(config.server.listen)):  # noqa: S104  # compared, not bound
        _handshake(config, int(port), report)


def _bind(config: Config, report: Report) -> None:
    """Whether the ports could be bound, by the daemon's own code."""
    wanted = {
        "server.listen": config.server.listen,
        "server.mtls_listen": config.server.mtls_listen,
        "admin.listen": config.admin.listen,
    }
    for name, address in wanted.items():
        if address is None:
            continue
        opened = report.attempt("port", partial(open_listening, {name: address}, _Silent(), environment={}))
        if opened is not None:
            opened.close()
            report.ok("port", f"{name} {address} is free")


class _Silent(Notifier):
    """Has systemd keep nothing."""

    def __init__(self) -> None:
        self._send = None
        self.watchdog_s = None


def _handshake(config: Config, port: int, report: Report) -> None:
    """Whether the port answers on this machine, and shows a certificate that a client accepts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    host = urlsplit(config.server.base_url).hostname or "localhost"
    try:
        context.load_verify_locations(config.tls.client_ca)
    except (OSError, ssl.SSLError):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("localhost", port), timeout=_HANDSHAKE_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as tls,
        ):
            report.ok("handshake", f"port {port} answers as {host} with {tls.version()}")
    except ssl.SSLCertVerificationError as error:
        report.warn("handshake", f"port {port} answers, and a client refuses it: {error.verify_message}; see above")
    except (OSError, ssl.SSLError) as error:
        report.fail("handshake", f"port {port} does not answer on this machine ({error}); see the journal")


class _Timex(ctypes.Structure):
    """The beginning of struct timex, and room for the rest. Source: adjtimex(2), <sys/timex.h>."""

    _fields_ = (("modes", ctypes.c_uint), ("rest", ctypes.c_byte * 252))


def _clock(report: Report) -> None:
    """Whether the kernel thinks that its clock is synchronised: certificates have dates, and logs are compared."""
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(_Timex()))
    except (OSError, AttributeError):
        state = -1
    now = datetime.now(UTC)
    if state == 5:  # TIME_ERROR, which STA_UNSYNC means
        report.warn("clock", f"{now:%Y-%m-%d %H:%M} UTC, not synchronised; run chrony or systemd-timesyncd")
    else:
        report.ok("clock", f"{now:%Y-%m-%d %H:%M} UTC" + (", synchronised" if state >= 0 else ""))


def _disk(config: Config, report: Report) -> None:
    places: dict[int, Path] = {}
    for folder in (config.catalog.state_dir, config.catalog.root):
        if folder.exists():
            places.setdefault(folder.stat().st_dev, folder)
        else:
            report.fail("disk", f"there is no {folder}; make it, or run: systemd-tmpfiles --create")
    for folder in places.values():
        found = space(folder)
        text = f"{found.free / 2**30:.1f} GiB free at {folder}"
        if found.free < _FULL_BYTES or not found.more_files:
            report.fail("disk", f"{text}, or no more files; free some")
        elif found.free < _SCARCE_BYTES:
            report.warn("disk", f"{text}, which may be too little for a new model")
        else:
            report.ok("disk", text)


def _permissions(config: Config, main: Path, standard: bool, report: Report) -> None:
    who = (rights.service() if standard else None) or rights.myself()
    found = rights.problems(config, main, who)
    for sentence in found:
        report.fail("permissions", sentence)
    if not found:
        report.ok("permissions", f"user {who.name} can read what the service needs, and others no keys")


def _names(config: Config, report: Report) -> None:
    host = urlsplit(config.server.base_url).hostname or ""
    try:
        found = reach.addresses(config.server.base_url)
    except OSError as error:
        report.warn("base url", f"{host} cannot be looked up here ({error.strerror}); clients need it in their DNS")
    else:
        report.ok("base url", f"{config.server.base_url}, which is {', '.join(found)}")


# ---- the orchestrator ------------------------------------------------------------------------------------------------


def _orchestrator(settings: Orchestrator, report: Report) -> None:
    """The way there, step by step: after the first that fails there is no next one."""
    for url in reach.called(settings):
        host = urlsplit(url).hostname
        try:
            report.ok("orchestrator", f"{host} is {', '.join(reach.addresses(url))}")
        except OSError as error:
            report.fail(
                "orchestrator",
                f"{host} cannot be looked up here ({error.strerror}); mend the name servers, or name another: "
                "appliance orchestrator enroll",
            )
            return
    tls = _way_to(settings, report) if settings.api_base is not None else None
    if tls is not None:
        report.ok("orchestrator", f"{settings.api_base} can be reached, with {tls}")
        try:
            _accepted(settings, report)
        except ConfigError as error:
            refused = isinstance(error, CentralError) and error.code
            remedy = "; give it another PAT: appliance orchestrator enroll" if refused else ""
            report.fail("orchestrator", one_line(error) + remedy)


def _way_to(settings: Orchestrator, report: Report) -> str | None:
    """The version of TLS that is spoken; None and a line when there is no way."""
    way = f"through {settings.proxy}" if settings.proxy else "from here"
    try:
        raw = reach.connect(settings)
    except OSError as error:
        report.fail(
            "orchestrator",
            f"{settings.api_base} cannot be connected to {way} ({error}); open that in firewall or proxy, or name "
            "another proxy: appliance orchestrator enroll --proxy URL",
        )
        return None
    try:
        with raw, reach.handshake(settings, raw) as tls:
            return str(tls.version())
    except ssl.SSLCertVerificationError as error:
        trusted = settings.root_ca or "the public authorities"
        report.fail(
            "orchestrator",
            f"{settings.api_base} shows a certificate that {trusted} cannot vouch for ({error.verify_message}); mend "
            "the clock, or name its authorities: appliance orchestrator enroll --root-ca FILE",
        )
    except OSError as error:
        report.fail("orchestrator", f"there is no TLS with {settings.api_base} {way}: {error}; see orchestrator.*")
    return None


def _accepted(settings: Orchestrator, report: Report) -> None:
    """Whether the PAT is taken, and what the time is there. Raises: ConfigError."""
    secrets = Secrets.read(settings)

    async def ask() -> tuple[str, float | None]:
        async with Central(settings, secrets) as central:
            return await central.whose(), central.clock

    owner, clock = asyncio.run(ask())
    if owner != settings.user_id:
        report.fail(
            "orchestrator",
            f"its PAT acts for {owner!r}, and orchestrator.user_id is {settings.user_id!r}; make them one: "
            "appliance orchestrator enroll",
        )
    else:
        report.ok("orchestrator", f"takes the PAT, which acts for {owner}")
    if clock is not None:
        ahead_s = clock - time.time()
        far = abs(ahead_s) > _CLOCKS_S
        report.line(
            "warn" if far else "ok",
            "orchestrator",
            f"its clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this one"
            + ("; run chrony or systemd-timesyncd here" if far else ""),
        )


# ---- systemd ---------------------------------------------------------------------------------------------------------


def _unit(config: Config | None, running: dict[str, Any] | None, report: Report) -> None:
    if not units.systemd_runs():
        report.ok("unit", "systemd does not run here; not looked at")
        return
    found = units.show(units.SERVICE)
    if found.get("LoadState") != "loaded":
        report.warn("unit", f"{units.SERVICE} is {found.get('LoadState', 'unknown')}; install the package")
        return
    _unit_state(found, report)
    if found.get("NeedDaemonReload") == "yes":
        report.warn("unit", "its files changed since systemd read them; run: systemctl daemon-reload")
    if found.get("FragmentPath", "").startswith("/etc/"):
        report.warn(
            "unit",
            f"{found['FragmentPath']} hides the packaged unit and misses its upgrades; keep what you changed as a "
            f"drop-in: systemctl edit {units.SERVICE}",
        )
    if config is not None:
        _network(config, found, report)


def _unit_state(found: dict[str, str], report: Report) -> None:
    state, result = found.get("ActiveState"), found.get("Result")
    if state == "active":
        restarts = found.get("NRestarts", "0")
        if restarts.isdigit() and int(restarts):
            report.warn("unit", f"active, restarted {restarts} times; see: journalctl -u {units.SERVICE}")
        else:
            report.ok("unit", f"active ({found.get('StatusText') or found.get('SubState')})")
    elif state == "failed" or result not in (None, "", "success"):
        status = found.get("ExecMainStatus", "")
        meaning = next((text for number, text, _ in exits.STATUSES if str(number) == status and number), "")
        report.fail(
            "unit",
            f"failed ({result}, status {status}{': ' + meaning.rstrip('.') if meaning else ''}); see journalctl -u "
            f"{units.SERVICE} -n 20, mend it, and run: systemctl reset-failed {units.SERVICE}; systemctl start "
            f"{units.SERVICE}",
        )
    elif found.get("ConditionResult") == "no":
        report.warn("unit", "waits for a certificate; run: appliance setup")
    else:
        report.warn("unit", f"is {state}; start it: systemctl start {units.SERVICE}")
    if found.get("UnitFileState") not in ("enabled", "enabled-runtime"):
        report.warn("unit", f"does not start at boot; run: systemctl enable {units.SERVICE}")


def _network(config: Config, service: dict[str, str], report: Report) -> None:
    """Who may connect: systemd's rule, which drops packets in silence."""
    names = {"service": service}
    socket_unit = units.show(units.SOCKET)
    if socket_unit.get("ActiveState") == "active":
        names["socket"] = socket_unit
    outgoing = [*clients.resolvers(), *_outgoing(config.orchestrator)]
    no_clients = () if clients.standing() else outgoing
    for what, found in names.items():
        rule = f"IPAddressDeny= of the {what}"
        if units.only_this_machine(found, no_clients):
            remote = not is_loopback(config.server.listen)
            report.line(
                "warn" if remote else "ok",
                "clients",
                f"only programs on this machine may connect ({rule}): all others see a time-out. To let them in: "
                "appliance setup --clients CIDR (or any)",
            )
        elif units.lets_all_in(found):
            report.ok("clients", f"the {what} lets every address in")
        else:
            report.ok(
                "clients", f"the {what} lets in {found.get('IPAddressAllow')}; all others see a time-out ({rule})"
            )
    with contextlib.suppress(OSError):  # said elsewhere
        for address in reach.addresses(config.server.base_url):
            if not units.lets_in(service, address):
                report.warn(
                    "clients",
                    f"{address} of server.base_url is not let in: programs on this machine that call it see a time-out",
                )
    if reach.called(config.orchestrator):
        for address in outgoing:
            if not units.lets_in(service, address):
                report.fail(
                    "clients",
                    f"{address}, a name server or on the way to the orchestrator, is not let through either "
                    "(IPAddressDeny= of the service); run: appliance setup --yes --no-samples; systemctl restart "
                    f"{units.SERVICE}",
                )
    if config.urls.hosts and not units.lets_all_in(service):
        report.warn(
            "clients",
            "the same rule counts for hosts of URL inputs (urls.hosts): their addresses must be in --clients too",
        )
    with contextlib.suppress(OSError):  # the log says that it is not reached
        for address in reach.addresses(config.traces.endpoint) if config.traces.endpoint else ():
            if not units.lets_in(service, address):
                report.warn("traces", f"the same rule counts for traces.endpoint: {address} must be in --clients too")
    dropped = clients.UNIT_FOLDER / f"{units.SERVICE}.d" / clients.DROP_IN
    if dropped.exists() and str(dropped) not in service.get("DropInPaths", ""):
        report.warn("clients", f"{dropped} is not in force yet; run: systemctl daemon-reload")


def _outgoing(settings: Orchestrator) -> tuple[str, ...]:
    """Addresses on the way to the orchestrator; that they cannot be looked up is said elsewhere."""
    try:
        return reach.all_addresses(settings)
    except OSError:
        return ()
