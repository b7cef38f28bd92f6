"""The wire on grpcio: a TLS port for the stock SDKs, and one that demands a client certificate.

The fallback transport and the oracle for the other one. It knows bytes, certificates and gRPC statuses; no message, no
model. Certificates are read again for each new handshake when they changed; live connections keep theirs.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from grpc import aio

from appliance.core.config import parse_address
from appliance.core.errors import AddressError
from appliance.core.timing import HEADER
from appliance.core.types import Call, Endpoint, RpcAbort, RpcStatus
from appliance.wire import sentences
from appliance.wire.grpc import NO_MESSAGE, unforeseen
from appliance.wire.settings import Credentials, WireSettings

_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class GrpcioServer:
    """Both ports of the grpcio transport."""

    def __init__(self, endpoints: Mapping[str, Endpoint], settings: WireSettings) -> None:
        """Make a server that is not listening yet.

        Args:    settings: followed in the limits of messages and metadata and in `request_timeout_s`.
        """
        self._server = aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_message),
                ("grpc.max_send_message_length", -1),  # _checked names the setting
                ("grpc.so_reuseport", 0),  # a taken port is an error, not a share
                # Idle clients ping as they like: the stock ones do not, and a proxy that does is not an attacker.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 300_000),
                ("grpc.max_metadata_size", settings.metadata),
                ("grpc.max_concurrent_streams", 1024),
            ],
        )
        self._server.add_generic_rpc_handlers((_Handlers(endpoints, settings),))
        self.ports: dict[str, int] = {}

    def listen(self, name: str, address: str, read: Callable[[], Credentials]) -> None:
        """Bind a port; `read` gives its credentials, now and again for later handshakes.

        Raises: AddressError: the port cannot be bound.
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
            raise AddressError(
                f"{name} {address} cannot be bound: the port is taken (`ss -ltnp` shows by whom), or the address is "
                "not this machine's."
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

    def __init__(self, endpoints: Mapping[str, Endpoint], settings: WireSettings) -> None:
        self._handlers = {name: _handler(name, endpoint, settings) for name, endpoint in endpoints.items()}

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a method, or None, which grpcio answers with UNIMPLEMENTED."""
        return self._handlers.get(handler_call_details.method)


def _handler(name: str, endpoint: Endpoint, settings: WireSettings) -> Any:
    """An endpoint as grpcio's handler. Unary calls are taken as streams of one, so that a caller is admitted before its
    body is read; on the wire they are the same."""
    if endpoint.unary is not None:
        unary = endpoint.unary

        async def serve_unary(requests: AsyncIterator[bytes], context: Any) -> bytes:
            call = _call(name, context)
            try:
                refusal = endpoint.admit(call, 0) if endpoint.admit else None
                if refusal is not None:
                    return refusal
                body = await _body(requests, settings.request_timeout_s)
                reply = _checked(await unary(call, body), settings.max_reply)
                if call.timing is not None:
                    context.set_trailing_metadata(_timing(call))
                return reply
            except RpcAbort as abort:
                return await _end(context, call, abort)
            except Exception:  # else grpcio would show it to the caller
                return await _end(context, call, unforeseen(name))

        return grpc.stream_unary_rpc_method_handler(serve_unary)
    stream = endpoint.stream
    assert stream is not None

    async def serve_stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        call = _call(name, context)
        try:
            refusal = endpoint.admit(call, 0) if endpoint.admit else None
            if refusal is not None:
                yield refusal
                return
            async for reply in stream(call, requests):
                yield _checked(reply, settings.max_reply)
            if call.timing is not None:
                context.set_trailing_metadata(_timing(call))
        except RpcAbort as abort:
            await _end(context, call, abort)
        except Exception:  # as above
            await _end(context, call, unforeseen(name))

    return grpc.stream_stream_rpc_method_handler(serve_stream)


async def _body(requests: AsyncIterator[bytes], timeout_s: float) -> bytes:
    """The one message of a unary call. Raises: RpcAbort: there is none, or it does not come."""
    try:
        async with asyncio.timeout(timeout_s):
            async for body in requests:
                return body
    except TimeoutError as error:
        raise RpcAbort(RpcStatus.DEADLINE_EXCEEDED, sentences.request_too_late(timeout_s)) from error
    raise RpcAbort(RpcStatus.INTERNAL, NO_MESSAGE)


def _checked(reply: bytes, limit: int) -> bytes:
    """Raises: RpcAbort: it is too large."""
    if len(reply) > limit:
        raise RpcAbort(RpcStatus.RESOURCE_EXHAUSTED, sentences.reply_too_large(len(reply), limit))
    return reply


def _timing(call: Call) -> tuple[tuple[str, str], ...]:
    """The trailer that says where the time went, to a caller who asked."""
    return ((HEADER, call.timing.said),) if call.timing is not None and call.timing.said else ()


async def _end(context: Any, call: Call, abort: RpcAbort) -> Any:
    # A call that is being cancelled by the server's own stop cannot be aborted any more: it is over already.
    if abort.status is RpcStatus.CANCELLED:
        raise asyncio.CancelledError
    details = (("grpc-status-details-bin", abort.details),) if abort.details else ()
    return await context.abort(_STATUS[int(abort.status)], abort.message, (*details, *_timing(call)))


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
