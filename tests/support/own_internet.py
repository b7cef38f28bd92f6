"""An internet of its own, in a network namespace: a name server on 127.0.0.1:53, web servers outside and inside.

Run by `tests/integration/test_urls.py` as `python -m support.own_internet FOLDER PKI` where only the loopback device is
there, with "public" addresses on it too. Starts a real appliance, asks it for pictures by URL, prints what became of
them as JSON.
"""

import http.server
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

OUTSIDE, OUTSIDE_6 = "93.184.216.34", "2606:2800:220:1::1"
INSIDE = ("127.0.0.1", "10.0.0.5", "169.254.169.254", "::1")

_A, _AAAA = 1, 28


class NameServer(threading.Thread):
    """Answers A and AAAA from a table of names, whose answers may change from question to question.

    Attributes:
        zone: name → one list of addresses a question, the last one for ever; None: silence. Other names do not exist.
        asked: questions by (name, type).
    """

    def __init__(self, zone: dict[str, list[list[str]] | None]) -> None:
        super().__init__(daemon=True)
        self.zone = zone
        self.asked: Counter[tuple[str, int]] = Counter()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 53))

    def run(self) -> None:
        """Answer for ever. Source: RFC 1035, section 4.1."""
        while True:
            query, peer = self._socket.recvfrom(512)
            reply = self._reply(query)
            if reply is not None:
                self._socket.sendto(reply, peer)

    def _reply(self, query: bytes) -> bytes | None:
        labels, place = [], 12
        while query[place]:
            labels.append(query[place + 1 : place + 1 + query[place]].decode())
            place += 1 + query[place]
        name, (kind,) = ".".join(labels).lower(), struct.unpack_from(">H", query, place + 1)
        answers = self.zone.get(name, [])
        if answers is None:
            return None
        now = answers[min(self.asked[name, kind], len(answers) - 1)] if answers else []
        self.asked[name, kind] += 1
        family = socket.AF_INET if kind == _A else socket.AF_INET6
        packed = (
            [socket.inet_pton(family, a) for a in now if (":" in a) == (kind == _AAAA)] if kind in (_A, _AAAA) else []
        )
        flags = 0x8180 if answers else 0x8183
        question = query[12 : place + 5]
        records = [struct.pack(">HHHIH", 0xC00C, kind, 1, 0, len(data)) + data for data in packed]
        return query[:2] + struct.pack(">HHHHH", flags, 1, len(records), 0, 0) + question + b"".join(records)


class Pages(http.server.BaseHTTPRequestHandler):
    """A picture everywhere; `/to/URL` leads there."""

    picture: ClassVar[bytes]
    asked: ClassVar[list[tuple[str, str, dict[str, str]]]] = []

    def do_GET(self) -> None:
        """Answer, and remember who was asked for what."""
        address = self.server.server_address[0]
        self.asked.append((str(address), self.path, {key.lower(): value for key, value in self.headers.items()}))
        self.send_response(302 if self.path.startswith("/to/") else 200)
        if self.path.startswith("/to/"):
            self.send_header("Location", unquote(self.path.removeprefix("/to/")))
        self.send_header("Content-Length", str(0 if self.path.startswith("/to/") else len(self.picture)))
        self.end_headers()
        if not self.path.startswith("/to/"):
            self.wfile.write(self.picture)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class _Six(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6


def main(folder: Path, pki_folder: Path) -> None:
    """Everything above, once."""
    from support.appliance import MODELS, Appliance, Client, Pki, image_input, request_for  # needs grpc: not at import

    Pages.picture = sorted((MODELS / "digits" / "samples").glob("*.png"))[0].read_bytes()
    for address in (OUTSIDE, "10.0.0.5", "169.254.169.254"):
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    subprocess.run(["ip", "-6", "address", "add", f"{OUTSIDE_6}/128", "dev", "lo", "nodad"], check=True)
    for address in (OUTSIDE, OUTSIDE_6, *INSIDE):
        kind = _Six if ":" in address else http.server.ThreadingHTTPServer
        threading.Thread(target=kind((address, 80), Pages).serve_forever, daemon=True).start()
    names = NameServer(
        {
            "steady.test": [[OUTSIDE]],
            "six.test": [[OUTSIDE_6]],
            "rebind.test": [[OUTSIDE], ["127.0.0.1"]],
            "hop.test": [[OUTSIDE], ["169.254.169.254"]],
            "mixed.test": [[OUTSIDE, "10.0.0.5"]],
            "both.test": [[OUTSIDE, "::1"]],
            "inside.test": [["10.0.0.5"]],
            "mapped.test": [["::ffff:127.0.0.1"]],
            "translated.test": [["64:ff9b::7f00:1"]],
            "inside6.test": [["::1"]],
            "zero.test": [["0.0.0.0"]],  # which Linux takes for loopback
            "silent.test": None,
        }
    )
    names.start()
    asked = {
        "steady": "http://steady.test/a.png?sig=1",
        "six": "http://six.test/a.png",
        "rebind": "http://rebind.test/a.png",
        "rebound": "http://rebind.test/b.png",
        "hop": "http://hop.test/to/http://hop.test/latest/meta-data",
        "to a name inside": "http://steady.test/to/http://inside.test/",
        "to an address": "http://steady.test/to/http://10.0.0.5/",
        "to a file": "http://steady.test/to/file:///etc/passwd",
        "to a number": "http://steady.test/to/http://2130706433/",
        "to the admin page": "http://steady.test/to/http://127.0.0.1:9464/metrics",
        **{name: f"http://{name}.test/" for name in ("mixed", "both", "inside", "mapped", "translated")},
        **{name: f"http://{name}.test/" for name in ("inside6", "zero", "nothing", "silent")},
        **{host: f"http://{host}/" for host in ("127.0.0.1", "10.0.0.5", "[::1]", "0.0.0.0", "169.254.169.254")},
        **{host: f"http://{host}/" for host in ("[::ffff:127.0.0.1]", "127.1", "2130706433", "0x7f.1", "0177.0.0.1")},
        "user": "http://steady.test@10.0.0.5/",
        "localhost": "http://localhost/",
    }
    appliance = Appliance(folder, Pki(pki_folder), {"urls": {"hosts": ["*"], "timeout_s": 2}}, transport="native")
    subprocess.run(["cp", "-r", MODELS / "digits", appliance.models / "digits"], check=True)
    key = appliance.new_key()
    appliance.spawn({"http_proxy": "http://10.0.0.5:80", "HTTPS_PROXY": "http://10.0.0.5:80"})
    try:
        appliance.wait(lambda: appliance.admin("/readyz").get("ready") is True)
        found: dict[str, Any] = {}
        with Client(appliance.port(), Pki(pki_folder).ca, key) as client:
            sent = client.predict(request_for("digits", [image_input(Pages.picture)])).outputs[0].data
            for name, url in asked.items():
                given = image_input(b"")
                given.data.image.url = url
                (output,) = client.predict(request_for("digits", [given])).outputs
                found[name] = [output.status.code, output.status.details, output.data == sent]
        print(
            json.dumps(
                {
                    "found": found,
                    "asked": Pages.asked,
                    "names": {name: names.asked[f"{name}.test", _A] for name in ("steady", "rebind", "hop")},
                    "key_seen": key in json.dumps(Pages.asked),
                    "log": appliance.log,
                }
            )
        )
    finally:
        appliance.stop()


if __name__ == "__main__":
    os.environ["GRPC_DNS_RESOLVER"] = "native"
    main(Path(sys.argv[1]), Path(sys.argv[2]))
