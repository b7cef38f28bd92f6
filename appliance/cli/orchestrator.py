"""`appliance orchestrator enroll | status | plan | sync | leave`; exit statuses are those of `exits`."""

import asyncio
import contextlib
import getpass
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from appliance.cli import admin, clients
from appliance.cli.clients import UNIT_FOLDER
from appliance.core import config as configuration
from appliance.core.config import MAIN_FILE, Config, Orchestrator
from appliance.core.errors import ConfigError
from appliance.core.files import file_error, make_folder, printable, write_atomically
from appliance.orchestrator.central import Central, CentralError, Secrets
from appliance.orchestrator.created import Created, registering
from appliance.orchestrator.desired import Desired, of_data
from appliance.orchestrator.pat import check_pat, read_pat
from appliance.orchestrator.reconcile import Registered, reconcile
from appliance.orchestrator.reconcile import leave as leave_all

DROP_IN = "orchestrator.toml"
"""What `enroll` writes into conf.d."""


@click.group()
def orchestrator() -> None:
    """Enrol with a central orchestrator, and keep what it knows of this appliance right."""


@orchestrator.command()
@click.option("--api-base", help='The central API: "https://host[:port]".')
@click.option("--user-id", help="The user there who shall own what is registered.")
@click.option("--pat-file", type=click.Path(path_type=Path), help="Read the PAT from this file; else from stdin.")
@click.option("--root-ca", type=click.Path(path_type=Path), help="PEM file of a private orchestrator's authorities.")
@click.option("--proxy", help='HTTP proxy on the way there: "http://host:port".')
@click.option("--certificate", type=click.Path(path_type=Path), help="PEM file: the certificate to show there.")
@click.option("--key", type=click.Path(path_type=Path), help="PEM file: its private key.")
@click.option("--app-id", help="The app there for all models; else each has one called like its app here.")
@click.option("--site", help="Where this machine stands, as the orchestrator shows it.")
@click.option("--agent/--no-agent", default=None, help="Whether to register and to take work by itself; else as it is.")
@click.pass_obj
def enroll(config_file: Path | None, /, pat_file: Path | None, **given: Any) -> None:
    """Check the PAT with the orchestrator, and write it and the [orchestrator] section.

    The PAT comes from a file or from stdin, never from the command line, where others could read it. What is not given
    stays as it is configured, so that a new PAT needs no options. With the agent everything is registered once the
    service knows of it; without, `plan` shows what would be, and `sync` does it.
    """
    settings = settings_of(configuration.load(config_file).config.orchestrator, given)  # before anybody asks for a PAT
    written, *rule = enrol(config_file, given, given_pat(pat_file))
    for line in (written, *rule):
        click.echo(line)
    click.echo(
        "Next: restart the service; the agent does the rest."
        if settings.agent
        else f"Next: `{_take_over(rule)}`, then `appliance orchestrator plan` and `sync`.",
        err=True,
    )


@orchestrator.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def status(config_file: Path | None, as_json: bool) -> None:
    """Whether this appliance is enrolled, the orchestrator answers, and what it knows is right."""
    config = configuration.load(config_file).config
    settings = config.orchestrator
    if settings.api_base is None:
        click.echo(json.dumps({"enrolled": False}) if as_json else "not enrolled")
        return
    shown: dict[str, object] = {"enrolled": True, "api_base": settings.api_base, "user_id": settings.user_id}
    shown |= _link(config)
    try:
        wanted, found = _reconciled(config, dry=True)
        shown |= {
            "answers": True,
            "compute_cluster": wanted.cluster.id,
            "nodepool": wanted.nodepool.id,
            "models": [f"{model.message.app_id}/{model.message.id}" for model in wanted.models],
            "left_out": dict(wanted.left_out),
            "differences": len(found.steps),
        }
    except CentralError as error:
        shown |= {"answers": False, "problem": str(error)}
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    for name, value in shown.items():
        click.echo(f"{name:<16} {printable(_readable(value))}")


@orchestrator.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def plan(config_file: Path | None, as_json: bool) -> None:
    """Show what `sync` would create, change and delete; change nothing."""
    config = _enrolled(config_file)
    wanted, found = _reconciled(config, dry=True)
    _show(wanted, found, as_json, "nothing differs")


