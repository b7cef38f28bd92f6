"""The wire on grpcio: a TLS port for the stock SDKs, and one that demands a client certificate.

The fallback transport and the oracle for the other one. It knows bytes, certificates and gRPC statuses; no message, no
model. Certificates are read again for each new handshake when they changed; live connections keep theirs.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio

from appliance.core.config import parse_address
from appliance.core.errors import ConfigError
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus

_log = logging.getLogger(__name__)

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a port shows and trusts, PEM.

    Attributes:
        key: unencrypted private key.
        client_ca: authorities for client certificates; None on the port that asks for none.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None


class GrpcioServer:
    """Both ports of the grpcio transport."""

    def __init__(self, endpoints: Mapping[str, Endpoint], max_message: int) -> None:
        """Make a server that is not listening yet.

        Args:    max_message: bytes of one request.
        """
        self._server = aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a share
                # Idle clients ping as they like: the stock ones do not, and a proxy that does is not an attacker.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 300_000),
                ("grpc.max_metadata_size", 16 * 1024),
            ],
        )
        self._server.add_generic_rpc_handlers((_Handlers(endpoints),))
        self.ports: dict[str, int] = {}

    def listen(self, name: str, address: str, read: Callable[[], Credentials]) -> None:
        """Bind a port; `read` gives its credentials, now and again for later handshakes.

        Raises: ConfigError: the port cannot be bound.
        """
        first = read()
        credentials = grpc.dynamic_ssl_server_credentials(
            _certificates(first),
            _Fetcher(read, first),
            require_client_authentication=first.client_ca is not None,
        )
        host, port = parse_address(address)
        literal = f"[{host}]" if ":" in host else host
        try:
            self.ports[name] = self._server.add_secure_port(f"{literal}:{port}", credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"{name} {address} cannot be bound: the port is taken, or the address is not this machine's."
            ) from error

    async def start(self) -> None:
        """Accept connections."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Accept no more, tell clients to go away, and cut what is left after `grace_s` seconds."""
        await self._server.stop(grace_s)


class _Fetcher:
    """Hands a changed certificate to the next handshake. Called on grpcio's threads."""

    def __init__(self, read: Callable[[], Credentials], first: Credentials) -> None:
        self._read = read
        self._last = first

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        current = self._read()
        if current == self._last:
            return None
        self._last = current
        return _certificates(current)


def _certificates(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(credentials.key, credentials.chain)], root_certificates=credentials.client_ca
    )


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """Endpoints as grpcio's method handlers, without (de)serialisers."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._handlers = {name: _handler(name, endpoint) for name, endpoint in endpoints.items()}

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a method, or None, which grpcio answers with UNIMPLEMENTED."""
        return self._handlers.get(handler_call_details.method)


def _handler(name: str, endpoint: Endpoint) -> Any:
    if endpoint.unary is not None:
        unary = endpoint.unary

        async def serve_unary(body: bytes, context: Any) -> bytes:
            try:
                return await unary(_call(name, context), body)
            except RpcAbort as abort:
                return await _end(context, abort)
            except Exception:
                return await _end(context, _unforeseen(name))

        return grpc.unary_unary_rpc_method_handler(serve_unary)
    stream = endpoint.stream
    assert stream is not None

    async def serve_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            async for reply in stream(_call(name, context), requests):
                yield reply
        except RpcAbort as abort:
            await _end(context, abort)
        except Exception:
            await _end(context, _unforeseen(name))

    return grpc.stream_stream_rpc_method_handler(serve_stream)


def _unforeseen(name: str) -> RpcAbort:
    """The last resort: without it grpcio would show the caller the exception."""
    _log.exception("unforeseen error", extra={"method": name})
    return RpcAbort(RpcStatus.INTERNAL, "Something went wrong in the appliance; its log tells more.")


async def _end(context: Any, abort: RpcAbort) -> Any:
    # A call that is being cancelled by the server's own stop cannot be aborted any more: it is over already.
    if abort.status is RpcStatus.CANCELLED:
        raise asyncio.CancelledError
    return await context.abort(_STATUS[int(abort.status)], abort.message)


def _call(name: str, context: Any) -> Call:
    metadata: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            metadata.setdefault(key, value)
    remaining = context.time_remaining()
    pem = context.auth_context().get("x509_pem_cert")
    return Call(
        method=name,
        metadata=metadata,
        peer=context.peer(),
        deadline=None if remaining is None else time.monotonic() + remaining,
        certificate=pem[0] if pem else None,
    )
