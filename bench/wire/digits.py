"""Digits end to end: the real daemon under h2load, over TLS, beside what other servers made of such a model."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import numpy as np
from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from bench import workload
from bench.cpu import Cpus
from bench.models.tiny import mlp, write_bundle
from bench.server import Server, serving
from bench.wire.load import Figures, H2load, Shot
from bench.wire.process import tree

LOADS = tuple((connections, streams) for streams in (1, 16) for connections in (1, 8, 64))
"""Connections and streams on each."""

PEERS = {
    "triton-pybackend": (1242, 8359, 25434),
    "pytriton": (533, 3251, 6799),
    "mlserver": (359, 2834, 3337),
    "kserve": (2346, 3671, 2922),
    "litserve": (427, 2040, 2005),
    "clarifai-typed": (1763, 1671, 1721),
    "clarifai-proto": (1869, 1771, 1483),
    "bentoml-raw": (1036, 939, 709),
    "bentoml-batch": (636, 871, 667),
    "ray": (160, 536, 566),
}
"""Another run, on the same kind of machine, plaintext: requests a second of an MLP for digits (64 floats → 10) at 1, 8
and 64 connections. Server and client shared two cores; the best of 2 or 3 runs (November 2026)."""


@dataclass(slots=True)
class Subject:
    """One bundle and a request for it.

    Attributes:
        like_peers: whether all is as it was for `PEERS`: model, request, plaintext, and all CPUs for both sides.
        figures: by connections and streams, one for each round.
    """

    name: str
    title: str
    bundle: Path
    request: bytes
    like_peers: bool = False
    figures: dict[tuple[int, int], list[Figures]] = field(default_factory=dict)


def measure(cpus: Cpus, rounds: int, seconds: float, say: Callable[[str], None]) -> list[Subject]:
    """All bundles, each by a daemon of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-wire-") as name:
        folder = Path(name)
        load = H2load(cpus.load, folder, None)
        if load.missing:
            raise RuntimeError(load.missing)
        subjects = [_pictures(), _arrays(folder), _mlp(folder), _mlp(folder, like_peers=True)]
        for subject in subjects:
            say(f"digits: {subject.title}")
            shared = cpus.load if subject.like_peers else ()
            with serving(subject.bundle, (*cpus.server, *shared)) as server:
                for _ in range(rounds):
                    _round(subject, server, load, folder, seconds)
        return subjects


def _round(subject: Subject, server: Server, load: H2load, folder: Path, seconds: float) -> None:
    framed = folder / f"{subject.name}.framed"
    framed.write_bytes(b"\0" + len(subject.request).to_bytes(4, "big") + subject.request)
    reply_bytes = _ask(server, subject)
    for connections, streams in LOADS:
        shot = Shot(
            url=(f"http://{server.plain_address}" if subject.like_peers else f"https://{server.address}")
            + workload.METHOD,
            body=framed,
            reply_bytes=reply_bytes,
            connections=connections,
            streams=streams,
            headers=(f"authorization: Key {server.key}",),
            tolerance=0.02,  # replies carry time stamps
        )
        before = server.counters()
        known = subject.figures.setdefault((connections, streams), [])
        figures = load.measure(shot, tree(server.pid), seconds, known[-1].rps if known else None)
        failed = server.counters().since(before).failed
        if failed:
            problem = f"{failed} calls that the daemon itself counts as failed"
            figures = replace(figures, errors=failed, problems=[*figures.problems, problem])
        known.append(figures)


def _pictures() -> Subject:
    digits = workload.digits()
    request = digits.request(workload.Shape(1))
    title = f"the shipped bundle: PNG of {len(digits.inputs[0])} bytes → 10 concepts"
    return Subject("digits", title, digits.bundle, request)


def _arrays(folder: Path) -> Subject:
    """The shipped bundle's graph, served as raw tensors: float32 (1, 8, 8) in, 10 logits out."""
    bundle = folder / "digits-tensors"
    write_bundle(bundle, (workload.digits().bundle / "1/model.onnx").read_bytes())
    title = "the same graph as raw tensors: 64 float32 → 10 float32"
    return Subject(bundle.name, title, bundle, _request(bundle.name, (1, 8, 8)))


def _mlp(folder: Path, *, like_peers: bool = False) -> Subject:
    """What the peers served: 64 floats in, 10 out, and next to nothing in between."""
    bundle = folder / ("mlp-as-peers" if like_peers else "mlp")
    write_bundle(bundle, mlp())
    title = "an MLP 64 → 64 → 10: 64 float32 → 10 float32"
    if like_peers:
        title += "; as the peers served it: plaintext, and daemon and load share both cores"
    return Subject(bundle.name, title, bundle, _request(bundle.name, (64,)), like_peers)


def _request(model: str, shape: tuple[int, ...]) -> bytes:
    """One array of that shape for that model."""
    values = np.random.default_rng(0).random(shape, np.float32)
    array = resources_pb2.NDArray(buffer=values.tobytes(), shape=shape, dtype="float32")
    request = service_pb2.PostModelOutputsRequest(
        user_app_id=resources_pb2.UserAppIDSet(user_id="appliance", app_id="main"),
        model_id=model,
        inputs=[resources_pb2.Input(data=resources_pb2.Data(ndarray=array))],
    )
    return bytes(request.SerializeToString())


def _ask(server: Server, subject: Subject) -> int:
    """Ask once, by grpcio, and look at the answer. Returns: its length. Raises: RuntimeError: it is no success."""
    credentials = grpc.ssl_channel_credentials(server.ca.read_bytes())
    with grpc.secure_channel(server.address, credentials) as channel:
        reply = channel.unary_unary(workload.METHOD)(
            subject.request, timeout=30, metadata=(("authorization", f"Key {server.key}"),)
        )
    message = service_pb2.MultiOutputResponse.FromString(reply)
    statuses = [message.status, *(output.status for output in message.outputs)]
    wrong = [status for status in statuses if status.code != 10000]
    if wrong or not message.outputs:
        raise RuntimeError(f"{subject.name}: the daemon answers {(wrong or statuses)[0]}")
    return len(reply)
