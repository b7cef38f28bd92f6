"""The wire serves what others wrote: grpc.aio, grpc-js, curl, nghttp, h2load, OpenSSL; and knows who they are."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from support.appliance import ROOT, Pki, make_pki
from support.raw_http2 import framed
from support.wire_server import Server

PATIENCE_S = 60.0
NODE = ROOT / ".clients" / "node" / "node_modules"
SCRIPT = ROOT / "tests" / "clients" / "node" / "wire.js"


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request: pytest.FixtureRequest, pki: Pki) -> Iterator[Server]:
    """The native wire, on either event loop."""
    with Server(pki, "native", request.param) as made:
        yield made


def tool(name: str, *words: object, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """Run a program to its end; without it, the test is skipped."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run([name, *map(str, words)], input=given, capture_output=True, timeout=PATIENCE_S)


# ---- gRPC ------------------------------------------------------------------------------------------------------------


async def test_grpc_aio_is_served(server: Server) -> None:
    """Unary, streams, a deadline, a cancellation and many calls at once."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.secure_channel(server.target(), server.credentials(), options=options) as channel:
        echo = channel.unary_unary("/wire.Test/Echo")
        hold = channel.unary_unary("/wire.Test/Hold")
        assert await echo(b"x" * 5_000_000, timeout=PATIENCE_S) == b"x" * 5_000_000
        bodies = [b"%d" % number for number in range(100)]
        chat = channel.stream_stream("/wire.Test/Chat")(iter(bodies), timeout=PATIENCE_S)
        assert [message async for message in chat] == bodies
        assert await asyncio.gather(*(echo(body, timeout=PATIENCE_S) for body in bodies)) == bodies
        with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
            await hold(b"aio deadline", timeout=0.3)
        await asyncio.to_thread(server.wait, "cancelled", id="aio deadline")
        call = hold(b"aio cancel")
        await asyncio.to_thread(server.wait, "holding", id="aio cancel")
        call.cancel()
        await asyncio.to_thread(server.wait, "cancelled", id="aio cancel")


def test_grpc_js_is_served(server: Server) -> None:
    """Every kind of call, as grpc-js makes them."""
    if not NODE.is_dir():
        pytest.skip("grpc-js is not there: npm ci in .clients/node with the files of requirements/node")
    words = [SCRIPT, server.ports["tls"], server.pki.ca]
    done = subprocess.run(
        ["node", *map(str, words)], env={**os.environ, "NODE_PATH": str(NODE)}, capture_output=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr.decode()
    ends: dict[str, Any] = json.loads(done.stdout)
    assert {name: end.get("code") for name, end in ends.items() if end.get("code") not in ("OK", None)} == {
        "too large": "RESOURCE_EXHAUSTED",
        "abort": "NOT_FOUND",
        "unknown": "UNIMPLEMENTED",
        "deadline": "DEADLINE_EXCEEDED",
        "cancel": "CANCELLED",
        "refused by a status": "PERMISSION_DENIED",
        "aborted": "NOT_FOUND",
        "cancelled stream": "CANCELLED",
    }
    assert ends["large"]["length"] == 20_000_000
    assert "limits.request_size" in ends["too large"]["details"]
    assert (ends["abort"]["details"], ends["abort"]["metadata"]) == ("Grüße, 世界", "00ff")
    assert ends["refused by a reply"]["text"] == "refused"
    assert (ends["chat"]["count"], ends["chat"]["length"]) == (100, 1_000_000)
    assert ends["collect"]["text"] == "50 5000000"
    assert (ends["count"]["count"], ends["large count"]["length"]) == (1000, 20_000_000)
    assert ends["many"]["wrong"] == 0
    for name in ("node deadline", "node cancel", "node stream"):
        server.wait("cancelled", id=name)


# ---- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "port", "said"),
    [
        ("--http2", "tls", "2"),
        ("--http1.1", "tls", "1.1"),
        ("--http2-prior-knowledge", "plain", "2"),
        ("--http1.1", "plain", "1.1"),
    ],
)
def test_curl_finds_every_http_on_one_port(server: Server, how: str, port: str, said: str) -> None:
    """By ALPN where there is TLS, by the first bytes where there is none."""
    base = f"{'https' if port == 'tls' else 'http'}://localhost:{server.ports[port]}"
    words = ["--silent", "--show-error", "--cacert", server.pki.ca, how]
    assert tool("curl", *words, f"{base}/hello").stdout == f"hello over {said}".encode()
    for size in (0, 70_000, 5_000_000):
        done = tool("curl", *words, "--data-binary", "@-", f"{base}/length", given=b"x" * size)
        assert done.stdout == str(size).encode(), done.stderr


@pytest.mark.parametrize("how", ["--http2", "--http1.1"])
@pytest.mark.parametrize("size", [0, 5, 60_000, 500_000, 5_000_000])
def test_curl_sees_a_refusal_that_comes_before_its_body_is_sent(server: Server, how: str, size: int) -> None:
    """Some clients forget an answer when their stream is reset behind it: they get a moment to end by themselves."""
    words = ["--silent", "--show-error", "--cacert", server.pki.ca, how, "--header", "expect:", "--data-binary", "@-"]
    url = f"https://localhost:{server.ports['tls']}/early"
    done = tool("curl", *words, "--write-out", " %{http_code}", url, given=b"x" * size)
    assert done.stdout == b"no 401", done.stderr


def test_curl_makes_a_grpc_call_by_hand(server: Server) -> None:
    """Headers, message and trailers, as the specification has them."""
    words = ["--silent", "--http2", "--cacert", server.pki.ca, "--header", "content-type: application/grpc"]
    words += ["--header", "te: trailers", "--data-binary", "@-", "--dump-header", "/dev/stderr"]
    done = tool("curl", *words, f"https://localhost:{server.ports['tls']}/wire.Test/Echo", given=framed(b"hello"))
    assert done.stdout == framed(b"hello")
    head, _, trailers = done.stderr.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/2 200")
    assert b"content-type: application/grpc" in head
    assert b"grpc-status: 0" in trailers


def test_nghttp_is_served(server: Server) -> None:
    """With its own frames, padding and priorities."""
    url = f"https://localhost:{server.ports['tls']}/hello"
    assert tool("nghttp", "--padding=50", "--weight=7", "--multiply=20", url).stdout == b"hello over 2" * 20


@pytest.mark.parametrize("streams", [1, 50])
def test_h2load_loses_nothing(server: Server, tmp_path: Path, streams: int) -> None:
    """2000 gRPC calls over 8 connections."""
    body = tmp_path / "body"
    body.write_bytes(framed(b"x" * 1000))
    words = ["-n2000", "-c8", f"-m{streams}", f"--data={body}", "-Hcontent-type: application/grpc", "-Hte: trailers"]
    said = tool("h2load", *words, f"https://localhost:{server.ports['tls']}/wire.Test/Echo").stdout.decode()
    assert "2000 total, 2000 started, 2000 done, 2000 succeeded, 0 failed, 0 errored, 0 timeout" in said
    assert "status codes: 2000 2xx" in said


# ---- TLS -------------------------------------------------------------------------------------------------------------


def openssl(server: Server, *words: str) -> str:
    """A handshake, as OpenSSL tells of it."""
    done = tool("openssl", "s_client", "-connect", f"localhost:{server.ports['tls']}", "-CAfile", server.pki.ca, *words)
    return (done.stdout + done.stderr).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [("h2,http/1.1", "h2"), ("http/1.1,h2", "h2"), ("http/1.1", "http/1.1"), ("spdy/3,h2", "h2")],
)
def test_the_protocol_is_agreed_in_the_handshake(server: Server, offered: str, chosen: str) -> None:
    """HTTP/2 if the client can."""
    said = openssl(server, "-alpn", offered)
    assert f"ALPN protocol: {chosen}" in said
    assert "Verify return code: 0 (ok)" in said


def test_old_tls_is_refused(server: Server) -> None:
    """1.2 and 1.3 are spoken, 1.1 is not."""
    for version, served in (("-tls1_3", True), ("-tls1_2", True), ("-tls1_1", False)):
        said = openssl(server, version, "-cipher", "DEFAULT:@SECLEVEL=0")
        assert ("Cipher is (NONE)" not in said) == served, said


def test_a_certificate_may_be_shown(server: Server, pki: Pki, tmp_path: Path) -> None:
    """Nobody, somebody, and a stranger, who does not get in."""
    with server.channel() as channel:
        assert json.loads(channel.unary("Identity")(b"", timeout=PATIENCE_S))["leaf"] == ""
    key, chain = pki.client("line-3")
    with server.channel(certificate=(key, chain)) as channel:
        seen = json.loads(channel.unary("Identity")(b"", timeout=PATIENCE_S))
    assert x509.load_pem_x509_certificate(seen["leaf"].encode()) == x509.load_pem_x509_certificates(chain)[0]
    root = x509.load_pem_x509_certificate(pki.ca.read_bytes())
    assert x509.load_pem_x509_certificates(seen["chain"].encode())[-1] == root
    stranger = make_pki(tmp_path / "tls", clients=("stranger",)).client("stranger")
    with server.channel(certificate=stranger) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary("Identity")(b"", timeout=PATIENCE_S)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
