"""`appliance certs`: make, renew, revoke, look at, request and take over certificates."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import click
from cryptography import x509
from rich.console import Console
from rich.table import Table
from rich.text import Text

from appliance.pki.files import DEFAULT_DIR, Layout, exists, require_absent
from appliance.pki.importing import Sources, install
from appliance.pki.inspect import days_left
from appliance.pki.keys import KEY_ALGORITHMS, KeyAlgorithm
from appliance.pki.leaf import Subject, issue, renew, request, write_leaf
from appliance.pki.names import client_sans, server_common_name, server_sans
from appliance.pki.profiles import DEFAULTS, MAX_DAYS, Kind, Profile, Role, load_profile
from appliance.pki.reading import read_passphrase
from appliance.pki.report import (
    ListReport,
    Report,
    inspect_directory,
    inspect_files,
    inspect_lists,
    is_list_file,
)
from appliance.pki.revocation import DEFAULT_DAYS, REASONS, RevocationList, parse_serial, renew_list, serial_of
from appliance.pki.root import create_root, load_root, write_root

ROOT_NAME = "Inference Appliance Root CA"

_FILE = click.Path(path_type=Path)
_directory = click.option(
    "--dir", "directory", type=_FILE, default=DEFAULT_DIR, show_default=True, help="Where certificates and keys lie."
)
_force = click.option("--force", is_flag=True, help="Replace files that exist.")
_profile = click.option("--profile", "profile_file", type=_FILE, help="A profile to use in place of the built-in one.")
_days = click.option("--days", type=click.IntRange(1, MAX_DAYS), help="Days of validity; default: the profile's.")
_list_days = click.option(
    "--days",
    type=click.IntRange(1, MAX_DAYS),
    default=DEFAULT_DAYS,
    show_default=True,
    help="Days until the list must be signed anew.",
)
_key_type = click.option("--key-type", type=click.Choice(KEY_ALGORITHMS), help="Kind of key; default: the profile's.")
_organisation = click.option("--organisation", help="Organisation (O) in the subject.")
_passphrase = click.option("--passphrase-file", type=_FILE, help="File whose first line is the key's passphrase.")
_server_san = click.option("--san", "sans", multiple=True, help="Host name, *.domain or IP address; repeatable.")
_client_san = click.option("--san", "sans", multiple=True, help="uri:…, dns:… or email:…; repeatable.")
_cn = click.option("--cn", help="Common name; default: NAME.")


@click.group()
def certs() -> None:
    """Make, renew, revoke, inspect, request and import certificates."""


@certs.command()
@_directory
@click.option("--name", default=ROOT_NAME, show_default=True, help="Common name of the root.")
@_organisation
@_days
@_key_type
@_profile
@_force
def init(
    directory: Path,
    name: str,
    organisation: str | None,
    days: int | None,
    key_type: str | None,
    profile_file: Path | None,
    force: bool,
) -> None:
    """Make the root CA of a site that has none: ca.crt and ca.key."""
    layout = Layout(directory)
    if not force:
        require_absent([layout.ca_key, layout.ca_certificate])
    root = create_root(name, organisation, _now(), _chosen_profile("root", profile_file, days, key_type))
    write_root(layout, root, replace=force)
    _say_written(root.certificate, layout.ca_certificate, layout.ca_key)
    click.echo(
        f"Clients must trust {layout.ca_certificate}. Keep {layout.ca_key} secret; better, move it off this machine."
    )
    if force:
        click.echo("Certificates issued by an earlier root are no longer trusted with this one; issue them anew.")


@certs.group(name="issue")
def issue_group() -> None:
    """Issue a certificate from our root."""


@issue_group.command(name="server")
@_server_san
@_organisation
@_days
@_key_type
@_profile
@_directory
@_force
def issue_server(
    sans: tuple[str, ...],
    organisation: str | None,
    days: int | None,
    key_type: str | None,
    profile_file: Path | None,
    directory: Path,
    force: bool,
) -> None:
    """Issue the server's certificate: server.crt and server.key. The first --san is the common name."""
    subject = _server_subject(sans, organisation)
    _issue(Layout(directory), "server", None, subject, _chosen_profile("server", profile_file, days, key_type), force)