@orchestrator.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_obj
def sync(config_file: Path | None, as_json: bool) -> None:
    """Create, change and delete at the orchestrator until it knows what is here. A second time does nothing."""
    config = _enrolled(config_file)
    wanted, found = _reconciled(config, dry=False)
    _show(wanted, found, as_json, "nothing differed")


@orchestrator.command()
@click.pass_obj
def leave(config_file: Path | None) -> None:
    """Delete at the orchestrator what this appliance created there, nothing else, and forget the PAT."""
    config = _enrolled(config_file)
    settings = config.orchestrator
    if _is_credential(settings.pat_file) and _link(config).get("connected"):
        raise ConfigError(
            f"The agent runs, and would register everything again, as {settings.pat_file} cannot be deleted from here: "
            "set orchestrator.agent = false and `appliance reload` first."
        )

    async def work() -> Registered:
        async with Central(settings, Secrets.read(settings)) as central:
            return await leave_all(central, _created(config), str(settings.user_id))

    with registering(config.catalog.state_dir):
        found = asyncio.run(work())
        _forget(settings.pat_file)  # the agent, if it runs, would register all of it again
    for step in found.steps:
        click.echo(printable(step))
    for line in found.kept:
        click.echo(printable(f"still in use, kept: {line}"), err=True)
    drop_in = (config_file or MAIN_FILE).parent / "conf.d" / DROP_IN
    _forget(drop_in)
    click.echo(f"left {settings.api_base}; deleted {settings.pat_file} and {drop_in}")
    now = configuration.load(config_file).config.orchestrator
    rule = clients.write(None, now) if clients.govern(config_file) else []
    for line in rule:
        click.echo(line)
    click.echo(f"Next: `{_take_over(rule)}`.", err=True)


# ---- enrolment, for `appliance setup` too ----------------------------------------------------------------------------


def settings_of(before: Orchestrator, given: Mapping[str, Any], flag: str = "--") -> Orchestrator:
    """The section as it will be. Raises: ConfigError: it cannot be, or names no orchestrator.

    Args: given: what is to be otherwise than before; None is nothing. flag: how the options for it begin.
    """
    try:
        settings = Orchestrator.model_validate({**before.model_dump(), **_said(given)})
    except ValidationError as error:
        lines = []
        for entry in error.errors():
            option = "".join(f"{flag}{part}: " for part in entry["loc"]).replace("_", "-")
            lines.append(option + configuration.said(entry))
        raise ConfigError("; ".join(lines)) from error
    if settings.api_base is None:
        raise ConfigError(f"Name the central API and the user there: {flag}api-base and {flag}user-id.")
    return settings


def given_pat(file: Path | None) -> str:
    """The PAT of a file, else of stdin. Raises: ConfigError: there is none."""
    return read_pat(file) if file else check_pat(_stdin(), "stdin")


def enrol(config_file: Path | None, given: Mapping[str, Any], pat: str, unit_folder: Path = UNIT_FOLDER) -> list[str]:
    """Check the PAT with the orchestrator; then write it, the section, and who the unit lets through.

    Args:    given: as for `settings_of`.
    Returns: sentences on what was done.
    Raises:  ConfigError: the orchestrator cannot be asked, or does not take the PAT: nothing was written.
    """
    settings = settings_of(configuration.load(config_file).config.orchestrator, given)
    owner = asyncio.run(_whose(settings, pat))
    if owner != settings.user_id:
        raise ConfigError(
            f"That PAT acts for the user {owner!r}, and named was {settings.user_id!r}: name the first, or take a PAT "
            "of the second."
        )
    folder = (config_file or MAIN_FILE).parent / "conf.d"
    kept = {**_dropped_in(folder / DROP_IN), **_said(given)}
    lines = [f"{name} = {configuration.toml(value)}\n" for name, value in kept.items()]
    section = "".join(["# Written by `appliance orchestrator enroll`.\n[orchestrator]\n", *lines])
    try:
        if not _is_credential(settings.pat_file):
            make_folder(settings.pat_file.parent)
            write_atomically(settings.pat_file, f"{pat}\n")
        make_folder(folder)
        write_atomically(folder / DROP_IN, section)
    except OSError as error:
        file = error.filename or folder
        raise file_error(error, f"{file} cannot be written ({error.strerror}); run this as root.") from error
    wrote = f"{folder / DROP_IN}" + ("" if _is_credential(settings.pat_file) else f" and {settings.pat_file}")
    said = [f"enrolled with {settings.api_base} as {owner}; wrote {wrote}"]
    return said + (clients.write(None, settings, unit_folder) if clients.govern(config_file, unit_folder) else [])


