"""What systemd says of our units."""

import ipaddress
import shutil
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

SERVICE = "inference-appliance.service"
SOCKET = "inference-appliance.socket"

_PROPERTIES = (
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "ExecMainStatus",
    "NRestarts",
    "UnitFileState",
    "ConditionResult",
    "FragmentPath",
    "DropInPaths",
    "NeedDaemonReload",
    "IPAddressAllow",
    "IPAddressDeny",
    "StatusText",
    "Environment",
)


def systemd_runs() -> bool:
    """Whether systemd is this machine's init. Source: sd_booted(3)."""
    return Path("/run/systemd/system").is_dir() and shutil.which("systemctl") is not None


def show(unit: str) -> dict[str, str]:
    """A unit's properties by name; empty when systemd does not answer."""
    command = ["systemctl", "show", unit, "--property=" + ",".join(_PROPERTIES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def read_anew() -> bool:
    """Have systemd read changed files of units. Returns: whether it has, or does not run and need not."""
    if not systemd_runs():
        return True
    command = ["systemctl", "daemon-reload"]
    return subprocess.run(command, timeout=60, check=False).returncode == 0  # noqa: S603


def only_this_machine(properties: Mapping[str, str], outgoing: Collection[str] = ()) -> bool:
    """Whether every other address is denied by IPAddressDeny= and IPAddressAllow= of a unit.

    Args:
        properties: as `show` gives them: networks with spaces between them.
        outgoing: addresses that are let through for the service's own calls, and are no clients.
    """
    if not _networks(properties.get("IPAddressDeny", "")):
        return False
    own = {ipaddress.ip_network(address) for address in outgoing}
    return all(network.is_loopback or network in own for network in _networks(properties.get("IPAddressAllow", "")))


def lets_all_in(properties: Mapping[str, str]) -> bool:
    """Whether no address is denied."""
    allowed = _networks(properties.get("IPAddressAllow", ""))
    return not _networks(properties.get("IPAddressDeny", "")) or any(network.prefixlen == 0 for network in allowed)


def lets_in(properties: Mapping[str, str], address: str) -> bool:
    """Whether packets from and to this address pass."""
    if lets_all_in(properties):
        return True
    wanted = ipaddress.ip_address(address.partition("%")[0])  # without an interface
    allowed = _networks(properties.get("IPAddressAllow", ""))
    return any(wanted in network for network in allowed if network.version == wanted.version)


def _networks(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    found = []
    for word in text.split():
        try:
            found.append(ipaddress.ip_network(word))
        except ValueError:
            continue  # a word of a later systemd
    return found
