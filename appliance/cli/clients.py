"""Who may connect: the networks that systemd lets through to the service and to its socket unit.

The unit denies every address but this machine's own. A drop-in for both units names more; it is one rule for both
directions, so that whom the service itself asks (a resolver, the orchestrator, hosts of URL inputs) stands in it too.
"""

import hashlib
import ipaddress
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from appliance.cli import units
from appliance.core.config import MAIN_FILE, Orchestrator
from appliance.core.errors import ConfigError
from appliance.core.files import file_error, write_atomically
from appliance.daemon.sockets import RULE_VARIABLE
from appliance.orchestrator import reach

UNIT_FOLDER = Path("/etc/systemd/system")
DROP_IN = "20-clients.conf"
ANY = "any"
NONE = "none"
_SECTIONS = {units.SERVICE: "Service", units.SOCKET: "Socket"}
_RESOLVERS = Path("/etc/resolv.conf")


def networks(values: Iterable[str]) -> tuple[str, ...]:
    """What `--clients` names, each as systemd writes it: "any", or networks without host bits, in their order.

    Args:   values: each one network or several, with commas between them; "none" is nobody but this machine.
    Raises: ConfigError: one is neither an address nor a network; "any" or "none" beside others.
    """
    parts = [part.strip() for value in values for part in value.split(",") if part.strip()]
    for word in (ANY, NONE):
        if word in parts and len(set(parts)) > 1:
            raise ConfigError(f"--clients {word} stands alone; leave the others out, or it.")
    if parts and parts[0] in (ANY, NONE):
        return (ANY,) if parts[0] == ANY else ()
    found = []
    for part in parts:
        try:
            found.append(str(ipaddress.ip_network(part, strict=False)))
        except ValueError:
            raise ConfigError(
                f"--clients {part!r} is no network; write e.g. 10.0.0.0/8, 192.168.7.20, fd00::/64, or any."
            ) from None
    return tuple(dict.fromkeys(found))


def resolvers(file: Path = _RESOLVERS) -> tuple[str, ...]:
    """The name servers of this machine that are not on it: the service asks them for names in the configuration."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    found = []
    for words in map(str.split, lines):
        if len(words) >= 2 and words[0] == "nameserver":
            try:
                address = ipaddress.ip_address(words[1].partition("%")[0])
            except ValueError:
                continue
            if not address.is_loopback:
                found.append(str(address))
    return tuple(dict.fromkeys(found))


def text(unit: str, allowed: Sequence[str], outgoing: Mapping[str, Sequence[str]]) -> str:
    """The drop-in of one unit.

    The service is told which rule it is (daemon/sockets), so that a restart leaves sockets of another rule behind.

    Args: outgoing: addresses that the service itself connects to, by what they are.
    """
    lines = [
        "# Written by `appliance setup --clients`; run it again to change it. It counts in both directions.",
        f"[{_SECTIONS[unit]}]",
        *(f"IPAddressAllow={network}" for network in allowed),
    ]
    if unit.endswith(".socket"):
        return "\n".join(lines) + "\n"
    if ANY not in allowed:
        for what, addresses in outgoing.items():
            if addresses:
                lines += [f"# {what}", *(f"IPAddressAllow={address}" for address in addresses)]
    if allowed:
        digest = hashlib.sha256("\n".join(allowed).encode()).hexdigest()[:12]
        lines += ["# so that a restart gives up listening sockets that were opened under another rule"]
        lines += [f"Environment={RULE_VARIABLE}={digest}"]
    return "\n".join(lines) + "\n"


def standing(folder: Path = UNIT_FOLDER) -> tuple[str, ...]:
    """The networks that clients are let in from now. Raises: ConfigError: the drop-in cannot be read."""
    path = folder / f"{units.SERVICE}.d" / DROP_IN
    try:
        _, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise file_error(error, f"{path} cannot be read: {error.strerror}; run the command with sudo.") from error
    named = itertools.takewhile(lambda line: not line.startswith("#"), lines)
    return tuple(line.removeprefix("IPAddressAllow=") for line in named if line.startswith("IPAddressAllow="))


def govern(config_file: Path | None, folder: Path = UNIT_FOLDER) -> bool:
    """Whether the units are those of this configuration: the machine's own, under systemd; or in a folder by choice."""
    return folder != UNIT_FOLDER or (config_file in (None, MAIN_FILE) and units.systemd_runs())


def write(allowed: Sequence[str] | None, orchestrator: Orchestrator, folder: Path = UNIT_FOLDER) -> list[str]:
    """Write the drop-ins of both units, each as a whole, and have systemd read them; remove those that let nobody in.

    Args:    allowed: networks of clients; None: those that are let in now.
             orchestrator: whom the service connects to by itself.
    Returns: sentences on what was done, none when everything is so already.
    Raises:  ConfigError: they cannot be written.
    """
    said = []
    try:
        central = reach.all_addresses(orchestrator)
    except OSError as error:
        said = [f"note: the orchestrator is not let through, as it cannot be looked up: {error.strerror}"]
        if allowed is None:
            return said
        central = ()
    allowed = standing(folder) if allowed is None else allowed
    outgoing = {"name servers of this machine": resolvers(), "the orchestrator, or the proxy on the way": central}
    changed = False
    for unit in _SECTIONS:
        path = folder / f"{unit}.d" / DROP_IN
        wanted = allowed or (central and unit == units.SERVICE)
        content = text(unit, allowed, outgoing) if wanted else None
        try:
            if content == (path.read_text(encoding="utf-8") if path.is_file() else None):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.unlink()
            else:
                write_atomically(path, content, 0o644)
        except OSError as error:
            sentence = f"{path} cannot be written: {error.strerror}; run the command with sudo, or leave --clients out."
            raise file_error(error, sentence) from error
        changed = True
        said.append(f"{'wrote' if content else 'removed'} {path}")
    if changed and folder == UNIT_FOLDER and not units.read_anew():
        said.append("note: systemd could not be told; run: systemctl daemon-reload")
    return said
