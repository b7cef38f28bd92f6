"""What a configuration means for this machine, found out before anything of it is taken over."""

from pathlib import Path

from appliance.core.config import Config
from appliance.core.machine import space, usable_memory
from appliance.media import fetch


def memory_for_requests(config: Config) -> int:
    """Bytes that requests may hold at once."""
    return config.limits.memory_in_flight or usable_memory() // 4


def check_urls(config: Config) -> None:
    """Raises: CertificateError: the authorities of hosts that inputs are fetched from cannot be read."""
    if config.urls.ca is not None:
        fetch.trust(config.urls.ca)


FULL_BYTES = 1 << 20
"""Free bytes below which a file system is as good as full: a catalog's state has a few kB, a curve some more."""


def space_warning(folder: Path) -> str:
    """A sentence when nothing more can be written where the state is kept, else "". That stops no answers."""
    try:
        found = space(folder)
    except OSError:
        return ""
    if found.free >= FULL_BYTES and found.more_files:
        return ""
    return (
        f"There is no space left at {folder} (catalog.state_dir): models are served, and what is measured or held back "
        "is not kept over a restart; free some space."
    )
