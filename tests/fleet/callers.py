"""What callers of the fleet do: gRPC with the stock SDK's own retry policy or without, and REST."""

import base64
import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
from clarifai_grpc.channel.clarifai_channel import ClarifaiChannel, grpc_json_config
from clarifai_grpc.grpc.api import service_pb2_grpc
from clarifai_grpc.grpc.api.status import status_code_pb2
from support.callers import ANSWERED, Ask, Begin
from support.waiting import PATIENCE_S


def over_grpc(target: str, ca: Path, key: str, request: Any, *, retries: bool) -> Begin:
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


def over_rest(base_url: str, ca: Path, key: str, path: str, picture: Path) -> Begin:
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
