"""A real headless Chromium that trusts a custom root, and the web server of the pages it visits."""

import contextlib
import functools
import http.server
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from support.appliance import PATIENCE_S
from support.programs import environment, need_programs, run

PACKAGES = "chromium libnss3-tools"
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)


class Pages:
    """A web server on loopback with pages made of texts; what a page posts to it, it keeps."""

    def __init__(self, pages: Mapping[str, tuple[str, str]]) -> None:
        """Args: pages: path → content type and text."""
        self._found: queue.Queue[Any] = queue.Queue()
        found = self._found

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind, text = pages.get(self.path, ("", ""))
                self._answer(200 if kind else 404, kind or "text/plain", text.encode())

            def do_POST(self) -> None:
                found.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self._answer(204, "text/plain", b"")

            def _answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.port = int(self._server.server_address[1])

    def __enter__(self) -> "Pages":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def next(self, browser: "subprocess.Popen[bytes]", log: Path) -> Any:
        """What a page posts next. Raises: AssertionError: the browser ended, or is silent."""
        for _ in range(int(PATIENCE_S)):
            with contextlib.suppress(queue.Empty):
                return self._found.get(timeout=1)
            if browser.poll() is not None:
                break
        raise AssertionError(f"no page said anything; the browser's log:\n{log.read_text('utf-8', 'replace')}")


def trusting(home: Path, ca: Path) -> None:
    """Have browsers with that home believe what `ca` signed."""
    store = home / ".pki" / "nssdb"
    store.mkdir(parents=True)
    run("certutil", "-d", f"sql:{store}", "-N", "--empty-password")
    run("certutil", "-d", f"sql:{store}", "-A", "-n", "custom root", "-t", "C,,", "-i", ca)


@contextlib.contextmanager
def chromium(home: Path, ca: Path, url: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Chromium with a home of its own on a page; it believes the certificates that `ca` signed, as a user's would.

    Args: home: an empty folder; the browser's log becomes `home/log`.
    """
    need_programs(PACKAGES, "chromium", "certutil")
    trusting(home, ca)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            ["chromium", *OPTIONS, f"--user-data-dir={home / 'profile'}", url],
            env=environment(HOME=home),
            stdout=log,
            stderr=log,
            start_new_session=True,  # it has children of its own, which end with it
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_S)


@functools.cache
def chromium_version() -> str:
    """What Chromium says of itself: "Chromium 156.0.8078.108"."""
    return " ".join(run("chromium", "--version").split()[:2])
