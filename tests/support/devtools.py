"""A page in a real headless Chromium, driven through its DevTools protocol over a pipe: no port, and no library.

Source: https://chromedevtools.github.io/devtools-protocol; messages are JSON, each with a NUL behind it.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.appliance import PATIENCE_S
from support.browser import OPTIONS, PACKAGES, trusting
from support.programs import environment, need_programs

_TAKE_PIPES = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Makes two descriptors 3 and 4, which Chromium reads commands from and writes answers to."""


class Page:
    """One tab. Everything waits for what it asks for, and fails the test when it does not come."""

    def __init__(self, reading: int, writing: int, log: Path) -> None:
        self._reading, self._writing, self._log = reading, writing, log
        self._rest = b""
        self._number = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []
        """What the browser reported by itself: console messages, errors, requests."""
        (target,) = [each for each in self.ask("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command's result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._reading, 2**20) if ready else b""
            assert piece, f"the browser is silent or gone:\n{self._log.read_text('utf-8', 'replace')[-4000:]}"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, awaited if it is a promise."""
        found = self.ask(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, expression: str, what: str = "") -> Any:
        """The first true value of an expression in the page."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            value = self.js(expression)
            if value:
                return value
            self.js("new Promise((done) => setTimeout(done, 50))")
        raise AssertionError(f"{what or expression} did not come true; the page says:\n{self.text('body')}")

    def open(self, url: str) -> None:
        """Go there, and return when it has loaded."""
        self.ask("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def text(self, selector: str) -> str:
        """What is shown there."""
        return str(self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    def type(self, selector: str, text: str) -> None:
        """Put the cursor there and type, as a keyboard does."""
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        self.ask("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key: "Tab", "Enter", " "."""
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        more = {"text": "\r"} if key == "Enter" else {}
        code = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **code, **more)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **code)

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in an input, as a user does."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def prefer(self, **features: str) -> None:
        """What the user prefers: `prefer(color_scheme="dark")`."""
        pairs = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.ask("Emulation.setEmulatedMedia", features=pairs)

    def size(self, width: int, height: int) -> None:
        """Of the window, in pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])

    def complaints(self) -> list[str]:
        """What the page's scripts and the browser complained of: exceptions, refused resources, policies."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(str(params["args"]))
        return found

    def requested(self) -> list[str]:
        """The addresses that the page asked for."""
        return [
            str(event["params"]["request"]["url"])
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]


@contextlib.contextmanager
def page(home: Path, ca: Path | None = None, options: tuple[str, ...] = ()) -> Iterator[Page]:
    """A tab of a browser of its own. Args: home: an empty folder. ca: a root that it shall trust beside the usual."""
    need_programs(PACKAGES, "chromium", "certutil")
    if ca is not None:
        trusting(home, ca)
    commands, answers = os.pipe(), os.pipe()
    # Far from 3 and 4, so that neither is written over before it is moved there.
    far = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 20) for number in (commands[0], answers[1])]
    log = home / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", _TAKE_PIPES, *map(str, far)),
                *("chromium", *OPTIONS, *options, "--remote-debugging-pipe", f"--user-data-dir={home / 'profile'}"),
                "about:blank",
            ],
            env=environment(HOME=home),
            pass_fds=far,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # it has children of its own, which end with it
        )
    for number in (commands[0], answers[1], *far):
        os.close(number)
    try:
        yield Page(answers[0], commands[1], log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
        os.close(commands[1])
        os.close(answers[0])
