"""The demo: a development CA, a key, the shipped bundles, the daemon, and a stock Clarifai SDK that uses it.

Everything lies under .demo/ and may be thrown away. With --keep the daemon goes on until Ctrl-C, for you to try.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".demo"
APPLIANCE = Path(sys.executable).with_name("appliance")
START_S = 60.0

CONFIG = """\
[server]
base_url = "https://localhost:{port}"
listen = "127.0.0.1:{port}"

[tls]
certificate = "{home}/tls/server.crt"
key = "{home}/tls/server.key"

[auth]
keys_file = "{home}/keys.json"

[catalog]
root = "{home}/models"
state_dir = "{home}/state"

[admin]
listen = "127.0.0.1:{admin}"
socket = "{home}/admin.sock"

[shutdown]
lame_duck_s = 0
"""


def main() -> int:
    """Set up what is missing, start, show, stop. Returns the exit code of what was shown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdk", type=Path, required=True, help="Python of an environment with the stock SDK.")
    parser.add_argument("--keep", action="store_true", help="Leave the daemon running until Ctrl-C.")
    options = parser.parse_args()
    key = set_up()
    with daemon() as port:
        code = show(options.sdk, port, key)
        if options.keep and code == 0:
            print(f"\nThe daemon serves https://localhost:{port} until Ctrl-C; key {key}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    return code


def set_up() -> str:
    """Certificates, bundles and a key under .demo/. Returns the key."""
    for folder in ("tls", "models", "state"):
        (HOME / folder).mkdir(parents=True, exist_ok=True)
    write_config(8443, 9464)
    if not (HOME / "tls" / "ca.crt").exists():
        appliance("certs", "init", "--dir", str(HOME / "tls"), "--name", "Demo Root CA")
    if not (HOME / "tls" / "server.crt").exists():
        appliance("certs", "issue", "server", "--dir", str(HOME / "tls"), "--san", "localhost", "--san", "127.0.0.1")
    for bundle in ("digits", "ml-topics"):
        if not (HOME / "models" / bundle).exists():
            appliance("models", "add", str(ROOT / "models" / bundle))
    return appliance("keys", "create", "--note", "demo", "--quiet").strip()


def write_config(port: int, admin: int) -> None:
    """The demo's configuration file."""
    (HOME / "appliance.toml").write_text(CONFIG.format(home=HOME, port=port, admin=admin), encoding="utf-8")


def appliance(*arguments: str) -> str:
    """Run the `appliance` command with the demo's configuration and return what it prints."""
    command = [str(APPLIANCE), "--config", str(HOME / "appliance.toml"), *arguments]
    print("$ appliance", *(a.replace(str(ROOT) + "/", "") for a in arguments), flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextlib.contextmanager
def daemon() -> Iterator[int]:
    """Start the daemon, wait until it is ready, yield its port, and stop it."""
    port, admin = free_ports(2)
    write_config(port, admin)
    print("$ appliance serve", flush=True)
    log = (HOME / "daemon.log").open("w", encoding="utf-8")
    process = subprocess.Popen(
        [str(APPLIANCE), "--config", str(HOME / "appliance.toml"), "serve"], stdout=log, stderr=subprocess.STDOUT
    )
    try:
        wait_ready(process)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


def wait_ready(process: "subprocess.Popen[bytes]") -> None:
    """Return when the admin socket says ready; end the demo with the daemon's log when it does not."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError), socket.socket(socket.AF_UNIX) as admin:
            admin.settimeout(5)
            admin.connect(str(HOME / "admin.sock"))
            admin.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            reply = b"".join(iter(lambda: admin.recv(65536), b""))
            if json.loads(reply.split(b"\r\n\r\n", 1)[1])["ready"]:
                return
        time.sleep(0.05)
    sys.exit("The daemon did not become ready; its log:\n" + (HOME / "daemon.log").read_text(encoding="utf-8"))


def show(sdk: Path, port: int, key: str) -> int:
    """Let a stock SDK classify pictures and texts. The key goes by environment, as users do it."""
    environment = {**os.environ, "CLARIFAI_PAT": key}
    command = [str(sdk), str(ROOT / "demo" / "classify.py"), f"https://localhost:{port}", str(HOME / "tls" / "ca.crt")]
    return subprocess.run(command, env=environment, check=False).returncode


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]


if __name__ == "__main__":
    sys.exit(main())
