"""The test's side of `support.wire_app`: start it, hear what its handlers live through, call it."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc

from support.appliance import PATIENCE_S, Pki

_TESTS = Path(__file__).parents[1]
MAX_MESSAGE = 24 * 2**20
"""Limit of a request in these tests: `limits.request_size`."""


class Server:
    """One server process."""

    def __init__(
        self, pki: Pki, transport: str = "native", loop: str = "uvloop", unix: Path | None = None, **settings: Any
    ) -> None:
        """Start it, and return when it serves. Args: settings: `WireSettings` that differ from the defaults."""
        self.pki, self.transport, self.unix = pki, transport, unix
        settings = {"max_message": MAX_MESSAGE, **settings}
        words = [sys.executable, "-P", "-m", "support.wire_app", "--transport", transport, "--loop", loop]
        words += ["--tls", str(pki.folder), "--settings", json.dumps(settings)]
        words += ["--unix", str(unix)] if unix else []
        self._news = threading.Condition()
        self._events: list[dict[str, Any]] = []
        self._log: list[str] = []
        # grpcio prints at its own discretion what a hostile peer did; that is the server's affair, not the test's.
        environment = {**os.environ, "PYTHONPATH": str(_TESTS), "GRPC_VERBOSITY": "NONE"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._read_log)]
        for thread in self._threads:
            thread.start()
        self.ports: dict[str, int] = self.wait("ready")["ports"]

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written to stderr."""
        return "".join(self._log)

    # ---- events ----

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self._events.append(json.loads(line))
                self._news.notify_all()
        with self._news:
            self._events.append({"event": "gone"})
            self._news.notify_all()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._log.append(line)

    def wait(self, event: str, timeout_s: float = PATIENCE_S, **wanted: Any) -> dict[str, Any]:
        """The first event of that name, with those fields, that nobody has waited for yet."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while True:
                for number, found in enumerate(self._events):
                    if found["event"] == event and wanted.items() <= found.items():
                        return self._events.pop(number)
                left = deadline - time.monotonic()
                if left < 0 or any(found["event"] == "gone" for found in self._events):
                    raise AssertionError(f"no event {event!r} {wanted}; there were {self._events}\n{self.log}")
                self._news.wait(left)

    def told(self, event: str, **wanted: Any) -> int:
        """How many such events wait for somebody."""
        with self._news:
            return sum(found["event"] == event and wanted.items() <= found.items() for found in self._events)

    def do(self, command: str, **arguments: Any) -> None:
        """Tell the server something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self.process.stdin.flush()

    def ask(self, what: str) -> Any:
        """The server's answer to a command that is answered with one event of its name."""
        self.do(what)
        answer = self.wait(what)
        return answer["count" if what == "made" else "bytes"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE_S)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- clients ----

    def target(self, how: str = "tls") -> str:
        """What grpcio calls the server."""
        return f"unix:{self.unix}" if how == "unix" else f"localhost:{self.ports[how]}"

    def credentials(self, certificate: tuple[bytes, bytes] | None = None) -> grpc.ChannelCredentials:
        """Args: certificate: (key, chain), PEM."""
        return grpc.ssl_channel_credentials(self.pki.ca.read_bytes(), *(certificate or ()))

    @contextlib.contextmanager
    def channel(
        self,
        how: str = "tls",
        certificate: tuple[bytes, bytes] | None = None,
        options: tuple[tuple[str, Any], ...] = (),
        **more: Any,
    ) -> Iterator["Channel"]:
        """A connection of its own. Args: options: instead of messages without limit and no retries."""
        chosen = options or (
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_retries", 0),
        )
        chosen += (("grpc.use_local_subchannel_pool", 1),)
        if how == "tls":
            made = grpc.secure_channel(self.target(), self.credentials(certificate), options=chosen, **more)
        else:
            made = grpc.insecure_channel(self.target(how), options=chosen, **more)
        with made:
            yield Channel(made)


class Channel:
    """A grpcio channel whose messages are bytes."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.grpc = channel

    def unary(self, method: str) -> grpc.UnaryUnaryMultiCallable:
        """A method of `wire.Test`, or any by its full name."""
        return self.grpc.unary_unary(_full(method))

    def collect(self, method: str) -> grpc.StreamUnaryMultiCallable:
        """Client streaming."""
        return self.grpc.stream_unary(_full(method))

    def count(self, method: str) -> grpc.UnaryStreamMultiCallable:
        """Server streaming."""
        return self.grpc.unary_stream(_full(method))

    def chat(self, method: str) -> grpc.StreamStreamMultiCallable:
        """Bidirectional streaming."""
        return self.grpc.stream_stream(_full(method))


def _full(method: str) -> str:
    return method if method.startswith("/") else f"/wire.Test/{method}"
