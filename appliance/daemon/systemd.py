"""What systemd is told: ready, reloading, stopping, a status line, and that we are alive."""

import logging
import os
import time
from collections.abc import Callable

from appliance.core.errors import ConfigError

_log = logging.getLogger(__name__)


class Notifier:
    """sd_notify when systemd asked for it (`NOTIFY_SOCKET`), else nothing. Source: sd_notify(3)."""

    def __init__(self) -> None:
        """Raises: ConfigError: systemd waits for word from us, and the library that sends it is not installed."""
        self._send: Callable[[str], object] | None = None
        watchdog = os.environ.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(watchdog) / 1e6 if watchdog.isdigit() else None
        """Seconds within which `alive` must be called, None when nobody watches."""
        if "NOTIFY_SOCKET" in os.environ:
            try:
                from systemd.daemon import notify  # optional dependency: the `systemd` extra
            except ImportError as error:
                raise ConfigError(
                    "systemd waits for a notification, and systemd-python is not installed; install the extra "
                    "`systemd`, or set Type=exec in the unit."
                ) from error
            self._send = notify

    def ready(self, text: str) -> None:
        """We serve."""
        self._notify(f"READY=1\nSTATUS={text}")

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=reloading")

    def stopping(self) -> None:
        """We are going."""
        self._notify("STOPPING=1\nSTATUS=draining")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._notify(f"STATUS={text}")

    def alive(self) -> None:
        """The event loop turns."""
        self._notify("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Start or stop will take that much longer."""
        self._notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _notify(self, text: str) -> None:
        if self._send is None:
            return
        try:
            self._send(text)
        except OSError as error:
            # Whoever listened is gone; that is no reason to stop serving, or not to finish stopping.
            _log.warning("systemd could not be notified: %s", error)
