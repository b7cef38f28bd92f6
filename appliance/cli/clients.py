"""Who may connect: the networks that systemd lets through to the service and to its socket unit.

The unit denies every address but this machine's own. A drop-in for both units names more; it is one rule for both
directions, so that what the service itself asks (a resolver, hosts of URL inputs) stands in it too.
"""

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from pathlib import Path

from appliance.core.errors import ConfigError
from appliance.core.files import file_error, write_atomically
from appliance.daemon.sockets import RULE_VARIABLE

UNIT_FOLDER = Path("/etc/systemd/system")
DROP_IN = "20-clients.conf"
ANY = "any"
NONE = "none"
_SECTIONS = {"inference-appliance.service": "Service", "inference-appliance.socket": "Socket"}
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


def text(unit: str, allowed: Sequence[str], name_servers: Sequence[str]) -> str:
    """The drop-in of one unit.

    The service is told which rule it is (daemon/sockets), so that a restart leaves sockets of another rule behind.
    """
    lines = [
        "# Written by `appliance setup --clients`; run it again to change it. It counts in both directions.",
        f"[{_SECTIONS[unit]}]",
        *(f"IPAddressAllow={network}" for network in allowed),
    ]
    if name_servers and ANY not in allowed and unit.endswith(".service"):
        lines += ["# name servers of this machine", *(f"IPAddressAllow={address}" for address in name_servers)]
    if unit.endswith(".service"):
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
        lines += ["# so that a restart gives up listening sockets that were opened under another rule"]
        lines += [f"Environment={RULE_VARIABLE}={digest}"]
    return "\n".join(lines) + "\n"


def write(allowed: Sequence[str], folder: Path = UNIT_FOLDER) -> list[Path]:
    """Write the drop-ins of both units, each as a whole; remove them when nobody is allowed. Returns: what changed.

    Raises: ConfigError: they cannot be written.
    """
    changed = []
    for unit in _SECTIONS:
        path = folder / f"{unit}.d" / DROP_IN
        content = text(unit, allowed, resolvers()) if allowed else None
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
        changed.append(path)
    return changed
