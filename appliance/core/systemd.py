"""What systemd is told: ready, reloading, stopping, a status line, that we are alive, and what it shall keep for us."""

import logging
import os
import select
import socket
import time
from collections.abc import Callable

from appliance.core.errors import ConfigError

_log = logging.getLogger(__name__)


class Notifier:
    """sd_notify when systemd asked for it (`NOTIFY_SOCKET`), else nothing. Source: sd_notify(3)."""

    def __init__(self) -> None:
        """Raises: ConfigError: systemd waits for word from us, and the library that sends it is not installed."""
        self._send: Callable[..., object] | None = None
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

    def status(self, text: str) -> None:
        """What we are at, for `systemctl status`."""
        self._notify(f"STATUS={text}")

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=reloading")

    def stopping(self) -> None:
        """We are going."""
        self._notify("STOPPING=1\nSTATUS=draining")

    def alive(self) -> None:
        """The event loop turns."""
        self._notify("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Start or stop will take that much longer."""
        self._notify(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def store(self, name: str, sock: socket.socket) -> None:
        """Keep a listening socket open for us until we are started again; it comes back as `name`.

        It stays open, and clients wait in its queue, from our end to our next start. systemd forgets it when the
        service is stopped and not restarted, and does not take it unless the unit sets FileDescriptorStoreMax=.

        Args: name: ASCII without ":" and control characters; several sockets may share it.
        """
        self._notify(f"FDSTORE=1\nFDNAME={name}", [sock.fileno()])

    def forget(self, name: str) -> None:
        """Keep the sockets of that name no more."""
        self._notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def wait_heard(self, timeout_s: float = 5.0) -> None:
        """Return when everything said so far was acted upon, at most after `timeout_s` seconds.

        Source: sd_notify(3), BARRIER=1: systemd closes the descriptor it is sent.
        """
        if self._send is None:
            return
        ours, theirs = os.pipe()
        try:
            self._notify("BARRIER=1", [theirs])
            os.close(theirs)
            waiting = select.poll()
            waiting.register(ours, 0)  # a hang-up is always reported
            waiting.poll(timeout_s * 1000)
        finally:
            os.close(ours)

    def _notify(self, text: str, descriptors: list[int] | None = None) -> None:
        if self._send is None:
            return
        try:
            if descriptors:
                self._send(text, fds=descriptors)
            else:
                self._send(text)
        except OSError as error:
            # Whoever listened is gone; that is no reason to stop serving, or not to finish stopping.
            _log.warning("systemd could not be notified: %s", error)
