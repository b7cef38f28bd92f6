"""Talking to the running daemon over its admin socket."""

import contextlib
import socket as sockets
from pathlib import Path
from typing import Any

import httpx

from appliance.core.errors import ConfigError


class NotRunning(ConfigError):
    """Nobody answers on the admin socket."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"The daemon does not answer on {path} ({reason}); is it running, and may you use that file?")


def ask(socket: Path, page: str, *, post: bool = False) -> dict[str, Any]:
    """One page of the admin socket as JSON. Raises: NotRunning."""
    transport = httpx.HTTPTransport(uds=str(socket))
    try:
        # httpx leaves its own socket open when nobody listens.
        with contextlib.closing(sockets.socket(sockets.AF_UNIX)) as knock:
            knock.connect(str(socket))
        with httpx.Client(transport=transport, base_url="http://appliance", timeout=120.0) as client:
            reply = client.request("POST" if post else "GET", page)
            content: dict[str, Any] = reply.json()
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise NotRunning(socket, str(error) or type(error).__name__) from error
    return content
