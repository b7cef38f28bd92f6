"""`appliance setup`: from an installed package to one that serves, by questions or by flags."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import click

from appliance.cli import clients, orchestrator, provision
from appliance.cli.provision import Place, Tables, Way
from appliance.core import config as configuration
from appliance.core.config import Config, LoadedConfig, Orchestrator, parse_address
from appliance.core.files import file_error, make_folder
from appliance.pki.files import exists
from appliance.pki.importing import Sources
from appliance.pki.reading import read_passphrase

T = TypeVar("T")

_FILE = click.Path(path_type=Path)
_SERVICE = "inference-appliance"


@click.command()
@click.option("--base-url", help="What clients are told: https://HOST:PORT. Default: this machine's name, port 8443.")
@click.option(
    "--certificates",
    "way",
    type=click.Choice(["own", "csr", "import", "keep"]),
    help="own: a root of your own and a certificate from it, for evaluation and small sites. csr: a key and a request "
    "for your CA. import: what your CA sent, or existing files (--cert …). keep: as they are. Default: keep what is "
    "there, else own.",
)
@click.option("--san", "sans", multiple=True, help="One more name or address in the certificate; repeatable.")
@click.option("--organisation", help="Organisation (O) in the certificate.")
@click.option("--cert", "certificate", type=_FILE, help="With import: the certificate (PEM, DER or PKCS#7).")
@click.option("--chain", type=_FILE, help="With import: intermediate CAs, in any order.")
@click.option("--ca", "trust", type=_FILE, help="With import: root CAs to trust, installed as ca.crt.")
@click.option("--key", type=_FILE, help="With import: its key; default: the one that waits since csr.")
@click.option("--passphrase-file", type=_FILE, help="File whose first line is the key's passphrase.")
@click.option("--device", help='What runs models: "auto", "cpu", "gpu", "gpu:N", "gpu:GPU-…" or "gpu:MIG-…".')
@click.option(
    "--samples/--no-samples",
    default=None,
    help="Whether to serve the bundles that come with the product. Default: yes.",
)
@click.option(
    "--clients",
    "networks",
    multiple=True,
    metavar="CIDR…|any|none",
    help="Networks that may connect, e.g. 10.0.0.0/8,fd00::/8; repeatable. any: everybody; none: this machine alone, "
    "as after the installation. It counts for both directions: hosts of URL inputs must be in it.",
)
@click.option("--principal", default="default", show_default=True, help="Whose the first key (PAT) is.")
@click.option("--pat-file", type=_FILE, help="Write the first key to this new file, 0600, instead of showing it once.")
@click.option("--no-pat", is_flag=True, help="Make no key.")
@click.option(
    "--orchestrator-api-base", metavar="URL", help="Enrol with this central orchestrator: https://HOST[:PORT]."
)
@click.option("--orchestrator-user-id", help="The user there who shall own what is registered.")
@click.option("--orchestrator-pat-file", type=_FILE, help="Read that user's PAT from this file; else from stdin.")
@click.option("--orchestrator-root-ca", type=_FILE, help="PEM file of a private orchestrator's authorities.")
@click.option("--orchestrator-proxy", help='HTTP proxy on the way there: "http://host:port".')
@click.option("--force", is_flag=True, help="Replace certificates that are there.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: what no flag says has its default.")
@click.option(
    "--unit-folder",
    type=_FILE,
    default=clients.UNIT_FOLDER,
    show_default=True,
    help="Where units' drop-ins are written.",
)
@click.option(
    "--samples-from", type=_FILE, default=provision.SHIPPED, show_default=True, help="Where the shipped bundles are."
)
@click.pass_obj
def setup(config_file: Path | None, /, **given: Any) -> None:
    """Provision this appliance: certificates, base URL, first key, device, bundles, who may connect, orchestrator.

    Asks for what no flag says when it runs in a terminal. It can be run again at any time: what is there is kept, what
    is given is changed. Secrets are read from files and shown once; none is ever an argument.

    Everything goes into conf.d/10-setup.toml beside the configuration, the folders of certificates and keys, and, with
    --clients or an orchestrator, drop-ins of the units. With --config FILE elsewhere, all files of that appliance lie
    beside FILE, and no privileges are needed.
    """
    place = provision.place_of(config_file)
    loaded = provision.load(place)
    answers = _Answers(given, ask=not given["yes"] and sys.stdin.isatty())
    allowed = answers.networks()
    base_url = answers.base_url(loaded)
    way = answers.way(loaded.config)
    sources = answers.sources() if way == "import" else None
    wanted: Tables = provision.own_folders(place, loaded)
    wanted.setdefault("server", {})["base_url"] = base_url
    if device := answers.device(loaded.config):
        wanted.setdefault("engine", {})["device"] = device
    samples = answers.samples(given["samples_from"])
    enrolment = answers.enrolment(loaded.config.orchestrator)

    # From here on things are written, those first that are refused most easily.
    loaded, changed = provision.configure(place, wanted)
    config = loaded.config
    _say([f"{'wrote' if changed else 'kept'} {place.file}"])
    _say([f"note: {sentence}" for sentence in provision.overridden(loaded, wanted, place)])
    _make_folders(config)
    _say(_certificates(way, config, given, sources))
    _let_in(allowed, config, place, given["unit_folder"])
    if samples:
        _say(provision.add_shipped(config, given["samples_from"]))
    if not given["no_pat"]:
        _first_key(config, given["principal"], given["pat_file"])
    if enrolment is not None:
        _say(orchestrator.enrol(place.named, *enrolment, given["unit_folder"]))
    _say_next(place, config, way, given["unit_folder"], by_hand=enrolment is not None and not config.orchestrator.agent)


class _Answers:
    """What flags say; what they do not is asked for in a terminal, and has its default elsewhere."""

    def __init__(self, given: dict[str, Any], *, ask: bool) -> None:
        self._given = given
        self._ask = ask

    def _answer(self, name: str, question: Callable[[], T], default: T) -> T:
        if self._given[name] is not None:
            return cast("T", self._given[name])
        return question() if self._ask else default

    def base_url(self, loaded: LoadedConfig) -> str:
        """What clients are told."""
        configured = loaded.origins.get("server.base_url", configuration.BUILT_IN) != configuration.BUILT_IN
        port = parse_address(loaded.config.server.listen)[1]
        default = loaded.config.server.base_url if configured else f"https://{provision.default_host()}:{port or 8443}"
        return self._answer("base_url", lambda: click.prompt("URL that clients use", default=default), default)

    def way(self, config: Config) -> Way:
        """How the certificate is come by."""
        there = exists(config.tls.certificate)
        given = self._given["certificate"] is not None
        default = "import" if given else "keep" if there and not self._given["force"] else "own"
        if default == "keep" and self._given["base_url"] is not None:
            default = "own" if exists(config.tls.certificate.with_name("ca.key")) else "keep"
        ways = click.Choice(["own", "csr", "import", "keep"] if there else ["own", "csr", "import"])
        if not there and not given and exists(config.tls.certificate.with_name("server.csr")):
            default = "csr"  # the key waits for what the CA sends
        explained = "Certificate: own root, csr for your CA, import what your CA sent"
        way = self._answer("way", lambda: click.prompt(explained, type=ways, default=default), default)
        if self._given["certificate"] is not None and way != "import":
            raise click.UsageError("--cert needs --certificates import.")
        return cast("Way", way)

    def sources(self) -> Sources:
        """The files to import."""
        certificate = self._answer("certificate", lambda: click.prompt("Certificate file", type=_FILE), None)
        if certificate is None:
            raise click.UsageError("--certificates import needs --cert FILE (and --chain, --ca, --key as they apply).")
        passphrase = read_passphrase(self._given["passphrase_file"]) if self._given["passphrase_file"] else None
        chain = self._answer("chain", lambda: _optional_file("Intermediates"), None)
        trust = self._answer("trust", lambda: _optional_file("Root CAs"), None)
        key = self._answer("key", lambda: _optional_file("Private key"), None)
        return Sources(certificate, chain, trust, key, passphrase)

    def device(self, config: Config) -> str | None:
        """What runs models; None: as configured."""
        default = config.engine.device
        return self._answer("device", lambda: click.prompt("Device (auto, cpu, gpu)", default=default), None)

    def samples(self, folder: Path) -> bool:
        """Whether to serve the shipped bundles."""
        there = folder.is_dir()
        question = "Serve the sample bundles that come with the product?"
        return self._answer("samples", lambda: there and click.confirm(question, default=True), there)

    def networks(self) -> tuple[str, ...] | None:
        """Who may connect; None: as it is."""
        values = self._given["networks"]
        if not values and self._ask and self._given["unit_folder"].is_dir():
            question = "Networks of clients (e.g. 10.0.0.0/8, or any; empty: this machine only, or as before)"
            values = (click.prompt(question, default="", show_default=False),)
        return clients.networks(values) if any(values) else None

    def enrolment(self, before: Orchestrator) -> tuple[dict[str, Any], str] | None:
        """What is said of an orchestrator, and the PAT; None: it is as it is."""
        given = {name: self._given[f"orchestrator_{name}"] for name in ("api_base", "user_id", "root_ca", "proxy")}
        pat_file = self._given["orchestrator_pat_file"]
        if pat_file is None and not any(given.values()):
            if not self._ask or before.api_base is not None:
                return None
            question = "Central orchestrator to enrol with, https://HOST (empty: none)"
            given["api_base"] = click.prompt(question, default="", show_default=False) or None
            if given["api_base"] is None:
                return None
            given["user_id"] = click.prompt("User there")
            given["root_ca"] = _optional_file("A private orchestrator's authorities")
        orchestrator.settings_of(before, given, "--orchestrator-")  # before anybody is asked for a PAT
        return given, orchestrator.given_pat(pat_file)


def _optional_file(what: str) -> Path | None:
    text = click.prompt(f"{what} file (empty: none)", default="", show_default=False)
    return Path(text) if text else None


def _make_folders(config: Config) -> None:
    for folder in (config.catalog.root, config.catalog.state_dir):
        try:
            make_folder(folder)
        except OSError as error:
            raise file_error(error, f"{folder} cannot be made: {error.strerror}; run the command with sudo.") from error


def _certificates(way: Way, config: Config, given: dict[str, Any], sources: Sources | None) -> list[str]:
    """Come by the certificate in the way that is wanted. Returns: sentences."""
    if way == "keep":
        return [f"kept {config.tls.certificate}"]
    layout = provision.layout_of(config)
    names = provision.server_names(config.server.base_url, given["sans"])
    if way == "own":
        return provision.own_certificates(layout, names, given["organisation"], force=given["force"])
    if way == "csr":
        return provision.certificate_request(layout, names, given["organisation"], force=given["force"])
    assert sources is not None
    return provision.import_certificates(layout, sources, force=given["force"])


def _let_in(allowed: tuple[str, ...] | None, config: Config, place: Place, folder: Path) -> None:
    """Write who may connect; None: as it is, with the addresses that name servers and orchestrator have now."""
    if allowed is None and not clients.govern(place.named, folder):
        return
    said = clients.write(allowed, config.orchestrator, folder)
    _say(said or ([f"kept {clients.DROP_IN} of service and socket"] if allowed is not None else []))


def _first_key(config: Config, principal: str, file: Path | None) -> None:
    key = provision.first_key(config, principal, file)
    if key is None:
        _say([f"kept the keys in {config.auth.keys_file}; one more: appliance keys create"])
    elif file is not None:
        _say([f"wrote {file}, the first key (PAT)"])
    else:
        _say([f"key {key}"])
        click.echo("That is the first key (PAT), and it is not shown again. SDKs take it as CLARIFAI_PAT.", err=True)


def _say_next(place: Place, config: Config, way: Way, unit_folder: Path, *, by_hand: bool) -> None:
    flag = f" --config {place.main}" if place.named else ""
    lines = []
    if way == "csr":
        lines.append(f"# send {config.tls.certificate.with_name('server.csr')} to your CA; with what comes back:")
        lines.append(f"appliance{flag} setup --certificates import --cert FILE --chain FILE --ca FILE")
    if place.named:
        lines.append(f"appliance{flag} serve")
    elif _is_active():
        lines.append(f"systemctl restart {_SERVICE}")
    else:
        lines.append(f"systemctl enable --now {_SERVICE}")
    if by_hand:  # what the agent does by itself
        lines += [f"appliance{flag} orchestrator plan", f"appliance{flag} orchestrator sync"]
    lines.append(f"appliance{flag} doctor")
    click.echo("\nNext:")
    _say([f"  {line}" for line in lines])
    address = urlsplit(config.server.base_url)
    click.echo(f"\nClients call {config.server.base_url} and trust {config.tls.client_ca}.")
    if not place.named and not clients.standing(unit_folder):
        click.echo("Only programs on this machine may connect, until: appliance setup --clients 10.0.0.0/8 (or any)")
    if (address.port or 443) == 443 and not place.named:
        click.echo(f"Port 443 needs the socket unit: systemctl enable {_SERVICE}.socket (see inference-appliance(8))")


def _is_active() -> bool:
    systemctl = shutil.which("systemctl")
    if systemctl is None or not Path("/run/systemd/system").is_dir():
        return False
    return subprocess.run([systemctl, "--quiet", "is-active", f"{_SERVICE}.service"], check=False).returncode == 0  # noqa: S603


def _say(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)
