"""Write the fuzzer's first inputs: short sessions as they should be, in the language of h2_target.c.

Usage: python tests/fuzz/seeds.py FOLDER
"""

import sys
from pathlib import Path

HOLD = 128
"""Set in a peer's operation: its bytes wait for those of the next one."""

SETTLED = bytes([15, 1])
"""The peer acknowledges our SETTINGS."""


def peer(operation: int, choice: int, rest: bytes = b"", hold: bool = False) -> bytes:
    """An operation of the peer."""
    return bytes([operation << 1 | 1 | (HOLD if hold else 0), choice]) + rest


def owner(operation: int, choice: int, rest: bytes = b"") -> bytes:
    """An operation of the owner."""
    return bytes([operation << 1, choice]) + rest


def request(stream: int, kind: int = 0, hold: bool = False) -> bytes:
    """Headers. Args: kind: 1 end, 2 HTTP, 4 +proto, 8 timeout, 16 content-length, 32 too large, 64 indexed."""
    return peer(2, stream, bytes([kind]), hold)


def message(stream: int, size: int, flags: int = 3, declared: int = 0) -> bytes:
    """DATA with a message. Args: flags: 1 end, 2 declares `size`, 4 declares 16 times `declared`, 16 compressed."""
    return peer(3, stream, bytes([flags]) + declared.to_bytes(2) + size.to_bytes(2))


def word(number: int) -> bytes:
    """Two bytes."""
    return number.to_bytes(2)


PULL = owner(9, 1)
ALL = b"\0"
SMALL = b"\1"


def flood(kind: int, count: int = 255) -> bytes:
    """8 `count` frames of a kind: PING, SETTINGS, empty DATA, padding, CONTINUATION, RST, PRIORITY, WINDOW_UPDATE."""
    return peer(7, 2 | kind << 2, bytes([count]))


SEEDS = {
    **{f"flood-{kind}": ALL + request(0) + flood(kind) * 2 + PULL for kind in range(8)},
    "unary": ALL + SETTLED + request(0, hold=True) + message(0, 100) + owner(0, 0, word(300)) + PULL,
    "unary-two": ALL
    + request(0, hold=True)
    + message(0, 10)
    + request(1, hold=True)
    + message(1, 10)
    + owner(0, 1, word(30))
    + owner(0, 0, word(60))
    + PULL,
    "large-request": SMALL
    + request(0)
    + message(0, 1000, 4, 1000)
    + owner(6, 0)
    + PULL
    + peer(1, 0, bytes([0, 0, 255]) + b"x" * 255) * 4
    + PULL,
    "large-reply": ALL
    + peer(5, 4, word(1000))
    + request(0, 1)
    + owner(0, 0, word(60_000))
    + PULL
    + peer(4, 0, word(5000))
    + PULL
    + peer(4, 0x40, word(5000))
    + peer(4, 0x80 | 0x40, word(5000))
    + PULL * 3,
    "server-stream": ALL
    + request(0, hold=True)
    + message(0, 50)
    + (owner(1, 0, word(500)) + PULL) * 3
    + owner(8, 0, word(10))
    + owner(2, 0, bytes([5, 5, 0]))
    + PULL,
    "client-stream": ALL
    + request(0)
    + message(0, 500, 2) * 3
    + owner(7, 0, word(500)) * 3
    + PULL
    + message(0, 5000, 3)
    + owner(0, 0, word(5))
    + PULL,
    "compressed": ALL + request(0, hold=True) + message(0, 100, 0x13) + owner(0, 128, word(30)) + PULL,
    "refused": ALL + request(0, 8) + owner(2, 0, bytes([9, 0, 7])) + PULL,
    "http": ALL
    + request(0, 2)
    + peer(1, 0, bytes([0, 1, 10]) + b"0123456789")
    + owner(3, 0, bytes([50, 3]))
    + owner(4, 0, word(4000))
    + owner(4, 128, word(10))
    + PULL,
    "http-length": ALL + request(0, 18) + peer(1, 0, bytes([0, 1, 9]) + b"012345678") + PULL,
    "heavy": ALL + request(0, 33) + owner(2, 0, bytes([8, 3, 0])) + PULL,
    "cancelled": ALL + request(0, 1) + owner(0, 0, word(60_000)) + peer(6, 0, b"\x08") + PULL,
    "reset": ALL + request(0, 1) + owner(5, 0, b"\2") + PULL,
    "shut": ALL + request(0, 1) + owner(11, 1) + PULL + (peer(7, 0) + PULL) * 2 + owner(0, 0, word(5)) + PULL,
    "abandoned": ALL + request(0, 1) + owner(11, 2, b"\x0b") + PULL,
    "ping": ALL + owner(11, 3) + PULL + peer(1, 128, bytes([6, 0, 8]) + b"12345678") + PULL,
    "slow": ALL + request(0, 1) + peer(5, 4, word(0)) + owner(0, 0, word(6000)) + owner(13, 61) + owner(13, 61) + PULL,
    "padded": ALL + request(0) + peer(1, 0, bytes([0, 8, 20, 9]) + b"\0\0\0\0\5hello" + bytes(9)) + PULL,
    "trailers": ALL + request(0) + message(0, 20, 2) + peer(1, 0, bytes([1, 5, 7]) + b"\0\1x\3abc") + PULL,
    "raw": bytes([16]) + peer(0, 60, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0\0\0\4\1\0\0\0\0") + PULL,
    "no-memory": ALL + request(0) + owner(12, 3) + message(0, 9000) + owner(12, 1) + owner(0, 0, word(9000)) + PULL,
}


def main(folder: Path) -> None:
    """Write each seed to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in SEEDS.items():
        (folder / name).write_bytes(seed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
