"""Talking to the running daemon over its admin socket."""

import contextlib
import socket as sockets
from pathlib import Path
from typing import Any

import httpx

from appliance.core.errors import ConfigError

_PATIENCE_S = 120.0


class NotRunning(ConfigError):
    """Nobody answers on the admin socket."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"The daemon does not answer on {path} ({reason}); is it running, and may you use that file?")


def ask(socket: Path, page: str, *, post: bool = False, body: object = None) -> dict[str, Any]:
    """One page of the admin socket as JSON. Args: body: to post, as JSON. Raises: NotRunning."""
    reply = _reply(socket, page, post=post, body=body)
    try:
        content: dict[str, Any] = reply.json()
    except ValueError as error:
        raise NotRunning(socket, str(error)) from error
    return content


def text(socket: Path, page: str, *, timeout_s: float = _PATIENCE_S) -> str:
    """One page of the admin socket as it is. Raises: NotRunning."""
    return _reply(socket, page, post=False, timeout_s=timeout_s).text


def _reply(
    socket: Path, page: str, *, post: bool, body: object = None, timeout_s: float = _PATIENCE_S
) -> httpx.Response:
    transport = httpx.HTTPTransport(uds=str(socket))
    try:
        # httpx leaves its own socket open when nobody listens.
        with contextlib.closing(sockets.socket(sockets.AF_UNIX)) as knock:
            knock.connect(str(socket))
        with httpx.Client(transport=transport, base_url="http://appliance", timeout=timeout_s) as client:
            return client.request("POST" if post else "GET", page, json=body)
    except (httpx.HTTPError, OSError) as error:
        raise NotRunning(socket, str(error) or type(error).__name__) from error
