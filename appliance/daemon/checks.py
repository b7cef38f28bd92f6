"""What a configuration means for this machine, found out before anything of it is taken over."""

from appliance.core.config import Config
from appliance.core.machine import usable_memory
from appliance.media import fetch


def memory_for_requests(config: Config) -> int:
    """Bytes that requests may hold at once."""
    return config.limits.memory_in_flight or usable_memory() // 4


def check_urls(config: Config) -> None:
    """Raises: CertificateError: the authorities of hosts that inputs are fetched from cannot be read."""
    if config.urls.ca is not None:
        fetch.trust(config.urls.ca)