@issue_group.command(name="client")
@click.argument("name")
@_client_san
@_cn
@_organisation
@_days
@_key_type
@_profile
@_directory
@_force
def issue_client(
    name: str,
    sans: tuple[str, ...],
    cn: str | None,
    organisation: str | None,
    days: int | None,
    key_type: str | None,
    profile_file: Path | None,
    directory: Path,
    force: bool,
) -> None:
    """Issue a client's certificate: clients/NAME.crt and clients/NAME.key."""
    subject = Subject(cn or name, client_sans(sans), organisation)
    _issue(Layout(directory), "client", name, subject, _chosen_profile("client", profile_file, days, key_type), force)


@certs.command(name="renew")
@click.argument("target", metavar="FILE|server|client")
@click.argument("name", required=False)
@click.option("--keep-key", is_flag=True, help="Certify the present key again, in place of making a new one.")
@click.option("--days", type=click.IntRange(1, MAX_DAYS), help="Days of validity; default: as long as the old one.")
@_directory
def renew_command(target: str, name: str | None, keep_key: bool, days: int | None, directory: Path) -> None:
    """Replace a certificate by one with the same names and a later end.

    \b
    appliance certs renew server
    appliance certs renew client NAME
    appliance certs renew /path/to/NAME.crt
    """
    layout = Layout(directory)
    if target in ("server", "client"):
        _require_name(target, name)
        path = layout.certificate(cast("Role", target), name)
    elif name is not None:
        raise click.UsageError(f"Unexpected argument {name!r} after a file.")
    else:
        path = Path(target)
    renewed = renew(layout, path, _now(), keep_key=keep_key, days=days)
    _say_written(renewed.certificate, path, *([] if keep_key else [path.with_suffix(".key")]))


@certs.command()
@click.argument("name", required=False)
@click.option("--serial", help="Serial number in hex, in place of NAME: for certificates that are not here any more.")
@click.option("--reason", type=click.Choice(list(REASONS)), default="unspecified", show_default=True, help="Why.")
@_list_days
@_directory
def revoke(name: str | None, serial: str | None, reason: str, days: int, directory: Path) -> None:
    """Take back a client's certificate: clients/NAME.crt as it is now, or the one with that serial number.

    A certificate that was renewed has another serial number than those before it, and each counts by itself.
    """
    if (name is None) == (serial is None):
        raise click.UsageError("Say which certificate: NAME, or --serial HEX.")
    layout, now = Layout(directory), _now()
    number = parse_serial(serial) if serial is not None else serial_of(layout, name or "", now)
    signed = renew_list(layout, now, days, (number, REASONS[reason]))
    click.echo(f"Serial number {number:x} was revoked {signed.entry(number)}.")
    _say_list(layout, signed)


@certs.command()
@_list_days
@_directory
def crl(days: int, directory: Path) -> None:
    """Sign the revocation list anew, with a later end: crl.pem. Makes an empty one where there is none."""
    layout = Layout(directory)
    _say_list(layout, renew_list(layout, _now(), days))


