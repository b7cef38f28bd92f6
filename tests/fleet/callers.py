"""Callers in closed loops, with the stock SDK's own retry policy or without: how every call of theirs ended."""

import base64
import contextlib
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
from clarifai_grpc.channel.clarifai_channel import ClarifaiChannel, grpc_json_config
from clarifai_grpc.grpc.api import service_pb2_grpc
from clarifai_grpc.grpc.api.status import status_code_pb2
from support.appliance import PATIENCE_S

ANSWERED = "answered"
Ask = Callable[[], str]
"""Makes one call. Returns: ANSWERED, or how else it ended."""


class Callers:
    """So many loops of one call at a time; every one has connections of its own."""

    def __init__(
        self, count: int, begin: "Callable[[], contextlib.AbstractContextManager[Ask]]", pause_s: float = 0.02
    ) -> None:
        """Args: pause_s: between two calls of a loop, so that the machine keeps some CPU for the rest."""
        self._begin, self._pause_s = begin, pause_s
        self.ends: Counter[str] = Counter()
        self.times_s: list[float] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def _run(self) -> None:
        with self._begin() as ask:
            while not self._stop.is_set():
                begun = time.monotonic()
                end = ask()
                with self._lock:
                    self.times_s.append(time.monotonic() - begun)
                    self.ends[end] += 1
                self._stop.wait(self._pause_s)

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a caller never got an answer: its call was lost"

    @property
    def answered(self) -> int:
        """Calls that ended as they should."""
        return self.ends[ANSWERED]

    def told(self) -> dict[str, Any]:
        """How all calls ended."""
        others = {end: count for end, count in self.ends.items() if end != ANSWERED}
        return {"answered": self.answered, "others": others, "slowest_s": round(max(self.times_s, default=0.0), 2)}


def over_grpc(target: str, ca: Path, key: str, request: Any, *, retries: bool) -> Callable[[], Any]:
    """Callers of PostModelOutputs. Args: retries: by the policy that the SDK's channel has."""

    @contextlib.contextmanager
    def begin() -> Iterator[Ask]:
        options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
        options += [("grpc.service_config", grpc_json_config)] if retries else []
        # The stub works only once a stock channel was made in this process (PROTOCOL 1.3).
        ClarifaiChannel.get_grpc_channel(base="localhost:1", root_certificates_path=str(ca)).close()
        credentials = grpc.ssl_channel_credentials(ca.read_bytes())
        with grpc.secure_channel(target, credentials, options=options) as channel:
            stub = service_pb2_grpc.V2Stub(channel)

            def ask() -> str:
                try:
                    reply = stub.PostModelOutputs(
                        request, metadata=(("authorization", f"Key {key}"),), timeout=PATIENCE_S
                    )
                except grpc.RpcError as error:
                    return f"{error.code().name}: {error.details()}"[:200]
                return ANSWERED if reply.status.code == status_code_pb2.SUCCESS else str(reply.status)[:200]

            yield ask

    return begin


def over_rest(base_url: str, ca: Path, key: str, path: str, picture: Path) -> Callable[[], Any]:
    """Callers of the REST twin, on kept connections of HTTP/1.1."""
    content = {"inputs": [{"data": {"image": {"base64": base64.b64encode(picture.read_bytes()).decode()}}}]}

    @contextlib.contextmanager
    def begin() -> Iterator[Ask]:
        context = ssl.create_default_context(cafile=str(ca))
        with httpx.Client(verify=context, base_url=base_url, timeout=PATIENCE_S) as client:

            def ask() -> str:
                try:
                    reply = client.post(path, json=content, headers={"authorization": f"Key {key}"})
                except httpx.HTTPError as error:
                    return f"{type(error).__name__}: {error}"[:200]
                return ANSWERED if reply.status_code == 200 else f"{reply.status_code}: {reply.text}"[:200]

            yield ask

    return begin