def _is_credential(file: Path) -> bool:
    """Whether systemd brings this file, from where its operator keeps it."""
    return file.is_relative_to("/run/credentials")


def _forget(file: Path) -> None:
    if _is_credential(file):
        click.echo(f"{file} is a credential of systemd's: take it out of the unit's drop-in.", err=True)
        return
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise file_error(error, f"{file} cannot be deleted ({error.strerror}); delete it, as root.") from error


# ---- what the verbs share --------------------------------------------------------------------------------------------


def _take_over(rule: list[str]) -> str:
    """The command after a change: a rule for packets counts from the start of the unit on."""
    return "systemctl restart inference-appliance" if rule else "appliance reload"


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was said: files as whole paths, for whoever reads the configuration stands elsewhere."""
    return {
        name: value.absolute() if isinstance(value, Path) else value
        for name, value in given.items()
        if value is not None
    }


def _dropped_in(file: Path) -> dict[str, Any]:
    """What `enroll` wrote before; it has been read as configuration, so it is good."""
    try:
        section: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8")).get("orchestrator", {})
    except FileNotFoundError:
        return {}
    return section


def _stdin() -> str:
    """What is on stdin, without its line end; asked for without an echo where that is a terminal."""
    return getpass.getpass("PAT: ") if sys.stdin.isatty() else sys.stdin.read(4096).strip()


async def _whose(settings: Orchestrator, pat: str) -> str:
    async with Central(settings, Secrets.read(settings, pat)) as central:
        return await central.whose()


def _enrolled(config_file: Path | None) -> Config:
    config = configuration.load(config_file).config
    if config.orchestrator.api_base is None:
        raise ConfigError("This appliance is enrolled nowhere; run `appliance orchestrator enroll`.")
    return config


def _created(config: Config) -> Created:
    settings = config.orchestrator
    return Created(config.catalog.state_dir, str(settings.api_base), str(settings.user_id))


def _reconciled(config: Config, *, dry: bool) -> tuple[Desired, Registered]:
    """What the running daemon wants to be there, and what differs, or differed. Raises: ConfigError."""
    settings = config.orchestrator
    answer = admin.ask(config.admin.socket, "/registration")
    if not answer.get("ok"):
        raise ConfigError(f"{answer.get('message')} (If you enrolled just now: `appliance reload`.)")
    wanted = of_data(answer["desired"])
    if wanted.user_id != settings.user_id:
        raise ConfigError("The daemon runs with another [orchestrator] section than the one here: `appliance reload`.")

    async def work() -> Registered:
        async with Central(settings, Secrets.read(settings)) as central:
            return await reconcile(central, wanted, _created(config), dry=dry)

    with contextlib.nullcontext() if dry else registering(config.catalog.state_dir):
        return wanted, asyncio.run(work())


def _show(wanted: Desired, found: Registered, as_json: bool, nothing: str) -> None:
    if as_json:
        steps = [{"verb": step.verb, "kind": step.kind, "id": step.id, "why": step.why} for step in found.steps]
        click.echo(json.dumps({"steps": steps, "left_out": dict(wanted.left_out), "kept": found.kept}, indent=1))
        return
    for step in found.steps:
        click.echo(printable(step))
    if not found.steps:
        click.echo(nothing)
    for model, why in wanted.left_out.items():
        click.echo(printable(f"not registered: {model} ({why})"), err=True)
    for line in found.kept:
        click.echo(printable(f"still in use, kept: {line}"), err=True)


def _link(config: Config) -> dict[str, object]:
    """What the daemon's agent says of its link."""
    if not config.orchestrator.has_agent:
        return {"agent": False}
    told = admin.ask(config.admin.socket, "/status").get("orchestrator")
    if not told:
        return {"agent": True, "connected": False, "trouble": "the agent does not run; restart the service"}
    found = {"agent": True, "connected": told["connected"], "runners": told["runners"]}
    return found | ({"trouble": told["problem"]} if told["problem"] else {})


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} ({why})" for name, why in value.items()) or "none"
    return str(value)