@certs.command(name="inspect")
@click.argument("files", nargs=-1, type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_passphrase
@_directory
@click.pass_context
def inspect_command(
    context: click.Context, files: tuple[Path, ...], as_json: bool, passphrase_file: Path | None, directory: Path
) -> None:
    """Show certificates, revocation lists, and what is wrong with them; exit code 1 if anything is.

    Without FILES, all those of the directory.
    """
    layout, now = Layout(directory), _now()
    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    list_files = [path for path in files if is_list_file(path)]
    if files:
        reports = inspect_files(layout, [path for path in files if path not in list_files], passphrase, now)
    else:
        reports = inspect_directory(layout, passphrase, now)
        list_files = [layout.crl] if exists(layout.crl) else []
    lists = inspect_lists(layout, list_files, now)
    if as_json:
        told = {
            "certificates": [dataclasses.asdict(report) for report in reports],
            "revocation_lists": [dataclasses.asdict(report) for report in lists],
        }
        click.echo(json.dumps(told, indent=2))
    else:
        console = Console(soft_wrap=False, highlight=False)
        for table in (*map(_table, reports), *map(_list_table, lists)):
            console.print(table)
    if any(report.problems for report in reports) or any(report.problems for report in lists):
        context.exit(1)


@certs.group(name="csr")
def csr_group() -> None:
    """Make a key and a certificate request for the enterprise's CA."""


@csr_group.command(name="server")
@_server_san
@_organisation
@_key_type
@_profile
@_directory
@_force
def csr_server(
    sans: tuple[str, ...],
    organisation: str | None,
    key_type: str | None,
    profile_file: Path | None,
    directory: Path,
    force: bool,
) -> None:
    """Request the server's certificate: server.csr, with the key waiting in server.key.pending."""
    subject = _server_subject(sans, organisation)
    _request(Layout(directory), "server", None, subject, _chosen_profile("server", profile_file, None, key_type), force)


@csr_group.command(name="client")
@click.argument("name")
@_client_san
@_cn
@_organisation
@_key_type
@_profile
@_directory
@_force
def csr_client(
    name: str,
    sans: tuple[str, ...],
    cn: str | None,
    organisation: str | None,
    key_type: str | None,
    profile_file: Path | None,
    directory: Path,
    force: bool,
) -> None:
    """Request a client's certificate: clients/NAME.csr, with the key waiting in clients/NAME.key.pending."""
    subject = Subject(cn or name, client_sans(sans), organisation)
    _request(Layout(directory), "client", name, subject, _chosen_profile("client", profile_file, None, key_type), force)


@certs.command(name="import")
@click.option("--cert", "certificate", type=_FILE, required=True, help="The certificate (PEM, DER or PKCS#7).")
@click.option("--chain", type=_FILE, help="Intermediate CAs, in any order.")
@click.option("--ca", "trust", type=_FILE, help="Root CAs to trust; installed as ca.crt. Default: the present ca.crt.")
@click.option("--key", type=_FILE, help="The key; default: the one that waits since `certs csr`.")
@_passphrase
@click.option(
    "--keep-encrypted", is_flag=True, help="Install the key encrypted; the service then needs the passphrase."
)
@click.option("--role", type=click.Choice(["server", "client"]), default="server", show_default=True)
@click.option("--name", help="Name of the client, with --role client.")
@_directory
@_force
def import_command(
    certificate: Path,
    chain: Path | None,
    trust: Path | None,
    key: Path | None,
    passphrase_file: Path | None,
    keep_encrypted: bool,
    role: str,
    name: str | None,
    directory: Path,
    force: bool,
) -> None:
    """Check and install a certificate that another CA issued; nothing is written unless everything is right."""
    _require_name(role, name)
    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    if keep_encrypted and passphrase is None:
        raise click.UsageError("--keep-encrypted needs --passphrase-file.")
    sources = Sources(certificate, chain, trust, key, passphrase)
    layout = Layout(directory)
    done = install(layout, cast("Role", role), name, sources, _now(), keep_encrypted=keep_encrypted, replace=force)
    for path in done.paths:
        click.echo(f"wrote {path}")
    click.echo(
        f"Valid until {done.leaf.not_valid_after_utc:%Y-%m-%d}, {days_left(done.leaf, _now()):.0f} days from now."
    )
    for note in done.notes:
        click.echo(f"note: {note}")


def _now() -> datetime:
    return datetime.now(UTC)


def _chosen_profile(kind: Kind, file: Path | None, days: int | None, key_type: str | None) -> Profile:
    profile = load_profile(file, kind) if file else DEFAULTS[kind]
    if days is not None:
        profile = dataclasses.replace(profile, days=days)
    if key_type is not None:
        profile = dataclasses.replace(profile, key=cast("KeyAlgorithm", key_type))
    return profile


def _server_subject(sans: tuple[str, ...], organisation: str | None) -> Subject:
    names = server_sans(sans)
    return Subject(server_common_name(names), names, organisation)


def _issue(layout: Layout, role: Role, name: str | None, subject: Subject, profile: Profile, force: bool) -> None:
    if not force:
        require_absent([layout.certificate(role, name), layout.key(role, name)])
    now = _now()
    leaf = issue(load_root(layout, now), subject, profile, now)
    _say_written(leaf.certificate, *write_leaf(layout, role, name, leaf, replace=force))


def _request(layout: Layout, role: Role, name: str | None, subject: Subject, profile: Profile, force: bool) -> None:
    path = request(layout, role, name, subject, profile, replace=force)
    client = "" if role == "server" else f" --role client --name {name}"
    click.echo(f"wrote {path}")
    click.echo(f"wrote {layout.pending_key(role, name)}")
    click.echo(f"Send {path} to the CA. Then: appliance certs import{client} --cert FILE --chain FILE --ca FILE")


def _require_name(role: str, name: str | None) -> None:
    if role == "client" and name is None:
        raise click.UsageError("Say which client: its NAME is missing.")
    if role == "server" and name is not None:
        raise click.UsageError(f"Unexpected name {name!r}: there is one server.")


def _say_written(certificate: x509.Certificate, *paths: Path) -> None:
    for path in paths:
        click.echo(f"wrote {path}")
    click.echo(
        f"Valid until {certificate.not_valid_after_utc:%Y-%m-%d}, {days_left(certificate, _now()):.0f} days from now."
    )


def _say_list(layout: Layout, signed: RevocationList) -> None:
    click.echo(f"wrote {layout.crl}")
    click.echo(
        f"Revoked certificates in it: {len(signed.serials)}. Before {signed.next_update:%Y-%m-%d} sign it anew: "
        "appliance certs crl"
    )
    click.echo(f'The service looks at it when tls.crl = "{layout.crl}" is configured, and then at every change.')


def _table(report: Report) -> Table:
    """Return a report as a table of two columns."""
    state = "expired" if report.days_left < 0 else f"{report.days_left:.0f} days left"
    rows = {
        "kind": report.kind,
        "subject": report.subject,
        "issuer": report.issuer,
        "serial": report.serial,
        "sha256": report.sha256,
        "valid": f"{report.not_before} to {report.not_after} ({state})",
        "key type": report.key_type,
        "keyUsage": _listed(report.key_usage),
        "extendedKeyUsage": _listed(report.extended_key_usage),
        "names": ", ".join(report.names) or "none",
        "followed by": "; ".join(report.followed_by) or "nothing",
        "chain": report.chain,
        "key": report.key,
    }
    return _two_columns(report.path, rows, report.problems)


def _list_table(report: ListReport) -> Table:
    """Return a report on a revocation list as a table of two columns."""
    if not report.issuer:
        return _two_columns(report.path, {"kind": "revocation list"}, report.problems)
    state = "out of date" if report.days_left < 0 else f"{report.days_left:.0f} days left"
    rows = {
        "kind": "revocation list",
        "issuer": report.issuer,
        "number": "none" if report.number is None else str(report.number),
        "valid": f"{report.this_update} to {report.next_update} ({state})",
        "revoked": str(report.revoked),
    }
    return _two_columns(report.path, rows, report.problems)


def _two_columns(path: str, rows: dict[str, str], problems: list[str]) -> Table:
    table = Table(title=_clean(path, "bold"), title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows.items():
        table.add_row(label, _clean(value))
    for problem in problems:
        table.add_row("problem", _clean(problem, "red"))
    return table


def _listed(values: list[str] | None) -> str:
    return "absent" if values is None else ", ".join(values) or "empty"


def _clean(value: str, style: str = "") -> Text:
    """Return text for the terminal; a certificate's names are a stranger's, and may hold control characters."""
    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in value), style=style)
